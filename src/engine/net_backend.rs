//! The host's end of a network card: a tap, or a stream socket to `passt`. Every card has one, and its worker thread drives it.
//!
//! A tap carries the same 12-byte header as virtio's queues, so that card's frames pass between the kernel and guest RAM
//! without a copy here; only headers do not, as the kernel must see what was checked.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{event::PollFlags, io::Errno};

use super::{
    addresses::AddressWatch,
    memory::{GuestRam, RamVec},
    virtio::queue::{Chain, Malformed},
};
use crate::spec::NetworkBackend;

/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub const HEADER_BYTES: usize = 12;
/// The longest frame either way: an IP packet of 64 KiB behind addresses, a VLAN tag and the type.
pub const FRAME_BYTES_MAX: usize = 65_535 + 18;

/// What goes before each frame on a tap, as it is there.
pub type Header = [u8; HEADER_BYTES];

/// Sends and receives frames, and never waits: the card's thread waits for what `wanted` says.
pub struct NetBackend {
    link: Link,
    /// The other end is gone for good: the guest's frames are lost and none come.
    broken: bool,
    watch: AddressWatch,
    /// Bytes that passed between tap and guest RAM since somebody asked.
    carried: u64,
}

impl NetBackend {
    /// `fd` is made non-blocking. `watch` sees what the guest sends, to learn its addresses.
    pub fn new(fd: OwnedFd, backend: NetworkBackend, watch: AddressWatch) -> io::Result<NetBackend> {
        let link = match backend {
            NetworkBackend::Tap => Link::Tap(Tap { fd, held: None }),
            NetworkBackend::Passt => Link::Passt(Box::new(Passt::new(fd))),
        };
        rustix::io::ioctl_fionbio(link.as_fd(), true)?;
        Ok(NetBackend { link, broken: false, watch, carried: 0 })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// The other end is gone for good.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// What to wait for at `as_fd`: frames only when the card can take one (`receive`), and room on the way out only while the
    /// card (`send`) or the rest of what was sent waits for it. When this is empty, leave the descriptor out: it would still say
    /// that its other end is gone, again and again.
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

    /// Whether the next frame can be sent; false when it has to wait for room.
    pub fn has_room(&mut self) -> bool {
        if !self.link.is_full() {
            return true;
        }
        self.flush();
        !self.link.is_full()
    }

    /// After a burst: writes what is left of the frames that were sent, as far as there is room.
    pub fn flush(&mut self) {
        if self.link.flush().is_err() {
            self.broken = true;
        }
    }

    /// Sends the frame in the readable part of `chain`, behind the header there, instead of which `header` goes before it.
    /// `beginning` is a copy of as much of the frame as `AddressWatch` looks at. Call when `has_room`, and `flush` after a burst.
    pub fn send_chain(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        header: &Header,
        beginning: &[u8],
        pieces: &mut RamVec,
    ) -> Result<(), Malformed> {
        self.watch.see(beginning);
        match &mut self.link {
            _ if self.broken => {}
            Link::Tap(tap) => {
                pieces.clear();
                for span in &chain.readable {
                    pieces.push(*span).map_err(|_| Malformed)?;
                }
                // A frame that a tap does not take is lost, as on a wire.
                self.carried += pieces.write_message(tap.fd.as_fd(), header).unwrap_or(0) as u64;
            }
            Link::Passt(passt) => passt.pack_chain(ram, chain),
        }
        Ok(())
    }

    /// Sends a frame. False when there is no room: try it again when `wanted` says so.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        if !self.has_room() || (!self.broken && !self.link.send(frame)) {
            return false;
        }
        self.watch.see(frame);
        // What is left of it is written when there is room.
        self.flush();
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

    /// Whether the next frame is read straight into guest RAM: `read_frame`, and not `hold_frame`.
    pub fn reads_in_place(&self) -> bool {
        matches!(&self.link, Link::Tap(tap) if tap.held.as_ref().is_none_or(|held| held.bytes == 0))
    }

    /// Reads the next frame, behind as many bytes as a header has, into `pieces`. Gives the header and the bytes of both; `None`
    /// when no frame waits.
    pub fn read_frame(&mut self, pieces: &mut RamVec) -> Option<(Header, usize)> {
        let Link::Tap(tap) = &self.link else { return None };
        if self.broken {
            return None;
        }
        let mut header = [0; HEADER_BYTES];
        match pieces.read_message(tap.fd.as_fd(), &mut header) {
            Ok(bytes) if bytes >= HEADER_BYTES => {
                self.carried += bytes as u64;
                Some((header, bytes))
            }
            Err(error) if is_nothing(&error) => None,
            // No tap gives less than a header.
            Ok(_) | Err(_) => {
                self.broken = true;
                None
            }
        }
    }

    /// How many bytes passed between a tap and guest RAM, without a copy here, since the last call.
    pub fn take_carried(&mut self) -> u64 {
        std::mem::take(&mut self.carried)
    }

    /// Takes the next frame into our own memory, if it is not there yet. Gives its length; `None` when no frame waits.
    pub fn hold_frame(&mut self) -> Option<usize> {
        if self.broken {
            return None;
        }
        let held = self.link.hold_frame();
        self.broken = held.is_err();
        held.unwrap_or(None)
    }

    /// Whether a frame is held that the guest has not got.
    pub fn holds_frame(&self) -> bool {
        match &self.link {
            Link::Tap(tap) => tap.held.as_ref().is_some_and(|held| held.bytes > 0),
            Link::Passt(passt) => passt.frame().is_some(),
        }
    }

    /// The frame that is held.
    pub fn held(&self) -> (Header, &[u8]) {
        match &self.link {
            Link::Tap(Tap { held: Some(held), .. }) => (held.header, held.frame.get(..held.bytes).unwrap_or_default()),
            Link::Tap(Tap { held: None, .. }) => ([0; HEADER_BYTES], &[]),
            Link::Passt(passt) => ([0; HEADER_BYTES], passt.frame().unwrap_or_default()),
        }
    }

    /// The frame that is held has been delivered, or is dropped.
    pub fn release_frame(&mut self) {
        match &mut self.link {
            Link::Tap(Tap { held: Some(held), .. }) => held.bytes = 0,
            Link::Tap(Tap { held: None, .. }) => {}
            Link::Passt(passt) => passt.release_frame(),
        }
    }
}

/// That nothing can be read now is no error. A tap that was deleted on the host says EBADFD from then on, and is no more.
fn is_nothing(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::INTR))
}

enum Link {
    Tap(Tap),
    Passt(Box<Passt>),
}

struct Tap {
    fd: OwnedFd,
    /// Made when it is needed first.
    held: Option<Box<Held>>,
}

/// A frame that waits in our memory until the guest has enough buffers for it.
struct Held {
    header: Header,
    frame: Vec<u8>,
    /// 0 when it holds none.
    bytes: usize,
}

/// Frames behind a 32-bit big-endian length, both ways (passt(1), `--fd`).
struct Passt {
    stream: UnixStream,
    /// What was read: from `taken` to `filled`.
    inbox: Box<[u8]>,
    taken: usize,
    filled: usize,
    /// Frames on their way out, of which `sent` bytes are written: half a frame on a stream cannot be taken back.
    outbox: Vec<u8>,
    sent: usize,
}

const LENGTH_BYTES: usize = 4;
/// The longest frame, and as much again, so that one call reads many short ones.
const INBOX_BYTES: usize = 2 * (LENGTH_BYTES + FRAME_BYTES_MAX);
/// Frames are written together, up to so many bytes and one frame more.
const OUTBOX_BYTES: usize = 64 << 10;

/// The other end is gone.
struct Gone;

impl Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Link::Tap(tap) => tap.fd.as_fd(),
            Link::Passt(passt) => passt.stream.as_fd(),
        }
    }

    /// False when a tap has no room for the frame; any other that it does not take is lost, as on a wire.
    fn send(&mut self, frame: &[u8]) -> bool {
        match self {
            Link::Tap(tap) => {
                let written = rustix::io::writev(&tap.fd, &[IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(frame)]);
                !matches!(written, Err(Errno::AGAIN | Errno::INTR))
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
            Link::Tap(tap) => Ok(tap.read(into)?.map(|(_, bytes)| bytes)),
            Link::Passt(passt) => {
                if !passt.fill()? {
                    return Ok(None);
                }
                let frame = passt.frame().unwrap_or_default();
                for (into, from) in into.iter_mut().zip(frame) {
                    *into = *from;
                }
                let bytes = frame.len().min(into.len());
                passt.release_frame();
                Ok(Some(bytes))
            }
        }
    }

    fn hold_frame(&mut self) -> Result<Option<usize>, Gone> {
        match self {
            Link::Tap(tap) => tap.hold_frame(),
            Link::Passt(passt) => Ok(if passt.fill()? { passt.frame().map(<[u8]>::len) } else { None }),
        }
    }

    fn has_unsent(&self) -> bool {
        matches!(self, Link::Passt(passt) if passt.sent < passt.outbox.len())
    }

    fn is_full(&self) -> bool {
        matches!(self, Link::Passt(passt) if passt.outbox.len() - passt.sent >= OUTBOX_BYTES)
    }

    /// Writes what is unsent, as far as there is room.
    fn flush(&mut self) -> Result<(), Gone> {
        match self {
            Link::Tap(_) => Ok(()),
            Link::Passt(passt) => passt.flush(),
        }
    }
}

impl Tap {
    /// Reads a frame into our memory: its header, and its bytes there.
    fn read(&self, into: &mut [u8]) -> Result<Option<(Header, usize)>, Gone> {
        let mut header = [0; HEADER_BYTES];
        match rustix::io::readv(&self.fd, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(into)]) {
            // No tap gives less than a header.
            Ok(bytes) => bytes.checked_sub(HEADER_BYTES).map(|bytes| Some((header, bytes))).ok_or(Gone),
            Err(error) if is_nothing(&error.into()) => Ok(None),
            Err(_) => Err(Gone),
        }
    }

    fn hold_frame(&mut self) -> Result<Option<usize>, Gone> {
        let empty = || Box::new(Held { header: [0; HEADER_BYTES], frame: vec![0; FRAME_BYTES_MAX], bytes: 0 });
        let mut held = self.held.take().unwrap_or_else(empty);
        let read = if held.bytes > 0 { Ok(None) } else { self.read(&mut held.frame) };
        if let Ok(Some((header, bytes))) = &read {
            (held.header, held.bytes) = (*header, *bytes);
        }
        let bytes = held.bytes;
        self.held = Some(held);
        read.map(|_| (bytes > 0).then_some(bytes))
    }
}

impl Passt {
    fn new(fd: OwnedFd) -> Passt {
        let inbox = vec![0; INBOX_BYTES].into_boxed_slice();
        Passt { stream: UnixStream::from(fd), inbox, taken: 0, filled: 0, outbox: Vec::new(), sent: 0 }
    }

    /// Puts a frame at the end of the outbox.
    fn pack(&mut self, frame: &[u8]) {
        self.drop_sent();
        self.outbox.extend((frame.len() as u32).to_be_bytes());
        self.outbox.extend_from_slice(frame);
    }

    /// As `pack`, out of guest RAM.
    fn pack_chain(&mut self, ram: &GuestRam, chain: &Chain) {
        let Some(bytes) = (chain.readable_bytes() as usize).checked_sub(HEADER_BYTES) else { return };
        self.drop_sent();
        let before = self.outbox.len();
        self.outbox.extend((bytes as u32).to_be_bytes());
        self.outbox.resize(before + LENGTH_BYTES + bytes, 0);
        let frame = self.outbox.get_mut(before + LENGTH_BYTES..).unwrap_or_default();
        if !chain.read(ram, HEADER_BYTES as u64, frame).unwrap_or(false) {
            self.outbox.truncate(before);
        }
    }

    /// Makes place for more; moves at most as much as `OUTBOX_BYTES`.
    fn drop_sent(&mut self) {
        self.outbox.drain(..self.sent);
        self.sent = 0;
    }

    fn flush(&mut self) -> Result<(), Gone> {
        while let Some(rest) = self.outbox.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(count) if count > 0 => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    (self.outbox, self.sent) = (Vec::new(), 0);
                    return Err(Gone);
                }
            }
        }
        self.outbox.clear();
        self.sent = 0;
        Ok(())
    }

    fn unread(&self) -> &[u8] {
        self.inbox.get(self.taken..self.filled).unwrap_or_default()
    }

    /// The frame at the beginning of the inbox, when it is whole.
    fn frame(&self) -> Option<&[u8]> {
        let (length, rest) = self.unread().split_first_chunk::<LENGTH_BYTES>()?;
        rest.get(..u32::from_be_bytes(*length) as usize)
    }

    fn release_frame(&mut self) {
        self.taken += self.frame().map_or(0, |frame| LENGTH_BYTES + frame.len());
    }

    /// Reads until the inbox begins with a whole frame; false when it has to wait for more.
    fn fill(&mut self) -> Result<bool, Gone> {
        loop {
            if let Some((length, _)) = self.unread().split_first_chunk::<LENGTH_BYTES>()
                && u32::from_be_bytes(*length) as usize > FRAME_BYTES_MAX
            {
                return Err(Gone);
            }
            if self.frame().is_some() {
                return Ok(true);
            }
            // Behind what is left there has to be room for the rest of the longest frame.
            if self.taken > 0 && INBOX_BYTES - self.taken < LENGTH_BYTES + FRAME_BYTES_MAX || self.taken == self.filled
            {
                self.inbox.copy_within(self.taken..self.filled, 0);
                (self.taken, self.filled) = (0, self.filled - self.taken);
            }
            match self.stream.read(self.inbox.get_mut(self.filled..).unwrap_or_default()) {
                Ok(0) => return Err(Gone),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Gone),
            }
        }
    }
}
