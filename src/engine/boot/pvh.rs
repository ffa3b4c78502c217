//! ELF kernels with a PVH note (Xen's x86/HVM direct boot ABI): segments are placed and the start info is written.

use super::{BootError, CMDLINE, Gpa, KERNEL, Loader, START_INFO, Source, StartMode, refused};

const ELF_MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u64 = 3;
const MACHINE_X86_64: u64 = 62;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const SEGMENTS_MAX: u64 = 128;
const NOTES_BYTES_MAX: u64 = 64 << 10;
/// The note whose value is the 32-bit entry.
const XEN_PHYS32_ENTRY: u64 = 18;

const START_MAGIC: u32 = 0x336e_c578;
const MODULES: u64 = START_INFO.0 + 0x40;
const MEMORY_MAP: u64 = START_INFO.0 + 0x80;

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(ELF_MAGIC)
}

/// Loads segments and initrd and writes the start info.
pub(super) fn load(
    loader: &Loader,
    kernel: &Source,
    head: &[u8],
    initrd: Option<&Source>,
    cmdline: &str,
) -> Result<StartMode, BootError> {
    let segments = read_segments(kernel, head)?;
    let entry = find_entry(kernel, &segments)?;
    let loads: Vec<&Segment> = segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_bytes > 0).collect();
    let end = check_segments(loader, kernel, &loads, entry)?;
    for segment in loads {
        kernel.read_into(loader.ram, segment.offset, segment.at, segment.file_bytes)?;
        zero(loader, segment.at + segment.file_bytes, segment.memory_bytes - segment.file_bytes)?;
    }
    loader.place_cmdline(cmdline, usize::MAX)?;
    let initrd = loader.place_initrd(initrd, end, u64::MAX)?;
    loader.place_gdt(false)?;

    let map = loader.facts.kernel_map();
    let mut info = Vec::with_capacity(56);
    info.extend([START_MAGIC, 1, 0, u32::from(initrd.is_some())].map(u32::to_le_bytes).concat());
    let modules = if initrd.is_some() { MODULES } else { 0 };
    info.extend([modules, CMDLINE.0, loader.rsdp.0, MEMORY_MAP].map(u64::to_le_bytes).concat());
    info.extend([map.len() as u32, 0].map(u32::to_le_bytes).concat());
    loader.ram.write(START_INFO, &info)?;
    if let Some(initrd) = initrd {
        let module = [initrd.at, initrd.bytes, 0, 0].map(u64::to_le_bytes).concat();
        loader.ram.write(Gpa(MODULES), &module)?;
    }
    let entries: Vec<u8> = map
        .iter()
        .flat_map(|entry| [entry.start, entry.bytes, if entry.usable { 1 } else { 2 }].map(u64::to_le_bytes).concat())
        .collect();
    loader.ram.write(Gpa(MEMORY_MAP), &entries)?;
    Ok(StartMode::Protected32 { eip: entry, ebx: START_INFO.0 as u32, esi: 0 })
}

/// A program header.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u64,
    offset: u64,
    at: u64,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

fn damaged() -> BootError {
    refused("The ELF file is damaged: its headers name places outside the file.")
}

/// A little-endian number in `bytes`.
fn number(bytes: &[u8], at: usize, len: usize) -> Result<u64, BootError> {
    let field = at.checked_add(len).and_then(|end| bytes.get(at..end)).ok_or_else(damaged)?;
    Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Reads the program headers of a 32- or 64-bit ELF.
fn read_segments(kernel: &Source, head: &[u8]) -> Result<Vec<Segment>, BootError> {
    let wide = number(head, 4, 1)? == u64::from(CLASS_64);
    if number(head, 5, 1)? != u64::from(LITTLE_ENDIAN) || ![MACHINE_386, MACHINE_X86_64].contains(&number(head, 18, 2)?)
    {
        return Err(refused("The ELF file is for another kind of machine."));
    }
    // Where e_phoff, e_phentsize and e_phnum are, and how long a program header is.
    let (table_at, entry_bytes, count, bytes) = if wide {
        (number(head, 32, 8)?, number(head, 54, 2)?, number(head, 56, 2)?, 56)
    } else {
        (number(head, 28, 4)?, number(head, 42, 2)?, number(head, 44, 2)?, 32)
    };
    if entry_bytes != bytes || count == 0 || count > SEGMENTS_MAX {
        return Err(refused(format!("The ELF file has {count} program headers; 1 to {SEGMENTS_MAX} are possible.")));
    }
    let table_bytes = count * bytes;
    if table_at.checked_add(table_bytes).is_none_or(|end| end > kernel.bytes) {
        return Err(damaged());
    }
    let table = kernel.slice(table_at, table_bytes as usize)?;
    table.chunks(bytes as usize).map(|entry| read_segment(entry, wide)).collect()
}

fn read_segment(entry: &[u8], wide: bool) -> Result<Segment, BootError> {
    let field = |at_64: usize, at_32: usize| if wide { number(entry, at_64, 8) } else { number(entry, at_32, 4) };
    Ok(Segment {
        kind: number(entry, 0, 4)?,
        offset: field(8, 4)?,
        at: field(24, 12)?,
        file_bytes: field(32, 16)?,
        memory_bytes: field(40, 20)?,
        align: field(48, 28)?,
    })
}

/// The entry that the PVH note names.
fn find_entry(kernel: &Source, segments: &[Segment]) -> Result<u32, BootError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let inside = segment.offset.checked_add(segment.file_bytes).is_some_and(|end| end <= kernel.bytes);
        if !inside {
            return Err(damaged());
        }
        let bytes = segment.file_bytes.min(NOTES_BYTES_MAX);
        let notes = kernel.slice(segment.offset, bytes as usize)?;
        if let Some(entry) = entry_in(&notes, if segment.align == 8 { 8 } else { 4 }) {
            return Ok(entry);
        }
    }
    Err(refused("The ELF file has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY), so it cannot start without firmware."))
}

/// Walks notes: name length, value length, type, name, value; both padded to `align`.
fn entry_in(notes: &[u8], align: usize) -> Option<u32> {
    let mut at = 0usize;
    loop {
        let word = |at: usize| number(notes, at, 4).ok();
        let (name_len, value_len, kind) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let name_at = at + 12;
        let value_at = name_at.checked_add(usize::try_from(name_len).ok()?)?.checked_next_multiple_of(align)?;
        let name = notes.get(name_at..name_at.checked_add(name_len as usize)?)?;
        if kind == XEN_PHYS32_ENTRY && name == b"Xen\0" && matches!(value_len, 4 | 8) {
            return u32::try_from(number(notes, value_at, value_len as usize).ok()?).ok();
        }
        at = value_at.checked_add(usize::try_from(value_len).ok()?)?.checked_next_multiple_of(align)?;
    }
}

/// Checks every place before anything is written. Gives the end of the highest segment.
fn check_segments(loader: &Loader, kernel: &Source, loads: &[&Segment], entry: u32) -> Result<u64, BootError> {
    let (mut end, mut total) = (KERNEL, 0u64);
    let mut has_entry = false;
    for segment in loads {
        let inside = segment.offset.checked_add(segment.file_bytes).is_some_and(|end| end <= kernel.bytes);
        if !inside || segment.file_bytes > segment.memory_bytes {
            return Err(damaged());
        }
        if segment.at < KERNEL {
            return Err(refused("The kernel wants to be below 1 MiB, where the machine has its tables."));
        }
        let segment_end = loader.check_fits(segment.at.checked_add(segment.memory_bytes))?;
        end = end.max(segment_end);
        total = total.saturating_add(segment.memory_bytes);
        has_entry |= (segment.at..segment_end).contains(&u64::from(entry));
    }
    // Segments that lie on each other would make the work of loading larger than the memory.
    if total > loader.low_end {
        return Err(refused("The kernel's segments are together larger than the guest's memory."));
    }
    if !has_entry {
        return Err(refused("The kernel's PVH entry is outside its segments."));
    }
    Ok(end)
}

/// After a reset RAM holds what the guest left there, so the part without file bytes is cleared.
fn zero(loader: &Loader, at: u64, bytes: u64) -> Result<(), BootError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < bytes {
        let part = (bytes - done).min(ZEROS.len() as u64);
        loader.ram.write(Gpa(at + done), &ZEROS[..part as usize])?;
        done += part;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::boot::tests::{MEMORY_BYTES, rig};

    #[derive(Clone, Copy)]
    struct Shape {
        wide: bool,
        at: u64,
        memory_bytes: u64,
        entry: u64,
        note_name: &'static [u8; 4],
        align: u64,
    }

    const GOOD: Shape =
        Shape { wide: true, at: 0x100_0000, memory_bytes: 0x3000, entry: 0x100_0010, note_name: b"Xen\0", align: 4 };

    /// An ELF with one segment of code and two notes; the second is the PVH note.
    fn elf(shape: Shape) -> Vec<u8> {
        const NOTES_AT: u64 = 0x200;
        const CODE_AT: u64 = 0x400;
        let mut notes = Vec::new();
        for (name, kind, value) in [(b"GNU\0", 3u32, 0xdead_u64), (shape.note_name, 18, shape.entry)] {
            notes.extend([4u32, if shape.wide { 8 } else { 4 }, kind].map(u32::to_le_bytes).concat());
            notes.extend(name);
            notes.extend(&value.to_le_bytes()[..if shape.wide { 8 } else { 4 }]);
            notes.resize(notes.len().next_multiple_of(shape.align as usize), 0);
        }
        let mut out = vec![0; 0x600];
        let mut put =
            |at: usize, value: u64, len: usize| out[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        put(0, u64::from(u32::from_le_bytes(*b"\x7fELF")), 4);
        put(4, if shape.wide { 0x01_0102 } else { 0x01_0101 }, 3);
        put(18, if shape.wide { 62 } else { 3 }, 2);
        let segments = [
            (4u64, NOTES_AT, 0u64, notes.len() as u64, notes.len() as u64, shape.align),
            (1, CODE_AT, shape.at, 0x200, shape.memory_bytes, 4096),
        ];
        let table: [(usize, u64, usize); 3] =
            if shape.wide { [(32, 64, 8), (54, 56, 2), (56, 2, 2)] } else { [(28, 64, 4), (42, 32, 2), (44, 2, 2)] };
        for (at, value, len) in table {
            put(at, value, len);
        }
        for (index, (kind, offset, at, file, memory, align)) in segments.into_iter().enumerate() {
            if shape.wide {
                let base = 64 + 56 * index;
                put(base, kind, 4);
                for (field, value) in [(8, offset), (24, at), (32, file), (40, memory), (48, align)] {
                    put(base + field, value, 8);
                }
            } else {
                let base = 64 + 32 * index;
                for (field, value) in [(0, kind), (4, offset), (12, at), (16, file), (20, memory), (28, align)] {
                    put(base + field, value, 4);
                }
            }
        }
        out[NOTES_AT as usize..][..notes.len()].copy_from_slice(&notes);
        out[CODE_AT as usize..].fill(0xf4);
        out
    }

    #[test]
    fn both_sizes_of_elf_start_at_their_note() {
        for shape in [GOOD, Shape { wide: false, ..GOOD }, Shape { align: 8, ..GOOD }] {
            let rig = rig();
            rig.ram.write(Gpa(0x100_0200), &[0xee; 0x2e00]).unwrap();
            let start = rig.start(&elf(shape), Some(&[9; 100]), "quiet").unwrap();
            assert_eq!(start, StartMode::Protected32 { eip: 0x100_0010, ebx: 0x6000, esi: 0 });
            assert_eq!(rig.bytes(0x100_0000, 0x200), [0xf4; 0x200]);
            assert_eq!(rig.bytes(0x100_0200, 0x2e00), [0; 0x2e00], "what has no file bytes is cleared");
            let word = |at: u64| rig.ram.get_u64(Gpa(at)).unwrap();
            assert_eq!(rig.ram.get_u32(START_INFO), Ok(START_MAGIC));
            assert_eq!(rig.ram.get_u32(Gpa(0x600c)), Ok(1), "one module");
            let module = word(0x6010);
            assert_eq!([word(module), word(module + 8)], [MEMORY_BYTES - 4096, 100]);
            assert_eq!(rig.bytes(word(0x6018), 6), b"quiet\0");
            assert_eq!(rig.bytes(word(0x6020), 8), b"RSD PTR ");
            let (map, count) = (word(0x6028), u64::from(rig.ram.get_u32(Gpa(0x6030)).unwrap()));
            let usable: u64 =
                (0..count).map(|i| map + 24 * i).filter(|at| word(at + 16) == 1).map(|at| word(at + 8)).sum();
            assert_eq!(usable, MEMORY_BYTES - (0x10_0000 - 0x9_fc00));
        }
    }

    #[test]
    fn wrong_kernels_are_refused_with_a_sentence() {
        let cases = [
            (Shape { note_name: b"Not\0", ..GOOD }, "The ELF file has no PVH note"),
            (Shape { at: 0x8000, entry: 0x8000, ..GOOD }, "The kernel wants to be below 1 MiB"),
            (Shape { memory_bytes: 1 << 30, ..GOOD }, "The kernel needs memory up to"),
            (Shape { memory_bytes: u64::MAX, ..GOOD }, "The kernel wants to be at an address"),
            (Shape { memory_bytes: 1, ..GOOD }, "The ELF file is damaged"),
            (Shape { entry: 0x200_0000, ..GOOD }, "The kernel's PVH entry is outside"),
            (Shape { entry: 1 << 40, ..GOOD }, "The ELF file has no PVH note"),
        ];
        for (shape, sentence) in cases {
            let error = rig().start(&elf(shape), None, "").unwrap_err();
            assert!(error.starts_with(sentence), "{error}");
        }
    }

    #[test]
    fn truncated_and_spoiled_kernels_never_panic() {
        let rig = rig();
        let good = elf(GOOD);
        for len in (0..good.len()).step_by(5) {
            let _ = rig.start(&good[..len], None, "");
        }
        for at in (0..0xb0).chain(0x200..0x240) {
            for byte in [0x00, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                let _ = rig.start(&bad, None, "");
            }
        }
    }

    #[test]
    fn notes_that_lie_about_their_length_end_the_search() {
        assert_eq!(entry_in(&[0xff; 64], 4), None);
        assert_eq!(entry_in(&[0; 10], 4), None);
        let mut note = Vec::new();
        note.extend([4u32, 8, 18].map(u32::to_le_bytes).concat());
        note.extend(b"Xen\0\x10\0");
        assert_eq!(entry_in(&note, 4), None, "the value is cut off");
    }
}
