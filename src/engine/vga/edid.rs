//! What the display says of itself: an EDID 1.3 block (VESA E-EDID Standard, release A).

/// The size of a block.
pub(crate) const EDID_BYTES: usize = 128;

/// The block of a display that prefers 1024x768 at 60 Hz; names the common larger modes.
pub(super) fn block() -> [u8; EDID_BYTES] {
    with_preferred(&PREFERRED, [34, 19], [50, 30, 90, 27])
}

/// The block of a display that prefers `width` by `height` pixels. None when a detailed timing cannot say so: more than 4095
/// pixels a side, or fewer than 64.
pub(crate) fn block_for(width: u32, height: u32) -> Option<[u8; EDID_BYTES]> {
    if (width, height) == (1024, 768) {
        return Some(block());
    }
    let timing = Timing::new(width, height)?;
    let cm = [timing.width_mm, timing.height_mm].map(|mm| (mm / 10).clamp(1, 255) as u8);
    Some(with_preferred(&timing.descriptor(), cm, timing.limits()))
}

/// `cm` is the size of the picture; `limits` are the lowest refresh rate in Hz, the lowest and the highest line rate in kHz, and
/// the highest pixel clock in 10 MHz.
fn with_preferred(preferred: &[u8; 18], cm: [u8; 2], limits: [u8; 4]) -> [u8; EDID_BYTES] {
    let mut edid = [0; EDID_BYTES];
    let mut put = |at: usize, bytes: &[u8]| edid[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    put(8, &manufacturer(*b"INN").to_be_bytes());
    put(10, &[0x01, 0x00, 0, 0, 0, 0, 1, 36]); // product 1, no serial number, week 1 of 2026
    put(18, &[1, 3]); // version 1.3
    put(20, &[0x80, cm[0], cm[1], 120, 0x0a]); // digital, size, gamma 2.2, RGB, first timing preferred
    put(25, &[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]); // the primaries of sRGB
    put(35, &[0x21, 0x08, 0x00]); // 640x480, 800x600 and 1024x768 at 60 Hz
    let standard = [standard(1280, 0), standard(1280, 2), standard(1440, 0), standard(1600, 3), standard(1680, 0)];
    put(38, &[1; 16]); // unused
    for (index, timing) in standard.iter().enumerate() {
        put(38 + 2 * index, timing);
    }
    put(54, preferred);
    put(72, &text(0xfc, "Innkeeper"));
    // Range limits: up to 75 Hz, no formula.
    let [hz, low_khz, high_khz, mhz10] = limits;
    put(90, &[0, 0, 0, 0xfd, 0, hz, 75, low_khz, high_khz, mhz10, 0, 0x0a, 0x20, 0x20, 0x20, 0x20, 0x20, 0x20]);
    put(108, &text(0xff, "1"));
    let sum = edid.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    edid[127] = sum.wrapping_neg();
    edid
}

/// 1024x768 at 60 Hz, 65 MHz (VESA Display Monitor Timing): 1344 by 806 in all, both syncs negative.
const PREFERRED: [u8; 18] = [
    0x64, 0x19, // 65.00 MHz
    0x00, 0x40, 0x41, // 1024 and 320 pixels
    0x00, 0x26, 0x30, // 768 and 38 lines
    24, 136, 0x36, 0x00, // front porches and sync widths
    0x54, 0xbe, 0x10, // 340 x 190 mm
    0, 0, 0x18,
];

/// A mode with reduced blanking, in the way of VESA's Coordinated Video Timings 1.1 (3.4): 160 pixels beside each line, at least
/// 460 microseconds between frames. At 60 Hz, or as fast as the descriptor's pixel clock allows.
struct Timing {
    width: u32,
    height: u32,
    blank_lines: u32,
    clock_10khz: u32,
    /// Of a screen with 96 dots per inch.
    width_mm: u32,
    height_mm: u32,
}

const BLANK_PIXELS: u32 = 160;
const FRONT_PIXELS: u8 = 48;
const SYNC_PIXELS: u8 = 32;
const FRONT_LINES: u8 = 3;
const SYNC_LINES: u8 = 5;
/// Front porch, sync and a back porch of six lines.
const BLANK_LINES_MIN: u32 = 14;

impl Timing {
    fn new(width: u32, height: u32) -> Option<Timing> {
        if !(64..=0xfff).contains(&width) || !(64..=0xfff).contains(&height) {
            return None;
        }
        // 460 of the 16667 microseconds of a frame.
        let blank_lines = (height * 276).div_ceil(9724).max(BLANK_LINES_MIN);
        let clock_10khz = ((width + BLANK_PIXELS) * (height + blank_lines) * 6 / 1000).min(0xffff);
        Some(Timing {
            width,
            height,
            blank_lines,
            clock_10khz,
            width_mm: width * 254 / 960,
            height_mm: height * 254 / 960,
        })
    }

    /// The detailed timing descriptor: horizontal sync positive, vertical sync negative.
    fn descriptor(&self) -> [u8; 18] {
        let [clock_low, clock_high, ..] = self.clock_10khz.to_le_bytes();
        // Two numbers of twelve bits: both low bytes, then both high halves.
        let pair = |one: u32, two: u32| [one as u8, two as u8, (one >> 8 << 4 | two >> 8) as u8];
        let [width, blank_pixels, pixels_high] = pair(self.width, BLANK_PIXELS);
        let [height, blank_lines, lines_high] = pair(self.height, self.blank_lines);
        let [width_mm, height_mm, mm_high] = pair(self.width_mm, self.height_mm);
        let syncs = FRONT_LINES << 4 | SYNC_LINES;
        let across = [clock_low, clock_high, width, blank_pixels, pixels_high];
        let down = [height, blank_lines, lines_high];
        let porches = [FRONT_PIXELS, SYNC_PIXELS, syncs, 0, width_mm, height_mm, mm_high, 0, 0, 0x1a];
        let mut descriptor = [0; 18];
        for (place, byte) in descriptor.iter_mut().zip(across.into_iter().chain(down).chain(porches)) {
            *place = byte;
        }
        descriptor
    }

    /// Those of `with_preferred`, wide enough for this mode and the common ones.
    fn limits(&self) -> [u8; 4] {
        let line_khz = self.clock_10khz * 10 / (self.width + BLANK_PIXELS);
        let hz = line_khz * 1000 / (self.height + self.blank_lines);
        let high_khz = (line_khz + 1).clamp(90, 255);
        [hz.min(50), line_khz.min(30), high_khz, self.clock_10khz.div_ceil(1000).max(27)].map(|limit| limit as u8)
    }
}

/// Three letters in five bits each.
fn manufacturer(letters: [u8; 3]) -> u16 {
    letters.iter().fold(0, |all, letter| all << 5 | u16::from(letter - b'A' + 1))
}

/// A standard timing at 60 Hz; `aspect` 0 is 16:10, 2 is 5:4, 3 is 16:9.
fn standard(width: u16, aspect: u8) -> [u8; 2] {
    [(width / 8 - 31) as u8, aspect << 6]
}

/// A display descriptor with text, ended by a line feed and filled with spaces.
fn text(tag: u8, words: &str) -> [u8; 18] {
    let mut out = [0x20; 18];
    out[..5].copy_from_slice(&[0, 0, 0, tag, 0]);
    for (place, byte) in out[5..].iter_mut().zip(words.bytes().chain([0x0a])) {
        *place = byte;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_adds_up_and_prefers_1024_by_768() {
        let edid = block();
        assert_eq!(edid.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(edid[..8], [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
        let first = &edid[54..72];
        assert_eq!(u16::from(first[2]) | u16::from(first[4] & 0xf0) << 4, 1024);
        assert_eq!(u16::from(first[5]) | u16::from(first[7] & 0xf0) << 4, 768);
        let pixels = (1024 + 320) * (768 + 38) * 60;
        let clock = u32::from(u16::from_le_bytes([first[0], first[1]])) * 10_000;
        assert!(clock.abs_diff(pixels) < 100_000, "60 Hz");
        assert_eq!(&edid[77..87], b"Innkeeper\n");
        assert_eq!(block_for(1024, 768), Some(edid));
    }

    /// Width, height and refresh rate in Hz of the preferred mode, as a system reads them.
    fn preferred(edid: &[u8; EDID_BYTES]) -> (u32, u32, u32) {
        let timing = &edid[54..72];
        let number =
            |low: usize, high: usize, shift: u8| u32::from(timing[low]) | u32::from(timing[high] >> shift & 15) << 8;
        let (width, beside) = (number(2, 4, 4), number(3, 4, 0));
        let (height, between) = (number(5, 7, 4), number(6, 7, 0));
        let (front, sync) = (u32::from(timing[8]), u32::from(timing[9]));
        assert!(sync > 0 && front + sync < beside, "the sync pulse is within the blanking");
        let (front, sync) = (u32::from(timing[10] >> 4), u32::from(timing[10] & 15));
        assert!(sync > 0 && front + sync < between);
        let clock = u32::from(u16::from_le_bytes([timing[0], timing[1]])) * 10_000;
        let pixels = (width + beside) * (height + between);
        (width, height, (clock + pixels / 2) / pixels)
    }

    #[test]
    fn any_size_that_a_timing_can_say_is_preferred() {
        for (width, height, hz) in [
            (320, 200, 60),
            (800, 600, 60),
            (1366, 768, 60),
            (1920, 1080, 60),
            (3840, 2160, 60),
            (4088, 4088, 37),
            (64, 4095, 60),
        ] {
            let edid = block_for(width, height).unwrap();
            assert_eq!(edid.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            let (seen_width, seen_height, seen_hz) = preferred(&edid);
            assert_eq!((seen_width, seen_height), (width, height));
            assert!(seen_hz.abs_diff(hz) <= 1, "{width}x{height}: {seen_hz} Hz");
            assert!(edid[95] <= 60 && u32::from(edid[95]) <= seen_hz, "within its own limits");
        }
        let timing = Timing::new(1920, 1080).unwrap();
        assert_eq!(
            (timing.blank_lines, timing.clock_10khz),
            (31, 13_865),
            "as the standard's tables, but for rounding"
        );
        for (width, height) in [(4096, 1080), (1920, 4096), (0, 0), (63, 600), (u32::MAX, u32::MAX)] {
            assert_eq!(block_for(width, height), None, "{width}x{height}");
        }
    }
}
