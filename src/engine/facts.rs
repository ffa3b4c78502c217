//! What firmware, tables and a direct boot are told about one machine. Every part that describes the machine reads it here.

use std::ops::Range;

use super::{layout, topology::Topology};

/// One machine, as its descriptions need it.
#[derive(Debug, Clone)]
pub struct MachineFacts {
    pub cpus: u32,
    pub topology: Topology,
    pub memory_bytes: u64,
    /// For SMBIOS; printable.
    pub name: String,
    /// For SMBIOS, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// The VM generation id at power on; see `generation.rs`.
    pub generation: [u8; 16],
    /// Where the PM block is now; the firmware may have moved it.
    pub pm_base: u16,
    /// Guest-physical addresses that 64-bit BARs may use; see `pci_memory_64`.
    pub pci_memory_64: Range<u64>,
    /// With a TPM behind `layout::TPM`.
    pub tpm: bool,
    /// First to last.
    pub boot_order: Vec<BootDevice>,
    /// What the boot after power on does otherwise than those after a reset.
    pub first_boot: Option<FirstBoot>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstBoot {
    /// In this order.
    From(Vec<BootDevice>),
    /// With enough time for the key that shows the firmware's menu.
    Menu,
}

/// Something the firmware can boot from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootDevice {
    VirtioDisk {
        slot: u8,
    },
    NvmeDisk {
        slot: u8,
    },
    /// `number` counts the USB 3 ports, from 1.
    UsbDisk {
        number: u8,
    },
    AhciDisk {
        port: u8,
    },
    AhciCd {
        port: u8,
    },
    Network {
        slot: u8,
    },
}

/// One stretch of the address map (ACPI 6.5, 15: types 1 and 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    pub start: u64,
    pub bytes: u64,
    pub usable: bool,
}

/// Firmware keeps its data here; so does a direct boot, though it leaves the area empty.
pub const EBDA: Range<u64> = 0x9_fc00..0xa_0000;
/// KVM's own pages, between the IOAPIC and the firmware.
const KVM_PAGES: Range<u64> = layout::KVM_IDENTITY_MAP..0xff00_0000;

impl MachineFacts {
    /// RAM below the PCI hole, and above 4 GiB.
    pub fn ram_split(&self) -> (u64, u64) {
        layout::split_ram(self.memory_bytes)
    }

    pub fn boots_from_cd_first(&self) -> bool {
        matches!(self.boot_order.first(), Some(BootDevice::AhciCd { .. }))
    }

    /// Where 32-bit BARs may be: both firmwares start at 2 GiB or at the end of RAM, whichever is higher.
    pub fn pci_memory_32(&self) -> Range<u64> {
        self.ram_split().0.max(0x8000_0000)..layout::PCI_MEMORY_32.end
    }

    /// The map that firmware starts from: whole RAM, and what nobody may use.
    pub fn firmware_map(&self) -> Vec<MapEntry> {
        let (low, high) = self.ram_split();
        let mut map = vec![MapEntry { start: 0, bytes: low, usable: true }, entry(KVM_PAGES, false)];
        if high > 0 {
            map.push(MapEntry { start: layout::HIGH_RAM_START, bytes: high, usable: true });
        }
        map
    }

    /// The map that a kernel gets without firmware, in ascending order.
    pub fn kernel_map(&self) -> Vec<MapEntry> {
        let (low, high) = self.ram_split();
        let mut map = vec![entry(0..EBDA.start.min(low), true), entry(EBDA, false), entry(layout::BIOS_AREA, false)];
        if low > layout::BIOS_AREA.end {
            map.push(entry(layout::BIOS_AREA.end..low, true));
        }
        map.push(entry(KVM_PAGES, false));
        if high > 0 {
            map.push(MapEntry { start: layout::HIGH_RAM_START, bytes: high, usable: true });
        }
        map
    }
}

fn entry(range: Range<u64>, usable: bool) -> MapEntry {
    MapEntry { start: range.start, bytes: range.end - range.start, usable }
}

/// The 64-bit PCI window of a guest whose CPUs have `physical_bits` address bits: from the first GiB border behind RAM to the
/// top. It holds whatever place a firmware chooses.
pub fn pci_memory_64(memory_bytes: u64, physical_bits: u32) -> Range<u64> {
    let (_, high) = layout::split_ram(memory_bytes);
    let start = (layout::HIGH_RAM_START + high).next_multiple_of(1 << 30);
    let end = 1u64 << physical_bits.clamp(36, 52);
    if start < end { start..end } else { start..start + (1 << 30) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two vCPUs, 512 MiB, one virtio disk, one CD.
    pub(crate) fn sample() -> MachineFacts {
        MachineFacts {
            cpus: 2,
            topology: Topology { sockets: 1, cores: 2, threads: 1 },
            memory_bytes: 512 << 20,
            name: "sample".into(),
            uuid: *b"\x12\x34\x56\x78\x9a\xbc\xde\xf0\x11\x22\x33\x44\x55\x66\x77\x88",
            generation: *b"the first time. ",
            pm_base: layout::PM_BASE,
            pci_memory_64: pci_memory_64(512 << 20, 40),
            tpm: false,
            boot_order: vec![BootDevice::VirtioDisk { slot: layout::slot::DISK }, BootDevice::AhciCd { port: 5 }],
            first_boot: None,
        }
    }

    #[test]
    fn maps_do_not_overlap_and_hold_all_ram() {
        for memory_bytes in [1 << 20, 512 << 20, 3 << 30, 8 << 30] {
            let facts = MachineFacts { memory_bytes, ..sample() };
            for map in [facts.firmware_map(), facts.kernel_map()] {
                let mut sorted = map.clone();
                sorted.sort_by_key(|entry| entry.start);
                for pair in sorted.windows(2) {
                    assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{pair:x?}");
                }
            }
            let usable: u64 = facts.firmware_map().iter().filter(|e| e.usable).map(|e| e.bytes).sum();
            assert_eq!(usable, memory_bytes);
        }
    }

    #[test]
    fn the_windows_are_behind_ram() {
        assert_eq!(pci_memory_64(1 << 30, 40), 0x1_0000_0000..1 << 40);
        assert_eq!(pci_memory_64(4 << 30, 40).start, 0x1_4000_0000);
        assert!(!pci_memory_64(1 << 40, 36).is_empty());
        assert_eq!(sample().pci_memory_32(), 0x8000_0000..0xfec0_0000);
    }
}
