//! virtio-net (virtio 1.2, 5.1) on the queues of a tap, or on a stream socket to `passt`. One worker for each pair of queues; the
//! first serves the control queue too.
//!
//! A tap has the same header before each frame as the queues: checksums and segmentation are left to the guest's driver, the
//! kernel or nobody, as the driver accepted. `passt` knows nothing of them, and the guest is not offered them. Streams of a tap the
//! kernel serves by itself where it can (`handover.rs`).
//!
//! ```text
//! queues   0 receive  1 transmit   2 receive  3 transmit   …   2N control; without VIRTIO_NET_F_MQ it is 2
//! ```

mod control;
mod handover;
mod header;
mod receive;
mod settings;
mod transmit;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

pub use self::settings::NetLink;
use self::{
    handover::Load,
    receive::{Received, Receiver},
    settings::{Settings, saved},
};
use super::{
    Features, Interrupts, Kind, Running, VirtioDevice, Worker,
    queue::{Chain, Malformed, VirtQueue},
};
use crate::{
    engine::{
        addresses::AddressWatch,
        event::Event,
        memory::{GuestRam, RamVec},
        net_backend::NetBackend,
        saved::{BadState, SaveState, State},
        tap,
        vhost::Vhost,
        worker::{Served, Stop, Work},
    },
    spec::NetworkBackend,
    types::MacAddr,
};

const QUEUE_SIZE: u16 = 256;
/// Pairs of queues of one card: more workers than that move no more frames.
pub const PAIRS_MAX: usize = 4;
/// Two a pair, and the control queue.
const QUEUES: [u16; 2 * PAIRS_MAX + 1] = [QUEUE_SIZE; 2 * PAIRS_MAX + 1];
/// Frames before other work gets its turn, and the guest an interrupt.
const BURST: usize = 64;
/// More than one full frame is part of a stream: what acknowledges it is there already, as the host answers while we send.
const ANSWERED_BYTES: u64 = 2048;

/// Whatever is behind it.
const FEATURES: Features = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
/// With a tap. Segmentation is the kernel's then, at the last moment or, between guests, never.
const TAP_FEATURES: Features = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
/// With a tap of Linux 6.2 or later.
const TAP_USO_FEATURES: Features =
    1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// What a card is made of.
pub struct NetParts {
    pub backend: NetworkBackend,
    /// A tap's queues, one for each pair of the card's, at most `PAIRS_MAX`, and as many `/dev/vhost-net` where the host has that; or one
    /// socket.
    pub links: Vec<OwnedFd>,
    pub mac: MacAddr,
    /// The longest packet that the network carries, when that is known: the driver sends no longer ones.
    pub mtu: Option<u16>,
    /// Sees what the guest sends, to learn its addresses.
    pub watch: AddressWatch,
}

pub struct Net {
    workers: Vec<Worker>,
    settings: Arc<Settings>,
    offered: Features,
    mtu: u16,
}

impl Net {
    /// The links are made non-blocking. Errors: no link, too many, or what the kernel says.
    pub fn new(parts: NetParts) -> io::Result<Net> {
        let NetParts { backend, links, mac, mtu, watch } = parts;
        let (vhosts, links): (Vec<_>, Vec<_>) = links.into_iter().partition(|link| Vhost::is(link.as_fd()));
        let mut vhosts = vhosts.into_iter();
        let mut offered = FEATURES;
        let mut taps = Vec::new();
        if backend == NetworkBackend::Tap {
            offered |= TAP_FEATURES;
            taps = links.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?;
            if taps.first().is_some_and(|tap| tap::set_offloads(tap.as_fd(), tap::CSUM | tap::USO).is_ok()) {
                offered |= TAP_USO_FEATURES;
            }
        }
        if links.is_empty() || links.len() > if backend == NetworkBackend::Tap { PAIRS_MAX } else { 1 } {
            return Err(io::Error::other(format!("a network card cannot have {} queues here", links.len())));
        }
        if links.len() > 1 {
            offered |= 1 << VIRTIO_NET_F_MQ;
        }
        if mtu.is_some() {
            offered |= 1 << VIRTIO_NET_F_MTU;
        }
        let settings = Settings::new(mac, links.len(), taps)?;
        let mut worker = |(number, link)| {
            let backend = NetBackend::new(link, backend, watch.clone())?;
            let vhost = vhosts.next().map(Vhost::new).transpose()?;
            let (settings, load, chain) = (Arc::clone(&settings), Load::default(), Chain::default());
            Worker::spawn("net", Pair { number, backend, settings, vhost, load, chain })
        };
        let mut workers = Vec::new();
        for link in links.into_iter().enumerate() {
            match worker(link) {
                Ok(worker) => workers.push(worker),
                Err(error) => {
                    workers.iter().for_each(Worker::end);
                    return Err(error);
                }
            }
        }
        Ok(Net { workers, settings, offered, mtu: mtu.unwrap_or_default() })
    }

    /// The host's hold on the card.
    pub fn link(&self) -> NetLink {
        NetLink(Arc::clone(&self.settings))
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Network
    }
    fn queue_sizes(&self) -> &'static [u16] {
        QUEUES.get(..=2 * self.workers.len()).unwrap_or(&QUEUES)
    }
    fn offered(&self) -> Features {
        self.offered
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let mut status = 0;
        if self.settings.is_link_up() {
            status |= VIRTIO_NET_S_LINK_UP;
        }
        if self.settings.is_announcing() {
            status |= VIRTIO_NET_S_ANNOUNCE;
        }
        let mut config = self.settings.filter().mac.0.to_vec();
        for number in [status as u16, self.workers.len() as u16, self.mtu] {
            config.extend(number.to_le_bytes());
        }
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn workers(&self) -> &[Worker] {
        &self.workers
    }
    fn worker_of(&self, queue: usize, accepted: Features) -> usize {
        let several = accepted & 1 << VIRTIO_NET_F_MQ != 0;
        if several && queue != control_queue(self.workers.len(), accepted) { queue / 2 } else { 0 }
    }
}

impl SaveState for Net {
    fn save(&self) -> State {
        saved::save(&self.settings)
    }
    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        saved::restore(&self.settings, state)
    }
}

/// Which queue is the control queue (5.1.2).
fn control_queue(pairs: usize, accepted: Features) -> usize {
    if accepted & 1 << VIRTIO_NET_F_MQ != 0 { 2 * pairs } else { 2 }
}

/// The worker of a pair of queues.
struct Pair {
    number: usize,
    backend: NetBackend,
    settings: Arc<Settings>,
    /// The kernel's own way for streams.
    vhost: Option<Vhost>,
    load: Load,
    /// The frame or command under way.
    chain: Chain,
}

/// What a worker has while the driver runs.
struct Session<'a> {
    ram: &'a GuestRam,
    interrupts: &'a Interrupts,
    features: Features,
    rx: &'a mut VirtQueue,
    tx: &'a mut VirtQueue,
    control: Option<&'a mut VirtQueue>,
    receiver: Receiver,
    /// The frame on its way out.
    pieces: RamVec,
    /// Frames come when the guest has queued buffers; otherwise when there are some.
    waits_for_buffers: bool,
}

/// What became of a burst of the guest's frames.
#[derive(Clone, Copy, Default)]
struct Sent {
    bytes: u64,
    /// It ended before the queue did.
    more: bool,
    /// The rest waits for room on the link.
    waits: bool,
}

/// Which queues may have work.
#[derive(Clone, Copy)]
struct Look {
    rx: bool,
    tx: bool,
    control: bool,
}

const EVERYWHERE: Look = Look { rx: true, tx: true, control: true };

impl Work<Running> for Pair {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, features } = running;
        let (mut rx, mut tx, mut control) = (None, None, None);
        let control_at = control_queue(self.settings.pairs_max(), *features);
        let has_control = self.number == 0 && *features & 1 << VIRTIO_NET_F_CTRL_VQ != 0;
        for queue in queues {
            match queue.index() {
                index if index == control_at => control = Some(queue).filter(|_| has_control),
                index if index == 2 * self.number => rx = Some(queue),
                index if index == 2 * self.number + 1 => tx = Some(queue),
                _ => {}
            }
        }
        let (Some(rx), Some(tx)) = (rx, tx) else { return Err(Malformed) };
        if self.number == 0 {
            self.settings.apply(*features);
        }
        let mut session = Session {
            receiver: Receiver::new(ram, *features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0),
            pieces: RamVec::new(ram),
            waits_for_buffers: false,
            features: *features,
            ram,
            interrupts,
            rx,
            tx,
            control,
        };
        let served = self.run(&mut session, stop);
        session.receiver.give_back(session.rx);
        served
    }

    fn forget(&mut self) {
        self.backend.release_frame();
        if self.number == 0 {
            self.settings.reset();
        }
    }
}

impl Pair {
    fn run(&mut self, session: &mut Session<'_>, stop: &Stop) -> Result<Served, Malformed> {
        let mut look = EVERYWHERE;
        loop {
            self.tell_changes(session);
            let commands = look.control && self.control(session)?;
            let mut more = commands;
            let sent = if look.tx { self.transmit(session)? } else { Sent::default() };
            if look.rx || sent.bytes > ANSWERED_BYTES {
                more |= self.receive(session)?;
            }
            if self.backend.is_broken() {
                self.settings.lose_link();
            }
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            // Nobody would kick for commands that wait already.
            if self.load.add(self.backend.take_carried()) && self.carries() && !commands {
                self.hand_over(session, stop)?;
                look = EVERYWHERE;
                continue;
            }
            // Only now: while frames came in, the driver could queue more without a kick.
            more |= sent.more || (!sent.waits && session.tx.enable_kicks(session.ram)?);
            look = if more { EVERYWHERE } else { self.wait(session, stop) };
        }
    }

    /// Whether frames come and go.
    fn carries(&self) -> bool {
        self.settings.uses(self.number) && self.settings.is_link_up()
    }

    /// Tells the driver that the status is another.
    fn tell_changes(&self, session: &Session<'_>) {
        let can_announce = session.features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0;
        if self.number == 0 && self.settings.take_changes(can_announce) {
            session.interrupts.config_changed();
        }
    }

    fn control(&mut self, session: &mut Session<'_>) -> Result<bool, Malformed> {
        let Session { ram, interrupts, features, control: Some(queue), .. } = session else { return Ok(false) };
        control::serve(ram, queue, interrupts, &mut self.chain, &self.settings, *features)
    }

    /// Sends what the guest has queued, as far as the link takes it. Kicks are off afterwards.
    fn transmit(&mut self, session: &mut Session<'_>) -> Result<Sent, Malformed> {
        let Session { ram, interrupts, features, tx, pieces, .. } = session;
        let carries = self.carries();
        tx.disable_kicks(ram)?;
        let mut sent = Sent { more: true, ..Sent::default() };
        for _ in 0..BURST {
            if !self.backend.has_room() {
                (sent.more, sent.waits) = (false, true);
                break;
            }
            if !tx.pop(ram, &mut self.chain)? {
                sent.more = false;
                break;
            }
            sent.bytes += self.chain.readable_bytes();
            // Without a link they are lost, as on a card.
            if carries {
                transmit::send(ram, &self.chain, &mut self.backend, *features, pieces)?;
            }
            tx.push_quiet(ram, self.chain.head, 0)?;
        }
        self.backend.flush();
        tx.notify(ram, interrupts)?;
        Ok(sent)
    }

    /// Gives the guest the frames that wait. True when more may be there.
    fn receive(&mut self, session: &mut Session<'_>) -> Result<bool, Malformed> {
        let Session { ram, interrupts, features, rx, receiver, waits_for_buffers, .. } = session;
        *waits_for_buffers = false;
        if !self.carries() {
            return Ok(false);
        }
        let offloads = self.settings.offloads(*features);
        rx.disable_kicks(ram)?;
        let mut more = true;
        for _ in 0..BURST {
            match receiver.receive(ram, rx, &mut self.backend, offloads)? {
                Received::Frame => {}
                Received::NoFrame => {
                    more = false;
                    break;
                }
                Received::NoBuffers => {
                    // True: the guest queued a buffer just now.
                    more = rx.enable_kicks(ram)?;
                    *waits_for_buffers = !more;
                    break;
                }
            }
        }
        rx.notify(ram, interrupts)?;
        Ok(more)
    }

    /// Waits for the driver, the host or news, and says what to look at. May return for nothing, and does when the stop is asked.
    fn wait(&self, session: &Session<'_>, stop: &Stop) -> Look {
        let Some(news) = self.settings.news(self.number) else { return EVERYWHERE };
        let wanted = self.backend.wanted(self.carries() && !session.waits_for_buffers, false);
        let when = |kick, wanted| PollFd::new(kick, if wanted { PollFlags::IN } else { PollFlags::empty() });
        let control: &Event = session.control.as_ref().map_or(news, |queue| &queue.kick);
        let (rx, tx) = (&session.rx.kick, &session.tx.kick);
        let events = [tx, rx, control, news];
        let [first, second, third, fourth] =
            [when(tx, true), when(rx, session.waits_for_buffers), when(control, true), when(news, true)];
        let link = PollFd::from_borrowed_fd(self.backend.as_fd(), wanted);
        let ready = if wanted.is_empty() {
            stop.wait_ready(&[first, second, third, fourth])
        } else {
            stop.wait_ready(&[first, second, third, fourth, link])
        };
        let Some(ready) = ready else { return EVERYWHERE };
        for (index, event) in events.into_iter().enumerate() {
            if ready.has(index) {
                event.clear();
            }
        }
        let (news, link) = (ready.has(3), ready.has(4));
        Look {
            tx: ready.has(0) || news || (link && wanted.contains(PollFlags::OUT)),
            rx: ready.has(1) || news || (link && wanted.contains(PollFlags::IN)),
            control: ready.has(2),
        }
    }
}

#[cfg(test)]
mod tests;
