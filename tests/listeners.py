"""A listener on loopback, who calls it, and what is accepted there."""

import socket
from contextlib import closing

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


def refuse_to_pause(exc):
    raise AssertionError(f"the accept loop paused: {exc}")


def keepalives(sock):
    return tuple(sock.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL))


def keeps_alive(sock):
    return all(sock.getsockopt(*option) == value for option, value in KEEPALIVE.items())
