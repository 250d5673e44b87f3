//! What only trapped accesses show.

use super::*;
use protos::gru::cb::XType;

fn read(rig: &Rig, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rig.gru.bar_read(pci::BAR_CHIPLETS, offset, &mut bytes).unwrap();
    bytes
}

fn write(rig: &Rig, offset: u64, bytes: &[u8]) {
    rig.gru.bar_write(pci::BAR_CHIPLETS, offset, bytes).unwrap();
}

#[test]
fn test_gseg_when_context_is_not_allocated_reads_ones_and_ignores_writes() {
    let rig = Rig::new(config(Doorbell::Trap));
    assert_eq!(read(&rig, 0, 16), [0xff; 16]);
    write(&rig, map::GSEG_DS, &[1; 8]);
    rig.start(Mode::FaultMap);
    assert_eq!(read(&rig, map::GSEG_DS, 8), [0; 8]);
    // 4 control blocks and 8 KiB: what is beyond does not exist.
    assert_eq!(read(&rig, Rig::cb_at(3), 8), [0; 8]);
    assert_eq!(read(&rig, Rig::cb_at(4), 8), [0xff; 8]);
    assert_eq!(
        read(&rig, map::GSEG_DS + 8184, 16),
        [vec![0; 8], vec![0xff; 8]].concat()
    );
    assert_eq!(read(&rig, map::GSEG_STRIDE, 8), [0xff; 8]);
    rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
    rig.cch_do(0, cch::Opc::DEALLOCATE).unwrap();
    assert_eq!(read(&rig, 0, 8), [0xff; 8]);
}

#[test]
fn test_access_when_outside_of_every_bar_is_an_error() {
    let rig = Rig::new(config(Doorbell::Trap));
    let mut bytes = [0; 8];
    for (bar, offset) in [
        (1, 0),
        (2, pci::BAR_CHIPLETS_SIZE - 4),
        (2, u64::MAX - 3),
        (0, pci::BAR_DOORBELL_SIZE),
    ] {
        assert_eq!(
            rig.gru.bar_read(bar, offset, &mut bytes),
            Err(crate::model::AccessError::Unassigned { bar, offset, len: 8 })
        );
        assert!(rig.gru.bar_write(bar, offset, &bytes).is_err());
    }
    // Holes between the handle regions.
    assert_eq!(read(&rig, map::TFM + 16 * 256, 8), [0xff; 8]);
    assert_eq!(read(&rig, map::TGH + 24 * 256, 8), [0xff; 8]);
    assert_eq!(read(&rig, map::MCS_END, 8), [0xff; 8]);
    write(&rig, map::MCS_END, &[1; 8]);
}

#[test]
fn test_store_when_it_comes_in_pieces_starts_only_with_byte_zero() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let word = Instruction::nop().control.into_bits().to_le_bytes();
    write(&rig, 1, &word[1..2]);
    write(&rig, 2, &word[2..4]);
    write(&rig, 4, &word[4..8]);
    rig.purge(0, 0, 0, 1);
    assert_eq!(rig.gru.stats().instructions, 0);
    assert_eq!(rig.istatus(0), Status::ACTIVE, "software's own store");
    // A 32-bit start without istatus, as in 2008.
    write(&rig, 4, &[0; 4]);
    assert_eq!(rig.istatus(0), Status::IDLE);
    write(&rig, 0, &word[..4]);
    rig.until("the instruction", || {
        (rig.gru.stats().instructions == 1).then_some(())
    });
    assert_eq!(rig.finish(0), Status::IDLE);
}

#[test]
fn test_data_segment_when_written_in_odd_pieces_keeps_every_byte() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let bytes: Vec<u8> = (0..100).collect();
    for piece in bytes.chunks(7).enumerate() {
        write(&rig, map::GSEG_DS + 3 + 7 * piece.0 as u64, piece.1);
    }
    assert_eq!(read(&rig, map::GSEG_DS + 3, 100), bytes);
    assert_eq!(read(&rig, map::GSEG_DS, 3), [0; 3]);
}

/// The kernel driver starts a TFH by OR: EXCEPTION | ACTIVE is 3 in plain memory (17.1). A trap makes it
/// ACTIVE, so software waits for the answer.
#[test]
fn test_tfh_when_started_by_or_shows_active_until_answered() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.issue(0, Instruction::vload(0x5000, 0, XType::DWORD, 1, 1));
    rig.wait_fault(0, 2);
    rig.fill_operands(
        2,
        ASID,
        0x9000,
        Pte {
            offset: 0,
            writable: true,
            shift: 12,
            tag: 0,
        },
    );
    let control = rig.tfh(2).with_opc(tfh::Opc::WRITE_ONLY).into_bits() | 0x2_0001;
    assert_eq!(tfh::Control::from_bits(control).status(), HandleStatus(3));
    rig.store(Rig::tfh_at(2), control);
    assert_eq!(rig.tfh_wait(2), HandleStatus::IDLE);
    assert_eq!(
        rig.gru.stats().fills,
        1,
        "status left ACTIVE only when the fill was done"
    );
}

#[test]
fn test_tfm_when_bits_arrive_between_read_and_write_keeps_them() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.issue(0, Instruction::vload(0x5000, 0, XType::DWORD, 1, 1));
    let at = map::TFM + map::tfm::FAULT_BITS;
    rig.until("the first miss", || (rig.load(at) == 1 << 2).then_some(()));
    rig.issue(1, Instruction::vload(0x6000, 0, XType::DWORD, 1, 1));
    rig.until("the second miss", || {
        (rig.gru.stats().misses == 2 && rig.interrupts(0) > 0).then_some(())
    });
    // The second half of the exchange: only what was read goes. Nothing goes twice.
    rig.store(at, 0);
    assert_eq!(rig.load(at), 1 << 3);
    rig.store(at, 0);
    assert_eq!(rig.load(at), 0);
    // A write without a read clears nothing.
    rig.issue(2, Instruction::vload(0x7000, 0, XType::DWORD, 1, 1));
    rig.until("the third miss", || (rig.gru.stats().misses == 3).then_some(()));
    rig.until("its bit", || {
        rig.store(at, 0);
        let memory = rig.gru.hardware.memory.word(at).load(Ordering::SeqCst);
        (memory == 1 << 6).then_some(())
    });
    // Half of the word at a time.
    assert_eq!(read(&rig, at, 4), [1 << 6, 0, 0, 0]);
    write(&rig, at + 4, &[0; 4]);
    assert_eq!(read(&rig, at, 8), (1u64 << 6).to_le_bytes());
    write(&rig, at, &[0; 4]);
    assert_eq!(read(&rig, at, 8), [0; 8]);
}

/// A locked test-and-set by another CPU reads ACTIVE and writes it back after the device has finished.
#[test]
fn test_tgh_when_a_lock_attempt_carries_old_state_back_does_not_restart() {
    let rig = Rig::new(config(Doorbell::Trap));
    let at = map::TGH;
    // What the other CPU saw: command running, lock held.
    let seen = tgh::Control::new()
        .with_cmd(true)
        .with_opc(tgh::Opc::TLBINV)
        .with_delresp(true);
    let seen = seen.with_status(HandleStatus::ACTIVE).into_bits();
    rig.gru.hardware.trapped.read(at, u64::MAX, || seen);
    rig.store(at, seen);
    assert_eq!(rig.load(at), 0b10, "only the lock was taken from the write");
    assert_eq!(rig.gru.stats().tgh_purges, 0);
    // And unlocked again.
    rig.store(at, 0);
    assert_eq!(rig.load(at), 0);
}

#[test]
fn test_doorbell_bar_when_written_keeps_the_status_page() {
    let rig = Rig::new(config(Doorbell::Poll));
    let mut bytes = [0; 8];
    rig.gru
        .bar_write(pci::BAR_DOORBELL, pci::STATUS_OFFSET + pci::STATUS_MAGIC, &[0; 8])
        .unwrap();
    rig.gru
        .bar_read(
            pci::BAR_DOORBELL,
            pci::STATUS_OFFSET + pci::STATUS_MAGIC,
            &mut bytes,
        )
        .unwrap();
    assert_eq!(&bytes, b"tlbgrust");
}

#[test]
fn test_bars_when_asked_offer_what_the_mode_allows() {
    let trap = Rig::new(config(Doorbell::Trap));
    assert!(trap.gru.bars().iter().all(|bar| bar.mmap.is_none()));
    for (doorbell, map_tfh) in [
        (Doorbell::Bell, false),
        (Doorbell::Bell, true),
        (Doorbell::Poll, false),
        (Doorbell::Poll, true),
    ] {
        let rig = Rig::new(GruConfig {
            map_tfh,
            ..config(doorbell)
        });
        let bars = rig.gru.bars();
        let status = bars[0].mmap.as_ref().unwrap();
        assert_eq!(status.areas, [(0x1000, 0x1000)], "the doorbell page is trapped");
        let chiplets = bars[1].mmap.as_ref().unwrap();
        let mapped = |offset| {
            chiplets
                .areas
                .iter()
                .any(|&(start, len)| (start..start + len).contains(&offset))
        };
        for base in [0, map::CHIPLET_SIZE] {
            for gseg in [0, 15 * map::GSEG_STRIDE] {
                let gseg = base + gseg;
                assert!(
                    mapped(gseg) && mapped(gseg + map::GSEG_DS + 0x7fff) && mapped(gseg + map::GSEG_STATUS)
                );
                assert!(!mapped(gseg + map::GSEG_BELL) && !mapped(gseg + map::GSEG_PAGE));
            }
            for offset in [map::TFM, map::TGH + 23 * 256] {
                assert!(mapped(base + offset), "{offset:#x}");
            }
            for offset in [map::TFH, map::TFH + 127 * 256] {
                assert_eq!(mapped(base + offset), map_tfh, "{offset:#x}");
            }
            for offset in [map::CBE, map::CBE + 127 * 256, map::CCH] {
                assert!(!mapped(base + offset), "{offset:#x}");
            }
        }
        assert!(
            chiplets
                .areas
                .iter()
                .all(|&(start, len)| start % 4096 == 0 && len % 4096 == 0 && len > 0)
        );
        // The file that clients get cannot be cut.
        assert!(rustix::fs::ftruncate(&chiplets.fd, 4096).is_err());
    }
}
