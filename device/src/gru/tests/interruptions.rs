//! Instructions that are stopped in the middle, saved, and go on elsewhere: no byte is lost, and what must not
//! happen twice does not.
//!
//! Software's part is what the kernel driver does (section 5.1): CB and CBE of each control block in logical
//! order, then the data segment.

use super::*;
use protos::gru::cb::{ImplicitOp, XType};
use protos::gru::cbe::State;
use protos::gru::cch::Opc;
use protos::gru::message_queue::{FIRST_LINE, Head};

const VA: u64 = 0x7000_0000;
const WORDS: u64 = map::HANDLE_BYTES as u64 / 8;

/// xorshift: the same points of interruption for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Where a context is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct At {
    chiplet: usize,
    context: usize,
    cbr_map: u64,
    dsr_map: u32,
}

/// Four control blocks and 8 KiB each: other numbers, other physical resources, another chiplet.
const PLACES: [At; 4] = [
    At {
        chiplet: 0,
        context: 0,
        cbr_map: 0b1010,
        dsr_map: 0xff,
    },
    At {
        chiplet: 0,
        context: 7,
        cbr_map: 1 << 63 | 1 << 31,
        dsr_map: 0xf00f_0000,
    },
    At {
        chiplet: 1,
        context: 3,
        cbr_map: 0b11 << 20,
        dsr_map: 0x0ff0_0000,
    },
    At {
        chiplet: 1,
        context: 15,
        cbr_map: 1 << 5 | 1 << 40,
        dsr_map: 0x00ff_0000,
    },
];
const CBS: usize = 4;
const DS_BYTES: u64 = 8192;

impl At {
    fn base(self) -> u64 {
        self.chiplet as u64 * map::CHIPLET_SIZE
    }
    fn cch(self) -> u64 {
        self.base() + Rig::cch_at(self.context)
    }
    fn cb(self, cb: usize) -> u64 {
        self.base() + self.context as u64 * map::GSEG_STRIDE + Rig::cb_at(cb)
    }
    fn ds(self) -> u64 {
        self.base() + self.context as u64 * map::GSEG_STRIDE + map::GSEG_DS
    }
    fn cbr(self, cb: usize) -> u64 {
        Rig::cbr(self.cbr_map, cb) as u64
    }
    fn cbe(self, cb: usize) -> u64 {
        self.base() + map::CBE + self.cbr(cb) * map::HANDLE_STRIDE
    }
    fn tfh(self, cb: usize) -> u64 {
        self.base() + map::TFH + self.cbr(cb) * map::HANDLE_STRIDE
    }
}

/// A context that moves.
struct Nomad {
    rig: Arc<Rig>,
    at: At,
    mode: Mode,
    /// cbrstates that were seen while stopped.
    seen: Vec<State>,
}

impl Nomad {
    fn new(doorbell: Doorbell, mode: Mode) -> Self {
        let nomad = Self {
            rig: Rig::new(config(doorbell)),
            at: PLACES[0],
            mode,
            seen: Vec::new(),
        };
        nomad.allocate();
        nomad.command(Opc::START);
        nomad
    }

    /// CCHs and CBEs are trapped in every mode.
    fn trapped(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.rig
            .gru
            .bar_read(pci::BAR_CHIPLETS, offset, &mut bytes)
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    fn cch(&self) -> cch::Control {
        cch::Control::from_bits(self.trapped(self.at.cch()))
    }

    /// Waits for the answer, serving misses meanwhile: an INTERRUPT waits for them.
    fn command(&self, opc: Opc) {
        self.command_while(opc, || {
            self.serve();
        });
    }

    fn command_while(&self, opc: Opc, wait: impl Fn()) {
        let control = self.cch().with_opc(opc).with_cmd(true);
        let control = control.with_status(HandleStatus::ACTIVE);
        self.rig.trap_store(self.at.cch(), control.into_bits());
        let control = self.rig.until("a CCH answer", || {
            let control = self.cch();
            if control.status() == HandleStatus::ACTIVE {
                wait();
                return None;
            }
            Some(control)
        });
        assert_eq!(
            control.status(),
            HandleStatus::IDLE,
            "{opc:?}: {:?}",
            control.cause()
        );
    }

    fn allocate(&self) {
        let (rig, at) = (&self.rig, self.at.cch());
        rig.trap_store(at + cch::CBR_MAP, self.at.cbr_map);
        for pair in 0..4 {
            let asid = u64::from(ASID) + 2 * pair;
            rig.trap_store(at + cch::ASID + 8 * pair, asid | (asid + 1) << 32);
        }
        for four in 0..2 {
            rig.trap_store(at + cch::SIZEAVAIL + 8 * four, u64::MAX);
        }
        let control = cch::Control::new()
            .with_dsr_allocation_map(self.at.dsr_map)
            .with_tfm_fault_bit_enable(self.mode == Mode::FaultMap)
            .with_tlb_int_enable(self.mode == Mode::FaultMap);
        rig.trap_store(at, control.into_bits());
        self.command(Opc::ALLOCATE);
    }

    fn cbrstate(&self, cb: usize) -> State {
        cbe::Status::from_bits(self.trapped(self.at.cbe(cb) + cbe::STATE)).cbrstate()
    }

    /// INTERRUPT_SYNC, save, DEALLOCATE; then load at `to` and START.
    fn move_to(&mut self, to: At) {
        self.command(Opc::INTERRUPT_SYNC);
        let image = |load: &dyn Fn(u64) -> u64, at: u64, count: u64| -> Vec<u64> {
            (0..count).map(|word| load(at + 8 * word)).collect()
        };
        let mut saved = Vec::new();
        for cb in 0..CBS {
            let state = self.cbrstate(cb);
            assert!(
                matches!(
                    state,
                    State::INACTIVE | State::IDLE | State::INTERRUPTED | State::INTERRUPTED_MISS_UPM
                ),
                "a stopped CBR is {state:?}"
            );
            self.seen.push(state);
            let cb_words = image(&|at| self.rig.load(at), self.at.cb(cb), WORDS);
            let cbe_words = image(&|at| self.trapped(at), self.at.cbe(cb), WORDS);
            saved.push((cb_words, cbe_words));
        }
        let segment = image(&|at| self.rig.load(at), self.at.ds(), DS_BYTES / 8);
        self.command(Opc::DEALLOCATE);
        self.at = to;
        self.allocate();
        for (cb, (cb_words, cbe_words)) in saved.into_iter().enumerate() {
            for (word, (cb_word, cbe_word)) in cb_words.into_iter().zip(cbe_words).enumerate() {
                self.rig.store(to.cb(cb) + 8 * word as u64, cb_word);
                self.rig.trap_store(to.cbe(cb) + 8 * word as u64, cbe_word);
            }
        }
        for (word, value) in segment.into_iter().enumerate() {
            self.rig.store(to.ds() + 8 * word as u64, value);
        }
        self.command(Opc::START);
    }

    /// What the kernel driver does to change ASIDs.
    fn update(&self) {
        self.command(Opc::INTERRUPT);
        self.command(Opc::START);
    }

    fn issue(&self, cb: usize, instruction: Instruction) {
        let at = self.at.cb(cb);
        self.rig.store(at + cb::IDEF4, instruction.idef4);
        self.rig.store(at + cb::BADDR0, instruction.baddr0);
        self.rig.store(at + cb::NELEM, instruction.nelem);
        self.rig.store(at + cb::STRIDE_OP1, instruction.stride_op1);
        self.rig
            .store(at + cb::BADDR1_VALUE_OP2, instruction.baddr1_value_op2);
        self.rig.store(at, instruction.control.into_bits());
        self.rig.ring_if_asleep();
    }

    fn ended(&self, cb: usize) -> Option<Status> {
        let status = cb::Control::from_bits(self.rig.load(self.at.cb(cb))).istatus();
        matches!(status, Status::IDLE | Status::EXCEPTION).then_some(status)
    }

    /// Answers each control block's miss that is there now. Returns how many.
    fn serve(&self) -> usize {
        let mut served = 0;
        for cb in 0..CBS {
            let at = self.at.tfh(cb);
            let control = tfh::Control::from_bits(self.rig.load(at));
            if control.status() != HandleStatus::EXCEPTION
                || !matches!(control.state(), tfh::State::MISS_FMM | tfh::State::MISS_UPM)
            {
                continue;
            }
            let va = self.rig.load(at + tfh::MISSVADDR);
            let pte = self.rig.pages.lock().unwrap()[&(ASID, va / PAGE)];
            let asids = tfh::Asids::new()
                .with_fillasid(ASID)
                .with_dirty(true)
                .with_gaa(tfh::GAA_RAM);
            self.rig.store(at + tfh::ASIDS, asids.into_bits());
            let target = tfh::Target::new().with_pfn((IOVA + pte.offset) >> 12);
            self.rig.store(at + tfh::TARGET, target.into_bits());
            self.rig.store(at + tfh::FILLVADDR, va);
            let control = control.with_opc(tfh::Opc::WRITE_RESTART).with_cmd(true);
            self.rig
                .store(at, control.with_status(HandleStatus::ACTIVE).into_bits());
            self.rig.ring_if_asleep();
            served += 1;
        }
        served
    }

    fn purge(&self, va: u64) {
        let at = self.at.base() + map::TGH;
        self.rig.store(at + tgh::VADDR, va);
        self.rig
            .store(at + tgh::SCOPE, tgh::Scope::new().with_asid(ASID).into_bits());
        let count = tgh::Count::new().with_vaddrmask(tgh::VADDRMASK_ALL);
        self.rig.store(at + tgh::COUNT, count.into_bits());
        let go = tgh::Control::new().with_cmd(true).with_opc(tgh::Opc::TLBINV);
        self.rig
            .store(at, go.with_status(HandleStatus::ACTIVE).into_bits());
        self.rig.ring_if_asleep();
        self.rig.until("a TLBINV", || {
            let control = tgh::Control::from_bits(self.rig.load(at));
            (control.status() == HandleStatus::IDLE).then_some(())
        });
    }
}

/// The client's memory: what a round uses of it.
const COPY_FROM: u64 = 0;
const COPY_TO: u64 = 1 << 20;
const COPY_BYTES: u64 = 200_003;
const COUNTERS: u64 = 3 << 20;
const QUEUE: u64 = (3 << 20) + 0x10000;
const SCATTERED: u64 = 4 << 20;
const SCATTER_PAGES: u64 = 40;

fn va(offset: u64) -> u64 {
    VA + offset
}

/// Instructions on all control blocks, stopped at points that the dice choose, moved, and checked.
fn journey(doorbell: Doorbell, mode: Mode, seed: u64) -> Vec<State> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut nomad = Nomad::new(doorbell, mode);
    let rig = Arc::clone(&nomad.rig);
    rig.map_range(ASID, VA, 0, MEMORY);
    let source = rig.fill_memory(COPY_FROM, COPY_BYTES as usize, seed);
    let queue_lines = 400;
    let head = Head::new().with_head(FIRST_LINE).with_limit(queue_lines);
    rig.set_word(QUEUE, head.into_bits());
    // Scatter: element i of the data segment's first KiB to a place of its own; the indexes follow.
    let indexes: Vec<u64> = (0..128)
        .map(|i| (i * 5) % SCATTER_PAGES * PAGE + i * 24)
        .collect();
    let values: Vec<u64> = (0..128).map(|i| seed << 32 | i).collect();
    for i in 0..128u64 {
        rig.store(nomad.at.ds() + 8 * i, values[i as usize]);
        rig.store(nomad.at.ds() + 1024 + 8 * i, indexes[i as usize]);
    }
    let (mut counted, mut sent) = (0u64, 0u64);
    nomad.issue(
        0,
        Instruction::bcopy(va(COPY_FROM), va(COPY_TO) + 7, 4096, 8, XType::BYTE, COPY_BYTES),
    );
    nomad.issue(2, Instruction::ivstore(va(SCATTERED), 0, 1024, XType::DWORD, 128));
    let begun = Instant::now();
    let mut done = |nomad: &Nomad, more: bool| {
        if nomad.ended(1).is_some() && more {
            assert_eq!(nomad.ended(1), Some(Status::IDLE));
            // Each counter is in a page of its own.
            let counter = va(COUNTERS) + counted % 8 * PAGE;
            nomad.issue(1, Instruction::gamir(counter, ImplicitOp::INC, XType::DWORD));
            counted += 1;
        }
        if nomad.ended(3).is_some() && more && sent < u64::from(queue_lines) / 2 - 2 {
            assert_eq!(nomad.ended(3), Some(Status::IDLE));
            for word in 0..16 {
                rig.store(nomad.at.ds() + 2048 + 8 * word, sent + 1);
            }
            nomad.issue(3, Instruction::mesq(va(QUEUE), 2048, 2));
            sent += 1;
        }
        (counted, sent)
    };
    let mut moves = 0;
    while moves < 25 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:#}", rig.gru.dump());
        match dice.roll(10) {
            0 | 1 => {
                let here = PLACES.iter().position(|place| *place == nomad.at).unwrap();
                let there = PLACES[(here + 1 + dice.roll(3) as usize) % PLACES.len()];
                nomad.move_to(there);
                moves += 1;
            }
            2 => nomad.update(),
            3 => nomad.purge(va(dice.roll(MEMORY / PAGE) * PAGE)),
            4 => nomad.purge(va(QUEUE)),
            5..8 => {
                nomad.serve();
            }
            _ => {
                done(&nomad, true);
            }
        }
    }
    rig.until("everything", || {
        nomad.serve();
        (0..CBS).all(|cb| nomad.ended(cb).is_some()).then_some(())
    });
    assert!((0..CBS).all(|cb| nomad.ended(cb) == Some(Status::IDLE)));
    let (counted, sent) = done(&nomad, false);
    assert!(rig.bytes(COPY_TO + 7, COPY_BYTES as usize) == source, "the copy");
    assert_eq!(
        (rig.bytes(COPY_TO, 7), rig.bytes(COPY_TO + 7 + COPY_BYTES, 64)),
        (vec![0; 7], vec![0; 64])
    );
    let total: u64 = (0..8).map(|page| rig.word(COUNTERS + page * PAGE)).sum();
    assert_eq!(total, counted, "every increment once");
    for (index, value) in indexes.iter().zip(&values) {
        assert_eq!(rig.word(SCATTERED + index), *value);
    }
    let now = Head::from_bits(rig.word(QUEUE));
    assert_eq!(u64::from(now.head() - FIRST_LINE), 2 * sent, "every slot once");
    for number in 0..sent {
        let words = rig.bytes(QUEUE + 128 + 128 * number, 128);
        assert!(
            words.chunks(8).all(|word| word == (number + 1).to_le_bytes()),
            "message {number}"
        );
    }
    nomad.seen
}

#[test]
fn test_context_when_moved_in_the_middle_of_everything_loses_and_repeats_nothing() {
    in_all_modes(|doorbell| {
        for mode in [Mode::UserPolling, Mode::FaultMap] {
            // The points of interruption are to be in the middle of something: which ones a journey meets is for the
            // scheduler to say, so there are more of them where four do not meet it.
            let middle = match mode {
                Mode::FaultMap => State::INTERRUPTED,
                _ => State::INTERRUPTED_MISS_UPM,
            };
            let mut met = false;
            for seed in 1..=40 {
                met |= journey(doorbell, mode, seed).contains(&middle);
                if met && seed >= 4 {
                    break;
                }
            }
            assert!(met, "no context was moved in {middle:?}");
        }
    });
}

/// The second part of a message misses, and the context is moved between its two parts.
#[test]
fn test_mesq_when_saved_between_reservation_and_store_reserves_once() {
    let mut nomad = Nomad::new(Doorbell::Trap, Mode::UserPolling);
    let rig = Arc::clone(&nomad.rig);
    let head = Head::new().with_head(64).with_limit(100);
    rig.set_word(0, head.into_bits());
    rig.map_range(ASID, VA, 0, 2 * PAGE);
    // A CBE as it is in that moment: reserved, nothing stored.
    nomad.command(Opc::INTERRUPT_SYNC);
    rig.set_word(0, head.with_head(66).into_bits());
    let message = Instruction::mesq(VA, 0, 2);
    let at = nomad.at;
    let words = [
        (cbe::COPY, {
            let control = message.control;
            let copied = cbe::Copied::new()
                .with_opc(control.opc())
                .with_xtype(control.xtype());
            copied.into_bits()
        }),
        (cbe::IDEF4, cbe::Idef4::new().with_updated(1).into_bits()),
        (cbe::IDEF1UPD, VA),
        (cbe::IDEF5CPY, 2),
        (cbe::IDEF6CPY, head.into_bits()),
        (cbe::IDEF5UPD, 2),
        (
            cbe::STATE,
            cbe::Status::new()
                .with_cbrstate(State::INTERRUPTED_MISS_UPM)
                .into_bits(),
        ),
    ];
    for (offset, value) in words {
        rig.trap_store(at.cbe(2) + offset, value);
    }
    (0..16).for_each(|word| rig.store(at.ds() + 8 * word, 0x5a));
    nomad.command(Opc::START);
    nomad.move_to(PLACES[2]);
    rig.until("the message", || {
        nomad.serve();
        (nomad.ended(2) == Some(Status::IDLE) && rig.word(PAGE) != 0).then_some(())
    });
    assert_eq!(rig.word(0), head.with_head(66).into_bits(), "not reserved again");
    assert!(
        rig.bytes(PAGE, 128)
            .chunks(8)
            .all(|word| word == 0x5au64.to_le_bytes())
    );
    assert_eq!(rig.load(nomad.at.cb(2) + cb::AVALUE), head.into_bits());
}

#[test]
fn test_cbe_when_interrupt_waits_for_a_fault_map_miss_says_so() {
    in_all_modes(|doorbell| {
        let nomad = Nomad::new(doorbell, Mode::FaultMap);
        let rig = &nomad.rig;
        rig.map_range(ASID, VA, 0, PAGE);
        nomad.issue(0, Instruction::vload(VA, 0, XType::DWORD, 1, 1));
        rig.wait_fault(0, 2);
        let control = nomad.cch().with_opc(Opc::INTERRUPT).with_cmd(true);
        rig.trap_store(
            nomad.at.cch(),
            control.with_status(HandleStatus::ACTIVE).into_bits(),
        );
        rig.until("the busy state", || {
            // Each look of an engine tries the command again.
            nomad.purge(VA + PAGE);
            assert_eq!(nomad.cch().status(), HandleStatus::ACTIVE);
            (nomad.cbrstate(0) == State::BUSY_INTERRUPT_MISS_FMM).then_some(())
        });
        nomad.serve();
        rig.until("the interrupt", || {
            (nomad.cch().status() == HandleStatus::IDLE).then_some(())
        });
        assert_eq!(nomad.cbrstate(0), State::INTERRUPTED);
        let status = cbe::Status::from_bits(nomad.trapped(nomad.at.cbe(0) + cbe::STATE));
        assert_ne!(status.cbrexecstatus() & cbe::execstatus::INT_OCC, 0);
        nomad.command(Opc::START);
        rig.until("the load", || {
            (nomad.ended(0) == Some(Status::IDLE)).then_some(())
        });
    });
}

/// A user-polling miss is answered while its context is stopped: the answer is kept, the instruction runs after START.
#[test]
fn test_tfh_when_context_is_interrupted_is_still_answered() {
    in_all_modes(|doorbell| {
        let nomad = Nomad::new(doorbell, Mode::UserPolling);
        let rig = &nomad.rig;
        rig.map_range(ASID, VA, 0, PAGE);
        nomad.issue(0, Instruction::vset(VA, 5, XType::DWORD, 1, 1));
        rig.until("the miss", || {
            (rig.tfh(2).state() == tfh::State::MISS_UPM).then_some(())
        });
        nomad.command_while(Opc::INTERRUPT, || {});
        assert_eq!(nomad.cbrstate(0), State::INTERRUPTED_MISS_UPM);
        assert_eq!(nomad.serve(), 1);
        assert_eq!(rig.tfh_wait(2), HandleStatus::IDLE);
        assert_eq!(nomad.cbrstate(0), State::INTERRUPTED);
        assert_eq!((rig.word(0), rig.gru.stats().fills), (0, 1));
        nomad.command(Opc::START);
        rig.until("the store", || {
            (nomad.ended(0) == Some(Status::IDLE)).then_some(())
        });
        assert_eq!((rig.word(0), rig.gru.stats().misses), (5, 1));
    });
}
