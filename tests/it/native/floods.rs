//! A guest that prints as fast as it can, viewers that do not keep up, and what that costs.

use std::time::{Duration, Instant};

use super::{
    viewer::{CLOCK_LINE, Picture, Rfb, Serial},
    world::World,
};

/// What "f" makes the test guest print.
const FLOOD_LINES: usize = 131_072;
const LINE_BYTES: usize = 64;
const FLOOD_BYTES: usize = FLOOD_LINES * LINE_BYTES;

fn lines() -> Vec<u8> {
    (0..FLOOD_LINES).flat_map(|number| format!("{number:08x}{:.<54}\r\n", "").into_bytes()).collect()
}

/// A KVM that emulates every instruction gives some tens of thousands of bytes a second.
const FLOOD_PATIENCE: Duration = Duration::from_secs(600);

/// One flood for three promises, because it takes minutes on a slow KVM.
#[test]
fn eight_mebibytes_reach_who_reads_whole_and_who_stalls_counted_while_the_engine_does_not_grow() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "quiet");
    let engine = world.engine("t");
    let mut stalled = Serial::open(&world, "t", None);
    stalled.expect("\u{1b}[K");
    let mut reading = Serial::open(&world, "t", None);
    reading.expect("\u{1b}[K");
    let (from, begun) = (reading.seen.len(), Instant::now());
    reading.type_keys("f");
    // More than the ring and every buffer on the way hold, and long enough.
    let full = from + (3 << 20);
    reading.until_within(FLOOD_PATIENCE, "the ring is full", |serial| serial.seen.len() >= full || serial.skipped > 0);
    let before = engine.resident_bytes();
    reading.listen(Duration::from_secs(5).saturating_sub(begun.elapsed()));
    stalled.catch_up(&world, "t", reading.next);
    assert!(stalled.skipped > 0, "no buffer on the way holds 3 MiB");
    let (there, recent) = (stalled.next, stalled.seen[stalled.seen.len() - (1 << 19)..].to_vec());

    let whole = from + FLOOD_BYTES;
    reading.until_within(FLOOD_PATIENCE, "the flood", |serial| serial.seen.len() >= whole || serial.skipped > 0);
    let after = engine.resident_bytes();
    println!("{:.0} bytes/s", FLOOD_BYTES as f64 / begun.elapsed().as_secs_f64());
    assert_eq!((reading.start, reading.skipped), (0, 0));
    assert!(reading.seen[from..] == lines(), "every line in its place");
    assert!(after < before + (1 << 20), "{before} bytes became {after}");

    reading.type_keys("x");
    reading.expect("x\u{1b}[K");
    let end = reading.next;
    assert_eq!(end, reading.seen.len() as u64, "what was received is what was printed");
    assert!(reading.seen[..usize::try_from(there).unwrap()].ends_with(&recent), "the stalled one was up to date");
    stalled.catch_up(&world, "t", end);
    assert_eq!(stalled.seen.len() as u64 + stalled.skipped, end, "received and skipped are all there was");

    let mut late = Serial::open(&world, "t", Some(0));
    late.until("the end", |serial| serial.next >= end);
    assert_eq!(late.seen.len() as u64 + late.skipped, end);
    assert!(late.seen.len() <= 1 << 20 && reading.seen.ends_with(&late.seen), "the scrollback is bounded");
}

#[test]
fn a_screen_that_nobody_reads_does_not_slow_the_guest() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "endless");
    let mut serial = Serial::open(&world, "t", None);
    serial.until("it prints", |serial| serial.next > 1 << 14);
    let speed = |serial: &mut Serial| {
        let (from, begun) = (serial.next, Instant::now());
        serial.seen.clear();
        serial.listen(Duration::from_secs(2));
        (serial.next - from) as f64 / begun.elapsed().as_secs_f64()
    };
    let alone = speed(&mut serial);
    let mut stalled: Vec<Rfb> = (0..3).map(|_| Rfb::open(&world.socket("t", "vnc.sock"))).collect();
    for viewer in &mut stalled {
        viewer.request(false);
        viewer.request(true);
    }
    // Others use this machine too: the best of a few looks counts.
    let looks: Vec<f64> = (0..4).map(|_| speed(&mut serial)).collect();
    let best = looks.iter().copied().fold(0.0, f64::max);
    assert!(best > alone * 0.6, "{alone} bytes/s alone, {looks:?} with stalled viewers");
    let before = Picture::take(&world, "t");
    world.wait("the clock on the screen goes on", |world| {
        Picture::take(world, "t").line(CLOCK_LINE) != before.line(CLOCK_LINE)
    });
    let mut fresh = Rfb::open(&world.socket("t", "vnc.sock"));
    fresh.request(false);
    assert_eq!((fresh.width, fresh.height), (720, 400));
}
