//! Faults that happen at once: every n-th occasion of a kind goes wrong.

use std::sync::atomic::{AtomicU64, Ordering};

use super::EveryNth;

/// What can go wrong. The words are those of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Injection {
    /// A TGH says idle before its drain.
    EarlyCompletion,
    /// A fault or done bit is set, and its vector is not raised.
    LostInterrupt,
    /// The fault bit of an answered miss is set and raised once more.
    DuplicateFault,
    /// An answered CBR runs on only after the plan's margin.
    DelayedRestart,
    /// A TGH or a TFH is executed, and its status says EXCEPTION all the same.
    WrongStatus,
    /// A START does not load the region registers: the context goes on with the ASIDs that it had.
    StaleAsid,
    /// A miss is reported with a hardware error's cause (each in turn).
    MissCause,
    /// An instruction ends with EXECUTION_HW_ERROR before it has done anything.
    ExecutionError,
    /// A message ends with LB_OVERFLOWED: nothing has happened.
    LbOverflow,
    /// A message ends with AMO_NACKED: nothing has happened.
    AmoNack,
    /// A message ends with PUT_NACKED: its slot is reserved, its data is not stored.
    PutNack,
}

impl Injection {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::EarlyCompletion,
        Self::LostInterrupt,
        Self::DuplicateFault,
        Self::DelayedRestart,
        Self::WrongStatus,
        Self::StaleAsid,
        Self::MissCause,
        Self::ExecutionError,
        Self::LbOverflow,
        Self::AmoNack,
        Self::PutNack,
    ];

    /// Its word in a plan.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::EarlyCompletion => "early-completion",
            Self::LostInterrupt => "lost-interrupt",
            Self::DuplicateFault => "duplicate-fault",
            Self::DelayedRestart => "delayed-restart",
            Self::WrongStatus => "wrong-status",
            Self::StaleAsid => "stale-asid",
            Self::MissCause => "miss-cause",
            Self::ExecutionError => "execution-error",
            Self::LbOverflow => "lb-overflow",
            Self::AmoNack => "amo-nack",
            Self::PutNack => "put-nack",
        }
    }

    /// The kind that a plan's word names.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }
}

/// Of each kind: every how many occasions. Default: never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Injections([Option<u32>; Injection::ALL.len()]);

impl Injections {
    /// Every how many occasions, unless the plan says otherwise.
    pub const EVERY: u32 = 16;

    /// Every `every`-th occasion (at least 1) goes wrong.
    #[must_use]
    pub fn with(mut self, kind: Injection, every: u32) -> Self {
        self.0[kind as usize] = Some(every.max(1));
        self
    }

    /// Every how many occasions.
    #[must_use]
    pub fn every(&self, kind: Injection) -> Option<u32> {
        self.0[kind as usize]
    }
}

/// Counts occasions, and injections.
#[derive(Debug)]
pub(crate) struct Injector {
    pick: [Option<EveryNth>; Injection::ALL.len()],
    injected: [AtomicU64; Injection::ALL.len()],
}

impl Injector {
    pub(crate) fn new(plan: Injections, seed: u64) -> Self {
        Self {
            pick: plan.0.map(|every| every.map(|every| EveryNth::new(every, seed))),
            injected: Default::default(),
        }
    }

    /// Whether this occasion goes wrong; the count of those before it if so.
    #[inline]
    pub(crate) fn strikes(&self, kind: Injection) -> Option<u64> {
        let pick = self.pick[kind as usize].as_ref()?;
        pick.picks().then(|| {
            let before = self.injected[kind as usize].fetch_add(1, Ordering::Relaxed);
            tracing::debug!(fault = kind.word(), number = before + 1, "injected");
            before
        })
    }

    /// All of them together.
    pub(crate) fn count(&self) -> u64 {
        self.injected
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_words_when_read_back_name_their_kind() {
        for (index, kind) in Injection::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
            assert_eq!(Injection::of_word(kind.word()), Some(kind));
        }
        assert_eq!(Injection::of_word("nack"), None);
    }

    #[test]
    fn test_strikes_when_planned_every_third_counts_those_only() {
        let injector = Injector::new(Injections::default().with(Injection::PutNack, 3), 0);
        let struck: Vec<_> = (0..9)
            .filter_map(|_| injector.strikes(Injection::PutNack))
            .collect();
        assert_eq!(struck, [0, 1, 2]);
        assert_eq!(injector.strikes(Injection::AmoNack), None);
        assert_eq!(injector.count(), 3);
    }
}
