//! The EEPROM (317453, section 5): 64 words, read one at a time through EERD, or bit by bit through EECD as a Microwire chip
//! (NM93C46). It is write-protected: commands that would change it do nothing and end at once.

use super::{
    super::saved::BadState,
    saved::{ChipV1, EepromV1, check},
};
use crate::types::MacAddr;

const WORDS: usize = 64;
/// The sum of all words.
const CHECKSUM: u16 = 0xbaba;

// Words (table 5-2).
const COMPATIBILITY: usize = 0x03;
const LED_DEFAULTS: usize = 0x04;
const IMAGE_VERSION: usize = 0x05;
const INIT_CONTROL_1: usize = 0x0a;
const SUBSYSTEM: usize = 0x0b;
const SUBSYSTEM_VENDOR: usize = 0x0c;
const DEVICE: usize = 0x0d;
const VENDOR: usize = 0x0e;
const INIT_CONTROL_2: usize = 0x0f;
const CHECKSUM_WORD: usize = 0x3f;

// EECD (13.4.3).
const SK: u32 = 1 << 0;
const CS: u32 = 1 << 1;
const DI: u32 = 1 << 2;
const DO: u32 = 1 << 3;
/// Flash writes are disabled: 01b in bits 5 and 4.
const FWE_DISABLED: u32 = 1 << 4;
const FWE: u32 = 3 << 4;
const REQUEST: u32 = 1 << 6;
const PINS: u32 = SK | CS | DI | FWE | REQUEST;
const GRANT: u32 = 1 << 7;
const PRESENT: u32 = 1 << 8;

// EERD (13.4.4).
const EERD_START: u32 = 1 << 0;
const EERD_DONE: u32 = 1 << 4;

/// Start bit, two bits of operation, six of address.
const COMMAND_BITS: u32 = 9;
const OPERATION_READ: u16 = 0b10;
const WORD_BITS: u32 = 16;

pub(super) struct Eeprom {
    words: [u16; WORDS],
    /// EECD as written: SK, CS, DI, FWE and REQUEST.
    pins: u32,
    chip: Chip,
    eerd: u32,
}

/// What the Microwire chip does while it is selected.
#[derive(Debug, Clone, Copy)]
enum Chip {
    /// It waits for the start bit, or takes the command: the bits that came, the start bit first.
    Command { bits: u16, count: u32 },
    /// It sends a word, the highest bit first; `left` bits are to come after the one that shows.
    Reading { word: u16, left: u32 },
    /// The command is done; nothing happens until it is deselected.
    Done,
}

const IDLE: Chip = Chip::Command { bits: 0, count: 0 };

impl Eeprom {
    /// Contents for a card with this address and these ids.
    pub(super) fn new(mac: MacAddr, device: u16, subsystem_vendor: u16, subsystem: u16) -> Eeprom {
        let mut words = [0; WORDS];
        for (word, pair) in words.iter_mut().zip(mac.0.chunks_exact(2)) {
            *word = pair.iter().rev().fold(0, |word, byte| word << 8 | u16::from(*byte));
        }
        for (at, value) in [
            (COMPATIBILITY, 0),
            (LED_DEFAULTS, 0xffff), // the hardware's own
            (IMAGE_VERSION, 0xffff),
            (INIT_CONTROL_1, 0x4403), // a valid signature, full duplex, ids are loaded
            (SUBSYSTEM, subsystem),
            (SUBSYSTEM_VENDOR, subsystem_vendor),
            (DEVICE, device),
            (VENDOR, 0x8086),
            (INIT_CONTROL_2, 0x3000), // pause frames may be agreed on
        ] {
            words[at] = value;
        }
        let sum = words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
        words[CHECKSUM_WORD] = CHECKSUM.wrapping_sub(sum);
        Eeprom { words, pins: FWE_DISABLED, chip: IDLE, eerd: 0 }
    }

    pub(super) fn reset(&mut self) {
        (self.pins, self.chip, self.eerd) = (FWE_DISABLED, IDLE, 0);
    }

    pub(super) fn save(&self) -> EepromV1 {
        let Eeprom { words: _, pins, chip, eerd } = *self;
        // Counts of a few bits.
        let chip = match chip {
            Chip::Command { bits, count } => ChipV1::Command { bits, count: count as u8 },
            Chip::Reading { word, left } => ChipV1::Reading { word, left: left as u8 },
            Chip::Done => ChipV1::Done,
        };
        EepromV1 { pins, chip, eerd }
    }

    pub(super) fn restore(&mut self, saved: EepromV1) -> Result<(), BadState> {
        let EepromV1 { pins, chip, eerd } = saved;
        check(pins & !PINS == 0, "a pin that there is not")?;
        let chip = match chip {
            ChipV1::Command { bits, count } => Chip::Command { bits, count: count.into() },
            ChipV1::Reading { word, left } => Chip::Reading { word, left: left.into() },
            ChipV1::Done => Chip::Done,
        };
        let has_few_bits = match chip {
            Chip::Command { bits, count } => count < COMMAND_BITS && bits >> COMMAND_BITS == 0,
            Chip::Reading { word: _, left } => left <= WORD_BITS,
            Chip::Done => true,
        };
        check(has_few_bits, "a chip with more bits than a command has")?;
        (self.pins, self.chip, self.eerd) = (pins, chip, eerd);
        Ok(())
    }

    /// RAL and RAH of the first exact address: the card's own, valid.
    pub(super) fn address(&self) -> [u32; 2] {
        let [low, middle, high] = [self.word(0), self.word(1), self.word(2)].map(u32::from);
        [middle << 16 | low, super::registers::RAH_AV | high]
    }

    pub(super) fn eecd(&self) -> u32 {
        let data_out = match self.chip {
            Chip::Reading { word, left } => u32::from(word) >> left & 1 != 0,
            // A chip that is not busy says that it is ready.
            Chip::Command { .. } | Chip::Done => true,
        };
        let grant = if self.pins & REQUEST != 0 { GRANT } else { 0 };
        self.pins | grant | PRESENT | if data_out { DO } else { 0 }
    }

    pub(super) fn write_eecd(&mut self, value: u32) {
        let before = self.pins;
        self.pins = value & PINS;
        if self.pins & CS == 0 {
            self.chip = IDLE;
        } else if before & SK == 0 && self.pins & SK != 0 {
            self.clock(self.pins & DI != 0);
        }
    }

    /// A rising edge of the clock.
    fn clock(&mut self, data_in: bool) {
        self.chip = match self.chip {
            // Zeros before the start bit mean nothing.
            Chip::Command { count: 0, .. } if !data_in => IDLE,
            Chip::Command { bits, count } => {
                let (bits, count) = (bits << 1 | u16::from(data_in), count + 1);
                match (count, bits >> 6 & 3) {
                    // The first bit that shows is a zero, while the address's last bit is taken.
                    (COMMAND_BITS, OPERATION_READ) => Chip::Reading { word: self.word(bits & 0x3f), left: WORD_BITS },
                    (COMMAND_BITS, _) => Chip::Done,
                    _ => Chip::Command { bits, count },
                }
            }
            Chip::Reading { word, left } if left > 0 => Chip::Reading { word, left: left - 1 },
            Chip::Reading { .. } | Chip::Done => Chip::Done,
        };
    }

    pub(super) fn eerd(&self) -> u32 {
        self.eerd
    }

    /// A read is done at once.
    pub(super) fn write_eerd(&mut self, value: u32) {
        let address = value & 0xff00;
        self.eerd = match value & EERD_START {
            0 => address,
            _ => u32::from(self.word((address >> 8) as u16)) << 16 | address | EERD_DONE,
        };
    }

    /// Words behind the end read as zero.
    fn word(&self, at: u16) -> u16 {
        self.words.get(usize::from(at)).copied().unwrap_or(0)
    }
}
