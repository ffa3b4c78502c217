//! Physical region pages (NVM Express 1.4, section 4.3): where a command's data is in guest memory.

use super::{
    super::memory::{Gpa, GuestRam, RamSpan},
    PAGE_BYTES,
    command::{Command, Status},
};

const PAGE: u64 = PAGE_BYTES as u64;
const ENTRY_BYTES: usize = 8;

/// Bytes of one transfer, at most (MDTS). With pages of 4 KiB that is 257 pieces, which the host's kernel moves in one call, and
/// which end in at most three pages of a list, so that no list is long enough to be a loop.
pub(super) const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// The same for Identify: `log2` in units of the smallest page.
pub(super) const MDTS: u8 = (TRANSFER_BYTES_MAX / PAGE_BYTES).trailing_zeros() as u8;

/// Puts the spans of a command's first `bytes` bytes, at least one and at most [`TRANSFER_BYTES_MAX`], into `spans`. Neighbours
/// are one span. Whether they are RAM is not checked here.
pub(super) fn gather(ram: &GuestRam, command: &Command, bytes: u32, spans: &mut Vec<RamSpan>) -> Result<(), Status> {
    spans.clear();
    if bytes > TRANSFER_BYTES_MAX {
        return Err(Status::INVALID_FIELD);
    }
    if !command.prp1.is_multiple_of(4) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let first = bytes.min(PAGE_BYTES - (command.prp1 % PAGE) as u32);
    push(spans, command.prp1, first);
    match bytes - first {
        0 => Ok(()),
        rest @ 1..=PAGE_BYTES => push_page(spans, command.prp2, rest).map(|_| ()),
        rest => walk(ram, command.prp2, rest, spans),
    }
}

/// Walks a list from `at`. When a page of it does not hold all that is left, its last entry is where the list goes on.
fn walk(ram: &GuestRam, mut at: u64, mut rest: u32, spans: &mut Vec<RamSpan>) -> Result<(), Status> {
    if !at.is_multiple_of(ENTRY_BYTES as u64) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    loop {
        let slots = ((PAGE - at % PAGE) as usize) / ENTRY_BYTES;
        let pages = rest.div_ceil(PAGE_BYTES) as usize;
        let mut bytes = [0; PAGE_BYTES as usize];
        let list = bytes.get_mut(..slots.min(pages) * ENTRY_BYTES).unwrap_or_default();
        ram.read(Gpa(at), list).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        let mut entries = list.as_chunks::<ENTRY_BYTES>().0.iter().map(|entry| u64::from_le_bytes(*entry));
        let next = if pages > slots { entries.next_back() } else { None };
        for page in entries {
            rest -= push_page(spans, page, rest)?;
        }
        match next {
            // Every further page of the list holds entries, and `rest` only falls.
            Some(page) if page.is_multiple_of(PAGE) => at = page,
            Some(_) => return Err(Status::INVALID_PRP_OFFSET),
            None => return Ok(()),
        }
    }
}

/// A page, or the part of it that is left. Returns its bytes.
fn push_page(spans: &mut Vec<RamSpan>, page: u64, rest: u32) -> Result<u32, Status> {
    if !page.is_multiple_of(PAGE) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let bytes = rest.min(PAGE_BYTES);
    push(spans, page, bytes);
    Ok(bytes)
}

fn push(spans: &mut Vec<RamSpan>, at: u64, bytes: u32) {
    match spans.last_mut() {
        Some(last) if last.at.0.checked_add(u64::from(last.bytes)) == Some(at) => last.bytes += bytes,
        _ => spans.push(RamSpan { at: Gpa(at), bytes }),
    }
}

/// Writes `data` to where the command wants it.
pub(super) fn give(ram: &GuestRam, command: &Command, mut data: &[u8], spans: &mut Vec<RamSpan>) -> Result<(), Status> {
    let bytes = u32::try_from(data.len()).map_err(|_| Status::INVALID_FIELD)?;
    gather(ram, command, bytes, spans)?;
    for span in spans {
        let (part, rest) = data.split_at_checked(span.bytes as usize).ok_or(Status::DATA_TRANSFER_ERROR)?;
        ram.write(span.at, part).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        data = rest;
    }
    Ok(())
}

/// Fills `data` from where the command says.
pub(super) fn take(ram: &GuestRam, command: &Command, data: &mut [u8], spans: &mut Vec<RamSpan>) -> Result<(), Status> {
    let bytes = u32::try_from(data.len()).map_err(|_| Status::INVALID_FIELD)?;
    gather(ram, command, bytes, spans)?;
    let mut rest = data;
    for span in spans {
        let (part, more) = rest.split_at_mut_checked(span.bytes as usize).ok_or(Status::DATA_TRANSFER_ERROR)?;
        ram.read(span.at, part).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        rest = more;
    }
    Ok(())
}
