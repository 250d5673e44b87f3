//! Three ways to notice a store: what software sees of the mode, and what a ring does.

use super::*;
use protos::gru::cb::XType;
use protos::gru::doorbell;

const VA: u64 = 0x7000_0000;

/// `awake` and mode as the kernel side reads them.
fn status(rig: &Rig) -> (u32, u32) {
    let mut page = [0; 0x20];
    rig.gru
        .bar_read(pci::BAR_DOORBELL, pci::STATUS_OFFSET, &mut page)
        .unwrap();
    let word = |at: u64| u32::from_le_bytes(page[at as usize..][..4].try_into().unwrap());
    (word(pci::STATUS_AWAKE), word(pci::STATUS_MODE))
}

/// The same as the user of context 0 reads them.
fn gseg_status(rig: &Rig) -> (u32, u32) {
    let word = rig.load(map::GSEG_STATUS);
    (word as u32, (word >> 32) as u32)
}

fn all_asleep(rig: &Rig) {
    rig.until("sleep", || (rig.gru.stats().engines_asleep == 2).then_some(()));
}

fn ring_gseg(rig: &Rig, len: usize) {
    rig.gru
        .bar_write(pci::BAR_CHIPLETS, map::GSEG_BELL + 0xff8, &[0; 8][..len])
        .unwrap();
}

fn ring_bar0(rig: &Rig, len: usize) {
    rig.gru
        .bar_write(pci::BAR_DOORBELL, pci::DOORBELL_OFFSET + 0x40, &[0; 8][..len])
        .unwrap();
}

fn ring_eventfd(rig: &Rig, _len: usize) {
    let bells = rig.gru.io_eventfds(pci::BAR_DOORBELL);
    rustix::io::write(&bells[0].fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn test_start_when_mode_is_bell_waits_for_a_ring_of_any_kind() {
    let rig = Rig::new(GruConfig {
        spin: Some(Duration::from_secs(3600)),
        ..config(Doorbell::Bell)
    });
    rig.start(Mode::FaultMap);
    let mut executed = 0;
    for ring in [ring_gseg, ring_bar0, ring_eventfd] {
        for len in [1, 2, 4, 8] {
            // Whatever `spin` says: nothing polls. (Somebody may still be on the way from an earlier ring.)
            let quiet = (0..100).any(|_| {
                all_asleep(&rig);
                let parks = rig.gru.stats().parks;
                rig.store(0, Instruction::nop().control.into_bits());
                rig.store(256, Instruction::nop().control.into_bits());
                std::thread::sleep(Duration::from_millis(20));
                let quiet = rig.gru.stats().parks == parks;
                if quiet {
                    assert_eq!(rig.gru.stats().instructions, executed);
                }
                // One ring stands for both.
                ring(&rig, len);
                executed += 2;
                rig.until("both", || {
                    (rig.gru.stats().instructions == executed).then_some(())
                });
                assert_eq!(
                    (rig.ended(0), rig.ended(1)),
                    (Some(Status::IDLE), Some(Status::IDLE))
                );
                quiet
            });
            assert!(quiet, "engines wake up without a ring");
        }
    }
}

#[test]
fn test_awake_when_mode_is_bell_or_trap_never_changes() {
    for (doorbell, mode, awake) in [
        (Doorbell::Trap, doorbell::Mode::TRAP, 1),
        (Doorbell::Bell, doorbell::Mode::BELL, 0),
    ] {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        for round in 0..200 {
            rig.issue(0, Instruction::vset(VA, round, XType::DWORD, 512, 1));
            let expected = (awake, u32::from(mode.0));
            rig.until("the end", || {
                rig.serve();
                assert_eq!((status(&rig), gseg_status(&rig)), (expected, expected));
                rig.ended(0)
            });
        }
    }
}

/// What our own driver, and a guest's, do in poll mode, with the copy in the GSEG.
#[test]
fn test_awake_when_mode_is_poll_tells_a_user_when_to_ring() {
    let rig = Rig::new(config(Doorbell::Poll));
    rig.start(Mode::FaultMap);
    let mut rung = 0;
    for round in 0..2000u64 {
        rig.store(0, Instruction::nop().control.into_bits());
        fence(Ordering::SeqCst);
        let (awake, mode) = gseg_status(&rig);
        assert_eq!(mode, u32::from(doorbell::Mode::POLL.0));
        if awake == 0 {
            rung += 1;
            ring_gseg(&rig, 4);
        }
        rig.until("a NOP", || rig.ended(0));
        if round % 100 == 0 {
            all_asleep(&rig);
            assert_eq!((status(&rig).0, gseg_status(&rig).0), (0, 0));
        }
    }
    assert!(
        rung >= 20,
        "asleep at least each time that the test saw it: {rung}"
    );
}

#[test]
fn test_gseg_status_when_its_user_spoiled_it_is_right_for_the_next_one() {
    let rig = Rig::new(config(Doorbell::Poll));
    rig.start(Mode::FaultMap);
    all_asleep(&rig);
    rig.store(map::GSEG_STATUS, u64::MAX);
    rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
    rig.cch_do(0, cch::Opc::DEALLOCATE).unwrap();
    rig.start(Mode::FaultMap);
    rig.until("what the device says", || {
        (gseg_status(&rig) == (0, u32::from(doorbell::Mode::POLL.0))).then_some(())
    });
    // A reset clears all of BAR2.
    rig.store(map::GSEG_STATUS, u64::MAX);
    rig.gru.reset();
    all_asleep(&rig);
    rig.until("what the device says", || {
        (gseg_status(&rig) == (0, u32::from(doorbell::Mode::POLL.0))).then_some(())
    });
    assert_eq!(status(&rig), (0, u32::from(doorbell::Mode::POLL.0)));
}

#[test]
fn test_gseg_bell_when_context_is_not_allocated_does_not_exist() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        let read = |offset| {
            let mut bytes = [0; 4];
            rig.gru.bar_read(pci::BAR_CHIPLETS, offset, &mut bytes).unwrap();
            u32::from_le_bytes(bytes)
        };
        all_asleep(&rig);
        let parks = rig.gru.stats().parks;
        ring_gseg(&rig, 8);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(rig.gru.stats().parks, parks);
        assert_eq!(read(map::GSEG_BELL), u32::MAX);
        rig.start(Mode::FaultMap);
        assert_eq!(read(map::GSEG_BELL), 0);
        assert_eq!(read(map::GSEG_BELL - 4), u32::MAX);
        assert_eq!(read(map::GSEG_PAGE), u32::MAX);
        // Trapped or not, the status page takes nothing from a message.
        let mode = read(map::GSEG_STATUS + map::GSEG_STATUS_MODE);
        rig.trap_store(map::GSEG_STATUS, u64::MAX);
        assert_eq!(read(map::GSEG_STATUS + map::GSEG_STATUS_MODE), mode);
    });
}
