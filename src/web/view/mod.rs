//! The pages: one struct per template, whose fields are everything the template may know. Plain data, no policy.
//!
//! A page renders with `to_string()` or [`askama::Template::render`]. A page that changes while it is open implements [`Live`]:
//! its ids are listed on the struct, and `/events?scope=…` sends `page.fragments()` through [`event`].

mod desk;
mod guests;
mod library;
#[cfg(test)]
mod tests;
mod words;

pub use desk::*;
pub use guests::*;
pub use library::*;
pub use words::*;

use askama::Template;

/// What surrounds every page: the rail, the top bar, the message of the last action.
#[derive(Clone, Debug, Default)]
pub struct Chrome {
    /// Nobody on the pages in front of the door (login, setup, trust).
    pub user: Option<Who>,
    /// Goes into every form as the hidden field `csrf`.
    pub csrf: String,
    pub tab: Tab,
    /// Said once, above the page.
    pub flash: Option<Flash>,
    /// Tasks running now, for the ring in the top bar (id `task-ring`).
    pub running_tasks: usize,
    /// The host's name, beside the mark.
    pub host: String,
}

impl Chrome {
    /// What the ring says to a screen reader.
    pub fn tasks_words(&self) -> String {
        count(self.running_tasks, "task", "tasks") + " running"
    }
}

/// Who is logged in.
#[derive(Clone, Debug, Default)]
pub struct Who {
    pub name: String,
    pub role: &'static str,
    /// May see users, tokens and the host's settings.
    pub administrator: bool,
    /// May change guests and images; without it the buttons are left out.
    pub operator: bool,
}

/// The entry of the rail that is lit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tab {
    #[default]
    None,
    Home,
    Guests,
    Images,
    Tasks,
    Host,
    Users,
    Account,
    About,
}

/// One sentence about what just happened.
#[derive(Clone, Debug)]
pub struct Flash {
    pub level: Level,
    pub text: String,
}

/// How much something needs a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Fine, or for information.
    Ok,
    /// Works, less well than it could.
    Degraded,
    /// Does not work.
    Missing,
}

impl Level {
    /// The class suffix, also the word in JSON.
    pub fn css(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Degraded => "degraded",
            Level::Missing => "missing",
        }
    }

    pub fn icon(self) -> &'static str {
        match self {
            Level::Ok => "circle-check",
            Level::Degraded => "triangle-alert",
            Level::Missing => "circle-x",
        }
    }
}

/// What is wrong with a form, by field name; the empty name is the form as a whole.
#[derive(Clone, Debug, Default)]
pub struct FieldErrors(pub Vec<(String, String)>);

impl FieldErrors {
    pub fn add(&mut self, field: &str, message: impl Into<String>) {
        self.0.push((field.to_owned(), message.into()));
    }

    pub fn of(&self, field: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == field).map(|(_, message)| message.as_str())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One entry of a select.
#[derive(Clone, Debug)]
pub struct Choice {
    pub value: String,
    pub label: String,
}

/// A measured share with its history, for meters and table cells.
#[derive(Clone, Debug)]
pub struct Gauge {
    pub label: &'static str,
    /// "3.1 of 8 GiB".
    pub words: String,
    pub share: Percent,
    /// Shares from the oldest to now; fewer than two draw nothing.
    pub history: Vec<u8>,
}

impl Gauge {
    pub fn points(&self) -> String {
        spark_points(&self.history)
    }
}

/// Something that happened, for the lists of events.
#[derive(Clone, Debug)]
pub struct EventLine {
    pub at: Moment,
    pub level: Level,
    pub text: String,
    /// Where it happened: label and path.
    pub subject: Option<(String, String)>,
    pub who: Option<String>,
}

/// A page whose live area can be sent again while it is open.
pub trait Live {
    /// The live areas, each as an `<hx-partial>` for its id, ready for [`event`].
    fn fragments(&self) -> askama::Result<String>;
}

/// Wraps a rendered block, whose outermost element has the id `id`, so that the page replaces that element.
pub(crate) fn partial(id: &str, block: &impl Template) -> askama::Result<String> {
    Ok(format!("<hx-partial hx-target=\"#{id}\" hx-swap=\"outerMorph\">{}</hx-partial>\n", block.render()?.trim()))
}

/// The ring of running tasks in the top bar.
#[derive(Template)]
#[template(path = "task_ring.html")]
struct TaskRing<'a> {
    chrome: &'a Chrome,
}

/// Implements [`Live`]: `live!(Page: "id" => as_block, …)`. Every live page also sends the ring of running tasks.
macro_rules! live {
    ($page:ty: $($id:literal => $block:ident),+) => {
        impl Live for $page {
            fn fragments(&self) -> askama::Result<String> {
                let parts = [$(partial($id, &self.$block())?,)+ partial("task-ring", &TaskRing { chrome: &self.chrome })?];
                Ok(parts.concat())
            }
        }
    };
}
use live;

/// One unnamed server-sent event with the number `id` carrying `html`.
pub fn event(id: u64, html: &str) -> String {
    let html = html.replace("\r\n", "\n");
    let data: String = html.trim_end().split(['\r', '\n']).map(|line| format!("data: {line}\n")).collect();
    format!("id: {id}\n{data}\n")
}
