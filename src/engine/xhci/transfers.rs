//! From a doorbell, from input or from a disk's worker to the endpoint that it is about.

use super::{
    PORTS,
    controller::Controller,
    endpoint::{Endpoint, EndpointState, Env},
    events::Events,
    slot::CONTEXTS,
    trb::{Budget, Code},
};
use crate::engine::{
    disk::BlockError,
    memory::GuestRam,
    usb::{
        Device, ENDPOINT_IN, Moved, Pipes,
        storage::{BULK_IN, BULK_OUT, Job, Step},
    },
};

const CONTROL: u8 = 1;
/// Endpoint 1 IN: of a HID device the interrupt endpoint.
const FIRST_IN: u8 = index_of(ENDPOINT_IN | 1);

/// The device context index of an endpoint address.
const fn index_of(endpoint: u8) -> u8 {
    (endpoint & 0xf) * 2 + (endpoint >> 7)
}

impl Controller {
    /// A doorbell (xHCI 1.1, 5.6). One that rings for nothing is ignored.
    pub(super) fn ring(&mut self, slot: usize, value: u32) {
        let target = value as u8;
        if slot == 0 {
            if target == 0 {
                self.registers.ring_running = true;
                self.run_commands();
            }
            return;
        }
        let endpoint = self.slots.get_mut(slot - 1).and_then(|slot| slot.endpoint(target));
        if let Some(endpoint) = endpoint {
            if endpoint.state == EndpointState::Stopped {
                endpoint.state = EndpointState::Running;
                if let Some(slot) = self.slots.get(slot - 1) {
                    slot.store_endpoint(&self.ram, target);
                }
            }
            self.serve(slot - 1, target);
        }
    }

    /// The controller runs again, or the event ring has room again: looks at everything that may have waited for that.
    pub(super) fn resume(&mut self) {
        if !self.is_running() {
            return;
        }
        self.tell_ports();
        self.run_commands();
        for slot in 0..self.slots.len() {
            for index in 1..CONTEXTS as u8 {
                self.serve(slot, index);
            }
        }
        for port in 0..PORTS {
            self.wake(port);
        }
        self.check();
    }

    /// Input for a suspended device that may wake the host; true when there is such input.
    fn wake(&mut self, port: usize) -> bool {
        let Some(place) = self.ports.get_mut(port).filter(|port| port.is_suspended()) else { return false };
        let wakes = place.device.as_ref().is_some_and(|device| device.may_wake() && device.report().is_some());
        if wakes {
            place.wake();
            self.tell_ports();
        }
        wakes
    }

    /// The device behind a port may have something to say, or may be heard again.
    pub(super) fn serve_port(&mut self, port: usize) {
        if !self.is_running() {
            return;
        }
        if self.wake(port) {
            return;
        }
        if let Some(slot) = self.slots.iter().position(|slot| slot.is_at(port)) {
            self.serve(slot, CONTROL);
            self.serve(slot, FIRST_IN);
        }
        self.check();
    }

    /// Does what an endpoint's ring asks for, as far as it goes at once.
    fn serve(&mut self, index: usize, target: u8) {
        let Controller { ram, events, ports, slots, registers: _, paused: _, .. } = self;
        let Some(slot) = slots.get_mut(index) else { return };
        let Some(port) = ports.get_mut(slot.port) else { return };
        let Some(Some(endpoint)) = slot.endpoints.get_mut(usize::from(target)) else { return };
        if endpoint.state != EndpointState::Running || port.is_suspended() {
            return;
        }
        let id = index as u8 + 1;
        let mut env = Env { ram, events, slot: id, index: target, budget: Budget::new() };
        let active = port.is_active();
        match (target, &mut port.device) {
            (CONTROL, Some(device)) if active => {
                endpoint.run_control(&mut env, device);
                if let Some(kick) = &port.kick {
                    kick.signal();
                }
            }
            (FIRST_IN, Some(device @ (Device::Keyboard(_) | Device::Tablet(_)))) if active => {
                send_reports(endpoint, &mut env, device);
            }
            (_, Some(Device::Storage(_))) if active && is_bulk(target) => {
                if let Some(kick) = &port.kick {
                    kick.signal();
                }
            }
            // Nobody answers.
            _ => endpoint.refuse(&mut env, Code::TransactionError),
        }
        if endpoint.state != EndpointState::Running {
            slot.store_endpoint(ram, target);
        }
    }

    /// A disk's worker: what is to be done next for the disk at `port`.
    pub(super) fn disk_step(&mut self, port: usize) -> Step {
        if !self.is_running() {
            return Step::Idle;
        }
        let Controller { ram, events, ports, slots, .. } = self;
        let Some(place) = ports.get_mut(port).filter(|port| port.is_active()) else { return Step::Idle };
        let Some(device) = place.device.as_mut().filter(|device| device.is_configured()) else { return Step::Idle };
        let Device::Storage(disk) = device else { return Step::Idle };
        let Some(index) = slots.iter().position(|slot| slot.is_at(port)) else { return Step::Idle };
        let Some(slot) = slots.get_mut(index) else { return Step::Idle };
        let (id, targets) = (index as u8 + 1, [index_of(BULK_IN), index_of(BULK_OUT)]);
        let Ok([Some(input), Some(output)]) = slot.endpoints.get_disjoint_mut(targets.map(usize::from)) else {
            return Step::Idle;
        };
        let mut pipes = BulkPipes { ram, events, slot: id, input, output };
        let before = pipes.states();
        let step = disk.step(&mut pipes);
        let after = pipes.states();
        if before != after {
            targets.iter().for_each(|target| slot.store_endpoint(ram, *target));
        }
        self.check();
        step
    }

    /// A disk's worker has done its I/O.
    pub(super) fn disk_finish(&mut self, port: usize, job: Job, result: Result<(), BlockError>) {
        if let Some(place) = self.ports.get_mut(port)
            && let Some(Device::Storage(disk)) = &mut place.device
        {
            disk.finish(job, result);
        }
    }
}

fn is_bulk(target: u8) -> bool {
    target == index_of(BULK_IN) || target == index_of(BULK_OUT)
}

/// Input reports go out as long as there are buffers; without any the endpoint waits, as one that answers NAK.
fn send_reports(endpoint: &mut Endpoint, env: &mut Env<'_>, device: &mut Device) {
    if device.is_halted(ENDPOINT_IN | 1) {
        return endpoint.stall(env);
    }
    endpoint.skip_no_ops(env);
    while device.is_configured()
        && let Some(report) = device.report()
    {
        if !endpoint.send(env, report.bytes(), true).ended {
            return;
        }
        device.report_taken();
    }
}

/// The pipes of a disk: two endpoints of its slot.
struct BulkPipes<'a> {
    ram: &'a GuestRam,
    events: &'a mut Events,
    slot: u8,
    input: &'a mut Endpoint,
    output: &'a mut Endpoint,
}

impl BulkPipes<'_> {
    fn states(&self) -> [EndpointState; 2] {
        [self.input.state, self.output.state]
    }
    fn on_input<T>(&mut self, work: impl FnOnce(&mut Endpoint, &mut Env<'_>) -> T) -> T {
        let (index, budget) = (index_of(BULK_IN), Budget::new());
        work(self.input, &mut Env { ram: self.ram, events: self.events, slot: self.slot, index, budget })
    }
    fn on_output<T>(&mut self, work: impl FnOnce(&mut Endpoint, &mut Env<'_>) -> T) -> T {
        let (index, budget) = (index_of(BULK_OUT), Budget::new());
        work(self.output, &mut Env { ram: self.ram, events: self.events, slot: self.slot, index, budget })
    }
}

impl Pipes for BulkPipes<'_> {
    fn send(&mut self, bytes: &[u8], last: bool) -> Moved {
        self.on_input(|endpoint, env| endpoint.send(env, bytes, last))
    }
    fn receive(&mut self, into: &mut [u8]) -> Moved {
        self.on_output(|endpoint, env| endpoint.receive(env, into))
    }
    fn stall_send(&mut self) {
        self.on_input(|endpoint, env| endpoint.stall(env));
    }
    fn stall_receive(&mut self) {
        self.on_output(|endpoint, env| endpoint.stall(env));
    }
}
