//! The files of disks: made empty or as a copy of an image, always complete under their own name or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};

use crate::{
    error::{Error, ErrorKind, Result},
    tasks::Progress,
    types::{Id, show_size},
};

/// Between two looks at whether the copy is cancelled.
const COPY_BYTES: u64 = 16 << 20;
const BUFFER_BYTES: usize = 1 << 20;

/// `disks/ID.raw` in the state directory.
pub(super) fn path(state_dir: &Path, id: &Id) -> PathBuf {
    folder(state_dir).join(format!("{id}.raw"))
}

fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("disks")
}

/// Makes an empty disk, which takes no space yet.
///
/// Errors: `NoCapacity`, `Internal`; nothing is left behind.
pub(super) fn create(state_dir: &Path, id: &Id, size_bytes: u64) -> Result<()> {
    fill(state_dir, id, |file| file.set_len(size_bytes).map_err(|error| failed(&error, "make a disk")))
}

/// Copies an image into a new disk of `size_bytes`; holes stay holes. `done` and `total` go on over several disks.
///
/// Errors: as `create`, and cancelled; nothing is left behind.
pub(super) fn copy(state_dir: &Path, id: &Id, image: &File, size_bytes: u64, meter: &mut Meter<'_>) -> Result<()> {
    fill(state_dir, id, |file| {
        let length = image.metadata().map_err(|error| failed(&error, "read the image"))?.len();
        if length > size_bytes {
            return Err(Error::conflict("The image became larger while it was copied."));
        }
        if ioctl_ficlone(file, image).is_err() {
            copy_data(image, file, length, meter)?;
        }
        meter.advance(0)?;
        file.set_len(size_bytes).map_err(|error| failed(&error, "make a disk"))
    })
}

/// Removes the files of disks that are forgotten. What cannot be removed is logged: it only takes space.
pub(super) fn remove(state_dir: &Path, ids: &[Id]) {
    for id in ids {
        let raw = path(state_dir, id);
        for file in [raw.with_extension("part"), raw] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!(file = %file.display(), %error, "cannot remove the file of a deleted disk");
                }
                _ => {}
            }
        }
    }
}

/// What a disk takes on the host; nothing when its file cannot be read.
pub(super) fn used_bytes(state_dir: &Path, id: &Id) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path(state_dir, id)).ok().map(|about| about.blocks() * 512)
}

/// How far a copy is, over all its disks.
pub(super) struct Meter<'a> {
    progress: &'a mut Progress,
    step: String,
    done: u64,
    total: u64,
}

impl Meter<'_> {
    pub(super) fn new(progress: &mut Progress, step: impl Into<String>, total: u64) -> Meter<'_> {
        Meter { progress, step: step.into(), done: 0, total }
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done = self.done.saturating_add(bytes).min(self.total);
        Ok(self.progress.report(&self.step, self.done, Some(self.total))?)
    }
}

/// Writes under another name, makes it durable, and gives it its own name last.
fn fill(state_dir: &Path, id: &Id, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let folder = folder(state_dir);
    let raw = path(state_dir, id);
    let part = raw.with_extension("part");
    let make = || -> Result<()> {
        let cannot = |error: &io::Error| failed(error, "make a disk");
        fs::create_dir_all(&folder).map_err(|error| cannot(&error))?;
        let file =
            OpenOptions::new().write(true).read(true).create_new(true).open(&part).map_err(|error| cannot(&error))?;
        write(&file)?;
        file.sync_all().map_err(|error| cannot(&error))?;
        fs::rename(&part, &raw).map_err(|error| cannot(&error))?;
        File::open(&folder).and_then(|folder| folder.sync_all()).map_err(|error| cannot(&error))
    };
    make().inspect_err(|_| remove(state_dir, std::slice::from_ref(id)))
}

fn copy_data(from: &File, to: &File, length: u64, meter: &mut Meter<'_>) -> Result<()> {
    let mut at = 0;
    while at < length {
        // A file system that knows no holes says that everything is data.
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => length,
            Err(_) => at,
        }
        .min(length);
        let end = match seek(from, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end.min(length),
            _ => length,
        };
        meter.advance(start - at)?;
        copy_range(from, to, start, end, meter)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64, meter: &mut Meter<'_>) -> Result<()> {
    let mut at = start;
    while at < end {
        let want = (end - at).min(COPY_BYTES);
        let got = copy_some(from, to, at, want)?;
        if got == 0 {
            return Err(Error::conflict("The image became shorter while it was copied."));
        }
        at += got;
        meter.advance(got)?;
    }
    Ok(())
}

/// By the kernel where it can, else by hand.
fn copy_some(from: &File, to: &File, at: u64, want: u64) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    let (mut read_at, mut write_at) = (at, at);
    let length = usize::try_from(want).unwrap_or(BUFFER_BYTES);
    match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), length) {
        Ok(got) => return Ok(got as u64),
        Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => {
            return Err(failed(&io::ErrorKind::StorageFull.into(), "make a disk"));
        }
        Err(_) => {} // other file systems, older kernels
    }
    let mut buffer = vec![0; length.min(BUFFER_BYTES)];
    let got = from.read_at(&mut buffer, at).map_err(|error| failed(&error, "read the image"))?;
    let data = buffer.get(..got).unwrap_or_default();
    to.write_all_at(data, at).map_err(|error| failed(&error, "make a disk"))?;
    Ok(got as u64)
}

fn failed(error: &io::Error, what: &str) -> Error {
    let (kind, why) = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            (ErrorKind::NoCapacity, "the disk that holds the state directory is full".to_owned())
        }
        io::ErrorKind::FileTooLarge => {
            (ErrorKind::NoCapacity, "the host's file system takes no file of that size".to_owned())
        }
        _ => (ErrorKind::Internal, error.to_string()),
    };
    Error::new(kind, format!("Cannot {what}: {why}."))
}

/// The memory the host has, and how much of it is free for use; nothing where the kernel does not say.
pub fn host_memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((of("MemTotal")?, of("MemAvailable")?))
}

/// What to think about before giving a guest so much memory; nothing when it fits.
pub(super) fn memory_warning(memory_bytes: u64) -> Option<String> {
    let (total, available) = host_memory()?;
    if memory_bytes > total {
        Some(format!(
            "This guest has {} of memory, more than the host's {}.",
            show_size(memory_bytes),
            show_size(total)
        ))
    } else if memory_bytes > available {
        Some(format!(
            "This guest has {} of memory; the host has {} free now.",
            show_size(memory_bytes),
            show_size(available)
        ))
    } else {
        None
    }
}
