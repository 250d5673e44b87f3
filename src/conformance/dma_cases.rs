//! DMA_MAP and DMA_UNMAP.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::wire::*;
use super::{Case, Outcome, Target, case, same};

pub(super) const CASES: &[Case] = &[
    case("dma_map_and_unmap_work", "VFIO_USER_DMA_MAP", map_unmap),
    case(
        "dma_map_over_a_mapping_is_refused_with_eexist",
        "VFIO_USER_DMA_MAP",
        overlap,
    ),
    case(
        "dma_map_that_makes_no_sense_is_refused",
        "VFIO_USER_DMA_MAP",
        nonsense,
    ),
    case(
        "dma_map_with_an_fd_after_other_messages_keeps_it",
        "VFIO_USER_DMA_MAP",
        glued,
    ),
    case(
        "dma_unmap_that_cuts_a_mapping_is_refused",
        "VFIO_USER_DMA_UNMAP",
        cutting,
    ),
    case(
        "dma_unmap_all_takes_every_mapping_away",
        "VFIO_USER_DMA_UNMAP",
        all,
    ),
    case("dma_unmap_too_short_is_refused", "VFIO_USER_DMA_UNMAP", short),
    case(
        "dma_mappings_end_with_the_connection",
        "Client Disconnection",
        end,
    ),
];

const NO_DMA: Outcome = Outcome::NotApplicable("the facts do not say dma_map");
const SIZE: u64 = 0x10000;
const ADDRESS: u64 = 0x4000_0000;

fn memory() -> Result<OwnedFd> {
    let fd = memfd_create("conformance", MemfdFlags::CLOEXEC).context("memfd_create")?;
    ftruncate(&fd, SIZE).context("ftruncate")?;
    Ok(fd)
}

fn map(argsz: u32, flags: u32, address: u64, size: u64) -> Vec<u8> {
    let mut body = words(&[argsz, flags]);
    for field in [0, address, size] {
        body.extend(field.to_ne_bytes());
    }
    body
}

fn unmap(address: u64, size: u64) -> Vec<u8> {
    let mut body = words(&[24, 0]);
    body.extend(address.to_ne_bytes());
    body.extend(size.to_ne_bytes());
    body
}

fn mapped(wire: &mut Wire, memory: &OwnedFd) -> Result<()> {
    let reply = wire.call_with_fds(DMA_MAP, &map(32, 3, ADDRESS, SIZE), &[memory.as_fd()])?;
    ensure!(
        reply.flags & ERROR == 0,
        "DMA_MAP failed with errno {}",
        reply.error
    );
    same("payload bytes of the reply", reply.body.len(), 0)
}

fn map_unmap(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let mut wire = target.client()?;
    let memory = memory()?;
    for _ in 0..3 {
        mapped(&mut wire, &memory)?;
        let reply = wire.good(DMA_UNMAP, &unmap(ADDRESS, SIZE))?.body;
        same("payload bytes of the reply", reply.len(), 24)?;
        same("address", u64_at(&reply, 8)?, ADDRESS)?;
        same("size", u64_at(&reply, 16)?, SIZE)?;
    }
    Ok(Outcome::Pass)
}

fn overlap(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let mut wire = target.client()?;
    let memory = memory()?;
    mapped(&mut wire, &memory)?;
    for (address, size) in [
        (ADDRESS, SIZE),
        (ADDRESS + 0x1000, 0x1000),
        (ADDRESS - 0x1000, 0x2000),
    ] {
        let body = map(32, 3, address, size);
        let reply = wire.call_with_fds(DMA_MAP, &body, &[memory.as_fd()])?;
        ensure!(
            reply.flags & ERROR != 0,
            "{address:#x}+{size:#x} over a mapping: accepted"
        );
        // EEXIST
        same("errno of a mapping over another", reply.error, 17)?;
    }
    Ok(Outcome::Pass)
}

fn nonsense(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let mut wire = target.client()?;
    let memory = memory()?;
    let cases = [
        ("argsz 16", map(16, 3, ADDRESS, SIZE)),
        ("size 0", map(32, 3, ADDRESS, 0)),
        ("an end beyond 2^64", map(32, 3, u64::MAX - 0xfff, SIZE)),
        ("half a structure", map(32, 3, ADDRESS, SIZE)[..16].to_vec()),
    ];
    for (why, body) in cases {
        let reply = wire.call_with_fds(DMA_MAP, &body, &[memory.as_fd()])?;
        ensure!(reply.flags & ERROR != 0, "DMA_MAP with {why}: accepted");
    }
    wire.still_works()?;
    Ok(Outcome::Pass)
}

fn glued(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let mut wire = target.client()?;
    let memory = memory()?;
    let read = access(7, 0, 4, &[]);
    for round in 0..20 {
        wire.send(&encode(1, REGION_READ, 0, &read), &[])?;
        wire.send(&encode(2, GET_INFO, 0, &words(&[16, 0, 0, 0])), &[])?;
        let map = encode(3, DMA_MAP, 0, &map(32, 3, ADDRESS, SIZE));
        wire.send(&map, &[memory.as_fd()])?;
        wire.send(&encode(4, DMA_UNMAP, 0, &unmap(ADDRESS, SIZE)), &[])?;
        for (id, command) in [(1, REGION_READ), (2, GET_INFO), (3, DMA_MAP), (4, DMA_UNMAP)] {
            let reply = wire.reply_to(id, command)?;
            ensure!(
                reply.flags & ERROR == 0,
                "round {round}: command {command} failed with errno {}: whose is the file descriptor?",
                reply.error
            );
        }
    }
    Ok(Outcome::Pass)
}

fn cutting(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let mut wire = target.client()?;
    mapped(&mut wire, &memory()?)?;
    for (address, size) in [
        (ADDRESS, 0x1000),
        (ADDRESS + 0x1000, SIZE),
        (ADDRESS + 0x1000, 0x1000),
    ] {
        let why = format!("an unmap of {address:#x}+{size:#x} out of a larger mapping");
        wire.bad(DMA_UNMAP, &unmap(address, size), &why)?;
    }
    wire.good(DMA_UNMAP, &unmap(ADDRESS, SIZE))?;
    Ok(Outcome::Pass)
}

fn all(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let mut wire = target.client()?;
    let memory = memory()?;
    let both = [ADDRESS, ADDRESS + 4 * SIZE];
    for _ in 0..2 {
        for address in both {
            let body = map(32, 3, address, SIZE);
            let reply = wire.call_with_fds(DMA_MAP, &body, &[memory.as_fd()])?;
            ensure!(
                reply.flags & ERROR == 0,
                "DMA_MAP at {address:#x} failed with errno {}: is it still there?",
                reply.error
            );
        }
        // VFIO_DMA_UNMAP_FLAG_ALL: address and size are 0.
        let mut body = words(&[24, 2]);
        body.extend([0; 16]);
        let reply = wire.call(DMA_UNMAP, &body)?;
        if reply.flags & ERROR != 0 {
            wire.still_works()?;
            return Ok(Outcome::NotApplicable("the server refuses to unmap all at once"));
        }
        same("payload bytes of the reply", reply.body.len(), 24)?;
    }
    Ok(Outcome::Pass)
}

fn short(target: &Target<'_>) -> Result<Outcome> {
    target
        .client()?
        .bad(DMA_UNMAP, &unmap(ADDRESS, SIZE)[..20], "a DMA_UNMAP of 20 bytes")?;
    Ok(Outcome::Pass)
}

fn end(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.dma_map {
        return Ok(NO_DMA);
    }
    let memory = memory()?;
    for _ in 0..2 {
        // If the first client's were still there, the second would get EEXIST.
        mapped(&mut target.client()?, &memory)?;
    }
    Ok(Outcome::Pass)
}
