//! What the software of a GRU may do to its BAR, by `arbitrary`: mostly what a driver and its programs would,
//! in any order, and words where they do not belong.
#![allow(missing_docs)] // The fields are those of the handles, of the same name.

use arbitrary::{Arbitrary, Unstructured};

/// From the device's start (or the reset after the sequence before) to its reset.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub actions: Vec<Action>,
}

impl<'a> Arbitrary<'a> for Sequence {
    /// As many actions as there are bytes for (at most 64); mostly after two contexts have been started, as
    /// little happens without.
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let mut actions = Vec::new();
        if !u.ratio(1, 8)? {
            for number in 0..2 {
                actions.push(Action::Start {
                    context: ContextNumber(number),
                    cbrs: 0x0f << (4 * number),
                    segment: 0x0f << (4 * number),
                    space: u.arbitrary()?,
                    polling: u.arbitrary()?,
                });
            }
        }
        while !u.is_empty() && actions.len() < 64 {
            actions.push(u.arbitrary()?);
        }
        Ok(Self { actions })
    }
}

/// A context by number: 4 in each chiplet.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct ContextNumber(pub u8);

/// A page of the page table: address space and page.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct PageNumber {
    pub space: u8,
    pub page: u8,
}

/// One thing done.
#[derive(Debug, Clone, Arbitrary)]
pub enum Action {
    /// A context is configured, allocated and started, as a driver does.
    Start {
        context: ContextNumber,
        cbrs: u8,
        segment: u8,
        space: u8,
        polling: bool,
    },
    /// One CCH command.
    Configure {
        context: ContextNumber,
        opc: u8,
        flags: u16,
    },
    /// A program issues an instruction on pages of the table.
    Issue {
        context: ContextNumber,
        cb: u8,
        instruction: Instruction,
    },
    /// Any words in a control block, the command bit last.
    IssueWords {
        context: ContextNumber,
        cb: u8,
        words: [u64; 5],
        control: u64,
    },
    /// Data for the data segment, which indexes come from, too.
    Data {
        context: ContextNumber,
        at: u16,
        value: u64,
    },
    /// The driver answers a miss, if there is one.
    Serve { which: u8, answer: Answer },
    /// It prepares the right answer and does not give it yet.
    Prepare { which: u8 },
    /// It gives an answer that it prepared. What was purged in between must be refused.
    Give { which: u8, only_write: bool },
    /// Both at once, around a change of the missed page.
    Stale {
        which: u8,
        purge: PurgeKind,
        handle: u8,
        to: Change,
        only_write: bool,
    },
    /// A page moves to another frame, changes its rights, comes or goes, with an invalidation before.
    Change {
        page: PageNumber,
        purge: PurgeKind,
        handle: u8,
        to: Change,
    },
    /// An invalidation of something.
    Purge {
        page: PageNumber,
        purge: PurgeKind,
        handle: u8,
    },
    /// A word anywhere but in a place that enters translations.
    Word { place: Place, value: u64, bytes: u8 },
    /// Words are looked at.
    Look { place: Place, bytes: u8 },
    /// The client takes all memory away and gives it back.
    Remap,
    /// Bus mastering goes off and on.
    BusMaster,
    /// DEVICE_RESET.
    Reset,
    /// The device gets time.
    Settle,
}

/// An instruction on pages of the table.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Instruction {
    pub opc: u8,
    pub exopc: u8,
    pub xtype: u8,
    pub page: u8,
    pub other: u8,
    pub offset: u16,
    pub segment: u16,
    pub nelem: u16,
    pub stride: u8,
    pub interrupt: bool,
}

/// How a miss is answered.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Answer {
    /// As the page table says; EXCEPTION where it has no page.
    Right,
    /// As the page table says, but for loads only.
    ReadOnly,
    /// Entered, and the instruction goes on waiting.
    WriteOnly,
    /// Another page of the same space is entered.
    Neighbour(u8),
    /// A target that nothing is mapped at.
    BadTarget,
    /// A page size that does not exist, or that the target is not aligned to.
    BadSize(u8),
    /// Not RAM.
    BadClass,
    /// Another opcode: NOOP, RESTART, EXCEPTION, USER_POLLING_MODE, and what is not defined.
    Other(u8),
}

/// What an invalidation covers; always at least the page.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum PurgeKind {
    /// The page.
    Page,
    /// That many pages, the page among them.
    Range { before: u8, after: u8 },
    /// In pages of 2 MiB.
    Large,
    /// The space.
    Space,
    /// A vaddrmask that means the space.
    Mask,
    /// Everything.
    Global,
}

/// What becomes of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Change {
    Move,
    Protect,
    Drop,
}

/// Somewhere in the BAR.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Place {
    Cb(ContextNumber, u8, u8),
    Segment(ContextNumber, u16),
    Cbe(u8, u8),
    /// DW1 and on: not the command.
    TfhOperand(u8, u8),
    TghOperand(u8, u8),
    Tfm(u8, u8),
    Cch(ContextNumber, u8),
    /// Beyond what is decoded, and across edges.
    Hole(u32),
    /// The other BAR.
    Doorbell(u16),
}
