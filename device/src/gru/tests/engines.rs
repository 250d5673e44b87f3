//! Engine threads: idle cost, waking, resets, the end.

use super::*;
use protos::gru::cb::XType;

const VA: u64 = 0x7000_0000;

#[test]
fn test_engines_when_nothing_happens_cost_nothing() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(GruConfig {
            doorbell,
            ..GruConfig::default()
        });
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        rig.run_ok(0, Instruction::vload(VA, 0, XType::DWORD, 1, 1));
        // An instruction that waits for its miss is no work either.
        rig.issue(1, Instruction::vload(VA + 8 * PAGE, 0, XType::DWORD, 1, 1));
        rig.wait_fault(0, 3);
        rig.until("sleep", || (rig.gru.stats().engines_asleep == 2).then_some(()));
        let parks = rig.gru.stats().parks;
        let cpu = rig.engine_cpu();
        std::thread::sleep(Duration::from_secs(2));
        let used = rig.engine_cpu() - cpu;
        assert!(used < Duration::from_millis(40), "engines used {used:?} of 2 s");
        assert_eq!(rig.gru.stats().parks, parks, "nobody woke up");
    });
}

#[test]
fn test_ring_when_engines_sleep_wakes_one_every_time() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        for round in 0..3000 {
            rig.issue(round % 4, Instruction::nop());
            rig.until("a NOP", || rig.ended(round % 4));
        }
        assert_eq!(rig.gru.stats().instructions, 3000);
    });
}

#[test]
fn test_ioeventfd_when_written_stands_for_the_doorbell_page() {
    let rig = Rig::new(config(Doorbell::Poll));
    rig.start(Mode::FaultMap);
    let bells = rig.gru.io_eventfds(pci::BAR_DOORBELL);
    assert_eq!((bells.len(), bells[0].offset), (1, 0));
    assert!(rig.gru.io_eventfds(pci::BAR_CHIPLETS).is_empty());
    let awake = || {
        rig.gru
            .hardware
            .wake
            .status()
            .word32(pci::STATUS_OFFSET)
            .load(Ordering::SeqCst)
    };
    for _ in 0..50 {
        rig.until("sleep", || (awake() == 0).then_some(()));
        rig.store(0, Instruction::nop().control.into_bits());
        fence(Ordering::SeqCst);
        rustix::io::write(&bells[0].fd, &1u64.to_ne_bytes()).unwrap();
        rig.until("a NOP", || rig.ended(0));
    }
}

#[test]
fn test_reset_when_work_is_running_leaves_nothing_behind() {
    in_all_modes(|doorbell| {
        for round in 0..20u64 {
            let rig = Rig::new(config(doorbell));
            rig.start(Mode::FaultMap);
            rig.map_range(ASID, VA, 0, 1 << 20);
            rig.issue(0, Instruction::vset(VA, !0, XType::DWORD, 1 << 17, 1));
            rig.issue(1, Instruction::vload(VA + (1 << 30), 0, XType::DWORD, 1, 1));
            (0..round * 3).for_each(|_| rig.serve_those_with_pages());
            let begun = Instant::now();
            rig.gru.reset();
            assert!(begun.elapsed() < Duration::from_secs(1));
            assert_eq!(rig.gru.stats().resets, 1);
            // Nothing is cached, nothing is running, registers are zero.
            let before = rig.bytes(0, 1 << 20);
            assert_eq!(rig.gru.stats().tlb[0].live_entries, 0);
            assert_eq!(rig.cch(0).into_bits(), 0);
            assert_eq!(rig.load(map::TFM), 0);
            assert_eq!(rig.load(Rig::tfh_at(2)), 0);
            if doorbell == Doorbell::Trap {
                assert_eq!(rig.load(0), u64::MAX, "the GSEG is gone");
            }
            // And the device works as after power-on.
            rig.start(Mode::FaultMap);
            rig.run_ok(2, Instruction::nop());
            assert!(
                rig.bytes(0, 1 << 20) == before,
                "nothing was stored after the reset"
            );
            rig.run_ok(0, Instruction::vset(VA, 5, XType::DWORD, 1, 1));
            assert_eq!(rig.word(0), 5);
        }
    });
}

#[test]
fn test_stop_when_work_is_running_is_prompt() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 1 << 20);
    rig.issue(0, Instruction::vset(VA, 1, XType::DWORD, 1 << 17, 1));
    rig.serve_those_with_pages();
    let hardware = Arc::downgrade(&rig.gru.hardware);
    let begun = Instant::now();
    drop(rig);
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(hardware.upgrade().is_none(), "no thread is left");
}

#[test]
fn test_new_when_configuration_is_impossible_is_refused() {
    let context = || ModelContext {
        dma: Space::new(),
        interrupts: Interrupts::new(pci::VECTORS),
    };
    for engines in [0, 17] {
        let error = Gru::new(
            context(),
            GruConfig {
                engines,
                ..GruConfig::default()
            },
        )
        .unwrap_err();
        assert!(matches!(error, super::super::GruError::Engines(n) if n == engines));
    }
    let faults = "drain-delay".parse().unwrap();
    let error = Gru::new(
        context(),
        GruConfig {
            engines: 1,
            faults,
            ..GruConfig::default()
        },
    )
    .unwrap_err();
    assert!(error.to_string().contains("at least 2"), "{error}");
}

#[test]
fn test_dump_when_a_miss_waits_shows_it() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, PAGE);
    rig.run_ok(0, Instruction::vload(VA, 0, XType::DWORD, 1, 1));
    rig.issue(1, Instruction::vload(0x5000, 0, XType::DWORD, 1, 1));
    rig.wait_fault(0, 3);
    let dump = rig.gru.dump();
    assert_eq!(dump["chiplets"][0]["contexts"][0]["state"], "ACTIVE");
    assert_eq!(dump["chiplets"][0]["misses"][0]["va"], 0x5000);
    assert_eq!(dump["chiplets"][0]["tlb_entries"][0]["va"], VA);
    assert_eq!(dump["stats"]["misses"], 2);
    assert_eq!(rig.interrupts.counters().0, 2);
}
