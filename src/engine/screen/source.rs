//! Where the picture comes from: the graphics card while its driver shows something, the VGA otherwise.

use std::sync::PoisonError;

use super::DirtySource;
use crate::engine::{
    memory::HostRegion,
    vga::{Blink, DirtyPages, Planes, Registers, ScanOut, SharedVga},
    virtio::gpu::{GpuDisplay, Look},
};

/// What the machine has to look at.
pub(super) struct Sources {
    pub(super) vga: SharedVga,
    pub(super) vram: HostRegion,
    /// Of the VGA's memory.
    pub(super) dirty: DirtySource,
    pub(super) gpu: Option<GpuDisplay>,
}

/// What a picture was made of: one of something else is drawn anew.
#[derive(PartialEq, Eq)]
pub(super) enum Content {
    Vga(Box<Registers>),
    /// What the card shows, by its number.
    Gpu(u64),
}

/// One look, before anything is drawn.
pub(super) enum Glance {
    Vga(Box<Registers>, Box<DirtyPages>),
    Gpu(Box<Look>),
}

/// Makes lines of one picture.
pub(super) enum Source {
    Vga(Box<ScanOut>, Box<DirtyPages>),
    Gpu(Box<Look>),
}

impl Sources {
    /// What is shown, and which of it was written since the last call. The pages that were written while the card was shown are
    /// told when the VGA is shown again.
    pub(super) fn take(&self) -> Glance {
        if let Some(look) = self.gpu.as_ref().and_then(GpuDisplay::take_for_screen) {
            return Glance::Gpu(Box::new(look));
        }
        let (registers, mut dirty) = self.vga.lock().unwrap_or_else(PoisonError::into_inner).take_for_screen();
        dirty.merge(&(self.dirty)());
        Glance::Vga(Box::new(registers), Box::new(dirty))
    }

    /// What is shown, all of it.
    pub(super) fn whole(&self) -> Glance {
        if let Some(look) = self.gpu.as_ref().and_then(GpuDisplay::look) {
            return Glance::Gpu(Box::new(look));
        }
        let registers = self.vga.lock().unwrap_or_else(PoisonError::into_inner).registers();
        Glance::Vga(Box::new(registers), Box::new(DirtyPages::NONE))
    }

    /// For a picture that follows one of the size `before`, when what blinks is as `lit` says. `kept` is what the source before
    /// this one left.
    pub(super) fn open(
        &self,
        glance: Glance,
        before: Option<(usize, usize)>,
        lit: Blink,
        kept: Option<Planes>,
    ) -> Source {
        match glance {
            Glance::Vga(registers, dirty) => {
                let vram = self.vram.clone();
                let scan = match kept {
                    Some(planes) => ScanOut::following(planes, &dirty, &registers, vram, before, lit),
                    None => ScanOut::new(&registers, vram, before, lit),
                };
                Source::Vga(Box::new(scan), dirty)
            }
            Glance::Gpu(look) => Source::Gpu(look),
        }
    }
}

impl Glance {
    pub(super) fn content(&self) -> Content {
        match self {
            Glance::Vga(registers, _) => Content::Vga(registers.clone()),
            Glance::Gpu(look) => Content::Gpu(look.serial()),
        }
    }

    /// Whether anything was written.
    pub(super) fn any(&self) -> bool {
        match self {
            Glance::Vga(_, dirty) => dirty.any(),
            Glance::Gpu(look) => look.dirty().any(),
        }
    }
}

impl Source {
    pub(super) fn size(&self) -> (usize, usize) {
        match self {
            Source::Vga(scan, _) => scan.size(),
            Source::Gpu(look) => look.size(),
        }
    }

    /// Whether line `y` may have changed by what was written.
    pub(super) fn is_dirty(&self, y: usize) -> bool {
        match self {
            Source::Vga(scan, dirty) => scan.is_dirty(y, dirty),
            Source::Gpu(look) => look.dirty().has(y),
        }
    }

    /// For the next one.
    pub(super) fn keep(self) -> Option<Planes> {
        match self {
            Source::Vga(scan, _) => scan.into_planes(),
            Source::Gpu(_) => None,
        }
    }

    /// Whether line `y` changes with [`Blink`].
    pub(super) fn blinks(&self, y: usize) -> bool {
        match self {
            Source::Vga(scan, _) => scan.blinks(y),
            Source::Gpu(_) => false,
        }
    }

    /// Makes line `y`; `out` is as long as the screen is wide.
    pub(super) fn line(&mut self, y: usize, out: &mut [u32]) {
        match self {
            Source::Vga(scan, _) => scan.line(y, out),
            Source::Gpu(look) => look.line(y, out),
        }
    }
}
