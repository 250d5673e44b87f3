//! Couriers: threads that wait for the client, so that engines never do.
//!
//! Memory that came without a file is reached by asking the client (DMA_READ, DMA_WRITE), which answers when it likes.
//! An engine that meets such memory leaves the control block to a courier ([`Phase::Asking`]) and goes on: flush
//! handles, fills and all other instructions are served meanwhile, however silent the client is. A courier runs the
//! instruction's steps as an engine does, and waits where it has to; while it waits it holds that CBR, and it is in no
//! ATC access. Purges, INTERRUPT and resets take the wish away and wake it
//! ([`Space::recheck_messages`](crate::dma::Space)).
//!
//! There are few of them, as they wait for one and the same client.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::cch::physical_cbrs;
use super::chiplet::{Chiplet, Context, Inside, Phase, bits};
use super::engine::{Bench, Vital};
use super::hardware::Hardware;

/// Requests that the client can have at the same time.
pub(super) const COURIERS: usize = 2;

/// How couriers hear that there is work.
#[derive(Debug, Default)]
pub(super) struct Couriers {
    /// Leaf lock.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: u64,
    stop: bool,
}

impl Couriers {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread dies while it calls couriers")
    }

    /// A CBR asks, and its lock is free.
    pub(super) fn call(&self) {
        self.lock().calls += 1;
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    /// Waits for a call that has not been `heard`. False: stop.
    fn wait(&self, heard: &mut u64) -> bool {
        let mut state = self.lock();
        while state.calls == *heard && !state.stop {
            state = self
                .changed
                .wait(state)
                .expect("no thread dies while it calls couriers");
        }
        *heard = state.calls;
        !state.stop
    }
}

thread_local! {
    /// This thread is a courier.
    static COURIER: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is a courier: it does not count as awake, so it has nothing to hand over when it is held
/// up.
pub(super) fn is_caller() -> bool {
    COURIER.get()
}

/// Body of a courier's thread.
pub(super) fn run(hardware: &Arc<Hardware>, mut bench: Bench) {
    let _vital = Vital;
    COURIER.set(true);
    let mut heard = 0;
    while hardware.couriers.wait(&mut heard) {
        while hardware.deliver(&mut bench) {}
    }
}

/// A courier inside a context. It does not count as awake, so an INTERRUPT that has met it waits for being told that it
/// has left: an engine would look again by itself.
#[derive(Debug)]
pub(super) struct Visit<'a> {
    inside: Option<Inside<'a>>,
    context: &'a Context,
    hardware: &'a Hardware,
}

impl<'a> Deref for Visit<'a> {
    type Target = Inside<'a>;
    fn deref(&self) -> &Inside<'a> {
        self.inside.as_ref().expect("inside until dropped")
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.inside = None;
        fence(Ordering::SeqCst);
        if !self.context.is_open() {
            self.hardware.ring();
        }
    }
}

impl Hardware {
    /// Enters a context for a courier, or not if it is stopped.
    pub(super) fn visit<'a>(&'a self, context: &'a Context) -> Option<Visit<'a>> {
        // Also who is refused was inside for a moment, and leaves by `Visit`.
        let visit = Visit {
            inside: context.enter(),
            context,
            hardware: self,
        };
        visit.inside.is_some().then_some(visit)
    }

    /// One step for every CBR that asks. Returns whether there was one.
    fn deliver(&self, bench: &mut Bench) -> bool {
        let _working = self
            .quiesce
            .read()
            .expect("no thread dies while it resets the device");
        let mut worked = false;
        for chiplet in &self.chiplets {
            for number in bits(u64::from(chiplet.active.load(Ordering::Acquire))) {
                worked |= self.deliver_to(chiplet, number, bench);
            }
        }
        worked
    }

    fn deliver_to(&self, chiplet: &Chiplet, number: usize, bench: &mut Bench) -> bool {
        let context = &chiplet.contexts[number];
        let mut worked = false;
        for (logical, cbr) in physical_cbrs(context).enumerate() {
            let resource = &chiplet.cbrs[cbr];
            // Entered for each anew: an INTERRUPT waits for one step at most.
            let Some(inside) = self.visit(context) else {
                break;
            };
            if inside.must_leave() || self.pausing.load(Ordering::SeqCst) {
                break;
            }
            // The other courier is at it, and looks again by itself.
            if resource.phase() != Phase::Asking || resource.courier.swap(true, Ordering::Acquire) {
                continue;
            }
            {
                // Whoever else has it gives it back in a moment: only couriers wait with it.
                let mut held = resource
                    .state
                    .lock()
                    .expect("an engine died inside an instruction");
                if resource.phase() == Phase::Asking {
                    let owner = (number, logical);
                    self.step_held(chiplet, (context, &inside), owner, (cbr, &mut held), bench);
                    worked = true;
                }
            }
            resource.courier.store(false, Ordering::Release);
            drop(inside);
            // An engine goes on with it, or finishes the command that waited for it.
            self.ring();
        }
        worked
    }
}
