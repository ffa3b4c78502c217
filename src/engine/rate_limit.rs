//! How much a guest may ask of a device in a second: bytes, operations. A token bucket that holds one second's worth.
//!
//! A bucket is one moment on the clock: until when what was taken is paid for. It never lies more than a second in the past, so that
//! one second's worth may be taken at once; while it lies in the future, nothing more may be taken. So what is taken last may
//! be more than was left: it is paid for afterwards, and over time the rate is kept whatever the sizes.

use std::{
    io,
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{event::Event, timer::Clock};
pub use crate::spec::RateLimit;

const SECOND_NS: u64 = 1_000_000_000;

/// A limit that can be changed while the device works. Cloning gives another handle on the same.
#[derive(Clone)]
pub struct RateLimits(Arc<Shared>);

struct Shared {
    /// Zero for no limit.
    bytes_per_s: AtomicU64,
    operations_per_s: AtomicU64,
    changed: Event,
}

impl RateLimits {
    pub fn new(limit: RateLimit) -> io::Result<RateLimits> {
        let shared =
            Shared { bytes_per_s: AtomicU64::new(0), operations_per_s: AtomicU64::new(0), changed: Event::new()? };
        let limits = RateLimits(Arc::new(shared));
        limits.store(limit);
        Ok(limits)
    }

    /// Changes the limit at once, also for a device that waits for the old one.
    pub fn set(&self, limit: RateLimit) {
        self.store(limit);
        self.0.changed.signal();
    }

    pub fn get(&self) -> RateLimit {
        RateLimit {
            bytes_per_s: NonZeroU64::new(self.0.bytes_per_s.load(Ordering::Relaxed)),
            operations_per_s: NonZeroU64::new(self.0.operations_per_s.load(Ordering::Relaxed)),
        }
    }

    fn store(&self, limit: RateLimit) {
        self.0.bytes_per_s.store(limit.bytes_per_s.map_or(0, NonZeroU64::get), Ordering::Relaxed);
        self.0.operations_per_s.store(limit.operations_per_s.map_or(0, NonZeroU64::get), Ordering::Relaxed);
    }
}

/// What was taken under a limit: owned by the thread that does the work.
pub struct Meter {
    limits: RateLimits,
    clock: Clock,
    bytes: Bucket,
    operations: Bucket,
}

impl Meter {
    pub fn new(limits: RateLimits, clock: Clock) -> Meter {
        Meter { limits, clock, bytes: Bucket::default(), operations: Bucket::default() }
    }

    /// Signalled when the limit is changed.
    pub fn changed(&self) -> &Event {
        &self.limits.0.changed
    }

    /// `None` when the next operation may begin; else how long it must wait.
    pub fn closed_for(&mut self) -> Option<Duration> {
        let limit = self.limits.get();
        if !limit.is_set() {
            return None;
        }
        let now_ns = self.now_ns();
        let bytes_ns = self.bytes.closed_for_ns(limit.bytes_per_s, now_ns);
        let wait_ns = bytes_ns.max(self.operations.closed_for_ns(limit.operations_per_s, now_ns));
        (wait_ns > 0).then_some(Duration::from_nanos(wait_ns))
    }

    /// Begins at one second, so that a bucket which is full has a moment to say so.
    fn now_ns(&self) -> u64 {
        self.clock.now_ns().saturating_add(SECOND_NS)
    }

    /// One operation with so many bytes began.
    pub fn take(&mut self, bytes: u64) {
        let limit = self.limits.get();
        if !limit.is_set() {
            return;
        }
        let now_ns = self.now_ns();
        self.bytes.take(limit.bytes_per_s, bytes, now_ns);
        self.operations.take(limit.operations_per_s, 1, now_ns);
    }
}

impl RateLimit {
    fn is_set(&self) -> bool {
        self.bytes_per_s.is_some() || self.operations_per_s.is_some()
    }
}

#[derive(Default)]
struct Bucket {
    /// A bucket of another rate begins anew: its debt was counted in other seconds.
    rate: Option<NonZeroU64>,
    paid_until_ns: u64,
}

impl Bucket {
    /// How long nothing may be taken.
    fn closed_for_ns(&mut self, rate: Option<NonZeroU64>, now_ns: u64) -> u64 {
        if self.rate != rate {
            *self = Bucket { rate, paid_until_ns: 0 };
        }
        self.paid_until_ns.saturating_sub(now_ns)
    }

    fn take(&mut self, rate: Option<NonZeroU64>, amount: u64, now_ns: u64) {
        let Some(per_s) = rate else { return };
        let cost_ns = u128::from(amount) * u128::from(SECOND_NS) / u128::from(per_s.get());
        let from_ns = self.paid_until_ns.max(now_ns.saturating_sub(SECOND_NS));
        self.paid_until_ns = from_ns.saturating_add(u64::try_from(cost_ns).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::timer::tests::hand_clock;

    fn limit(bytes_per_s: u64, operations_per_s: u64) -> RateLimit {
        RateLimit { bytes_per_s: NonZeroU64::new(bytes_per_s), operations_per_s: NonZeroU64::new(operations_per_s) }
    }

    /// How many operations of so many bytes begin when the clock is moved to each deadline until `seconds` have passed.
    fn count(limit: RateLimit, bytes: u64, seconds: u64) -> u64 {
        let (clock, hand) = hand_clock(10 * SECOND_NS);
        let end_ns = (10 + seconds) * SECOND_NS;
        let mut meter = Meter::new(RateLimits::new(limit).unwrap(), clock);
        let mut begun = 0;
        loop {
            match meter.closed_for() {
                None => {
                    meter.take(bytes);
                    begun += 1;
                }
                Some(wait) => {
                    let now_ns = hand.load(Ordering::SeqCst) + wait.as_nanos() as u64;
                    if now_ns >= end_ns {
                        return begun;
                    }
                    hand.store(now_ns, Ordering::SeqCst);
                }
            }
        }
    }

    #[test]
    fn a_rate_is_kept_after_a_burst_of_one_second() {
        for (limit, bytes, expected) in [
            (limit(0, 100), 1 << 20, 11 * 100),
            (limit(1 << 20, 0), 4096, 11 * 256),
            (limit(1 << 20, 100), 4096, 11 * 100),
            (limit(4096, 1000), 4096, 11),
            // Larger than a second's worth: paid for afterwards.
            (limit(4096, 0), 16384, 3),
            (limit(7, 3), 0, 33),
        ] {
            let begun = count(limit, bytes, 10);
            assert!(begun.abs_diff(expected) <= 2, "{limit:?}: {begun}, not {expected}");
        }
    }

    #[test]
    fn a_change_holds_at_once_and_what_is_owed_is_forgotten() {
        let (clock, hand) = hand_clock(0);
        let limits = RateLimits::new(limit(1, 0)).unwrap();
        let mut meter = Meter::new(limits.clone(), clock);
        assert_eq!(meter.closed_for(), None);
        meter.take(u64::MAX);
        assert!(meter.closed_for() > Some(Duration::from_secs(1 << 30)));
        limits.set(limit(1 << 30, 0));
        assert!(meter.changed().clear());
        assert_eq!(meter.closed_for(), None);
        meter.take(2 << 30);
        assert_eq!(meter.closed_for(), Some(Duration::from_secs(1)), "one second's worth was there");
        hand.store(SECOND_NS, Ordering::SeqCst);
        assert_eq!(meter.closed_for(), None);
        meter.take(4 << 30);
        limits.set(RateLimit::default());
        assert_eq!(meter.closed_for(), None);
    }
}
