//! PS/2 keyboard and mouse, as seen from the wire behind the i8042 (IBM PS/2 Technical Reference; Microsoft wheel extension).
//!
//! Answers to commands wait in a queue of their own and go out before scan codes and movement.

use std::collections::VecDeque;

/// Scan codes that may wait before presses are dropped; releases have twice the room, so that no key hangs.
const KEY_BYTES_MAX: usize = 64;
/// Mouse bytes that may wait before movement is gathered instead of queued, and before clicks are dropped.
const MOVE_BYTES_MAX: usize = 8;
const CLICK_BYTES_MAX: usize = 64;

pub(super) const ACK: u8 = 0xfa;
pub(super) const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
const ECHO: u8 = 0xee;

/// Scan code set 2 to set 1, as the controller translates (IBM PS/2 Technical Reference, keyboard controller).
pub(super) const TO_SET_1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];
/// The two set 2 codes beyond the table: F7 and Alt+SysRq.
const F7: u8 = 0x83;
const SYSRQ: u8 = 0x84;

/// One set 2 byte in set 1.
pub(super) fn to_set_1(byte: u8) -> u8 {
    match byte {
        F7 => 0x41,
        SYSRQ => 0x54,
        byte => TO_SET_1.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}

/// The set 2 code of a set 1 key; nothing for numbers that are no key.
fn to_set_2(code: u8) -> Option<u8> {
    match code {
        0 | 0x80.. => None,
        0x41 => Some(F7),
        0x54 => Some(SYSRQ),
        code => TO_SET_1.iter().position(|set_1| *set_1 == code).and_then(|at| u8::try_from(at).ok()),
    }
}

/// The keyboard.
#[derive(Default)]
pub(super) struct Keyboard {
    replies: VecDeque<u8>,
    codes: VecDeque<u8>,
    last: u8,
    scanning: bool,
    set_1: bool,
    leds: u8,
    alt: bool,
    /// A command that still wants its argument.
    pending: Option<u8>,
    dropped: u64,
}

const EXTENDED: u16 = 0xe000;
/// Keys that send more than a prefix and a code.
const PAUSE: u16 = 0xe046;
const PRINT: u16 = 0xe037;
const ALT_PRINT: u16 = 0x0054;

impl Keyboard {
    pub(super) fn new() -> Keyboard {
        Keyboard { scanning: true, ..Keyboard::default() }
    }

    /// Lights: bit 0 scroll lock, bit 1 number lock, bit 2 capitals lock.
    pub(super) fn leds(&self) -> u8 {
        self.leds
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn next_byte(&mut self) -> Option<u8> {
        let byte = self.replies.pop_front().or_else(|| self.codes.pop_front())?;
        self.last = byte;
        Some(byte)
    }

    /// A key by its set 1 code; extended keys are 0xE0xx, Pause is 0xE046, Print is 0xE037 or 0x54.
    pub(super) fn key(&mut self, code: u16, down: bool) {
        if code & 0xff == 0x38 {
            self.alt = down;
        }
        if !self.scanning {
            return;
        }
        let Some(bytes) = self.bytes_of(code, down) else { return };
        let room = if down { KEY_BYTES_MAX } else { 2 * KEY_BYTES_MAX };
        if self.codes.len() + bytes.len() > room {
            self.dropped += 1;
            return;
        }
        self.codes.extend(bytes);
    }

    fn bytes_of(&self, code: u16, down: bool) -> Option<Vec<u8>> {
        let low = (code & 0xff) as u8;
        let extended = match code & 0xff00 {
            0 => false,
            EXTENDED => true,
            _ => return None,
        };
        match code {
            // Pause sends both its halves at once and nothing at release.
            PAUSE if !down => return None,
            PAUSE if self.set_1 => return Some(vec![0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]),
            PAUSE => return Some(vec![0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]),
            PRINT | ALT_PRINT if !self.alt => {
                return Some(match (self.set_1, down) {
                    (true, true) => vec![0xe0, 0x2a, 0xe0, 0x37],
                    (true, false) => vec![0xe0, 0xb7, 0xe0, 0xaa],
                    (false, true) => vec![0xe0, 0x12, 0xe0, 0x7c],
                    (false, false) => vec![0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12],
                });
            }
            PRINT => return self.bytes_of(ALT_PRINT, down),
            _ => {}
        }
        let set_2 = to_set_2(low)?;
        let mut bytes = Vec::with_capacity(3);
        if extended {
            bytes.push(0xe0);
        }
        match (self.set_1, down) {
            (true, true) => bytes.push(low),
            (true, false) => bytes.push(low | 0x80),
            (false, true) => bytes.push(set_2),
            (false, false) => bytes.extend([0xf0, set_2]),
        }
        Some(bytes)
    }

    /// A byte from the host. Every byte is answered.
    pub(super) fn command(&mut self, byte: u8) {
        if let Some(command) = self.pending.take()
            && byte < 0xed
        {
            self.argument(command, byte);
            return;
        }
        match byte {
            0xff => {
                *self = Keyboard { alt: self.alt, dropped: self.dropped, ..Keyboard::new() };
                self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            0xfe => self.answer(&[self.last]),
            0xf6 | 0xf5 => {
                self.codes.clear();
                self.set_1 = false;
                self.scanning = byte == 0xf6;
                self.answer(&[ACK]);
            }
            0xf4 => {
                self.codes.clear();
                self.scanning = true;
                self.answer(&[ACK]);
            }
            0xf2 => self.answer(&[ACK, 0xab, 0x83]),
            0xee => self.answer(&[ECHO]),
            // Key types exist in set 3 only; accepted as real keyboards do.
            0xf7..=0xfa => self.answer(&[ACK]),
            0xed | 0xf0 | 0xf3 => {
                self.pending = Some(byte);
                self.answer(&[ACK]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn argument(&mut self, command: u8, byte: u8) {
        match (command, byte) {
            (0xed, leds) => {
                self.leds = leds & 7;
                self.answer(&[ACK]);
            }
            (0xf0, 0) => self.answer(&[ACK, if self.set_1 { 1 } else { 2 }]),
            (0xf0, 1 | 2) => {
                self.set_1 = byte == 1;
                self.codes.clear();
                self.answer(&[ACK]);
            }
            (0xf0, _) => self.answer(&[RESEND]), // set 3
            // The typematic rate: viewers repeat their keys themselves.
            _ => self.answer(&[ACK]),
        }
    }

    /// One command's answer replaces one that was not read.
    fn answer(&mut self, bytes: &[u8]) {
        self.replies.clear();
        self.replies.extend(bytes);
    }
}

/// The mouse: 3 buttons and a wheel, relative.
#[derive(Default)]
pub(super) struct Mouse {
    replies: VecDeque<u8>,
    packets: VecDeque<u8>,
    last: u8,
    /// 0 plain, 3 with wheel, 4 with wheel and five buttons.
    id: u8,
    reporting: bool,
    /// Sends only when asked (EB).
    remote: bool,
    wrap: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    /// The last three rates, the knock that opens the extensions.
    knock: [u8; 3],
    pending: Option<u8>,
    buttons: u8,
    moved: [i32; 3],
    dropped: u64,
}

/// Movement that nobody fetches is not gathered without end.
const MOVED_MAX: i32 = 4096;

impl Mouse {
    pub(super) fn new() -> Mouse {
        Mouse { resolution: 2, rate: 100, ..Mouse::default() }
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn next_byte(&mut self) -> Option<u8> {
        if let Some(byte) = self.replies.pop_front() {
            self.last = byte;
            return Some(byte);
        }
        if self.packets.is_empty() && self.streams() && self.moved != [0; 3] {
            self.queue_packet();
        }
        let byte = self.packets.pop_front()?;
        self.last = byte;
        Some(byte)
    }

    /// Movement in screen directions (right, down, wheel towards the user) and the buttons held now: bit 0 left, 1 right,
    /// 2 middle, 3 and 4 the side buttons.
    pub(super) fn moved(&mut self, right: i32, down: i32, wheel: i32, buttons: u8) {
        let step = [right, down.saturating_neg(), wheel];
        for (sum, step) in self.moved.iter_mut().zip(step) {
            *sum = sum.saturating_add(step).clamp(-MOVED_MAX, MOVED_MAX);
        }
        let clicked = buttons != self.buttons;
        if !self.streams() {
            self.buttons = buttons;
            if !self.remote {
                self.moved = [0; 3];
            }
            return;
        }
        if clicked && self.packets.len() > CLICK_BYTES_MAX {
            self.dropped += 1; // the next packet carries the buttons as they are then
        }
        self.buttons = buttons;
        let room = if clicked { CLICK_BYTES_MAX } else { MOVE_BYTES_MAX };
        if (clicked || self.moved != [0; 3]) && self.packets.len() <= room {
            self.queue_packet();
        }
    }

    fn streams(&self) -> bool {
        self.reporting && !self.remote && !self.wrap
    }

    /// Takes as much of the movement as one packet holds.
    fn queue_packet(&mut self) {
        let packet = self.take_packet();
        self.packets.extend(packet);
    }

    fn take_packet(&mut self) -> Vec<u8> {
        let mut take = |axis: usize, most: i32| {
            let part = self.moved[axis].clamp(-most, most);
            self.moved[axis] -= part;
            part
        };
        let (x, y) = (take(0, 127), take(1, 127));
        let wheel = if self.id == 0 { take(2, MOVED_MAX) } else { take(2, 7) };
        let signs = if x < 0 { 0x10 } else { 0 } | if y < 0 { 0x20 } else { 0 };
        let mut packet = vec![0x08 | self.buttons & 7 | signs, x as u8, y as u8];
        match self.id {
            3 => packet.push(wheel as u8),
            4 => packet.push(wheel as u8 & 0x0f | (self.buttons & 0x18) << 1),
            _ => {}
        }
        packet
    }

    pub(super) fn command(&mut self, byte: u8) {
        if self.wrap && byte != 0xff && byte != 0xec {
            self.answer(&[byte]);
            return;
        }
        if let Some(command) = self.pending.take() {
            self.argument(command, byte);
            return;
        }
        match byte {
            0xff => {
                *self = Mouse { buttons: self.buttons, dropped: self.dropped, ..Mouse::new() };
                self.answer(&[ACK, SELF_TEST_PASSED, self.id]);
            }
            0xfe => self.answer(&[self.last]),
            0xf6 => {
                *self = Mouse { id: self.id, buttons: self.buttons, dropped: self.dropped, ..Mouse::new() };
                self.answer(&[ACK]);
            }
            0xf5 | 0xf4 => {
                self.reporting = byte == 0xf4;
                self.forget_movement();
                self.answer(&[ACK]);
            }
            0xf2 => self.answer(&[ACK, self.id]),
            0xf0 | 0xea => {
                self.remote = byte == 0xf0;
                self.forget_movement();
                self.answer(&[ACK]);
            }
            0xee | 0xec => {
                self.wrap = byte == 0xee;
                self.answer(&[ACK]);
            }
            0xeb => {
                let packet = self.take_packet();
                self.answer(&[ACK]);
                self.replies.extend(packet);
            }
            0xe9 => {
                let mode =
                    (u8::from(self.remote) << 6) | (u8::from(self.reporting) << 5) | (u8::from(self.scaling) << 4);
                // Left is bit 2, middle bit 1, right bit 0.
                let held = (self.buttons & 1) << 2 | (self.buttons & 2) >> 1 | (self.buttons & 4) >> 1;
                self.answer(&[ACK, mode | held, self.resolution, self.rate]);
            }
            0xe6 | 0xe7 => {
                self.scaling = byte == 0xe7;
                self.answer(&[ACK]);
            }
            0xe8 | 0xf3 => {
                self.pending = Some(byte);
                self.answer(&[ACK]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn argument(&mut self, command: u8, byte: u8) {
        if command == 0xe8 {
            self.resolution = byte & 3;
        } else {
            self.rate = byte;
            self.knock = [self.knock[1], self.knock[2], byte];
            match (self.knock, self.id) {
                ([200, 100, 80], 0) => self.id = 3,
                ([200, 200, 80], 0 | 3) => self.id = 4,
                _ => {}
            }
        }
        self.answer(&[ACK]);
    }

    fn forget_movement(&mut self) {
        self.packets.clear();
        self.moved = [0; 3];
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.replies.clear();
        self.replies.extend(bytes);
    }
}

pub(super) mod saved {
    use serde::{Deserialize, Serialize};

    use crate::engine::saved::hex;

    #[derive(Serialize, Deserialize)]
    pub(in crate::engine) struct KeyboardV1 {
        #[serde(with = "hex")]
        pub(super) replies: Vec<u8>,
        #[serde(with = "hex")]
        pub(super) codes: Vec<u8>,
        pub(super) last: u8,
        pub(super) scanning: bool,
        pub(super) set_1: bool,
        pub(super) leds: u8,
        pub(super) alt: bool,
        pub(super) pending: Option<u8>,
    }

    #[derive(Serialize, Deserialize)]
    pub(in crate::engine) struct MouseV1 {
        #[serde(with = "hex")]
        pub(super) replies: Vec<u8>,
        #[serde(with = "hex")]
        pub(super) packets: Vec<u8>,
        pub(super) last: u8,
        pub(super) id: u8,
        pub(super) reporting: bool,
        pub(super) remote: bool,
        pub(super) wrap: bool,
        pub(super) scaling: bool,
        pub(super) resolution: u8,
        pub(super) rate: u8,
        pub(super) knock: [u8; 3],
        pub(super) pending: Option<u8>,
        pub(super) buttons: u8,
        pub(super) moved: [i32; 3],
    }
}

/// The longest answer: an acknowledge and a packet of four bytes.
const REPLY_BYTES_MAX: usize = 5;

impl Keyboard {
    pub(super) fn save(&self) -> saved::KeyboardV1 {
        // How many were dropped is a count for people, of this run.
        let Keyboard { replies, codes, last, scanning, set_1, leds, alt, pending, dropped: _ } = self;
        saved::KeyboardV1 {
            replies: replies.iter().copied().collect(),
            codes: codes.iter().copied().collect(),
            last: *last,
            scanning: *scanning,
            set_1: *set_1,
            leds: *leds,
            alt: *alt,
            pending: *pending,
        }
    }

    /// The keyboard that was saved, or what about it cannot be.
    pub(super) fn restored(fields: saved::KeyboardV1) -> Result<Keyboard, &'static str> {
        let saved::KeyboardV1 { replies, codes, last, scanning, set_1, leds, alt, pending } = fields;
        if replies.len() > REPLY_BYTES_MAX || codes.len() > 2 * KEY_BYTES_MAX {
            return Err("the keyboard has more to send than it keeps");
        }
        Ok(Keyboard {
            replies: replies.into(),
            codes: codes.into(),
            last,
            scanning,
            set_1,
            leds: leds & 7,
            alt,
            pending,
            dropped: 0,
        })
    }
}

impl Mouse {
    pub(super) fn save(&self) -> saved::MouseV1 {
        let Mouse {
            replies,
            packets,
            last,
            id,
            reporting,
            remote,
            wrap,
            scaling,
            resolution,
            rate,
            knock,
            pending,
            buttons,
            moved,
            dropped: _,
        } = self;
        saved::MouseV1 {
            replies: replies.iter().copied().collect(),
            packets: packets.iter().copied().collect(),
            last: *last,
            id: *id,
            reporting: *reporting,
            remote: *remote,
            wrap: *wrap,
            scaling: *scaling,
            resolution: *resolution,
            rate: *rate,
            knock: *knock,
            pending: *pending,
            buttons: *buttons,
            moved: *moved,
        }
    }

    /// The mouse that was saved, or what about it cannot be.
    pub(super) fn restored(fields: saved::MouseV1) -> Result<Mouse, &'static str> {
        if fields.replies.len() > REPLY_BYTES_MAX || fields.packets.len() > CLICK_BYTES_MAX + 4 {
            return Err("the mouse has more to send than it keeps");
        }
        if !matches!(fields.id, 0 | 3 | 4) {
            return Err("there is no such mouse");
        }
        Ok(Mouse {
            replies: fields.replies.into(),
            packets: fields.packets.into(),
            last: fields.last,
            id: fields.id,
            reporting: fields.reporting,
            remote: fields.remote,
            wrap: fields.wrap,
            scaling: fields.scaling,
            resolution: fields.resolution & 3,
            rate: fields.rate,
            knock: fields.knock,
            pending: fields.pending,
            buttons: fields.buttons,
            moved: fields.moved.map(|sum| sum.clamp(-MOVED_MAX, MOVED_MAX)),
            dropped: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mut next: impl FnMut() -> Option<u8>) -> Vec<u8> {
        std::iter::from_fn(&mut next).collect()
    }

    fn ask_keyboard(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes
            .iter()
            .flat_map(|byte| {
                keyboard.command(*byte);
                drain(|| keyboard.next_byte())
            })
            .collect()
    }

    fn ask_mouse(mouse: &mut Mouse, bytes: &[u8]) -> Vec<u8> {
        bytes
            .iter()
            .flat_map(|byte| {
                mouse.command(*byte);
                drain(|| mouse.next_byte())
            })
            .collect()
    }

    #[test]
    fn every_key_survives_both_translations() {
        for code in 1..=0x7f {
            let set_2 = to_set_2(code).unwrap();
            assert_eq!(to_set_1(set_2), code, "{code:#x}");
        }
        assert_eq!(to_set_2(0x1e), Some(0x1c), "A");
        assert_eq!(to_set_2(0), None);
        assert_eq!([to_set_1(0xfa), to_set_1(0xaa), to_set_1(0xe0)], [0xfa, 0xaa, 0xe0]);
    }

    #[test]
    fn keys_come_as_set_2_or_set_1() {
        let mut keyboard = Keyboard::new();
        keyboard.key(0x1e, true);
        keyboard.key(0x1e, false);
        keyboard.key(0xe04b, true);
        keyboard.key(0xe046, true);
        keyboard.key(0xe046, false);
        assert_eq!(
            drain(|| keyboard.next_byte()),
            [0x1c, 0xf0, 0x1c, 0xe0, 0x6b, 0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]
        );
        assert_eq!(ask_keyboard(&mut keyboard, &[0xf0, 1, 0xf0, 0]), [ACK, ACK, ACK, ACK, 1]);
        keyboard.key(0xe04b, false);
        assert_eq!(drain(|| keyboard.next_byte()), [0xe0, 0xcb]);
    }

    #[test]
    fn print_is_another_key_with_alt() {
        let mut keyboard = Keyboard::new();
        keyboard.key(0x54, true);
        assert_eq!(drain(|| keyboard.next_byte()), [0xe0, 0x12, 0xe0, 0x7c]);
        keyboard.key(0x38, true);
        keyboard.key(0xe037, true);
        assert_eq!(drain(|| keyboard.next_byte()), [0x11, 0x84]);
    }

    #[test]
    fn a_driver_brings_the_keyboard_up() {
        let mut keyboard = Keyboard::new();
        let answers = ask_keyboard(&mut keyboard, &[0xff, 0xf2, 0xed, 0x07, 0xf3, 0x00, 0xf4, 0xee, 0xf0, 0x03, 0x12]);
        assert_eq!(answers, [ACK, 0xaa, ACK, 0xab, 0x83, ACK, ACK, ACK, ACK, ACK, 0xee, ACK, RESEND, RESEND]);
        assert_eq!(keyboard.leds(), 7);
        assert_eq!(ask_keyboard(&mut keyboard, &[0xf5]), [ACK]);
        keyboard.key(0x1e, true);
        assert_eq!(keyboard.next_byte(), None, "scanning is off");
        assert_eq!(ask_keyboard(&mut keyboard, &[0xed, 0xf4]), [ACK, ACK], "a command ends a wait for an argument");
    }

    #[test]
    fn keys_nobody_fetches_are_dropped_but_releases_last() {
        let mut keyboard = Keyboard::new();
        for _ in 0..100 {
            keyboard.key(0x1e, true);
        }
        assert_eq!(keyboard.codes.len(), KEY_BYTES_MAX);
        assert_eq!(keyboard.dropped(), 36);
        keyboard.key(0x1e, false);
        assert_eq!(keyboard.codes.len(), KEY_BYTES_MAX + 2);
        for _ in 0..100 {
            keyboard.key(0x1e, false);
        }
        assert_eq!(keyboard.codes.len(), 2 * KEY_BYTES_MAX);
        keyboard.key(0xffff, true);
        keyboard.key(0xe0ff, true);
    }

    #[test]
    fn a_driver_finds_the_wheel() {
        let mut mouse = Mouse::new();
        assert_eq!(ask_mouse(&mut mouse, &[0xff]), [ACK, 0xaa, 0]);
        assert_eq!(ask_mouse(&mut mouse, &[0xf3, 200, 0xf3, 100, 0xf3, 80]), [ACK; 6]);
        assert_eq!(ask_mouse(&mut mouse, &[0xf2]), [ACK, 3]);
        assert_eq!(ask_mouse(&mut mouse, &[0xf3, 200, 0xf3, 200, 0xf3, 80, 0xf2])[6..], [ACK, 4]);
        assert_eq!(ask_mouse(&mut mouse, &[0xe8, 3, 0xe9]), [ACK, ACK, ACK, 0, 3, 80]);
        assert_eq!(ask_mouse(&mut mouse, &[0xff]), [ACK, 0xaa, 0], "back to plain");
    }

    #[test]
    fn movement_is_reported_with_signs_buttons_and_wheel() {
        let mut mouse = Mouse::new();
        mouse.moved(5, 5, 0, 1);
        assert_eq!(mouse.next_byte(), None, "reporting is off");
        ask_mouse(&mut mouse, &[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4]);
        mouse.moved(3, 2, -1, 1);
        assert_eq!(drain(|| mouse.next_byte()), [0x29, 3, 0xfe, 0xff]);
        mouse.moved(-200, 0, 0, 4);
        assert_eq!(drain(|| mouse.next_byte()), [0x1c, 0x81, 0, 0, 0x1c, 0xb7, 0, 0], "two packets, 200 steps");
    }

    #[test]
    fn movement_nobody_fetches_is_gathered() {
        let mut mouse = Mouse::new();
        ask_mouse(&mut mouse, &[0xf4]);
        for _ in 0..1000 {
            mouse.moved(1, 0, 0, 0);
        }
        assert!(mouse.packets.len() <= MOVE_BYTES_MAX + 4);
        let total: i32 = drain(|| mouse.next_byte()).chunks(3).map(|packet| i32::from(packet[1])).sum();
        assert_eq!(total, 1000);
        for round in 0..1000 {
            mouse.moved(i32::MIN, i32::MAX, i32::MAX, (round & 1) as u8);
        }
        assert!(mouse.packets.len() <= CLICK_BYTES_MAX + 4 && mouse.dropped() > 0);
    }

    #[test]
    fn remote_and_wrap_modes_answer() {
        let mut mouse = Mouse::new();
        assert_eq!(ask_mouse(&mut mouse, &[0xf0]), [ACK]);
        mouse.moved(7, 0, 0, 0);
        assert_eq!(ask_mouse(&mut mouse, &[0xeb]), [ACK, 0x08, 7, 0]);
        assert_eq!(ask_mouse(&mut mouse, &[0xee, 0x42, 0xec]), [ACK, 0x42, ACK]);
        assert_eq!(ask_mouse(&mut mouse, &[0x00]), [RESEND]);
    }
}
