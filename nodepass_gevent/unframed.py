"""A datagram, or its answer, that travels alone over a data connection: nothing frames it (protocol v1)."""

import gevent

from .deadlines import shared_deadline
from .frames import MAX_DATAGRAM
from .transport import Transport

ONE_SEGMENT = 512  # bytes; what is shorter fits IPv4's least TCP segment and was not cut in pieces
END_OF_DATAGRAM_S = 0.02  # silence that ends a longer one, where the sender does not half-close

_buffer = memoryview(bytearray(MAX_DATAGRAM))  # nobody switches while it is in use


def read_to_end(data: Transport, limit: int) -> bytes:
    """Read until the peer's end of stream, or more than ``limit`` bytes."""
    read = b""
    if not data.buffered:
        data.wait_for_arrival()
    while len(read) <= limit and (count := data.recv_into(_buffer)):
        read += _buffer[:count]
    return read


def read_datagram(data: Transport, limit: int, timeout_s: float) -> tuple[bytes, bool]:
    """Read a datagram that nothing frames: up to the end of stream, or to a short silence. Give whether it has ended.

    Our server half-closes behind it, the original's does not (protocol v1).
    """
    read = b""
    with shared_deadline(timeout_s, "datagram"):
        while len(read) <= limit:
            try:
                count = data.pull(_buffer)
            except BlockingIOError:
                if not read:
                    data.wait_for_arrival()
                elif not _comes(data, END_OF_DATAGRAM_S if len(read) >= ONE_SEGMENT else 0):
                    break
                continue
            if not count:
                return read, True
            read += _buffer[:count]
    return read, False


def _comes(data: Transport, timeout_s: float) -> bool:
    """Wait for something to arrive; False when nothing does."""
    with gevent.Timeout(timeout_s, False):
        data.wait_for_arrival()
        return True
    return False
