//! virtio-net (virtio 1.2, 5.1) on a tap descriptor, or on a stream socket to `passt`. One pair of queues, one worker.

use std::{io, mem, os::fd::OwnedFd};

use rustix::event::PollFd;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS};

use super::{
    Features, Interrupts, Kind, Running, VirtioDevice, Worker,
    parked::Parked,
    queue::{Chain, Malformed, VirtQueue},
};
use crate::{
    engine::{
        addresses::AddressWatch,
        memory::GuestRam,
        net_backend::{HEADER_BYTES, NetBackend},
        saved::{BadState, SaveState, State},
        worker::{Served, Stop, Work},
    },
    spec::NetworkBackend,
    types::MacAddr,
};

const QUEUE_SIZE: u16 = 256;
const NUM_BUFFERS_OFFSET: u64 = 10;
const LINK_UP: u16 = 1;
/// Frames before other work gets its turn.
const BURST: usize = 256;

pub struct Net {
    worker: Worker,
    mac: MacAddr,
    /// A buffer of the guest that waits for a frame, while nothing is served.
    parked: Parked,
}

impl Net {
    /// `fd` is made non-blocking. `watch` sees what the guest sends, to learn its addresses.
    pub fn new(fd: OwnedFd, backend: NetworkBackend, mac: MacAddr, watch: AddressWatch) -> io::Result<Net> {
        let backend = NetBackend::new(fd, backend, watch)?;
        let parked = Parked::default();
        let frames = Frames {
            backend,
            rx_chain: Chain::default(),
            rx_ready: false,
            tx_chain: Chain::default(),
            parked: parked.clone(),
        };
        Ok(Net { worker: Worker::spawn("net", frames)?, mac, parked })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Network
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn offered(&self) -> Features {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let mut config = self.mac.0.to_vec();
        config.extend(LINK_UP.to_le_bytes());
        config.extend(1u16.to_le_bytes()); // max_virtqueue_pairs
        config.extend(1500u16.to_le_bytes());
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn worker(&self) -> &Worker {
        &self.worker
    }
}

struct Frames {
    backend: NetBackend,
    /// While `rx_ready`, a buffer of the guest that waits for a frame.
    rx_chain: Chain,
    rx_ready: bool,
    tx_chain: Chain,
    /// Where `rx_chain` is while nothing is served.
    parked: Parked,
}

impl Work<Running> for Frames {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        self.rx_ready = false;
        if let Some(chain) = self.parked.take(&running.ram)? {
            self.take_buffer(chain)?;
        }
        let served = self.pass_frames(running, stop)?;
        if self.rx_ready {
            self.parked.put(mem::take(&mut self.rx_chain));
        }
        Ok(served)
    }

    fn forget(&mut self) {
        self.parked.forget();
    }
}

impl Frames {
    /// Serves both queues until the stop is asked.
    fn pass_frames(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let [rx, tx] = queues.as_mut_slice() else { return Err(Malformed) };
        loop {
            let mut more = self.transmit(ram, tx, interrupts)?;
            more |= self.receive(ram, rx, interrupts)?;
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if more {
                continue;
            }
            let wanted = self.backend.wanted(self.rx_ready, false);
            let (kicks, link) = ([rx.kicked(), tx.kicked()], PollFd::from_borrowed_fd(self.backend.as_fd(), wanted));
            let [first, second] = kicks;
            let go_on = if wanted.is_empty() { stop.wait(&[first, second]) } else { stop.wait(&[first, second, link]) };
            if !go_on {
                return Ok(Served::Stopped);
            }
            rx.kick.clear();
            tx.kick.clear();
        }
    }

    /// Makes `chain` what the next frame goes into.
    fn take_buffer(&mut self, chain: Chain) -> Result<(), Malformed> {
        self.rx_chain = chain;
        self.check_buffer()?;
        self.rx_ready = true;
        Ok(())
    }

    fn check_buffer(&self) -> Result<(), Malformed> {
        if self.rx_chain.writable_bytes() < HEADER_BYTES as u64 { Err(Malformed) } else { Ok(()) }
    }

    /// Sends what the guest has queued, as far as the link takes it. True when the burst ended before the queue did.
    fn transmit(&mut self, ram: &GuestRam, tx: &mut VirtQueue, to: &Interrupts) -> Result<bool, Malformed> {
        tx.disable_kicks(ram)?;
        for _ in 0..BURST {
            if !self.backend.has_room() {
                return Ok(false);
            }
            let chain = &mut self.tx_chain;
            if !tx.pop(ram, chain)? {
                return tx.enable_kicks(ram);
            }
            self.backend.send_chain(ram, chain);
            tx.push(ram, chain.head, 0, to)?;
        }
        Ok(true)
    }

    /// Gives the guest the frames that wait. True when more may be there.
    fn receive(&mut self, ram: &GuestRam, rx: &mut VirtQueue, to: &Interrupts) -> Result<bool, Malformed> {
        for _ in 0..BURST {
            if !self.rx_ready {
                self.rx_ready = rx.pop(ram, &mut self.rx_chain)?;
                if !self.rx_ready {
                    // True: the guest queued a buffer just now.
                    return rx.enable_kicks(ram);
                }
                self.check_buffer()?;
            }
            let Some(written) = self.backend.receive_chain(ram, &self.rx_chain)? else { return Ok(false) };
            // virtio 1.2, 5.1.6.4.1: one buffer a frame.
            self.rx_chain.write(ram, NUM_BUFFERS_OFFSET, &1u16.to_le_bytes()).map_err(|_| Malformed)?;
            self.rx_ready = false;
            rx.push(ram, self.rx_chain.head, written, to)?;
        }
        Ok(true)
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use super::super::parked::ParkedV1;

    pub(super) const KIND: &str = "virtio-net";

    /// Frames on their way are lost, as on a wire.
    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) waiting: Option<ParkedV1>,
    }
}

impl SaveState for Net {
    fn save(&self) -> State {
        let Net { worker: _, mac: _, parked } = self;
        State::new(saved::KIND, 1, &saved::V1 { waiting: parked.save() })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let saved::V1 { waiting } = state.fields(saved::KIND, 1)?;
        self.parked.restore(waiting).map_err(|why| BadState::new(saved::KIND, why))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixDatagram, UnixStream},
        sync::{Arc, Mutex, mpsc},
        thread,
        time::Duration,
    };

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::engine::{
        bus::Width,
        saved::testing::{matches_golden, spoil},
        virtio::testing::{
            BUFFERS, DEADLINE, Driver, EVENT_IDX, NEEDS_RESET, Region, VERSION_1, eventually, readable, writable,
        },
    };

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
    const RX_QUEUE: u16 = 0;
    const TX_QUEUE: u16 = 1;
    /// Where frames to send are; buffers for received ones are at `BUFFERS`, 4 KiB each.
    const OUT: u64 = BUFFERS + 0x10_0000;

    type Seen = Arc<Mutex<Vec<Vec<String>>>>;

    fn plug(fd: OwnedFd, backend: NetworkBackend) -> (Driver, Seen) {
        let seen = Seen::default();
        let sink = Arc::clone(&seen);
        let watch = AddressWatch::new(Arc::new(move |list| sink.lock().unwrap().push(list)));
        (Driver::plug(Net::new(fd, backend, MAC, watch).unwrap()), seen)
    }

    /// A datagram socket stands in for the tap: whole messages, each behind a header.
    fn tap() -> (Driver, UnixDatagram, Seen) {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        let (mut driver, seen) = plug(near.into(), NetworkBackend::Tap);
        driver.start(VERSION_1);
        (driver, far, seen)
    }

    fn passt() -> (Driver, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        far.set_write_timeout(Some(DEADLINE)).unwrap();
        let (mut driver, _) = plug(near.into(), NetworkBackend::Passt);
        driver.start(VERSION_1 | EVENT_IDX);
        (driver, far)
    }

    fn offer(driver: &mut Driver, count: u64) {
        for _ in 0..count {
            let at = BUFFERS + 0x1000 * u64::from(driver.next_head(RX_QUEUE));
            driver.add(RX_QUEUE, &[writable(at, 1526)]);
        }
        driver.registers.kick(RX_QUEUE);
    }

    fn received(driver: &mut Driver) -> Vec<u8> {
        let used = driver.wait_used(RX_QUEUE);
        let at = BUFFERS + 0x1000 * u64::from(used.head);
        let header = driver.bytes(at, HEADER_BYTES);
        assert_eq!(header[10..], [1, 0], "num_buffers");
        driver.bytes(at + HEADER_BYTES as u64, used.bytes as usize - HEADER_BYTES)
    }

    fn send(driver: &mut Driver, frame: &[u8]) {
        driver.fill(OUT, &[0; HEADER_BYTES]);
        driver.fill(OUT + HEADER_BYTES as u64, frame);
        let rest = frame.len() as u32;
        let used =
            driver.run(TX_QUEUE, &[readable(OUT, HEADER_BYTES as u32), readable(OUT + HEADER_BYTES as u64, rest)]);
        assert_eq!(used.bytes, 0);
    }

    fn frame(number: u8, bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (at as u8).wrapping_mul(number)).collect()
    }

    fn on_stream(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
    }

    fn from_stream(stream: &mut UnixStream) -> Vec<u8> {
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut frame).unwrap();
        frame
    }

    #[test]
    fn the_configuration_has_the_address_and_the_link() {
        let (mut driver, _peer) = passt();
        assert_eq!(driver.offered() & 0xffff, 1 << VIRTIO_NET_F_MAC, "no offloads, no control queue");
        assert_ne!(driver.offered() & 1 << VIRTIO_NET_F_STATUS, 0);
        let mac: Vec<u8> = (0..6).map(|at| driver.registers.read(Region::Device, at, Width::B1) as u8).collect();
        assert_eq!(mac, MAC.0);
        assert_eq!(driver.registers.read(Region::Device, 6, Width::B2), 1, "link up");
        assert_eq!(driver.queues(), 2);
    }

    #[test]
    fn frames_pass_a_tap_both_ways_with_their_header() {
        let (mut driver, tap, _) = tap();
        let mut message = vec![0; 70_000];
        for (number, bytes) in [(3, 14), (5, 60), (7, 1514)] {
            send(&mut driver, &frame(number, bytes));
            let count = tap.recv(&mut message).unwrap();
            assert_eq!(message[..count], [vec![0; HEADER_BYTES], frame(number, bytes)].concat());
        }
        offer(&mut driver, 4);
        for (number, bytes) in [(3, 60), (5, 1514), (7, 14)] {
            tap.send(&[vec![0; HEADER_BYTES], frame(number, bytes)].concat()).unwrap();
            assert_eq!(received(&mut driver), frame(number, bytes));
        }
        crate::engine::virtio::testing::eventually("interrupts", || driver.messages(1) == 3 && driver.messages(2) == 3);
    }

    #[test]
    fn frames_pass_the_stream_both_ways_behind_their_length() {
        let (mut driver, mut peer) = passt();
        for (number, bytes) in [(3, 14), (5, 60), (7, 1514), (9, 65_535)] {
            send(&mut driver, &frame(number, bytes));
            assert_eq!(from_stream(&mut peer), frame(number, bytes));
        }
        offer(&mut driver, 8);
        // Two frames and the beginning of a third in one piece, then its rest byte by byte.
        let third = on_stream(&frame(7, 60));
        let bytes = [on_stream(&frame(3, 60)), on_stream(&frame(5, 1514)), third[..3].to_vec()].concat();
        peer.write_all(&bytes).unwrap();
        assert_eq!(received(&mut driver), frame(3, 60));
        assert_eq!(received(&mut driver), frame(5, 1514));
        for byte in &third[3..] {
            peer.write_all(&[*byte]).unwrap();
        }
        assert_eq!(received(&mut driver), frame(7, 60));
    }

    #[test]
    fn frames_wait_for_buffers_and_come_in_order() {
        let (mut driver, mut peer) = passt();
        for number in 0..40 {
            peer.write_all(&on_stream(&frame(number, 100))).unwrap();
        }
        for number in 0..40 {
            offer(&mut driver, 1);
            assert_eq!(received(&mut driver), frame(number, 100));
        }
    }

    #[test]
    fn a_frame_larger_than_the_buffer_is_cut_and_the_next_is_whole() {
        let (mut driver, mut peer) = passt();
        driver.add(RX_QUEUE, &[writable(BUFFERS, 12), writable(BUFFERS + 12, 50)]);
        driver.add(RX_QUEUE, &[writable(BUFFERS + 0x1000, 1526)]);
        driver.fill(BUFFERS + 62, &[0xaa; 8]);
        driver.registers.kick(RX_QUEUE);
        peer.write_all(&[on_stream(&frame(3, 100)), on_stream(&frame(5, 100))].concat()).unwrap();
        assert_eq!(driver.wait_used(RX_QUEUE).bytes, 62);
        assert_eq!(driver.bytes(BUFFERS + 12, 58), [&frame(3, 100)[..50], &[0xaa; 8]].concat());
        assert_eq!(driver.wait_used(RX_QUEUE).bytes, 112);
        let (mut driver, tap, _) = tap();
        driver.submit(RX_QUEUE, &[writable(BUFFERS, 62)]);
        tap.send(&[vec![0; HEADER_BYTES], frame(3, 100)].concat()).unwrap();
        assert_eq!(driver.wait_used(RX_QUEUE).bytes, 62);
    }

    #[test]
    fn what_is_no_frame_is_not_sent() {
        let (mut driver, mut peer) = passt();
        driver.fill(OUT, &[0; 0x100]);
        for pieces in [
            vec![readable(OUT, HEADER_BYTES as u32)],
            vec![readable(OUT, 3)],
            vec![readable(OUT, 70_000)],
            vec![readable(OUT, 1 << 20), readable(OUT, 1 << 20)],
            vec![writable(OUT, 64)],
        ] {
            driver.run(TX_QUEUE, &pieces);
        }
        send(&mut driver, &frame(3, 60));
        assert_eq!(from_stream(&mut peer), frame(3, 60), "the first thing on the stream");
    }

    #[test]
    fn a_receive_buffer_without_room_for_the_header_needs_a_reset() {
        let (mut driver, mut peer) = passt();
        for piece in [writable(BUFFERS, 11), readable(BUFFERS, 1526)] {
            driver.submit(RX_QUEUE, &[piece]);
            driver.registers.wait_needs_reset();
            driver.start(VERSION_1);
        }
        driver.prepare(VERSION_1, 16);
        driver.registers.write(Region::Common, 0x16, Width::B2, 1);
        driver.registers.write(Region::Common, 0x1c, Width::B2, 0);
        driver.driver_ok();
        driver.registers.wait_needs_reset();
        driver.start(VERSION_1);
        offer(&mut driver, 1);
        peer.write_all(&on_stream(&frame(3, 60))).unwrap();
        assert_eq!(received(&mut driver), frame(3, 60));
    }

    #[test]
    fn a_peer_that_goes_in_the_middle_of_a_frame_takes_only_the_link_with_it() {
        for last in [&[0, 0][..], &[0, 0, 0, 100, 1, 2, 3], &[0xff, 0xff, 0xff, 0xff, 1]] {
            let (mut driver, mut peer) = passt();
            offer(&mut driver, 2);
            peer.write_all(&on_stream(&frame(3, 60))).unwrap();
            peer.write_all(last).unwrap();
            assert_eq!(received(&mut driver), frame(3, 60));
            drop(peer);
            for _ in 0..20 {
                send(&mut driver, &frame(5, 1514));
            }
            assert!(driver.used(RX_QUEUE).is_none());
            driver.start(VERSION_1);
            send(&mut driver, &frame(5, 1514));
        }
    }

    #[test]
    fn a_tap_that_is_gone_gives_no_empty_frames() {
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        let (mut driver, _) = plug(near, NetworkBackend::Tap);
        driver.start(VERSION_1);
        drop(far);
        offer(&mut driver, 4);
        for _ in 0..5 {
            send(&mut driver, &frame(3, 60));
        }
        assert!(driver.used(RX_QUEUE).is_none());
    }

    #[test]
    fn a_peer_that_does_not_read_stops_neither_receiving_nor_a_reset() {
        let (mut driver, mut peer) = passt();
        driver.start(VERSION_1);
        driver.fill(OUT, &[0; HEADER_BYTES]);
        let big = frame(3, 60_000);
        driver.fill(OUT + HEADER_BYTES as u64, &big);
        let mut sent = 0;
        for _ in 0..16 {
            driver.submit(TX_QUEUE, &[readable(OUT, HEADER_BYTES as u32 + 60_000)]);
        }
        offer(&mut driver, 4);
        for number in 0..4 {
            peer.write_all(&on_stream(&frame(number, 60))).unwrap();
            assert_eq!(received(&mut driver), frame(number, 60));
        }
        while driver.used(TX_QUEUE).is_some() {
            sent += 1;
        }
        assert!(sent < 16, "the socket is full");
        let mut registers = driver.other_vcpu();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            registers.reset();
            tell.send(()).unwrap();
        });
        // Far less than the two seconds that a write may be refused.
        told.recv_timeout(Duration::from_secs(1)).expect("a reset does not wait for the peer");
        driver.start(VERSION_1);
        let reader = thread::spawn(move || {
            let mut frames = 0;
            loop {
                let got = from_stream(&mut peer);
                if got.len() == 14 {
                    return frames;
                }
                assert!(got == big, "whole frames only");
                frames += 1;
            }
        });
        send(&mut driver, &frame(5, 14));
        let frames = reader.join().unwrap();
        assert!((sent..=sent + 1).contains(&frames), "{frames} frames of {sent} that were taken");
    }

    #[test]
    fn the_guests_address_is_learnt_from_what_it_sends() {
        let (mut driver, _tap, seen) = tap();
        let mut arp = vec![0xff; 12];
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 0, 9]);
        arp.extend([0; 22]);
        send(&mut driver, &arp);
        assert_eq!(*seen.lock().unwrap(), [vec!["10.0.0.9".to_owned()]]);
        let used = driver.run(TX_QUEUE, &[readable(OUT, 20)]);
        assert_eq!(used.bytes, 0, "eight bytes of a frame");
    }

    /// A stream and another handle on the device behind it.
    fn passt_with_twin() -> (Driver, UnixStream, Net) {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        let watch = AddressWatch::new(Arc::new(|_| ()));
        let net = Net::new(near.into(), NetworkBackend::Passt, MAC, watch).unwrap();
        let twin = Net { worker: net.worker.clone(), mac: MAC, parked: net.parked.clone() };
        (Driver::plug(net), far, twin)
    }

    /// The state of a card whose buffer waits for a frame.
    fn waiting_for_a_frame() -> State {
        let (mut driver, _peer, twin) = passt_with_twin();
        driver.start(VERSION_1 | EVENT_IDX);
        offer(&mut driver, 1);
        eventually("the buffer is taken", || {
            twin.worker.release();
            twin.worker.hold();
            twin.parked.save().is_some()
        });
        twin.save()
    }

    #[test]
    fn a_buffer_that_waits_for_a_frame_gets_it_after_a_restore() {
        let state = matches_golden(&waiting_for_a_frame());
        let (mut driver, mut peer, mut twin) = passt_with_twin();
        twin.worker.hold();
        driver.start(VERSION_1);
        twin.restore(&state).unwrap();
        twin.worker.release();
        peer.write_all(&on_stream(&frame(3, 60))).unwrap();
        assert_eq!(received(&mut driver), frame(3, 60), "no buffer was offered to this one");
        offer(&mut driver, 1);
        for number in 0..20 {
            // Pauses lose no buffer either.
            twin.worker.hold();
            twin.worker.release();
            peer.write_all(&on_stream(&frame(number, 100))).unwrap();
            assert_eq!(received(&mut driver), frame(number, 100));
            offer(&mut driver, 1);
        }
        driver.registers.reset();
        assert!(twin.save().fields::<saved::V1>("virtio-net", 1).unwrap().waiting.is_none());
    }

    #[test]
    fn no_saved_buffer_makes_it_panic_or_leave_ram() {
        let (mut driver, mut peer, mut twin) = passt_with_twin();
        let mut refused = 0;
        spoil(&waiting_for_a_frame(), |bad| {
            twin.worker.hold();
            driver.start(VERSION_1);
            refused += usize::from(twin.restore(bad).is_err());
            driver.fill(OUT, &[0; 0x100]);
            driver.submit(TX_QUEUE, &[readable(OUT, HEADER_BYTES as u32), readable(OUT + HEADER_BYTES as u64, 60)]);
            offer(&mut driver, 1);
            peer.write_all(&on_stream(&frame(3, 60))).unwrap();
            twin.worker.release();
            eventually("an end", || driver.used(RX_QUEUE).is_some() || driver.registers.status() & NEEDS_RESET != 0);
            twin.worker.hold();
            if driver.registers.status() & NEEDS_RESET == 0 {
                assert_eq!(from_stream(&mut peer).len(), 60);
            }
        });
        assert!(refused > 20, "{refused}");
    }
}
