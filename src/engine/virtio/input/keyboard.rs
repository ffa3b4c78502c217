//! A keyboard with three lights, for guests that have a driver for this rather than for USB or an i8042.
//!
//! Keys repeat as the viewer's keyboard does: the driver is not told that it should repeat them itself.

use std::{
    collections::VecDeque,
    io, slice,
    sync::{Arc, atomic::Ordering},
};

use super::{
    CFG_EV_BITS, CFG_ID_DEVIDS, CFG_ID_NAME, CFG_ID_SERIAL, EV_KEY, EV_LED, Feed, InputEvent, Pending, QUEUE_SIZES,
    Selected, Side, bitmap, device_ids, keymap,
};
use crate::engine::{
    input::KeyCode,
    saved::{BadState, SaveState, State},
    virtio::{Features, Kind, VirtioDevice, Worker},
};

const KIND: &str = "virtio-keyboard";
const PRODUCT: u16 = 1;

/// LED_NUML, LED_CAPSL, LED_SCROLLL (linux/input-event-codes.h).
const LIGHTS: u16 = 3;

// What a key's event says (linux, Documentation/input/event-codes.rst, EV_KEY).
const RELEASED: i32 = 0;
const PRESSED: i32 = 1;
const REPEATED: i32 = 2;

/// A key's event and the end of the report.
const REPORT_EVENTS: usize = 2;
/// Events that wait before presses are dropped. Whatever is held can be let go beyond that, so that no key hangs.
const PRESSES_MAX: usize = 128;
/// Keys that can be held at once.
const KEYS: usize = u8::MAX as usize + 1;
const EVENTS_MAX: usize = PRESSES_MAX + KEYS * REPORT_EVENTS;

/// What viewers do, on its way into the guest. Clones are the same keyboard.
#[derive(Clone)]
pub struct KeyboardInput(Arc<Pending<Keys>>);

#[derive(Default)]
struct Keys {
    events: VecDeque<InputEvent>,
    /// By Linux' numbers, as far as the guest was told.
    held: Held,
    /// A bit for each of the lights.
    leds: u8,
}

/// A bit for each key.
#[derive(Default)]
struct Held([u64; KEYS / 64]);

impl Held {
    fn has(&self, key: u8) -> bool {
        self.0.get(usize::from(key / 64)).is_some_and(|word| word >> (key % 64) & 1 != 0)
    }

    fn set(&mut self, key: u8, down: bool) {
        if let Some(word) = self.0.get_mut(usize::from(key / 64)) {
            let bit = 1 << (key % 64);
            *word = if down { *word | bit } else { *word & !bit };
        }
    }

    fn iter(&self) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(|key| self.has(*key))
    }
}

impl Side for Keys {
    fn events(&mut self) -> &mut VecDeque<InputEvent> {
        &mut self.events
    }

    fn hear(&mut self, InputEvent { kind, code, value }: InputEvent) {
        if kind == EV_LED && code < LIGHTS {
            let bit = 1 << code;
            self.leds = if value == 0 { self.leds & !bit } else { self.leds | bit };
        }
    }

    /// A driver that begins knows of no key, and what a viewer still holds is pressed anew when it repeats.
    fn forget(&mut self) {
        *self = Keys::default();
    }
}

fn report(key: u8, value: i32) -> [InputEvent; REPORT_EVENTS] {
    [InputEvent { kind: EV_KEY, code: key.into(), value }, InputEvent::END]
}

impl KeyboardInput {
    /// As `InputSink::key`. Keys that no keyboard has are ignored.
    pub fn key(&self, code: KeyCode, down: bool) {
        let Some(key) = keymap::linux_code(code) else { return };
        let mut keys = self.0.lock();
        let value = match (down, keys.held.has(key)) {
            (true, false) => PRESSED,
            (true, true) => REPEATED,
            (false, true) => RELEASED,
            (false, false) => return,
        };
        if down && keys.events.len() + REPORT_EVENTS > PRESSES_MAX {
            return;
        }
        keys.held.set(key, down);
        keys.events.extend(report(key, value));
        drop(keys);
        self.0.wake.signal();
    }

    /// Whether a driver listens, so that keys need not go to another keyboard.
    pub fn has_driver(&self) -> bool {
        self.0.driven.load(Ordering::Acquire)
    }

    /// The lights: bit 0 number lock, bit 1 capitals lock, bit 2 scroll lock.
    pub fn leds(&self) -> u8 {
        self.0.lock().leds
    }
}

pub struct Keyboard {
    worker: Worker,
    select: Selected,
    input: KeyboardInput,
}

impl Keyboard {
    pub fn new() -> io::Result<Keyboard> {
        let input = KeyboardInput(Pending::new()?);
        Ok(Keyboard { worker: Worker::spawn("keyboard", Feed::new(&input.0))?, select: Selected::default(), input })
    }

    pub fn input(&self) -> KeyboardInput {
        self.input.clone()
    }

    /// The answer to what is selected (virtio 1.2, 5.8.4).
    fn answer(&self) -> Vec<u8> {
        let Selected([select, part]) = self.select;
        match (select, u16::from(part)) {
            (CFG_ID_NAME, 0) => b"Innkeeper keyboard".to_vec(),
            (CFG_ID_SERIAL, 0) => b"0".to_vec(),
            (CFG_ID_DEVIDS, 0) => device_ids(PRODUCT),
            (CFG_EV_BITS, EV_KEY) => bitmap(keymap::all().map(u16::from)),
            (CFG_EV_BITS, EV_LED) => bitmap(0..LIGHTS),
            _ => Vec::new(),
        }
    }
}

impl VirtioDevice for Keyboard {
    fn kind(&self) -> Kind {
        Kind::Input
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn offered(&self) -> Features {
        0
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        self.select.read(&self.answer(), offset, into);
    }
    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        self.select.write(offset, bytes);
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) select: [u8; 2],
        pub(super) leds: u8,
        /// Type, code and value of what waits.
        pub(super) events: Vec<(u16, u16, i32)>,
    }
}

impl SaveState for Keyboard {
    fn save(&self) -> State {
        let Keyboard { worker: _, select, input } = self;
        let keys = input.0.lock();
        let Keys { events, held, leds } = &*keys;
        // Whoever held the keys is gone when the guest comes back.
        let let_go = held.iter().flat_map(|key| report(key, RELEASED));
        let events = events.iter().copied().chain(let_go).map(|event| event.plain()).collect();
        State::new(KIND, 1, &saved::V1 { select: select.0, leds: *leds, events })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { select, leds, events } = state.fields(KIND, 1)?;
        BadState::unless(events.len() <= EVENTS_MAX, KIND, "more events wait than are kept")?;
        BadState::unless(leds < 1 << LIGHTS, KIND, "lights that are not there")?;
        self.select = Selected(select);
        let events = events.into_iter().map(InputEvent::from_plain).collect();
        *self.input.0.lock() = Keys { events, held: Held::default(), leds };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            EV_SYN,
            testing::{asked, event, offer},
        },
        *,
    };
    use crate::engine::{
        saved::testing::{matches_golden, spoil},
        virtio::testing::{BUFFERS, Driver, EVENT_IDX, NEEDS_RESET, VERSION_1, eventually, readable, writable},
    };

    const A: KeyCode = KeyCode(0x1e);
    const LEFT_SHIFT: KeyCode = KeyCode(0x2a);
    const ARROW_UP: KeyCode = KeyCode(0xe048);
    const END: (u16, u16, i32) = (EV_SYN, 0, 0);

    fn key(code: u16, value: i32) -> (u16, u16, i32) {
        (EV_KEY, code, value)
    }

    /// A device and another handle on it.
    fn plug() -> (Driver, Keyboard) {
        let keyboard = Keyboard::new().unwrap();
        let twin = Keyboard { worker: keyboard.worker.clone(), select: Selected::default(), input: keyboard.input() };
        (Driver::plug(keyboard), twin)
    }

    fn started() -> (Driver, Keyboard) {
        let (mut driver, twin) = plug();
        driver.start(VERSION_1);
        (driver, twin)
    }

    /// Says something on the status queue, in a buffer of so many bytes.
    fn say(driver: &mut Driver, kind: u16, code: u16, value: i32, bytes: u32) {
        let at = BUFFERS + 0x1000;
        driver.fill(at, &InputEvent { kind, code, value }.to_bytes());
        assert_eq!(driver.run(1, &[readable(at, bytes)]).bytes, 0);
    }

    #[test]
    fn the_configuration_describes_a_keyboard_that_does_not_repeat() {
        let (mut driver, _) = plug();
        assert_eq!(asked(&mut driver, 1, 0), b"Innkeeper keyboard");
        assert_eq!(asked(&mut driver, 3, 0), [6, 0, 0xf4, 0x1a, 1, 0, 1, 0]);
        let keys = asked(&mut driver, 0x11, 1);
        assert_eq!((keys.len(), keys[0]), (194 / 8 + 1, 0xfe), "KEY_F24 is the last one");
        let count: u32 = keys.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(count as usize, keymap::all().collect::<std::collections::BTreeSet<_>>().len());
        assert!((30..=40).all(|key| keys[key / 8] >> (key % 8) & 1 != 0), "letters");
        assert_eq!(asked(&mut driver, 0x11, 0x11), [0b111]);
        for nothing in [(0, 0), (0x10, 0), (0x11, 0), (0x11, 2), (0x11, 3), (0x11, 0x14), (0x12, 0), (0xff, 0xff)] {
            assert_eq!(asked(&mut driver, nothing.0, nothing.1), [0; 0], "{nothing:?}");
        }
    }

    #[test]
    fn keys_become_events_and_repeat_as_the_viewer_does() {
        let (mut driver, twin) = started();
        offer(&mut driver, 16);
        twin.input.key(LEFT_SHIFT, true);
        twin.input.key(A, true);
        twin.input.key(A, true);
        twin.input.key(A, false);
        twin.input.key(A, false);
        twin.input.key(ARROW_UP, false);
        twin.input.key(KeyCode(0x7f7f), true);
        twin.input.key(LEFT_SHIFT, false);
        twin.input.key(ARROW_UP, true);
        let events: Vec<_> = (0..12).map(|_| event(&mut driver)).collect();
        let expected =
            [key(42, 1), END, key(30, 1), END, key(30, 2), END, key(30, 0), END, key(42, 0), END, key(103, 1), END];
        assert_eq!(events, expected);
        eventually("an interrupt", || driver.messages(1) > 0);
    }

    #[test]
    fn lights_are_what_the_driver_says_and_nothing_else() {
        let (mut driver, twin) = plug();
        driver.start(VERSION_1 | EVENT_IDX);
        for (code, value, expected) in [(0, 1, 0b001), (1, i32::MIN, 0b011), (2, 7, 0b111), (1, 0, 0b101)] {
            say(&mut driver, EV_LED, code, value, 8);
            assert_eq!(twin.input.leds(), expected);
        }
        for (kind, code, bytes) in [
            (EV_LED, 3, 8),
            (EV_LED, 8, 8),
            (EV_LED, u16::MAX, 8),
            (EV_SYN, 1, 8),
            (EV_KEY, 1, 8),
            (u16::MAX, 1, 8),
            (EV_LED, 1, 7),
            (EV_LED, 1, 1),
        ] {
            say(&mut driver, kind, code, 1, bytes);
        }
        // A buffer to write into, one in pieces, and one with more than an event.
        assert_eq!(driver.run(1, &[writable(BUFFERS, 8)]).bytes, 0);
        assert_eq!(twin.input.leds(), 0b101);
        driver.fill(BUFFERS, &InputEvent { kind: EV_LED, code: 1, value: 1 }.to_bytes());
        assert_eq!(driver.run(1, &[readable(BUFFERS, 3), readable(BUFFERS + 3, 100)]).bytes, 0);
        assert_eq!(twin.input.leds(), 0b111);
        driver.registers.reset();
        assert_eq!(twin.input.leds(), 0, "a driver that begins says it again");
    }

    #[test]
    fn it_has_a_driver_from_driver_ok_to_a_reset_or_a_broken_rule() {
        let (mut driver, twin) = plug();
        assert!(!twin.input.has_driver());
        driver.prepare(VERSION_1, 16);
        assert!(!twin.input.has_driver());
        driver.driver_ok();
        eventually("a driver", || twin.input.has_driver());
        driver.registers.reset();
        assert!(!twin.input.has_driver());
        driver.start(VERSION_1);
        eventually("a driver", || twin.input.has_driver());
        twin.worker.hold();
        assert!(twin.input.has_driver(), "of a machine that is paused");
        twin.worker.release();
        driver.submit(0, &[writable(BUFFERS, 7)]);
        twin.input.key(A, true);
        driver.registers.wait_needs_reset();
        assert!(!twin.input.has_driver(), "keys go elsewhere");
    }

    #[test]
    fn presses_are_dropped_when_nobody_reads_and_no_key_hangs() {
        let (mut driver, twin) = started();
        for _ in 0..3 {
            for code in (0..=0x7f).chain(0xe000..=0xe07f) {
                twin.input.key(KeyCode(code), true);
            }
        }
        for code in (0..=0x7f).chain(0xe000..=0xe07f) {
            twin.input.key(KeyCode(code), false);
        }
        assert!(twin.input.0.lock().events.len() <= EVENTS_MAX);
        let mut down = std::collections::BTreeSet::new();
        let reports = twin.input.0.lock().events.len() / 2;
        assert!(reports > PRESSES_MAX / 2);
        for _ in 0..reports {
            offer(&mut driver, 2);
            let (kind, code, value) = event(&mut driver);
            assert_eq!((kind, event(&mut driver)), (EV_KEY, END));
            match value {
                PRESSED => assert!(down.insert(code), "{code} is pressed twice"),
                RELEASED => assert!(down.remove(&code), "{code} was not held"),
                _ => assert!(down.contains(&code)),
            }
        }
        assert!(down.is_empty(), "{down:?}");
        twin.input.key(A, true);
        offer(&mut driver, 2);
        assert_eq!(event(&mut driver), key(30, 1), "and the next key comes");
    }

    #[test]
    fn a_reset_forgets_what_waits_and_what_is_held() {
        let (mut driver, twin) = started();
        for code in 0..=0x7f {
            twin.input.key(KeyCode(code), true);
        }
        driver.start(VERSION_1);
        offer(&mut driver, 4);
        twin.input.key(LEFT_SHIFT, false);
        twin.input.key(A, true);
        assert_eq!([event(&mut driver), event(&mut driver)], [key(30, 1), END], "pressed, not repeated");
    }

    #[test]
    fn buffers_that_are_none_need_a_reset() {
        let (mut driver, twin) = plug();
        let mut broken = |queue: u16, at: u64, bytes: u32, flags: u16, next: u16| {
            driver.start(VERSION_1);
            driver.descriptor(queue, 0, at, bytes, flags, next);
            driver.make_available(queue, 0);
            driver.registers.kick(queue);
            twin.input.key(A, true);
            driver.registers.wait_needs_reset();
        };
        for queue in [0, 1] {
            broken(queue, u64::MAX, 8, 2, 0);
            broken(queue, 8 << 20, 8, 0, 0);
            broken(queue, BUFFERS, 8, 1, 0);
            broken(queue, BUFFERS, 8, 1, 999);
            broken(queue, BUFFERS, u32::MAX, 2, 0);
        }
        broken(0, BUFFERS, 7, 2, 0);
        broken(0, BUFFERS, 8, 0, 0);
        driver.start(VERSION_1);
        offer(&mut driver, 2);
        twin.input.key(A, true);
        assert_eq!(event(&mut driver), key(30, 1));
        assert_eq!(driver.registers.status() & NEEDS_RESET, 0);
    }

    #[test]
    fn a_reset_while_keys_come_returns() {
        let (mut driver, twin) = plug();
        let input = twin.input.clone();
        let typist = std::thread::spawn(move || {
            for round in 0..20_000u32 {
                input.key(A, round % 2 == 0);
            }
        });
        while !typist.is_finished() {
            driver.start(VERSION_1);
            offer(&mut driver, 8);
            say(&mut driver, EV_LED, 1, 1, 8);
            driver.registers.reset();
        }
        typist.join().unwrap();
        driver.start(VERSION_1);
        offer(&mut driver, 4);
        twin.input.key(ARROW_UP, true);
        assert_eq!([event(&mut driver), event(&mut driver)], [key(103, 1), END]);
    }

    /// A light burns, a key is held, and half of its report waits for buffers.
    fn busy() -> (Driver, Keyboard) {
        let (mut driver, mut twin) = started();
        say(&mut driver, EV_LED, 1, 1, 8);
        twin.input.key(LEFT_SHIFT, true);
        offer(&mut driver, 1);
        assert_eq!(event(&mut driver), key(42, 1));
        twin.worker.hold();
        twin.select = Selected([CFG_EV_BITS, EV_LED as u8]);
        (driver, twin)
    }

    #[test]
    fn a_restored_keyboard_ends_the_report_and_lets_go_of_keys() {
        let (first, twin) = busy();
        let state = matches_golden(&twin.save());
        let (mut driver, mut twin) = plug();
        twin.worker.hold();
        driver.take_over(&first);
        twin.restore(&state).unwrap();
        assert_eq!((twin.select, twin.input.leds()), (Selected([CFG_EV_BITS, EV_LED as u8]), 0b010));
        twin.worker.release();
        eventually("the driver of before", || twin.input.has_driver());
        offer(&mut driver, 8);
        assert_eq!([event(&mut driver), event(&mut driver), event(&mut driver)], [END, key(42, 0), END]);
        twin.input.key(LEFT_SHIFT, false);
        twin.input.key(LEFT_SHIFT, true);
        assert_eq!(event(&mut driver), key(42, 1), "nobody held it");
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        let (_first, saved) = busy();
        let (mut driver, mut twin) = plug();
        spoil(&saved.save(), |bad| {
            twin.worker.hold();
            driver.start(VERSION_1);
            let _ = twin.restore(bad);
            let mut config = [0; 256];
            twin.read_config(0, &mut config);
            twin.worker.release();
            assert!(twin.input.leds() < 8);
            twin.input.key(A, true);
            offer(&mut driver, 8);
            event(&mut driver);
            say(&mut driver, EV_LED, 0, 0, 8);
        });
    }
}
