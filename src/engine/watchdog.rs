//! The watchdog of Intel's 6300ESB, which Linux and others drive (6300ESB data sheet, chapter 15): two stages of a counter that the
//! guest must reload in time. What happens when it does not is decided by who set the guest up.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    bus::{Access, BusFault, Effect, Width},
    pci::{BarKind, BarSpec, CONFIG_BYTES, ConfigByte, PciFunction, PciIdentity},
    saved::{self as states, BadState, SaveState},
    timer::{Alarm, AlarmBell, Clock},
};

const BARS: [BarSpec; 1] = [BarSpec { index: 0, size_bytes: 4096, kind: BarKind::Registers }];

/// Offsets in the memory BAR.
mod register {
    pub(super) const TIMER_1: u64 = 0x00;
    pub(super) const TIMER_2: u64 = 0x04;
    pub(super) const INTERRUPT: u64 = 0x08;
    pub(super) const RELOAD: u64 = 0x0c;
}

/// Offsets in configuration space.
const CONFIG: u8 = 0x60;
const LOCK: u8 = 0x68;

const CONFIG_NO_REBOOT: u8 = 1 << 5;
const CONFIG_FAST: u8 = 1 << 2;
const CONFIG_KEPT: u8 = CONFIG_NO_REBOOT | CONFIG_FAST | 3;
const LOCK_LOCKED: u8 = 1 << 0;
const LOCK_ENABLED: u8 = 1 << 1;
const LOCK_KEPT: u8 = 7;
const RELOAD_NOW: u64 = 1 << 8;
const RELOAD_TIMED_OUT: u64 = 1 << 9;
/// Written one after the other to `RELOAD`, they let one more write through.
const UNLOCK: [u64; 2] = [0x80, 0x86];

const PRELOAD_MASK: u32 = 0xf_ffff;
/// A tick of the counter: 33 MHz by 2^15, or by 2^5.
const TICK_NS: u64 = 992_970;
const FAST_TICK_NS: u64 = 970;

/// The device. Its thread sleeps until the counter runs out.
pub struct Watchdog {
    state: Arc<Mutex<State>>,
    _alarm: Alarm,
}

/// Stops and continues the counter with the machine. Clones are the same one.
#[derive(Clone)]
pub struct WatchdogHold(Arc<Mutex<State>>);

struct State {
    clock: Clock,
    bell: AlarmBell,
    /// Of both stages.
    preload: [u32; 2],
    config: u8,
    lock: u8,
    /// How much of `UNLOCK` was written.
    unlocked: usize,
    counter: Counter,
    /// It has run out since somebody cleared this; a reset does not.
    timed_out: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counter {
    Stopped,
    /// Stage, and when it ends.
    Running(usize, u64),
    /// Stage, and how much of it is left: the machine is paused.
    Held(usize, u64),
}

impl Watchdog {
    /// `bite` is called by the watchdog's thread when the guest was too late.
    ///
    /// Errors: no thread can be started.
    pub fn new(clock: Clock, bite: impl Fn() + Send + 'static) -> io::Result<Watchdog> {
        let bell = AlarmBell::new();
        let state = Arc::new(Mutex::new(State {
            clock,
            bell: bell.clone(),
            preload: [PRELOAD_MASK; 2],
            config: 0,
            lock: 0,
            unlocked: 0,
            counter: Counter::Stopped,
            timed_out: false,
        }));
        let watched = Arc::downgrade(&state);
        let alarm = Alarm::start("watchdog", bell, move || {
            let state = watched.upgrade()?;
            let (bites, next) = lock(&state).look();
            if bites {
                bite();
            }
            next
        })?;
        Ok(Watchdog { state, _alarm: alarm })
    }

    pub fn hold(&self) -> WatchdogHold {
        WatchdogHold(Arc::clone(&self.state))
    }
}

impl WatchdogHold {
    pub fn hold(&self) {
        let mut state = lock(&self.0);
        if let Counter::Running(stage, end) = state.counter {
            state.counter = Counter::Held(stage, end.saturating_sub(state.clock.now_ns()));
        }
    }

    pub fn release(&self) {
        let mut state = lock(&self.0);
        if let Counter::Held(stage, left) = state.counter {
            state.counter = Counter::Running(stage, state.clock.now_ns().saturating_add(left));
            state.bell.ring();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// What is due: whether it bites, and how long until the next look.
    fn look(&mut self) -> (bool, Option<u64>) {
        let Counter::Running(stage, end) = self.counter else { return (false, None) };
        let now = self.clock.now_ns();
        if now < end {
            return (false, Some(end - now));
        }
        if stage == 0 {
            // The guest may have been told by an interrupt, which nobody here uses; then the second stage.
            let length = self.length(1);
            self.counter = Counter::Running(1, end.saturating_add(length));
            return (false, Some(self.length(1).saturating_sub(now - end)));
        }
        self.counter = Counter::Stopped;
        self.timed_out = true;
        (self.config & CONFIG_NO_REBOOT == 0, None)
    }

    /// Nanoseconds of a stage.
    fn length(&self, stage: usize) -> u64 {
        let tick = if self.config & CONFIG_FAST != 0 { FAST_TICK_NS } else { TICK_NS };
        self.preload.get(stage).map_or(0, |ticks| u64::from(*ticks) * tick)
    }

    fn restart(&mut self) {
        let end = self.clock.now_ns().saturating_add(self.length(0));
        self.counter = if self.lock & LOCK_ENABLED != 0 { Counter::Running(0, end) } else { Counter::Stopped };
        self.bell.ring();
    }

    fn write(&mut self, offset: u64, value: u64) {
        // The key may be spelled at any time.
        if offset == register::RELOAD && self.unlocked < UNLOCK.len() {
            self.unlocked = match UNLOCK.get(self.unlocked) {
                Some(key) if *key == value => self.unlocked + 1,
                _ => usize::from(value == UNLOCK[0]),
            };
            return;
        }
        if self.unlocked < UNLOCK.len() {
            return;
        }
        self.unlocked = 0;
        match offset {
            register::TIMER_1 => self.preload[0] = value as u32 & PRELOAD_MASK,
            register::TIMER_2 => self.preload[1] = value as u32 & PRELOAD_MASK,
            register::RELOAD => {
                if value & RELOAD_TIMED_OUT != 0 {
                    self.timed_out = false;
                }
                if value & RELOAD_NOW != 0 && self.counter != Counter::Stopped {
                    self.restart();
                }
            }
            _ => {}
        }
    }
}

impl PciFunction for Watchdog {
    fn identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x8086,
            device: 0x25ab,
            class: 0x08_8000,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            interrupt_pin: 0,
        }
    }
    fn bars(&self) -> &[BarSpec] {
        &BARS
    }
    fn config_bytes(&self) -> Vec<ConfigByte> {
        [(CONFIG, CONFIG_KEPT), (CONFIG + 1, 0), (LOCK, LOCK_KEPT)]
            .map(|(offset, writable)| ConfigByte { offset, reset: 0, writable })
            .to_vec()
    }
    /// The lock keeps what it was locked with, whatever was written since.
    fn config_read(&mut self, _: &[u8; CONFIG_BYTES], offset: u8, width: Width) -> Option<u64> {
        (offset == LOCK && width == Width::B1).then(|| u64::from(lock(&self.state).lock))
    }
    fn config_written(&mut self, config: &[u8; CONFIG_BYTES], _: u8, _: Width) {
        let mut state = lock(&self.state);
        state.config = config[usize::from(CONFIG)] & CONFIG_KEPT;
        let (wanted, now) = (config[usize::from(LOCK)] & LOCK_KEPT, state.lock);
        if now & LOCK_LOCKED == 0 && wanted != now {
            state.lock = wanted;
            if (wanted ^ now) & LOCK_ENABLED != 0 {
                state.restart();
            }
        }
    }
    fn bar_read(&mut self, _: u8, at: Access) -> Result<u64, BusFault> {
        let state = lock(&self.state);
        match at.offset {
            register::TIMER_1 => Ok(state.preload[0].into()),
            register::TIMER_2 => Ok(state.preload[1].into()),
            register::INTERRUPT => Ok(0),
            register::RELOAD => Ok(if state.timed_out { RELOAD_TIMED_OUT } else { 0 }),
            _ => Err(BusFault::NoRegister),
        }
    }
    fn bar_write(&mut self, _: u8, at: Access, value: u64) -> Result<Effect, BusFault> {
        lock(&self.state).write(at.offset, value);
        Ok(Effect::None)
    }
    fn reset(&mut self) {
        let mut state = lock(&self.state);
        (state.preload, state.config, state.lock, state.unlocked) = ([PRELOAD_MASK; 2], 0, 0, 0);
        state.counter = Counter::Stopped;
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    pub(super) const KIND: &str = "watchdog";

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) preload: [u32; 2],
        pub(super) config: u8,
        pub(super) lock: u8,
        pub(super) unlocked: u8,
        /// `None` while it stands.
        pub(super) counter: Option<Counter>,
        pub(super) timed_out: bool,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct Counter {
        pub(super) stage: u8,
        pub(super) left_ns: u64,
    }
}

impl SaveState for Watchdog {
    fn save(&self) -> states::State {
        let state = lock(&self.state);
        let State { clock, bell: _, preload, config, lock, unlocked, counter, timed_out } = &*state;
        let counter = match *counter {
            Counter::Stopped => None,
            Counter::Running(stage, end) => Some((stage, end.saturating_sub(clock.now_ns()))),
            Counter::Held(stage, left) => Some((stage, left)),
        };
        let fields = saved::V1 {
            preload: *preload,
            config: *config,
            lock: *lock,
            unlocked: *unlocked as u8,
            counter: counter.map(|(stage, left_ns)| saved::Counter { stage: stage as u8, left_ns }),
            timed_out: *timed_out,
        };
        states::State::new(saved::KIND, 1, &fields)
    }

    /// The counter stands until `WatchdogHold::release`: no time passes for a guest that sleeps.
    fn restore(&mut self, state: &states::State) -> Result<(), BadState> {
        let fields: saved::V1 = state.fields(saved::KIND, 1)?;
        let good = |good: bool, what: &str| BadState::unless(good, saved::KIND, what);
        good(fields.preload.iter().all(|ticks| *ticks <= PRELOAD_MASK), "a stage is longer than its counter")?;
        good(usize::from(fields.unlocked) <= UNLOCK.len(), "its key is longer than a key")?;
        let counter = match fields.counter {
            None => Counter::Stopped,
            Some(saved::Counter { stage, left_ns }) => {
                good(stage <= 1, "it has two stages")?;
                good(left_ns <= u64::from(PRELOAD_MASK) * TICK_NS, "more is left than a stage has")?;
                Counter::Held(usize::from(stage), left_ns)
            }
        };
        let mut state = lock(&self.state);
        state.preload = fields.preload;
        state.config = fields.config & CONFIG_KEPT;
        state.lock = fields.lock & LOCK_KEPT;
        state.unlocked = usize::from(fields.unlocked);
        state.counter = counter;
        state.timed_out = fields.timed_out;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    };
    use std::time::Duration;

    use super::*;
    use crate::engine::{
        saved::testing::{matches_golden, spoil},
        timer::tests::hand_clock,
    };

    struct Rig {
        dog: Watchdog,
        config: [u8; CONFIG_BYTES],
        hand: Arc<AtomicU64>,
        bites: Arc<AtomicUsize>,
    }

    fn rig() -> Rig {
        let (clock, hand) = hand_clock(0);
        let bites = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&bites);
        let dog = Watchdog::new(clock, move || _ = counted.fetch_add(1, Ordering::SeqCst)).unwrap();
        Rig { dog, config: [0; CONFIG_BYTES], hand, bites }
    }

    impl Rig {
        fn put(&mut self, offset: u64, value: u64) {
            self.dog.bar_write(0, Access::new(offset, Width::B4), value).unwrap();
        }
        /// As the driver writes.
        fn unlocked(&mut self, offset: u64, value: u64) {
            for key in UNLOCK {
                self.put(register::RELOAD, key);
            }
            self.put(offset, value);
        }
        fn get(&mut self, offset: u64) -> u64 {
            self.dog.bar_read(0, Access::new(offset, Width::B4)).unwrap()
        }
        fn configure(&mut self, offset: u8, value: u8) {
            self.config[usize::from(offset)] = value;
            let config = self.config;
            self.dog.config_written(&config, offset, Width::B1);
        }
        /// Two stages of a thousand ticks each, running.
        fn start(&mut self) {
            self.unlocked(register::TIMER_1, 1000);
            self.unlocked(register::TIMER_2, 1000);
            self.configure(LOCK, LOCK_ENABLED);
        }
        /// Moves the clock and looks as the thread would.
        fn pass(&mut self, ticks: u64) -> (bool, Option<u64>) {
            self.hand.fetch_add(ticks * TICK_NS, Ordering::SeqCst);
            lock(&self.dog.state).look()
        }
    }

    #[test]
    fn it_bites_after_both_stages_and_says_so_after_the_reset() {
        let mut rig = rig();
        assert_eq!(rig.pass(5000), (false, None), "nobody has started it");
        rig.start();
        assert_eq!(rig.pass(999), (false, Some(TICK_NS)));
        assert_eq!(rig.pass(1), (false, Some(1000 * TICK_NS)));
        assert_eq!(rig.pass(999), (false, Some(TICK_NS)));
        assert_eq!(rig.pass(1), (true, None));
        rig.dog.reset();
        assert_eq!(rig.get(register::RELOAD), RELOAD_TIMED_OUT);
        rig.unlocked(register::RELOAD, RELOAD_TIMED_OUT);
        assert_eq!(rig.get(register::RELOAD), 0);
        assert_eq!(rig.pass(5000), (false, None), "a reset has stopped it");
    }

    #[test]
    fn reloading_in_time_keeps_it_quiet_and_only_with_the_key() {
        let mut rig = rig();
        rig.start();
        for _ in 0..5 {
            assert!(!rig.pass(1500).0);
            rig.unlocked(register::RELOAD, RELOAD_NOW);
        }
        assert!(!rig.pass(1999).0);
        rig.put(register::RELOAD, RELOAD_NOW);
        rig.put(register::TIMER_1, 5);
        assert_eq!(rig.get(register::TIMER_1), 1000);
        assert!(!rig.pass(0).0, "the end of the first stage was seen");
        assert!(rig.pass(1).0);
    }

    #[test]
    fn it_can_be_stopped_unless_it_is_locked_and_may_only_watch() {
        let mut rig = rig();
        rig.start();
        rig.configure(LOCK, 0);
        assert_eq!(rig.pass(9000), (false, None));
        rig.configure(LOCK, LOCK_ENABLED | LOCK_LOCKED);
        rig.configure(LOCK, 0);
        assert_eq!(rig.dog.config_read(&[0; CONFIG_BYTES], LOCK, Width::B1), Some(3));
        rig.configure(CONFIG, CONFIG_NO_REBOOT);
        rig.pass(1000);
        assert!(!rig.pass(1000).0);
        assert_eq!(rig.get(register::RELOAD), RELOAD_TIMED_OUT);
    }

    #[test]
    fn it_stands_while_the_machine_is_paused() {
        let mut rig = rig();
        rig.start();
        rig.pass(600);
        let hold = rig.dog.hold();
        hold.hold();
        assert_eq!(rig.pass(100_000), (false, None));
        hold.release();
        assert_eq!(rig.pass(399), (false, Some(TICK_NS)));
        hold.release();
        assert_eq!(rig.pass(1), (false, Some(1000 * TICK_NS)));
    }

    #[test]
    fn its_thread_bites() {
        let (tell, told) = mpsc::channel();
        let mut dog = Watchdog::new(Clock::monotonic(), move || tell.send(()).unwrap()).unwrap();
        for (offset, value) in [(register::TIMER_1, 10), (register::TIMER_2, 10)] {
            for (at, value) in [(register::RELOAD, UNLOCK[0]), (register::RELOAD, UNLOCK[1]), (offset, value)] {
                dog.bar_write(0, Access::new(at, Width::B4), value).unwrap();
            }
        }
        let mut config = [0; CONFIG_BYTES];
        config[usize::from(LOCK)] = LOCK_ENABLED;
        dog.config_written(&config, LOCK, Width::B1);
        told.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn no_register_and_no_value_makes_it_panic() {
        let mut rig = rig();
        for round in 0..200_000u64 {
            let value = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            match value >> 60 {
                0..=9 => rig.put(value >> 8 & 0x1f, [0x80, 0x86, 0x300, value][(value >> 4 & 3) as usize]),
                10..=12 => rig.configure([CONFIG, LOCK][(value >> 5 & 1) as usize], value as u8),
                13 => drop(rig.pass(value & 0xff_ffff)),
                _ => drop(rig.dog.bar_read(0, Access::new(value & 0x1f, Width::B2))),
            }
        }
        drop(rig.bites);
    }

    /// In the middle of its second stage, with the key half spelled, held as a paused machine holds it.
    fn busy() -> Rig {
        let mut rig = rig();
        rig.start();
        rig.pass(1000);
        rig.pass(400);
        rig.put(register::RELOAD, UNLOCK[0]);
        rig.dog.hold().hold();
        rig
    }

    #[test]
    fn a_restored_watchdog_has_the_time_left_that_it_had() {
        let first = busy();
        let state = matches_golden(&first.dog.save());
        let mut rig = rig();
        rig.hand.store(1 << 60, Ordering::SeqCst);
        rig.dog.restore(&state).unwrap();
        rig.config = first.config;
        rig.configure(LOCK, LOCK_ENABLED);
        assert_eq!(rig.pass(100_000), (false, None), "nothing passes before the guest goes on");
        rig.dog.hold().release();
        assert_eq!(rig.pass(599), (false, Some(TICK_NS)));
        let states = [rig.dog.save(), state];
        assert_eq!(rig.pass(1), (true, None));
        assert_eq!(rig.bites.load(Ordering::SeqCst), 0, "the thread had nothing to do: `look` was called here");

        for (state, ticks) in states.iter().zip([1, 600]) {
            let mut fed = super::tests::rig();
            fed.dog.restore(state).unwrap();
            fed.dog.hold().release();
            assert!(!fed.pass(ticks - 1).0);
            fed.put(register::RELOAD, UNLOCK[1]);
            fed.put(register::RELOAD, RELOAD_NOW);
            assert!(!fed.pass(1999).0, "the key's second half was enough");
            assert!(fed.pass(1).0 || fed.pass(0).0);
        }
    }

    #[test]
    fn no_saved_state_makes_it_panic() {
        spoil(&busy().dog.save(), |bad| {
            let mut rig = rig();
            let _ = rig.dog.restore(bad);
            rig.dog.hold().release();
            rig.configure(LOCK, LOCK_ENABLED);
            for _ in 0..3 {
                rig.pass(u64::from(PRELOAD_MASK));
            }
            rig.unlocked(register::RELOAD, RELOAD_NOW | RELOAD_TIMED_OUT);
            rig.dog.reset();
        });
    }
}
