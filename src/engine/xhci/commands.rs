//! The command ring (xHCI 1.1, 4.6 and 4.11.4). Every command is done at once, by the vCPU that rings the doorbell.

use super::{
    SLOTS,
    controller::Controller,
    endpoint::{Endpoint, EndpointState, Env},
    slot::{self, CONTEXTS, Input, Slot, SlotState, Words},
    trb::{Budget, Code, Trb, kind},
};
use crate::engine::memory::Gpa;

/// Bit 9 of Address Device: the device is not told its address.
const BLOCK_SET_ADDRESS: u32 = 1 << 9;
/// Bit 9 of Configure Endpoint: all endpoints go.
const DECONFIGURE: u32 = 1 << 9;
/// Bit 9 of Reset Endpoint: the transfer goes on where it was.
const PRESERVE_TRANSFER: u32 = 1 << 9;
/// Slot context, word 0: Context Entries.
const ENTRIES: u32 = 0x1f << 27;
const ADD_SLOT: u32 = 1;
const ADD_ENDPOINT_0: u32 = 2;

impl Controller {
    /// Does what is on the command ring, as long as the event ring has room for the answers.
    pub(super) fn run_commands(&mut self) {
        let mut budget = Budget::new();
        while self.is_running() && self.registers.ring_running && self.events.has_room() {
            let trb = match self.registers.ring.fetch(&self.ram, &mut budget) {
                Ok(Some(trb)) => trb,
                Ok(None) => return,
                Err(_) => return self.fail(),
            };
            let (code, id) = self.execute(trb);
            let at = self.registers.ring.at;
            self.registers.ring.advance();
            let event = Trb::event(kind::COMMAND_COMPLETION, at, code, 0, u32::from(id) << 24);
            self.events.post(event, false);
        }
    }

    fn execute(&mut self, trb: Trb) -> (Code, u8) {
        let id = trb.slot();
        let result = match trb.kind() {
            kind::NO_OP_COMMAND => return (Code::Success, 0),
            kind::ENABLE_SLOT => {
                return match self.enable_slot() {
                    Some(id) => (Code::Success, id),
                    None => (Code::NoSlots, 0),
                };
            }
            kind::DISABLE_SLOT => self.disable_slot(id),
            kind::ADDRESS_DEVICE => self.address_device(trb),
            kind::CONFIGURE_ENDPOINT if trb.has(DECONFIGURE) => self.deconfigure(id),
            kind::CONFIGURE_ENDPOINT => self.configure(trb),
            kind::EVALUATE_CONTEXT => self.evaluate(trb),
            kind::RESET_ENDPOINT | kind::STOP_ENDPOINT | kind::SET_TR_DEQUEUE => self.change_endpoint(trb),
            kind::RESET_DEVICE => self.reset_device(id),
            _ => Err(Code::TrbError),
        };
        (result.err().unwrap_or(Code::Success), id)
    }

    /// Slots that the driver has enabled by CONFIG.
    fn enable_slot(&mut self) -> Option<u8> {
        let enabled = (self.registers.config as usize & 0xff).min(SLOTS);
        let free = self.slots.iter().take(enabled).position(|slot| slot.state == SlotState::Disabled)?;
        *self.slots.get_mut(free)? = Slot { state: SlotState::Enabled, ..Slot::default() };
        u8::try_from(free + 1).ok()
    }

    fn disable_slot(&mut self, id: u8) -> Result<(), Code> {
        let (slot, ram) = (enabled(&mut self.slots, id)?, &self.ram);
        let before = std::mem::take(slot);
        Slot { state: SlotState::Disabled, endpoints: [const { None }; CONTEXTS], ..before }.store(ram, id);
        Ok(())
    }

    /// 4.6.5.
    fn address_device(&mut self, trb: Trb) -> Result<(), Code> {
        let (id, blocked) = (trb.slot(), trb.has(BLOCK_SET_ADDRESS));
        let state = enabled(&mut self.slots, id)?.state;
        if state > SlotState::Default || blocked && state != SlotState::Enabled {
            return Err(Code::ContextState);
        }
        let input = Input::new(&self.ram, trb.parameter & !0xf).ok_or(Code::ParameterError)?;
        if input.add & (ADD_SLOT | ADD_ENDPOINT_0) != ADD_SLOT | ADD_ENDPOINT_0 {
            return Err(Code::ParameterError);
        }
        let words = input.slot().ok_or(Code::ParameterError)?;
        let endpoint = input.context(1).filter(|words| slot::is_endpoint(words, 1)).ok_or(Code::ParameterError)?;
        let pointer = self.registers.contexts.checked_add(8 * u64::from(id)).ok_or(Code::ParameterError)?;
        let context = self.ram.get_u64(Gpa(pointer)).map_err(|_| Code::ParameterError)? & !0x3f;
        if !slot::is_context(&self.ram, context) {
            return Err(Code::ParameterError);
        }
        let port = slot::root_port(&words).ok_or(Code::ParameterError)?;
        let taken = (1..).zip(&self.slots).any(|(other, slot)| other != id && slot.is_at(port));
        if taken || !self.ports.get(port).is_some_and(|port| port.is_enabled()) {
            return Err(Code::TransactionError);
        }
        let slot = enabled(&mut self.slots, id)?;
        slot.state = if blocked { SlotState::Default } else { SlotState::Addressed };
        (slot.context, slot.port, slot.words) = (context, port, words);
        slot.endpoints = [const { None }; CONTEXTS];
        slot.endpoints[1] = Some(Box::new(Endpoint::new(endpoint)));
        slot.store_all(&self.ram, id);
        Ok(())
    }

    /// 4.6.6. Everything is checked before anything is done.
    fn configure(&mut self, trb: Trb) -> Result<(), Code> {
        let id = trb.slot();
        let state = enabled(&mut self.slots, id)?.state;
        if state < SlotState::Addressed {
            return Err(Code::ContextState);
        }
        let input = Input::new(&self.ram, trb.parameter & !0xf).ok_or(Code::ParameterError)?;
        if (input.drop | input.add) & ADD_ENDPOINT_0 != 0 {
            return Err(Code::ParameterError);
        }
        let words = input.slot().ok_or(Code::ParameterError)?;
        let mut added: [Option<Words>; CONTEXTS] = [None; CONTEXTS];
        for (index, place) in (0..).zip(&mut added).skip(2) {
            if input.add & 1 << index != 0 {
                let context = input.context(index).filter(|words| slot::is_endpoint(words, index));
                *place = Some(context.ok_or(Code::ParameterError)?);
            }
        }
        let drop = input.drop;
        let slot = enabled(&mut self.slots, id)?;
        for ((index, place), words) in (0u8..).zip(&mut slot.endpoints).zip(added).skip(2) {
            if let Some(words) = words {
                *place = Some(Box::new(Endpoint::new(words)));
            } else if drop & 1 << index != 0 {
                *place = None;
            }
        }
        slot.words[0] = slot.words[0] & !ENTRIES | words[0] & ENTRIES;
        let beside_0 = slot.endpoints.iter().skip(2).any(Option::is_some);
        slot.state = if beside_0 { SlotState::Configured } else { SlotState::Addressed };
        slot.store_all(&self.ram, id);
        Ok(())
    }

    fn deconfigure(&mut self, id: u8) -> Result<(), Code> {
        let (slot, ram) = (enabled(&mut self.slots, id)?, &self.ram);
        if slot.state < SlotState::Addressed {
            return Err(Code::ContextState);
        }
        slot.drop_endpoints_beside_0();
        slot.state = SlotState::Addressed;
        slot.store_all(ram, id);
        Ok(())
    }

    /// 4.6.7: interrupter, exit latency, and the packet size of endpoint 0, none of which changes what is done here.
    fn evaluate(&mut self, trb: Trb) -> Result<(), Code> {
        let (slot, ram) = (enabled(&mut self.slots, trb.slot())?, &self.ram);
        if slot.state < SlotState::Default {
            return Err(Code::ContextState);
        }
        let input = Input::new(ram, trb.parameter & !0xf).ok_or(Code::ParameterError)?;
        if input.add & ADD_SLOT != 0 {
            let words = input.slot().ok_or(Code::ParameterError)?;
            slot.words[1] = slot.words[1] & !0xffff | words[1] & 0xffff;
            slot.words[2] = slot.words[2] & !(0x3ff << 22) | words[2] & 0x3ff << 22;
        }
        if input.add & ADD_ENDPOINT_0 != 0 {
            let words = input.context(1).ok_or(Code::ParameterError)?;
            if let Some(endpoint) = slot.endpoint(1) {
                endpoint.words[1] = endpoint.words[1] & 0xffff | words[1] & !0xffff;
            }
        }
        slot.store_all(ram, trb.slot());
        Ok(())
    }

    /// Reset Endpoint, Stop Endpoint, Set TR Dequeue Pointer (4.6.8 to 4.6.10).
    fn change_endpoint(&mut self, trb: Trb) -> Result<(), Code> {
        let (id, index) = (trb.slot(), trb.endpoint());
        let slot = enabled(&mut self.slots, id)?;
        if slot.state < SlotState::Default {
            return Err(Code::ContextState);
        }
        let endpoint = slot.endpoint(index).ok_or(Code::EndpointNotEnabled)?;
        match (trb.kind(), endpoint.state) {
            (kind::RESET_ENDPOINT, EndpointState::Halted) => {
                endpoint.state = EndpointState::Stopped;
                if !trb.has(PRESERVE_TRANSFER) {
                    endpoint.forget_progress();
                }
            }
            (kind::STOP_ENDPOINT, EndpointState::Running) => {
                let budget = Budget::new();
                let mut env = Env { ram: &self.ram, events: &mut self.events, slot: id, index, budget };
                endpoint.stop(&mut env);
            }
            (kind::SET_TR_DEQUEUE, EndpointState::Stopped | EndpointState::Error) => {
                endpoint.set_cursor(trb.parameter);
                endpoint.state = EndpointState::Stopped;
            }
            _ => return Err(Code::ContextState),
        }
        slot.store_endpoint(&self.ram, index);
        Ok(())
    }

    /// 4.6.11: the device was reset by its port.
    fn reset_device(&mut self, id: u8) -> Result<(), Code> {
        let (slot, ram) = (enabled(&mut self.slots, id)?, &self.ram);
        if slot.state < SlotState::Addressed {
            return Err(Code::ContextState);
        }
        slot.drop_endpoints_beside_0();
        slot.state = SlotState::Default;
        slot.words[0] = slot.words[0] & !ENTRIES | 1 << 27;
        if let Some(endpoint) = slot.endpoint(1) {
            endpoint.control = super::control::Control::default();
        }
        slot.store_all(ram, id);
        Ok(())
    }
}

fn enabled(slots: &mut [Slot], id: u8) -> Result<&mut Slot, Code> {
    let slot = usize::from(id).checked_sub(1).and_then(|index| slots.get_mut(index));
    slot.filter(|slot| slot.state != SlotState::Disabled).ok_or(Code::SlotNotEnabled)
}
