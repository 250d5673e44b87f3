//! The client's end, the same for floor and subject: one send, then a receive of the whole answer, in one
//! thread, without a library in between.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use protos::vfio_user::{
    Command, Header, MessageFlags, RegionAccess, RegionIndex, RegionInfo, VERSION_MAJOR, VERSION_MINOR,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of data in each access.
pub const DATA: usize = 4;
/// A REGION_READ, and an answer to a REGION_WRITE.
pub const SHORT: usize = Header::SIZE + size_of::<RegionAccess>();
/// A REGION_WRITE, and an answer to a REGION_READ.
pub const LONG: usize = SHORT + DATA;
/// An answer that takes longer does not come.
const LIMIT: Duration = Duration::from_secs(10);

/// A connected socket.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
    /// Ask again and again instead of sleeping.
    poll: bool,
}

impl Wire {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path, poll: bool) -> Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).context("socket")?;
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT)).context("SO_RCVTIMEO")?;
        set_socket_timeout(&socket, Timeout::Send, Some(LIMIT)).context("SO_SNDTIMEO")?;
        let address = SocketAddrUnix::new(path).context("socket path")?;
        connect(&socket, &address).with_context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Self { socket, poll })
    }

    /// Sends all of it.
    ///
    /// # Errors
    /// The other end is gone or does not read.
    pub fn send(&self, message: &[u8]) -> Result<()> {
        let mut sent = 0;
        while sent < message.len() {
            sent += retry_on_intr(|| send(&self.socket, &message[sent..], SendFlags::NOSIGNAL))
                .context("the other end does not take a message")?;
        }
        Ok(())
    }

    /// Fills `answer`.
    ///
    /// # Errors
    /// The other end is gone or does not answer.
    pub fn receive(&self, answer: &mut [u8]) -> Result<()> {
        let deadline = self.poll.then(|| Instant::now() + LIMIT);
        let flags = match self.poll {
            true => RecvFlags::DONTWAIT,
            false => RecvFlags::empty(),
        };
        let mut filled = 0;
        while filled < answer.len() {
            match recv(&self.socket, &mut answer[filled..], flags) {
                Ok((_, 0)) => bail!("the other end has closed the connection"),
                Ok((_, bytes)) => filled += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if deadline.is_some_and(|end| Instant::now() < end) => {
                    std::hint::spin_loop();
                }
                Err(errno) => return Err(errno).context("the other end does not answer"),
            }
        }
        Ok(())
    }
}

/// The messages of one access: what is sent, and how long the answer is.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// Whole message.
    pub request: Vec<u8>,
    /// Bytes of the answer; 0 = none comes.
    pub answer: usize,
}

/// Where a server is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Region number.
    pub region: u32,
    /// Offset in it.
    pub offset: u64,
}

fn message(command: Command, flags: MessageFlags, body: &[u8]) -> Vec<u8> {
    let mut message = Header::command(7, command, body.len(), flags).as_bytes().to_vec();
    message.extend_from_slice(body);
    message
}

fn head(place: Place) -> RegionAccess {
    RegionAccess {
        offset: place.offset,
        region: place.region,
        count: DATA as u32,
    }
}

/// REGION_READ of 4 bytes.
pub fn read(place: Place) -> Exchange {
    Exchange {
        request: message(
            Command::REGION_READ,
            MessageFlags::COMMAND,
            head(place).as_bytes(),
        ),
        answer: LONG,
    }
}

/// REGION_WRITE of 4 zero bytes, answered or posted.
pub fn write(place: Place, posted: bool) -> Exchange {
    let mut body = head(place).as_bytes().to_vec();
    body.extend_from_slice(&[0; DATA]);
    let flags = if posted {
        MessageFlags::NO_REPLY
    } else {
        MessageFlags::COMMAND
    };
    Exchange {
        request: message(Command::REGION_WRITE, flags, &body),
        answer: if posted { 0 } else { SHORT },
    }
}

impl Wire {
    /// Asks a vfio-user server something; the answer's payload.
    fn ask(&self, command: Command, body: &[u8]) -> Result<Vec<u8>> {
        self.send(&message(command, MessageFlags::COMMAND, body))?;
        let mut bytes = [0; Header::SIZE];
        self.receive(&mut bytes)?;
        let header = Header::read_from_bytes(&bytes).expect("16 bytes are a header");
        let len = header.payload_len(1 << 20).context("an answer's size")?;
        let mut payload = vec![0; len];
        self.receive(&mut payload)?;
        ensure!(
            !header.flags.contains(MessageFlags::ERROR),
            "{command} is refused with errno {}",
            header.error
        );
        Ok(payload)
    }

    /// Agrees on the version and turns the device's memory decoding on.
    ///
    /// # Errors
    /// The server refuses.
    pub fn negotiate(&self) -> Result<()> {
        let mut version = [VERSION_MAJOR, VERSION_MINOR].as_bytes().to_vec();
        version.extend_from_slice(b"{\"capabilities\":{\"max_msg_fds\":1}}\0");
        self.ask(Command::VERSION, &version)?;
        let mut body = RegionAccess {
            offset: 4,
            region: RegionIndex::CONFIG.0,
            count: 2,
        }
        .as_bytes()
        .to_vec();
        // PCI command register: memory space enable.
        body.extend_from_slice(&2u16.to_le_bytes());
        self.ask(Command::REGION_WRITE, &body)?;
        Ok(())
    }

    /// A place of an unknown server where 4 bytes can be read and written.
    ///
    /// # Errors
    /// There is none at the start of a BAR.
    pub fn find_place(&self) -> Result<Place> {
        for region in 0..6 {
            let request = RegionInfo {
                argsz: RegionInfo::SIZE as u32,
                flags: Default::default(),
                index: RegionIndex(region),
                cap_offset: 0,
                size: 0,
                offset: 0,
            };
            let place = Place { region, offset: 0 };
            let Ok(payload) = self.ask(Command::DEVICE_GET_REGION_INFO, request.as_bytes()) else {
                continue;
            };
            let size = RegionInfo::read_from_prefix(&payload).map_or(0, |(info, _)| info.size);
            if size < DATA as u64 || self.ask(Command::REGION_READ, head(place).as_bytes()).is_err() {
                continue;
            }
            let mut body = head(place).as_bytes().to_vec();
            body.extend_from_slice(&[0; DATA]);
            if self.ask(Command::REGION_WRITE, &body).is_ok() {
                return Ok(place);
            }
        }
        bail!("no BAR takes 4-byte accesses at its start")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_messages_when_built_have_the_sizes_that_the_floor_repeats() {
        let place = Place {
            region: 0,
            offset: 0x8000,
        };
        let sizes = |exchange: Exchange| (exchange.request.len(), exchange.answer);
        assert_eq!(sizes(read(place)), (32, 36));
        assert_eq!(sizes(write(place, false)), (36, 32));
        assert_eq!(sizes(write(place, true)), (36, 0));
    }
}
