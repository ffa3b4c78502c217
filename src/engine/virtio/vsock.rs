//! virtio-vsock (virtio 1.2, 5.10): streams between programs of the host and of the guest, carried on Unix sockets.
//!
//! ```text
//! host to guest   a program connects to the listening socket and writes "CONNECT 1024\n"; it reads "OK 1073741824\n" when the
//!                 guest has accepted, the number being its own port; then come the guest's bytes
//! guest to host   a program connects there and writes "ACCEPT 2048\n"; it reads "OK 1025\n" when the guest connects to that port,
//!                 the number being the guest's; then come the guest's bytes. A port for which nobody waits refuses the guest
//! ```
//!
//! One connection of a program carries one of the guest, so a service that several may use at a time waits several times. Who
//! waits goes on waiting when the guest is reset.
//!
//! Every connection has room for 64 KiB on its way to the host. Bytes for the guest go straight from the socket into its buffers,
//! so a guest that takes nothing leaves them with the host's program. Connections end when the guest is suspended.

mod connection;
mod packet;

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    slice,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{PollFd, PollFlags, Timespec, epoll};

use self::{
    connection::{Connection, Stage, Step, Wish},
    packet::{HEADER_BYTES, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, STREAM, op},
};
use super::{
    Features, Interrupts, Kind, Running, VirtioDevice, Worker,
    queue::{Chain, Malformed, VirtQueue, skip, truncate},
};
use crate::engine::{
    memory::{GuestRam, RamSpan},
    saved::{BadState, SaveState, State},
    worker::{Served, Stop, Work},
};

const F_STREAM: u32 = 0;
/// Receive, transmit, events.
const QUEUES: &[u16] = &[128, 128, 16];

const CONNECTIONS_MAX: usize = 256;
/// Packets without data that wait for buffers of the guest. With these, nothing new is begun until the guest takes some.
const CONTROLS_MAX: usize = 512;
/// Ports of the host's programs that connect to the guest are from here up to twice this.
const HOST_PORTS: u32 = 1 << 30;
/// Copied at a time.
const PIECE_BYTES: usize = 4096;
/// What epoll says of the listening socket; connections have their number.
const LISTENER: u64 = CONNECTIONS_MAX as u64;
const EPOLL_EVENTS: usize = 32;

pub struct Vsock {
    worker: Worker,
    guest_cid: u64,
    restored: Arc<AtomicBool>,
}

impl Vsock {
    /// `guest_cid` is 3 or higher. `listener` is where the host's programs connect.
    pub fn new(guest_cid: u32, listener: UnixListener) -> io::Result<Vsock> {
        assert!(guest_cid > 2, "context ids up to 2 are not for guests");
        let guest_cid = u64::from(guest_cid);
        let restored = Arc::new(AtomicBool::new(false));
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        listener.set_nonblocking(true)?;
        watch(&epoll, &listener, LISTENER)?;
        let relay = Relay {
            guest_cid,
            listener,
            epoll,
            knocks: true,
            connections: (0..CONNECTIONS_MAX).map(|_| None).collect(),
            next_port: 0,
            controls: VecDeque::new(),
            restored: Arc::clone(&restored),
            chain: Chain::default(),
            spans: Vec::new(),
        };
        Ok(Vsock { worker: Worker::spawn("vsock", relay)?, guest_cid, restored })
    }
}

/// Edge-triggered: a socket that is ready and cannot be served does not keep the thread awake.
fn watch(epoll: &OwnedFd, source: impl AsFd, number: u64) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    Ok(epoll::add(epoll, source, epoll::EventData::new_u64(number), flags)?)
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind::Socket
    }
    fn queue_sizes(&self) -> &'static [u16] {
        QUEUES
    }
    fn offered(&self) -> Features {
        1 << F_STREAM
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        for (byte, from) in into.iter_mut().zip(self.guest_cid.to_le_bytes().iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

const KIND: &str = "virtio-vsock";

impl SaveState for Vsock {
    /// Connections end with the process that has their sockets, so there is nothing to keep.
    fn save(&self) -> State {
        let Vsock { worker: _, guest_cid: _, restored: _ } = self;
        State::nothing(KIND)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        state.expect_nothing(KIND)?;
        self.restored.store(true, Ordering::Release);
        Ok(())
    }
}

struct Relay {
    guest_cid: u64,
    listener: UnixListener,
    epoll: OwnedFd,
    /// Somebody may wait at the listener.
    knocks: bool,
    connections: Vec<Option<Connection>>,
    next_port: u32,
    controls: VecDeque<Header>,
    /// The guest is to be told that its connections are gone.
    restored: Arc<AtomicBool>,
    chain: Chain,
    spans: Vec<RamSpan>,
}

impl Work<Running> for Relay {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let [receive, transmit, events] = queues.as_mut_slice() else {
            // A driver that has not set all queues up gets nothing.
            while stop.wait(&[]) {}
            return Ok(Served::Stopped);
        };
        loop {
            let mut busy = self.look_at_sockets();
            busy |= self.tell_restored(ram, events, interrupts)?;
            busy |= self.take_packets(ram, transmit, interrupts, stop)?;
            busy |= self.let_in();
            busy |= self.serve_host();
            busy |= self.serve_guest(ram, receive, interrupts)?;
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if busy {
                continue;
            }
            let sockets = PollFd::new(&self.epoll, PollFlags::IN);
            if !stop.wait(&[sockets, receive.kicked(), transmit.kicked(), events.kicked()]) {
                return Ok(Served::Stopped);
            }
            for queue in [&*receive, &*transmit, &*events] {
                queue.kick.clear();
            }
        }
    }

    fn forget(&mut self) {
        self.controls.clear();
        for connection in &mut self.connections {
            connection.take_if(|connection| connection.stage != Stage::Waiting);
        }
        self.knocks = true;
    }
}

impl Relay {
    /// Notes which sockets are ready. True when there may be more.
    fn look_at_sockets(&mut self) -> bool {
        let nothing = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut ready = [nothing; EPOLL_EVENTS];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = epoll::wait(&self.epoll, &mut ready[..], Some(&at_once)).unwrap_or(0);
        for event in ready.iter().take(count) {
            // The structure is packed: fields are copied, not borrowed.
            let (number, flags) = (event.data.u64(), event.flags);
            if number == LISTENER {
                self.knocks = true;
            } else if let Some(Some(connection)) = self.connections.get_mut(number as usize) {
                let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
                connection.readable |= gone || flags.contains(epoll::EventFlags::IN);
                connection.writable |= gone || flags.contains(epoll::EventFlags::OUT);
                connection.hung_up |= gone;
            }
        }
        count > 0
    }

    /// After a restore, tells the driver that every connection is gone (5.10.6.8).
    fn tell_restored(
        &mut self,
        ram: &GuestRam,
        events: &mut VirtQueue,
        interrupts: &Interrupts,
    ) -> Result<bool, Malformed> {
        const TRANSPORT_RESET: u32 = 0;
        if !self.restored.load(Ordering::Acquire) {
            return Ok(false);
        }
        if !events.pop(ram, &mut self.chain)? {
            return events.enable_kicks(ram);
        }
        let event = TRANSPORT_RESET.to_le_bytes();
        if !self.chain.write(ram, 0, &event).map_err(|_| Malformed)? {
            return Err(Malformed);
        }
        events.push(ram, self.chain.head, event.len() as u32, interrupts)?;
        self.restored.store(false, Ordering::Release);
        Ok(true)
    }

    fn is_full(&self) -> bool {
        self.controls.len() >= CONTROLS_MAX
    }

    /// Takes what the guest sends. True when more may be there.
    fn take_packets(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
    ) -> Result<bool, Malformed> {
        let mut budget = 64; // then the other side has its turn
        while !self.is_full() && !stop.asked() {
            if budget == 0 {
                return Ok(true);
            }
            budget -= 1;
            if !queue.pop(ram, &mut self.chain)? {
                return queue.enable_kicks(ram);
            }
            let mut raw = [0; HEADER_BYTES];
            if self.chain.read(ram, 0, &mut raw).map_err(|_| Malformed)? {
                self.packet(ram, Header::from_bytes(&raw))?;
            }
            queue.push(ram, self.chain.head, 0, interrupts)?;
        }
        Ok(false)
    }

    /// One packet of the guest, which is in `chain`.
    fn packet(&mut self, ram: &GuestRam, header: Header) -> Result<(), Malformed> {
        if header.from_cid != self.guest_cid || header.to_cid != HOST_CID {
            return Ok(());
        }
        let index = self.find(header.from_port, header.to_port);
        let there = self.chain.readable_bytes().saturating_sub(HEADER_BYTES as u64);
        if header.kind != STREAM || u64::from(header.bytes) > there {
            return self.refuse(index, &header);
        }
        let connection = match index {
            Some(index) => self.connections.get_mut(index).and_then(Option::as_mut),
            None => None,
        };
        let (Some(index), Some(connection)) = (index, connection) else {
            if header.op == op::REQUEST && self.answer(&header) {
                return Ok(());
            }
            return self.refuse(None, &header);
        };
        connection.take_credit(&header);
        match (header.op, &connection.stage) {
            (op::RESPONSE, Stage::Asked) => connection.open(),
            (op::RST, _) => self.close(index),
            (op::SHUTDOWN, Stage::Open) => connection.guest_shutdown |= header.flags & SHUTDOWN_BOTH,
            (op::CREDIT_UPDATE, Stage::Open) => {}
            (op::CREDIT_REQUEST, Stage::Open) => {
                let update = connection.header(self.guest_cid, op::CREDIT_UPDATE);
                self.controls.push_back(update);
            }
            (op::RW, Stage::Open)
                if connection.guest_shutdown & SHUTDOWN_SEND == 0 && connection.has_room(header.bytes) =>
            {
                let mut piece = [0; PIECE_BYTES];
                let end = HEADER_BYTES as u64 + u64::from(header.bytes);
                for at in (HEADER_BYTES as u64..end).step_by(PIECE_BYTES) {
                    let part = piece.get_mut(..(end - at).min(PIECE_BYTES as u64) as usize).unwrap_or_default();
                    self.chain.read(ram, at, part).map_err(|_| Malformed)?;
                    connection.queue(part);
                }
            }
            _ => return self.refuse(Some(index), &header),
        }
        Ok(())
    }

    /// Answers a packet that is wrong, or is for no connection, and ends the connection that it names.
    fn refuse(&mut self, index: Option<usize>, header: &Header) -> Result<(), Malformed> {
        if let Some(index) = index {
            self.close(index);
        }
        if header.op != op::RST {
            self.controls.push_back(header.reset_of());
        }
        Ok(())
    }

    /// The guest wants to connect to the host. False when nobody waits for it there.
    fn answer(&mut self, header: &Header) -> bool {
        // Who came before the guest did is found, and who left is not, however late we look.
        self.look_at_sockets();
        self.let_in();
        self.look_at_sockets();
        let waiting = self.find_waiting(header.to_port);
        let Some(connection) = waiting.and_then(|index| self.connections.get_mut(index)?.as_mut()) else {
            return false;
        };
        connection.guest_port = header.from_port;
        connection.take_credit(header);
        connection.open();
        let response = connection.header(self.guest_cid, op::RESPONSE);
        self.controls.push_back(response);
        true
    }

    /// Where the connection with these ports is.
    fn find(&self, guest_port: u32, host_port: u32) -> Option<usize> {
        self.connections.iter().position(|connection| {
            connection.as_ref().is_some_and(|it| {
                matches!(it.stage, Stage::Asked | Stage::Open)
                    && it.guest_port == guest_port
                    && it.host_port == host_port
            })
        })
    }

    /// Where a program waits for the guest to connect to this port of the host.
    fn find_waiting(&self, host_port: u32) -> Option<usize> {
        let waits = |it: &Connection| it.stage == Stage::Waiting && it.host_port == host_port && !it.hung_up;
        self.connections.iter().position(|connection| connection.as_ref().is_some_and(waits))
    }

    /// Gives a connection a number; `None` when there are too many or the host has no more to give.
    fn add(&mut self, connection: Connection) -> Option<usize> {
        let index = self.connections.iter().position(Option::is_none)?;
        connection.socket.set_nonblocking(true).ok()?;
        watch(&self.epoll, &connection.socket, index as u64).ok()?;
        *self.connections.get_mut(index)? = Some(connection);
        Some(index)
    }

    fn close(&mut self, index: usize) {
        if let Some(connection) = self.connections.get_mut(index).and_then(Option::take) {
            // Whoever gave the socket may have another handle on it.
            let _ = epoll::delete(&self.epoll, &connection.socket);
        }
    }

    /// Accepts programs of the host, and asks the guest for those that want to connect to it. True when it did something.
    fn let_in(&mut self) -> bool {
        let mut busy = false;
        while self.knocks && !self.is_full() && self.connections.iter().any(Option::is_none) {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    self.add(Connection::new(socket, Stage::Greeting(Vec::new())));
                    busy = true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody is there, or the host has no descriptor for them: the next who comes makes us look again.
                Err(_) => self.knocks = false,
            }
        }
        for index in 0..self.connections.len() {
            if self.is_full() {
                break;
            }
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            match connection.read_line() {
                Ok(None) => {}
                Ok(Some(Wish::Accept(host_port))) => {
                    connection.host_port = host_port;
                    connection.stage = Stage::Waiting;
                    busy = true;
                }
                Ok(Some(Wish::Connect(guest_port))) => {
                    let host_port = self.free_port(guest_port);
                    let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
                    (connection.guest_port, connection.host_port) = (guest_port, host_port);
                    connection.stage = Stage::Asked;
                    let request = connection.header(self.guest_cid, op::REQUEST);
                    self.controls.push_back(request);
                    busy = true;
                }
                Err(_) => {
                    self.close(index);
                    busy = true;
                }
            }
        }
        busy
    }

    /// A port of the host that no connection to the guest's port has.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            // Ends: there are far more ports than connections.
            let port = HOST_PORTS | self.next_port & (HOST_PORTS - 1);
            self.next_port = self.next_port.wrapping_add(1);
            if self.find(guest_port, port).is_none() {
                return port;
            }
        }
    }

    /// Gives the host's ends what waits for them, and tells the guest of ends. True when a connection was closed.
    fn serve_host(&mut self) -> bool {
        let mut closed = false;
        for index in 0..self.connections.len() {
            if self.is_full() {
                break;
            }
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            let step = connection.flush();
            let shut = connection.guest_shutdown;
            let over = match step {
                Step::Broken => true,
                Step::Done if shut != 0 => {
                    connection.end_guest_side();
                    shut == SHUTDOWN_BOTH
                }
                // The program did not wait for the guest.
                _ => matches!(connection.stage, Stage::Asked | Stage::Waiting) && connection.hung_up,
            };
            let reply = if connection.stage == Stage::Waiting {
                None
            } else if over {
                Some(connection.header(self.guest_cid, op::RST))
            } else if connection.owes_credit() {
                Some(connection.header(self.guest_cid, op::CREDIT_UPDATE))
            } else {
                None
            };
            self.controls.extend(reply);
            if over {
                self.close(index);
                closed = true;
            }
        }
        closed
    }

    /// Gives the guest packets and bytes, as far as it has buffers. True when it may take more.
    fn serve_guest(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
    ) -> Result<bool, Malformed> {
        let mut busy = false;
        while let Some(header) = self.controls.front().copied() {
            if !queue.pop(ram, &mut self.chain)? {
                return queue.enable_kicks(ram);
            }
            if !self.chain.write(ram, 0, &header.to_bytes()).map_err(|_| Malformed)? {
                return Err(Malformed);
            }
            queue.push(ram, self.chain.head, HEADER_BYTES as u32, interrupts)?;
            self.controls.pop_front();
            busy = true;
        }
        for index in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            if !connection.has_for_guest() {
                continue;
            }
            if !queue.pop(ram, &mut self.chain)? {
                return queue.enable_kicks(ram);
            }
            self.spans.clone_from(&self.chain.writable);
            skip(&mut self.spans, HEADER_BYTES as u64);
            truncate(&mut self.spans, u64::from(connection.credit()));
            if self.spans.is_empty() {
                return Err(Malformed);
            }
            busy = true;
            match ram.read_message(connection.socket.as_fd(), &self.spans) {
                Ok(count) if count > 0 => {
                    let count = count as u32;
                    let header = Header { bytes: count, ..connection.header(self.guest_cid, op::RW) };
                    connection.count_sent(count);
                    self.chain.write(ram, 0, &header.to_bytes()).map_err(|_| Malformed)?;
                    queue.push(ram, self.chain.head, HEADER_BYTES as u32 + count, interrupts)?;
                }
                other => {
                    queue.unpop(1);
                    match other.map_err(|error| error.kind()) {
                        Ok(_) => connection.host_ended = true,
                        Err(io::ErrorKind::WouldBlock) => connection.readable = false,
                        Err(io::ErrorKind::Interrupted) => {}
                        Err(_) => {
                            let reset = connection.header(self.guest_cid, op::RST);
                            self.controls.push_back(reset);
                            self.close(index);
                        }
                    }
                }
            }
        }
        Ok(self.tell_ends() || busy)
    }

    /// Tells the guest which of the host's ends send no more, or are gone. True when it did.
    fn tell_ends(&mut self) -> bool {
        let mut told = false;
        for connection in self.connections.iter_mut().flatten() {
            let flags = match (connection.host_ended, connection.hung_up) {
                (false, _) => 0,
                (true, false) => SHUTDOWN_SEND,
                (true, true) => SHUTDOWN_BOTH,
            };
            if flags != connection.told_shutdown {
                connection.told_shutdown = flags;
                let shutdown = Header { flags, ..connection.header(self.guest_cid, op::SHUTDOWN) };
                self.controls.push_back(shutdown);
                told = true;
            }
        }
        told
    }
}

#[cfg(test)]
mod tests;
