//! The real driver on the real device in one process, in every doorbell mode.

use std::sync::Arc;

use device::faults::{BreakPlan, FaultPlan};
use device::gru::{Doorbell, Gru, GruConfig};
use driver::gru::GruOptions;
use tests::gru::rig::Rig;
use tests::gru::{Mode, assert_nothing_found, rounds};
use tests::in_process::InProcess;

const FRAMES: u32 = 4096;

fn with_device(mode: Mode, options: impl Fn() -> GruOptions, body: impl Fn(&Rig)) {
    for _ in 0..rounds() {
        with_config(mode.config(), options(), &body);
    }
}

fn with_config(config: GruConfig, options: GruOptions, body: impl FnOnce(&Rig)) {
    let (backing, device) = InProcess::build(|context| Gru::new(context, config)).expect("a GRU");
    body(&Rig::new(Arc::new(backing), options, FRAMES));
    assert_nothing_found(&config, &device);
}

tests::gru_bodies_in_every_mode!(super::with_device);

/// Message queues on a chip that is always congested.
mod congested {
    use tests::gru::messages;

    use super::*;

    #[test]
    fn test_message_queue_when_chip_is_congested_delivers_each_once() {
        for doorbell in [Doorbell::Trap, Doorbell::Poll] {
            let config = GruConfig {
                doorbell,
                faults: "lb-overflow=7,amo-nack=5,put-nack=3".parse().expect("a plan"),
                ..GruConfig::default()
            };
            with_config(config, GruOptions::default(), |rig| {
                messages::conformance(rig);
                messages::two_lines(rig);
                assert!(messages::many_senders(rig, 60) > 0, "congestion was reported");
            });
        }
    }
}

/// The oracles see what they are for: with a check of the device switched off, and its window held open, the same
/// bodies fail; with the window held open and the check on, they do not. The device's sanitizer names what it was.
mod broken {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use device::atc::{Defect, Findings};
    use device::model::Model;
    use driver::gru::FaultMode;
    use tests::gru::flushes;

    use super::*;

    fn storm(broken: BreakPlan, windows: BreakPlan) -> (bool, Findings) {
        let config = GruConfig {
            doorbell: Doorbell::Poll,
            map_tfh: true,
            sanitize: true,
            broken,
            faults: FaultPlan::default().with_windows_of(windows),
            ..GruConfig::default()
        };
        let (backing, device) = InProcess::build(|context| Gru::new(context, config)).expect("a GRU");
        let result = catch_unwind(AssertUnwindSafe(|| {
            let rig = Rig::new(Arc::new(backing), GruOptions::default(), FRAMES);
            flushes::s2_bcopy_storm(&rig, 300, 30);
        }));
        (result.is_ok(), device.findings().expect("a sanitizer"))
    }

    const KILL_BIT: BreakPlan = BreakPlan {
        kill_bit: true,
        drain: false,
        clean: false,
        unmap: false,
    };
    const DRAIN: BreakPlan = BreakPlan {
        kill_bit: false,
        drain: true,
        clean: false,
        unmap: false,
    };

    /// A stale access shows only if the thread that moves the page gets the CPU within the delay's margin, which
    /// a busy machine may not grant in one storm.
    fn finds(broken: BreakPlan) -> bool {
        (0..5).any(|_| !storm(broken, broken).0)
    }

    /// The sanitizer sees each window that is really open, whoever gets the CPU; and only those.
    fn names(broken: BreakPlan, class: Defect) {
        let (_, findings) = storm(broken, broken);
        assert!(findings.of(class) > 0, "{findings:#?}");
        assert_eq!(
            findings.of(class),
            findings.defects - findings.defects_without_report,
            "{findings:#?}"
        );
        let (good, findings) = storm(BreakPlan::default(), broken);
        assert!(good, "the delay alone");
        assert_eq!(findings.defects, 0, "the delay alone: {findings:#?}");
        assert!(findings.checked > 0);
    }

    #[test]
    fn test_storm_when_kill_bit_is_off_finds_stale_accesses() {
        assert!(finds(KILL_BIT));
        names(KILL_BIT, Defect::FillAfterKill);
    }

    #[test]
    fn test_storm_when_drain_is_off_finds_stale_accesses() {
        assert!(finds(DRAIN));
        names(DRAIN, Defect::CompletionBeforeDrain);
    }

    #[test]
    fn test_look_up_when_kill_bit_is_off_finds_stale_accesses() {
        let config = GruConfig {
            doorbell: Doorbell::Poll,
            map_tfh: true,
            broken: KILL_BIT,
            ..GruConfig::default()
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            with_config(config, GruOptions::default(), |rig| {
                flushes::s1_invalidation_during_the_look_up(rig, FaultMode::Interrupt);
            });
        }));
        assert!(result.is_err());
    }
}
