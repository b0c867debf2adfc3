//! Urgent bytes keep their place, and the numbers of all behind them.

use proxy_tests::row::Family;

use crate::ground::{Ground, Traffic, both_families};

both_families!(before_the_switch, after_the_switch);

fn before_the_switch(family: Family) {
    let ground = Ground::new(family);
    let (client, server) = ground.pair();
    for (from, to) in [(&client, &server), (&server, &client)] {
        to.take_urgent_inline();
        from.send(b"be");
        from.send_urgent(b'!');
        from.send(b"hind");
        to.receive(b"be!hind");
    }
    ground.await_switched(1);
    for (from, to, seed) in [(&client, &server, 5), (&server, &client, 6)] {
        from.send_stream(seed, 100_000);
        to.receive_stream(seed, 100_000);
    }
}

fn after_the_switch(family: Family) {
    let ground = Ground::new(family);
    let connection = ground.switched();
    let (client, server) = (&connection.client, &connection.server);
    for (from, to) in [(client, server), (server, client)] {
        to.take_urgent_inline();
        from.send(b"be");
        from.send_urgent(b'!');
        from.send(b"hind");
        to.receive(b"be!hind");
    }
    Traffic::new().pass(&connection, 100_000);
}
