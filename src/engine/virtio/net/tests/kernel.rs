//! The card on a tap of this machine's kernel, in a network of its own. Needs root; skipped without.

use std::net::UdpSocket;

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use super::*;
use crate::engine::{
    tap::testing::{ip, vhosts, with_a_tap},
    virtio::testing::eventually,
};

const ALL: Features = VERSION_1 | FEATURES | TAP_FEATURES;
const HEADERS_BYTES: usize = 14 + 20 + 8;
const UDP_PORT: u16 = 9;
/// The tap's own.
const TAP_MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 1, 1]);

fn plug_tap(queues: Vec<OwnedFd>) -> Driver {
    ip(&format!("link set ik-test address {TAP_MAC}"));
    ip(&format!("neighbour add 10.9.8.2 lladdr {MAC} dev ik-test"));
    ip("neighbour add 10.9.8.3 lladdr 52:54:00:03:03:03 dev ik-test");
    let (parts, _) = parts(queues, NetworkBackend::Tap);
    Driver::plug(Net::new(parts).unwrap())
}

fn host() -> UdpSocket {
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// 16 buffers of 8 KiB: room for the longest frame.
fn offer_all(driver: &mut Driver, queue: u16) {
    for _ in 0..16 {
        let at = BUFFERS + 0x2_0000 * u64::from(queue) + 0x2000 * u64::from(driver.next_head(queue));
        driver.add(queue, &[writable(at, 0x2000)]);
    }
    driver.registers.kick(queue);
}

/// The tap is told what the driver takes before its first command is carried out.
fn wait_until_it_runs(driver: &mut Driver) {
    assert_eq!(control::command(driver, 2, 0, 0, &[1]), 0);
}

/// The next frame, merged: its header and all behind it.
fn next(driver: &mut Driver, queue: u16) -> (Header, Vec<u8>) {
    let mut bytes = Vec::new();
    let (mut seen, mut count) = (0, 1);
    while seen < count {
        let used = driver.wait_used(queue);
        let at = BUFFERS + 0x2_0000 * u64::from(queue) + 0x2000 * u64::from(used.head);
        bytes.extend(driver.bytes(at, used.bytes as usize));
        count = u16::from_le_bytes([bytes[10], bytes[11]]);
        seen += 1;
    }
    let (header, frame) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
    (*header, frame.to_vec())
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>() + start;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// What the pseudo header of UDP adds up to.
fn pseudo(udp_bytes: usize) -> u16 {
    sum(&[10, 9, 8, 1, 10, 9, 8, 2], 17 + udp_bytes as u32)
}

/// A frame of UDP from the guest, whose checksum is the pseudo header's only.
fn datagram(to: &UdpSocket, payload: &[u8]) -> Vec<u8> {
    let port = to.local_addr().unwrap().port();
    let udp_bytes = 8 + payload.len();
    let mut frame = TAP_MAC.0.to_vec();
    frame.extend(MAC.0);
    frame.extend([8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + udp_bytes) as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 8, 2, 10, 9, 8, 1]);
    let check = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    frame.extend(ip);
    for number in [UDP_PORT, port, udp_bytes as u16, pseudo(udp_bytes)] {
        frame.extend(number.to_be_bytes());
    }
    frame.extend(payload);
    frame
}

#[test]
fn checksums_are_left_to_who_accepted_them() {
    with_a_tap(1, |queues| {
        let mut driver = plug_tap(queues);
        let host = host();
        driver.start(ALL);
        offer_all(&mut driver, 0);
        wait_until_it_runs(&mut driver);
        host.send_to(&frame(3, 500), ("10.9.8.2", UDP_PORT)).unwrap();
        let (header, seen) = next(&mut driver, 0);
        assert_eq!(header, [NEEDS_CSUM, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0]);
        assert_eq!(seen[40..42], pseudo(508).to_be_bytes(), "the pseudo header's only");
        assert!(seen[42..] == frame(3, 500));
        // Off again, by a command.
        assert_eq!(control::command(&mut driver, 2, 5, 0, &[0; 8]), 0);
        host.send_to(&frame(3, 500), ("10.9.8.2", UDP_PORT)).unwrap();
        let (header, seen) = next(&mut driver, 0);
        assert_eq!(header[0], 0);
        assert_eq!(sum(&seen[34..], u32::from(pseudo(508))), 0xffff, "whole");
        // And by another driver.
        driver.start(VERSION_1 | FEATURES);
        offer_all(&mut driver, 0);
        wait_until_it_runs(&mut driver);
        host.send_to(&frame(3, 500), ("10.9.8.2", UDP_PORT)).unwrap();
        assert_eq!(next(&mut driver, 0).0[0], 0);
        // On the way out the kernel completes them.
        driver.start(ALL);
        let bytes = datagram(&host, &frame(5, 700));
        driver.fill(OUT, &message([NEEDS_CSUM, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &bytes));
        driver.run(TX_QUEUE, &[readable(OUT, (HEADER_BYTES + bytes.len()) as u32)]);
        let mut seen = [0; 2000];
        assert_eq!(host.recv(&mut seen).unwrap(), 700);
        assert!(seen[..700] == frame(5, 700));
    });
}

#[test]
fn segments_are_cut_by_the_kernel_or_not_at_all() {
    with_a_tap(1, |queues| {
        let mut driver = plug_tap(queues);
        if driver.offered() & TAP_USO_FEATURES == 0 {
            return println!("skipped: this kernel's taps do not segment UDP");
        }
        let host = host();
        driver.start(ALL | TAP_USO_FEATURES);
        offer_all(&mut driver, 0);
        wait_until_it_runs(&mut driver);
        let payload = frame(7, 40_000);
        setsockopt(&host, UdpGsoSegment, &1400).unwrap();
        host.send_to(&payload, ("10.9.8.2", UDP_PORT)).unwrap();
        let (header, seen) = next(&mut driver, 0);
        assert_eq!(header[..2], [NEEDS_CSUM, UDP_L4]);
        assert_eq!(header[4..6], 1400u16.to_le_bytes());
        assert_eq!(header[10], (HEADER_BYTES + HEADERS_BYTES + 40_000).div_ceil(0x2000) as u8);
        assert!(seen[HEADERS_BYTES..] == payload, "one frame");
        // The same way back.
        let bytes = datagram(&host, &payload);
        let segment = 1400u16.to_le_bytes();
        let header = [NEEDS_CSUM, UDP_L4, 42, 0, segment[0], segment[1], 34, 0, 6, 0, 0, 0];
        driver.fill(OUT, &message(header, &bytes));
        driver.run(TX_QUEUE, &[readable(OUT, (HEADER_BYTES + bytes.len()) as u32)]);
        let (mut got, mut datagrams) = (Vec::<u8>::new(), 0);
        while got.len() < payload.len() {
            let mut datagram = [0; 2000];
            let count = host.recv(&mut datagram).unwrap();
            got.extend(&datagram[..count]);
            datagrams += 1;
        }
        assert!(got == payload && datagrams == 29, "{datagrams}");
        // A driver that does not take it gets datagrams.
        driver.start(ALL);
        offer_all(&mut driver, 0);
        host.send_to(&payload[..2800], ("10.9.8.2", UDP_PORT)).unwrap();
        for part in payload[..2800].chunks(1400) {
            assert!(next(&mut driver, 0).1[HEADERS_BYTES..] == *part);
        }
    });
}

#[test]
fn the_kernel_leaves_out_what_the_driver_does_not_want() {
    with_a_tap(1, |queues| {
        let mut driver = plug_tap(queues);
        let host = host();
        driver.start(ALL);
        offer_all(&mut driver, 0);
        let send = |address: &str, number| {
            assert_eq!(host.send_to(&[number; 20], (address, UDP_PORT)).unwrap(), 20);
        };
        let comes = |driver: &mut Driver| next(driver, 0).1[HEADERS_BYTES];
        send("10.9.8.3", 1);
        assert_eq!(comes(&mut driver), 1, "everything at first");
        assert_eq!(control::command(&mut driver, 2, 0, 0, &[0]), 0);
        send("10.9.8.3", 2);
        send("10.9.8.2", 3);
        assert_eq!(comes(&mut driver), 3);
        assert_eq!(control::command(&mut driver, 2, 1, 0, &[1, 0, 0, 0, 0x52, 0x54, 0, 3, 3, 3, 0, 0, 0, 0]), 0);
        send("10.9.8.3", 4);
        assert_eq!(comes(&mut driver), 4);
        assert_eq!(control::command(&mut driver, 2, 1, 1, &[0x52, 0x54, 0, 9, 9, 9]), 0);
        send("10.9.8.2", 5);
        send("10.9.8.3", 6);
        assert_eq!(comes(&mut driver), 6);
        driver.start(ALL);
        offer_all(&mut driver, 0);
        send("10.9.8.2", 7);
        assert_eq!(comes(&mut driver), 7, "a new driver has not said anything");
    });
}

#[test]
fn frames_are_shared_out_over_the_pairs_in_use() {
    with_a_tap(3, |queues| {
        let mut driver = plug_tap(queues);
        let hosts: Vec<_> = (0..60).map(|_| host()).collect();
        let all = ALL | 1 << VIRTIO_NET_F_MQ;
        driver.start(all);
        let receive = |driver: &mut Driver, pairs: u16| {
            let mut counts = [0; 3];
            for host in &hosts {
                (0..3).for_each(|pair| {
                    if driver.available(2 * pair) == driver.used_index(2 * pair) {
                        offer_all(driver, 2 * pair);
                    }
                });
                host.send_to(&[1; 20], ("10.9.8.2", UDP_PORT)).unwrap();
                crate::engine::virtio::testing::eventually("a frame in one of them", || {
                    (0..3).any(|pair| driver.used(2 * pair).inspect(|_| counts[usize::from(pair)] += 1).is_some())
                });
            }
            let used = counts.iter().filter(|count| **count > 0).count();
            assert_eq!(used, usize::from(pairs), "{counts:?}");
        };
        receive(&mut driver, 1);
        for pairs in [3u16, 2, 1, 3] {
            assert_eq!(control::command(&mut driver, 6, 4, 0, &pairs.to_le_bytes()), 0);
            receive(&mut driver, pairs);
        }
        driver.start(all);
        receive(&mut driver, 1);
    });
}

#[test]
fn a_tap_that_is_deleted_takes_the_link_down() {
    with_a_tap(1, |queues| {
        let mut driver = plug_tap(queues);
        driver.start(ALL);
        offer_all(&mut driver, 0);
        wait_until_it_runs(&mut driver);
        ip("link delete ik-test");
        eventually("the news", || status(&mut driver) == 0);
        send(&mut driver, &frame(1, 60));
    });
}

/// Where the host has vhost-net.
#[test]
fn the_kernel_carries_a_stream_and_gives_the_queues_back() {
    with_a_tap(1, |mut queues| {
        let vhosts = vhosts(1);
        if vhosts.is_empty() {
            return println!("skipped: no /dev/vhost-net here");
        }
        queues.extend(vhosts);
        ip(&format!("link set ik-test address {TAP_MAC}"));
        ip(&format!("neighbour add 10.9.8.2 lladdr {MAC} dev ik-test"));
        let (parts, seen) = parts(queues, NetworkBackend::Tap);
        let mut driver = Driver::plug(Net::new(parts).unwrap());
        let host = host();
        driver.start(ALL | EVENT_IDX);
        offer_all(&mut driver, 0);
        wait_until_it_runs(&mut driver);
        // As much as two measures of a stream, and one more for a slow start: nobody listens at that port of the host's.
        let silent = UdpSocket::bind("10.9.8.1:0").unwrap();
        let long = datagram(&silent, &frame(1, 60_000));
        for _ in 0..3 * (16 << 20) / 60_000 {
            send(&mut driver, &long);
        }
        // The kernel serves: both ways, and nobody looks at what the guest sends.
        let small = datagram(&host, b"from the guest");
        let mut got = [0; 64];
        let mut summed = small.clone();
        summed[40..42].copy_from_slice(&[0, 0]);
        send(&mut driver, &summed);
        assert_eq!(host.recv(&mut got).unwrap(), 14);
        host.send_to(b"to the guest", ("10.9.8.2", UDP_PORT)).unwrap();
        assert_eq!(next(&mut driver, 0).1[42..], *b"to the guest");
        send(&mut driver, &arp(9));
        assert_eq!(*seen.lock().unwrap(), Vec::<Vec<String>>::new());
        // Paused and let go on by a command, the queues are ours again, each where it was.
        wait_until_it_runs(&mut driver);
        send(&mut driver, &arp(10));
        assert_eq!(*seen.lock().unwrap(), [["10.9.8.10"]]);
        send(&mut driver, &summed);
        assert_eq!(host.recv(&mut got).unwrap(), 14);
        host.send_to(b"once more", ("10.9.8.2", UDP_PORT)).unwrap();
        assert_eq!(next(&mut driver, 0).1[42..], *b"once more");
    });
}

/// A question of the guest's, as 10.9.8.`last`.
fn arp(last: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC.0);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC.0);
    frame.extend([10, 9, 8, last, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    frame
}
