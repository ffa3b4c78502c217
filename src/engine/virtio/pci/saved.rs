//! The saved state of the transport: registers, queues and interrupts of any virtio device.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::VirtioPci;
use crate::engine::{
    saved::{BadState, SaveState, State},
    virtio::{Running, VirtioDevice, queue::VirtQueue, saved::InterruptsV1},
};

#[derive(Serialize, Deserialize)]
struct TransportV1 {
    device_feature_select: u32,
    driver_feature_select: u32,
    accepted: u64,
    status: u8,
    queue_select: u16,
    config_generation: u8,
    /// As the driver wrote their registers.
    queues: Vec<QueueV1>,
    /// The queues that workers serve, by number, with how far each is. None while the driver does not run; those of a worker
    /// whose driver broke the rules are not among them.
    running: Vec<(usize, QueueV1)>,
    interrupts: InterruptsV1,
    /// What the device keeps itself.
    device: DeviceV1,
}

#[derive(Serialize, Deserialize)]
struct DeviceV1 {
    kind: String,
    version: u32,
    fields: serde_json::Value,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct QueueV1 {
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
}

impl From<QueueState> for QueueV1 {
    fn from(state: QueueState) -> QueueV1 {
        // The largest size is the device's.
        let QueueState {
            max_size: _,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = state;
        QueueV1 { size, ready, desc_table, avail_ring, used_ring, next_avail, next_used, event_idx: event_idx_enabled }
    }
}

impl QueueV1 {
    fn state(self, max_size: u16) -> QueueState {
        let QueueV1 { size, ready, desc_table, avail_ring, used_ring, next_avail, next_used, event_idx } = self;
        QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

const KIND: &str = "virtio-pci";

impl<D: VirtioDevice> SaveState for VirtioPci<D> {
    fn save(&self) -> State {
        let VirtioPci {
            device,
            ram: _,
            interrupts,
            kicks: _, // every queue is looked at when the worker is released
            device_feature_select,
            driver_feature_select,
            accepted,
            status,
            queue_select,
            queues,
        } = self;
        let own = device.save();
        let in_use = |running: &Running| -> Vec<(usize, QueueV1)> {
            running.queues.iter().map(VirtQueue::state).map(|(index, state)| (index, state.into())).collect()
        };
        let fields = TransportV1 {
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            accepted: *accepted,
            status: *status,
            queue_select: *queue_select,
            config_generation: interrupts.generation.load(Ordering::Acquire),
            queues: queues.iter().map(|queue| queue.state().into()).collect(),
            running: device.workers().iter().filter_map(|worker| worker.look(in_use)).flatten().collect(),
            interrupts: interrupts.save(),
            device: DeviceV1 {
                kind: own.kind,
                version: own.version,
                fields: serde_json::from_slice(&own.bytes).unwrap_or_default(),
            },
        };
        State::new(KIND, 1, &fields)
    }

    fn restore(&mut self, state: &State) -> Result<(), BadState> {
        let fields: TransportV1 = state.fields(KIND, 1)?;
        let count = self.queues.len();
        let vectors = &fields.interrupts.queue_vectors;
        let fits = fields.queues.len() == count && vectors.len() == count;
        BadState::unless(fits, KIND, "the device has another number of queues")?;
        BadState::unless(fields.accepted & !self.offered() == 0, KIND, "it has features that are not offered")?;
        let vector = |vector: u16| self.checked_vector(vector) == vector;
        let known = vector(fields.interrupts.config_vector) && vectors.iter().all(|each| vector(*each));
        BadState::unless(known, KIND, "it has interrupt vectors that are not there")?;
        let queue = |index: usize, saved: QueueV1| {
            let size = self.device.queue_sizes().get(index).copied();
            let queue = size.and_then(|size| Queue::try_from(saved.state(size)).ok());
            queue.ok_or_else(|| BadState::new(KIND, "a queue cannot be so"))
        };
        let queues = fields.queues.iter().enumerate().map(|(index, saved)| queue(index, *saved));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        let mut in_use = Vec::new();
        for (index, saved) in &fields.running {
            let queue = queue(*index, *saved)?;
            let valid = queue.ready() && queue.is_valid(self.ram.map());
            BadState::unless(valid, KIND, "a queue in use is outside the guest's RAM")?;
            let single = in_use.iter().all(|other: &VirtQueue| other.index() != *index);
            BadState::unless(single, KIND, "a queue is in use twice")?;
            let kick = self.kicks.get(*index).and_then(|kick| kick.try_clone().ok());
            let kick = kick.ok_or_else(|| BadState::new(KIND, "a queue has no doorbell"))?;
            in_use.push(VirtQueue::new(queue, *index, kick));
        }
        let DeviceV1 { kind, version, fields: own } = &fields.device;
        self.device.restore(&State::new(kind, *version, own))?;
        self.queues = queues;
        self.device_feature_select = fields.device_feature_select;
        self.driver_feature_select = fields.driver_feature_select;
        self.accepted = fields.accepted;
        self.status = fields.status;
        self.queue_select = fields.queue_select;
        self.interrupts.restore(&fields.interrupts);
        self.interrupts.generation.store(fields.config_generation, Ordering::Release);
        // The workers are held; they begin when the machine is released.
        self.hand_out(in_use);
        Ok(())
    }
}
