//! `tlbridge conformance`: cases from the vfio-user specification against any server socket.

mod capability_cases;
mod device_cases;
mod dma_cases;
mod message_cases;
mod wire;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::ConformanceArgs;
use wire::{ERROR, Message, VERSION, Wire};

/// How long the server may take to let the next client in.
const NEXT_CLIENT: Duration = Duration::from_secs(5);

/// Where something may be done to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Region number.
    pub region: u32,
    /// Offset in it.
    pub offset: u64,
}

/// How the device is made to access the client's memory: writing an address (8 bytes) to `trigger` makes it move
/// the 8 bytes at `data` there (dma_write), or those 8 bytes to `data` (dma_read).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DmaFact {
    /// Where the address is written.
    pub trigger: Place,
    /// The device's end.
    pub data: Place,
}

/// What the suite cannot find out by itself. Cases that need a fact that is not given do not apply.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Facts {
    /// Four bytes that keep what is written to them and do nothing else.
    pub scratch: Option<Place>,
    /// Written to config space's command register (offset 4) first, for devices that answer nothing before.
    pub pci_command: Option<u16>,
    /// DMA_MAP with a file descriptor works.
    pub dma_map: bool,
    /// A way to make the device read.
    pub dma_read: Option<DmaFact>,
    /// A way to make the device write.
    pub dma_write: Option<DmaFact>,
    /// DEVICE_RESET works.
    pub reset: bool,
    /// A second client is refused while the first is connected.
    pub single_client: bool,
    /// Error replies may have errno 0, which the specification allows and QEMU takes for success.
    pub errno_may_be_zero: bool,
}

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Pass,
    Fail,
    NotApplicable,
}

/// What a case says when the server does not break the rule.
enum Outcome {
    Pass,
    NotApplicable(&'static str),
}

/// A rule.
struct Case {
    name: &'static str,
    /// Section of the specification.
    section: &'static str,
    run: fn(&Target<'_>) -> Result<Outcome>,
}

/// Shorthand for a table of cases.
const fn case(name: &'static str, section: &'static str, run: fn(&Target<'_>) -> Result<Outcome>) -> Case {
    Case { name, section, run }
}

#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    section: &'static str,
    verdict: Verdict,
    reason: String,
}

/// The server under test.
struct Target<'a> {
    socket: &'a Path,
    facts: &'a Facts,
}

impl Target<'_> {
    /// A connection before VERSION.
    fn connect(&self) -> Result<Wire> {
        Wire::connect(self.socket)
    }

    /// A connection past VERSION. The client of the case before may still be being cleaned up.
    fn client(&self) -> Result<Wire> {
        Ok(self.client_with(CAPABILITIES)?.0)
    }

    /// As [`Self::client`], proposing these capabilities; the reply to VERSION, too.
    fn client_with(&self, capabilities: &str) -> Result<(Wire, Message)> {
        let deadline = Instant::now() + NEXT_CLIENT;
        loop {
            let mut wire = self.connect()?;
            let problem = match wire.call(VERSION, &version(0, 1, Some(capabilities))) {
                Ok(reply) if reply.flags & ERROR == 0 => {
                    if let Some(command) = self.facts.pci_command {
                        let body = wire::access(7, 4, 2, &command.to_ne_bytes());
                        wire.good(wire::REGION_WRITE, &body)
                            .context("PCI command register")?;
                    }
                    return Ok((wire, reply));
                }
                Ok(reply) => anyhow::anyhow!("VERSION is refused with errno {}", reply.error),
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(problem.context("no session"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

const CAPABILITIES: &str = r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}"#;

/// Body of VERSION.
fn version(major: u16, minor: u16, data: Option<&str>) -> Vec<u8> {
    let mut body = major.to_ne_bytes().to_vec();
    body.extend(minor.to_ne_bytes());
    if let Some(data) = data {
        body.extend(data.as_bytes());
        body.push(0);
    }
    body
}

const ALL: [&[Case]; 4] = [
    message_cases::CASES,
    device_cases::CASES,
    dma_cases::CASES,
    capability_cases::CASES,
];

/// Runs all cases. True: none failed.
///
/// # Errors
/// The facts cannot be read, nobody listens at the socket, or `out` cannot be written.
pub fn run(args: &ConformanceArgs, out: &mut impl Write) -> Result<bool> {
    let facts: Facts = match &args.facts {
        None => Facts::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the facts in {}", path.display()))?;
            serde_json::from_str(&text)
                .with_context(|| format!("the facts in {} (see docs/conformance.md)", path.display()))?
        }
    };
    let target = Target {
        socket: &args.socket,
        facts: &facts,
    };
    drop(target.connect().context("is the server running?")?);
    let mut findings = Vec::new();
    for case in ALL.into_iter().flatten() {
        if args
            .only
            .as_ref()
            .is_some_and(|only| !case.name.contains(only.as_str()))
        {
            continue;
        }
        let (verdict, reason) = match (case.run)(&target) {
            Ok(Outcome::Pass) => (Verdict::Pass, String::new()),
            Ok(Outcome::NotApplicable(why)) => (Verdict::NotApplicable, why.into()),
            Err(error) => (Verdict::Fail, format!("{error:#}")),
        };
        let finding = Finding {
            name: case.name,
            section: case.section,
            verdict,
            reason,
        };
        if !args.json {
            writeln!(out, "{}", line(&finding))?;
        }
        findings.push(finding);
    }
    if findings.is_empty() {
        bail!("no case has that name");
    }
    let count = |verdict| {
        findings
            .iter()
            .filter(|finding| finding.verdict == verdict)
            .count()
    };
    let (passed, failed, rest) = (
        count(Verdict::Pass),
        count(Verdict::Fail),
        count(Verdict::NotApplicable),
    );
    if args.json {
        let object = json!({
            "suite": "vfio-user",
            "passed": passed,
            "failed": failed,
            "not_applicable": rest,
            "facts": facts,
            "cases": findings,
        });
        writeln!(out, "{object}")?;
    } else {
        writeln!(out, "{passed} passed, {failed} failed, {rest} not applicable")?;
    }
    Ok(failed == 0)
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "FAIL",
        Verdict::NotApplicable => "n/a",
    };
    let mut line = format!("{verdict:<6}{:<56}{}", finding.name, finding.section);
    if !finding.reason.is_empty() {
        line.push_str(": ");
        line.push_str(&finding.reason);
    }
    line
}

/// For values that have to be equal.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, wanted: T) -> Result<()> {
    ensure!(got == wanted, "{what}: {got:?}, expected {wanted:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_cases_when_listed_have_names_of_their_own() {
        let mut names: Vec<_> = ALL.into_iter().flatten().map(|case| case.name).collect();
        let before = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), before);
    }

    #[test]
    fn test_facts_when_a_name_is_wrong_are_refused() {
        assert!(serde_json::from_str::<Facts>(r#"{"dma_mapp": true}"#).is_err());
        let facts: Facts = serde_json::from_str(r#"{"scratch": {"region": 0, "offset": 32768}}"#).unwrap();
        assert_eq!(facts.scratch.map(|place| place.offset), Some(32768));
        assert!(!facts.dma_map);
    }
}
