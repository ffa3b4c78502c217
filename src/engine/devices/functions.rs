//! Puts PCI functions on the bus, at power on and while the guest runs, and keeps the machine's hold on what they do by themselves.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use super::{Listeners, lock};
use crate::{
    engine::{
        addresses::AddressWatch,
        ahci::{Ahci, AhciDisk, AhciIo, CdTray},
        chipset::PirqRouter,
        disk::RawFile,
        e1000::{E1000, E1000Io},
        fault::HostFaults,
        irq::IrqLine,
        layout::{self, slot},
        memory::GuestRam,
        net_backend::NetBackend,
        nvme::{self, Nvme, NvmeDisk, NvmeIo},
        pci::{
            DevFn, PciFunction,
            root::{PciRoot, Wiring},
        },
        rate_limit::RateLimits,
        timer::Clock,
        vga::VgaFunction,
        virtio::{
            VirtioDevice, Worker,
            block::{Block, BlockOptions},
            gpu::{Gpu, VgaCard},
            input::{Keyboard, KeyboardInput},
            net::{Net, NetLink, NetParts},
            pci::VirtioPci,
        },
        watchdog::{Watchdog, WatchdogHold},
        xhci::{self, UsbDevices, UsbDisk, UsbInput, XhciIo},
    },
    spec::{DiskBus, DiskSpec, GuestSpec, NetworkModel, NetworkSpec},
    types::Id,
};

/// What functions are made with, and the I/O of those that come and go by slot.
pub(super) struct Functions {
    pci: Arc<Mutex<PciRoot>>,
    router: PirqRouter,
    ram: GuestRam,
    cpus: u32,
    listeners: Listeners,
    /// With the slot of the function.
    io: Vec<(u8, FunctionIo)>,
    /// Of the disks on virtio, by slot and id.
    limits: Vec<(u8, Id, RateLimits)>,
    /// When the guest has a virtio card.
    link: Option<NetLink>,
}

/// The machine's hold on the I/O of a function.
enum FunctionIo {
    Virtio(Worker),
    Nvme(NvmeIo),
    E1000(E1000Io),
}

impl FunctionIo {
    /// Returns when no I/O is in flight.
    fn hold(&self) {
        match self {
            FunctionIo::Virtio(worker) => worker.hold(),
            FunctionIo::Nvme(controller) => controller.hold(),
            FunctionIo::E1000(card) => card.quiesce(),
        }
    }

    fn release(&self) {
        match self {
            FunctionIo::Virtio(worker) => worker.release(),
            FunctionIo::Nvme(controller) => controller.release(),
            FunctionIo::E1000(card) => card.resume(),
        }
    }

    /// Returns when its thread has ended and the host's ends of it are closed.
    fn end(&self) {
        match self {
            FunctionIo::Virtio(worker) => worker.end(),
            FunctionIo::Nvme(controller) => controller.end(),
            FunctionIo::E1000(card) => card.end(),
        }
    }
}

impl Functions {
    pub(super) fn new(
        pci: &Arc<Mutex<PciRoot>>,
        router: &PirqRouter,
        ram: &GuestRam,
        cpus: u32,
        listeners: &Listeners,
    ) -> Functions {
        let (pci, router, ram) = (Arc::clone(pci), router.clone(), ram.clone());
        Functions {
            pci,
            router,
            ram,
            cpus,
            listeners: listeners.clone(),
            io: Vec::new(),
            limits: Vec::new(),
            link: None,
        }
    }

    /// Returns when no I/O is in flight.
    pub(super) fn hold(&self) {
        self.io.iter().for_each(|(_, io)| io.hold());
    }

    pub(super) fn release(&self) {
        self.io.iter().for_each(|(_, io)| io.release());
    }

    /// Whether there is nothing in `slot`.
    pub(super) fn is_free(&self, slot: u8) -> bool {
        !lock(&self.pci).has(DevFn::new(slot, 0))
    }

    /// Takes out what is in `slot`: it is off the bus, its threads have ended and its descriptors are closed when this returns. Every
    /// vCPU is parked.
    pub(super) fn remove(&mut self, slot: u8) {
        lock(&self.pci).remove(DevFn::new(slot, 0));
        for (_, io) in self.io.extract_if(.., |(at, _)| *at == slot) {
            io.end();
        }
        self.limits.retain(|(at, ..)| *at != slot);
        if slot == slot::NETWORK {
            self.link.take().inspect(NetLink::close);
        }
    }

    /// How much the guest may ask of that disk, when it is on virtio.
    pub(super) fn limits(&self, disk: &Id) -> Option<&RateLimits> {
        self.limits.iter().find(|(_, id, _)| id == disk).map(|(.., limits)| limits)
    }

    /// The host's hold on the guest's virtio card.
    pub(super) fn link(&self) -> Option<&NetLink> {
        self.link.as_ref()
    }

    /// The graphics card: a VGA, which is a virtio card as well when the guest has one.
    pub(super) fn add_display(&mut self, vga: VgaFunction, gpu: Option<Gpu>) -> io::Result<()> {
        let Some(gpu) = gpu else {
            lock(&self.pci).add(DevFn::new(slot::VGA, 0), IrqLine::unconnected(), 0, |_| vga);
            return Ok(());
        };
        self.add_with_workers(slot::VGA, gpu, |gpu, ram, wiring| {
            Ok(VgaCard::new(vga, VirtioPci::new(gpu, ram, wiring)?))
        })
    }

    pub(super) fn add_virtio<D: VirtioDevice + 'static>(&mut self, slot: u8, device: D) -> io::Result<()> {
        self.add_with_workers(slot, device, VirtioPci::new)
    }

    fn add_with_workers<D: VirtioDevice + 'static, F: PciFunction + 'static>(
        &mut self,
        slot: u8,
        device: D,
        make: impl FnOnce(D, GuestRam, &Wiring) -> io::Result<F>,
    ) -> io::Result<()> {
        let workers = device.workers().to_vec();
        let vectors = VirtioPci::vectors(&device);
        let (irq, ram) = (self.irq(slot), self.ram.clone());
        let added = lock(&self.pci).try_add(DevFn::new(slot, 0), irq, vectors, |wiring| make(device, ram, &wiring));
        if let Err(error) = added {
            // Nobody else would.
            workers.iter().for_each(Worker::end);
            return Err(error);
        }
        self.io.extend(workers.into_iter().map(|worker| (slot, FunctionIo::Virtio(worker))));
        Ok(())
    }

    pub(super) fn add_keyboard(&mut self) -> io::Result<KeyboardInput> {
        let keyboard = Keyboard::new()?;
        let input = keyboard.input();
        self.add_virtio(slot::KEYBOARD, keyboard)?;
        Ok(input)
    }

    pub(super) fn add_watchdog(&mut self) -> io::Result<WatchdogHold> {
        let at = DevFn::new(slot::WATCHDOG, 0);
        let bite = Arc::clone(&self.listeners.watchdog);
        let made = lock(&self.pci)
            .try_add(at, IrqLine::unconnected(), 0, |_| Watchdog::new(Clock::monotonic(), move || bite()))?;
        let hold = lock(&made).hold();
        Ok(hold)
    }

    /// A controller, when there is something for it: keyboard and tablet as the guest wants them, disks.
    pub(super) fn add_usb(
        &mut self,
        input: bool,
        disks: Vec<UsbDisk>,
    ) -> io::Result<(Option<XhciIo>, Option<UsbInput>)> {
        if !input && disks.is_empty() {
            return Ok((None, None));
        }
        let devices = UsbDevices { keyboard: input, tablet: input, disks };
        let irq = self.irq(slot::XHCI);
        let made = xhci::add(&mut lock(&self.pci), irq, self.ram.clone(), devices, &self.listeners.host_fault)?;
        let controller = lock(&made);
        Ok((Some(controller.io()), Some(controller.input())))
    }

    fn add_nvme(&mut self, slot: u8, disk: NvmeDisk) -> io::Result<()> {
        let (irq, ram) = (self.irq(slot), self.ram.clone());
        let report = Arc::clone(&self.listeners.host_fault);
        let controller = lock(&self.pci)
            .try_add(DevFn::new(slot, 0), irq, nvme::VECTORS, |wiring| Nvme::new(ram, &wiring, disk, report))?;
        let io = FunctionIo::Nvme(lock(&controller).io());
        self.io.push((slot, io));
        Ok(())
    }

    /// `links` are the queues of a tap, with a `/dev/vhost-net` for each or none, or one socket; not empty, and the first is no vhost.
    pub(super) fn add_network(&mut self, network: &NetworkSpec, mut links: Vec<OwnedFd>) -> io::Result<()> {
        let watch = AddressWatch::new(Arc::clone(&self.listeners.addresses));
        match network.model {
            NetworkModel::Virtio => {
                let parts = NetParts { backend: network.backend, links, mac: network.mac, mtu: None, watch };
                let card = Net::new(parts)?;
                let link = card.link();
                self.add_virtio(slot::NETWORK, card)?;
                self.link = Some(link);
                Ok(())
            }
            NetworkModel::E1000 => {
                // The card has one pair of queues.
                let backend = NetBackend::new(links.swap_remove(0), network.backend, watch)?;
                let (irq, ram, mac) = (self.irq(slot::NETWORK), self.ram.clone(), network.mac);
                let card = lock(&self.pci).try_add(DevFn::new(slot::NETWORK, 0), irq, 0, |wiring| {
                    E1000::new(ram, wiring.irq, backend, mac)
                })?;
                let io = FunctionIo::E1000(lock(&card).io());
                self.io.push((slot::NETWORK, io));
                Ok(())
            }
        }
    }

    /// A disk with a function of its own.
    pub(super) fn add_disk(&mut self, slot: u8, disk: &DiskSpec, file: File) -> io::Result<()> {
        let backend = RawFile::new(file, disk.read_only)?;
        let serial = disk.id.to_string();
        match disk.bus {
            DiskBus::Virtio => {
                let limits = RateLimits::new(disk.limit)?;
                let options = BlockOptions {
                    serial: &serial,
                    queues: u16::try_from(self.cpus).unwrap_or(u16::MAX),
                    limits: limits.clone(),
                    faults: Arc::clone(&self.listeners.host_fault),
                };
                self.add_virtio(slot, Block::new(backend, options)?)?;
                self.limits.push((slot, disk.id.clone(), limits));
                Ok(())
            }
            DiskBus::Nvme => self.add_nvme(slot, NvmeDisk { serial, backend }),
            DiskBus::Ahci | DiskBus::Usb => Err(io::Error::other("a disk on this bus has no slot")),
        }
    }

    /// All disks and the CD drive. Gives the hold on the HBA, and the disks that belong behind a USB controller.
    pub(super) fn add_storage(
        &mut self,
        spec: &GuestSpec,
        files: Vec<File>,
        tray: &CdTray,
        faults: &HostFaults,
    ) -> io::Result<(AhciIo, Vec<UsbDisk>)> {
        let (mut ahci_disks, mut usb_disks) = (Vec::new(), Vec::new());
        for ((disk, slot), file) in spec.disks.iter().zip(spec.disk_slots()).zip(files) {
            if let Some(slot) = slot {
                self.add_disk(slot, disk, file)?;
                continue;
            }
            let (serial, backend) = (disk.id.to_string(), RawFile::new(file, disk.read_only)?);
            match disk.bus {
                DiskBus::Usb => usb_disks.push(UsbDisk { serial, backend }),
                _ => ahci_disks.push(AhciDisk { serial, backend }),
            }
        }
        let (irq, ram, tray) = (self.irq(slot::AHCI), self.ram.clone(), tray.clone());
        let ahci = lock(&self.pci).try_add(DevFn::new(slot::AHCI, 0), irq, 0, |wiring| {
            Ahci::new(ram, wiring.irq, ahci_disks, tray, faults)
        })?;
        let io = lock(&ahci).io();
        Ok((io, usb_disks))
    }

    /// The line behind INTA of a slot.
    fn irq(&self, slot: u8) -> IrqLine {
        self.router.join(layout::pirq(slot, 1))
    }
}
