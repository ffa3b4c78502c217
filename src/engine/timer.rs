//! Clocks that tests can hold in their hand, and an alarm thread that sleeps until a device's next deadline.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Reads nanoseconds; where zero is depends on who made it.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// Nanoseconds since this call. Never goes back.
    pub fn monotonic() -> Clock {
        let start = Instant::now();
        Clock(Arc::new(move || saturating_ns(start.elapsed())))
    }

    /// Nanoseconds since 1970-01-01 UTC. Follows the host's clock, so it may step.
    pub fn wall() -> Clock {
        Clock(Arc::new(|| saturating_ns(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())))
    }

    pub fn now_ns(&self) -> u64 {
        #[cfg(fuzzing)]
        return super::turns::now_ns();
        #[cfg(not(fuzzing))]
        (self.0)()
    }
}

fn saturating_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A thread that calls a device at its deadlines and sleeps without limit while there is none.
///
/// Dropping it ends the thread and waits for it.
pub struct Alarm {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

/// Tells an alarm that the deadline may have changed. Cheap; takes no device lock, so a device may ring under its own.
#[derive(Clone)]
pub struct AlarmBell(Arc<Bell>);

#[derive(Default)]
struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    ended: bool,
}

impl AlarmBell {
    /// A bell whose alarm is still to be started with `Alarm::start`.
    #[expect(clippy::new_without_default, reason = "a bell without an alarm is nothing to make by default")]
    pub fn new() -> AlarmBell {
        AlarmBell(Arc::new(Bell::default()))
    }

    pub fn ring(&self) {
        self.0.lock().rung = true;
        self.0.rung.notify_one();
    }
}

impl Bell {
    fn lock(&self) -> std::sync::MutexGuard<'_, BellState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Alarm {
    /// Starts the thread. `work` does what is due and says how many nanoseconds from now the next deadline is, if there is
    /// one; it is called at each deadline and after each ring.
    pub fn start(
        name: &str,
        bell: AlarmBell,
        work: impl FnMut() -> Option<u64> + Send + 'static,
    ) -> std::io::Result<Alarm> {
        let bell = bell.0;
        let thread = Alarm::spawn(name, Arc::clone(&bell), work)?;
        Ok(Alarm { bell, thread })
    }

    #[cfg(not(fuzzing))]
    fn spawn(
        name: &str,
        bell: Arc<Bell>,
        mut work: impl FnMut() -> Option<u64> + Send + 'static,
    ) -> std::io::Result<Option<JoinHandle<()>>> {
        let keep_deadlines = move || {
            let mut wait = None;
            while bell.sleep(wait) {
                wait = work().map(|ns| Duration::from_nanos(ns).max(SHORTEST_WAIT));
            }
        };
        thread::Builder::new().name(name.to_owned()).spawn(keep_deadlines).map(Some)
    }

    #[cfg(fuzzing)]
    fn spawn(
        _: &str,
        _: Arc<Bell>,
        mut work: impl FnMut() -> Option<u64> + Send + 'static,
    ) -> std::io::Result<Option<JoinHandle<()>>> {
        super::turns::add(move || {
            work();
        });
        Ok(None)
    }
}

/// No guest gets more deadlines a second than an RTC can make (8192 Hz).
const SHORTEST_WAIT: Duration = Duration::from_micros(100);

impl Bell {
    /// Waits for a ring or for the time to pass. False when the alarm has ended.
    fn sleep(&self, wait: Option<Duration>) -> bool {
        let state = self.lock();
        let quiet = |state: &mut BellState| !state.rung && !state.ended;
        let mut state = match wait {
            None => self.rung.wait_while(state, quiet).unwrap_or_else(PoisonError::into_inner),
            Some(wait) => self.rung.wait_timeout_while(state, wait, quiet).unwrap_or_else(PoisonError::into_inner).0,
        };
        state.rung = false;
        !state.ended
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.bell.lock().ended = true;
        self.bell.rung.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread was already printed; there is nothing to add.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    };

    use super::*;

    /// A clock that stands still until the test moves it.
    pub(crate) fn hand_clock(start_ns: u64) -> (Clock, Arc<AtomicU64>) {
        let hand = Arc::new(AtomicU64::new(start_ns));
        let read = Arc::clone(&hand);
        (Clock(Arc::new(move || read.load(Ordering::SeqCst))), hand)
    }

    #[test]
    fn an_alarm_sleeps_until_it_is_rung_and_then_keeps_its_deadlines() {
        let (sent, heard) = mpsc::channel();
        let mut calls = 0;
        let bell = AlarmBell::new();
        let alarm = Alarm::start("test", bell.clone(), move || {
            calls += 1;
            sent.send(calls).ok();
            (calls < 3).then_some(1_000)
        })
        .unwrap();
        assert!(heard.recv_timeout(Duration::from_millis(20)).is_err(), "nobody rang");
        bell.ring();
        for call in 1..=3 {
            assert_eq!(heard.recv_timeout(Duration::from_secs(5)), Ok(call));
        }
        assert!(heard.recv_timeout(Duration::from_millis(20)).is_err(), "no deadline is left");
        drop(alarm);
        assert!(heard.recv().is_err(), "the thread is gone");
    }
}
