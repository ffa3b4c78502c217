//! Submission and completion entries (NVM Express 1.4, sections 4.2 and 4.6).

use super::saved::WaitingV1;

/// Bytes of a submission entry.
pub(super) const COMMAND_BYTES: usize = 64;
/// Bytes of a completion entry.
pub(super) const COMPLETION_BYTES: usize = 16;
/// The namespace identifier that means all of them.
pub(super) const ALL_NAMESPACES: u32 = 0xffff_ffff;
/// The only namespace.
pub(super) const NAMESPACE: u32 = 1;

/// A copied submission entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) opcode: u8,
    /// Fused operation and how data is described: 0 for a single command with PRPs.
    flags: u8,
    pub(super) id: u16,
    pub(super) namespace: u32,
    pub(super) prp1: u64,
    pub(super) prp2: u64,
    /// Command dwords 10 to 15.
    pub(super) words: [u32; 6],
}

impl Command {
    pub(super) fn parse(bytes: &[u8; COMMAND_BYTES]) -> Command {
        let word = |number: usize| {
            let at = 4 * number;
            bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map_or(0, u32::from_le_bytes)
        };
        let wide = |number: usize| u64::from(word(number + 1)) << 32 | u64::from(word(number));
        Command {
            opcode: word(0) as u8,
            flags: (word(0) >> 8) as u8,
            id: (word(0) >> 16) as u16,
            namespace: word(1),
            prp1: wide(6),
            prp2: wide(8),
            words: [word(10), word(11), word(12), word(13), word(14), word(15)],
        }
    }

    /// Whether it is neither part of a fused operation nor described by SGLs, which are not offered.
    pub(super) fn is_plain(&self) -> bool {
        self.flags & 0xc3 == 0
    }

    /// Command dwords 10 and 11 as one number: the first logical block.
    pub(super) fn start_block(&self) -> u64 {
        u64::from(self.words[1]) << 32 | u64::from(self.words[0])
    }
}

impl Command {
    pub(super) fn save(&self, queue: usize) -> WaitingV1 {
        let Command { opcode, flags, id, namespace, prp1, prp2, words } = *self;
        WaitingV1 { queue: queue as u16, opcode, flags, id, namespace, prp1, prp2, words }
    }

    /// A driver may have submitted any.
    pub(super) fn restore(saved: WaitingV1) -> Command {
        let WaitingV1 { queue: _, opcode, flags, id, namespace, prp1, prp2, words } = saved;
        Command { opcode, flags, id, namespace, prp1, prp2, words }
    }
}

/// A status code with its type (4.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(u16);

impl Status {
    pub(super) const SUCCESS: Status = Status(0);
    pub(super) const INVALID_OPCODE: Status = Status::generic(0x01);
    pub(super) const INVALID_FIELD: Status = Status::generic(0x02);
    pub(super) const DATA_TRANSFER_ERROR: Status = Status::generic(0x04);
    pub(super) const ABORT_REQUESTED: Status = Status::generic(0x07);
    pub(super) const INVALID_NAMESPACE: Status = Status::generic(0x0b);
    pub(super) const SEQUENCE_ERROR: Status = Status::generic(0x0c);
    pub(super) const INVALID_PRP_OFFSET: Status = Status::generic(0x13);
    pub(super) const WRITE_PROTECTED: Status = Status::generic(0x20);
    pub(super) const LBA_OUT_OF_RANGE: Status = Status::generic(0x80);
    pub(super) const COMPLETION_QUEUE_INVALID: Status = Status::specific(0x00);
    pub(super) const INVALID_QUEUE_ID: Status = Status::specific(0x01);
    pub(super) const INVALID_QUEUE_SIZE: Status = Status::specific(0x02);
    pub(super) const TOO_MANY_EVENT_REQUESTS: Status = Status::specific(0x05);
    pub(super) const INVALID_VECTOR: Status = Status::specific(0x08);
    pub(super) const INVALID_LOG_PAGE: Status = Status::specific(0x09);
    pub(super) const INVALID_QUEUE_DELETION: Status = Status::specific(0x0c);
    pub(super) const NOT_SAVEABLE: Status = Status::specific(0x0d);

    const DO_NOT_RETRY: u16 = 1 << 14;

    const fn generic(code: u16) -> Status {
        Status(code)
    }
    /// A code that means something for some commands only.
    const fn specific(code: u16) -> Status {
        Status(0x100 | code)
    }

    /// The 15 bits of the status field. The same command would fail again, so that no error is worth a retry.
    pub(super) fn bits(self) -> u16 {
        let once = self == Status::SUCCESS || self == Status::ABORT_REQUESTED;
        if once { self.0 } else { self.0 | Status::DO_NOT_RETRY }
    }
}

/// Why a command was not done.
#[derive(Debug)]
pub(super) enum Failure {
    /// The guest's mistake.
    Status(Status),
    /// The host cannot serve it now, for this reason: it is done again when the guest goes on.
    Host(String),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure::Status(status)
    }
}

/// What the driver is told about one command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Completion {
    pub(super) result: u32,
    pub(super) queue: u16,
    pub(super) queue_head: u32,
    pub(super) id: u16,
    pub(super) status: Status,
}

impl Completion {
    /// The entry's first three dwords, and the last one, which has the phase and is written after them.
    pub(super) fn encode(&self, phase: bool) -> ([u8; 12], [u8; 4]) {
        let mut first = [0; 12];
        first[0..4].copy_from_slice(&self.result.to_le_bytes());
        first[8..10].copy_from_slice(&(self.queue_head as u16).to_le_bytes());
        first[10..12].copy_from_slice(&self.queue.to_le_bytes());
        let field = self.status.bits() << 1 | u16::from(phase);
        (first, (u32::from(field) << 16 | u32::from(self.id)).to_le_bytes())
    }
}
