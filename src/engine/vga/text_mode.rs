//! The text mode that a BIOS would set: mode 3, 80 columns and 25 lines, 9 by 16 dots, 16 colours.

use super::{Registers, font};
use crate::engine::memory::HostRegion;

/// What a boot loader tells a kernel of the screen (`struct screen_info` of the Linux boot protocol, `orig_video_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextScreen {
    pub mode: u8,
    pub columns: u8,
    pub lines: u8,
    pub font_height: u16,
    /// `orig_video_isVGA`: 1 for a VGA in text mode.
    pub is_vga: u8,
}

/// The screen after `Vga::start_in_text_mode`.
pub const TEXT_SCREEN: TextScreen = TextScreen { mode: 3, columns: 80, lines: 25, font_height: 16, is_vga: 1 };

/// The registers of mode 3 (IBM VGA Technical Reference, video modes).
pub(super) fn registers() -> Registers {
    let mut registers = Registers {
        misc: 0x67,
        sequencer: [0x03, 0x00, 0x03, 0x00, 0x02],
        crtc: [
            0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00, 0x9c, 0x8e,
            0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
        ],
        graphics: [0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x0f, 0xff],
        attribute: [
            0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c, 0x00,
            0x0f, 0x08, 0x00,
        ],
        palette_on: true,
        ..Registers::default()
    };
    for (index, color) in registers.dac.chunks_exact_mut(3).take(64).enumerate() {
        color.copy_from_slice(&ega_color(index as u8));
    }
    registers
}

/// Red, green, blue of the 64 colours of the EGA: two bits each, the strong ones in bits 2, 1, 0.
fn ega_color(index: u8) -> [u8; 3] {
    [2, 1, 0].map(|bit| 0x2a * (index >> bit & 1) + 0x15 * (index >> (bit + 3) & 1))
}

/// Fills the screen with grey blanks on black and loads the font. Returns how many bytes of video memory may have changed.
pub(super) fn fill(vram: &HostRegion) -> usize {
    let glyphs = font::glyphs();
    let mut planes = vec![0; 4 * 8192];
    for (address, planes) in planes.chunks_exact_mut(4).enumerate() {
        let row = address % 32;
        let glyph = glyphs.get(address / 32 * 16 + row).filter(|_| row < 16);
        planes.copy_from_slice(&[b' ', 0x07, glyph.copied().unwrap_or(0), 0]);
    }
    vram.write(0, &planes);
    planes.len()
}
