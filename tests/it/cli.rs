//! The command line against a running server, as scripts use it.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::{
    fake_engine::{Lab, Manners, PICTURE},
    support::eventually,
};

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn ran(output: Output) -> Ran {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

fn innkeeper(state: &Path, line: &str) -> Ran {
    with_input(state, line, b"")
}

fn with_input(state: &Path, line: &str, input: &[u8]) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_innkeeper"))
        .args(line.split_whitespace())
        .arg("--state")
        .arg(state)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    ran(child.wait_with_output().unwrap())
}

/// What a command must do well; its output.
fn well(state: &Path, line: &str) -> String {
    let ran = innkeeper(state, line);
    assert_eq!(ran.code, 0, "{line}: {}{}", ran.out, ran.err);
    ran.out
}

fn json(state: &Path, line: &str) -> Value {
    serde_json::from_str(&well(state, line)).unwrap()
}

#[test]
fn a_guest_goes_through_its_life_from_a_terminal() {
    let lab = Lab::start();
    let _client = lab.app.client();
    let state = lab.app.state.path();
    assert_eq!(
        well(state, "guest create web01 --cpus 2 --memory 64M --disk 1M --disk 2M --network none"),
        "web01 created\n"
    );
    let shown = json(state, "guest show web01 --json");
    assert_eq!((&shown["cpus"], shown["disks"].as_array().unwrap().len()), (&Value::from(2), 2));
    assert_eq!(well(state, "guest start web01"), "web01: running\n");
    let list = well(state, "guest ls");
    assert!(list.starts_with("NAME ") && list.contains("web01  running     2  64 MiB  3 MiB  192.0.2.7"), "{list}");
    assert_eq!(json(state, "guest ls --json")[0]["name"], "web01");
    for (line, state_then) in [("pause", "paused"), ("resume", "running"), ("reset", "running")] {
        assert_eq!(well(state, &format!("guest {line} web01")), format!("web01: {state_then}\n"));
    }
    let refused = innkeeper(state, "guest rm web01");
    assert_eq!((refused.code, refused.err.contains("Shut it down")), (1, true), "{}", refused.err);
    let shot = state.join("shot.png");
    well(state, &format!("guest screenshot web01 {}", shot.display()));
    assert_eq!(fs::read(&shot).unwrap(), PICTURE);
    well(state, "guest shutdown web01 --wait 10");
    well(state, "guest set web01 --cpus 1 --name web02");
    let gone = well(state, "guest rm web02");
    let disk = shown["disks"][0]["id"].as_str().unwrap();
    assert!(gone.contains(disk) && gone.contains("1 MiB") && gone.ends_with("web02 removed\n"), "{gone}");
    assert_eq!(json(state, "guest ls --json"), Value::Array(vec![]));
}

#[test]
fn the_console_works_without_a_terminal() {
    let lab = Lab::start();
    let _client = lab.app.client();
    let state = lab.app.state.path();
    well(state, "guest create t --test-guest --network none --start");
    let engine = lab.engine("t").unwrap();
    engine.print(b"booted\r\nlogin: ");
    assert_eq!(well(state, "guest console t --dump"), "booted\r\nlogin: ");
    let session = with_input(state, "guest console t", b"root\n");
    assert_eq!((session.code, session.out.as_str()), (0, "booted\r\nlogin: "), "{}", session.err);
    assert_eq!(engine.typed(), b"root\n");
    let missing = innkeeper(state, "guest console nobody");
    assert_eq!((missing.code, missing.err.as_str()), (1, "innkeeper: There is no guest \"nobody\".\n"));
}

#[test]
fn a_guest_that_is_made_but_does_not_start_is_a_failure() {
    let lab = Lab::with(Manners { starts: Err("There is no /dev/kvm.".into()), ..Manners::default() });
    let _client = lab.app.client();
    let state = lab.app.state.path();
    let made = innkeeper(state, "guest create t --test-guest --network none --start");
    assert_eq!((made.code, made.out.as_str()), (1, "t created\n"));
    assert_eq!(made.err, "innkeeper: t is created, but does not start: There is no /dev/kvm.\n");
    assert_eq!(innkeeper(state, "guest create u --test-guest --network none --start --json").code, 1);
    lab.manners(|manners| manners.starts = Ok(()));
    assert_eq!(well(state, "guest create v --test-guest --network none --start"), "v created\nv: running\n");
    assert_eq!(json(state, "guest create w --test-guest --network none --start --json")["state"], "running");
}

#[test]
fn mistakes_have_a_sentence_and_an_exit_code() {
    let lab = Lab::start();
    let _client = lab.app.client();
    let state = lab.app.state.path();
    for (line, code, says) in [
        ("guest show nobody", 1, "There is no guest \"nobody\"."),
        ("guest create ../x", 1, "name: A name starts with"),
        ("guest create x --cpus 99", 1, "cpus: A guest has 1 to 64 vCPUs."),
        ("guest create x --cdrom nothing.iso", 1, "There is no image \"nothing.iso\""),
        ("guest create x --memory lots", 2, "not a size"),
        ("guest create x --cmdline quiet", 2, "--cmdline needs"),
        ("guest set x", 1, "There is no guest \"x\"."),
        ("guest frobnicate", 2, "unrecognized subcommand"),
    ] {
        let ran = innkeeper(state, line);
        assert_eq!(ran.code, code, "{line}: {}", ran.err);
        assert!(ran.err.contains(says), "{line}: {}", ran.err);
    }
    let empty = tempfile::tempdir().unwrap();
    let nobody = innkeeper(empty.path(), "guest ls");
    assert_eq!((nobody.code, nobody.err.contains("No Innkeeper answers at")), (1, true), "{}", nobody.err);
}

#[test]
fn an_administrator_needs_only_the_state_directory() {
    let lab = Lab::start();
    let _client = lab.app.client();
    lab.app.give_state_to_its_user();
    let state = lab.app.state.path();
    let link = well(state, "admin setup-link");
    assert!(link.starts_with("https://") && link.contains("/setup?token="), "{link}");
    let made = with_input(state, "admin create-user ada --role administrator --password-stdin", b"correct horse\n");
    assert_eq!((made.code, made.out.as_str()), (0, "ada created\n"), "{}", made.err);
    let short = with_input(state, "admin create-user bob --role viewer --password-stdin", b"x\n");
    assert_eq!(short.code, 1);
    let token = well(state, "admin create-token ci");
    assert_eq!(well(state, "admin check-database"), "The database is in order.\n");

    let remote = Command::new(env!("CARGO_BIN_EXE_innkeeper"))
        .args(["guest", "ls", "--json", "--url", &format!("https://localhost:{}", lab.app.port), "--ca"])
        .arg(state.join("tls/ca.pem"))
        .env("INNKEEPER_TOKEN", token.trim())
        .output()
        .unwrap();
    let remote = ran(remote);
    assert_eq!((remote.code, remote.out.trim()), (0, "[]"), "{}", remote.err);
    let wrong = Command::new(env!("CARGO_BIN_EXE_innkeeper"))
        .args(["guest", "ls", "--url", &format!("https://localhost:{}", lab.app.port), "--ca"])
        .arg(state.join("tls/ca.pem"))
        .env("INNKEEPER_TOKEN", "guessed")
        .output()
        .unwrap();
    assert_eq!(ran(wrong).code, 1);
}

#[test]
fn a_console_over_https_survives_and_ends_with_the_guest() {
    let lab = Lab::start();
    let _client = lab.app.client();
    lab.app.give_state_to_its_user();
    let state = lab.app.state.path();
    well(state, "guest create t --test-guest --network none --start");
    with_input(state, "admin create-user ada --password-stdin", b"correct horse\n");
    let token = well(state, "admin create-token ci");
    let engine = lab.engine("t").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_innkeeper"))
        .args(["guest", "console", "t", "--url", &format!("https://localhost:{}", lab.app.port), "--ca"])
        .arg(state.join("tls/ca.pem"))
        .env("INNKEEPER_TOKEN", token.trim())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"typed").unwrap();
    eventually("the guest hears", || engine.typed() == b"typed");
    engine.print(&[b'x'; 200_000]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    well(state, "guest poweroff t");
    let ran = ran(child.wait_with_output().unwrap());
    drop(stdin);
    assert_eq!((ran.code, ran.out.len()), (0, 200_000), "{}", ran.err);
    assert!(ran.err.contains("The guest has stopped."), "{}", ran.err);
}
