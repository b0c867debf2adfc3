//! A connection that the kernel relays outlives the process, and nothing outlives a clean-up.
//!
//! Needs root, and the commands `ip`, `tc`, `mount` and `nft`.

mod ground;
mod lives;

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
    }
}
