//! An HBA that is suspended in the middle of its work, and another that goes on with it.

use super::{
    super::super::saved::{SaveState, State, testing},
    *,
};

const SET_FEATURES: u8 = 0xef;
const WRITE_DMA: u8 = 0xca;
const READ_DMA: u8 = 0xc8;
const TEST_UNIT_READY: [u8; 6] = [0; 6];
const OPEN_TRAY: [u8; 6] = [0x1b, 0, 0, 0, 2, 0];
const LOCK: [u8; 6] = [0x1e, 0, 0, 0, 1, 0];
const EVENTS: [u8; 10] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
const FAILED_CD: End = failed_cd(2);

const fn failed_cd(key: u8) -> End {
    End { status: 0x51, error: key << 4 | 4, is: 0x4000_0001 }
}

/// One sector of the first disk, by DMA.
fn sector(command: u8, lba: u64) -> Ata {
    Ata { command, lba, device: 0x40, count: 1, ..Ata::default() }
}

/// Pauses the HBA and ends it.
fn suspend(driver: Driver) -> (State, GuestRam) {
    driver.hba.io().quiesce();
    let (state, ram) = (driver.hba.save(), driver.ram.clone());
    drop(driver); // joins the worker
    (state, ram)
}

/// An HBA that has taken the state on, still paused.
fn restored(state: &State, ram: GuestRam, disks: Vec<Arc<dyn BlockBackend>>, medium: Option<Arc<RawFile>>) -> Driver {
    let mut driver = Driver::with_ram(ram, disks);
    if let Some(medium) = medium {
        driver.tray.insert(medium);
    }
    driver.hba.io().quiesce();
    driver.hba.restore(state).unwrap();
    driver
}

fn go_on(driver: &Driver) {
    driver.hba.io().resume();
    driver.faults.resume();
}

/// A disk with settings of its own, a failed command, a CD that was changed, and a command that waits for the host.
fn in_the_middle() -> (Driver, Arc<Gate>) {
    let gate = Gate::new(numbered(64));
    let mut driver = Driver::new(vec![gate.clone(), numbered(8)]);
    driver.start(1);
    driver.tray.insert(numbered(64));
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed_cd(6));
    assert_eq!(driver.packet(&LOCK, 0), GOOD_DMA);
    for ata in [
        Ata { command: 0xc6, count: 8, ..Ata::default() }, // SET MULTIPLE MODE
        Ata { command: 0x91, count: 17, device: 3, ..Ata::default() }, // INITIALIZE DEVICE PARAMETERS
        Ata { command: SET_FEATURES, features: 3, count: 0x42, ..Ata::default() }, // Ultra DMA 2
        Ata { command: SET_FEATURES, features: 0x55, ..Ata::default() }, // no look-ahead
        Ata { command: 0xe0, ..Ata::default() },           // STANDBY IMMEDIATE
    ] {
        assert_eq!(driver.ata(0, ata, &[]), GOOD_DMA);
    }
    // The log has an error of the queue.
    driver.fill(1, 2, Ata { command: 0x60, features: 1, lba: 8, device: 0x40, count: 2 << 3 }, None, &[(DATA, 512)]);
    driver.set(1, P_SACT, 1 << 2);
    driver.set(1, P_CI, 1 << 2);
    driver.until("an error of the queue", |driver| driver.port(1, P_IS) & 0x4000_0000 != 0);
    driver.restart(1);
    // A driver that has yet to look at an error: its port has stopped, its line is high.
    driver.fill(1, 4, Ata { command: 0xff, ..Ata::default() }, None, &[]);
    driver.set(1, P_CI, 1 << 4);
    driver.until("an error", |driver| driver.port(1, P_IS) != 0);
    driver.tray.insert(numbered(8));
    gate.set_full(true);
    driver.ram.write(Gpa(DATA), &[0x77; 512]).unwrap();
    driver.fill(0, 3, sector(WRITE_DMA, 9), None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1 << 3);
    assert!(driver.reason().contains("no space"));
    (driver, gate)
}

#[test]
fn the_state_is_what_it_always_was() {
    let (driver, gate) = in_the_middle();
    let (state, ram) = suspend(driver);
    let golden = testing::matches_golden(&state);
    let again = restored(&golden, ram, vec![gate, numbered(8)], Some(numbered(8)));
    assert_eq!(again.hba.save(), state);
}

#[test]
fn commands_go_on_in_their_order_when_the_machine_does() {
    let (mut driver, gate) = in_the_middle();
    // Read back what is being written; and a slot before it.
    driver.fill(0, 4, sector(READ_DMA, 9), None, &[(DATA + 0x1000, 512)]);
    driver.fill(0, 1, sector(READ_DMA, 5), None, &[(DATA + 0x2000, 512)]);
    driver.set(0, P_CI, 1 << 4 | 1 << 1);
    let (state, ram) = suspend(driver);

    gate.set_full(false);
    let mut driver = restored(&state, ram, vec![gate.clone(), numbered(8)], Some(numbered(8)));
    assert!(*driver.line.0.lock().unwrap(), "of the error on port 1");
    assert_eq!((driver.port(1, P_IS), driver.port(1, P_TFD), driver.port(1, P_CI)), (0x4000_0001, 0x451, 1 << 4));
    assert_eq!(driver.port(1, P_CMD) >> 8 & 31, 4, "the slot that failed");
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_TFD) & 0x80), (0x1a, 0x80));
    assert_eq!(driver.data(512), [0x77; 512]);
    go_on(&driver);
    driver.until("three commands", |driver| driver.port(0, P_CI) == 0);
    assert_eq!((driver.port(0, P_IS), driver.port(0, P_TFD)), (1, 0x50));
    assert_eq!(driver.bytes(DATA + 0x1000, 512), [0x77; 512], "written before it was read");
    assert_eq!(driver.ram.get_u64(Gpa(DATA + 0x2000)), Ok(5));
    driver.restart(1);
    driver.restart(0);

    // What the drivers had set is set.
    assert_eq!(driver.ata(0, Ata { command: 0xec, ..Ata::default() }, &[(DATA, 512)]), GOOD_PIO_IN);
    let data = driver.data(512);
    let word = |at: usize| u16::from_le_bytes([data[2 * at], data[2 * at + 1]]);
    assert_eq!((word(59), word(88) >> 8, word(85) & 0x60), (0x108, 4, 0x20));
    // Cylinder 0, head 1, sector 1 of a geometry with 17 sectors.
    let chs = Ata { command: READ_DMA, lba: 1, device: 1, count: 1, ..Ata::default() };
    assert_eq!(driver.ata(0, chs, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(17));
}

#[test]
fn queued_commands_go_on_and_an_error_is_told_after_all() {
    let gate = Gate::new(numbered(64));
    let mut driver = Driver::new(vec![gate.clone(), numbered(8)]);
    driver.start(1);
    let queued = |command: u8, slot: u16, lba: u64| Ata { command, features: 1, lba, device: 0x40, count: slot << 3 };
    // An error that the driver has not looked up yet.
    driver.fill(1, 2, queued(0x60, 2, 8), None, &[(DATA, 512)]);
    driver.set(1, P_SACT, 1 << 2);
    driver.set(1, P_CI, 1 << 2);
    driver.until("an error", |driver| driver.port(1, P_IS) & 0x4000_0000 != 0);
    // One that waits for the host, and two behind it.
    gate.set_full(true);
    driver.ram.write(Gpa(DATA), &[0x77; 512]).unwrap();
    driver.fill(0, 6, queued(0x61, 6, 9), None, &[(DATA, 512)]);
    driver.set(0, P_SACT, 1 << 6);
    driver.set(0, P_CI, 1 << 6);
    assert!(driver.reason().contains("no space"));
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_SACT)), (0, 1 << 6));
    driver.fill(0, 7, queued(0x60, 7, 9), None, &[(DATA + 0x1000, 512)]);
    driver.fill(0, 2, queued(0x60, 2, 5), None, &[(DATA + 0x2000, 512)]);
    driver.set(0, P_SACT, 1 << 7 | 1 << 2);
    driver.set(0, P_CI, 1 << 7 | 1 << 2);
    let (state, ram) = suspend(driver);

    gate.set_full(false);
    let mut driver = restored(&state, ram, vec![gate.clone(), numbered(8)], None);
    assert_eq!(driver.port(0, P_SACT), 1 << 7 | 1 << 6 | 1 << 2);
    go_on(&driver);
    driver.until("three tags", |driver| driver.port(0, P_SACT) == 0);
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_IS), driver.port(0, P_TFD)), (0, 8, 0x50));
    assert_eq!(driver.bytes(DATA + 0x1000, 512), [0x77; 512], "written before it was read");
    assert_eq!(driver.ram.get_u64(Gpa(DATA + 0x2000)), Ok(5));
    assert_eq!(driver.port(1, P_SACT), 1 << 2);
    driver.restart(0);
    driver.restart(1);
    let log = Ata { command: 0x2f, lba: 0x10, count: 1, ..Ata::default() };
    assert_eq!(driver.ata(1, log, &[(DATA, 512)]), GOOD_PIO_IN);
    assert_eq!(driver.data(5), [2, 0, 0x51, 0x10, 8]);
}

#[test]
fn what_the_guest_has_yet_to_hear_of_the_tray_is_told() {
    let (driver, _) = in_the_middle();
    let (state, ram) = suspend(driver);
    let disks = || -> Vec<Arc<dyn BlockBackend>> { vec![numbered(64), numbered(8)] };
    let mut driver = restored(&state, ram, disks(), Some(numbered(8)));
    go_on(&driver);
    driver.write(IS, 0xff);
    driver.restart(1);
    driver.until("the write", |driver| driver.port(0, P_CI) == 0);
    driver.restart(0);
    assert_eq!(driver.packet(&OPEN_TRAY, 0), failed_cd(5), "it is locked");
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), FAILED_CD, "the exchange is shown as an empty drive first");

    // In the middle of that: sense data that is not yet fetched, and the change.
    let (state, ram) = suspend(driver);
    let mut driver = restored(&state, ram.clone(), disks(), Some(numbered(8)));
    go_on(&driver);
    assert_eq!(driver.sense(), (2, 0x3a, 0));
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed_cd(6));
    assert_eq!(driver.packet(&EVENTS, 8), GOOD_DMA);
    assert_eq!(driver.data(6)[4..], [2, 2], "a new medium");
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), GOOD_DMA);

    // The medium is gone when the machine comes back.
    let (state, ram) = suspend(driver);
    let mut driver = restored(&state, ram, disks(), None);
    go_on(&driver);
    assert_eq!(driver.packet(&EVENTS, 8), GOOD_DMA);
    assert_eq!(driver.data(6)[4..], [3, 0], "it was removed");
    assert_eq!(driver.packet(&OPEN_TRAY, 0), GOOD_DMA, "and nothing is locked");

    // The tray stays open; and a medium that was not in before closes it.
    let (state, ram) = suspend(driver);
    let driver = restored(&state, ram.clone(), disks(), None);
    assert!(driver.tray.is_open());
    drop(driver);
    let mut driver = restored(&state, ram, disks(), Some(numbered(8)));
    go_on(&driver);
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), failed_cd(6));
    assert!(driver.tray.has_medium());
}

#[test]
fn masked_interrupts_stay_and_half_a_reset_goes_on() {
    let mut driver = Driver::new(vec![numbered(64)]);
    driver.set(0, P_IE, 0);
    driver.fill(0, 0, sector(READ_DMA, 5), None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    driver.until("a read", |driver| driver.port(0, P_CI) == 0);
    // The CD's port is in the middle of a COMRESET, and its software reset is forgotten by that.
    driver.set(CD, P_CMD, 0x16);
    driver.set(CD, P_SCTL, 0x301);
    let (state, ram) = suspend(driver);
    let mut driver = restored(&state, ram, vec![numbered(64)], None);
    go_on(&driver);
    assert!(!*driver.line.0.lock().unwrap());
    driver.set(0, P_IE, 1);
    assert_eq!(driver.end(0), GOOD_DMA);
    assert_eq!((driver.port(CD, P_SSTS), driver.port(CD, P_TFD)), (0, 0x80));
    driver.set(CD, P_SCTL, 0x300);
    assert_eq!((driver.port(CD, P_SSTS), driver.port(CD, P_SIG)), (0x133, 0xeb14_0101));
    driver.set(CD, P_CMD, 0x17);
    assert_eq!(driver.packet(&TEST_UNIT_READY, 0), FAILED_CD);
}

#[test]
fn a_pause_waits_for_the_end_of_a_command_that_the_driver_gave_up() {
    for _ in 0..50 {
        let (mut driver, _gate) = in_the_middle();
        driver.set(0, P_CMD, 0x16);
        driver.hba.io().quiesce();
        assert!(driver.hba.shared.hba().running.is_none());
    }
}

#[test]
fn drives_on_other_ports_are_refused() {
    let (state, ram) = suspend(in_the_middle().0);
    for disks in [vec![], vec![numbered(64)], vec![numbered(64), numbered(8), numbered(8)]] {
        let disks = disks.into_iter().map(|disk| disk as Arc<dyn BlockBackend>).collect();
        let mut driver = Driver::with_ram(ram.clone(), disks);
        driver.hba.io().quiesce();
        assert!(driver.hba.restore(&state).is_err());
    }
}

#[test]
fn spoilt_states_are_refused_or_as_harmless_as_a_driver() {
    let (state, ram) = suspend(in_the_middle().0);
    let (first, second, medium) = (numbered(64), numbered(8), numbered(8));
    let (mut taken, mut refused) = (0, 0);
    testing::spoil(&state, |bad| {
        let mut driver = Driver::with_ram(ram.clone(), vec![first.clone(), second.clone()]);
        driver.tray.insert(medium.clone());
        driver.hba.io().quiesce();
        if driver.hba.restore(bad).is_err() {
            refused += 1;
            return;
        }
        taken += 1;
        go_on(&driver);
        for at in (0..0x400).step_by(4) {
            driver.read(at);
        }
        for port in [0, 1, CD] {
            driver.set(port, P_CI, 1);
            driver.set(port, P_CMD, 0x17);
            driver.set(port, P_CI, u32::MAX);
        }
        driver.hba.io().quiesce();
        driver.hba.io().resume();
        driver.hba.reset();
        driver.write(GHC, 0x8000_0002);
        driver.start(0);
        assert_eq!(driver.ata(0, sector(READ_DMA, 5), &[(DATA, 512)]), GOOD_DMA);
    });
    assert!(taken > 100 && refused > 500, "{taken} taken, {refused} refused");
}
