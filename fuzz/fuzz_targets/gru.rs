//! Any sequence of BAR accesses to a GRU; its TLB must agree with the software's page table all the time.
#![no_main]

use std::cell::RefCell;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::{Corpus, fuzz_target};
use tests::fuzzing::gru::GruUnderTest;
use tests::fuzzing::gru_actions::Sequence;

thread_local! {
    // libFuzzer calls from one thread: one device for all inputs.
    static DEVICE: RefCell<Option<GruUnderTest>> = const { RefCell::new(None) };
}

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Ok(sequence) = Sequence::arbitrary(&mut Unstructured::new(bytes)) else {
        return Corpus::Reject;
    };
    DEVICE.with_borrow_mut(|device| {
        let start = || GruUnderTest::start(Default::default()).expect("a device starts");
        if let Err(violation) = device.get_or_insert_with(start).run(&sequence) {
            panic!("{violation}\n{sequence:#?}");
        }
    });
    Corpus::Keep
});
