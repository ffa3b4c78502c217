//! A file that is being received: `images/ID.part`, hashed on the way, sparse where it is zero, `images/ID.raw` once it is whole.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::detect::HEAD_BYTES;
use crate::{
    error::{Error, ErrorKind, Result},
    types::{Id, show_size},
};

/// Zeros are left out in pieces of the size of a file system block.
const BLOCK_BYTES: usize = 4096;
/// This much stays free for the database and the guests' logs.
const RESERVE_BYTES: u64 = 64 << 20;

/// Removes its file unless [`Part::keep`] is called.
pub struct Part {
    file: File,
    path: PathBuf,
    at: u64,
    head: Vec<u8>,
    hash: Sha256,
    kept: bool,
}

impl Part {
    /// Begins `folder/ID.part`.
    pub fn create(folder: &Path, id: &Id) -> Result<Part> {
        let path = folder.join(format!("{id}.part"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|error| cannot_write(folder, error))?;
        Ok(Part { file, path, at: 0, head: Vec::new(), hash: Sha256::new(), kept: false })
    }

    /// Adds bytes at the end.
    ///
    /// Errors: `NoCapacity` when the disk is full.
    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        if let Some(missing) = HEAD_BYTES.checked_sub(self.head.len()) {
            self.head.extend(bytes.iter().take(missing));
        }
        write_sparse(&self.file, self.at, bytes).map_err(|error| cannot_write(&self.path, error))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    pub fn size_bytes(&self) -> u64 {
        self.at
    }

    /// The first bytes, at most `HEAD_BYTES`.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Everything that was pushed, in lower-case hexadecimal.
    pub fn sha256(&self) -> String {
        crate::auth::hex(&self.hash.clone().finalize())
    }

    /// The file, which is as long as what was pushed.
    pub fn whole(&self) -> Result<&File> {
        self.file.set_len(self.at).map_err(|error| cannot_write(&self.path, error))?;
        Ok(&self.file)
    }

    /// Makes it durable under its final name.
    pub fn keep(mut self, to: &Path) -> Result<()> {
        self.whole()?;
        let keep = || -> io::Result<()> {
            self.file.sync_all()?;
            fs::rename(&self.path, to)?;
            // The name is durable only with its folder.
            File::open(to.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        keep().map_err(|error| cannot_write(to, error))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove an unfinished file");
        }
    }
}

/// Writes what is not zero; the file must be new, so that what is left out reads as zero. The caller sets its length.
pub fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = at;
    let mut rest = bytes;
    while !rest.is_empty() {
        let to_boundary = BLOCK_BYTES - usize::try_from(at % BLOCK_BYTES as u64).unwrap_or(0);
        let (first, _) = rest.split_at(to_boundary.min(rest.len()));
        let zero = is_zero(first);
        let mut length = first.len();
        for block in rest.get(length..).unwrap_or_default().chunks(BLOCK_BYTES) {
            if is_zero(block) != zero {
                break;
            }
            length += block.len();
        }
        let (run, after) = rest.split_at(length);
        if !zero {
            file.write_all_at(run, at)?;
        }
        at += run.len() as u64;
        rest = after;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Refuses what cannot fit into the folder.
pub fn check_room(folder: &Path, bytes: u64) -> Result<()> {
    let free = free_bytes(folder)?;
    if bytes.saturating_add(RESERVE_BYTES) > free {
        return Err(Error::new(
            ErrorKind::NoCapacity,
            format!("This needs {}; {} has {} free.", show_size(bytes), folder.display(), show_size(free)),
        ));
    }
    Ok(())
}

/// What an unprivileged writer may still use.
pub fn free_bytes(folder: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(folder);
    let found = found.map_err(|error| Error::internal(format!("Cannot look at {}.", folder.display()), error))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

pub fn cannot_write(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::new(ErrorKind::NoCapacity, "The disk that holds the images is full.").because(error)
        }
        _ => Error::internal(format!("Cannot write {}.", path.display()), error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_pushed_is_kept_hashed_and_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let id = Id::random();
        let mut bytes = vec![0u8; 3 << 20];
        bytes[100] = 1;
        bytes[2 << 20] = 2;
        let mut part = Part::create(dir.path(), &id).unwrap();
        // Pieces as a network brings them, across all boundaries.
        bytes.chunks(12_345).for_each(|piece| part.push(piece).unwrap());
        assert_eq!(part.sha256(), crate::auth::hex(&Sha256::digest(&bytes)));
        assert_eq!(part.head(), &bytes[..HEAD_BYTES]);
        let to = dir.path().join("whole");
        part.keep(&to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), bytes);
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 200 << 10, "zeros take no room");
        assert!(!dir.path().join(format!("{id}.part")).exists());
    }

    #[test]
    fn an_unfinished_part_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut part = Part::create(dir.path(), &Id::random()).unwrap();
        part.push(b"half").unwrap();
        drop(part);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_fit_is_refused_first() {
        let dir = tempfile::tempdir().unwrap();
        check_room(dir.path(), 1).unwrap();
        assert_eq!(check_room(dir.path(), 1 << 60).unwrap_err().kind(), ErrorKind::NoCapacity);
    }
}
