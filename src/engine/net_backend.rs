//! The host's end of a network card: a tap, or a stream socket to `passt`. Every card has one, and its worker thread drives it.
//!
//! A tap carries the same 12-byte header as virtio's queues, so that card's frames pass between the kernel and guest RAM
//! without a copy here.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::event::PollFlags;

use super::{
    addresses::AddressWatch,
    memory::GuestRam,
    virtio::queue::{Chain, Malformed},
};
use crate::spec::NetworkBackend;

/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub const HEADER_BYTES: usize = 12;
/// The longest frame either way, without offloads: an MTU of 64 KiB less a little.
pub const FRAME_BYTES_MAX: usize = 65_550;

/// Sends and receives frames, and never waits: the card's thread waits for what `wanted` says.
pub struct NetBackend {
    link: Link,
    /// The other end is gone for good: the guest's frames are lost and none come.
    broken: bool,
    watch: AddressWatch,
}

impl NetBackend {
    /// `fd` is made non-blocking. `watch` sees what the guest sends, to learn its addresses.
    pub fn new(fd: OwnedFd, backend: NetworkBackend, watch: AddressWatch) -> io::Result<NetBackend> {
        let link = match backend {
            NetworkBackend::Tap => Link::Tap(fd),
            NetworkBackend::Passt => {
                let stream = UnixStream::from(fd);
                Link::Passt(Box::new(Passt { stream, inbox: Vec::new(), outbox: Vec::new(), sent: 0 }))
            }
        };
        rustix::io::ioctl_fionbio(link.as_fd(), true)?;
        Ok(NetBackend { link, broken: false, watch })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// What to wait for at `as_fd`: frames only when the card can take one (`receive`), and room on the way out only while the
    /// card (`send`) or the rest of a frame waits for it. When this is empty, leave the descriptor out: it would still say that
    /// its other end is gone, again and again.
    pub fn wanted(&self, receive: bool, send: bool) -> PollFlags {
        let mut wanted = PollFlags::empty();
        if receive && !self.broken {
            wanted |= PollFlags::IN;
        }
        if self.link.has_unsent() || send {
            wanted |= PollFlags::OUT;
        }
        wanted
    }

    /// Writes what is left of the last frame; false when the next one has to wait for room.
    pub fn has_room(&mut self) -> bool {
        if self.link.flush().is_err() {
            self.broken = true;
        }
        !self.link.has_unsent()
    }

    /// Sends the readable part of `chain`: a header and a frame. What is no frame is dropped. Call when `has_room`.
    pub fn send_chain(&mut self, ram: &GuestRam, chain: &Chain) {
        let bytes = chain.readable_bytes();
        if bytes > HEADER_BYTES as u64 && bytes <= (HEADER_BYTES + FRAME_BYTES_MAX) as u64 {
            self.watch.see(|into| chain.read(ram, HEADER_BYTES as u64, into).unwrap_or(false));
            if !self.broken {
                self.link.send_chain(ram, chain);
            }
        }
    }

    /// Sends a frame. False when there is no room: try it again when `wanted` says so.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        if !self.has_room() || (!self.broken && !self.link.send(frame)) {
            return false;
        }
        self.watch.see(|into| {
            for (into, from) in into.iter_mut().zip(frame) {
                *into = *from;
            }
            frame.len() >= into.len()
        });
        // What is left of it is written when there is room.
        self.has_room();
        true
    }

    /// The next frame into `into`, cut when that is shorter. Gives its length there; `None` when no frame waits.
    pub fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        if self.broken {
            return None;
        }
        let received = self.link.receive(into);
        self.broken = received.is_err();
        received.unwrap_or(None)
    }

    /// The next frame, behind its header, into the writable part of `chain`, which has room for a header at least. Gives the
    /// bytes written; `None` when no frame waits.
    pub fn receive_chain(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Option<u32>, Malformed> {
        if self.broken {
            return Ok(None);
        }
        let received = self.link.receive_chain(ram, chain)?;
        self.broken = received.is_err();
        Ok(received.unwrap_or(None))
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
    /// One frame on its way out, of which `sent` bytes are written: half a frame on a stream cannot be taken back.
    outbox: Vec<u8>,
    sent: usize,
}

/// The other end is gone.
struct Gone;

impl Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Link::Tap(fd) => fd.as_fd(),
            Link::Passt(passt) => passt.stream.as_fd(),
        }
    }

    /// A frame that a tap does not take is lost, as on a wire. Nothing may be unsent.
    fn send_chain(&mut self, ram: &GuestRam, chain: &Chain) {
        match self {
            Link::Tap(fd) => {
                let _ = ram.write_message(fd.as_fd(), &chain.readable);
            }
            Link::Passt(passt) => passt.pack_chain(ram, chain),
        }
    }

    /// False when a tap has no room for the frame; any other that it does not take is lost, as on a wire. Nothing may be unsent.
    fn send(&mut self, frame: &[u8]) -> bool {
        match self {
            Link::Tap(fd) => {
                let written = rustix::io::writev(fd, &[IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(frame)]);
                !matches!(written, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR))
            }
            Link::Passt(passt) => {
                passt.pack(frame);
                true
            }
        }
    }

    /// The next frame into `into`; `None` when none waits.
    fn receive(&mut self, into: &mut [u8]) -> Result<Option<usize>, Gone> {
        match self {
            Link::Tap(fd) => {
                let mut header = [0; HEADER_BYTES];
                match rustix::io::readv(fd, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(into)]) {
                    // No tap gives less than a header.
                    Ok(bytes) => bytes.checked_sub(HEADER_BYTES).map(Some).ok_or(Gone),
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
                    Err(_) => Err(Gone),
                }
            }
            Link::Passt(passt) => passt.receive(into),
        }
    }

    fn has_unsent(&self) -> bool {
        matches!(self, Link::Passt(passt) if passt.sent < passt.outbox.len())
    }

    /// Writes what is unsent, as far as there is room.
    fn flush(&mut self) -> Result<(), Gone> {
        match self {
            Link::Tap(_) => Ok(()),
            Link::Passt(passt) => passt.flush(),
        }
    }

    /// The next frame into `chain`; `None` when none waits.
    fn receive_chain(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Result<Option<u32>, Gone>, Malformed> {
        match self {
            Link::Tap(fd) => match ram.read_message(fd.as_fd(), &chain.writable) {
                Ok(bytes) if bytes >= HEADER_BYTES => Ok(Ok(Some(bytes as u32))),
                // No tap gives less than a header.
                Ok(_) => Ok(Err(Gone)),
                Err(error) => match error.kind() {
                    io::ErrorKind::InvalidInput => Err(Malformed),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Ok(None)),
                    _ => Ok(Err(Gone)),
                },
            },
            Link::Passt(passt) => passt.receive_chain(ram, chain),
        }
    }
}

impl Passt {
    /// Puts a frame into the empty outbox.
    fn pack(&mut self, frame: &[u8]) {
        self.sent = 0;
        self.outbox.clear();
        self.outbox.extend((frame.len() as u32).to_be_bytes());
        self.outbox.extend_from_slice(frame);
    }

    /// As `pack`, out of guest RAM.
    fn pack_chain(&mut self, ram: &GuestRam, chain: &Chain) {
        let bytes = chain.readable_bytes() as usize - HEADER_BYTES;
        self.sent = 0;
        self.outbox.clear();
        self.outbox.extend((bytes as u32).to_be_bytes());
        self.outbox.resize(4 + bytes, 0);
        let frame = self.outbox.get_mut(4..).unwrap_or_default();
        if !chain.read(ram, HEADER_BYTES as u64, frame).unwrap_or(false) {
            self.outbox.clear();
        }
    }

    fn flush(&mut self) -> Result<(), Gone> {
        while let Some(rest) = self.outbox.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(count) if count > 0 => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.outbox.clear();
                    return Err(Gone);
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<Option<usize>, Gone> {
        if !self.fill()? {
            return Ok(None);
        }
        let Some((length, rest)) = self.inbox.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        let frame = rest.get(..length).unwrap_or_default();
        let bytes = frame.len().min(into.len());
        for (into, from) in into.iter_mut().zip(frame) {
            *into = *from;
        }
        self.inbox.drain(..4 + length);
        Ok(Some(bytes))
    }

    fn receive_chain(&mut self, ram: &GuestRam, chain: &Chain) -> Result<Result<Option<u32>, Gone>, Malformed> {
        match self.fill() {
            Ok(true) => {}
            Ok(false) => return Ok(Ok(None)),
            Err(Gone) => return Ok(Err(Gone)),
        }
        let Some((length, rest)) = self.inbox.split_first_chunk::<4>() else { return Ok(Ok(None)) };
        let length = u32::from_be_bytes(*length) as usize;
        // A frame that is larger than the buffer is cut, as a tap does it.
        let room = chain.writable_bytes() as usize - HEADER_BYTES;
        let frame = rest.get(..length.min(room)).unwrap_or_default();
        chain.write(ram, 0, &[0; HEADER_BYTES]).map_err(|_| Malformed)?;
        chain.write(ram, HEADER_BYTES as u64, frame).map_err(|_| Malformed)?;
        let written = (HEADER_BYTES + frame.len()) as u32;
        self.inbox.drain(..4 + length);
        Ok(Ok(Some(written)))
    }

    /// Reads until the inbox begins with a whole frame; false when it has to wait for more.
    fn fill(&mut self) -> Result<bool, Gone> {
        loop {
            if let Some((length, rest)) = self.inbox.split_first_chunk::<4>() {
                let length = u32::from_be_bytes(*length) as usize;
                if length > FRAME_BYTES_MAX {
                    return Err(Gone);
                }
                if rest.len() >= length {
                    return Ok(true);
                }
            }
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Gone),
                Ok(count) => self.inbox.extend_from_slice(bytes.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Gone),
            }
        }
    }
}
