//! All targets: what each machine has, and which part of it is driven.

use std::ops::Range;

use crate::{
    drivers::Driver,
    engine::layout::{self, slot},
    messages,
    spec::{DiskBus, NetworkBackend, NetworkModel, Watchdog},
};

pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) what: What,
}

pub(crate) enum What {
    /// Bytes are actions upon a device; see `bench.rs`.
    Device(Device),
    /// Bytes are what a client sends.
    Bytes(fn(&[u8])),
}

/// A part of the machine, and what the machine has for it.
#[derive(Clone)]
pub(crate) struct Device {
    /// Where its PCI function is: slot and function.
    pub(crate) function: Option<(u8, u8)>,
    pub(crate) ports: &'static [Range<u64>],
    pub(crate) memory: Option<Range<u64>>,
    pub(crate) driver: Driver,
    pub(crate) disk: Option<DiskBus>,
    pub(crate) network: Option<(NetworkModel, NetworkBackend)>,
    pub(crate) watchdog: Watchdog,
    pub(crate) extra: Extra,
}

/// What a machine from a specification has not, or not for every guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extra {
    Nothing,
    /// A medium in the CD drive.
    Cd,
    /// A flash chip with variables.
    Flash,
    /// Sockets on the host that the guest can connect to.
    Vsock,
    /// A USB disk beside keyboard and tablet.
    Usb,
    /// A graphics card.
    Gpu,
    /// A virtio keyboard.
    Keyboard,
    /// A TPM.
    Tpm,
}

const NOTHING: Device = Device {
    function: None,
    ports: &[],
    memory: None,
    driver: Driver::None,
    disk: None,
    network: None,
    watchdog: Watchdog::None,
    extra: Extra::Nothing,
};
const FLASH_AT: u64 = 0xffc0_0000;
const PM_PORTS: u64 = layout::PM_BASE as u64;

const fn target(name: &'static str, device: Device) -> Target {
    Target { name, what: What::Device(device) }
}
const fn pci(slot: u8, driver: Driver) -> Device {
    Device { function: Some((slot, 0)), driver, ..NOTHING }
}
const fn ports(ports: &'static [Range<u64>]) -> Device {
    Device { ports, ..NOTHING }
}
const fn bytes(name: &'static str, take: fn(&[u8])) -> Target {
    Target { name, what: What::Bytes(take) }
}

pub(crate) static TARGETS: &[Target] = &[
    target("virtio-pci", pci(slot::CONSOLE, Driver::None)),
    target("virtio-blk", Device { disk: Some(DiskBus::Virtio), ..pci(slot::DISK, Driver::Virtio) }),
    target(
        "virtio-net",
        Device { network: Some((NetworkModel::Virtio, NetworkBackend::Tap)), ..pci(slot::NETWORK, Driver::Virtio) },
    ),
    target("virtio-rng", pci(slot::RNG, Driver::Virtio)),
    target("virtio-balloon", pci(slot::BALLOON, Driver::Virtio)),
    target("virtio-console", pci(slot::CONSOLE, Driver::Virtio)),
    target("virtio-input", pci(slot::TABLET, Driver::Virtio)),
    target("virtio-keyboard", Device { extra: Extra::Keyboard, ..pci(slot::KEYBOARD, Driver::Virtio) }),
    target("virtio-vsock", Device { extra: Extra::Vsock, ..pci(slot::VSOCK, Driver::Virtio) }),
    target("virtio-gpu", Device { extra: Extra::Gpu, ..pci(slot::VGA, Driver::Virtio) }),
    target("ahci", Device { disk: Some(DiskBus::Ahci), extra: Extra::Cd, ..pci(slot::AHCI, Driver::Ahci) }),
    target("nvme", Device { disk: Some(DiskBus::Nvme), ..pci(slot::DISK, Driver::Nvme) }),
    target(
        "e1000",
        Device { network: Some((NetworkModel::E1000, NetworkBackend::Passt)), ..pci(slot::NETWORK, Driver::E1000) },
    ),
    target("xhci", Device { extra: Extra::Usb, ..pci(slot::XHCI, Driver::Xhci) }),
    target(
        "vga",
        Device {
            ports: &[layout::VGA, layout::DISPI, layout::VGA_MONO],
            memory: Some(layout::VGA_WINDOW),
            ..pci(slot::VGA, Driver::None)
        },
    ),
    target("watchdog", Device { watchdog: Watchdog::Reset, ..pci(slot::WATCHDOG, Driver::None) }),
    target("pci", Device { ports: &[layout::PCI_CONFIG], ..pci(slot::PIIX, Driver::None) }),
    target(
        "pm",
        Device { function: Some((slot::PIIX, 3)), ports: &[PM_PORTS..PM_PORTS + 0x40, layout::GPE0], ..NOTHING },
    ),
    target("tpm", Device { memory: Some(layout::TPM), extra: Extra::Tpm, ..NOTHING }),
    target("uart", ports(&[layout::COM1])),
    target("i8042", ports(&[layout::I8042, layout::I8042_COMMAND, layout::PORT_92])),
    target("cmos", ports(&[layout::CMOS])),
    target("fw-cfg", Device { driver: Driver::FwCfg, ..ports(&[layout::FW_CFG]) }),
    target(
        "flash",
        Device { memory: Some(FLASH_AT..FLASH_AT + crate::machine::FLASH_BYTES), extra: Extra::Flash, ..NOTHING },
    ),
    target(
        "small-ports",
        ports(&[layout::DEBUG_CONSOLE, layout::PANIC, layout::RESET_CONTROL..layout::RESET_CONTROL + 1]),
    ),
    bytes("saved-file", messages::saved_file),
    bytes("rfb", messages::rfb),
    bytes("wire", messages::wire),
    bytes("agent", messages::agent),
];
