//! One virtqueue in use: descriptor chains as spans of guest RAM, used ring, notification suppression.

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::Interrupts;
use crate::engine::{
    event::Event,
    memory::{Gpa, GuestRam, OutsideRam, RamSpan},
};

/// The driver's ring or chain is broken; the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// One request: what the device may read, then what it may write. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<RamSpan>,
    pub writable: Vec<RamSpan>,
}

/// No honest request is larger; also keeps sums of lengths in `u32`.
const CHAIN_BYTES_MAX: u64 = 1 << 30;

impl Chain {
    pub fn readable_bytes(&self) -> u64 {
        bytes(&self.readable)
    }
    pub fn writable_bytes(&self) -> u64 {
        bytes(&self.writable)
    }
    /// Copies out of the readable part from `offset`; false when it is shorter.
    pub fn read(&self, ram: &GuestRam, offset: u64, into: &mut [u8]) -> Result<bool, OutsideRam> {
        copy(&self.readable, offset, into.len(), |at, range| match into.get_mut(range) {
            Some(part) => ram.read(at, part),
            None => Ok(()),
        })
    }
    /// Copies into the writable part at `offset`; false when it is shorter.
    pub fn write(&self, ram: &GuestRam, offset: u64, from: &[u8]) -> Result<bool, OutsideRam> {
        copy(&self.writable, offset, from.len(), |at, range| match from.get(range) {
            Some(part) => ram.write(at, part),
            None => Ok(()),
        })
    }
}

pub fn bytes(spans: &[RamSpan]) -> u64 {
    spans.iter().map(|span| u64::from(span.bytes)).sum()
}

/// Drops the first `count` bytes of the spans.
pub fn skip(spans: &mut Vec<RamSpan>, mut count: u64) {
    while let Some(first) = spans.first_mut() {
        let here = u64::from(first.bytes);
        if count < here {
            first.at = Gpa(first.at.0.wrapping_add(count));
            first.bytes -= count as u32;
            return;
        }
        count -= here;
        spans.remove(0);
    }
}

/// Keeps the first `count` bytes of the spans.
pub fn truncate(spans: &mut Vec<RamSpan>, mut count: u64) {
    for (index, span) in spans.iter_mut().enumerate() {
        if count < u64::from(span.bytes) {
            span.bytes = count as u32;
            let keep = if count == 0 { index } else { index + 1 };
            return spans.truncate(keep);
        }
        count -= u64::from(span.bytes);
    }
}

fn copy(
    spans: &[RamSpan],
    mut offset: u64,
    length: usize,
    mut part: impl FnMut(Gpa, std::ops::Range<usize>) -> Result<(), OutsideRam>,
) -> Result<bool, OutsideRam> {
    let mut done = 0;
    for span in spans {
        if done == length {
            break;
        }
        let here = u64::from(span.bytes);
        if offset >= here {
            offset -= here;
            continue;
        }
        let take = usize::try_from(here - offset).unwrap_or(usize::MAX).min(length - done);
        part(Gpa(span.at.0.wrapping_add(offset)), done..done + take)?;
        (done, offset) = (done + take, 0);
    }
    Ok(done == length)
}

/// A queue that the driver has set up, with its doorbell.
pub struct VirtQueue {
    queue: Queue,
    index: usize,
    pub kick: Event,
}

impl VirtQueue {
    pub fn new(queue: Queue, index: usize, kick: Event) -> VirtQueue {
        VirtQueue { queue, index, kick }
    }

    /// Takes the next request into `chain`; false when there is none. Every span is RAM, readable ones come first.
    pub fn pop(&mut self, ram: &GuestRam, chain: &mut Chain) -> Result<bool, Malformed> {
        chain.readable.clear();
        chain.writable.clear();
        let map = ram.map();
        let mut iter = self.queue.iter(map).map_err(|_| Malformed)?;
        let Some(descriptors) = iter.next() else { return Ok(false) };
        chain.head = descriptors.head_index();
        let (mut complete, mut total) = (false, 0u64);
        for descriptor in descriptors {
            complete = !descriptor.has_next();
            let span = RamSpan { at: Gpa(descriptor.addr().0), bytes: descriptor.len() };
            total += u64::from(span.bytes);
            let order = descriptor.is_write_only() || chain.writable.is_empty();
            if total > CHAIN_BYTES_MAX || !order || (span.bytes > 0 && !ram.contains(span)) {
                return Err(Malformed);
            }
            if span.bytes == 0 {
                continue;
            }
            if descriptor.is_write_only() { chain.writable.push(span) } else { chain.readable.push(span) }
        }
        // The iterator ends early at a bad next pointer, a loop or a bad indirect table.
        if complete { Ok(true) } else { Err(Malformed) }
    }

    /// Gives a request back with `written` bytes in its writable part, and interrupts if the driver wants that.
    pub fn push(&mut self, ram: &GuestRam, head: u16, written: u32, interrupts: &Interrupts) -> Result<(), Malformed> {
        self.queue.add_used(ram.map(), head, written).map_err(|_| Malformed)?;
        if self.queue.needs_notification(ram.map()).map_err(|_| Malformed)? {
            interrupts.used(self.index);
        }
        Ok(())
    }

    /// Before a burst: the driver need not kick while we look anyway.
    pub fn disable_kicks(&mut self, ram: &GuestRam) -> Result<(), Malformed> {
        self.queue.disable_notification(ram.map()).map_err(|_| Malformed)
    }

    /// After a burst: true when more came meanwhile.
    pub fn enable_kicks(&mut self, ram: &GuestRam) -> Result<bool, Malformed> {
        self.queue.enable_notification(ram.map()).map_err(|_| Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(at: u64, bytes: u32) -> RamSpan {
        RamSpan { at: Gpa(at), bytes }
    }

    #[test]
    fn spans_are_skipped_truncated_and_copied_across_their_borders() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let mut spans = vec![span(0x1000, 4), span(0x2000, 4), span(0x3000, 4)];
        let chain = Chain { head: 0, readable: spans.clone(), writable: spans.clone() };
        assert_eq!(chain.write(&ram, 2, b"abcdef"), Ok(true));
        let mut seen = [0; 6];
        assert_eq!(chain.read(&ram, 2, &mut seen), Ok(true));
        assert_eq!(&seen, b"abcdef");
        assert_eq!(chain.write(&ram, 8, b"12345"), Ok(false), "one byte too many");
        skip(&mut spans, 5);
        assert_eq!(spans, [span(0x2001, 3), span(0x3000, 4)]);
        truncate(&mut spans, 3);
        assert_eq!(spans, [span(0x2001, 3)]);
        truncate(&mut spans, 0);
        assert!(spans.is_empty());
        skip(&mut spans, 1);
    }
}
