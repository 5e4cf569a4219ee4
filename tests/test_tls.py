"""TLSStream: the byte stream over TLS, against itself and against Python's own ssl module."""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gevent
import pages
import pytest
from OpenSSL import SSL
from secure import KeyUpdater, client_context, handshake, key_updater, presented, stream_pair
from support import BOUND_S, bounded, data_segments_in, read_all, read_exactly, reset, segments_out, wait_until

from nodepass_gevent import tls
from nodepass_gevent.deadlines import deadline
from nodepass_gevent.errors import CertificateRefused, ProtocolError
from nodepass_gevent.opening import ALPN_DATA
from nodepass_gevent.tls_context import SELF_SIGNED, ClientPolicy, ServerCertificate
from nodepass_gevent.transport import Stream

LATE = bytes(range(256)) * 1200  # about 300 KiB
RECORD = 16384
HEADER, TAG = 5, 16  # bytes of a record
TICKET = 79  # bytes of a record; OpenSSL sends two behind the handshake


@pytest.fixture(params=["1.2", "1.3"])
def ends(request, no_leaks):
    """A server and a client that have made their handshake."""
    near, far = stream_pair()
    with bounded(30), near, far:
        yield handshake(near, far, request.param)


@pytest.fixture
def raw(pair):
    """A Stream whose peer is a plain socket, which does not speak TLS."""
    with bounded():
        yield pair()


class Dribbling(Stream):
    """A connection on which no read gives more than ``size`` bytes."""

    size = 1

    def pull(self, buffer):
        return super().pull(buffer[: self.size])


def unread(stream):
    """Count the bytes that wait in the kernel."""
    return len(stream.seen(1 << 20))


def read_to_end(transport):
    read = bytearray()
    while piece := transport.recv(65536):
        read += piece
    return bytes(read)


def both_ways(ends):
    return (ends, ends[::-1])


def test_bytes_travel_both_ways(ends):
    for sender, receiver in both_ways(ends):
        sender.sendall(b"hello")
        assert receiver.recv(100) == b"hello"


def test_an_empty_send_sends_nothing_and_breaks_nothing(ends):
    server, client = ends
    server.sendall(b"")
    server.sendall(b"x")
    assert client.recv(10) == b"x"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 1000])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_records_may_be_cut_anywhere(version, size, no_leaks):
    near, far = stream_pair()
    dribbling = Dribbling(near.socket, near.peer)
    dribbling.size = size
    messages = [bytes([number]) * length for number, length in enumerate((1, 2, 3, 500, 1, 1, RECORD, 7))]
    with bounded(30), dribbling, far:
        server, client = handshake(dribbling, far, version)
        for message in messages:
            client.sendall(message)
            assert server.recv_exactly(len(message)) == message
        for message in messages:
            client.sendall(message)
        client.finish()
        assert read_to_end(server) == b"".join(messages)


def test_a_record_can_be_read_in_pieces(ends):
    server, client = ends
    data = bytes(range(250))
    server.sendall(data)
    pieces = [client.recv(7) for _ in range(36)]
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) == 7


def test_what_openssl_holds_is_announced_as_buffered(ends):
    server, client = ends
    server.sendall(b"hello")
    assert client.recv(1) == b"h"
    assert client.buffered
    assert client.recv(100) == b"ello"
    assert client.peek() is None
    assert not client.buffered


@pytest.mark.parametrize("said", [b"hello", b""])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_what_comes_right_behind_the_handshake_is_announced_as_buffered(raw, spawn, version, said):
    stream, peer = raw
    client = SSL.Connection(client_context(version).context, None)
    accepting = spawn(tls.accept, stream, presented().contexts[b""])
    finish_handshake(client, peer)
    client.send(said) if said else client.shutdown()
    peer.sendall(client.bio_read(RECORD))  # with the last flight of the handshake, in TLS 1.3
    server = accepting.get()
    assert server.buffered or version == "1.2"
    assert server.recv(10) == said


def test_what_is_wrong_right_behind_the_handshake_is_told(raw, spawn):
    stream, peer = raw
    client = SSL.Connection(client_context("1.3").context, None)
    accepting = spawn(swallow, tls.accept, stream, presented().contexts[b""])
    finish_handshake(client, peer)
    peer.sendall(client.bio_read(RECORD) + b"\x17\x03\x03\x00\x20" + bytes(32))
    assert "bad record mac" in str(accepting.get())


def finish_handshake(client, peer):
    """Make a client's handshake; in TLS 1.3 its last flight is still to be sent."""
    client.set_connect_state()
    while advance(client):
        peer.sendall(client.bio_read(RECORD))
        client.bio_write(peer.recv(RECORD))


def advance(client):
    """Go on in a client's handshake; whether it needs an answer."""
    try:
        client.do_handshake()
    except SSL.WantReadError:
        return True
    return False


def test_tickets_and_what_is_behind_them_leave_nothing_buffered(no_leaks):
    near, far = stream_pair()
    with bounded(), near, far:
        server, client = handshake(near, far)
        assert not server.buffered
        server.sendall(b"an id")
        wait_until(lambda: unread(far) == 2 * TICKET + HEADER + 5 + 1 + TAG)
        assert client.recv(5) == b"an id"
        assert not client.buffered


def test_little_records_that_come_together_are_read_whole(ends):
    messages = [bytes([number]) * (number * 7 % 300) for number in range(1, 200)]
    for sender, receiver in both_ways(ends):
        for message in messages:
            sender.sendall(message)
        assert receiver.recv_exactly(sum(map(len, messages))) == b"".join(messages)
        assert not receiver.buffered


def test_openssl_never_holds_a_record_and_another_one(no_leaks):
    near, far = stream_pair()
    cut = Dribbling(far.socket, far.peer)
    cut.size = RECORD
    with bounded(), near, cut:
        server, client = handshake(near, cut)
        client._connection = counting = Counting(client._connection)
        server.sendall(LATE[: 3 * RECORD])
        wait_until(lambda: unread(far) > 3 * RECORD)
        with contextlib.suppress(BlockingIOError):
            client.pull(memoryview(bytearray(RECORD)))  # tickets, and the most of a record
        cut.size = 1 << 20
        client.recv_exactly(3 * RECORD)
    assert counting.most <= RECORD + tls.LITTLE + HEADER + 1 + TAG


class Counting:
    """Counts what OpenSSL is given between two reads."""

    def __init__(self, connection):
        self._connection = connection
        self._given = self.most = 0

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def bio_write(self, piece):
        self._given += len(piece)
        self.most = max(self.most, self._given)
        return self._connection.bio_write(piece)

    def recv_into(self, *args):
        self._given = 0
        return self._connection.recv_into(*args)


def test_several_records_are_read_at_once(ends, spawn):
    server, client = ends
    data = bytes(range(256)) * 256
    spawn(server.sendall, data)
    wait_until(lambda: client.peek())
    wait_until(lambda: len(client.recv(3 * RECORD)) > RECORD)


@pytest.mark.parametrize("forward", [True, False])
def test_late_bytes_arrive_after_half_close(ends, spawn, forward):
    early, late = both_ways(ends)[forward]
    early.sendall(b"question")
    early.shutdown_write()
    assert read_to_end(late) == b"question"
    spawn(lambda: (late.sendall(LATE), late.shutdown_write()))
    assert read_to_end(early) == LATE


@pytest.mark.parametrize("size", [0, 1, 16384, 65536, 65537, 3_000_000])
def test_last_bytes_arrive_whole_with_the_end_of_stream_behind_them(ends, spawn, size):
    client, server = ends
    data = os.urandom(size)
    sending = spawn(server.send_last, data)
    with bounded():
        assert client.recv_exactly(size) == data
        assert client.recv(1) == b""
        sending.get()


def test_the_last_bytes_and_the_end_of_stream_share_a_segment(ends):
    client, server = ends
    before = segments_out(server)
    server.send_last(b"all")
    with bounded():
        assert client.recv(100) == b"all"
    assert segments_out(server) == before + 1


def test_what_is_pushed_goes_out_at_once(ends):
    client, server = ends
    before = segments_out(server)
    server.push(b"more may follow")
    assert segments_out(server) == before + 1
    with bounded():
        assert client.recv(100) == b"more may follow"


def test_the_fin_follows_close_notify_at_once(ends):
    server, client = ends
    server.shutdown_write()
    while client.stream.recv(100):  # close_notify, then the end of the TCP stream
        pass


def test_an_end_of_stream_is_told_again_and_again(ends):
    server, client = ends
    server.shutdown_write()
    assert [client.recv(10), client.recv(10), client.peek()] == [b"", b"", False]


def test_ending_twice_does_no_harm(ends):
    server, client = ends
    server.shutdown_write()
    server.shutdown_write()
    client.sendall(b"late")
    assert (client.recv(10), server.recv(10)) == (b"", b"late")


def test_half_closing_loses_nothing_that_has_arrived_and_is_not_read(ends):
    server, client = ends
    server.sendall(b"arrived before")
    wait_until(lambda: client.peek())
    client.shutdown_write()
    server.sendall(b", and after")
    server.shutdown_write()
    assert read_to_end(client) == b"arrived before, and after"


def test_sending_after_the_end_is_an_error(ends):
    server, _ = ends
    server.shutdown_write()
    with pytest.raises(ConnectionError, match="TLS"):
        server.sendall(b"x")


@pytest.mark.parametrize("sent", [b"", b"all but the end"])
def test_a_fin_without_close_notify_is_a_cut_and_no_end(ends, sent):
    for sender, receiver in both_ways(ends):
        sender.sendall(sent)
        sender.stream.finish()
        if sent:
            assert receiver.recv(100) == sent
        with pytest.raises(ConnectionAbortedError, match="cut off"):
            receiver.recv(100)


def test_a_reset_is_an_error(ends):
    server, client = ends
    server.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_a_record_that_was_tampered_with_is_an_error(ends):
    server, client = ends
    server.stream.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(ConnectionAbortedError, match=r"TLS: .*(mac|decryption)"):
        client.recv(100)


def test_peek_tells_bytes_silence_and_end_apart_and_takes_nothing(ends):
    server, client = ends
    assert client.peek() is None
    server.sendall(b"x")
    wait_until(lambda: client.peek() is not None)
    assert client.peek() is True
    assert client.recv(10) == b"x"
    assert client.peek() is None
    server.shutdown_write()
    wait_until(lambda: client.peek() is False)


@pytest.mark.parametrize("end", ["cut", "reset"])
def test_peek_calls_a_broken_connection_ended(ends, end):
    server, client = ends
    if end == "cut":
        server.stream.finish()
    else:
        server.reset()
    wait_until(lambda: client.peek() is False)


def test_ten_mebibytes_pass_to_a_slow_reader_whole(ends, spawn):
    server, client = ends
    data = bytes(range(256)) * 4096 * 10
    spawn(lambda: (server.sendall(data), server.shutdown_write()))
    read = bytearray()
    while piece := client.recv(50_001):
        read += piece
        gevent.sleep(0)
    assert read == data


def test_what_a_stalled_reader_leaves_is_bounded(ends):
    server, _ = ends
    data = bytes(1 << 20)
    taken = 0
    while count := server.push(data):
        assert count <= tls.BATCH
        taken += count
    assert taken < 32 << 20  # what the kernel takes on both sides, and one batch
    assert not server.flush()
    assert [server.push(data) for _ in range(100)] == [0] * 100


def narrow(near, far, size=16384):
    """Let the kernel hold less than a batch between two ends of TLS."""
    near.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    far.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def test_nothing_that_was_sent_needs_a_byte_behind_it(ends, spawn):
    server, client = ends
    narrow(server, client)
    sending = spawn(server.sendall, LATE)
    assert client.recv_exactly(len(LATE)) == LATE
    sending.get()
    assert not server.unsent


def test_an_end_of_stream_that_waits_for_a_slow_reader_holds_up_nobody_else(ends, spawn):
    server, client = ends
    narrow(server, client)
    sent = b""
    while not server.unsent:
        sent += LATE[: server.push(LATE)]
    ending = spawn(server.shutdown_write)
    gevent.idle()
    assert not ending.ready()
    assert read_to_end(client) == sent
    ending.get()


def test_a_dead_path_ends_a_connection_after_the_time_that_was_set(ends):
    server, _ = ends
    server.fail_when_unacknowledged(20)
    assert server.stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


def test_the_round_trip_is_that_of_the_connection_beneath(ends):
    server, _ = ends
    assert server.round_trip_s() == server.stream.round_trip_s() > 0


@pytest.fixture
def updating(no_leaks):
    """A server, its client, and what makes the client's demands for key updates."""
    near, far = stream_pair()
    with bounded(), near, far:
        yield key_updater(near, far)


def test_a_key_update_is_answered_although_nothing_else_is_written(updating, spawn):
    near, far, updates = updating
    far.stream.recv(RECORD)  # tickets
    far.stream.sendall(updates.record() + updates.record())  # OpenSSL answers one when it reads on
    spawn(near.recv, 1)
    far.stream.wait_for_arrival()
    assert far.stream.recv(5) == b"\x17\x03\x03\x00\x16"  # a record that holds a KeyUpdate and no more


def test_a_key_update_that_comes_behind_our_end_breaks_nothing(updating, spawn):
    near, far, updates = updating
    far.stream.recv(RECORD)  # tickets
    near.shutdown_write()
    for _ in range(3):
        far.stream.sendall(updates.record())
        with contextlib.suppress(BlockingIOError):
            near.wait_for_arrival()
            near.pull(memoryview(bytearray(10)))
    assert near.unsent == b""


def test_key_updates_right_behind_the_handshake_hold_nothing_up_that_is_said_behind_them(raw, spawn):
    stream, peer = raw
    made, key_log = client_context("1.3"), []
    made.context.set_keylog_callback(lambda _connection, line: key_log.append(line))
    client = SSL.Connection(made.context, None)
    accepting = spawn(tls.accept, stream, presented().contexts[b""])
    finish_handshake(client, peer)
    updates = KeyUpdater(client, key_log)
    peer.sendall(client.bio_read(RECORD) + b"".join(updates.record() for _ in range(500)))
    server = accepting.get()
    spawn(lambda: (server.sendall(LATE[:RECORD]), server.close()))
    client.bio_write(read_all(peer))
    assert b"".join(iter(partial(receive, client), b"")) == LATE[:RECORD]


def receive(client):
    try:
        return client.recv(RECORD)
    except SSL.WantReadError:
        return b""


@pytest.mark.parametrize("read", ["recv", "peek"])
def test_a_peer_that_demands_key_updates_and_reads_no_answers_is_cut_and_little_is_held(updating, read):
    near, far, updates = updating
    narrow(near, far, 4096)
    most = 0
    with pytest.raises(ConnectionAbortedError, match="key updates"):
        for _ in range(1000):
            far.stream.sendall(b"".join(updates.record() for _ in range(100)))
            near.wait_for_arrival()
            if read == "recv":
                with contextlib.suppress(BlockingIOError):
                    near.pull(memoryview(bytearray(10)))
            elif near.peek() is False:
                raise ConnectionAbortedError("key updates, and peek calls it ended")
            most = max(most, len(near.unsent))
    assert most < 200_000


def test_lingering_loses_nothing_although_the_peer_speaks_on(ends, spawn):
    server, client = ends
    client.sendall(b"never read")
    client.shutdown_write()
    ending = spawn(lambda: (server.sendall(LATE), server.linger(5), server.close()))
    assert read_to_end(client) == LATE
    client.close()
    ending.get()


@pytest.mark.parametrize(
    "greeting",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", bytes(1000), b"\x16\x03\x01\x40\x00" + b"\xff" * 0x4000],
)
def test_what_is_no_hello_is_refused_and_harms_nobody_else(raw, ends, greeting):
    stream, stranger = raw
    stranger.sendall(greeting)
    with pytest.raises(ConnectionAbortedError, match="TLS: "):
        tls.accept(stream, presented().contexts[b""])
    server, client = ends
    server.sendall(b"as before")
    assert client.recv(100) == b"as before"


@pytest.mark.parametrize("greeting", [b"", b"\x16\x03\x01"])
def test_a_peer_that_closes_in_the_handshake_is_an_error(raw, greeting):
    stream, stranger = raw
    stranger.sendall(greeting)
    stranger.close()
    with pytest.raises(ConnectionAbortedError, match="during the TLS handshake"):
        tls.accept(stream, presented().contexts[b""])


def test_a_server_that_does_not_speak_tls_is_an_error(raw):
    stream, stranger = raw
    stranger.sendall(b"deadbeef")
    with pytest.raises(ConnectionAbortedError, match="TLS: "):
        tls.dial(stream, client_context("1.3"))


def test_a_peer_is_told_why_its_certificate_is_refused_whatever_it_has_sent(raw, spawn):
    stream, stranger = raw
    stranger.sendall(b"unread")
    telling = spawn(tls.tell, stream, CertificateRefused("it is bad", b"alert"), BOUND_S)
    assert read_all(stranger) == b"alert"
    assert not telling.ready()  # before the peer has ended there may be more
    stranger.close()
    telling.get()


def test_a_peer_that_has_gone_need_not_be_told_why_its_certificate_is_refused(raw):
    stream, stranger = raw
    reset(stranger)
    tls.tell(stream, CertificateRefused("it is bad", b"alert"), BOUND_S)


def test_a_peer_that_does_not_end_is_not_told_for_ever_why_its_certificate_is_refused(raw):
    with bounded():
        tls.tell(raw[0], CertificateRefused("it is bad", b"alert"), 0.02)


@pytest.mark.parametrize("greeting", [b"", b"\x16\x03\x01\x01\x00"])
def test_a_stalled_handshake_ends_at_the_callers_deadline(raw, greeting):
    stream, stranger = raw
    stranger.sendall(greeting)
    with pytest.raises(TimeoutError, match=r"^handshake: timed out after 0\.02 s$"), deadline(0.02, "handshake"):
        tls.accept(stream, presented().contexts[b""])


def test_a_stalled_handshake_stops_no_other(raw, ends, spawn):
    stalled = spawn(tls.accept, raw[0], presented().contexts[b""])
    near, far = stream_pair()
    with near, far:
        server, client = handshake(near, far)
        server.sendall(b"ready")
        assert client.recv(10) == b"ready"
    assert not stalled.ready()


def test_an_opening_and_the_client_hello_go_out_in_one_segment(raw, spawn):
    stream, stranger = raw
    dialling = spawn(swallow, tls.dial, stream, client_context("1.3"), b"//opening\n")
    assert read_exactly(stranger, 12) == b"//opening\n\x16\x03"
    assert data_segments_in(stranger) == 1
    reset(stranger)
    assert isinstance(dialling.get(), ConnectionError)


def test_the_end_of_a_v2_handshake_goes_out_with_what_the_server_says_next(no_leaks, spawn):
    server, how = of_profile_v2()
    near, far = stream_pair()
    with bounded(), near, far:
        accepting = spawn(tls.accept, near, server, ALPN_DATA)
        client = tls.dial(far, how)
        accepted, before = accepting.get(), data_segments_in(far.socket)
        assert unread(far) == 0
        accepted.sendall(b"an id")
        assert client.recv_exactly(5) == b"an id"
        assert data_segments_in(far.socket) == before + 1


def test_a_v1_client_need_not_wait_for_what_the_server_says_next(no_leaks):
    near, far = stream_pair()
    with bounded(), near, far:
        handshake(near, far, "1.2")  # where the server has the last word


def test_a_client_names_whom_it_calls(no_leaks, spawn):
    near, far = stream_pair()
    with bounded(), near, far:
        accepting = spawn(tls.accept, near, presented().contexts[b""])
        tls.dial(far, replace(client_context("1.3"), sni=b"tunnel.example"))
        assert accepting.get()._connection.get_servername() == b"tunnel.example"


@pytest.mark.parametrize("ours", ["server", "client"])
def test_tls_1_1_is_refused(no_leaks, spawn, ours):
    made = ServerCertificate(None, None)
    server, how, old = made.contexts[b""], ClientPolicy("localhost").context(SELF_SIGNED), SSL.Context(SSL.TLS_METHOD)
    old.set_max_proto_version(SSL.TLS1_1_VERSION)
    old.use_certificate(made.certificate.chain[0])
    old.use_privatekey(made.certificate.key)
    for context in (server, how.context, old):
        context.set_cipher_list(b"DEFAULT@SECLEVEL=0")  # or OpenSSL refuses by itself, whatever it was told here
    near, far = stream_pair()
    with bounded(), near, far:
        accepting = spawn(swallow, tls.accept, near, server if ours == "server" else old)
        dialling = spawn(swallow, tls.dial, far, replace(how, context=old) if ours == "server" else how)
        assert "unsupported protocol" in str(accepting.get())
        assert "alert protocol version" in str(dialling.get())  # the client is told why


def of_profile_v2():
    return ServerCertificate(None, None).contexts[ALPN_DATA], ClientPolicy("localhost").context(SELF_SIGNED, ALPN_DATA)


def held_to_tls_1_2(*contexts):
    for context in contexts:
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)


@pytest.mark.parametrize("ours", ["server", "client"])
def test_profile_v2_is_tls_1_3_alone(no_leaks, spawn, ours):
    server, how = of_profile_v2()
    held_to_tls_1_2(how.context if ours == "server" else server)
    near, far = stream_pair()
    with bounded(), near, far:
        accepting = spawn(swallow, tls.accept, near, server, ALPN_DATA)
        dialling = spawn(swallow, tls.dial, far, how)
        assert "unsupported protocol" in str(accepting.get())
        assert "alert protocol version" in str(dialling.get())


@pytest.mark.parametrize("ours", ["server", "client"])
def test_profile_v2_looks_at_the_version_that_a_handshake_has_come_to(no_leaks, spawn, ours):
    server, how = of_profile_v2()
    held_to_tls_1_2(server, how.context)
    near, far = stream_pair()
    accept, dial = (tls.accept, near, server), (tls.dial, far)
    with bounded(), near, far, pytest.raises(ProtocolError, match=r"not one of profile v2 .*, TLS 1\.3"):
        if ours == "server":
            spawn(swallow, *dial, replace(how, alpn=b""))
            swallow(*accept, ALPN_DATA)
        else:
            spawn(swallow, *accept)
            swallow(*dial, how)


def test_the_file_for_openssl_that_the_page_shows_names_the_key_exchange(tmp_path):
    (page,) = [page for page in pages.PAGES if page.stem == "performance"]
    (block,) = [block.text for block in pages.blocks(page) if "openssl_conf" in block.text]
    (tmp_path / "openssl.cnf").write_text(block)
    code = "from secure import transports; print(transports('1.3')[0]._connection.get_group_name())"

    usual = {name: value for name, value in os.environ.items() if name != "OPENSSL_CONF"}

    def agreed(**environment):
        run = subprocess.run(
            [sys.executable, "-c", f"from gevent import monkey; monkey.patch_all(); {code}"],
            env={**usual, "PYTHONPATH": str(Path(__file__).parent), **environment},
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return run.stdout.strip()

    assert agreed() == "X25519MLKEM768"
    assert agreed(OPENSSL_CONF=str(tmp_path / "openssl.cnf")) == "x25519"


def swallow(function, *arguments):
    """Call a function; give what it raised, which a greenlet would print."""
    try:
        return function(*arguments)
    except OSError as exc:
        return exc
