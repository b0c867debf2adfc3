//! A connection that the kernel relays outlives the process, and nothing outlives a clean-up.
//!
//! Needs root, and the commands `ip`, `tc`, `mount` and `nft`.

mod beside;
mod ground;
mod lives;
mod moments;
mod services;
mod traces;
mod unpinned;

macro_rules! takeover {
    ({ $($name:ident: $family:ident, $way:ident;)* } $tests:tt) => {
        $(takeover!(@module $name, $family, $way, $tests);)*
    };
    (@module $name:ident, $family:ident, $way:ident, { $($topic:ident::$test:ident,)* }) => {
        mod $name {
            use crate::ground::{Ground, Way};
            use proxy_tests::row::Family;
            $(
                #[test]
                fn $test() {
                    crate::$topic::$test(&Ground::new(Family::$family, Way::$way));
                }
            )*
        }
    };
}

takeover! {
    {
        tcx_v4: V4, Tcx;
        tcx_v6: V6, Tcx;
        clsact_v4: V4, Clsact;
        clsact_v6: V6, Clsact;
    }
    {
        lives::killed_in_the_middle_and_taken_over,
        lives::an_upgrade_by_sigterm,
        lives::another_limit_of_connections,
        lives::ends_that_no_process_saw,
        lives::the_next_process_kills_them,
        lives::an_end_that_does_not_read_and_sigterm,
        moments::at_random,
        moments::while_it_starts,
        unpinned::a_warning_and_resets_when_killed,
        unpinned::sigterm_waits_for_their_end,
        unpinned::the_deadline_and_a_second_signal_reset_them,
        unpinned::beside_what_another_has_pinned,
        unpinned::pins_belong_to_one_process,
        unpinned::ports_belong_to_one_process,
        traces::cleanup_leaves_nothing_behind,
        services::translated_connections,
    }
}

// How the programs are attached has little to do with who may.
takeover! {
    {
        two_by_tcx: V6, Tcx;
        two_by_clsact: V4, Clsact;
    }
    {
        beside::the_first_ends_by_sigterm,
        beside::the_first_is_killed,
        beside::the_first_is_killed_without_pins,
        beside::the_second_ends_before,
        beside::what_another_has_pinned_is_cleaned_up,
    }
}
