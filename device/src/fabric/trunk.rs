//! Fabrics of several processes as one, over sockets: a star around the process with the subnet manager.
//!
//! A trunk carries packets as on a wire. While it is down, packets are lost, as with a cable that is pulled: queue
//! pairs notice by their timers. It is made again by the one that connects, which keeps its LIDs
//! unless others have been given them meanwhile.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use protos::ib::Lid;
use protos::ib::trunk::{FrameHeader, Hello, LONGEST, MAGIC, PortRecord, VERSION, Welcome, kind};
use zerocopy::{FromBytes, IntoBytes};

use super::adapter::{PortChange, PortEvents};
use super::inbox::{Inbox, Wake};
use super::subnet::PortEntry;
use super::switch::{Shared, Target};
use super::wire::{decode, encode};
use crate::transport::Packet;

#[cfg(test)]
mod tests;

/// The other side must introduce itself by then.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Between attempts to connect.
const RETRY: Duration = Duration::from_millis(200);
/// An idle writer looks whether it should end.
const IDLE: Duration = Duration::from_millis(500);
/// A packet from the trunk waits so long for room in an inbox; then it is lost.
const ROOM: Duration = Duration::from_secs(2);

/// Where a fabric is: `inside` (this process only), `listen:ADDRESS` (this process has the subnet manager and others
/// join it) or `ADDRESS` (join that one). An address is `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum FabricUrl {
    /// This process only.
    #[default]
    Inside,
    /// Others join.
    Listen(Address),
    /// Join others.
    Connect(Address),
}

/// A socket's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A path.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

/// A text that names no fabric.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("{0:?} names no fabric: use inside, [listen:]unix:PATH or [listen:]tcp:HOST:PORT")]
pub struct UrlError(String);

impl FromStr for FabricUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        if text == "inside" {
            return Ok(Self::Inside);
        }
        let (listen, address) = match text.strip_prefix("listen:") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let address = match address.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Address::Unix(path.into()),
            Some(("tcp", host)) if host.contains(':') => Address::Tcp(host.into()),
            _ => return Err(UrlError(text.into())),
        };
        Ok(if listen {
            Self::Listen(address)
        } else {
            Self::Connect(address)
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host) => write!(f, "tcp:{host}"),
        }
    }
}

/// Why a fabric could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TrunkError {
    /// Nobody can listen there.
    #[error("cannot listen on {0}: {1}")]
    Listen(Address, #[source] io::Error),
    /// No thread.
    #[error("cannot start a thread for the fabric: {0}")]
    Thread(#[source] io::Error),
}

/// Wakes a thread of this module.
#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    condition: Condvar,
}

impl Wake for Bell {
    fn wake(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.condition.notify_one();
    }
}

impl Bell {
    fn wait(&self, limit: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rung, _) = self
            .condition
            .wait_timeout_while(rung, limit, |rung| !*rung)
            .unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

/// Both kinds of sockets.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(host) => {
                let stream = TcpStream::connect(host.as_str())?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
        })
    }
    fn clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }
    fn read_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(limit),
            Self::Tcp(stream) => stream.set_read_timeout(limit),
        }
    }
    fn end(&self) {
        // (It may have ended by itself.)
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(from),
            Self::Tcp(stream) => stream.write(from),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Listener {
    fn new(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Unix(path) => {
                remove_dead(path);
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Self::Unix(listener, path.clone())
            }
            Address::Tcp(host) => Self::Tcp(TcpListener::bind(host.as_str())?),
        })
    }
    fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(listener, _) => Stream::Unix(listener.accept()?.0),
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        })
    }
    /// As others reach it.
    fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Unix(_, path) => Address::Unix(path.clone()),
            Self::Tcp(listener) => Address::Tcp(listener.local_addr()?.to_string()),
        })
    }
}

/// A socket that nobody listens on any more makes room.
fn remove_dead(path: &Path) {
    if UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        // (If that fails, bind says so.)
        let _ = std::fs::remove_file(path);
    }
}

/// What ends with the fabric.
#[derive(Debug, Default)]
struct Ends {
    stop: AtomicBool,
    bell: Bell,
    /// Sockets in use.
    streams: Mutex<Vec<Stream>>,
}

impl Ends {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
    fn streams(&self) -> std::sync::MutexGuard<'_, Vec<Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of a fabric's trunks. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Trunks {
    ends: Arc<Ends>,
    /// Where a listener is reached.
    pub(super) address: Option<Address>,
    thread: Option<JoinHandle<()>>,
}

impl Trunks {
    pub(super) fn listen(shared: &Arc<Shared>, address: &Address) -> Result<Self, TrunkError> {
        let failed = |error| TrunkError::Listen(address.clone(), error);
        let listener = Listener::new(address).map_err(failed)?;
        let reached = listener.address().map_err(failed)?;
        let ends = Arc::new(Ends::default());
        let (shared, others) = (Arc::downgrade(shared), ends.clone());
        let thread = std::thread::Builder::new()
            .name("fabric".into())
            .spawn(move || accept_all(&shared, &listener, &others))
            .map_err(TrunkError::Thread)?;
        Ok(Self {
            ends,
            address: Some(reached),
            thread: Some(thread),
        })
    }

    pub(super) fn connect(shared: &Arc<Shared>, address: &Address) -> Result<Self, TrunkError> {
        let ends = Arc::new(Ends::default());
        let (shared, others, address) = (Arc::downgrade(shared), ends.clone(), address.clone());
        let thread = std::thread::Builder::new()
            .name("fabric".into())
            .spawn(move || connect_again(&shared, &address, &others))
            .map_err(TrunkError::Thread)?;
        Ok(Self {
            ends,
            address: None,
            thread: Some(thread),
        })
    }

    /// Pulls every cable; those that connect come back.
    pub(super) fn pull(&self) {
        for stream in self.ends.streams().iter() {
            stream.end();
        }
    }
}

impl Drop for Trunks {
    fn drop(&mut self) {
        self.ends.stop.store(true, Ordering::Release);
        self.ends.bell.wake();
        self.pull();
        if let Some(address) = &self.address {
            // Gets a waiting accept out.
            let _ = Stream::connect(address);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(Address::Unix(path)) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn accept_all(shared: &Weak<Shared>, listener: &Listener, ends: &Arc<Ends>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    while !ends.stopped() {
        let stream = match listener.accept() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "the fabric's socket accepts nobody");
                ends.bell.wait(RETRY);
                continue;
            }
        };
        threads.retain(|thread| !thread.is_finished());
        let (shared, others) = (shared.clone(), ends.clone());
        let spawned = std::thread::Builder::new()
            .name("fabric-trunk".into())
            .spawn(move || {
                if let Err(error) = serve(&shared, stream, &others) {
                    tracing::info!(%error, "a process left the fabric");
                }
            });
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => tracing::error!(%error, "no thread for a process that joins the fabric"),
        }
    }
    for stream in ends.streams().iter() {
        stream.end();
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn connect_again(shared: &Weak<Shared>, address: &Address, ends: &Arc<Ends>) {
    let mut block = 0;
    let mut said = false;
    while !ends.stopped() {
        match Stream::connect(address) {
            Ok(stream) => {
                said = false;
                if let Err(error) = join(shared, stream, ends, &mut block) {
                    tracing::info!(%error, %address, "the trunk of the fabric is down");
                }
            }
            Err(error) if !said => {
                tracing::warn!(%error, %address, "the fabric is not there yet; trying again");
                said = true;
            }
            Err(_) => {}
        }
        if !ends.stopped() {
            ends.bell.wait(RETRY);
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn write_frame(out: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let header = FrameHeader {
        len: (payload.len() as u32).into(),
        kind,
        ..FrameHeader::default()
    };
    out.write_all(header.as_bytes())?;
    out.write_all(payload)
}

/// A frame's kind; its payload in `into`.
fn read_frame(from: &mut impl Read, into: &mut Vec<u8>) -> io::Result<u8> {
    let mut header = FrameHeader::default();
    from.read_exact(header.as_mut_bytes())?;
    let len = header.len.get() as usize;
    if len > LONGEST {
        return Err(invalid("a frame of the trunk is too long"));
    }
    into.resize(len, 0);
    from.read_exact(into)?;
    Ok(header.kind)
}

fn expect<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(
    from: &mut impl Read,
    kind: u8,
) -> io::Result<T> {
    let mut payload = Vec::new();
    if read_frame(from, &mut payload)? != kind {
        return Err(invalid("the other side of the trunk does not introduce itself"));
    }
    T::read_from_bytes(&payload).map_err(|_| invalid("the introduction has another length"))
}

/// The listening side.
fn serve(shared: &Weak<Shared>, mut stream: Stream, ends: &Arc<Ends>) -> io::Result<()> {
    stream.read_limit(Some(HANDSHAKE))?;
    let hello: Hello = expect(&mut stream, kind::HELLO)?;
    if hello.magic.get() != MAGIC || hello.version.get() != VERSION {
        return Err(invalid(
            "the other side speaks another version of the trunk's protocol",
        ));
    }
    let Some(strong) = shared.upgrade() else {
        return Ok(());
    };
    let bell = Arc::new(Bell::default());
    let inbox = Arc::new(Inbox::new(bell.clone()));
    let (welcome, block) = {
        // Chosen and taken at once, or two that ask for one block get it. And before the other side hears that it is
        // up: what is sent to it from then on has a way.
        let mut state = strong.lock();
        let routes = state.routes.clone();
        let taken = |block: u16| matches!(routes.target(Lid(block)), Some(Target::Trunk(_)));
        let block = state
            .subnet
            .block(hello.block.get(), taken)
            .ok_or_else(|| invalid("no LIDs are left"))?;
        strong.change(&mut state, |routes| {
            routes.trunks.push(inbox.clone());
            for lid in block.0..block.1 {
                routes.set(Lid(lid), Some(Target::Trunk(inbox.clone())));
            }
        });
        let welcome = Welcome {
            magic: MAGIC.into(),
            version: VERSION.into(),
            manager: state.subnet.manager.0.into(),
            first: block.0.into(),
            end: block.1.into(),
            reserved: 0.into(),
            prefix: state.subnet.prefix.into(),
        };
        (welcome, block)
    };
    drop(strong);
    let result = write_frame(&mut stream, kind::WELCOME, welcome.as_bytes())
        .and_then(|()| carry(shared, stream, ends, &inbox, &bell, Some(block)));
    inbox.close();
    if let Some(strong) = shared.upgrade() {
        let mut state = strong.lock();
        forget_ports(&mut state.subnet, block);
        strong.change(&mut state, |routes| {
            routes.trunks.retain(|other| !Arc::ptr_eq(other, &inbox));
            for lid in block.0..block.1 {
                let mine =
                    matches!(routes.target(Lid(lid)), Some(Target::Trunk(t)) if Arc::ptr_eq(t, &inbox));
                if mine {
                    routes.set(Lid(lid), None);
                }
            }
        });
    }
    result
}

/// Ports of a process that is gone, and what they had joined.
fn forget_ports(subnet: &mut super::subnet::Subnet, block: (u16, u16)) {
    let gone: Vec<_> = subnet
        .ports
        .iter()
        .filter(|port| port.local.is_none() && (block.0..block.1).contains(&port.lid.0))
        .map(|port| port.gid)
        .collect();
    for gid in gone {
        subnet.leave(gid);
    }
}

/// The connecting side.
fn join(shared: &Weak<Shared>, mut stream: Stream, ends: &Arc<Ends>, block: &mut u16) -> io::Result<()> {
    stream.read_limit(Some(HANDSHAKE))?;
    let hello = Hello {
        magic: MAGIC.into(),
        version: VERSION.into(),
        block: (*block).into(),
        ..Hello::default()
    };
    write_frame(&mut stream, kind::HELLO, hello.as_bytes())?;
    let welcome: Welcome = expect(&mut stream, kind::WELCOME)?;
    if welcome.magic.get() != MAGIC || welcome.version.get() != VERSION {
        return Err(invalid(
            "the other side speaks another version of the trunk's protocol",
        ));
    }
    let (first, end) = (welcome.first.get(), welcome.end.get());
    if first == 0 || end <= first || end > Lid::LAST_UNICAST.0 {
        return Err(invalid("the other side gives no LIDs"));
    }
    *block = first;
    let Some(strong) = shared.upgrade() else {
        return Ok(());
    };
    let bell = Arc::new(Bell::default());
    let inbox = Arc::new(Inbox::new(bell.clone()));
    let mut changed: Vec<(Arc<dyn PortEvents>, u8, PortChange)> = Vec::new();
    {
        let mut state = strong.lock();
        state.subnet.manager = Lid(welcome.manager.get());
        state.subnet.lids = (first, end);
        let ports = state.routes.ports.clone();
        for at in 0..state.subnet.ports.len() {
            let old = state.subnet.ports[at].lid;
            if (first..end).contains(&old.0) {
                continue;
            }
            state.subnet.ports[at].lid = Lid::NONE;
            let Some(new) = state.subnet.free_lid() else {
                tracing::error!("more ports than the fabric has LIDs for; one stays down");
                continue;
            };
            let entry = &mut state.subnet.ports[at];
            entry.lid = new;
            if let Some(port) = ports.iter().find(|port| port.gid == entry.gid) {
                port.lid.store(new.0, Ordering::Relaxed);
            }
            if let Some((events, number)) = entry
                .local
                .as_ref()
                .and_then(|local| Some((local.events.clone()?, local.number)))
            {
                let change = if old == Lid::NONE {
                    PortChange::Up
                } else {
                    PortChange::LidChanged
                };
                changed.push((events, number, change));
            }
        }
        strong.change(&mut state, |routes| {
            routes.unicast.clear();
            for port in &ports {
                let lid = Lid(port.lid.load(Ordering::Relaxed));
                if lid != Lid::NONE {
                    routes.set(lid, Some(Target::Port(port.clone())));
                }
            }
            routes.default = Some(Target::Trunk(inbox.clone()));
            routes.trunks = vec![inbox.clone()];
        });
    }
    drop(strong);
    for (events, number, change) in changed {
        events.changed(number, change);
    }
    let result = carry(shared, stream, ends, &inbox, &bell, None);
    // (The closed inbox stays the default route: what is sent meanwhile is lost.)
    inbox.close();
    result
}

/// Packets in both directions, until one of them ends.
fn carry(
    shared: &Weak<Shared>,
    stream: Stream,
    ends: &Arc<Ends>,
    inbox: &Arc<Inbox>,
    bell: &Arc<Bell>,
    block: Option<(u16, u16)>,
) -> io::Result<()> {
    stream.read_limit(None)?;
    ends.streams().push(stream.clone()?);
    // Stop may have come before this stream was in the list.
    if ends.stopped() {
        stream.end();
    }
    let writer = {
        let (shared, inbox, bell, out) = (shared.clone(), inbox.clone(), bell.clone(), stream.clone()?);
        std::thread::Builder::new()
            .name("fabric-send".into())
            .spawn(move || {
                let result = write_all(&shared, &inbox, &bell, &out);
                // The reader is to end, too.
                out.end();
                result
            })?
    };
    let result = read_all(shared, &stream, inbox, block);
    stream.end();
    inbox.close();
    bell.wake();
    let written = writer.join().unwrap_or(Ok(()));
    ends.streams().retain(|other| !same(other, &stream));
    result.and(written)
}

/// Whether two descriptors are of one socket: they have the same inode.
fn same(a: &Stream, b: &Stream) -> bool {
    let inode = |stream: &Stream| match stream {
        Stream::Unix(stream) => rustix::fs::fstat(stream).map(|stat| stat.st_ino),
        Stream::Tcp(stream) => rustix::fs::fstat(stream).map(|stat| stat.st_ino),
    };
    matches!((inode(a), inode(b)), (Ok(a), Ok(b)) if a == b)
}

fn write_all(shared: &Weak<Shared>, inbox: &Inbox, bell: &Bell, out: &Stream) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(256 << 10, out.clone()?);
    let mut queue: VecDeque<Packet> = VecDeque::new();
    let mut bytes = Vec::new();
    let mut told = 0;
    loop {
        if inbox.is_closed() {
            return Ok(());
        }
        {
            let Some(strong) = shared.upgrade() else {
                return Ok(());
            };
            let version = strong.version.load(Ordering::Acquire);
            if version != told {
                told = version;
                let records: Vec<PortRecord> = strong
                    .lock()
                    .subnet
                    .ports
                    .iter()
                    .filter(|port| port.local.is_some() && port.lid != Lid::NONE)
                    .map(|port| PortRecord {
                        gid: port.gid,
                        lid: port.lid.0.into(),
                        reserved: 0.into(),
                    })
                    .collect();
                write_frame(&mut out, kind::PORTS, records.as_bytes())?;
            }
            inbox.take(&mut queue);
            let mut result = Ok(());
            for packet in queue.drain(..) {
                packet.cut(&strong.pool, |one| {
                    bytes.clear();
                    if result.is_ok() && encode(&one, &mut bytes) {
                        result = write_frame(&mut out, kind::PACKET, &bytes);
                    }
                });
            }
            result?;
        }
        out.flush()?;
        bell.wait(IDLE);
    }
}

fn read_all(
    shared: &Weak<Shared>,
    stream: &Stream,
    inbox: &Arc<Inbox>,
    block: Option<(u16, u16)>,
) -> io::Result<()> {
    let mut from = BufReader::with_capacity(256 << 10, stream.clone()?);
    let mut payload = Vec::new();
    let room = Arc::new(Bell::default());
    loop {
        let kind = read_frame(&mut from, &mut payload)?;
        let Some(strong) = shared.upgrade() else {
            return Ok(());
        };
        match kind {
            kind::PACKET => match decode(&payload, &strong.pool) {
                Ok(packet) => {
                    let routes = strong.lock().routes.clone();
                    deliver(&strong, &routes, packet, inbox, &room);
                }
                Err(error) => tracing::warn!(%error, "a packet from the trunk is dropped"),
            },
            kind::PORTS => {
                if let Some(block) = block {
                    learn(&strong, &payload, block);
                }
            }
            _ => {}
        }
    }
}

/// To a port of this process, waiting for room: the sender's window is what limits it.
fn deliver(
    shared: &Shared,
    routes: &super::switch::Routes,
    packet: Packet,
    from: &Arc<Inbox>,
    room: &Arc<Bell>,
) {
    let Some(Target::Port(port)) = routes.target(packet.dlid).filter(|_| !packet.dlid.is_multicast()) else {
        shared.inject(routes, packet, Some(from));
        return;
    };
    let wake: Arc<dyn Wake> = room.clone();
    let mut packet = packet;
    // One wake may be for room that another sender took.
    for _ in 0..8 {
        match super::switch::deliver(port, packet, Some(&wake)) {
            Ok(()) => return,
            Err(back) => packet = back,
        }
        room.wait(ROOM / 8);
    }
    port.counters.discarded.fetch_add(1, Ordering::Relaxed);
}

/// Ports of the other process: for path records and joins.
fn learn(shared: &Shared, payload: &[u8], block: (u16, u16)) {
    let Ok(records) = <[PortRecord]>::ref_from_bytes(payload) else {
        tracing::warn!("a list of ports from the trunk has an odd length; it is ignored");
        return;
    };
    let mut state = shared.lock();
    let subnet = &mut state.subnet;
    let listed = |gid| records.iter().any(|record| record.gid == gid);
    let gone: Vec<_> = subnet
        .ports
        .iter()
        .filter(|port| port.local.is_none() && (block.0..block.1).contains(&port.lid.0) && !listed(port.gid))
        .map(|port| port.gid)
        .collect();
    for gid in gone {
        subnet.leave(gid);
    }
    for record in records.iter().take(usize::from(super::subnet::BLOCK)) {
        let lid = Lid(record.lid.get());
        if !(block.0..block.1).contains(&lid.0) {
            continue;
        }
        match subnet.ports.iter_mut().find(|port| port.gid == record.gid) {
            Some(known) if known.local.is_none() => known.lid = lid,
            // Its GID is one of ours, or a third one's: whoever had it first keeps it.
            Some(_) => {}
            None => subnet.ports.push(PortEntry {
                gid: record.gid,
                lid,
                local: None,
            }),
        }
    }
}
