"""The data port: who may join the pool, and that strangers there steal nothing and slow nobody."""

import re
import time

import gevent
import pytest
from support import bounded, is_reset, read_exactly, wait_until
from tunnel import ELSEWHERE, closed, is_served, quiet, read_line

HOLD_S = 0.1


def test_a_stranger_is_held_to_the_deadline_and_then_closed_without_a_byte(serve, connect, said):
    running = serve(tls_handshake_timeout_s=HOLD_S)
    called = time.monotonic()
    stranger = connect(running, "data")
    assert closed(stranger)
    assert time.monotonic() - called >= HOLD_S  # closed at once, an old client would dial again without a pause
    assert running.counters.data_connections_refused == 1
    wait_until(lambda: said.find("DEBUG data connection from 127.0.0.1 refused"))


def test_a_hundred_strangers_steal_no_user(serve, connect):
    running = serve()
    client = connect(running).join(20).known()
    strangers = [connect(running, "data", ELSEWHERE) for _ in range(100)]
    assert all(is_served(connect(running, "user"), client) for _ in range(20))
    wait_until(lambda: running.counters.data_connections_refused == 100)
    assert sum(not quiet(stranger) for stranger in strangers[-64:]) == 0  # as many are held at once, in silence
    assert all(map(closed, strangers[:36]))


def test_strangers_do_not_slow_the_honest_client(serve, connect):
    running = serve()
    for number in range(100):
        connect(running, "data", f"127.0.3.{number + 1}")
    with bounded(1):
        client = connect(running).join(16)
        assert is_served(connect(running, "user"), client)


def test_held_strangers_take_no_place_of_an_honest_clients_data_connections(serve, connect):
    running = serve(min_pool_capacity=4, max_pool_capacity=4)
    for _ in range(10):
        connect(running, "data", ELSEWHERE)
    wait_until(lambda: running.counters.data_connections_refused == 10)
    with bounded(1):
        assert is_served(connect(running, "user"), connect(running).join(2))


def test_a_stranger_with_a_silent_caller_elsewhere_is_not_that_callers_data_connection(serve, connect):
    running = serve()
    honest = connect(running)
    stranger = connect(running, "data", ELSEWHERE)
    wait_until(lambda: running.counters.data_connections_refused)
    assert quiet(honest.control) and quiet(stranger)
    assert is_served(connect(running, "user"), honest.join())


def test_ids_are_eight_lower_case_digits_and_differ(serve, connect):
    client = connect(serve()).join(50)
    assert len(client.idle) == 50
    assert all(re.fullmatch(b"[0-9a-f]{8}", id) for id in client.idle)


def test_no_more_data_connections_are_taken_than_the_limit(serve, connect):
    running = serve(min_pool_capacity=1, max_pool_capacity=3, tls_handshake_timeout_s=HOLD_S)
    client = connect(running).join(3)
    wait_until(lambda: len(client.idle) == 3)
    gevent.sleep(0.02)  # an id is written a moment before its connection is in the pool
    assert closed(connect(running, "data"))
    assert is_served(connect(running, "user"), client)
    assert is_served(connect(running, "user"), client.join())


def test_beside_a_full_pool_no_tls_handshake_of_its_client_is_begun(serve, connect):
    running = serve(tls=1, min_pool_capacity=1, max_pool_capacity=2, tls_handshake_timeout_s=HOLD_S)
    client = connect(running).join(2).known()
    wait_until(lambda: len(client.idle) == 2)
    gevent.sleep(0.02)  # as above
    with pytest.raises(OSError):  # held, and closed: no hello of the server
        client.secure(connect(running, "data"))
    assert is_served(connect(running, "user"), client)


def test_data_connections_whose_id_is_on_its_way_count_in_the_pool(serve, connect):
    running = serve(min_pool_capacity=1, max_pool_capacity=3)
    connect(running).join().known()
    for _ in range(4):
        connect(running, "data")
    wait_until(lambda: running.counters.data_connections_refused == 2)


def test_handshakes_of_a_client_that_go_on_count_in_its_pool(serve, connect):
    running = serve(tls=1, min_pool_capacity=1, max_pool_capacity=2, tls_handshake_timeout_s=30)
    client = connect(running).join().known()
    stalled = [connect(running, "data") for _ in range(2)]
    wait_until(lambda: running.counters.data_connections_refused == 1)
    assert is_served(connect(running, "user"), client)
    assert all(map(quiet, stalled))


def test_a_handshake_that_ends_when_the_pool_is_full_brings_nothing_into_it(serve, connect):
    running = serve(tls=1, min_pool_capacity=1, max_pool_capacity=2)
    client = connect(running)
    first, late = connect(running, "data"), connect(running, "data")
    gevent.idle()  # the server has begun both: whose they are is not known yet
    first = client.secure(first)
    client.idle[read_exactly(first, 8)] = first
    client.join()
    client.idle[b""] = client.secure(late)
    wait_until(lambda: running.counters.data_connections_refused == 1)


@pytest.mark.parametrize("fault", ["speaks", "closes"])
def test_a_data_connection_that_breaks_the_rules_is_never_given_to_a_user(serve, connect, said, fault):
    running = serve()
    client = connect(running).join()
    ((_, broken),) = client.idle.items()
    client.known()
    gevent.sleep(0.02)  # as above
    if fault == "speaks":
        broken.sendall(b"x")
    else:
        broken.close()
    wait_until(lambda: said.find("DEBUG idle data connection .* dropped"))
    user = connect(running, "user")
    client.idle.clear()
    assert is_served(user, client.join())
    broken.close()


def test_over_tls_silence_on_the_data_port_stops_nobody_else(serve, connect):
    running = serve(tls=1)
    client = connect(running)
    silent = [connect(running, "data") for _ in range(20)]
    stalled = [connect(running, "data") for _ in range(20)]
    for stranger in stalled:
        stranger.sendall(b"\x16\x03\x01\x01\x00\x01")
    with bounded(2):
        client.join(3).known()
        assert all(is_served(connect(running, "user"), client) for _ in range(3))
    assert all(map(quiet, silent + stalled))


def test_over_tls_handshakes_of_who_only_calls_take_no_place_of_a_clients(serve, connect):
    running = serve(tls=1, min_pool_capacity=2, max_pool_capacity=4)
    client = connect(running).join(2).known()
    read_line(connect(running, "caller", ELSEWHERE))
    for _ in range(4):
        connect(running, "data", ELSEWHERE)
    with bounded(2):  # they are accepted in their turn
        assert all(is_served(connect(running, "user"), client.join()) for _ in range(4))


def test_over_tls_a_client_that_dials_its_pool_at_once_is_not_taken_for_a_crowd(serve, connect):
    running = serve(tls=1, callers=4, min_pool_capacity=2, max_pool_capacity=16)
    client = connect(running)
    dialled = [connect(running, "data") for _ in range(16)]
    gevent.idle()  # the server has begun them all
    for data in map(client.secure, dialled):
        client.idle[read_exactly(data, 8)] = data
    assert len(client.idle) == 16
    assert is_served(connect(running, "user"), client)


def test_over_tls_no_handshake_is_begun_with_who_has_not_called_the_tunnel_port(serve, connect):
    running = serve(tls=1, tls_handshake_timeout_s=HOLD_S)
    client = connect(running)
    with pytest.raises(OSError):  # held, and closed: no hello of the server
        client.secure(connect(running, "data", ELSEWHERE))


@pytest.mark.parametrize("speech", [b"", b"\x16\x03\x01\x01\x00\x01"])
def test_a_stalled_tls_handshake_ends_at_the_deadline(serve, connect, speech):
    running = serve(tls=1, tls_handshake_timeout_s=HOLD_S)
    connect(running)
    stranger = connect(running, "data")
    stranger.sendall(speech)
    assert is_reset(stranger)
    assert running.counters.data_connections_refused == 1


@pytest.mark.parametrize("speech", [b"GET / HTTP/1.1\r\n\r\n", bytes(500), b"\x16\x03\x01\x40\x00" + bytes(0x4000)])
def test_what_is_no_tls_on_a_tls_data_port_ends_that_connection_alone(serve, connect, speech):
    running = serve(tls=1)
    client = connect(running)
    stranger = connect(running, "data")
    stranger.sendall(speech)
    try:
        while stranger.recv(100):  # an alert may come first
            pass
    except ConnectionResetError:
        pass
    assert is_served(connect(running, "user"), client.join())


def test_over_tls_a_caller_is_no_client_before_its_handshake_is_complete(serve, connect):
    running = serve(tls=1)
    client = connect(running)
    connect(running, "data").sendall(b"\x16\x03\x01\x01\x00\x01")
    gevent.sleep(0.02)  # time for a ping that must not come
    assert quiet(client.control)


def test_strangers_are_forgotten_when_the_server_ends(serve, connect):
    running = serve()
    stranger = connect(running, "data")
    caller = connect(running, "caller")
    read_line(caller)
    wait_until(lambda: running.counters.data_connections_refused or not quiet(stranger))
    running.greenlet.kill()
    assert is_reset(stranger) or closed(stranger)


def test_a_data_connection_that_vanishes_before_its_id_is_acknowledged_harms_nobody(serve, connect):
    running = serve()
    client = connect(running)
    for _ in range(20):
        connect(running, "data").close()
    client.join(2)
    user = connect(running, "user")
    user.sendall(b"question")
    data, _ = client.launched()
    assert read_exactly(data, 8) == b"question"
    data.close()
