//! Any bytes through the header's and every payload's codec.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tests::fuzzing::codec::decode(bytes));
