//! Frames on their way out of the guest.

use std::thread;

use super::*;

/// A context descriptor for TCP or UDP over IPv4 (`header` 34) or IPv6 (54).
fn context(command: u64, l4: usize, checksum_at: usize, header_bytes: u64, mss: u64) -> (u64, u64) {
    let ip_end = l4 as u64 - 1;
    let low = 14 | 24 << 8 | ip_end << 16 | (l4 as u64) << 32 | (checksum_at as u64) << 40;
    (low, CONTEXT | command | header_bytes << 40 | mss << 48)
}

#[test]
fn a_frame_of_one_descriptor_is_sent_and_told() {
    let mut driver = Driver::new();
    driver.write(IMS, TXDW);
    for bytes in [14, 60, 1514, 9000] {
        driver.send_frame(&frame(BROADCAST, bytes));
        assert_eq!(driver.sent(), frame(BROADCAST, bytes));
        eventually("an interrupt", || driver.is_high());
        assert_eq!(driver.read(ICR) & (TXDW | TXQE), TXDW | TXQE);
        let last = (driver.tx_tail + RING_LEN - 1) % RING_LEN;
        assert_eq!(driver.tx_status(last), DD);
    }
    // Without RS nothing is told but the empty ring.
    driver.queue(OUT, EOP | 60);
    driver.send();
    assert_eq!(driver.tx_status(4), 0);
    driver.settle();
    assert_eq!(driver.read(ICR), TXQE);
    driver.write(TCTL, TCTL_EN | TCTL_PSP);
    driver.sent();
    driver.send_frame(&frame(BROADCAST, 20));
    assert_eq!(driver.sent(), [frame(BROADCAST, 20), vec![0; 40]].concat(), "padded");
}

#[test]
fn a_frame_of_many_descriptors_goes_round_the_ring() {
    let mut driver = Driver::new();
    for number in 0..20 {
        let whole = frame(BROADCAST, 500 + number);
        driver.ram.write(Gpa(OUT), &whole).unwrap();
        let indexes = [
            driver.queue(OUT, 14),
            driver.queue(OUT + 14, DATA | RS | 1),
            driver.queue(OUT + 15, 0),
            driver.queue(OUT + 15, DATA | RS | EOP | (whole.len() as u64 - 15)),
        ];
        driver.send();
        assert_eq!(driver.sent(), whole);
        assert_eq!(indexes.map(|index| driver.tx_status(index)), [0, DD, 0, DD]);
    }
    driver.nothing_sent();
}

#[test]
fn many_packets_are_sent_by_one_doorbell() {
    let mut driver = Driver::new();
    for number in 0..7 {
        let at = OUT + 0x1000 * number;
        driver.ram.write(Gpa(at), &frame(BROADCAST, 60 + number as usize)).unwrap();
        driver.queue(at, EOP | RS | (60 + number));
    }
    driver.send();
    for number in 0..7 {
        assert_eq!(driver.sent(), frame(BROADCAST, 60 + number));
    }
}

#[test]
fn a_legacy_descriptor_inserts_a_checksum() {
    let mut driver = Driver::new();
    let whole = frame(BROADCAST, 101);
    driver.ram.write(Gpa(OUT), &whole).unwrap();
    driver.queue(OUT, EOP | RS | IC | 101 | 50 << 16 | 20 << 40);
    driver.send();
    let got = driver.sent();
    assert_eq!(got[..50], whole[..50]);
    assert_eq!(got[52..], whole[52..]);
    let sum = !plain_sum(&whole[20..]);
    assert_eq!(got[50..52], sum.to_be_bytes());
    for (start, at) in [(101, 50), (200, 50), (20, 100), (20, 255)] {
        driver.queue(OUT, EOP | RS | IC | 101 | at << 16 | start << 40);
        driver.send();
        assert_eq!(driver.sent(), whole, "outside the frame nothing is inserted");
    }
}

#[test]
fn checksums_are_filled_in_as_the_context_says() {
    let mut driver = Driver::new();
    for (protocol, checksum_at) in [(6, 50), (17, 40)] {
        let right = ipv4(protocol, BROADCAST, b"some payload of odd length.");
        let mut blank = right.clone();
        blank[24..26].fill(0);
        let l4_bytes = (right.len() - 34) as u16;
        let pseudo = [&SOURCE[..], &DESTINATION, &[0, protocol], &l4_bytes.to_be_bytes()].concat();
        blank[checksum_at..checksum_at + 2].copy_from_slice(&plain_sum(&pseudo).to_be_bytes());
        driver.ram.write(Gpa(OUT), &blank).unwrap();
        let (low, high) = context(if protocol == 6 { TCP } else { 0 }, 34, checksum_at, 0, 0);
        let first = driver.queue(low, high | RS);
        for (options, ip, l4) in
            [(IXSM | TXSM, true, true), (TXSM, false, true), (IXSM, true, false), (0, false, false)]
        {
            // The context is kept; what counts is the first descriptor of a packet.
            driver.queue(OUT, DATA | options | 20);
            driver.queue(OUT + 20, DATA | EOP | RS | IXSM | TXSM | (blank.len() as u64 - 20));
            driver.send();
            let mut expected = blank.clone();
            if ip {
                expected[24..26].copy_from_slice(&right[24..26]);
            }
            if l4 {
                expected[checksum_at..checksum_at + 2].copy_from_slice(&right[checksum_at..checksum_at + 2]);
            }
            assert_eq!(driver.sent(), expected);
        }
        assert_ne!(driver.tx_status(first) & DD, 0, "a context is told too");
    }
}

/// Sends `payload` behind `header` as one packet to be segmented, in three pieces.
fn segment(driver: &mut Driver, header: &[u8], payload: &[u8], descriptor: (u64, u64)) {
    driver.ram.write(Gpa(OUT), header).unwrap();
    driver.ram.write(Gpa(OUT + 0x1000), payload).unwrap();
    let half = payload.len() as u64 / 2;
    driver.queue(descriptor.0, descriptor.1 | payload.len() as u64 & 0xf_ffff);
    let options = DATA | TSE | IXSM | TXSM;
    driver.queue(OUT, options | header.len() as u64);
    driver.queue(OUT + 0x1000, options | half);
    driver.queue(OUT + 0x1000 + half, options | EOP | RS | (payload.len() as u64 - half));
    driver.kick();
}

#[test]
fn a_packet_of_64_kib_becomes_right_segments() {
    let mut driver = Driver::new();
    let payload: Vec<u8> = (0..65_536u32).map(|at| ((at * 7) >> 3) as u8).collect();
    let mut header = ipv4(6, BROADCAST, b"")[..54].to_vec();
    header[16..18].fill(0);
    header[24..26].fill(0);
    let pseudo = plain_sum(&[&SOURCE[..], &DESTINATION, &[0, 6]].concat());
    header[50..52].copy_from_slice(&pseudo.to_be_bytes());
    segment(&mut driver, &header, &payload, context(TCP | IPV4 | TSE, 34, 50, 54, 1448));
    let (mut got, mut number) = (Vec::<u8>::new(), 0u16);
    while got.len() < payload.len() {
        let piece = driver.sent();
        let here = piece.len() - 54;
        assert_eq!(here, 1448.min(payload.len() - got.len()));
        let mut expected = ipv4(6, BROADCAST, &piece[54..]);
        let is_last = got.len() + here == payload.len();
        expected[18..20].copy_from_slice(&0xfffeu16.wrapping_add(number).to_be_bytes());
        expected[38..42].copy_from_slice(&0xffff_fff0u32.wrapping_add(got.len() as u32).to_be_bytes());
        expected[47] = if is_last { 0x19 } else { 0x10 };
        assert_eq!((&piece[..24], &piece[26..50]), (&expected[..24], &expected[26..50]), "segment {number}");
        assert_eq!(plain_sum(&piece[14..34]), 0xffff, "IP, segment {number}");
        let l4 =
            [&SOURCE[..], &DESTINATION, &[0, 6], &((piece.len() - 34) as u16).to_be_bytes(), &piece[34..]].concat();
        assert_eq!(plain_sum(&l4), 0xffff, "TCP, segment {number}");
        got.extend(&piece[54..]);
        number += 1;
    }
    assert!(got == payload);
    eventually("the descriptors are done", || driver.read(TDH) == driver.read(TDT));
    assert_eq!([1, 2, 3].map(|index| driver.tx_status(index)), [0, 0, DD]);
    assert_eq!((driver.read(0x40f8), driver.read(0x40fc), driver.read(0x4080)), (1, 0, 46));
    driver.nothing_sent();
}

#[test]
fn ipv6_and_udp_are_segmented_too() {
    let mut driver = Driver::new();
    let payload: Vec<u8> = (0..5000u32).map(|at| at as u8).collect();
    let addresses: Vec<u8> = (0..32).collect();
    for (protocol, checksum_at, header_bytes) in [(6u8, 70, 74), (17, 60, 62)] {
        let mut header =
            [&BROADCAST[..], &OTHER, &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, protocol, 64], &addresses].concat();
        header.resize(header_bytes, 0);
        let pseudo = plain_sum(&[&addresses[..], &[0, protocol]].concat());
        header[checksum_at..checksum_at + 2].copy_from_slice(&pseudo.to_be_bytes());
        let command = TSE | if protocol == 6 { TCP } else { 0 };
        driver.ram.write(Gpa(OUT), &[&header[..], &payload].concat()).unwrap();
        let (low, high) = context(command, 54, checksum_at, header_bytes as u64, 1400);
        driver.queue(low, high);
        driver.queue(OUT, DATA | TSE | TXSM | EOP | RS | (header_bytes + payload.len()) as u64);
        driver.kick();
        for part in payload.chunks(1400) {
            let piece = driver.sent();
            let l4_bytes = (piece.len() - 54) as u16;
            assert_eq!(piece[header_bytes..], *part);
            assert_eq!(piece[18..20], l4_bytes.to_be_bytes(), "payload length of IPv6");
            if protocol == 17 {
                assert_eq!(piece[58..60], l4_bytes.to_be_bytes(), "length of UDP");
            }
            let l4 = [&addresses[..], &[0, protocol], &l4_bytes.to_be_bytes(), &piece[54..]].concat();
            assert_eq!(plain_sum(&l4), 0xffff);
        }
    }
}

#[test]
fn contexts_of_both_kinds_are_kept_apart() {
    let mut driver = Driver::new();
    let right = ipv4(17, BROADCAST, b"payload of UDP");
    let (low, high) = context(0, 34, 40, 0, 0);
    driver.queue(low, high);
    let (low, high) = context(TCP | IPV4 | TSE, 34, 50, 54, 100);
    driver.queue(low, high);
    let mut blank = right.clone();
    let pseudo = [&SOURCE[..], &DESTINATION, &[0, 17], &(right.len() as u16 - 34).to_be_bytes()].concat();
    blank[40..42].copy_from_slice(&plain_sum(&pseudo).to_be_bytes());
    driver.ram.write(Gpa(OUT), &blank).unwrap();
    driver.queue(OUT, DATA | TXSM | EOP | RS | blank.len() as u64);
    driver.send();
    assert_eq!(driver.sent(), right);
    segment(&mut driver, &ipv4(6, BROADCAST, b"")[..54], &[1; 250], (low, high));
    assert_eq!([driver.sent().len(), driver.sent().len(), driver.sent().len()], [154, 154, 104]);
}

#[test]
fn vlan_tags_are_put_in() {
    let mut driver = Driver::new();
    let plain = frame(BROADCAST, 60);
    driver.ram.write(Gpa(OUT), &plain).unwrap();
    let high = EOP | RS | VLE | 60 | 0xa123 << 48;
    driver.queue(OUT, high);
    driver.send();
    assert_eq!(driver.sent(), plain, "only while CTRL.VME is set");
    driver.write(CTRL, CTRL_SLU | CTRL_VME);
    for kind in [0, DATA] {
        driver.queue(OUT, high | kind);
        driver.send();
        assert_eq!(driver.sent(), [&plain[..12], &[0x81, 0, 0xa1, 0x23], &plain[12..]].concat());
    }
}

#[test]
fn a_full_host_is_waited_for_and_nothing_is_dropped() {
    let mut driver = Driver::new();
    let total = 3000u32;
    let far = driver.tap.try_clone().unwrap();
    // A socket takes some hundred messages; the reader begins when it is full.
    let mut queued = 0;
    let mut fill = |driver: &mut Driver| {
        while queued < total && u64::from(driver.read(TDH)) != (driver.tx_tail + 1) % RING_LEN {
            let at = OUT + 0x100 * driver.tx_tail;
            let mut whole = frame(BROADCAST, 60);
            whole[20..24].copy_from_slice(&queued.to_be_bytes());
            driver.ram.write(Gpa(at), &whole).unwrap();
            driver.queue(at, EOP | RS | 60);
            driver.kick();
            queued += 1;
        }
        queued
    };
    let mut before = 0;
    loop {
        thread::sleep(Duration::from_millis(20));
        let now = fill(&mut driver);
        if now == before {
            break;
        }
        before = now;
    }
    assert!(before < total, "the socket is full");
    // Frames come in meanwhile.
    driver.offer(1);
    driver.arrive(&frame(MAC.0, 60));
    driver.received();
    let reader = thread::spawn(move || {
        let mut message = [0; 100];
        for number in 0..total {
            assert_eq!(far.recv(&mut message).unwrap(), HEADER_BYTES + 60);
            assert_eq!(message[HEADER_BYTES + 20..HEADER_BYTES + 24], number.to_be_bytes());
        }
    });
    eventually("all are queued", || fill(&mut driver) == total);
    reader.join().unwrap();
}

#[test]
fn frames_pass_a_stream_both_ways() {
    let (near, mut peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut driver = Driver::new();
    driver.card = card(near.into(), NetworkBackend::Passt, &driver.ram, &driver.line);
    driver.start(RCTL_SECRC);
    driver.ram.write(Gpa(OUT), &frame(BROADCAST, 9000)).unwrap();
    for _ in 0..7 {
        driver.queue(OUT, EOP | RS | 9000);
    }
    driver.kick();
    for _ in 0..7 {
        let mut got = vec![0; 9004];
        peer.read_exact(&mut got).unwrap();
        assert!(got == [&9000u32.to_be_bytes()[..], &frame(BROADCAST, 9000)].concat());
    }
    driver.offer(3);
    let on_stream = |frame: Vec<u8>| [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
    let three = [on_stream(frame(MAC.0, 60)), on_stream(frame(MAC.0, 40_000)), on_stream(frame(MAC.0, 1514))].concat();
    std::io::Write::write_all(&mut peer, &three).unwrap();
    assert_eq!(driver.received().bytes, frame(MAC.0, 60));
    assert_eq!(driver.received().bytes, frame(MAC.0, 1514), "the longest is too long for the card");
    // A peer that goes takes only the link with it.
    drop(peer);
    driver.send_frame(&frame(BROADCAST, 60));
    driver.send_frame(&frame(BROADCAST, 60));
}

#[test]
fn the_guests_address_is_learnt_from_what_it_sends() {
    let seen: Arc<Mutex<Vec<Vec<String>>>> = Arc::default();
    let sink = Arc::clone(&seen);
    let mut driver = Driver::new();
    let (near, _far) = UnixDatagram::pair().unwrap();
    let watch = AddressWatch::new(Arc::new(move |list| sink.lock().unwrap().push(list)));
    let backend = NetBackend::new(near.into(), NetworkBackend::Tap, watch).unwrap();
    driver.card = E1000::new(driver.ram.clone(), IrqLine::unconnected(), backend, MAC).unwrap();
    driver.start(RCTL_SECRC);
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 0, 9]);
    arp.extend([0; 36]);
    driver.send_frame(&arp);
    assert_eq!(*seen.lock().unwrap(), [vec!["10.0.0.9".to_owned()]]);
    driver.send_frame(&arp[..20]);
}
