//! A viewer's keyboard and pointer: from keysyms, XT codes and button masks to what the guest's devices take.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::engine::input::{BUTTON_LEFT, BUTTON_MIDDLE, BUTTON_RIGHT, InputSink, KeyCode, POINTER_MAX};

/// One viewer's hands. What it holds is let go when it leaves.
pub(super) struct Hands {
    sink: Arc<dyn InputSink>,
    held: BTreeSet<KeyCode>,
    /// Which key a held keysym became: it is let go as the same, whatever Shift says by then.
    keysyms: BTreeMap<u32, KeyCode>,
    /// As far as this viewer pressed it.
    caps_lock: bool,
    pointer: (u16, u16),
    /// As RFB counts them.
    buttons: u8,
}

const SHIFT_LEFT: KeyCode = KeyCode(0x2a);
const SHIFT_RIGHT: KeyCode = KeyCode(0x36);
const CAPS_LOCK: KeyCode = KeyCode(0x3a);
/// A viewer cannot hold more keysyms than this; the rest is not pressed.
const KEYSYMS_MAX: usize = 128;

impl Hands {
    pub(super) fn new(sink: Arc<dyn InputSink>) -> Hands {
        Hands { sink, held: BTreeSet::new(), keysyms: BTreeMap::new(), caps_lock: false, pointer: (0, 0), buttons: 0 }
    }

    /// A key by its place (QEMU extended key event): the low seven bits are the XT code, bit 7 the 0xE0 prefix.
    pub(super) fn extended_key(&mut self, keysym: u32, keycode: u32, down: bool) {
        match u16::try_from(keycode) {
            Ok(code @ (0x01..=0x7f | 0xe001..=0xe07f)) => self.press(KeyCode(code), down),
            Ok(code @ 0x81..=0xff) => self.press(KeyCode(0xe000 | code & 0x7f), down),
            _ => self.keysym(keysym, down),
        }
    }

    /// A key by its meaning, on a US keyboard. Shift is pressed or let go around it where the meaning needs that.
    pub(super) fn keysym(&mut self, keysym: u32, down: bool) {
        if !down {
            if let Some(code) = self.keysyms.remove(&keysym) {
                self.press(code, false);
            }
            return;
        }
        let Some((code, shift)) = key_of(keysym) else { return };
        if self.keysyms.len() >= KEYSYMS_MAX && !self.keysyms.contains_key(&keysym) {
            return;
        }
        self.keysyms.insert(keysym, code);
        let wanted = match shift {
            Shift::Any => None,
            Shift::Off => Some(false),
            Shift::On => Some(true),
            Shift::Letter { upper } => Some(upper != self.caps_lock),
        };
        let shifts: Vec<KeyCode> =
            [SHIFT_LEFT, SHIFT_RIGHT].into_iter().filter(|code| self.held.contains(code)).collect();
        match (wanted, shifts.is_empty()) {
            (Some(true), true) => {
                self.sink.key(SHIFT_LEFT, true);
                self.press(code, true);
                self.sink.key(SHIFT_LEFT, false);
            }
            (Some(false), false) => {
                shifts.iter().for_each(|shift| self.sink.key(*shift, false));
                self.press(code, true);
                shifts.iter().for_each(|shift| self.sink.key(*shift, true));
            }
            _ => self.press(code, true),
        }
    }

    /// The pointer at `x`, `y` of a picture of this size.
    pub(super) fn pointer(&mut self, buttons: u8, x: u16, y: u16, size: (usize, usize)) {
        let scale = |at: u16, size: usize| {
            let last = size.saturating_sub(1).max(1);
            u16::try_from(usize::from(at).min(last) * usize::from(POINTER_MAX) / last).unwrap_or(POINTER_MAX)
        };
        self.pointer = (scale(x, size.0), scale(y, size.1));
        let pressed = buttons & !self.buttons;
        self.buttons = buttons;
        // Wheel notches are presses of buttons 4 and 5 (bits 3 and 4).
        let wheel = i8::from(pressed & 0x08 != 0) - i8::from(pressed & 0x10 != 0);
        self.point(wheel);
    }

    fn point(&self, wheel: i8) {
        let button = |bit: u8, button: u8| if self.buttons & bit != 0 { button } else { 0 };
        let buttons = button(1, BUTTON_LEFT) | button(2, BUTTON_MIDDLE) | button(4, BUTTON_RIGHT);
        self.sink.pointer(self.pointer.0, self.pointer.1, buttons, wheel);
    }

    fn press(&mut self, code: KeyCode, down: bool) {
        if down {
            let first = self.held.insert(code);
            self.caps_lock ^= first && code == CAPS_LOCK;
        } else {
            self.held.remove(&code);
        }
        self.sink.key(code, down);
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.held.iter().for_each(|code| self.sink.key(*code, false));
        if self.buttons != 0 {
            self.buttons = 0;
            self.point(0);
        }
    }
}

/// How Shift must be for a key to have its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shift {
    Any,
    Off,
    On,
    Letter { upper: bool },
}

/// Rows of a US keyboard: the first key's code, the keys, the keys with Shift.
const ROWS: [(u16, &str, &str); 6] = [
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2b, "\\", "|"),
    (0x2c, "zxcvbnm,./", "ZXCVBNM<>?"),
    (0x39, " ", " "),
];

/// The key of a keysym on a US keyboard (X11 `keysymdef.h` numbers).
fn key_of(keysym: u32) -> Option<(KeyCode, Shift)> {
    if let Some(character) = char::from_u32(keysym).filter(|character| (' '..='~').contains(character)) {
        return ROWS.iter().find_map(|(first, plain, shifted)| {
            let find = |row: &str| row.chars().position(|other| other == character).map(|at| first + at as u16);
            let shift = |other| match character {
                ' ' => Shift::Any,
                'a'..='z' | 'A'..='Z' => Shift::Letter { upper: character.is_ascii_uppercase() },
                _ => other,
            };
            let key = find(plain).map(|code| (code, shift(Shift::Off)));
            key.or_else(|| find(shifted).map(|code| (code, shift(Shift::On))))
                .map(|(code, shift)| (KeyCode(code), shift))
        });
    }
    special(keysym).map(|code| (KeyCode(code), Shift::Any))
}

/// Keys without a character.
fn special(keysym: u32) -> Option<u16> {
    /// Home, Left, Up, Right, Down, Page Up, Page Down, End, Begin: the keypad's codes.
    const NAVIGATION: [u16; 9] = [0x47, 0x4b, 0x48, 0x4d, 0x50, 0x49, 0x51, 0x4f, 0x4c];
    const KEYPAD_DIGITS: [u16; 10] = [0x52, 0x4f, 0x50, 0x51, 0x4b, 0x4c, 0x4d, 0x47, 0x48, 0x49];
    let pick = |codes: &[u16], first: u32| codes.get(usize::try_from(keysym - first).ok()?).copied();
    Some(match keysym {
        0xff08 => 0x0e,          // BackSpace
        0xff09 | 0xfe20 => 0x0f, // Tab
        0xff0d => 0x1c,          // Return
        0xff13 => 0xe046,        // Pause
        0xff14 => 0x46,          // Scroll Lock
        0xff1b => 0x01,          // Escape
        0xff50..=0xff57 => 0xe000 | pick(&NAVIGATION, 0xff50)?,
        0xff61 => 0xe037, // Print
        0xff63 => 0xe052, // Insert
        0xff67 => 0xe05d, // Menu
        0xff7f => 0x45,   // Num Lock
        0xff80 => 0x39,   // keypad space
        0xff8d => 0xe01c, // keypad Enter
        0xff95..=0xff9d => pick(&NAVIGATION, 0xff95)?,
        0xff9e => 0x52,          // keypad Insert
        0xff9f => 0x53,          // keypad Delete
        0xffaa => 0x37,          // keypad *
        0xffab => 0x4e,          // keypad +
        0xffac | 0xffae => 0x53, // keypad separators
        0xffad => 0x4a,          // keypad -
        0xffaf => 0xe035,        // keypad /
        0xffb0..=0xffb9 => pick(&KEYPAD_DIGITS, 0xffb0)?,
        0xffbe..=0xffc7 => 0x3b + u16::try_from(keysym - 0xffbe).ok()?, // F1 to F10
        0xffc8 => 0x57,                                                 // F11
        0xffc9 => 0x58,                                                 // F12
        0xffe1 => SHIFT_LEFT.0,
        0xffe2 => SHIFT_RIGHT.0,
        0xffe3 => 0x1d, // Control
        0xffe4 => 0xe01d,
        0xffe5 => CAPS_LOCK.0,
        0xffe7 | 0xffeb => 0xe05b, // Meta, Super
        0xffe8 | 0xffec => 0xe05c,
        0xffe9 => 0x38,            // Alt
        0xffea | 0xfe03 => 0xe038, // right Alt, AltGr
        0xffff => 0xe053,          // Delete
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);

    impl InputSink for Notes {
        fn key(&self, code: KeyCode, down: bool) {
            self.0.lock().unwrap().push(format!("{}{:x}", if down { '+' } else { '-' }, code.0));
        }
        fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8) {
            self.0.lock().unwrap().push(format!("{x},{y} {buttons} {wheel}"));
        }
    }

    fn noted(act: impl FnOnce(&mut Hands)) -> String {
        let notes = Arc::new(Notes::default());
        let mut hands = Hands::new(Arc::clone(&notes) as Arc<dyn InputSink>);
        act(&mut hands);
        drop(hands);
        notes.0.lock().unwrap().join(" ")
    }

    #[test]
    fn shift_is_put_right_around_a_keysym() {
        let typed = |keysyms: &'static [(u32, bool)]| {
            noted(|hands| keysyms.iter().for_each(|(keysym, down)| hands.keysym(*keysym, *down)))
        };
        assert_eq!(typed(&[(0x41, true), (0x41, false)]), "+2a +1e -2a -1e");
        assert_eq!(typed(&[(0x61, true), (0x61, false)]), "+1e -1e");
        assert_eq!(typed(&[(0xffe1, true), (0x41, true), (0x41, false), (0xffe1, false)]), "+2a +1e -1e -2a");
        assert_eq!(typed(&[(0xffe2, true), (0x37, true), (0x37, false)]), "+36 -36 +8 +36 -8 -36");
        assert_eq!(typed(&[(0xffe5, true), (0xffe5, false), (0x41, true), (0x41, false)]), "+3a -3a +1e -1e");
        assert_eq!(typed(&[(0xff53, true), (0xff53, false), (0x12345, true)]), "+e04d -e04d");
    }

    #[test]
    fn every_printable_character_has_a_key() {
        for keysym in 0x20..0x7f {
            assert!(key_of(keysym).is_some(), "{keysym:x}");
        }
        assert_eq!(key_of('`'.into()), Some((KeyCode(0x29), Shift::Off)));
        assert_eq!(key_of('|'.into()), Some((KeyCode(0x2b), Shift::On)));
        assert_eq!(key_of('/'.into()), Some((KeyCode(0x35), Shift::Off)));
    }

    #[test]
    fn codes_pass_as_they_are_and_are_let_go_at_the_end() {
        assert_eq!(noted(|hands| hands.extended_key(0x61, 0x9d, true)), "+e01d -e01d");
        assert_eq!(noted(|hands| hands.extended_key(0x61, 0x1e, true)), "+1e -1e");
        assert_eq!(noted(|hands| hands.extended_key(0x61, 0, true)), "+1e -1e");
        assert_eq!(noted(|hands| hands.extended_key(0x61, 0xdead_beef, false)), "");
        assert_eq!(noted(|hands| hands.extended_key(0, 0x80, true)), "");
    }

    #[test]
    fn the_pointer_reaches_every_edge_and_lets_go() {
        let seen = noted(|hands| {
            hands.pointer(0, 0, 0, (1024, 768));
            hands.pointer(4, 1023, 767, (1024, 768));
            hands.pointer(0x0c, 65535, 65535, (1, 1));
            hands.pointer(0x10, 0, 0, (1, 1));
        });
        assert_eq!(seen, "0,0 0 0 32767,32767 2 0 32767,32767 2 1 0,0 0 -1 0,0 0 0");
    }
}
