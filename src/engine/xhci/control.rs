//! Control transfers on endpoint 0 (xHCI 1.1, 4.11.2.2; USB 2.0, 8.5.3): setup, data and status stage, each a TD of its own.

use super::{
    endpoint::{Endpoint, EndpointState, Env},
    trb::{Code, DIRECTION_IN, IMMEDIATE_DATA, Trb, kind},
};
use crate::engine::usb::{Device, Setup};

const SETUP_BYTES: u32 = 8;
/// The longest data stage to a device; none here wants more than 8 bytes.
pub(super) const DATA_BYTES_MAX: usize = 256;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Stage {
    #[default]
    Setup,
    Data,
    Status,
}

/// A control transfer on its way.
#[derive(Default)]
pub(super) struct Control {
    pub(super) stage: Stage,
    pub(super) setup: [u8; 8],
    /// To the host, what is left of the answer; from it, what came so far.
    pub(super) data: Vec<u8>,
    /// The device has already answered: the status stage ends the transfer.
    pub(super) answered: bool,
    /// The next stage is answered with STALL.
    pub(super) refused: bool,
}

impl Endpoint {
    /// Does what the driver has handed over.
    pub(super) fn run_control(&mut self, env: &mut Env<'_>, device: &mut Device) {
        while let Some(trb) = self.next(env) {
            match (trb.kind(), self.control.stage) {
                // A new setup stage ends whatever was before it.
                (kind::SETUP_STAGE, _) => self.begin(env, trb, device),
                (kind::DATA_STAGE | kind::NORMAL, Stage::Data) => {
                    if !self.data_stage(env, trb) {
                        return;
                    }
                }
                (kind::STATUS_STAGE, Stage::Data | Stage::Status) => self.end(env, trb, device),
                (kind::NO_OP | kind::EVENT_DATA, _) => self.skip(env, trb),
                _ => self.fail(env, trb, Code::TrbError, EndpointState::Error),
            }
        }
    }

    fn begin(&mut self, env: &mut Env<'_>, trb: Trb, device: &mut Device) {
        if !trb.has(IMMEDIATE_DATA) || trb.length() != SETUP_BYTES {
            return self.fail(env, trb, Code::TrbError, EndpointState::Error);
        }
        let bytes = trb.parameter.to_le_bytes();
        let setup = Setup::parse(bytes);
        let mut control = Control { setup: bytes, ..Control::default() };
        if setup.length == 0 {
            control.stage = Stage::Status;
        } else {
            control.stage = Stage::Data;
            if setup.is_in() {
                match device.control(setup, &[]) {
                    Ok(answer) => control.data = answer,
                    Err(_) => control.refused = true,
                }
                control.answered = true;
            } else {
                control.refused = usize::from(setup.length) > DATA_BYTES_MAX;
            }
        }
        self.control = control;
        self.forget_progress();
        self.complete(env, trb);
    }

    /// False when there is nothing more to do before the driver hands over more.
    fn data_stage(&mut self, env: &mut Env<'_>, trb: Trb) -> bool {
        let setup = Setup::parse(self.control.setup);
        if trb.kind() == kind::DATA_STAGE && trb.has(DIRECTION_IN) != setup.is_in() {
            self.fail(env, trb, Code::TrbError, EndpointState::Error);
            return false;
        }
        if self.control.refused {
            self.stall(env);
            return false;
        }
        let moved = if setup.is_in() {
            let answer = std::mem::take(&mut self.control.data);
            let moved = self.send(env, &answer, true);
            self.control.data = answer.get(moved.bytes..).unwrap_or_default().to_vec();
            moved
        } else {
            let mut bytes = [0; DATA_BYTES_MAX];
            let room = usize::from(setup.length).saturating_sub(self.control.data.len()).min(DATA_BYTES_MAX);
            let moved = self.receive(env, bytes.get_mut(..room).unwrap_or_default());
            self.control.data.extend(bytes.iter().take(moved.bytes));
            // The driver gives more than it said it would.
            if moved.bytes == 0 && !moved.ended && room == 0 {
                self.refuse(env, Code::TrbError);
            }
            moved
        };
        if moved.ended && self.state == EndpointState::Running {
            self.control.stage = Stage::Status;
        }
        moved.ended || moved.bytes > 0
    }

    fn end(&mut self, env: &mut Env<'_>, trb: Trb, device: &mut Device) {
        let control = std::mem::take(&mut self.control);
        let refused =
            control.refused || !control.answered && device.control(Setup::parse(control.setup), &control.data).is_err();
        if refused {
            return self.fail(env, trb, Code::Stall, EndpointState::Halted);
        }
        self.complete(env, trb);
    }
}
