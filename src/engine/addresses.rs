//! Which addresses a guest uses, learnt from what it sends: ARP and IPv6 neighbour discovery. Works on every network.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Kept; the oldest goes first.
const ADDRESSES_MAX: usize = 8;
/// Between two changes of a full list.
const BETWEEN: Duration = Duration::from_secs(1);
/// Ethernet header and as much of ARP or IPv6 as is looked at.
pub const LOOK_BYTES: usize = 14 + 40;
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const NEXT_HEADER_ICMPV6: u8 = 58;

/// Told the whole list when it changes.
pub type AddressSink = Arc<dyn Fn(Vec<String>) + Send + Sync>;

/// Clones watch the same guest: each pair of a card's queues has one.
#[derive(Clone)]
pub struct AddressWatch {
    known: Arc<Mutex<Known>>,
    sink: AddressSink,
}

#[derive(Default)]
struct Known {
    addresses: Vec<String>,
    told: Option<Instant>,
}

impl AddressWatch {
    pub fn new(sink: AddressSink) -> AddressWatch {
        AddressWatch { known: Arc::default(), sink }
    }

    /// Looks at the beginning of a frame that the guest sends, `LOOK_BYTES` of it if it is so long.
    pub fn see(&self, frame: &[u8]) {
        if !matches!(frame.get(12..14), Some(ethertype) if ethertype == ETHERTYPE_ARP || ethertype == ETHERTYPE_IPV6) {
            return;
        }
        let mut beginning = [0; LOOK_BYTES];
        for (into, from) in beginning.iter_mut().zip(frame) {
            *into = *from;
        }
        let Some(address) = address_of(&beginning) else { return };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.addresses.contains(&address) {
            return;
        }
        if known.addresses.len() == ADDRESSES_MAX {
            // A guest that has more than we keep does not keep us busy; its next frame says the same.
            if known.told.is_some_and(|told| told.elapsed() < BETWEEN) {
                return;
            }
            known.addresses.remove(0);
        }
        known.addresses.push(address);
        known.told = Some(Instant::now());
        // Under the lock, so that lists come in their order.
        (self.sink)(known.addresses.clone());
    }
}

/// The sender's own address in an ARP packet (RFC 826) or an ICMPv6 packet with a global source; others say nothing certain.
fn address_of(frame: &[u8; LOOK_BYTES]) -> Option<String> {
    let ethertype = [frame[12], frame[13]];
    if ethertype == ETHERTYPE_ARP {
        let sender: [u8; 4] = frame.get(28..32)?.try_into().ok()?;
        let address = Ipv4Addr::from(sender);
        let known = frame.get(14..20)? == [0, 1, 8, 0, 6, 4];
        return (known && !address.is_unspecified() && !address.is_link_local()).then(|| address.to_string());
    }
    if ethertype == ETHERTYPE_IPV6 && frame[20] == NEXT_HEADER_ICMPV6 {
        let source: [u8; 16] = frame.get(22..38)?.try_into().ok()?;
        let address = Ipv6Addr::from(source);
        let global = !address.is_unspecified() && !address.is_unicast_link_local() && !address.is_multicast();
        return global.then(|| address.to_string());
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn arp(sender: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0xff; 12];
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2]);
        frame.extend(sender);
        frame.extend([0; 22]);
        frame
    }

    #[test]
    fn arp_and_neighbour_discovery_tell_addresses_once() {
        let seen: Arc<Mutex<Vec<Vec<String>>>> = Arc::default();
        let sink = Arc::clone(&seen);
        let watch = AddressWatch::new(Arc::new(move |list| sink.lock().unwrap().push(list)));
        let mut v6 = vec![0; 12];
        v6.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 58, 255]);
        v6.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 7).octets());
        v6.extend([0; 16]);
        for frame in [arp([0, 0, 0, 0]), arp([10, 0, 0, 9]), arp([10, 0, 0, 9]), v6, vec![0; 20]] {
            watch.see(&frame);
        }
        assert_eq!(*seen.lock().unwrap(), [vec!["10.0.0.9".to_owned()], vec!["10.0.0.9".into(), "fd00::7".into()]]);
    }

    #[test]
    fn a_guest_that_makes_up_addresses_is_not_told_of_each() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&told);
        let watch = AddressWatch::new(Arc::new(move |list| sink.lock().unwrap().push(list)));
        let start = Instant::now();
        for number in 0..100_000u32 {
            let [_, _, high, low] = number.to_be_bytes();
            watch.see(&arp([10, 0, high, low]));
        }
        let most = ADDRESSES_MAX as u64 + start.elapsed().as_secs() + 1;
        assert!((ADDRESSES_MAX as u64..=most).contains(&(told.lock().unwrap().len() as u64)));
        // A second later the next one is.
        watch.known.lock().unwrap().told = start.checked_sub(BETWEEN);
        watch.see(&arp([192, 168, 1, 2]));
        assert_eq!(told.lock().unwrap().last().unwrap().last().unwrap(), "192.168.1.2");
    }
}
