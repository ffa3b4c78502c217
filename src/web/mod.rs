//! The web role: HTTPS server, pages, API, consoles. Nothing below it knows HTTP.

pub mod assets;
pub mod console;
pub mod door;
pub mod events;
pub mod form;
pub mod guard;
pub mod guest_api;
pub mod guest_forms;
pub mod guest_words;
pub mod guests;
pub mod home;
pub mod host;
pub mod images;
pub mod listen;
pub mod look_only;
pub mod multipart;
pub mod page;
pub mod people;
pub mod role;
pub mod tasks;
pub mod tls;
pub mod view;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use actix_web::web;
use tokio_util::sync::CancellationToken;

use self::{
    guard::Caller,
    view::{Chrome, Flash, Level, Tab, Who},
};
use crate::{
    auth::Auth,
    changes::{Change, Changes},
    error::{Error, Result},
    guests::Guests,
    host_client::HostClient,
    images::Images,
    store::{
        Store,
        guests::GuestRow,
        users::{self, Role},
    },
    tasks::Tasks,
    types::{Id, shorten},
};

/// The services behind the handlers: `state: web::Data<State>`.
pub struct State {
    pub store: Arc<Store>,
    pub changes: Changes,
    pub host: HostClient,
    pub auth: Auth,
    pub tasks: Tasks,
    pub images: Images,
    pub guests: Guests,
    pub findings: host::Findings,
    pub certificate: tls::Certificate,
    /// Cancelled when the server ends.
    pub ending: CancellationToken,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    /// Of the HTTPS listener; part of the cookie's name.
    pub port: u16,
    /// The host's name, beside the mark.
    pub host_name: String,
    /// One sentence for a login's next page.
    flashes: Mutex<HashMap<Id, Flash>>,
}

impl State {
    /// What surrounds a page for this caller. Takes the message of the last action with it.
    pub fn chrome(&self, caller: &Caller, tab: Tab) -> Chrome {
        Chrome { flash: self.take_flash(caller), ..self.quiet_chrome(caller, tab) }
    }

    /// The same for fragments, which leave the message for the next page.
    pub fn quiet_chrome(&self, caller: &Caller, tab: Tab) -> Chrome {
        Chrome {
            user: Some(Who {
                name: caller.name.clone(),
                role: caller.role.as_str(),
                administrator: caller.role >= Role::Administrator,
                operator: caller.role >= Role::Operator,
            }),
            csrf: caller.csrf.clone(),
            tab,
            flash: None,
            running_tasks: self.tasks.running_count(),
            host: self.host_name.clone(),
        }
    }

    /// The frame of the pages in front of the door.
    pub fn door_chrome(&self) -> Chrome {
        Chrome { host: self.host_name.clone(), ..Chrome::default() }
    }

    /// Says something on the caller's next page.
    pub fn flash(&self, caller: &Caller, level: Level, text: impl Into<String>) {
        if let Some(login) = caller.login() {
            let flash = Flash { level, text: text.into() };
            self.flashes.lock().unwrap_or_else(PoisonError::into_inner).insert(login.clone(), flash);
        }
    }

    /// Adds a line to the audit trail.
    pub async fn audit(&self, caller: &Caller, action: &str, subject: &str, detail: &str) -> Result<()> {
        let (who, address) = (caller.name.clone(), caller.address.to_string());
        let (action, subject, detail) = (action.to_owned(), shorten(subject), shorten(detail));
        self.store.writing(move |tx| users::audit(tx, &who, &address, &action, &subject, &detail)).await
    }

    /// Adds a line about a guest, which its page shows at once.
    pub async fn audit_guest(&self, caller: &Caller, action: &str, guest: &GuestRow) -> Result<()> {
        self.audit(caller, &format!("{action}_guest"), guest.name.as_str(), guest.id.as_str()).await?;
        self.changes.tell(Change::Guest(guest.id.clone()));
        Ok(())
    }

    fn take_flash(&self, caller: &Caller) -> Option<Flash> {
        self.flashes.lock().unwrap_or_else(PoisonError::into_inner).remove(caller.login()?)
    }
}

/// All routes, one function an area. Each handler says by a parameter who may use it.
pub fn routes(app: &mut web::ServiceConfig) {
    app.configure(home::routes)
        .configure(door::routes)
        .configure(guest_api::routes)
        .configure(console::routes)
        .configure(guests::routes)
        .configure(images::routes)
        .configure(tasks::routes)
        .configure(host::routes)
        .configure(people::routes)
        .configure(events::routes)
        .default_service(web::to(nothing_here));
}

async fn nothing_here() -> Result<actix_web::HttpResponse> {
    Err(Error::not_found("There is nothing at this address."))
}
