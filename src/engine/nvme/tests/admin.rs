//! Registers, admin commands, interrupts, and the controller's states.

use super::*;

fn identify(structure: u32, nsid: u32) -> Cmd {
    Cmd { opcode: 6, nsid, prp1: DATA, words: [structure, 0, 0, 0, 0, 0], ..Cmd::default() }
}

const EVENT_REQUEST: Cmd = Cmd { opcode: 12, flags: 0, nsid: 0, prp1: 0, prp2: 0, words: [0; 6] };

#[test]
fn the_function_is_what_drivers_look_for() {
    let mut driver = Driver::cold(Gate::new(false));
    assert_eq!(driver.root.read(FUNCTION, 0x00, Width::B4), 0x0010_1b36);
    assert_eq!(driver.root.read(FUNCTION, 0x08, Width::B4) >> 8, 0x01_0802);
    assert_eq!(driver.root.read(FUNCTION, 0x2c, Width::B4), 0x1100_1af4);
    assert_eq!(driver.root.read(FUNCTION, 0x10, Width::B4) & 15, 4, "64 bits");
    assert_eq!(driver.root.read(FUNCTION, 0x40, Width::B4), 0x0008_0011, "MSI-X with nine vectors");
    assert_eq!(driver.root.read(FUNCTION, 0x44, Width::B4), 4, "in BAR 4");
    for (register, mask) in [(0x10, 0xffff_c004), (0x20, 0xffff_f000)] {
        driver.root.write(FUNCTION, register, Width::B4, 0xffff_ffff);
        assert_eq!(driver.root.read(FUNCTION, register, Width::B4), mask);
    }
}

#[test]
fn registers_answer_in_halves_and_whole() {
    let mut driver = Driver::cold(Gate::new(false));
    let (bar, cap) = (driver.bar, 0x20_7801_03ff);
    assert_eq!(driver.view.read(bar, Width::B8), cap);
    assert_eq!((driver.read(0), driver.read(4)), (cap as u32, (cap >> 32) as u32));
    assert_eq!(driver.read(8), 0x0001_0400);
    driver.view.write(bar, Width::B8, u64::MAX);
    driver.view.write(bar + CSTS, Width::B4, u64::MAX);
    assert_eq!((driver.view.read(bar, Width::B8), driver.read(CSTS)), (cap, 0), "read-only");
    driver.write(AQA, 0xffff_ffff);
    driver.write(ASQ, 0xffff_ffff);
    driver.write(ASQ + 4, 0x12);
    driver.view.write(bar + ACQ, Width::B8, 0x1234_5678_9abc_def0);
    assert_eq!(driver.read(AQA), 0x0fff_0fff);
    assert_eq!(driver.view.read(bar + ASQ, Width::B8), 0x12_ffff_f000, "whole pages");
    assert_eq!(driver.view.read(bar + ACQ, Width::B8), 0x1234_5678_9abc_d000);
    driver.write(0x0c, 0xff);
    driver.write(0x10, 0x0f);
    assert_eq!((driver.read(0x0c), driver.read(0x10)), (0xf0, 0xf0));
    for (width, offset) in [(Width::B1, 0), (Width::B2, 8), (Width::B4, 2), (Width::B8, 4)] {
        assert_eq!(driver.view.read(bar + offset, width), width.mask(), "{width:?} at {offset} is not defined");
        driver.view.write(bar + offset, width, 0);
    }
    assert_eq!((driver.read(0x1000), driver.read(0x3ffc)), (0, 0));
}

#[test]
fn identify_tells_what_controller_and_disk_are() {
    let mut driver = Driver::new();
    assert_eq!(driver.admin(identify(1, 0)).status, status::SUCCESS);
    let data = driver.bytes(DATA, 4096);
    assert_eq!(number::<4>(&data, 0), 0x1af4_1b36);
    assert_eq!(&data[4..24], b"serial-of-a-disk-tha");
    assert_eq!(&data[24..64], format!("{:40}", "Innkeeper disk").as_bytes());
    assert_eq!(&data[64..72], b"1.0     ");
    assert_eq!((data[77], data[258], data[259]), (8, 3, 3), "1 MiB, four aborts, four event requests");
    assert_eq!((number::<4>(&data, 80), data[111]), (0x0001_0400, 1));
    assert_eq!((data[512], data[513], number::<4>(&data, 516)), (0x66, 0x44, 1));
    assert_eq!((number::<2>(&data, 520), data[525]), (0x0c, 7));
    let name = String::from_utf8(data[768..1024].to_vec()).unwrap();
    assert!(name.starts_with("nqn.2014-08.org.nvmexpress:uuid:"));
    let uuid: String = name.trim_end_matches('\0')[32..].chars().filter(|c| *c != '-').collect();

    assert_eq!(driver.admin(identify(0, 1)).status, status::SUCCESS);
    let data = driver.bytes(DATA, 4096);
    for at in [0, 8, 16] {
        assert_eq!(number::<8>(&data, at), DISK_BYTES / 512);
    }
    assert_eq!((data[25], data[26], data[99], number::<4>(&data, 128)), (0, 0, 0, 9 << 16));
    assert_eq!(data[104..128], [0; 24], "no NGUID and EUI-64");

    assert_eq!(driver.admin(identify(2, 0)).status, status::SUCCESS);
    assert_eq!(driver.bytes(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.admin(identify(2, 1)).status, status::SUCCESS);
    assert_eq!(driver.bytes(DATA, 4), [0; 4]);

    assert_eq!(driver.admin(identify(3, 1)).status, status::SUCCESS);
    let data = driver.bytes(DATA, 24);
    assert_eq!((&data[..4], &data[20..]), (&[3, 16, 0, 0][..], &[0; 4][..]));
    assert_eq!(data[4..20].iter().map(|byte| format!("{byte:02x}")).collect::<String>(), uuid);

    for (structure, nsid) in [(0, 0), (0, 2), (0, ALL), (2, ALL), (2, ALL - 1), (3, 0), (3, 2)] {
        assert_eq!(driver.admin(identify(structure, nsid)).status, status::INVALID_NAMESPACE, "{structure} {nsid}");
    }
    assert_eq!(driver.admin(identify(4, 1)).status, status::INVALID_FIELD);
    assert_eq!(driver.admin(Cmd { prp1: DATA + 2, ..identify(1, 0) }).status, status::PRP_OFFSET);
    assert_eq!(driver.admin(Cmd { prp1: 0xa_0000, ..identify(1, 0) }).status, status::DATA_TRANSFER);
    let across = Cmd { prp1: DATA + 0x1800, prp2: DATA + 0x8000, ..identify(1, 0) };
    assert_eq!(driver.admin(across).status, status::SUCCESS);
    assert_eq!(driver.bytes(DATA + 0x1804, 6), b"serial");
    let mut read_only = Driver::with(Gate::new(true));
    read_only.admin(identify(0, 1));
    assert_eq!(read_only.bytes(DATA + 99, 1), [1]);
}

#[test]
fn queues_are_made_and_deleted_in_order_only() {
    let mut driver = Driver::new();
    let pair = Pair::new(2, 16);
    let completion = |id: u32, entries: u32, more: u32, at: u64| {
        let words = [(entries.wrapping_sub(1)) << 16 | id, more, 0, 0, 0, 0];
        Cmd { opcode: 5, prp1: at, words, ..Cmd::default() }
    };
    for (id, entries, more, at, expected) in [
        (0, 16, 3, pair.completion, status::QUEUE_ID),
        (9, 16, 3, pair.completion, status::QUEUE_ID),
        (0xffff, 16, 3, pair.completion, status::QUEUE_ID),
        (1, 16, 3, pair.completion, status::QUEUE_ID),
        (2, 1, 3, pair.completion, status::QUEUE_SIZE),
        (2, 1025, 3, pair.completion, status::QUEUE_SIZE),
        (2, 0x1_0000, 3, pair.completion, status::QUEUE_SIZE),
        (2, 16, 2, pair.completion, status::INVALID_FIELD),
        (2, 16, 3, pair.completion + 16, status::PRP_OFFSET),
        (2, 16, 1 << 16 | 3, pair.completion, status::VECTOR),
        (2, 16, 0xffff_0003, pair.completion, status::VECTOR),
        (2, 16, 3, 0xa_0000, status::INVALID_FIELD),
        (2, 1024, 3, RAM_BYTES - PAGE, status::INVALID_FIELD),
        (2, 16, 3, u64::MAX - 4095, status::INVALID_FIELD),
    ] {
        let done = driver.admin(completion(id, entries, more, at));
        assert_eq!(done.status, expected, "{id} {entries} {more:#x} {at:#x}");
    }
    let submission = |id: u32, entries: u32, more: u32, at: u64| Cmd { opcode: 1, ..completion(id, entries, more, at) };
    for (id, entries, more, at, expected) in [
        (0, 16, 1 << 16 | 1, pair.submission, status::QUEUE_ID),
        (9, 16, 1 << 16 | 1, pair.submission, status::QUEUE_ID),
        (1, 16, 1 << 16 | 1, pair.submission, status::QUEUE_ID),
        (2, 16, 1, pair.submission, status::QUEUE_ID),
        (2, 16, 9 << 16 | 1, pair.submission, status::QUEUE_ID),
        (2, 16, 2 << 16 | 1, pair.submission, status::NO_COMPLETION_QUEUE),
        (2, 1, 1 << 16 | 1, pair.submission, status::QUEUE_SIZE),
        (2, 16, 1 << 16, pair.submission, status::INVALID_FIELD),
        (2, 16, 1 << 16 | 1, pair.submission + 64, status::PRP_OFFSET),
        (2, 16, 1 << 16 | 1, RAM_BYTES, status::INVALID_FIELD),
    ] {
        let done = driver.admin(submission(id, entries, more, at));
        assert_eq!(done.status, expected, "{id} {entries} {more:#x} {at:#x}");
    }
    let delete = |opcode, id| Cmd { opcode, words: [id, 0, 0, 0, 0, 0], ..Cmd::default() };
    for (opcode, id) in [(0, 0), (0, 2), (0, 9), (4, 0), (4, 2), (4, 9), (0, 0xffff), (4, 0xffff)] {
        assert_eq!(driver.admin(delete(opcode, id)).status, status::QUEUE_ID, "{opcode} {id}");
    }
    assert_eq!(driver.admin(delete(4, 1)).status, status::QUEUE_DELETION, "its submission queue is there");
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    assert_eq!(driver.admin(delete(0, 1)).status, status::SUCCESS);
    assert_eq!(driver.admin(delete(4, 1)).status, status::SUCCESS);
    driver.create(1, 8, 0);
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    // Entry sizes that the controller has not.
    driver.write(CC, 0x45_0001);
    assert_eq!(driver.admin(completion(2, 16, 3, pair.completion)).status, status::QUEUE_SIZE);
    driver.write(CC, CC_SIZES | 1);
    assert_eq!(driver.admin(completion(2, 16, 3, pair.completion)).status, status::SUCCESS);
}

#[test]
fn features_are_kept_until_the_next_reset() {
    let mut driver = Driver::new();
    assert_eq!(driver.get_feature(7, 0).result, 0x0007_0007);
    assert_eq!(driver.set_feature(7, 0x0001_0001).status, status::SEQUENCE, "there are queues");
    for (feature, value, kept) in [
        (1, 0x0403_0207, 0x0403_0207),
        (2, 0, 0),
        (4, 333, 333),
        (5, 0x1_1234, 0x1234),
        (8, 0x0a05, 0x0a05),
        (0x0a, 1, 1),
        (0x0b, 0x1f, 0x1f),
    ] {
        assert_eq!(driver.set_feature(feature, value).status, status::SUCCESS, "{feature}");
        assert_eq!(driver.get_feature(feature, 0).result, kept, "{feature}");
    }
    assert_eq!(driver.set_feature(4, 1 << 20 | 280).status, status::SUCCESS);
    assert_eq!((driver.get_feature(4, 1 << 20).result, driver.get_feature(4, 0).result), (280, 333));
    assert_eq!(driver.set_feature(9, 1 << 16).status, status::SUCCESS);
    assert_eq!(driver.get_feature(9, 0).result, 1 << 16);
    for (feature, value) in
        [(0, 0), (2, 1), (3, 0), (4, 1 << 16), (4, 2 << 20), (9, 1), (0x0c, 0), (0x10, 0), (0x80, 1), (0xff, 0)]
    {
        assert_eq!(driver.set_feature(feature, value).status, status::INVALID_FIELD, "{feature} {value:#x}");
    }
    for (feature, value) in [(0, 0), (3, 0), (4, 1 << 16), (9, 1), (0x0c, 0), (0x106, 0)] {
        assert_eq!(driver.get_feature(feature, value).status, status::INVALID_FIELD, "{feature:#x}");
    }
    assert_eq!(driver.set_feature(1 << 31 | 6, 1).status, status::NOT_SAVEABLE);
    driver.enable();
    assert_eq!((driver.get_feature(1, 0).result, driver.get_feature(4, 0).result), (0, 343));
    assert_eq!(driver.set_feature(7, 0x0001_0001).result, 0x0007_0007);
    for value in [0xffff, 0xffff_0000] {
        assert_eq!(driver.set_feature(7, value).status, status::INVALID_FIELD);
    }
}

#[test]
fn log_pages_tell_errors_health_and_firmware() {
    let mut driver = Driver::new();
    assert_eq!(driver.log_page(1, 256), [0; 256]);
    for block in 0..5u32 {
        let cmd = Cmd { opcode: 0x55, nsid: 3, words: [block, 7, 0, 0, 0, 0], ..Cmd::default() };
        driver.run(1, cmd);
    }
    let errors = driver.log_page(1, 256);
    let counts: Vec<u64> = (0..4).map(|entry| number::<8>(&errors, 64 * entry)).collect();
    assert_eq!(counts, [5, 4, 3, 2], "newest first");
    assert_eq!((number::<2>(&errors, 8), number::<2>(&errors, 12)), (1, 0x8000 | 2));
    assert_eq!((number::<8>(&errors, 16), number::<4>(&errors, 24)), (7 << 32 | 4, 3));

    for _ in 0..3 {
        driver.io(transfer(READ, 0, 16, DATA, DATA + PAGE));
    }
    driver.io(transfer(WRITE, 0, 1, DATA, 0));
    let health = driver.log_page(2, 512);
    assert_eq!((health[0], number::<2>(&health, 1), health[3], health[5]), (0, 298, 100, 0));
    let counters: Vec<u64> = [32, 48, 64, 80, 176].map(|at| number::<8>(&health, at)).to_vec();
    assert_eq!(counters, [1, 1, 3, 1, 5]);
    assert_eq!(driver.set_feature(4, 290).status, status::SUCCESS);
    assert_eq!(driver.log_page(2, 512)[0], 2, "warmer than the driver likes");

    let firmware = driver.log_page(3, 512);
    assert_eq!((firmware[0], &firmware[8..16]), (1, &b"1.0     "[..]));

    let read = |page: u32, upper: u32, offset: u32, nsid: u32, prp1: u64| {
        let words = [0xffff_0000 | page, upper, offset, 0, 0, 0];
        Cmd { opcode: 2, nsid, prp1, words, ..Cmd::default() }
    };
    driver.fill(DATA, &[0xee; 1024]);
    assert_eq!(driver.admin(read(3, 0xffff, 8, 0, DATA)).status, status::SUCCESS, "longer than the page");
    assert_eq!(&driver.bytes(DATA, 8), b"1.0     ");
    assert_eq!(driver.bytes(DATA + 503, 2), [0, 0xee], "and no more");
    assert_eq!(driver.admin(read(3, 0, 512, 0, DATA)).status, status::SUCCESS, "nothing is left");
    for (cmd, expected) in [
        (read(0, 0, 0, 0, DATA), status::LOG_PAGE),
        (read(5, 0, 0, 0, DATA), status::LOG_PAGE),
        (read(0xc0, 0, 0, 0, DATA), status::LOG_PAGE),
        (read(3, 0, 513, 0, DATA), status::INVALID_FIELD),
        (read(3, 0, 516, 0, DATA), status::INVALID_FIELD),
        (read(3, 0, 6, 0, DATA), status::INVALID_FIELD),
        (read(2, 0, 0, 2, DATA), status::INVALID_FIELD),
        (read(2, 0, 0, 0, 0xa_0000), status::DATA_TRANSFER),
        (read(2, 0, 0, 0, DATA + 1), status::PRP_OFFSET),
    ] {
        assert_eq!(driver.admin(cmd).status, expected, "{:x?}", cmd.words);
    }
}

#[test]
fn event_requests_are_held_limited_and_aborted() {
    let mut driver = Driver::new();
    let held: Vec<u16> = (0..4).map(|_| driver.submit(0, EVENT_REQUEST)).collect();
    assert_eq!(driver.admin(EVENT_REQUEST).status, status::EVENT_LIMIT);
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    assert_eq!(driver.peek(0), None, "nothing happens");
    let abort =
        |id: u16, queue: u32| Cmd { opcode: 8, words: [u32::from(id) << 16 | queue, 0, 0, 0, 0, 0], ..Cmd::default() };
    assert_eq!(driver.admin(abort(1, 0)).result, 1, "no such command");
    assert_eq!(driver.admin(abort(held[2], 1)).result, 1, "not of that queue");
    let id = driver.submit(0, abort(held[2], 0));
    let (aborted, done) = (driver.reap(0), driver.reap(0));
    assert_eq!((aborted.id, aborted.status, aborted.do_not_retry), (held[2], status::ABORTED, false));
    assert_eq!((done.id, done.status, done.result), (id, status::SUCCESS, 0));
    driver.submit(0, EVENT_REQUEST);
    // Events of one class are told once, until its log page was read.
    driver.ring_tail(5, 1);
    let event = driver.reap(0);
    assert_eq!((event.id, event.status, event.result), (held[0], status::SUCCESS, 0x01_0000));
    driver.ring_tail(1, 16);
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    assert_eq!(driver.peek(0), None);
    let retain = Cmd { opcode: 2, prp1: DATA, words: [15 << 16 | 1 << 15 | 1, 0, 0, 0, 0, 0], ..Cmd::default() };
    assert_eq!(driver.admin(retain).status, status::SUCCESS);
    driver.ring_tail(1, 16);
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    assert_eq!(driver.peek(0), None, "reading it so does not count");
    let errors = driver.log_page(1, 64);
    assert_eq!((number::<2>(&errors, 8), number::<2>(&errors, 10)), (0xffff, 0xffff), "of no queue and no command");
    driver.ring_tail(1, 16);
    let event = driver.reap(0);
    assert_eq!((event.id, event.result), (held[1], 0x01_0100), "a value that the queue does not have");
    // The temperature, when the driver asks to hear of it.
    driver.set_feature(4, 290);
    assert_eq!(driver.peek(0), None);
    assert_eq!(driver.set_feature(0x0b, 2).status, status::SUCCESS);
    let event = driver.reap(0);
    assert_eq!((event.id, event.result), (held[3], 0x02_0101));
}

#[test]
fn an_event_that_came_first_waits_for_its_request() {
    let mut driver = Driver::new();
    driver.write(0x3ffc, 0);
    driver.write(0x1000 + 4 * 18, 0);
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    let id = driver.submit(0, EVENT_REQUEST);
    let event = driver.reap(0);
    assert_eq!((event.id, event.result), (id, 0x01_0000));
}

#[test]
fn msix_sends_the_vector_of_the_queue() {
    let mut driver = Driver::cold(Gate::new(false));
    driver.use_msix();
    driver.enable();
    driver.create(1, 16, 3);
    driver.create(2, 16, 8);
    driver.until("the messages", |driver| driver.sent().len() == 4);
    assert_eq!(driver.sent(), [0x40; 4], "the admin queue's");
    driver.run(1, FLUSH);
    driver.run(2, FLUSH);
    driver.until("the messages", |driver| driver.sent().len() == 6);
    assert_eq!(driver.sent()[4..], [0x43, 0x48]);
    assert!(!driver.is_high(), "the pin is silent");
    // A queue that is polled.
    let pair = driver.fresh_pair(3, 16);
    let cmd = Cmd { opcode: 5, prp1: pair.completion, words: [15 << 16 | 3, 1, 0, 0, 0, 0], ..Cmd::default() };
    driver.admin(cmd);
    driver.admin(Cmd {
        opcode: 1,
        prp1: pair.submission,
        words: [15 << 16 | 3, 3 << 16 | 1, 0, 0, 0, 0],
        ..Cmd::default()
    });
    driver.until("the messages", |driver| driver.sent().len() == 8);
    driver.run(3, FLUSH);
    assert_eq!(driver.sent().len(), 8);
    let bad =
        Cmd { opcode: 5, prp1: pair.completion, words: [15 << 16 | 4, 9 << 16 | 3, 0, 0, 0, 0], ..Cmd::default() };
    assert_eq!(driver.admin(bad).status, status::VECTOR);
}

#[test]
fn the_pin_is_high_while_entries_wait_and_falls_with_the_doorbell() {
    let mut driver = Driver::new();
    assert!(!driver.is_high(), "all is consumed");
    driver.submit(1, FLUSH);
    driver.submit(1, FLUSH);
    for _ in 0..2 {
        driver.until("an entry", |driver| driver.peek(1).is_some());
    }
    driver.until("the pin", |driver| driver.is_high());
    driver.ring_head(1, 1);
    assert!(driver.is_high(), "one is left");
    driver.write(0x0c, 1);
    assert!(!driver.is_high(), "masked");
    driver.write(0x10, 1);
    assert!(driver.is_high());
    driver.ring_head(1, 2);
    assert!(!driver.is_high(), "at once, not when the worker gets to it");
    driver.submit(1, FLUSH);
    driver.until("the pin", |driver| driver.is_high());
    driver.disable();
    assert!(!driver.is_high());
    driver.check_it_serves();
}

#[test]
fn a_disabled_controller_forgets_its_queues_and_starts_again() {
    let mut driver = Driver::new();
    for _ in 0..20 {
        assert_eq!(driver.io(FLUSH), status::SUCCESS);
        driver.put(1, FLUSH);
        let before = driver.bytes(QUEUES_AT, 0x6_0000);
        driver.write(CC, CC_SIZES);
        assert_eq!(driver.read(CSTS), 0);
        driver.ring_tail(1, 2);
        driver.ring_tail(0, 5);
        assert_eq!(driver.bytes(QUEUES_AT, 0x6_0000), before);
        driver.enable();
        driver.create(1, 16, 0);
    }
    driver.root.reset();
    assign::assign(&mut driver.root);
    driver.view = driver.mmio.view();
    assert_eq!((driver.read(CC), driver.read(CSTS), driver.read(AQA)), (0, 0, 0), "the machine's reset");
    driver.check_it_serves();
}

#[test]
fn a_shutdown_flushes_and_then_serves_nothing() {
    for how in [1u64, 2] {
        let mut driver = Driver::new();
        assert_eq!(driver.io(transfer(WRITE, 0, 1, DATA, 0)), status::SUCCESS);
        driver.disk.done();
        driver.write(CC, CC_SIZES | how << 14 | 1);
        driver.csts(0xf, 0x9);
        assert_eq!(driver.disk.done(), ["flush"]);
        driver.submit(1, FLUSH);
        driver.submit(0, EVENT_REQUEST);
        driver.io.hold();
        driver.io.release();
        driver.write(CC, CC_SIZES | 1);
        assert_eq!((driver.peek(1), driver.read(CSTS)), (None, 0x9), "only a reset brings it back");
        driver.check_it_serves();
        driver.disk.done();
    }
    let mut driver = Driver::new();
    driver.disk.set(|state| state.full = true);
    driver.write(CC, CC_SIZES | 1 << 14 | 1);
    driver.reports.recv_timeout(DEADLINE).unwrap();
    assert_eq!(driver.read(CSTS), 0x5, "it waits for the host");
    driver.io.hold();
    driver.disk.set(|state| state.full = false);
    driver.io.release();
    driver.csts(0xf, 0x9);
    let mut driver = Driver::cold(Gate::new(false));
    driver.write(CC, 1 << 14);
    assert_eq!(driver.read(CSTS), 0x8, "there is nothing to do");
    driver.check_it_serves();
}
