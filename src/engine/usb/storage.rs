//! A USB disk: the bulk-only transport (USB Mass Storage Class, Bulk-Only Transport 1.0) around SCSI commands.
//!
//! ```text
//! host:    CBW ──▶ data, up to the length in the CBW ──▶ CSW
//! worker:  lock, step ──▶ unlock, I/O with the disk's own buffer ──▶ lock, finish, step …
//! ```
//!
//! Bytes go through a buffer that moves between the device and its worker, so that no thread waits for the disk with a lock
//! held, and whoever stops an endpoint or resets the device need not wait at all: a result that comes later is for nobody.
//! When the disk has less than the host asked for, the rest is zeros and the CSW tells how many (6.7.2, which allows that
//! beside STALL): SeaBIOS takes a short transfer for a failure.

use super::{
    ENDPOINT_IN, Pipes, Setup, Speed, Stall,
    descriptors::{Description, EndpointDescriptor, Standard},
    scsi::{Answer, Cdb, Sense, Unit},
};
use crate::engine::{
    disk::{BlockError, DiskShape},
    saved::{BadState, SaveState, State},
};

const KIND: &str = "usb-storage";

pub const BULK_IN: u8 = ENDPOINT_IN | 1;
pub const BULK_OUT: u8 = 2;
const PACKET_BYTES: u16 = 1024;

/// What one piece of I/O moves at most.
const BUFFER_BYTES: usize = 128 << 10;
/// Buffers that are moved before others get a turn.
const MOVES_PER_STEP: usize = 8;

const CBW_BYTES: usize = 31;
const CBW_SIGNATURE: [u8; 4] = *b"USBC";
const CSW_BYTES: usize = 13;
const CSW_SIGNATURE: [u8; 4] = *b"USBS";
const PASSED: u8 = 0;
const FAILED: u8 = 1;
const PHASE_ERROR: u8 = 2;

// Class requests (Bulk-Only Transport 1.0, 3).
const GET_MAX_LUN: u8 = 0xfe;
const MASS_STORAGE_RESET: u8 = 0xff;

/// What the worker shall do without the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    Read { at: u64, bytes: usize },
    Write { at: u64, bytes: usize },
    Flush,
}

/// Work that has left the device, with its buffer.
pub struct Job {
    pub io: Io,
    pub buffer: Box<[u8]>,
    generation: u64,
}

/// What `step` came to.
pub enum Step {
    /// Nothing to do before the host does something.
    Idle,
    /// There is more to do, after others had a turn.
    Again,
    Io(Job),
}

/// What is still to be done for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    None,
    Read { at: u64, left: u64 },
    Write { at: u64, left: u64, durable: bool },
    Flush,
}

/// A command between its CBW and its CSW.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Command {
    tag: u32,
    to_host: bool,
    /// Bytes of the data stage, as the CBW says, and how many of them moved.
    expected: u32,
    moved: u32,
    /// How many of them meant something.
    useful: u32,
    status: u8,
    task: Task,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A CBW is awaited, or part of it is in the buffer.
    Idle,
    Data(Command),
    Status([u8; CSW_BYTES]),
}

pub struct Storage {
    standard: Standard,
    serial: String,
    shape: DiskShape,
    sense: Sense,
    /// An invalid CBW came: both pipes stay halted until a reset of the device (6.6.1).
    wedged: bool,
    phase: Phase,
    /// Work of an older generation is for nobody.
    generation: u64,
    /// Empty while it is with the worker.
    buffer: Box<[u8]>,
    /// The bytes in the buffer, and how many of them the host has.
    filled: usize,
    sent: usize,
}

impl Storage {
    /// `serial`: printable ASCII.
    pub fn new(serial: String, shape: DiskShape) -> Storage {
        let endpoint = |address| EndpointDescriptor { address, attributes: 2, packet_bytes: PACKET_BYTES, interval: 0 };
        let description = Description {
            speed: Speed::Super,
            product_id: 0x0001,
            product: "USB Disk",
            serial: serial.clone(),
            interface: [8, 6, 0x50], // mass storage, SCSI, bulk-only
            report: &[],
            endpoints: vec![endpoint(BULK_IN), endpoint(BULK_OUT)],
        };
        Storage {
            standard: Standard::new(description),
            serial,
            shape,
            sense: Sense::NONE,
            wedged: false,
            phase: Phase::Idle,
            generation: 0,
            buffer: vec![0; BUFFER_BYTES].into(),
            filled: 0,
            sent: 0,
        }
    }

    pub(super) fn standard(&self) -> &Standard {
        &self.standard
    }

    pub(super) fn reset(&mut self) {
        self.standard.reset();
        self.give_up();
        self.sense = Sense::NONE;
    }

    /// A Bulk-Only Mass Storage Reset: ready for the next CBW. Halted endpoints stay halted (3.1).
    fn give_up(&mut self) {
        self.phase = Phase::Idle;
        self.wedged = false;
        self.generation = self.generation.wrapping_add(1);
        (self.filled, self.sent) = (0, 0);
    }

    pub(super) fn control(&mut self, setup: Setup, _: &[u8]) -> Result<Vec<u8>, Stall> {
        match (setup.request_type, setup.request) {
            (0xa1, GET_MAX_LUN) if setup.index == 0 => Ok(vec![0]),
            (0x21, MASS_STORAGE_RESET) if setup.index == 0 => {
                self.give_up();
                Ok(Vec::new())
            }
            _ => {
                let before = self.standard.configuration;
                let answer = self.standard.request(setup)?;
                if self.standard.configuration != before {
                    self.give_up();
                }
                if self.wedged {
                    self.wedge();
                }
                Ok(answer)
            }
        }
    }

    fn wedge(&mut self) {
        self.wedged = true;
        self.standard.set_halted(BULK_IN, true);
        self.standard.set_halted(BULK_OUT, true);
    }

    /// Goes as far as the pipes allow. Called by the worker alone, so that its buffer is here.
    pub fn step(&mut self, pipes: &mut dyn Pipes) -> Step {
        for _ in 0..MOVES_PER_STEP {
            let halted = (self.standard.is_halted(BULK_OUT), self.standard.is_halted(BULK_IN));
            if halted.0 {
                pipes.stall_receive();
            }
            if halted.1 {
                pipes.stall_send();
            }
            if halted != (false, false) || self.buffer.is_empty() {
                return Step::Idle;
            }
            let moved = match self.phase {
                Phase::Idle => self.take_cbw(pipes),
                Phase::Data(command) => match self.due(&command) {
                    Some(io) => return Step::Io(self.lend(io)),
                    None if command.to_host => self.send_data(command, pipes),
                    None => self.receive_data(command, pipes),
                },
                Phase::Status(csw) => self.send_csw(&csw, pipes),
            };
            if !moved {
                return Step::Idle;
            }
        }
        Step::Again
    }

    /// Takes the buffer back, with the result of the I/O. A host fault leaves everything as it was: `step` asks for the
    /// same again.
    pub fn finish(&mut self, job: Job, result: Result<(), BlockError>) {
        self.buffer = job.buffer;
        let Phase::Data(mut command) = self.phase else { return };
        if job.generation != self.generation {
            return;
        }
        match result {
            Ok(()) => match (job.io, command.task) {
                (Io::Read { bytes, .. }, Task::Read { at, left }) => {
                    (self.filled, self.sent) = (bytes, 0);
                    command.useful = command.useful.saturating_add(bytes as u32);
                    command.task = Task::Read { at: at + bytes as u64, left: left.saturating_sub(bytes as u64) };
                }
                (Io::Write { bytes, .. }, Task::Write { at, left, durable }) => {
                    self.filled = 0;
                    command.useful = command.useful.saturating_add(bytes as u32);
                    let left = left.saturating_sub(bytes as u64);
                    command.task = Task::Write { at: at + bytes as u64, left, durable };
                    if left == 0 {
                        command.task = if durable { Task::Flush } else { Task::None };
                    }
                }
                _ => command.task = Task::None,
            },
            Err(error) if error.host_fault().is_some() => {}
            Err(error) => {
                self.filled = 0;
                command.task = Task::None;
                command.status = FAILED;
                self.sense = match error {
                    BlockError::OutOfRange { .. } => Sense::OUT_OF_RANGE,
                    BlockError::ReadOnly => Sense::WRITE_PROTECTED,
                    _ => Sense::WRITE_ERROR,
                };
            }
        }
        self.phase = Phase::Data(command);
    }

    fn lend(&mut self, io: Io) -> Job {
        Job { io, buffer: std::mem::take(&mut self.buffer), generation: self.generation }
    }

    /// The I/O that must come next.
    fn due(&self, command: &Command) -> Option<Io> {
        let rest = (command.expected - command.moved) as usize;
        match command.task {
            Task::Read { at, left } if left > 0 && rest > 0 && self.sent == self.filled => {
                Some(Io::Read { at, bytes: smaller(BUFFER_BYTES.min(rest), left) })
            }
            Task::Write { at, left, .. } if self.filled > 0 && left > 0 && (rest == 0 || self.is_full()) => {
                Some(Io::Write { at, bytes: smaller(self.filled, left) })
            }
            Task::Flush if rest == 0 && self.sent == self.filled => Some(Io::Flush),
            _ => None,
        }
    }

    fn is_full(&self) -> bool {
        self.filled == BUFFER_BYTES
    }

    /// Takes a CBW, or a piece of one. These functions say whether anything changed.
    fn take_cbw(&mut self, pipes: &mut dyn Pipes) -> bool {
        let Some(room) = self.buffer.get_mut(self.filled..CBW_BYTES + 1) else { return false };
        let moved = pipes.receive(room);
        self.filled += moved.bytes;
        let whole = moved.ended && self.filled > 0;
        if whole || self.filled > CBW_BYTES {
            let cbw = self.buffer.first_chunk::<CBW_BYTES>().copied();
            match cbw {
                Some(cbw) if self.filled == CBW_BYTES && is_valid(&cbw) => {
                    self.filled = 0;
                    self.begin(&cbw);
                }
                _ => self.wedge(),
            }
        }
        moved.bytes > 0 || moved.ended
    }

    /// A valid CBW (5.1): decides what its command does.
    fn begin(&mut self, cbw: &[u8; CBW_BYTES]) {
        let [_, _, _, _, t0, t1, t2, t3, e0, e1, e2, e3, flags, unit, length, cdb @ ..] = *cbw;
        let expected = u32::from_le_bytes([e0, e1, e2, e3]);
        let to_host = flags & ENDPOINT_IN != 0;
        let tag = u32::from_le_bytes([t0, t1, t2, t3]);
        let mut command = Command { tag, to_host, expected, moved: 0, useful: 0, status: PASSED, task: Task::None };
        let sense = std::mem::replace(&mut self.sense, Sense::NONE);
        let disk = Unit { shape: self.shape, serial: &self.serial, sense };
        let cdb = Cdb(cdb.get(..usize::from(length)).unwrap_or_default());
        let answer = if unit & 0x0f == 0 { disk.execute(&cdb) } else { Err(Sense::NO_SUCH_UNIT) };
        match answer {
            Ok(Answer::Done) => {}
            Ok(Answer::Flush) => command.task = Task::Flush,
            Ok(Answer::Data(data)) if to_host || data.is_empty() || expected == 0 => {
                let bytes = data.len().min(expected as usize);
                for (to, from) in self.buffer.iter_mut().zip(&data).take(bytes) {
                    *to = *from;
                }
                (self.filled, command.useful) = (bytes, bytes as u32);
            }
            Ok(Answer::Read { at, bytes }) if bytes <= expected.into() && (to_host || bytes == 0) => {
                command.task = Task::Read { at, left: bytes };
            }
            Ok(Answer::Write { at, bytes, durable }) if bytes <= expected.into() && (!to_host || bytes == 0) => {
                command.task = match bytes {
                    0 => Task::None,
                    left => Task::Write { at, left, durable },
                };
            }
            // Host and disk do not agree on the data (6.7): nothing is done.
            Ok(Answer::Data(_) | Answer::Read { .. } | Answer::Write { .. }) => command.status = PHASE_ERROR,
            Err(sense) => {
                self.sense = sense;
                command.status = FAILED;
            }
        }
        self.sent = 0;
        self.phase = Phase::Data(command);
    }

    fn send_data(&mut self, mut command: Command, pipes: &mut dyn Pipes) -> bool {
        let rest = (command.expected - command.moved) as usize;
        if rest == 0 {
            return self.end(&command);
        }
        if self.sent >= self.filled {
            // The disk has no more: zeros up to what the host expects.
            (self.filled, self.sent) = (rest.min(BUFFER_BYTES), 0);
            self.buffer.iter_mut().take(self.filled).for_each(|byte| *byte = 0);
        }
        let waiting = self.buffer.get(self.sent..self.filled).unwrap_or_default();
        let waiting = waiting.get(..waiting.len().min(rest)).unwrap_or_default();
        let moved = pipes.send(waiting, waiting.len() == rest);
        self.sent += moved.bytes;
        command.moved += moved.bytes as u32;
        self.phase = Phase::Data(command);
        moved.bytes > 0 || moved.ended
    }

    fn receive_data(&mut self, mut command: Command, pipes: &mut dyn Pipes) -> bool {
        let rest = (command.expected - command.moved) as usize;
        if rest == 0 && self.filled == 0 {
            return self.end(&command);
        }
        if rest == 0 || self.is_full() {
            self.filled = 0; // what the command does not want
            return true;
        }
        let end = BUFFER_BYTES.min(self.filled + rest);
        let Some(room) = self.buffer.get_mut(self.filled..end) else { return false };
        let moved = pipes.receive(room);
        self.filled += moved.bytes;
        command.moved += moved.bytes as u32;
        self.phase = Phase::Data(command);
        moved.bytes > 0 || moved.ended
    }

    /// The data stage is over: builds the CSW (5.2).
    fn end(&mut self, command: &Command) -> bool {
        let residue = command.expected.saturating_sub(command.useful);
        let mut csw = [0; CSW_BYTES];
        csw[0..4].copy_from_slice(&CSW_SIGNATURE);
        csw[4..8].copy_from_slice(&command.tag.to_le_bytes());
        csw[8..12].copy_from_slice(&residue.to_le_bytes());
        csw[12] = command.status;
        (self.filled, self.sent) = (0, 0);
        self.phase = Phase::Status(csw);
        true
    }

    fn send_csw(&mut self, csw: &[u8; CSW_BYTES], pipes: &mut dyn Pipes) -> bool {
        let moved = pipes.send(csw.get(self.sent..).unwrap_or_default(), true);
        self.sent += moved.bytes;
        if moved.ended {
            self.sent = 0;
            self.phase = Phase::Idle;
        }
        moved.ended
    }
}

/// 6.2.1 and 6.2.2.
fn is_valid(cbw: &[u8; CBW_BYTES]) -> bool {
    cbw.starts_with(&CBW_SIGNATURE) && (1..=16).contains(&(cbw[14] & 0x1f))
}

fn smaller(bytes: usize, left: u64) -> usize {
    usize::try_from(left).map_or(bytes, |left| left.min(bytes))
}

mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::descriptors::saved::StandardV1;
    use crate::engine::saved::hex;

    #[derive(Serialize, Deserialize)]
    pub(super) enum TaskV1 {
        None,
        Read { at: u64, left: u64 },
        Write { at: u64, left: u64, durable: bool },
        Flush,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct CommandV1 {
        pub(super) tag: u32,
        pub(super) to_host: bool,
        pub(super) expected: u32,
        pub(super) moved: u32,
        pub(super) useful: u32,
        pub(super) status: u8,
        pub(super) task: TaskV1,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) enum PhaseV1 {
        Idle,
        Data(CommandV1),
        Status([u8; super::CSW_BYTES]),
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) standard: StandardV1,
        pub(super) sense: [u8; 3],
        pub(super) wedged: bool,
        pub(super) phase: PhaseV1,
        /// What is in the buffer, up to `filled`.
        #[serde(with = "hex")]
        pub(super) buffer: Vec<u8>,
        pub(super) sent: usize,
    }
}

impl SaveState for Storage {
    fn save(&self) -> State {
        let Storage { standard, serial: _, shape: _, sense, wedged, phase, generation: _, buffer, filled, sent } = self;
        let task = |task| match task {
            Task::None => saved::TaskV1::None,
            Task::Read { at, left } => saved::TaskV1::Read { at, left },
            Task::Write { at, left, durable } => saved::TaskV1::Write { at, left, durable },
            Task::Flush => saved::TaskV1::Flush,
        };
        let phase = match *phase {
            Phase::Idle => saved::PhaseV1::Idle,
            Phase::Status(csw) => saved::PhaseV1::Status(csw),
            Phase::Data(Command { tag, to_host, expected, moved, useful, status, task: next }) => {
                let task = task(next);
                saved::PhaseV1::Data(saved::CommandV1 { tag, to_host, expected, moved, useful, status, task })
            }
        };
        let fields = saved::V1 {
            standard: standard.save(),
            sense: [sense.0, sense.1, sense.2],
            wedged: *wedged,
            phase,
            buffer: buffer.get(..*filled).unwrap_or_default().to_vec(),
            sent: *sent,
        };
        State::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { standard, sense, wedged, phase, buffer, sent } = state.fields(KIND, 1)?;
        let check = |good, what| BadState::unless(good, KIND, what);
        check(buffer.len() <= BUFFER_BYTES && !self.buffer.is_empty(), "more bytes than the buffer holds")?;
        let (phase, most_sent) = match phase {
            saved::PhaseV1::Idle => {
                check(buffer.len() <= CBW_BYTES || wedged, "more bytes than a command block has")?;
                (Phase::Idle, 0)
            }
            saved::PhaseV1::Status(csw) => (Phase::Status(csw), CSW_BYTES),
            saved::PhaseV1::Data(saved::CommandV1 { tag, to_host, expected, moved, useful, status, task }) => {
                check(moved <= expected && status <= PHASE_ERROR, "a command that cannot be")?;
                let fits = |at: u64, left| at.checked_add(left).is_some_and(|end| end <= self.shape.size_bytes);
                let task = match task {
                    saved::TaskV1::None => Task::None,
                    saved::TaskV1::Flush => Task::Flush,
                    saved::TaskV1::Read { at, left } if to_host && fits(at, left) => Task::Read { at, left },
                    saved::TaskV1::Write { at, left, durable } if !to_host && fits(at, left) => {
                        Task::Write { at, left, durable }
                    }
                    _ => return Err(BadState::new(KIND, "a transfer that cannot be")),
                };
                let most = if to_host { buffer.len() } else { 0 };
                (Phase::Data(Command { tag, to_host, expected, moved, useful, status, task }), most)
            }
        };
        check(sent <= most_sent, "more bytes sent than there were")?;
        self.standard.restore(&standard).map_err(|what| BadState::new(KIND, what))?;
        for (to, from) in self.buffer.iter_mut().zip(&buffer) {
            *to = *from;
        }
        (self.phase, self.wedged, self.filled, self.sent) = (phase, wedged, buffer.len(), sent);
        self.sense = Sense(sense[0], sense[1], sense[2]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Moved, *};
    use crate::engine::saved::testing::{matches_golden, spoil};

    /// A host that gives and takes everything at once, in one transfer each.
    #[derive(Default)]
    struct Host {
        gives: Vec<u8>,
        /// A transfer ends with the last of `gives`.
        ends: bool,
        took: Vec<u8>,
        stalls: usize,
    }
    impl Pipes for Host {
        fn send(&mut self, bytes: &[u8], last: bool) -> Moved {
            self.took.extend(bytes);
            Moved { bytes: bytes.len(), ended: last }
        }
        fn receive(&mut self, into: &mut [u8]) -> Moved {
            let bytes = self.gives.len().min(into.len());
            into[..bytes].copy_from_slice(&self.gives[..bytes]);
            self.gives.drain(..bytes);
            Moved { bytes, ended: bytes > 0 && self.gives.is_empty() && self.ends }
        }
        fn stall_send(&mut self) {
            self.stalls += 1;
        }
        fn stall_receive(&mut self) {
            self.stalls += 1;
        }
    }

    fn disk() -> Storage {
        Storage::new("disk-1".into(), DiskShape { size_bytes: 1 << 20, read_only: false })
    }
    fn cbw(expected: u32, flags: u8, cdb: &[u8]) -> Host {
        let mut gives =
            [&b"USBC"[..], &[1, 2, 3, 4], &expected.to_le_bytes(), &[flags, 0, cdb.len() as u8], cdb].concat();
        gives.resize(31, 0);
        Host { gives, ends: true, ..Host::default() }
    }
    /// Runs until the host must do something; the I/O that was asked for.
    fn drive(disk: &mut Storage, host: &mut Host) -> Vec<Io> {
        let mut asked = Vec::new();
        for _ in 0..1000 {
            match disk.step(host) {
                Step::Idle => break,
                Step::Again => {}
                Step::Io(job) => {
                    asked.push(job.io);
                    disk.finish(job, Ok(()));
                }
            }
        }
        asked
    }

    #[test]
    fn a_write_that_is_half_there_goes_on_in_a_restored_disk() {
        let mut first = disk();
        let mut host = cbw(1024, 0, &[0x2a, 8, 0, 0, 0, 2, 0, 0, 2, 0]);
        assert_eq!(drive(&mut first, &mut host), []);
        host.gives = (0..600u16).map(|at| at as u8).collect();
        host.ends = false;
        assert_eq!(drive(&mut first, &mut host), []);
        let state = matches_golden(&first.save());
        let mut second = disk();
        second.restore(&state).unwrap();
        host.gives = vec![7; 424];
        assert_eq!(drive(&mut second, &mut host), [Io::Write { at: 1024, bytes: 1024 }, Io::Flush]);
        assert_eq!(host.took, *b"USBS\x01\x02\x03\x04\0\0\0\0\0");
        assert_eq!(second.buffer[..600], first.buffer[..600]);
        spoil(&state, |bad| {
            let mut fresh = disk();
            let _ = fresh.restore(bad);
            drive(&mut fresh, &mut Host { gives: vec![1; 5000], ends: true, ..Host::default() });
            fresh.reset();
            assert_eq!(drive(&mut fresh, &mut cbw(0, 0, &[0])), []);
        });
    }

    #[test]
    fn a_result_that_comes_after_a_reset_is_for_nobody() {
        let mut disk = disk();
        let mut host = cbw(512, 0x80, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        let Step::Io(mut job) = disk.step(&mut host) else { panic!("a read") };
        assert!(matches!(disk.step(&mut host), Step::Idle), "the buffer is away");
        disk.reset();
        job.buffer.fill(9);
        disk.finish(job, Ok(()));
        let mut host = cbw(512, 0x80, &[0x28, 0, 0, 0, 0, 0, 0, 0, 9, 0]);
        assert_eq!(drive(&mut disk, &mut host), [], "more than the host expects");
        assert_eq!((host.took.len(), host.took[512 + 12]), (525, PHASE_ERROR));
        assert_eq!(host.took[..512], [0; 512]);
        assert_eq!(host.stalls, 0);
    }
}
