//! Turns registers and video memory into lines of pixels.
//!
//! A [`ScanOut`] is what one look at the registers says; each line is then made by itself, so that a viewer redraws only lines
//! whose memory was written, and a screenshot needs no picture in memory.
//!
//! ```text
//! display interface   a line is a stretch of video memory
//! VGA modes           crtc.rs says which address each character clock shows; its four bytes become eight or nine dots, as a cell
//!                     of text (text.rs) or as pixels (here); then panning, and every dot twice where the clock is halved
//! ```

use super::{
    DirtyPages, Registers, VRAM_BYTES,
    crtc::Crtc,
    dispi::{DispiMode, PixelLayout, WIDTH_MAX},
    planes::Planes,
    text::{Blink, Text},
};
use crate::engine::memory::HostRegion;

/// One frame, described. Pixels are 0x00RRGGBB.
pub(crate) struct ScanOut {
    width: usize,
    height: usize,
    content: Content,
}

enum Content {
    Blank,
    Linear(Linear),
    Vga(Box<Vga>),
}

/// What is shown while nothing is.
const BLANK_SIZE: (usize, usize) = (640, 400);

impl ScanOut {
    /// What `registers` show of `vram`, when what blinks is as `lit` says. A blank screen has the size of the one before it, if
    /// there was one.
    pub(crate) fn new(registers: &Registers, vram: HostRegion, before: Option<(usize, usize)>, lit: Blink) -> ScanOut {
        ScanOut::with(registers, vram, before, lit, Planes::new)
    }

    /// As `new`, for a look that follows one whose planes were kept ([`ScanOut::into_planes`]): since then these pages were written.
    pub(crate) fn following(
        mut planes: Planes,
        dirty: &DirtyPages,
        registers: &Registers,
        vram: HostRegion,
        before: Option<(usize, usize)>,
        lit: Blink,
    ) -> ScanOut {
        ScanOut::with(registers, vram, before, lit, |vram| {
            planes.update(vram, dirty);
            planes
        })
    }

    fn with(
        registers: &Registers,
        vram: HostRegion,
        before: Option<(usize, usize)>,
        lit: Blink,
        planes: impl FnOnce(&HostRegion) -> Planes,
    ) -> ScanOut {
        if !registers.palette_on {
            let (width, height) = before.unwrap_or(BLANK_SIZE);
            return ScanOut { width, height, content: Content::Blank };
        }
        if let Some(mode) = registers.dispi.mode() {
            let content = Content::Linear(Linear::new(registers, mode, vram));
            return ScanOut { width: mode.width, height: mode.height, content };
        }
        let vga = Vga::new(registers, planes(&vram), lit);
        let (width, height) = vga.size();
        // "Screen off" in the clocking mode register.
        let off = registers.sequencer[1] & 0x20 != 0;
        ScanOut { width, height, content: if off { Content::Blank } else { Content::Vga(Box::new(vga)) } }
    }

    pub(crate) fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// What the next look can follow. Nothing where the planes are not shown: they are not looked at meanwhile.
    pub(crate) fn into_planes(self) -> Option<Planes> {
        match self.content {
            Content::Vga(vga) => Some(vga.planes),
            Content::Blank | Content::Linear(_) => None,
        }
    }

    /// Whether line `y` may have changed when these pages were written.
    pub(crate) fn is_dirty(&self, y: usize, dirty: &DirtyPages) -> bool {
        match &self.content {
            Content::Blank => false,
            Content::Linear(linear) => linear.is_dirty(y, dirty),
            Content::Vga(vga) => vga.is_dirty(y),
        }
    }

    /// Whether line `y` changes with [`Blink`].
    pub(crate) fn blinks(&self, y: usize) -> bool {
        match &self.content {
            Content::Blank | Content::Linear(_) => false,
            Content::Vga(vga) => vga.blinks(y),
        }
    }

    /// Makes line `y`; `out` is as long as the screen is wide.
    pub(crate) fn line(&mut self, y: usize, out: &mut [u32]) {
        match &mut self.content {
            Content::Blank => out.fill(0),
            Content::Linear(linear) => linear.line(y, out),
            Content::Vga(vga) => vga.line(y, out),
        }
    }
}

/// A mode of the display interface. Video memory is round: after its end comes its start.
struct Linear {
    mode: DispiMode,
    start: usize,
    line_bytes: usize,
    pixels: Pixels,
    vram: HostRegion,
    /// The memory of one line, kept to be filled again.
    bytes: Vec<u8>,
}

enum Pixels {
    /// Four planes, eight pixels in four bytes.
    Planar([u32; 16]),
    Palette(Vec<u32>),
    Rgb555,
    Rgb565,
    Rgb888,
    Xrgb8888,
}

impl Linear {
    fn new(registers: &Registers, mode: DispiMode, vram: HostRegion) -> Linear {
        let (pixels, line_bytes) = match mode.pixels {
            PixelLayout::Planar => (Pixels::Planar(colors16(registers)), mode.width / 2),
            PixelLayout::Palette8 => (Pixels::Palette(colors256(registers)), mode.width),
            PixelLayout::Rgb555 => (Pixels::Rgb555, 2 * mode.width),
            PixelLayout::Rgb565 => (Pixels::Rgb565, 2 * mode.width),
            PixelLayout::Rgb888 => (Pixels::Rgb888, 3 * mode.width),
            PixelLayout::Xrgb8888 => (Pixels::Xrgb8888, 4 * mode.width),
        };
        let start = if mode.pixels == PixelLayout::Planar { mode.start & !3 } else { mode.start };
        Linear { mode, start, line_bytes, pixels, vram, bytes: vec![0; line_bytes] }
    }

    /// Where line `y` begins, and how many of its bytes are there; the others are at the start of video memory.
    fn at(&self, y: usize) -> (usize, usize) {
        let at = (self.start + y * self.mode.stride_bytes) % VRAM_BYTES;
        (at, self.line_bytes.min(VRAM_BYTES - at))
    }

    fn is_dirty(&self, y: usize, dirty: &DirtyPages) -> bool {
        let (at, bytes) = self.at(y);
        dirty.touches(at, bytes) || dirty.touches(0, self.line_bytes - bytes)
    }

    fn line(&mut self, y: usize, out: &mut [u32]) {
        let (at, bytes) = self.at(y);
        let (first, rest) = self.bytes.split_at_mut(bytes);
        self.vram.read(at, first);
        self.vram.read(0, rest);
        self.pixels.draw(&self.bytes, out);
    }
}

impl Pixels {
    fn draw(&self, bytes: &[u8], out: &mut [u32]) {
        match self {
            Pixels::Planar(colors) => {
                for (planes, out) in bytes.chunks_exact(4).zip(out.chunks_mut(8)) {
                    planar([planes[0], planes[1], planes[2], planes[3]], colors, out);
                }
            }
            Pixels::Palette(colors) => {
                for (index, out) in bytes.iter().zip(out) {
                    *out = colors.get(usize::from(*index)).copied().unwrap_or(0);
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

/// A mode that the CRT controller drives.
struct Vga {
    crtc: Crtc,
    planes: Planes,
    /// Character clocks of a line.
    clocks: usize,
    /// Dots of a character clock, 8 or 9.
    clock_dots: usize,
    /// How often each dot is shown: twice where the dot clock is halved.
    repeat: usize,
    generator: Generator,
    /// The dots of one line and of one clock more, which panning moves in.
    dots: Vec<u32>,
}

/// What makes dots of four bytes ("graphics mode", shift register bits).
enum Generator {
    Text(Text),
    /// A bit of each plane for a pixel: 16 colours.
    Planar([u32; 16]),
    /// Two bits for a pixel: four pixels of planes 0 and 2, then four of planes 1 and 3 (CGA).
    Pairs([u32; 16]),
    /// A byte for a pixel, two dots wide: 256 colours.
    Bytes(Vec<u32>),
}

impl Vga {
    fn new(registers: &Registers, planes: Planes, lit: Blink) -> Vga {
        let graphics = registers.graphics[6] & 1 != 0;
        let generator = match registers.graphics[5] >> 5 & 3 {
            _ if !graphics => Generator::Text(Text::new(registers, lit)),
            0 => Generator::Planar(colors16(registers)),
            1 => Generator::Pairs(colors16(registers)),
            _ => Generator::Bytes(colors256(registers)),
        };
        let clock_dots = if graphics || registers.sequencer[1] & 1 != 0 { 8 } else { 9 };
        let repeat = if registers.sequencer[1] & 8 != 0 { 2 } else { 1 };
        let clocks = (usize::from(registers.crtc[1]) + 1).min(usize::from(WIDTH_MAX) / (clock_dots * repeat));
        let pan = match (usize::from(registers.attribute[0x13]), &generator) {
            // Nine dots count from 8, which is none, through 0, which is one.
            (value, Generator::Text(_)) if clock_dots == 9 => (value + 1) % 9 * usize::from(value < 9),
            (8.., _) => 0,
            // Half a pixel cannot be panned.
            (value, Generator::Bytes(_)) => value & !1,
            (value, _) => value,
        };
        let dots = vec![0; (clocks + 1) * clock_dots];
        let crtc = Crtc::new(registers, pan);
        Vga { crtc, planes, clocks, clock_dots, repeat, generator, dots }
    }

    fn size(&self) -> (usize, usize) {
        (self.clocks * self.clock_dots * self.repeat, self.crtc.height())
    }

    fn is_dirty(&self, y: usize) -> bool {
        let text = matches!(self.generator, Generator::Text(_));
        let line = self.crtc.line(y);
        text && self.planes.shapes_changed()
            || (0..=self.clocks as u16).any(|clock| {
                let address = self.crtc.address(line.counter.wrapping_add(clock), line.row);
                self.planes.changed(address)
            })
    }

    fn blinks(&self, y: usize) -> bool {
        let Generator::Text(text) = &self.generator else { return false };
        let line = self.crtc.line(y);
        (0..=self.clocks as u16).any(|clock| {
            let counter = line.counter.wrapping_add(clock);
            text.changes(counter, line.row, self.planes.get(self.crtc.address(counter, line.row)))
        })
    }

    fn line(&mut self, y: usize, out: &mut [u32]) {
        let line = self.crtc.line(y);
        for (clock, dots) in self.dots.chunks_exact_mut(self.clock_dots).enumerate() {
            let counter = line.counter.wrapping_add(clock as u16);
            let bytes = self.planes.get(self.crtc.address(counter, line.row));
            match &self.generator {
                Generator::Text(text) => text.draw(&self.planes, counter, line.row, bytes, dots),
                Generator::Planar(colors) => planar(bytes, colors, dots),
                Generator::Pairs(colors) => pairs(bytes, colors, dots),
                Generator::Bytes(colors) => {
                    for (index, dots) in bytes.into_iter().zip(dots.chunks_mut(2)) {
                        dots.fill(colors.get(usize::from(index)).copied().unwrap_or(0));
                    }
                }
            }
        }
        for (dot, out) in self.dots.iter().skip(line.pan).zip(out.chunks_mut(self.repeat)) {
            out.fill(*dot);
        }
    }
}

/// Eight dots of four planes, leftmost in bit 7.
fn planar(planes: [u8; 4], colors: &[u32; 16], dots: &mut [u32]) {
    for (dot, out) in dots.iter_mut().take(8).enumerate() {
        let plane = |plane: usize| usize::from(planes[plane] >> (7 - dot) & 1) << plane;
        *out = colors[plane(0) | plane(1) | plane(2) | plane(3)];
    }
}

fn pairs(planes: [u8; 4], colors: &[u32; 16], dots: &mut [u32]) {
    for (dot, out) in dots.iter_mut().take(8).enumerate() {
        let pair = |plane: usize| usize::from(planes[plane] >> (6 - 2 * (dot % 4)) & 3);
        *out = colors[pair(dot / 4) | pair(2 + dot / 4) << 2];
    }
}

pub(super) fn colors16(registers: &Registers) -> [u32; 16] {
    std::array::from_fn(|index| registers.color16(index as u8))
}

fn colors256(registers: &Registers) -> Vec<u32> {
    (0..=255).map(|index| registers.color(index)).collect()
}
