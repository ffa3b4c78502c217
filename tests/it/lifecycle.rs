//! Guests from making to deleting, with engines that have no KVM.

use std::{
    os::unix::fs::{FileExt, MetadataExt},
    time::Duration,
};

use innkeeper::{
    spec::{Boot, BootFrom, DiskBus, FirstBoot, NetworkModel, Watchdog},
    state_files::VARIABLES,
    wire::{AgentFacts, EndKind, EngineAction, EngineMessage, Observed, Place, PluggedDevice},
};
use serde_json::{Value, json};

use crate::{
    fake_engine::{Lab, Manners, PICTURE},
    support::{Client, eventually},
};

fn show(client: &mut Client, name: &str) -> Value {
    client.get(&format!("/api/v1/guests/{name}")).json()
}

fn wait_for(client: &mut Client, name: &str, state: &str) -> Value {
    let mut last = Value::Null;
    eventually(&format!("{name} is {state}"), || {
        last = show(client, name);
        last["state"] == state
    });
    last
}

fn act(client: &mut Client, name: &str, action: &str) -> (u16, Value) {
    let answer = client.call("POST", &format!("/api/v1/guests/{name}/{action}"), &json!({}));
    (answer.status, answer.json())
}

fn make(client: &mut Client, guest: Value) -> Value {
    let answer = client.call("POST", "/api/v1/guests", &guest);
    assert!(answer.status == 201 || answer.status == 202, "{}", answer.text());
    answer.json()
}

fn test_guest(client: &mut Client, name: &str) -> Value {
    make(client, json!({ "name": name, "boot": { "kind": "test" }, "network": "none", "memory_bytes": 16 << 20 }))
}

#[test]
fn a_guest_is_made_started_paused_reset_shut_down_and_deleted() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let made = make(client, json!({ "name": "web01", "disks": [{ "size_bytes": 1 << 20 }], "network": "user" }));
    assert_eq!((&made["state"], &made["desired"], &made["cpus"]), (&json!("stopped"), &json!("off"), &json!(1)));
    let disk = made["disks"][0]["id"].as_str().unwrap().to_owned();
    let file = lab.app.path(&format!("disks/{disk}.raw"));
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 1 << 20);

    let (status, started) = act(client, "web01", "start");
    assert_eq!((status, &started["state"], &started["desired"]), (200, &json!("running"), &json!("on")));
    assert_eq!((&started["engine"]["pid"], &started["addresses"][0]), (&json!(4242), &json!("192.0.2.7")));
    let engine = lab.engine("web01").unwrap();
    assert!(matches!(engine.launch.disks.as_slice(), [Place::Disk(id)] if id.as_str() == disk));
    assert_eq!(act(client, "web01", "start").0, 409, "a second start is refused");

    assert_eq!(act(client, "web01", "pause").1["state"], "paused");
    assert_eq!(act(client, "web01", "shutdown").0, 409, "a paused guest cannot hear its power button");
    assert_eq!(act(client, "web01", "resume").1["state"], "running");
    assert_eq!(act(client, "web01", "reset").1["state"], "running");
    assert_eq!(client.get("/api/v1/guests/web01/screenshot.png").body, PICTURE);
    assert_eq!(client.get("/api/v1/guests/web01/statistics").json()["exits"], 7);
    let edit = client.call("PATCH", "/api/v1/guests/web01", &json!({ "cpus": 2 }));
    assert_eq!(edit.status, 409);
    assert_eq!(client.call("DELETE", "/api/v1/guests/web01", &json!({})).status, 409);

    assert_eq!(act(client, "web01", "shutdown").0, 200);
    let stopped = wait_for(client, "web01", "stopped");
    assert_eq!((&stopped["desired"], &stopped["engine"]), (&json!("off"), &Value::Null));
    assert_eq!(client.get("/guests/web01/thumbnail.png").status, 404);
    let edited = client.call("PATCH", "/api/v1/guests/web01", &json!({ "cpus": 2, "name": "web02" })).json();
    assert_eq!((&edited["cpus"], &edited["name"]), (&json!(2), &json!("web02")));

    assert_eq!(
        client.call("DELETE", "/api/v1/guests/web02", &json!({ "confirm": "web01" })).json()["field"],
        "confirm"
    );
    assert!(file.exists());
    assert_eq!(client.call("DELETE", "/api/v1/guests/web02", &json!({ "confirm": "web02" })).status, 204);
    assert!(!file.exists());
    assert_eq!(client.get("/api/v1/guests/web02").status, 404);
}

#[test]
fn wrong_inputs_are_named_at_their_field_and_change_nothing() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    test_guest(client, "taken");
    let cases = [
        (json!({ "name": "" }), "name"),
        (json!({ "name": "../etc/passwd" }), "name"),
        (json!({ "name": "taken" }), "name"),
        (json!({ "name": "a", "cpus": 0 }), "cpus"),
        (json!({ "name": "a", "cpus": 1000 }), "cpus"),
        (json!({ "name": "a", "memory_bytes": 0 }), "memory"),
        (json!({ "name": "a", "memory_bytes": u64::MAX }), "memory"),
        (json!({ "name": "a", "disks": [{}] }), "disk_size"),
        (json!({ "name": "a", "disks": [{ "size_bytes": 0 }] }), "disk_size"),
        (json!({ "name": "a", "disks": [{ "size_bytes": 513 }] }), "disk_size"),
        (json!({ "name": "a", "disks": [{ "size_bytes": 1u64 << 60 }] }), "disk_size"),
        (json!({ "name": "a", "disks": [{ "size_bytes": 1 << 20 }, { "image": "nothing" }] }), "disk_image"),
        (json!({ "name": "a", "disks": vec![json!({ "size_bytes": 1 << 20 }); 9] }), "disk"),
        (json!({ "name": "a", "cdrom": "../../etc/passwd" }), "cdrom"),
        (json!({ "name": "a", "network": "bridge:a/b" }), "network"),
        (json!({ "name": "a", "boot": { "kind": "kernel", "kernel": "" } }), "kernel"),
        (json!({ "name": "a", "boot": { "kind": "test", "cmdline": "a\nb" } }), "cmdline"),
    ];
    for (guest, field) in cases {
        let answer = client.call("POST", "/api/v1/guests", &guest);
        assert_eq!((answer.status, answer.json()["field"].as_str()), (422, Some(field)), "{guest}: {}", answer.text());
    }
    for broken in
        [json!({ "cpus": 1 }), json!({ "name": "a", "cpus": -1 }), json!({ "name": "a", "colour": 1 }), json!([])]
    {
        assert_eq!(client.call("POST", "/api/v1/guests", &broken).status, 422, "{broken}");
    }
    assert_eq!(client.get("/api/v1/guests").json().as_array().unwrap().len(), 1);
    let left = std::fs::read_dir(lab.app.path("disks")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "no disk is left behind");
}

#[test]
fn a_killed_engine_fails_its_guest_alone_and_the_reason_survives_a_restart() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    for name in ["a", "b"] {
        test_guest(client, name);
        act(client, name, "start");
    }
    lab.engine("a").unwrap().end(EndKind::Killed, "The engine ended without a word.");
    let failed = wait_for(client, "a", "failed");
    assert_eq!(failed["reason"], "The engine ended without a word.");
    assert_eq!(show(client, "b")["state"], "running");
    let trail = client.get("/api/v1/audit").json();
    let line = trail.as_array().unwrap().iter().find(|line| line["who"] == "guest").unwrap();
    assert_eq!(
        (&line["action"], &line["subject"]),
        (&json!("fail_guest"), &json!("a")),
        "it is in the guest's history"
    );

    let lab = lab.restart();
    let client = &mut lab.administrator();
    assert_eq!(show(client, "a")["reason"], "The engine ended without a word.");
    assert!(lab.engine("a").is_none(), "a failed guest is not started by itself");
    wait_for(client, "b", "running");
    let (_, started) = act(client, "a", "start");
    assert_eq!((&started["state"], &started["reason"]), (&json!("running"), &Value::Null));
}

#[test]
fn a_crashed_kernel_is_told_until_the_guest_is_reset() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    test_guest(client, "a");
    act(client, "a", "start");
    let engine = lab.engine("a").unwrap();
    let crashed = |client: &mut Client| {
        show(client, "a")["reason"].as_str().is_some_and(|why| why.contains("kernel has crashed"))
    };
    let crashes = |client: &mut Client| {
        let trail = client.get("/api/v1/audit").json();
        trail.as_array().unwrap().iter().filter(|line| line["action"] == "crash_guest").count()
    };
    engine.say(&EngineMessage::Crashed);
    eventually("the crash is told", || crashed(client));
    assert_eq!(show(client, "a")["state"], "running", "it did not end");
    assert!(client.get("/guests/a").text().contains("kernel has crashed"), "on its page");
    assert!(client.get("/guests/a").text().contains("Crashed"), "and in its history");
    engine.say(&EngineMessage::Reset);
    eventually("a reset ends it", || !crashed(client));
    // A guest that crashes again and again shows it, and does not fill the audit trail.
    engine.say(&EngineMessage::Crashed);
    eventually("again", || crashed(client));
    assert_eq!(crashes(client), 1);
    act(client, "a", "poweroff");
    wait_for(client, "a", "stopped");
    assert!(!crashed(client));
}

#[test]
fn the_firmware_of_a_uefi_guest_is_reset_once_it_has_stopped() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let boot = json!({ "kind": "disk", "firmware": "uefi_secure" });
    let made = make(client, json!({ "name": "u", "boot": boot, "network": "none", "memory_bytes": 64 << 20 }));
    assert_eq!(made["boot"], boot);
    test_guest(client, "t");
    act(client, "u", "start");
    assert_eq!(lab.engine("u").unwrap().launch.spec.boot, Boot::Uefi { secure_boot: true });
    let folder = lab.app.path(&format!("guests/{}", made["id"].as_str().unwrap()));
    std::fs::create_dir_all(&folder).unwrap();
    for name in VARIABLES {
        std::fs::write(folder.join(name), "variables").unwrap();
    }
    assert!(client.get("/guests/u/hardware").text().contains("can be reset when u has stopped"));
    let (status, refused) = act(client, "u", "reset-firmware");
    assert_eq!((status, folder.join(VARIABLES[1]).exists()), (409, true), "{refused}");
    act(client, "u", "poweroff");
    wait_for(client, "u", "stopped");
    assert_eq!(act(client, "u", "reset-firmware").0, 200);
    assert!(VARIABLES.iter().all(|name| !folder.join(name).exists()));
    // Again, from the page, and where there is nothing of the kind.
    assert!(client.get("/guests/u/hardware").text().contains("/reset-firmware"), "the page has the button");
    assert_eq!(client.post("/guests/u/reset-firmware", &[]).status, 303);
    assert!(client.get("/guests/u").text().contains("Reset firmware"), "it is in the history");
    assert_eq!(act(client, "t", "reset-firmware").0, 409);
    assert!(!client.get("/guests/t/hardware").text().contains("reset-firmware"));
    // A new guest has UEFI where the host has it; one that has firmware keeps it.
    let made = make(client, json!({ "name": "new", "network": "none" }));
    assert_eq!(made["boot"], json!({ "kind": "disk", "firmware": "uefi" }));
    let same = client.call("PATCH", "/api/v1/guests/u", &json!({ "boot": { "kind": "disk" } }));
    assert_eq!(same.json()["boot"], boot);
    let wrong = json!({ "name": "w", "boot": { "kind": "disk", "firmware": "coreboot" } });
    assert_eq!(client.call("POST", "/api/v1/guests", &wrong).status, 422);
}

#[test]
fn a_boot_order_is_kept_and_one_start_may_go_another_way() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let boot = json!({ "kind": "disk", "firmware": "bios" });
    let disks = json!([{ "size_bytes": 1 << 20 }, { "size_bytes": 1 << 20 }]);
    let wanted = json!({ "name": "b", "boot": boot, "network": "user", "disks": disks, "boot_order": ["disk2"] });
    let made = make(client, wanted);
    let ids: Vec<&str> = (0..2).map(|at| made["disks"][at]["id"].as_str().unwrap()).collect();
    assert_eq!(made["boot_order"], json!([ids[1], ids[0], "cd"]));
    let patch = |client: &mut Client, change: Value| {
        let answer = client.call("PATCH", "/api/v1/guests/b", &change);
        (answer.status, answer.json())
    };
    let order = |order: Value| json!({ "boot_order": order });
    for wrong in [json!(["floppy"]), json!(["disk3"]), json!(["disk0"]), json!(["cd", "cd"]), json!(["abcd2345"])] {
        let (status, refused) = patch(client, order(wrong));
        assert_eq!((status, &refused["field"]), (422, &json!("boot_order")), "{refused}");
    }
    let (_, changed) = patch(client, order(json!(["network", "cd", ids[0]])));
    assert_eq!(changed["boot_order"], json!(["network", "cd", ids[0], ids[1]]));
    // What goes away goes out of the order.
    let (_, changed) = patch(client, json!({ "network": "none", "remove_disks": [ids[0]] }));
    assert_eq!(changed["boot_order"], json!(["cd", ids[1]]));

    let start = |client: &mut Client, boot: &str| {
        let answer = client.call("POST", "/api/v1/guests/b/start", &json!({ "boot": boot }));
        (answer.status, answer.json())
    };
    for wrong in ["floppy", "network", "disk2", ids[0]] {
        let (status, refused) = start(client, wrong);
        assert_eq!((status, &refused["field"]), (422, &json!("boot")), "{refused}");
    }
    assert_eq!(show(client, "b")["state"], "stopped");
    let once = |lab: &Lab| lab.engine("b").unwrap().launch.spec.first_boot.clone();
    assert_eq!(start(client, "disk1").0, 200);
    let disk = BootFrom::Disk(ids[1].parse().unwrap());
    assert_eq!(once(&lab), Some(FirstBoot::From(disk.clone())));
    assert_eq!(lab.engine("b").unwrap().launch.spec.boot_order, [BootFrom::Cd]);
    act(client, "b", "poweroff");
    wait_for(client, "b", "stopped");

    // From the page: the menu has what differs from the usual start, and the order can be changed.
    let page = client.get("/guests/b").text();
    assert!(page.contains("Start from disk 1") && page.contains("Start with the boot menu"), "{page}");
    assert!(!page.contains("Start from CD"), "the drive is empty, and it comes first anyway");
    assert_eq!(client.post("/guests/b/start", &[("boot", "setup")]).status, 303);
    assert_eq!(once(&lab), Some(FirstBoot::Setup));
    act(client, "b", "poweroff");
    wait_for(client, "b", "stopped");
    let hardware =
        [("name", "b"), ("cpus", "1"), ("memory", "512M"), ("boot", "disk"), ("firmware", "bios"), ("network", "none")];
    let first = [("boot_order_0", ids[1]), ("boot_order_1", "cd")];
    assert_eq!(client.post("/guests/b/hardware", &[&hardware[..], &first[..]].concat()).status, 303);
    assert_eq!(show(client, "b")["boot_order"], json!([ids[1], "cd"]));
    let twice = [("boot_order_0", "cd"), ("boot_order_1", "cd")];
    let refused = client.post("/guests/b/hardware", &[&hardware[..], &twice[..]].concat());
    assert_eq!((refused.status, refused.text().contains("in the boot order twice")), (422, true));
    act(client, "b", "start");
    assert_eq!(once(&lab), None, "the next start is as always");
}

#[test]
fn disks_and_cards_are_what_was_asked_for() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let disks = json!([{ "size_bytes": 1 << 20, "bus": "nvme" }, { "size_bytes": 1 << 20 }]);
    let made = make(client, json!({ "name": "n", "network": "user", "network_model": "e1000", "disks": disks }));
    assert_eq!((&made["disks"][0]["bus"], &made["network"]["model"]), (&json!("nvme"), &json!("e1000")));
    assert!(client.get("/guests/n").text().contains("on an Intel e1000"));
    act(client, "n", "start");
    let spec = lab.engine("n").unwrap().launch.spec.clone();
    assert_eq!(spec.disks.iter().map(|disk| disk.bus).collect::<Vec<_>>(), [DiskBus::Nvme, DiskBus::Virtio]);
    assert_eq!(spec.network.unwrap().model, NetworkModel::E1000);
    act(client, "n", "poweroff");
    wait_for(client, "n", "stopped");
    let answer = client.call("PATCH", "/api/v1/guests/n", &json!({ "network_model": "virtio" }));
    assert_eq!(answer.json()["network"]["model"], "virtio");
    for wrong in [json!({ "network_model": "ne2000" }), json!({ "watchdog": "cat" }), json!({ "sockets": 0 })] {
        assert_eq!(client.call("PATCH", "/api/v1/guests/n", &wrong).status, 422, "{wrong}");
    }
    let groups = json!({ "cpus": 8, "sockets": 2, "threads": 2, "watchdog": "pause" });
    assert_eq!(client.call("PATCH", "/api/v1/guests/n", &groups).status, 200);
    let page = client.get("/guests/n").text();
    assert!(page.contains("8: 2 sockets of 2 cores with 2 threads") && page.contains("Pauses the guest"), "{page}");
    act(client, "n", "start");
    let spec = lab.engine("n").unwrap().launch.spec.clone();
    assert_eq!((spec.cpus, spec.sockets, spec.threads, spec.watchdog), (8, 2, 2, Watchdog::Pause));
}

#[test]
fn guests_outlive_the_server_and_come_back_after_a_power_failure() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    for name in ["on", "paused", "off"] {
        test_guest(client, name);
    }
    act(client, "on", "start");
    act(client, "paused", "start");
    act(client, "paused", "pause");
    let before = lab.engine("on").unwrap();

    let lab = lab.restart();
    let client = &mut lab.administrator();
    wait_for(client, "on", "running");
    wait_for(client, "paused", "paused");
    assert_eq!(show(client, "off")["state"], "stopped");
    assert!(std::sync::Arc::ptr_eq(&before, &lab.engine("on").unwrap()), "the same engine");
    assert_eq!(act(client, "on", "start").0, 409);
    assert_eq!(act(client, "paused", "resume").1["state"], "running");

    lab.power_failure();
    let lab = lab.restart();
    let client = &mut lab.administrator();
    wait_for(client, "on", "running");
    assert!(!std::sync::Arc::ptr_eq(&before, &lab.engine("on").unwrap()), "a new engine");
    assert_eq!(show(client, "off")["state"], "stopped");
}

#[test]
fn a_guest_that_powers_itself_off_stays_off() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    test_guest(client, "a");
    act(client, "a", "start");
    lab.engine("a").unwrap().end(EndKind::Off, "the guest powered off");
    let stopped = wait_for(client, "a", "stopped");
    assert_eq!((&stopped["desired"], &stopped["reason"]), (&json!("off"), &Value::Null));
    let lab = lab.restart();
    assert_eq!(show(&mut lab.administrator(), "a")["state"], "stopped");
}

#[test]
fn an_engine_that_pauses_by_itself_says_why() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    test_guest(client, "a");
    act(client, "a", "start");
    let engine = lab.engine("a").unwrap();
    let reason = Some("The disk of the host is full.".to_owned());
    engine.say(&EngineMessage::State(Observed::Paused { reason }));
    assert_eq!(wait_for(client, "a", "paused")["reason"], "The disk of the host is full.");
    assert!(client.get("/guests/a").text().contains("The disk of the host is full."));
    assert_eq!(act(client, "a", "resume").1["state"], "running");
    engine.say(&EngineMessage::Addresses(vec!["192.0.2.99".into()]));
    eventually("the new address", || show(client, "a")["addresses"][0] == "192.0.2.99");
}

#[test]
fn the_picture_of_a_guest_that_is_just_being_started_comes_with_its_engine() {
    let lab = Lab::with(Manners { late: Duration::from_millis(1500), ..Manners::default() });
    let client = &mut lab.administrator();
    test_guest(client, "a");
    std::thread::scope(|scope| {
        let mut other = lab.administrator();
        scope.spawn(move || act(&mut other, "a", "start"));
        wait_for(client, "a", "starting");
        let picture = client.get("/api/v1/guests/a/screenshot.png");
        assert_eq!((picture.status, picture.body.as_slice()), (200, PICTURE));
    });
    act(client, "a", "poweroff");
    wait_for(client, "a", "stopped");
    assert_eq!(client.get("/api/v1/guests/a/screenshot.png").status, 404);
}

#[test]
fn the_file_systems_of_a_running_guest_are_frozen_and_go_on() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    test_guest(client, "a");
    let freeze = |client: &mut Client, body: Value| client.call("POST", "/api/v1/guests/a/freeze", &body);
    assert_eq!(freeze(client, json!({})).status, 409, "it does not run");
    act(client, "a", "start");
    assert_eq!(freeze(client, json!({ "seconds": 5 })).json()["file_systems"], 3);
    assert_eq!(freeze(client, json!({})).json()["file_systems"], 3);
    assert_eq!(act(client, "a", "thaw"), (200, json!({ "file_systems": 3 })));
    let asked = lab.engine("a").unwrap().asked();
    let frozen = |longest_s| EngineAction::Freeze { longest_s };
    assert_eq!(asked, [frozen(5), frozen(60), EngineAction::Thaw]);
    for (seconds, status) in [(0, 422), (601, 422), (7, 409)] {
        assert_eq!(freeze(client, json!({ "seconds": seconds })).status, status, "{seconds}");
    }
    assert!(client.get("/guests/a").text().contains("Froze file systems"), "it is in the history");
}

#[test]
fn a_tpm_is_reset_once_its_guest_has_stopped() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let made = make(client, json!({ "name": "a", "network": "none", "tpm": true, "boot": { "kind": "test" } }));
    test_guest(client, "without");
    assert!(client.get("/guests/a").text().contains("TPM"), "on its page");
    act(client, "a", "start");
    assert!(lab.engine("a").unwrap().launch.spec.switches.tpm);
    let kept = lab.app.path(&format!("guests/{}/tpm", made["id"].as_str().unwrap()));
    std::fs::create_dir_all(&kept).unwrap();
    std::fs::write(kept.join("tpm2-00.permall"), "keys").unwrap();
    let (status, refused) = act(client, "a", "reset-tpm");
    assert_eq!((status, kept.exists()), (409, true), "{refused}");
    assert!(!client.get("/guests/a/hardware").text().contains("/reset-tpm"), "no button while it runs");
    act(client, "a", "poweroff");
    wait_for(client, "a", "stopped");
    assert!(client.get("/guests/a/hardware").text().contains("/reset-tpm"));
    assert_eq!((act(client, "a", "reset-tpm").0, kept.exists()), (200, false));
    assert_eq!(client.post("/guests/a/reset-tpm", &[]).status, 303, "again, from the page");
    assert!(client.get("/guests/a").text().contains("Reset TPM"), "it is in the history");
    assert_eq!(act(client, "without", "reset-tpm").0, 409);
    // Switched off, its keys stay until it is switched on again.
    std::fs::create_dir_all(&kept).unwrap();
    assert_eq!(client.call("PATCH", "/api/v1/guests/a", &json!({ "tpm": false })).status, 200);
    assert!(kept.exists());
}

#[test]
fn a_guest_whose_engine_falls_before_it_was_ever_seen_has_no_screen() {
    let lab = Lab::with(Manners { shy: Some(Duration::from_millis(500)), ..Manners::default() });
    let client = &mut lab.administrator();
    test_guest(client, "a");
    act(client, "a", "start");
    assert_eq!(client.get("/api/v1/guests/a/screenshot.png").status, 404);
    assert_eq!(show(client, "a")["state"], "failed");
}

#[test]
fn what_the_guests_agent_says_is_shown_while_it_is_there() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    test_guest(client, "a");
    act(client, "a", "start");
    assert_eq!(show(client, "a")["agent"], Value::Null);
    assert!(client.get("/guests/a").text().contains("not seen"));
    let facts = AgentFacts {
        version: "7.2.19".into(),
        host_name: "web01.example".into(),
        system: "<b>Debian</b> GNU/Linux 12".into(),
    };
    let engine = lab.engine("a").unwrap();
    engine.say(&EngineMessage::Agent(Some(facts)));
    eventually("what the agent says", || show(client, "a")["agent"]["host_name"] == "web01.example");
    let page = client.get("/guests/a").text();
    assert!(page.contains("web01.example") && page.contains("GNU/Linux 12") && !page.contains("<b>Debian"), "{page}");
    engine.say(&EngineMessage::Agent(None));
    eventually("it has gone", || show(client, "a")["agent"] == Value::Null);
}

#[test]
fn a_stubborn_guest_stays_stopping_and_can_be_powered_off() {
    let lab = Lab::with(Manners { stubborn: true, ..Manners::default() });
    let client = &mut lab.administrator();
    test_guest(client, "a");
    act(client, "a", "start");
    assert_eq!(act(client, "a", "shutdown").1["state"], "stopping");
    assert_eq!(act(client, "a", "shutdown").0, 200, "the button can be pressed again");
    assert_eq!(act(client, "a", "start").0, 409);
    assert_eq!(act(client, "a", "pause").0, 409);
    let presses =
        lab.engine("a").unwrap().asked().iter().filter(|action| **action == EngineAction::PressPowerButton).count();
    assert_eq!(presses, 2);
    assert_eq!(act(client, "a", "poweroff").1["state"], "stopped");
}

#[test]
fn a_mute_engine_can_still_be_powered_off() {
    let lab = Lab::with(Manners { mute: true, ..Manners::default() });
    let client = &mut lab.administrator();
    test_guest(client, "a");
    let starting = client.call("POST", "/api/v1/guests/a/start", &json!({}));
    assert_eq!(starting.json()["state"], "starting");
    assert_eq!(act(client, "a", "poweroff").1["state"], "stopped");
}

#[test]
fn a_newer_engine_is_shown_as_running_and_not_as_broken() {
    let lab = Lab::with(Manners { protocol: innkeeper::wire::PROTOCOL + 1, ..Manners::default() });
    let client = &mut lab.administrator();
    test_guest(client, "a");
    let (_, started) = act(client, "a", "start");
    assert_eq!(started["state"], "running");
    assert!(started["reason"].as_str().unwrap().contains("speaks a newer protocol"), "{started}");
    let (status, refused) = act(client, "a", "pause");
    assert_eq!((status, refused["detail"].as_str().unwrap().contains("newer protocol")), (409, true));
    assert_eq!(act(client, "a", "poweroff").1["state"], "stopped");
}

#[test]
fn a_much_older_engine_runs_on_and_can_only_be_powered_off() {
    let lab = Lab::start();
    test_guest(&mut lab.administrator(), "a");
    lab.manners(|manners| manners.protocol = innkeeper::wire::PROTOCOL.saturating_sub(2));
    act(&mut lab.administrator(), "a", "start");
    // As after an upgrade over several releases: another server finds it.
    let lab = lab.restart();
    let client = &mut lab.administrator();
    let found = wait_for(client, "a", "running");
    assert!(found["reason"].as_str().unwrap().contains("speaks a much older protocol"), "{found}");
    for action in ["pause", "reset"] {
        let (status, refused) = act(client, "a", action);
        assert_eq!(status, 409, "{action}: {refused}");
        assert!(refused["detail"].as_str().unwrap().contains("much older protocol"), "{action}: {refused}");
        assert_eq!(show(client, "a")["state"], "running", "{action}");
    }
    assert_eq!(lab.engine("a").unwrap().asked(), [], "it is asked nothing that it might take for something else");
    assert_eq!(act(client, "a", "start").0, 409);
    assert_eq!(act(client, "a", "poweroff").1["state"], "stopped");
    lab.manners(|manners| manners.protocol = innkeeper::wire::PROTOCOL);
    assert_eq!(act(client, "a", "start").1["reason"], Value::Null);
}

#[test]
fn a_start_that_is_refused_says_why_and_can_be_tried_again() {
    let lab = Lab::with(Manners { starts: Err("There is no /dev/kvm.".into()), ..Manners::default() });
    let client = &mut lab.administrator();
    test_guest(client, "a");
    assert_eq!(act(client, "a", "start").1["detail"], "There is no /dev/kvm.");
    let failed = show(client, "a");
    assert_eq!((&failed["state"], &failed["reason"]), (&json!("failed"), &json!("There is no /dev/kvm.")));
    lab.manners(|manners| manners.starts = Ok(()));
    assert_eq!(act(client, "a", "start").1["state"], "running");
}

#[test]
fn the_pages_offer_what_the_lifecycle_allows() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    assert_eq!(client.get("/guests/new").status, 200);
    let form = [
        ("name", "web01"),
        ("cpus", "1"),
        ("memory", "64M"),
        ("boot", "disk"),
        ("disk_size", "1M"),
        ("network", "none"),
    ];
    let made = client.post("/guests", &form);
    assert_eq!(made.status, 303, "{}", made.text());
    let page = made.location().unwrap().to_owned();
    let again = client.post("/guests", &form);
    assert_eq!(again.status, 422);
    assert!(again.text().contains("Another guest has the name"), "{}", again.text());
    assert!(again.text().contains("value=\"web01\""), "what was typed is still there");

    for tab in ["", "/console", "/serial", "/hardware", "/log", "/delete"] {
        let answer = client.get(&format!("{page}{tab}"));
        assert_eq!(answer.status, 200, "{tab}: {}", answer.text());
        assert!(answer.text().contains("web01"), "{tab}");
    }
    let serial = client.get(&format!("{page}/serial"));
    assert!(serial.header("content-security-policy").unwrap().contains("'nonce-"));
    assert!(client.get("/guests").text().contains("web01"));

    let back = client.post(&format!("{page}/start"), &[("back", "/guests")]);
    assert_eq!((back.status, back.location()), (303, Some("/guests")));
    assert_eq!(show(client, "web01")["state"], "running");
    client.get(&page);
    let refused = client
        .post(&format!("{page}/hardware"), &[("name", "web01"), ("cpus", "2"), ("memory", "64M"), ("boot", "disk")]);
    assert_eq!(refused.status, 409, "{}", refused.text());
    client.post(&format!("{page}/poweroff"), &[]);
    wait_for(client, "web01", "stopped");
    client.get(&format!("{page}/hardware"));
    let fields = [("name", "web01"), ("cpus", "two"), ("memory", "128M"), ("boot", "disk")];
    let wrong = client.post(&format!("{page}/hardware"), &fields);
    assert_eq!(wrong.status, 422);
    let fields = [("name", "web01"), ("cpus", "2"), ("memory", "128M"), ("boot", "disk")];
    assert_eq!(client.post(&format!("{page}/hardware"), &fields).status, 303);
    for (size, status) in [("huge", 422), ("", 422), ("2M", 303)] {
        assert_eq!(client.post(&format!("{page}/disks"), &[("add_disk_size", size)]).status, status, "{size}");
    }
    let changed = show(client, "web01");
    assert_eq!((&changed["cpus"], changed["disks"].as_array().unwrap().len()), (&json!(2), 2));
    let disk = changed["disks"][0]["id"].as_str().unwrap();
    assert_eq!(client.post(&format!("{page}/disks/{disk}/delete"), &[]).status, 303);
    assert_eq!(show(client, "web01")["disks"].as_array().unwrap().len(), 1);
    assert_eq!(client.post(&format!("{page}/delete"), &[("confirm", "web")]).status, 422);
    let gone = client.post(&format!("{page}/delete"), &[("confirm", "web01")]);
    assert_eq!((gone.status, gone.location()), (303, Some("/guests")));
}

#[test]
fn disks_are_copied_from_images_by_a_task_and_keep_their_holes() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let source = lab.app.path("source.img");
    let file = std::fs::File::create(&source).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(b"middle", 40 << 20).unwrap();
    let image =
        client.call("POST", "/api/v1/images", &json!({ "host_path": source, "kind": "disk", "name": "source" }));
    assert_eq!(image.status, 201, "{}", image.text());
    let disks =
        json!([{ "image": "source", "size_bytes": 128 << 20 }, { "size_bytes": 1 << 20 }, { "image": "source" }]);
    let made = make(client, json!({ "name": "copy", "disks": disks, "network": "none", "start": true }));
    let done = wait_for(client, "copy", "running");
    assert_eq!((done["disks"][0]["ready"].clone(), &done["task"]), (json!(true), &Value::Null));
    let copied = lab.app.path(&format!("disks/{}.raw", made["disks"][0]["id"].as_str().unwrap()));
    let about = std::fs::metadata(&copied).unwrap();
    assert_eq!(about.len(), 128 << 20);
    assert!(about.blocks() * 512 < 8 << 20, "{} blocks", about.blocks());
    let copy = std::fs::File::open(copied).unwrap();
    let mut middle = [0; 6];
    copy.read_exact_at(&mut middle, 40 << 20).unwrap();
    assert_eq!(&middle, b"middle");
    assert_eq!(client.call("DELETE", "/api/v1/images/source", &json!({})).status, 204, "no guest uses it any more");
    let small = json!({ "name": "b", "disks": [{ "image": "source", "size_bytes": 1 << 20 }] });
    assert_eq!(client.call("POST", "/api/v1/guests", &small).json()["field"], "disk_image");
}

#[test]
fn a_copy_that_fails_leaves_no_guest_behind() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let source = lab.app.path("source.img");
    std::fs::write(&source, vec![7; 1 << 20]).unwrap();
    client.call("POST", "/api/v1/images", &json!({ "host_path": source, "kind": "disk", "name": "source" }));
    std::fs::write(&source, vec![7; 512]).unwrap();
    let made = make(
        client,
        json!({ "name": "a", "disks": [{ "size_bytes": 1 << 20 }, { "image": "source" }], "network": "none" }),
    );
    std::fs::write(&source, vec![7; 4 << 20]).unwrap();
    eventually("the guest or its task has an end", || {
        let gone = client.get("/api/v1/guests/a").status == 404;
        gone || show(client, "a")["task"].is_null()
    });
    // Shorter is padded; longer than the disk is refused, and then nothing is left.
    let left = std::fs::read_dir(lab.app.path("disks")).unwrap().count();
    let guests = client.get("/api/v1/guests").json().as_array().unwrap().len();
    assert_eq!(left, guests * 2, "{made}");
    std::fs::remove_file(&source).unwrap();
    let missing =
        json!({ "name": "b", "disks": [{ "size_bytes": 1 << 20 }, { "image": "source" }], "network": "none" });
    let answer = client.call("POST", "/api/v1/guests", &missing);
    assert!(answer.status >= 400, "{}", answer.text());
    assert_eq!(client.get("/api/v1/guests/b").status, 404);
    assert_eq!(std::fs::read_dir(lab.app.path("disks")).unwrap().count(), left);
}

fn disks(client: &mut Client, name: &str) -> Vec<Value> {
    show(client, name)["disks"].as_array().unwrap().clone()
}

#[test]
fn disks_come_and_go_while_the_guest_runs() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    make(client, json!({ "name": "web01", "disks": [{ "size_bytes": 1 << 20 }], "network": "none" }));
    act(client, "web01", "start");
    wait_for(client, "web01", "running");
    let patch = |client: &mut Client, body: Value| client.call("PATCH", "/api/v1/guests/web01", &body);
    for (body, words) in [
        (json!({ "add_disks": [{ "size_bytes": 1 << 20, "bus": "ahci" }] }), "virtio or NVMe"),
        (json!({ "add_disks": [{ "size_bytes": 1 << 20 }], "cpus": 2 }), "when it has stopped"),
        (json!({ "remove_disks": ["22222222"] }), "no disk"),
    ] {
        let refused = patch(client, body);
        assert!(refused.status >= 400 && refused.text().contains(words), "{}", refused.text());
    }
    assert_eq!(disks(client, "web01").len(), 1, "nothing has changed");

    let added = patch(client, json!({ "add_disks": [{ "size_bytes": 2 << 20, "bus": "nvme" }] }));
    assert_eq!(added.status, 200, "{}", added.text());
    let second = disks(client, "web01")[1]["id"].as_str().unwrap().to_owned();
    let engine = lab.engine("web01").unwrap();
    assert!(
        engine
            .asked()
            .iter()
            .any(|asked| matches!(asked, EngineAction::AttachDisk(disk) if disk.id.as_str() == second))
    );
    let file = lab.app.path(&format!("disks/{second}.raw"));
    assert!(file.exists());

    let removed = patch(client, json!({ "remove_disks": [second] }));
    assert_eq!(removed.status, 200, "{}", removed.text());
    eventually("the disk is forgotten", || disks(client, "web01").len() == 1 && !file.exists());
}

#[test]
fn a_disk_that_its_guest_does_not_let_go_goes_when_the_guest_ends() {
    let lab = Lab::with(Manners { stubborn: true, ..Manners::default() });
    let client = &mut lab.administrator();
    let sizes = json!([{ "size_bytes": 1 << 20 }, { "size_bytes": 2 << 20 }]);
    let made =
        make(client, json!({ "name": "web01", "disks": sizes, "network": "none", "boot_order": ["disk2", "disk1"] }));
    let second = made["disks"][1]["id"].as_str().unwrap().to_owned();
    act(client, "web01", "start");
    wait_for(client, "web01", "running");
    let removed = client.call("PATCH", "/api/v1/guests/web01", &json!({ "remove_disks": [second] }));
    assert!(removed.text().contains("uses it still"), "{}", removed.text());
    assert_eq!(disks(client, "web01")[1]["leaving"], true);
    assert_eq!(act(client, "web01", "poweroff").0, 200);
    wait_for(client, "web01", "stopped");
    eventually("the disk is forgotten", || disks(client, "web01").len() == 1);
    assert!(!lab.app.path(&format!("disks/{second}.raw")).exists());
    assert_eq!(show(client, "web01")["boot_order"].as_array().unwrap().len(), 2, "disk 1 and the CD");
}

#[test]
fn the_network_card_is_changed_while_the_guest_runs() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let disks = json!([{ "size_bytes": 1 << 20 }]);
    let wanted = json!({ "name": "web01", "disks": disks, "network": "user", "boot_order": ["network", "disk1"] });
    make(client, wanted);
    act(client, "web01", "start");
    wait_for(client, "web01", "running");
    let patch = |client: &mut Client, body: Value| client.call("PATCH", "/api/v1/guests/web01", &body);
    let mode = |client: &mut Client| show(client, "web01")["network"]["mode"].as_str().unwrap().to_owned();

    let changed = patch(client, json!({ "network": "nat", "network_model": "e1000" }));
    assert_eq!((changed.status, mode(client).as_str()), (200, "nat"), "{}", changed.text());
    let asked = lab.engine("web01").unwrap().asked();
    let [.., EngineAction::Detach(PluggedDevice::Network(old)), EngineAction::AttachNetwork(new)] = &asked[..] else {
        panic!("{asked:?}");
    };
    assert_eq!((*old, new.model), (new.mac, NetworkModel::E1000), "the address stays");

    let refused = patch(client, json!({ "network": "bridge:br7" }));
    assert!(refused.text().contains("has no network card now: There is no bridge br7"), "{}", refused.text());
    assert_eq!(mode(client), "none", "as it is");
    assert_eq!(patch(client, json!({ "network": "user" })).status, 200);
    assert_eq!(mode(client), "user");

    // By the form of the page, and by itself.
    let form = [("network", "none"), ("network_model", "virtio")];
    assert_eq!(client.post("/guests/web01/network", &form).status, 303);
    assert_eq!(mode(client), "none");
    assert_eq!(patch(client, json!({ "network": "user" })).status, 200);
    lab.engine("web01").unwrap().say(&EngineMessage::Plugged(vec![]));
    eventually("the card is forgotten", || mode(client) == "none");
    let devices: Vec<Value> = show(client, "web01")["boot_order"].as_array().unwrap().clone();
    assert!(!devices.contains(&json!("network")), "{devices:?}");
}

#[test]
fn a_card_that_its_guest_does_not_let_go_stays_as_it_is() {
    let lab = Lab::with(Manners { stubborn: true, ..Manners::default() });
    let client = &mut lab.administrator();
    make(client, json!({ "name": "web01", "disks": [{ "size_bytes": 1 << 20 }], "network": "user" }));
    act(client, "web01", "start");
    wait_for(client, "web01", "running");
    let refused = client.call("PATCH", "/api/v1/guests/web01", &json!({ "network": "nat" }));
    assert_eq!(refused.status, 409, "{}", refused.text());
    assert!(refused.text().contains("uses it still"), "{}", refused.text());
    assert_eq!(show(client, "web01")["network"]["mode"], "user");
}

#[test]
fn the_cd_is_changed_while_the_guest_runs_and_stays_changed() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    let iso = lab.app.path("a.iso");
    let mut bytes = vec![0; 64 << 10];
    bytes[32769..32774].copy_from_slice(b"CD001");
    std::fs::write(&iso, &bytes).unwrap();
    let added = client.call("POST", "/api/v1/images", &json!({ "host_path": iso, "name": "a.iso" }));
    assert_eq!(added.status, 201, "{}", added.text());
    test_guest(client, "a");
    act(client, "a", "start");
    let put = client.call("POST", "/api/v1/guests/a/cd", &json!({ "image": "a.iso" }));
    assert_eq!((put.status, &put.json()["cdrom"]["name"]), (200, &json!("a.iso")), "{}", put.text());
    assert_eq!(lab.engine("a").unwrap().asked().last(), Some(&EngineAction::ChangeCd));
    assert_eq!(client.call("DELETE", "/api/v1/images/a.iso", &json!({})).status, 409, "it is in use");
    assert_eq!(client.call("POST", "/api/v1/guests/a/cd", &json!({ "image": "b.iso" })).json()["field"], "image");
    act(client, "a", "poweroff");
    assert!(matches!(act(client, "a", "start").0, 200));
    assert!(matches!(&lab.engine("a").unwrap().launch.cd, Some(Place::Host(path)) if *path == iso));
    assert_eq!(client.call("POST", "/api/v1/guests/a/cd", &json!({})).json()["cdrom"], Value::Null);
}

#[test]
fn each_test_guest_of_the_page_has_a_name_of_its_own() {
    let lab = Lab::start();
    let client = &mut lab.administrator();
    client.get("/guests/new");
    let form = [
        ("boot", "test"),
        ("name", "test-guest"),
        ("memory", "16M"),
        ("cpus", "1"),
        ("network", "none"),
        ("start", "on"),
    ];
    for _ in 0..2 {
        assert_eq!(client.post("/guests", &form).status, 303);
    }
    wait_for(client, "test-guest", "running");
    wait_for(client, "test-guest-2", "running");
}
