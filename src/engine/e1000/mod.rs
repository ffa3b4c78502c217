//! A network card that every system has a driver for: Intel's 82540EM, "e1000" (317453, the Software Developer's Manual of
//! the PCI and PCI-X family of Gigabit Ethernet controllers).
//!
//! The cable is always plugged in, at 1000 Mb/s. There are no wake-up, no flow control, no loopback and no management, and
//! received frames have no packet checksum. A write that disables a direction, or resets the card, returns when the worker
//! does not touch guest memory any more.
//!
//! `registers.rs` is what both sides know, `interrupts.rs` the causes and the pin, `eeprom.rs` and `phy.rs` what a driver
//! asks first; `worker.rs` is the thread, `transmit.rs` with `outgoing.rs` and `receive.rs` with `filter.rs` its two halves,
//! `checksum.rs` what both compute; `saved.rs` what is kept of a suspended card.

mod checksum;
mod eeprom;
mod filter;
mod interrupts;
mod outgoing;
mod phy;
mod receive;
mod registers;
mod saved;
mod transmit;
mod worker;

#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use self::{
    eeprom::Eeprom,
    interrupts::{LSC, MDAC},
    phy::{LinkChange, MDIC_INTERRUPT, Phy},
    registers::{
        CTRL, CTRL_DUP, CTRL_EXT, CTRL_EXT_EE_RST, CTRL_PHY_RST, CTRL_RST, CTRL_SLU, EECD, EERD, ICR, ICS, IMC, IMS,
        MDIC, RAL, RCTL, RCTL_EN, RDT, STATUS, STATUS_FD, STATUS_LU, STATUS_SPEED_1000, TCTL, TCTL_EN, TDT,
    },
    worker::{Frames, Shared},
};
use super::{
    bus::{Access, BusFault, Effect, Width},
    irq::IrqLine,
    memory::GuestRam,
    net_backend::NetBackend,
    pci::{BarKind, BarSpec, PciFunction, PciIdentity},
};
use crate::types::MacAddr;

const MEMORY_BAR: u8 = 0;
const IO_BAR: u8 = 1;
const MEMORY_BYTES: u32 = 128 << 10;
const BARS: [BarSpec; 2] = [
    BarSpec { index: MEMORY_BAR, size_bytes: MEMORY_BYTES, kind: BarKind::Registers },
    BarSpec { index: IO_BAR, size_bytes: 64, kind: BarKind::Io },
];
/// In the I/O BAR: the offset of a register, and that register (13.3).
const IOADDR: u64 = 0;
const IODATA: u64 = 4;

const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x8086,
    device: 0x100e,
    class: 0x02_0000,
    revision: 3,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    interrupt_pin: 1,
};

/// The card as PCI function. Its thread lives as long as it.
pub struct E1000 {
    shared: Arc<Shared>,
    // What only vCPUs touch, one at a time.
    eeprom: Eeprom,
    phy: Phy,
    mdic: u32,
    /// IOADDR.
    io_address: u32,
}

/// Stops and continues the card's traffic. Clones are the same one.
#[derive(Clone)]
pub struct E1000Io(Arc<Shared>);

impl E1000Io {
    /// Returns when no frame is moved, and guest memory is not touched until `resume`. Called by the control thread, with the
    /// vCPUs stopped.
    pub fn quiesce(&self) {
        self.0.hold();
    }
    pub fn resume(&self) {
        self.0.release();
    }
    /// The card goes away: its thread has ended and the host's end of it is closed when this returns.
    pub fn end(&self) {
        self.0.end();
    }
}

impl E1000 {
    /// A card with its thread started; it moves nothing before a driver enables it. Call before any vCPU runs.
    pub fn new(ram: GuestRam, irq: IrqLine, backend: NetBackend, mac: MacAddr) -> io::Result<E1000> {
        let shared = Arc::new(Shared::new(ram, irq, backend)?);
        let eeprom = Eeprom::new(mac, IDENTITY.device, IDENTITY.subsystem_vendor, IDENTITY.subsystem);
        shared.registers.reset(eeprom.address());
        shared.spawn()?;
        Ok(E1000 { shared, eeprom, phy: Phy::new(), mdic: 0, io_address: 0 })
    }

    /// For the machine, which pauses.
    pub fn io(&self) -> E1000Io {
        E1000Io(Arc::clone(&self.shared))
    }

    /// Reads a register; `at` is a multiple of 4.
    fn read(&self, at: u32) -> u32 {
        let Shared { registers, interrupts, .. } = &*self.shared;
        match at {
            CTRL_DUP => registers.get(CTRL),
            STATUS => STATUS_FD | STATUS_SPEED_1000 | if self.phy.has_link() { STATUS_LU } else { 0 },
            EECD => self.eeprom.eecd(),
            EERD => self.eeprom.eerd(),
            MDIC => self.mdic,
            ICR => interrupts.take(),
            IMS => interrupts.mask(),
            _ => registers.read(at),
        }
    }

    fn write(&mut self, at: u32, value: u32) {
        let Shared { registers, interrupts, .. } = &*self.shared;
        match at {
            CTRL | CTRL_DUP => self.write_ctrl(value),
            CTRL_EXT => {
                if value & CTRL_EXT_EE_RST != 0 {
                    let [ral, rah] = self.eeprom.address();
                    registers.set(RAL, ral);
                    registers.set(RAL + 4, rah);
                }
                registers.write(at, value);
            }
            EECD => self.eeprom.write_eecd(value),
            EERD => self.eeprom.write_eerd(value),
            MDIC => self.write_mdic(value),
            ICR => interrupts.clear(value),
            ICS => interrupts.raise(value),
            IMS => interrupts.enable(value),
            IMC => interrupts.disable(value),
            RCTL => self.write_enable(at, value, RCTL_EN, |frames| frames.receiver.forget()),
            TCTL => self.write_enable(at, value, TCTL_EN, |frames| frames.transmitter.forget_packet()),
            RDT | TDT => {
                registers.write(at, value);
                self.shared.wake();
            }
            _ => registers.write(at, value),
        }
    }

    fn write_ctrl(&mut self, value: u32) {
        if value & CTRL_RST != 0 {
            return self.reset_mac();
        }
        let rising = value & !self.shared.registers.get(CTRL);
        self.shared.registers.write(CTRL, value);
        if rising & CTRL_PHY_RST != 0 {
            self.phy = Phy::new();
        }
        if rising & (CTRL_PHY_RST | CTRL_SLU) != 0 {
            self.shared.interrupts.raise(LSC);
        }
    }

    fn write_mdic(&mut self, value: u32) {
        let (mdic, change) = self.phy.access(value);
        self.mdic = mdic;
        let mut causes = if change == LinkChange::Changed { LSC } else { 0 };
        if value & MDIC_INTERRUPT != 0 {
            causes |= MDAC;
        }
        if causes != 0 {
            self.shared.interrupts.raise(causes);
        }
    }

    /// A control register with its enable bit `en`. When that is cleared, this returns when guest memory is not touched any
    /// more: drivers free their buffers soon after.
    fn write_enable(&self, at: u32, value: u32, en: u32, forget: fn(&mut Frames)) {
        let registers = &self.shared.registers;
        if registers.get(at) & !value & en != 0 {
            self.shared.while_still(|frames| {
                registers.write(at, value);
                forget(frames);
            });
        } else {
            registers.write(at, value);
            self.shared.wake();
        }
    }

    /// CTRL.RST: everything but the PHY (14.2). Returns when guest memory is not touched any more.
    fn reset_mac(&mut self) {
        self.shared.while_still(|frames| {
            frames.transmitter.reset();
            frames.receiver.forget();
            self.shared.registers.reset(self.eeprom.address());
            self.shared.interrupts.reset();
        });
        self.eeprom.reset();
        self.mdic = 0;
    }
}

impl PciFunction for E1000 {
    fn identity(&self) -> PciIdentity {
        IDENTITY
    }

    fn bars(&self) -> &[BarSpec] {
        &BARS
    }

    fn bar_read(&mut self, bar: u8, at: Access) -> Result<u64, BusFault> {
        check(at)?;
        match (bar, at.offset) {
            (MEMORY_BAR, offset) if offset < u64::from(MEMORY_BYTES) => Ok(self.read(offset as u32).into()),
            (IO_BAR, IOADDR) => Ok(self.io_address.into()),
            (IO_BAR, IODATA) if self.io_address < MEMORY_BYTES => Ok(self.read(self.io_address & !3).into()),
            _ => Err(BusFault::NoRegister),
        }
    }

    fn bar_write(&mut self, bar: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        check(at)?;
        let value = value as u32;
        match (bar, at.offset) {
            (MEMORY_BAR, offset) if offset < u64::from(MEMORY_BYTES) => self.write(offset as u32, value),
            (IO_BAR, IOADDR) => self.io_address = value,
            (IO_BAR, IODATA) if self.io_address < MEMORY_BYTES => self.write(self.io_address & !3, value),
            _ => return Err(BusFault::NoRegister),
        }
        Ok(Effect::None)
    }

    /// Returns when nothing of before reaches guest memory any more.
    fn reset(&mut self) {
        self.reset_mac();
        self.phy = Phy::new();
        self.io_address = 0;
    }
}

impl Drop for E1000 {
    fn drop(&mut self) {
        self.shared.end();
    }
}

/// Registers are 32 bits wide and are accessed whole (13.2).
fn check(at: Access) -> Result<(), BusFault> {
    if at.width != Width::B4 || !at.offset.is_multiple_of(4) {
        return Err(BusFault::BadWidth);
    }
    Ok(())
}
