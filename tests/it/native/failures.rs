//! Guests that cannot go on, disks that two want, hosts on which something is missing.

use super::{
    kernel::SSE_BYTES,
    viewer::Serial,
    world::{Kvm, Who, World},
};

#[test]
fn a_guest_that_crashes_at_once_again_and_again_has_failed() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("other", "");
    let other = world.engine("other");
    world.kernel_guest("k", "t");
    let shown = world.wait_for_state("k", "failed");
    let reason = shown["reason"].as_str().unwrap();
    assert!(reason.contains("crashed 3 times in a row"), "{reason}");
    let log = world.well("guest log k");
    assert_eq!(log.matches("engine: triple fault").count(), 3, "{log}");
    assert_eq!(log.matches("engine: reset").count(), 2, "{log}");
    assert!(log.lines().last().unwrap().contains("crashed 3 times"), "{log}");
    assert!(other.is_alive());
    // It can be changed and started.
    assert!(world.output_of(&["guest", "set", "k", "--cmdline", "."]).code == 0);
    assert_eq!(world.well("guest start k"), "k: running\n");
}

#[test]
fn a_single_crash_is_a_reset() {
    let Some(world) = World::new() else { return };
    world.kernel_guest("k", "");
    let mut serial = Serial::open(&world, "k", None);
    serial.until("it runs", |serial| serial.seen == b"R");
    serial.type_keys("t");
    serial.until("it runs again", |serial| serial.seen == b"RR");
    assert_eq!(serial.resets, [1]);
    assert_eq!(world.show("k")["state"], "running");
}

#[test]
fn an_instruction_that_this_kvm_cannot_emulate_ends_the_guest_with_registers_and_bytes() {
    let Some(mut world) = World::new() else { return };
    world.kernel_guest("k", "");
    let mut serial = Serial::open(&world, "k", None);
    serial.until("it runs", |serial| serial.seen == b"R");
    serial.type_keys("x");
    serial.until("it goes on or ends", |serial| serial.seen == b"RS" || serial.closed.is_some());
    if serial.seen == b"RS" {
        return println!("skipped: the KVM of this host runs every instruction");
    }
    let shown = world.wait_for_state("k", "failed");
    let reason = shown["reason"].as_str().unwrap();
    assert!(reason.contains("cannot emulate an instruction of the guest"), "{reason}");
    assert!(serial.closed.unwrap().contains(reason), "the viewer is told");
    let log = world.well("guest log k");
    for text in [SSE_BYTES, "rip 0000000000100044", "cr4 600"] {
        assert!(log.contains(text), "{text}: {log}");
    }
    assert!(world.end_server().1);
    world.start();
    assert_eq!(world.show("k")["reason"].as_str(), Some(reason), "a restart of the server changes nothing");
}

#[test]
fn a_disk_is_written_by_one_engine_only() {
    let Some(mut one) = World::new() else { return };
    let Some(two) = World::new() else { return };
    for world in [&one, &two] {
        world.well("guest create d --test-guest --disk 1M --memory 16M --network none");
    }
    let disk = |world: &World| {
        let id = world.show("d")["disks"][0]["id"].as_str().unwrap().to_owned();
        world.state().join("disks").join(id + ".raw")
    };
    // The same file under another name, in the state of another server.
    std::fs::remove_file(disk(&two)).unwrap();
    std::fs::hard_link(disk(&one), disk(&two)).unwrap();
    assert_eq!(one.well("guest start d"), "d: running\n");
    let refused = two.output("guest start d");
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("Another guest or program is using the disk"), "{}", refused.err);
    assert_eq!(two.show("d")["engine"], serde_json::Value::Null);

    // It is the engine that holds the disk, not the server.
    one.kill_hostd();
    assert_eq!(two.output("guest start d").code, 1);
    one.start();
    one.wait_for_state("d", "running");
    one.well("guest poweroff d");
    assert_eq!(two.well("guest start d"), "d: running\n");
    assert_eq!(one.output("guest start d").code, 1);
}

/// The finding of that name, and the exit code of doctor.
fn doctor(world: &World, id: &str) -> (serde_json::Value, i32) {
    let ran = world.output("doctor --json");
    let findings: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let finding = findings.as_array().unwrap().iter().find(|finding| finding["id"] == id).unwrap();
    (finding.clone(), ran.code)
}

/// A start is refused with `words`; everybody who asks hears the same, and nothing is left behind.
fn cannot_start(world: &World, name: &str, words: &[&str]) {
    let refused = world.output(&format!("guest start {name}"));
    assert_eq!(refused.code, 1, "{}", refused.out);
    let shown = world.show(name);
    assert_eq!((shown["state"].as_str(), &shown["engine"]), (Some("failed"), &serde_json::Value::Null));
    for word in words {
        assert!(refused.err.contains(word), "{word}: {}", refused.err);
        assert!(shown["reason"].as_str().unwrap().contains(word), "{word}: {shown}");
    }
    let id = shown["id"].as_str().unwrap();
    assert!(!world.run_dir().join("guests").join(id).exists());
}

#[test]
fn without_a_kvm_everybody_is_told_what_to_do() {
    let Some(mut world) = World::without_server(Who::Root, Kvm::Absent) else { return };
    let (finding, code) = doctor(&world, "kvm");
    assert_eq!((finding["verdict"].as_str(), code), (Some("missing"), 1), "{finding}");
    assert_ne!(finding["remedy"].as_str(), Some(""), "{finding}");
    world.start();
    world.well("guest create t --test-guest --memory 16M --network none");
    cannot_start(&world, "t", &["/dev/kvm", "virtualization"]);
    let host = world.get("/api/v1/host");
    assert!(host["findings"].as_array().unwrap().contains(&finding), "the page says the same: {host}");
}

#[test]
fn without_permission_on_kvm_everybody_is_told_what_to_do() {
    let Some(mut world) = World::without_server(Who::Ordinary, Kvm::Denied) else { return };
    let (finding, code) = doctor(&world, "kvm");
    assert_eq!((finding["verdict"].as_str(), code), (Some("missing"), 1), "{finding}");
    assert_ne!(finding["remedy"].as_str(), Some(""), "{finding}");
    world.start();
    world.well("guest create t --test-guest --memory 16M --network none");
    cannot_start(&world, "t", &["/dev/kvm", "group kvm"]);
}

#[test]
fn without_firmware_its_package_is_named_and_other_guests_run() {
    let Some(mut world) =
        World::without_server(if nix::unistd::geteuid().is_root() { Who::Root } else { Who::Ordinary }, Kvm::Usual)
    else {
        return;
    };
    let empty = tempfile::tempdir().unwrap();
    world.with_env("INNKEEPER_FIRMWARE_DIR", empty.path());
    let (finding, code) = doctor(&world, "firmware_bios");
    assert_eq!((finding["verdict"].as_str(), code), (Some("missing"), 0), "{finding}");
    assert!(finding["remedy"].as_str().unwrap().contains("seabios"), "{finding}");
    world.start();
    world.well("guest create d --firmware bios --disk 1M --memory 32M --network none");
    cannot_start(&world, "d", &["bios-256k.bin", "apt install seabios"]);
    world.test_guest("t", "");
    // Mended, the same guest starts.
    for name in ["bios-256k.bin", "vgabios-stdvga.bin"] {
        let usual = std::path::Path::new("/usr/share/seabios").join(name);
        if !usual.exists() {
            return println!("skipped: {} is missing here too", usual.display());
        }
        std::fs::copy(usual, empty.path().join(name)).unwrap();
    }
    std::fs::set_permissions(empty.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(world.well("guest start d"), "d: running\n");
}
