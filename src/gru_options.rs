//! What the GRU's documentation leaves open, and what can be made to fail: switches of `tlbridge device`.

use std::str::FromStr;

use ::device::faults::FaultPlan;
use ::device::gru::{BstoreSource, GruConfig, IndexUnit, PurgeMatch, Regions};
use clap::{Args, ValueEnum};
use protos::gru::tfh::Cause;

/// The model's variants. The defaults are what the kernel's driver works with.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Open points of the hardware")]
pub struct GruOptions {
    /// Sets and ways of a chiplet's TLB.
    #[arg(long, value_name = "SETSxWAYS", default_value = "1024x4")]
    pub tlb: TlbShape,
    /// Cause of a store that finds no entry: mod saves the second miss after a read-only fill.
    #[arg(long, value_enum, default_value_t = StoreMiss::Mod)]
    pub store_miss: StoreMiss,
    /// What a ranged TLBINV removes: every entry that meets the range, or only entries of the command's page size
    /// (the kernel's driver then leaves stale huge pages behind).
    #[arg(long, value_enum, default_value_t = Match::Overlap)]
    pub purge_match: Match,
    /// Address bits that select the region: 3, or the 2 of the kernel driver's arithmetic.
    #[arg(long, value_name = "BITS", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=3))]
    pub region_bits: u8,
    /// Bit of ecause after a miss that was answered with EXCEPTION.
    #[arg(long, value_name = "BIT", default_value_t = 6, value_parser = clap::value_parser!(u8).range(0..=19))]
    pub fatal_ecause: u8,
    /// Unit of the indexes of IVLOAD, IVSTORE and IVSET.
    #[arg(long, value_enum, default_value_t = Unit::Bytes)]
    pub index_unit: Unit,
    /// What BSTORE stores: the data segment at tri0, or memory at baddr0.
    #[arg(long, value_enum, default_value_t = Source::Segment)]
    pub bstore_source: Source,
    /// For experiments (GRU only): what goes wrong, every how many occasions. Words: dropin-delay, drain-delay,
    /// early-completion, lost-interrupt, duplicate-fault, delayed-restart, wrong-status, stale-asid, miss-cause, execution-error,
    /// lb-overflow, amo-nack, put-nack; and seed, limit-ms, margin-ms.
    #[arg(long, value_name = "WORD[=N],...", help_heading = "Experiments", conflicts_with_all = ["break_check", "delay"])]
    pub faults: Option<FaultPlan>,
}

/// A TLB's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlbShape {
    sets: usize,
    ways: usize,
}

impl FromStr for TlbShape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}': write SETSxWAYS, as in 1024x4");
        let (sets, ways) = text.split_once('x').ok_or_else(wrong)?;
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        Ok(Self {
            sets: number(sets)?,
            ways: number(ways)?,
        })
    }
}

/// Names of TFH causes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoreMiss {
    /// TLB_MOD.
    Mod,
    /// TLB_MISS.
    Miss,
}

/// Names of [`PurgeMatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Match {
    /// Entries that meet the range.
    Overlap,
    /// Entries of the command's page size.
    Exact,
}

/// Names of [`IndexUnit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Elements.
    Elements,
}

/// Names of [`BstoreSource`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// The data segment.
    Segment,
    /// Memory.
    Memory,
}

impl GruOptions {
    /// Sets what these options say in `config`.
    pub fn apply(&self, config: &mut GruConfig) {
        (config.tlb_sets, config.tlb_ways) = (self.tlb.sets, self.tlb.ways);
        config.store_miss_cause = match self.store_miss {
            StoreMiss::Mod => Cause::TLB_MOD,
            StoreMiss::Miss => Cause::TLB_MISS,
        };
        config.purge_match = match self.purge_match {
            Match::Overlap => PurgeMatch::Overlap,
            Match::Exact => PurgeMatch::Exact,
        };
        config.regions = match self.region_bits {
            2 => Regions::Two,
            _ => Regions::Three,
        };
        config.fatal_fault_ecause = self.fatal_ecause;
        config.index_unit = match self.index_unit {
            Unit::Bytes => IndexUnit::Bytes,
            Unit::Elements => IndexUnit::Elements,
        };
        config.bstore_source = match self.bstore_source {
            Source::Segment => BstoreSource::Segment,
            Source::Memory => BstoreSource::Memory,
        };
        if let Some(faults) = self.faults {
            config.faults = faults;
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        gru: GruOptions,
        #[arg(long)]
        break_check: Option<String>,
        #[arg(long)]
        delay: Option<String>,
    }

    fn config(words: &[&str]) -> Result<GruConfig, clap::Error> {
        let line = Line::try_parse_from(["device"].iter().chain(words))?;
        let mut config = GruConfig::default();
        line.gru.apply(&mut config);
        Ok(config)
    }

    #[test]
    fn test_options_when_none_is_given_are_the_models_defaults() {
        assert_eq!(config(&[]).unwrap(), GruConfig::default());
    }

    #[test]
    fn test_options_when_all_are_given_reach_the_model() {
        let config = config(&[
            "--tlb=64x2",
            "--store-miss=miss",
            "--purge-match=exact",
            "--region-bits=2",
            "--fatal-ecause=8",
            "--index-unit=elements",
            "--bstore-source=memory",
            "--faults=lost-interrupt=3,seed=9",
        ])
        .unwrap();
        let expected = GruConfig {
            tlb_sets: 64,
            tlb_ways: 2,
            store_miss_cause: Cause::TLB_MISS,
            purge_match: PurgeMatch::Exact,
            regions: Regions::Two,
            fatal_fault_ecause: 8,
            index_unit: IndexUnit::Elements,
            bstore_source: BstoreSource::Memory,
            faults: "lost-interrupt=3,seed=9".parse().unwrap(),
            ..GruConfig::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn test_options_when_wrong_are_refused_by_name() {
        for (words, says) in [
            ("--tlb=1024", "SETSxWAYS"),
            ("--region-bits=4", "region-bits"),
            ("--fatal-ecause=20", "fatal-ecause"),
            ("--faults=lost", "'lost'"),
        ] {
            let error = config(&[words]).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
