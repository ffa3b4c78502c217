//! virtio-input (virtio 1.2, 5.8): a tablet, so that the pointers of page and guest agree.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    Features, Kind, Running, VirtioDevice,
    queue::{Chain, Malformed},
    worker::{Served, Stop, Work, Worker},
};
use crate::engine::{event::Event, input::POINTER_MAX};

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
    fn worker(&self) -> &Worker {
        &self.worker
    }
}

struct Feed {
    pending: Arc<Pending>,
    chain: Chain,
}

impl Work for Feed {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let [events, rest @ ..] = queues.as_mut_slice() else { return Err(Malformed) };
        loop {
            loop {
                let mut state = self.pending.state.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(event) = state.events.front().copied() else { break };
                if !events.pop(ram, &mut self.chain)? {
                    break;
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
            // The status queue carries LEDs, which a tablet has not: buffers go straight back.
            for status in rest.iter_mut() {
                while status.pop(ram, &mut self.chain)? {
                    status.push(ram, self.chain.head, 0, interrupts)?;
                }
                status.enable_kicks(ram)?;
            }
            events.enable_kicks(ram)?;
            let mut fds = vec![PollFd::new(&self.pending.wake, PollFlags::IN), events.kicked()];
            fds.extend(rest.iter().map(|status| status.kicked()));
            if !stop.wait(&fds) {
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
