//! A conversation as Wireshark sees it.

use std::process::Command;

use super::over_fabric::Host;
use super::*;
use crate::fabric::{Capture, Captured, Fabric};

#[test]
fn test_capture_when_dissected_by_wireshark_has_every_packet_with_its_opcode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fabric.pcap");
    let capture = Capture::new(Box::new(std::fs::File::create(&path).unwrap())).unwrap();
    let fabric = Fabric::new();
    let (mut a, mut b) = (Host::new(&fabric, 0x10), Host::new(&fabric, 0x20));
    let (lid_a, lid_b) = (a.lid(), b.lid());
    a.connect(lid_b, 18);
    b.connect(lid_a, 18);
    a.post(Action::Write(at(0)), 0, 9000);
    a.post(Action::Read(at(0)), 1 << 20, 5000);
    a.post(Action::FetchAdd { at: at(8), add: 1 }, 0, 8);
    a.post(Action::SendImmediate(1), 0, 3);
    b.node.receives.entry(QP).or_default().push_back(Posted {
        token: 1,
        start: 0,
        len: 100,
    });
    let mut now = Time(1);
    while a.node.sent.len() < 4 {
        for host in [&mut a, &mut b] {
            let mut link = Captured::new(&mut host.end, Some(capture.clone()));
            host.transport.poll(now, &mut host.node, &mut link);
        }
        now = now + Duration::from_micros(1);
        assert!(now.0 < 1_000_000_000, "{:?}", a.node.sent);
    }
    let tshark = |more: &[&str]| {
        Command::new("tshark")
            .arg("-r")
            .arg(&path)
            .args(more)
            .output()
            .ok()
            .filter(|output| output.status.success())
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let Some(text) = tshark(&[
        "-T",
        "fields",
        "-e",
        "infiniband.bth.opcode",
        "-e",
        "infiniband.lrh.dlid",
    ]) else {
        println!("SKIP: no tshark here, nobody dissects {}", path.display());
        return;
    };
    let mut seen: Vec<(u32, u32)> = text
        .lines()
        .map(|line| {
            let numbers: Vec<u32> = line
                .split_whitespace()
                .map(|n| match n.strip_prefix("0x") {
                    Some(hex) => u32::from_str_radix(hex, 16).unwrap(),
                    None => n.parse().unwrap(),
                })
                .collect();
            let [opcode, dlid] = numbers[..] else {
                panic!("{line:?}: not dissected as far as the BTH")
            };
            (opcode, dlid)
        })
        .collect();
    let (to_a, to_b) = (u32::from(lid_a.0), u32::from(lid_b.0));
    // How many acknowledgements there are depends on how many are sent as one.
    seen.retain(|(opcode, _)| *opcode != 0x11);
    seen.sort_unstable();
    let mut expected = vec![
        (0x06, to_b),
        (0x07, to_b),
        (0x08, to_b),
        (0x0c, to_b),
        (0x0d, to_a),
        (0x0f, to_a),
        (0x12, to_a),
        (0x14, to_b),
        (0x05, to_b),
    ];
    expected.sort_unstable();
    assert_eq!(seen, expected, "{text}");
    let malformed = tshark(&["-Y", "_ws.malformed"]).expect("it worked before");
    assert_eq!(malformed, "");
}
