//! A small NVMe driver, and a disk that can be held and made to fail. The tests use the controller only as a driver could.

mod admin;
mod hostile;
mod io;
mod saved;

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    sync::{Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::engine::{
    bus::{Bus, BusView, Width},
    disk::{BlockError, DiskShape, RawFile},
    event::Event,
    irq::{IrqLine, MsiSink},
    layout::slot,
    memory::{Gpa, RamSpan},
    pci::{
        DevFn, assign,
        msix::tests::Sent,
        root::{PciRoot, Placement},
    },
};

const DEADLINE: Duration = Duration::from_secs(20);
const FUNCTION: DevFn = DevFn::new(slot::DISK, 0);
const RAM_BYTES: u64 = 16 << 20;
const DISK_BYTES: u64 = 4 << 20;
/// Queues are from here on; buffers of tests above `DATA`, lists of pages above `LISTS`.
const QUEUES_AT: u64 = 0x10_0000;
const DATA: u64 = 0x40_0000;
const LISTS: u64 = 0xa0_0000;
const PAGE: u64 = 4096;

const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
/// Entries of 64 and 16 bytes.
const CC_SIZES: u64 = 0x46_0000;

/// Status codes with their type, as the specification has them.
mod status {
    pub(super) const SUCCESS: u16 = 0;
    pub(super) const INVALID_OPCODE: u16 = 0x001;
    pub(super) const INVALID_FIELD: u16 = 0x002;
    pub(super) const DATA_TRANSFER: u16 = 0x004;
    pub(super) const ABORTED: u16 = 0x007;
    pub(super) const INVALID_NAMESPACE: u16 = 0x00b;
    pub(super) const SEQUENCE: u16 = 0x00c;
    pub(super) const PRP_OFFSET: u16 = 0x013;
    pub(super) const WRITE_PROTECTED: u16 = 0x020;
    pub(super) const LBA_RANGE: u16 = 0x080;
    pub(super) const NO_COMPLETION_QUEUE: u16 = 0x100;
    pub(super) const QUEUE_ID: u16 = 0x101;
    pub(super) const QUEUE_SIZE: u16 = 0x102;
    pub(super) const EVENT_LIMIT: u16 = 0x105;
    pub(super) const VECTOR: u16 = 0x108;
    pub(super) const LOG_PAGE: u16 = 0x109;
    pub(super) const QUEUE_DELETION: u16 = 0x10c;
    pub(super) const NOT_SAVEABLE: u16 = 0x10d;
}

/// A command, as a driver fills it in.
#[derive(Default, Clone, Copy)]
struct Cmd {
    opcode: u8,
    flags: u8,
    nsid: u32,
    prp1: u64,
    prp2: u64,
    words: [u32; 6],
}

/// A read, write or zeroing of `blocks` blocks.
fn transfer(opcode: u8, start: u64, blocks: u32, prp1: u64, prp2: u64) -> Cmd {
    let words = [start as u32, (start >> 32) as u32, blocks.wrapping_sub(1), 0, 0, 0];
    Cmd { opcode, nsid: 1, prp1, prp2, words, ..Cmd::default() }
}
const WRITE: u8 = 1;
const READ: u8 = 2;
const FLUSH: Cmd = Cmd { opcode: 0, flags: 0, nsid: 1, prp1: 0, prp2: 0, words: [0; 6] };

/// A completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Done {
    id: u16,
    queue: u16,
    head: u16,
    result: u32,
    status: u16,
    do_not_retry: bool,
}

/// The driver's side of a pair of queues.
#[derive(Debug, Clone, Copy)]
struct Pair {
    submission: u64,
    completion: u64,
    entries: u32,
    tail: u32,
    head: u32,
    phase: bool,
}

impl Pair {
    fn new(index: u16, entries: u32) -> Pair {
        let submission = QUEUES_AT + u64::from(index) * 0x2_0000;
        Pair { submission, completion: submission + 0x1_0000, entries, tail: 0, head: 0, phase: true }
    }
}

struct Nowhere;
impl Placement for Nowhere {
    fn place_video_ram(&self, _: Option<u64>) {}
    fn place_doorbell(&self, _: &Event, _: u64, _: bool) {}
}

struct Driver {
    view: BusView,
    bar: u64,
    msix: u64,
    ram: GuestRam,
    root: PciRoot,
    mmio: Arc<Bus>,
    sent: Arc<Sent>,
    level: Arc<Mutex<bool>>,
    function: Arc<Mutex<Nvme>>,
    io: NvmeIo,
    disk: Arc<Gate>,
    reports: mpsc::Receiver<String>,
    pairs: BTreeMap<u16, Pair>,
    next_id: u16,
}

impl Driver {
    /// A controller that nobody has touched, with its BARs placed.
    fn cold(disk: Arc<Gate>) -> Driver {
        Driver::with_ram(GuestRam::new(RAM_BYTES).unwrap(), disk)
    }
    fn with_ram(ram: GuestRam, disk: Arc<Gate>) -> Driver {
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let sent = Arc::new(Sent::default());
        let level = Arc::new(Mutex::new(false));
        let wire = Arc::clone(&level);
        let line = IrqLine::new(move |high| *wire.lock().unwrap() = high);
        let sink = Arc::clone(&sent) as Arc<dyn MsiSink>;
        let mut root = PciRoot::new(pio, Arc::clone(&mmio), Arc::new(Nowhere), sink);
        let (tell, reports) = mpsc::channel();
        let tell = Mutex::new(tell);
        let report: FaultReport = Arc::new(move |reason| drop(tell.lock().unwrap().send(reason)));
        let (memory, backend) = (ram.clone(), Arc::clone(&disk) as Arc<dyn BlockBackend>);
        let plugged = NvmeDisk { serial: "serial-of-a-disk-that-is-long".into(), backend };
        let function =
            root.try_add(FUNCTION, line, VECTORS, |wiring| Nvme::new(memory, &wiring, plugged, report)).unwrap();
        let io = function.lock().unwrap().io();
        assign::assign(&mut root);
        let bar = root.read(FUNCTION, 0x10, Width::B4) & !15;
        let msix = root.read(FUNCTION, 0x20, Width::B4) & !15;
        let view = mmio.view();
        let pairs = BTreeMap::new();
        let next_id = 0x100;
        Driver { view, bar, msix, ram, root, mmio, sent, level, function, io, disk, reports, pairs, next_id }
    }

    /// Enabled, over the pin, with one pair of I/O queues of 16.
    fn new() -> Driver {
        Driver::with(Gate::new(false))
    }
    fn with(disk: Arc<Gate>) -> Driver {
        let mut driver = Driver::cold(disk);
        driver.enable();
        driver.create(1, 16, 0);
        driver
    }

    fn read(&mut self, at: u64) -> u32 {
        self.view.read(self.bar + at, Width::B4) as u32
    }
    fn write(&mut self, at: u64, value: u64) {
        self.view.write(self.bar + at, Width::B4, value);
    }
    fn ring_tail(&mut self, queue: u16, value: u32) {
        self.write(0x1000 + 8 * u64::from(queue), value.into());
    }
    fn ring_head(&mut self, queue: u16, value: u32) {
        self.write(0x1004 + 8 * u64::from(queue), value.into());
    }
    /// Waits for bits of CSTS.
    fn csts(&mut self, mask: u32, value: u32) {
        self.until("CSTS", |driver| driver.read(CSTS) & mask == value);
    }
    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Driver) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < end, "never: {what}");
            thread::sleep(Duration::from_micros(50));
        }
    }
    fn is_high(&self) -> bool {
        *self.level.lock().unwrap()
    }
    fn sent(&self) -> Vec<u32> {
        self.sent.0.lock().unwrap().iter().map(|message| message.data).collect()
    }

    /// CC.EN with admin queues of 16, both zeroed.
    fn enable(&mut self) {
        self.enable_with(16);
        self.csts(0xf, 1);
    }
    fn enable_with(&mut self, entries: u32) {
        self.disable();
        let pair = self.fresh_pair(0, entries);
        self.write(AQA, u64::from((entries - 1) << 16 | (entries - 1)));
        self.view.write(self.bar + ASQ, Width::B8, pair.submission);
        self.view.write(self.bar + ACQ, Width::B8, pair.completion);
        self.write(CC, CC_SIZES | 1);
    }
    fn disable(&mut self) {
        self.write(CC, CC_SIZES);
        self.csts(3, 0);
        self.pairs.clear();
    }
    fn fresh_pair(&mut self, index: u16, entries: u32) -> Pair {
        let pair = Pair::new(index, entries);
        self.ram.write(Gpa(pair.submission), &vec![0; 0x2_0000]).unwrap();
        self.pairs.insert(index, pair);
        pair
    }

    /// Enables MSI-X; vector n sends 0x40 + n.
    fn use_msix(&mut self) {
        for vector in 0..u64::from(VECTORS) {
            for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x40 + vector), (12, 0)] {
                self.view.write(self.msix + 16 * vector + offset, Width::B4, value);
            }
        }
        self.root.write(FUNCTION, 0x42, Width::B2, 0x8000);
    }

    /// Makes pair `index`, with interrupts on `vector`.
    fn create(&mut self, index: u16, entries: u32, vector: u32) {
        let pair = self.fresh_pair(index, entries);
        let word = (entries - 1) << 16 | u32::from(index);
        let completion =
            Cmd { opcode: 5, prp1: pair.completion, words: [word, vector << 16 | 3, 0, 0, 0, 0], ..Cmd::default() };
        assert_eq!(self.admin(completion).status, status::SUCCESS);
        let words = [word, u32::from(index) << 16 | 1, 0, 0, 0, 0];
        let submission = Cmd { opcode: 1, prp1: pair.submission, words, ..Cmd::default() };
        assert_eq!(self.admin(submission).status, status::SUCCESS);
    }

    /// Writes a command into its queue without telling the controller. Returns its id.
    fn put(&mut self, queue: u16, cmd: Cmd) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        let mut entry = vec![cmd.opcode, cmd.flags];
        entry.extend(id.to_le_bytes());
        entry.extend(cmd.nsid.to_le_bytes());
        entry.extend([0; 16]);
        entry.extend(cmd.prp1.to_le_bytes());
        entry.extend(cmd.prp2.to_le_bytes());
        cmd.words.iter().for_each(|word| entry.extend(word.to_le_bytes()));
        let pair = self.pairs.get_mut(&queue).unwrap();
        self.ram.write(Gpa(pair.submission + 64 * u64::from(pair.tail)), &entry).unwrap();
        pair.tail = (pair.tail + 1) % pair.entries;
        id
    }
    fn submit(&mut self, queue: u16, cmd: Cmd) -> u16 {
        let id = self.put(queue, cmd);
        self.ring_tail(queue, self.pairs[&queue].tail);
        id
    }

    /// The next completion, if it is there; the doorbell is not rung.
    fn peek(&mut self, queue: u16) -> Option<Done> {
        let pair = self.pairs.get_mut(&queue).unwrap();
        let mut entry = [0; 16];
        self.ram.read(Gpa(pair.completion + 16 * u64::from(pair.head)), &mut entry).unwrap();
        let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        if (word(14) & 1 != 0) != pair.phase {
            return None;
        }
        // The phase may have turned between the two halves of the first look.
        self.ram.read(Gpa(pair.completion + 16 * u64::from(pair.head)), &mut entry).unwrap();
        let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        pair.head = (pair.head + 1) % pair.entries;
        pair.phase ^= pair.head == 0;
        let result = u32::from(word(2)) << 16 | u32::from(word(0));
        let (head, queue, id, field) = (word(8), word(10), word(12), word(14));
        Some(Done { id, queue, head, result, status: field >> 1 & 0x7ff, do_not_retry: field & 0x8000 != 0 })
    }
    /// Waits for a completion and consumes it, as an interrupt handler does.
    fn reap(&mut self, queue: u16) -> Done {
        let mut done = None;
        self.until("a completion", |driver| {
            done = driver.peek(queue);
            done.is_some()
        });
        self.ring_head(queue, self.pairs[&queue].head);
        done.unwrap()
    }
    fn run(&mut self, queue: u16, cmd: Cmd) -> Done {
        let id = self.submit(queue, cmd);
        let done = self.reap(queue);
        assert_eq!((done.id, done.queue), (id, queue));
        assert_eq!(done.do_not_retry, done.status != status::SUCCESS && done.status != status::ABORTED);
        done
    }
    fn admin(&mut self, cmd: Cmd) -> Done {
        self.run(0, cmd)
    }
    /// A command of the first I/O queue; its status.
    fn io(&mut self, cmd: Cmd) -> u16 {
        self.run(1, cmd).status
    }
    fn set_feature(&mut self, feature: u32, value: u32) -> Done {
        self.admin(Cmd { opcode: 9, words: [feature, value, 0, 0, 0, 0], ..Cmd::default() })
    }
    fn get_feature(&mut self, feature: u32, value: u32) -> Done {
        self.admin(Cmd { opcode: 10, words: [feature, value, 0, 0, 0, 0], ..Cmd::default() })
    }
    /// Reads a log page of `bytes` bytes into `DATA`.
    fn log_page(&mut self, page: u32, bytes: u32) -> Vec<u8> {
        self.fill(DATA, &vec![0xee; 4096]);
        let words = [(bytes / 4 - 1) << 16 | page, 0, 0, 0, 0, 0];
        let done = self.admin(Cmd { opcode: 2, nsid: ALL, prp1: DATA, words, ..Cmd::default() });
        assert_eq!(done.status, status::SUCCESS);
        self.bytes(DATA, bytes as usize)
    }

    fn fill(&self, at: u64, bytes: &[u8]) {
        self.ram.write(Gpa(at), bytes).unwrap();
    }
    fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.ram.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }
    fn list(&self, at: u64, pages: &[u64]) {
        self.fill(at, &pages.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>());
    }

    /// Whatever was done to the controller: a driver that starts anew is served.
    fn check_it_serves(&mut self) {
        self.disk.set(|state| (state.full, state.shut) = (false, false));
        self.enable();
        self.create(1, 16, 0);
        self.fill(DATA, &[0x5a; 512]);
        assert_eq!(self.io(transfer(WRITE, 7, 1, DATA, 0)), status::SUCCESS);
        assert_eq!(self.io(transfer(READ, 7, 1, DATA + 0x1000, 0)), status::SUCCESS);
        assert_eq!(self.bytes(DATA + 0x1000, 512), [0x5a; 512]);
    }
}

const ALL: u32 = 0xffff_ffff;

fn number<const BYTES: usize>(data: &[u8], at: usize) -> u64 {
    data[at..at + BYTES].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A disk that holds requests until they are let go, or refuses them for want of space, and notes what was done.
struct Gate {
    disk: Arc<RawFile>,
    file: File,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: bool,
    full: bool,
    inside: usize,
    done: Vec<String>,
}

impl Gate {
    fn new(read_only: bool) -> Arc<Gate> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK_BYTES).unwrap();
        let disk = RawFile::new(file.try_clone().unwrap(), read_only).unwrap();
        Arc::new(Gate { disk, file, state: Mutex::default(), changed: Condvar::new() })
    }
    fn set(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }
    fn done(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().done)
    }
    /// Waits until a request is held.
    fn held(&self) {
        let state = self.state.lock().unwrap();
        let late = self.changed.wait_timeout_while(state, DEADLINE, |state| state.inside == 0).unwrap().1;
        assert!(!late.timed_out(), "no request came");
    }
    fn stored(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.file.read_exact_at(&mut data, at).unwrap();
        data
    }
    fn store(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }
    fn pass(&self, what: String, work: impl FnOnce() -> Result<(), BlockError>) -> Result<(), BlockError> {
        let mut state = self.state.lock().unwrap();
        state.inside += 1;
        self.changed.notify_all();
        state = self.changed.wait_timeout_while(state, DEADLINE, |state| state.shut).unwrap().0;
        state.inside -= 1;
        if state.full {
            return Err(BlockError::NoSpace);
        }
        work()?;
        state.done.push(what);
        Ok(())
    }
}

fn total(spans: &[RamSpan]) -> u64 {
    spans.iter().map(|span| u64::from(span.bytes)).sum()
}

impl BlockBackend for Gate {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn read(&self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<(), BlockError> {
        self.pass(format!("read {} at {at}", total(into)), || self.disk.read(ram, at, into))
    }
    fn write(&self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<(), BlockError> {
        self.pass(format!("write {} at {at}", total(from)), || self.disk.write(ram, at, from))
    }
    fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BlockError> {
        self.disk.read_bytes(at, into)
    }
    fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        self.disk.write_bytes(at, from)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.pass("flush".into(), || Ok(()))
    }
    fn discard(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.pass(format!("discard {bytes} at {at}"), || self.disk.discard(at, bytes))
    }
    fn write_zeroes(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.pass(format!("zero {bytes} at {at}"), || self.disk.write_zeroes(at, bytes))
    }
}
