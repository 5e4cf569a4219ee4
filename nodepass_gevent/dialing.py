"""Data connections in clear, from a socket to the id that makes them ready."""

from . import net, opening, wire
from .config import Limits
from .deadlines import shared_deadline
from .errors import ConnectError, reason
from .net import Endpoint
from .transport import Stream, Transport


class PlainDial:
    """Dials ``endpoint``, and says ``line`` there (profile v2) or nothing (v1); a call blocks until the id is here.

    The steps that make up a call are for a pool that does at once what needs no wait. All raise OSError or
    NodePassError.
    """

    def __init__(self, endpoint: Endpoint, limits: Limits, line: bytes = b"") -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._line = line

    def __call__(self) -> tuple[bytes, Transport]:
        limits = self._limits
        return self._wait_for_id(net.connect([self._endpoint], limits.connect_timeout_s, limits, self._line))

    def begin(self) -> tuple[Stream, bool]:
        """Dial; give the connection, and whether nothing but its id is missing."""
        return net.begin_to_connect(self._endpoint, self._limits, self._line)

    def take_id(self, stream: Stream) -> bytes:
        """Take the id, if it is here; empty when it is not, or never comes."""
        id = stream.take_behind_line(opening.MAX_FIRST_LINE if self._line else 0, wire.ID_LENGTH)
        return wire.parse_id(id) if id else b""

    def finish(self, stream: Stream, *, only_id: bool) -> tuple[bytes, Transport]:
        """Wait for what is missing; when that does not come, the connection is closed."""
        if not only_id:
            try:
                net.finish_connecting(stream, self._limits.connect_timeout_s, self._line)
            except OSError as exc:
                raise ConnectError(f"connect {stream}: {reason(exc)}") from exc
        return self._wait_for_id(stream)

    def _wait_for_id(self, stream: Stream) -> tuple[bytes, Transport]:
        try:
            with shared_deadline(self._limits.id_timeout_s, "id of a data connection"):
                stream.wait_for_arrival()  # as a rule no id is here so soon
                if self._line:
                    return wire.parse_id(stream.read_behind_line(opening.MAX_FIRST_LINE, wire.ID_LENGTH)), stream
                return wire.parse_id(stream.recv_exactly(wire.ID_LENGTH)), stream
        except BaseException:
            stream.reset()
            raise
