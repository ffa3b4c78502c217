//! Real processes on this machine's own `/dev/kvm`: the built binary, the built-in test guest, SeaBIOS, and a kernel of a few bytes.
//!
//! ```text
//! world.rs     a server of its own for each test, as root or as an ordinary user; its processes, and how they are killed
//! viewer.rs    serial console, screen and picture, as a viewer has them
//! kernel.rs    a guest that does what one letter tells it
//! ```
//!
//! A test that cannot run here prints "skipped: " and why. Servers of these tests lack the right to change networks: the
//! host's stay as they are.

mod consoles;
mod failures;
mod floods;
mod kernel;
mod kills;
mod mistakes;
mod starts;
mod suspend;
mod viewer;
mod world;
