//! Doorbells (NVM Express 1.4, sections 3.1.16 and 3.1.17): what vCPUs tell the worker, without a lock.
//!
//! The worker says which queues there are and how large; a doorbell of no queue and a value that the queue does not have are
//! refused here and only counted as an event. So what the worker reads lies in its queue, always.

use std::{
    array, io,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
};

use super::{
    super::{event::Event, saved::BadState},
    QUEUES,
    saved::{DoorbellV1, DoorbellsV1, check},
};

/// What a driver did wrong with doorbells: bits of `take_mistakes`.
pub(super) const NO_SUCH_DOORBELL: u8 = 1;
pub(super) const BAD_VALUE: u8 = 2;

pub(super) struct Doorbells {
    tails: [Doorbell; QUEUES],
    heads: [Doorbell; QUEUES],
    mistakes: AtomicU8,
    /// The worker sleeps, or is about to: whoever has news signals `kick`.
    asleep: AtomicBool,
    /// The worker waits for room in a completion queue.
    waits_for_room: AtomicBool,
    kick: Event,
}

#[derive(Default)]
struct Doorbell {
    value: AtomicU32,
    /// Entries of the queue; 0 while there is none.
    entries: AtomicU32,
}

impl Doorbell {
    fn open(&self, entries: u32) {
        self.value.store(0, Ordering::SeqCst);
        self.entries.store(entries, Ordering::SeqCst);
    }

    fn save(&self) -> DoorbellV1 {
        let Doorbell { value, entries } = self;
        DoorbellV1 { value: value.load(Ordering::SeqCst), entries: entries.load(Ordering::SeqCst) }
    }

    fn ring(&self, value: u32) -> Result<(), u8> {
        match self.entries.load(Ordering::SeqCst) {
            0 => Err(NO_SUCH_DOORBELL),
            entries if value >= entries => Err(BAD_VALUE),
            _ => {
                self.value.store(value, Ordering::SeqCst);
                Ok(())
            }
        }
    }
}

impl Doorbells {
    pub(super) fn new() -> io::Result<Doorbells> {
        Ok(Doorbells {
            tails: array::from_fn(|_| Doorbell::default()),
            heads: array::from_fn(|_| Doorbell::default()),
            mistakes: AtomicU8::new(0),
            asleep: AtomicBool::new(false),
            waits_for_room: AtomicBool::new(false),
            kick: Event::new()?,
        })
    }

    /// A vCPU wrote the doorbell of a submission queue.
    pub(super) fn ring_tail(&self, queue: usize, value: u32) {
        match ring(&self.tails, queue, value) {
            Ok(()) => self.wake(),
            Err(mistake) => self.note(mistake),
        }
    }

    /// A vCPU wrote the doorbell of a completion queue; false when it is refused.
    pub(super) fn ring_head(&self, queue: usize, value: u32) -> bool {
        match ring(&self.heads, queue, value) {
            Ok(()) => {
                if self.waits_for_room.load(Ordering::SeqCst) {
                    self.wake();
                }
                true
            }
            Err(mistake) => {
                self.note(mistake);
                false
            }
        }
    }

    /// The worker found that the driver consumed entries which were never there.
    pub(super) fn note_bad_value(&self) {
        self.mistakes.fetch_or(BAD_VALUE, Ordering::SeqCst);
    }

    /// There is something new for the worker.
    pub(super) fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.kick.signal();
        }
    }

    pub(super) fn tail(&self, queue: usize) -> u32 {
        self.tails.get(queue).map_or(0, |doorbell| doorbell.value.load(Ordering::SeqCst))
    }
    pub(super) fn head(&self, queue: usize) -> u32 {
        self.heads.get(queue).map_or(0, |doorbell| doorbell.value.load(Ordering::SeqCst))
    }
    pub(super) fn open_submission(&self, queue: usize, entries: u32) {
        if let Some(doorbell) = self.tails.get(queue) {
            doorbell.open(entries);
        }
    }
    pub(super) fn open_completion(&self, queue: usize, entries: u32) {
        if let Some(doorbell) = self.heads.get(queue) {
            doorbell.open(entries);
        }
    }

    /// What the driver did wrong since the last call.
    pub(super) fn take_mistakes(&self) -> u8 {
        // A plain load is enough nearly always, and keeps the line shared between the processors.
        if self.mistakes.load(Ordering::SeqCst) == 0 { 0 } else { self.mistakes.swap(0, Ordering::SeqCst) }
    }

    /// From here on news signal the event. The worker looks at every queue once more after this, then waits for `kick`.
    pub(super) fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }
    pub(super) fn wait_for_room(&self) {
        self.waits_for_room.store(true, Ordering::SeqCst);
    }
    /// The worker is awake: nothing of before counts any more.
    pub(super) fn woke_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        self.waits_for_room.store(false, Ordering::SeqCst);
        self.kick.clear();
    }
    pub(super) fn kick(&self) -> &Event {
        &self.kick
    }

    /// No queue is there. Called while the worker is parked.
    pub(super) fn reset(&self) {
        for doorbell in self.tails.iter().chain(&self.heads) {
            doorbell.open(0);
        }
        self.mistakes.store(0, Ordering::SeqCst);
        self.woke_up();
    }

    pub(super) fn save(&self) -> DoorbellsV1 {
        // A worker that wakes up looks at everything: whether it slept, and why, is not kept.
        let Doorbells { tails, heads, mistakes, asleep: _, waits_for_room: _, kick: _ } = self;
        DoorbellsV1 {
            tails: tails.each_ref().map(Doorbell::save),
            heads: heads.each_ref().map(Doorbell::save),
            mistakes: mistakes.load(Ordering::SeqCst),
        }
    }

    /// Values are the driver's; the queues check them once more.
    pub(super) fn restore(&self, saved: DoorbellsV1) -> Result<(), BadState> {
        let DoorbellsV1 { tails, heads, mistakes } = saved;
        check(mistakes & !(NO_SUCH_DOORBELL | BAD_VALUE) == 0, "a mistake that there is not")?;
        for (doorbell, saved) in self.tails.iter().chain(&self.heads).zip(tails.into_iter().chain(heads)) {
            doorbell.open(saved.entries);
            doorbell.value.store(saved.value, Ordering::SeqCst);
        }
        self.mistakes.store(mistakes, Ordering::SeqCst);
        Ok(())
    }

    fn note(&self, mistake: u8) {
        self.mistakes.fetch_or(mistake, Ordering::SeqCst);
        self.wake();
    }
}

fn ring(doorbells: &[Doorbell], queue: usize, value: u32) -> Result<(), u8> {
    doorbells.get(queue).ok_or(NO_SUCH_DOORBELL)?.ring(value)
}
