//! Writes that KVM keeps in a ring instead of leaving the guest for each (Linux, `Documentation/virt/kvm/api.rst`,
//! `KVM_REGISTER_COALESCED_MMIO`).
//!
//! ```text
//! page   0  first   the oldest entry, moved on by us            u32
//!        4  last    where KVM puts the next one                 u32
//!        8  entries of 24 bytes: address u64, length u32, 1 for a port u32, 8 bytes of data
//! ```
//! All vCPUs of a machine share the ring, and KVM's own lock keeps their writes apart and in order. A full ring exits as if there
//! were none. Whoever handles an exit or looks at what was written calls [`CoalescedWrites::settle`] first.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    bus::{BusView, from_le},
    memory::HostRegion,
};

/// The size of KVM's page.
pub const PAGE_BYTES: usize = 4096;

const FIRST_AT: usize = 0;
const LAST_AT: usize = 4;
const ENTRIES_AT: usize = 8;
const ENTRY_BYTES: usize = 24;
const ENTRIES: usize = (PAGE_BYTES - ENTRIES_AT) / ENTRY_BYTES;

/// The ring of one machine, and where its writes go.
pub struct CoalescedWrites {
    page: HostRegion,
    window: Range<u64>,
    /// Held by the one who carries out writes.
    bus: Mutex<BusView>,
}

impl CoalescedWrites {
    /// `page` is KVM's ring; writes to `window`, and no others, go to `bus`. A device there has no effect on the machine: it would
    /// be lost.
    pub fn new(page: HostRegion, window: Range<u64>, bus: BusView) -> CoalescedWrites {
        CoalescedWrites { page, window, bus: Mutex::new(bus) }
    }

    /// Returns when every write that KVM took before this call has been carried out, by us or by somebody else.
    /// The caller holds no lock of a device.
    pub fn settle(&self) {
        // An entry leaves the ring only when it has been carried out, so an empty ring is all that there is to know.
        if self.index(FIRST_AT) == self.index(LAST_AT) {
            return;
        }
        let mut bus = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        // What comes from now on is not waited for: another vCPU may go on writing for ever.
        let (mut at, end) = (self.index(FIRST_AT), self.index(LAST_AT));
        while at != end {
            self.carry_out(at, &mut bus);
            at = (at + 1) % ENTRIES;
            self.page.store_u32(FIRST_AT, at as u32);
        }
    }

    fn index(&self, at: usize) -> usize {
        self.page.load_u32(at) as usize % ENTRIES
    }

    fn carry_out(&self, index: usize, bus: &mut BusView) {
        let mut entry = [0; ENTRY_BYTES];
        self.page.read(ENTRIES_AT + index * ENTRY_BYTES, &mut entry);
        let (address, length, port) = (from_le(&entry[..8]), from_le(&entry[8..12]), from_le(&entry[12..16]));
        let inside = self.window.contains(&address) && length <= self.window.end - address;
        if let Some(data) = entry[16..].get(..length as usize)
            && inside
            && port == 0
        {
            bus.write_bytes(address, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;
    use crate::engine::bus::{Access, Bus, BusDevice, BusFault, Effect};

    const WINDOW: Range<u64> = 0xa_0000..0xc_0000;

    #[derive(Default)]
    struct Log(Vec<(u64, usize, u64)>);
    impl BusDevice for Log {
        fn read(&mut self, _: Access) -> Result<u64, BusFault> {
            Err(BusFault::NoRegister)
        }
        fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
            self.0.push((at.offset, at.width.bytes(), value));
            Ok(Effect::None)
        }
    }

    /// A ring with KVM's side of it.
    struct Ring {
        page: HostRegion,
        writes: Arc<CoalescedWrites>,
        log: Arc<Mutex<Log>>,
    }

    fn ring() -> Ring {
        let bus = Arc::new(Bus::default());
        let log = Arc::new(Mutex::new(Log::default()));
        // Larger than the window: what is refused is refused by the ring.
        bus.map(0..0x100_0000, Arc::clone(&log) as _).unwrap();
        let page = HostRegion::new(PAGE_BYTES).unwrap();
        let writes = Arc::new(CoalescedWrites::new(page.clone(), WINDOW, bus.view()));
        Ring { page, writes, log }
    }

    impl Ring {
        /// Puts an entry in as KVM does; false when the ring is full.
        fn push(&self, address: u64, length: u32, port: u32, data: u64) -> bool {
            let last = self.page.load_u32(LAST_AT);
            let next = (last + 1) % ENTRIES as u32;
            if next == self.page.load_u32(FIRST_AT) {
                return false;
            }
            let mut entry = Vec::new();
            entry.extend(address.to_le_bytes());
            entry.extend(length.to_le_bytes());
            entry.extend(port.to_le_bytes());
            entry.extend(data.to_le_bytes());
            self.page.write(ENTRIES_AT + last as usize * ENTRY_BYTES, &entry);
            self.page.store_u32(LAST_AT, next);
            true
        }
        fn taken(&self) -> Vec<(u64, usize, u64)> {
            std::mem::take(&mut self.log.lock().unwrap().0)
        }
    }

    #[test]
    fn the_layout_is_that_of_the_kernel() {
        use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
        use std::mem::{offset_of, size_of};
        assert_eq!((size_of::<kvm_coalesced_mmio_ring>(), size_of::<kvm_coalesced_mmio>()), (ENTRIES_AT, ENTRY_BYTES));
        assert_eq!(offset_of!(kvm_coalesced_mmio_ring, first), FIRST_AT);
        assert_eq!(offset_of!(kvm_coalesced_mmio_ring, last), LAST_AT);
        assert_eq!((offset_of!(kvm_coalesced_mmio, len), offset_of!(kvm_coalesced_mmio, data)), (8, 16));
    }

    #[test]
    fn writes_are_carried_out_in_order_and_once() {
        let ring = ring();
        ring.writes.settle();
        assert_eq!(ring.taken(), []);
        assert!(ring.push(0xa_0000, 1, 0, 0xffff_ff41));
        assert!(ring.push(0xb_8000, 2, 0, 0x0741));
        assert!(ring.push(0xb_fffd, 3, 0, 0x33_2211));
        ring.writes.settle();
        ring.writes.settle();
        let odd = [(0xb_fffd, 1, 0x11), (0xb_fffe, 1, 0x22), (0xb_ffff, 1, 0x33)];
        assert_eq!(ring.taken(), [[(0xa_0000, 1, 0x41), (0xb_8000, 2, 0x741)].as_slice(), &odd].concat());
    }

    #[test]
    fn a_full_ring_empties_and_goes_round() {
        let ring = ring();
        for round in 0..5u64 {
            let mut pushed = 0;
            while ring.push(0xa_0000 + pushed, 8, 0, round << 32 | pushed) {
                pushed += 1;
            }
            assert_eq!(pushed, ENTRIES as u64 - 1);
            ring.writes.settle();
            let expected: Vec<_> = (0..pushed).map(|at| (0xa_0000 + at, 8, round << 32 | at)).collect();
            assert_eq!(ring.taken(), expected);
        }
    }

    #[test]
    fn entries_that_are_not_of_the_window_are_dropped() {
        let ring = ring();
        for (address, length, port) in [
            (0x9_ffff, 1, 0),
            (0x9_ffff, 2, 0),
            (0xc_0000, 1, 0),
            (0xb_ffff, 2, 0),
            (0xb_fff9, 8, 0),
            (u64::MAX, 8, 0),
            (0xa_0000, 9, 0),
            (0xa_0000, u32::MAX, 0),
            (0xa_0000, 1, 1),
        ] {
            assert!(ring.push(address, length, port, 1));
        }
        assert!(ring.push(0xb_ffff, 1, 0, 7));
        assert!(ring.push(0xa_0000, 0, 0, 7));
        ring.writes.settle();
        assert_eq!(ring.taken(), [(0xb_ffff, 1, 7)]);
    }

    #[test]
    fn indexes_past_the_end_lead_nowhere() {
        let ring = ring();
        for (first, last) in [(u32::MAX, 3), (5, u32::MAX), (u32::MAX, 0x8000_0000), (170, 0), (0, 170)] {
            ring.page.store_u32(FIRST_AT, first);
            ring.page.store_u32(LAST_AT, last);
            ring.writes.settle();
        }
    }

    #[test]
    fn whoever_returns_finds_the_writes_done() {
        let ring = ring();
        std::thread::scope(|scope| {
            let mut settlers = Vec::new();
            let done = Arc::new(AtomicBool::new(false));
            for _ in 0..2 {
                let (writes, done) = (Arc::clone(&ring.writes), Arc::clone(&done));
                settlers.push(scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        writes.settle();
                    }
                }));
            }
            for number in 0..20_000 {
                while !ring.push(0xa_0000, 8, 0, number) {
                    std::thread::yield_now();
                }
                if number % 64 == 0 {
                    ring.writes.settle();
                    assert_eq!(ring.log.lock().unwrap().0.last(), Some(&(0xa_0000, 8, number)));
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        ring.writes.settle();
        let numbers: Vec<u64> = ring.taken().into_iter().map(|(_, _, number)| number).collect();
        assert!(numbers.into_iter().eq(0..20_000));
    }
}
