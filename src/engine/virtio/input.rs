//! virtio-input (virtio 1.2, 5.8): a tablet, so that the pointers of page and guest agree.

use std::{
    collections::VecDeque,
    io, slice,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    Features, Interrupts, Kind, Running, VirtioDevice, Worker,
    queue::{Chain, Malformed, VirtQueue},
};
use crate::engine::{
    event::Event,
    input::POINTER_MAX,
    memory::GuestRam,
    saved::{BadState, SaveState, State},
    worker::{Served, Stop, Work},
};

const CFG_ID_NAME: u8 = 0x01;
const CFG_ID_SERIAL: u8 = 0x02;
const CFG_ID_DEVIDS: u8 = 0x03;
const CFG_EV_BITS: u8 = 0x11;
const CFG_ABS_INFO: u8 = 0x12;

// linux/input-event-codes.h
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const EV_REL: u16 = 2;
const EV_ABS: u16 = 3;
const ABS_X: u16 = 0;
const ABS_Y: u16 = 1;
const REL_WHEEL: u16 = 8;
const BUTTONS: [u16; 3] = [0x110, 0x111, 0x112]; // left, right, middle: the order of `input.rs`

/// Events that wait for buffers of the guest; more are dropped, whole reports at a time.
const EVENTS_MAX: usize = 256;
const EVENT_BYTES: u64 = 8;

/// What viewers did, on its way into the guest. Clones are the same queue.
#[derive(Clone)]
pub struct TabletInput(Arc<Pending>);

struct Pending {
    state: Mutex<PointerState>,
    wake: Event,
}

#[derive(Default)]
struct PointerState {
    events: VecDeque<InputEvent>,
    buttons: u8,
}

#[derive(Clone, Copy)]
struct InputEvent {
    kind: u16,
    code: u16,
    value: i32,
}

impl TabletInput {
    /// As `InputSink::pointer`.
    pub fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
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
        state.events.push_back(InputEvent { kind: EV_SYN, code: 0, value: 0 });
        drop(state);
        self.0.wake.signal();
    }
}

pub struct Tablet {
    worker: Worker,
    select: [u8; 2],
    input: TabletInput,
}

impl Tablet {
    pub fn new() -> io::Result<Tablet> {
        let input = TabletInput(Arc::new(Pending { state: Mutex::default(), wake: Event::new()? }));
        let feed = Feed { pending: Arc::clone(&input.0), chain: Chain::default() };
        Ok(Tablet { worker: Worker::spawn("tablet", feed)?, select: [0; 2], input })
    }

    pub fn input(&self) -> TabletInput {
        self.input.clone()
    }

    /// The answer to what `select` asks for (virtio 1.2, 5.8.4).
    fn answer(&self) -> Vec<u8> {
        let bits = |codes: &[u16]| {
            let mut bitmap = vec![0u8; codes.iter().max().map_or(0, |max| usize::from(*max) / 8 + 1)];
            for code in codes {
                if let Some(byte) = bitmap.get_mut(usize::from(*code) / 8) {
                    *byte |= 1 << (code % 8);
                }
            }
            bitmap
        };
        let [select, sub] = self.select;
        match (select, u16::from(sub)) {
            (CFG_ID_NAME, 0) => b"Innkeeper tablet".to_vec(),
            (CFG_ID_SERIAL, 0) => b"0".to_vec(),
            (CFG_ID_DEVIDS, 0) => [6u16, 0x1af4, 2, 1].iter().flat_map(|id| id.to_le_bytes()).collect(),
            (CFG_EV_BITS, EV_KEY) => bits(&BUTTONS),
            (CFG_EV_BITS, EV_REL) => bits(&[REL_WHEEL]),
            (CFG_EV_BITS, EV_ABS) => bits(&[ABS_X, ABS_Y]),
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
        &[64, 64]
    }
    fn offered(&self) -> Features {
        0
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let answer = self.answer();
        let mut config = vec![self.select[0], self.select[1], answer.len() as u8, 0, 0, 0, 0, 0];
        config.extend(answer);
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        for (into, byte) in self.select.iter_mut().skip(offset).zip(bytes) {
            *into = *byte;
        }
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

struct Feed {
    pending: Arc<Pending>,
    chain: Chain,
}

impl Work<Running> for Feed {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let [events, rest @ ..] = queues.as_mut_slice() else { return Err(Malformed) };
        loop {
            let mut more = self.feed(ram, events, interrupts, stop)?;
            // The status queue carries LEDs, which a tablet has not: buffers go straight back.
            for status in rest.iter_mut() {
                while !stop.asked() && status.pop(ram, &mut self.chain)? {
                    status.push(ram, self.chain.head, 0, interrupts)?;
                }
                more |= status.enable_kicks(ram)?;
            }
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if more {
                continue;
            }
            let wake = PollFd::new(&self.pending.wake, PollFlags::IN);
            let waited = match &*rest {
                [status, ..] => stop.wait(&[wake, events.kicked(), status.kicked()]),
                [] => stop.wait(&[wake, events.kicked()]),
            };
            if !waited {
                return Ok(Served::Stopped);
            }
            self.pending.wake.clear();
            events.kick.clear();
            for status in rest.iter() {
                status.kick.clear();
            }
        }
    }

    fn forget(&mut self) {
        self.pending.state.lock().unwrap_or_else(PoisonError::into_inner).events.clear();
    }
}

impl Feed {
    /// Gives the guest what waits, as far as it has buffers. True when it queued one just now.
    fn feed(
        &mut self,
        ram: &GuestRam,
        events: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while !stop.asked() {
            let mut state = self.pending.state.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(event) = state.events.front().copied() else { break };
            if !events.pop(ram, &mut self.chain)? {
                drop(state);
                return events.enable_kicks(ram);
            }
            state.events.pop_front();
            drop(state);
            let mut bytes = [0; EVENT_BYTES as usize];
            bytes[0..2].copy_from_slice(&event.kind.to_le_bytes());
            bytes[2..4].copy_from_slice(&event.code.to_le_bytes());
            bytes[4..8].copy_from_slice(&event.value.to_le_bytes());
            if !self.chain.write(ram, 0, &bytes).map_err(|_| Malformed)? {
                return Err(Malformed);
            }
            events.push(ram, self.chain.head, EVENT_BYTES as u32, interrupts)?;
        }
        Ok(false)
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
        let state = input.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let PointerState { events, buttons } = &*state;
        let plain = |InputEvent { kind, code, value }: &InputEvent| (*kind, *code, *value);
        let fields = saved::V1 { select: *select, buttons: *buttons, events: events.iter().map(plain).collect() };
        State::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { select, buttons, events } = state.fields(saved::KIND, 1)?;
        BadState::unless(events.len() <= EVENTS_MAX, saved::KIND, "more events wait than are kept")?;
        self.select = select;
        let mut state = self.input.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.buttons = buttons;
        state.events = events.into_iter().map(|(kind, code, value)| InputEvent { kind, code, value }).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{
        bus::Width,
        input::{BUTTON_LEFT, BUTTON_RIGHT},
        saved::testing::{matches_golden, spoil},
        virtio::testing::{BUFFERS, Driver, EVENT_IDX, Region, VERSION_1, eventually, readable, writable},
    };

    fn plug() -> (Driver, TabletInput) {
        let tablet = Tablet::new().unwrap();
        let input = tablet.input();
        (Driver::plug(tablet), input)
    }

    fn asked(driver: &mut Driver, select: u8, sub: u8) -> Vec<u8> {
        driver.registers.write(Region::Device, 0, Width::B1, select.into());
        driver.registers.write(Region::Device, 1, Width::B1, sub.into());
        let bytes = driver.registers.read(Region::Device, 2, Width::B1);
        (0..bytes).map(|at| driver.registers.read(Region::Device, 8 + at, Width::B1) as u8).collect()
    }

    /// Queues `count` buffers of eight bytes.
    fn offer(driver: &mut Driver, count: u64) {
        for _ in 0..count {
            let at = BUFFERS + 8 * u64::from(driver.next_head(0));
            driver.add(0, &[writable(at, 8)]);
        }
        driver.registers.kick(0);
    }

    fn event(driver: &mut Driver) -> (u16, u16, i32) {
        let used = driver.wait_used(0);
        assert_eq!(used.bytes, 8);
        let bytes = driver.bytes(BUFFERS + 8 * u64::from(used.head), 8);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (half(0), half(2), i32::from(half(4)) | i32::from(half(6) as i16) << 16)
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
        let twin = Tablet { worker: tablet.worker.clone(), select: [0; 2], input: tablet.input() };
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
        twin.select = [CFG_EV_BITS, EV_KEY as u8];
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
        assert_eq!(twin.select, [CFG_EV_BITS, EV_KEY as u8]);
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
