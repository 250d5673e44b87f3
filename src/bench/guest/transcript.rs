//! What `gru-guest invalidate` and `gru-guest statistics` print.

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::bench::statistics::Block;

/// A case and the bytes of its range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// What was called, on what.
    pub case: String,
    /// Length of the range.
    pub size_bytes: u64,
}

/// The driver's own figures of tgh_invalidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Flushes {
    /// How many.
    pub count: u64,
    /// Mean, nanoseconds.
    pub average_ns: u64,
    /// Longest, nanoseconds.
    pub max_ns: u64,
}

/// An access to the device, as the guest's processor sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Access {
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Transcript {
    /// Cells in the order of measurement, with their blocks and flushes.
    pub cells: Vec<(Cell, Vec<Block>, Option<Flushes>)>,
    /// Accesses by name.
    pub accesses: Vec<(String, Access)>,
    /// All flushes that the driver has counted since it was loaded.
    pub tgh_flushes: u64,
}

impl Transcript {
    /// # Errors
    /// Lines that are not what they should be, or too few of them.
    pub fn read(text: &str) -> Result<Self> {
        let mut all = Self::default();
        for line in text.lines() {
            all.line(line)
                .with_context(|| format!("gru-guest said {line:?}"))?;
        }
        ensure!(
            !all.cells.is_empty() && !all.accesses.is_empty(),
            "gru-guest measured nothing: {text}"
        );
        Ok(all)
    }

    fn line(&mut self, line: &str) -> Result<()> {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |word: &str| {
            word.parse::<u64>()
                .with_context(|| format!("{word:?} is no number"))
        };
        match words[..] {
            ["block", case, bytes, a, b, c, d] => {
                let block = Block {
                    floor: [number(a)?, number(d)?],
                    subject: [number(b)?, number(c)?],
                };
                self.cell(case, number(bytes)?).1.push(block);
            }
            ["flushes", case, bytes, count, average, longest] => {
                let flushes = Flushes {
                    count: number(count)?,
                    average_ns: number(average)?,
                    max_ns: number(longest)?,
                };
                self.cell(case, number(bytes)?).2 = Some(flushes);
            }
            ["access", what, p50, p99] => {
                let access = Access {
                    p50_ns: number(p50)?,
                    p99_ns: number(p99)?,
                };
                self.accesses.push((what.to_owned(), access));
            }
            ["statistic", "flush_tlb_gru_tgh" | "asid_next", count] => self.tgh_flushes += number(count)?,
            ["block" | "flushes" | "access", ..] => bail!("that has other words"),
            // Verdicts, and statistics of other things.
            _ => {}
        }
        Ok(())
    }

    fn cell(&mut self, case: &str, size_bytes: u64) -> &mut (Cell, Vec<Block>, Option<Flushes>) {
        let cell = Cell {
            case: case.to_owned(),
            size_bytes,
        };
        let index = self
            .cells
            .iter()
            .position(|(c, ..)| *c == cell)
            .unwrap_or_else(|| {
                self.cells.push((cell, Vec::new(), None));
                self.cells.len() - 1
            });
        &mut self.cells[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_transcript_when_read_has_blocks_flushes_and_accesses() {
        let text = "access trapped-read 40000 90000\nblock munmap-live 4096 10 30 50 20\nblock munmap-live 4096 1 2 3 4\n\
                    flushes munmap-live 4096 24 27000 90000\nverdict: invalidate PASS in 1.0 s: 1 cases\n\
                    statistic flush_tlb_gru_tgh 24\nstatistic asid_next 1\nstatistic tlb_dropin 5\n";
        let read = Transcript::read(text).unwrap();
        let (cell, blocks, flushes) = &read.cells[0];
        assert_eq!((cell.case.as_str(), cell.size_bytes), ("munmap-live", 4096));
        let first = Block {
            floor: [10, 20],
            subject: [30, 50],
        };
        assert_eq!((blocks.len(), blocks[0]), (2, first));
        assert_eq!(flushes.unwrap().average_ns, 27000);
        assert_eq!(read.accesses[0].1.p99_ns, 90000);
        assert_eq!(read.tgh_flushes, 25);
    }

    #[test]
    fn test_transcript_when_garbled_or_empty_is_refused() {
        for text in ["", "verdict: x", "block munmap 4096 1 2 3", "access x 1 y"] {
            assert!(Transcript::read(text).is_err(), "{text}");
        }
    }
}
