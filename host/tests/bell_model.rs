//! Every interleaving of ringing and falling asleep, by loom: of the mailbox's workers on the bell's futex, and of the
//! device's engines on their doorbell. Models of both protocols (the code makes system calls): what they check is that
//! each side's order of store, fence and look leaves no request with everybody asleep. Each part that is taken away
//! must be *found*.

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::sync::{Arc, Mutex};

fn is_found(model: impl Fn() + Sync + Send + 'static) -> bool {
    let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(model))) else {
        return false;
    };
    // Another failure is a fault of the model.
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied());
    message.is_some_and(|message| message.contains(FOR_EVER))
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// In the message of every violation.
const FOR_EVER: &str = "asleep for ever";

/// One sleeper, and those who may wake it. loom's own waits would report a sleeper that nobody wakes by ending the
/// process; this one fails once everybody who could wake it has gone.
struct Bed {
    state: Mutex<Sleep>,
    ringers: u32,
}

#[derive(Default)]
struct Sleep {
    /// A doorbell's counter, and its edge that was not told yet.
    count: u32,
    edge: bool,
    asleep: bool,
    gone: u32,
}

impl Bed {
    fn new(ringers: u32) -> Self {
        Self {
            state: Mutex::new(Sleep::default()),
            ringers,
        }
    }
    fn gone(&self) {
        self.state.lock().unwrap().gone += 1;
    }
    fn until(&self, mut over: impl FnMut(&mut Sleep) -> bool) {
        loop {
            let mut state = self.state.lock().unwrap();
            if over(&mut state) {
                return;
            }
            assert!(state.gone < self.ringers, "{FOR_EVER}");
            drop(state);
            loom::thread::yield_now();
        }
    }
}

/// FUTEX_WAIT and FUTEX_WAKE on one word: the kernel compares and queues under a lock of its own.
struct Futex {
    word: AtomicU32,
    bed: Bed,
}

impl Futex {
    fn new() -> Self {
        Self {
            word: AtomicU32::new(0),
            bed: Bed::new(1),
        }
    }
    fn wait(&self, expected: u32) {
        {
            let mut state = self.bed.state.lock().unwrap();
            if self.word.load(Ordering::Relaxed) != expected {
                return;
            }
            state.asleep = true;
        }
        self.bed.until(|state| !state.asleep);
    }
    fn wake_one(&self) {
        self.bed.state.lock().unwrap().asleep = false;
    }
}

/// What is taken away.
#[derive(Clone, Copy, PartialEq)]
enum Broken {
    Nothing,
    RingersFence,
    SleepersFence,
    /// Who has seen the ring need not see the request.
    RelaxedRing,
    /// The sleeper reads the bell after it has looked at the slots.
    BellAfterTheSlots,
    /// The engine sleeps without the look after it has lowered the count.
    LookBeforeSleep,
    /// After TGHs in its sleep, too.
    LookAfterFlush,
    /// The engine empties the eventfd after that look.
    EmptyAfterTheLook,
}

/// `agent::mailbox::ring` against `Mailbox::work`.
fn mailbox(broken: Broken) {
    const REQUESTS: u32 = 2;
    let bell = Arc::new(Futex::new());
    let sleepers = Arc::new(AtomicU32::new(0));
    let slots: Arc<[AtomicU32; REQUESTS as usize]> = Arc::new(std::array::from_fn(|_| AtomicU32::new(0)));
    let agent = {
        let (bell, sleepers, slots) = (bell.clone(), sleepers.clone(), slots.clone());
        loom::thread::spawn(move || {
            for slot in slots.iter() {
                slot.store(1, Ordering::Release);
                bell.word.fetch_add(
                    1,
                    match broken {
                        Broken::RelaxedRing => Ordering::Relaxed,
                        _ => Ordering::Release,
                    },
                );
                if broken != Broken::RingersFence {
                    fence(Ordering::SeqCst);
                }
                if sleepers.load(Ordering::Relaxed) != 0 {
                    bell.wake_one();
                }
            }
            bell.bed.gone();
        })
    };
    let mut served = 0;
    while served < REQUESTS {
        let mut seen = bell.word.load(Ordering::Acquire);
        let mut any = false;
        for slot in slots.iter() {
            if slot.load(Ordering::Relaxed) == 1
                && slot
                    .compare_exchange(1, 0, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                served += 1;
                any = true;
            }
        }
        if any {
            continue;
        }
        if broken == Broken::BellAfterTheSlots {
            seen = bell.word.load(Ordering::Acquire);
        }
        sleepers.fetch_add(1, Ordering::Relaxed);
        if broken != Broken::SleepersFence {
            fence(Ordering::SeqCst);
        }
        if bell.word.load(Ordering::Relaxed) == seen {
            bell.wait(seen);
        }
        sleepers.fetch_sub(1, Ordering::Relaxed);
    }
    agent.join().unwrap();
}

/// An eventfd in an edge-triggered epoll instance: each write is an edge, which is told only while the counter is not
/// zero.
struct Doorbell(Bed);

impl Doorbell {
    fn ring(&self) {
        let mut state = self.0.state.lock().unwrap();
        state.count += 1;
        state.edge = true;
    }
    fn empty(&self) {
        self.0.state.lock().unwrap().count = 0;
    }
    fn sleep(&self) {
        self.0
            .until(|state| std::mem::take(&mut state.edge) && state.count > 0);
    }
}

struct Device {
    doorbell: Doorbell,
    awake: AtomicU32,
    /// A TGH and a CB.
    commands: [AtomicU32; 2],
}

impl Device {
    fn take(&self, which: usize) -> bool {
        self.commands[which].load(Ordering::Relaxed) == 1
            && self.commands[which].swap(0, Ordering::AcqRel) == 1
    }
    fn waits(&self) -> bool {
        self.commands.iter().any(|c| c.load(Ordering::Relaxed) == 1)
    }
    fn change(&self, up: bool, fenced: bool) {
        match up {
            true => self.awake.fetch_add(1, Ordering::Relaxed),
            false => self.awake.fetch_sub(1, Ordering::Relaxed),
        };
        if fenced {
            fence(Ordering::SeqCst);
        }
    }
    /// `engine::run` until as many commands as there are have been executed.
    fn engine(&self, broken: Broken) {
        let mut left = self.commands.len();
        let fenced = broken != Broken::SleepersFence;
        self.change(true, fenced);
        loop {
            for which in 0..2 {
                left -= usize::from(self.take(which));
            }
            if left == 0 {
                return;
            }
            self.change(false, fenced);
            if broken != Broken::EmptyAfterTheLook {
                self.doorbell.empty();
            }
            let mut look = broken != Broken::LookBeforeSleep;
            loop {
                if look && self.waits() {
                    break;
                }
                if broken == Broken::EmptyAfterTheLook {
                    self.doorbell.empty();
                }
                self.doorbell.sleep();
                // Still counted as asleep: the TGH alone.
                let flushed = self.take(0);
                left -= usize::from(flushed);
                if !flushed || left == 0 {
                    break;
                }
                look = broken != Broken::LookAfterFlush;
            }
            self.change(true, fenced);
        }
    }
}

/// `driver`'s store, fence, look at `awake`, ring against an engine.
fn device(broken: Broken) {
    let device = Arc::new(Device {
        doorbell: Doorbell(Bed::new(2)),
        awake: AtomicU32::new(0),
        commands: std::array::from_fn(|_| AtomicU32::new(0)),
    });
    let software: Vec<_> = (0..2)
        .map(|which| {
            let device = device.clone();
            loom::thread::spawn(move || {
                device.commands[which].store(1, Ordering::Release);
                if broken != Broken::RingersFence {
                    fence(Ordering::SeqCst);
                }
                if device.awake.load(Ordering::Relaxed) == 0 {
                    device.doorbell.ring();
                }
                device.doorbell.0.gone();
            })
        })
        .collect();
    device.engine(broken);
    for thread in software {
        thread.join().unwrap();
    }
}

#[test]
fn test_mailbox_when_agent_rings_while_worker_falls_asleep_serves_every_request() {
    check(|| mailbox(Broken::Nothing));
}

#[test]
fn test_mailbox_when_a_part_is_missing_is_found() {
    for broken in [
        Broken::RingersFence,
        Broken::SleepersFence,
        Broken::RelaxedRing,
        Broken::BellAfterTheSlots,
    ] {
        assert!(is_found(move || mailbox(broken)), "part {}", broken as u32);
    }
}

#[test]
fn test_doorbell_when_software_rings_while_engine_falls_asleep_executes_every_command() {
    check(|| device(Broken::Nothing));
}

#[test]
fn test_doorbell_when_a_part_is_missing_is_found() {
    for broken in [
        Broken::RingersFence,
        Broken::SleepersFence,
        Broken::LookBeforeSleep,
        Broken::EmptyAfterTheLook,
    ] {
        assert!(is_found(move || device(broken)), "part {}", broken as u32);
    }
}

/// A command that came with the TGH's ring: one edge for two stores.
#[test]
fn test_doorbell_when_engine_sleeps_after_a_flush_without_a_look_is_found() {
    assert!(is_found(|| device(Broken::LookAfterFlush)));
}
