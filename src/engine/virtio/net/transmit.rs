//! The way out: frames of the guest to the host's end, each behind a header that was checked.

use super::header;
use crate::engine::{
    addresses::LOOK_BYTES,
    memory::{GuestRam, RamVec},
    net_backend::{FRAME_BYTES_MAX, HEADER_BYTES, NetBackend},
    virtio::{
        Features,
        queue::{Chain, Malformed},
    },
};

/// Of one frame: no driver has more.
const PIECES_MAX: usize = 256;

/// Sends the frame in `chain`. What is no frame, or breaks the rules, is dropped. Call when the backend has room.
pub(super) fn send(
    ram: &GuestRam,
    chain: &Chain,
    backend: &mut NetBackend,
    features: Features,
    pieces: &mut RamVec,
) -> Result<(), Malformed> {
    let Some(frame_bytes) = chain.readable_bytes().checked_sub(HEADER_BYTES as u64) else { return Ok(()) };
    let frame_bytes = usize::try_from(frame_bytes).unwrap_or(usize::MAX);
    if !(1..=FRAME_BYTES_MAX).contains(&frame_bytes) || chain.readable.len() > PIECES_MAX {
        return Ok(());
    }
    // One copy of all that is looked at: what the guest changes afterwards is not seen.
    let mut beginning = [0; HEADER_BYTES + LOOK_BYTES];
    chain.read(ram, 0, &mut beginning).map_err(|_| Malformed)?;
    let Some((header, frame)) = beginning.split_first_chunk::<HEADER_BYTES>() else { return Ok(()) };
    let Some(header) = header::for_host(header, frame_bytes, features) else { return Ok(()) };
    let frame = frame.get(..frame_bytes.min(LOOK_BYTES)).unwrap_or_default();
    backend.send_chain(ram, chain, &header, frame, pieces)
}
