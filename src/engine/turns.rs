//! Threads of devices in a fuzzer: none runs by itself. Each has its turns when the fuzzer says so, and the clock stands still in
//! between, so that the same input does the same every time.

use std::cell::{Cell, RefCell};

type Turn = Box<dyn FnMut()>;

thread_local! {
    static TURNS: RefCell<Vec<Turn>> = const { RefCell::new(Vec::new()) };
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
}

/// One more thread. Its turn does what there is to do and returns where the thread would sleep.
pub(crate) fn add(turn: impl FnMut() + 'static) {
    TURNS.with_borrow_mut(|turns| turns.push(Box::new(turn)));
}

/// Gives each thread a turn.
pub(crate) fn take_all() {
    TURNS.with_borrow_mut(|turns| turns.iter_mut().for_each(|turn| turn()));
}

/// All threads end.
pub(crate) fn end() {
    TURNS.take();
}

/// What every clock shows, in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    NOW_NS.get()
}

pub(crate) fn set_now_ns(now: u64) {
    NOW_NS.set(now);
}
