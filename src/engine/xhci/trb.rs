//! Transfer request blocks (xHCI 1.1, 6.4): the 16 bytes that all rings are made of, and where in a ring one is.

use std::sync::atomic::{Ordering, fence};

use crate::engine::memory::{Gpa, GuestRam};

pub(super) const TRB_BYTES: u64 = 16;

// Bits of the last word.
pub(super) const CYCLE: u32 = 1;
/// Of a link: the cycle bit turns behind it.
const TOGGLE_CYCLE: u32 = 1 << 1;
/// Of a transfer event: the parameter is an Event Data TRB's, the length what moved since the last one.
pub(super) const EVENT_DATA: u32 = 1 << 2;
pub(super) const INTERRUPT_ON_SHORT: u32 = 1 << 2;
pub(super) const CHAIN: u32 = 1 << 4;
pub(super) const INTERRUPT_ON_COMPLETION: u32 = 1 << 5;
pub(super) const IMMEDIATE_DATA: u32 = 1 << 6;
pub(super) const BLOCK_EVENT_INTERRUPT: u32 = 1 << 9;
/// Of a data or status stage: to the host.
pub(super) const DIRECTION_IN: u32 = 1 << 16;

/// TRB types (6.4.6).
pub(super) mod kind {
    pub(in super::super) const NORMAL: u8 = 1;
    pub(in super::super) const SETUP_STAGE: u8 = 2;
    pub(in super::super) const DATA_STAGE: u8 = 3;
    pub(in super::super) const STATUS_STAGE: u8 = 4;
    pub(in super::super) const LINK: u8 = 6;
    pub(in super::super) const EVENT_DATA: u8 = 7;
    pub(in super::super) const NO_OP: u8 = 8;
    pub(in super::super) const ENABLE_SLOT: u8 = 9;
    pub(in super::super) const DISABLE_SLOT: u8 = 10;
    pub(in super::super) const ADDRESS_DEVICE: u8 = 11;
    pub(in super::super) const CONFIGURE_ENDPOINT: u8 = 12;
    pub(in super::super) const EVALUATE_CONTEXT: u8 = 13;
    pub(in super::super) const RESET_ENDPOINT: u8 = 14;
    pub(in super::super) const STOP_ENDPOINT: u8 = 15;
    pub(in super::super) const SET_TR_DEQUEUE: u8 = 16;
    pub(in super::super) const RESET_DEVICE: u8 = 17;
    pub(in super::super) const NO_OP_COMMAND: u8 = 23;
    pub(in super::super) const TRANSFER_EVENT: u8 = 32;
    pub(in super::super) const COMMAND_COMPLETION: u8 = 33;
    pub(in super::super) const PORT_STATUS_CHANGE: u8 = 34;
}

/// Completion codes (6.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Success = 1,
    TransactionError = 4,
    TrbError = 5,
    Stall = 6,
    NoSlots = 9,
    SlotNotEnabled = 11,
    EndpointNotEnabled = 12,
    ShortPacket = 13,
    ParameterError = 17,
    ContextState = 19,
    CommandRingStopped = 24,
    Stopped = 26,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Trb {
    pub(super) parameter: u64,
    pub(super) status: u32,
    pub(super) control: u32,
}

impl Trb {
    /// An event. The producer adds the cycle bit.
    pub(super) fn event(kind: u8, parameter: u64, code: Code, length: u32, control: u32) -> Trb {
        let status = (code as u32) << 24 | length & 0xff_ffff;
        Trb { parameter, status, control: u32::from(kind) << 10 | control }
    }

    pub(super) fn kind(self) -> u8 {
        (self.control >> 10) as u8 & 0x3f
    }
    pub(super) fn has(self, flag: u32) -> bool {
        self.control & flag != 0
    }
    /// TRB Transfer Length, at most 128 KiB.
    pub(super) fn length(self) -> u32 {
        self.status & 0x1_ffff
    }
    /// Bits 31 to 24 of the last word: the slot of a command.
    pub(super) fn slot(self) -> u8 {
        (self.control >> 24) as u8
    }
    /// Bits 20 to 16 of the last word: the endpoint of a command.
    pub(super) fn endpoint(self) -> u8 {
        (self.control >> 16) as u8 & 0x1f
    }

    /// Writes an event for a driver that looks at the cycle bit first.
    pub(super) fn publish(self, ram: &GuestRam, at: Gpa, cycle: bool) -> bool {
        let mut first = [0; 12];
        first[..8].copy_from_slice(&self.parameter.to_le_bytes());
        first[8..].copy_from_slice(&self.status.to_le_bytes());
        let control = self.control & !CYCLE | u32::from(cycle);
        let written = ram.write(at, &first).is_ok();
        fence(Ordering::Release);
        written && ram.write(Gpa(at.0 + 12), &control.to_le_bytes()).is_ok()
    }

    /// The TRB at `at`, if the driver has handed it over: its cycle bit is what the consumer expects.
    fn take(ram: &GuestRam, at: Gpa, cycle: bool) -> Result<Option<Trb>, BadRing> {
        let control = ram.get_u32(Gpa(at.0.checked_add(12).ok_or(BadRing)?)).map_err(|_| BadRing)?;
        if (control & CYCLE != 0) != cycle {
            return Ok(None);
        }
        // The rest was written before the cycle bit turned.
        fence(Ordering::Acquire);
        let mut bytes = [0; 12];
        ram.read(at, &mut bytes).map_err(|_| BadRing)?;
        let [p0, p1, p2, p3, p4, p5, p6, p7, status @ ..] = bytes;
        let parameter = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]);
        Ok(Some(Trb { parameter, status: u32::from_le_bytes(status), control }))
    }
}

/// A ring leads out of RAM, or in a circle without anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadRing;

/// How many TRBs one run looks at: more than any driver hands over at once, cancelled ones included.
const TRBS_PER_RUN: u32 = 4096;

/// What is left of a run.
pub(super) struct Budget(u32);

impl Budget {
    pub(super) fn new() -> Budget {
        Budget(TRBS_PER_RUN)
    }
    fn spend(&mut self) -> Result<(), BadRing> {
        self.0 = self.0.checked_sub(1).ok_or(BadRing)?;
        Ok(())
    }
}

/// The consumer's place in a command or transfer ring (4.9.2): the dequeue pointer and the consumer cycle state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Cursor {
    pub(super) at: u64,
    pub(super) cycle: bool,
}

impl Cursor {
    /// From a pointer with the cycle state in bit 0.
    pub(super) fn new(pointer: u64) -> Cursor {
        Cursor { at: pointer & !0xf, cycle: pointer & 1 != 0 }
    }
    /// As it stands in an endpoint context.
    pub(super) fn pointer(self) -> u64 {
        self.at | u64::from(self.cycle)
    }

    /// The TRB to do next, links followed; `None` when the driver has not handed one over. It stays where it is.
    pub(super) fn fetch(&mut self, ram: &GuestRam, budget: &mut Budget) -> Result<Option<Trb>, BadRing> {
        loop {
            budget.spend()?;
            let Some(trb) = Trb::take(ram, Gpa(self.at), self.cycle)? else { return Ok(None) };
            if trb.kind() != kind::LINK {
                return Ok(Some(trb));
            }
            self.cycle ^= trb.has(TOGGLE_CYCLE);
            self.at = trb.parameter & !0xf;
        }
    }

    /// The TRB there is done.
    pub(super) fn advance(&mut self) {
        self.at = self.at.wrapping_add(TRB_BYTES);
    }
}
