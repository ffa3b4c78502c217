//! The saved state of the controller, with the devices that are plugged in.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    PORTS, SLOTS, Xhci,
    control::{Control, DATA_BYTES_MAX, Stage},
    controller::{COMMAND_KEPT, Controller, RUN, Registers, STATUS_STORED},
    endpoint::{Endpoint, EndpointState},
    events::{Events, Place, Ring},
    port::Port,
    slot::{self, CONTEXTS, Slot, SlotState},
    trb::{Cursor, Trb},
};
use crate::engine::{
    memory::GuestRam,
    saved::{BadState, SaveState, State, hex},
};

const KIND: &str = "xhci";
/// The longest answer of a device to a control request.
const ANSWER_BYTES_MAX: usize = 4096;
const WAITING_MAX: usize = 64;

#[derive(Serialize, Deserialize)]
struct V1 {
    registers: RegistersV1,
    events: EventsV1,
    ports: Vec<PortV1>,
    slots: Vec<SlotV1>,
}

#[derive(Serialize, Deserialize)]
struct RegistersV1 {
    command: u32,
    status: u32,
    notifications: u32,
    ring: CursorV1,
    ring_running: bool,
    contexts: u64,
    config: u32,
}

#[derive(Serialize, Deserialize)]
struct CursorV1 {
    at: u64,
    cycle: bool,
}

#[derive(Serialize, Deserialize)]
struct EventsV1 {
    iman: u32,
    imod: u32,
    segments: u32,
    table: u64,
    dequeue: u64,
    place: PlaceV1,
    cycle: bool,
    interrupt: bool,
    waiting: Vec<WaitingV1>,
}

#[derive(Serialize, Deserialize)]
struct PlaceV1 {
    segment: u32,
    base: u64,
    entries: u32,
    index: u32,
}

#[derive(Serialize, Deserialize)]
struct WaitingV1 {
    parameter: u64,
    status: u32,
    control: u32,
    quiet: bool,
}

#[derive(Serialize, Deserialize)]
struct PortV1 {
    status: u32,
    power_management: u32,
    changed: bool,
    device: Option<DeviceV1>,
}

/// A device's own state, with the version of its own.
#[derive(Serialize, Deserialize)]
struct DeviceV1 {
    kind: String,
    version: u32,
    fields: Value,
}

#[derive(Serialize, Deserialize)]
struct SlotV1 {
    state: SlotStateV1,
    context: u64,
    words: [u32; 8],
    port: usize,
    endpoints: Vec<EndpointV1>,
}

#[derive(Serialize, Deserialize)]
enum SlotStateV1 {
    Disabled,
    Enabled,
    Default,
    Addressed,
    Configured,
}

#[derive(Serialize, Deserialize)]
struct EndpointV1 {
    index: u8,
    words: [u32; 8],
    state: EndpointStateV1,
    cursor: CursorV1,
    offset: u32,
    accumulated: u32,
    control: ControlV1,
}

#[derive(Serialize, Deserialize)]
enum EndpointStateV1 {
    Running,
    Halted,
    Stopped,
    Error,
}

#[derive(Serialize, Deserialize)]
struct ControlV1 {
    stage: StageV1,
    setup: [u8; 8],
    #[serde(with = "hex")]
    data: Vec<u8>,
    answered: bool,
    refused: bool,
}

#[derive(Serialize, Deserialize)]
enum StageV1 {
    Setup,
    Data,
    Status,
}

impl From<Cursor> for CursorV1 {
    fn from(Cursor { at, cycle }: Cursor) -> CursorV1 {
        CursorV1 { at, cycle }
    }
}

impl From<CursorV1> for Cursor {
    fn from(CursorV1 { at, cycle }: CursorV1) -> Cursor {
        Cursor { at: at & !0xf, cycle }
    }
}

impl SaveState for Xhci {
    fn save(&self) -> State {
        let Xhci { shared, workers: _ } = self;
        let controller = shared.controller();
        let Controller { ram: _, registers, events, ports, slots, paused: _, clock: _ } = &*controller;
        let fields = V1 {
            registers: save_registers(registers),
            events: save_events(events),
            ports: ports.iter().map(save_port).collect(),
            slots: slots.iter().map(save_slot).collect(),
        };
        State::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let V1 { registers, events, ports, slots } = state.fields(KIND, 1)?;
        let check = |good, what| BadState::unless(good, KIND, what);
        check(ports.len() == PORTS && slots.len() == SLOTS, "another number of ports or slots")?;
        let mut controller = self.shared.controller();
        let controller = &mut *controller;
        controller.registers = restore_registers(registers)?;
        controller.events.enabled = controller.registers.command & 1 << 2 != 0;
        restore_events(&mut controller.events, events)?;
        for (port, saved) in controller.ports.iter_mut().zip(ports) {
            restore_port(port, saved)?;
        }
        for (slot, saved) in controller.slots.iter_mut().zip(slots) {
            *slot = restore_slot(saved, &controller.ram)?;
        }
        controller.events.sync_line();
        Ok(())
    }
}

fn save_registers(registers: &Registers) -> RegistersV1 {
    let Registers { command, status, notifications, ring, ring_running, contexts, config } = *registers;
    RegistersV1 { command, status, notifications, ring: ring.into(), ring_running, contexts, config }
}

fn restore_registers(saved: RegistersV1) -> Result<Registers, BadState> {
    let RegistersV1 { command, status, notifications, ring, ring_running, contexts, config } = saved;
    let good = command & !COMMAND_KEPT == 0
        && status & !STATUS_STORED == 0
        && notifications <= 0xffff
        && config <= 0x3ff
        && contexts & 0x3f == 0
        && (!ring_running || command & RUN != 0);
    BadState::unless(good, KIND, "registers that no driver can have written")?;
    Ok(Registers { command, status, notifications, ring: ring.into(), ring_running, contexts, config })
}

fn save_events(events: &Events) -> EventsV1 {
    let Events { ring, enabled: _, interrupt, broken: _, waiting, ram: _, msix: _, line: _ } = events;
    let Ring { iman, imod, segments, table, dequeue, place, cycle } = *ring;
    let Place { segment, base, entries, index } = place;
    let place = PlaceV1 { segment, base, entries, index };
    let waiting = waiting.iter().map(|(Trb { parameter, status, control }, quiet)| WaitingV1 {
        parameter: *parameter,
        status: *status,
        control: *control,
        quiet: *quiet,
    });
    let waiting = waiting.collect();
    EventsV1 { iman, imod, segments, table, dequeue, place, cycle, interrupt: *interrupt, waiting }
}

fn restore_events(events: &mut Events, saved: EventsV1) -> Result<(), BadState> {
    let EventsV1 { iman, imod, segments, table, dequeue, place, cycle, interrupt, waiting } = saved;
    let PlaceV1 { segment, base, entries, index } = place;
    let place = Place { segment, base, entries, index };
    let good = iman <= 3
        && segments <= 0xffff
        && table & 0x3f == 0
        && (place == Place::default() || events.fits(place))
        && waiting.len() <= WAITING_MAX;
    BadState::unless(good, KIND, "an event ring that cannot be")?;
    events.ring = Ring { iman, imod, segments, table, dequeue, place, cycle };
    events.interrupt = interrupt;
    let event = |WaitingV1 { parameter, status, control, quiet }| (Trb { parameter, status, control }, quiet);
    events.waiting = waiting.into_iter().map(event).collect();
    Ok(())
}

fn save_port(port: &Port) -> PortV1 {
    let Port { is_super: _, status, power_management, changed, device, kick: _ } = port;
    let device = device.as_ref().map(|device| {
        let State { kind, version, bytes } = device.save();
        DeviceV1 { kind, version, fields: serde_json::from_slice(&bytes).unwrap_or_default() }
    });
    PortV1 { status: *status, power_management: *power_management, changed: *changed, device }
}

fn restore_port(port: &mut Port, saved: PortV1) -> Result<(), BadState> {
    let PortV1 { status, power_management, changed, device } = saved;
    match (&mut port.device, device) {
        (Some(device), Some(DeviceV1 { kind, version, fields })) => {
            device.restore(&State::new(&kind, version, &fields))?;
        }
        (None, None) => {}
        _ => return Err(BadState::new(KIND, "other devices are plugged in")),
    }
    port.restore(status, power_management, changed).map_err(|what| BadState::new(KIND, what))
}

fn save_slot(slot: &Slot) -> SlotV1 {
    let Slot { state, context, words, port, endpoints } = slot;
    let state = match state {
        SlotState::Disabled => SlotStateV1::Disabled,
        SlotState::Enabled => SlotStateV1::Enabled,
        SlotState::Default => SlotStateV1::Default,
        SlotState::Addressed => SlotStateV1::Addressed,
        SlotState::Configured => SlotStateV1::Configured,
    };
    let endpoints =
        (0..).zip(endpoints).filter_map(|(index, endpoint)| Some(save_endpoint(index, endpoint.as_deref()?)));
    SlotV1 { state, context: *context, words: *words, port: *port, endpoints: endpoints.collect() }
}

fn restore_slot(saved: SlotV1, ram: &GuestRam) -> Result<Slot, BadState> {
    let SlotV1 { state, context, words, port, endpoints } = saved;
    let state = match state {
        SlotStateV1::Disabled => SlotState::Disabled,
        SlotStateV1::Enabled => SlotState::Enabled,
        SlotStateV1::Default => SlotState::Default,
        SlotStateV1::Addressed => SlotState::Addressed,
        SlotStateV1::Configured => SlotState::Configured,
    };
    let addressed = state >= SlotState::Default;
    let good = port < PORTS && (context == 0 && !addressed && endpoints.is_empty() || slot::is_context(ram, context));
    BadState::unless(good, KIND, "a slot that cannot be")?;
    let mut slot = Slot { state, context, words, port, endpoints: [const { None }; CONTEXTS] };
    for saved in endpoints {
        let (index, endpoint) = restore_endpoint(saved)?;
        let place = slot.endpoints.get_mut(usize::from(index)).filter(|_| index > 0 && addressed);
        *place.ok_or_else(|| BadState::new(KIND, "an endpoint that cannot be"))? = Some(Box::new(endpoint));
    }
    Ok(slot)
}

fn save_endpoint(index: u8, endpoint: &Endpoint) -> EndpointV1 {
    let Endpoint { words, state, cursor, offset, accumulated, control } = endpoint;
    let Control { stage, setup, data, answered, refused } = control;
    EndpointV1 {
        index,
        words: *words,
        state: match state {
            EndpointState::Running => EndpointStateV1::Running,
            EndpointState::Halted => EndpointStateV1::Halted,
            EndpointState::Stopped => EndpointStateV1::Stopped,
            EndpointState::Error => EndpointStateV1::Error,
        },
        cursor: (*cursor).into(),
        offset: *offset,
        accumulated: *accumulated,
        control: ControlV1 {
            stage: match stage {
                Stage::Setup => StageV1::Setup,
                Stage::Data => StageV1::Data,
                Stage::Status => StageV1::Status,
            },
            setup: *setup,
            data: data.clone(),
            answered: *answered,
            refused: *refused,
        },
    }
}

fn restore_endpoint(saved: EndpointV1) -> Result<(u8, Endpoint), BadState> {
    let EndpointV1 { index, words, state, cursor, offset, accumulated, control } = saved;
    let ControlV1 { stage, setup, data, answered, refused } = control;
    let limit = if answered { ANSWER_BYTES_MAX } else { DATA_BYTES_MAX };
    BadState::unless(data.len() <= limit && accumulated <= 0xff_ffff, KIND, "a transfer that cannot be")?;
    let state = match state {
        EndpointStateV1::Running => EndpointState::Running,
        EndpointStateV1::Halted => EndpointState::Halted,
        EndpointStateV1::Stopped => EndpointState::Stopped,
        EndpointStateV1::Error => EndpointState::Error,
    };
    let stage = match stage {
        StageV1::Setup => Stage::Setup,
        StageV1::Data => Stage::Data,
        StageV1::Status => Stage::Status,
    };
    let control = Control { stage, setup, data, answered, refused };
    Ok((index, Endpoint { words, state, cursor: cursor.into(), offset, accumulated, control }))
}
