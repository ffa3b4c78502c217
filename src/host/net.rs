//! Networks of guests on the host: our own NAT network, and the bridges that the host has.
//!
//! ```text
//! guest ─ tap ik-ID ─┐
//! guest ─ tap ik-ID ─┴─ bridge innkeeper0 10.77.x.1/24, fdxx:…::1/64 ── nftables table "innkeeper" (masquerade) ── the world
//!                         └ dnsmasq: DHCP, router advertisements, DNS, on this bridge only
//! ```
//!
//! What is made is found again by what it is, not by what we remember: a bridge is ours when its alias names our state folder, a dnsmasq is
//! ours when its arguments are. So everything here may be called again at any time, after a restart, after somebody flushed the rules.
//! `host/network.json` in the state folder keeps what must not change by itself: subnet, IPv6 prefix, and the host's settings before ours.

mod dnsmasq;
pub mod firewall;
mod forwarding;
mod links;
mod settings;
mod subnet;

use std::path::{Path, PathBuf};

use crate::{
    error::{Error, ErrorKind, Result},
    host::{
        facts,
        tool::{self, IP, check_interface_name},
    },
    wire::{NatNetwork, NetworkStatus},
};

use self::{links::Link, settings::Settings, subnet::Subnet};

/// The first bridge of ours on a host; a second instance beside it takes the next number.
pub const BRIDGE: &str = "innkeeper0";
const BRIDGE_STEM: &str = "innkeeper";
/// How many instances can have a NAT network on one host.
const BRIDGES_MAX: u32 = 16;

/// The networks of one Innkeeper. Holds nothing but two paths; each call looks at the host anew.
///
/// Called by `hostd` on its only thread. Children are waited for within each call: no other code may reap them meanwhile.
#[derive(Debug, Clone)]
pub struct Networks {
    state: PathBuf,
    run: PathBuf,
}

impl Networks {
    /// `state` and `run` are Innkeeper's folders; both exist before the first call.
    pub fn new(state: impl Into<PathBuf>, run: impl Into<PathBuf>) -> Networks {
        // The tools are run from "/", and the state's path marks our bridge: both want it absolute.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Networks { state: absolute(state.into()), run: absolute(run.into()) }
    }

    /// Makes the NAT network, or whatever of it is missing. Idempotent.
    ///
    /// Errors: `Unavailable` without privilege, without a tool (named with its package), when every candidate subnet is in use, or with what
    /// a tool says.
    pub fn ensure_nat(&self) -> Result<NatNetwork> {
        if !facts::net_admin() {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "The NAT network needs root (CAP_NET_ADMIN). Run Innkeeper as root, or give the guest the network \"user\".",
            ));
        }
        let links = links::all()?;
        let mut settings = self.settings(&links)?;
        let ipv6 = forwarding::host_has_ipv6();
        let nat = settings.nat(ipv6);
        // What was is on disk before it changes, so that a crash between the two loses nothing.
        let changes = forwarding::plan(&mut settings.before, &settings.bridge);
        settings.write(&self.state)?;
        links::ensure_bridge(&links, &settings, &self.alias(), ipv6)?;
        firewall::ensure_table(&settings, ipv6)?;
        forwarding::apply(&changes)?;
        dnsmasq::ensure(&settings, &self.run, ipv6)?;
        Ok(nat)
    }

    /// Puts a tap on the NAT network, which is made or mended first.
    pub fn attach_nat(&self, tap: &str) -> Result<()> {
        let nat = self.ensure_nat()?;
        attach(&nat.bridge, tap)
    }

    /// Puts a tap on a bridge that the host has.
    ///
    /// Errors: `Invalid` at `network` when there is no such bridge.
    pub fn attach_bridge(&self, bridge: &str, tap: &str) -> Result<()> {
        check_interface_name(bridge)?;
        attach(bridge, tap)
    }

    /// What there is and what is wrong with it. Changes nothing, never fails: what cannot be asked becomes a problem.
    pub fn status(&self) -> NetworkStatus {
        let mut status = NetworkStatus { privileged: facts::net_admin(), ..NetworkStatus::default() };
        let links = links::all().unwrap_or_else(|error| {
            status.problems.push(error.to_string());
            vec![]
        });
        let settings = Settings::read(&self.state).unwrap_or_else(|error| {
            status.problems.push(error.to_string());
            None
        });
        let made =
            settings.filter(|settings| links.iter().any(|link| link.name == settings.bridge && link.is_bridge()));
        let ours = made.as_ref().map_or(BRIDGE, |settings| settings.bridge.as_str());
        status.bridges =
            links.iter().filter(|link| link.is_bridge() && link.name != ours).map(|link| link.name.clone()).collect();
        if status.privileged {
            let blocks = firewall::blocks(ours).unwrap_or_default();
            status.problems.extend(blocks.iter().map(|block| format!("{} {}", block.problem, block.remedy)));
        }
        if let Some(settings) = made {
            status.problems.extend(self.nat_problems(&settings));
            status.nat = Some(settings.nat(forwarding::host_has_ipv6()));
        }
        status
    }

    /// Removes the NAT network and every trace of it, and gives the host its forwarding settings back. Nothing to remove is success.
    ///
    /// While another instance has a NAT network on this host, forwarding stays on, for its sake.
    ///
    /// Errors: `Conflict` while guests are on it.
    pub fn remove(&self) -> Result<()> {
        let links = links::all()?;
        let settings = Settings::read(&self.state)?;
        let alias = self.alias();
        let named = settings.as_ref().map(|settings| settings.bridge.clone());
        let bridge = links.iter().find(|link| link.is_bridge() && link.is_owned_by(&alias, named.as_deref()));
        if let Some(bridge) = bridge {
            let on_it: Vec<&str> = links
                .iter()
                .filter(|link| link.master.as_deref() == Some(&bridge.name))
                .map(|link| link.name.as_str())
                .collect();
            if !on_it.is_empty() {
                return Err(Error::conflict(format!(
                    "Guests are on the NAT network ({}). Stop them first.",
                    on_it.join(", ")
                )));
            }
        }
        dnsmasq::remove(&self.run)?;
        if let Some(bridge) = bridge {
            IP.run("remove the NAT bridge", &["link", "delete", "dev", &bridge.name])?;
        }
        if let Some(name) = named.as_deref().or(bridge.map(|bridge| bridge.name.as_str())) {
            firewall::remove_table(name)?;
        }
        let shared = links
            .iter()
            .any(|link| link.name.starts_with(BRIDGE_STEM) && Some(&link.name) != bridge.map(|ours| &ours.name));
        if let Some(settings) = settings.filter(|_| !shared) {
            forwarding::restore(&settings.before)?;
        }
        Settings::remove(&self.state)
    }

    /// The stored settings, or new ones; the bridge's name is one that is free or ours.
    fn settings(&self, links: &[Link]) -> Result<Settings> {
        let stored = Settings::read(&self.state)?;
        let named = stored.as_ref().map(|settings| settings.bridge.as_str());
        let alias = self.alias();
        let bridge = pick_bridge(links, &alias, named).ok_or_else(|| {
            Error::new(
                ErrorKind::Unavailable,
                format!("All {BRIDGES_MAX} names for a NAT bridge are taken on this host."),
            )
        })?;
        let there = links.iter().any(|link| link.name == bridge);
        if let Some(mut settings) = stored {
            settings.bridge = bridge;
            // After a start of the host its surroundings may be others. While the bridge exists guests use the subnet, so it stays then.
            let used = if there { vec![] } else { subnet::in_use(&settings.bridge)? };
            if used.iter().any(|other| other.overlaps(&settings.subnet)) {
                settings.subnet = free_subnet(&used)?;
            }
            return Ok(settings);
        }
        let subnet = free_subnet(&subnet::in_use(&bridge)?)?;
        Ok(Settings::new(bridge, subnet))
    }

    fn nat_problems(&self, settings: &Settings) -> Vec<String> {
        let mut problems = vec![];
        if !dnsmasq::is_running(&self.run) {
            problems.push("The NAT network's dnsmasq has ended: guests get no address. Start a guest on it, or restart Innkeeper.".into());
        }
        let used = subnet::in_use(&settings.bridge).unwrap_or_default();
        if let Some(other) = used.iter().find(|other| other.overlaps(&settings.subnet)) {
            problems.push(format!(
                "The NAT network's subnet {} is also used elsewhere on this host ({other}). Stop its guests, run \"innkeeper admin \
                 remove-networks\" and restart Innkeeper: it takes another subnet.",
                settings.subnet
            ));
        }
        problems
    }

    /// What marks a bridge as this instance's: the state folder, without what `ip` could take for something else.
    fn alias(&self) -> String {
        alias(&self.state)
    }
}

fn free_subnet(used: &[Subnet]) -> Result<Subnet> {
    subnet::choose(used).ok_or_else(|| {
        Error::new(
            ErrorKind::Unavailable,
            "No subnet is left for the NAT network: this host's addresses and routes cover all private ranges.",
        )
    })
}

/// The NAT bridge of this state, as stored; the name that a first one would have otherwise.
pub(crate) fn bridge_of(state: &Path) -> String {
    Settings::read(state).ok().flatten().map_or_else(|| BRIDGE.to_owned(), |settings| settings.bridge)
}

fn alias(state: &Path) -> String {
    /// Of the 255 that Linux keeps.
    const LEN_MAX: usize = 200;
    let clean = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_') { c } else { '_' };
    let path: String = tool::text(state.as_os_str()).chars().map(clean).take(LEN_MAX).collect();
    format!("Innkeeper:{path}")
}

/// A bridge that is ours by its alias; else the stored name if free; else the first free one.
fn pick_bridge(links: &[Link], alias: &str, named: Option<&str>) -> Option<String> {
    let ours = links.iter().find(|link| link.is_bridge() && link.is_owned_by(alias, named));
    let free = |name: &String| !links.iter().any(|link| &link.name == name);
    ours.map(|link| link.name.clone())
        .or_else(|| named.map(str::to_owned).filter(free))
        .or_else(|| (0..BRIDGES_MAX).map(|number| format!("{BRIDGE_STEM}{number}")).find(free))
}

fn attach(bridge: &str, tap: &str) -> Result<()> {
    check_interface_name(tap)?;
    let links = links::all()?;
    let Some(link) = links.iter().find(|link| link.name == bridge && link.is_bridge()) else {
        return Err(Error::invalid("network", format!("This host has no bridge \"{bridge}\".")));
    };
    links::join(tap, link, forwarding::host_has_ipv6())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge(name: &str, alias: Option<&str>) -> Link {
        Link {
            name: name.into(),
            mtu: 1500,
            master: None,
            alias: alias.map(str::to_owned),
            kind: Some("bridge".into()),
        }
    }

    #[test]
    fn a_bridge_of_another_instance_is_left_alone() {
        let links = [bridge("innkeeper0", Some("Innkeeper:/other")), bridge("br0", None)];
        assert_eq!(pick_bridge(&links, "Innkeeper:/mine", None).as_deref(), Some("innkeeper1"));
        assert_eq!(pick_bridge(&links, "Innkeeper:/mine", Some("innkeeper0")).as_deref(), Some("innkeeper1"));
        assert_eq!(pick_bridge(&links, "Innkeeper:/other", None).as_deref(), Some("innkeeper0"));
        assert_eq!(pick_bridge(&[], "Innkeeper:/mine", Some("innkeeper3")).as_deref(), Some("innkeeper3"));
    }

    #[test]
    fn a_bridge_made_just_before_a_crash_is_ours_by_its_stored_name() {
        let links = [bridge("innkeeper0", None)];
        assert_eq!(pick_bridge(&links, "Innkeeper:/mine", Some("innkeeper0")).as_deref(), Some("innkeeper0"));
        assert_eq!(pick_bridge(&links, "Innkeeper:/mine", None).as_deref(), Some("innkeeper1"));
    }

    #[test]
    fn an_alias_cannot_carry_quotes_or_lines_into_a_batch() {
        assert_eq!(alias(Path::new("/a b\n\"c\"")), "Innkeeper:/a_b__c_");
        assert!(alias(Path::new(&"x".repeat(4000))).len() < 255);
    }
}
