//! CPUID of one vCPU: what the host's KVM offers, or the part of it that every host has, with the guest's own topology in it.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::{
    hyperv::{self, Enlightenments},
    topology::Topology,
};
use crate::spec::CpuModel;

const FEATURE_ECX_VMX: u32 = 1 << 5;
const FEATURE_ECX_X2APIC: u32 = 1 << 21;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HTT: u32 = 1 << 28;
const EXTENDED_ECX_SVM: u32 = 1 << 2;
const EXTENDED_ECX_TOPOLOGY: u32 = 1 << 22;
const EXTENDED_ECX_LEGACY_CMP: u32 = 1 << 1;
const SIGNIFICANT_INDEX: u32 = 1;

/// Leaf 1 of the portable model: x86-64-v2 (System V ABI, AMD64 supplement, 3.1.1), and what KVM does for every guest.
const PORTABLE_ECX: u32 = 1 << 0 // SSE3
    | 1 << 9 // SSSE3
    | 1 << 13 // CMPXCHG16B
    | 1 << 19 // SSE4.1
    | 1 << 20 // SSE4.2
    | 1 << 23; // POPCNT
/// FPU to SSE2, without the thermal and debug features of single processors.
const PORTABLE_EDX: u32 = 0x0789_fbff;
/// Leaf 0x8000_0001: LAHF in 64-bit mode; SYSCALL, NX, long mode.
const PORTABLE_EXTENDED_ECX: u32 = 1 << 0;
const PORTABLE_EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29;
/// KVM's own: clocks, the stable bit, end of interrupt without an exit, waking a vCPU that waits for a lock.
const PORTABLE_KVM: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 7 | 1 << 24;
/// Family 15, model 6, stepping 1: what other hypervisors show of a processor that is none in particular.
const PORTABLE_SIGNATURE: u32 = 0x0000_0f61;
const KVM_LEAF: u32 = hyperv::BASE;
const KVM_FEATURES: u32 = KVM_LEAF + 1;

/// What a vCPU's features are made of.
pub(super) struct Features {
    /// What KVM on this host offers.
    pub host: CpuId,
    pub model: CpuModel,
    pub hyperv: Option<Enlightenments>,
    pub tsc_deadline: bool,
}

impl Features {
    /// Those of the vCPU with this local APIC id.
    ///
    /// Errors: what this host lacks of the portable model, in words.
    pub(super) fn for_vcpu(self, apic_id: u32, topology: Topology) -> Result<CpuId, String> {
        let Features { host, model, hyperv, tsc_deadline } = self;
        let mut cpuid = for_vcpu(host, apic_id, topology, tsc_deadline);
        if model == CpuModel::Portable {
            make_portable(&mut cpuid)?;
        }
        match hyperv {
            Some(enlightenments) => with_hyperv(&cpuid, enlightenments),
            None => Ok(cpuid),
        }
    }
}

/// Takes away what not every host has.
fn make_portable(cpuid: &mut CpuId) -> Result<(), String> {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                let lacks = PORTABLE_ECX & !entry.ecx;
                if lacks != 0 {
                    return Err(format!(
                        "this host's processor is older than the portable model, x86-64-v2 (features {lacks:#x} of leaf 1 are missing)"
                    ));
                }
                let ours = FEATURE_ECX_HYPERVISOR | FEATURE_ECX_X2APIC | FEATURE_ECX_TSC_DEADLINE;
                entry.eax = PORTABLE_SIGNATURE;
                entry.ecx &= PORTABLE_ECX | ours;
                entry.edx &= PORTABLE_EDX | FEATURE_EDX_HTT;
            }
            0x6 => entry.eax &= 1 << 2, // the local timer runs in every sleep state
            0x7 | 0xd | 0x14 | 0x19 | 0x1c | 0x1d | 0x1e | 0x21 | 0x24 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            KVM_FEATURES => entry.eax &= PORTABLE_KVM,
            0x8000_0001 => {
                entry.eax = PORTABLE_SIGNATURE;
                entry.ecx &= PORTABLE_EXTENDED_ECX | EXTENDED_ECX_LEGACY_CMP;
                entry.edx &= PORTABLE_EXTENDED_EDX;
            }
            0x8000_0002..=0x8000_0004 => name_part(entry),
            0x8000_0007 => entry.edx &= 1 << 8, // the time stamp counter does not change its pace
            0x8000_0008 => entry.ebx = 0,
            0x8000_000b..=0x8000_00ff => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    Ok(())
}

/// 16 of the 48 bytes of the processor's name.
fn name_part(entry: &mut kvm_cpuid_entry2) {
    const NAME: &[u8; 48] = b"Innkeeper portable processor (x86-64-v2)\0\0\0\0\0\0\0\0";
    let at = (entry.function & 7) as usize - 2;
    let word = |index: usize| {
        let bytes = NAME.get(16 * at + 4 * index..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
}

/// Hyper-V's leaves come first; KVM's own move up, where a system that looks for KVM finds them.
fn with_hyperv(cpuid: &CpuId, enlightenments: Enlightenments) -> Result<CpuId, String> {
    let mut entries: Vec<kvm_cpuid_entry2> = cpuid.as_slice().to_vec();
    for entry in entries.iter_mut().filter(|entry| (KVM_LEAF..KVM_LEAF + 0x100).contains(&entry.function)) {
        if entry.function == KVM_LEAF {
            entry.eax = KVM_FEATURES + hyperv::KVM_LEAVES_MOVE;
        }
        entry.function += hyperv::KVM_LEAVES_MOVE;
    }
    entries.extend(enlightenments.leaves());
    CpuId::from_entries(&entries).map_err(|_| "the processor has too many features".to_owned())
}

/// Gives the vCPU with this local APIC id its identity. Nested virtualization is not offered.
fn for_vcpu(mut cpuid: CpuId, apic_id: u32, topology: Topology, tsc_deadline: bool) -> CpuId {
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

    #[test]
    fn the_portable_model_is_the_same_everywhere_and_needs_its_features() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let functions = [0x1, 0x7, 0xd, KVM_FEATURES, 0x8000_0001, 0x8000_0002, 0x8000_0003, 0x8000_0004];
        let features = |first: kvm_cpuid_entry2| {
            let rest = functions[1..].iter().map(|function| all(*function));
            let host = CpuId::from_entries(&[first].into_iter().chain(rest).collect::<Vec<_>>()).unwrap();
            Features { host, model: CpuModel::Portable, hyperv: None, tsc_deadline: true }
        };
        let one = Topology { sockets: 1, cores: 1, threads: 1 };
        let cpuid = features(all(1)).for_vcpu(0, one).unwrap();
        let [basic, seven, xsave, kvm, extended, name @ ..] = cpuid.as_slice() else { panic!("eight leaves") };
        let fixed = FEATURE_ECX_HYPERVISOR | FEATURE_ECX_X2APIC | FEATURE_ECX_TSC_DEADLINE;
        assert_eq!((basic.eax, basic.ecx, basic.edx), (PORTABLE_SIGNATURE, PORTABLE_ECX | fixed, PORTABLE_EDX));
        assert_eq!((seven.ebx, xsave.eax, kvm.eax), (0, 0, PORTABLE_KVM));
        assert_eq!((extended.ecx, extended.edx), (PORTABLE_EXTENDED_ECX, PORTABLE_EXTENDED_EDX));
        let said: Vec<u8> =
            name.iter().flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]).flat_map(u32::to_le_bytes).collect();
        assert!(said.starts_with(b"Innkeeper portable processor (x86-64-v2)\0"));
        let old = kvm_cpuid_entry2 { ecx: !(1 << 20), ..all(1) };
        assert!(features(old).for_vcpu(0, one).unwrap_err().contains("older than the portable model"));
    }

    #[test]
    fn hyper_v_comes_first_and_kvm_is_found_behind_it() {
        let signature =
            kvm_cpuid_entry2 { function: KVM_LEAF, eax: KVM_FEATURES, ebx: 0x4b4d_564b, ..Default::default() };
        let features = kvm_cpuid_entry2 { function: KVM_FEATURES, eax: 9, ..Default::default() };
        let host = CpuId::from_entries(&[leaf(1, 0), signature, features]).unwrap();
        let hyperv = Enlightenments::of(|_| true);
        let one = Topology { sockets: 1, cores: 1, threads: 1 };
        let cpuid = Features { host, model: CpuModel::Host, hyperv, tsc_deadline: true }.for_vcpu(0, one).unwrap();
        let at = |function: u32| cpuid.as_slice().iter().filter(|entry| entry.function == function).collect::<Vec<_>>();
        let [hyperv] = at(0x4000_0000)[..] else { panic!("one signature") };
        assert_eq!(&hyperv.ebx.to_le_bytes(), b"Micr");
        let [kvm] = at(0x4000_0100)[..] else { panic!("KVM's own") };
        assert_eq!((kvm.eax, kvm.ebx), (0x4000_0101, 0x4b4d_564b));
        assert_eq!(at(0x4000_0101)[0].eax, 9);
    }
}
