//! What the machine boots from, in the terms of its buses: where each disk of a specification is plugged in.

use super::CD_PORT;
use crate::{
    engine::{
        facts::{BootDevice, FirstBoot},
        layout::slot,
    },
    spec::{self, BootFrom, DiskBus, GuestSpec},
};

/// First to last.
pub fn boot_order(spec: &GuestSpec) -> Vec<BootDevice> {
    spec.full_boot_order().iter().filter_map(|from| boot_device(spec, from)).collect()
}

/// What the first boot does otherwise.
pub fn first_boot(spec: &GuestSpec) -> Option<FirstBoot> {
    match spec.first_boot.as_ref()? {
        spec::FirstBoot::Setup => Some(FirstBoot::Menu),
        spec::FirstBoot::From(from) => {
            let mut order = boot_order(spec);
            let wanted = boot_device(spec, from)?;
            order.retain(|device| *device != wanted);
            order.insert(0, wanted);
            Some(FirstBoot::From(order))
        }
    }
}

/// Where the machine has it; `None` when it has it not.
fn boot_device(spec: &GuestSpec, from: &BootFrom) -> Option<BootDevice> {
    let wanted = match from {
        BootFrom::Cd => return Some(BootDevice::AhciCd { port: CD_PORT }),
        BootFrom::Network => return spec.network.as_ref().map(|_| BootDevice::Network { slot: slot::NETWORK }),
        BootFrom::Disk(id) => id,
    };
    let (mut port, mut number) = (0, 1);
    for (disk, slot) in spec.disks.iter().zip(spec.disk_slots()) {
        let device = match (disk.bus, slot) {
            (DiskBus::Virtio, Some(slot)) => Some(BootDevice::VirtioDisk { slot }),
            (DiskBus::Nvme, Some(slot)) => Some(BootDevice::NvmeDisk { slot }),
            (DiskBus::Virtio | DiskBus::Nvme, None) => None,
            (DiskBus::Ahci, _) => Some(BootDevice::AhciDisk { port }),
            (DiskBus::Usb, _) => Some(BootDevice::UsbDisk { number }),
        };
        if disk.id == *wanted {
            return device;
        }
        match disk.bus {
            DiskBus::Virtio | DiskBus::Nvme => {}
            DiskBus::Ahci => port += 1,
            DiskBus::Usb => number += 1,
        }
    }
    None
}
