//! A small e1000 driver, and the far end of its cable. The tests use the card only as a driver could.

mod hostile;
mod receive;
mod registers;
mod saved;
mod transmit;

use std::{
    io::Read,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixStream},
    },
    sync::{Arc, Mutex},
    time::Duration,
};

use super::*;
use crate::{
    engine::{
        addresses::AddressWatch,
        memory::Gpa,
        net_backend::HEADER_BYTES,
        virtio::testing::{DEADLINE, eventually},
    },
    spec::NetworkBackend,
};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const BROADCAST: [u8; 6] = [0xff; 6];
const MULTICAST: [u8; 6] = [0x01, 0x00, 0x5e, 0x7f, 0x12, 0x34];

const RAM_BYTES: u64 = 16 << 20;
const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
/// Descriptors of each ring.
const RING_LEN: u64 = 8;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER_BYTES: u64 = 0x8000;
/// Where frames to send are.
const OUT: u64 = 0x20_0000;

// Registers by their numbers: the tests do not believe the product's names.
const CTRL: u32 = 0x0000;
const STATUS: u32 = 0x0008;
const EECD: u32 = 0x0010;
const EERD: u32 = 0x0014;
const MDIC: u32 = 0x0020;
const ICR: u32 = 0x00c0;
const ICS: u32 = 0x00c8;
const IMS: u32 = 0x00d0;
const IMC: u32 = 0x00d8;
const RCTL: u32 = 0x0100;
const TCTL: u32 = 0x0400;
const RDBAL: u32 = 0x2800;
const RDBAH: u32 = 0x2804;
const RDLEN: u32 = 0x2808;
const RDH: u32 = 0x2810;
const RDT: u32 = 0x2818;
const TDBAL: u32 = 0x3800;
const TDBAH: u32 = 0x3804;
const TDLEN: u32 = 0x3808;
const TDH: u32 = 0x3810;
const TDT: u32 = 0x3818;
const RXCSUM: u32 = 0x5000;
const MTA: u32 = 0x5200;
const RAL: u32 = 0x5400;
const VFTA: u32 = 0x5600;

const CTRL_SLU: u32 = 1 << 6;
const CTRL_RST: u32 = 1 << 26;
const CTRL_VME: u32 = 1 << 30;
const RCTL_EN: u32 = 1 << 1;
const RCTL_UPE: u32 = 1 << 3;
const RCTL_MPE: u32 = 1 << 4;
const RCTL_LPE: u32 = 1 << 5;
const RCTL_BAM: u32 = 1 << 15;
const RCTL_VFE: u32 = 1 << 18;
const RCTL_BSEX: u32 = 1 << 25;
const RCTL_SECRC: u32 = 1 << 26;
const TCTL_EN: u32 = 1 << 1;
const TCTL_PSP: u32 = 1 << 3;

const TXDW: u32 = 1 << 0;
const TXQE: u32 = 1 << 1;
const LSC: u32 = 1 << 2;
const RXDMT0: u32 = 1 << 4;
const RXO: u32 = 1 << 6;
const RXT0: u32 = 1 << 7;

const DD: u8 = 1;

// Commands of transmit descriptors, where they are in the upper half.
const EOP: u64 = 1 << 24;
const IC: u64 = 1 << 26;
const TSE: u64 = 1 << 26;
const RS: u64 = 1 << 27;
const DATA: u64 = 1 << 29 | 1 << 20;
const CONTEXT: u64 = 1 << 29;
const VLE: u64 = 1 << 30;
const TCP: u64 = 1 << 24;
const IPV4: u64 = 1 << 25;
const IXSM: u64 = 1 << 40;
const TXSM: u64 = 1 << 41;

/// A card with its memory, its line and a datagram socket as its tap.
struct Driver {
    card: E1000,
    ram: GuestRam,
    line: Arc<Mutex<bool>>,
    tap: UnixDatagram,
    /// The next receive descriptor to look at, and to give.
    rx_next: u64,
    rx_tail: u64,
    tx_tail: u64,
}

/// A received frame as its descriptors tell it.
#[derive(Debug, PartialEq, Eq)]
struct Received {
    bytes: Vec<u8>,
    status: u8,
    errors: u8,
    special: u16,
    descriptors: usize,
}

fn card(fd: OwnedFd, backend: NetworkBackend, ram: &GuestRam, line: &Arc<Mutex<bool>>) -> E1000 {
    let wire = Arc::clone(line);
    let irq = IrqLine::new(move |high| *wire.lock().unwrap() = high);
    let backend = NetBackend::new(fd, backend, AddressWatch::new(Arc::new(|_| ()))).unwrap();
    E1000::new(ram.clone(), irq, backend, MAC).unwrap()
}

impl Driver {
    /// A card as it is after power on.
    fn cold() -> Driver {
        Driver::with_ram(GuestRam::new(RAM_BYTES).unwrap())
    }
    fn with_ram(ram: GuestRam) -> Driver {
        let (near, tap) = UnixDatagram::pair().unwrap();
        tap.set_read_timeout(Some(DEADLINE)).unwrap();
        let line = Arc::default();
        let card = card(near.into(), NetworkBackend::Tap, &ram, &line);
        Driver { card, ram, line, tap, rx_next: 0, rx_tail: 0, tx_tail: 0 }
    }

    /// A card that runs, with empty rings, as Linux' driver leaves it.
    fn new() -> Driver {
        let mut driver = Driver::cold();
        driver.start(RCTL_BAM | RCTL_SECRC);
        driver
    }

    fn read(&mut self, at: u32) -> u32 {
        self.card.bar_read(0, Access::new(at.into(), Width::B4)).unwrap() as u32
    }
    fn write(&mut self, at: u32, value: u32) {
        assert_eq!(self.card.bar_write(0, Access::new(at.into(), Width::B4), value.into()), Ok(Effect::None));
    }
    fn is_high(&self) -> bool {
        *self.line.lock().unwrap()
    }

    /// Resets the card through its ports, as Linux does, and sets it up.
    fn start(&mut self, rctl: u32) {
        self.write(IMC, u32::MAX);
        self.write(RCTL, 0);
        self.write(TCTL, 0);
        let port = |offset| Access::new(offset, Width::B4);
        assert_eq!(self.card.bar_write(1, port(0), CTRL.into()), Ok(Effect::None));
        assert_eq!(self.card.bar_write(1, port(4), u64::from(CTRL_RST | CTRL_SLU)), Ok(Effect::None));
        assert_eq!(self.read(CTRL) & CTRL_RST, 0);
        let ctrl = self.read(CTRL);
        self.write(CTRL, ctrl | CTRL_SLU);
        self.ram.write(Gpa(RX_RING), &[0; 16 * RING_LEN as usize]).unwrap();
        self.ram.write(Gpa(TX_RING), &[0; 16 * RING_LEN as usize]).unwrap();
        for (at, value) in [
            (RDBAL, RX_RING as u32),
            (RDBAH, 0),
            (RDLEN, 16 * RING_LEN as u32),
            (RDH, 0),
            (RDT, 0),
            (TDBAL, TX_RING as u32),
            (TDBAH, 0),
            (TDLEN, 16 * RING_LEN as u32),
            (TDH, 0),
            (TDT, 0),
            (TCTL, TCTL_EN),
            (RCTL, RCTL_EN | rctl),
        ] {
            self.write(at, value);
        }
        (self.rx_next, self.rx_tail, self.tx_tail) = (0, 0, 0);
        self.read(ICR);
    }

    /// Returns when the worker has told everything that it has done.
    fn settle(&self) {
        self.card.io().quiesce();
        self.card.io().resume();
    }

    /// Throws away what the guest sent and nobody took.
    fn drain(&self) {
        self.tap.set_nonblocking(true).unwrap();
        while self.tap.recv(&mut [0; 100]).is_ok() {}
        self.tap.set_nonblocking(false).unwrap();
    }

    fn rx_buffer(index: u64) -> u64 {
        RX_BUFFERS + RX_BUFFER_BYTES * index
    }

    /// Gives the card `count` empty descriptors.
    fn offer(&mut self, count: u64) {
        for _ in 0..count {
            self.describe_buffer(Self::rx_buffer(self.rx_tail));
        }
        self.write(RDT, self.rx_tail as u32);
    }

    /// Puts a buffer into the next descriptor, without telling.
    fn describe_buffer(&mut self, at: u64) {
        let descriptor = [at.to_le_bytes(), [0xee, 0xee, 0xee, 0xee, 0, 0xee, 0xee, 0xee]].concat();
        self.ram.write(Gpa(RX_RING + 16 * self.rx_tail), &descriptor).unwrap();
        self.rx_tail = (self.rx_tail + 1) % RING_LEN;
    }

    fn rx_status(&self, index: u64) -> u8 {
        self.ram.get_u32(Gpa(RX_RING + 16 * index + 12)).unwrap() as u8
    }

    /// Waits for a whole frame.
    fn received(&mut self) -> Received {
        let mut bytes = Vec::new();
        for descriptors in 1.. {
            let index = self.rx_next;
            eventually("a received frame", || self.rx_status(index) & DD != 0);
            let fields = self.ram.get_u64(Gpa(RX_RING + 16 * index + 8)).unwrap().to_le_bytes();
            let [low, high, _, _, status, errors, special @ ..] = fields;
            assert_eq!(fields[2..4], [0, 0], "the packet checksum is left out");
            let here = usize::from(u16::from_le_bytes([low, high]));
            bytes.extend(self.bytes(Self::rx_buffer(index), here));
            self.rx_next = (index + 1) % RING_LEN;
            if status & 2 != 0 {
                return Received { bytes, status, errors, special: u16::from_le_bytes(special), descriptors };
            }
            assert_eq!((status, errors), (DD, 0), "in the middle of a frame");
        }
        unreachable!("a frame ends");
    }

    fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.ram.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    /// Somebody sends the guest a frame.
    fn arrive(&self, frame: &[u8]) {
        self.tap.send(&[&[0; HEADER_BYTES], frame].concat()).unwrap();
    }

    /// Puts a transmit descriptor into the ring, without telling. Gives its index.
    fn queue(&mut self, low: u64, high: u64) -> u64 {
        let index = self.tx_tail;
        self.ram.write(Gpa(TX_RING + 16 * index), &[low.to_le_bytes(), high.to_le_bytes()].concat()).unwrap();
        self.tx_tail = (index + 1) % RING_LEN;
        index
    }

    fn tx_status(&self, index: u64) -> u8 {
        self.ram.get_u32(Gpa(TX_RING + 16 * index + 12)).unwrap() as u8
    }

    /// Tells the card of what is queued.
    fn kick(&mut self) {
        self.write(TDT, self.tx_tail as u32);
    }

    /// As `kick`, and waits until the card has done all of it.
    fn send(&mut self) {
        self.kick();
        eventually("the transmit ring is empty", || self.read(TDH) == self.read(TDT));
    }

    /// Sends a frame with one legacy descriptor.
    fn send_frame(&mut self, frame: &[u8]) {
        self.ram.write(Gpa(OUT), frame).unwrap();
        self.queue(OUT, EOP | RS | frame.len() as u64);
        self.send();
    }

    /// The next frame that the guest sent.
    fn sent(&self) -> Vec<u8> {
        let mut message = vec![0; 70_000];
        let bytes = self.tap.recv(&mut message).unwrap();
        assert_eq!(message[..HEADER_BYTES], [0; HEADER_BYTES]);
        message[HEADER_BYTES..bytes].to_vec()
    }

    fn nothing_sent(&self) {
        self.tap.set_nonblocking(true).unwrap();
        assert!(self.tap.recv(&mut [0; 100]).is_err(), "a frame was sent");
        self.tap.set_nonblocking(false).unwrap();
    }

    /// The card still works both ways.
    fn works(&mut self) {
        self.drain();
        self.send_frame(&frame(BROADCAST, 100));
        assert_eq!(self.sent(), frame(BROADCAST, 100));
        self.offer(1);
        self.arrive(&frame(MAC.0, 200));
        assert_eq!(self.received().bytes, frame(MAC.0, 200));
    }
}

/// A frame of no known protocol.
fn frame(to: [u8; 6], bytes: usize) -> Vec<u8> {
    let mut frame = [&to[..], &OTHER, &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..bytes).map(|at| at as u8));
    frame
}

/// The ones' complement sum, the plain way.
fn plain_sum(bytes: &[u8]) -> u16 {
    let sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

const SOURCE: [u8; 4] = [10, 0, 0, 9];
const DESTINATION: [u8; 4] = [10, 0, 0, 1];

/// Ethernet, IPv4 and TCP or UDP, with right checksums.
fn ipv4(protocol: u8, to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut l4 = vec![0; if protocol == 6 { 20 } else { 8 }];
    l4[..4].copy_from_slice(&[0x12, 0x34, 0, 80]);
    let checksum_at = if protocol == 6 { 16 } else { 6 };
    if protocol == 6 {
        l4[4..8].copy_from_slice(&0xffff_fff0u32.to_be_bytes());
        l4[12..14].copy_from_slice(&[0x50, 0x19]); // five words; ACK, PSH, FIN
    } else {
        l4[4..6].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    }
    l4.extend(payload);
    let total = (20 + l4.len()) as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0xff, 0xfe, 0x40, 0, 64, protocol, 0, 0];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    ip.extend(SOURCE);
    ip.extend(DESTINATION);
    let sum = !plain_sum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = [&SOURCE[..], &DESTINATION, &[0, protocol], &(l4.len() as u16).to_be_bytes()].concat();
    let sum = !plain_sum(&[&pseudo[..], &l4].concat());
    l4[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    [&to[..], &OTHER, &[8, 0], &ip, &l4].concat()
}
