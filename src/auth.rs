//! Who may come in: passwords, logins, API tokens and the one-time set-up token.
//!
//! Secrets are 32 random bytes; the database has only their SHA-256. One password is computed at a time, so that logging in
//! cannot take the host's memory. Wrong passwords slow their address and never lock an account.

mod throttle;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use argon2::{
    Algorithm, Argon2, Params, Version,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::throttle::Throttle;
use crate::{
    error::{Error, ErrorKind, Result},
    store::{
        Store, Tx, blocking,
        users::{self, Role, UserRow},
    },
    types::{Id, Name},
};

pub const PASSWORD_LEN_MIN: usize = 8;
pub const PASSWORD_LEN_MAX: usize = 1024;
/// A login that is not used for this long is over.
pub const IDLE_MS_MAX: i64 = 12 * 3600 * 1000;
/// Use is noted in the database at most this often, so that looking at pages does not write to the disk.
const TOUCH_MS: i64 = 3600 * 1000;
/// Password computations that may wait; more are refused.
const HASHES_WAITING_MAX: usize = 16;
/// The setting with the hash of the set-up token.
const SETUP_SETTING: &str = "setup_token_hash";

/// Somebody whose credential was right.
#[derive(Debug, Clone)]
pub struct Known {
    pub user_id: Id,
    pub user: Name,
    pub role: Role,
    /// The login, when it is one; none for an API token.
    pub login: Option<Id>,
    /// Cancelled when the login ends: its sockets and streams end with it.
    pub ended: CancellationToken,
}

pub struct Auth {
    store: Arc<Store>,
    /// One computation at a time.
    hashing: Semaphore,
    waiting: Semaphore,
    throttle: Mutex<Throttle>,
    /// For each login and token that has been seen since the start.
    live: Mutex<HashMap<Id, CancellationToken>>,
}

impl Auth {
    pub fn new(store: Arc<Store>) -> Auth {
        Auth {
            store,
            hashing: Semaphore::new(1),
            waiting: Semaphore::new(HASHES_WAITING_MAX),
            throttle: Mutex::default(),
            live: Mutex::default(),
        }
    }

    /// Checks name and password; the secret of a new login, for the cookie.
    ///
    /// Errors: `Unauthenticated` when they are wrong, without saying which; `Unavailable` while the address has to wait.
    pub async fn log_in(&self, name: &str, password: &str, address: IpAddr) -> Result<String> {
        self.throttle().admit(address)?;
        let row = match name.parse::<Name>() {
            Ok(name) => self.store.reading(move |tx| users::by_name(tx, name.as_str())).await?,
            Err(_) => None,
        };
        let known_hash = row.as_ref().map(|row| row.password_hash.clone());
        let right = self.verify(password, known_hash).await?;
        let (Some(row), true) = (row, right) else {
            self.throttle().failed(address);
            tracing::warn!(%address, name = %crate::types::shorten(name), "wrong name or password");
            return Err(Error::new(ErrorKind::Unauthenticated, "Name or password is wrong."));
        };
        self.throttle().succeeded(address);
        self.new_login(row.id, address).await
    }

    async fn new_login(&self, user: Id, address: IpAddr) -> Result<String> {
        let (secret, hash) = new_secret();
        let address = address.to_string();
        self.store
            .writing(move |tx| {
                users::delete_idle_logins(tx, tx.now_ms - IDLE_MS_MAX)?;
                users::insert_login(tx, &Id::random(), &hash, &user, &address)
            })
            .await?;
        Ok(secret)
    }

    /// Whose login this is; `None` when it is unknown, idle for too long or ended.
    pub async fn by_login(&self, secret: &str) -> Result<Option<Known>> {
        let Some(hash) = hash_of(secret) else { return Ok(None) };
        let found =
            self.store.reading(move |tx| Ok((users::login(tx, &hash, tx.now_ms - IDLE_MS_MAX)?, tx.now_ms))).await?;
        let (Some(found), now_ms) = found else { return Ok(None) };
        if found.used_ms.is_none_or(|used_ms| now_ms - used_ms > TOUCH_MS) {
            let id = found.id.clone();
            self.store.writing(move |tx| users::touch_login(tx, &id)).await?;
        }
        let ended = self.live().entry(found.id.clone()).or_default().clone();
        Ok(Some(Known { user_id: found.user_id, user: found.user, role: found.role, login: Some(found.id), ended }))
    }

    /// Whose API token this is.
    pub async fn by_token(&self, secret: &str) -> Result<Option<Known>> {
        let Some(hash) = hash_of(secret) else { return Ok(None) };
        let found = self.store.reading(move |tx| Ok((users::token(tx, &hash)?, tx.now_ms))).await?;
        let (Some(found), now_ms) = found else { return Ok(None) };
        if found.used_ms.is_none_or(|used_ms| now_ms - used_ms > TOUCH_MS) {
            let id = found.id.clone();
            self.store.writing(move |tx| users::touch_token(tx, &id)).await?;
        }
        let ended = self.live().entry(found.id.clone()).or_default().clone();
        Ok(Some(Known { user_id: found.user_id, user: found.user, role: found.role, login: None, ended }))
    }

    /// Whether what a stream began with still holds: another process may have ended the login, or nobody used it for too long.
    /// If not, its sockets and streams end.
    pub async fn still_holds(&self, known: &Known) -> Result<bool> {
        let Some(login) = known.login.clone() else { return Ok(!known.ended.is_cancelled()) };
        let id = login.clone();
        let holds = self.store.reading(move |tx| users::login_is_used(tx, &id, tx.now_ms - IDLE_MS_MAX)).await?;
        if !holds {
            self.end(&login);
        }
        Ok(holds)
    }

    /// Ends a login, with its sockets and streams.
    pub async fn log_out(&self, login: &Id) -> Result<()> {
        let id = login.clone();
        self.store.writing(move |tx| users::delete_login(tx, &id)).await?;
        self.end(login);
        Ok(())
    }

    /// Makes the first administrator and spends the set-up token; the secret of a first login.
    ///
    /// Errors: `Forbidden` for a wrong or spent token, `Invalid` for name or password.
    pub async fn set_up(&self, token: &str, name: &str, password: &str, address: IpAddr) -> Result<String> {
        self.throttle().admit(address)?;
        let token = token.to_owned();
        let seen = token.clone();
        if !self.store.reading(move |tx| setup_token_is(tx, &seen)).await? {
            self.throttle().failed(address);
            return Err(setup_refused());
        }
        self.throttle().succeeded(address);
        let row = self.new_user(name, Role::Administrator, password).await?;
        let id = row.id.clone();
        self.store
            .writing(move |tx| {
                // Once more: another request may have spent it while the password was computed.
                if !setup_token_is(tx, &token)? || users::count(tx)? > 0 {
                    return Err(setup_refused());
                }
                users::insert(tx, &row)?;
                users::delete_setting(tx, SETUP_SETTING)?;
                users::audit(tx, row.name.as_str(), &address.to_string(), "set_up", row.name.as_str(), "")
            })
            .await?;
        self.new_login(id, address).await
    }

    /// Whether `token` is the set-up token that is waiting.
    pub async fn setup_token_is(&self, token: &str) -> Result<bool> {
        let token = token.to_owned();
        self.store.reading(move |tx| setup_token_is(tx, &token)).await
    }

    /// Makes a user.
    ///
    /// Errors: `Invalid` at `name` or `password`; `Conflict` at `name` when it is taken.
    pub async fn create_user(&self, name: &str, role: Role, password: &str) -> Result<UserRow> {
        let row = self.new_user(name, role, password).await?;
        let out = row.clone();
        self.store.writing(move |tx| insert_user(tx, &row)).await?;
        Ok(out)
    }

    async fn new_user(&self, name: &str, role: Role, password: &str) -> Result<UserRow> {
        let name: Name = name.trim().parse().map_err(|bad| Error::invalid("name", format!("{bad}")))?;
        check_password(password)?;
        let password_hash = self.hash(password).await?;
        Ok(UserRow {
            id: Id::random(),
            name,
            role,
            password_hash,
            created_ms: crate::types::now_ms(),
            last_login_ms: None,
        })
    }

    /// Sets a password and ends the user's logins except `keep`.
    pub async fn set_password(&self, user: &Id, password: &str, keep: Option<&Id>) -> Result<()> {
        check_password(password)?;
        let hash = self.hash(password).await?;
        let (user, keep) = (user.clone(), keep.cloned());
        let ended = self
            .store
            .writing(move |tx| {
                let mut logins = users::login_ids(tx, &user)?;
                users::set_password(tx, &user, &hash, keep.as_ref())?;
                logins.retain(|login| Some(login) != keep.as_ref());
                Ok(logins)
            })
            .await?;
        ended.iter().for_each(|login| self.end(login));
        Ok(())
    }

    /// Like `set_password`, for the user's own: the old one is asked for.
    ///
    /// Errors: `Invalid` at `current` or `password`.
    pub async fn change_password(&self, who: &Known, old: &str, new: &str, address: IpAddr) -> Result<()> {
        self.throttle().admit(address)?;
        let id = who.user_id.clone();
        let row = self.store.reading(move |tx| users::by_id(tx, &id)).await?;
        if !self.verify(old, row.map(|row| row.password_hash)).await? {
            self.throttle().failed(address);
            return Err(Error::invalid("current", "This is not your password."));
        }
        self.throttle().succeeded(address);
        self.set_password(&who.user_id, new, who.login.as_ref()).await
    }

    /// Deletes a user with logins and tokens, and ends what they have open. The last administrator stays.
    pub async fn delete_user(&self, user: &Id) -> Result<UserRow> {
        let id = user.clone();
        let (row, credentials) = self
            .store
            .writing(move |tx| {
                let row = users::by_id(tx, &id)?.ok_or_else(|| Error::not_found("There is no such user."))?;
                keep_one_administrator(tx, &row)?;
                let credentials = users::credential_ids(tx, &id)?;
                users::delete(tx, &id)?;
                Ok((row, credentials))
            })
            .await?;
        credentials.iter().for_each(|credential| self.end(credential));
        Ok(row)
    }

    /// Changes what a user may do; streams that are open end, so that they come back with the new role.
    pub async fn set_role(&self, user: &Id, role: Role) -> Result<UserRow> {
        let id = user.clone();
        let (row, credentials) = self
            .store
            .writing(move |tx| {
                let row = users::by_id(tx, &id)?.ok_or_else(|| Error::not_found("There is no such user."))?;
                if role != Role::Administrator {
                    keep_one_administrator(tx, &row)?;
                }
                users::set_role(tx, &id, role)?;
                Ok((row, users::credential_ids(tx, &id)?))
            })
            .await?;
        credentials.iter().for_each(|credential| self.end(credential));
        Ok(row)
    }

    /// Makes an API token of `user`; its secret, which is shown once.
    pub async fn create_token(&self, user: &Id, name: &str) -> Result<String> {
        let (user, name) = (user.clone(), name.to_owned());
        self.store.writing(move |tx| insert_token(tx, &user, &name)).await
    }

    /// Deletes an API token and ends what uses it.
    pub async fn delete_token(&self, token: &Id) -> Result<()> {
        let id = token.clone();
        if !self.store.writing(move |tx| users::delete_token(tx, &id)).await? {
            return Err(Error::not_found("There is no such token."));
        }
        self.end(token);
        Ok(())
    }

    /// Ends the sockets and streams of a login or a token.
    fn end(&self, credential: &Id) {
        if let Some(ended) = self.live().remove(credential) {
            ended.cancel();
        }
    }

    fn live(&self) -> std::sync::MutexGuard<'_, HashMap<Id, CancellationToken>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn throttle(&self) -> std::sync::MutexGuard<'_, Throttle> {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn hash(&self, password: &str) -> Result<String> {
        let password = password.to_owned();
        self.alone(move || hash_password(&password)).await
    }

    /// Takes as long for a user that does not exist.
    async fn verify(&self, password: &str, known_hash: Option<String>) -> Result<bool> {
        let password = password.get(..PASSWORD_LEN_MAX).unwrap_or(password).to_owned();
        self.alone(move || match known_hash {
            Some(hash) => Ok(verify_password(&password, &hash)),
            None => hash_password(&password).map(|_| false),
        })
        .await
    }

    async fn alone<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let busy = |_| Error::new(ErrorKind::Unavailable, "Too many people log in at once; try again.");
        let _place = self.waiting.try_acquire().map_err(busy)?;
        let _turn = self.hashing.acquire().await.map_err(|error| Error::internal("The server is ending.", error))?;
        blocking(work).await
    }
}

/// Checks what people may choose.
pub fn check_password(password: &str) -> Result<()> {
    let length = password.chars().count();
    if length < PASSWORD_LEN_MIN {
        return Err(Error::invalid(
            "password",
            format!("A password has at least {PASSWORD_LEN_MIN} characters; this one has {length}."),
        ));
    }
    if password.len() > PASSWORD_LEN_MAX {
        return Err(Error::invalid("password", format!("A password has at most {PASSWORD_LEN_MAX} bytes.")));
    }
    Ok(())
}

/// Argon2id, 19 MiB, two passes, one lane, as a PHC string. Takes tens of milliseconds.
pub fn hash_password(password: &str) -> Result<String> {
    let hash: PasswordHash = hasher()
        .hash_password(password.as_bytes())
        .map_err(|error| Error::internal("The password could not be kept.", error))?;
    Ok(hash.to_string())
}

fn verify_password(password: &str, hash: &str) -> bool {
    let Ok(hash) = PasswordHash::new(hash) else { return false };
    hasher().verify_password(password.as_bytes(), &hash).is_ok()
}

fn hasher() -> Argon2<'static> {
    const MEMORY_KIB: u32 = 19 << 10;
    let params = Params::new(MEMORY_KIB, 2, 1, None).unwrap_or_default();
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// Inserts a user whose name must be free.
pub fn insert_user(tx: &Tx, row: &UserRow) -> Result<()> {
    if users::by_name(tx, row.name.as_str())?.is_some() {
        return Err(Error::conflict(format!("There is already a user \"{}\".", row.name)).at("name"));
    }
    users::insert(tx, row)
}

/// Inserts an API token of a user; its secret.
pub fn insert_token(tx: &Tx, user: &Id, name: &str) -> Result<String> {
    let name: Name = name.trim().parse().map_err(|bad| Error::invalid("token_name", format!("{bad}")))?;
    if users::token_name_taken(tx, user, &name)? {
        return Err(Error::conflict(format!("There is already a token \"{name}\" of this user.")).at("token_name"));
    }
    let (secret, hash) = new_secret();
    users::insert_token(tx, &Id::random(), &hash, user, &name)?;
    Ok(secret)
}

/// Replaces the set-up token; the new one.
///
/// Errors: `Conflict` when there is a user already.
pub fn new_setup_token(tx: &Tx) -> Result<String> {
    if users::count(tx)? > 0 {
        return Err(Error::conflict(
            "There is an administrator already; \"innkeeper admin reset-password NAME\" sets a new password.",
        ));
    }
    let (secret, hash) = new_secret();
    users::set_setting(tx, SETUP_SETTING, &hex(&hash))?;
    Ok(secret)
}

fn setup_token_is(tx: &Tx, token: &str) -> Result<bool> {
    let (Some(wanted), Some(given)) = (users::setting(tx, SETUP_SETTING)?, hash_of(token)) else { return Ok(false) };
    Ok(wanted == hex(&given))
}

fn setup_refused() -> Error {
    Error::new(
        ErrorKind::Forbidden,
        "This set-up link is wrong or spent. \"innkeeper admin setup-link\" on the host prints a new one.",
    )
}

fn keep_one_administrator(tx: &Tx, row: &UserRow) -> Result<()> {
    if row.role == Role::Administrator && users::other_administrators(tx, &row.id)? == 0 {
        return Err(Error::conflict(format!("\"{}\" is the only administrator; make another one first.", row.name)));
    }
    Ok(())
}

const SECRET_LEN: usize = 32;

/// A new secret as text, and its hash for the database.
fn new_secret() -> (String, [u8; 32]) {
    let mut bytes = [0u8; SECRET_LEN];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    let text = URL_SAFE_NO_PAD.encode(bytes);
    let hash = Sha256::digest(text.as_bytes()).into();
    (text, hash)
}

/// The hash of a secret; `None` for what cannot be one.
fn hash_of(secret: &str) -> Option<[u8; 32]> {
    let plausible = secret.len() == SECRET_LEN.div_ceil(3) * 4 - 1;
    plausible.then(|| Sha256::digest(secret.as_bytes()).into())
}

/// The token that every form of a login carries; it says nothing about the login's secret.
pub fn csrf_of(secret: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(b"csrf\0");
    hasher.update(secret.as_bytes());
    URL_SAFE_NO_PAD.encode(hasher.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn sample() -> (tempfile::TempDir, Arc<Store>, Auth) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        (dir, Arc::clone(&store), Auth::new(store))
    }

    #[test]
    fn passwords_are_argon2id_with_19_mib() {
        let hash = hash_password("correct horse").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(verify_password("correct horse", &hash));
        assert!(!verify_password("correct house", &hash));
        assert!(!verify_password("", "nonsense"));
    }

    #[actix_rt::test]
    async fn the_setup_token_is_spent_once() {
        let (_dir, store, auth) = sample();
        let token = store.write(new_setup_token).unwrap();
        assert!(auth.setup_token_is(&token).await.unwrap(), "looking does not spend it");
        let wrong = auth.set_up("x", "ada", "long enough", HERE).await.unwrap_err();
        assert_eq!(wrong.kind(), ErrorKind::Forbidden);
        let short = auth.set_up(&token, "ada", "short", HERE).await.unwrap_err();
        assert_eq!(short.field(), Some("password"));
        let login = auth.set_up(&token, "ada", "long enough", HERE).await.unwrap();
        assert_eq!(auth.by_login(&login).await.unwrap().unwrap().role, Role::Administrator);
        assert!(auth.set_up(&token, "eve", "long enough", HERE).await.is_err());
        assert_eq!(store.write(new_setup_token).unwrap_err().kind(), ErrorKind::Conflict);
    }

    #[actix_rt::test]
    async fn logins_outlive_the_process_and_end_with_their_streams() {
        let (_dir, store, auth) = sample();
        auth.create_user("ada", Role::Operator, "long enough").await.unwrap();
        let login = auth.log_in("ada", "long enough", HERE).await.unwrap();
        let auth = Auth::new(store);
        let known = auth.by_login(&login).await.unwrap().unwrap();
        let other = auth.log_in("ada", "long enough", HERE).await.unwrap();
        let stream = auth.by_login(&other).await.unwrap().unwrap().ended;
        auth.log_out(known.login.as_ref().unwrap()).await.unwrap();
        assert!(known.ended.is_cancelled());
        assert!(!stream.is_cancelled(), "another login goes on");
        assert!(auth.by_login(&login).await.unwrap().is_none());
        assert!(auth.still_holds(&auth.by_login(&other).await.unwrap().unwrap()).await.unwrap());
        auth.set_password(&known.user_id, "even longer", None).await.unwrap();
        assert!(stream.is_cancelled(), "a new password ends all logins");
    }

    #[actix_rt::test]
    async fn a_login_that_another_process_ended_takes_its_streams_along() {
        let (dir, _store, auth) = sample();
        auth.create_user("ada", Role::Viewer, "long enough").await.unwrap();
        let login = auth.log_in("ada", "long enough", HERE).await.unwrap();
        let known = auth.by_login(&login).await.unwrap().unwrap();
        crate::store::Store::open(dir.path())
            .unwrap()
            .write(|tx| users::delete_login(tx, known.login.as_ref().unwrap()))
            .unwrap();
        assert!(!known.ended.is_cancelled());
        assert!(!auth.still_holds(&known).await.unwrap());
        assert!(known.ended.is_cancelled());
    }

    #[actix_rt::test]
    async fn a_user_who_goes_or_becomes_another_loses_what_is_open() {
        let (_dir, _store, auth) = sample();
        let ada = auth.create_user("ada", Role::Operator, "long enough").await.unwrap();
        let login = auth.log_in("ada", "long enough", HERE).await.unwrap();
        let token = auth.create_token(&ada.id, "ci").await.unwrap();
        let open = async || {
            let (login, token) = (auth.by_login(&login).await, auth.by_token(&token).await);
            [login, token].map(|known| known.unwrap().unwrap().ended)
        };
        let before = open().await;
        auth.set_role(&ada.id, Role::Viewer).await.unwrap();
        assert!(before.iter().all(CancellationToken::is_cancelled), "they come back with the new role");
        let after = open().await;
        assert!(!after.iter().any(CancellationToken::is_cancelled));
        auth.delete_user(&ada.id).await.unwrap();
        assert!(after.iter().all(CancellationToken::is_cancelled));
    }

    #[actix_rt::test]
    async fn idle_logins_are_over() {
        let (_dir, store, auth) = sample();
        auth.create_user("ada", Role::Viewer, "long enough").await.unwrap();
        let login = auth.log_in("ada", "long enough", HERE).await.unwrap();
        let hash = hash_of(&login).unwrap();
        let now_ms = crate::types::now_ms();
        assert!(store.read(|tx| users::login(tx, &hash, now_ms + 60_000)).unwrap().is_none());
        assert!(auth.by_login(&login).await.unwrap().is_some());
    }

    #[actix_rt::test]
    async fn wrong_passwords_slow_the_address_and_lock_nobody() {
        let (_dir, _store, auth) = sample();
        auth.create_user("ada", Role::Viewer, "long enough").await.unwrap();
        let mut kinds = Vec::new();
        for _ in 0..throttle::FREE_FAILURES + 1 {
            kinds.push(auth.log_in("ada", "wrong", HERE).await.unwrap_err().kind());
        }
        let slowed = kinds.pop();
        assert!(kinds.iter().all(|kind| *kind == ErrorKind::Unauthenticated), "{kinds:?}");
        assert_eq!(slowed, Some(ErrorKind::Unavailable));
        let elsewhere = "192.0.2.7".parse().unwrap();
        assert!(auth.log_in("ada", "long enough", elsewhere).await.is_ok());
        assert!(auth.log_in("nobody", "long enough", elsewhere).await.is_err());
    }

    #[actix_rt::test]
    async fn the_last_administrator_stays() {
        let (_dir, _store, auth) = sample();
        let ada = auth.create_user("ada", Role::Administrator, "long enough").await.unwrap();
        assert_eq!(auth.create_user("ada", Role::Viewer, "long enough").await.unwrap_err().field(), Some("name"));
        assert_eq!(auth.delete_user(&ada.id).await.unwrap_err().kind(), ErrorKind::Conflict);
        assert!(auth.set_role(&ada.id, Role::Viewer).await.is_err());
        auth.create_user("bob", Role::Administrator, "long enough").await.unwrap();
        let token = auth.create_token(&ada.id, "ci").await.unwrap();
        assert_eq!(auth.by_token(&token).await.unwrap().unwrap().user.as_str(), "ada");
        assert_eq!(auth.create_token(&ada.id, "ci").await.unwrap_err().kind(), ErrorKind::Conflict);
        auth.delete_user(&ada.id).await.unwrap();
        assert!(auth.by_token(&token).await.unwrap().is_none());
    }
}
