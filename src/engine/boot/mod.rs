//! Direct boot: puts a kernel into RAM without firmware and says how the first vCPU starts.
//!
//! ```text
//! 0000_0500  GDT                    0000_9000  identity page tables, 24 KiB
//! 0000_6000  PVH start info         0002_0000  command line
//! 0000_7000  zero page              000e_0000  ACPI and SMBIOS tables
//! 0010_0000  kernel                 end of low RAM: initrd, downwards
//! ```
//!
//! The kernel's file comes from a person whom the host does not trust: every size in it is checked before it is used.

mod linux;
mod pvh;

use std::{fmt, fs::File, io, ops::Range};

use super::{
    acpi::AcpiTables,
    facts::MachineFacts,
    generation::Generation,
    memory::{Gpa, GuestRam, OutsideRam, RamSpan},
    smbios::Smbios,
};
use crate::types::show_size;

/// How the first vCPU starts. What is not named is as after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartState {
    pub mode: StartMode,
}

/// The registers that matter, by processor mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// Real mode; the base of the code segment is `cs` times 16.
    Real { cs: u16, ip: u16 },
    /// Protected mode without paging: CR0.PE, flat 4 GiB segments from the GDT, interrupts off.
    Protected32 { eip: u32, ebx: u32, esi: u32 },
    /// Long mode: CR0.PE and PG, CR4.PAE, EFER.LME and LMA, flat segments from the GDT, interrupts off.
    Long64 { rip: u64, rsi: u64, cr3: u64 },
}

/// The GDT in guest RAM: nothing, nothing, code, data (the boot protocol's `__BOOT_CS` and `__BOOT_DS`).
pub const GDT: Range<u64> = 0x500..0x520;
pub const CODE_SELECTOR: u16 = 0x10;
pub const DATA_SELECTOR: u16 = 0x18;

const START_INFO: Gpa = Gpa(0x6000);
const ZERO_PAGE: Gpa = Gpa(0x7000);
const PAGE_TABLES: Gpa = Gpa(0x9000);
const CMDLINE: Gpa = Gpa(0x2_0000);
const CMDLINE_BYTES_MAX: usize = 0x1_0000;
/// Kernels and their segments are at 1 MiB or higher.
const KERNEL: u64 = 0x10_0000;
/// The part of a kernel file that says what it is.
const HEAD_BYTES: usize = 4096;
const PAGE: u64 = 4096;

/// What to start.
pub struct DirectBoot<'a> {
    pub kernel: &'a File,
    pub initrd: Option<&'a File>,
    pub cmdline: &'a str,
    /// Hears where the VM generation id is.
    pub generation: &'a Generation,
}

/// Why a kernel cannot be started: a sentence for the person, and the system's reason if there is one.
#[derive(Debug)]
pub struct BootError {
    sentence: String,
    source: Option<io::Error>,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for BootError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|error| error as _)
    }
}

impl From<OutsideRam> for BootError {
    fn from(_: OutsideRam) -> BootError {
        refused("The guest's memory is too small to start a kernel.")
    }
}

fn refused(sentence: impl Into<String>) -> BootError {
    BootError { sentence: sentence.into(), source: None }
}

/// Places tables, kernel, initrd and command line in `ram`. May be called again after a reset.
///
/// Errors: the files are not what they should be, do not fit into memory, or cannot be read.
pub fn load(ram: &GuestRam, facts: &MachineFacts, boot: &DirectBoot) -> Result<StartState, BootError> {
    let tables = AcpiTables::build(facts).place(ram)?;
    boot.generation.placed(tables.generation);
    Smbios::build(facts).place(ram)?;
    let loader = Loader { ram, facts, rsdp: tables.rsdp, low_end: facts.ram_split().0 };
    let kernel = Source::open(boot.kernel, "kernel")?;
    let initrd = boot.initrd.map(|file| Source::open(file, "initrd")).transpose()?;
    let head = kernel.head()?;
    let mode = if linux::is_bzimage(&head) {
        linux::load(&loader, &kernel, &head, initrd.as_ref(), boot.cmdline)?
    } else if pvh::is_elf(&head) {
        pvh::load(&loader, &kernel, &head, initrd.as_ref(), boot.cmdline)?
    } else {
        return Err(refused("The kernel file is neither a bzImage nor an ELF with a PVH note."));
    };
    Ok(StartState { mode })
}

/// What both kinds of kernels need.
struct Loader<'a> {
    ram: &'a GuestRam,
    facts: &'a MachineFacts,
    rsdp: Gpa,
    /// Everything is placed below this.
    low_end: u64,
}

/// Where the initrd is; nothing when there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    at: u64,
    bytes: u64,
}

impl Loader<'_> {
    /// Puts the initrd as high as possible between `floor` and `limit`.
    fn place_initrd(&self, initrd: Option<&Source>, floor: u64, limit: u64) -> Result<Option<Initrd>, BootError> {
        let Some(source) = initrd else { return Ok(None) };
        let top = self.low_end.min(limit);
        let at = top.checked_sub(source.bytes).map(|at| at & !(PAGE - 1)).filter(|at| *at >= floor);
        let Some(at) = at else {
            return Err(refused(format!(
                "The initrd of {} does not fit behind the kernel, which ends at {}; the guest has {} of memory.",
                show_size(source.bytes),
                show_size(floor),
                show_size(self.facts.memory_bytes)
            )));
        };
        source.read_into(self.ram, 0, at, source.bytes)?;
        Ok(Some(Initrd { at, bytes: source.bytes }))
    }

    /// Writes the command line with its closing zero. `bytes_max` is the kernel's limit, without the zero.
    fn place_cmdline(&self, cmdline: &str, bytes_max: usize) -> Result<(), BootError> {
        let bytes_max = bytes_max.min(CMDLINE_BYTES_MAX - 1);
        if cmdline.len() > bytes_max {
            return Err(refused(format!(
                "The kernel takes a command line of {bytes_max} bytes; this one has {}.",
                cmdline.len()
            )));
        }
        if cmdline.contains('\0') {
            return Err(refused("The command line has a zero in it."));
        }
        self.ram.write(CMDLINE, &[cmdline.as_bytes(), &[0]].concat())?;
        Ok(())
    }

    fn check_fits(&self, end: Option<u64>) -> Result<u64, BootError> {
        match end {
            Some(end) if end <= self.low_end => Ok(end),
            Some(end) if end < 1 << 40 => Err(refused(format!(
                "The kernel needs memory up to {}; the guest has {}.",
                show_size(end),
                show_size(self.facts.memory_bytes)
            ))),
            _ => Err(refused("The kernel wants to be at an address that no guest has.")),
        }
    }

    /// The GDT; `long` chooses the code segment.
    fn place_gdt(&self, long: bool) -> Result<(), BootError> {
        let code: u64 = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
        let data: u64 = 0x00cf_9300_0000_ffff;
        let table = [0, 0, code, data].map(u64::to_le_bytes).concat();
        self.ram.write(Gpa(GDT.start), &table)?;
        Ok(())
    }

    /// Maps the first 4 GiB to themselves with 2 MiB pages. Gives CR3.
    fn place_page_tables(&self) -> Result<u64, BootError> {
        const PRESENT_WRITABLE: u64 = 0b11;
        const LARGE: u64 = 1 << 7;
        const DIRECTORIES: u64 = 4;
        let root = PAGE_TABLES.0;
        let pointers = root + PAGE;
        let directories = pointers + PAGE;
        let mut tables = vec![0u64; 6 * 512];
        tables[0] = pointers | PRESENT_WRITABLE;
        for index in 0..DIRECTORIES {
            tables[512 + index as usize] = (directories + index * PAGE) | PRESENT_WRITABLE;
        }
        for index in 0..DIRECTORIES * 512 {
            tables[1024 + index as usize] = index << 21 | LARGE | PRESENT_WRITABLE;
        }
        let bytes: Vec<u8> = tables.into_iter().flat_map(u64::to_le_bytes).collect();
        self.ram.write(PAGE_TABLES, &bytes)?;
        Ok(root)
    }
}

/// A file with its size and the word by which errors call it.
struct Source<'a> {
    file: &'a File,
    bytes: u64,
    what: &'static str,
}

impl<'a> Source<'a> {
    fn open(file: &'a File, what: &'static str) -> Result<Source<'a>, BootError> {
        let meta = file
            .metadata()
            .map_err(|error| BootError { sentence: format!("Cannot look at the {what} file."), source: Some(error) })?;
        if !meta.is_file() {
            return Err(refused(format!("The {what} is not a regular file.")));
        }
        if meta.len() == 0 {
            return Err(refused(format!("The {what} file is empty.")));
        }
        Ok(Source { file, bytes: meta.len(), what })
    }

    /// The first bytes, as many as there are.
    fn head(&self) -> Result<Vec<u8>, BootError> {
        self.slice(0, HEAD_BYTES.min(usize::try_from(self.bytes).unwrap_or(HEAD_BYTES)))
    }

    /// A copy of a small part. The caller has bounded `bytes`.
    fn slice(&self, at: u64, bytes: usize) -> Result<Vec<u8>, BootError> {
        use std::os::unix::fs::FileExt;
        let mut out = vec![0; bytes];
        self.file.read_exact_at(&mut out, at).map_err(|error| self.failed(error))?;
        Ok(out)
    }

    /// Reads a part straight into RAM; the part must lie inside the file and the RAM.
    fn read_into(&self, ram: &GuestRam, from: u64, at: u64, bytes: u64) -> Result<(), BootError> {
        const SPAN_BYTES: u64 = 1 << 30;
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(SPAN_BYTES);
            let span = RamSpan { at: Gpa(at + done), bytes: part as u32 };
            let read = ram.read_file(self.file, from + done, &[span]).map_err(|error| self.failed(error))?;
            if read != part {
                return Err(refused(format!("The {} file became shorter while it was read.", self.what)));
            }
            done += part;
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> BootError {
        BootError { sentence: format!("Cannot read the {} file.", self.what), source: Some(error) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::engine::facts::tests::sample;

    pub(super) fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    pub(super) const MEMORY_BYTES: u64 = 64 << 20;

    pub(super) struct Rig {
        pub(super) ram: GuestRam,
        pub(super) facts: MachineFacts,
    }

    pub(super) fn rig() -> Rig {
        let facts = MachineFacts { memory_bytes: MEMORY_BYTES, ..sample() };
        Rig { ram: GuestRam::new(MEMORY_BYTES).unwrap(), facts }
    }

    impl Rig {
        pub(super) fn start(&self, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<StartMode, String> {
            let (kernel, initrd) = (file_of(kernel), initrd.map(file_of));
            let generation = Generation::new(self.ram.clone(), [7; 16], || ());
            let boot = DirectBoot { kernel: &kernel, initrd: initrd.as_ref(), cmdline, generation: &generation };
            load(&self.ram, &self.facts, &boot).map(|start| start.mode).map_err(|error| error.to_string())
        }
        pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.ram.read(Gpa(at), &mut bytes).unwrap();
            bytes
        }
    }

    #[test]
    fn other_files_are_refused_with_a_sentence() {
        let rig = rig();
        let no_kernel = Err("The kernel file is neither a bzImage nor an ELF with a PVH note.".to_owned());
        assert_eq!(rig.start(b"#!/bin/sh\n", None, ""), no_kernel);
        assert_eq!(rig.start(&[0xff; 8192], None, ""), no_kernel);
        assert_eq!(rig.start(&[], None, ""), Err("The kernel file is empty.".into()));
        assert_eq!(rig.bytes(0xe_f028, 16), [7; 16], "the VM generation id is in its place");
        let folder = File::open("/").unwrap();
        let generation = Generation::new(rig.ram.clone(), [7; 16], || ());
        let boot = DirectBoot { kernel: &folder, initrd: None, cmdline: "", generation: &generation };
        let error = load(&rig.ram, &rig.facts, &boot).unwrap_err();
        assert_eq!(error.to_string(), "The kernel is not a regular file.");
    }

    #[test]
    fn a_guest_without_low_memory_is_refused() {
        let ram = GuestRam::new(0x8_0000).unwrap();
        let kernel = file_of(b"x");
        let generation = Generation::new(ram.clone(), [7; 16], || ());
        let boot = DirectBoot { kernel: &kernel, initrd: None, cmdline: "", generation: &generation };
        let error = load(&ram, &sample(), &boot).unwrap_err();
        assert_eq!(error.to_string(), "The guest's memory is too small to start a kernel.");
    }

    #[test]
    fn the_first_4_gib_are_mapped_to_themselves() {
        let rig = rig();
        let loader = Loader { ram: &rig.ram, facts: &rig.facts, rsdp: Gpa(0), low_end: MEMORY_BYTES };
        let root = loader.place_page_tables().unwrap();
        let entry = |table: u64, index: u64| rig.ram.get_u64(Gpa((table & !0xfff) + 8 * index)).unwrap();
        for address in [0u64, 0x10_0000, 0x1234_5678, 0xffff_f000] {
            let pointers = entry(root, address >> 39);
            let directory = entry(pointers, address >> 30 & 511);
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(pointers & directory & page & 3, 3);
            assert_eq!((page & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(root, 1), 0);
    }
}
