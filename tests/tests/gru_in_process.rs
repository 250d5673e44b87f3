//! The real driver on the real device in one process, in both doorbell modes.

use std::sync::Arc;

use device::gru::{Doorbell, Gru, GruConfig};
use driver::gru::GruOptions;
use tests::gru::rig::Rig;
use tests::in_process::InProcess;

const FRAMES: u32 = 4096;

fn with_device(doorbell: Doorbell, options: GruOptions, body: impl FnOnce(&Rig)) {
    let config = GruConfig {
        doorbell,
        ..GruConfig::default()
    };
    let (backing, _model) = InProcess::build(|context| Gru::new(context, config)).expect("a GRU");
    body(&Rig::new(Arc::new(backing), options, FRAMES));
}

mod trap {
    use super::*;

    fn with(options: GruOptions, body: impl FnOnce(&Rig)) {
        with_device(Doorbell::Trap, options, body);
    }

    tests::gru_bodies!(with);

    #[test]
    fn test_flush_when_nothing_is_mapped_says_that_it_sleeps() {
        with(GruOptions::default(), |rig| flushes::nonsleeping(rig, false));
    }
}

mod poll {
    use super::*;

    fn with(options: GruOptions, body: impl FnOnce(&Rig)) {
        with_device(Doorbell::Poll, options, body);
    }

    tests::gru_bodies!(with);

    #[test]
    fn test_flush_when_handles_are_mapped_says_that_it_does_not_sleep() {
        with(GruOptions::default(), |rig| flushes::nonsleeping(rig, true));
    }
}
