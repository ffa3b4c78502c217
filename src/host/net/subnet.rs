//! Which IPv4 subnet the NAT network takes: the first candidate that no address, route or name server of the host is in.

use std::{fmt, fs, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{error::Result, host::tool::IP, types::BadValue};

/// An IPv4 network: address and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Subnet {
    address: Ipv4Addr,
    length: u8,
}

impl Subnet {
    fn new(address: Ipv4Addr, length: u8) -> Option<Subnet> {
        (length <= 32).then(|| Subnet { address: Ipv4Addr::from_bits(address.to_bits() & mask(length)), length })
    }

    pub(super) fn length(&self) -> u8 {
        self.length
    }

    pub(super) fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask(self.length))
    }

    /// The address with this number in the subnet.
    pub(super) fn host(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | u32::from(number))
    }

    pub(super) fn overlaps(&self, other: &Subnet) -> bool {
        let common = mask(self.length.min(other.length));
        self.address.to_bits() & common == other.address.to_bits() & common
    }
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}
impl FromStr for Subnet {
    type Err = BadValue;
    /// `10.0.0.0/8`, or an address alone for a network of one, as `ip` prints routes.
    fn from_str(text: &str) -> Result<Subnet, BadValue> {
        let (address, length) = text.split_once('/').unwrap_or((text, "32"));
        let subnet =
            address.parse().ok().zip(length.parse().ok()).and_then(|(address, length)| Subnet::new(address, length));
        subnet.ok_or_else(|| BadValue(format!("\"{}\" is not an IPv4 network.", crate::types::shorten(text))))
    }
}
impl TryFrom<String> for Subnet {
    type Error = BadValue;
    fn try_from(text: String) -> Result<Subnet, BadValue> {
        text.parse()
    }
}
impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

/// The first candidate that overlaps nothing in `used`.
pub(super) fn choose(used: &[Subnet]) -> Option<Subnet> {
    candidates().find(|candidate| !used.iter().any(|other| other.overlaps(candidate)))
}

/// 10.77.x.0/24 first; then ranges for hosts with a route to all of 10.0.0.0/8, as many VPNs set.
fn candidates() -> impl Iterator<Item = Subnet> {
    let third = |a: u8, b: u8| (0..=255).filter_map(move |c| Subnet::new(Ipv4Addr::new(a, b, c, 0), 24));
    third(10, 77)
        .chain(third(172, 29))
        .chain((100..=250).filter_map(|c| Subnet::new(Ipv4Addr::new(192, 168, c, 0), 24)))
}

/// What the host uses: addresses and routes of every table, without those of `bridge` itself, and its name servers.
pub(super) fn in_use(bridge: &str) -> Result<Vec<Subnet>> {
    let addresses = IP.json("list addresses", &["-4", "-json", "address", "show"])?;
    let routes = IP.json("list routes", &["-4", "-json", "route", "show", "table", "all"])?;
    let resolvers = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut used = of_addresses(&addresses, bridge);
    used.extend(of_routes(&routes, bridge));
    used.extend(resolvers.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse::<Subnet>().ok()));
    Ok(used)
}

fn of_addresses(printed: &Value, bridge: &str) -> Vec<Subnet> {
    let others = printed
        .as_array()
        .into_iter()
        .flatten()
        .filter(|link| link.get("ifname").and_then(Value::as_str) != Some(bridge));
    let infos = others.filter_map(|link| link.get("addr_info")?.as_array()).flatten();
    infos
        .filter_map(|info| {
            let address = info.get("local")?.as_str()?.parse().ok()?;
            Subnet::new(address, u8::try_from(info.get("prefixlen")?.as_u64()?).ok()?)
        })
        .collect()
}

fn of_routes(printed: &Value, bridge: &str) -> Vec<Subnet> {
    let others = printed
        .as_array()
        .into_iter()
        .flatten()
        .filter(|route| route.get("dev").and_then(Value::as_str) != Some(bridge));
    // "default" is no network and does not parse.
    others
        .filter_map(|route| route.get("dst")?.as_str()?.parse::<Subnet>().ok())
        .filter(|subnet| subnet.length > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn net(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_subnet_that_is_free_is_taken() {
        let cases: [(&[&str], Option<&str>); 6] = [
            (&[], Some("10.77.0.0/24")),
            (&["192.168.1.0/24", "127.0.0.0/8"], Some("10.77.0.0/24")),
            (&["10.77.0.128/25", "10.77.1.7"], Some("10.77.2.0/24")),
            (&["10.0.0.0/8"], Some("172.29.0.0/24")),
            (&["10.0.0.0/8", "172.16.0.0/12"], Some("192.168.100.0/24")),
            (&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"], None),
        ];
        for (used, chosen) in cases {
            let used: Vec<Subnet> = used.iter().map(|text| net(text)).collect();
            assert_eq!(choose(&used), chosen.map(net), "{used:?}");
        }
    }

    #[test]
    fn what_ip_prints_is_read_without_our_own_bridge() {
        let addresses = json!([
            {"ifname": "eth0", "addr_info": [{"family": "inet", "local": "192.0.2.2", "prefixlen": 24}]},
            {"ifname": "innkeeper0", "addr_info": [{"family": "inet", "local": "10.77.0.1", "prefixlen": 24}]},
            {"ifname": "eth1"}
        ]);
        assert_eq!(of_addresses(&addresses, "innkeeper0"), [net("192.0.2.0/24")]);
        let routes = json!([
            {"dst": "default", "dev": "eth0"}, {"dst": "0.0.0.0/0", "dev": "eth0"}, {"dst": "10.0.0.0/8", "dev": "tun0"},
            {"dst": "10.77.0.0/24", "dev": "innkeeper0"}, {"type": "blackhole", "dst": "172.29.0.0/16"}, {"dst": "192.0.2.9"}
        ]);
        assert_eq!(of_routes(&routes, "innkeeper0"), [net("10.0.0.0/8"), net("172.29.0.0/16"), net("192.0.2.9/32")]);
    }

    #[test]
    fn wrong_networks_are_refused() {
        for text in ["", "default", "10.0.0.0/33", "10.0.0/24", "fd00::/8", "10.0.0.0/-1"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
        assert_eq!(net("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(net("1.2.3.4/0").to_string(), "0.0.0.0/0");
        assert_eq!(net("10.77.3.0/24").netmask().to_string(), "255.255.255.0");
    }
}
