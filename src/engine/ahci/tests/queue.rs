//! Queued commands, as a driver issues them.

use super::*;

fn queued(write: bool, slot: u16, lba: u64, sectors: u16) -> Ata {
    Ata { command: 0x60 | u8::from(write), features: sectors as u8, lba, device: 0x40, count: slot << 3 }
}

fn issue(driver: &mut Driver, slots: u32) {
    driver.set(0, P_SACT, slots);
    driver.set(0, P_CI, slots);
}

#[test]
fn thirty_two_queued_reads_are_all_answered() {
    let mut driver = Driver::new(vec![numbered(64)]);
    assert_ne!(driver.read(0) & 1 << 30, 0, "CAP.SNCQ");
    for slot in 0..32u16 {
        let prdt = [(DATA + u64::from(slot) * 512, 512)];
        driver.fill(0, slot.into(), queued(false, slot, 63 - u64::from(slot), 1), None, &prdt);
    }
    issue(&mut driver, u32::MAX);
    driver.until("all tags end", |driver| driver.port(0, P_SACT) == 0);
    assert_eq!(driver.port(0, P_CI), 0);
    assert_eq!(driver.port(0, P_IS) & 0x4000_0008, 8, "Set Device Bits and no error");
    for slot in 0..32 {
        assert_eq!(driver.bytes(DATA + slot * 512, 1)[0], 63 - slot as u8);
    }
}

#[test]
fn a_failed_tag_stays_and_is_told_once_by_log_10h() {
    let mut driver = Driver::new(vec![numbered(64)]);
    driver.fill(0, 7, queued(false, 7, 64, 1), None, &[(DATA, 512)]);
    issue(&mut driver, 1 << 7);
    driver.until("the error", |driver| driver.port(0, P_IS) & 0x4000_0000 != 0);
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_SACT)), (0, 1 << 7));
    driver.restart(0);
    assert_eq!(driver.port(0, P_SACT), 0);
    let log = Ata { command: 0x2f, lba: 0x10, count: 1, ..Ata::default() };
    assert_eq!(driver.ata(0, log, &[(DATA, 512)]), GOOD_PIO_IN);
    let page = driver.data(512);
    assert_eq!(page[..5], [7, 0, 0x51, 0x10, 64]);
    assert_eq!(page.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    assert_eq!(driver.ata(0, Ata { command: 0x47, ..log }, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.data(1), [0x80], "told once");
}

#[test]
fn a_tag_that_is_not_its_slot_is_refused() {
    let mut driver = Driver::new(vec![numbered(64)]);
    driver.fill(0, 3, queued(false, 4, 0, 1), None, &[(DATA, 512)]);
    issue(&mut driver, 1 << 3);
    driver.until("the error", |driver| driver.port(0, P_IS) & 0x4000_0000 != 0);
    assert_eq!(driver.port(0, P_TFD) >> 8, 4);
}

/// Starts queued reads of slots 0 and 1, of which the first is held.
fn held_queue() -> (Driver, Arc<Gate>) {
    let gate = Gate::new(numbered(64));
    let mut driver = Driver::new(vec![gate.clone()]);
    gate.shut();
    for slot in 0..2u16 {
        driver.fill(0, slot.into(), queued(false, slot, 5, 1), None, &[(DATA, 512)]);
    }
    issue(&mut driver, 0b11);
    gate.held();
    (driver, gate)
}

#[test]
fn a_command_leaves_ci_when_the_device_has_taken_it_and_sact_when_it_is_done() {
    let (mut driver, gate) = held_queue();
    // In turn after slot 0, where the port began.
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_SACT)), (0b01, 0b11));
    assert_eq!((driver.port(0, P_TFD), driver.port(0, P_IS)), (0x50, 0), "ready for the next, and nothing to tell");
    gate.open();
    driver.until("both end", |driver| driver.port(0, P_SACT) == 0);
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_IS), driver.port(0, P_TFD)), (0, 8, 0x50));
    // The frame that is stored: type, interrupt, status, error, and the tag that ended last.
    assert_eq!(driver.bytes(Driver::frames(0) + 0x58, 8), [0xa1, 0x40, 0x50, 0, 1, 0, 0, 0]);
}

#[test]
fn every_reset_drops_what_is_queued() {
    type Reset = fn(&mut Driver);
    let resets: [Reset; 4] = [
        |driver| driver.set(0, P_CMD, 0x16),
        |driver| {
            driver.set(0, P_SCTL, 1);
            driver.set(0, P_SCTL, 0);
        },
        |driver| driver.write(GHC, 0x8000_0001),
        |driver| driver.hba.reset(),
    ];
    for reset in resets {
        let (mut driver, gate) = held_queue();
        let opener = thread::spawn({
            let (gate, shared) = (Arc::clone(&gate), Arc::clone(&driver.hba.shared));
            move || {
                while shared.hba().running.is_some_and(|running| !running.cancelled) {
                    thread::yield_now();
                }
                gate.open();
            }
        });
        reset(&mut driver);
        opener.join().unwrap();
        driver.until("nothing runs", |driver| {
            driver.read(GHC) & 1 == 0 && driver.hba.shared.hba().running.is_none() && driver.port(0, P_SACT) == 0
        });
        assert_eq!((driver.port(0, P_CI), driver.port(0, P_IS) & 8), (0, 0), "nothing is told of them");
        driver.write(GHC, 0x8000_0002);
        driver.start(0);
        driver.fill(0, 0, queued(false, 0, 7, 1), None, &[(DATA, 512)]);
        issue(&mut driver, 1);
        driver.until("another", |driver| driver.port(0, P_SACT) == 0);
        assert_eq!(driver.data(1), [7]);
    }
}

#[test]
fn another_kind_of_command_between_queued_ones_is_refused_and_logged_as_such() {
    let (mut driver, gate) = held_queue();
    driver.fill(0, 9, Ata { command: 0xe7, ..Ata::default() }, None, &[]);
    driver.set(0, P_CI, 1 << 9);
    gate.open();
    driver.until("the error", |driver| driver.port(0, P_IS) & 0x4000_0000 != 0);
    assert_eq!((driver.port(0, P_CI) & 1 << 9, driver.port(0, P_TFD)), (1 << 9, 0x451));
    driver.restart(0);
    let log = Ata { command: 0x2f, lba: 0x10, count: 1, ..Ata::default() };
    // A page that has no place in memory is told again.
    driver.fill(0, 0, log, None, &[(0xffff_ffff_0000, 512)]);
    driver.set(0, P_CI, 1);
    driver.until("the bad place", |driver| driver.port(0, P_IS) & 0x1000_0000 != 0);
    driver.restart(0);
    assert_eq!(driver.ata(0, log, &[(DATA, 512)]), GOOD_PIO_IN);
    assert_eq!(driver.data(4), [0x80, 0, 0x51, 4]);
}

#[test]
fn a_cd_drive_has_no_queue() {
    let mut driver = Driver::new(vec![]);
    driver.fill(CD, 0, queued(false, 0, 0, 1), None, &[(DATA, 512)]);
    driver.set(CD, P_SACT, 1);
    driver.set(CD, P_CI, 1);
    driver.until("the error", |driver| driver.port(CD, P_IS) & 0x4000_0000 != 0);
    assert_eq!(driver.port(CD, P_CI), 1, "it never took it");
}

#[test]
fn counts_have_sixteen_bits_and_end_with_the_disk() {
    let mut driver = Driver::new(vec![numbered(0x102)]);
    let frame = |count: u16, lba: u64, command: u8, device: u8| {
        let [low, high] = count.to_le_bytes();
        let lba = lba.to_le_bytes();
        [0x27, 0x80, command, low, lba[0], lba[1], lba[2], device, lba[3], lba[4], lba[5], high, 0, 0, 0, 0, 0, 0, 0, 0]
    };
    let mut ends = |count, lba, command, device| {
        driver.fill_raw(0, 0, &frame(count, lba, command, device), None, &[(DATA, 0x102 * 512)]);
        issue(&mut driver, 1);
        driver.until("an end", |driver| driver.port(0, P_IS) & 0x4000_0008 != 0);
        let (moved, error) = (driver.moved(0), driver.port(0, P_TFD) >> 8);
        driver.restart(0);
        (error, moved)
    };
    assert_eq!(ends(0x102, 0, 0x60, 0x40), (0, 0x102 * 512));
    assert_eq!(ends(0x101, 1, 0x61, 0xc0), (0, 0x101 * 512), "past the cache");
    for (count, lba) in [(0x102, 1), (0, 0), (1, 0x102), (1, u64::MAX >> 16)] {
        assert_eq!(ends(count, lba, 0x60, 0x40).0, 0x10, "{count} at {lba}");
    }
}
