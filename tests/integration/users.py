"""Users of a tunnel: what they send through its public port and read from it. Every read has a limit of time."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable

WAIT_S = 30.0
Probe = Callable[[tuple[str, int]], bool]


def ends_cleanly(public: tuple[str, int]) -> bool:
    """Send a word and an end of stream through TCP and say whether an end, not an error, answers within 2 s."""
    try:
        talk(public, b"probe", timeout=2.0)
    except OSError:
        return False
    return True


def comes_back(public: tuple[str, int]) -> bool:
    """Send a word of its own through TCP and say whether just that comes back, within 2 s."""
    word = b"probe %d" % random.getrandbits(32)
    try:
        return talk(public, word, timeout=2.0) == word
    except OSError:
        return False


def talk(public: tuple[str, int], data: bytes, timeout: float = WAIT_S) -> bytes:
    """Be a user: send `data` and half-close while reading everything up to the end of stream; return that."""
    with socket.create_connection(public, timeout=timeout) as user:
        writer = threading.Thread(target=_send_and_end, args=(user, data), daemon=True)
        writer.start()
        try:
            return read_to_end(user, timeout)
        finally:
            with contextlib.suppress(OSError):
                user.shutdown(socket.SHUT_RDWR)  # ends a writer that is stuck
            writer.join()


def _send_and_end(user: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        user.sendall(data)
        user.shutdown(socket.SHUT_WR)


def read_to_end(user: socket.socket, timeout: float = WAIT_S) -> bytes:
    """Return everything up to the end of stream; TimeoutError after `timeout` seconds in all."""
    deadline = time.monotonic() + timeout
    received = bytearray()
    while True:
        user.settimeout(max(0.001, deadline - time.monotonic()))
        data = user.recv(65536)
        if not data:
            return bytes(received)
        received += data


def read_exactly(user: socket.socket, count: int, timeout: float = WAIT_S) -> bytes:
    """Return `count` bytes, fewer only at the end of stream."""
    deadline = time.monotonic() + timeout
    received = bytearray()
    while len(received) < count:
        user.settimeout(max(0.001, deadline - time.monotonic()))
        data = user.recv(count - len(received))
        if not data:
            break
        received += data
    return bytes(received)


def payload(count: int, seed: int = 1) -> bytes:
    """Return `count` random bytes, the same ones for the same seed."""
    return random.Random(seed).randbytes(count)


def ask(public: tuple[str, int], datagram: bytes, timeout: float = WAIT_S) -> bytes:
    """Send one datagram from a fresh socket and return the first reply."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.settimeout(timeout)
        user.connect(public)
        user.send(datagram)
        return user.recv(65536)
