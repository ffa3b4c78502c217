//! Reads, writes and what else the NVM command set has.

use super::*;

const WRITE_ZEROES: u8 = 8;
const DATASET_MANAGEMENT: u8 = 9;
const FUA: u32 = 1 << 30;

/// Bytes that tell where they are from.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at ^ at >> 8 ^ at >> 16) as u8 | 1).collect()
}

/// Where data is: PRP1, PRP2, the lists, and the pieces as the driver sees them.
struct Shape {
    prp1: u64,
    prp2: u64,
    lists: Vec<(u64, Vec<u64>)>,
    pieces: Vec<(u64, usize)>,
}

/// Scattered pages in falling order, so that none are neighbours; the first piece starts at `offset` in its page, and the list
/// at `list_slot` in its own.
fn shape(bytes: usize, offset: u64, list_slot: u64) -> Shape {
    let prp1 = DATA + 0x50_0000 + offset;
    let mut pieces = vec![(prp1, bytes.min((PAGE - offset) as usize))];
    let mut rest = bytes - pieces[0].1;
    let mut page = DATA + 0x4f_0000;
    let mut pages = Vec::new();
    while rest > 0 {
        pages.push(page);
        pieces.push((page, rest.min(PAGE as usize)));
        rest -= rest.min(PAGE as usize);
        page -= 2 * PAGE;
    }
    if pages.len() < 2 {
        return Shape { prp1, prp2: pages.first().copied().unwrap_or(0), lists: Vec::new(), pieces };
    }
    let prp2 = LISTS + 8 * list_slot;
    let (mut at, mut lists, mut left) = (prp2, Vec::new(), pages.as_slice());
    let mut next_page = LISTS + 3 * PAGE;
    loop {
        let slots = ((PAGE - at % PAGE) / 8) as usize;
        if left.len() <= slots {
            lists.push((at, left.to_vec()));
            return Shape { prp1, prp2, lists, pieces };
        }
        let (mine, more) = left.split_at(slots - 1);
        lists.push((at, [mine, &[next_page]].concat()));
        (at, left) = (next_page, more);
        next_page += PAGE;
    }
}

#[test]
fn data_goes_through_prps_of_every_shape() {
    let mut driver = Driver::new();
    for (blocks, offset, list_slot) in [
        (1, 0, 0),
        (1, 4, 0),
        (1, 4092, 0),
        (8, 0, 0),
        (8, 512, 0),
        (16, 0, 0),
        (9, 3584, 0),
        (16, 4, 0),
        (17, 0, 0),
        (24, 100, 5),
        (64, 0, 510),
        (64, 0, 511),
        (64, 4092, 504),
        (2048, 0, 0),
        (2048, 4092, 0),
        (2048, 2048, 300),
        (2047, 8, 511),
    ] {
        let bytes = blocks as usize * 512;
        let shape = shape(bytes, offset, list_slot);
        shape.lists.iter().for_each(|(at, pages)| driver.list(*at, pages));
        let data = pattern(bytes);
        let mut rest = data.as_slice();
        for (at, count) in &shape.pieces {
            let (part, more) = rest.split_at(*count);
            driver.fill(*at, part);
            rest = more;
        }
        let case = format!("{blocks} blocks from {offset}, list at {list_slot}");
        driver.disk.store(0, &vec![0; DISK_BYTES as usize]);
        assert_eq!(driver.io(transfer(WRITE, 3, blocks, shape.prp1, shape.prp2)), status::SUCCESS, "{case}");
        assert!(driver.disk.stored(1536, bytes) == data, "{case}");
        assert!(driver.disk.stored(1536 + bytes as u64, 512) == [0; 512], "{case}");
        for (at, count) in &shape.pieces {
            driver.fill(*at, &vec![0xcc; *count]);
        }
        let (first, last) = (shape.pieces[0], shape.pieces[shape.pieces.len() - 1]);
        driver.fill(first.0 - 4, &[0xcc; 4]);
        driver.fill(last.0 + last.1 as u64, &[0xcc; 4]);
        assert_eq!(driver.io(transfer(READ, 3, blocks, shape.prp1, shape.prp2)), status::SUCCESS, "{case}");
        let seen: Vec<u8> = shape.pieces.iter().flat_map(|(at, count)| driver.bytes(*at, *count)).collect();
        assert!(seen == data, "{case}");
        assert_eq!(driver.bytes(first.0 - 4, 4), [0xcc; 4], "{case}: nothing before");
        assert_eq!(driver.bytes(last.0 + last.1 as u64, 4), [0xcc; 4], "{case}: nothing behind");
    }
}

#[test]
fn prps_that_are_not_aligned_or_not_ram_are_refused() {
    let mut driver = Driver::new();
    let disk_before = driver.disk.stored(0, 4096);
    driver.fill(DATA, &[7; 8192]);
    for opcode in [READ, WRITE] {
        for (blocks, prp1, prp2, expected) in [
            (1, DATA + 1, 0, status::PRP_OFFSET),
            (1, DATA + 2, 0, status::PRP_OFFSET),
            (16, DATA, DATA + 512, status::PRP_OFFSET),
            (16, DATA, DATA + 1, status::PRP_OFFSET),
            (32, DATA, LISTS + 4, status::PRP_OFFSET),
            (32, DATA, 0xa_0000, status::DATA_TRANSFER),
            (32, DATA, u64::MAX - 7, status::DATA_TRANSFER),
            (1, 0xa_0000, 0, status::DATA_TRANSFER),
            (1, 0x9_ff00, 0xa_0000, status::DATA_TRANSFER),
            (1, RAM_BYTES, 0, status::DATA_TRANSFER),
            (1, u64::MAX - 3, 0, status::DATA_TRANSFER),
            (1, u64::MAX - 511, 0, status::DATA_TRANSFER),
            (16, u64::MAX - 4095, 0, status::DATA_TRANSFER),
            (16, DATA, 1 << 63, status::DATA_TRANSFER),
        ] {
            assert_eq!(driver.io(transfer(opcode, 0, blocks, prp1, prp2)), expected, "{prp1:#x} {prp2:#x}");
        }
        driver.list(LISTS, &[DATA + 0x1000, DATA + 0x2200, DATA + 0x3000]);
        assert_eq!(driver.io(transfer(opcode, 0, 32, DATA, LISTS)), status::PRP_OFFSET, "an entry of the list");
        driver.list(LISTS, &[DATA + 0x1000, 0xa_0000, DATA + 0x3000]);
        assert_eq!(driver.io(transfer(opcode, 0, 32, DATA, LISTS)), status::DATA_TRANSFER);
        driver.list(LISTS + 4088, &[LISTS + 8]);
        assert_eq!(
            driver.io(transfer(opcode, 0, 32, DATA, LISTS + 4088)),
            status::PRP_OFFSET,
            "where the list goes on"
        );
    }
    assert_eq!(driver.disk.stored(0, 4096), disk_before);
    assert!(driver.disk.done().is_empty() && driver.reports.try_recv().is_err());
}

#[test]
fn the_guests_mistakes_have_their_status_and_change_nothing() {
    let mut driver = Driver::new();
    let sectors = DISK_BYTES / 512;
    for opcode in [READ, WRITE, WRITE_ZEROES] {
        for (start, blocks) in
            [(sectors, 1), (sectors - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (1 << 55, 1), (1 << 63, 8)]
        {
            assert_eq!(driver.io(transfer(opcode, start, blocks, DATA, 0)), status::LBA_RANGE, "{opcode} {start}");
        }
        for nsid in [0, 2, ALL] {
            let cmd = Cmd { nsid, ..transfer(opcode, 0, 1, DATA, 0) };
            assert_eq!(driver.io(cmd), status::INVALID_NAMESPACE, "{opcode} {nsid}");
        }
        for flags in [1, 2, 3, 0x40, 0x80, 0xc0] {
            let cmd = Cmd { flags, ..transfer(opcode, 0, 1, DATA, 0) };
            assert_eq!(driver.io(cmd), status::INVALID_FIELD, "{opcode} {flags:#x}");
        }
    }
    for blocks in [2049, 65536] {
        assert_eq!(driver.io(transfer(READ, 0, blocks, DATA, LISTS)), status::INVALID_FIELD, "longer than MDTS");
    }
    for opcode in [3, 4, 5, 7, 0x0d, 0x80, 0xff] {
        assert_eq!(driver.io(Cmd { opcode, nsid: 1, ..Cmd::default() }), status::INVALID_OPCODE, "{opcode:#x}");
    }
    assert_eq!(driver.io(Cmd { nsid: 2, ..FLUSH }), status::INVALID_NAMESPACE);
    assert!(driver.disk.done().is_empty(), "nothing reached the disk");
    assert_eq!(number::<8>(&driver.log_page(1, 64), 0) as usize, 3 * 15 + 2 + 7 + 1, "each is in the error log");
}

#[test]
fn flush_and_forced_writes_reach_the_disk() {
    let mut driver = Driver::new();
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    assert_eq!(driver.io(Cmd { nsid: ALL, ..FLUSH }), status::SUCCESS);
    let write = transfer(WRITE, 1, 1, DATA, 0);
    let mut forced = write;
    forced.words[2] |= FUA;
    assert_eq!((driver.io(write), driver.io(forced)), (status::SUCCESS, status::SUCCESS));
    assert_eq!(driver.disk.done(), ["flush", "flush", "write 512 at 512", "write 512 at 512", "flush"]);
    let mut zero = transfer(WRITE_ZEROES, 0, 1, 0, 0);
    zero.words[2] |= FUA;
    assert_eq!(driver.io(zero), status::SUCCESS);
    assert_eq!(driver.disk.done(), ["zero 512 at 0", "flush"]);
    assert_eq!(driver.set_feature(6, 0).status, status::SUCCESS);
    assert_eq!(driver.io(write), status::SUCCESS);
    assert_eq!(driver.disk.done(), ["flush", "write 512 at 512", "flush"], "without the write cache");
    assert_eq!(driver.get_feature(6, 0).result, 0);
    assert_eq!(driver.set_feature(6, 1).status, status::SUCCESS);
    assert_eq!(driver.io(write), status::SUCCESS);
    assert_eq!(driver.disk.done(), ["write 512 at 512"]);
}

#[test]
fn zeroes_are_written_over_more_than_one_transfer() {
    let mut driver = Driver::new();
    driver.disk.store(0, &vec![7; DISK_BYTES as usize]);
    assert_eq!(driver.io(transfer(WRITE_ZEROES, 3, 5000, 0, 0)), status::SUCCESS);
    assert_eq!(driver.disk.done(), ["zero 2560000 at 1536"]);
    let stored = driver.disk.stored(0, DISK_BYTES as usize);
    assert!(stored.iter().enumerate().all(|(at, byte)| (*byte == 0) == (1536..1536 + 2_560_000).contains(&at)));
}

#[test]
fn ranges_are_deallocated_all_or_none() {
    let mut driver = Driver::new();
    driver.disk.store(0, &vec![7; 1 << 20]);
    let sectors = DISK_BYTES / 512;
    let ranges = |list: &[(u32, u64)]| -> Vec<u8> {
        let entry = |(blocks, start): &(u32, u64)| [&[0; 4], &blocks.to_le_bytes()[..], &start.to_le_bytes()].concat();
        list.iter().flat_map(entry).collect()
    };
    let manage = |count: u32, attributes: u32, prp1: u64, prp2: u64| {
        let words = [count - 1, attributes, 0, 0, 0, 0];
        Cmd { opcode: DATASET_MANAGEMENT, nsid: 1, prp1, prp2, words, ..Cmd::default() }
    };
    driver.fill(DATA, &ranges(&[(8, 0), (0, 5), (16, 100)]));
    assert_eq!(driver.io(manage(3, 4, DATA, 0)), status::SUCCESS);
    assert_eq!(driver.disk.done(), ["discard 4096 at 0", "discard 0 at 2560", "discard 8192 at 51200"]);
    assert_eq!(driver.disk.stored(4096, 512), [7; 512]);
    assert_eq!(driver.io(manage(3, 3, DATA, 0)), status::SUCCESS, "only hints");
    for bad in [(1, sectors), (u32::MAX, 0), (8, sectors - 7), (1, u64::MAX), (2, u64::MAX - 1)] {
        driver.fill(DATA, &ranges(&[(8, 0), bad]));
        assert_eq!(driver.io(manage(2, 4, DATA, 0)), status::LBA_RANGE, "{bad:?}");
    }
    assert_eq!(driver.disk.done(), [""; 0]);
    // The most ranges there can be, over two pages.
    driver.fill(DATA + 2048, &ranges(&[(1, 1); 128]));
    driver.fill(DATA + 0x8000, &ranges(&[(1, 2); 128]));
    assert_eq!(driver.io(manage(256, 4, DATA + 2048, DATA + 0x8000)), status::SUCCESS);
    let done = driver.disk.done();
    assert_eq!(
        (done.len(), done[127].as_str(), done[128].as_str()),
        (256, "discard 512 at 512", "discard 512 at 1024")
    );
    assert_eq!(driver.io(manage(256, 4, DATA + 2048, 0xa_0000)), status::DATA_TRANSFER);
    assert_eq!(driver.io(manage(1, 4, DATA + 3, 0)), status::PRP_OFFSET);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut driver = Driver::with(Gate::new(true));
    for opcode in [WRITE, WRITE_ZEROES] {
        assert_eq!(driver.io(transfer(opcode, 0, 1, DATA, 0)), status::WRITE_PROTECTED);
    }
    driver.fill(DATA, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let manage = Cmd { opcode: DATASET_MANAGEMENT, nsid: 1, prp1: DATA, words: [0, 4, 0, 0, 0, 0], ..Cmd::default() };
    assert_eq!(driver.io(manage), status::WRITE_PROTECTED);
    assert_eq!((driver.io(transfer(READ, 0, 1, DATA, 0)), driver.io(FLUSH)), (status::SUCCESS, status::SUCCESS));
    assert!(driver.reports.try_recv().is_err(), "no host fault");
}

#[test]
fn queues_wrap_around_and_the_phase_turns() {
    let mut driver = Driver::new();
    for entries in [2, 3, 4, 7] {
        driver.create(2, entries, 0);
        for round in 0..50u32 {
            let done = driver.run(2, transfer(READ, u64::from(round), 1, DATA, 0));
            assert_eq!((done.status, u32::from(done.head)), (status::SUCCESS, (round + 1) % entries));
        }
        for opcode in [0, 4] {
            let delete = Cmd { opcode, words: [2, 0, 0, 0, 0, 0], ..Cmd::default() };
            assert_eq!(driver.admin(delete).status, status::SUCCESS);
        }
    }
    // Many at once, as many as fit.
    driver.create(2, 1024, 0);
    for _ in 0..3 {
        let ids: Vec<u16> = (0..1023).map(|block| driver.put(2, transfer(READ, block, 1, DATA, 0))).collect();
        driver.ring_tail(2, driver.pairs[&2].tail);
        let done: Vec<u16> = ids.iter().map(|_| driver.reap(2).id).collect();
        assert_eq!(done, ids, "in order");
    }
}

#[test]
fn eight_pairs_of_queues_work_at_once() {
    let mut driver = Driver::new();
    driver.use_msix();
    driver.enable();
    for index in 1..=8 {
        driver.create(index, 16, index.into());
    }
    driver.until("the messages of the admin queue", |driver| driver.sent().len() == 16);
    driver.sent.0.lock().unwrap().clear();
    for index in 1..=8 {
        for block in 0..10 {
            driver.submit(index, transfer(READ, block, 1, DATA + u64::from(index) * PAGE, 0));
        }
    }
    for index in 1..=8 {
        for _ in 0..10 {
            assert_eq!(driver.reap(index).status, status::SUCCESS);
        }
    }
    driver.until("all messages", |driver| driver.sent().len() == 80);
    for index in 1..=8 {
        assert_eq!(driver.sent().iter().filter(|data| **data == 0x40 + index).count(), 10);
    }
}

#[test]
fn queues_may_share_a_completion_queue() {
    let mut driver = Driver::new();
    let words = [15 << 16 | 2, 1 << 16 | 1, 0, 0, 0, 0];
    let pair = driver.fresh_pair(2, 16);
    let create = Cmd { opcode: 1, prp1: pair.submission, words, ..Cmd::default() };
    assert_eq!(driver.admin(create).status, status::SUCCESS);
    let (first, second) = (driver.submit(1, FLUSH), driver.submit(2, FLUSH));
    let mut done = [driver.reap(1), driver.reap(1)].map(|done| (done.queue, done.id, done.head));
    done.sort_unstable();
    assert_eq!(done, [(1, first, 1), (2, second, 1)]);
}

#[test]
fn a_full_host_holds_the_request_and_serves_it_once_when_there_is_space() {
    let mut driver = Driver::new();
    driver.disk.set(|state| state.full = true);
    for block in 0..3u8 {
        let at = DATA + u64::from(block) * PAGE;
        driver.fill(at, &[1 + block; 512]);
        driver.submit(1, transfer(WRITE, block.into(), 1, at, 0));
    }
    let said = driver.reports.recv_timeout(DEADLINE).unwrap();
    assert!(said.contains("space"), "{said}");
    // The machine pauses the guest, and a person resumes it too early once.
    driver.io.hold();
    driver.io.release();
    driver.reports.recv_timeout(DEADLINE).unwrap();
    driver.io.hold();
    assert!(driver.reports.try_recv().is_err(), "one report for each attempt");
    assert_eq!(driver.peek(1), None);
    driver.disk.set(|state| state.full = false);
    assert_eq!(driver.disk.done(), [""; 0], "nothing before the guest goes on");
    driver.io.release();
    for _ in 0..3 {
        assert_eq!(driver.reap(1).status, status::SUCCESS);
    }
    assert_eq!(driver.disk.done(), ["write 512 at 0", "write 512 at 512", "write 512 at 1024"]);
    assert_eq!([0, 512, 1024].map(|at| driver.disk.stored(at, 1)[0]), [1, 2, 3]);
    assert!(driver.reports.try_recv().is_err());
}

#[test]
fn every_write_to_the_disk_waits_for_the_host() {
    let mut driver = Driver::new();
    driver.fill(DATA, &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let manage = Cmd { opcode: DATASET_MANAGEMENT, nsid: 1, prp1: DATA, words: [0, 4, 0, 0, 0, 0], ..Cmd::default() };
    for cmd in [FLUSH, manage, transfer(WRITE_ZEROES, 0, 1, 0, 0), transfer(READ, 0, 1, DATA, 0)] {
        driver.disk.set(|state| state.full = true);
        driver.submit(1, cmd);
        driver.reports.recv_timeout(DEADLINE).unwrap();
        driver.io.hold();
        driver.disk.set(|state| state.full = false);
        driver.io.release();
        assert_eq!((driver.reap(1).status, driver.disk.done().len()), (status::SUCCESS, 1));
    }
    driver.disk.set(|state| state.full = true);
    driver.submit(0, Cmd { opcode: 9, words: [6, 0, 0, 0, 0, 0], ..Cmd::default() });
    driver.reports.recv_timeout(DEADLINE).unwrap();
    driver.disk.set(|state| state.full = false);
    driver.io.hold();
    driver.io.release();
    assert_eq!(driver.reap(0).status, status::SUCCESS, "turning the write cache off flushes it");
}

#[test]
fn a_reset_drops_the_request_that_waits_for_the_host() {
    let mut driver = Driver::new();
    driver.disk.set(|state| state.full = true);
    driver.submit(1, transfer(WRITE, 0, 1, DATA, 0));
    driver.reports.recv_timeout(DEADLINE).unwrap();
    driver.disable();
    driver.check_it_serves();
    assert_eq!(driver.disk.done(), ["write 512 at 3584", "read 512 at 3584"], "the write never came");
}

#[test]
fn nothing_is_served_while_held_and_no_doorbell_is_lost() {
    let mut driver = Driver::new();
    for round in 0..30 {
        driver.io.hold();
        driver.submit(1, transfer(WRITE, round, 1, DATA, 0));
        assert_eq!((driver.disk.done().len(), driver.peek(1)), (0, None));
        driver.io.release();
        assert_eq!(driver.reap(1).status, status::SUCCESS);
        assert_eq!(driver.disk.done().len(), 1);
    }
    driver.io.hold();
    driver.enable();
    driver.submit(0, Cmd { opcode: 0x7f, ..Cmd::default() });
    assert_eq!(driver.peek(0), None, "a driver that starts while the machine is paused waits too");
    driver.io.release();
    assert_eq!(driver.reap(0).status, status::INVALID_OPCODE);
}
