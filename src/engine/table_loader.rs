//! The script by which firmware places tables and links them: allocate, add a pointer, add a checksum, tell a pointer.
//!
//! The same script is carried out here when there is no firmware (QEMU's `etc/table-loader`, 128 bytes a command).

/// What firmware or `link` does, in order. Files are named as in fw_cfg.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Puts `file` somewhere. `fseg`: below 1 MiB, where the RSDP is looked for.
    Allocate { file: &'static str, align: u32, fseg: bool },
    /// Adds the address of `to` to the little-endian number of `bytes` bytes at `at` in `file`.
    AddPointer { file: &'static str, at: u32, bytes: u8, to: &'static str },
    /// Sets the byte at `at` so that the bytes from `start` on sum up to zero. The byte is zero before.
    AddChecksum { file: &'static str, at: u32, start: u32, len: u32 },
    /// Writes the address of the byte at `offset` in `to` into the 8 bytes of `file`, which stays with the machine.
    WritePointer { file: &'static str, to: &'static str, offset: u32 },
}

const COMMAND_BYTES: usize = 128;
const NAME_BYTES: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
const WRITE_POINTER: u32 = 4;
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;

/// The script as the file that firmware reads.
pub fn encode(commands: &[Command]) -> Vec<u8> {
    commands.iter().flat_map(encode_one).collect()
}

fn encode_one(command: &Command) -> [u8; COMMAND_BYTES] {
    let mut out = Vec::with_capacity(COMMAND_BYTES);
    match *command {
        Command::Allocate { file, align, fseg } => {
            out.extend(ALLOCATE.to_le_bytes());
            out.extend(name(file));
            out.extend(align.to_le_bytes());
            out.push(if fseg { ZONE_FSEG } else { ZONE_HIGH });
        }
        Command::AddPointer { file, at, bytes, to } => {
            out.extend(ADD_POINTER.to_le_bytes());
            out.extend(name(file));
            out.extend(name(to));
            out.extend(at.to_le_bytes());
            out.push(bytes);
        }
        Command::AddChecksum { file, at, start, len } => {
            out.extend(ADD_CHECKSUM.to_le_bytes());
            out.extend(name(file));
            out.extend(at.to_le_bytes());
            out.extend(start.to_le_bytes());
            out.extend(len.to_le_bytes());
        }
        Command::WritePointer { file, to, offset } => {
            out.extend(WRITE_POINTER.to_le_bytes());
            out.extend(name(file));
            out.extend(name(to));
            out.extend(0u32.to_le_bytes()); // offset in `file`
            out.extend(offset.to_le_bytes());
            out.push(8);
        }
    }
    out.resize(COMMAND_BYTES, 0);
    out.try_into().expect("resized above")
}

/// A file name in its field, closed by zeros.
fn name(file: &str) -> [u8; NAME_BYTES] {
    assert!(file.len() < NAME_BYTES, "file names are ours");
    let mut field = [0; NAME_BYTES];
    field[..file.len()].copy_from_slice(file.as_bytes());
    field
}

/// A file with the address that it gets.
pub struct Placed {
    pub file: &'static str,
    pub address: u64,
    pub bytes: Vec<u8>,
}

/// Carries the script out on files whose places are already chosen. The script and the files are ours, so a mistake panics.
pub fn link(commands: &[Command], files: &mut [Placed]) {
    let find = |files: &[Placed], name: &str| {
        files.iter().position(|placed| placed.file == name).expect("the script names only its own files")
    };
    for command in commands {
        match *command {
            Command::Allocate { file, align, .. } => {
                let placed = &files[find(files, file)];
                assert!(placed.address.is_multiple_of(u64::from(align)), "{file} is placed at a wrong address");
            }
            Command::AddPointer { file, at, bytes, to } => {
                let base = files[find(files, to)].address;
                let index = find(files, file);
                let field = &mut files[index].bytes[at as usize..][..usize::from(bytes)];
                let mut value = [0; 8];
                value[..field.len()].copy_from_slice(field);
                let value = (u64::from_le_bytes(value) + base).to_le_bytes();
                field.copy_from_slice(&value[..field.len()]);
            }
            Command::AddChecksum { file, at, start, len } => {
                let index = find(files, file);
                let bytes = &mut files[index].bytes;
                let sum = sum(&bytes[start as usize..][..len as usize]);
                bytes[at as usize] = bytes[at as usize].wrapping_sub(sum);
            }
            Command::WritePointer { file, to, offset } => {
                let address = files[find(files, to)].address + u64::from(offset);
                let index = find(files, file);
                files[index].bytes.copy_from_slice(&address.to_le_bytes());
            }
        }
    }
}

/// The sum of all bytes; zero for a table whose checksum is right.
pub fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: [Command; 5] = [
        Command::Allocate { file: "a", align: 16, fseg: true },
        Command::Allocate { file: "b", align: 64, fseg: false },
        Command::AddPointer { file: "a", at: 4, bytes: 4, to: "b" },
        Command::AddChecksum { file: "a", at: 0, start: 0, len: 8 },
        Command::WritePointer { file: "c", to: "b", offset: 40 },
    ];

    #[test]
    fn a_script_is_written_as_firmware_reads_it() {
        let bytes = encode(&SCRIPT);
        assert_eq!(bytes.len(), 5 * 128);
        assert_eq!(bytes[..6], [1, 0, 0, 0, b'a', 0]);
        assert_eq!(bytes[60..65], [16, 0, 0, 0, ZONE_FSEG]);
        let pointer = &bytes[256..384];
        assert_eq!([pointer[0], pointer[4], pointer[60], pointer[116], pointer[120]], [2, b'a', b'b', 4, 4]);
        let checksum = &bytes[384..512];
        assert_eq!([checksum[0], checksum[60], checksum[64], checksum[68]], [3, 0, 0, 8]);
        let written = &bytes[512..];
        assert_eq!(
            [written[0], written[4], written[60], written[116], written[120], written[124]],
            [4, b'c', b'b', 0, 40, 8]
        );
    }

    #[test]
    fn linking_adds_addresses_and_makes_sums_zero() {
        let mut files = [
            Placed { file: "a", address: 0xe_0000, bytes: vec![0, 1, 2, 3, 0x10, 0, 0, 0] },
            Placed { file: "b", address: 0x1_0000, bytes: vec![0; 64] },
            Placed { file: "c", address: 0, bytes: vec![0; 8] },
        ];
        link(&SCRIPT, &mut files);
        assert_eq!(files[0].bytes[4..], [0x10, 0, 1, 0]);
        assert_eq!(sum(&files[0].bytes), 0);
        assert_eq!(files[2].bytes, 0x1_0028u64.to_le_bytes());
    }
}
