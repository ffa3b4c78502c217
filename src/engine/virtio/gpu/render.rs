//! The card's worker: carries out the driver's requests.

use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};

use super::{
    CURSOR_QUEUE, Config, F_EDID, SCANOUTS, Shared, Told,
    protocol::{Answer, Rect, Refused, Request, command, put_answer},
    resources::Resources,
    shown::{CURSOR_SIDE, Cursor},
};
use crate::engine::{
    memory::{Gpa, GuestRam, RamSpan},
    vga::edid,
    virtio::{
        Interrupts, Running,
        queue::{Chain, Malformed, VirtQueue},
    },
    worker::{Served, Stop, Work},
};

/// Of RESOURCE_ATTACH_BACKING (5.7.6.8): where the list begins, and an entry's address, length and padding.
const LIST_AT: u64 = 32;
const ENTRY_BYTES: usize = 16;
/// Entries that are copied at a time.
const PIECE_ENTRIES: usize = 256;

pub(super) struct Render {
    shared: Arc<Shared>,
    pub(super) resources: Resources,
    pub(super) scanout: Option<Scanout>,
    chain: Chain,
    answer: Vec<u8>,
}

/// What the screen shows: a part of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scanout {
    pub(super) resource: u32,
    pub(super) part: Rect,
}

impl Render {
    pub(super) fn new(shared: Arc<Shared>) -> Render {
        Render { shared, resources: Resources::default(), scanout: None, chain: Chain::default(), answer: Vec::new() }
    }

    /// Serves what waits in a queue. True when more came meanwhile.
    fn serve_queue(
        &mut self,
        ram: &GuestRam,
        queue: &mut VirtQueue,
        interrupts: &Interrupts,
        stop: &Stop,
        knows_edid: bool,
    ) -> Result<bool, Malformed> {
        while !stop.asked() && queue.pop(ram, &mut self.chain)? {
            let request = Request::read(&self.chain, ram)?;
            let answer = if queue.index() == CURSOR_QUEUE {
                self.cursor(&request)
            } else {
                self.control(ram, &request, knows_edid)
            };
            put_answer(&request, answer, &mut self.answer);
            // Drivers leave no room for answers about the cursor. What does not fit is cut.
            let room = self.chain.writable_bytes().min(self.answer.len() as u64);
            let fits = self.answer.get(..room as usize).unwrap_or_default();
            self.chain.write(ram, 0, fits).map_err(|_| Malformed)?;
            queue.push(ram, self.chain.head, room as u32, interrupts)?;
        }
        queue.enable_kicks(ram)
    }

    /// Offsets are those of virtio 1.2, 5.7.6.8.
    fn control(&mut self, ram: &GuestRam, request: &Request, knows_edid: bool) -> Result<Answer, Refused> {
        let done = match request.command()? {
            command::GET_DISPLAY_INFO => {
                let (width, height) = self.shared.config().tell(Told::Info);
                return Ok(Answer::DisplayInfo { width, height });
            }
            command::GET_EDID if knows_edid => {
                check_scanout(request.u32(24)?)?;
                let (width, height) = self.shared.config().tell(Told::Edid);
                return Ok(Answer::Edid(edid::block_for(width, height)));
            }
            command::RESOURCE_CREATE_2D => {
                let [id, format, width, height] = [24, 28, 32, 36].map(|at| request.u32(at));
                self.resources.create(id?, format?, width?, height?).map(|_| ())
            }
            command::RESOURCE_UNREF => self.unref(request.u32(24)?),
            command::SET_SCANOUT => self.set_scanout(request.rect()?, request.u32(40)?, request.u32(44)?),
            command::RESOURCE_FLUSH => self.flush(request.rect()?, request.u32(40)?),
            command::TRANSFER_TO_HOST_2D => {
                let (rect, offset, id) = (request.rect()?, request.u64(40)?, request.u32(48)?);
                self.resources.get_mut(id)?.transfer(ram, rect, offset)
            }
            command::RESOURCE_ATTACH_BACKING => self.attach(ram, request.u32(24)?, request.u32(28)?),
            command::RESOURCE_DETACH_BACKING => self.resources.detach(request.u32(24)?),
            _ => Err(Refused::Unspecified),
        };
        done.map(|()| Answer::Done)
    }

    fn unref(&mut self, id: u32) -> Result<(), Refused> {
        self.resources.remove(id)?;
        if self.scanout.is_some_and(|scanout| scanout.resource == id) {
            self.blank();
        }
        Ok(())
    }

    fn blank(&mut self) {
        self.scanout = None;
        self.shared.shown().blank();
    }

    fn set_scanout(&mut self, part: Rect, scanout: u32, id: u32) -> Result<(), Refused> {
        check_scanout(scanout)?;
        if id == 0 {
            self.blank();
            return Ok(());
        }
        let resource = self.resources.get(id)?;
        resource.check_shows(part)?;
        self.shared.shown().show(resource, part);
        self.scanout = Some(Scanout { resource: id, part });
        Ok(())
    }

    fn flush(&self, rect: Rect, id: u32) -> Result<(), Refused> {
        let resource = self.resources.get(id)?;
        if !resource.contains(rect) {
            return Err(Refused::Parameter);
        }
        if let Some(Scanout { part, .. }) = self.scanout.filter(|scanout| scanout.resource == id)
            && let Some(seen) = rect.and(part)
        {
            self.shared.shown().copy(resource, part, seen);
        }
        Ok(())
    }

    /// Takes the list of stretches of guest memory behind the request.
    fn attach(&mut self, ram: &GuestRam, id: u32, entries: u32) -> Result<(), Refused> {
        let count = self.resources.check_attach(id, entries)?;
        if self.chain.readable_bytes() < LIST_AT + (count * ENTRY_BYTES) as u64 {
            return Err(Refused::Parameter);
        }
        let mut spans = Vec::with_capacity(count);
        let mut raw = [0; PIECE_ENTRIES * ENTRY_BYTES];
        for first in (0..count).step_by(PIECE_ENTRIES) {
            let piece = raw.get_mut(..(count - first).min(PIECE_ENTRIES) * ENTRY_BYTES).unwrap_or_default();
            let at = LIST_AT + (first * ENTRY_BYTES) as u64;
            self.chain.read(ram, at, piece).map_err(|_| Refused::Parameter)?;
            for [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, ..] in piece.as_chunks::<ENTRY_BYTES>().0 {
                let at = Gpa(u64::from_le_bytes([*a0, *a1, *a2, *a3, *a4, *a5, *a6, *a7]));
                let span = RamSpan { at, bytes: u32::from_le_bytes([*l0, *l1, *l2, *l3]) };
                if span.bytes == 0 {
                    continue;
                }
                if !ram.contains(span) {
                    return Err(Refused::Parameter);
                }
                spans.push(span);
            }
        }
        self.resources.attach(id, spans)
    }

    /// Offsets are those of virtio 1.2, 5.7.6.10. Where the hot spot is does not matter: the place is that of the corner.
    fn cursor(&self, request: &Request) -> Result<Answer, Refused> {
        let asked = request.command()?;
        let [scanout, x, y] = [24, 28, 32].map(|at| request.u32(at));
        let (x, y) = (x?.cast_signed(), y?.cast_signed());
        check_scanout(scanout?)?;
        match asked {
            command::MOVE_CURSOR => self.shared.shown().move_cursor(x, y),
            command::UPDATE_CURSOR => {
                let cursor = match request.u32(40)? {
                    0 => None,
                    id => Some(Cursor { x, y, image: self.cursor_image(id)? }),
                };
                self.shared.shown().set_cursor(cursor);
            }
            _ => return Err(Refused::Unspecified),
        }
        Ok(Answer::Done)
    }

    fn cursor_image(&self, id: u32) -> Result<Vec<u32>, Refused> {
        let resource = self.resources.get(id)?;
        if (resource.width, resource.height) != (CURSOR_SIDE, CURSOR_SIDE) {
            return Err(Refused::Parameter);
        }
        Ok(resource.pixels.as_chunks().0.iter().map(|bytes| resource.format.argb(*bytes)).collect())
    }
}

fn check_scanout(scanout: u32) -> Result<(), Refused> {
    if scanout < SCANOUTS { Ok(()) } else { Err(Refused::Scanout) }
}

impl Work<Running> for Render {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let knows_edid = running.has(F_EDID);
        let Running { ram, queues, interrupts, .. } = running;
        loop {
            let mut more = false;
            for queue in queues.iter_mut() {
                more |= self.serve_queue(ram, queue, interrupts, stop, knows_edid)?;
            }
            if stop.asked() {
                return Ok(Served::Stopped);
            }
            if self.shared.take_news() {
                interrupts.config_changed();
            }
            if more {
                continue;
            }
            let wake = PollFd::new(&self.shared.wake, PollFlags::IN);
            let waited = match queues.as_slice() {
                [control, cursor, ..] => stop.wait(&[wake, control.kicked(), cursor.kicked()]),
                [control] => stop.wait(&[wake, control.kicked()]),
                [] => return Err(Malformed),
            };
            if !waited {
                return Ok(Served::Stopped);
            }
            self.shared.wake.clear();
            for queue in queues.iter() {
                queue.kick.clear();
            }
        }
    }

    fn forget(&mut self) {
        self.resources = Resources::default();
        self.scanout = None;
        let mut shown = self.shared.shown();
        shown.end();
        shown.set_cursor(None);
        drop(shown);
        let mut config = self.shared.config();
        // A driver that begins asks for the size anyway.
        *config = Config::new(config.size);
    }
}
