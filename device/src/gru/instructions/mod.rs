//! Instructions as resumable steps.
//!
//! An [`Operation`] is the content of a CBE: what was issued and how far it has come. A step moves at most
//! [`STEP_BYTES`] and stops at a miss with the progress of everything before it; running it again goes on
//! from there. A step holds one guard at a time: what has two operands in memory passes through the engine's
//! bounce buffer. What cannot be repeated (an atomic) is done in the step that ends the instruction.
//!
//! Unmapped mode (ima bit 1, in contexts with unmap_enable) takes addresses for IOVAs: no TLB, no misses; what is not
//! mapped for the device ends with ADDRESS_SPACE_DECODE_ERROR. Each access holds the IOVA map for one copy.
//!
//! Alignment: only atomics, message queues and GAMXR ask for it. An element that crosses a page is moved in two pieces, and repeated
//! when the second piece misses.

mod atomic;
mod block;
mod copy;
mod exchange;
mod message;
mod message_place;
mod place;
mod vector;

use std::cell::RefCell;
use std::sync::atomic::AtomicBool;

use protos::gru::cb::{self, Opc, SubStatus, XType};
use protos::gru::cbe::{self, ecause};
use protos::gru::{map, tfh};

use super::chiplet::Context;
use super::memory::BarMemory;
use super::tfh::Fault;
use super::{BstoreSource, IndexUnit, Regions};
use crate::atc::{self, Access, Miss, SpaceId, Translation};
use crate::dma::{self, DmaError, Resolved};
use crate::faults::Injector;
pub(super) use message_place::Waiting;

use message_place::Message;
use place::Place;

/// Most bytes that one step moves: what a TGH may have to wait for.
pub(super) const STEP_BYTES: u64 = atc::CHUNK;
/// Most elements that one step moves one by one.
const STEP_ELEMENTS: u64 = 1024;
/// Bits of an unmapped address below its class.
const PHYSICAL_BITS: u32 = 62;
/// Bytes that a mapping for the device always has in one piece.
const PAGE: u64 = 4096;
/// Largest idef2 and idef4 that a CBE can hold.
const FIELD_22: u64 = (1 << 22) - 1;

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// There is more to do.
    More,
    /// Memory has to change first.
    Wait,
    /// The instruction is complete, with the old value of an atomic.
    Done(Option<u64>),
}

/// Why a step stopped before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Fault(Fault),
    /// `ecause` bits.
    Exception(u32),
    /// The client has to be asked, which engines do not wait for: a courier goes on from here.
    ByMessage,
    /// What was waited for is not wanted any more: the last step is done again.
    Again,
    /// A message queue's answer; not an error of the instruction.
    Message {
        substatus: SubStatus,
        avalue: Option<u64>,
    },
}

impl Stop {
    const INVALID: Self = Self::Exception(ecause::INVALID_INSTRUCTION);
    /// No such memory for the device.
    const NOWHERE: Self = Self::Exception(ecause::ADDRESS_SPACE_DECODE_ERROR);
    const CLASS: Self = Self::Exception(ecause::IAA_GAA_MISMATCH);
    /// The client truncated the file of the memory that was accessed: what a machine check is to hardware.
    const LOST: Self = Self::Exception(ecause::PE_CHECK_DATA_ERROR);
    const SEGMENT: Self = Self::Exception(ecause::DATA_SEGMENT_LIMIT_EXCEEDED);
    /// An atomic on memory that can only be asked for: no message is atomic.
    const NOT_ATOMIC: Self = Self::Exception(ecause::HA_RESPONSE_FATAL);
}

/// An instruction and its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) issued: cbe::Copied,
    /// idef4: tri1, or BCOPY's buffer in lines.
    idef4: u32,
    /// Current offset in the index vector. MESQ: whether the lines are reserved.
    idef4_now: u32,
    /// Current baddr0.
    baddr0: u64,
    nelem: u64,
    /// Stride in elements, or operand 1. BCOPY: source lines that remain. MESQ: the head word that it found.
    idef6: u64,
    /// Current baddr1, value, or operand 2.
    idef3: u64,
    /// Elements that remain.
    left: u64,
    /// Current offset in the data segment.
    tri0: u32,
}

impl Operation {
    /// From the words of a control block.
    pub(super) fn issue(control: cb::Control, operand: impl Fn(u64) -> u64) -> Self {
        let issued = cbe::Copied::new()
            .with_ima(control.ima())
            .with_xtype(control.xtype())
            .with_iaa0(control.iaa0())
            .with_iaa1(control.iaa1())
            .with_opc(control.opc())
            .with_exopc(control.exopc())
            .with_tri0(control.tri0());
        // What does not fit into the CBE is outside of every data segment, and so is the largest value.
        let idef4 = operand(cb::IDEF4).min(FIELD_22) as u32;
        let nelem = operand(cb::NELEM);
        Self {
            issued,
            idef4,
            idef4_now: if control.opc() == Opc::MESQ { 0 } else { idef4 },
            baddr0: operand(cb::BADDR0),
            nelem,
            idef6: operand(cb::STRIDE_OP1),
            idef3: operand(cb::BADDR1_VALUE_OP2),
            left: nelem,
            tri0: control.tri0(),
        }
    }

    /// From a CBE: an instruction goes on.
    pub(super) fn load(word: impl Fn(u64) -> u64) -> Self {
        let idef4 = cbe::Idef4::from_bits(word(cbe::IDEF4));
        Self {
            issued: cbe::Copied::from_bits(word(cbe::COPY)),
            idef4: idef4.copied(),
            idef4_now: idef4.updated(),
            baddr0: word(cbe::IDEF1UPD),
            nelem: word(cbe::IDEF5CPY),
            idef6: word(cbe::IDEF6CPY),
            idef3: word(cbe::IDEF3UPD),
            left: word(cbe::IDEF5UPD),
            tri0: cbe::Status::from_bits(word(cbe::STATE)).idef2upd(),
        }
    }

    /// Into a CBE. DW7 also carries what has become of the instruction.
    pub(super) fn save(&self, status: cbe::Status, store: impl Fn(u64, u64)) {
        let idef4 = cbe::Idef4::new()
            .with_copied(self.idef4)
            .with_updated(self.idef4_now);
        store(cbe::COPY, self.issued.into_bits());
        store(cbe::IDEF4, idef4.into_bits());
        store(cbe::IDEF1UPD, self.baddr0);
        store(cbe::IDEF5CPY, self.nelem);
        store(cbe::IDEF6CPY, self.idef6);
        store(cbe::IDEF3UPD, self.idef3);
        store(cbe::IDEF5UPD, self.left);
        store(cbe::STATE, status.with_idef2upd(self.tri0).into_bits());
    }

    /// Moves on by at most one step.
    pub(super) fn step(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let opc = self.issued.opc();
        if opc == Opc::NOP {
            return Ok(Step::Done(None));
        }
        env.unmapped = self.issued.ima() & cb::ima::UNMAPPED != 0;
        if env.unmapped && !env.context.control().unmap_enable() {
            return Err(Stop::Exception(ecause::UNMAPPED_MODE_FORBIDDEN));
        }
        self.check_classes(env)?;
        match opc {
            Opc::BCOPY => self.bcopy(env),
            Opc::VLOAD | Opc::VSTORE | Opc::VSET => self.vector(env),
            Opc::IVLOAD | Opc::IVSTORE | Opc::IVSET => self.indexed(env),
            Opc::MESQ => self.message(env),
            Opc::GAMXR => self.exchange(env),
            Opc::GAMIR | Opc::GAMIRR => self.implicit_atomic(env),
            Opc::GAMER | Opc::GAMERR => self.explicit_atomic(env),
            Opc::BSTORE => self.bstore(env),
            Opc::VFLUSH => self.vflush(env),
            _ => Err(Stop::INVALID),
        }
    }

    /// Every TLB entry is of class RAM (a fill of another class is refused), so an operand of another class
    /// disagrees with it as soon as there is one. Unmapped addresses name their class themselves.
    fn check_classes(&self, env: &mut Env<'_>) -> Result<(), Stop> {
        let opc = self.issued.opc();
        let first = (opc != Opc::BSTORE || env.bstore_source == BstoreSource::Memory)
            .then_some((self.issued.iaa0(), self.baddr0));
        let second = matches!(opc, Opc::BCOPY | Opc::BSTORE).then_some((self.issued.iaa1(), self.idef3));
        for (class, va) in [first, second].into_iter().flatten() {
            if env.unmapped && u64::from(class) != va >> PHYSICAL_BITS {
                return Err(Stop::CLASS);
            }
            if class != tfh::GAA_RAM {
                env.covered(va, 1, Access::Read)?;
                return Err(Stop::CLASS);
            }
        }
        Ok(())
    }

    fn element_bytes(&self) -> Result<u64, Stop> {
        XType::bytes(self.issued.xtype()).ok_or(Stop::INVALID)
    }

    /// The rest of the instruction's data-segment operand lies in the segment.
    fn check_segment(&self, env: &Env<'_>, offset: u32, element: u64) -> Result<(), Stop> {
        let bytes = self.left.checked_mul(element).ok_or(Stop::SEGMENT)?;
        let end = bytes.checked_add(u64::from(offset)).ok_or(Stop::SEGMENT)?;
        if end > env.ds_bytes {
            Err(Stop::SEGMENT)
        } else {
            Ok(())
        }
    }
}

/// What a step may touch.
#[derive(Debug)]
pub(super) struct Env<'a> {
    pub(super) engine: &'a mut atc::Engine,
    pub(super) context: &'a Context,
    pub(super) memory: &'a BarMemory,
    /// BAR2 offset of the context's data segment.
    pub(super) ds: u64,
    pub(super) ds_bytes: u64,
    /// [`STEP_BYTES`] long.
    pub(super) bounce: &'a mut [u8],
    /// Smallest fill tag used.
    pub(super) tag: &'a mut u64,
    /// Cause of a store that finds no entry.
    pub(super) store_miss: tfh::Cause,
    pub(super) index_unit: IndexUnit,
    pub(super) bstore_source: BstoreSource,
    pub(super) regions: Regions,
    /// For unmapped mode.
    pub(super) dma: &'a dma::Space,
    /// The instruction is in unmapped mode. Set by [`Operation::step`].
    pub(super) unmapped: bool,
    /// One GAMXR at a time.
    pub(super) exchanging: &'a AtomicBool,
    pub(super) injector: &'a Injector,
    pub(super) waiting: Waiting<'a>,
    /// A courier has room for one request here; engines have none, as they do not wait.
    pub(super) room: &'a mut [u8],
    /// The client was asked.
    pub(super) asked: &'a mut u64,
}

/// What an access is for, which matters where the client has to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Bytes go one way.
    Copy,
    /// A read-modify-write, or a word that others look at meanwhile.
    Atomic,
}

impl Env<'_> {
    /// Translates for a copy; the guard covers `len` bytes or fewer.
    fn access(&mut self, va: u64, len: u64, access: Access) -> Result<Place<'_>, Stop> {
        self.place(va, len, access, Purpose::Copy)
    }

    /// Translates for an atomic.
    fn atomic(&mut self, va: u64, len: u64, access: Access) -> Result<Place<'_>, Stop> {
        self.place(va, len, access, Purpose::Atomic)
    }

    /// Translates, and touches nothing: how many of the bytes there is one translation for.
    fn covered(&mut self, va: u64, len: u64, access: Access) -> Result<u64, Stop> {
        if self.unmapped {
            return physical(self.dma, va, len, access).map(|(_, covered)| covered);
        }
        let space = self.space_of(va);
        let (covered, tag) = match self.engine.translate(space, va, len, access) {
            Ok(Translation::Guard(guard)) => (guard.len() as u64, guard.tag()),
            Ok(Translation::Asking(asking)) => (asking.len() as u64, asking.tag()),
            Err(miss) => return Err(fault(miss, va, access, self.store_miss)),
        };
        *self.tag = tag.min(*self.tag);
        Ok(covered)
    }

    fn space_of(&self, va: u64) -> SpaceId {
        SpaceId(u64::from(self.context.asid_of(va, self.regions)))
    }

    fn place(&mut self, va: u64, len: u64, access: Access, purpose: Purpose) -> Result<Place<'_>, Stop> {
        let (asking, iova, len) = if self.unmapped {
            match physical(self.dma, va, len, access)? {
                (Some(resolved), _) => return Ok(Place::Physical(resolved)),
                (None, covered) => (None, va, covered),
            }
        } else if purpose == Purpose::Atomic || self.room.is_empty() {
            // Whoever cannot ask is on no list of those who do.
            let space = self.space_of(va);
            return match self.engine.access(space, va, len, access) {
                Ok(guard) => {
                    *self.tag = guard.tag().min(*self.tag);
                    Ok(Place::Translated(guard))
                }
                Err(Miss::ByMessage) => Err(match purpose {
                    Purpose::Atomic => Stop::NOT_ATOMIC,
                    Purpose::Copy => Stop::ByMessage,
                }),
                Err(miss) => Err(fault(miss, va, access, self.store_miss)),
            };
        } else {
            let space = self.space_of(va);
            match self.engine.translate(space, va, len, access) {
                Ok(Translation::Guard(guard)) => {
                    *self.tag = guard.tag().min(*self.tag);
                    return Ok(Place::Translated(guard));
                }
                Ok(Translation::Asking(asking)) => {
                    *self.tag = asking.tag().min(*self.tag);
                    let (iova, len) = (asking.iova(), asking.len() as u64);
                    (Some(asking), iova, len)
                }
                Err(miss) => return Err(fault(miss, va, access, self.store_miss)),
            }
        };
        if purpose == Purpose::Atomic {
            return Err(Stop::NOT_ATOMIC);
        }
        if self.room.is_empty() {
            return Err(Stop::ByMessage);
        }
        *self.asked += 1;
        let len = self.room.len().min(len as usize);
        let message = Message {
            asking,
            dma: self.dma,
            waiting: self.waiting,
            iova,
            data: RefCell::new(&mut self.room[..len]),
        };
        let write = access == Access::Write;
        if !write {
            message.fetch()?;
        }
        Ok(Place::Message { message, write })
    }

    /// Moves bytes between `va` and the bounce buffer, where they stand at `at`: at most `len` bytes, whole
    /// elements, at least one. `copy` gets the guard, its piece of the buffer and how far that piece is from
    /// the beginning. Returns the bytes moved.
    fn pieces(
        &mut self,
        (va, at): (u64, usize),
        len: u64,
        element: u64,
        access: Access,
        mut copy: impl FnMut(&Place<'_>, &mut [u8], u64),
    ) -> Result<usize, Stop> {
        // Taken out for the time of the guards, which borrow the engine through `self`.
        let bounce = std::mem::take(&mut self.bounce);
        let mut done = 0usize;
        let result = loop {
            let want = if done == 0 { len } else { element - done as u64 };
            match self.access(va.wrapping_add(done as u64), want, access) {
                Ok(place) => {
                    let covered = place.len();
                    // Only whole elements, unless the very first one is cut by the guard's end.
                    let whole = covered - covered % element as usize;
                    let take = if done == 0 && whole > 0 { whole } else { covered };
                    let piece = at + done..at + done + take;
                    copy(&place, &mut bounce[piece], done as u64);
                    if let Err(lost) = place.check() {
                        break Err(lost);
                    }
                    done += take;
                }
                Err(stop) => break Err(stop),
            }
            if done as u64 >= element {
                break Ok(done);
            }
        };
        self.bounce = bounce;
        result
    }

    /// Memory to the bounce buffer's beginning.
    fn load(&mut self, va: u64, len: u64, element: u64) -> Result<usize, Stop> {
        self.pieces((va, 0), len, element, Access::Read, |place, piece, _| {
            place.read_into(piece)
        })
    }

    /// The bounce buffer from `at` to memory.
    fn store(&mut self, va: u64, at: usize, len: u64, element: u64) -> Result<usize, Stop> {
        self.pieces((va, at), len, element, Access::Write, |place, piece, _| {
            place.write_from(piece)
        })
    }

    /// Memory to the data segment at BAR2 offset `ds`.
    fn load_segment(&mut self, va: u64, ds: u64, len: u64, element: u64) -> Result<usize, Stop> {
        let memory = self.memory;
        self.pieces((va, 0), len, element, Access::Read, |place, piece, done| {
            place.read_into(piece);
            memory.store_bytes(ds + done, piece);
        })
    }

    /// The data segment at BAR2 offset `ds` to memory.
    fn store_segment(&mut self, va: u64, ds: u64, len: u64, element: u64) -> Result<usize, Stop> {
        let memory = self.memory;
        self.pieces((va, 0), len, element, Access::Write, |place, piece, done| {
            memory.load_bytes(ds + done, piece);
            place.write_from(piece);
        })
    }
}

fn fault(miss: Miss, va: u64, access: Access, store_miss: tfh::Cause) -> Stop {
    let cause = match (miss, access) {
        (Miss::NoEntry, Access::Read) => tfh::Cause::TLB_MISS,
        (Miss::NoEntry, Access::Write) => store_miss,
        (Miss::ReadOnly, _) => tfh::Cause::TLB_MOD,
        (Miss::ByMessage, _) => unreachable!("whoever can be told so has looked"),
    };
    Stop::Fault(Fault { va, cause })
}

/// Unmapped mode: memory at an IOVA, if there is a file, and how many of `len` bytes are in one piece.
fn physical(
    dma: &dma::Space,
    address: u64,
    len: u64,
    access: Access,
) -> Result<(Option<Resolved<'_>>, u64), Stop> {
    if address >> PHYSICAL_BITS != u64::from(tfh::GAA_RAM) {
        return Err(Stop::NOWHERE);
    }
    let need = dma::Prot {
        read: true,
        write: access == Access::Write,
    };
    let chunk = len.min(atc::CHUNK - address % atc::CHUNK);
    let page = len.min(PAGE - address % PAGE);
    // The next page may be in another mapping, or nowhere.
    for covered in [chunk, page] {
        match dma.resolve_for(address, covered, need) {
            Ok(resolved) => return Ok((Some(resolved), covered)),
            Err(DmaError::ByMessage { .. }) => return Ok((None, covered)),
            Err(_) => {}
        }
    }
    Err(Stop::NOWHERE)
}

/// Bytes of one context's largest data segment; a bounce buffer holds at least that.
const _: () = assert!(STEP_BYTES as usize >= map::DSR_BYTES);
