import contextlib
import time

import gevent
import pytest
from gevent.event import Event
from support import bounded

from nodepass_gevent.deadlines import shared_deadline

SHORT_S = 0.05


def test_a_shared_deadline_ends_every_wait_and_none_too_soon(spawn):
    def wait():
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"^answer: timed out after 0.05 s$"), shared_deadline(SHORT_S, "answer"):
            Event().wait()
        return time.monotonic() - began

    for _ in range(2):  # nobody waits in between
        waits = [spawn(wait)]
        for _ in range(3):
            gevent.sleep(SHORT_S / 4)
            waits.append(spawn(wait))
        with bounded():
            assert all(each.get() >= SHORT_S for each in waits)
        gevent.sleep(SHORT_S)


def test_what_has_arrived_counts_although_the_process_was_held_up_past_a_shared_deadline(pair, spawn):
    stream, peer = pair()

    def read():
        with shared_deadline(SHORT_S, "answer"):
            return stream.recv(10)

    for _ in range(10):
        reading = spawn(read)
        gevent.sleep(0)
        peer.sendall(b"here")
        end = time.monotonic() + 2 * SHORT_S
        while time.monotonic() < end:  # nobody else has a turn
            pass
        with bounded():
            assert reading.get() == b"here"


@pytest.mark.parametrize("how", ["in time", "by an error", "killed"])
def test_who_has_left_a_shared_deadline_is_not_disturbed_later(spawn, how):
    def work(go_on):
        with contextlib.suppress(KeyError, gevent.GreenletExit), shared_deadline(0.2, "answer"):
            go_on.wait()
            if how == "by an error":
                raise KeyError
        gevent.sleep(0.4)
        return "undisturbed"

    go_on = Event()
    working = [spawn(work, go_on) for _ in range(3)]
    gevent.sleep(0)
    if how == "killed":
        gevent.killall(working, block=False)
    else:
        go_on.set()
    with bounded():
        assert [each.get() for each in working] == ["undisturbed"] * 3
