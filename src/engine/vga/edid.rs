//! What the display says of itself: an EDID 1.3 block (VESA E-EDID Standard, release A).

/// The block. Prefers 1024x768 at 60 Hz; names the common larger modes.
pub(super) fn block() -> [u8; 128] {
    let mut edid = [0; 128];
    let mut put = |at: usize, bytes: &[u8]| edid[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    put(8, &manufacturer(*b"INN").to_be_bytes());
    put(10, &[0x01, 0x00, 0, 0, 0, 0, 1, 36]); // product 1, no serial number, week 1 of 2026
    put(18, &[1, 3]); // version 1.3
    put(20, &[0x80, 34, 19, 120, 0x0a]); // digital, 34 x 19 cm, gamma 2.2, RGB, first timing preferred
    put(25, &[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]); // the primaries of sRGB
    put(35, &[0x21, 0x08, 0x00]); // 640x480, 800x600 and 1024x768 at 60 Hz
    let standard = [standard(1280, 0), standard(1280, 2), standard(1440, 0), standard(1600, 3), standard(1680, 0)];
    put(38, &[1; 16]); // unused
    for (index, timing) in standard.iter().enumerate() {
        put(38 + 2 * index, timing);
    }
    put(54, &PREFERRED);
    put(72, &text(0xfc, "Innkeeper"));
    // Range limits: 50 to 75 Hz, 30 to 90 kHz, up to 270 MHz, no formula.
    put(90, &[0, 0, 0, 0xfd, 0, 50, 75, 30, 90, 27, 0, 0x0a, 0x20, 0x20, 0x20, 0x20, 0x20, 0x20]);
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
    }
}
