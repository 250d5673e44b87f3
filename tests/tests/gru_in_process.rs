//! The real driver on the real device in one process, in both doorbell modes.

use std::sync::Arc;

use device::gru::{Doorbell, Gru, GruConfig};
use driver::gru::{FaultMode, GruOptions};
use tests::gru::rig::Rig;
use tests::gru::{contexts, faults, flushes, instructions};
use tests::in_process::InProcess;

fn rig_with(doorbell: Doorbell, options: GruOptions) -> Rig {
    let config = GruConfig {
        doorbell,
        ..GruConfig::default()
    };
    let (backing, _model) = InProcess::build(|context| Gru::new(context, config)).expect("a GRU");
    Rig::new(Arc::new(backing), options, 4096)
}

fn short_asids() -> GruOptions {
    GruOptions {
        asid_first: contexts::SHORT_ASIDS.start,
        asid_end: contexts::SHORT_ASIDS.end,
        ..GruOptions::default()
    }
}

/// The same bodies in a doorbell mode.
macro_rules! bodies {
    ($mode:ident, $doorbell:expr, $mapped:expr) => {
        mod $mode {
            use super::*;

            fn rig() -> Rig {
                rig_with($doorbell, GruOptions::default())
            }

            #[test]
            fn test_every_instruction_when_faults_are_interrupts_moves_the_right_bytes() {
                instructions::every_instruction(&rig(), FaultMode::Interrupt);
            }
            #[test]
            fn test_every_instruction_when_user_polls_moves_the_right_bytes() {
                instructions::every_instruction(&rig(), FaultMode::UserPolling);
            }
            #[test]
            fn test_instruction_when_address_is_bad_ends_with_exception_detail() {
                faults::bad_address(&rig(), FaultMode::Interrupt);
                faults::bad_address(&rig(), FaultMode::UserPolling);
            }
            #[test]
            fn test_store_when_page_is_read_only_ends_with_exception() {
                faults::read_only_page(&rig(), FaultMode::Interrupt);
                faults::read_only_page(&rig(), FaultMode::UserPolling);
            }
            #[test]
            fn test_s1_miss_when_invalidation_is_in_progress_waits_for_its_end() {
                faults::s1_miss_in_progress_waits(&rig(), FaultMode::Interrupt);
                faults::s1_miss_in_progress_waits(&rig(), FaultMode::UserPolling);
            }
            #[test]
            fn test_close_when_a_miss_is_deferred_does_not_wait() {
                faults::close_while_a_miss_is_deferred(&rig());
            }
            #[test]
            fn test_bcopy_when_preload_is_on_misses_less_often() {
                let options = GruOptions {
                    preload: 8,
                    ..GruOptions::default()
                };
                faults::preload(&rig_with($doorbell, options));
            }
            #[test]
            fn test_huge_page_when_a_part_is_flushed_is_gone() {
                faults::huge_page(&rig());
            }
            #[test]
            fn test_misses_when_many_at_once_are_all_served() {
                faults::many_misses_at_once(&rig());
            }
            #[test]
            fn test_s12_instruction_when_space_is_closed_ends_with_exception() {
                faults::s12_closed_space(&rig(), FaultMode::Interrupt);
                faults::s12_closed_space(&rig(), FaultMode::UserPolling);
            }
            #[test]
            fn test_contexts_when_exhausted_fail_with_what_is_in_use() {
                contexts::exhaustion(&rig());
            }
            #[test]
            fn test_context_when_new_shows_nothing_of_the_last_owner() {
                contexts::new_context_is_clean(&rig());
            }
            #[test]
            fn test_spaces_when_addresses_are_equal_are_isolated() {
                contexts::isolation(&rig());
            }
            #[test]
            fn test_asids_when_generations_pass_never_show_a_former_owner() {
                contexts::asid_wrap(&rig_with($doorbell, short_asids()));
            }
            #[test]
            fn test_flush_when_no_context_is_loaded_drops_the_asid() {
                contexts::flush_without_contexts(&rig());
            }
            #[test]
            fn test_close_when_instructions_run_returns_and_hurts_nobody() {
                contexts::close_under_load(&rig());
            }
            #[test]
            fn test_renew_asids_when_instructions_run_loses_nothing() {
                contexts::renew_asids(&rig());
            }
            #[test]
            fn test_s2_flush_when_bcopy_storms_leaves_no_stale_access() {
                flushes::s2_bcopy_storm(&rig(), 1500);
            }
            #[test]
            fn test_s2_flush_when_bcopy_preloads_leaves_no_stale_access() {
                let options = GruOptions {
                    preload: 16,
                    ..GruOptions::default()
                };
                flushes::s2_bcopy_storm(&rig_with($doorbell, options), 1500);
            }
            #[test]
            fn test_s2_instruction_when_issued_after_a_flush_uses_no_older_entry() {
                flushes::s2_generation(&rig());
            }
            #[test]
            fn test_flush_when_called_by_many_threads_serves_all() {
                flushes::many_flushers(&rig());
            }
            #[test]
            fn test_flush_when_range_is_any_length_covers_it() {
                flushes::range_lengths(&rig());
            }
            #[test]
            fn test_flush_when_asked_says_whether_it_sleeps() {
                flushes::nonsleeping(&rig(), $mapped);
            }
        }
    };
}

bodies!(trap, Doorbell::Trap, false);
bodies!(poll, Doorbell::Poll, true);

#[test]
fn test_driver_when_device_is_reset_behind_it_ends_every_call() {
    contexts::reset_behind_the_driver(&rig_with(Doorbell::Poll, GruOptions::default()));
}
