//! The balloon as a driver sees it, and as a hostile guest would use it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use super::*;
use crate::engine::{
    bus::Width,
    saved::testing::{matches_golden, spoil},
    timer::tests::hand_clock,
    virtio::testing::{BUFFERS, Driver, EVENT_IDX, INDIRECT, Region, VERSION_1, eventually, readable, writable},
};

const STATS: Features = 1 << F_STATS_VQ;
const REPORTING: Features = 1 << F_PAGE_REPORTING;
const POISON: Features = 1 << F_PAGE_POISON;
/// Pages of tests are from here on; lists are at `BUFFERS`.
const PAGES: u64 = 0x40_0000;
const PAGE: u64 = PAGE_BYTES;

struct Rig {
    driver: Driver,
    control: BalloonControl,
    worker: Worker,
    hand: Arc<AtomicU64>,
}

fn rig() -> Rig {
    let (clock, hand) = hand_clock(5_000_000_000);
    let balloon = Balloon::new(clock).unwrap();
    let (control, worker) = (balloon.control(), balloon.workers()[0].clone());
    Rig { driver: Driver::plug(balloon), control, worker, hand }
}

impl Rig {
    /// Fills the first pages from `PAGES` on with ones.
    fn dirty(&self, pages: u64) {
        self.driver.fill(PAGES, &vec![1; (pages * PAGE) as usize]);
    }

    /// Which of the first pages are zeros; each is all zeros or all ones.
    fn zeros(&self, pages: u64) -> Vec<u64> {
        let is_zero = |page: &u64| {
            let bytes = self.driver.bytes(PAGES + page * PAGE, PAGE as usize);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is half gone");
            bytes[0] == 0
        };
        (0..pages).filter(is_zero).collect()
    }

    /// Sends page numbers through the inflate queue.
    fn inflate(&mut self, numbers: &[u32]) {
        let list: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.fill(BUFFERS, &list);
        assert_eq!(self.driver.run(0, &[readable(BUFFERS, list.len() as u32)]).bytes, 0);
    }

    /// Queues a buffer with statistics.
    fn offer_statistics(&mut self, statistics: &[(u16, u64)], more: &[u8]) {
        let mut bytes: Vec<u8> = statistics
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        bytes.extend(more);
        self.driver.fill(BUFFERS, &bytes);
        self.driver.submit(2, &[readable(BUFFERS, bytes.len() as u32)]);
    }

    fn register(&mut self, offset: u64) -> u64 {
        self.driver.registers.read(Region::Device, offset, Width::B4)
    }

    fn set_register(&mut self, offset: u64, value: u64) {
        self.driver.registers.write(Region::Device, offset, Width::B4, value);
    }
}

fn number(page: u64) -> u32 {
    (PAGES / PAGE + page) as u32
}

#[test]
fn inflated_pages_are_given_back_and_read_as_zeros() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX | STATS | REPORTING] {
        let mut rig = rig();
        rig.driver.start(features);
        rig.dirty(16);
        rig.inflate(&[9, 3, 2, 12, 3, 3, 4].map(number));
        assert_eq!(rig.zeros(16), [2, 3, 4, 9, 12]);
        rig.driver.fill(PAGES + 3 * PAGE, &vec![1; PAGE as usize]);
        assert_eq!(rig.zeros(16), [2, 4, 9, 12], "a page is there again when it is touched");
        assert_eq!(rig.driver.run(1, &[readable(BUFFERS, 28)]).bytes, 0, "deflated");
        assert_eq!(rig.zeros(16), [2, 4, 9, 12]);
    }
}

#[test]
fn the_target_is_told_by_an_interrupt_and_outlives_a_reset() {
    let mut rig = rig();
    assert_eq!(rig.driver.offered() & 0xffff, STATS | REPORTING | POISON | 1 << F_DEFLATE_ON_OOM);
    rig.driver.start(VERSION_1);
    let generation = |rig: &mut Rig| rig.driver.registers.read(Region::Common, 0x15, Width::B1);
    let before = generation(&mut rig);
    assert_eq!((rig.register(0), rig.driver.messages(0)), (0, 0));
    rig.control.set_target((64 << 20) + 5);
    eventually("a configuration interrupt", || rig.driver.messages(0) == 1);
    assert_ne!(generation(&mut rig), before);
    assert_eq!(rig.register(0), (64 << 20) / PAGE);
    rig.control.set_target(64 << 20);
    rig.set_register(4, 77);
    assert_eq!(rig.register(4), 77);
    let status = BalloonStatus { target_bytes: 64 << 20, actual_bytes: 77 * PAGE, statistics: None };
    assert_eq!(rig.control.status(), status);
    rig.driver.registers.reset();
    assert_eq!(rig.control.status(), BalloonStatus { actual_bytes: 0, ..status });
    assert_eq!(rig.driver.messages(0), 1, "the same target is no news");
    rig.driver.start(VERSION_1);
    eventually("a second interrupt", || rig.driver.messages(0) == 2);
    assert_eq!(rig.register(0), (64 << 20) / PAGE);
    rig.control.set_target(u64::MAX);
    assert_eq!(rig.register(0), u64::from(u32::MAX));
}

#[test]
fn statistics_come_when_the_host_asks() {
    let mut rig = rig();
    rig.control.ask_statistics();
    rig.driver.start(VERSION_1 | STATS);
    assert_eq!(rig.control.status().statistics, None);
    rig.offer_statistics(&[(4, 1000), (5, 4000), (99, 1), (6, 3000)], &[7; 9]);
    let known = |rig: &Rig| rig.control.status().statistics;
    eventually("the first ones", || known(&rig).is_some());
    let first = Statistics {
        at_unix_ms: 5000,
        free_bytes: Some(1000),
        total_bytes: Some(4000),
        available_bytes: Some(3000),
        ..Statistics::default()
    };
    assert_eq!(known(&rig), Some(first), "unknown tags and half a statistic are nothing");
    thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(rig.driver.used(2), None, "what was asked before the driver began is forgotten, and nobody asked since");
    for round in 1..20 {
        rig.hand.store(round * 9_000_000_000, Ordering::SeqCst);
        rig.control.ask_statistics();
        rig.driver.wait_used(2);
        rig.offer_statistics(&(0..10).map(|tag| (tag, round * 100 + u64::from(tag))).collect::<Vec<_>>(), &[]);
        eventually("newer ones", || known(&rig).unwrap().at_unix_ms == round * 9000);
        let seen = known(&rig).unwrap();
        assert_eq!([seen.swapped_in_bytes, seen.huge_page_failures], [Some(round * 100), Some(round * 100 + 9)]);
    }
    rig.driver.registers.reset();
    assert_eq!(known(&rig), None);
}

#[test]
fn reported_memory_is_given_back_whichever_way_the_driver_counts_its_queues() {
    for (features, queue) in [(STATS | REPORTING, 4), (STATS | REPORTING, 3), (REPORTING, 2), (REPORTING, 4)] {
        let mut rig = rig();
        rig.driver.start(VERSION_1 | features);
        rig.dirty(16);
        let pieces = [writable(PAGES + PAGE, 2 * PAGE as u32), writable(PAGES + 8 * PAGE - 1, PAGE as u32 + 2)];
        rig.driver.run(queue, &pieces);
        assert_eq!(rig.zeros(16), [1, 2, 8], "queue {queue}");
        assert_eq!(rig.control.status().statistics, None);
    }
    let mut rig = rig();
    rig.driver.start(VERSION_1 | STATS);
    rig.dirty(4);
    rig.driver.run(4, &[writable(PAGES, PAGE as u32)]);
    assert_eq!(rig.zeros(4), [0u64; 0], "not negotiated");
}

#[test]
fn pages_that_the_guest_fills_with_something_keep_it() {
    for (features, poison, given) in [(POISON, 0xaaaa_aaaa, false), (POISON, 0, true), (0, 0xaaaa_aaaa, true)] {
        let mut rig = rig();
        rig.driver.prepare(VERSION_1 | REPORTING | features, 16);
        rig.set_register(12, poison);
        rig.driver.driver_ok();
        rig.dirty(2);
        rig.driver.run(4, &[writable(PAGES, PAGE as u32)]);
        assert_eq!(rig.zeros(2) == [0], given, "{poison:#x}");
    }
}

#[test]
fn page_numbers_that_are_no_ram_are_harmless() {
    let mut rig = rig();
    rig.driver.start(VERSION_1);
    rig.dirty(4);
    let end = (8u32 << 20) / PAGE as u32;
    let bad =
        [0xa0, 0xb8, 0xbf, end, end + 1, 0xc_0000, 0xf_fc00, 0xf_ffff, 0x10_0000, 0x7fff_ffff, u32::MAX, u32::MAX];
    rig.inflate(&bad);
    rig.inflate(&[&bad[..], &[number(1)]].concat());
    assert_eq!(rig.zeros(4), [1]);
    // A run that leaves RAM stays as a whole.
    rig.driver.fill((8 << 20) - PAGE, &[1; 16]);
    rig.inflate(&[end - 1, end]);
    assert_eq!(rig.driver.bytes((8 << 20) - PAGE, 16), [1; 16]);
}

#[test]
fn lists_of_odd_and_huge_sizes_end() {
    let mut rig = rig();
    rig.driver.start(VERSION_1 | INDIRECT);
    rig.dirty(64);
    rig.driver.fill(BUFFERS, &[number(0).to_le_bytes(), number(1).to_le_bytes()].concat());
    assert_eq!(rig.driver.run(0, &[readable(BUFFERS, 7)]).bytes, 0);
    assert_eq!(rig.zeros(64), [0], "half a number is none");
    rig.driver.run(0, &[readable(BUFFERS + 4, 1), readable(BUFFERS + 5, 3), writable(BUFFERS, 4)]);
    assert_eq!(rig.zeros(64), [0, 1], "a number in two pieces");
    for piece in [readable(BUFFERS, 0), readable(BUFFERS, 3), writable(BUFFERS, 4096)] {
        assert_eq!(rig.driver.run(0, &[piece]).bytes, 0);
    }
    // The same page a million times, then one behind the limit: 4 MiB of list, whose first numbers are those of one page.
    let list = 0x30_0000;
    rig.driver.fill(list, &number(2).to_le_bytes().repeat(4095));
    rig.driver.fill(list + 4 * 4095, &[number(3).to_le_bytes(), number(4).to_le_bytes()].concat());
    let pieces: Vec<_> = (0..8).map(|_| readable(list, 512 << 10)).collect();
    rig.driver.add_indirect(0, BUFFERS + 0x1000, &pieces);
    rig.driver.registers.kick(0);
    rig.driver.wait_used(0);
    assert_eq!(rig.zeros(64), [0, 1, 2, 3], "no more than the limit of a request");
    // A list may lie in the page that it gives back.
    rig.driver.fill(PAGES + 8 * PAGE, &number(8).to_le_bytes().repeat(1024));
    rig.driver.run(0, &[readable(PAGES + 8 * PAGE, PAGE as u32)]);
    assert_eq!(rig.zeros(9), [0, 1, 2, 3, 8]);
}

#[test]
fn rings_in_memory_that_is_given_back_break_nothing_but_the_guest() {
    let mut rig = rig();
    rig.driver.start(VERSION_1 | REPORTING);
    // All of RAM at once, with rings and lists in it.
    rig.driver.submit(4, &[writable(0, 0xa_0000), writable(0x10_0000, 7 << 20)]);
    rig.driver.registers.kick(0);
    rig.driver.registers.reset();
    rig.driver.start(VERSION_1);
    rig.dirty(2);
    rig.inflate(&[number(1)]);
    assert_eq!(rig.zeros(2), [1]);
}

#[test]
fn a_driver_with_many_statistics_gets_the_older_buffers_back() {
    let mut rig = rig();
    rig.driver.start(VERSION_1 | STATS | EVENT_IDX);
    for round in 0..100u64 {
        rig.offer_statistics(&[(4, round)], &[]);
        if round > 0 {
            rig.driver.wait_used(2);
        }
    }
    rig.driver.submit(2, &[writable(BUFFERS, 10)]);
    rig.driver.wait_used(2);
    eventually("an empty buffer", || rig.control.status().statistics.unwrap().free_bytes.is_none());
    rig.driver.submit(2, &[writable(0xa_0000, 10)]);
    rig.driver.registers.wait_needs_reset();
    rig.control.ask_statistics();
    rig.control.set_target(1 << 20);
    rig.driver.start(VERSION_1 | STATS);
    eventually("the target", || rig.driver.messages(0) > 0);
}

#[test]
fn a_flood_of_requests_cannot_hold_up_a_reset() {
    let mut rig = rig();
    rig.driver.start(VERSION_1 | STATS);
    rig.driver.fill(BUFFERS, &(0..4096).flat_map(|page| number(page * 2 % 1024).to_le_bytes()).collect::<Vec<_>>());
    for _ in 0..16 {
        rig.driver.add(0, &[readable(BUFFERS, 16 << 10)]);
        rig.driver.add(2, &[readable(BUFFERS, 16 << 10)]);
    }
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (ram, stop) = (rig.driver.ram.clone(), Arc::clone(&over));
    let rings = [0, 2].map(|queue| rig.driver.ring(queue));
    let flood = thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            for ring in rings {
                let used = ram.get_u16(Gpa(ring.used() + 2)).unwrap();
                ram.write(Gpa(ring.avail() + 2), &used.wrapping_add(16).to_le_bytes()).unwrap();
            }
        }
    });
    rig.driver.registers.kick(0);
    let asking = rig.control.clone();
    let asks = thread::spawn(move || {
        for round in 0..2000 {
            asking.ask_statistics();
            asking.set_target(round << 12);
            asking.status();
        }
    });
    rig.driver.registers.reset();
    over.store(true, Ordering::Release);
    flood.join().unwrap();
    asks.join().unwrap();
}

#[test]
fn the_configuration_survives_every_access() {
    let mut rig = rig();
    rig.control.set_target(3 * PAGE);
    for offset in 0..24 {
        for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
            rig.driver.registers.write(Region::Device, offset, width, u64::MAX);
            rig.driver.registers.read(Region::Device, offset, width);
        }
    }
    assert_eq!([0, 4, 8, 12].map(|at| rig.register(at)), [3, 0xffff_ffff, 0, 0xffff_ffff]);
    rig.driver.start(VERSION_1);
    assert_eq!([0, 4, 8, 12].map(|at| rig.register(at)), [3, 0, 0, 0], "a reset forgets what the driver said");
}

#[test]
fn a_restored_balloon_goes_on_where_it_was_saved() {
    let mut first = rig();
    first.control.set_target(100 * PAGE);
    first.driver.start(VERSION_1 | STATS);
    first.offer_statistics(&[(4, 1)], &[]);
    eventually("the buffer", || first.control.status().statistics.is_some());
    eventually("the interrupt", || first.driver.messages(0) == 1);
    first.set_register(4, 60);
    first.set_register(12, 0xaa);
    first.worker.hold();
    first.control.ask_statistics();
    let shared = Arc::clone(&first.control.0);
    let saved = matches_golden(&Balloon { worker: first.worker.clone(), shared }.save());

    let mut device = Balloon::new(Clock::wall()).unwrap();
    device.restore(&saved).unwrap();
    assert_eq!(device.save(), SavedState { bytes: device.save().bytes, ..saved.clone() });
    assert_eq!(device.save().fields::<serde_json::Value>(saved::KIND, 1), saved.fields(saved::KIND, 1));
    let control = device.control();
    let status = BalloonStatus { target_bytes: 100 * PAGE, actual_bytes: 60 * PAGE, statistics: None };
    assert_eq!(control.status(), status);
    // What the transport will have restored: the driver runs, and its buffer is held by the device.
    let worker = device.workers()[0].clone();
    let mut second = Rig { driver: Driver::plug(device), control, worker, hand: Arc::default() };
    second.driver.negotiate(VERSION_1 | STATS);
    for queue in 0..5 {
        second.driver.set_up_queue(queue, 16);
    }
    second.driver.use_msix();
    second.driver.driver_ok();
    assert_eq!(second.driver.wait_used(2).head, 0, "the host had asked");
    second.offer_statistics(&[(4, 2)], &[]);
    eventually("the answer", || second.control.status().statistics.is_some_and(|seen| seen.free_bytes == Some(2)));
    assert_eq!(second.driver.messages(0), 0, "the driver knows its target");
    assert_eq!([0, 4, 8, 12].map(|at| second.register(at)), [100, 60, 0, 0xaa]);
}

#[test]
fn spoilt_states_are_refused_or_harmless() {
    let saved = {
        let balloon = Balloon::new(Clock::wall()).unwrap();
        *balloon.shared.lock() = State { target_pages: 3, held: Some(2), asked: true, ..State::default() };
        balloon.save()
    };
    let mut refused = 0;
    spoil(&saved, |state| {
        let mut device = Balloon::new(Clock::wall()).unwrap();
        if device.restore(state).is_err() {
            refused += 1;
            return;
        }
        let control = device.control();
        let mut driver = Driver::plug(device);
        driver.negotiate(VERSION_1 | STATS);
        for queue in 0..5 {
            driver.set_up_queue(queue, 16);
        }
        driver.driver_ok();
        control.ask_statistics();
        control.set_target(7 * PAGE);
        driver.registers.kick(2);
        driver.start(VERSION_1 | STATS);
        driver.fill(BUFFERS, &number(1).to_le_bytes());
        driver.run(0, &[readable(BUFFERS, 4)]);
    });
    assert!(refused > 20, "{refused}");
}
