//! Memory through keys: what segments of WQEs and remote addresses name.

use std::sync::Arc;

use protos::mlx5::Layout;
use protos::mlx5::mkey::{AccessMode, Mkc};

use super::faults::Missing;
use super::memory::Port;
use super::mkey::{Mkey, Mkeys, Place};
use crate::atc::{Access, Fill, FillRefused, Guard, PageSize};
use crate::dma::DmaError;

/// Keys in keys are followed so far.
const MAX_DEPTH: u32 = 4;

/// Bytes of ours.
#[derive(Debug)]
pub(super) enum Bytes<'a> {
    /// Memory is copied here.
    Into(&'a mut [u8]),
    /// This is copied to memory.
    From(&'a [u8]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Into(to) => to.len(),
            Self::From(from) => from.len(),
        }
    }

    fn access(&self) -> Access {
        match self {
            Self::Into(_) => Access::Read,
            Self::From(_) => Access::Write,
        }
    }

    fn copy(&mut self, done: usize, guard: &Guard<'_>) {
        let end = done + guard.len();
        match self {
            Self::Into(to) => guard.read_into(&mut to[done..end]),
            Self::From(from) => guard.write_from(&from[done..end]),
        }
    }

    /// `[done, done + len)` of it.
    fn part(&mut self, done: usize, len: usize) -> Bytes<'_> {
        match self {
            Self::Into(to) => Bytes::Into(&mut to[done..done + len]),
            Self::From(from) => Bytes::From(&from[done..done + len]),
        }
    }
}

/// Why memory cannot be had through a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// A page is absent; `done` bytes before it are copied.
    Absent {
        /// Bytes.
        done: usize,
        /// What is absent.
        missing: Missing,
    },
    /// It is not there and will not come.
    Violation,
}

/// What a look at the table led to.
enum Found {
    /// The ATC has an entry now, or the look-up has to be made again.
    Again,
    /// Memory that is reached by message: so many bytes at this IOVA.
    ByMessage { iova: u64, len: usize },
    /// In another key.
    Key { key: u32, va: u64, len: usize },
}

/// Copies between memory and `bytes`, which the key has been found to cover.
pub(super) fn copy(
    port: &mut Port,
    mkeys: &Mkeys,
    mkey: &Arc<Mkey>,
    va: u64,
    bytes: &mut Bytes<'_>,
) -> Result<(), Trouble> {
    copy_through(port, mkeys, mkey, va, bytes, 0)
}

fn copy_through(
    port: &mut Port,
    mkeys: &Mkeys,
    mkey: &Arc<Mkey>,
    va: u64,
    bytes: &mut Bytes<'_>,
    depth: u32,
) -> Result<(), Trouble> {
    if depth > MAX_DEPTH {
        return Err(Trouble::Violation);
    }
    let (len, access) = (bytes.len(), bytes.access());
    let mut done = 0;
    while done < len {
        let at = va.checked_add(done as u64).ok_or(Trouble::Violation)?;
        let rest = len - done;
        if !is_indirect(mkey)
            && let Ok(guard) = port.engine.access(mkey.space, at, rest as u64, access)
        {
            bytes.copy(done, &guard);
            let step = guard.len();
            guard.check().map_err(|_| Trouble::Violation)?;
            done += step;
            continue;
        }
        match find(port, mkeys, mkey, at, rest, access).map_err(|trouble| trouble.after(done))? {
            Found::Again => {}
            Found::ByMessage { iova, len } => {
                match bytes.part(done, len) {
                    Bytes::Into(to) => port.dma.read_by_message(iova, to),
                    Bytes::From(from) => port.dma.write_by_message(iova, from),
                }
                .map_err(|_| Trouble::Violation)?;
                done += len;
            }
            Found::Key { key, va, len } => {
                let child = inner(mkeys, mkey, key, va, len as u64)?;
                copy_through(port, mkeys, &child, va, &mut bytes.part(done, len), depth + 1)
                    .map_err(|trouble| trouble.below(mkey, at).after(done))?;
                done += len;
            }
        }
    }
    Ok(())
}

/// Does something to the 8 bytes at `va`, which is a multiple of 8, as one.
pub(super) fn atomic(
    port: &mut Port,
    mkeys: &Mkeys,
    mkey: &Arc<Mkey>,
    va: u64,
    operate: impl Fn(&std::sync::atomic::AtomicU64) -> u64,
) -> Result<u64, Trouble> {
    let (mut mkey, mut va) = (Arc::clone(mkey), va);
    let mut outer: Option<(Arc<Mkey>, u64)> = None;
    for _ in 0..=MAX_DEPTH {
        loop {
            if !is_indirect(&mkey)
                && let Ok(guard) = port.engine.access(mkey.space, va, 8, Access::Write)
            {
                // Translated pages are whole, so the word is aligned where it really is, too.
                let word = guard.atomic64().ok_or(Trouble::Violation)?;
                let before = operate(word);
                guard.check().map_err(|_| Trouble::Violation)?;
                return Ok(before);
            }
            let found = find(port, mkeys, &mkey, va, 8, Access::Write);
            match found.map_err(|trouble| match &outer {
                Some((key, at)) => trouble.below(key, *at),
                None => trouble,
            })? {
                Found::Again => {}
                // There is no atomic message.
                Found::ByMessage { .. } => return Err(Trouble::Violation),
                Found::Key { key, va: there, len } => {
                    if len < 8 {
                        return Err(Trouble::Violation);
                    }
                    let child = inner(mkeys, &mkey, key, there, 8)?;
                    outer = Some((mkey, va));
                    (mkey, va) = (child, there);
                    break;
                }
            }
        }
    }
    Err(Trouble::Violation)
}

/// The key that a piece of another key names: of the same protection domain, or anybody could name anybody's.
fn inner(mkeys: &Mkeys, outer: &Mkey, key: u32, va: u64, len: u64) -> Result<Arc<Mkey>, Trouble> {
    let domain = outer.context.get(Mkc::PD);
    mkeys
        .find(key)
        .filter(|inner| inner.context.get(Mkc::PD) == domain && inner.covers(va, len))
        .ok_or(Trouble::Violation)
}

impl Trouble {
    /// The same, met through a piece of `outer` at its address `at`.
    fn below(self, outer: &Mkey, at: u64) -> Self {
        match self {
            Self::Absent { done, mut missing } => {
                missing
                    .outer
                    .get_or_insert((outer.key(), at.wrapping_add(done as u64)));
                Self::Absent { done, missing }
            }
            Self::Violation => Self::Violation,
        }
    }

    /// The same with bytes before it.
    pub(super) fn after(self, before: usize) -> Self {
        match self {
            Self::Absent { done, missing } => Self::Absent {
                done: done + before,
                missing,
            },
            Self::Violation => Self::Violation,
        }
    }
}

fn is_indirect(mkey: &Mkey) -> bool {
    matches!(mkey.context.mode(), AccessMode::KLM | AccessMode::KSM)
}

/// Looks `va` up in the key's table, and enters what is there into the ATC.
fn find(
    port: &mut Port,
    mkeys: &Mkeys,
    mkey: &Arc<Mkey>,
    va: u64,
    len: usize,
    access: Access,
) -> Result<Found, Trouble> {
    // From here on a change of the key or its table refuses the fill.
    let atc = Arc::clone(port.engine.atc());
    atc.open_miss(port.ticket, mkey.space, va);
    let found = look(port, mkeys, mkey, va, len, access);
    atc.close_miss(port.ticket);
    found
}

fn look(
    port: &Port,
    mkeys: &Mkeys,
    mkey: &Arc<Mkey>,
    va: u64,
    len: usize,
    access: Access,
) -> Result<Found, Trouble> {
    if !mkeys.is_current(mkey) {
        return Err(Trouble::Violation);
    }
    let absent = || Trouble::Absent {
        done: 0,
        missing: Missing {
            key: mkey.key(),
            va,
            len: len as u64,
            outer: None,
        },
    };
    let within = |left: u64| len.min(usize::try_from(left).unwrap_or(usize::MAX));
    match mkey.place(va) {
        Place::Key { key, va, left } => Ok(Found::Key {
            key,
            va,
            len: within(left),
        }),
        Place::Absent => Err(absent()),
        Place::Outside => Err(Trouble::Violation),
        Place::Memory { writable: false, .. } if access == Access::Write => Err(absent()),
        Place::Memory { iova, left, writable } => {
            for shift in [mkey.page.min(LARGEST), SMALLEST] {
                let size = PageSize::new(shift as u8).expect("between 4 KiB and 2 MiB");
                // An entry has to be congruent with its target.
                if (iova ^ va) & (size.bytes() - 1) != 0 {
                    continue;
                }
                let fill = |writable| Fill {
                    space: mkey.space,
                    va,
                    size,
                    iova: size.base(iova),
                    writable,
                    tag: 0,
                };
                let mut result = port.engine.atc().fill(port.ticket, fill(writable));
                if let Err(FillRefused::Target(DmaError::Protection { .. })) = result
                    && access == Access::Read
                {
                    result = port.engine.atc().fill(port.ticket, fill(false));
                }
                match result {
                    Ok(()) => return Ok(Found::Again),
                    Err(FillRefused::Killed | FillRefused::Purging | FillRefused::NoTicket) => {
                        std::thread::yield_now();
                        return Ok(Found::Again);
                    }
                    Err(FillRefused::Target(DmaError::ByMessage { .. })) => {
                        return Ok(Found::ByMessage {
                            iova,
                            len: within(left),
                        });
                    }
                    // A large page may reach beyond the mapping.
                    Err(FillRefused::Target(_)) => {}
                }
            }
            Err(Trouble::Violation)
        }
    }
}

/// Logarithms of the spans that are entered.
const SMALLEST: u32 = 12;
const LARGEST: u32 = 21;
