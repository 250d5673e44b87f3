//! The init segment.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use protos::mlx5::iseg as reg;

/// Firmware that this model behaves like: 16.35, which the driver prints.
const FW_MAJOR: u32 = 16;
const FW_MINOR: u32 = 35;
const FW_SUB_MINOR: u32 = 1000;

/// The command queue's address as the driver wrote it, and clocks.
#[derive(Debug)]
pub(super) struct InitSegment {
    address_high: AtomicU32,
    address_low: AtomicU32,
    started: Instant,
}

impl InitSegment {
    pub(super) fn new() -> Self {
        Self {
            address_high: AtomicU32::new(0),
            address_low: AtomicU32::new(0),
            started: Instant::now(),
        }
    }

    pub(super) fn reset(&self) {
        self.address_high.store(0, Ordering::SeqCst);
        self.address_low.store(0, Ordering::SeqCst);
    }

    /// Where the command queue is.
    pub(super) fn command_queue(&self) -> u64 {
        let high = u64::from(self.address_high.load(Ordering::SeqCst));
        high << 32 | u64::from(self.address_low.load(Ordering::SeqCst) & !0xfff)
    }

    /// Ticks since the device was made ([`reg::TIMER_KHZ`]).
    pub(super) fn ticks(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A 32-bit word.
    fn word(&self, offset: u64) -> u32 {
        match offset {
            reg::FW_REV => FW_MINOR << 16 | FW_MAJOR,
            reg::CMDIF_REV_FW_SUB => reg::CMDIF_REV << 16 | FW_SUB_MINOR,
            reg::CMDQ_ADDR_H => self.address_high.load(Ordering::SeqCst),
            // The state of the NIC interface is never anything but "full driver".
            reg::CMDQ_ADDR_L_SZ => reg::CMDQ_DIMENSIONS,
            reg::TIMER_H => (self.ticks() >> 32) as u32,
            reg::TIMER_L => self.ticks() as u32,
            // Changes each millisecond: the driver looks every few seconds.
            reg::HEALTH_COUNTER => (self.started.elapsed().as_millis() as u32) & 0xff_ffff,
            // Healthy, initialised, default time limits.
            _ => 0,
        }
    }

    /// For dumps.
    pub(super) fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "firmware": format!("{FW_MAJOR}.{FW_MINOR}.{FW_SUB_MINOR}"),
            "command_queue": format!("{:#x}", self.command_queue()),
            "ticks": self.ticks(),
            "health_counter": self.word(reg::HEALTH_COUNTER),
        })
    }

    /// Any length and alignment.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let word = self.word(at & !3).to_be_bytes();
            let within = (at & 3) as usize;
            let step = (4 - within).min(data.len() - done);
            data[done..done + step].copy_from_slice(&word[within..within + step]);
            done += step;
        }
    }

    /// Whole words count, anything else is dropped. Entries whose command is to be executed, as a bit mask.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> u32 {
        let mut commands = 0;
        if !offset.is_multiple_of(4) {
            return 0;
        }
        for (index, word) in data.as_chunks::<4>().0.iter().enumerate() {
            let word = u32::from_be_bytes(*word);
            match offset + 4 * index as u64 {
                reg::CMDQ_ADDR_H => self.address_high.store(word, Ordering::SeqCst),
                reg::CMDQ_ADDR_L_SZ => self.address_low.store(word, Ordering::SeqCst),
                reg::CMD_DOORBELL => commands |= word,
                _ => {}
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_segment_when_read_has_the_words_of_the_reference() {
        let segment = InitSegment::new();
        let mut bytes = [0; 8];
        segment.read(reg::FW_REV, &mut bytes);
        assert_eq!(bytes[..4], [0, 35, 0, 16]);
        assert_eq!(bytes[4..6], [0, 5]);
        let mut low = [0; 4];
        segment.read(reg::CMDQ_ADDR_L_SZ, &mut low);
        assert_eq!(low, [0, 0, 0, 0x56]);
        let mut odd = [0xff; 3];
        segment.read(reg::CMDQ_ADDR_L_SZ + 2, &mut odd);
        assert_eq!(odd, [0, 0x56, 0]);
        segment.read(reg::INITIALIZING, &mut low);
        assert_eq!(low, [0; 4]);
    }

    #[test]
    fn test_segment_when_written_keeps_the_queue_and_gives_doorbells() {
        let segment = InitSegment::new();
        assert_eq!(segment.write(reg::CMDQ_ADDR_H, &[0, 0, 0, 1]), 0);
        assert_eq!(segment.write(reg::CMDQ_ADDR_L_SZ, &[0x12, 0x34, 0x53, 0]), 0);
        assert_eq!(segment.command_queue(), 0x1_1234_5000);
        assert_eq!(segment.write(reg::CMD_DOORBELL, &[0x80, 0, 0, 1]), 0x8000_0001);
        assert_eq!(segment.write(reg::CMD_DOORBELL + 1, &[1, 1, 1, 1]), 0);
        segment.reset();
        assert_eq!(segment.command_queue(), 0);
    }
}
