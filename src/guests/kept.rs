//! What a guest keeps on the host beside its disks, and how it begins anew without it: settings of its firmware, and its TPM.

use std::{fs, io, path::Path};

use super::Guests;
use crate::{
    error::{Error, Result},
    state_files::{TPM, VARIABLES},
    store::{
        Tx,
        guests::{self as rows, GuestRow},
        users,
    },
    types::Id,
};

impl Guests {
    /// Takes the variables of a stopped UEFI guest away: its firmware starts as new, with the keys of Secure Boot as they were at first.
    ///
    /// Errors: `Conflict` while it runs, and when it has no such firmware.
    pub async fn reset_firmware(&self, who: &str, id: &Id) -> Result<()> {
        let reset = |row: &GuestRow, folder: &Path| {
            if !row.boot.is_uefi() {
                return Err(Error::conflict("The guest has no UEFI firmware, and so no settings of it."));
            }
            VARIABLES.iter().try_for_each(|name| gone(name, fs::remove_file(folder.join(name))))
        };
        self.reset(who, id, "reset_firmware_of_guest", reset).await
    }

    /// Takes away what the TPM of a stopped guest keeps, its keys above all: it starts as a new one. One that was switched off is kept
    /// until then.
    ///
    /// Errors: `Conflict` while it runs, and when it has no TPM.
    pub async fn reset_tpm(&self, who: &str, id: &Id) -> Result<()> {
        let reset = |row: &GuestRow, folder: &Path| {
            if !row.switches.tpm {
                return Err(Error::conflict("The guest has no TPM."));
            }
            gone(TPM, fs::remove_dir_all(folder.join(TPM)))
        };
        self.reset(who, id, "reset_tpm_of_guest", reset).await
    }

    async fn reset(
        &self,
        who: &str,
        id: &Id,
        action: &'static str,
        work: impl Fn(&GuestRow, &Path) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let supervisor = self.supervisor_of(id)?;
        let _busy = supervisor.busy.lock().await;
        self.must_rest(id, "reset")?;
        let (guest, who, folder) = (id.clone(), who.to_owned(), self.0.state_dir.join("guests").join(id.as_str()));
        let work = move |tx: &Tx| {
            let row = rows::by_id(tx, &guest)?.ok_or_else(|| Error::not_found("There is no such guest."))?;
            work(&row, &folder)?;
            users::audit(tx, &who, "", action, row.name.as_str(), guest.as_str())
        };
        self.0.around.store.writing(work).await
    }
}

/// What was not there is gone as well.
fn gone(name: &str, removed: io::Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::internal(format!("Cannot remove {name} of the guest."), error))
        }
        _ => Ok(()),
    }
}
