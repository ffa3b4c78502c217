//! The files of the front end, as `build.rs` embedded them: hashed names, compressed twice, immutable.

/// One file under `/assets/`.
#[derive(Clone, Copy, Debug)]
pub struct Asset {
    /// The name in the source: "app.js".
    pub name: &'static str,
    /// The name in the URL: "app-1A2B3C4D.js".
    pub file: &'static str,
    pub content_type: &'static str,
    pub bytes: &'static [u8],
    /// Empty when compressing does not help.
    pub br: &'static [u8],
    /// Empty when compressing does not help.
    pub gz: &'static [u8],
}

/// A package of somebody else that is part of the page, with its licence.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    pub name: &'static str,
    pub version: &'static str,
    pub licence: &'static str,
    pub source: &'static str,
    pub text: &'static str,
}

/// How an asset is sent: `Content-Encoding` (none for "") and the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Body {
    pub encoding: &'static str,
    pub bytes: &'static [u8],
}

/// The name carries the content's hash, so a browser may keep it for ever.
pub const CACHE_CONTROL: &str = "public, max-age=31536000, immutable";

mod manifest {
    use super::{Asset, Package};
    include!(concat!(env!("OUT_DIR"), "/manifest.rs"));
}

/// The packages the page is made of, for the about page.
pub fn packages() -> &'static [Package] {
    manifest::PACKAGES
}

/// The URL of the asset `name`, for templates. An asset that is not there (built without the front end) answers 404.
pub fn asset(name: &str) -> &'static str {
    manifest::URLS.iter().find(|(logical, _)| *logical == name).map_or("/assets/missing", |(_, url)| url)
}

/// The asset at `/assets/{file}`.
pub fn find(file: &str) -> Option<&'static Asset> {
    manifest::ASSETS.iter().find(|asset| asset.file == file)
}

impl Asset {
    /// The smallest body that `accept_encoding` (the request's header, "" when absent) allows. Answer with `Vary: Accept-Encoding`.
    pub fn body(&self, accept_encoding: &str) -> Body {
        let accepts = |wanted: &str| {
            accept_encoding.split(',').any(|item| {
                let mut parts = item.split(';').map(str::trim);
                parts.next() == Some(wanted) && !parts.any(|q| matches!(q, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
            })
        };
        match () {
            () if !self.br.is_empty() && accepts("br") => Body { encoding: "br", bytes: self.br },
            () if !self.gz.is_empty() && accepts("gzip") => Body { encoding: "gzip", bytes: self.gz },
            () => Body { encoding: "", bytes: self.bytes },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: Asset =
        Asset { name: "a.js", file: "a-1.js", content_type: "text/javascript", bytes: b"plain", br: b"b", gz: b"g" };

    #[test]
    fn the_smallest_accepted_encoding_is_sent() {
        assert_eq!(SAMPLE.body("gzip, deflate, br").encoding, "br");
        assert_eq!(SAMPLE.body("gzip;q=0.5, br;q=0").encoding, "gzip");
        assert_eq!(SAMPLE.body("").bytes, b"plain");
        assert_eq!(Asset { br: b"", gz: b"", ..SAMPLE }.body("br, gzip").encoding, "");
    }

    #[test]
    fn every_url_names_an_embedded_file() {
        for (name, url) in manifest::URLS {
            let file = url.strip_prefix("/assets/").and_then(|rest| rest.split('#').next()).unwrap_or("");
            assert!(
                find(file).is_some_and(|asset| !asset.bytes.is_empty()),
                "{name} is at {url}, which is not embedded"
            );
        }
        assert_eq!(asset("nothing"), "/assets/missing");
    }
}
