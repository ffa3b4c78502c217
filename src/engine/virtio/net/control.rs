//! The control queue (virtio 1.2, 5.1.6.5): a class, a command and its data in; one byte out, which says whether it was done.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
};

use super::{
    header::GUEST_OFFLOADS,
    settings::{MULTICAST_MAX, Settings, UNICAST_MAX},
};
use crate::{
    engine::{
        memory::GuestRam,
        virtio::{
            Features, Interrupts,
            queue::{Chain, Malformed, VirtQueue},
        },
    },
    types::MacAddr,
};

const OK: u8 = 0;
const ERROR: u8 = 1;
/// Class and command.
const COMMAND_BYTES: u64 = 2;
const ADDRESS_BYTES: u64 = 6;
/// Commands before other work gets its turn.
const BURST: usize = 16;

/// Carries out what the driver has queued. True when the burst ended before the queue did.
pub(super) fn serve(
    ram: &GuestRam,
    queue: &mut VirtQueue,
    interrupts: &Interrupts,
    chain: &mut Chain,
    settings: &Settings,
    accepted: Features,
) -> Result<bool, Malformed> {
    for _ in 0..BURST {
        if !queue.pop(ram, chain)? {
            queue.notify(ram, interrupts)?;
            return queue.enable_kicks(ram);
        }
        // Without a place for the answer it is no command.
        if chain.writable_bytes() == 0 {
            return Err(Malformed);
        }
        let done = Command { ram, chain, settings, accepted }.carry_out();
        chain.write(ram, 0, &[if done.is_some() { OK } else { ERROR }]).map_err(|_| Malformed)?;
        queue.push_quiet(ram, chain.head, 1)?;
    }
    queue.notify(ram, interrupts)?;
    Ok(true)
}

struct Command<'a> {
    ram: &'a GuestRam,
    chain: &'a Chain,
    settings: &'a Settings,
    accepted: Features,
}

impl Command<'_> {
    /// `None` for what is not known, was not negotiated or cannot be.
    fn carry_out(&self) -> Option<()> {
        let [class, command] = self.bytes_at::<2>(0)?.map(u32::from);
        match (class, command) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC) => {
                let on = self.mode()?;
                self.settings.change_filter(|filter| filter.promiscuous = on);
            }
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI) => {
                let on = self.mode()?;
                self.settings.change_filter(|filter| filter.all_multicast = on);
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => self.set_table()?,
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                self.needs(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                let mac = MacAddr(self.data()?);
                // A card's own address is not of a group.
                let [first, ..] = mac.0;
                if first & 1 != 0 {
                    return None;
                }
                self.settings.change_filter(|filter| filter.mac = mac);
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                self.needs(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                self.settings.announced();
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                self.needs(VIRTIO_NET_F_MQ)?;
                let pairs = usize::from(u16::from_le_bytes(self.data()?));
                if !(1..=self.settings.pairs_max()).contains(&pairs) {
                    return None;
                }
                self.settings.set_pairs(pairs);
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                self.needs(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                let on = u64::from_le_bytes(self.data()?);
                if on & !(self.accepted & GUEST_OFFLOADS) != 0 {
                    return None;
                }
                self.settings.set_offloads(self.accepted, on);
            }
            _ => return None,
        }
        Some(())
    }

    fn needs(&self, feature: u32) -> Option<()> {
        (self.accepted & 1 << feature != 0).then_some(())
    }

    fn mode(&self) -> Option<bool> {
        self.needs(VIRTIO_NET_F_CTRL_RX)?;
        let [on] = self.data()?;
        Some(on != 0)
    }

    /// Two tables, each behind a 32-bit count: unicast and multicast addresses.
    fn set_table(&self) -> Option<()> {
        self.needs(VIRTIO_NET_F_CTRL_RX)?;
        let (unicast, unicast_count, multicast_at) = self.table(COMMAND_BYTES, UNICAST_MAX)?;
        let (multicast, multicast_count, _) = self.table(multicast_at, MULTICAST_MAX)?;
        self.settings.change_filter(|filter| {
            filter.any_unicast = unicast_count > unicast.len();
            filter.any_multicast = multicast_count > multicast.len();
            (filter.unicast, filter.multicast) = (unicast, multicast);
        });
        Some(())
    }

    /// The addresses of the table at `at`, none when they are more than `max`; how many they are; where it ends.
    fn table(&self, at: u64, max: usize) -> Option<(Vec<MacAddr>, usize, u64)> {
        let count = u32::from_le_bytes(self.bytes_at(at)?);
        let first = at + 4;
        let end = first + ADDRESS_BYTES * u64::from(count);
        if end > self.chain.readable_bytes() {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        let kept = if count > max { 0 } else { count as u64 };
        let address = |index| self.bytes_at(first + ADDRESS_BYTES * index).map(MacAddr);
        Some(((0..kept).map(address).collect::<Option<_>>()?, count, end))
    }

    /// The command's data.
    fn data<const N: usize>(&self) -> Option<[u8; N]> {
        self.bytes_at(COMMAND_BYTES)
    }

    fn bytes_at<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.chain.read(self.ram, at, &mut bytes).ok()?.then_some(bytes)
    }
}
