"""What the tests of ingress and egress share: both of them with fake peers, settings, counters, and the exchanges."""

import socket
from dataclasses import replace
from typing import NamedTuple

import pytest
from support import LIMITS, LOOPBACK, wait_until

from nodepass_gevent.config import Address, Config
from nodepass_gevent.crew import Crew
from nodepass_gevent.egress import Egress
from nodepass_gevent.errors import NoDataConnection
from nodepass_gevent.ingress import Ingress
from nodepass_gevent.metrics import NUMBERS, Counters
from nodepass_gevent.pool import AcceptingPool
from nodepass_gevent.relay import Exchange
from nodepass_gevent.transport import Stream
from nodepass_gevent.wire import Launch

LIMIT = 2000  # bytes of a datagram here
SHORT_S = 0.02  # a deadline that a test waits out
ID = b"0a1b2c3d"


def configure(**settings):
    """Make a Config; what is a limit goes there."""
    limits = {name: settings.pop(name) for name in list(settings) if hasattr(LIMITS, name)}
    return Config(
        **{
            "role": "server",
            "tunnel": LOOPBACK,
            "target": Address("127.0.0.1", 1),
            "semaphore_limit": 4,
            "max_pool_capacity": 16,
            "udp_data_buf_size": LIMIT,
            "limits": replace(LIMITS, **limits),
            **settings,
        }
    )


class Outcome(NamedTuple):
    up: int
    down: int
    error: Exception | None


def run_exchange(a, b, half_closed_timeout_s, idle_timeout_s=0):
    """Copy between two transports, as an exchange does; give the bytes each way, and the error that has ended it."""
    exchange = Exchange(a, b, half_closed_timeout_s, lambda: None)
    error = exchange.run(idle_timeout_s)
    return Outcome(*exchange.traffic()[:2], error)


def happened(counters):
    """Give what was counted at its end, without the zeros."""
    return {name: getattr(counters, name) for name in NUMBERS if getattr(counters, name)}


class Side:
    """What an Ingress and an Egress have in common: the exchanges, the settings, the counters."""

    def __init__(self, settings):
        self.config = configure(**settings)
        self.counters = Counters()
        self.exchanges = Crew(self.config.semaphore_limit)

    def end(self):
        """End what is left."""
        self.exchanges.kill()

    @property
    def counted(self):
        """Wait until all exchanges have ended, and give what was counted."""
        wait_until(lambda: len(self.exchanges) == 0)
        return happened(self.counters)


class FakeLink:
    """A client whose launches are a list."""

    def __init__(self, *capabilities):
        self.capabilities = frozenset(capabilities)
        self.pool = AcceptingPool(capacity=16)
        self.launched = {}
        self.sent = []

    def send(self, line):
        self.sent.append(line)
        return True


class _Reply:
    """Answers a user into a list."""

    sender = ("192.0.2.1", 443)

    def __init__(self, answers):
        self._answers = answers

    def __call__(self, datagram):
        self._answers.append(datagram)


class Entrance:
    """Counts who is inside, whatever the address."""

    def __init__(self):
        self.inside = 0
        self.full = False

    def enter(self, host):
        self.inside += not self.full
        return not self.full

    def leave(self, host):
        self.inside -= 1


class IngressSide(Side):
    def __init__(self, pair, settings, *capabilities):
        super().__init__(settings)
        self.pair = pair
        self.link = FakeLink(*capabilities)
        self.answers = []
        self.entrance = Entrance()
        self.ingress = Ingress(self._find_link, self.exchanges, self.config, self.counters, self.entrance)

    def _find_link(self, timeout_s):
        if self.link is None:
            raise NoDataConnection("no client is connected")
        return self.link

    def end(self):
        super().end()
        if self.link:
            self.link.pool.close()

    def add_data(self, id=ID):
        """Make a data connection ready, and give the client's end of it."""
        data, client = self.pair()
        self.link.pool.add(id, data)
        return client

    def user(self):
        """Let a user come, and give the user's end."""
        accepted, user = self.pair()
        self.ingress.user(accepted)
        return user

    def datagram(self, datagram):
        self.ingress.udp.datagram(datagram, _Reply(self.answers))


@pytest.fixture
def ingress(pair):
    made = []

    def make(*capabilities, **settings):
        made.append(IngressSide(pair, settings, *capabilities))
        return made[-1]

    yield make
    for side in made:
        side.end()
        assert side.entrance.inside == 0


class Full(Stream):
    """A connection whose peer reads nothing: the kernel takes no more."""

    def push_more(self, data):
        return 0


class FakePool:
    """Data connections by id; one that is not there is not waited for."""

    def __init__(self):
        self.ready = {}
        self.kept = []
        self.on_missing = lambda: None

    def keep(self, id):
        self.kept.append(id)

    def drop(self, id):
        if id in self.kept:
            self.kept.remove(id)
        if id in self.ready:
            self.ready.pop(id).reset()

    def take(self, id, timeout_s):
        if id not in self.ready:
            self.on_missing()
            raise NoDataConnection(f"no data connection {id.decode()}")
        return self.ready.pop(id)


class EgressSide(Side):
    def __init__(self, pair, settings):
        super().__init__({"role": "client", "tunnel": Address("127.0.0.1", 1), **settings})
        self._pair = pair
        self.pool = FakePool()
        self.egress = Egress(self.pool, self.exchanges, self.config, self.counters)

    def prepare(self, id=ID):
        """Make a data connection ready, and give the server's end of it."""
        self.pool.ready[id], server = self._pair()
        return server

    def launch(self, kind, id=ID):
        """Launch a data connection, and give the server's end of it."""
        server = self.prepare(id)
        self.egress.launch(Launch(id, kind))
        return server


@pytest.fixture
def egress(pair):
    made = []

    def make(**settings):
        made.append(EgressSide(pair, settings))
        return made[-1]

    yield make
    for side in made:
        side.end()


@pytest.fixture
def udp_target(no_leaks):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def address_of(sock):
    return Address(*sock.getsockname())
