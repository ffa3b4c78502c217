//! The pages of guests: the list, the form that makes one, and the pages of one guest.

use super::*;
use crate::switches::{SWITCHES, Switch};

/// What a guest is doing, as people see it: a shape, a word and a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Running,
    Starting,
    Stopping,
    Paused,
    Stopped,
    /// Its state is on disk.
    Suspended,
    Failed,
    /// The engine or the host does not answer.
    Unknown,
}

impl State {
    /// The word on the page, and the class suffix.
    pub fn word(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Starting => "starting",
            State::Stopping => "stopping",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Suspended => "suspended",
            State::Failed => "failed",
            State::Unknown => "unknown",
        }
    }

    /// There is an engine, so there is a screen and a serial console.
    pub fn has_screen(self) -> bool {
        matches!(self, State::Running | State::Starting | State::Stopping | State::Paused)
    }
}

/// Which actions make sense now, by the lifecycle table and the reader's role. The page offers exactly these.
#[derive(Clone, Copy, Debug, Default)]
pub struct Actions {
    pub start: bool,
    pub shutdown: bool,
    pub power_off: bool,
    pub reset: bool,
    pub pause: bool,
    pub suspend: bool,
    /// A saved state may be taken away.
    pub discard: bool,
    pub resume: bool,
    /// Hardware may be changed now.
    pub edit: bool,
    /// Disks may come and go while the guest runs.
    pub plug: bool,
    /// A running guest may be asked to give memory back.
    pub memory: bool,
    /// The CD may be changed now.
    pub cd: bool,
    pub delete: bool,
    /// May type into the consoles.
    pub console_input: bool,
}

impl Actions {
    /// What starting means now.
    pub fn start_word(&self) -> &'static str {
        if self.discard { "Resume" } else { "Start" }
    }
}

/// One guest in a list.
#[derive(Clone, Debug)]
pub struct GuestLine {
    pub id: String,
    pub name: String,
    pub note: String,
    pub state: State,
    /// Why it failed or was paused, or what it waits for.
    pub reason: Option<String>,
    pub since: Option<Moment>,
    pub address: Option<String>,
    pub cpus: u32,
    pub memory: Bytes,
    pub cpu: Option<Gauge>,
    pub actions: Actions,
    /// Other ways to start it, this once.
    pub starts: Vec<Choice>,
}

/// `/guests`. Live: `guest-count`, `guest-rows`.
#[derive(Template)]
#[template(path = "guests/list.html", blocks = ["count", "rows"])]
pub struct GuestsPage {
    pub chrome: Chrome,
    /// `?q=`, as typed; `guests` is already filtered by it.
    pub query: String,
    pub guests: Vec<GuestLine>,
    /// What keeps guests from running on this host at all.
    pub obstacle: Option<Finding>,
}

impl GuestsPage {
    /// "7 guests, 5 running".
    pub fn summary(&self) -> String {
        if self.guests.is_empty() {
            return "none".to_owned();
        }
        let running = self.guests.iter().filter(|guest| guest.state == State::Running).count();
        format!("{}, {running} running", count(self.guests.len(), "guest", "guests"))
    }
}

live!(GuestsPage: "guest-count" => as_count, "guest-rows" => as_rows);

/// What the create form (and, minus the disks, the hardware form) holds, exactly as typed.
#[derive(Clone, Debug)]
pub struct GuestFields {
    pub name: String,
    pub cpus: String,
    pub sockets: String,
    /// Of a core.
    pub threads: String,
    pub memory: String,
    /// "disk", "kernel" or "test".
    pub boot: String,
    pub disk_size: String,
    pub disk_image: String,
    pub disk_bus: String,
    pub cdrom: String,
    pub kernel: String,
    pub initrd: String,
    pub cmdline: String,
    pub firmware: String,
    /// What firmware tries, first to last: the words of devices, "" for none.
    pub boot_order: Vec<String>,
    pub network: String,
    pub network_model: String,
    pub watchdog: String,
    pub cpu_model: String,
    /// What a running guest keeps.
    pub memory_now: String,
    pub switches: Vec<SwitchField>,
    pub start: bool,
}

impl GuestFields {
    /// Whether something is not as it is for most guests, of what is folded away.
    pub fn is_unusual(&self) -> bool {
        let usual = [(&self.sockets, "1"), (&self.threads, "1"), (&self.watchdog, "none"), (&self.cpu_model, "host")];
        usual.iter().any(|(value, usual)| value != usual) || self.switches.iter().any(|switch| switch.value != "off")
    }

    /// The device that is tried at this place of the boot order, from 0; "" for none.
    pub fn tried_at(&self, at: &usize) -> &str {
        self.boot_order.get(*at).map_or("", String::as_str)
    }
}

impl Default for GuestFields {
    fn default() -> GuestFields {
        let [sockets, threads] = ["1"; 2].map(str::to_owned);
        let [name, disk_image, cdrom, kernel, initrd, cmdline, firmware] = [""; 7].map(str::to_owned);
        let [cpus, memory, boot, disk_size] = ["2", "2G", "disk", "16G"].map(str::to_owned);
        let [disk_bus, network, network_model] = ["virtio", "nat", "virtio"].map(str::to_owned);
        GuestFields {
            name,
            cpus,
            sockets,
            threads,
            memory,
            boot,
            disk_size,
            disk_image,
            disk_bus,
            cdrom,
            kernel,
            initrd,
            cmdline,
            firmware,
            boot_order: Vec::new(),
            network,
            network_model,
            watchdog: "none".to_owned(),
            cpu_model: "host".to_owned(),
            memory_now: String::new(),
            switches: switch_fields(|_| on_or_off(false).to_owned()),
            start: true,
        }
    }
}

/// A switch of a guest in a form.
#[derive(Clone, Debug)]
pub struct SwitchField {
    pub switch: &'static Switch,
    /// "on" or "off", or what was typed.
    pub value: String,
}

impl SwitchField {
    pub fn choices(&self) -> Vec<Choice> {
        let choice = |on, label: &str| Choice { value: on_or_off(on).to_owned(), label: label.to_owned() };
        vec![choice(false, self.switch.off), choice(true, self.switch.on)]
    }
}

pub fn on_or_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// The fields of all switches.
pub fn switch_fields(value: impl Fn(&Switch) -> String) -> Vec<SwitchField> {
    SWITCHES.iter().map(|switch| SwitchField { switch, value: value(switch) }).collect()
}

/// What the selects of the guest forms offer.
#[derive(Clone, Debug, Default)]
pub struct GuestChoices {
    /// CD images; the form adds "no CD".
    pub cds: Vec<Choice>,
    /// Disk images; the form adds "an empty disk".
    pub disks: Vec<Choice>,
    /// Files that can be a kernel or an initrd.
    pub boot_files: Vec<Choice>,
    /// `nat`, `user`, `none`, `bridge:NAME`, with labels that say what they do.
    pub networks: Vec<Choice>,
    pub firmwares: Vec<Choice>,
    pub watchdogs: Vec<Choice>,
    pub cpu_models: Vec<Choice>,
    /// "This host has 8 CPUs and 31 GiB of memory, 12 GiB of it free."
    pub host_words: String,
}

/// `/guests/new`, and again with errors (422) after `POST /guests`.
#[derive(Template)]
#[template(path = "guests/new.html")]
pub struct GuestNewPage {
    pub chrome: Chrome,
    pub fields: GuestFields,
    pub errors: FieldErrors,
    pub choices: GuestChoices,
}

/// The tab of a guest that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestTab {
    Overview,
    Console,
    Serial,
    Hardware,
    Log,
}

/// The header every page of a guest has: name, state, actions, tabs. Live: `guest-head`.
#[derive(Clone, Debug)]
pub struct GuestHead {
    pub id: String,
    pub name: String,
    pub tab: GuestTab,
    pub state: State,
    pub reason: Option<String>,
    pub since: Option<Moment>,
    pub address: Option<String>,
    pub actions: Actions,
    /// Other ways to start it, this once.
    pub starts: Vec<Choice>,
    /// Its screen takes the size that this person's window asks for.
    pub resizes: bool,
}

impl GuestHead {
    /// "since" for what lasts, nothing for what passes.
    pub fn lasting(&self) -> bool {
        !matches!(self.state, State::Starting | State::Stopping)
    }

    /// "web01 is stopped".
    pub fn sentence(&self) -> String {
        match self.state {
            State::Failed => format!("{} has failed", self.name),
            State::Unknown => format!("{} does not answer", self.name),
            state => format!("{} is {}", self.name, state.word()),
        }
    }

    /// What opens the serial console in a terminal on the host.
    pub fn console_command(&self) -> String {
        format!("innkeeper guest console {}", self.name)
    }
}

/// The header alone: what is live on the console, serial and hardware pages.
#[derive(Template)]
#[template(path = "guests/head.html")]
pub struct GuestHeadPart<'a> {
    pub chrome: &'a Chrome,
    pub guest: &'a GuestHead,
}

impl<'a> GuestHeadPart<'a> {
    fn as_head(&self) -> GuestHeadPart<'a> {
        GuestHeadPart { chrome: self.chrome, guest: self.guest }
    }
}

live!(GuestHeadPart<'_>: "guest-head" => as_head);

/// One line of what a guest is made of: "Memory", "4 GiB".
#[derive(Clone, Debug)]
pub struct Fact {
    pub label: &'static str,
    pub value: String,
    /// An identifier, address or size that people copy.
    pub copy: bool,
}

/// One disk of a guest.
#[derive(Clone, Debug)]
pub struct DiskLine {
    pub id: String,
    /// "Disk 1".
    pub label: String,
    pub size: Bytes,
    /// What it takes on the host.
    pub used: Option<Bytes>,
    /// "virtio", "nvme", "ahci" or "usb".
    pub bus: String,
    pub note: String,
    /// It can be taken out of the running guest.
    pub removable: bool,
    /// When it can be limited: what is typed for bytes and operations a second.
    pub limit: Option<[String; 2]>,
}

/// `/guests/{id}`. Live: `guest-head`, `guest-live`.
#[derive(Template)]
#[template(path = "guests/overview.html", blocks = ["live"])]
pub struct GuestPage {
    pub chrome: Chrome,
    pub guest: GuestHead,
    /// "2 vCPUs, 4 GiB, BIOS, one disk of 32 GiB, network nat."
    pub words: String,
    pub facts: Vec<Fact>,
    pub disks: Vec<DiskLine>,
    /// The image in the CD drive.
    pub cd: Option<String>,
    pub gauges: Vec<Gauge>,
    pub events: Vec<EventLine>,
    /// What keeps this guest from being started on this host.
    pub obstacle: Option<Finding>,
}

impl GuestPage {
    fn as_head(&self) -> GuestHeadPart<'_> {
        GuestHeadPart { chrome: &self.chrome, guest: &self.guest }
    }
}

live!(GuestPage: "guest-head" => as_head, "guest-live" => as_live);

/// `/guests/{id}/console`: the screen. Live: `guest-head`.
#[derive(Template)]
#[template(path = "guests/console.html")]
pub struct GuestConsolePage {
    pub chrome: Chrome,
    pub guest: GuestHead,
    /// What the serial console says now, for readers without JavaScript; lossy UTF-8, control characters removed.
    pub scrollback: String,
}

/// `/guests/{id}/serial`. Sent with the nonce in its Content-Security-Policy, always as a full load. Live: `guest-head`.
#[derive(Template)]
#[template(path = "guests/serial.html")]
pub struct GuestSerialPage {
    pub chrome: Chrome,
    pub guest: GuestHead,
    pub nonce: String,
    /// As [`GuestConsolePage::scrollback`].
    pub scrollback: String,
}

/// `/guests/{id}/hardware`, and again with errors (422) after its POSTs. Live: `guest-head`.
#[derive(Template)]
#[template(path = "guests/hardware.html")]
pub struct GuestHardwarePage {
    pub chrome: Chrome,
    pub guest: GuestHead,
    /// `disk_size` and `disk_image` are the disk to add.
    pub fields: GuestFields,
    pub errors: FieldErrors,
    pub choices: GuestChoices,
    pub disks: Vec<DiskLine>,
    /// The id of the image in the CD drive, "" when it is empty.
    pub cd: String,
    /// Has firmware that stores variables.
    pub uefi: bool,
    pub tpm: bool,
    /// What it can boot from.
    pub boot_devices: Vec<Choice>,
}

/// `/guests/{id}/log`: what the engine and the firmware's debug console wrote. Live: `guest-head`, `guest-log`.
#[derive(Template)]
#[template(path = "guests/log.html", blocks = ["log"])]
pub struct GuestLogPage {
    pub chrome: Chrome,
    pub guest: GuestHead,
    /// The end of the log, lossy UTF-8.
    pub text: String,
    /// Bytes before `text` that this page leaves out.
    pub left_out: Bytes,
}

impl GuestLogPage {
    fn as_head(&self) -> GuestHeadPart<'_> {
        GuestHeadPart { chrome: &self.chrome, guest: &self.guest }
    }
}

live!(GuestLogPage: "guest-head" => as_head, "guest-log" => as_log);

/// `/guests/{id}/delete`: asks for the name, and says what goes with it.
#[derive(Template)]
#[template(path = "guests/delete.html")]
pub struct GuestDeletePage {
    pub chrome: Chrome,
    pub guest: GuestHead,
    pub disks: Vec<DiskLine>,
    pub errors: FieldErrors,
    pub confirm: String,
}

impl GuestDeletePage {
    pub fn confirm_label(&self) -> String {
        format!("To delete it, write its name: {}", self.guest.name)
    }
}
