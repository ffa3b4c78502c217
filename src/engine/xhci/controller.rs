//! The controller's registers (xHCI 1.1, section 5), under one lock with everything they rule.

use super::{
    PORTS, SLOTS, SUPER_PORTS,
    events::{Events, SEGMENTS_MAX},
    port::Port,
    slot::Slot,
    trb::{Code, Cursor, Trb, kind},
};
use crate::engine::{memory::GuestRam, timer::Clock};

/// The map of BAR 0.
pub(super) const REGISTER_BYTES: u32 = 16 << 10;
const OPERATIONAL: u64 = 0x40;
const PORT_REGISTERS: u64 = OPERATIONAL + 0x400;
const PORT_BYTES: u64 = 0x10;
const RUNTIME: u64 = 0x1000;
const INTERRUPTER: u64 = RUNTIME + 0x20;
const DOORBELLS: u64 = 0x2000;
/// Behind the capability registers, in words.
const EXTENDED: u32 = 0x20 / 4;

// Capability registers (5.3).
const VERSION: u32 = 0x0110;
const ONE_INTERRUPTER: u32 = 1 << 8;
/// HCSPARAMS2: software adds TRBs a frame ahead; the exponent of the event ring's segments. No scratchpad.
const HCSPARAMS2: u32 = 1 << 3 | 1 | SEGMENTS_MAX.ilog2() << 4;
/// HCCPARAMS1: addresses of 64 bits, contexts of 32 bytes, all Event Data TRBs of a short transfer are parsed, no streams.
const HCCPARAMS1: u32 = EXTENDED << 16 | 1 << 8 | 1;

// Supported Protocol Capabilities (7.2).
const PROTOCOL_USB_2: u32 = 0x0200 << 16 | 2;
const PROTOCOL_USB_3: u32 = 0x0300 << 16 | 2;
const NEXT_CAPABILITY: u32 = 4 << 8;
const PROTOCOL_NAME: u32 = u32::from_le_bytes(*b"USB ");

// USBCMD (5.4.1).
pub(super) const RUN: u32 = 1;
const RESET: u32 = 1 << 1;
const INTERRUPTS: u32 = 1 << 2;
const RESTORE_STATE: u32 = 1 << 9;
/// What is kept; host system error and wrap events are accepted and mean nothing.
pub(super) const COMMAND_KEPT: u32 = RUN | INTERRUPTS | 1 << 3 | 1 << 10 | 1 << 11;

// USBSTS (5.4.2).
const HALTED: u32 = 1;
const HOST_ERROR: u32 = 1 << 2;
const EVENT_INTERRUPT: u32 = 1 << 3;
const PORT_CHANGE: u32 = 1 << 4;
const RESTORE_ERROR: u32 = 1 << 10;
/// What is stored as it is, and cleared by writing 1.
pub(super) const STATUS_STORED: u32 = HOST_ERROR | PORT_CHANGE | RESTORE_ERROR;

// CRCR (5.4.5).
const RING_STOP: u32 = 1 << 1;
const RING_ABORT: u32 = 1 << 2;
const RING_RUNNING: u32 = 1 << 3;

/// A microframe; MFINDEX counts them in 14 bits.
const MICROFRAME_NS: u64 = 125_000;

/// What the driver programs, beside the event ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Registers {
    pub(super) command: u32,
    /// Of `STATUS_STORED`.
    pub(super) status: u32,
    pub(super) notifications: u32,
    /// The command ring, and whether its doorbell was rung since it was last stopped.
    pub(super) ring: Cursor,
    pub(super) ring_running: bool,
    pub(super) contexts: u64,
    pub(super) config: u32,
}

pub(super) struct Controller {
    pub(super) ram: GuestRam,
    pub(super) registers: Registers,
    pub(super) events: Events,
    pub(super) ports: [Port; PORTS],
    /// Slot n is at n - 1.
    pub(super) slots: [Slot; SLOTS],
    /// The machine is paused: nothing touches guest RAM.
    pub(super) paused: bool,
    /// MFINDEX is not saved: nobody here transfers by the frame.
    pub(super) clock: Clock,
}

impl Controller {
    pub(super) fn new(ram: GuestRam, events: Events, ports: [Port; PORTS], clock: Clock) -> Controller {
        let slots = std::array::from_fn(|_| Slot::default());
        Controller { ram, registers: Registers::default(), events, ports, slots, paused: false, clock }
    }

    /// HCRST, or the machine's reset. I/O of a disk that is on its way is for nobody.
    pub(super) fn reset(&mut self) {
        self.registers = Registers::default();
        self.events.reset();
        self.slots = std::array::from_fn(|_| Slot::default());
        self.ports.iter_mut().for_each(Port::power_on);
    }

    /// Whether the controller may look at its rings.
    pub(super) fn is_running(&self) -> bool {
        self.registers.command & RUN != 0 && !self.paused
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            0..OPERATIONAL => capability(offset),
            OPERATIONAL..PORT_REGISTERS => self.read_operational(offset - OPERATIONAL),
            PORT_REGISTERS..RUNTIME => {
                let at = offset - PORT_REGISTERS;
                self.ports.get((at / PORT_BYTES) as usize).map_or(0, |port| port.read(at % PORT_BYTES))
            }
            RUNTIME => (self.clock.now_ns() / MICROFRAME_NS) as u32 & 0x3fff,
            INTERRUPTER..DOORBELLS => self.read_interrupter(offset - INTERRUPTER),
            _ => 0,
        }
    }

    fn read_operational(&self, offset: u64) -> u32 {
        let Registers { command, status, notifications, ring_running, contexts, config, .. } = self.registers;
        match offset {
            0x00 => command,
            0x04 => {
                let halted = if command & RUN == 0 { HALTED } else { 0 };
                let interrupt = if self.events.interrupt { EVENT_INTERRUPT } else { 0 };
                status | halted | interrupt
            }
            0x08 => 1, // pages of 4 KiB
            0x14 => notifications,
            0x18 if ring_running => RING_RUNNING,
            0x30 => contexts as u32,
            0x34 => (contexts >> 32) as u32,
            0x38 => config,
            _ => 0,
        }
    }

    fn read_interrupter(&self, offset: u64) -> u32 {
        let ring = &self.events.ring;
        match offset {
            0x00 => ring.iman,
            0x04 => ring.imod,
            0x08 => ring.segments,
            0x10 => ring.table as u32,
            0x14 => (ring.table >> 32) as u32,
            0x18 => ring.dequeue as u32,
            0x1c => (ring.dequeue >> 32) as u32,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        match offset {
            OPERATIONAL..PORT_REGISTERS => self.write_operational(offset - OPERATIONAL, value),
            PORT_REGISTERS..RUNTIME => {
                let at = offset - PORT_REGISTERS;
                self.write_port((at / PORT_BYTES) as usize, at % PORT_BYTES, value);
            }
            INTERRUPTER..DOORBELLS => self.write_interrupter(offset - INTERRUPTER, value),
            DOORBELLS.. if self.is_running() => self.ring(((offset - DOORBELLS) / 4) as usize, value),
            _ => {}
        }
        self.check();
    }

    fn write_operational(&mut self, offset: u64, value: u32) {
        let registers = &mut self.registers;
        match offset {
            0x00 => self.write_command(value),
            0x04 => {
                registers.status &= !value;
                if value & EVENT_INTERRUPT != 0 {
                    self.events.interrupt = false;
                }
            }
            0x14 => registers.notifications = value & 0xffff,
            0x18 => self.write_ring(value),
            // While the ring runs its pointer is not written (5.4.5).
            0x1c if !registers.ring_running => registers.ring.at = high(registers.ring.at, value),
            0x30 => registers.contexts = low(registers.contexts, value & !0x3f),
            0x34 => registers.contexts = high(registers.contexts, value),
            0x38 => registers.config = value & 0x3ff,
            _ => {}
        }
    }

    fn write_command(&mut self, value: u32) {
        if value & RESET != 0 {
            return self.reset();
        }
        if value & RESTORE_STATE != 0 {
            // Nothing is kept while a system sleeps: the driver must begin anew (4.23.2).
            self.registers.status |= RESTORE_ERROR;
        }
        let before = self.registers.command;
        self.registers.command = value & COMMAND_KEPT;
        self.events.enabled = value & INTERRUPTS != 0;
        self.events.sync();
        if value & RUN == 0 {
            self.registers.ring_running = false;
        } else if before & RUN == 0 {
            self.ports.iter_mut().for_each(|port| port.changed = port.has_changes());
            self.resume();
        }
    }

    fn write_ring(&mut self, value: u32) {
        let registers = &mut self.registers;
        if !registers.ring_running {
            registers.ring = Cursor { at: low(registers.ring.at, value & !0x3f), cycle: value & 1 != 0 };
        } else if value & (RING_STOP | RING_ABORT) != 0 {
            // Commands are done at once, so there is none to abort.
            registers.ring_running = false;
            let at = registers.ring.at;
            self.events.post(Trb::event(kind::COMMAND_COMPLETION, at, Code::CommandRingStopped, 0, 0), false);
        }
    }

    fn write_port(&mut self, index: usize, register: u64, value: u32) {
        let Some(port) = self.ports.get_mut(index) else { return };
        port.write(register, value);
        self.tell_ports();
        self.serve_port(index);
    }

    fn write_interrupter(&mut self, offset: u64, value: u32) {
        let ring = &mut self.events.ring;
        match offset {
            0x00 => self.events.write_iman(value),
            0x04 => ring.imod = value,
            0x08 => self.events.write_segments(value),
            0x10 => {
                let table = low(ring.table, value);
                self.events.write_table(table);
            }
            0x14 => {
                let table = high(ring.table, value);
                self.events.write_table(table);
                // A driver may have started the controller before it gave it a ring.
                self.resume();
            }
            0x18 => {
                let dequeue = low(ring.dequeue, value);
                self.consumed(dequeue);
            }
            // The busy bit is in the other half, where 1 would clear it.
            0x1c => {
                let dequeue = high(ring.dequeue & !0xf, value);
                self.consumed(dequeue);
            }
            _ => {}
        }
    }

    /// ERDP. The event ring of a paused machine stays as it is; what is due comes with `resume`.
    fn consumed(&mut self, dequeue: u64) {
        if self.events.write_dequeue(dequeue) {
            self.resume();
        }
    }

    /// Port Status Change Events (4.19.2), as far as there is room.
    pub(super) fn tell_ports(&mut self) {
        for (index, port) in self.ports.iter_mut().enumerate() {
            if !port.changed {
                continue;
            }
            self.registers.status |= PORT_CHANGE;
            if self.registers.command & RUN != 0 && !self.paused && self.events.has_room() {
                port.changed = false;
                let parameter = (index as u64 + 1) << 24;
                self.events.post(Trb::event(kind::PORT_STATUS_CHANGE, parameter, Code::Success, 0, 0), false);
            }
        }
    }

    /// Rings that are not RAM stop everything until a reset (4.10.2.6).
    pub(super) fn check(&mut self) {
        if self.events.broken && self.registers.command & RUN != 0 {
            self.fail();
        }
    }

    pub(super) fn fail(&mut self) {
        self.registers.command &= !RUN;
        self.registers.ring_running = false;
        self.registers.status |= HOST_ERROR;
    }
}

fn capability(offset: u64) -> u32 {
    let usb_2 = PORTS as u32 - SUPER_PORTS as u32;
    match offset {
        0x00 => VERSION << 16 | OPERATIONAL as u32,
        0x04 => (PORTS as u32) << 24 | ONE_INTERRUPTER | SLOTS as u32,
        0x08 => HCSPARAMS2,
        0x10 => HCCPARAMS1,
        0x14 => DOORBELLS as u32,
        0x18 => RUNTIME as u32,
        0x20 => PROTOCOL_USB_2 | NEXT_CAPABILITY,
        0x24 | 0x34 => PROTOCOL_NAME,
        0x28 => usb_2 << 8 | 1,
        0x30 => PROTOCOL_USB_3,
        0x38 => (SUPER_PORTS as u32) << 8 | (usb_2 + 1),
        _ => 0,
    }
}

fn low(whole: u64, half: u32) -> u64 {
    whole & !0xffff_ffff | u64::from(half)
}
fn high(whole: u64, half: u32) -> u64 {
    whole & 0xffff_ffff | u64::from(half) << 32
}
