//! While much is carried, the kernel serves a pair of queues itself (vhost-net), where the host has that.
//!
//! Not always: our thread learns the guest's addresses from what it sends, and a route of KVM's for each interrupt takes time to be
//! made. So the queues are handed over when a card carries streams, and come back when nothing was carried for a while, the guest
//! sets something on the card, or is paused.

use std::{
    io,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};

use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use super::{Pair, Session};
use crate::engine::{
    event::Event,
    memory::GuestRam,
    vhost::{RINGS, Ring, Vhost},
    virtio::{
        Interrupts,
        queue::{Malformed, VirtQueue},
    },
    worker::Stop,
};

/// So many bytes in so long a time are a stream.
const STREAM_BYTES: u64 = 4 << 20;
const STREAM_TIME: Duration = Duration::from_secs(1);
/// With nothing carried for so long, no stream goes on.
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
        // The kernel says of frames that their checksums are right, which a driver without this does not expect. A frame that is held
        // would come after the next ones.
        let checked = self.settings.offloads(session.features) & 1 << VIRTIO_NET_F_GUEST_CSUM != 0;
        let can = checked && vhost.can_serve(session.features) && !self.backend.holds_frame();
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

    /// Waits while the kernel serves, until it shall no more. False when the driver broke the rules.
    fn attend(&self, vhost: &Vhost, session: &Session<'_>, stop: &Stop) -> bool {
        let Some(news) = self.settings.news(self.number) else { return true };
        let control: &Event = session.control.as_ref().map_or(news, |queue| &queue.kick);
        let Ok(mut calls) = Calls::new(vhost, session) else { return true };
        let mut carried = used_by_kernel(session);
        loop {
            let [rx, tx] = calls.passed_on();
            let [broken, command, change, cut] =
                [vhost.errors(), control, news, &calls.cut].map(|event| PollFd::new(event, PollFlags::IN));
            let Some(ready) = stop.wait_ready_for(&[rx, tx, broken, command, change, cut], QUIET) else { return true };
            tell(vhost, session);
            if ready.has(2) {
                vhost.errors().clear();
                return false;
            }
            if ready.has(3) || ready.has(4) {
                // They are looked at next; uncleared they would end the next handover at once.
                control.clear();
                news.clear();
                return true;
            }
            if ready.has(5) {
                calls.disconnect();
            }
            // A vector that was masked when it was cut may be open when it is used next.
            if ready.has(0) || ready.has(1) || ready.has(5) {
                calls.connect();
            }
            if ready.is_none() {
                let now = used_by_kernel(session);
                if std::mem::replace(&mut carried, now) == now {
                    return true;
                }
            }
        }
    }
}

/// The interrupts of both rings while the kernel serves them. KVM sends them itself (irqfd) for as long as the driver leaves their
/// vectors alone; else this thread passes them on.
struct Calls<'a> {
    vhost: &'a Vhost,
    interrupts: &'a Interrupts,
    queues: [usize; RINGS],
    connected: [Option<u64>; RINGS],
    /// The driver has changed something.
    cut: Event,
}

impl<'a> Calls<'a> {
    fn new(vhost: &'a Vhost, session: &Session<'a>) -> io::Result<Calls<'a>> {
        let (interrupts, queues) = (session.interrupts, [session.rx.index(), session.tx.index()]);
        let mut calls = Calls { vhost, interrupts, queues, connected: [None; RINGS], cut: Event::new()? };
        calls.connect();
        Ok(calls)
    }

    /// Those that are not.
    fn connect(&mut self) {
        for ((connected, call), queue) in self.connected.iter_mut().zip(self.vhost.calls()).zip(self.queues) {
            if connected.is_none() {
                *connected = self.interrupts.connect(queue, call, &self.cut);
            }
        }
    }

    fn disconnect(&mut self) {
        for id in self.connected.iter_mut().filter_map(Option::take) {
            self.interrupts.disconnect(id);
        }
        // It tells of our own, too.
        self.cut.clear();
    }

    /// To wait for: those that KVM does not send.
    fn passed_on(&self) -> [PollFd<'a>; RINGS] {
        let [rx, tx] = self.vhost.calls();
        let [rx_flags, tx_flags] =
            self.connected.map(|sent| if sent.is_some() { PollFlags::empty() } else { PollFlags::IN });
        [PollFd::new(rx, rx_flags), PollFd::new(tx, tx_flags)]
    }
}

impl Drop for Calls<'_> {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// Interrupts the driver for what the kernel has used and KVM has not told.
fn tell(vhost: &Vhost, session: &Session<'_>) {
    for (call, queue) in vhost.calls().iter().zip([&*session.rx, &*session.tx]) {
        if call.clear() {
            session.interrupts.used(queue.index());
        }
    }
}

/// How far it has come with both rings.
fn used_by_kernel(session: &Session<'_>) -> [Option<u16>; RINGS] {
    [&*session.rx, &*session.tx].map(|queue| queue.used_by_kernel(session.ram).ok())
}

fn ring<'a>(queue: &'a VirtQueue, ram: &GuestRam) -> Option<Ring<'a>> {
    let [descriptors, available, used] = queue.host_addresses(ram)?;
    Some(Ring { size: queue.size(), next: queue.next(), descriptors, available, used, kick: &queue.kick })
}

const _: () = assert!(RINGS == 2, "receive and transmit");
