//! The real driver on the real device over a vfio-user socket, in both doorbell modes.

use std::convert::Infallible;
use std::sync::Arc;

use device::gru::{Doorbell, Gru, GruConfig};
use device::model::Model;
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use driver::gru::GruOptions;
use driver::vfio_user::VfioUserClient;
use tests::gru::rig::Rig;

const FRAMES: u32 = 4096;

/// Asks the server to end even when a body panics: the scope would wait for it for ever.
struct Stop(StopFd);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn with_device(doorbell: Doorbell, options: GruOptions, body: impl FnOnce(&Rig)) {
    let config = GruConfig {
        doorbell,
        ..GruConfig::default()
    };
    let function = Function::new(|context| -> Result<Arc<dyn Model>, Infallible> {
        Ok(Gru::new(context, config).expect("a GRU"))
    })
    .expect("a function");
    let directory = tempfile::tempdir().expect("a directory for the socket");
    let path = directory.path().join("gru.sock");
    let server = Server::bind(&path, function, ServerOptions::default()).expect("a socket");
    let stop = StopFd::new().expect("an eventfd");
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(&stop));
        {
            let _stop = Stop(stop.clone());
            let client = VfioUserClient::connect(&path).expect("connect");
            body(&Rig::new(Arc::new(client), options, FRAMES));
        }
        serving.join().expect("the server").expect("the server");
    });
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
