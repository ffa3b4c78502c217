//! A controller that is suspended in the middle of its work, and another that goes on with it.

use super::{
    super::super::saved::{SaveState, State, testing},
    *,
};

const TEMPERATURE: u32 = 4;
const EVENT_REQUEST: Cmd = Cmd { opcode: 0xc, flags: 0, nsid: 0, prp1: 0, prp2: 0, words: [0; 6] };

/// Pauses the controller, for ever.
fn suspend(driver: &Driver) -> State {
    driver.io.hold();
    driver.function.lock().unwrap().save()
}

/// A controller that has taken the state on, still paused, with the driver of before. `use_msix` as PCI had it.
fn restored(old: Driver, state: &State, use_msix: bool) -> Driver {
    let Driver { ram, disk, pairs, next_id, .. } = old;
    let mut driver = Driver::with_ram(ram, disk);
    if use_msix {
        driver.use_msix();
    }
    driver.io.hold();
    driver.function.lock().unwrap().restore(state).unwrap();
    (driver.pairs, driver.next_id) = (pairs, next_id);
    driver
}

/// Three writes of which the first waits for the host, behind a queue that has turned several times; an event request and an
/// error that are kept; a completion that nobody has looked at.
fn in_the_middle() -> Driver {
    let mut driver = Driver::new();
    driver.create(2, 4, 0);
    driver.write(INTMS, 0x10);
    for block in 0..21 {
        assert_eq!(driver.io(transfer(WRITE, block, 1, DATA, 0)), status::SUCCESS);
    }
    assert_eq!(driver.io(transfer(READ, u64::MAX, 1, DATA, 0)), status::LBA_RANGE);
    driver.submit(0, EVENT_REQUEST);
    assert_eq!(driver.set_feature(TEMPERATURE, 400).status, status::SUCCESS);
    driver.submit(2, FLUSH);
    driver.until("it is done", |driver| driver.is_high());
    driver.disk.done();
    driver.disk.set(|state| state.full = true);
    for block in 0..3u8 {
        let at = DATA + u64::from(block) * PAGE;
        driver.fill(at, &[1 + block; 512]);
        driver.submit(1, transfer(WRITE, block.into(), 1, at, 0));
        if block == 0 {
            driver.reports.recv_timeout(DEADLINE).unwrap();
        }
    }
    driver
}

const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;

#[test]
fn the_state_is_what_it_always_was() {
    let driver = in_the_middle();
    let state = suspend(&driver);
    let golden = testing::matches_golden(&state);
    let again = restored(driver, &golden, false);
    assert_eq!(suspend(&again), state);
}

#[test]
fn commands_go_on_where_they_stopped_and_no_event_is_lost() {
    let mut driver = in_the_middle();
    driver.write(INTMS, 1);
    let state = suspend(&driver);
    let (registers, event) = ([CC, CSTS, AQA, INTMS, ASQ, ACQ].map(|at| driver.read(at)), 0x101 + 4 + 22);
    let mut driver = restored(driver, &state, false);
    assert_eq!([CC, CSTS, AQA, INTMS, ASQ, ACQ].map(|at| driver.read(at)), registers);
    assert!(!driver.is_high(), "interrupts are masked");
    driver.write(INTMC, 1);
    assert!(driver.is_high(), "the flush is not yet seen");
    assert_eq!(driver.reap(2).status, status::SUCCESS);
    assert!(!driver.is_high());

    driver.disk.set(|state| state.full = false);
    thread::sleep(Duration::from_millis(20));
    assert_eq!((driver.disk.done().len(), driver.peek(1)), (0, None), "nothing before the guest goes on");
    driver.io.release();
    for _ in 0..3 {
        assert_eq!(driver.reap(1).status, status::SUCCESS);
    }
    assert_eq!(driver.disk.done(), ["write 512 at 0", "write 512 at 512", "write 512 at 1024"]);
    assert_eq!([0, 512, 1024].map(|at| driver.disk.stored(at, 1)[0]), [1, 2, 3]);
    assert_eq!(driver.get_feature(TEMPERATURE, 0).result, 400);
    // 24 writes and no read; one error, of queue 1.
    let health = driver.log_page(2, 512);
    assert_eq!((number::<8>(&health, 64), number::<8>(&health, 80), number::<8>(&health, 176)), (0, 24, 1));
    assert_eq!(number::<2>(&driver.log_page(1, 64), 8), 1);
    for _ in 0..9 {
        assert_eq!(driver.run(2, FLUSH).status, status::SUCCESS);
    }
    driver.ring_tail(5, 1);
    let done = driver.reap(0);
    assert_eq!((done.id, done.result), (event, 0x01_00_00), "a doorbell of no queue");
}

#[test]
fn nothing_waits_for_the_pin_under_msix_and_messages_are_not_sent_again() {
    let mut driver = Driver::cold(Gate::new(false));
    driver.use_msix();
    driver.enable();
    driver.create(1, 16, 3);
    driver.submit(1, FLUSH);
    driver.until("a message", |driver| driver.sent().contains(&0x43));
    let state = suspend(&driver);
    let mut driver = restored(driver, &state, true);
    driver.io.release();
    assert!(!driver.is_high());
    assert_eq!(driver.reap(1).status, status::SUCCESS);
    driver.io.hold();
    assert_eq!(driver.sent(), [0; 0]);
    driver.io.release();
    assert_eq!(driver.io(FLUSH), status::SUCCESS);
    assert_eq!(driver.sent(), [0x43]);
}

#[test]
fn a_full_completion_queue_has_room_when_the_driver_makes_some() {
    let mut driver = Driver::new();
    driver.create(2, 4, 0);
    for _ in 0..3 {
        driver.submit(2, FLUSH);
    }
    driver.until("three are done", |driver| driver.disk.state.lock().unwrap().done.len() == 3);
    let pair = driver.pairs[&2];
    driver.put(2, FLUSH);
    driver.ring_tail(2, (pair.tail + 1) % 4);
    let state = suspend(&driver);
    let mut driver = restored(driver, &state, false);
    driver.io.release();
    for _ in 0..4 {
        assert_eq!(driver.reap(2).status, status::SUCCESS);
    }
    assert_eq!(driver.run(2, FLUSH).status, status::SUCCESS);
}

#[test]
fn a_shutdown_that_waits_for_the_host_is_finished() {
    let mut driver = Driver::new();
    driver.disk.set(|state| state.full = true);
    driver.write(CC, CC_SIZES | 1 << 14 | 1);
    driver.reports.recv_timeout(DEADLINE).unwrap();
    let state = suspend(&driver);
    let mut driver = restored(driver, &state, false);
    assert_eq!(driver.read(CSTS), 0x5);
    driver.disk.set(|state| state.full = false);
    driver.io.release();
    driver.csts(0xf, 0x9);
    assert_eq!(driver.disk.done(), ["flush"]);
    let state = suspend(&driver);
    let mut driver = restored(driver, &state, false);
    driver.io.release();
    assert_eq!(driver.read(CSTS), 0x9);
    driver.check_it_serves();
}

#[test]
fn controllers_that_do_not_work_stay_so_until_a_reset() {
    let mut driver = Driver::cold(Gate::new(false));
    driver.write(AQA, 0x000f_000f);
    let mut driver = restored_as_it_is(driver);
    assert_eq!((driver.read(CSTS), driver.read(AQA)), (0, 0x000f_000f));
    driver.write(ASQ, RAM_BYTES);
    driver.write(CC, CC_SIZES | 1);
    let mut driver = restored_as_it_is(driver);
    assert_eq!(driver.read(CSTS), 2);
    driver.check_it_serves();
}

fn restored_as_it_is(driver: Driver) -> Driver {
    let state = suspend(&driver);
    let driver = restored(driver, &state, false);
    driver.io.release();
    driver
}

/// One controller for all of them, since its thread ends only with the process. A reset makes it as it is after power on.
#[test]
fn spoilt_states_are_refused_or_as_harmless_as_a_driver() {
    let old = in_the_middle();
    let state = suspend(&old);
    let Driver { ram, disk, pairs, .. } = old;
    let mut driver = Driver::with_ram(ram, disk);
    let (mut taken, mut refused) = (0, 0);
    testing::spoil(&state, |bad| {
        driver.io.hold();
        let restored = driver.function.lock().unwrap().restore(bad);
        if restored.is_ok() {
            taken += 1;
            driver.disk.set(|state| state.full = false);
            driver.io.release();
            driver.pairs = pairs.clone();
            for queue in 0..9 {
                driver.ring_tail(queue, 1);
                driver.ring_head(queue, 1);
            }
            driver.submit(1, transfer(READ, 0, 1, DATA, 0));
            driver.write(INTMS, 1);
            driver.write(INTMC, u64::MAX);
            driver.io.hold();
            driver.io.release();
            driver.check_it_serves();
        } else {
            refused += 1;
        }
        driver.function.lock().unwrap().reset();
        driver.io.release();
    });
    assert!(taken > 100 && refused > 500, "{taken} taken, {refused} refused");
    driver.check_it_serves();
}
