//! Where each vCPU is: socket, core and thread, and the local APIC id that says so (Intel SDM volume 3, 9.9.3).

use crate::spec::GuestSpec;

/// How the vCPUs of a guest are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    pub sockets: u32,
    /// Of one socket.
    pub cores: u32,
    /// Of one core.
    pub threads: u32,
}

impl Topology {
    /// Of a specification, which is checked: its vCPUs divide into whole cores and sockets.
    pub fn of(spec: &GuestSpec) -> Topology {
        let (sockets, threads) = (spec.sockets.max(1), spec.threads.max(1));
        let cores = (spec.cpus / sockets.saturating_mul(threads)).max(1);
        Topology { sockets, cores, threads }
    }

    /// Threads of one socket.
    pub fn per_socket(self) -> u32 {
        self.cores * self.threads
    }

    /// Bits of an APIC id that tell the threads of a core apart.
    pub fn thread_bits(self) -> u32 {
        bits(self.threads)
    }

    /// Bits of an APIC id that tell the threads of a socket apart.
    pub fn socket_bits(self) -> u32 {
        bits(self.cores) + self.thread_bits()
    }

    /// The local APIC id of vCPU `index`. Ids have gaps where a count is no power of two.
    pub fn apic_id(self, index: u32) -> u32 {
        let (thread, core) = (index % self.threads, index / self.threads % self.cores);
        let socket = index / self.per_socket();
        socket << self.socket_bits() | core << self.thread_bits() | thread
    }
}

fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::CPUS_MAX;

    #[test]
    fn ids_are_the_indexes_where_counts_are_powers_of_two_and_have_gaps_elsewhere() {
        let ids = |sockets, cores, threads| -> Vec<u32> {
            let topology = Topology { sockets, cores, threads };
            (0..sockets * cores * threads).map(|index| topology.apic_id(index)).collect()
        };
        assert_eq!(ids(2, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ids(1, 3, 1), [0, 1, 2]);
        assert_eq!(ids(2, 3, 1), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(1, 2, 3), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn every_id_fits_into_eight_bits_and_is_its_own() {
        for sockets in 1..=CPUS_MAX {
            for threads in 1..=CPUS_MAX / sockets {
                let cores = CPUS_MAX / sockets / threads;
                let topology = Topology { sockets, cores, threads };
                let mut ids: Vec<u32> = (0..sockets * cores * threads).map(|index| topology.apic_id(index)).collect();
                assert!(ids.iter().all(|id| *id < 255), "{topology:?}");
                ids.dedup();
                assert_eq!(ids.len() as u32, sockets * cores * threads);
            }
        }
    }
}
