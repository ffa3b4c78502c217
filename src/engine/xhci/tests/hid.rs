//! The keyboard and the tablet.

use super::*;

#[test]
fn a_driver_reads_all_descriptors() {
    let mut driver = Driver::new();
    for (port, product, protocol) in [(KEYBOARD, "USB Keyboard", [3, 1, 1]), (TABLET, "USB Tablet", [3, 0, 0])] {
        let slot = driver.attach(port);
        let device = driver.get(slot, [0x80, 6, 0, 1, 0, 0, 18, 0]);
        assert_eq!((device.len(), device[7], device[17]), (18, 64, 1));
        let head = driver.get(slot, [0x80, 6, 0, 2, 0, 0, 9, 0]);
        let all = driver.get(slot, [0x80, 6, 0, 2, 0, 0, 255, 0]);
        assert_eq!((head.len(), &head[..], u16::from_le_bytes([head[2], head[3]])), (9, &all[..9], 34));
        assert_eq!((all.len(), &all[14..17]), (34, &protocol[..]));
        assert_eq!(all[27..], [7, 5, 0x81, 3, 8, 0, 4]);
        let report_bytes = all[25];
        assert_eq!(driver.get(slot, [0x80, 6, 0, 3, 0, 0, 255, 0]), [4, 3, 9, 4]);
        let name = driver.get(slot, [0x80, 6, 2, 3, 9, 4, 255, 0]);
        let units: Vec<u16> = name[2..].chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
        assert_eq!(String::from_utf16(&units).unwrap(), product);
        assert_eq!(driver.get(slot, [0x80, 6, 0, 6, 0, 0, 10, 0])[..2], [10, 6]);
        assert_eq!(driver.get(slot, [0x80, 6, 0, 7, 0, 0, 34, 0])[1], 7);
        assert_eq!(driver.control(slot, [0x80, 6, 0, 15, 0, 0, 5, 0], &[]).0, STALL, "no object store");
        driver.recover(slot, 1);
        assert_eq!(driver.get(slot, [0x81, 6, 0, 0x22, 0, 0, 255, 0]).len(), usize::from(report_bytes));
        assert_eq!(driver.get(slot, [0x80, 8, 0, 0, 0, 0, 1, 0]), [0]);
        driver.set(slot, [0, 9, 1, 0, 0, 0, 0, 0], &[]);
        assert_eq!(driver.get(slot, [0x80, 8, 0, 0, 0, 0, 1, 0]), [1]);
        assert_eq!(driver.get(slot, [0x80, 0, 0, 0, 0, 0, 2, 0]), [1, 0]);
        driver.set(slot, [0x21, 10, 0, 0, 0, 0, 0, 0], &[]);
        assert_eq!(driver.control(slot, [0, 9, 2, 0, 0, 0, 0, 0], &[]).0, STALL);
        driver.recover(slot, 1);
    }
    driver.no_event();
}

#[test]
fn the_tablet_answers_when_there_is_something_to_say() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    assert!(driver.input.has_tablet() && !driver.input.has_keyboard());
    driver.queue(slot, 3, &[normal(DATA, 6, IOC | ISP), normal(DATA + 16, 8, IOC | ISP)]);
    driver.no_event();
    driver.write(IMAN, 3);
    driver.input.pointer(0x1234, 0x7fff, 1, 0);
    assert!(driver.is_high(), "at once, without anybody asking");
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.length), (SUCCESS, 0));
    assert_eq!(driver.bytes(DATA, 6), [1, 0x34, 0x12, 0xff, 0x7f, 0]);
    driver.input.pointer(0x1234, 0x7fff, 0, -1);
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.length), (SHORT, 2));
    assert_eq!(driver.bytes(DATA + 16, 6), [0, 0x34, 0x12, 0xff, 0x7f, 0xff]);
    // Without a buffer it waits; moves are gathered.
    for x in 0..100 {
        driver.input.pointer(x, 5, 0, 0);
    }
    driver.no_event();
    driver.queue(slot, 3, &[normal(DATA, 6, IOC)]);
    assert_eq!((driver.transfer_event(slot, 3).code, driver.bytes(DATA + 1, 1)), (SUCCESS, vec![99]));
    driver.no_event();
}

#[test]
fn keys_arrive_in_order_and_lights_are_read_out() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(KEYBOARD);
    driver.input.key(KeyCode(0x2a), true);
    driver.input.key(KeyCode(0x1e), true);
    driver.input.key(KeyCode(0x1e), false);
    driver.input.key(KeyCode(0x2a), false);
    let buffers: Vec<T> = (0..5).map(|index| normal(DATA + 8 * index, 8, IOC | ISP)).collect();
    driver.queue(slot, 3, &buffers);
    for report in [[2, 0, 0], [2, 0, 4], [2, 0, 0], [0, 0, 0]].into_iter().enumerate() {
        assert_eq!(driver.transfer_event(slot, 3).code, SUCCESS);
        assert_eq!(driver.bytes(DATA + 8 * report.0 as u64, 3), report.1);
    }
    driver.no_event();
    assert_eq!(driver.input.leds(), 0);
    driver.set(slot, [0x21, 9, 0, 2, 0, 0, 1, 0], &[0b011]);
    assert_eq!(driver.input.leds(), 0b011);
    assert_eq!(driver.get(slot, [0xa1, 1, 0, 1, 0, 0, 8, 0]), [0; 8]);
    driver.set(slot, [0x21, 11, 0, 0, 0, 0, 0, 0], &[]);
    assert_eq!(driver.get(slot, [0xa1, 3, 0, 0, 0, 0, 1, 0]), [0], "boot protocol");
    driver.set(slot, [0x21, 10, 0, 8, 0, 0, 0, 0], &[]);
    assert_eq!(driver.get(slot, [0xa1, 2, 0, 0, 0, 0, 1, 0]), [8]);
}

#[test]
fn an_endpoint_stops_and_goes_on_where_the_driver_says() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    let first = driver.queue(slot, 3, &[normal(DATA, 8, IOC | ISP), normal(DATA + 16, 8, IOC | ISP)]);
    assert_eq!(driver.slot_command(15, slot, 3), SUCCESS);
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.length, event.parameter), (STOPPED, 8, first));
    assert_eq!(driver.endpoint_state(slot, 3), 3);
    assert_eq!(u64::from(driver.words(driver.output(slot) + 96)[2]), first | 1, "the dequeue pointer");
    driver.input.pointer(1, 1, 0, 0);
    driver.no_event();
    assert_eq!(driver.slot_command(15, slot, 3), CONTEXT_STATE);
    assert_eq!(driver.slot_command(14, slot, 3), CONTEXT_STATE);
    // The first transfer is cancelled: the driver makes it a no-op, or goes past it.
    driver.put_at(first, trb(8, 0, 0, IOC), true);
    driver.write(DOORBELL + 4 * u64::from(slot), 3);
    assert_eq!(driver.endpoint_state(slot, 3), 1);
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.parameter), (SUCCESS, first));
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.parameter, event.length), (SHORT, first + 16, 2));
    driver.queue(slot, 3, &[normal(DATA, 8, IOC)]);
    assert_eq!(driver.slot_command(15, slot, 3), SUCCESS);
    assert_eq!(driver.transfer_event(slot, 3).code, STOPPED);
    assert_eq!(driver.set_dequeue(slot, 3), SUCCESS);
    driver.input.pointer(9, 9, 0, 0);
    driver.queue(slot, 3, &[normal(DATA + 32, 8, IOC)]);
    assert_eq!((driver.transfer_event(slot, 3).code, driver.bytes(DATA + 33, 1)), (SHORT, vec![9]));
}

#[test]
fn a_halted_endpoint_stalls_until_it_is_cleared() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    driver.set(slot, [2, 3, 0, 0, 0x81, 0, 0, 0], &[]);
    assert_eq!(driver.get(slot, [0x82, 0, 0, 0, 0x81, 0, 2, 0]), [1, 0]);
    driver.queue(slot, 3, &[normal(DATA, 8, 0)]);
    assert_eq!(driver.transfer_event(slot, 3).code, STALL, "told although nobody asked for an event");
    driver.recover(slot, 3);
    driver.set(slot, [2, 1, 0, 0, 0x81, 0, 0, 0], &[]);
    driver.queue(slot, 3, &[normal(DATA, 8, IOC)]);
    driver.input.pointer(1, 1, 0, 0);
    assert_eq!(driver.transfer_event(slot, 3).code, SHORT);
    assert_eq!(driver.control(slot, [2, 3, 0, 0, 0x82, 0, 0, 0], &[]).0, STALL, "no such endpoint");
}

#[test]
fn a_suspended_keyboard_wakes_who_wants_to_be_woken() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(KEYBOARD);
    driver.queue(slot, 3, &[normal(DATA, 8, IOC | ISP)]);
    driver.write(portsc(KEYBOARD), 0x200 | 1 << 16 | 3 << 5);
    driver.input.key(KeyCode(0x1e), true);
    driver.no_event();
    driver.write(portsc(KEYBOARD), 0x200 | 1 << 16);
    assert_eq!(driver.transfer_event(slot, 3).code, SUCCESS, "told after the resume");
    driver.early.clear();
    driver.write(portsc(KEYBOARD), 0x200 | 1 << 22);
    driver.set(slot, [0, 3, 1, 0, 0, 0, 0, 0], &[]);
    driver.queue(slot, 3, &[normal(DATA, 8, IOC | ISP)]);
    driver.write(portsc(KEYBOARD), 0x200 | 1 << 16 | 3 << 5);
    driver.no_event();
    driver.input.key(KeyCode(0x1e), false);
    assert_eq!(driver.event().unwrap().parameter, KEYBOARD << 24);
    let status = driver.read(portsc(KEYBOARD));
    assert_eq!((status >> 5 & 0xf, status >> 22 & 1), (15, 1), "resume");
    driver.write(portsc(KEYBOARD), 0x200 | 1 << 22 | 1 << 16);
    assert_eq!(driver.transfer_event(slot, 3).code, SUCCESS);
}

#[test]
fn transfers_are_cut_as_the_driver_likes() {
    let mut driver = Driver::new();
    let slot = driver.attach_hid(TABLET);
    // A control transfer in three pieces with an Event Data TRB, as Windows makes them.
    let setup = u64::from_le_bytes([0x80, 6, 0, 1, 0, 0, 18, 0]);
    driver.queue(
        slot,
        1,
        &[
            trb(2, setup, 8, IDT | 3 << 16),
            trb(3, DATA, 8, CH | 1 << 16),
            normal(DATA + 0x100, 10, CH),
            trb(7, 0x1234_5678_9abc, 0, IOC),
            trb(4, 0, 0, CH),
            trb(7, 0xdddd, 0, IOC | BEI),
        ],
    );
    let event = driver.transfer_event(slot, 1);
    assert_eq!((event.event_data, event.parameter, event.length), (true, 0x1234_5678_9abc, 18));
    let event = driver.transfer_event(slot, 1);
    assert_eq!((event.event_data, event.parameter, event.length), (true, 0xdddd, 0));
    assert_eq!((driver.bytes(DATA, 2), driver.bytes(DATA + 0x100 + 9, 1)), (vec![18, 1], vec![1]));
    // A short one: an event at the TRB that is short, and the Event Data TRB's.
    let trbs =
        [normal(DATA, 4, CH | ISP), normal(DATA + 8, 4, CH | ISP), normal(DATA, 4, CH | ISP), trb(7, 0xeeee, 0, IOC)];
    let first = driver.queue(slot, 3, &trbs);
    driver.input.pointer(1, 2, 0, 0);
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.parameter, event.length), (SHORT, first + 16, 2));
    let event = driver.transfer_event(slot, 3);
    assert_eq!((event.code, event.parameter, event.length, event.event_data), (SHORT, 0xeeee, 6, true));
    driver.no_event();
    // Stages that come one by one.
    driver.queue(slot, 1, &[trb(2, setup, 8, IDT | 3 << 16 | IOC)]);
    assert_eq!(driver.transfer_event(slot, 1).code, SUCCESS);
    driver.queue(slot, 1, &[trb(3, DATA, 64, IOC | 1 << 16)]);
    assert_eq!(driver.transfer_event(slot, 1).length, 46);
    driver.queue(slot, 1, &[trb(4, 0, 0, IOC)]);
    assert_eq!(driver.transfer_event(slot, 1).code, SUCCESS);
}
