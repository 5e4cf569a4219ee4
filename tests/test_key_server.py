"""The tunnel key at the server: who is a client, whose data connection joins, and what everybody else sees."""

import contextlib
import re
import socket
from dataclasses import replace

import gevent
import pytest
from keyed import KEY, NONCE, OTHER_KEY, KeyedClient, fate
from OpenSSL import SSL
from support import as_stream, bounded, is_reset, reset, wait_until
from tunnel import ELSEWHERE, HERE, closed, dial, read_line

from nodepass_gevent import opening, tls
from nodepass_gevent.tls_context import SELF_SIGNED, ClientPolicy
from nodepass_gevent.transport import RawSocket
from nodepass_gevent.tunnel_key import EXPORTER_LABEL, derive, format_key, parse_key

PASSPHRASE = "correct horse battery staple"
RESET = ("reset", b"")  # how every proof that fails ends


@pytest.fixture
def keyed(serve):
    """Start a server with a key: settings of Config and of Limits by name. Penalties only where they are asked for."""
    return lambda **settings: serve(**{"tls": 1, "tunnel_key": KEY, "penalty_after": 0} | settings)


@pytest.fixture
def call(no_leaks):
    made = []

    def call(running, *args, **options):
        made.append(KeyedClient(running.tunnel, *args, **options))
        return made[-1]

    with bounded(40):
        yield call
    for client in made:
        client.close()


def test_who_has_the_key_is_a_client_and_serves_users(keyed, connect, call, said):
    running = keyed()
    client = call(running).authenticate()
    assert said.find(r"INFO client 127\.0\.0\.1:\d+ connected, profile v2")
    assert client.serves(connect(running, "user"))
    assert client.serves(connect(running, "user"), of=[client.join(), client.join()])
    assert running.counters.tags_wrong == 0


def test_the_capabilities_are_agreed_inside_tls(keyed, connect, call):
    running = keyed()
    client = call(running)
    client.control.sendall(client.proof(capabilities=b"need,later"))
    answer = opening.parse_server_proof(client.line())
    assert answer.welcome.capabilities == {b"need"}
    assert (answer.welcome.ping_interval_s, answer.welcome.most_data_connections) == (5, 1024)


def test_a_passphrase_and_a_name_go_into_the_key(keyed, call):
    running = keyed(tunnel_key=parse_key(PASSPHRASE), tunnel_name="a")
    for key, name in ((KEY, "a"), (parse_key(PASSPHRASE), "b"), (parse_key(PASSPHRASE), "")):
        wrong = call(running, key, name=name)
        wrong.control.sendall(wrong.proof())
        assert fate(wrong.control) == RESET
    assert call(running, parse_key(PASSPHRASE), name="a").authenticate()


def test_no_data_port_is_opened_and_no_v1_client_is_served(keyed, connect, said):
    running = keyed(caller_timeout_s=0.1)
    assert said.find("listening: tunnel .*, tls 1, with a tunnel key") and not said.find("data port")
    old = connect(running, "caller")
    assert re.fullmatch(rb"//off\?v=2&n=.*&a=psk1#1", read_line(old))
    assert closed(old)
    wait_until(
        lambda: said.find("WARNING refused caller .*: no proof of the tunnel key within 0.1 s; perhaps it has none")
    )


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("live", [False, True])
def test_a_client_that_sees_the_first_line_and_goes_is_named_as_one_without_a_key(
    keyed, connect, call, said, leave, live
):
    running = keyed()
    if live:
        call(running).authenticate()
    caller = connect(running, "caller")
    read_line(caller)
    if leave == "reset":
        reset(caller)
    else:
        caller.close()
    hint = "perhaps it has no tunnel key, and this server"
    wait_until(lambda: said.find(f"WARNING refused caller .*: .*; {hint}"))


def test_a_client_that_says_hello_without_a_key_is_refused_at_once(keyed, connect, said):
    caller = connect(keyed(), "caller")
    read_line(caller)
    caller.sendall(b"//?v=2&c=need#hello\n")
    assert is_reset(caller)
    assert said.find("WARNING refused caller .*: it has no tunnel key, and this server asks for one")


# Proofs that fail: each sees the same end, and leaves no client and no trace


def wrong_key(client):
    return client.proof(tag=client.handshake(derive(OTHER_KEY)).client_tag)


def other_connection(client):
    return client.proof(tag=client.handshake(exporter=bytes(32)).client_tag)


def other_first_line(client):
    return client.proof(tag=client.handshake(first=client.first.replace(b"#1", b"#2")).client_tag)


def other_hello(client):
    return client.proof(tag=client.handshake(hello=b"//a?v=2#hello").client_tag)


def other_nonce(client):
    return client.proof(tag=client.handshake(nonce=b"o" * 16).client_tag)


def servers_tag(client):
    return client.proof(tag=client.handshake().server_tag(bytes(8)))


WRONG = [wrong_key, other_connection, other_first_line, other_hello, other_nonce, servers_tag]


@pytest.mark.parametrize("make", WRONG)
def test_a_wrong_proof_is_reset_and_counted(keyed, call, said, make):
    running = keyed()
    client = call(running)
    client.control.sendall(make(client))
    assert fate(client.control) == RESET
    wait_until(lambda: running.counters.tags_wrong == 1 and running.counters.callers_refused == 1)
    assert said.find(r"WARNING refused caller 127\.0\.0\.1:\d+: its proof of the tunnel key is wrong")
    assert said.find(running.server.describe().refused.why)
    assert not said.find("connected")
    assert call(running).authenticate()


def test_an_address_is_kept_out_from_its_third_wrong_proof_on(keyed, connect, call, said):
    running = keyed(penalty_after=3)
    for number in range(3):
        client = call(running, source=ELSEWHERE)
        client.control.sendall(wrong_key(client))
        wait_until(lambda number=number: running.counters.tags_wrong == number + 1)
    assert said.find(r"WARNING address 127\.0\.0\.2 is kept out for 5 s: wrong proofs of the tunnel key: 3")
    with pytest.raises(ConnectionResetError):
        connect(running, "caller", ELSEWHERE).recv(1)
    assert running.counters.callers_kept_out == 1
    assert call(running).authenticate()  # from another address


def test_who_proves_the_key_is_forgiven_what_was_wrong_before(keyed, call):
    running = keyed(penalty_after=3)
    for _round in range(2):
        for _wrong in range(2):
            client = call(running)
            client.control.sendall(wrong_key(client))
            assert fate(client.control) == RESET
        client = call(running).authenticate()
        client.close()
        wait_until(lambda: not running.server._clients.current())
    assert running.counters.tags_wrong == 4
    assert running.counters.callers_kept_out == 0


MALFORMED = [
    b"\n",
    b"//auth?n=AAAAAAAAAAAAAAAAAAAAAA#c\n",
    b"//auth?n=AAAAAAAAAAAAAAAAAAAAAA&m=AAAA#c\n",
    b"//?v=2#hello\n",
    b"//auth?" + b"a" * 1100,
    b"\0" * 50 + b"\n",
    b"GET / HTTP/1.1\r\n",
]


@pytest.mark.parametrize("proof", MALFORMED)
def test_what_is_no_proof_looks_from_outside_like_a_wrong_one(keyed, call, proof):
    running = keyed()
    client = call(running)
    client.control.sendall(proof)
    assert fate(client.control) == RESET
    wait_until(lambda: running.counters.callers_refused == 1)
    assert running.counters.tags_wrong == 0
    assert call(running).authenticate()


def test_a_truncated_proof_is_none(keyed, call, said):
    running = keyed()
    client = call(running)
    client.control.sendall(client.proof()[:-9])
    client.control.shutdown_write()
    assert fate(client.control) == RESET
    wait_until(lambda: said.find("refused caller .*: it closed without a proof of the tunnel key"))


def test_a_proof_has_one_try(keyed, call):
    running = keyed()
    client = call(running)
    client.control.sendall(wrong_key(client) + client.proof())
    assert fate(client.control) == RESET
    client = call(running)
    client.control.sendall(wrong_key(client))
    with contextlib.suppress(ConnectionError):
        client.control.sendall(client.proof())
    assert fate(client.control)[1] == b""
    assert not running.server._clients.current()


def test_bytes_behind_a_proof_are_refused(keyed, call):
    client = call(keyed())
    client.control.sendall(client.proof() + b"\n")
    assert fate(client.control) == RESET


@pytest.mark.parametrize(("size", "is_welcome"), [(1024, True), (1025, False)])
def test_a_proof_may_be_as_long_as_a_line_may(keyed, call, size, is_welcome):
    """The newline counts."""
    client = call(keyed())
    proof = client.proof().replace(b"#c", b"&later=#c")
    client.control.sendall(proof.replace(b"later=", b"later=" + b"x" * (size - len(proof))))
    assert client.line().startswith(b"//auth?s=") if is_welcome else fate(client.control) == RESET


def test_a_replayed_proof_opens_nothing(keyed, call):
    """Even on the very next connection, with the very same nonce: FIRST and the exporter are others."""
    running = keyed()
    first = call(running)
    recorded = first.proof()
    first.control.sendall(recorded)
    assert first.line().startswith(b"//auth?s=")
    first.close()
    thief = call(running)
    thief.control.sendall(recorded)
    assert fate(thief.control) == RESET
    assert running.counters.tags_wrong == 1


def test_a_servers_answer_sent_back_as_a_proof_opens_nothing(keyed, call):
    running = keyed()
    client = call(running)
    client.control.sendall(client.proof())
    answer = opening.parse_server_proof(client.line())
    client.close()
    thief = call(running)
    thief.control.sendall(thief.proof(tag=answer.tag))
    assert fate(thief.control) == RESET


def test_the_server_says_nothing_of_the_key_before_the_client_has_proven_it(keyed, connect, call):
    client = call(keyed())
    gevent.sleep(0.05)
    assert client.control.peek() is None


def test_a_proof_that_does_not_come_ends_with_its_deadline(keyed, call, said):
    client = call(keyed(authentication_timeout_s=0.1))
    client.control.sendall(client.proof()[:20])
    assert fate(client.control) == RESET
    assert said.find("refused caller .*: authentication: timed out after 0.1 s")


def test_all_in_all_a_caller_has_one_deadline_since_its_accept(keyed, connect, said):
    """Each step alone is within its own."""
    caller = connect(keyed(caller_timeout_s=0.3), "caller")
    read_line(caller)
    caller.sendall(b"//?v=2#hello\n")
    assert closed(caller)
    assert said.find("refused caller .*: no proof of the tunnel key within 0.3 s; perhaps it has none")


def test_a_client_that_has_proven_itself_has_no_deadline(keyed, connect, call):
    running = keyed(caller_timeout_s=0.3, authentication_timeout_s=0.3)
    client = call(running).authenticate()
    data = client.join()
    gevent.sleep(0.4)
    assert client.serves(connect(running, "user"), of=[data])


# Data connections


def test_a_data_connection_with_its_tag_joins_from_any_address(keyed, connect, call):
    running = keyed()
    client = call(running).authenticate()
    assert client.serves(connect(running, "user"), of=[client.join(source=ELSEWHERE)])


def keys_of(client, key=KEY, session=None, **other):
    return client.handshake(derive(key), **other).session_keys(session or client.session)


DATA_TAGS = {
    "of another key": lambda client, data: client.tag(data, keys_of(client, OTHER_KEY)),
    "of another control channel": lambda client, data: client.tag(data, keys_of(client, exporter=bytes(32))),
    "of another nonce": lambda client, data: client.tag(data, keys_of(client, nonce=b"o" * 16)),
    "of another session": lambda client, data: client.tag(data, keys_of(client, session=b"12345678")),
    "of another connection": lambda client, data: client.session + client.keys.client_tag(bytes(32)),
    "with a bit too many": lambda client, data: client.tag(data)[:-1] + bytes([client.tag(data)[-1] ^ 1]),
    "of the server": lambda client, data: (
        client.session + client.keys.server_tag(client.session, data.exporter(EXPORTER_LABEL, 32), bytes(32))
    ),
    "of the control channel": lambda client, data: client.session + client.handshake().client_tag,
    "behind the name of another session": lambda client, data: b"12345678" + client.tag(data)[8:],
    "that is nothing": lambda client, data: bytes(40),
}


@pytest.mark.parametrize("which", DATA_TAGS)
@pytest.mark.parametrize("source", [HERE, ELSEWHERE])
def test_a_data_connection_with_a_tag_that_is_wrong_is_reset_and_counted(keyed, connect, call, said, which, source):
    running = keyed()
    client = call(running).authenticate()
    data = client.open(source=source)
    data.sendall(DATA_TAGS[which](client, data))
    assert fate(data) == RESET
    assert running.counters.tags_wrong == 1
    assert said.find(f"DEBUG data connection from {source}: its tag is wrong")
    assert client.serves(connect(running, "user"))


def test_a_replayed_tag_of_a_data_connection_joins_nothing(keyed, connect, call):
    running = keyed()
    client = call(running).authenticate()
    data = client.open()
    recorded = client.tag(data)
    data.sendall(recorded)
    honest = client.verified(data)
    thief = client.open(source=ELSEWHERE)
    thief.sendall(recorded)
    assert fate(thief) == RESET
    assert client.serves(connect(running, "user"), of=[honest])


def test_a_servers_tag_sent_back_joins_nothing(keyed, call):
    client = call(keyed()).authenticate()
    honest = client.open()
    honest.sendall(client.tag(honest))
    answer = honest.recv_exactly(40)
    thief = client.open()
    thief.sendall(client.session + answer[8:])
    assert fate(thief) == RESET


@pytest.mark.parametrize("sent", [0, 7, 8, 39])
def test_a_truncated_tag_joins_nothing_and_is_not_counted_as_wrong(keyed, call, sent):
    running = keyed()
    client = call(running).authenticate()
    data = client.open()
    data.sendall(client.tag(data)[:sent]) if sent else None
    data.shutdown_write()
    assert fate(data) == RESET
    assert running.counters.tags_wrong == 0 and running.counters.data_connections_refused == 1


def test_a_tag_may_come_byte_by_byte_within_its_deadline(keyed, call):
    client = call(keyed()).authenticate()
    data = client.open()
    for byte in client.tag(data):
        data.sendall(bytes([byte]))
        gevent.sleep(0)
    assert client.verified(data)


def test_a_tag_that_does_not_come_ends_with_its_deadline(keyed, call, said):
    client = call(keyed(authentication_timeout_s=0.1)).authenticate()
    data = client.open()
    data.sendall(client.tag(data)[:-1])
    assert fate(data) == RESET
    assert said.find("data connection from .*: authentication: timed out after 0.1 s")


def test_nothing_is_answered_to_a_data_connection_before_its_tag(keyed, call):
    client = call(keyed()).authenticate()
    data = client.open()
    gevent.sleep(0.05)
    assert data.peek() is None


def record_sizes(wire):
    """Give the sizes of TLS records as their headers have them."""
    sizes = []
    while len(wire) >= 5:
        sizes.append(int.from_bytes(wire[3:5], "big"))
        wire = wire[5 + sizes[-1] :]
    return sizes


def test_an_id_and_its_tag_come_in_one_write(keyed, call):
    client = call(keyed()).authenticate()
    data = client.open()
    data.sendall(client.tag(data))
    wait_until(lambda: 8 + 32 + 17 in record_sizes(data.stream.seen(65536)))  # RFC 8446, 5.2: 17 bytes more


def test_an_unknown_session_is_refused_before_tls_and_not_counted_as_wrong(keyed, call):
    running = keyed()
    client = call(running).authenticate()
    with pytest.raises(ConnectionError):
        client.open(session=b"12345678")
    assert running.counters.tags_wrong == 0 and running.counters.data_connections_refused == 1


def test_a_right_tag_for_a_session_that_has_ended_joins_nothing(keyed, call, said):
    running = keyed()
    client = call(running).authenticate()
    late = client.open()
    client.control.close()
    wait_until(lambda: said.find("WARNING client .*: control channel lost"))
    with contextlib.suppress(ConnectionError):
        late.sendall(client.tag(late))
    assert fate(late)[0] != "end"
    with pytest.raises(ConnectionError):
        client.open()
    assert running.counters.tags_wrong == 0


def test_the_tag_of_an_earlier_session_does_not_serve_in_a_later_one(keyed, connect, call):
    running = keyed()
    first = call(running).authenticate()
    first.control.close()
    wait_until(lambda: not running.server._clients.current())
    second = call(running).authenticate()
    data = first.open(session=second.session)
    data.sendall(first.tag(data))
    assert fate(data) == RESET
    assert second.serves(connect(running, "user"))


def test_a_stranger_with_tls_and_no_tag_is_never_given_a_user(keyed, connect, call):
    running = keyed()
    client = call(running).authenticate()
    strangers = [client.open(source=ELSEWHERE) for _ in range(20)]
    for _ in range(3):
        assert client.serves(connect(running, "user"))
    assert all(stranger.peek() is None for stranger in strangers)


@pytest.mark.parametrize("late", [False, True])
def test_strangers_who_name_a_live_session_are_bounded_and_keep_the_client_out_of_nothing(keyed, connect, call, late):
    running = keyed(callers=4, tls_handshake_timeout_s=30, caller_timeout_s=30)
    client = call(running).authenticate()
    crowd = []
    for source in ("127.0.0.3", *[ELSEWHERE] * 12):
        raw = RawSocket()  # blocks: the server has not had a turn
        raw.bind((source, 0))
        raw.connect((HERE, running.tunnel))
        stream = as_stream(socket.socket(fileno=raw.detach()))
        client.opened.append(stream)
        if late:
            stream.read_line(1024)
        stream.sendall(b"//%b?v=2#data\n" % client.session.hex().encode())
        if not late:
            stream.read_line(1024)
        crowd.append(stream)
    assert client.serves(connect(running, "user"))
    alone, *crowd = crowd
    for stream in crowd[:9]:
        assert fate(stream) == RESET
    assert len(running.server._reception._callers) == 4 and alone.peek() is None


def test_plain_bytes_on_a_data_connection_are_no_tag(keyed, call):
    client = call(keyed(tls_handshake_timeout_s=0.1)).authenticate()
    stream = as_stream(dial(client.port))
    stream.sendall(b"//%b?v=2#data\n" % client.session.hex().encode() + client.session + bytes(32))
    with bounded(), stream:
        stream.read_line(1024)
        with pytest.raises(ConnectionResetError):
            stream.recv_exactly(100)


# One client at a time: who has the key displaces one that is dead


def test_a_second_client_is_told_busy_while_the_first_one_answers(keyed, connect, call, said):
    running = keyed(drain_linger_s=0.05)
    first = call(running).authenticate()
    second = call(running, source=ELSEWHERE)
    second.control.sendall(second.proof())
    answering = gevent.spawn(lambda: [first.line(), first.line(), first.control.sendall(b"\n")])
    assert second.line() == b"//?why=busy#bye"
    answering.get()
    second.control.shutdown_write()
    wait_until(lambda: said.find(r"WARNING refused second client 127\.0\.0\.2:\d+, while 127\.0\.0\.1:\d+"))
    assert first.serves(connect(running, "user"))


def test_a_second_client_takes_the_place_of_one_that_answers_no_ping(keyed, connect, call, said):
    running = keyed(takeover_timeout_s=0.1)
    first = call(running).authenticate()
    idle = first.join()
    first.control.sendall(b"\n")  # what it answered before does not count
    wait_until(running.server._clients.current().heard.is_set)
    second = call(running, source=ELSEWHERE).authenticate()
    assert said.find(r"WARNING client 127\.0\.0\.1:\d+ answers no ping: another one takes its place")
    assert fate(idle[1])[0] == "reset"
    assert second.serves(connect(running, "user"))


def test_users_of_a_client_whose_place_is_taken_do_not_wait_for_it(keyed, connect, call):
    running = keyed(takeover_timeout_s=0.1)
    first = call(running).authenticate()
    first.join()
    user = connect(running, "user")
    first.line()  # its launch
    call(running, source=ELSEWHERE).authenticate()
    assert fate(user)[0] == "reset"


def test_without_the_key_nobody_displaces_anybody(keyed, connect, call):
    running = keyed(takeover_timeout_s=0.1)
    client = call(running).authenticate()
    stranger = call(running, OTHER_KEY, source=ELSEWHERE)
    stranger.control.sendall(stranger.proof())
    assert fate(stranger.control) == RESET
    assert client.serves(connect(running, "user"))


def test_two_newcomers_at_once_leave_one_client(keyed, call):
    running = keyed(takeover_timeout_s=0.1, drain_linger_s=0.05)
    call(running).authenticate()
    newcomers = [call(running), call(running)]
    for each in newcomers:
        each.control.sendall(each.proof())

    def answer(client):
        line = client.line()
        if line.startswith(b"//auth?s="):  # it is the client now, and answers when the other one makes the server ask
            for _ in range(2):
                client.line()
            client.control.sendall(b"\n")
        return line

    answers = [gevent.spawn(answer, each) for each in newcomers]
    said = sorted(each.get() for each in answers)
    assert said[0] == b"//?why=busy#bye" and said[1].startswith(b"//auth?s=")


# Two keys


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "tunnel.key"

    def write(*keys):
        path.write_text("".join(f"{format_key(key.data)}\n" for key in keys))
        path.chmod(0o600)
        return str(path)

    return write


def test_both_keys_of_a_file_are_accepted(keyed, connect, call, key_file):
    running = keyed(tunnel_key=None, tunnel_key_file=key_file(KEY, OTHER_KEY))
    for key in (KEY, OTHER_KEY):
        client = call(running, key).authenticate()
        assert client.serves(connect(running, "user"))
        client.close()
    third = call(running, parse_key(PASSPHRASE))
    third.control.sendall(third.proof())
    assert fate(third.control) == RESET


def test_a_key_is_changed_without_a_pause(keyed, connect, call, key_file):
    running = keyed(tunnel_key=None, tunnel_key_file=key_file(OTHER_KEY))
    client = call(running, OTHER_KEY).authenticate()
    user = connect(running, "user")
    before = client.join()
    key_file(KEY, OTHER_KEY)
    running.server.reload()
    assert client.serves(user, of=[before])
    assert client.serves(connect(running, "user"))  # the session goes on, and so do its data connections
    key_file(KEY)
    running.server.reload()
    assert client.serves(connect(running, "user"))
    client.close()
    old = call(running, OTHER_KEY)
    old.control.sendall(old.proof())
    assert fate(old.control) == RESET
    assert call(running, KEY).authenticate()


def test_the_nonce_of_the_first_line_is_another_for_each_caller(keyed, call):
    running = keyed()
    assert call(running).first != call(running).first


def test_a_handshake_of_tls_1_2_or_without_alpn_is_refused_before_the_proof(keyed, said, no_leaks):
    running = keyed()
    for change in ("alpn", "version"):
        made = ClientPolicy(HERE).context(SELF_SIGNED, b"" if change == "alpn" else opening.ALPN_CONTROL)
        if change == "version":
            made.context.set_min_proto_version(0)
            made.context.set_max_proto_version(SSL.TLS1_2_VERSION)
        stream = as_stream(dial(running.tunnel))
        with stream, bounded():
            stream.read_line(1024)
            stream.sendall(b"//?v=2#hello\n")
            with pytest.raises(OSError):
                tls.dial(stream, replace(made, alpn=b"")).recv_exactly(1)
    wait_until(lambda: running.counters.callers_refused == 2)


def test_the_client_nonce_must_have_its_length(keyed, call):
    client = call(keyed())
    client.control.sendall(client.proof(nonce=NONCE[:15]))
    assert fate(client.control) == RESET
