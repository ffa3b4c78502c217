//! Files that an engine is handed: opened here, locked here, never by a path that the web role could bend.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::{
    event::{Timespec, poll},
    fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, openat2},
    io::Errno,
};

use crate::{
    error::{Error, ErrorKind, Result},
    host::firmware::Firmware,
    state_files::{Owner, SUSPENDED, TPM, VARIABLES},
    types::Id,
    wire::Place,
};

/// Folders whose files are nobody's images, whoever asks.
const NEVER: [&str; 5] = ["/etc", "/proc", "/sys", "/dev", "/run"];
/// How long the `swtpm` of an engine that has ended may take to end.
const TPM_END: Duration = Duration::from_secs(2);

/// The state directory, and how files in it are reached.
#[derive(Debug, Clone)]
pub struct StateFiles {
    path: PathBuf,
}

impl StateFiles {
    pub fn new(path: &Path) -> StateFiles {
        StateFiles { path: path.to_owned() }
    }

    /// Opens what a guest reads: a CD, a kernel, an initrd, an image to copy. Locked against writers.
    pub fn open_to_read(&self, place: &Place) -> Result<File> {
        let file = self.open(place, OFlags::RDONLY)?;
        lock(&file, libc::F_RDLCK).map_err(|error| busy(place, error))?;
        Ok(file)
    }

    /// Opens what a guest writes: only its own disks. Locked for itself alone, for as long as any descriptor of it is open.
    pub fn open_disk(&self, place: &Place, read_only: bool) -> Result<File> {
        if read_only {
            return self.open_to_read(place);
        }
        if matches!(place, Place::Host(_)) {
            return Err(Error::invalid("disk", "A file of the host is only read; copy it to a disk of the guest."));
        }
        let file = self.open(place, OFlags::RDWR)?;
        lock(&file, libc::F_WRLCK).map_err(|error| busy(place, error))?;
        Ok(file)
    }

    /// Opens, or makes, the log of a guest.
    pub fn open_log(&self, guest: &Id) -> Result<File> {
        self.open_of_guest(guest, "log", OFlags::APPEND)
    }

    /// Opens, or makes, the file that keeps the serial scrollback of a guest that is off, empty.
    pub fn open_scrollback(&self, guest: &Id) -> Result<File> {
        self.open_of_guest(guest, "scrollback", OFlags::TRUNC)
    }

    /// Opens, or makes, the file that a guest is suspended to, empty.
    pub fn open_suspend(&self, guest: &Id) -> Result<File> {
        let [_, part] = SUSPENDED;
        self.open_of_guest(guest, part, OFlags::TRUNC)
    }

    /// Opens the saved state that a guest goes on from.
    pub fn open_saved(&self, guest: &Id) -> Result<File> {
        let [whole, _] = SUSPENDED;
        let opened = self
            .folder_of_guest(guest)
            .and_then(|own| beneath(&own, Path::new(whole), OFlags::RDWR | OFlags::CLOEXEC))
            .and_then(regular);
        opened.map_err(|error| {
            let text =
                format!("Cannot open the saved state of the guest: {error}. Discard it to start the guest anew.");
            Error::new(ErrorKind::Unavailable, text).because(error)
        })
    }

    /// Takes away a saved state that is left over: with the disks of a guest that has started anew, its memory would destroy them.
    pub fn remove_saved(&self, guest: &Id) -> Result<()> {
        let own = match self.folder_of_guest(guest) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            own => own,
        };
        let removed = own.and_then(|own| {
            SUSPENDED.iter().try_for_each(|name| match rustix::fs::unlinkat(&own, *name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err(error.into()),
            })
        });
        removed.map_err(|error| {
            let text = format!("Cannot remove an old saved state of the guest: {error}.");
            Error::new(ErrorKind::Unavailable, text).because(error)
        })
    }

    /// Opens the variables of a guest's UEFI firmware. A new guest, and one whose file was taken away, begins with those of the
    /// package; guests with and without Secure Boot have a file each.
    pub fn open_variables(&self, guest: &Id, secure_boot: bool) -> Result<File> {
        let [plain, secure] = VARIABLES;
        let (name, template) =
            if secure_boot { (secure, Firmware::SecureVariables) } else { (plain, Firmware::Variables) };
        let cannot = |error: io::Error| {
            Error::new(ErrorKind::Unavailable, format!("Cannot open the firmware's variables of the guest: {error}."))
                .because(error)
        };
        let own = self.folder_of_guest(guest).map_err(cannot)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let error = match beneath(&own, Path::new(name), flags).and_then(regular) {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        if error.kind() != io::ErrorKind::NotFound {
            return Err(cannot(error));
        }
        // Whole under its name, or not there.
        let mut fresh = Vec::new();
        File::from(template.open()?).read_to_end(&mut fresh).map_err(cannot)?;
        let part = format!("{name}.part");
        let made = open_or_make(&own, &part, flags | OFlags::TRUNC).and_then(|file| {
            file.write_all_at(&fresh, 0)?;
            file.sync_all()?;
            rustix::fs::renameat(&own, part.as_str(), &own, name)?;
            Ok(file)
        });
        made.map_err(cannot)
    }

    /// Opens, or makes, the folder of what a guest's TPM keeps, for the user `run_as`; its group, the service user's, may empty it. Locked
    /// for as long as any descriptor of it is open: the last `swtpm` of the guest may be about to end.
    pub fn open_tpm(&self, guest: &Id, run_as: Option<u32>) -> Result<OwnedFd> {
        let opened = self.folder_of_guest(guest).and_then(|own| {
            let folder = folder_in(&own, TPM)?;
            if let Some(user) = run_as {
                give_folder(&folder, user)?;
            }
            Ok(folder)
        });
        let cannot = |error: io::Error| {
            Error::new(ErrorKind::Unavailable, format!("Cannot open the TPM of the guest: {error}.")).because(error)
        };
        let folder = opened.map_err(cannot)?;
        let deadline = Instant::now() + TPM_END;
        loop {
            match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(folder),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 5_000_000 }));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::conflict("The guest's TPM is still busy with its last command; try again."));
                }
                Err(error) => return Err(cannot(error.into())),
            }
        }
    }

    fn open_of_guest(&self, guest: &Id, name: &str, flags: OFlags) -> Result<File> {
        let opened = self
            .folder_of_guest(guest)
            .and_then(|own| open_or_make(&own, name, flags | OFlags::RDWR | OFlags::CLOEXEC));
        opened.map_err(|error| {
            Error::new(ErrorKind::Unavailable, format!("Cannot open the {name} of the guest: {error}.")).because(error)
        })
    }

    fn folder_of_guest(&self, guest: &Id) -> io::Result<OwnedFd> {
        let guests = folder_in(&self.root()?, "guests")?;
        folder_in(&guests, guest.as_str())
    }

    /// The state directory itself.
    pub fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        Ok(rustix::fs::open(&self.path, flags, Mode::empty())?)
    }

    fn open(&self, place: &Place, flags: OFlags) -> Result<File> {
        let failed = |error: io::Error| {
            let what = describe(place);
            let kind =
                if error.kind() == io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Unavailable };
            Error::new(kind, format!("Cannot open {what}: {error}.")).because(error)
        };
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match place {
            Place::Image(id) => self.root().and_then(|root| beneath(&root, &Path::new("images").join(raw(id)), flags)),
            Place::Disk(id) => self.root().and_then(|root| beneath(&root, &Path::new("disks").join(raw(id)), flags)),
            Place::Host(path) => return self.open_host(path, flags),
        };
        file.and_then(regular).map_err(failed)
    }

    /// A registered file of the host: absolute, regular, and not of the system or of our own state.
    fn open_host(&self, path: &Path, flags: OFlags) -> Result<File> {
        let failed = |error: io::Error| {
            Error::invalid("path", format!("Cannot open {}: {error}.", path.display())).because(error)
        };
        if !path.is_absolute() {
            return Err(Error::invalid("path", "A file of the host is named by its absolute path."));
        }
        let real = path.canonicalize().map_err(failed)?;
        let own = self.path.canonicalize().map_err(failed)?;
        if NEVER.iter().any(|folder| real.starts_with(folder)) || real.starts_with(&own) {
            return Err(Error::invalid("path", format!("{} is not a place for images.", path.display())));
        }
        // The real path has no symbolic links; one that appears meanwhile is refused.
        let opened = openat2(CWD, &real, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS);
        opened.map_err(io::Error::from).and_then(regular).map_err(failed)
    }
}

/// Whose files go into a folder.
fn owner_within(folder: &OwnedFd) -> io::Result<(Uid, Gid)> {
    let found = rustix::fs::fstat(folder)?;
    let owner = Owner::within(found.st_uid, found.st_gid);
    Ok((Uid::from_raw(owner.user), Gid::from_raw(owner.group)))
}

/// Opens a folder, and makes it when it is not there.
fn folder_in(above: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(above, name, Mode::from_bits_truncate(0o750)) {
        Ok(()) => {
            let (user, group) = owner_within(above)?;
            chownat(above, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    Ok(openat2(above, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?)
}

/// Gives a folder and the files in it to a user. Its group may change the folder too.
fn give_folder(folder: &OwnedFd, user: u32) -> io::Result<()> {
    let user = Some(Uid::from_raw(user));
    rustix::fs::fchown(folder, user, None)?;
    rustix::fs::fchmod(folder, Mode::from_bits_truncate(0o770))?;
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = Path::new(OsStr::from_bytes(entry.file_name().to_bytes()));
        if entry.file_type() == FileType::Directory {
            continue;
        }
        let file = regular(beneath(folder, name, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK)?)?;
        // With a second name it may be anybody's file.
        if file.metadata()?.nlink() != 1 {
            return Err(io::Error::other(format!("{} has a second name", name.display())));
        }
        rustix::fs::fchown(&file, user, None)?;
    }
    Ok(())
}

/// Opens a file, and makes it when it is not there.
fn open_or_make(folder: &OwnedFd, name: &str, flags: OFlags) -> io::Result<File> {
    let file = beneath(folder, Path::new(name), flags | OFlags::CREATE)?;
    let (user, group) = owner_within(folder)?;
    rustix::fs::fchown(&file, Some(user), Some(group))?;
    regular(file)
}

fn raw(id: &Id) -> String {
    format!("{id}.raw")
}

fn beneath(root: &OwnedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_bits_truncate(0o640) } else { Mode::empty() };
    Ok(openat2(root, path, flags, mode, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?)
}

fn regular(fd: OwnedFd) -> io::Result<File> {
    let file = File::from(fd);
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if meta.nlink() == 0 {
        return Err(io::Error::other("it was deleted"));
    }
    Ok(file)
}

/// An open file description lock on the whole file: it goes with the descriptor to the engine, and ends with the last copy.
fn lock(file: &File, kind: i32) -> io::Result<()> {
    let flock = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock))?;
    Ok(())
}

fn busy(place: &Place, error: io::Error) -> Error {
    let what = describe(place);
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Error::conflict(format!("Another guest or program is using {what}.")),
        _ => Error::new(ErrorKind::Unavailable, format!("Cannot lock {what}: {error}.")).because(error),
    }
}

fn describe(place: &Place) -> String {
    match place {
        Place::Image(id) => format!("the image {id}"),
        Place::Disk(id) => format!("the disk {id}"),
        Place::Host(path) => path.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_somebody_writes_is_not_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let files = StateFiles::new(folder.path());
        let id = Id::random();
        std::fs::create_dir(folder.path().join("disks")).unwrap();
        std::fs::write(folder.path().join("disks").join(raw(&id)), [0; 512]).unwrap();
        let first = files.open_disk(&Place::Disk(id.clone()), false).unwrap();
        let second = files.open_disk(&Place::Disk(id.clone()), false).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::Conflict);
        assert_eq!(files.open_to_read(&Place::Disk(id.clone())).unwrap_err().kind(), ErrorKind::Conflict);
        drop(first);
        let reader = files.open_to_read(&Place::Disk(id.clone())).unwrap();
        assert!(files.open_to_read(&Place::Disk(id.clone())).is_ok(), "readers share");
        assert!(files.open_disk(&Place::Disk(id), false).is_err(), "and keep writers out");
        drop(reader);
    }

    #[test]
    fn the_variables_of_uefi_begin_as_the_package_has_them_and_stay() {
        if [Firmware::Variables, Firmware::SecureVariables].iter().any(|firmware| firmware.open().is_err()) {
            return println!("skipped: the package ovmf is not installed");
        }
        let folder = tempfile::tempdir().unwrap();
        let files = StateFiles::new(folder.path());
        let id = Id::random();
        let contents = |secure| {
            let mut bytes = Vec::new();
            let mut file = files.open_variables(&id, secure).unwrap();
            std::io::Seek::rewind(&mut file).unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let own = folder.path().join("guests").join(id.as_str());
        // What a crash in the middle of the first start leaves.
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("variables.fd.part"), "half").unwrap();
        let (plain, secure) = (contents(false), contents(true));
        assert_eq!(plain, std::fs::read(Firmware::Variables.path()).unwrap());
        assert_eq!(secure, std::fs::read(Firmware::SecureVariables.path()).unwrap());
        assert_ne!(plain, secure, "one has keys");
        files.open_variables(&id, false).unwrap().write_all_at(b"mine", 100).unwrap();
        assert_eq!(contents(false).get(100..104), Some(&b"mine"[..]), "the guest's own");
        assert_eq!(contents(true), secure, "apart from the other's");
        std::fs::remove_file(own.join(VARIABLES[0])).unwrap();
        assert_eq!(contents(false), plain, "as new");
    }

    #[test]
    fn links_folders_and_system_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let files = StateFiles::new(folder.path());
        let id = Id::random();
        std::fs::create_dir_all(folder.path().join("images")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", folder.path().join("images").join(raw(&id))).unwrap();
        assert!(files.open_to_read(&Place::Image(id.clone())).is_err(), "a link in our own folder");
        std::os::unix::fs::symlink("/etc", folder.path().join("guests")).unwrap();
        assert!(files.open_log(&id).is_err(), "a link instead of a folder");
        for path in ["/etc/passwd", "/proc/self/status", "/dev/null", "relative", "/tmp", "/nonexistent"] {
            assert!(files.open_to_read(&Place::Host(path.into())).is_err(), "{path}");
        }
        let own = folder.path().join("innkeeper.db");
        std::fs::write(&own, "secret").unwrap();
        assert!(files.open_to_read(&Place::Host(own)).is_err(), "our own state");
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        assert!(files.open_to_read(&Place::Host(elsewhere.path().into())).is_ok());
        assert!(files.open_disk(&Place::Host(elsewhere.path().into()), false).is_err(), "never to write");
    }
}
