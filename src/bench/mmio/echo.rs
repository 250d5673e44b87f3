//! The floor: a process that receives messages of one size and answers with messages of another, with as few
//! system calls as possible and without looking at them. Laid out like the server: the main thread accepts, a
//! thread serves.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, listen, recv, recvmsg, send, socket_with,
};
use serde_json::json;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::cli::EchoArgs;
use crate::stop::{self, Stop};
use crate::supervise::Leftovers;

/// What a connection is for: its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Plan {
    /// Bytes of a message, at most [`MAX`].
    pub request: u32,
    /// Bytes of an answer, at most [`MAX`].
    pub answer: u32,
    /// One answer after so many messages; at least 1.
    pub every: u32,
    /// Ask for the next message again and again for so long before sleeping.
    pub busy_poll_us: u32,
    /// How messages are received; see [`Receive`].
    pub receive: u32,
}

/// How messages are received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Receive {
    /// recv: what a socket costs. Whoever serves vfio-user cannot do it, because file descriptors that come with a
    /// message are lost.
    Bytes = 0,
    /// recvmsg with room for file descriptors: what a socket costs those who need them.
    WithDescriptors = 1,
}

/// Longest message.
pub const MAX: usize = 4096;

/// Serves until told to end.
///
/// # Errors
/// The socket cannot be used.
pub fn run(args: &EchoArgs) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(true)?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    let listener = listen_at(&args.socket)?;
    stop::obey(&stop, |_| json!({}))?;
    stop::say(&json!({ "ready": { "pid": std::process::id() } }));
    while !stop.requested() {
        let mut fds = [
            PollFd::new(&listener, PollFlags::IN),
            PollFd::new(&stop, PollFlags::IN),
        ];
        let _ = rustix::event::poll(&mut fds, None);
        if fds[0].revents().is_empty() {
            continue;
        }
        let socket = accept_with(&listener, SocketFlags::CLOEXEC).context("accept")?;
        // It ends with its connection, or with this process.
        std::thread::Builder::new()
            .name("echo".into())
            .spawn(move || serve(&socket))
            .context("thread")?;
    }
    Ok(())
}

fn listen_at(path: &Path) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).context("socket")?;
    let address = SocketAddrUnix::new(path).context("socket path")?;
    bind(&listener, &address).with_context(|| format!("cannot bind {}", path.display()))?;
    listen(&listener, 8).context("listen")?;
    Ok(listener)
}

/// Until the other end closes the connection, or says something that is no plan.
fn serve(socket: &OwnedFd) {
    let mut bytes = [0; size_of::<Plan>()];
    if !fill(socket, &mut bytes, Receive::Bytes, Duration::ZERO) {
        return;
    }
    let plan = Plan::read_from_bytes(&bytes).expect("the size of a plan");
    let (request, answer) = (plan.request as usize, plan.answer as usize);
    if !(1..=MAX).contains(&request) || !(1..=MAX).contains(&answer) || plan.every == 0 {
        return;
    }
    let busy_poll = Duration::from_micros(plan.busy_poll_us.into());
    let (mut message, reply) = ([0; MAX], [0; MAX]);
    let mut seen = 0;
    let receive = match plan.receive {
        0 => Receive::Bytes,
        1 => Receive::WithDescriptors,
        _ => return,
    };
    while fill(socket, &mut message[..request], receive, busy_poll) {
        seen += 1;
        if seen == plan.every {
            seen = 0;
            if retry_on_intr(|| send(socket, &reply[..answer], SendFlags::NOSIGNAL)).is_err() {
                return;
            }
        }
    }
}

/// As many file descriptors as a vfio-user server offers to take in one message.
const MAX_FDS: usize = 16;

/// Inlined, like what calls it: a function that returns after a system call it made costs about half a microsecond,
/// and the server has none on its way.
#[inline(always)]
fn receive(socket: &OwnedFd, bytes: &mut [u8], how: Receive, flags: RecvFlags) -> Result<usize, Errno> {
    match how {
        Receive::Bytes => recv(socket, bytes, flags).map(|(_, bytes)| bytes),
        Receive::WithDescriptors => {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = flags | RecvFlags::CMSG_CLOEXEC;
            recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags).map(|message| message.bytes)
        }
    }
}

#[inline(always)]
fn fill(socket: &OwnedFd, bytes: &mut [u8], how: Receive, busy_poll: Duration) -> bool {
    let mut filled = 0;
    let mut spin_until = (!busy_poll.is_zero()).then(|| Instant::now() + busy_poll);
    while filled < bytes.len() {
        let flags = match spin_until {
            Some(_) => RecvFlags::DONTWAIT,
            None => RecvFlags::empty(),
        };
        match receive(socket, &mut bytes[filled..], how, flags) {
            Ok(0) => return false,
            Ok(bytes) => filled += bytes,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                std::hint::spin_loop();
                spin_until = spin_until.filter(|end| Instant::now() < *end);
            }
            Err(_) => return false,
        }
    }
    true
}
