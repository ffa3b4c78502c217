//! The saved state of a TPM: registers, buffer, and what the emulator gives of its own.
//!
//! The permanent part is given back too, though the emulator keeps it in a file: the volatile part refers to it, and the guest's memory
//! and disks are of the same moment. After a suspension both are the same; after a return to an older moment a newer file would have
//! counters and keys that the guest does not know of.

use serde::{Deserialize, Serialize};

use super::{
    State, Tpm,
    emulator::{BLOB_BYTES_MAX, Blob, Blobs},
    worker::Commands,
};
use crate::engine::saved::{BadState, SaveState, State as SavedState, hex};

const KIND: &str = "tpm";

#[derive(Serialize, Deserialize)]
struct V1 {
    granted: bool,
    idle: bool,
    cancel: bool,
    #[serde(with = "hex")]
    buffer: Vec<u8>,
    /// `None` of a TPM that has failed.
    emulator: Option<EmulatorV1>,
}

#[derive(Serialize, Deserialize)]
struct EmulatorV1 {
    permanent: BlobV1,
    volatile: BlobV1,
    sleep: BlobV1,
}

#[derive(Serialize, Deserialize)]
struct BlobV1 {
    encrypted: bool,
    #[serde(with = "hex")]
    bytes: Vec<u8>,
}

impl From<&Blob> for BlobV1 {
    fn from(Blob { encrypted, bytes }: &Blob) -> BlobV1 {
        BlobV1 { encrypted: *encrypted, bytes: bytes.clone() }
    }
}

impl From<BlobV1> for Blob {
    fn from(BlobV1 { encrypted, bytes }: BlobV1) -> Blob {
        Blob { encrypted, bytes }
    }
}

impl SaveState for Tpm {
    /// A command that could not be waited for makes a TPM that has failed: `TpmHold::settle` comes first and says so.
    fn save(&self) -> SavedState {
        let settled = self.hold().settle().is_ok();
        let state = self.shared.lock();
        let State {
            granted,
            idle,
            cancel,
            buffer,
            settled: blobs,
            // None runs, and all wishes are carried out, or the TPM has failed.
            started: _,
            reset_wanted: _,
            cancel_wanted: _,
            // Follows from there being no state of the emulator.
            failed: _,
        } = &*state;
        let blobs = blobs.as_ref().and_then(Option::as_ref).filter(|_| settled);
        let emulator = blobs.map(|[permanent, volatile, sleep]| EmulatorV1 {
            permanent: permanent.into(),
            volatile: volatile.into(),
            sleep: sleep.into(),
        });
        let fields = V1 { granted: *granted, idle: *idle, cancel: *cancel, buffer: buffer.to_vec(), emulator };
        SavedState::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), BadState> {
        let V1 { granted, idle, cancel, buffer, emulator } = state.fields(KIND, 1)?;
        let buffer = buffer.try_into().map_err(|_| BadState::new(KIND, "its buffer has another size"))?;
        let failed = emulator.is_none();
        if let Some(EmulatorV1 { permanent, volatile, sleep }) = emulator {
            let blobs: Blobs = [permanent.into(), volatile.into(), sleep.into()];
            let bytes = blobs.iter().fold(0, |sum: usize, blob| sum.saturating_add(blob.bytes.len()));
            BadState::unless(bytes <= BLOB_BYTES_MAX, KIND, "it is longer than a TPM's")?;
            let resumed = self.worker.while_out(|commands: &mut Commands, _| commands.resume(&blobs));
            resumed.map_err(|error| BadState::new(KIND, format!("the emulator does not go on from it: {error}")))?;
        }
        *self.shared.lock() = State { granted, idle, cancel, failed, buffer, ..State::power_on() };
        Ok(())
    }
}
