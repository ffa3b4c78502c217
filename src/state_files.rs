//! The state directory: whose it is, and its files, private and whole or not there.
//!
//! ```text
//! started by root            root:SERVICE 1770  the web role adds files of its own, and cannot touch root's
//!   host/ run/ serve.lock    root               what hostd believes: networks, who an engine is, who serves
//!   everything else          SERVICE            database, keys, images, disks, guests' logs
//! started by anybody else    theirs 0750        everything is theirs
//! ```

use std::{
    fs::{self, Metadata, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::Path,
};

use nix::unistd::{Gid, Uid, User, geteuid, setgid, setgroups, setuid};

/// In a guest's folder: the variables of its UEFI firmware, without and with Secure Boot.
pub const VARIABLES: [&str; 2] = ["variables.fd", "variables-secure.fd"];
/// In a guest's folder: what its TPM keeps, a folder.
pub const TPM: &str = "tpm";
/// In a guest's folder: its saved state, and that while it is written.
pub const SUSPENDED: [&str; 2] = ["suspended", "suspended.part"];
/// What hostd alone writes, in the state directory.
pub const HOST_FOLDER: &str = "host";
/// The service user where no user `innkeeper` exists (no systemd-sysusers): outside every range that distributions give out.
const FALLBACK_ID: u32 = 60_999;
const ROOT: u32 = 0;

/// To whom a file belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub user: u32,
    pub group: u32,
}

impl Owner {
    /// The user who serves the pages when root starts Innkeeper: `innkeeper`, or a fixed id.
    pub fn service() -> Owner {
        let named = User::from_name("innkeeper").ok().flatten();
        named.map_or(Owner { user: FALLBACK_ID, group: FALLBACK_ID }, |user| Owner {
            user: user.uid.as_raw(),
            group: user.gid.as_raw(),
        })
    }

    /// Whose files go into a folder: its owner's, and the service user's where that is root.
    pub fn within(user: u32, group: u32) -> Owner {
        if user == ROOT { Owner::service() } else { Owner { user, group } }
    }

    fn within_folder(folder: &Metadata) -> Owner {
        Owner::within(folder.uid(), folder.gid())
    }
}

fn is_root() -> bool {
    geteuid().is_root()
}

/// Makes the state directory, or takes an existing one for the server: as root for the service user, otherwise for ourselves.
pub fn prepare_state(state: &Path) -> io::Result<()> {
    fs::create_dir_all(state)?;
    if !is_root() {
        return fs::set_permissions(state, fs::Permissions::from_mode(0o750));
    }
    chown(state, Some(ROOT), Some(Owner::service().group))?;
    fs::set_permissions(state, fs::Permissions::from_mode(0o1770))?;
    prepare_own(&state.join(HOST_FOLDER))
}

/// Makes a folder that is ours alone to write; everybody may look into it.
///
/// Errors: something else has that name, or, for root, another user owns it.
pub fn prepare_own(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() {
        return Err(io::Error::other("it is a link, or another user's; remove it"));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Whether this process may enter the state directory.
///
/// Errors: names the folder on the way that keeps it out, with the remedy.
pub fn check_entry(state: &Path) -> Result<(), String> {
    let closed = |folder: &&Path| {
        fs::metadata(folder.join(".")).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    let mut way: Vec<&Path> = state.ancestors().collect();
    way.reverse();
    match way.into_iter().find(closed) {
        None => Ok(()),
        Some(folder) => Err(format!(
            "The user who serves the pages (number {}) may not enter {}, where the state is. Keep the state elsewhere with --state DIR, \
             or let others pass: chmod o+x {}",
            geteuid(),
            folder.display(),
            folder.display()
        )),
    }
}

/// From here on this process is the one whose state that is. Root gives itself up, for good: the web role wrote what is there,
/// and could lead root by a link to files that are not its own.
pub fn become_owner(state: &Path) -> io::Result<()> {
    if !is_root() {
        return Ok(());
    }
    if fs::metadata(state)?.uid() == ROOT {
        prepare_state(state)?;
    }
    let owner = Owner::within_folder(&fs::metadata(state)?);
    setgroups(&[])?;
    setgid(Gid::from_raw(owner.group))?;
    setuid(Uid::from_raw(owner.user))?;
    Ok(())
}

/// Replaces a file as a whole; only the owner of its folder reads it.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    let _ = fs::remove_file(&part);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    make_private(&part)?;
    fs::rename(&part, path)
}

/// Takes a file or folder from everybody else.
pub fn make_private(path: &Path) -> io::Result<()> {
    let file = fs::metadata(path)?;
    let mode = if file.is_dir() { 0o700 } else { 0o600 };
    if file.mode() & 0o777 != mode && (file.uid() == geteuid().as_raw() || is_root()) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_private(&path, b"old").unwrap();
        write_private(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_state_is_made_for_whoever_serves() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        prepare_state(&state).unwrap();
        let found = fs::metadata(&state).unwrap();
        if is_root() {
            assert_eq!((found.uid(), found.gid()), (ROOT, Owner::service().group));
            assert_eq!(found.mode() & 0o7777, 0o1770, "the service user adds files, and cannot replace root's");
            assert_eq!(fs::metadata(state.join(HOST_FOLDER)).unwrap().uid(), ROOT);
            assert_eq!(Owner::within(found.uid(), found.gid()), Owner::service());
        } else {
            assert_eq!(found.uid(), geteuid().as_raw());
            assert_eq!(found.mode() & 0o7777, 0o750);
        }
        assert_eq!(Owner::within(1234, 5678), Owner { user: 1234, group: 5678 });
    }

    #[test]
    fn a_folder_of_ours_is_never_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (elsewhere, link) = (dir.path().join("elsewhere"), dir.path().join("host"));
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        assert!(prepare_own(&link).is_err());
        if is_root() {
            chown(&elsewhere, Some(12_345), Some(12_345)).unwrap();
            assert!(prepare_own(&elsewhere).is_err(), "another user's");
        }
    }
}
