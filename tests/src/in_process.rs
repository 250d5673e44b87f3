//! The driver's seam over a device in the same process: no socket, the same function.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use device::dma::Prot;
use device::model::{Model, ModelContext};
use device::pci::{ComposeError, Function, RegionError};
use driver::backing::{Backing, BarInfo, DmaProt};
use protos::vfio_user::{IrqIndex, RegionIndex};

/// A [`Backing`] that calls a [`Function`] directly.
#[derive(Debug)]
pub struct InProcess {
    function: Arc<Function>,
}

impl InProcess {
    /// A function as its own client.
    #[must_use]
    pub fn new(function: Arc<Function>) -> Self {
        Self { function }
    }

    /// Builds a model and the function around it; returns the model too, for its statistics.
    ///
    /// # Errors
    /// [`ComposeError`].
    pub fn build<M, E>(
        build: impl FnOnce(ModelContext) -> Result<Arc<M>, E>,
    ) -> Result<(Self, Arc<M>), ComposeError>
    where
        M: Model + 'static,
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let mut model = None;
        let function = Function::new(|context| {
            let built = build(context)?;
            model = Some(Arc::clone(&built));
            Ok::<Arc<dyn Model>, E>(built)
        })?;
        let model = model.expect("Function::new has called the builder");
        Ok((Self::new(function), model))
    }

    /// The function.
    #[must_use]
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    fn region(bar: usize) -> RegionIndex {
        RegionIndex(u32::try_from(bar).expect("a BAR number"))
    }
}

fn region_error(error: RegionError) -> io::Error {
    error.errno().into()
}

impl Backing for InProcess {
    fn bar(&self, bar: usize) -> BarInfo {
        let region = self.function.region(Self::region(bar));
        BarInfo {
            size: region.map_or(0, |r| r.size),
            mappable: region
                .and_then(|r| r.mmap)
                .map_or_else(Vec::new, |m| m.areas.clone()),
        }
    }

    fn bar_fd(&self, bar: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let mmap = self.function.region(Self::region(bar))?.mmap?;
        Some((mmap.fd.as_fd(), 0))
    }

    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.function
            .region_read(Self::region(bar), offset, data)
            .map_err(region_error)
    }

    fn write(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.function
            .region_write(Self::region(bar), offset, data)
            .map_err(region_error)
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.function
            .region_read(RegionIndex::CONFIG, offset, data)
            .map_err(region_error)
    }

    fn config_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.function
            .region_write(RegionIndex::CONFIG, offset, data)
            .map_err(region_error)
    }

    fn msix_vectors(&self) -> u32 {
        self.function.irq_count(IrqIndex::MSIX)
    }

    fn set_msix(&self, vector: u32, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let eventfd = match eventfd {
            Some(fd) => Some(fd.try_clone_to_owned()?),
            None => None,
        };
        if self.function.interrupts().set_eventfd(vector, eventfd) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn dma_map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>, offset: u64, prot: DmaProt) -> io::Result<()> {
        let prot = Prot {
            read: prot.read,
            write: prot.write,
        };
        self.function
            .dma()
            .map(iova, len, fd.try_clone_to_owned()?, offset, prot)
            .map_err(|e| e.errno().into())
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        self.function.dma().unmap(iova, len).map_err(|e| e.errno().into())
    }

    fn io_eventfd(&self, bar: usize, offset: u64) -> io::Result<Option<OwnedFd>> {
        let all = self.function.io_eventfds(Self::region(bar));
        Ok(all.into_iter().find(|e| e.offset == offset).map(|e| e.fd))
    }

    fn reset(&self) -> io::Result<()> {
        self.function.reset();
        Ok(())
    }

    fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn alive(&self) -> bool {
        true
    }
}
