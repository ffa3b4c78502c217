//! What is killed, and what lives on: as root and as an ordinary user.

use nix::sys::signal::Signal;

use super::{
    viewer::{Serial, contains},
    world::{Process, Who, World},
};

macro_rules! for_root_and_ordinary_users {
    ($($name:ident)*) => {
        mod root {
            $(#[test] fn $name() { super::$name(super::Who::Root); })*
        }
        mod ordinary_user {
            $(#[test] fn $name() { super::$name(super::Who::Ordinary); })*
        }
    };
}

for_root_and_ordinary_users! {
    the_web_role_is_killed_and_the_consoles_go_on
    hostd_is_killed_and_the_next_server_finds_the_guests
    both_are_killed_and_the_next_server_finds_the_guests
    an_engine_is_killed_and_only_its_guest_has_failed
    an_engine_that_ends_while_no_server_runs_is_not_forgotten
    after_a_loss_of_power_the_guests_that_were_on_start_again
    another_binary_takes_over_running_guests
}

/// A running test guest with a viewer who has seen it.
struct Watched {
    engine: Process,
    serial: Serial,
}

fn watched(world: &World, name: &str) -> Watched {
    world.test_guest(name, "");
    let mut serial = Serial::open(world, name, None);
    serial.see_it_tick();
    serial.type_keys("kept");
    serial.expect("kept");
    Watched { engine: world.engine(name), serial }
}

/// The guest of `before` still runs, and its console goes on where the viewer was, with nothing lost or doubled.
fn goes_on(world: &mut World, name: &str, before: &mut Watched) {
    world.wait_for_state(name, "running");
    assert_eq!(world.engine(name), before.engine, "the same engine");
    assert!(before.engine.is_alive());
    let mut next = Serial::open(world, name, Some(before.serial.next));
    assert_eq!((next.start, next.skipped), (before.serial.next, 0));
    next.see_it_tick();
    assert!(contains(&next.seen, "kept"), "{}", next.text());
    let mut all = Serial::open(world, name, None);
    all.until("all of it", |all| all.next >= next.next);
    let both = [before.serial.seen.clone(), next.seen.clone()].concat();
    assert_eq!(all.start, 0);
    assert!(all.seen.starts_with(&both), "the scrollback is whole");
    // It is controlled, too.
    world.well(&format!("guest pause {name}"));
    world.well(&format!("guest resume {name}"));
    next.see_it_tick();
}

/// The guest goes on printing without any server.
fn ticks_alone(socket: &std::path::Path, before: &Watched) {
    let mut alone = Serial::at_engine(socket, Some(before.serial.next));
    assert_eq!(alone.start, before.serial.next);
    alone.see_it_tick();
}

fn the_web_role_is_killed_and_the_consoles_go_on(who: Who) {
    let Some(mut world) = World::of(who) else { return };
    let mut guest = watched(&world, "t");
    let (hostd, web) = (world.hostd(), world.web().unwrap());
    web.signal(Signal::SIGKILL);
    guest.serial.drain();
    assert_eq!(guest.serial.closed, None, "the guest has not ended");
    world.wait("another web role", |world| world.web().is_some_and(|now| now != web));
    world.wait("it answers", |world| world.output("guest ls").code == 0);
    assert_eq!(world.hostd(), hostd);
    goes_on(&mut world, "t", &mut guest);
}

fn hostd_is_killed_and_the_next_server_finds_the_guests(who: Who) {
    let Some(mut world) = World::of(who) else { return };
    let (mut guest, socket) = (watched(&world, "t"), world.socket("t", "serial.sock"));
    let web = world.web().unwrap();
    world.kill_hostd();
    world.wait("the web role ends with it", |_| !web.is_alive());
    guest.serial.drain();
    assert_eq!(guest.serial.closed, None);
    ticks_alone(&socket, &guest);
    let nobody = world.output("guest ls");
    assert_eq!(nobody.code, 1);
    assert!(nobody.err.contains("No Innkeeper answers"), "{}", nobody.err);
    world.start();
    goes_on(&mut world, "t", &mut guest);
}

fn both_are_killed_and_the_next_server_finds_the_guests(who: Who) {
    let Some(mut world) = World::of(who) else { return };
    let mut first = watched(&world, "a");
    let mut second = watched(&world, "b");
    let (web, socket) = (world.web().unwrap(), world.socket("b", "serial.sock"));
    web.signal(Signal::SIGKILL);
    world.kill_hostd();
    world.wait("both are gone", |_| !web.is_alive());
    ticks_alone(&socket, &second);
    world.start();
    world.wait_for_state("b", "running");
    world.wait_for_state("a", "running");
    assert_eq!(world.states(), [("a".into(), "running".into()), ("b".into(), "running".into())]);
    goes_on(&mut world, "a", &mut first);
    goes_on(&mut world, "b", &mut second);
    // And once more, with a server that has adopted them.
    world.kill_hostd();
    world.start();
    goes_on(&mut world, "a", &mut first);
    world.well("guest poweroff a");
    world.wait("an adopted engine ends", |_| !first.engine.is_alive());
}

fn an_engine_is_killed_and_only_its_guest_has_failed(who: Who) {
    let Some(mut world) = World::of(who) else { return };
    let mut other = watched(&world, "other");
    let mut guest = watched(&world, "t");
    guest.engine.signal(Signal::SIGKILL);
    let failed = world.wait_for_state("t", "failed");
    let reason = failed["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("ended without a word"), "{reason}");
    guest.serial.drain();
    assert!(guest.serial.closed.as_deref().unwrap().contains("ended without a word"), "{:?}", guest.serial.closed);
    goes_on(&mut world, "other", &mut other);

    // The reason outlives the server, and nobody starts the guest behind a person's back.
    assert!(world.end_server().1);
    world.start();
    let shown = world.show("t");
    assert_eq!((shown["state"].as_str(), shown["reason"].as_str()), (Some("failed"), Some(reason.as_str())));
    assert_eq!(world.well("guest start t"), "t: running\n");
    assert_eq!(world.show("t")["reason"], serde_json::Value::Null);
    Serial::open(&world, "t", None).see_it_tick();
    goes_on(&mut world, "other", &mut other);

    // An engine that was only found is watched as well.
    world.kill_hostd();
    world.start();
    world.wait_for_state("other", "running");
    other.engine.signal(Signal::SIGKILL);
    assert!(world.wait_for_state("other", "failed")["reason"].as_str().unwrap().contains("ended without a word"));
}

fn an_engine_that_ends_while_no_server_runs_is_not_forgotten(who: Who) {
    let Some(mut world) = World::of(who) else { return };
    for name in ["killed", "off", "crashed"] {
        world.kernel_guest(name, "");
        Serial::open(&world, name, None).until("it runs", |serial| serial.seen == b"R");
    }
    let engines = ["killed", "off", "crashed"].map(|name| world.engine(name));
    let [off, crashed] = ["off", "crashed"].map(|name| world.socket(name, "serial.sock"));
    world.kill_hostd();
    engines[0].signal(Signal::SIGKILL);
    Serial::at_engine(&off, None).type_keys("o");
    let mut console = Serial::at_engine(&crashed, None);
    for starts in 1..=3 {
        console.until("it runs", |console| console.seen.len() == starts);
        console.type_keys("t");
    }
    console.until("the end", |console| console.closed.is_some());
    world.wait("all have ended", |_| !engines.iter().any(Process::is_alive));
    world.start();
    let killed = world.wait_for_state("killed", "failed");
    assert!(killed["reason"].as_str().unwrap().contains("ended without a word"), "{killed}");
    let off = world.wait_for_state("off", "stopped");
    assert_eq!((off["desired"].as_str(), &off["reason"]), (Some("off"), &serde_json::Value::Null));
    let crashed = world.wait_for_state("crashed", "failed");
    assert!(crashed["reason"].as_str().unwrap().contains("crashed 3 times"), "{crashed}");
}

fn after_a_loss_of_power_the_guests_that_were_on_start_again(who: Who) {
    let Some(mut world) = World::of(who) else { return };
    for name in ["on", "off", "paused", "shut-down"] {
        world.kernel_guest(name, "");
    }
    let engine = world.engine("on");
    Serial::open(&world, "shut-down", None).until("it runs", |serial| serial.seen == b"R");
    world.well("guest poweroff off");
    world.well("guest pause paused");
    world.well("guest shutdown shut-down --wait 20");
    world.lose_power();
    world.start();
    world.wait_for_state("on", "running");
    world.wait_for_state("paused", "running");
    assert_ne!(world.engine("on"), engine);
    for name in ["off", "shut-down"] {
        assert_eq!(world.show(name)["state"], "stopped", "{name} was off");
    }
    let mut serial = Serial::open(&world, "on", None);
    serial.until("it has begun anew", |serial| serial.seen == b"R");
    assert_eq!((serial.start, serial.next), (0, 1));
}

fn another_binary_takes_over_running_guests(who: Who) {
    let Some(mut world) = World::without_server(who, super::world::Kvm::Usual) else { return };
    world.copy_program();
    world.start();
    let mut guest = watched(&world, "t");
    world.replace_program();
    assert!(guest.engine.program().ends_with("(deleted)"), "{}", guest.engine.program());

    // The old server goes on until it is restarted, also when its web role has to be started again.
    let web = world.web().unwrap();
    web.signal(Signal::SIGKILL);
    world.wait("another web role", |world| world.web().is_some_and(|now| now != web));
    world.wait("it answers", |world| world.output("guest ls").code == 0);
    assert!(world.end_server().1);
    world.start();
    assert!(!world.hostd().program().ends_with("(deleted)"));
    goes_on(&mut world, "t", &mut guest);
    assert!(world.engine("t").program().ends_with("(deleted)"), "the guest runs on in its engine");
    world.well("guest reset t");
    world.well("guest poweroff t");
    world.well("guest start t");
    assert!(!world.engine("t").program().ends_with("(deleted)"), "the next start is the new one's");
    assert_ne!(world.engine("t").user(), 0, "no engine runs as root");
}
