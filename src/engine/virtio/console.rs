//! virtio-console with several ports (virtio 1.2, 5.3). Port 0, the console itself, is not used: the guest has COM1. Port 1 is the
//! guest agent's channel.

use std::{
    collections::VecDeque,
    io, mem, slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    Features, Interrupts, Kind, Running, VirtioDevice, Worker,
    queue::{Chain, Malformed, VirtQueue},
};
use crate::engine::{
    event::Event,
    memory::GuestRam,
    saved::{BadState, SaveState, State},
    worker::{Served, Stop, Work},
};

const F_MULTIPORT: u32 = 1;
const PORTS_MAX: u32 = 2;
/// Columns, rows, ports, emergency write.
const CONFIG_BYTES: usize = 12;
/// Receive and transmit of port 0, of the control channel, of port 1.
const QUEUES: &[u16] = &[16, 16, 32, 32, 64, 64];

const AGENT_PORT: u32 = 1;
/// What qemu-guest-agent looks for.
const AGENT_NAME: &[u8] = b"org.qemu.guest_agent.0";

/// Control messages (virtio 1.2, 5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
const CONTROL_BYTES: usize = 8;
/// Control messages that wait for buffers of the guest; a driver that asks without end gets no more.
const CONTROLS_MAX: usize = 16;

/// Bytes on their way to the guest; what comes on top is refused.
const OUTPUT_MAX: usize = 64 << 10;
/// Copied at a time.
const PIECE_BYTES: usize = 4096;

/// The host's end of the port. Called by the device's thread.
pub trait PortPeer: Send {
    /// The guest has opened or closed its end.
    fn opened(&mut self, open: bool);
    fn received(&mut self, bytes: &[u8]);
}

/// The way to the guest. Clones are the same way.
#[derive(Clone)]
pub struct PortOutput(Arc<Pending>);

struct Pending {
    bytes: Mutex<VecDeque<u8>>,
    wake: Event,
}

impl PortOutput {
    pub fn new() -> io::Result<PortOutput> {
        Ok(PortOutput(Arc::new(Pending { bytes: Mutex::default(), wake: Event::new()? })))
    }

    /// Sends all of it or, when the guest does not take what was sent before, nothing.
    pub fn send(&self, bytes: &[u8]) -> bool {
        let mut waiting = self.lock();
        if waiting.len() + bytes.len() > OUTPUT_MAX {
            return false;
        }
        waiting.extend(bytes);
        drop(waiting);
        self.0.wake.signal();
        true
    }

    /// Takes what waits.
    #[cfg(test)]
    pub(crate) fn take(&self) -> Vec<u8> {
        self.lock().drain(..).collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Console {
    worker: Worker,
    kept: Kept,
}

impl Console {
    pub fn new(peer: impl PortPeer + 'static, output: PortOutput) -> io::Result<Console> {
        let kept = Kept::default();
        let ports = Ports {
            peer: Box::new(peer),
            told_open: false,
            output,
            state: PortState::default(),
            kept: Arc::clone(&kept),
            chain: Chain::default(),
            piece: vec![0; PIECE_BYTES],
        };
        Ok(Console { worker: Worker::spawn("agent", ports)?, kept })
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }
    fn queue_sizes(&self) -> &'static [u16] {
        QUEUES
    }
    fn offered(&self) -> Features {
        1 << F_MULTIPORT
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        config[4..8].copy_from_slice(&PORTS_MAX.to_le_bytes());
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

/// What the driver has asked for.
#[derive(Default)]
struct PortState {
    /// Control messages for the driver.
    controls: VecDeque<Vec<u8>>,
    /// The guest's end of the port is open.
    open: bool,
}

/// Where it is while nothing is served; the worker takes it out and puts it back.
type Kept = Arc<Mutex<PortState>>;

struct Ports {
    peer: Box<dyn PortPeer>,
    /// What the peer was told last.
    told_open: bool,
    output: PortOutput,
    state: PortState,
    kept: Kept,
    chain: Chain,
    piece: Vec<u8>,
}

impl Work<Running> for Ports {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        self.state = mem::take(&mut *lock(&self.kept));
        // A peer of another process begins anew with a port that was open.
        self.tell();
        let served = self.ports(running, stop);
        *lock(&self.kept) = mem::take(&mut self.state);
        served
    }

    fn forget(&mut self) {
        *lock(&self.kept) = PortState::default();
        self.tell();
    }
}

impl Ports {
    /// Serves the ports until the stop is asked.
    fn ports(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let multiport = running.has(F_MULTIPORT);
        let Running { ram, queues, interrupts, .. } = running;
        let [_, console, control_in, control, port_in, port] = queues.as_mut_slice() else {
            return idle(stop);
        };
        if !multiport {
            return idle(stop);
        }
        loop {
            let mut more = self.give_back(ram, console, interrupts, stop)?;
            more |= self.control(ram, control, interrupts, stop)?;
            more |= self.receive(ram, port, interrupts, stop)?;
            more |= self.send_controls(ram, control_in, interrupts)?;
            more |= self.send(ram, port_in, interrupts, stop)?;
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if more {
                continue;
            }
            let wake = PollFd::new(&self.output.0.wake, PollFlags::IN);
            let kicks = [&*console, &*control_in, &*control, &*port_in, &*port].map(VirtQueue::kicked);
            let [a, b, c, d, e] = kicks;
            if !stop.wait(&[wake, a, b, c, d, e]) {
                return Ok(Served::Stopped);
            }
            self.output.0.wake.clear();
            for queue in [&*console, &*control_in, &*control, &*port_in, &*port] {
                queue.kick.clear();
            }
        }
    }
}

fn lock(kept: &Kept) -> MutexGuard<'_, PortState> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For a driver that has not set the ports up: nothing is ever done.
fn idle(stop: &Stop) -> Result<Served, Malformed> {
    while stop.wait(&[]) {}
    Ok(Served::Stopped)
}

impl Ports {
    /// What the guest writes to port 0 goes nowhere.
    fn give_back(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while !stop.asked() && queue.pop(ram, &mut self.chain)? {
            queue.push(ram, self.chain.head, 0, interrupts)?;
        }
        queue.enable_kicks(ram)
    }

    /// What the driver says of its ports.
    fn control(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while !stop.asked() && queue.pop(ram, &mut self.chain)? {
            let mut message = [0; CONTROL_BYTES];
            if self.chain.read(ram, 0, &mut message).map_err(|_| Malformed)? {
                let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
                let (port, value) = (u32::from_le_bytes([p0, p1, p2, p3]), u16::from_le_bytes([v0, v1]));
                match (u16::from_le_bytes([e0, e1]), port) {
                    (DEVICE_READY, _) if value == 1 => self.answer(PORT_ADD, 1, &[]),
                    (PORT_READY, AGENT_PORT) if value == 1 => {
                        self.answer(PORT_NAME, 1, AGENT_NAME);
                        // Our end is always open.
                        self.answer(PORT_OPEN, 1, &[]);
                    }
                    (PORT_OPEN, AGENT_PORT) => self.set_open(value == 1),
                    _ => {}
                }
            }
            queue.push(ram, self.chain.head, 0, interrupts)?;
        }
        queue.enable_kicks(ram)
    }

    fn answer(&mut self, event: u16, value: u16, more: &[u8]) {
        if self.state.controls.len() < CONTROLS_MAX {
            let mut message = AGENT_PORT.to_le_bytes().to_vec();
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            message.extend(more);
            self.state.controls.push_back(message);
        }
    }

    fn set_open(&mut self, open: bool) {
        self.state.open = open;
        self.tell();
    }

    /// Tells the peer when the port was opened or closed; what waited was for the connection before.
    fn tell(&mut self) {
        if self.told_open != self.state.open {
            self.told_open = self.state.open;
            self.output.lock().clear();
            self.peer.opened(self.state.open);
        }
    }

    /// What the guest writes to the port.
    fn receive(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while !stop.asked() && queue.pop(ram, &mut self.chain)? {
            let bytes = self.chain.readable_bytes();
            let mut at = 0;
            while at < bytes && !stop.asked() {
                let here = (bytes - at).min(PIECE_BYTES as u64);
                let piece = self.piece.get_mut(..here as usize).ok_or(Malformed)?;
                self.chain.read(ram, at, piece).map_err(|_| Malformed)?;
                if self.state.open {
                    self.peer.received(piece);
                }
                at += here;
            }
            queue.push(ram, self.chain.head, 0, interrupts)?;
        }
        queue.enable_kicks(ram)
    }

    fn send_controls(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
    ) -> Result<bool, Malformed> {
        while let Some(message) = self.state.controls.front() {
            if !queue.pop(ram, &mut self.chain)? {
                return queue.enable_kicks(ram);
            }
            if !self.chain.write(ram, 0, message).map_err(|_| Malformed)? {
                return Err(Malformed);
            }
            queue.push(ram, self.chain.head, message.len() as u32, interrupts)?;
            self.state.controls.pop_front();
        }
        Ok(false)
    }

    /// Gives the guest what waits, as far as it has buffers.
    fn send(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while self.state.open && !stop.asked() {
            let mut waiting = self.output.lock();
            if waiting.is_empty() {
                break;
            }
            if !queue.pop(ram, &mut self.chain)? {
                drop(waiting);
                return queue.enable_kicks(ram);
            }
            let fits = (self.chain.writable_bytes() as usize).min(waiting.len()).min(PIECE_BYTES);
            let piece = self.piece.get_mut(..fits).ok_or(Malformed)?;
            for (into, byte) in piece.iter_mut().zip(waiting.drain(..fits)) {
                *into = byte;
            }
            drop(waiting);
            self.chain.write(ram, 0, piece).map_err(|_| Malformed)?;
            queue.push(ram, self.chain.head, fits as u32, interrupts)?;
        }
        Ok(false)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "virtio-console";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        /// Whether the guest's end of the agent's port is open.
        pub(super) agent_open: bool,
        /// Control messages that wait, in hexadecimal digits.
        pub(super) controls: Vec<Control>,
    }

    #[derive(Serialize, Deserialize)]
    #[serde(transparent)]
    pub(super) struct Control(#[serde(with = "crate::engine::saved::hex")] pub(super) Vec<u8>);
}

/// A control message is a header and a port's name at most.
const CONTROL_BYTES_MAX: usize = CONTROL_BYTES + AGENT_NAME.len();

/// Bytes that wait for the guest are not kept: the peer is told that the port is open, and begins anew.
impl SaveState for Console {
    fn save(&self) -> State {
        let Console { worker: _, kept } = self;
        let state = lock(kept);
        let PortState { controls, open } = &*state;
        let controls = controls.iter().map(|message| saved::Control(message.clone())).collect();
        State::new(saved::KIND, 1, &saved::V1 { agent_open: *open, controls })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { agent_open, controls } = state.fields(saved::KIND, 1)?;
        let good = |good: bool, what: &str| BadState::unless(good, saved::KIND, what);
        good(controls.len() <= CONTROLS_MAX, "more control messages wait than are kept")?;
        let short = controls.iter().all(|message| message.0.len() <= CONTROL_BYTES_MAX);
        good(short, "a control message is too long")?;
        let controls = controls.into_iter().map(|message| message.0).collect();
        *lock(&self.kept) = PortState { controls, open: agent_open };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::engine::{
        saved::testing::{matches_golden, spoil},
        virtio::testing::{BUFFERS, DEADLINE, Driver, VERSION_1, eventually, readable, writable},
    };

    #[derive(Debug, PartialEq, Eq)]
    enum Heard {
        Open(bool),
        Bytes(Vec<u8>),
    }

    struct Recorder(Sender<Heard>);

    impl PortPeer for Recorder {
        fn opened(&mut self, open: bool) {
            self.0.send(Heard::Open(open)).unwrap();
        }
        fn received(&mut self, bytes: &[u8]) {
            self.0.send(Heard::Bytes(bytes.to_vec())).unwrap();
        }
    }

    const MULTIPORT: Features = VERSION_1 | 1 << F_MULTIPORT;
    const CONTROL_IN: u16 = 2;
    const CONTROL: u16 = 3;
    const PORT_IN: u16 = 4;
    const PORT: u16 = 5;
    /// Where the guest's buffers for what it receives are.
    const INTO: u64 = BUFFERS + 0x1000;

    fn plugged() -> (Driver, PortOutput, Receiver<Heard>) {
        let (to, heard) = channel();
        let output = PortOutput::new().unwrap();
        let mut driver = Driver::plug(Console::new(Recorder(to), output.clone()).unwrap());
        driver.start(MULTIPORT);
        (driver, output, heard)
    }

    fn say(driver: &mut Driver, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        driver.ram.write(crate::engine::memory::Gpa(BUFFERS), &message).unwrap();
        driver.run(CONTROL, &[readable(BUFFERS, 8)]);
    }

    fn control(driver: &mut Driver) -> Vec<u8> {
        let used = driver.run(CONTROL_IN, &[writable(INTO, 256)]);
        driver.bytes(INTO, used.bytes as usize)
    }

    fn open(driver: &mut Driver, heard: &Receiver<Heard>) {
        say(driver, 0, DEVICE_READY, 1);
        assert_eq!(control(driver), [1, 0, 0, 0, 1, 0, 1, 0], "port 1 is added");
        say(driver, 1, PORT_READY, 1);
        assert_eq!(control(driver), [&[1, 0, 0, 0, 7, 0, 1, 0], AGENT_NAME].concat());
        assert_eq!(control(driver), [1, 0, 0, 0, 6, 0, 1, 0]);
        say(driver, 1, PORT_OPEN, 1);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Open(true)));
    }

    #[test]
    fn the_agents_port_is_found_by_name_and_carries_bytes_both_ways() {
        let (mut driver, output, heard) = plugged();
        open(&mut driver, &heard);
        driver.ram.write(crate::engine::memory::Gpa(BUFFERS), b"hello").unwrap();
        driver.run(PORT, &[readable(BUFFERS, 5)]);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Bytes(b"hello".to_vec())));
        assert!(output.send(b"more than fits"));
        assert_eq!(driver.run(PORT_IN, &[writable(INTO, 4)]).bytes, 4);
        assert_eq!(driver.run(PORT_IN, &[writable(INTO + 4, 100)]).bytes, 10);
        assert_eq!(driver.bytes(INTO, 14), b"more than fits");
        say(&mut driver, 1, PORT_OPEN, 0);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Open(false)));
    }

    #[test]
    fn a_reset_closes_the_port_and_drops_what_waits() {
        let (mut driver, output, heard) = plugged();
        open(&mut driver, &heard);
        assert!(output.send(b"for the one before"));
        driver.registers.reset();
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Open(false)));
        assert!(output.lock().is_empty());
    }

    #[test]
    fn a_guest_that_takes_nothing_holds_up_nobody() {
        let (mut driver, output, heard) = plugged();
        open(&mut driver, &heard);
        assert!(output.send(&[7; OUTPUT_MAX]));
        assert!(!output.send(b"x"), "no more than that waits");
        for _ in 0..CONTROLS_MAX * 2 {
            say(&mut driver, 0, DEVICE_READY, 1);
        }
        eventually("the rest is given up", || output.lock().len() == OUTPUT_MAX);
        for _ in 0..CONTROLS_MAX {
            assert_eq!(control(&mut driver).len(), 8);
        }
    }

    #[test]
    fn odd_messages_are_passed_over() {
        let (mut driver, _output, heard) = plugged();
        open(&mut driver, &heard);
        for (port, event, value) in [(7, PORT_OPEN, 1), (1, 99, 1), (u32::MAX, PORT_READY, 1), (1, PORT_OPEN, 1)] {
            say(&mut driver, port, event, value);
        }
        driver.run(CONTROL, &[readable(BUFFERS, 3)]);
        driver.run(PORT, &[writable(BUFFERS, 16)]);
        assert!(heard.try_recv().is_err());
        // A control buffer that no message fits into is against the rules.
        say(&mut driver, 1, PORT_READY, 1);
        driver.submit(CONTROL_IN, &[writable(INTO, 4)]);
        driver.registers.wait_needs_reset();
    }

    /// What `plugged` gives, before the driver starts, and another handle on the device.
    fn with_twin() -> (Driver, PortOutput, Receiver<Heard>, Console) {
        let (to, heard) = channel();
        let output = PortOutput::new().unwrap();
        let console = Console::new(Recorder(to), output.clone()).unwrap();
        let twin = Console { worker: console.worker.clone(), kept: Arc::clone(&console.kept) };
        (Driver::plug(console), output, heard, twin)
    }

    /// The port is open, two control messages and some bytes wait.
    fn busy() -> State {
        let (mut driver, output, heard, twin) = with_twin();
        driver.start(MULTIPORT);
        open(&mut driver, &heard);
        say(&mut driver, 1, PORT_READY, 1);
        output.send(b"half a line");
        twin.worker.hold();
        twin.save()
    }

    #[test]
    fn an_open_port_begins_anew_after_a_restore_and_control_messages_are_kept() {
        let state = matches_golden(&busy());
        let (mut driver, output, heard, mut twin) = with_twin();
        twin.worker.hold();
        driver.start(MULTIPORT);
        twin.restore(&state).unwrap();
        assert!(heard.try_recv().is_err(), "nobody hears of it before the guest goes on");
        twin.worker.release();
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Open(true)));
        assert_eq!(control(&mut driver), [&[1, 0, 0, 0, 7, 0, 1, 0], AGENT_NAME].concat());
        assert_eq!(control(&mut driver), [1, 0, 0, 0, 6, 0, 1, 0]);
        assert!(output.send(b"again"));
        assert_eq!(driver.run(PORT_IN, &[writable(INTO, 64)]).bytes, 5);
        // A pause is no news.
        twin.worker.hold();
        twin.worker.release();
        driver.ram.write(crate::engine::memory::Gpa(BUFFERS), b"hello").unwrap();
        driver.run(PORT, &[readable(BUFFERS, 5)]);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Bytes(b"hello".to_vec())));
        driver.registers.reset();
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Heard::Open(false)));
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        let (mut driver, output, _heard, mut twin) = with_twin();
        spoil(&busy(), |bad| {
            twin.worker.hold();
            driver.start(MULTIPORT);
            let _ = twin.restore(bad);
            twin.worker.release();
            output.send(b"x");
            say(&mut driver, 0, DEVICE_READY, 1);
            control(&mut driver);
        });
    }
}
