//! bzImage kernels (Linux x86 boot protocol): the setup header is read, the zero page is written, the real-mode code is skipped.

use std::mem;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, screen_info, setup_header};
use vm_memory::ByteValued;

use super::{BootError, CMDLINE, Initrd, KERNEL, Loader, Source, StartMode, ZERO_PAGE, refused};

/// Where the setup header is in the file and in the zero page.
const HEADER_AT: usize = 0x1f1;
const MAGIC_AT: usize = 0x202;
const SECTOR: u64 = 512;
/// Linux 2.6.22, the first with a limit for the command line.
const VERSION_MIN: u16 = 0x0206;
/// The first with a preferred address and `init_size`.
const VERSION_INIT_SIZE: u16 = 0x020a;
/// The first with a 64-bit entry.
const VERSION_XLOADFLAGS: u16 = 0x020c;

const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const VIDEO_NORMAL: u16 = 0xffff;

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC_AT..MAGIC_AT + 4) == Some(b"HdrS")
}

/// Loads kernel and initrd and writes the zero page.
pub(super) fn load(
    loader: &Loader,
    kernel: &Source,
    head: &[u8],
    initrd: Option<&Source>,
    cmdline: &str,
) -> Result<StartMode, BootError> {
    let header = read_header(head)?;
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let payload_at = (setup_sectors + 1) * SECTOR;
    let Some(payload_bytes) = kernel.bytes.checked_sub(payload_at).filter(|bytes| *bytes > 0) else {
        return Err(refused("The kernel file is cut off behind its setup code."));
    };
    let payload_end = loader.check_fits(KERNEL.checked_add(payload_bytes))?;
    let end = loader.check_fits(unpacked_end(&header, payload_end))?;
    kernel.read_into(loader.ram, payload_at, KERNEL, payload_bytes)?;

    loader.place_cmdline(cmdline, header.cmdline_size as usize)?;
    let initrd = loader.place_initrd(initrd, end, u64::from(header.initrd_addr_max) + 1)?;
    let params = zero_page(loader, header, initrd);
    loader.ram.write(ZERO_PAGE, params.as_slice())?;

    let long = header.version >= VERSION_XLOADFLAGS && header.xloadflags & XLF_KERNEL_64 != 0;
    loader.place_gdt(long)?;
    if long {
        let cr3 = loader.place_page_tables()?;
        return Ok(StartMode::Long64 { rip: KERNEL + ENTRY_64, rsi: ZERO_PAGE.0, cr3 });
    }
    Ok(StartMode::Protected32 { eip: KERNEL as u32, ebx: 0, esi: ZERO_PAGE.0 as u32 })
}

/// The setup header, as long as the kernel says it is; what an older kernel does not have is zero.
fn read_header(head: &[u8]) -> Result<setup_header, BootError> {
    let cut = || refused("The kernel file is cut off inside its header.");
    let jump = head.get(MAGIC_AT - 1).ok_or_else(cut)?;
    let end = MAGIC_AT + usize::from(*jump);
    let end = end.min(HEADER_AT + mem::size_of::<setup_header>());
    let bytes = head.get(HEADER_AT..end).ok_or_else(cut)?;
    let mut header = setup_header::default();
    header.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
    let version = header.version;
    if version < VERSION_MIN {
        return Err(refused(format!(
            "The kernel speaks version {}.{:02} of the boot protocol; 2.06 (Linux 2.6.22) is the oldest that starts here.",
            version >> 8,
            version & 0xff
        )));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(refused("The kernel is a zImage for low memory; only bzImages start here."));
    }
    Ok(header)
}

/// Where the kernel ends once it has unpacked itself (boot protocol, `init_size`). Nothing when that is no address.
fn unpacked_end(header: &setup_header, payload_end: u64) -> Option<u64> {
    if header.version < VERSION_INIT_SIZE {
        return Some(payload_end);
    }
    let start = header.pref_address.max(KERNEL);
    let end = start.checked_add(u64::from(header.init_size))?;
    Some(end.max(payload_end))
}

fn zero_page(loader: &Loader, header: setup_header, initrd: Option<Initrd>) -> boot_params {
    let mut params = boot_params { hdr: header, screen_info: text_screen(), ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.vid_mode = VIDEO_NORMAL;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.at as u32;
        params.hdr.ramdisk_size = initrd.bytes as u32;
    }
    params.acpi_rsdp_addr = loader.rsdp.0;
    params.alt_mem_k = u32::try_from((loader.low_end - KERNEL) >> 10).unwrap_or(u32::MAX);
    let mut table = [boot_e820_entry::default(); 128];
    let map = loader.facts.kernel_map();
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.bytes, r#type: if entry.usable { 1 } else { 2 } };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    params
}

/// VGA mode 3, as the display starts: 80 by 25 characters of 16 lines. Without this the kernel's VGA console stays away.
fn text_screen() -> screen_info {
    screen_info {
        orig_video_mode: 3,
        orig_video_cols: 80,
        orig_video_lines: 25,
        orig_video_points: 16,
        orig_video_isVGA: 1,
        orig_video_ega_bx: 3, // 256 KiB; 0x10 would mean that there is no EGA
        ..screen_info::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::boot::tests::{MEMORY_BYTES, rig};

    /// A kernel with one setup sector and `payload` behind it.
    fn bzimage(change: impl FnOnce(&mut setup_header), payload: &[u8]) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            jump: 0x6aeb,
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x020f,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            pref_address: 0x100_0000,
            init_size: 0x10_0000,
            ..setup_header::default()
        };
        change(&mut header);
        let mut image = vec![0; 1024];
        let bytes = header.as_slice();
        image[HEADER_AT..HEADER_AT + bytes.len()].copy_from_slice(bytes);
        image.extend(payload);
        image
    }

    fn zero_page_of(rig: &crate::engine::boot::tests::Rig) -> boot_params {
        let mut params = boot_params::default();
        params.as_mut_slice().copy_from_slice(&rig.bytes(ZERO_PAGE.0, mem::size_of::<boot_params>()));
        params
    }

    #[test]
    fn a_64_bit_kernel_starts_in_long_mode_with_all_it_needs() {
        let rig = rig();
        let start = rig.start(&bzimage(|_| (), b"payload"), Some(&[7; 5000]), "console=ttyS0 quiet").unwrap();
        assert_eq!(start, StartMode::Long64 { rip: 0x10_0200, rsi: 0x7000, cr3: 0x9000 });
        assert_eq!(rig.bytes(0x10_0000, 7), b"payload");
        assert_eq!(rig.bytes(0x2_0000, 20), b"console=ttyS0 quiet\0");
        let params = zero_page_of(&rig);
        let hdr = params.hdr;
        assert_eq!([hdr.type_of_loader, hdr.loadflags], [0xff, 1]);
        let (at, bytes, cmdline) = (hdr.ramdisk_image, hdr.ramdisk_size, hdr.cmd_line_ptr);
        assert_eq!((u64::from(at), bytes, cmdline), (MEMORY_BYTES - 8192, 5000, 0x2_0000));
        assert_eq!(rig.bytes(u64::from(at), 5000), [7; 5000]);
        let rsdp = params.acpi_rsdp_addr;
        assert_eq!(rig.bytes(rsdp, 8), b"RSD PTR ");
        let screen = params.screen_info;
        assert_eq!([screen.orig_video_mode, screen.orig_video_cols, screen.orig_video_lines], [3, 80, 25]);
        let count = usize::from(params.e820_entries);
        let table = params.e820_table;
        let usable: u64 = table[..count].iter().filter(|e| e.r#type == 1).map(|e| e.size).sum();
        assert_eq!(usable, MEMORY_BYTES - (0x10_0000 - 0x9_fc00));
        assert_eq!(rig.ram.get_u64(super::super::Gpa(0x510)).unwrap(), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn a_32_bit_kernel_starts_in_protected_mode() {
        let rig = rig();
        let kernel = bzimage(|header| header.xloadflags = 0, b"x");
        assert_eq!(rig.start(&kernel, None, ""), Ok(StartMode::Protected32 { eip: 0x10_0000, ebx: 0, esi: 0x7000 }));
        assert_eq!({ zero_page_of(&rig).hdr.ramdisk_size }, 0);
    }

    #[test]
    fn fields_that_an_old_kernel_does_not_have_are_not_read() {
        let rig = rig();
        // The header ends behind cmdline_size; what follows is code.
        let kernel = bzimage(
            |header| {
                header.version = 0x0206;
                header.jump = 0x3aeb;
                header.init_size = u32::MAX;
                header.pref_address = u64::MAX;
            },
            b"x",
        );
        assert!(matches!(rig.start(&kernel, None, ""), Ok(StartMode::Protected32 { .. })));
        assert_eq!({ zero_page_of(&rig).hdr.init_size }, 0);
    }

    #[test]
    fn the_initrd_stays_below_its_limit_and_above_the_kernel() {
        let rig = rig();
        let low = bzimage(|header| header.initrd_addr_max = 0x1ff_ffff, b"x");
        rig.start(&low, Some(&[1; 4096]), "").unwrap();
        assert_eq!({ zero_page_of(&rig).hdr.ramdisk_image }, 0x1ff_f000);
        let tight = bzimage(|header| header.initrd_addr_max = 0x110_0fff, b"x");
        assert!(rig.start(&tight, Some(&[1; 4096]), "").is_ok());
        let refused = rig.start(&tight, Some(&[1; 4097]), "").unwrap_err();
        assert!(refused.starts_with("The initrd of "), "{refused}");
        let nowhere = bzimage(|header| header.initrd_addr_max = 0, b"x");
        assert!(rig.start(&nowhere, Some(&[1; 4096]), "").is_err());
    }

    #[test]
    fn wrong_kernels_are_refused_with_a_sentence() {
        type Change = fn(&mut setup_header);
        let cases: [(Change, &str); 6] = [
            (|h| h.version = 0x0202, "The kernel speaks version 2.02"),
            (|h| h.loadflags = 0, "The kernel is a zImage"),
            (|h| h.setup_sects = 255, "The kernel file is cut off behind its setup code."),
            (|h| h.init_size = 0x8000_0000, "The kernel needs memory up to"),
            (|h| h.pref_address = u64::MAX, "The kernel wants to be at an address"),
            (|h| h.cmdline_size = 3, "The kernel takes a command line of 3 bytes; this one has 5."),
        ];
        for (change, sentence) in cases {
            let rig = rig();
            let error = rig.start(&bzimage(change, b"x"), None, "quiet").unwrap_err();
            assert!(error.starts_with(sentence), "{error}");
        }
    }

    #[test]
    fn truncated_and_spoiled_kernels_never_panic() {
        let good = bzimage(|_| (), b"payload");
        let rig = rig();
        for len in (0..good.len()).step_by(7) {
            let _ = rig.start(&good[..len], None, "");
        }
        for at in HEADER_AT..HEADER_AT + mem::size_of::<setup_header>() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            let _ = rig.start(&bad, Some(b"initrd"), "quiet");
        }
    }
}
