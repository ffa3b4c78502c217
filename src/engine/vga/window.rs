//! The window at 0xa0000: how the graphics controller lets a processor reach four planes (IBM VGA Technical Reference).
//!
//! Byte `p` of the four bytes at `4 * n` is address `n` of plane `p`. Text, planar and 256-colour modes all fall out of that. As on
//! the cards of the time, odd/even modes reach every other address of their planes and chained ones every fourth; the CRT
//! controller, in word and doubleword mode, shows the same.

use super::{
    VRAM_BYTES,
    dispi::{DispiMode, PixelLayout},
    registers::Registers,
};
use crate::engine::memory::HostRegion;

/// The size of each of the four planes of VGA modes.
pub(super) const PLANE_BYTES: usize = 64 << 10;

/// What a byte of the window stands for.
enum Target {
    /// One byte of video memory.
    Byte(usize),
    /// The four bytes from here on, of which `planes` (a bit each) can be written and plane `read` is read.
    Planes { at: usize, planes: u8, read: u8 },
}

/// Reads the byte at `offset` from 0xa0000. The latches take the four bytes at that address.
pub(super) fn read(registers: &Registers, latches: &mut u32, vram: &HostRegion, offset: usize) -> u8 {
    match target(registers, offset, false) {
        None => 0xff,
        Some(Target::Byte(at)) => vram.get(at),
        Some(Target::Planes { at, read, .. }) => {
            *latches = get(vram, at);
            if registers.graphics[5] & 0x08 == 0 {
                (*latches >> (8 * u32::from(read & 3))) as u8
            } else {
                // Read mode 1: which pixels have the colour to compare with, in the planes that count.
                let differ = (*latches ^ spread(registers.graphics[2])) & spread(registers.graphics[7]);
                !differ.to_le_bytes().into_iter().fold(0, |all, plane| all | plane)
            }
        }
    }
}

/// Writes the byte at `offset` from 0xa0000. Returns which bytes of video memory may have changed: where, and how many.
pub(super) fn write(
    registers: &Registers,
    latches: u32,
    vram: &HostRegion,
    offset: usize,
    value: u8,
) -> Option<(usize, usize)> {
    match target(registers, offset, true)? {
        Target::Byte(at) => {
            vram.set(at, value);
            Some((at, 1))
        }
        Target::Planes { at, planes, .. } => {
            let planes = spread(planes & registers.sequencer[2]);
            if planes == 0 {
                return None;
            }
            let new = through_the_pipeline(&registers.graphics, latches, value);
            vram.write(at, &(get(vram, at) & !planes | new & planes).to_le_bytes());
            Some((at, 4))
        }
    }
}

/// What the four planes get when the processor writes `value` (the four write modes).
fn through_the_pipeline(graphics: &[u8; 9], latches: u32, value: u8) -> u32 {
    let rotated = value.rotate_right(u32::from(graphics[3] & 7));
    let set_reset = spread(graphics[0]);
    let (data, bits) = match graphics[5] & 3 {
        0 => {
            let enabled = spread(graphics[1]);
            (repeat(rotated) & !enabled | set_reset & enabled, graphics[8])
        }
        1 => return latches,
        2 => (spread(value), graphics[8]),
        _ => (set_reset, rotated & graphics[8]),
    };
    let combined = match graphics[3] >> 3 & 3 {
        0 => data,
        1 => data & latches,
        2 => data | latches,
        _ => data ^ latches,
    };
    let bits = repeat(bits);
    combined & bits | latches & !bits
}

fn target(registers: &Registers, offset: usize, write: bool) -> Option<Target> {
    // The planes of the display interface are larger, and its banks choose a part of them.
    let (bank, plane_bytes) = match registers.dispi.mode() {
        Some(DispiMode { pixels: PixelLayout::Planar, .. }) => (registers.dispi.bank_start(), VRAM_BYTES / 4),
        Some(_) => return (offset < 0x1_0000).then_some(Target::Byte(registers.dispi.bank_start() + offset)),
        None => (0, PLANE_BYTES),
    };
    // Where the window lies, "memory map" in the miscellaneous graphics register.
    let (offset, upper_half) = match registers.graphics[6] >> 2 & 3 {
        0 => (offset & 0xffff, offset >> 16 & 1),
        1 => (Some(offset).filter(|offset| *offset < 0x1_0000)?, 0),
        2 => (offset.checked_sub(0x1_0000).filter(|offset| *offset < 0x8000)?, 0),
        _ => (offset.checked_sub(0x1_8000)?, 0),
    };
    let read_map = registers.graphics[4];
    let chained4 = registers.sequencer[4] & 0x08 != 0;
    // Reads and writes have their own "odd/even" bits; programs set both.
    let odd_even = if write { registers.sequencer[4] & 0x04 == 0 } else { registers.graphics[5] & 0x10 != 0 };
    let (address, planes, read) = if chained4 {
        let plane = (offset & 3) as u8;
        (offset & !3, 1 << plane, plane)
    } else if odd_even {
        let odd = (offset & 1) as u8;
        // "Chain odd/even": address bit 0 chooses the planes, and what takes its place is the half of a window of 128 KiB. The
        // page bit of the miscellaneous output register, on which documents differ, counts as all modes set it.
        let address = if registers.graphics[6] & 2 != 0 { offset & !1 | upper_half } else { offset };
        (address, 0b0101 << odd, read_map & 2 | odd)
    } else {
        (offset, 0xf, read_map)
    };
    Some(Target::Planes { at: 4 * ((bank + address) % plane_bytes), planes, read })
}

fn get(vram: &HostRegion, at: usize) -> u32 {
    let mut bytes = [0; 4];
    vram.read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// One bit per plane becomes one byte per plane, all ones or all zeroes.
fn spread(planes: u8) -> u32 {
    (0..4).filter(|plane| planes >> plane & 1 != 0).fold(0, |all, plane| all | 0xff << (8 * plane))
}

/// The same byte for every plane.
fn repeat(byte: u8) -> u32 {
    u32::from(byte) * 0x0101_0101
}
