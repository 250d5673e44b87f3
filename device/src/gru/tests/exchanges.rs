//! Read-modify-write sequences on trapped words while the device changes them.
//!
//! A guest's locked operation on trapped memory is a read message and a write message. No other processor's access
//! comes between the two (QEMU stops the others), but the device is not stopped. Here a thread on a [`Bus`] is
//! a processor.

use super::*;
use protos::gru::cb::XType;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicBool;

/// Processors that send messages. `exclusive`: between read and write of a locked operation comes no other access.
struct Bus<'a> {
    rig: &'a Rig,
    exclusive: Option<Mutex<()>>,
}

impl<'a> Bus<'a> {
    fn new(rig: &'a Rig, exclusive: bool) -> Self {
        let exclusive = exclusive.then(Mutex::default);
        Self { rig, exclusive }
    }

    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.exclusive.as_ref().map(|lock| lock.lock().unwrap())
    }

    fn read(&self, at: u64, width: usize) -> u64 {
        let _turn = self.turn();
        self.read_now(at, width)
    }

    fn write(&self, at: u64, width: usize, value: u64) {
        let _turn = self.turn();
        self.write_now(at, width, value);
    }

    fn read_now(&self, at: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.rig
            .gru
            .bar_read(pci::BAR_CHIPLETS, at, &mut bytes[..width])
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    fn write_now(&self, at: u64, width: usize, value: u64) {
        self.rig
            .gru
            .bar_write(pci::BAR_CHIPLETS, at, &value.to_le_bytes()[..width])
            .unwrap();
    }

    /// A locked operation; what was read.
    fn locked(&self, at: u64, width: usize, change: impl FnOnce(u64) -> u64) -> u64 {
        let _turn = self.turn();
        let old = self.read_now(at, width);
        self.write_now(at, width, change(old));
        old
    }

    /// What compilers make of an assignment to a bit field: not locked.
    fn assign(&self, at: u64, width: usize, change: impl FnOnce(u64) -> u64) {
        let old = self.read(at, width);
        self.write(at, width, change(old));
    }

    /// test_and_set_bit of delresp, as the driver locks CCH and TGH.
    fn lock_handle(&self, at: u64) {
        self.rig.until("the handle's lock", || {
            (self.locked(at, 8, |word| word | 2) & 2 == 0).then_some(())
        });
    }

    fn unlock_handle(&self, at: u64) {
        let before = self.locked(at, 8, |word| word & !2);
        assert_ne!(before & 2, 0, "somebody else has unlocked it");
    }
}

const BITS: usize = 64;

/// Two processors empty a word while the device sets bits in it. Each bit is set again as soon as it has been taken.
fn storm(exclusive: bool, widths: [usize; 2]) -> (u64, u64) {
    let rig = Rig::new(config(Doorbell::Trap));
    let hardware = &rig.gru.hardware;
    let bus = Bus::new(&rig, exclusive);
    let at = map::TFM + map::tfm::FAULT_BITS;
    let set: Vec<AtomicBool> = (0..BITS).map(|_| AtomicBool::new(false)).collect();
    let (taken, twice) = (AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    let round = |width: usize| {
        for part in (0..8).step_by(width) {
            let old = bus.locked(at + part as u64, width, |_| 0);
            for bit in super::super::chiplet::bits(old) {
                let was_set = set[part * 8 + bit].swap(false, Ordering::SeqCst);
                if was_set { &taken } else { &twice }.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let rounds = 3000;
    std::thread::scope(|scope| {
        for width in widths {
            let (round, stop) = (&round, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    round(width);
                }
            });
        }
        let setting = scope.spawn(|| {
            let deadline = Instant::now() + Duration::from_secs(30);
            for number in 0..rounds * BITS {
                let bit = number % BITS;
                while set[bit].load(Ordering::SeqCst) {
                    assert!(Instant::now() < deadline, "bit {bit} was lost");
                    std::hint::spin_loop();
                }
                set[bit].store(true, Ordering::SeqCst);
                hardware.tfm_set(&hardware.chiplets[0], 0, map::tfm::FAULT_BITS, bit);
            }
        });
        let result = setting.join();
        // Also when the device found a bit missing: the processors have to end.
        while result.is_ok() && set.iter().any(|bit| bit.load(Ordering::SeqCst)) {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::SeqCst);
        result.unwrap();
    });
    round(8);
    assert_eq!(bus.read(at, 8), 0, "a bit is left");
    let (taken, twice) = (taken.into_inner(), twice.into_inner());
    println!("{widths:?}: {taken} taken, {twice} seen twice");
    assert_eq!(taken, (rounds * BITS) as u64);
    (taken, twice)
}

#[test]
fn test_tfm_when_processors_exchange_while_bits_are_set_takes_each_bit_once() {
    for widths in [[8, 8], [8, 4], [2, 1]] {
        let (_, twice) = storm(true, widths);
        assert_eq!(twice, 0, "{widths:?}");
    }
}

/// Without the processors' exclusion a bit may be seen by both, as in any memory; none is lost even so.
#[test]
fn test_tfm_when_exchanges_are_torn_by_each_other_loses_no_bit() {
    for widths in [[8, 8], [4, 1]] {
        storm(false, widths);
    }
}

/// The whole path: control blocks miss and finish with an interrupt again and again.
#[test]
fn test_fault_maps_when_emptied_by_two_processors_serve_every_miss() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let bus = Bus::new(&rig, true);
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    const ROUNDS: u64 = 1500;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    for cbr in super::super::chiplet::bits(bus.locked(map::TFM, 8, |_| 0)) {
                        // The driver's OR: status EXCEPTION | ACTIVE, and opc by a byte.
                        let at = Rig::tfh_at(cbr);
                        bus.assign(at, 1, |word| word & !0x70 | u64::from(tfh::Opc::EXCEPTION.0) << 4);
                        bus.assign(at, 8, |word| word | 0x2_0001);
                    }
                    let finished = bus.locked(map::TFM + map::tfm::DONE_BITS, 8, |_| 0);
                    done.fetch_add(u64::from(finished.count_ones()), Ordering::SeqCst);
                }
            });
        }
        let interrupting = Instruction::nop();
        let control = interrupting.control.with_ima(cb::ima::INTERRUPT);
        let interrupting = Instruction {
            control,
            ..interrupting
        };
        let mut notices = 0;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..ROUNDS {
                for cb in 0..2 {
                    rig.issue(cb, Instruction::vload(VA, 0, XType::DWORD, 1, 1));
                }
                // One done bit at a time: two of one CBR would be one bit.
                rig.issue(2, interrupting);
                notices += 1;
                rig.until("a done bit", || {
                    (done.load(Ordering::SeqCst) == notices).then_some(())
                });
                for cb in 0..2 {
                    let status = rig.until("a miss that is served", || rig.ended(cb));
                    assert_eq!(status, Status::EXCEPTION);
                }
            }
            rig.until("the last NOP", || rig.ended(2));
        }));
        stop.store(true, Ordering::SeqCst);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    assert_eq!(bus.read(map::TFM, 8), 0);
    assert_eq!(bus.read(map::TFM + map::tfm::DONE_BITS, 8), 0);
    assert_eq!(rig.gru.stats().misses, 2 * ROUNDS);
}

const VA: u64 = 0x5000;

/// delresp is a lock that others try to take while the command runs; operands are read and written by the byte.
#[test]
fn test_tgh_when_processors_fight_for_its_lock_runs_each_command_once() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let bus = Bus::new(&rig, true);
    let at = map::TGH;
    const EACH: u64 = 400;
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let bus = &bus;
            scope.spawn(move || {
                for round in 0..EACH {
                    bus.lock_handle(at);
                    bus.write(at + tgh::VADDR, 8, thread << 40 | round << 12);
                    // Single fields, as bit field assignments do it: asid (3 bytes), n (2 bytes), opc (1 byte).
                    bus.assign(at + tgh::SCOPE, 4, |_| u64::from(ASID));
                    bus.assign(at + tgh::SCOPE + 4, 1, |_| 0);
                    bus.assign(at + tgh::SCOPE + 6, 1, |_| 0);
                    bus.write(at + tgh::COUNT, 8, tgh::VADDRMASK_ALL);
                    bus.assign(at + tgh::COUNT + 6, 2, |_| round % 4);
                    bus.assign(at, 1, |word| word & !4 | 4);
                    bus.assign(at, 8, |word| word | 0x2_0001);
                    bus.rig.until("a TLBINV", || {
                        let control = tgh::Control::from_bits(bus.read(at, 8));
                        assert!(control.delresp(), "the lock was lost");
                        (control.status() != HandleStatus::ACTIVE).then(|| {
                            assert_eq!(control.status(), HandleStatus::IDLE);
                            assert!(!control.cmd(), "{control:?}");
                        })
                    });
                    bus.unlock_handle(at);
                }
            });
        }
    });
    assert_eq!(rig.gru.stats().tgh_purges, 3 * EACH);
    let left = tgh::Control::from_bits(bus.read(at, 8));
    assert!(!left.cmd() && !left.delresp(), "{left:?}");
}

#[test]
fn test_cch_when_processors_fight_for_its_lock_runs_each_command_once() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 64 * PAGE);
    let bus = Bus::new(&rig, true);
    let at = Rig::cch_at(0);
    let command = |opc: cch::Opc| {
        bus.assign(at, 1, |word| word & !0x1c | u64::from(opc.0) << 2);
        bus.assign(at, 8, |word| word | 0x2_0001);
        bus.rig.until("a CCH answer", || {
            let control = cch::Control::from_bits(bus.read(at, 8));
            assert!(control.delresp(), "the lock was lost");
            (control.status() != HandleStatus::ACTIVE).then(|| {
                assert_eq!(control.status(), HandleStatus::IDLE, "{control:?}");
                assert!(!control.cmd(), "{control:?}");
            })
        });
    };
    std::thread::scope(|scope| {
        let processors: Vec<_> = (0..3u32)
            .map(|thread| {
                let (bus, command) = (&bus, &command);
                scope.spawn(move || {
                    for round in 0..150 {
                        bus.lock_handle(at);
                        command(cch::Opc::INTERRUPT);
                        // The driver's update: another page size for a region that nobody uses.
                        bus.assign(at + cch::SIZEAVAIL + 6, 2, |_| u64::from(thread << 8 | round));
                        command(cch::Opc::START);
                        bus.unlock_handle(at);
                    }
                })
            })
            .collect();
        // INTERRUPT has something to wait for.
        let mut rounds = 0;
        while !processors.iter().all(|processor| processor.is_finished()) {
            rig.issue(0, Instruction::vset(VA, rounds, XType::DWORD, 64 * 512, 1));
            assert_eq!(rig.finish(0), Status::IDLE);
            rounds += 1;
        }
    });
    let left = cch::Control::from_bits(bus.read(at, 8));
    assert_eq!(left.state(), cch::State::ACTIVE);
    assert!(!left.cmd() && !left.delresp(), "{left:?}");
}

/// pfn and fillvaddr byte by byte, half by half: what a compiler makes of them, and `rep movsb`.
#[test]
fn test_tfh_when_operands_come_in_pieces_enters_the_whole_translation() {
    for width in [1, 2, 4, 8] {
        let rig = Rig::new(config(Doorbell::Trap));
        rig.start(Mode::FaultMap);
        let expected = rig.fill_memory(3 * PAGE, 64, 9);
        let bus = Bus::new(&rig, true);
        rig.issue(0, Instruction::vload(VA, 0, XType::DWORD, 8, 1));
        rig.wait_fault(0, 2);
        let at = Rig::tfh_at(2);
        let pieces = |offset: u64, value: u64| {
            for part in (0..8).step_by(width) {
                bus.assign(at + offset + part as u64, width, |_| value >> (8 * part));
            }
        };
        let asids = tfh::Asids::from_bits(bus.read(at + tfh::ASIDS, 8));
        pieces(tfh::ASIDS, asids.with_fillasid(ASID).with_dirty(true).into_bits());
        let target = tfh::Target::new().with_pfn((IOVA + 3 * PAGE) >> 12);
        pieces(tfh::TARGET, target.into_bits());
        pieces(tfh::FILLVADDR, VA);
        bus.assign(at, 1, |word| {
            word & !0x70 | u64::from(tfh::Opc::WRITE_RESTART.0) << 4
        });
        assert_eq!(rig.gru.stats().fills, 0, "nothing has started");
        bus.assign(at, 8, |word| word | 0x2_0001);
        rig.until("the load", || rig.ended(0));
        assert_eq!(rig.ds_read(0, 64), expected, "width {width}");
    }
}
