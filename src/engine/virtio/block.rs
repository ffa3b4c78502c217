//! virtio-blk (virtio 1.2, 5.2) on a block backend. One queue, one worker; requests are done in order, straight between the
//! image and guest RAM.

use std::{io, sync::Arc};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::{
    Features, Kind, Running, VirtioDevice,
    queue::{self, Chain, Malformed},
    worker::{Served, Stop, Work, Worker},
};
use crate::engine::{
    disk::{BlockBackend, BlockError, SECTOR_BYTES},
    memory::GuestRam,
};

const QUEUE_SIZE: u16 = 256;
/// Data segments of one request: the ring less header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
const HEADER_BYTES: u64 = 16;
const SERIAL_BYTES: usize = 20;
const CONFIG_BYTES: usize = 36;

/// Told when the host cannot serve a request: a sentence for the guest's page. The machine pauses the guest.
pub type FaultReport = Arc<dyn Fn(String) + Send + Sync>;

pub struct Block {
    worker: Worker,
    config: [u8; CONFIG_BYTES],
    offered: Features,
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
        }
        let mut id = [0; SERIAL_BYTES];
        for (into, byte) in id.iter_mut().zip(serial.bytes()) {
            *into = byte;
        }
        let requests = Requests { disk, id, faults, chain: Chain::default(), waiting: false };
        Ok(Block { worker: Worker::spawn("disk", requests)?, config, offered })
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
    /// `chain` met a host fault and is done again when the guest goes on.
    waiting: bool,
}

impl Work for Requests {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let queue = queues.first_mut().ok_or(Malformed)?;
        loop {
            queue.disable_kicks(ram)?;
            while self.waiting || queue.pop(ram, &mut self.chain)? {
                self.waiting = true;
                let Some(written) = self.request(ram)? else { return Ok(Served::HostFault) };
                self.waiting = false;
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
        self.waiting = false;
    }
}

impl Requests {
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
        let (result, read_bytes) = match kind {
            VIRTIO_BLK_T_IN => {
                let mut into = self.chain.writable.clone();
                queue::truncate(&mut into, data_bytes);
                (whole_sectors(data_bytes).and_then(|()| self.disk.read(ram, at, &into)), data_bytes)
            }
            VIRTIO_BLK_T_OUT => {
                let mut from = self.chain.readable.clone();
                queue::skip(&mut from, HEADER_BYTES);
                (whole_sectors(queue::bytes(&from)).and_then(|()| self.disk.write(ram, at, &from)), 0)
            }
            VIRTIO_BLK_T_FLUSH => (self.disk.flush(), 0),
            VIRTIO_BLK_T_GET_ID => {
                let bytes = (SERIAL_BYTES as u64).min(data_bytes);
                let id = self.id.get(..bytes as usize).unwrap_or_default();
                self.chain.write(ram, 0, id).map_err(|_| Malformed)?;
                (Ok(()), bytes)
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

    fn answer(&self, ram: &GuestRam, status_at: u64, status: u32, read_bytes: u64) -> Result<Option<u32>, Malformed> {
        self.chain.write(ram, status_at, &[status as u8]).map_err(|_| Malformed)?;
        Ok(Some(read_bytes as u32 + 1))
    }
}

fn whole_sectors(bytes: u64) -> Result<(), BlockError> {
    if bytes.is_multiple_of(SECTOR_BYTES) { Ok(()) } else { Err(BlockError::BadSpan) }
}
