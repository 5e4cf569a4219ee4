"""Protocol v2 at the server: hello and data on the tunnel port, against a client of plain sockets."""

import contextlib
import re
import socket
import ssl
from dataclasses import replace

import gevent
import pytest
from support import BOUND_S, as_stream, bounded, read_all, read_exactly, reset, wait_until
from tunnel import ELSEWHERE, HERE, closed, dial, is_served, quiet, read_line

from nodepass_gevent import opening, tls
from nodepass_gevent.accepting import ACCEPT_BATCH
from nodepass_gevent.errors import ProtocolError
from nodepass_gevent.tls_context import SELF_SIGNED, ClientPolicy
from nodepass_gevent.transport import RawSocket, Stream

HELLO = b"//?v=2&c=need,later&x=1#hello\n"
LAUNCH = re.compile(rb"//([0-9a-f]{8})(?:\?from=[^#]+)?#([0-9])")
WELCOME = re.compile(rb"//([0-9a-f]{16})\?c=([a-z,]*)&i=(\d+)&p=(\d+)#welcome")


class V2Client:
    """A client that says who it is; tls 0."""

    def __init__(self, running, hello=HELLO, source=HERE):
        self.running, self.source = running, source
        self.control = dial(running.tunnel, source)
        self.first_line = read_line(self.control)
        for number in range(len(hello)):  # every byte on its own
            self.control.sendall(hello[number : number + 1])
            gevent.sleep(0)
        self.welcome = read_line(self.control)
        match = WELCOME.fullmatch(self.welcome)
        self.session = match and match[1]
        self.idle = {}

    def open(self, session=None, source=None):
        """Dial a data connection, and say of which session; give what comes behind the first line."""
        data = dial(self.running.tunnel, source or self.source)
        data.sendall(b"//%b?v=2&later=x#data\n" % (session or self.session))
        read_line(data)
        return data

    def join(self, count=1):
        for _ in range(count):
            data = self.open()
            self.idle[read_exactly(data, 8)] = data
        return self

    def signal(self):
        """Wait for a line that is not a ping."""
        while not (line := read_line(self.control)):
            pass
        return line

    def launched(self):
        while not (launch := re.fullmatch(LAUNCH, self.signal())):
            pass
        return self.idle.pop(launch[1]), launch[2]

    def close(self):
        for sock in (self.control, *self.idle.values()):
            sock.close()


def is_gone(sock):
    """Whether the server has closed a caller that it told the first line."""
    try:
        return read_all(sock).endswith(b"#0\n")
    except ConnectionResetError:
        return True


@pytest.fixture
def call(no_leaks):
    made = []

    def call(*args, **options):
        made.append(V2Client(*args, **options))
        return made[-1]

    with bounded(30):
        yield call
    for client in made:
        client.close()


def test_every_caller_is_offered_version_2(serve, call):
    client = call(serve())
    assert re.fullmatch(rb"//\d+\?v=2&n=[A-Za-z0-9_-]{22}#0", client.first_line)
    assert call(serve()).first_line != client.first_line


def test_a_hello_is_welcomed_with_what_both_can(serve, call):
    welcome = WELCOME.fullmatch(call(serve(max_pool_capacity=77)).welcome)
    assert welcome.groups()[1:] == (b"need", b"5", b"77")


def test_each_session_has_an_id_of_its_own(serve, call):
    running, sessions = serve(), set()
    for _ in range(4):
        client = call(running)
        sessions.add(client.session)
        client.close()
    assert len(sessions - {None}) == 4


def test_users_are_launched_on_data_connections_of_the_tunnel_port(serve, connect, call):
    running = serve()
    client = call(running).join(2)
    assert is_served(connect(running, "user"), client)
    assert is_served(connect(running, "user"), client)


@pytest.mark.parametrize("late", [False, True])
def test_a_data_connection_joins_whether_its_opening_is_there_at_accept_or_later(serve, connect, call, late):
    client = call(serve())
    line = b"//%b?v=2#data\n" % client.session
    data = dial(client.running.tunnel)
    if late:
        read_line(data)  # the server has accepted it, and waits
        data.sendall(line)
    else:
        data.sendall(line)
        read_line(data)
    client.idle[read_exactly(data, 8)] = data
    assert is_served(connect(client.running, "user"), client)


def test_a_data_connection_of_no_session_is_told_the_first_line_and_closed(serve, call):
    client = call(serve())
    with dial(client.running.tunnel) as data:
        data.sendall(b"//%b?v=2#data\n" % (b"0" * 16))
        assert is_gone(data)
    assert client.running.counters.data_connections_refused == 1


def test_bytes_behind_the_data_line_are_no_line(serve, call):
    client = call(serve())
    data = dial(client.running.tunnel)
    data.sendall(b"//%b?v=2#data\n//?v=2#hello\n" % client.session)
    read_line(data)
    read_exactly(data, 8)
    data.close()
    assert quiet(client.control) or not read_line(client.control)


def test_a_user_without_a_data_connection_makes_the_server_ask_for_one(serve, connect, call):
    running = serve()
    client = call(running)
    user = connect(running, "user")
    assert client.signal() == b"//1#need"
    client.join()
    assert is_served(user, client)


def test_a_peer_without_the_capability_is_asked_for_nothing(serve, connect, call):
    running = serve()
    client = call(running, b"//?v=2#hello\n")
    user = connect(running, "user")
    user.sendall(b"question")
    wait_until(lambda: len(running.server.exchanges) == 1)  # the user waits
    client.join()
    launch = LAUNCH.fullmatch(client.signal())
    with client.idle.pop(launch[1]) as data:
        assert read_exactly(data, 8) == b"question"


def datagram_user(running):
    user = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    user.settimeout(BOUND_S)
    user.connect((HERE, running.public))
    return user


def test_a_client_with_udp_has_a_session_for_each_user_address(serve, call):
    running = serve(network="udp")
    client = call(running, b"//?v=2&c=udp#hello\n").join(2)
    with datagram_user(running) as one, datagram_user(running) as two:
        for user, word in ((one, b"1"), (two, b"2")):
            user.send(word)
            user.send(b"")
            data, kind = client.launched()
            assert (kind, read_exactly(data, 5)) == (b"3", b"\0\1" + word + b"\0\0")
            data.sendall(b"\0\0\0\6answer")
            assert (user.recv(100), user.recv(100)) == (b"", b"answer")
            data.close()


def test_a_client_without_udp_is_given_one_datagram_at_a_time(serve, call):
    running = serve(network="udp")
    client = call(running).join(2)
    with datagram_user(running) as user:
        for word in (b"one", b"two"):
            user.send(word)
            data, kind = client.launched()
            assert (kind, read_all(data)) == (b"2", word)
            data.sendall(b"answer")
            data.close()
            assert user.recv(100) == b"answer"


def test_sessions_outlive_the_control_channel_and_the_kind_is_that_of_each_client(serve, call, connect):
    running = serve(network="udp")
    first = call(running, b"//?v=2&c=udp#hello\n").join()
    with datagram_user(running) as old, datagram_user(running) as new:
        old.send(b"1")
        data, _ = first.launched()
        first.close()
        second = call(running).join()  # a client without
        new.send(b"2")
        other, kind = second.launched()
        assert (kind, read_all(other)) == (b"2", b"2")
        old.send(b"3")
        assert read_exactly(data, 6) == b"\0\0011\0\0013"
        data.close()
        other.close()


@pytest.mark.parametrize("session", [b"0123456789abcdef", b"short", b"0123456789ABCDEF"])
def test_a_data_connection_of_no_session_is_closed(serve, call, session):
    client = call(serve())
    data = client.open(session)
    assert closed(data)
    data.close()


def test_a_data_connection_from_another_address_is_closed(serve, connect, call):
    running = serve()
    client = call(running)
    stranger = client.open(source=ELSEWHERE)
    assert closed(stranger)
    stranger.close()
    user = connect(running, "user")
    assert client.signal() == b"//1#need"
    assert is_served(user, client.join())


def test_a_second_client_is_told_busy_and_the_first_goes_on(serve, connect, call, said):
    running = serve(drain_linger_s=0.05)
    first = call(running).join()
    second = call(running, source=ELSEWHERE)
    assert second.welcome == b"//?why=busy#bye"
    assert closed(second.control)
    wait_until(lambda: said.find(r"WARNING refused second client 127\.0\.0\.2:\d+, while 127\.0\.0\.1:\d+"))
    assert is_served(connect(running, "user"), first)


def test_those_who_are_told_busy_and_do_not_go_are_bounded(serve, call, said):
    running = serve(callers=2, drain_linger_s=60)
    call(running)
    refused = [call(running, source=ELSEWHERE) for _ in range(5)]
    assert all(caller.welcome == b"//?why=busy#bye" for caller in refused)
    wait_until(lambda: sum("too many callers" in line for line in said.lines) == 3)


@pytest.mark.parametrize("opening", [b"", b"//"], ids=["silent", "in the middle of their line"])
def test_callers_at_the_clients_address_are_bounded_by_the_room_in_its_pool(serve, call, opening):
    running = serve(callers=2, min_pool_capacity=1, max_pool_capacity=4, opening_timeout_s=60, caller_timeout_s=60)
    client = call(running).join(3)
    wait_until(lambda: len(running.server._clients.current().pool) == 3)
    with contextlib.ExitStack() as stack:
        callers = []
        for _ in range(6):
            callers.append(stack.enter_context(dial(running.tunnel)))
            read_line(callers[-1])
            callers[-1].sendall(opening)
            gevent.idle()
        wait_until(lambda: running.counters.callers_refused == 3)  # one has a place in the pool, two are in the table
        assert sum(map(quiet, callers)) == 3
    client.join()


def test_a_client_is_no_caller_any_more_and_gives_way_to_none(serve, connect, call):
    running = serve(callers=2)
    client = call(running).join()
    for number in range(5):
        read_line(connect(running, "caller", f"127.0.0.{10 + number}"))
    assert is_served(connect(running, "user"), client)


def test_a_client_that_comes_back_is_taken_at_once(serve, connect, call):
    running = serve()
    call(running).join().close()
    again = call(running)
    assert again.session
    assert is_served(connect(running, "user"), again.join())


def test_a_v1_client_beside_a_v2_client_is_refused(serve, connect, call, said):
    running = serve(opening_timeout_s=0.3, caller_timeout_s=0.3, tls_handshake_timeout_s=0.3)
    client = call(running).join()
    old = connect(running, "caller")
    read_line(old)
    stranger = connect(running, "data")
    assert closed(old) and closed(stranger)
    assert said.find(r"refused caller .*: silent for 0\.3 s; perhaps a second client, of v1, while .* is connected")
    assert is_served(connect(running, "user"), client)


def test_where_no_v1_client_is_served_a_silent_caller_is_taken_for_none(serve, call, connect, said):
    running = serve(protocol="2", opening_timeout_s=0.1)
    call(running)
    silent = connect(running, "caller")
    read_line(silent)
    assert closed(silent)
    wait_until(lambda: said.find(r"refused caller .*: silent for 0\.1 s$"))


def test_with_protocol_2_no_data_port_is_opened_and_none_is_named(serve, connect):
    running = serve(protocol="2")
    assert not running.data
    assert re.fullmatch(rb"//off\?v=2&n=[A-Za-z0-9_-]{22}#0", read_line(connect(running, "caller")))


def test_a_client_that_does_not_answer_pings_is_declared_dead(serve, call, said):
    client = call(serve(report_interval_s=0.3))
    assert said.find("connected, profile v2")
    wait_until(lambda: said.find(r"WARNING client .*: control channel lost: silent for 3 s"), 9)
    assert read_all(client.control).strip(b"\n") == b""


def test_a_client_is_given_as_many_intervals_as_are_set(serve, call, said):
    client = call(serve(report_interval_s=0.3, dead_intervals=1))
    wait_until(lambda: said.find(r"WARNING client .*: control channel lost: silent for 1 s"))
    assert read_all(client.control).strip(b"\n") == b""


def test_bytes_that_a_client_does_not_acknowledge_end_its_session_after_the_time_that_is_set(serve, call, monkeypatch):
    hurried = []
    monkeypatch.setattr(Stream, "retransmit_soon", lambda stream: hurried.append(stream))
    running = serve(tcp_user_timeout_s=1.5)
    call(running)
    control = running.server._clients.current().stream
    assert control.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
    assert hurried == [control]


@pytest.mark.parametrize("profile", [1, 2])
def test_data_connections_that_stay_idle_are_held_to_that_time_too(serve, connect, call, monkeypatch, profile):
    monkeypatch.setattr("nodepass_gevent.idle.ROUND_S", 0.01)
    running = serve(tcp_user_timeout_s=1.5)
    (connect(running).join().known() if profile == 1 else call(running).join())
    pool = running.server._clients.current().pool
    wait_until(lambda: len(pool) == 1)
    (data,) = pool._idle.values()
    wait_until(lambda: data.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500)


def test_unknown_signals_are_counted_and_passed_over(serve, connect, call):
    running = serve()
    client = call(running).join()
    client.control.sendall(b"//x#later\n\n//0123abcd#1\n")
    wait_until(lambda: running.counters.signals_unknown == 2)
    assert is_served(connect(running, "user"), client)


def test_behind_the_hello_a_line_of_more_than_256_bytes_ends_the_session(serve, call, said):
    running = serve()
    client = call(running)
    longest = b"//%b#later" % (b"a" * 247)  # 255 bytes, and the newline
    client.control.sendall(longest + b"\n")
    wait_until(lambda: running.counters.signals_unknown == 1)
    client.control.sendall(longest + b"r\n")
    wait_until(lambda: said.find("control channel lost: a line of more than 256 bytes"))


@pytest.mark.parametrize(
    "opening",
    [
        b"//?v=2#nothing\n", b"//?v=3#hello\n", b"//#hello\n", b"//?v=2&v=2#hello\n", b"//a b?v=2#hello\n",
        b"//?v=2#hello\r\n", b"//" + b"a" * 1024, b"///?v=2#hello\n",
        b"//?v=2&x=" + b"x" * (1025 - 16) + b"#hello\n",
    ],
)  # fmt: skip
def test_a_malformed_opening_is_refused(serve, connect, said, opening):
    caller = connect(serve(), "caller")
    caller.sendall(opening)
    read_line(caller)
    assert closed(caller)
    wait_until(lambda: said.find(r"WARNING refused caller 127\.0\.0\.1:\d+: "))


def test_a_hello_may_have_1024_bytes(serve, call):
    """The newline counts; one byte more is a line too long."""
    hello = b"//?v=2&x=%b#hello\n"
    assert call(serve(), hello % (b"x" * (1024 - len(hello % b"")))).session


def test_an_opening_that_does_not_end_is_cut_off_at_its_deadline(serve, connect, said):
    caller = connect(serve(opening_timeout_s=0.05), "caller")
    caller.sendall(b"//?v=2")
    read_line(caller)
    assert closed(caller)
    assert said.find("opening line: timed out after 0.05 s")


@pytest.mark.parametrize("whose", ["v1", "v2", "a stranger's"])
def test_a_data_connection_that_takes_no_answer_for_want_of_memory_costs_nobody_else(
    serve, connect, call, monkeypatch, whose
):
    running = serve()
    client = connect(running).join().known() if whose == "v1" else call(running)
    raw = RawSocket()  # blocks: the server has not had a turn
    raw.connect((HERE, running.data if whose == "v1" else running.tunnel))
    if whose != "v1":
        raw.send(b"//%b?v=2#data\n" % (client.session if whose == "v2" else b"0" * 16))
    push, taken = Stream.push, [0]
    monkeypatch.setattr(Stream, "push", lambda stream, data: taken.pop() if taken else push(stream, data))
    with socket.socket(fileno=raw.detach()) as data:
        assert closed(data)
    assert not taken and running.counters.data_connections_refused == 1
    assert is_served(connect(running, "user"), client.join())


def test_a_client_has_no_more_data_connections_than_the_limit(serve, connect, call):
    running = serve(min_pool_capacity=1, max_pool_capacity=2)
    client = call(running).join(2)
    with client.open() as other:
        assert closed(other)
    assert running.counters.data_connections_refused == 1
    assert is_served(connect(running, "user"), client)
    assert is_served(connect(running, "user"), client.join())


@pytest.mark.parametrize("speech", [b"", b"//0123456789abcdef?v=2#data\n"])
def test_a_caller_that_is_gone_before_it_is_looked_at_harms_nobody(serve, connect, call, speech):
    running = serve()
    for _ in range(3):
        raw = RawSocket()  # blocks: the server has not had a turn
        raw.connect((HERE, running.tunnel))
        raw.send(speech)
        reset(raw)
    assert is_served(connect(running, "user"), call(running).join())
    assert not running.greenlet.ready() and not running.counters.accept_pauses


def test_callers_that_begin_to_speak_and_stall_are_bounded_and_keep_nobody_out(serve, connect, call):
    running = serve(callers=4)
    crowd = [connect(running, "caller", ELSEWHERE) for _ in range(12)]
    for caller in crowd:
        with contextlib.suppress(ConnectionError):  # the first have had to go by now
            caller.sendall(b"//")
    assert is_served(connect(running, "user"), call(running).join())
    wait_until(lambda: running.counters.callers_refused >= 8)
    assert all(map(is_gone, crowd[:8]))


def client_hello(alpn):
    """Give what opens a TLS connection, to be sent by many."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(coming, going).do_handshake()
    return going.read()


def test_a_flood_of_handshakes_is_accepted_no_faster_than_it_is_worked_off(serve):
    running = serve(tls=1, callers=16)
    opening = b"//?v=2#hello\n" + client_hello("nodepass-ctl/2")
    most = 0
    with contextlib.ExitStack() as stack:
        for _ in range(1200):
            stranger = stack.enter_context(contextlib.closing(RawSocket()))  # blocks: the server has not had a turn
            stranger.connect((HERE, running.tunnel))
            stranger.send(opening)
        while running.counters.callers_refused < 1000:
            most = max(most, len(running.server._callers))
            gevent.sleep(0)
    assert most <= 3 * ACCEPT_BATCH


def test_protocol_1_offers_nothing_and_refuses_a_hello(serve, connect):
    running = serve(protocol="1")
    caller = connect(running, "caller")
    assert read_line(caller) == b"//%d#0" % running.data
    caller.sendall(HELLO)
    assert closed(caller)


def secured(running, alpn, opening, expected=None):
    """Call with an opening and the TLS handshake right behind it; give the transport."""
    stream = as_stream(dial(running.tunnel))
    try:
        how = ClientPolicy(HERE).context(SELF_SIGNED, alpn)
        return tls.dial(stream, how if expected is None else replace(how, alpn=expected), opening)
    except BaseException:
        stream.close()
        raise


def test_with_tls_the_control_channel_and_the_data_connections_are_inside_it(serve, connect):
    running = serve(tls=1)
    with bounded(30), secured(running, opening.ALPN_CONTROL, HELLO) as control:
        session = WELCOME.fullmatch(control.recv(200).partition(b"\n")[0])[1]
        with secured(running, opening.ALPN_DATA, b"//%b?v=2#data\n" % session) as data:
            assert re.fullmatch(rb"[0-9a-f]{8}", data.recv_exactly(8))
            user = connect(running, "user")
            user.sendall(b"question")
            assert data.recv_exactly(8) == b"question"


@pytest.mark.parametrize("alpn", [b"", opening.ALPN_DATA, b"http/1.1"])
def test_a_control_channel_with_another_alpn_is_refused(serve, said, alpn):
    running = serve(tls=1)
    with bounded(10), pytest.raises(OSError), secured(running, alpn, HELLO, expected=b"") as control:
        if not control.recv(100):
            raise ConnectionResetError
    wait_until(lambda: said.find(r"WARNING refused caller 127\.0\.0\.1:\d+: "))
    assert not said.find("connected")


@pytest.mark.parametrize("alpn", [b"", opening.ALPN_CONTROL])
def test_a_data_connection_with_another_alpn_is_refused_and_harms_nobody(serve, connect, said, alpn):
    running = serve(tls=1)
    with bounded(30), secured(running, opening.ALPN_CONTROL, HELLO) as control:
        line = b"//%b?v=2#data\n" % WELCOME.fullmatch(control.recv(200).partition(b"\n")[0])[1]
        with pytest.raises(OSError), secured(running, alpn, line, expected=b"") as data:
            if not data.recv(8):
                raise ConnectionResetError
        wait_until(lambda: running.counters.data_connections_refused == 1)
        with secured(running, opening.ALPN_DATA, line) as data:
            assert re.fullmatch(rb"[0-9a-f]{8}", data.recv_exactly(8))


def test_a_handshake_without_the_profile_is_refused_by_the_client(serve, connect):
    """The v1 data port completes a TLS handshake, for whoever has called the tunnel port, but without ALPN."""
    running = serve(tls=1)
    connect(running, "caller")
    stream = as_stream(dial(running.data))
    with bounded(10), stream, pytest.raises(ProtocolError, match="not one of profile v2"):
        tls.dial(stream, replace(ClientPolicy(HERE).context(SELF_SIGNED), alpn=opening.ALPN_DATA))
