//! What of the card is saved: resources with their pixels, what is shown of them, the cursor, and the size that is wished for.

use std::io::{Read, Write};

use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use serde::{Deserialize, Serialize};

use super::{
    Config, EVENT_DISPLAY, Gpu,
    protocol::Rect,
    render::{Render, Scanout},
    resources::{BACKING_ENTRIES_MAX, Resource, Resources, SCREEN_PIXELS_MAX, SIDE_MAX},
    rounded_size,
    shown::{CURSOR_PIXELS, Cursor},
};
use crate::engine::{
    memory::{Gpa, RamSpan},
    saved::{BadState, SaveState, State, hex},
};

const KIND: &str = "virtio-gpu";

/// Pictures together take at most so much of a saved state, deflated. Those that find no room are black until the driver fills
/// them again; the one that is shown finds room first. Only a guest that draws noise has so many.
const PACKED_BYTES_MAX: usize = 16 << 20;
/// Deflated at a time, before the room is looked at.
const PIECE_BYTES: usize = 1 << 16;

#[derive(Serialize, Deserialize)]
struct V1 {
    /// Width and height that are wished for.
    size: [u32; 2],
    events: u32,
    news: bool,
    resources: Vec<ResourceV1>,
    scanout: Option<ScanoutV1>,
    /// Width and height of the black picture while a driver shows nothing.
    black: Option<[u32; 2]>,
    cursor: Option<CursorV1>,
}

#[derive(Serialize, Deserialize)]
struct ResourceV1 {
    id: u32,
    format: u32,
    width: u32,
    height: u32,
    backed: bool,
    /// Address (8) and length (4) of each stretch, little-endian.
    #[serde(with = "hex")]
    backing: Vec<u8>,
    /// Deflated; nothing when all are zero.
    #[serde(with = "hex")]
    pixels: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct ScanoutV1 {
    resource: u32,
    /// Column, row, width, height.
    part: [u32; 4],
}

#[derive(Serialize, Deserialize)]
struct CursorV1 {
    x: i32,
    y: i32,
    /// 0xAARRGGBB, little-endian; as pixels are.
    #[serde(with = "hex")]
    image: Vec<u8>,
}

const ENTRY_BYTES: usize = 12;

/// Deflates into what room is left; nothing when it is not enough, or when all is zero.
fn pack(bytes: &[u8], room: &mut usize) -> Vec<u8> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Vec::new();
    }
    let mut packer = DeflateEncoder::new(Vec::new(), Compression::fast());
    for piece in bytes.chunks(PIECE_BYTES) {
        // Memory takes everything.
        if packer.write_all(piece).is_err() || packer.get_ref().len() > *room {
            return Vec::new();
        }
    }
    let packed = packer.finish().unwrap_or_default();
    match room.checked_sub(packed.len()) {
        Some(left) => {
            *room = left;
            packed
        }
        None => Vec::new(),
    }
}

/// Fills `into`, which is zero; false when that is not exactly what was packed.
fn unpack(packed: &[u8], into: &mut [u8]) -> bool {
    if packed.is_empty() {
        return true;
    }
    let mut from = DeflateDecoder::new(packed);
    from.read_exact(into).is_ok() && matches!(from.read(&mut [0]), Ok(0))
}

fn saved_resource(id: u32, resource: &Resource, room: &mut usize) -> ResourceV1 {
    let Resource { format, width, height, pixels, backing } = resource;
    let mut list = Vec::new();
    for span in backing.iter().flat_map(|backing| &backing.spans) {
        list.extend(span.at.0.to_le_bytes());
        list.extend(span.bytes.to_le_bytes());
    }
    ResourceV1 {
        id,
        format: *format as u32,
        width: *width,
        height: *height,
        backed: backing.is_some(),
        backing: list,
        pixels: pack(pixels, room),
    }
}

/// Adds a resource, within the same limits as the driver's.
fn restore_resource(all: &mut Resources, saved: &ResourceV1) -> Result<(), &'static str> {
    let made = all.create(saved.id, saved.format, saved.width, saved.height);
    let made = made.map_err(|_| "a resource cannot be so, or there are too many")?;
    if !unpack(&saved.pixels, &mut made.pixels) {
        return Err("a resource has other pixels than it has room for");
    }
    let (entries, rest) = saved.backing.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() || !saved.backed && !entries.is_empty() || entries.len() > BACKING_ENTRIES_MAX {
        return Err("a backing cannot be so");
    }
    if saved.backed {
        let few = all.check_attach(saved.id, entries.len() as u32);
        few.map_err(|_| "there are too many backings")?;
        let span = |[a0, a1, a2, a3, a4, a5, a6, a7, length @ ..]: &[u8; ENTRY_BYTES]| RamSpan {
            at: Gpa(u64::from_le_bytes([*a0, *a1, *a2, *a3, *a4, *a5, *a6, *a7])),
            bytes: u32::from_le_bytes(*length),
        };
        // Whether it is RAM is seen when it is read.
        all.attach(saved.id, entries.iter().map(span).collect()).map_err(|_| "a backing cannot be so")?;
    }
    Ok(())
}

fn restored_cursor(CursorV1 { x, y, image }: CursorV1) -> Result<Cursor, &'static str> {
    let mut bytes = vec![0; 4 * CURSOR_PIXELS];
    if !unpack(&image, &mut bytes) {
        return Err("the cursor has another size");
    }
    Ok(Cursor { x, y, image: bytes.as_chunks().0.iter().map(|pixel| u32::from_le_bytes(*pixel)).collect() })
}

impl SaveState for Gpu {
    fn save(&self) -> State {
        let Gpu { worker, shared } = self;
        // What it was told by then is asked for again when it is interrupted.
        let Config { size, events, news, told: _ } = *shared.config();
        let mut room = PACKED_BYTES_MAX;
        let cursor = shared.shown().cursor().map(|Cursor { x, y, image }| {
            let bytes: Vec<u8> = image.iter().flat_map(|pixel| pixel.to_le_bytes()).collect();
            CursorV1 { x: *x, y: *y, image: pack(&bytes, &mut room) }
        });
        let (resources, scanout) = worker.while_out(|render: &mut Render, _| {
            let scanout = render.scanout;
            let mut all: Vec<_> = render.resources.iter().collect();
            all.sort_by_key(|(id, _)| scanout.is_none_or(|scanout| scanout.resource != *id));
            let saved = all.into_iter().map(|(id, resource)| saved_resource(id, resource, &mut room));
            (saved.collect::<Vec<_>>(), scanout)
        });
        let scanout = scanout.map(|Scanout { resource, part: Rect { x, y, width, height } }| ScanoutV1 {
            resource,
            part: [x, y, width, height],
        });
        let black = shared.shown().size().filter(|_| scanout.is_none()).map(Into::into);
        State::new(KIND, 1, &V1 { size: size.into(), events, news, resources, scanout, black, cursor })
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let V1 { size, events, news, resources: saved, scanout, black, cursor } = state.fields(KIND, 1)?;
        let bad = |why: &'static str| BadState::new(KIND, why);
        let size = (size[0], size[1]);
        BadState::unless(rounded_size(size) == size, KIND, "no screen can be so large or small")?;
        BadState::unless(events & !EVENT_DISPLAY == 0, KIND, "it has events that are not there")?;
        let mut resources = Resources::default();
        for saved in &saved {
            restore_resource(&mut resources, saved).map_err(bad)?;
        }
        let scanout = scanout.map(|ScanoutV1 { resource, part: [x, y, width, height] }| {
            let part = Rect { x, y, width, height };
            let there = resources.get(resource).is_ok_and(|resource| resource.check_shows(part).is_ok());
            if there { Ok(Scanout { resource, part }) } else { Err(bad("it shows what is not there")) }
        });
        let scanout = scanout.transpose()?;
        let fits = |[width, height]: &[u32; 2]| {
            (1..=SIDE_MAX).contains(width)
                && (1..=SIDE_MAX).contains(height)
                && u64::from(*width) * u64::from(*height) <= SCREEN_PIXELS_MAX
        };
        BadState::unless(black.as_ref().is_none_or(fits), KIND, "no picture can be so large")?;
        let cursor = cursor.map(restored_cursor).transpose().map_err(bad)?;
        // What was transferred and not yet flushed is seen a moment early.
        let mut shown = self.shared.shown();
        shown.end();
        if let Some(Scanout { resource, part }) = scanout
            && let Ok(resource) = resources.get(resource)
        {
            shown.show(resource, part);
        } else if let Some([width, height]) = black {
            shown.show_black((width, height));
        }
        shown.set_cursor(cursor);
        drop(shown);
        *self.shared.config() = Config { events, news, ..Config::new(size) };
        self.worker.while_out(|render: &mut Render, _| (render.resources, render.scanout) = (resources, scanout));
        Ok(())
    }
}
