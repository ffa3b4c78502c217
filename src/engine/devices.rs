//! The devices of the machine `pc-1`, made and wired once.

mod boot_devices;
mod saved;

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
};

pub use self::boot_devices::{boot_order, first_boot};
use super::{
    addresses::{AddressSink, AddressWatch},
    agent::{self, Agent, AgentSink},
    ahci::{Ahci, AhciDisk, AhciIo, CdTray},
    bus::{Bus, SharedDevice},
    chipset::{HostBridge, IsaPins, Piix3, Piix4Pm, PirqRouter},
    cmos::Cmos,
    console::{ConsoleHub, SCROLLBACK_BYTES},
    debugcon::DebugConsole,
    disk::RawFile,
    e1000::{E1000, E1000Io},
    facts::MachineFacts,
    fault::{FaultReport, HostFaults},
    flash::Flash,
    fwcfg::FwCfg,
    generation::Generation,
    i8042::I8042,
    irq::{IrqLine, MsiSink},
    layout::{self, slot},
    log::GuestLog,
    memory::{Gpa, GuestRam, HostRegion},
    net_backend::NetBackend,
    nvme::{self, Nvme, NvmeDisk, NvmeIo},
    pci::{
        DevFn,
        root::{AddressPort, DataPort, PciRoot, Placement},
    },
    pm::{PM_BYTES, PmBlock},
    pvpanic::{Panic, PanicPort},
    rate_limit::{RateLimit, RateLimits},
    reset::{ResetControl, SystemControl},
    screen::Screen,
    timer::Clock,
    uart::Uart,
    vga::{self, SharedVga, Vga},
    virtio::{
        VirtioDevice, Worker,
        balloon::{Balloon, BalloonControl},
        block::{Block, BlockOptions},
        console::Console,
        input::{Tablet, TabletInput},
        net::{Net, NetLink, NetParts},
        pci::VirtioPci,
        rng::Rng,
        vsock::Vsock,
    },
    watchdog::{Watchdog, WatchdogHold},
    xhci::{self, UsbDevices, UsbDisk, UsbInput, XhciIo},
};
use crate::{
    spec::{self, DiskBus, GuestSpec, NetworkModel, NetworkSpec},
    types::Id,
};

/// The context id of each guest: it is alone on its socket device, and 0 to 2 are taken.
const GUEST_CID: u32 = 3;
/// The port of the CD drive on the HBA.
pub const CD_PORT: u8 = 5;

/// What the devices are plugged into: KVM in the product, a recorder in tests.
pub trait Board: Placement + MsiSink {
    /// The interrupt controllers' input `number`, 0 to 15.
    fn set_irq(&self, number: u32, high: bool);
    /// Declares the video RAM; `place_video_ram` says where it is.
    fn set_video_ram(&self, region: &HostRegion);
    /// Carries out the guest's writes to the VGA window that are held back. The caller holds no lock of a device.
    fn settle_writes(&self);
    /// Declares the array of the flash chip, at a fixed address, and shows it: the guest reads it and its writes exit.
    fn set_flash(&self, at: u64, array: &HostRegion);
    /// Whether the array is there to be read; otherwise reads exit too.
    fn show_flash(&self, shown: bool);
    /// Which pages of video RAM the guest has written since the last call, one bit a page; empty while it is not mapped.
    fn take_dirty_video(&self) -> Vec<u64>;
}

/// What devices are made of, beside the specification.
pub struct DeviceFiles {
    pub disks: Vec<File>,
    pub cd: Option<File>,
    /// The queues of a tap, or one socket; empty without a network.
    pub network: Vec<OwnedFd>,
    pub vsock: Option<UnixListener>,
    pub vga_rom: Option<Vec<u8>>,
    /// The flash chip with the firmware's variables, and where it is.
    pub flash: Option<(File, Gpa)>,
}

/// Whom devices tell.
#[derive(Clone)]
pub struct Listeners {
    pub host_fault: Arc<dyn Fn(String) + Send + Sync>,
    pub addresses: AddressSink,
    /// The guest's kernel has crashed.
    pub panic: Arc<dyn Fn(Panic) + Send + Sync>,
    pub agent: AgentSink,
    /// The guest did not feed its watchdog.
    pub watchdog: Arc<dyn Fn() + Send + Sync>,
}

/// Everything on the buses.
pub struct Devices {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub pci: Arc<Mutex<PciRoot>>,
    pub hub: Arc<ConsoleHub>,
    pub uart: Arc<Mutex<Uart>>,
    pub i8042: I8042,
    pub pm: PmBlock,
    pub vga: SharedVga,
    pub screen: Arc<Screen>,
    /// The video RAM; saved like the guest's.
    pub video: HostRegion,
    pub tray: CdTray,
    pub tablet: TabletInput,
    pub agent: Agent,
    /// When the guest has a virtio card.
    pub network_link: Option<NetLink>,
    pub balloon: BalloonControl,
    pub generation: Generation,
    cmos: Cmos,
    fw_cfg: Arc<Mutex<FwCfg>>,
    system_control: Arc<Mutex<SystemControl>>,
    reset_control: Arc<Mutex<ResetControl>>,
    debug_console: Arc<Mutex<DebugConsole>>,
    panic_port: Arc<Mutex<PanicPort>>,
    flash: Option<(Gpa, Arc<Mutex<Flash>>)>,
    faults: HostFaults,
    ahci: AhciIo,
    nvme: Vec<NvmeIo>,
    /// Of the disks on virtio, by their ids.
    limits: Vec<(Id, RateLimits)>,
    /// When the guest has that card.
    e1000: Option<E1000Io>,
    watchdog: Option<WatchdogHold>,
    /// When the guest has USB: its controller, and the way of keys and pointer to it.
    usb: Option<XhciIo>,
    pub usb_input: Option<UsbInput>,
    workers: Vec<Worker>,
}

impl Devices {
    /// Makes and wires all devices. Threads exist, parked, when this returns; no vCPU runs yet.
    pub fn new(
        board: &Arc<dyn Board>,
        ram: &GuestRam,
        spec: &GuestSpec,
        facts: &MachineFacts,
        files: DeviceFiles,
        listeners: &Listeners,
        log: &GuestLog,
    ) -> io::Result<Devices> {
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let isa = IsaPins::new(|number| {
            let board = Arc::clone(board);
            IrqLine::new(move |high| board.set_irq(number, high))
        });
        let pm = PmBlock::new(isa.join(layout::IRQ_SCI), Clock::monotonic())?;
        let pm_base = Arc::new(AtomicU16::new(layout::PM_BASE));
        let router = PirqRouter::default();
        let (placement, messages): (Arc<dyn Placement>, Arc<dyn MsiSink>) =
            (Arc::clone(board) as _, Arc::clone(board) as _);
        let mut root = PciRoot::new(Arc::clone(&pio), Arc::clone(&mmio), placement, messages);
        add_chipset(&mut root, &router, &isa, &pm, &pm_base, &pio);

        let vga = Vga::new()?;
        let video = lock(&vga).vram();
        board.set_video_ram(&video);
        root.add(DevFn::new(slot::VGA, 0), IrqLine::unconnected(), 0, |_| vga::pci_function(&vga));
        let (writes, dirty) = (Arc::clone(board), Arc::clone(board));
        let settle = Box::new(move || writes.settle_writes());
        let screen = Screen::new(Arc::clone(&vga), settle, Box::new(move || dirty.take_dirty_video()));

        let faults = HostFaults::new({
            let report = Arc::clone(&listeners.host_fault);
            move |reason| report(reason)
        });
        let flash = match files.flash {
            Some((file, at)) => {
                let chip = Flash::new(file, at.0, Arc::clone(board), Arc::clone(&listeners.host_fault))?;
                Some((at, Arc::new(Mutex::new(chip))))
            }
            None => None,
        };
        let tray = CdTray::new();
        if let Some(medium) = files.cd {
            tray.insert(RawFile::new(medium, true)?);
        }
        let mut functions = Functions {
            root: &mut root,
            router: &router,
            ram,
            nvme: Vec::new(),
            limits: Vec::new(),
            workers: Vec::new(),
        };
        let (ahci, usb_disks) = functions.add_storage(spec, files.disks, &tray, &faults, listeners)?;
        let (network_link, e1000) = match &spec.network {
            Some(network) if !files.network.is_empty() => functions.add_network(network, files.network, listeners)?,
            _ => (None, None),
        };
        functions.add_virtio(slot::RNG, Rng::new()?)?;
        let tablet = Tablet::new()?;
        let tablet_input = tablet.input();
        functions.add_virtio(slot::TABLET, tablet)?;
        let (agent, output) = agent::make(Arc::clone(&listeners.agent))?;
        functions.add_virtio(slot::CONSOLE, Console::new(agent.clone(), output)?)?;
        let balloon = Balloon::new(Clock::wall())?;
        let balloon_control = balloon.control();
        functions.add_virtio(slot::BALLOON, balloon)?;
        if let Some(listener) = files.vsock {
            // Nothing was handed over that the guest could connect to.
            let connect = Box::new(|_| Err(io::ErrorKind::ConnectionRefused.into()));
            functions.add_virtio(slot::VSOCK, Vsock::new(GUEST_CID, listener, connect)?)?;
        }
        let watchdog = match spec.watchdog {
            spec::Watchdog::None => None,
            _ => Some(functions.add_watchdog(Arc::clone(&listeners.watchdog))?),
        };
        let (usb, usb_input) = functions.add_usb(spec.usb, usb_disks, listeners)?;
        let Functions { nvme, limits, workers, .. } = functions;

        let hub = ConsoleHub::new(SCROLLBACK_BYTES);
        let sink = Arc::clone(&hub);
        let debug_log = log.clone();
        let generation_event = pm.clone();
        let generation = Generation::new(ram.clone(), facts.generation, move || {
            generation_event.raise_gpe(layout::GPE_GENERATION);
        });
        let pm_base_now = move || pm_base.load(Ordering::Acquire);
        let mut fw_cfg = FwCfg::for_machine(ram.clone(), facts.clone(), generation.clone(), pm_base_now);
        if let Some(rom) = files.vga_rom {
            fw_cfg.add_file("vgaroms/vgabios-stdvga.bin", rom);
        }
        let devices = Devices {
            uart: Arc::new(Mutex::new(Uart::new(isa.join(layout::IRQ_COM1), sink))),
            i8042: I8042::new(isa.join(layout::IRQ_KEYBOARD), isa.join(layout::IRQ_MOUSE)),
            cmos: Cmos::new(facts, Clock::wall(), isa.join(layout::IRQ_RTC))?,
            fw_cfg: Arc::new(Mutex::new(fw_cfg)),
            system_control: Arc::new(Mutex::new(SystemControl::new())),
            reset_control: Arc::new(Mutex::new(ResetControl::new())),
            debug_console: Arc::new(Mutex::new(DebugConsole::new(move |line| debug_log.say(line)))),
            panic_port: Arc::new(Mutex::new(PanicPort::new({
                let panic = Arc::clone(&listeners.panic);
                move |said| panic(said)
            }))),
            pci: Arc::new(Mutex::new(root)),
            tablet: tablet_input,
            agent,
            network_link,
            balloon: balloon_control,
            generation,
            pio,
            mmio,
            hub,
            pm,
            vga,
            screen,
            video,
            tray,
            flash,
            faults,
            ahci,
            nvme,
            limits,
            e1000,
            watchdog,
            usb,
            usb_input,
            workers,
        };
        devices.map_fixed();
        Ok(devices)
    }

    /// Puts the devices with fixed addresses on the buses.
    fn map_fixed(&self) {
        let ports: [(std::ops::Range<u64>, SharedDevice); 13] = [
            (layout::I8042, self.i8042.data_port()),
            (layout::I8042_COMMAND, self.i8042.command_port()),
            (layout::CMOS, self.cmos.ports()),
            (layout::PORT_92, Arc::clone(&self.system_control) as SharedDevice),
            (layout::COM1, Arc::clone(&self.uart) as SharedDevice),
            (layout::DEBUG_CONSOLE, Arc::clone(&self.debug_console) as SharedDevice),
            (layout::PANIC, Arc::clone(&self.panic_port) as SharedDevice),
            (layout::FW_CFG, Arc::clone(&self.fw_cfg) as SharedDevice),
            (layout::PCI_CONFIG.start..layout::PCI_CONFIG.start + 1, shared(AddressPort(Arc::clone(&self.pci)))),
            (layout::RESET_CONTROL..layout::RESET_CONTROL + 1, Arc::clone(&self.reset_control) as SharedDevice),
            (layout::PCI_CONFIG.start + 4..layout::PCI_CONFIG.end, shared(DataPort(Arc::clone(&self.pci)))),
            (layout::GPE0, self.pm.gpe0()),
            vga::window(&self.vga),
        ];
        let [fixed @ .., window] = ports;
        for (at, device) in fixed.into_iter().chain(vga::ports(&self.vga)) {
            self.pio.map(at, device).expect("fixed ports do not overlap");
        }
        self.mmio.map(window.0, window.1).expect("nothing else is there yet");
        if let Some((at, flash)) = &self.flash {
            let end = at.0 + lock(flash).bytes() as u64;
            self.mmio.map(at.0..end, Arc::clone(flash) as SharedDevice).expect("only the VGA window is there yet");
        }
    }

    /// Everything back to the state after power on. Every vCPU is parked.
    pub fn reset(&self) {
        self.faults.abandon();
        self.pci.lock().unwrap_or_else(PoisonError::into_inner).reset();
        lock(&self.uart).reset();
        self.i8042.reset();
        self.cmos.reset();
        self.pm.reset();
        self.generation.reset();
        lock(&self.fw_cfg).reset();
        lock(&self.system_control).reset();
        lock(&self.reset_control).reset();
        lock(&self.debug_console).reset();
        lock(&self.panic_port).reset();
        if let Some((_, flash)) = &self.flash {
            lock(flash).reset();
        }
        lock(&self.vga).reset();
        self.screen.redraw();
        self.hub.mark_reset();
    }

    /// Returns when no I/O is in flight. Every vCPU is parked.
    pub fn hold(&self) {
        for worker in &self.workers {
            worker.hold();
        }
        for controller in &self.nvme {
            controller.hold();
        }
        if let Some(usb) = &self.usb {
            usb.hold();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.hold();
        }
        self.ahci.quiesce();
        if let Some(card) = &self.e1000 {
            card.quiesce();
        }
    }

    /// I/O goes on; requests that met a host fault are tried again.
    pub fn release(&self) {
        self.ahci.resume();
        if let Some(card) = &self.e1000 {
            card.resume();
        }
        self.faults.resume();
        for worker in &self.workers {
            worker.release();
        }
        for controller in &self.nvme {
            controller.release();
        }
        if let Some(usb) = &self.usb {
            usb.release();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.release();
        }
    }

    /// Changes how much the guest may ask of a disk, at once. False when it has no such disk on virtio.
    pub fn limit_disk(&self, disk: &Id, limit: RateLimit) -> bool {
        let found = self.limits.iter().find(|(id, _)| id == disk);
        found.map(|(_, limits)| limits.set(limit)).is_some()
    }

    /// The end: nothing waits any more.
    pub fn close(&self) {
        self.faults.abandon();
        if let Some((_, flash)) = &self.flash {
            lock(flash).close();
        }
        self.hub.close();
        self.screen.close();
    }
}

fn shared<D: super::bus::BusDevice + 'static>(device: D) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add_chipset(
    root: &mut PciRoot,
    router: &PirqRouter,
    isa: &IsaPins,
    pm: &PmBlock,
    pm_base: &Arc<AtomicU16>,
    pio: &Arc<Bus>,
) {
    root.add(DevFn::new(slot::HOST_BRIDGE, 0), IrqLine::unconnected(), 0, |_| HostBridge);
    let piix3 = Piix3 { router: router.clone(), isa: isa.clone() };
    root.add(DevFn::new(slot::PIIX, 0), IrqLine::unconnected(), 0, |_| piix3);
    let (registers, pio, base) = (pm.registers(), Arc::clone(pio), Arc::clone(pm_base));
    let mut mapped = None;
    let place = move |at: Option<u16>| {
        if let Some(old) = mapped.take() {
            pio.unmap(u64::from(old));
        }
        // A base over another device's ports leaves the block unmapped, as with any BAR.
        if let Some(new) = at
            && pio.map(u64::from(new)..u64::from(new) + PM_BYTES, Arc::clone(&registers)).is_ok()
        {
            mapped = Some(new);
            base.store(new, Ordering::Release);
        }
    };
    root.add(DevFn::new(slot::PIIX, 3), IrqLine::unconnected(), 0, |_| Piix4Pm::new(place));
}

/// Adds functions to the root and remembers their workers.
struct Functions<'a> {
    root: &'a mut PciRoot,
    router: &'a PirqRouter,
    ram: &'a GuestRam,
    nvme: Vec<NvmeIo>,
    limits: Vec<(Id, RateLimits)>,
    workers: Vec<Worker>,
}

impl Functions<'_> {
    fn add_virtio<D: VirtioDevice + 'static>(&mut self, slot: u8, device: D) -> io::Result<()> {
        self.workers.extend_from_slice(device.workers());
        let vectors = VirtioPci::vectors(&device);
        let irq = self.router.join(layout::pirq(slot, 1));
        let ram = self.ram.clone();
        self.root.try_add(DevFn::new(slot, 0), irq, vectors, |wiring| VirtioPci::new(device, ram, &wiring))?;
        Ok(())
    }

    fn add_watchdog(&mut self, bite: Arc<dyn Fn() + Send + Sync>) -> io::Result<WatchdogHold> {
        let at = DevFn::new(slot::WATCHDOG, 0);
        let made =
            self.root.try_add(at, IrqLine::unconnected(), 0, |_| Watchdog::new(Clock::monotonic(), move || bite()))?;
        let hold = lock(&made).hold();
        Ok(hold)
    }

    /// A controller, when there is something for it: keyboard and tablet as the guest wants them, disks.
    fn add_usb(
        &mut self,
        input: bool,
        disks: Vec<UsbDisk>,
        listeners: &Listeners,
    ) -> io::Result<(Option<XhciIo>, Option<UsbInput>)> {
        if !input && disks.is_empty() {
            return Ok((None, None));
        }
        let devices = UsbDevices { keyboard: input, tablet: input, disks };
        let irq = self.router.join(layout::pirq(slot::XHCI, 1));
        let made = xhci::add(self.root, irq, self.ram.clone(), devices, &listeners.host_fault)?;
        let controller = lock(&made);
        Ok((Some(controller.io()), Some(controller.input())))
    }

    fn add_nvme(&mut self, slot: u8, disk: NvmeDisk, report: FaultReport) -> io::Result<()> {
        let irq = self.router.join(layout::pirq(slot, 1));
        let ram = self.ram.clone();
        let controller = self
            .root
            .try_add(DevFn::new(slot, 0), irq, nvme::VECTORS, |wiring| Nvme::new(ram, &wiring, disk, report))?;
        self.nvme.push(lock(&controller).io());
        Ok(())
    }

    /// Gives the host's hold on a virtio card, or that on a card whose worker is not one of `workers`.
    fn add_network(
        &mut self,
        network: &NetworkSpec,
        mut links: Vec<OwnedFd>,
        listeners: &Listeners,
    ) -> io::Result<(Option<NetLink>, Option<E1000Io>)> {
        let watch = AddressWatch::new(Arc::clone(&listeners.addresses));
        match network.model {
            NetworkModel::Virtio => {
                let parts = NetParts { backend: network.backend, links, mac: network.mac, mtu: None, watch };
                let card = Net::new(parts)?;
                let link = card.link();
                self.add_virtio(slot::NETWORK, card)?;
                Ok((Some(link), None))
            }
            NetworkModel::E1000 => {
                // The card has one pair of queues.
                let backend = NetBackend::new(links.swap_remove(0), network.backend, watch)?;
                let irq = self.router.join(layout::pirq(slot::NETWORK, 1));
                let (ram, mac) = (self.ram.clone(), network.mac);
                let card = self.root.try_add(DevFn::new(slot::NETWORK, 0), irq, 0, |wiring| {
                    E1000::new(ram, wiring.irq, backend, mac)
                })?;
                let io = lock(&card).io();
                Ok((None, Some(io)))
            }
        }
    }

    /// Gives the hold on the HBA, and the disks that belong behind a USB controller.
    fn add_storage(
        &mut self,
        spec: &GuestSpec,
        files: Vec<File>,
        tray: &CdTray,
        faults: &HostFaults,
        listeners: &Listeners,
    ) -> io::Result<(AhciIo, Vec<UsbDisk>)> {
        let (mut ahci_disks, mut usb_disks) = (Vec::new(), Vec::new());
        let mut next_slot = slot::DISK;
        for (disk, file) in spec.disks.iter().zip(files) {
            let backend = RawFile::new(file, disk.read_only)?;
            let serial = disk.id.to_string();
            match disk.bus {
                DiskBus::Ahci => ahci_disks.push(AhciDisk { serial, backend }),
                DiskBus::Usb => usb_disks.push(UsbDisk { serial, backend }),
                DiskBus::Virtio => {
                    let faults = Arc::clone(&listeners.host_fault);
                    let limits = RateLimits::new(disk.limit)?;
                    self.limits.push((disk.id.clone(), limits.clone()));
                    let options = BlockOptions {
                        serial: &serial,
                        queues: u16::try_from(spec.cpus).unwrap_or(u16::MAX),
                        limits,
                        faults,
                    };
                    self.add_virtio(next_slot, Block::new(backend, options)?)?;
                    next_slot += 1;
                }
                DiskBus::Nvme => {
                    let report = Arc::clone(&listeners.host_fault);
                    self.add_nvme(next_slot, NvmeDisk { serial, backend }, report)?;
                    next_slot += 1;
                }
            }
        }
        let irq = self.router.join(layout::pirq(slot::AHCI, 1));
        let (ram, tray) = (self.ram.clone(), tray.clone());
        let ahci = self.root.try_add(DevFn::new(slot::AHCI, 0), irq, 0, |wiring| {
            Ahci::new(ram, wiring.irq, ahci_disks, tray, faults)
        })?;
        let io = ahci.lock().unwrap_or_else(PoisonError::into_inner).io();
        Ok((io, usb_disks))
    }
}

#[cfg(test)]
mod tests;
