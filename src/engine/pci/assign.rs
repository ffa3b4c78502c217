//! What firmware does for PCI, for guests that start without one: places BARs, names interrupt lines, enables functions.

use std::ops::Range;

use super::{DevFn, root::PciRoot};
use crate::engine::{bus::Width, layout};

/// Ports for BARs, clear of everything fixed.
const IO_WINDOW: Range<u64> = 0xc000..0xff00;
/// Memory for 32-bit and 64-bit BARs alike; the last quarter below the IOAPIC.
const MEMORY_WINDOW: Range<u64> = 0xe000_0000..0xfe00_0000;
const COMMAND: u8 = 0x04;
const BAR_0: u8 = 0x10;
const INTERRUPT_LINE: u8 = 0x3c;
const INTERRUPT_PIN: u8 = 0x3d;
const ENABLE_ALL: u64 = 7;

/// Gives every function on bus 0 its addresses and its interrupt line.
pub fn assign(root: &mut PciRoot) {
    let (mut io, mut memory) = (IO_WINDOW.start, MEMORY_WINDOW.start);
    for at in (0..32).flat_map(|slot| (0..8).map(move |function| DevFn::new(slot, function))) {
        if root.read(at, 0, Width::B2) == 0xffff {
            continue;
        }
        let mut index = 0;
        while index < 6 {
            let register = BAR_0 + 4 * index;
            root.write(at, register, Width::B4, 0xffff_ffff);
            let probe = root.read(at, register, Width::B4);
            root.write(at, register, Width::B4, 0);
            index += 1;
            if probe == 0 {
                continue;
            }
            let (next, mask) = if probe & 1 != 0 { (&mut io, !3) } else { (&mut memory, !15) };
            let size = (!(probe & mask) & 0xffff_ffff) + 1;
            let start = next.next_multiple_of(size);
            *next = start + size;
            root.write(at, register, Width::B4, start);
            if probe & 7 == 4 {
                root.write(at, register + 4, Width::B4, 0);
                index += 1;
            }
        }
        let pin = root.read(at, INTERRUPT_PIN, Width::B1) as u8;
        if let Some(gsi) = (pin > 0).then(|| layout::PIRQ_GSI.get(layout::pirq(at.slot(), pin))).flatten() {
            root.write(at, INTERRUPT_LINE, Width::B1, u64::from(*gsi));
        }
        root.write(at, COMMAND, Width::B2, ENABLE_ALL);
    }
    chipset(root);
}

/// PIRQ routes, the PM block at its documented place, its interrupt.
fn chipset(root: &mut PciRoot) {
    let (isa, pm) = (DevFn::new(layout::slot::PIIX, 0), DevFn::new(layout::slot::PIIX, 3));
    root.write(isa, 0x60, Width::B4, u64::from(u32::from_le_bytes(layout::PIRQ_GSI)));
    root.write(pm, INTERRUPT_LINE, Width::B1, u64::from(layout::IRQ_SCI));
    root.write(pm, 0x40, Width::B4, u64::from(layout::PM_BASE) | 1);
    root.write(pm, 0x80, Width::B1, 1);
}
