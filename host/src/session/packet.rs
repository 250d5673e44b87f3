//! Packets of the control and notice sockets: bytes and file descriptors, received and sent whole.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protos::bridge::control::{MAX_FDS, MAX_PACKET};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One packet. Its file descriptors close when it is dropped, whatever the bytes were.
#[derive(Debug)]
pub struct Packet {
    /// The bytes, at most [`MAX_PACKET`].
    pub bytes: Vec<u8>,
    /// At most [`MAX_FDS`] descriptors, all close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Why a packet could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The other side has closed the socket.
    #[error("the other side has hung up")]
    HungUp,
    /// The packet was longer than the protocol allows.
    #[error("packet longer than {MAX_PACKET} bytes; split it")]
    TooLong,
    /// More descriptors than the protocol allows. None of them has been kept.
    #[error("more than {MAX_FDS} file descriptors with one packet")]
    TooManyFds,
    /// The socket failed; `WouldBlock` = nothing there now.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Takes the next packet. Does not wait: `Io(WouldBlock)` when there is none.
///
/// # Errors
/// [`PacketError`]. After `TooLong` and `TooManyFds` the socket can go on: the packet has been consumed.
pub fn receive(socket: impl AsFd) -> Result<Packet, PacketError> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )
    .map_err(io::Error::from)?;
    // Owned before any check, so that a refused packet leaks nothing.
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Err(PacketError::TooManyFds);
    }
    if got.flags.contains(ReturnFlags::TRUNC) {
        return Err(PacketError::TooLong);
    }
    if got.bytes == 0 {
        return Err(PacketError::HungUp);
    }
    bytes.truncate(got.bytes);
    Ok(Packet { bytes, fds })
}

/// Sends one packet. Does not wait: `WouldBlock` when the receiver's queue is full.
///
/// # Errors
/// `InvalidInput` for a message longer than [`MAX_PACKET`], else the socket's error.
pub fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a packet of {} bytes and {} descriptors does not fit",
                bytes.len(),
                fds.len()
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        let pushed = ancillary.push(SendAncillaryMessage::ScmRights(fds));
        assert!(pushed, "the space was made for {MAX_FDS} descriptors");
    }
    sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )?;
    Ok(())
}

/// Reads a message out of a packet's bytes.
///
/// # Errors
/// What serde says about malformed bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}

/// A connected pair of SEQPACKET sockets: (ours, theirs). Both block by themselves, as the other side expects;
/// [`send`] and [`receive`] do not wait whatever the mode.
///
/// # Errors
/// The file limit.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protos::bridge::control::Request;

    #[test]
    fn test_packet_when_sent_with_descriptors_arrives_whole() {
        let (a, b) = pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send(
            &a,
            &Request::AddMemory { len: 4096 },
            &[null.as_fd(), null.as_fd()],
        )
        .unwrap();
        let packet = receive(&b).unwrap();
        assert_eq!(packet.fds.len(), 2);
        assert_eq!(
            decode::<Request>(&packet.bytes).unwrap(),
            Request::AddMemory { len: 4096 }
        );
        assert!(matches!(receive(&b), Err(PacketError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock));
        drop(a);
        assert!(matches!(receive(&b), Err(PacketError::HungUp)));
    }

    #[test]
    fn test_packet_when_it_carries_too_many_descriptors_keeps_none() {
        let (a, b) = pair().unwrap();
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let many = vec![write.as_fd(); MAX_FDS + 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 5))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&a, &[IoSlice::new(b"{}")], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(receive(&b), Err(PacketError::TooManyFds)));
        // A copy of the write end that was kept would keep this read waiting instead of ending it.
        drop(write);
        assert_eq!(rustix::io::read(&read, &mut [0; 1]).unwrap(), 0);
        send(&a, &Request::Stats, &[]).unwrap();
        assert_eq!(
            decode::<Request>(&receive(&b).unwrap().bytes).unwrap(),
            Request::Stats
        );
    }

    #[test]
    fn test_packet_when_too_long_is_consumed_and_refused() {
        let (a, b) = pair().unwrap();
        rustix::io::write(&a, &vec![b'x'; MAX_PACKET + 1]).unwrap();
        assert!(matches!(receive(&b), Err(PacketError::TooLong)));
        assert!(matches!(receive(&b), Err(PacketError::Io(_))));
    }
}
