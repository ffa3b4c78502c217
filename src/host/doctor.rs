//! What `doctor` says: one finding for each thing that guests need of the host, with what to do about it.

use std::path::Path;

use crate::{
    host::{
        facts::{Facts, Kvm, User},
        firmware::Firmware,
    },
    types::show_size,
    wire::{Finding, Verdict},
};

/// The only version of the KVM interface there is (Documentation/virt/kvm/api.rst, 4.1).
const KVM_API_VERSION: i32 = 12;
/// Less memory than this runs small guests only.
const MEMORY_BYTES_WANTED: u64 = 2 << 30;
/// Less free space than this holds no guest's disk.
const DISK_BYTES_WANTED: u64 = 4 << 30;
/// A clock before this (2025-01-01) has never been set: certificates made now would be wrong.
const CLOCK_MS_MIN: i64 = 1_735_689_600_000;

/// What this host can do, with the rights of this process. `state` is where guests' disks are, or will be.
pub fn doctor(state: &Path) -> Vec<Finding> {
    findings(&Facts::gather(state))
}

/// Whether guests can run at all: no essential finding is missing.
pub fn guests_can_run(findings: &[Finding]) -> bool {
    !findings.iter().any(|finding| finding.essential && finding.verdict == Verdict::Missing)
}

/// Judges the facts. Pure; the order is that of the page.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![
        kvm(facts),
        kvm_api(facts),
        virtualization_flags(facts),
        memory(facts),
        disk(facts),
        firmware(facts, "firmware_bios", "BIOS firmware", &[Firmware::Bios, Firmware::VgaRom]),
        firmware(facts, "firmware_uefi", "UEFI firmware", &[Firmware::Uefi]),
        network_boot(facts),
        tpm(facts),
        networking(facts),
        user_networking(facts),
        forward_drop(facts),
        cgroup(facts),
        clock(facts),
    ];
    found.push(match &facts.user {
        User::Root { service_user } => service_user_finding(*service_user),
        User::Ordinary { name, lingers } => linger(name, *lingers, facts.systemd),
    });
    found
}

fn ok(id: &str, title: &str, detail: impl Into<String>) -> Finding {
    Finding {
        id: id.into(),
        title: title.into(),
        verdict: Verdict::Ok,
        detail: detail.into(),
        remedy: String::new(),
        essential: false,
    }
}

fn degraded(id: &str, title: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Degraded, remedy: remedy.into(), ..ok(id, title, detail) }
}

fn missing(id: &str, title: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Missing, remedy: remedy.into(), ..ok(id, title, detail) }
}

fn kvm(facts: &Facts) -> Finding {
    let (id, title) = ("kvm", "KVM");
    let finding = match &facts.kvm {
        Kvm::Open { .. } => ok(id, title, "/dev/kvm can be opened."),
        Kvm::Absent if facts.virtualization_flags => missing(
            id,
            title,
            "There is no /dev/kvm, though the CPU has virtualization: the kernel module is not loaded, or the firmware has locked it.",
            "Run \"modprobe kvm_intel\" (Intel) or \"modprobe kvm_amd\" (AMD) as root. If that fails, turn on virtualization in the \
             firmware setup of this machine.",
        ),
        Kvm::Absent => {
            missing(id, title, "There is no /dev/kvm, and the CPU shows no virtualization.", NO_FLAGS_REMEDY)
        }
        Kvm::Denied { group_may: true, group: Some(group) } => missing(
            id,
            title,
            format!("/dev/kvm is there, but this user may not open it: that takes the group \"{group}\"."),
            format!(
                "Run \"sudo usermod -aG {group} {}\" and log in again, or run Innkeeper as root.",
                user_name(&facts.user)
            ),
        ),
        Kvm::Denied { .. } => missing(
            id,
            title,
            "/dev/kvm is there, but this user may not open it.",
            "Run \"sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm\", join the group \"kvm\" (\"sudo usermod -aG kvm USER\") and log in \
             again, or run Innkeeper as root.",
        ),
        Kvm::Broken(why) => missing(
            id,
            title,
            format!("/dev/kvm is there, but does not answer as KVM does: {why}."),
            "Load KVM's modules again (\"modprobe -r kvm_intel kvm_amd\", then \"modprobe kvm_intel\" or \"modprobe kvm_amd\") or restart the host.",
        ),
    };
    Finding { essential: true, ..finding }
}

fn kvm_api(facts: &Facts) -> Finding {
    let (id, title) = ("kvm_api", "KVM interface");
    let finding = match facts.kvm {
        Kvm::Open { api_version: KVM_API_VERSION } => ok(id, title, format!("Version {KVM_API_VERSION}.")),
        Kvm::Open { api_version } => missing(
            id,
            title,
            format!("The kernel speaks version {api_version}; Innkeeper needs version {KVM_API_VERSION}."),
            "Install a kernel of Linux 5.10 or later.",
        ),
        // Nothing to say twice: the finding `kvm` has the cause and the remedy.
        Kvm::Absent | Kvm::Denied { .. } | Kvm::Broken(_) => {
            degraded(id, title, "Not known without /dev/kvm.", "See KVM.")
        }
    };
    Finding { essential: true, ..finding }
}

const NO_FLAGS_REMEDY: &str = "On a real machine, turn on Intel VT-x or AMD-V (\"SVM\") in its firmware setup. In a virtual machine, turn on \
                               nested virtualization on its host. Or run Innkeeper in its lab, which emulates a machine that has it: \
                               appliance/run --lab";

fn virtualization_flags(facts: &Facts) -> Finding {
    let (id, title) = ("virtualization_flags", "CPU virtualization");
    match (facts.virtualization_flags, &facts.kvm) {
        (true, _) => ok(id, title, "The CPU has hardware virtualization (vmx or svm)."),
        (false, Kvm::Open { .. }) => degraded(
            id,
            title,
            "The CPU shows neither vmx nor svm, though there is a /dev/kvm: it emulates guests in software. Simple guests run; operating \
             systems stop at the first instruction that it cannot emulate.",
            NO_FLAGS_REMEDY,
        ),
        (false, _) => missing(id, title, "The CPU shows neither vmx nor svm.", NO_FLAGS_REMEDY),
    }
}

fn memory(facts: &Facts) -> Finding {
    let (id, title) = ("memory", "Memory");
    let detail = format!("{} of {} free.", show_size(facts.memory_free_bytes), show_size(facts.memory_bytes));
    if facts.memory_bytes < MEMORY_BYTES_WANTED {
        return degraded(id, title, detail, "Only small guests fit. More memory helps.");
    }
    ok(id, title, detail)
}

fn disk(facts: &Facts) -> Finding {
    let (id, title) = ("disk", "Disk space");
    let place = facts.state.display();
    match &facts.state_free {
        Ok(free) if *free >= DISK_BYTES_WANTED => ok(id, title, format!("{} free in {place}.", show_size(*free))),
        Ok(free) => degraded(
            id,
            title,
            format!("Only {} free in {place}, where guests' disks are.", show_size(*free)),
            "Free some space there, or start Innkeeper with --state on a larger disk.",
        ),
        Err(why) => degraded(
            id,
            title,
            format!("{place} cannot be measured: {why}."),
            "Start Innkeeper with --state and a folder that this user can write.",
        ),
    }
}

fn firmware(facts: &Facts, id: &str, title: &str, wanted: &[Firmware]) -> Finding {
    let mut lost = facts.firmware_missing.iter().filter(|(firmware, _)| wanted.contains(firmware));
    match lost.next() {
        None => ok(id, title, "Its files are there."),
        Some((firmware, path)) => missing(
            id,
            title,
            format!("{} is missing or unreadable: guests with this firmware do not start.", path.display()),
            format!("Install its package: apt install {}", firmware.package()),
        ),
    }
}

fn network_boot(facts: &Facts) -> Finding {
    let (id, title) = ("firmware_network", "Network boot by BIOS");
    let roms = [Firmware::VirtioNetworkRom, Firmware::E1000Rom];
    match facts.firmware_missing.iter().find(|(firmware, _)| roms.contains(firmware)) {
        None => ok(id, title, "Its files are there."),
        Some((firmware, path)) => degraded(
            id,
            title,
            format!("{} is missing or unreadable: only guests with UEFI firmware boot from a network.", path.display()),
            format!("Install its package: apt install {}", firmware.package()),
        ),
    }
}

fn networking(facts: &Facts) -> Finding {
    let (id, title) = ("networking", "Bridges and NAT");
    if !facts.net_admin {
        return degraded(
            id,
            title,
            "Without root, guests cannot be on the NAT network or a bridge; the network \"user\" serves instead.",
            "Run Innkeeper as root (appliance/install does) to have them.",
        );
    }
    if !facts.tools_missing.is_empty() {
        let names: Vec<&str> = facts.tools_missing.iter().map(|(name, _)| *name).collect();
        let packages: Vec<&str> = facts.tools_missing.iter().map(|(_, package)| *package).collect();
        return missing(
            id,
            title,
            format!("Missing on this host: {}.", names.join(", ")),
            format!("Install: apt install {}", packages.join(" ")),
        );
    }
    if !facts.tun {
        return missing(id, title, "There is no /dev/net/tun.", "Load the kernel module: modprobe tun");
    }
    ok(id, title, "Guests can be on the NAT network and on bridges.")
}

fn tpm(facts: &Facts) -> Finding {
    let (id, title) = ("tpm", "TPM");
    if facts.swtpm {
        return ok(id, title, "\"swtpm\" can give guests a TPM 2.0.");
    }
    let remedy = "Install its package: apt install swtpm";
    missing(id, title, "\"swtpm\" is missing: guests with a TPM do not start.", remedy)
}

fn user_networking(facts: &Facts) -> Finding {
    let (id, title) = ("networking_user", "User-mode networking");
    if !facts.passt {
        return missing(
            id,
            title,
            "\"passt\" is missing: the network \"user\" cannot be used.",
            "Install its package: apt install passt",
        );
    }
    if !facts.default_route {
        return degraded(
            id,
            title,
            "This host has no default route, and \"passt\" needs one.",
            "Connect the host to a network.",
        );
    }
    ok(id, title, "\"passt\" can connect guests without privilege.")
}

fn forward_drop(facts: &Facts) -> Finding {
    let (id, title) = ("forward_drop", "Other firewalls");
    if !facts.net_admin {
        return ok(id, title, "Not looked at without root; they matter for the NAT network and bridges only.");
    }
    if facts.firewalls.is_empty() {
        return ok(id, title, "None that stops guests.");
    }
    let join = |pick: fn(&crate::host::net::firewall::Block) -> &str| {
        facts.firewalls.iter().map(pick).collect::<Vec<_>>().join(" ")
    };
    degraded(id, title, join(|block| &block.problem), join(|block| &block.remedy))
}

fn cgroup(facts: &Facts) -> Finding {
    let (id, title) = ("cgroup", "Control groups");
    if facts.cgroup_v2 {
        return ok(id, title, "Version 2.");
    }
    degraded(
        id,
        title,
        "Version 2 is not mounted: guests run without limits on their share of the host.",
        "Start the kernel with systemd.unified_cgroup_hierarchy=1, as current distributions do.",
    )
}

fn clock(facts: &Facts) -> Finding {
    let (id, title) = ("clock", "Clock");
    if facts.now_ms < CLOCK_MS_MIN {
        return degraded(
            id,
            title,
            "The clock is years behind: browsers will not accept certificates made now.",
            "Set it (\"date -s\") and keep it in step: apt install systemd-timesyncd",
        );
    }
    if !facts.clock_synchronised {
        return degraded(
            id,
            title,
            "Nothing keeps the clock in step with the world.",
            "Install a time service: apt install systemd-timesyncd",
        );
    }
    ok(id, title, "Kept in step.")
}

fn service_user_finding(exists: bool) -> Finding {
    let (id, title) = ("service_user", "Service user");
    if exists {
        return ok(id, title, "The pages are served by the user \"innkeeper\", without privilege.");
    }
    degraded(
        id,
        title,
        "There is no user \"innkeeper\"; a fixed number serves instead, still without privilege.",
        "Run appliance/install, or: useradd --system --user-group --no-create-home --shell /usr/sbin/nologin innkeeper",
    )
}

fn linger(name: &str, lingers: bool, systemd: bool) -> Finding {
    let (id, title) = ("linger", "Guests after logout");
    if !systemd || lingers {
        return ok(id, title, "Guests run on when this user logs out.");
    }
    degraded(
        id,
        title,
        "systemd ends this user's guests when the user logs out.",
        format!("Run: sudo loginctl enable-linger {name}"),
    )
}

fn user_name(user: &User) -> &str {
    match user {
        User::Root { .. } => "root",
        User::Ordinary { name, .. } => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::net::firewall::Block;

    fn good_host() -> Facts {
        Facts {
            kvm: Kvm::Open { api_version: 12 },
            virtualization_flags: true,
            memory_bytes: 16 << 30,
            memory_free_bytes: 8 << 30,
            state: "/var/lib/innkeeper".into(),
            state_free: Ok(100 << 30),
            firmware_missing: vec![],
            net_admin: true,
            tun: true,
            tools_missing: vec![],
            passt: true,
            swtpm: true,
            default_route: true,
            firewalls: vec![],
            cgroup_v2: true,
            clock_synchronised: true,
            now_ms: CLOCK_MS_MIN + 1,
            user: User::Root { service_user: true },
            systemd: true,
        }
    }

    /// The findings of a good host with one thing spoiled, and whether guests run there.
    fn spoiled(spoil: impl FnOnce(&mut Facts), id: &str) -> (Finding, bool) {
        let mut facts = good_host();
        spoil(&mut facts);
        let found = findings(&facts);
        let can_run = guests_can_run(&found);
        (found.into_iter().find(|finding| finding.id == id).unwrap(), can_run)
    }

    #[test]
    fn a_good_host_has_nothing_to_mend() {
        let found = findings(&good_host());
        assert!(found.iter().all(|finding| finding.verdict == Verdict::Ok && finding.remedy.is_empty()), "{found:?}");
        assert!(guests_can_run(&found));
    }

    #[test]
    fn no_kvm_says_which_module_or_setup() {
        let (finding, runs) = spoiled(|facts| facts.kvm = Kvm::Absent, "kvm");
        assert!(!runs && finding.verdict == Verdict::Missing && finding.essential);
        assert!(finding.remedy.contains("modprobe kvm_intel"));
        let (finding, runs) = spoiled(
            |facts| {
                facts.kvm = Kvm::Absent;
                facts.virtualization_flags = false;
            },
            "kvm",
        );
        assert!(!runs && finding.remedy.contains("nested virtualization"));
    }

    #[test]
    fn no_permission_says_which_group() {
        let deny = |facts: &mut Facts| {
            facts.kvm = Kvm::Denied { group_may: true, group: Some("kvm".into()) };
            facts.user = User::Ordinary { name: "ada".into(), lingers: true };
        };
        let (finding, runs) = spoiled(deny, "kvm");
        assert!(!runs && finding.verdict == Verdict::Missing);
        assert!(finding.remedy.contains("usermod -aG kvm ada"), "{}", finding.remedy);
        let (finding, _) =
            spoiled(|facts| facts.kvm = Kvm::Denied { group_may: false, group: Some("root".into()) }, "kvm");
        assert!(finding.remedy.contains("chmod 660 /dev/kvm") && !finding.remedy.contains("-aG root"));
    }

    #[test]
    fn no_flags_with_a_kvm_is_only_degraded() {
        let (finding, runs) = spoiled(|facts| facts.virtualization_flags = false, "virtualization_flags");
        assert!(runs && finding.verdict == Verdict::Degraded && finding.remedy.contains("--lab"));
    }

    #[test]
    fn an_old_kvm_cannot_run_guests() {
        let (finding, runs) = spoiled(|facts| facts.kvm = Kvm::Open { api_version: 10 }, "kvm_api");
        assert!(!runs && finding.detail.contains("version 10"));
    }

    #[test]
    fn no_firmware_names_the_package_and_other_guests_still_run() {
        let lose = |facts: &mut Facts| facts.firmware_missing = vec![(Firmware::VgaRom, Firmware::VgaRom.path())];
        let (finding, runs) = spoiled(lose, "firmware_bios");
        assert!(
            runs && finding.verdict == Verdict::Missing && finding.remedy == "Install its package: apt install seabios"
        );
        let (finding, _) = spoiled(lose, "firmware_uefi");
        assert_eq!(finding.verdict, Verdict::Ok);
    }

    #[test]
    fn each_other_missing_thing_has_its_remedy() {
        type Spoil = fn(&mut Facts);
        let cases: [(&str, Spoil, &str); 13] = [
            (
                "firmware_network",
                |facts| facts.firmware_missing = vec![(Firmware::E1000Rom, Firmware::E1000Rom.path())],
                "apt install ipxe-qemu",
            ),
            ("memory", |facts| facts.memory_bytes = 1 << 30, "small guests"),
            ("disk", |facts| facts.state_free = Ok(1 << 20), "--state"),
            ("disk", |facts| facts.state_free = Err("denied".into()), "--state"),
            ("networking", |facts| facts.net_admin = false, "as root"),
            ("networking", |facts| facts.tun = false, "modprobe tun"),
            ("networking", |facts| facts.tools_missing = vec![("nft", "nftables")], "apt install nftables"),
            ("tpm", |facts| facts.swtpm = false, "apt install swtpm"),
            ("networking_user", |facts| facts.passt = false, "apt install passt"),
            ("networking_user", |facts| facts.default_route = false, "Connect"),
            ("cgroup", |facts| facts.cgroup_v2 = false, "unified_cgroup_hierarchy"),
            ("clock", |facts| facts.now_ms = 0, "date -s"),
            ("service_user", |facts| facts.user = User::Root { service_user: false }, "useradd"),
        ];
        for (id, spoil, remedy) in cases {
            let (finding, runs) = spoiled(spoil, id);
            assert!(runs && finding.verdict != Verdict::Ok && finding.remedy.contains(remedy), "{finding:?}");
        }
    }

    #[test]
    fn an_ordinary_user_hears_of_linger_only_where_systemd_would_end_guests() {
        let ada = User::Ordinary { name: "ada".into(), lingers: false };
        let (finding, _) = spoiled(|facts| facts.user = ada.clone(), "linger");
        assert!(finding.remedy.contains("enable-linger ada"));
        let without_systemd = |facts: &mut Facts| {
            facts.user = ada;
            facts.systemd = false;
        };
        assert_eq!(spoiled(without_systemd, "linger").0.verdict, Verdict::Ok);
    }

    #[test]
    fn another_firewall_is_said_with_its_remedy() {
        let block = Block { problem: "Docker drops.".into(), remedy: "Tell Docker.".into() };
        let (finding, runs) = spoiled(|facts| facts.firewalls = vec![block], "forward_drop");
        assert!(runs && finding.verdict == Verdict::Degraded);
        assert_eq!((finding.detail.as_str(), finding.remedy.as_str()), ("Docker drops.", "Tell Docker."));
    }
}
