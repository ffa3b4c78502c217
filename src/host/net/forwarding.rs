//! The host's forwarding of packets: turned on for the NAT network if it was off, and turned back when the network goes.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

const SYSCTLS: &str = "/proc/sys";
const IPV4: &str = "net/ipv4/ip_forward";
const IPV6: &str = "net/ipv6/conf/all/forwarding";

/// What the settings were that we changed since the host started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Before {
    /// The start of the host that `values` belong to: a restart takes our changes back by itself.
    boot: String,
    /// Name under `/proc/sys` and value, in the order in which they were changed.
    values: Vec<(String, String)>,
}

/// A setting to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    name: String,
    value: &'static str,
}

/// Whether the host has IPv6 at all: not turned off at its start, nor for new interfaces.
pub(super) fn host_has_ipv6() -> bool {
    read(Path::new(SYSCTLS), "net/ipv6/conf/default/disable_ipv6").as_deref() == Some("0")
}

/// What must change, with what was noted in `before`.
pub(super) fn plan(before: &mut Before, bridge: &str) -> Vec<Change> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
    plan_in(Path::new(SYSCTLS), &boot, before, bridge)
}

fn plan_in(root: &Path, boot: &str, before: &mut Before, bridge: &str) -> Vec<Change> {
    if before.boot != boot {
        *before = Before { boot: boot.to_owned(), values: vec![] };
    }
    let mut changes = vec![];
    let mut wish = |name: String, value: &'static str| {
        let Some(now) = read(root, &name).filter(|now| now != value) else { return };
        if !before.values.iter().any(|(known, _)| *known == name) {
            before.values.push((name.clone(), now));
        }
        changes.push(Change { name, value });
    };
    wish(IPV4.into(), "1");
    if read(root, IPV6).as_deref() == Some("0") {
        // A host that forwards IPv6 stops listening to router advertisements, and so loses its own address and route, unless accept_ra is 2
        // (Documentation/networking/ip-sysctl.rst). "default" is for interfaces that come later.
        for name in interfaces(root).into_iter().filter(|name| name != "all" && name != "lo" && name != bridge) {
            let name = format!("net/ipv6/conf/{name}/accept_ra");
            if read(root, &name).as_deref() == Some("1") {
                wish(name, "2");
            }
        }
        wish(IPV6.into(), "1");
    }
    changes
}

pub(super) fn apply(changes: &[Change]) -> Result<()> {
    apply_in(Path::new(SYSCTLS), changes)
}

fn apply_in(root: &Path, changes: &[Change]) -> Result<()> {
    changes.iter().try_for_each(|Change { name, value }| write(root, name, value))
}

/// Writes back what was before us, last change first. What is gone meanwhile, like an interface, is passed over.
pub(super) fn restore(before: &Before) -> Result<()> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    restore_in(Path::new(SYSCTLS), boot.trim(), before)
}

fn restore_in(root: &Path, boot: &str, before: &Before) -> Result<()> {
    if before.boot != boot {
        return Ok(());
    }
    let there = before.values.iter().rev().filter(|(name, _)| root.join(name).exists());
    there.into_iter().try_for_each(|(name, value)| write(root, name, value))
}

fn interfaces(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join("net/ipv6/conf")).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn read(root: &Path, name: &str) -> Option<String> {
    Some(fs::read_to_string(root.join(name)).ok()?.trim().to_owned())
}

fn write(root: &Path, name: &str, value: &str) -> Result<()> {
    // The names come from a file of ours; it is checked like any other input.
    let inside = name.starts_with("net/") && !name.split('/').any(|part| part == ".." || part.is_empty());
    if !inside {
        return Err(Error::new(
            ErrorKind::Internal,
            "host/network.json names a setting that is not one of the network.",
        ));
    }
    fs::write(root.join(name), value).map_err(|error| {
        let sysctl = name.replace('/', ".");
        let remedy = format!("Where Innkeeper runs in a container, set it outside: sysctl {sysctl}={value}");
        Error::new(ErrorKind::Unavailable, format!("Cannot set {sysctl} to {value} ({error}). {remedy}")).because(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH0: &str = "net/ipv6/conf/eth0/accept_ra";
    const ETH1: &str = "net/ipv6/conf/eth1/accept_ra";

    fn host(values: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, value) in values {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    fn quiet_host() -> tempfile::TempDir {
        host(&[(IPV4, "0"), (IPV6, "0"), (ETH0, "1"), (ETH1, "0"), ("net/ipv6/conf/innkeeper0/accept_ra", "1")])
    }

    #[test]
    fn what_was_off_comes_back_and_the_hosts_own_ipv6_is_kept() {
        let root = quiet_host();
        let mut before = Before::default();
        let changes = plan_in(root.path(), "a", &mut before, "innkeeper0");
        apply_in(root.path(), &changes).unwrap();
        for (name, value) in [(IPV4, "1"), (IPV6, "1"), (ETH0, "2"), (ETH1, "0")] {
            assert_eq!(read(root.path(), name).as_deref(), Some(value), "{name}");
        }
        assert_eq!(plan_in(root.path(), "a", &mut before, "innkeeper0"), []);
        restore_in(root.path(), "a", &before).unwrap();
        for (name, value) in [(IPV4, "0"), (IPV6, "0"), (ETH0, "1"), (ETH1, "0")] {
            assert_eq!(read(root.path(), name).as_deref(), Some(value), "{name}");
        }
    }

    #[test]
    fn what_was_on_stays_on() {
        let root = host(&[(IPV4, "1"), (IPV6, "1"), (ETH0, "1")]);
        let mut before = Before::default();
        assert_eq!(plan_in(root.path(), "a", &mut before, "innkeeper0"), []);
        restore_in(root.path(), "a", &before).unwrap();
        assert_eq!(read(root.path(), IPV4).as_deref(), Some("1"));
    }

    #[test]
    fn after_a_restart_of_the_host_its_own_choice_is_the_one_to_return_to() {
        let root = quiet_host();
        let mut before = Before::default();
        apply_in(root.path(), &plan_in(root.path(), "a", &mut before, "innkeeper0")).unwrap();
        // The administrator has made forwarding permanent; the host starts anew with it on.
        assert_eq!(plan_in(root.path(), "b", &mut before, "innkeeper0"), []);
        restore_in(root.path(), "b", &before).unwrap();
        assert_eq!(read(root.path(), IPV4).as_deref(), Some("1"));
    }

    #[test]
    fn a_setting_outside_the_network_is_never_written() {
        let root = host(&[("kernel/panic", "0")]);
        for name in ["kernel/panic", "net/../kernel/panic", "/etc/passwd"] {
            assert!(write(root.path(), name, "1").is_err(), "{name}");
        }
        assert_eq!(read(root.path(), "kernel/panic").as_deref(), Some("0"));
    }
}
