//! Guests and their disks as rows.

use std::{fmt, num::NonZeroU64, str::FromStr};

use rusqlite::{Row, ToSql, named_params, params};

use super::{Tx, get, maybe_parsed, parsed, signed, unsigned};
use crate::{
    error::{Error, Result},
    spec::{BootFrom, CpuModel, DiskBus, NetworkModel, RateLimit, Watchdog},
    switches::{SWITCHES, Switches},
    types::{BadValue, Id, MacAddr, Name},
};

/// The longest name of a network interface of Linux.
const INTERFACE_LEN_MAX: usize = 15;

/// How a guest starts; the images and the command line are columns of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootKind {
    Bios,
    Uefi,
    /// UEFI with Secure Boot.
    UefiSecure,
    Kernel,
    Test,
}

/// What a guest's network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkMode {
    None,
    Nat,
    User,
    /// An existing bridge of the host, by its interface name.
    Bridge(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRow {
    pub id: Id,
    pub name: Name,
    pub machine: String,
    /// Meant to run.
    pub desired_on: bool,
    pub note: String,
    pub cpus: u32,
    pub sockets: u32,
    /// Of a core.
    pub threads: u32,
    pub memory_bytes: u64,
    pub boot: BootKind,
    pub kernel_image_id: Option<Id>,
    pub initrd_image_id: Option<Id>,
    pub cmdline: String,
    pub cd_image_id: Option<Id>,
    /// What firmware tries first to last; the rest follows by itself.
    pub boot_order: Vec<BootFrom>,
    pub network: NetworkMode,
    pub network_model: NetworkModel,
    pub watchdog: Watchdog,
    pub cpu_model: CpuModel,
    pub switches: Switches,
    pub mac: MacAddr,
    /// Its state is on disk, and the next start goes on from there.
    pub suspended: bool,
    /// Why it failed last; gone at the next start.
    pub failure: Option<String>,
    pub created_ms: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRow {
    pub id: Id,
    pub guest_id: Id,
    pub position: u32,
    pub bus: DiskBus,
    pub size_bytes: u64,
    /// The image that is being copied into it; nothing once it is ready.
    pub image_id: Option<Id>,
    pub read_only: bool,
    /// Its file is complete.
    pub ready: bool,
    /// The PCI slot that it was seen in last; nothing for a disk that has none, or never ran.
    pub slot: Option<u8>,
    /// A running guest was asked to let it go for good, and had not when this was read.
    pub leaving: bool,
    pub limit: RateLimit,
    pub created_ms: i64,
}

impl BootKind {
    const ALL: [BootKind; 5] = [BootKind::Bios, BootKind::Uefi, BootKind::UefiSecure, BootKind::Kernel, BootKind::Test];

    pub fn is_firmware(self) -> bool {
        self == BootKind::Bios || self.is_uefi()
    }

    pub fn is_uefi(self) -> bool {
        matches!(self, BootKind::Uefi | BootKind::UefiSecure)
    }

    /// The columns `boot` and `secure_boot`.
    fn columns(self) -> (&'static str, bool) {
        match self {
            BootKind::Bios => ("bios", false),
            BootKind::Uefi => ("uefi", false),
            BootKind::UefiSecure => ("uefi", true),
            BootKind::Kernel => ("kernel", false),
            BootKind::Test => ("test", false),
        }
    }
}

impl NetworkMode {
    fn column(&self) -> &'static str {
        match self {
            NetworkMode::None => "none",
            NetworkMode::Nat => "nat",
            NetworkMode::User => "user",
            NetworkMode::Bridge(_) => "bridge",
        }
    }

    fn bridge(&self) -> Option<&str> {
        match self {
            NetworkMode::Bridge(name) => Some(name),
            NetworkMode::None | NetworkMode::Nat | NetworkMode::User => None,
        }
    }
}

impl fmt::Display for NetworkMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetworkMode::Bridge(name) => write!(f, "bridge:{name}"),
            other => f.write_str(other.column()),
        }
    }
}

impl FromStr for NetworkMode {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<NetworkMode, BadValue> {
        match text {
            "none" => Ok(NetworkMode::None),
            "nat" => Ok(NetworkMode::Nat),
            "user" => Ok(NetworkMode::User),
            _ => {
                let name = text
                    .strip_prefix("bridge:")
                    .ok_or_else(|| BadValue("The network is \"nat\", \"user\", \"none\" or \"bridge:NAME\".".into()))?;
                let good = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':');
                if name.is_empty() || name.len() > INTERFACE_LEN_MAX || !name.bytes().all(good) || name.starts_with('.')
                {
                    return Err(BadValue(format!(
                        "A bridge has a name of 1 to {INTERFACE_LEN_MAX} letters and digits."
                    )));
                }
                Ok(NetworkMode::Bridge(name.to_owned()))
            }
        }
    }
}

fn guest(row: &Row) -> rusqlite::Result<GuestRow> {
    let desired: String = get(row, "desired")?;
    let network: String = get(row, "network")?;
    let bridge: Option<String> = get(row, "bridge")?;
    let network = match bridge {
        Some(name) => NetworkMode::Bridge(name),
        None => network.parse().map_err(|error| super::damaged(row, "network", error))?,
    };
    Ok(GuestRow {
        id: parsed(row, "id")?,
        name: parsed(row, "name")?,
        machine: get(row, "machine")?,
        desired_on: desired == "on",
        note: get(row, "note")?,
        cpus: unsigned(row, "cpus")?,
        sockets: unsigned(row, "sockets")?,
        threads: unsigned(row, "threads")?,
        memory_bytes: unsigned(row, "memory_bytes")?,
        boot: boot_of(row)?,
        kernel_image_id: maybe_parsed(row, "kernel_image_id")?,
        initrd_image_id: maybe_parsed(row, "initrd_image_id")?,
        cmdline: get(row, "cmdline")?,
        cd_image_id: maybe_parsed(row, "cd_image_id")?,
        boot_order: boot_order_of(row)?,
        network,
        network_model: parsed(row, "network_model")?,
        watchdog: parsed(row, "watchdog")?,
        cpu_model: parsed(row, "cpu_model")?,
        switches: switches_of(row)?,
        mac: parsed(row, "mac")?,
        suspended: get(row, "suspended")?,
        failure: get(row, "failure")?,
        created_ms: get(row, "created_ms")?,
    })
}

fn boot_of(row: &Row) -> rusqlite::Result<BootKind> {
    let (boot, secure): (String, bool) = (get(row, "boot")?, get(row, "secure_boot")?);
    let found = BootKind::ALL.into_iter().find(|kind| kind.columns() == (boot.as_str(), secure));
    found.ok_or_else(|| super::damaged(row, "boot", BadValue("A guest boots by bios, uefi, kernel or test.".into())))
}

/// Each has a column of its name.
fn switches_of(row: &Row) -> rusqlite::Result<Switches> {
    let mut switches = Switches::default();
    for switch in SWITCHES {
        (switch.set)(&mut switches, get(row, switch.key)?);
    }
    Ok(switches)
}

fn switch_words(word: fn(&str) -> String) -> String {
    SWITCHES.iter().map(|switch| word(switch.key)).collect()
}

/// Runs a statement that also names each switch's column as a parameter.
fn run_with_switches(tx: &Tx, sql: &str, others: &[(&str, &dyn ToSql)], switches: &Switches) -> Result<()> {
    let own: Vec<(String, bool)> =
        SWITCHES.iter().map(|switch| (format!(":{}", switch.key), (switch.get)(switches))).collect();
    let own = own.iter().map(|(name, on)| (name.as_str(), on as &dyn ToSql));
    let all: Vec<(&str, &dyn ToSql)> = others.iter().copied().chain(own).collect();
    tx.run(sql, all.as_slice())?;
    Ok(())
}

fn boot_order_of(row: &Row) -> rusqlite::Result<Vec<BootFrom>> {
    let words: String = get(row, "boot_order")?;
    let parsed = words.split_whitespace().map(str::parse).collect::<Result<_, BadValue>>();
    parsed.map_err(|error| super::damaged(row, "boot_order", error))
}

fn boot_order_column(order: &[BootFrom]) -> String {
    order.iter().map(BootFrom::to_string).collect::<Vec<_>>().join(" ")
}

fn rate_column(rate: Option<NonZeroU64>) -> Option<i64> {
    rate.map(|rate| signed(rate.get()))
}

fn maybe_rate(row: &Row, column: &str) -> rusqlite::Result<Option<NonZeroU64>> {
    Ok(get::<Option<i64>>(row, column)?.and_then(|rate| NonZeroU64::new(rate.unsigned_abs())))
}

fn disk(row: &Row) -> rusqlite::Result<DiskRow> {
    Ok(DiskRow {
        id: parsed(row, "id")?,
        guest_id: parsed(row, "guest_id")?,
        position: unsigned(row, "position")?,
        bus: parsed(row, "bus")?,
        size_bytes: unsigned(row, "size_bytes")?,
        image_id: maybe_parsed(row, "image_id")?,
        read_only: get(row, "read_only")?,
        ready: get(row, "ready")?,
        slot: get(row, "slot")?,
        leaving: get(row, "leaving")?,
        limit: RateLimit {
            bytes_per_s: maybe_rate(row, "bytes_per_s")?,
            operations_per_s: maybe_rate(row, "operations_per_s")?,
        },
        created_ms: get(row, "created_ms")?,
    })
}

pub fn list(tx: &Tx) -> Result<Vec<GuestRow>> {
    tx.all("SELECT * FROM guests ORDER BY name", [], guest)
}

pub fn by_id(tx: &Tx, id: &Id) -> Result<Option<GuestRow>> {
    tx.one("SELECT * FROM guests WHERE id = ?1", [id.as_str()], guest)
}

/// By id, or else by name: what a person or a script says.
pub fn named(tx: &Tx, id_or_name: &str) -> Result<Option<GuestRow>> {
    tx.one("SELECT * FROM guests WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC", [id_or_name], guest)
}

/// Errors: `Invalid` at `name` when another guest has that name.
pub fn insert(tx: &Tx, row: &GuestRow) -> Result<()> {
    name_is_free(tx, &row.name, &row.id)?;
    let (columns, values) = (switch_words(|key| format!(", {key}")), switch_words(|key| format!(", :{key}")));
    let sql = format!(
        "INSERT INTO guests (id, name, machine, desired, note, cpus, sockets, threads, memory_bytes, boot, secure_boot, kernel_image_id,
             initrd_image_id, cmdline, cd_image_id, boot_order, network, network_model, watchdog, cpu_model, bridge, mac, failure, created_ms{columns})
         VALUES (:id, :name, :machine, :desired, :note, :cpus, :sockets, :threads, :memory_bytes, :boot, :secure_boot, :kernel, :initrd,
             :cmdline, :cd, :boot_order, :network, :network_model, :watchdog, :cpu_model, :bridge, :mac, :failure, :created_ms{values})"
    );
    let row_params = named_params! {
            ":id": row.id.as_str(), ":name": row.name.as_str(), ":machine": row.machine,
            ":desired": desired_word(row.desired_on), ":note": row.note, ":cpus": row.cpus,
            ":sockets": row.sockets, ":threads": row.threads, ":memory_bytes": signed(row.memory_bytes), ":boot": row.boot.columns().0,
            ":secure_boot": row.boot.columns().1, ":kernel": row.kernel_image_id.as_ref().map(Id::as_str),
            ":initrd": row.initrd_image_id.as_ref().map(Id::as_str),
            ":cmdline": row.cmdline, ":cd": row.cd_image_id.as_ref().map(Id::as_str),
            ":boot_order": boot_order_column(&row.boot_order), ":network_model": row.network_model.as_str(),
            ":watchdog": row.watchdog.as_str(), ":cpu_model": row.cpu_model.as_str(),
            ":network": row.network.column(), ":bridge": row.network.bridge(), ":mac": row.mac.to_string(),
            ":failure": row.failure, ":created_ms": row.created_ms,
    };
    run_with_switches(tx, &sql, row_params, &row.switches)
}

/// Writes what a person may change: everything but the id, the address, whether it is on and why it failed.
///
/// Errors: as `insert`.
pub fn update(tx: &Tx, row: &GuestRow) -> Result<()> {
    name_is_free(tx, &row.name, &row.id)?;
    let set = switch_words(|key| format!(", {key} = :{key}"));
    let sql = format!(
        "UPDATE guests SET name = :name, note = :note, cpus = :cpus, sockets = :sockets, threads = :threads, memory_bytes = :memory_bytes, boot = :boot,
             secure_boot = :secure_boot, kernel_image_id = :kernel, initrd_image_id = :initrd, cmdline = :cmdline, cd_image_id = :cd,
             boot_order = :boot_order, network = :network, network_model = :network_model, watchdog = :watchdog, cpu_model = :cpu_model, bridge = :bridge{set}
         WHERE id = :id"
    );
    let row_params = named_params! {
            ":id": row.id.as_str(), ":name": row.name.as_str(), ":note": row.note, ":cpus": row.cpus,
            ":sockets": row.sockets, ":threads": row.threads, ":memory_bytes": signed(row.memory_bytes), ":boot": row.boot.columns().0,
            ":secure_boot": row.boot.columns().1, ":kernel": row.kernel_image_id.as_ref().map(Id::as_str),
            ":initrd": row.initrd_image_id.as_ref().map(Id::as_str),
            ":cmdline": row.cmdline, ":cd": row.cd_image_id.as_ref().map(Id::as_str),
            ":boot_order": boot_order_column(&row.boot_order), ":network_model": row.network_model.as_str(),
            ":watchdog": row.watchdog.as_str(), ":cpu_model": row.cpu_model.as_str(),
            ":network": row.network.column(), ":bridge": row.network.bridge(),
    };
    run_with_switches(tx, &sql, row_params, &row.switches)
}

/// What the network card of a guest is connected to, and what it is.
pub fn set_network(tx: &Tx, id: &Id, network: &NetworkMode, model: NetworkModel) -> Result<()> {
    let sql = "UPDATE guests SET network = ?2, bridge = ?3, network_model = ?4 WHERE id = ?1";
    tx.run(sql, params![id.as_str(), network.column(), network.bridge(), model.as_str()])?;
    Ok(())
}

pub fn set_boot_order(tx: &Tx, id: &Id, order: &[BootFrom]) -> Result<()> {
    tx.run("UPDATE guests SET boot_order = ?2 WHERE id = ?1", params![id.as_str(), boot_order_column(order)])?;
    Ok(())
}

/// The guest has let go of its network card, and does not start from the network any more.
pub fn forget_network(tx: &Tx, id: &Id) -> Result<()> {
    let Some(mut row) = by_id(tx, id)?.filter(|row| row.network != NetworkMode::None) else { return Ok(()) };
    row.network = NetworkMode::None;
    row.boot_order.retain(|from| *from != BootFrom::Network);
    update(tx, &row)
}

pub fn set_desired(tx: &Tx, id: &Id, on: bool) -> Result<()> {
    tx.run("UPDATE guests SET desired = ?2 WHERE id = ?1", params![id.as_str(), desired_word(on)])?;
    Ok(())
}

pub fn set_suspended(tx: &Tx, id: &Id, suspended: bool) -> Result<()> {
    tx.run("UPDATE guests SET suspended = ?2 WHERE id = ?1", params![id.as_str(), suspended])?;
    Ok(())
}

pub fn set_failure(tx: &Tx, id: &Id, failure: Option<&str>) -> Result<()> {
    tx.run("UPDATE guests SET failure = ?2 WHERE id = ?1", params![id.as_str(), failure])?;
    Ok(())
}

pub fn set_cd(tx: &Tx, id: &Id, image: Option<&Id>) -> Result<()> {
    tx.run("UPDATE guests SET cd_image_id = ?2 WHERE id = ?1", params![id.as_str(), image.map(Id::as_str)])?;
    Ok(())
}

/// Forgets a guest and its disks; the files are the caller's, afterwards.
pub fn delete(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("DELETE FROM disks WHERE guest_id = ?1", [id.as_str()])?;
    tx.run("DELETE FROM guests WHERE id = ?1", [id.as_str()])?;
    Ok(())
}

/// The disks of one guest, in boot order.
pub fn disks(tx: &Tx, guest: &Id) -> Result<Vec<DiskRow>> {
    tx.all("SELECT * FROM disks WHERE guest_id = ?1 ORDER BY position", [guest.as_str()], disk)
}

/// All disks of all guests, by guest and boot order.
pub fn all_disks(tx: &Tx) -> Result<Vec<DiskRow>> {
    tx.all("SELECT * FROM disks ORDER BY guest_id, position", [], disk)
}

pub fn insert_disk(tx: &Tx, row: &DiskRow) -> Result<()> {
    tx.run(
        "INSERT INTO disks (id, guest_id, position, bus, size_bytes, image_id, read_only, ready, bytes_per_s, operations_per_s,
                            created_ms)
         VALUES (:id, :guest_id, :position, :bus, :size_bytes, :image_id, :read_only, :ready, :bytes_per_s, :operations_per_s,
                 :created_ms)",
        named_params! {
            ":id": row.id.as_str(), ":guest_id": row.guest_id.as_str(), ":position": row.position,
            ":bus": row.bus.as_str(), ":size_bytes": signed(row.size_bytes),
            ":image_id": row.image_id.as_ref().map(Id::as_str), ":read_only": row.read_only, ":ready": row.ready,
            ":bytes_per_s": rate_column(row.limit.bytes_per_s),
            ":operations_per_s": rate_column(row.limit.operations_per_s), ":created_ms": row.created_ms,
        },
    )?;
    Ok(())
}

/// The file of a disk is complete. False when the disk is gone meanwhile.
pub fn set_disk_ready(tx: &Tx, id: &Id) -> Result<bool> {
    Ok(tx.run("UPDATE disks SET ready = 1, image_id = NULL WHERE id = ?1", [id.as_str()])? > 0)
}

/// False when the disk is gone meanwhile.
pub fn set_disk_limit(tx: &Tx, id: &Id, limit: RateLimit) -> Result<bool> {
    Ok(tx.run(
        "UPDATE disks SET bytes_per_s = ?2, operations_per_s = ?3 WHERE id = ?1",
        params![id.as_str(), rate_column(limit.bytes_per_s), rate_column(limit.operations_per_s)],
    )? > 0)
}

/// Where a disk is plugged in. A disk of another guest is left alone.
pub fn set_disk_slot(tx: &Tx, guest: &Id, disk: &Id, slot: u8) -> Result<()> {
    let sql = "UPDATE disks SET slot = ?3 WHERE id = ?2 AND guest_id = ?1 AND slot IS NOT ?3";
    tx.run(sql, params![guest.as_str(), disk.as_str(), slot])?;
    Ok(())
}

/// Whether the guest was asked to let a disk go.
pub fn set_disk_leaving(tx: &Tx, disk: &Id, leaving: bool) -> Result<()> {
    tx.run("UPDATE disks SET leaving = ?2 WHERE id = ?1", params![disk.as_str(), leaving])?;
    Ok(())
}

/// Forgets the disks that a guest was asked to let go and that `has` says are gone, in its boot order too.
///
/// Returns their ids; the files are the caller's.
pub fn delete_left_disks(tx: &Tx, guest: &Id, has: impl Fn(&Id) -> bool) -> Result<Vec<Id>> {
    let left = |disk: &DiskRow| disk.leaving && !has(&disk.id);
    let gone: Vec<Id> = disks(tx, guest)?.into_iter().filter(left).map(|disk| disk.id).collect();
    if gone.is_empty() {
        return Ok(gone);
    }
    gone.iter().try_for_each(|disk| delete_disk(tx, disk))?;
    if let Some(mut row) = by_id(tx, guest)? {
        row.boot_order.retain(|from| !matches!(from, BootFrom::Disk(disk) if gone.contains(disk)));
        update(tx, &row)?;
    }
    Ok(gone)
}

pub fn delete_disk(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("DELETE FROM disks WHERE id = ?1", [id.as_str()])?;
    Ok(())
}

/// Forgets what a server did not finish when it ended: disks that were being copied, and guests whose first disks they were.
///
/// Returns the ids of the disks, whose files are the caller's.
pub fn delete_unfinished(tx: &Tx) -> Result<Vec<Id>> {
    let unfinished: Vec<DiskRow> = all_disks(tx)?.into_iter().filter(|disk| !disk.ready).collect();
    let mut gone = Vec::new();
    for disk in unfinished {
        match by_id(tx, &disk.guest_id)? {
            // Made in one transaction, so with one clock reading: the guest was never complete.
            Some(guest) if guest.created_ms == disk.created_ms => {
                gone.extend(disks(tx, &guest.id)?.into_iter().map(|disk| disk.id));
                delete(tx, &guest.id)?;
            }
            _ => {
                delete_disk(tx, &disk.id)?;
                gone.push(disk.id);
            }
        }
    }
    Ok(gone)
}

fn desired_word(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn name_is_free(tx: &Tx, name: &Name, but: &Id) -> Result<()> {
    let taken =
        tx.count("SELECT count(*) FROM guests WHERE name = ?1 AND id <> ?2", params![name.as_str(), but.as_str()])?;
    if taken == 0 { Ok(()) } else { Err(Error::invalid("name", format!("Another guest has the name \"{name}\"."))) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{error::ErrorKind, spec::MACHINE, store::Store};

    /// A stopped guest of 64 MiB without disks.
    pub(crate) fn sample(name: &str) -> GuestRow {
        GuestRow {
            id: Id::random(),
            name: name.parse().unwrap(),
            machine: MACHINE.into(),
            desired_on: false,
            note: String::new(),
            cpus: 1,
            sockets: 1,
            threads: 1,
            memory_bytes: 64 << 20,
            boot: BootKind::Test,
            kernel_image_id: None,
            initrd_image_id: None,
            cmdline: String::new(),
            cd_image_id: None,
            boot_order: Vec::new(),
            network: NetworkMode::None,
            network_model: NetworkModel::Virtio,
            watchdog: Watchdog::None,
            cpu_model: CpuModel::Host,
            switches: Switches::default(),
            mac: MacAddr::random(),
            suspended: false,
            failure: None,
            created_ms: 1,
        }
    }

    pub(crate) fn sample_disk(guest: &GuestRow, position: u32, ready: bool) -> DiskRow {
        DiskRow {
            id: Id::random(),
            guest_id: guest.id.clone(),
            position,
            bus: DiskBus::Virtio,
            size_bytes: 1 << 20,
            image_id: None,
            read_only: false,
            ready,
            slot: None,
            leaving: false,
            limit: RateLimit::default(),
            created_ms: guest.created_ms,
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    #[test]
    fn a_guest_is_read_as_it_was_written() {
        let (_dir, store) = store();
        let mut row = sample("web01");
        row.network = NetworkMode::Bridge("br0".into());
        row.boot = BootKind::UefiSecure;
        row.boot_order = vec![BootFrom::Cd, BootFrom::Disk(Id::random())];
        store.write(|tx| insert(tx, &row)).unwrap();
        assert_eq!(store.read(|tx| by_id(tx, &row.id)).unwrap().as_ref(), Some(&row));
        assert_eq!(store.read(|tx| named(tx, "web01")).unwrap().as_ref(), Some(&row));
        (row.cpus, row.sockets, row.threads) = (8, 2, 4);
        row.network_model = NetworkModel::E1000;
        row.watchdog = Watchdog::PowerOff;
        row.cpu_model = CpuModel::Portable;
        SWITCHES.iter().for_each(|switch| (switch.set)(&mut row.switches, true));
        row.boot_order = vec![BootFrom::Network];
        row.network = NetworkMode::Nat;
        store.write(|tx| update(tx, &row)).unwrap();
        assert_eq!(store.read(list).unwrap(), vec![row]);
    }

    #[test]
    fn a_name_belongs_to_one_guest() {
        let (_dir, store) = store();
        let (first, mut second) = (sample("a"), sample("a"));
        store.write(|tx| insert(tx, &first)).unwrap();
        let error = store.write(|tx| insert(tx, &second)).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Invalid, Some("name")));
        second.name = "b".parse().unwrap();
        store.write(|tx| insert(tx, &second)).unwrap();
        second.name = "a".parse().unwrap();
        assert!(store.write(|tx| update(tx, &second)).is_err());
        store.write(|tx| update(tx, &first)).unwrap();
    }

    #[test]
    fn what_was_not_finished_is_forgotten_and_the_rest_stays() {
        let (_dir, store) = store();
        let (whole, mut grown, broken) = (sample("whole"), sample("grown"), sample("broken"));
        grown.created_ms = 7;
        let kept = sample_disk(&whole, 0, true);
        let mut added = sample_disk(&grown, 0, false);
        added.created_ms = 9;
        let halves = [sample_disk(&broken, 0, true), sample_disk(&broken, 1, false)];
        store
            .write(|tx| {
                [&whole, &grown, &broken].into_iter().try_for_each(|row| insert(tx, row))?;
                [&kept, &added, &halves[0], &halves[1]].into_iter().try_for_each(|row| insert_disk(tx, row))
            })
            .unwrap();
        let mut gone = store.write(delete_unfinished).unwrap();
        let mut expected = vec![added.id, halves[0].id.clone(), halves[1].id.clone()];
        gone.sort();
        expected.sort();
        assert_eq!(gone, expected);
        let left: Vec<String> = store.read(list).unwrap().into_iter().map(|row| row.name.to_string()).collect();
        assert_eq!(left, ["grown", "whole"]);
        assert_eq!(store.read(all_disks).unwrap(), vec![kept]);
    }

    #[test]
    fn networks_are_read_as_people_type_them() {
        for text in ["none", "nat", "user", "bridge:br0"] {
            assert_eq!(text.parse::<NetworkMode>().unwrap().to_string(), text);
        }
        for bad in ["", "bridge", "bridge:", "bridge:a/b", "bridge:..", "bridge:0123456789abcdef", "tap0"] {
            assert!(bad.parse::<NetworkMode>().is_err(), "{bad}");
        }
    }
}
