//! The NAT network's dnsmasq: DHCP, router advertisements and DNS, on our bridge only.
//!
//! It goes into the background once it works, so that its complaints about the host are our error and it runs on when `hostd` restarts.
//! It is found again by its pid file and its arguments.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, User},
};

use crate::{
    error::{Error, Result},
    host::{
        net::settings::Settings,
        tool::{self, DNSMASQ},
    },
};

/// How long it may take to end when asked; it takes milliseconds.
const END_WAIT: Duration = Duration::from_secs(2);
const LEASE: &str = "12h";

/// Starts it unless it runs with exactly the arguments it should have; one with others is replaced.
pub(super) fn ensure(settings: &Settings, run: &Path, ipv6: bool) -> Result<()> {
    let wanted = arguments(settings, run, ipv6);
    match running(run) {
        Some((_, arguments)) if arguments == wanted => return Ok(()),
        Some((pid, _)) => end(pid, run)?,
        None => {}
    }
    let arguments: Vec<&str> = wanted.iter().map(String::as_str).collect();
    DNSMASQ.run("start the NAT network's DHCP and DNS", &arguments).map(drop)
}

pub(super) fn is_running(run: &Path) -> bool {
    running(run).is_some()
}

/// Ends it and removes its files.
pub(super) fn remove(run: &Path) -> Result<()> {
    if let Some((pid, _)) = running(run) {
        end(pid, run)?;
    }
    for path in [pid_file(run), lease_file(run)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::internal(format!("Cannot remove {}.", path.display()), error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn pid_file(run: &Path) -> PathBuf {
    run.join("dnsmasq.pid")
}

fn lease_file(run: &Path) -> PathBuf {
    run.join("dnsmasq.leases")
}

fn pid_argument(run: &Path) -> String {
    format!("--pid-file={}", tool::text(pid_file(run).as_os_str()))
}

fn arguments(settings: &Settings, run: &Path, ipv6: bool) -> Vec<String> {
    let (bridge, subnet) = (&settings.bridge, &settings.subnet);
    let mut arguments = vec![
        "--conf-file=/dev/null".to_owned(),
        pid_argument(run),
        format!("--interface={bridge}"),
        "--except-interface=lo".into(),
        // Not --bind-interfaces: this too binds to our addresses only, and takes up the link-local one that comes with the first tap.
        "--bind-dynamic".into(),
        format!("--dhcp-range={},{},{},{LEASE}", subnet.host(10), subnet.host(250), subnet.netmask()),
        // In the run folder, which is memory: a renewed lease writes no disk.
        format!("--dhcp-leasefile={}", tool::text(lease_file(run).as_os_str())),
        "--dhcp-authoritative".into(),
        // Guests copied from one image send the same client id; their hardware addresses differ.
        "--dhcp-ignore-clid".into(),
        // Nobody else gives out addresses here, so the three seconds of asking whether one is in use are not needed.
        "--no-ping".into(),
        "--no-hosts".into(),
        "--quiet-dhcp".into(),
        "--quiet-dhcp6".into(),
        "--quiet-ra".into(),
    ];
    if ipv6 {
        arguments.push(format!("--dhcp-range={},ra-stateless,64,{LEASE}", settings.ipv6_prefix()));
        arguments.push("--enable-ra".into());
    }
    if User::from_name("dnsmasq").ok().flatten().is_some() {
        arguments.push("--user=dnsmasq".into());
    }
    arguments
}

/// The process that the pid file names, if it is a dnsmasq with that pid file; and its arguments.
fn running(run: &Path) -> Option<(Pid, Vec<String>)> {
    let pid: i32 = fs::read_to_string(pid_file(run)).ok()?.trim().parse().ok()?;
    // A process that has ended and is not yet reaped has no arguments.
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = cmdline.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let program = words.next()?;
    let mut arguments: Vec<String> = words.collect();
    arguments.pop();
    let ours = program.ends_with("dnsmasq") && arguments.contains(&pid_argument(run));
    (pid > 1 && ours).then_some((Pid::from_raw(pid), arguments))
}

fn end(pid: Pid, run: &Path) -> Result<()> {
    let failed = |why: String| Error::internal("Cannot end the NAT network's dnsmasq.", why);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        match kill(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(failed(error.to_string())),
        }
        let deadline = Instant::now() + END_WAIT;
        while Instant::now() < deadline {
            if running(run).is_none() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
    Err(failed(format!("process {pid} does not end")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::net::settings::tests::sample;

    #[test]
    fn it_serves_our_bridge_and_nothing_else() {
        let arguments = arguments(&sample(), Path::new("/run/x"), true);
        for wanted in [
            "--conf-file=/dev/null",
            "--interface=innkeeper0",
            "--except-interface=lo",
            "--dhcp-range=10.77.0.10,10.77.0.250,255.255.255.0,12h",
            "--dhcp-range=fd12:3400:789a::,ra-stateless,64,12h",
            "--pid-file=/run/x/dnsmasq.pid",
        ] {
            assert!(arguments.iter().any(|argument| argument == wanted), "{wanted}");
        }
    }

    #[test]
    fn without_ipv6_nothing_is_advertised() {
        let arguments = arguments(&sample(), Path::new("/run/x"), false);
        assert!(
            !arguments
                .iter()
                .any(|argument| argument.contains("ra") && argument.contains("enable") || argument.contains("fd12"))
        );
    }

    #[test]
    fn another_process_with_the_number_of_the_pid_file_is_not_ours() {
        let run = tempfile::tempdir().unwrap();
        assert!(!is_running(run.path()));
        for pid in ["1", "0", "-1", "x", &std::process::id().to_string()] {
            fs::write(pid_file(run.path()), pid).unwrap();
            assert!(!is_running(run.path()), "{pid}");
        }
        remove(run.path()).unwrap();
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
    }
}
