//! Payload that stays with its sender until it is delivered.

use std::sync::Mutex;

use super::*;

/// What a node has lent. It knows when it may be looked at no more.
#[derive(Debug)]
pub(super) struct Lending {
    state: Mutex<Pieces>,
}

#[derive(Debug)]
struct Pieces {
    lent: Vec<Piece>,
    dice: Dice,
    /// In parts per thousand: how often a look finds nothing.
    gone: u16,
    /// So many looks find something before that.
    good: usize,
    shown: usize,
}

#[derive(Debug)]
struct Piece {
    qpn: Qpn,
    index: u32,
    bytes: Vec<u8>,
    ended: bool,
}

/// Bytes that are shown at a time: a page.
const STEP: usize = 4096;

impl Lending {
    pub(super) fn new(seed: u64, gone: u16) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(Pieces {
                lent: Vec::new(),
                dice: Dice::new(seed),
                gone,
                good: 0,
                shown: 0,
            }),
        })
    }

    pub(super) fn lend(self: &Arc<Self>, qp: QpId, index: u32, bytes: &[u8]) -> Lent {
        let lent = &mut self.state.lock().unwrap().lent;
        lent.push(Piece {
            qpn: qp.qpn,
            index,
            bytes: bytes.into(),
            ended: false,
        });
        Lent {
            lender: self.clone(),
            place: Place {
                space: lent.len() as u64 - 1,
                key: 0,
                va: 0,
            },
        }
    }

    /// The sender's program may use the memory again.
    pub(super) fn end(&self, qp: QpId, index: u32) {
        for piece in &mut self.state.lock().unwrap().lent {
            piece.ended |= (piece.qpn, piece.index) == (qp.qpn, index);
        }
    }

    fn shown(&self) -> usize {
        self.state.lock().unwrap().shown
    }

    /// The first looks find something, the others nothing.
    fn last(&self, good: usize) {
        let mut state = self.state.lock().unwrap();
        (state.good, state.gone) = (good, 1000);
    }
}

impl Lender for Lending {
    fn show(
        &self,
        place: Place,
        len: usize,
        take: &mut dyn FnMut(Shown<'_>) -> usize,
    ) -> Result<usize, Gone> {
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        if state.good > 0 {
            state.good -= 1;
        } else if state.dice.permille(state.gone) {
            return Err(Gone);
        }
        let piece = &state.lent[place.space as usize];
        assert!(
            !piece.ended,
            "request {} of {:?} has completed, and its memory is read",
            piece.index, piece.qpn
        );
        state.shown += 1;
        let bytes = &piece.bytes[place.va as usize..][..len.min(STEP)];
        Ok(take(Shown::Bytes(bytes)))
    }
}

fn lending(gone: u16) -> Options {
    Options {
        lend: Some(gone),
        ..Options::default()
    }
}

/// 150,000 bytes at the beginning of one side's memory.
fn filled(pair: &mut Pair) -> Vec<u8> {
    let data = pattern(3, LEN as usize);
    pair.a.node.memory[..data.len()].copy_from_slice(&data);
    data
}

const LEN: u32 = 150_000;

fn lender(side: &Side2) -> &Lending {
    side.node.lending.as_ref().unwrap()
}

#[test]
fn test_messages_when_lent_are_not_gathered() {
    let mut pair = Pair::connected(lending(0));
    let data = filled(&mut pair);
    pair.b.receive(QP, 1, 1 << 20, 1 << 20);
    pair.a.post(QP, Action::Write(at(4096)), 0, LEN);
    pair.a.post(QP, Action::Send, 0, LEN);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success; 2]);
    assert_eq!(&pair.b.node.memory[4096..][..data.len()], data);
    assert_eq!(&pair.b.node.memory[1 << 20..][..data.len()], data);
    assert_eq!(pair.b.node.received[0].2.len, LEN);
    assert_eq!((pair.a.node.gathered, pair.a.transport.stats().lent), (0, 6));
    // Short ones, and those of services without acknowledgements, carry their bytes.
    pair.a.post(QP, Action::Write(at(0)), 0, 4096);
    pair.run_all();
    assert_eq!((pair.a.node.gathered, pair.a.transport.stats().lent), (4096, 6));
    let mut pair = Pair::connected(Options {
        service: ServiceType::Uc,
        ..lending(0)
    });
    pair.a.post(QP, Action::Write(at(0)), 0, LEN);
    pair.run_all();
    assert_eq!(pair.a.node.gathered, u64::from(LEN));
}

#[test]
fn test_loan_when_it_cannot_be_had_comes_with_bytes_and_uses_no_retry() {
    // From the first look on, in the middle of a segment, and in the middle of the message.
    for good in [0, 3, 20] {
        let mut pair = Pair::connected(Options {
            retry_count: 0,
            rnr_retry: 0,
            ..lending(0)
        });
        let data = filled(&mut pair);
        lender(&pair.a).last(good);
        pair.b.receive(QP, 1, 1 << 20, 1 << 20);
        pair.a.post(QP, Action::SendImmediate(5), 0, LEN);
        pair.a.post(QP, Action::Write(at(0)), 0, LEN);
        pair.run_all();
        assert_eq!(pair.a.statuses(), [Status::Success; 2], "{good}");
        assert_eq!(&pair.b.node.memory[1 << 20..][..data.len()], data, "{good}");
        assert_eq!(&pair.b.node.memory[..data.len()], data, "{good}");
        assert_eq!(pair.b.node.received.len(), 1, "{good}");
        let (a, b) = (pair.a.transport.stats(), pair.b.transport.stats());
        assert_eq!(
            (a.recalls_received, b.recalls_sent, a.timeouts),
            (1, 1, 0),
            "{good}"
        );
    }
}

#[test]
fn test_lending_when_a_loan_was_called_back_is_tried_again_later() {
    let mut pair = Pair::connected(lending(1000));
    let data = filled(&mut pair);
    pair.a.post(QP, Action::Write(at(0)), 0, LEN);
    pair.run_all();
    lender(&pair.a).state.lock().unwrap().gone = 0;
    for _ in 0..20 {
        pair.a.post(QP, Action::Write(at(1 << 20)), 0, LEN);
    }
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success; 21]);
    assert!(lender(&pair.a).shown() > 0);
    assert_eq!(pair.a.transport.stats().recalls_received, 1);
    assert_eq!(&pair.b.node.memory[1 << 20..][..data.len()], data);
}

#[test]
fn test_fault_when_lent_memory_is_absent_parks_its_sender_or_fails_its_request() {
    let mut pair = Pair::connected(lending(1000));
    let data = filled(&mut pair);
    pair.a.node.park = ParkPlan {
        permille: 700,
        only: Some(Side::Send),
    };
    pair.a.post(QP, Action::Write(at(0)), 0, LEN);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
    assert_eq!(&pair.b.node.memory[..data.len()], data);
    // A loan after the first segment is gone, and then cannot be read at all.
    let mut pair = Pair::connected(lending(0));
    lender(&pair.a).last(16);
    pair.a.node.fail_gather = Some(Status::LocalProtection);
    pair.a.post(QP, Action::Write(at(0)), 0, LEN);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::LocalProtection]);
    assert_eq!(pair.a.transport.status(QP).unwrap().state, State::Error);
}

#[test]
fn test_loan_when_the_target_is_absent_in_the_middle_goes_on_where_it_stopped() {
    for permille in [300, 900] {
        let mut pair = Pair::connected(lending(0));
        let data = filled(&mut pair);
        pair.b.node.park = ParkPlan {
            permille,
            only: Some(Side::Receive),
        };
        pair.b.receive(QP, 1, 1 << 20, 1 << 20);
        pair.a.post(QP, Action::WriteImmediate(at(0), 1), 0, LEN);
        pair.run_all();
        assert_eq!(pair.a.statuses(), [Status::Success]);
        assert_eq!(&pair.b.node.memory[..data.len()], data);
        assert_eq!((pair.a.node.gathered, pair.b.node.received.len()), (0, 1));
        assert!(pair.b.transport.stats().parks > 0);
    }
}

/// What ends requests before their loans have been delivered.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Error,
    Reset,
    Destroyed,
    Dropped,
    Retries,
}

#[test]
fn test_loan_when_its_request_ended_before_delivery_is_not_looked_at() {
    use Ending as E;
    for ending in [E::Error, E::Reset, E::Destroyed, E::Dropped, E::Retries] {
        for held in [false, true] {
            let mut pair = Pair::connected(Options {
                retry_count: 1,
                ..lending(0)
            });
            filled(&mut pair);
            pair.b.node.park = ParkPlan {
                permille: if held { 1000 } else { 0 },
                only: Some(Side::Receive),
            };
            pair.a.post(QP, Action::Write(at(0)), 0, LEN);
            while pair
                .a
                .transport
                .poll(pair.now, &mut pair.a.node, &mut pair.a.link)
                .again
            {}
            if held {
                // Delivered, and it waits for a page there.
                pair.b
                    .transport
                    .poll(pair.now, &mut pair.b.node, &mut pair.b.link);
                assert_eq!(pair.b.node.parked, [(QP, Side::Receive)]);
            }
            let (transport, node) = (&mut pair.a.transport, &mut pair.a.node);
            let none = Attributes::default();
            match ending {
                E::Error => transport.modify(QP, State::Error, &none, node).unwrap(),
                E::Reset => transport.modify(QP, State::Reset, &none, node).unwrap(),
                E::Destroyed => transport.destroy(QP).unwrap(),
                E::Dropped => *transport = Transport::default(),
                E::Retries => {
                    for _ in 0..1000 {
                        pair.now = pair.now + Duration::from_millis(100);
                        transport.poll(pair.now, node, &mut pair.a.link);
                    }
                    assert_eq!(node.sent, [(QP, 0, Status::RetryExceeded)]);
                }
            }
            // In every case the program may use its memory again.
            let qp = QpId { qpn: QP, key: 0 };
            lender(&pair.a).end(qp, 0);
            let before = lender(&pair.a).shown();
            pair.b.node.memory.fill(0x55);
            pair.b.node.park.permille = 0;
            pair.run_all();
            assert_eq!(lender(&pair.a).shown(), before, "{ending:?} {held}");
            assert!(
                pair.b.node.memory.iter().all(|byte| *byte == 0x55),
                "{ending:?} {held}"
            );
            assert!(pair.b.transport.stats().recalls_sent > 0, "{ending:?} {held}");
        }
    }
}

#[test]
fn test_loan_when_its_way_leads_out_of_the_process_by_now_is_lost_and_comes_with_bytes() {
    let mut pair = Pair::connected(lending(0));
    let data = filled(&mut pair);
    pair.a.link.inner().cut = true;
    pair.a.post(QP, Action::Write(at(0)), 0, LEN);
    pair.settle();
    assert!(pair.a.node.sent.is_empty());
    pair.a.link.inner().near = false;
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
    assert_eq!(&pair.b.node.memory[..data.len()], data);
    assert_eq!(lender(&pair.a).shown(), 0);
}
