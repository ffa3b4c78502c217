//! Drivers that do what no driver should, and resets, pauses and registers that change at the worst moment.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const FATAL: u32 = 2;

#[test]
fn admin_queues_that_cannot_be_are_fatal_until_a_reset() {
    let mut driver = Driver::cold(Gate::new(false));
    let good = QUEUES_AT;
    for (aqa, asq, acq, cc) in [
        (0x000f_000f, 0xa_0000, good, 1),
        (0x000f_000f, good, 0xb_f000, 1),
        (0x000f_000f, RAM_BYTES, good, 1),
        (0x000f_000f, good, u64::MAX, 1),
        (0x000f_000f, u64::MAX << 12, good, 1),
        (0x0fff_0fff, RAM_BYTES - 0x2_0000, good, 1),
        (0x000f_0000, good, good + 0x1_0000, 1),
        (0x0000_000f, good, good + 0x1_0000, 1),
        (0x000f_000f, good, good + 0x1_0000, 1 << 4 | 1),
        (0x000f_000f, good, good + 0x1_0000, 1 << 7 | 1),
        (0x000f_000f, good, good + 0x1_0000, 1 << 11 | 1),
    ] {
        driver.write(AQA, aqa);
        driver.view.write(driver.bar + ASQ, Width::B8, asq);
        driver.view.write(driver.bar + ACQ, Width::B8, acq);
        driver.write(CC, cc | CC_SIZES);
        assert_eq!(driver.read(CSTS), FATAL, "{aqa:#x} {asq:#x} {acq:#x} {cc:#x}");
        driver.ring_tail(0, 1);
        driver.write(CC, cc | CC_SIZES | 1 << 14);
        assert_eq!(driver.read(CSTS), FATAL | 8, "a shutdown has nothing to do");
        driver.write(CC, CC_SIZES);
        assert_eq!(driver.read(CSTS), 0);
    }
    driver.check_it_serves();
}

#[test]
fn queues_at_the_edge_of_ram_work() {
    let mut driver = Driver::cold(Gate::new(false));
    let pair = Pair { submission: RAM_BYTES - 0x4_0000, completion: 0x9_f000, ..Pair::new(0, 256) };
    driver.write(AQA, 0x00ff_00ff);
    driver.view.write(driver.bar + ASQ, Width::B8, pair.submission);
    driver.view.write(driver.bar + ACQ, Width::B8, pair.completion);
    driver.write(CC, CC_SIZES | 1);
    assert_eq!(driver.read(CSTS), 1);
    driver.pairs.insert(0, pair);
    for _ in 0..300 {
        assert_eq!(driver.get_feature(7, 0).result, 0x0007_0007);
    }
}

#[test]
fn doorbells_out_of_range_are_ignored() {
    let mut driver = Driver::new();
    for value in [16, 17, 0xffff, 0x1_0001, 0xffff_ffff] {
        driver.ring_tail(1, value);
        driver.ring_head(1, value);
        driver.ring_tail(0, value);
        driver.ring_head(0, value);
        assert_eq!(driver.io(FLUSH), status::SUCCESS);
    }
    for index in 18..3072u64 {
        driver.write(0x1000 + 4 * index, 1);
    }
    for queue in 2..=8 {
        driver.ring_tail(queue, 1);
        driver.ring_head(queue, 1);
    }
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    // Entries that were never posted cannot be consumed; what was told before stays.
    let head = driver.pairs[&1].head;
    driver.ring_head(1, head + 3);
    for _ in 0..3 {
        driver.submit(1, FLUSH);
    }
    for _ in 0..3 {
        driver.until("an entry", |driver| driver.peek(1).is_some());
    }
    driver.check_it_serves();
}

#[test]
fn a_head_that_is_ahead_is_told_once_and_costs_nothing() {
    let mut driver = Driver::new();
    let event = driver.submit(0, Cmd { opcode: 12, ..Cmd::default() });
    driver.ring_head(1, 9);
    driver.submit(1, FLUSH);
    driver.until("an entry", |driver| driver.peek(1).is_some());
    let told = driver.reap(0);
    assert_eq!((told.id, told.result), (event, 0x01_0100));
    let count = |driver: &mut Driver| number::<8>(&driver.log_page(1, 64), 0);
    let first = count(&mut driver);
    for _ in 0..10 {
        driver.submit(1, FLUSH);
        driver.until("an entry", |driver| driver.peek(1).is_some());
    }
    assert_eq!(count(&mut driver), first);
}

#[test]
fn a_full_completion_queue_holds_commands_back() {
    let mut driver = Driver::new();
    driver.create(2, 4, 0);
    let pair = driver.fresh_pair(3, 16);
    let words = [15 << 16 | 3, 2 << 16 | 1, 0, 0, 0, 0];
    assert_eq!(driver.admin(Cmd { opcode: 1, prp1: pair.submission, words, ..Cmd::default() }).status, status::SUCCESS);
    driver.disk.done();
    for block in 0..12 {
        driver.submit(3, transfer(READ, block, 1, DATA, 0));
    }
    for _ in 0..3 {
        driver.until("an entry", |driver| driver.peek(2).is_some());
    }
    assert_eq!(driver.io(FLUSH), status::SUCCESS, "other queues go on");
    assert_eq!(driver.peek(2), None);
    assert_eq!(driver.disk.done().len(), 4, "the fourth read was not begun");
    driver.ring_head(2, driver.pairs[&2].head);
    for _ in 3..12 {
        assert_eq!(driver.reap(2).status, status::SUCCESS);
    }
    // The admin queue too: event requests need no entry until they end.
    driver.enable_with(3);
    driver.csts(3, 1);
    for _ in 0..2 {
        driver.submit(0, Cmd { opcode: 12, ..Cmd::default() });
    }
    driver.ring_tail(7, 1);
    driver.until("the event", |driver| driver.peek(0).is_some());
    driver.submit(0, Cmd { opcode: 0x7f, ..Cmd::default() });
    driver.until("an answer", |driver| driver.peek(0).is_some());
    driver.submit(0, Cmd { opcode: 0x7f, ..Cmd::default() });
    driver.io.hold();
    driver.io.release();
    assert_eq!(driver.peek(0), None, "there is no room");
    driver.ring_head(0, driver.pairs[&0].head);
    assert_eq!(driver.reap(0).status, status::INVALID_OPCODE);
}

#[test]
fn lists_that_point_at_themselves_end() {
    let mut driver = Driver::new();
    // Every entry is the list's own page, and so is where it would go on.
    driver.list(LISTS, &[LISTS; 512]);
    for opcode in [READ, WRITE] {
        for slot in [0, 1, 256, 500, 511] {
            driver.submit(1, transfer(opcode, 0, 2048, LISTS, LISTS + 8 * slot));
            driver.reap(1);
        }
        driver.list(LISTS, &[LISTS; 512]);
    }
    assert_eq!(driver.io(transfer(READ, 0, 2048, LISTS, u64::MAX - 7)), status::DATA_TRANSFER);
    // Data over the queues themselves.
    let pair = driver.pairs[&1];
    driver.submit(1, transfer(READ, 0, 8, pair.submission, 0));
    driver.reap(1);
    driver.check_it_serves();
}

#[test]
fn commands_change_under_the_controller() {
    let mut driver = Driver::new();
    let over = Arc::new(AtomicBool::new(false));
    let (ram, stop, pair) = (driver.ram.clone(), Arc::clone(&over), driver.pairs[&1]);
    let scribble = thread::spawn(move || {
        let mut seed = 0x1234_5678_9abc_def1u64;
        while !stop.load(Ordering::Acquire) {
            let at = pair.submission + ((random(&mut seed) % 1024) & !7);
            ram.write(Gpa(at), &random(&mut seed).to_le_bytes()).unwrap();
            ram.write(Gpa(LISTS + ((random(&mut seed) % 4096) & !7)), &random(&mut seed).to_le_bytes()).unwrap();
        }
    });
    for round in 0..2000u32 {
        driver.put(1, transfer(READ, 0, 2048, DATA, LISTS));
        driver.ring_tail(1, round % 16);
        driver.ring_head(1, round * 7 % 16);
    }
    over.store(true, Ordering::Release);
    scribble.join().unwrap();
    driver.check_it_serves();
}

#[test]
fn a_reset_waits_for_the_command_and_nothing_is_written_after_it() {
    let mut driver = Driver::new();
    driver.disk.set(|state| state.shut = true);
    for _ in 0..4 {
        driver.submit(1, transfer(READ, 0, 1, DATA, 0));
    }
    driver.disk.held();
    let (mut view, bar) = (driver.mmio.view(), driver.bar);
    let reset = thread::spawn(move || view.write(bar + CC, Width::B4, CC_SIZES));
    driver.until("the reset asks", |driver| driver.io.0.is_stopping());
    assert!(!reset.is_finished(), "it waits for the command");
    driver.disk.set(|state| state.shut = false);
    reset.join().unwrap();
    assert_eq!(driver.disk.done(), ["read 512 at 0"]);
    let size = 0x8_0000;
    driver.fill(QUEUES_AT, &vec![0x5a; size]);
    driver.fill(DATA, &[0x5a; 4096]);
    driver.ring_tail(1, 3);
    driver.io.hold();
    driver.io.release();
    assert!(driver.bytes(QUEUES_AT, size).iter().chain(&driver.bytes(DATA, 4096)).all(|byte| *byte == 0x5a));
    driver.check_it_serves();
}

#[test]
fn a_driver_that_never_stops_asking_cannot_hold_up_a_reset_or_a_pause() {
    let mut driver = Driver::new();
    let over = Arc::new(AtomicBool::new(false));
    let (mut view, bar, stop) = (driver.mmio.view(), driver.bar, Arc::clone(&over));
    for _ in 0..16 {
        driver.put(1, FLUSH);
    }
    let flood = thread::spawn(move || {
        let mut at = 0u64;
        while !stop.load(Ordering::Acquire) {
            at += 1;
            view.write(bar + 0x1008, Width::B4, at % 16);
            view.write(bar + 0x100c, Width::B4, at % 16);
            view.write(bar + 0x1010, Width::B4, at % 16);
        }
    });
    for _ in 0..50 {
        driver.io.hold();
        driver.io.release();
        driver.write(CC, CC_SIZES);
        driver.enable();
        driver.create(1, 16, 0);
    }
    over.store(true, Ordering::Release);
    flood.join().unwrap();
    driver.check_it_serves();
}

#[test]
fn queues_come_and_go_while_another_processor_rings_them() {
    let mut driver = Driver::new();
    let over = Arc::new(AtomicBool::new(false));
    let (mut view, bar, stop) = (driver.mmio.view(), driver.bar, Arc::clone(&over));
    let ringer = thread::spawn(move || {
        let mut seed = 7u64;
        while !stop.load(Ordering::Acquire) {
            view.write(bar + 0x1010 + 4 * (random(&mut seed) & 1), Width::B4, random(&mut seed) % 1024);
        }
    });
    for round in 0..200u32 {
        let words = [if round & 1 == 0 { 1023 } else { 3 } << 16 | 2, 1, 0, 0, 0, 0];
        let pair = Pair::new(2, 16);
        driver.admin(Cmd { opcode: 5, prp1: pair.completion, words, ..Cmd::default() });
        let words = [words[0], 2 << 16 | 1, 0, 0, 0, 0];
        driver.admin(Cmd { opcode: 1, prp1: pair.submission, words, ..Cmd::default() });
        driver.admin(Cmd { opcode: 0, words: [2, 0, 0, 0, 0, 0], ..Cmd::default() });
        driver.admin(Cmd { opcode: 4, words: [2, 0, 0, 0, 0, 0], ..Cmd::default() });
    }
    over.store(true, Ordering::Release);
    ringer.join().unwrap();
    driver.check_it_serves();
}

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn random_accesses_never_stop_it() {
    let mut driver = Driver::new();
    let mut seed = 0x0bad_cafe_dead_beefu64;
    for _ in 0..60_000 {
        let value = match random(&mut seed) % 4 {
            0 => random(&mut seed),
            1 => random(&mut seed) % 64,
            2 => QUEUES_AT + random(&mut seed) % 16 * PAGE,
            _ => CC_SIZES | random(&mut seed) & 0xc001,
        };
        let offset = match random(&mut seed) % 8 {
            0..=1 => random(&mut seed) % 0x40,
            2..=5 => 0x1000 + random(&mut seed) % 0x50,
            6 => random(&mut seed) % 0x3ff8,
            _ => 0x14,
        };
        let width = [Width::B1, Width::B2, Width::B4, Width::B4, Width::B4, Width::B8][random(&mut seed) as usize % 6];
        let offset = if random(&mut seed).is_multiple_of(8) { offset } else { offset & !(width.bytes() as u64 - 1) };
        let at = driver.bar + offset;
        if random(&mut seed) & 3 == 0 {
            driver.view.read(at, width);
        } else {
            driver.view.write(at, width, value);
        }
    }
    driver.check_it_serves();
}

#[test]
fn random_commands_never_stop_it() {
    let mut driver = Driver::new();
    let mut seed = 0x5eed_5eed_5eed_5eedu64;
    let addresses =
        [0, DATA, DATA + 1, DATA + 0x200, LISTS, LISTS + 0xff8, 0xa_0000, RAM_BYTES, RAM_BYTES - 512, u64::MAX];
    let some = |seed: &mut u64| addresses[random(seed) as usize % addresses.len()];
    for round in 0..20_000u32 {
        let pages: Vec<u64> = (0..4).map(|_| some(&mut seed) & !0xfff).collect();
        driver.list(LISTS + 8 * (random(&mut seed) % 508), &pages);
        let mut words = [0; 6];
        for word in &mut words {
            *word = match random(&mut seed) % 4 {
                0 => random(&mut seed) as u32,
                1 => 0,
                2 => random(&mut seed) as u32 % 16,
                _ => ((random(&mut seed) as u32 % 2048) << 16) | (random(&mut seed) as u32 % 10),
            };
        }
        let cmd = Cmd {
            opcode: random(&mut seed) as u8 % if random(&mut seed) & 7 == 0 { 255 } else { 16 },
            flags: if random(&mut seed).is_multiple_of(8) { random(&mut seed) as u8 } else { 0 },
            nsid: if random(&mut seed).is_multiple_of(8) { random(&mut seed) as u32 } else { 1 },
            prp1: some(&mut seed),
            prp2: some(&mut seed),
            words,
        };
        let queue = (random(&mut seed) & 1) as u16;
        driver.submit(queue, cmd);
        for queue in [0, 1] {
            driver.peek(queue);
            driver.ring_head(queue, driver.pairs[&queue].head);
        }
        if round % 2000 == 1999 {
            driver.check_it_serves();
        }
    }
    driver.check_it_serves();
}
