//! Saved state: what each part of the machine keeps while the guest is suspended, with a kind and a version.
//!
//! A device has a module `saved` with one plain struct for each version it ever had; its own struct is never serialised.
//! `save` takes its fields apart exhaustively, so that a new one does not compile until somebody decides whether it is kept.
//! `restore` reads what may come from another release, or from somebody hostile: it checks everything that the guest could not
//! have set, and whatever the guest can set is as harmless as when it sets it.

use std::{error, fmt};

use serde::{Serialize, de::DeserializeOwned};

/// The state of one part of the machine, as JSON: small, readable, and compared with golden files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// What it is the state of: "uart", "virtio-pci". Never renamed.
    pub kind: String,
    /// Of the fields; a release reads every version that was ever released.
    pub version: u32,
    pub bytes: Vec<u8>,
}

impl State {
    pub fn new(kind: &str, version: u32, fields: &impl Serialize) -> State {
        let bytes = serde_json::to_vec(fields).expect("saved states are plain data");
        State { kind: kind.to_owned(), version, bytes }
    }

    /// Of a part that keeps nothing.
    pub fn nothing(kind: &str) -> State {
        State::new(kind, 1, &serde_json::Map::new())
    }

    /// The fields of `version`, when this is a state of `kind` in that version.
    pub fn fields<T: DeserializeOwned>(&self, kind: &str, version: u32) -> Result<T, BadState> {
        if self.kind != kind {
            return Err(BadState::new(kind, format!("this is the state of \"{}\"", self.kind)));
        }
        if self.version != version {
            return Err(BadState::new(kind, format!("version {} is not known here", self.version)));
        }
        serde_json::from_slice(&self.bytes).map_err(|error| BadState::new(kind, error.to_string()))
    }

    /// Checks that this is the state of a part that keeps nothing.
    pub fn expect_nothing(&self, kind: &str) -> Result<(), BadState> {
        self.fields::<serde_json::Map<_, _>>(kind, 1).map(drop)
    }
}

/// A part of the machine whose state is saved and restored.
pub trait SaveState {
    /// Called while the machine is paused: no vCPU runs, no worker serves.
    fn save(&self) -> State;
    /// Called once, on a part as it is after power on, while the machine is paused. After an error the machine must not run.
    ///
    /// Sets what is inside only: lines are set to the level that follows from the state, and messages are not sent again.
    fn restore(&mut self, state: &State) -> Result<(), BadState>;
}

/// A saved state that this machine cannot take on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadState {
    kind: String,
    why: String,
}

impl BadState {
    pub fn new(kind: &str, why: impl Into<String>) -> BadState {
        BadState { kind: kind.to_owned(), why: why.into() }
    }

    /// Unless `good`: `what` cannot be.
    pub fn unless(good: bool, kind: &str, what: &str) -> Result<(), BadState> {
        if good { Ok(()) } else { Err(BadState::new(kind, what)) }
    }
}

impl fmt::Display for BadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the saved state of {}: {}", self.kind, self.why)
    }
}
impl error::Error for BadState {}

/// Bytes as hexadecimal digits, for `#[serde(with = "hex")]`: a list of numbers would be four times as long.
pub mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or_default();
        let mut text = String::with_capacity(2 * bytes.len());
        text.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]));
        to.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|value| value as u8);
        let pairs = text.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        pairs.collect::<Option<_>>().ok_or_else(|| D::Error::custom("these are no hexadecimal digits"))
    }
}

/// For tests of devices.
#[cfg(test)]
pub mod testing {
    use std::{fs, path::PathBuf};

    use super::*;

    /// Compares a state with `tests/golden/saved/KIND-vVERSION.json`, which stays for ever: later releases must read it.
    /// `UPDATE_GOLDEN=1` writes it.
    pub fn matches_golden(state: &State) -> State {
        let name = format!("tests/golden/saved/{}-v{}.json", state.kind, state.version);
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(&name);
        let value: serde_json::Value = serde_json::from_slice(&state.bytes).expect("JSON");
        let text = serde_json::to_string_pretty(&value).expect("JSON") + "\n";
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &text).expect("the folder is there");
        }
        let golden =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}; UPDATE_GOLDEN=1 writes it"));
        assert_eq!(text, golden, "{name}: a released state never changes; add a version instead");
        State { bytes: golden.into_bytes(), ..state.clone() }
    }

    /// Spoils each field of a state in turn (another type, huge, negative, absent) and gives the results to `restore`, which
    /// may take or refuse them, and must not panic.
    pub fn spoil(state: &State, mut restore: impl FnMut(&State)) {
        use serde_json::{Value, json};
        fn places(value: &Value, at: String, found: &mut Vec<String>) {
            match value {
                Value::Object(map) => map.iter().for_each(|(key, inner)| places(inner, format!("{at}/{key}"), found)),
                Value::Array(list) => {
                    list.iter()
                        .enumerate()
                        .take(3)
                        .for_each(|(key, inner)| places(inner, format!("{at}/{key}"), found));
                }
                _ => {}
            }
            found.push(at);
        }
        let whole: Value = serde_json::from_slice(&state.bytes).expect("JSON");
        let mut found = Vec::new();
        places(&whole, String::new(), &mut found);
        let bad = [
            json!(null),
            json!(-1),
            json!(0),
            json!(1),
            json!(255),
            json!(256),
            json!(65535),
            json!(4294967295u64),
            json!(u64::MAX),
            json!(true),
            json!(""),
            json!("00"),
            json!([]),
            json!({}),
        ];
        for place in &found {
            for value in &bad {
                let mut copy = whole.clone();
                if let Some(part) = copy.pointer_mut(place) {
                    *part = value.clone();
                }
                restore(&State { bytes: serde_json::to_vec(&copy).expect("JSON"), ..state.clone() });
            }
        }
        for bytes in [&b""[..], b"{", b"[]", b"null", b"\xff"] {
            restore(&State { bytes: bytes.to_vec(), ..state.clone() });
        }
        restore(&State { version: u32::MAX, ..state.clone() });
        restore(&State { kind: "another".into(), ..state.clone() });
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V1 {
        latch: u8,
        #[serde(with = "hex")]
        table: Vec<u8>,
    }

    #[test]
    fn a_state_is_read_by_its_kind_and_version_only() {
        let fields = V1 { latch: 7, table: vec![0, 0xa5, 0xff] };
        let state = State::new("lamp", 1, &fields);
        assert_eq!(state.bytes, br#"{"latch":7,"table":"00a5ff"}"#);
        assert_eq!(state.fields::<V1>("lamp", 1).unwrap(), fields);
        let said = |result: Result<V1, BadState>| result.unwrap_err().to_string();
        assert_eq!(said(state.fields("bell", 1)), "the saved state of bell: this is the state of \"lamp\"");
        assert_eq!(said(state.fields("lamp", 2)), "the saved state of lamp: version 1 is not known here");
        let mut refused = 0;
        testing::spoil(&state, |bad| refused += usize::from(bad.fields::<V1>("lamp", 1).is_err()));
        assert!(refused > 20, "{refused}");
        State::nothing("rng").expect_nothing("rng").unwrap();
        assert!(state.expect_nothing("rng").is_err());
    }
}
