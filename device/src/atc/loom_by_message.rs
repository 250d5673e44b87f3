//! Accesses by message under the model checker: a flush that waits for a client's answer, and a courier that waits for
//! a call, are woken by whoever makes what they wait for come true. The list of accesses is the code's own; what the GRU
//! does with it (`gru/tgh.rs`, `gru/courier.rs`) is modelled.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::core::{Begun, Core};
use super::defect::Initiator;
use super::loom_tests::{PREEMPTIONS, SPACE, core, entry, explore_to, must_find, page, preload};
use super::slot::Entry;
use super::types::{Access, Checks};

/// In the message of every violation.
const FOR_EVER: &str = "waits for ever";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owing {
    Right,
    /// The courier looks whether a purge has met its access, and gives it back in another step.
    TwoSteps,
    /// The flush is put on the list without a look after that.
    NoLookAfterPut,
}

struct Flush {
    core: Arc<Core>,
    owed: Mutex<Option<Begun>>,
    /// The device's bell: the kernel orders writes and reads of an eventfd.
    rung: Mutex<bool>,
}

impl Flush {
    /// `Hardware::tgh_settles`.
    fn settles(&self) -> bool {
        let owed = self.owed.lock().unwrap();
        owed.as_ref()
            .is_some_and(|begun| !self.core.waits_for_writes(begun))
    }

    /// An engine that was rung: `Hardware::tgh_settle`.
    fn hear(&self) {
        if !std::mem::take(&mut *self.rung.lock().unwrap()) {
            return;
        }
        let mut owed = self.owed.lock().unwrap();
        if let Some(begun) = owed.take_if(|begun| !self.core.waits_for_writes(begun)) {
            self.core.finish(begun);
        }
    }

    /// The thread that has taken a TGH from the client.
    fn execute(&self, how: Owing) {
        let begun = self.core.begin(page(0x1000));
        if !self.core.waits_for_writes(&begun) {
            self.core.finish(begun);
            return;
        }
        *self.owed.lock().unwrap() = Some(begun);
        if how != Owing::NoLookAfterPut && self.settles() {
            *self.rung.lock().unwrap() = true;
        }
    }

    /// The courier, whose write the client has answered.
    fn answered(&self, how: Owing) {
        let purged = if how == Owing::TwoSteps {
            let seen = self.core.asked(0, |asked| asked.purged);
            self.core.give_back(0);
            seen
        } else {
            self.core.give_back(0).expect("still on the list")
        };
        if purged {
            *self.rung.lock().unwrap() = true;
        }
    }
}

fn owed(how: Owing) {
    let core = core(1, 1, Checks::ALL);
    let private = Entry {
        host: 0,
        ..entry(0x1000, 12, 1)
    };
    preload(&core, &private);
    let asked = core.ask(0, SPACE, (0x1000, 8), Access::Write, Initiator::default());
    assert!(asked.expect("an entry").is_some());
    assert!(core.commit(0));
    let flush = Arc::new(Flush {
        core,
        owed: Mutex::new(None),
        rung: Mutex::new(false),
    });
    let spawn = |act: fn(&Flush, Owing)| {
        let flush = Arc::clone(&flush);
        thread::spawn(move || act(&flush, how))
    };
    let client = spawn(Flush::execute);
    let courier = spawn(Flush::answered);
    // An engine that hears the first ring early has looked in vain.
    flush.hear();
    client.join().unwrap();
    courier.join().unwrap();
    flush.hear();
    let left = flush.owed.lock().unwrap().take();
    assert!(left.is_none(), "a flush {FOR_EVER}");
}

#[test]
fn loom_flush_when_its_write_is_answered_meanwhile_completes() {
    explore_to(Some(PREEMPTIONS), || owed(Owing::Right));
}

#[test]
fn loom_flush_when_an_access_is_looked_at_and_given_back_in_two_steps_is_found() {
    must_find(FOR_EVER, || owed(Owing::TwoSteps));
}

#[test]
fn loom_flush_when_nobody_looks_after_it_is_owed_is_found() {
    must_find(FOR_EVER, || owed(Owing::NoLookAfterPut));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Calling {
    Right,
    /// The engine calls before it has left the control block to the couriers.
    CallFirst,
    /// The courier counts the calls that it has heard after its look for work.
    HeardAfterTheLook,
}

/// `Couriers`, with a courier's sleep made visible: loom would end the process if nobody woke it.
#[derive(Default)]
struct State {
    calls: u32,
    asleep: bool,
}

struct Couriers {
    state: Mutex<State>,
    /// Control blocks that ask.
    asking: [AtomicU32; 2],
}

impl Couriers {
    /// An engine leaves a control block to them.
    fn leave(&self, cbr: usize, how: Calling) {
        if how == Calling::CallFirst {
            self.call();
            self.asking[cbr].store(1, Ordering::Release);
        } else {
            self.asking[cbr].store(1, Ordering::Release);
            self.call();
        }
    }

    fn call(&self) {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        state.asleep = false;
    }

    fn deliver(&self) -> bool {
        self.asking
            .iter()
            .fold(false, |worked, cbr| worked | (cbr.swap(0, Ordering::AcqRel) == 1))
    }

    /// `courier::run`, until it sleeps.
    fn run(&self, heard: &mut u32, how: Calling) {
        loop {
            {
                let mut state = self.state.lock().unwrap();
                if state.calls == *heard {
                    state.asleep = true;
                    return;
                }
                *heard = state.calls;
            }
            while self.deliver() {}
            if how == Calling::HeardAfterTheLook {
                *heard = self.state.lock().unwrap().calls;
            }
        }
    }
}

fn couriers(how: Calling) {
    let couriers = Arc::new(Couriers {
        state: Mutex::new(State::default()),
        asking: std::array::from_fn(|_| AtomicU32::new(0)),
    });
    let engines: Vec<_> = (0..2)
        .map(|cbr| {
            let couriers = Arc::clone(&couriers);
            thread::spawn(move || couriers.leave(cbr, how))
        })
        .collect();
    let mut heard = 0;
    couriers.run(&mut heard, how);
    for engine in engines {
        engine.join().unwrap();
    }
    // Whoever was called since goes on.
    if !couriers.state.lock().unwrap().asleep {
        couriers.run(&mut heard, how);
    }
    let left = couriers.asking.iter().any(|cbr| cbr.load(Ordering::Acquire) != 0);
    assert!(!left, "a control block {FOR_EVER}");
}

#[test]
fn loom_courier_when_it_falls_asleep_during_a_call_serves_every_control_block() {
    explore_to(Some(PREEMPTIONS), || couriers(Calling::Right));
}

#[test]
fn loom_courier_when_a_part_is_missing_is_found() {
    must_find(FOR_EVER, || couriers(Calling::CallFirst));
    must_find(FOR_EVER, || couriers(Calling::HeardAfterTheLook));
}
