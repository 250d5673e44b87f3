//! Every interleaving of a covered call and fills, by loom, over the code that the daemon runs.
//!
//! The agent's side is modelled; the fill's side is `host::mm::announce_fill` itself. A model device with a kill
//! bit stands behind it. What is checked is the rule itself: once the call has returned, the device holds no old
//! translation. Each part of the protocol that is taken away must be *found*.

use std::panic::{AssertUnwindSafe, catch_unwind};

use host::mm::{AgentWords, Fence, FullFence, Word, announce_call, announce_fill};
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::sync::{Arc, Mutex};

struct W(AtomicU32);
struct G(AtomicU64);

impl Word for W {
    fn read(&self) -> u64 {
        u64::from(self.0.load(Ordering::Relaxed))
    }
    fn add(&self, n: u32) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    fn sub(&self, n: u32) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }
}

impl Word for G {
    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn add(&self, n: u32) {
        self.0.fetch_add(u64::from(n), Ordering::Relaxed);
    }
    fn sub(&self, n: u32) {
        self.0.fetch_sub(u64::from(n), Ordering::Relaxed);
    }
}

struct LoomFence;
impl Fence for LoomFence {
    fn full() {
        fence(Ordering::SeqCst);
    }
}

struct NoFence;
impl Fence for NoFence {
    fn full() {}
}

/// In the message of every violation.
const STALE: &str = "stale translation";

const OLD: u32 = 1;
const NEW: u32 = 2;

#[derive(Default)]
struct Device {
    killed: bool,
    entry: Option<u32>,
}

struct World {
    in_progress: W,
    all_in_progress: W,
    generation: G,
    cached: W,
    must_hop: W,
    /// The page table: what the look-up finds.
    page: AtomicU32,
    /// The device serialises purges and fills itself; its own race is checked in the device's crate.
    device: Mutex<Device>,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            in_progress: W(AtomicU32::new(0)),
            all_in_progress: W(AtomicU32::new(0)),
            generation: G(AtomicU64::new(0)),
            cached: W(AtomicU32::new(0)),
            must_hop: W(AtomicU32::new(0)),
            page: AtomicU32::new(OLD),
            device: Mutex::new(Device::default()),
        })
    }

    fn busy(&self) -> bool {
        self.in_progress.read() != 0 || self.all_in_progress.read() != 0
    }

    /// A covered call, from before its start until it has returned.
    fn call<F: Fence>(&self) {
        let hop = announce_call::<_, _, F>(&AgentWords {
            in_progress: &self.in_progress,
            generation: &self.generation,
            cached: &self.cached,
            must_hop: &self.must_hop,
        });
        if hop {
            let mut device = self.device.lock().unwrap();
            device.killed = true;
            device.entry = None;
        }
        self.page.store(NEW, Ordering::Relaxed);
        // Stands for the kernel's own ordering: the system call is over before the word is lowered.
        fence(Ordering::SeqCst);
        self.in_progress.sub(1);
    }

    fn look_up(&self) -> u32 {
        self.page.load(Ordering::Relaxed)
    }

    fn install(&self, page: u32, heed_kill: bool) {
        let mut device = self.device.lock().unwrap();
        if !(heed_kill && device.killed) {
            device.entry = Some(page);
        }
    }

    /// The daemon's fill. The device's ticket is open from the start of the model on.
    fn fill<F: Fence>(&self, heed_kill: bool) {
        let permit = announce_fill::<_, F>(|| self.cached.add(1), || self.busy(), &self.generation);
        if permit.is_some() {
            self.install(self.look_up(), heed_kill);
        }
    }

    fn assert_no_stale_entry(&self) {
        assert_ne!(self.device.lock().unwrap().entry, Some(OLD), "{STALE}");
    }
}

/// One call against one fill.
fn race(call: fn(&World), fill: fn(&World)) {
    loom::model(move || {
        let world = World::new();
        let filler = {
            let world = world.clone();
            loom::thread::spawn(move || fill(&world))
        };
        call(&world);
        filler.join().unwrap();
        world.assert_no_stale_entry();
    });
}

/// Whether the model checker finds a stale translation (and not, say, its own limits).
fn is_found(model: impl FnOnce()) -> bool {
    let Err(panic) = catch_unwind(AssertUnwindSafe(model)) else {
        return false;
    };
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or_default();
    assert!(text.contains(STALE), "found something else: {text}");
    true
}

#[test]
fn test_s1_dekker_when_protocol_is_whole_leaves_no_stale_entry() {
    race(|w| w.call::<LoomFence>(), |w| w.fill::<LoomFence>(true));
}

#[test]
fn test_s1_dekker_when_a_fence_is_missing_is_found() {
    assert!(is_found(|| race(
        |w| w.call::<NoFence>(),
        |w| w.fill::<LoomFence>(true)
    )));
    assert!(is_found(|| race(
        |w| w.call::<LoomFence>(),
        |w| w.fill::<NoFence>(true)
    )));
}

#[test]
fn test_s1_dekker_when_fill_asks_before_it_announces_is_found() {
    fn swapped(w: &World) {
        if w.busy() {
            return;
        }
        LoomFence::full();
        w.cached.add(1);
        LoomFence::full();
        w.install(w.look_up(), true);
    }
    assert!(is_found(|| race(|w| w.call::<LoomFence>(), swapped)));
}

#[test]
fn test_s1_dekker_when_call_reads_the_count_before_it_announces_is_found() {
    fn swapped(w: &World) {
        let hop = w.cached.read() != 0;
        LoomFence::full();
        w.in_progress.add(1);
        w.generation.add(1);
        if hop {
            let mut device = w.device.lock().unwrap();
            device.killed = true;
            device.entry = None;
        }
        w.page.store(NEW, Ordering::Relaxed);
        LoomFence::full();
        w.in_progress.sub(1);
    }
    assert!(is_found(|| race(swapped, |w| w.fill::<LoomFence>(true))));
}

#[test]
fn test_s2_dekker_when_device_ignores_the_kill_is_found() {
    assert!(is_found(|| race(
        |w| w.call::<LoomFence>(),
        |w| w.fill::<LoomFence>(false)
    )));
}

/// Two fills of one page: the second relies on the first's count (as `FillTable` does when the bit is set).
///
/// Three threads: the interleavings are bounded to three preemptions, and the generation (which this is not
/// about) is each thread's own.
fn two_fills(count_first: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let world = World::new();
        let bits = Arc::new(AtomicU32::new(0));
        let fillers: Vec<_> = (0..2)
            .map(|_| {
                let (world, bits) = (world.clone(), bits.clone());
                loom::thread::spawn(move || {
                    let permit = announce_fill::<_, LoomFence>(
                        || {
                            if count_first {
                                world.cached.add(1);
                                if bits.fetch_or(1, Ordering::AcqRel) != 0 {
                                    world.cached.sub(1);
                                }
                            } else if bits.fetch_or(1, Ordering::AcqRel) == 0 {
                                world.cached.add(1);
                            }
                        },
                        || world.in_progress.read() != 0,
                        &std::sync::atomic::AtomicU64::new(0),
                    );
                    if permit.is_some() {
                        world.install(world.look_up(), true);
                    }
                })
            })
            .collect();
        world.call::<LoomFence>();
        for filler in fillers {
            filler.join().unwrap();
        }
        world.assert_no_stale_entry();
    });
}

#[test]
fn test_s1_two_fills_when_count_comes_before_the_bit_leave_no_stale_entry() {
    two_fills(true);
}

#[test]
fn test_s1_two_fills_when_bit_comes_before_the_count_is_found() {
    assert!(is_found(|| two_fills(false)));
}

/// What is remembered under a generation (`MmCache`) and used by a later fill that reads the same one.
fn remembered(begin: fn(&World) -> Option<u64>) {
    loom::model(move || {
        let world = World::new();
        let filler = {
            let world = world.clone();
            loom::thread::spawn(move || begin(&world).map(|generation| (generation, world.look_up())))
        };
        world.call::<LoomFence>();
        // The call has returned; a second fill begins.
        let now = begin(&world).expect("nothing is in progress");
        if let Some((generation, page)) = filler.join().unwrap()
            && generation == now
        {
            assert_eq!(page, NEW, "{STALE}: a remembered look-up hides the change");
        }
    });
}

#[test]
fn test_cache_when_generation_is_read_first_never_hides_a_change() {
    remembered(|w| announce_fill::<_, LoomFence>(|| w.cached.add(1), || w.busy(), &w.generation));
}

#[test]
fn test_cache_when_generation_is_read_after_the_check_is_found() {
    fn late(w: &World) -> Option<u64> {
        w.cached.add(1);
        LoomFence::full();
        if w.busy() {
            return None;
        }
        LoomFence::full();
        Some(w.generation.read())
    }
    assert!(is_found(|| remembered(late)));
}

#[test]
fn test_words_when_real_atomics_are_used_behave_alike() {
    // The same functions over the types of the shared table.
    let (in_progress, cached, must_hop) = <(std::sync::atomic::AtomicU32, _, _)>::default();
    let generation = std::sync::atomic::AtomicU64::new(5);
    let words = AgentWords {
        in_progress: &in_progress,
        generation: &generation,
        cached: &cached,
        must_hop: &must_hop,
    };
    assert!(!announce_call::<_, _, FullFence>(&words));
    assert_eq!(
        announce_fill::<_, FullFence>(|| cached.add(1), || in_progress.read() != 0, &generation),
        None
    );
    assert!(announce_call::<_, _, FullFence>(&words));
    in_progress.sub(2);
    assert_eq!(
        announce_fill::<_, FullFence>(|| cached.add(1), || in_progress.read() != 0, &generation),
        Some(7)
    );
}
