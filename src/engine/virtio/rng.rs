//! virtio-rng (virtio 1.2, 5.4): the guest gives empty buffers, the host's kernel fills them. The example device to copy.

use std::{io, slice};

use super::{
    Features, Kind, Running, VirtioDevice, Worker,
    queue::{Chain, Malformed},
};
use crate::engine::{
    saved::{BadState, SaveState, State},
    worker::{Served, Stop, Work},
};

/// One request gets at most so much; the driver asks again.
const FILL_BYTES_MAX: usize = 4096;

pub struct Rng(Worker);

impl Rng {
    pub fn new() -> io::Result<Rng> {
        Worker::spawn("rng", Fill { chain: Chain::default() }).map(Rng)
    }
}

const KIND: &str = "virtio-rng";

/// Every request is done before the worker comes out.
impl SaveState for Rng {
    fn save(&self) -> State {
        let Rng(_) = self;
        State::nothing(KIND)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        state.expect_nothing(KIND)
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
    fn workers(&self) -> &[Worker] {
        slice::from_ref(&self.0)
    }
}

struct Fill {
    chain: Chain,
}

impl Work<Running> for Fill {
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
                if stop.asked() {
                    return Ok(Served::Stopped);
                }
            }
            if queue.enable_kicks(ram)? {
                continue;
            }
            if !stop.wait(&[queue.kicked()]) {
                return Ok(Served::Stopped);
            }
            queue.kick.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
            mpsc,
        },
        thread,
    };

    use super::*;
    use crate::engine::{
        memory::Gpa,
        saved::testing::{matches_golden, spoil},
        virtio::testing::{BUFFERS, DEADLINE, Driver, VERSION_1, readable, writable},
    };

    #[test]
    fn buffers_are_filled_with_different_bytes_up_to_the_limit_of_a_request() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        driver.start(VERSION_1);
        assert_eq!(driver.run(0, &[writable(BUFFERS, 32), writable(BUFFERS + 0x1000, 32)]).bytes, 64);
        let (first, second) = (driver.bytes(BUFFERS, 33), driver.bytes(BUFFERS + 0x1000, 32));
        assert_ne!(first[..32], second[..]);
        assert_ne!(first[..32], [0; 32]);
        assert_eq!(first[32], 0, "not one byte more");
        assert_eq!(driver.run(0, &[writable(BUFFERS, 100_000)]).bytes, FILL_BYTES_MAX as u32);
        assert_eq!(driver.run(0, &[readable(BUFFERS, 64)]).bytes, 0, "nothing to write to");
    }

    #[test]
    fn it_keeps_nothing() {
        let mut rng = Rng::new().unwrap();
        let state = matches_golden(&rng.save());
        rng.restore(&state).unwrap();
        spoil(&state, |bad| drop(rng.restore(bad)));
        let mut driver = Driver::plug(rng);
        driver.start(VERSION_1);
        assert_eq!(driver.run(0, &[writable(BUFFERS, 32)]).bytes, 32);
    }

    #[test]
    fn a_driver_that_never_stops_asking_cannot_hold_up_a_reset() {
        let mut driver = Driver::plug(Rng::new().unwrap());
        driver.prepare(VERSION_1, 64);
        driver.driver_ok();
        for _ in 0..64 {
            driver.submit(0, &[writable(BUFFERS, 4096)]);
        }
        let over = Arc::new(AtomicBool::new(false));
        let (ram, stop, ring) = (driver.ram.clone(), Arc::clone(&over), driver.ring(0));
        let flood = thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                let used = ram.get_u16(Gpa(ring.used() + 2)).unwrap();
                ram.write(Gpa(ring.avail() + 2), &used.wrapping_add(64).to_le_bytes()).unwrap();
            }
        });
        let mut registers = driver.other_vcpu();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            registers.reset();
            tell.send(()).unwrap();
        });
        let reset = told.recv_timeout(DEADLINE);
        over.store(true, Ordering::Release);
        flood.join().unwrap();
        assert_eq!(reset, Ok(()));
    }
}
