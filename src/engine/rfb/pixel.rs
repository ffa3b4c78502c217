//! Pixel formats of RFB: how a viewer wants its colours (RFC 6143, 7.4).

/// A true-colour format of 8, 16 or 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PixelFormat {
    bits_per_pixel: u8,
    depth: u8,
    big_endian: bool,
    /// Red, green, blue: the largest value and where it starts.
    max: [u16; 3],
    shift: [u8; 3],
}

impl PixelFormat {
    /// What the server offers: the picture's own pixels.
    pub(super) const NATIVE: PixelFormat =
        PixelFormat { bits_per_pixel: 32, depth: 24, big_endian: false, max: [255; 3], shift: [16, 8, 0] };

    /// Reads the 16 bytes of a format. `None`: a colour map, or numbers that make no sense.
    pub(super) fn parse(bytes: [u8; 16]) -> Option<PixelFormat> {
        let [bits_per_pixel, depth, big_endian, true_color, r1, r2, g1, g2, b1, b2, r, g, b, ..] = bytes;
        let format = PixelFormat {
            bits_per_pixel,
            depth,
            big_endian: big_endian != 0,
            max: [[r1, r2], [g1, g2], [b1, b2]].map(u16::from_be_bytes),
            shift: [r, g, b],
        };
        let fits = |max: u16, shift: u8| {
            (u32::from(max) + 1).is_power_of_two()
                && max > 0
                && u32::from(shift) + max.count_ones() <= u32::from(bits_per_pixel)
        };
        let sound = true_color != 0
            && matches!(bits_per_pixel, 8 | 16 | 32)
            && format.max.iter().zip(format.shift).all(|(max, shift)| fits(*max, shift));
        sound.then_some(format)
    }

    pub(super) fn to_bytes(self) -> [u8; 16] {
        let [[r1, r2], [g1, g2], [b1, b2]] = self.max.map(u16::to_be_bytes);
        let [r, g, b] = self.shift;
        [self.bits_per_pixel, self.depth, self.big_endian.into(), 1, r1, r2, g1, g2, b1, b2, r, g, b, 0, 0, 0]
    }

    /// Appends one pixel of the picture in this format.
    pub(super) fn put(&self, pixel: u32, out: &mut Vec<u8>) {
        let value = self.convert(pixel);
        match (self.bits_per_pixel, self.big_endian) {
            (8, _) => out.push(value as u8),
            (16, false) => out.extend((value as u16).to_le_bytes()),
            (16, true) => out.extend((value as u16).to_be_bytes()),
            (_, false) => out.extend(value.to_le_bytes()),
            (_, true) => out.extend(value.to_be_bytes()),
        }
    }

    /// Appends one pixel as ZRLE writes it: three bytes where they are enough (RFC 6143, 7.7.5, CPIXEL).
    pub(super) fn put_compressed(&self, pixel: u32, out: &mut Vec<u8>) {
        let value = self.convert(pixel);
        let bytes = if self.big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
        match self.compressed_part() {
            Some(true) => out.extend_from_slice(if self.big_endian { &bytes[1..] } else { &bytes[..3] }),
            Some(false) => out.extend_from_slice(if self.big_endian { &bytes[..3] } else { &bytes[1..] }),
            None => self.put(pixel, out),
        }
    }

    /// The bytes of a pixel in ZRLE.
    pub(super) fn compressed_bytes(&self) -> usize {
        if self.compressed_part().is_some() { 3 } else { usize::from(self.bits_per_pixel / 8) }
    }

    /// Whether the colours lie in the low three bytes, or (`false`) in the high ones; `None` when a pixel is written whole.
    fn compressed_part(&self) -> Option<bool> {
        if self.bits_per_pixel != 32 || self.depth > 24 {
            return None;
        }
        let ends = self.max.iter().zip(self.shift).map(|(max, shift)| u32::from(shift) + max.count_ones());
        if ends.max()? <= 24 {
            Some(true)
        } else if self.shift.iter().all(|shift| *shift >= 8) {
            Some(false)
        } else {
            None
        }
    }

    fn convert(&self, pixel: u32) -> u32 {
        if self.max == [255; 3] && self.shift == [16, 8, 0] {
            return pixel;
        }
        let [_, red, green, blue] = pixel.to_be_bytes();
        let parts = [red, green, blue].into_iter().zip(self.max).zip(self.shift);
        parts.fold(0, |value, ((part, max), shift)| value | (((u32::from(part) * u32::from(max) + 127) / 255) << shift))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(bits: u8, depth: u8, big: bool, max: [u16; 3], shift: [u8; 3]) -> PixelFormat {
        PixelFormat { bits_per_pixel: bits, depth, big_endian: big, max, shift }
    }

    #[test]
    fn a_format_survives_the_wire_and_nonsense_does_not() {
        let format = format(16, 16, true, [31, 63, 31], [11, 5, 0]);
        assert_eq!(PixelFormat::parse(format.to_bytes()), Some(format));
        for (at, byte) in [(0, 24), (0, 0), (3, 0), (5, 30), (10, 12), (10, 255), (4, 255), (5, 0)] {
            let mut bytes = format.to_bytes();
            bytes[at] = byte;
            assert_eq!(PixelFormat::parse(bytes), None, "byte {at} is {byte}");
        }
    }

    #[test]
    fn colours_are_scaled_shifted_and_ordered() {
        let put = |format: PixelFormat, compressed| {
            let mut out = Vec::new();
            if compressed {
                format.put_compressed(0xff_8000, &mut out)
            } else {
                format.put(0xff_8000, &mut out)
            };
            assert!(!compressed || out.len() == format.compressed_bytes());
            out
        };
        assert_eq!(put(PixelFormat::NATIVE, false), [0x00, 0x80, 0xff, 0]);
        assert_eq!(put(PixelFormat::NATIVE, true), [0x00, 0x80, 0xff]);
        assert_eq!(put(format(32, 24, true, [255; 3], [0, 8, 16]), false), [0, 0x00, 0x80, 0xff]);
        assert_eq!(put(format(32, 24, true, [255; 3], [0, 8, 16]), true), [0x00, 0x80, 0xff]);
        assert_eq!(put(format(32, 24, false, [255; 3], [24, 16, 8]), true), [0x00, 0x80, 0xff]);
        assert_eq!(put(format(32, 24, true, [255; 3], [24, 16, 8]), true), [0xff, 0x80, 0x00]);
        assert_eq!(put(format(32, 32, false, [255; 3], [16, 8, 0]), true).len(), 4);
        assert_eq!(put(format(32, 24, false, [255; 3], [24, 12, 0]), true).len(), 4);
        assert_eq!(put(format(16, 16, false, [31, 63, 31], [11, 5, 0]), true), [0x00, 0xfc]);
        assert_eq!(put(format(8, 8, false, [7, 7, 3], [0, 3, 6]), false), [0x27]);
    }
}
