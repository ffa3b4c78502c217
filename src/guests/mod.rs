//! Guests: the service behind pages, API and command line.

pub mod lifecycle;
