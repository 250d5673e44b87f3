//! An HCA under any commands, work requests, doorbells and bytes in the memory that it shares with its driver. Whatever
//! is done, no thread of it panics or hangs, it gives its memory back, and a driver that comes after a reset is served.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once, mpsc};
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use device::mlx5::{Mlx5, Mlx5Config};
use driver::backing::Backing;
use driver::mlx5::{
    CompletionQueue, Connection, Hca, IOVA_BASE, MemoryKey, Mlx5Error, QueuePair, SendRequest, Service,
};
use protos::mlx5::cmd::Opcode;
use protos::mlx5::commands::PAGES;
use protos::mlx5::cq::CqeOpcode;
use protos::mlx5::mkey::Mkc;
use protos::mlx5::{pci, uar};

use super::live::Violation;
use crate::in_process::InProcess;

/// (opcode, status, 0) of a command that ended, or (0, opcode, syndrome) of a completion.
type Seen = (u16, u32, u32);

const MEMORY: u64 = 8 << 20;
const VA: u64 = 0x7f00_0000_0000;
const REGION: u64 = 64 << 10;
/// Requests of a queue, and where its send blocks begin.
const LOG_ENTRIES: u32 = 5;
const SENDS: u64 = 16 << LOG_ENTRIES;
const BLOCKS: u64 = 2 << LOG_ENTRIES;
const PAGE: u64 = 4096;
/// Far longer than anything takes on a busy machine; only an HCA that hangs gets there.
const PATIENCE: Duration = Duration::from_secs(180);
/// What an HCA may have more than before its first sequence, in KiB.
const GROWTH: u64 = 512 << 10;

/// From bring-up to reset.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// What is done.
    pub actions: Vec<Action>,
}

impl<'a> Arbitrary<'a> for Sequence {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let mut actions = Vec::new();
        while !u.is_empty() && actions.len() < 48 {
            actions.push(u.arbitrary()?);
        }
        Ok(Self { actions })
    }
}

/// A word somewhere.
#[derive(Debug, Clone, Copy, Arbitrary)]
#[allow(missing_docs)]
pub struct Word {
    pub at: u8,
    pub value: Value,
}

/// What a word says: mostly what means something.
#[derive(Debug, Clone, Copy, Arbitrary)]
#[allow(missing_docs)]
pub enum Value {
    Any(u32),
    Bit(u8),
    Small(u8),
    /// Number of one of the sequence's objects.
    Object(u8),
    /// A memory key.
    Key(u8),
    /// Upper and lower half of an address in the regions.
    High,
    Low(u16),
    /// The same of an IOVA.
    IovaHigh,
    IovaLow(u16),
}

/// One thing done.
#[derive(Debug, Clone, Arbitrary)]
#[allow(missing_docs)]
pub enum Action {
    /// A command of words, and of pages behind them.
    Command {
        opcode: u8,
        op_mod: u8,
        number: Value,
        words: Vec<Word>,
        pages: u8,
    },
    /// Any opcode.
    Unknown { opcode: u16, bytes: Vec<u8> },
    /// A good request.
    Send {
        qp: bool,
        kind: u8,
        at: u16,
        len: u16,
        receive: bool,
    },
    /// A request of words.
    Post {
        qp: bool,
        opcode: u8,
        segments: u8,
        words: Vec<Word>,
    },
    /// A word in the memory of queues and records.
    Poke { page: u8, word: Word },
    /// A store to a doorbell page.
    Doorbell {
        page: u8,
        at: u16,
        first: Value,
        second: Value,
    },
}

/// Commands that are executed, by number; those that make something come more often.
const COMMANDS: [Opcode; 44] = [
    Opcode::CREATE_MKEY,
    Opcode::CREATE_MKEY,
    Opcode::CREATE_MKEY,
    Opcode::QUERY_MKEY,
    Opcode::DESTROY_MKEY,
    Opcode::CREATE_EQ,
    Opcode::CREATE_EQ,
    Opcode::QUERY_EQ,
    Opcode::DESTROY_EQ,
    Opcode::CREATE_CQ,
    Opcode::CREATE_CQ,
    Opcode::QUERY_CQ,
    Opcode::MODIFY_CQ,
    Opcode::MODIFY_CQ,
    Opcode::DESTROY_CQ,
    Opcode::CREATE_QP,
    Opcode::CREATE_QP,
    Opcode::DESTROY_QP,
    Opcode::RST2INIT_QP,
    Opcode::INIT2RTR_QP,
    Opcode::RTR2RTS_QP,
    Opcode::RTS2RTS_QP,
    Opcode::TO_ERR_QP,
    Opcode::TO_RST_QP,
    Opcode::QUERY_QP,
    Opcode::INIT2INIT_QP,
    Opcode::SQERR2RTS_QP,
    Opcode::MAD_IFC,
    Opcode::CREATE_XRC_SRQ,
    Opcode::DESTROY_XRC_SRQ,
    Opcode::QUERY_XRC_SRQ,
    Opcode::ARM_XRC_SRQ,
    Opcode::ALLOC_PD,
    Opcode::DEALLOC_PD,
    Opcode::ALLOC_UAR,
    Opcode::ALLOC_XRCD,
    Opcode::CREATE_RMP,
    Opcode::MODIFY_RMP,
    Opcode::QUERY_RMP,
    Opcode::DESTROY_RMP,
    Opcode::ATTACH_TO_MCG,
    Opcode::SET_HCA_CAP,
    Opcode::QUERY_HCA_CAP,
    Opcode::PAGE_FAULT_RESUME,
];

/// Panics of any thread since the first HCA was made.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
}

/// What this process has of memory, in KiB.
fn resident() -> Result<u64, Violation> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.unwrap_or(0) * 4)
}

/// An HCA that is being fuzzed.
#[derive(Debug)]
pub struct Mlx5UnderTest {
    backing: Arc<InProcess>,
    mapped: bool,
    resident: Option<u64>,
}

/// A driver's things: two connected queue pairs, a key each, and one that work requests change.
struct Rig {
    hca: Hca,
    cqs: [CompletionQueue; 2],
    qps: [QueuePair; 2],
    keys: [MemoryKey; 3],
    /// Memory of queues, records and data: first IOVA and pages.
    first: u64,
    pages: u64,
    queues: [u64; 2],
    records: [u64; 2],
    regions: [u64; 2],
    sent: [u16; 2],
    /// Numbers that commands gave.
    objects: Vec<u32>,
    seen: BTreeSet<Seen>,
}

fn told(error: Mlx5Error) -> Violation {
    Violation(error.to_string())
}

impl Rig {
    /// With queue pairs that wait so long for an answer (4.096 µs times 2 to the power of it), so often.
    fn new(backing: Arc<InProcess>, timeout: u8, retries: u8) -> Result<Self, Mlx5Error> {
        let hca = Hca::new(backing, MEMORY)?;
        let first = hca.memory().take(1)?.iova;
        let pd = hca.protection_domain()?;
        let eq = hca.event_queue(6, u64::MAX >> 1, 1)?;
        let cqs = [hca.completion_queue(6, &eq)?, hca.completion_queue(6, &eq)?];
        let (mut queues, mut records) = ([0; 2], [0; 2]);
        let mut make = |side: usize| {
            queues[side] = hca.memory().take(1)?.iova + PAGE;
            records[side] = queues[side] + (SENDS + BLOCKS * 64).next_multiple_of(PAGE);
            hca.queue_pair(Service::Rc, pd, LOG_ENTRIES, &cqs[side], &cqs[side])
        };
        let mut qps = [make(0)?, make(1)?];
        let numbers = [qps[1].number(), qps[0].number()];
        let lid = hca.lid()?;
        for (qp, qpn) in qps.iter_mut().zip(numbers) {
            let to = Connection {
                qpn,
                lid,
                retries,
                timeout,
            };
            hca.connect(qp, to)?;
        }
        let regions = [hca.memory().take(REGION)?, hca.memory().take(REGION)?];
        let rights = [
            Mkc::LOCAL_READ,
            Mkc::LOCAL_WRITE,
            Mkc::REMOTE_READ,
            Mkc::REMOTE_WRITE,
            Mkc::ATOMIC,
            Mkc::UMR_ENABLE,
            Mkc::REMOTE_INVALIDATE,
        ];
        let keys = [
            hca.memory_key(pd, regions[0], VA, &rights)?,
            hca.memory_key(pd, regions[1], VA, &rights)?,
            hca.free_key(pd, 16)?,
        ];
        let pages = (regions[1].iova + REGION - first) / PAGE;
        let objects = vec![
            pd,
            eq.number(),
            cqs[0].number(),
            cqs[1].number(),
            qps[0].number(),
            qps[1].number(),
        ];
        Ok(Self {
            hca,
            cqs,
            qps,
            keys,
            first,
            pages,
            queues,
            records,
            regions: regions.map(|region| region.iova),
            sent: [0; 2],
            objects,
            seen: BTreeSet::new(),
        })
    }

    fn word(&self, value: Value) -> u32 {
        let iova = self.first + self.pages * PAGE / 2;
        match value {
            Value::Any(word) => word,
            Value::Bit(bit) => 1 << (bit % 32),
            Value::Small(small) => u32::from(small),
            Value::Object(which) => self.objects[usize::from(which) % self.objects.len()],
            Value::Key(which) => self.keys[usize::from(which) % self.keys.len()].key,
            Value::High => (VA >> 32) as u32,
            Value::Low(low) => VA as u32 + u32::from(low),
            Value::IovaHigh => (iova >> 32) as u32,
            Value::IovaLow(low) => (iova as u32 & !0xfff) + u32::from(low),
        }
    }

    fn put(&self, bytes: &mut [u8], words: &[Word]) {
        for word in words {
            let at = usize::from(word.at) * 4;
            if let Some(place) = bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&self.word(word.value).to_be_bytes());
            }
        }
    }

    fn command(&mut self, opcode: Opcode, op_mod: u16, input: &[u8]) -> Result<(), Violation> {
        match self.hca.command(opcode, op_mod, input, 0x200) {
            Ok(output) => {
                let number = u32::from_be_bytes([output[8], output[9], output[10], output[11]]);
                if number != 0 && self.objects.len() < 64 {
                    self.objects.push(number & 0xff_ffff);
                }
                self.seen.insert((opcode.0, 0, 0));
            }
            Err(Mlx5Error::Refused { status, .. }) => {
                self.seen.insert((opcode.0, u32::from(status.0), 0));
            }
            // Only an HCA that does not answer is at fault.
            Err(error @ Mlx5Error::Timeout { .. }) => return Err(told(error)),
            Err(_) => {
                self.seen.insert((opcode.0, 0, 1));
            }
        }
        Ok(())
    }

    /// One thing.
    fn act(&mut self, action: &Action) -> Result<(), Violation> {
        match action {
            Action::Command {
                opcode,
                op_mod,
                number,
                words,
                pages,
            } => {
                let mut bytes = vec![0; PAGES];
                bytes[8..12].copy_from_slice(&self.word(*number).to_be_bytes());
                self.put(&mut bytes, words);
                for page in 0..u64::from(*pages) {
                    let iova = self.first + page % self.pages * PAGE;
                    bytes.extend_from_slice(&iova.to_be_bytes());
                }
                let opcode = COMMANDS[usize::from(*opcode) % COMMANDS.len()];
                self.command(opcode, u16::from(*op_mod % 8), &bytes[8..])
            }
            Action::Unknown { opcode, bytes } => {
                let mut input = bytes.clone();
                input.resize(bytes.len().next_multiple_of(4).max(8), 0);
                self.command(Opcode(*opcode), 0, &input)
            }
            Action::Send {
                qp,
                kind,
                at,
                len,
                receive,
            } => {
                let side = usize::from(*qp);
                let (va, key) = (VA + u64::from(*at), self.keys[1 - side].key);
                let request = match kind % 6 {
                    0 => SendRequest::Send(None),
                    1 => SendRequest::Send(Some(7)),
                    2 => SendRequest::Write(va, key),
                    3 => SendRequest::Read(va, key),
                    4 => SendRequest::FetchAdd(va & !7, key, 1),
                    _ => SendRequest::CompareSwap(va & !7, key, 0, 1),
                };
                let len = if kind % 6 > 3 { 8 } else { u32::from(*len) };
                if *receive {
                    let key = self.keys[1 - side];
                    self.hca.post_receive(&mut self.qps[1 - side], key, VA, 4096);
                }
                let key = self.keys[side];
                let index = self.hca.post_send(&mut self.qps[side], request, key, VA, len);
                self.sent[side] = index.map_err(told)?.wrapping_add(1);
                Ok(())
            }
            Action::Post {
                qp,
                opcode,
                segments,
                words,
            } => {
                let side = usize::from(*qp);
                let index = self.sent[side];
                let mut bytes = vec![0; 1024];
                self.put(&mut bytes[16..], words);
                let head = [
                    u32::from(index) << 8 | u32::from(*opcode),
                    self.qps[side].number() << 8 | u32::from(segments % 64),
                ];
                bytes[..4].copy_from_slice(&head[0].to_be_bytes());
                bytes[4..8].copy_from_slice(&head[1].to_be_bytes());
                // A completion is wanted.
                bytes[11] = 8;
                if let Some(word) = words.first() {
                    bytes[12..16].copy_from_slice(&self.word(word.value).to_be_bytes());
                }
                let blocks = usize::from(segments % 64).div_ceil(4).max(1);
                for (number, block) in bytes.chunks(64).take(blocks).enumerate() {
                    let place = (u64::from(index) + number as u64) % BLOCKS;
                    self.hca
                        .memory()
                        .write(self.queues[side] + SENDS + place * 64, block);
                }
                self.sent[side] = index.wrapping_add(blocks as u16);
                let posted = u32::from(self.sent[side]).to_be_bytes();
                self.hca
                    .memory()
                    .write(self.records[side] + uar::DBR_SEND, &posted);
                self.ring(pci::FIRST_UAR, uar::SQ, &bytes[..8])
            }
            Action::Poke { page, word } => {
                let iova = self.first + u64::from(*page) % self.pages * PAGE + u64::from(word.at) * 4;
                self.hca
                    .memory()
                    .write(iova, &self.word(word.value).to_be_bytes());
                Ok(())
            }
            Action::Doorbell {
                page,
                at,
                first,
                second,
            } => {
                let (first, second) = (self.word(*first).to_be_bytes(), self.word(*second).to_be_bytes());
                let page = pci::FIRST_UAR + u32::from(page % 4);
                self.ring(page, (u64::from(*at) % PAGE) & !7, &[first, second].concat())
            }
        }
    }

    fn ring(&self, page: u32, at: u64, bytes: &[u8]) -> Result<(), Violation> {
        let offset = u64::from(page) * pci::UAR_SIZE + at;
        Ok(self.hca.backing().write(pci::BAR, offset, bytes)?)
    }

    /// What the completion queues show.
    fn look(&mut self) {
        for cq in &mut self.cqs {
            for _ in 0..64 {
                let Some(cqe) = self.hca.poll_completion(cq) else {
                    break;
                };
                let syndrome = cqe.syndrome().map_or(0, |syndrome| u32::from(syndrome.0));
                self.seen.insert((0, u32::from(cqe.opcode().0), syndrome));
            }
        }
    }
}

impl Mlx5UnderTest {
    /// A new HCA.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn start() -> Result<Self, Violation> {
        count_panics();
        let (backing, _) = InProcess::build(|context| Mlx5::new(context, Mlx5Config::default()))
            .map_err(|error| Violation(error.to_string()))?;
        Ok(Self {
            backing: Arc::new(backing),
            mapped: false,
            resident: None,
        })
    }

    fn reset(&mut self) -> Result<(), Violation> {
        self.backing.reset()?;
        if std::mem::take(&mut self.mapped) {
            self.backing.dma_unmap(IOVA_BASE, MEMORY)?;
        }
        Ok(())
    }

    fn bring_up(&mut self, timeout: u8, retries: u8) -> Result<Rig, Violation> {
        self.mapped = true;
        Rig::new(Arc::clone(&self.backing), timeout, retries).map_err(told)
    }

    /// Does it, resets the HCA, and sees whether it is as good as new.
    ///
    /// # Errors
    /// What it did that it must not do.
    pub fn run(self, sequence: &Sequence) -> Result<(Self, BTreeSet<Seen>), Violation> {
        let (tell, told) = mpsc::channel();
        let sequence = sequence.clone();
        let thread = std::thread::spawn(move || {
            // (Nobody listens any more when this has taken too long.)
            let _ = tell.send(self.run_here(&sequence));
        });
        match told.recv_timeout(PATIENCE) {
            Ok(result) => {
                let ended = thread.join();
                ended.map_err(|_| Violation("the driver's thread panicked".to_owned()))?;
                result
            }
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Violation(format!("no end within {PATIENCE:?}"))),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Violation("a panic on the way".to_owned())),
        }
    }

    fn run_here(mut self, sequence: &Sequence) -> Result<(Self, BTreeSet<Seen>), Violation> {
        let panics = PANICS.load(Ordering::SeqCst);
        // What gets no answer is to end soon.
        let mut rig = self.bring_up(1, 1)?;
        for action in &sequence.actions {
            rig.act(action)?;
        }
        rig.look();
        let seen = std::mem::take(&mut rig.seen);
        drop(rig);
        self.reset()?;
        // Half a second: on a busy machine this takes as long as it takes.
        let mut rig = self.bring_up(14, 7)?;
        let bytes: Vec<u8> = (0..REGION).map(|at| (at * 7 % 251) as u8).collect();
        rig.hca.memory().write(rig.regions[0], &bytes);
        let (key, to) = (rig.keys[0], SendRequest::Write(VA, rig.keys[1].key));
        rig.hca
            .post_send(&mut rig.qps[0], to, key, VA, REGION as u32)
            .map_err(told)?;
        let cqe = rig.hca.wait_completion(&mut rig.cqs[0]).map_err(told)?;
        let mut copied = vec![0; bytes.len()];
        rig.hca.memory().read(rig.regions[1], &mut copied);
        if cqe.opcode() != CqeOpcode::REQUESTER || copied != bytes {
            return Err(Violation(format!(
                "a good write after the reset ends so: {cqe:?}"
            )));
        }
        drop(rig);
        self.reset()?;
        if PANICS.load(Ordering::SeqCst) != panics {
            return Err(Violation("a thread panicked".to_owned()));
        }
        let now = resident()?;
        let before = *self.resident.get_or_insert(now);
        if now > before + GROWTH {
            return Err(Violation(format!("{now} KiB of memory, {before} KiB at first")));
        }
        Ok((self, seen))
    }
}
