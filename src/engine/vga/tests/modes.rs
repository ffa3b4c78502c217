//! A card with a mode of the IBM BIOS set, for tests that draw on it as programs did (IBM VGA Technical Reference, mode tables).

use super::*;

/// The registers of a mode. The attribute palette is 0 to 15 but for CGA modes.
pub(super) struct Mode {
    pub(super) misc: u8,
    pub(super) sequencer: [u8; 4],
    pub(super) crtc: [u8; 25],
    pub(super) graphics: [u8; 9],
    /// Registers 0x10 to 0x14.
    pub(super) attribute: [u8; 5],
}

const PLANAR: [u8; 9] = [0, 0, 0, 0, 0, 0, 0x05, 0x0f, 0xff];
const COLORS_16: [u8; 5] = [0x01, 0, 0x0f, 0, 0];

pub(super) const MODE_03: Mode = Mode {
    misc: 0x67,
    sequencer: [0x00, 0x03, 0x00, 0x02],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0, 0x4f, 0x0d, 0x0e, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x28, 0x1f,
        0x96, 0xb9, 0xa3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x10, 0x0e, 0x0f, 0xff],
    attribute: [0x0c, 0, 0x0f, 8, 0],
};
pub(super) const MODE_04: Mode = Mode {
    misc: 0x63,
    sequencer: [0x09, 0x03, 0x00, 0x02],
    crtc: [
        0x2d, 0x27, 0x28, 0x90, 0x2b, 0x80, 0xbf, 0x1f, 0, 0xc1, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x14, 0, 0x96,
        0xb9, 0xa2, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x30, 0x0f, 0x0f, 0xff],
    attribute: [0x01, 0, 0x03, 0, 0],
};
pub(super) const MODE_06: Mode = Mode {
    misc: 0x63,
    sequencer: [0x01, 0x01, 0x00, 0x06],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0, 0xc1, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x28, 0, 0x96,
        0xb9, 0xc2, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0, 0x0d, 0x0f, 0xff],
    attribute: [0x01, 0, 0x01, 0, 0],
};
pub(super) const MODE_0D: Mode = Mode {
    misc: 0x63,
    sequencer: [0x09, 0x0f, 0x00, 0x06],
    crtc: [
        0x2d, 0x27, 0x28, 0x90, 0x2b, 0x80, 0xbf, 0x1f, 0, 0xc0, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x14, 0, 0x96,
        0xb9, 0xe3, 0xff,
    ],
    graphics: PLANAR,
    attribute: COLORS_16,
};
pub(super) const MODE_0E: Mode = Mode {
    sequencer: [0x01, 0x0f, 0x00, 0x06],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0, 0xc0, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x28, 0, 0x96,
        0xb9, 0xe3, 0xff,
    ],
    ..MODE_0D
};
pub(super) const MODE_10: Mode = Mode {
    misc: 0xa3,
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0, 0x40, 0, 0, 0, 0, 0, 0, 0x83, 0x85, 0x5d, 0x28, 0x0f, 0x63,
        0xba, 0xe3, 0xff,
    ],
    ..MODE_0E
};
pub(super) const MODE_12: Mode = Mode {
    misc: 0xe3,
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0x0b, 0x3e, 0, 0x40, 0, 0, 0, 0, 0, 0, 0xea, 0x8c, 0xdf, 0x28, 0, 0xe7,
        0x04, 0xe3, 0xff,
    ],
    ..MODE_0E
};
pub(super) const MODE_13: Mode = Mode {
    misc: 0x63,
    sequencer: [0x01, 0x0f, 0x00, 0x0e],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0, 0x41, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x28, 0x40, 0x96,
        0xb9, 0xa3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x40, 0x05, 0x0f, 0xff],
    attribute: [0x41, 0, 0x0f, 0, 0],
};
/// 320 by 240 pixels of 256 colours in planes ("mode X"), from mode 13h.
pub(super) const MODE_X: Mode = Mode {
    misc: 0xe3,
    sequencer: [0x01, 0x0f, 0x00, 0x06],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0x0d, 0x3e, 0, 0x41, 0, 0, 0, 0, 0, 0, 0xea, 0x2c, 0xdf, 0x28, 0x00, 0xe7,
        0x06, 0xe3, 0xff,
    ],
    ..MODE_13
};
pub(super) const MODES: [Mode; 9] = [MODE_03, MODE_04, MODE_06, MODE_0D, MODE_0E, MODE_10, MODE_12, MODE_13, MODE_X];

/// A DAC entry as the tests load it, six bits each.
pub(super) fn dac(index: u8) -> [u8; 3] {
    [index & 0x3f, index.wrapping_mul(3) >> 2, index >> 2]
}

/// What an entry looks like.
pub(super) fn color(index: u8) -> u32 {
    dac(index).into_iter().fold(0, |all, part| all << 8 | u32::from(part << 2 | part >> 4))
}

pub(super) struct Card {
    pub(super) vga: SharedVga,
    ports: [(Range<u64>, SharedDevice); 3],
    window: SharedDevice,
}

impl Card {
    /// With the mode set, the DAC loaded as `dac` says, and palette registers 0 to 15 as they count.
    pub(super) fn new(mode: &Mode) -> Card {
        let vga = Vga::new().unwrap();
        let card = Card { ports: ports(&vga), window: window(&vga).1, vga };
        card.set(mode);
        card
    }

    pub(super) fn set(&self, mode: &Mode) {
        self.out(0x3c2, mode.misc);
        for index in 0..=255 {
            self.out(0x3c8, index);
            dac(index).into_iter().for_each(|part| self.out(0x3c9, part));
        }
        for (index, value) in mode.sequencer.into_iter().enumerate() {
            self.index(0x3c4, index as u8 + 1, value);
        }
        self.index(0x3d4, 0x11, 0);
        for (index, value) in mode.crtc.into_iter().enumerate() {
            self.index(0x3d4, index as u8, value);
        }
        for (index, value) in mode.graphics.into_iter().enumerate() {
            self.index(0x3ce, index as u8, value);
        }
        (0..16).for_each(|index| self.attribute(index, index));
        for (index, value) in mode.attribute.into_iter().enumerate() {
            self.attribute(index as u8 + 0x10, value);
        }
    }

    pub(super) fn port(&self, port: u16, width: Width, value: u64) {
        let (range, device) = self.ports.iter().find(|(range, _)| range.contains(&u64::from(port))).unwrap();
        let _ = device.lock().unwrap().write(Access::new(u64::from(port) - range.start, width), value);
    }

    pub(super) fn input(&self, port: u16) -> u8 {
        read_port(&self.vga, port)
    }

    pub(super) fn out(&self, port: u16, value: u8) {
        self.port(port, Width::B1, value.into());
    }

    /// Index and data in one word.
    pub(super) fn index(&self, port: u16, index: u8, value: u8) {
        self.port(port, Width::B2, u64::from(value) << 8 | u64::from(index));
    }

    pub(super) fn sequencer(&self, index: u8, value: u8) {
        self.index(0x3c4, index, value);
    }

    pub(super) fn graphics(&self, index: u8, value: u8) {
        self.index(0x3ce, index, value);
    }

    pub(super) fn crtc(&self, index: u8, value: u8) {
        self.index(0x3d4, index, value);
    }

    /// Leaves the screen on.
    pub(super) fn attribute(&self, index: u8, value: u8) {
        self.input(0x3da);
        for byte in [index, value, 0x20] {
            self.out(0x3c0, byte);
        }
    }

    pub(super) fn dispi(&self, index: u16, value: u16) {
        self.port(0x1ce, Width::B2, index.into());
        self.port(0x1cf, Width::B2, value.into());
    }

    pub(super) fn poke(&self, address: u64, byte: u8) {
        self.access(address, Width::B1, byte.into());
    }

    pub(super) fn access(&self, address: u64, width: Width, value: u64) {
        let at = Access::new(address - layout::VGA_WINDOW.start, width);
        assert_eq!(self.window.lock().unwrap().write(at, value), Ok(Effect::None));
    }

    pub(super) fn peek(&self, address: u64) -> u8 {
        let at = Access::new(address - layout::VGA_WINDOW.start, Width::B1);
        self.window.lock().unwrap().read(at).unwrap() as u8
    }

    pub(super) fn scan(&self, lit: Blink) -> ScanOut {
        let vga = lock(&self.vga);
        ScanOut::new(&vga.registers(), vga.vram(), None, lit)
    }

    /// Compares the whole picture with what `expected` says of each dot.
    pub(super) fn shows(&self, size: (usize, usize), expected: impl Fn(usize, usize) -> u32) {
        self.shows_when(Blink::LIT, size, expected);
    }

    pub(super) fn shows_when(&self, lit: Blink, size: (usize, usize), expected: impl Fn(usize, usize) -> u32) {
        let mut scan = self.scan(lit);
        assert_eq!(scan.size(), size);
        let mut line = vec![0; size.0];
        for y in 0..size.1 {
            scan.line(y, &mut line);
            for (x, dot) in line.iter().enumerate() {
                let wanted = expected(x, y);
                assert_eq!(*dot, wanted, "dot {x}, {y}: {dot:06x} is not {wanted:06x}");
            }
        }
    }
}
