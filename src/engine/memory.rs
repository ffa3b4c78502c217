//! Guest memory: RAM that devices copy from and to, and host regions (video RAM, firmware) that KVM maps beside it.
//!
//! No Rust reference ever points into guest memory: the guest changes it at any time. Copy in, check the copy, act on the copy.
//! Only this file names vm-memory's mmap types.

#![expect(unsafe_code, reason = "vectored calls straight into guest RAM; madvise on our own mappings")]

use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, atomic::Ordering},
};

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileMemory,
};

use super::layout;

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa {:#x}", self.0)
    }
}

/// The guest named memory it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutsideRam {
    pub at: Gpa,
    pub bytes: usize,
}

impl fmt::Display for OutsideRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:?} are outside the guest's RAM", self.bytes, self.at)
    }
}
impl std::error::Error for OutsideRam {}

/// One contiguous stretch of guest RAM, as KVM wants to hear of it.
#[derive(Debug, Clone, Copy)]
pub struct RamRange {
    pub start: Gpa,
    pub bytes: u64,
    pub host_address: u64,
}

/// The guest's RAM. Cloning gives another handle on the same memory.
#[derive(Clone)]
pub struct GuestRam {
    mapped: Arc<Mapped>,
}

/// The regions are inside the blocks and end first.
struct Mapped {
    map: GuestMemoryMmap,
    _blocks: Vec<MmapRegion>,
}

/// What a processor maps with one entry of a page directory. KVM does so only where guest and host addresses agree below this.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A piece of guest RAM that a device reads from or writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSpan {
    pub at: Gpa,
    pub bytes: u32,
}

impl GuestRam {
    /// Anonymous, zeroed RAM in the shape of `layout`: without the VGA window, split at 3 GiB.
    pub fn new(memory_bytes: u64) -> io::Result<GuestRam> {
        GuestRam::with_pages(memory_bytes, false)
    }

    /// As `new`; when `huge`, out of the huge pages of 2 MiB that the host has set aside.
    ///
    /// Errors: what is missing and the remedy, when there are not so many.
    pub fn with_pages(memory_bytes: u64, huge: bool) -> io::Result<GuestRam> {
        let (low, high) = layout::split_ram(memory_bytes);
        let window = layout::VGA_WINDOW;
        let (mut blocks, mut regions) = (Vec::new(), Vec::new());
        let high = layout::HIGH_RAM_START..layout::HIGH_RAM_START + high;
        regions.extend(block(&[0..low.min(window.start), window.end..low], huge, &mut blocks)?);
        regions.extend(block(std::slice::from_ref(&high), huge, &mut blocks)?);
        let map = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
        let ram = GuestRam { mapped: Arc::new(Mapped { map, _blocks: blocks }) };
        for range in ram.ranges() {
            // SAFETY: the range is a mapping that `mapped` owns and that lives at least as long as this call; the advice changes
            // how the kernel backs it, not what it holds. A refusal only costs speed.
            unsafe {
                libc::madvise(range.host_address as *mut libc::c_void, range.bytes as usize, libc::MADV_HUGEPAGE);
                libc::madvise(range.host_address as *mut libc::c_void, range.bytes as usize, libc::MADV_DONTDUMP);
            }
        }
        Ok(ram)
    }

    /// The stretches of RAM, in ascending order.
    pub fn ranges(&self) -> Vec<RamRange> {
        self.mapped
            .map
            .iter()
            .map(|region| RamRange {
                start: Gpa(region.start_addr().0),
                bytes: region.len(),
                host_address: region.as_ptr() as u64,
            })
            .collect()
    }

    /// For `virtio-queue`, which walks rings through vm-memory.
    pub(crate) fn map(&self) -> &GuestMemoryMmap {
        &self.mapped.map
    }

    /// Copies out. The guest may change the source meanwhile, so callers check the copy, never re-read.
    pub fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), OutsideRam> {
        let bytes = into.len();
        self.mapped.map.read_slice(into, GuestAddress(at.0)).map_err(|_| OutsideRam { at, bytes })
    }

    /// Copies in. Nothing is promised about a partial write when the range leaves RAM.
    pub fn write(&self, at: Gpa, from: &[u8]) -> Result<(), OutsideRam> {
        self.mapped.map.write_slice(from, GuestAddress(at.0)).map_err(|_| OutsideRam { at, bytes: from.len() })
    }

    /// A little-endian number out of guest RAM.
    pub fn get_u16(&self, at: Gpa) -> Result<u16, OutsideRam> {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes).map(|()| u16::from_le_bytes(bytes))
    }
    pub fn get_u32(&self, at: Gpa) -> Result<u32, OutsideRam> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes).map(|()| u32::from_le_bytes(bytes))
    }
    pub fn get_u64(&self, at: Gpa) -> Result<u64, OutsideRam> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes).map(|()| u64::from_le_bytes(bytes))
    }

    /// A number of a ring that the driver changes meanwhile; what it wrote before it can be read afterwards. `at` is even.
    pub fn load_u16(&self, at: Gpa) -> Result<u16, OutsideRam> {
        let loaded = self.mapped.map.load::<u16>(GuestAddress(at.0), Ordering::Acquire);
        loaded.map(u16::from_le).map_err(|_| OutsideRam { at, bytes: 2 })
    }

    /// The driver that loads it finds what was written before. `at` is even.
    pub fn store_u16(&self, at: Gpa, value: u16) -> Result<(), OutsideRam> {
        let stored = self.mapped.map.store(value.to_le(), GuestAddress(at.0), Ordering::Release);
        stored.map_err(|_| OutsideRam { at, bytes: 2 })
    }

    /// Whether every byte of the span is RAM.
    pub fn contains(&self, span: RamSpan) -> bool {
        GuestMemoryBackend::check_range(&self.mapped.map, GuestAddress(span.at.0), span.bytes as usize)
    }

    /// Reads `file` at `at` straight into the spans, in order. Returns the bytes read: fewer only at the end of the file.
    ///
    /// Errors: a span outside RAM (`InvalidInput`), or what the kernel says.
    pub fn read_file(&self, file: &File, at: u64, spans: &[RamSpan]) -> io::Result<u64> {
        self.transfer(spans, at, |iovecs, at| {
            // SAFETY: every iovec lies inside a mapping that `self.mapped` keeps alive during the call (`iovecs` checked it);
            // the guest may change the bytes at any time, and nothing here reads them as Rust values.
            unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
        })
    }

    /// Writes the spans, in order, to `file` at `at`. Returns the bytes written: fewer only when the kernel stops early.
    pub fn write_file(&self, file: &File, at: u64, spans: &[RamSpan]) -> io::Result<u64> {
        self.transfer(spans, at, |iovecs, at| {
            // SAFETY: as in `read_file`.
            unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
        })
    }

    /// Reads once from a descriptor (a socket) into the spans.
    pub fn read_message(&self, fd: BorrowedFd<'_>, spans: &[RamSpan]) -> io::Result<usize> {
        let iovecs = self.iovecs(spans)?;
        // SAFETY: as in `read_file`.
        checked(unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) })
    }

    /// Gives the whole pages inside the span back to the host: the guest finds zeros there afterwards. Parts of pages at the ends
    /// of the span stay as they are.
    ///
    /// The kernel splits a huge page of which only a part is given back, and because this RAM wants huge pages it may fill the
    /// hole again some day. What is given back in whole huge pages, as guests report their free memory, stays with the host
    /// until the guest touches it.
    ///
    /// Errors: a span outside RAM (`InvalidInput`), or what the kernel says.
    pub fn discard(&self, span: RamSpan) -> io::Result<()> {
        let outside =
            || io::Error::new(io::ErrorKind::InvalidInput, OutsideRam { at: span.at, bytes: span.bytes as usize });
        if !self.contains(span) {
            return Err(outside());
        }
        // A constant of x86-64. Asking for it would read a file, which a process that gave up its privileges may not.
        let page = PAGE_BYTES;
        for slice in GuestMemoryBackend::get_slices(&self.mapped.map, GuestAddress(span.at.0), span.bytes as usize) {
            let slice = slice.map_err(|_| outside())?;
            let from = slice.ptr_guard_mut().as_ptr();
            let skipped = from.align_offset(page);
            let Some(rest) = slice.len().checked_sub(skipped) else { continue };
            let bytes = rest - rest % page;
            if bytes > 0 {
                // SAFETY: the pages lie inside the slice, so inside a private anonymous mapping that `self.mapped` keeps alive
                // during the call; no Rust reference points into it, and whoever copies from it meanwhile copies zeros.
                let done = unsafe { libc::madvise(from.wrapping_add(skipped).cast(), bytes, libc::MADV_DONTNEED) };
                checked(done as isize)?;
            }
        }
        Ok(())
    }

    /// Repeats a vectored call until everything moved, the file ended or an error came.
    fn transfer(&self, spans: &[RamSpan], at: u64, call: impl Fn(&[libc::iovec], i64) -> isize) -> io::Result<u64> {
        let mut iovecs = self.iovecs(spans)?;
        let mut rest = iovecs.as_mut_slice();
        let mut done = 0u64;
        while !rest.is_empty() {
            let offset = i64::try_from(at + done).map_err(|_| io::ErrorKind::InvalidInput)?;
            let batch = rest.len().min(IOVECS_MAX);
            let moved = match checked(call(&rest[..batch], offset)) {
                Ok(0) => break,
                Ok(moved) => moved,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            done += moved as u64;
            rest = advance(rest, moved);
        }
        Ok(done)
    }

    /// The host ranges of the spans; a span that crosses regions becomes several.
    fn iovecs(&self, spans: &[RamSpan]) -> io::Result<Vec<libc::iovec>> {
        let mut out = Vec::with_capacity(spans.len());
        for span in spans {
            self.host_pieces(*span, |at, bytes| out.push(libc::iovec { iov_base: at.cast(), iov_len: bytes }))
                .map_err(|outside| io::Error::new(io::ErrorKind::InvalidInput, outside))?;
        }
        Ok(out)
    }

    /// Where a span lies in this process, for calls that give the kernel addresses: one piece, or several where it crosses
    /// regions. They are good for as long as a handle on this memory lives.
    pub(crate) fn host_pieces(&self, span: RamSpan, mut piece: impl FnMut(*mut u8, usize)) -> Result<(), OutsideRam> {
        let outside = OutsideRam { at: span.at, bytes: span.bytes as usize };
        if !self.contains(span) {
            return Err(outside);
        }
        for slice in GuestMemoryBackend::get_slices(&self.mapped.map, GuestAddress(span.at.0), span.bytes as usize) {
            let slice = slice.map_err(|_| outside)?;
            piece(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        Ok(())
    }
}

/// Spans of guest RAM as vectored calls take them: checked when they come in, kept from call to call. For messages (of a tap)
/// whose beginning, the head, is not the guest's to change while it is looked at: it is in our memory, and stands for as many of the spans' first bytes.
pub struct RamVec {
    ram: GuestRam,
    /// Those before `first` are used up. There is at least one of them: a place for the head.
    iovecs: Vec<libc::iovec>,
    first: usize,
}

const NOWHERE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

impl RamVec {
    pub fn new(ram: &GuestRam) -> RamVec {
        RamVec { ram: ram.clone(), iovecs: vec![NOWHERE], first: 1 }
    }

    /// How many pieces are in it; a call takes `IOVECS_MAX` less one for the head.
    pub fn pieces(&self) -> usize {
        self.iovecs.len() - self.first
    }

    pub fn clear(&mut self) {
        self.iovecs.truncate(1);
        self.first = 1;
    }

    /// Adds a span at the end; usually as one piece. After an error the span is in it in part.
    pub fn push(&mut self, span: RamSpan) -> Result<(), OutsideRam> {
        let RamVec { ram, iovecs, .. } = self;
        ram.host_pieces(span, |at, bytes| iovecs.push(libc::iovec { iov_base: at.cast(), iov_len: bytes }))
    }

    /// Takes pieces off at the front.
    pub fn drop_first(&mut self, pieces: usize) {
        self.first = self.iovecs.len().min(self.first + pieces);
        if self.pieces() == 0 {
            self.clear();
        } else if self.first > IOVECS_MAX {
            self.iovecs.drain(1..self.first);
            self.first = 1;
        }
    }

    /// Reads one message: its beginning into `head`, the rest into the spans behind as many bytes.
    pub fn read_message(&mut self, fd: BorrowedFd<'_>, head: &mut [u8]) -> io::Result<usize> {
        let head = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
        self.with_head(head, |iovecs| {
            // SAFETY: the first iovec is `head`, which is borrowed for this call. The others lie inside mappings that `self.ram`
            // keeps alive (`host_pieces` checked them); the guest may change the bytes at any time, and nothing here reads them
            // as Rust values.
            unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) }
        })
    }

    /// Writes one message: `head`, and behind it the spans without as many bytes at their beginning.
    pub fn write_message(&mut self, fd: BorrowedFd<'_>, head: &[u8]) -> io::Result<usize> {
        let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        self.with_head(head, |iovecs| {
            // SAFETY: as in `read_message`; writev only reads.
            unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) }
        })
    }

    /// Calls with the pieces, of which `head` replaces the first bytes. Everything is as before afterwards.
    fn with_head(&mut self, head: libc::iovec, call: impl FnOnce(&[libc::iovec]) -> isize) -> io::Result<usize> {
        let (mut at, mut skip) = (self.first, head.iov_len);
        while let Some(piece) = self.iovecs.get(at).filter(|piece| piece.iov_len <= skip) {
            skip -= piece.iov_len;
            at += 1;
        }
        let cut = self.iovecs.get(at).copied();
        if skip > 0 && cut.is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // At least one piece is used up or skipped: `at` is not 0.
        let replaced = std::mem::replace(&mut self.iovecs[at - 1], head);
        if let Some(piece) = self.iovecs.get_mut(at) {
            piece.iov_base = piece.iov_base.wrapping_byte_add(skip);
            piece.iov_len -= skip;
        }
        let done = checked(call(&self.iovecs[at - 1..]));
        self.iovecs[at - 1] = replaced;
        if let (Some(piece), Some(cut)) = (self.iovecs.get_mut(at), cut) {
            *piece = cut;
        }
        done
    }
}

const PAGE_BYTES: usize = 4096;
/// How many iovecs one call takes (`IOV_MAX`).
const IOVECS_MAX: usize = 1024;

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Drops the first `moved` bytes of the iovecs.
fn advance(mut iovecs: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    while let Some(first) = iovecs.first_mut() {
        if moved < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(moved);
            first.iov_len -= moved;
            return iovecs;
        }
        moved -= first.iov_len;
        iovecs = &mut iovecs[1..];
    }
    iovecs
}

/// Maps one block and makes regions of it for the guest addresses in `parts`, which ascend from a huge page's border. The block's own border
/// is one too: at any other place KVM would map the guest's memory in small pages, and each would cost an exit.
fn block(parts: &[Range<u64>], huge: bool, blocks: &mut Vec<MmapRegion>) -> io::Result<Vec<GuestRegionMmap>> {
    let parts: Vec<_> = parts.iter().filter(|part| !part.is_empty()).collect();
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(Vec::new()) };
    let bytes = to_usize(last.end - first.start)?;
    let whole = if huge {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let whole = bytes.next_multiple_of(HUGE_PAGE_BYTES);
        // Without MAP_NORESERVE: they are ours from here on, or the call fails.
        MmapRegion::build(None, whole, access, flags | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB).map_err(|_| {
            let pages = whole / HUGE_PAGE_BYTES;
            io::Error::other(format!(
                "the host has not set aside {pages} huge pages of 2 MiB; raise vm.nr_hugepages, or do without them"
            ))
        })?
    } else {
        MmapRegion::new(bytes + HUGE_PAGE_BYTES).map_err(io::Error::other)?
    };
    let to_border = whole.as_ptr().align_offset(HUGE_PAGE_BYTES);
    let mut regions = Vec::new();
    for part in &parts {
        let at = whole.as_ptr().wrapping_add(to_border + to_usize(part.start - first.start)?);
        let bytes = to_usize(part.end - part.start)?;
        // SAFETY: `at` and `bytes` lie in `whole`, which is a huge page longer than all parts and is kept for as long as the regions.
        let region =
            unsafe { MmapRegion::build_raw(at, bytes, whole.prot(), whole.flags()) }.map_err(io::Error::other)?;
        regions.push(GuestRegionMmap::new(region, GuestAddress(part.start)).ok_or(io::ErrorKind::OutOfMemory)?);
    }
    blocks.push(whole);
    Ok(regions)
}

fn to_usize(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

/// Memory outside the guest's RAM that KVM maps for the guest: video RAM, the firmware.
#[derive(Clone)]
pub struct HostRegion {
    map: Arc<MmapRegion>,
}

impl HostRegion {
    /// Zeroed, anonymous; `bytes` is a multiple of 4096.
    pub fn new(bytes: usize) -> io::Result<HostRegion> {
        assert!(bytes > 0 && bytes.is_multiple_of(4096), "regions are whole pages");
        let map = MmapRegion::new(bytes).map_err(io::Error::other)?;
        // SAFETY: the range is the mapping just made; the advice only keeps it out of core files, as the guest's RAM is. It also
        // keeps the kernel from joining it with a mapping beside it, so that it can be told apart in smaps.
        unsafe { libc::madvise(map.as_ptr().cast(), map.size(), libc::MADV_DONTDUMP) };
        Ok(HostRegion { map: Arc::new(map) })
    }
    /// Pages that somebody else fills and reads too: `bytes` of `file` from `offset`, both multiples of 4096.
    pub fn shared(file: File, offset: u64, bytes: usize) -> io::Result<HostRegion> {
        let file = FileOffset::new(file, offset);
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let map = MmapRegion::build(Some(file), bytes, access, flags).map_err(io::Error::other)?;
        Ok(HostRegion { map: Arc::new(map) })
    }
    pub fn bytes(&self) -> usize {
        self.map.size()
    }
    pub fn host_address(&self) -> u64 {
        self.map.as_ptr() as u64
    }
    /// Copies out what is there; bytes past the end read as zero.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        let there = self.bytes().saturating_sub(at).min(into.len());
        let (have, rest) = into.split_at_mut(there);
        rest.fill(0);
        if there > 0
            && let Ok(slice) = self.map.as_volatile_slice().subslice(at, there)
        {
            slice.copy_to(have);
        }
    }
    /// Copies in; bytes past the end are dropped.
    pub fn write(&self, at: usize, from: &[u8]) {
        let fits = self.bytes().saturating_sub(at).min(from.len());
        if fits > 0
            && let Ok(slice) = self.map.as_volatile_slice().subslice(at, fits)
        {
            slice.copy_from(from.get(..fits).unwrap_or_default());
        }
    }
    /// One byte; zero past the end.
    pub fn get(&self, at: usize) -> u8 {
        let mut byte = [0];
        self.read(at, &mut byte);
        byte[0]
    }
    pub fn set(&self, at: usize, byte: u8) {
        self.write(at, &[byte]);
    }
    /// A number that others change meanwhile, in the host's byte order; what they wrote before it can be read afterwards.
    /// `at` is a multiple of 4. Zero past the end.
    pub fn load_u32(&self, at: usize) -> u32 {
        self.map.as_volatile_slice().load(at, Ordering::Acquire).unwrap_or(0)
    }
    /// Others who load it find what was written before. Dropped past the end.
    pub fn store_u32(&self, at: usize, value: u32) {
        let _ = self.map.as_volatile_slice().store(value, at, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Seek, Write},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn ram_has_a_hole_for_the_vga_window() {
        let ram = GuestRam::new(16 << 20).unwrap();
        assert_eq!(ram.write(Gpa(0x9_fffc), &[1, 2, 3, 4]), Ok(()));
        assert!(ram.write(Gpa(0xa_0000), &[1]).is_err());
        assert!(ram.read(Gpa(0x9_fffe), &mut [0; 4]).is_err(), "crosses into the hole");
        assert_eq!(ram.get_u32(Gpa(0x9_fffc)), Ok(0x0403_0201));
        assert!(ram.get_u64(Gpa(u64::MAX - 3)).is_err());
        assert!(ram.get_u64(Gpa((16 << 20) - 4)).is_err());
    }

    #[test]
    fn guest_and_host_addresses_agree_within_a_huge_page() {
        for memory_bytes in [512 << 10, 16 << 20, layout::LOW_RAM_END_MAX + (32 << 20)] {
            let ram = GuestRam::new(memory_bytes).unwrap();
            for range in ram.ranges() {
                assert_eq!((range.host_address ^ range.start.0) % HUGE_PAGE_BYTES as u64, 0, "{range:x?}");
            }
            let window = if memory_bytes > 1 << 20 { layout::VGA_WINDOW.end - layout::VGA_WINDOW.start } else { 0 };
            assert_eq!(ram.ranges().iter().map(|range| range.bytes).sum::<u64>(), memory_bytes - window);
        }
        let ram = GuestRam::new(layout::LOW_RAM_END_MAX + (32 << 20)).unwrap();
        let last = Gpa(layout::HIGH_RAM_START + (32 << 20) - 4);
        assert_eq!(ram.write(last, &[1, 2, 3, 4]), Ok(()));
        assert!(ram.write(Gpa(last.0 + 1), &[1, 2, 3, 4]).is_err());
    }

    #[test]
    fn a_file_is_read_into_scattered_spans_and_written_back() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        file.rewind().unwrap();
        let spans = [RamSpan { at: Gpa(0x1000), bytes: 4 }, RamSpan { at: Gpa(0x10_0000), bytes: 8 }];
        assert_eq!(ram.read_file(&file, 1, &spans).unwrap(), 9, "the file ends first");
        let mut seen = [0; 4];
        ram.read(Gpa(0x10_0000), &mut seen).unwrap();
        assert_eq!(&seen, b"5678");
        assert_eq!(ram.write_file(&file, 20, &spans[..1]).unwrap(), 4);
        assert_eq!(file.metadata().unwrap().len(), 24);
        let outside = [RamSpan { at: Gpa(0xa_0000), bytes: 1 }];
        assert_eq!(ram.read_file(&file, 0, &outside).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn discarded_pages_are_zeros_and_parts_of_pages_stay() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let ones = vec![1; 6 << 20];
        ram.write(Gpa(0x20_0000), &ones).unwrap();
        let span = |at, bytes| RamSpan { at: Gpa(at), bytes };
        ram.discard(span(0x20_0ffe, 0x2004)).unwrap();
        let mut seen = vec![9; 0x4000];
        ram.read(Gpa(0x20_0000), &mut seen).unwrap();
        assert!(seen[..0x1000].iter().chain(&seen[0x3000..]).all(|byte| *byte == 1));
        assert!(seen[0x1000..0x3000].iter().all(|byte| *byte == 0));
        ram.discard(span(0x40_0000, 2 << 20)).unwrap();
        let mut seen = vec![9; 6 << 20];
        ram.read(Gpa(0x20_0000), &mut seen).unwrap();
        assert!(seen[2 << 20..4 << 20].iter().all(|byte| *byte == 0));
        assert!(seen[4 << 20..].iter().all(|byte| *byte == 1));
        for harmless in [span(0x60_0000, 0), span(0x60_0001, 0x1ffe), span(0x60_0fff, 1)] {
            ram.discard(harmless).unwrap();
            assert_eq!(ram.get_u16(Gpa(0x60_0fff)), Ok(0x0101), "{harmless:?}");
        }
        for outside in [
            span(0xa_0000, 4096),
            span(0x9_f000, 0x2000),
            span((16 << 20) - 4096, 8192),
            span(0xffff_f000, 4096),
            span(u64::MAX - 4095, 4096),
            span(0, u32::MAX),
        ] {
            assert_eq!(ram.discard(outside).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{outside:?}");
        }
        ram.write(Gpa(0x20_1000), &[7]).unwrap();
        assert_eq!(ram.get_u16(Gpa(0x20_1000)), Ok(7), "the page is there again");
    }

    #[test]
    fn a_message_has_its_head_in_our_memory_and_the_rest_in_ram() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let span = |at, bytes| RamSpan { at: Gpa(at), bytes };
        for first in [&[span(0x1000, 4), span(0x2000, 2)][..], &[span(0x1000, 3), span(0x2000, 3)], &[span(0x1000, 6)]]
        {
            let mut vec = RamVec::new(&ram);
            vec.push(span(0x5000, 8)).unwrap();
            vec.drop_first(1);
            first.iter().for_each(|span| vec.push(*span).unwrap());
            vec.push(span(0x3000, 100)).unwrap();
            assert_eq!(vec.pieces(), first.len() + 1);
            for _ in 0..2 {
                ram.write(Gpa(0x1000), &[0xaa; 8]).unwrap();
                far.send(b"headrest").unwrap();
                let mut head = [0; 4];
                assert_eq!(vec.read_message(near.as_fd(), &mut head).unwrap(), 8);
                assert_eq!(&head, b"head");
                let mut seen = [0; 4];
                ram.read(Gpa(0x1000), &mut seen).unwrap();
                assert_eq!(seen[..3], [0xaa; 3], "the head is not in RAM");
                ram.write(Gpa(0x1000), b"123456").unwrap();
                ram.write(Gpa(0x2000), if first.len() == 2 && first[0].bytes == 3 { b"456" } else { b"56." }).unwrap();
                assert_eq!(vec.write_message(near.as_fd(), b"HEAD").unwrap(), 106);
                let mut message = [0; 200];
                assert_eq!(far.recv(&mut message).unwrap(), 106);
                assert_eq!(&message[..6], b"HEAD56");
            }
        }
        let mut vec = RamVec::new(&ram);
        assert!(vec.push(span(0xa_0000, 1)).is_err());
        vec.push(span(0x1000, 3)).unwrap();
        assert_eq!(vec.write_message(near.as_fd(), b"HEAD").unwrap_err().kind(), io::ErrorKind::InvalidInput);
        for _ in 0..5000 {
            vec.push(span(0x1000, 3)).unwrap();
            vec.drop_first(1);
        }
        assert_eq!(vec.pieces(), 1);
        assert!(vec.iovecs.len() < 2 * IOVECS_MAX, "used ones go");
        vec.drop_first(7);
        assert_eq!(vec.pieces(), 0);
    }

    #[test]
    fn a_host_region_drops_what_does_not_fit() {
        let region = HostRegion::new(4096).unwrap();
        region.write(4094, &[1, 2, 3, 4]);
        let mut seen = [9; 4];
        region.read(4094, &mut seen);
        assert_eq!(seen, [1, 2, 0, 0]);
        region.write(1 << 40, &[1]);
        assert_eq!(region.get(5000), 0);
    }
}
