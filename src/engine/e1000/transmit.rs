//! The transmit half (317453, 3.3 to 3.5): takes descriptors, gathers packets, and sends their frames.
//!
//! A descriptor is done, and its DD bit set if RS asks for that, when its data has been copied; the last one of a packet when
//! all its frames are with the host. While the host takes no more, that descriptor stays at TDH and its packet is kept.

use std::sync::atomic::{Ordering, fence};

use super::{
    super::{
        memory::{Gpa, GuestRam},
        net_backend::NetBackend,
        saved::BadState,
    },
    interrupts::{TXDW, TXQE},
    outgoing::{Context, Finish, Offloads, Outgoing},
    registers::{
        self, CTRL, CTRL_VME, Octets, Registers, Ring, TCTL, TCTL_EN, TCTL_PSP, TX_RING, VET, by_size, counter,
    },
    saved::{DescriptorV1, TransmitterV1},
    worker::Shared,
};

// Commands of a descriptor (3.3.3, 3.3.6, 3.3.7).
const CMD_EOP: u8 = 1 << 0;
/// In a legacy descriptor: insert a checksum. In others: segment.
const CMD_IC: u8 = 1 << 2;
const CMD_TSE: u8 = 1 << 2;
const CMD_RS: u8 = 1 << 3;
const CMD_DEXT: u8 = 1 << 5;
const CMD_VLE: u8 = 1 << 6;
// Of a context descriptor only.
const CMD_TCP: u8 = 1 << 0;
const CMD_IP: u8 = 1 << 1;
const POPTS_IXSM: u8 = 1 << 0;
const POPTS_TXSM: u8 = 1 << 1;
const TYPE_CONTEXT: u64 = 0;
const TYPE_DATA: u64 = 1;

const STATUS_AT: u64 = 12;
const STATUS_DD: u8 = 1 << 0;
/// What the frame check sequence adds to a frame's length in statistics.
const FCS_BYTES: usize = 4;
/// Descriptors and frames before other work gets its turn.
const BURST: usize = 64;

pub(super) struct Transmitter {
    /// The last context for checksums alone, and the last one for segmentation (3.3.6).
    contexts: [Option<Context>; 2],
    outgoing: Outgoing,
    /// The last descriptor of a whole packet, whose frames are on their way.
    last: Option<Descriptor>,
}

/// A copy of a descriptor, and where it is.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    index: u32,
    at: Gpa,
    low: u64,
    high: u64,
}

enum DescriptorKind {
    Legacy,
    Context,
    Data,
    /// Of a type that does not exist.
    Unknown,
}

impl Descriptor {
    fn command(&self) -> u8 {
        (self.high >> 24) as u8
    }
    fn has(&self, command: u8) -> bool {
        self.command() & command != 0
    }
    fn kind(&self) -> DescriptorKind {
        match (self.has(CMD_DEXT), self.high >> 20 & 0xf) {
            (false, _) => DescriptorKind::Legacy,
            (true, TYPE_CONTEXT) => DescriptorKind::Context,
            (true, TYPE_DATA) => DescriptorKind::Data,
            (true, _) => DescriptorKind::Unknown,
        }
    }
    fn byte(&self, from: u64, shift: u32) -> usize {
        usize::from((from >> shift) as u8)
    }
    fn word(&self, from: u64, shift: u32) -> usize {
        usize::from((from >> shift) as u16)
    }

    fn context(&self) -> Context {
        Context {
            ip_start: self.byte(self.low, 0),
            ip_checksum_at: self.byte(self.low, 8),
            ip_end: self.word(self.low, 16),
            l4_start: self.byte(self.low, 32),
            l4_checksum_at: self.byte(self.low, 40),
            l4_end: self.word(self.low, 48),
            header_bytes: self.byte(self.high, 40),
            mss_bytes: self.word(self.high, 48),
            is_tcp: self.has(CMD_TCP),
            is_ipv4: self.has(CMD_IP),
        }
    }

    /// What the first data descriptor of a packet says of it.
    fn offloads(&self, contexts: &[Option<Context>; 2]) -> Offloads {
        let options = self.byte(self.high, 40) as u8;
        let segment = self.has(CMD_TSE);
        Offloads {
            context: contexts[usize::from(segment)],
            ip_checksum: options & POPTS_IXSM != 0,
            l4_checksum: options & POPTS_TXSM != 0,
            segment,
            ..Offloads::default()
        }
    }
}

/// What became of the next frame.
enum Sent {
    /// The host has no room for it.
    Full,
    More,
    /// It was the packet's last, or the packet had none.
    All,
}

impl Transmitter {
    pub(super) fn new() -> Transmitter {
        Transmitter { contexts: [None; 2], outgoing: Outgoing::new(), last: None }
    }

    pub(super) fn save(&self) -> TransmitterV1 {
        let Transmitter { contexts, outgoing, last } = self;
        TransmitterV1 {
            contexts: contexts.map(|context| context.map(|context| context.save())),
            outgoing: outgoing.save(),
            last: last.as_ref().map(|Descriptor { index, at, low, high }| DescriptorV1 {
                index: *index as u16, // TDH has 16 bits
                at: at.0,
                low: *low,
                high: *high,
            }),
        }
    }

    pub(super) fn restore(&mut self, saved: TransmitterV1) -> Result<(), BadState> {
        let TransmitterV1 { contexts, outgoing, last } = saved;
        self.contexts = contexts.map(|context| context.map(Context::restore));
        self.outgoing.restore(outgoing, last.is_some())?;
        self.last = last.map(|DescriptorV1 { index, at, low, high }| Descriptor {
            index: index.into(),
            at: Gpa(at),
            low,
            high,
        });
        Ok(())
    }

    /// The card was reset.
    pub(super) fn reset(&mut self) {
        self.contexts = [None; 2];
        self.forget_packet();
    }

    /// The transmitter was disabled: a packet that is not sent never will be.
    pub(super) fn forget_packet(&mut self) {
        self.outgoing.clear();
        self.last = None;
    }

    /// Whether a frame waits until the host has room.
    pub(super) fn waits(&self) -> bool {
        !self.outgoing.frame().is_empty()
    }

    /// Sends what the driver has queued, as far as the host takes it. True when the burst ended before the ring did.
    pub(super) fn serve(&mut self, card: &Shared, ram: &GuestRam, backend: &mut NetBackend) -> bool {
        let mut causes = 0;
        let more = (0..BURST).all(|_| self.step(card, ram, backend, &mut causes));
        if causes != 0 {
            card.interrupts.raise(causes);
        }
        more
    }

    /// One descriptor, or one frame of a packet; false when there is neither now.
    fn step(&mut self, card: &Shared, ram: &GuestRam, backend: &mut NetBackend, causes: &mut u32) -> bool {
        let registers = &card.registers;
        if card.is_stopping() || registers.get(TCTL) & TCTL_EN == 0 {
            return false;
        }
        if let Some(last) = self.last {
            return match self.send(registers, backend) {
                Sent::Full => false,
                Sent::More => true,
                Sent::All => {
                    self.forget_packet();
                    complete(card, ram, &last, causes);
                    true
                }
            };
        }
        let Some(descriptor) = fetch(registers, ram) else { return false };
        if self.take(ram, &descriptor) {
            self.end_packet(registers, descriptor);
        } else {
            complete(card, ram, &descriptor, causes);
        }
        true
    }

    /// Takes a descriptor's data; true when that completes a packet.
    fn take(&mut self, ram: &GuestRam, descriptor: &Descriptor) -> bool {
        let bytes = match descriptor.kind() {
            DescriptorKind::Context => {
                let which = usize::from(descriptor.has(CMD_TSE));
                self.contexts[which] = Some(descriptor.context());
                return false;
            }
            DescriptorKind::Unknown => return false,
            DescriptorKind::Legacy => descriptor.high & 0xffff,
            DescriptorKind::Data => {
                if self.outgoing.is_empty() {
                    self.outgoing.offloads = descriptor.offloads(&self.contexts);
                }
                descriptor.high & 0xf_ffff
            }
        };
        if let Some(into) = self.outgoing.extend(bytes as usize).filter(|into| !into.is_empty())
            && ram.read(Gpa(descriptor.low), into).is_err()
        {
            self.outgoing.spoil();
        }
        descriptor.has(CMD_EOP)
    }

    /// The packet is whole: what its last descriptor says counts too (3.3.3, 3.3.7).
    fn end_packet(&mut self, registers: &Registers, descriptor: Descriptor) {
        let offloads = &mut self.outgoing.offloads;
        if matches!(descriptor.kind(), DescriptorKind::Legacy) && descriptor.has(CMD_IC) {
            offloads.legacy_checksum =
                Some((descriptor.byte(descriptor.high, 40), descriptor.byte(descriptor.high, 16)));
        }
        if descriptor.has(CMD_VLE) && registers.get(CTRL) & CTRL_VME != 0 {
            offloads.vlan = Some(descriptor.word(descriptor.high, 48) as u16);
        }
        let segment = offloads.segment;
        if !self.outgoing.is_well_formed() {
            self.outgoing.spoil();
        }
        if segment {
            let counter = if self.outgoing.is_well_formed() { counter::TSCTC } else { counter::TSCTFC };
            registers.count(counter);
        }
        self.last = Some(descriptor);
    }

    /// Sends the frame that waits, or the next.
    fn send(&mut self, registers: &Registers, backend: &mut NetBackend) -> Sent {
        let finish = Finish { vlan_ethertype: registers.get(VET) as u16, pad: registers.get(TCTL) & TCTL_PSP != 0 };
        if self.outgoing.frame().is_empty() && !self.outgoing.next_frame(finish) {
            return Sent::All;
        }
        if !backend.send(self.outgoing.frame()) {
            return Sent::Full;
        }
        count(registers, self.outgoing.frame());
        self.outgoing.frame_done();
        Sent::More
    }
}

/// The descriptor at TDH; `None` when the ring is empty or is not in RAM.
fn fetch(registers: &Registers, ram: &GuestRam) -> Option<Descriptor> {
    let ring = Ring::of(registers, TX_RING).filter(|ring| ring.len() > 0)?;
    let (index, at) = (ring.head, ring.descriptor(ring.head));
    let mut bytes = [0; 16];
    ram.read(at, &mut bytes).ok()?;
    let whole = u128::from_le_bytes(bytes);
    Some(Descriptor { index, at, low: whole as u64, high: (whole >> 64) as u64 })
}

/// Gives a descriptor back to the driver.
fn complete(card: &Shared, ram: &GuestRam, descriptor: &Descriptor, causes: &mut u32) {
    if descriptor.has(CMD_RS) {
        // The driver may reuse the buffer as soon as it sees DD.
        fence(Ordering::Release);
        let status = (descriptor.high >> 32) as u8 | STATUS_DD;
        // It was RAM when the descriptor was read.
        let _ = ram.write(Gpa(descriptor.at.0.wrapping_add(STATUS_AT)), &[status]);
        *causes |= TXDW;
    }
    let registers = &card.registers;
    if let Some(ring) = Ring::of(registers, TX_RING) {
        let head = ring.next(descriptor.index);
        registers::set_head(registers, TX_RING, head);
        if head == ring.tail {
            *causes |= TXQE;
        }
    }
}

fn count(registers: &Registers, frame: &[u8]) {
    let bytes = frame.len() + FCS_BYTES;
    registers.count(counter::TPT);
    registers.count(counter::GPTC);
    registers.count(by_size(counter::PTC, bytes));
    registers.count_octets(Octets::Sent, bytes as u64);
    registers.count_octets(Octets::GoodSent, bytes as u64);
    match frame.first_chunk::<6>() {
        Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => registers.count(counter::BPTC),
        Some([first, ..]) if first & 1 != 0 => registers.count(counter::MPTC),
        _ => {}
    }
}
