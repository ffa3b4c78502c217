//! The variables of UEFI firmware as they lie in the flash chip (EDK II, `VariableFormat.h`; UEFI 2.10, 8.2): a firmware volume,
//! in it a store, in it one record behind the other. The guest wrote all of it: nothing is believed.

use std::fmt;

/// EFI_SYSTEM_NV_DATA_FV_GUID, as it lies in memory.
const VOLUME_GUID: [u8; 16] = *b"\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50";
/// EFI_AUTHENTICATED_VARIABLE_GUID: a store whose records have a time and a key.
const STORE_GUID: [u8; 16] = *b"\x78\x2c\xf3\xaa\x7b\x94\x9a\x43\xa1\x80\x2e\x14\x4e\xc3\x77\x92";
/// EFI_GLOBAL_VARIABLE.
const GLOBAL_GUID: [u8; 16] = *b"\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c";
const STORE_FORMATTED: u8 = 0x5a;
const STORE_HEALTHY: u8 = 0xfe;
const STORE_HEADER_BYTES: usize = 28;
const RECORD_START: u16 = 0x55aa;
const RECORD_HEADER_BYTES: usize = 60;
const RECORD_ALIGN: usize = 4;
/// Present and whole; a record that goes away loses more bits.
const RECORD_ADDED: u8 = 0x3f;
/// Kept, for firmware, for systems.
const NV_BS_RT: u32 = 7;
const BOOT_TO_FIRMWARE_UI: u8 = 1;

/// Bytes to be written at a place of the flash.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    pub at: usize,
    pub bytes: Vec<u8>,
}

/// Why a store cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadStore {
    NoStore,
    Damaged,
    Full,
}

impl fmt::Display for BadStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BadStore::NoStore => "the file with the firmware's variables has no store of them",
            BadStore::Damaged => "the firmware's variables are damaged",
            BadStore::Full => "the store of the firmware's variables is full",
        })
    }
}

/// What to change in `flash` so that the firmware shows its setup at the next boot: the lowest bit of OsIndications (UEFI 2.10,
/// 8.5.4). The firmware takes it away again.
pub fn ask_for_setup(flash: &[u8]) -> Result<Change, BadStore> {
    let store = find_store(flash)?;
    let name: Vec<u8> = "OsIndications\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut at = store.start;
    while let Some(record) = record_at(flash, at, store.end)? {
        if record.state == RECORD_ADDED && record.guid == GLOBAL_GUID && record.name == name && record.data.len() == 8 {
            let first = record.data.first().copied().unwrap_or_default();
            return Ok(Change { at: record.data_at, bytes: vec![first | BOOT_TO_FIRMWARE_UI] });
        }
        at = record.end;
    }
    let data = u64::from(BOOT_TO_FIRMWARE_UI).to_le_bytes();
    let mut bytes = Vec::with_capacity(RECORD_HEADER_BYTES + name.len() + data.len());
    bytes.extend(RECORD_START.to_le_bytes());
    bytes.extend([RECORD_ADDED, 0]);
    bytes.extend(NV_BS_RT.to_le_bytes());
    // Count, time and key, which only authenticated variables have.
    bytes.extend([0; 8 + 16 + 4]);
    bytes.extend((name.len() as u32).to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(GLOBAL_GUID);
    bytes.extend(name);
    bytes.extend(data);
    if at + bytes.len() > store.end { Err(BadStore::Full) } else { Ok(Change { at, bytes }) }
}

/// Where records may be.
struct Store {
    start: usize,
    end: usize,
}

fn find_store(flash: &[u8]) -> Result<Store, BadStore> {
    let header: u16 = number(flash, 48).map(u16::from_le_bytes).ok_or(BadStore::NoStore)?;
    if flash.get(16..32) != Some(&VOLUME_GUID) || flash.get(40..44) != Some(b"_FVH") {
        return Err(BadStore::NoStore);
    }
    let at = usize::from(header);
    let bytes = number(flash, at + 16).map(u32::from_le_bytes).ok_or(BadStore::NoStore)? as usize;
    let end = at.checked_add(bytes).filter(|end| *end <= flash.len() && bytes > STORE_HEADER_BYTES);
    let formatted = flash.get(at + 20..at + 22) == Some(&[STORE_FORMATTED, STORE_HEALTHY]);
    match end {
        Some(end) if formatted && flash.get(at..at + 16) == Some(&STORE_GUID) => {
            Ok(Store { start: (at + STORE_HEADER_BYTES).next_multiple_of(RECORD_ALIGN), end })
        }
        _ => Err(BadStore::NoStore),
    }
}

struct Record<'a> {
    state: u8,
    guid: [u8; 16],
    name: &'a [u8],
    data: &'a [u8],
    data_at: usize,
    /// Where the next one begins.
    end: usize,
}

/// The record at `at`; `None` behind the last.
fn record_at(flash: &[u8], at: usize, store_end: usize) -> Result<Option<Record<'_>>, BadStore> {
    let Some(header) = flash.get(at..at.saturating_add(RECORD_HEADER_BYTES)).filter(|_| at < store_end) else {
        return Ok(None);
    };
    let start = number(header, 0).map(u16::from_le_bytes);
    if start != Some(RECORD_START) {
        return Ok(None);
    }
    let length = |at| number(header, at).map(|bytes| u32::from_le_bytes(bytes) as usize).ok_or(BadStore::Damaged);
    let (name_bytes, data_bytes) = (length(36)?, length(40)?);
    let name_at = at + RECORD_HEADER_BYTES;
    let data_at = name_at.checked_add(name_bytes).ok_or(BadStore::Damaged)?;
    let end = data_at.checked_add(data_bytes).filter(|end| *end <= store_end).ok_or(BadStore::Damaged)?;
    Ok(Some(Record {
        state: header.get(2).copied().ok_or(BadStore::Damaged)?,
        guid: number(header, 44).ok_or(BadStore::Damaged)?,
        name: flash.get(name_at..data_at).ok_or(BadStore::Damaged)?,
        data: flash.get(data_at..end).ok_or(BadStore::Damaged)?,
        data_at,
        end: end.next_multiple_of(RECORD_ALIGN),
    }))
}

/// `N` bytes at `at`.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STORE_AT: usize = 72;
    const STORE_BYTES: usize = 1024;

    /// A flash with an empty store.
    fn empty() -> Vec<u8> {
        let mut flash = vec![0xff; 4096];
        flash[..STORE_AT].fill(0);
        flash[16..32].copy_from_slice(&VOLUME_GUID);
        flash[40..44].copy_from_slice(b"_FVH");
        flash[48..50].copy_from_slice(&(STORE_AT as u16).to_le_bytes());
        flash[STORE_AT..STORE_AT + 16].copy_from_slice(&STORE_GUID);
        flash[STORE_AT + 16..STORE_AT + 20].copy_from_slice(&(STORE_BYTES as u32).to_le_bytes());
        flash[STORE_AT + 20..STORE_AT + 22].copy_from_slice(&[STORE_FORMATTED, STORE_HEALTHY]);
        flash
    }

    fn apply(flash: &mut [u8], change: &Change) {
        flash[change.at..change.at + change.bytes.len()].copy_from_slice(&change.bytes);
    }

    #[test]
    fn the_first_wish_makes_the_variable_and_the_second_finds_it() {
        let mut flash = empty();
        let made = ask_for_setup(&flash).unwrap();
        assert_eq!(made.at, STORE_AT + STORE_HEADER_BYTES);
        assert_eq!(made.bytes.len(), RECORD_HEADER_BYTES + 28 + 8);
        apply(&mut flash, &made);
        // The firmware has taken the bit away and left others.
        let data_at = made.at + RECORD_HEADER_BYTES + 28;
        flash[data_at] = 4;
        assert_eq!(ask_for_setup(&flash), Ok(Change { at: data_at, bytes: vec![5] }));
        // It has deleted the variable: another one, behind it.
        flash[made.at + 2] = 0x3c;
        assert_eq!(ask_for_setup(&flash).unwrap().at, (made.at + made.bytes.len()).next_multiple_of(4));
    }

    #[test]
    fn what_is_full_or_no_store_is_said() {
        let mut flash = empty();
        assert_eq!(ask_for_setup(&[]), Err(BadStore::NoStore));
        assert_eq!(ask_for_setup(&[0xff; 4096]), Err(BadStore::NoStore));
        let full = Change {
            at: STORE_AT + STORE_HEADER_BYTES,
            bytes: {
                let mut record = ask_for_setup(&flash).unwrap().bytes;
                record[44..60].fill(7);
                record[40..44].copy_from_slice(&(STORE_BYTES as u32 - 28 - 60 - 28 - 64).to_le_bytes());
                record
            },
        };
        apply(&mut flash, &full);
        assert_eq!(ask_for_setup(&flash), Err(BadStore::Full));
        flash[full.at + 40..full.at + 44].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(ask_for_setup(&flash), Err(BadStore::Damaged));
    }

    #[test]
    fn the_store_of_the_package_is_understood() {
        for path in ["/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"] {
            let Ok(flash) = std::fs::read(path) else {
                println!("skipped: {path} is not there");
                continue;
            };
            let change = ask_for_setup(&flash).unwrap();
            assert!(flash[change.at..change.at + change.bytes.len()].iter().all(|byte| *byte == 0xff), "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_contents_make_it_panic_or_write_elsewhere(
            spoil in proptest::collection::vec((0usize..4096, any::<u8>()), 0..60),
            length in 0usize..4096,
        ) {
            let mut flash = empty();
            let made = ask_for_setup(&flash).unwrap();
            apply(&mut flash, &made);
            for (at, byte) in spoil {
                flash[at] = byte;
            }
            flash.truncate(length);
            if let Ok(change) = ask_for_setup(&flash) {
                prop_assert!(change.at + change.bytes.len() <= flash.len());
            }
        }
    }
}
