//! The way in: frames of the host into buffers of the guest, one or, with VIRTIO_NET_F_MRG_RXBUF, as many as each fills.
//!
//! Buffers are taken from the queue ahead, enough for the longest frame, and a tap's frame is read straight into them: one call a
//! frame, and no copy. What was taken and not filled stays for the next frame, and goes back to the queue when the worker stops.
//! When the guest has too few, the frame is taken into our own memory and waits there.

use std::collections::VecDeque;

use super::header;
use crate::engine::{
    memory::{GuestRam, RamVec},
    net_backend::{FRAME_BYTES_MAX, HEADER_BYTES, Header, NetBackend},
    virtio::{
        Features,
        queue::{Chain, Malformed, VirtQueue},
    },
};

/// Of one buffer: no driver has more.
const PIECES_OF_ONE_MAX: usize = 256;
/// Of all that are taken ahead, before the last one: a call takes 1024.
const PIECES_MAX: usize = 512;

/// Buffers of the guest that wait for frames.
pub(super) struct Receiver {
    mergeable: bool,
    buffers: VecDeque<Buffer>,
    /// All buffers' pieces, in order.
    pieces: RamVec,
    room_bytes: usize,
    /// For reuse.
    spare: Vec<Buffer>,
}

#[derive(Default)]
struct Buffer {
    chain: Chain,
    bytes: usize,
    pieces: usize,
}

/// What became of an attempt to give the guest a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// A frame was delivered, or lost.
    Frame,
    /// No frame waits.
    NoFrame,
    /// The frames wait until the guest has queued more buffers.
    NoBuffers,
}

/// Why buffers are enough, or are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stock {
    Enough,
    /// The guest has to queue more.
    Short,
    /// It has queued all that it can.
    Never,
}

impl Receiver {
    pub(super) fn new(ram: &GuestRam, mergeable: bool) -> Receiver {
        let pieces = RamVec::new(ram);
        Receiver { mergeable, buffers: VecDeque::new(), pieces, room_bytes: 0, spare: Vec::new() }
    }

    /// Delivers the next frame, if there is one.
    pub(super) fn receive(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        backend: &mut NetBackend,
        offloads: Features,
    ) -> Result<Received, Malformed> {
        let in_place = backend.reads_in_place();
        let wanted_bytes = HEADER_BYTES + if in_place { FRAME_BYTES_MAX } else { 0 };
        if self.stock_up(ram, queue, wanted_bytes)? == Stock::Enough && in_place {
            let Some((header, bytes)) = backend.read_frame(&mut self.pieces) else { return Ok(Received::NoFrame) };
            if let Some(header) = header::for_guest(&header, offloads) {
                self.give(ram, queue, header, bytes)?;
            }
            return Ok(Received::Frame);
        }
        if self.buffers.is_empty() {
            return Ok(Received::NoBuffers);
        }
        let Some(bytes) = backend.hold_frame() else { return Ok(Received::NoFrame) };
        match self.stock_up(ram, queue, HEADER_BYTES + bytes)? {
            Stock::Enough => {
                let (header, frame) = backend.held();
                if let Some(header) = header::for_guest(&header, offloads) {
                    self.copy(ram, frame)?;
                    self.give(ram, queue, header, HEADER_BYTES + frame.len())?;
                }
            }
            Stock::Short => return Ok(Received::NoBuffers),
            Stock::Never => {}
        }
        backend.release_frame();
        Ok(Received::Frame)
    }

    /// Puts what was not filled back into the queue.
    pub(super) fn give_back(&mut self, queue: &mut VirtQueue) {
        queue.unpop(self.buffers.len() as u16);
        self.buffers.clear();
        self.pieces.clear();
        self.room_bytes = 0;
    }

    /// Takes buffers until they have room for `wanted_bytes`; without mergeable buffers, one of any size, which cuts what is longer.
    fn stock_up(&mut self, ram: &GuestRam, queue: &mut VirtQueue, wanted_bytes: usize) -> Result<Stock, Malformed> {
        loop {
            if self.room_bytes >= wanted_bytes || (!self.mergeable && !self.buffers.is_empty()) {
                return Ok(Stock::Enough);
            }
            if self.buffers.len() >= usize::from(queue.size()) || self.pieces.pieces() > PIECES_MAX {
                return Ok(Stock::Never);
            }
            let mut buffer = self.spare.pop().unwrap_or_default();
            if !queue.pop(ram, &mut buffer.chain)? {
                self.spare.push(buffer);
                return Ok(Stock::Short);
            }
            // 5.1.6.3.1: there is room for a header in each.
            buffer.bytes = usize::try_from(buffer.chain.writable_bytes()).map_err(|_| Malformed)?;
            if buffer.bytes < HEADER_BYTES || buffer.chain.writable.len() > PIECES_OF_ONE_MAX {
                return Err(Malformed);
            }
            let before = self.pieces.pieces();
            for span in &buffer.chain.writable {
                self.pieces.push(*span).map_err(|_| Malformed)?;
            }
            buffer.pieces = self.pieces.pieces() - before;
            self.room_bytes += buffer.bytes;
            self.buffers.push_back(buffer);
        }
    }

    /// Copies a frame to where it belongs, behind the header's place.
    fn copy(&self, ram: &GuestRam, frame: &[u8]) -> Result<(), Malformed> {
        let (mut offset, mut rest) = (HEADER_BYTES, frame);
        for buffer in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.bytes - offset));
            buffer.chain.write(ram, offset as u64, now).map_err(|_| Malformed)?;
            (offset, rest) = (0, later);
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Gives the guest a frame that is in the first buffers: its header, and the buffers, all at once (5.1.6.4.1). `bytes` are
    /// those of both.
    fn give(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        mut header: Header,
        bytes: usize,
    ) -> Result<(), Malformed> {
        let bytes = bytes.min(self.room_bytes);
        let (mut count, mut left) = (0, bytes);
        for buffer in &self.buffers {
            if left == 0 {
                break;
            }
            count += 1;
            left = left.saturating_sub(buffer.bytes);
        }
        header::set_buffers(&mut header, count);
        let first = self.buffers.front().ok_or(Malformed)?;
        first.chain.write(ram, 0, &header).map_err(|_| Malformed)?;
        let mut left = bytes;
        for buffer in self.buffers.drain(..count) {
            let filled = left.min(buffer.bytes);
            left -= filled;
            queue.stage(ram, buffer.chain.head, filled as u32)?;
            self.pieces.drop_first(buffer.pieces);
            self.room_bytes -= buffer.bytes;
            self.spare.push(buffer);
        }
        queue.publish(ram)
    }
}
