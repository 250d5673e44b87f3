//! Memory without a file: the client is asked, and may be silent.

use std::ops::Range;
use std::sync::{Condvar, MutexGuard};

use protos::gru::cb::{ExplicitOp, ImplicitOp, XType, ima};
use protos::gru::cbe::ecause;
use rustix::io::Errno;

use super::*;
use crate::dma::{DmaError, Interest, Messenger};

const VA: u64 = 0x7000_0000;
/// Where the client's private memory is, from [`IOVA`] on.
const PRIVATE: u64 = MEMORY;
const PRIVATE_LEN: u64 = 1 << 20;

/// What the client does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Answers,
    /// Then [`Manner::Silent`].
    AnswersOnce,
    /// Until told otherwise.
    Silent,
    Refuses,
    /// Longer than the device waits.
    TooLate,
}

#[derive(Debug)]
struct Client {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    manner: Manner,
    bytes: Vec<u8>,
    next: u16,
    /// Tickets that were aborted.
    aborted: Vec<u16>,
    open: Vec<(u16, Range<u64>)>,
    reads: usize,
    writes: usize,
}

impl Client {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                manner: Manner::Answers,
                bytes: (0..PRIVATE_LEN).map(|at| (at * 7 + at / 251) as u8).collect(),
                next: 0,
                aborted: Vec::new(),
                open: Vec::new(),
                reads: 0,
                writes: 0,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn behave(&self, manner: Manner) {
        self.lock().manner = manner;
        self.changed.notify_all();
    }

    fn asked(&self) -> (usize, usize) {
        let state = self.lock();
        (state.reads, state.writes)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        self.lock().bytes[at as usize..][..len].to_vec()
    }

    /// Waits as the server does. `still`: whether the asker still wants it.
    fn exchange(
        &self,
        ticket: u16,
        iova: u64,
        len: u64,
        still: impl Fn() -> bool,
        act: impl FnOnce(&mut [u8]),
    ) -> Result<(), DmaError> {
        let mut state = self.lock();
        let result = loop {
            if state.aborted.contains(&ticket) {
                let why = "the test says so";
                break Err(DmaError::Aborted { iova, len, why });
            }
            if !still() {
                break Err(DmaError::Unwanted { iova, len });
            }
            let errno = Errno::NODEV;
            match state.manner {
                manner @ (Manner::Answers | Manner::AnswersOnce) => {
                    if manner == Manner::AnswersOnce {
                        state.manner = Manner::Silent;
                    }
                    let at = (iova - IOVA - PRIVATE) as usize;
                    act(&mut state.bytes[at..][..len as usize]);
                    break Ok(());
                }
                Manner::Refuses => break Err(DmaError::Refused { iova, len, errno }),
                Manner::TooLate => break Err(DmaError::NoAnswer { iova, len }),
                Manner::Silent => state = self.changed.wait(state).unwrap(),
            }
        };
        state.open.retain(|(open, _)| *open != ticket);
        result
    }
}

impl Messenger for Client {
    fn max_transfer(&self) -> usize {
        1000
    }
    fn open(&self, iova: u64, len: u64) -> Result<u16, DmaError> {
        let mut state = self.lock();
        state.next += 1;
        let ticket = state.next;
        state.open.push((ticket, iova..iova + len));
        Ok(ticket)
    }
    fn read(&self, ticket: u16, iova: u64, to: &mut [u8], interest: &dyn Interest) -> Result<(), DmaError> {
        self.lock().reads += 1;
        let len = to.len() as u64;
        self.exchange(
            ticket,
            iova,
            len,
            || interest.wanted(),
            |bytes| to.copy_from_slice(bytes),
        )
    }
    fn write(&self, ticket: u16, iova: u64, from: &[u8], interest: &dyn Interest) -> Result<(), DmaError> {
        let len = from.len() as u64;
        if !interest.commit() {
            return Err(DmaError::Unwanted { iova, len });
        }
        self.lock().writes += 1;
        self.exchange(ticket, iova, len, || true, |bytes| bytes.copy_from_slice(from))
    }
    fn abort(&self, iova: Range<u64>) {
        let mut state = self.lock();
        let met: Vec<u16> = state
            .open
            .iter()
            .filter(|(_, range)| range.start < iova.end && iova.start < range.end)
            .map(|(ticket, _)| *ticket)
            .collect();
        state.aborted.extend(met);
        drop(state);
        self.changed.notify_all();
    }
    fn recheck(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }
}

/// [`VA`]: 64 private pages; behind them 64 with a file.
fn rig(config: GruConfig) -> (Arc<Rig>, Arc<Client>) {
    let rig = Rig::new(config);
    let client = Client::new();
    rig.dma
        .map_by_message(IOVA + PRIVATE, PRIVATE_LEN, Prot::READ_WRITE)
        .unwrap();
    rig.dma
        .set_messenger(Some(Arc::clone(&client) as Arc<dyn Messenger>));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, PRIVATE, 64 * PAGE);
    rig.map_range(ASID, FILE, 0, 64 * PAGE);
    (rig, client)
}

const FILE: u64 = VA + 64 * PAGE;

fn one_engine(doorbell: Doorbell) -> GruConfig {
    GruConfig {
        engines: 1,
        ..config(doorbell)
    }
}

fn load(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

fn store(va: u64) -> Instruction {
    Instruction::vstore(va, 0, XType::DWORD, 1, 1)
}

/// CB `cb` waits for the client, and its miss has been served.
fn wait_until_asked(rig: &Rig, client: &Client, requests: (usize, usize)) {
    rig.until("a request", || {
        rig.serve();
        (client.asked() == requests).then_some(())
    });
}

fn cause(rig: &Rig, cb: usize) -> u32 {
    rig.cbe_status(0b1010, cb).ecause()
}

#[test]
fn test_loads_stores_and_copies_when_memory_has_no_file_ask_the_client() {
    in_all_modes(|doorbell| {
        let (rig, client) = rig(config(doorbell));
        let bytes = client.bytes(0, 64 * PAGE as usize);
        // Across pages and requests, unaligned.
        rig.run_ok(0, Instruction::vload(VA + 4093, 8, XType::BYTE, 5000, 1));
        assert_eq!(rig.ds_read(8, 5000), bytes[4093..9093]);
        rig.run_ok(
            0,
            Instruction::vstore(VA + 20 * PAGE + 5, 8, XType::BYTE, 5000, 1),
        );
        assert_eq!(client.bytes(20 * PAGE + 5, 5000), bytes[4093..9093]);
        // Elements that stand apart, one of them across a page.
        rig.run_ok(
            0,
            Instruction::vset(VA + 30 * PAGE + 4, 0x1122_3344_5566_7788, XType::DWORD, 3, 511),
        );
        for element in 0..3 {
            let at = 30 * PAGE + 4 + element * 511 * 8;
            assert_eq!(client.bytes(at, 8), 0x1122_3344_5566_7788u64.to_le_bytes());
        }
        // Private to shared, shared to private, private to private.
        rig.run_ok(0, Instruction::bcopy(VA + 3, FILE + 5, 0, 4, XType::BYTE, 70_000));
        assert!(rig.bytes(5, 70_000) == bytes[3..70_003]);
        let shared = rig.fill_memory(0, 70_000, 9);
        rig.run_ok(
            0,
            Instruction::bcopy(FILE + 5, VA + 40 * PAGE + 1, 0, 4, XType::BYTE, 60_000),
        );
        assert!(client.bytes(40 * PAGE + 1, 60_000) == shared[5..60_005]);
        rig.run_ok(
            0,
            Instruction::bcopy(VA, VA + 20 * PAGE + 1, 0, 4, XType::BYTE, 9000),
        );
        assert!(client.bytes(20 * PAGE + 1, 9000) == bytes[..9000]);
        // A flush touches nothing.
        let (reads, writes) = client.asked();
        rig.run_ok(0, Instruction::vflush(VA, XType::CACHE_LINE, 1, 100));
        assert_eq!(client.asked(), (reads, writes));
        assert!(reads > 0 && writes > 0 && rig.gru.stats().accesses_by_message > 0);
    });
}

#[test]
fn test_courier_when_the_fault_plan_parks_it_inside_an_access_counts_as_nobody() {
    in_all_modes(|doorbell| {
        let (rig, client) = rig(GruConfig {
            faults: "drain-delay=1,limit-ms=20,margin-ms=1".parse().unwrap(),
            ..config(doorbell)
        });
        let bytes = client.bytes(0, 300);
        // From private memory, so a courier copies; into mapped memory, so it has guards to be parked in.
        rig.run_ok(0, Instruction::bcopy(VA, FILE, 0, 4, XType::BYTE, 300));
        assert!(rig.bytes(0, 300) == bytes);
        assert!(rig.gru.stats().faults.engines_parked > 0);
    });
}

#[test]
fn test_unmapped_mode_when_memory_has_no_file_asks_the_client() {
    let (rig, client) = rig(config(Doorbell::Trap));
    rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
    let control = rig.cch(0).with_unmap_enable(true).with_opc(cch::Opc::START);
    rig.cch_send(0, control);
    rig.cch_wait(0).unwrap();
    let at = IOVA + PRIVATE;
    let physical = |instruction: Instruction| instruction.with_ima(ima::UNMAPPED);
    rig.run_ok(0, physical(Instruction::vload(at + 77, 0, XType::BYTE, 6000, 1)));
    assert_eq!(rig.ds_read(0, 6000), client.bytes(77, 6000));
    rig.run_ok(
        0,
        physical(Instruction::vstore(at + PAGE, 0, XType::BYTE, 6000, 1)),
    );
    assert_eq!(client.bytes(PAGE, 6000), rig.ds_read(0, 6000));
    let inc = physical(Instruction::gamir(at, ImplicitOp::INC, XType::DWORD));
    assert_eq!(rig.run(0, inc), Status::EXCEPTION);
    assert_eq!(cause(&rig, 0), ecause::HA_RESPONSE_FATAL);
    // Beyond it is nothing.
    let beyond = physical(load(at + PRIVATE_LEN - 4));
    assert_eq!(rig.run(0, beyond), Status::EXCEPTION);
    assert_eq!(cause(&rig, 0), ecause::ADDRESS_SPACE_DECODE_ERROR);
}

#[test]
fn test_atomics_when_memory_has_no_file_are_refused_and_ask_nobody() {
    let (rig, client) = rig(config(Doorbell::Bell));
    for instruction in [
        Instruction::gamir(VA, ImplicitOp::INC, XType::DWORD),
        Instruction::gamir(VA, ImplicitOp::FETCH, XType::DWORD),
        Instruction::gamer(VA, ExplicitOp::SWAP, 1, 0, XType::WORD),
        Instruction::mesq(VA, 0, 1),
    ] {
        assert_eq!(rig.run(0, instruction), Status::EXCEPTION, "{instruction:?}");
        assert_eq!(cause(&rig, 0), ecause::HA_RESPONSE_FATAL, "{instruction:?}");
    }
    assert_eq!(client.asked(), (0, 0));
}

#[test]
fn test_purge_when_a_read_is_unanswered_completes_and_the_late_answer_is_not_used() {
    in_all_modes(|doorbell| {
        // A single engine: it must not be the one that waits.
        let (rig, client) = rig(one_engine(doorbell));
        client.behave(Manner::Silent);
        rig.issue(0, load(VA));
        wait_until_asked(&rig, &client, (1, 0));
        // Everything else goes on.
        rig.set_word(0, 4711);
        rig.run_ok(1, Instruction::vload(FILE, 64, XType::DWORD, 1, 1));
        assert_eq!(rig.ds_read(64, 8), 4711u64.to_le_bytes());
        // The page moves: another purge does not touch it, this one does.
        rig.purge(0, ASID, VA + PAGE, 4);
        assert_eq!(rig.istatus(0), Status::ACTIVE);
        rig.map_page(ASID, VA, 5 * PAGE, true);
        rig.set_word(5 * PAGE, 42);
        rig.purge(0, ASID, VA, 1);
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.ds_read(0, 8), 42u64.to_le_bytes(), "read after the purge");
        assert_eq!(client.asked(), (1, 0), "nobody was asked again");
        client.behave(Manner::Answers);
        assert_eq!(rig.ds_read(0, 8), 42u64.to_le_bytes());
    });
}

#[test]
fn test_purge_when_a_write_was_sent_waits_until_it_has_happened() {
    // A single engine: it is not the one that waits.
    let (rig, client) = rig(one_engine(Doorbell::Bell));
    client.behave(Manner::Silent);
    rig.ds_write(0, &77u64.to_le_bytes());
    rig.issue(0, store(VA + 8));
    wait_until_asked(&rig, &client, (0, 1));
    std::thread::scope(|scope| {
        let purge = scope.spawn(|| {
            rig.purge(3, ASID, VA, 1);
            client.bytes(8, 8)
        });
        rig.until("the purge", || {
            (rig.gru.atc(0).unwrap().stats().active_purges == 1).then_some(())
        });
        // It has begun, and lets others work, but does not end.
        for _ in 0..100 {
            rig.run_ok(1, Instruction::vload(FILE, 64, XType::DWORD, 1, 1));
        }
        assert!(!purge.is_finished());
        // A purge of something else does not wait for it.
        rig.purge(4, ASID, FILE, 1);
        client.behave(Manner::Answers);
        assert_eq!(
            purge.join().unwrap(),
            77u64.to_le_bytes(),
            "written before the purge returned"
        );
    });
    assert_eq!(rig.finish(0), Status::IDLE);
}

/// What does not wait for the client's answer is seen, by the TGH that says so; what waits is not.
#[test]
fn test_sanitizer_when_a_tgh_does_not_wait_for_a_sent_store_reports_it() {
    use crate::atc::Defect;
    use crate::faults::BreakPlan;
    for broken in [true, false] {
        let (rig, client) = rig(GruConfig {
            sanitize: true,
            broken: BreakPlan {
                drain: broken,
                ..BreakPlan::default()
            },
            ..config(Doorbell::Trap)
        });
        client.behave(Manner::Silent);
        rig.issue(0, store(VA + 8));
        wait_until_asked(&rig, &client, (0, 1));
        rig.purge_send(3, ASID, VA, 1);
        let findings = || rig.gru.findings().expect("a sanitizer");
        if !broken {
            client.behave(Manner::Answers);
        }
        rig.until("the purge", || {
            (rig.tgh(3).status() == HandleStatus::IDLE).then_some(())
        });
        let classes: Vec<_> = findings().reports.iter().map(|report| report.class).collect();
        let expected = vec![Defect::CompletionBeforeDrain; usize::from(broken)];
        assert_eq!(classes, expected, "{:#?}", findings());
        client.behave(Manner::Answers);
        assert_eq!(rig.finish(0), Status::IDLE);
    }
}

/// The thread that takes the store of a TGH counts as no engine: if it is held up after its look at the write, the engine
/// that hears of the answer finds nothing to finish.
#[test]
fn test_purge_when_its_write_is_answered_before_it_is_owed_completes() {
    let (rig, client) = rig(one_engine(Doorbell::Trap));
    client.behave(Manner::Silent);
    rig.issue(0, store(VA + 8));
    wait_until_asked(&rig, &client, (0, 1));
    let hardware = &rig.gru.hardware;
    let chiplet = &hardware.chiplets[0];
    let owed = hardware.owed.lock();
    std::thread::scope(|scope| {
        let (send, receive) = std::sync::mpsc::channel();
        let on_thread = &rig;
        scope.spawn(move || {
            send.send(rustix::thread::gettid()).unwrap();
            on_thread.purge_send(3, ASID, VA, 1);
        });
        let thread = receive.recv().unwrap();
        rig.until("a purge that waits for the list", || {
            let stat = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
            let sleeps = std::fs::read_to_string(stat).unwrap().contains(") S ");
            (sleeps && chiplet.atc.stats().active_purges == 1).then_some(())
        });
        client.behave(Manner::Answers);
        rig.until("an engine that has looked", || {
            let gone = rig.istatus(0) == Status::IDLE && chiplet.contexts[0].is_quiet();
            (gone && hardware.wake.asleep() == 1).then_some(())
        });
        drop(owed);
    });
    rig.until("the purge", || {
        (rig.tgh(3).status() == HandleStatus::IDLE).then_some(())
    });
}

/// All engines sleep, and the courier goes on waiting, for something else.
#[test]
fn test_purge_when_its_write_is_answered_and_the_next_of_the_step_is_not_completes() {
    in_all_modes(|doorbell| {
        let (rig, client) = rig(one_engine(doorbell));
        // Both translations are there.
        for page in 0..2 {
            rig.run_ok(0, store(VA + page * PAGE));
        }
        client.behave(Manner::Silent);
        // One step, two requests.
        rig.issue(0, Instruction::vset(VA, 5, XType::DWORD, 2, 512));
        wait_until_asked(&rig, &client, (0, 3));
        rig.purge_send(3, ASID, VA, 1);
        rig.until("a purge that waits for the client", || {
            (rig.gru.hardware.owed.lock().len() == 1 && rig.gru.hardware.wake.asleep() == 1).then_some(())
        });
        client.behave(Manner::AnswersOnce);
        rig.until("the purge", || {
            (rig.tgh(3).status() == HandleStatus::IDLE).then_some(())
        });
        assert_eq!(rig.istatus(0), Status::ACTIVE, "the second is not answered");
        client.behave(Manner::Answers);
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(client.bytes(PAGE, 8), 5u64.to_le_bytes());
    });
}

#[test]
fn test_reset_when_a_purge_waits_for_a_write_ends_both_and_gives_the_handle_back() {
    in_all_modes(|doorbell| {
        let (rig, client) = rig(one_engine(doorbell));
        client.behave(Manner::Silent);
        rig.issue(0, store(VA + 8));
        wait_until_asked(&rig, &client, (0, 1));
        // In trap mode this thread executes it, and is not kept.
        rig.purge_send(3, ASID, VA, 1);
        let owed = || rig.gru.hardware.owed.lock().len();
        rig.until("a purge that waits for the client", || {
            (owed() == 1).then_some(())
        });
        assert_eq!(rig.tgh(3).status(), HandleStatus::ACTIVE);
        {
            // As a function does: what the client has been asked for ends.
            let _quiet = rig.dma.quiet();
            rig.gru.reset();
        }
        assert_eq!((owed(), client.lock().open.len()), (0, 0));
        assert_eq!(rig.gru.atc(0).unwrap().stats().active_purges, 0);
        assert_eq!(rig.tgh(3).status(), HandleStatus::IDLE);
        client.behave(Manner::Answers);
        rig.start(Mode::FaultMap);
        rig.run_ok(0, load(VA + 8));
        rig.purge(3, ASID, VA, 1);
        rig.run_ok(0, load(VA + 8));
    });
}

/// A courier is inside a context for a moment whenever it looks for work, and nobody knows of it.
#[test]
fn test_interrupt_when_a_courier_leaves_after_all_engines_have_looked_completes() {
    let (rig, _client) = rig(one_engine(Doorbell::Bell));
    let hardware = &rig.gru.hardware;
    let asleep = |what, parks| {
        rig.until(what, || {
            let parked = hardware.wake.parks.load(Ordering::Relaxed) > parks;
            (parked && hardware.wake.asleep() == 1).then_some(())
        });
    };
    asleep("an engine without work", 0);
    let visit = hardware.visit(&hardware.chiplets[0].contexts[0]).unwrap();
    let parks = hardware.wake.parks.load(Ordering::Relaxed);
    rig.cch_send(0, rig.cch(0).with_opc(cch::Opc::INTERRUPT));
    asleep("an engine that has looked", parks);
    assert_eq!(rig.cch(0).status(), HandleStatus::ACTIVE);
    drop(visit);
    rig.cch_wait(0).unwrap();
}

#[test]
fn test_unanswered_access_when_memory_or_mastering_goes_ends_in_an_exception() {
    for unmap in [true, false] {
        for instruction in [load(VA), store(VA)] {
            let (rig, client) = rig(one_engine(Doorbell::Trap));
            client.behave(Manner::Silent);
            rig.issue(0, instruction);
            rig.until("a request", || {
                rig.serve();
                (client.asked() != (0, 0)).then_some(())
            });
            if unmap {
                rig.dma.unmap(IOVA + PRIVATE, PRIVATE_LEN).unwrap();
            } else {
                rig.dma.set_bus_master(false);
            }
            assert_eq!(rig.finish(0), Status::EXCEPTION);
            let expected = [ecause::PE_CHECK_DATA_ERROR, ecause::ADDRESS_SPACE_DECODE_ERROR];
            assert!(expected.contains(&cause(&rig, 0)), "{:#x}", cause(&rig, 0));
            assert_eq!(
                client.bytes(0, 8),
                Client::new().bytes(0, 8),
                "nothing was stored"
            );
        }
    }
}

#[test]
fn test_context_when_interrupted_while_the_client_is_silent_stops_and_goes_on_later() {
    in_all_modes(|doorbell| {
        let (rig, client) = rig(one_engine(doorbell));
        client.behave(Manner::Silent);
        rig.issue(0, load(VA + 16));
        wait_until_asked(&rig, &client, (1, 0));
        rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
        assert_eq!(rig.cbe_status(0b1010, 0).cbrstate(), cbe::State::INTERRUPTED);
        rig.cch_do(0, cch::Opc::START).unwrap();
        wait_until_asked(&rig, &client, (2, 0));
        client.behave(Manner::Answers);
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.ds_read(0, 8), client.bytes(16, 8));
    });
}

#[test]
fn test_reset_when_the_client_is_silent_does_not_wait_for_it() {
    let (rig, client) = rig(one_engine(Doorbell::Trap));
    client.behave(Manner::Silent);
    rig.issue(0, load(VA));
    wait_until_asked(&rig, &client, (1, 0));
    rig.gru.reset();
    assert_eq!(client.lock().open.len(), 0, "nobody waits any more");
    client.behave(Manner::Answers);
    rig.start(Mode::FaultMap);
    rig.run_ok(0, load(VA + 8));
    assert_eq!(rig.ds_read(0, 8), client.bytes(8, 8));
}

#[test]
fn test_device_when_dropped_while_the_client_is_silent_ends() {
    let (rig, client) = rig(one_engine(Doorbell::Poll));
    client.behave(Manner::Silent);
    rig.issue(0, load(VA));
    wait_until_asked(&rig, &client, (1, 0));
    drop(rig);
    assert_eq!(client.lock().open.len(), 0);
}

#[test]
fn test_client_when_it_refuses_or_is_too_late_fails_the_instruction_only() {
    let (rig, client) = rig(config(Doorbell::Trap));
    for (manner, expected) in [
        (Manner::Refuses, ecause::RA_RESPONSE_FATAL),
        (Manner::TooLate, ecause::RA_REQUEST_TIMEOUT),
    ] {
        client.behave(manner);
        for instruction in [
            load(VA),
            store(VA),
            Instruction::bcopy(FILE, VA, 0, 4, XType::DWORD, 10),
        ] {
            assert_eq!(rig.run(0, instruction), Status::EXCEPTION, "{manner:?}");
            assert_eq!(cause(&rig, 0), expected, "{manner:?} {instruction:?}");
        }
    }
    client.behave(Manner::Answers);
    rig.run_ok(0, load(VA));
}

/// Many control blocks of two contexts ask at once, while everything is purged all the time: each ends with the data
/// of its own page.
#[test]
fn test_many_when_they_ask_during_purges_all_end_with_their_data() {
    let (rig, client) = rig(config(Doorbell::Poll));
    for round in 0..60u64 {
        for cb in 0..4 {
            let va = VA + (round * 4 + cb) % 64 * PAGE + 4096 - 24;
            rig.issue(
                cb as usize,
                Instruction::vload(va, 2048 * cb as u32, XType::BYTE, 20, 1),
            );
        }
        rig.purge(round as usize % 8, ASID, VA, 64);
        for cb in 0..4 {
            assert_eq!(rig.finish(cb as usize), Status::IDLE, "round {round}");
            let at = (round * 4 + cb) % 64 * PAGE + 4096 - 24;
            assert_eq!(rig.ds_read(2048 * cb, 20), client.bytes(at, 20), "round {round}");
        }
    }
}
