//! virtio-gpu (virtio 1.2, 5.7): a graphics card with one screen, in two dimensions.
//!
//! ```text
//! guest RAM ──TRANSFER_TO_HOST_2D──▶ resource ──RESOURCE_FLUSH──▶ what is shown ◀── screen.rs, when somebody looks
//! ```
//! The driver draws into its own memory and says which part to take over. Resources are the worker's alone. The screen reads a
//! copy, so a transfer never waits for a viewer, and a picture that is being drawn is not seen before it is flushed. While no
//! scanout has a resource the VGA is shown: firmware, and systems without a driver, use that.

mod protocol;
mod render;
mod resources;
mod saved;
mod shown;
mod vga_card;

use std::{
    io, mem, slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub(crate) use self::shown::Look;
pub use self::vga_card::VgaCard;
use self::{render::Render, resources::SCREEN_PIXELS_MAX, shown::Shown};
use super::{Features, Kind, VirtioDevice, Worker};
use crate::engine::event::Event;

/// The driver may ask for an EDID (5.7.3).
const F_EDID: u32 = 1;

/// Control and cursor (5.7.2), as large as Linux may want them.
const QUEUE_SIZES: [u16; 2] = [256, 16];
const CURSOR_QUEUE: usize = 1;

/// Device configuration (5.7.4): events, events that the driver has seen, scanouts, sets of 3D abilities.
const CONFIG_BYTES: usize = 16;
/// The size that the screen should have is another one.
const EVENT_DISPLAY: u32 = 1;
const SCANOUTS: u32 = 1;

/// Sizes that the screen can be wished to have, in pixels; together at most `SCREEN_PIXELS_MAX`.
const SIZE_MIN: (u32, u32) = (320, 200);
const SIZE_MAX: u32 = resources::SIDE_MAX;
const SIZE_AT_START: (u32, u32) = (1024, 768);

/// What a card makes the host hold at most beside the guest's RAM, in bytes: 256 MiB. The resources (190 MiB), the copy that is shown
/// and the picture that viewers look at (32 MiB each), and 1 MiB and a half for lists. Memory is taken when it is drawn into: a desktop
/// of 1920 by 1080 that flips between two pictures has about 32 MiB. While a state is saved, some more for a moment.
pub const HOST_BYTES_MAX: u64 = 256 << 20;

pub struct Gpu {
    worker: Worker,
    shared: Arc<Shared>,
}

/// What the worker shares with the screen and with whoever wishes for a size.
struct Shared {
    shown: Mutex<Shown>,
    config: Mutex<Config>,
    /// The configuration has changed.
    wake: Event,
}

#[derive(Clone, Copy)]
struct Config {
    /// What the driver is told that the screen can show best, in pixels.
    size: (u32, u32),
    /// What the driver has not yet seen.
    events: u32,
    /// The driver is to be interrupted for them.
    news: bool,
    /// What the driver has been told that the size is, by each of [`Told`], since it last cleared an event.
    told: [Option<(u32, u32)>; 2],
}

/// By what a driver asks for the size.
enum Told {
    Info,
    Edid,
}

impl Config {
    fn new(size: (u32, u32)) -> Config {
        Config { size, events: 0, news: false, told: [None; 2] }
    }

    /// The size, as an answer.
    fn tell(&mut self, by: Told) -> (u32, u32) {
        self.told[by as usize] = Some(self.size);
        self.size
    }

    /// The driver has seen these events. Linux clears them after it has asked: one that came between is an event again.
    fn clear(&mut self, events: u32) {
        self.events &= !events;
        let told = mem::take(&mut self.told);
        if events & EVENT_DISPLAY != 0 && told.into_iter().flatten().any(|told| told != self.size) {
            self.events |= EVENT_DISPLAY;
            self.news = true;
        }
    }
}

impl Shared {
    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_news(&self) -> bool {
        mem::take(&mut self.config().news)
    }
}

/// A size in whole multiples of eight pixels, within what the screen can have; of the same shape where it must be smaller.
fn rounded_size((width, height): (u32, u32)) -> (u32, u32) {
    let (width, height) = (width.clamp(SIZE_MIN.0, SIZE_MAX) & !7, height.clamp(SIZE_MIN.1, SIZE_MAX) & !7);
    let (wide, high) = (u64::from(width), u64::from(height));
    if wide * high <= SCREEN_PIXELS_MAX {
        return (width, height);
    }
    let narrower = ((SCREEN_PIXELS_MAX * wide / high).isqrt() & !7).min(wide);
    let lower = ((SCREEN_PIXELS_MAX / narrower) & !7).min(high);
    // Both are smaller than before.
    (narrower as u32, lower as u32)
}

/// The screen's hold on the card. Clones are the same.
#[derive(Clone)]
pub struct GpuDisplay(Arc<Shared>);

impl GpuDisplay {
    /// Asks the guest to make its screen so large, in pixels, rounded to what it can be. The guest may do so later or never; the
    /// wish outlives a reset.
    pub fn wish(&self, width: u32, height: u32) {
        let size = rounded_size((width, height));
        let mut config = self.0.config();
        if mem::replace(&mut config.size, size) == size {
            return;
        }
        config.events |= EVENT_DISPLAY;
        config.news = true;
        drop(config);
        self.0.wake.signal();
    }

    /// What is shown and which of it has changed since the last call; None while the card shows nothing.
    pub(crate) fn take_for_screen(&self) -> Option<Look> {
        Look::new(&self.0, true)
    }

    /// What is shown; None while the card shows nothing.
    pub(crate) fn look(&self) -> Option<Look> {
        Look::new(&self.0, false)
    }
}

impl Gpu {
    pub fn new() -> io::Result<Gpu> {
        let config = Mutex::new(Config::new(SIZE_AT_START));
        let shared = Arc::new(Shared { shown: Mutex::new(Shown::NOTHING), config, wake: Event::new()? });
        Ok(Gpu { worker: Worker::spawn("gpu", Render::new(Arc::clone(&shared)))?, shared })
    }

    pub fn display(&self) -> GpuDisplay {
        GpuDisplay(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Gpu {
    fn kind(&self) -> Kind {
        Kind::Gpu
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }
    fn offered(&self) -> Features {
        1 << F_EDID
    }
    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        let fields = [self.shared.config().events, 0, SCANOUTS, 0];
        for (into, field) in config.chunks_exact_mut(4).zip(fields) {
            into.copy_from_slice(&field.to_le_bytes());
        }
        for (byte, from) in into.iter_mut().zip(config.iter().skip(offset)) {
            *byte = *from;
        }
    }
    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        let mut written = [0; CONFIG_BYTES];
        for (into, byte) in written.iter_mut().skip(offset).zip(bytes) {
            *into = *byte;
        }
        // Bits that the driver writes as one are cleared; it can write nothing else.
        let [_, _, _, _, c0, c1, c2, c3, ..] = written;
        let mut config = self.shared.config();
        config.clear(u32::from_le_bytes([c0, c1, c2, c3]));
        if config.news {
            drop(config);
            self.shared.wake.signal();
        }
    }
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.worker)
    }
}

#[cfg(test)]
mod tests;
