//! Registers, ports, commands, the event ring and interrupts.

use super::*;

#[test]
fn firmware_finds_what_it_looks_for() {
    let mut driver = Driver::cold();
    assert_eq!(driver.root.read(FUNCTION, 0x00, Width::B4), 0x000d_1b36);
    assert_eq!(driver.root.read(FUNCTION, 0x08, Width::B4) >> 8, 0x0c_0330);
    assert_eq!(driver.root.read(FUNCTION, 0x60, Width::B2), 0x2030);
    let bar = driver.bar;
    assert_eq!(driver.view.read(bar, Width::B1), 0x40, "CAPLENGTH");
    assert_eq!(driver.view.read(bar + 2, Width::B2), 0x0110, "HCIVERSION");
    assert_eq!(driver.view.read(bar + 0x18, Width::B8), 0x1000, "RTSOFF, HCCPARAMS2");
    assert_eq!(driver.view.read(bar + 3, Width::B2), 0xffff, "across two registers");
    assert_eq!(driver.read(0x04), 8 << 24 | 1 << 8 | 16);
    assert_eq!(driver.read(0x08) >> 27, 0, "no scratchpad");
    assert_eq!((driver.read(0x10) & 0xffff, driver.read(0x14)), (0x101, 0x2000));
    // The extended capabilities, as drivers walk them.
    let (mut at, mut ports) = (u64::from(driver.read(0x10) >> 16) * 4, Vec::new());
    loop {
        let first = driver.read(at);
        assert_eq!((first & 0xff, driver.read(at + 4)), (2, u32::from_le_bytes(*b"USB ")));
        ports.push((first >> 24, driver.read(at + 8)));
        match u64::from(first >> 8 & 0xff) {
            0 => break,
            next => at += 4 * next,
        }
    }
    assert_eq!(ports, [(2, 4 << 8 | 1), (3, 4 << 8 | 5)]);
    assert_eq!(driver.read(USBSTS), 1, "halted");
    assert_eq!(driver.read(0x48), 1, "PAGESIZE");
    for (port, status) in [(1, 0x2_0ee1), (3, 0x2a0), (5, 0x2_1203), (6, 0x2a0)] {
        assert_eq!(driver.read(portsc(port)), status, "port {port}");
    }
    let first = driver.read(0x1000);
    driver.until("MFINDEX moves", |driver| driver.read(0x1000) != first);
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = Driver::new();
    driver.attach_hid(TABLET);
    driver.write(USBCMD, 2);
    assert_eq!((driver.read(USBCMD), driver.read(CONFIG), driver.read(DCBAAP)), (0, 0, 0));
    assert_eq!((driver.read(ERSTSZ), driver.read(ERDP), driver.read(IMAN)), (0, 0, 0));
    assert_eq!(driver.read(portsc(TABLET)), 0x2_0ee1);
    driver.check_it_serves();
    driver.root.reset();
    assign::assign(&mut driver.root);
    driver.bar = driver.root.read(FUNCTION, 0x10, Width::B4) & !15;
    driver.check_it_serves();
}

#[test]
fn ports_reset_suspend_resume_and_stop() {
    let mut driver = Driver::new();
    let change = |driver: &mut Driver, bits: u32| {
        let kept = driver.read(portsc(1)) & 0x0e00_c200;
        driver.write(portsc(1), kept | bits);
    };
    driver.write(portsc(1), 0x200 | 0x00fe_0000);
    driver.reset_port(1);
    let link = |driver: &mut Driver, port| driver.read(portsc(port)) >> 5 & 0xf;
    change(&mut driver, 1 << 16 | 3 << 5);
    assert_eq!(link(&mut driver, 1), 3);
    change(&mut driver, 1 << 16 | 15 << 5);
    change(&mut driver, 1 << 16);
    assert_eq!((link(&mut driver, 1), driver.event().unwrap().parameter), (0, 1 << 24));
    assert_eq!(driver.read(portsc(1)) & 0x00fe_0000, 1 << 22);
    change(&mut driver, 2);
    assert_eq!(driver.read(portsc(1)) & 3, 1, "disabled");
    driver.write(portsc(5), 0x200 | 1 << 17);
    driver.write(portsc(5), 0x200 | 1 << 31);
    assert_eq!(driver.read(portsc(5)) & 0x00fe_0000, 1 << 21 | 1 << 19, "a warm reset");
    assert_eq!(driver.event().unwrap().parameter, 5 << 24);
    // Nothing is there: nothing happens.
    driver.write(portsc(3), 0x200 | 1 << 4);
    assert_eq!(driver.read(portsc(3)), 0x2a0);
    driver.write(portsc(8) + 0x10, u32::MAX);
    driver.no_event();
    assert_eq!(driver.read(USBSTS) & 0x10, 0x10);
    driver.write(USBSTS, 0x10);
    assert_eq!(driver.read(USBSTS) & 0x10, 0);
}

#[test]
fn slots_are_enabled_used_and_given_back() {
    let mut driver = Driver::new();
    assert_eq!(driver.command(23, 0, 0), (SUCCESS, 0));
    for slot in 1..=16 {
        assert_eq!(driver.command(9, 0, 0), (SUCCESS, slot));
    }
    assert_eq!(driver.command(9, 0, 0), (NO_SLOTS, 0));
    assert_eq!(driver.slot_command(10, 3, 0), SUCCESS);
    assert_eq!(driver.slot_command(10, 3, 0), SLOT_NOT_ENABLED);
    assert_eq!(driver.command(9, 0, 0), (SUCCESS, 3));
    for slot in [0, 17, 255] {
        assert_eq!(driver.slot_command(10, slot, 0), SLOT_NOT_ENABLED);
        assert_eq!(driver.slot_command(11, slot, 0), SLOT_NOT_ENABLED);
    }
    for unknown in [0, 18, 19, 20, 21, 22, 24, 63] {
        assert_eq!(driver.slot_command(unknown, 1, 0), TRB_ERROR);
    }
    assert_eq!(driver.slot_command(12, 1, 0), CONTEXT_STATE);
    assert_eq!(driver.slot_command(15, 1, 1), CONTEXT_STATE);
    // As Windows and some versions of Linux do: first without an address, then with one.
    driver.write(portsc(1), 0x200 | 0x00fe_0000);
    driver.prepare_address(1, 1);
    assert_eq!(driver.command(11, INPUT, 1 << 24), (TRANSACTION, 1), "the port is not enabled");
    driver.reset_port(1);
    assert_eq!(driver.command(11, INPUT, 1 << 24 | 1 << 9), (SUCCESS, 1));
    assert_eq!((driver.slot_state(1), driver.words(driver.output(1))[3] & 0xff), (1, 0));
    assert_eq!(driver.get(1, [0x80, 6, 0, 1, 0, 0, 8, 0])[..4], [18, 1, 0, 2]);
    driver.prepare_address(1, 1);
    assert_eq!(driver.command(11, INPUT, 1 << 24), (SUCCESS, 1));
    assert_eq!((driver.slot_state(1), driver.words(driver.output(1))[3] & 0xff), (2, 1));
    driver.prepare_address(2, 1);
    assert_eq!(driver.command(11, INPUT, 2 << 24), (TRANSACTION, 2), "another slot has the device");
    assert_eq!(driver.slot_command(15, 1, 3), ENDPOINT_NOT_ENABLED);
    // Evaluate Context changes the packet size.
    driver.input_context(0, &[0, 2]);
    driver.input_context(2, &[0, 8 << 16 | 4 << 3]);
    assert_eq!(driver.command(13, INPUT, 1 << 24), (SUCCESS, 1));
    assert_eq!(driver.words(driver.output(1) + 32)[1] >> 16, 8);
    assert_eq!(driver.configure(1, &[(3, 7, 8)]), SUCCESS);
    assert_eq!(driver.configure(1, &[(3, 3, 8)]), PARAMETER, "an OUT type at an IN index");
    assert_eq!(driver.endpoint_state(1, 3), 1, "as before");
    assert_eq!(driver.command(12, INPUT, 1 << 24 | 1 << 9).0, SUCCESS);
    assert_eq!((driver.slot_state(1), driver.endpoint_state(1, 3)), (2, 0));
    assert_eq!(driver.slot_command(17, 1, 0), SUCCESS);
    assert_eq!(driver.slot_state(1), 1);
    assert_eq!(driver.slot_command(17, 1, 0), CONTEXT_STATE);
}

#[test]
fn the_command_ring_stops_when_told() {
    let mut driver = Driver::new();
    assert_eq!(driver.command(23, 0, 0).0, SUCCESS);
    assert_eq!(driver.read(CRCR), 8, "running");
    driver.write(CRCR, 4);
    let event = driver.event().unwrap();
    assert_eq!((event.kind, event.code, event.parameter), (33, 24, COMMANDS + 16));
    assert_eq!(driver.read(CRCR), 0);
    driver.no_event();
    assert_eq!(driver.command(23, 0, 0).0, SUCCESS, "it goes on where it was");
}

#[test]
fn the_pin_is_high_until_the_driver_clears_the_pending_bit() {
    let mut driver = Driver::new();
    driver.write(IMAN, 3);
    driver.write(USBSTS, 8);
    assert!(!driver.is_high());
    let send = |driver: &mut Driver| {
        let mut commands = driver.commands;
        driver.put(&mut commands, trb(23, 0, 0, 0));
        driver.commands = commands;
        driver.write(DOORBELL, 0);
    };
    send(&mut driver);
    assert!(driver.is_high());
    assert_eq!((driver.read(USBSTS) & 8, driver.read(IMAN), driver.read(ERDP) & 8), (8, 3, 8));
    driver.write(IMAN, 3);
    driver.write(USBSTS, 8);
    assert!(!driver.is_high());
    send(&mut driver);
    assert!(!driver.is_high(), "the driver is still at work");
    assert!(driver.event().is_some());
    assert!(driver.is_high(), "and has not seen everything");
    driver.write(IMAN, 3);
    assert!(driver.event().is_some());
    assert!(!driver.is_high());
    driver.write(USBCMD, 1);
    send(&mut driver);
    assert!(!driver.is_high(), "INTE is off");
    driver.write(USBCMD, 5);
    assert!(driver.is_high());
    driver.write(IMAN, 0);
    assert!(!driver.is_high());
    driver.write(USBCMD, 2);
    assert!(!driver.is_high());
}

#[test]
fn messages_are_sent_instead_when_the_driver_chose_them() {
    let mut driver = Driver::new();
    for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x41), (12, 0)] {
        driver.view.write(driver.msix + offset, Width::B4, value);
    }
    driver.root.write(FUNCTION, 0x42, Width::B2, 0x8000);
    driver.sent.0.lock().unwrap().clear();
    driver.write(IMAN, 3);
    for round in 1..=3 {
        assert_eq!(driver.command(23, 0, 0).0, SUCCESS);
        assert_eq!(driver.sent.0.lock().unwrap().len(), round);
        assert_eq!((driver.read(USBSTS) & 8, driver.read(IMAN)), (8, 2), "the message clears the pending bit");
        driver.write(USBSTS, 8);
    }
    assert!(!driver.is_high());
}

#[test]
fn a_full_event_ring_stops_everything_and_loses_nothing() {
    let mut driver = Driver::new();
    for _ in 0..200 {
        assert_eq!(driver.command(23, 0, 0).0, SUCCESS, "around both rings");
    }
    // A long command ring, and nobody who consumes.
    let ring = 0x30_0000;
    for index in 0..200u64 {
        driver.put_at(ring + 16 * index, trb(23, 0, 0, 0), true);
    }
    driver.fill(ring + 16 * 200, &[0; 16]);
    driver.write(CRCR, 4);
    assert_eq!(driver.event().unwrap().code, 24);
    driver.write_pointer(CRCR, ring | 1);
    driver.write(DOORBELL, 0);
    driver.write(portsc(1), 0x200 | 1 << 17);
    driver.write(portsc(1), 0x200 | 1 << 4);
    let mut seen = Vec::new();
    let mut ports = 0;
    loop {
        let mut batch = Vec::new();
        while let Some(event) = driver.peek() {
            batch.push(event);
        }
        if batch.is_empty() {
            break;
        }
        assert!(batch.len() < 2 * EVENT_TRBS as usize);
        for event in batch {
            if event.kind == 34 { ports += 1 } else { seen.push(event.parameter) }
        }
        let (segment, index, _) = driver.events;
        driver.write_pointer(ERDP, (EVENTS[segment] + 16 * index) | 8);
    }
    assert_eq!(ports, 1);
    assert_eq!(seen, (0..200).map(|index| ring + 16 * index).collect::<Vec<u64>>());
}
