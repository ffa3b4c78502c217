//! How pixels travel: Raw, Zlib and ZRLE (RFC 6143, 7.7; Zlib from the RFB community specification).

use std::io;

use flate2::{Compress, Compression, FlushCompress};

use super::pixel::PixelFormat;

/// The encodings that carry pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Raw = 0,
    Zlib = 6,
    Zrle = 16,
}

impl Encoding {
    pub(super) fn from_number(number: i32) -> Option<Encoding> {
        match number {
            0 => Some(Encoding::Raw),
            6 => Some(Encoding::Zlib),
            16 => Some(Encoding::Zrle),
            _ => None,
        }
    }
}

/// One viewer's encoder. Each compressed encoding is one zlib stream from first to last rectangle.
#[derive(Default)]
pub(super) struct Encoder {
    zlib: Option<Compress>,
    zrle: Option<Compress>,
    /// What goes into a zlib stream, kept to be filled again.
    plain: Vec<u8>,
    tile: Vec<u32>,
    palette: Vec<u32>,
}

/// Speed before size: most viewers are near, and a slow one is slow because of its line, which zlib helps at any level.
const LEVEL: u32 = 1;
/// The width and height of ZRLE's tiles.
const TILE: usize = 64;
/// The most colours that a ZRLE tile can name, and that it can pack into bits.
const PALETTE_MAX: usize = 127;
const PACKED_MAX: usize = 16;

impl Encoder {
    /// Appends the content of a rectangle: `pixels` row by row, `width` in a row.
    ///
    /// Errors: the zlib stream broke, which ends the viewer.
    pub(super) fn encode(
        &mut self,
        encoding: Encoding,
        format: &PixelFormat,
        width: usize,
        pixels: &[u32],
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        match encoding {
            Encoding::Raw => {
                pixels.iter().for_each(|pixel| format.put(*pixel, out));
                Ok(())
            }
            Encoding::Zlib => {
                self.plain.clear();
                pixels.iter().for_each(|pixel| format.put(*pixel, &mut self.plain));
                deflate(self.zlib.get_or_insert_with(new_stream), &self.plain, out)
            }
            Encoding::Zrle => {
                self.plain.clear();
                self.tiles(format, width, pixels);
                deflate(self.zrle.get_or_insert_with(new_stream), &self.plain, out)
            }
        }
    }

    /// Puts the tiles of a rectangle into `plain`.
    fn tiles(&mut self, format: &PixelFormat, width: usize, pixels: &[u32]) {
        for band in pixels.chunks(TILE * width.max(1)) {
            for x in (0..width).step_by(TILE) {
                let tile_width = TILE.min(width - x);
                self.tile.clear();
                for row in band.chunks_exact(width) {
                    self.tile.extend_from_slice(row.get(x..x + tile_width).unwrap_or_default());
                }
                self.tile(format, tile_width);
            }
        }
    }

    /// Puts one tile into `plain`, in the way that takes the fewest bytes before zlib.
    fn tile(&mut self, format: &PixelFormat, width: usize) {
        let (tile, palette, out) = (&self.tile, &mut self.palette, &mut self.plain);
        palette.clear();
        let pixel_bytes = format.compressed_bytes();
        let (mut run_bytes, mut index_bytes) = (0, 0);
        for run in tile.chunk_by(|a, b| a == b) {
            run_bytes += pixel_bytes + (run.len() - 1) / 255 + 1;
            index_bytes += if run.len() == 1 { 1 } else { (run.len() - 1) / 255 + 2 };
            if let Some(color) = run.first()
                && palette.len() <= PALETTE_MAX
                && !palette.contains(color)
            {
                palette.push(*color);
            }
        }
        let colors = palette.len();
        let raw = tile.len() * pixel_bytes;
        let indexed = if colors <= PALETTE_MAX { colors * pixel_bytes + index_bytes } else { usize::MAX };
        let bits = match colors {
            0..=2 => 1,
            3..=4 => 2,
            _ => 4,
        };
        let rows = tile.len() / width.max(1);
        let packed =
            if colors <= PACKED_MAX { colors * pixel_bytes + rows * (width * bits).div_ceil(8) } else { usize::MAX };
        let index_of = |color: u32| palette.iter().position(|other| *other == color).unwrap_or(0) as u8;
        if let [color] = palette[..] {
            out.push(1);
            format.put_compressed(color, out);
        } else if packed <= raw.min(run_bytes).min(indexed) {
            out.push(colors as u8);
            palette.iter().for_each(|color| format.put_compressed(*color, out));
            for row in tile.chunks_exact(width) {
                for group in row.chunks(8 / bits) {
                    let byte = group
                        .iter()
                        .enumerate()
                        .fold(0, |byte, (place, color)| byte | index_of(*color) << (8 - bits * (place + 1)));
                    out.push(byte);
                }
            }
        } else if indexed <= raw.min(run_bytes) {
            out.push(128 + colors as u8);
            palette.iter().for_each(|color| format.put_compressed(*color, out));
            for run in tile.chunk_by(|a, b| a == b) {
                let index = run.first().map_or(0, |color| index_of(*color));
                if run.len() == 1 {
                    out.push(index);
                } else {
                    out.push(index | 128);
                    put_run(run.len(), out);
                }
            }
        } else if run_bytes < raw {
            out.push(128);
            for run in tile.chunk_by(|a, b| a == b) {
                run.iter().take(1).for_each(|color| format.put_compressed(*color, out));
                put_run(run.len(), out);
            }
        } else {
            out.push(0);
            tile.iter().for_each(|color| format.put_compressed(*color, out));
        }
    }
}

/// A run's length: one less, in bytes that add up.
fn put_run(length: usize, out: &mut Vec<u8>) {
    let rest = length.saturating_sub(1);
    out.resize(out.len() + rest / 255, 255);
    out.push((rest % 255) as u8);
}

fn new_stream() -> Compress {
    Compress::new(Compression::new(LEVEL), true)
}

/// Appends a length of four bytes and `plain`, compressed and flushed.
fn deflate(stream: &mut Compress, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let length_at = out.len();
    out.extend([0; 4]);
    let mut rest = plain;
    loop {
        out.reserve(rest.len() / 4 + 1024);
        let before = stream.total_in();
        stream.compress_vec(rest, out, FlushCompress::Sync).map_err(io::Error::other)?;
        let taken = usize::try_from(stream.total_in() - before).unwrap_or(usize::MAX);
        rest = rest.get(taken..).unwrap_or_default();
        if rest.is_empty() && out.len() < out.capacity() {
            break;
        }
    }
    let length = u32::try_from(out.len() - length_at - 4).map_err(io::Error::other)?;
    if let Some(place) = out.get_mut(length_at..length_at + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
    Ok(())
}
