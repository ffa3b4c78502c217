//! What a viewer sees of a guest and what it can do to it.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::{
    viewer::{CLOCK_LINE, GREETING, Picture, Rfb, Serial, TYPED_LINE, contains, times},
    world::World,
};

/// Waits until a line of the screen is no longer as it was.
fn line_changes(world: &mut World, line: usize, before: &Picture) {
    world.wait(&format!("line {line} of the screen changes"), |world| {
        Picture::take(world, "t").line(line) != before.line(line)
    });
}

#[test]
fn the_test_guest_greets_on_both_consoles_and_its_time_goes_on() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let mut serial = Serial::open(&world, "t", None);
    assert_eq!((serial.start, serial.skipped), (0, 0));
    serial.until("the greeting", |serial| contains(&serial.seen, GREETING));
    serial.see_it_tick();
    let dump = world.output("guest console t --dump");
    assert!(dump.code == 0 && dump.out.starts_with(GREETING), "{}{}", dump.out, dump.err);

    let first = Picture::take(&world, "t");
    assert_eq!((first.width, first.height), (720, 400));
    assert!(!first.is_blank());
    line_changes(&mut world, CLOCK_LINE, &first);
    assert!(Picture::take(&world, "t").line(2) == first.line(2), "the greeting stays");
}

#[test]
fn keys_of_either_console_are_echoed_on_both() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let mut serial = Serial::open(&world, "t", None);
    serial.see_it_tick();
    let empty = Picture::take(&world, "t");
    serial.type_keys("one");
    serial.expect("one");
    line_changes(&mut world, TYPED_LINE, &empty);
    let one = Picture::take(&world, "t");
    let mut screen = Rfb::open(&world.socket("t", "vnc.sock"));
    screen.type_keys("two");
    serial.expect("onetwo");
    line_changes(&mut world, TYPED_LINE, &one);
}

#[test]
fn every_viewer_of_a_serial_console_sees_the_same() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "quiet");
    let mut viewers: Vec<Serial> = (0..5).map(|_| Serial::open(&world, "t", None)).collect();
    // The line's end, not its text alone: the greeting has letters too, and what is still to come would be missed below.
    for viewer in &mut viewers {
        viewer.expect("\u{1b}[K");
    }
    for (at, text) in ["a", "ab", "abc", "abcd", "abcde"].into_iter().enumerate() {
        viewers[at].type_keys(&text[at..]);
        for viewer in &mut viewers {
            viewer.expect(&format!("{text}\u{1b}[K"));
        }
    }
    let ends: Vec<u64> = viewers.iter().map(|viewer| viewer.next).collect();
    assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
    assert!(viewers.iter().all(|viewer| viewer.seen == viewers[0].seen));
}

#[test]
fn a_quiet_guest_says_nothing_until_a_key_comes() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "quiet");
    let mut serial = Serial::open(&world, "t", None);
    serial.expect("\u{1b}[K");
    let said = serial.next;
    serial.listen(Duration::from_secs(3));
    assert_eq!(serial.next, said, "{}", serial.text());
    serial.type_keys("x");
    serial.expect("x\u{1b}[K");
    serial.type_keys("q");
    serial.see_it_tick();
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let mut serial = Serial::open(&world, "t", None);
    serial.see_it_tick();
    assert_eq!(world.well("guest pause t"), "t: paused\n");
    serial.listen(Duration::from_millis(300));
    let (offset, still) = (serial.next, Picture::take(&world, "t"));
    serial.listen(Duration::from_millis(2500));
    assert_eq!(serial.next, offset, "a paused guest prints nothing");
    assert!(Picture::take(&world, "t").line(CLOCK_LINE) == still.line(CLOCK_LINE), "its clock stands");
    assert_eq!(world.show("t")["state"], "paused");
    let refused = world.output("guest shutdown t");
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("paused"), "{}", refused.err);

    assert_eq!(world.well("guest resume t"), "t: running\n");
    serial.see_it_tick();
    line_changes(&mut world, CLOCK_LINE, &still);
}

#[test]
fn a_reset_keeps_the_scrollback_and_marks_its_place() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "");
    let engine = world.engine("t");
    let mut serial = Serial::open(&world, "t", None);
    serial.see_it_tick();
    serial.type_keys("typed");
    serial.expect("typed");
    world.well("guest reset t");
    serial.expect(GREETING);
    serial.see_it_tick();
    let [mark] = serial.resets[..] else { panic!("one reset: {:?}", serial.resets) };
    let after = &serial.seen[usize::try_from(mark - serial.start).unwrap()..];
    assert!(after.starts_with(GREETING.as_bytes()), "the mark is where the guest began again");
    assert!(!contains(after, "typed"), "what was typed is gone");
    assert_eq!(world.engine("t"), engine, "the engine is the same");

    let mut late = Serial::open(&world, "t", None);
    late.until("all of it", |late| late.next >= serial.next);
    assert_eq!((late.start, &late.resets), (0, &serial.resets));
    assert!(late.seen.starts_with(&serial.seen), "a late viewer sees the same");

    world.well("guest pause t");
    assert_eq!(world.well("guest reset t"), "t: running\n", "a reset ends a pause");
    late.expect(GREETING);
}

#[test]
fn a_powered_off_guest_says_so_and_its_last_words_are_kept() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let engine = world.engine("t");
    let mut serial = Serial::open(&world, "t", None);
    serial.see_it_tick();
    assert_eq!(world.well("guest poweroff t"), "t: stopped\n");
    serial.drain();
    assert_eq!(serial.closed.as_deref(), Some("The guest has stopped."));
    world.wait("the engine is gone", |_| !engine.is_alive());
    let shown = world.show("t");
    assert_eq!((shown["desired"].as_str(), &shown["reason"]), (Some("off"), &serde_json::Value::Null));
    assert_eq!(world.well("guest console t --dump"), serial.text(), "what it said last");
    assert_eq!(world.output("guest poweroff t").code, 1);

    assert_eq!(world.well("guest start t"), "t: running\n");
    let mut again = Serial::open(&world, "t", None);
    again.expect(GREETING);
    assert_ne!(world.engine("t"), engine);
}

#[test]
fn the_power_button_reaches_the_guest_from_a_person_and_from_a_signal() {
    let Some(mut world) = World::new() else { return };
    world.kernel_guest("k", "");
    Serial::open(&world, "k", None).until("it runs", |serial| serial.seen == b"R");
    world.well("guest shutdown k --wait 20");
    assert_eq!(world.states(), [("k".into(), "stopped".into())]);

    world.well("guest start k");
    Serial::open(&world, "k", None).until("it runs", |serial| serial.seen == b"R");
    world.engine("k").signal(Signal::SIGTERM);
    let shown = world.wait_for_state("k", "stopped");
    assert_eq!(shown["desired"], "off");

    // One that does not listen runs on.
    world.test_guest("t", "");
    let engine = world.engine("t");
    engine.signal(Signal::SIGTERM);
    Serial::open(&world, "t", None).see_it_tick();
    assert!(engine.is_alive());
    assert_eq!(world.well("guest shutdown t"), "t: stopping\n");
    Serial::open(&world, "t", None).see_it_tick();
    assert_eq!(world.well("guest poweroff t"), "t: stopped\n");
}

#[test]
fn a_disk_is_booted_by_seabios_whose_words_are_in_the_log() {
    let Some(world) = World::new() else { return };
    if let Some(missing) = firmware_missing(&world) {
        return println!("skipped: {missing}");
    }
    let disk = world.file("disk.img", &super::kernel::disk());
    world
        .well(&format!("guest create d --firmware bios --disk {} --memory 32M --network none --start", disk.display()));
    assert_eq!(world.started("d"), "running");
    let mut serial = Serial::open(&world, "d", None);
    // The firmware waits for a key, and some machines emulate every instruction of it.
    for _ in 0..60 {
        if serial.seen.is_empty() {
            serial.receive(Duration::from_secs(1));
        }
    }
    let log = world.well("guest log d");
    assert_eq!(serial.text(), "R", "{log}");
    for text in ["SeaBIOS (version", "Press ESC for boot menu", "Booting from 0000:7c00"] {
        assert!(log.contains(text), "{text}: {log}");
    }
    let picture = Picture::take(&world, "d");
    assert!(!picture.is_blank(), "the firmware's words are on the screen");
    println!("exits of a start with SeaBIOS: {}", world.get("/api/v1/guests/d/statistics")["exits"]);
    world.well("guest shutdown d --wait 20");
}

#[test]
fn seabios_boots_a_usb_disk_before_the_others_when_it_is_told() {
    let Some(world) = World::new() else { return };
    if let Some(missing) = firmware_missing(&world) {
        return println!("skipped: {missing}");
    }
    let disk = world.file("disk.img", &super::kernel::disk());
    world.well(&format!(
        "guest create d --firmware bios --disk 1M --disk {} --disk-bus usb --memory 32M --network none --boot-order disk2 --start",
        disk.display()
    ));
    let mut serial = Serial::open(&world, "d", None);
    for _ in 0..90 {
        if serial.seen.is_empty() {
            serial.receive(Duration::from_secs(1));
        }
    }
    let log = world.well("guest log d");
    assert_eq!(serial.text(), "R", "{log}");
    // The empty disk is on the same bus, and was not tried.
    assert!(log.contains("Booting from Hard Disk..."), "{log}");
    assert!(!log.contains("not a bootable disk"), "{log}");
    world.well("guest poweroff d");
}

/// What doctor says about a missing SeaBIOS.
fn firmware_missing(world: &World) -> Option<String> {
    let findings: serde_json::Value = serde_json::from_str(&world.output("doctor --json").out).unwrap();
    let firmware = findings.as_array()?.iter().find(|finding| finding["id"] == "firmware_bios")?;
    (firmware["verdict"] == "missing").then(|| firmware["detail"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn times_are_found_between_other_words() {
    assert_eq!(times(b"x\r12:00:01\x1b[K\r12:00:01a\x1b[K\r12:00:02a\r12:0"), ["12:00:01", "12:00:02"]);
}
