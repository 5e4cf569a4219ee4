"""Users in numbers, and what the processes that serve them use up."""

import contextlib
import socket
import threading
import time

from .harness import pair, wait_until
from .users import comes_back, read_exactly, talk

SETTLE_S = 20.0  # to close what the last users left
STEADY_S = 0.5  # a pool that is refilled on demand is full again long before
PAUSE_S = 0.01  # between two tries of a user who was refused

# A pool of one size: descriptors can be compared one by one.
FIXED_POOL = {"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8"}


@contextlib.contextmanager
def tunnel(address, tls=0, probe=comes_back, **env):
    """Give a `Pair` of ours to `address`; whatever happens in it, it is no error of ours."""
    with pair("ours", "ours", tls, address, probe=probe, env=env) as both:
        yield both
        lines = both.server.lines + both.client.lines
        assert not [line for line in lines if "  ERROR  " in line or "Traceback" in line], both.logs()


def visit(public, word=b"question", timeout=10.0):
    """Be a short TCP user of an echo; AssertionError when the answer is not the same."""
    with socket.create_connection(public, timeout=timeout) as user:
        user.sendall(word)
        assert read_exactly(user, len(word), timeout) == word


def ask(user, word=b"question"):
    """Send one datagram through a connected socket and wait for its echo."""
    user.send(word)
    assert user.recv(65536) == word


@contextlib.contextmanager
def datagram_user(public, timeout=10.0):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.settimeout(timeout)
        user.connect(public)
        yield user


def steady_fds(process):
    """Return the number of descriptors once it has not changed for STEADY_S."""
    count, since = process.fds(), time.monotonic()

    def unchanged():
        nonlocal count, since
        if process.fds() != count:
            count, since = process.fds(), time.monotonic()
        return time.monotonic() - since > STEADY_S

    wait_until(unchanged, SETTLE_S, f"descriptors of {process.name} stay the same")
    return count


def wait_for_fds(process, count):
    """Wait until the process has just `count` descriptors again."""
    try:
        wait_until(lambda: process.fds() == count, SETTLE_S, f"{process.name} is back at {count} descriptors")
    except AssertionError as exc:
        raise AssertionError(f"{exc}, it has {process.fds()}\n{process.tail()}") from None


class Crowd:
    """Users who come one after the other in `size` rows, and come again after a failure, until the block ends."""

    def __init__(self, public, size=4, timeout=5.0):
        self.served = 0
        self.errors = []
        self._public, self._timeout = public, timeout
        self._stopped = threading.Event()
        self._rows = [threading.Thread(target=self._come_and_go, daemon=True) for _ in range(size)]

    def _come_and_go(self):
        word = b"w" * 20_000
        while not self._stopped.is_set():
            try:
                if talk(self._public, word, timeout=self._timeout) == word:
                    self.served += 1
            except OSError as exc:
                self.errors.append(exc)
                self._stopped.wait(PAUSE_S)

    def __enter__(self):
        for row in self._rows:
            row.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        for row in self._rows:
            row.join()
