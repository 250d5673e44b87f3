//! Any commands, work requests, doorbells and memory of an HCA; a good driver must be served afterwards.
#![no_main]

use std::cell::RefCell;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::{Corpus, fuzz_target};
use tests::fuzzing::mlx5::{Mlx5UnderTest, Sequence};

thread_local! {
    // libFuzzer calls from one thread: one device for all inputs.
    static DEVICE: RefCell<Option<Mlx5UnderTest>> = const { RefCell::new(None) };
}

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Ok(sequence) = Sequence::arbitrary(&mut Unstructured::new(bytes)) else {
        return Corpus::Reject;
    };
    DEVICE.with_borrow_mut(|device| {
        let under_test = device
            .take()
            .unwrap_or_else(|| Mlx5UnderTest::start().expect("a device starts"));
        match under_test.run(&sequence) {
            Ok((under_test, _)) => *device = Some(under_test),
            Err(violation) => panic!("{violation}\n{sequence:#?}"),
        }
    });
    Corpus::Keep
});
