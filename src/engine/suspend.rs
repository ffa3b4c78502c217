//! The file of a suspended guest.
//!
//! ```text
//! 0   16  "INNKEEPER SAVED\n"; "INNKEEPER SPENT\n" as soon as a machine goes on from it, so that none does so twice
//! 16   4  format, 2
//! 20   4  bytes of the header
//! 24   4  CRC-32 of the header
//! 28      header, JSON: release, specification, table of states (name, kind, version, bytes, bytes in the file, CRC-32 of those)
//!         the states, in the table's order
//!         memory: runs of pages, each with region (4), bytes (4), offset (8), bytes in the file (4), CRC-32 of all that and of what
//!         is in the file (4), then the pages; a run of the region FFFF_FFFF ends it
//! ```
//!
//! Numbers are little-endian. Pages of zeros are left out. A state or a run is an LZ4 block where that is shorter, else it is in the
//! file as it is. What is read is hostile until it is checked: it is ours, but it lay on a disk.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    ops::ControlFlow,
    os::unix::fs::FileExt,
};

use serde::{Deserialize, Serialize};

use super::{
    memory::{Gpa, GuestRam, HostRegion},
    saved::{BadState, State},
};
use crate::{
    spec::GuestSpec,
    wire::{SAVED_MAGIC, SPENT_MAGIC},
};

const FORMAT: u32 = 2;
const HEADER_BYTES_MAX: u32 = 4 << 20;
const STATE_BYTES_MAX: u64 = 64 << 20;
const PAGE: usize = 4096;
/// Pages are looked at, and written, this many bytes at a time.
const CHUNK: usize = 1 << 20;
/// Regions of memory.
const RAM: u32 = 0;
const VIDEO: u32 = 1;
const END: u32 = u32::MAX;

/// The memory of a machine.
pub struct Memory<'a> {
    pub ram: &'a GuestRam,
    pub video: &'a HostRegion,
}

/// The states of a machine's parts, by name.
pub type States = Vec<(String, State)>;

#[derive(Serialize, Deserialize)]
struct Header {
    release: String,
    spec: GuestSpec,
    states: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    kind: String,
    version: u32,
    bytes: u64,
    stored: u64,
    crc: u32,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub file_bytes: u64,
    /// Of guest RAM, without pages of zeros.
    pub memory_bytes: u64,
}

/// Writes everything, and returns when it is on the disk. `progress` gets the bytes of memory that were looked at, and may give up.
///
/// Errors: what the file says; `Interrupted` when `progress` gave up. The file is of no use then.
pub fn write(
    file: &File,
    spec: &GuestSpec,
    states: &States,
    memory: &Memory<'_>,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> io::Result<Written> {
    let mut room = Vec::new();
    let stored: Vec<Vec<u8>> = states.iter().map(|(_, state)| pack(&state.bytes, &mut room).to_vec()).collect();
    let entry = |((name, state), stored): (&(String, State), &Vec<u8>)| Entry {
        name: name.clone(),
        kind: state.kind.clone(),
        version: state.version,
        bytes: state.bytes.len() as u64,
        stored: stored.len() as u64,
        crc: crc32(&[stored]),
    };
    let release = env!("CARGO_PKG_VERSION").to_owned();
    let header = Header { release, spec: spec.clone(), states: states.iter().zip(&stored).map(entry).collect() };
    let header = serde_json::to_vec(&header)?;
    let header_bytes = u32::try_from(header.len()).ok().filter(|bytes| *bytes <= HEADER_BYTES_MAX);
    let header_bytes = header_bytes.ok_or_else(|| io::Error::other("the header is too long"))?;
    let mut start = SAVED_MAGIC.to_vec();
    for number in [FORMAT, header_bytes, crc32(&[&header])] {
        start.extend(number.to_le_bytes());
    }
    file.set_len(0)?;
    let mut to = BufWriter::with_capacity(CHUNK, file);
    to.rewind()?;
    to.write_all(&start)?;
    to.write_all(&header)?;
    for bytes in &stored {
        to.write_all(bytes)?;
    }
    let mut looked = 0;
    let mut memory_bytes = 0;
    let mut buffers = Buffers { pages: vec![0; CHUNK], packed: room };
    for range in memory.ram.ranges() {
        let read = |at: u64, into: &mut [u8]| memory.ram.read(Gpa(at), into).map_err(io::Error::other);
        let whole = range.start.0..range.start.0 + range.bytes;
        memory_bytes += write_region(&mut to, RAM, whole, &mut buffers, read, &mut |bytes| {
            looked += bytes;
            progress(looked)
        })?;
    }
    let read = |at: u64, into: &mut [u8]| {
        memory.video.read(at as usize, into);
        Ok(())
    };
    let video = 0..memory.video.bytes() as u64;
    write_region(&mut to, VIDEO, video, &mut buffers, read, &mut |_| ControlFlow::Continue(()))?;
    write_run(&mut to, END, 0, &[], &mut buffers.packed)?;
    to.flush()?;
    let file_bytes = to.stream_position()?;
    drop(to);
    file.sync_all()?;
    Ok(Written { file_bytes, memory_bytes })
}

/// What is looked at, and what became of it.
struct Buffers {
    pages: Vec<u8>,
    packed: Vec<u8>,
}

/// Writes the pages of a region that are not zero; returns their bytes.
fn write_region(
    to: &mut impl Write,
    region: u32,
    whole: std::ops::Range<u64>,
    buffers: &mut Buffers,
    read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> io::Result<u64> {
    let mut written = 0;
    let mut at = whole.start;
    while at < whole.end {
        let bytes = (whole.end - at).min(buffers.pages.len() as u64) as usize;
        let chunk = buffers.pages.get_mut(..bytes).unwrap_or_default();
        read(at, chunk)?;
        for (offset, run) in runs(chunk) {
            write_run(to, region, at + offset as u64, run, &mut buffers.packed)?;
            written += run.len() as u64;
        }
        at += bytes as u64;
        if progress(bytes as u64).is_break() {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
    Ok(written)
}

/// The stretches of pages that are not zero, with where each begins.
fn runs(chunk: &[u8]) -> Vec<(usize, &[u8])> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (index, page) in chunk.chunks(PAGE).enumerate() {
        if is_zero(page) {
            continue;
        }
        let (start, end) = (index * PAGE, index * PAGE + page.len());
        match found.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => found.push((start, end)),
        }
    }
    found.into_iter().filter_map(|(start, end)| Some((start, chunk.get(start..end)?))).collect()
}

fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = flate2::Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn write_run(to: &mut impl Write, region: u32, at: u64, pages: &[u8], room: &mut Vec<u8>) -> io::Result<()> {
    let stored = pack(pages, room);
    let head = run_head(region, pages.len() as u32, at, stored.len() as u32);
    to.write_all(&head)?;
    to.write_all(&crc32(&[&head, stored]).to_le_bytes())?;
    to.write_all(stored)
}

/// What stands before the pages of a run, and is checked with them.
fn run_head(region: u32, bytes: u32, at: u64, stored: u32) -> [u8; 20] {
    let mut head = [0; 20];
    let (front, back) = head.split_at_mut(16);
    front.copy_from_slice(&(u128::from(region) | u128::from(bytes) << 32 | u128::from(at) << 64).to_le_bytes());
    back.copy_from_slice(&stored.to_le_bytes());
    head
}

/// An LZ4 block of the bytes, made in `room`, where that is shorter; else the bytes.
fn pack<'a>(bytes: &'a [u8], room: &'a mut Vec<u8>) -> &'a [u8] {
    let most = lz4_flex::block::get_maximum_output_size(bytes.len());
    if room.len() < most {
        room.resize(most, 0);
    }
    let packed = lz4_flex::block::compress_into(bytes, room).ok().filter(|packed| *packed < bytes.len());
    packed.and_then(|packed| room.get(..packed)).unwrap_or(bytes)
}

/// What `pack` was given, whose length is that of `into`. None when it was something else.
fn unpack<'a>(stored: &'a [u8], into: &'a mut [u8]) -> Option<&'a [u8]> {
    if stored.len() == into.len() {
        return Some(stored);
    }
    let bytes = lz4_flex::block::decompress_into(stored, into).ok()?;
    (bytes == into.len()).then_some(into)
}

/// A file whose header and states were read and checked; memory is next.
pub struct Reader {
    from: BufReader<File>,
    spec: GuestSpec,
    states: States,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the saved state is damaged: {what}"))
}

impl Reader {
    /// Errors: what is wrong, as a part of a sentence.
    pub fn open(file: File) -> io::Result<Reader> {
        let mut from = BufReader::with_capacity(CHUNK, file);
        from.seek(SeekFrom::Start(0))?;
        let cut =
            |error: io::Error| if error.kind() == io::ErrorKind::UnexpectedEof { damaged("it is cut") } else { error };
        let mut magic = [0; SAVED_MAGIC.len()];
        from.read_exact(&mut magic).map_err(cut)?;
        if magic == *SPENT_MAGIC {
            return Err(io::Error::other("the guest has gone on from this saved state already"));
        }
        if magic != *SAVED_MAGIC {
            return Err(damaged("it does not begin as one"));
        }
        let format = read_u32(&mut from).map_err(cut)?;
        if format != FORMAT {
            return Err(io::Error::other(format!(
                "the saved state has format {format}, which this release does not know"
            )));
        }
        let (bytes, crc) = (read_u32(&mut from).map_err(cut)?, read_u32(&mut from).map_err(cut)?);
        if bytes > HEADER_BYTES_MAX {
            return Err(damaged("its header is too long"));
        }
        let header = read_checked(&mut from, u64::from(bytes), crc, "header").map_err(cut)?;
        let header: Header = serde_json::from_slice(&header).map_err(|error| damaged(&error.to_string()))?;
        let too_long = |entry: &Entry| entry.stored > entry.bytes;
        let all_bytes = header.states.iter().map(|entry| entry.bytes.min(STATE_BYTES_MAX + 1)).sum::<u64>();
        if all_bytes > STATE_BYTES_MAX || header.states.iter().any(too_long) {
            return Err(damaged("its states are too long"));
        }
        let mut states = States::new();
        for Entry { name, kind, version, bytes, stored, crc } in header.states {
            let stored = read_checked(&mut from, stored, crc, &name).map_err(cut)?;
            let mut room = vec![0; bytes as usize];
            let bytes = unpack(&stored, &mut room).ok_or_else(|| damaged(&format!("{name} has another length")))?;
            states.push((name, State { kind, version, bytes: bytes.to_vec() }));
        }
        Ok(Reader { from, spec: header.spec, states })
    }

    /// Of the guest that was suspended.
    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    /// Takes the state of a name.
    pub fn take(&mut self, name: &str) -> Result<State, BadState> {
        let at = self.states.iter().position(|(own, _)| own == name);
        at.map(|at| self.states.swap_remove(at).1).ok_or_else(|| BadState::new(name, "it is missing"))
    }

    /// A state that nobody took: the machine it is of had a part that this one has not.
    pub fn left(&self) -> Option<&str> {
        self.states.first().map(|(name, _)| name.as_str())
    }

    /// Fills memory, which is zero.
    pub fn read_memory(&mut self, memory: &Memory<'_>) -> io::Result<()> {
        let (mut buffer, mut room) = (vec![0; CHUNK], vec![0; CHUNK]);
        loop {
            let (region, bytes) = (read_u32(&mut self.from)?, read_u32(&mut self.from)? as usize);
            let (at, stored) = (read_u64(&mut self.from)?, read_u32(&mut self.from)? as usize);
            let crc = read_u32(&mut self.from)?;
            let room = room.get_mut(..bytes).filter(|room| stored <= room.len());
            let run = buffer.get_mut(..stored);
            let (room, run) = room.zip(run).ok_or_else(|| damaged("a run of pages is too long"))?;
            self.from.read_exact(run)?;
            if crc32(&[&run_head(region, bytes as u32, at, stored as u32), run]) != crc {
                return Err(damaged("a page has changed"));
            }
            let run = unpack(run, room).ok_or_else(|| damaged("a run of pages has another length"))?;
            if region == END {
                return Ok(());
            }
            match region {
                RAM => memory.ram.write(Gpa(at), run).map_err(|_| damaged("a page is outside the guest's RAM"))?,
                VIDEO => match usize::try_from(at).ok().filter(|at| at.saturating_add(bytes) <= memory.video.bytes()) {
                    Some(at) => memory.video.write(at, run),
                    None => return Err(damaged("a page is outside the video RAM")),
                },
                _ => return Err(damaged("it has memory of an unknown kind")),
            }
        }
    }

    /// The machine is about to go on: nobody can from this file again, also after a loss of power. From here on the disks belong to
    /// the running guest.
    pub fn spend(self) -> io::Result<()> {
        let file = self.from.into_inner();
        file.write_all_at(SPENT_MAGIC, 0)?;
        file.sync_data()
    }
}

fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The length is bounded by the caller; memory is taken as bytes come.
fn read_checked(from: &mut impl Read, bytes: u64, crc: u32, what: &str) -> io::Result<Vec<u8>> {
    let mut found = Vec::new();
    if from.take(bytes).read_to_end(&mut found)? as u64 != bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if crc32(&[&found]) == crc { Ok(found) } else { Err(damaged(&format!("{what} has changed"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::sample as spec;

    const BYTES: u64 = 8 << 20;

    fn memory() -> (GuestRam, HostRegion) {
        (GuestRam::new(BYTES).unwrap(), HostRegion::new(16 << 10).unwrap())
    }

    fn states() -> States {
        let state = |kind: &str, bytes: &[u8]| State { kind: kind.into(), version: 3, bytes: bytes.into() };
        vec![("uart".into(), state("uart", b"{}")), ("scrollback".into(), state("scrollback", b"\0any bytes"))]
    }

    /// A file of a guest with three pages that are not zero, two of them side by side, and one of video RAM.
    fn written() -> (File, Written) {
        let (ram, video) = memory();
        for (at, byte) in [(0x1000, 1), (0x2fff, 2), (BYTES - 1, 3)] {
            ram.write(Gpa(at), &[byte]).unwrap();
        }
        video.set(4096, 4);
        let file = tempfile::tempfile().unwrap();
        let mut looked = 0;
        let progress = &mut |bytes| {
            assert!(bytes > looked);
            looked = bytes;
            ControlFlow::Continue(())
        };
        let written = write(&file, &spec(), &states(), &Memory { ram: &ram, video: &video }, progress).unwrap();
        assert_eq!(looked, BYTES - (128 << 10), "all but the VGA window");
        (file, written)
    }

    fn read(file: &File) -> io::Result<(GuestRam, HostRegion, Reader)> {
        let (ram, video) = memory();
        let mut reader = Reader::open(file.try_clone()?)?;
        reader.read_memory(&Memory { ram: &ram, video: &video })?;
        Ok((ram, video, reader))
    }

    #[test]
    fn what_was_written_is_read_and_pages_of_zeros_cost_nothing() {
        let (file, written) = written();
        assert_eq!(written.memory_bytes, 3 * 4096);
        assert_eq!(written.file_bytes, file.metadata().unwrap().len());
        assert!(written.file_bytes < 4096, "{written:?}");
        let (ram, video, mut reader) = read(&file).unwrap();
        let byte = |at| {
            let mut byte = [0];
            ram.read(Gpa(at), &mut byte).unwrap();
            byte[0]
        };
        assert_eq!([0x1000, 0x2fff, BYTES - 1, 0x3000].map(byte), [1, 2, 3, 0]);
        assert_eq!((video.get(4096), video.get(0)), (4, 0));
        assert_eq!((reader.spec().machine.as_str(), reader.spec().memory_bytes), ("pc-1", spec().memory_bytes));
        assert_eq!(reader.take("scrollback").unwrap(), states()[1].1);
        assert_eq!(reader.left(), Some("uart"));
        reader.take("uart").unwrap();
        assert_eq!(reader.left(), None);
        assert!(reader.take("uart").unwrap_err().to_string().contains("it is missing"));
    }

    #[test]
    fn nobody_goes_on_twice() {
        let (file, _) = written();
        Reader::open(file.try_clone().unwrap()).unwrap().spend().unwrap();
        let error = Reader::open(file).err().unwrap().to_string();
        assert!(error.contains("gone on from this saved state already"), "{error}");
    }

    #[test]
    fn a_file_that_is_cut_or_changed_anywhere_is_refused_and_never_panics() {
        let (file, _) = written();
        let whole = {
            let mut bytes = Vec::new();
            (&file).rewind().unwrap();
            (&file).read_to_end(&mut bytes).unwrap();
            bytes
        };
        let refused = |bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            read(&file).is_err()
        };
        assert!(!refused(&whole));
        for cut in (0..whole.len()).step_by(97) {
            assert!(refused(&whole[..cut]), "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut spoilt = whole.clone();
            spoilt[at] ^= 0x20;
            assert!(refused(&spoilt), "a change at {at}");
        }
    }

    #[test]
    fn what_does_not_get_shorter_is_kept_as_it_is() {
        let noise: Vec<u8> =
            (0..3000u32).flat_map(|n| n.wrapping_mul(0x9e37_79b9).rotate_left(n % 31).to_le_bytes()).collect();
        let mut room = Vec::new();
        for (bytes, shorter) in [(&noise[..], false), (&[7; 5000], true), (&[], false), (&[1], false)] {
            let stored = pack(bytes, &mut room).to_vec();
            assert_eq!(stored.len() < bytes.len(), shorter);
            assert_eq!(unpack(&stored, &mut vec![0; bytes.len()]).unwrap(), bytes);
        }
        // What says another length than it has.
        let stored = pack(&[7; 5000], &mut room).to_vec();
        assert_eq!(unpack(&stored, &mut [0; 4999]), None);
        assert_eq!(unpack(&stored, &mut [0; 5001]), None);
        assert_eq!(unpack(&stored[..stored.len() - 1], &mut [0; 5000]), None);
    }

    #[test]
    fn giving_up_ends_the_writing() {
        let (ram, video) = memory();
        let file = tempfile::tempfile().unwrap();
        let mut calls = 0;
        let error = write(&file, &spec(), &states(), &Memory { ram: &ram, video: &video }, &mut |_| {
            calls += 1;
            if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((error.unwrap_err().kind(), calls), (io::ErrorKind::Interrupted, 3));
    }
}
