//! Which archive of Debian the packages come from.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Debian's own, which redirects to one near by.
const DEFAULT: &str = "http://deb.debian.org/debian";

/// `TLBRIDGE_MIRROR`, else the archive that a Debian system's own package sources name, else Debian's.
pub(crate) fn mirror() -> String {
    match std::env::var("TLBRIDGE_MIRROR") {
        Ok(named) if !named.is_empty() => named,
        _ => of_this_system().unwrap_or_else(|_| DEFAULT.into()),
    }
}

fn of_this_system() -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    for entry in std::fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
    {
        files.push(entry.path());
    }
    files.sort();
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        release
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_owned())
    };
    anyhow::ensure!(field("ID").as_deref() == Some("debian"), "not a Debian system");
    let codename = field("VERSION_CODENAME").context("/etc/os-release names no VERSION_CODENAME")?;
    files
        .iter()
        .filter_map(|f| std::fs::read_to_string(f).ok())
        .find_map(|text| archive_of(&text, &codename))
        .with_context(|| format!("no apt source of this system has {codename} main"))
}

/// The URI that has `codename` with the component `main`, in either format of apt's sources.
fn archive_of(text: &str, codename: &str) -> Option<String> {
    for line in text.lines() {
        let mut words = line
            .split_whitespace()
            .filter(|w| !w.starts_with('[') && !w.ends_with(']'));
        if words.next() == Some("deb") {
            let (uri, suite) = (words.next()?, words.next()?);
            if suite == codename && words.any(|w| w == "main") {
                return Some(uri.to_owned());
            }
        }
    }
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .filter(|l| !l.starts_with('#'))
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        };
        let has =
            |name: &str, word: &str| field(name).is_some_and(|v| v.split_whitespace().any(|w| w == word));
        if has("Types", "deb") && has("Suites", codename) && has("Components", "main") {
            return field("URIs")?.split_whitespace().next().map(str::to_owned);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::archive_of;

    #[test]
    fn test_archive_when_in_deb822_format_is_the_one_with_main() {
        let text = "Types: deb\n# http://old.example/x\nURIs: http://one.example/security\nSuites: bookworm-security\n\
                    Components: main\n\nTypes: deb\nURIs: http://two.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main contrib\n";
        assert_eq!(
            archive_of(text, "bookworm").as_deref(),
            Some("http://two.example/debian")
        );
        assert_eq!(archive_of(text, "trixie"), None);
    }

    #[test]
    fn test_archive_when_in_one_line_format_is_the_one_with_main() {
        let text = "# deb http://no.example/debian bookworm main\ndeb-src http://src.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://three.example/debian bookworm main non-free\n";
        assert_eq!(
            archive_of(text, "bookworm").as_deref(),
            Some("http://three.example/debian")
        );
    }
}
