//! VERSION, the header, order, and connections.

use anyhow::{Result, bail, ensure};

use super::wire::*;
use super::{CAPABILITIES, Case, Outcome, Target, case, same, version};

pub(super) const CASES: &[Case] = &[
    case("version_is_agreed_on", "VFIO_USER_VERSION", agreed),
    case("version_capabilities_are_a_subset", "VFIO_USER_VERSION", subset),
    case(
        "version_without_data_is_accepted",
        "VFIO_USER_VERSION",
        without_data,
    ),
    case(
        "version_with_empty_object_is_accepted",
        "VFIO_USER_VERSION",
        empty_object,
    ),
    case("version_minor_is_not_raised", "VFIO_USER_VERSION", minor),
    case("version_of_unknown_major_is_refused", "VFIO_USER_VERSION", major),
    case(
        "version_data_that_is_no_json_is_refused",
        "VFIO_USER_VERSION",
        bad_json,
    ),
    case(
        "version_data_without_nul_is_harmless",
        "VFIO_USER_VERSION",
        no_nul,
    ),
    case("version_too_short_is_refused", "VFIO_USER_VERSION", short_version),
    case("version_has_to_come_first", "VFIO_USER_VERSION", first),
    case("unknown_command_is_answered_with_an_error", "Header", unknown),
    case("unknown_command_body_is_not_executed", "Header", smuggled),
    case("error_reply_has_an_errno", "Header", errno),
    case("no_reply_gets_no_reply", "Header", no_reply),
    case("no_reply_of_a_bad_message_gets_no_reply", "Header", no_reply_bad),
    case("message_id_is_echoed_even_when_used_twice", "Header", ids),
    case(
        "pipelined_commands_are_answered_in_order",
        "Command Concurrency",
        order,
    ),
    case("message_in_single_bytes_is_understood", "Header", single_bytes),
    case("message_size_below_a_header_is_refused", "Header", small),
    case("message_size_that_is_huge_is_refused", "Header", huge),
    case(
        "reply_that_nobody_asked_for_is_not_answered",
        "Header",
        unsolicited,
    ),
    case(
        "second_client_is_refused_and_the_first_goes_on",
        "Socket",
        second_client,
    ),
    case(
        "client_after_a_clean_close_is_served",
        "Client Disconnection",
        reconnect,
    ),
    case(
        "client_after_a_cut_message_is_served",
        "Client Disconnection",
        cut,
    ),
];

fn propose(target: &Target<'_>, body: &[u8]) -> Result<Message> {
    // The session before has to be over; a connection of its own shows that it is.
    drop(target.client()?);
    let mut last = None;
    for _ in 0..50 {
        let message = target.connect()?.call(VERSION, body);
        match message {
            // EBUSY: the connection before is still being cleaned up.
            Ok(message) if message.flags & ERROR != 0 && message.error == 16 => last = Some(Ok(message)),
            other => return other,
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    last.expect("the loop runs")
}

fn good(message: &Message) -> Result<()> {
    ensure!(message.flags & ERROR == 0, "refused with errno {}", message.error);
    ensure!(message.body.len() >= 4, "a reply of {} bytes", message.body.len());
    Ok(())
}

fn capabilities(message: &Message) -> Result<serde_json::Value> {
    let data = &message.body[4..];
    if data.is_empty() {
        return Ok(serde_json::Value::Null);
    }
    let Some((0, text)) = data.split_last() else {
        bail!("the version data does not end with NUL");
    };
    ensure!(!text.contains(&0), "NUL inside the version data");
    Ok(serde_json::from_slice(text)?)
}

fn agreed(target: &Target<'_>) -> Result<Outcome> {
    let message = propose(target, &version(0, 1, Some(CAPABILITIES)))?;
    good(&message)?;
    same(
        "major version",
        u16::from_ne_bytes([message.body[0], message.body[1]]),
        0,
    )?;
    let minor = u16::from_ne_bytes([message.body[2], message.body[3]]);
    ensure!(minor <= 1, "minor version {minor} is above the proposed 1");
    capabilities(&message)?;
    Ok(Outcome::Pass)
}

fn subset(target: &Target<'_>) -> Result<Outcome> {
    let proposed = r#"{"capabilities":{"max_msg_fds":2}}"#;
    let message = propose(target, &version(0, 1, Some(proposed)))?;
    good(&message)?;
    let data = capabilities(&message)?;
    let names = data["capabilities"].as_object().into_iter().flatten();
    for (name, _) in names {
        ensure!(
            name == "max_msg_fds",
            "{name} is in the reply and was not proposed"
        );
    }
    Ok(Outcome::Pass)
}

fn without_data(target: &Target<'_>) -> Result<Outcome> {
    good(&propose(target, &version(0, 1, None))?)?;
    Ok(Outcome::Pass)
}

fn empty_object(target: &Target<'_>) -> Result<Outcome> {
    good(&propose(target, &version(0, 1, Some("{}")))?)?;
    Ok(Outcome::Pass)
}

fn minor(target: &Target<'_>) -> Result<Outcome> {
    let message = propose(target, &version(0, 0, Some(CAPABILITIES)))?;
    good(&message)?;
    same(
        "minor version",
        u16::from_ne_bytes([message.body[2], message.body[3]]),
        0,
    )?;
    Ok(Outcome::Pass)
}

/// A first message that has to be refused, after which the server serves the next client.
fn bad_start(target: &Target<'_>, bytes: &[u8], why: &str) -> Result<Outcome> {
    drop(target.client()?);
    target.connect()?.refused(bytes, why)?;
    target.client()?.still_works()?;
    Ok(Outcome::Pass)
}

fn major(target: &Target<'_>) -> Result<Outcome> {
    let bytes = encode(1, VERSION, 0, &version(0x7fff, 0, Some(CAPABILITIES)));
    bad_start(target, &bytes, "major version 32767")
}

fn bad_json(target: &Target<'_>) -> Result<Outcome> {
    let bytes = encode(1, VERSION, 0, &version(0, 1, Some("{\"capabilities\":")));
    bad_start(target, &bytes, "version data cut short")
}

fn no_nul(target: &Target<'_>) -> Result<Outcome> {
    drop(target.client()?);
    let mut body = version(0, 1, Some(CAPABILITIES));
    body.pop();
    let mut wire = target.connect()?;
    // Accepted, refused or closed: but the server lives.
    wire.send(&encode(1, VERSION, 0, &body), &[])?;
    wire.receive()?;
    drop(wire);
    target.client()?.still_works()?;
    Ok(Outcome::Pass)
}

fn short_version(target: &Target<'_>) -> Result<Outcome> {
    bad_start(target, &encode(1, VERSION, 0, &[0, 0]), "a VERSION of two bytes")
}

fn first(target: &Target<'_>) -> Result<Outcome> {
    let bytes = encode(1, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    bad_start(target, &bytes, "GET_INFO before VERSION")
}

fn unknown(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    for command in [0, 0x7777, 0xffff] {
        wire.bad(command, &[0; 24], "an unknown command")?;
    }
    Ok(Outcome::Pass)
}

fn smuggled(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    // If the body were taken for a message, its reply would have this id.
    let inner = encode(0x6666, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    wire.bad(0x7777, &inner, "an unknown command")?;
    Ok(Outcome::Pass)
}

fn errno(target: &Target<'_>) -> Result<Outcome> {
    if target.facts.errno_may_be_zero {
        return Ok(Outcome::NotApplicable("by the facts, errno may be 0"));
    }
    let mut wire = target.client()?;
    let bad_region = access(0xffff, 0, 4, &[]);
    for (command, body) in [(0x7777, &[][..]), (REGION_READ, &bad_region)] {
        let errno = wire.bad(command, body, "a message that makes no sense")?;
        ensure!(
            (1..4096).contains(&errno),
            "command {command} is refused with errno {errno}: a client takes 0 for success"
        );
    }
    Ok(Outcome::Pass)
}

fn no_reply(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let posted = encode(0x6666, GET_INFO, NO_REPLY, &words(&[16, 0, 0, 0]));
    wire.send(&posted, &[])?;
    wire.still_works()?;
    Ok(Outcome::Pass)
}

fn no_reply_bad(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let beyond = access(7, 1 << 40, 4, &[0; 4]);
    wire.send(&encode(0x6666, REGION_WRITE, NO_REPLY, &beyond), &[])?;
    wire.send(&encode(0x6666, 0x7777, NO_REPLY, &[]), &[])?;
    wire.still_works()?;
    Ok(Outcome::Pass)
}

fn ids(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    for id in [0, 7, 7, 0xffff, 0x8000] {
        wire.send(&encode(id, GET_INFO, 0, &words(&[16, 0, 0, 0])), &[])?;
    }
    for id in [0, 7, 7, 0xffff, 0x8000] {
        wire.reply_to(id, GET_INFO)?;
    }
    Ok(Outcome::Pass)
}

fn order(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let read = access(7, 0, 4, &[]);
    let kinds: [(u16, Vec<u8>); 5] = [
        (GET_INFO, words(&[16, 0, 0, 0])),
        (REGION_READ, read),
        (GET_IRQ_INFO, words(&[16, 0, 2, 0])),
        (0x7777, vec![1; 5]),
        (GET_REGION_INFO, words(&[32, 0, 7, 0, 0, 0, 0, 0])),
    ];
    let mut bytes = Vec::new();
    let count = 100u16;
    for id in 0..count {
        let (command, body) = &kinds[usize::from(id) % kinds.len()];
        bytes.extend(encode(id, *command, 0, body));
    }
    ensure!(wire.send(&bytes, &[])?, "the server closed the connection");
    for id in 0..count {
        wire.reply_to(id, kinds[usize::from(id) % kinds.len()].0)?;
    }
    Ok(Outcome::Pass)
}

fn single_bytes(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    let id = wire.id();
    for byte in encode(id, GET_INFO, 0, &words(&[16, 0, 0, 0])) {
        wire.send(&[byte], &[])?;
    }
    let message = wire.reply_to(id, GET_INFO)?;
    ensure!(message.flags & ERROR == 0, "refused with errno {}", message.error);
    Ok(Outcome::Pass)
}

fn sized(target: &Target<'_>, size: u32, why: &str) -> Result<Outcome> {
    let mut wire = target.client()?;
    let mut bytes = encode(5, GET_INFO, 0, &[]);
    bytes[4..8].copy_from_slice(&size.to_ne_bytes());
    wire.refused(&bytes, why)?;
    drop(wire);
    target.client()?.still_works()?;
    Ok(Outcome::Pass)
}

fn small(target: &Target<'_>) -> Result<Outcome> {
    sized(target, 15, "a message of 15 bytes")?;
    sized(target, 0, "a message of 0 bytes")
}

fn huge(target: &Target<'_>) -> Result<Outcome> {
    sized(target, u32::MAX, "a message of 4 GiB")
}

fn unsolicited(target: &Target<'_>) -> Result<Outcome> {
    let mut wire = target.client()?;
    wire.send(&encode(0x6666, GET_INFO, REPLY, &words(&[16, 0, 0, 0])), &[])?;
    let id = wire.id();
    if !wire.send(&encode(id, GET_INFO, 0, &words(&[16, 0, 0, 0])), &[])? {
        return Ok(Outcome::Pass);
    }
    // Ignored or hung up on, both are fine; an answer to an answer is not.
    match wire.receive()? {
        Answer::Closed => {}
        Answer::Message(message) => same("message id of the next reply", message.id, id)?,
    }
    Ok(Outcome::Pass)
}

fn second_client(target: &Target<'_>) -> Result<Outcome> {
    if !target.facts.single_client {
        return Ok(Outcome::NotApplicable("the facts do not say single_client"));
    }
    let mut held = target.client()?;
    held.still_works()?;
    let bytes = encode(1, VERSION, 0, &version(0, 1, Some(CAPABILITIES)));
    target.connect()?.refused(&bytes, "a second client")?;
    held.still_works()?;
    Ok(Outcome::Pass)
}

fn reconnect(target: &Target<'_>) -> Result<Outcome> {
    for _ in 0..3 {
        target.client()?.still_works()?;
    }
    Ok(Outcome::Pass)
}

fn cut(target: &Target<'_>) -> Result<Outcome> {
    let whole = encode(5, GET_INFO, 0, &words(&[16, 0, 0, 0]));
    for len in [1, 15, 16, 20] {
        target.client()?.send(&whole[..len], &[])?;
    }
    target.client()?.still_works()?;
    Ok(Outcome::Pass)
}
