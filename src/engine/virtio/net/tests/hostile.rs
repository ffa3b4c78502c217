//! Drivers that break the rules.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::engine::{memory::Gpa, virtio::testing::eventually};

const MERGEABLE: Features = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn buffers_without_room_for_a_header_need_a_reset_also_when_they_are_merged() {
    let (mut driver, tap) = tap_with(MERGEABLE);
    for size in [0, 1, 11] {
        driver.start(VERSION_1 | MERGEABLE);
        driver.add(RX_QUEUE, &[writable(BUFFERS, 1526)]);
        driver.submit(RX_QUEUE, &[writable(BUFFERS, size)]);
        driver.registers.wait_needs_reset();
    }
    // 12 bytes are enough for one.
    driver.start(VERSION_1 | MERGEABLE);
    for number in 0..16 {
        driver.add(RX_QUEUE, &[writable(BUFFERS + 12 * number, 12)]);
    }
    driver.registers.kick(RX_QUEUE);
    tap.send(&message([0; HEADER_BYTES], &frame(3, 100))).unwrap();
    for bytes in [12, 12, 12, 12, 12, 12, 12, 12, 12, 4] {
        assert_eq!(driver.wait_used(RX_QUEUE).bytes, bytes);
    }
    assert_eq!(driver.bytes(BUFFERS + 10, 102), [&[10, 0], &frame(3, 100)[..]].concat());
}

#[test]
fn chains_of_very_many_pieces_cost_the_driver_its_device_or_its_frame() {
    use crate::engine::virtio::testing::INDIRECT;
    let table = BUFFERS + 0x20_0000;
    for (count, fits) in [(256, true), (257, false), (5000, false)] {
        for features in [0, MERGEABLE] {
            let (mut driver, tap) = tap_with(features | INDIRECT);
            let pieces: Vec<_> = (0..count).map(|at| writable(BUFFERS + at, 1)).collect();
            driver.add_indirect(RX_QUEUE, table, &pieces);
            driver.registers.kick(RX_QUEUE);
            if fits {
                tap.send(&message([0; HEADER_BYTES], &frame(3, 244))).unwrap();
                assert_eq!(driver.wait_used(RX_QUEUE).bytes, 256);
                assert_eq!(driver.bytes(BUFFERS + 12, 244), frame(3, 244));
            } else {
                driver.registers.wait_needs_reset();
            }
            driver.start(VERSION_1 | features | INDIRECT);
            driver.fill(BUFFERS, &[0; 5000]);
            let pieces: Vec<_> = (0..count).map(|at| readable(BUFFERS + at, 1)).collect();
            driver.add_indirect(TX_QUEUE, table, &pieces);
            driver.registers.kick(TX_QUEUE);
            assert_eq!(driver.wait_used(TX_QUEUE).bytes, 0);
            send(&mut driver, &frame(5, 60));
            let mut seen = [0; 6000];
            let first = tap.recv(&mut seen).unwrap();
            assert_eq!(first, if fits { 256 } else { 72 });
        }
    }
    // Many buffers of many pieces: no call is given more than it takes.
    let (mut driver, tap) = tap_with(MERGEABLE | INDIRECT);
    for number in 0..16 {
        let pieces: Vec<_> = (0..200).map(|at| writable(BUFFERS + 0x1000 * number + at, 1)).collect();
        driver.add_indirect(RX_QUEUE, table + 0x1_0000 * number, &pieces);
    }
    driver.registers.kick(RX_QUEUE);
    tap.send(&message([0; HEADER_BYTES], &frame(3, 3000))).unwrap();
    tap.send(&message([0; HEADER_BYTES], &frame(5, 500))).unwrap();
    for bytes in [200, 200, 112] {
        assert_eq!(driver.wait_used(RX_QUEUE).bytes, bytes, "the first was too long for what is taken ahead");
    }
}

#[test]
fn a_command_without_a_place_for_its_answer_needs_a_reset() {
    let (mut driver, _far, _) = control::card(1);
    for pieces in [vec![readable(BUFFERS, 3)], vec![readable(BUFFERS, 3), writable(BUFFERS, 0)]] {
        driver.start(VERSION_1 | FEATURES);
        driver.submit(2, &pieces);
        driver.registers.wait_needs_reset();
    }
    driver.start(VERSION_1 | FEATURES);
    assert_eq!(control::command(&mut driver, 2, 0, 0, &[1]), 0);
    // Bytes that are no answer's are left alone.
    driver.fill(BUFFERS, &[0xee; 8]);
    driver.run(2, &[writable(BUFFERS, 8)]);
    assert_eq!(driver.bytes(BUFFERS, 8), [1, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);
}

#[test]
fn queues_that_are_not_set_up_are_not_served() {
    let (mut driver, _far, link) = control::card(2);
    // Of the second pair one is not ready, and the control queue neither.
    let features = VERSION_1 | FEATURES | 1 << VIRTIO_NET_F_MQ;
    driver.prepare(features, 16);
    for queue in [3, 4] {
        driver.registers.write(Region::Common, 0x16, Width::B2, queue);
        driver.registers.write(Region::Common, 0x1c, Width::B2, 0);
    }
    driver.driver_ok();
    driver.registers.wait_needs_reset();
    (0..5).for_each(|queue| driver.registers.kick(queue));
    driver.start(features);
    assert_eq!(control::command(&mut driver, 4, 4, 0, &[2, 0]), 0);
    assert!(link.0.uses(1));
}

/// Makes everything in a queue available again as soon as it was used.
fn flood(driver: &Driver, queue: u16, over: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let (ram, over, ring) = (driver.ram.clone(), Arc::clone(over), driver.ring(queue));
    thread::spawn(move || {
        while !over.load(Ordering::Acquire) {
            let used = ram.get_u16(Gpa(ring.used() + 2)).unwrap();
            ram.write(Gpa(ring.avail() + 2), &used.wrapping_add(16).to_le_bytes()).unwrap();
        }
    })
}

#[test]
fn a_flood_on_every_queue_holds_up_neither_the_others_nor_a_reset() {
    let (near, far) = queue();
    let (parts, _) = parts(vec![near], NetworkBackend::Tap);
    let mut driver = Driver::plug(Net::new(parts).unwrap());
    driver.start(VERSION_1 | FEATURES);
    driver.fill(BUFFERS, &[0; 0x1000]);
    driver.fill(BUFFERS + 0x1000, &[0, 0, 1]);
    for _ in 0..16 {
        driver.submit(RX_QUEUE, &[writable(BUFFERS + 0x2000, 1526)]);
        driver.submit(TX_QUEUE, &[readable(BUFFERS, 72)]);
        driver.submit(2, &[readable(BUFFERS + 0x1000, 3), writable(BUFFERS + 0x1100, 1)]);
    }
    let over = Arc::new(AtomicBool::new(false));
    let mut threads: Vec<_> = (0..3).map(|queue| flood(&driver, queue, &over)).collect();
    let stop = Arc::clone(&over);
    threads.push(thread::spawn(move || {
        far.set_nonblocking(true).unwrap();
        while !stop.load(Ordering::Acquire) {
            let _ = far.send(&[0; 72]);
            let _ = far.recv(&mut [0; 100]);
        }
    }));
    for queue in 0..3 {
        let before = driver.used_index(queue);
        eventually("turns for all", || {
            (0..3).for_each(|queue| driver.registers.kick(queue));
            driver.used_index(queue).wrapping_sub(before) > 40
        });
    }
    let mut registers = driver.other_vcpu();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        registers.reset();
        tell.send(()).unwrap();
    });
    let reset = told.recv_timeout(DEADLINE);
    over.store(true, Ordering::Release);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(reset, Ok(()));
}

#[test]
fn a_header_that_changes_while_it_is_looked_at_is_sent_as_it_was_checked() {
    let accepted = TAP_FEATURES & 0xffff;
    let (mut driver, tap) = tap_with(accepted);
    let over = Arc::new(AtomicBool::new(false));
    driver.fill(OUT, &[0; 100]);
    let (ram, stop) = (driver.ram.clone(), Arc::clone(&over));
    let change = thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            for offset in [16u16, 0xfff0] {
                let header = [1, 0, 0, 0, 0, 0, 34, 0, offset as u8, (offset >> 8) as u8, 0, 0];
                ram.write(Gpa(OUT), &header).unwrap();
            }
        }
    });
    let reader = thread::spawn(move || {
        let mut seen = [0; 100];
        while tap.recv(&mut seen).is_ok_and(|count| count != 14 + HEADER_BYTES) {
            assert!(seen[8..10] == [16, 0] || seen[..10] == [0; 10], "{:?}", &seen[..12]);
        }
    });
    for _ in 0..5_000 {
        driver.run(TX_QUEUE, &[readable(OUT, 72)]);
    }
    over.store(true, Ordering::Release);
    change.join().unwrap();
    driver.fill(OUT, &[0; 12]);
    // The end, until the reader had room for it.
    while !reader.is_finished() {
        driver.run(TX_QUEUE, &[readable(OUT, 26)]);
    }
    reader.join().unwrap();
}
