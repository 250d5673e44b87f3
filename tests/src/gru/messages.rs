//! Message queues between GRU senders and a receiver that uses the processor.

use std::sync::Arc;
use std::time::Instant;

use driver::gru::FaultMode;
use driver::gru::message_queue::{MAX_MESSAGE, QueueError, QueueMemory, Receiver, Sender, create};
use protos::gru::message_queue::{Head, start_of_half};

use super::memory::FRAME;
use super::page_table::PageTable;
use super::rig::{PATIENCE, Rig, User, pattern, wants};

const QUEUE: u64 = 0x7f40_0000_0000;

/// The processor's view of the queue.
#[derive(Debug)]
struct View(Arc<PageTable>);

impl QueueMemory for View {
    fn load(&self, offset: u64) -> u64 {
        self.0.read64(QUEUE + offset)
    }
    fn store(&self, offset: u64, value: u64) {
        self.0.write(QUEUE + offset, &value.to_le_bytes());
    }
}

fn queue(rig: &Rig, cbs: usize, bytes: u64) -> (User, Receiver<View>, Arc<PageTable>) {
    let (mm, table) = rig.space();
    table.populate(QUEUE, bytes.next_multiple_of(FRAME), true, |_| 0xdb);
    create(&View(Arc::clone(&table)), bytes).expect("a queue");
    let user = User::new(&mm, wants(cbs, 4096, FaultMode::Interrupt));
    let receiver = Receiver::new(View(Arc::clone(&table)), bytes).expect("its receiver");
    (user, receiver, table)
}

fn text(number: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| pattern(number, i)).collect()
}

/// Tries again while the chip says that it is busy. Returns how often it said so.
fn send(sender: &Sender<'_>, message: &[u8]) -> Result<u64, QueueError> {
    let since = Instant::now();
    let mut congested = 0;
    loop {
        match sender.send(message, &|| since.elapsed() < PATIENCE) {
            Ok(()) => return Ok(congested),
            Err(QueueError::Congestion(_)) => congested += 1,
            Err(error) => return Err(error),
        }
        assert!(since.elapsed() < PATIENCE, "congested for too long");
    }
}

/// A queue of 512 bytes takes exactly four messages of one line; the fifth finds it full.
///
/// # Panics
/// When it does not.
pub fn conformance(rig: &Rig) {
    let (user, mut receiver, table) = queue(rig, 2, 512);
    let sender = Sender::new(&user.gseg, 0, 0, QUEUE, 512).expect("a sender");
    for round in 0..3 {
        for number in 0..4 {
            send(&sender, &text(round * 10 + number, 60)).expect("room for a message");
        }
        for _ in 0..2 {
            let full = send(&sender, &text(99, 60));
            assert!(matches!(full, Err(QueueError::Full)), "{full:?}");
        }
        for number in 0..4 {
            let (message, len) = receiver.receive().expect("a message");
            assert_eq!(message[..len], text(round * 10 + number, 60));
        }
        assert_eq!(receiver.receive(), None);
    }
    // After the third round the senders are in the second half again.
    let head = Head::from_bits(table.read64(QUEUE));
    assert_eq!(head, start_of_half(6, 1).with_head(6));
}

/// Two lines where one is left: a filler takes it, and no message is cut or lost.
///
/// # Panics
/// When one is.
pub fn two_lines(rig: &Rig) {
    let (user, mut receiver, _table) = queue(rig, 2, 1024 + 64);
    let sender = Sender::new(&user.gseg, 1, 256, QUEUE, 1024 + 64).expect("a sender");
    let lengths = [100, 20, MAX_MESSAGE, 0, 61, 60];
    let (mut sent, mut received) = (0u64, 0u64);
    let check = |message: &[u8], number: u64| {
        let len = lengths[number as usize % lengths.len()];
        assert_eq!(message[..len], text(number, len), "message {number}");
    };
    while sent < 300 {
        let len = lengths[sent as usize % lengths.len()];
        match send(&sender, &text(sent, len)) {
            Ok(_) => sent += 1,
            Err(QueueError::Full) => {
                // Full means: there is something to take.
                let (message, len) = receiver.receive().expect("a message in a full queue");
                check(&message[..len], received);
                received += 1;
            }
            Err(error) => panic!("message {sent}: {error}"),
        }
    }
    while let Some((message, len)) = receiver.receive() {
        check(&message[..len], received);
        received += 1;
    }
    assert_eq!(received, sent);
}

/// Several senders while the queue's pages move: each message arrives once, in the order of its sender. Returns how
/// often a sender was told that the chip is busy.
///
/// # Panics
/// When one is lost, mixed or twice there.
#[must_use]
pub fn many_senders(rig: &Rig, each: u64) -> u64 {
    const SENDERS: usize = 3;
    let bytes = 2048;
    let (mm, table) = rig.space();
    table.populate(QUEUE, FRAME, true, |_| 0);
    create(&View(Arc::clone(&table)), bytes).expect("a queue");
    let user = User::new(&mm, wants(4, 4096, FaultMode::Interrupt));
    let mut receiver = Receiver::new(View(Arc::clone(&table)), bytes).expect("its receiver");
    let congested = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|number| {
                let user = &user;
                scope.spawn(move || {
                    let sender = Sender::new(&user.gseg, number, 128 * number as u32, QUEUE, bytes);
                    let sender = sender.expect("a sender");
                    let mut congested = 0;
                    for count in 0..each {
                        let len = if count % 3 == 0 { 100 } else { 50 };
                        let mut message = vec![number as u8];
                        message.extend(count.to_le_bytes());
                        message.extend(text(count, len));
                        let since = Instant::now();
                        loop {
                            match send(&sender, &message) {
                                Ok(busy) => break congested += busy,
                                Err(QueueError::Full) => std::thread::yield_now(),
                                Err(error) => panic!("sender {number}: {error}"),
                            }
                            assert!(since.elapsed() < PATIENCE, "full for too long");
                        }
                    }
                    congested
                })
            })
            .collect();
        let mut next = [0u64; SENDERS];
        let (mut received, mut moved_at) = (0, 0);
        let since = Instant::now();
        while received < SENDERS as u64 * each {
            assert!(since.elapsed() < PATIENCE, "{received} messages, then nothing");
            if received % 16 == 5 && moved_at != received {
                // Once for so many messages: a page that was moved keeps its old frame, to be looked at in the end.
                moved_at = received;
                table.migrate(&mm, QUEUE);
            }
            let Some((message, len)) = receiver.receive() else {
                std::thread::yield_now();
                continue;
            };
            let sender = usize::from(message[0]);
            let count = u64::from_le_bytes(message[1..9].try_into().unwrap());
            assert_eq!(count, next[sender], "sender {sender}");
            let text = text(count, if count.is_multiple_of(3) { 100 } else { 50 });
            assert!(len >= 9 + text.len() && message[9..9 + text.len()] == text);
            next[sender] += 1;
            received += 1;
        }
        senders.into_iter().map(|sender| sender.join().unwrap()).sum()
    });
    assert_eq!(receiver.receive(), None);
    congested
}
