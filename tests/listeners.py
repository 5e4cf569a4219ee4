"""A listener on loopback, who calls it, and what is accepted there."""

import socket
from contextlib import closing
from types import SimpleNamespace

import gevent
import pytest
from support import LIMITS, LOOPBACK, endpoint_of

from nodepass_gevent import net

KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): LIMITS.keepalive_count,
}


def dial(listener):
    return socket.create_connection(endpoint_of(listener).sockaddr[:2], 5)


@pytest.fixture
def listener(no_leaks):
    with closing(net.listen(LOOPBACK, LIMITS)) as sock:
        yield sock


@pytest.fixture
def accepted(spawn):
    """What ``handle`` was given; closed at the end."""
    streams = []
    yield streams
    for stream in streams:
        stream.close()


class Deaf:
    """Makes watchers of the event loop, as its ``io``. Of the first one libev stops the first watch, as for want of
    memory in the kernel: it calls once, and nevermore."""

    def __init__(self):
        self._loop, self.watches = gevent.get_hub().loop, 0

    def __call__(self, descriptor, events):
        self._watcher = self._loop.io(descriptor, events)
        return self

    @property
    def active(self):
        return self._watcher.active

    def start(self, callback):
        self.watches += 1
        if self.watches == 1:
            self._loop.run_callback(callback)
        else:
            self._watcher.start(callback)

    def stop(self):
        self._watcher.stop()

    def close(self):
        self._watcher.close()


@pytest.fixture
def deaf(monkeypatch):
    """Let a module make its watchers so."""

    def make(module):
        io = Deaf()
        hub = SimpleNamespace(loop=SimpleNamespace(io=io))
        monkeypatch.setattr(module, "gevent", SimpleNamespace(get_hub=lambda: hub, sleep=gevent.sleep))
        return io

    return make


def refuse_to_pause(exc):
    raise AssertionError(f"the accept loop paused: {exc}")


def keepalives(sock):
    return tuple(sock.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL))


def keeps_alive(sock):
    return all(sock.getsockopt(*option) == value for option, value in KEEPALIVE.items())
