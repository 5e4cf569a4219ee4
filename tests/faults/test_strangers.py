"""A thousand strangers on each port, in every state of the handshake, while users are served."""

import contextlib
import datetime
import resource
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from integration.harness import wait_until
from integration.users import payload, talk

from .harness import Tunnel, descriptors, standing
from .peers import RawClient, dial
from .test_callers import HELLO_CUT

STRANGERS = 1000
SOURCES = [f"127.0.{number // 250}.{number % 250 + 2}" for number in range(STRANGERS)]  # none is the client's
STATES = {
    "silent": b"",
    "half a line": b"//a-cl",
    "a hello, then silence": b"//?v=2&c=need#hello\n",
    "a hello and half a ClientHello": b"//?v=2&c=need#hello\n" + HELLO_CUT,
    "a data connection of some session": b"//0123456789abcdef?v=2#data\n",
    "that and half a ClientHello": b"//0123456789abcdef?v=2#data\n" + HELLO_CUT,
    "half a ClientHello": HELLO_CUT,
    "something else": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.fixture(autouse=True, scope="module")
def enough_descriptors():
    """Strangers need one each here, and their users two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4 * STRANGERS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * STRANGERS), hard))


class Strangers:
    """Callers of a port, each in one of the states; whoever is closed calls again, until the block ends."""

    def __init__(self, port, said, sources=SOURCES, count=STRANGERS):
        self.calls = 0
        self.stolen = []  # what was said to them but a first line, an answer to a hello, or an alert
        self._port, self._said, self._sources = port, said, sources
        self._open = {}
        self._stopped = threading.Event()
        for number in range(count):
            self._call(number)
        self._row = threading.Thread(target=self._call_again, daemon=True)

    def _call(self, number):
        with contextlib.suppress(OSError):
            sock = dial(self._port, self._sources[number % len(self._sources)], timeout=10)
            sock.setblocking(False)
            self._open[number] = sock
            self.calls += 1
            sock.send(self._said[number % len(self._said)])

    def _call_again(self):
        """Read what strangers are told; the closed ones call again, some at a time."""
        while not self._stopped.wait(0.05):
            poll = select.poll()
            by_fd = {sock.fileno(): number for number, sock in self._open.items()}
            for fd in by_fd:
                poll.register(fd, select.POLLIN)
            closed = []
            for fd, _ in poll.poll(0):
                number = by_fd[fd]
                try:
                    told = self._open[number].recv(65536)
                except OSError:
                    told = b""
                if not told:
                    closed.append(number)
                elif not told.startswith((b"//", b"\x15", b"\x16")):
                    self.stolen.append(told)
            for number in closed[:50]:
                self._open.pop(number).close()
                self._call(number)

    def __enter__(self):
        self._row.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._row.join()
        for sock in self._open.values():
            sock.close()


PORTS = {
    "tunnel port": ("", lambda tunnel: tunnel.tunnel_port),
    "tunnel port of a v1 pair": ("protocol=1", lambda tunnel: tunnel.tunnel_port),
    "data port": ("protocol=1", lambda tunnel: int(tunnel.server.wait_for_line(r"data port (\d+)")[1])),
}


@pytest.mark.fault(3, 29)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
@pytest.mark.parametrize("port", PORTS)
def test_of_a_hundred_users_a_thousand_strangers_steal_none_and_slow_none(tunnels, target, tls, port):
    query, number_of = PORTS[port]
    crowd_before(tunnels(tls, query), number_of)
    with standing(tunnels(tls, query)) as tunnel:
        before = descriptors(tunnel.server)
        target.tcp.forget()
        with Strangers(number_of(tunnel), list(STATES.values())) as strangers:
            with ThreadPoolExecutor(10) as users:
                words = [b"user %d " % number + payload(2000, number) for number in range(100)]
                answers = list(users.map(lambda word: talk(tunnel.public, word, timeout=20), words))
            held = descriptors(tunnel.server) - before
            assert answers == words
            assert not strangers.stolen
        assert strangers.calls >= STRANGERS
        assert held <= 2 * 64 + 2 * 100 + 16, "strangers held, and the last users"


@pytest.mark.fault(3, 29)
@pytest.mark.parametrize("sources", [SOURCES, ["127.0.0.1"]], ids=["other addresses", "the client's address"])
def test_of_a_hundred_users_strangers_steal_none_where_there_is_a_key(target, sources):
    with Tunnel(target.address, 1, env={"TUNNEL_KEY": "a passphrase for this test"}) as keyed:
        crowd_before(keyed, lambda tunnel: tunnel.tunnel_port)
        with standing(keyed) as tunnel:
            with Strangers(tunnel.tunnel_port, list(STATES.values()), sources) as strangers:
                with ThreadPoolExecutor(10) as users:
                    words = [b"user %d " % number + payload(2000, number) for number in range(100)]
                    assert list(users.map(lambda word: talk(tunnel.public, word, timeout=20), words)) == words
                assert not strangers.stolen
            assert strangers.calls >= STRANGERS


def crowd_before(tunnel, number_of):
    """Let the process grow to the size that a crowd needs: what is measured is whether the next one adds to it."""
    kib = tunnel.server.rss_kib()
    with Strangers(number_of(tunnel), list(STATES.values())):
        assert tunnel.served(20) == 20
    assert tunnel.server.rss_kib() - kib < 32 * 1024
    wait_until(lambda: descriptors(tunnel.server) < 64, 15, "the first crowd is forgotten")


@pytest.mark.fault(1, 3)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_an_honest_client_is_in_within_a_second_past_a_thousand_strangers(tls):
    tunnel = Tunnel("127.0.0.1:1", tls)
    try:
        tunnel.start_server()
        tunnel.server.wait_for_line("listening: ")
        before = descriptors(tunnel.server)
        # Without a key and without TLS, a whole hello is all that makes a client.
        said = [words for words in STATES.values() if tls or b"#hello\n" not in words]
        with Strangers(tunnel.tunnel_port, said):
            taken_s = []
            for _ in range(5):
                began = time.monotonic()
                with contextlib.closing(first_welcomed(tunnel.tunnel_port, tls)) as client:
                    client.join()
                    taken_s.append(time.monotonic() - began)
            assert sorted(taken_s)[2] < 1, taken_s
        wait_until(lambda: descriptors(tunnel.server) == before, 15, "all strangers are forgotten")
    finally:
        tunnel.stop()


@pytest.mark.fault(1, 3)
def test_an_honest_client_with_the_key_is_in_within_a_second_past_a_thousand_strangers(target):
    tunnel = Tunnel(target.address, 1, env={"TUNNEL_KEY": "a passphrase for this test"})
    try:
        tunnel.start_server()
        tunnel.server.wait_for_line("listening: ")
        with Strangers(tunnel.tunnel_port, list(STATES.values())):
            taken_s = []
            for _ in range(5):
                tunnel.start_client()
                called, connected = map(tunnel.client.wait_for_line, ("calling ", "connected to "))
                taken_s.append(moment(connected) - moment(called))
                tunnel.client.kill()
            assert sorted(taken_s)[2] < 1, taken_s
    finally:
        tunnel.stop()


def moment(line):
    """Give the time of a line of the log."""
    return datetime.datetime.fromisoformat(line.string[:23]).timestamp()


def first_welcomed(port, tls):
    """Call until welcomed, as a client does: the one before may not be missed yet."""
    while True:
        with contextlib.suppress(OSError):
            client = RawClient(port, tls)
            if client.welcome.endswith(b"#welcome\n"):
                return client
            client.close()
        time.sleep(0.05)


@pytest.mark.fault(3)
def test_a_thousand_strangers_on_the_public_port_are_users_and_are_served(tunnels):
    """Whoever reaches the public port is a user; the limit of exchanges holds, and nothing is left."""
    with standing(tunnels(1), grown_kib=64 * 1024) as tunnel, contextlib.ExitStack() as stack:
        for source in SOURCES:
            stack.enter_context(dial(tunnel.public_port, source))
        tunnel.recovers(20)
        assert tunnel.served(100) == 100
