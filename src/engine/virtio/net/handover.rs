//! While much is carried, the kernel serves a pair of queues itself (vhost-net), where the host has that.
//!
//! Not always: our thread answers a single frame sooner, as an interrupt of the kernel's passes through it, and it learns the
//! guest's addresses from what it sends. So the queues are handed over when a card carries streams, and come back when the guest has
//! heard nothing for a while, sets something on the card, or is paused.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::{Pair, Session};
use crate::engine::{
    event::Event,
    memory::GuestRam,
    vhost::{RINGS, Ring, Vhost},
    virtio::queue::{Malformed, VirtQueue},
    worker::Stop,
};

/// So many bytes in so long a time are a stream.
const STREAM_BYTES: u64 = 4 << 20;
const STREAM_TIME: Duration = Duration::from_secs(1);
/// Without an interrupt for so long, no stream goes on.
const QUIET: Duration = Duration::from_secs(1);

/// How much a pair carries. The clock is read once in `STREAM_BYTES`.
#[derive(Default)]
pub(super) struct Load {
    bytes: u64,
    since: Option<Instant>,
}

impl Load {
    /// Adds what was carried; true when that is a stream.
    pub(super) fn add(&mut self, bytes: u64) -> bool {
        self.bytes += bytes;
        if self.bytes < STREAM_BYTES {
            return false;
        }
        self.bytes = 0;
        let now = Instant::now();
        let before = self.since.replace(now);
        before.is_some_and(|before| now.duration_since(before) < STREAM_TIME)
    }
}

impl Pair {
    /// Hands the queues to the kernel, and has them back when this returns. Nothing happens where that cannot be.
    ///
    /// Errors: the driver broke the rules.
    pub(super) fn hand_over(&mut self, session: &mut Session<'_>, stop: &Stop) -> Result<(), Malformed> {
        let Some(mut vhost) = self.vhost.take() else { return Ok(()) };
        // A frame that is held would come after the next ones.
        let can = vhost.can_serve(session.features) && !self.backend.holds_frame();
        let served = if can { self.serve_by(&mut vhost, session, stop) } else { Ok(true) };
        // What went wrong once is not tried again: closed, the kernel lets go of the queues in any case.
        self.vhost = Some(vhost).filter(|_| served == Ok(true));
        served.map(drop)
    }

    /// False when the kernel refuses.
    fn serve_by(&self, vhost: &mut Vhost, session: &mut Session<'_>, stop: &Stop) -> Result<bool, Malformed> {
        let Session { ram, features, rx, tx, receiver, .. } = session;
        receiver.give_back(rx);
        let (Some(rx_ring), Some(tx_ring)) = (ring(rx, ram), ring(tx, ram)) else { return Ok(false) };
        if vhost.prepare(ram, *features, &[rx_ring, tx_ring]).is_err() {
            return Ok(false);
        }
        let started = vhost.start(self.backend.as_fd()).is_ok();
        let sound = !started || self.attend(vhost, session, stop);
        let next = vhost.stop().map_err(|_| Malformed)?;
        tell(vhost, session);
        let Session { ram, rx, tx, .. } = session;
        for (queue, next) in [rx, tx].into_iter().zip(next) {
            queue.take_back(ram, next)?;
        }
        if sound { Ok(started) } else { Err(Malformed) }
    }

    /// Passes interrupts on while the kernel serves, until it shall no more. False when the driver broke the rules.
    fn attend(&self, vhost: &Vhost, session: &Session<'_>, stop: &Stop) -> bool {
        let Some(news) = self.settings.news(self.number) else { return true };
        let control: &Event = session.control.as_ref().map_or(news, |queue| &queue.kick);
        let [rx, tx] = vhost.calls();
        let events = [rx, tx, vhost.errors(), control, news].map(|event| PollFd::new(event, PollFlags::IN));
        while let Some(ready) = stop.wait_ready_for(&events, QUIET) {
            tell(vhost, session);
            if ready.has(2) {
                vhost.errors().clear();
                return false;
            }
            if ready.has(3) || ready.has(4) || ready.is_none() {
                break;
            }
        }
        true
    }
}

/// Interrupts the driver for what the kernel has used.
fn tell(vhost: &Vhost, session: &Session<'_>) {
    for (call, queue) in vhost.calls().iter().zip([&*session.rx, &*session.tx]) {
        if call.clear() {
            session.interrupts.used(queue.index());
        }
    }
}

fn ring<'a>(queue: &'a VirtQueue, ram: &GuestRam) -> Option<Ring<'a>> {
    let [descriptors, available, used] = queue.host_addresses(ram)?;
    Some(Ring { size: queue.size(), next: queue.next(), descriptors, available, used, kick: &queue.kick })
}

const _: () = assert!(RINGS == 2, "receive and transmit");
