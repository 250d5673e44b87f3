//! Layouts whose fields are bits of big-endian words.

use std::marker::PhantomData;

use zerocopy::{FromBytes, IntoBytes};

/// A field of at most 32 bits inside one big-endian 32-bit word of a `T`.
pub struct Field<T> {
    byte: usize,
    bit: u32,
    width: u32,
    of: PhantomData<T>,
}

/// A big-endian 64-bit word of a `T`.
pub struct Wide<T> {
    byte: usize,
    of: PhantomData<T>,
}

impl<T> Clone for Field<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Field<T> {}
impl<T> Clone for Wide<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Wide<T> {}

/// Where a field is, for tests and dumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: &'static str,
    /// Byte offset of its word.
    pub byte: usize,
    /// Lowest bit.
    pub bit: u32,
    /// Bits.
    pub width: u32,
}

impl<T> Field<T> {
    /// `width` bits from `bit` of the word at `byte`. Checked against the size of `T` when it is compiled.
    #[must_use]
    pub const fn new(byte: usize, bit: u32, width: u32) -> Self {
        assert!(byte.is_multiple_of(4) && byte + 4 <= size_of::<T>());
        assert!(width >= 1 && bit + width <= 32);
        Self {
            byte,
            bit,
            width,
            of: PhantomData,
        }
    }

    const fn mask(self) -> u32 {
        u32::MAX >> (32 - self.width)
    }

    /// Its place.
    #[must_use]
    pub const fn describe(self, name: &'static str) -> Described {
        Described {
            name,
            byte: self.byte,
            bit: self.bit,
            width: self.width,
        }
    }
}

impl<T> Wide<T> {
    /// The 64-bit word at `byte`. Checked against the size of `T` when it is compiled.
    #[must_use]
    pub const fn new(byte: usize) -> Self {
        assert!(byte.is_multiple_of(4) && byte + 8 <= size_of::<T>());
        Self {
            byte,
            of: PhantomData,
        }
    }

    /// Its place.
    #[must_use]
    pub const fn describe(self, name: &'static str) -> Described {
        Described {
            name,
            byte: self.byte,
            bit: 0,
            width: 64,
        }
    }
}

/// Bytes with named fields.
pub trait Layout: FromBytes + IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout + Sized {
    /// Every field.
    const FIELDS: &'static [Described];

    /// All bytes zero.
    #[must_use]
    fn zeroed() -> Self {
        Self::new_zeroed()
    }

    /// From the beginning of `bytes`; what is missing is zero.
    #[must_use]
    fn from_prefix(bytes: &[u8]) -> Self {
        let mut new = Self::new_zeroed();
        let len = bytes.len().min(size_of::<Self>());
        new.as_mut_bytes()[..len].copy_from_slice(&bytes[..len]);
        new
    }

    /// A field's value.
    #[must_use]
    fn get(&self, field: Field<Self>) -> u32 {
        let bytes = &self.as_bytes()[field.byte..field.byte + 4];
        let word = u32::from_be_bytes(bytes.try_into().expect("four bytes"));
        word >> field.bit & field.mask()
    }

    /// Whether a field is not 0.
    #[must_use]
    fn is_set(&self, field: Field<Self>) -> bool {
        self.get(field) != 0
    }

    /// Sets a field; bits of `value` beyond its width are dropped.
    fn set(&mut self, field: Field<Self>, value: u32)
    where
        Self: IntoBytes,
    {
        let bytes = &mut self.as_mut_bytes()[field.byte..field.byte + 4];
        let mut word = u32::from_be_bytes((&*bytes).try_into().expect("four bytes"));
        word &= !(field.mask() << field.bit);
        word |= (value & field.mask()) << field.bit;
        bytes.copy_from_slice(&word.to_be_bytes());
    }

    /// As [`Layout::set`], for building one.
    #[must_use]
    fn with(mut self, field: Field<Self>, value: u32) -> Self {
        self.set(field, value);
        self
    }

    /// A 64-bit word's value.
    #[must_use]
    fn wide(&self, field: Wide<Self>) -> u64 {
        let bytes = &self.as_bytes()[field.byte..field.byte + 8];
        u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// Sets a 64-bit word.
    fn set_wide(&mut self, field: Wide<Self>, value: u64) {
        self.as_mut_bytes()[field.byte..field.byte + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// As [`Layout::set_wide`], for building one.
    #[must_use]
    fn with_wide(mut self, field: Wide<Self>, value: u64) -> Self {
        self.set_wide(field, value);
        self
    }
}

/// Declares a [`Layout`]: name, bytes, fields as `bits(byte, lowest bit, width)` or `wide(byte)`.
macro_rules! layout {
    (
        $(#[$meta:meta])* $name:ident[$size:expr] {
            $($(#[$fmeta:meta])* $field:ident = $kind:ident($($arg:expr),*)),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned,
        )]
        #[repr(transparent)]
        pub struct $name(pub [u8; $size]);
        impl $name {
            $($(#[$fmeta])* pub const $field: $crate::mlx5::layout::layout!(@type $kind) = $crate::mlx5::layout::layout!(@new $kind $($arg),*);)*
        }
        impl $crate::mlx5::layout::Layout for $name {
            const FIELDS: &'static [$crate::mlx5::layout::Described] = &[$(Self::$field.describe(stringify!($field))),*];
        }
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                $crate::mlx5::layout::show(stringify!($name), self, f)
            }
        }
    };
    (@type bits) => { $crate::mlx5::layout::Field<Self> };
    (@type wide) => { $crate::mlx5::layout::Wide<Self> };
    (@new bits $($arg:expr),*) => { $crate::mlx5::layout::Field::new($($arg),*) };
    (@new wide $($arg:expr),*) => { $crate::mlx5::layout::Wide::new($($arg),*) };
}
pub(crate) use layout;

/// Fields that are not 0.
pub(crate) fn show<T: Layout>(name: &str, value: &T, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    let mut out = f.debug_struct(name);
    for field in T::FIELDS {
        let bytes = &value.as_bytes()[field.byte..];
        let shown = if field.width == 64 {
            u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
        } else {
            let word = u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"));
            u64::from(word >> field.bit & (u32::MAX >> (32 - field.width)))
        };
        if shown != 0 {
            out.field(field.name, &format_args!("{shown:#x}"));
        }
    }
    out.finish_non_exhaustive()
}

/// Declares an open newtype over an integer: unknown values survive.
macro_rules! open {
    ($(#[$meta:meta])* $name:ident($int:ty) { $($(#[$vmeta:meta])* $variant:ident = $value:expr),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
        pub struct $name(pub $int);
        impl $name {
            $($(#[$vmeta])* pub const $variant: Self = Self($value);)*
            /// The name of the header, or `None` for a value that it does not define.
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
pub(crate) use open;
