//! A controller in the middle of its work goes on in another one.

use super::*;
use crate::engine::{
    pci::msix::Msix,
    saved::{
        SaveState,
        testing::{matches_golden, spoil},
    },
    usb::storage::Step,
};

/// The driver's side, on another controller with the same RAM and the same disk.
fn move_to_second(first: Driver) -> Driver {
    first.io().hold();
    let state = first.xhci.lock().unwrap().save();
    let mut second = Driver::plug(first.ram.clone(), Arc::clone(&first.disk));
    second.io().hold();
    second.xhci.lock().unwrap().restore(&state).unwrap();
    assert_eq!(second.xhci.lock().unwrap().save(), state);
    (second.commands, second.events, second.rings, second.early) =
        (first.commands, first.events, first.rings.clone(), first.early.clone());
    second.io().release();
    second
}

/// A keyboard with a report that waits and half a control transfer, a tablet that awaits a buffer, a disk in the middle of a
/// write that the host has no room for, an interrupt that nobody has taken.
fn busy() -> (Driver, u8, u8, u8) {
    let mut driver = Driver::new();
    let keyboard = driver.attach_hid(KEYBOARD);
    let tablet = driver.attach_hid(TABLET);
    let disk = driver.attach_disk();
    driver.set(keyboard, [0x21, 9, 0, 2, 0, 0, 1, 0], &[5]);
    driver.input.key(KeyCode(0x1e), true);
    driver.input.key(KeyCode(0x1e), false);
    let setup = u64::from_le_bytes([0x80, 6, 0, 1, 0, 0, 18, 0]);
    driver.queue(keyboard, 1, &[trb(2, setup, 8, IDT | 3 << 16)]);
    driver.queue(tablet, 3, &[normal(DATA, 8, IOC | ISP)]);
    driver.disk.set(|state| state.full = true);
    driver.fill(DATA + 0x1000, &[0x42; 1024]);
    disks::cbw(&mut driver, disk, 0x77, 1024, false, &[0x2a, 0, 0, 0, 0, 4, 0, 0, 2, 0]);
    assert_eq!(driver.transfer_event(disk, 4).code, SUCCESS);
    driver.queue(disk, 4, &[normal(DATA + 0x1000, 1024, 0)]);
    driver.reports.recv_timeout(DEADLINE).unwrap();
    driver.write(IMAN, 3);
    driver.write(USBSTS, 8);
    let mut commands = driver.commands;
    driver.put(&mut commands, trb(23, 0, 0, 0));
    driver.commands = commands;
    driver.write(DOORBELL, 0);
    (driver, keyboard, tablet, disk)
}

#[test]
fn what_was_under_way_goes_on() {
    let (first, keyboard, tablet, disk) = busy();
    assert!(first.is_high());
    first.disk.set(|state| state.full = false);
    first.disk.set(|state| state.shut = true);
    let mut driver = move_to_second(first);
    driver.disk.set(|state| state.shut = false);
    assert!(driver.is_high(), "the interrupt is still there");
    driver.write(IMAN, 3);
    assert_eq!(driver.event().unwrap().kind, 33);
    assert_eq!(driver.input.leds(), 5);
    driver.queue(keyboard, 1, &[trb(3, DATA + 0x100, 18, ISP | 1 << 16), trb(4, 0, 0, IOC)]);
    assert_eq!((driver.transfer_event(keyboard, 1).code, driver.bytes(DATA + 0x100, 1)), (SUCCESS, vec![18]));
    driver.queue(keyboard, 3, &[normal(DATA + 0x200, 8, IOC), normal(DATA + 0x208, 8, IOC)]);
    assert_eq!(driver.transfer_event(keyboard, 3).code, SUCCESS);
    assert_eq!(driver.transfer_event(keyboard, 3).code, SUCCESS);
    assert_eq!((driver.bytes(DATA + 0x202, 1), driver.bytes(DATA + 0x20a, 1)), (vec![4], vec![0]));
    driver.input.pointer(7, 8, 0, 0);
    assert_eq!((driver.transfer_event(tablet, 3).code, driver.bytes(DATA + 1, 1)), (SHORT, vec![7]));
    assert_eq!(disks::csw(&mut driver, disk, 0x77), (0, 0));
    let mut stored = [0; 1024];
    driver.disk.file.read_exact_at(&mut stored, 4 * 512).unwrap();
    assert_eq!(stored, [0x42; 1024], "the data that had left the guest");
    assert_eq!(disks::read(&mut driver, disk, 4, 2), (0, 0));
    driver.check_it_serves();
}

#[test]
fn events_that_had_no_room_come_after_the_restore() {
    let mut driver = Driver::new();
    let ring = 0x30_0000;
    for index in 0..100u64 {
        driver.put_at(ring + 16 * index, trb(23, 0, 0, 0), true);
    }
    driver.write_pointer(CRCR, ring | 1);
    driver.write(DOORBELL, 0);
    let mut driver = move_to_second(driver);
    let mut seen = 0;
    while let Some(event) = driver.event() {
        assert_eq!(event.parameter, ring + 16 * seen);
        seen += 1;
    }
    assert_eq!(seen, 100);
}

#[test]
fn spoilt_states_are_refused_or_harmless() {
    let (driver, ..) = busy();
    driver.io().hold();
    let state = matches_golden(&driver.xhci.lock().unwrap().save());
    let ram = GuestRam::new(RAM_BYTES).unwrap();
    let report: FaultReport = Arc::new(|_| ());
    let mut round = 0;
    spoil(&state, |bad| {
        round += 1;
        let msix = Msix::new(VECTORS, Arc::new(Sent::default()));
        let wiring = Wiring { irq: IrqLine::unconnected(), msix };
        let backend = Arc::clone(&driver.disk) as Arc<dyn BlockBackend>;
        let disks = vec![UsbDisk { serial: "disk-1".into(), backend }];
        let devices = UsbDevices { keyboard: true, tablet: true, disks };
        let (mut fresh, _) = Xhci::without_threads(ram.clone(), &wiring, devices, &report).unwrap();
        let _ = fresh.restore(bad);
        let mut write = |at, value: u64| assert!(fresh.bar_write(0, Access::new(at, Width::B4), value).is_ok());
        for target in 0..5 {
            (0..4).for_each(|slot| write(DOORBELL + 4 * slot, target));
        }
        write(ERDP, EVENTS[0] | 8);
        let input = fresh.input();
        input.pointer(round, 1, 1, 1);
        input.key(KeyCode(0x1e), true);
        for _ in 0..20 {
            let step = fresh.shared.controller().disk_step(FIRST_DISK_PORT);
            if let Step::Io(job) = step {
                fresh.shared.controller().disk_finish(FIRST_DISK_PORT, job, Ok(()));
            }
        }
        for (at, value) in [(portsc(5), 0x200 | 1 << 4), (USBCMD, 5), (USBCMD, 2)] {
            assert!(fresh.bar_write(0, Access::new(at, Width::B4), value).is_ok());
        }
    });
    assert!(round > 1000);
}
