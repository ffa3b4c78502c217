//! Reading a `multipart/form-data` body as it arrives (RFC 7578): small fields in memory, the file piece by piece, nothing on disk.

use std::pin::Pin;

use actix_web::{HttpRequest, http::header, web};
use futures_util::{Stream, StreamExt};
use tokio_util::bytes::{Bytes, BytesMut};

use crate::error::{Error, ErrorKind, Result};

/// A field that is not the file.
const FIELD_BYTES_MAX: usize = 4 << 10;
/// The headers of one part.
const HEAD_BYTES_MAX: usize = 4 << 10;
/// RFC 2046, section 5.1.1.
const BOUNDARY_LEN_MAX: usize = 70;

/// The head of one part.
#[derive(Debug, PartialEq, Eq)]
pub struct PartHead {
    pub name: String,
    /// For a file.
    pub file_name: Option<String>,
}

/// A body being read. Call [`Multipart::next_part`], then [`Multipart::piece`] until it has no more.
pub struct Multipart {
    source: Pin<Box<dyn Stream<Item = Result<Bytes>>>>,
    /// What ends a part: CRLF, two dashes, the boundary.
    delimiter: Vec<u8>,
    buffer: BytesMut,
    in_part: bool,
    ended: bool,
}

impl Multipart {
    pub fn new(request: &HttpRequest, payload: web::Payload) -> Result<Multipart> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let boundary = boundary(kind).ok_or_else(|| bad("The form cannot be read."))?;
        let source = payload
            .map(|piece| piece.map_err(|error| bad("The upload was cut short; nothing was kept.").because(error)));
        Ok(Multipart::from_stream(boundary, source))
    }

    fn from_stream(boundary: &str, source: impl Stream<Item = Result<Bytes>> + 'static) -> Multipart {
        // The first boundary has no line end before it; with one put in, it is like the others.
        let buffer = BytesMut::from(&b"\r\n"[..]);
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        Multipart { source: Box::pin(source), delimiter, buffer, in_part: true, ended: false }
    }

    /// Skips what is left of this part and reads the head of the next; `None` at the end.
    pub async fn next_part(&mut self) -> Result<Option<PartHead>> {
        while self.piece().await?.is_some() {}
        if self.ended {
            return Ok(None);
        }
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(bad("The form cannot be read."));
            }
            self.more().await?;
        };
        let head = self.buffer.split_to(end);
        let _ = self.buffer.split_to(4);
        self.in_part = true;
        part_head(&head).map(Some).ok_or_else(|| bad("The form cannot be read."))
    }

    /// The next bytes of this part; `None` at its end.
    pub async fn piece(&mut self) -> Result<Option<Bytes>> {
        while self.in_part {
            if let Some(at) = find(&self.buffer, &self.delimiter) {
                let piece = self.buffer.split_to(at).freeze();
                let _ = self.buffer.split_to(self.delimiter.len());
                self.in_part = false;
                self.after_delimiter().await?;
                return Ok(Some(piece).filter(|piece| !piece.is_empty()));
            }
            // The end of the buffer may be the beginning of a delimiter.
            let sure = self.buffer.len().saturating_sub(self.delimiter.len());
            if sure > 0 {
                return Ok(Some(self.buffer.split_to(sure).freeze()));
            }
            self.more().await?;
        }
        Ok(None)
    }

    /// The whole of a small part, as text.
    pub async fn text(&mut self) -> Result<String> {
        let mut bytes = Vec::new();
        while let Some(piece) = self.piece().await? {
            if bytes.len() + piece.len() > FIELD_BYTES_MAX {
                return Err(bad("A field of the form is too long."));
            }
            bytes.extend_from_slice(&piece);
        }
        String::from_utf8(bytes).map_err(|_| bad("The form cannot be read."))
    }

    /// Two dashes end the body, a line end leads to the next part.
    async fn after_delimiter(&mut self) -> Result<()> {
        while self.buffer.len() < 2 {
            self.more().await?;
        }
        match self.buffer.split_to(2).as_ref() {
            b"--" => self.ended = true,
            b"\r\n" => {}
            _ => return Err(bad("The form cannot be read.")),
        }
        Ok(())
    }

    async fn more(&mut self) -> Result<()> {
        match self.source.next().await {
            Some(piece) => self.buffer.extend_from_slice(&piece?),
            None => return Err(bad("The upload was cut short; nothing was kept.")),
        }
        Ok(())
    }
}

fn bad(text: &str) -> Error {
    Error::new(ErrorKind::Invalid, text).at("file")
}

fn boundary(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let value = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.trim().split_once('=')?;
        name.eq_ignore_ascii_case("boundary").then_some(value)
    })?;
    let value = value.trim_matches('"');
    (!value.is_empty() && value.len() <= BOUNDARY_LEN_MAX).then_some(value)
}

fn part_head(head: &[u8]) -> Option<PartHead> {
    let head = std::str::from_utf8(head).ok()?;
    let disposition = head.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    })?;
    Some(PartHead { name: quoted(disposition, "name")?, file_name: quoted(disposition, "filename") })
}

/// The quoted value of one parameter; browsers escape only quotes and line ends, as %22, %0D and %0A.
fn quoted(disposition: &str, name: &str) -> Option<String> {
    let start = disposition.find(&format!("; {name}=\""))? + name.len() + 4;
    let value = disposition.get(start..)?;
    Some(value.get(..value.find('"')?)?.replace("%22", "\""))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = haystack.get(from..)?.iter().position(|byte| *byte == first) {
        if haystack.get(from + at..)?.starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of a body that arrives `step` bytes at a time.
    async fn read(body: &'static [u8], step: usize) -> Result<Vec<(String, Option<String>, Vec<u8>)>> {
        let pieces = futures_util::stream::iter(body.chunks(step).map(|piece| Ok(Bytes::from_static(piece))));
        let mut multipart = Multipart::from_stream("XX", pieces);
        let mut parts = Vec::new();
        while let Some(head) = multipart.next_part().await? {
            let mut bytes = Vec::new();
            while let Some(piece) = multipart.piece().await? {
                bytes.extend_from_slice(&piece);
            }
            parts.push((head.name, head.file_name, bytes));
        }
        Ok(parts)
    }

    const BODY: &[u8] = b"--XX\r\nContent-Disposition: form-data; name=\"csrf\"\r\n\r\ntoken\r\n--XX\r\n\
        content-disposition: form-data; name=\"file\"; filename=\"a b.iso\"\r\nContent-Type: x/y\r\n\r\n\r\n--X\r\n--XY\0\r\n\r\n--XX--\r\n";

    #[actix_rt::test]
    async fn parts_are_the_same_however_they_arrive() {
        for step in [1, 2, 3, 7, 50, 4096] {
            let parts = read(BODY, step).await.unwrap();
            assert_eq!(parts.len(), 2, "step {step}");
            assert_eq!(parts[0], ("csrf".into(), None, b"token".to_vec()));
            assert_eq!(parts[1], ("file".into(), Some("a b.iso".into()), b"\r\n--X\r\n--XY\0\r\n".to_vec()));
        }
    }

    #[actix_rt::test]
    async fn a_body_without_its_end_is_an_error() {
        for length in [5, 60, 80, BODY.len() - 6] {
            assert!(read(&BODY[..length], 16).await.is_err(), "{length}");
        }
    }

    #[test]
    fn the_boundary_comes_from_the_content_type() {
        assert_eq!(boundary("multipart/form-data; charset=x; boundary=\"a b\""), Some("a b"));
        assert_eq!(boundary("multipart/mixed; boundary=a"), None);
        assert_eq!(boundary("multipart/form-data"), None);
    }
}
