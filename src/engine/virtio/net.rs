//! virtio-net (virtio 1.2, 5.1) on a tap descriptor, or on a stream socket to `passt`. One pair of queues, one worker.
//!
//! A tap carries the same 12-byte header as the queue, so frames pass between the kernel and guest RAM without a copy here.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS};

use super::{
    Features, Kind, Running, VirtioDevice,
    queue::{Chain, Malformed, VirtQueue},
    worker::{Served, Stop, Work, Worker},
};
use crate::{
    engine::{addresses::AddressWatch, memory::GuestRam},
    spec::NetworkBackend,
    types::MacAddr,
};

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_OFFSET: u64 = 10;
/// The longest frame either way, without offloads: an MTU of 64 KiB less a little.
const FRAME_BYTES_MAX: usize = 65_550;
const LINK_UP: u16 = 1;
/// How long `passt` may refuse bytes before the frame, and with it the link, is given up.
const PASST_STALLED: Duration = Duration::from_secs(2);
/// Frames before other work gets its turn.
const BURST: usize = 256;

pub struct Net {
    worker: Worker,
    mac: MacAddr,
}

impl Net {
    /// `watch` sees what the guest sends, to learn its addresses.
    pub fn new(fd: OwnedFd, backend: NetworkBackend, mac: MacAddr, watch: AddressWatch) -> io::Result<Net> {
        let link = match backend {
            NetworkBackend::Tap => Link::Tap(fd),
            NetworkBackend::Passt => {
                let stream = UnixStream::from(fd);
                stream.set_write_timeout(Some(PASST_STALLED))?;
                Link::Passt(Box::new(Passt { stream, inbox: Vec::new(), outbox: Vec::new(), broken: false }))
            }
        };
        let frames = Frames { link, watch, chain: Chain::default(), rx_ready: false };
        Ok(Net { worker: Worker::spawn("net", frames)?, mac })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Network
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn offered(&self) -> Features {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let mut config = self.mac.0.to_vec();
        config.extend(LINK_UP.to_le_bytes());
        config.extend(1u16.to_le_bytes()); // max_virtqueue_pairs
        config.extend(1500u16.to_le_bytes());
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn worker(&self) -> &Worker {
        &self.worker
    }
}

enum Link {
    Tap(OwnedFd),
    Passt(Box<Passt>),
}

/// Frames behind a 32-bit big-endian length, both ways (passt(1), `--fd`).
struct Passt {
    stream: UnixStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    broken: bool,
}

struct Frames {
    link: Link,
    watch: AddressWatch,
    /// While `rx_ready`, a buffer of the guest that waits for a frame.
    chain: Chain,
    rx_ready: bool,
}

impl Work for Frames {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        if queues.len() != 2 {
            return Err(Malformed);
        }
        loop {
            let mut more = false;
            if let Some(tx) = queues.get_mut(TX) {
                more |= self.transmit(ram, tx, interrupts)?;
            }
            if let Some(rx) = queues.get_mut(RX) {
                more |= self.receive(ram, rx, interrupts)?;
            }
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if more {
                continue;
            }
            let [rx, tx] = queues.as_slice() else { return Err(Malformed) };
            let mut fds = vec![rx.kicked(), tx.kicked()];
            // Without a buffer of the guest there is no use in hearing of frames.
            if self.rx_ready && !self.link.is_broken() {
                fds.push(rustix::event::PollFd::from_borrowed_fd(self.link.as_fd(), rustix::event::PollFlags::IN));
            }
            if !stop.wait(&fds) {
                return Ok(Served::Stopped);
            }
            rx.kick.clear();
            tx.kick.clear();
        }
    }

    fn forget(&mut self) {
        self.rx_ready = false;
    }
}

impl Frames {
    /// Sends what the guest has queued. True when the burst ended before the queue did.
    fn transmit(&mut self, ram: &GuestRam, tx: &mut VirtQueue, to: &super::Interrupts) -> Result<bool, Malformed> {
        let mut chain = Chain::default();
        tx.disable_kicks(ram)?;
        for _ in 0..BURST {
            if !tx.pop(ram, &mut chain)? {
                return tx.enable_kicks(ram);
            }
            let bytes = chain.readable_bytes();
            if bytes > HEADER_BYTES as u64 && bytes <= (HEADER_BYTES + FRAME_BYTES_MAX) as u64 {
                self.watch.see(|into| chain.read(ram, HEADER_BYTES as u64, into).unwrap_or(false));
                self.link.send(ram, &chain);
            }
            tx.push(ram, chain.head, 0, to)?;
        }
        Ok(true)
    }

    /// Gives the guest the frames that wait. True when more may be there.
    fn receive(&mut self, ram: &GuestRam, rx: &mut VirtQueue, to: &super::Interrupts) -> Result<bool, Malformed> {
        for _ in 0..BURST {
            if !self.rx_ready {
                self.rx_ready = rx.pop(ram, &mut self.chain)?;
                if !self.rx_ready {
                    // True: the guest queued a buffer just now.
                    return rx.enable_kicks(ram);
                }
                if self.chain.writable_bytes() < HEADER_BYTES as u64 {
                    return Err(Malformed);
                }
            }
            let Some(written) = self.link.receive(ram, &self.chain)? else { return Ok(false) };
            // virtio 1.2, 5.1.6.4.1: one buffer a frame.
            self.chain.write(ram, NUM_BUFFERS_OFFSET, &1u16.to_le_bytes()).map_err(|_| Malformed)?;
            self.rx_ready = false;
            rx.push(ram, self.chain.head, written, to)?;
        }
        Ok(true)
    }
}

impl Link {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Link::Tap(fd) => fd.as_fd(),
            Link::Passt(passt) => passt.stream.as_fd(),
        }
    }

    fn is_broken(&self) -> bool {
        matches!(self, Link::Passt(passt) if passt.broken)
    }

    /// A frame that the host does not take is lost, as on a wire.
    fn send(&mut self, ram: &GuestRam, chain: &Chain) {
        match self {
            Link::Tap(fd) => {
                let _ = ram.write_message(fd.as_fd(), &chain.readable);
            }
            Link::Passt(passt) => passt.send(ram, chain),
        }
    }

    /// The next frame into `chain`; `None` when none waits.
    fn receive(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Option<u32>, Malformed> {
        match self {
            Link::Tap(fd) => match ram.read_message(fd.as_fd(), &chain.writable) {
                Ok(bytes) => Ok(Some(bytes as u32)),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Malformed),
                Err(_) => Ok(None),
            },
            Link::Passt(passt) => passt.receive(ram, chain),
        }
    }
}

impl Passt {
    fn send(&mut self, ram: &GuestRam, chain: &Chain) {
        let bytes = chain.readable_bytes() as usize - HEADER_BYTES;
        self.outbox.clear();
        self.outbox.extend((bytes as u32).to_be_bytes());
        self.outbox.resize(4 + bytes, 0);
        let frame = self.outbox.get_mut(4..).unwrap_or_default();
        if self.broken || !chain.read(ram, HEADER_BYTES as u64, frame).unwrap_or(false) {
            return;
        }
        // Half a frame on a stream cannot be taken back.
        if self.stream.write_all(&self.outbox).is_err() {
            self.broken = true;
        }
    }

    fn receive(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Option<u32>, Malformed> {
        if !self.fill() {
            return Ok(None);
        }
        let Some((length, rest)) = self.inbox.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        let frame = rest.get(..length).unwrap_or_default();
        let room = chain.writable_bytes() as usize - HEADER_BYTES;
        let frame = frame.get(..length.min(room)).unwrap_or_default();
        chain.write(ram, 0, &[0; HEADER_BYTES]).map_err(|_| Malformed)?;
        chain.write(ram, HEADER_BYTES as u64, frame).map_err(|_| Malformed)?;
        let written = (HEADER_BYTES + frame.len()) as u32;
        self.inbox.drain(..4 + length);
        Ok(Some(written))
    }

    /// Reads until the inbox begins with a whole frame; false when it has to wait for more.
    fn fill(&mut self) -> bool {
        loop {
            if let Some((length, rest)) = self.inbox.split_first_chunk::<4>() {
                let length = u32::from_be_bytes(*length) as usize;
                if length > FRAME_BYTES_MAX {
                    self.broken = true;
                    return false;
                }
                if rest.len() >= length {
                    return true;
                }
            }
            if self.broken || !self.readable() {
                return false;
            }
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes) {
                Ok(0) | Err(_) => {
                    self.broken = true;
                    return false;
                }
                Ok(count) => self.inbox.extend_from_slice(bytes.get(..count).unwrap_or_default()),
            }
        }
    }

    fn readable(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
    }
}
