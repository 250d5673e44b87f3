//! Tests of the GRU driver on a GRU, over any backing: each body takes a [`rig::Rig`] and asserts.
//!
//! `tests/gru_in_process.rs` and `tests/gru_vfio_user.rs` choose the backing, and get one test for each body and
//! each mode of the device by [`gru_bodies_in_every_mode`](crate::gru_bodies_in_every_mode). `TLBRIDGE_GRU_ROUNDS`
//! says how often each runs, on a new device each time (once without it; `cargo xtask soak` sets it), and
//! `TLBRIDGE_SANITIZE=1` has the device's sanitizer look on.

pub mod contexts;
pub mod faults;
pub mod flushes;
pub mod instructions;
pub mod memory;
pub mod messages;
pub mod page_table;
pub mod rig;

use device::faults::{BreakPlan, Injections};
use device::gru::{Doorbell, Gru, GruConfig};
use device::model::Model;
use driver::gru::GruOptions;

/// How often each body runs.
#[must_use]
pub fn rounds() -> u64 {
    std::env::var("TLBRIDGE_GRU_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(1)
}

/// Whether everything is to run under the device's sanitizer, which may find nothing: `TLBRIDGE_SANITIZE=1`.
#[must_use]
pub fn sanitizing() -> bool {
    std::env::var_os("TLBRIDGE_SANITIZE").is_some_and(|value| value == "1" || value == "2")
}

/// What the sanitizer of a device has found is nothing, if it has one and nothing is broken in it.
///
/// # Panics
/// When it is something.
pub fn assert_nothing_found(config: &GruConfig, device: &Gru) {
    let faultless = config.broken == BreakPlan::default() && config.faults.inject == Injections::default();
    if faultless && let Some(findings) = device.findings() {
        for report in &findings.reports {
            println!("{report}");
        }
        assert_eq!(findings.defects, 0, "the sanitizer has found something");
    }
}

/// How the device is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every access is a message.
    Trap,
    /// As for a guest in bell mode: fault handles are trapped, nothing polls.
    Bell,
    /// As for a guest in poll mode: fault handles are trapped.
    Poll,
    /// As for our own driver: fault handles are mapped, too.
    PollMapTfh,
}

impl Mode {
    /// The device's configuration.
    #[must_use]
    pub fn config(self) -> GruConfig {
        let (doorbell, map_tfh) = match self {
            Self::Trap => (Doorbell::Trap, false),
            Self::Bell => (Doorbell::Bell, false),
            Self::Poll => (Doorbell::Poll, false),
            Self::PollMapTfh => (Doorbell::Poll, true),
        };
        GruConfig {
            doorbell,
            map_tfh,
            sanitize: sanitizing(),
            ..GruConfig::default()
        }
    }
}

/// The driver's defaults with BCOPY preload.
#[must_use]
pub fn preload(pages: u32) -> GruOptions {
    GruOptions {
        preload: pages,
        ..GruOptions::default()
    }
}

/// The driver's defaults with so few ASIDs that generations end quickly.
#[must_use]
pub fn short_asids() -> GruOptions {
    GruOptions {
        asid_first: contexts::SHORT_ASIDS.start,
        asid_end: contexts::SHORT_ASIDS.end,
        ..GruOptions::default()
    }
}

/// A module of tests for each mode. `$with_device` is a function `(Mode, impl Fn() -> GruOptions, impl Fn(&Rig))` that opens a
/// device and runs the body on it.
#[macro_export]
macro_rules! gru_bodies_in_every_mode {
    ($with_device:path) => {
        $crate::gru_bodies_in_every_mode!($with_device, trap = Trap, false);
        $crate::gru_bodies_in_every_mode!($with_device, bell = Bell, true);
        $crate::gru_bodies_in_every_mode!($with_device, poll = Poll, true);
        $crate::gru_bodies_in_every_mode!($with_device, poll_map_tfh = PollMapTfh, true);
    };
    ($with_device:path, $module:ident = $mode:ident, $mapped:literal) => {
        mod $module {
            fn with(options: impl Fn() -> ::driver::gru::GruOptions, body: impl Fn(&$crate::gru::rig::Rig)) {
                $with_device($crate::gru::Mode::$mode, options, body);
            }

            $crate::gru_bodies!(with);

            /// What is mapped decides whether a flush sleeps.
            #[test]
            fn test_flush_when_asked_whether_it_sleeps_says_what_is_mapped() {
                with(GruOptions::default, |rig| {
                    flushes::nonsleeping(rig, $mapped)
                });
            }
        }
    };
}

/// One test for each body. `$with` is a function `(impl Fn() -> GruOptions, impl Fn(&Rig))` that opens a device and
/// runs the body on it.
#[macro_export]
macro_rules! gru_bodies {
    ($with:path) => {
        use driver::gru::{FaultMode, GruOptions};
        use $crate::gru::{contexts, faults, flushes, instructions, messages, preload, short_asids};

        #[test]
        fn test_every_instruction_when_faults_are_interrupts_moves_the_right_bytes() {
            $with(GruOptions::default, |rig| {
                instructions::every_instruction(rig, FaultMode::Interrupt);
            });
        }
        #[test]
        fn test_every_instruction_when_user_polls_moves_the_right_bytes() {
            $with(GruOptions::default, |rig| {
                instructions::every_instruction(rig, FaultMode::UserPolling);
            });
        }
        #[test]
        fn test_message_queue_when_it_has_512_bytes_takes_four_messages() {
            $with(GruOptions::default, |rig| messages::conformance(rig));
        }
        #[test]
        fn test_message_queue_when_messages_have_two_lines_cuts_and_loses_none() {
            $with(GruOptions::default, |rig| messages::two_lines(rig));
        }
        #[test]
        fn test_message_queue_when_many_send_and_its_page_moves_delivers_each_once() {
            $with(GruOptions::default, |rig| {
                assert_eq!(
                    messages::many_senders(rig, 100),
                    0,
                    "nothing injects congestion"
                );
            });
        }
        #[test]
        fn test_instruction_when_address_is_bad_ends_with_exception_detail() {
            $with(GruOptions::default, |rig| {
                faults::bad_address(rig, FaultMode::Interrupt);
                faults::bad_address(rig, FaultMode::UserPolling);
            });
        }
        #[test]
        fn test_store_when_page_is_read_only_ends_with_exception() {
            $with(GruOptions::default, |rig| {
                faults::read_only_page(rig, FaultMode::Interrupt);
                faults::read_only_page(rig, FaultMode::UserPolling);
            });
        }
        #[test]
        fn test_s1_miss_when_invalidation_is_in_progress_waits_for_its_end() {
            $with(GruOptions::default, |rig| {
                faults::s1_miss_in_progress_waits(rig, FaultMode::Interrupt);
                faults::s1_miss_in_progress_waits(rig, FaultMode::UserPolling);
            });
        }
        #[test]
        fn test_close_when_a_miss_is_deferred_does_not_wait() {
            $with(GruOptions::default, |rig| {
                faults::close_while_a_miss_is_deferred(rig);
            });
        }
        #[test]
        fn test_bcopy_when_preload_is_on_misses_less_often() {
            $with(
                || preload(8),
                |rig| {
                    faults::preload(rig);
                },
            );
        }
        #[test]
        fn test_huge_page_when_a_part_is_flushed_is_gone() {
            $with(GruOptions::default, |rig| {
                faults::huge_page(rig);
            });
        }
        #[test]
        fn test_misses_when_many_at_once_are_all_served() {
            $with(GruOptions::default, |rig| {
                faults::many_misses_at_once(rig);
            });
        }
        #[test]
        fn test_s12_instruction_when_space_is_closed_ends_with_exception() {
            $with(GruOptions::default, |rig| {
                faults::s12_closed_space(rig, FaultMode::Interrupt);
                faults::s12_closed_space(rig, FaultMode::UserPolling);
            });
        }
        #[test]
        fn test_contexts_when_exhausted_fail_with_what_is_in_use() {
            $with(GruOptions::default, |rig| {
                contexts::exhaustion(rig);
            });
        }
        #[test]
        fn test_context_when_new_shows_nothing_of_the_last_owner() {
            $with(GruOptions::default, |rig| {
                contexts::new_context_is_clean(rig);
            });
        }
        #[test]
        fn test_spaces_when_addresses_are_equal_are_isolated() {
            $with(GruOptions::default, |rig| {
                contexts::isolation(rig);
            });
        }
        #[test]
        fn test_asids_when_generations_pass_never_show_a_former_owner() {
            $with(short_asids, |rig| {
                contexts::asid_wrap(rig);
            });
        }
        #[test]
        fn test_flush_when_no_context_is_loaded_drops_the_asid() {
            $with(GruOptions::default, |rig| {
                contexts::flush_without_contexts(rig);
            });
        }
        #[test]
        fn test_close_when_instructions_run_returns_and_hurts_nobody() {
            $with(GruOptions::default, |rig| {
                contexts::close_under_load(rig);
            });
        }
        #[test]
        fn test_renew_asids_when_instructions_run_loses_nothing() {
            $with(GruOptions::default, |rig| {
                contexts::renew_asids(rig);
            });
        }
        #[test]
        fn test_s2_flush_when_bcopy_storms_leaves_no_stale_access() {
            $with(GruOptions::default, |rig| {
                flushes::s2_bcopy_storm(rig, 600, 60);
            });
        }
        #[test]
        fn test_s2_flush_when_bcopy_preloads_leaves_no_stale_access() {
            $with(
                || preload(16),
                |rig| {
                    flushes::s2_bcopy_storm(rig, 600, 60);
                },
            );
        }
        #[test]
        fn test_s2_instruction_when_issued_after_a_flush_uses_no_older_entry() {
            $with(GruOptions::default, |rig| {
                flushes::s2_generation(rig);
            });
        }
        #[test]
        fn test_s1_fill_when_an_invalidation_ran_during_its_look_up_is_dropped() {
            $with(GruOptions::default, |rig| {
                flushes::s1_invalidation_during_the_look_up(rig, FaultMode::Interrupt);
                flushes::s1_invalidation_during_the_look_up(rig, FaultMode::UserPolling);
            });
        }
        #[test]
        fn test_s1_preload_when_an_invalidation_ran_during_its_look_up_is_dropped() {
            $with(
                || preload(8),
                |rig| {
                    flushes::s1_invalidation_during_preload(rig);
                },
            );
        }
        #[test]
        fn test_flush_when_called_by_many_threads_serves_all() {
            $with(GruOptions::default, |rig| {
                flushes::many_flushers(rig);
            });
        }
        #[test]
        fn test_flush_when_range_is_any_length_covers_it() {
            $with(GruOptions::default, |rig| {
                flushes::range_lengths(rig);
            });
        }
        #[test]
        fn test_driver_when_device_is_reset_behind_it_ends_every_call() {
            $with(GruOptions::default, |rig| {
                contexts::reset_behind_the_driver(rig);
            });
        }
    };
}
