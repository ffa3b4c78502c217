//! One port's registers (AHCI 1.3.1, section 3.3) and what the device behind it has told the HBA.
//!
//! A port has no thread: register writes and ends of commands change it under the HBA's lock. It never touches a disk.

use super::{
    super::{
        memory::{Gpa, GuestRam},
        saved::BadState,
    },
    ata::READY,
    atapi,
    fis::{D2H_AT, PIO_SETUP_AT, Registers, SDB_AT},
    saved::{PortV1, check},
};

/// Offsets of the registers inside a port's block.
pub(super) mod reg {
    pub(in super::super) const CLB: u16 = 0x00;
    pub(in super::super) const CLBU: u16 = 0x04;
    pub(in super::super) const FB: u16 = 0x08;
    pub(in super::super) const FBU: u16 = 0x0c;
    pub(in super::super) const IS: u16 = 0x10;
    pub(in super::super) const IE: u16 = 0x14;
    pub(in super::super) const CMD: u16 = 0x18;
    pub(in super::super) const TFD: u16 = 0x20;
    pub(in super::super) const SIG: u16 = 0x24;
    pub(in super::super) const SSTS: u16 = 0x28;
    pub(in super::super) const SCTL: u16 = 0x2c;
    pub(in super::super) const SERR: u16 = 0x30;
    pub(in super::super) const SACT: u16 = 0x34;
    pub(in super::super) const CI: u16 = 0x38;
}

/// Bits of PxIS and PxIE (3.3.5).
pub(super) mod int {
    pub(in super::super) const D2H: u32 = 1 << 0;
    pub(in super::super) const PIO_SETUP: u32 = 1 << 1;
    pub(in super::super) const SET_DEVICE_BITS: u32 = 1 << 3;
    pub(in super::super) const REGION_DONE: u32 = 1 << 5;
    pub(in super::super) const OVERFLOW: u32 = 1 << 24;
    pub(in super::super) const BUS_DATA: u32 = 1 << 28;
    pub(in super::super) const BUS_FATAL: u32 = 1 << 29;
    pub(in super::super) const TASK_FILE: u32 = 1 << 30;
    /// PCS and PRCS mirror SERR, which stays zero: there is no cable here that could flicker.
    const CLEARABLE: u32 = 0xfd80_00af;
    pub(super) const WRITE_CLEARS: u32 = CLEARABLE;
    pub(super) const ENABLES: u32 = 0xfdc0_00ff;
}

/// Bits of PxCMD (3.3.7).
pub(super) mod cmd {
    pub(in super::super) const ST: u32 = 1 << 0;
    /// SUD and POD: always spun up, always powered.
    pub(super) const FIXED: u32 = 1 << 1 | 1 << 2;
    pub(super) const CLO: u32 = 1 << 3;
    pub(in super::super) const FRE: u32 = 1 << 4;
    pub(super) const FR: u32 = 1 << 14;
    pub(in super::super) const CR: u32 = 1 << 15;
    /// ST, FRE, ATAPI and DLAE keep what is written.
    pub(super) const KEPT: u32 = ST | FRE | 3 << 24;
}

/// What the two addresses are multiples of, in bytes.
const LIST_ALIGN: u32 = 1024;
const FRAMES_ALIGN: u32 = 256;
const SCTL_KEPT: u32 = 0xfff;

const BUSY: u8 = 0x80;
const BUSY_OR_DATA: u32 = 0x88;
/// What a port without device shows in TFD.
const TFD_ABSENT: u32 = 0x7f;
const SIG_NONE: u32 = 0xffff_ffff;
/// Device present, 6 Gb/s, active.
const SSTS_UP: u32 = 0x133;

/// What is plugged into the port; fixed for life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plugged {
    Nothing,
    Disk,
    Cd,
}

impl Plugged {
    /// The registers after a reset of the device (ATA8-ACS, "signature"); they read as the signature.
    pub(super) fn signature(self) -> Registers {
        let lba = if self == Plugged::Cd { atapi::SIGNATURE_LBA } else { 1 };
        Registers { status: READY, error: 1, lba, device: 0, count: 1 }
    }

    /// The same as PxSIG shows it.
    fn sig(self) -> u32 {
        let signature = self.signature();
        (signature.lba as u32) << 8 | u32::from(signature.count & 0xff)
    }
}

/// What the HBA has to do beside the port after a register write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    Nothing,
    /// Slots may be ready for the worker.
    Work,
    /// The running command's result is to be dropped.
    Cancel,
    /// As `Cancel`; and the device is reset. The link comes up when `link_up` is called.
    CancelAndLinkUp,
}

/// A port.
pub(super) struct Port {
    pub(super) plugged: Plugged,
    list: u64,
    frames: u64,
    pub(super) is: u32,
    pub(super) ie: u32,
    kept: u32,
    current_slot: u8,
    tfd: u32,
    sig: u32,
    ssts: u32,
    sctl: u32,
    serr: u32,
    pub(super) sact: u32,
    pub(super) ci: u32,
    /// An error stopped the port; it does nothing until ST is cleared (5.3.8, ERR states).
    pub(super) halted: bool,
    /// The signature came while FRE was clear, and is stored as soon as it is set (10.3.1).
    signature_waits: bool,
    /// The link comes up when the running command has ended.
    pub(super) link_waits: bool,
    /// SRST is set: a software reset is under way.
    soft_reset: bool,
    /// The device behind the port is to be reset before its next command.
    pub(super) reset_device: bool,
}

impl Port {
    /// After power on, with the link up.
    pub(super) fn new(plugged: Plugged) -> Port {
        let mut port = Port {
            plugged,
            list: 0,
            frames: 0,
            is: 0,
            ie: 0,
            kept: 0,
            current_slot: 0,
            tfd: TFD_ABSENT,
            sig: SIG_NONE,
            ssts: 0,
            sctl: 0,
            serr: 0,
            sact: 0,
            ci: 0,
            halted: false,
            signature_waits: false,
            link_waits: false,
            soft_reset: false,
            reset_device: true,
        };
        port.link_up(None);
        port
    }

    /// GHC.HR: as after power on, but the two addresses stay (10.4.3).
    pub(super) fn hba_reset(&mut self) {
        *self = Port { list: self.list, frames: self.frames, ..Port::new(self.plugged) };
    }

    pub(super) fn save(&self) -> PortV1 {
        let Port {
            plugged: _,
            list,
            frames,
            is,
            ie,
            kept,
            current_slot,
            tfd,
            sig,
            ssts,
            sctl,
            serr: _, // stays zero
            sact,
            ci,
            halted,
            signature_waits,
            link_waits: _, // only until the running command has ended, for which a pause waits
            soft_reset,
            reset_device,
        } = *self;
        PortV1 {
            list,
            frames,
            is,
            ie,
            cmd: kept,
            current_slot,
            tfd,
            sig,
            ssts,
            sctl,
            sact,
            ci,
            halted,
            signature_waits,
            soft_reset,
            reset_device,
        }
    }

    /// A port that does what its registers say cannot be harmed by them; here is what no driver could have made them say.
    pub(super) fn restore(&mut self, saved: PortV1) -> Result<(), BadState> {
        let aligned = |address: u64, align: u32| address.is_multiple_of(align.into());
        check(aligned(saved.list, LIST_ALIGN) && aligned(saved.frames, FRAMES_ALIGN), "an address between two places")?;
        check(saved.is & !int::WRITE_CLEARS == 0 && saved.ie & !int::ENABLES == 0, "an interrupt that there is not")?;
        check(saved.cmd & !cmd::KEPT == 0 && saved.sctl & !SCTL_KEPT == 0, "a reserved bit")?;
        check(saved.current_slot < 32, "a slot that is not there")?;
        check(saved.ci == 0 || saved.cmd & cmd::ST != 0, "a command of a port that is stopped")?;
        check(saved.sact == 0 || saved.cmd & cmd::ST != 0, "a queue of a port that is stopped")?;
        check(saved.tfd >> 16 == 0, "a task file of more than two bytes")?;
        let plugged = self.plugged != Plugged::Nothing;
        check(matches!(saved.ssts, 0 | 4) || plugged && saved.ssts == SSTS_UP, "a link to nothing")?;
        check(saved.sig == SIG_NONE || plugged && saved.sig == self.plugged.sig(), "a signature of another drive")?;
        *self = Port {
            plugged: self.plugged,
            list: saved.list,
            frames: saved.frames,
            is: saved.is,
            ie: saved.ie,
            kept: saved.cmd,
            current_slot: saved.current_slot,
            tfd: saved.tfd,
            sig: saved.sig,
            ssts: saved.ssts,
            sctl: saved.sctl,
            serr: 0,
            sact: saved.sact,
            ci: saved.ci,
            halted: saved.halted,
            signature_waits: saved.signature_waits,
            link_waits: false,
            soft_reset: saved.soft_reset,
            reset_device: saved.reset_device,
        };
        Ok(())
    }

    /// Reads a register; `running` is whether the worker has a command of this port.
    pub(super) fn read(&self, register: u16, running: bool) -> u32 {
        match register {
            reg::CLB => self.list as u32,
            reg::CLBU => (self.list >> 32) as u32,
            reg::FB => self.frames as u32,
            reg::FBU => (self.frames >> 32) as u32,
            reg::IS => self.is,
            reg::IE => self.ie,
            reg::CMD => self.command(running),
            reg::TFD => self.tfd,
            reg::SIG => self.sig,
            reg::SSTS => self.ssts,
            reg::SCTL => self.sctl,
            reg::SERR => self.serr,
            reg::SACT => self.sact,
            reg::CI => self.ci,
            _ => 0,
        }
    }

    fn command(&self, running: bool) -> u32 {
        let list_runs = if running || self.started() { cmd::CR } else { 0 };
        let frames_run = if running || self.kept & cmd::FRE != 0 { cmd::FR } else { 0 };
        self.kept | cmd::FIXED | u32::from(self.current_slot) << 8 | list_runs | frames_run
    }

    /// Writes the bytes of a register that `mask` names.
    pub(super) fn write(&mut self, register: u16, value: u32, mask: u32, ram: &GuestRam) -> Follow {
        let merged = |old: u32| old & !mask | value & mask;
        let low = |old: u64, align: u32| old >> 32 << 32 | u64::from(merged(old as u32) & !(align - 1));
        let high = |old: u64| u64::from(merged((old >> 32) as u32)) << 32 | old & 0xffff_ffff;
        match register {
            reg::CLB => self.list = low(self.list, LIST_ALIGN),
            reg::CLBU => self.list = high(self.list),
            reg::FB => self.frames = low(self.frames, FRAMES_ALIGN),
            reg::FBU => self.frames = high(self.frames),
            reg::IS => self.is &= !(value & mask & int::WRITE_CLEARS),
            reg::IE => self.ie = merged(self.ie) & int::ENABLES,
            reg::CMD => return self.write_command(merged(self.kept), ram),
            reg::SCTL => return self.write_sctl(merged(self.sctl) & SCTL_KEPT),
            reg::SERR => self.serr &= !(value & mask),
            reg::SACT if self.started() => self.sact |= value & mask,
            reg::CI if self.started() => {
                self.ci |= value & mask;
                return Follow::Work;
            }
            _ => {}
        }
        Follow::Nothing
    }

    fn write_command(&mut self, value: u32, ram: &GuestRam) -> Follow {
        let (was, now) = (self.kept, value & cmd::KEPT);
        self.kept = now;
        if value & cmd::CLO != 0 {
            self.tfd &= !BUSY_OR_DATA;
        }
        if now & cmd::FRE != 0 && self.signature_waits {
            self.signature_waits = false;
            self.store(ram, D2H_AT, &self.plugged.signature().d2h(false));
        }
        if was & cmd::ST != 0 && now & cmd::ST == 0 {
            self.drop_commands();
            return Follow::Cancel;
        }
        if was & cmd::ST == 0 && now & cmd::ST != 0 { Follow::Work } else { Follow::Nothing }
    }

    /// COMRESET (10.4.2): DET 1 takes the link down, and 0 after that brings it up.
    fn write_sctl(&mut self, value: u32) -> Follow {
        let (was, now) = (self.sctl & 0xf, value & 0xf);
        self.sctl = value;
        match (was, now) {
            (0, 1 | 4) => {
                self.drop_commands();
                self.link_down(now == 4);
                Follow::Cancel
            }
            (1 | 4, 0) => Follow::CancelAndLinkUp,
            _ => Follow::Nothing,
        }
    }

    fn drop_commands(&mut self) {
        self.ci = 0;
        self.sact = 0;
        self.current_slot = 0;
        self.halted = false;
    }

    fn link_down(&mut self, offline: bool) {
        self.link_waits = false;
        self.soft_reset = false;
        self.signature_waits = false;
        self.ssts = if offline { 4 } else { 0 };
        self.sig = SIG_NONE;
        self.tfd = if self.plugged == Plugged::Nothing { TFD_ABSENT } else { u32::from(BUSY) };
    }

    /// The device is reset and shows its signature. `ram` is `None` when no driver can have set an address.
    pub(super) fn link_up(&mut self, ram: Option<&GuestRam>) {
        self.link_waits = false;
        if self.plugged == Plugged::Nothing {
            return;
        }
        self.ssts = SSTS_UP;
        self.reset_device = true;
        self.show_signature();
        match ram {
            Some(ram) if self.kept & cmd::FRE != 0 => self.store(ram, D2H_AT, &self.plugged.signature().d2h(false)),
            _ => self.signature_waits = true,
        }
    }

    fn show_signature(&mut self) {
        self.set_tfd(&self.plugged.signature());
        self.sig = self.plugged.sig();
    }

    /// Whether ST is set: slots are taken.
    pub(super) fn started(&self) -> bool {
        self.kept & cmd::ST != 0
    }

    /// The next slot to do, in turn after the last one; `None` when the port has nothing to do or may not.
    pub(super) fn next_slot(&self) -> Option<u8> {
        let link = self.ssts & 0xf == 3;
        if !self.started() || self.halted || !link || self.ci == 0 {
            return None;
        }
        let turn = (u32::from(self.current_slot) + 1) & 31;
        Some(((self.ci.rotate_right(turn).trailing_zeros() + turn) & 31) as u8)
    }

    /// A command of `slot` begins.
    pub(super) fn begin(&mut self, slot: u8) {
        self.current_slot = slot;
        self.tfd = self.tfd & 0xff00 | u32::from(BUSY);
    }

    pub(super) fn list(&self) -> Gpa {
        Gpa(self.list)
    }

    pub(super) fn clear_slot(&mut self, slot: u8) {
        self.ci &= !(1u32.wrapping_shl(slot.into()));
    }

    /// The device sent a D2H Register FIS.
    pub(super) fn receive_d2h(&mut self, ram: &GuestRam, registers: &Registers, interrupt: bool) {
        self.set_tfd(registers);
        self.store(ram, D2H_AT, &registers.d2h(interrupt));
        if interrupt {
            self.is |= int::D2H;
        }
    }

    /// The device took the queued command of `slot` into its queue (AHCI 1.3.1, 5.6.4): a Register FIS without interrupt frees the
    /// slot, and the device is ready for the next.
    pub(super) fn receive_queued_start(&mut self, ram: &GuestRam, slot: u8) {
        self.receive_d2h(ram, &Registers { status: READY, ..Registers::default() }, false);
        self.clear_slot(slot);
    }

    /// A Set Device Bits FIS ends the tag of a queued command. After an error the tag stays set, for the driver to look up in the log.
    pub(super) fn receive_queued_end(&mut self, ram: &GuestRam, slot: u8, registers: &Registers, failed: bool) {
        let tags = if failed { 0 } else { 1u32.wrapping_shl(slot.into()) };
        self.set_tfd(registers);
        self.store(ram, SDB_AT, &registers.set_device_bits(tags));
        self.sact &= !tags;
        self.is |= int::SET_DEVICE_BITS;
    }

    /// The device sent the PIO Setup FIS of the last block, and the block has been moved.
    pub(super) fn receive_pio_setup(&mut self, ram: &GuestRam, registers: &Registers, to_host: bool, bytes: u16) {
        self.set_tfd(registers);
        self.store(ram, PIO_SETUP_AT, &registers.pio_setup(to_host, bytes));
        if to_host {
            self.is |= int::PIO_SETUP;
        }
    }

    /// The device was written to Device Control. SRST set and cleared again is a software reset.
    pub(super) fn device_control(&mut self, ram: &GuestRam, slot: u8, srst: bool) {
        self.clear_slot(slot);
        let ended = self.soft_reset && !srst;
        self.soft_reset = srst;
        if ended {
            self.reset_device = true;
            self.show_signature();
            self.receive_d2h(ram, &self.plugged.signature(), false);
        } else {
            self.tfd &= !BUSY_OR_DATA;
        }
    }

    /// A result was dropped, because the driver stopped the port: the device is ready for the next command.
    pub(super) fn discard(&mut self) {
        if self.ssts & 0xf == 3 {
            self.set_tfd(&Registers { status: READY, ..Registers::default() });
        }
    }

    fn set_tfd(&mut self, registers: &Registers) {
        self.tfd = u32::from(registers.error) << 8 | u32::from(registers.status);
    }

    /// Stores a frame, when the driver wants frames. An area outside RAM takes none.
    fn store(&self, ram: &GuestRam, at: u64, frame: &[u8]) {
        if self.kept & cmd::FRE != 0
            && let Some(at) = self.frames.checked_add(at)
        {
            let _ = ram.write(Gpa(at), frame);
        }
    }
}
