//! Small values with one meaning each: ids, names, sizes, hardware addresses. Parsed once at the edge, printed one way.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is not the value it should be; a sentence for the person who typed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadValue(pub String);

impl fmt::Display for BadValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for BadValue {}

/// A stable, short identifier of a guest, disk, image or task: eight letters and digits without look-alikes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

const ID_LETTERS: &[u8; 32] = b"23456789abcdefghjkmnpqrstuvwxyz0";
const ID_LEN: usize = 8;

impl Id {
    /// A new random id: 40 bits, checked for uniqueness by the table that stores it.
    pub fn random() -> Id {
        let mut bytes = [0u8; ID_LEN];
        getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
        Id(bytes.iter().map(|byte| char::from(ID_LETTERS[usize::from(byte & 31)])).collect())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Id, BadValue> {
        if text.len() == ID_LEN && text.bytes().all(|byte| ID_LETTERS.contains(&byte)) {
            Ok(Id(text.to_owned()))
        } else {
            Err(BadValue(format!("\"{}\" is not an id", shorten(text))))
        }
    }
}
impl TryFrom<String> for Id {
    type Error = BadValue;
    fn try_from(text: String) -> Result<Id, BadValue> {
        text.parse()
    }
}
impl From<Id> for String {
    fn from(id: Id) -> String {
        id.0
    }
}
impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name that a person gave to a guest or an image: 1 to 63 letters, digits, `-`, `_`, `.`; starts with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

pub const NAME_LEN_MAX: usize = 63;

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Name, BadValue> {
        if text.is_empty() {
            return Err(BadValue("A name is needed.".into()));
        }
        if text.len() > NAME_LEN_MAX {
            return Err(BadValue(format!(
                "A name has at most {NAME_LEN_MAX} characters; this one has {}.",
                text.len()
            )));
        }
        let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if !text.bytes().all(good) || !text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) {
            return Err(BadValue(
                "A name starts with a letter or digit and has only letters, digits, \"-\", \"_\" and \".\".".into(),
            ));
        }
        Ok(Name(text.to_owned()))
    }
}
impl TryFrom<String> for Name {
    type Error = BadValue;
    fn try_from(text: String) -> Result<Name, BadValue> {
        text.parse()
    }
}
impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The hardware (MAC) address of a guest's network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A random, locally administered unicast address in 52:54:00, the range people know as "virtual machine".
    pub fn random() -> MacAddr {
        let mut low = [0u8; 3];
        getrandom::fill(&mut low).expect("the kernel gives random bytes");
        MacAddr([0x52, 0x54, 0x00, low[0], low[1], low[2]])
    }
}
impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
impl FromStr for MacAddr {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<MacAddr, BadValue> {
        let bad = || BadValue(format!("\"{}\" is not a hardware address like 52:54:00:12:34:56.", shorten(text)));
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 { Err(bad()) } else { Ok(MacAddr(bytes)) }
    }
}
impl TryFrom<String> for MacAddr {
    type Error = BadValue;
    fn try_from(text: String) -> Result<MacAddr, BadValue> {
        text.parse()
    }
}
impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

/// Parses a size as people type it: `512M`, `4G`, `1.5 GiB`, `1048576`. Units are powers of 1024.
///
/// Errors: no number, a negative or unknown unit, more than 2^63 bytes.
pub fn parse_size(text: &str) -> Result<u64, BadValue> {
    let trimmed = text.trim();
    let bad = || BadValue(format!("\"{}\" is not a size like 512M or 4G.", shorten(trimmed)));
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 6 || (shift == 0 && !fraction.is_empty()) {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let unit_bytes = 1u64 << shift;
    let mut bytes = whole.checked_mul(unit_bytes).ok_or_else(bad)?;
    if !fraction.is_empty() {
        let part: u64 = fraction.parse().map_err(|_| bad())?;
        let scale = 10u64.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        let part_bytes = u128::from(part) * u128::from(unit_bytes) / u128::from(scale);
        bytes = bytes.checked_add(u64::try_from(part_bytes).map_err(|_| bad())?).ok_or_else(bad)?;
    }
    if bytes > i64::MAX as u64 { Err(bad()) } else { Ok(bytes) }
}

/// Prints a size as people say it: `512 MiB`, `1.5 GiB`, `17 bytes`.
pub fn show_size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            let tenths = (u128::from(bytes) * 10 + (1 << (shift - 1))) >> shift;
            return if tenths.is_multiple_of(10) {
                format!("{} {unit}", tenths / 10)
            } else {
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} bytes")
}

/// At most 40 characters of somebody's text, for use in a message.
pub fn shorten(text: &str) -> String {
    const KEEP: usize = 40;
    let clean: String = text.chars().take(KEEP).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().count() > KEEP { clean + "…" } else { clean }
}

/// Milliseconds since 1970 on the host's clock.
pub fn now_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Microseconds on the host's monotonic clock, which all processes share.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_type_them() {
        for (text, bytes) in [("512M", 512 << 20), ("4G", 4 << 30), ("1.5 GiB", 3 << 29), ("17", 17), ("2t", 2 << 40)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "G", "4X", "1.5", "99999999999T", "1e9", "4 G G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_short() {
        for (bytes, text) in [(0, "0 bytes"), (1023, "1023 bytes"), (3 << 29, "1.5 GiB"), (512 << 20, "512 MiB")] {
            assert_eq!(show_size(bytes), text);
        }
    }

    #[test]
    fn names_refuse_paths_and_controls() {
        for good in ["web01", "a", "9.x_y-z"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", ".", "../x", "a/b", "-rf", "a b", "a\n", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_and_addresses_survive_print_and_parse() {
        let id = Id::random();
        assert_eq!(id.to_string().parse::<Id>(), Ok(id));
        let mac = MacAddr::random();
        assert_eq!(mac.to_string().parse::<MacAddr>(), Ok(mac));
        assert!("01:00:00:00:00:00".parse::<MacAddr>().is_err(), "multicast");
        assert!("52:54:00:12:34".parse::<MacAddr>().is_err());
    }
}
