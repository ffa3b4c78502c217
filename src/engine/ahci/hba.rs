//! The HBA's state: generic registers (AHCI 1.3.1, section 3.1), the ports, and the one command that the worker has.
//!
//! Register writes, ends of commands and resets change it under one lock, which is never held across disk I/O. A command
//! that is running when its port is stopped or reset is *cancelled*: it goes on, since a system call cannot be called back,
//! but its result is dropped. Until it has ended the registers show what a driver waits for: CR after ST was cleared, BSY
//! after COMRESET, HR after a reset of the HBA.

use super::{
    super::{
        bus::Width,
        irq::IrqLine,
        memory::{Gpa, GuestRam},
        saved::BadState,
    },
    ata::{Finish, Frames, Stop},
    fis::{Command, FetchError},
    port::{Follow, Plugged, Port, int},
    saved::{HbaV1, check},
};

/// Ports of the HBA; a promise of the machine version.
pub(super) const PORTS: usize = 6;
pub(super) const REGISTER_BYTES: u64 = 4096;

const PORTS_AT: u16 = 0x100;
const PORT_BYTES: u16 = 0x80;

/// CAP: 64-bit addresses, native command queuing, CLO, 6 Gb/s, AHCI only, PIO with several blocks, 32 slots, six ports.
const CAP: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 3 << 20 | 1 << 18 | 1 << 15 | 31 << 8 | (PORTS as u32 - 1);
const VERSION: u32 = 0x0001_0301;
const GHC_RESET: u32 = 1 << 0;
const GHC_INTERRUPTS: u32 = 1 << 1;
/// AE is always set, since CAP.SAM is.
const GHC_AHCI: u32 = 1 << 31;

/// The command that the worker has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    pub(super) port: usize,
    pub(super) slot: u8,
    /// PxSACT without the slot's own bit: the other commands that are queued.
    pub(super) outstanding: u32,
    /// Its result is to be dropped.
    pub(super) cancelled: bool,
    /// It waits for the host or for the end of a pause: no I/O is in flight.
    pub(super) waits: bool,
    /// The device has taken it into its queue: PxCI does not show it any more.
    pub(super) queued: bool,
}

/// How a command ended.
pub(super) enum Outcome {
    /// The device answered.
    Finished(Box<Command>, Finish),
    Stopped(Stop),
    /// The frame wrote Device Control.
    DeviceControl {
        srst: bool,
    },
    NotFetched(FetchError),
    /// The wait for the host was given up.
    Abandoned,
}

/// What a register write asks of its caller; the later includes the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wish {
    Nothing,
    /// The worker may have something to do.
    Work,
    /// The running command was cancelled: its wait for the host is to be given up.
    GiveUp,
}

/// See the file's head.
pub(super) struct Hba {
    ram: GuestRam,
    irq: IrqLine,
    interrupts: bool,
    is: u32,
    pub(super) ports: [Port; PORTS],
    pub(super) running: Option<Running>,
    /// GHC.HR, or the machine's reset, waits for the running command.
    resetting: bool,
    last_port: usize,
    /// The machine is paused: the worker begins nothing.
    pub(super) paused: bool,
    /// The device goes away.
    pub(super) ended: bool,
}

impl Hba {
    pub(super) fn new(ram: GuestRam, irq: IrqLine, plugged: [Plugged; PORTS]) -> Hba {
        Hba {
            ram,
            irq,
            interrupts: false,
            is: 0,
            ports: plugged.map(Port::new),
            running: None,
            resetting: false,
            last_port: 0,
            paused: false,
            ended: false,
        }
    }

    /// The first half of a machine reset: the running command's result is to be dropped, and none is taken before
    /// `power_on`.
    pub(super) fn stop(&mut self) {
        self.cancel(None);
        self.resetting = true;
    }

    /// The state after power on. Nothing may be running.
    pub(super) fn power_on(&mut self) {
        self.ports = self.ports.each_ref().map(|port| Port::new(port.plugged));
        self.reset_generic();
    }

    fn reset_generic(&mut self) {
        self.interrupts = false;
        self.is = 0;
        self.resetting = false;
        self.sync_irq();
    }

    /// Reads any bytes of the register file; what reaches past its end is zero.
    pub(super) fn read(&self, offset: u64, width: Width) -> u64 {
        let mut value = 0;
        for piece in pieces(offset, width) {
            let part = u64::from(self.read_register(piece.register) & piece.mask) >> piece.low_bit;
            value |= part << piece.value_bit;
        }
        value
    }

    /// Writes any bytes of the register file; bytes that are not written keep their register's value, and clear nothing.
    pub(super) fn write(&mut self, offset: u64, width: Width, value: u64) -> Wish {
        let mut wish = Wish::Nothing;
        for piece in pieces(offset, width) {
            let part = ((value >> piece.value_bit) << piece.low_bit) as u32 & piece.mask;
            wish = wish.max(self.write_register(piece.register, part, piece.mask));
        }
        self.sync_irq();
        wish
    }

    fn read_register(&self, register: u16) -> u32 {
        match register {
            0x00 => CAP,
            0x04 => {
                GHC_AHCI | if self.interrupts { GHC_INTERRUPTS } else { 0 } | if self.resetting { GHC_RESET } else { 0 }
            }
            0x08 => self.is,
            0x0c => (1 << PORTS) - 1,
            0x10 => VERSION,
            _ => match port_register(register) {
                Some((index, register)) => {
                    let running = self.running.is_some_and(|running| running.port == index);
                    self.ports.get(index).map_or(0, |port| port.read(register, running))
                }
                None => 0,
            },
        }
    }

    fn write_register(&mut self, register: u16, value: u32, mask: u32) -> Wish {
        if self.resetting {
            return Wish::Nothing; // until HR reads zero, the driver has nothing to write
        }
        match register {
            0x04 if value & mask & GHC_RESET != 0 => return self.hba_reset(),
            0x04 if mask & GHC_INTERRUPTS != 0 => self.interrupts = value & GHC_INTERRUPTS != 0,
            0x08 => self.is &= !(value & mask),
            _ => {
                let found = port_register(register);
                if let Some((index, register)) = found
                    && let Some(port) = self.ports.get_mut(index)
                {
                    let follow = port.write(register, value, mask, &self.ram);
                    return self.follow(index, follow);
                }
            }
        }
        Wish::Nothing
    }

    fn follow(&mut self, index: usize, follow: Follow) -> Wish {
        match follow {
            Follow::Nothing => Wish::Nothing,
            Follow::Work => Wish::Work,
            Follow::Cancel => self.cancel(Some(index)),
            Follow::CancelAndLinkUp => {
                let wish = self.cancel(Some(index));
                if let Some(port) = self.ports.get_mut(index) {
                    if wish == Wish::GiveUp {
                        port.link_waits = true;
                    } else {
                        port.link_up(Some(&self.ram));
                    }
                }
                wish.max(Wish::Work)
            }
        }
    }

    fn hba_reset(&mut self) -> Wish {
        let wish = self.cancel(None);
        if wish == Wish::GiveUp {
            self.resetting = true;
        } else {
            self.finish_hba_reset();
        }
        wish
    }

    fn finish_hba_reset(&mut self) {
        self.ports.iter_mut().for_each(Port::hba_reset);
        self.reset_generic();
    }

    /// Makes the result of the running command, of one port or of any, be dropped.
    fn cancel(&mut self, port: Option<usize>) -> Wish {
        match &mut self.running {
            Some(running) if port.is_none_or(|port| port == running.port) => {
                running.cancelled = true;
                Wish::GiveUp
            }
            _ => Wish::Nothing,
        }
    }

    /// Takes the next command for the worker, ports in turn. The caller fetches it from the list.
    pub(super) fn take(&mut self) -> Option<(Running, Gpa)> {
        if self.paused || self.running.is_some() {
            return None;
        }
        for turn in 1..=PORTS {
            let index = (self.last_port + turn) % PORTS;
            let Some(port) = self.ports.get_mut(index) else { continue };
            if let Some(slot) = port.next_slot() {
                port.begin(slot);
                let outstanding = port.sact & !1u32.wrapping_shl(slot.into());
                let running = Running { port: index, slot, outstanding, cancelled: false, waits: false, queued: false };
                self.last_port = index;
                self.running = Some(running);
                return Some((running, port.list()));
            }
        }
        None
    }

    /// The running command is one that a disk takes into its queue.
    pub(super) fn begin_queued(&mut self) {
        let Some(running) = &mut self.running else { return };
        let Some(port) = self.ports.get_mut(running.port) else { return };
        // Of one that was cancelled nothing is shown.
        if !running.cancelled && port.plugged == Plugged::Disk {
            running.queued = true;
            port.receive_queued_start(&self.ram, running.slot);
        }
    }

    /// Whether the device behind the port has to be reset before its command; asked once.
    pub(super) fn take_device_reset(&mut self, index: usize) -> bool {
        self.ports.get_mut(index).is_some_and(|port| std::mem::take(&mut port.reset_device))
    }

    /// The running command has ended.
    pub(super) fn finish(&mut self, outcome: Outcome) {
        let Some(running) = self.running.take() else { return };
        if self.resetting {
            self.finish_hba_reset();
        } else if let Some(port) = self.ports.get_mut(running.port) {
            if !running.cancelled {
                end_command(port, &self.ram, running.slot, outcome);
            } else if port.link_waits {
                port.link_up(Some(&self.ram));
            } else {
                port.discard();
            }
        }
        self.sync_irq();
    }

    pub(super) fn save(&self) -> HbaV1 {
        // A reset has ended before a pause begins.
        let Hba { ram: _, irq: _, interrupts, is, ports, running, resetting: _, last_port, paused: _, ended: _ } = self;
        let mut ports = ports.each_ref().map(Port::save);
        if let Some(Running { port, slot, outstanding: _, cancelled: false, waits: _, queued }) = running
            && let Some(port) = ports.get_mut(*port)
        {
            // The command that waits for the host is to be the first one again, and to be fetched again.
            port.current_slot = slot.wrapping_sub(1) & 31;
            port.ci |= u32::from(*queued).wrapping_shl((*slot).into());
        }
        HbaV1 { interrupts: *interrupts, is: *is, last_port: *last_port as u8, ports }
    }

    pub(super) fn restore(&mut self, saved: HbaV1) -> Result<(), BadState> {
        let HbaV1 { interrupts, is, last_port, ports } = saved;
        check(is < 1 << PORTS, "an interrupt of a port that is not there")?;
        check(usize::from(last_port) < PORTS, "a port that is not there")?;
        for (port, saved) in self.ports.iter_mut().zip(ports) {
            port.restore(saved)?;
        }
        (self.interrupts, self.is, self.last_port) = (interrupts, is, last_port.into());
        self.sync_irq();
        Ok(())
    }

    /// Sets the line from the registers: every port with an enabled interrupt sets its bit in IS (3.1.3), and the bit
    /// stays until it is written, so that a driver that clears it too early gets it back at once.
    fn sync_irq(&mut self) {
        for (index, port) in self.ports.iter().enumerate() {
            if port.is & port.ie != 0 {
                self.is |= 1 << index;
            }
        }
        self.irq.set(self.interrupts && self.is != 0);
    }
}

/// Shows the end of a command in the port.
fn end_command(port: &mut Port, ram: &GuestRam, slot: u8, outcome: Outcome) {
    match outcome {
        Outcome::Finished(command, finish) => {
            // The count is written before the slot is cleared, so that a driver which sees the one finds the other.
            if let Some(at) = command.header_at.0.checked_add(4) {
                let _ = ram.write(Gpa(at), &finish.moved.to_le_bytes());
            }
            let registers = &finish.registers;
            match finish.frames {
                Frames::Register => {}
                Frames::Queued => port.receive_queued_end(ram, slot, registers, false),
                Frames::PioIn(bytes) => port.receive_pio_setup(ram, registers, true, bytes),
                Frames::PioThenRegister { to_host, last_block } => {
                    port.receive_pio_setup(ram, registers, to_host, last_block);
                }
            }
            if matches!(finish.frames, Frames::Register | Frames::PioThenRegister { .. }) {
                port.receive_d2h(ram, registers, true);
            }
            port.is |= if finish.overflow { int::OVERFLOW } else { 0 };
            port.is |= if finish.region_done { int::REGION_DONE } else { 0 };
            // A queued command's was cleared when the device took it, and may have been set for another since.
            if finish.frames != Frames::Queued {
                port.clear_slot(slot);
            }
        }
        // The slot stays set: the driver finds it with CCS, and recovers by clearing ST (6.2.2.1). Besides TFES the frame's
        // own interrupt is shown, as most HBAs do: SeaBIOS before 1.16.3 looks at that bit only.
        Outcome::Stopped(Stop::Error(registers)) => {
            port.receive_d2h(ram, &registers, true);
            halt(port, int::TASK_FILE);
        }
        Outcome::Stopped(Stop::Queued(registers)) => {
            port.receive_queued_end(ram, slot, &registers, true);
            halt(port, int::TASK_FILE);
        }
        Outcome::Stopped(Stop::BadMemory) => halt_ready(port, int::BUS_DATA),
        Outcome::NotFetched(FetchError::OutsideRam) => halt_ready(port, int::BUS_FATAL),
        Outcome::NotFetched(FetchError::BadFis) => halt_ready(port, int::BUS_FATAL),
        Outcome::DeviceControl { srst } => port.device_control(ram, slot, srst),
        Outcome::Stopped(Stop::Host(_)) | Outcome::Abandoned => halt(port, 0),
    }
}

fn halt(port: &mut Port, interrupt: u32) {
    port.is |= interrupt;
    port.halted = true;
}

/// The HBA gave up by itself; the device is not left busy, so that clearing ST is recovery enough.
fn halt_ready(port: &mut Port, interrupt: u32) {
    port.discard();
    halt(port, interrupt);
}

/// Which port and which of its registers.
fn port_register(register: u16) -> Option<(usize, u16)> {
    let inside = register.checked_sub(PORTS_AT)?;
    let index = usize::from(inside / PORT_BYTES);
    (index < PORTS).then_some((index, inside % PORT_BYTES))
}

/// The part of an access that falls into one register.
struct Piece {
    register: u16,
    mask: u32,
    low_bit: u32,
    value_bit: u32,
}

/// Cuts an access into registers. The specification wants aligned dwords and quadwords (3.0); others are served by bytes.
fn pieces(offset: u64, width: Width) -> impl Iterator<Item = Piece> {
    let end = (offset + width.bytes() as u64).min(REGISTER_BYTES);
    let first = offset & !3;
    (0..3u64).map(move |step| first + 4 * step).take_while(move |register| *register < end).map(move |register| {
        let (from, to) = (register.max(offset), (register + 4).min(end));
        let low_bit = 8 * (from - register) as u32;
        let bits = 8 * (to - from) as u32;
        Piece {
            register: register as u16, // below REGISTER_BYTES
            mask: (u32::MAX >> (32 - bits)) << low_bit,
            low_bit,
            value_bit: 8 * (from - offset) as u32,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hba() -> Hba {
        let ram = GuestRam::new(2 << 20).unwrap();
        let mut plugged = [Plugged::Nothing; PORTS];
        plugged[0] = Plugged::Disk;
        Hba::new(ram, IrqLine::unconnected(), plugged)
    }

    #[test]
    fn any_width_and_alignment_reads_the_same_bytes() {
        let hba = hba();
        let cap = u64::from(CAP);
        assert_eq!(hba.read(0, Width::B4), cap);
        assert_eq!(hba.read(1, Width::B2), cap >> 8 & 0xffff);
        assert_eq!(hba.read(3, Width::B1), cap >> 24);
        assert_eq!(hba.read(0, Width::B8), cap | u64::from(GHC_AHCI) << 32);
        assert_eq!(hba.read(3, Width::B2), cap >> 24 | u64::from(GHC_AHCI) & 0xff << 8);
        assert_eq!(hba.read(0xd, Width::B8), 0x0301_0000_0000 >> 8 | 0x0001 << 40);
        assert_eq!(hba.read(0xffe, Width::B8), 0);
        assert_eq!(hba.read(0x900, Width::B4), 0);
    }

    #[test]
    fn a_narrow_write_changes_its_bytes_only() {
        let mut hba = hba();
        hba.write(0x100, Width::B8, 0x1_2345_67ff);
        assert_eq!(hba.read(0x100, Width::B8), 0x1_2345_6400, "the list is aligned to 1 KiB");
        hba.write(0x102, Width::B1, 0xee);
        assert_eq!(hba.read(0x100, Width::B8), 0x1_23ee_6400);
        hba.write(0x10b, Width::B8, 0x0102_0304_0506_0708);
        assert_eq!(hba.read(0x108, Width::B8), 0x0405_0607_0800_0000);
        hba.write(0xfff, Width::B8, u64::MAX);
        hba.ports[0].is = int::D2H | int::REGION_DONE | int::TASK_FILE;
        hba.write(0x113, Width::B1, 0x40);
        assert_eq!(hba.read(0x110, Width::B4), u64::from(int::D2H | int::REGION_DONE), "zeros clear nothing");
    }

    #[test]
    fn ports_that_are_not_there_read_zero_and_empty_ports_say_so() {
        let mut hba = hba();
        hba.write(0x100 + 6 * 0x80, Width::B4, u64::MAX);
        assert_eq!(hba.read(0x100 + 6 * 0x80, Width::B4), 0);
        assert_eq!(hba.read(0x1a0, Width::B4), 0x7f);
        assert_eq!(hba.read(0x1a4, Width::B4), 0xffff_ffff);
        assert_eq!(hba.read(0x1a8, Width::B4), 0);
        assert_eq!(hba.read(0x0c, Width::B4), 0x3f);
    }
}
