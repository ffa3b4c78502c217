//! `host/network.json`: what of the NAT network must stay the same over restarts, and what the host was like before it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    host::net::{forwarding::Before, subnet::Subnet},
    wire::NatNetwork,
};

const FILE: &str = "host/network.json";
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    version: u32,
    pub(super) bridge: String,
    pub(super) subnet: Subnet,
    /// The 40 random bits of a unique local prefix (RFC 4193, 3.2.2); the bridge's hardware address comes from them too.
    unique: [u8; 5],
    pub(super) before: Before,
}

impl Settings {
    pub(super) fn new(bridge: String, subnet: Subnet) -> Settings {
        let mut unique = [0; 5];
        getrandom::fill(&mut unique).expect("the kernel gives random bytes");
        Settings { version: VERSION, bridge, subnet, unique, before: Before::default() }
    }

    /// The stored settings; `None` before the first network.
    pub(super) fn read(state: &Path) -> Result<Option<Settings>> {
        let path = state.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::internal(format!("Cannot read {}.", path.display()), error)),
        };
        let remedy = "Remove that file: the network is then made anew.";
        let settings: Settings = serde_json::from_slice(&bytes)
            .map_err(|error| Error::internal(format!("{} is damaged. {remedy}", path.display()), error))?;
        if settings.version != VERSION {
            return Err(Error::conflict(format!(
                "{} was written by another release of Innkeeper. {remedy}",
                path.display()
            )));
        }
        // The name goes to `ip`: a file is checked like any other input.
        super::check_interface_name(&settings.bridge)?;
        Ok(Some(settings))
    }

    /// Stores them if they changed: whole or not at all.
    pub(super) fn write(&self, state: &Path) -> Result<()> {
        if Settings::read(state).is_ok_and(|stored| stored.as_ref() == Some(self)) {
            return Ok(());
        }
        let path = state.join(FILE);
        let failed = |error: io::Error| Error::internal(format!("Cannot write {} ({error}).", path.display()), error);
        let bytes = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        let part = path.with_extension("part");
        let write = || {
            let folder = path.parent().unwrap_or(state);
            fs::create_dir_all(folder)?;
            let mut file = File::create(&part)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&part, &path)?;
            File::open(folder)?.sync_all()
        };
        write().map_err(failed)
    }

    pub(super) fn remove(state: &Path) -> Result<()> {
        let path = state.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::internal(format!("Cannot remove {}.", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// What people and the wire see.
    pub(super) fn nat(&self, ipv6: bool) -> NatNetwork {
        let ipv6 = if ipv6 { self.ipv6_host() } else { String::new() };
        NatNetwork { bridge: self.bridge.clone(), ipv4: self.ipv4_host(), ipv6 }
    }

    /// The host's address on the bridge, with prefix length.
    pub(super) fn ipv4_host(&self) -> String {
        format!("{}/{}", self.subnet.host(1), self.subnet.length())
    }

    pub(super) fn ipv6_host(&self) -> String {
        format!("{}1/64", self.ipv6_prefix())
    }

    /// The prefix as text, ready for the rest of an address: `fd12:3456:789a::`.
    pub(super) fn ipv6_prefix(&self) -> String {
        let [a, b, c, d, e] = self.unique;
        // The standard library prints it as `ip` does, without leading zeros.
        let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        std::net::Ipv6Addr::new(pair(0xfd, a), pair(b, c), pair(d, e), 0, 0, 0, 0, 0).to_string()
    }

    /// Locally administered, unicast.
    pub(super) fn bridge_mac(&self) -> String {
        let [a, b, c, d, e] = self.unique;
        format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn sample() -> Settings {
        let subnet = "10.77.0.0/24".parse().unwrap();
        Settings { unique: [0x12, 0x34, 0x00, 0x78, 0x9a], ..Settings::new("innkeeper0".into(), subnet) }
    }

    #[test]
    fn settings_come_back_as_they_were_stored() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Settings::read(folder.path()).unwrap(), None);
        let settings = sample();
        settings.write(folder.path()).unwrap();
        assert_eq!(Settings::read(folder.path()).unwrap(), Some(settings));
        let kept = folder.path().join(FILE).parent().unwrap().to_owned();
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 1);
        Settings::remove(folder.path()).unwrap();
        Settings::remove(folder.path()).unwrap();
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_file_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(FILE).parent().unwrap()).unwrap();
        for text in ["", "{}", "not json"] {
            fs::write(folder.path().join(FILE), text).unwrap();
            assert!(Settings::read(folder.path()).unwrap_err().to_string().contains("Remove that file"), "{text}");
        }
    }

    #[test]
    fn addresses_follow_from_subnet_and_unique_bits() {
        let settings = sample();
        assert_eq!(settings.ipv4_host(), "10.77.0.1/24");
        assert_eq!(settings.ipv6_host(), "fd12:3400:789a::1/64");
        assert_eq!(settings.bridge_mac(), "02:12:34:00:78:9a");
        assert_eq!(settings.nat(false).ipv6, "");
    }
}
