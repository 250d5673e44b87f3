//! Random work through a bad link, with what must come of it as the oracle.

use super::*;

/// What was posted, to compare with.
struct Plan {
    writes: Vec<(u64, Vec<u8>)>,
    sends: Vec<Vec<u8>>,
    reads: Vec<(u64, Vec<u8>)>,
    adds: u64,
    add_results: Vec<u64>,
    posted: usize,
}

const SOURCE: u64 = 0;
const RESULTS: u64 = 2 << 20;
const RECEIVES: u64 = 1 << 20;
const WRITES: u64 = 2 << 20;
const READS: u64 = 0x10_000;

fn work(side: &mut Side2, other: &mut Side2, own: Qpn, dest: Qpn, dice: &mut Dice, base: u64) -> Plan {
    let mut plan = Plan {
        writes: Vec::new(),
        sends: Vec::new(),
        reads: Vec::new(),
        adds: 0,
        add_results: Vec::new(),
        posted: 0,
    };
    let (mut source, mut result, mut receive, mut target) =
        (SOURCE + base, RESULTS + base, RECEIVES + base, WRITES + base);
    for i in 0..30 {
        let len = match dice.below(4) {
            0 => dice.below(3),
            1 => dice.below(1100),
            2 => 1024 * dice.below(4),
            _ => dice.below(9000),
        } as usize;
        let data = pattern(dice.roll(), len);
        match dice.below(5) {
            0 | 1 => {
                side.node.memory[source as usize..][..len].copy_from_slice(&data);
                // (Receives come before and after the message.)
                other.receive(dest, base + i, receive, 10_000);
                side.post(own, Action::SendImmediate(i as u32), source, len as u32);
                receive += 10_000;
                source += len as u64;
                plan.sends.push(data);
            }
            2 => {
                side.node.memory[source as usize..][..len].copy_from_slice(&data);
                side.post(own, Action::Write(at(target)), source, len as u32);
                source += len as u64;
                plan.writes.push((target, data));
                target += 10_000;
            }
            3 => {
                let from = READS + base + dice.below(1000);
                let data = other.node.memory[from as usize..][..len].to_vec();
                side.post(own, Action::Read(at(from)), result, len as u32);
                plan.reads.push((result, data));
                result += 10_000;
            }
            _ => {
                let word = READS + base - 8;
                side.post(own, Action::FetchAdd { at: at(word), add: 1 }, result, 8);
                plan.add_results.push(result);
                result += 8;
                plan.adds += 1;
            }
        }
        plan.posted += 1;
    }
    plan
}

fn check(plan: &Plan, side: &Side2, other: &Side2, own: Qpn, dest: Qpn, base: u64, note: &str) {
    let statuses: Vec<(u32, Status)> = side
        .node
        .sent
        .iter()
        .filter(|(qpn, ..)| *qpn == own)
        .map(|(_, index, status)| (*index, *status))
        .collect();
    let all: Vec<(u32, Status)> = (0..plan.posted as u32).map(|i| (i, Status::Success)).collect();
    assert_eq!(statuses, all, "{note}: completions in order, once");
    let received: Vec<&(Qpn, u64, Received)> = other
        .node
        .received
        .iter()
        .filter(|(qpn, ..)| *qpn == dest)
        .collect();
    assert_eq!(
        received.len(),
        plan.sends.len(),
        "{note}: messages delivered once"
    );
    for (i, (data, (_, _, completion))) in plan.sends.iter().zip(&received).enumerate() {
        assert_eq!(completion.len as usize, data.len(), "{note}: message {i}");
        let start = (RECEIVES + base) as usize + i * 10_000;
        assert_eq!(
            &other.node.memory[start..][..data.len()],
            data,
            "{note}: message {i}"
        );
    }
    for (start, data) in &plan.writes {
        assert_eq!(
            &other.node.memory[*start as usize..][..data.len()],
            data,
            "{note}: write"
        );
    }
    for (start, data) in &plan.reads {
        assert_eq!(
            &side.node.memory[*start as usize..][..data.len()],
            data,
            "{note}: read"
        );
    }
    let word = |memory: &[u8], at: u64| u64::from_le_bytes(memory[at as usize..][..8].try_into().unwrap());
    assert_eq!(
        word(&other.node.memory, READS + base - 8),
        plan.adds,
        "{note}: atomics once"
    );
    let results: Vec<u64> = plan
        .add_results
        .iter()
        .map(|at| word(&side.node.memory, *at))
        .collect();
    assert_eq!(
        results,
        (0..plan.adds).collect::<Vec<_>>(),
        "{note}: atomics in order"
    );
}

fn run(seed: u64, impairments: Impairments, park: u16, cut: bool, lend: Option<u16>) {
    let note = format!("seed {seed}, {impairments:?}, park {park}, cut {cut}, lend {lend:?}");
    let options = Options {
        seed,
        impairments,
        park,
        cut,
        lend,
        config: Config {
            // Several segments for a message, several windows.
            segment: 2048,
            window: 8192,
            least_loan: 1,
            ..Config::default()
        },
        ..Options::default()
    };
    let mut pair = Pair::connected(options);
    pair.connect(qpn(0x50), qpn(0x51), options);
    let mut dice = Dice::new(seed);
    // Each side works with its own half of the memory of both.
    let (low, high) = (0x20_000, 0x80_000);
    for (side, base) in [(&mut pair.a, high), (&mut pair.b, low)] {
        let bytes = pattern(seed ^ base, 20_000);
        let start = (READS + base) as usize;
        side.node.memory[start..][..20_000].copy_from_slice(&bytes);
    }
    let one = work(&mut pair.a, &mut pair.b, QP, QP, &mut dice, low);
    let two = work(&mut pair.b, &mut pair.a, qpn(0x51), qpn(0x50), &mut dice, high);
    pair.run(Duration::from_secs(600));
    check(&one, &pair.a, &pair.b, QP, QP, low, &note);
    check(&two, &pair.b, &pair.a, qpn(0x51), qpn(0x50), high, &note);
}

#[test]
fn test_reliable_connections_when_the_link_is_bad_deliver_once_and_in_order() {
    let rounds = std::env::var("TLBRIDGE_TRANSPORT_SEEDS").map_or(40, |n| n.parse().expect("a number"));
    let bad = |loss, duplicate, reorder| Impairments {
        loss,
        duplicate,
        reorder,
        delay: Duration::from_micros(300),
    };
    for seed in 0..rounds {
        for impairments in [bad(0, 0, 0), bad(30, 0, 0), bad(0, 100, 100), bad(20, 30, 30)] {
            for (park, cut, lend) in [
                (0, false, None),
                (0, true, None),
                (100, false, None),
                (60, true, None),
                (0, false, Some(0)),
                (60, false, Some(100)),
            ] {
                run(seed, impairments, park, cut, lend);
            }
        }
    }
}

#[test]
fn test_run_when_repeated_with_the_same_seed_is_the_same() {
    let trace = |seed| {
        let mut pair = Pair::connected(Options {
            seed,
            impairments: Impairments {
                loss: 100,
                duplicate: 50,
                reorder: 100,
                delay: Duration::from_micros(50),
            },
            ..Options::default()
        });
        for i in 0..50 {
            pair.a.post(QP, Action::Write(at(i * 1000)), 0, 900);
        }
        pair.run_all();
        (pair.now, pair.a.transport.stats(), pair.b.transport.stats())
    };
    assert_eq!(trace(3), trace(3));
    assert_ne!(trace(3), trace(4));
}
