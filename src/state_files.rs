//! Files of the state directory: private, whole or not there, and owned by whom the directory belongs to.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::Path,
};

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

/// Takes a file from everybody else, and gives it to the owner of its folder: root may have made it for the server's user.
pub fn make_private(path: &Path) -> io::Result<()> {
    let (file, folder) = (fs::metadata(path)?, fs::metadata(path.parent().unwrap_or(Path::new("/")))?);
    let mode = if file.is_dir() { 0o700 } else { 0o600 };
    if file.mode() & 0o777 != mode
        && (file.uid() == nix::unistd::geteuid().as_raw() || nix::unistd::geteuid().is_root())
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    if nix::unistd::geteuid().is_root() && (file.uid(), file.gid()) != (folder.uid(), folder.gid()) {
        chown(path, Some(folder.uid()), Some(folder.gid()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_belongs_to_the_owner_of_its_folder_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let root = nix::unistd::geteuid().is_root();
        if root {
            chown(dir.path(), Some(12_345), Some(12_345)).unwrap();
        }
        write_private(&path, b"old").unwrap();
        write_private(&path, b"new").unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(found.mode() & 0o777, 0o600);
        assert_eq!(found.uid(), if root { 12_345 } else { nix::unistd::geteuid().as_raw() });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
