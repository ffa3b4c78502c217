//! What changed, told to everybody who shows it. Carries no data: a listener reads the new state itself, so a lost or doubled word is harmless.

use tokio::sync::broadcast;

use crate::types::Id;

/// Something whose shown state is another one now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Change {
    /// Its state, its configuration, that it exists.
    Guest(Id),
    Images,
    Task(Id),
    /// Users, networks, findings.
    Host,
}

/// A listener that falls this far behind reads everything anew.
const BACKLOG: usize = 256;

#[derive(Clone)]
pub struct Changes(broadcast::Sender<Change>);

impl Default for Changes {
    fn default() -> Changes {
        Changes(broadcast::Sender::new(BACKLOG))
    }
}

impl Changes {
    pub fn tell(&self, change: Change) {
        // No listener is no error.
        let _ = self.0.send(change);
    }

    /// Everything told from now on. `Lagged` means: read everything anew.
    pub fn listen(&self) -> broadcast::Receiver<Change> {
        self.0.subscribe()
    }
}
