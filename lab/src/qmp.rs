//! QEMU's machine protocol: commands, answers, events; one JSON object a line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

/// A connection on which QEMU has greeted.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

/// QEMU has ended, refuses, or said something that is no answer.
#[derive(Debug, thiserror::Error)]
#[error("QEMU's monitor: {0}")]
pub struct QmpError(pub String);

impl Qmp {
    /// Takes the greeting and leaves negotiation. The stream's read timeout is the patience with QEMU.
    ///
    /// # Errors
    /// QEMU has ended or is not one.
    pub fn new(stream: UnixStream) -> Result<Self, QmpError> {
        let mut new = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        let _greeting = new.message()?;
        new.execute("qmp_capabilities", &json!({}))?;
        Ok(new)
    }

    /// A command; its `return`.
    ///
    /// # Errors
    /// QEMU has ended, or answers with an error.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|e| QmpError(format!("{command}: {e}")))?;
        loop {
            let message = self.message()?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(value) = message.get("return") {
                return Ok(value.clone());
            } else {
                return Err(QmpError(format!("{command}: {message}")));
            }
        }
    }

    /// Waits for an event about a device (or any, with ""); its data.
    ///
    /// # Errors
    /// QEMU has ended, or the event does not come.
    pub fn event(&mut self, name: &str, device: &str) -> Result<Value, QmpError> {
        let is_it = |e: &Value| e["event"] == name && (device.is_empty() || e["data"]["device"] == device);
        if let Some(index) = self.events.iter().position(is_it) {
            return Ok(self.events.remove(index)["data"].take());
        }
        loop {
            let mut message = self.message()?;
            if is_it(&message) {
                return Ok(message["data"].take());
            }
            self.events.push(message);
        }
    }

    fn message(&mut self) -> Result<Value, QmpError> {
        let mut line = String::new();
        // An end shows as one of the file, or as a reset.
        let read = self.stream.read_line(&mut line);
        if !matches!(read, Ok(1..)) {
            return Err(QmpError(format!("no answer ({read:?})")));
        }
        serde_json::from_str(&line).map_err(|e| QmpError(format!("{line}: {e}")))
    }
}
