"""An active man in the middle with self-signed tls=1: with a key it reads and changes nothing, wherever it sits."""

import contextlib
import re
from dataclasses import replace

import gevent
import pytest
from integration.harness import certificates
from keyed import KEY, fate
from mitm import Mitm
from support import LIMITS, as_stream, bounded, read_exactly, wait_until
from test_client import listener, port_of
from tunnel import ELSEWHERE, dial

from nodepass_gevent.client import Client
from nodepass_gevent.config import Address, Config
from nodepass_gevent.errors import KeyMismatch, PolicyError, RefusedByPeer, SessionLost

SECRET = b"the user's own words"
POOL = 2


class Around:
    """A server, a client that reaches it through the man in the middle, and the client's target."""

    def __init__(self, stack, running, **mitm):
        self.stack, self.running = stack, running
        self.mitm = Mitm(stack, running.tunnel, **mitm)
        self.target = stack.enter_context(listener())
        self.client = None

    def start(self, key=KEY, **settings):
        limits = replace(LIMITS, pool_wait_s=0.5)
        addresses = {
            "tunnel": Address("127.0.0.1", self.mitm.port),
            "target": Address("127.0.0.1", port_of(self.target)),
        }
        config = Config(role="client", tunnel_key=key, min_pool_capacity=POOL, limits=limits, **addresses | settings)
        self.client = Client(config)
        self.session = gevent.spawn(self._run)
        self.stack.callback(self.session.kill)
        self.stack.callback(self.client.exchanges.kill)
        return self

    def _run(self):
        try:
            return self.client.run()
        except (OSError, PolicyError, SessionLost) as exc:
            return exc

    def ended(self):
        with bounded():
            return self.session.get()

    def served(self):
        """Say whether a user is served, and who answered."""
        with dial(self.running.public) as user:
            user.sendall(SECRET)
            with self.target.accept()[0] as target:
                assert read_exactly(target, len(SECRET)) == SECRET
                target.sendall(b"answer")
            return read_exactly(user, 6) == b"answer"

    def waits_in_vain(self):
        """Say whether a user is let go without an answer."""
        with dial(self.running.public) as user:
            user.sendall(SECRET)
            with contextlib.suppress(ConnectionError):
                return user.recv(1) == b""
            return True


@pytest.fixture
def around(serve):
    with bounded(40), contextlib.ExitStack() as stack:

        def make(server=None, client=None, **mitm):
            running = serve(**{"tls": 1, "tunnel_key": KEY, "pool_wait_s": 0.5} | (server or {}))
            return Around(stack, running, **mitm).start(**client or {})

        yield make


def test_the_relay_itself_works_where_it_opens_nothing(around):
    pair = around(kinds=())
    assert pair.served() and pair.served()


def test_a_missing_certificate_of_the_client_is_told_from_a_wrong_key(around):
    files = certificates()
    pair = around(server={"crt": files.crt, "key": files.key, "ca": files.ca}, kinds=())
    ended = pair.ended()
    assert isinstance(ended, RefusedByPeer) and "demands a certificate of this side" in str(ended)


def test_without_a_key_the_man_in_the_middle_reads_all_of_it(around):
    """Which the documentation says: self-signed certificates prove nothing."""
    pair = around(server={"tunnel_key": None}, client={"key": None})
    assert pair.served()
    assert SECRET in pair.mitm.read[b"data"] and b"#welcome" in pair.mitm.read[b"hello"]


def test_on_the_control_channel_no_session_comes_to_be(around, said):
    pair = around(kinds=(b"hello",))
    ended = pair.ended()
    assert isinstance(ended, KeyMismatch) and "closed on the proof of the tunnel key" in str(ended)
    assert pair.mitm.opened[b"hello"] == 1
    wait_until(lambda: said.find("refused caller .*: its proof of the tunnel key is wrong"))
    assert pair.running.counters.tags_wrong == 1 and not said.find("connected")
    assert pair.waits_in_vain()
    assert re.fullmatch(rb"//auth\?n=[A-Za-z0-9_-]{22}&m=[A-Za-z0-9_-]{43}&c=[a-z,]*#c\n", pair.mitm.read[b"hello"])


def test_on_data_connections_none_joins_and_nothing_is_read(around, said):
    pair = around(kinds=(b"data",))
    wait_until(lambda: pair.mitm.opened[b"data"] >= 3)
    assert said.find("client .* connected, profile v2")  # whose control channel it cannot open
    assert pair.waits_in_vain()
    assert pair.running.counters.tags_wrong >= 3
    assert SECRET not in pair.mitm.read[b"data"]
    assert len(pair.mitm.read[b"data"]) % 40 == 0  # session and tag, of each connection; no id came back
    assert pair.client.counters.tcp_exchanges == 0


def test_on_both_kinds_of_connection_no_session_comes_to_be(around):
    pair = around()
    assert isinstance(pair.ended(), KeyMismatch)
    assert pair.mitm.read[b"data"] == b"" and SECRET not in pair.mitm.read[b"hello"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda line: line.replace(b"&a=psk1", b""), "the server has no tunnel key"),
        (lambda line: line.replace(b"&a=psk1#1", b"#0"), "the server has no tunnel key"),
        (lambda line: line.replace(b"#1", b"#0"), "the server offers no TLS"),
        (lambda line: b"//1234#0", "the server has no tunnel key"),
        (lambda line: line.replace(b"v=2", b"v=1"), "the server offers no TLS, or no profile v2"),
        (lambda line: line.replace(b"psk1", b"none"), "asks for a tunnel key by method 'none'"),
        (lambda line: line.replace(b"//off", b"//1234"), "closed on the proof of the tunnel key"),
        (lambda line: line.replace(b"v=2", b"v=2,9"), "closed on the proof of the tunnel key"),
        (
            lambda line: line[:-3] + b"&x#1" if False else line.replace(b"#1", b"&x=1#1"),
            "closed on the proof of the tunn",
        ),
        (lambda line: line.replace(b"#1", b"#2"), "certificate of .* refused|closed on the proof of the tunnel key"),
    ],
)
def test_a_changed_first_line_opens_no_session_even_where_tls_is_left_alone(around, change, why):
    ended = around(kinds=(), first=change).ended()
    assert isinstance(ended, PolicyError)
    assert re.search(why, str(ended))


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b"//?", b"//other?"),
        lambda line: line.replace(b"v=2", b"v=2&x=1"),
        lambda line: line.replace(b"v=2", b"v=2&c=need"),
    ],
)
def test_a_changed_hello_opens_no_session(around, said, change):
    ended = around(kinds=(), line=change).ended()
    assert isinstance(ended, (PolicyError, OSError))
    assert not said.find("connected")


def test_a_changed_data_line_joins_nothing(around):
    pair = around(kinds=(), line=lambda line: line.replace(b"#data", b"#hello") if b"#data" in line else line)
    assert pair.waits_in_vain()


def test_recorded_connections_played_back_open_nothing(around, said):
    """Byte for byte what the client sent, TLS and all, while its session lives and after it."""
    pair = around(kinds=())
    assert pair.served()
    wait_until(lambda: len(pair.running.server._clients.current().pool) == POOL)  # what is recorded is whole
    recorded = [b"".join(sent) for sent in pair.mitm.passed]
    assert {sent.partition(b"\n")[0].rpartition(b"#")[2] for sent in recorded} == {b"hello", b"data"}
    for alive in (True, False):
        for sent in recorded:
            with as_stream(dial(pair.running.tunnel, ELSEWHERE)) as thief, bounded():
                thief.read_line(1024)
                thief.sendall(sent)
                assert SECRET not in fate(thief)[1]
        assert pair.served() if alive else pair.waits_in_vain()
        pair.session.kill()
        wait_until(lambda: not pair.running.server._clients.current())
    assert len([line for line in said.lines if "connected, profile" in line]) == 1
