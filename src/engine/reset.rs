//! The two reset ports: System Control Port A (0x92) and the PIIX3 Reset Control Register (0xCF9).

use super::{
    bus::{Access, BusDevice, BusFault, Effect, Width},
    saved::{BadState, SaveState, State},
};

/// System Control Port A, port 0x92: bit 0 resets, bit 1 is the A20 gate.
///
/// A20 is always open under KVM, so the gate is only a latch that firmware reads back.
pub struct SystemControl {
    latch: u8,
}

const FAST_RESET: u8 = 1 << 0;
const A20_OPEN: u8 = 1 << 1;

impl SystemControl {
    #[expect(clippy::new_without_default, reason = "devices are made by name")]
    pub fn new() -> SystemControl {
        SystemControl { latch: A20_OPEN }
    }

    pub fn reset(&mut self) {
        self.latch = A20_OPEN;
    }
}

impl BusDevice for SystemControl {
    fn read(&mut self, _: Access) -> Result<u64, BusFault> {
        Ok(u64::from(self.latch))
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        if at.width != Width::B1 {
            return Err(BusFault::BadWidth);
        }
        self.latch = value as u8 & !FAST_RESET;
        Ok(if value as u8 & FAST_RESET != 0 { Effect::Reset } else { Effect::None })
    }
}

/// Reset Control Register, port 0xCF9 (PIIX3 data sheet, 2.5.5): bit 2 going to one resets, bit 1 says how hard.
///
/// The port lies inside the PCI configuration ports; whoever owns those passes byte accesses on with offset 0.
pub struct ResetControl {
    latch: u8,
}

const RESET_HARD: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;

impl ResetControl {
    #[expect(clippy::new_without_default, reason = "devices are made by name")]
    pub fn new() -> ResetControl {
        ResetControl { latch: 0 }
    }

    pub fn reset(&mut self) {
        self.latch = 0;
    }
}

impl BusDevice for ResetControl {
    fn read(&mut self, _: Access) -> Result<u64, BusFault> {
        Ok(u64::from(self.latch))
    }

    fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
        if at.width != Width::B1 {
            return Err(BusFault::BadWidth);
        }
        self.latch = value as u8 & RESET_HARD;
        Ok(if value as u8 & RESET_CPU != 0 { Effect::Reset } else { Effect::None })
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const SYSTEM_CONTROL: &str = "system-control";
    pub(super) const RESET_CONTROL: &str = "reset-control";

    /// Of both.
    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) latch: u8,
    }
}

impl SaveState for SystemControl {
    fn save(&self) -> State {
        let SystemControl { latch } = self;
        State::new(saved::SYSTEM_CONTROL, 1, &saved::V1 { latch: *latch })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { latch } = state.fields(saved::SYSTEM_CONTROL, 1)?;
        self.latch = latch & !FAST_RESET;
        Ok(())
    }
}

impl SaveState for ResetControl {
    fn save(&self) -> State {
        let ResetControl { latch } = self;
        State::new(saved::RESET_CONTROL, 1, &saved::V1 { latch: *latch })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { latch } = state.fields(saved::RESET_CONTROL, 1)?;
        self.latch = latch & RESET_HARD;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::saved::testing;

    const BYTE: Access = Access { offset: 0, width: Width::B1 };

    #[test]
    fn port_92_keeps_a20_and_resets_on_bit_0() {
        let mut port = SystemControl::new();
        assert_eq!(port.read(BYTE), Ok(2));
        assert_eq!(port.write(BYTE, 0), Ok(Effect::None));
        assert_eq!(port.read(BYTE), Ok(0));
        assert_eq!(port.write(BYTE, 3), Ok(Effect::Reset));
        port.reset();
        assert_eq!(port.read(BYTE), Ok(2));
        assert_eq!(port.write(Access { offset: 0, width: Width::B4 }, 1), Err(BusFault::BadWidth));
    }

    #[test]
    fn cf9_resets_when_the_cpu_bit_is_written() {
        let mut port = ResetControl::new();
        assert_eq!(port.write(BYTE, 0x02), Ok(Effect::None));
        assert_eq!(port.read(BYTE), Ok(2));
        assert_eq!(port.write(BYTE, 0x06), Ok(Effect::Reset));
        assert_eq!(port.write(BYTE, 0x0e), Ok(Effect::Reset));
    }

    #[test]
    fn latches_are_read_back_after_a_restore_and_nothing_resets() {
        let (mut port, mut control) = (SystemControl::new(), ResetControl::new());
        port.write(BYTE, 0x40).unwrap();
        control.write(BYTE, 2).unwrap();
        let states = [port.save(), control.save()].map(|state| testing::matches_golden(&state));
        let (mut port, mut control) = (SystemControl::new(), ResetControl::new());
        port.restore(&states[0]).unwrap();
        control.restore(&states[1]).unwrap();
        assert_eq!((port.read(BYTE), control.read(BYTE)), (Ok(0x40), Ok(2)));
        for state in &states {
            testing::spoil(state, |bad| {
                let (mut port, mut control) = (SystemControl::new(), ResetControl::new());
                let _ = (port.restore(bad), control.restore(bad));
                assert_eq!((port.latch & FAST_RESET, control.latch & RESET_CPU), (0, 0));
            });
        }
    }
}
