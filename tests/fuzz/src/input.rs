//! The fuzzer's bytes, taken as numbers. Behind the end there are zeros.

pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Bytes behind a count of them.
    pub(crate) fn string(&mut self) -> &'a [u8] {
        let count = self.u8();
        self.bytes(count.into())
    }

    pub(crate) fn number(&mut self, bytes: usize) -> u64 {
        self.bytes(bytes).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
    pub(crate) fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }
    pub(crate) fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }
    pub(crate) fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }
    pub(crate) fn u64(&mut self) -> u64 {
        self.number(8)
    }

    /// A place in the pages where drivers have their buffers.
    pub(crate) fn place(&mut self) -> u64 {
        crate::machine::DATA + u64::from(self.u8() & 0x7f) * 0x1000
    }
}
