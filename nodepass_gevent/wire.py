"""Bytes of the tunnel protocol, parse beside format. No socket, no clock and no gevent here.

A line is empty (a keep-alive) or a URL of host, optional query and fragment, and nothing else:

    "//" host ["?" key=value *("&" key=value)] "#" fragment "\\n"

    //<data port>#<tls mode>    server -> client, once, at once: the handshake
                                (a server that takes no v1 client says ``off`` for the port)
    (empty)                     server -> client: keep-alive
    //<id>#1   //<id>#2         server -> client: launch data connection <id> for TCP, for a UDP datagram

A data connection opens with its id: 8 lower-case hexadecimal digits, server -> client, no newline.
Parsers take a line without its newline, formatters give it with one. Whatever the grammar does not
allow raises ProtocolError; keys and fragments that are merely unknown are passed over.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from urllib.parse import unquote_to_bytes

from .errors import ProtocolError

MAX_FIRST_LINE = 1024  # bytes; room for the offers of later profiles
MAX_LINE = 256  # bytes; the longest real signal is about 150
ID_LENGTH = 8  # bytes: 32 random bits in hexadecimal
PING = b"\n"
TLS_MODES = (0, 1, 2)  # off, self-signed, verified

_WORD = rb"[A-Za-z0-9._~,%-]"
_LINE = re.compile(rb"//(%b*)(?:\?(%b+=%b*(?:&%b+=%b*)*))?#(%b*)" % ((_WORD,) * 6))
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ID = re.compile(rb"[0-9a-f]{8}")
_PORT = re.compile(rb"[1-9][0-9]{0,4}")


@dataclass(frozen=True)
class Line:
    """The parts of any line that is not empty; values are percent-decoded."""

    host: bytes
    query: Mapping[str, bytes]
    fragment: bytes


@dataclass(frozen=True)
class FirstLine:
    """The server's handshake. ``port`` is None where no v1 client is served (``off``)."""

    port: int | None
    tls: int
    query: Mapping[str, bytes] = field(default_factory=dict, compare=False)


class Kind(Enum):
    """What a launched data connection carries; the value is the line's fragment."""

    TCP = b"1"
    UDP = b"2"


@dataclass(frozen=True, slots=True)
class Launch:
    """A user waits on data connection ``id``."""

    id: bytes
    kind: Kind


@dataclass(frozen=True)
class Ping:
    """The keep-alive, an empty line."""


@dataclass(frozen=True)
class Unknown:
    """A well-formed signal of a profile this side does not speak."""

    fragment: bytes


def parse_line(line: bytes) -> Line:
    """Split one line that is not empty into its parts."""
    match = _LINE.fullmatch(line)
    if not match or _BAD_PERCENT.search(line):
        raise ProtocolError(f"not a line of the tunnel protocol: {printable(line)}")
    host, query, fragment = match.groups()
    pairs = [pair.split(b"=") for pair in query.split(b"&")] if query else []
    values = {key.decode(): unquote_to_bytes(value) for key, value in pairs}
    if len(values) < len(pairs):
        raise ProtocolError(f"a key stands twice: {printable(line)}")
    return Line(unquote_to_bytes(host), MappingProxyType(values), fragment)


def parse_first_line(line: bytes) -> FirstLine:
    """Read the server's handshake; its query is kept, whatever it offers."""
    parts = parse_line(line)
    if parts.fragment not in (b"0", b"1", b"2"):
        raise ProtocolError(f"unknown TLS mode, known are 0, 1 and 2: {printable(line)}")
    tls = int(parts.fragment)
    if parts.host == b"off":
        return FirstLine(None, tls, parts.query)
    if not _PORT.fullmatch(parts.host) or int(parts.host) > 65535:
        raise ProtocolError(f"not a port of 1 to 65535: {printable(line)}")
    return FirstLine(int(parts.host), tls, parts.query)


def format_first_line(first: FirstLine) -> bytes:
    """Write the v1 handshake."""
    return b"//%b#%d\n" % (b"off" if first.port is None else b"%d" % first.port, first.tls)


def parse_signal(line: bytes) -> Ping | Launch | Unknown:
    """Read one line that follows the first, server -> client."""
    if not line:
        return Ping()
    parts = parse_line(line)
    try:
        kind = Kind(parts.fragment)
    except ValueError:
        return Unknown(parts.fragment)
    return Launch(parse_id(parts.host), kind)


def format_launch(launch: Launch) -> bytes:
    """Write the signal that pairs a user with a data connection."""
    return b"//%b#%b\n" % (launch.id, launch.kind.value)


def parse_id(data: bytes) -> bytes:
    """Check the id of a data connection, as it stands in its first 8 bytes and in a launch."""
    if not _ID.fullmatch(data):
        raise ProtocolError(f"not an id of 8 lower-case hexadecimal digits: {printable(data)}")
    return data


def recognise(opening: bytes) -> str:
    """Name the protocol of a caller that speaks first, which no v1 client does, from its first bytes."""
    for start, name in _OPENINGS:
        if opening.startswith(start):
            return name
    if _BASE64_LINE.fullmatch(opening):
        return "perhaps a client of NodePass 1.4 to 1.12"
    return "an unknown protocol"


_OPENINGS = (
    (b"GET ", "HTTP, perhaps a client of NodePass 1.13 or later"),
    (b"\x16\x03", "TLS"),
    (b"SSH-", "SSH"),
    (b"//", "a later profile of this protocol"),
)
_BASE64_LINE = re.compile(rb"[A-Za-z0-9+/]+=*\n")


class Lines:
    """Cut a byte stream into lines without their newline; holds back at most ``limit`` bytes."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Give the lines that ``data`` completes; raise ProtocolError for one over the limit.

        Lines before the oversized one are lost with it: the connection is not worth more reading.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= self._limit or any(len(line) >= self._limit for line in lines):
            raise ProtocolError(f"a line of more than {self._limit} bytes")
        return lines


def printable(foreign: bytes, limit: int = 80) -> str:
    """Show what a peer sent in a log line: escaped, on one line, cut at ``limit`` bytes."""
    shown = ascii(foreign[:limit])[1:]
    return shown + "..." if len(foreign) > limit else shown
