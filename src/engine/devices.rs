//! The devices of the machine `pc-1`, made and wired once.

mod boot_devices;
mod functions;
mod plug;
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
use self::functions::Functions;
use super::{
    addresses::AddressSink,
    agent::{self, Agent, AgentSink},
    ahci::{AhciIo, CdTray},
    bus::{Bus, SharedDevice},
    chipset::{HostBridge, IsaPins, Piix3, Piix4Pm, PirqRouter},
    cmos::Cmos,
    console::{ConsoleHub, SCROLLBACK_BYTES},
    debugcon::DebugConsole,
    disk::RawFile,
    facts::MachineFacts,
    fault::HostFaults,
    flash::Flash,
    fwcfg::FwCfg,
    generation::Generation,
    i8042::I8042,
    irq::{IrqLine, MsiSink},
    layout::{self, slot},
    log::GuestLog,
    memory::{Gpa, GuestRam, HostRegion},
    pci::{
        DevFn,
        hotplug::Hotplug,
        root::{AddressPort, DataPort, PciRoot, Placement},
    },
    pm::{PM_BYTES, PmBlock},
    pvpanic::{Panic, PanicPort},
    reset::{ResetControl, SystemControl},
    screen::Screen,
    timer::Clock,
    tpm::{EmulatorSockets, Tpm, TpmHold},
    uart::Uart,
    vga::{self, SharedVga, Vga},
    virtio::{
        balloon::{Balloon, BalloonControl},
        console::Console,
        gpu::Gpu,
        input::{KeyboardInput, Tablet, TabletInput},
        net::NetLink,
        rng::Rng,
        vsock::Vsock,
    },
    watchdog::WatchdogHold,
    xhci::{UsbInput, XhciIo},
};
use crate::{
    spec::{self, GuestSpec, NetworkModel, RateLimit},
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
    pub tpm: Option<EmulatorSockets>,
    pub vga_rom: Option<Vec<u8>>,
    pub network_rom: Option<Vec<u8>>,
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
    /// When the guest has a virtio keyboard.
    pub keyboard: Option<KeyboardInput>,
    pub agent: Agent,
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
    watchdog: Option<WatchdogHold>,
    tpm: Option<Arc<Mutex<Tpm>>>,
    tpm_hold: Option<TpmHold>,
    /// When the guest has USB: its controller, and the way of keys and pointer to it.
    usb: Option<XhciIo>,
    pub usb_input: Option<UsbInput>,
    hotplug: Hotplug,
    functions: Functions,
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
        let (writes, dirty) = (Arc::clone(board), Arc::clone(board));
        let settle = Box::new(move || writes.settle_writes());
        let gpu = if spec.switches.gpu { Some(Gpu::new()?) } else { None };
        let display = gpu.as_ref().map(Gpu::display);
        let dirty = Box::new(move || dirty.take_dirty_video());
        let screen = Screen::with_gpu(Arc::clone(&vga), display, settle, dirty);

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
        let pci = Arc::new(Mutex::new(root));
        let mut functions = Functions::new(&pci, &router, ram, spec.cpus, listeners);
        functions.add_display(vga::pci_function(&vga), gpu)?;
        let (ahci, usb_disks) = functions.add_storage(spec, files.disks, &tray, &faults)?;
        if let Some(network) = &spec.network
            && !files.network.is_empty()
        {
            functions.add_network(network, files.network)?;
        }
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
            functions.add_virtio(slot::VSOCK, Vsock::new(GUEST_CID, listener)?)?;
        }
        let keyboard = if spec.switches.virtio_keyboard { Some(functions.add_keyboard()?) } else { None };
        let watchdog = match spec.watchdog {
            spec::Watchdog::None => None,
            _ => Some(functions.add_watchdog()?),
        };
        let tpm = match (spec.switches.tpm, files.tpm) {
            (true, Some(sockets)) => Some(Tpm::new(sockets, log.clone())?),
            (true, None) => return Err(io::Error::other("nobody handed over the TPM's emulator")),
            (false, _) => None,
        };
        let tpm_hold = tpm.as_ref().map(Tpm::hold);
        let (usb, usb_input) = functions.add_usb(spec.switches.usb, usb_disks)?;
        let event = pm.clone();
        let hotplug = Hotplug::new(move || event.raise_gpe(layout::GPE_HOTPLUG));

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
        if let (Some(rom), Some(network)) = (files.network_rom, &spec.network) {
            // SeaBIOS looks for the ROM of each PCI device by its ids, before it looks at the device's own.
            fw_cfg.add_file(
                match network.model {
                    NetworkModel::Virtio => "pci1af4,1041.rom",
                    NetworkModel::E1000 => "pci8086,100e.rom",
                },
                rom,
            );
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
            pci,
            tablet: tablet_input,
            keyboard,
            agent,
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
            watchdog,
            tpm: tpm.map(|tpm| Arc::new(Mutex::new(tpm))),
            tpm_hold,
            usb,
            usb_input,
            hotplug,
            functions,
        };
        devices.map_fixed();
        Ok(devices)
    }

    /// Puts the devices with fixed addresses on the buses.
    fn map_fixed(&self) {
        let ports: [(std::ops::Range<u64>, SharedDevice); 14] = [
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
            (layout::PCI_HOTPLUG, self.hotplug.ports()),
            vga::window(&self.vga),
        ];
        let [fixed @ .., window] = ports;
        for (at, device) in fixed.into_iter().chain(vga::ports(&self.vga)) {
            self.pio.map(at, device).expect("fixed ports do not overlap");
        }
        self.mmio.map(window.0, window.1).expect("nothing else is there yet");
        if let Some(tpm) = &self.tpm {
            self.mmio.map(layout::TPM, Arc::clone(tpm) as SharedDevice).expect("nothing else is there yet");
        }
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
        self.hotplug.reset();
        self.generation.reset();
        lock(&self.fw_cfg).reset();
        lock(&self.system_control).reset();
        lock(&self.reset_control).reset();
        lock(&self.debug_console).reset();
        lock(&self.panic_port).reset();
        if let Some((_, flash)) = &self.flash {
            lock(flash).reset();
        }
        if let Some(tpm) = &self.tpm {
            lock(tpm).reset();
        }
        lock(&self.vga).reset();
        self.screen.redraw();
        self.hub.mark_reset();
    }

    /// Returns when no I/O is in flight. Every vCPU is parked.
    pub fn hold(&self) {
        self.functions.hold();
        if let Some(usb) = &self.usb {
            usb.hold();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.hold();
        }
        if let Some(tpm) = &self.tpm_hold {
            tpm.hold();
        }
        self.ahci.quiesce();
    }

    /// I/O goes on; requests that met a host fault are tried again.
    pub fn release(&self) {
        self.ahci.resume();
        self.faults.resume();
        self.functions.release();
        if let Some(usb) = &self.usb {
            usb.release();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.release();
        }
        if let Some(tpm) = &self.tpm_hold {
            tpm.release();
        }
    }

    /// Brings what must not be cut short to its end, before a save. Everything is held.
    ///
    /// Errors: it takes longer than anybody should wait; everything can go on.
    pub fn settle(&self) -> io::Result<()> {
        self.tpm_hold.as_ref().map_or(Ok(()), TpmHold::settle)
    }

    /// Changes how much the guest may ask of a disk, at once. False when it has no such disk on virtio.
    pub fn limit_disk(&self, disk: &Id, limit: RateLimit) -> bool {
        self.functions.limits(disk).map(|limits| limits.set(limit)).is_some()
    }

    /// The host's hold on the guest's card, when that is virtio's.
    pub fn network_link(&self) -> Option<&NetLink> {
        self.functions.link()
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

#[cfg(test)]
mod tests;
