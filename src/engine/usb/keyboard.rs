//! A USB keyboard with boot protocol and three lights (HID 1.11, appendix B.1).

use std::collections::VecDeque;

use super::{
    Setup, Stall,
    descriptors::Standard,
    hid::{Asked, Hid, Report},
    keymap::{LEFT_CONTROL, usage},
};
use crate::engine::{
    input::KeyCode,
    saved::{BadState, SaveState, State},
};

const KIND: &str = "usb-keyboard";

/// HID 1.11, appendix E.6: eight modifiers, a reserved byte, six keys; five lights in the output report.
const REPORT_DESCRIPTOR: [u8; 64] = [
    0x05, 0x01, 0x09, 0x06, 0xa1, 0x01, // generic desktop, keyboard
    0x05, 0x07, 0x19, 0xe0, 0x29, 0xe7, 0x15, 0x00, 0x25, 0x01, 0x75, 0x01, 0x95, 0x08, 0x81, 0x02, // modifiers
    0x95, 0x01, 0x75, 0x08, 0x81, 0x01, // reserved
    0x95, 0x05, 0x75, 0x01, 0x05, 0x08, 0x19, 0x01, 0x29, 0x05, 0x91, 0x02, // lights
    0x95, 0x01, 0x75, 0x03, 0x91, 0x01, // padding
    0x95, 0x06, 0x75, 0x08, 0x15, 0x00, 0x26, 0xff, 0x00, 0x05, 0x07, 0x19, 0x00, 0x29, 0xff, 0x81, 0x00, // keys
    0xc0,
];

/// Keys that are told of at once.
const KEYS_MAX: usize = 6;
/// What each of them says when more are down.
const ROLL_OVER: u8 = 1;
/// Keys that are remembered as down; nobody has more fingers.
const HELD_MAX: usize = 32;
/// Reports that wait; when there are more, those in the middle are lost and the last one stays right.
const REPORTS_MAX: usize = 64;

type Bytes = [u8; 8];

pub struct Keyboard {
    hid: Hid,
    modifiers: u8,
    /// Usages of the other keys that are down, in the order of their presses.
    held: Vec<u8>,
    reports: VecDeque<Bytes>,
    leds: u8,
}

impl Default for Keyboard {
    fn default() -> Keyboard {
        Keyboard::new()
    }
}

impl Keyboard {
    pub fn new() -> Keyboard {
        let hid = Hid::new(0x0002, "USB Keyboard", [1, 1], &REPORT_DESCRIPTOR);
        Keyboard { hid, modifiers: 0, held: Vec::new(), reports: VecDeque::new(), leds: 0 }
    }

    /// The lights as the host last set them: bit 0 number lock, bit 1 capitals lock, bit 2 scroll lock.
    pub fn leds(&self) -> u8 {
        self.leds
    }

    /// A key went down or up. Keys that no keyboard has are ignored.
    pub fn key(&mut self, code: KeyCode, down: bool) {
        let Some(usage) = usage(code) else { return };
        if let Some(bit) = usage.checked_sub(LEFT_CONTROL) {
            let bit = 1 << (bit & 7);
            if down { self.modifiers |= bit } else { self.modifiers &= !bit }
        } else {
            let known = self.held.contains(&usage);
            match (down, known) {
                (true, false) if self.held.len() < HELD_MAX => self.held.push(usage),
                (false, true) => self.held.retain(|held| *held != usage),
                // The viewer's keyboard repeats. Whoever set an idle rate, as SeaBIOS does, wants to hear of keys that stay
                // down; everybody else repeats by itself.
                (true, true) if self.hid.idle != 0 => {}
                _ => return,
            }
        }
        self.tell();
    }

    pub(super) fn report(&self) -> Option<Report> {
        self.reports.front().map(|bytes| Report::new(bytes))
    }
    pub(super) fn report_taken(&mut self) {
        self.reports.pop_front();
    }
    pub(super) fn standard(&self) -> &Standard {
        &self.hid.standard
    }

    /// The keys that are down stay down, for the viewers hold them; who resets the keyboard asks anew.
    pub(super) fn reset(&mut self) {
        self.hid.reset();
        self.reports.clear();
        self.leds = 0;
    }

    pub(super) fn control(&mut self, setup: Setup, data: &[u8]) -> Result<Vec<u8>, Stall> {
        match self.hid.control(setup)? {
            Asked::Done(bytes) => Ok(bytes),
            Asked::Input => Ok(self.current().to_vec()),
            Asked::Output => {
                self.leds = data.first().map_or(self.leds, |leds| leds & 0x1f);
                Ok(Vec::new())
            }
        }
    }

    fn current(&self) -> Bytes {
        let mut bytes = [0; 8];
        bytes[0] = self.modifiers;
        if self.held.len() > KEYS_MAX {
            bytes[2..].fill(ROLL_OVER);
        } else {
            for (byte, usage) in bytes[2..].iter_mut().zip(&self.held) {
                *byte = *usage;
            }
        }
        bytes
    }

    fn tell(&mut self) {
        let now = self.current();
        let full = self.reports.len() >= REPORTS_MAX;
        match self.reports.back_mut() {
            // One repetition is enough for a host that is slow.
            Some(last) if *last == now => {}
            Some(last) if full => *last = now,
            _ => self.reports.push_back(now),
        }
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::hid::saved::HidV1;

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) hid: HidV1,
        pub(super) reports: Vec<[u8; 8]>,
        pub(super) leds: u8,
    }
}

impl SaveState for Keyboard {
    fn save(&self) -> State {
        // Whoever held the keys is gone when the guest comes back: the last report lets them go.
        let Keyboard { hid, modifiers, held, reports, leds } = self;
        let mut reports: Vec<Bytes> = reports.iter().copied().collect();
        if (*modifiers != 0 || !held.is_empty()) && reports.last() != Some(&[0; 8]) {
            reports.push([0; 8]);
        }
        State::new(KIND, 1, &saved::V1 { hid: hid.save(), reports, leds: *leds })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { hid, reports, leds } = state.fields(KIND, 1)?;
        BadState::unless(reports.len() <= REPORTS_MAX + 1, KIND, "more reports than can wait")?;
        BadState::unless(leds <= 0x1f, KIND, "lights that are not there")?;
        self.hid.restore(&hid).map_err(|what| BadState::new(KIND, what))?;
        (self.reports, self.leds) = (reports.into(), leds);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::saved::testing::{matches_golden, spoil};

    fn press(keyboard: &mut Keyboard, code: u16, down: bool) -> Option<Vec<u8>> {
        keyboard.key(KeyCode(code), down);
        let report = keyboard.report().map(|report| report.bytes().to_vec());
        keyboard.report_taken();
        report
    }

    #[test]
    fn keys_become_boot_reports() {
        let mut keyboard = Keyboard::new();
        assert_eq!(press(&mut keyboard, 0x2a, true).unwrap(), [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(press(&mut keyboard, 0x1e, true).unwrap(), [2, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(press(&mut keyboard, 0x1e, true), None, "a repetition");
        assert_eq!(press(&mut keyboard, 0xe01d, true).unwrap(), [0x12, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(press(&mut keyboard, 0x7f7f, true), None);
        for code in 0x02..=0x06 {
            press(&mut keyboard, code, true);
        }
        assert_eq!(press(&mut keyboard, 0x07, true).unwrap(), [0x12, 0, 1, 1, 1, 1, 1, 1]);
        assert_eq!(press(&mut keyboard, 0x07, false).unwrap(), [0x12, 0, 4, 0x1e, 0x1f, 0x20, 0x21, 0x22]);
        assert_eq!(press(&mut keyboard, 0x44, false), None, "was not down");
        keyboard.hid.idle = 8;
        assert!(press(&mut keyboard, 0x1e, true).is_some(), "a repetition that is wanted");
    }

    #[test]
    fn when_too_many_reports_wait_the_last_one_is_right() {
        let mut keyboard = Keyboard::new();
        for _ in 0..1000 {
            keyboard.key(KeyCode(0x1e), true);
            keyboard.key(KeyCode(0x1e), false);
        }
        assert_eq!(keyboard.reports.len(), REPORTS_MAX);
        assert_eq!(keyboard.reports.back(), Some(&[0; 8]));
        for code in 1..0x80 {
            keyboard.key(KeyCode(code), true);
        }
        assert_eq!(keyboard.held.len(), HELD_MAX);
    }

    #[test]
    fn a_saved_keyboard_lets_its_keys_go() {
        let mut keyboard = Keyboard::new();
        keyboard.control(Setup { request_type: 0, request: 9, value: 1, ..Setup::default() }, &[]).unwrap();
        keyboard.control(Setup { request_type: 0x21, request: 9, value: 0x200, ..Setup::default() }, &[3]).unwrap();
        keyboard.key(KeyCode(0x2a), true);
        keyboard.key(KeyCode(0x1e), true);
        let state = matches_golden(&keyboard.save());
        let mut second = Keyboard::new();
        second.restore(&state).unwrap();
        assert_eq!((second.leds(), second.standard().configuration), (3, 1));
        assert_eq!(second.reports, [[2, 0, 0, 0, 0, 0, 0, 0], [2, 0, 4, 0, 0, 0, 0, 0], [0; 8]]);
        spoil(&state, |bad| {
            let mut fresh = Keyboard::new();
            let _ = fresh.restore(bad);
            fresh.key(KeyCode(0x1e), true);
            while fresh.report().is_some() {
                fresh.report_taken();
            }
        });
    }
}
