"""What the tests of several modules share: connected pairs, bounded waits, and a check for leaks.

Every wait here has a bound, and a peer's socket has a timeout, so a test that goes wrong fails and does not hang.
"""

import contextlib
import os
import resource
import socket
import struct
import time
from dataclasses import replace

import gevent
import pytest

from nodepass_gevent.config import Address, Limits
from nodepass_gevent.net import Endpoint
from nodepass_gevent.transport import RawSocket, Stream

BOUND_S = 5.0  # longest wait for anything; a healthy test needs milliseconds
LIMITS = Limits()
LOOPBACK = Address("127.0.0.1", 0)


def wait_until(condition, timeout_s=BOUND_S):
    """Wait for a condition, and fail when it does not come true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        gevent.sleep(0.001)


def reload(role, **changes):
    """Change times and levels of a running role, by the names of Config's and Limits' fields, as a SIGHUP does."""
    limits = {name: changes.pop(name) for name in list(changes) if hasattr(role.config.limits, name)}
    assert role.config.adopt(replace(role.config, limits=replace(role.config.limits, **limits), **changes))


def bounded(timeout_s=BOUND_S):
    """Fail the test when the block takes longer."""
    return gevent.Timeout(timeout_s, AssertionError(f"not done within {timeout_s:g} s"))


def as_stream(sock, peer=("", 0)):
    """Turn a plain socket into the product's Stream."""
    raw = RawSocket(fileno=sock.detach())
    raw.setblocking(False)
    return Stream(raw, peer)


def tcp_pair():
    """Connect over loopback: our end as a Stream, and the peer's as a plain socket. No greenlet switch happens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        raw = RawSocket(socket.AF_INET, socket.SOCK_STREAM)
        raw.connect(listener.getsockname())
        accepted, address = listener.accept()
    peer = socket.socket(fileno=raw.detach())
    peer.settimeout(BOUND_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return as_stream(accepted, address), peer


def endpoint_of(listener):
    """Name a listening or bound socket as ``net.connect`` wants it; a wildcard is reached by loopback."""
    host, port, *rest = listener.getsockname()
    return Endpoint(listener.family, ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, *rest))


class Flooded(Stream):
    """A connection on which more bytes have come whenever it is read; who reads without a pause is told."""

    def __init__(self, stream):
        super().__init__(stream.socket, stream.peer)
        self._first_read = 0.0

    def pull(self, buffer):
        self._first_read = self._first_read or time.monotonic()
        assert time.monotonic() - self._first_read < BOUND_S, "nobody else has had a turn"
        return len(buffer)

    def recv(self, size):
        return bytes(self.pull(memoryview(bytearray(size))))


@contextlib.contextmanager
def silent_endpoint():
    """An address that answers no SYN: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield endpoint_of(listener)


@contextlib.contextmanager
def out_of_descriptors():
    """Lower the limit to what is open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.closerange(lowest_free, lowest_free + 1)  # at once: gevent's own close comes a turn later
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def reset(sock):
    """Close a peer's socket with RST, at once: gevent's own sockets close a turn later."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    RawSocket(fileno=sock.detach()).close()


def read_all(sock):
    """Read a peer's socket to the end of stream; ConnectionResetError when there is a reset instead."""
    read = b""
    while piece := sock.recv(65536):
        read += piece
    return read


def read_exactly(sock, size):
    """Read ``size`` bytes of a peer's socket, or what comes before its end."""
    read = b""
    while len(read) < size and (piece := sock.recv(size - len(read))):
        read += piece
    return read


def is_reset(sock):
    """Wait for the end of a peer's socket, and say whether it is a reset."""
    try:
        read_all(sock)
    except ConnectionResetError:
        return True
    return False


def _links():
    """Give what is open, by descriptor."""
    links = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of this very listing
            links[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return links


def _open_descriptors():
    """Give what is open: pipes are left out (the relay keeps empty ones), and so is the event loop's own."""
    return {fd: link for fd, link in _links().items() if not link.startswith(("pipe:", "anon_inode:", "/proc/"))}


def open_pipes():
    """Count the open ends of pipes."""
    return sum(link.startswith("pipe:") for link in _links().values())


@pytest.fixture
def no_leaks():
    """Afterwards no descriptor and no watcher of the event loop is left that was not there before."""
    loop = gevent.get_hub().loop
    gevent.sleep(0)
    descriptors, watchers = _open_descriptors(), loop.activecnt
    yield
    with contextlib.suppress(AssertionError):
        wait_until(lambda: _open_descriptors() == descriptors and loop.activecnt <= watchers, 1)
    assert _open_descriptors() == descriptors
    assert loop.activecnt <= watchers


@pytest.fixture
def pair(no_leaks):
    """Make connected pairs as ``tcp_pair`` does; whatever is still open at the end is closed."""
    with contextlib.ExitStack() as stack:

        def make():
            stream, peer = tcp_pair()
            stack.callback(stream.close)
            stack.callback(peer.close)
            return stream, peer

        yield make


@pytest.fixture
def spawn(no_leaks):
    """Run functions in greenlets, and end those that are left."""
    greenlets = []

    def start(function, *args):
        greenlets.append(gevent.spawn(function, *args))
        return greenlets[-1]

    yield start
    gevent.killall(greenlets)


def tcp_info(transport):
    stream = getattr(transport, "stream", transport)
    return stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 140)


def segments_out(transport):
    """Read tcpi_segs_out of <linux/tcp.h>."""
    return struct.unpack_from("=I", tcp_info(transport), 136)[0]


def data_segments_in(sock):
    """Read tcpi_data_segs_in of a peer's socket."""
    return struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)[0]


def tcp_state(transport):
    """Name the state of a connection, as RFC 9293 does; <net/tcp_states.h> numbers them."""
    return {1: "ESTABLISHED", 7: "CLOSED", 8: "CLOSE-WAIT"}[tcp_info(transport)[0]]
