//! Time as an argument.

use std::time::Duration;

/// Nanoseconds since any moment that the owner keeps to. Nothing here reads a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize)]
pub struct Time(pub u64);

impl Time {
    /// The moment itself.
    pub const ZERO: Self = Self(0);

    /// What a clock of the process says: `start` is when it was made.
    #[must_use]
    pub fn since(start: std::time::Instant) -> Self {
        Self(start.elapsed().as_nanos() as u64)
    }
    /// Until `later`; zero when that has passed.
    #[must_use]
    pub const fn until(self, later: Self) -> Duration {
        Duration::from_nanos(later.0.saturating_sub(self.0))
    }
}

impl std::ops::Add<Duration> for Time {
    type Output = Self;

    fn add(self, more: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(more.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}
