//! virtio-input (virtio 1.2, 5.8): what devices of this kind share. Events wait for buffers of the guest on the first queue; on the
//! second one the driver says what lights are to burn.

mod keyboard;
mod keymap;
mod tablet;
#[cfg(test)]
mod testing;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{PollFd, PollFlags};

pub use self::{
    keyboard::{Keyboard, KeyboardInput},
    tablet::{Tablet, TabletInput},
};
use super::{
    Interrupts, Running,
    queue::{Chain, Malformed, VirtQueue},
};
use crate::engine::{
    event::Event,
    memory::GuestRam,
    worker::{Served, Stop, Work},
};

/// Events and status (5.8.2).
const QUEUE_SIZES: [u16; 2] = [64, 64];

// virtio 1.2, 5.8.4
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
const EV_LED: u16 = 0x11;

const EVENT_BYTES: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InputEvent {
    kind: u16,
    code: u16,
    value: i32,
}

impl InputEvent {
    /// The end of a report.
    const END: InputEvent = InputEvent { kind: EV_SYN, code: 0, value: 0 };

    /// As in a saved state.
    fn plain(&self) -> (u16, u16, i32) {
        (self.kind, self.code, self.value)
    }

    fn from_plain((kind, code, value): (u16, u16, i32)) -> InputEvent {
        InputEvent { kind, code, value }
    }

    fn from_bytes([k0, k1, c0, c1, value @ ..]: [u8; EVENT_BYTES as usize]) -> InputEvent {
        let (kind, code) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([c0, c1]));
        InputEvent { kind, code, value: i32::from_le_bytes(value) }
    }

    fn to_bytes(self) -> [u8; EVENT_BYTES as usize] {
        let ([k0, k1], [c0, c1]) = (self.kind.to_le_bytes(), self.code.to_le_bytes());
        let [v0, v1, v2, v3] = self.value.to_le_bytes();
        [k0, k1, c0, c1, v0, v1, v2, v3]
    }
}

/// What a device keeps between viewers and driver.
trait Side: Default + Send + 'static {
    /// What waits for the guest's buffers.
    fn events(&mut self) -> &mut VecDeque<InputEvent>;
    /// The driver says this on the status queue: lights.
    fn hear(&mut self, _event: InputEvent) {}
    /// The driver is gone.
    fn forget(&mut self);
}

/// A device's side, and how its worker hears that something is there.
struct Pending<S> {
    state: Mutex<S>,
    /// A driver listens: it has set DRIVER_OK, and has broken no rule since.
    driven: AtomicBool,
    wake: Event,
}

impl<S: Side> Pending<S> {
    fn new() -> io::Result<Arc<Pending<S>>> {
        Ok(Arc::new(Pending { state: Mutex::default(), driven: AtomicBool::new(false), wake: Event::new()? }))
    }

    fn lock(&self) -> MutexGuard<'_, S> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the driver has selected of the configuration, and its part (5.8.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Selected([u8; 2]);

impl Selected {
    /// `answer` is what the device says to the selection, at most 128 bytes.
    fn read(self, answer: &[u8], offset: usize, into: &mut [u8]) {
        let [select, part] = self.0;
        let head = [select, part, answer.len() as u8, 0, 0, 0, 0, 0];
        for (byte, from) in into.iter_mut().zip(head.iter().chain(answer).skip(offset)) {
            *byte = *from;
        }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        for (into, byte) in self.0.iter_mut().skip(offset).zip(bytes) {
            *into = *byte;
        }
    }
}

/// Codes as the configuration names them: a bit each.
fn bitmap(codes: impl IntoIterator<Item = u16>) -> Vec<u8> {
    let mut bits = Vec::new();
    for code in codes {
        let at = usize::from(code / 8);
        bits.resize(bits.len().max(at + 1), 0u8);
        if let Some(byte) = bits.get_mut(at) {
            *byte |= 1 << (code % 8);
        }
    }
    bits
}

/// Bus, vendor, product, version: `virtio_input_devids`.
fn device_ids(product: u16) -> Vec<u8> {
    const BUS_VIRTUAL: u16 = 6;
    [BUS_VIRTUAL, 0x1af4, product, 1].iter().flat_map(|id| id.to_le_bytes()).collect()
}

/// The worker.
struct Feed<S> {
    pending: Arc<Pending<S>>,
    chain: Chain,
}

impl<S: Side> Work<Running> for Feed<S> {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        self.pending.driven.store(true, Ordering::Release);
        let served = self.serve_queues(running, stop);
        if served.is_err() {
            self.pending.driven.store(false, Ordering::Release);
        }
        served
    }

    fn forget(&mut self) {
        self.pending.driven.store(false, Ordering::Release);
        self.pending.lock().forget();
    }
}

impl<S: Side> Feed<S> {
    fn new(pending: &Arc<Pending<S>>) -> Feed<S> {
        Feed { pending: Arc::clone(pending), chain: Chain::default() }
    }

    fn serve_queues(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let [events, rest @ ..] = queues.as_mut_slice() else { return Err(Malformed) };
        loop {
            let mut more = self.feed(ram, events, interrupts, stop)?;
            for status in rest.iter_mut() {
                while !stop.asked() && status.pop(ram, &mut self.chain)? {
                    self.hear(ram)?;
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

    /// Takes what the driver says in a buffer of the status queue; one that is too short says nothing.
    fn hear(&self, ram: &GuestRam) -> Result<(), Malformed> {
        let mut bytes = [0; EVENT_BYTES as usize];
        if self.chain.read(ram, 0, &mut bytes).map_err(|_| Malformed)? {
            self.pending.lock().hear(InputEvent::from_bytes(bytes));
        }
        Ok(())
    }

    /// Gives the guest what waits, as far as it has buffers. True when it queued one just now.
    fn feed(
        &mut self,
        ram: &GuestRam,
        events: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while !stop.asked() {
            let mut state = self.pending.lock();
            let Some(event) = state.events().front().copied() else { break };
            if !events.pop(ram, &mut self.chain)? {
                drop(state);
                return events.enable_kicks(ram);
            }
            state.events().pop_front();
            drop(state);
            if !self.chain.write(ram, 0, &event.to_bytes()).map_err(|_| Malformed)? {
                return Err(Malformed);
            }
            events.push(ram, self.chain.head, EVENT_BYTES as u32, interrupts)?;
        }
        Ok(false)
    }
}
