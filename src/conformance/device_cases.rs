//! Device, regions and interrupts.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, eventfd};

use super::wire::*;
use super::{Case, Outcome, Target, case, same};

pub(super) const CASES: &[Case] = &[
    case(
        "device_info_is_complete",
        "VFIO_USER_DEVICE_GET_INFO",
        device_info,
    ),
    case(
        "device_info_too_short_is_refused",
        "VFIO_USER_DEVICE_GET_INFO",
        device_info_short,
    ),
    case(
        "region_info_describes_every_region",
        "VFIO_USER_DEVICE_GET_REGION_INFO",
        regions,
    ),
    case(
        "region_info_of_no_region_is_refused",
        "VFIO_USER_DEVICE_GET_REGION_INFO",
        no_region,
    ),
    case(
        "region_info_with_small_argsz_tells_the_size",
        "Message sizes",
        small_argsz,
    ),
    case(
        "region_info_capabilities_form_a_chain",
        "VFIO region capabilities",
        chain,
    ),
    case(
        "region_io_fds_are_consistent_or_refused",
        "VFIO_USER_DEVICE_GET_REGION_IO_FDS",
        io_fds,
    ),
    case(
        "irq_info_describes_every_type",
        "VFIO_USER_DEVICE_GET_IRQ_INFO",
        irq_info,
    ),
    case(
        "irq_info_of_no_type_is_refused",
        "VFIO_USER_DEVICE_GET_IRQ_INFO",
        no_irq,
    ),
    case("region_read_returns_head_and_data", "VFIO_USER_REGION_READ", read),
    case(
        "region_read_out_of_bounds_is_refused",
        "VFIO_USER_REGION_READ",
        out_of_bounds,
    ),
    case(
        "region_read_over_the_limit_is_refused",
        "Message sizes",
        over_limit,
    ),
    case("region_write_is_kept", "VFIO_USER_REGION_WRITE", write),
    case(
        "region_write_out_of_bounds_is_refused",
        "VFIO_USER_REGION_WRITE",
        write_out_of_bounds,
    ),
    case(
        "region_write_with_a_wrong_count_is_refused",
        "VFIO_USER_REGION_WRITE",
        wrong_count,
    ),
    case(
        "posted_writes_come_before_what_follows",
        "Command Concurrency",
        posted,
    ),
    case(
        "set_irqs_takes_and_gives_back_an_eventfd",
        "VFIO_USER_DEVICE_SET_IRQS",
        eventfd_form,
    ),
    case(
        "set_irqs_trigger_by_none_and_bool_fires_exactly_those",
        "VFIO_USER_DEVICE_SET_IRQS",
        fires,
    ),
    case(
        "set_irqs_out_of_range_is_refused",
        "VFIO_USER_DEVICE_SET_IRQS",
        irq_range,
    ),
    case(
        "set_irqs_without_one_form_and_one_action_is_refused",
        "VFIO_USER_DEVICE_SET_IRQS",
        irq_flags,
    ),
    case(
        "set_irqs_with_too_little_data_is_refused",
        "VFIO_USER_DEVICE_SET_IRQS",
        irq_data,
    ),
    case(
        "set_irqs_with_fds_among_other_messages_keeps_them",
        "VFIO_USER_DEVICE_SET_IRQS",
        glued,
    ),
    case(
        "reset_works_when_it_is_announced",
        "VFIO_USER_DEVICE_RESET",
        reset,
    ),
];

const CONFIG: u32 = 7;
/// VFIO_PCI_NUM_REGIONS.
const PCI_REGIONS: u32 = 9;

fn info(wire: &mut Wire) -> Result<(u32, u32, u32)> {
    let body = wire.good(GET_INFO, &words(&[16, 0, 0, 0]))?.body;
    Ok((u32_at(&body, 4)?, u32_at(&body, 8)?, u32_at(&body, 12)?))
}

fn ask_region(argsz: u32, index: u32) -> Vec<u8> {
    words(&[argsz, 0, index, 0, 0, 0, 0, 0])
}

fn region(wire: &mut Wire, index: u32) -> Result<Message> {
    wire.good(GET_REGION_INFO, &ask_region(4096, index))
        .with_context(|| format!("region {index}"))
}

fn device_info(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let body = wire.good(GET_INFO, &words(&[16, 0, 0, 0]))?.body;
    same("payload bytes", body.len(), 16)?;
    same("argsz", u32_at(&body, 0)?, 16)?;
    let (flags, regions, irqs) = info(&mut wire)?;
    ensure!(flags & 2 != 0, "flags {flags:#x}: not a PCI device");
    ensure!(
        regions >= PCI_REGIONS,
        "{regions} regions; a PCI device has at least {PCI_REGIONS}"
    );
    ensure!(irqs > 0, "no interrupt types");
    Ok(Outcome::Pass)
}

fn device_info_short(target: &Target<'_>) -> Result<Outcome> {
    target
        .client()?
        .bad(GET_INFO, &[16, 0], "a device info request of two bytes")?;
    Ok(Outcome::Pass)
}

fn regions(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (_, count, _) = info(&mut wire)?;
    for index in 0..count {
        let message = region(&mut wire, index)?;
        let body = &message.body;
        same("argsz", u32_at(body, 0)? as usize, body.len())?;
        same("index", u32_at(body, 8)?, index)?;
        let (flags, size) = (u32_at(body, 4)?, u64_at(body, 16)?);
        ensure!(
            flags & 4 == 0 || !message.fds.is_empty(),
            "region {index} is mappable, but no file descriptor came"
        );
        ensure!(
            index != CONFIG || size == 256 || size == 4096,
            "config space of {size} bytes"
        );
    }
    Ok(Outcome::Pass)
}

fn no_region(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (_, count, _) = info(&mut wire)?;
    for index in [count, u32::MAX] {
        wire.bad(
            GET_REGION_INFO,
            &ask_region(32, index),
            "a region that does not exist",
        )?;
    }
    Ok(Outcome::Pass)
}

fn small_argsz(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (_, count, _) = info(&mut wire)?;
    let mut found = false;
    for index in 0..count {
        let full = region(&mut wire, index)?.body.len();
        if full <= 32 {
            continue;
        }
        found = true;
        let short = wire.good(GET_REGION_INFO, &ask_region(32, index))?.body;
        ensure!(
            short.len() <= 32,
            "region {index}: {} bytes where argsz allows 32",
            short.len()
        );
        same("argsz of the short reply", u32_at(&short, 0)? as usize, full)?;
        let caps = u32_at(&short, 4)? & 8 != 0;
        let offset = u32_at(&short, 12)?;
        ensure!(
            !caps || offset >= 32,
            "region {index}: the capability flag with offset {offset}"
        );
    }
    match found {
        true => Ok(Outcome::Pass),
        false => Ok(Outcome::NotApplicable("no region has capabilities")),
    }
}

fn chain(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (_, count, _) = info(&mut wire)?;
    let mut found = false;
    for index in 0..count {
        let message = region(&mut wire, index)?;
        let body = &message.body;
        let (flags, mut at, size) = (u32_at(body, 4)?, u32_at(body, 12)?, u64_at(body, 16)?);
        if flags & 8 == 0 {
            continue;
        }
        found = true;
        let mut last = 31;
        while at != 0 {
            ensure!(at > last, "region {index}: capability offset {at} after {last}");
            last = at;
            let start = at as usize;
            let id_version = u32_at(body, start).context("a capability outside the payload")?;
            at = u32_at(body, start + 4)?;
            // VFIO_REGION_INFO_CAP_SPARSE_MMAP
            if id_version & 0xffff != 1 {
                continue;
            }
            same("version of the sparse mmap capability", id_version >> 16, 1)?;
            let mut end = 0;
            for area in 0..u32_at(body, start + 8)? as usize {
                let (from, len) = (
                    u64_at(body, start + 16 + 16 * area)?,
                    u64_at(body, start + 24 + 16 * area)?,
                );
                ensure!(
                    len > 0 && from % 4096 == 0 && len % 4096 == 0,
                    "region {index}: area {from:#x}+{len:#x} is not made of pages"
                );
                ensure!(
                    from >= end && from.checked_add(len).is_some_and(|to| to <= size),
                    "region {index}: area {from:#x}+{len:#x} overlaps or leaves the region"
                );
                end = from + len;
            }
        }
    }
    match found {
        true => Ok(Outcome::Pass),
        false => Ok(Outcome::NotApplicable("no region has capabilities")),
    }
}

fn io_fds(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    for index in 0..PCI_REGIONS {
        let message = wire.call(GET_REGION_IO_FDS, &words(&[4096, 0, index, 0]))?;
        if message.flags & ERROR != 0 {
            continue;
        }
        let body = &message.body;
        let count = u32_at(body, 12)? as usize;
        same("argsz", u32_at(body, 0)? as usize, body.len())?;
        same("flags", u32_at(body, 4)?, 0)?;
        same("index", u32_at(body, 8)?, index)?;
        ensure!(
            body.len() == 16 + 40 * count,
            "{count} sub-regions in {} bytes",
            body.len()
        );
        for entry in 0..count {
            let fd = u32_at(body, 16 + 40 * entry + 16)? as usize;
            ensure!(
                fd < message.fds.len(),
                "file descriptor {fd} of {}",
                message.fds.len()
            );
        }
    }
    wire.still_works()?;
    Ok(Outcome::Pass)
}

fn irq(wire: &mut Wire, index: u32) -> Result<u32> {
    let body = wire.good(GET_IRQ_INFO, &words(&[16, 0, index, 0]))?.body;
    same("argsz", u32_at(&body, 0)?, 16)?;
    same("index", u32_at(&body, 8)?, index)?;
    u32_at(&body, 12)
}

fn irq_info(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (_, _, irqs) = info(&mut wire)?;
    for index in 0..irqs {
        irq(&mut wire, index)?;
    }
    Ok(Outcome::Pass)
}

fn no_irq(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (_, _, irqs) = info(&mut wire)?;
    wire.bad(
        GET_IRQ_INFO,
        &words(&[16, 0, irqs, 0]),
        "a type that does not exist",
    )?;
    Ok(Outcome::Pass)
}

fn read(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    for count in [1, 2, 4, 64] {
        let body = wire.good(REGION_READ, &access(CONFIG, 0, count, &[]))?.body;
        same("payload bytes", body.len(), 16 + count as usize)?;
        same("offset", u64_at(&body, 0)?, 0)?;
        same("region", u32_at(&body, 8)?, CONFIG)?;
        same("count", u32_at(&body, 12)?, count)?;
        ensure!(
            count != 4 || body[16..18] != [0xff, 0xff],
            "the vendor id is 0xffff: no device"
        );
    }
    Ok(Outcome::Pass)
}

/// Accesses that are in no region.
fn beyond(wire: &mut Wire) -> Result<Vec<(u32, u64)>> {
    let (_, count, _) = info(wire)?;
    let mut places = vec![
        (count, 0),
        (u32::MAX, 0),
        (CONFIG, 1 << 20),
        (CONFIG, u64::MAX - 1),
    ];
    for index in 0..count {
        let size = u64_at(&region(wire, index)?.body, 16)?;
        places.extend([(index, size), (index, u64::MAX)]);
        if size >= 4 {
            places.push((index, size - 2));
        }
    }
    Ok(places)
}

fn out_of_bounds(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    for (region, offset) in beyond(&mut wire)? {
        let why = format!("a read of 4 bytes at {offset:#x} of region {region}");
        wire.bad(REGION_READ, &access(region, offset, 4, &[]), &why)?;
    }
    Ok(Outcome::Pass)
}

fn over_limit(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let body = access(CONFIG, 0, u32::MAX, &[]);
    wire.bad(REGION_READ, &body, "a read of 4 GiB")?;
    Ok(Outcome::Pass)
}

const NO_SCRATCH: Outcome = Outcome::NotApplicable("the facts name no scratch place");

fn write(target: &Target<'_>) -> Result<Outcome> {
    let Some(place) = target.facts.scratch else {
        return Ok(NO_SCRATCH);
    };
    let mut wire = target.client()?;
    let read = access(place.region, place.offset, 4, &[]);
    let before = wire.good(REGION_READ, &read)?.body[16..].to_vec();
    for value in [[0x54, 0x76, 0x98, 0x10], [0; 4]] {
        let body = access(place.region, place.offset, 4, &value);
        let reply = wire.good(REGION_WRITE, &body)?.body;
        same("reply to a write", reply, body[..16].to_vec())?;
        let back = wire.good(REGION_READ, &read)?.body[16..].to_vec();
        same("what was written", back, value.to_vec())?;
    }
    wire.good(REGION_WRITE, &access(place.region, place.offset, 4, &before))?;
    Ok(Outcome::Pass)
}

fn write_out_of_bounds(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    for (region, offset) in beyond(&mut wire)? {
        let why = format!("a write of 4 bytes at {offset:#x} of region {region}");
        wire.bad(REGION_WRITE, &access(region, offset, 4, &[0; 4]), &why)?;
    }
    Ok(Outcome::Pass)
}

fn wrong_count(target: &Target<'_>) -> Result<Outcome> {
    let Some(place) = target.facts.scratch else {
        return Ok(NO_SCRATCH);
    };
    for count in [8, 1 << 20, u32::MAX] {
        let bytes = encode(
            3,
            REGION_WRITE,
            0,
            &access(place.region, place.offset, count, &[0; 4]),
        );
        let why = format!("a write of {count} bytes that has 4");
        target.client()?.refused(&bytes, &why)?;
    }
    target.client()?.still_works()?;
    Ok(Outcome::Pass)
}

fn posted(target: &Target<'_>) -> Result<Outcome> {
    let Some(place) = target.facts.scratch else {
        return Ok(NO_SCRATCH);
    };
    let mut wire = target.client()?;
    let (read, mut bytes) = (access(place.region, place.offset, 4, &[]), Vec::new());
    for round in 0..50u8 {
        let value = [4 * round, round, 0, 0];
        let write = access(place.region, place.offset, 4, &value);
        bytes.extend(encode(0x6666, REGION_WRITE, NO_REPLY, &write));
        bytes.extend(encode(round.into(), REGION_READ, 0, &read));
    }
    wire.send(&bytes, &[])?;
    for round in 0..50u8 {
        let reply = wire.reply_to(round.into(), REGION_READ)?;
        let data = reply.body.get(16..).unwrap_or_default().to_vec();
        same("what the write before left", data, vec![4 * round, round, 0, 0])?;
    }
    wire.good(REGION_WRITE, &access(place.region, place.offset, 4, &[0; 4]))?;
    Ok(Outcome::Pass)
}

const NO_IRQ: Outcome = Outcome::NotApplicable("the device has no interrupts");
// <linux/vfio.h>: data forms and actions.
const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const TRIGGER: u32 = 32;

/// The interrupt type with the most interrupts, and their number.
fn some_irq(wire: &mut Wire) -> Result<Option<(u32, u32)>> {
    let (_, _, irqs) = info(wire)?;
    let mut best = None;
    for index in 0..irqs {
        let count = irq(wire, index)?;
        if count > best.map_or(0, |(_, most)| most) {
            best = Some((index, count));
        }
    }
    Ok(best)
}

fn event() -> Result<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("eventfd")
}

fn set(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

fn eventfd_form(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let Some((index, _)) = some_irq(&mut wire)? else {
        return Ok(NO_IRQ);
    };
    let event = event()?;
    let body = set(EVENTFD | TRIGGER, index, 0, 1);
    let reply = wire.call_with_fds(SET_IRQS, &body, &[event.as_fd()])?;
    same("errno of an eventfd for interrupt 0", reply.error, 0)?;
    ensure!(reply.flags & ERROR == 0, "an eventfd is refused");
    // VFIO: no data and no interrupts = take everything away.
    wire.good(SET_IRQS, &set(NONE | TRIGGER, index, 0, 0))
        .context("taking all eventfds away")?;
    Ok(Outcome::Pass)
}

/// The client fires interrupts itself ("loopback testing" in <linux/vfio.h>).
fn fires(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let Some((index, count)) = some_irq(&mut wire)? else {
        return Ok(NO_IRQ);
    };
    let flags = u32_at(&wire.good(GET_IRQ_INFO, &words(&[16, 0, index, 0]))?.body, 4)?;
    if flags & 1 == 0 {
        return Ok(Outcome::NotApplicable(
            "the interrupts are not signalled by eventfd",
        ));
    }
    let count = count.min(4);
    let events = (0..count).map(|_| event()).collect::<Result<Vec<_>>>()?;
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let reply = wire.call_with_fds(SET_IRQS, &set(EVENTFD | TRIGGER, index, 0, count), &fds)?;
    ensure!(reply.flags & ERROR == 0, "{count} eventfds are refused");
    let fired = || -> Vec<bool> {
        let read = |fd| matches!(rustix::io::read(fd, &mut [0; 8]), Ok(8));
        events.iter().map(read).collect()
    };
    let only = |which: u32| (0..count).map(|number| number == which).collect::<Vec<_>>();
    same(
        "interrupts that fired before",
        fired(),
        vec![false; count as usize],
    )?;
    for number in 0..count {
        wire.good(SET_IRQS, &set(NONE | TRIGGER, index, number, 1))?;
        same("interrupts that fired, DATA_NONE", fired(), only(number))?;
        if index != 0 {
            // By boolean, among all. (INTx masks itself when it has fired.)
            let bools = only(number)
                .iter()
                .map(|fire| u8::from(*fire))
                .collect::<Vec<_>>();
            let body = [words(&[20 + count, BOOL | TRIGGER, index, 0, count]), bools].concat();
            wire.good(SET_IRQS, &body)?;
            same("interrupts that fired, DATA_BOOL", fired(), only(number))?;
        }
    }
    wire.good(SET_IRQS, &set(NONE | TRIGGER, index, 0, 0))?;
    same(
        "interrupts that fired after",
        fired(),
        vec![false; count as usize],
    )?;
    Ok(Outcome::Pass)
}

fn irq_range(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let Some((index, count)) = some_irq(&mut wire)? else {
        return Ok(NO_IRQ);
    };
    for (start, count) in [(count, 1), (0, count + 1), (u32::MAX, 1), (1, u32::MAX)] {
        let why = format!("interrupts {start}+{count}");
        wire.bad(SET_IRQS, &set(NONE | TRIGGER, index, start, count), &why)?;
    }
    Ok(Outcome::Pass)
}

fn irq_flags(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let Some((index, _)) = some_irq(&mut wire)? else {
        return Ok(NO_IRQ);
    };
    for flags in [
        0,
        NONE,
        TRIGGER,
        NONE | EVENTFD | TRIGGER,
        NONE | MASK | TRIGGER,
        1 << 31,
    ] {
        let why = format!("SET_IRQS with flags {flags:#x}");
        wire.bad(SET_IRQS, &set(flags, index, 0, 1), &why)?;
    }
    Ok(Outcome::Pass)
}

fn irq_data(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let Some((index, count)) = some_irq(&mut wire)? else {
        return Ok(NO_IRQ);
    };
    wire.bad(
        SET_IRQS,
        &set(BOOL | TRIGGER, index, 0, 1),
        "one boolean, and no byte of data",
    )?;
    wire.bad(
        SET_IRQS,
        &set(NONE | TRIGGER, index, 0, 1)[..19],
        "a SET_IRQS of 19 bytes",
    )?;
    if count >= 2 {
        let event = event()?;
        let body = set(EVENTFD | TRIGGER, index, 0, 2);
        let reply = wire.call_with_fds(SET_IRQS, &body, &[event.as_fd()])?;
        ensure!(reply.flags & ERROR != 0, "two interrupts, one eventfd: accepted");
    }
    wire.still_works()?;
    Ok(Outcome::Pass)
}

fn glued(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let Some((index, _)) = some_irq(&mut wire)? else {
        return Ok(NO_IRQ);
    };
    let event = event()?;
    let read = access(CONFIG, 0, 4, &[]);
    let set = set(EVENTFD | TRIGGER, index, 0, 1);
    for round in 0..20 {
        wire.send(&encode(1, REGION_READ, 0, &read), &[])?;
        wire.send(&encode(2, SET_IRQS, 0, &set), &[event.as_fd()])?;
        wire.send(&encode(3, REGION_READ, 0, &read), &[])?;
        for (id, command) in [(1, REGION_READ), (2, SET_IRQS), (3, REGION_READ)] {
            let reply = wire.reply_to(id, command)?;
            ensure!(
                reply.flags & ERROR == 0,
                "round {round}: command {command} failed with errno {}: whose are the file descriptors?",
                reply.error
            );
        }
    }
    Ok(Outcome::Pass)
}

fn reset(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let (flags, _, _) = info(&mut wire)?;
    let announced = flags & 1 != 0;
    if !target.facts.reset {
        return Ok(Outcome::NotApplicable("the facts do not say reset"));
    }
    ensure!(
        announced,
        "the facts say reset, the device's flags ({flags:#x}) do not"
    );
    let reply = wire.good(RESET, &[])?;
    same("payload bytes", reply.body.len(), 0)?;
    wire.still_works()?;
    Ok(Outcome::Pass)
}
