//! Drivers that do what no driver should.

use super::*;

const LINK: u32 = 6;
const FATAL: u32 = 1 << 2;

#[test]
fn every_register_takes_every_value() {
    let mut driver = Driver::new();
    driver.attach_hid(TABLET);
    driver.attach_disk();
    for value in [0, 1, 0x5555_5555, 0xaaaa_aaaa, u32::MAX, 0x8000_0000] {
        for at in (0..0x1100).step_by(4).chain((0x2000..0x2100).step_by(4)).chain([0x3ffc]) {
            driver.write(at, value);
            driver.read(at);
            driver.input.pointer(at as u16, value as u16, 0, 1);
            driver.input.key(KeyCode(0x1e), at % 8 == 0);
        }
        for width in [Width::B1, Width::B2, Width::B8] {
            for at in 0..0x60 {
                driver.view.write(driver.bar + at, width, value.into());
                driver.view.read(driver.bar + at, width);
            }
        }
        driver.view.write(driver.bar + 0x3ffc, Width::B8, 1);
        driver.view.read(driver.bar + 0x3fff, Width::B8);
    }
    driver.check_it_serves();
}

#[test]
fn event_rings_that_cannot_be_are_fatal_until_a_reset() {
    let mut driver = Driver::new();
    for (entries, table, base, size) in [
        (17u32, SEGMENT_TABLE, EVENTS[0], 32u32),
        (0xffff_ffff, SEGMENT_TABLE, EVENTS[0], 32),
        (1, 0xa_0000, EVENTS[0], 32),
        (1, !0x3f, EVENTS[0], 32),
        (1, RAM_BYTES - 8, EVENTS[0], 32),
        (1, SEGMENT_TABLE, 0xa_0000, 32),
        (1, SEGMENT_TABLE, RAM_BYTES - 64, 32),
        (1, SEGMENT_TABLE, u64::MAX, 32),
        (1, SEGMENT_TABLE, EVENTS[0], 0),
        (1, SEGMENT_TABLE, EVENTS[0], 15),
        (1, SEGMENT_TABLE, EVENTS[0], 4097),
        (2, SEGMENT_TABLE, EVENTS[0], 0xffff),
    ] {
        driver.start();
        driver.fill(SEGMENT_TABLE, &base.to_le_bytes());
        driver.fill(SEGMENT_TABLE + 8, &size.to_le_bytes());
        driver.write(ERSTSZ, entries);
        driver.write_pointer(ERSTBA, table);
        driver.write(DOORBELL, 0);
        let mut commands = driver.commands;
        driver.put(&mut commands, trb(23, 0, 0, 0));
        driver.write(DOORBELL, 0);
        assert_eq!(driver.read(USBSTS) & (FATAL | 1), FATAL | 1, "{entries} {table:#x} {base:#x} {size}");
        driver.write(USBCMD, 5);
        driver.write(DOORBELL, 0);
        driver.input.pointer(1, 1, 1, 1);
    }
    // The second segment goes away while the first is in use.
    driver.start();
    driver.fill(SEGMENT_TABLE + 16, &0xa_0000u64.to_le_bytes());
    for _ in 0..EVENT_TRBS {
        let mut commands = driver.commands;
        driver.put(&mut commands, trb(23, 0, 0, 0));
        driver.commands = commands;
        driver.write(DOORBELL, 0);
        while driver.event().is_some() {}
    }
    assert_eq!(driver.read(USBSTS) & FATAL, FATAL);
    driver.check_it_serves();
}

#[test]
fn rings_that_go_in_circles_end() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    // A transfer ring: a link to itself, a circle of no-ops, of empty buffers, of setup stages without an end.
    let setup = u64::from_le_bytes([0x80, 6, 0, 1, 0, 0, 18, 0]);
    let ring = 0x30_0000;
    for (endpoint, body) in [
        (3, vec![]),
        (3, vec![trb(8, 0, 0, 0)]),
        (3, vec![normal(DATA, 0, CH)]),
        (3, vec![normal(DATA, 0, 0)]),
        (3, vec![trb(7, 0, 0, CH)]),
        (1, vec![trb(2, setup, 8, IDT)]),
        (1, vec![trb(2, setup, 8, IDT), trb(3, DATA, 4, 1 << 16), trb(4, 0, 0, 0)]),
    ] {
        let link = ring + 16 * body.len() as u64;
        for (at, trb) in (ring..).step_by(16).zip(&body) {
            driver.put_at(at, *trb, true);
        }
        driver.put_at(link, trb(LINK, ring, 0, 0), true);
        if driver.endpoint_state(slot, endpoint) == 1 {
            assert_eq!(driver.slot_command(15, slot, endpoint), SUCCESS);
        }
        driver.early.clear();
        let control = u32::from(slot) << 24 | u32::from(endpoint) << 16;
        assert_eq!(driver.command(16, ring | 1, control).0, SUCCESS);
        driver.input.pointer(body.len() as u16 + 3, endpoint.into(), 0, 1);
        for _ in 0..50 {
            driver.input.pointer(1, 2, 1, 1);
            driver.input.pointer(1, 2, 0, 1);
        }
        driver.write(DOORBELL + 4 * u64::from(slot), endpoint.into());
        while let Some(event) = driver.event() {
            assert!([SUCCESS, SHORT, TRB_ERROR].contains(&event.code), "{event:?}");
        }
        if driver.endpoint_state(slot, endpoint) == 4 {
            assert_eq!(driver.command(16, ring, control).0, SUCCESS);
        }
    }
    // The command ring.
    driver.put_at(ring, trb(LINK, ring, 0, 0), true);
    driver.write(CRCR, 4);
    driver.write_pointer(CRCR, ring | 1);
    driver.write(DOORBELL, 0);
    assert_eq!(driver.read(USBSTS) & FATAL, FATAL);
    driver.check_it_serves();
    for at in [0xa_0000u64, RAM_BYTES - 4, !0x3f] {
        driver.start();
        driver.write_pointer(CRCR, at | 1);
        driver.write(DOORBELL, 0);
        driver.write(USBCMD, 5);
    }
    driver.check_it_serves();
}

#[test]
fn contexts_outside_of_ram_are_refused() {
    let mut driver = Driver::new();
    driver.write(portsc(1), 0x200 | 0x00fe_0000);
    driver.reset_port(1);
    let slot = driver.command(9, 0, 0).1;
    let control = u32::from(slot) << 24;
    for at in [0xa_0000, RAM_BYTES - 16, !0xf] {
        for kind in [11, 12, 13] {
            assert_ne!(driver.command(kind, at, control).0, SUCCESS);
        }
    }
    for context in [0, 0xa_0000, RAM_BYTES - 512, !0x3f] {
        driver.prepare_address(slot, 1);
        driver.fill(DCBAA + 8 * u64::from(slot), &u64::to_le_bytes(context));
        assert_eq!(driver.command(11, INPUT, control).0, PARAMETER);
    }
    for (word, value) in [(0, 1 << 27 | 1), (1, 0), (1, 9 << 16), (1, 0xff << 16)] {
        driver.prepare_address(slot, 1);
        driver.fill(INPUT + 32 + 4 * word, &u32::to_le_bytes(value));
        assert_eq!(driver.command(11, INPUT, control).0, PARAMETER, "slot context, word {word}");
    }
    driver.prepare_address(slot, 3);
    assert_eq!(driver.command(11, INPUT, control).0, TRANSACTION, "an empty port");
    driver.prepare_address(slot, 1);
    driver.input_context(0, &[0, 1]);
    assert_eq!(driver.command(11, INPUT, control).0, PARAMETER);
    for at in [0xa_0000, RAM_BYTES - 8, !0x3f] {
        driver.prepare_address(slot, 1);
        driver.write_pointer(DCBAAP, at);
        assert_eq!(driver.command(11, INPUT, control).0, PARAMETER);
    }
    driver.write_pointer(DCBAAP, DCBAA);
    driver.prepare_address(slot, 1);
    assert_eq!(driver.command(11, INPUT, control).0, SUCCESS);
    // Endpoints with streams, of other types, and all of them at once.
    driver.input_context(0, &[0, 1 << 3]);
    driver.input_context(4, &[1 << 10, 8 << 16 | 7 << 3]);
    assert_eq!(driver.command(12, INPUT, control).0, PARAMETER);
    for kind in [0u32, 1, 2, 3, 4] {
        assert_eq!(driver.configure(slot, &[(3, kind, 8)]), PARAMETER);
    }
    let all: Vec<(u8, u32, u32)> = (2..32).map(|index| (index, if index % 2 == 0 { 2 } else { 6 }, 1024)).collect();
    assert_eq!(driver.configure(slot, &all), SUCCESS);
    for index in 2..32 {
        driver.queue(slot, index, &[normal(DATA, 8, IOC)]);
        if index != 3 {
            assert_eq!(driver.transfer_event(slot, index).code, TRANSACTION);
            assert_eq!(driver.endpoint_state(slot, index), 2);
        }
    }
    for index in [0u32, 32, 63, 255] {
        driver.write(DOORBELL + 4 * u64::from(slot), index);
        assert_ne!(driver.command(15, 0, control | (index & 0x1f) << 16).0, SUCCESS, "{index}");
    }
    driver.check_it_serves();
}

#[test]
fn buffers_outside_of_ram_and_wrong_trbs_stop_the_endpoint() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    let disk = driver.attach_disk();
    let setup = u64::from_le_bytes([0x80, 6, 0, 1, 0, 0, 18, 0]);
    let bad: [(u8, u8, Vec<T>); 14] = [
        (slot, 3, vec![normal(0xa_0000, 8, IOC)]),
        (slot, 3, vec![normal(u64::MAX - 3, 8, IOC)]),
        (slot, 3, vec![trb(2, setup, 8, IDT)]),
        (slot, 3, vec![trb(5, DATA, 8, 0)]),
        (slot, 3, vec![trb(63, DATA, 8, 0)]),
        (slot, 1, vec![normal(DATA, 8, IOC)]),
        (slot, 1, vec![trb(4, 0, 0, IOC)]),
        (slot, 1, vec![trb(2, setup, 7, IDT)]),
        (slot, 1, vec![trb(2, setup, 8, 0)]),
        (slot, 1, vec![trb(2, setup, 8, IDT), trb(3, DATA, 18, 0)]),
        (slot, 1, vec![trb(2, setup, 8, IDT), trb(3, 0xa_0000, 18, 1 << 16)]),
        (slot, 1, vec![trb(2, u64::from_le_bytes([0x21, 9, 0, 2, 0, 0, 1, 0]), 8, IDT), trb(3, DATA, 64, 0)]),
        (disk, 4, vec![normal(0xa_0000, 31, IOC)]),
        (disk, 4, vec![normal(DATA, 31, IOC | IDT)]),
    ];
    for (slot, endpoint, trbs) in bad {
        driver.input.pointer(driver.commands.index as u16, 1, 0, 0);
        driver.input.pointer(driver.commands.index as u16, 2, 0, 1);
        driver.queue(slot, endpoint, &trbs);
        let event = driver.transfer_event(slot, endpoint);
        assert!([TRB_ERROR, STALL].contains(&event.code), "{trbs:x?}: {event:?}");
        driver.until("an error state", |driver| driver.endpoint_state(slot, endpoint) != 1);
        if driver.endpoint_state(slot, endpoint) == 2 {
            assert_eq!(driver.slot_command(14, slot, endpoint), SUCCESS);
        }
        driver.early.clear();
        assert_eq!(driver.set_dequeue(slot, endpoint), SUCCESS);
    }
    // Too long a data stage is refused, and lengths of all ones.
    let (code, _) = driver.control(slot, [0x21, 9, 0, 2, 0, 0, 0xff, 0xff], &[]);
    assert_eq!(code, STALL);
    driver.recover(slot, 1);
    disks::cbw(&mut driver, disk, 7, u32::MAX, true, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    for _ in 0..20 {
        driver.queue(disk, 3, &[normal(DATA, 0x1_0000, IOC)]);
        assert_eq!(driver.transfer_event(disk, 3).code, SUCCESS, "zeros without end");
    }
    disks::cbw(&mut driver, disk, 7, u32::MAX, false, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    driver.check_it_serves();
}

#[test]
fn a_driver_that_changes_its_rings_all_the_time_harms_only_itself() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    let disk = driver.attach_disk();
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (ram, stop) = (driver.ram.clone(), Arc::clone(&over));
    let scribbler = thread::spawn(move || {
        let mut seed = 1u64;
        while !stop.load(std::sync::atomic::Ordering::Acquire) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for base in [RINGS_AT + u64::from(slot) * 0x2_0000, RINGS_AT + u64::from(disk) * 0x2_0000, DCBAA] {
                let at = base + (seed >> 40) % 0x5000 / 4 * 4;
                ram.write(Gpa(at), &((seed >> 13) as u32).to_le_bytes()).unwrap();
            }
        }
    });
    for round in 0..3000u32 {
        driver.write(DOORBELL + 4 * u64::from(slot), 1 + round % 4);
        driver.write(DOORBELL + 4 * u64::from(disk), 1 + round % 5);
        driver.write(DOORBELL, 0);
        driver.input.pointer(round as u16, 1, round as u8, 1);
        driver.write_pointer(ERDP, (EVENTS[0] + u64::from(round % 32) * 16) | 8);
        if round % 100 == 0 {
            driver.write(USBCMD, 5);
        }
    }
    over.store(true, std::sync::atomic::Ordering::Release);
    scribbler.join().unwrap();
    driver.check_it_serves();
}

#[test]
fn a_pause_keeps_input_back_and_guest_ram_untouched() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    driver.queue(slot, 3, &[normal(DATA, 8, IOC | ISP)]);
    driver.io().hold();
    driver.input.pointer(5, 6, 0, 0);
    assert_eq!(driver.peek(), None);
    assert_eq!(driver.bytes(DATA, 8), [0; 8]);
    driver.io().release();
    assert_eq!((driver.transfer_event(slot, 3).code, driver.bytes(DATA + 1, 1)), (SHORT, vec![5]));
}
