//! A user-space driver of the mlx5 HCA: bring-up, event and completion queues, memory keys, queue pairs.
//!
//! It does what the kernel's driver does, in the same order (reference 1.1), through a [`Backing`]. The HCA's memory is
//! one memfd, which is read and written through the file.
//!
//! Not implemented: shared receive queues but XRC's, more than one UAR, anything that needs a subnet manager.

mod command;
mod error;
mod memory;
mod objects;
mod paging;
mod queue_pair;
mod xrc;

pub use error::Mlx5Error;
pub use memory::{HcaMemory, IOVA_BASE, Region};
pub use objects::{CompletionQueue, EventQueue, MemoryKey};
pub use paging::PageFault;
pub use queue_pair::{Connection, QueuePair, SendRequest, Service};
pub use xrc::XrcReceiveQueue;

use std::sync::Arc;

use protos::mlx5::cmd::Opcode;
use protos::mlx5::commands::{CONTEXT, Input, Output, QueryHcaVportContextOut, REGISTER_HOST_ENDIANNESS};
use protos::mlx5::{Layout, caps, iseg, pci};

use crate::backing::{Backing, DmaProt};
use command::Commands;

/// An HCA that has been brought up.
#[derive(Debug)]
pub struct Hca {
    backing: Arc<dyn Backing>,
    memory: Arc<HcaMemory>,
    commands: Commands,
    /// The only doorbell page.
    uar: u32,
}

impl Hca {
    /// Brings the HCA up: memory of `bytes`, command queue, capabilities, a doorbell page.
    ///
    /// # Errors
    /// [`Mlx5Error`]: not an mlx5, or what it refused.
    pub fn new(backing: Arc<dyn Backing>, bytes: u64) -> Result<Self, Mlx5Error> {
        let mut id = [0; 4];
        backing
            .config_read(0, &mut id)
            .map_err(Mlx5Error::io("config space"))?;
        let (vendor, device) = (
            u16::from_le_bytes([id[0], id[1]]),
            u16::from_le_bytes([id[2], id[3]]),
        );
        if vendor != pci::VENDOR || !matches!(device, pci::DEVICE_PF | pci::DEVICE_VF) {
            return Err(Mlx5Error::NotAnMlx5 { vendor, device });
        }
        // Memory and bus master.
        backing
            .config_write(4, &6u16.to_le_bytes())
            .map_err(Mlx5Error::io("the command register"))?;
        let memory = HcaMemory::new(bytes).map_err(Mlx5Error::io("memory for the HCA"))?;
        backing
            .dma_map(IOVA_BASE, bytes, memory.fd(), 0, DmaProt::READ_WRITE)
            .map_err(Mlx5Error::io("mapping the HCA's memory"))?;
        let memory = Arc::new(memory);
        let commands = Commands::new(Arc::clone(&backing), Arc::clone(&memory))?;
        let mut hca = Self {
            backing,
            memory,
            commands,
            uar: 0,
        };
        hca.bring_up()?;
        Ok(hca)
    }

    fn bring_up(&mut self) -> Result<(), Mlx5Error> {
        self.simple(Opcode::ENABLE_HCA, 0, 0)?;
        self.command(Opcode::QUERY_ISSI, 0, &[], 112)?;
        self.simple(Opcode::SET_ISSI, 0, 1)?;
        self.simple(Opcode::QUERY_PAGES, 1, 0)?;
        let mut register = REGISTER_HOST_ENDIANNESS.to_be_bytes().to_vec();
        register.extend([0; 4 + 16]);
        self.command(Opcode::ACCESS_REG, 0, &register, 32)?;
        let mut wanted = self.capabilities(caps::Kind::GENERAL)?;
        wanted.splice(0..0, [0; 8]);
        self.command(Opcode::SET_HCA_CAP, caps::SET_GENERAL, &wanted, 16)?;
        self.choose_paging()?;
        self.simple(Opcode::QUERY_PAGES, 2, 0)?;
        self.simple(Opcode::INIT_HCA, 0, 0)?;
        self.uar = self.number(Opcode::ALLOC_UAR)?;
        Ok(())
    }

    /// The HCA's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<HcaMemory> {
        &self.memory
    }

    /// How it is reached.
    #[must_use]
    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    /// Current capabilities of a kind, 256 bytes.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn capabilities(&self, kind: caps::Kind) -> Result<Vec<u8>, Mlx5Error> {
        let output = self.command(
            Opcode::QUERY_HCA_CAP,
            kind.0 << 1 | 1,
            &[0; 8],
            CONTEXT + caps::SIZE,
        )?;
        Ok(output[CONTEXT..].to_vec())
    }

    /// The port's LID; 0 while it has none.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn lid(&self) -> Result<u16, Mlx5Error> {
        let output = self.command(
            Opcode::QUERY_HCA_VPORT_CONTEXT,
            0,
            &[0; 8],
            size_of::<QueryHcaVportContextOut>(),
        )?;
        let output = QueryHcaVportContextOut::from_prefix(&output);
        Ok(output.get(QueryHcaVportContextOut::LID) as u16)
    }

    /// Ticks of the HCA's timer.
    ///
    /// # Errors
    /// The access.
    pub fn timer(&self) -> Result<u64, Mlx5Error> {
        let mut bytes = [0; 8];
        self.backing
            .read(pci::BAR, iseg::TIMER_H, &mut bytes)
            .map_err(Mlx5Error::io("the timer"))?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Executes a command: what follows the first 8 bytes of its input, and the length of its output.
    ///
    /// # Errors
    /// [`Mlx5Error::Refused`] with the HCA's status, or why it could not be asked.
    pub fn command(
        &self,
        opcode: Opcode,
        op_mod: u16,
        input: &[u8],
        output: usize,
    ) -> Result<Vec<u8>, Mlx5Error> {
        let head = Input::zeroed()
            .with(Input::OPCODE, u32::from(opcode.0))
            .with(Input::OP_MOD, u32::from(op_mod));
        let mut bytes = head.0[..8].to_vec();
        bytes.extend_from_slice(input);
        self.commands.execute(opcode, &bytes, output)
    }

    fn simple(&self, opcode: Opcode, op_mod: u16, argument: u32) -> Result<(), Mlx5Error> {
        let mut input = argument.to_be_bytes().to_vec();
        input.extend([0; 4]);
        self.command(opcode, op_mod, &input, 16).map(drop)
    }

    /// A command whose answer is the number of what was made.
    fn number(&self, opcode: Opcode) -> Result<u32, Mlx5Error> {
        let output = self.command(opcode, 0, &[0; 8], 16)?;
        Ok(Output::from_prefix(&output).get(Output::NUMBER))
    }

    /// A protection domain.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn protection_domain(&self) -> Result<u32, Mlx5Error> {
        self.number(Opcode::ALLOC_PD)
    }

    /// Writes to the doorbell page.
    fn doorbell(&self, offset: u64, bytes: &[u8]) -> Result<(), Mlx5Error> {
        self.backing
            .write_posted(pci::BAR, u64::from(self.uar) * pci::UAR_SIZE + offset, bytes)
            .map_err(Mlx5Error::io("a doorbell"))
    }
}
