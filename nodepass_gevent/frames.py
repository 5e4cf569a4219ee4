"""Frames of a UDP session: each datagram behind its length, 2 bytes, big-endian. No socket and no gevent here."""

from .errors import ProtocolError

MAX_DATAGRAM = 65507  # bytes of payload in IPv4
LENGTH = 2  # bytes


def format_frame(datagram: bytes) -> bytes:
    """Write a datagram of 0 to MAX_DATAGRAM bytes as a frame."""
    return len(datagram).to_bytes(LENGTH, "big") + datagram


class Frames:
    """Cut a byte stream into the datagrams that it frames; holds back less than one frame."""

    __slots__ = ("_needed", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()  # of a frame that is not whole
        self._needed = LENGTH  # bytes that it must have before anything can be said of it

    def feed(self, data: memoryview | bytes) -> list[memoryview | bytes]:
        """Give the datagrams that ``data`` completes, as pieces of it, not copies; ProtocolError for one too long.

        Datagrams before one that is too long are lost with it: the session is not worth more reading.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data, self._rest = bytes(self._rest), bytearray()
        start, end = 0, len(data)
        self._needed = LENGTH
        if end >= LENGTH and end - LENGTH == data[0] << 8 | data[1] <= MAX_DATAGRAM:
            return [data[LENGTH:]]  # just one, as a rule
        datagrams = []
        while end - start >= LENGTH:
            size = data[start] << 8 | data[start + 1]
            if size > MAX_DATAGRAM:
                raise ProtocolError(f"a frame of {size} bytes, and no datagram has more than {MAX_DATAGRAM}")
            if end - start < LENGTH + size:
                self._needed = LENGTH + size
                break
            start += LENGTH
            datagrams.append(data[start : start + size])
            start += size
        if start < end:
            self._rest += data[start:]
        return datagrams
