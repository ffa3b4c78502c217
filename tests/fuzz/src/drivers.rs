//! What drivers do, so far as it takes to reach the code behind rings and queues: a start that is right, and requests whose every
//! byte is the fuzzer's.

use crate::{
    bench::Bench,
    engine::bus::Width,
    input::Input,
    machine::{DATA, RINGS},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    None,
    Virtio,
    Ahci,
    Nvme,
    E1000,
    Xhci,
    FwCfg,
}

/// How far the driver's rings are.
#[derive(Default)]
pub(crate) struct Driving {
    tails: [u16; 32],
    virtio_size: u16,
}

/// Entries of each ring but those of virtio.
const ENTRIES: u16 = 16;

impl Driving {
    /// Brings the device to where it serves requests.
    pub(crate) fn start(&mut self, bench: &mut Bench, input: &mut Input<'_>) {
        self.tails = Default::default();
        match bench.device.driver {
            Driver::None | Driver::FwCfg => {}
            Driver::Virtio => self.start_virtio(bench, input),
            Driver::Ahci => start_ahci(bench),
            Driver::Nvme => self.start_nvme(bench),
            Driver::E1000 => start_e1000(bench, input),
            Driver::Xhci => self.start_xhci(bench, input),
        }
        crate::engine::turns::take_all();
    }

    /// Gives it one.
    pub(crate) fn request(&mut self, bench: &mut Bench, input: &mut Input<'_>) {
        let form = input.u8();
        match bench.device.driver {
            Driver::None => {}
            Driver::Virtio => self.request_virtio(bench, form, input),
            Driver::Ahci => request_ahci(bench, form, input),
            Driver::Nvme => self.request_nvme(bench, form, input),
            Driver::E1000 => self.request_e1000(bench, form, input),
            Driver::Xhci => self.request_xhci(bench, form, input),
            Driver::FwCfg => request_fw_cfg(bench, form, input),
        }
        if form & 0x80 == 0 {
            crate::engine::turns::take_all();
        }
    }

    /// The next place in a ring.
    fn advance(&mut self, ring: usize, entries: u16) -> u64 {
        let tail = self.tails[ring];
        self.tails[ring] = (tail + 1) % entries;
        tail.into()
    }
}

// ---- virtio ----

const VIRTIO_RING_BYTES: u64 = 0x4000;
const INDIRECT_TABLES: u64 = RINGS + 0x8_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Driving {
    /// virtio 1.2, 3.1.1; with all features but those that the input refuses.
    fn start_virtio(&mut self, bench: &mut Bench, input: &mut Input<'_>) {
        let (refused, size) = (input.u32(), 1u16 << (1 + input.u8() % 8));
        self.virtio_size = size;
        let common = bench.bar(4);
        let put = |bench: &mut Bench, at: u64, width, value: u64| bench.write(common + at, width, value);
        for status in [0, 1, 3] {
            put(bench, 0x14, Width::B1, status);
        }
        for half in [0, 1] {
            put(bench, 0, Width::B4, half);
            let offered = bench.mmio.read(common + 4, Width::B4);
            put(bench, 8, Width::B4, half);
            put(bench, 12, Width::B4, offered & !(if half == 0 { u64::from(refused) } else { 0 }));
        }
        put(bench, 0x14, Width::B1, 11);
        let queues = bench.mmio.read(common + 0x12, Width::B2);
        for queue in 0..queues {
            let at = RINGS + queue * VIRTIO_RING_BYTES;
            bench.fill(at, &[0; VIRTIO_RING_BYTES as usize]);
            put(bench, 0x16, Width::B2, queue);
            put(bench, 0x18, Width::B2, size.into());
            for (register, address) in [(0x20, at), (0x28, at + 0x1000), (0x30, at + 0x2000)] {
                put(bench, register, Width::B4, address);
                put(bench, register + 4, Width::B4, 0);
            }
            put(bench, 0x1c, Width::B2, 1);
        }
        put(bench, 0x14, Width::B1, 15);
    }

    /// A chain of up to four buffers, and the first bytes of the first.
    fn request_virtio(&mut self, bench: &mut Bench, form: u8, input: &mut Input<'_>) {
        let queue = u64::from(form & 7);
        let ring = RINGS + queue * VIRTIO_RING_BYTES;
        let size = self.virtio_size.max(1);
        let indirect = form & 0x40 != 0;
        let count = u16::from(form >> 4 & 3) + 1;
        let available = self.tails[queue as usize];
        let head = available.wrapping_mul(4) % size;
        let (table, first) = if indirect { (INDIRECT_TABLES + 0x1000 * queue, 0) } else { (ring, head) };
        for number in 0..count {
            let shape = input.u8();
            let mut at = input.place();
            if shape & 4 != 0 {
                at += u64::from(input.u16());
            }
            let bytes = if shape & 8 != 0 { input.u32() } else { input.u8().into() };
            if number == 0 {
                bench.fill(at, input.string());
            }
            let index = (first + number) % size.max(count);
            let mut flags = if shape & 1 != 0 { WRITE } else { 0 };
            if number + 1 < count || shape & 0x30 == 0x30 {
                flags |= NEXT;
            }
            let next = if shape & 0xc0 == 0xc0 { u16::from(input.u8()) } else { index + 1 };
            put_descriptor(bench, table + 16 * u64::from(index), at, bytes, flags, next);
        }
        if indirect {
            put_descriptor(bench, ring + 16 * u64::from(head), table, 16 * u32::from(count), INDIRECT, 0);
        }
        bench.fill(ring + 0x1004 + 2 * u64::from(available % size), &head.to_le_bytes());
        self.tails[queue as usize] = available.wrapping_add(1);
        bench.fill(ring + 0x1002, &self.tails[queue as usize].to_le_bytes());
        let doorbell = bench.bar(4) + 0x3000 + 4 * queue;
        bench.write(doorbell, Width::B2, queue);
    }
}

fn put_descriptor(bench: &Bench, to: u64, at: u64, bytes: u32, flags: u16, next: u16) {
    bench.fill(to, &at.to_le_bytes());
    bench.fill_u32(to + 8, &[bytes, u32::from(flags) | u32::from(next) << 16]);
}

// ---- AHCI 1.3.1 ----

/// The ports that something is behind.
const AHCI_PORTS: [u64; 2] = [0, 5];
fn ahci_list(port: u64) -> u64 {
    RINGS + port * 0x4000
}
fn ahci_port(bench: &Bench, port: u64) -> u64 {
    bench.bar(5) + 0x100 + port * 0x80
}

fn start_ahci(bench: &mut Bench) {
    let registers = bench.bar(5);
    bench.write(registers + 4, Width::B4, 0x8000_0002);
    for port in AHCI_PORTS {
        let at = ahci_port(bench, port);
        bench.write(at + 0x18, Width::B4, 0);
        for (register, value) in [
            (0x00, ahci_list(port)),
            (0x04, 0),
            (0x08, ahci_list(port) + 0x400),
            (0x0c, 0),
            (0x10, 0xffff_ffff),
            (0x30, 0xffff_ffff),
            (0x14, 0xffff_ffff),
            (0x18, 0x16),
            (0x18, 0x17),
        ] {
            bench.write(at + register, Width::B4, value);
        }
    }
}

/// A command table, its header and its issue.
fn request_ahci(bench: &mut Bench, form: u8, input: &mut Input<'_>) {
    let (port, slot) = (AHCI_PORTS[usize::from(form & 1)], u64::from(form >> 1 & 3));
    let (list, table) = (ahci_list(port), ahci_list(port) + 0x1000 + slot * 0x200);
    let entries = u32::from(form >> 4 & 3);
    let mut fis = [0; 20];
    fis[..2].copy_from_slice(&[0x27, 0x80]);
    if form & 0x40 != 0 {
        // The whole frame is the fuzzer's.
        fis[..2].copy_from_slice(&[input.u8(), input.u8()]);
    }
    for (to, byte) in fis[2..14].iter_mut().zip(input.bytes(12)) {
        *to = *byte;
    }
    bench.fill(table, &fis);
    let packet = if port == 5 { input.bytes(12) } else { &[] };
    bench.fill(table + 0x40, packet);
    for entry in 0..u64::from(entries) {
        let (at, bytes) = (input.place(), input.u32());
        bench.fill_u32(table + 0x80 + entry * 16, &[at as u32, 0, 0, bytes]);
    }
    let flags = 5 | u32::from(!packet.is_empty()) << 5 | entries << 16;
    bench.fill_u32(list + slot * 32, &[flags, 0, table as u32, 0]);
    let registers = ahci_port(bench, port);
    if form & 8 != 0 {
        // As queued.
        bench.write(registers + 0x34, Width::B4, 1 << slot);
    }
    bench.write(registers + 0x38, Width::B4, 1 << slot);
}

// ---- NVMe 1.4 ----

fn nvme_submission(queue: u64) -> u64 {
    RINGS + queue * 0x2000
}
fn nvme_completion(queue: u64) -> u64 {
    nvme_submission(queue) + 0x1000
}

impl Driving {
    /// Admin queues and one pair of I/O queues.
    fn start_nvme(&mut self, bench: &mut Bench) {
        let registers = bench.bar(0);
        let last = u64::from(ENTRIES - 1);
        for (at, width, value) in [
            (0x14, Width::B4, 0x46_0000),
            (0x24, Width::B4, last << 16 | last),
            (0x28, Width::B8, nvme_submission(0)),
            (0x30, Width::B8, nvme_completion(0)),
            (0x14, Width::B4, 0x46_0001),
        ] {
            bench.write(registers + at, width, value);
        }
        let sizes = u32::from(ENTRIES - 1) << 16 | 1;
        for (opcode, prp, word) in [(5, nvme_completion(1), 3), (1, nvme_submission(1), 1 << 16 | 1)] {
            let mut command = [0; 16];
            (command[0], command[6], command[10], command[11]) = (opcode, prp as u32, sizes, word);
            self.submit_nvme(bench, 0, &command);
        }
    }

    fn submit_nvme(&mut self, bench: &mut Bench, queue: u64, command: &[u32; 16]) {
        let at = nvme_submission(queue) + 64 * self.advance(queue as usize, ENTRIES);
        bench.fill_u32(at, command);
        let (tail, doorbell) = (self.tails[queue as usize], bench.bar(0) + 0x1000 + 8 * queue);
        bench.write(doorbell, Width::B4, tail.into());
    }

    /// A command; the completion queue is told to be empty first, so that it does not fill up.
    fn request_nvme(&mut self, bench: &mut Bench, form: u8, input: &mut Input<'_>) {
        let queue = u64::from(form & 3);
        let (opcode, namespace) = (input.u8(), if form & 0x10 == 0 { 1 } else { input.u32() });
        let mut command = [0; 16];
        command[0] = u32::from(opcode) | u32::from(input.u8()) << 16;
        command[1] = namespace;
        for prp in [6, 8] {
            command[prp] = input.place() as u32;
        }
        if form & 0x20 != 0 {
            (command[6], command[8]) = (command[6] | u32::from(input.u16()), command[8] | u32::from(input.u16()));
        }
        for word in &mut command[10..14] {
            *word = u32::from(input.u16()) | if form & 0x40 != 0 { u32::from(input.u16()) << 16 } else { 0 };
        }
        if form & 8 == 0 {
            let (head, doorbell) = (self.tails[queue as usize], bench.bar(0) + 0x1004 + 8 * queue);
            bench.write(doorbell, Width::B4, head.into());
        }
        self.submit_nvme(bench, queue, &command);
    }
}

// ---- Intel 82540EM ----

const E1000_RX: u64 = RINGS;
const E1000_TX: u64 = RINGS + 0x1000;

fn start_e1000(bench: &mut Bench, input: &mut Input<'_>) {
    let (rctl, registers) = (input.u32(), bench.bar(0));
    for index in 0..u64::from(ENTRIES) {
        let buffer = DATA + 0x4000 * index;
        bench.fill_u32(E1000_RX + 16 * index, &[buffer as u32, 0, 0, 0]);
    }
    bench.fill(E1000_TX, &[0; 16 * ENTRIES as usize]);
    let bytes = 16 * u64::from(ENTRIES);
    for (at, value) in [
        (0x0100, 0),
        (0x0400, 0),
        (0x0000, 0x40),
        (0x2800, E1000_RX),
        (0x2804, 0),
        (0x2808, bytes),
        (0x2810, 0),
        (0x2818, u64::from(ENTRIES - 1)),
        (0x3800, E1000_TX),
        (0x3804, 0),
        (0x3808, bytes),
        (0x3810, 0),
        (0x3818, 0),
        (0x00d0, 0xffff),
        (0x0400, 0xa),
        (0x0100, u64::from(rctl) | 0x2),
    ] {
        bench.write(registers + at, Width::B4, value);
    }
}

impl Driving {
    /// A transmit descriptor, with the first bytes of its buffer.
    fn request_e1000(&mut self, bench: &mut Bench, form: u8, input: &mut Input<'_>) {
        let at = E1000_TX + 16 * self.advance(0, ENTRIES);
        let (buffer, low, high) = (input.place(), input.u32(), input.u32());
        if form & 1 == 0 {
            bench.fill(buffer, input.string());
            bench.fill_u32(at, &[buffer as u32, 0, low, high]);
        } else {
            // A context: what is where in the frame.
            bench.fill_u32(at, &[input.u32(), input.u32(), low & 0xff0f_ffff | 1 << 29, high]);
        }
        if form & 2 == 0 {
            let tail = bench.bar(0) + 0x3818;
            bench.write(tail, Width::B4, self.tails[0].into());
        }
    }
}

// ---- xHCI 1.1 ----

const XHCI_DCBAA: u64 = RINGS;
const XHCI_COMMANDS: u64 = RINGS + 0x1000;
const XHCI_SEGMENTS: u64 = RINGS + 0x2000;
const XHCI_EVENTS: u64 = RINGS + 0x3000;
const XHCI_INPUT: u64 = RINGS + 0x5000;
const XHCI_CONTEXTS: u64 = RINGS + 0x1_0000;
const XHCI_RINGS: u64 = RINGS + 0x4_0000;
/// The ports that something is behind: keyboard, tablet, disk.
const XHCI_PORTS: [u32; 3] = [1, 2, 5];

fn xhci_ring(slot: u32, endpoint: u32) -> u64 {
    XHCI_RINGS + u64::from(slot) * 0x4000 + u64::from(endpoint) * 0x800
}

impl Driving {
    /// A running controller, with the devices addressed and their endpoints configured as far as the input wants.
    fn start_xhci(&mut self, bench: &mut Bench, input: &mut Input<'_>) {
        let far = input.u8();
        let registers = bench.bar(0);
        bench.fill(RINGS, &vec![0; 0x8_0000]);
        bench.fill_u32(XHCI_SEGMENTS, &[XHCI_EVENTS as u32, 0, 256, 0]);
        for (at, value) in [
            (0x40, 0),
            (0x40, 2),
            (0x78, 16),
            (0x70, XHCI_DCBAA),
            (0x74, 0),
            (0x58, XHCI_COMMANDS | 1),
            (0x5c, 0),
            (0x1028, 1),
            (0x1030, XHCI_SEGMENTS),
            (0x1034, 0),
            (0x1038, XHCI_EVENTS),
            (0x103c, 0),
            (0x1020, 3),
            (0x40, 5),
        ] {
            bench.write(registers + at, Width::B4, value);
        }
        for (slot, port) in (1..).zip(XHCI_PORTS).take(usize::from(far & 3)) {
            let fast = port == 5;
            bench.write(registers + 0x440 + 0x10 * u64::from(port - 1), Width::B4, 0x0e00_0210);
            let output = XHCI_CONTEXTS + u64::from(slot) * 0x1000;
            bench.fill_u32(XHCI_DCBAA + 8 * u64::from(slot), &[output as u32, 0]);
            self.command_xhci(bench, [0, 0, 0, 9 << 10]);
            let (speed, packet) = if fast { (4, 512) } else { (3, 64) };
            bench.fill(XHCI_INPUT, &[0; 0x800]);
            bench.fill_u32(XHCI_INPUT, &[0, 3]);
            bench.fill_u32(XHCI_INPUT + 32, &[1 << 27 | speed << 20, port << 16, 0, 0]);
            let ring = xhci_ring(slot, 1) as u32 | 1;
            bench.fill_u32(XHCI_INPUT + 64, &[0, packet << 16 | 4 << 3 | 3 << 1, ring, 0, 8]);
            self.command_xhci(bench, [XHCI_INPUT as u32, 0, 0, 11 << 10 | slot << 24]);
            // Interrupt in, or bulk in and out.
            let endpoints: &[(u32, u32, u32)] = if fast { &[(3, 6, 1024), (4, 2, 1024)] } else { &[(3, 7, 8)] };
            let mut add = 1;
            for (endpoint, kind, packet) in endpoints {
                add |= 1 << endpoint;
                let ring = xhci_ring(slot, *endpoint) as u32 | 1;
                let at = XHCI_INPUT + 32 * (u64::from(*endpoint) + 1);
                bench.fill_u32(at, &[0, packet << 16 | kind << 3, ring, 0, *packet]);
            }
            bench.fill_u32(XHCI_INPUT, &[0, add]);
            bench.fill_u32(XHCI_INPUT + 32, &[5 << 27]);
            self.command_xhci(bench, [XHCI_INPUT as u32, 0, 0, 12 << 10 | slot << 24]);
            if far & 4 == 0 {
                // SET_CONFIGURATION 1.
                self.transfer_xhci(bench, slot, 1, [0x0001_0900, 0, 8, 2 << 10 | 1 << 6]);
                self.transfer_xhci(bench, slot, 1, [0, 0, 0, 4 << 10 | 1 << 16 | 1 << 5]);
                bench.write(registers + 0x2000 + 4 * u64::from(slot), Width::B4, 1);
            }
        }
    }

    fn command_xhci(&mut self, bench: &mut Bench, trb: [u32; 4]) {
        let at = XHCI_COMMANDS + 16 * self.advance(0, 128);
        bench.fill_u32(at, &trb);
        bench.fill_u32(at + 12, &[trb[3] | 1]);
        let doorbell = bench.bar(0) + 0x2000;
        bench.write(doorbell, Width::B4, 0);
    }

    fn transfer_xhci(&mut self, bench: &Bench, slot: u32, endpoint: u32, trb: [u32; 4]) {
        let at = xhci_ring(slot, endpoint) + 16 * self.advance((slot * 8 + endpoint) as usize % 32, 127);
        bench.fill_u32(at, &trb);
        bench.fill_u32(at + 12, &[trb[3] | 1]);
    }

    /// A TRB on the command ring or on that of an endpoint.
    fn request_xhci(&mut self, bench: &mut Bench, form: u8, input: &mut Input<'_>) {
        let (slot, endpoint) = (u32::from(form & 3), 1 + u32::from(form >> 2 & 3));
        let (kind, flags) = (u32::from(input.u8() & 63) << 10, u32::from(input.u16()));
        let parameter = if form & 0x20 != 0 {
            // A setup packet, or a place of the fuzzer's.
            [input.u32(), input.u32()]
        } else {
            let at = if form & 0x40 != 0 { XHCI_INPUT } else { input.place() };
            bench.fill(at, input.string());
            [at as u32, 0]
        };
        let status = u32::from(input.u16()) | u32::from(form & 0x10) << 17;
        let trb = [parameter[0], parameter[1], status, kind | flags & 0x3fe | flags >> 10 << 16];
        if slot == 0 {
            return self.command_xhci(
                bench,
                [trb[0], trb[1], trb[2], trb[3] & 0xffff | (flags >> 14) << 24 | (flags >> 10 & 15) << 16],
            );
        }
        self.transfer_xhci(bench, slot, endpoint, trb);
        let doorbell = bench.bar(0) + 0x2000 + 4 * u64::from(slot);
        bench.write(doorbell, Width::B4, endpoint.into());
    }
}

// ---- fw_cfg ----

/// A DMA command, big-endian, and its address by the two registers.
fn request_fw_cfg(bench: &mut Bench, form: u8, input: &mut Input<'_>) {
    let mut command = Vec::new();
    let (select, flags) = (u32::from(input.u16()), u32::from(form & 0x1f));
    command.extend((select << 16 | flags).to_be_bytes());
    let bytes = if form & 0x20 != 0 { input.u32() } else { input.u16().into() };
    command.extend(bytes.to_be_bytes());
    let at = if form & 0x40 != 0 { input.u64() } else { input.place() };
    command.extend(at.to_be_bytes());
    bench.fill(RINGS, &command);
    bench.pio.write(0x514, Width::B4, 0);
    bench.pio.write(0x518, Width::B4, u64::from((RINGS as u32).swap_bytes()));
}
