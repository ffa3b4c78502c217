//! Where a vCPU begins, put into KVM's registers.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::boot::{CODE_SELECTOR, DATA_SELECTOR, GDT, StartMode, StartState};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 2;
/// Memory types are on, and memory is write-back unless said otherwise: what firmware leaves behind.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets registers and segments. Called on a vCPU that does not run.
pub(super) fn apply(fd: &VcpuFd, start: &StartState) -> io::Result<()> {
    let failed = |error: kvm_ioctls::Error| io::Error::from_raw_os_error(error.errno());
    let mut sregs = fd.get_sregs().map_err(failed)?;
    let mut regs = kvm_regs { rflags: RFLAGS_FIXED, ..fd.get_regs().map_err(failed)? };
    match start.mode {
        StartMode::Real { cs, ip } => {
            for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
                (segment.selector, segment.base) = (0, 0);
            }
            (sregs.cs.selector, sregs.cs.base) = (cs, u64::from(cs) << 4);
            regs.rip = u64::from(ip);
        }
        StartMode::Protected32 { eip, ebx, esi } => {
            flat(&mut sregs, false);
            sregs.cr0 = CR0_PE | CR0_ET;
            (regs.rip, regs.rbx, regs.rsi) = (u64::from(eip), u64::from(ebx), u64::from(esi));
        }
        StartMode::Long64 { rip, rsi, cr3 } => {
            flat(&mut sregs, true);
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = cr3;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            (regs.rip, regs.rsi) = (rip, rsi);
        }
    }
    if !matches!(start.mode, StartMode::Real { .. }) {
        let entry = kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_WRITE_BACK, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::OutOfMemory)?;
        fd.set_msrs(&msrs).map_err(failed)?;
    }
    fd.set_sregs(&sregs).map_err(failed)?;
    fd.set_regs(&regs).map_err(failed)
}

/// Flat segments as the Linux boot protocol and PVH want them, also in the GDT that the loader put into RAM.
fn flat(sregs: &mut kvm_sregs, long: bool) {
    let segment = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long || type_ == 3),
        s: 1,
        l: u8::from(long && type_ == 11),
        g: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT.start, (GDT.end - GDT.start - 1) as u16);
    sregs.cs = segment(CODE_SELECTOR, 11);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
        *data = segment(DATA_SELECTOR, 3);
    }
}
