//! Our one nftables table, and other firewalls that stop what ours lets through.
//!
//! A verdict "accept" ends only the chain it is in; a later chain of another table may still drop (nft(8), "VERDICT STATEMENT"). So ours
//! cannot open what Docker, ufw or firewalld close. Their rules are theirs: we say what to run.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

use crate::{
    error::Result,
    host::{
        net::settings::Settings,
        tool::{NFT, Tool},
    },
};

/// Another firewall that stops guests: what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub problem: String,
    pub remedy: String,
}

/// The names of our tables begin so.
const TABLE: &str = "innkeeper";
/// The predecessor of nftables in the kernel, whose rules `nft` does not show.
const IPTABLES_LEGACY: Tool = Tool { name: "iptables-legacy", package: "iptables" };

/// Makes our table, replacing an older one in the same transaction: no packet passes in between.
pub(super) fn ensure_table(settings: &Settings, ipv6: bool) -> Result<()> {
    NFT.feed("set up the NAT network's rules", &["-f", "-"], &rules(settings, ipv6)).map(drop)
}

/// Removes the table of this bridge; none is success.
pub(super) fn remove_table(bridge: &str) -> Result<()> {
    let table = table_of(bridge);
    // Adding what may be there makes deleting succeed either way.
    NFT.feed(
        "remove the NAT network's rules",
        &["-f", "-"],
        &format!("add table inet {table}\ndelete table inet {table}\n"),
    )
    .map(drop)
}

/// `innkeeper` for the first bridge; a second instance's table carries its bridge's number.
fn table_of(bridge: &str) -> &str {
    if bridge == super::BRIDGE { TABLE } else { bridge }
}

fn rules(settings: &Settings, ipv6: bool) -> String {
    let (bridge, subnet, table) = (&settings.bridge, &settings.subnet, table_of(&settings.bridge));
    let prefix = settings.ipv6_prefix();
    let masquerade6 = if ipv6 {
        format!("        ip6 saddr {prefix}/64 ip6 daddr != {prefix}/64 masquerade\n")
    } else {
        String::new()
    };
    format!(
        "add table inet {table}
delete table inet {table}
table inet {table} {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} ip daddr != {subnet} ip daddr != 224.0.0.0/4 masquerade
{masquerade6}    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname \"{bridge}\" accept
        oifname \"{bridge}\" ct state established,related accept
        oifname \"{bridge}\" reject
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname \"{bridge}\" udp dport {{ 53, 67, 547 }} accept
        iifname \"{bridge}\" tcp dport 53 accept
        iifname \"{bridge}\" icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
    }}
}}
"
    )
}

/// Looks for firewalls that stop guests on `bridge`. Needs CAP_NET_ADMIN and `nft`.
pub fn blocks(bridge: &str) -> Result<Vec<Block>> {
    let printed = NFT.json("list the host's firewall rules", &["-j", "list", "ruleset"])?;
    let mut found = blocks_in(&printed, bridge);
    // Asking iptables-legacy loads its tables, so it is asked only where they are in use.
    let legacy = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    if found.is_empty() && legacy.lines().any(|table| table == "filter") && IPTABLES_LEGACY.find().is_some() {
        let printed = IPTABLES_LEGACY.run("list the host's firewall rules", &["-S"])?;
        found.extend(block_in_legacy(&String::from_utf8_lossy(&printed), bridge));
    }
    Ok(found)
}

/// A chain by family, table and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ChainName<'a>(&'a str, &'a str, &'a str);

struct Ruleset<'a> {
    /// Base chains of the hooks forward and input whose policy is to drop.
    dropping: Vec<(ChainName<'a>, Hook)>,
    chains: BTreeSet<ChainName<'a>>,
    rules: Vec<(ChainName<'a>, &'a [Value])>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hook {
    Forward,
    Input,
}

/// Who made a table, as its chains show.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Docker,
    Ufw,
    Firewalld,
    Other(String),
}

fn blocks_in(printed: &Value, bridge: &str) -> Vec<Block> {
    let ruleset = Ruleset::read(printed);
    let mut stopped = BTreeSet::new();
    for (chain, hook) in &ruleset.dropping {
        if !ruleset.lets_through(*chain, bridge) {
            stopped.insert((ruleset.owner(*chain), *hook));
        }
    }
    // firewalld drops by its last rule, not by a policy, and knows only interfaces that are in a zone.
    let firewalld = ruleset.chains.iter().any(|chain| chain.1 == "firewalld");
    let in_a_zone = ruleset.rules.iter().any(|(chain, rule)| chain.1 == "firewalld" && names_interface(rule, bridge));
    if firewalld && !in_a_zone {
        stopped.insert((Owner::Firewalld, Hook::Forward));
    }
    stopped.into_iter().map(|(owner, hook)| owner.block(hook, bridge)).collect()
}

impl<'a> Ruleset<'a> {
    fn read(printed: &'a Value) -> Ruleset<'a> {
        let mut ruleset = Ruleset { dropping: vec![], chains: BTreeSet::new(), rules: vec![] };
        for item in printed.get("nftables").and_then(Value::as_array).into_iter().flatten() {
            if let Some(chain) = item.get("chain") {
                ruleset.read_chain(chain);
            } else if let Some(rule) = item.get("rule")
                && let (Some(name), Some(parts)) = (name_of(rule, "chain"), rule.get("expr").and_then(Value::as_array))
            {
                ruleset.rules.push((name, parts));
            }
        }
        ruleset
    }

    fn read_chain(&mut self, chain: &'a Value) {
        let text = |key: &str| chain.get(key).and_then(Value::as_str);
        let Some(name) = name_of(chain, "name") else { return };
        self.chains.insert(name);
        let hook = match text("hook") {
            Some("forward") => Hook::Forward,
            Some("input") => Hook::Input,
            _ => return,
        };
        let routed = matches!(name.0, "ip" | "ip6" | "inet");
        if routed && text("policy") == Some("drop") && !name.1.starts_with(TABLE) {
            self.dropping.push((name, hook));
        }
    }

    /// Whether a rule that the chain reaches accepts what comes in by `bridge`. Whatever else it asks for is the administrator's choice.
    fn lets_through(&self, start: ChainName<'a>, bridge: &str) -> bool {
        let mut reached = BTreeSet::from([start]);
        let mut left = vec![start];
        while let Some(chain) = left.pop() {
            for (_, rule) in self.rules.iter().filter(|(of, _)| *of == chain) {
                if names_interface(rule, bridge) && rule.iter().any(|part| part.get("accept").is_some()) {
                    return true;
                }
                let targets =
                    rule.iter().filter_map(|part| part.get("jump").or(part.get("goto"))?.get("target")?.as_str());
                for target in targets {
                    let target = ChainName(chain.0, chain.1, target);
                    if reached.insert(target) {
                        left.push(target);
                    }
                }
            }
        }
        false
    }

    fn owner(&self, chain: ChainName<'a>) -> Owner {
        let has = |name: &str| self.chains.contains(&ChainName(chain.0, chain.1, name));
        if has("ufw-before-forward") || has("ufw6-before-forward") {
            Owner::Ufw
        } else if has("DOCKER-USER") {
            Owner::Docker
        } else {
            Owner::Other(format!("{} {}", chain.0, chain.1))
        }
    }
}

fn name_of<'a>(value: &'a Value, chain_key: &str) -> Option<ChainName<'a>> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    Some(ChainName(text("family")?, text("table")?, text(chain_key)?))
}

/// Whether a rule asks for packets that come in by `bridge`: by its name, a set with it, or a pattern like `innkeeper*`.
fn names_interface(rule: &[Value], bridge: &str) -> bool {
    let fits = |name: &str| name == bridge || name.strip_suffix('*').is_some_and(|stem| bridge.starts_with(stem));
    rule.iter().filter_map(|part| part.get("match")).any(|asked| {
        let key = asked.pointer("/left/meta/key").and_then(Value::as_str);
        let equal = matches!(asked.get("op").and_then(Value::as_str), Some("==" | "in"));
        let right = asked.get("right");
        let one = right.and_then(Value::as_str).is_some_and(fits);
        let set = right.and_then(|right| right.get("set")?.as_array());
        let in_set = set.is_some_and(|set| set.iter().filter_map(Value::as_str).any(fits));
        matches!(key, Some("iifname" | "iif")) && equal && (one || in_set)
    })
}

/// What `iptables-legacy -S` prints: `-P FORWARD DROP`, and whether a rule takes in what comes from the bridge.
fn block_in_legacy(printed: &str, bridge: &str) -> Option<Block> {
    let drops = printed.lines().any(|line| line == "-P FORWARD DROP");
    let accepts = printed.lines().any(|line| line.contains(&format!("-i {bridge} ")) && line.ends_with("-j ACCEPT"));
    let owner = if printed.contains("DOCKER-USER") {
        Owner::Docker
    } else {
        Owner::Other("ip filter (iptables-legacy)".into())
    };
    (drops && !accepts).then(|| owner.block(Hook::Forward, bridge))
}

impl Owner {
    fn block(&self, hook: Hook, bridge: &str) -> Block {
        let (problem, remedy) = match (self, hook) {
            (Owner::Docker, Hook::Forward) => (
                "Docker's firewall drops the packets that this host forwards for guests on the NAT network.".to_owned(),
                format!(
                    "Let them through: iptables -I DOCKER-USER -i {bridge} -j ACCEPT; iptables -I DOCKER-USER -o {bridge} -m conntrack \
                     --ctstate RELATED,ESTABLISHED -j ACCEPT"
                ),
            ),
            (Owner::Ufw, Hook::Forward) => (
                "The firewall ufw drops the packets that this host forwards for guests on the NAT network.".to_owned(),
                format!("Let them through: ufw route allow in on {bridge}"),
            ),
            (Owner::Ufw, Hook::Input) => (
                "The firewall ufw keeps guests on the NAT network from getting an address and names from this host."
                    .to_owned(),
                format!(
                    "Let them through: ufw allow in on {bridge} to any port 67 proto udp; ufw allow in on {bridge} to any port 53"
                ),
            ),
            (Owner::Firewalld, _) => (
                "The firewall firewalld rejects packets of guests on the NAT network.".to_owned(),
                format!(
                    "Let them through: firewall-cmd --permanent --zone=trusted --add-interface={bridge}; firewall-cmd --reload"
                ),
            ),
            (Owner::Docker | Owner::Other(_), Hook::Input) => (
                format!(
                    "Another firewall ({self}) keeps guests on the NAT network from getting an address and names from this host."
                ),
                format!(
                    "Add rules to it that accept UDP ports 53, 67 and 547 and TCP port 53 coming in by \"{bridge}\"."
                ),
            ),
            (Owner::Other(_), Hook::Forward) => (
                format!(
                    "Another firewall ({self}) drops the packets that this host forwards for guests on the NAT network."
                ),
                format!(
                    "Add rules to it that accept what comes in by \"{bridge}\", and established connections going out by it."
                ),
            ),
        };
        Block { problem, remedy }
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Owner::Docker => f.write_str("Docker"),
            Owner::Ufw => f.write_str("ufw"),
            Owner::Firewalld => f.write_str("firewalld"),
            Owner::Other(table) => write!(f, "nftables table {table}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::host::net::settings::tests::sample;

    fn chain(table: &str, name: &str, hook: Option<(&str, &str)>) -> Value {
        let mut chain = json!({"family": "ip", "table": table, "name": name});
        if let Some((hook, policy)) = hook {
            chain["hook"] = hook.into();
            chain["policy"] = policy.into();
        }
        json!({"chain": chain})
    }

    fn rule(table: &str, chain: &str, parts: Value) -> Value {
        json!({"rule": {"family": "ip", "table": table, "chain": chain, "expr": parts}})
    }

    fn comes_in_by(bridge: &str) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": bridge}})
    }

    fn docker(more: &[Value]) -> Value {
        let mut all = vec![
            json!({"metainfo": {"version": "1.0.6"}}),
            chain("filter", "FORWARD", Some(("forward", "drop"))),
            chain("filter", "DOCKER-USER", None),
            rule("filter", "FORWARD", json!([{"counter": {}}, {"jump": {"target": "DOCKER-USER"}}])),
        ];
        all.extend_from_slice(more);
        json!({"nftables": all})
    }

    #[test]
    fn dockers_forward_drop_is_seen_until_our_bridge_is_let_through() {
        let found = blocks_in(&docker(&[]), "innkeeper0");
        assert_eq!(found.len(), 1);
        assert!(found[0].problem.starts_with("Docker") && found[0].remedy.contains("DOCKER-USER -i innkeeper0"));
        let accept = rule("filter", "DOCKER-USER", json!([comes_in_by("innkeeper0"), {"accept": null}]));
        assert_eq!(blocks_in(&docker(&[accept]), "innkeeper0"), []);
        let other_bridge = rule("filter", "DOCKER-USER", json!([comes_in_by("docker0"), {"accept": null}]));
        assert_eq!(blocks_in(&docker(&[other_bridge]), "innkeeper0").len(), 1);
        let out_of_reach = rule("filter", "ELSEWHERE", json!([comes_in_by("innkeeper0"), {"accept": null}]));
        assert_eq!(blocks_in(&docker(&[out_of_reach]), "innkeeper0").len(), 1);
    }

    #[test]
    fn ufw_stops_forwarding_and_addresses_each_with_its_remedy() {
        let ruleset = json!({"nftables": [
            chain("filter", "FORWARD", Some(("forward", "drop"))), chain("filter", "INPUT", Some(("input", "drop"))),
            chain("filter", "ufw-before-forward", None)
        ]});
        let found = blocks_in(&ruleset, "innkeeper0");
        let remedies: Vec<&str> = found.iter().map(|block| block.remedy.as_str()).collect();
        assert!(
            matches!(remedies.as_slice(), [forward, input]
            if forward.contains("ufw route allow in on innkeeper0") && input.contains("port 67")),
            "{remedies:?}"
        );
    }

    #[test]
    fn firewalld_is_content_once_the_bridge_is_in_a_zone() {
        let base = [chain("firewalld", "filter_FORWARD", Some(("forward", "accept")))];
        let in_zone =
            rule("firewalld", "filter_FORWARD_ZONES", json!([comes_in_by("innkeeper0"), {"goto": {"target": "x"}}]));
        assert!(blocks_in(&json!({"nftables": base}), "innkeeper0")[0].remedy.contains("--zone=trusted"));
        assert_eq!(blocks_in(&json!({"nftables": [base[0].clone(), in_zone]}), "innkeeper0"), []);
    }

    #[test]
    fn our_own_table_and_accepting_ones_are_no_trouble() {
        let ruleset = json!({"nftables": [
            chain("innkeeper", "forward", Some(("forward", "drop"))), chain("x", "forward", Some(("forward", "accept"))),
            chain("x", "prerouting", Some(("prerouting", "drop")))
        ]});
        assert_eq!(blocks_in(&ruleset, "innkeeper0"), []);
        assert_eq!(blocks_in(&json!({}), "innkeeper0"), []);
    }

    #[test]
    fn an_unknown_firewall_is_named_by_its_table() {
        let found = blocks_in(&json!({"nftables": [chain("mine", "fwd", Some(("forward", "drop")))]}), "innkeeper0");
        assert!(found[0].problem.contains("nftables table ip mine"), "{found:?}");
    }

    #[test]
    fn sets_and_patterns_name_interfaces_too() {
        let set = json!([{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": {"set": ["a", "innkeeper0"]}}}]);
        let not = json!([{"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": "innkeeper0"}}]);
        assert!(names_interface(set.as_array().unwrap(), "innkeeper0"));
        assert!(names_interface(&[comes_in_by("innk*")], "innkeeper0"));
        assert!(!names_interface(not.as_array().unwrap(), "innkeeper0"));
        assert!(!names_interface(&[comes_in_by("innkeeper01")], "innkeeper0"));
    }

    #[test]
    fn legacy_tables_are_read_from_their_listing() {
        let docker = "-P INPUT ACCEPT\n-P FORWARD DROP\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n";
        assert!(block_in_legacy(docker, "innkeeper0").unwrap().problem.starts_with("Docker"));
        assert_eq!(block_in_legacy(&format!("{docker}-A DOCKER-USER -i innkeeper0 -j ACCEPT\n"), "innkeeper0"), None);
        assert_eq!(block_in_legacy("-P FORWARD ACCEPT\n", "innkeeper0"), None);
    }

    #[test]
    fn each_instance_has_a_table_of_its_own_name() {
        assert!(rules(&sample(), true).starts_with("add table inet innkeeper\ndelete table inet innkeeper\n"));
        assert_eq!(table_of("innkeeper3"), "innkeeper3");
        assert!(
            rules(&sample(), true).contains("fd12:3400:789a::/64") && !rules(&sample(), false).contains("ip6 saddr")
        );
    }
}
