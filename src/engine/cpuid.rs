//! CPUID of one vCPU: what the host's KVM offers, with the guest's own topology in it.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::topology::Topology;

const FEATURE_ECX_VMX: u32 = 1 << 5;
const FEATURE_ECX_X2APIC: u32 = 1 << 21;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HTT: u32 = 1 << 28;
const EXTENDED_ECX_SVM: u32 = 1 << 2;
const EXTENDED_ECX_TOPOLOGY: u32 = 1 << 22;
const EXTENDED_ECX_LEGACY_CMP: u32 = 1 << 1;
const SIGNIFICANT_INDEX: u32 = 1;

/// Gives the vCPU with this local APIC id its identity. Nested virtualization is not offered.
pub(super) fn for_vcpu(mut cpuid: CpuId, apic_id: u32, topology: Topology, tsc_deadline: bool) -> CpuId {
    let cpus = topology.per_socket();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => basic(entry, apic_id, topology, tsc_deadline),
            0x4 => caches(entry, topology),
            0xb | 0x1f => levels(entry, apic_id, topology),
            0x8000_0001 => {
                entry.ecx &= !(EXTENDED_ECX_SVM | EXTENDED_ECX_TOPOLOGY);
                entry.ecx = entry.ecx & !EXTENDED_ECX_LEGACY_CMP | if cpus > 1 { EXTENDED_ECX_LEGACY_CMP } else { 0 };
            }
            0x8000_0008 => entry.ecx = topology.socket_bits() << 12 | (cpus - 1),
            0x8000_000a | 0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    cpuid
}

/// Leaf 1: local APIC id, count of logical processors, features (Intel SDM volume 2, CPUID).
fn basic(entry: &mut kvm_cpuid_entry2, apic_id: u32, topology: Topology, tsc_deadline: bool) {
    entry.ebx = entry.ebx & 0xffff | apic_id << 24 | 1 << topology.socket_bits() << 16;
    entry.ecx = entry.ecx & !FEATURE_ECX_VMX | FEATURE_ECX_HYPERVISOR | FEATURE_ECX_X2APIC;
    if tsc_deadline {
        entry.ecx |= FEATURE_ECX_TSC_DEADLINE;
    }
    entry.edx = entry.edx & !FEATURE_EDX_HTT | if topology.per_socket() > 1 { FEATURE_EDX_HTT } else { 0 };
}

/// Leaf 4: level 1 and 2 caches belong to one core, higher ones to the socket.
fn caches(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = entry.eax >> 5 & 7;
    let shared_bits = if level >= 3 { topology.socket_bits() } else { topology.thread_bits() };
    let core_bits = topology.socket_bits() - topology.thread_bits();
    entry.eax = entry.eax & 0x3fff | ((1 << shared_bits) - 1) << 14 | ((1 << core_bits) - 1) << 26;
}

/// Leaf 0xb: threads of a core, threads of a socket.
fn levels(entry: &mut kvm_cpuid_entry2, apic_id: u32, topology: Topology) {
    entry.flags |= SIGNIFICANT_INDEX;
    let (shift, count, kind) = match entry.index {
        0 => (topology.thread_bits(), topology.threads, 1),
        1 => (topology.socket_bits(), topology.per_socket(), 2),
        _ => (0, 0, 0),
    };
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (shift, count, entry.index | kind << 8, apic_id);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ecx: u32::MAX, eax: 0x1f << 5 | 1, ..Default::default() }
    }

    #[test]
    fn each_vcpu_has_its_own_id_and_no_nested_virtualization() {
        let host = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_0001, 0)]).unwrap();
        let cpuid = for_vcpu(host, 2, Topology { sockets: 1, cores: 3, threads: 1 }, true);
        let [one, threads, cores, extended] = cpuid.as_slice() else { panic!("four leaves") };
        assert_eq!(one.ebx >> 24, 2);
        assert_eq!(one.ebx >> 16 & 0xff, 4);
        assert_eq!(one.ecx & FEATURE_ECX_VMX, 0);
        assert_ne!(one.ecx & FEATURE_ECX_HYPERVISOR, 0);
        assert_eq!((threads.eax, threads.ebx, threads.edx), (0, 1, 2));
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
        assert_eq!(extended.ecx & EXTENDED_ECX_SVM, 0);
    }

    #[test]
    fn threads_share_a_core_and_cores_a_socket() {
        let second_level = kvm_cpuid_entry2 { eax: 2 << 5 | 1, ..leaf(4, 2) };
        let third_level = kvm_cpuid_entry2 { eax: 3 << 5 | 1, ..leaf(4, 3) };
        let host = CpuId::from_entries(&[leaf(1, 0), second_level, third_level, leaf(0xb, 0), leaf(0xb, 1)]).unwrap();
        let topology = Topology { sockets: 2, cores: 3, threads: 2 };
        // The last thread of the second socket.
        let cpuid = for_vcpu(host, topology.apic_id(11), topology, true);
        let [one, second, third, threads, cores] = cpuid.as_slice() else { panic!("five leaves") };
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (13, 8));
        assert_eq!((second.eax >> 14 & 0xfff, second.eax >> 26), (1, 3), "a core's cache");
        assert_eq!(third.eax >> 14 & 0xfff, 7, "a socket's cache");
        assert_eq!((threads.eax, threads.ebx, threads.edx), (1, 2, 13));
        assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, 13));
    }
}
