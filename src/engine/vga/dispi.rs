//! The Bochs display interface: linear modes, banks and virtual screens (Bochs `vbe_dispi` interface, QEMU `standard-vga`).

use super::saved::DispiV1;

/// The registers behind ports 0x1ce and 0x1cf, and behind BAR2 at 0x500.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dispi {
    id: u16,
    width: u16,
    height: u16,
    bits_per_pixel: u16,
    enable: u16,
    bank: u16,
    virtual_width: u16,
    x_offset: u16,
    y_offset: u16,
}

/// A mode that the guest set through these registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DispiMode {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) pixels: PixelLayout,
    /// Where in video memory the first line starts.
    pub(super) start: usize,
    pub(super) stride_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PixelLayout {
    /// 16 colours in four planes.
    Planar,
    Palette8,
    Rgb555,
    Rgb565,
    Rgb888,
    Xrgb8888,
}

/// The largest mode: it fills 16 MiB and bounds what a viewer costs.
pub(super) const WIDTH_MAX: u16 = 2560;
pub(super) const HEIGHT_MAX: u16 = 1600;
pub(super) const VIRTUAL_WIDTH_MAX: u16 = 4 * WIDTH_MAX;

const ENABLED: u16 = 0x01;
const GET_CAPABILITIES: u16 = 0x02;
const DAC_8_BIT: u16 = 0x20;
const NO_CLEAR: u16 = 0x80;
pub(super) const ID_FIRST: u16 = 0xb0c0;
pub(super) const ID_LAST: u16 = 0xb0c5;

impl Default for Dispi {
    fn default() -> Dispi {
        Dispi {
            id: ID_LAST,
            width: 0,
            height: 0,
            bits_per_pixel: 8,
            enable: 0,
            bank: 0,
            virtual_width: 0,
            x_offset: 0,
            y_offset: 0,
        }
    }
}

impl Dispi {
    /// `vram_bytes` is the size of video memory, which two registers tell.
    pub(super) fn read(&self, index: u16, vram_bytes: usize) -> u16 {
        let tells_limits = self.enable & GET_CAPABILITIES != 0;
        match index {
            0 => self.id,
            1 if tells_limits => WIDTH_MAX,
            1 => self.width,
            2 if tells_limits => HEIGHT_MAX,
            2 => self.height,
            3 if tells_limits => 32,
            3 => self.bits_per_pixel,
            4 => self.enable,
            5 => self.bank,
            6 => self.virtual_width,
            7 => u16::try_from(vram_bytes / self.stride_bytes().max(1)).unwrap_or(u16::MAX),
            8 => self.x_offset,
            9 => self.y_offset,
            10 => u16::try_from(vram_bytes >> 16).unwrap_or(u16::MAX),
            _ => 0,
        }
    }

    /// Returns how many bytes at the start of video memory the guest wants cleared: a new mode does that unless told not to.
    pub(super) fn write(&mut self, index: u16, value: u16) -> usize {
        match index {
            0 if (ID_FIRST..=ID_LAST).contains(&value) => self.id = value,
            1 => {
                self.width = value.clamp(8, WIDTH_MAX);
                self.virtual_width = self.virtual_width.max(self.width);
            }
            2 => self.height = value.clamp(1, HEIGHT_MAX),
            3 => self.bits_per_pixel = if value == 0 { 8 } else { value },
            4 => return self.write_enable(value),
            5 => self.bank = value,
            // The height of the virtual screen follows from its width and is read-only.
            6 => self.virtual_width = value.clamp(self.width, VIRTUAL_WIDTH_MAX),
            8 => self.x_offset = value,
            9 => self.y_offset = value,
            _ => {}
        }
        0
    }

    fn write_enable(&mut self, value: u16) -> usize {
        let begins = value & ENABLED != 0 && self.enable & ENABLED == 0;
        self.enable = value;
        self.bank = 0;
        if !begins {
            return 0;
        }
        self.virtual_width = self.width;
        (self.x_offset, self.y_offset) = (0, 0);
        if value & NO_CLEAR != 0 { 0 } else { self.stride_bytes() * usize::from(self.height) }
    }

    pub(super) fn save(&self) -> DispiV1 {
        let Dispi { id, width, height, bits_per_pixel, enable, bank, virtual_width, x_offset, y_offset } = *self;
        DispiV1 { id, width, height, bits_per_pixel, enable, bank, virtual_width, x_offset, y_offset }
    }

    /// Takes registers on that were checked.
    pub(super) fn from_saved(fields: &DispiV1) -> Dispi {
        let DispiV1 { id, width, height, bits_per_pixel, enable, bank, virtual_width, x_offset, y_offset } = *fields;
        Dispi { id, width, height, bits_per_pixel, enable, bank, virtual_width, x_offset, y_offset }
    }

    pub(super) fn dac_is_8_bit(&self) -> bool {
        self.enable & DAC_8_BIT != 0
    }

    /// Where the window at 0xa0000 shows video memory.
    pub(super) fn bank_start(&self) -> usize {
        usize::from(self.bank) << 16
    }

    /// The mode, when one is on and can be shown.
    pub(super) fn mode(&self) -> Option<DispiMode> {
        if self.enable & ENABLED == 0 || self.width == 0 || self.height == 0 {
            return None;
        }
        let pixels = self.pixels()?;
        let stride_bytes = self.stride_bytes();
        let x_bytes = usize::from(self.x_offset) * usize::from(self.bits_per_pixel_stored()) / 8;
        Some(DispiMode {
            width: usize::from(if pixels == PixelLayout::Planar { self.width & !7 } else { self.width }),
            height: usize::from(self.height),
            pixels,
            start: usize::from(self.y_offset) * stride_bytes + x_bytes,
            stride_bytes,
        })
    }

    fn pixels(&self) -> Option<PixelLayout> {
        match self.bits_per_pixel {
            4 => Some(PixelLayout::Planar),
            8 => Some(PixelLayout::Palette8),
            15 => Some(PixelLayout::Rgb555),
            16 => Some(PixelLayout::Rgb565),
            24 => Some(PixelLayout::Rgb888),
            32 => Some(PixelLayout::Xrgb8888),
            _ => None,
        }
    }

    fn bits_per_pixel_stored(&self) -> u16 {
        if self.bits_per_pixel == 15 { 16 } else { self.bits_per_pixel.min(32) }
    }

    fn stride_bytes(&self) -> usize {
        usize::from(self.virtual_width.max(self.width)) * usize::from(self.bits_per_pixel_stored()) / 8
    }
}
