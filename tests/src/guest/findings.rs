//! What the device's sanitizer has found, and what a program in the guest has said, as verdicts use them.

use std::collections::BTreeSet;

use serde_json::Value;

/// The classes of what was found.
///
/// # Panics
/// When the device had no sanitizer.
#[must_use]
pub fn classes(findings: &Value) -> BTreeSet<&str> {
    let reports = findings["reports"].as_array().expect("a sanitizer");
    reports
        .iter()
        .filter_map(|report| report["class"].as_str())
        .collect()
}

/// The sanitizer has looked, and found nothing.
///
/// # Panics
/// When it has not, or has.
pub fn assert_faultless(who: &str, findings: &Value) {
    assert_looked(who, findings);
    assert_eq!(findings["defects"].as_u64(), Some(0), "{who}: {findings:#}");
}

/// The sanitizer has looked.
///
/// # Panics
/// When it has not.
pub fn assert_looked(who: &str, findings: &Value) {
    let checked = findings["checked"].as_u64();
    assert!(checked > Some(0), "{who}: {findings:#}");
}

/// Fills that a broken kill bit let in are all that was found, and at least as many as the program has seen stale
/// accesses: some it could not see.
///
/// # Panics
/// When it was something else.
pub fn assert_stale_fills(who: &str, findings: &Value, output: &str) {
    assert_looked(who, findings);
    assert_eq!(
        classes(findings),
        BTreeSet::from(["fill-after-kill"]),
        "{who}: {findings:#}"
    );
    let stale = number(output, " stale accesses");
    assert!(
        stale > 0 && findings["defects"].as_u64() >= Some(stale),
        "{who}: {stale}: {findings:#}"
    );
    let report = &findings["reports"][0];
    let filled = report["entry"]["filled"]["event"].as_u64();
    assert!(
        filled > report["purges"][0]["begun"]["event"].as_u64(),
        "{who}: {report}"
    );
    assert!(
        report["by"]["queue"].is_u64() && report["by"]["context"].is_u64(),
        "{who}: {report}"
    );
}

/// The number before ` what` in what a test has said.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn number(output: &str, what: &str) -> u64 {
    let before = output.split(what).next().unwrap_or_default();
    let word = before.split_whitespace().next_back().unwrap_or_default();
    word.parse()
        .unwrap_or_else(|e| panic!("no number before {what:?}: {e}: {output}"))
}
