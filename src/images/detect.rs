//! What a file is, by its first bytes. Nothing is probed later: an image keeps the kind it was given here.

use std::io::Read;

use crate::{
    error::{Error, Result},
    store::images::ImageKind,
    types::shorten,
};

/// How many bytes from the start are needed: the volume descriptor of a CD is at 32 KiB.
pub const HEAD_BYTES: usize = 36 << 10;

/// What is to be done with a file that has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detected {
    /// Kept as it is.
    As(ImageKind),
    /// A qcow2 disk: becomes raw.
    Qcow2,
}

/// Says what a file is. `name` is its name for people and decides only where bytes cannot.
///
/// Errors: `Invalid` at `file`, with the format's name and what to do.
pub fn detect(head: &[u8], size_bytes: u64, name: &str, wanted: Option<ImageKind>) -> Result<Detected> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let name = name.to_ascii_lowercase();
    let ends = |ending: &str| name.ends_with(ending);
    if has(0, b"QFI\xfb") {
        return if has(4, &[0, 0, 0, 1]) { Err(refused("qcow version 1", CONVERT)) } else { Ok(Detected::Qcow2) };
    }
    if let Some(format) = foreign_disk(&has) {
        return Err(refused(format, CONVERT));
    }
    if let Some(archive) = archive(&has) {
        return Err(refused(archive, "Unpack it and add the file that is inside."));
    }
    if let Some(compression) = compression(&has) {
        return compressed(head, &name, compression, wanted);
    }
    let text = head.iter().take(512).map(u8::to_ascii_lowercase).collect::<Vec<u8>>();
    if text.trim_ascii_start().starts_with(b"<!doctype html") || text.trim_ascii_start().starts_with(b"<html") {
        return Err(refused("web page", "Its address leads to a page and not to the image itself."));
    }
    let kind = if has(0, b"070701") || has(0, b"070702") || has(0, b"\xc7\x71") {
        ImageKind::Initrd
    } else if has(0x202, b"HdrS") || has(0, b"\x7fELF") {
        ImageKind::Kernel
    } else if has(32_769, b"CD001") || has(32_769, b"BEA01") {
        ImageKind::Iso
    } else if ends(".iso") {
        return Err(Error::invalid(
            "file",
            format!("\"{}\" is called iso but holds no CD file system.", shorten(&name)),
        ));
    } else if let Some(wanted) = wanted {
        wanted
    } else if size_bytes.is_multiple_of(512)
        && (has(510, b"\x55\xaa") || [".img", ".raw", ".disk"].iter().any(|e| ends(e)))
    {
        ImageKind::Disk
    } else {
        ImageKind::Other
    };
    // A CD image with a partition table is also a disk image; which, only the person knows.
    let hybrid = kind == ImageKind::Iso && wanted == Some(ImageKind::Disk);
    Ok(Detected::As(if hybrid { ImageKind::Disk } else { kind }))
}

const CONVERT: &str = "Convert it to raw or qcow2 first: qemu-img convert -O qcow2 OLD NEW.";

fn refused(format: &str, remedy: &str) -> Error {
    Error::invalid("file", format!("This is a {format}. {remedy}"))
}

fn foreign_disk(has: &impl Fn(usize, &[u8]) -> bool) -> Option<&'static str> {
    let formats: [(usize, &[u8], &str); 9] = [
        (0, b"KDMV", "VMware disk (VMDK)"),
        (0, b"COWD", "VMware disk (VMDK)"),
        (0, b"# Disk DescriptorFile", "VMware disk description (VMDK)"),
        (0x40, b"\x7f\x10\xda\xbe", "VirtualBox disk (VDI)"),
        (0, b"conectix", "Virtual PC disk (VHD)"),
        (0, b"vhdxfile", "Hyper-V disk (VHDX)"),
        (0, b"QED\0", "QED disk"),
        (0, b"WithoutFreeSpace", "Parallels disk"),
        (0, b"WithouFreSpacExt", "Parallels disk"),
    ];
    formats.into_iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, format)| format)
}

fn archive(has: &impl Fn(usize, &[u8]) -> bool) -> Option<&'static str> {
    let formats: [(usize, &[u8], &str); 5] = [
        (0, b"PK\x03\x04", "zip archive"),
        (0, b"PK\x05\x06", "zip archive"),
        (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
        (0, b"Rar!\x1a\x07", "RAR archive"),
        (257, b"ustar", "tar archive (an OVA is one)"),
    ];
    formats.into_iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, format)| format)
}

fn compression(has: &impl Fn(usize, &[u8]) -> bool) -> Option<&'static str> {
    let formats: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x5d\0\0", "lzma"),
    ];
    formats.into_iter().find(|(magic, _)| has(0, magic)).map(|(_, format)| format)
}

/// A compressed file is an initrd, which its kernel unpacks, or of no use here.
fn compressed(head: &[u8], name: &str, compression: &str, wanted: Option<ImageKind>) -> Result<Detected> {
    let mut start = [0; 6];
    let unpacked = compression == "gzip" && flate2::read::GzDecoder::new(head).read_exact(&mut start).is_ok();
    let called_initrd = name.starts_with("init") || name.contains("initrd") || name.contains("initramfs");
    if (unpacked && start.starts_with(b"07070")) || wanted == Some(ImageKind::Initrd) || (called_initrd && !unpacked) {
        return Ok(Detected::As(ImageKind::Initrd));
    }
    Err(refused(
        &format!("file compressed with {compression}"),
        "Unpack it first. An initrd may stay compressed: give it a name that begins with \"initrd\".",
    ))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn with(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn bytes_decide_what_a_file_is() {
        use ImageKind::{Disk, Initrd, Iso, Kernel, Other};
        let cases = [
            (with(32_769, b"CD001"), "a", Iso),
            (with(32_769, b"CD001"), "a.iso", Iso),
            (with(0x202, b"HdrS"), "vmlinuz", Kernel),
            (with(0, b"\x7fELF"), "vmlinux", Kernel),
            (with(510, b"\x55\xaa"), "anything", Disk),
            (with(0, b""), "blank.img", Disk),
            (with(0, b"070701"), "microcode", Initrd),
            (gzip(b"070701000"), "whatever", Initrd),
            (with(0, b"\xfd7zXZ\0"), "initrd.img-6.1", Initrd),
            (with(0, b"notes"), "notes.txt", Other),
        ];
        for (head, name, kind) in cases {
            assert_eq!(detect(&head, 1 << 20, name, None).unwrap(), Detected::As(kind), "{name}");
        }
        assert_eq!(detect(&with(0, b"QFI\xfb\0\0\0\x03"), 1 << 20, "a", None).unwrap(), Detected::Qcow2);
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        let cases = [
            (with(0, b"PK\x03\x04"), "debian.iso", "zip archive"),
            (with(0, b"KDMV"), "disk.img", "VMDK"),
            (with(0x40, b"\x7f\x10\xda\xbe"), "disk.img", "VDI"),
            (with(0, b"conectix"), "a", "VHD"),
            (with(0, b"vhdxfile"), "a", "VHDX"),
            (with(0, b"7z\xbc\xaf\x27\x1c"), "a", "7z"),
            (with(0, b"\xfd7zXZ\0"), "debian.raw.xz", "xz"),
            (gzip(&[0; 600]), "initrd.iso", "gzip"),
            (gzip(&[0; 600]), "disk.img", "gzip"),
            (with(257, b"ustar"), "box.ova", "OVA"),
            (with(0, b"QFI\xfb\0\0\0\x01"), "a", "qcow version 1"),
            (b"\n<!DOCTYPE HTML><p>404".to_vec(), "debian.qcow2", "web page"),
            (with(0, b"nothing"), "debian.iso", "called iso"),
        ];
        for (head, name, word) in cases {
            let error = detect(&head, 1 << 20, name, None).unwrap_err();
            assert_eq!(error.field(), Some("file"));
            assert!(error.to_string().contains(word), "{name}: {error}");
        }
    }

    #[test]
    fn a_person_may_say_what_it_is_where_bytes_do_not() {
        let plain = with(0, b"firmware");
        assert_eq!(detect(&plain, 600, "x", Some(ImageKind::Kernel)).unwrap(), Detected::As(ImageKind::Kernel));
        let hybrid = with(32_769, b"CD001");
        assert_eq!(detect(&hybrid, 600, "x", Some(ImageKind::Disk)).unwrap(), Detected::As(ImageKind::Disk));
        assert!(detect(&with(0, b"PK\x03\x04"), 600, "x", Some(ImageKind::Iso)).is_err());
    }
}
