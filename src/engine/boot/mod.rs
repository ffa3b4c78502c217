//! placeholder until merged
#[derive(Debug, Clone)]
pub struct StartState {
    pub mode: StartMode,
}
#[derive(Debug, Clone, Copy)]
pub enum StartMode {
    Real { cs: u16, ip: u16 },
    Protected32 { eip: u32, ebx: u32, esi: u32 },
    Long64 { rip: u64, rsi: u64, cr3: u64 },
}
