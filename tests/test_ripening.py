import fcntl
import sys
import time

import gevent
import pytest
from support import is_reset, read_exactly, reset, wait_until

from nodepass_gevent.config import Limits
from nodepass_gevent.pool import AcceptingPool
from nodepass_gevent.ripening import Ripening
from nodepass_gevent.transport import Stream

ID, OTHER = b"0000000a", b"0000000b"
RIPEN_S = 0.005  # what the original's client needs, as it was measured, whatever the product says
SIOCOUTQNSD = 0x894B  # <linux/sockios.h>


class Waiting:
    """Connections that ripen for a pool, and which of them did not reach it, and why."""

    def __init__(self, id_timeout_s):
        self.refused = []
        self.pool = AcceptingPool(capacity=4)
        self.limits = Limits(id_timeout_s=id_timeout_s)
        self.ripening = Ripening(self.limits, lambda stream, why: self.refused.append((stream, why)))

    def add(self, stream, id=ID):
        self.ripening.add(id, stream, stream, self.pool)


@pytest.fixture
def waiting(pair):
    made = []

    def make(id_timeout_s=5.0):
        made.append(Waiting(id_timeout_s))
        return made[-1]

    yield make
    for side in made:
        side.ripening.close()
        side.pool.close()


@pytest.fixture
def stuffed(pair):
    """Make a connection with bytes that its peer has no room for, and give both ends and how many bytes it sent."""

    def make():
        stream, peer = pair()
        sent = looks = 0

        def full():
            """What is acknowledged later, as the kernel likes to, is not enough: all that is left waits for room."""
            nonlocal sent, looks
            while taken := stream.push(bytes(65536)):
                sent, looks = sent + taken, 0
            unsent = int.from_bytes(fcntl.ioctl(stream.fileno(), SIOCOUTQNSD, b"\0" * 4), sys.byteorder)
            looks = looks + 1 if 0 < unsent == stream.unacknowledged() else 0
            return looks > 10

        wait_until(full)
        return stream, peer, sent

    return make


def test_a_connection_reaches_its_pool_a_moment_after_its_id_is_acknowledged(waiting, pair):
    side, (stream, _peer) = waiting(), pair()
    begun = time.monotonic()
    side.add(stream)
    assert len(side.pool) == 0 and len(side.ripening) == 1
    wait_until(lambda: ID in side.pool)
    assert time.monotonic() - begun >= RIPEN_S
    assert len(side.ripening) == 0 and not side.refused


def test_each_connection_ripens_for_as_long_as_it_must(waiting, pair):
    side, first, second = waiting(), pair()[0], pair()[0]
    side.add(first)
    gevent.sleep(RIPEN_S / 2)
    begun = time.monotonic()
    side.add(second, OTHER)
    wait_until(lambda: OTHER in side.pool)
    assert time.monotonic() - begun >= RIPEN_S


def test_an_id_that_is_not_acknowledged_keeps_its_connection_waiting_and_no_other(waiting, pair, stuffed, monkeypatch):
    side, (stream, peer, sent), other = waiting(), stuffed(), pair()[0]
    acknowledged, unacknowledged = [], Stream.unacknowledged

    def noted(asked):
        left = unacknowledged(asked)
        if asked is stream and not left:
            acknowledged.append(time.monotonic())
        return left

    monkeypatch.setattr(Stream, "unacknowledged", noted)
    side.add(stream)
    side.add(other, OTHER)
    wait_until(lambda: OTHER in side.pool)
    assert ID not in side.pool and len(side.ripening) == 1
    read_exactly(peer, sent)
    wait_until(lambda: ID in side.pool)
    assert time.monotonic() - acknowledged[0] >= RIPEN_S / 2  # its clock was read a moment before
    assert not side.refused


def test_an_id_that_is_never_acknowledged_ends_its_connection(waiting, stuffed):
    side, (stream, peer, _sent) = waiting(), stuffed()
    object.__setattr__(side.limits, "id_timeout_s", 0.02)  # as a SIGHUP does
    side.add(stream)
    wait_until(lambda: side.refused)
    assert side.refused == [(stream, "acknowledgement of the id: timed out after 0.02 s")]
    assert is_reset(peer) and len(side.ripening) == 0


def test_a_connection_that_is_reset_before_its_id_is_acknowledged_is_refused(waiting, stuffed):
    side, (stream, peer, _sent) = waiting(), stuffed()
    side.add(stream)
    reset(peer)
    wait_until(lambda: side.refused)
    assert len(side.ripening) == 0 and len(side.pool) == 0


def test_a_connection_whose_session_ends_meanwhile_is_refused(waiting, pair):
    side, (stream, peer) = waiting(), pair()
    side.add(stream)
    side.pool.close()
    wait_until(lambda: side.refused)
    assert side.refused == [(stream, "the session has ended")] and is_reset(peer)


def test_a_connection_for_which_there_is_no_memory_is_refused_and_keeps_no_other_back(waiting, pair, monkeypatch):
    def add(pool, id, transport):
        monkeypatch.undo()
        raise MemoryError

    side, (stream, peer), (other, _) = waiting(), pair(), pair()
    monkeypatch.setattr(AcceptingPool, "add", add)
    side.add(stream)
    side.add(other, OTHER)
    wait_until(lambda: OTHER in side.pool)
    assert is_reset(peer) and side.refused == [(stream, "MemoryError")]
    assert len(side.ripening) == 0


def test_closing_resets_what_is_not_ripe_and_more_may_come_later(waiting, pair):
    side, (stream, peer), later = waiting(), pair(), pair()[0]
    side.add(stream)
    side.ripening.close()
    assert is_reset(peer) and len(side.ripening) == 0 and not side.refused
    side.add(later, OTHER)
    wait_until(lambda: OTHER in side.pool)
    assert ID not in side.pool
