"""Every pairing of our server and client with the reference peers, over TCP and UDP, byte for byte.

The references know the protocol page only. Reference to reference proves them; ours to ours is the product alone.
"""

import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from .harness import Pair, Target, certificates, pair, wait_for_traffic, wait_until
from .targets import answer_after_end, echo, half_close_first, reset, reset_after, same, send_on_connect, silent
from .users import WAIT_S, ask, comes_back, payload, read_exactly, read_to_end, talk

pytestmark = pytest.mark.timeout(120)

LATE = 300_000  # the amount the original was measured with
PAIRINGS = [("ref", "ref"), ("ref", "ours"), ("ours", "ref"), ("ours", "ours")]


def pairings(*modes):
    """Return parameters: server, client, TLS mode."""
    return [
        pytest.param((server, client, tls), id=f"{server}-server-{client}-client-tls{tls}")
        for server, client in PAIRINGS
        for tls in modes
    ]


@pytest.fixture(scope="module", params=pairings(0, 1, 2))
def running(request):
    """One pair of processes for all tests of a pairing; they leave nothing behind in it."""
    with Target() as target, pair(*request.param, target.address, probe=comes_back) as both:
        yield both, target


@pytest.fixture
def tunnel(running):
    """The public address, and the target with its default behaviour and an empty record."""
    both, target = running
    for process in (both.server, both.client):
        assert process.returncode is None, both.logs()
    target.tcp.behaviour, target.udp.behaviour = echo, same
    target.tcp.forget()
    target.udp.forget()
    return both.public, target


def connect(public):
    return socket.create_connection(public, timeout=WAIT_S)


def the_connection(target):
    """Wait for the one connection of this test to reach the target."""
    return wait_until(lambda: target.tcp.seen, WAIT_S, "a connection at the target") and target.tcp.seen[0]


def test_a_mebibyte_goes_there_and_comes_back(tunnel):
    public, target = tunnel
    data = payload(1 << 20)
    assert hashlib.sha256(talk(public, data)).digest() == hashlib.sha256(data).digest()
    assert the_connection(target).digest == hashlib.sha256(data).hexdigest()


def test_late_bytes_arrive_after_the_half_close_of_the_user(tunnel):
    public, target = tunnel
    target.tcp.behaviour = answer_after_end(payload(LATE, 2))
    assert talk(public, b"question") == payload(LATE, 2)


def test_late_bytes_arrive_after_the_half_close_of_the_target(tunnel):
    public, target = tunnel
    target.tcp.behaviour = half_close_first(b"greeting")
    with connect(public) as user:
        assert read_to_end(user) == b"greeting"
        user.settimeout(WAIT_S)
        user.sendall(payload(LATE, 3))
        user.shutdown(socket.SHUT_WR)
        seen = the_connection(target)
        wait_until(lambda: seen.how != "open", WAIT_S, "the end of stream at the target")
    assert (seen.how, seen.digest) == ("end", hashlib.sha256(payload(LATE, 3)).hexdigest())


def test_a_target_that_speaks_first_is_heard(tunnel):
    public, target = tunnel
    target.tcp.behaviour = send_on_connect(b"220 ready\r\n")
    with connect(public) as user:
        assert read_exactly(user, 11) == b"220 ready\r\n"
        user.sendall(b"HELO\r\n")
        assert read_exactly(user, 6) == b"HELO\r\n"


def test_many_small_messages_are_answered_one_by_one(tunnel):
    public, _ = tunnel
    with connect(public) as user:
        for number in range(300):
            message = b"message %d" % number
            user.sendall(message)
            assert read_exactly(user, len(message)) == message


def test_many_short_exchanges_follow_each_other(tunnel):
    public, _ = tunnel
    for number in range(60):
        assert talk(public, b"exchange %d" % number) == b"exchange %d" % number


def test_fifty_users_are_served_at_once(tunnel):
    public, _ = tunnel
    questions = [payload(20_000, seed) for seed in range(50)]
    with ThreadPoolExecutor(50) as users:
        assert list(users.map(lambda question: talk(public, question), questions)) == questions


def test_an_empty_reply_is_a_clean_end(tunnel):
    public, target = tunnel
    target.tcp.behaviour = silent
    assert talk(public, b"question") == b""


def test_users_that_send_nothing_are_clean_ends_at_the_target(tunnel):
    """Their end of stream is on the data connection at once and may overtake the launch, which travels on another."""
    public, target = tunnel
    for _ in range(20):
        assert talk(public, b"") == b""
    wait_until(lambda: len(target.tcp.seen) == 20 and not target.tcp.open, WAIT_S, "20 ends of stream at the target")
    assert {(seen.how, seen.received) for seen in target.tcp.seen} == {("end", 0)}


def test_a_reset_of_the_user_is_a_reset_at_the_target(tunnel):
    public, target = tunnel
    target.tcp.behaviour = silent
    user = connect(public)
    try:
        user.sendall(payload(1000))
        wait_until(lambda: the_connection(target).received == 1000, WAIT_S, "1,000 bytes at the target")
    finally:
        reset(user)
    seen = the_connection(target)
    wait_until(lambda: seen.how != "open", WAIT_S, "an end at the target")
    assert seen.how == "reset"


def test_a_reset_of_the_target_is_a_reset_at_the_user(tunnel):
    public, target = tunnel
    target.tcp.behaviour = reset_after(1000, answer=b"the begin")
    with connect(public) as user:
        user.sendall(payload(1000))
        with pytest.raises(ConnectionResetError):
            read_to_end(user)


@pytest.mark.parametrize("size", [1, 512, 1472, 8000, 8192])
def test_a_datagram_goes_and_its_reply_comes_whole(tunnel, size):
    public, target = tunnel
    assert ask(public, payload(size)) == payload(size)
    assert [datagram for datagram, _ in target.udp.seen] == [payload(size)]


def test_a_hundred_datagrams_of_ten_users_are_answered_each_to_its_own(tunnel):
    public, _ = tunnel

    def use(number):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
            user.settimeout(WAIT_S)
            user.connect(public)
            questions = {b"%d of user %d" % (turn, number) for turn in range(10)}
            for question in questions:
                user.send(question)
            return questions == {user.recv(65536) for _ in questions}

    with ThreadPoolExecutor(10) as users:
        assert all(users.map(use, range(10)))


def test_an_empty_datagram_and_a_silent_target_hold_up_nobody(tunnel):
    public, target = tunnel
    target.udp.behaviour = lambda datagram: [datagram] if datagram.startswith(b"please") else []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        for datagram in (b"", b"nobody answers this", b""):
            user.sendto(datagram, public)
    assert ask(public, b"please answer") == b"please answer"


@pytest.mark.parametrize("end", ["server", "client"])
@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("pairing", pairings(0, 1))
def test_traffic_flows_again_after_a_restart(pairing, end, how):
    with Target() as target, pair(*pairing, target.address, probe=comes_back) as both:
        getattr(getattr(both, end), how)()
        getattr(both, f"start_{end}")()
        wait_for_traffic(both, comes_back)
        assert talk(both.public, payload(10_000)) == payload(10_000)
        assert ask(both.public, b"datagram") == b"datagram"


@pytest.mark.parametrize("pairing", pairings(0, 1))
def test_no_launch_overtakes_its_id(pairing):
    """In a burst larger than the pool, launches follow ids closely; the original's client drops those too early."""
    with Target() as target, pair(*pairing, target.address, probe=comes_back) as both:
        with ThreadPoolExecutor(100) as users:
            questions = [b"question %d" % number for number in range(100)]
            assert list(users.map(lambda question: talk(both.public, question), questions)) == questions
        assert not [line for line in both.client.lines if line.startswith(("MISS", "FLUSH"))]


@pytest.mark.parametrize("tls", [1, 2])
def test_our_server_puts_a_reply_in_many_records_together(tls):
    """Go starts a connection with records of about 1,200 bytes; the reference reads only one, as the original does."""
    options = ["--record-size", "1200"]
    with Target() as target, pair("ours", "ref", tls, target.address, probe=comes_back, client_options=options) as both:
        target.udp.behaviour = lambda datagram: [payload(8192)]
        assert ask(both.public, b"question") == payload(8192)


@pytest.mark.parametrize("tls", [1, 2])
def test_our_client_puts_a_datagram_in_many_records_together(tls):
    options = ["--record-size", "1200"]
    with Target() as target, pair("ref", "ours", tls, target.address, probe=comes_back, server_options=options) as both:
        target.udp.behaviour = lambda datagram: [hashlib.sha256(datagram).digest()]
        assert ask(both.public, payload(8192)) == hashlib.sha256(payload(8192)).digest()


@pytest.mark.parametrize("option", ["--udp-half-close", "--offer=?x=1&n=AAAA"])
@pytest.mark.parametrize("client", ["ref", "ours"])
@pytest.mark.parametrize("tls", [0, 1])
def test_what_newer_servers_add_does_not_disturb(client, tls, option):
    """An end of stream behind the datagram, and a query in the first line."""
    options = [option]
    with Target() as target, pair("ref", client, tls, target.address, probe=comes_back, server_options=options) as both:
        assert ask(both.public, payload(8192)) == payload(8192)
        assert talk(both.public, payload(10_000)) == payload(10_000)


@pytest.mark.parametrize("client", ["ref", "ours"])
@pytest.mark.parametrize("fault", ["another authority", "another name"])
def test_mode_2_refuses_a_certificate_of(fault, client):
    files = certificates("other.example") if fault == "another name" else certificates()
    trusted = certificates("unrelated.example").ca if fault == "another authority" else files.ca
    with Target() as target:
        both = Pair("ref", client, 2, target.address, files=files, env={"SSL_CERT_FILE": trusted})
        try:
            both.start_server()
            both.start_client()
            both.server.wait_for_line("REFUSED")
            assert not comes_back(both.public)
        finally:
            both.stop()
