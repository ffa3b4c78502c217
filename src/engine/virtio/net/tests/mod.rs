//! The card as a driver uses it. A datagram socket stands in for each queue of a tap: whole messages, each behind a header.

mod control;
mod hostile;
mod kernel;
mod offloads;
mod saved;

use std::{
    io::{Read, Write},
    os::unix::net::{UnixDatagram, UnixStream},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{header::*, *};
use crate::engine::{
    bus::Width,
    net_backend::{FRAME_BYTES_MAX, HEADER_BYTES, Header},
    virtio::testing::{BUFFERS, DEADLINE, Driver, EVENT_IDX, Region, VERSION_1, readable, writable},
};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
/// Where frames to send are; buffers for received ones are at `BUFFERS`, 4 KiB each.
const OUT: u64 = BUFFERS + 0x10_0000;

type Seen = Arc<Mutex<Vec<Vec<String>>>>;

fn parts(links: Vec<OwnedFd>, backend: NetworkBackend) -> (NetParts, Seen) {
    let seen = Seen::default();
    let sink = Arc::clone(&seen);
    let watch = AddressWatch::new(Arc::new(move |list| sink.lock().unwrap().push(list)));
    (NetParts { backend, links, mac: MAC, mtu: None, watch }, seen)
}

fn plug(fd: OwnedFd, backend: NetworkBackend) -> (Driver, Seen) {
    let (parts, seen) = parts(vec![fd], backend);
    (Driver::plug(Net::new(parts).unwrap()), seen)
}

/// A queue of a tap, and the host's end of it.
fn queue() -> (OwnedFd, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    (near.into(), far)
}

/// A tap whose driver accepted these features.
fn tap_with(features: Features) -> (Driver, UnixDatagram) {
    let (near, far) = queue();
    let (mut driver, _) = plug(near, NetworkBackend::Tap);
    driver.start(VERSION_1 | features);
    (driver, far)
}

fn tap() -> (Driver, UnixDatagram, Seen) {
    let (near, far) = queue();
    let (mut driver, seen) = plug(near, NetworkBackend::Tap);
    driver.start(VERSION_1);
    (driver, far, seen)
}

fn passt() -> (Driver, UnixStream) {
    passt_with(EVENT_IDX)
}

fn passt_with(features: Features) -> (Driver, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    far.set_write_timeout(Some(DEADLINE)).unwrap();
    let (mut driver, _) = plug(near.into(), NetworkBackend::Passt);
    driver.start(VERSION_1 | features);
    (driver, far)
}

/// A message on a tap.
fn message(header: Header, frame: &[u8]) -> Vec<u8> {
    [&header, frame].concat()
}

fn status(driver: &mut Driver) -> u32 {
    driver.registers.read(Region::Device, 6, Width::B2) as u32
}

fn offer(driver: &mut Driver, count: u64) {
    for _ in 0..count {
        let at = BUFFERS + 0x1000 * u64::from(driver.next_head(RX_QUEUE));
        driver.add(RX_QUEUE, &[writable(at, 1526)]);
    }
    driver.registers.kick(RX_QUEUE);
}

fn received(driver: &mut Driver) -> Vec<u8> {
    let used = driver.wait_used(RX_QUEUE);
    let at = BUFFERS + 0x1000 * u64::from(used.head);
    let header = driver.bytes(at, HEADER_BYTES);
    assert_eq!(header[10..], [1, 0], "num_buffers");
    driver.bytes(at + HEADER_BYTES as u64, used.bytes as usize - HEADER_BYTES)
}

fn send(driver: &mut Driver, frame: &[u8]) {
    driver.fill(OUT, &[0; HEADER_BYTES]);
    driver.fill(OUT + HEADER_BYTES as u64, frame);
    let rest = frame.len() as u32;
    let used = driver.run(TX_QUEUE, &[readable(OUT, HEADER_BYTES as u32), readable(OUT + HEADER_BYTES as u64, rest)]);
    assert_eq!(used.bytes, 0);
}

fn frame(number: u8, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at as u8).wrapping_mul(number)).collect()
}

fn on_stream(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn from_stream(stream: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn a_card_has_links_for_its_pairs() {
    for (count, backend) in [(0, NetworkBackend::Tap), (5, NetworkBackend::Tap), (2, NetworkBackend::Passt)] {
        let (parts, _) = parts((0..count).map(|_| queue().0).collect(), backend);
        assert!(Net::new(parts).is_err(), "{count}");
    }
}

#[test]
fn the_configuration_has_the_address_and_the_link() {
    let (mut driver, _peer) = passt();
    assert_eq!(driver.offered() & 0xffff_7fff, 1 << 28 | 1 << 29 | FEATURES & 0xffff_7fff, "no offloads with passt");
    let mac: Vec<u8> = (0..6).map(|at| driver.registers.read(Region::Device, at, Width::B1) as u8).collect();
    assert_eq!(mac, MAC.0);
    assert_eq!(driver.registers.read(Region::Device, 6, Width::B2), 1, "link up");
    assert_eq!(driver.registers.read(Region::Device, 8, Width::B2), 1, "one pair");
    assert_eq!(driver.queues(), 3);
    let links: Vec<_> = (0..3).map(|_| queue().0).collect();
    let (parts, _) = parts(links, NetworkBackend::Tap);
    let mut driver = Driver::plug(Net::new(NetParts { mtu: Some(9000), ..parts }).unwrap());
    assert_eq!(driver.offered() & 0xffff_ffff, (1 << 28 | 1 << 29 | FEATURES | TAP_FEATURES | 1 << 22 | 1 << 3));
    assert_eq!(driver.registers.read(Region::Device, 8, Width::B4), 9000 << 16 | 3);
    assert_eq!(driver.queues(), 7);
}

#[test]
fn frames_pass_a_tap_both_ways_with_their_header() {
    let (mut driver, tap, _) = tap();
    let mut message = vec![0; 70_000];
    for (number, bytes) in [(3, 14), (5, 60), (7, 1514)] {
        send(&mut driver, &frame(number, bytes));
        let count = tap.recv(&mut message).unwrap();
        assert_eq!(message[..count], [vec![0; HEADER_BYTES], frame(number, bytes)].concat());
    }
    offer(&mut driver, 4);
    for (number, bytes) in [(3, 60), (5, 1514), (7, 14)] {
        tap.send(&[vec![0; HEADER_BYTES], frame(number, bytes)].concat()).unwrap();
        assert_eq!(received(&mut driver), frame(number, bytes));
    }
    crate::engine::virtio::testing::eventually("interrupts", || driver.messages(1) == 3 && driver.messages(2) == 3);
}

#[test]
fn frames_pass_the_stream_both_ways_behind_their_length() {
    let (mut driver, mut peer) = passt();
    for (number, bytes) in [(3, 14), (5, 60), (7, 1514), (9, 65_535)] {
        send(&mut driver, &frame(number, bytes));
        assert_eq!(from_stream(&mut peer), frame(number, bytes));
    }
    offer(&mut driver, 8);
    // Two frames and the beginning of a third in one piece, then its rest byte by byte.
    let third = on_stream(&frame(7, 60));
    let bytes = [on_stream(&frame(3, 60)), on_stream(&frame(5, 1514)), third[..3].to_vec()].concat();
    peer.write_all(&bytes).unwrap();
    assert_eq!(received(&mut driver), frame(3, 60));
    assert_eq!(received(&mut driver), frame(5, 1514));
    for byte in &third[3..] {
        peer.write_all(&[*byte]).unwrap();
    }
    assert_eq!(received(&mut driver), frame(7, 60));
}

#[test]
fn frames_wait_for_buffers_and_come_in_order() {
    let (mut driver, mut peer) = passt();
    for number in 0..40 {
        peer.write_all(&on_stream(&frame(number, 100))).unwrap();
    }
    for number in 0..40 {
        offer(&mut driver, 1);
        assert_eq!(received(&mut driver), frame(number, 100));
    }
}

#[test]
fn a_frame_larger_than_the_buffer_is_cut_and_the_next_is_whole() {
    let (mut driver, mut peer) = passt();
    driver.add(RX_QUEUE, &[writable(BUFFERS, 12), writable(BUFFERS + 12, 50)]);
    driver.add(RX_QUEUE, &[writable(BUFFERS + 0x1000, 1526)]);
    driver.fill(BUFFERS + 62, &[0xaa; 8]);
    driver.registers.kick(RX_QUEUE);
    peer.write_all(&[on_stream(&frame(3, 100)), on_stream(&frame(5, 100))].concat()).unwrap();
    assert_eq!(driver.wait_used(RX_QUEUE).bytes, 62);
    assert_eq!(driver.bytes(BUFFERS + 12, 58), [&frame(3, 100)[..50], &[0xaa; 8]].concat());
    assert_eq!(driver.wait_used(RX_QUEUE).bytes, 112);
    let (mut driver, tap, _) = tap();
    driver.submit(RX_QUEUE, &[writable(BUFFERS, 62)]);
    tap.send(&[vec![0; HEADER_BYTES], frame(3, 100)].concat()).unwrap();
    assert_eq!(driver.wait_used(RX_QUEUE).bytes, 62);
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let (mut driver, mut peer) = passt();
    driver.fill(OUT, &[0; 0x100]);
    for pieces in [
        vec![readable(OUT, HEADER_BYTES as u32)],
        vec![readable(OUT, 3)],
        vec![readable(OUT, 70_000)],
        vec![readable(OUT, 1 << 20), readable(OUT, 1 << 20)],
        vec![writable(OUT, 64)],
    ] {
        driver.run(TX_QUEUE, &pieces);
    }
    send(&mut driver, &frame(3, 60));
    assert_eq!(from_stream(&mut peer), frame(3, 60), "the first thing on the stream");
}

#[test]
fn a_receive_buffer_without_room_for_the_header_needs_a_reset() {
    let (mut driver, mut peer) = passt();
    for piece in [writable(BUFFERS, 11), readable(BUFFERS, 1526)] {
        driver.submit(RX_QUEUE, &[piece]);
        driver.registers.wait_needs_reset();
        driver.start(VERSION_1);
    }
    driver.prepare(VERSION_1, 16);
    driver.registers.write(Region::Common, 0x16, Width::B2, 1);
    driver.registers.write(Region::Common, 0x1c, Width::B2, 0);
    driver.driver_ok();
    driver.registers.wait_needs_reset();
    driver.start(VERSION_1);
    offer(&mut driver, 1);
    peer.write_all(&on_stream(&frame(3, 60))).unwrap();
    assert_eq!(received(&mut driver), frame(3, 60));
}

#[test]
fn a_peer_that_goes_in_the_middle_of_a_frame_takes_only_the_link_with_it() {
    for last in [&[0, 0][..], &[0, 0, 0, 100, 1, 2, 3], &[0xff, 0xff, 0xff, 0xff, 1]] {
        let (mut driver, mut peer) = passt();
        offer(&mut driver, 2);
        peer.write_all(&on_stream(&frame(3, 60))).unwrap();
        peer.write_all(last).unwrap();
        assert_eq!(received(&mut driver), frame(3, 60));
        drop(peer);
        for _ in 0..20 {
            send(&mut driver, &frame(5, 1514));
        }
        assert!(driver.used(RX_QUEUE).is_none());
        driver.start(VERSION_1);
        send(&mut driver, &frame(5, 1514));
    }
}

#[test]
fn a_tap_that_is_gone_gives_no_empty_frames() {
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    let (mut driver, _) = plug(near, NetworkBackend::Tap);
    driver.start(VERSION_1);
    drop(far);
    offer(&mut driver, 4);
    for _ in 0..5 {
        send(&mut driver, &frame(3, 60));
    }
    assert!(driver.used(RX_QUEUE).is_none());
}

#[test]
fn a_peer_that_does_not_read_stops_neither_receiving_nor_a_reset() {
    let (mut driver, mut peer) = passt();
    driver.start(VERSION_1);
    driver.fill(OUT, &[0; HEADER_BYTES]);
    let big = frame(3, 60_000);
    driver.fill(OUT + HEADER_BYTES as u64, &big);
    let mut sent = 0;
    for _ in 0..16 {
        driver.submit(TX_QUEUE, &[readable(OUT, HEADER_BYTES as u32 + 60_000)]);
    }
    offer(&mut driver, 4);
    for number in 0..4 {
        peer.write_all(&on_stream(&frame(number, 60))).unwrap();
        assert_eq!(received(&mut driver), frame(number, 60));
    }
    while driver.used(TX_QUEUE).is_some() {
        sent += 1;
    }
    assert!(sent < 16, "the socket is full");
    let mut registers = driver.other_vcpu();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        registers.reset();
        tell.send(()).unwrap();
    });
    // Far less than the two seconds that a write may be refused.
    told.recv_timeout(Duration::from_secs(1)).expect("a reset does not wait for the peer");
    driver.start(VERSION_1);
    let reader = thread::spawn(move || {
        let mut frames = 0;
        loop {
            let got = from_stream(&mut peer);
            if got.len() == 14 {
                return frames;
            }
            assert!(got == big, "whole frames only");
            frames += 1;
        }
    });
    send(&mut driver, &frame(5, 14));
    let frames = reader.join().unwrap();
    assert!((sent..=sent + 1).contains(&frames), "{frames} frames of {sent} that were taken");
}

#[test]
fn the_guests_address_is_learnt_from_what_it_sends() {
    let (mut driver, _tap, seen) = tap();
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 0, 9]);
    arp.extend([0; 22]);
    send(&mut driver, &arp);
    assert_eq!(*seen.lock().unwrap(), [vec!["10.0.0.9".to_owned()]]);
    let used = driver.run(TX_QUEUE, &[readable(OUT, 20)]);
    assert_eq!(used.bytes, 0, "eight bytes of a frame");
}
