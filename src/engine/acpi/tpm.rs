//! The TPM in the tables: the TPM2 table and its device (TCG ACPI Specification 1.2, 7.3; TCG PC Client Platform TPM Profile).

use acpi_tables::{
    Aml,
    aml::{Device, Memory32Fixed, Name, ResourceTemplate},
    sdt::Sdt,
};

use super::{Blob, Command, OEM, OEM_REVISION, OEM_TABLE, TABLES_FILE};
use crate::engine::{layout, tpm::CONTROL_AREA};

/// Where SeaBIOS writes down what it measures; zeros before.
pub(super) const LOG_FILE: &str = "etc/tpm/log";
pub(super) const LOG_BYTES: usize = 64 << 10;

const TABLE_BYTES: u32 = 76;
/// Offsets in the table.
const CONTROL_AREA_AT: usize = 40;
const START_METHOD_AT: usize = 48;
const LOG_LENGTH_AT: usize = 64;
const LOG_START_AT: u32 = 68;
/// Command Response Buffer, started by its register alone.
const START_METHOD_CRB: u32 = 7;

/// Appends the table, with the log that the script puts somewhere, and gives its offset.
pub(super) fn append_table(blob: &mut Blob) -> u32 {
    let mut table = Sdt::new(*b"TPM2", TABLE_BYTES, 4, OEM, OEM_TABLE, OEM_REVISION);
    table.write_u64(CONTROL_AREA_AT, layout::TPM.start + CONTROL_AREA);
    table.write_u32(START_METHOD_AT, START_METHOD_CRB);
    table.write_u32(LOG_LENGTH_AT, LOG_BYTES as u32);
    let at = blob.append_table(&table);
    blob.script.push(Command::Allocate { file: LOG_FILE, align: 1, fseg: false });
    blob.script.push(Command::AddPointer { file: TABLES_FILE, at: at + LOG_START_AT, bytes: 8, to: LOG_FILE });
    at
}

pub(super) fn is_about_log(command: &Command) -> bool {
    match command {
        Command::Allocate { file, .. } => *file == LOG_FILE,
        Command::AddPointer { to, .. } => *to == LOG_FILE,
        Command::AddChecksum { .. } | Command::WritePointer { .. } => false,
    }
}

/// Appends the device by which an operating system finds the registers.
pub(super) fn add_device(aml: &mut Vec<u8>) {
    let bytes = (layout::TPM.end - layout::TPM.start) as u32;
    let registers = Memory32Fixed::new(true, layout::TPM.start as u32, bytes);
    Device::new(
        "\\_SB_.TPM0".into(),
        vec![
            &Name::new("_HID".into(), &"MSFT0101"),
            &Name::new("_UID".into(), &1u8),
            &Name::new("_STA".into(), &0x0fu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers])),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use crate::engine::{
        acpi::{AcpiTables, LOADER_FILE, TABLES_FILE, tpm::LOG_FILE},
        facts::{MachineFacts, tests::sample},
        memory::{Gpa, GuestRam},
    };

    fn files(tpm: bool) -> Vec<(&'static str, Vec<u8>)> {
        AcpiTables::build(&MachineFacts { tpm, ..sample() }).files()
    }

    fn find(files: &[(&'static str, Vec<u8>)], wanted: &str) -> Option<Vec<u8>> {
        files.iter().find(|(name, _)| *name == wanted).map(|(_, bytes)| bytes.clone())
    }

    fn has(bytes: &[u8], part: &[u8]) -> Option<usize> {
        bytes.windows(part.len()).position(|window| window == part)
    }

    #[test]
    fn the_tables_name_the_tpm_of_a_guest_that_has_one() {
        let (with, without) = (files(true), files(false));
        assert_eq!(find(&with, LOG_FILE).unwrap(), vec![0; 65536]);
        assert_eq!(find(&without, LOG_FILE), None);
        let (tables, old) = (find(&with, TABLES_FILE).unwrap(), find(&without, TABLES_FILE).unwrap());
        assert!(has(&old, b"TPM2").is_none() && has(&old, b"MSFT0101").is_none());
        assert!(has(&tables, b"MSFT0101").is_some());
        assert!(has(&tables, &[0x86, 9, 0, 1, 0, 0, 0xd4, 0xfe, 0, 0x10, 0, 0]).is_some(), "its registers");
        let at = has(&tables, b"TPM2").unwrap();
        let mut expected = vec![0; 40];
        expected[4..12].copy_from_slice(&0xfed4_0040u64.to_le_bytes());
        expected[12] = 7;
        expected[28..32].copy_from_slice(&0x1_0000u32.to_le_bytes());
        assert_eq!(tables[at + 36..at + 76], expected);
        let script = find(&with, LOADER_FILE).unwrap();
        assert_eq!(script.chunks(128).filter(|command| has(command, LOG_FILE.as_bytes()).is_some()).count(), 2);
        assert!(has(&find(&without, LOADER_FILE).unwrap(), LOG_FILE.as_bytes()).is_none());
    }

    #[test]
    fn a_direct_boot_has_a_tpm_without_a_log() {
        let ram = GuestRam::new(16 << 20).unwrap();
        AcpiTables::build(&MachineFacts { tpm: true, ..sample() }).place(&ram).unwrap();
        let mut area = vec![0; 0x1_0000];
        ram.read(Gpa(0xe_0000), &mut area).unwrap();
        let at = has(&area, b"TPM2\x4c\0\0\0").unwrap();
        assert_eq!(area[at + 68..at + 76], [0; 8]);
        assert_eq!(crate::engine::table_loader::sum(&area[at..at + 76]), 0);
    }
}
