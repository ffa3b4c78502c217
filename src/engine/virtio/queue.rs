//! One virtqueue in use: descriptor chains as spans of guest RAM, used ring, notification suppression.

use std::sync::atomic::{Ordering, fence};

use rustix::event::{PollFd, PollFlags};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use super::Interrupts;
pub use crate::engine::worker::Malformed;
use crate::engine::{
    event::Event,
    memory::{Gpa, GuestRam, OutsideRam, RamSpan},
};

/// One request: what the device may read, then what it may write. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<RamSpan>,
    pub writable: Vec<RamSpan>,
}

/// No honest request is larger; also keeps sums of lengths in `u32`.
const CHAIN_BYTES_MAX: u64 = 1 << 30;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// A descriptor's size and flags (virtio 1.2, 2.7.5).
const DESCRIPTOR_BYTES: u32 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Of both rings (virtio 1.2, 2.7.6 and 2.7.8): flags, index, then entries.
const INDEX_AT: u64 = 2;
const AVAIL_ENTRIES_AT: u64 = 4;
const USED_ELEMENTS_AT: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

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
    /// Elements behind the used index, which the driver does not see yet.
    staged: u16,
    /// Elements before it since the last `notify`.
    pushed: u16,
    pub kick: Event,
}

impl VirtQueue {
    pub fn new(queue: Queue, index: usize, kick: Event) -> VirtQueue {
        VirtQueue { queue, index, staged: 0, pushed: 0, kick }
    }

    /// Requests that the driver can have in the queue.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Which of the device's queues this is. A driver need not set up all of them.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Takes the next request into `chain`; false when there is none. Every span is RAM, readable ones come first.
    pub fn pop(&mut self, ram: &GuestRam, chain: &mut Chain) -> Result<bool, Malformed> {
        let mut iter = self.queue.iter(ram.map()).map_err(|_| Malformed)?;
        let Some(descriptors) = iter.next() else { return Ok(false) };
        let head = descriptors.head_index();
        self.read_chain(ram, head, chain)?;
        Ok(true)
    }

    /// Reads the request at `head`, as `pop` does: for one that was popped before and is begun anew.
    pub fn read_chain(&self, ram: &GuestRam, head: u16, chain: &mut Chain) -> Result<(), Malformed> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut entries, mut indirect) = (self.queue.desc_table(), u32::from(self.queue.size()), false);
        let (mut index, mut total) = (u32::from(head), 0u64);
        // No chain has more descriptors than its table: what goes on is a loop.
        let mut left = entries;
        loop {
            left = left.checked_sub(1).ok_or(Malformed)?;
            if index >= entries {
                return Err(Malformed);
            }
            let mut raw = [0; DESCRIPTOR_BYTES as usize];
            let at = table.checked_add(u64::from(index * DESCRIPTOR_BYTES)).ok_or(Malformed)?;
            ram.read(Gpa(at), &mut raw).map_err(|_| Malformed)?;
            let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
            let at = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            let bytes = u32::from_le_bytes([l0, l1, l2, l3]);
            let flags = u16::from_le_bytes([f0, f1]);
            if flags & INDIRECT != 0 {
                // One table in place of the rest of the chain, none within it (2.7.5.3.1).
                let descriptors = bytes / DESCRIPTOR_BYTES;
                if indirect || !bytes.is_multiple_of(DESCRIPTOR_BYTES) || descriptors > u32::from(u16::MAX) {
                    return Err(Malformed);
                }
                (table, entries, left, index, indirect) = (at, descriptors, descriptors, 0, true);
                continue;
            }
            total += u64::from(bytes);
            let (span, write) = (RamSpan { at: Gpa(at), bytes }, flags & WRITE != 0);
            let order = write || chain.writable.is_empty();
            if total > CHAIN_BYTES_MAX || !order || (bytes > 0 && !ram.contains(span)) {
                return Err(Malformed);
            }
            match (bytes, write) {
                (0, _) => {}
                (_, true) => chain.writable.push(span),
                (_, false) => chain.readable.push(span),
            }
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(u16::from_le_bytes([n0, n1]));
        }
    }

    /// Makes the last `count` requests that were popped, and not given back, the next ones again.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a request back with `written` bytes in its writable part, and interrupts if the driver wants that.
    pub fn push(&mut self, ram: &GuestRam, head: u16, written: u32, interrupts: &Interrupts) -> Result<(), Malformed> {
        self.push_quiet(ram, head, written)?;
        self.notify(ram, interrupts)
    }

    /// Gives a request back; the driver hears of it with the next `notify`. For one of a burst.
    pub fn push_quiet(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), Malformed> {
        self.stage(ram, head, written)?;
        self.publish(ram)
    }

    /// Gives a request back, which the driver sees with the next `publish`: for those that belong together.
    pub fn stage(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), Malformed> {
        if head >= self.queue.size() {
            return Err(Malformed);
        }
        let place = self.queue.next_used().wrapping_add(self.staged) % self.queue.size();
        let mut element = [0; USED_ELEMENT_BYTES as usize];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        let at = Gpa(self.queue.used_ring() + USED_ELEMENTS_AT + USED_ELEMENT_BYTES * u64::from(place));
        ram.write(at, &element).map_err(|_| Malformed)?;
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Lets the driver see what was staged, all at once.
    pub fn publish(&mut self, ram: &GuestRam) -> Result<(), Malformed> {
        let used = self.queue.next_used().wrapping_add(self.staged);
        ram.store_u16(Gpa(self.queue.used_ring() + INDEX_AT), used).map_err(|_| Malformed)?;
        self.queue.set_next_used(used);
        self.pushed = self.pushed.saturating_add(std::mem::take(&mut self.staged));
        Ok(())
    }

    /// After a burst: one interrupt for all that was given back, if the driver wants that (virtio 1.2, 2.7.7.2).
    pub fn notify(&mut self, ram: &GuestRam, interrupts: &Interrupts) -> Result<(), Malformed> {
        let pushed = std::mem::take(&mut self.pushed);
        if pushed == 0 {
            return Ok(());
        }
        // The used index before the driver's wish: it writes and reads them the other way round.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let event_at = self.queue.avail_ring() + AVAIL_ENTRIES_AT + 2 * u64::from(self.queue.size());
            let event = ram.load_u16(Gpa(event_at)).map_err(|_| Malformed)?;
            self.queue.next_used().wrapping_sub(event).wrapping_sub(1) < pushed
        } else {
            !self.silenced(ram)?
        };
        if wanted {
            interrupts.used(self.index);
        }
        Ok(())
    }

    /// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, 2.7.7): drivers of firmware poll, and would leave the pin high for ever.
    fn silenced(&self, ram: &GuestRam) -> Result<bool, Malformed> {
        let flags = ram.load_u16(Gpa(self.queue.avail_ring())).map_err(|_| Malformed)?;
        Ok(flags & AVAIL_NO_INTERRUPT != 0)
    }

    /// Where descriptor table, available and used ring are in this process, for the kernel to serve the queue itself. `None` when
    /// one of them is not in one piece there.
    pub fn host_addresses(&self, ram: &GuestRam) -> Option<[u64; 3]> {
        let size = u32::from(self.queue.size());
        let parts = [
            (self.queue.desc_table(), DESCRIPTOR_BYTES * size),
            (self.queue.avail_ring(), AVAIL_ENTRIES_AT as u32 + 2 * size + 2),
            (self.queue.used_ring(), USED_ELEMENTS_AT as u32 + USED_ELEMENT_BYTES as u32 * size + 2),
        ];
        let mut addresses = [0; 3];
        for (address, (at, bytes)) in addresses.iter_mut().zip(parts) {
            let mut pieces = 0;
            let piece = |host: *mut u8, _| (pieces, *address) = (pieces + 1, host as u64);
            ram.host_pieces(RamSpan { at: Gpa(at), bytes }, piece).ok()?;
            if pieces != 1 {
                return None;
            }
        }
        Some(addresses)
    }

    /// Which entry of the available ring comes next.
    pub fn next(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Goes on where the kernel, which served the queue, left off: at entry `next`, behind what it has used.
    pub fn take_back(&mut self, ram: &GuestRam, next: u16) -> Result<(), Malformed> {
        let used = self.used_by_kernel(ram)?;
        self.queue.set_next_avail(next);
        self.queue.set_next_used(used);
        Ok(())
    }

    /// How far the kernel, which serves the queue, has come: the index of the used ring.
    pub fn used_by_kernel(&self, ram: &GuestRam) -> Result<u16, Malformed> {
        ram.load_u16(Gpa(self.queue.used_ring() + INDEX_AT)).map_err(|_| Malformed)
    }

    /// Its number among the device's queues, and where it is; for a saved state.
    pub fn state(&self) -> (usize, QueueState) {
        (self.index, self.queue.state())
    }

    /// What to wait for: the driver's next kick.
    pub fn kicked(&self) -> PollFd<'_> {
        PollFd::new(&self.kick, PollFlags::IN)
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
    use crate::engine::virtio::{
        rng::Rng,
        testing::{BUFFERS, Driver, EVENT_IDX, INDIRECT, NEXT, VERSION_1, WRITE, eventually, readable, writable},
    };

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

    #[test]
    fn a_broken_chain_needs_a_reset_and_is_never_used() {
        // Descriptors from index 0 on: address, length, flags, next. The head is the first number.
        type Raw = (u64, u32, u16, u16);
        let fine: Raw = (BUFFERS, 64, WRITE, 0);
        let cases: &[(&str, u16, &[Raw])] = &[
            ("a loop", 0, &[(BUFFERS, 64, WRITE | NEXT, 1), (BUFFERS, 64, WRITE | NEXT, 0)]),
            ("a loop on itself", 0, &[(BUFFERS, 1, WRITE | NEXT, 0)]),
            ("next is outside the table", 0, &[(BUFFERS, 64, WRITE | NEXT, 16)]),
            ("the head is outside the table", 16, &[fine]),
            ("the head is far outside", 0xffff, &[fine]),
            ("readable after writable", 0, &[(BUFFERS, 64, WRITE | NEXT, 1), (BUFFERS, 64, 0, 0)]),
            ("behind the end of RAM", 0, &[(8 << 20, 1, WRITE, 0)]),
            ("across the end of RAM", 0, &[((8 << 20) - 8, 16, WRITE, 0)]),
            ("the VGA window", 0, &[(0xa_0000, 16, WRITE, 0)]),
            ("into the VGA window", 0, &[(0x9_fff8, 16, WRITE, 0)]),
            ("the end of the address space", 0, &[(u64::MAX, 1, WRITE, 0)]),
            ("round the address space", 0, &[(u64::MAX - 7, 16, WRITE, 0)]),
            ("4 GiB", 0, &[(BUFFERS, u32::MAX, WRITE, 0)]),
            ("more than 4 GiB together", 0, &[(0, 0x8000_0000, WRITE | NEXT, 1), (0, 0x8000_0000, WRITE, 0)]),
            ("a table outside RAM", 0, &[(8 << 20, 16, 4, 0)]),
            ("an empty table", 0, &[(BUFFERS, 0, 4, 0)]),
            ("half an entry", 0, &[(BUFFERS, 24, 4, 0)]),
            ("a table of 4 GiB", 0, &[(BUFFERS, 0xffff_fff0, 4, 0)]),
            ("a table that is itself in a table", 0, &[(0x1_0000 + 16, 16, 4, 0), (BUFFERS, 16, 4, 0)]),
        ];
        let mut driver = Driver::plug(Rng::new().unwrap());
        for (what, head, chain) in cases {
            driver.start(VERSION_1 | INDIRECT);
            for (index, (at, bytes, flags, next)) in chain.iter().enumerate() {
                driver.descriptor(0, index as u16, *at, *bytes, *flags, *next);
            }
            driver.make_available(0, *head);
            driver.registers.kick(0);
            driver.registers.wait_needs_reset();
            assert_eq!(driver.used_index(0), 0, "{what}");
            driver.registers.kick(0);
            driver.start(VERSION_1);
            assert_eq!(driver.run(0, &[writable(BUFFERS, 64)]).bytes, 64, "after {what}");
        }
    }

    #[test]
    fn an_available_index_that_is_ahead_of_the_ring_needs_a_reset() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        for ahead in [17, 0x8000, 0xffff] {
            driver.start(VERSION_1);
            driver.set_available(0, ahead);
            driver.registers.kick(0);
            driver.registers.wait_needs_reset();
            assert_eq!(driver.used_index(0), 0, "{ahead}");
        }
    }

    #[test]
    fn a_ring_goes_round_its_indexes() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        driver.start(VERSION_1 | EVENT_IDX);
        for _ in 0..(1 << 16) / 16 + 2 {
            for _ in 0..16 {
                driver.add(0, &[writable(BUFFERS, 1)]);
            }
            driver.registers.kick(0);
            for head in 0..16 {
                assert_eq!(driver.wait_used(0).head, head);
            }
        }
        assert_eq!(driver.used_index(0), 32);
    }

    #[test]
    fn the_event_index_decides_about_interrupts_and_kicks() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        driver.start(VERSION_1 | EVENT_IDX);
        driver.set_used_event(0, 4);
        for number in 1..=8 {
            driver.run(0, &[writable(BUFFERS, 8)]);
            eventually("the wish for a kick", || driver.avail_event(0) == number);
            assert_eq!(driver.messages(1), usize::from(number >= 5), "after {number}");
        }
        driver.set_used_event(0, 8);
        driver.run(0, &[writable(BUFFERS, 8)]);
        eventually("a second interrupt", || driver.messages(1) == 2);
    }

    #[test]
    fn without_the_event_index_a_flag_silences_interrupts() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        driver.start_with_pin(VERSION_1);
        driver.set_avail_flags(0, 1);
        for _ in 0..5 {
            driver.run(0, &[writable(BUFFERS, 8)]);
        }
        driver.registers.reset();
        assert_eq!(driver.pin_rises(), 0, "the driver polls");
        driver.start_with_pin(VERSION_1);
        driver.run(0, &[writable(BUFFERS, 8)]);
        eventually("the pin", || driver.pin());
        assert_eq!(driver.used_flags(0), 0, "kicks are wanted");
    }

    #[test]
    fn a_chain_may_end_in_a_table_and_have_empty_pieces() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        driver.start(VERSION_1 | INDIRECT);
        let pieces = [readable(BUFFERS, 0), writable(BUFFERS, 10), writable(u64::MAX, 0), writable(BUFFERS + 100, 20)];
        driver.add_indirect(0, BUFFERS + 0x1000, &pieces);
        driver.registers.kick(0);
        assert_eq!(driver.wait_used(0).bytes, 30);
        driver.descriptor(0, 8, BUFFERS, 4, NEXT, 9);
        driver.descriptor(0, 9, BUFFERS + 0x1000, 64, 4, 0);
        driver.make_available(0, 8);
        driver.registers.kick(0);
        assert_eq!(driver.wait_used(0).bytes, 30);
    }
}
