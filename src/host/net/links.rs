//! The host's links as `ip` shows them, our bridge, and taps on bridges.

use std::fmt::Write;

use serde_json::Value;

use crate::{
    error::Result,
    host::{net::settings::Settings, tool::IP},
};

/// A network interface. From `ip`, not from `/sys`: that shows the network namespace of whoever mounted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) mtu: u64,
    /// The bridge it is on.
    pub(super) master: Option<String>,
    pub(super) alias: Option<String>,
    pub(super) kind: Option<String>,
}

impl Link {
    pub(super) fn is_bridge(&self) -> bool {
        self.kind.as_deref() == Some("bridge")
    }

    /// Whether its alias says so; without an alias, whether our settings name it.
    pub(super) fn is_owned_by(&self, alias: &str, named: Option<&str>) -> bool {
        match &self.alias {
            Some(of_link) => of_link == alias,
            None => named == Some(&self.name),
        }
    }

    fn read(value: &Value) -> Option<Link> {
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        Some(Link {
            name: text("ifname")?,
            mtu: value.get("mtu").and_then(Value::as_u64).unwrap_or(1500),
            master: text("master"),
            alias: text("ifalias"),
            kind: value.pointer("/linkinfo/info_kind").and_then(Value::as_str).map(str::to_owned),
        })
    }
}

/// All links of the host.
pub(super) fn all() -> Result<Vec<Link>> {
    let printed = IP.json("list network interfaces", &["-details", "-json", "link", "show"])?;
    Ok(printed.as_array().into_iter().flatten().filter_map(Link::read).collect())
}

/// Makes our bridge, or gives it what it lacks.
pub(super) fn ensure_bridge(links: &[Link], settings: &Settings, alias: &str, ipv6: bool) -> Result<()> {
    let doing = "make the NAT bridge";
    let bridge = &settings.bridge;
    let mut batch = String::new();
    if links.iter().any(|link| &link.name == bridge) {
        if !has_address(bridge, &settings.ipv4_host())? {
            // Addresses of settings that are lost. Scope global only: the kernel's own link-local one stays.
            let _ = writeln!(batch, "address flush dev {bridge} scope global");
        }
    } else {
        // A fixed hardware address: otherwise the bridge's changes with each tap that comes and goes, and guests ask for it again.
        let _ = writeln!(batch, "link add name {bridge} address {} type bridge", settings.bridge_mac());
    }
    let _ = writeln!(batch, "link set dev {bridge} alias {alias}");
    let _ = writeln!(batch, "address replace {} dev {bridge}", settings.ipv4_host());
    if ipv6 {
        // No duplicate address detection: a bridge without taps has no carrier, so it would never end and dnsmasq could not bind.
        let _ = writeln!(batch, "address replace {} dev {bridge} nodad", settings.ipv6_host());
    }
    let _ = writeln!(batch, "link set dev {bridge} up");
    IP.feed(doing, &["-batch", "-"], &batch).map(drop)
}

fn has_address(bridge: &str, address: &str) -> Result<bool> {
    let printed = IP.json("list addresses", &["-json", "address", "show", "dev", bridge])?;
    let mut infos =
        printed.as_array().into_iter().flatten().filter_map(|link| link.get("addr_info")?.as_array()).flatten();
    Ok(infos.any(|info| {
        let local = info.get("local").and_then(Value::as_str).unwrap_or_default();
        let length = info.get("prefixlen").and_then(Value::as_u64).unwrap_or_default();
        format!("{local}/{length}") == address
    }))
}

/// Puts a tap on a bridge. It takes the bridge's MTU first: a port with a smaller one would shrink the bridge's.
pub(super) fn join(tap: &str, bridge: &Link, ipv6: bool) -> Result<()> {
    // The host has no business with addresses on a guest's tap.
    let quiet = if ipv6 { " addrgenmode none" } else { "" };
    let batch = format!(
        "link set dev {tap} mtu {}{quiet}\nlink set dev {tap} master {}\nlink set dev {tap} up\n",
        bridge.mtu, bridge.name
    );
    IP.feed(&format!("put the guest on the bridge \"{}\"", bridge.name), &["-batch", "-"], &batch).map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn links_are_read_as_ip_prints_them() {
        let bridge = json!({"ifname": "br0", "mtu": 9000, "ifalias": "x", "linkinfo": {"info_kind": "bridge"}});
        let port = json!({"ifname": "eth0", "mtu": 1500, "master": "br0"});
        let bridge = Link::read(&bridge).unwrap();
        assert!(bridge.is_bridge() && bridge.mtu == 9000 && bridge.is_owned_by("x", None));
        let port = Link::read(&port).unwrap();
        assert!(!port.is_bridge() && port.master.as_deref() == Some("br0"));
        assert_eq!(Link::read(&json!({"mtu": 1})), None);
    }
}
