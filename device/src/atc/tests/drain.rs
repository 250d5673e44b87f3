//! A purge against a running access, made deterministic by a hook that parks the engine.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::*;

/// Parks the first access inside its guard until it is told to go on.
#[derive(Debug)]
struct Park {
    parked: Sender<u64>,
    resume: Mutex<Option<Receiver<()>>>,
    left: AtomicBool,
}

impl Hooks for Park {
    fn translated(&self, _: SpaceId, va: u64, _: Access, _: u64) {
        let resume = self.resume.lock().expect("park").take();
        if let Some(resume) = resume {
            self.parked.send(va).expect("the test listens");
            resume.recv().expect("the test resumes");
            self.left.store(true, Ordering::Relaxed);
        }
    }
}

fn parking(atc: &Atc) -> (Arc<Park>, Receiver<u64>, Sender<()>) {
    let (parked, is_parked) = channel();
    let (go, resume) = channel();
    let park = Arc::new(Park {
        parked,
        resume: Mutex::new(Some(resume)),
        left: AtomicBool::new(false),
    });
    let hooks: Arc<dyn Hooks> = Arc::<Park>::clone(&park);
    atc.set_hooks(Arc::clone(&hooks)).expect("first");
    assert_eq!(atc.set_hooks(hooks), Err(HooksAlreadySet));
    (park, is_parked, go)
}

#[test]
fn test_s2_purge_when_an_engine_is_parked_in_a_guard_returns_after_it_left() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    enter(&atc, fill_at(0x5000, 0, 12));
    let (park, parked, go) = parking(&atc);
    let worker = {
        let atc = Arc::clone(&atc);
        thread::spawn(move || {
            let mut engine = atc.engine().expect("engine");
            assert!(hits(&mut engine, 0x5000));
            // Cleared before the drain, so there is nothing to find however often it looks.
            assert!(!hits(&mut engine, 0x5000));
        })
    };
    assert_eq!(parked.recv(), Ok(0x5000));
    let token = atc.purge_begin(range(0x5000, 0x6000));
    assert_eq!(token.report().entries, 1);
    let finisher = {
        let (atc, park) = (Arc::clone(&atc), Arc::clone(&park));
        thread::spawn(move || {
            let report = atc.purge_finish(token);
            assert!(park.left.load(Ordering::Relaxed), "returned while the access ran");
            report
        })
    };
    // Until it waits for the parked engine. (Finished instead: the drain does not wait.)
    while atc.stats().drain_waits == 0 && !finisher.is_finished() {
        thread::yield_now();
    }
    assert_eq!(
        atc.stats().active_purges,
        1,
        "the purge is in progress until the access ends"
    );
    go.send(()).expect("parked");
    assert_eq!(finisher.join().expect("finisher").waited_for, 1);
    worker.join().expect("worker");
}

#[test]
fn test_s2_purge_when_the_drain_is_off_returns_during_the_access() {
    // The fault that `--break drain` injects has to exist.
    let atc = atc_over(
        1 << 16,
        with_checks(Checks {
            drain: false,
            ..Checks::ALL
        }),
    );
    enter(&atc, fill_at(0x5000, 0, 12));
    let (park, parked, go) = parking(&atc);
    let worker = {
        let atc = Arc::clone(&atc);
        thread::spawn(move || assert!(hits(&mut atc.engine().expect("engine"), 0x5000)))
    };
    parked.recv().expect("parked");
    assert_eq!(atc.purge(range(0x5000, 0x6000)).entries, 1);
    assert!(!park.left.load(Ordering::Relaxed));
    go.send(()).expect("parked");
    worker.join().expect("worker");
}

#[test]
fn test_hooks_when_a_purge_runs_see_its_halves() {
    #[derive(Debug, Default)]
    struct Seen(Mutex<Vec<String>>);
    impl Hooks for Seen {
        fn purge_begun(&self, what: &Purge) {
            self.0.lock().expect("seen").push(format!("begun {what:?}"));
        }
        fn purge_finished(&self, what: &Purge, report: &PurgeReport) {
            self.0
                .lock()
                .expect("seen")
                .push(format!("finished {what:?} {}", report.entries));
        }
    }
    let atc = atc_over(1 << 16, AtcConfig::default());
    let seen = Arc::new(Seen::default());
    atc.set_hooks(Arc::<Seen>::clone(&seen)).expect("first");
    enter(&atc, fill_at(0x5000, 0, 12));
    atc.purge(Purge::All);
    assert_eq!(*seen.0.lock().expect("seen"), ["begun All", "finished All 1"]);
}

/// What a thread that holds a guard must not do.
fn with_a_guard(act: impl FnOnce(&Atc)) {
    let atc = atc_over(1 << 16, AtcConfig::default());
    enter(&atc, fill_at(0x5000, 0, 12));
    let mut engine = atc.engine().expect("engine");
    let _guard = engine.access(ASID, 0x5000, 8, Access::Read).expect("hit");
    act(&atc);
}

#[test]
#[should_panic(expected = "a purge was started while this thread holds 1 ATC guard")]
fn test_purge_when_this_thread_holds_a_guard_is_refused() {
    with_a_guard(|atc| {
        atc.purge(Purge::All);
    });
}

#[test]
#[should_panic(expected = "a miss was opened while this thread holds 1 ATC guard")]
fn test_open_miss_when_this_thread_holds_a_guard_is_refused() {
    with_a_guard(|atc| atc.open_miss(0, ASID, 0));
}

#[test]
#[should_panic(expected = "a fill was executed while this thread holds 1 ATC guard")]
fn test_fill_when_this_thread_holds_a_guard_is_refused() {
    with_a_guard(|atc| {
        let _ = atc.fill(0, fill_at(0, 0, 12));
    });
}

#[test]
fn test_unmap_when_an_engine_reads_the_mapping_waits_for_it() {
    // Were the memory unmapped too early the reader would die of SIGSEGV.
    let dma = Space::new();
    let atc = Atc::new(AtcConfig::default(), Arc::clone(&dma));
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (atc, stop) = (Arc::clone(&atc), Arc::clone(&stop));
        thread::spawn(move || {
            let mut engine = atc.engine().expect("engine");
            let mut page = vec![0; 4096];
            let mut found = 0u64;
            while !stop.load(Ordering::Relaxed) {
                match engine.access(ASID, 0x5000, 4096, Access::Read) {
                    Ok(guard) => {
                        guard.read_into(&mut page);
                        found += 1;
                    }
                    Err(miss) => {
                        assert_eq!(miss, Miss::NoEntry);
                        atc.open_miss(1, ASID, 0x5000);
                        // Refused while it is unmapped, accepted otherwise.
                        let _ = atc.fill(1, fill_at(0x5000, 0, 12));
                        atc.close_miss(1);
                    }
                }
            }
            found
        })
    };
    for _ in 0..300 {
        let fills = atc.stats().fills;
        dma.map(0, 0x1000, memfd(0x1000), 0, Prot::READ_WRITE)
            .expect("map");
        while atc.stats().fills == fills {
            thread::yield_now();
        }
        dma.unmap(0, 0x1000).expect("unmap");
        assert_eq!(atc.stats().live_entries, 0);
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().expect("reader");
}
