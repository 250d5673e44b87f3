//! Memory that a device reaches by asking: the server's DMA_READ and DMA_WRITE.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protos::vfio_user::{Command, DmaAccess, Header, MessageFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::backing::DmaProt;

/// Memory without a file. Called on the client's own thread, with the map locked: an unmap waits for a
/// running access, and none comes after it has returned.
pub trait MessageMemory: Send + Sync + std::fmt::Debug {
    /// Read from `offset` of the mapping, inside it.
    ///
    /// # Errors
    /// What the device's access fails with.
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno>;
    /// Write.
    ///
    /// # Errors
    /// What the device's access fails with.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno>;
}

/// As long as the mapping, or longer.
impl MessageMemory for Mutex<Vec<u8>> {
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let bytes = self.lock().unwrap_or_else(PoisonError::into_inner);
        let from = usize::try_from(offset)
            .ok()
            .and_then(|at| bytes.get(at..)?.get(..to.len()));
        to.copy_from_slice(from.ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let mut bytes = self.lock().unwrap_or_else(PoisonError::into_inner);
        let to = usize::try_from(offset)
            .ok()
            .and_then(|at| bytes.get_mut(at..)?.get_mut(..from.len()));
        to.ok_or(Errno::FAULT)?.copy_from_slice(from);
        Ok(())
    }
}

#[derive(Debug)]
struct Mapped {
    len: u64,
    prot: DmaProt,
    memory: Arc<dyn MessageMemory>,
}

/// What the device may ask for, by IOVA.
#[derive(Debug, Default)]
pub(super) struct MemoryMap {
    maps: Mutex<BTreeMap<u64, Mapped>>,
    /// Most data bytes of one request.
    limit: u64,
}

impl MemoryMap {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            maps: Mutex::default(),
            limit: limit as u64,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapped>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when something is there already.
    pub(super) fn insert(&self, iova: u64, len: u64, memory: Arc<dyn MessageMemory>, prot: DmaProt) -> bool {
        let mut maps = self.lock();
        let end = iova.saturating_add(len);
        let before = maps.range(..end).next_back();
        if before.is_some_and(|(start, map)| start.saturating_add(map.len) > iova) {
            return false;
        }
        maps.insert(iova, Mapped { len, prot, memory });
        true
    }

    /// What begins in the range.
    pub(super) fn remove(&self, iova: u64, len: u64) {
        let end = iova.saturating_add(len);
        self.lock().retain(|start, _| !(iova..end).contains(start));
    }

    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    /// The reply to a command of the server's, header and all; none when it wants none.
    pub(super) fn answer(&self, request: &Header, body: &[u8]) -> Option<Vec<u8>> {
        let outcome = match request.command {
            Command::DMA_READ => self.read(body),
            Command::DMA_WRITE => self.write(body),
            _ => Err(Errno::NOTSUP),
        };
        if request.flags.contains(MessageFlags::NO_REPLY) {
            return None;
        }
        Some(match outcome {
            Ok(payload) => [request.reply(payload.len()).as_bytes(), &payload].concat(),
            Err(errno) => request
                .error_reply(errno.raw_os_error() as u32)
                .as_bytes()
                .to_vec(),
        })
    }

    fn read(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let access = DmaAccess::read_from_bytes(body).map_err(|_| Errno::INVAL)?;
        self.access(
            access,
            |prot| prot.read,
            |memory, at| {
                // Below the limit: checked.
                let mut payload = vec![0; DmaAccess::SIZE + access.count as usize];
                let (head, data) = payload.split_at_mut(DmaAccess::SIZE);
                head.copy_from_slice(access.as_bytes());
                memory.read(at, data)?;
                Ok(payload)
            },
        )
    }

    fn write(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (access, data) = DmaAccess::read_from_prefix(body).map_err(|_| Errno::INVAL)?;
        if data.len() as u64 != access.count {
            return Err(Errno::INVAL);
        }
        self.access(
            access,
            |prot| prot.write,
            |memory, at| {
                memory.write(at, data)?;
                Ok(access.as_bytes().to_vec())
            },
        )
    }

    fn access(
        &self,
        access: DmaAccess,
        permitted: impl Fn(DmaProt) -> bool,
        act: impl FnOnce(&dyn MessageMemory, u64) -> Result<Vec<u8>, Errno>,
    ) -> Result<Vec<u8>, Errno> {
        if access.count > self.limit {
            return Err(Errno::TOOBIG);
        }
        let maps = self.lock();
        let end = access.address.checked_add(access.count).ok_or(Errno::INVAL)?;
        let (start, map) = maps
            .range(..=access.address)
            .next_back()
            .filter(|(start, map)| end <= start.saturating_add(map.len))
            .ok_or(Errno::NOENT)?;
        if !permitted(map.prot) {
            return Err(Errno::ACCESS);
        }
        act(&*map.memory, access.address - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(map: &MemoryMap, command: Command, address: u64, count: u64, data: &[u8]) -> (u32, Vec<u8>) {
        let body = [DmaAccess { address, count }.as_bytes(), data].concat();
        let request = Header::command(7, command, body.len(), MessageFlags::COMMAND);
        let reply = map.answer(&request, &body).expect("a reply");
        let (header, payload) = Header::read_from_prefix(&reply).unwrap();
        assert_eq!(
            (header.message_id, header.message_size as usize),
            (7, reply.len())
        );
        (header.error, payload.to_vec())
    }

    #[test]
    fn test_answer_when_the_access_is_inside_a_mapping_moves_the_bytes() {
        let map = MemoryMap::new(64);
        let memory = Arc::new(Mutex::new(vec![5u8; 0x1000]));
        let shared: Arc<dyn MessageMemory> = Arc::clone(&memory) as _;
        assert!(map.insert(0x1000, 0x1000, shared, DmaProt::READ_WRITE));
        let (error, reply) = ask(&map, Command::DMA_WRITE, 0x1ffe, 2, &[8, 9]);
        assert_eq!((error, reply.len()), (0, 16));
        let (error, reply) = ask(&map, Command::DMA_READ, 0x1ffd, 3, &[]);
        assert_eq!((error, &reply[16..]), (0, &[5, 8, 9][..]));
        assert_eq!(memory.lock().unwrap()[0xffe..], [8, 9]);
        map.remove(0, 0x4000);
        let gone = ask(&map, Command::DMA_READ, 0x1ffd, 3, &[]);
        assert_eq!(gone, (Errno::NOENT.raw_os_error() as u32, vec![]));
    }

    #[test]
    fn test_answer_when_the_request_is_wrong_is_an_error() {
        let map = MemoryMap::new(64);
        let memory: Arc<dyn MessageMemory> = Arc::new(Mutex::new(vec![0u8; 0x1000]));
        let read = DmaProt {
            read: true,
            write: false,
        };
        assert!(map.insert(0x1000, 0x1000, Arc::clone(&memory), read));
        assert!(!map.insert(0x1800, 0x1000, Arc::clone(&memory), read), "overlap");
        // Shorter than its mapping says.
        assert!(map.insert(0x10000, 0x2000, memory, read));
        let error = |command, address, count, data: &[u8]| {
            let (error, payload) = ask(&map, command, address, count, data);
            assert!(payload.is_empty());
            Errno::from_raw_os_error(error as i32)
        };
        assert_eq!(error(Command::DMA_READ, 0x1000, 65, &[]), Errno::TOOBIG);
        assert_eq!(error(Command::DMA_READ, 0x1000, 1 << 32, &[]), Errno::TOOBIG);
        assert_eq!(error(Command::DMA_READ, 0x1fff, 2, &[]), Errno::NOENT);
        assert_eq!(error(Command::DMA_READ, 0xfff, 2, &[]), Errno::NOENT);
        assert_eq!(error(Command::DMA_READ, u64::MAX, 2, &[]), Errno::INVAL);
        assert_eq!(error(Command::DMA_READ, 0x1000, 2, &[1]), Errno::INVAL);
        assert_eq!(error(Command::DMA_READ, 0x11000, 2, &[]), Errno::FAULT);
        assert_eq!(error(Command::DMA_WRITE, 0x1000, 2, &[1, 2]), Errno::ACCESS);
        assert_eq!(error(Command::DMA_WRITE, 0x1000, 2, &[1]), Errno::INVAL);
        assert_eq!(error(Command::DEVICE_RESET, 0, 0, &[]), Errno::NOTSUP);
    }
}
