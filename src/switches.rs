//! What a guest has or has not beside what each machine has: one table, from which engine, API, command line, pages and database take it.
//!
//! One more is an entry in it, a column of its name in `store/migrations`, and the device that looks at it.

use serde::{Deserialize, Serialize};

macro_rules! switches {
    ($($(#[doc = $help:literal])+ $key:ident: $label:literal, $off:literal | $on:literal, $hint:literal;)+) => {
        /// What a guest has.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Switches {
            $($(#[doc = $help])+ pub $key: bool,)+
        }

        /// What somebody wants of them; the others stay as they are.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct SwitchWishes {
            $($(#[doc = $help])+ #[serde(skip_serializing_if = "Option::is_none")] pub $key: Option<bool>,)+
        }

        /// All of them, in the order of the forms.
        pub const SWITCHES: &[Switch] = &[$(Switch {
            key: stringify!($key),
            help: concat!($($help),+),
            label: $label,
            off: $off,
            on: $on,
            hint: $hint,
            get: |switches| switches.$key,
            set: |switches, on| switches.$key = on,
            wished: |wishes| wishes.$key,
            wish: |wishes, on| wishes.$key = on,
        },)+];
    };
}

/// One of them, and how people are told of it.
#[derive(Debug)]
pub struct Switch {
    /// In JSON, forms and the database; with "-" for "_" the option of the command line.
    pub key: &'static str,
    /// For `--help`. Begins with a space.
    pub help: &'static str,
    pub label: &'static str,
    pub off: &'static str,
    pub on: &'static str,
    pub hint: &'static str,
    pub get: fn(&Switches) -> bool,
    pub set: fn(&mut Switches, bool),
    pub wished: fn(&SwitchWishes) -> Option<bool>,
    pub wish: fn(&mut SwitchWishes, Option<bool>),
}

switches! {
    /// Hyper-V's enlightenments, for Windows.
    hyperv: "Enlightenments", "None" | "Hyper-V, for Windows",
        "Windows runs with fewer exits when it finds what it knows of Hyper-V.";
    /// RAM out of the huge pages that the host has set aside (vm.nr_hugepages).
    huge_pages: "Pages of memory", "Ordinary" | "Huge, set aside on the host",
        "Huge pages must be set aside on the host first (vm.nr_hugepages).";
    /// A USB 3 controller with a keyboard and a tablet, for systems without virtio drivers.
    usb: "USB", "None" | "USB 3 with keyboard and tablet",
        "For systems without virtio drivers: the pointer is where yours is.";
    /// A graphics card that is VGA and virtio in one: the screen takes the size that its viewer asks for.
    gpu: "Graphics", "VGA" | "VGA and virtio in one",
        "With the virtio card the screen takes the size of the window that shows it, where the guest's system has its driver.";
    /// A virtio keyboard beside the one that a PC has.
    virtio_keyboard: "Keyboard", "PS/2" | "PS/2, and virtio",
        "A system that drives virtio input uses that one, with fewer exits.";
    /// A TPM 2.0, which swtpm keeps beside the guest's disks.
    tpm: "TPM", "None" | "TPM 2.0",
        "For disk encryption, and systems that ask for one.";
    /// A virtio socket device, to talk to programs of the host without a network.
    vsock: "Virtio sockets", "None" | "Sockets to programs of the host (vsock)",
        "Programs of the host and of the guest talk without a network.";
}

impl Switches {
    /// With what somebody wants of them.
    pub fn with(mut self, wishes: &SwitchWishes) -> Switches {
        for switch in SWITCHES {
            if let Some(on) = (switch.wished)(wishes) {
                (switch.set)(&mut self, on);
            }
        }
        self
    }

    /// Those that are on.
    pub fn on(&self) -> impl Iterator<Item = &'static Switch> {
        SWITCHES.iter().filter(|switch| (switch.get)(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_switched_by_its_own_entry() {
        for switch in SWITCHES {
            let mut wishes = SwitchWishes::default();
            (switch.wish)(&mut wishes, Some(true));
            let on = Switches::default().with(&wishes);
            assert_eq!(on.on().map(|on| on.key).collect::<Vec<_>>(), [switch.key]);
            assert_eq!(serde_json::to_value(on).unwrap()[switch.key], true);
            assert_eq!(serde_json::to_value(wishes).unwrap(), serde_json::json!({ switch.key: true }));
            assert_eq!(on.with(&SwitchWishes::default()), on, "what is not named stays");
            (switch.wish)(&mut wishes, Some(false));
            assert_eq!(on.with(&wishes), Switches::default());
            assert!(switch.help.starts_with(' ') && switch.help.ends_with('.'), "{}", switch.help);
        }
    }
}
