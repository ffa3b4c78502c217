//! The control queue, the link and several pairs.

use super::*;

const ALL: Features = FEATURES | TAP_FEATURES;
const CONTROL: Features = FEATURES & !(1 << VIRTIO_NET_F_MRG_RXBUF);
/// Where commands are, and their answers.
const COMMAND: u64 = BUFFERS + 0x30_0000;
const ANSWER: u64 = COMMAND + 0x1000;

/// Gives the answer.
pub(super) fn command(driver: &mut Driver, queue: u16, class: u8, command: u8, data: &[u8]) -> u8 {
    driver.fill(COMMAND, &[&[class, command], data].concat());
    driver.fill(ANSWER, &[0xee]);
    // As Linux has it: class and command, data, answer.
    let used =
        driver.run(queue, &[readable(COMMAND, 2), readable(COMMAND + 2, data.len() as u32), writable(ANSWER, 1)]);
    assert_eq!(used.bytes, 1);
    driver.bytes(ANSWER, 1)[0]
}

fn table(unicast: usize, multicast: usize) -> Vec<u8> {
    let addresses = |count: usize, first: u8| {
        let list = (0..count).flat_map(move |index| [first, 0, 0, 0, (index >> 8) as u8, index as u8]);
        [(count as u32).to_le_bytes().to_vec(), list.collect()].concat()
    };
    [addresses(unicast, 2), addresses(multicast, 3)].concat()
}

/// A card with pairs, the host's ends of its queues, and the host's hold on it.
pub(super) fn card(pairs: usize) -> (Driver, Vec<UnixDatagram>, NetLink) {
    let (near, far): (Vec<_>, Vec<_>) = (0..pairs).map(|_| queue()).unzip();
    let (parts, _) = parts(near, NetworkBackend::Tap);
    let net = Net::new(parts).unwrap();
    let link = net.link();
    (Driver::plug(net), far, link)
}

#[test]
fn modes_and_addresses_are_kept_and_become_the_taps_filter() {
    let (mut driver, _far, link) = card(1);
    driver.start(VERSION_1 | CONTROL);
    let filter = || link.0.filter().clone();
    assert!(filter().promiscuous, "at first everything comes");
    assert_eq!(filter().of_tap(), (false, vec![]));
    assert_eq!(command(&mut driver, 2, 0, 0, &[0]), 0);
    let broadcast = MacAddr([0xff; 6]);
    assert_eq!(filter().of_tap(), (false, vec![MAC, broadcast]));
    assert_eq!(command(&mut driver, 2, 0, 1, &[1]), 0);
    assert_eq!(filter().of_tap(), (true, vec![MAC, broadcast]));
    assert_eq!(command(&mut driver, 2, 0, 1, &[0]), 0);
    assert_eq!(command(&mut driver, 2, 1, 0, &table(1, 2)), 0);
    let one = |first, last| MacAddr([first, 0, 0, 0, 0, last]);
    assert_eq!(filter().of_tap(), (false, vec![MAC, one(2, 0), broadcast, one(3, 0), one(3, 1)]));
    assert_eq!(command(&mut driver, 2, 1, 0, &table(0, 300)), 0);
    assert_eq!(filter().of_tap(), (true, vec![MAC, broadcast]), "more than are kept");
    assert_eq!(command(&mut driver, 2, 1, 0, &table(8, 1)), 0);
    assert_eq!(filter().of_tap(), (false, vec![]), "more than are compared: everything");
    assert_eq!(command(&mut driver, 2, 1, 0, &table(7, 64)), 0);
    assert_eq!(filter().of_tap().1.len(), 73);
    let address = [0x52, 0x54, 0, 9, 9, 9];
    assert_eq!(command(&mut driver, 2, 1, 1, &address), 0);
    assert_eq!(filter().of_tap().1[0], MacAddr(address));
    let seen: Vec<u8> = (0..6).map(|at| driver.registers.read(Region::Device, at, Width::B1) as u8).collect();
    assert_eq!(seen, address);
    driver.registers.reset();
    assert_eq!(filter().of_tap(), (false, vec![]), "a new driver finds a new card");
    assert_eq!(driver.registers.read(Region::Device, 3, Width::B1), 1);
}

#[test]
fn what_is_no_command_or_was_not_negotiated_is_refused() {
    let (mut driver, _far, link) = card(2);
    driver.start(VERSION_1 | ALL | 1 << VIRTIO_NET_F_MQ);
    let before = link.0.filter().clone();
    let long_table = [&u32::MAX.to_le_bytes()[..], &[0; 100]].concat();
    for (class, number, data) in [
        (0, 0, &[][..]),
        (0, 2, &[1]),
        (0, 255, &[1]),
        (1, 0, &[]),
        (1, 0, &[0; 4]),
        (1, 0, &[0; 7]),
        (1, 0, &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        (1, 0, &long_table),
        (1, 1, &[2, 0, 0, 0, 0]),
        (1, 1, &[3, 0, 0, 0, 0, 1]),
        (1, 2, &[0; 6]),
        (2, 0, &[1, 0]),
        (3, 1, &[]),
        (4, 0, &[0, 0]),
        (4, 0, &[3, 0]),
        (4, 0, &[0xff, 0xff]),
        (4, 0, &[1]),
        (4, 1, &[1, 0]),
        (5, 0, &[0xff; 8]),
        (5, 0, &[0; 7]),
        (255, 255, &[0xff; 64]),
    ] {
        assert_eq!(command(&mut driver, 4, class, number, data), 1, "{class} {number}");
    }
    // Half a command.
    driver.fill(COMMAND, &[0]);
    driver.run(4, &[readable(COMMAND, 1), writable(ANSWER, 1)]);
    assert_eq!(driver.bytes(ANSWER, 1), [1]);
    assert_eq!(*link.0.filter(), before);
    assert!(link.0.uses(0) && !link.0.uses(1));
    driver.start(VERSION_1 | 1 << VIRTIO_NET_F_CTRL_VQ);
    for (class, number, data) in [
        (0, 0, &[0][..]),
        (0, 1, &[1]),
        (1, 0, &table(1, 1)),
        (1, 1, &[2, 0, 0, 0, 0, 1]),
        (3, 0, &[]),
        (4, 0, &[1, 0]),
        (5, 0, &[0; 8]),
    ] {
        assert_eq!(command(&mut driver, 2, class, number, data), 1, "{class} {number}");
    }
    assert_eq!(*link.0.filter(), before);
}

#[test]
fn offloads_are_switched_off_and_on_while_the_driver_runs() {
    let (mut driver, far, link) = card(1);
    driver.start(VERSION_1 | ALL & !(1 << VIRTIO_NET_F_MRG_RXBUF));
    let checksum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let tcp = 1 << VIRTIO_NET_F_GUEST_TSO4;
    assert_eq!(link.0.offloads(ALL), ALL & GUEST_OFFLOADS);
    let mut header = [0; HEADER_BYTES];
    (header[0], header[1]) = (NEEDS_CSUM, TCPV4);
    offer(&mut driver, 3);
    far[0].send(&message(header, &frame(3, 60))).unwrap();
    assert_eq!(received(&mut driver), frame(3, 60));
    assert_eq!(command(&mut driver, 2, 5, 0, &u64::to_le_bytes(checksum)), 0);
    assert_eq!(link.0.offloads(ALL), checksum);
    far[0].send(&message(header, &frame(5, 60))).unwrap();
    header[1] = 0;
    far[0].send(&message(header, &frame(7, 60))).unwrap();
    assert_eq!(received(&mut driver), frame(7, 60), "the one before was left out");
    assert_eq!(command(&mut driver, 2, 5, 0, &u64::to_le_bytes(checksum | tcp)), 0);
    header[1] = TCPV4;
    far[0].send(&message(header, &frame(9, 60))).unwrap();
    assert_eq!(received(&mut driver), frame(9, 60));
    driver.start(VERSION_1 | ALL);
    assert_eq!(link.0.offloads(ALL), ALL & GUEST_OFFLOADS, "all that was accepted, after a reset");
}

#[test]
fn the_driver_is_asked_to_announce_itself_until_it_does() {
    let (mut driver, _far, link) = card(1);
    driver.start(VERSION_1 | CONTROL);
    let generation = |driver: &mut Driver| driver.registers.read(Region::Common, 0x15, Width::B1);
    let before = generation(&mut driver);
    link.announce();
    crate::engine::virtio::testing::eventually("the question", || driver.messages(0) == 1);
    assert_eq!(status(&mut driver), 3);
    assert_ne!(generation(&mut driver), before);
    assert_eq!(command(&mut driver, 2, 3, 0, &[]), 0);
    assert_eq!(status(&mut driver), 1);
    assert_eq!(driver.messages(0), 1);
    link.announce();
    crate::engine::virtio::testing::eventually("the question", || driver.messages(0) == 2);
    driver.start(VERSION_1);
    assert_eq!(status(&mut driver), 1, "not what another driver was asked");
    link.announce();
    send(&mut driver, &frame(3, 60));
    assert_eq!((status(&mut driver), driver.messages(0)), (1, 2), "it cannot");
}

#[test]
fn a_pulled_cable_is_seen_and_carries_nothing() {
    let (mut driver, far, link) = card(1);
    driver.start(VERSION_1 | CONTROL | EVENT_IDX);
    offer(&mut driver, 2);
    link.set_up(false);
    link.set_up(false);
    crate::engine::virtio::testing::eventually("the news", || driver.messages(0) == 1);
    assert_eq!(status(&mut driver), 0);
    send(&mut driver, &frame(3, 60));
    far[0].send(&message([0; HEADER_BYTES], &frame(5, 60))).unwrap();
    thread::sleep(Duration::from_millis(5));
    assert!(driver.used(RX_QUEUE).is_none());
    link.set_up(true);
    crate::engine::virtio::testing::eventually("the news", || driver.messages(0) == 2);
    assert_eq!(received(&mut driver), frame(5, 60));
    send(&mut driver, &frame(7, 60));
    let mut seen = [0; 100];
    assert_eq!(far[0].recv(&mut seen).unwrap(), 72);
    assert_eq!(seen[HEADER_BYTES..72], frame(7, 60), "what was sent without a link is lost");
}

#[test]
fn a_peer_that_is_gone_for_good_takes_the_link_down() {
    let (mut driver, peer) = passt();
    drop(peer);
    offer(&mut driver, 1);
    crate::engine::virtio::testing::eventually("the news", || driver.messages(0) == 1);
    assert_eq!(status(&mut driver), 0);
    driver.start(VERSION_1);
    assert_eq!(status(&mut driver), 0, "still");
}

#[test]
fn pairs_carry_frames_as_soon_as_the_driver_says_so() {
    let (mut driver, far, link) = card(3);
    driver.start(VERSION_1 | CONTROL | 1 << VIRTIO_NET_F_MQ | EVENT_IDX);
    let at = |queue: u16, head: u16| BUFFERS + 0x1_0000 * u64::from(queue) + 0x1000 * u64::from(head);
    let pass = |driver: &mut Driver, pair: u16, number: u8| {
        let head = driver.next_head(2 * pair);
        driver.submit(2 * pair, &[writable(at(2 * pair, head), 1526)]);
        far[usize::from(pair)].send(&message([0; HEADER_BYTES], &frame(number, 60))).unwrap();
        let used = driver.wait_used(2 * pair);
        assert_eq!(driver.bytes(at(2 * pair, used.head) + HEADER_BYTES as u64, 60), frame(number, 60), "in {pair}");
        driver.fill(at(2 * pair + 1, 0), &message([0; HEADER_BYTES], &frame(number, 100)));
        driver.run(2 * pair + 1, &[readable(at(2 * pair + 1, 0), HEADER_BYTES as u32 + 100)]);
        let mut seen = [0; 200];
        assert_eq!(far[usize::from(pair)].recv(&mut seen).unwrap(), HEADER_BYTES + 100);
        assert_eq!(seen[HEADER_BYTES..HEADER_BYTES + 100], frame(number, 100), "out of {pair}");
    };
    pass(&mut driver, 0, 3);
    assert_eq!(command(&mut driver, 6, 4, 0, &[3, 0]), 0);
    for round in 0..20 {
        (0..3).for_each(|pair| pass(&mut driver, pair, 5 + round));
    }
    let vectors: Vec<_> = (1..=6).map(|vector| driver.messages(vector) > 0).collect();
    assert_eq!(vectors, [true; 6], "each queue has its own");
    assert_eq!(command(&mut driver, 6, 4, 0, &[2, 0]), 0);
    (0..2).for_each(|pair| pass(&mut driver, pair, 7));
    driver.submit(4, &[writable(at(4, 0), 1526)]);
    far[2].send(&message([0; HEADER_BYTES], &frame(3, 60))).unwrap();
    thread::sleep(Duration::from_millis(5));
    assert!(driver.used(4).is_none(), "the third is not used");
    driver.registers.reset();
    assert!(link.0.uses(0) && !link.0.uses(1), "one at first");
    // Without the feature queue 2 is the control queue, and those behind it are nothing.
    driver.start(VERSION_1 | CONTROL);
    assert_eq!(command(&mut driver, 2, 0, 0, &[0]), 0);
    driver.registers.kick(3);
    driver.registers.kick(6);
    pass(&mut driver, 0, 9);
    assert_eq!(driver.registers.status() & 64, 0);
}

#[test]
fn frames_of_every_pair_pass_while_others_reset_and_pause() {
    let (near, far): (Vec<_>, Vec<_>) = (0..2).map(|_| queue()).unzip();
    let (parts, _) = parts(near, NetworkBackend::Tap);
    let net = Net::new(parts).unwrap();
    let workers = net.workers.clone();
    let mut driver = Driver::plug(net);
    let sink = far[1].try_clone().unwrap();
    sink.set_nonblocking(true).unwrap();
    for round in 0..50 {
        driver.start(VERSION_1 | CONTROL | 1 << VIRTIO_NET_F_MQ);
        assert_eq!(command(&mut driver, 4, 4, 0, &[2, 0]), 0);
        for queue in [0, 2] {
            driver.submit(queue, &[writable(BUFFERS + 0x1000 * u64::from(queue), 1526)]);
        }
        for tap in &far {
            tap.send(&message([0; HEADER_BYTES], &frame(3, 60))).unwrap();
        }
        if round % 2 == 0 {
            workers.iter().for_each(Worker::hold);
            workers.iter().for_each(Worker::release);
        }
        driver.wait_used(0);
        driver.wait_used(2);
        driver.fill(OUT, &message([0; HEADER_BYTES], &frame(3, 60)));
        driver.run(3, &[readable(OUT, 72)]);
        while sink.recv(&mut [0; 100]).is_ok() {}
    }
}
