//! What is so on this host, read once and without judging it: `doctor.rs` turns facts into findings.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use crate::{
    host::{
        firmware::Firmware,
        net::{self, firewall},
        passt, sys, tool,
    },
    types,
};

/// The bit of CAP_NET_ADMIN in a capability set (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;

/// Everything that `doctor` judges. Plain data, so that a test can be any host.
#[derive(Debug, Clone)]
pub struct Facts {
    pub kvm: Kvm,
    /// Whether `/proc/cpuinfo` has `vmx` or `svm`.
    pub virtualization_flags: bool,
    pub memory_bytes: u64,
    pub memory_free_bytes: u64,
    pub state: PathBuf,
    /// Free bytes where the state is, or what the kernel says.
    pub state_free: Result<u64, String>,
    /// Firmware files that are missing.
    pub firmware_missing: Vec<(Firmware, PathBuf)>,
    /// Whether this process may make taps and bridges.
    pub net_admin: bool,
    pub tun: bool,
    /// Names and packages of network tools that are missing.
    pub tools_missing: Vec<(&'static str, &'static str)>,
    pub passt: bool,
    pub swtpm: bool,
    pub default_route: bool,
    /// Other firewalls that stop guests, a sentence with remedy each; empty without the privilege to look.
    pub firewalls: Vec<firewall::Block>,
    pub cgroup_v2: bool,
    pub clock_synchronised: bool,
    pub now_ms: i64,
    pub user: User,
    /// Whether systemd runs this host.
    pub systemd: bool,
}

/// What `/dev/kvm` is to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    Absent,
    /// It is there and refuses us. `group_may`: the group of the file may open it; its name, when it has one.
    Denied {
        group_may: bool,
        group: Option<String>,
    },
    /// It is there and broken.
    Broken(String),
    Open {
        api_version: i32,
    },
}

/// Who we run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// `service_user`: the user `innkeeper` exists.
    Root {
        service_user: bool,
    },
    Ordinary {
        name: String,
        lingers: bool,
    },
}

/// What `doctor` looks for.
const FIRMWARE: [Firmware; 5] =
    [Firmware::Bios, Firmware::VgaRom, Firmware::VirtioNetworkRom, Firmware::E1000Rom, Firmware::Uefi];

impl Facts {
    /// Reads everything. `state` need not exist yet.
    pub fn gather(state: &Path) -> Facts {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let net_admin = net_admin();
        Facts {
            kvm: kvm(Path::new("/dev/kvm")),
            virtualization_flags: has_virtualization_flag(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            memory_bytes: meminfo_bytes(&memory, "MemTotal:"),
            memory_free_bytes: meminfo_bytes(&memory, "MemAvailable:"),
            state: state.to_owned(),
            state_free: free_bytes(state).map_err(|error| error.to_string()),
            firmware_missing: FIRMWARE
                .into_iter()
                .filter(|firmware| firmware.open().is_err())
                .map(|firmware| (firmware, firmware.path()))
                .collect(),
            net_admin,
            tun: Path::new("/dev/net/tun").exists(),
            tools_missing: [tool::IP, tool::NFT, tool::DNSMASQ]
                .into_iter()
                .filter(|tool| tool.find().is_none())
                .map(|tool| (tool.name, tool.package))
                .collect(),
            passt: tool::PASST.find().is_some(),
            swtpm: tool::SWTPM.find().is_some(),
            default_route: passt::has_default_route(),
            firewalls: if net_admin { firewall::blocks(&net::bridge_of(state)).unwrap_or_default() } else { vec![] },
            cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            clock_synchronised: sys::clock_is_synchronised().unwrap_or(false),
            now_ms: types::now_ms(),
            user: user(),
            systemd: Path::new("/run/systemd/system").is_dir(),
        }
    }
}

/// Whether this process has CAP_NET_ADMIN: root in a container may lack it.
pub(crate) fn net_admin() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    effective_capabilities(&status) & (1 << CAP_NET_ADMIN) != 0
}

fn effective_capabilities(status: &str) -> u64 {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    hex.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn kvm(path: &Path) -> Kvm {
    let device = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(device) => device,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let metadata = fs::metadata(path).ok();
            return Kvm::Denied {
                group_may: metadata.as_ref().is_some_and(|metadata| metadata.mode() & 0o060 == 0o060),
                group: metadata.and_then(|metadata| group_name(metadata.gid())),
            };
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Kvm::Absent,
        // The node is there and no driver behind it: ENODEV, ENXIO.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => return Kvm::Absent,
        Err(error) => return Kvm::Broken(error.to_string()),
    };
    match sys::kvm_api_version(device.as_fd()) {
        Ok(api_version) => Kvm::Open { api_version },
        Err(error) => Kvm::Broken(error.to_string()),
    }
}

fn group_name(gid: u32) -> Option<String> {
    nix::unistd::Group::from_gid(gid.into()).ok().flatten().map(|group| group.name)
}

/// Whether the `flags` of the first CPU name Intel's or AMD's virtualization.
pub(crate) fn has_virtualization_flag(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn meminfo_bytes(meminfo: &str, key: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Free bytes for us in the file system of `path`, or of its nearest parent that exists.
fn free_bytes(path: &Path) -> io::Result<u64> {
    let mut place = path;
    loop {
        match rustix::fs::statvfs(place) {
            Ok(stat) => return Ok(stat.f_bavail.saturating_mul(stat.f_frsize)),
            Err(rustix::io::Errno::NOENT) => match place.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => place = parent,
                _ => place = Path::new("."),
            },
            Err(error) => return Err(error.into()),
        }
    }
}

fn user() -> User {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        let service_user = nix::unistd::User::from_name("innkeeper").ok().flatten().is_some();
        return User::Root { service_user };
    }
    let name = nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
    let lingers = Path::new("/var/lib/systemd/linger").join(&name).exists();
    User::Ordinary { name, lingers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert!(has_virtualization_flag("processor : 0\nflags\t\t: fpu vme svm npt\n"));
        assert!(has_virtualization_flag("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualization_flag("flags\t\t: fpu svm_lock\nvmx flags\t: ept\n"));
        assert!(!has_virtualization_flag(""));
    }

    #[test]
    fn numbers_of_proc_are_read() {
        assert_eq!(meminfo_bytes("MemTotal:  16 kB\nMemAvailable:    2048 kB\n", "MemAvailable:"), 2 << 20);
        assert_eq!(meminfo_bytes("", "MemTotal:"), 0);
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t0000000000001000\n"), 1 << CAP_NET_ADMIN);
        assert_eq!(effective_capabilities("CapEff:\tnonsense"), 0);
    }

    #[test]
    fn kvm_is_absent_where_there_is_no_file_and_broken_where_it_is_another() {
        assert_eq!(kvm(Path::new("/no/such/kvm")), Kvm::Absent);
        assert!(matches!(kvm(Path::new("/dev/null")), Kvm::Broken(_)));
    }

    #[test]
    fn a_state_folder_that_is_not_there_yet_is_measured_at_its_parent() {
        let folder = tempfile::tempdir().unwrap();
        let there = free_bytes(folder.path()).unwrap();
        let not_yet = free_bytes(&folder.path().join("a/b/c")).unwrap();
        assert!(there > 0 && there.abs_diff(not_yet) < 1 << 30);
    }
}
