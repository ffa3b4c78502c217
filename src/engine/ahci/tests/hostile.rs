//! Drivers that do what no driver should, and resets, pauses and host faults at the worst moment.

use super::*;

const READ: Ata = Ata { command: 0xc8, features: 0, lba: 3, device: 0x40, count: 1 };
const BUS_DATA: u32 = 1 << 28;
const BUS_FATAL: u32 = 1 << 29;
const OVERFLOW: u32 = 1 << 24;

/// A port that is stopped with `interrupt` recovers by clearing ST, and reads again.
fn recovers(driver: &mut Driver, interrupt: u32) {
    let end = driver.end(0);
    assert_eq!(end.is, interrupt);
    driver.restart(0);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(3));
}

#[test]
fn a_prdt_outside_ram_stops_the_port() {
    let mut driver = Driver::new(vec![numbered(64)]);
    for at in [0xa_0000, 0x9_ff00, 16 << 20, u64::MAX - 100, 1 << 63] {
        for command in [0xc8, 0xca, 0xec] {
            driver.fill(0, 0, Ata { command, ..READ }, None, &[(at, 512)]);
            driver.set(0, P_CI, 1);
            recovers(&mut driver, BUS_DATA);
        }
    }
}

#[test]
fn lists_and_tables_outside_ram_stop_the_port() {
    let mut driver = Driver::new(vec![numbered(64)]);
    for (at, bytes) in [(8, 0xffff_ff80u32), (12, 0xffff_ffff), (8, 0xa_0000)] {
        driver.fill(0, 0, READ, None, &[(DATA, 512)]);
        driver.ram.write(Gpa(Driver::list(0) + at), &bytes.to_le_bytes()).unwrap();
        driver.set(0, P_CI, 1);
        recovers(&mut driver, BUS_FATAL);
    }
    // A PRDT that runs out of RAM.
    driver.fill(0, 0, READ, None, &[(DATA, 512)]);
    driver.ram.write(Gpa(Driver::list(0)), &0xffff_0005u32.to_le_bytes()).unwrap();
    driver.ram.write(Gpa(Driver::list(0) + 8), &((16 << 20) - 0x100u32).to_le_bytes()).unwrap();
    driver.set(0, P_CI, 1);
    recovers(&mut driver, BUS_FATAL);
    // A list at the end of the address space.
    driver.set(0, P_CMD, 0x16);
    driver.set(0, P_CLB, 0xffff_ffff);
    driver.set(0, P_CLB + 4, 0xffff_ffff);
    driver.set(0, P_CMD, 0x17);
    driver.set(0, P_CI, 1 << 31);
    assert_eq!(driver.end(0).is, BUS_FATAL);
}

#[test]
fn frames_outside_ram_are_dropped() {
    let mut driver = Driver::new(vec![numbered(64)]);
    driver.set(0, P_FB, 0xa_0000);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
    driver.set(0, P_FB, 0xffff_ffff);
    driver.set(0, P_FB + 4, 0xffff_ffff);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(3));
}

#[test]
fn a_command_frame_that_is_none_stops_the_port() {
    let mut driver = Driver::new(vec![numbered(64)]);
    for (fis, dwords) in [([0; 20], 5), ([0xff; 20], 31), ([0x27; 20], 0)] {
        driver.fill_raw(0, 0, &fis, None, &[(DATA, 512)]);
        driver.ram.write(Gpa(Driver::list(0)), &[dwords]).unwrap();
        driver.set(0, P_CI, 1);
        recovers(&mut driver, BUS_FATAL);
    }
}

#[test]
fn a_short_prdt_gets_what_fits_and_is_never_half_written() {
    let mut driver = Driver::new(vec![numbered(64)]);
    for (prdt, moved) in [(&[][..], 0), (&[(DATA, 1)], 1), (&[(DATA, 100), (DATA + 100, 412)], 512)] {
        driver.ram.write(Gpa(DATA), &[0xcc; 1024]).unwrap();
        let end = driver.ata(0, Ata { count: 2, ..READ }, prdt);
        assert_eq!(end, End { is: 1 | OVERFLOW, ..GOOD_DMA });
        assert_eq!((driver.moved(0), driver.data(1024)[moved as usize]), (moved, 0xcc));
        assert_eq!(driver.ata(0, Ata { command: 0xca, count: 2, ..READ }, prdt), failed(4));
    }
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(3), "the sector was not touched");
}

#[test]
fn a_prdt_over_its_own_table_does_no_harm() {
    let mut driver = Driver::new(vec![numbered(64)]);
    let table = Driver::table(0, 0);
    let regions = [(table, 128), (table + 64, 128), (Driver::list(0), 128), (Driver::frames(0), 128)];
    assert_eq!(driver.ata(0, READ, &regions), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(table)), Ok(3));
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
}

#[test]
fn slots_are_taken_only_while_the_port_is_started() {
    let mut driver = Driver::new(vec![numbered(64)]);
    driver.set(0, P_CMD, 0x16);
    driver.set(0, P_CI, 0xffff_ffff);
    assert_eq!(driver.port(0, P_CI), 0);
    driver.set(0, P_CMD, 0x17);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
    // A port without device takes slots and never serves them.
    driver.start(1);
    driver.set(1, P_CI, 1);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!((driver.port(1, P_CI), driver.port(1, P_TFD)), (1, 0x7f));
}

#[test]
fn a_failed_slot_stops_the_others_until_the_port_is_restarted() {
    let mut driver = Driver::new(vec![numbered(64)]);
    driver.fill(0, 0, Ata { command: 0xff, ..READ }, None, &[]);
    driver.fill(0, 1, READ, None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    assert_eq!(driver.end(0), failed(4));
    driver.set(0, P_CI, 2);
    assert_eq!(driver.port(0, P_CI), 3);
    assert_eq!(driver.port(0, P_CMD) >> 8 & 0x1f, 0, "the failed slot is told");
    driver.restart(0);
    assert_eq!(driver.port(0, P_CI), 0);
    driver.set(0, P_CI, 2);
    assert_eq!(driver.end(0), GOOD_DMA);
}

#[test]
fn registers_may_change_while_a_command_runs() {
    let gate = Gate::new(numbered(64));
    let mut driver = Driver::new(vec![gate.clone()]);
    gate.shut();
    driver.fill(0, 0, READ, None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    gate.held();
    for at in (0..0x400).step_by(4).filter(|at| ![GHC, 0x118, 0x12c].contains(at)) {
        driver.write(at, 0xffff_ffff);
    }
    gate.open();
    driver.until("the slot ends", |driver| driver.port(0, P_CI) & 1 == 0 || driver.port(0, P_IS) != 0);
    driver.hba.reset();
    driver.write(GHC, 0x8000_0002);
    driver.start(0);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
}

#[test]
fn every_width_and_place_can_be_read_and_written() {
    let mut driver = Driver::new(vec![numbered(64)]);
    for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
        for offset in 0..4096 {
            let at = Access::new(offset, width);
            let value = driver.hba.bar_read(5, at).unwrap();
            assert_eq!(value & !width.mask(), 0);
            assert_eq!(driver.hba.bar_write(5, at, 0), Ok(Effect::None));
        }
        assert_eq!(driver.hba.bar_read(5, Access::new(4096, width)), Err(BusFault::NoRegister));
        assert_eq!(driver.hba.bar_write(4, Access::new(0, width), 0), Err(BusFault::NoRegister));
    }
    driver.hba.reset();
    driver.write(GHC, 0x8000_0002);
    driver.start(0);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
}

/// Starts a read that is held, and leaves it held.
fn held_read() -> (Driver, Arc<Gate>) {
    let gate = Gate::new(numbered(64));
    let mut driver = Driver::new(vec![gate.clone()]);
    gate.shut();
    driver.fill(0, 0, READ, None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    gate.held();
    (driver, gate)
}

#[test]
fn stopping_a_port_drops_the_running_command() {
    let (mut driver, gate) = held_read();
    driver.set(0, P_CMD, 0x16);
    assert_eq!(driver.port(0, P_CI), 0);
    assert_eq!(driver.port(0, P_CMD) & 0x8000, 0x8000, "CR waits for the command");
    gate.open();
    driver.until("CR clears", |driver| driver.port(0, P_CMD) & 0x8000 == 0);
    assert_eq!((driver.port(0, P_IS), driver.port(0, P_TFD)), (0, 0x50));
    assert_eq!(driver.moved(0), 0xeeee_eeee, "nothing was told about it");
    driver.set(0, P_CMD, 0x17);
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
}

#[test]
fn a_link_comes_up_only_after_the_running_command() {
    let (mut driver, gate) = held_read();
    driver.set(0, P_SCTL, 1);
    driver.set(0, P_SCTL, 0);
    assert_eq!((driver.port(0, P_SSTS), driver.port(0, P_TFD)), (0, 0x80));
    gate.open();
    driver.until("the link is up", |driver| driver.port(0, P_SSTS) == 0x133);
    assert_eq!((driver.port(0, P_SIG), driver.port(0, P_IS), driver.moved(0)), (0x101, 0, 0xeeee_eeee));
    assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
}

#[test]
fn an_hba_reset_lasts_as_long_as_the_running_command() {
    let (mut driver, gate) = held_read();
    driver.write(GHC, 0x8000_0003);
    assert_eq!(driver.read(GHC) & 1, 1);
    driver.set(0, P_CI, 2);
    gate.open();
    driver.until("HR clears", |driver| driver.read(GHC) & 1 == 0);
    assert_eq!((driver.port(0, P_IS), driver.port(0, P_CI), driver.read(IS)), (0, 0, 0));
    assert_eq!(driver.port(0, P_CMD), 0x06);
}

#[test]
fn nothing_reaches_memory_after_a_machine_reset() {
    for _ in 0..20 {
        let (mut driver, gate) = held_read();
        let opener = thread::spawn({
            let (gate, shared) = (Arc::clone(&gate), Arc::clone(&driver.hba.shared));
            move || {
                while shared.hba().running.is_some_and(|running| !running.cancelled) {
                    thread::yield_now();
                }
                gate.open();
            }
        });
        driver.hba.reset();
        opener.join().unwrap();
        assert_eq!(gate.state.lock().unwrap().inside, 0, "the reset waited");
        assert_eq!(driver.moved(0), 0xeeee_eeee);
        assert_eq!((driver.port(0, P_CLB), driver.port(0, P_CMD), driver.port(0, P_IS)), (0, 0x06, 0));
        assert!(!*driver.line.0.lock().unwrap());
    }
}

#[test]
fn a_pause_waits_for_the_running_command_and_begins_no_other() {
    let (mut driver, gate) = held_read();
    let io = driver.hba.io();
    let pause = thread::spawn({
        let io = io.clone();
        move || io.quiesce()
    });
    gate.open();
    pause.join().unwrap();
    assert_eq!(driver.port(0, P_CI), 0, "the command ended as ever");
    assert_eq!(driver.end(0), GOOD_DMA);
    gate.shut();
    driver.set(0, P_CI, 1);
    assert_eq!((driver.port(0, P_CI), gate.state.lock().unwrap().inside), (1, 0));
    io.resume();
    gate.held();
    gate.open();
    assert_eq!(driver.end(0), GOOD_DMA);
}

/// Starts a write that the host has no space for, and returns when the device has reported it.
fn waiting_write() -> (Driver, Arc<Gate>) {
    let gate = Gate::new(numbered(64));
    let mut driver = Driver::new(vec![gate.clone()]);
    gate.set_full(true);
    driver.ram.write(Gpa(DATA), &[0x77; 512]).unwrap();
    driver.fill(0, 0, Ata { command: 0xca, ..READ }, None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    assert!(driver.reason().contains("no space"));
    (driver, gate)
}

#[test]
fn a_write_without_space_waits_for_the_pause_and_is_done_after_it() {
    let (mut driver, gate) = waiting_write();
    let io = driver.hba.io();
    io.quiesce();
    assert_eq!((driver.port(0, P_CI), driver.port(0, P_TFD) & 0x80, driver.port(0, P_IS)), (1, 0x80, 0));
    driver.faults.resume();
    io.resume();
    assert!(driver.reason().contains("no space"), "the space is still missing");
    gate.set_full(false);
    driver.faults.resume();
    assert_eq!(driver.end(0), GOOD_DMA);
    let mut seen = [0; 512];
    gate.disk.read_bytes(3 * 512, &mut seen).unwrap();
    assert_eq!(seen, [0x77; 512]);
}

#[test]
fn a_retry_waits_for_the_end_of_the_pause() {
    let (mut driver, gate) = waiting_write();
    let io = driver.hba.io();
    io.quiesce();
    gate.set_full(false);
    gate.shut();
    driver.faults.resume();
    io.quiesce(); // returns at once: the request still waits
    assert_eq!((gate.state.lock().unwrap().inside, driver.port(0, P_CI)), (0, 1));
    io.resume();
    gate.held();
    let waits = driver.hba.shared.hba().running.map(|running| running.waits);
    assert_eq!(waits, Some(false), "a pause would wait for it now");
    gate.open();
    assert_eq!(driver.end(0), GOOD_DMA);
}

#[test]
fn a_waiting_write_is_given_up_by_every_kind_of_reset() {
    type Reset = fn(&mut Driver);
    let resets: [Reset; 4] = [
        |driver| driver.set(0, P_CMD, 0x16),
        |driver| driver.set(0, P_SCTL, 1),
        |driver| driver.write(GHC, 0x8000_0001),
        |driver| driver.hba.reset(),
    ];
    for reset in resets {
        let (mut driver, gate) = waiting_write();
        reset(&mut driver);
        driver.until("nothing runs", |driver| {
            driver.port(0, P_CI) == 0 && driver.read(GHC) & 1 == 0 && driver.hba.shared.hba().running.is_none()
        });
        gate.set_full(false);
        driver.hba.reset();
        driver.write(GHC, 0x8000_0002);
        driver.start(0);
        assert_eq!(driver.ata(0, READ, &[(DATA, 512)]), GOOD_DMA);
        assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(3), "the write never happened");
    }
}

#[test]
fn the_end_of_the_machine_does_not_wait_for_the_host() {
    let (driver, _gate) = waiting_write();
    driver.hba.io().quiesce();
    drop(driver); // joins the worker
    let (driver, _gate) = waiting_write();
    driver.faults.abandon();
    drop(driver);
}
