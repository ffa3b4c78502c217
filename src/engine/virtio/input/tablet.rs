//! A tablet, so that the pointers of page and guest agree.

use std::{collections::VecDeque, io, slice, sync::Arc};

use super::{
    CFG_ABS_INFO, CFG_EV_BITS, CFG_ID_DEVIDS, CFG_ID_NAME, CFG_ID_SERIAL, EV_ABS, EV_KEY, EV_REL, Feed, InputEvent,
    Pending, QUEUE_SIZES, Selected, Side, bitmap, device_ids,
};
use crate::engine::{
    input::POINTER_MAX,
    saved::{BadState, SaveState, State},
    virtio::{Features, Kind, VirtioDevice, Worker},
};

const PRODUCT: u16 = 2;

// linux/input-event-codes.h
const ABS_X: u16 = 0;
const ABS_Y: u16 = 1;
const REL_WHEEL: u16 = 8;
const BUTTONS: [u16; 3] = [0x110, 0x111, 0x112]; // left, right, middle: the order of `input.rs`

/// Events that wait for buffers of the guest; more are dropped, whole reports at a time.
const EVENTS_MAX: usize = 256;

/// What viewers did, on its way into the guest. Clones are the same queue.
#[derive(Clone)]
pub struct TabletInput(Arc<Pending<PointerState>>);

#[derive(Default)]
struct PointerState {
    events: VecDeque<InputEvent>,
    buttons: u8,
}

impl Side for PointerState {
    fn events(&mut self) -> &mut VecDeque<InputEvent> {
        &mut self.events
    }
    fn forget(&mut self) {
        self.events.clear();
    }
}

impl TabletInput {
    /// As `InputSink::pointer`.
    pub fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8) {
        let mut state = self.0.lock();
        if state.events.len() + 8 > EVENTS_MAX {
            return;
        }
        for (code, value) in [(ABS_X, x), (ABS_Y, y)] {
            state.events.push_back(InputEvent { kind: EV_ABS, code, value: i32::from(value.min(POINTER_MAX)) });
        }
        let changed = state.buttons ^ buttons;
        for (bit, code) in BUTTONS.into_iter().enumerate() {
            if changed >> bit & 1 != 0 {
                state.events.push_back(InputEvent { kind: EV_KEY, code, value: i32::from(buttons >> bit & 1) });
            }
        }
        if wheel != 0 {
            let value = i32::from(wheel);
            state.events.push_back(InputEvent { kind: EV_REL, code: REL_WHEEL, value });
        }
        state.buttons = buttons;
        state.events.push_back(InputEvent::END);
        drop(state);
        self.0.wake.signal();
    }
}

pub struct Tablet {
    worker: Worker,
    select: Selected,
    input: TabletInput,
}

impl Tablet {
    pub fn new() -> io::Result<Tablet> {
        let input = TabletInput(Pending::new()?);
        Ok(Tablet { worker: Worker::spawn("tablet", Feed::new(&input.0))?, select: Selected::default(), input })
    }

    pub fn input(&self) -> TabletInput {
        self.input.clone()
    }

    /// The answer to what `select` asks for (virtio 1.2, 5.8.4).
    fn answer(&self) -> Vec<u8> {
        let Selected([select, part]) = self.select;
        match (select, u16::from(part)) {
            (CFG_ID_NAME, 0) => b"Innkeeper tablet".to_vec(),
            (CFG_ID_SERIAL, 0) => b"0".to_vec(),
            (CFG_ID_DEVIDS, 0) => device_ids(PRODUCT),
            (CFG_EV_BITS, EV_KEY) => bitmap(BUTTONS),
            (CFG_EV_BITS, EV_REL) => bitmap([REL_WHEEL]),
            (CFG_EV_BITS, EV_ABS) => bitmap([ABS_X, ABS_Y]),
            (CFG_ABS_INFO, ABS_X | ABS_Y) => {
                [0, u32::from(POINTER_MAX), 0, 0, 0].iter().flat_map(|value: &u32| value.to_le_bytes()).collect()
            }
            _ => Vec::new(),
        }
    }
}

impl VirtioDevice for Tablet {
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

    pub(super) const KIND: &str = "virtio-input";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) select: [u8; 2],
        pub(super) buttons: u8,
        /// Type, code and value of what waits.
        pub(super) events: Vec<(u16, u16, i32)>,
    }
}

impl SaveState for Tablet {
    fn save(&self) -> State {
        let Tablet { worker: _, select, input } = self;
        let state = input.0.lock();
        let PointerState { events, buttons } = &*state;
        let events = events.iter().map(InputEvent::plain).collect();
        let fields = saved::V1 { select: select.0, buttons: *buttons, events };
        State::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { select, buttons, events } = state.fields(saved::KIND, 1)?;
        BadState::unless(events.len() <= EVENTS_MAX, saved::KIND, "more events wait than are kept")?;
        self.select = Selected(select);
        let mut state = self.input.0.lock();
        state.buttons = buttons;
        state.events = events.into_iter().map(InputEvent::from_plain).collect();
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
        input::{BUTTON_LEFT, BUTTON_RIGHT},
        saved::testing::{matches_golden, spoil},
        virtio::testing::{BUFFERS, Driver, EVENT_IDX, VERSION_1, eventually, readable, writable},
    };

    fn plug() -> (Driver, TabletInput) {
        let tablet = Tablet::new().unwrap();
        let input = tablet.input();
        (Driver::plug(tablet), input)
    }

    #[test]
    fn the_configuration_describes_a_tablet() {
        let (mut driver, _) = plug();
        assert_eq!(asked(&mut driver, 1, 0), b"Innkeeper tablet");
        assert_eq!(asked(&mut driver, 3, 0).len(), 8);
        let keys = asked(&mut driver, 0x11, 1);
        assert_eq!((keys.len(), keys[0x110 / 8]), (0x112 / 8 + 1, 0b111));
        assert_eq!(asked(&mut driver, 0x11, 3), [0b11]);
        assert_eq!(asked(&mut driver, 0x11, 2), [0, 1]);
        let axis = asked(&mut driver, 0x12, 1);
        assert_eq!((axis.len(), &axis[4..8]), (20, &[0xff, 0x7f, 0, 0][..]));
        for nothing in [(0, 0), (0x12, 2), (0x11, 4), (0x10, 0), (0xff, 0xff)] {
            assert_eq!(asked(&mut driver, nothing.0, nothing.1), [0; 0], "{nothing:?}");
        }
    }

    #[test]
    fn a_pointer_becomes_events_and_buttons_change_once() {
        let (mut driver, input) = plug();
        driver.start(VERSION_1);
        offer(&mut driver, 15);
        input.pointer(100, u16::MAX, BUTTON_LEFT, 0);
        input.pointer(101, 7, BUTTON_LEFT, -1);
        input.pointer(102, 8, BUTTON_RIGHT, 0);
        let events: Vec<_> = (0..13).map(|_| event(&mut driver)).collect();
        let x = |value| (EV_ABS, ABS_X, value);
        let y = |value| (EV_ABS, ABS_Y, value);
        let end = (EV_SYN, 0, 0);
        assert_eq!(events[..4], [x(100), y(i32::from(POINTER_MAX)), (EV_KEY, 0x110, 1), end]);
        assert_eq!(events[4..8], [x(101), y(7), (EV_REL, REL_WHEEL, -1), end]);
        assert_eq!(events[8..13], [x(102), y(8), (EV_KEY, 0x110, 0), (EV_KEY, 0x111, 1), end]);
        eventually("an interrupt", || driver.messages(1) > 0);
    }

    #[test]
    fn events_wait_for_buffers_up_to_a_limit_and_a_reset_forgets_them() {
        let (mut driver, input) = plug();
        driver.start(VERSION_1);
        for _ in 0..10_000 {
            input.pointer(1, 2, 0, 0);
        }
        let mut events = 0;
        while events < EVENTS_MAX / 3 * 3 - 6 {
            offer(&mut driver, 3);
            let report = [event(&mut driver), event(&mut driver), event(&mut driver)];
            assert_eq!(report, [(EV_ABS, ABS_X, 1), (EV_ABS, ABS_Y, 2), (EV_SYN, 0, 0)], "whole reports");
            events += 3;
        }
        driver.start(VERSION_1);
        offer(&mut driver, 3);
        input.pointer(5, 6, 0, 0);
        assert_eq!(event(&mut driver), (EV_ABS, ABS_X, 5));
    }

    #[test]
    fn the_status_queue_gives_everything_back() {
        let (mut driver, _) = plug();
        driver.start(VERSION_1 | EVENT_IDX);
        for _ in 0..40 {
            assert_eq!(driver.run(1, &[readable(BUFFERS, 8)]).bytes, 0);
        }
    }

    #[test]
    fn a_buffer_without_room_for_an_event_needs_a_reset() {
        let (mut driver, input) = plug();
        for piece in [writable(BUFFERS, 7), readable(BUFFERS, 8)] {
            driver.start(VERSION_1);
            driver.submit(0, &[piece]);
            input.pointer(1, 2, 0, 0);
            driver.registers.wait_needs_reset();
        }
        driver.start(VERSION_1);
        offer(&mut driver, 8);
        input.pointer(3, 4, 0, 0);
        assert_eq!(event(&mut driver), (EV_ABS, ABS_X, 3));
    }

    #[test]
    fn no_event_is_lost_between_a_look_at_the_queue_and_the_wait() {
        let (mut driver, input) = plug();
        driver.start(VERSION_1 | EVENT_IDX);
        // A driver that kicks only when the device asks for it, and gives one buffer at a time.
        for round in 0..3000u16 {
            input.pointer(round, 2, 0, 0);
            for expected in [(EV_ABS, ABS_X, i32::from(round)), (EV_ABS, ABS_Y, 2), (EV_SYN, 0, 0)] {
                let before = driver.available(0);
                let head = driver.add(0, &[writable(BUFFERS, 8)]);
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                if driver.avail_event(0) == before {
                    driver.registers.kick(0);
                }
                assert_eq!(driver.wait_used(0).head, head);
                let bytes = driver.bytes(BUFFERS, 8);
                assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), expected.0);
                assert_eq!(i32::from(u16::from_le_bytes([bytes[4], bytes[5]])), expected.2);
            }
        }
    }

    /// A device and another handle on it.
    fn plug_with_twin() -> (Driver, Tablet) {
        let tablet = Tablet::new().unwrap();
        let twin = Tablet { worker: tablet.worker.clone(), select: Selected::default(), input: tablet.input() };
        (Driver::plug(tablet), twin)
    }

    /// A button is held, and half of the report waits for buffers.
    fn busy() -> (Driver, Tablet) {
        let (mut driver, mut twin) = plug_with_twin();
        driver.start(VERSION_1);
        twin.input.pointer(100, 200, BUTTON_LEFT, 0);
        offer(&mut driver, 2);
        assert_eq!([event(&mut driver), event(&mut driver)], [(EV_ABS, ABS_X, 100), (EV_ABS, ABS_Y, 200)]);
        twin.worker.hold();
        twin.select = Selected([CFG_EV_BITS, EV_KEY as u8]);
        (driver, twin)
    }

    #[test]
    fn half_a_report_is_ended_after_a_restore() {
        let (_first, twin) = busy();
        let state = matches_golden(&twin.save());
        let (mut driver, mut twin) = plug_with_twin();
        twin.worker.hold();
        driver.start(VERSION_1);
        twin.restore(&state).unwrap();
        assert_eq!(twin.select, Selected([CFG_EV_BITS, EV_KEY as u8]));
        twin.worker.release();
        offer(&mut driver, 8);
        assert_eq!([event(&mut driver), event(&mut driver)], [(EV_KEY, 0x110, 1), (EV_SYN, 0, 0)]);
        twin.input.pointer(1, 2, 0, 0);
        let events: Vec<_> = (0..4).map(|_| event(&mut driver)).collect();
        assert_eq!(events[2], (EV_KEY, 0x110, 0), "the button was known to be held");
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        let (_first, saved) = busy();
        let (mut driver, mut twin) = plug_with_twin();
        spoil(&saved.save(), |bad| {
            twin.worker.hold();
            driver.start(VERSION_1);
            let _ = twin.restore(bad);
            let mut config = [0; 64];
            twin.read_config(0, &mut config);
            twin.worker.release();
            twin.input.pointer(1, 2, 0, 0);
            offer(&mut driver, 8);
            event(&mut driver);
        });
    }
}
