//! Slows addresses that guess passwords. Accounts are never locked, so nobody can lock anybody out.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use crate::error::{Error, ErrorKind, Result};

/// Wrong passwords from one address before it has to wait.
pub(super) const FREE_FAILURES: u32 = 4;
const WAIT_MAX: Duration = Duration::from_secs(60);
/// An address is forgotten when it has been quiet for this long.
const FORGET_AFTER: Duration = Duration::from_secs(15 * 60);
/// Addresses that are remembered.
const ADDRESSES_MAX: usize = 4096;

#[derive(Default)]
pub(super) struct Throttle {
    addresses: HashMap<IpAddr, Record>,
}

struct Record {
    failures: u32,
    last: Instant,
    not_before: Instant,
}

impl Throttle {
    /// Whether the address may try now. From the first wait on, one try holds the door until its outcome is known, so that
    /// trying in parallel gains nothing.
    pub(super) fn admit(&mut self, address: IpAddr) -> Result<()> {
        let now = Instant::now();
        let Some(record) = self.addresses.get_mut(&network_of(address)) else { return Ok(()) };
        if now.duration_since(record.last) > FORGET_AFTER {
            self.addresses.remove(&network_of(address));
            return Ok(());
        }
        if now < record.not_before {
            let seconds = record.not_before.duration_since(now).as_secs() + 1;
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("Too many wrong passwords from this address; try again in {seconds} s."),
            ));
        }
        record.not_before = now + wait_after(record.failures);
        Ok(())
    }

    pub(super) fn failed(&mut self, address: IpAddr) {
        let now = Instant::now();
        if self.addresses.len() >= ADDRESSES_MAX {
            self.addresses.retain(|_, record| now.duration_since(record.last) < FORGET_AFTER);
        }
        if self.addresses.len() >= ADDRESSES_MAX {
            // An attacker with this many addresses is not slowed by one more entry; memory stays bounded.
            self.addresses.clear();
        }
        let record =
            self.addresses.entry(network_of(address)).or_insert(Record { failures: 0, last: now, not_before: now });
        record.failures = record.failures.saturating_add(1);
        record.last = now;
        record.not_before = now + wait_after(record.failures);
    }

    pub(super) fn succeeded(&mut self, address: IpAddr) {
        self.addresses.remove(&network_of(address));
    }
}

/// Nothing for the first failures, then 1, 2, 4, … seconds.
fn wait_after(failures: u32) -> Duration {
    match failures.checked_sub(FREE_FAILURES) {
        None => Duration::ZERO,
        Some(more) => Duration::from_secs(1 << more.min(6)).min(WAIT_MAX),
    }
}

/// An IPv6 host has a whole /64 to itself.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end_at_a_minute() {
        let seconds: Vec<u64> = (0..12).map(|failures| wait_after(failures).as_secs()).collect();
        assert_eq!(seconds, [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_and_success_forgives() {
        let mut throttle = Throttle::default();
        let [one, two]: [IpAddr; 2] = ["2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap()];
        (0..FREE_FAILURES).for_each(|_| throttle.failed(one));
        assert!(throttle.admit(two).is_err());
        assert!(throttle.admit("2001:db8:0:1::1".parse().unwrap()).is_ok());
        throttle.succeeded(two);
        assert!(throttle.admit(one).is_ok());
    }

    #[test]
    fn memory_stays_bounded() {
        let mut throttle = Throttle::default();
        for n in 0..10_000u32 {
            throttle.failed(IpAddr::V4(n.into()));
        }
        assert!(throttle.addresses.len() <= ADDRESSES_MAX);
    }
}
