//! Hyper-V enlightenments: what Windows finds of a hypervisor it knows, as far as the host's KVM has it.
//!
//! The leaves are those of the Hypervisor Top-Level Functional Specification 6.0, 2.4: KVM carries the functions out, so each is
//! offered only where its capability is. There is no VMBus: devices stay those of the PC.

use kvm_bindings::{
    KVM_CAP_HYPERV, KVM_CAP_HYPERV_SEND_IPI, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_TIME, KVM_CAP_HYPERV_TLBFLUSH,
    KVM_CAP_HYPERV_VP_INDEX, kvm_cpuid_entry2,
};

/// Where hypervisors say who they are; KVM's own leaves move up by `KVM_LEAVES_MOVE` when Hyper-V's are there.
pub(super) const BASE: u32 = 0x4000_0000;
pub(super) const KVM_LEAVES_MOVE: u32 = 0x100;

// Leaf 0x4000_0003, EAX: registers that the guest may use.
const RUNTIME: u32 = 1 << 0;
const REFERENCE_COUNTER: u32 = 1 << 1;
const SYNIC: u32 = 1 << 2;
const SYNTHETIC_TIMERS: u32 = 1 << 3;
const APIC_REGISTERS: u32 = 1 << 4;
const HYPERCALL_REGISTERS: u32 = 1 << 5;
const VP_INDEX: u32 = 1 << 6;
const RESET: u32 = 1 << 7;
const REFERENCE_TSC: u32 = 1 << 9;
const FREQUENCIES: u32 = 1 << 11;
// Leaf 0x4000_0003, EDX: what else there is.
const FREQUENCY_REGISTERS: u32 = 1 << 8;
const CRASH_REGISTERS: u32 = 1 << 10;
// Leaf 0x4000_0004, EAX: what the guest had better use.
const REMOTE_TLB_FLUSH: u32 = 1 << 2;
const APIC_BY_REGISTERS: u32 = 1 << 3;
const RELAXED_TIMING: u32 = 1 << 5;
const CLUSTER_IPI: u32 = 1 << 10;
const MANY_PROCESSORS: u32 = 1 << 11;
/// Leaf 0x4000_0004, EBX: how often a guest tries a lock before it tells the hypervisor.
const SPINLOCK_TRIES: u32 = 8191;
/// Leaf 0x4000_0005: the most virtual processors.
const PROCESSORS_MAX: u32 = 64;

/// What this host's KVM can do of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Enlightenments {
    time: bool,
    pub(super) synic: bool,
    index: bool,
    flush: bool,
    ipi: bool,
}

impl Enlightenments {
    /// `has` tells whether KVM has a capability. Nothing without the first of them.
    pub(super) fn of(has: impl Fn(u32) -> bool) -> Option<Enlightenments> {
        has(KVM_CAP_HYPERV).then(|| Enlightenments {
            time: has(KVM_CAP_HYPERV_TIME),
            synic: has(KVM_CAP_HYPERV_SYNIC2) && has(KVM_CAP_HYPERV_VP_INDEX) && has(KVM_CAP_HYPERV_TIME),
            index: has(KVM_CAP_HYPERV_VP_INDEX),
            flush: has(KVM_CAP_HYPERV_TLBFLUSH),
            ipi: has(KVM_CAP_HYPERV_SEND_IPI),
        })
    }

    /// The leaves, in their order.
    pub(super) fn leaves(self) -> Vec<kvm_cpuid_entry2> {
        let Enlightenments { time, synic, index, flush, ipi } = self;
        let bits = |list: &[(bool, u32)]| list.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        let registers = bits(&[
            (true, HYPERCALL_REGISTERS | APIC_REGISTERS | REFERENCE_COUNTER | RESET | RUNTIME),
            (time, REFERENCE_TSC | FREQUENCIES),
            (index, VP_INDEX),
            (synic, SYNIC | SYNTHETIC_TIMERS),
        ]);
        let more = bits(&[(true, CRASH_REGISTERS), (time, FREQUENCY_REGISTERS)]);
        let advice = bits(&[
            (true, RELAXED_TIMING | APIC_BY_REGISTERS),
            (flush, REMOTE_TLB_FLUSH),
            (ipi, CLUSTER_IPI),
            (flush || ipi, MANY_PROCESSORS),
        ]);
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let [name_b, name_c, name_d] = [word(b"Micr"), word(b"osof"), word(b"t Hv")];
        let leaf = |at: u32, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function: BASE + at,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        vec![
            leaf(0, BASE + 6, name_b, name_c, name_d),
            leaf(1, word(b"Hv#1"), 0, 0, 0),
            // Build and version of Windows Server 2016; guests ask for at least one of these.
            leaf(2, 14393, 0x000a_0000, 0, 0),
            leaf(3, registers, 0, 0, more),
            leaf(4, advice, SPINLOCK_TRIES, 0, 0),
            leaf(5, PROCESSORS_MAX, PROCESSORS_MAX, 0, 0),
            leaf(6, 0, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_kvm_can_do_is_offered() {
        assert_eq!(Enlightenments::of(|_| false), None);
        let least = Enlightenments::of(|cap| cap == KVM_CAP_HYPERV).unwrap().leaves();
        assert_eq!(least[3].eax & (SYNIC | SYNTHETIC_TIMERS | REFERENCE_TSC | VP_INDEX), 0);
        assert_eq!(least[4].eax & (REMOTE_TLB_FLUSH | CLUSTER_IPI), 0);
        let all = Enlightenments::of(|_| true).unwrap().leaves();
        assert_eq!(all[3].eax, 0xaff);
        assert_eq!(all[4].eax, 0xc2c);
        let name: Vec<u8> = [all[0].ebx, all[0].ecx, all[0].edx].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(name, b"Microsoft Hv");
        assert_eq!(all.last().map(|leaf| leaf.function), Some(all[0].eax), "the largest leaf is there");
    }
}
