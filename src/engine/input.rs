//! Input: what viewers do with keyboard and pointer, as the guest's input devices take it.

/// A key, as its XT (set 1) make code; keys with the 0xE0 prefix are `0xE0xx`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyCode(pub u16);

/// The bits of `buttons` in [`InputSink::pointer`], in the order of the HID boot mouse.
pub const BUTTON_LEFT: u8 = 1 << 0;
pub const BUTTON_RIGHT: u8 = 1 << 1;
pub const BUTTON_MIDDLE: u8 = 1 << 2;

/// The far edge of the screen in both directions of [`InputSink::pointer`].
pub const POINTER_MAX: u16 = 32767;

/// Takes input to the guest. Called by viewer threads, several at once; must not block.
pub trait InputSink: Send + Sync {
    /// A key went down or up. `down` may repeat without an `up` between: the viewer's keyboard repeats.
    fn key(&self, code: KeyCode, down: bool);
    /// Where the pointer is, from 0 to [`POINTER_MAX`] in both directions; which buttons are down; how many notches the
    /// wheel turned since the last call, upwards positive.
    fn pointer(&self, x: u16, y: u16, buttons: u8, wheel: i8);
}
