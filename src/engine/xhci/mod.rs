//! xHCI: a USB 3 host controller with a keyboard, a tablet and disks (eXtensible Host Controller Interface 1.1).
//!
//! ```text
//! BAR 0, 16 KiB:  0000 capability   0040 operational   0440 ports   1000 runtime   2000 doorbells        BAR 4  MSI-X
//!
//! ports 1 to 4, USB 2:  keyboard, tablet, two empty ones        ports 5 to 8, USB 3:  disks
//!
//! vCPU:    doorbell ──▶ lock ──▶ commands, control transfers, reports that wait ──▶ event ring ──▶ interrupt
//!                            └─▶ of a disk: wake its worker
//! viewer:  key, pointer ──▶ lock ──▶ report into the buffer that waits ──▶ event ring ──▶ interrupt
//! worker:  lock, take bytes from the ring ──▶ unlock, I/O ──▶ lock, bytes into the ring ──▶ event ring ──▶ interrupt
//! ```
//!
//! One lock rules all of it, and nobody holds it while he waits: commands, control transfers and reports are short and
//! bounded, a disk's I/O is done outside. Nothing is done by the clock: an interrupt endpoint that has nothing to say costs
//! nothing, an event is told at once, and a full event ring stops the rings until the driver has consumed some.
//!
//! It says that it is QEMU's (1b36:000d), which no system has a workaround for; all find it by its class. `controller.rs` is
//! the registers, `port.rs` the ports, `slot.rs` slots and contexts, `commands.rs` the command ring, `endpoint.rs` and
//! `control.rs` the transfer rings, `events.rs` the event ring, `transfers.rs` who is served when, `trb.rs` what rings are made
//! of. The devices are in `engine/usb/`.

mod commands;
mod control;
mod controller;
mod endpoint;
mod events;
mod port;
mod saved;
mod slot;
#[cfg(test)]
mod tests;
mod transfers;
mod trb;
mod worker;

use std::{
    io,
    sync::{Arc, Mutex},
};

use self::{
    controller::{Controller, REGISTER_BYTES},
    events::Events,
    port::Port,
    worker::{Disk, Plugged, Shared},
};
use super::{
    bus::{Access, BusFault, Effect, Width},
    disk::BlockBackend,
    event::Event,
    fault::FaultReport,
    input::KeyCode,
    irq::IrqLine,
    layout::slot::XHCI,
    memory::GuestRam,
    pci::{
        BarKind, BarSpec, CONFIG_BYTES, ConfigByte, DevFn, PciFunction, PciIdentity,
        root::{PciRoot, Wiring},
    },
    timer::Clock,
    usb::{Device, Keyboard, Storage, Tablet},
    worker::Worker,
};

/// Ports 1 to 4 are USB 2, 5 to 8 are USB 3; a promise of the machine version.
const PORTS: usize = 8;
const SUPER_PORTS: usize = 4;
const KEYBOARD_PORT: usize = 0;
const TABLET_PORT: usize = 1;
const FIRST_DISK_PORT: usize = PORTS - SUPER_PORTS;
/// How many disks there may be.
pub const DISKS_MAX: usize = SUPER_PORTS;
/// The number of the first disk's port, as firmware names it; the others follow.
pub const DISK_PORT: u8 = FIRST_DISK_PORT as u8 + 1;
/// Device slots: twice the devices, so that a driver may enumerate one anew before it gives up the old slot.
const SLOTS: usize = 16;
/// MSI-X vectors: one, for the only interrupter.
pub const VECTORS: u16 = 1;

const REGISTER_BAR: u8 = 0;
const MSIX_BAR: u8 = 4;
const BARS: [BarSpec; 1] = [BarSpec { index: REGISTER_BAR, size_bytes: REGISTER_BYTES, kind: BarKind::Registers64 }];

/// A disk. Its number is its port.
pub struct UsbDisk {
    /// Printable ASCII.
    pub serial: String,
    pub backend: Arc<dyn BlockBackend>,
}

/// What is plugged in, for good.
#[derive(Default)]
pub struct UsbDevices {
    pub keyboard: bool,
    pub tablet: bool,
    /// At most [`DISKS_MAX`].
    pub disks: Vec<UsbDisk>,
}

/// Stops and continues what the controller does by itself. Clones are the same one.
#[derive(Clone)]
pub struct XhciIo {
    shared: Arc<Shared>,
    workers: Vec<Worker<Plugged>>,
}

impl XhciIo {
    /// Returns when no I/O is in flight, and guest RAM is not touched until `release`. Input waits meanwhile.
    pub fn hold(&self) {
        self.shared.controller().paused = true;
        self.workers.iter().for_each(Worker::hold);
    }
    /// I/O and input go on; a request that met a host fault is tried again.
    pub fn release(&self) {
        let mut controller = self.shared.controller();
        controller.paused = false;
        controller.resume();
        drop(controller);
        self.workers.iter().for_each(Worker::release);
    }
}

/// What viewers do, on its way to the keyboard and the tablet. Clones are the same ones.
#[derive(Clone)]
pub struct UsbInput(Arc<Shared>);

impl UsbInput {
    /// As `InputSink::pointer`. Without a tablet it goes nowhere.
    pub fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8) {
        let mut controller = self.0.controller();
        if let Some(Device::Tablet(tablet)) = &mut controller.ports[TABLET_PORT].device {
            tablet.pointer(x, y, buttons, wheel);
            controller.serve_port(TABLET_PORT);
        }
    }
    /// As `InputSink::key`. Without a keyboard it goes nowhere.
    pub fn key(&self, code: KeyCode, down: bool) {
        let mut controller = self.0.controller();
        if let Some(Device::Keyboard(keyboard)) = &mut controller.ports[KEYBOARD_PORT].device {
            keyboard.key(code, down);
            controller.serve_port(KEYBOARD_PORT);
        }
    }
    /// The keyboard's lights: bit 0 number lock, bit 1 capitals lock, bit 2 scroll lock.
    pub fn leds(&self) -> u8 {
        match &self.0.controller().ports[KEYBOARD_PORT].device {
            Some(Device::Keyboard(keyboard)) => keyboard.leds(),
            _ => 0,
        }
    }
    /// Whether a driver listens to the keyboard, so that keys need not go to another one.
    pub fn has_keyboard(&self) -> bool {
        self.listens(KEYBOARD_PORT)
    }
    /// Whether a driver listens to the tablet.
    pub fn has_tablet(&self) -> bool {
        self.listens(TABLET_PORT)
    }

    fn listens(&self, port: usize) -> bool {
        let controller = self.0.controller();
        controller.ports.get(port).and_then(|port| port.device.as_ref()).is_some_and(Device::is_configured)
    }
}

/// The controller as PCI function. The threads of its disks exist as long as the process.
pub struct Xhci {
    shared: Arc<Shared>,
    workers: Vec<Worker<Plugged>>,
}

impl Xhci {
    /// A controller with everything plugged in, and the disks' threads started. Call before any vCPU runs. `report` is
    /// called on those threads.
    ///
    /// Errors: more than [`DISKS_MAX`] disks (`InvalidInput`), or a thread or its wake-up cannot be made.
    pub fn new(ram: GuestRam, wiring: &Wiring, devices: UsbDevices, report: &FaultReport) -> io::Result<Xhci> {
        let (mut xhci, disks) = Xhci::without_threads(ram, wiring, devices, report)?;
        for (port, disk) in (FIRST_DISK_PORT..).zip(disks) {
            let worker = Worker::spawn("usb-disk", disk)?;
            worker.activate(Plugged { shared: Arc::clone(&xhci.shared), port });
            xhci.workers.push(worker);
        }
        Ok(xhci)
    }

    /// A controller, and what the disks' threads are to do.
    fn without_threads(
        ram: GuestRam,
        wiring: &Wiring,
        devices: UsbDevices,
        report: &FaultReport,
    ) -> io::Result<(Xhci, Vec<Disk>)> {
        if devices.disks.len() > DISKS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("USB takes {DISKS_MAX} disks at most")));
        }
        let mut ports: [Port; PORTS] = std::array::from_fn(|index| Port::new(index >= FIRST_DISK_PORT, None, None));
        if devices.keyboard {
            ports[KEYBOARD_PORT] = Port::new(false, Some(Device::Keyboard(Keyboard::new())), None);
        }
        if devices.tablet {
            ports[TABLET_PORT] = Port::new(false, Some(Device::Tablet(Tablet::new())), None);
        }
        let mut disks = Vec::new();
        for (port, UsbDisk { serial, backend }) in ports.iter_mut().skip(FIRST_DISK_PORT).zip(devices.disks) {
            let kick = Arc::new(Event::new()?);
            let storage = Storage::new(serial, backend.shape());
            *port = Port::new(true, Some(Device::Storage(storage)), Some(Arc::clone(&kick)));
            disks.push(Disk { backend, kick, report: Arc::clone(report) });
        }
        let events = Events::new(ram.clone(), Arc::clone(&wiring.msix), wiring.irq.clone());
        let controller = Controller::new(ram, events, ports, Clock::monotonic());
        Ok((Xhci { shared: Arc::new(Shared(Mutex::new(controller))), workers: Vec::new() }, disks))
    }

    /// For the machine, which pauses.
    pub fn io(&self) -> XhciIo {
        XhciIo { shared: Arc::clone(&self.shared), workers: self.workers.clone() }
    }

    /// For viewers.
    pub fn input(&self) -> UsbInput {
        UsbInput(Arc::clone(&self.shared))
    }
}

/// Plugs a controller into its slot; `irq` is the PIRQ behind its pin.
///
/// Errors: as `Xhci::new`.
pub fn add(
    root: &mut PciRoot,
    irq: IrqLine,
    ram: GuestRam,
    devices: UsbDevices,
    report: &FaultReport,
) -> io::Result<Arc<Mutex<Xhci>>> {
    root.try_add(DevFn::new(XHCI, 0), irq, VECTORS, |wiring| Xhci::new(ram, &wiring, devices, report))
}

impl PciFunction for Xhci {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x1b36,
            device: 0x000d,
            class: 0x0c_0330,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            interrupt_pin: 1,
        }
    }

    fn bars(&self) -> &[BarSpec] {
        &BARS
    }

    /// The registers take BAR 0 and, being 64-bit, BAR 1.
    fn msix_bar(&self) -> u8 {
        MSIX_BAR
    }

    /// Serial bus release 3.0, and the frame length adjustment, which firmware may write (5.2.3 and 5.2.4).
    fn config_bytes(&self) -> Vec<ConfigByte> {
        vec![
            ConfigByte { offset: 0x60, reset: 0x30, writable: 0 },
            ConfigByte { offset: 0x61, reset: 0x20, writable: 0x3f },
        ]
    }

    /// MSI-X may have been switched: the pin is silent then.
    fn config_written(&mut self, _: &[u8; CONFIG_BYTES], _: u8, _: Width) {
        self.shared.controller().events.sync();
    }

    /// Reads may be narrower than a register, as SeaBIOS and OVMF read CAPLENGTH.
    fn bar_read(&mut self, _: u8, at: Access) -> Result<u64, BusFault> {
        let (bytes, within) = (at.width.bytes() as u64, at.offset % 4);
        let controller = self.shared.controller();
        match at.width {
            Width::B8 if at.offset.is_multiple_of(8) => {
                Ok(u64::from(controller.read(at.offset + 4)) << 32 | u64::from(controller.read(at.offset)))
            }
            Width::B1 | Width::B2 | Width::B4 if within + bytes <= 4 => {
                Ok(u64::from(controller.read(at.offset - within)) >> (8 * within) & at.width.mask())
            }
            _ => Err(BusFault::BadWidth),
        }
    }

    fn bar_write(&mut self, _: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        let mut controller = self.shared.controller();
        match at.width {
            Width::B4 if at.offset.is_multiple_of(4) => controller.write(at.offset, value as u32),
            Width::B8 if at.offset.is_multiple_of(8) => {
                controller.write(at.offset, value as u32);
                controller.write(at.offset + 4, (value >> 32) as u32);
            }
            _ => return Err(BusFault::BadWidth),
        }
        Ok(Effect::None)
    }

    /// Nothing of before reaches guest RAM after this. A write of a disk that is on its way still reaches the disk, before
    /// any later one.
    fn reset(&mut self) {
        self.shared.controller().reset();
    }
}
