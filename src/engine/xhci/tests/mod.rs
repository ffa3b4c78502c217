//! A small xHCI driver. The tests use the controller only as a driver could.

mod disks;
mod hid;
mod hostile;
mod registers;
mod restored;

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    sync::{Condvar, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::engine::{
    bus::{Bus, BusView},
    disk::{BlockError, DiskShape, RawFile},
    irq::MsiSink,
    memory::{Gpa, RamSpan},
    pci::{assign, msix::tests::Sent, root::Placement},
};

const DEADLINE: Duration = Duration::from_secs(20);
const FUNCTION: DevFn = DevFn::new(XHCI, 0);
const RAM_BYTES: u64 = 16 << 20;
const DISK_BYTES: u64 = 4 << 20;

const DCBAA: u64 = 0x10_0000;
const COMMANDS: u64 = 0x10_1000;
const SEGMENT_TABLE: u64 = 0x10_2000;
const EVENTS: [u64; 2] = [0x10_3000, 0x10_4000];
const EVENT_TRBS: u64 = 32;
const INPUT: u64 = 0x10_5000;
const CONTROL_DATA: u64 = 0x10_6000;
const CONTEXTS_AT: u64 = 0x11_0000;
const RINGS_AT: u64 = 0x20_0000;
/// With the link at the end.
const RING_TRBS: u64 = 16;
/// Where tests have their buffers.
const DATA: u64 = 0x40_0000;

const USBCMD: u64 = 0x40;
const USBSTS: u64 = 0x44;
const CRCR: u64 = 0x58;
const DCBAAP: u64 = 0x70;
const CONFIG: u64 = 0x78;
const IMAN: u64 = 0x1020;
const ERSTSZ: u64 = 0x1028;
const ERSTBA: u64 = 0x1030;
const ERDP: u64 = 0x1038;
const DOORBELL: u64 = 0x2000;
const fn portsc(port: u64) -> u64 {
    0x440 + 0x10 * (port - 1)
}
const KEYBOARD: u64 = 1;
const TABLET: u64 = 2;
const DISK: u64 = 5;

// Bits of the last word of a TRB.
const IOC: u32 = 1 << 5;
const ISP: u32 = 1 << 2;
const CH: u32 = 1 << 4;
const IDT: u32 = 1 << 6;
const BEI: u32 = 1 << 9;

// Completion codes, as the specification has them.
const SUCCESS: u8 = 1;
const TRANSACTION: u8 = 4;
const TRB_ERROR: u8 = 5;
const STALL: u8 = 6;
const NO_SLOTS: u8 = 9;
const SLOT_NOT_ENABLED: u8 = 11;
const ENDPOINT_NOT_ENABLED: u8 = 12;
const SHORT: u8 = 13;
const PARAMETER: u8 = 17;
const CONTEXT_STATE: u8 = 19;
const STOPPED: u8 = 26;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct T {
    parameter: u64,
    status: u32,
    control: u32,
}
fn trb(kind: u32, parameter: u64, status: u32, flags: u32) -> T {
    T { parameter, status, control: kind << 10 | flags }
}
fn normal(at: u64, bytes: u32, flags: u32) -> T {
    trb(1, at, bytes, flags)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ev {
    kind: u8,
    parameter: u64,
    code: u8,
    length: u32,
    slot: u8,
    endpoint: u8,
    event_data: bool,
}

/// The driver's side of a ring that it fills.
#[derive(Debug, Clone, Copy)]
struct Producer {
    base: u64,
    index: u64,
    cycle: bool,
}
impl Producer {
    fn new(base: u64) -> Producer {
        Producer { base, index: 0, cycle: true }
    }
    fn at(&self) -> u64 {
        self.base + 16 * self.index
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
    sent: Arc<Sent>,
    level: Arc<Mutex<bool>>,
    xhci: Arc<Mutex<Xhci>>,
    input: UsbInput,
    disk: Arc<Gate>,
    reports: mpsc::Receiver<String>,
    commands: Producer,
    /// The event ring: segment, index, cycle.
    events: (usize, u64, bool),
    rings: BTreeMap<(u8, u8), Producer>,
    /// Events that were read while another one was awaited.
    early: Vec<Ev>,
}

impl Driver {
    /// A controller that nobody has touched, with its BARs placed.
    fn cold() -> Driver {
        Driver::plug(GuestRam::new(RAM_BYTES).unwrap(), Gate::new(false))
    }
    fn plug(ram: GuestRam, disk: Arc<Gate>) -> Driver {
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let sent = Arc::new(Sent::default());
        let level = Arc::new(Mutex::new(false));
        let wire = Arc::clone(&level);
        let line = IrqLine::new(move |high| *wire.lock().unwrap() = high);
        let mut root = PciRoot::new(pio, Arc::clone(&mmio), Arc::new(Nowhere), Arc::clone(&sent) as Arc<dyn MsiSink>);
        let (tell, reports) = mpsc::channel();
        let tell = Mutex::new(tell);
        let report: FaultReport = Arc::new(move |reason| drop(tell.lock().unwrap().send(reason)));
        let backend = Arc::clone(&disk) as Arc<dyn BlockBackend>;
        let disks = vec![UsbDisk { serial: "disk-1".into(), backend }];
        let devices = UsbDevices { keyboard: true, tablet: true, disks };
        let xhci = add(&mut root, line, ram.clone(), devices, &report).unwrap();
        let input = xhci.lock().unwrap().input();
        assign::assign(&mut root);
        let bar = root.read(FUNCTION, 0x10, Width::B4) & !15;
        let msix = root.read(FUNCTION, 0x20, Width::B4) & !15;
        let view = mmio.view();
        let (commands, events) = (Producer::new(COMMANDS), (0, 0, true));
        let (rings, early) = (BTreeMap::new(), Vec::new());
        Driver { view, bar, msix, ram, root, sent, level, xhci, input, disk, reports, commands, events, rings, early }
    }

    /// Started, with interrupts over the pin.
    fn new() -> Driver {
        Driver::with(Gate::new(false))
    }
    fn with(disk: Arc<Gate>) -> Driver {
        let mut driver = Driver::plug(GuestRam::new(RAM_BYTES).unwrap(), disk);
        driver.start();
        driver
    }

    fn read(&mut self, at: u64) -> u32 {
        self.view.read(self.bar + at, Width::B4) as u32
    }
    fn write(&mut self, at: u64, value: u32) {
        self.view.write(self.bar + at, Width::B4, value.into());
    }
    fn write_pointer(&mut self, at: u64, value: u64) {
        self.write(at, value as u32);
        self.write(at + 4, (value >> 32) as u32);
    }
    fn io(&self) -> XhciIo {
        self.xhci.lock().unwrap().io()
    }
    fn is_high(&self) -> bool {
        *self.level.lock().unwrap()
    }
    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Driver) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < end, "never: {what}");
            thread::sleep(Duration::from_micros(50));
        }
    }
    fn fill(&self, at: u64, bytes: &[u8]) {
        self.ram.write(Gpa(at), bytes).unwrap();
    }
    fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.ram.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }
    fn words(&self, at: u64) -> [u32; 8] {
        std::array::from_fn(|index| self.ram.get_u32(Gpa(at + 4 * index as u64)).unwrap())
    }

    /// Reset and start, in the order of Linux.
    fn start(&mut self) {
        self.write(USBCMD, 0);
        assert_eq!(self.read(USBSTS) & 1, 1, "halted");
        self.write(USBCMD, 2);
        assert_eq!((self.read(USBCMD) & 2, self.read(USBSTS) & 0x800), (0, 0));
        self.fill(DCBAA, &[0; 0x6000]);
        self.fill(CONTEXTS_AT, &[0; 0x1_1000]);
        self.commands = Producer::new(COMMANDS);
        self.events = (0, 0, true);
        (self.rings, self.early) = (BTreeMap::new(), Vec::new());
        self.write(CONFIG, 16);
        self.write_pointer(DCBAAP, DCBAA);
        self.write_pointer(CRCR, COMMANDS | 1);
        for (index, segment) in (0..).zip(EVENTS) {
            self.fill(SEGMENT_TABLE + 16 * index, &segment.to_le_bytes());
            self.fill(SEGMENT_TABLE + 16 * index + 8, &(EVENT_TRBS as u32).to_le_bytes());
        }
        self.write(ERSTSZ, 2);
        self.write_pointer(ERSTBA, SEGMENT_TABLE);
        self.write_pointer(ERDP, EVENTS[0]);
        self.write(IMAN, 3);
        self.write(USBCMD, 5);
        assert_eq!(self.read(USBSTS) & 1, 0);
        let mut told = Vec::new();
        while let Some(event) = self.event() {
            told.push((event.kind, event.parameter >> 24));
        }
        assert_eq!(told, [(34, KEYBOARD), (34, TABLET), (34, DISK)], "what is plugged in");
    }

    /// The next event, consumed.
    fn event(&mut self) -> Option<Ev> {
        let event = self.peek()?;
        let (segment, index, _) = self.events;
        self.write_pointer(ERDP, (EVENTS[segment] + 16 * index) | 8);
        Some(event)
    }
    /// The next event; the controller is not told that it was consumed.
    fn peek(&mut self) -> Option<Ev> {
        let (segment, index, cycle) = self.events;
        let at = EVENTS[segment] + 16 * index;
        let control = self.ram.get_u32(Gpa(at + 12)).unwrap();
        if (control & 1 != 0) != cycle {
            return None;
        }
        let (parameter, status) = (self.ram.get_u64(Gpa(at)).unwrap(), self.ram.get_u32(Gpa(at + 8)).unwrap());
        self.events = match (segment, index + 1) {
            (0, EVENT_TRBS) => (1, 0, cycle),
            (_, EVENT_TRBS) => (0, 0, !cycle),
            (segment, index) => (segment, index, cycle),
        };
        Some(Ev {
            kind: (control >> 10) as u8 & 0x3f,
            parameter,
            code: (status >> 24) as u8,
            length: status & 0xff_ffff,
            slot: (control >> 24) as u8,
            endpoint: (control >> 16) as u8 & 0x1f,
            event_data: control & 4 != 0,
        })
    }
    /// Waits for an event of this type; those of other types are kept.
    fn await_event(&mut self, what: &str, wanted: impl Fn(&Ev) -> bool) -> Ev {
        if let Some(at) = self.early.iter().position(&wanted) {
            return self.early.remove(at);
        }
        let mut found = None;
        self.until(what, |driver| {
            while let Some(event) = driver.event() {
                if wanted(&event) {
                    found = Some(event);
                    return true;
                }
                driver.early.push(event);
            }
            false
        });
        found.unwrap()
    }
    fn transfer_event(&mut self, slot: u8, endpoint: u8) -> Ev {
        self.await_event("a transfer event", |event| (event.kind, event.slot, event.endpoint) == (32, slot, endpoint))
    }
    fn no_event(&mut self) {
        assert_eq!(self.early, []);
        assert_eq!(self.event(), None);
    }

    fn put(&self, producer: &mut Producer, trb: T) -> u64 {
        if producer.index == RING_TRBS - 1 {
            let toggle = 1 << 1;
            self.put_at(
                producer.at(),
                T { parameter: producer.base, status: 0, control: 6 << 10 | toggle },
                producer.cycle,
            );
            (producer.index, producer.cycle) = (0, !producer.cycle);
        }
        let at = producer.at();
        self.put_at(at, trb, producer.cycle);
        producer.index += 1;
        at
    }
    fn put_at(&self, at: u64, T { parameter, status, control }: T, cycle: bool) {
        self.fill(at, &parameter.to_le_bytes());
        self.fill(at + 8, &status.to_le_bytes());
        self.fill(at + 12, &(control & !1 | u32::from(cycle)).to_le_bytes());
    }

    fn command(&mut self, kind: u32, parameter: u64, control: u32) -> (u8, u8) {
        let mut commands = self.commands;
        let at = self.put(&mut commands, trb(kind, parameter, 0, control));
        self.commands = commands;
        self.write(DOORBELL, 0);
        let event = self.await_event("a command's completion", |event| event.kind == 33);
        assert_eq!(event.parameter, at);
        (event.code, event.slot)
    }
    fn slot_command(&mut self, kind: u32, slot: u8, endpoint: u8) -> u8 {
        self.command(kind, 0, u32::from(slot) << 24 | u32::from(endpoint) << 16).0
    }
    fn set_dequeue(&mut self, slot: u8, endpoint: u8) -> u8 {
        let ring = self.rings[&(slot, endpoint)];
        self.command(16, ring.at() | u64::from(ring.cycle), u32::from(slot) << 24 | u32::from(endpoint) << 16).0
    }

    /// Puts TRBs on a transfer ring and rings its doorbell; where the first one is.
    fn queue(&mut self, slot: u8, endpoint: u8, trbs: &[T]) -> u64 {
        let first = self.put_all(slot, endpoint, trbs);
        self.write(DOORBELL + 4 * u64::from(slot), endpoint.into());
        first
    }
    fn put_all(&mut self, slot: u8, endpoint: u8, trbs: &[T]) -> u64 {
        let mut ring = self.rings[&(slot, endpoint)];
        let places: Vec<u64> = trbs.iter().map(|trb| self.put(&mut ring, *trb)).collect();
        self.rings.insert((slot, endpoint), ring);
        places[0]
    }
    fn ring_for(&mut self, slot: u8, endpoint: u8) -> u64 {
        let base = RINGS_AT + u64::from(slot) * 0x2_0000 + u64::from(endpoint) * 0x1000;
        self.fill(base, &[0; 16 * RING_TRBS as usize]);
        self.rings.insert((slot, endpoint), Producer::new(base));
        base
    }

    fn output(&self, slot: u8) -> u64 {
        CONTEXTS_AT + u64::from(slot) * 0x1000
    }
    fn slot_state(&self, slot: u8) -> u32 {
        self.words(self.output(slot))[3] >> 27
    }
    fn endpoint_state(&self, slot: u8, endpoint: u8) -> u32 {
        self.words(self.output(slot) + 32 * u64::from(endpoint))[0] & 7
    }
    fn input_context(&self, index: u64, words: &[u32]) {
        for (at, word) in (0..).zip(words) {
            self.fill(INPUT + 32 * index + 4 * at, &word.to_le_bytes());
        }
    }
    /// The input context of Address Device.
    fn prepare_address(&mut self, slot: u8, port: u64) {
        let ring = self.ring_for(slot, 1);
        self.fill(INPUT, &[0; 33 * 32]);
        self.fill(DCBAA + 8 * u64::from(slot), &self.output(slot).to_le_bytes());
        self.input_context(0, &[0, 3]);
        let speed = if port >= DISK { 4 } else { 3 };
        self.input_context(1, &[1 << 27 | speed << 20, (port as u32) << 16, 0, 0]);
        let packet = if port >= DISK { 512 } else { 64 };
        self.input_context(2, &[0, packet << 16 | 4 << 3 | 3 << 1, ring as u32 | 1, (ring >> 32) as u32, 8]);
    }
    fn reset_port(&mut self, port: u64) {
        let status = self.read(portsc(port)) & 0x0e00_c200;
        self.write(portsc(port), status | 1 << 4);
        let event = self.await_event("a port's change", |event| event.kind == 34);
        assert_eq!(event.parameter, port << 24);
        let after = self.read(portsc(port));
        assert_eq!(after & 0x0020_01f3, 0x0020_0003, "{after:#x}");
        self.write(portsc(port), status | after & 0x00fe_0000);
    }
    /// Resets the port where it is USB 2, enables a slot and addresses the device.
    fn attach(&mut self, port: u64) -> u8 {
        let status = self.read(portsc(port)) & 0x0e00_c200;
        self.write(portsc(port), status | 0x00fe_0000);
        if port < DISK {
            self.reset_port(port);
        }
        let (code, slot) = self.command(9, 0, 0);
        assert_eq!(code, SUCCESS);
        self.prepare_address(slot, port);
        assert_eq!(self.command(11, INPUT, u32::from(slot) << 24), (SUCCESS, slot));
        assert_eq!((self.slot_state(slot), self.endpoint_state(slot, 1)), (2, 1));
        slot
    }
    /// Configures endpoints: index, type, packet bytes.
    fn configure(&mut self, slot: u8, endpoints: &[(u8, u32, u32)]) -> u8 {
        self.fill(INPUT, &[0; 33 * 32]);
        let mut add = 1;
        for (index, kind, packet) in endpoints {
            let ring = self.ring_for(slot, *index);
            add |= 1 << index;
            let place = u64::from(*index) + 1;
            self.input_context(place, &[0, packet << 16 | kind << 3, ring as u32 | 1, (ring >> 32) as u32, *packet]);
        }
        self.input_context(0, &[0, add]);
        self.input_context(1, &[5 << 27]);
        self.command(12, INPUT, u32::from(slot) << 24).0
    }

    /// A control transfer, as Linux makes one; the code of the stage that ended it, and the data that came.
    fn control(&mut self, slot: u8, setup: [u8; 8], data: &[u8]) -> (u8, Vec<u8>) {
        let length = u32::from(u16::from_le_bytes([setup[6], setup[7]]));
        let to_host = setup[0] & 0x80 != 0;
        let kind = if length == 0 {
            0
        } else if to_host {
            3
        } else {
            2
        };
        self.fill(CONTROL_DATA, &[0xee; 4096]);
        self.fill(CONTROL_DATA, data);
        let mut trbs = vec![trb(2, u64::from_le_bytes(setup), 8, IDT | kind << 16)];
        if length > 0 {
            trbs.push(trb(3, CONTROL_DATA, length, ISP | u32::from(to_host) << 16));
        }
        trbs.push(trb(4, 0, 0, IOC | u32::from(!to_host || length == 0) << 16));
        let first = self.queue(slot, 1, &trbs);
        let mut received = length;
        let mut event = self.transfer_event(slot, 1);
        if event.code == SHORT {
            assert_ne!(event.parameter, first);
            received = length - event.length;
            event = self.transfer_event(slot, 1);
        }
        let bytes =
            if to_host && event.code == SUCCESS { self.bytes(CONTROL_DATA, received as usize) } else { Vec::new() };
        (event.code, bytes)
    }
    fn get(&mut self, slot: u8, setup: [u8; 8]) -> Vec<u8> {
        let (code, data) = self.control(slot, setup, &[]);
        assert_eq!(code, SUCCESS, "{setup:x?}");
        data
    }
    fn set(&mut self, slot: u8, setup: [u8; 8], data: &[u8]) {
        assert_eq!(self.control(slot, setup, data).0, SUCCESS, "{setup:x?}");
    }
    /// After a stall: Reset Endpoint, Set TR Dequeue Pointer.
    fn recover(&mut self, slot: u8, endpoint: u8) {
        assert_eq!(self.endpoint_state(slot, endpoint), 2, "halted");
        assert_eq!(self.slot_command(14, slot, endpoint), SUCCESS);
        assert_eq!(self.set_dequeue(slot, endpoint), SUCCESS);
        assert_eq!(self.endpoint_state(slot, endpoint), 3);
    }

    /// A HID device, configured.
    fn attach_hid(&mut self, port: u64) -> u8 {
        let slot = self.attach(port);
        assert_eq!(self.configure(slot, &[(3, 7, 8)]), SUCCESS);
        self.set(slot, [0, 9, 1, 0, 0, 0, 0, 0], &[]);
        slot
    }
    /// The disk, configured.
    fn attach_disk(&mut self) -> u8 {
        let slot = self.attach(DISK);
        assert_eq!(self.configure(slot, &[(3, 6, 1024), (4, 2, 1024)]), SUCCESS);
        assert_eq!(self.slot_state(slot), 3);
        self.set(slot, [0, 9, 1, 0, 0, 0, 0, 0], &[]);
        slot
    }

    /// Whatever was done to the controller: a driver that starts anew is served.
    fn check_it_serves(&mut self) {
        self.disk.set(|state| (state.full, state.shut) = (false, false));
        self.start();
        let slot = self.attach_hid(TABLET);
        self.queue(slot, 3, &[normal(DATA, 8, IOC | ISP)]);
        self.input.pointer(3, 4, 1, 0);
        self.input.pointer(7, 8, 0, 0);
        assert_eq!((self.transfer_event(slot, 3).code, self.bytes(DATA + 1, 2)), (SHORT, vec![3, 0]));
        let slot = self.attach_disk();
        self.fill(DATA, &[0x5a; 512]);
        assert_eq!(disks::write(self, slot, 7, 1), (0, 0));
        self.fill(DATA, &[0; 512]);
        assert_eq!(disks::read(self, slot, 7, 1), (0, 0));
        assert_eq!(self.bytes(DATA, 512), [0x5a; 512]);
    }
}

/// A disk that holds requests until they are let go, or refuses them for want of space.
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

impl BlockBackend for Gate {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn read(&self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<(), BlockError> {
        self.disk.read(ram, at, into)
    }
    fn write(&self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<(), BlockError> {
        self.disk.write(ram, at, from)
    }
    fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BlockError> {
        self.pass(format!("read {} at {at}", into.len()), || self.disk.read_bytes(at, into))
    }
    fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        self.pass(format!("write {} at {at}", from.len()), || self.disk.write_bytes(at, from))
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.pass("flush".into(), || self.disk.flush())
    }
    fn discard(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.disk.discard(at, bytes)
    }
    fn write_zeroes(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.disk.write_zeroes(at, bytes)
    }
}
