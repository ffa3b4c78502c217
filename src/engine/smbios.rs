//! SMBIOS tables: names and sizes for people and inventories (SMBIOS 2.8, DSP0134).

use super::{
    facts::MachineFacts,
    layout,
    memory::{Gpa, GuestRam, OutsideRam},
    table_loader::sum,
};

pub const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
pub const TABLES_FILE: &str = "etc/smbios/smbios-tables";

/// Where a direct boot has its anchor; kernels look for it from here to 1 MiB.
const PLACE: u64 = 0xf_0000;
/// The product name; the machine version of `spec::MACHINE`.
const MODEL: &str = "pc-1";
/// A name longer than this is cut: some readers have small buffers.
const NAME_CHARS_MAX: usize = 60;

const MEMORY_ARRAY: u16 = 0x1000;
const NO_ERROR_INFORMATION: u16 = 0xfffe;
const UNKNOWN: u8 = 2;

/// The structures and the anchor that names them.
pub struct Smbios {
    tables: Vec<u8>,
    count: u16,
    largest: u16,
}

impl Smbios {
    pub fn build(facts: &MachineFacts) -> Smbios {
        let mut tables = Smbios { tables: Vec::new(), count: 0, largest: 0 };
        tables.add(bios());
        tables.add(system(facts));
        tables.add(chassis());
        for socket in 0..facts.topology.sockets.min(64) as u16 {
            tables.add(processor(facts, socket));
        }
        tables.add(memory_array(facts));
        tables.add(memory_device(facts));
        let (low, high) = facts.ram_split();
        tables.add(mapped_memory(0, 0, low));
        if high > 0 {
            tables.add(mapped_memory(1, layout::HIGH_RAM_START, high));
        }
        tables.add(Structure::new(32, 0x2000).bytes(&[0; 7])); // no boot error
        tables.add(Structure::new(127, 0x7f00));
        tables
    }

    /// The files for fw_cfg; the firmware places the tables and completes the anchor.
    pub fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        vec![(ANCHOR_FILE, self.anchor(0)), (TABLES_FILE, self.tables.clone())]
    }

    /// Writes anchor and tables below 1 MiB. Errors: the guest has no RAM there.
    pub fn place(&self, ram: &GuestRam) -> Result<(), OutsideRam> {
        let at = PLACE + 0x20;
        ram.write(Gpa(PLACE), &self.anchor(at as u32))?;
        ram.write(Gpa(at), &self.tables)
    }

    fn add(&mut self, structure: Structure) {
        let bytes = structure.finish();
        self.count += 1;
        self.largest = self.largest.max(bytes.len() as u16);
        self.tables.extend(bytes);
    }

    /// The 2.1 entry point (5.2.1).
    fn anchor(&self, tables_at: u32) -> Vec<u8> {
        let mut out = Vec::with_capacity(31);
        out.extend(b"_SM_\0\x1f\x02\x08");
        out.extend(self.largest.to_le_bytes());
        out.extend([0; 6]);
        out.extend(b"_DMI_\0");
        out.extend((self.tables.len() as u16).to_le_bytes());
        out.extend(tables_at.to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.push(0x28);
        out[0x15] = sum(&out[0x10..]).wrapping_neg();
        out[4] = sum(&out).wrapping_neg();
        out
    }
}

/// One structure: header, formatted part, strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    string_count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Structure {
        let [low, high] = handle.to_le_bytes();
        Structure { bytes: vec![kind, 0, low, high], strings: Vec::new(), string_count: 0 }
    }
    fn bytes(mut self, bytes: &[u8]) -> Structure {
        self.bytes.extend(bytes);
        self
    }
    fn byte(self, byte: u8) -> Structure {
        self.bytes(&[byte])
    }
    fn word(self, value: u16) -> Structure {
        self.bytes(&value.to_le_bytes())
    }
    fn dword(self, value: u32) -> Structure {
        self.bytes(&value.to_le_bytes())
    }
    fn qword(self, value: u64) -> Structure {
        self.bytes(&value.to_le_bytes())
    }
    /// Adds a string and its number; an empty one is number 0.
    fn string(mut self, text: &str) -> Structure {
        let text: String = text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(NAME_CHARS_MAX).collect();
        if text.is_empty() {
            return self.byte(0);
        }
        self.strings.extend(text.as_bytes());
        self.strings.push(0);
        self.string_count += 1;
        let number = self.string_count;
        self.byte(number)
    }
    fn finish(mut self) -> Vec<u8> {
        self.bytes[1] = self.bytes.len() as u8;
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        self.strings.push(0);
        self.bytes.extend(self.strings);
        self.bytes
    }
}

/// Type 0 (7.1).
fn bios() -> Structure {
    Structure::new(0, 0)
        .string("Innkeeper")
        .string(env!("CARGO_PKG_VERSION"))
        .word(0xe800) // start segment
        .string("01/01/2026")
        .byte(0) // 64 KiB
        .qword(1 << 3) // characteristics are not given
        .bytes(&[0, 0b0001_0100]) // a virtual machine; targeted content distribution
        .bytes(&[0, 0, 0xff, 0xff])
}

/// Type 1 (7.2). The first three fields of the UUID are little-endian (7.2.1).
fn system(facts: &MachineFacts) -> Structure {
    let mut uuid = facts.uuid;
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    Structure::new(1, 0x100)
        .string("Innkeeper")
        .string(MODEL)
        .string(env!("CARGO_PKG_VERSION"))
        .string(&facts.name)
        .bytes(&uuid)
        .byte(6) // woken by the power switch
        .string("")
        .string("")
}

/// Type 3 (7.4).
fn chassis() -> Structure {
    Structure::new(3, 0x300)
        .string("Innkeeper")
        .byte(1) // other
        .bytes(&[0, 0, 0])
        .bytes(&[3, 3, 3, UNKNOWN]) // boot state, power and temperature are safe
        .dword(0)
        .bytes(&[0, 0, 0, 0, 0])
}

/// Type 4 (7.5): a socket.
fn processor(facts: &MachineFacts, socket: u16) -> Structure {
    let (cores, threads) = (facts.topology.cores.min(255) as u8, facts.topology.per_socket().min(255) as u8);
    Structure::new(4, 0x400 + socket)
        .string(&format!("CPU{socket}"))
        .byte(3) // a central processor
        .byte(1) // family: other
        .string("Innkeeper")
        .qword(0) // id
        .string("vCPU")
        .byte(0) // voltage
        .word(0)
        .bytes(&[0; 4]) // speeds are unknown
        .byte(0x41) // present and enabled
        .byte(1)
        .bytes(&[0xff; 6]) // no cache information
        .bytes(&[0, 0, 0])
        .bytes(&[cores, cores, threads])
        .word(1 << 2) // 64 bits
        .word(1)
}

/// Type 16 (7.17).
fn memory_array(facts: &MachineFacts) -> Structure {
    Structure::new(16, MEMORY_ARRAY)
        .bytes(&[1, 3, 3]) // other place, system memory, no error correction
        .dword(0x8000_0000) // see the extended capacity
        .word(NO_ERROR_INFORMATION)
        .word(1)
        .qword(facts.memory_bytes)
}

/// Type 17 (7.18).
fn memory_device(facts: &MachineFacts) -> Structure {
    let mib = facts.memory_bytes >> 20;
    let (size, extended) = if mib < 0x7fff { (mib as u16, 0) } else { (0x7fff, mib as u32) };
    Structure::new(17, 0x1100)
        .word(MEMORY_ARRAY)
        .word(NO_ERROR_INFORMATION)
        .word(0xffff)
        .word(0xffff)
        .word(size)
        .bytes(&[9, 0]) // DIMM
        .string("DIMM 0")
        .byte(0)
        .byte(7) // RAM
        .word(1 << 1)
        .word(0)
        .string("Innkeeper")
        .bytes(&[0, 0, 0, 0])
        .dword(extended)
        .bytes(&[0; 8])
}

/// Type 19 (7.20), with the extended addresses only.
fn mapped_memory(index: u16, start: u64, bytes: u64) -> Structure {
    Structure::new(19, 0x1300 + index)
        .dword(u32::MAX)
        .dword(u32::MAX)
        .word(MEMORY_ARRAY)
        .byte(1)
        .qword(start)
        .qword(start + bytes - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::facts::tests::sample;

    /// Walks the structures as a driver does: type, formatted part, strings.
    fn walk(tables: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut out = Vec::new();
        let mut rest = tables;
        while !rest.is_empty() {
            let len = usize::from(rest[1]);
            let end = rest[len..].windows(2).position(|pair| pair == [0, 0]).unwrap() + len + 2;
            let strings = rest[len..end]
                .split(|byte| *byte == 0)
                .filter(|text| !text.is_empty())
                .map(|text| String::from_utf8(text.to_vec()).unwrap())
                .collect();
            out.push((rest[0], rest[..len].to_vec(), strings));
            rest = &rest[end..];
        }
        out
    }

    #[test]
    fn a_driver_walks_every_structure() {
        let smbios = Smbios::build(&MachineFacts { memory_bytes: 40 << 30, ..sample() });
        let found = walk(&smbios.tables);
        let kinds: Vec<(u8, usize)> = found.iter().map(|(kind, body, _)| (*kind, body.len())).collect();
        // Lengths as in SMBIOS 2.8.
        assert_eq!(
            kinds,
            [(0, 24), (1, 27), (3, 22), (4, 42), (16, 23), (17, 40), (19, 31), (19, 31), (32, 11), (127, 4)]
        );
        assert_eq!(usize::from(smbios.count), found.len());
        let (_, system, names) = &found[1];
        assert_eq!(system[8..12], [0x78, 0x56, 0x34, 0x12], "the UUID's first field is little-endian");
        assert!(names.contains(&"sample".to_owned()));
        let memory = &found[5].1;
        assert_eq!(memory[12..14], [0xff, 0x7f]);
        assert_eq!(memory[28..32], (40u32 << 10).to_le_bytes());
    }

    #[test]
    fn the_anchor_sums_to_zero_and_is_found_below_1_mib() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let smbios = Smbios::build(&sample());
        smbios.place(&ram).unwrap();
        let mut anchor = [0; 31];
        ram.read(Gpa(PLACE), &mut anchor).unwrap();
        assert_eq!(&anchor[..4], b"_SM_");
        assert_eq!([sum(&anchor), sum(&anchor[16..])], [0, 0]);
        let at = u64::from(u32::from_le_bytes(anchor[24..28].try_into().unwrap()));
        let mut tables = vec![0; usize::from(u16::from_le_bytes([anchor[22], anchor[23]]))];
        ram.read(Gpa(at), &mut tables).unwrap();
        assert_eq!(tables, smbios.tables);
    }

    #[test]
    fn a_hostile_name_stays_one_string() {
        let facts = MachineFacts { name: "a\0b\n\u{1f600}".repeat(100), ..sample() };
        let found = walk(&Smbios::build(&facts).tables);
        assert_eq!(found.len(), 9);
        assert!(found[1].2.iter().any(|text| text.len() == NAME_CHARS_MAX && text.starts_with("abab")));
    }
}
