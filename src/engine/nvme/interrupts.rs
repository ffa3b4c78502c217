//! Interrupts (NVM Express 1.4, section 7.5): MSI-X when it is enabled, otherwise the pin with INTMS and INTMC.
//!
//! The pin is high while a completion queue that interrupts has entries which the driver has not consumed. It falls in the
//! very write of the doorbell, on the vCPU: if the worker did it later, the processor would take the interrupt again and again.

use std::{
    array,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use super::{
    super::{irq::IrqLine, pci::msix::Msix, saved::BadState},
    QUEUES,
    saved::{InterruptsV1, check},
};

pub(super) struct Interrupts {
    msix: Arc<Msix>,
    /// Used while MSI-X is off, or the pin is still high.
    pin: Mutex<Pin>,
    high: AtomicBool,
    /// Where the worker and the driver are in each completion queue.
    posted: [AtomicU32; QUEUES],
    consumed: [AtomicU32; QUEUES],
    /// Completion queues that interrupt, a bit each.
    armed: AtomicU32,
}

struct Pin {
    /// INTMS: all queues share vector 0 while the pin is used.
    mask: u32,
    line: IrqLine,
}

impl Interrupts {
    pub(super) fn new(msix: Arc<Msix>, line: IrqLine) -> Interrupts {
        Interrupts {
            msix,
            pin: Mutex::new(Pin { mask: 0, line }),
            high: AtomicBool::new(false),
            posted: array::from_fn(|_| AtomicU32::new(0)),
            consumed: array::from_fn(|_| AtomicU32::new(0)),
            armed: AtomicU32::new(0),
        }
    }

    /// How many vectors a queue may choose from.
    pub(super) fn vectors(&self) -> u16 {
        if self.msix.enabled() { self.msix.vectors() } else { 1 }
    }

    /// A completion queue was made. The worker calls this before the driver can know of it.
    pub(super) fn open(&self, queue: usize, interrupts: bool) {
        self.place(&self.posted, queue, 0);
        self.place(&self.consumed, queue, 0);
        if interrupts {
            self.armed.fetch_or(1 << queue, Ordering::SeqCst);
        }
    }

    /// A completion queue was deleted, with what was in it.
    pub(super) fn close(&self, queue: usize) {
        self.armed.fetch_and(!(1 << queue), Ordering::SeqCst);
        self.sync_pin();
    }

    /// The worker is about to post an entry; `tail` is where the next one goes. Said first, so that a driver which sees the
    /// entry at once and consumes it does not seem to be ahead.
    pub(super) fn post(&self, queue: usize, tail: u32) {
        self.place(&self.posted, queue, tail);
    }

    /// The entry is there.
    pub(super) fn signal(&self, vector: Option<u16>) {
        let Some(vector) = vector else { return };
        if self.msix.enabled() {
            self.msix.signal(vector);
        } else {
            self.sync_pin();
        }
    }

    /// The driver consumed entries up to `head`.
    pub(super) fn consumed(&self, queue: usize, head: u32) {
        self.place(&self.consumed, queue, head);
        if !self.msix.enabled() || self.high.load(Ordering::SeqCst) {
            self.sync_pin();
        }
    }

    pub(super) fn masked(&self) -> u32 {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).mask
    }
    pub(super) fn mask(&self, bits: u32) {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).mask |= bits;
        self.sync_pin();
    }
    pub(super) fn unmask(&self, bits: u32) {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).mask &= !bits;
        self.sync_pin();
    }

    /// The state after a controller reset. MSI-X is PCI's and stays.
    pub(super) fn reset(&self) {
        self.armed.store(0, Ordering::SeqCst);
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).mask = 0;
        self.sync_pin();
    }

    pub(super) fn save(&self) -> InterruptsV1 {
        // The pin's level follows from the rest, and from MSI-X, which is PCI's.
        let Interrupts { msix: _, pin, high: _, posted, consumed, armed } = self;
        let Pin { mask, line: _ } = &*pin.lock().unwrap_or_else(PoisonError::into_inner);
        let load = |places: &[AtomicU32; QUEUES]| places.each_ref().map(|place| place.load(Ordering::SeqCst));
        InterruptsV1 {
            mask: *mask,
            posted: load(posted),
            consumed: load(consumed),
            armed: armed.load(Ordering::SeqCst),
        }
    }

    pub(super) fn restore(&self, saved: InterruptsV1) -> Result<(), BadState> {
        let InterruptsV1 { mask, posted, consumed, armed } = saved;
        check(armed < 1 << QUEUES, "interrupts of a queue that cannot be")?;
        for (queue, (posted, consumed)) in posted.into_iter().zip(consumed).enumerate() {
            self.place(&self.posted, queue, posted);
            self.place(&self.consumed, queue, consumed);
        }
        self.armed.store(armed, Ordering::SeqCst);
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).mask = mask;
        self.sync_pin();
        Ok(())
    }

    fn place(&self, places: &[AtomicU32; QUEUES], queue: usize, value: u32) {
        if let Some(place) = places.get(queue) {
            place.store(value, Ordering::SeqCst);
        }
    }

    /// Computes the level from what is there now; under the lock, so that the last one to come sees everything.
    fn sync_pin(&self) {
        let pin = self.pin.lock().unwrap_or_else(PoisonError::into_inner);
        let armed = self.armed.load(Ordering::SeqCst);
        let waiting = self.posted.iter().zip(&self.consumed).enumerate().any(|(queue, (posted, consumed))| {
            armed & 1 << queue != 0 && posted.load(Ordering::SeqCst) != consumed.load(Ordering::SeqCst)
        });
        let high = waiting && pin.mask & 1 == 0 && !self.msix.enabled();
        self.high.store(high, Ordering::SeqCst);
        pin.line.set(high);
    }
}
