//! The event ring and its interrupter (xHCI 1.1, 4.9.4, 4.17 and 5.5.2).
//!
//! There is one interrupter. It does not moderate: a driver that has not consumed what it was told of is not told again, and
//! no timer is needed. No event is lost: while the ring is full, what does not fit waits here and rings are not served.

use std::{collections::VecDeque, sync::Arc};

use super::trb::{TRB_BYTES, Trb};
use crate::engine::{
    irq::IrqLine,
    memory::{Gpa, GuestRam, RamSpan},
    pci::msix::Msix,
};

/// As HCSPARAMS2 says, a power of two: segments of the event ring.
pub(super) const SEGMENTS_MAX: u32 = 16;
/// Entries of a segment (6.5).
const SEGMENT_TRBS: std::ops::RangeInclusive<u32> = 16..=4096;
const SEGMENT_ENTRY_BYTES: u64 = 16;
/// Events that wait for room. A ring is served only while none waits, so this is what one step can come to.
const WAITING_MAX: usize = 64;

const PENDING: u32 = 1;
const ENABLE: u32 = 1 << 1;
/// ERDP: Event Handler Busy.
const BUSY: u64 = 1 << 3;
/// ERDP: the segment the driver is in, kept for it.
const SEGMENT: u64 = 0b111;
/// IMOD after a reset: 1 ms in units of 250 ns.
const MODERATION_RESET: u32 = 4000;

/// What the driver programs, and the producer's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Ring {
    pub(super) iman: u32,
    pub(super) imod: u32,
    pub(super) segments: u32,
    pub(super) table: u64,
    /// With its low bits: `SEGMENT` and `BUSY`.
    pub(super) dequeue: u64,
    pub(super) place: Place,
    pub(super) cycle: bool,
}

/// Where in the ring: a segment of the table, its address and entries as they were when the producer came into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) base: u64,
    /// 0 before the first event.
    pub(super) entries: u32,
    pub(super) index: u32,
}

impl Place {
    fn address(self) -> u64 {
        self.base + u64::from(self.index) * TRB_BYTES
    }
}

pub(super) struct Events {
    pub(super) ring: Ring,
    /// USBCMD.INTE.
    pub(super) enabled: bool,
    /// USBSTS.EINT.
    pub(super) interrupt: bool,
    /// The ring is not RAM: a host system error.
    pub(super) broken: bool,
    /// Events, and whether they interrupt.
    pub(super) waiting: VecDeque<(Trb, bool)>,
    pub(super) ram: GuestRam,
    pub(super) msix: Arc<Msix>,
    pub(super) line: IrqLine,
}

impl Events {
    pub(super) fn new(ram: GuestRam, msix: Arc<Msix>, line: IrqLine) -> Events {
        let waiting = VecDeque::with_capacity(WAITING_MAX);
        let mut events =
            Events { ring: Ring::default(), enabled: false, interrupt: false, broken: false, waiting, ram, msix, line };
        events.reset();
        events
    }

    pub(super) fn reset(&mut self) {
        self.ring = Ring { imod: MODERATION_RESET, cycle: true, ..Ring::default() };
        (self.enabled, self.interrupt, self.broken) = (false, false, false);
        self.waiting.clear();
        self.sync();
    }

    /// Whether there is a ring and everything so far is in it, so that more may be done.
    pub(super) fn has_room(&self) -> bool {
        self.ring.segments > 0 && self.waiting.is_empty() && !self.broken
    }

    /// Tells the driver; `quiet` events wait until it looks by itself.
    pub(super) fn post(&mut self, event: Trb, quiet: bool) {
        if self.waiting.is_empty() && self.put(event, quiet) || self.broken {
            return;
        }
        // One step came to more than a driver lets it: the rest of it is lost.
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push_back((event, quiet));
        }
    }

    /// The driver made room, or a ring.
    fn drain(&mut self) {
        while let Some((event, quiet)) = self.waiting.front().copied() {
            if !self.put(event, quiet) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Writes an event into the ring; false when it is full or broken.
    fn put(&mut self, event: Trb, quiet: bool) -> bool {
        let place = match self.ring.place.entries {
            0 => self.segment(0),
            _ => Some(self.ring.place),
        };
        let Some((place, next)) = place.and_then(|place| Some((place, self.after(place)?))) else {
            self.broken = true;
            return false;
        };
        self.ring.place = place;
        if next.address() == self.ring.dequeue & !0xf {
            return false;
        }
        if !event.publish(&self.ram, Gpa(place.address()), self.ring.cycle) {
            self.broken = true;
            return false;
        }
        self.ring.place = next;
        self.ring.cycle ^= next.segment == 0 && next.index == 0;
        if !quiet {
            self.raise();
        }
        true
    }

    /// The beginning of a segment, from the table in RAM; `None` when it cannot be.
    fn segment(&self, segment: u32) -> Option<Place> {
        if segment >= self.ring.segments || self.ring.segments > SEGMENTS_MAX {
            return None;
        }
        let entry = self.ring.table.checked_add(u64::from(segment) * SEGMENT_ENTRY_BYTES)?;
        let base = self.ram.get_u64(Gpa(entry)).ok()? & !0x3f;
        let entries = self.ram.get_u32(Gpa(entry.checked_add(8)?)).ok()? & 0xffff;
        let place = Place { segment, base, entries, index: 0 };
        self.fits(place).then_some(place)
    }

    /// Whether a place is in a segment that can be.
    pub(super) fn fits(&self, place: Place) -> bool {
        let bytes = place.entries.saturating_mul(TRB_BYTES as u32);
        SEGMENT_TRBS.contains(&place.entries)
            && place.index < place.entries
            && self.ram.contains(RamSpan { at: Gpa(place.base), bytes })
    }

    fn after(&self, place: Place) -> Option<Place> {
        if place.index + 1 < place.entries {
            return Some(Place { index: place.index + 1, ..place });
        }
        self.segment(if place.segment + 1 >= self.ring.segments { 0 } else { place.segment + 1 })
    }

    /// 4.17.2: the driver is interrupted when it is not already at work.
    fn raise(&mut self) {
        if self.ring.dequeue & BUSY == 0 {
            self.ring.dequeue |= BUSY;
            self.ring.iman |= PENDING;
            self.interrupt = true;
            self.sync();
        }
    }

    /// Sends what is pending, or sets the pin, after any of it changed. A message clears the pending bit (4.17.5).
    pub(super) fn sync(&mut self) {
        let due = self.enabled && self.ring.iman & (ENABLE | PENDING) == ENABLE | PENDING;
        let message = self.msix.enabled();
        self.line.set(due && !message);
        if due && message {
            self.ring.iman &= !PENDING;
            self.msix.signal(0);
        }
    }

    /// After a restore: the level that follows from the state, and no message.
    pub(super) fn sync_line(&self) {
        let due = self.enabled && self.ring.iman & (ENABLE | PENDING) == ENABLE | PENDING;
        self.line.set(due && !self.msix.enabled());
    }

    /// IMAN: pending is cleared by writing 1.
    pub(super) fn write_iman(&mut self, value: u32) {
        self.ring.iman = self.ring.iman & !value & PENDING | value & ENABLE;
        self.sync();
    }

    pub(super) fn write_segments(&mut self, value: u32) {
        self.ring.segments = value & 0xffff;
    }

    /// ERSTBA: the producer begins anew (4.9.4).
    pub(super) fn write_table(&mut self, table: u64) {
        self.ring.table = table & !0x3f;
        (self.ring.place, self.ring.cycle) = (Place::default(), true);
    }

    /// ERDP: the driver consumed events; busy is cleared by writing 1, and raised anew when not all were consumed. True when
    /// there is room again for a driver that had left none.
    pub(super) fn write_dequeue(&mut self, dequeue: u64) -> bool {
        let still_busy = self.ring.dequeue & BUSY & !dequeue;
        self.ring.dequeue = dequeue & (!0xf | SEGMENT) | still_busy;
        let waited = !self.waiting.is_empty();
        self.drain();
        let place = self.ring.place;
        if place.entries != 0 && place.address() != dequeue & !0xf {
            self.raise();
        }
        waited && self.has_room()
    }
}
