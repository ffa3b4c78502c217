//! The file of a suspended guest, in the guest's own folder: written by its engine, kept and taken away here.
//!
//! ```text
//! suspended.part   while the engine writes it
//! suspended        whole: the guest is suspended, which its row says too, and the next start goes on from it
//! ```

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::{
    state_files::SUSPENDED,
    types::Id,
    wire::{SAVED_MAGIC, SPENT_MAGIC},
};

/// What is there to go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Whole,
    /// A guest went on from it, and then its host lost power.
    Spent,
    Gone,
}

/// Where a guest's folder is.
fn folder(state_dir: &Path, guest: &Id) -> PathBuf {
    state_dir.join("guests").join(guest.as_str())
}

/// The engine has ended in order: what it wrote is whole.
pub(super) fn keep(state_dir: &Path, guest: &Id) -> io::Result<()> {
    let folder = folder(state_dir, guest);
    let [whole, part] = SUSPENDED;
    fs::rename(folder.join(part), folder.join(whole))?;
    File::open(folder)?.sync_all()
}

/// Takes away what is there.
pub(super) fn remove(state_dir: &Path, guest: &Id) {
    for name in SUSPENDED {
        let path = folder(state_dir, guest).join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "cannot remove a saved state");
            }
            _ => {}
        }
    }
}

pub(super) fn find(state_dir: &Path, guest: &Id) -> Found {
    let [whole, _] = SUSPENDED;
    let mut magic = [0; SAVED_MAGIC.len()];
    let read = File::open(folder(state_dir, guest).join(whole)).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) if magic == *SPENT_MAGIC => Found::Spent,
        // What else is wrong with it, the engine says best.
        Ok(()) => Found::Whole,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Found::Whole,
        Err(_) => Found::Gone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_or_spent_or_gone() {
        let state = tempfile::tempdir().unwrap();
        let guest = Id::random();
        let own = folder(state.path(), &guest);
        fs::create_dir_all(&own).unwrap();
        assert_eq!(find(state.path(), &guest), Found::Gone);
        assert!(keep(state.path(), &guest).is_err(), "nothing was written");
        fs::write(own.join("suspended.part"), SAVED_MAGIC).unwrap();
        assert_eq!(find(state.path(), &guest), Found::Gone, "half is nothing");
        keep(state.path(), &guest).unwrap();
        assert_eq!(find(state.path(), &guest), Found::Whole);
        fs::write(own.join("suspended"), SPENT_MAGIC).unwrap();
        assert_eq!(find(state.path(), &guest), Found::Spent);
        remove(state.path(), &guest);
        remove(state.path(), &guest);
        assert_eq!(find(state.path(), &guest), Found::Gone);
    }
}
