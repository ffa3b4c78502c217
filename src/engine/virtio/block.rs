//! virtio-blk (virtio 1.2, 5.2) on a block backend. Up to four queues, one worker: what it does with a request is in `requests.rs`.

mod requests;
mod saved;

use std::{io, slice, sync::Arc};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use self::requests::Requests;
use super::{Features, Kind, VirtioDevice, Worker};
use crate::engine::{
    disk::{BlockBackend, SECTOR_BYTES},
    fault::FaultReport,
    rate_limit::{Meter, RateLimits},
    timer::Clock,
    uring::Ring,
};

const QUEUE_SIZE: u16 = 256;
/// More queues than vCPUs are of no use, and more than these are not either: one thread serves them.
pub const QUEUES_MAX: u16 = 4;
static QUEUE_SIZES: [u16; QUEUES_MAX as usize] = [QUEUE_SIZE; QUEUES_MAX as usize];
/// Requests of all queues that the kernel works on at once.
const IN_FLIGHT_MAX: usize = 256;
/// Data segments of one request: the ring less header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
const SERIAL_BYTES: usize = 20;
const CONFIG_BYTES: usize = 60;
/// Ranges of one request to discard, and sectors of one range to discard or to zero. Zeros may have to be written: one range of 32 MiB
/// in a request, so that it stays short.
const RANGES_MAX: u32 = 16;
const DISCARD_SECTORS_MAX: u32 = 1 << 22;
const ZERO_SECTORS_MAX: u32 = 1 << 16;
/// What is freed, in sectors: a block of the host's file system.
const DISCARD_ALIGNMENT: u32 = 8;
/// The same as a power of two: what is written faster than parts of it (`physical_block_exp`).
const PHYSICAL_BLOCK_EXP: u8 = DISCARD_ALIGNMENT.ilog2() as u8;

pub struct Block {
    worker: Worker,
    config: [u8; CONFIG_BYTES],
    offered: Features,
    queues: u16,
}

/// A request that was taken from its queue and is not done: the host could not serve it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waiting {
    /// The queue's number, and the descriptor that its chain begins with. The chain itself is the device's until it is used
    /// (virtio 1.2, 2.7.13.1), so it is still there.
    queue: u16,
    head: u16,
}

/// What a disk is made with beside its bytes.
pub struct BlockOptions<'a> {
    /// Shows up in the guest as the disk's id, at most 20 bytes.
    pub serial: &'a str,
    /// Request queues: one for each vCPU. More than `QUEUES_MAX` are not made.
    pub queues: u16,
    pub limits: RateLimits,
    pub faults: FaultReport,
}

impl Block {
    /// Requests go through the kernel's ring where the disk is a raw file and the host lets us have one, and one by one otherwise.
    pub fn new(disk: Arc<dyn BlockBackend>, options: BlockOptions<'_>) -> io::Result<Block> {
        let raw = Arc::clone(&disk).raw();
        let ring = raw.and_then(|raw| Ring::new(raw.file(), IN_FLIGHT_MAX).ok());
        Block::with_ring(disk, options, ring)
    }

    /// `ring` is for the file of `disk`; `None` for requests one by one.
    fn with_ring(disk: Arc<dyn BlockBackend>, options: BlockOptions<'_>, ring: Option<Ring>) -> io::Result<Block> {
        let BlockOptions { serial, queues, limits, faults } = options;
        let shape = disk.shape();
        let queues = queues.clamp(1, QUEUES_MAX);
        let mut config = [0; CONFIG_BYTES];
        config[0..8].copy_from_slice(&(shape.size_bytes / SECTOR_BYTES).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        config[24] = PHYSICAL_BLOCK_EXP;
        config[26..28].copy_from_slice(&(DISCARD_ALIGNMENT as u16).to_le_bytes()); // min_io_size
        let mut offered = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        offered |= 1 << VIRTIO_BLK_F_TOPOLOGY;
        if queues > 1 {
            offered |= 1 << VIRTIO_BLK_F_MQ;
            config[34..36].copy_from_slice(&queues.to_le_bytes());
        }
        if shape.read_only {
            offered |= 1 << VIRTIO_BLK_F_RO;
        } else {
            offered |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            let limits = [DISCARD_SECTORS_MAX, RANGES_MAX, DISCARD_ALIGNMENT, ZERO_SECTORS_MAX, 1];
            for (into, limit) in config[36..56].chunks_exact_mut(4).zip(limits) {
                into.copy_from_slice(&limit.to_le_bytes());
            }
            config[56] = 1; // zeroed space may be freed
        }
        let mut id = [0; SERIAL_BYTES];
        for (into, byte) in id.iter_mut().zip(serial.bytes()) {
            *into = byte;
        }
        let meter = Meter::new(limits, Clock::monotonic());
        let requests = Requests::new(disk, id, ring, meter, faults);
        Ok(Block { worker: Worker::spawn("disk", requests)?, config, offered, queues })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }
    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES.get(..usize::from(self.queues)).unwrap_or(&QUEUE_SIZES)
    }
    fn offered(&self) -> Features {
        self.offered
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        for (byte, from) in into.iter_mut().zip(self.config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

#[cfg(test)]
mod ring_tests;

#[cfg(test)]
mod tests {
    use std::{
        sync::{Condvar, Mutex, mpsc},
        thread,
    };

    use virtio_bindings::virtio_blk::{
        VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    };

    use super::*;
    use crate::engine::{
        bus::Width,
        disk::{BlockError, DiskShape},
        memory::{GuestRam, RamSpan},
        rate_limit::RateLimit,
        saved::{
            SaveState,
            testing::{matches_golden, spoil},
        },
        virtio::{
            queue,
            testing::{
                BUFFERS, DEADLINE, Driver, EVENT_IDX, INDIRECT, NEEDS_RESET, Region, Used, VERSION_1, eventually,
                readable, writable,
            },
        },
    };

    const DISK_BYTES: usize = 64 << 10;
    const HEADER: u64 = BUFFERS;
    const STATUS: u64 = BUFFERS + 0x100;
    const DATA: u64 = BUFFERS + 0x1000;

    /// A disk in memory that fails when told so, and waits at a gate.
    #[derive(Default)]
    struct Memory {
        state: Mutex<MemoryState>,
        changed: Condvar,
        read_only: bool,
    }

    #[derive(Default)]
    struct MemoryState {
        bytes: Vec<u8>,
        full: bool,
        closed: bool,
        waiting: bool,
        /// What was done, in order.
        done: Vec<String>,
    }

    impl Memory {
        fn new(read_only: bool) -> Arc<Memory> {
            let state = MemoryState { bytes: vec![0; DISK_BYTES], ..Default::default() };
            Arc::new(Memory { state: Mutex::new(state), read_only, ..Default::default() })
        }
        fn set(&self, change: impl FnOnce(&mut MemoryState)) {
            change(&mut self.state.lock().unwrap());
            self.changed.notify_all();
        }
        fn done(&self) -> Vec<String> {
            self.state.lock().unwrap().done.clone()
        }
        fn byte(&self, at: usize) -> u8 {
            self.state.lock().unwrap().bytes[at]
        }
        fn wait_until_somebody_waits(&self) {
            eventually("a request at the gate", || self.state.lock().unwrap().waiting);
        }
        fn transfer(
            &self,
            at: u64,
            spans: &[RamSpan],
            mut copy: impl FnMut(&mut [u8], RamSpan),
        ) -> Result<(), BlockError> {
            let mut state = self.state.lock().unwrap();
            state.waiting = true;
            let mut state = self.changed.wait_while(state, |state| state.closed).unwrap();
            state.waiting = false;
            if state.full {
                return Err(BlockError::NoSpace);
            }
            let bytes = queue::bytes(spans);
            let (size_bytes, end) = (DISK_BYTES as u64, at.saturating_add(bytes));
            if end > size_bytes {
                return Err(BlockError::OutOfRange { end, size_bytes });
            }
            let mut at = at as usize;
            for span in spans {
                copy(&mut state.bytes[at..at + span.bytes as usize], *span);
                at += span.bytes as usize;
            }
            Ok(())
        }
        fn note(&self, what: String) {
            self.state.lock().unwrap().done.push(what);
        }
    }

    impl BlockBackend for Memory {
        fn shape(&self) -> DiskShape {
            DiskShape { size_bytes: DISK_BYTES as u64, read_only: self.read_only }
        }
        fn read(&self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<(), BlockError> {
            self.transfer(at, into, |bytes, span| ram.write(span.at, bytes).unwrap())?;
            self.note(format!("read {} at {at}", queue::bytes(into)));
            Ok(())
        }
        fn write(&self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<(), BlockError> {
            if self.read_only {
                return Err(BlockError::ReadOnly);
            }
            self.transfer(at, from, |bytes, span| ram.read(span.at, bytes).unwrap())?;
            self.note(format!("write {} at {at}", queue::bytes(from)));
            Ok(())
        }
        fn read_bytes(&self, _: u64, _: &mut [u8]) -> Result<(), BlockError> {
            Err(BlockError::BadSpan)
        }
        fn write_bytes(&self, _: u64, _: &[u8]) -> Result<(), BlockError> {
            Err(BlockError::BadSpan)
        }
        fn flush(&self) -> Result<(), BlockError> {
            self.transfer(0, &[], |_, _| {})?;
            self.note("flush".into());
            Ok(())
        }
        fn discard(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
            self.transfer(0, &[], |_, _| {})?;
            self.note(format!("discard {bytes} at {at}"));
            Ok(())
        }
        fn write_zeroes(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
            self.transfer(0, &[], |_, _| {})?;
            self.note(format!("zero {bytes} at {at}"));
            Ok(())
        }
    }

    struct Rig {
        driver: Driver,
        disk: Arc<Memory>,
        worker: Worker,
        reports: mpsc::Receiver<String>,
    }

    fn rig_of(read_only: bool) -> Rig {
        let disk = Memory::new(read_only);
        let (tell, reports) = mpsc::channel();
        let tell = Mutex::new(tell);
        let faults: FaultReport = Arc::new(move |reason| drop(tell.lock().unwrap().send(reason)));
        let limits = RateLimits::new(RateLimit::default()).unwrap();
        let serial = "serial-of-a-disk-that-is-long";
        let block = Block::new(Arc::clone(&disk) as _, BlockOptions { serial, queues: 1, limits, faults }).unwrap();
        let worker = block.workers()[0].clone();
        Rig { driver: Driver::plug(block), disk, worker, reports }
    }

    fn rig() -> Rig {
        let mut rig = rig_of(false);
        rig.driver.start(VERSION_1);
        rig
    }

    impl Rig {
        fn header(&self, at: u64, kind: u32, sector: u64) {
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            self.driver.fill(at, &header);
        }
        fn status(&self, at: u64) -> u32 {
            self.driver.bytes(at, 1)[0].into()
        }
        /// One request with its data in one piece; gives the status and the used length.
        fn request(&mut self, kind: u32, sector: u64, data: u32) -> (u32, u32) {
            self.header(HEADER, kind, sector);
            self.driver.fill(STATUS, &[0xaa]);
            let data = if kind & 1 != 0 { readable(DATA, data) } else { writable(DATA, data) };
            let used = self.driver.run(0, &[readable(HEADER, 16), data, writable(STATUS, 1)]);
            (self.status(STATUS), used.bytes)
        }
        /// Queues a write of a sector full of `byte`, the `slot`th of several at once.
        fn submit_write(&mut self, slot: u64, sector: u64, byte: u8) -> u16 {
            let (header, data) = (HEADER + 0x8000 * (slot + 1), DATA + 0x8000 * (slot + 1));
            self.header(header, VIRTIO_BLK_T_OUT, sector);
            self.driver.fill(data, &[byte; 512]);
            self.driver.fill(header + 0x100, &[0xaa]);
            self.driver.submit(0, &[readable(header, 16), readable(data, 512), writable(header + 0x100, 1)])
        }
        fn status_of(&self, slot: u64) -> u32 {
            self.status(HEADER + 0x8000 * (slot + 1) + 0x100)
        }
    }

    #[test]
    fn the_configuration_says_what_the_disk_is() {
        let mut rig = rig_of(false);
        let offered = rig.driver.offered();
        assert_eq!(offered & 1 << VIRTIO_BLK_F_RO, 0);
        for feature in [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH] {
            assert_ne!(offered & 1 << feature, 0, "{feature}");
        }
        let registers = &mut rig.driver.registers;
        assert_eq!(registers.read(Region::Device, 0, Width::B8), DISK_BYTES as u64 / 512);
        assert_eq!(registers.read(Region::Device, 12, Width::B4), 254);
        assert_eq!(registers.read(Region::Device, 20, Width::B4), 512);
        assert_eq!(registers.read(Region::Device, 60, Width::B4), 0, "zero behind the end");
        let limits = [36, 40, 44, 48, 52, 56].map(|at| registers.read(Region::Device, at, Width::B4));
        assert_eq!(limits, [1 << 22, 16, 8, 1 << 16, 1, 1]);
        registers.write(Region::Device, 0, Width::B8, 1);
        assert_eq!(registers.read(Region::Device, 0, Width::B8), DISK_BYTES as u64 / 512, "read-only");
        let read_only = rig_of(true).driver.offered();
        assert_ne!(read_only & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(read_only & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    }

    #[test]
    fn ranges_are_discarded_and_zeroed_all_or_none() {
        let mut rig = rig();
        let range = |sector: u64, sectors: u32, flags: u32| {
            [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        let mut ask = |kind, ranges: &[Vec<u8>]| {
            let bytes = ranges.concat();
            rig.driver.fill(DATA, &bytes);
            rig.request(kind, 0, bytes.len() as u32).0
        };
        let (discard, zero) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
        assert_eq!(ask(discard, &[range(8, 16, 0), range(0, 1, 0)]), VIRTIO_BLK_S_OK);
        assert_eq!(ask(zero, &[range(1, 2, 1)]), VIRTIO_BLK_S_OK);
        assert_eq!(ask(zero, &[range(127, 1, 0)]), VIRTIO_BLK_S_OK);
        let wrong = [
            (discard, vec![range(0, 1, 0), range(127, 2, 0)], VIRTIO_BLK_S_IOERR),
            (discard, vec![range(u64::MAX, u32::MAX, 0)], VIRTIO_BLK_S_IOERR),
            (discard, vec![range(u64::MAX, 1, 0)], VIRTIO_BLK_S_IOERR),
            (discard, vec![range(0, 1, 1)], VIRTIO_BLK_S_UNSUPP),
            (zero, vec![range(0, 1, 2)], VIRTIO_BLK_S_UNSUPP),
            (zero, vec![range(0, (1 << 16) + 1, 0)], VIRTIO_BLK_S_IOERR),
            (zero, vec![vec![0; 8]], VIRTIO_BLK_S_IOERR),
            (zero, vec![], VIRTIO_BLK_S_IOERR),
            (discard, vec![range(0, 1, 0); 17], VIRTIO_BLK_S_IOERR),
            (zero, vec![range(0, 1, 0); 2], VIRTIO_BLK_S_IOERR),
        ];
        for (kind, ranges, status) in wrong {
            assert_eq!(ask(kind, &ranges), status, "{kind} {ranges:?}");
        }
        let done = ["discard 8192 at 4096", "discard 512 at 0", "zero 1024 at 512", "zero 512 at 65024"];
        assert_eq!(rig.disk.done(), done);
    }

    #[test]
    fn sectors_are_written_read_back_and_flushed() {
        for features in [VERSION_1, VERSION_1 | EVENT_IDX | INDIRECT | 1 << VIRTIO_BLK_F_FLUSH] {
            let mut rig = rig();
            rig.driver.start(features);
            rig.driver.fill(DATA, &[7; 1024]);
            assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 3, 1024), (VIRTIO_BLK_S_OK, 1));
            rig.driver.fill(DATA, &[0; 2048]);
            assert_eq!(rig.request(VIRTIO_BLK_T_IN, 2, 1536), (VIRTIO_BLK_S_OK, 1537));
            assert_eq!(rig.driver.bytes(DATA, 1537), [vec![0; 512], vec![7; 1024], vec![0]].concat());
            assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, 0), (VIRTIO_BLK_S_OK, 1));
            assert_eq!(rig.disk.done(), ["write 1024 at 1536", "read 1536 at 1024", "flush"]);
            assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 0), (VIRTIO_BLK_S_OK, 1), "nothing to read is fine");
        }
    }

    #[test]
    fn a_request_may_be_cut_anywhere() {
        let mut rig = rig();
        rig.driver.fill(DATA, &[9; 1024]);
        rig.header(HEADER, VIRTIO_BLK_T_OUT, 0);
        let pieces = [readable(HEADER, 7), readable(HEADER + 7, 9), readable(DATA, 1), readable(DATA + 1, 511)];
        rig.driver.run(0, &[&pieces[..], &[writable(STATUS, 1)]].concat());
        assert_eq!((rig.status(STATUS), rig.disk.byte(511), rig.disk.byte(512)), (VIRTIO_BLK_S_OK, 9, 0));
        rig.driver.fill(HEADER + 0x200, &rig.driver.bytes(HEADER, 16));
        // Header and data in one piece; the status behind the data in one piece.
        rig.header(DATA - 16, VIRTIO_BLK_T_OUT, 2);
        rig.driver.run(0, &[readable(DATA - 16, 16 + 512), writable(STATUS, 1)]);
        assert_eq!(rig.disk.byte(1024), 9);
        rig.header(HEADER, VIRTIO_BLK_T_IN, 2);
        rig.driver.fill(DATA, &[0xaa; 600]);
        assert_eq!(rig.driver.run(0, &[readable(HEADER, 16), writable(DATA, 513)]).bytes, 513);
        assert_eq!(rig.driver.bytes(DATA, 514), [vec![9; 512], vec![0], vec![0xaa]].concat());
        rig.driver.add_indirect(
            0,
            BUFFERS + 0x8_0000,
            &[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)],
        );
        rig.driver.registers.kick(0);
        assert_eq!(rig.driver.wait_used(0).bytes, 513);
    }

    #[test]
    fn the_disk_is_named_in_twenty_bytes() {
        let mut rig = rig();
        rig.driver.fill(DATA, &[0xaa; 32]);
        assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, 20), (VIRTIO_BLK_S_OK, 21));
        assert_eq!(rig.driver.bytes(DATA, 21), b"serial-of-a-disk-tha\xaa");
        assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, 3), (VIRTIO_BLK_S_OK, 4));
    }

    #[test]
    fn what_the_guest_gets_wrong_is_its_own_error_and_changes_nothing() {
        let mut rig = rig();
        let sectors = DISK_BYTES as u64 / 512;
        rig.driver.fill(DATA, &[7; 2048]);
        for (kind, sector, data) in [
            (VIRTIO_BLK_T_OUT, 0, 100),
            (VIRTIO_BLK_T_OUT, 0, 513),
            (VIRTIO_BLK_T_IN, 0, 511),
            (VIRTIO_BLK_T_OUT, sectors, 512),
            (VIRTIO_BLK_T_OUT, sectors - 1, 1024),
            (VIRTIO_BLK_T_IN, u64::MAX, 512),
            (VIRTIO_BLK_T_OUT, u64::MAX / 512, 512),
            (VIRTIO_BLK_T_OUT, 1 << 55, 512),
        ] {
            assert_eq!(rig.request(kind, sector, data).0, VIRTIO_BLK_S_IOERR, "{kind} {sector} {data}");
        }
        for kind in [2, 3, 12, 14, u32::MAX] {
            assert_eq!(rig.request(kind, 0, 512).0, VIRTIO_BLK_S_UNSUPP, "{kind}");
        }
        assert_eq!(rig.disk.done(), [""; 0]);
        assert!(rig.reports.try_recv().is_err(), "no host fault");
        let mut rig = rig_of(true);
        rig.driver.start(VERSION_1);
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, 512).0, VIRTIO_BLK_S_IOERR);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_OK);
    }

    #[test]
    fn a_chain_without_room_for_header_or_status_needs_a_reset() {
        let mut rig = rig();
        for pieces in [
            vec![readable(HEADER, 16), readable(DATA, 512)],
            vec![readable(HEADER, 15), writable(STATUS, 1)],
            vec![writable(DATA, 512), writable(STATUS, 1)],
            vec![readable(HEADER, 16), writable(STATUS, 0)],
        ] {
            rig.header(HEADER, VIRTIO_BLK_T_IN, 0);
            rig.driver.submit(0, &pieces);
            rig.driver.registers.wait_needs_reset();
            assert_eq!(rig.driver.used_index(0), 0, "{pieces:?}");
            rig.driver.start(VERSION_1);
            assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_OK);
            rig.driver.start(VERSION_1);
        }
    }

    #[test]
    fn a_reset_waits_for_the_request_and_nothing_is_written_after_it() {
        let mut rig = rig();
        rig.disk.set(|state| state.closed = true);
        rig.header(HEADER, VIRTIO_BLK_T_IN, 0);
        for _ in 0..4 {
            rig.driver.submit(0, &[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
        }
        rig.disk.wait_until_somebody_waits();
        let mut registers = rig.driver.other_vcpu();
        let reset = thread::spawn(move || registers.reset());
        // The gate opens only when the reset has asked the worker to stop, so it cannot go on to the second request.
        eventually("the reset asks", || rig.worker.is_stopping());
        assert!(!reset.is_finished(), "it waits for the request");
        rig.disk.set(|state| state.closed = false);
        reset.join().unwrap();
        assert_eq!(rig.disk.done(), ["read 512 at 0"]);
        let size = 0x8_0000;
        rig.driver.fill(0x1_0000, &vec![0x5a; size]);
        rig.driver.registers.kick(0);
        rig.driver.fill(DATA, &[0x5a; 0x1000]);
        rig.worker.hold();
        rig.worker.release();
        assert_eq!(rig.driver.bytes(0x1_0000, size), vec![0x5a; size]);
        assert_eq!(rig.driver.bytes(DATA, 0x1000), [0x5a; 0x1000]);
        rig.driver.start(VERSION_1);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_OK);
    }

    #[test]
    fn a_full_host_holds_the_request_and_serves_it_once_when_there_is_space() {
        let mut rig = rig();
        rig.disk.set(|state| state.full = true);
        for slot in 0..3 {
            rig.submit_write(slot, slot, 1 + slot as u8);
        }
        let said = rig.reports.recv_timeout(DEADLINE).unwrap();
        assert!(said.contains("space"), "{said}");
        // The machine pauses the guest, and a person resumes it too early once.
        rig.worker.hold();
        rig.worker.release();
        rig.reports.recv_timeout(DEADLINE).unwrap();
        rig.worker.hold();
        assert!(rig.reports.try_recv().is_err(), "one report for each attempt");
        assert_eq!((rig.driver.used_index(0), rig.status_of(0)), (0, 0xaa));
        rig.disk.set(|state| state.full = false);
        assert_eq!(rig.disk.done(), [""; 0], "nothing before the guest goes on");
        rig.worker.release();
        let used: Vec<Used> = (0..3).map(|_| rig.driver.wait_used(0)).collect();
        assert_eq!(used, [0, 3, 6].map(|head| Used { head, bytes: 1 }));
        assert_eq!(rig.disk.done(), ["write 512 at 0", "write 512 at 512", "write 512 at 1024"]);
        assert_eq!([0, 512, 1024].map(|at| rig.disk.byte(at)), [1, 2, 3]);
        assert_eq!([0, 1, 2].map(|slot| rig.status_of(slot)), [VIRTIO_BLK_S_OK; 3]);
        assert!(rig.reports.try_recv().is_err());
        assert_eq!(rig.driver.registers.status() & NEEDS_RESET, 0);
    }

    #[test]
    fn a_reset_drops_the_request_that_waits_for_the_host() {
        let mut rig = rig();
        rig.disk.set(|state| state.full = true);
        rig.submit_write(0, 0, 1);
        rig.reports.recv_timeout(DEADLINE).unwrap();
        rig.driver.registers.reset();
        rig.disk.set(|state| state.full = false);
        rig.driver.start(VERSION_1);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_OK, "the new driver is served");
        rig.worker.hold();
        rig.worker.release();
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_OK);
        assert_eq!(rig.disk.done(), ["read 512 at 0", "read 512 at 0"], "the write never came");
        assert_eq!(rig.status_of(0), 0xaa);
    }

    #[test]
    fn nothing_is_served_while_held_and_no_kick_is_lost() {
        let mut rig = rig();
        for round in 0..20 {
            rig.worker.hold();
            rig.submit_write(0, round, 1 + round as u8);
            assert_eq!(rig.disk.byte(512 * round as usize), 0);
            assert!(rig.driver.used(0).is_none());
            rig.worker.release();
            rig.driver.wait_used(0);
            assert_eq!(rig.disk.byte(512 * round as usize), 1 + round as u8);
        }
        rig.worker.hold();
        rig.driver.start(VERSION_1);
        rig.submit_write(0, 40, 99);
        assert!(rig.driver.used(0).is_none(), "a driver that starts while the machine is paused waits too");
        rig.worker.release();
        rig.driver.wait_used(0);
    }

    /// Another handle on the device of a rig.
    fn twin(rig: &Rig) -> Block {
        Block { worker: rig.worker.clone(), config: [0; CONFIG_BYTES], offered: 0, queues: 1 }
    }

    /// A write that met a full host, and the machine paused.
    fn busy() -> Rig {
        let mut rig = rig();
        rig.disk.set(|state| state.full = true);
        rig.submit_write(0, 5, 0x77);
        rig.reports.recv_timeout(DEADLINE).unwrap();
        rig.worker.hold();
        rig
    }

    #[test]
    fn a_request_that_waits_for_the_host_is_done_once_after_a_restore() {
        let mut first = busy();
        let state = matches_golden(&twin(&first).save());
        let mut second = rig_of(false);
        second.worker.hold();
        second.driver.take_over(&first.driver);
        twin(&second).restore(&state).unwrap();
        for rig in [&mut first, &mut second] {
            rig.disk.set(|state| state.full = false);
            rig.worker.release();
            assert_eq!(rig.driver.wait_used(0), Used { head: 0, bytes: 1 });
            assert_eq!((rig.status_of(0), rig.disk.byte(5 * 512)), (VIRTIO_BLK_S_OK, 0x77));
            rig.worker.hold();
            assert!(twin(rig).save().fields::<saved::V1>("virtio-block", 1).unwrap().waiting.is_empty());
            rig.worker.release();
            assert_eq!(rig.request(VIRTIO_BLK_T_IN, 5, 512).0, VIRTIO_BLK_S_OK);
            assert_eq!(rig.disk.done(), ["write 512 at 2560", "read 512 at 2560"]);
        }
    }

    #[test]
    fn a_restored_request_may_wait_again() {
        let first = busy();
        let state = twin(&first).save();
        let mut rig = rig_of(false);
        rig.worker.hold();
        rig.disk.set(|state| state.full = true);
        rig.driver.take_over(&first.driver);
        twin(&rig).restore(&state).unwrap();
        rig.worker.release();
        rig.reports.recv_timeout(DEADLINE).unwrap();
        rig.worker.hold();
        assert_eq!(twin(&rig).save(), state);
    }

    #[test]
    fn no_saved_request_makes_it_panic_or_leave_ram() {
        let mut rig = rig();
        let mut refused = 0;
        spoil(&twin(&busy()).save(), |bad| {
            rig.worker.hold();
            rig.driver.start(VERSION_1);
            refused += usize::from(twin(&rig).restore(bad).is_err());
            rig.header(HEADER, VIRTIO_BLK_T_FLUSH, 0);
            rig.driver.submit(0, &[readable(HEADER, 16), writable(STATUS, 1)]);
            rig.worker.release();
            eventually("an end", || rig.driver.used(0).is_some() || rig.driver.registers.status() & NEEDS_RESET != 0);
        });
        assert!(refused > 20, "{refused}");
    }
}
