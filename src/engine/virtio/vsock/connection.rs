//! One connection of a virtio socket: what waits for the host's end, and how much the guest takes and may send.

use std::{collections::VecDeque, io, os::unix::net::UnixStream};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};

use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};

/// What the guest may send before the host's end has taken it.
pub(super) const ROOM_BYTES: u32 = 64 << 10;
/// "CONNECT 4294967295\n" and a little more.
const LINE_BYTES_MAX: usize = 32;

/// How far a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host's program has not said yet what it wants: its line so far.
    Greeting(Vec<u8>),
    /// The guest was asked.
    Asked,
    /// The host's program waits for the guest to connect to `host_port`.
    Waiting,
    Open,
}

/// What the host's program wants, with the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// To a port of the guest.
    Connect(u32),
    /// The guest's next connection to this port of the host.
    Accept(u32),
}

impl Wish {
    fn from_line(line: &[u8]) -> Option<Wish> {
        let (word, port) = std::str::from_utf8(line).ok()?.trim_end_matches('\r').split_once(' ')?;
        let port = port.parse().ok()?;
        match word {
            "CONNECT" => Some(Wish::Connect(port)),
            "ACCEPT" => Some(Wish::Accept(port)),
            _ => None,
        }
    }
}

/// What became of a step on the host's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Done,
    /// The host's end is not ready.
    Later,
    /// The connection is broken.
    Broken,
}

pub(super) struct Connection {
    pub(super) socket: UnixStream,
    pub(super) stage: Stage,
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    /// What epoll said since a call last had to wait.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The host's program has closed its end altogether.
    pub(super) hung_up: bool,
    /// The host's program sends no more.
    pub(super) host_ended: bool,
    /// SHUTDOWN flags that the guest has heard, and those it has sent.
    pub(super) told_shutdown: u32,
    pub(super) guest_shutdown: u32,
    /// What of these the socket has been told.
    ended: u32,
    to_host: VecDeque<u8>,
    /// How many of the first bytes of `to_host` are not the guest's.
    own_bytes: usize,
    /// Of the guest's bytes, how many the host's end has taken, and how many of these the guest has heard of.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, what its buffer holds and what it has taken out.
    sent: u32,
    guest_room: u32,
    guest_forwarded: u32,
}

impl Connection {
    pub(super) fn new(socket: UnixStream, stage: Stage) -> Connection {
        Connection {
            socket,
            stage,
            guest_port: 0,
            host_port: 0,
            readable: true,
            writable: true,
            hung_up: false,
            host_ended: false,
            told_shutdown: 0,
            guest_shutdown: 0,
            ended: 0,
            to_host: VecDeque::new(),
            own_bytes: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
        }
    }

    /// A packet of this connection to the guest, which hears by it how much was taken.
    pub(super) fn header(&mut self, guest_cid: u64, op: u16) -> Header {
        self.told = self.forwarded;
        Header {
            from_cid: HOST_CID,
            to_cid: guest_cid,
            from_port: self.host_port,
            to_port: self.guest_port,
            bytes: 0,
            kind: STREAM,
            op,
            flags: 0,
            room_bytes: ROOM_BYTES,
            forwarded: self.forwarded,
        }
    }

    /// What the guest says of its buffer (5.10.6.3).
    pub(super) fn take_credit(&mut self, header: &Header) {
        (self.guest_room, self.guest_forwarded) = (header.room_bytes, header.forwarded);
    }

    /// How many bytes the guest takes now.
    pub(super) fn credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    pub(super) fn count_sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Whether bytes of the host's end could go to the guest.
    pub(super) fn has_for_guest(&self) -> bool {
        let guest_listens = self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        self.stage == Stage::Open && self.readable && !self.host_ended && guest_listens && self.credit() > 0
    }

    /// Whether the guest may send `bytes` more.
    pub(super) fn has_room(&self, bytes: u32) -> bool {
        let waiting = self.to_host.len() - self.own_bytes;
        waiting + bytes as usize <= ROOM_BYTES as usize
    }

    pub(super) fn queue(&mut self, bytes: &[u8]) {
        self.to_host.extend(bytes);
    }

    /// Both sides are there: that is the first that the host's program reads, with the port that it does not know.
    pub(super) fn open(&mut self) {
        let port = if self.stage == Stage::Waiting { self.guest_port } else { self.host_port };
        self.stage = Stage::Open;
        let line = format!("OK {port}\n");
        self.own_bytes = line.len();
        self.to_host.extend(line.as_bytes());
    }

    /// Whether the guest should hear of what was taken, before it runs out of room.
    pub(super) fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= ROOM_BYTES / 2
    }

    /// Gives the host's end what waits for it.
    pub(super) fn flush(&mut self) -> Step {
        while self.writable && !self.to_host.is_empty() {
            match send(&self.socket, self.to_host.as_slices().0, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.to_host.drain(..count.min(self.to_host.len()));
                    let own = count.min(self.own_bytes);
                    self.own_bytes -= own;
                    self.forwarded = self.forwarded.wrapping_add((count - own) as u32);
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Step::Broken,
            }
        }
        if self.to_host.is_empty() { Step::Done } else { Step::Later }
    }

    /// The guest sends no more, or takes no more; what it sent before has gone out.
    pub(super) fn end_guest_side(&mut self) {
        let how = match self.guest_shutdown & !self.ended {
            SHUTDOWN_BOTH => Shutdown::Both,
            SHUTDOWN_SEND => Shutdown::Write,
            SHUTDOWN_RECEIVE => Shutdown::Read,
            _ => return,
        };
        self.ended = self.guest_shutdown;
        let _ = shutdown(&self.socket, how);
    }

    /// Reads on in the line by which the host's program says what it wants. Gives that when the line is whole.
    pub(super) fn read_line(&mut self) -> Result<Option<Wish>, io::Error> {
        let Stage::Greeting(line) = &mut self.stage else { return Ok(None) };
        while self.readable {
            let mut byte = [0];
            // One byte at a time: what is behind the line is for the guest.
            match recv(&self.socket, &mut byte, RecvFlags::empty()) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == *b"\n" => {
                    return Wish::from_line(line).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into());
                }
                Ok(_) if line.len() == LINE_BYTES_MAX => return Err(io::ErrorKind::InvalidData.into()),
                Ok(_) => line.push(byte[0]),
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}
