//! What of a guest's life outlives the server: why it failed, whether it is meant to be on, lines of its history.

use super::Task;
use crate::{
    error::Result,
    store::{
        Tx, guests,
        users::{self, FAILED, SWITCHED_OFF},
    },
    types::Id,
};

impl Task {
    pub(super) async fn keep_failure(&self, reason: &str) {
        let (guest, reason) = (self.guest.clone(), reason.to_owned());
        self.log(self.around.store.writing(move |tx| guests::set_failure(tx, &guest, Some(&reason))).await);
    }

    /// What must outlive the server of an end, and a line in the guest's history for one that nobody ordered.
    pub(super) async fn keep_end(&self, failure: Option<String>) {
        let (guest, ordered) = (self.guest.clone(), self.pulled);
        let kept = self.around.store.writing(move |tx| {
            let action = match &failure {
                Some(reason) => {
                    guests::set_failure(tx, &guest, Some(reason))?;
                    FAILED
                }
                None => {
                    guests::set_desired(tx, &guest, false)?;
                    SWITCHED_OFF
                }
            };
            if ordered { Ok(()) } else { in_history(tx, &guest, action) }
        });
        self.log(kept.await);
    }

    /// A line in the guest's history.
    pub(super) async fn note(&self, action: &'static str) {
        let guest = self.guest.clone();
        self.log(self.around.store.writing(move |tx| in_history(tx, &guest, action)).await);
    }
}

/// What the guest did by itself.
fn in_history(tx: &Tx, guest: &Id, action: &str) -> Result<()> {
    match guests::by_id(tx, guest)? {
        Some(row) => users::audit(tx, "guest", "", action, row.name.as_str(), guest.as_str()),
        None => Ok(()),
    }
}
