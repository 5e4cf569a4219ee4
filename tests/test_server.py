"""Callers of the tunnel port: who is known as the client, and what becomes of everybody else."""

import errno
import secrets
from contextlib import closing
from unittest.mock import Mock

import gevent
import pytest
from support import bounded, data_segments_in, is_reset, read_all, read_exactly, reset, wait_until
from tunnel import ELSEWHERE, HERE, closed, dial, is_served, quiet, read_line, without_offer

from nodepass_gevent import net
from nodepass_gevent.opening import SESSION_LENGTH

SHORT = {"caller_timeout_s": 0.05}


def test_a_caller_is_told_the_first_line_at_once_and_nothing_else(serve, connect):
    running = serve()
    caller = connect(running, "caller")
    assert without_offer(read_line(caller)) == b"//%d#0" % running.data
    assert quiet(caller)


@pytest.mark.parametrize("mode", [0, 1])
def test_a_caller_whose_data_connection_completes_is_the_client(serve, connect, said, mode):
    running = serve(tls=mode)
    client = connect(running).join().known()
    assert without_offer(client.first_line) == b"//%d#%d" % (running.data, mode)
    assert said.find(r"INFO client 127\.0\.0\.1:\d+ connected")
    assert is_served(connect(running, "user"), client)


def test_a_caller_of_whom_no_client_can_be_made_becomes_one_by_its_next_data_connection(serve, connect, monkeypatch):
    draw, failures = secrets.token_bytes, [OSError(errno.EIO, "no random bytes")]

    def draw_or_fail(size):
        if size == SESSION_LENGTH and failures:
            raise failures.pop()
        return draw(size)

    monkeypatch.setattr(secrets, "token_bytes", draw_or_fail)
    running = serve()
    client = connect(running)
    with dial(running.data) as data:
        assert closed(data)
    assert not failures
    assert is_served(connect(running, "user"), client.join().known())


@pytest.mark.parametrize("mode", [0, 1])
def test_an_id_comes_in_one_send(serve, connect, mode):
    """The original's client reads it with one read."""
    running = serve(tls=mode)
    client = connect(running)
    with client.secure(dial(running.data)) as data:
        assert len(read_exactly(data, 8) if mode == 0 else data.recv(100)) == 8
        assert mode or data_segments_in(data) == 1


def test_the_client_is_pinged_at_once_and_then_at_every_interval(serve, connect):
    client = connect(serve(report_interval_s=0.01)).join()
    assert read_exactly(client.control, 5) == b"\n" * 5


def test_a_silent_caller_is_closed_at_the_deadline_and_the_log_says_why(serve, connect, said):
    running = serve(**SHORT)
    caller = connect(running, "caller")
    read_line(caller)
    assert closed(caller)
    wait_until(lambda: said.find(r"WARNING refused caller 127\.0\.0\.1:\d+: silent for 0\.05 s"))
    assert running.counters.callers_refused == 1


@pytest.mark.parametrize("speech", [b"\n", b"x", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05", b"\x1b[2J" * 999])
def test_a_caller_that_sends_a_byte_is_closed(serve, connect, said, speech):
    caller = connect(serve(), "caller")
    caller.sendall(speech)
    with bounded():
        read_line(caller)
        assert closed(caller)
    wait_until(lambda: said.find(r"WARNING refused caller 127\.0\.0\.1:\d+: it s"))
    assert all(line.isprintable() and len(line) < 512 for line in said.lines)


def test_a_caller_that_goes_is_forgotten(serve, connect, said):
    running = serve()
    for leave in (lambda sock: sock.close(), reset):
        caller = connect(running, "caller")
        read_line(caller)
        leave(caller)
        wait_until(lambda: said.find("WARNING refused caller"))
        said.lines.clear()
    assert is_served(connect(running, "user"), connect(running).join())


def test_callers_that_have_gone_are_not_counted_against_those_who_wait(serve, connect, said):
    running = serve(callers=4)
    for number in range(3, 7):
        with connect(running, "caller", f"127.0.0.{number}") as caller:
            read_line(caller)
        wait_until(lambda key=f"127.0.0.{number}": said.find(f"refused caller {key}"))
    waiting = [connect(running, "caller", ELSEWHERE) for _ in range(4)]
    for caller in waiting:
        read_line(caller)
    gevent.sleep(0.01)  # time to be closed
    assert all(map(quiet, waiting))


def test_a_client_that_sends_a_byte_is_closed(serve, connect, said):
    running = serve()
    client = connect(running).join().known()
    client.control.sendall(b"x")
    assert closed(client.control)
    wait_until(lambda: said.find(r"WARNING client .*: control channel lost: it sent bytes"))


def test_a_hundred_silent_callers_do_not_hold_up_an_honest_client(serve, connect):
    running = serve()
    for number in range(100):
        connect(running, "caller", f"127.0.1.{number // 2 + 1}")
    with bounded(1):
        client = connect(running).join()
        assert is_served(connect(running, "user"), client)


def test_a_crowd_from_one_address_does_not_keep_an_honest_client_out(serve, connect):
    running = serve(callers=8)
    honest = connect(running)
    crowd = [connect(running, "caller", ELSEWHERE) for _ in range(40)]
    for caller in crowd:
        read_line(caller)
    assert is_served(connect(running, "user"), honest.join())


def test_one_caller_too_many_closes_the_longest_waiting_of_the_address_with_most(serve, connect, said):
    running = serve(callers=4)
    callers = {}
    for name, source in (("a", HERE), ("b1", ELSEWHERE), ("b2", ELSEWHERE), ("c", "127.0.0.3"), ("new", "127.0.0.4")):
        callers[name] = connect(running, "caller", source)
        read_line(callers[name])
    assert closed(callers.pop("b1"))
    wait_until(lambda: said.find(r"refused caller 127\.0\.0\.2:\d+: too many callers"))
    assert all(quiet(caller) for caller in callers.values())


def test_of_several_silent_callers_of_an_address_the_youngest_is_the_client(serve, connect):
    running = serve(caller_timeout_s=0.2)
    first, second = connect(running), connect(running)
    second.join().known()
    assert quiet(first.control)
    assert is_served(connect(running, "user"), second)
    assert closed(first.control)  # at its deadline
    second.join()
    assert is_served(connect(running, "user"), second)


def test_a_second_client_is_refused_with_a_log_line_and_the_first_goes_on(serve, connect, said):
    running = serve(tls_handshake_timeout_s=0.1)
    first = connect(running).join(2).known()
    second = connect(running, "client", ELSEWHERE)
    assert without_offer(second.first_line) == without_offer(first.first_line)
    stranger = connect(running, "data", ELSEWHERE)
    assert closed(second.control)
    wait_until(lambda: said.find(r"WARNING refused caller 127\.0\.0\.2:\d+: a second client, while 127\.0\.0\.1"))
    assert closed(stranger)
    assert is_served(connect(running, "user"), first)
    assert running.counters.callers_refused == 1


def test_a_caller_from_the_clients_own_address_is_told_off(serve, connect, said):
    running = serve(**SHORT)
    first = connect(running).join().known()
    second = connect(running, "caller")
    assert without_offer(read_line(second)) == b"//off#0"
    assert closed(second)
    wait_until(lambda: said.find(r"WARNING refused caller 127\.0\.0\.1:\d+: a second client"))
    assert is_served(connect(running, "user"), first)


def test_a_caller_that_was_told_off_does_not_become_the_client_later(serve, connect):
    """It has no data port to call; whoever comes there from its address is somebody else."""
    running = serve()
    first = connect(running).join().known()
    told_off = connect(running, "caller")
    assert without_offer(read_line(told_off)) == b"//off#0"
    first.close()
    stranger = connect(running, "data")
    wait_until(lambda: running.counters.data_connections_refused)
    assert quiet(told_off) and quiet(stranger)


def test_callers_that_were_told_off_never_take_the_place_of_others(serve, connect):
    running = serve(callers=3)
    connect(running).join().known()
    honest = connect(running, "caller", ELSEWHERE)
    read_line(honest)
    told_off = [connect(running, "caller") for _ in range(10)]
    assert {without_offer(read_line(caller)) for caller in told_off} == {b"//off#0"}
    assert all(closed(caller) for caller in told_off[:7])
    assert quiet(honest)


def test_a_client_is_no_caller_any_more_and_gives_way_to_none(serve, connect):
    running = serve(callers=2)
    client = connect(running).join().known()
    for number in range(5):
        read_line(connect(running, "caller", f"127.0.0.{10 + number}"))
    assert is_served(connect(running, "user"), client)


def test_a_client_of_which_nobody_can_be_told_for_want_of_memory_is_let_go_and_may_come_again(
    serve, connect, said, monkeypatch
):
    running = serve()
    with monkeypatch.context() as without:
        without.setattr(running.server._clients, "admit", Mock(side_effect=MemoryError))
        client = connect(running)
        assert is_reset(connect(running, "data"))
        assert not read_all(client.control).strip()  # but a ping
    ((_, kind, *_),) = said.tracebacks
    assert kind is MemoryError
    said.tracebacks.clear()
    assert is_served(connect(running, "user"), connect(running).join())


@pytest.mark.parametrize("leave", [lambda client: client.control.close(), lambda client: reset(client.control)])
def test_when_the_client_has_gone_the_next_one_is_taken_at_once(serve, connect, said, leave):
    running = serve()
    first = connect(running).join(3).known()
    leave(first)
    with bounded(1):
        second = connect(running).join()
        assert is_served(connect(running, "user"), second)
    assert all(map(is_reset, first.idle.values()))


def test_a_client_that_calls_again_before_its_end_is_noticed_is_told_the_data_port(serve, connect):
    running = serve()
    for _ in range(10):
        client = connect(running).join().known()
        with closing(net.RawSocket()) as again:
            again.settimeout(5)
            client.control.close()
            again.connect(("127.0.0.1", running.tunnel))  # and the server's greenlets had no turn in between
            wait_until(lambda sock=again: not quiet(sock))
            assert without_offer(again.recv(100)) == b"//%d#0\n" % running.data


def test_a_caller_that_waited_while_another_was_the_client_can_follow_it(serve, connect):
    running = serve()
    first = connect(running).join().known()
    waiting = connect(running, "client", ELSEWHERE)
    first.control.close()
    wait_until(lambda: not quiet(next(iter(first.idle.values()))))
    assert is_served(connect(running, "user"), waiting.join())


def test_clients_come_and_go_and_nothing_is_left(serve, connect):
    running = serve()
    for number in range(20):
        client = connect(running, "client", f"127.0.2.{number + 1}").join()
        assert is_served(connect(running, "user"), client)
        client.close()
    assert running.counters.tcp_exchanges == 20
    assert running.counters.exchanges_failed == 0


def test_a_killed_server_closes_its_callers_and_frees_its_ports(serve, connect):
    running = serve(data_port=None)
    client = connect(running).join().known()
    caller = connect(running, "caller", ELSEWHERE)
    read_line(caller)
    running.greenlet.kill()
    assert closed(client.control) and closed(caller)
    for kind in ("caller", "data", "user"):
        with pytest.raises(ConnectionRefusedError):
            connect(running, kind)
