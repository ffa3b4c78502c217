//! A control group for each engine, below our own: so that the service manager's stop of us is not theirs, and limits have a
//! place. Version 2 only; where it is not mounted or not ours to change, engines stay in our group and `doctor` says so.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::types::Id;

const MOUNTED_AT: &str = "/sys/fs/cgroup";
/// Below the root group, where a machine without a service manager has us.
const AT_ROOT: &str = "innkeeper";

/// Moves a process that was just started into a group of its guest.
///
/// Errors: no version 2, or no right to change it.
pub(super) fn enclose(guest: &Id, pid: u32) -> io::Result<()> {
    let group = group_of(guest)?;
    fs::create_dir_all(&group)?;
    fs::write(group.join("cgroup.procs"), pid.to_string())
}

/// Takes away the group of a guest whose engine has ended.
pub(super) fn release(guest: &Id) {
    if let Ok(group) = group_of(guest) {
        // Still there when something else is in it; it is used again at the next start.
        let _ = fs::remove_dir(group);
    }
}

fn group_of(guest: &Id) -> io::Result<PathBuf> {
    let memberships = fs::read_to_string("/proc/self/cgroup")?;
    let base = base(Path::new(MOUNTED_AT), &memberships).ok_or(io::ErrorKind::Unsupported)?;
    Ok(base.join(format!("guest-{guest}")))
}

/// Our own group: the line of hierarchy 0 (cgroups(7)).
fn base(mounted_at: &Path, memberships: &str) -> Option<PathBuf> {
    if !mounted_at.join("cgroup.procs").exists() {
        return None;
    }
    let own = memberships.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mounted_at.join(if own.is_empty() { AT_ROOT } else { own }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_below_our_own_or_below_the_root() {
        let mount = tempfile::tempdir().unwrap();
        assert_eq!(base(mount.path(), "0::/a\n"), None, "not mounted");
        fs::write(mount.path().join("cgroup.procs"), "").unwrap();
        let below = |path: &str| Some(mount.path().join(path));
        assert_eq!(base(mount.path(), "0::/\n"), below("innkeeper"));
        assert_eq!(
            base(mount.path(), "1:cpu:/x\n0::/system.slice/innkeeper.service\n"),
            below("system.slice/innkeeper.service")
        );
        assert_eq!(base(mount.path(), "1:cpu:/x\n"), None, "version 1 only");
    }
}
