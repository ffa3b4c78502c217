//! A buffer that was taken from its queue and is not used while nothing is served: it waits for a frame, and is neither lost by a
//! pause nor by a sleep of the guest.
//!
//! The worker has it while it serves, and leaves it here before it comes out; so nothing is locked for each request. The queue's
//! own state, which the transport saves, counts it as taken.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::queue::{self, Chain, Malformed};
use crate::engine::memory::{Gpa, GuestRam, RamSpan};

/// The place. Clones are the same one.
#[derive(Clone, Default)]
pub(super) struct Parked(Arc<Mutex<Option<Chain>>>);

/// What is saved of it. Part of a device's first version.
#[derive(Serialize, Deserialize)]
pub(super) struct ParkedV1 {
    head: u16,
    /// Addresses and bytes.
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

/// As of a chain that is taken from its queue.
const CHAIN_BYTES_MAX: u64 = 1 << 30;
/// A chain has fewer descriptors: tables of descriptors have 16-bit indexes.
const SPANS_MAX: usize = 1 << 16;

impl Parked {
    pub(super) fn put(&self, chain: Chain) {
        *self.lock() = Some(chain);
    }

    /// Takes the request out. It is checked as a chain is when it is taken from its queue, as it may have come from a file.
    pub(super) fn take(&self, ram: &GuestRam) -> Result<Option<Chain>, Malformed> {
        let Some(chain) = self.lock().take() else { return Ok(None) };
        let small = queue::bytes(&chain.readable).saturating_add(queue::bytes(&chain.writable)) <= CHAIN_BYTES_MAX;
        let inside = chain.readable.iter().chain(&chain.writable).all(|span| ram.contains(*span));
        if small && inside { Ok(Some(chain)) } else { Err(Malformed) }
    }

    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    pub(super) fn save(&self) -> Option<ParkedV1> {
        let plain = |spans: &[RamSpan]| spans.iter().map(|span| (span.at.0, span.bytes)).collect();
        let parked = self.lock();
        let Chain { head, readable, writable } = parked.as_ref()?;
        Some(ParkedV1 { head: *head, readable: plain(readable), writable: plain(writable) })
    }

    /// Says what cannot be.
    pub(super) fn restore(&self, fields: Option<ParkedV1>) -> Result<(), &'static str> {
        let spans =
            |list: Vec<(u64, u32)>| list.into_iter().map(|(at, bytes)| RamSpan { at: Gpa(at), bytes }).collect();
        let chain = match fields {
            None => None,
            Some(ParkedV1 { readable, writable, .. }) if readable.len() + writable.len() > SPANS_MAX => {
                return Err("a request has fewer pieces");
            }
            Some(ParkedV1 { head, readable, writable }) => {
                Some(Chain { head, readable: spans(readable), writable: spans(writable) })
            }
        };
        *self.lock() = chain;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Chain>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
