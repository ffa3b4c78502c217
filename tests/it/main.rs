//! Tests of whole processes and their seams, in one binary.

mod library;
mod support;
mod web;
