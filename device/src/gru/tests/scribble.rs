//! A client that stores anything anywhere: by trap, and in the memory that it may map (with the file
//! descriptor it can map all of the BAR). No engine dies of it, and a reset is bounded.

use super::*;

const VA: u64 = 0x7000_0000;
/// CBR maps of contexts 0 and 1: physical CBRs 2, 3, 6, 7 and 4, 5, 8, 9.
const MAPS: [u64; 2] = [0b1010, 0b1_0100];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 17) % limit
    }

    fn pick(&mut self, from: &[u64]) -> u64 {
        from[self.below(from.len() as u64) as usize]
    }

    /// A word that some unit looks at.
    fn place(&mut self) -> u64 {
        let handle = |region: u64, index: u64, word: u64| region + index * map::HANDLE_STRIDE + 8 * word;
        let context = self.below(3) * map::GSEG_STRIDE;
        match self.below(10) {
            0..3 => context + handle(map::GSEG_CB, self.below(5), self.below(9)),
            3 => context + map::GSEG_DS + 8 * self.below(2048),
            4 => handle(map::TFM, self.below(16), self.below(8)),
            5 => handle(map::TGH, self.below(25), self.below(6)),
            6 => handle(map::CBE, self.below(12), self.below(8)),
            7 | 8 => handle(map::TFH, self.below(12), self.below(6)),
            _ => handle(map::CCH, self.below(3), self.below(8)),
        }
    }

    fn value(&mut self) -> u64 {
        let any = self.next();
        match self.below(8) {
            0 => any,
            // A command with a likely operation, status ACTIVE where handles have it.
            1 => 1 | 0x2_0000 | any & 0x7f,
            // An instruction of a low operation code.
            2 | 3 => 1 | any & 0xf_0700 | (any & 0xff) << 32 | 2 << 56,
            4 => VA + (any & 0x1f_ffff),
            5 => self.pick(&[0, 1, u64::MAX, 1 << 63, (1 << 22) - 1, 4096]),
            6 => IOVA >> 12 | any & 0x7ff | (any >> 60) << 48,
            _ => any & 0x3fff,
        }
    }
}

/// An answer as a driver gives it, for whatever the TFH says.
fn answer(rig: &Rig, random: &mut Random) {
    let at = Rig::tfh_at(2 + random.below(8) as usize);
    let word = |offset| rig.gru.hardware.memory.word(at + offset);
    let asid = tfh::Asids::from_bits(word(tfh::ASIDS).load(Ordering::Acquire)).missasid();
    let asids = tfh::Asids::new()
        .with_fillasid(asid)
        .with_dirty(random.below(4) > 0);
    let target = tfh::Target::new().with_pfn((IOVA >> 12) + random.below(MEMORY / PAGE));
    let code = random.pick(&[0, 0, 0, 1, 2, 5, 9]) as u8;
    word(tfh::ASIDS).store(asids.into_bits(), Ordering::Release);
    word(tfh::TARGET).store(target.with_pagesize(code).into_bits(), Ordering::Release);
    let va = word(tfh::MISSVADDR).load(Ordering::Acquire);
    word(tfh::FILLVADDR).store(va, Ordering::Release);
    let opc = tfh::Opc(random.pick(&[2, 3, 3, 3, 3, 1, 4, 7]) as u8);
    let control = tfh::Control::from_bits(word(tfh::CONTROL).load(Ordering::Acquire));
    let go = control
        .with_opc(opc)
        .with_cmd(true)
        .with_status(HandleStatus::ACTIVE);
    word(tfh::CONTROL).store(go.into_bits(), Ordering::Release);
}

/// An instruction as a user gives it, if the CB is there.
fn instruct(rig: &Rig, random: &mut Random) {
    let dword = cb::XType::DWORD;
    let (va, count) = (VA + 8 * random.below(1 << 16), random.below(3000));
    let exopc = random.below(16) as u8;
    let line = va & !63;
    let instruction = match random.below(12) {
        0 => Instruction::vset(va, 7, dword, count, 1),
        1 => Instruction::vload(va, 0, dword, count % 600, 1),
        2 => Instruction::vstore(va, 0, dword, count % 600, 1),
        3 => Instruction::bcopy(va, VA + 8 * random.below(1 << 16), 0, 4, dword, count),
        4 => Instruction::gamir(va, cb::ImplicitOp(exopc), dword),
        5 => Instruction::gamirr(va, cb::ImplicitOp(exopc), dword),
        6 => Instruction::gamer(va, cb::ExplicitOp(exopc), count, va, dword),
        7 => Instruction::gamerr(va, cb::ExplicitOp(exopc), count, va, dword),
        8 => Instruction::gamxr(line, 0, 1 << random.below(4)),
        // Whatever the memory has for a head.
        9 => Instruction::mesq(line, 0, count % 4),
        10 => Instruction::bstore(0, va, 0, dword, count % 600),
        _ => Instruction::vflush(line, cb::XType::CACHE_LINE, count, 3),
    };
    let instruction = match random.below(8) {
        0 => Instruction {
            baddr0: instruction.baddr0.wrapping_sub(VA).wrapping_add(IOVA),
            baddr1_value_op2: instruction.baddr1_value_op2.wrapping_sub(VA).wrapping_add(IOVA),
            ..instruction.with_ima(cb::ima::UNMAPPED)
        },
        1 => instruction.with_ima(cb::ima::INTERRUPT),
        _ => instruction,
    };
    rig.issue_in(random.below(2) as usize, random.below(4) as usize, instruction);
}

fn scribble(rig: &Rig, random: &mut Random) {
    match random.below(64) {
        0..2 => rig.trap_store(random.place(), random.value()),
        2..4 => {
            // Every command in every state; most of all those that let a context go on.
            let context = random.below(2) as usize;
            let opc = random.pick(&[0, 1, 1, 1, 1, 2, 3, 3, 4, 5, 6, 7]) as u8;
            rig.cch_send(context, rig.cch(context).with_opc(cch::Opc(opc)));
        }
        4 => {
            // As after power-on, if it is not allocated.
            let context = random.below(2) as usize;
            configure(rig, context);
            rig.cch_send(context, rig.cch(context).with_opc(cch::Opc::ALLOCATE));
            rig.cch_send(context, rig.cch(context).with_opc(cch::Opc::START));
        }
        5 => {
            let _ = rig.dma.unmap(IOVA, MEMORY);
        }
        6..9 => map_memory(rig),
        9 => rig.dma.set_bus_master(random.below(4) > 0),
        10..30 => answer(rig, random),
        30..50 => instruct(rig, random),
        50..60 => {
            let word = rig.gru.hardware.memory.word(random.place());
            word.store(random.value(), Ordering::Release);
        }
        _ => std::thread::yield_now(),
    }
    rig.gru
        .bar_write(pci::BAR_DOORBELL, pci::DOORBELL_OFFSET, &[1])
        .unwrap();
}

fn map_memory(rig: &Rig) {
    let fd = rig.memory.as_fd().try_clone_to_owned().unwrap();
    // Refused when it is there already.
    let _ = rig.dma.map(IOVA, MEMORY, fd, 0, Prot::READ_WRITE);
}

fn configure(rig: &Rig, context: usize) {
    let mode = [Mode::FaultMap, Mode::UserPolling][context];
    rig.configure(context, MAPS[context], 0xff << (8 * context), mode);
    let control = rig.cch(context).with_unmap_enable(context == 1);
    rig.trap_store(Rig::cch_at(context), control.into_bits());
}

#[test]
fn test_any_words_when_stored_anywhere_kill_no_engine_and_leave_a_device_that_resets() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        for seed in 1..=8u64 {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            for context in 0..2 {
                configure(&rig, context);
                rig.cch_do(context, cch::Opc::ALLOCATE).unwrap();
                rig.cch_do(context, cch::Opc::START).unwrap();
            }
            (0..8000).for_each(|_| scribble(&rig, &mut random));
            let begun = Instant::now();
            rig.gru.reset();
            let took = begun.elapsed();
            assert!(
                took < Duration::from_secs(5),
                "seed {seed}: the reset took {took:?}"
            );
            assert!(
                rig.gru.threads().iter().all(|thread| !thread.is_finished()),
                "seed {seed}: an engine died"
            );
            assert_eq!(rig.gru.stats().tlb[0].live_entries, 0);
        }
        let stats = rig.gru.stats();
        assert!(
            stats.instructions > 0 && stats.exceptions > 0 && stats.fills > 0 && stats.tgh_purges > 0,
            "the scribbles reached every unit: {stats:?}"
        );
        map_memory(&rig);
        rig.dma.set_bus_master(true);
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        rig.run_ok(0, Instruction::vset(VA, 5, cb::XType::DWORD, 1, 1));
        assert_eq!(rig.word(0), 5);
    });
}
