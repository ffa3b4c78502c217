//! The local certificate authority and the certificate of this host.
//!
//! The authority may sign only for the host's names and for private address ranges (name constraints), so that trusting it
//! means trusting this host and nothing else. The leaf is reissued at start when a name is missing or it expires soon.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType,
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};

use crate::{
    error::{Error, Result},
    state_files::{make_private, write_private},
};

/// Browsers refuse leaves that are valid for more than 397 days.
const LEAF_DAYS: i64 = 396;
const CA_DAYS: i64 = 3650;
/// A leaf that lasts less than this is reissued.
const RENEW_DAYS: i64 = 30;
const DAY_MS: i64 = 86_400_000;
const FOLDER: &str = "tls";

/// The certificate in use.
pub struct Certificate {
    pub ca_pem: String,
    pub ca_sha256: [u8; 32],
    pub leaf_sha256: [u8; 32],
    /// Names and addresses the leaf is for.
    pub names: Vec<String>,
    pub leaf_until_ms: i64,
    pub config: ServerConfig,
}

/// What `leaf.json` keeps, so that no certificate has to be parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    /// DNS names the authority may sign for.
    ca_names: Vec<String>,
    /// Networks the authority may sign for, besides the private ones.
    ca_networks: Vec<(IpAddr, u8)>,
    ca_until_ms: i64,
    names: Vec<String>,
    until_ms: i64,
}

/// Opens the certificate of a state directory; makes and renews what has to be.
pub fn open(state_dir: &Path) -> Result<Certificate> {
    ensure(state_dir, &host_names(), false)
}

/// Makes a new leaf from the same authority.
pub fn reissue(state_dir: &Path) -> Result<Certificate> {
    ensure(state_dir, &host_names(), true)
}

/// Names and addresses, separated by spaces, by which people reach an Innkeeper that cannot know them: in the lab.
const NAMES_VARIABLE: &str = "INNKEEPER_HOST_NAMES";

/// The pages' addresses, best first, for a server that listens on `listen`.
pub fn urls(listen: SocketAddr) -> Vec<String> {
    let url = |name: &str| match name.parse::<Ipv6Addr>() {
        Ok(address) => format!("https://[{address}]:{}", listen.port()),
        Err(_) => format!("https://{name}:{}", listen.port()),
    };
    if listen.ip().is_loopback() {
        return vec![url("localhost")];
    }
    if !listen.ip().is_unspecified() {
        return vec![url(&listen.ip().to_string())];
    }
    let loopback = |name: &String| name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let (addresses, names): (Vec<String>, Vec<String>) =
        host_names().into_iter().filter(|name| !loopback(name)).partition(|name| name.parse::<IpAddr>().is_ok());
    names.iter().chain(&addresses).map(|name| url(name)).collect()
}

/// The names and addresses by which people reach this host now.
pub fn host_names() -> Vec<String> {
    let mut names = vec!["localhost".to_owned()];
    if let Ok(given) = std::env::var(NAMES_VARIABLE) {
        names.extend(
            given
                .split_whitespace()
                .filter(|name| is_dns_name(name) || name.parse::<IpAddr>().is_ok())
                .map(str::to_owned),
        );
        names.extend([Ipv4Addr::LOCALHOST.to_string(), Ipv6Addr::LOCALHOST.to_string()]);
        names.sort();
        names.dedup();
        return names;
    }
    let host = host_name();
    if is_dns_name(&host) {
        let short = host.split('.').next().unwrap_or(&host).to_owned();
        names.push(format!("{short}.local"));
        names.extend([short, host.clone()]);
        names.extend(qualified(&host));
    }
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    for interface in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let Some(address) = interface.address.filter(|_| !is_ours(&interface.interface_name)) else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            addresses.push(IpAddr::V4(v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            // A link-local address needs its zone in the URL; browsers do not take one.
            addresses.extend((!v6.ip().is_unicast_link_local()).then(|| IpAddr::V6(v6.ip())));
        }
    }
    names.extend(addresses.iter().map(IpAddr::to_string));
    names.sort();
    names.dedup();
    names
}

/// Whether an Innkeeper made this interface: bridges for guests come and go, and nobody reaches the pages by them.
fn is_ours(interface: &str) -> bool {
    interface.starts_with("innkeeper") || interface.starts_with("ik-")
}

/// The host's own name.
pub fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_lowercase()
}

/// The names with a domain that the hosts file gives the host.
fn qualified(host: &str) -> Vec<String> {
    let text = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let prefix = format!("{host}.");
    let words = text.lines().filter_map(|line| line.split('#').next()).flat_map(str::split_whitespace);
    words.map(str::to_lowercase).filter(|word| word.starts_with(&prefix) && is_dns_name(word)).collect()
}

fn is_dns_name(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    text.len() <= 253 && text.parse::<IpAddr>().is_err() && text.split('.').all(label)
}

fn ensure(state_dir: &Path, wanted: &[String], renew: bool) -> Result<Certificate> {
    let folder = state_dir.join(FOLDER);
    if !folder.exists() {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.and_then(|()| make_private(&folder)).map_err(|error| cannot(&folder, error))?;
    }
    let now_ms = crate::types::now_ms();
    let known =
        fs::read(folder.join("leaf.json")).ok().and_then(|json| serde_json::from_slice::<Description>(&json).ok());
    // A renamed host cannot be certified by the old authority: there is a new one, which has to be trusted anew.
    let known = known.filter(|known| {
        let dns = |name: &&String| name.parse::<IpAddr>().is_err();
        known.ca_until_ms > now_ms + (LEAF_DAYS + 1) * DAY_MS
            && wanted.iter().filter(dns).all(|name| known.ca_names.contains(name))
    });
    let (description, ca_key) = match known {
        Some(known) => (known, read_key(&folder.join("ca.key"))?),
        None => new_authority(&folder, wanted, now_ms)?,
    };
    let allowed: Vec<String> = wanted.iter().filter(|name| description.allows(name)).cloned().collect();
    let good = !renew
        && description.until_ms > now_ms + RENEW_DAYS * DAY_MS
        && allowed.iter().all(|name| description.names.contains(name))
        && folder.join("leaf.pem").exists();
    let description = if good { description } else { new_leaf(&folder, description, ca_key, allowed, now_ms)? };
    load(&folder, description)
}

impl Description {
    fn allows(&self, name: &str) -> bool {
        match name.parse::<IpAddr>() {
            Ok(address) => PRIVATE.iter().chain(&self.ca_networks).any(|network| contains(*network, address)),
            Err(_) => self.ca_names.iter().any(|known| known == name),
        }
    }
}

/// RFC 1918, RFC 6598, loopback, link-local and unique local addresses.
const PRIVATE: [(IpAddr, u8); 9] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    (IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
    (IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
];

fn contains((network, prefix): (IpAddr, u8), address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let shift = 32 - u32::from(prefix.min(32));
            (network.to_bits() ^ address.to_bits()).checked_shr(shift).unwrap_or(0) == 0
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let shift = 128 - u32::from(prefix.min(128));
            (network.to_bits() ^ address.to_bits()).checked_shr(shift).unwrap_or(0) == 0
        }
        _ => false,
    }
}

fn new_authority(folder: &Path, wanted: &[String], now_ms: i64) -> Result<(Description, KeyPair)> {
    let public = |address: &IpAddr| !PRIVATE.iter().any(|network| contains(*network, *address));
    let addresses = wanted.iter().filter_map(|name| name.parse::<IpAddr>().ok()).filter(public);
    // An IPv6 host changes its address inside its /64 every day.
    let ca_networks = addresses.map(|address| (address, if address.is_ipv4() { 32 } else { 64 })).collect();
    let description = Description {
        ca_names: wanted.iter().filter(|name| name.parse::<IpAddr>().is_err()).cloned().collect(),
        ca_networks,
        ca_until_ms: now_ms + CA_DAYS * DAY_MS,
        names: vec![],
        until_ms: 0,
    };
    let key = new_key(&folder.join("ca.key"))?;
    let certificate = authority(&description).self_signed(&key).map_err(unsigned)?;
    keep(&folder.join("ca.pem"), certificate.pem().as_bytes())?;
    tracing::info!("made a new certificate authority");
    Ok((description, key))
}

fn authority(description: &Description) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let host = description.ca_names.iter().find(|name| !name.contains('.') && *name != "localhost");
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Innkeeper on {}", host.map_or("this host", String::as_str)));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let until = at(description.ca_until_ms);
    params.not_before = until - Duration::days(CA_DAYS + 1);
    params.not_after = until;
    let names = description.ca_names.iter().map(|name| GeneralSubtree::DnsName(name.clone()));
    let networks = PRIVATE.iter().chain(&description.ca_networks);
    let networks =
        networks.map(|(address, prefix)| GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(*address, *prefix)));
    params.name_constraints =
        Some(NameConstraints { permitted_subtrees: names.chain(networks).collect(), excluded_subtrees: vec![] });
    params
}

fn new_leaf(
    folder: &Path,
    known: Description,
    ca_key: KeyPair,
    names: Vec<String>,
    now_ms: i64,
) -> Result<Description> {
    let description = Description { until_ms: now_ms + (LEAF_DAYS - 1) * DAY_MS, names, ..known };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Innkeeper");
    params.not_after = at(description.until_ms);
    // An hour before, for a browser whose clock is behind.
    params.not_before = at(now_ms) - Duration::hours(1);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    for name in &description.names {
        params.subject_alt_names.push(match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.as_str().try_into().map_err(unsigned)?),
        });
    }
    let key = new_key(&folder.join("leaf.key"))?;
    let issuer = Issuer::new(authority(&description), ca_key);
    let certificate = params.signed_by(&key, &issuer).map_err(unsigned)?;
    keep(&folder.join("leaf.pem"), certificate.pem().as_bytes())?;
    let json = serde_json::to_vec_pretty(&description)
        .map_err(|error| Error::internal("Cannot describe the certificate.", error))?;
    keep(&folder.join("leaf.json"), &json)?;
    tracing::info!(names = ?description.names, "issued a certificate");
    Ok(description)
}

fn load(folder: &Path, description: Description) -> Result<Certificate> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).map_err(|error| cannot(&path, error))
    };
    let broken = |error| {
        Error::internal("The certificate is damaged; \"innkeeper admin reissue-certificate\" makes a new one.", error)
    };
    let ca_pem = read("ca.pem")?;
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(broken)?;
    let leaf = CertificateDer::from_pem_slice(read("leaf.pem")?.as_bytes()).map_err(broken)?;
    let key = PrivateKeyDer::from_pem_slice(read("leaf.key")?.as_bytes()).map_err(broken)?;
    let (ca_sha256, leaf_sha256) = (Sha256::digest(&ca).into(), Sha256::digest(&leaf).into());
    let refused = |error| Error::internal("The certificate cannot be used.", error);
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_no_client_auth()
        .with_single_cert(vec![leaf, ca], key)
        .map_err(refused)?;
    Ok(Certificate {
        ca_pem,
        ca_sha256,
        leaf_sha256,
        names: description.names,
        leaf_until_ms: description.until_ms,
        config,
    })
}

fn at(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(ms.div_euclid(1000)).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn new_key(path: &Path) -> Result<KeyPair> {
    let key = KeyPair::generate().map_err(unsigned)?;
    keep(path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

fn read_key(path: &Path) -> Result<KeyPair> {
    let pem = fs::read_to_string(path).map_err(|error| cannot(path, error))?;
    KeyPair::from_pem(&pem).map_err(|error| Error::internal("The key of the certificate authority is damaged.", error))
}

fn keep(path: &Path, bytes: &[u8]) -> Result<()> {
    write_private(path, bytes).map_err(|error| cannot(path, error))
}

fn unsigned(error: rcgen::Error) -> Error {
    Error::internal("Cannot make a certificate.", error)
}

fn cannot(path: &Path, error: std::io::Error) -> Error {
    Error::internal(format!("Cannot use {}.", path.display()), error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_authority_stays_and_the_leaf_follows_the_names() {
        let dir = tempfile::tempdir().unwrap();
        let first = ensure(dir.path(), &names(&["localhost", "inn", "10.0.0.5"]), false).unwrap();
        let again = ensure(dir.path(), &names(&["localhost", "inn", "10.0.0.5"]), false).unwrap();
        assert_eq!(again.leaf_sha256, first.leaf_sha256);
        let moved = ensure(dir.path(), &names(&["localhost", "inn", "192.168.1.9"]), false).unwrap();
        assert_eq!(moved.ca_sha256, first.ca_sha256);
        assert_ne!(moved.leaf_sha256, first.leaf_sha256);
        assert_eq!(moved.names, names(&["localhost", "inn", "192.168.1.9"]));
        let public = ensure(dir.path(), &names(&["localhost", "inn", "198.51.100.7"]), false).unwrap();
        assert!(!public.names.contains(&"198.51.100.7".to_owned()), "the authority may not sign for it");
        let renamed = ensure(dir.path(), &names(&["localhost", "other"]), false).unwrap();
        assert_ne!(renamed.ca_sha256, first.ca_sha256);
        let days = (renamed.leaf_until_ms - crate::types::now_ms()) / DAY_MS;
        assert!((360..397).contains(&days), "{days}");
    }

    #[test]
    fn only_the_owner_reads_the_keys() {
        let dir = tempfile::tempdir().unwrap();
        ensure(dir.path(), &names(&["localhost"]), false).unwrap();
        for entry in fs::read_dir(dir.path().join(FOLDER)).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }

    #[test]
    fn networks_contain_their_addresses() {
        let inside = |text: &str| PRIVATE.iter().any(|network| contains(*network, text.parse().unwrap()));
        for address in ["10.255.0.1", "172.31.0.1", "192.168.0.1", "127.0.0.1", "::1", "fd00::1", "fe80::1"] {
            assert!(inside(address), "{address}");
        }
        for address in ["172.32.0.1", "8.8.8.8", "2001:db8::1", "::2"] {
            assert!(!inside(address), "{address}");
        }
    }

    #[test]
    fn bridges_and_taps_of_guests_are_no_way_to_the_pages() {
        assert!(["innkeeper0", "innkeeper12", "ik-abcd2345"].into_iter().all(is_ours));
        assert!(!["eth0", "br0", "lo", "wlan0", "docker0"].into_iter().any(is_ours));
    }

    #[test]
    fn this_host_has_names() {
        let names = host_names();
        assert!(names.contains(&"localhost".to_owned()) && names.contains(&"127.0.0.1".to_owned()), "{names:?}");
    }
}
