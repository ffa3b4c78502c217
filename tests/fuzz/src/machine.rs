//! A small machine without KVM around the device that is driven.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    engine::{
        devices::{Board, DeviceFiles, Devices, Listeners},
        disk::RawFile,
        event::Event,
        facts::{MachineFacts, pci_memory_64},
        irq::{IrqLine, MsiMessage, MsiSink},
        layout::{self, slot},
        log::GuestLog,
        memory::{Gpa, GuestRam, HostRegion},
        pci::{DevFn, assign, root::Placement},
        topology::Topology,
        tpm::EmulatorSockets,
        turns,
        virtio::{pci::VirtioPci, vsock::Vsock},
        xhci::{self, UsbDevices, UsbDisk, UsbInput},
    },
    spec::{Boot, CpuModel, DiskSpec, GuestSpec, NetworkBackend, NetworkSpec, RateLimit},
    switches::Switches,
    targets::{Device, Extra},
    types::MacAddr,
};

pub(crate) const RAM_BYTES: u64 = 4 << 20;
/// Where drivers have their rings, and where their buffers.
pub(crate) const RINGS: u64 = 0x10_0000;
pub(crate) const DATA: u64 = 0x30_0000;
pub(crate) const FLASH_BYTES: u64 = 8 << 10;
const DISK_BYTES: u64 = 1 << 20;
const CID: u32 = 3;

/// The devices, and the host's ends of them.
pub(crate) struct Machine {
    pub(crate) devices: Devices,
    pub(crate) ram: GuestRam,
    pub(crate) usb_input: Option<UsbInput>,
    pub(crate) far: Far,
}

/// What is at the other ends.
#[derive(Default)]
pub(crate) struct Far {
    pub(crate) tap: Option<UnixDatagram>,
    pub(crate) passt: Option<UnixStream>,
    /// The emulator of a TPM, which never says anything: only kept open.
    pub(crate) _tpm: Vec<UnixStream>,
    /// Where programs of the host connect to the guest, and who is connected.
    pub(crate) vsock: Option<SocketAddr>,
    pub(crate) streams: Arc<Mutex<Vec<UnixStream>>>,
}

struct Nobody;

impl Placement for Nobody {
    fn place_video_ram(&self, _: Option<u64>) {}
    fn place_doorbell(&self, _: &Event, _: u64, _: bool) {}
}
impl MsiSink for Nobody {
    fn send(&self, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }
}
impl Board for Nobody {
    fn set_irq(&self, _: u32, _: bool) {}
    fn set_video_ram(&self, _: &HostRegion) {}
    fn settle_writes(&self) {}
    fn set_flash(&self, _: u64, _: &HostRegion) {}
    fn show_flash(&self, _: bool) {}
    fn take_dirty_video(&self) -> Vec<u64> {
        Vec::new()
    }
}

/// A file of zeros in memory.
pub(crate) fn file(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("the kernel gives memory");
    let file = File::from(fd);
    file.set_len(bytes).expect("the kernel gives memory");
    file
}

pub(crate) fn spec(device: &Device) -> GuestSpec {
    let network =
        device.network.map(|(model, backend)| NetworkSpec { mac: MacAddr([0x52, 0x54, 0, 1, 2, 3]), backend, model });
    let id = "aaaaaaaa";
    GuestSpec {
        id: id.parse().expect("an id"),
        name: "fuzz".parse().expect("a name"),
        machine: "pc-1".into(),
        cpus: 2,
        sockets: 1,
        threads: 1,
        memory_bytes: RAM_BYTES,
        boot: Boot::Test { cmdline: String::new() },
        disks: device
            .disk
            .iter()
            .map(|bus| DiskSpec {
                id: id.parse().expect("an id"),
                bus: *bus,
                read_only: false,
                slot: None,
                limit: RateLimit::default(),
            })
            .collect(),
        cd: device.extra == Extra::Cd,
        network,
        cpu_model: CpuModel::Host,
        switches: Switches {
            virtio_keyboard: device.extra == Extra::Keyboard,
            tpm: device.extra == Extra::Tpm,
            gpu: device.extra == Extra::Gpu,
            ..Switches::default()
        },
        watchdog: device.watchdog,
        boot_order: vec![],
        first_boot: None,
    }
}

impl Machine {
    /// As after power on, with all BARs placed.
    pub(crate) fn new(device: &Device) -> Machine {
        Machine::with_ram(device, GuestRam::new(RAM_BYTES).expect("the kernel gives memory"))
    }

    /// The same, around RAM that is there already.
    pub(crate) fn with_ram(device: &Device, ram: GuestRam) -> Machine {
        turns::end();
        turns::set_now_ns(1_800_000_000_000_000_000);
        let spec = spec(device);
        let mut far = Far::default();
        let network = spec.network.as_ref().map(|network| match network.backend {
            NetworkBackend::Tap => {
                let (near, tap) = UnixDatagram::pair().expect("sockets");
                tap.set_nonblocking(true).expect("a socket");
                far.tap = Some(tap);
                near.into()
            }
            NetworkBackend::Passt => {
                let (near, passt) = UnixStream::pair().expect("sockets");
                passt.set_nonblocking(true).expect("a socket");
                far.passt = Some(passt);
                near.into()
            }
        });
        let mut socket = || {
            let (near, emulator) = UnixStream::pair().expect("sockets");
            far._tpm.push(emulator);
            near
        };
        let tpm = spec.switches.tpm.then(|| EmulatorSockets { control: socket(), commands: socket() });
        let files = DeviceFiles {
            disks: spec.disks.iter().map(|_| file(DISK_BYTES)).collect(),
            cd: spec.cd.then(|| file(DISK_BYTES)),
            network: network.into_iter().collect(),
            vsock: None,
            tpm,
            vga_rom: Some(vec![0x55; 512]),
            network_rom: None,
            flash: device
                .memory
                .as_ref()
                .filter(|_| device.extra == Extra::Flash)
                .map(|at| (file(FLASH_BYTES), Gpa(at.start))),
        };
        let listeners = Listeners {
            host_fault: Arc::new(|_| ()),
            addresses: Arc::new(|_| ()),
            panic: Arc::new(|_| ()),
            agent: Arc::new(|| ()),
            watchdog: Arc::new(|| ()),
        };
        let facts = MachineFacts {
            cpus: spec.cpus,
            topology: Topology::of(&spec),
            memory_bytes: RAM_BYTES,
            name: "fuzz".into(),
            uuid: [7; 16],
            generation: [9; 16],
            pm_base: layout::PM_BASE,
            pci_memory_64: pci_memory_64(RAM_BYTES, 40),
            tpm: spec.switches.tpm,
            boot_order: Vec::new(),
            first_boot: None,
        };
        let board: Arc<dyn Board> = Arc::new(Nobody);
        let log = GuestLog::new(file(0));
        let devices = Devices::new(&board, &ram, &spec, &facts, files, &listeners, &log).expect("devices");
        let usb_input = match device.extra {
            Extra::Usb => Some(add_usb(&devices, &ram)),
            Extra::Vsock => {
                far.vsock = Some(add_vsock(&devices, &ram));
                None
            }
            Extra::Nothing | Extra::Cd | Extra::Flash | Extra::Gpu | Extra::Keyboard | Extra::Tpm => None,
        };
        assign::assign(&mut devices.pci.lock().expect("nobody panicked"));
        if device.extra == Extra::Tpm {
            // Its worker waits for the machine to go on.
            devices.release();
        }
        Machine { devices, ram, usb_input, far }
    }

    /// A program of the host connects to the guest and says `bytes`, or one that is connected does.
    pub(crate) fn knock(&self, bytes: &[u8]) {
        let mut streams = self.far.streams.lock().expect("nobody panicked");
        let which = bytes.first().map_or(0, |byte| usize::from(*byte & 7));
        if let Some(at) = self.far.vsock.as_ref().filter(|_| streams.get(which).is_none()) {
            if let Ok(stream) = UnixStream::connect_addr(at) {
                let _ = stream.set_nonblocking(true);
                streams.push(stream);
            }
        }
        if let Some(stream) = streams.get_mut(which) {
            let _ = stream.write(bytes.get(1..).unwrap_or_default());
        }
    }

    /// One of them is gone.
    pub(crate) fn hang_up(&self, which: u8) {
        let mut streams = self.far.streams.lock().expect("nobody panicked");
        if !streams.is_empty() {
            let which = usize::from(which) % streams.len();
            streams.swap_remove(which);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.devices.close();
        // The bus has these ports, and they have the bus. In the product both live as long as the process.
        self.devices.pio.unmap(layout::PCI_CONFIG.start);
        self.devices.pio.unmap(layout::PCI_CONFIG.start + 4);
    }
}

fn add_usb(devices: &Devices, ram: &GuestRam) -> UsbInput {
    let backend = RawFile::new(file(DISK_BYTES), false).expect("a disk");
    let disks = vec![UsbDisk { serial: "fuzz".into(), backend }];
    let plugged = UsbDevices { keyboard: true, tablet: true, disks };
    let mut root = devices.pci.lock().expect("nobody panicked");
    let made = xhci::add(&mut root, IrqLine::unconnected(), ram.clone(), plugged, &(Arc::new(|_| ()) as _));
    let input = made.expect("a controller").lock().expect("nobody panicked").input();
    input
}

fn add_vsock(devices: &Devices, ram: &GuestRam) -> SocketAddr {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let name = format!("innkeeper-fuzz-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    let at = SocketAddr::from_abstract_name(name).expect("a name");
    let listener = UnixListener::bind_addr(&at).expect("a socket");
    let vsock = Vsock::new(CID, listener).expect("a device");
    let vectors = VirtioPci::vectors(&vsock);
    let mut root = devices.pci.lock().expect("nobody panicked");
    let (at_slot, ram) = (DevFn::new(slot::VSOCK, 0), ram.clone());
    root.try_add(at_slot, IrqLine::unconnected(), vectors, |wiring| VirtioPci::new(vsock, ram, &wiring))
        .expect("a device");
    at
}
