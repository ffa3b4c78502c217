//! Starting and ending servers and guests: once, not twice, and in time.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    time::Duration,
};

use nix::sys::signal::Signal;

use super::{
    viewer::Serial,
    world::{Kvm, PATIENCE, Who, World},
};
use crate::support::{Client, PASSWORD, RawConnection, connect_tls, read_until};

#[test]
fn a_second_start_of_a_running_guest_is_refused() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let engine = world.engine("t");
    let refused = world.output("guest start t");
    assert_eq!((refused.code, refused.err.as_str()), (1, "innkeeper: The guest runs already.\n"));
    world.kill_hostd();
    world.start();
    world.wait_for_state("t", "running");
    assert_eq!(world.output("guest start t").code, 1);
    assert_eq!(world.engine("t"), engine);
    for line in ["guest rm t", "guest set t --cpus 2", "guest set t --cmdline quiet"] {
        assert_eq!(world.output(line).code, 1, "{line}");
    }
    assert!(engine.is_alive());
}

#[test]
fn two_starts_at_once_make_one_engine() {
    let Some(mut world) = World::new() else { return };
    world.well("guest create t --test-guest --memory 16M --network none");
    let world = &mut world;
    let codes: Vec<i32> = std::thread::scope(|scope| {
        let shared = &*world;
        let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| shared.output("guest start t").code)).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert_eq!(codes.iter().filter(|code| **code == 0).count(), 1, "{codes:?}");
    world.wait_for_state("t", "running");
    assert_eq!(world.serve_log().matches("started an engine").count(), 1);
}

#[test]
fn every_start_says_when_the_first_instruction_ran() {
    let Some(mut world) = World::new() else { return };
    world.well("guest create t --test-guest --memory 16M --network none --cmdline quiet");
    // The wish to run may come before the vCPU's thread has looked for the first time.
    for number in 0..6 {
        world.well("guest start t");
        assert_eq!(world.started("t"), "running");
        let statistics = world.get("/api/v1/guests/t/statistics");
        assert!(statistics["first_instruction_us"].as_u64().is_some_and(|us| us > 0), "start {number}: {statistics}");
        world.well("guest poweroff t");
        world.wait_for_state("t", "stopped");
    }
}

#[test]
fn a_second_server_on_the_same_state_says_who_has_it() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "");
    let (pid, address) = world.holder();
    assert_eq!(pid, world.hostd().pid);
    let refused = world.output("serve --listen 127.0.0.1:0");
    assert_eq!(refused.code, 1);
    for text in [pid.to_string(), address.to_string(), world.state().display().to_string()] {
        assert!(refused.err.contains(&text), "{text}: {}", refused.err);
    }
    // Nor on the same port, with a state of its own.
    let Some(mut other) = World::new() else { return };
    assert!(other.end_server().1);
    let taken = other.output(&format!("serve --listen {address}"));
    assert_eq!(taken.code, 1);
    assert!(taken.err.contains(&address.to_string()) && taken.err.contains("--listen"), "{}", taken.err);
    assert_eq!(world.holder(), (pid, address), "the first one is as it was");
    assert_eq!(world.states(), [("t".into(), "running".into())]);
    Serial::open(&world, "t", None).see_it_tick();
}

#[test]
fn a_state_in_a_folder_that_the_pages_user_may_not_enter_is_refused() {
    let Some(world) = World::without_server(Who::Root, Kvm::Usual) else { return };
    let closed = world.state().parent().unwrap().to_owned();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let refused = world.output("serve --listen 127.0.0.1:0");
    assert_eq!(refused.code, 1);
    let why = format!("may not enter {}, where the state is", closed.display());
    assert!(refused.err.contains(&why) && refused.err.contains("--state"), "{}", refused.err);
}

#[test]
fn the_server_ends_in_two_seconds_with_five_pages_open() {
    let Some(mut world) = World::new() else { return };
    world.test_guest("t", "");
    let engine = world.engine("t");
    let (_browser, mut pages) = browser_with_five_pages(&world, "t");
    let mut consoles: Vec<Serial> = (0..2).map(|_| Serial::open(&world, "t", None)).collect();
    // One that never reads, and one that is in the middle of a request.
    let _stalled = Serial::open(&world, "t", None);
    let mut half = UnixStream::connect(world.run_dir().join("api.sock")).unwrap();
    half.write_all(b"GET /api/v1/guests HTT").unwrap();

    let (took, well) = world.end_server();
    assert!(well, "{}", world.serve_log());
    assert!(took < Duration::from_secs(2), "{took:?}");
    for page in &mut pages {
        page.sock.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        let _ = page.read_to_end(&mut rest); // its end, however it came
    }
    for console in &mut consoles {
        console.drain();
        assert_eq!(console.closed, None, "the guest has not ended, so the page tries again");
    }
    assert!(engine.is_alive(), "the guest runs on");

    world.start();
    world.wait_for_state("t", "running");
    assert_eq!(world.engine("t"), engine);
}

/// Somebody who is logged in, and the live connections of five pages.
fn browser_with_five_pages(world: &World, guest: &str) -> (Client, Vec<RawConnection>) {
    let words = ["admin", "create-user", "ada", "--role", "administrator", "--password-stdin"];
    let made = world.output_with(&words, format!("{PASSWORD}\n").as_bytes());
    assert_eq!(made.code, 0, "{}", made.err);
    let (ca, address) = (world.state().join("tls/ca.pem"), world.holder().1);
    let mut browser = Client::new(address.port(), &std::fs::read(&ca).unwrap());
    browser.get("/login");
    browser.log_in("ada", PASSWORD);
    let id = world.show(guest)["id"].as_str().unwrap().to_owned();
    let scope_of_guest = format!("guest:{id}");
    let pages = ["home", "guests", "images", "tasks", &scope_of_guest]
        .into_iter()
        .map(|scope| {
            let mut page = connect_tls(address.port(), &ca);
            page.write_all(browser.head("GET", &format!("/events?scope={scope}"), "").as_bytes()).unwrap();
            let head = read_until(&mut page, "\r\n\r\n");
            assert!(head.starts_with("HTTP/1.1 200"), "{scope}: {head}");
            page
        })
        .collect();
    (browser, pages)
}

#[test]
fn a_server_that_dies_is_followed_at_once_by_another_on_the_same_port() {
    let Some(mut world) = World::new() else { return };
    world.keep_port();
    world.test_guest("t", "");
    let (mut browser, _pages) = browser_with_five_pages(&world, "t");
    let web = world.web().unwrap();
    world.kill_hostd();
    world.start();
    assert!(!web.is_alive(), "the old web role has gone before");
    assert_eq!(browser.get("/guests").status, 200, "the login is still good");
    world.wait_for_state("t", "running");

    // A web role that does not end is named.
    let web = world.web().unwrap();
    web.signal(Signal::SIGSTOP);
    world.kill_hostd();
    let refused = world.output("serve --listen 127.0.0.1:0");
    web.signal(Signal::SIGCONT);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("\"innkeeper web\" still runs"), "{}", refused.err);
    world.start();
}

#[test]
fn a_guest_that_switched_itself_off_stays_off() {
    let Some(mut world) = World::new() else { return };
    world.kernel_guest("k", "");
    let mut serial = Serial::open(&world, "k", None);
    serial.until("it runs", |serial| serial.seen == b"R");
    assert_eq!(world.show("k")["desired"], "on");
    serial.type_keys("o");
    serial.drain();
    assert_eq!(serial.closed.as_deref(), Some("The guest has stopped."));
    let shown = world.wait_for_state("k", "stopped");
    assert_eq!((shown["desired"].as_str(), &shown["reason"]), (Some("off"), &serde_json::Value::Null));
    for _ in 0..2 {
        assert!(world.end_server().1);
        world.start();
        assert_eq!(world.show("k")["state"], "stopped");
    }
    world.lose_power();
    world.start();
    assert_eq!(world.states(), [("k".into(), "stopped".into())]);
}

#[test]
fn guests_are_started_and_ended_many_times_and_nothing_is_left() {
    let Some(mut world) = World::new() else { return };
    world.kernel_guest("k", "");
    for _ in 0..20 {
        let engine = world.engine("k");
        assert_eq!(world.well("guest poweroff k"), "k: stopped\n");
        world.wait("its engine is gone", |_| !engine.is_alive());
        assert_eq!(world.well("guest start k"), "k: running\n");
    }
    let id = world.show("k")["id"].as_str().unwrap().to_owned();
    world.well("guest poweroff k");
    assert_eq!(world.well("guest rm k"), "k has no disks.\nk removed\n");
    assert!(!world.run_dir().join("guests").join(&id).exists());
    assert!(!world.state().join("guests").join(&id).exists(), "nor its log");
    assert_eq!(world.states(), []);
}
