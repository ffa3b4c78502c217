//! Every address of the machine, once. Guest-physical memory, port I/O, PCI slots, interrupt pins.
//!
//! ```text
//! guest-physical                                port I/O
//! 0000_0000  RAM                                0060 0064  i8042          0402  debug console
//! 000a_0000  VGA window (MMIO)                  0061       PIT (in KVM)   04d0  ELCR (in KVM)
//! 000c_0000  RAM: option ROMs, firmware         0070 0071  CMOS, RTC      0505  panic port
//! 0010_0000  RAM                                0092       A20, reset     0510  fw_cfg
//! c000_0000  end of low RAM, PCI memory         01ce-01d0  VBE dispi      0600  PM base (or b000)
//! fec0_0000  IOAPIC (in KVM)                    03c0-03df  VGA            0cf8  PCI configuration
//! fed4_0000  TPM
//! fee0_0000  local APIC (in KVM)                03f8-03ff  COM1           0cf9  reset
//!                                                                         ae00  PCI hot plug
//!                                                                         afe0  GPE0
//! ff..       firmware, its end at 4 GiB; below it the flash chip with UEFI variables (ffc0_0000 with OVMF of 4 MiB)
//! 1_0000_0000  the RAM above 3 GiB
//! ```

use std::ops::Range;

/// RAM below 4 GiB ends here at most; the rest continues at 4 GiB.
pub const LOW_RAM_END_MAX: u64 = 0xc000_0000;
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// The VGA window is never RAM.
pub const VGA_WINDOW: Range<u64> = 0xa_0000..0xc_0000;
pub const BIOS_AREA: Range<u64> = 0xe_0000..0x10_0000;
pub const PCI_MEMORY_32: Range<u64> = LOW_RAM_END_MAX..0xfec0_0000;
/// Where QEMU puts KVM's three task-state pages: clear of a 4 MiB flash.
pub const KVM_TSS: u64 = 0xfeff_d000;
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
pub const IOAPIC: u64 = 0xfec0_0000;
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Locality 0 of the TPM, of a guest that has one.
pub const TPM: Range<u64> = 0xfed4_0000..0xfed4_1000;

pub const I8042: Range<u64> = 0x60..0x61;
pub const I8042_COMMAND: Range<u64> = 0x64..0x65;
pub const CMOS: Range<u64> = 0x70..0x72;
pub const PORT_92: Range<u64> = 0x92..0x93;
pub const DISPI: Range<u64> = 0x1ce..0x1d1;
pub const VGA: Range<u64> = 0x3c0..0x3e0;
/// CRTC at its monochrome address.
pub const VGA_MONO: Range<u64> = 0x3b4..0x3bb;
pub const COM1: Range<u64> = 0x3f8..0x400;
pub const DEBUG_CONSOLE: Range<u64> = 0x402..0x403;
pub const PANIC: Range<u64> = 0x505..0x506;
pub const FW_CFG: Range<u64> = 0x510..0x51c;
pub const PCI_CONFIG: Range<u64> = 0xcf8..0xd00;
pub const RESET_CONTROL: u64 = 0xcf9;
pub const PCI_HOTPLUG: Range<u64> = 0xae00..0xae10;
pub const GPE0: Range<u64> = 0xafe0..0xafe4;
/// General-purpose event: a PCI slot was filled or shall be emptied. `\_GPE._E01` of our tables hears it.
pub const GPE_HOTPLUG: u8 = 1;
/// General-purpose event: the VM generation id is another. `\_GPE._E05` of our tables hears it.
pub const GPE_GENERATION: u8 = 5;
/// What our tables and a direct boot use; the firmware may choose another.
pub const PM_BASE: u16 = 0x600;

pub const IRQ_KEYBOARD: u32 = 1;
pub const IRQ_COM1: u32 = 4;
pub const IRQ_RTC: u32 = 8;
pub const IRQ_SCI: u32 = 9;
pub const IRQ_MOUSE: u32 = 12;
/// What both firmwares, our tables and a direct boot give to PIRQ A to D.
pub const PIRQ_GSI: [u8; 4] = [10, 10, 11, 11];

/// Device numbers on bus 0; a promise of the machine version.
pub mod slot {
    pub const HOST_BRIDGE: u8 = 0;
    pub const PIIX: u8 = 1;
    pub const VGA: u8 = 2;
    pub const AHCI: u8 = 3;
    pub const NETWORK: u8 = 4;
    pub const RNG: u8 = 5;
    pub const TABLET: u8 = 6;
    pub const CONSOLE: u8 = 7;
    /// The first disk with a function of its own, on virtio or NVMe; the others follow.
    pub const DISK: u8 = 8;
    pub const WATCHDOG: u8 = 16;
    pub const XHCI: u8 = 17;
    pub const BALLOON: u8 = 18;
    pub const VSOCK: u8 = 19;
    pub const KEYBOARD: u8 = 20;
    /// From here on: for what later releases put in while a guest runs. The tables know these slots already.
    pub const SPARE: u8 = 24;
    /// Slots that can be filled and emptied while a guest runs, a bit each: the card's, the eight for disks, and the spare ones.
    pub const PLUGGABLE: u32 = 1 << NETWORK | 0xff << DISK | 0xff << SPARE;
}

/// The PIRQ (0 to 3) behind interrupt pin `pin` (1 is INTA) of device `slot` (PIIX3 data sheet; swizzle of the PC machine).
pub fn pirq(slot: u8, pin: u8) -> usize {
    usize::from(slot.wrapping_add(3).wrapping_add(pin.wrapping_sub(1)) & 3)
}

/// How much RAM lies below the PCI hole, and how much above 4 GiB.
pub fn split_ram(memory_bytes: u64) -> (u64, u64) {
    let low = memory_bytes.min(LOW_RAM_END_MAX);
    (low, memory_bytes - low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec;

    #[test]
    fn pins_are_swizzled_as_the_tables_say() {
        assert_eq!(pirq(slot::PIIX, 1), 0);
        assert_eq!(pirq(2, 1), 1);
        assert_eq!(pirq(3, 1), 2);
        assert_eq!(pirq(4, 1), 3);
        assert_eq!(pirq(5, 1), 0);
        assert_eq!(pirq(1, 4), 3);
    }

    #[test]
    fn every_slot_for_a_disk_can_be_filled_and_emptied() {
        assert_eq!(spec::DISK_SLOTS.start, slot::DISK);
        assert!(spec::DISK_SLOTS.clone().all(|at| slot::PLUGGABLE & 1 << at != 0 && at != slot::WATCHDOG));
    }

    #[test]
    fn ram_above_the_hole_continues_at_4_gib() {
        assert_eq!(split_ram(1 << 30), (1 << 30, 0));
        assert_eq!(split_ram(4 << 30), (3 << 30, 1 << 30));
    }
}
