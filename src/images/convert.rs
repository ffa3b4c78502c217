//! qcow2 becomes raw, once, on import. The file is a stranger's: no other file that it names is ever opened.

use std::{fs::File, os::unix::fs::FileExt};

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, qcow2::Qcow2};

use super::part::{cannot_write, write_sparse};
use crate::{
    error::{Error, Result},
    spec::DISK_BYTES_MAX,
    tasks::Progress,
    types::show_size,
};

/// Bytes that are read at once.
const COPY_BYTES: usize = 1 << 20;

/// The fields of a qcow2 header that matter here; docs/interop/qcow2.txt of QEMU, "Header".
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    pub size_bytes: u64,
}

/// Reads and checks the header.
///
/// Errors: `Invalid` at `file` for a backing file, an external data file, encryption, a size out of range.
pub fn check_header(file: &File) -> Result<Header> {
    let bad = |why: &str| Error::invalid("file", format!("This qcow2 disk {why}"));
    let mut head = [0; 104];
    let got = file.read_at(&mut head, 0).map_err(|error| Error::internal("Cannot read the disk.", error))?;
    let short = || bad("is cut short.");
    let head = head.get(..got).unwrap_or_default();
    let word = |at: usize| -> Result<u32> {
        let bytes = head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_be_bytes).ok_or_else(short)
    };
    let long = |at: usize| -> Result<u64> { Ok(u64::from(word(at)?) << 32 | u64::from(word(at + 4)?)) };
    if long(8)? != 0 {
        return Err(bad(
            "is only the difference to another file (a backing file). Merge them first: qemu-img convert -O qcow2 OLD NEW.",
        ));
    }
    if word(32)? != 0 {
        return Err(bad("is encrypted. Decrypt it first with qemu-img convert."));
    }
    const EXTERNAL_DATA_FILE: u64 = 1 << 2;
    if word(4)? >= 3 && long(72)? & EXTERNAL_DATA_FILE != 0 {
        return Err(bad("keeps its data in another file. Merge them first: qemu-img convert -O qcow2 OLD NEW."));
    }
    let size_bytes = long(24)?;
    if size_bytes == 0 || size_bytes > DISK_BYTES_MAX {
        return Err(bad(&format!("says it is {} long, which no disk here can be.", show_size(size_bytes))));
    }
    Ok(Header { size_bytes })
}

/// Copies the contents of the qcow2 file `from` into the new, empty file `to`. Blocks; reports bytes of the disk.
pub fn to_raw(from: File, to: &File, progress: &mut Progress) -> Result<u64> {
    let Header { size_bytes } = check_header(&from)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|error| Error::internal("Cannot convert the disk.", error))?;
    let unreadable = |error: std::io::Error| Error::invalid("file", "This qcow2 disk is damaged.").because(error);
    runtime.block_on(async {
        let storage = imago::file::File::try_from(from).map_err(unreadable)?;
        let qcow2 = Qcow2::<imago::file::File>::builder(storage)
            .backing(None)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
            .await
            .map_err(unreadable)?;
        let disk = FormatAccess::new(qcow2);
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < size_bytes {
            progress.report("Converting", at, Some(size_bytes))?;
            let (mapping, length) = disk.get_mapping(at, size_bytes - at).await.map_err(unreadable)?;
            if matches!(mapping, Mapping::Zero { .. }) && length > 0 {
                at += length;
                continue;
            }
            let wanted = usize::try_from(size_bytes - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let piece = buffer.get_mut(..wanted).unwrap_or_default();
            disk.read(&mut *piece, at).await.map_err(unreadable)?;
            write_sparse(to, at, piece).map_err(|error| cannot_write("the converted disk".as_ref(), error))?;
            at += wanted as u64;
        }
        to.set_len(size_bytes).map_err(|error| cannot_write("the converted disk".as_ref(), error))?;
        Ok(size_bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version 3 header with every field in its place.
    fn header(change: impl FnOnce(&mut [u8; 104])) -> File {
        let mut head = [0; 104];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        head[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
        change(&mut head);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&head, 0).unwrap();
        file
    }

    #[test]
    fn files_that_name_other_files_are_refused_by_what_they_do() {
        assert_eq!(check_header(&header(|_| ())).unwrap().size_bytes, 1 << 20);
        let why = |file: File| check_header(&file).unwrap_err().to_string();
        assert!(why(header(|head| head[15] = 200)).contains("backing file"));
        assert!(why(header(|head| head[79] = 4)).contains("data in another file"));
        assert!(why(header(|head| head[35] = 1)).contains("encrypted"));
        assert!(why(header(|head| head[24] = 0xff)).contains("no disk here"));
        let short = tempfile::tempfile().unwrap();
        short.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        assert!(why(short).contains("cut short"));
    }
}
