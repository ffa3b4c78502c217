//! The host's tools, each with the package that brings it: found at fixed places, run with a clean environment.

use std::{
    ffi::OsStr,
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use crate::{
    error::{Error, ErrorKind, Result},
    host::sys,
    types::shorten,
};

/// A program of the host and the Debian package it comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const IP: Tool = Tool { name: "ip", package: "iproute2" };
pub(crate) const NFT: Tool = Tool { name: "nft", package: "nftables" };
pub(crate) const DNSMASQ: Tool = Tool { name: "dnsmasq", package: "dnsmasq-base" };
pub(crate) const PASST: Tool = Tool { name: "passt", package: "passt" };
pub(crate) const SWTPM: Tool = Tool { name: "swtpm", package: "swtpm" };

/// Where tools are looked for; never the caller's `PATH`, because `hostd` runs them as root.
const PLACES: [&str; 6] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];
/// How much of a tool's complaint goes into the log.
const COMPLAINT_BYTES_MAX: usize = 2000;

impl Tool {
    /// The tool's absolute path, if the host has it.
    pub(crate) fn find(self) -> Option<PathBuf> {
        PLACES.iter().map(|place| PathBuf::from(place).join(self.name)).find(|path| path.is_file())
    }

    /// A command with an empty environment (but for `PATH` and `LC_ALL`), to be given arguments and run.
    ///
    /// Errors: `Unavailable` when the host has not got it, with the package.
    pub(crate) fn command(self) -> Result<Command> {
        let path = self.find().ok_or_else(|| {
            let Tool { name, package } = self;
            Error::new(
                ErrorKind::Unavailable,
                format!("\"{name}\" is missing on this host. Install its package: apt install {package}"),
            )
        })?;
        let mut command = Command::new(path);
        command.env_clear().env("PATH", PLACES.join(":")).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
        sys::unblock_signals(&mut command);
        Ok(command)
    }

    /// Runs the tool to its end and returns what it printed. `doing` completes the sentence "Cannot …".
    ///
    /// Errors: the tool is missing, or it complained; its complaint is the source.
    pub(crate) fn run(self, doing: &str, arguments: &[&str]) -> Result<Vec<u8>> {
        let output = self.command()?.args(arguments).output().map_err(|error| self.failed(doing, error.to_string()))?;
        self.checked(doing, output)
    }

    /// Like `run`, with text on the tool's standard input.
    pub(crate) fn feed(self, doing: &str, arguments: &[&str], input: &str) -> Result<Vec<u8>> {
        let mut command = self.command()?;
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| self.failed(doing, error.to_string()))?;
        // What is fed is far less than a pipe holds, so this cannot wait for a reader that waits for us.
        let fed = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().map_err(|error| self.failed(doing, error.to_string()))?;
        let printed = self.checked(doing, output)?;
        match fed {
            Some(Err(error)) => Err(self.failed(doing, error.to_string())),
            _ => Ok(printed),
        }
    }

    /// Like `run`, for JSON.
    pub(crate) fn json(self, doing: &str, arguments: &[&str]) -> Result<serde_json::Value> {
        let printed = self.run(doing, arguments)?;
        // `ip -json` prints nothing at all where there is nothing.
        if printed.iter().all(u8::is_ascii_whitespace) {
            return Ok(serde_json::Value::Array(vec![]));
        }
        serde_json::from_slice(&printed).map_err(|error| self.failed(doing, error.to_string()))
    }

    fn checked(self, doing: &str, output: Output) -> Result<Vec<u8>> {
        if output.status.success() {
            return Ok(output.stdout);
        }
        let kept = output.stderr.get(..COMPLAINT_BYTES_MAX).unwrap_or(&output.stderr);
        Err(self.failed(doing, String::from_utf8_lossy(kept).trim().to_owned()))
    }

    /// The sentence for a tool that ran and complained; the last line of the complaint is for the person too.
    pub(crate) fn failed(self, doing: &str, complaint: String) -> Error {
        let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        let said = shorten_line(last);
        Error::new(ErrorKind::Unavailable, format!("Cannot {doing}: \"{}\" says: {said}", self.name)).because(complaint)
    }
}

/// One line of somebody's text without control characters, at most 160 characters.
fn shorten_line(text: &str) -> String {
    const KEEP: usize = 160;
    text.trim().chars().take(KEEP).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Whether `name` can be the name of a network interface (`dev_valid_name` in the kernel), and is one that `ip` takes for nothing else.
pub(crate) fn check_interface_name(name: &str) -> Result<()> {
    const LEN_MAX: usize = 15;
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'@');
    let first = name.as_bytes().first().copied().unwrap_or_default();
    if name.len() > LEN_MAX || !first.is_ascii_alphanumeric() || !name.bytes().all(good) {
        return Err(Error::invalid("network", format!("\"{}\" is not the name of a bridge.", shorten(name))));
    }
    Ok(())
}

/// For arguments made of paths: the tools we run take any bytes but NUL.
pub(crate) fn text(value: &OsStr) -> String {
    value.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        let error = Tool { name: "no-such-tool", package: "its-package" }.command().unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"no-such-tool\" is missing on this host. Install its package: apt install its-package"
        );
    }

    #[test]
    fn a_complaint_becomes_one_line_and_the_rest_is_for_the_log() {
        let error = IP.failed("make a bridge", "first\nRTNETLINK answers: File exists\n".into());
        assert_eq!(error.to_string(), "Cannot make a bridge: \"ip\" says: RTNETLINK answers: File exists");
        assert!(error.for_log().contains("first"));
    }

    #[test]
    fn interface_names_cannot_be_options_or_paths() {
        for good in ["br0", "innkeeper0", "eth0.12", "a"] {
            assert!(check_interface_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-batch", "..", "a/b", "a b", "sixteen-letters-", "br0\n", "."] {
            assert!(check_interface_name(bad).is_err(), "{bad}");
        }
    }
}
