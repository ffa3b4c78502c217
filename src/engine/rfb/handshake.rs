//! The start of a connection: version, security, and what the desktop is (RFC 6143, 7.1 to 7.3).

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use super::pixel::PixelFormat;

const VERSION: &[u8; 12] = b"RFB 003.008\n";
/// The security type of a connection without a password.
const NONE: u8 = 1;

/// The versions that differ on the wire; all others are taken for 3.3, as the RFC wants.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    V3,
    V7,
    V8,
}

/// Agrees on a version and on no security, and hears that the viewer wants to share, which all do.
pub(super) fn welcome(mut stream: &UnixStream) -> io::Result<()> {
    let version = exchange_versions(stream)?;
    match version {
        Version::V3 => stream.write_all(&u32::from(NONE).to_be_bytes())?,
        Version::V7 | Version::V8 => {
            stream.write_all(&[1, NONE])?;
            let mut chosen = [0];
            stream.read_exact(&mut chosen)?;
            if chosen != [NONE] {
                let error = "The viewer chose a security type that was not offered";
                if version == Version::V8 {
                    stream.write_all(&[0, 0, 0, 1])?;
                    say(stream, error)?;
                }
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            if version == Version::V8 {
                stream.write_all(&[0; 4])?;
            }
        }
    }
    let mut shared = [0];
    stream.read_exact(&mut shared)
}

/// Says what the desktop is; the viewer may speak from now on.
pub(super) fn introduce(mut stream: &UnixStream, size: (usize, usize), name: &str) -> io::Result<()> {
    let mut bytes = Vec::new();
    bytes.extend(short(size.0).to_be_bytes());
    bytes.extend(short(size.1).to_be_bytes());
    bytes.extend(PixelFormat::NATIVE.to_bytes());
    bytes.extend((name.len() as u32).to_be_bytes());
    bytes.extend(name.as_bytes());
    stream.write_all(&bytes)
}

/// Ends the connection with a reason.
pub(super) fn refuse(mut stream: &UnixStream, reason: &str) -> io::Result<()> {
    match exchange_versions(stream)? {
        Version::V3 => stream.write_all(&[0; 4])?,
        Version::V7 | Version::V8 => stream.write_all(&[0])?,
    }
    say(stream, reason)
}

/// A size or place on the wire. Pictures are smaller than that.
pub(super) fn short(pixels: usize) -> u16 {
    u16::try_from(pixels).unwrap_or(u16::MAX)
}

fn exchange_versions(mut stream: &UnixStream) -> io::Result<Version> {
    stream.write_all(VERSION)?;
    let mut version = [0; 12];
    stream.read_exact(&mut version)?;
    match &version {
        b"RFB 003.008\n" => Ok(Version::V8),
        b"RFB 003.007\n" => Ok(Version::V7),
        [b'R', b'F', b'B', b' ', _, _, _, b'.', _, _, _, b'\n'] => Ok(Version::V3),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "The viewer does not speak RFB")),
    }
}

fn say(mut stream: &UnixStream, words: &str) -> io::Result<()> {
    stream.write_all(&(words.len() as u32).to_be_bytes())?;
    stream.write_all(words.as_bytes())
}
