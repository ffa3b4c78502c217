//! Suspended to disk, and gone on from there.

use std::{fs, os::unix::fs::FileExt, path::PathBuf};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
};

use super::{
    viewer::{GREETING, Picture, Serial, contains},
    world::{Who, World},
};

fn suspended(world: &World, name: &str) -> PathBuf {
    let id = world.show(name)["id"].as_str().unwrap().to_owned();
    world.state().join("guests").join(id).join("suspended")
}

/// A running guest that has echoed "kept", suspended.
fn suspend(world: &mut World, name: &str) -> Serial {
    let engine = world.engine(name);
    let mut serial = Serial::open(world, name, None);
    serial.see_it_tick();
    serial.type_keys("kept");
    serial.expect("kept");
    assert_eq!(world.well(&format!("guest suspend {name}")), format!("{name}: suspended\n"));
    serial.drain();
    world.wait("the engine is gone", |_| !engine.is_alive());
    let shown = world.show(name);
    assert_eq!((shown["state"].as_str(), shown["desired"].as_str()), (Some("suspended"), Some("off")));
    assert!(suspended(world, name).exists());
    serial
}

/// It goes on with the line that was typed, after everything that was printed before, and without a new greeting.
fn goes_on(world: &mut World, name: &str, before: &Serial) {
    world.wait_for_state(name, "running");
    let mut after = Serial::open(world, name, None);
    after.until("what was printed before", |after| after.next >= before.next);
    assert!(after.seen.starts_with(&before.seen), "the scrollback is whole");
    after.see_it_tick();
    after.type_keys(" on");
    after.expect("kept on");
    assert!(!contains(&after.seen[before.seen.len()..], GREETING), "{}", after.text());
    world.wait("the saved state is gone", |world| !suspended(world, name).exists());
}

#[test]
fn a_suspended_guest_goes_on_after_a_restart_of_the_server_as_anybody() {
    for who in [Who::Root, Who::Ordinary] {
        let Some(mut world) = World::of(who) else { return };
        world.test_guest("t", "");
        let before = suspend(&mut world, "t");
        world.end_server();
        world.start();
        assert_eq!(world.show("t")["state"], "suspended", "also after a restart");
        assert_eq!(world.well("guest start t"), "t: running\n");
        goes_on(&mut world, "t", &before);
        // A reset begins anew, and what was suspended once can be again.
        world.well("guest reset t");
        let mut serial = Serial::open(&world, "t", None);
        serial.expect(GREETING);
        let again = suspend(&mut world, "t");
        assert_eq!(world.well("guest resume t"), "t: running\n");
        goes_on(&mut world, "t", &again);
    }
}

#[test]
fn a_paused_guest_can_be_suspended_and_what_it_shows_is_kept() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "quiet");
    let mut serial = Serial::open(&world, "t", None);
    serial.expect(GREETING);
    world.well("guest pause t");
    let before = Picture::take(&world, "t");
    world.well("guest suspend t");
    assert_eq!(world.well("guest start t"), "t: running\n");
    let after = Picture::take(&world, "t");
    for line in 0..8 {
        assert!(before.line(line) == after.line(line), "line {line} of the screen");
    }
    let mut serial = Serial::open(&world, "t", None);
    serial.type_keys("x");
    serial.expect("x");
}

#[test]
fn a_start_that_is_refused_leaves_a_suspended_guest_suspended() {
    let Some(mut world) = World::new() else { return };
    world.well("guest create t --test-guest --memory 16M --network none --disk 1M --start");
    world.wait_for_state("t", "running");
    let before = suspend(&mut world, "t");
    let disk = world.show("t")["disks"][0]["id"].as_str().unwrap().to_owned();
    let path = world.state().join("disks").join(format!("{disk}.raw"));
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    // As another program that reads the disk would, for a copy.
    let lock = libc_flock();
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    for _ in 0..2 {
        let refused = world.output("guest start t");
        assert_eq!(refused.code, 1, "{}", refused.out);
        assert_eq!(world.show("t")["state"], "suspended", "{}", refused.err);
        assert!(suspended(&world, "t").exists());
        assert!(world.output("guest set t --memory 32M").err.contains("suspended"));
    }
    drop(file);
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
}

#[test]
fn a_network_that_the_host_cannot_make_leaves_a_guest_without_one_that_can_be_suspended() {
    let Some(mut world) = World::of(Who::Ordinary) else { return };
    world.test_guest("t", "");
    let refused = world.output("guest set t --network nat");
    assert_eq!(refused.code, 1, "{}", refused.out);
    assert!(refused.err.contains("no network card now"), "{}", refused.err);
    assert_eq!(world.show("t")["network"]["mode"], "none");
    let before = suspend(&mut world, "t");
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
}

fn libc_flock() -> nix::libc::flock {
    nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[test]
fn a_guest_whose_medium_and_disks_were_changed_goes_on() {
    let Some(mut world) = World::new() else { return };
    let mut disc = [0; 64 << 10];
    disc[0x8000..0x8006].copy_from_slice(b"\x01CD001");
    let disc = world.file("disc.iso", &disc);
    let image = world.file("small.raw", &[7; 1 << 20]);
    let (disc, image) = (disc.to_str().unwrap(), image.to_str().unwrap());
    world.well(&format!("guest create t --test-guest --memory 16M --network none --cdrom {disc} --start"));
    world.wait_for_state("t", "running");
    world.well("guest cd t --eject");
    // The one that is copied comes later than the one behind it.
    world.well(&format!("guest set t --add-disk {image} --add-disk 1M"));
    world.wait("both disks are there", |world| {
        world.show("t")["disks"].as_array().unwrap().iter().all(|disk| disk["ready"] == true)
    });
    let before = suspend(&mut world, "t");
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
    world.well(&format!("guest cd t {disc}"));
    let before = suspend(&mut world, "t");
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
}

#[test]
fn a_suspended_guest_is_not_changed_and_may_be_discarded() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    suspend(&mut world, "t");
    for line in ["guest set t --memory 32M", "guest pause t", "guest shutdown t", "guest reset t"] {
        let refused = world.output(line);
        assert_eq!(refused.code, 1, "{line}");
        assert!(refused.err.contains("suspended"), "{line}: {}", refused.err);
    }
    let said = world.well("guest discard t --yes");
    assert!(said.contains("t: stopped"), "{said}");
    assert!(!suspended(&world, "t").exists());
    assert!(world.output("guest discard t --yes").err.contains("no saved state"));
    world.well("guest start t");
    Serial::open(&world, "t", None).expect(GREETING);
}

#[test]
fn a_damaged_state_is_told_and_kept_and_a_spent_one_is_never_used_again() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let before = suspend(&mut world, "t");
    let file = fs::File::options().read(true).write(true).open(suspended(&world, "t")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 100).unwrap();
    world.output("guest start t");
    let shown = world.wait_for_state("t", "suspended");
    assert!(shown["reason"].as_str().is_some_and(|reason| reason.contains("damaged")), "{shown}");
    file.write_all_at(&byte, 100).unwrap();
    world.well("guest start t");
    goes_on(&mut world, "t", &before);

    // Power is lost in the instant in which the guest has gone on: its disks are newer than the file.
    suspend(&mut world, "t");
    let file = fs::File::options().write(true).open(suspended(&world, "t")).unwrap();
    file.write_all_at(b"INNKEEPER SPENT\n", 0).unwrap();
    world.lose_power();
    world.start();
    assert_eq!(world.wait_for_state("t", "stopped")["desired"], "off");
    world.well("guest start t");
    Serial::open(&world, "t", None).expect(GREETING);
}

#[test]
fn a_saved_state_counts_until_the_guest_is_started_without_it() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let before = suspend(&mut world, "t");
    let path = suspended(&world, "t");
    let aside = path.with_extension("aside");
    fs::hard_link(&path, &aside).unwrap();
    // As after a full disk, when the file is whole and the row could not be written.
    world.well("guest discard t --yes");
    world.end_server();
    fs::hard_link(&aside, &path).unwrap();
    world.start();
    assert_eq!(world.wait_for_state("t", "suspended")["desired"], "off");
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
    // Left over beside a guest that is started anew, it goes away.
    world.well("guest poweroff t");
    world.wait_for_state("t", "stopped");
    fs::hard_link(&aside, &path).unwrap();
    world.well("guest start t");
    Serial::open(&world, "t", None).expect(GREETING);
    assert!(!path.exists(), "an old state would meet newer disks");
}

#[test]
fn a_guest_whose_saved_state_is_away_waits_for_it() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let before = suspend(&mut world, "t");
    let path = suspended(&world, "t");
    let aside = path.with_extension("aside");
    fs::rename(&path, &aside).unwrap();
    let refused = world.output("guest start t");
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("saved state"), "{}", refused.err);
    assert_eq!(world.show("t")["state"], "suspended");
    fs::rename(&aside, &path).unwrap();
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
}

#[test]
fn a_disk_is_limited_while_its_guest_runs_and_while_it_is_suspended() {
    let Some(mut world) = World::new() else { return };
    world.well("guest create t --test-guest --disk 1M --network none --start");
    world.wait_for_state("t", "running");
    let said = world.well("guest limit-disk t disk1 --bytes 50M --operations 500");
    assert_eq!(said, "t: disk1 at most 50 MiB and 500 operations a second\n");
    assert_eq!(world.show("t")["disks"][0]["limit"]["operations_per_s"], 500);
    for (line, words) in [
        ("guest limit-disk t disk1 --bytes 1K", "1 MiB a second or more"),
        ("guest limit-disk t disk1 --operations 0", "leave it out"),
        ("guest limit-disk t disk2 --operations 100", "no such disk"),
    ] {
        let refused = world.output(line);
        assert!(refused.code != 0 && refused.err.contains(words), "{line}: {}", refused.err);
    }
    let before = suspend(&mut world, "t");
    assert_eq!(world.well("guest limit-disk t disk1 --operations 100"), "t: disk1 at most 100 operations a second\n");
    world.well("guest start t");
    goes_on(&mut world, "t", &before);
    assert_eq!(world.well("guest limit-disk t disk1"), "t: disk1 without a limit\n");
    assert!(world.show("t")["disks"][0].get("limit").is_none());
}

/// Begins to suspend a guest, and returns while its memory is being written.
fn begin(world: &mut World, name: &str) {
    world.post(&format!("/api/v1/guests/{name}/suspend"));
    world.wait("the engine is at it", |world| {
        world.show(name)["reason"].as_str().is_some_and(|reason| reason.contains("% of its memory"))
    });
}

/// The small kernel does what the next letter says: it switches off.
fn obeys(world: &mut World, name: &str) {
    Serial::open(world, name, None).type_keys("o");
    world.wait_for_state(name, "stopped");
}

#[test]
fn a_suspension_is_given_up_broken_off_or_outlives_the_server() {
    let Some(mut world) = World::new() else { return };
    // So much memory that its writing takes a while.
    let initrd = world.file("initrd", &vec![0x5a; 600 << 20]);
    let kernel = world.file("kernel", &super::kernel::elf());
    let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
    world.well(&format!("guest create t --kernel {kernel} --initrd {initrd} --memory 1G --network none --start"));
    world.wait_for_state("t", "running");
    let part = suspended(&world, "t").with_extension("part");

    begin(&mut world, "t");
    assert!(part.exists());
    world.well("guest resume t");
    world.wait_for_state("t", "running");
    world.wait("half a state takes no room", |_| fs::metadata(&part).map_or(true, |file| file.len() == 0));
    obeys(&mut world, "t");
    world.well("guest start t");
    world.wait_for_state("t", "running");

    begin(&mut world, "t");
    let engine = world.engine("t");
    engine.signal(Signal::SIGKILL);
    let shown = world.wait_for_state("t", "failed");
    assert!(!suspended(&world, "t").exists(), "half a state is none: {shown}");
    world.well("guest start t");
    world.wait_for_state("t", "running");

    begin(&mut world, "t");
    world.well("guest poweroff t");
    world.wait_for_state("t", "stopped");
    assert!(!suspended(&world, "t").exists());
    world.well("guest start t");
    world.wait_for_state("t", "running");

    begin(&mut world, "t");
    let engine = world.engine("t");
    world.end_server();
    world.wait("the engine finishes by itself", |_| !engine.is_alive());
    world.start();
    world.wait_for_state("t", "suspended");
    world.well("guest start t");
    world.wait_for_state("t", "running");
    obeys(&mut world, "t");
}
