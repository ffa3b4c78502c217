//! What is typed after `innkeeper guest`.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, Subcommand, ValueEnum, value_parser};

use crate::{
    spec::{CpuModel, NetworkModel, Watchdog},
    switches::{SWITCHES, SwitchWishes},
    types::parse_size,
};

/// How long `guest shutdown --wait` waits when nothing else is said.
const SHUTDOWN_WAIT_SECONDS: &str = "60";

#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// List the guests.
    Ls {
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show one guest: what it is made of and what it does.
    Show {
        name: String,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Make a guest.
    Create(Box<CreateArgs>),
    /// Change a guest while it is stopped.
    Set(Box<SetArgs>),
    /// Start a guest.
    Start {
        name: String,
        /// For this one start: cd, network, disk1 (or the id of a disk), or setup for the firmware's own; a reset goes back to the boot
        /// order.
        #[arg(long, value_name = "WHAT")]
        boot: Option<String>,
    },
    /// Ask the guest to shut down, as its power button does.
    Shutdown {
        name: String,
        /// Wait until it has stopped, at most this many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = SHUTDOWN_WAIT_SECONDS)]
        wait: Option<u64>,
    },
    /// Pull the plug: what the guest has not written is lost.
    Poweroff { name: String },
    /// Press the reset button: the guest starts anew, and what it has not written is lost.
    Reset { name: String },
    /// Hold the guest still; its memory stays.
    Pause { name: String },
    /// Let a paused or suspended guest go on.
    Resume { name: String },
    /// Write the guest's state to disk and end its engine; it goes on from there at the next start, also after a restart of the host.
    Suspend { name: String },
    /// Take the saved state of a suspended guest away: its next start begins anew, as after a loss of power.
    Discard {
        name: String,
        /// Do not ask on a terminal.
        #[arg(long)]
        yes: bool,
    },
    /// Delete stopped guests and their disks. Asks on a terminal.
    Rm {
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Do not ask on a terminal.
        #[arg(long)]
        yes: bool,
    },
    /// Say how much of its memory a running guest keeps; it gives the rest back to the host until it is told otherwise or starts anew.
    Memory {
        name: String,
        /// Such as 512M.
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Have a running guest write its file systems out and hold them still, for a copy of its disks from outside. Needs its agent.
    Freeze {
        name: String,
        /// They go on by themselves after so many seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Let the file systems of a guest go on.
    Thaw { name: String },
    /// Say how much a guest may ask of a disk on virtio, also while it runs; without a number, as much as it can.
    LimitDisk {
        name: String,
        /// disk1, or its id.
        disk: String,
        /// A second, such as 50M.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        bytes: Option<u64>,
        /// Reads, writes and the rest a second.
        #[arg(long, value_name = "N")]
        operations: Option<u64>,
    },
    /// Change the CD, also while the guest runs. The rest of the hardware is changed by "set".
    Cd {
        name: String,
        /// An item of the library or a file of the host.
        #[arg(required_unless_present = "eject", conflicts_with = "eject")]
        image: Option<String>,
        /// Take the medium out.
        #[arg(long)]
        eject: bool,
    },
    /// Forget what the UEFI firmware of a stopped guest has stored: boot entries, settings, keys that were enrolled.
    ResetFirmware { name: String },
    /// Make the TPM of a stopped guest a new one. What its keys protect, as encrypted disks, is lost.
    ResetTpm { name: String },
    /// Connect this terminal to the guest's serial console; Ctrl+] leaves.
    Console {
        name: String,
        /// Print what the console has kept and end.
        #[arg(long)]
        dump: bool,
    },
    /// Save the guest's screen as a PNG file.
    Screenshot { name: String, file: PathBuf },
    /// Print the end of the guest's log: what its engine and firmware wrote.
    Log { name: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FirmwareArg {
    Bios,
    Uefi,
    /// UEFI with Secure Boot, the usual keys enrolled.
    UefiSecure,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BusArg {
    Virtio,
    /// For systems without virtio drivers.
    Nvme,
    /// For old systems.
    Ahci,
    /// As a stick.
    Usb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CardArg {
    Virtio,
    /// Intel's 82540EM, for systems without virtio drivers.
    E1000,
}

impl From<CardArg> for NetworkModel {
    fn from(card: CardArg) -> NetworkModel {
        match card {
            CardArg::Virtio => NetworkModel::Virtio,
            CardArg::E1000 => NetworkModel::E1000,
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// What a guest may have besides, both when it is made and later.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// What happens when the guest does not feed its watchdog: reset, power_off, pause; none takes the watchdog out.
    #[arg(long, value_name = "WHAT")]
    pub watchdog: Option<Watchdog>,
    /// The processor that the guest sees: host, or portable (x86-64-v2), which is the same everywhere.
    #[arg(long, value_name = "MODEL")]
    pub cpu_model: Option<CpuModel>,
    #[command(flatten)]
    pub switches: SwitchArgs,
}

/// An option for each switch: alone it switches on.
#[derive(Debug, Default)]
pub struct SwitchArgs(pub SwitchWishes);

impl Args for SwitchArgs {
    fn augment_args(command: Command) -> Command {
        SWITCHES.iter().fold(command, |command, switch| {
            let long = switch.key.replace('_', "-");
            let arg = Arg::new(switch.key).long(long).help(switch.help.trim().trim_end_matches('.'));
            command.arg(
                arg.value_name("BOOL").num_args(0..=1).default_missing_value("true").value_parser(value_parser!(bool)),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SwitchArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<SwitchArgs, clap::Error> {
        let mut args = SwitchArgs::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for switch in SWITCHES {
            (switch.wish)(&mut self.0, matches.get_one(switch.key).copied());
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Letters, digits, "-", "_" and "."; at most 63.
    pub name: String,
    /// Virtual CPUs; left out: 1.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub cpus: Option<u32>,
    /// What the vCPUs are divided into; left out: 1.
    #[arg(long, value_name = "N")]
    pub sockets: Option<u32>,
    /// Threads of each core; left out: 1.
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Memory, such as 512M or 4G; left out: 512M.
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    pub memory: Option<u64>,
    /// An empty disk of this size, or a copy of an image; may be repeated, in boot order. An IMAGE is an item of the
    /// library or a file of the host.
    #[arg(long, value_name = "SIZE|IMAGE", allow_hyphen_values = true)]
    pub disk: Vec<String>,
    /// What the disks are connected to.
    #[arg(long, value_enum, value_name = "BUS", default_value = "virtio")]
    pub disk_bus: BusArg,
    /// The medium in the CD drive.
    #[arg(long, value_name = "IMAGE")]
    pub cdrom: Option<String>,
    /// Boot this kernel (bzImage or PVH ELF) without firmware.
    #[arg(long, value_name = "IMAGE", conflicts_with = "firmware")]
    pub kernel: Option<String>,
    /// The kernel's initial RAM disk.
    #[arg(long, value_name = "IMAGE", requires = "kernel")]
    pub initrd: Option<String>,
    /// The kernel's (or the test guest's) command line.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// The firmware that boots from disk or CD; left out: uefi where the package ovmf is installed, bios elsewhere.
    #[arg(long, value_enum)]
    pub firmware: Option<FirmwareArg>,
    /// What firmware tries first, between commas: cd, network, disk1. What is left out follows: the disks, then the CD.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub boot_order: Vec<String>,
    /// nat, user, none or bridge:NAME; left out: nat where the server runs as root, user elsewhere.
    #[arg(long)]
    pub network: Option<String>,
    /// The card that the guest sees; left out: virtio.
    #[arg(long, value_enum, value_name = "CARD")]
    pub network_card: Option<CardArg>,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// The built-in test guest: greets, shows the time, echoes keys.
    #[arg(long, conflicts_with_all = ["kernel", "firmware"])]
    pub test_guest: bool,
    /// Start it at once.
    #[arg(long)]
    pub start: bool,
    /// Print the guest as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SetArgs {
    /// Its name or id now.
    pub name: String,
    /// Its new name.
    #[arg(long = "name", value_name = "NEW")]
    pub new_name: Option<String>,
    /// Virtual CPUs.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub cpus: Option<u32>,
    /// What the vCPUs are divided into.
    #[arg(long, value_name = "N")]
    pub sockets: Option<u32>,
    /// Threads of each core.
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Memory, such as 512M or 4G.
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    pub memory: Option<u64>,
    /// One more disk: a size or an image to copy; may be repeated.
    #[arg(long, value_name = "SIZE|IMAGE", allow_hyphen_values = true)]
    pub add_disk: Vec<String>,
    /// What added disks are connected to.
    #[arg(long, value_enum, value_name = "BUS", default_value = "virtio")]
    pub disk_bus: BusArg,
    /// Delete this disk and what is on it; by its id, which "guest show" lists; may be repeated.
    #[arg(long, value_name = "ID")]
    pub remove_disk: Vec<String>,
    /// Boot this kernel without firmware.
    #[arg(long, value_name = "IMAGE", conflicts_with = "firmware")]
    pub kernel: Option<String>,
    /// The kernel's initial RAM disk; "" for none.
    #[arg(long, value_name = "IMAGE")]
    pub initrd: Option<String>,
    /// The kernel's (or the test guest's) command line.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Boot by this firmware.
    #[arg(long, value_enum)]
    pub firmware: Option<FirmwareArg>,
    /// What firmware tries first, between commas: cd, network, disk1 or the id of a disk. What is left out follows: the disks, then the
    /// CD.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub boot_order: Option<Vec<String>>,
    /// Boot the built-in test guest.
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "firmware"])]
    pub test_guest: bool,
    /// nat, user, none or bridge:NAME.
    #[arg(long)]
    pub network: Option<String>,
    /// The card that the guest sees.
    #[arg(long, value_enum, value_name = "CARD")]
    pub network_card: Option<CardArg>,
    #[command(flatten)]
    pub machine: MachineArgs,
}
