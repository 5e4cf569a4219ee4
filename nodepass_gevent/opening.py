"""The lines by which connections open, parse beside format: who calls, and what both sides speak.

Profile v1, server -> every caller of the tunnel port, at once; the caller answers nothing:

    //<data port>#<tls mode>    (``off`` for the port where no v1 client is served)

Profile v2 is offered in the query of that line, which a v1 client ignores, and taken up by a line of the caller's:

    //<data port>?v=2&n=<nonce>#<tls mode>          server -> every caller of the tunnel port
    //<name>?v=2[&c=<capabilities>]#hello           client -> server: this is a client of tunnel <name>
    //<session>?v=2#data                            client -> server: this is a data connection of <session>
    //<session>?c=<capabilities>&i=<s>&p=<n>#welcome   server -> client: session, ping interval, most data connections

The grammar, and what is raised, is that of ``wire``.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote_to_bytes

from .errors import ProtocolError
from .wire import NUMBER, Bye, Line, parse_line, printable

MAX_FIRST_LINE = 1024  # bytes; room for the offers of later profiles
TLS_MODES = (0, 1, 2)  # off, self-signed, verified
VERSION = b"2"
NONCE_LENGTH = 16  # bytes in a first line that offers v2
SESSION_LENGTH = 8  # bytes, written as hexadecimal digits in lines
ALPN_CONTROL, ALPN_DATA = b"nodepass-ctl/2", b"nodepass-data/2"
NEED = b"need"  # a capability

_PORT = re.compile(rb"[1-9][0-9]{0,4}")
_SESSION = re.compile(rb"[0-9a-f]{16}")
_DATA = re.compile(rb"//([0-9a-f]{16})\?v=2#data\n")
DATA_LENGTH = 28  # bytes of such a line


@dataclass(frozen=True)
class FirstLine:
    """The server's handshake. ``port`` is None where no v1 client is served (``off``)."""

    port: int | None
    tls: int
    query: Mapping[str, bytes] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Hello:
    """A caller of the tunnel port is a client of the tunnel ``name``."""

    name: str = ""
    capabilities: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class Data:
    """A caller of the tunnel port is a data connection of ``session``."""

    session: bytes


@dataclass(frozen=True)
class Welcome:
    """The server's answer to a hello."""

    session: bytes
    capabilities: frozenset[bytes]
    ping_interval_s: int
    most_data_connections: int


def parse_first_line(line: bytes) -> FirstLine:
    """Read the server's handshake; its query is kept, whatever it offers."""
    parts = parse_line(line)
    if parts.fragment not in [b"%d" % mode for mode in TLS_MODES]:
        raise ProtocolError(f"unknown TLS mode, known are 0, 1 and 2: {printable(line)}")
    port = None
    if parts.host != b"off":
        if not _PORT.fullmatch(parts.host) or int(parts.host) > 65535:
            raise ProtocolError(f"not a port of 1 to 65535: {printable(line)}")
        port = int(parts.host)
    return FirstLine(port, int(parts.fragment), parts.query)


def offers_v2(first: FirstLine) -> bool:
    """Whether the server offers v2; ProtocolError when its offer is not whole."""
    if VERSION not in first.query.get("v", b"").split(b","):
        return False
    nonce = first.query.get("n", b"")
    if len(_unbase64(nonce)) != NONCE_LENGTH:
        raise ProtocolError(f"an offer of v2 without a nonce of {NONCE_LENGTH} bytes: {printable(nonce)}")
    return True


def format_first_line(first: FirstLine, nonce: bytes = b"") -> bytes:
    """Write the handshake, with an offer of v2 when there is a nonce for it."""
    port = b"off" if first.port is None else b"%d" % first.port
    offer = b"?v=%b&n=%b" % (VERSION, _base64(nonce)) if nonce else b""
    return b"//%b%b#%d\n" % (port, offer, first.tls)


def parse_data(start: bytes) -> Data | None:
    """Read a data connection's opening, newline and all, where ``start`` is exactly that; None where it is not."""
    match = _DATA.fullmatch(start)
    return Data(bytes.fromhex(match[1].decode())) if match else None


def parse_opening(line: bytes) -> Hello | Data:
    """Read the line by which a v2 caller of the tunnel port says what it is."""
    parts = parse_line(line)
    if parts.query.get("v") != VERSION:
        raise ProtocolError(f"not an opening of version 2: {printable(line)}")
    if parts.fragment == b"data":
        return Data(_parse_session(parts.host))
    if parts.fragment == b"hello":
        return Hello(unquote_to_bytes(parts.host).decode("utf-8", "replace"), _capabilities(parts))
    raise ProtocolError(f"neither hello nor data: {printable(line)}")


def format_hello(hello: Hello) -> bytes:
    """Write a client's opening."""
    name = quote(hello.name, safe="").encode()
    return b"//%b?v=%b&c=%b#hello\n" % (name, VERSION, b",".join(sorted(hello.capabilities)))


def format_data(data: Data) -> bytes:
    """Write a data connection's opening."""
    return b"//%b?v=%b#data\n" % (data.session.hex().encode(), VERSION)


def parse_welcome(line: bytes) -> Welcome | Bye:
    """Read the server's answer to a hello."""
    parts = parse_line(line)
    if parts.fragment == b"bye":
        return Bye(parts.query.get("why", b""))
    interval, most = parts.query.get("i", b""), parts.query.get("p", b"")
    if parts.fragment != b"welcome" or not NUMBER.fullmatch(interval) or not NUMBER.fullmatch(most):
        raise ProtocolError(f"not a welcome: {printable(line)}")
    return Welcome(_parse_session(parts.host), _capabilities(parts), max(int(interval), 1), int(most))


def format_welcome(welcome: Welcome) -> bytes:
    """Write the answer to a hello that is accepted."""
    return b"//%b?c=%b&i=%d&p=%d#welcome\n" % (
        welcome.session.hex().encode(),
        b",".join(sorted(welcome.capabilities)),
        welcome.ping_interval_s,
        welcome.most_data_connections,
    )


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
_BASE64_LINE = re.compile(rb"[A-Za-z0-9+/]+=*\n?")


def _capabilities(parts: Line) -> frozenset[bytes]:
    return frozenset(filter(None, parts.query.get("c", b"").split(b",")))


def _parse_session(text: bytes) -> bytes:
    if not _SESSION.fullmatch(text):
        raise ProtocolError(f"not a session of 16 lower-case hexadecimal digits: {printable(text)}")
    return bytes.fromhex(text.decode())


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _unbase64(text: bytes) -> bytes:
    """Decode base64url without padding; only the canonical form is one."""
    try:
        data = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    except ValueError as exc:
        raise ProtocolError(f"not base64url: {printable(text)}") from exc
    if _base64(data) != text:
        raise ProtocolError(f"not canonical base64url: {printable(text)}")
    return data
