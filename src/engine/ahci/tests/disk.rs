//! Firmware and systems bringing up a disk, and every ATA command.

use super::*;

#[test]
fn the_function_is_an_ich9_with_one_bar() {
    let driver = Driver::cold(vec![]);
    let identity = driver.hba.identity();
    assert_eq!((identity.vendor, identity.device, identity.class), (0x8086, 0x2922, 0x01_0601));
    assert_eq!(driver.hba.bars(), [BarSpec { index: 5, size_bytes: 4096, kind: BarKind::Registers }]);
    let six = (0..6).map(|_| AhciDisk { serial: String::new(), backend: raw(512).0 }).collect();
    let refused = Ahci::new(driver.ram.clone(), IrqLine::unconnected(), six, CdTray::new(), &driver.faults);
    assert_eq!(refused.err().map(|error| error.kind()), Some(io::ErrorKind::InvalidInput));
}

/// The register accesses that SeaBIOS makes for a disk, with the values that it writes.
#[test]
fn seabios_finds_and_reads_a_disk() {
    let mut driver = Driver::cold(vec![numbered(64)]);
    assert_eq!(driver.read(0) & 0x1f, 5);
    assert_eq!(driver.read(GHC), 0x8000_0000);
    driver.write(GHC, 0x8000_0000);
    assert_eq!(driver.read(0x0c), 0x3f);
    for (register, value) in [(P_CLB, Driver::list(0) as u32), (0x04, 0), (P_FB, Driver::frames(0) as u32), (0x0c, 0)] {
        driver.set(0, register, value);
    }
    driver.set(0, P_IE, 0);
    assert_eq!(driver.port(0, P_CMD), 0x06);
    driver.set(0, P_CMD, 0x16);
    assert_eq!(driver.port(0, P_CMD), 0x4016);
    assert_eq!(driver.port(0, P_SSTS), 0x133);
    assert_eq!(driver.port(0, P_SERR), 0);
    driver.set(0, P_SERR, 0);
    assert_eq!(driver.port(0, P_TFD), 0x150);
    assert_eq!(driver.bytes(Driver::frames(0) + 0x40, 20)[..13], [0x34, 0, 0x50, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
    driver.set(0, P_CMD, 0x17);
    assert_eq!(driver.port(0, P_CMD), 0xc017);

    // It asks for a CD first, and recovers from the refusal.
    driver.fill(0, 0, Ata { command: 0xa1, ..Ata::default() }, None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    driver.until("refused", |driver| driver.port(0, P_IS) != 0);
    assert_eq!(driver.port(0, P_IS), 0x4000_0001);
    driver.set(0, P_IS, 0x4000_0001);
    assert_eq!(driver.bytes(Driver::frames(0) + 0x42, 2), [0x51, 0x04]);
    driver.set(0, P_CMD, 0xc016);
    assert_eq!(driver.port(0, P_CMD), 0x4016, "CR is clear as soon as nothing runs");
    driver.set(0, P_CMD, 0x4017);

    driver.fill(0, 0, Ata { command: 0xec, ..Ata::default() }, None, &[(DATA, 512)]);
    driver.set(0, P_CI, 1);
    driver.until("identified", |driver| driver.port(0, P_IS) != 0);
    assert_eq!(driver.port(0, P_IS), 2);
    assert_eq!(
        driver.bytes(Driver::frames(0) + 0x20, 18),
        [0x5f, 0x60, 0x58, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 2]
    );
    assert_eq!(driver.data(512)[120..124], [64, 0, 0, 0]);
    driver.set(0, P_IS, 2);

    driver.fill(0, 0, Ata { command: 0xc8, lba: 5, device: 0x40, count: 2, ..Ata::default() }, None, &[(DATA, 1024)]);
    driver.set(0, P_CI, 1);
    driver.until("read", |driver| driver.port(0, P_CI) == 0);
    assert_eq!((driver.data(1024)[0], driver.data(1024)[512], driver.moved(0)), (5, 6, 1024));
    driver.set(0, P_CMD, 0xc006);
    assert_eq!(driver.port(0, P_CMD), 0x06);
    assert!(!*driver.line.0.lock().unwrap(), "no interrupt was enabled");
}

/// As Linux does: HBA reset, COMRESET, signature, interrupts.
#[test]
fn a_hard_reset_ends_with_a_signature() {
    let mut driver = Driver::cold(vec![numbered(64)]);
    driver.start(0);
    driver.write(GHC, 0x8000_0001);
    assert_eq!(driver.read(GHC), 0x8000_0000);
    assert_eq!(driver.port(0, P_CMD), 0x06);
    assert_eq!(driver.port(0, P_CLB), Driver::list(0) as u32, "the addresses survive");
    driver.start(0);
    driver.start(CD);
    for (port, signature) in [(0, 0x101), (CD, 0xeb14_0101)] {
        driver.ram.write(Gpa(Driver::frames(port) + 0x40), &[0; 20]).unwrap();
        driver.set(port, P_CMD, 0x16);
        driver.set(port, P_SCTL, 0x301);
        assert_eq!((driver.port(port, P_SSTS), driver.port(port, P_TFD)), (0, 0x80));
        driver.set(port, P_SCTL, 0x300);
        assert_eq!((driver.port(port, P_SSTS), driver.port(port, P_SIG)), (0x133, signature));
        assert_eq!(driver.bytes(Driver::frames(port) + 0x40, 1), [0x34]);
    }
    assert_eq!((driver.port(1, P_SSTS), driver.port(1, P_SIG)), (0, 0xffff_ffff));
    driver.set(1, P_SCTL, 0x301);
    driver.set(1, P_SCTL, 0x300);
    assert_eq!((driver.port(1, P_SSTS), driver.port(1, P_TFD)), (0, 0x7f), "nothing is plugged in");
}

#[test]
fn a_software_reset_ends_with_a_signature_and_without_interrupt() {
    let mut driver = Driver::new(vec![numbered(64)]);
    let control = |value| [0x27, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, value, 0, 0, 0, 0];
    for (slot, value) in [(0, 4), (1, 0)] {
        driver.fill_raw(0, slot, &control(value), None, &[]);
        driver.set(0, P_CI, 1 << slot);
        driver.until("the frame is sent", |driver| driver.port(0, P_CI) == 0);
    }
    assert_eq!((driver.port(0, P_SIG), driver.port(0, P_TFD)), (0x101, 0x150));
    assert_eq!(driver.port(0, P_IS), 0);
    assert_eq!(driver.ata(0, Ata { command: 0xec, ..Ata::default() }, &[(DATA, 512)]), GOOD_PIO_IN);
}

#[test]
fn every_form_of_read_finds_its_sectors() {
    let mut driver = Driver::new(vec![numbered(4096)]);
    assert_eq!(driver.ata(0, Ata { command: 0xc6, count: 4, ..Ata::default() }, &[]), GOOD_DMA);
    let chs = (3 * 16 + 2) * 63 + 5 - 1; // cylinder 3, head 2, sector 5
    for (command, lba, device, sector, end) in [
        (0x20, 1000, 0x40, 1000, GOOD_PIO_IN),
        (0x24, 1000, 0x40, 1000, GOOD_PIO_IN),
        (0x25, 1000, 0x40, 1000, GOOD_DMA),
        (0x29, 1000, 0x40, 1000, GOOD_PIO_IN),
        (0xc4, 1000, 0x40, 1000, GOOD_PIO_IN),
        (0xc8, 1000, 0x40, 1000, GOOD_DMA),
        (0xc8, 3 << 8 | 5, 2, chs, GOOD_DMA),
    ] {
        let prdt = [(DATA, 512), (DATA + 0x1_0000, 2048)];
        let ended = driver.ata(0, Ata { command, lba, device, count: 5, ..Ata::default() }, &prdt);
        assert_eq!(ended, end, "command {command:x}");
        assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(sector));
        assert_eq!(driver.ram.get_u64(Gpa(DATA + 0x1_0000)), Ok(sector + 1));
        assert_eq!(driver.moved(0), 5 * 512);
    }
}

#[test]
fn every_form_of_write_reaches_the_disk() {
    let (disk, _) = raw(4096 * 512);
    let mut driver = Driver::new(vec![disk.clone()]);
    driver.ata(0, Ata { command: 0xc6, count: 16, ..Ata::default() }, &[]);
    for (command, lba) in [(0x30, 1), (0x34, 2), (0x35, 3), (0x39, 4), (0x3d, 5), (0xc5, 6), (0xca, 7), (0xce, 8)] {
        driver.ram.write(Gpa(DATA), &[command; 512]).unwrap();
        let ended = driver.ata(0, Ata { command, lba, device: 0x40, count: 1, ..Ata::default() }, &[(DATA, 512)]);
        assert_eq!(ended, GOOD_DMA, "command {command:x}");
        let mut seen = [0; 512];
        disk.read_bytes(lba * 512, &mut seen).unwrap();
        assert_eq!(seen, [command; 512]);
    }
}

#[test]
fn a_count_of_zero_is_the_largest_count() {
    let mut driver = Driver::new(vec![numbered(70000)]);
    let regions = [(DATA, 4 << 20); 8]; // 32 MiB, one over the other
    assert_eq!(driver.ata(0, Ata { command: 0x25, lba: 8, ..Ata::default() }, &regions), GOOD_DMA);
    assert_eq!(driver.moved(0), 32 << 20);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(8 + 7 * 8192), "the last region wins");
    assert_eq!(driver.ata(0, Ata { command: 0xc8, device: 0x40, ..Ata::default() }, &[(DATA, 1 << 20)]), GOOD_DMA);
    assert_eq!(driver.moved(0), 256 * 512);
}

#[test]
fn commands_without_data_answer_as_the_standard_says() {
    const ABORTED: u8 = 4;
    const NOT_FOUND: u8 = 0x10;
    let mut driver = Driver::new(vec![numbered(1024)]);
    let of = |command, features, lba, count| Ata { command, features, lba, count, device: 0x40 };
    for (ata, error) in [
        (of(0x00, 0, 0, 0), ABORTED), // NOP
        (of(0x06, 1, 0, 1), ABORTED), // DATA SET MANAGEMENT
        (of(0x10, 0, 0, 0), 0),       // RECALIBRATE
        (of(0x40, 0, 1023, 1), 0),    // READ VERIFY
        (of(0x42, 0, 1023, 2), NOT_FOUND),
        (of(0xc8, 0, 1024, 1), NOT_FOUND),
        (of(0x25, 0, (1 << 48) - 1, 0), NOT_FOUND),
        (of(0x2f, 0, 0x11, 1), ABORTED), // READ LOG EXT of one that there is not
        (of(0x92, 0, 0, 0), ABORTED),    // DOWNLOAD MICROCODE
        (of(0xb0, 0xd8, 0xc2_4f00, 0), ABORTED),
        (of(0xc4, 0, 0, 1), ABORTED), // READ MULTIPLE before SET MULTIPLE
        (of(0xc6, 0, 0, 3), ABORTED),
        (of(0xc6, 0, 0, 32), ABORTED),
        (of(0xc6, 0, 0, 8), 0),
        (of(0xe0, 0, 0, 0), 0), // STANDBY IMMEDIATE
        (of(0xe7, 0, 0, 0), 0), // FLUSH CACHE
        (of(0xea, 0, 0, 0), 0),
        (of(0xef, 0x03, 0, 0x45), 0), // SET FEATURES: UDMA 5
        (of(0xef, 0x03, 0, 0x46), ABORTED),
        (of(0xef, 0x82, 0, 0), 0), // write cache off
        (of(0xef, 0x02, 0, 0), 0),
        (of(0xef, 0x10, 0, 2), ABORTED),
        (of(0xf5, 0, 0, 0), ABORTED), // SECURITY FREEZE LOCK
        (of(0xff, 0, 0, 0), ABORTED),
    ] {
        let wanted = if error == 0 { GOOD_DMA } else { failed(error) };
        assert_eq!(driver.ata(0, ata, &[]), wanted, "command {:x}, features {:x}", ata.command, ata.features);
    }
}

#[test]
fn native_max_and_power_mode_are_told_in_registers() {
    let mut driver = Driver::new(vec![numbered(1024)]);
    let d2h = Driver::frames(0) + 0x40;
    driver.ata(0, Ata { command: 0x27, device: 0x40, ..Ata::default() }, &[]);
    assert_eq!(driver.bytes(d2h + 4, 3), [0xff, 3, 0]);
    driver.ata(0, Ata { command: 0xf8, device: 0x40, ..Ata::default() }, &[]);
    assert_eq!(driver.bytes(d2h + 4, 4), [0xff, 3, 0, 0x40]);
    for (command, mode) in [(0xe3, 0xff), (0xe2, 0x00), (0xe1, 0xff)] {
        driver.ata(0, Ata { command, ..Ata::default() }, &[]);
        driver.ata(0, Ata { command: 0xe5, ..Ata::default() }, &[]);
        assert_eq!(driver.bytes(d2h + 12, 1), [mode], "after {command:x}");
    }
}

#[test]
fn settings_show_in_identify_and_a_reset_undoes_them() {
    let mut driver = Driver::new(vec![numbered(1024)]);
    let word = |driver: &mut Driver, word: usize| {
        assert_eq!(driver.ata(0, Ata { command: 0xec, ..Ata::default() }, &[(DATA, 512)]), GOOD_PIO_IN);
        driver.ram.get_u16(Gpa(DATA + word as u64 * 2)).unwrap()
    };
    driver.ata(0, Ata { command: 0xef, features: 3, count: 0x42, ..Ata::default() }, &[]);
    driver.ata(0, Ata { command: 0xc6, count: 8, ..Ata::default() }, &[]);
    assert_eq!((word(&mut driver, 88), word(&mut driver, 59)), (0x043f, 0x0108));
    driver.set(0, P_SCTL, 1);
    driver.set(0, P_SCTL, 0);
    assert_eq!((word(&mut driver, 88), word(&mut driver, 59)), (0x203f, 0));
}

#[test]
fn many_slots_are_all_done_in_turn() {
    let mut driver = Driver::new(vec![numbered(1024)]);
    for slot in 0..32 {
        let ata = Ata { command: 0xc8, lba: 100 + slot, device: 0x40, count: 1, ..Ata::default() };
        driver.fill(0, slot, ata, None, &[(DATA + slot * 512, 512)]);
    }
    driver.set(0, P_CI, 0xffff_ffff);
    driver.until("all are done", |driver| driver.port(0, P_CI) == 0);
    for slot in 0..32 {
        assert_eq!(driver.ram.get_u64(Gpa(DATA + slot * 512)), Ok(100 + slot));
    }
}

#[test]
fn two_disks_keep_their_own_sectors() {
    let mut driver = Driver::new(vec![numbered(16), raw(4096).0]);
    driver.start(1);
    let read = Ata { command: 0xc8, lba: 7, device: 0x40, count: 1, ..Ata::default() };
    assert_eq!(driver.ata(0, read, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(7));
    assert_eq!(driver.ata(1, read, &[(DATA, 512)]), GOOD_DMA);
    assert_eq!(driver.ram.get_u64(Gpa(DATA)), Ok(0));
}

#[test]
fn the_line_stays_high_until_port_and_hba_are_both_acknowledged() {
    let mut driver = Driver::new(vec![numbered(16)]);
    let high = |driver: &Driver| *driver.line.0.lock().unwrap();
    driver.fill(0, 0, Ata { command: 0xe7, ..Ata::default() }, None, &[]);
    driver.set(0, P_CI, 1);
    driver.until("the line is high", |driver| high(driver));
    driver.write(IS, 1);
    assert!(high(&driver), "the port still wants attention");
    driver.set(0, P_IS, 1);
    assert!(high(&driver), "the HBA's bit is still set");
    driver.write(GHC, 0x8000_0000);
    assert!(!high(&driver), "interrupts are off");
    driver.write(GHC, 0x8000_0002);
    assert!(high(&driver));
    driver.write(IS, 1);
    assert!(!high(&driver));
}

#[test]
fn a_read_only_disk_refuses_to_be_written() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let mut driver = Driver::new(vec![RawFile::new(file, true).unwrap()]);
    let write = Ata { command: 0xca, device: 0x40, count: 1, ..Ata::default() };
    assert_eq!(driver.ata(0, write, &[(DATA, 512)]), failed(4));
}
