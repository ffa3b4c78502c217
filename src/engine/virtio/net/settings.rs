//! What a driver and the host set on a card: addresses, modes, offloads, pairs of queues, the link. Kept apart from the frames'
//! way: of this a worker reads a few atomics in a burst.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use super::header::{GUEST_OFFLOADS, tap_offloads};
use crate::{
    engine::{event::Event, tap, virtio::Features},
    types::MacAddr,
};

/// Unicast addresses beside the card's own that a tap compares.
pub(super) const UNICAST_MAX: usize = tap::FILTER_EXACT - 1;
/// Multicast addresses; the kernel keeps a hash of 64 bits of them.
pub(super) const MULTICAST_MAX: usize = 64;

const BROADCAST: MacAddr = MacAddr([0xff; 6]);

/// Which frames the driver wants (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) mac: MacAddr,
    /// Everything, as long as the driver has not said otherwise.
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) unicast: Vec<MacAddr>,
    pub(super) multicast: Vec<MacAddr>,
    /// The driver's table was longer than what is kept: everything of its kind.
    pub(super) any_unicast: bool,
    pub(super) any_multicast: bool,
}

impl Filter {
    fn new(mac: MacAddr) -> Filter {
        Filter {
            mac,
            promiscuous: true,
            all_multicast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            any_unicast: false,
            any_multicast: false,
        }
    }

    /// What the tap lets in: whether all multicast frames, and which addresses; none for everything.
    pub(super) fn of_tap(&self) -> (bool, Vec<MacAddr>) {
        if self.promiscuous || self.any_unicast {
            return (false, Vec::new());
        }
        let mut addresses = vec![self.mac];
        addresses.extend(&self.unicast);
        addresses.push(BROADCAST);
        addresses.extend(&self.multicast);
        (self.all_multicast || self.any_multicast, addresses)
    }
}

/// Shared by the card's registers, its workers and the host.
pub(super) struct Settings {
    made_with: MacAddr,
    filter: Mutex<Filter>,
    /// Offloads of the way in that the driver switched off after it had accepted them.
    offloads_off: AtomicU64,
    /// Pairs that carry frames, the first ones.
    pairs: AtomicUsize,
    link_up: AtomicBool,
    /// The other end is gone for good.
    link_lost: AtomicBool,
    link_changed: AtomicBool,
    announce_wanted: AtomicBool,
    /// The driver is asked to announce itself, and has not said yet that it does (5.1.6.5.4).
    announcing: AtomicBool,
    /// Each pair's worker waits for one of these.
    news: Vec<Event>,
    /// Handles on the queues of the tap, for orders only. None with `passt`, and when the card is gone.
    taps: Mutex<Vec<OwnedFd>>,
}

impl Settings {
    pub(super) fn new(mac: MacAddr, pairs: usize, taps: Vec<OwnedFd>) -> io::Result<Arc<Settings>> {
        let settings = Settings {
            made_with: mac,
            filter: Mutex::new(Filter::new(mac)),
            offloads_off: AtomicU64::new(0),
            pairs: AtomicUsize::new(1),
            link_up: AtomicBool::new(true),
            link_lost: AtomicBool::new(false),
            link_changed: AtomicBool::new(false),
            announce_wanted: AtomicBool::new(false),
            announcing: AtomicBool::new(false),
            news: (0..pairs).map(|_| Event::new()).collect::<Result<_, _>>()?,
            taps: Mutex::new(taps),
        };
        settings.apply(0);
        Ok(Arc::new(settings))
    }

    /// Gives the tap what is set. Errors are left out: without offloads and filter more work is done here and in the guest, and
    /// nothing is wrong; a queue that is told what it knows refuses that.
    pub(super) fn apply(&self, accepted: Features) {
        self.apply_offloads(accepted);
        self.apply_filter(&self.filter());
        self.apply_pairs();
    }

    fn taps(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply_offloads(&self, accepted: Features) {
        if let Some(tap) = self.taps().first() {
            let _ = tap::set_offloads(tap.as_fd(), tap_offloads(self.offloads(accepted)));
        }
    }

    fn apply_filter(&self, filter: &Filter) {
        if let Some(tap) = self.taps().first() {
            let (all_multicast, addresses) = filter.of_tap();
            let _ = tap::set_filter(tap.as_fd(), all_multicast, &addresses);
        }
    }

    fn apply_pairs(&self) {
        for (index, tap) in self.taps().iter().enumerate().skip(1) {
            let _ = tap::set_queue_used(tap.as_fd(), self.uses(index));
        }
        self.wake();
    }

    /// Back to what a new driver finds.
    pub(super) fn reset(&self) {
        *self.filter() = Filter::new(self.made_with);
        self.offloads_off.store(0, Ordering::Release);
        self.pairs.store(1, Ordering::Release);
        for flag in [&self.link_changed, &self.announce_wanted, &self.announcing] {
            flag.store(false, Ordering::Release);
        }
        self.apply(0);
    }

    /// The offloads of the way in that are on.
    pub(super) fn offloads(&self, accepted: Features) -> Features {
        accepted & GUEST_OFFLOADS & !self.offloads_off.load(Ordering::Acquire)
    }

    /// Leaves `on` of the offloads that the driver accepted.
    pub(super) fn set_offloads(&self, accepted: Features, on: Features) {
        self.offloads_off.store(accepted & GUEST_OFFLOADS & !on, Ordering::Release);
        self.apply_offloads(accepted);
    }

    pub(super) fn change_filter(&self, change: impl FnOnce(&mut Filter)) {
        let mut filter = self.filter();
        change(&mut filter);
        self.apply_filter(&filter);
    }

    pub(super) fn filter(&self) -> MutexGuard<'_, Filter> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_pairs(&self, pairs: usize) {
        self.pairs.store(pairs, Ordering::Release);
        self.apply_pairs();
    }

    pub(super) fn pairs_max(&self) -> usize {
        self.news.len()
    }

    /// Whether a pair carries frames.
    pub(super) fn uses(&self, pair: usize) -> bool {
        pair < self.pairs.load(Ordering::Acquire)
    }

    pub(super) fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::Acquire) && !self.link_lost.load(Ordering::Acquire)
    }

    pub(super) fn is_announcing(&self) -> bool {
        self.announcing.load(Ordering::Acquire)
    }

    /// The driver announces itself.
    pub(super) fn announced(&self) {
        self.announcing.store(false, Ordering::Release);
    }

    /// The other end is gone for good.
    pub(super) fn lose_link(&self) {
        if !self.link_lost.swap(true, Ordering::AcqRel) {
            self.link_changed.store(true, Ordering::Release);
            self.wake();
        }
    }

    /// Whether the driver has to be told that the status is another. For one that can announce itself, also when it shall.
    pub(super) fn take_changes(&self, can_announce: bool) -> bool {
        let announce = take(&self.announce_wanted) && can_announce;
        if announce {
            self.announcing.store(true, Ordering::Release);
        }
        take(&self.link_changed) || announce
    }

    pub(super) fn news(&self, pair: usize) -> Option<&Event> {
        self.news.get(pair)
    }

    fn wake(&self) {
        self.news.iter().for_each(Event::signal);
    }
}

fn take(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Acquire) && flag.swap(false, Ordering::AcqRel)
}

/// The host's hold on a card. Clones are the same card.
#[derive(Clone)]
pub struct NetLink(pub(super) Arc<Settings>);

impl NetLink {
    /// Asks the guest to tell the network where it is: after it went on somewhere else, or much later. A driver that cannot, or
    /// none, is not asked.
    pub fn announce(&self) {
        self.0.announce_wanted.store(true, Ordering::Release);
        self.0.wake();
    }

    /// The card is gone: nothing here holds the tap any more, though a vCPU may keep the card itself alive for a while.
    pub fn close(&self) {
        self.0.taps().clear();
    }

    /// Plugs the cable in, or pulls it: the guest sees it, and no frames pass.
    pub fn set_up(&self, up: bool) {
        if self.0.link_up.swap(up, Ordering::AcqRel) != up {
            self.0.link_changed.store(true, Ordering::Release);
            self.0.wake();
        }
    }
}

/// What is saved. Whether the link is up is the host's to say again.
pub(super) mod saved {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::engine::saved::{BadState, State, hex};

    pub(super) const KIND: &str = "virtio-net";

    #[derive(Serialize, Deserialize)]
    struct V1 {
        mac: MacAddr,
        promiscuous: bool,
        all_multicast: bool,
        /// Six bytes each.
        #[serde(with = "hex")]
        unicast: Vec<u8>,
        #[serde(with = "hex")]
        multicast: Vec<u8>,
        any_unicast: bool,
        any_multicast: bool,
        offloads_off: u64,
        pairs: usize,
        announcing: bool,
    }

    pub(in super::super) fn save(settings: &Settings) -> State {
        let Settings {
            made_with: _,
            filter,
            offloads_off,
            pairs,
            link_up: _,
            link_lost: _,
            link_changed: _,
            announce_wanted: _,
            announcing,
            news: _,
            taps: _,
        } = settings;
        let filter = filter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Filter { mac, promiscuous, all_multicast, unicast, multicast, any_unicast, any_multicast } = filter;
        let bytes = |list: Vec<MacAddr>| list.into_iter().flat_map(|address| address.0).collect();
        let state = V1 {
            mac,
            promiscuous,
            all_multicast,
            unicast: bytes(unicast),
            multicast: bytes(multicast),
            any_unicast,
            any_multicast,
            offloads_off: offloads_off.load(Ordering::Acquire),
            pairs: pairs.load(Ordering::Acquire),
            announcing: announcing.load(Ordering::Acquire),
        };
        State::new(KIND, 1, &state)
    }

    /// The tap is told when the driver's queues are served again.
    pub(in super::super) fn restore(settings: &Settings, state: &State) -> Result<(), BadState> {
        let V1 {
            mac,
            promiscuous,
            all_multicast,
            unicast,
            multicast,
            any_unicast,
            any_multicast,
            offloads_off,
            pairs,
            announcing,
        } = state.fields(KIND, 1)?;
        let addresses = |bytes: &[u8], max: usize| {
            let (list, rest) = bytes.as_chunks::<6>();
            BadState::unless(rest.is_empty() && list.len() <= max, KIND, "a table of addresses is not one")?;
            Ok(list.iter().map(|address| MacAddr(*address)).collect())
        };
        let (unicast, multicast) = (addresses(&unicast, UNICAST_MAX)?, addresses(&multicast, MULTICAST_MAX)?);
        BadState::unless((1..=settings.pairs_max()).contains(&pairs), KIND, "there are not so many pairs of queues")?;
        BadState::unless(offloads_off & !GUEST_OFFLOADS == 0, KIND, "what is switched off is no offload")?;
        *settings.filter() = Filter { mac, promiscuous, all_multicast, unicast, multicast, any_unicast, any_multicast };
        settings.offloads_off.store(offloads_off, Ordering::Release);
        settings.pairs.store(pairs, Ordering::Release);
        settings.announcing.store(announcing, Ordering::Release);
        Ok(())
    }
}
