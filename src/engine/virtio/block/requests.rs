//! What the worker of a disk does: it takes requests from the queues, begins them, and gives them back when they are done.
//!
//! ```text
//! waiting ─┐                 ┌─ the ring: many in flight, done in any order ─┐
//!          ├─ begin, within ─┤                                              ├─ settle ─┬─ answer ──▶ used ring
//! queues ──┘  the limit      └─ one by one: done when begun ─────────────────┘          └─ host fault ─▶ failed
//! ```
//!
//! A host fault ends the taking of requests. When nothing is in flight any more, what failed waits, oldest first, before what waited
//! already, and all of it is begun anew from its chain on release.

use std::{array, collections::VecDeque, sync::Arc, time::Duration};

use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{DISCARD_SECTORS_MAX, IN_FLIGHT_MAX, QUEUES_MAX, RANGES_MAX, SERIAL_BYTES, Waiting, ZERO_SECTORS_MAX};
use crate::engine::{
    disk::{BlockBackend, BlockError, RawFile, SECTOR_BYTES, classify},
    fault::FaultReport,
    memory::{Gpa, GuestRam, RamSpan},
    rate_limit::Meter,
    uring::{BadRequest, Completion, Ring},
    virtio::{
        Running,
        queue::{self, Chain, Malformed},
    },
    worker::{Served, Stop, Work},
};

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: usize = 16;

/// A busy disk asks after so many writes whether its file is still as long as it was: a system call.
const WRITES_PER_CHECK: u32 = 64;

/// What the ring watches: the queues' kicks by their place in `Running::queues`, and behind them these.
const WATCH_STOP: u32 = QUEUES_MAX as u32;
const WATCH_LIMITS: u32 = WATCH_STOP + 1;

pub(super) struct Requests {
    disk: Arc<dyn BlockBackend>,
    id: [u8; SERIAL_BYTES],
    /// `None`: requests are done one by one, in order.
    direct: Option<Direct>,
    meter: Meter,
    faults: FaultReport,
    /// The request that is being begun, and its data without header and status.
    chain: Chain,
    data: Vec<RamSpan>,
    /// How many requests were begun.
    begun: u64,
    /// To be begun before any other, oldest first; all that is not done while the worker does not serve.
    waiting: VecDeque<Waiting>,
    /// What met a host fault since the worker began, and why the first of them did.
    failed: Vec<Request>,
    fault: Option<String>,
}

/// The way on which the kernel moves bytes by itself.
struct Direct {
    ring: Ring,
    file: Arc<RawFile>,
    /// By slot of the ring.
    in_flight: Vec<Option<Request>>,
    /// For so many writes the file is believed to be whole, as it was seen since the disk was last idle.
    whole_for: u32,
}

/// What is known of a request until it is answered.
#[derive(Debug, Clone, Copy)]
struct Request {
    /// Which one it is, counted from the first.
    number: u64,
    /// Its place in `Running::queues`.
    place: usize,
    name: Waiting,
    /// Where its status byte goes, the last one that may be written.
    status_at: Gpa,
    /// What a good answer counts as written beside the status.
    read_bytes: u32,
}

/// How far a request came by being begun.
enum Begun {
    /// The ring has it in this slot.
    InFlight(usize),
    Done(Result<(), BlockError>),
    Unsupported,
}

/// Why no further request is taken.
enum Pause {
    Stopped,
    HostFault,
    /// The queues are empty.
    Empty,
    /// All slots of the ring are in use.
    Full,
    /// The limit is reached, for so long.
    Limited(Duration),
}

impl Work<Running> for Requests {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        self.watch(running, stop);
        let served = self.work(running, stop);
        let drained = self.drain(running, stop);
        self.failed.sort_unstable_by_key(|request| request.number);
        self.failed.drain(..).rev().for_each(|request| self.waiting.push_front(request.name));
        let fault = self.fault.take();
        drained?;
        match (served?, fault) {
            (Served::Stopped, None) => Ok(Served::Stopped),
            (_, fault) => {
                fault.into_iter().for_each(|reason| (self.faults)(reason));
                Ok(Served::HostFault)
            }
        }
    }

    fn forget(&mut self) {
        self.waiting.clear();
    }
}

impl Requests {
    /// `ring` is for the file of `disk`.
    pub(super) fn new(
        disk: Arc<dyn BlockBackend>,
        id: [u8; SERIAL_BYTES],
        ring: Option<Ring>,
        meter: Meter,
        faults: FaultReport,
    ) -> Requests {
        let raw = Arc::clone(&disk).raw();
        let direct =
            ring.zip(raw).map(|(ring, file)| Direct { ring, file, in_flight: vec![None; IN_FLIGHT_MAX], whole_for: 0 });
        let (chain, data, waiting) = (Chain::default(), Vec::new(), VecDeque::new());
        Requests { disk, id, direct, meter, faults, chain, data, begun: 0, waiting, failed: Vec::new(), fault: None }
    }

    /// What waits for the host, oldest first. For a worker that is out: nothing is in flight then.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        // Whatever else there is was made with the device, or belongs to a request while it is served. The limit begins anew.
        let Requests {
            disk: _,
            id: _,
            direct: _,
            meter: _,
            faults: _,
            chain: _,
            data: _,
            begun: _,
            waiting,
            failed: _,
            fault: _,
        } = self;
        waiting.iter().copied().collect()
    }

    /// Has these done first, in this order, when the worker next begins; a reset drops them. Their chains are read and checked then,
    /// as of any request: a queue or chain that is not there counts as the driver's fault.
    pub(super) fn set_waiting(&mut self, waiting: Vec<Waiting>) {
        self.waiting = waiting.into();
    }

    /// Serves until `stop` is asked or the host fails; requests may be in flight then.
    fn work(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        loop {
            for queue in &mut running.queues {
                queue.disable_kicks(&running.ram)?;
            }
            let timeout = match self.take(running, stop)? {
                Pause::Stopped => return Ok(Served::Stopped),
                Pause::HostFault => return Ok(Served::HostFault),
                // Kicks stay off: the queues are looked at again when a slot is free or the limit allows it.
                Pause::Full => None,
                Pause::Limited(wait) => Some(wait),
                Pause::Empty => {
                    let mut more = false;
                    for queue in &mut running.queues {
                        more |= queue.enable_kicks(&running.ram)?;
                    }
                    if more {
                        continue;
                    }
                    None
                }
            };
            self.wait(running, stop, timeout)?;
        }
    }

    /// Begins requests: those that wait, then one from each queue in turn.
    fn take(&mut self, running: &mut Running, stop: &Stop) -> Result<Pause, Malformed> {
        let (mut place, mut empty) = (0, 0);
        while empty < running.queues.len() {
            if self.fault.is_some() {
                return Ok(Pause::HostFault);
            }
            if stop.asked() {
                return Ok(Pause::Stopped);
            }
            if self.direct.as_ref().is_some_and(|direct| !direct.ring.has_room()) {
                return Ok(Pause::Full);
            }
            if let Some(Waiting { queue, head }) = self.waiting.front().copied() {
                // Already counted against the limit when it was taken.
                let place = running.queues.iter().position(|own| own.index() == usize::from(queue)).ok_or(Malformed)?;
                running.queues.get(place).ok_or(Malformed)?.read_chain(&running.ram, head, &mut self.chain)?;
                self.waiting.pop_front();
                self.begin(running, place)?;
                continue;
            }
            if let Some(wait) = self.meter.closed_for() {
                return Ok(Pause::Limited(wait));
            }
            let queue = running.queues.get_mut(place).ok_or(Malformed)?;
            if queue.pop(&running.ram, &mut self.chain)? {
                empty = 0;
                self.begin(running, place)?;
                self.meter.take(queue::bytes(&self.data));
            } else {
                empty += 1;
            }
            place = (place + 1) % running.queues.len();
        }
        Ok(Pause::Empty)
    }

    /// Sleeps until something is to be done; what the ring has done is given back, with one interrupt for each queue.
    fn wait(&mut self, running: &mut Running, stop: &Stop, timeout: Option<Duration>) -> Result<(), Malformed> {
        let Some(direct) = &mut self.direct else {
            let sources: [PollFd<'_>; QUEUES_MAX as usize + 1] =
                array::from_fn(|place| match running.queues.get(place) {
                    Some(queue) => queue.kicked(),
                    None => PollFd::new(self.meter.changed(), PollFlags::IN),
                });
            stop.wait_for(&sources, timeout);
            self.meter.changed().clear();
            for queue in &running.queues {
                queue.kick.clear();
            }
            return Ok(());
        };
        if cfg!(fuzzing) && direct.ring.in_flight() == 0 {
            // Where the thread would sleep its turn ends: the ring sees the stop that is asked now.
            stop.wait(&[]);
        }
        if direct.ring.in_flight() == 0 {
            direct.whole_for = 0;
        }
        direct.ring.wait(timeout);
        self.reap(running, stop)
    }

    fn reap(&mut self, running: &mut Running, stop: &Stop) -> Result<(), Malformed> {
        while let Some(direct) = &mut self.direct
            && let Some(completion) = direct.ring.completion()
        {
            match completion {
                Completion::Done { slot, result } => {
                    let request =
                        direct.in_flight.get_mut(slot).and_then(Option::take).expect("the ring has what was begun");
                    self.settle(running, request, result.map_err(classify))?;
                }
                Completion::Readable { watch, ended: true } => self.watch_one(running, stop, watch),
                Completion::Readable { ended: false, .. } => {}
            }
        }
        running.queues.iter_mut().try_for_each(|queue| queue.notify(&running.ram, &running.interrupts))
    }

    /// Returns when nothing is in flight and nothing is watched any more.
    fn drain(&mut self, running: &mut Running, stop: &Stop) -> Result<(), Malformed> {
        let mut drained = Ok(());
        while let Some(direct) = &mut self.direct
            && direct.ring.in_flight() > 0
        {
            direct.ring.wait(None);
            drained = drained.and(self.reap(running, stop));
        }
        if let Some(direct) = &mut self.direct {
            direct.ring.unwatch();
        }
        drained
    }

    fn watch(&mut self, running: &Running, stop: &Stop) {
        if let Some(direct) = &mut self.direct {
            direct.ring.enable();
            direct.whole_for = 0;
            let kicks = 0..running.queues.len() as u32;
            kicks.chain([WATCH_STOP, WATCH_LIMITS]).for_each(|watch| self.watch_one(running, stop, watch));
        }
    }

    fn watch_one(&mut self, running: &Running, stop: &Stop, watch: u32) {
        let Some(Direct { ring, .. }) = &mut self.direct else { return };
        match (watch, running.queues.get(watch as usize)) {
            (WATCH_STOP, _) => ring.watch(watch, stop.signal()),
            (WATCH_LIMITS, _) => ring.watch(watch, self.meter.changed()),
            (_, Some(queue)) => ring.watch(watch, &queue.kick),
            (_, None) => {}
        }
    }

    /// Begins the request in `chain`, which is from the queue at `place`. What is done at once is given back at once.
    fn begin(&mut self, running: &mut Running, place: usize) -> Result<(), Malformed> {
        let ram = &running.ram;
        let queue = running.queues.get(place).ok_or(Malformed)?.index() as u16;
        let mut header = [0; HEADER_BYTES as usize];
        if !self.chain.read(ram, 0, &mut header).map_err(|_| Malformed)? {
            return Err(Malformed);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let at = u64::from_le_bytes(sector).saturating_mul(SECTOR_BYTES);
        // The last writable byte is the status; without it nothing can be answered.
        let status = self.chain.writable.last().ok_or(Malformed)?;
        let status_at = Gpa(status.at.0 + u64::from(status.bytes).saturating_sub(1));
        let data_bytes = self.chain.writable_bytes().saturating_sub(1);
        let read_bytes = match kind {
            VIRTIO_BLK_T_IN => data_bytes as u32,
            VIRTIO_BLK_T_GET_ID => data_bytes.min(SERIAL_BYTES as u64) as u32,
            _ => 0,
        };
        self.begun += 1;
        let name = Waiting { queue, head: self.chain.head };
        let request = Request { number: self.begun, place, name, status_at, read_bytes };
        match self.ask(ram, kind, at, data_bytes)? {
            Begun::InFlight(slot) => {
                if let Some(own) = self.direct.as_mut().and_then(|direct| direct.in_flight.get_mut(slot)) {
                    *own = Some(request);
                }
                return Ok(());
            }
            Begun::Done(result) => self.settle(running, request, result)?,
            Begun::Unsupported => answer(running, &request, VIRTIO_BLK_S_UNSUPP, 0)?,
        }
        running.queues.get_mut(place).ok_or(Malformed)?.notify(&running.ram, &running.interrupts)
    }

    /// Does or begins what the request in `chain` is about; its data is left in `data`.
    fn ask(&mut self, ram: &GuestRam, kind: u32, at: u64, data_bytes: u64) -> Result<Begun, Malformed> {
        self.data.clear();
        match kind {
            VIRTIO_BLK_T_IN => {
                self.data.extend_from_slice(&self.chain.writable);
                queue::truncate(&mut self.data, data_bytes);
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.data.extend_from_slice(&self.chain.readable);
                queue::skip(&mut self.data, HEADER_BYTES);
            }
            _ => {}
        }
        let begun = match kind {
            VIRTIO_BLK_T_IN => self.read(ram, at),
            VIRTIO_BLK_T_OUT => self.write(ram, at),
            VIRTIO_BLK_T_FLUSH => self.flush(ram),
            VIRTIO_BLK_T_GET_ID => {
                let bytes = self.id.len().min(usize::try_from(data_bytes).unwrap_or(usize::MAX));
                self.chain.write(ram, 0, self.id.get(..bytes).unwrap_or_default()).map_err(|_| Malformed)?;
                Ok(Begun::Done(Ok(())))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                Ok(self.ranges(ram, kind)?.map_or(Begun::Unsupported, Begun::Done))
            }
            _ => Ok(Begun::Unsupported),
        };
        Ok(begun.unwrap_or_else(|error| Begun::Done(Err(error))))
    }

    fn read(&mut self, ram: &GuestRam, at: u64) -> Result<Begun, BlockError> {
        let bytes = queue::bytes(&self.data);
        whole_sectors(bytes)?;
        let Some(direct) = self.direct.as_mut().filter(|_| bytes > 0) else {
            return Ok(Begun::Done(self.disk.read(ram, at, &self.data)));
        };
        direct.file.check(at, bytes)?;
        in_flight(direct.ring.read(ram, at, &self.data))
    }

    fn write(&mut self, ram: &GuestRam, at: u64) -> Result<Begun, BlockError> {
        let bytes = queue::bytes(&self.data);
        whole_sectors(bytes)?;
        let Some(direct) = self.direct.as_mut().filter(|_| bytes > 0) else {
            return Ok(Begun::Done(self.disk.write(ram, at, &self.data)));
        };
        direct.file.check_writable(at, bytes)?;
        if direct.whole_for == 0 {
            direct.file.check_not_cut()?;
            direct.whole_for = WRITES_PER_CHECK;
        }
        direct.whole_for -= 1;
        in_flight(direct.ring.write(ram, at, &self.data))
    }

    /// Makes durable what was answered before (5.2.6.2). What is in flight beside it is not meant.
    fn flush(&mut self, ram: &GuestRam) -> Result<Begun, BlockError> {
        match &mut self.direct {
            Some(direct) if !self.disk.shape().read_only => in_flight(direct.ring.flush(ram)),
            _ => Ok(Begun::Done(self.disk.flush())),
        }
    }

    /// Discards or zeroes the ranges that are the request's data (virtio 1.2, 5.2.6): all are checked before the first is touched.
    /// `None` for flags that the request has no business with.
    fn ranges(&mut self, ram: &GuestRam, kind: u32) -> Result<Option<Result<(), BlockError>>, Malformed> {
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
        // The disk does these while we wait; what was begun before need not wait with us.
        if let Some(direct) = &mut self.direct {
            direct.ring.submit();
        }
        let mut wanted = ranges.iter().take(count);
        let done = wanted.try_for_each(|(at, bytes)| match zero {
            true => self.disk.write_zeroes(*at, *bytes),
            false => self.disk.discard(*at, *bytes),
        });
        Ok(Some(done))
    }

    /// Answers a request that is done, or keeps it when the host is at fault.
    fn settle(
        &mut self,
        running: &mut Running,
        request: Request,
        result: Result<(), BlockError>,
    ) -> Result<(), Malformed> {
        let Err(error) = result else { return answer(running, &request, VIRTIO_BLK_S_OK, request.read_bytes) };
        let Some(reason) = error.host_fault() else { return answer(running, &request, VIRTIO_BLK_S_IOERR, 0) };
        self.fault.get_or_insert(reason);
        self.failed.push(request);
        Ok(())
    }
}

/// Gives a request back, without an interrupt yet.
fn answer(running: &mut Running, request: &Request, status: u32, read_bytes: u32) -> Result<(), Malformed> {
    running.ram.write(request.status_at, &[status as u8]).map_err(|_| Malformed)?;
    let queue = running.queues.get_mut(request.place).ok_or(Malformed)?;
    queue.push_quiet(&running.ram, request.name.head, read_bytes + 1)
}

fn in_flight(slot: Result<usize, BadRequest>) -> Result<Begun, BlockError> {
    slot.map(Begun::InFlight).map_err(|BadRequest| BlockError::BadSpan)
}

fn whole_sectors(bytes: u64) -> Result<(), BlockError> {
    if bytes.is_multiple_of(SECTOR_BYTES) { Ok(()) } else { Err(BlockError::BadSpan) }
}
