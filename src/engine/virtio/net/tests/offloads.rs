//! Headers both ways, and frames over several buffers.

use super::*;

const MERGEABLE: Features = 1 << VIRTIO_NET_F_MRG_RXBUF;

fn header(flags: u8, kind: u8, numbers: [u16; 5]) -> Header {
    let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (index, number) in numbers.into_iter().enumerate() {
        header[2 + 2 * index..4 + 2 * index].copy_from_slice(&number.to_le_bytes());
    }
    header
}

/// Queues a chain of pieces, each at a page of its own from `BUFFERS` on; gives where they are.
fn offer_pieces(driver: &mut Driver, sizes: &[u32]) -> Vec<(u64, u32)> {
    let first = u64::from(driver.next_head(RX_QUEUE));
    let pieces: Vec<_> =
        sizes.iter().enumerate().map(|(index, size)| (BUFFERS + 0x1000 * (first + index as u64), *size)).collect();
    driver.add(RX_QUEUE, &pieces.iter().map(|(at, size)| writable(*at, *size)).collect::<Vec<_>>());
    pieces
}

/// The next frame as a driver that merges buffers puts it together: header, frame, and how many bytes each buffer has of it.
fn merged(driver: &mut Driver) -> (Header, Vec<u8>, Vec<u32>) {
    let first = driver.wait_used(RX_QUEUE);
    let at = |head: u16| BUFFERS + 0x1000 * u64::from(head);
    let mut bytes = driver.bytes(at(first.head), first.bytes as usize);
    let header: Header = bytes[..HEADER_BYTES].try_into().unwrap();
    let mut sizes = vec![first.bytes];
    for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
        // All buffers of a frame are there at once.
        let next = driver.used(RX_QUEUE).expect("the next buffer of the same frame");
        bytes.extend(driver.bytes(at(next.head), next.bytes as usize));
        sizes.push(next.bytes);
    }
    (header, bytes[HEADER_BYTES..].to_vec(), sizes)
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    for event_idx in [0, EVENT_IDX] {
        let (mut driver, tap) = tap_with(MERGEABLE | event_idx);
        let (mut passt_driver, mut peer) = passt_with(MERGEABLE | event_idx);
        for round in 0..20u8 {
            // 16 buffers of 1 KiB: less than the longest frame, so that each waits in our memory first.
            for (bytes, sizes) in [
                (14, vec![26]),
                (1012, vec![1024]),
                (1013, vec![1024, 1]),
                (3060, vec![1024, 1024, 1024]),
                (5000, vec![1024, 1024, 1024, 1024, 916]),
            ] {
                for _ in 0..sizes.len() {
                    offer_pieces(&mut driver, &[1024]);
                    offer_pieces(&mut passt_driver, &[1024]);
                }
                driver.registers.kick(RX_QUEUE);
                passt_driver.registers.kick(RX_QUEUE);
                let sent = frame(round | 1, bytes);
                tap.send(&message([0; HEADER_BYTES], &sent)).unwrap();
                peer.write_all(&on_stream(&sent)).unwrap();
                for driver in [&mut driver, &mut passt_driver] {
                    let (header, frame, filled) = merged(driver);
                    assert!(frame == sent, "{bytes}");
                    assert_eq!(filled, sizes, "{bytes}");
                    assert_eq!(header[..10], [0; 10]);
                }
            }
        }
        assert!(driver.registers.status() & 64 == 0);
    }
}

#[test]
fn a_frame_is_read_straight_into_buffers_that_have_room_for_the_longest() {
    let (mut driver, tap) = tap_with(MERGEABLE);
    let big: Vec<u8> = frame(3, FRAME_BYTES_MAX);
    // 16 buffers of 8 KiB overlap here; only the first of a frame and the sizes are looked at.
    for round in 0..40u64 {
        while driver.available(RX_QUEUE).wrapping_sub(driver.used_index(RX_QUEUE)) < 16 {
            let at = BUFFERS + 0x2000 * u64::from(driver.next_head(RX_QUEUE));
            driver.add(RX_QUEUE, &[writable(at, 0x2000)]);
        }
        driver.registers.kick(RX_QUEUE);
        let bytes = [60, 8180, 8181, FRAME_BYTES_MAX][round as usize % 4];
        tap.send(&message([0; HEADER_BYTES], &big[..bytes])).unwrap();
        let (mut left, mut seen) = (HEADER_BYTES + bytes, Vec::new());
        while left > 0 {
            let used = driver.wait_used(RX_QUEUE);
            assert_eq!(used.bytes as usize, left.min(0x2000), "{bytes}");
            left -= used.bytes as usize;
            seen.extend(driver.bytes(BUFFERS + 0x2000 * u64::from(used.head), used.bytes as usize));
        }
        assert_eq!(usize::from(seen[10]), (HEADER_BYTES + bytes).div_ceil(0x2000), "num_buffers");
        assert!(seen[HEADER_BYTES..] == big[..bytes], "{bytes}");
    }
}

#[test]
fn a_frame_waits_until_there_are_enough_buffers() {
    for stream in [false, true] {
        let (near, far) = queue();
        let (stream_near, mut peer) = UnixStream::pair().unwrap();
        let (mut driver, _) =
            if stream { plug(stream_near.into(), NetworkBackend::Passt) } else { plug(near, NetworkBackend::Tap) };
        driver.start(VERSION_1 | MERGEABLE | EVENT_IDX);
        let mut put = |frame: &[u8]| match stream {
            true => peer.write_all(&on_stream(frame)).unwrap(),
            false => drop(far.send(&message([0; HEADER_BYTES], frame)).unwrap()),
        };
        put(&frame(3, 4000));
        put(&frame(5, 60));
        for _ in 0..3 {
            offer_pieces(&mut driver, &[512, 512]);
            driver.registers.kick(RX_QUEUE);
            thread::sleep(Duration::from_millis(5));
            assert!(driver.used(RX_QUEUE).is_none(), "not a part of a frame");
        }
        offer_pieces(&mut driver, &[512, 512]);
        offer_pieces(&mut driver, &[512, 512]);
        driver.registers.kick(RX_QUEUE);
        let mut used = Vec::new();
        for _ in 0..5 {
            used.push(driver.wait_used(RX_QUEUE).bytes);
        }
        assert_eq!(used, [1024, 1024, 1024, 940, 72]);
    }
}

#[test]
fn a_frame_that_never_fits_is_lost_and_the_next_comes() {
    let (mut driver, tap) = tap_with(MERGEABLE);
    for _ in 0..16 {
        offer_pieces(&mut driver, &[100]);
    }
    driver.registers.kick(RX_QUEUE);
    tap.send(&message([0; HEADER_BYTES], &frame(3, 1600))).unwrap();
    tap.send(&message([0; HEADER_BYTES], &frame(5, 1500))).unwrap();
    let (_, seen, sizes) = merged(&mut driver);
    assert!(seen == frame(5, 1500));
    assert_eq!(sizes.len(), 16);
}

#[test]
fn buffers_that_were_not_filled_are_the_next_after_a_pause() {
    let (near, tap) = queue();
    let (parts, _) = parts(vec![near], NetworkBackend::Tap);
    let net = Net::new(parts).unwrap();
    let worker = net.workers[0].clone();
    let mut driver = Driver::plug(net);
    driver.start(VERSION_1 | MERGEABLE | EVENT_IDX);
    for _ in 0..8 {
        offer_pieces(&mut driver, &[1024]);
    }
    driver.registers.kick(RX_QUEUE);
    for number in 1..=4 {
        tap.send(&message([0; HEADER_BYTES], &frame(number, 1500))).unwrap();
        let (_, seen, sizes) = merged(&mut driver);
        assert!(seen == frame(number, 1500) && sizes == [1024, 488]);
        worker.hold();
        worker.release();
    }
    assert!(driver.used(RX_QUEUE).is_none());
    assert_eq!(driver.used_index(RX_QUEUE), 8);
}

#[test]
fn headers_of_the_guest_reach_the_tap_as_far_as_they_are_negotiated() {
    let accepted = TAP_FEATURES & 0xffff;
    let (mut driver, tap) = tap_with(accepted);
    let (mut plain_driver, plain) = tap_with(0);
    let mut seen = vec![0; 70_000];
    let tcp = header(NEEDS_CSUM, TCPV4, [54, 1448, 34, 16, 0xeeee]);
    let big = frame(3, 60_000);
    let put = |driver: &mut Driver, header: Header, frame: &[u8]| {
        driver.fill(OUT, &message(header, frame));
        // The header and the frame's beginning in one piece, the rest in others.
        let rest = HEADER_BYTES as u32 + frame.len() as u32;
        let first = rest.min(100);
        driver.run(TX_QUEUE, &[readable(OUT, first), readable(OUT + u64::from(first), rest - first)]);
    };
    put(&mut driver, tcp, &big);
    let count = tap.recv(&mut seen).unwrap();
    assert!(seen[..count] == message(header(NEEDS_CSUM, TCPV4, [54, 1448, 34, 16, 0]), &big));
    // Nothing of this is sent; the last is.
    for bad in [
        header(NEEDS_CSUM, TCPV4, [54, 0, 34, 16, 0]),
        header(NEEDS_CSUM, 3, [54, 1448, 34, 16, 0]),
        header(NEEDS_CSUM, UDP_L4, [42, 1448, 34, 6, 0]),
        header(NEEDS_CSUM, 0, [0, 0, 59_999, 0, 0]),
        header(NEEDS_CSUM, 0, [0, 0, 0xffff, 0xffff, 0]),
        header(0, TCPV6, [54, 1448, 34, 16, 0]),
    ] {
        put(&mut driver, bad, &big);
    }
    put(&mut driver, header(NEEDS_CSUM | DATA_VALID, 0, [7, 7, 34, 6, 7]), &frame(5, 60));
    let count = tap.recv(&mut seen).unwrap();
    assert_eq!(seen[..count], message(header(NEEDS_CSUM, 0, [0, 0, 34, 6, 0]), &frame(5, 60)));
    put(&mut plain_driver, tcp, &big);
    put(&mut plain_driver, header(NEEDS_CSUM, 0, [7, 7, 34, 6, 7]), &frame(5, 60));
    let count = plain.recv(&mut seen).unwrap();
    assert_eq!(seen[..count], message([0; HEADER_BYTES], &frame(5, 60)), "nothing was negotiated");
}

#[test]
fn headers_of_the_host_reach_a_guest_that_takes_them_and_no_other() {
    let tcp = header(NEEDS_CSUM, TCPV6, [74, 1428, 54, 16, 0]);
    let checksum = header(NEEDS_CSUM, 0, [0, 0, 34, 16, 0]);
    let valid = header(DATA_VALID, 0, [0; 5]);
    let (mut driver, tap) = tap_with(TAP_FEATURES & 0xffff | MERGEABLE);
    for (number, from) in [tcp, checksum, valid].into_iter().enumerate() {
        offer_pieces(&mut driver, &[2048]);
        driver.registers.kick(RX_QUEUE);
        tap.send(&message(from, &frame(number as u8, 1000))).unwrap();
        let (mut seen, bytes, _) = merged(&mut driver);
        assert_eq!(seen[10], 1);
        seen[10] = 0;
        assert_eq!((seen, bytes), (from, frame(number as u8, 1000)));
    }
    for features in [0, MERGEABLE] {
        let (mut driver, tap) = tap_with(features);
        offer_pieces(&mut driver, &[2048]);
        driver.registers.kick(RX_QUEUE);
        for header in [tcp, checksum, header(0, 0x7f, [0; 5]), valid] {
            tap.send(&message(header, &frame(9, 60))).unwrap();
        }
        let (header, _, _) = merged(&mut driver);
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "the last, without flags");
    }
}

#[test]
fn a_burst_of_frames_is_one_interrupt() {
    for event_idx in [0, EVENT_IDX] {
        let (near, tap) = queue();
        let (parts, _) = parts(vec![near], NetworkBackend::Tap);
        let net = Net::new(parts).unwrap();
        let worker = net.workers[0].clone();
        let mut driver = Driver::plug(net);
        driver.start(VERSION_1 | event_idx);
        worker.hold();
        for _ in 0..8 {
            let at = BUFFERS + 0x1000 * u64::from(driver.next_head(RX_QUEUE));
            driver.add(RX_QUEUE, &[writable(at, 1526)]);
            tap.send(&message([0; HEADER_BYTES], &frame(3, 60))).unwrap();
            driver.fill(OUT, &[0; 100]);
            driver.add(TX_QUEUE, &[readable(OUT, 72)]);
        }
        // Written by the host only while the worker runs: the queue of a socket is short.
        let reader = thread::spawn(move || (0..8).for_each(|_| assert_eq!(tap.recv(&mut [0; 100]).unwrap(), 72)));
        worker.release();
        reader.join().unwrap();
        for _ in 0..8 {
            driver.wait_used(RX_QUEUE);
            driver.wait_used(TX_QUEUE);
        }
        worker.hold();
        assert_eq!((driver.messages(1), driver.messages(2)), (1, 1), "{event_idx:#x}");
    }
}
