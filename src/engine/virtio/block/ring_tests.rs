//! Disks that are files: both ways of doing requests, many in flight, several queues, limits.

use std::{
    fs::File,
    io::{Read, Write},
    num::NonZeroU64,
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::{Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::engine::{
    bus::Width,
    disk::RawFile,
    rate_limit::RateLimit,
    virtio::testing::{
        BUFFERS, DEADLINE, Driver, EVENT_IDX, INDIRECT, NEEDS_RESET, Region, VERSION_1, eventually, readable, writable,
    },
};

const SECTORS: u64 = 256;
const MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
/// Descriptors of each queue in these tests: 42 requests.
const RING: u16 = 128;

/// How requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Ring,
    OneByOne,
}

struct Rig {
    driver: Driver,
    worker: Worker,
    reports: mpsc::Receiver<String>,
    limits: RateLimits,
}

/// `None` where the host has no io_uring.
fn plug(file: File, way: Way, queues: u16, limit: RateLimit) -> Option<Rig> {
    let disk = RawFile::with_size(file, SECTORS * SECTOR_BYTES);
    let (tell, reports) = mpsc::channel();
    let tell = Mutex::new(tell);
    let faults: FaultReport = Arc::new(move |reason| drop(tell.lock().unwrap().send(reason)));
    let limits = RateLimits::new(limit).unwrap();
    let ring = match (way, Ring::new(disk.file(), IN_FLIGHT_MAX)) {
        (Way::OneByOne, _) => None,
        (Way::Ring, Ok(ring)) => Some(ring),
        (Way::Ring, Err(error)) => {
            println!("skipped: io_uring: {error}");
            return None;
        }
    };
    let options = BlockOptions { serial: "of-a-file", queues, limits: limits.clone(), faults };
    let block = Block::with_ring(disk, options, ring).unwrap();
    let worker = block.workers()[0].clone();
    let mut rig = Rig { driver: Driver::plug(block), worker, reports, limits };
    rig.start(VERSION_1);
    Some(rig)
}

/// A file of the disk's size, sector n full of n.
fn numbered() -> File {
    let file = tempfile::tempfile().unwrap();
    number(&file);
    file
}

fn number(file: &File) {
    for sector in 0..SECTORS {
        file.write_all_at(&[sector as u8; 512], sector * 512).unwrap();
    }
}

/// A disk whose reads wait until the other end writes.
fn slow(queues: u16) -> Option<(Rig, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let rig = plug(File::from(OwnedFd::from(ours)), Way::Ring, queues, RateLimit::default())?;
    Some((rig, theirs))
}

fn both(file: impl Fn() -> File, limit: RateLimit) -> Vec<(Way, Rig)> {
    let rig = |way| plug(file(), way, 1, limit).map(|rig| (way, rig));
    [Way::Ring, Way::OneByOne].into_iter().filter_map(rig).collect()
}

/// Where a request's header, status and data are.
fn place(slot: u64) -> u64 {
    BUFFERS + slot * 0x4000
}

impl Rig {
    fn start(&mut self, features: u64) {
        self.driver.prepare(features, RING);
        self.driver.use_msix();
        self.driver.driver_ok();
    }

    /// Queues a request with its data in one or two pieces, without a kick; gives its head.
    fn add(&mut self, queue: u16, slot: u64, kind: u32, sector: u64, bytes: u32) -> u16 {
        let at = place(slot);
        let header = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
        self.driver.fill(at, &header);
        self.driver.fill(at + 16, &[0xaa]);
        let data = if kind & 1 != 0 { readable } else { writable };
        let (header, status) = (readable(at, 16), writable(at + 16, 1));
        match bytes {
            0 => self.driver.add(queue, &[header, status]),
            1..=512 => self.driver.add(queue, &[header, data(at + 0x1000, bytes), status]),
            _ => {
                let (first, second) = (data(at + 0x1000, 256), data(at + 0x1100, bytes - 256));
                self.driver.add(queue, &[header, first, second, status])
            }
        }
    }

    /// Queues reads of the first sectors into the first slots.
    fn add_reads(&mut self, count: u64) {
        for slot in 0..count {
            self.add(0, slot, VIRTIO_BLK_T_IN, slot, 512);
        }
    }

    fn status(&self, slot: u64) -> u32 {
        self.driver.bytes(place(slot) + 16, 1)[0].into()
    }

    fn data(&self, slot: u64, bytes: usize) -> Vec<u8> {
        self.driver.bytes(place(slot) + 0x1000, bytes)
    }

    /// What waits for the host.
    fn waiting(&self) -> Vec<Waiting> {
        self.worker.while_out(|requests: &mut Requests, _| requests.waiting())
    }

    /// The heads that were used, when there are so many.
    fn wait_used(&mut self, queue: u16, count: usize) -> Vec<u16> {
        (0..count).map(|_| self.driver.wait_used(queue).head).collect()
    }
}

#[test]
fn a_disk_is_the_same_whichever_way_its_requests_are_done() {
    for way in [Way::Ring, Way::OneByOne] {
        let file = numbered();
        let Some(mut rig) = plug(file.try_clone().unwrap(), way, 4, RateLimit::default()) else { continue };
        rig.start(VERSION_1 | EVENT_IDX | INDIRECT | MQ);
        assert_eq!(rig.driver.queues(), 4);
        // In each queue, reads and writes of sectors of its own, thirty at once.
        for round in 0..20u64 {
            for queue in 0..4 {
                for number in 0..30 {
                    let slot = u64::from(queue) * 30 + number;
                    let sector = u64::from(queue) * 60 + 2 * number;
                    let kind = if number % 2 == 0 { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
                    rig.driver.fill(place(slot) + 0x1000, &[(slot + round) as u8; 1024]);
                    rig.add(queue, slot, kind, sector, 1024);
                }
                rig.driver.registers.kick(queue);
            }
            for queue in 0..4 {
                rig.wait_used(queue, 30);
                for number in 0..30 {
                    let slot = u64::from(queue) * 30 + number;
                    assert_eq!(rig.status(slot), VIRTIO_BLK_S_OK, "{way:?} {queue} {number}");
                    if number % 2 == 1 {
                        let sector = u64::from(queue) * 60 + 2 * number;
                        let expected = [[sector as u8; 512], [sector as u8 + 1; 512]].concat();
                        assert_eq!(rig.data(slot, 1024), expected, "{way:?} {queue} {number}");
                    }
                }
            }
            let mut seen = [0; 1024];
            file.read_exact_at(&mut seen, 60 * 512).unwrap();
            assert_eq!(seen, [(30 + round) as u8; 1024]);
        }
        rig.add(1, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
        rig.driver.registers.kick(1);
        rig.wait_used(1, 1);
        assert_eq!(rig.status(0), VIRTIO_BLK_S_OK);
        assert!(rig.reports.try_recv().is_err());
    }
}

#[test]
fn what_the_guest_gets_wrong_is_its_own_error_either_way() {
    for (way, mut rig) in both(numbered, RateLimit::default()) {
        for (kind, sector, bytes, status) in [
            (VIRTIO_BLK_T_IN, SECTORS, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, u64::MAX, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_OUT, SECTORS - 1, 1024, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_OUT, 0, 513, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, 0, 300, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, SECTORS - 1, 512, VIRTIO_BLK_S_OK),
            (VIRTIO_BLK_T_IN, SECTORS, 0, VIRTIO_BLK_S_OK),
            (VIRTIO_BLK_T_OUT, 0, 0, VIRTIO_BLK_S_OK),
            (VIRTIO_BLK_T_GET_ID, 0, 512, VIRTIO_BLK_S_OK),
        ] {
            rig.add(0, 0, kind, sector, bytes);
            rig.driver.registers.kick(0);
            rig.wait_used(0, 1);
            assert_eq!(rig.status(0), status, "{way:?}: {kind} {sector} {bytes}");
        }
        // A sector in more pieces than any honest driver makes of it.
        let many = if way == Way::Ring { VIRTIO_BLK_S_IOERR } else { VIRTIO_BLK_S_OK };
        for (pieces, bytes, status) in [(256, 2, VIRTIO_BLK_S_OK), (512, 1, many)] {
            rig.driver
                .fill(place(0), &[VIRTIO_BLK_T_IN.to_le_bytes().as_slice(), &[0; 4], &9u64.to_le_bytes()].concat());
            let mut chain = vec![readable(place(0), 16)];
            chain.extend((0..pieces).map(|number| writable(place(0) + 0x1000 + number * bytes, bytes as u32)));
            chain.push(writable(place(0) + 16, 1));
            rig.driver.add_indirect(0, place(20), &chain);
            rig.driver.registers.kick(0);
            rig.wait_used(0, 1);
            assert_eq!(rig.status(0), status, "{way:?} {pieces}");
            assert!(status != VIRTIO_BLK_S_OK || rig.data(0, 512) == [9; 512]);
        }
        assert!(rig.reports.try_recv().is_err(), "no host fault");
    }
}

#[test]
fn a_request_that_is_done_first_is_given_back_first() {
    let Some((mut rig, mut other)) = slow(2) else { return };
    rig.start(VERSION_1 | MQ);
    let read = rig.add(0, 0, VIRTIO_BLK_T_IN, 0, 512);
    let write = rig.add(0, 1, VIRTIO_BLK_T_OUT, 0, 512);
    rig.driver.registers.kick(0);
    assert_eq!(rig.wait_used(0, 1), [write]);
    // New requests are seen while others are in flight, in this queue and in another.
    for queue in [0, 1] {
        let write = rig.add(queue, 2, VIRTIO_BLK_T_OUT, 0, 512);
        rig.driver.registers.kick(queue);
        assert_eq!(rig.wait_used(queue, 1), [write]);
    }
    other.read_exact(&mut [0; 3 * 512]).unwrap();
    assert_eq!(rig.status(0), 0xaa);
    other.write_all(&[7; 512]).unwrap();
    assert_eq!(rig.wait_used(0, 1), [read]);
    assert_eq!((rig.status(0), rig.data(0, 512)), (VIRTIO_BLK_S_OK, vec![7; 512]));
}

#[test]
fn hold_and_reset_wait_for_all_that_is_in_flight() {
    let Some((mut rig, mut other)) = slow(1) else { return };
    for reset in [false, true] {
        rig.start(VERSION_1);
        for slot in 0..32 {
            rig.add(0, slot, VIRTIO_BLK_T_IN, 0, 512);
        }
        // Behind them one that is done: they were begun.
        rig.add(0, 32, VIRTIO_BLK_T_OUT, 0, 512);
        rig.driver.registers.kick(0);
        rig.driver.wait_used(0);
        other.read_exact(&mut [0; 512]).unwrap();
        let (worker, mut registers) = (rig.worker.clone(), rig.driver.other_vcpu());
        let stopper = thread::spawn(move || if reset { registers.reset() } else { worker.hold() });
        eventually("the stop is asked", || rig.worker.is_stopping());
        other.write_all(&[5; 31 * 512]).unwrap();
        eventually("most are done", || rig.driver.used_index(0) == 32);
        assert!(!stopper.is_finished(), "one is in flight");
        other.write_all(&[5; 512]).unwrap();
        stopper.join().unwrap();
        for slot in 0..32 {
            assert_eq!((rig.status(slot), rig.data(slot, 512)), (VIRTIO_BLK_S_OK, vec![5; 512]), "{slot}");
        }
        assert_eq!(rig.driver.used_index(0), 33);
        assert!(rig.waiting().is_empty(), "all are done");
        if reset {
            rig.driver.fill(BUFFERS, &[0x5a; 0x10_0000]);
            other.write_all(&[6; 512]).unwrap();
            rig.worker.hold();
            assert_eq!(rig.driver.bytes(BUFFERS, 0x10_0000), vec![0x5a; 0x10_0000], "nothing is touched any more");
        } else {
            rig.add(0, 33, VIRTIO_BLK_T_OUT, 0, 512);
            rig.driver.registers.kick(0);
            assert_eq!(rig.driver.used_index(0), 33);
            rig.worker.release();
            rig.wait_used(0, 33);
            other.read_exact(&mut [0; 512]).unwrap();
        }
    }
    rig.worker.release();
    rig.start(VERSION_1);
    rig.add(0, 0, VIRTIO_BLK_T_IN, 0, 512);
    rig.driver.registers.kick(0);
    rig.wait_used(0, 1);
    assert_eq!(rig.data(0, 512), [6; 512], "the next driver is served");
}

#[test]
fn a_fault_within_a_burst_keeps_what_failed_in_order() {
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        for way in [Way::Ring, Way::OneByOne] {
            let file = numbered();
            let other = file.try_clone().unwrap();
            let Some(mut rig) = plug(file, way, 1, RateLimit::default()) else { continue };
            // Every third sector is behind the cut. A write fails wherever it goes.
            other.set_len(SECTORS / 2 * 512).unwrap();
            let sector = |slot: u64| if slot % 3 == 2 { SECTORS - 30 + slot } else { slot };
            rig.worker.hold();
            let heads: Vec<u16> = (0..24).map(|slot| rig.add(0, slot, kind, sector(slot), 512)).collect();
            rig.driver.registers.kick(0);
            rig.worker.release();
            let said = rig.reports.recv_timeout(DEADLINE).unwrap();
            assert!(said.contains("shorter"), "{said}");
            rig.worker.hold();
            rig.worker.release();
            rig.reports.recv_timeout(DEADLINE).unwrap();
            rig.worker.hold();
            assert!(rig.reports.try_recv().is_err(), "one report for each attempt");
            let all: Vec<u16> = rig.waiting().iter().map(|waiting| waiting.head).collect();
            let done = usize::from(rig.driver.used_index(0));
            if way == Way::Ring && kind == VIRTIO_BLK_T_IN {
                let expected: Vec<u16> = heads.iter().copied().skip(2).step_by(3).collect();
                assert_eq!((all, done), (expected, 16));
            } else if way == Way::OneByOne {
                let first = if kind == VIRTIO_BLK_T_IN { 2 } else { 0 };
                assert_eq!((all, done), (vec![heads[first]], first));
            } else {
                assert_eq!((all.first(), done), (heads.first(), 0));
                assert!(all.is_sorted(), "{all:?}");
            }
            other.set_len(SECTORS * 512).unwrap();
            rig.worker.release();
            let mut used = rig.wait_used(0, 24);
            used.sort_unstable();
            assert_eq!(used, heads, "each once");
            assert!((0..24).all(|slot| rig.status(slot) == VIRTIO_BLK_S_OK));
            rig.worker.hold();
            assert!(rig.waiting().is_empty());
            assert!(rig.reports.try_recv().is_err());
        }
    }
}

#[test]
fn a_reset_drops_what_waits_for_the_host() {
    let file = numbered();
    let Some(mut rig) = plug(file.try_clone().unwrap(), Way::Ring, 1, RateLimit::default()) else { return };
    file.set_len(512).unwrap();
    for slot in 0..8 {
        rig.add(0, slot, VIRTIO_BLK_T_IN, 9, 512);
    }
    rig.driver.registers.kick(0);
    rig.reports.recv_timeout(DEADLINE).unwrap();
    rig.driver.registers.reset();
    assert!(rig.waiting().is_empty());
    rig.start(VERSION_1);
    rig.add(0, 10, VIRTIO_BLK_T_IN, 0, 512);
    rig.driver.registers.kick(0);
    rig.wait_used(0, 1);
    assert_eq!(rig.driver.used_index(0), 1);
}

#[test]
fn requests_that_waited_before_the_start_are_done_first_and_checked_as_any() {
    for way in [Way::Ring, Way::OneByOne] {
        let Some(mut rig) = plug(numbered(), way, 2, RateLimit::default()) else { continue };
        let wait = |rig: &mut Rig, waiting: &[Waiting]| {
            rig.worker.while_out(|requests: &mut Requests, _| requests.set_waiting(waiting.to_vec()));
        };
        rig.driver.prepare(VERSION_1 | MQ, RING);
        let heads = [(1, 0), (0, 1), (1, 2)].map(|(queue, slot)| {
            let head = rig.add(queue, slot, VIRTIO_BLK_T_IN, slot, 512);
            // It was popped once, so the ring that this device sees begins behind it.
            rig.driver.set_available(queue, 0);
            Waiting { queue, head }
        });
        wait(&mut rig, &heads);
        rig.driver.driver_ok();
        assert_eq!(rig.wait_used(1, 2), [heads[0].head, heads[2].head], "{way:?}");
        assert_eq!(rig.wait_used(0, 1), [heads[1].head]);
        assert_eq!([0, 1, 2].map(|slot| rig.data(slot, 1)), [[0], [1], [2]]);
        for (queue, head) in [(2, 0), (u16::MAX, 0), (0, RING), (0, u16::MAX), (1, 100)] {
            rig.driver.prepare(VERSION_1 | MQ, RING);
            wait(&mut rig, &[Waiting { queue, head }]);
            rig.driver.driver_ok();
            rig.driver.registers.wait_needs_reset();
        }
        rig.start(VERSION_1);
        rig.add(0, 0, VIRTIO_BLK_T_IN, 7, 512);
        rig.driver.registers.kick(0);
        rig.wait_used(0, 1);
        assert_eq!(rig.data(0, 512), [7; 512]);
    }
}

#[test]
fn what_waits_in_several_queues_is_done_in_order_by_a_restored_device() {
    for way in [Way::Ring, Way::OneByOne] {
        let file = numbered();
        let plug = || plug(file.try_clone().unwrap(), way, 2, RateLimit::default());
        let (Some(mut first), Some(mut second)) = (plug(), plug()) else { continue };
        file.set_len(512).unwrap();
        first.start(VERSION_1 | MQ | EVENT_IDX);
        first.worker.hold();
        let heads: Vec<(u16, u16)> = (0..16)
            .map(|slot| {
                let queue = slot as u16 % 2;
                (queue, first.add(queue, slot, VIRTIO_BLK_T_IN, 100 + slot, 512))
            })
            .collect();
        first.worker.release();
        first.reports.recv_timeout(DEADLINE).unwrap();
        first.worker.hold();
        let waiting: Vec<(u16, u16)> = first.waiting().iter().map(|each| (each.queue, each.head)).collect();
        let begun = if way == Way::Ring { 16 } else { 1 };
        assert_eq!(waiting, heads[..begun], "{way:?}");
        second.worker.hold();
        second.driver.take_over(&first.driver);
        assert_eq!(second.waiting(), first.waiting());
        number(&file);
        second.worker.release();
        for queue in [0, 1] {
            let mut used = second.wait_used(queue, 8);
            if way == Way::Ring {
                used.sort_unstable();
            }
            let expected: Vec<u16> = heads.iter().filter(|(own, _)| *own == queue).map(|(_, head)| *head).collect();
            assert_eq!(used, expected, "{way:?}: each once");
        }
        for slot in 0..16 {
            assert_eq!((second.status(slot), second.data(slot, 512)), (VIRTIO_BLK_S_OK, vec![100 + slot as u8; 512]));
        }
        second.worker.hold();
        assert!(second.waiting().is_empty() && second.reports.try_recv().is_err());
    }
}

#[test]
fn queues_that_the_driver_leaves_out_are_not_missed() {
    for way in [Way::Ring, Way::OneByOne] {
        let Some(mut rig) = plug(numbered(), way, 9, RateLimit::default()) else { continue };
        assert_ne!(rig.driver.offered() & MQ, 0);
        assert_eq!(rig.driver.registers.read(Region::Device, 34, Width::B2), 4, "at most");
        rig.driver.prepare(VERSION_1 | MQ, RING);
        rig.driver.use_msix();
        for queue in [1, 3] {
            rig.driver.registers.write(Region::Common, 0x16, Width::B2, queue);
            rig.driver.registers.write(Region::Common, 0x1c, Width::B2, 0);
        }
        rig.driver.driver_ok();
        for queue in [2, 0, 2, 2] {
            let before = rig.driver.messages(1 + u32::from(queue));
            rig.add(queue, 0, VIRTIO_BLK_T_IN, 3, 512);
            rig.driver.registers.kick(queue);
            rig.wait_used(queue, 1);
            assert_eq!(rig.data(0, 512), [3; 512]);
            eventually("its interrupt", || rig.driver.messages(1 + u32::from(queue)) == before + 1);
        }
        for queue in [1, 3] {
            rig.driver.registers.kick(queue);
        }
        assert_eq!(rig.driver.registers.status() & NEEDS_RESET, 0);
    }
    let mut one = plug(numbered(), Way::OneByOne, 1, RateLimit::default()).unwrap();
    assert_eq!((one.driver.offered() & MQ, one.driver.queues()), (0, 1));
    assert_eq!(one.driver.registers.read(Region::Device, 34, Width::B2), 0);
}

#[test]
fn a_burst_is_one_interrupt() {
    let Some(mut rig) = plug(numbered(), Way::Ring, 1, RateLimit::default()) else { return };
    for round in 1..=3 {
        rig.worker.hold();
        rig.add_reads(32);
        rig.worker.release();
        rig.wait_used(0, 32);
        eventually("an interrupt", || rig.driver.messages(1) >= round);
    }
    rig.worker.hold();
    // One each where all is in the page cache; a few where the kernel had to fetch something.
    assert!(rig.driver.messages(1) < 24, "{}", rig.driver.messages(1));
}

#[test]
fn a_limit_slows_requests_down_and_can_be_lifted() {
    let per_s = NonZeroU64::new;
    let limit = RateLimit { bytes_per_s: None, operations_per_s: per_s(4) };
    for (way, mut rig) in both(numbered, limit) {
        let start = Instant::now();
        rig.add_reads(30);
        rig.driver.registers.kick(0);
        rig.wait_used(0, 7);
        // A burst of four, one on credit, then one each quarter of a second.
        assert!(start.elapsed() >= Duration::from_millis(400), "{way:?}: {:?}", start.elapsed());
        rig.limits.set(RateLimit::default());
        rig.wait_used(0, 23);
        assert!(start.elapsed() < Duration::from_secs(5), "{way:?}: {:?}", start.elapsed());
        // Hold and reset do not wait for the limit.
        rig.limits.set(RateLimit { bytes_per_s: per_s(1), operations_per_s: None });
        rig.add_reads(3);
        rig.driver.registers.kick(0);
        rig.wait_used(0, 1);
        let start = Instant::now();
        rig.worker.hold();
        assert_eq!(rig.driver.used(0), None, "the second waits");
        rig.worker.release();
        rig.driver.registers.reset();
        assert!(start.elapsed() < Duration::from_secs(10), "{way:?}");
    }
}

#[test]
fn ranges_are_discarded_and_zeroed_beside_what_is_in_flight() {
    for (way, mut rig) in both(numbered, RateLimit::default()) {
        for (slot, kind) in [(1, VIRTIO_BLK_T_DISCARD), (2, VIRTIO_BLK_T_WRITE_ZEROES)] {
            let at = place(slot);
            rig.driver.fill(at, &[kind.to_le_bytes().as_slice(), &[0; 12]].concat());
            let range = [(8 * slot).to_le_bytes().as_slice(), &8u32.to_le_bytes(), &[0; 4]].concat();
            rig.driver.fill(at + 0x1000, &range);
            rig.add(0, 8 + slot, VIRTIO_BLK_T_IN, 100, 512);
            rig.driver.add(0, &[readable(at, 16), readable(at + 0x1000, 16), writable(at + 16, 1)]);
            rig.driver.registers.kick(0);
            rig.wait_used(0, 2);
            assert_eq!(rig.status(slot), VIRTIO_BLK_S_OK, "{way:?}");
        }
        rig.add(0, 0, VIRTIO_BLK_T_IN, 16, 4096);
        rig.driver.registers.kick(0);
        rig.wait_used(0, 1);
        assert_eq!(rig.data(0, 4096), [0; 4096], "{way:?}");
    }
}
