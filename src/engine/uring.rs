//! Reads, writes and flushes of one file straight to and from guest RAM, many at once, through a ring shared with the kernel
//! (`io_uring(7)`). One system call, `wait`, submits what was begun and sleeps for what comes first: a completion, a watched
//! event or the end of a time.
//!
//! The kernel writes where it was told to until a request completes. So each request keeps its list of places and a handle on the RAM
//! in a slot, and a slot is free again only when the kernel is done with it. Slots are made once; a request allocates nothing.

#![expect(unsafe_code, reason = "the kernel is given addresses that it uses after the call")]

use std::{
    fs::File,
    io, mem,
    os::fd::{AsFd, AsRawFd},
    thread,
    time::Duration,
};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::memory::{GuestRam, RamSpan};

/// Pieces of memory of one request: what a virtio-blk driver is told of, and some.
const PIECES_MAX: usize = 256;
/// Watches are numbered from 0 to one less than this.
const WATCHES_MAX: u32 = 32;
/// What names a submission: a slot below, a watch from here on, and what needs no answer.
const WATCHES: u64 = 1 << 32;
const UNNAMED: u64 = u64::MAX;
/// Of so many in flight one more completion is waited for: a request costs less of a call, and the file is never without work.
const IN_FLIGHT_PER_COMPLETION: usize = 8;
/// How long completions wait for others.
const BATCH_WAIT: Duration = Duration::from_micros(500);
/// How long to wait for the host's memory when the kernel had none for a call.
const SHORTAGE_WAIT: Duration = Duration::from_millis(1);

/// A place of memory as the kernel reads it: `struct iovec`, address and length.
type Piece = [usize; 2];
const _: () =
    assert!(size_of::<Piece>() == size_of::<libc::iovec>() && align_of::<Piece>() == align_of::<libc::iovec>());

/// What `completion` tells.
#[derive(Debug)]
pub enum Completion {
    /// The request in this slot is done: all its bytes, or the reason why not. `UnexpectedEof` for a read past the file's end,
    /// `WriteZero` for a write of which nothing more is taken.
    Done { slot: usize, result: io::Result<()> },
    /// A watched descriptor became readable. When the watch has ended by itself, it must be set up again.
    Readable { watch: u32, ended: bool },
}

/// A span is not RAM, or a request has more pieces than a slot can hold.
#[derive(Debug)]
pub struct BadRequest;

/// A ring for one file. Made by any thread; from `enable` on it belongs to the thread that called that.
pub struct Ring {
    ring: IoUring,
    /// Not registered with the ring: the kernel takes a ring apart some time after its process has ended, and a registered file would keep
    /// its lock until then.
    file: File,
    enabled: bool,
    /// The kernel can tell waiting for a watch from waiting for the disk (6.15). Where it cannot, every idle disk would count as a
    /// processor that waits for I/O, also in `/proc/pressure/io`.
    sleeps_idle: bool,
    slots: Vec<Slot>,
    /// `PIECES_MAX` for each slot. Zeroes cost no memory until they are used.
    pieces: Vec<Piece>,
    /// Slots without a request; the one used last is taken first, as its memory is warm.
    free: Vec<usize>,
    /// A bit for each watch that is set up.
    watches: u32,
    /// The last wait for several completions found fewer: the file is slow, and the next one is waited for alone.
    slow: bool,
}

struct Slot {
    operation: Operation,
    /// Holds the memory that the kernel moves bytes of.
    ram: Option<GuestRam>,
    /// What is left to do: pieces from `first` on, the place in the file, bytes.
    first: usize,
    count: usize,
    at: u64,
    left: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
    Flush,
}

impl Ring {
    /// Fails where the host's kernel has no `io_uring`, forbids it, or is older than 6.1.
    ///
    /// `requests_max`: how many may be in flight at once.
    pub fn new(file: &File, requests_max: usize) -> io::Result<Ring> {
        // Deferred work: completions are made ready by the thread that waits for them, which the kernel need not interrupt.
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build((requests_max as u32 + 2 * WATCHES_MAX).next_power_of_two())?;
        let slot = |_| Slot { operation: Operation::Flush, ram: None, first: 0, count: 0, at: 0, left: 0 };
        Ok(Ring {
            sleeps_idle: ring.params().is_feature_no_iowait(),
            ring,
            file: file.try_clone()?,
            enabled: false,
            slots: (0..requests_max).map(slot).collect(),
            pieces: vec![[0; 2]; requests_max * PIECES_MAX],
            free: (0..requests_max).rev().collect(),
            watches: 0,
            slow: false,
        })
    }

    /// The thread that calls this first is the only one that may use the ring from then on.
    pub fn enable(&mut self) {
        if !mem::replace(&mut self.enabled, true) {
            self.ring.submitter().register_enable_rings().expect("a new ring can be enabled once");
        }
    }

    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another request can begin.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Begins to fill the spans, at least one byte, in order, from `at` in the file. Gives the slot, which `completion` names when the
    /// request is done. Call it while `has_room`.
    pub fn read(&mut self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<usize, BadRequest> {
        self.begin(Operation::Read, ram, at, into)
    }

    /// The same the other way: writes the spans, in order, at `at`.
    pub fn write(&mut self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<usize, BadRequest> {
        self.begin(Operation::Write, ram, at, from)
    }

    /// Begins to make durable what was written before.
    pub fn flush(&mut self, ram: &GuestRam) -> Result<usize, BadRequest> {
        self.begin(Operation::Flush, ram, 0, &[])
    }

    fn begin(&mut self, operation: Operation, ram: &GuestRam, at: u64, spans: &[RamSpan]) -> Result<usize, BadRequest> {
        let index = *self.free.last().ok_or(BadRequest)?;
        let first = index * PIECES_MAX;
        let pieces = &mut self.pieces[first..first + PIECES_MAX];
        let (mut count, mut left) = (0, 0);
        for span in spans {
            ram.host_pieces(*span, |address, bytes| {
                if let Some(piece) = pieces.get_mut(count) {
                    *piece = [address as usize, bytes];
                }
                (count, left) = (count + 1, left + bytes as u64);
            })
            .map_err(|_| BadRequest)?;
            if count > PIECES_MAX {
                return Err(BadRequest);
            }
        }
        self.free.pop();
        self.slots[index] = Slot { operation, ram: Some(ram.clone()), first, count, at, left };
        self.queue(index);
        Ok(index)
    }

    /// Queues what is left of a slot's request.
    fn queue(&mut self, index: usize) {
        let file = types::Fd(self.file.as_raw_fd());
        let slot = &self.slots[index];
        let pieces = &self.pieces[slot.first..slot.first + slot.count];
        let (many, count) = (pieces.as_ptr().cast::<libc::iovec>(), slot.count as u32);
        let entry = match (slot.operation, pieces) {
            (Operation::Flush, _) => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            // One piece is worth its own operation: the kernel has no list to fetch.
            (Operation::Read, [[address, bytes]]) => {
                opcode::Read::new(file, *address as *mut u8, *bytes as u32).offset(slot.at).build()
            }
            (Operation::Write, [[address, bytes]]) => {
                opcode::Write::new(file, *address as *const u8, *bytes as u32).offset(slot.at).build()
            }
            (Operation::Read, _) => opcode::Readv::new(file, many, count).offset(slot.at).build(),
            (Operation::Write, _) => opcode::Writev::new(file, many, count).offset(slot.at).build(),
        };
        self.push(entry.user_data(index as u64));
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: what the entry names stays until it completes: the slot's pieces are not moved or changed while it is not
        // free, and each lies in the RAM that the slot holds (`host_pieces` checked it). The guest may change those bytes at any
        // time, and nothing here reads them as Rust values. Entries of other operations name no memory.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has an entry for every slot and two for every watch");
    }

    /// From now on `completion` tells when `source` becomes readable: at once if it is, and after that each time it is signalled. It need
    /// not be read. `watch` is a number below 32 that is not in use; `source` stays open until `unwatch`.
    pub fn watch(&mut self, watch: u32, source: &impl AsFd) {
        assert!(watch < WATCHES_MAX && self.watches & 1 << watch == 0, "each watch has a number of its own");
        self.watches |= 1 << watch;
        let source = types::Fd(source.as_fd().as_raw_fd());
        let entry = opcode::PollAdd::new(source, libc::POLLIN as u32).multi(true).build();
        self.push(entry.user_data(WATCHES + u64::from(watch)));
    }

    /// Ends all watches, and returns when they have ended. Call it when nothing is in flight.
    pub fn unwatch(&mut self) {
        assert_eq!(self.in_flight(), 0, "completions would be lost");
        let watches = self.watches;
        for watch in (0..WATCHES_MAX).filter(|watch| watches & 1 << watch != 0) {
            // `PollRemove` would refuse a watch that was signalled just now, and leave it.
            let entry = opcode::AsyncCancel::new(WATCHES + u64::from(watch)).build();
            self.push(entry.user_data(UNNAMED));
        }
        while self.watches != 0 {
            self.wait(None);
            while self.completion().is_some() {}
        }
    }

    /// Submits what was begun without waiting for it.
    pub fn submit(&mut self) {
        if !self.ring.submission().is_empty() {
            tolerate(self.ring.submit());
        }
    }

    /// Submits what was begun and waits until `completion` has something, at most for `timeout`. While many are in flight a few are waited
    /// for, a millisecond at most. May return for nothing.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        let idle = self.in_flight() == 0;
        if idle && !self.sleeps_idle {
            return self.wait_outside(timeout);
        }
        let wanted = if mem::take(&mut self.slow) { 1 } else { (self.in_flight() / IN_FLIGHT_PER_COMPLETION).max(1) };
        let timeout =
            if wanted == 1 { timeout } else { Some(timeout.map_or(BATCH_WAIT, |timeout| timeout.min(BATCH_WAIT))) };
        let timeout = timeout.map(types::Timespec::from);
        let args =
            timeout.as_ref().map_or(types::SubmitArgs::new(), |timeout| types::SubmitArgs::new().timespec(timeout));
        let mut flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        flags.set(EnterFlags::NO_IOWAIT, idle);
        let queued = self.ring.submission().len() as u32;
        // SAFETY: as many entries as are queued, and arguments that live until the call returns; `push` said why the entries are sound.
        tolerate(unsafe { self.ring.submitter().enter(queued, wanted as u32, flags.bits(), Some(&args)) });
        self.slow = self.ring.completion().len() < wanted;
    }

    /// Sleeps beside the ring instead of in it.
    fn wait_outside(&mut self, timeout: Option<Duration>) {
        self.submit();
        if self.ring.completion().is_empty() {
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            let found = poll(&mut [PollFd::new(&self.ring, PollFlags::IN)], timeout.as_ref());
            if found.is_ok_and(|found| found > 0) {
                let zero = types::Timespec::new();
                tolerate(self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&zero)));
            }
        }
    }

    /// What `wait` found, one after the other; `None` when there is no more.
    pub fn completion(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            let name = entry.user_data();
            if name == UNNAMED {
                continue;
            }
            if let Some(watch) = name.checked_sub(WATCHES) {
                let (watch, ended) = (watch as u32, !cqueue::more(entry.flags()));
                if ended {
                    self.watches &= !(1 << watch);
                }
                return Some(Completion::Readable { watch, ended });
            }
            let slot = name as usize;
            if let Some(result) = self.advance(slot, entry.result()) {
                self.slots[slot].ram = None;
                self.free.push(slot);
                return Some(Completion::Done { slot, result });
            }
        }
    }

    /// Takes what the kernel said of a request. `None` when it is not done: the rest is queued.
    fn advance(&mut self, index: usize, said: i32) -> Option<io::Result<()>> {
        let slot = &mut self.slots[index];
        let Ok(mut moved) = usize::try_from(said) else {
            if said != -libc::EINTR {
                return Some(Err(io::Error::from_raw_os_error(-said)));
            }
            self.queue(index);
            return None;
        };
        slot.left = slot.left.saturating_sub(moved as u64);
        if slot.left == 0 {
            return Some(Ok(()));
        }
        if moved == 0 {
            let read = slot.operation == Operation::Read;
            let kind = if read { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WriteZero };
            return Some(Err(kind.into()));
        }
        slot.at += moved as u64;
        for [address, bytes] in &mut self.pieces[slot.first..slot.first + slot.count] {
            if moved < *bytes {
                (*address, *bytes) = (*address + moved, *bytes - moved);
                break;
            }
            moved -= *bytes;
            (slot.first, slot.count) = (slot.first + 1, slot.count - 1);
        }
        self.queue(index);
        None
    }
}

/// A call that was interrupted, had its time or found the host short of memory is made again by whoever waits.
fn tolerate(entered: io::Result<usize>) {
    let Err(error) = entered else { return };
    match error.raw_os_error() {
        Some(libc::EINTR | libc::ETIME) => {}
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => thread::sleep(SHORTAGE_WAIT),
        _ => panic!("io_uring_enter fails only for our mistakes: {error}"),
    }
}

impl Drop for Ring {
    /// The kernel may go on with what is in flight after the ring is closed: that memory is never freed.
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            mem::forget(mem::take(&mut self.pieces));
            mem::forget(mem::take(&mut self.slots));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{
            fd::OwnedFd,
            unix::{fs::FileExt, net::UnixStream},
        },
        time::Instant,
    };

    use super::*;
    use crate::engine::{event::Event, memory::Gpa};

    /// `None` where the host has no io_uring.
    fn ring(file: &File, requests_max: usize) -> Option<Ring> {
        match Ring::new(file, requests_max) {
            Ok(mut ring) => {
                ring.enable();
                Some(ring)
            }
            Err(error) => {
                println!("skipped: io_uring: {error}");
                None
            }
        }
    }

    fn span(at: u64, bytes: u32) -> RamSpan {
        RamSpan { at: Gpa(at), bytes }
    }

    /// Waits for the next completion of a request.
    fn done(ring: &mut Ring) -> (usize, io::Result<()>) {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            match ring.completion() {
                Some(Completion::Done { slot, result }) => return (slot, result),
                Some(Completion::Readable { .. }) => {}
                None => ring.wait(Some(Duration::from_secs(1))),
            }
        }
        panic!("no completion");
    }

    #[test]
    fn spans_are_written_flushed_and_read_back_scattered() {
        let file = tempfile::tempfile().unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let Some(mut ring) = ring(&file, 4) else { return };
        ram.write(Gpa(0x1000), b"abcdefgh").unwrap();
        for (spans, at) in [(vec![span(0x1000, 8)], 0), (vec![span(0x1004, 4), span(0x1000, 2)], 8)] {
            ring.write(&ram, at, &spans).unwrap();
            done(&mut ring).1.unwrap();
        }
        ring.flush(&ram).unwrap();
        done(&mut ring).1.unwrap();
        let slot = ring.read(&ram, 2, &[span(0x2000, 5), span(0x20_0000, 6)]).unwrap();
        let (seen, result) = done(&mut ring);
        result.unwrap();
        assert_eq!((seen, ring.in_flight()), (slot, 0));
        let mut bytes = [0; 6];
        ram.read(Gpa(0x20_0000), &mut bytes).unwrap();
        assert_eq!(&bytes, b"hefgha");
        ring.read(&ram, 10, &[span(0x3000, 8)]).unwrap();
        assert_eq!(done(&mut ring).1.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut bytes = [0; 4];
        ram.read(Gpa(0x3000), &mut bytes).unwrap();
        assert_eq!(&bytes, b"ghab", "what is there was read");
    }

    #[test]
    fn what_is_no_ram_or_has_too_many_pieces_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let Some(mut ring) = ring(&file, 1) else { return };
        for spans in [vec![span(0xa_0000, 1)], vec![span(u64::MAX, 2)], vec![span(0, 1); PIECES_MAX + 1]] {
            assert!(ring.write(&ram, 0, &spans).is_err());
            assert!(ring.has_room());
        }
        ring.write(&ram, 0, &vec![span(0, 1); PIECES_MAX]).unwrap();
        assert!(ring.write(&ram, 0, &[span(0, 1)]).is_err(), "no slot is free");
        done(&mut ring).1.unwrap();
        assert_eq!(file.metadata().unwrap().len(), PIECES_MAX as u64);
    }

    #[test]
    fn requests_complete_in_any_order_and_short_ones_are_continued() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let Some(mut ring) = ring(&File::from(OwnedFd::from(ours)), 4) else { return };
        let read = ring.read(&ram, 0, &[span(0x1000, 4)]).unwrap();
        let write = ring.write(&ram, 0, &[span(0x2000, 4)]).unwrap();
        assert_eq!(done(&mut ring).0, write, "the read waits");
        theirs.read_exact(&mut [0; 4]).unwrap();
        theirs.write_all(b"abcd").unwrap();
        assert_eq!(done(&mut ring).0, read);
        // A large file is never short; a file that ends within a span continues and then ends.
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 100], 0).unwrap();
        let mut ring = super::Ring::new(&file, 1).unwrap();
        ring.enable();
        ring.read(&ram, 0, &[span(0x1000, 60), span(0x2000, 60)]).unwrap();
        assert_eq!(done(&mut ring).1.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn one_of_many_is_told_of_while_the_others_wait() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let Some(mut ring) = ring(&File::from(OwnedFd::from(ours)), 64) else { return };
        for slot in 0..64 {
            ring.read(&ram, 0, &[span(0x1000 + slot * 16, 4)]).unwrap();
        }
        for left in (0..64).rev() {
            theirs.write_all(b"abcd").unwrap();
            let before = Instant::now();
            done(&mut ring).1.unwrap();
            assert!(before.elapsed() < Duration::from_millis(500), "{left} others are in flight");
            assert_eq!(ring.in_flight(), left);
        }
    }

    #[test]
    fn watches_tell_each_signal_and_end() {
        let file = tempfile::tempfile().unwrap();
        let Some(mut ring) = ring(&file, 1) else { return };
        let (first, second) = (Event::new().unwrap(), Event::new().unwrap());
        let sleeps_idle = ring.sleeps_idle;
        for round in 0..100 {
            ring.sleeps_idle = sleeps_idle && round % 2 == 0;
            ring.watch(0, &first);
            ring.watch(31, &second);
            for (number, event) in [(31, &second), (0, &first), (31, &second)] {
                ring.wait(Some(Duration::ZERO));
                while ring.completion().is_some() {}
                event.signal();
                let mut told = Vec::new();
                while told.is_empty() {
                    ring.wait(None);
                    while let Some(completion) = ring.completion() {
                        match completion {
                            Completion::Readable { watch, ended: false } => told.push(watch),
                            other => panic!("{other:?}"),
                        }
                    }
                }
                assert_eq!(told, [number]);
            }
            // A watch that was signalled and not yet told of ends too.
            first.signal();
            ring.unwatch();
        }
        let before = Instant::now();
        first.signal();
        ring.wait(Some(Duration::from_millis(20)));
        assert!(ring.completion().is_none() && before.elapsed() >= Duration::from_millis(20), "nobody watches");
    }
}
