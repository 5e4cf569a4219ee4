"""A running server of the product, and who calls it: v1 clients, users and strangers, all on plain sockets."""

import contextlib
import logging
import re
import select
import socket
import ssl
from dataclasses import dataclass, replace

import gevent
import pytest
from support import BOUND_S, LIMITS, LOOPBACK, bounded, read_all, read_exactly, wait_until

from nodepass_gevent.config import Config
from nodepass_gevent.server import Server

HERE, ELSEWHERE = "127.0.0.1", "127.0.0.2"  # where clients and strangers call from
LISTENING = re.compile(r"listening: tunnel .*:(\d+)(?:, data port (\d+))?, public .*:(\d+) \((.*)\), tls (\d)")


class Said(logging.Handler):
    """The log lines of the package while a test runs."""

    def __init__(self):
        super().__init__()
        self.lines = []
        self.tracebacks = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.getMessage()}")
        if record.exc_info:
            self.tracebacks.append(record)

    def find(self, pattern):
        return next((match for match in map(re.compile(pattern).search, self.lines) if match), None)


@pytest.fixture
def said():
    """Give what is logged; no test may leave a traceback there."""
    handler = Said()
    logger = logging.getLogger("nodepass_gevent")
    level = logger.level
    hub = gevent.get_hub()
    hub.print_exception = lambda *raised: handler.tracebacks.append(raised)  # as the service has it
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    del hub.print_exception
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert not handler.tracebacks, handler.tracebacks


@dataclass
class Running:
    """A server, its greenlet and where it listens."""

    server: Server
    greenlet: gevent.Greenlet
    tunnel: int
    data: int
    public: int

    @property
    def counters(self):
        return self.server.counters


@pytest.fixture
def serve(no_leaks, said):
    """Start servers on free ports: settings of Config and of Limits by name; end them with the test.

    One that is started with ``before`` comes in its place, as after a SIGHUP.
    """
    running = []

    def start(before=None, **settings):
        names = {name: settings.pop(name) for name in list(settings) if hasattr(LIMITS, name)}
        settings = {"tunnel": LOOPBACK, "target": LOOPBACK, "network": "tcp"} | settings
        config = Config(role="server", limits=replace(LIMITS, **names), **settings)
        server = Server(config, before and before.server)
        said.lines.clear()
        if before:
            before.greenlet.kill()
            before.server.retire()
        greenlet = gevent.spawn(server.run)
        wait_until(lambda: said.find(LISTENING) or greenlet.ready())
        greenlet.get(block=False) if greenlet.ready() else None
        tunnel, data, public = (int(port or 0) for port in said.find(LISTENING).groups()[:3])
        running.append(Running(server, greenlet, tunnel, data, public))
        return running[-1]

    with bounded(30):
        yield start
    for each in running:
        each.greenlet.kill()
        each.server.exchanges.kill()


def dial(port, source=HERE):
    """Connect from an address of choice."""
    return socket.create_connection(("127.0.0.1", port), BOUND_S, source_address=(source, 0))


def read_line(sock):
    """Read a line of the control channel, without its newline, and no byte behind it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, "the control channel was closed"
        line += byte
    return line[:-1]


def without_offer(first_line):
    """Give a first line as a v1 client sees it: the query means nothing to it."""
    return re.sub(rb"\?v=2&n=[A-Za-z0-9_-]{22}#", b"#", first_line)


def quiet(sock):
    """Say whether nothing has arrived, no end of stream either."""
    return not select.select([sock], [], [], 0)[0]


def closed(sock):
    """Wait for the end of a socket; say whether nothing came before it."""
    try:
        return read_all(sock) == b""
    except ConnectionResetError:
        return True


class V1Client:
    """A client as the original is: silent on the control channel, known by its data connections."""

    def __init__(self, running, source=HERE):
        self.running, self.source = running, source
        self.control = dial(running.tunnel, source)
        self.first_line = read_line(self.control)
        self.idle = {}  # data connections by id

    def join(self, count=1):
        """Bring data connections into the server's pool."""
        for _ in range(count):
            data = self.secure(dial(self.running.data, self.source))
            self.idle[read_exactly(data, 8)] = data
        return self

    def secure(self, data):
        if self.first_line.endswith(b"#0"):
            return data
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(data)

    def known(self):
        """Wait until the server takes this caller for its client."""
        assert read_line(self.control) == b""
        return self

    def launched(self):
        """Wait for a launch; give its data connection and its kind."""
        while not (line := read_line(self.control)):
            pass
        _, id, kind = re.split(b"//|#", line)
        return self.idle.pop(id), kind

    def close(self):
        for sock in (self.control, *self.idle.values()):
            sock.close()


@pytest.fixture
def connect(no_leaks):
    """Make v1 clients, strangers and users; close them with the test."""
    with contextlib.ExitStack() as stack:

        def make(running, kind="client", source=HERE):
            if kind == "client":
                made = V1Client(running, source)
            else:
                made = dial({"caller": running.tunnel, "data": running.data, "user": running.public}[kind], source)
            stack.callback(made.close)
            return made

        yield make


def is_served(user, client):
    """Carry a question and an answer between a user and the client that is launched for it."""
    user.sendall(b"question")
    data, kind = client.launched()
    with data:
        assert (read_exactly(data, 8), kind) == (b"question", b"1")
        data.sendall(b"answer")
        return read_exactly(user, 6) == b"answer"
