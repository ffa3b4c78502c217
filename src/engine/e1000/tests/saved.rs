//! A card that is suspended in the middle of its work, and another that goes on with it.

use super::{
    super::super::saved::{SaveState, State, testing},
    *,
};

/// Header bytes of the packets that are segmented here, and payload of each segment.
const HEADER: u64 = 54;
const MSS: u64 = 10;
/// Where IPv4's and TCP's headers and checksums are.
const HEADERS: u64 = 14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40;

/// Pauses the card, for ever.
fn suspend(driver: Driver) -> (State, Driver) {
    driver.card.io().quiesce();
    (driver.card.save(), driver)
}

/// A card that has taken the state on, still paused, with the driver of before and a new cable.
fn restored(state: &State, old: &Driver) -> Driver {
    let mut driver = Driver::with_ram(old.ram.clone());
    driver.card.io().quiesce();
    driver.card.restore(state).unwrap();
    (driver.rx_next, driver.rx_tail, driver.tx_tail) = (old.rx_next, old.rx_tail, old.tx_tail);
    driver
}

/// Half a packet behind a context, a frame that waits for descriptors and was told, a word of the EEPROM half read.
fn in_the_middle() -> Driver {
    let mut driver = Driver::new();
    driver.works();
    driver.write(MTA + 4 * 7, 0x8000_0001);
    driver.write(RAL + 8, 0x1234_5678);
    driver.write(RAL + 12, 0x8000_9abc);
    driver.write(VFTA, 6);
    driver.write(EERD, 0x0101);
    driver.write(MDIC, 1 << 26 | 1 << 21 | 4 << 16 | 0x1e1); // advertise less
    assert_eq!(driver.card.bar_write(1, Access::new(0, Width::B4), u64::from(EERD)), Ok(Effect::None));
    // Start bit, read, word 1, and four bits of it.
    for bit in [1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0] {
        clock(&mut driver, bit);
    }
    driver.queue(HEADERS, CONTEXT | TSE | TCP | IPV4 | HEADER << 40 | MSS << 48);
    driver.ram.write(Gpa(OUT), &ipv4(6, BROADCAST, &[0xa5; 30])).unwrap();
    driver.queue(OUT, super::DATA | TSE | TXSM | IXSM | 60);
    driver.send();
    driver.write(IMS, RXO | TXQE << 8);
    driver.arrive(&frame(MAC.0, 77));
    eventually("RXO", || driver.is_high());
    driver
}

/// A clock of the EEPROM with a data bit; gives what it answers.
fn clock(driver: &mut Driver, bit: u32) -> u32 {
    driver.write(EECD, 0x42 | bit << 2);
    driver.write(EECD, 0x43 | bit << 2);
    driver.read(EECD) >> 3 & 1
}

#[test]
fn the_state_is_what_it_always_was() {
    let (state, old) = suspend(in_the_middle());
    let again = restored(&testing::matches_golden(&state), &old);
    assert_eq!(again.card.save(), state);
}

#[test]
fn registers_latches_and_frames_go_on_where_they_stopped() {
    let (state, old) = suspend(in_the_middle());
    let mut driver = restored(&state, &old);
    assert!(driver.is_high());
    driver.card.io().resume();
    driver.settle();
    assert_eq!(driver.read(ICR) & RXO, RXO);
    assert!(!driver.is_high());
    assert_eq!(driver.read(MTA + 4 * 7), 0x8000_0001);
    assert_eq!((driver.read(RAL + 8), driver.read(RAL + 12), driver.read(VFTA)), (0x1234_5678, 0x8000_9abc, 6));
    assert_eq!(driver.read(EERD), 0x0100_0110, "the second word of the address, 54:01 in its other order");
    assert_eq!(driver.card.bar_read(1, Access::new(4, Width::B4)), Ok(0x0100_0110));
    driver.write(MDIC, 2 << 26 | 1 << 21 | 4 << 16);
    assert_eq!(driver.read(MDIC) & 0xffff, 0x1e1);
    let rest = (0..12).fold(0, |word, _| word << 1 | clock(&mut driver, 0));
    assert_eq!(rest, 0x100, "after the first four bits of 0100");
    assert_eq!((driver.read(0x4074), driver.read(0x4080)), (1, 1), "good frames of before, each way");

    // The frame that waited is not told again, and comes when there is room.
    driver.settle();
    assert_eq!(driver.read(ICR) & RXO, 0);
    driver.offer(1);
    assert_eq!(driver.received().bytes, frame(MAC.0, 77));

    // The rest of the packet.
    driver.queue(OUT + 60, super::DATA | TSE | EOP | RS | 24);
    driver.send();
    let whole = ipv4(6, BROADCAST, &[0xa5; 30]);
    for number in 0..3u32 {
        let segment = driver.sent();
        assert_eq!((segment.len(), &segment[54..]), (64, &whole[54..64]));
        assert_eq!(segment[38..42], 0xffff_fff0u32.wrapping_add(10 * number).to_be_bytes());
    }
    driver.nothing_sent();
    driver.works();
}

#[test]
fn a_packet_whose_frames_are_on_their_way_goes_on_with_the_next_frame() {
    let mut driver = Driver::new();
    driver.ram.write(Gpa(OUT), &ipv4(6, BROADCAST, &[0x5a; 20_000])).unwrap();
    driver.queue(HEADERS, CONTEXT | TSE | TCP | IPV4 | HEADER << 40 | MSS << 48);
    driver.queue(OUT, super::DATA | TSE | EOP | RS | (HEADER + 20_000));
    driver.kick();
    let mut sequences = vec![sequence(&driver.sent())];
    let (state, old) = suspend(driver);
    old.tap.set_nonblocking(true).unwrap();
    let mut message = [0; 200];
    while let Ok(bytes) = old.tap.recv(&mut message) {
        sequences.push(sequence(&message[HEADER_BYTES..bytes]));
    }
    assert!(sequences.len() < 2000, "the host has room for fewer");
    let mut driver = restored(&state, &old);
    driver.nothing_sent();
    driver.card.io().resume();
    while sequences.len() < 2000 {
        sequences.push(sequence(&driver.sent()));
    }
    assert!(sequences.iter().enumerate().all(|(number, sequence)| *sequence == 10 * number as u32));
    eventually("the packet is done", || driver.read(TDH) == driver.read(TDT));
    assert_eq!(driver.tx_status(1) & DD, DD);
    driver.nothing_sent();
    driver.works();
}

/// How far the segment is in its stream.
fn sequence(frame: &[u8]) -> u32 {
    u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]).wrapping_sub(0xffff_fff0)
}

#[test]
fn what_was_told_before_is_sent_after() {
    let mut driver = Driver::new();
    driver.card.io().quiesce();
    driver.ram.write(Gpa(OUT), &frame(BROADCAST, 60)).unwrap();
    driver.queue(OUT, EOP | RS | 60);
    driver.kick();
    let (state, old) = suspend(driver);
    let driver = restored(&state, &old);
    std::thread::sleep(Duration::from_millis(20));
    driver.nothing_sent();
    driver.card.io().resume();
    assert_eq!(driver.sent(), frame(BROADCAST, 60));
}

/// With a packet in the middle of its frames too, which `in_the_middle` has not.
#[test]
fn spoilt_states_are_refused_or_as_harmless_as_a_driver() {
    let (gathering, _) = suspend(in_the_middle());
    let mut driver = Driver::new();
    driver.ram.write(Gpa(OUT), &ipv4(6, BROADCAST, &[0x5a; 20_000])).unwrap();
    driver.queue(HEADERS, CONTEXT | TSE | TCP | IPV4 | HEADER << 40 | MSS << 48);
    driver.queue(OUT, super::DATA | TSE | TXSM | EOP | RS | (HEADER + 20_000));
    driver.kick();
    driver.sent();
    let (sending, old) = suspend(driver);
    for state in [gathering, sending] {
        let (mut taken, mut refused) = (0, 0);
        testing::spoil(&state, |bad| {
            let mut driver = Driver::with_ram(old.ram.clone());
            driver.card.io().quiesce();
            if driver.card.restore(bad).is_err() {
                refused += 1;
                return;
            }
            taken += 1;
            driver.card.io().resume();
            driver.write(TCTL, TCTL_EN | TCTL_PSP);
            driver.write(RDT, 3);
            driver.write(TDT, 5);
            clock(&mut driver, 1);
            driver.write(MDIC, 2 << 26 | 1 << 21);
            driver.arrive(&frame(MAC.0, 100));
            driver.settle();
            for at in (0..0x6000).step_by(4) {
                driver.read(at);
            }
            driver.drain();
            driver.start(RCTL_BAM | RCTL_SECRC);
            driver.drain();
            driver.arrive(&frame(MAC.0, 200));
            driver.offer(1);
            driver.send_frame(&frame(BROADCAST, 100));
            assert_eq!(driver.sent(), frame(BROADCAST, 100));
        });
        assert!(taken > 100 && refused > 300, "{taken} taken, {refused} refused");
    }
}
