//! The contract between hosts: the same tests as over loopback, with client, proxy and server on
//! hosts of their own, so that also engines that work on devices are held to it.
//!
//! Needs root and the `ip` command (network namespaces).
//!
//! Left out are `dialling::a_name_is_resolved` and `dialling::a_name_that_does_not_resolve`:
//! `localhost` is no server's name here, no resolver is within reach, and names are resolved
//! before any engine has a part in a connection.

#[macro_use]
#[path = "../contract/setting.rs"]
mod setting;

#[allow(dead_code, reason = "names need loopback, see above")]
#[path = "../contract/dialling.rs"]
mod dialling;
#[path = "../contract/endings.rs"]
mod endings;
#[path = "../contract/killed.rs"]
mod killed;
#[path = "../contract/resets.rs"]
mod resets;
#[path = "../contract/stalls.rs"]
mod stalls;
#[path = "../contract/streams.rs"]
mod streams;
#[path = "../contract/upstreams.rs"]
mod upstreams;
#[path = "../contract/urgent.rs"]
mod urgent;

// What holds whoever moves the bytes.
contract! {
    {
        splice_v4: Setting::over_wires("splice", V4);
        splice_v6: Setting::over_wires("splice", V6);
        packet_v4: Setting::over_wires("packet", V4).with(&[("packet-max-rtt", "1s"), ("v", "4")]);
        packet_v6: Setting::over_wires("packet", V6).with(&[("packet-max-rtt", "1s"), ("v", "4")]);
    }
    {
        streams::two_hundred_megabytes_each_way_at_once,
        streams::writes_of_every_size_both_ways,
        streams::one_byte_at_a_time_both_ways,
        streams::ping_pong,
        streams::bulk_and_single_bytes_by_turns,
        streams::a_thousand_connections_at_once,
        streams::the_server_speaks_first,
        urgent::an_urgent_byte_arrives_in_its_place,
        urgent::urgent_bytes_in_the_middle_of_bulk,
        urgent::a_lone_urgent_byte_is_not_held_back,
        urgent::an_urgent_byte_right_before_the_end,
        endings::half_close_from_client_keeps_the_other_direction,
        endings::half_close_from_server_keeps_the_other_direction,
        endings::an_end_waits_for_all_bytes_before_a_slow_reader,
        endings::the_second_end_waits_for_no_reader_of_the_first,
        endings::both_directions_end_at_once_with_bytes_under_way,
        endings::a_connection_without_bytes_ends_cleanly,
        endings::a_client_gone_before_the_server_accepts,
        endings::a_server_that_closes_at_once,
        endings::a_request_that_ends_while_dialling_is_still_served,
        resets::before_any_byte,
        resets::in_the_middle_of_a_transfer,
        resets::from_a_reader_in_the_middle_of_a_transfer,
        resets::after_its_own_end,
        resets::after_the_end_of_the_other_side,
        resets::while_the_other_side_is_stalled,
        resets::from_the_stalled_side,
        resets::by_a_peer_that_closed_while_bytes_were_on_their_way,
        resets::an_answer_right_before_it_arrives,
        resets::by_a_peer_that_closed_with_bytes_unread,
        killed::while_dialling,
        stalls::both_directions_stalled_at_once,
        dialling::a_refused_client_is_reset_at_once,
        dialling::a_blackholed_client_is_reset_after_the_time_out,
        dialling::a_late_server_gets_everything,
        dialling::a_client_that_leaves_while_dialling_is_noticed,
        dialling::a_server_that_dies_takes_its_connections_along,
        upstreams::the_next_one_is_used_when_the_first_refuses,
        upstreams::the_next_one_is_tried_within_the_time_out,
        upstreams::a_failed_one_is_tried_last_for_a_while,
        upstreams::a_failed_one_is_still_better_than_none,
        upstreams::all_refuse,
    }
}

// What holds while bytes pass through the process: it is paused, killed or measured in the
// middle, or is asked what it has handed on so far.
contract! {
    {
        splice_v4_in_the_process: Setting::over_wires("splice", V4);
        splice_v6_in_the_process: Setting::over_wires("splice", V6);
    }
    {
        urgent::an_urgent_byte_behind_queued_bulk,
        endings::a_connection_lives_until_its_last_byte_has_left,
        killed::while_idle,
        killed::in_the_middle_of_transfers,
        killed::after_one_direction_ended,
        killed::while_a_reader_is_stalled,
        killed::with_an_end_still_behind_the_backlog,
        killed::before_the_server_read_anything,
        stalls::a_stalled_reader_slows_the_writer_and_loses_nothing,
        stalls::fifty_stalled_connections_cost_no_memory,
        stalls::three_hundred_stalled_connections_do_not_starve_a_healthy_one,
    }
}
