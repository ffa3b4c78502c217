//! Where the firmware of guests is on the host: SeaBIOS, its option ROMs, OVMF; opened for reading, never changed.

use std::{
    env,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use crate::error::{Error, ErrorKind, Result};

/// Overrides where firmware is looked for: one folder holding all files by the names below. For tests and for the appliance image.
pub const FOLDER_VARIABLE: &str = "INNKEEPER_FIRMWARE_DIR";
/// More than any firmware image that fits below 4 GiB on this machine.
pub const FIRMWARE_BYTES_MAX: u64 = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS with its tables loader, 256 KiB.
    Bios,
    /// SeaVGABIOS for the standard VGA.
    VgaRom,
    /// What a BIOS boots from a virtio network card with: iPXE as an option ROM.
    VirtioNetworkRom,
    /// The same for an Intel 82540EM.
    E1000Rom,
    /// OVMF: code only, for its variables another file is copied. Without SMM, with or without Secure Boot.
    Uefi,
    /// What the variables of a new guest begin with: nothing.
    Variables,
    /// The same with the usual keys enrolled and Secure Boot on.
    SecureVariables,
}

impl Firmware {
    /// The package and where its releases have the file, newest place first.
    fn places(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Firmware::Bios => ("seabios", &["/usr/share/seabios/bios-256k.bin"]),
            Firmware::VgaRom => ("seabios", &["/usr/share/seabios/vgabios-stdvga.bin"]),
            Firmware::VirtioNetworkRom => ("ipxe-qemu", &["/usr/lib/ipxe/qemu/pxe-virtio.rom"]),
            Firmware::E1000Rom => ("ipxe-qemu", &["/usr/lib/ipxe/qemu/pxe-e1000.rom"]),
            Firmware::Uefi => ("ovmf", &["/usr/share/OVMF/OVMF_CODE_4M.fd"]),
            Firmware::Variables => ("ovmf", &["/usr/share/OVMF/OVMF_VARS_4M.fd"]),
            Firmware::SecureVariables => ("ovmf", &["/usr/share/OVMF/OVMF_VARS_4M.ms.fd"]),
        }
    }

    pub fn package(self) -> &'static str {
        self.places().0
    }

    /// The first place that has the file, or the place where it should be.
    pub fn path(self) -> PathBuf {
        self.path_in(env::var_os(FOLDER_VARIABLE).map(PathBuf::from).as_deref())
    }

    fn path_in(self, folder: Option<&Path>) -> PathBuf {
        let (_, places) = self.places();
        let mut paths = places.iter().map(|place| match (folder, Path::new(place).file_name()) {
            (Some(folder), Some(name)) => folder.join(name),
            _ => PathBuf::from(place),
        });
        let first = paths.next().unwrap_or_default();
        if first.is_file() { first } else { paths.find(|path| path.is_file()).unwrap_or(first) }
    }

    /// Opens the file for reading.
    ///
    /// Errors: `Unavailable` when it is missing, empty or larger than `FIRMWARE_BYTES_MAX`; the sentence names file and package.
    pub fn open(self) -> Result<OwnedFd> {
        open(&self.path(), self.package())
    }
}

/// Whether guests can start by UEFI, with Secure Boot or without.
pub fn uefi_is_there() -> bool {
    [Firmware::Uefi, Firmware::Variables, Firmware::SecureVariables].into_iter().all(|file| file.path().is_file())
}

fn open(path: &Path, package: &str) -> Result<OwnedFd> {
    let refuse = |why: String| {
        let remedy = format!("Install its package: apt install {package}");
        Error::new(ErrorKind::Unavailable, format!("The firmware file {} {why}. {remedy}", path.display()))
    };
    let file = File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => refuse("is missing".into()),
        _ => refuse(format!("cannot be read ({error})")).because(error),
    })?;
    let metadata = file.metadata().map_err(|error| refuse(format!("cannot be read ({error})")).because(error))?;
    if !metadata.is_file() || metadata.len() == 0 || metadata.len() > FIRMWARE_BYTES_MAX {
        return Err(refuse(format!("is not firmware: it has {} bytes", metadata.len())));
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_firmware_names_file_and_package() {
        let folder = tempfile::tempdir().unwrap();
        let path = Firmware::Uefi.path_in(Some(folder.path()));
        assert_eq!(path, folder.path().join("OVMF_CODE_4M.fd"));
        let message = open(&path, Firmware::Uefi.package()).unwrap_err().to_string();
        assert!(message.contains("OVMF_CODE_4M.fd is missing. Install its package: apt install ovmf"), "{message}");
    }

    #[test]
    fn an_empty_file_and_a_folder_are_not_firmware() {
        let folder = tempfile::tempdir().unwrap();
        assert!(open(folder.path(), "seabios").unwrap_err().to_string().contains("not firmware"));
        let empty = folder.path().join("bios-256k.bin");
        std::fs::write(&empty, b"").unwrap();
        assert!(open(&empty, "seabios").unwrap_err().to_string().contains("0 bytes"));
    }
}
