//! Device slots and their contexts (xHCI 1.1, 4.5 and 6.2).
//!
//! A driver writes input contexts and reads output contexts. What it writes is copied once, when a command names it; what it
//! reads is written here and never read back.

use super::{PORTS, endpoint::Endpoint};
use crate::engine::memory::{Gpa, GuestRam, RamSpan};

const CONTEXT_BYTES: u64 = 32;
/// Device context indices: 0 is the slot, 1 endpoint 0, then two for each endpoint.
pub(super) const CONTEXTS: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SlotState {
    Disabled,
    Enabled,
    Default,
    Addressed,
    Configured,
}

pub(super) type Words = [u32; 8];

pub(super) struct Slot {
    pub(super) state: SlotState,
    /// Output device context, 1024 bytes of RAM.
    pub(super) context: u64,
    /// The slot context as the driver wrote it; state and address are computed.
    pub(super) words: Words,
    /// From 0.
    pub(super) port: usize,
    pub(super) endpoints: [Option<Box<Endpoint>>; CONTEXTS],
}

impl Default for Slot {
    fn default() -> Slot {
        Slot { state: SlotState::Disabled, context: 0, words: [0; 8], port: 0, endpoints: [const { None }; CONTEXTS] }
    }
}

impl Slot {
    /// The endpoint with this device context index.
    pub(super) fn endpoint(&mut self, index: u8) -> Option<&mut Endpoint> {
        self.endpoints.get_mut(usize::from(index))?.as_deref_mut()
    }

    /// Whether its port's device is this slot's.
    pub(super) fn is_at(&self, port: usize) -> bool {
        self.state >= SlotState::Default && self.port == port
    }

    pub(super) fn drop_endpoints_beside_0(&mut self) {
        self.endpoints.iter_mut().skip(2).for_each(|endpoint| *endpoint = None);
    }

    /// Writes the slot context. The device's address is the number of its slot.
    pub(super) fn store(&self, ram: &GuestRam, id: u8) {
        let (state, address) = match self.state {
            SlotState::Disabled | SlotState::Enabled => (0, 0),
            SlotState::Default => (1, 0),
            SlotState::Addressed => (2, u32::from(id)),
            SlotState::Configured => (3, u32::from(id)),
        };
        let mut words = self.words;
        words[3] = state << 27 | address;
        self.write(ram, 0, &words);
    }

    /// Writes an endpoint's context; zeros for one that is disabled.
    pub(super) fn store_endpoint(&self, ram: &GuestRam, index: u8) {
        let words = match self.endpoints.get(usize::from(index)) {
            Some(Some(endpoint)) => endpoint.context(),
            _ => [0; 8],
        };
        self.write(ram, index, &words);
    }

    /// Writes everything.
    pub(super) fn store_all(&self, ram: &GuestRam, id: u8) {
        self.store(ram, id);
        for index in 1..CONTEXTS as u8 {
            self.store_endpoint(ram, index);
        }
    }

    fn write(&self, ram: &GuestRam, index: u8, words: &Words) {
        if self.context == 0 {
            return;
        }
        let mut bytes = [0; CONTEXT_BYTES as usize];
        for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        // It was RAM when the device was addressed, and RAM does not go away.
        let _ = ram.write(Gpa(self.context + CONTEXT_BYTES * u64::from(index)), &bytes);
    }
}

/// Whether an output device context can be there.
pub(super) fn is_context(ram: &GuestRam, at: u64) -> bool {
    at != 0
        && at.is_multiple_of(64)
        && ram.contains(RamSpan { at: Gpa(at), bytes: CONTEXT_BYTES as u32 * CONTEXTS as u32 })
}

/// An input context (6.2.5), copied as it is needed.
pub(super) struct Input<'a> {
    ram: &'a GuestRam,
    at: u64,
    pub(super) drop: u32,
    pub(super) add: u32,
}

impl Input<'_> {
    /// `None` when it is not RAM.
    pub(super) fn new(ram: &GuestRam, at: u64) -> Option<Input<'_>> {
        let [drop, add, ..] = read(ram, at)?;
        Some(Input { ram, at, drop, add })
    }
    pub(super) fn slot(&self) -> Option<Words> {
        self.context(0)
    }
    pub(super) fn context(&self, index: u8) -> Option<Words> {
        read(self.ram, self.at.checked_add(CONTEXT_BYTES * (u64::from(index) + 1))?)
    }
}

fn read(ram: &GuestRam, at: u64) -> Option<Words> {
    let mut bytes = [0; CONTEXT_BYTES as usize];
    ram.read(Gpa(at), &mut bytes).ok()?;
    let mut words = [0; 8];
    for (word, from) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*from);
    }
    Some(words)
}

/// The root hub port of a slot context, from 0; `None` for a device behind a hub, of which there are none.
pub(super) fn root_port(words: &Words) -> Option<usize> {
    let route = words[0] & 0xf_ffff;
    let port = (words[1] >> 16 & 0xff) as usize;
    (route == 0 && (1..=PORTS).contains(&port)).then(|| port - 1)
}

/// Whether an endpoint context can be: its type agrees with its index, and it has no streams.
pub(super) fn is_endpoint(words: &Words, index: u8) -> bool {
    let kind = words[1] >> 3 & 7;
    let streams = words[0] >> 10 & 0x1f;
    let fits = match kind {
        4 => index == 1,
        1..=3 => index > 1 && index.is_multiple_of(2),
        5..=7 => index > 1 && !index.is_multiple_of(2),
        _ => false,
    };
    fits && streams == 0
}
