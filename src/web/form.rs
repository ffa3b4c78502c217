//! Submitted forms: fields as typed, by name.

use std::rc::Rc;

use actix_web::{FromRequest, HttpMessage, HttpRequest, dev::Payload, web::Query};

use crate::error::{Error, ErrorKind, Result};

/// A form is text that a person typed.
pub const FORM_BYTES_MAX: usize = 64 << 10;

/// The fields of an `application/x-www-form-urlencoded` body. The guard has read it and checked its token.
#[derive(Debug, Clone)]
pub struct Form(Rc<Vec<(String, String)>>);

impl Form {
    pub(super) fn parse(body: &[u8]) -> Result<Form> {
        let bad = || Error::new(ErrorKind::Invalid, "The form cannot be read.");
        let text = std::str::from_utf8(body).map_err(|_| bad())?;
        let fields = Query::<Vec<(String, String)>>::from_query(text).map_err(|_| bad())?;
        Ok(Form(Rc::new(fields.into_inner())))
    }

    /// The first value of a field, "" when there is none.
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A checkbox: there when it is ticked.
    pub fn ticked(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }
}

impl FromRequest for Form {
    type Error = Error;
    type Future = std::future::Ready<Result<Form>>;
    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let form = request.extensions().get::<Form>().cloned();
        std::future::ready(form.ok_or_else(|| Error::new(ErrorKind::Invalid, "A form was expected.")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_decoded_and_absent_ones_empty() {
        let form = Form::parse(b"name=a%20b+c&disk=1&disk=2&start=on").unwrap();
        assert_eq!(form.get("name"), "a b c");
        assert_eq!(form.all("disk").collect::<Vec<_>>(), ["1", "2"]);
        assert!(form.ticked("start") && !form.ticked("stop"));
        assert_eq!(form.get("nothing"), "");
        assert!(Form::parse(b"\xff=1").is_err());
    }
}
