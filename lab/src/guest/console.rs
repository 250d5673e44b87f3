//! What a guest's console log tells about its end.

use std::path::Path;

/// Lines of the log that an error shows.
const SHOWN: usize = 40;

/// Beginnings of what a kernel says when it stops, after the time stamp.
const PANICS: &[&str] = &["Kernel panic - not syncing"];
/// When it goes on, but something is wrong.
const COMPLAINTS: &[&str] = &[
    "BUG: ",
    "Oops: ",
    "WARNING: ",
    "general protection fault",
    "Unable to handle kernel",
    "INFO: task ",
    "INFO: rcu",
    "rcu: INFO: ",
    "watchdog: BUG",
    "kernel BUG at",
    "UBSAN: ",
    "KASAN: ",
    "unchecked MSR access",
    "irq ",
];

/// The log as it is now; bytes that are no text are replaced.
pub(super) fn read(log: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned()
}

/// The line with which the kernel stopped.
pub(super) fn panic_line(text: &str) -> Option<String> {
    text.lines()
        .map(message)
        .find(|m| PANICS.iter().any(|p| m.starts_with(p)))
        .map(str::to_owned)
}

/// Lines in which the kernel complains: of errors that it survived.
pub(super) fn complaints(text: &str) -> Vec<String> {
    text.lines()
        .map(message)
        .filter(|m| {
            COMPLAINTS
                .iter()
                .any(|c| m.starts_with(c) && (*c != "irq " || m.contains("nobody cared")))
        })
        .map(str::to_owned)
        .collect()
}

/// The last lines, indented.
pub(super) fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..]
        .iter()
        .map(|line| format!("\n  | {}", line.trim_end()))
        .collect()
}

/// A line without its time stamp `[    1.234567]`, and without what a guest's terminal adds.
fn message(line: &str) -> &str {
    let line = line.trim();
    match line.strip_prefix('[').and_then(|l| l.split_once("] ")) {
        Some((stamp, rest)) if stamp.trim().parse::<f64>().is_ok() => rest,
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "[    0.1] Linux version 6.12\r\n[    1.5] irq 9: nobody cared (try booting with)\r\n\
                       [    1.6] irq 9 is fine\n[    2.0] WARNING: CPU: 0 PID: 1 at x\nBUG: kernel NULL pointer\n\
                       user says BUG: not at the start\n[   12.25] Kernel panic - not syncing: Fatal exception\n";

    #[test]
    fn test_console_when_the_kernel_panicked_has_the_line() {
        assert_eq!(
            panic_line(LOG).as_deref(),
            Some("Kernel panic - not syncing: Fatal exception")
        );
        assert_eq!(panic_line("[ 1.0] not a Kernel panic - not syncing\n"), None);
    }

    #[test]
    fn test_console_when_the_kernel_complained_has_each_complaint() {
        assert_eq!(
            complaints(LOG),
            [
                "irq 9: nobody cared (try booting with)",
                "WARNING: CPU: 0 PID: 1 at x",
                "BUG: kernel NULL pointer"
            ]
        );
    }

    #[test]
    fn test_tail_when_the_log_is_long_is_its_end() {
        let text: String = (0..100).map(|i| format!("line {i}\n")).collect();
        let tail = tail(&text);
        assert!(
            tail.starts_with("\n  | line 60") && tail.ends_with("line 99"),
            "{tail}"
        );
    }
}
