//! What the tool does with the findings of a device's sanitizer.

use std::fmt::Write;

use serde_json::Value;

/// Exit code of `device` and `demo` when the sanitizer has found something.
pub const EXIT_CODE: u8 = 4;
/// As [`EXIT_CODE`], of `vm`, whose other codes are its command's.
pub const VM_EXIT_CODE: u8 = 123;

/// The level that looks at a host daemon's log of changes.
pub const WITH_CHANGES: u8 = 2;

/// The level to run one at, if at all: told to, or `TLBRIDGE_SANITIZE=1` (or 2) in the environment.
pub fn wanted(option: Option<u8>) -> Option<u8> {
    let levels = 1..=WITH_CHANGES;
    let environment = || {
        let value = std::env::var("TLBRIDGE_SANITIZE").ok()?;
        value.parse().ok().filter(|level| levels.contains(level))
    };
    option.or_else(environment)
}

/// Occurrences of defects in a device's findings; 0 without a sanitizer.
pub fn defects(findings: &Value) -> u64 {
    findings["defects"].as_u64().unwrap_or(0)
}

/// One line about a device's findings; `None` without a sanitizer.
pub fn summary(findings: &Value) -> Option<String> {
    let figure = |key: &str| findings[key].as_u64().unwrap_or(0);
    let reports = findings["reports"].as_array()?;
    let mut text = format!("sanitizer: {} defects", figure("defects"));
    let mut classes: Vec<(&str, u64)> = Vec::new();
    for report in reports {
        let (Some(class), Some(count)) = (report["class"].as_str(), report["count"].as_u64()) else {
            continue;
        };
        match classes.iter_mut().find(|(known, _)| *known == class) {
            Some((_, sum)) => *sum += count,
            None => classes.push((class, count)),
        }
    }
    if !classes.is_empty() {
        let list: Vec<_> = classes
            .iter()
            .map(|(class, count)| format!("{class} {count}"))
            .collect();
        write!(text, " in {} reports ({})", reports.len(), list.join(", ")).expect("a string takes all");
    }
    match figure("defects_without_report") {
        0 => {}
        more => write!(text, ", {more} more without a report").expect("a string takes all"),
    }
    write!(
        text,
        "; {} accesses and fills checked, {} not judged",
        figure("checked"),
        figure("unjudged")
    )
    .expect("a string takes all");
    match findings["changes"].as_u64() {
        None => {}
        Some(0) => text.push_str("; no host daemon has told of a change"),
        Some(changes) => {
            write!(text, "; {changes} changes of mappings heard").expect("a string takes all");
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_summary_when_there_are_findings_counts_by_class() {
        let findings = json!({"defects": 8, "checked": 90, "unjudged": 1, "defects_without_report": 2,
            "reports": [{"class": "a", "count": 3}, {"class": "b", "count": 1}, {"class": "a", "count": 2}]});
        assert_eq!(
            summary(&findings).unwrap(),
            "sanitizer: 8 defects in 3 reports (a 5, b 1), 2 more without a report; 90 accesses and fills checked, \
             1 not judged"
        );
        assert_eq!(defects(&findings), 8);
        for (changes, end) in [
            (0, "; no host daemon has told of a change"),
            (7, "; 7 changes of mappings heard"),
        ] {
            let findings = json!({"defects": 0, "reports": [], "changes": changes});
            assert!(summary(&findings).unwrap().ends_with(end));
        }
    }

    #[test]
    fn test_summary_when_there_is_no_sanitizer_is_none() {
        assert_eq!((summary(&Value::Null), defects(&Value::Null)), (None, 0));
    }
}
