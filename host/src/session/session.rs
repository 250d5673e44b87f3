//! One application's session: its address space, its threads, its contexts.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use driver::gru::{Context, Mm};
use protos::bridge::changes::generation_in;
use protos::bridge::control::Notice;
use rustix::event::{EventfdFlags, eventfd};

use super::identity::{check_maps, check_userfaultfd};
use super::mailbox::{Mailbox, WORKERS};
use super::memory::DeviceMemory;
use super::refusal::Refusal;
use super::space::AddressSpace;
use super::{SpacePager, packet};
use crate::fence::Fence;
use crate::mm::{FillTable, MappedTable, MmCache, ProcMaps};
use crate::notifier::MaySleep;
use crate::subscribers::{DeviceFlush, GruSubscriber, HeldMemory, Xpmem};
use crate::uffd::{Injection, SafetyNet};

/// Files that one session can make known.
pub const MAX_FILES: usize = 1024;

impl DeviceFlush for Mm {
    fn sleeps(&self) -> bool {
        !self.flush_is_nonsleeping()
    }
    fn flush(&self, start: u64, end: u64) {
        Mm::flush(self, start, end);
    }
    fn flush_all(&self) {
        Mm::flush_all(self);
    }
}

/// What a new session needs.
#[derive(Debug)]
pub struct Admission {
    /// Session number.
    pub id: u32,
    /// The application, as the kernel names it.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its name for itself.
    pub name: String,
    /// Its userfaultfd.
    pub uffd: OwnedFd,
    /// Its `/proc/self/maps`.
    pub maps: OwnedFd,
}

/// How sessions behave.
#[derive(Debug, Clone, Copy)]
pub struct SessionOptions {
    /// See `HostConfig::large_pages`.
    pub large_pages: bool,
    /// See `HostConfig::break_safety_net`.
    pub injection: Injection,
}

/// A context on a session's address space.
#[derive(Debug)]
pub struct OwnedContext {
    /// The connection that may use it.
    pub owner: u64,
    /// The context.
    pub context: Arc<Context>,
}

/// The contexts of a session. Once `closed`, none is added.
#[derive(Debug, Default)]
struct Contexts {
    closed: bool,
    by_number: BTreeMap<u32, OwnedContext>,
}

/// A session. [`Session::close`] takes everything back; it is called once, by whoever serves the connection.
#[derive(Debug)]
pub struct Session {
    /// Number, for messages.
    pub id: u32,
    /// Name, for messages.
    pub name: String,
    /// The application's user.
    pub uid: u32,
    /// The address space.
    pub space: Arc<AddressSpace>,
    /// The GRU driver's side of it.
    pub gru: Arc<Mm>,
    /// The mailbox.
    pub mailbox: Arc<Mailbox>,
    /// Our end of the notice socket.
    notices: OwnedFd,
    contexts: Mutex<Contexts>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    stop: OwnedFd,
    closed: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything behind these locks is whole at every step.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Refusal {
    move |error| {
        Refusal::new(
            error.raw_os_error().unwrap_or(libc::EIO),
            format!("{what}: {error}"),
        )
    }
}

impl Session {
    /// Opens a session: checks the descriptors, makes the shared table, registers the GRU driver with the
    /// chain, starts the threads. Returns the session and the application's end of the notice socket.
    ///
    /// # Errors
    /// [`Refusal`], with nothing left behind.
    pub fn open(
        gru: &Arc<driver::gru::Gru>,
        fence: &Arc<Fence>,
        memory: &DeviceMemory,
        admission: Admission,
        options: SessionOptions,
    ) -> Result<(Arc<Self>, OwnedFd), Refusal> {
        let invalid = |message| Refusal::new(libc::EINVAL, message);
        check_userfaultfd(admission.uffd.as_fd()).map_err(invalid)?;
        check_maps(admission.maps.as_fd()).map_err(invalid)?;
        let table = MappedTable::create().map_err(|e| Refusal::new(libc::ENOMEM, e.to_string()))?;
        // Whose generations they are stands in their upper bits.
        let first = generation_in(admission.id, 0);
        table.header.generation.store(first, Ordering::SeqCst);
        let fills = FillTable::new(table);
        let maps = Arc::new(ProcMaps::new(admission.maps));
        let cache = MmCache::new(maps.clone(), fills.clone());
        let xpmem = Xpmem::new(fence.clone());
        let space = AddressSpace::new(admission.id, admission.pid, fills.clone(), cache, xpmem.clone());
        if let Some(changes) = memory.changes() {
            space.set_changes(changes.clone());
        }
        let (notices, theirs) = packet::pair().map_err(system("notice socket"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| system("eventfd")(e.into()))?;
        let thread_stop = stop.try_clone().map_err(system("eventfd"))?;

        let mm = gru.address_space(Arc::new(SpacePager::new(&space, options.large_pages)));
        space.set_gru(&mm);
        let token = MaySleep::claim("Session::open");
        space
            .chain()
            .register(GruSubscriber::new(mm.clone(), fills), &token)
            .expect("a new chain has room");
        space
            .chain()
            .register(xpmem, &token)
            .expect("a new chain has room");
        if let Some(held) = memory.held() {
            let subscriber = HeldMemory::new(held.clone(), maps);
            space
                .chain()
                .register(subscriber.clone(), &token)
                .expect("a new chain has room");
            // Its pages outlive the translations that the table counts: it must hear of every discard. Nobody has
            // the table yet, so no call is silent.
            space.raise_must_hop();
            space.set_held(held.clone(), subscriber);
            held.add_space(&space);
        }
        let mailbox = Arc::new(Mailbox::new(space.clone()));
        let session = Arc::new(Self {
            id: admission.id,
            name: admission.name,
            uid: admission.uid,
            mailbox,
            gru: mm,
            notices,
            contexts: Mutex::default(),
            threads: Mutex::default(),
            stop,
            closed: AtomicBool::new(false),
            space: space.clone(),
        });
        let net = SafetyNet::new(admission.uffd, space, options.injection);
        let started = session.start_threads(net, thread_stop);
        if let Err(error) = started {
            session.take_back(&token);
            return Err(system("thread")(error));
        }
        Ok((session, theirs))
    }

    fn start_threads(&self, net: SafetyNet, stop: OwnedFd) -> io::Result<()> {
        let mut threads = locked(&self.threads);
        let named = |name: String| std::thread::Builder::new().name(name);
        threads.push(named(format!("uffd-{}", self.id)).spawn(move || net.run(stop))?);
        for worker in 0..WORKERS {
            let mailbox = self.mailbox.clone();
            threads.push(named(format!("mailbox-{}-{worker}", self.id)).spawn(move || mailbox.work())?);
        }
        Ok(())
    }

    /// Says something on the notice socket. A receiver that does not read loses it: its queue is full of what
    /// it has not read, and a hang-up follows anyway.
    pub fn notify(&self, notice: &Notice) {
        if let Err(error) = packet::send(&self.notices, notice, &[]) {
            tracing::debug!(session = self.id, %error, ?notice, "notice not delivered");
        }
    }

    /// Adds a context for a connection.
    ///
    /// # Errors
    /// ESHUTDOWN when the session is ending; the context is closed then.
    pub fn add_context(&self, number: u32, owner: u64, context: Arc<Context>) -> Result<(), Refusal> {
        let mut contexts = locked(&self.contexts);
        if contexts.closed {
            return Err(Refusal::new(libc::ESHUTDOWN, "the session is ending"));
        }
        contexts.by_number.insert(number, OwnedContext { owner, context });
        Ok(())
    }

    /// A context, for the connection that owns it.
    #[must_use]
    pub fn context(&self, number: u32, owner: u64) -> Option<Arc<Context>> {
        let contexts = locked(&self.contexts);
        contexts
            .by_number
            .get(&number)
            .filter(|c| c.owner == owner)
            .map(|c| c.context.clone())
    }

    /// Takes a context out, for the connection that owns it. It closes when the last user lets go.
    pub fn take_context(&self, number: u32, owner: u64) -> Option<Arc<Context>> {
        let mut contexts = locked(&self.contexts);
        contexts.by_number.get(&number).filter(|c| c.owner == owner)?;
        contexts.by_number.remove(&number).map(|c| c.context)
    }

    /// Takes out every context of a connection.
    #[must_use]
    pub fn take_contexts_of(&self, owner: u64) -> Vec<Arc<Context>> {
        let mut contexts = locked(&self.contexts);
        let numbers: Vec<u32> = contexts
            .by_number
            .iter()
            .filter(|(_, c)| c.owner == owner)
            .map(|(number, _)| *number)
            .collect();
        numbers
            .iter()
            .filter_map(|number| contexts.by_number.remove(number))
            .map(|c| c.context)
            .collect()
    }

    /// Contexts on this address space now.
    #[must_use]
    pub fn context_count(&self) -> usize {
        locked(&self.contexts).by_number.len()
    }

    /// Ends the session and takes everything back: contexts closed, translations flushed, subscribers
    /// released, threads joined, memory unmapped from the device. Blocks; bounded by the fence of whoever has
    /// to answer.
    pub fn close(&self, reason: &str, memory: &DeviceMemory) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let token = MaySleep::claim("Session::close");
        self.space.end(reason);
        self.take_back(&token);
        for id in self.space.take_files() {
            memory.release(id);
        }
        self.notify(&Notice::Closing {
            reason: reason.into(),
        });
        // Whoever still holds this session for a moment must not hide its end from the application.
        let _ = rustix::net::shutdown(&self.notices, rustix::net::Shutdown::Both);
        tracing::info!(session = self.id, pid = self.space.pid(), name = %self.name, reason, "session closed");
    }

    fn take_back(&self, token: &MaySleep) {
        self.space.end("closing");
        // No translation can come into being after this (S12), and every pending miss is answered, so that
        // closing a context below does not wait for one.
        self.gru.close();
        let contexts = {
            let mut contexts = locked(&self.contexts);
            contexts.closed = true;
            std::mem::take(&mut contexts.by_number)
        };
        drop(contexts);
        // The other subscribers. Calls are still answered meanwhile, truthfully.
        self.space.chain().release(token);
        // Only now, with no translation left anywhere, may the agent stop asking.
        self.space.table().header.closed.store(1, Ordering::SeqCst);
        self.mailbox.stop();
        // The counter's only failure is overflow, and then the thread has been told already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        for thread in std::mem::take(&mut *locked(&self.threads)) {
            let name = thread.thread().name().unwrap_or("?").to_owned();
            if thread.join().is_err() {
                tracing::error!(session = self.id, thread = name, "a session thread panicked");
            }
        }
        self.mailbox.finish(token);
    }
}
