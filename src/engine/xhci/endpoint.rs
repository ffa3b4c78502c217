//! An endpoint's transfer ring (xHCI 1.1, 4.10 and 4.11): TRBs in, bytes moved, transfer events out.
//!
//! Everything goes TRB by TRB, and a place within a TRB is kept, so that a transfer may wait for its device anywhere.

use super::{
    control::Control,
    events::Events,
    trb::{
        BLOCK_EVENT_INTERRUPT, BadRing, Budget, CHAIN, Code, Cursor, EVENT_DATA, IMMEDIATE_DATA,
        INTERRUPT_ON_COMPLETION, INTERRUPT_ON_SHORT, Trb, kind,
    },
};
use crate::engine::{
    memory::{Gpa, GuestRam},
    usb::Moved,
};

/// Endpoint states (6.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndpointState {
    Running = 1,
    Halted = 2,
    Stopped = 3,
    Error = 4,
}

/// What an endpoint needs beside itself.
pub(super) struct Env<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) events: &'a mut Events,
    pub(super) slot: u8,
    /// Device context index: twice the endpoint's number, and one more for IN.
    pub(super) index: u8,
    pub(super) budget: Budget,
}

pub(super) struct Endpoint {
    /// The context as the driver wrote it; state and dequeue pointer are kept below.
    pub(super) words: [u32; 8],
    pub(super) state: EndpointState,
    pub(super) cursor: Cursor,
    /// Bytes of the TRB at the cursor that have moved.
    pub(super) offset: u32,
    /// Event Data Transfer Length Accumulator (4.11.5.2).
    pub(super) accumulated: u32,
    /// The control transfer of endpoint 0.
    pub(super) control: Control,
}

/// What a TRB is in a transfer.
enum Piece {
    /// A buffer.
    Data,
    /// Nothing to move; the transfer goes on, or it was one by itself.
    Other { ended: bool },
}

impl Endpoint {
    /// From an endpoint context (6.2.3).
    pub(super) fn new(words: [u32; 8]) -> Endpoint {
        let pointer = u64::from(words[3]) << 32 | u64::from(words[2]);
        Endpoint {
            words,
            state: EndpointState::Running,
            cursor: Cursor::new(pointer),
            offset: 0,
            accumulated: 0,
            control: Control::default(),
        }
    }

    /// The context as the driver shall see it.
    pub(super) fn context(&self) -> [u32; 8] {
        let pointer = self.cursor.pointer();
        let mut words = self.words;
        words[0] = words[0] & !7 | self.state as u32;
        words[2] = pointer as u32;
        words[3] = (pointer >> 32) as u32;
        words
    }

    /// Set TR Dequeue Pointer (4.6.10).
    pub(super) fn set_cursor(&mut self, pointer: u64) {
        self.cursor = Cursor::new(pointer);
        self.forget_progress();
        self.control = Control::default();
    }

    pub(super) fn forget_progress(&mut self) {
        (self.offset, self.accumulated) = (0, 0);
    }

    /// The next TRB, when the endpoint runs and the event ring has room for what it may come to.
    pub(super) fn next(&mut self, env: &mut Env<'_>) -> Option<Trb> {
        if self.state != EndpointState::Running || !env.events.has_room() {
            return None;
        }
        match self.cursor.fetch(env.ram, &mut env.budget) {
            Ok(trb) => trb,
            Err(BadRing) => {
                let trb = Trb::default();
                self.fail(env, trb, Code::TrbError, EndpointState::Error);
                None
            }
        }
    }

    /// As `Pipes::send`, for any endpoint that sends to the host.
    pub(super) fn send(&mut self, env: &mut Env<'_>, bytes: &[u8], last: bool) -> Moved {
        let mut done = 0;
        while let Some(trb) = self.next(env) {
            let part = bytes.get(done..).unwrap_or_default();
            match self.piece(env, trb) {
                Some(Piece::Data) => {}
                Some(Piece::Other { ended: false }) => continue,
                Some(Piece::Other { ended: true }) => return Moved { bytes: done, ended: true },
                None => break,
            }
            let rest = trb.length().saturating_sub(self.offset);
            let part = part.get(..part.len().min(rest as usize)).unwrap_or_default();
            if part.is_empty() && rest > 0 && !last {
                break;
            }
            if !self.write_buffer(env, trb, part) {
                break;
            }
            done += part.len();
            let over = done == bytes.len();
            if self.offset >= trb.length() {
                if self.complete(env, trb) {
                    return Moved { bytes: done, ended: true };
                }
            } else if over && last {
                self.end_short(env, trb);
                return Moved { bytes: done, ended: true };
            } else if over {
                break;
            }
        }
        Moved { bytes: done, ended: false }
    }

    /// As `Pipes::receive`, for any endpoint that the host sends to.
    pub(super) fn receive(&mut self, env: &mut Env<'_>, into: &mut [u8]) -> Moved {
        let mut done = 0;
        while let Some(trb) = self.next(env) {
            match self.piece(env, trb) {
                Some(Piece::Data) => {}
                Some(Piece::Other { ended: false }) => continue,
                Some(Piece::Other { ended: true }) => return Moved { bytes: done, ended: true },
                None => break,
            }
            let rest = trb.length().saturating_sub(self.offset) as usize;
            let part = into.get_mut(done..).unwrap_or_default();
            let room = part.len().min(rest);
            if room == 0 && rest > 0 {
                break;
            }
            let part = part.get_mut(..room).unwrap_or_default();
            if !self.read_buffer(env, trb, part) {
                break;
            }
            done += room;
            if self.offset < trb.length() {
                break;
            }
            if self.complete(env, trb) {
                return Moved { bytes: done, ended: true };
            }
        }
        Moved { bytes: done, ended: false }
    }

    /// What the driver wants to move next is answered with STALL.
    pub(super) fn stall(&mut self, env: &mut Env<'_>) {
        self.refuse(env, Code::Stall);
    }

    /// What the driver wants to move next ends with an error, which halts the endpoint (4.10.2).
    pub(super) fn refuse(&mut self, env: &mut Env<'_>, code: Code) {
        while let Some(trb) = self.next(env) {
            match trb.kind() {
                kind::NO_OP | kind::EVENT_DATA => self.skip(env, trb),
                _ => self.fail(env, trb, code, EndpointState::Halted),
            }
        }
    }

    /// What a driver made of transfers that it took back.
    pub(super) fn skip_no_ops(&mut self, env: &mut Env<'_>) {
        while let Some(trb) = self.next(env)
            && trb.kind() == kind::NO_OP
        {
            self.skip(env, trb);
        }
    }

    /// The endpoint is stopped (4.6.9): tells how far the transfer came that waits.
    pub(super) fn stop(&mut self, env: &mut Env<'_>) {
        if let Some(trb) = self.next(env) {
            self.report(env, trb, Code::Stopped, trb.length().saturating_sub(self.offset));
        }
        if self.state == EndpointState::Running {
            self.state = EndpointState::Stopped;
        }
    }

    /// Does what moves no bytes, and says what the TRB is; `None` when it has no place here.
    fn piece(&mut self, env: &mut Env<'_>, trb: Trb) -> Option<Piece> {
        match trb.kind() {
            kind::NORMAL | kind::DATA_STAGE => Some(Piece::Data),
            kind::EVENT_DATA => {
                self.skip(env, trb);
                Some(Piece::Other { ended: !trb.has(CHAIN) })
            }
            kind::NO_OP => {
                self.skip(env, trb);
                Some(Piece::Other { ended: false })
            }
            _ => {
                self.fail(env, trb, Code::TrbError, EndpointState::Error);
                None
            }
        }
    }

    /// A TRB without data: its event, and on.
    pub(super) fn skip(&mut self, env: &mut Env<'_>, trb: Trb) {
        if trb.kind() == kind::EVENT_DATA {
            self.event_data(env, trb, Code::Success);
        } else if trb.has(INTERRUPT_ON_COMPLETION) {
            self.report(env, trb, Code::Success, 0);
        }
        self.cursor.advance();
        self.offset = 0;
    }

    /// A TRB is done. True when it is the last of its transfer.
    pub(super) fn complete(&mut self, env: &mut Env<'_>, trb: Trb) -> bool {
        if trb.has(INTERRUPT_ON_COMPLETION) {
            self.report(env, trb, Code::Success, 0);
        }
        self.cursor.advance();
        self.offset = 0;
        let ended = !trb.has(CHAIN);
        if ended {
            self.accumulated = 0;
        }
        ended
    }

    /// The device had less than the transfer asks for (4.10.1.1): one event, at this TRB or at the next that wants one, and
    /// one for each Event Data TRB.
    fn end_short(&mut self, env: &mut Env<'_>, mut trb: Trb) {
        let mut residue = trb.length().saturating_sub(self.offset);
        let mut wanted = INTERRUPT_ON_COMPLETION | INTERRUPT_ON_SHORT;
        loop {
            if trb.kind() == kind::EVENT_DATA {
                self.event_data(env, trb, Code::ShortPacket);
            } else if trb.has(wanted) {
                self.report(env, trb, Code::ShortPacket, residue);
                wanted = 0;
            } else {
                wanted &= INTERRUPT_ON_COMPLETION;
            }
            self.cursor.advance();
            self.offset = 0;
            if !trb.has(CHAIN) {
                break;
            }
            match self.cursor.fetch(env.ram, &mut env.budget) {
                Ok(Some(next)) => trb = next,
                // The driver hands over transfers as a whole; one that does not has ended this one.
                Ok(None) => break,
                Err(BadRing) => return self.fail(env, Trb::default(), Code::TrbError, EndpointState::Error),
            }
            residue = trb.length();
        }
        self.accumulated = 0;
    }

    fn event_data(&mut self, env: &mut Env<'_>, trb: Trb, code: Code) {
        if trb.has(INTERRUPT_ON_COMPLETION) {
            let control = EVENT_DATA | self.source(env);
            let event = Trb::event(kind::TRANSFER_EVENT, trb.parameter, code, self.accumulated, control);
            env.events.post(event, trb.has(BLOCK_EVENT_INTERRUPT));
        }
        self.accumulated = 0;
    }

    pub(super) fn report(&self, env: &mut Env<'_>, trb: Trb, code: Code, residue: u32) {
        let event = Trb::event(kind::TRANSFER_EVENT, self.cursor.at, code, residue, self.source(env));
        let quiet = trb.has(BLOCK_EVENT_INTERRUPT) && code == Code::Success;
        env.events.post(event, quiet);
    }

    /// An error is always told (4.10.2).
    pub(super) fn fail(&mut self, env: &mut Env<'_>, trb: Trb, code: Code, state: EndpointState) {
        self.report(env, trb, code, trb.length().saturating_sub(self.offset));
        self.state = state;
        self.forget_progress();
        self.control = Control::default();
    }

    fn source(&self, env: &Env<'_>) -> u32 {
        u32::from(env.slot) << 24 | u32::from(env.index) << 16
    }

    fn write_buffer(&mut self, env: &mut Env<'_>, trb: Trb, part: &[u8]) -> bool {
        let to = trb.parameter.checked_add(u64::from(self.offset));
        let written = part.is_empty() || to.is_some_and(|to| env.ram.write(Gpa(to), part).is_ok());
        self.moved(env, trb, part.len(), written)
    }

    fn read_buffer(&mut self, env: &mut Env<'_>, trb: Trb, part: &mut [u8]) -> bool {
        let count = part.len();
        let read = if trb.has(IMMEDIATE_DATA) {
            let bytes = trb.parameter.to_le_bytes();
            let from = bytes.get(self.offset as usize..).unwrap_or_default();
            part.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            count <= from.len()
        } else {
            let from = trb.parameter.checked_add(u64::from(self.offset));
            count == 0 || from.is_some_and(|from| env.ram.read(Gpa(from), part).is_ok())
        };
        self.moved(env, trb, count, read)
    }

    /// Counts what moved; a buffer outside of RAM stops the endpoint instead.
    fn moved(&mut self, env: &mut Env<'_>, trb: Trb, bytes: usize, good: bool) -> bool {
        if good {
            self.offset = self.offset.saturating_add(bytes as u32);
            self.accumulated = self.accumulated.wrapping_add(bytes as u32) & 0xff_ffff;
        } else {
            self.fail(env, trb, Code::TrbError, EndpointState::Error);
        }
        good
    }
}
