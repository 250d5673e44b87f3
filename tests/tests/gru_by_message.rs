//! The GRU on memory that has no file, over sockets: the device asks our client, which may be slow or silent.

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use device::gru::Gru;
use device::model::Model;
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use driver::backing::{Backing, DmaProt};
use driver::gru::{FaultMode, GruOptions, Mm};
use driver::vfio_user::{ByMessage, ClientOptions, MessageMemory, VfioUserClient};
use protos::gru::cb::{ImplicitOp, Instruction, Status, XType};
use protos::gru::cbe::ecause;
use rustix::io::Errno;
use tests::gru::Mode;
use tests::gru::memory::Frame;
use tests::gru::page_table::{PageTable, Pte};
use tests::gru::rig::{PATIENCE, Rig, User, wants};

const FRAMES: u32 = 64;
const PAGES: u32 = 16;
const PAGE: u64 = 4096;
/// Pages of private memory, then pages with a file.
const PRIVATE: u64 = 0x10_0000;
const SHARED: u64 = 0x20_0000;

/// Private memory that can be slow: while the gate is shut nothing is answered.
#[derive(Debug)]
struct Slow {
    state: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Debug)]
struct Gate {
    shut: bool,
    waiting: usize,
    bytes: Vec<u8>,
}

impl Slow {
    fn new() -> Arc<Self> {
        let bytes = (0..PAGES * 4096).map(|at| (at * 13 + at / 250) as u8).collect();
        Arc::new(Self {
            state: Mutex::new(Gate {
                shut: false,
                waiting: 0,
                bytes,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.state.lock().unwrap()
    }

    fn shut(&self, shut: bool) {
        self.lock().shut = shut;
        self.changed.notify_all();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        self.lock().bytes[at as usize..][..len].to_vec()
    }

    fn pass(&self) -> MutexGuard<'_, Gate> {
        let mut gate = self.lock();
        gate.waiting += 1;
        self.changed.notify_all();
        while gate.shut {
            gate = self.changed.wait(gate).unwrap();
        }
        gate.waiting -= 1;
        gate
    }

    /// Until a request is waiting.
    fn await_request(&self) {
        let since = Instant::now();
        let mut gate = self.lock();
        while gate.waiting == 0 {
            assert!(since.elapsed() < PATIENCE, "nobody asks");
            gate = self.changed.wait_timeout(gate, PATIENCE).unwrap().0;
        }
    }
}

impl MessageMemory for Slow {
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        to.copy_from_slice(&self.pass().bytes[offset as usize..][..to.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        self.pass().bytes[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
}

/// Opens the gate and stops the server, also when a body panics.
struct End(StopFd, Arc<Slow>);

impl Drop for End {
    fn drop(&mut self) {
        self.1.shut(false);
        self.0.stop();
    }
}

struct Setup<'a> {
    rig: Rig,
    mm: Arc<Mm>,
    table: Arc<PageTable>,
    user: User,
    client: Arc<VfioUserClient>,
    slow: &'a Slow,
    path: &'a Path,
}

fn with_device(mode: Mode, by_message: ByMessage, dma_timeout: Duration, body: impl Fn(&Setup<'_>, &Gru)) {
    let mut gru = None;
    let function = Function::new(|context| -> Result<Arc<dyn Model>, Infallible> {
        let model = Gru::new(context, mode.config()).expect("a GRU");
        gru = Some(Arc::clone(&model));
        Ok(model)
    })
    .expect("a function");
    let gru = gru.expect("made with the function");
    let directory = tempfile::tempdir().expect("a directory for the socket");
    let path = directory.path().join("gru.sock");
    let options = ServerOptions {
        dma_timeout,
        ..ServerOptions::default()
    };
    let server = Server::bind(&path, function, options).expect("a socket");
    let stop = StopFd::new().expect("an eventfd");
    let slow = Slow::new();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(&stop));
        {
            let _end = End(stop.clone(), Arc::clone(&slow));
            let options = ClientOptions {
                by_message,
                ..ClientOptions::default()
            };
            let client = Arc::new(VfioUserClient::connect_with(&path, options).expect("connect"));
            let rig = Rig::new(
                Arc::clone(&client) as Arc<dyn Backing>,
                GruOptions::default(),
                FRAMES,
            );
            let memory = Arc::clone(&slow) as Arc<dyn MessageMemory>;
            let iova = Frame(FRAMES).iova();
            client
                .dma_map_by_message(iova, u64::from(PAGES) * PAGE, memory, DmaProt::READ_WRITE)
                .expect("map the private memory");
            let (mm, table) = rig.space();
            table.edit(|entries| {
                for page in 0..PAGES {
                    let frame = Frame(FRAMES + page);
                    entries.map(
                        PRIVATE + u64::from(page) * PAGE,
                        Pte {
                            frame,
                            writable: true,
                        },
                    );
                }
            });
            table.populate(SHARED, u64::from(PAGES) * PAGE, true, |_| 0x5a);
            let user = User::new(&mm, wants(4, 8192, FaultMode::Interrupt));
            let setup = Setup {
                rig,
                mm,
                table,
                user,
                client,
                slow: &slow,
                path: &path,
            };
            body(&setup, &gru);
        }
        serving.join().expect("the server").expect("the server");
    });
}

const PATIENT: Duration = Duration::from_secs(60);

fn load(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

#[test]
fn test_private_memory_when_computed_on_over_sockets_has_and_gives_the_right_bytes() {
    for by_message in [ByMessage::OneSocket, ByMessage::Twin] {
        for mode in [Mode::Trap, Mode::Bell, Mode::Poll] {
            with_device(mode, by_message, PATIENT, |setup, gru| {
                let (user, slow) = (&setup.user, setup.slow);
                let before = slow.bytes(0, 4 * 4096);
                user.ok(0, &Instruction::vload(PRIVATE + 4090, 8, XType::BYTE, 3000, 1));
                assert_eq!(user.get(8, 3000), before[4090..7090]);
                user.ok(
                    1,
                    &Instruction::vstore(PRIVATE + 9 * PAGE + 1, 8, XType::BYTE, 3000, 1),
                );
                assert_eq!(slow.bytes(9 * PAGE + 1, 3000), before[4090..7090]);
                user.ok(
                    2,
                    &Instruction::bcopy(PRIVATE + 1, SHARED + 2, 0, 4, XType::BYTE, 9000),
                );
                assert_eq!(setup.table.read(SHARED + 2, 9000), before[1..9001]);
                user.ok(
                    3,
                    &Instruction::bcopy(SHARED + 2, PRIVATE + 5 * PAGE, 0, 4, XType::BYTE, 9000),
                );
                assert_eq!(slow.bytes(5 * PAGE, 9000), before[1..9001]);
                user.ok(0, &Instruction::vset(PRIVATE + 8, 7, XType::DWORD, 4, 1));
                assert_eq!(slow.bytes(8, 32), [7u64.to_le_bytes(); 4].concat());
                // No message is atomic: refused, and said.
                let inc = Instruction::gamir(PRIVATE, ImplicitOp::INC, XType::DWORD);
                assert_eq!(user.run(0, &inc), Status::EXCEPTION);
                let detail = user.context.exception_detail(0).unwrap();
                assert_eq!(detail.ecause, ecause::HA_RESPONSE_FATAL);
                assert!(gru.stats().accesses_by_message > 0);
                assert!(setup.client.alive());
            });
        }
    }
}

/// The client's own thread is busy; its other socket goes on.
#[test]
fn test_purge_when_it_races_an_unanswered_read_returns_and_the_late_bytes_are_not_used() {
    for mode in [Mode::Trap, Mode::Bell, Mode::Poll] {
        with_device(mode, ByMessage::Twin, PATIENT, |setup, gru| {
            let (user, slow, table) = (&setup.user, setup.slow, &setup.table);
            for round in 0..20u64 {
                let va = PRIVATE + round % 8 * PAGE;
                let (old, new) = (
                    table.edit(|entries| entries.get(va)).unwrap(),
                    setup.rig.memory.take(),
                );
                setup.rig.memory.write(new, 0, &round.to_le_bytes());
                slow.shut(true);
                user.gseg.issue(0, &load(va)).unwrap();
                slow.await_request();
                // Others work, and the page moves to memory with a file, while the client is silent.
                user.ok(1, &Instruction::vload(SHARED, 64, XType::DWORD, 1, 1));
                assert_eq!(user.get(64, 8), [0x5a; 8]);
                let moved = Pte {
                    frame: new,
                    writable: true,
                };
                table.change(&setup.mm, va, va + PAGE, |entries| entries.map(va, moved));
                assert_eq!(user.wait(0), Status::IDLE);
                assert_eq!(
                    user.get(0, 8),
                    round.to_le_bytes(),
                    "round {round}: bytes of the old page"
                );
                slow.shut(false);
                table.change(&setup.mm, va, va + PAGE, |entries| entries.map(va, old));
                setup.rig.memory.put(new);
                user.ok(0, &load(va));
                assert_eq!(
                    user.get(0, 8),
                    slow.bytes(va - PRIVATE, 8),
                    "round {round}: a late answer"
                );
            }
            assert!(gru.stats().accesses_by_message >= 40);
        });
    }
}

#[test]
fn test_purge_when_a_write_is_on_its_way_returns_after_the_client_has_it() {
    // Trapped, the thread that takes the client's messages executes the flush: it is not kept by it.
    for mode in [Mode::Trap, Mode::Bell, Mode::Poll] {
        with_device(mode, ByMessage::Twin, PATIENT, |setup, gru| {
            let (user, slow, table) = (&setup.user, setup.slow, &setup.table);
            user.put(0, &99u64.to_le_bytes());
            slow.shut(true);
            user.gseg
                .issue(0, &Instruction::vstore(PRIVATE, 0, XType::DWORD, 1, 1))
                .unwrap();
            slow.await_request();
            std::thread::scope(|scope| {
                let purge = scope.spawn(|| {
                    table
                        .change(&setup.mm, PRIVATE, PRIVATE + PAGE, |_| slow.bytes(0, 8))
                        .0
                });
                let since = Instant::now();
                while (0..2).all(|chiplet| gru.atc(chiplet).unwrap().stats().active_purges == 0) {
                    assert!(since.elapsed() < PATIENCE);
                    std::thread::yield_now();
                }
                // What is not concerned goes on.
                user.ok(1, &Instruction::vload(SHARED, 64, XType::DWORD, 1, 1));
                assert!(!purge.is_finished());
                slow.shut(false);
                assert_eq!(purge.join().unwrap(), 99u64.to_le_bytes());
            });
            assert_eq!(user.wait(0), Status::IDLE);
        });
    }
}

#[test]
fn test_client_when_it_never_answers_a_read_fails_that_instruction_in_time_and_nothing_else() {
    with_device(
        Mode::Bell,
        ByMessage::Twin,
        Duration::from_millis(200),
        |setup, _| {
            setup.slow.shut(true);
            let since = Instant::now();
            setup.user.gseg.issue(0, &load(PRIVATE)).unwrap();
            setup.slow.await_request();
            setup
                .user
                .ok(1, &Instruction::vload(SHARED, 64, XType::DWORD, 1, 1));
            assert_eq!(setup.user.wait(0), Status::EXCEPTION);
            // The driver may have tried again: three times at most.
            assert!(since.elapsed() < Duration::from_secs(20), "bounded");
            let detail = setup.user.context.exception_detail(0).unwrap();
            assert_eq!(detail.ecause, ecause::RA_REQUEST_TIMEOUT);
            assert!(setup.client.alive());
            setup.slow.shut(false);
            setup.user.ok(0, &load(PRIVATE + 8));
            assert_eq!(setup.user.get(0, 8), setup.slow.bytes(8, 8));
        },
    );
}

/// A write that may still happen at any time cannot be forgotten: the client is fenced off.
#[test]
fn test_client_when_it_never_answers_a_write_is_cut_off_and_the_next_one_finds_a_clean_device() {
    for by_message in [ByMessage::OneSocket, ByMessage::Twin] {
        with_device(
            Mode::Bell,
            by_message,
            Duration::from_millis(200),
            |setup, gru| {
                setup.slow.shut(true);
                setup
                    .user
                    .gseg
                    .issue(0, &Instruction::vstore(PRIVATE, 0, XType::DWORD, 1, 1))
                    .unwrap();
                setup.slow.await_request();
                let since = Instant::now();
                while gru.stats().resets == 0 {
                    assert!(since.elapsed() < PATIENCE, "the client is still there");
                    std::thread::yield_now();
                }
                let next = loop {
                    match VfioUserClient::connect(setup.path) {
                        Ok(next) => break next,
                        // The one before is being cleaned up.
                        Err(error) => assert!(since.elapsed() < PATIENCE, "{error}"),
                    }
                };
                let rig = Rig::new(Arc::new(next), GruOptions::default(), FRAMES);
                let (mm, table) = rig.space();
                table.populate(SHARED, PAGE, true, |_| 0x33);
                let user = User::new(&mm, wants(4, 8192, FaultMode::Interrupt));
                user.ok(0, &load(SHARED));
                assert_eq!(user.get(0, 8), [0x33; 8], "the engines are free");
                setup.slow.shut(false);
            },
        );
    }
}
