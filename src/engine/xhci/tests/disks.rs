//! The disk: bulk-only transport and SCSI, as a driver uses them.

use super::*;

const CBW: u64 = 0x3f_0000;
const CSW: u64 = 0x3f_1000;
const IN: u8 = 3;
const OUT: u8 = 4;

/// Puts a CBW on the ring; what comes after it is the caller's.
pub(super) fn cbw(driver: &mut Driver, slot: u8, tag: u32, expected: u32, to_host: bool, cdb: &[u8]) {
    let mut bytes = b"USBC".to_vec();
    bytes.extend(tag.to_le_bytes());
    bytes.extend(expected.to_le_bytes());
    bytes.extend([if to_host { 0x80 } else { 0 }, 0, cdb.len() as u8]);
    bytes.extend(cdb);
    bytes.resize(31, 0);
    driver.fill(CBW, &bytes);
    driver.queue(slot, OUT, &[normal(CBW, 31, IOC)]);
}

/// The status and the residue.
pub(super) fn csw(driver: &mut Driver, slot: u8, tag: u32) -> (u8, u32) {
    driver.queue(slot, IN, &[normal(CSW, 13, IOC | ISP)]);
    let event = driver.transfer_event(slot, IN);
    assert_eq!((event.code, event.length), (SUCCESS, 0));
    let csw = driver.bytes(CSW, 13);
    assert_eq!((&csw[..4], &csw[4..8]), (&b"USBS"[..], &tag.to_le_bytes()[..]));
    (csw[12], u32::from_le_bytes([csw[8], csw[9], csw[10], csw[11]]))
}

/// A command whose data are at `DATA`, in one TRB for each 64 KiB.
pub(super) fn run(driver: &mut Driver, slot: u8, expected: u32, to_host: bool, cdb: &[u8]) -> (u8, u32) {
    let tag = 0x1234_5600 | u32::from(cdb[0]);
    cbw(driver, slot, tag, expected, to_host, cdb);
    assert_eq!(driver.transfer_event(slot, OUT).code, SUCCESS);
    if expected > 0 {
        let count = expected.div_ceil(0x1_0000);
        let trbs: Vec<T> = (0..count)
            .map(|index| {
                let at = 0x1_0000 * index;
                let flags = if index + 1 < count { CH } else { IOC };
                normal(DATA + u64::from(at), (expected - at).min(0x1_0000), flags | if to_host { ISP } else { 0 })
            })
            .collect();
        let endpoint = if to_host { IN } else { OUT };
        driver.queue(slot, endpoint, &trbs);
        let event = driver.transfer_event(slot, endpoint);
        assert_eq!((event.code, event.length), (SUCCESS, 0));
    }
    csw(driver, slot, tag)
}

fn cdb_10(opcode: u8, block: u32, blocks: u16) -> [u8; 10] {
    let ([a, b, c, d], [e, f]) = (block.to_be_bytes(), blocks.to_be_bytes());
    [opcode, 0, a, b, c, d, 0, e, f, 0]
}
pub(super) fn read(driver: &mut Driver, slot: u8, block: u32, blocks: u16) -> (u8, u32) {
    run(driver, slot, u32::from(blocks) * 512, true, &cdb_10(0x28, block, blocks))
}
pub(super) fn write(driver: &mut Driver, slot: u8, block: u32, blocks: u16) -> (u8, u32) {
    run(driver, slot, u32::from(blocks) * 512, false, &cdb_10(0x2a, block, blocks))
}
fn sense(driver: &mut Driver, slot: u8) -> (u8, u8) {
    assert_eq!(run(driver, slot, 18, true, &[3, 0, 0, 0, 18, 0]), (0, 0));
    let data = driver.bytes(DATA, 18);
    (data[2] & 0xf, data[12])
}
/// Class reset and both endpoints cleared, as after an error of the transport.
fn reset_recovery(driver: &mut Driver, slot: u8) {
    driver.set(slot, [0x21, 0xff, 0, 0, 0, 0, 0, 0], &[]);
    for (endpoint, address) in [(IN, 0x81), (OUT, 0x02)] {
        if driver.endpoint_state(slot, endpoint) == 2 {
            driver.recover(slot, endpoint);
        }
        driver.set(slot, [2, 1, 0, 0, address, 0, 0, 0], &[]);
    }
}
fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 + at / 251 + seed) as u8).collect()
}

#[test]
fn firmware_enumerates_and_reads_the_disk() {
    let mut driver = Driver::new();
    let slot = driver.attach(DISK);
    let device = driver.get(slot, [0x80, 6, 0, 1, 0, 0, 18, 0]);
    assert_eq!(device[..8], [18, 1, 0, 3, 0, 0, 0, 9]);
    let all = driver.get(slot, [0x80, 6, 0, 2, 0, 0, 255, 0]);
    assert_eq!((all.len(), &all[14..17]), (44, &[8, 6, 0x50][..]));
    assert_eq!(all[18..25], [7, 5, 0x81, 2, 0, 4, 0]);
    assert_eq!(all[31..38], [7, 5, 2, 2, 0, 4, 0]);
    assert_eq!(driver.get(slot, [0x80, 6, 0, 15, 0, 0, 255, 0]).len(), 22);
    assert_eq!(driver.get(slot, [0x80, 6, 3, 3, 9, 4, 255, 0])[2..], *b"d\0i\0s\0k\0-\x001\0");
    driver.set(slot, [0, 0x31, 40, 0, 0, 0, 0, 0], &[]);
    driver.set(slot, [0, 0x30, 0, 0, 0, 0, 6, 0], &[1; 6]);
    assert_eq!(driver.configure(slot, &[(IN, 6, 1024), (OUT, 2, 1024)]), SUCCESS);
    driver.set(slot, [0, 9, 1, 0, 0, 0, 0, 0], &[]);
    assert_eq!(driver.get(slot, [0xa1, 0xfe, 0, 0, 0, 0, 1, 0]), [0]);
    assert_eq!(run(&mut driver, slot, 0, false, &[0; 6]), (0, 0));
    assert_eq!(run(&mut driver, slot, 36, true, &[0x12, 0, 0, 0, 36, 0]), (0, 0));
    assert_eq!(driver.bytes(DATA + 8, 8), b"Innkeepr");
    assert_eq!(run(&mut driver, slot, 8, true, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), (0, 0));
    assert_eq!(driver.bytes(DATA, 8), [0, 0, 0x1f, 0xff, 0, 0, 2, 0]);
    driver.disk.file.write_all_at(&pattern(4096, 3), 512 * 100).unwrap();
    assert_eq!(read(&mut driver, slot, 100, 8), (0, 0));
    assert_eq!(driver.bytes(DATA, 4096), pattern(4096, 3));
    driver.no_event();
}

#[test]
fn long_transfers_go_through_the_buffer_in_pieces() {
    let mut driver = Driver::new();
    let slot = driver.attach_disk();
    let whole = pattern(700 << 10, 0);
    driver.fill(DATA, &whole);
    assert_eq!(write(&mut driver, slot, 1, 1400), (0, 0));
    assert_eq!(driver.disk.done().len(), 6, "pieces of 128 KiB");
    driver.fill(DATA, &vec![0; 700 << 10]);
    assert_eq!(read(&mut driver, slot, 1, 1400), (0, 0));
    assert!(driver.bytes(DATA, 700 << 10) == whole);
    assert_eq!(run(&mut driver, slot, 0, false, &cdb_10(0x35, 0, 0)), (0, 0));
    assert_eq!(driver.disk.done().last().unwrap(), "flush");
    let mut durable = cdb_10(0x2a, 0, 1);
    durable[1] = 8;
    assert_eq!(run(&mut driver, slot, 512, false, &durable), (0, 0));
    assert_eq!(driver.disk.done(), ["write 512 at 0", "flush"]);
}

#[test]
fn what_fails_is_told_and_costs_nothing_else() {
    let mut driver = Driver::new();
    let slot = driver.attach_disk();
    assert_eq!(read(&mut driver, slot, 8192, 1), (1, 512), "past the end: zeros, and a status");
    assert_eq!(driver.bytes(DATA, 512), [0; 512]);
    assert_eq!(sense(&mut driver, slot), (5, 0x21));
    assert_eq!(sense(&mut driver, slot), (0, 0));
    assert_eq!(write(&mut driver, slot, 8191, 2), (1, 1024));
    assert_eq!(run(&mut driver, slot, 0, false, &[0xc0, 0, 0, 0, 0, 0]), (1, 0));
    assert_eq!(sense(&mut driver, slot), (5, 0x20));
    // The host expects more, less, or another direction than the command has (6.7).
    assert_eq!(run(&mut driver, slot, 100, true, &[0x12, 0, 0, 0, 36, 0]), (0, 64));
    assert_eq!(run(&mut driver, slot, 2048, true, &cdb_10(0x28, 0, 1)), (0, 1536));
    assert_eq!(run(&mut driver, slot, 2048, false, &cdb_10(0x2a, 0, 1)), (0, 1536));
    assert_eq!(run(&mut driver, slot, 512, true, &cdb_10(0x28, 0, 2)), (2, 512));
    assert_eq!(run(&mut driver, slot, 512, true, &cdb_10(0x2a, 0, 1)), (2, 512));
    assert_eq!(run(&mut driver, slot, 512, false, &cdb_10(0x28, 0, 1)), (2, 512));
    assert_eq!(run(&mut driver, slot, 0, true, &cdb_10(0x28, 0, 1)), (2, 0));
    driver.disk.done();
    assert_eq!(read(&mut driver, slot, 0, 1), (0, 0));
    let mut driver = Driver::with(Gate::new(true));
    let slot = driver.attach_disk();
    assert_eq!(write(&mut driver, slot, 0, 1), (1, 512));
    assert_eq!(sense(&mut driver, slot), (7, 0x27));
}

#[test]
fn an_invalid_command_block_stalls_until_the_device_is_reset() {
    let mut driver = Driver::new();
    let slot = driver.attach_disk();
    for (length, first) in [(31u32, b'X'), (30, b'U'), (32, b'U'), (512, b'U')] {
        driver.fill(CBW, &[&[first][..], b"SBC", &[0; 10], &[6]].concat());
        driver.queue(slot, OUT, &[normal(CBW, length, IOC)]);
        if length <= 31 {
            assert_eq!(driver.transfer_event(slot, OUT).code, SUCCESS);
        }
        driver.queue(slot, IN, &[normal(CSW, 13, IOC | ISP)]);
        assert_eq!(driver.transfer_event(slot, IN).code, STALL);
        driver.recover(slot, IN);
        driver.set(slot, [2, 1, 0, 0, 0x81, 0, 0, 0], &[]);
        assert_eq!(driver.get(slot, [0x82, 0, 0, 0, 0x81, 0, 2, 0]), [1, 0], "still halted");
        driver.queue(slot, OUT, &[normal(CBW, 31, IOC)]);
        driver.await_event("a stall", |event| event.code == STALL && event.endpoint == OUT);
        driver.early.clear();
        reset_recovery(&mut driver, slot);
        assert_eq!(read(&mut driver, slot, 0, 1), (0, 0));
    }
}

#[test]
fn nobody_waits_for_the_disk() {
    let mut driver = Driver::new();
    let slot = driver.attach_disk();
    driver.disk.set(|state| state.shut = true);
    cbw(&mut driver, slot, 1, 512, true, &cdb_10(0x28, 0, 1));
    assert_eq!(driver.transfer_event(slot, OUT).code, SUCCESS);
    let place = driver.queue(slot, IN, &[normal(DATA, 512, IOC | ISP)]);
    driver.disk.held();
    // The driver loses its patience: it stops the endpoint, takes the transfer back and resets the device.
    assert_eq!(driver.slot_command(15, slot, IN), SUCCESS);
    let event = driver.transfer_event(slot, IN);
    assert_eq!((event.code, event.parameter, event.length), (STOPPED, place, 512));
    assert_eq!(driver.set_dequeue(slot, IN), SUCCESS);
    reset_recovery(&mut driver, slot);
    driver.fill(DATA, &[0x77; 1024]);
    driver.disk.file.write_all_at(&[1; 1024], 0).unwrap();
    driver.disk.set(|state| state.shut = false);
    assert_eq!(read(&mut driver, slot, 1, 1), (0, 0));
    assert_eq!(driver.bytes(DATA, 512), [1; 512]);
    assert_eq!(driver.bytes(DATA + 512, 512), [0x77; 512]);
    // A reset of the controller in the same place.
    driver.disk.set(|state| state.shut = true);
    cbw(&mut driver, slot, 1, 512, true, &cdb_10(0x28, 0, 1));
    driver.queue(slot, IN, &[normal(DATA, 512, IOC | ISP)]);
    driver.disk.held();
    driver.write(USBCMD, 2);
    driver.fill(DATA, &[0x77; 512]);
    driver.disk.set(|state| state.shut = false);
    driver.check_it_serves();
}

#[test]
fn a_write_waits_for_room_on_the_host() {
    let mut driver = Driver::new();
    let slot = driver.attach_disk();
    driver.disk.set(|state| state.full = true);
    driver.fill(DATA, &[0x42; 1024]);
    cbw(&mut driver, slot, 9, 1024, false, &cdb_10(0x2a, 4, 2));
    driver.queue(slot, OUT, &[normal(DATA, 1024, IOC)]);
    assert!(driver.reports.recv_timeout(DEADLINE).unwrap().contains("no space"));
    driver.io().hold();
    driver.fill(DATA, &[0; 1024]);
    driver.io().release();
    assert!(driver.reports.recv_timeout(DEADLINE).unwrap().contains("no space"), "still none");
    // As the machine does, which pauses whenever it is told.
    driver.io().hold();
    driver.disk.set(|state| state.full = false);
    driver.io().release();
    driver.early.clear();
    driver.queue(slot, IN, &[normal(CSW, 13, IOC | ISP)]);
    assert_eq!(driver.transfer_event(slot, IN).code, SUCCESS);
    assert_eq!(driver.bytes(CSW + 8, 5), [0; 5]);
    let mut stored = [0; 1024];
    driver.disk.file.read_exact_at(&mut stored, 4 * 512).unwrap();
    assert_eq!(stored, [0x42; 1024]);
    driver.check_it_serves();
}
