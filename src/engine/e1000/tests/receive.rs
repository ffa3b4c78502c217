//! Frames on their way into the guest.

use super::*;

const IXSM: u8 = 4;
const LAST: u8 = 3;
/// As long as nothing is said of checksums.
const PLAIN: u8 = LAST | IXSM;

fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    (!crc).to_le_bytes()
}

fn tagged(to: [u8; 6], tag: u16, bytes: usize) -> Vec<u8> {
    let plain = frame(to, bytes);
    [&plain[..12], &[0x81, 0], &tag.to_be_bytes(), &plain[12..]].concat()
}

/// Whether the card takes a frame: it does when it is what comes before a frame that it always takes.
fn takes(driver: &mut Driver, frame_in_question: &[u8]) -> bool {
    driver.offer(2);
    driver.arrive(frame_in_question);
    let mark = frame(MAC.0, 61);
    driver.arrive(&mark);
    let first = driver.received();
    if first.bytes == mark {
        // One descriptor is left over.
        driver.arrive(&mark);
        driver.received();
        return false;
    }
    assert_eq!(first.bytes, frame_in_question);
    driver.received();
    true
}

#[test]
fn frames_arrive_padded_and_with_their_check_sequence_if_wanted() {
    let mut driver = Driver::new();
    driver.write(IMS, RXT0);
    driver.offer(7);
    for bytes in [60, 61, 1000, 1514] {
        driver.arrive(&frame(MAC.0, bytes));
        let expected = Received { bytes: frame(MAC.0, bytes), status: PLAIN, errors: 0, special: 0, descriptors: 1 };
        assert_eq!(driver.received(), expected);
        eventually("an interrupt", || driver.is_high());
        assert_eq!(driver.read(ICR) & RXT0, RXT0);
    }
    driver.arrive(&frame(MAC.0, 42));
    assert_eq!(driver.received().bytes, [frame(MAC.0, 42), vec![0; 18]].concat());
    driver.write(RCTL, RCTL_EN | RCTL_BAM);
    for bytes in [60, 1514] {
        driver.arrive(&frame(MAC.0, bytes));
        let whole = frame(MAC.0, bytes);
        assert_eq!(driver.received().bytes, [&whole[..], &crc(&whole)].concat());
    }
}

#[test]
fn the_ring_is_used_again_and_again() {
    let mut driver = Driver::new();
    driver.offer(RING_LEN - 1);
    for number in 0..50 {
        driver.arrive(&frame(MAC.0, 60 + number));
        assert_eq!(driver.received().bytes, frame(MAC.0, 60 + number));
        driver.offer(1);
    }
    driver.settle();
    assert_eq!(u64::from(driver.read(RDH)), driver.rx_next);
}

#[test]
fn unicast_frames_come_to_the_addresses_of_the_card() {
    let mut driver = Driver::new();
    assert!(takes(&mut driver, &frame(MAC.0, 60)));
    assert!(!takes(&mut driver, &frame(OTHER, 60)));
    driver.write(RAL + 8 * 15, u32::from_le_bytes([0x52, 0x54, 0, 9]));
    driver.write(RAL + 8 * 15 + 4, u32::from_le_bytes([9, 9, 0, 0]));
    assert!(!takes(&mut driver, &frame(OTHER, 60)), "the entry is not valid");
    driver.write(RAL + 8 * 15 + 4, u32::from_le_bytes([9, 9, 0, 0x80]));
    assert!(takes(&mut driver, &frame(OTHER, 60)));
    driver.write(RAL + 8 * 15 + 4, u32::from_le_bytes([9, 9, 1, 0x80]));
    assert!(!takes(&mut driver, &frame(OTHER, 60)), "an entry for sources");
    driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_UPE);
    assert!(takes(&mut driver, &frame(OTHER, 60)));
    assert!(!takes(&mut driver, &frame(MULTICAST, 60)));
    assert!(!takes(&mut driver, &frame(BROADCAST, 60)));
}

#[test]
fn broadcast_and_multicast_frames_come_when_they_are_wanted() {
    let mut driver = Driver::new();
    assert!(takes(&mut driver, &frame(BROADCAST, 60)));
    assert!(!takes(&mut driver, &frame(MULTICAST, 60)));
    driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_MPE);
    assert!(takes(&mut driver, &frame(MULTICAST, 60)));
    driver.write(RCTL, RCTL_EN | RCTL_SECRC);
    assert!(!takes(&mut driver, &frame(BROADCAST, 60)));
    // A group address may be an exact one.
    driver.write(RAL + 8, u32::from_le_bytes([0x01, 0x00, 0x5e, 0x7f]));
    driver.write(RAL + 12, u32::from_le_bytes([0x12, 0x34, 0, 0x80]));
    assert!(takes(&mut driver, &frame(MULTICAST, 60)));
}

#[test]
fn the_multicast_table_is_asked_by_a_hash() {
    // The last two bytes of MULTICAST are 0x12 and 0x34, the later one higher: 0x3412.
    for (offset, hash) in [(0, 0x341), (1, 0x682), (2, 0xd04), (3, 0x412)] {
        let mut driver = Driver::new();
        driver.write(RCTL, RCTL_EN | RCTL_SECRC | offset << 12);
        driver.write(MTA + 4 * (hash >> 5), !(1 << (hash & 31)));
        assert!(!takes(&mut driver, &frame(MULTICAST, 60)), "offset {offset}");
        driver.write(MTA + 4 * (hash >> 5), 1 << (hash & 31));
        driver.offer(1);
        driver.arrive(&frame(MULTICAST, 60));
        assert_eq!(driver.received().status, PLAIN | 0x80, "not by an exact address");
    }
}

#[test]
fn vlan_tags_are_taken_out_and_filtered_when_the_driver_wants_it() {
    let mut driver = Driver::new();
    let whole = tagged(MAC.0, 0xa123, 100);
    assert!(takes(&mut driver, &whole));
    driver.write(CTRL, CTRL_SLU | CTRL_VME);
    driver.offer(1);
    driver.arrive(&whole);
    let got = driver.received();
    assert_eq!((got.bytes, got.status, got.special), (frame(MAC.0, 100), PLAIN | 8, 0xa123));
    driver.write(CTRL, CTRL_SLU);
    driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_VFE);
    assert!(!takes(&mut driver, &whole));
    driver.write(VFTA + 4 * (0x123 >> 5), 1 << (0x123 & 31));
    assert!(takes(&mut driver, &whole));
    assert!(!takes(&mut driver, &tagged(MAC.0, 0xa122, 100)));
    assert!(takes(&mut driver, &frame(MAC.0, 100)), "without a tag there is nothing to filter");
}

#[test]
fn long_frames_come_only_when_they_are_wanted() {
    let mut driver = Driver::new();
    assert!(takes(&mut driver, &frame(MAC.0, 1514)));
    assert!(!takes(&mut driver, &frame(MAC.0, 1515)));
    assert!(takes(&mut driver, &tagged(MAC.0, 1, 1514)));
    assert!(!takes(&mut driver, &tagged(MAC.0, 1, 1515)));
    assert_eq!(driver.read(0x40ac), 2, "counted as too long");
    driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_LPE | RCTL_BSEX | 1 << 16);
    assert!(takes(&mut driver, &frame(MAC.0, 16_380)));
    assert!(!takes(&mut driver, &frame(MAC.0, 16_381)));
    assert!(!takes(&mut driver, &frame(MAC.0, 65_000)));
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    let sizes = [(0, 2048), (1, 1024), (2, 512), (3, 256)];
    let large = [(RCTL_BSEX | 1 << 16, 16_384), (RCTL_BSEX | 2 << 16, 8192), (RCTL_BSEX | 3 << 16, 4096)];
    let all = sizes.map(|(size, bytes)| (size << 16, bytes)).into_iter().chain(large);
    for (size, bytes) in all {
        let mut driver = Driver::new();
        driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_LPE | size);
        for length in
            [bytes - 1, bytes, bytes + 1, 7 * bytes].into_iter().filter(|length| (60..=16_380).contains(length))
        {
            driver.offer(7);
            driver.arrive(&frame(MAC.0, length));
            let got = driver.received();
            assert!(got.bytes == frame(MAC.0, length), "{length} bytes in buffers of {bytes}");
            assert_eq!(got.descriptors, length.div_ceil(bytes), "{length} bytes in buffers of {bytes}");
            // The descriptors that are left are given anew.
            driver.write(RCTL, 0);
            driver.write(RDH, 0);
            driver.write(RDT, 0);
            (driver.rx_next, driver.rx_tail) = (0, 0);
            driver.write(RCTL, RCTL_EN | RCTL_SECRC | RCTL_LPE | size);
        }
    }
}

#[test]
fn frames_wait_for_descriptors_and_come_in_order() {
    let mut driver = Driver::new();
    driver.write(IMS, RXO);
    for number in 0..8 {
        driver.arrive(&frame(MAC.0, 60 + number));
    }
    eventually("RXO", || driver.is_high());
    assert_eq!((driver.read(ICR) & RXO, driver.read(0x40a0)), (RXO, 1));
    for number in 0..8 {
        driver.offer(1);
        assert_eq!(driver.received().bytes, frame(MAC.0, 60 + number));
    }
    driver.settle();
    assert_eq!(driver.read(ICR) & RXT0, RXT0);
    // A frame that waits is told once, however often the driver gives nothing.
    driver.arrive(&frame(MAC.0, 60));
    eventually("RXO", || driver.is_high());
    driver.read(ICR);
    for _ in 0..100 {
        driver.write(RDT, driver.rx_tail as u32);
    }
    driver.settle();
    assert_eq!(driver.read(ICR), 0, "told once");
    driver.offer(1);
    assert_eq!(driver.received().bytes, frame(MAC.0, 60));
}

#[test]
fn what_a_guest_does_not_want_never_waits() {
    let mut driver = Driver::new();
    for _ in 0..20 {
        driver.arrive(&frame(OTHER, 60));
    }
    driver.arrive(&frame(MAC.0, 60));
    eventually("RXO for the one that it wants", || driver.read(0x40a0) == 1);
    driver.offer(1);
    assert_eq!(driver.received().bytes, frame(MAC.0, 60));
}

#[test]
fn the_driver_hears_when_descriptors_get_few() {
    for (threshold, left) in [(0, 4), (1, 2), (2, 1)] {
        let mut driver = Driver::new();
        driver.write(RCTL, RCTL_EN | RCTL_SECRC | threshold << 8);
        driver.offer(7);
        let told = (0..7).map(|_| {
            driver.arrive(&frame(MAC.0, 60));
            driver.received();
            driver.settle();
            driver.read(ICR) & RXDMT0 != 0
        });
        let told: Vec<bool> = told.collect();
        assert_eq!(told.iter().filter(|told| **told).count(), 1, "{told:?}");
        assert_eq!(told.iter().position(|told| *told), Some(6 - left), "{left} are left");
    }
}

#[test]
fn a_descriptor_without_address_gets_no_data() {
    let mut driver = Driver::new();
    driver.write(RCTL, RCTL_EN | RCTL_SECRC | 3 << 16);
    driver.ram.write(Gpa(0), &[0xcc; 4096]).unwrap();
    driver.describe_buffer(0);
    driver.describe_buffer(Driver::rx_buffer(1));
    driver.describe_buffer(0);
    driver.write(RDT, 3);
    driver.arrive(&frame(MAC.0, 300));
    eventually("RNBC", || driver.read(0x40a0) == 1);
    assert_eq!(driver.rx_status(0), 0, "it takes nothing until there is room for all");
    driver.describe_buffer(Driver::rx_buffer(3));
    driver.write(RDT, 4);
    eventually("the frame", || driver.rx_status(3) & DD != 0);
    assert_eq!([0, 1, 2, 3].map(|index| driver.rx_status(index)), [DD, DD, DD, PLAIN]);
    let got = [driver.bytes(Driver::rx_buffer(1), 256), driver.bytes(Driver::rx_buffer(3), 44)].concat();
    assert_eq!(got, frame(MAC.0, 300));
    assert_eq!(driver.bytes(0, 4096), [0xcc; 4096]);
}

#[test]
fn checksums_are_verified_when_the_driver_wants_it() {
    const IPCS: u8 = 0x40;
    const TCPCS: u8 = 0x20;
    const IPE: u8 = 0x40;
    const TCPE: u8 = 0x20;
    let mut driver = Driver::new();
    let spoil = |mut frame: Vec<u8>, at: usize| {
        frame[at] ^= 1;
        frame
    };
    let tcp = ipv4(6, MAC.0, b"something that is odd");
    let udp = ipv4(17, MAC.0, b"something that is even");
    let mut no_sum = udp.clone();
    no_sum[40..42].fill(0);
    let mut fragment = udp.clone();
    fragment[20] = 0x20;
    fragment[24..26].fill(0);
    let sum = !plain_sum(&fragment[14..34]);
    fragment[24..26].copy_from_slice(&sum.to_be_bytes());
    let with_tag = [&tcp[..12], &[0x81, 0, 0, 7], &tcp[12..]].concat();
    let both = 0x300;
    for (rxcsum, frame, status, errors) in [
        (0, tcp.clone(), IXSM, 0),
        (both, tcp.clone(), IPCS | TCPCS, 0),
        (both, with_tag, IPCS | TCPCS, 0),
        (both, [tcp.clone(), vec![0xaa; 9]].concat(), IPCS | TCPCS, 0),
        (0x100, tcp.clone(), IPCS, 0),
        (0x200, tcp.clone(), TCPCS, 0),
        (both, udp.clone(), IPCS | TCPCS, 0),
        (both, no_sum, IPCS, 0),
        (both, fragment, IPCS, 0),
        (both, spoil(tcp.clone(), 24), IPCS | TCPCS, IPE),
        (both, spoil(tcp.clone(), 60), IPCS | TCPCS, TCPE),
        (both, spoil(udp.clone(), 41), IPCS | TCPCS, TCPE),
        (both, tcp[..60].to_vec(), IPCS, 0), // shorter than it says
        (both, spoil(tcp.clone(), 12), IXSM, 0),
        (both, frame(MAC.0, 100), IXSM, 0),
        (both, [&tcp[..14], &[0x40; 46]].concat(), IXSM, 0),
        (both, [&tcp[..14], &[0x4f, 0, 0xff, 0xff], &[0; 42]].concat(), IXSM, 0),
    ] {
        driver.write(RXCSUM, rxcsum);
        driver.offer(1);
        driver.arrive(&frame);
        let got = driver.received();
        assert_eq!((got.status, got.errors), (LAST | status, errors), "{rxcsum:#x} {frame:02x?}");
    }
}
