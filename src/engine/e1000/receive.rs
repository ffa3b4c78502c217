//! The receive half (317453, 3.2): takes frames from the host, filters them, and puts them into the driver's buffers.
//!
//! A frame for which there are too few descriptors stays here, RXO is told once for it, and all later ones stay with the host,
//! until the driver gives more descriptors. So a guest that is slow for a moment loses nothing that the host still has.

use std::sync::atomic::{Ordering, fence};

use super::{
    super::{
        memory::{Gpa, GuestRam},
        net_backend::NetBackend,
        saved::BadState,
    },
    checksum::{self, ETHERNET_BYTES, VLAN_BYTES, Verified},
    filter::{self, Verdict},
    interrupts::{RXDMT0, RXO, RXT0},
    registers::{
        self, CTRL, CTRL_VME, Octets, RCTL, RCTL_BSEX, RCTL_EN, RCTL_SECRC, RX_RING, RXCSUM, RXCSUM_IPOFL,
        RXCSUM_TUOFL, Registers, Ring, by_size, counter,
    },
    saved::{ReceivedV1, check},
    worker::Shared,
};

// Status and errors of a descriptor (3.2.3).
const STATUS_DD: u8 = 1 << 0;
const STATUS_EOP: u8 = 1 << 1;
/// The card says nothing of checksums.
const STATUS_IXSM: u8 = 1 << 2;
const STATUS_VP: u8 = 1 << 3;
const STATUS_TCPCS: u8 = 1 << 5;
const STATUS_IPCS: u8 = 1 << 6;
const STATUS_PIF: u8 = 1 << 7;
const ERROR_TCPE: u8 = 1 << 5;
const ERROR_IPE: u8 = 1 << 6;

const FCS_BYTES: usize = 4;
/// The longest frame that a receiver takes, with its check sequence (3.2.2).
const FRAME_BYTES_MAX: usize = 16 << 10;
/// What a shorter frame is filled up to.
const FRAME_BYTES_MIN: usize = 60;
/// A longer frame is seen to be longer.
const BUFFER_BYTES: usize = FRAME_BYTES_MAX + 1;
/// Where a VLAN tag is: behind the two addresses.
const TAG_AT: usize = 12;
/// Frames before other work gets its turn.
const BURST: usize = 64;

pub(super) struct Receiver {
    buffer: Box<[u8]>,
    /// A frame in `buffer` that waits for descriptors.
    waiting: Option<Frame>,
    /// RXO was told for it. It is tried again only when this is not so any more: the ring, and RCTL with the buffers' size.
    refused_at: Option<(Option<Ring>, u32)>,
}

/// What the descriptors of a frame say of it.
#[derive(Debug, Clone, Copy)]
struct Frame {
    /// Its length in the driver's buffers.
    bytes: usize,
    /// Its length on the wire, for statistics.
    wire_bytes: usize,
    status: u8,
    errors: u8,
    special: u16,
}

/// Where frames go, at one moment.
struct Destination<'a> {
    registers: &'a Registers,
    ram: &'a GuestRam,
    ring: Ring,
    /// RCTL.
    control: u32,
}

impl Receiver {
    pub(super) fn new() -> Receiver {
        Receiver { buffer: vec![0; BUFFER_BYTES].into(), waiting: None, refused_at: None }
    }

    pub(super) fn save(&self) -> Option<ReceivedV1> {
        let Receiver { buffer, waiting, refused_at } = self;
        let Frame { bytes, wire_bytes, status, errors, special } = (*waiting)?;
        Some(ReceivedV1 {
            frame: buffer.get(..bytes).unwrap_or_default().into(),
            wire_bytes: wire_bytes as u16, // at most FRAME_BYTES_MAX
            status,
            errors,
            special,
            is_refused: refused_at.is_some(),
        })
    }

    pub(super) fn restore(&mut self, saved: Option<ReceivedV1>) -> Result<(), BadState> {
        self.forget();
        let Some(ReceivedV1 { frame, wire_bytes, status, errors, special, is_refused }) = saved else { return Ok(()) };
        let (bytes, wire_bytes) = (frame.len(), usize::from(wire_bytes));
        let lengths = ETHERNET_BYTES..=FRAME_BYTES_MAX;
        check(lengths.contains(&bytes) && lengths.contains(&wire_bytes), "a frame that cannot be")?;
        if let Some(place) = self.buffer.get_mut(..bytes) {
            place.copy_from_slice(&frame);
        }
        self.waiting = Some(Frame { bytes, wire_bytes, status, errors, special });
        // It is tried once more, and not told again: a receiver that is enabled never has this RCTL.
        self.refused_at = is_refused.then_some((None, 0));
        Ok(())
    }

    /// The card was reset or its receiver disabled: a frame that waits is dropped.
    pub(super) fn forget(&mut self) {
        self.waiting = None;
        self.refused_at = None;
    }

    /// Whether a frame of the host could be taken now.
    pub(super) fn wants_frames(&self, registers: &Registers) -> bool {
        self.waiting.is_none() && registers.get(RCTL) & RCTL_EN != 0
    }

    /// Gives the driver the frames that wait. True when more may be there.
    pub(super) fn serve(&mut self, card: &Shared, ram: &GuestRam, backend: &mut NetBackend) -> bool {
        let mut causes = 0;
        let more = (0..BURST).all(|_| self.step(card, ram, backend, &mut causes));
        if causes != 0 {
            card.interrupts.raise(causes);
        }
        more
    }

    /// One frame; false when there is none, or no descriptors for it.
    fn step(&mut self, card: &Shared, ram: &GuestRam, backend: &mut NetBackend, causes: &mut u32) -> bool {
        let registers = &card.registers;
        if card.is_stopping() || registers.get(RCTL) & RCTL_EN == 0 {
            return false;
        }
        if self.waiting.is_none() {
            let Some(bytes) = backend.receive(&mut self.buffer) else { return false };
            self.waiting = self.accept(registers, bytes);
        }
        let Some(frame) = self.waiting else { return true };
        let now = (Ring::of(registers, RX_RING), registers.get(RCTL));
        if self.refused_at == Some(now) {
            return false;
        }
        if let (Some(ring), control) = now
            && self.deliver(&Destination { registers, ram, ring, control }, &frame, causes)
        {
            count(registers, &frame, &self.buffer);
            self.forget();
            return true;
        }
        if self.refused_at.replace(now).is_none() {
            registers.count(counter::RNBC);
            *causes |= RXO;
        }
        false
    }

    /// Filters the frame in the buffer and makes of it what the driver sees; `None` when it does not get it.
    fn accept(&mut self, registers: &Registers, bytes: usize) -> Option<Frame> {
        if !(ETHERNET_BYTES..=FRAME_BYTES_MAX - FCS_BYTES).contains(&bytes) {
            return None;
        }
        let bytes = self.pad(bytes);
        let frame = self.buffer.get(..bytes)?;
        let tag = filter::vlan_tag(registers, frame);
        let mut status = match filter::judge(registers, frame, tag, FCS_BYTES) {
            Verdict::Exact => 0,
            Verdict::Imperfect => STATUS_PIF,
            Verdict::Unwanted => return None,
            Verdict::TooLong => {
                registers.count(counter::ROC);
                return None;
            }
        };
        let (checksums, errors) = checksum_bits(registers.get(RXCSUM), frame, tag.is_some());
        status |= checksums;
        let (mut bytes, wire_bytes, mut special) = (bytes, bytes + FCS_BYTES, 0);
        if registers.get(RCTL) & RCTL_SECRC == 0 {
            let mut check = flate2::Crc::new();
            check.update(frame);
            let check = check.sum().to_le_bytes();
            self.buffer.get_mut(bytes..bytes + FCS_BYTES)?.copy_from_slice(&check);
            bytes += FCS_BYTES;
        }
        if let Some(tag) = tag
            && registers.get(CTRL) & CTRL_VME != 0
        {
            self.buffer.copy_within(TAG_AT + VLAN_BYTES..bytes, TAG_AT);
            bytes -= VLAN_BYTES;
            status |= STATUS_VP;
            special = tag;
        }
        Some(Frame { bytes, wire_bytes, status, errors, special })
    }

    /// A host leaves out the padding that a frame has on a wire.
    fn pad(&mut self, bytes: usize) -> usize {
        if let Some(padding) = self.buffer.get_mut(bytes..FRAME_BYTES_MIN) {
            padding.fill(0);
        }
        bytes.max(FRAME_BYTES_MIN)
    }

    /// Writes the frame and its descriptors; false, and nothing is written, when there are too few of them.
    fn deliver(&self, to: &Destination<'_>, frame: &Frame, causes: &mut u32) -> bool {
        let Destination { registers, ram, ring, control } = to;
        let buffer_bytes = buffer_bytes(*control);
        let Some(needed) = descriptors_for(ring, ram, frame.bytes, buffer_bytes) else { return false };
        let (mut index, mut done) = (ring.head, 0);
        for number in 1..=needed {
            let at = ring.descriptor(index);
            // It was in RAM when it was counted; its content may have changed since.
            let address = ram.get_u64(at).unwrap_or(0);
            let mut fields = [0; 8];
            // One without an address gets no data (3.2.4).
            let here = if address == 0 { 0 } else { buffer_bytes.min(frame.bytes - done) };
            if let Some(part) = self.buffer.get(done..done + here).filter(|part| !part.is_empty()) {
                // What the driver has no RAM for is lost, as on a bus where nobody answers.
                let _ = ram.write(Gpa(address), part);
                done += here;
            }
            let is_last = number == needed;
            let [low, high] = (here as u16).to_le_bytes();
            let [special_low, special_high] = frame.special.to_le_bytes();
            if is_last {
                let status = frame.status | STATUS_DD | STATUS_EOP;
                // The packet checksum at bytes 2 and 3 is left zero: no driver of this card uses it.
                fields = [low, high, 0, 0, status, frame.errors, special_low, special_high];
            } else if address == 0 {
                fields[4] = STATUS_DD;
            } else {
                fields = [low, high, 0, 0, STATUS_DD, 0, 0, 0];
            }
            // The driver reads the buffer as soon as it sees DD.
            fence(Ordering::Release);
            let _ = ram.write(Gpa(at.0.wrapping_add(8)), &fields);
            index = ring.next(index);
        }
        registers::set_head(registers, RX_RING, index);
        *causes |= RXT0;
        let (before, threshold) = (ring.len(), ring.count >> (1 + (control >> 8 & 3)));
        if before > threshold && before - needed <= threshold {
            *causes |= RXDMT0;
        }
        true
    }
}

/// How many descriptors a frame takes; `None` when the driver has given fewer, or the ring is not in RAM.
fn descriptors_for(ring: &Ring, ram: &GuestRam, bytes: usize, buffer_bytes: usize) -> Option<u32> {
    let (mut index, mut room) = (ring.head, 0);
    for number in 1..=ring.len() {
        if ram.get_u64(ring.descriptor(index)).ok()? != 0 {
            room += buffer_bytes;
        }
        if room >= bytes {
            return Some(number);
        }
        index = ring.next(index);
    }
    None
}

/// The size of every buffer (13.4.22, BSIZE and BSEX). The size that does not exist is the largest without BSEX.
fn buffer_bytes(control: u32) -> usize {
    match (control & RCTL_BSEX != 0, control >> 16 & 3) {
        (_, 0) => 2048,
        (false, size) => 2048 >> size,
        (true, size) => 32_768 >> size,
    }
}

/// What status and errors say of a frame's checksums (3.2.9).
fn checksum_bits(rxcsum: u32, frame: &[u8], is_tagged: bool) -> (u8, u8) {
    if rxcsum & (RXCSUM_IPOFL | RXCSUM_TUOFL) == 0 {
        return (STATUS_IXSM, 0);
    }
    let Verified { ip_is_good, l4_is_good } = checksum::verify(frame, is_tagged);
    let (mut status, mut errors) = (0, 0);
    if let Some(is_good) = ip_is_good.filter(|_| rxcsum & RXCSUM_IPOFL != 0) {
        status |= STATUS_IPCS;
        errors |= if is_good { 0 } else { ERROR_IPE };
    }
    if let Some(is_good) = l4_is_good.filter(|_| rxcsum & RXCSUM_TUOFL != 0) {
        status |= STATUS_TCPCS;
        errors |= if is_good { 0 } else { ERROR_TCPE };
    }
    if status == 0 { (STATUS_IXSM, 0) } else { (status, errors) }
}

fn count(registers: &Registers, frame: &Frame, bytes: &[u8]) {
    registers.count(counter::TPR);
    registers.count(counter::GPRC);
    registers.count(by_size(counter::PRC, frame.wire_bytes));
    registers.count_octets(Octets::Received, frame.wire_bytes as u64);
    registers.count_octets(Octets::GoodReceived, frame.wire_bytes as u64);
    match bytes.first_chunk::<6>() {
        Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => registers.count(counter::BPRC),
        Some([first, ..]) if first & 1 != 0 => registers.count(counter::MPRC),
        _ => {}
    }
}
