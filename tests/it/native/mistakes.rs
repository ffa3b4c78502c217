//! What is typed wrongly gets a sentence at its field and an exit code, and changes nothing.

use super::world::World;

#[test]
fn wrong_names_sizes_and_numbers_are_refused_at_their_field() {
    let Some(world) = World::new() else { return };
    world.well("guest create first --test-guest --memory 16M --network none");
    let before = (world.well("guest ls --json"), world.well("image ls --json"));
    let long = "x".repeat(64);
    let zip = world.file("not.iso", b"PK\x03\x04 and so on");
    let empty = world.file("empty.img", b"");
    let [zip, empty, folder] =
        [&zip, &empty, &zip.parent().unwrap().to_owned()].map(|path| path.to_str().unwrap().to_owned());
    let test = ["--test-guest", "--network", "none"];
    let cases: [(&[&str], i32, &str); 25] = [
        (&["guest", "create", ""], 1, "name: A name is needed."),
        (&["guest", "create", "../x"], 1, "name: A name starts with"),
        (&["guest", "create", "a/b"], 1, "name: A name starts with"),
        (&["guest", "create", "a b"], 1, "name: A name starts with"),
        (&["guest", "create", "a\nb"], 1, "name: A name starts with"),
        (&["guest", "create", &long], 1, "name: A name has at most 63 characters"),
        (&["guest", "create", "first"], 1, "name: Another guest has the name"),
        (&["guest", "create", "x", "--cpus", "0"], 1, "cpus: A guest has 1 to 64 vCPUs."),
        (&["guest", "create", "x", "--cpus", "65"], 1, "cpus: A guest has 1 to 64 vCPUs."),
        (&["guest", "create", "x", "--cpus", "-1"], 2, "--cpus"),
        (&["guest", "create", "x", "--cpus", "99999999999"], 2, "--cpus"),
        (&["guest", "create", "x", "--memory", "0"], 1, "memory"),
        (&["guest", "create", "x", "--memory", "100"], 1, "memory"),
        (&["guest", "create", "x", "--memory", "-1G"], 2, "not a size"),
        (&["guest", "create", "x", "--memory", "9999999T"], 2, "--memory"),
        (&["guest", "create", "x", "--memory", "9000T"], 1, "memory"),
        (&["guest", "create", "x", "--disk", "0"], 1, "disk"),
        (&["guest", "create", "x", "--disk", "8000000T"], 1, "disk"),
        (&["guest", "create", "x", "--disk", "nothing.img"], 1, "There is no image \"nothing.img\""),
        (&["guest", "create", "x", "--cdrom", &zip], 1, "zip archive"),
        (&["guest", "create", "x", "--cdrom", &empty], 1, "empty"),
        (&["guest", "create", "x", "--cdrom", &folder], 1, "regular file"),
        (&["guest", "create", "x", "--network", "bridge:../../x"], 1, "network"),
        (&["guest", "create", "x", "--network", "wifi"], 1, "network"),
        (&["guest", "set", "first", "--memory", "1"], 1, "memory"),
    ];
    for (words, code, says) in cases {
        let with_rest = [words, if words.contains(&"--network") { &test[..1] } else { &test[..] }].concat();
        let words = if words[1] == "set" { words.to_vec() } else { with_rest };
        let ran = world.output_of(&words);
        assert_eq!(ran.code, code, "{words:?}: {}{}", ran.out, ran.err);
        assert!(ran.err.contains(says), "{words:?}: {}", ran.err);
    }
    assert_eq!((world.well("guest ls --json"), world.well("image ls --json")), before, "nothing has changed");
    let disks = std::fs::read_dir(world.state().join("disks")).map_or(0, Iterator::count);
    assert_eq!(disks, 0, "no file is left");
}

#[test]
fn a_file_that_is_no_kernel_is_refused_with_the_reason() {
    let Some(world) = World::new() else { return };
    let kernel = world.file("vmlinuz", b"this is no kernel at all");
    world.well(&format!("guest create k --kernel {} --memory 16M --network none", kernel.display()));
    let refused = world.output("guest start k");
    assert_eq!(refused.code, 1, "{}", refused.out);
    let shown = world.show("k");
    assert_eq!(shown["state"], "failed");
    assert!(shown["reason"].as_str().unwrap().contains("kernel"), "{shown}");
}

#[test]
fn orders_that_do_not_fit_are_refused() {
    let Some(world) = World::new() else { return };
    world.test_guest("t", "");
    world.well("guest create off --test-guest --memory 16M --network none");
    for (line, code, says) in [
        ("guest start nobody", 1, "There is no guest \"nobody\"."),
        ("guest resume t", 1, "The guest runs already."),
        ("guest pause off", 1, "The guest does not run."),
        ("guest reset off", 1, "The guest does not run."),
        ("guest shutdown off", 1, "The guest does not run."),
        ("guest console off", 1, "does not run"),
        ("guest screenshot off shot.png", 1, "does not run"),
        ("guest screenshot t /nonexistent/shot.png", 1, "/nonexistent/shot.png"),
        ("guest cd t nothing.iso", 1, "There is no image \"nothing.iso\""),
        ("guest rm t", 1, "Shut it down"),
        ("guest rm", 2, "NAME"),
        ("serve --listen nowhere", 2, "--listen nowhere"),
        ("serve --listen 127.0.0.1", 2, "--listen 127.0.0.1"),
    ] {
        let ran = world.output(line);
        assert_eq!(ran.code, code, "{line}: {}{}", ran.out, ran.err);
        assert!(ran.err.contains(says), "{line}: {}", ran.err);
    }
    assert_eq!(world.states(), [("off".into(), "stopped".into()), ("t".into(), "running".into())]);
}
