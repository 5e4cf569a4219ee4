"""Bytes of the tunnel protocol on a control channel that is up, parse beside format. No socket and no clock.

A line is empty (a keep-alive) or a URL of host, optional query and fragment, and nothing else:

    "//" host ["?" key=value *("&" key=value)] "#" fragment "\\n"

    (empty)                     server -> client: keep-alive; in profile v2 answered by another one
    //<id>#1   //<id>#2         server -> client: launch data connection <id> for a TCP user, for a UDP datagram
    //<id>#3                    v2, server -> client: launch it for a UDP session
    //<id>?from=<address>#1     v2: the same, with the user's address and port
    //<id>?why=<reason>#fail    v2, client -> server: the launch of <id> does not become an exchange
    //<n>#need                  v2, server -> client: n users wait without a data connection
    //[?why=<reason>]#bye       v2, both ways: no new launches

The lines by which connections open, which have the same grammar, are in ``opening``. A data connection opens with its
id: 8 lower-case hexadecimal digits, server -> client, no newline. Parsers take a line without its newline, formatters
give it with one. Whatever the grammar does not allow raises ProtocolError; keys and fragments that are merely unknown
are passed over.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from .errors import ProtocolError

MAX_LINE = 256  # bytes; the longest real signal is about 150
ID_LENGTH = 8  # bytes: 32 random bits in hexadecimal
PING = b"\n"
BUSY = b"busy"  # why the server says bye: it has another client

_WORD = rb"[A-Za-z0-9._~,%-]"
_LINE = re.compile(rb"//(%b*)(?:\?(%b+=%b*(?:&%b+=%b*)*))?#(%b*)" % ((_WORD,) * 6))
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ID = re.compile(rb"[0-9a-f]{8}")
_LAUNCH = re.compile(rb"//([0-9a-f]{8})#([123])")
_ADDRESS = re.compile(rb"(?:([0-9.]{7,15})|\[([0-9A-Fa-f:.]{2,45})\]):([1-9][0-9]{0,4})")
NUMBER = re.compile(rb"[0-9]{1,9}")


@dataclass(frozen=True)
class Line:
    """The parts of any line that is not empty; the values of its query are percent-decoded, the host is not."""

    host: bytes
    query: Mapping[str, bytes]
    fragment: bytes


class Kind(bytes, Enum):
    """What a launched data connection carries: the fragment of the line that launches it."""

    TCP = b"1"
    UDP = b"2"
    UDP_SESSION = b"3"

    __hash__ = bytes.__hash__  # Enum's own is Python code: a launch looks its kind up


_KINDS = {bytes(kind): kind for kind in Kind}


class Launch(NamedTuple):  # and no dataclass, for there is one per connection
    """A user waits on data connection ``id``."""

    id: bytes
    kind: Kind
    user: tuple | None = None  # its address and port, where they are known


@dataclass(frozen=True)
class Fail:
    """The launch of data connection ``id`` does not become an exchange."""

    id: bytes
    why: bytes = b""


@dataclass(frozen=True)
class Ping:
    """The keep-alive, an empty line."""


@dataclass(frozen=True)
class Need:
    """``users`` wait without a data connection."""

    users: int


@dataclass(frozen=True)
class Bye:
    """No new launches, for the reason ``why`` (may be empty)."""

    why: bytes = b""


@dataclass(frozen=True)
class Unknown:
    """A well-formed signal of a profile this side does not speak."""

    fragment: bytes


def parse_line(line: bytes) -> Line:
    """Split one line that is not empty into its parts."""
    if line == b"//?#bye":  # a query without keys, which no other line has
        return Line(b"", MappingProxyType({}), b"bye")
    match = _LINE.fullmatch(line)
    if not match or _BAD_PERCENT.search(line):
        raise ProtocolError(f"not a line of the tunnel protocol: {printable(line)}")
    host, query, fragment = match.groups()
    pairs = [pair.split(b"=") for pair in query.split(b"&")] if query else []
    values = {key.decode(): unquote_to_bytes(value) for key, value in pairs}
    if len(values) < len(pairs):
        raise ProtocolError(f"a key stands twice: {printable(line)}")
    return Line(host, MappingProxyType(values), fragment)


def parse_signal(line: bytes) -> Ping | Launch | Fail | Need | Bye | Unknown:
    """Read one line of a control channel that is up."""
    if match := _LAUNCH.fullmatch(line):  # nearly every line
        return Launch(match[1], _KINDS[match[2]])
    if not line:
        return Ping()
    parts = parse_line(line)
    if parts.fragment == b"bye":
        return Bye(parts.query.get("why", b""))
    if parts.fragment == b"need":
        if not NUMBER.fullmatch(parts.host):
            raise ProtocolError(f"not a number of users: {printable(line)}")
        return Need(int(parts.host))
    if parts.fragment == b"fail":
        return Fail(parse_id(parts.host), parts.query.get("why", b""))
    try:
        kind = Kind(parts.fragment)
    except ValueError:
        return Unknown(parts.fragment)
    return Launch(parse_id(parts.host), kind, _parse_user(parts.query.get("from", b"")))


def format_launch(launch: Launch) -> bytes:
    """Write the signal that pairs a user with a data connection."""
    user = b"?from=" + _format_user(*launch.user[:2]) if launch.user else b""
    return b"//%b%b#%b\n" % (launch.id, user, launch.kind)


def _parse_user(text: bytes) -> tuple[str, int] | None:
    """Read an IP address and a port; None for anything else, which says nothing about the user.

    It goes on to the target, so it is written anew: not a byte of the peer's own passes.
    """
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[3]) > 65535:
        return None
    try:
        return _canonical((match[1] or match[2]).decode(), bool(match[2])), int(match[3])
    except ValueError:
        return None


def _format_user(host: str, port: int) -> bytes:
    """Write a user's address as the system gives it: mapped IPv4 as IPv4, and without a zone."""
    if ":" in host:
        host = _canonical(host.partition("%")[0], True)
    return quote(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", safe="").encode()


def _canonical(host: str, v6: bool) -> str:
    if not v6:
        return str(ipaddress.IPv4Address(host))
    address = ipaddress.IPv6Address(host)
    return str(address.ipv4_mapped or address)


def format_fail(fail: Fail) -> bytes:
    """Write that a launch does not become an exchange, and why."""
    return b"//%b?why=%b#fail\n" % (fail.id, fail.why)


def format_need(need: Need) -> bytes:
    """Write how many users wait without a data connection."""
    return b"//%d#need\n" % need.users


def format_bye(bye: Bye) -> bytes:
    """Write that no new launches come, and perhaps why."""
    return b"//%b#bye\n" % (b"?why=" + bye.why if bye.why else b"")


def parse_id(data: bytes) -> bytes:
    """Check the id of a data connection, as it stands in its first 8 bytes and in a launch."""
    if not _ID.fullmatch(data):
        raise ProtocolError(f"not an id of 8 lower-case hexadecimal digits: {printable(data)}")
    return data


class Lines:
    """Cut a byte stream into lines without their newline; holds back at most ``limit`` bytes."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self.limit = limit
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Give the lines that ``data`` completes; raise ProtocolError for one over the limit.

        Lines before the oversized one are lost with it: the connection is not worth more reading.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= self.limit or any(len(line) >= self.limit for line in lines):
            raise ProtocolError(f"a line of more than {self.limit} bytes")
        return lines


def printable(foreign: bytes, limit: int = 80) -> str:
    """Show what a peer sent in a log line: escaped, on one line, cut at ``limit`` bytes."""
    shown = ascii(foreign[:limit])[1:]
    return shown + "..." if len(foreign) > limit else shown
