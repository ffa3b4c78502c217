//! Sockets as a driver and programs of the host see them, and as a hostile guest would use them.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};

use super::*;
use crate::engine::{
    bus::Width,
    memory::Gpa,
    saved::testing::{matches_golden, spoil},
    virtio::testing::{BUFFERS, Driver, EVENT_IDX, Region, VERSION_1, eventually, readable, writable},
};

const CID: u64 = 3;
const PORT: u32 = 1024;
/// The guest's buffers: 16 for packets to it, one for packets from it.
const RECEIVE: u64 = 0x30_0000;
const RECEIVE_BYTES: u64 = 0x2000;
const SEND: u64 = 0x20_0000;
const FIRST_PORT: u32 = HOST_PORTS;

struct Rig {
    driver: Driver,
    folder: tempfile::TempDir,
    restored: Arc<AtomicBool>,
}

fn device(folder: &tempfile::TempDir) -> Vsock {
    Vsock::new(CID as u32, UnixListener::bind(folder.path().join("vsock")).unwrap()).unwrap()
}

fn rig() -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let vsock = device(&folder);
    let restored = Arc::clone(&vsock.restored);
    let mut rig = Rig { driver: Driver::plug(vsock), folder, restored };
    rig.start();
    rig
}

fn pattern(from: usize, bytes: usize) -> Vec<u8> {
    (from..from + bytes).map(|at| (at * 7 + at / 256) as u8).collect()
}

impl Rig {
    /// The driver begins, with all its receive buffers.
    fn start(&mut self) {
        self.driver.start(VERSION_1 | EVENT_IDX);
        (0..16).for_each(|_| self.offer());
    }

    fn offer(&mut self) {
        let at = RECEIVE + RECEIVE_BYTES * u64::from(self.driver.next_head(0));
        self.driver.submit(0, &[writable(at, RECEIVE_BYTES as u32)]);
    }

    /// A program of the host.
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    /// The next packet to the guest, whose buffer is given again.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(0);
        let bytes = self.driver.bytes(RECEIVE + RECEIVE_BYTES * u64::from(used.head), used.bytes as usize);
        self.offer();
        let header = Header::from_bytes(bytes.first_chunk().unwrap());
        assert_eq!((header.from_cid, header.to_cid, header.kind), (HOST_CID, CID, STREAM));
        let data = bytes[HEADER_BYTES..].to_vec();
        assert_eq!(data.len(), header.bytes as usize);
        (header, data)
    }

    fn op(&mut self) -> u16 {
        self.packet().0.op
    }

    /// A packet of the guest.
    fn send(&mut self, header: Header, data: &[u8]) {
        self.driver.fill(SEND, &header.to_bytes());
        self.driver.fill(SEND + 44, data);
        assert_eq!(self.driver.run(1, &[readable(SEND, 44 + data.len() as u32)]).bytes, 0);
    }

    /// A program of the host with a connection to the guest's port.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut client = self.client();
        client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        // What is left of earlier connections comes first.
        let request = loop {
            let (header, _) = self.packet();
            if header.op == op::REQUEST {
                break header;
            }
        };
        assert_eq!((request.to_port, request.room_bytes), (PORT, 64 << 10));
        let mine = from_guest(&request);
        self.send(Header { op: op::RESPONSE, ..mine }, &[]);
        let expected = format!("OK {}\n", request.from_port);
        let mut line = vec![0; expected.len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (client, mine)
    }

    /// A program of the host that waits for the guest to connect to `port`.
    fn waiting(&self, port: u32) -> UnixStream {
        let mut client = self.client();
        client.write_all(format!("ACCEPT {port}\n").as_bytes()).unwrap();
        client
    }

    fn send_data(&mut self, mine: Header, data: &[u8]) {
        self.send(Header { op: op::RW, bytes: data.len() as u32, ..mine }, data);
    }
}

/// What the guest writes into packets of the connection that `header` is of.
fn from_guest(header: &Header) -> Header {
    Header {
        from_cid: CID,
        to_cid: HOST_CID,
        from_port: header.to_port,
        to_port: header.from_port,
        kind: STREAM,
        room_bytes: 256 << 10,
        ..Header::default()
    }
}

fn to_port(port: u32) -> Header {
    from_guest(&Header { from_port: port, to_port: 5000, ..Header::default() })
}

#[test]
fn a_program_of_the_host_talks_with_one_in_the_guest() {
    let mut rig = rig();
    assert_eq!(rig.driver.registers.read(Region::Device, 0, Width::B4), CID);
    let (mut client, mine) = rig.connected();
    assert_eq!(mine.to_port, FIRST_PORT);
    client.write_all(b"hello").unwrap();
    let (header, data) = rig.packet();
    assert_eq!((header.op, data.as_slice()), (op::RW, &b"hello"[..]));
    rig.send_data(mine, b"good day");
    let mut seen = [0; 8];
    client.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"good day");
    rig.send(Header { op: op::CREDIT_REQUEST, ..mine }, &[]);
    let (update, _) = rig.packet();
    assert_eq!((update.op, update.room_bytes, update.forwarded), (op::CREDIT_UPDATE, 64 << 10, 8));
    let (_second, other) = rig.connected();
    assert_eq!(other.to_port, FIRST_PORT + 1);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(rig.packet().1, b"bye", "what was sent before the end arrives");
    let mut flags = 0;
    while flags != SHUTDOWN_BOTH {
        let (end, _) = rig.packet();
        assert_eq!((end.op, end.from_port), (op::SHUTDOWN, FIRST_PORT));
        flags = end.flags;
    }
    rig.send(Header { op: op::RST, ..mine }, &[]);
    rig.send(Header { op: op::RST, ..mine }, &[]);
    rig.send_data(mine, b"too late");
    assert_eq!(rig.op(), op::RST);
}

#[test]
fn a_program_of_the_guest_reaches_only_who_waits_for_it() {
    let mut rig = rig();
    let mut far = rig.waiting(80);
    for port in [81, 0, u32::MAX] {
        rig.send(Header { op: op::REQUEST, ..to_port(port) }, &[]);
        let (reset, _) = rig.packet();
        assert_eq!((reset.op, reset.from_port, reset.to_port), (op::RST, port, 5000));
    }
    let mine = to_port(80);
    rig.send(Header { op: op::REQUEST, ..mine }, &[]);
    let (response, _) = rig.packet();
    assert_eq!((response.op, response.from_port, response.to_port), (op::RESPONSE, 80, 5000));
    let mut line = [0; 8];
    far.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 5000\n");
    // It waited for one, so the next finds nobody.
    rig.send(Header { op: op::REQUEST, from_port: 5001, ..mine }, &[]);
    let (reset, _) = rig.packet();
    assert_eq!((reset.op, reset.to_port), (op::RST, 5001));
    rig.send_data(mine, b"GET");
    let mut seen = [0; 3];
    far.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"GET");
    // The guest ends its side; the host's answer still arrives.
    rig.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_SEND, ..mine }, &[]);
    assert_eq!(far.read(&mut seen).unwrap(), 0);
    far.write_all(b"answer").unwrap();
    assert_eq!(rig.packet().1, b"answer");
    rig.send_data(mine, b"more");
    assert_eq!(rig.op(), op::RST, "it had said that it sends no more");
    assert_eq!(far.write(b"x").map_err(|error| error.kind()), Err(io::ErrorKind::BrokenPipe));
}

#[test]
fn several_wait_and_who_left_does_not_count() {
    let mut rig = rig();
    let gone = rig.waiting(80);
    let mut early = rig.waiting(80);
    early.write_all(b"first").unwrap();
    let _other = rig.waiting(81);
    drop(gone);
    rig.send(Header { op: op::REQUEST, ..to_port(80) }, &[]);
    assert_eq!(rig.op(), op::RESPONSE);
    assert_eq!(rig.packet().1, b"first", "what was written behind the line is the guest's");
    // Who waits goes on waiting through a reset; who is connected does not.
    let mut patient = rig.waiting(82);
    rig.send(Header { op: op::REQUEST, ..to_port(83) }, &[]);
    assert_eq!(rig.op(), op::RST);
    rig.driver.registers.reset();
    let mut rest = String::new();
    early.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "OK 5000\n");
    rig.start();
    rig.send(Header { op: op::REQUEST, ..to_port(82) }, &[]);
    assert_eq!(rig.op(), op::RESPONSE);
    let mut line = [0; 8];
    patient.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 5000\n");
}

#[test]
fn the_hosts_half_of_an_end_leaves_the_guests_open() {
    let mut rig = rig();
    let (mut client, mine) = rig.connected();
    client.shutdown(Shutdown::Write).unwrap();
    let (end, _) = rig.packet();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    rig.send_data(mine, b"still here");
    rig.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_BOTH, ..mine }, &[]);
    let mut all = String::new();
    client.read_to_string(&mut all).unwrap();
    assert_eq!(all, "still here");
    let mut last = rig.packet().0;
    if last.op == op::SHUTDOWN {
        last = rig.packet().0;
    }
    assert_eq!(last.op, op::RST, "the answer to an end of both sides");
}

#[test]
fn credit_is_kept_in_both_directions() {
    let mut rig = rig();
    let (mut client, mut mine) = rig.connected();
    mine.room_bytes = 5000;
    rig.send(Header { op: op::CREDIT_UPDATE, ..mine }, &[]);
    let all = pattern(0, 20_000);
    client.write_all(&all).unwrap();
    let mut got = Vec::new();
    while got.len() < all.len() {
        while got.len() < mine.forwarded as usize + 5000 {
            got.extend(rig.packet().1);
        }
        assert_eq!(
            got.len(),
            (mine.forwarded as usize + 5000).min(all.len()),
            "not one byte more than there is room for"
        );
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(rig.driver.used(0), None);
        mine.forwarded = got.len() as u32;
        rig.send(Header { op: op::CREDIT_UPDATE, ..mine }, &[]);
    }
    assert_eq!(got, all);
    // The other way: a client that reads nothing takes what its socket and our room hold, and the guest hears when it reads.
    let (mut sent, mut forwarded) = (0usize, 0u32);
    let data = pattern(0, 4096);
    loop {
        while let Some(used) = rig.driver.used(0) {
            let raw = rig.driver.bytes(RECEIVE + RECEIVE_BYTES * u64::from(used.head), HEADER_BYTES);
            rig.offer();
            forwarded = Header::from_bytes(raw.first_chunk().unwrap()).forwarded;
        }
        if sent + 4096 > forwarded as usize + (64 << 10) {
            std::thread::sleep(Duration::from_millis(20));
            if rig.driver.used_index(0) == rig.driver.available(0).wrapping_sub(16) {
                break;
            }
            continue;
        }
        rig.send_data(mine, &data);
        sent += data.len();
    }
    let mut received = vec![0; sent];
    client.read_exact(&mut received).unwrap();
    assert!(received.chunks(4096).all(|part| part == data));
    let (update, _) = rig.packet();
    assert_eq!(update.op, op::CREDIT_UPDATE);
    assert!(update.forwarded as usize > forwarded as usize);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_the_connection() {
    let mut rig = rig();
    let (client, mine) = rig.connected();
    let data = pattern(0, 60 << 10);
    let mut reset = false;
    for _ in 0..100 {
        rig.send_data(mine, &data);
        while let Some(used) = rig.driver.used(0) {
            let raw = rig.driver.bytes(RECEIVE + RECEIVE_BYTES * u64::from(used.head), HEADER_BYTES);
            rig.offer();
            reset |= Header::from_bytes(raw.first_chunk().unwrap()).op == op::RST;
        }
        if reset {
            break;
        }
    }
    assert!(reset);
    drop(client);
    rig.connected();
}

#[test]
fn programs_that_say_something_else_are_let_go() {
    let mut rig = rig();
    for line in [
        "GET / HTTP/1.1\n",
        "CONNECT\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "ACCEPT\n",
        "ACCEPT x\n",
        "\n",
        &"x".repeat(100),
    ] {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        // What was not read makes the end a reset.
        let ended = client.read(&mut [0; 8]);
        assert!(
            matches!(&ended, Ok(0)) || ended.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset),
            "{line}"
        );
    }
    let mut patient = rig.client();
    for byte in b"CONNECT 1024\r\n" {
        patient.write_all(&[*byte]).unwrap();
    }
    assert_eq!(rig.op(), op::REQUEST);
    drop(patient);
    assert_eq!(rig.op(), op::RST, "the guest had not accepted yet");
    let mut refused = rig.client();
    refused.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = rig.packet();
    rig.send(Header { op: op::RST, ..from_guest(&request) }, &[]);
    assert_eq!(refused.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn packets_that_mean_nothing_are_answered_or_dropped() {
    let mut rig = rig();
    let (client, mine) = rig.connected();
    for stray in [Header { from_cid: 4, ..mine }, Header { to_cid: 1, ..mine }, Header { to_cid: u64::MAX, ..mine }] {
        rig.send(Header { op: op::RST, ..stray }, &[]);
    }
    rig.driver.run(1, &[readable(SEND, 43)]);
    rig.driver.run(1, &[writable(SEND, 100)]);
    rig.driver.fill(SEND, &Header { op: op::RW, bytes: 3, ..mine }.to_bytes());
    rig.driver.fill(SEND + 44, b"abc");
    rig.driver.run(1, &[readable(SEND, 7), readable(SEND + 7, 39), readable(SEND + 46, 1)]);
    let mut seen = [0; 3];
    (&client).read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"abc", "in whatever pieces");
    for op in [0, 8, 0xffff, op::REQUEST, op::RESPONSE] {
        let (mut client, mine) = rig.connected();
        rig.send(Header { op, ..mine }, &[]);
        assert_eq!(rig.op(), op::RST, "{op}");
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    }
    for bad in [Header { bytes: 1, ..mine }, Header { bytes: u32::MAX, ..mine }, Header { kind: 2, ..mine }] {
        let (_client, mine) = rig.connected();
        rig.send(Header { op: op::RW, from_port: mine.from_port, to_port: mine.to_port, ..bad }, &[]);
        let used = rig.driver.wait_used(0);
        let raw = rig.driver.bytes(RECEIVE + RECEIVE_BYTES * u64::from(used.head), HEADER_BYTES);
        rig.offer();
        assert_eq!(Header::from_bytes(raw.first_chunk().unwrap()).op, op::RST);
    }
    for strange in [(0, u32::MAX), (u32::MAX, 0), (u32::MAX, u32::MAX)] {
        let (mut client, mine) = rig.connected();
        let credit = Header { op: op::CREDIT_UPDATE, room_bytes: strange.0, forwarded: strange.1, ..mine };
        rig.send(credit, &[]);
        client.write_all(b"x").unwrap();
        rig.send(Header { op: op::RST, ..mine }, &[]);
        while rig.driver.used(0).is_some() {
            rig.offer();
        }
    }
}

#[test]
fn answers_without_buffers_are_bounded_and_come_later() {
    let mut rig = rig();
    rig.driver.start(VERSION_1);
    let stray = Header { op: op::RW, ..to_port(9) };
    rig.driver.fill(SEND, &stray.to_bytes());
    let mut sent = 0;
    while sent < 4 * CONTROLS_MAX {
        rig.driver.submit(1, &[readable(SEND, 44)]);
        sent += 1;
        let end = std::time::Instant::now() + Duration::from_millis(200);
        while rig.driver.used(1).is_none() && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        if std::time::Instant::now() >= end {
            break;
        }
    }
    assert_eq!(sent, CONTROLS_MAX + 1, "then the guest has to take its answers");
    for _ in 0..=CONTROLS_MAX {
        rig.offer();
        let used = rig.driver.wait_used(0);
        assert_eq!(used.bytes, 44);
    }
    rig.driver.wait_used(1);
    // A buffer that is too small for an answer.
    rig.driver.submit(0, &[writable(RECEIVE, 43)]);
    rig.driver.submit(1, &[readable(SEND, 44)]);
    rig.driver.registers.wait_needs_reset();
    rig.start();
    rig.connected();
}

#[test]
fn there_are_so_many_connections_and_a_reset_ends_them() {
    let mut rig = rig();
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| rig.connected()).collect();
    let mut waits = rig.client();
    waits.write_all(b"CONNECT 1024\n").unwrap();
    rig.send(Header { op: op::REQUEST, ..to_port(80) }, &[]);
    assert_eq!(rig.op(), op::RST, "no more");
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(rig.driver.used(0), None);
    let (_, mine) = clients.pop().unwrap();
    rig.send(Header { op: op::RST, ..mine }, &[]);
    loop {
        let (header, _) = rig.packet();
        if header.op == op::REQUEST {
            break;
        }
    }
    rig.driver.registers.reset();
    for (client, _) in &mut clients {
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    }
    rig.start();
    let (mut client, _) = rig.connected();
    client.write_all(b"anew").unwrap();
    assert_eq!(rig.packet().1, b"anew");
}

#[test]
fn a_flood_cannot_hold_up_a_reset() {
    let mut rig = rig();
    let (client, mine) = rig.connected();
    rig.driver.fill(SEND, &Header { op: op::CREDIT_REQUEST, ..mine }.to_bytes());
    for _ in 0..16 {
        rig.driver.add(1, &[readable(SEND, 44)]);
    }
    let over = Arc::new(AtomicBool::new(false));
    let (ram, stop) = (rig.driver.ram.clone(), Arc::clone(&over));
    let rings = [0, 1].map(|queue| rig.driver.ring(queue));
    let flood = std::thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            for ring in rings {
                let used = ram.get_u16(Gpa(ring.used() + 2)).unwrap();
                ram.write(Gpa(ring.avail() + 2), &used.wrapping_add(16).to_le_bytes()).unwrap();
            }
        }
    });
    rig.driver.registers.kick(1);
    std::thread::sleep(Duration::from_millis(20));
    rig.driver.registers.reset();
    over.store(true, Ordering::Release);
    flood.join().unwrap();
    drop(client);
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut vsock = device(&folder);
    let saved = matches_golden(&vsock.save());
    vsock.restore(&saved).unwrap();
    let restored = Arc::clone(&vsock.restored);
    let mut rig = Rig { driver: Driver::plug(vsock), folder, restored };
    rig.start();
    assert!(rig.restored.load(Ordering::Acquire), "no buffer for the event yet");
    assert_eq!(rig.driver.run(2, &[writable(BUFFERS, 4)]).bytes, 4);
    assert_eq!(rig.driver.bytes(BUFFERS, 4), [0; 4]);
    eventually("told once", || !rig.restored.load(Ordering::Acquire));
    rig.driver.submit(2, &[writable(BUFFERS, 4)]);
    rig.connected();
    assert_eq!(rig.driver.used(2), None);
    let mut refused = 0;
    spoil(&saved, |state| {
        let folder = tempfile::tempdir().unwrap();
        let mut vsock = device(&folder);
        refused += usize::from(vsock.restore(state).is_err());
    });
    assert!(refused > 5, "{refused}");
}
