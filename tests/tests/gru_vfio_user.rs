//! The real driver on the real device over a vfio-user socket, in every doorbell mode.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};

use device::gru::Gru;
use device::model::Model;
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use driver::gru::GruOptions;
use driver::vfio_user::VfioUserClient;
use tests::gru::rig::Rig;
use tests::gru::{Mode, assert_nothing_found, rounds};

const FRAMES: u32 = 4096;

/// Asks the server to end even when a body panics: the scope would wait for it for ever.
struct Stop(StopFd);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn with_device(mode: Mode, options: impl Fn() -> GruOptions, body: impl Fn(&Rig)) {
    for _ in 0..rounds() {
        serve(mode, options(), &body);
    }
}

fn serve(mode: Mode, options: GruOptions, body: impl Fn(&Rig)) {
    let config = mode.config();
    let device = OnceLock::new();
    let function = Function::new(|context| -> Result<Arc<dyn Model>, Infallible> {
        let gru = Gru::new(context, config).expect("a GRU");
        device.set(Arc::clone(&gru)).expect("built once");
        Ok(gru)
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
    assert_nothing_found(&config, device.get().expect("a device"));
}

tests::gru_bodies_in_every_mode!(super::with_device);
