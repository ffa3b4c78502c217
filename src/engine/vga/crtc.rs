//! The CRT controller's part of a picture: which address of the planes each character clock of each line shows (IBM VGA
//! Technical Reference, "CRT controller registers").
//!
//! A counter begins at the start address and rises by one with each character clock; a new row of cells begins `offset` further on.
//! What reaches the planes is the counter, shifted in word and doubleword modes, with two bits that CGA modes take from the row.

use super::{dispi::HEIGHT_MAX, registers::Registers};

/// The registers, read once for a picture.
pub(super) struct Crtc {
    height: usize,
    start: u16,
    offset: u16,
    /// Lines of the picture that a row of cells or pixels takes, before each is repeated.
    rows: usize,
    /// "Preset row scan": the line of the first row that the picture begins with.
    first_row: usize,
    /// How often each line is shown.
    repeat: usize,
    /// Lines after this one begin again at address 0 ("line compare").
    split: usize,
    byte_pan: u16,
    dot_pan: usize,
    pans_below_split: bool,
    unit: Unit,
    /// Address bits 13 and 14 are bits 0 and 1 of the row.
    row_bits: [bool; 2],
}

/// How the counter becomes an address.
enum Unit {
    Byte,
    /// Doubled; bit 0 is bit `carry` of the counter.
    Word {
        carry: u32,
    },
    /// Times four; bits 0 and 1 are bits 14 and 15 of the counter.
    Doubleword,
}

/// Where one line of the picture begins.
pub(super) struct Line {
    pub(super) counter: u16,
    /// Which line of its row of cells it is, 0 to 31.
    pub(super) row: usize,
    /// How many dots of the first character clock are left of the picture.
    pub(super) pan: usize,
}

impl Crtc {
    /// `dot_pan` is how many dots to the left the attribute controller moves the picture.
    pub(super) fn new(registers: &Registers, dot_pan: usize) -> Crtc {
        let crtc = &registers.crtc;
        let bit = |register: usize, bit: u32, place: u32| usize::from(crtc[register] >> bit & 1) << place;
        // "Horizontal retrace select": the vertical counters, which end the display and split it, count every other line.
        let lines = if crtc[0x17] & 4 != 0 { 2 } else { 1 };
        let display_end = usize::from(crtc[0x12]) | bit(7, 1, 8) | bit(7, 6, 9);
        let line_compare = usize::from(crtc[0x18]) | bit(7, 4, 8) | bit(9, 6, 9);
        Crtc {
            height: (lines * (display_end + 1)).min(usize::from(HEIGHT_MAX)),
            start: u16::from_be_bytes([crtc[0xc], crtc[0xd]]),
            offset: 2 * u16::from(crtc[0x13]),
            rows: usize::from(crtc[9] & 0x1f) + 1,
            first_row: usize::from(crtc[8] & 0x1f),
            repeat: if crtc[9] & 0x80 != 0 { 2 } else { 1 },
            split: lines * (line_compare + 1) - 1,
            byte_pan: u16::from(crtc[8] >> 5 & 3),
            dot_pan,
            pans_below_split: registers.attribute[0x10] & 0x20 == 0,
            unit: if crtc[0x14] & 0x40 != 0 {
                Unit::Doubleword
            } else if crtc[0x17] & 0x40 == 0 {
                Unit::Word { carry: if crtc[0x17] & 0x20 != 0 { 15 } else { 13 } }
            } else {
                Unit::Byte
            },
            row_bits: [crtc[0x17] & 1 == 0, crtc[0x17] & 2 == 0],
        }
    }

    /// "Vertical display end", with all its bits, and one more.
    pub(super) fn height(&self) -> usize {
        self.height
    }

    pub(super) fn line(&self, y: usize) -> Line {
        let below = y > self.split;
        let (start, line) = if below {
            (0, (y - self.split - 1) / self.repeat)
        } else {
            (self.start, self.first_row + y / self.repeat)
        };
        let pans = !below || self.pans_below_split;
        let row_start = start.wrapping_add(self.offset.wrapping_mul((line / self.rows) as u16));
        Line {
            counter: row_start.wrapping_add(if pans { self.byte_pan } else { 0 }),
            row: line % self.rows,
            pan: if pans { self.dot_pan } else { 0 },
        }
    }

    /// The address, 0 to 0xffff, that the planes see.
    pub(super) fn address(&self, counter: u16, row: usize) -> usize {
        let counter = usize::from(counter);
        let mut address = match self.unit {
            Unit::Byte => counter,
            Unit::Word { carry } => counter << 1 | counter >> carry & 1,
            Unit::Doubleword => counter << 2 | counter >> 14 & 3,
        };
        for (index, from_row) in self.row_bits.into_iter().enumerate() {
            if from_row {
                address = address & !(1 << (13 + index)) | (row >> index & 1) << (13 + index);
            }
        }
        address & 0xffff
    }
}
