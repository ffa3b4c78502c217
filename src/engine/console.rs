//! The serial console: a bounded scrollback with absolute offsets, and viewers that are only cursors into it.
//!
//! Every byte the guest printed has an offset, counted from the engine's start. Replay and follow are the same read, so no
//! byte is lost or doubled between them. No viewer has a queue, so none can hold the guest back; a slow one is told how many
//! bytes it skipped.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    saved::{BadState, State},
    uart::SerialSink,
};

/// Kept through resets, with a mark.
pub const SCROLLBACK_BYTES: usize = 1 << 20;
/// Marks kept; older ones are of bytes long gone.
const MARKS_MAX: usize = 64;
const KIND: &str = "scrollback";
const VIEWERS_MAX: usize = 16;
const CHUNK_BYTES: usize = 64 << 10;
/// A viewer that follows reads at most this often: a byte at a time would cost a wake-up each.
const GATHER: Duration = Duration::from_millis(4);

/// A piece of the scrollback, or a note about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// `from` is the offset of the first byte; `skipped` bytes before it were gone already.
    Bytes {
        from: u64,
        bytes: Vec<u8>,
        skipped: u64,
    },
    /// The guest was reset here.
    Reset {
        at: u64,
    },
    Closed,
}

/// The ring. `end` never decreases.
struct Log {
    ring: VecDeque<u8>,
    keep: usize,
    end: u64,
    resets: VecDeque<u64>,
    closed: bool,
    /// Viewers over the socket.
    followers: usize,
}

impl Log {
    fn start(&self) -> u64 {
        self.end - self.ring.len() as u64
    }
}

/// Where a viewer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub offset: u64,
    /// Resets at or before this offset have been told, and how many of them at exactly it.
    resets_told: u64,
}

/// The hub between UART and viewers.
pub struct ConsoleHub {
    log: Mutex<Log>,
    grew: Condvar,
    waiting: AtomicUsize,
    resets_ever: Mutex<u64>,
}

impl ConsoleHub {
    /// `keep`: bytes of scrollback, reserved as they come.
    pub fn new(keep: usize) -> Arc<ConsoleHub> {
        let log = Log { ring: VecDeque::new(), keep, end: 0, resets: VecDeque::new(), closed: false, followers: 0 };
        Arc::new(ConsoleHub {
            log: Mutex::new(log),
            grew: Condvar::new(),
            waiting: AtomicUsize::new(0),
            resets_ever: Mutex::new(0),
        })
    }

    /// Bytes from the guest.
    pub fn push(&self, bytes: &[u8]) {
        let mut log = self.lock();
        log.end += bytes.len() as u64;
        let bytes = bytes.get(bytes.len().saturating_sub(log.keep)..).unwrap_or_default();
        let excess = (log.ring.len() + bytes.len()).saturating_sub(log.keep);
        log.ring.drain(..excess);
        log.ring.extend(bytes);
        drop(log);
        self.wake();
    }

    /// The guest was reset.
    pub fn mark_reset(&self) {
        let mut log = self.lock();
        let end = log.end;
        log.resets.push_back(end);
        if log.resets.len() > MARKS_MAX {
            log.resets.pop_front();
        }
        *self.resets_ever.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        drop(log);
        self.wake();
    }

    /// How many bytes the guest has printed.
    pub fn end(&self) -> u64 {
        self.lock().end
    }

    /// Everything that is kept, oldest first.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().ring.iter().copied().collect()
    }

    /// What is kept, for a saved state: plain bytes.
    pub fn save(&self) -> State {
        State { kind: KIND.into(), version: 1, bytes: self.contents() }
    }

    /// Into an empty hub: what was printed before the guest was suspended.
    pub fn restore(&self, state: &State) -> Result<(), BadState> {
        BadState::unless(state.kind == KIND && state.version == 1, KIND, "this is another state")?;
        self.push(&state.bytes);
        Ok(())
    }

    /// No more will come; every viewer is told.
    pub fn close(&self) {
        self.lock().closed = true;
        self.grew.notify_all();
    }

    /// After `close`: waits until every viewer has read the last words and left, at most `patience`.
    pub fn wait_read(&self, patience: Duration) {
        let waited = self.grew.wait_timeout_while(self.lock(), patience, |log| log.followers > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A cursor at `from`, or at the oldest byte kept.
    pub fn cursor(&self, from: Option<u64>) -> Cursor {
        let log = self.lock();
        let offset = from.unwrap_or_else(|| log.start()).min(log.end);
        let before = log.resets.iter().filter(|at| **at < offset).count() as u64;
        let ever = *self.resets_ever.lock().unwrap_or_else(PoisonError::into_inner);
        let forgotten = ever - log.resets.len() as u64;
        Cursor { offset, resets_told: forgotten + before }
    }

    /// What comes next for this cursor; waits for it. `None` after `patience` without anything.
    pub fn next(&self, cursor: &mut Cursor, patience: Duration) -> Option<Chunk> {
        self.next_unless(&AtomicBool::new(false), cursor, patience)
    }

    /// As `next`, but nothing more once `gone` was set by `leave`.
    fn next_unless(&self, gone: &AtomicBool, cursor: &mut Cursor, patience: Duration) -> Option<Chunk> {
        let mut log = self.lock();
        loop {
            if gone.load(Ordering::Acquire) {
                return None;
            }
            if let Some(chunk) = self.take(&log, cursor) {
                return Some(chunk);
            }
            self.waiting.fetch_add(1, Ordering::AcqRel);
            let (again, timeout) = self.grew.wait_timeout(log, patience).unwrap_or_else(PoisonError::into_inner);
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            log = again;
            if timeout.timed_out() {
                return self.take(&log, cursor);
            }
        }
    }

    /// Sets `gone` and wakes who waits. Under the lock, so that nobody is between looking and waiting.
    fn leave(&self, gone: &AtomicBool) {
        let log = self.lock();
        gone.store(true, Ordering::Release);
        drop(log);
        self.grew.notify_all();
    }

    fn take(&self, log: &Log, cursor: &mut Cursor) -> Option<Chunk> {
        let ever = *self.resets_ever.lock().unwrap_or_else(PoisonError::into_inner);
        let forgotten = ever - log.resets.len() as u64;
        cursor.resets_told = cursor.resets_told.max(forgotten);
        let next_reset = log.resets.get((cursor.resets_told - forgotten) as usize).copied();
        if next_reset.is_some_and(|at| at <= cursor.offset) {
            cursor.resets_told += 1;
            return next_reset.map(|at| Chunk::Reset { at });
        }
        let from = cursor.offset.max(log.start());
        let skipped = from - cursor.offset;
        let stop = next_reset.unwrap_or(log.end).max(from).min(log.end);
        let length = usize::try_from(stop - from).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        if length == 0 && skipped == 0 {
            return log.closed.then_some(Chunk::Closed);
        }
        let begin = (from - log.start()) as usize;
        let bytes: Vec<u8> = log.ring.range(begin..begin + length).copied().collect();
        cursor.offset = from + length as u64;
        Some(Chunk::Bytes { from, bytes, skipped })
    }

    fn wake(&self) {
        // A futex call for each byte would cost more than the byte.
        if self.waiting.load(Ordering::Acquire) > 0 {
            self.grew.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SerialSink for ConsoleHub {
    fn guest_wrote(&self, byte: u8) {
        self.push(&[byte]);
    }
}

// ---- viewers over the Unix socket ----

/// The first line a viewer sends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attach {
    /// The offset to start from; nothing for the oldest byte kept.
    pub from: Option<u64>,
}

/// Frames to a viewer: one byte of kind, `u32` little-endian length, payload.
pub const FRAME_BYTES: u8 = 0;
pub const FRAME_NOTE: u8 = 1;
const ATTACH_BYTES_MAX: u64 = 4096;
/// A viewer whose socket takes nothing for so long is gone; it can come back at its offset.
const STALLED: Duration = Duration::from_secs(60);

/// Takes what viewers type. Called by their threads; returns at once.
pub type Typed = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// Serves viewers until the listener's thread ends with the process. `input` takes what they type.
pub fn serve(listener: UnixListener, hub: Arc<ConsoleHub>, input: Typed) -> io::Result<()> {
    let viewers = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("serial".into()).stack_size(STACK_BYTES).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if viewers.fetch_add(1, Ordering::AcqRel) >= VIEWERS_MAX {
                viewers.fetch_sub(1, Ordering::AcqRel);
                let _ = note(&stream, &serde_json::json!({"closed": "too many viewers of this console"}));
                continue;
            }
            let (hub, input, count) = (Arc::clone(&hub), Arc::clone(&input), Arc::clone(&viewers));
            let spawned = std::thread::Builder::new().name("viewer".into()).stack_size(STACK_BYTES).spawn(move || {
                // A viewer that leaves is not news.
                let _ = view(&stream, &hub, &input, STALLED);
                count.fetch_sub(1, Ordering::AcqRel);
            });
            if spawned.is_err() {
                viewers.fetch_sub(1, Ordering::AcqRel);
            }
        }
    })?;
    Ok(())
}

const STACK_BYTES: usize = 128 << 10;

/// Counts a viewer as long as it lives.
struct Follower<'a>(&'a ConsoleHub);

impl Follower<'_> {
    fn of(hub: &ConsoleHub) -> Follower<'_> {
        hub.lock().followers += 1;
        Follower(hub)
    }
}

impl Drop for Follower<'_> {
    fn drop(&mut self) {
        self.0.lock().followers -= 1;
        self.0.grew.notify_all();
    }
}

/// One viewer, until it leaves, the guest is off, or the viewer's socket takes nothing for `stalled`.
fn view(stream: &UnixStream, hub: &Arc<ConsoleHub>, input: &Typed, stalled: Duration) -> io::Result<()> {
    let _follower = Follower::of(hub);
    let served = attend(stream, hub, input, stalled);
    // The thread that reads has the socket as well: without this a viewer that was given up would wait for ever.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    served
}

/// A thread reads what is typed; this one writes.
fn attend(stream: &UnixStream, hub: &Arc<ConsoleHub>, input: &Typed, stalled: Duration) -> io::Result<()> {
    stream.set_write_timeout(Some(stalled))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.by_ref().take(ATTACH_BYTES_MAX).read_line(&mut line)?;
    let attach: Attach = serde_json::from_str(&line)?;
    let mut cursor = hub.cursor(attach.from);
    note(stream, &serde_json::json!({"offset": cursor.offset, "skipped": 0, "end": hub.end()}))?;
    let typed = Arc::clone(input);
    let gone = Arc::new(AtomicBool::new(false));
    let (left, waker) = (Arc::clone(&gone), Arc::clone(hub));
    std::thread::Builder::new().name("typist".into()).stack_size(STACK_BYTES).spawn(move || {
        let mut bytes = [0; 512];
        while let Ok(count @ 1..) = reader.read(&mut bytes) {
            typed(bytes.get(..count).unwrap_or_default());
        }
        waker.leave(&left);
    })?;
    let mut out = Vec::new();
    while !gone.load(Ordering::Acquire) {
        // The reader's end wakes us, so there is nothing to poll for.
        let Some(chunk) = hub.next_unless(&gone, &mut cursor, Duration::from_secs(3600)) else { continue };
        let end = chunk == Chunk::Closed;
        write_chunk(stream, chunk, &mut out)?;
        if end {
            break;
        }
        std::thread::sleep(GATHER);
    }
    Ok(())
}

fn write_chunk(stream: &UnixStream, chunk: Chunk, out: &mut Vec<u8>) -> io::Result<()> {
    match chunk {
        Chunk::Bytes { from, bytes, skipped } => {
            if skipped > 0 {
                note(stream, &serde_json::json!({"offset": from, "skipped": skipped}))?;
            }
            frame(stream, FRAME_BYTES, &bytes, out)
        }
        Chunk::Reset { at } => note(stream, &serde_json::json!({"reset": at})),
        Chunk::Closed => note(stream, &serde_json::json!({"closed": "the guest is off"})),
    }
}

fn note(stream: &UnixStream, note: &serde_json::Value) -> io::Result<()> {
    frame(stream, FRAME_NOTE, note.to_string().as_bytes(), &mut Vec::new())
}

fn frame(mut stream: &UnixStream, kind: u8, payload: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    out.clear();
    out.push(kind);
    out.extend(u32::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?.to_le_bytes());
    out.extend(payload);
    stream.write_all(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_millis(1);

    fn read_all(hub: &ConsoleHub, cursor: &mut Cursor) -> (Vec<u8>, u64, Vec<u64>) {
        let (mut seen, mut skipped, mut resets) = (Vec::new(), 0, Vec::new());
        while let Some(chunk) = hub.next(cursor, NOW) {
            match chunk {
                Chunk::Bytes { bytes, skipped: gone, .. } => {
                    seen.extend(bytes);
                    skipped += gone;
                }
                Chunk::Reset { at } => resets.push(at),
                Chunk::Closed => break,
            }
        }
        (seen, skipped, resets)
    }

    #[test]
    fn replay_and_follow_are_the_same_read() {
        let hub = ConsoleHub::new(16);
        hub.push(b"0123456789");
        let mut late = hub.cursor(None);
        let mut from = hub.cursor(Some(8));
        assert_eq!(read_all(&hub, &mut late), (b"0123456789".to_vec(), 0, vec![]));
        assert_eq!(read_all(&hub, &mut from).0, b"89");
        hub.push(b"abcdefghij");
        assert_eq!(read_all(&hub, &mut late).0, b"abcdefghij");
        let mut old = hub.cursor(Some(0));
        assert_eq!(read_all(&hub, &mut old), (b"456789abcdefghij".to_vec(), 4, vec![]));
        let mut future = hub.cursor(Some(1 << 40));
        assert_eq!(future.offset, 20);
        assert_eq!(hub.next(&mut future, NOW), None);
    }

    #[test]
    fn a_reset_is_told_once_and_in_its_place() {
        let hub = ConsoleHub::new(1 << 10);
        let mut early = hub.cursor(None);
        hub.push(b"before");
        hub.mark_reset();
        hub.push(b"after");
        let reset = Chunk::Reset { at: 6 };
        assert_eq!(hub.next(&mut early, NOW).unwrap(), Chunk::Bytes { from: 0, bytes: b"before".to_vec(), skipped: 0 });
        assert_eq!(hub.next(&mut early, NOW).unwrap(), reset);
        assert_eq!(hub.next(&mut early, NOW).unwrap(), Chunk::Bytes { from: 6, bytes: b"after".to_vec(), skipped: 0 });
        let mut late = hub.cursor(None);
        assert_eq!(read_all(&hub, &mut late).2, [6]);
        hub.close();
        assert_eq!(hub.next(&mut late, NOW), Some(Chunk::Closed));
        for _ in 0..3 * MARKS_MAX {
            hub.mark_reset();
        }
        assert_eq!(read_all(&hub, &mut early).2.len(), MARKS_MAX);
    }

    #[test]
    fn a_hundred_megabytes_pass_complete_and_in_order_to_a_viewer_that_reads() {
        const TOTAL: u64 = 100 << 20;
        let hub = ConsoleHub::new(SCROLLBACK_BYTES);
        let writer = Arc::clone(&hub);
        let mut cursor = hub.cursor(None);
        let progress = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let read_so_far = Arc::clone(&progress);
        let thread = std::thread::spawn(move || {
            let mut block = vec![0u8; 4096];
            let mut at = 0u64;
            while at < TOTAL {
                // Never further ahead than the ring: this viewer is meant to keep up.
                while at - read_so_far.load(Ordering::Acquire) > (SCROLLBACK_BYTES / 2) as u64 {
                    std::thread::yield_now();
                }
                for (index, byte) in block.iter_mut().enumerate() {
                    *byte = ((at + index as u64) % 251) as u8;
                }
                writer.push(&block);
                at += block.len() as u64;
            }
            writer.close();
        });
        let mut expected = 0u64;
        loop {
            match hub.next(&mut cursor, Duration::from_secs(10)).expect("the writer goes on") {
                Chunk::Bytes { from, bytes, skipped } => {
                    assert_eq!((from, skipped), (expected, 0));
                    for byte in bytes {
                        assert_eq!(u64::from(byte), expected % 251);
                        expected += 1;
                    }
                    progress.store(expected, Ordering::Release);
                }
                Chunk::Closed => break,
                Chunk::Reset { .. } => panic!("nobody reset"),
            }
        }
        thread.join().unwrap();
        assert_eq!(expected, TOTAL);
    }

    #[test]
    fn a_stalled_viewer_learns_the_exact_count_and_nobody_waits() {
        let hub = ConsoleHub::new(SCROLLBACK_BYTES);
        let mut stalled = hub.cursor(None);
        for _ in 0..(100 << 20) / 4096 {
            hub.push(&[b'x'; 4096]);
        }
        let (seen, skipped, _) = read_all(&hub, &mut stalled);
        assert_eq!(seen.len(), SCROLLBACK_BYTES);
        assert_eq!(skipped, (100 << 20) - SCROLLBACK_BYTES as u64);
        assert!(hub.lock().ring.capacity() <= 2 * SCROLLBACK_BYTES, "memory does not grow");
    }

    #[test]
    fn viewers_over_the_socket_type_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.sock");
        let hub = ConsoleHub::new(SCROLLBACK_BYTES);
        hub.push(b"hello");
        let typed: Arc<Mutex<Vec<u8>>> = Arc::default();
        let sink = Arc::clone(&typed);
        let input = Arc::new(move |bytes: &[u8]| sink.lock().unwrap().extend(bytes));
        serve(UnixListener::bind(&path).unwrap(), Arc::clone(&hub), input).unwrap();
        let mut viewer = UnixStream::connect(&path).unwrap();
        viewer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        viewer.write_all(b"{\"from\":null}\nkeys").unwrap();
        let mut next = || {
            let mut head = [0; 5];
            viewer.read_exact(&mut head).unwrap();
            let mut payload = vec![0; u32::from_le_bytes(head[1..].try_into().unwrap()) as usize];
            viewer.read_exact(&mut payload).unwrap();
            (head[0], String::from_utf8(payload).unwrap())
        };
        assert_eq!(next(), (FRAME_NOTE, r#"{"end":5,"offset":0,"skipped":0}"#.into()));
        assert_eq!(next(), (FRAME_BYTES, "hello".into()));
        hub.mark_reset();
        assert_eq!(next(), (FRAME_NOTE, r#"{"reset":5}"#.into()));
        hub.close();
        assert_eq!(next(), (FRAME_NOTE, r#"{"closed":"the guest is off"}"#.into()));
        assert_eq!(*typed.lock().unwrap(), b"keys");
    }

    #[test]
    fn a_viewer_that_was_given_up_sees_the_end_of_its_connection() {
        let hub = ConsoleHub::new(SCROLLBACK_BYTES);
        hub.push(&[b'x'; SCROLLBACK_BYTES]);
        let (near, mut far) = UnixStream::pair().unwrap();
        far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        far.write_all(b"{\"from\":null}\n").unwrap();
        let input: Typed = Arc::new(|_: &[u8]| {});
        assert!(view(&near, &hub, &input, Duration::from_millis(50)).is_err(), "it does not read");
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).unwrap();
        assert!(rest.len() < SCROLLBACK_BYTES, "what was on its way, and then the end");
    }

    #[test]
    fn the_end_waits_for_viewers_that_read_and_not_for_others() {
        let hub = ConsoleHub::new(SCROLLBACK_BYTES);
        hub.wait_read(Duration::from_secs(60));
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"{\"from\":null}\n").unwrap();
        let viewing = std::thread::spawn({
            let (hub, input) = (Arc::clone(&hub), Arc::new(|_: &[u8]| {}) as Typed);
            move || view(&near, &hub, &input, STALLED)
        });
        let mut head = [0; 5];
        far.read_exact(&mut head).unwrap();
        hub.push(&[b'x'; SCROLLBACK_BYTES]);
        hub.close();
        hub.wait_read(Duration::from_millis(20)); // it does not read: the guest ends all the same
        let reading = std::thread::spawn(move || {
            let mut rest = Vec::new();
            far.read_to_end(&mut rest).map(|_| rest)
        });
        hub.wait_read(Duration::from_secs(60));
        let rest = reading.join().unwrap().unwrap();
        assert!(rest.len() > SCROLLBACK_BYTES && rest.ends_with(br#"{"closed":"the guest is off"}"#));
        viewing.join().unwrap().unwrap();
    }
}
