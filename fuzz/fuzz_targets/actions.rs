//! A hostile session against a live server; the server must be as before afterwards.
#![no_main]

use std::cell::RefCell;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::{Corpus, fuzz_target};
use tests::fuzzing::actions::Session;
use tests::fuzzing::live::Live;

thread_local! {
    // libFuzzer calls from one thread: one server for all inputs.
    static SERVER: RefCell<Option<Live>> = const { RefCell::new(None) };
}

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Ok(session) = Session::arbitrary(&mut Unstructured::new(bytes)) else {
        return Corpus::Reject;
    };
    SERVER.with_borrow_mut(|server| {
        let server = server.get_or_insert_with(|| Live::start().expect("a server starts").without_memory_check());
        if let Err(violation) = server.run(&session) {
            panic!("{violation}\n{session:#?}");
        }
    });
    Corpus::Keep
});
