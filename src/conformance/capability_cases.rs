//! What is agreed on in VERSION or needs facts about the device: several writes in a message, the server's own
//! commands, on one socket and on a twin.

use std::os::fd::OwnedFd;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::wire::*;
use super::{Case, DmaFact, Outcome, Target, case, same};

pub(super) const CASES: &[Case] = &[
    case(
        "region_write_multi_does_every_write_in_order",
        "VFIO_USER_REGION_WRITE_MULTI",
        multi,
    ),
    case(
        "region_write_multi_that_makes_no_sense_is_refused",
        "VFIO_USER_REGION_WRITE_MULTI",
        bad_multi,
    ),
    case(
        "dma_read_gets_what_the_client_answers",
        "VFIO_USER_DMA_READ",
        dma_read,
    ),
    case(
        "dma_write_brings_what_the_device_has",
        "VFIO_USER_DMA_WRITE",
        dma_write,
    ),
    case(
        "dma_read_that_is_refused_leaves_the_connection_usable",
        "VFIO_USER_DMA_READ",
        refused_read,
    ),
    case(
        "dma_unmap_is_answered_while_a_dma_read_is_not",
        "VFIO_USER_DMA_UNMAP",
        unmap_meanwhile,
    ),
    case("twin_socket_carries_the_servers_commands", "Twin socket", twin),
];

const WITH_MULTI: &str =
    r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"write_multiple":true}}"#;
const WITH_TWIN: &str =
    r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"twin_socket":{"supported":true}}}"#;
const NO_READ: Outcome = Outcome::NotApplicable("the facts name no dma_read");

// ---- several writes ----

fn write_one(region: u32, offset: u64, count: u32, data: u64) -> Vec<u8> {
    let mut one = offset.to_ne_bytes().to_vec();
    one.extend(words(&[region, count]));
    one.extend(data.to_ne_bytes());
    one
}

fn writes(count: u64, list: &[Vec<u8>]) -> Vec<u8> {
    [&count.to_ne_bytes()[..], &list.concat()].concat()
}

/// A session in which REGION_WRITE_MULTI was agreed on.
fn with_multi(target: &Target<'_>) -> Result<Option<Wire>> {
    let (wire, version) = target.client_with(WITH_MULTI)?;
    let agreed = &capabilities(&version)?["write_multiple"];
    Ok((agreed == &serde_json::Value::Bool(true)).then_some(wire))
}

fn capabilities(version: &Message) -> Result<serde_json::Value> {
    let text = version.body.get(4..).and_then(|data| data.split_last());
    let Some((_, text)) = text else {
        return Ok(serde_json::Value::Null);
    };
    let mut data: serde_json::Value = serde_json::from_slice(text).context("version data")?;
    Ok(data["capabilities"].take())
}

const NO_MULTI: Outcome = Outcome::NotApplicable("the server does not agree to write_multiple");

fn multi(target: &Target<'_>) -> Result<Outcome> {
    let Some(place) = target.facts.scratch else {
        return Ok(Outcome::NotApplicable("the facts name no scratch place"));
    };
    let Some(mut wire) = with_multi(target)? else {
        return Ok(NO_MULTI);
    };
    let read = access(place.region, place.offset, 4, &[]);
    for value in [0x1234_5678_u32, 0] {
        // The last one counts; the one before it differs in its upper half only.
        let list = [
            write_one(place.region, place.offset, 4, 0x5a5a_5a5a),
            write_one(place.region, place.offset, 4, u64::from(value)),
            write_one(place.region, place.offset, 4, 0xa5a5_a5a5),
            write_one(place.region, place.offset, 4, u64::from(value)),
        ];
        let reply = wire.good(REGION_WRITE_MULTI, &writes(4, &list))?.body;
        same("payload bytes of the reply", reply.len(), 8)?;
        same("writes done", u64_at(&reply, 0)?, 4)?;
        let back = wire.good(REGION_READ, &read)?.body[16..].to_vec();
        same("what the last write left", back, value.to_ne_bytes().to_vec())?;
    }
    Ok(Outcome::Pass)
}

fn bad_multi(target: &Target<'_>) -> Result<Outcome> {
    let Some(place) = target.facts.scratch else {
        return Ok(Outcome::NotApplicable("the facts name no scratch place"));
    };
    let Some(mut wire) = with_multi(target)? else {
        return Ok(NO_MULTI);
    };
    let one = || vec![write_one(place.region, place.offset, 4, 0x7777_7777)];
    let nine = vec![write_one(place.region, place.offset, 9, 0x7777_7777)];
    for (why, body) in [
        ("two writes announced, one there", writes(2, &one())),
        ("2^63 writes announced", writes(1 << 63, &one())),
        ("a write of 9 bytes in room for 8", writes(1, &nine)),
        ("half a count", vec![1, 0, 0, 0]),
    ] {
        wire.bad(REGION_WRITE_MULTI, &body, why)?;
    }
    let read = access(place.region, place.offset, 4, &[]);
    let back = wire.good(REGION_READ, &read)?.body[16..].to_vec();
    ensure!(back != [0x77; 4], "a refused message has had an effect");
    Ok(Outcome::Pass)
}

// ---- the server's commands ----

const ADDRESS: u64 = 0x5000_0000;
const SIZE: u64 = 0x4000;
/// Most data bytes of one request: what the client has proposed.
const MOST: u64 = 1 << 20;
const VALUE: [u8; 8] = [0x81, 0x92, 0xa3, 0xb4, 0xc5, 0xd6, 0xe7, 0x78];

/// Where the server's commands come, and what the client does with them.
struct Asked {
    wire: Wire,
    twin: Option<Wire>,
}

/// A command of the server's.
struct Request {
    message: Message,
    address: u64,
    count: u64,
}

/// DMA_MAP of memory without a file.
fn map_without_file(wire: &mut Wire) -> Result<()> {
    let mut body = words(&[32, 3]);
    for field in [0, ADDRESS, SIZE] {
        body.extend(field.to_ne_bytes());
    }
    wire.good(DMA_MAP, &body)
        .context("DMA_MAP without a file descriptor")?;
    Ok(())
}

fn unmap_body() -> Vec<u8> {
    let mut body = words(&[24, 0]);
    body.extend(ADDRESS.to_ne_bytes());
    body.extend(SIZE.to_ne_bytes());
    body
}

impl Asked {
    /// Makes the device access `address`. The write's own answer may come before or after the command.
    fn pull(&mut self, fact: &DmaFact, address: u64) -> Result<u16> {
        let id = self.wire.id();
        let body = access(
            fact.trigger.region,
            fact.trigger.offset,
            8,
            &address.to_ne_bytes(),
        );
        self.wire.send(&encode(id, REGION_WRITE, 0, &body), &[])?;
        Ok(id)
    }

    /// The server's next command, which has to be this one. Replies to `written` may come before it.
    fn request(&mut self, command: u16, written: u16, answered: &mut bool) -> Result<Request> {
        loop {
            let from = self.twin.as_mut().unwrap_or(&mut self.wire);
            let Answer::Message(message) = from.receive().context("waiting for the server's command")? else {
                bail!("the server closed the connection instead of asking for memory");
            };
            if message.flags & 0xf == REPLY {
                same("message id of a reply", message.id, written)?;
                ensure!(
                    message.flags & ERROR == 0,
                    "the trigger failed with errno {}",
                    message.error
                );
                ensure!(
                    self.twin.is_none(),
                    "a reply to the client's command on the twin socket"
                );
                *answered = true;
                continue;
            }
            same("type bits of a command", message.flags & 0xf, 0)?;
            same("the server's command", message.command, command)?;
            same("errno of a command", message.error, 0)?;
            let (address, count) = (u64_at(&message.body, 0)?, u64_at(&message.body, 8)?);
            let inside = address >= ADDRESS
                && address
                    .checked_add(count)
                    .is_some_and(|end| end <= ADDRESS + SIZE);
            ensure!(
                inside,
                "{address:#x}+{count:#x} is not inside the mapping {ADDRESS:#x}+{SIZE:#x}"
            );
            ensure!((1..=MOST).contains(&count), "{count} bytes are asked for");
            let data = if command == DMA_WRITE { count as usize } else { 0 };
            same("payload bytes of the command", message.body.len(), 16 + data)?;
            return Ok(Request {
                message,
                address,
                count,
            });
        }
    }

    fn answer(&mut self, request: &Request, flags: u32, errno: u32, body: &[u8]) -> Result<()> {
        let mut bytes = encode(request.message.id, request.message.command, REPLY | flags, body);
        bytes[12..16].copy_from_slice(&errno.to_ne_bytes());
        let to = self.twin.as_mut().unwrap_or(&mut self.wire);
        ensure!(
            to.send(&bytes, &[])?,
            "the server closed the connection before an answer"
        );
        Ok(())
    }

    /// The trigger's own reply, if it has not come.
    fn settle(&mut self, written: u16, answered: bool) -> Result<()> {
        if !answered {
            let reply = self.wire.reply_to(written, REGION_WRITE)?;
            ensure!(
                reply.flags & ERROR == 0,
                "the trigger failed with errno {}",
                reply.error
            );
        }
        Ok(())
    }

    /// Reads until the device has what it was given: it may take its time after the answer.
    fn wait_for(&mut self, fact: &DmaFact, wanted: &[u8]) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let read = access(fact.data.region, fact.data.offset, 8, &[]);
        loop {
            let now = self.wire.good(REGION_READ, &read)?.body[16..].to_vec();
            if now == wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the device has {now:x?} within {LIMIT:?}, the client's memory {wanted:x?}");
            }
        }
    }

    /// Answers DMA_READs of `VALUE`, in as many pieces as the device asks for, and sees that the device has it.
    fn serve_read(&mut self, fact: &DmaFact) -> Result<()> {
        let (written, mut answered) = (self.pull(fact, ADDRESS + 0x10)?, false);
        let mut given = 0;
        while given < 8 {
            let request = self.request(DMA_READ, written, &mut answered)?;
            let start = request.address.wrapping_sub(ADDRESS + 0x10);
            ensure!(
                start + request.count <= 8,
                "the device reads {} bytes beside what it was told",
                request.count
            );
            let data = &VALUE[start as usize..(start + request.count) as usize];
            let body = [&request.message.body[..16], data].concat();
            self.answer(&request, 0, 0, &body)?;
            given += request.count;
        }
        self.settle(written, answered)?;
        self.wait_for(fact, &VALUE)
    }
}

fn one_socket(target: &Target<'_>) -> Result<Asked> {
    let mut wire = target.client()?;
    map_without_file(&mut wire)?;
    Ok(Asked { wire, twin: None })
}

fn dma_read(target: &Target<'_>) -> Result<Outcome> {
    let Some(fact) = &target.facts.dma_read else {
        return Ok(NO_READ);
    };
    let mut asked = one_socket(target)?;
    for _ in 0..3 {
        asked.serve_read(fact)?;
    }
    asked.wire.still_works()?;
    Ok(Outcome::Pass)
}

fn dma_write(target: &Target<'_>) -> Result<Outcome> {
    let Some(fact) = &target.facts.dma_write else {
        return Ok(Outcome::NotApplicable("the facts name no dma_write"));
    };
    let mut asked = one_socket(target)?;
    let body = access(fact.data.region, fact.data.offset, 8, &VALUE);
    asked
        .wire
        .good(REGION_WRITE, &body)
        .context("what the device shall write")?;
    let (written, mut answered) = (asked.pull(fact, ADDRESS + 0x20)?, false);
    let mut memory = [0; 8];
    let mut got = 0;
    while got < 8 {
        let request = asked.request(DMA_WRITE, written, &mut answered)?;
        let start = request.address.wrapping_sub(ADDRESS + 0x20);
        ensure!(
            start + request.count <= 8,
            "the device writes {} bytes beside what it was told",
            request.count
        );
        memory[start as usize..(start + request.count) as usize].copy_from_slice(&request.message.body[16..]);
        let body = request.message.body[..16].to_vec();
        asked.answer(&request, 0, 0, &body)?;
        got += request.count;
    }
    same("what the device wrote", memory, VALUE)?;
    asked.settle(written, answered)?;
    asked.wire.still_works()?;
    Ok(Outcome::Pass)
}

fn refused_read(target: &Target<'_>) -> Result<Outcome> {
    let Some(fact) = &target.facts.dma_read else {
        return Ok(NO_READ);
    };
    let mut asked = one_socket(target)?;
    let (written, mut answered) = (asked.pull(fact, ADDRESS + 0x10)?, false);
    let request = asked.request(DMA_READ, written, &mut answered)?;
    // EFAULT
    asked.answer(&request, ERROR, 14, &[])?;
    asked.settle(written, answered)?;
    asked.wire.still_works()?;
    asked.serve_read(fact).context("the access after a refused one")?;
    Ok(Outcome::Pass)
}

fn unmap_meanwhile(target: &Target<'_>) -> Result<Outcome> {
    let Some(fact) = &target.facts.dma_read else {
        return Ok(NO_READ);
    };
    let mut asked = one_socket(target)?;
    let (written, mut answered) = (asked.pull(fact, ADDRESS + 0x10)?, false);
    let request = asked.request(DMA_READ, written, &mut answered)?;
    asked.settle(written, answered)?;
    asked
        .wire
        .good(DMA_UNMAP, &unmap_body())
        .context("DMA_UNMAP while the client has not answered a DMA_READ")?;
    // Too late: to be thrown away.
    let body = [&request.message.body[..16], &vec![0xee; request.count as usize]].concat();
    asked.answer(&request, 0, 0, &body)?;
    asked.wire.still_works()?;
    map_without_file(&mut asked.wire)?;
    asked.serve_read(fact).context("the access after an unmap")?;
    Ok(Outcome::Pass)
}

fn twin(target: &Target<'_>) -> Result<Outcome> {
    let (mut wire, version) = target.client_with(WITH_TWIN)?;
    let agreed = capabilities(&version)?["twin_socket"].take();
    if agreed["supported"] != serde_json::Value::Bool(true) {
        return Ok(Outcome::NotApplicable("the server does not agree to twin_socket"));
    }
    let index = agreed["fd_index"]
        .as_u64()
        .context("twin_socket without fd_index")?;
    let fd: Option<OwnedFd> = version.fds.into_iter().nth(usize::try_from(index)?);
    let twin = Wire::over(fd.with_context(|| format!("no file descriptor {index} came with VERSION"))?)?;
    wire.still_works()?;
    let Some(fact) = &target.facts.dma_read else {
        return Ok(Outcome::NotApplicable(
            "the twin socket came; the facts name no dma_read to use it",
        ));
    };
    map_without_file(&mut wire)?;
    let mut asked = Asked {
        wire,
        twin: Some(twin),
    };
    for _ in 0..3 {
        asked.serve_read(fact)?;
    }
    Ok(Outcome::Pass)
}
