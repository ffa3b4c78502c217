//! Users, logins, tokens, settings and the audit trail as rows.

use std::{fmt, str::FromStr};

use rusqlite::{Row, named_params, params};
use serde::{Deserialize, Serialize};

use super::{Tx, get, parsed};
use crate::{
    error::Result,
    types::{BadValue, Id, Name},
};

/// What a person may do. Ordered: each may do what the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Viewer,
    Operator,
    Administrator,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Administrator, Role::Operator, Role::Viewer];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Administrator => "administrator",
        }
    }
}
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl FromStr for Role {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Role, BadValue> {
        Role::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| BadValue("A role is administrator, operator or viewer.".into()))
    }
}

#[derive(Debug, Clone)]
pub struct UserRow {
    pub id: Id,
    pub name: Name,
    pub role: Role,
    pub password_hash: String,
    pub created_ms: i64,
    pub last_login_ms: Option<i64>,
}

fn user(row: &Row) -> rusqlite::Result<UserRow> {
    Ok(UserRow {
        id: parsed(row, "id")?,
        name: parsed(row, "name")?,
        role: parsed(row, "role")?,
        password_hash: get(row, "password_hash")?,
        created_ms: get(row, "created_ms")?,
        last_login_ms: get(row, "last_login_ms")?,
    })
}

pub fn count(tx: &Tx) -> Result<u64> {
    tx.count("SELECT count(*) FROM users", [])
}

/// How many administrators there are besides `id`.
pub fn other_administrators(tx: &Tx, id: &Id) -> Result<u64> {
    tx.count("SELECT count(*) FROM users WHERE role = 'administrator' AND id <> ?1", [id.as_str()])
}

pub fn list(tx: &Tx) -> Result<Vec<UserRow>> {
    tx.all("SELECT * FROM users ORDER BY name", [], user)
}

pub fn by_name(tx: &Tx, name: &str) -> Result<Option<UserRow>> {
    tx.one("SELECT * FROM users WHERE name = ?1", [name], user)
}

pub fn by_id(tx: &Tx, id: &Id) -> Result<Option<UserRow>> {
    tx.one("SELECT * FROM users WHERE id = ?1", [id.as_str()], user)
}

pub fn insert(tx: &Tx, row: &UserRow) -> Result<()> {
    tx.run(
        "INSERT INTO users (id, name, role, password_hash, created_ms) VALUES (:id, :name, :role, :hash, :now)",
        named_params! {":id": row.id.as_str(), ":name": row.name.as_str(), ":role": row.role.as_str(),
        ":hash": row.password_hash, ":now": row.created_ms},
    )?;
    Ok(())
}

/// Sets a new password and ends all logins of that user but `keep`.
pub fn set_password(tx: &Tx, id: &Id, password_hash: &str, keep: Option<&Id>) -> Result<()> {
    tx.run("UPDATE users SET password_hash = ?2 WHERE id = ?1", params![id.as_str(), password_hash])?;
    tx.run("DELETE FROM logins WHERE user_id = ?1 AND id IS NOT ?2", params![id.as_str(), keep.map(Id::as_str)])?;
    Ok(())
}

pub fn set_role(tx: &Tx, id: &Id, role: Role) -> Result<()> {
    tx.run("UPDATE users SET role = ?2 WHERE id = ?1", [id.as_str(), role.as_str()])?;
    Ok(())
}

/// Deletes the user with all logins and tokens.
pub fn delete(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("DELETE FROM users WHERE id = ?1", [id.as_str()])?;
    Ok(())
}

/// A login or a token together with whose it is.
#[derive(Debug, Clone)]
pub struct Credential {
    pub id: Id,
    pub user_id: Id,
    pub user: Name,
    pub role: Role,
    pub used_ms: Option<i64>,
}

fn credential(row: &Row) -> rusqlite::Result<Credential> {
    Ok(Credential {
        id: parsed(row, "id")?,
        user_id: parsed(row, "user_id")?,
        user: parsed(row, "user")?,
        role: parsed(row, "role")?,
        used_ms: get(row, "used_ms")?,
    })
}

/// Notes a login of `user_id`, and that it happened on the user.
pub fn insert_login(tx: &Tx, id: &Id, token_hash: &[u8; 32], user_id: &Id, address: &str) -> Result<()> {
    tx.run(
        "INSERT INTO logins (id, token_hash, user_id, address, created_ms, used_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?5)",
        params![id.as_str(), token_hash, user_id.as_str(), address, tx.now_ms],
    )?;
    tx.run("UPDATE users SET last_login_ms = ?2 WHERE id = ?1", params![user_id.as_str(), tx.now_ms])?;
    Ok(())
}

/// The login with this token, when it was used after `since_ms`.
pub fn login(tx: &Tx, token_hash: &[u8; 32], since_ms: i64) -> Result<Option<Credential>> {
    tx.one(
        "SELECT logins.id, user_id, users.name AS user, role, used_ms FROM logins JOIN users ON users.id = user_id
         WHERE token_hash = ?1 AND used_ms > ?2",
        params![token_hash, since_ms],
        credential,
    )
}

/// Whether the login is there and was used after `since_ms`.
pub fn login_is_used(tx: &Tx, id: &Id, since_ms: i64) -> Result<bool> {
    let sql = "SELECT count(*) FROM logins WHERE id = ?1 AND used_ms > ?2";
    Ok(tx.count(sql, params![id.as_str(), since_ms])? > 0)
}

pub fn touch_login(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("UPDATE logins SET used_ms = ?2 WHERE id = ?1", params![id.as_str(), tx.now_ms])?;
    Ok(())
}

pub fn delete_login(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("DELETE FROM logins WHERE id = ?1", [id.as_str()])?;
    Ok(())
}

/// Forgets logins not used since `since_ms`.
pub fn delete_idle_logins(tx: &Tx, since_ms: i64) -> Result<()> {
    tx.run("DELETE FROM logins WHERE used_ms <= ?1", [since_ms])?;
    Ok(())
}

pub fn login_ids(tx: &Tx, user_id: &Id) -> Result<Vec<Id>> {
    tx.all("SELECT id FROM logins WHERE user_id = ?1", [user_id.as_str()], |row| parsed(row, "id"))
}

/// Of everything that the user comes in with: logins and API tokens.
pub fn credential_ids(tx: &Tx, user_id: &Id) -> Result<Vec<Id>> {
    let sql = "SELECT id FROM logins WHERE user_id = ?1 UNION ALL SELECT id FROM tokens WHERE user_id = ?1";
    tx.all(sql, [user_id.as_str()], |row| parsed(row, "id"))
}

#[derive(Debug, Clone)]
pub struct TokenRow {
    pub id: Id,
    pub name: Name,
    pub user_id: Id,
    pub user: Name,
    pub created_ms: i64,
    pub used_ms: Option<i64>,
}

pub fn tokens(tx: &Tx) -> Result<Vec<TokenRow>> {
    tx.all(
        "SELECT tokens.id, tokens.name, user_id, users.name AS user, tokens.created_ms, used_ms
         FROM tokens JOIN users ON users.id = user_id ORDER BY users.name, tokens.name",
        [],
        |row| {
            Ok(TokenRow {
                id: parsed(row, "id")?,
                name: parsed(row, "name")?,
                user_id: parsed(row, "user_id")?,
                user: parsed(row, "user")?,
                created_ms: get(row, "created_ms")?,
                used_ms: get(row, "used_ms")?,
            })
        },
    )
}

pub fn token(tx: &Tx, token_hash: &[u8; 32]) -> Result<Option<Credential>> {
    tx.one(
        "SELECT tokens.id, user_id, users.name AS user, role, used_ms FROM tokens JOIN users ON users.id = user_id
         WHERE token_hash = ?1",
        [token_hash],
        credential,
    )
}

pub fn token_name_taken(tx: &Tx, user_id: &Id, name: &Name) -> Result<bool> {
    let sql = "SELECT count(*) FROM tokens WHERE user_id = ?1 AND name = ?2";
    Ok(tx.count(sql, [user_id.as_str(), name.as_str()])? > 0)
}

pub fn insert_token(tx: &Tx, id: &Id, token_hash: &[u8; 32], user_id: &Id, name: &Name) -> Result<()> {
    tx.run(
        "INSERT INTO tokens (id, token_hash, user_id, name, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![id.as_str(), token_hash, user_id.as_str(), name.as_str(), tx.now_ms],
    )?;
    Ok(())
}

pub fn touch_token(tx: &Tx, id: &Id) -> Result<()> {
    tx.run("UPDATE tokens SET used_ms = ?2 WHERE id = ?1", params![id.as_str(), tx.now_ms])?;
    Ok(())
}

/// Whether there was one.
pub fn delete_token(tx: &Tx, id: &Id) -> Result<bool> {
    Ok(tx.run("DELETE FROM tokens WHERE id = ?1", [id.as_str()])? > 0)
}

pub fn setting(tx: &Tx, name: &str) -> Result<Option<String>> {
    tx.one("SELECT value FROM settings WHERE name = ?1", [name], |row| row.get(0))
}

pub fn set_setting(tx: &Tx, name: &str, value: &str) -> Result<()> {
    tx.run(
        "INSERT INTO settings (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = ?2",
        [name, value],
    )?;
    Ok(())
}

pub fn delete_setting(tx: &Tx, name: &str) -> Result<()> {
    tx.run("DELETE FROM settings WHERE name = ?1", [name])?;
    Ok(())
}

/// One line of the audit trail.
#[derive(Debug, Clone, Serialize)]
pub struct AuditRow {
    pub at_ms: i64,
    pub who: String,
    pub address: String,
    pub action: String,
    pub subject: String,
    pub detail: String,
}

/// What guests do by themselves, as actions of the trail.
pub const FAILED: &str = "fail_guest";
pub const SUSPEND_FAILED: &str = "fail_to suspend_guest";
pub const CRASHED: &str = "crash_guest";
pub const SWITCHED_OFF: &str = "switch_off_guest";

/// The trail keeps this many lines.
pub const AUDIT_LEN_MAX: i64 = 10_000;

pub fn audit(tx: &Tx, who: &str, address: &str, action: &str, subject: &str, detail: &str) -> Result<()> {
    tx.run(
        "INSERT INTO audit (at_ms, who, address, action, subject, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![tx.now_ms, who, address, action, subject, detail],
    )?;
    tx.run("DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?1", [AUDIT_LEN_MAX])?;
    Ok(())
}

/// Newest first.
pub fn audit_trail(tx: &Tx, at_most: u32) -> Result<Vec<AuditRow>> {
    tx.all("SELECT * FROM audit ORDER BY id DESC LIMIT ?1", [at_most], audit_row)
}

/// What was done to one guest, newest first. Lines about a guest have its id as their detail, because its name can change.
pub fn audit_of_guest(tx: &Tx, guest: &Id, at_most: u32) -> Result<Vec<AuditRow>> {
    let sql = "SELECT * FROM audit WHERE detail = ?1 ORDER BY id DESC LIMIT ?2";
    tx.all(sql, params![guest.as_str(), at_most], audit_row)
}

fn audit_row(row: &Row) -> rusqlite::Result<AuditRow> {
    Ok(AuditRow {
        at_ms: get(row, "at_ms")?,
        who: get(row, "who")?,
        address: get(row, "address")?,
        action: get(row, "action")?,
        subject: get(row, "subject")?,
        detail: get(row, "detail")?,
    })
}
