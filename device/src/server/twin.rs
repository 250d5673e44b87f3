//! The twin socket: the server's commands and their answers, apart from the client's.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use protos::vfio_user::{MessageFlags, MessageType};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use zerocopy::IntoBytes;

use super::ServerOptions;
use super::connection::longest_message;
use super::frame::{Ended, Fds, Receiver};
use super::requests::{Outgoing, Requests, this_thread_serves};

/// Two ends: ours and the client's.
pub(super) fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// The thread that reads the answers.
#[derive(Debug)]
pub(super) struct Twin {
    out: Arc<Outgoing>,
    thread: JoinHandle<()>,
}

impl Twin {
    pub(super) fn start(
        out: Arc<Outgoing>,
        requests: &Arc<Requests>,
        options: ServerOptions,
    ) -> Result<Self, Ended> {
        let (on_thread, requests) = (Arc::clone(&out), Arc::clone(requests));
        let thread = std::thread::Builder::new()
            .name("vfio-user-twin".into())
            .spawn(move || {
                this_thread_serves();
                let reason = read_answers(&on_thread, &requests, &options);
                tracing::debug!(%reason, "twin socket ended");
                // The client is asked nothing any more; its own commands go on being served.
                requests.close();
            })
            .map_err(|error| {
                let errno = error.raw_os_error().map(Errno::from_raw_os_error);
                Ended::Socket(errno.unwrap_or(Errno::NOMEM))
            })?;
        Ok(Self { out, thread })
    }

    /// End it.
    pub(super) fn join(self) {
        let _ = shutdown(&**self.out.socket(), Shutdown::Both);
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

fn read_answers(out: &Outgoing, requests: &Requests, options: &ServerOptions) -> Ended {
    let mut fds = Fds::default();
    let mut receiver = Receiver::new(options.busy_poll);
    loop {
        if let Err(ended) = read_answer(out, requests, options, &mut fds, &mut receiver) {
            return ended;
        }
    }
}

fn read_answer(
    out: &Outgoing,
    requests: &Requests,
    options: &ServerOptions,
    fds: &mut Fds,
    receiver: &mut Receiver,
) -> Result<(), Ended> {
    let timeout = options.client_timeout;
    let header = receiver.next(out.socket(), fds, timeout)?;
    let len = header.payload_len(longest_message(options.max_data_xfer_size))?;
    let body = receiver.body(out.socket(), len, fds, timeout)?;
    if header.flags.message_type() == MessageType::Reply {
        if !requests.deliver(&header, body) {
            tracing::debug!(id = header.message_id, command = %header.command, "an answer to nothing");
        }
        return Ok(());
    }
    if header.flags.contains(MessageFlags::NO_REPLY) {
        return Ok(());
    }
    // Commands of the client belong on the other socket.
    let refused = header.error_reply(Errno::NOTSUP.raw_os_error() as u32);
    out.send(refused.as_bytes(), &[])
}
