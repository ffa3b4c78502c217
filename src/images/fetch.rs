//! Fetching an image by its address.

use std::{io::Read, time::Duration};

use ureq::{
    Agent,
    http::Uri,
    tls::{Certificate, RootCerts, TlsConfig, parse_pem},
};

use super::part::{Part, check_room};
use crate::{
    error::{Error, ErrorKind, Result},
    tasks::Progress,
    types::{Id, shorten, show_size},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// A server that sends nothing for this long has stopped.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: u32 = 8;
const READ_BYTES: usize = 256 << 10;
pub const URL_LEN_MAX: usize = 2048;
/// What the host trusts, where Debian and its relatives keep it.
const HOST_CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Checks an address as typed.
///
/// Errors: `Invalid` at `url`.
pub fn check_url(text: &str) -> Result<Uri> {
    let bad = |why: &str| Error::invalid("url", why.to_owned());
    if text.len() > URL_LEN_MAX {
        return Err(bad("The address is too long."));
    }
    let uri: Uri = text.parse().map_err(|_| bad("This is not an address like https://example.org/image.iso."))?;
    match uri.scheme_str() {
        Some("http" | "https") => {}
        Some(other) => {
            return Err(bad(&format!("Addresses begin with https:// or http://, not {}://.", shorten(other))));
        }
        None => return Err(bad("This is not an address like https://example.org/image.iso.")),
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(bad("The address names no host."));
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(bad("An address with a password would be shown to everybody; leave it out."));
    }
    Ok(uri)
}

/// The last part of an address's path, "" when there is none.
pub fn file_name(uri: &Uri) -> &str {
    uri.path().rsplit('/').next().unwrap_or("")
}

/// Receives the file. Blocks; reports bytes.
pub fn fetch(uri: &Uri, folder: &std::path::Path, id: &Id, progress: &mut Progress) -> Result<Part> {
    let failed = |why: String| Error::new(ErrorKind::Unavailable, why);
    progress.report("Connecting", 0, None)?;
    let host = uri.host().unwrap_or("the server").to_owned();
    let mut answer = agent()
        .get(uri)
        .call()
        .map_err(|error| failed(format!("{host} does not give it: {}.", cause(&error))).because(error))?;
    if !answer.status().is_success() {
        return Err(failed(format!("{host} answers {}.", answer.status())));
    }
    let total = answer.body().content_length();
    if let Some(total) = total {
        check_room(folder, total)?;
        progress.log(&format!("{host} sends {}.", show_size(total)));
    }
    let mut part = Part::create(folder, id)?;
    let mut body = answer.body_mut().with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        progress.report("Fetching", part.size_bytes(), total)?;
        let got = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) => {
                let so_far = show_size(part.size_bytes());
                return Err(failed(format!("The connection to {host} broke after {so_far}.")).because(error));
            }
        };
        part.push(buffer.get(..got).unwrap_or_default())?;
    }
    if total.is_some_and(|total| total != part.size_bytes()) {
        return Err(failed(format!("{host} sent only {}.", show_size(part.size_bytes()))));
    }
    Ok(part)
}

fn agent() -> Agent {
    let mut tls = TlsConfig::builder();
    // The host's own list, so that a local authority the host trusts is trusted here too.
    if let Ok(pem) = std::fs::read(HOST_CERTIFICATES) {
        let roots: Vec<Certificate> = parse_pem(&pem)
            .filter_map(|item| match item {
                Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        if !roots.is_empty() {
            tls = tls.root_certs(RootCerts::from(roots));
        }
    }
    Agent::config_builder()
        .tls_config(tls.build())
        .http_status_as_error(false)
        .max_redirects(REDIRECTS_MAX)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_per_read(Some(SILENCE_MAX))
        .user_agent(concat!("innkeeper/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

fn cause(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "the host is not known".into(),
        ureq::Error::Timeout(_) => "it does not answer in time".into(),
        ureq::Error::TooManyRedirects => "it redirects for ever".into(),
        ureq::Error::Io(error) => error.kind().to_string(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_web_addresses_are_fetched() {
        for good in ["https://example.org/a.iso", "http://10.0.0.1:8000/x?y=z"] {
            assert!(check_url(good).is_ok(), "{good}");
        }
        for bad in ["", "file:///etc/shadow", "ftp://a/b", "/etc/passwd", "https:///a", "https://user:pw@a/b", "a b"] {
            assert_eq!(check_url(bad).unwrap_err().field(), Some("url"), "{bad}");
        }
        assert_eq!(file_name(&check_url("https://example.org/x/a.iso?b=/c").unwrap()), "a.iso");
        assert_eq!(file_name(&check_url("https://example.org").unwrap()), "");
    }
}
