//! What a suspended card goes on with.

use super::{settings::saved, *};
use crate::engine::{
    saved::testing::{matches_golden, spoil},
    virtio::testing::{DRIVER_OK, NEEDS_RESET, eventually},
};

const ACCEPTED: Features = VERSION_1 | FEATURES | TAP_FEATURES | 1 << VIRTIO_NET_F_MQ;

/// A card whose driver has set everything.
fn busy() -> (Driver, Vec<UnixDatagram>, NetLink) {
    let (mut driver, far, link) = control::card(2);
    driver.start(ACCEPTED);
    let mut table = vec![1, 0, 0, 0, 2, 0, 0, 0, 0, 7];
    table.extend([2, 0, 0, 0, 3, 0, 0, 0, 0, 8, 0x33, 0x33, 0, 0, 0, 1]);
    for (class, number, data) in [
        (0, 0, &[0][..]),
        (0, 1, &[1]),
        (1, 0, &table),
        (1, 1, &[0x52, 0x54, 0, 9, 9, 9]),
        (4, 0, &[2, 0]),
        (5, 0, &u64::to_le_bytes(1 << VIRTIO_NET_F_GUEST_CSUM)),
    ] {
        assert_eq!(control::command(&mut driver, 4, class, number, data), 0, "{class} {number}");
    }
    link.announce();
    eventually("the question", || driver.messages(0) == 1);
    (driver, far, link)
}

#[test]
fn a_restored_card_goes_on_with_what_its_driver_has_set() {
    let (mut driver, _far, link) = busy();
    let state = matches_golden(&saved::save(&link.0));
    let (mut other, far, restored) = control::card(2);
    // The transport would bring the queues; here a driver sets them up.
    other.prepare(ACCEPTED, 16);
    saved::restore(&restored.0, &state).unwrap();
    assert_eq!(saved::save(&restored.0), saved::save(&link.0));
    other.use_msix();
    other.driver_ok();
    assert_eq!(*restored.0.filter(), *link.0.filter());
    let config = |driver: &mut Driver| {
        (0..3).map(|at| driver.registers.read(Region::Device, 4 * at, Width::B4)).collect::<Vec<_>>()
    };
    assert_eq!(config(&mut other), config(&mut driver));
    assert_eq!(status(&mut other), 3, "it has yet to announce itself");
    assert_eq!(restored.0.offloads(ACCEPTED), 1 << VIRTIO_NET_F_GUEST_CSUM);
    // The second pair is in use.
    other.submit(2, &[writable(BUFFERS, 1526)]);
    far[1].send(&message([0; HEADER_BYTES], &frame(3, 60))).unwrap();
    other.wait_used(2);
    assert_eq!(control::command(&mut other, 4, 3, 0, &[]), 0);
    assert_eq!(status(&mut other), 1);
}

/// A held card with two pairs, with its workers.
fn held() -> (Net, Vec<UnixDatagram>) {
    let (near, far): (Vec<_>, Vec<_>) = (0..2).map(|_| queue()).unzip();
    let (parts, _) = parts(near, NetworkBackend::Tap);
    let net = Net::new(parts).unwrap();
    net.workers().iter().for_each(Worker::hold);
    (net, far)
}

fn each(workers: &[Worker], act: impl Fn(&Worker)) {
    workers.iter().for_each(act);
}

#[test]
fn a_suspended_card_goes_on_with_the_queues_of_every_pair_and_announces_itself() {
    let (net, far) = held();
    let workers = net.workers().to_vec();
    each(&workers, Worker::release);
    let mut driver = Driver::plug(net);
    driver.start(ACCEPTED);
    assert_eq!(control::command(&mut driver, 4, 4, 0, &[2, 0]), 0);
    let at = |queue: u16, number: u64| BUFFERS + 0x1_0000 * u64::from(queue) + 0x1000 * number;
    for (pair, number) in [(0, 3), (1, 5)] {
        let queue = 2 * pair as u16;
        // Of three buffers one is filled; the worker has taken all three.
        for number in 0..3 {
            driver.add(queue, &[writable(at(queue, number), 1526)]);
        }
        driver.registers.kick(queue);
        far[pair].send(&message([0; HEADER_BYTES], &frame(number, 60))).unwrap();
        assert_eq!(driver.wait_used(queue).head, 0);
    }
    let generation = |driver: &mut Driver| driver.registers.read(Region::Common, 0x15, Width::B1);
    let before = generation(&mut driver);
    each(&workers, Worker::hold);

    let (net, far) = held();
    let (workers, link) = (net.workers().to_vec(), net.link());
    let mut other = Driver::plug(net);
    other.take_over(&driver);
    link.announce();
    assert_eq!((generation(&mut other), status(&mut other)), (before, 1));
    assert_eq!((other.messages(0), other.used(0), other.used(2)), (0, None, None));
    each(&workers, Worker::release);
    eventually("the question", || other.messages(0) == 1);
    assert_eq!((generation(&mut other), status(&mut other)), (before + 1, 3));
    for (pair, number) in [(0, 7), (1, 9)] {
        let (rx, tx) = (2 * pair as u16, 2 * pair as u16 + 1);
        far[pair].send(&message([0; HEADER_BYTES], &frame(number, 60))).unwrap();
        let used = other.wait_used(rx);
        assert_eq!((used.head, used.bytes as usize), (1, HEADER_BYTES + 60));
        assert_eq!(other.bytes(at(rx, 1) + HEADER_BYTES as u64, 60), frame(number, 60));
        other.fill(OUT, &message([0; HEADER_BYTES], &frame(number, 100)));
        other.run(tx, &[readable(OUT, HEADER_BYTES as u32 + 100)]);
        let mut sent = [0; 200];
        assert_eq!(far[pair].recv(&mut sent).unwrap(), HEADER_BYTES + 100);
        assert_eq!(sent[HEADER_BYTES..HEADER_BYTES + 100], frame(number, 100));
    }
    assert_eq!(control::command(&mut other, 4, 3, 0, &[]), 0);
    assert_eq!(status(&mut other), 1);
}

#[test]
fn a_pair_whose_queue_was_broken_stays_so_and_the_other_goes_on() {
    let (net, far) = held();
    let workers = net.workers().to_vec();
    each(&workers, Worker::release);
    let mut driver = Driver::plug(net);
    driver.start(ACCEPTED);
    assert_eq!(control::command(&mut driver, 4, 4, 0, &[2, 0]), 0);
    driver.submit(2, &[writable(BUFFERS, 1)]);
    driver.registers.wait_needs_reset();
    each(&workers, Worker::hold);
    drop(far);

    let (net, far) = held();
    let workers = net.workers().to_vec();
    let mut other = Driver::plug(net);
    other.take_over(&driver);
    each(&workers, Worker::release);
    assert_ne!(other.registers.status() & NEEDS_RESET, 0);
    other.submit(0, &[writable(BUFFERS, 1526)]);
    far[0].send(&message([0; HEADER_BYTES], &frame(3, 60))).unwrap();
    other.wait_used(0);
    far[1].send(&message([0; HEADER_BYTES], &frame(3, 60))).unwrap();
    assert_eq!(other.used(2), None);
    other.start(ACCEPTED);
    assert_eq!(control::command(&mut other, 4, 4, 0, &[2, 0]), 0);
    other.submit(2, &[writable(BUFFERS, 1526)]);
    other.wait_used(2);
}

#[test]
fn a_card_with_other_features_or_queues_does_not_go_on() {
    let (mut driver, _far, _) = control::card(2);
    driver.start(ACCEPTED);
    let saved = driver.root.save();
    let (mut single, _far, _) = control::card(1);
    assert!(single.restore(&saved).is_err(), "another number of queues");
    let (mut driver, _far) = tap_with(FEATURES | TAP_FEATURES);
    let saved = driver.root.save();
    let (near, _peer) = UnixStream::pair().unwrap();
    let (mut bare, _) = plug(near.into(), NetworkBackend::Passt);
    assert!(bare.restore(&saved).is_err(), "offloads that are not offered");
    assert_eq!(bare.registers.status() & DRIVER_OK, 0);
    driver.registers.reset();
}

#[test]
fn a_spoilt_state_of_the_transport_is_refused_or_harmless() {
    let (mut driver, _far, _) = busy();
    driver.submit(2, &[writable(BUFFERS, 1526)]);
    let saved = driver.root.save();
    let at = saved.iter().position(|(_, state)| state.kind == "virtio-pci").unwrap();
    let (mut other, _far, _) = control::card(2);
    let (mut taken, mut refused) = (0, 0);
    spoil(&saved[at].1, |bad| {
        let mut saved = saved.clone();
        saved[at].1 = bad.clone();
        match other.restore(&saved) {
            Ok(()) => taken += 1,
            Err(_) => refused += 1,
        }
        (0..5).for_each(|queue| other.registers.kick(queue));
        other.registers.status();
        other.registers.reset();
    });
    assert!(taken >= 10 && refused > 100, "{taken} {refused}");
    other.start(ACCEPTED);
    assert_eq!(control::command(&mut other, 4, 4, 0, &[2, 0]), 0);
}

#[test]
fn a_spoilt_state_is_refused_or_harmless() {
    let (_driver, _far, link) = busy();
    let state = saved::save(&link.0);
    let (mut taken, mut refused) = (0, 0);
    let (near, far) = queue();
    spoil(&state, |bad| {
        let (parts, _) = parts(vec![near.try_clone().unwrap(), near.try_clone().unwrap()], NetworkBackend::Tap);
        let mut net = Net::new(parts).unwrap();
        if net.restore(bad).is_err() {
            refused += 1;
            return;
        }
        taken += 1;
        let link = net.link();
        let mut driver = Driver::plug(net);
        driver.prepare(ACCEPTED, 16);
        saved::restore(&link.0, bad).unwrap();
        driver.driver_ok();
        for at in [0, 4, 8] {
            driver.registers.read(Region::Device, at, Width::B4);
        }
        driver.registers.reset();
        assert!(link.0.uses(0));
    });
    drop(far);
    assert!(taken >= 10 && refused > 40, "{taken} {refused}");
}
