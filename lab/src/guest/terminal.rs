//! This process' terminal, handed to a guest.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::termios::{self, OptionalActions, Termios};

/// Ctrl-A, which a QEMU console uses as well.
const ESCAPE: u8 = 1;

/// Ctrl-D, with which a terminal says that nothing more is typed.
pub(super) const END: u8 = 4;

/// The terminal in raw mode, until it is dropped. If standard input is no terminal it is just read.
#[derive(Debug)]
pub(super) struct Raw {
    before: Option<Termios>,
}

impl Raw {
    pub(super) fn new() -> io::Result<Self> {
        let stdin = rustix::stdio::stdin();
        if !termios::isatty(stdin) {
            return Ok(Self { before: None });
        }
        let before = termios::tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin, OptionalActions::Flush, &raw)?;
        Ok(Self { before: Some(before) })
    }

    /// What tells the guest how large the terminal is.
    pub(super) fn size_command(&self) -> String {
        match termios::tcgetwinsize(rustix::stdio::stdin()) {
            Ok(size) if self.before.is_some() && size.ws_row > 0 => {
                format!("stty rows {} cols {}", size.ws_row, size.ws_col)
            }
            _ => ":".into(),
        }
    }

    /// What was typed; nothing: the end.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = [0; 4096];
        match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
            Ok(count) => Ok(bytes[..count].to_vec()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(rustix::stdio::stdout(), bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Raw {
    fn as_fd(&self) -> BorrowedFd<'_> {
        rustix::stdio::stdin()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Nothing can be done about a terminal that is gone.
            let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, before);
        }
    }
}

/// Finds Ctrl-A x in what was typed.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    /// What goes to the guest, and whether to leave it.
    pub(super) fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut forward = Vec::with_capacity(typed.len());
        for byte in typed {
            match (std::mem::take(&mut self.pending), *byte) {
                (true, b'x' | b'X') => return (forward, true),
                (true, ESCAPE) => forward.push(ESCAPE),
                (true, other) => forward.extend([ESCAPE, other]),
                (false, ESCAPE) => self.pending = true,
                (false, other) => forward.push(other),
            }
        }
        (forward, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_escape_when_typed_in_pieces_leaves_and_else_passes_on() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ab\x01"), (b"ab".to_vec(), false));
        assert_eq!(escape.filter(b"\x01c\x01d"), (b"\x01c\x01d".to_vec(), false));
        assert_eq!(escape.filter(b"e\x01"), (b"e".to_vec(), false));
        assert_eq!(escape.filter(b"x"), (Vec::new(), true));
    }
}
