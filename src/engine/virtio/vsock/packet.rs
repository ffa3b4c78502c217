//! Packets of a virtio socket (virtio 1.2, 5.10.6): a header of 44 bytes, then data.

pub(super) const HEADER_BYTES: usize = 44;
/// The host's context id (5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The only type of socket here.
pub(super) const STREAM: u16 = 1;

pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: the sender receives no more, sends no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub(super) from_cid: u64,
    pub(super) to_cid: u64,
    pub(super) from_port: u32,
    pub(super) to_port: u32,
    /// Bytes of data behind the header.
    pub(super) bytes: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// What the sender's buffer for this connection holds altogether.
    pub(super) room_bytes: u32,
    /// How much the sender has taken out of that buffer, counted on and on.
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn from_bytes(raw: &[u8; HEADER_BYTES]) -> Header {
        let number = |at: usize, bytes: usize| {
            raw.iter().skip(at).take(bytes).rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Header {
            from_cid: number(0, 8),
            to_cid: number(8, 8),
            from_port: number(16, 4) as u32,
            to_port: number(20, 4) as u32,
            bytes: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            room_bytes: number(36, 4) as u32,
            forwarded: number(40, 4) as u32,
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let Header { from_cid, to_cid, from_port, to_port, bytes, kind, op, flags, room_bytes, forwarded } = self;
        let mut raw = [0; HEADER_BYTES];
        let numbers = [from_cid, to_cid, join(from_port, to_port)];
        let last = [u64::from(bytes) | u64::from(kind) << 32 | u64::from(op) << 48, join(flags, room_bytes)];
        for (into, number) in raw.chunks_mut(8).zip(numbers.into_iter().chain(last)) {
            into.copy_from_slice(&number.to_le_bytes());
        }
        if let Some(into) = raw.last_chunk_mut() {
            *into = forwarded.to_le_bytes();
        }
        raw
    }

    /// What answers a packet that belongs to no connection.
    pub(super) fn reset_of(self) -> Header {
        Header {
            from_cid: self.to_cid,
            to_cid: self.from_cid,
            from_port: self.to_port,
            to_port: self.from_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_is_written() {
        let raw: [u8; HEADER_BYTES] = std::array::from_fn(|at| at as u8 + 1);
        let header = Header::from_bytes(&raw);
        assert_eq!((header.from_cid, header.to_port), (0x0807_0605_0403_0201, 0x1817_1615));
        assert_eq!((header.kind, header.op, header.forwarded), (0x1e1d, 0x201f, 0x2c2b_2a29));
        assert_eq!(header.to_bytes(), raw);
    }
}
