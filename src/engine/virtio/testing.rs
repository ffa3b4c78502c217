//! A driver for tests: it finds a virtio function on a PCI bus and drives it through its registers and guest RAM, as the
//! driver in a guest does. Nothing here knows the inside of a device.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use super::{Features, VirtioDevice, pci::VirtioPci};
use crate::engine::{
    bus::{Bus, BusView, Width},
    event::Event,
    irq::tests::recorder,
    layout::slot,
    memory::{Gpa, GuestRam},
    pci::{
        DevFn, assign,
        msix::tests::Sent,
        root::{PciRoot, Placement},
    },
    saved::{BadState, State},
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

pub(crate) const VERSION_1: Features = 1 << 32;
pub(crate) const EVENT_IDX: Features = 1 << 29;
pub(crate) const INDIRECT: Features = 1 << 28;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
const INDIRECT_TABLE: u16 = 4;

const RAM_BYTES: u64 = 8 << 20;
/// Rings are from here on, buffers of tests above `BUFFERS`.
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x4000;
pub(crate) const BUFFERS: u64 = 0x10_0000;
/// Behind it is the VGA window.
const LOW_RAM_END: u64 = 0xa_0000;
/// What MSI-X vectors send: this plus their number.
const MESSAGE: u32 = 0x40;
const FUNCTION: DevFn = DevFn::new(slot::DISK, 0);

/// Waits for a condition.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_micros(100));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Region {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
}

/// The function's registers as one vCPU reaches them.
pub(crate) struct Registers {
    view: BusView,
    regions: BTreeMap<Region, u64>,
    notify_multiplier: u64,
}

impl Registers {
    pub(crate) fn read(&mut self, region: Region, offset: u64, width: Width) -> u64 {
        self.view.read(self.regions[&region] + offset, width)
    }
    pub(crate) fn write(&mut self, region: Region, offset: u64, width: Width, value: u64) {
        self.view.write(self.regions[&region] + offset, width, value);
    }
    pub(crate) fn status(&mut self) -> u8 {
        self.read(Region::Common, 0x14, Width::B1) as u8
    }
    pub(crate) fn set_status(&mut self, status: u8) {
        self.write(Region::Common, 0x14, Width::B1, u64::from(status));
    }
    /// Writes 0 to the status, which returns when the device has let go of the guest's memory.
    pub(crate) fn reset(&mut self) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
    }
    pub(crate) fn kick(&mut self, queue: u16) {
        self.write(Region::Common, 0x16, Width::B2, u64::from(queue));
        let offset = self.read(Region::Common, 0x1e, Width::B2);
        self.write(Region::Notify, offset * self.notify_multiplier, Width::B2, u64::from(queue));
    }
    pub(crate) fn wait_needs_reset(&mut self) {
        eventually("DEVICE_NEEDS_RESET", || self.status() & NEEDS_RESET != 0);
    }
}

/// A piece of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    at: u64,
    bytes: u32,
    flags: u16,
}

pub(crate) fn readable(at: u64, bytes: u32) -> Piece {
    Piece { at, bytes, flags: 0 }
}
pub(crate) fn writable(at: u64, bytes: u32) -> Piece {
    Piece { at, bytes, flags: WRITE }
}

/// An element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) bytes: u32,
}

/// The driver's side of one queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ring {
    size: u16,
    at: u64,
    free: u16,
    available: u16,
    seen: u16,
}

impl Ring {
    fn descriptors(self) -> u64 {
        self.at
    }
    pub(crate) fn avail(self) -> u64 {
        self.at + 0x1000
    }
    pub(crate) fn used(self) -> u64 {
        self.at + 0x2000
    }
}

struct Nowhere;
impl Placement for Nowhere {
    fn place_video_ram(&self, _: Option<u64>) {}
    fn place_doorbell(&self, _: &Event, _: u64, _: bool) {}
}

pub(crate) struct Driver {
    pub(crate) registers: Registers,
    pub(crate) ram: GuestRam,
    pub(crate) root: PciRoot,
    mmio: Arc<Bus>,
    sent: Arc<Sent>,
    levels: Arc<Mutex<Vec<bool>>>,
    rings: Vec<Ring>,
}

impl Driver {
    /// Puts the device on a bus with RAM, places its BARs and finds its registers by its capabilities.
    pub(crate) fn plug<D: VirtioDevice + 'static>(device: D) -> Driver {
        let ram = GuestRam::new(RAM_BYTES).unwrap();
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let sent = Arc::new(Sent::default());
        let (line, levels) = recorder();
        let mut root = PciRoot::new(pio, Arc::clone(&mmio), Arc::new(Nowhere), Arc::clone(&sent) as _);
        let (vectors, memory) = (VirtioPci::vectors(&device), ram.clone());
        root.try_add(FUNCTION, line, vectors, |wiring| VirtioPci::new(device, memory, &wiring)).unwrap();
        assign::assign(&mut root);
        let (regions, notify_multiplier) = find_registers(&mut root);
        let registers = Registers { view: mmio.view(), regions, notify_multiplier };
        Driver { registers, ram, root, mmio, sent, levels, rings: Vec::new() }
    }

    /// Goes on where `other` is, with a device of the same kind: its RAM and its saved state. Both devices are held.
    pub(crate) fn take_over(&mut self, other: &Driver) {
        self.fill(RINGS, &other.bytes(RINGS, (LOW_RAM_END - RINGS) as usize));
        self.fill(BUFFERS, &other.bytes(BUFFERS, (RAM_BYTES - BUFFERS) as usize));
        self.restore(&other.root.save()).unwrap();
        self.rings.clone_from(&other.rings);
    }

    /// Onto functions as after power on, or after a reset of the device.
    pub(crate) fn restore(&mut self, saved: &[(String, State)]) -> Result<(), BadState> {
        let found = |name: &str| saved.iter().find(|(other, _)| other == name).map(|(_, state)| state.clone());
        self.root.restore(&mut |name| Ok(found(name).expect("the same functions")))
    }

    /// The registers from another vCPU.
    pub(crate) fn other_vcpu(&self) -> Registers {
        let Registers { regions, notify_multiplier, .. } = &self.registers;
        Registers { view: self.mmio.view(), regions: regions.clone(), notify_multiplier: *notify_multiplier }
    }

    /// The whole way to DRIVER_OK with queues of 16, over MSI-X.
    pub(crate) fn start(&mut self, features: Features) {
        self.prepare(features, 16);
        self.use_msix();
        self.driver_ok();
    }

    /// The same over INTx.
    pub(crate) fn start_with_pin(&mut self, features: Features) {
        self.prepare(features, 16);
        self.driver_ok();
    }

    /// The way to DRIVER_OK (virtio 1.2, 3.1.1) without its last step.
    pub(crate) fn prepare(&mut self, features: Features, queue_size: u16) {
        self.registers.reset();
        assert!(self.negotiate(features), "FEATURES_OK sticks for {features:#x}");
        for queue in 0..self.queues() {
            self.set_up_queue(queue, queue_size);
        }
    }

    /// False when the device refuses the features.
    pub(crate) fn negotiate(&mut self, features: Features) -> bool {
        self.registers.set_status(ACKNOWLEDGE);
        self.registers.set_status(ACKNOWLEDGE | DRIVER);
        for half in 0..2u64 {
            self.registers.write(Region::Common, 0x08, Width::B4, half);
            self.registers.write(Region::Common, 0x0c, Width::B4, features >> (32 * half) & 0xffff_ffff);
        }
        self.registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.registers.status() & FEATURES_OK != 0
    }

    pub(crate) fn offered(&mut self) -> Features {
        let mut half = |select: u64| {
            self.registers.write(Region::Common, 0x00, Width::B4, select);
            self.registers.read(Region::Common, 0x04, Width::B4)
        };
        half(1) << 32 | half(0)
    }

    pub(crate) fn queues(&mut self) -> u16 {
        self.registers.read(Region::Common, 0x12, Width::B2) as u16
    }

    /// Zeroes a place in RAM for the queue and gives it to the device.
    pub(crate) fn set_up_queue(&mut self, queue: u16, size: u16) {
        let at = RINGS + u64::from(queue) * RING_BYTES;
        let ring = Ring { size, at, free: 0, available: 0, seen: 0 };
        self.ram.write(Gpa(at), &[0; RING_BYTES as usize]).unwrap();
        self.rings.truncate(usize::from(queue));
        self.rings.push(ring);
        self.place_queue(queue, size, [ring.descriptors(), ring.avail(), ring.used()]);
    }

    /// Writes the queue's registers: descriptors, available ring, used ring.
    pub(crate) fn place_queue(&mut self, queue: u16, size: u16, addresses: [u64; 3]) {
        self.registers.write(Region::Common, 0x16, Width::B2, u64::from(queue));
        self.registers.write(Region::Common, 0x18, Width::B2, u64::from(size));
        for (index, address) in addresses.into_iter().enumerate() {
            let at = 0x20 + 8 * index as u64;
            self.registers.write(Region::Common, at, Width::B4, address & 0xffff_ffff);
            self.registers.write(Region::Common, at + 4, Width::B4, address >> 32);
        }
        self.registers.write(Region::Common, 0x1c, Width::B2, 1);
    }

    /// Vector 0 for the configuration, 1 + n for queue n.
    pub(crate) fn use_msix(&mut self) {
        let table = self.root.read(FUNCTION, 0x14, Width::B4) & !15;
        let mut view = self.mmio.view();
        let queues = self.queues();
        for vector in 0..u64::from(queues) + 1 {
            let data = u64::from(MESSAGE) + vector;
            for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, data), (12, 0)] {
                view.write(table + 16 * vector + offset, Width::B4, value);
            }
        }
        let capability = capabilities(&mut self.root).into_iter().find(|(id, _)| *id == 0x11).unwrap().1;
        self.root.write(FUNCTION, capability + 2, Width::B2, 0x8000);
        self.registers.write(Region::Common, 0x10, Width::B2, 0);
        for queue in 0..queues {
            self.registers.write(Region::Common, 0x16, Width::B2, u64::from(queue));
            self.registers.write(Region::Common, 0x1a, Width::B2, u64::from(queue) + 1);
        }
    }

    pub(crate) fn driver_ok(&mut self) {
        self.registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Writes one descriptor as it is.
    pub(crate) fn descriptor(&self, queue: u16, index: u16, at: u64, bytes: u32, flags: u16, next: u16) {
        let table = self.rings[usize::from(queue)].descriptors();
        self.put_descriptor(table, index, at, bytes, flags, next);
    }

    fn put_descriptor(&self, table: u64, index: u16, at: u64, bytes: u32, flags: u16, next: u16) {
        let mut raw = at.to_le_bytes().to_vec();
        raw.extend(bytes.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.ram.write(Gpa(table + 16 * u64::from(index)), &raw).unwrap();
    }

    /// Puts a head into the available ring.
    pub(crate) fn make_available(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let entry = ring.avail() + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let (at, count) = (Gpa(ring.avail() + 2), ring.available);
        self.ram.write(Gpa(entry), &head.to_le_bytes()).unwrap();
        self.ram.write(at, &count.to_le_bytes()).unwrap();
    }

    /// Writes the index of the available ring as it is.
    pub(crate) fn set_available(&mut self, queue: u16, count: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        ring.available = count;
        self.ram.write(Gpa(ring.avail() + 2), &count.to_le_bytes()).unwrap();
    }

    /// Queues a chain without a kick; gives its head.
    pub(crate) fn add(&mut self, queue: u16, pieces: &[Piece]) -> u16 {
        let ring = self.rings[usize::from(queue)];
        let index = |number: usize| (ring.free + number as u16) % ring.size;
        for (number, piece) in pieces.iter().enumerate() {
            let more = if number + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(queue, index(number), piece.at, piece.bytes, piece.flags | more, index(number + 1));
        }
        self.rings[usize::from(queue)].free = index(pieces.len());
        self.make_available(queue, ring.free);
        ring.free
    }

    /// Queues a chain whose descriptors are in a table at `table`.
    pub(crate) fn add_indirect(&mut self, queue: u16, table: u64, pieces: &[Piece]) -> u16 {
        for (number, piece) in pieces.iter().enumerate() {
            let more = if number + 1 < pieces.len() { NEXT } else { 0 };
            let number = number as u16;
            self.put_descriptor(table, number, piece.at, piece.bytes, piece.flags | more, number + 1);
        }
        let outer = Piece { at: table, bytes: 16 * pieces.len() as u32, flags: INDIRECT_TABLE };
        self.add(queue, &[outer])
    }

    /// Queues a chain and kicks.
    pub(crate) fn submit(&mut self, queue: u16, pieces: &[Piece]) -> u16 {
        let head = self.add(queue, pieces);
        self.registers.kick(queue);
        head
    }

    pub(crate) fn ring(&self, queue: u16) -> Ring {
        self.rings[usize::from(queue)]
    }

    /// The head that the next chain will have.
    pub(crate) fn next_head(&self, queue: u16) -> u16 {
        self.ring(queue).free
    }

    /// How far the available ring is.
    pub(crate) fn available(&self, queue: u16) -> u16 {
        self.ring(queue).available
    }

    /// How far the used ring is.
    pub(crate) fn used_index(&self, queue: u16) -> u16 {
        self.ram.get_u16(Gpa(self.rings[usize::from(queue)].used() + 2)).unwrap()
    }

    /// The next used element, if it is there.
    pub(crate) fn used(&mut self, queue: u16) -> Option<Used> {
        let index = self.used_index(queue);
        let ring = &mut self.rings[usize::from(queue)];
        if index == ring.seen {
            return None;
        }
        let at = ring.used() + 4 + 8 * u64::from(ring.seen % ring.size);
        ring.seen = ring.seen.wrapping_add(1);
        let head = self.ram.get_u32(Gpa(at)).unwrap() as u16;
        Some(Used { head, bytes: self.ram.get_u32(Gpa(at + 4)).unwrap() })
    }

    pub(crate) fn wait_used(&mut self, queue: u16) -> Used {
        let mut found = None;
        eventually("a used buffer", || {
            found = self.used(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// Submits and waits.
    pub(crate) fn run(&mut self, queue: u16, pieces: &[Piece]) -> Used {
        let head = self.submit(queue, pieces);
        let used = self.wait_used(queue);
        assert_eq!(used.head, head);
        used
    }

    /// The driver's wish for the next interrupt (virtio 1.2, 2.7.10), with the event index.
    pub(crate) fn set_used_event(&self, queue: u16, index: u16) {
        let ring = self.rings[usize::from(queue)];
        self.ram.write(Gpa(ring.avail() + 4 + 2 * u64::from(ring.size)), &index.to_le_bytes()).unwrap();
    }

    /// The flags of the available ring: 1 for no interrupts, without the event index.
    pub(crate) fn set_avail_flags(&self, queue: u16, flags: u16) {
        self.ram.write(Gpa(self.rings[usize::from(queue)].avail()), &flags.to_le_bytes()).unwrap();
    }

    /// The device's wish for the next kick, with the event index.
    pub(crate) fn avail_event(&self, queue: u16) -> u16 {
        let ring = self.rings[usize::from(queue)];
        self.ram.get_u16(Gpa(ring.used() + 4 + 8 * u64::from(ring.size))).unwrap()
    }

    /// The flags of the used ring: 1 for no kicks, without the event index.
    pub(crate) fn used_flags(&self, queue: u16) -> u16 {
        self.ram.get_u16(Gpa(self.rings[usize::from(queue)].used())).unwrap()
    }

    /// How often an MSI-X vector was sent.
    pub(crate) fn messages(&self, vector: u32) -> usize {
        self.sent.0.lock().unwrap().iter().filter(|message| message.data == MESSAGE + vector).count()
    }

    pub(crate) fn all_messages(&self) -> usize {
        self.sent.0.lock().unwrap().len()
    }

    /// Whether the interrupt pin is high.
    pub(crate) fn pin(&self) -> bool {
        self.levels.lock().unwrap().last().copied().unwrap_or(false)
    }

    /// How often the pin went high.
    pub(crate) fn pin_rises(&self) -> usize {
        self.levels.lock().unwrap().iter().filter(|high| **high).count()
    }

    pub(crate) fn isr(&mut self) -> u8 {
        self.registers.read(Region::Isr, 0, Width::B1) as u8
    }

    pub(crate) fn fill(&self, at: u64, bytes: &[u8]) {
        self.ram.write(Gpa(at), bytes).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.ram.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn config(&mut self, offset: u8, width: Width) -> u64 {
        self.root.read(FUNCTION, offset, width)
    }

    pub(crate) fn set_config(&mut self, offset: u8, width: Width, value: u64) {
        self.root.write(FUNCTION, offset, width, value);
    }

    /// Id and offset of each PCI capability.
    pub(crate) fn capabilities(&mut self) -> Vec<(u8, u8)> {
        capabilities(&mut self.root)
    }
}

fn capabilities(root: &mut PciRoot) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    let mut at = root.read(FUNCTION, 0x34, Width::B1) as u8;
    while at != 0 && found.len() < 48 {
        found.push((root.read(FUNCTION, at, Width::B1) as u8, at));
        at = root.read(FUNCTION, at + 1, Width::B1) as u8;
    }
    found
}

/// virtio 1.2, 4.1.4: the regions by their vendor capabilities, and the notify multiplier.
fn find_registers(root: &mut PciRoot) -> (BTreeMap<Region, u64>, u64) {
    let mut regions = BTreeMap::new();
    let mut multiplier = 0;
    for (_, at) in capabilities(root).into_iter().filter(|(id, _)| *id == 9) {
        let kind = root.read(FUNCTION, at + 3, Width::B1);
        let bar = root.read(FUNCTION, at + 4, Width::B1) as u8;
        let base = root.read(FUNCTION, 0x10 + 4 * bar, Width::B4) & !15;
        let region = match kind {
            1 => Region::Common,
            2 => Region::Notify,
            3 => Region::Isr,
            4 => Region::Device,
            _ => continue,
        };
        if region == Region::Notify {
            multiplier = root.read(FUNCTION, at + 16, Width::B4);
        }
        regions.insert(region, base + root.read(FUNCTION, at + 8, Width::B4));
    }
    assert_eq!(regions.len(), 4, "all four regions");
    (regions, multiplier)
}
