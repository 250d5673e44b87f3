//! What a purge covers, and what misses collect of it.

use super::slot::Entry;
use super::types::Purge;

/// Inclusive ends: the last byte of the address space has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Span {
    pub(super) const FULL: Self = Self {
        first: 0,
        last: u64::MAX,
    };

    /// From an exclusive end; `None` when empty. Wrapped around: everything.
    fn new(start: u64, end: u64) -> Option<Self> {
        match start.cmp(&end) {
            std::cmp::Ordering::Less => Some(Self {
                first: start,
                last: end - 1,
            }),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(Self::FULL),
        }
    }

    pub(super) fn meets(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Smallest span around both: a union may grow too large, never too small.
    pub(super) fn hull(self, other: Self) -> Self {
        Self {
            first: self.first.min(other.first),
            last: self.last.max(other.last),
        }
    }
}

/// A purge, normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Nothing,
    Space { space: u64, span: Span },
    Target(Span),
    All,
}

impl From<Purge> for Reach {
    fn from(what: Purge) -> Self {
        match what {
            Purge::Range { space, start, end } => {
                Span::new(start, end).map_or(Self::Nothing, |span| Self::Space { space: space.0, span })
            }
            Purge::Space(space) => Self::Space {
                space: space.0,
                span: Span::FULL,
            },
            Purge::All => Self::All,
            Purge::Target { start, end } => Span::new(start, end).map_or(Self::Nothing, Self::Target),
        }
    }
}

impl Reach {
    /// Whether memory is unmapped after it. Such a purge is always done completely: an injected fault may
    /// show an engine old contents, never memory that is not there.
    pub(super) fn frees_memory(self) -> bool {
        matches!(self, Self::Target(_))
    }

    /// Whether it meets an entry (or the part of one that `va` and `target` name).
    pub(super) fn meets(self, space: u64, va: Span, target: Span) -> bool {
        match self {
            Self::Nothing => false,
            Self::Space { space: other, span } => other == space && span.meets(va),
            Self::Target(span) => span.meets(target),
            Self::All => true,
        }
    }
}

impl Entry {
    pub(super) fn span(&self) -> Span {
        Span {
            first: self.va,
            last: self.last(),
        }
    }

    pub(super) fn target(&self) -> Span {
        Span {
            first: self.iova,
            last: self.target_last(),
        }
    }
}

/// An outstanding miss.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub(super) open: bool,
    pub(super) space: u64,
    pub(super) va: u64,
    /// Hull of what was purged of `space` since the miss was issued.
    pub(super) union: Option<Span>,
    /// Something of another space was purged: of no interest, unless software fills another space than
    /// the one that missed.
    pub(super) foreign: bool,
}

impl Ticket {
    pub(super) const CLOSED: Self = Self {
        open: false,
        space: 0,
        va: 0,
        union: None,
        foreign: false,
    };

    /// Collect a purge; whether it said something about the space that missed.
    pub(super) fn widen(&mut self, reach: Reach) -> bool {
        let span = match reach {
            // A fill finds its target when it is executed, so memory taken away before is never entered.
            Reach::Nothing | Reach::Target(_) => return false,
            Reach::Space { space, .. } if space != self.space => {
                self.foreign = true;
                return false;
            }
            Reach::Space { span, .. } => span,
            Reach::All => {
                self.foreign = true;
                Span::FULL
            }
        };
        self.union = Some(self.union.map_or(span, |union| union.hull(span)));
        true
    }

    /// Whether `va` of `space` was purged since the miss was issued.
    pub(super) fn met(&self, space: u64, va: Span) -> bool {
        if space == self.space {
            self.union.is_some_and(|union| union.meets(va))
        } else {
            self.foreign
        }
    }
}
