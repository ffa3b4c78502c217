//! What a supervisor does about a guest that is suspended, or should go on.

use tokio::sync::oneshot;

use super::Task;
use crate::{
    error::{Error, ErrorKind, Result},
    guests::{
        lifecycle::{Event, State, step},
        suspended,
    },
    store::guests,
    wire::{EndKind, EngineAction, EngineEnd, HostRequest},
};

impl Task {
    /// Has the engine write the guest's state into a file that `hostd` opens.
    pub(super) fn send_suspend(&self, reply: oneshot::Sender<Result<()>>) {
        let Some(client) = self.client() else {
            let _ = reply.send(Err(Error::new(ErrorKind::Unavailable, "The engine does not answer now; try again.")));
            return;
        };
        let (host, guest) = (self.around.host.clone(), self.guest.clone());
        tokio::spawn(async move {
            let result = match host.call(HostRequest::OpenSuspend(guest)).await {
                Ok((_, mut files)) => client.call(EngineAction::Suspend, files.pop()).await.map(|_| ()),
                Err(error) => Err(error),
            };
            let _ = reply.send(result);
        });
    }

    /// The saved state is of no more use.
    pub(super) async fn forget_saved(&mut self) {
        self.saved = false;
        // The row first: what is left when power goes in between is a spent file, which the next server takes away, or a whole one, from
        // which the guest still goes on. A row without its file would need a person.
        let guest = self.guest.clone();
        self.log(self.around.store.writing(move |tx| guests::set_suspended(tx, &guest, false)).await);
        suspended::remove(&self.around.state_dir, &self.guest);
    }

    /// The guest did not go on from its saved state, which is still there, or else is forgotten.
    pub(super) async fn not_resumed(&mut self, reason: String) {
        let Ok((next, _)) = step(self.state(), Event::ResumeFailed) else { return };
        let guest = self.guest.clone();
        self.log(self.around.store.writing(move |tx| guests::set_desired(tx, &guest, false)).await);
        self.enter(next, Some(format!("The guest could not go on: {reason}")));
    }

    /// Keeps what the engine wrote; without it the guest has failed.
    pub(super) async fn suspended(&mut self, next: State, end: EngineEnd) -> (State, EngineEnd) {
        if let Err(error) = suspended::keep(&self.around.state_dir, &self.guest) {
            let reason = format!("the guest was suspended, and its saved state is gone: {error}");
            return (State::Failed, EngineEnd { how: EndKind::Failed, reason });
        }
        self.saved = true;
        let guest = self.guest.clone();
        let kept = self.around.store.writing(move |tx| {
            guests::set_suspended(tx, &guest, true)?;
            guests::set_desired(tx, &guest, false)
        });
        self.log(kept.await);
        (next, end)
    }
}
