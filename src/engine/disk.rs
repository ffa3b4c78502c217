//! Block backends: what a disk or a CD medium is to a device.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::memory::{GuestRam, RamSpan};

/// The smallest unit of a disk.
pub const SECTOR_BYTES: u64 = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskShape {
    pub size_bytes: u64,
    pub read_only: bool,
}

/// Why a request was not done.
#[derive(Debug)]
pub enum BlockError {
    /// The request ends past the disk. The guest's mistake: the device reports an error.
    OutOfRange { end: u64, size_bytes: u64 },
    /// A write to a disk that only reads. The guest's mistake.
    ReadOnly,
    /// A span is not RAM. The guest's mistake.
    BadSpan,
    /// No space is left on the host: the guest is paused, and the request is done again on resume.
    NoSpace,
    /// The image has become shorter than it was: as `NoSpace`.
    Shrunk,
    /// The host failed: as `NoSpace`.
    Io(io::Error),
}

impl BlockError {
    /// A sentence for the guest's page, when the cause is the host and the guest must wait; `None` when the guest is to blame.
    pub fn host_fault(&self) -> Option<String> {
        match self {
            BlockError::OutOfRange { .. } | BlockError::ReadOnly | BlockError::BadSpan => None,
            BlockError::NoSpace => Some("no space is left on the host for the disk".into()),
            BlockError::Shrunk => Some("the disk's image has become shorter".into()),
            BlockError::Io(error) => Some(format!("the host cannot read or write the disk: {error}")),
        }
    }
}

/// A disk's bytes. Called by worker threads, several at once; never panics for any offset.
pub trait BlockBackend: Send + Sync {
    fn shape(&self) -> DiskShape;
    /// Fills the spans, in order, from `at`.
    fn read(&self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<(), BlockError>;
    /// Writes the spans, in order, at `at`.
    fn write(&self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<(), BlockError>;
    /// Fills a buffer of ours, for emulated transfers (ATAPI).
    fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BlockError>;
    /// Writes a buffer of ours, for transfers that go through one (USB).
    fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), BlockError>;
    /// Every write that returned before this call is durable when it returns.
    fn flush(&self) -> Result<(), BlockError>;
    /// The guest does not need these bytes any more; what they read as afterwards is not said. The host's space is freed
    /// where the host can.
    fn discard(&self, at: u64, bytes: u64) -> Result<(), BlockError>;
    /// These bytes read as zero afterwards. The host's space is freed where the host can.
    fn write_zeroes(&self, at: u64, bytes: u64) -> Result<(), BlockError>;
    /// The raw file that this disk is, for a device that has the kernel move its bytes by itself; `None` for any other disk.
    fn raw(self: Arc<Self>) -> Option<Arc<RawFile>> {
        None
    }
}

/// A raw image file.
pub struct RawFile {
    file: File,
    shape: DiskShape,
}

impl RawFile {
    /// Takes the size of now; a file that ends in half a sector has that half hidden.
    pub fn new(file: File, read_only: bool) -> io::Result<Arc<RawFile>> {
        let size_bytes = file.metadata()?.len() / SECTOR_BYTES * SECTOR_BYTES;
        Ok(Arc::new(RawFile { file, shape: DiskShape { size_bytes, read_only } }))
    }

    /// A size other than the file's own: sockets have none.
    #[cfg(test)]
    pub(crate) fn with_size(file: File, size_bytes: u64) -> Arc<RawFile> {
        Arc::new(RawFile { file, shape: DiskShape { size_bytes, read_only: false } })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the disk has these bytes.
    pub fn check(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        let size_bytes = self.shape.size_bytes;
        let end = at.saturating_add(bytes);
        if end > size_bytes { Err(BlockError::OutOfRange { end, size_bytes }) } else { Ok(()) }
    }

    /// Whether these bytes may be written.
    pub fn check_writable(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        if self.shape.read_only { Err(BlockError::ReadOnly) } else { self.check(at, bytes) }
    }

    /// Asked before writing: a file that was cut would grow back with a hole, and the guest must not believe in what was there.
    pub fn check_not_cut(&self) -> Result<(), BlockError> {
        let metadata = self.file.metadata().map_err(classify)?;
        if metadata.is_file() && metadata.len() < self.shape.size_bytes { Err(BlockError::Shrunk) } else { Ok(()) }
    }

    fn check_write(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_writable(at, bytes)?;
        self.check_not_cut()
    }

    /// Makes a hole, which reads as zero; false where the host cannot.
    fn punch(&self, at: u64, bytes: u64) -> Result<bool, BlockError> {
        if bytes == 0 {
            return Ok(true);
        }
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, bytes) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(error) => Err(classify(error.into())),
        }
    }
}

/// One write of zeros where holes cannot be made.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Writes `bytes` zeros from `at` on, piece by piece.
fn write_zeros(file: &File, mut at: u64, bytes: u64) -> io::Result<()> {
    let end = at + bytes;
    while at < end {
        let piece = ZEROS.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        file.write_all_at(ZEROS.get(..piece).unwrap_or_default(), at)?;
        at += piece as u64;
    }
    Ok(())
}

fn total(spans: &[RamSpan]) -> u64 {
    spans.iter().map(|span| u64::from(span.bytes)).sum()
}

/// What an error of reading or writing an image means. One that ended early was cut; one that takes no more is full.
pub fn classify(error: io::Error) -> BlockError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => BlockError::Shrunk,
        io::ErrorKind::StorageFull
        | io::ErrorKind::QuotaExceeded
        | io::ErrorKind::FileTooLarge
        | io::ErrorKind::WriteZero => BlockError::NoSpace,
        io::ErrorKind::InvalidInput => BlockError::BadSpan,
        _ => BlockError::Io(error),
    }
}

impl BlockBackend for RawFile {
    fn shape(&self) -> DiskShape {
        self.shape
    }
    fn read(&self, ram: &GuestRam, at: u64, into: &[RamSpan]) -> Result<(), BlockError> {
        let bytes = total(into);
        self.check(at, bytes)?;
        let done = ram.read_file(&self.file, at, into).map_err(classify)?;
        if done < bytes { Err(BlockError::Shrunk) } else { Ok(()) }
    }
    fn write(&self, ram: &GuestRam, at: u64, from: &[RamSpan]) -> Result<(), BlockError> {
        let bytes = total(from);
        self.check_write(at, bytes)?;
        let done = ram.write_file(&self.file, at, from).map_err(classify)?;
        if done < bytes { Err(BlockError::NoSpace) } else { Ok(()) }
    }
    fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BlockError> {
        self.check(at, into.len() as u64)?;
        self.file.read_exact_at(into, at).map_err(classify)
    }
    fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        self.check_write(at, from.len() as u64)?;
        self.file.write_all_at(from, at).map_err(|error| match error.kind() {
            io::ErrorKind::WriteZero => BlockError::NoSpace,
            _ => classify(error),
        })
    }
    fn flush(&self) -> Result<(), BlockError> {
        if self.shape.read_only { Ok(()) } else { self.file.sync_data().map_err(classify) }
    }
    fn discard(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_write(at, bytes)?;
        self.punch(at, bytes).map(|_| ())
    }
    fn write_zeroes(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_write(at, bytes)?;
        if self.punch(at, bytes)? { Ok(()) } else { write_zeros(&self.file, at, bytes).map_err(classify) }
    }
    fn raw(self: Arc<Self>) -> Option<Arc<RawFile>> {
        Some(self)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;
    use crate::engine::memory::Gpa;

    /// What every backend must do; `make` gives one of the wanted size, full of zeros and writable.
    pub(crate) fn check_backend(make: impl Fn(u64) -> Arc<dyn BlockBackend>) {
        const SIZE: u64 = 64 << 10;
        let ram = GuestRam::new(2 << 20).unwrap();
        let span = |bytes| [RamSpan { at: Gpa(0x1000), bytes }];
        let disk = make(SIZE);
        assert_eq!(disk.shape(), DiskShape { size_bytes: SIZE, read_only: false });
        for (at, bytes, good) in [
            (0, 512, true),
            (SIZE - 512, 512, true),
            (SIZE - 511, 512, false),
            (SIZE, 0, true),
            (SIZE, 512, false),
            (u64::MAX, 1, false),
            (u64::MAX - 511, 512, false),
            (0, 0, true),
        ] {
            assert_eq!(disk.write(&ram, at, &span(bytes)).is_ok(), good, "write {bytes} at {at}");
            assert_eq!(disk.read(&ram, at, &span(bytes)).is_ok(), good, "read {bytes} at {at}");
        }
        ram.write(Gpa(0x1000), b"kept").unwrap();
        disk.write(&ram, 512, &span(4)).unwrap();
        disk.flush().unwrap();
        let mut seen = [0; 4];
        disk.read_bytes(512, &mut seen).unwrap();
        assert_eq!(&seen, b"kept");
        disk.write_bytes(SIZE - 4, b"last").unwrap();
        disk.read_bytes(SIZE - 4, &mut seen).unwrap();
        assert_eq!(&seen, b"last");
        assert!(disk.write_bytes(SIZE - 3, b"last").is_err());
        assert!(disk.write_bytes(u64::MAX, b"last").is_err());
        ram.write(Gpa(0x1000), &[7; 4096]).unwrap();
        for (at, bytes, good) in [(SIZE, 512, false), (u64::MAX, 1, false), (0, u64::MAX, false), (SIZE, 0, true)] {
            assert_eq!(disk.discard(at, bytes).is_ok(), good, "discard {bytes} at {at}");
            assert_eq!(disk.write_zeroes(at, bytes).is_ok(), good, "zero {bytes} at {at}");
        }
        for (at, bytes) in [(8192, 4096), (12288 + 512, 512)] {
            disk.write(&ram, 8192, &span(4096)).unwrap();
            disk.write(&ram, 12288, &span(4096)).unwrap();
            disk.write_zeroes(at, bytes).unwrap();
            let mut seen = [0; 8192];
            disk.read_bytes(8192, &mut seen).unwrap();
            for (index, byte) in (8192..).zip(seen) {
                assert_eq!(byte, if (at..at + bytes).contains(&index) { 0 } else { 7 }, "{index}");
            }
        }
        disk.discard(0, SIZE).unwrap();
        let outside = [RamSpan { at: Gpa(0xa_0000), bytes: 512 }];
        assert!(matches!(disk.read(&ram, 0, &outside), Err(BlockError::BadSpan)));
    }

    fn raw(bytes: u64) -> (Arc<RawFile>, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        let other = file.try_clone().unwrap();
        (RawFile::new(file, false).unwrap(), other)
    }

    #[test]
    fn raw_files_keep_the_contract() {
        check_backend(|bytes| raw(bytes).0);
    }

    #[test]
    fn zeros_are_written_where_no_hole_can_be_made() {
        let (disk, file) = raw(256 << 10);
        file.write_all_at(&[7; 256 << 10], 0).unwrap();
        write_zeros(&file, 1000, 150_000).unwrap();
        let mut seen = vec![0; 256 << 10];
        disk.read_bytes(0, &mut seen).unwrap();
        assert!(seen.iter().enumerate().all(|(at, byte)| (*byte == 0) == (1000..151_000).contains(&at)));
    }

    #[test]
    fn a_discard_frees_the_hosts_space() {
        use std::os::unix::fs::MetadataExt;
        let (disk, file) = raw(1 << 20);
        file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        disk.discard(0, 1 << 20).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 1 << 20);
        assert!(metadata.blocks() < before || before == 0, "{} and before {before}", metadata.blocks());
    }

    #[test]
    fn a_shrunken_image_is_the_hosts_fault_and_heals() {
        let (disk, mut file) = raw(8192);
        let ram = GuestRam::new(2 << 20).unwrap();
        let span = [RamSpan { at: Gpa(0), bytes: 512 }];
        file.set_len(1024).unwrap();
        assert!(matches!(disk.read(&ram, 4096, &span), Err(BlockError::Shrunk)));
        assert!(matches!(disk.write(&ram, 4096, &span), Err(BlockError::Shrunk)));
        assert!(matches!(disk.read_bytes(4096, &mut [0; 512]), Err(BlockError::Shrunk)));
        assert!(BlockError::Shrunk.host_fault().is_some());
        file.set_len(8192).unwrap();
        file.write_all(b"back").unwrap();
        assert!(disk.read(&ram, 4096, &span).is_ok());
    }

    #[test]
    fn a_read_only_disk_refuses_writes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = RawFile::new(file, true).unwrap();
        let ram = GuestRam::new(2 << 20).unwrap();
        let span = [RamSpan { at: Gpa(0), bytes: 512 }];
        assert!(matches!(disk.write(&ram, 0, &span), Err(BlockError::ReadOnly)));
        assert!(matches!(disk.write_bytes(0, &[0; 512]), Err(BlockError::ReadOnly)));
        assert!(matches!(disk.discard(0, 512), Err(BlockError::ReadOnly)));
        assert!(matches!(disk.write_zeroes(0, 512), Err(BlockError::ReadOnly)));
    }
}
