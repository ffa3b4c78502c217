//! Errors as every layer above the engine speaks them: a kind to branch on, a sentence for the person, a source for the log.

use std::{error::Error as StdError, fmt};

use serde::{Deserialize, Serialize};

/// What a caller can do about an error. HTTP-agnostic; `web/page.rs` has the only match from kind to status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The thing that a person named is not there.
    NotFound,
    /// The input is wrong; `field` names it.
    Invalid,
    /// Right input, wrong moment: the guest runs, the name is taken, another holds the lock.
    Conflict,
    Unauthenticated,
    Forbidden,
    /// Host memory or pool space is short.
    NoCapacity,
    /// Try again: engine or supervisor does not answer now.
    Unavailable,
    /// Ours to mend; the log has the source.
    Internal,
}

/// An error for a person: `Display` prints only the public sentence, so no template can leak the source.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    public: String,
    field: Option<&'static str>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: ErrorKind, public: impl Into<String>) -> Error {
        Error { kind, public: public.into(), field: None, source: None }
    }
    /// A wrong input at the form or JSON field `field`.
    pub fn invalid(field: &'static str, public: impl Into<String>) -> Error {
        Error { kind: ErrorKind::Invalid, public: public.into(), field: Some(field), source: None }
    }
    pub fn not_found(public: impl Into<String>) -> Error {
        Error::new(ErrorKind::NotFound, public)
    }
    pub fn conflict(public: impl Into<String>) -> Error {
        Error::new(ErrorKind::Conflict, public)
    }
    /// `public` says what was tried on what; the source is logged, not shown.
    pub fn internal(public: impl Into<String>, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        Error { kind: ErrorKind::Internal, public: public.into(), field: None, source: Some(source.into()) }
    }
    /// Like `internal`, of any kind.
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.source = Some(source.into());
        self
    }
    pub fn at(mut self, field: &'static str) -> Error {
        self.field = Some(field);
        self
    }
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
    pub fn field(&self) -> Option<&'static str> {
        self.field
    }
    /// Everything, for the log only; each cause once, since many repeat their own.
    pub fn for_log(&self) -> String {
        let mut text = self.public.clone();
        let mut next: Option<&dyn StdError> = self.source.as_ref().map(|source| &**source as &dyn StdError);
        while let Some(cause) = next {
            let words = cause.to_string();
            if !text.contains(&words) {
                text = format!("{}: {words}", text.trim_end_matches('.'));
            }
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.public)
    }
}
impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_logged_and_never_shown() {
        let error = Error::internal("Cannot open disk \"data\".", std::io::Error::other("/secret/path"));
        assert_eq!(error.to_string(), "Cannot open disk \"data\".");
        assert_eq!(error.for_log(), "Cannot open disk \"data\": /secret/path");
        let told = Error::internal("Cannot start: no memory.", std::io::Error::other("no memory"));
        assert_eq!(told.for_log(), "Cannot start: no memory.");
    }
}
