//! virtio-blk (virtio 1.2, 5.2) on a block backend. One queue, one worker; requests are done in order, straight between the
//! image and guest RAM.

use std::{io, mem, sync::Arc};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    Features, Kind, Running, VirtioDevice, Worker,
    parked::Parked,
    queue::{self, Chain, Malformed, VirtQueue},
};
use crate::engine::{
    disk::{BlockBackend, BlockError, SECTOR_BYTES},
    fault::FaultReport,
    memory::{GuestRam, RamSpan},
    saved::{BadState, SaveState, State},
    worker::{Served, Stop, Work},
};

const QUEUE_SIZE: u16 = 256;
/// Data segments of one request: the ring less header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
const HEADER_BYTES: u64 = 16;
const SERIAL_BYTES: usize = 20;
const CONFIG_BYTES: usize = 60;
/// Ranges of one request to discard, and sectors of one range to discard or to zero. Zeros may have to be written: one range of 32 MiB
/// in a request, so that it stays short.
const RANGES_MAX: u32 = 16;
const DISCARD_SECTORS_MAX: u32 = 1 << 22;
const ZERO_SECTORS_MAX: u32 = 1 << 16;
const RANGE_BYTES: usize = 16;
/// What is freed, in sectors: a block of the host's file system.
const DISCARD_ALIGNMENT: u32 = 8;

pub struct Block {
    worker: Worker,
    config: [u8; CONFIG_BYTES],
    offered: Features,
    /// A request that met a host fault and is done again when the guest goes on.
    parked: Parked,
}

impl Block {
    /// `serial` shows up in the guest as the disk's id, at most 20 bytes.
    pub fn new(disk: Arc<dyn BlockBackend>, serial: &str, faults: FaultReport) -> io::Result<Block> {
        let shape = disk.shape();
        let mut config = [0; CONFIG_BYTES];
        config[0..8].copy_from_slice(&(shape.size_bytes / SECTOR_BYTES).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        let mut offered = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
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
        let parked = Parked::default();
        let requests = Requests { disk, id, faults, chain: Chain::default(), data: Vec::new(), parked: parked.clone() };
        Ok(Block { worker: Worker::spawn("disk", requests)?, config, offered, parked })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }
    fn offered(&self) -> Features {
        self.offered
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        for (byte, from) in into.iter_mut().zip(self.config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn worker(&self) -> &Worker {
        &self.worker
    }
}

struct Requests {
    disk: Arc<dyn BlockBackend>,
    id: [u8; SERIAL_BYTES],
    faults: FaultReport,
    chain: Chain,
    /// The data of `chain` without header and status.
    data: Vec<RamSpan>,
    /// Where `chain` waits after a host fault.
    parked: Parked,
}

impl Work<Running> for Requests {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let queue = queues.first_mut().ok_or(Malformed)?;
        let mut parked = self.parked.take(ram)?;
        loop {
            queue.disable_kicks(ram)?;
            while self.next(ram, &mut parked, queue)? {
                let Some(written) = self.request(ram)? else {
                    self.parked.put(mem::take(&mut self.chain));
                    return Ok(Served::HostFault);
                };
                queue.push(ram, self.chain.head, written, interrupts)?;
                if stop.asked() {
                    return Ok(Served::Stopped);
                }
            }
            if queue.enable_kicks(ram)? {
                continue;
            }
            if !stop.wait(&[queue.kicked()]) {
                return Ok(Served::Stopped);
            }
            queue.kick.clear();
        }
    }

    fn forget(&mut self) {
        self.parked.forget();
    }
}

impl Requests {
    /// Takes the request that waited, or else the queue's next one, into `chain`; false when there is none.
    fn next(&mut self, ram: &GuestRam, parked: &mut Option<Chain>, queue: &mut VirtQueue) -> Result<bool, Malformed> {
        match parked.take() {
            Some(chain) => {
                self.chain = chain;
                Ok(true)
            }
            None => queue.pop(ram, &mut self.chain),
        }
    }

    /// Does the request in `chain`. Returns the bytes written to the guest; `None` when the host is at fault.
    fn request(&mut self, ram: &GuestRam) -> Result<Option<u32>, Malformed> {
        let mut header = [0; HEADER_BYTES as usize];
        if !self.chain.read(ram, 0, &mut header).map_err(|_| Malformed)? {
            return Err(Malformed);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let at = u64::from_le_bytes(sector).saturating_mul(SECTOR_BYTES);
        // The last writable byte is the status; without it nothing can be answered.
        let data_bytes = self.chain.writable_bytes().checked_sub(1).ok_or(Malformed)?;
        self.data.clear();
        let (result, read_bytes) = match kind {
            VIRTIO_BLK_T_IN => {
                self.data.extend_from_slice(&self.chain.writable);
                queue::truncate(&mut self.data, data_bytes);
                (whole_sectors(data_bytes).and_then(|()| self.disk.read(ram, at, &self.data)), data_bytes)
            }
            VIRTIO_BLK_T_OUT => {
                self.data.extend_from_slice(&self.chain.readable);
                queue::skip(&mut self.data, HEADER_BYTES);
                (whole_sectors(queue::bytes(&self.data)).and_then(|()| self.disk.write(ram, at, &self.data)), 0)
            }
            VIRTIO_BLK_T_FLUSH => (self.disk.flush(), 0),
            VIRTIO_BLK_T_GET_ID => {
                let bytes = (SERIAL_BYTES as u64).min(data_bytes);
                let id = self.id.get(..bytes as usize).unwrap_or_default();
                self.chain.write(ram, 0, id).map_err(|_| Malformed)?;
                (Ok(()), bytes)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.data.extend_from_slice(&self.chain.readable);
                queue::skip(&mut self.data, HEADER_BYTES);
                match self.ranges(ram, kind)? {
                    Some(result) => (result, 0),
                    None => return self.answer(ram, data_bytes, VIRTIO_BLK_S_UNSUPP, 0),
                }
            }
            _ => return self.answer(ram, data_bytes, VIRTIO_BLK_S_UNSUPP, 0),
        };
        match result {
            Ok(()) => self.answer(ram, data_bytes, VIRTIO_BLK_S_OK, read_bytes),
            Err(error) => match error.host_fault() {
                Some(reason) => {
                    (self.faults)(reason);
                    Ok(None)
                }
                None => self.answer(ram, data_bytes, VIRTIO_BLK_S_IOERR, 0),
            },
        }
    }

    /// Discards or zeroes the ranges that are the request's data (virtio 1.2, 5.2.6): all are checked before the first is touched.
    /// `None` for flags that the request has no business with.
    fn ranges(&self, ram: &GuestRam, kind: u32) -> Result<Option<Result<(), BlockError>>, Malformed> {
        let bytes = queue::bytes(&self.data);
        let zero = kind == VIRTIO_BLK_T_WRITE_ZEROES;
        let bytes_max = RANGE_BYTES as u64 * if zero { 1 } else { u64::from(RANGES_MAX) };
        if bytes == 0 || bytes > bytes_max || !bytes.is_multiple_of(RANGE_BYTES as u64) {
            return Ok(Some(Err(BlockError::BadSpan)));
        }
        let (sectors_max, flags_known) =
            if zero { (ZERO_SECTORS_MAX, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) } else { (DISCARD_SECTORS_MAX, 0) };
        let mut ranges = [(0, 0); RANGES_MAX as usize];
        let count = bytes as usize / RANGE_BYTES;
        for (index, range) in ranges.iter_mut().take(count).enumerate() {
            let mut raw = [0; RANGE_BYTES];
            let at = HEADER_BYTES + (index * RANGE_BYTES) as u64;
            if !self.chain.read(ram, at, &mut raw).map_err(|_| Malformed)? {
                return Err(Malformed);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            if u32::from_le_bytes([f0, f1, f2, f3]) & !flags_known != 0 {
                return Ok(None);
            }
            if sectors > sectors_max {
                return Ok(Some(Err(BlockError::BadSpan)));
            }
            let at = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).saturating_mul(SECTOR_BYTES);
            *range = (at, u64::from(sectors) * SECTOR_BYTES);
            let (end, size_bytes) = (at.saturating_add(range.1), self.disk.shape().size_bytes);
            if end > size_bytes {
                return Ok(Some(Err(BlockError::OutOfRange { end, size_bytes })));
            }
        }
        let mut wanted = ranges.iter().take(count);
        let done = wanted.try_for_each(|(at, bytes)| match zero {
            true => self.disk.write_zeroes(*at, *bytes),
            false => self.disk.discard(*at, *bytes),
        });
        Ok(Some(done))
    }

    fn answer(&self, ram: &GuestRam, status_at: u64, status: u32, read_bytes: u64) -> Result<Option<u32>, Malformed> {
        self.chain.write(ram, status_at, &[status as u8]).map_err(|_| Malformed)?;
        Ok(Some(read_bytes as u32 + 1))
    }
}

fn whole_sectors(bytes: u64) -> Result<(), BlockError> {
    if bytes.is_multiple_of(SECTOR_BYTES) { Ok(()) } else { Err(BlockError::BadSpan) }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::parked::ParkedV1;

    pub(super) const KIND: &str = "virtio-block";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) waiting: Option<ParkedV1>,
    }
}

impl SaveState for Block {
    fn save(&self) -> State {
        // The disk is another when its size or its features are.
        let Block { worker: _, config: _, offered: _, parked } = self;
        State::new(saved::KIND, 1, &saved::V1 { waiting: parked.save() })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { waiting } = state.fields(saved::KIND, 1)?;
        self.parked.restore(waiting).map_err(|why| BadState::new(saved::KIND, why))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Condvar, Mutex, mpsc},
        thread,
    };

    use super::*;
    use crate::engine::{
        bus::Width,
        disk::DiskShape,
        saved::testing::{matches_golden, spoil},
        virtio::testing::{
            BUFFERS, DEADLINE, Driver, EVENT_IDX, INDIRECT, NEEDS_RESET, Region, Used, VERSION_1, eventually, readable,
            writable,
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
        parked: Parked,
        reports: mpsc::Receiver<String>,
    }

    fn rig_of(read_only: bool) -> Rig {
        let disk = Memory::new(read_only);
        let (tell, reports) = mpsc::channel();
        let tell = Mutex::new(tell);
        let faults: FaultReport = Arc::new(move |reason| drop(tell.lock().unwrap().send(reason)));
        let block = Block::new(Arc::clone(&disk) as _, "serial-of-a-disk-that-is-long", faults).unwrap();
        let (worker, parked) = (block.worker().clone(), block.parked.clone());
        Rig { driver: Driver::plug(block), disk, worker, parked, reports }
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
        Block { worker: rig.worker.clone(), config: [0; CONFIG_BYTES], offered: 0, parked: rig.parked.clone() }
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
        second.driver.start(VERSION_1);
        let ram = first.driver.bytes(HEADER, 0x2_0000);
        second.driver.fill(HEADER, &ram);
        twin(&second).restore(&state).unwrap();
        for rig in [&mut first, &mut second] {
            rig.disk.set(|state| state.full = false);
            rig.worker.release();
            assert_eq!(rig.driver.wait_used(0), Used { head: 0, bytes: 1 });
            assert_eq!((rig.status_of(0), rig.disk.byte(5 * 512)), (VIRTIO_BLK_S_OK, 0x77));
            rig.worker.hold();
            assert!(twin(rig).save().fields::<saved::V1>("virtio-block", 1).unwrap().waiting.is_none());
            rig.worker.release();
            assert_eq!(rig.request(VIRTIO_BLK_T_IN, 5, 512).0, VIRTIO_BLK_S_OK);
            assert_eq!(rig.disk.done(), ["write 512 at 2560", "read 512 at 2560"]);
        }
    }

    #[test]
    fn a_restored_request_may_wait_again() {
        let state = twin(&busy()).save();
        let mut rig = busy();
        rig.driver.start(VERSION_1);
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
