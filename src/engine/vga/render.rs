//! Turns registers and video memory into lines of pixels.
//!
//! A [`ScanOut`] is what one look at the registers says; each line is then made by itself, so that a viewer redraws only lines
//! whose memory was written, and a screenshot needs no picture in memory.

use super::{
    DirtyPages, Registers,
    dispi::{PixelLayout, WIDTH_MAX},
};
use crate::engine::memory::HostRegion;

/// One frame, described. Pixels are 0x00RRGGBB.
pub(crate) struct ScanOut {
    width: usize,
    height: usize,
    content: Content,
    vram: HostRegion,
    /// The memory of one line, kept to be filled again.
    bytes: Vec<u8>,
}

enum Content {
    Blank,
    Text(Text),
    Raster(Raster),
}

/// Character cells (IBM VGA Technical Reference, alphanumeric modes).
struct Text {
    lines: Lines,
    columns: usize,
    cell_width: usize,
    /// Every dot twice: 40-column modes.
    doubled: bool,
    cursor: Option<Cursor>,
    /// Two character sets of 256 characters with 32 rows, for attribute bit 3 off and on.
    fonts: [Vec<u8>; 2],
    colors: [u32; 16],
    blink_instead_of_bright: bool,
    /// Characters 0xc0 to 0xdf reach into the ninth column.
    line_graphics: bool,
    underline_row: Option<usize>,
}

struct Cursor {
    cell: usize,
    first_row: usize,
    last_row: usize,
}

struct Raster {
    lines: Lines,
    line_bytes: usize,
    pixels: Pixels,
}

enum Pixels {
    /// Four planes, eight pixels in four bytes; each pixel `repeat` times.
    Planes {
        colors: [u32; 16],
        repeat: usize,
    },
    /// Two bits a pixel: four pixels of plane 0, then four of plane 1 (CGA).
    Pairs {
        colors: [u32; 16],
        repeat: usize,
    },
    /// A DAC index, `repeat` times.
    Indexes {
        colors: Vec<u32>,
        repeat: usize,
    },
    Rgb555,
    Rgb565,
    Rgb888,
    Xrgb8888,
}

/// Which memory a line comes from.
struct Lines {
    start: usize,
    stride_bytes: usize,
    /// How many lines of the screen one row of cells or pixels takes, before doubling.
    rows: usize,
    doubled: bool,
    /// Lines after this one start again at address 0 ("line compare").
    split: usize,
    /// For CGA modes: a row bit that replaces the address bit with this number.
    row_address_bits: [Option<u32>; 2],
}

/// What is shown while nothing is.
const BLANK_SIZE: (usize, usize) = (640, 400);

impl Lines {
    /// Where the row of line `y` starts, and which line of the row it is.
    fn at(&self, y: usize) -> (usize, usize) {
        let (start, y) = if y > self.split { (0, y - self.split - 1) } else { (self.start, y) };
        let y = if self.doubled { y / 2 } else { y };
        let row = y % self.rows;
        let mut at = start + y / self.rows * self.stride_bytes;
        for (row_bit, address_bit) in self.row_address_bits.iter().enumerate() {
            if let Some(bit) = address_bit {
                at = at & !(1 << bit) | (row >> row_bit & 1) << bit;
            }
        }
        (at, row)
    }
}

impl ScanOut {
    /// What `registers` show of `vram`. A blank screen has the size of the one before it, if there was one.
    pub(crate) fn new(registers: &Registers, vram: HostRegion, before: Option<(usize, usize)>) -> ScanOut {
        let (width, height, content) = if !registers.palette_on {
            let (width, height) = before.unwrap_or(BLANK_SIZE);
            (width, height, Content::Blank)
        } else if registers.dispi.mode().is_some() {
            linear(registers)
        } else if registers.graphics[6] & 1 != 0 {
            graphics(registers)
        } else {
            text(registers, &vram)
        };
        let hidden = registers.sequencer[1] & 0x20 != 0 && registers.dispi.mode().is_none();
        let content = if hidden { Content::Blank } else { content };
        ScanOut { width, height, content, vram, bytes: Vec::new() }
    }

    pub(crate) fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// Whether line `y` may have changed when these pages were written.
    pub(crate) fn is_dirty(&self, y: usize, dirty: &DirtyPages) -> bool {
        match &self.content {
            Content::Blank => false,
            // The pages of the characters hold their fonts too.
            Content::Text(_) => true,
            Content::Raster(raster) => dirty.touches(raster.lines.at(y).0, raster.line_bytes),
        }
    }

    /// Makes line `y`; `out` is as long as the screen is wide.
    pub(crate) fn line(&mut self, y: usize, out: &mut [u32]) {
        match &self.content {
            Content::Blank => out.fill(0),
            Content::Text(text) => {
                let (at, row) = text.lines.at(y);
                self.bytes.resize(4 * text.columns, 0);
                self.vram.read(at, &mut self.bytes);
                text.draw(at, row, &self.bytes, out);
            }
            Content::Raster(raster) => {
                self.bytes.resize(raster.line_bytes, 0);
                self.vram.read(raster.lines.at(y).0, &mut self.bytes);
                raster.pixels.draw(&self.bytes, out);
            }
        }
    }
}

fn linear(registers: &Registers) -> (usize, usize, Content) {
    let Some(mode) = registers.dispi.mode() else { return (BLANK_SIZE.0, BLANK_SIZE.1, Content::Blank) };
    let (pixels, line_bytes) = match mode.pixels {
        PixelLayout::Planar => (Pixels::Planes { colors: colors16(registers), repeat: 1 }, mode.width / 2),
        PixelLayout::Palette8 => (Pixels::Indexes { colors: colors256(registers), repeat: 1 }, mode.width),
        PixelLayout::Rgb555 => (Pixels::Rgb555, 2 * mode.width),
        PixelLayout::Rgb565 => (Pixels::Rgb565, 2 * mode.width),
        PixelLayout::Rgb888 => (Pixels::Rgb888, 3 * mode.width),
        PixelLayout::Xrgb8888 => (Pixels::Xrgb8888, 4 * mode.width),
    };
    let lines = Lines {
        start: if mode.pixels == PixelLayout::Planar { mode.start & !3 } else { mode.start },
        stride_bytes: mode.stride_bytes,
        rows: 1,
        doubled: false,
        split: usize::MAX,
        row_address_bits: [None, None],
    };
    (mode.width, mode.height, Content::Raster(Raster { lines, line_bytes, pixels }))
}

fn text(registers: &Registers, vram: &HostRegion) -> (usize, usize, Content) {
    let (crtc, sequencer, attribute) = (&registers.crtc, &registers.sequencer, &registers.attribute);
    let cell_width = if sequencer[1] & 1 != 0 { 8 } else { 9 };
    let doubled = sequencer[1] & 8 != 0;
    let dots = if doubled { 2 * cell_width } else { cell_width };
    let columns = (usize::from(crtc[1]) + 1).min(usize::from(WIDTH_MAX) / dots);
    let lines = Lines { row_address_bits: [None, None], ..crtc_lines(crtc) };
    // "Character map select": three bits each, of which the last is apart.
    let map = sequencer[3];
    let fonts = [(map & 3) << 1 | map >> 4 & 1, (map >> 2 & 3) << 1 | map >> 5 & 1];
    let cursor = (crtc[0xa] & 0x20 == 0).then(|| Cursor {
        cell: 4 * usize::from(u16::from_be_bytes([crtc[0xe], crtc[0xf]])),
        first_row: usize::from(crtc[0xa] & 0x1f),
        last_row: usize::from(crtc[0xb] & 0x1f),
    });
    let text = Text {
        lines,
        columns,
        cell_width,
        doubled,
        cursor,
        fonts: fonts.map(|map| font(vram, usize::from(map))),
        colors: colors16(registers),
        blink_instead_of_bright: attribute[0x10] & 8 != 0,
        line_graphics: attribute[0x10] & 4 != 0,
        underline_row: (attribute[0x10] & 2 != 0).then_some(usize::from(crtc[0x14] & 0x1f)),
    };
    (columns * dots, crtc_height(crtc), Content::Text(text))
}

/// The 256 characters of a font: plane 2, 8 KiB for each map.
fn font(vram: &HostRegion, map: usize) -> Vec<u8> {
    let mut planes = vec![0; 4 * 8192];
    vram.read(4 * 8192 * map, &mut planes);
    planes.chunks_exact(4).map(|planes| planes[2]).collect()
}

impl Text {
    /// `cells` are the four planes of each cell, `at` where they start in video memory.
    fn draw(&self, at: usize, row: usize, cells: &[u8], out: &mut [u32]) {
        let dots = self.cell_width * if self.doubled { 2 } else { 1 };
        for (column, (cell, out)) in cells.chunks_exact(4).zip(out.chunks_exact_mut(dots)).enumerate() {
            let (character, attribute) = (cell[0], cell[1]);
            let font = &self.fonts[usize::from(attribute >> 3 & 1)];
            let mut bits = u16::from(font.get(usize::from(character) * 32 + row).copied().unwrap_or(0)) << 1;
            if self.line_graphics && (0xc0..0xe0).contains(&character) {
                bits |= bits >> 1 & 1;
            }
            let under_cursor = self.cursor.as_ref().is_some_and(|cursor| {
                cursor.cell == at + 4 * column && (cursor.first_row..=cursor.last_row).contains(&row)
            });
            if under_cursor || self.underline_row == Some(row) && attribute & 7 == 1 {
                bits = 0x1ff;
            }
            // Blinking characters are shown steadily: a screen at rest costs nothing.
            let back = attribute >> 4 & if self.blink_instead_of_bright { 7 } else { 15 };
            let colors = [self.colors[usize::from(back)], self.colors[usize::from(attribute & 15)]];
            let repeat = if self.doubled { 2 } else { 1 };
            for (dot, out) in out.chunks_exact_mut(repeat).enumerate() {
                out.fill(colors[usize::from(bits >> (8 - dot.min(8)) & 1)]);
            }
        }
        let drawn = cells.len() / 4 * dots;
        out.get_mut(drawn..).unwrap_or_default().fill(0);
    }
}

fn graphics(registers: &Registers) -> (usize, usize, Content) {
    let crtc = &registers.crtc;
    let half_clock = registers.sequencer[1] & 8 != 0;
    let repeat = if half_clock { 2 } else { 1 };
    // In units of eight pixels of 16-colour modes.
    let groups = (usize::from(crtc[1]) + 1).min(usize::from(WIDTH_MAX) / 8 / repeat);
    let width = 8 * groups * repeat;
    let (pixels, line_bytes) = match registers.graphics[5] >> 5 & 3 {
        0 => (Pixels::Planes { colors: colors16(registers), repeat }, 4 * groups),
        1 => (Pixels::Pairs { colors: colors16(registers), repeat }, 4 * groups),
        _ => (Pixels::Indexes { colors: colors256(registers), repeat: 2 * repeat }, 4 * groups),
    };
    (width, crtc_height(crtc), Content::Raster(Raster { lines: crtc_lines(crtc), line_bytes, pixels }))
}

/// The lines of a mode that the CRTC drives.
fn crtc_lines(crtc: &[u8; 25]) -> Lines {
    let bit = |register: usize, bit: u32, place: u32| usize::from(crtc[register] >> bit & 1) << place;
    let byte_mode = u32::from(crtc[0x17] >> 6 & 1);
    Lines {
        start: 4 * usize::from(u16::from_be_bytes([crtc[0xc], crtc[0xd]])),
        stride_bytes: 8 * usize::from(crtc[0x13]),
        rows: usize::from(crtc[9] & 0x1f) + 1,
        doubled: crtc[9] & 0x80 != 0,
        split: usize::from(crtc[0x18]) | bit(7, 4, 8) | bit(9, 6, 9),
        row_address_bits: [
            (crtc[0x17] & 1 == 0).then_some(14 + byte_mode),
            (crtc[0x17] & 2 == 0).then_some(15 + byte_mode),
        ],
    }
}

/// "Vertical display end", ten bits in two registers.
fn crtc_height(crtc: &[u8; 25]) -> usize {
    let high = usize::from(crtc[7] >> 1 & 1) << 8 | usize::from(crtc[7] >> 6 & 1) << 9;
    (usize::from(crtc[0x12]) | high) + 1
}

fn colors16(registers: &Registers) -> [u32; 16] {
    std::array::from_fn(|index| registers.color16(index as u8))
}

fn colors256(registers: &Registers) -> Vec<u32> {
    (0..=255).map(|index| registers.color(index)).collect()
}

impl Pixels {
    fn draw(&self, bytes: &[u8], out: &mut [u32]) {
        match self {
            Pixels::Planes { colors, repeat } => {
                for (planes, out) in bytes.chunks_exact(4).zip(out.chunks_mut(8 * repeat)) {
                    for (dot, out) in out.chunks_mut(*repeat).enumerate() {
                        let plane = |plane: usize| usize::from(planes[plane] >> (7 - dot) & 1) << plane;
                        out.fill(colors[plane(0) | plane(1) | plane(2) | plane(3)]);
                    }
                }
            }
            Pixels::Pairs { colors, repeat } => {
                for (planes, out) in bytes.chunks_exact(4).zip(out.chunks_mut(8 * repeat)) {
                    for (dot, out) in out.chunks_mut(*repeat).enumerate() {
                        out.fill(colors[usize::from(planes[dot / 4] >> (6 - 2 * (dot % 4)) & 3)]);
                    }
                }
            }
            Pixels::Indexes { colors, repeat } => {
                for (index, out) in bytes.iter().zip(out.chunks_mut(*repeat)) {
                    out.fill(colors.get(usize::from(*index)).copied().unwrap_or(0));
                }
            }
            Pixels::Rgb555 => {
                for (pixel, out) in bytes.chunks_exact(2).zip(out) {
                    let pixel = u32::from(u16::from_le_bytes([pixel[0], pixel[1]]));
                    *out = widen(pixel >> 10, 5) << 16 | widen(pixel >> 5, 5) << 8 | widen(pixel, 5);
                }
            }
            Pixels::Rgb565 => {
                for (pixel, out) in bytes.chunks_exact(2).zip(out) {
                    let pixel = u32::from(u16::from_le_bytes([pixel[0], pixel[1]]));
                    *out = widen(pixel >> 11, 5) << 16 | widen(pixel >> 5, 6) << 8 | widen(pixel, 5);
                }
            }
            Pixels::Rgb888 => {
                for (pixel, out) in bytes.chunks_exact(3).zip(out) {
                    *out = u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]);
                }
            }
            Pixels::Xrgb8888 => {
                for (pixel, out) in bytes.chunks_exact(4).zip(out) {
                    *out = u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]);
                }
            }
        }
    }
}

/// The low `bits` (5 or 6) as eight: the high bits fill the low ones.
fn widen(value: u32, bits: u32) -> u32 {
    let value = value & ((1 << bits) - 1);
    value << (8 - bits) | value >> (2 * bits - 8)
}
