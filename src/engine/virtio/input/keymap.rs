//! Keys as viewers name them, XT (set 1) make codes, and as Linux numbers them (linux/input-event-codes.h), which is what a
//! virtio keyboard says.

use crate::engine::input::KeyCode;

const EXTENDED: u16 = 0xe000;
/// Linux gave the keys of a PC/XT their codes of set 1, Escape to the keypad's point.
const SAME: std::ops::RangeInclusive<u16> = 0x01..=0x53;

/// The other codes without prefix.
const PLAIN: [(u8, u8); 28] = [
    (0x54, 99), // Print with Alt
    (0x56, 86), // the key beside left Shift
    (0x57, 87), // F11, F12
    (0x58, 88),
    (0x59, 117), // keypad =
    (0x5c, 95),  // keypad comma of Japanese keyboards
    (0x64, 183), // F13 to F23
    (0x65, 184),
    (0x66, 185),
    (0x67, 186),
    (0x68, 187),
    (0x69, 188),
    (0x6a, 189),
    (0x6b, 190),
    (0x6c, 191),
    (0x6d, 192),
    (0x6e, 193),
    (0x70, 93),  // Katakana/Hiragana
    (0x71, 123), // Hanja
    (0x72, 122), // Hangul
    (0x73, 89),  // Ro
    (0x76, 194), // F24
    (0x77, 91),  // Hiragana
    (0x78, 90),  // Katakana
    (0x79, 92),  // Henkan
    (0x7b, 94),  // Muhenkan
    (0x7d, 124), // Yen
    (0x7e, 121), // keypad comma
];

/// Codes with the prefix 0xE0.
const PREFIXED: [(u8, u8); 24] = [
    (0x1c, 96),  // keypad Enter
    (0x1d, 97),  // right Control
    (0x20, 113), // mute, then volume down and up
    (0x2e, 114),
    (0x30, 115),
    (0x35, 98),  // keypad /
    (0x37, 99),  // Print
    (0x38, 100), // right Alt
    (0x45, 69),  // Num Lock
    (0x46, 119), // Pause
    (0x47, 102), // Home
    (0x48, 103), // Up
    (0x49, 104), // Page Up
    (0x4b, 105), // Left
    (0x4d, 106), // Right
    (0x4f, 107), // End
    (0x50, 108), // Down
    (0x51, 109), // Page Down
    (0x52, 110), // Insert
    (0x53, 111), // Delete
    (0x5b, 125), // left and right Meta, Menu
    (0x5c, 126),
    (0x5d, 127),
    (0x5e, 116), // Power
];

/// Linux' number of a key, if it is on a keyboard.
pub(super) fn linux_code(code: KeyCode) -> Option<u8> {
    let [low, _] = code.0.to_le_bytes();
    let find = |table: &[(u8, u8)]| table.iter().find(|(xt, _)| *xt == low).map(|(_, linux)| *linux);
    match code.0 & 0xff00 {
        0 if SAME.contains(&code.0) => Some(low),
        0 => find(&PLAIN),
        EXTENDED => find(&PREFIXED),
        _ => None,
    }
}

/// All keys, some more than once.
pub(super) fn all() -> impl Iterator<Item = u8> {
    let others = PLAIN.iter().chain(&PREFIXED).map(|(_, linux)| *linux);
    SAME.filter_map(|code| u8::try_from(code).ok()).chain(others)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::engine::usb::keymap::usage;

    fn codes() -> impl Iterator<Item = KeyCode> {
        (0..=u16::MAX).map(KeyCode)
    }

    #[test]
    fn it_has_the_keys_of_the_usb_keyboard_and_they_are_the_same_ones() {
        let mut by_usage = BTreeMap::new();
        for code in codes() {
            assert_eq!(linux_code(code).is_some(), usage(code).is_some(), "{code:x?}");
            if let (Some(linux), Some(usage)) = (linux_code(code), usage(code)) {
                assert_eq!(*by_usage.entry(usage).or_insert(linux), linux, "{code:x?}");
            }
        }
        let distinct: BTreeSet<u8> = by_usage.values().copied().collect();
        assert_eq!(distinct.len(), by_usage.len(), "no two keys are one");
    }

    #[test]
    fn numbers_are_those_of_linux() {
        for (xt, linux) in [
            (0x01, 1),     // KEY_ESC
            (0x1e, 30),    // KEY_A
            (0x2b, 43),    // KEY_BACKSLASH
            (0x3a, 58),    // KEY_CAPSLOCK
            (0x45, 69),    // KEY_NUMLOCK
            (0x46, 70),    // KEY_SCROLLLOCK
            (0x58, 88),    // KEY_F12
            (0xe01c, 96),  // KEY_KPENTER
            (0xe04b, 105), // KEY_LEFT
            (0xe05d, 127), // KEY_COMPOSE
        ] {
            assert_eq!(linux_code(KeyCode(xt)), Some(linux), "{xt:#x}");
        }
        for none in [0, 0x80, 0xff, 0x1e1e, 0xe000, 0xe01e, 0xffff] {
            assert_eq!(linux_code(KeyCode(none)), None, "{none:#x}");
        }
        let said: BTreeSet<u8> = codes().filter_map(linux_code).collect();
        assert_eq!(said, all().collect(), "what can be pressed is what the configuration names");
    }
}
