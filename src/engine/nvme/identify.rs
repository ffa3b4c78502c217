//! The data of Identify (NVM Express 1.4, section 5.15). What is said here must be what the other files do.

use sha2::{Digest, Sha256};

use super::{
    super::disk::{DiskShape, SECTOR_BYTES},
    SUBSYSTEM_VENDOR, VENDOR,
    command::NAMESPACE,
    events::HELD_MAX,
    logs::ERRORS_KEPT,
    prp::MDTS,
    registers::VERSION,
};

/// Bytes of each structure.
pub(super) const BYTES: usize = 4096;

/// As long as its field.
pub(super) const FIRMWARE: &[u8; 8] = b"1.0     ";
const MODEL: &str = "Innkeeper disk";
/// 25, 70 and 100 degrees Celsius: this disk is always cool.
pub(super) const TEMPERATURE_KELVIN: u16 = 298;
pub(super) const WARNING_KELVIN: u16 = 343;
const CRITICAL_KELVIN: u16 = 373;
/// How long a shutdown may take, in microseconds: the host may have much to write.
const SHUTDOWN_US: u32 = 60_000_000;
/// Commands that Abort may name at once, less one (ACL).
const ABORT_LIMIT: u8 = 3;

/// What a controller and its namespace are.
pub(super) struct Identity {
    serial: String,
    uuid: [u8; 16],
    shape: DiskShape,
}

impl Identity {
    pub(super) fn new(serial: &str, shape: DiskShape) -> Identity {
        let digest = Sha256::digest(serial);
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&digest[..16]);
        // RFC 9562, version 8: made by our own rule, from the disk's id.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Identity { serial: serial.to_owned(), uuid, shape }
    }

    /// Blocks of the namespace.
    pub(super) fn blocks(&self) -> u64 {
        self.shape.size_bytes / SECTOR_BYTES
    }

    /// Identify Controller. Fields that are not set are zero: not offered.
    pub(super) fn controller(&self) -> [u8; BYTES] {
        let mut data = [0; BYTES];
        put(&mut data, 0, &VENDOR.to_le_bytes());
        put(&mut data, 2, &SUBSYSTEM_VENDOR.to_le_bytes());
        text::<20>(&mut data, 4, &self.serial);
        text::<40>(&mut data, 24, MODEL);
        put(&mut data, 64, FIRMWARE);
        put(&mut data, 73, &[0x00, 0x54, 0x52]); // IEEE OUI 52:54:00, as of network cards
        put(&mut data, 77, &[MDTS]);
        put(&mut data, 80, &VERSION.to_le_bytes());
        put(&mut data, 88, &SHUTDOWN_US.to_le_bytes());
        put(&mut data, 111, &[1]); // an I/O controller
        put(&mut data, 258, &[ABORT_LIMIT, HELD_MAX as u8 - 1]);
        put(&mut data, 260, &[0x03]); // one firmware slot, read-only
        put(&mut data, 261, &[1 << 2]); // log pages from an offset on
        put(&mut data, 262, &[ERRORS_KEPT as u8 - 1]);
        put(&mut data, 266, &WARNING_KELVIN.to_le_bytes());
        put(&mut data, 268, &CRITICAL_KELVIN.to_le_bytes());
        put(&mut data, 512, &[0x66, 0x44]); // entries of 64 and 16 bytes
        put(&mut data, 516, &NAMESPACE.to_le_bytes());
        put(&mut data, 520, &[1 << 2 | 1 << 3]); // Dataset Management, Write Zeroes
        put(&mut data, 525, &[0x07]); // a write cache; Flush takes every namespace at once
        let name = format!("nqn.2014-08.org.nvmexpress:uuid:{}", self.show_uuid());
        put(&mut data, 768, name.as_bytes());
        data
    }

    /// Identify Namespace: one format, of 512 bytes without metadata. EUI-64 and NGUID are zero; firmware's boot order relies
    /// on that.
    pub(super) fn namespace(&self) -> [u8; BYTES] {
        let mut data = [0; BYTES];
        for at in [0, 8, 16] {
            put(&mut data, at, &self.blocks().to_le_bytes()); // size, capacity, use
        }
        put(&mut data, 99, &[u8::from(self.shape.read_only)]);
        put(&mut data, 128 + 2, &[SECTOR_BYTES.trailing_zeros() as u8]);
        data
    }

    /// The active namespaces with numbers above `after`.
    pub(super) fn active_namespaces(after: u32) -> [u8; BYTES] {
        let mut data = [0; BYTES];
        if after < NAMESPACE {
            put(&mut data, 0, &NAMESPACE.to_le_bytes());
        }
        data
    }

    /// Namespace Identification Descriptors: the UUID.
    pub(super) fn descriptors(&self) -> [u8; BYTES] {
        let mut data = [0; BYTES];
        put(&mut data, 0, &[3, 16]);
        put(&mut data, 4, &self.uuid);
        data
    }

    fn show_uuid(&self) -> String {
        let mut out = String::with_capacity(36);
        for (index, byte) in self.uuid.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                out.push('-');
            }
            out += &format!("{byte:02x}");
        }
        out
    }
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Printable ASCII, padded with spaces.
fn text<const BYTES: usize>(data: &mut [u8], at: usize, text: &str) {
    let mut field = [b' '; BYTES];
    let printable = text.bytes().filter(|byte| (0x20..0x7f).contains(byte));
    for (into, byte) in field.iter_mut().zip(printable) {
        *into = byte;
    }
    put(data, at, &field);
}
