//! virtio-rng (virtio 1.2, 5.4): the guest gives empty buffers, the host's kernel fills them. The example device to copy.

use std::{io, os::fd::AsFd};

use super::{
    Features, Kind, Running, VirtioDevice,
    queue::{Chain, Malformed},
    worker::{Served, Stop, Work, Worker},
};

/// One request gets at most so much; the driver asks again.
const FILL_BYTES_MAX: usize = 4096;

pub struct Rng(Worker);

impl Rng {
    pub fn new() -> io::Result<Rng> {
        Worker::spawn("rng", Fill { chain: Chain::default() }).map(Rng)
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }
    fn offered(&self) -> Features {
        0
    }
    fn read_config(&self, _: usize, _: &mut [u8]) {}
    fn worker(&self) -> &Worker {
        &self.0
    }
}

struct Fill {
    chain: Chain,
}

impl Work for Fill {
    fn serve(&mut self, running: &mut Running, stop: &Stop) -> Result<Served, Malformed> {
        let Running { ram, queues, interrupts, .. } = running;
        let queue = queues.first_mut().ok_or(Malformed)?;
        let mut bytes = [0; FILL_BYTES_MAX];
        loop {
            while queue.pop(ram, &mut self.chain)? {
                let wanted = (self.chain.writable_bytes() as usize).min(FILL_BYTES_MAX);
                let part = bytes.get_mut(..wanted).ok_or(Malformed)?;
                getrandom::fill(part).map_err(|_| Malformed)?;
                self.chain.write(ram, 0, part).map_err(|_| Malformed)?;
                queue.push(ram, self.chain.head, wanted as u32, interrupts)?;
            }
            if queue.enable_kicks(ram)? {
                continue;
            }
            if stop.wait(&[queue.kick.as_fd()]).is_none() {
                return Ok(Served::Stopped);
            }
            queue.kick.clear();
        }
    }
}
