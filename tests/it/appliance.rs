//! What the scripts of the appliance read of a running server.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use crate::support::eventually;

/// The guests that `appliance/install --uninstall` takes for running, by the run-time files in `run`.
fn running_guests(run: &std::path::Path) -> String {
    let script = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/appliance/install")).unwrap();
    let (_, from) = script.split_once("\nrunning_guests() {").unwrap();
    let (body, _) = from.split_once("\n}\n").unwrap();
    let test =
        format!("set -euo pipefail\nas_root() {{ \"$@\"; }}\nrun=$1\nrunning_guests() {{{body}\n}}\nrunning_guests");
    let ran = Command::new("bash").args(["-c", &test, "bash"]).arg(run).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

#[test]
fn uninstalling_sees_engines_by_the_files_that_the_supervisor_writes() {
    let run = tempfile::tempdir().unwrap();
    assert_eq!(running_guests(run.path()), "");
    let folder = run.path().join("guests/abcd2345");
    fs::create_dir_all(&folder).unwrap();
    let remember = |pid: u32| {
        let file = format!("{{\"pid\":{pid},\"started\":5,\"boot_id\":\"x\",\"run_as\":1900000000}}");
        fs::write(folder.join("pid"), file).unwrap();
    };
    remember(std::process::id());
    assert_eq!(running_guests(run.path()), "", "another program has that number");
    // A program with the name of an engine, which waits for a line that never comes.
    fs::write(run.path().join("engine"), "read -r\n").unwrap();
    let mut engine = Command::new("bash");
    engine.arg0("innkeeper").arg("engine").current_dir(run.path()).stdin(Stdio::piped());
    let mut engine = engine.spawn().unwrap();
    remember(engine.id());
    eventually("the engine is seen", || running_guests(run.path()) == "abcd2345\n");
    engine.kill().unwrap();
    engine.wait().unwrap();
}
