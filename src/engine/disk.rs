//! Block backends: what a disk or a CD medium is to a device.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

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
    /// Every write that returned before this call is durable when it returns.
    fn flush(&self) -> Result<(), BlockError>;
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

    fn check(&self, at: u64, bytes: u64) -> Result<(), BlockError> {
        let size_bytes = self.shape.size_bytes;
        let end = at.saturating_add(bytes);
        if end > size_bytes { Err(BlockError::OutOfRange { end, size_bytes }) } else { Ok(()) }
    }
}

fn total(spans: &[RamSpan]) -> u64 {
    spans.iter().map(|span| u64::from(span.bytes)).sum()
}

fn classify(error: io::Error) -> BlockError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => BlockError::NoSpace,
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
        if self.shape.read_only {
            return Err(BlockError::ReadOnly);
        }
        let bytes = total(from);
        self.check(at, bytes)?;
        // A file that was cut would grow back with a hole; the guest must not believe in what was there.
        if self.file.metadata().map_err(classify)?.len() < self.shape.size_bytes {
            return Err(BlockError::Shrunk);
        }
        let done = ram.write_file(&self.file, at, from).map_err(classify)?;
        if done < bytes { Err(BlockError::NoSpace) } else { Ok(()) }
    }
    fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BlockError> {
        self.check(at, into.len() as u64)?;
        self.file.read_exact_at(into, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => BlockError::Shrunk,
            _ => classify(error),
        })
    }
    fn flush(&self) -> Result<(), BlockError> {
        if self.shape.read_only { Ok(()) } else { self.file.sync_data().map_err(classify) }
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
    }
}
