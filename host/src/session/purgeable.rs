//! Memory that the application lets the reclaimer discard.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::identity::{FileId, duplicate};
use super::refusal::Refusal;
use super::space::AddressSpace;
use crate::mm::Access;
use crate::notifier::MaySleep;
use crate::subscribers::PurgeableRange;

/// Mappings that one request may span.
const MOST_MAPPINGS: usize = 1024;

/// Offers `[start, end)` to the reclaimer of the address space. All of it must be memory that the session
/// knows. From now on every covered call hops: the reclaimer has to hear what is unmapped.
///
/// # Errors
/// [`Refusal`]; nothing has been offered then.
pub fn offer(space: &Arc<AddressSpace>, start: u64, end: u64, seed: u64) -> Result<(), Refusal> {
    let whole_pages = start.is_multiple_of(4096) && end.is_multiple_of(4096);
    if start >= end || !whole_pages {
        return Err(Refusal::new(
            libc::EINVAL,
            format!("purgeable range {start:#x}..{end:#x} must be whole pages, and at least one"),
        ));
    }
    let token = MaySleep::claim("SetPurgeable");
    if space.reclaimer().is_none() {
        space.join(&token)?;
        // A connection's requests come one by one, so nobody else makes it meanwhile.
        space.reclaimer_or_init(seed);
    }
    let mut ranges = Vec::new();
    let mut va = start;
    while va < end {
        if ranges.len() >= MOST_MAPPINGS {
            return Err(Refusal::new(
                libc::E2BIG,
                format!("more than {MOST_MAPPINGS} mappings in one request; split it"),
            ));
        }
        let (vma, _) = space.mapping_at(va, Access::Read)?;
        let len = vma.end.min(end) - va;
        let offset = vma.offset_of(va);
        let file = space
            .file(FileId {
                dev: vma.dev,
                ino: vma.inode,
            })
            .filter(|file| vma.shared && offset.checked_add(len).is_some_and(|last| last <= file.len))
            .ok_or_else(|| {
                Refusal::new(
                    libc::EINVAL,
                    format!(
                        "{va:#x} is not shared memory known to the session; only such memory can be discarded"
                    ),
                )
            })?;
        let memfd = duplicate(file.fd.as_fd())
            .map_err(|e| Refusal::new(libc::EMFILE, format!("descriptor of the memory: {e}")))?;
        let range = PurgeableRange {
            va,
            len,
            memfd: Arc::new(memfd),
            offset,
        };
        ranges.push((range, file.id));
        va += len;
    }
    let reclaimer = space.reclaimer_or_init(seed);
    let added = ranges.into_iter().try_for_each(|(range, id)| {
        let (va, last, offset) = (range.va, range.va + range.len, range.offset);
        reclaimer
            .add(range)
            .map_err(|e| Refusal::new(libc::EINVAL, e.to_string()))?;
        // Looked up once more: whoever unmapped it between the first look and the offer has found nothing to
        // forget. Whoever does so from now on finds it.
        let (vma, _) = space.mapping_at(va, Access::Read)?;
        let now = FileId {
            dev: vma.dev,
            ino: vma.inode,
        };
        if !vma.shared || now != id || vma.offset_of(va) != offset || vma.end < last {
            return Err(Refusal::new(
                libc::EAGAIN,
                format!("{va:#x} was changed while it was being offered; offer it again"),
            ));
        }
        Ok(())
    });
    if added.is_err() {
        reclaimer.forget(start, end, &token);
    }
    added
}
