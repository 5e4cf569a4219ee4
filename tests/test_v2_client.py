"""Protocol v2 at the client: it takes up an offer, and what a server may then say; tls 0, plain sockets."""

import socket
from contextlib import suppress

import gevent
import pytest
from support import read_exactly, reload, wait_until
from test_client import port_of, server  # noqa: F401  the fixture

from nodepass_gevent.client import CALLS
from nodepass_gevent.config import Address
from nodepass_gevent.errors import NoPlace, PolicyError, ProtocolError, SessionEnded, SessionLost

OFFER = b"?v=2,3&n=AAECAwQFBgcICQoLDA0ODw&later=1"
SESSION = b"0123456789abcdef"


@pytest.fixture
def v2(server):  # noqa: F811
    return Offering(server)


class Offering:
    """A server that offers version 2, up to where the test goes on."""

    def __init__(self, scripted):
        self.server = scripted

    def run(self, tail=b"", **settings):
        self.server.run(**settings)
        self.server.say(b"//off%b#0\n%b" % (OFFER, tail))
        return self

    def line(self):
        line = b""
        while not line.endswith(b"\n"):
            line += read_exactly(self.server.control, 1)
        return line

    def welcome(self, interval_s=5, most=100):
        assert self.line() == b"//?v=2&c=bye,fail,need,udp#hello\n"
        self.server.say(b"//%b?c=need&i=%d&p=%d&x=1#welcome\n" % (SESSION, interval_s, most))
        return self

    def join(self, id):
        """Accept a data connection on the tunnel port, and name it."""
        data = self.server.take(self.server.tunnel)
        assert read_exactly(data, 28) == b"//%b?v=2#data\n" % SESSION
        data.sendall(b"//1234%b#0\n%b" % (OFFER, id))
        return data


def test_data_connections_come_to_the_tunnel_port_and_are_carried(v2):
    v2.run().welcome()
    data = v2.join(b"0123abcd")
    v2.server.say(b"//0123abcd?from=192.0.2.1%3A443#1\n")
    assert v2.server.carries(data)


def test_the_welcome_may_come_byte_by_byte_and_signals_right_behind_it(v2):
    v2.run()
    v2.line()
    for byte in b"//%b?c=need&i=5&p=9#welcome\n" % SESSION:
        v2.server.say(bytes([byte]))
        gevent.sleep(0)
    data = v2.join(b"0123abcd")
    v2.server.say(b"\n//x#later\n//0123abcd#1\n\n")
    assert v2.server.carries(data)
    assert v2.server.client.counters.signals_unknown == 1


def test_a_bye_right_behind_the_welcome_and_a_need_is_answered_and_leaves_no_dial(v2):
    v2.run()
    v2.line()
    v2.server.say(b"//%b?c=bye,need&i=5&p=9#welcome\n//3#need\n//?#bye\n" % SESSION)
    assert v2.line() == b"//#bye\n"
    v2.server.control.close()
    assert isinstance(v2.server.ended(), SessionEnded)
    v2.server.tunnel.settimeout(0.1)
    with suppress(TimeoutError):
        while True:
            data = v2.server.take(v2.server.tunnel)
            with suppress(ConnectionResetError):
                while data.recv(100):
                    pass


def test_pings_are_answered(v2):
    v2.run().welcome()
    v2.server.say(b"\n")
    assert v2.line() == b"\n"


def test_a_server_without_pings_is_declared_dead_after_three_intervals(v2):
    v2.run().welcome(interval_s=1)
    ended = v2.server.ended()
    assert isinstance(ended, SessionLost) and "silent for 3 s" in str(ended)


def test_a_server_without_pings_is_given_as_many_intervals_as_are_set(v2):
    v2.run(dead_intervals=1).welcome(interval_s=1)
    assert "silent for 1 s" in str(v2.server.ended())


def test_the_number_of_intervals_may_change_while_it_is_connected(v2):
    v2.run(dead_intervals=2).welcome(interval_s=1).join(b"0123abcd")
    reload(v2.server.client, dead_intervals=1)
    assert "silent for 1 s" in str(v2.server.ended())


def test_need_makes_it_dial_beyond_its_capacity_at_once(v2):
    v2.run().welcome()
    v2.join(b"00000000")
    v2.server.say(b"//3#need\n")
    for id in (b"00000001", b"00000002", b"00000003"):
        v2.join(id)
    wait_until(lambda: not v2.server.client.counters.signals_malformed)


def test_it_keeps_to_the_most_connections_that_the_server_takes(v2):
    v2.run(min_pool_capacity=50).welcome(most=2)
    v2.join(b"00000001")
    v2.join(b"00000002")
    v2.server.say(b"//9#need\n\n")
    assert v2.line() == b"\n"
    v2.server.tunnel.settimeout(0.1)
    with pytest.raises(TimeoutError):
        v2.server.tunnel.accept()


def test_data_connections_go_to_the_port_that_the_first_line_names(v2):
    v2.server.run()
    v2.server.say(b"//off%b&d=%d#0\n" % (OFFER, port_of(v2.server.data)))
    v2.welcome()
    data = v2.server.take(v2.server.data)
    assert read_exactly(data, 28) == b"//%b?v=2#data\n" % SESSION
    data.sendall(b"//1234%b#0\n0123abcd" % OFFER)
    v2.server.say(b"//0123abcd#1\n")
    assert v2.server.carries(data)


def test_data_connections_come_to_the_address_that_the_control_channel_reached(v2, monkeypatch):
    """A name may have moved meanwhile; the session has not."""
    answers = [socket.getaddrinfo("127.0.0.1", port_of(v2.server.tunnel), type=socket.SOCK_STREAM)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: answers.pop())
    v2.run(tunnel=Address("tunnel.example", port_of(v2.server.tunnel))).welcome()
    data = v2.join(b"0123abcd")
    v2.server.say(b"//0123abcd#1\n")
    assert v2.server.carries(data)


@pytest.mark.parametrize("port", [b"0", b"65536", b"x", b"-1", b""])
def test_a_port_for_data_connections_that_is_none_is_an_error(v2, port):
    v2.server.run()
    v2.server.say(b"//off%b&d=%b#0\n" % (OFFER, port))
    assert isinstance(v2.server.ended(), ProtocolError)


def test_a_busy_process_among_several_is_called_again_for_another_one_to_answer(v2):
    v2.server.run()
    for call in range(CALLS):
        if call:
            v2.server.control = v2.server.take(v2.server.tunnel)
        v2.server.say(b"//off%b&d=%d#0\n" % (OFFER, port_of(v2.server.data)))
        v2.line()
        v2.server.say(b"//?why=busy#bye\n")
    ended = v2.server.ended()
    assert isinstance(ended, NoPlace) and "the next call may reach another one" in str(ended)


def test_a_busy_server_is_refused_by_policy(v2):
    v2.run()
    v2.line()
    v2.server.say(b"//?why=busy#bye\n")
    ended = v2.server.ended()
    assert isinstance(ended, PolicyError) and "the server has another client" in str(ended)


def test_bytes_behind_the_first_line_are_refused(v2):
    v2.run(tail=b"\n")
    ended = v2.server.ended()
    assert isinstance(ended, ProtocolError) and "behind its first line" in str(ended)


@pytest.mark.parametrize(("size", "is_taken"), [(1024, True), (1025, False)])
def test_the_first_line_and_the_welcome_have_at_most_1024_bytes(v2, size, is_taken):
    """The newline counts."""
    first, welcome = b"//off?v=2&n=AAECAwQFBgcICQoLDA0ODw&x=%b#0\n", b"//%b?c=&i=5&p=9&x=%%b#welcome\n" % SESSION
    long_first, long_welcome = (line % (b"x" * (size - len(line % b""))) for line in (first, welcome))
    v2.server.run()
    v2.server.say(long_first)
    if not is_taken:
        assert "a line of more than 1024 bytes" in str(v2.server.ended())
        v2.run()
    v2.line()
    v2.server.say(long_welcome)
    if is_taken:
        assert v2.join(b"0123abcd")
    else:
        assert "a line of more than 1024 bytes" in str(v2.server.ended())


@pytest.mark.parametrize("answer", [b"\n", b"//x#welcome\n", b"//0123456789abcdef?c=need#welcome\n", b"//1#1\n"])
def test_an_answer_that_is_no_welcome_is_refused(v2, answer):
    v2.run()
    v2.line()
    v2.server.say(answer)
    assert isinstance(v2.server.ended(), ProtocolError)


def test_an_offer_without_a_nonce_is_refused(server):  # noqa: F811
    server.run()
    server.say(b"//off?v=2#0\n")
    assert isinstance(server.ended(), ProtocolError)


def test_protocol_1_takes_up_no_offer(server):  # noqa: F811
    server.run(protocol="1")
    server.say(b"//%d%b#0\n" % (port_of(server.data), OFFER))
    data = server.join(b"0123abcd")
    server.say(b"//0123abcd#1\n")
    assert server.carries(data)


def test_protocol_2_refuses_a_server_without_an_offer(server):  # noqa: F811
    server.run(protocol="2").greet()
    ended = server.ended()
    assert isinstance(ended, PolicyError) and "does not speak profile v2" in str(ended)


def test_after_the_welcome_a_line_of_more_than_256_bytes_ends_the_session(v2):
    v2.run().welcome()
    v2.join(b"0123abcd")
    v2.server.say(b"//" + b"a" * 300)
    ended = v2.server.ended()
    assert isinstance(ended, SessionLost) and "a line of more than 256 bytes" in str(ended)
