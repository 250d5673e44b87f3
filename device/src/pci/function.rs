//! A function: model, config space, MSI-X, DMA space.

use std::error::Error;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use protos::pci::{Bar, BarError, CONFIG_SPACE_SIZE, config as reg, msix};
use protos::vfio_user::{IrqIndex, RegionIndex};
use rustix::io::Errno;

use super::{ConfigSpace, Interrupts};
use crate::dma;
use crate::model::{AccessError, BARS, BarMmap, BarSpec, IoEventFd, Model, ModelContext, MsixSpec};

/// Why a model cannot be a PCI function.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// The model could not be built.
    #[error("the device model could not be built: {0}")]
    Build(#[source] Box<dyn Error + Send + Sync>),
    /// A BAR number that does not exist or is taken.
    #[error("BAR{0} does not exist or is taken (a 64-bit BAR also takes the next number)")]
    BarNumber(usize),
    /// A BAR that cannot be encoded.
    #[error("BAR{bar}: {source}")]
    Bar {
        /// BAR number.
        bar: usize,
        /// Why.
        source: BarError,
    },
    /// A mappable area that is not page aligned, not inside its BAR, or not after the one before.
    #[error(
        "BAR{bar}: mappable area {offset:#x}+{size:#x} is unaligned, empty, out of order or outside the BAR"
    )]
    Area {
        /// BAR number.
        bar: usize,
        /// Offset of the area.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Table or pending-bit array do not fit.
    #[error("MSI-X: {0}")]
    Msix(&'static str),
}

/// Why a region access was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// There is no such region.
    #[error("region {0} does not exist")]
    NoRegion(u32),
    /// Not inside the region.
    #[error("access {offset:#x}+{len:#x} is outside region {region} ({size:#x} bytes)")]
    OutOfBounds {
        /// Region number.
        region: u32,
        /// Offset in it.
        offset: u64,
        /// Bytes.
        len: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// The model decodes nothing there.
    #[error(transparent)]
    Access(#[from] AccessError),
}

impl RegionError {
    /// The errno that a client gets.
    #[must_use]
    pub fn errno(&self) -> Errno {
        Errno::INVAL
    }
}

/// A region as VFIO describes it.
#[derive(Debug, Clone, Copy)]
pub struct RegionInfo<'a> {
    /// Bytes; 0 = nothing there.
    pub size: u64,
    /// What a client may map.
    pub mmap: Option<&'a BarMmap>,
}

#[derive(Debug)]
struct FunctionBar {
    size: u64,
    mmap: Option<BarMmap>,
}

/// Who answers a piece of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Model,
    Table,
    Pba,
}

/// A PCI function: a model with config space, BARs, interrupts and DMA.
#[derive(Debug)]
pub struct Function {
    model: Arc<dyn Model>,
    dma: Arc<dma::Space>,
    interrupts: Arc<Interrupts>,
    bars: [Option<FunctionBar>; BARS],
    msix: Option<MsixSpec>,
    /// Held while bus mastering is switched (which may drain accesses), so that config writes take effect
    /// in their order. Taken before the locks of `dma` and `interrupts`, never by the model.
    config: Mutex<ConfigSpace>,
    /// Copy of the config space's memory enable, for the access path.
    memory_enabled: AtomicBool,
}

impl Function {
    /// Build the model and put the function around it. Bus mastering and memory decoding are off.
    ///
    /// # Errors
    /// [`ComposeError`]: the model's error, or BARs and MSI-X that contradict each other.
    pub fn new<E>(
        build: impl FnOnce(ModelContext) -> Result<Arc<dyn Model>, E>,
    ) -> Result<Arc<Self>, ComposeError>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let dma = dma::Space::new();
        dma.set_bus_master(false);
        let interrupts = Arc::new(Interrupts::default());
        let context = ModelContext {
            dma: Arc::clone(&dma),
            interrupts: Arc::clone(&interrupts),
        };
        let model = build(context).map_err(|error| ComposeError::Build(error.into()))?;

        let mut encoded = [None; BARS];
        let mut bars = [const { None }; BARS];
        let mut taken = [false; BARS];
        for spec in model.bars() {
            let BarSpec {
                index,
                size,
                is_64bit,
                prefetchable,
                mmap,
            } = spec;
            for number in index..=index + usize::from(is_64bit) {
                match taken.get_mut(number) {
                    Some(taken) if !*taken => *taken = true,
                    _ => return Err(ComposeError::BarNumber(number)),
                }
            }
            let bar = Bar::new(size, is_64bit, prefetchable)
                .map_err(|source| ComposeError::Bar { bar: index, source })?;
            check_areas(index, size, mmap.as_ref())?;
            encoded[index] = Some(bar);
            bars[index] = Some(FunctionBar { size, mmap });
        }
        let msix = model.msix();
        if let Some(spec) = msix {
            check_msix(spec, &bars)?;
        }
        interrupts.set_vectors(msix.map_or(1, |spec| spec.vectors), msix.is_none());
        let config = Mutex::new(ConfigSpace::new(&model.identity(), &encoded, msix));
        Ok(Arc::new(Self {
            model,
            dma,
            interrupts,
            bars,
            msix,
            config,
            memory_enabled: AtomicBool::new(false),
        }))
    }

    /// The client's memory.
    #[must_use]
    pub fn dma(&self) -> &Arc<dma::Space> {
        &self.dma
    }

    /// The vectors.
    #[must_use]
    pub fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    /// MSI-X, if the model has it.
    #[must_use]
    pub fn msix(&self) -> Option<MsixSpec> {
        self.msix
    }

    /// Interrupts of a type: MSI-X vectors, or one INTx for a model without MSI-X.
    #[must_use]
    pub fn irq_count(&self, index: IrqIndex) -> u32 {
        match (index, self.msix) {
            (IrqIndex::MSIX, Some(_)) | (IrqIndex::INTX, None) => self.interrupts.len(),
            _ => 0,
        }
    }

    /// A region; `None` = no such number.
    #[must_use]
    pub fn region(&self, region: RegionIndex) -> Option<RegionInfo<'_>> {
        if let Some(bar) = region.bar() {
            let bar = self.bars[bar].as_ref();
            return Some(RegionInfo {
                size: bar.map_or(0, |bar| bar.size),
                mmap: bar.and_then(|bar| bar.mmap.as_ref()),
            });
        }
        let size = match region {
            RegionIndex::CONFIG => CONFIG_SPACE_SIZE as u64,
            _ if region.0 < RegionIndex::COUNT => 0,
            _ => return None,
        };
        Some(RegionInfo { size, mmap: None })
    }

    /// Eventfds that stand for writes to a region.
    #[must_use]
    pub fn io_eventfds(&self, region: RegionIndex) -> Vec<IoEventFd> {
        match region.bar() {
            Some(bar) if self.bars[bar].is_some() => self.model.io_eventfds(bar),
            _ => Vec::new(),
        }
    }

    /// Whether `[offset, offset + len)` is inside the region.
    ///
    /// # Errors
    /// [`RegionError`].
    pub(crate) fn check_access(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(), RegionError> {
        let size = self.region(region).ok_or(RegionError::NoRegion(region.0))?.size;
        if size == 0 {
            return Err(RegionError::NoRegion(region.0));
        }
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(RegionError::OutOfBounds {
                region: region.0,
                offset,
                len,
                size,
            }),
        }
    }

    /// Read from a region. `data` is overwritten in full, or left as it was on error.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn region_read(&self, region: RegionIndex, offset: u64, data: &mut [u8]) -> Result<(), RegionError> {
        self.check_access(region, offset, data.len())?;
        let Some(bar) = region.bar() else {
            self.config().read(offset as usize, data);
            self.add_intx_status(offset, data);
            return Ok(());
        };
        if !self.memory_enabled.load(Ordering::Acquire) {
            data.fill(0xff);
            return Ok(());
        }
        self.pieces(bar, offset, data.len(), |owner, at, range| {
            let data = &mut data[range];
            match owner {
                Owner::Model => self.model.bar_read(bar, at, data),
                Owner::Table => {
                    self.interrupts.table_read(at, data);
                    Ok(())
                }
                Owner::Pba => {
                    self.interrupts.pba_read(at, data);
                    Ok(())
                }
            }
        })?;
        Ok(())
    }

    /// Write to a region.
    ///
    /// # Errors
    /// [`RegionError`]. A write that spans the model's registers and the MSI-X table may have been done in
    /// part.
    pub fn region_write(&self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        self.check_access(region, offset, data.len())?;
        let Some(bar) = region.bar() else {
            self.config_write(offset as usize, data);
            return Ok(());
        };
        if !self.memory_enabled.load(Ordering::Acquire) {
            return Ok(());
        }
        self.pieces(bar, offset, data.len(), |owner, at, range| {
            let data = &data[range];
            match owner {
                Owner::Model => self.model.bar_write(bar, at, data),
                Owner::Table => {
                    self.interrupts.table_write(at, data);
                    Ok(())
                }
                Owner::Pba => Ok(()),
            }
        })?;
        Ok(())
    }

    /// Cut an access where the answering side changes. `action` gets the owner, the offset (in the BAR, the
    /// table or the array) and the range of the data.
    fn pieces(
        &self,
        bar: usize,
        offset: u64,
        len: usize,
        mut action: impl FnMut(Owner, u64, Range<usize>) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let Some(spec) = self.msix.filter(|spec| spec.bar == bar) else {
            return action(Owner::Model, offset, 0..len);
        };
        let table = spec.table_offset..spec.table_offset + msix::table_size(spec.vectors);
        let pba = spec.pba_offset..spec.pba_offset + msix::pba_size(spec.vectors);
        let end = offset + len as u64;
        let mut at = offset;
        while at < end {
            let inside = [(Owner::Table, &table), (Owner::Pba, &pba)]
                .into_iter()
                .find(|(_, range)| range.contains(&at));
            let (owner, base, stop) = match inside {
                Some((owner, range)) => (owner, range.start, range.end),
                None => {
                    let next = [table.start, pba.start]
                        .into_iter()
                        .filter(|start| *start > at)
                        .min();
                    (Owner::Model, 0, next.unwrap_or(end))
                }
            };
            let stop = stop.min(end);
            action(owner, at - base, (at - offset) as usize..(stop - offset) as usize)?;
            at = stop;
        }
        Ok(())
    }

    /// Interrupt Status (PCI 3.0 6.2.3): INTx is pending, be it disabled or not.
    fn add_intx_status(&self, offset: u64, data: &mut [u8]) {
        let at = (reg::STATUS as u64).checked_sub(offset);
        if self.msix.is_none()
            && let Some(byte) = at.and_then(|at| data.get_mut(at as usize))
            && self.interrupts.is_pending(0)
        {
            *byte |= reg::STATUS_INTERRUPT as u8;
        }
    }

    fn config(&self) -> std::sync::MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        let before = (config.bus_master(), config.function_mask());
        let flr = config.write(offset, data);
        self.apply(&config, before);
        drop(config);
        if flr {
            tracing::info!("function level reset");
            self.function_reset();
        }
    }

    /// Let a change of config space take effect.
    fn apply(&self, config: &ConfigSpace, before: (bool, bool)) {
        self.memory_enabled
            .store(config.memory_enabled(), Ordering::Release);
        if config.bus_master() != before.0 {
            self.dma.set_bus_master(config.bus_master());
        }
        if config.function_mask() != before.1 {
            self.interrupts.set_function_mask(config.function_mask());
        }
    }

    /// Config space, bus mastering and interrupt state to their reset values, and the model's.
    fn function_reset(&self) {
        // Bus mastering goes off first: what the model still has in flight is drained and refused.
        self.reset_config();
        self.model.reset();
        self.interrupts.reset();
    }

    fn reset_config(&self) {
        let mut config = self.config();
        let before = (config.bus_master(), config.function_mask());
        config.reset();
        self.apply(&config, before);
    }

    /// DEVICE_RESET. Config space, table and eventfds stay, as with the kernel's VFIO; the model has its
    /// reset state and nothing is pending.
    pub fn reset(&self) {
        // An engine that waits for the client's memory would wait for the thread that is here.
        let _quiet = self.dma.quiet();
        self.model.reset();
        self.interrupts.clear_pending();
    }

    /// The client is gone: its memory is unmapped, its eventfds are closed, everything has its reset value.
    /// Afterwards the next client can come.
    pub fn disconnect(&self) {
        // The model first: one that others ask for its memory would tell them that they may not use it. (One that waits
        // for the client's memory would wait for the thread that is here.)
        {
            let _quiet = self.dma.quiet();
            self.model.reset();
        }
        self.dma.unmap_all();
        self.reset_config();
        self.interrupts.disconnect();
    }
}

fn check_areas(bar: usize, bar_size: u64, mmap: Option<&BarMmap>) -> Result<(), ComposeError> {
    let page = rustix::param::page_size() as u64;
    let mut end = 0;
    for &(offset, size) in mmap.map_or(&[][..], |mmap| &mmap.areas) {
        let good = offset % page == 0 && size % page == 0 && size > 0 && offset >= end;
        match offset.checked_add(size) {
            Some(stop) if good && stop <= bar_size => end = stop,
            _ => return Err(ComposeError::Area { bar, offset, size }),
        }
    }
    Ok(())
}

fn check_msix(spec: MsixSpec, bars: &[Option<FunctionBar>; BARS]) -> Result<(), ComposeError> {
    let fail = |why| Err(ComposeError::Msix(why));
    if spec.vectors == 0 || spec.vectors > msix::MAX_VECTORS {
        return fail("1 to 2048 vectors are possible");
    }
    let Some(Some(bar)) = bars.get(spec.bar) else {
        return fail("its BAR does not exist");
    };
    if !spec.table_offset.is_multiple_of(8) || !spec.pba_offset.is_multiple_of(8) {
        return fail("table and pending-bit array have to be 8-byte aligned");
    }
    let end = |offset: u64, size| {
        offset
            .checked_add(size)
            .filter(|end| *end <= bar.size.min(u32::MAX.into()))
    };
    let (Some(table_end), Some(pba_end)) = (
        end(spec.table_offset, msix::table_size(spec.vectors)),
        end(spec.pba_offset, msix::pba_size(spec.vectors)),
    ) else {
        return fail("table or pending-bit array are outside the BAR");
    };
    if spec.table_offset < pba_end && spec.pba_offset < table_end {
        return fail("table and pending-bit array overlap");
    }
    let mapped = |start: u64, end: u64| {
        let areas = bar.mmap.as_ref().map_or(&[][..], |mmap| &mmap.areas);
        areas
            .iter()
            .any(|&(offset, size)| offset < end && start < offset + size)
    };
    if mapped(spec.table_offset, table_end) || mapped(spec.pba_offset, pba_end) {
        return fail("table and pending-bit array cannot be mappable");
    }
    Ok(())
}
