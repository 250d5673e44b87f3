//! SGI GRU: address map, handles, control blocks, instructions.
//!
//! Source of every offset and bit: the project's GRU hardware reference, which was measured against
//! `drivers/misc/sgi-gru` of Linux 6.12 (`gruhandles.h`, `gru_instructions.h`, `grutables.h`); section
//! numbers below are the reference's. Bit `n` is bit n of a little-endian 64-bit word; `DWk` is the word at
//! byte 8k of a handle.
//!
//! Handles are given as one bitfield type per 64-bit word, because software and device exchange whole words.

pub mod cb;
pub mod cbe;
pub mod cch;
pub mod doorbell;
pub mod map;
pub mod message_queue;
pub mod page_size;
pub mod pci;
pub mod tfh;
pub mod tgh;

/// `status` of CCH, TGH and TFH (section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandleStatus(pub u8);

impl HandleStatus {
    /// The handle belongs to software.
    pub const IDLE: Self = Self(0);
    /// The command failed; `cause` says why. On a TFH: a miss waits to be served.
    pub const EXCEPTION: Self = Self(1);
    /// The device is executing.
    pub const ACTIVE: Self = Self(2);

    /// For bitfields.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
    /// For bitfields.
    #[must_use]
    pub const fn into_bits(self) -> u8 {
        self.0
    }
}

/// Declares an open newtype over a small integer: unknown values survive.
macro_rules! open_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $value:expr),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub u8);
        impl $name {
            $($(#[$vmeta])* pub const $variant: Self = Self($value);)*
            /// For bitfields.
            #[must_use]
            pub const fn from_bits(bits: u8) -> Self { Self(bits) }
            /// For bitfields.
            #[must_use]
            pub const fn into_bits(self) -> u8 { self.0 }
            /// The name of the header, or `None` for a value it does not define.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some(stringify!($variant)),)* _ => None }
            }
        }
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }
    };
}
pub(crate) use open_enum;

#[cfg(test)]
mod tests;
