//! One vCPU: a thread that runs the guest and turns its exits into single accesses.
//!
//! The thread obeys a gate: run, park, end. Only the machine's thread gives orders, and waits until each is followed. What
//! the guest asks for (reset, power off) and what went wrong are events to the machine; the vCPU parks itself meanwhile.

#![expect(unsafe_code, reason = "the fields of kvm_run are unions that the exit reason selects")]

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC2, KVM_EXIT_HYPERV_HCALL, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_enable_cap,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{
    boot::StartState,
    bus::{BusView, Effect, Width, from_le, to_le},
    cpuid,
    devices::Board,
    saved::State,
    start_state,
    topology::Topology,
    vcpu_state::VcpuState,
    vm::Vm,
};
use crate::{spec::CpuModel, types::monotonic_us};

/// What a vCPU tells the machine. The sender has parked itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest has let go of what was in a PCI slot.
    Eject,
    /// A triple fault: a PC resets.
    TripleFault,
    /// The vCPU cannot go on; a sentence, and what is known for the guest's log.
    Failed { reason: String, detail: String },
}

/// Where vCPU events go; called from vCPU threads.
pub type EventSink = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Park,
    /// Do what is in `work`, and park again.
    Work,
    End,
}

/// What a parked vCPU's thread is asked to do with it.
type Work = Box<dyn FnOnce(&VcpuFd, &VcpuState) + Send>;

/// Between the machine's thread and one vCPU thread.
struct Gate {
    /// Set until the thread has seen an order to run, which it looks at before each entry into the guest.
    attention: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    order: Order,
    parked: bool,
    work: Option<Work>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn order(&self, order: Order) {
        let mut inner = self.lock();
        // The end is never taken back.
        if inner.order != Order::End {
            inner.order = order;
        }
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

/// The machine's hold on a vCPU.
pub struct Vcpu {
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
    exits: Arc<AtomicU64>,
    first_run_us: Arc<OnceLock<u64>>,
}

/// How often a vCPU that does not yet notice is interrupted again.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Everything to make a vCPU.
pub struct VcpuConfig {
    pub index: u32,
    pub topology: Topology,
    pub model: CpuModel,
    /// With Hyper-V's enlightenments.
    pub hyperv: bool,
    /// Where it begins after power on and reset; `None` waits for another vCPU to wake it.
    pub start: Option<StartState>,
    pub pio: BusView,
    pub mmio: BusView,
    pub events: EventSink,
}

impl Vcpu {
    /// Makes the vCPU and its thread, parked.
    pub fn new(vm: &Arc<Vm>, config: VcpuConfig) -> io::Result<Vcpu> {
        // KVM's number of a vCPU is its local APIC id.
        let apic_id = config.topology.apic_id(config.index);
        let fd = vm.create_vcpu(apic_id)?;
        let features = cpuid::Features {
            host: vm.supported_cpuid()?,
            model: config.model,
            hyperv: config.hyperv.then(|| vm.enlightenments()).flatten(),
            tsc_deadline: vm.has_tsc_deadline(),
        };
        if features.hyperv.is_some_and(|enlightenments| enlightenments.synic) {
            let synic = kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() };
            fd.enable_cap(&synic).map_err(named("cannot give the guest Hyper-V's interrupt controller"))?;
        }
        let features = features.for_vcpu(apic_id, config.topology).map_err(io::Error::other)?;
        fd.set_cpuid2(&features).map_err(named("cannot set the processor's features"))?;
        let power_on = VcpuState::capture(&fd, &vm.msr_indexes()?)?;
        if let Some(start) = &config.start {
            start_state::apply(&fd, start)?;
        }
        if config.index == 0 {
            vm.coalesce_window(&fd, config.mmio.clone());
        }
        register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)?;
        let inner = Inner { order: Order::Park, parked: false, work: None };
        let gate =
            Arc::new(Gate { attention: AtomicBool::new(true), inner: Mutex::new(inner), changed: Condvar::new() });
        let exits = Arc::new(AtomicU64::new(0));
        let first_run_us = Arc::new(OnceLock::new());
        let runner = Runner {
            fd,
            vm: Arc::clone(vm),
            power_on,
            gate: Arc::clone(&gate),
            pio: config.pio,
            mmio: config.mmio,
            events: config.events,
            exits: Arc::clone(&exits),
            first_run_us: Arc::clone(&first_run_us),
        };
        let name = format!("vcpu{}", config.index);
        let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || runner.run())?;
        Ok(Vcpu { gate, thread: Some(thread), exits, first_run_us })
    }

    /// Exits to this process since the start.
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// When it went into the guest for the first time, on the monotonic clock.
    pub fn first_run_us(&self) -> Option<u64> {
        self.first_run_us.get().copied()
    }

    pub fn run(&self) {
        self.gate.order(Order::Run);
    }

    /// Asks the vCPU to park; `wait_parked` waits for it. Two steps, so that all vCPUs stop together.
    pub fn ask_to_park(&self) {
        self.gate.order(Order::Park);
    }

    /// Returns when the vCPU is outside the guest and waits.
    pub fn wait_parked(&self) {
        let mut inner = self.gate.lock();
        while !inner.parked {
            if let Some(thread) = &self.thread {
                // The signal ends KVM_RUN. It may come just before, so it is sent until the vCPU has answered.
                let _ = thread.kill(SIGRTMIN());
            }
            inner = self.gate.changed.wait_timeout(inner, KICK_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Puts a parked vCPU back to its state after power on; it stays parked. `start` is where it begins.
    pub fn reset(&self, start: Option<StartState>) -> io::Result<()> {
        self.parked_do(move |fd, power_on| {
            power_on.reset(fd)?;
            start.as_ref().map_or(Ok(()), |start| start_state::apply(fd, start))
        })
    }

    /// The state of a parked vCPU.
    pub fn save(&self, vm: &Vm) -> io::Result<State> {
        let indexes = vm.msr_indexes()?;
        self.parked_do(move |fd, _| Ok(VcpuState::capture(fd, &indexes)?.save()))
    }

    /// Has a parked vCPU go on from there; it stays parked.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        let saved = VcpuState::of(state).map_err(io::Error::other)?;
        self.parked_do(move |fd, _| saved.resume(fd))
    }

    /// Has the thread do something with its parked vCPU, and waits for it.
    fn parked_do<T: Send + 'static>(
        &self,
        work: impl FnOnce(&VcpuFd, &VcpuState) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (tell, told) = mpsc::sync_channel(1);
        self.gate.lock().work = Some(Box::new(move |fd, power_on| drop(tell.send(work(fd, power_on)))));
        self.gate.order(Order::Work);
        told.recv().unwrap_or_else(|_| Err(io::Error::other("the thread of a vCPU has ended")))
    }
}

impl Drop for Vcpu {
    /// Ends the thread.
    fn drop(&mut self) {
        self.gate.order(Order::End);
        if let Some(thread) = self.thread.take() {
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                std::thread::sleep(KICK_INTERVAL);
            }
            let _ = thread.join();
        }
    }
}

const STACK_BYTES: usize = 512 << 10;

/// Does nothing: being delivered is what ends KVM_RUN.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn named(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> io::Error {
    move |error| io::Error::other(format!("{what}: {}", io::Error::from_raw_os_error(error.errno())))
}

/// The thread's side.
struct Runner {
    fd: VcpuFd,
    vm: Arc<Vm>,
    power_on: VcpuState,
    gate: Arc<Gate>,
    pio: BusView,
    mmio: BusView,
    events: EventSink,
    exits: Arc<AtomicU64>,
    first_run_us: Arc<OnceLock<u64>>,
}

/// What to do after one exit.
enum Step {
    Continue,
    Tell(VcpuEvent),
}

impl Runner {
    fn run(mut self) {
        loop {
            if self.gate.attention.load(Ordering::Acquire) && !self.obey() {
                return;
            }
            match self.step() {
                Step::Continue => {}
                Step::Tell(event) => {
                    // The pending I/O of this exit is finished before anybody looks at the registers.
                    self.finish_exit();
                    self.gate.order(Order::Park);
                    (self.events)(event);
                }
            }
        }
    }

    /// Follows orders until the guest may run (true) or the thread ends (false).
    fn obey(&mut self) -> bool {
        self.finish_exit();
        let gate = Arc::clone(&self.gate);
        let mut inner = gate.lock();
        inner.parked = true;
        gate.changed.notify_all();
        loop {
            match inner.order {
                Order::Run => {
                    // Here and not where the order is given: a thread that has only begun would miss that it was parked.
                    gate.attention.store(false, Ordering::Release);
                    inner.parked = false;
                    // A guest with kvmclock is told of the pause, so that it does not take it for a lockup; others refuse.
                    let _ = self.fd.kvmclock_ctrl();
                    self.first_run_us.get_or_init(monotonic_us);
                    return true;
                }
                Order::End => return false,
                // The lock is kept: whoever waits for the result gives the next order after this one is over.
                Order::Work => {
                    inner.order = Order::Park;
                    if let Some(work) = inner.work.take() {
                        work(&self.fd, &self.power_on);
                    }
                }
                Order::Park => inner = gate.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// KVM completes an instruction's I/O at the next entry; `immediate_exit` makes that entry and nothing more.
    fn finish_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn step(&mut self) -> Step {
        let exit = self.fd.run();
        self.exits.fetch_add(1, Ordering::Relaxed);
        // What any vCPU wrote to the VGA window before this exit comes before what the exit asks for.
        self.vm.settle_writes();
        let effect = match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                let (start, bytes) = (data.as_ptr(), data.len());
                let size = self.io_size();
                // SAFETY: KVM's data lies in the run mapping of `self.fd`, which lives on; nothing else touches it until the
                // next KVM_RUN.
                let data = unsafe { std::slice::from_raw_parts(start, bytes) };
                port_out(&mut self.pio, port, size, data)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let (start, bytes) = (data.as_mut_ptr(), data.len());
                let size = self.io_size();
                // SAFETY: as above, and exclusively ours until the next KVM_RUN.
                let data = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
                port_in(&mut self.pio, port, size, data);
                Effect::None
            }
            Ok(VcpuExit::MmioRead(at, data)) => {
                self.mmio.read_bytes(at, data);
                Effect::None
            }
            Ok(VcpuExit::MmioWrite(at, data)) => self.mmio.write_bytes(at, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Effect::None,
            Ok(VcpuExit::Hyperv) => {
                self.refuse_hypercall();
                Effect::None
            }
            Ok(VcpuExit::Shutdown) => return Step::Tell(VcpuEvent::TripleFault),
            Ok(VcpuExit::InternalError) => return Step::Tell(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                let reason = format!("the processor refused to enter the guest (reason {reason:#x})");
                return Step::Tell(VcpuEvent::Failed { reason, detail: self.registers() });
            }
            Ok(other) => {
                let reason = format!("the guest left KVM in a way this engine does not know: {other:?}");
                return Step::Tell(VcpuEvent::Failed { reason, detail: self.registers() });
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Effect::None,
            Err(error) => {
                let reason = format!("KVM cannot run the guest: {}", io::Error::from_raw_os_error(error.errno()));
                return Step::Tell(VcpuEvent::Failed { reason, detail: self.registers() });
            }
        };
        match effect {
            Effect::None => Step::Continue,
            Effect::Reset => Step::Tell(VcpuEvent::Reset),
            Effect::PowerOff => Step::Tell(VcpuEvent::PowerOff),
            Effect::Eject => Step::Tell(VcpuEvent::Eject),
        }
    }

    /// Bytes of one access of the I/O exit at hand; strings carry several.
    fn io_size(&mut self) -> usize {
        // SAFETY: the exit reason is KVM_EXIT_IO, which makes `io` the valid field; every bit pattern of it is valid.
        usize::from(unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size })
    }

    /// A call of Hyper-V's that KVM does not carry out is one that nobody offered. The other reasons for this exit only tell.
    fn refuse_hypercall(&mut self) {
        const INVALID_HYPERCALL_CODE: u64 = 2;
        // SAFETY: the exit reason is KVM_EXIT_HYPERV, which makes `hyperv` the valid field, and its type says which of its
        // parts is; every bit pattern of them is valid.
        unsafe {
            let hyperv = &mut self.fd.get_kvm_run().__bindgen_anon_1.hyperv;
            if hyperv.type_ == KVM_EXIT_HYPERV_HCALL {
                hyperv.u.hcall.result = INVALID_HYPERCALL_CODE;
            }
        }
    }

    fn internal_error(&mut self) -> VcpuEvent {
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, which makes these fields valid; they are plain numbers.
        let failure = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
        let mut detail = String::new();
        let reason = if failure.suberror == KVM_INTERNAL_ERROR_EMULATION {
            // SAFETY: as above.
            let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let known = failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
            if known && failure.ndata >= 2 {
                let bytes = insn.insn_bytes.get(..usize::from(insn.insn_size)).unwrap_or(&insn.insn_bytes);
                detail = format!("instruction bytes: {bytes:02x?}\n");
            }
            "KVM on this host cannot emulate an instruction of the guest (emulation failure)".to_owned()
        } else {
            format!("KVM reports an internal error (suberror {})", failure.suberror)
        };
        detail += &self.registers();
        VcpuEvent::Failed { reason, detail }
    }

    /// The registers for the guest's log, as far as KVM still has them.
    fn registers(&self) -> String {
        let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return "registers: KVM no longer has them\n".into();
        };
        format!(
            "rip {:016x} rflags {:08x} rax {:016x} rbx {:016x}\nrcx {:016x} rdx {:016x} rsi {:016x} rdi {:016x}\n\
             rsp {:016x} rbp {:016x} r8 {:016x} r9 {:016x}\ncs {:04x} base {:x} ds {:04x} ss {:04x} base {:x} \
             cr0 {:08x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}\n",
            r.rip,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.rsp,
            r.rbp,
            r.r8,
            r.r9,
            s.cs.selector,
            s.cs.base,
            s.ds.selector,
            s.ss.selector,
            s.ss.base,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer
        )
    }
}

/// Port writes, one access after the other; the strongest effect wins.
fn port_out(bus: &mut BusView, port: u16, size: usize, data: &[u8]) -> Effect {
    let mut effect = Effect::None;
    for piece in data.chunks_exact(size.max(1)) {
        let Some(width) = Width::from_bytes(piece.len()) else { break };
        let done = bus.write(u64::from(port), width, from_le(piece));
        if done != Effect::None {
            effect = done;
        }
    }
    effect
}

fn port_in(bus: &mut BusView, port: u16, size: usize, data: &mut [u8]) {
    for piece in data.chunks_exact_mut(size.max(1)) {
        let Some(width) = Width::from_bytes(piece.len()) else { break };
        to_le(bus.read(u64::from(port), width), piece);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::engine::bus::{Access, Bus, BusDevice, BusFault};

    #[derive(Default)]
    struct Log(Vec<(u64, usize, u64)>, AtomicU64);
    impl BusDevice for Log {
        fn read(&mut self, _: Access) -> Result<u64, BusFault> {
            Ok(self.1.fetch_add(1, Ordering::Relaxed) + 0x1122_3340)
        }
        fn write(&mut self, at: Access, value: u64) -> Result<Effect, BusFault> {
            self.0.push((at.offset, at.width.bytes(), value));
            Ok(if value == 0xff { Effect::Reset } else { Effect::None })
        }
    }

    #[test]
    fn strings_and_odd_lengths_become_single_accesses() {
        let bus = Arc::new(Bus::default());
        let log = Arc::new(Mutex::new(Log::default()));
        bus.map(0x10..0x20, Arc::clone(&log) as crate::engine::bus::SharedDevice).unwrap();
        let mut view = bus.view();
        assert_eq!(port_out(&mut view, 0x10, 2, &[1, 2, 3, 4]), Effect::None);
        assert_eq!(port_out(&mut view, 0x10, 1, &[0xff, 0]), Effect::Reset);
        assert_eq!(view.write_bytes(0x11, &[7, 8, 9]), Effect::None);
        let seen = std::mem::take(&mut log.lock().unwrap().0);
        assert_eq!(seen, [(0, 2, 0x201), (0, 2, 0x403), (0, 1, 0xff), (0, 1, 0), (1, 1, 7), (2, 1, 8), (3, 1, 9)]);
        let mut data = [0; 4];
        port_in(&mut view, 0x10, 2, &mut data);
        assert_eq!(data, [0x40, 0x33, 0x41, 0x33]);
        let mut odd = [0; 3];
        view.read_bytes(0x1e, &mut odd);
        assert_eq!(odd, [0x42, 0x43, 0xff]);
    }
}
