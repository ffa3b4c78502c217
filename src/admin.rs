//! What an administrator does without a server: it opens the state directory directly, also while a server runs on it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use crate::{
    auth,
    error::{Error, Result},
    store::{
        FILE, Store,
        users::{self, UserRow},
    },
    types::{Id, Name, now_ms},
    web::tls,
};

pub use crate::store::users::Role;

/// In the audit trail.
const WHO: &str = "host:admin";

/// A new set-up token, in place of the one before; the link is `https://HOST:PORT/setup?token=TOKEN`.
///
/// Errors: `Conflict` when there is an administrator already.
pub fn setup_token(state_dir: &Path) -> Result<String> {
    Store::open(state_dir)?.write(auth::new_setup_token)
}

/// Where the server of this state listens, as addresses for a browser; the usual port when none runs.
pub fn urls(state_dir: &Path) -> Vec<String> {
    let lock = fs::read_to_string(state_dir.join("serve.lock")).unwrap_or_default();
    let listen = lock.split_whitespace().nth(1).and_then(|address| address.parse().ok());
    tls::urls(listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8443))))
}

/// Whether somebody has been set up.
pub fn has_users(state_dir: &Path) -> Result<bool> {
    Ok(Store::open(state_dir)?.read(users::count)? > 0)
}

/// Makes a user.
///
/// Errors: `Invalid` at `name` or `password`, `Conflict` when the name is taken.
pub fn create_user(state_dir: &Path, name: &str, role: Role, password: &str) -> Result<()> {
    let name: Name = name.parse().map_err(|bad| Error::invalid("name", format!("{bad}")))?;
    auth::check_password(password)?;
    let password_hash = auth::hash_password(password)?;
    let row = UserRow { id: Id::random(), name, role, password_hash, created_ms: now_ms(), last_login_ms: None };
    Store::open(state_dir)?.write(|tx| {
        auth::insert_user(tx, &row)?;
        users::audit(tx, WHO, "", "create_user", row.name.as_str(), role.as_str())
    })
}

/// Makes an API token of a user, or of the first administrator when none is named; its secret.
pub fn create_token(state_dir: &Path, token: &str, user: Option<&str>) -> Result<String> {
    Store::open(state_dir)?.write(|tx| {
        let row = match user {
            Some(name) => users::by_name(tx, name)?,
            None => users::list(tx)?
                .into_iter()
                .filter(|row| row.role == Role::Administrator)
                .min_by_key(|row| row.created_ms),
        };
        let row = row.ok_or_else(|| match user {
            Some(name) => Error::not_found(format!("There is no user \"{name}\".")),
            None => Error::not_found("There is no administrator yet; \"innkeeper admin create-user\" makes one."),
        })?;
        let secret = auth::insert_token(tx, &row.id, token)?;
        users::audit(tx, WHO, "", "create_token", token, row.name.as_str())?;
        Ok(secret)
    })
}

/// Sets a password and ends the user's logins.
pub fn reset_password(state_dir: &Path, name: &str, password: &str) -> Result<()> {
    auth::check_password(password)?;
    let hash = auth::hash_password(password)?;
    Store::open(state_dir)?.write(|tx| {
        let row = users::by_name(tx, name)?.ok_or_else(|| Error::not_found(format!("There is no user \"{name}\".")))?;
        users::set_password(tx, &row.id, &hash, None)?;
        users::audit(tx, WHO, "", "reset_password", name, "")
    })
}

/// What is wrong with the database, a line each; empty when nothing is.
pub fn check_database(state_dir: &Path) -> Result<Vec<String>> {
    Store::open(state_dir)?.check()
}

/// Rebuilds the database file; the old one stays beside it under the returned name.
///
/// Errors: `Conflict` while a server runs on this very state.
pub fn repair_database(state_dir: &Path) -> Result<PathBuf> {
    let _alone = alone(state_dir)?;
    let (file, new) = (state_dir.join(FILE), state_dir.join(format!("{FILE}.new")));
    let old = state_dir.join(format!("{FILE}.{}", now_ms()));
    let cannot = |error| Error::internal("Cannot replace the database.", error);
    let _ = fs::remove_file(&new);
    let store = Store::open(state_dir)?;
    store.rebuild(&new)?;
    drop(store);
    fs::File::open(&new).and_then(|file| file.sync_all()).map_err(cannot)?;
    fs::rename(&file, &old).map_err(cannot)?;
    // Closing the last connection has emptied the log; a stale one must not be applied to the new file.
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(state_dir.join(format!("{FILE}{suffix}")));
    }
    fs::rename(&new, &file).map_err(cannot)?;
    Store::open(state_dir)?;
    Ok(old)
}

/// The lock that a server holds on its state; none starts while this is held.
fn alone(state_dir: &Path) -> Result<fs::File> {
    let path = state_dir.join("serve.lock");
    // Root's, where root serves: then only to be read.
    let file = fs::File::open(&path).or_else(|_| fs::File::create(&path));
    let file = file.map_err(|error| Error::internal(format!("Cannot open {}.", path.display()), error))?;
    let runs = |_| Error::conflict("A server runs on this state directory. Stop it first; its guests run on.");
    file.try_lock().map_err(runs)?;
    Ok(file)
}

/// Makes a new certificate from the same authority; a running server takes it at its next start.
pub fn reissue_certificate(state_dir: &Path) -> Result<tls::Certificate> {
    tls::reissue(state_dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_state_directory_is_administered_without_a_server() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        assert!(!has_users(state).unwrap());
        assert_ne!(setup_token(state).unwrap(), setup_token(state).unwrap());
        assert_eq!(create_token(state, "ci", None).unwrap_err().kind(), ErrorKind::NotFound);
        create_user(state, "ada", Role::Administrator, "long enough").unwrap();
        assert_eq!(create_user(state, "ada", Role::Viewer, "long enough").unwrap_err().field(), Some("name"));
        assert_eq!(create_user(state, "bob", Role::Viewer, "short").unwrap_err().field(), Some("password"));
        create_token(state, "ci", None).unwrap();
        reset_password(state, "ada", "even longer").unwrap();
        assert_eq!(setup_token(state).unwrap_err().kind(), ErrorKind::Conflict);
    }

    #[test]
    fn a_repaired_database_has_everything() {
        let dir = tempfile::tempdir().unwrap();
        create_user(dir.path(), "ada", Role::Administrator, "long enough").unwrap();
        assert_eq!(check_database(dir.path()).unwrap(), Vec::<String>::new());
        let server = fs::File::create(dir.path().join("serve.lock")).unwrap();
        server.lock().unwrap();
        assert_eq!(repair_database(dir.path()).unwrap_err().kind(), ErrorKind::Conflict, "a server runs on it");
        drop(server);
        let old = repair_database(dir.path()).unwrap();
        assert!(old.exists());
        assert!(has_users(dir.path()).unwrap());
        assert_eq!(check_database(dir.path()).unwrap(), Vec::<String>::new());
    }
}
