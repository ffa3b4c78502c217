//! Submission and completion queues in guest memory (NVM Express 1.4, section 4.1). The worker's alone.

use std::sync::atomic::{Ordering, fence};

use super::{
    super::{
        memory::{Gpa, GuestRam, RamSpan},
        saved::BadState,
        worker::Malformed,
    },
    PAGE_BYTES, VECTORS,
    command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Completion},
    saved::{CompletionV1, SubmissionV1, check},
};

/// Where a queue is: contiguous, from a page's border, all of it RAM.
#[derive(Debug, Clone, Copy)]
struct Ring {
    base: Gpa,
    entries: u32,
    entry_bytes: u32,
}

impl Ring {
    /// `None` when not all of it is RAM.
    fn new(ram: &GuestRam, base: Gpa, entries: u32, entry_bytes: usize) -> Option<Ring> {
        let entry_bytes = entry_bytes as u32;
        let bytes = entries.checked_mul(entry_bytes)?;
        let there = base.0.is_multiple_of(u64::from(PAGE_BYTES)) && ram.contains(RamSpan { at: base, bytes });
        (entries > 1 && there).then_some(Ring { base, entries, entry_bytes })
    }

    /// A ring that a driver can have made; `index` is where somebody is in it.
    fn restore(ram: &GuestRam, base: u64, entries: u32, entry_bytes: usize, index: u32) -> Result<Ring, BadState> {
        let ring = Ring::new(ram, Gpa(base), entries, entry_bytes).filter(|ring| index < ring.entries);
        ring.ok_or_else(|| BadState::new("nvme", "a queue that cannot be"))
    }

    /// Lies in the ring, which `new` has checked.
    fn at(&self, index: u32) -> Gpa {
        Gpa(self.base.0 + u64::from(index) * u64::from(self.entry_bytes))
    }

    fn next(&self, index: u32) -> u32 {
        if index + 1 == self.entries { 0 } else { index + 1 }
    }
}

pub(super) struct SubmissionQueue {
    ring: Ring,
    head: u32,
    /// The completion queue of its commands.
    pub(super) completion_queue: usize,
}

impl SubmissionQueue {
    pub(super) fn new(ram: &GuestRam, base: Gpa, entries: u32, completion_queue: usize) -> Option<SubmissionQueue> {
        let ring = Ring::new(ram, base, entries, COMMAND_BYTES)?;
        Some(SubmissionQueue { ring, head: 0, completion_queue })
    }

    pub(super) fn save(&self) -> SubmissionV1 {
        let SubmissionQueue { ring: Ring { base, entries, entry_bytes: _ }, head, completion_queue } = *self;
        SubmissionV1 { base: base.0, entries, head, completion_queue: completion_queue as u16 }
    }

    pub(super) fn restore(ram: &GuestRam, saved: SubmissionV1) -> Result<SubmissionQueue, BadState> {
        let SubmissionV1 { base, entries, head, completion_queue } = saved;
        let ring = Ring::restore(ram, base, entries, COMMAND_BYTES, head)?;
        Ok(SubmissionQueue { ring, head, completion_queue: completion_queue.into() })
    }

    pub(super) fn entries(&self) -> u32 {
        self.ring.entries
    }

    /// What completions tell the driver: entries before it may be reused.
    pub(super) fn head(&self) -> u32 {
        self.head
    }

    /// Whether the driver has submitted something. A doorbell that was written while its queue was made anew may be past it.
    pub(super) fn has_commands(&self, tail: u32) -> bool {
        tail != self.head && tail < self.ring.entries
    }

    /// Copies the next command out. The caller knows that there is one.
    pub(super) fn fetch(&mut self, ram: &GuestRam) -> Result<Command, Malformed> {
        let mut bytes = [0; COMMAND_BYTES];
        ram.read(self.ring.at(self.head), &mut bytes).map_err(|_| Malformed)?;
        self.head = self.ring.next(self.head);
        Ok(Command::parse(&bytes))
    }
}

pub(super) struct CompletionQueue {
    ring: Ring,
    tail: u32,
    /// As the driver last said.
    head: u32,
    /// A doorbell's value that was refused, so that it is told once.
    refused: Option<u32>,
    /// What the phase bit of the next entry is: it turns with every round.
    phase: bool,
    /// `None` for a queue that the driver polls.
    pub(super) vector: Option<u16>,
}

impl CompletionQueue {
    pub(super) fn new(ram: &GuestRam, base: Gpa, entries: u32, vector: Option<u16>) -> Option<CompletionQueue> {
        let ring = Ring::new(ram, base, entries, COMPLETION_BYTES)?;
        Some(CompletionQueue { ring, tail: 0, head: 0, refused: None, phase: true, vector })
    }

    pub(super) fn save(&self) -> CompletionV1 {
        let CompletionQueue { ring: Ring { base, entries, entry_bytes: _ }, tail, head, refused, phase, vector } =
            *self;
        CompletionV1 { base: base.0, entries, tail, head, refused, phase, vector }
    }

    pub(super) fn restore(ram: &GuestRam, saved: CompletionV1) -> Result<CompletionQueue, BadState> {
        let CompletionV1 { base, entries, tail, head, refused, phase, vector } = saved;
        let ring = Ring::restore(ram, base, entries, COMPLETION_BYTES, tail.max(head))?;
        check(vector.is_none_or(|vector| vector < VECTORS), "a vector that is not there")?;
        Ok(CompletionQueue { ring, tail, head, refused, phase, vector })
    }

    pub(super) fn entries(&self) -> u32 {
        self.ring.entries
    }

    /// Where the entry after the next goes.
    pub(super) fn next_tail(&self) -> u32 {
        self.ring.next(self.tail)
    }

    /// Takes the doorbell's value; false when it is past the entries that were posted, for each such value once.
    pub(super) fn consume(&mut self, head: u32) -> bool {
        if head == self.head || head >= self.ring.entries {
            return true;
        }
        let ahead = |of: u32| (of + self.ring.entries - self.head) % self.ring.entries;
        if ahead(head) <= ahead(self.tail) {
            self.head = head;
            self.refused = None;
            return true;
        }
        self.refused.replace(head) == Some(head)
    }

    /// Entries that can be posted; one place stays empty, so that a full queue does not look like an empty one.
    pub(super) fn free(&self) -> u32 {
        (self.head + 2 * self.ring.entries - self.tail - 1) % self.ring.entries
    }

    /// Writes an entry, for which there is room.
    pub(super) fn post(&mut self, ram: &GuestRam, completion: &Completion) -> Result<(), Malformed> {
        let at = self.ring.at(self.tail);
        let (first, last) = completion.encode(self.phase);
        ram.write(at, &first).map_err(|_| Malformed)?;
        // The driver reads the rest when it sees the phase turned.
        fence(Ordering::Release);
        ram.write(Gpa(at.0 + 12), &last).map_err(|_| Malformed)?;
        self.tail = self.ring.next(self.tail);
        self.phase ^= self.tail == 0;
        Ok(())
    }
}
