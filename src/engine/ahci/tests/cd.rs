//! The CD drive: packets, the tray, and changes of the medium.

use super::*;

const TEST_UNIT_READY: [u8; 6] = [0; 6];
const EVENTS: [u8; 10] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
const OPEN: [u8; 6] = [0x1b, 0, 0, 0, 2, 0];
const CLOSE: [u8; 6] = [0x1b, 0, 0, 0, 3, 0];
const LOCK: [u8; 6] = [0x1e, 0, 0, 0, 1, 0];

/// A started drive with a medium of 100 blocks that the guest knows.
fn with_medium() -> Driver {
    let mut driver = Driver::new(vec![]);
    driver.tray.insert(numbered(400));
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed(0x64));
    assert_eq!(driver.sense(), (6, 0x28, 0));
    assert_eq!(driver.packet(&EVENTS, 8), GOOD_DMA);
    driver
}

#[test]
fn a_drive_identifies_itself_and_refuses_to_be_a_disk() {
    let mut driver = Driver::new(vec![]);
    assert_eq!(driver.ata(CD, Ata { command: 0xa1, ..Ata::default() }, &[(DATA, 512)]), GOOD_PIO_IN);
    assert_eq!(driver.ram.get_u16(Gpa(DATA)), Ok(0x85c0));
    assert_eq!(driver.ata(CD, Ata { command: 0xec, ..Ata::default() }, &[(DATA, 512)]), failed(4));
    assert_eq!(driver.bytes(Driver::frames(CD) + 0x44, 3), [0x01, 0x14, 0xeb]);
    assert_eq!(driver.ata(CD, Ata { command: 0xa0, ..Ata::default() }, &[]), failed(4), "no packet came with it");
    assert_eq!(driver.ata(CD, Ata { command: 0xc8, count: 1, ..Ata::default() }, &[(DATA, 512)]), failed(4));
    assert_eq!(driver.ata(CD, Ata { command: 0xef, features: 3, count: 0x42, ..Ata::default() }, &[]), GOOD_DMA);
}

#[test]
fn blocks_are_read_by_dma_and_by_pio() {
    let mut driver = with_medium();
    assert_eq!(driver.packet(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), GOOD_DMA);
    assert_eq!(driver.data(8), [0, 0, 0, 99, 0, 0, 8, 0]);
    assert_eq!(driver.packet(&[0x28, 0, 0, 0, 0, 10, 0, 0, 2, 0], 4096), GOOD_DMA);
    assert_eq!((driver.ram.get_u64(Gpa(DATA)), driver.ram.get_u64(Gpa(DATA + 2048))), (Ok(40), Ok(44)));
    assert_eq!(driver.packet(&[0xa8, 0, 0, 0, 0, 99, 0, 0, 0, 1, 0, 0], 2048), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(396));
    assert_eq!(driver.packet(&[0xbe, 0, 0, 0, 0, 3, 0, 0, 1, 0x10, 0, 0], 2048), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(12));

    let pio = Ata { command: 0xa0, lba: 2048 << 8, ..Ata::default() };
    driver.fill(CD, 0, pio, Some(&[0x28, 0, 0, 0, 0, 20, 0, 0, 2, 0]), &[(DATA, 4096)]);
    assert_eq!(driver.finish(CD), End { status: 0x50, error: 0, is: 3 });
    assert_eq!((driver.ram.get_u64(Gpa(DATA)), driver.moved(CD)), (Ok(80), 4096));
    assert_eq!(driver.bytes(Driver::frames(CD) + 0x30, 2), [0, 8], "the last block of the byte count limit");
    assert_eq!(driver.bytes(Driver::frames(CD) + 0x4c, 1), [3], "the interrupt reason");
}

#[test]
fn answers_are_cut_to_the_allocation_length() {
    let mut driver = with_medium();
    for (packet, bytes) in [
        (&[0x12, 0, 0, 0, 36, 0][..], 36),
        (&[0x12, 0, 0, 0, 5, 0], 5),
        (&[0x12, 0, 0, 0, 255, 0], 36),
        (&[0x43, 0, 0, 0, 0, 0, 0, 0, 4, 0], 4),
        (&[0x43, 2, 2, 0, 0, 0, 0, 1, 0, 0], 48),
        (&[0x43, 0, 1, 0, 0, 0, 0, 1, 0, 0], 12),
        (&[0x46, 2, 0, 0x1e, 0, 0, 0, 1, 0, 0], 16),
        (&[0x51, 0, 0, 0, 0, 0, 0, 1, 0, 0], 34),
        (&[0x52, 1, 0, 0, 0, 1, 0, 1, 0, 0], 36),
        (&[0x5a, 0, 0x2a, 0, 0, 0, 0, 1, 0, 0], 28),
        (&[0x1a, 0, 0x2a, 0, 255, 0], 24),
        (&[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], 8),
        (&[0x4a, 1, 0, 0, 0x10, 0, 0, 1, 0, 0], 8),
        (&[0x28, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        (&[0x2b, 0, 0, 0, 0, 99, 0, 0, 0, 0], 0),
    ] {
        assert_eq!(driver.packet(packet, 512), GOOD_DMA, "{packet:x?}");
        assert_eq!(driver.moved(CD), bytes, "{packet:x?}");
        assert_eq!(driver.data(512)[bytes as usize..], vec![0xcc; 512 - bytes as usize], "{packet:x?}");
    }
}

#[test]
fn what_cannot_be_done_has_a_sense() {
    let mut driver = with_medium();
    for (packet, sense) in [
        (&[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], (5, 0x20, 0)),
        (&[0x28, 0, 0, 0, 0, 99, 0, 0, 2, 0], (5, 0x21, 0)),
        (&[0x28, 0, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], (5, 0x21, 0)),
        (&[0xa8, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0, 0], (5, 0x21, 0)),
        (&[0x12, 1, 0, 0, 36, 0], (5, 0x24, 0)),
        (&[0x43, 0, 3, 0, 0, 0, 0, 0, 4, 0], (5, 0x24, 0)),
        (&[0x43, 0, 0, 0, 0, 0, 2, 0, 4, 0], (5, 0x24, 0)),
        (&[0x4a, 0, 0, 0, 0x10, 0, 0, 0, 8, 0], (5, 0x24, 0)),
        (&[0x5a, 0, 0x05, 0, 0, 0, 0, 1, 0, 0], (5, 0x24, 0)),
        (&[0x5a, 0, 0xea, 0, 0, 0, 0, 1, 0, 0], (5, 0x39, 0)),
        (&[0xad, 0, 0, 0, 0, 0, 0, 0, 8, 4, 0, 0], (5, 0x30, 0)),
        (&[0xbe, 0, 0, 0, 0, 3, 0, 0, 1, 0xf8, 0, 0], (5, 0x24, 0)),
    ] {
        assert_eq!(driver.packet(packet, 512), failed(0x54), "{packet:x?}");
        assert_eq!(driver.sense(), sense, "{packet:x?}");
        assert_eq!(driver.sense(), (0, 0, 0), "the sense is told once");
    }
}

#[test]
fn an_empty_drive_says_that_it_is_empty() {
    let mut driver = Driver::new(vec![]);
    for packet in [&TEST_UNIT_READY[..], &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]] {
        assert_eq!(driver.packet(packet, 512), failed(0x24));
        assert_eq!(driver.sense(), (2, 0x3a, 0));
    }
    driver.packet(&EVENTS, 8);
    assert_eq!(driver.data(8), [0, 6, 4, 0x10, 0, 0, 0, 0]);
    driver.packet(&[0x46, 0, 0, 0, 0, 0, 0, 0, 8, 0], 8);
    assert_eq!(driver.data(8)[6..], [0, 0], "no profile");
}

#[test]
fn an_exchange_is_seen_as_removal_and_then_as_another_medium() {
    let mut driver = with_medium();
    driver.tray.insert(numbered(800));
    assert_eq!(driver.packet(&EVENTS, 8), GOOD_DMA);
    assert_eq!(driver.data(8)[4..6], [2, 2], "new medium, present");
    driver.packet(&EVENTS, 8);
    assert_eq!(driver.data(8)[4..6], [0, 2], "an event is told once");
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed(0x24));
    assert_eq!(driver.sense(), (2, 0x3a, 0));
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed(0x64));
    assert_eq!(driver.sense(), (6, 0x28, 0));
    assert_eq!(driver.packet(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), GOOD_DMA);
    assert_eq!(driver.data(4), [0, 0, 0, 199]);
}

#[test]
fn the_host_takes_a_locked_medium_out() {
    let mut driver = with_medium();
    assert_eq!(driver.packet(&LOCK, 0), GOOD_DMA);
    assert_eq!(driver.packet(&OPEN, 0), failed(0x54));
    assert_eq!(driver.sense(), (5, 0x53, 2));
    assert!(driver.tray.has_medium());
    driver.tray.eject();
    assert!(!driver.tray.has_medium());
    driver.packet(&EVENTS, 8);
    assert_eq!(driver.data(8)[4..6], [3, 0]);
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed(0x24));
    assert_eq!(driver.sense(), (2, 0x3a, 0));
    assert_eq!(driver.packet(&OPEN, 0), GOOD_DMA, "the lock went with the medium");
}

#[test]
fn the_guest_opens_and_closes_the_tray() {
    let mut driver = with_medium();
    assert_eq!(driver.packet(&OPEN, 0), GOOD_DMA);
    assert!(!driver.tray.has_medium());
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed(0x24));
    assert_eq!(driver.sense(), (2, 0x3a, 2));
    driver.packet(&EVENTS, 8);
    assert_eq!(driver.data(8)[4..6], [3, 1], "removed, open");
    assert_eq!(driver.packet(&CLOSE, 0), GOOD_DMA);
    assert!(driver.tray.has_medium());
    assert_eq!(driver.sense(), (6, 0x28, 0), "REQUEST SENSE may be the first to tell");
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), GOOD_DMA);
    driver.packet(&OPEN, 0);
    driver.tray.insert(numbered(4));
    assert!(driver.tray.has_medium(), "inserting closes the tray");
}

#[test]
fn a_reset_unlocks_the_tray() {
    let mut driver = with_medium();
    driver.packet(&LOCK, 0);
    driver.set(CD, P_SCTL, 1);
    driver.set(CD, P_SCTL, 0);
    assert_eq!(driver.packet(&OPEN, 0), GOOD_DMA);
}

#[test]
fn an_eject_during_a_read_lets_the_read_end() {
    let gate = Gate::new(numbered(400));
    let mut driver = Driver::new(vec![]);
    driver.tray.insert(gate.clone());
    driver.packet(&TEST_UNIT_READY, 0);
    gate.shut();
    let dma = Ata { command: 0xa0, features: 1, ..Ata::default() };
    driver.fill(CD, 0, dma, Some(&[0x28, 0, 0, 0, 0, 7, 0, 0, 1, 0]), &[(DATA, 2048)]);
    driver.set(CD, P_CI, 1);
    gate.held();
    driver.tray.eject();
    gate.open();
    assert_eq!(driver.end(CD), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(28));
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed(0x24));
}

#[test]
fn a_medium_that_the_host_cannot_read_is_tried_again_and_may_be_taken_out() {
    let gate = Gate::new(numbered(400));
    let mut driver = Driver::new(vec![]);
    driver.tray.insert(gate.clone());
    driver.packet(&TEST_UNIT_READY, 0);
    gate.set_full(true);
    let dma = Ata { command: 0xa0, features: 1, ..Ata::default() };
    driver.fill(CD, 0, dma, Some(&[0x28, 0, 0, 0, 0, 7, 0, 0, 1, 0]), &[(DATA, 2048)]);
    driver.set(CD, P_CI, 1);
    assert!(driver.reason().contains("space"));
    driver.tray.eject();
    driver.faults.resume();
    assert_eq!(driver.end(CD), failed(0x24), "the next attempt finds the drive empty");
}
