//! The compiler's coverage counters, which libFuzzer reads after each input.

use std::slice;

#[allow(unsafe_code, reason = "the linker's names of the counters' ends")]
unsafe extern "C" {
    #[link_name = "__start___sancov_cntrs"]
    static mut START: u8;
    #[link_name = "__stop___sancov_cntrs"]
    static mut STOP: u8;
}

/// Does `work` so that it does not count. To make a machine is the same every time, and hides what an input does.
pub(crate) fn uncounted<T>(work: impl FnOnce() -> T) -> T {
    let before = counters().to_vec();
    let done = work();
    counters().copy_from_slice(&before);
    done
}

#[allow(unsafe_code, reason = "the counters are nobody's")]
fn counters() -> &'static mut [u8] {
    let (start, stop) = (&raw mut START, &raw mut STOP);
    // SAFETY: the section lies between these two. Other code only adds to single counters, and a lost count does no harm.
    unsafe { slice::from_raw_parts_mut(start, stop as usize - start as usize) }
}
