//! Everything that KVM keeps of a vCPU: read from one that does not run, put into one of the same features.
//!
//! The state after power on is kept for resets; the state in the middle of the guest's work goes into a saved state.

#![expect(unsafe_code, reason = "KVM_SET_XSAVE trusts that the features ask for no more than 4 KiB")]

use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::saved::{BadState, State};

/// The time stamp counter; it goes on through a reset.
const MSR_TSC: u32 = 0x10;
/// Arms the local timer, so its mode and the counter must be there before it.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// More than any kernel lists.
const MSRS_MAX: usize = 4096;
const KIND: &str = "kvm-vcpu";

/// Among the model-specific registers are kvmclock's, steal time's and async page faults'. After power on they are all zero, so
/// that KVM stops writing into the guest's memory when a reset restores them.
#[derive(Serialize, Deserialize)]
pub(super) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    /// A host without XSAVE has none, and takes none.
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
}

fn named(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> io::Error {
    move |error| io::Error::other(format!("{what}: {}", io::Error::from_raw_os_error(error.errno())))
}

impl VcpuState {
    /// Reads a vCPU that does not run. The run state comes first, because KVM settles pending INIT and SIPI when it is asked.
    pub(super) fn capture(fd: &VcpuFd, msr_indexes: &[u32]) -> io::Result<VcpuState> {
        let mp_state = fd.get_mp_state().map_err(named("cannot read the run state"))?;
        let mut msrs = Vec::new();
        for &index in msr_indexes {
            let entry = kvm_msr_entry { index, ..Default::default() };
            let mut one = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::OutOfMemory)?;
            if fd.get_msrs(&mut one).is_ok_and(|count| count == 1) {
                msrs.extend(one.as_slice().iter().map(|entry| (entry.index, entry.data)));
            }
        }
        Ok(VcpuState {
            regs: fd.get_regs().map_err(named("cannot read the registers"))?,
            sregs: fd.get_sregs().map_err(named("cannot read the system registers"))?,
            xsave: fd.get_xsave().map_err(named("cannot read the floating point and vector registers"))?,
            xcrs: fd.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
            debug: fd.get_debug_regs().ok(),
            lapic: fd.get_lapic().map_err(named("cannot read the local interrupt controller"))?,
            mp_state,
            events: fd.get_vcpu_events().map_err(named("cannot read pending events"))?,
            msrs,
        })
    }

    /// Puts the state after power on back: all but the time stamp counter.
    pub(super) fn reset(&self, fd: &VcpuFd) -> io::Result<()> {
        self.apply(fd, |index| index != MSR_TSC)
    }

    /// Goes on where the state was captured: the counter first, what waits for it last.
    pub(super) fn resume(&self, fd: &VcpuFd) -> io::Result<()> {
        set_msr(fd, self.msrs.iter().find(|(index, _)| *index == MSR_TSC));
        self.apply(fd, |index| index != MSR_TSC)
    }

    fn apply(&self, fd: &VcpuFd, wanted: impl Fn(u32) -> bool) -> io::Result<()> {
        fd.set_sregs(&self.sregs).map_err(named("cannot set the system registers"))?;
        fd.set_regs(&self.regs).map_err(named("cannot set the registers"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).map_err(named("cannot set the extended control registers"))?;
        }
        // SAFETY: KVM reads more than the 4 KiB of `kvm_xsave` only for features (AMX) that a process must ask the kernel for, and
        // this one never does.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(named("cannot set the floating point and vector registers"))?;
        if let Some(debug) = &self.debug {
            fd.set_debug_regs(debug).map_err(named("cannot set the debug registers"))?;
        }
        fd.set_lapic(&self.lapic).map_err(named("cannot set the local interrupt controller"))?;
        for msr in self.msrs.iter().filter(|(index, _)| *index != MSR_TSC_DEADLINE && wanted(*index)) {
            set_msr(fd, Some(msr));
        }
        set_msr(fd, self.msrs.iter().find(|(index, _)| *index == MSR_TSC_DEADLINE));
        fd.set_mp_state(self.mp_state).map_err(named("cannot set the run state"))?;
        fd.set_vcpu_events(&self.events).map_err(named("cannot set pending events"))
    }

    pub(super) fn save(&self) -> State {
        State::new(KIND, 1, self)
    }

    /// The values are KVM's to check: it refuses what the processor would.
    pub(super) fn of(state: &State) -> Result<VcpuState, BadState> {
        let fields: VcpuState = state.fields(KIND, 1)?;
        BadState::unless(fields.msrs.len() <= MSRS_MAX, KIND, "it has too many registers")?;
        Ok(fields)
    }
}

/// Some are read-only in this kernel and so cannot have changed, and a newer one lists some that this does not have.
fn set_msr(fd: &VcpuFd, msr: Option<&(u32, u64)>) {
    let Some(&(index, data)) = msr else { return };
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    if let Ok(one) = Msrs::from_entries(&[entry]) {
        let _ = fd.set_msrs(&one);
    }
}
