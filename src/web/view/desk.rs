//! The pages of the house itself: the door (login, setup, trust), home, host, people, errors, about.

use super::*;

/// `/login`, and again (422) after a wrong password.
#[derive(Template)]
#[template(path = "login.html")]
pub struct LoginPage {
    pub chrome: Chrome,
    pub name: String,
    /// A path of this server to go to afterwards, "" for home.
    pub next: String,
    pub error: Option<String>,
}

/// `/setup`: the first administrator. With `refused` it shows no form.
#[derive(Template)]
#[template(path = "setup.html")]
pub struct SetupPage {
    pub chrome: Chrome,
    pub token: String,
    pub name: String,
    pub errors: FieldErrors,
    /// Why there is nothing to set up with this link, and what to do.
    pub refused: Option<String>,
}

/// `/trust`: how to trust this host's certificate authority.
#[derive(Template)]
#[template(path = "trust.html")]
pub struct TrustPage {
    pub chrome: Chrome,
    /// SHA-256 as [`fingerprint`] prints it.
    pub ca_fingerprint: String,
    pub leaf_fingerprint: String,
    /// Names and addresses the certificate is for.
    pub names: Vec<String>,
    pub leaf_until: Moment,
}

/// The one thing that needs a person, with the way to it.
#[derive(Clone, Debug)]
pub struct Need {
    pub level: Level,
    pub text: String,
    /// What the button says, and where it goes.
    pub button: String,
    pub path: String,
}

/// `/`. Live: `home-headline`, `home-meters`, `home-guests`, `home-activity`.
#[derive(Template)]
#[template(path = "home.html", blocks = ["headline", "meters", "guest_rows", "activity"])]
pub struct HomePage {
    pub chrome: Chrome,
    pub needs: Vec<Need>,
    pub gauges: Vec<Gauge>,
    pub guests: Vec<GuestLine>,
    /// Newest first; the page shows a handful.
    pub tasks: Vec<TaskLine>,
    pub events: Vec<EventLine>,
}

impl HomePage {
    /// "7 guests running, 2 stopped, nothing needs you."
    pub fn headline(&self) -> String {
        let of = |state: State| self.guests.iter().filter(|guest| guest.state == state).count();
        if self.guests.is_empty() {
            return "The house is empty.".to_owned();
        }
        let mut words = vec![format!("{} running", count(of(State::Running), "guest", "guests"))];
        for state in [
            State::Starting,
            State::Stopping,
            State::Paused,
            State::Suspended,
            State::Stopped,
            State::Failed,
            State::Unknown,
        ] {
            if of(state) > 0 {
                words.push(format!("{} {}", of(state), state.word()));
            }
        }
        match self.needs.len() {
            0 => words.push("nothing needs you".to_owned()),
            1 => words.push("one thing needs you".to_owned()),
            n => words.push(format!("{n} things need you")),
        }
        words.join(", ") + "."
    }
}

live!(HomePage: "home-headline" => as_headline, "home-meters" => as_meters, "home-guests" => as_guest_rows, "home-activity" => as_activity);

/// One line of what the doctor found.
#[derive(Clone, Debug)]
pub struct Finding {
    pub level: Level,
    /// "Hardware virtualization".
    pub what: String,
    /// "AMD-V, nested paging".
    pub detail: String,
    /// What to do, when something is not as it could be.
    pub remedy: Option<String>,
}

impl Finding {
    pub fn word(&self) -> &'static str {
        self.level.css()
    }
}

/// One network guests can join.
#[derive(Clone, Debug)]
pub struct NetworkLine {
    pub name: String,
    /// "NAT", "bridge", "user mode".
    pub kind: &'static str,
    pub subnet: String,
    pub guests: usize,
    pub level: Level,
    pub note: String,
}

/// `/host`.
#[derive(Template)]
#[template(path = "host.html")]
pub struct HostPage {
    pub chrome: Chrome,
    pub findings: Vec<Finding>,
    pub facts: Vec<Fact>,
    pub gauges: Vec<Gauge>,
    pub networks: Vec<NetworkLine>,
    pub ca_fingerprint: String,
    pub leaf_fingerprint: String,
    pub names: Vec<String>,
    pub leaf_until: Moment,
}

impl HostPage {
    /// "Guests can run; 1 thing could be better."
    pub fn verdict(&self) -> String {
        let of = |level: Level| self.findings.iter().filter(|finding| finding.level == level).count();
        match (of(Level::Missing), of(Level::Degraded)) {
            (0, 0) => "This host has everything guests need.".to_owned(),
            (0, n) => format!("Guests can run; {} could be better.", count(n, "thing", "things")),
            (n, _) => format!("{} missing.", count(n, "thing is", "things are")),
        }
    }
}

/// One user.
#[derive(Clone, Debug)]
pub struct UserLine {
    pub id: String,
    pub name: String,
    pub role: &'static str,
    pub created: Moment,
    pub last_login: Option<Moment>,
    pub is_you: bool,
}

/// One API token; its secret is shown once, when it is made.
#[derive(Clone, Debug)]
pub struct TokenLine {
    pub id: String,
    pub name: String,
    pub user: String,
    pub created: Moment,
    pub last_used: Option<Moment>,
}

/// `/users`, and again with errors (422) after its POSTs.
#[derive(Template)]
#[template(path = "users.html")]
pub struct UsersPage {
    pub chrome: Chrome,
    pub users: Vec<UserLine>,
    pub tokens: Vec<TokenLine>,
    /// What a new user may be: value is the role's word.
    pub roles: Vec<Choice>,
    /// The secret of the token just made.
    pub new_token: Option<String>,
    /// As typed in the form for a new user.
    pub name: String,
    pub errors: FieldErrors,
}

/// `/account`: one's own password, and again with errors (422).
#[derive(Template)]
#[template(path = "account.html")]
pub struct AccountPage {
    pub chrome: Chrome,
    pub errors: FieldErrors,
}

/// Every error a person sees.
#[derive(Template)]
#[template(path = "error.html")]
pub struct ErrorPage {
    pub chrome: Chrome,
    pub status: u16,
    /// "No such guest".
    pub title: String,
    /// What, why and what next.
    pub detail: String,
    /// Where to go on: label and path.
    pub next: Option<(String, String)>,
    /// For the log, when the fault is ours.
    pub request_id: Option<String>,
}

impl ErrorPage {
    pub fn leads_home(&self) -> bool {
        self.next.as_ref().is_some_and(|(_, path)| path == "/")
    }
}

/// `/about`: version, licence, and the licences of what the page is made of.
#[derive(Template)]
#[template(path = "about.html")]
pub struct AboutPage {
    pub chrome: Chrome,
    pub version: &'static str,
    pub packages: &'static [crate::web::assets::Package],
}
