//! placeholder
use super::{input::InputSink, screen::Screen};
use std::{io, os::unix::net::UnixListener, sync::Arc};
pub fn serve(_l: UnixListener, _s: Arc<Screen>, _i: Arc<dyn InputSink>, _n: &str) -> io::Result<()> {
    Ok(())
}
