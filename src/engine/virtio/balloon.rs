//! virtio-balloon (virtio 1.2, 5.5): the guest gives memory back to the host, as much as it is asked for, and what it does not use.
//!
//! Pages go back by `GuestRam::discard`. One that the guest touches again is simply there, full of zeros, so nothing is kept
//! about which pages are in the balloon, and nothing is to be done when it deflates.

use std::{
    array, io, mem, slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use super::{
    Features, Interrupts, Kind, Running, VirtioDevice, Worker,
    queue::{Chain, Malformed, VirtQueue},
};
use crate::engine::{
    event::Event,
    memory::{Gpa, GuestRam, OutsideRam, RamSpan},
    saved::{BadState, SaveState, State as SavedState},
    timer::Clock,
    worker::{Served, Stop, Work},
};

const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
/// The driver says what it fills free pages with. A Linux that fills them and cannot say so does not report them.
const F_PAGE_POISON: u32 = 4;
const F_PAGE_REPORTING: u32 = 5;

/// All as large as Linux may want them: it reports free memory in requests of 32 buffers.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// Balloon pages, whatever the guest's own are (5.5.6).
const PAGE_BYTES: u64 = 4096;
/// Page numbers of a request beyond these stay with the guest. Drivers send 256 at most, or 1024.
const NUMBERS_MAX: u64 = 4096;
/// Page numbers that are copied and put into order at a time.
const PIECE_NUMBERS: usize = 256;
const PIECE_BYTES: usize = 4 * PIECE_NUMBERS;

/// A statistic is a tag of 16 bits and a value of 64 (5.5.6.3).
const STATISTIC_BYTES: usize = 10;
/// Of one buffer; the specification knows ten tags.
const STATISTICS_MAX: usize = 32;

/// Device configuration (5.5.4): pages wanted, pages given, a command of the hints that are not offered, the poison.
const CONFIG_BYTES: usize = 16;

/// The host's hold on the balloon. Clones are the same.
#[derive(Clone)]
pub struct BalloonControl(Arc<Shared>);

/// What the host knows of the balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// What the guest is asked to give up.
    pub target_bytes: u64,
    /// What the guest says it has given up; it may lie.
    pub actual_bytes: u64,
    /// What came last since the driver began.
    pub statistics: Option<Statistics>,
}

/// What the guest says of its memory (5.5.6.4). Systems leave out what they do not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// When it came, in milliseconds since 1970-01-01 UTC by the host's clock.
    pub at_unix_ms: u64,
    pub swapped_in_bytes: Option<u64>,
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed the disk, since the guest started.
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
    /// What programs could get without swapping.
    pub available_bytes: Option<u64>,
    /// Of files, and reclaimable at once.
    pub cached_bytes: Option<u64>,
    pub huge_page_allocations: Option<u64>,
    pub huge_page_failures: Option<u64>,
}

impl Statistics {
    fn by_tag(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swapped_in_bytes,
            1 => &mut self.swapped_out_bytes,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_bytes,
            5 => &mut self.total_bytes,
            6 => &mut self.available_bytes,
            7 => &mut self.cached_bytes,
            8 => &mut self.huge_page_allocations,
            9 => &mut self.huge_page_failures,
            _ => return None,
        })
    }
}

struct Shared {
    /// Taken for the configuration, a wish of the host and once a round of the worker, never for each request.
    state: Mutex<State>,
    /// The host wants something.
    wake: Event,
}

#[derive(Default)]
struct State {
    target_pages: u32,
    /// The target that the driver has had an interrupt for.
    told_pages: u32,
    actual_pages: u32,
    poison: u32,
    /// The host wants statistics that are newer.
    asked: bool,
    /// The driver's buffer for statistics, by its head. Giving it back asks the driver to fill it anew.
    held: Option<u16>,
    statistics: Option<Statistics>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BalloonControl {
    /// Asks the guest to keep `bytes` of its memory in the balloon, rounded down to pages; 0 gives everything back to it. The
    /// wish outlives a reset of the guest. A guest without a driver never hears of it.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        let before = mem::replace(&mut self.0.lock().target_pages, pages);
        if before == pages {
            return;
        }
        self.0.wake.signal();
    }

    /// Asks the guest for statistics. They appear in `status` when they have come, which may be never.
    pub fn ask_statistics(&self) {
        self.0.lock().asked = true;
        self.0.wake.signal();
    }

    pub fn status(&self) -> BalloonStatus {
        let state = self.0.lock();
        BalloonStatus {
            target_bytes: u64::from(state.target_pages) * PAGE_BYTES,
            actual_bytes: u64::from(state.actual_pages) * PAGE_BYTES,
            statistics: state.statistics,
        }
    }
}

pub struct Balloon {
    worker: Worker,
    shared: Arc<Shared>,
}

impl Balloon {
    /// `clock` reads nanoseconds since 1970.
    pub fn new(clock: Clock) -> io::Result<Balloon> {
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Event::new()? });
        let keep = Keep { shared: Arc::clone(&shared), clock, chain: Chain::default() };
        Ok(Balloon { worker: Worker::spawn("balloon", keep)?, shared })
    }

    pub fn control(&self) -> BalloonControl {
        BalloonControl(Arc::clone(&self.shared))
    }
}

impl State {
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let fields = [self.target_pages, self.actual_pages, 0, self.poison];
        for (into, field) in config.chunks_exact_mut(4).zip(fields) {
            into.copy_from_slice(&field.to_le_bytes());
        }
        config
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn offered(&self) -> Features {
        1 << F_STATS_VQ | 1 << F_DEFLATE_ON_OOM | 1 << F_PAGE_POISON | 1 << F_PAGE_REPORTING
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let config = self.shared.lock().config();
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let mut config = state.config();
        for (into, byte) in config.iter_mut().skip(offset).zip(bytes) {
            *into = *byte;
        }
        // What the driver writes into the host's fields is dropped.
        let [_, _, _, _, a0, a1, a2, a3, _, _, _, _, p0, p1, p2, p3] = config;
        state.actual_pages = u32::from_le_bytes([a0, a1, a2, a3]);
        state.poison = u32::from_le_bytes([p0, p1, p2, p3]);
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The specification (5.5.2) numbers the queues whatever is negotiated: 2 for statistics, 3 for hints, 4 for reports. Drivers
/// such as Linux's count only those whose features are negotiated. Hints are not offered, so both are understood.
fn role(index: usize, statistics: bool) -> Role {
    match index {
        0 => Role::Inflate,
        1 => Role::Deflate,
        2 if statistics => Role::Statistics,
        _ => Role::Reporting,
    }
}

struct Keep {
    shared: Arc<Shared>,
    clock: Clock,
    chain: Chain,
}

impl Work<Running> for Keep {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let statistics = running.has(F_STATS_VQ);
        let (reporting, poison) = (running.has(F_PAGE_REPORTING), running.has(F_PAGE_POISON));
        let Running { ram, queues, interrupts, .. } = running;
        loop {
            let mut more = false;
            for queue in queues.iter_mut() {
                let role = role(queue.index(), statistics);
                more |= match role {
                    Role::Statistics => self.statistics(ram, queue, interrupts, stop)?,
                    Role::Inflate => self.serve_queue(ram, queue, interrupts, stop, Keep::inflate)?,
                    // A page that is filled with something else than zeros must keep it (5.5.6.7).
                    Role::Reporting if reporting && !(poison && self.shared.lock().poison != 0) => {
                        self.serve_queue(ram, queue, interrupts, stop, Keep::give_back)?
                    }
                    Role::Deflate | Role::Reporting => self.serve_queue(ram, queue, interrupts, stop, |_, _| Ok(()))?,
                };
            }
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if self.target_is_news() {
                interrupts.config_changed();
            }
            if more {
                continue;
            }
            let wake = PollFd::new(&self.shared.wake, PollFlags::IN);
            let fds: [PollFd<'_>; QUEUE_SIZES.len() + 1] =
                array::from_fn(|index| queues.get(index).map_or_else(|| wake.clone(), VirtQueue::kicked));
            if !stop.wait(&fds) {
                return Ok(Served::Stopped);
            }
            self.shared.wake.clear();
            for queue in queues.iter() {
                queue.kick.clear();
            }
        }
    }

    fn forget(&mut self) {
        let mut state = self.shared.lock();
        *state = State { target_pages: state.target_pages, ..State::default() };
    }
}

impl Keep {
    /// Serves what waits in a queue whose requests end at once. True when more came meanwhile.
    fn serve_queue(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
        request: impl Fn(&Chain, &GuestRam) -> Result<(), OutsideRam>,
    ) -> Result<bool, Malformed> {
        while !stop.asked() && queue.pop(ram, &mut self.chain)? {
            request(&self.chain, ram).map_err(|_| Malformed)?;
            queue.push(ram, self.chain.head, 0, interrupts)?;
        }
        queue.enable_kicks(ram)
    }

    /// The guest has put pages into the balloon: a list of their numbers (5.5.6.1).
    ///
    /// Numbers that are not RAM are nobody's pages. A page that cannot be given back costs the host memory and the guest nothing.
    fn inflate(chain: &Chain, ram: &GuestRam) -> Result<(), OutsideRam> {
        let (mut raw, mut numbers) = ([0; PIECE_BYTES], [0u32; PIECE_NUMBERS]);
        let end = (chain.readable_bytes() / 4).min(NUMBERS_MAX) * 4;
        for at in (0..end).step_by(PIECE_BYTES) {
            let bytes = (end - at).min(PIECE_BYTES as u64) as usize;
            chain.read(ram, at, raw.get_mut(..bytes).unwrap_or_default())?;
            for (number, bytes) in numbers.iter_mut().zip(raw.as_chunks().0) {
                *number = u32::from_le_bytes(*bytes);
            }
            let numbers = numbers.get_mut(..bytes / 4).unwrap_or_default();
            // Neighbours go back in one call, and a page that is named again and again goes back once.
            numbers.sort_unstable();
            for run in numbers.chunk_by(|one, next| next - one <= 1) {
                let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
                let bytes = (last - first + 1) * PAGE_BYTES as u32;
                let _ = ram.discard(RamSpan { at: Gpa(u64::from(*first) * PAGE_BYTES), bytes });
            }
        }
        Ok(())
    }

    /// The guest tells of memory that is free now (5.5.6.7); it waits for the answer before it uses it again.
    fn give_back(chain: &Chain, ram: &GuestRam) -> Result<(), OutsideRam> {
        for span in &chain.writable {
            let _ = ram.discard(*span);
        }
        Ok(())
    }

    /// Takes statistics that came, and asks for others if the host wants some.
    fn statistics(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        while !stop.asked() && queue.pop(ram, &mut self.chain)? {
            let came = self.read_statistics(ram).map_err(|_| Malformed)?;
            let mut state = self.shared.lock();
            state.statistics = Some(came);
            let before = state.held.replace(self.chain.head);
            drop(state);
            // Drivers have one buffer for this; of several, the older ones go back.
            if let Some(head) = before {
                queue.push(ram, head, 0, interrupts)?;
            }
        }
        let mut state = self.shared.lock();
        if state.asked
            && let Some(head) = state.held.take()
        {
            state.asked = false;
            drop(state);
            queue.push(ram, head, 0, interrupts)?;
        }
        queue.enable_kicks(ram)
    }

    fn read_statistics(&self, ram: &GuestRam) -> Result<Statistics, OutsideRam> {
        let mut raw = [0; STATISTIC_BYTES * STATISTICS_MAX];
        let bytes = self.chain.readable_bytes().min(raw.len() as u64) as usize;
        let raw = raw.get_mut(..bytes).unwrap_or_default();
        self.chain.read(ram, 0, raw)?;
        let mut found = Statistics { at_unix_ms: self.clock.now_ns() / 1_000_000, ..Statistics::default() };
        for [t0, t1, value @ ..] in raw.as_chunks::<STATISTIC_BYTES>().0 {
            if let Some(field) = found.by_tag(u16::from_le_bytes([*t0, *t1])) {
                *field = Some(u64::from_le_bytes(*value));
            }
        }
        Ok(found)
    }

    /// Whether the target is another than the driver knows; it knows this one from now on.
    fn target_is_news(&self) -> bool {
        let mut state = self.shared.lock();
        let news = state.told_pages != state.target_pages;
        state.told_pages = state.target_pages;
        news
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "virtio-balloon";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) target_pages: u32,
        pub(super) told_pages: u32,
        pub(super) actual_pages: u32,
        pub(super) poison: u32,
        pub(super) asked: bool,
        pub(super) held: Option<u16>,
    }
}

impl SaveState for Balloon {
    fn save(&self) -> SavedState {
        let state = self.shared.lock();
        // The host asks for statistics again when it wants to know.
        let State { target_pages, told_pages, actual_pages, poison, asked, held, statistics: _ } = &*state;
        let fields = saved::V1 {
            target_pages: *target_pages,
            told_pages: *told_pages,
            actual_pages: *actual_pages,
            poison: *poison,
            asked: *asked,
            held: *held,
        };
        SavedState::new(saved::KIND, 1, &fields)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), BadState> {
        let saved::V1 { target_pages, told_pages, actual_pages, poison, asked, held } = state.fields(saved::KIND, 1)?;
        let in_ring = held.is_none_or(|head| QUEUE_SIZES.iter().all(|size| head < *size));
        BadState::unless(in_ring, saved::KIND, "the buffer for statistics is in no queue")?;
        let statistics = None;
        *self.shared.lock() = State { target_pages, told_pages, actual_pages, poison, asked, held, statistics };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
