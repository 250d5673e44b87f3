//! The options of `tlbridge bench register`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Mode;

/// Options of `bench register`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
What cannot be measured here (no libibverbs, no device, no on-demand paging, too little memory) is a skipped row
with its reason, and the exit code is 0 all the same. Exit code 1: the HCA moved wrong data. docs/register.md says
what each row means.

Examples:
  tlbridge bench register --verbs --json register.json
  tlbridge bench register --verbs --device mlx5_0 --port 1 --gid-index 3 --max-size 64M
  tlbridge bench register --verbs --mode pinned --mode cache --size 1M --samples 1000")]
pub struct RegisterArgs {
    /// Through libibverbs, on any HCA.
    #[arg(long, required = true)]
    pub verbs: bool,
    /// Which HCA, as `ibv_devices` names it (default: the first one with an active port).
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Which port (default: the first active one).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub port: Option<u8>,
    /// Which of the port's addresses (default: on Ethernet one of RoCE v2, IPv4 if there is; none on InfiniBand).
    #[arg(long, value_name = "N")]
    pub gid_index: Option<u8>,
    /// Only this mode (repeatable).
    #[arg(long = "mode", value_enum, value_name = "MODE")]
    pub modes: Vec<Mode>,
    /// Smallest size, as in 4K [default: 4K].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub min_size: Option<u64>,
    /// Largest size, as in 256M [default: 1G; quick: 1M].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub max_size: Option<u64>,
    /// Exactly this size (repeatable).
    #[arg(long = "size", value_name = "BYTES", value_parser = bytes, conflicts_with_all = ["min_size", "max_size"])]
    pub sizes: Vec<u64>,
    /// Samples of each row, if the budget lasts.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub samples: u32,
    /// How long a mode and a size may take together. There are three samples at least, or one where an iteration
    /// takes several times as long.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    pub budget: f64,
    /// Which pages the memory has.
    #[arg(long, value_enum, default_value_t = PagesName::Default)]
    pub pages: PagesName,
    /// Few samples and small sizes: to see that it works, not to publish.
    #[arg(long)]
    pub quick: bool,
    /// Write the result as one JSON object to a file (`-` = stdout instead of the table).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Seed of the contents and of the bootstrap.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// Pages of the registered memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PagesName {
    /// As the system is set up (/sys/kernel/mm/transparent_hugepage/enabled).
    Default,
    /// 4 KiB.
    Small,
    /// Transparent huge ones where possible.
    Huge,
}

impl PagesName {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Small => "small",
            Self::Huge => "huge",
        }
    }
}

impl From<PagesName> for verbs::Pages {
    fn from(name: PagesName) -> Self {
        match name {
            PagesName::Default => Self::Default,
            PagesName::Small => Self::Small,
            PagesName::Huge => Self::Huge,
        }
    }
}

/// `4096`, `4K`, `16M`, `1G`.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.split_at_checked(text.len().saturating_sub(1)) {
        Some((digits, "K" | "k")) => (digits, 10),
        Some((digits, "M" | "m")) => (digits, 20),
        Some((digits, "G" | "g")) => (digits, 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|e| format!("{digits:?}: {e} (a number, with K, M or G if wanted)"))?;
    match number.checked_mul(1 << shift) {
        Some(bytes @ 1..=0x100_0000_0000) => Ok(bytes),
        _ => Err("between 1 and 1024G".into()),
    }
}

/// A time of up to an hour.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("seconds, from 0 to 3600".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_bytes_when_written_with_a_unit_are_bytes() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(
            [bytes("4K"), bytes("3m"), bytes("1G")],
            [Ok(4096), Ok(3 << 20), Ok(1 << 30)]
        );
        for wrong in [
            "",
            "K",
            "0",
            "-1K",
            "1T",
            "99999999999999999999",
            "18014398509481985K",
            "1025G",
            "\u{20ac}",
        ] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn test_seconds_when_no_number_are_refused() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        for wrong in ["NaN", "inf", "-1", "3601", ""] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
