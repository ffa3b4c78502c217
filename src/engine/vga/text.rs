//! Character cells of text modes: a character in plane 0, its attribute in plane 1, fonts in plane 2 (IBM VGA Technical Reference,
//! alphanumeric modes).

use std::time::Duration;

use super::{planes::Planes, registers::Registers, render::colors16};

/// How a row of dots of a cell is drawn.
pub(super) struct Text {
    cursor: Option<Cursor>,
    /// Where in plane 2 the shapes are for attribute bit 3 off and on; 32 bytes a character.
    fonts: [usize; 2],
    colors: [u32; 16],
    /// Attribute bit 7 has the character blink instead of making its background bright.
    blinking: bool,
    /// Characters 0xc0 to 0xdf reach into the ninth dot.
    line_graphics: bool,
    underline_row: Option<usize>,
    lit: Blink,
}

struct Cursor {
    counter: u16,
    first_row: usize,
    last_row: usize,
}

/// Which of the things that blink are lit at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blink {
    cursor: bool,
    characters: bool,
}

/// The cursor changes every 16 frames of 70 Hz, characters half as often.
const CURSOR_MS: u128 = 16 * 1000 / 70;

impl Blink {
    /// All is lit, for a picture that stands still.
    pub(crate) const LIT: Blink = Blink { cursor: true, characters: true };

    /// At that time since some start.
    pub(crate) fn at(time: Duration) -> Blink {
        let changes = time.as_millis() / CURSOR_MS;
        Blink { cursor: changes & 1 == 0, characters: changes & 2 == 0 }
    }
}

impl Text {
    pub(super) fn new(registers: &Registers, lit: Blink) -> Text {
        let (crtc, attribute) = (&registers.crtc, &registers.attribute);
        // "Character map select": three bits each, of which the last stands apart and counts 8 KiB, the others 16.
        let map = usize::from(registers.sequencer[3]);
        let font = |high: usize, low: usize| (map >> high & 3) << 14 | (map >> low & 1) << 13;
        Text {
            cursor: (crtc[0xa] & 0x20 == 0).then(|| Cursor {
                // The skew moves it to the right.
                counter: u16::from_be_bytes([crtc[0xe], crtc[0xf]]).wrapping_add(u16::from(crtc[0xb] >> 5 & 3)),
                first_row: usize::from(crtc[0xa] & 0x1f),
                last_row: usize::from(crtc[0xb] & 0x1f),
            }),
            fonts: [font(0, 4), font(2, 5)],
            colors: colors16(registers),
            blinking: attribute[0x10] & 8 != 0,
            line_graphics: attribute[0x10] & 4 != 0,
            underline_row: (attribute[0x10] & 2 != 0).then_some(usize::from(crtc[0x14] & 0x1f)),
            lit,
        }
    }

    /// Draws one row of the cell at `counter`, of which the planes hold `cell`. `dots` is as wide as a cell, 8 or 9.
    pub(super) fn draw(&self, planes: &Planes, counter: u16, row: usize, cell: [u8; 4], dots: &mut [u32]) {
        let [character, attribute, ..] = cell;
        let font = self.fonts[usize::from(attribute >> 3 & 1)];
        let [_, _, shape, _] = planes.get(font + 32 * usize::from(character) + row);
        // Leftmost dot in bit 8, the ninth in bit 0.
        let mut bits = u16::from(shape) << 1;
        if self.line_graphics && (0xc0..0xe0).contains(&character) {
            bits |= bits >> 1 & 1;
        }
        if self.underline_row == Some(row) && attribute & 7 == 1 {
            bits = 0x1ff;
        }
        if self.blinks(attribute) && !self.lit.characters {
            bits = 0;
        }
        if self.lit.cursor && self.under_cursor(counter, row) {
            bits = 0x1ff;
        }
        let back = attribute >> 4 & if self.blinking { 7 } else { 15 };
        let colors = [self.colors[usize::from(back)], self.colors[usize::from(attribute & 15)]];
        for (dot, out) in dots.iter_mut().enumerate() {
            *out = colors[usize::from(bits >> (8 - dot.min(8)) & 1)];
        }
    }

    /// Whether that row of the cell changes when something is lit or goes dark.
    pub(super) fn changes(&self, counter: u16, row: usize, cell: [u8; 4]) -> bool {
        self.blinks(cell[1]) || self.under_cursor(counter, row)
    }

    fn blinks(&self, attribute: u8) -> bool {
        self.blinking && attribute & 0x80 != 0
    }

    fn under_cursor(&self, counter: u16, row: usize) -> bool {
        self.cursor
            .as_ref()
            .is_some_and(|cursor| cursor.counter == counter && (cursor.first_row..=cursor.last_row).contains(&row))
    }
}
