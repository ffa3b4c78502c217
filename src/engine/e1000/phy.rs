//! The PHY behind MDIC (317453, sections 8.5 and 13.4.6, 13.5): the registers of an M88E1011 whose cable is plugged in and
//! whose partner has agreed on 1000 Mb/s, full duplex, without pause frames.

use super::{super::saved::BadState, saved::check};

// MDIC.
const DATA: u32 = 0xffff;
const READ: u32 = 2;
const WRITE: u32 = 1;
const READY: u32 = 1 << 28;
const ERROR: u32 = 1 << 30;
/// MDIC: the end of the access is an interrupt cause.
pub(super) const MDIC_INTERRUPT: u32 = 1 << 29;
/// Where the only PHY is.
const ADDRESS: u32 = 1;

// Register numbers (IEEE 802.3, 22.2.4, and the M88E1011's own).
const CONTROL: usize = 0;
const STATUS: usize = 1;
const ID: [usize; 2] = [2, 3];
const ADVERTISED: usize = 4;
const PARTNER: usize = 5;
const EXPANSION: usize = 6;
const NEXT_PAGE: usize = 7;
const CONTROL_1000: usize = 9;
const STATUS_1000: usize = 10;
const EXTENDED_STATUS: usize = 15;
const SPECIFIC_CONTROL: usize = 16;
const SPECIFIC_STATUS: usize = 17;
const INTERRUPT_ENABLE: usize = 18;
const EXTENDED_CONTROL: usize = 20;
const PAGE: usize = 29;
const GENERAL: usize = 30;

/// What a driver can write.
pub(super) const WRITABLE: [usize; 9] =
    [CONTROL, ADVERTISED, NEXT_PAGE, CONTROL_1000, SPECIFIC_CONTROL, INTERRUPT_ENABLE, EXTENDED_CONTROL, PAGE, GENERAL];

const CONTROL_RESET: u16 = 1 << 15;
const CONTROL_POWER_DOWN: u16 = 1 << 11;
const CONTROL_RESTART: u16 = 1 << 9;
const STATUS_COMPLETE: u16 = 1 << 5;
const STATUS_LINK: u16 = 1 << 2;
const SPECIFIC_STATUS_LINK: u16 = 1 << 10;

pub(super) struct Phy([u16; 32]);

/// What a driver's access did beside its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LinkChange {
    None,
    /// The link went down, up, or both.
    Changed,
}

impl Phy {
    pub(super) fn new() -> Phy {
        let mut registers = [0; 32];
        for (at, value) in [
            (CONTROL, 0x1140), // auto-negotiation, full duplex, 1000 Mb/s
            (STATUS, 0x7949 | STATUS_COMPLETE | STATUS_LINK),
            (ID[0], 0x0141),
            (ID[1], 0x0c20),
            (ADVERTISED, 0x0de1),
            (PARTNER, 0x41e1),
            (EXPANSION, 0x000d),
            (NEXT_PAGE, 0x2001),
            (CONTROL_1000, 0x0300),
            (STATUS_1000, 0x7c00), // both receivers work, the partner can 1000 Mb/s
            (EXTENDED_STATUS, 0x3000),
            (SPECIFIC_CONTROL, 0x0068),
            (SPECIFIC_STATUS, 0xa800 | SPECIFIC_STATUS_LINK), // 1000 Mb/s, full duplex, resolved
            (EXTENDED_CONTROL, 0x0d60),
        ] {
            registers[at] = value;
        }
        Phy(registers)
    }

    pub(super) fn save(&self) -> [u16; WRITABLE.len()] {
        let Phy(registers) = self;
        WRITABLE.map(|at| registers.get(at).copied().unwrap_or(0))
    }

    pub(super) fn restore(&mut self, saved: [u16; WRITABLE.len()]) -> Result<(), BadState> {
        for (at, value) in WRITABLE.into_iter().zip(saved) {
            check(at != CONTROL || value & (CONTROL_RESET | CONTROL_RESTART) == 0, "a bit that clears itself")?;
            if let Some(register) = self.0.get_mut(at) {
                *register = value;
            }
        }
        Ok(())
    }

    pub(super) fn has_link(&self) -> bool {
        self.0[CONTROL] & CONTROL_POWER_DOWN == 0
    }

    /// Carries out what is written into MDIC; gives what MDIC then reads.
    pub(super) fn access(&mut self, mdic: u32) -> (u32, LinkChange) {
        let (register, address, operation) = ((mdic >> 16 & 31) as usize, mdic >> 21 & 31, mdic >> 26 & 3);
        let mdic = mdic & !ERROR | READY;
        match operation {
            READ if address == ADDRESS => (mdic & !DATA | u32::from(self.read(register)), LinkChange::None),
            WRITE if address == ADDRESS => (mdic, self.write(register, mdic as u16)),
            _ => (mdic | ERROR, LinkChange::None),
        }
    }

    fn read(&self, register: usize) -> u16 {
        let value = self.0.get(register).copied().unwrap_or(0);
        match register {
            STATUS if !self.has_link() => value & !(STATUS_COMPLETE | STATUS_LINK),
            SPECIFIC_STATUS if !self.has_link() => value & !SPECIFIC_STATUS_LINK,
            _ => value,
        }
    }

    fn write(&mut self, register: usize, value: u16) -> LinkChange {
        match register {
            CONTROL if value & CONTROL_RESET != 0 => {
                *self = Phy::new();
                LinkChange::Changed
            }
            CONTROL => {
                let before = self.has_link();
                self.0[CONTROL] = value & !CONTROL_RESTART;
                // Negotiation is done as soon as it has begun.
                let restarted = value & CONTROL_RESTART != 0 && self.has_link();
                if restarted || before != self.has_link() { LinkChange::Changed } else { LinkChange::None }
            }
            _ => {
                if let Some(word) = self.0.get_mut(register).filter(|_| WRITABLE.contains(&register)) {
                    *word = value;
                }
                LinkChange::None
            }
        }
    }
}
