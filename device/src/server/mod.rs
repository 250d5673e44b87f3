//! The vfio-user server: a unix stream socket, one client at a time.
//!
//! [`Server::run`] accepts on the caller's thread; each connection has a thread of its own, which reads a
//! message, answers it and reads the next. A second client is refused at once (its VERSION is answered with
//! EBUSY), so it never waits for a first one that is merely idle; when the first one has hung up, the
//! second waits until everything of the first has been cleaned up.
//!
//! Client input is hostile: sizes are checked before anything is allocated or read, a refused message's
//! body is consumed and does nothing, file descriptors that nobody asked for are closed.
//!
//! Memory without a file is reached by DMA_READ and DMA_WRITE ([`crate::dma::Space::read_by_message`]), whose
//! messages cross the client's own on the same socket, or go over a twin socket when the client can do that.
//!
//! Errors are answered as the specification says, with a header alone. Cloud Hypervisor reads the replies to
//! region accesses, DMA_UNMAP and GET_IRQ_INFO at full size without looking at the flag, and a vCPU of it
//! waits for ever for the rest; libvfio-user's client on the other hand reads nothing after an error's
//! header, so that a body would be taken for the next reply. The crate that Cloud Hypervisor is built on is
//! known by what it proposes in VERSION; [`ErrorReplies`] says it for clients that are not.
//!
//! Not implemented: DEVICE_FEATURE and migration.

mod connection;
mod dispatch;
mod frame;
mod irqs;
mod listener;
mod mask_events;
mod peer;
mod refused;
mod requests;
mod twin;

pub use listener::{BindError, StopFd};

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::pci::Function;
use connection::Connection;
use listener::Listener;
use peer::Peer;
use refused::RefusedClients;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};

/// How long an error's reply is, for the commands whose replies Cloud Hypervisor reads at full size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorReplies {
    /// Full size for clients built on the `vfio_user` crate (Cloud Hypervisor), which are known by their
    /// VERSION; a header for everybody else.
    #[default]
    Auto,
    /// A header, as the specification says.
    Header,
    /// As long as a good reply, with zeros.
    Full,
}

/// Limits of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerOptions {
    /// Most data bytes in one message (`max_data_xfer_size`).
    pub max_data_xfer_size: u32,
    /// How long a new client may take until VERSION is agreed on, a client to send all the rest of a message
    /// that it has begun, and a client to take an answer (each part of it). Then it is disconnected: it would keep others out.
    pub client_timeout: Duration,
    /// How long the connection's thread asks for the next message again and again before it sleeps. Zero =
    /// never. Saves the wake-up, costs a processor while the client is quiet for less than this.
    pub busy_poll: Duration,
    /// How long a client may take to answer a DMA_READ or DMA_WRITE. Then the device's access fails.
    pub dma_timeout: Duration,
    /// How long error replies to region accesses, DMA_UNMAP and GET_IRQ_INFO are.
    pub error_replies: ErrorReplies,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_data_xfer_size: 1 << 20,
            client_timeout: Duration::from_secs(5),
            busy_poll: Duration::ZERO,
            dma_timeout: Duration::from_secs(5),
            error_replies: ErrorReplies::Auto,
        }
    }
}

/// A function served on a socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    function: Arc<Function>,
    options: ServerOptions,
    running: Mutex<()>,
}

/// How long to wait for file descriptors before a client is accepted after all.
const RETRY: Duration = Duration::from_millis(100);

/// Whether clients are taken from the listen queue.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// The client before has hung up and is being cleaned up: the next one waits for that.
    AfterCleanUp,
    /// This process is out of file descriptors: try again a little later.
    AfterFdsAreFree,
}

/// The connection being served.
struct Active<'scope> {
    socket: Arc<OwnedFd>,
    peer: Peer,
    thread: ScopedJoinHandle<'scope, ()>,
}

impl Active<'_> {
    /// The client has closed its end: the thread is about to end.
    fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&*self.socket, PollFlags::RDHUP)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
    }

    /// Wait for the thread; a panic in it (a broken invariant) goes on here.
    fn join(self) {
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Server {
    /// Listen on `path`, readable and writable for this user only. A socket file that nobody listens on is
    /// replaced.
    ///
    /// # Errors
    /// [`BindError`]: somebody listens there, it is not a socket, or the system call failed.
    pub fn bind(
        path: impl AsRef<Path>,
        function: Arc<Function>,
        options: ServerOptions,
    ) -> Result<Self, BindError> {
        let listener = Listener::bind(path.as_ref())?;
        tracing::info!(socket = %path.as_ref().display(), "listening");
        Ok(Self {
            listener,
            function,
            options,
            running: Mutex::new(()),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// What it serves.
    #[must_use]
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    /// Serve until `stop`: clients one after the other. When this returns no client is connected and the
    /// function is reset.
    ///
    /// # Errors
    /// A failing system call on the listening socket; EALREADY when it runs already. A client's failure is
    /// no error.
    ///
    /// # Panics
    /// When a connection's thread panicked: an invariant of the device is broken.
    pub fn run(&self, stop: &StopFd) -> io::Result<()> {
        let _running = match self.running.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Errno::ALREADY.into()),
        };
        let done = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stopping = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mut active = None;
            let result = self.accept_loop(scope, stop, &done, &stopping, &mut active);
            stopping.store(true, Ordering::SeqCst);
            if let Some(active) = active {
                // The thread may be waiting in recvmsg or sendmsg: both return at once now.
                let _ = shutdown(&*active.socket, Shutdown::Both);
                active.join();
            }
            result
        })
    }

    fn accept_loop<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        stop: &StopFd,
        done: &'env OwnedFd,
        stopping: &'env AtomicBool,
        active: &mut Option<Active<'scope>>,
    ) -> io::Result<()> {
        let mut accepting = Accepting::Yes;
        let mut refused = RefusedClients::new(self.options.client_timeout);
        loop {
            let mut fds = vec![PollFd::new(stop, PollFlags::IN), PollFd::new(done, PollFlags::IN)];
            fds.extend(refused.poll_fds());
            if accepting == Accepting::Yes {
                fds.push(PollFd::new(self.listener.fd(), PollFlags::IN));
            }
            let retry = (accepting == Accepting::AfterFdsAreFree).then_some(RETRY);
            let deadline = refused.next_deadline();
            let patience = deadline.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = [retry, patience].into_iter().flatten().min();
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
            let (stopped, ended) = (ready(&fds[0]), ready(&fds[1]));
            let asked = accepting == Accepting::Yes && fds.last().is_some_and(ready);
            if stopped {
                tracing::info!(socket = %self.path().display(), "stopping");
                return Ok(());
            }
            refused.serve();
            if ended {
                let _ = rustix::io::read(done, &mut [0; 8]);
                if let Some(ended) = active.take() {
                    ended.join();
                }
                accepting = Accepting::Yes;
                continue;
            }
            if accepting == Accepting::AfterFdsAreFree {
                accepting = Accepting::Yes;
            }
            if !asked {
                continue;
            }
            if active.as_ref().is_some_and(Active::hung_up) {
                accepting = Accepting::AfterCleanUp;
                continue;
            }
            let socket = match accept_with(self.listener.fd(), SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => continue,
                Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    tracing::warn!(%errno, "a client cannot be accepted; trying again");
                    refused.clear();
                    accepting = Accepting::AfterFdsAreFree;
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            let peer = Peer::of(&socket);
            match active {
                Some(active) => {
                    tracing::warn!(%peer, holder = %active.peer, "client refused: another one is connected");
                    refused.add(socket);
                }
                None => *active = Some(self.serve(scope, socket, peer, done, stopping)?),
            }
        }
    }

    fn serve<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        socket: OwnedFd,
        peer: Peer,
        done: &'env OwnedFd,
        stopping: &'env AtomicBool,
    ) -> io::Result<Active<'scope>> {
        let socket = Arc::new(socket);
        let on_thread = Arc::clone(&socket);
        let thread = std::thread::Builder::new()
            .name("vfio-user".into())
            .spawn_scoped(scope, move || {
                // Declared first, so dropped last: also when the connection panics, the acceptor hears of it.
                let _done = NotifyDone(done);
                tracing::info!(%peer, "client connected");
                let reason = Connection::new(on_thread, &self.function, &self.options, stopping).run();
                self.function.disconnect();
                tracing::info!(%peer, %reason, "client disconnected; the function is reset");
            })?;
        Ok(Active { socket, peer, thread })
    }
}

struct NotifyDone<'a>(&'a OwnedFd);

impl Drop for NotifyDone<'_> {
    fn drop(&mut self) {
        let _ = rustix::io::write(self.0, &1u64.to_ne_bytes());
    }
}
