"""The header that tells a target who the user is: the PROXY protocol of HAProxy, versions 1 and 2. Written only.

The source is the user. The destination is the target, at the address that the client connected to: the public
port's own address does not travel. Both must be of one family, and the user's counts: where the target's differs, an
IPv4 target is named by its mapped address and an IPv6 one as 0.0.0.0, with its port. A user who is not known is
UNKNOWN in version 1 and LOCAL in version 2, by which a target takes the connection's own addresses.
"""

import ipaddress
import struct
from collections.abc import Callable

V2 = 2  # of the two versions the binary one; 1 is text

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_LOCAL, _PROXY = (0x20, 0x21)  # version and command
_FAMILIES = {4: 0x10, 6: 0x20}
_STREAM, _DATAGRAM = (0x01, 0x02)


def header(version: int, user: tuple[str, int] | None, target: tuple) -> bytes:
    """Give what opens a TCP connection to ``target``, a socket's address, for ``user``, an address and a port."""
    if version == V2:
        return _binary(user, target, _STREAM)
    if user is None:
        return b"PROXY UNKNOWN\r\n"
    source, destination = _addresses(user, target)
    return f"PROXY TCP{source.version} {source} {destination} {user[1]} {target[1]}\r\n".encode()


def datagram_header(user: tuple[str, int] | None, target: tuple) -> bytes:
    """Give what stands before a UDP session's first datagram; version 1 has no such thing."""
    return _binary(user, target, _DATAGRAM)


def _binary(user: tuple[str, int] | None, target: tuple, transport: int) -> bytes:
    if user is None:
        return _SIGNATURE + struct.pack("!BBH", _LOCAL, 0, 0)
    source, destination = _addresses(user, target)
    ports = struct.pack("!HH", user[1], target[1])
    body = source.packed + destination.packed + ports
    return _SIGNATURE + struct.pack("!BBH", _PROXY, _FAMILIES[source.version] | transport, len(body)) + body


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _addresses(user: tuple[str, int], target: tuple) -> tuple[_Address, _Address]:
    source = ipaddress.ip_address(user[0])
    destination = ipaddress.ip_address(target[0].partition("%")[0])
    if source.version == destination.version:
        return source, destination
    if destination.version == 4:
        return source, ipaddress.IPv6Address(f"::ffff:{destination}")
    return source, ipaddress.IPv4Address(0)


def introduced(push: Callable[[memoryview | bytes], object], header: bytes) -> Callable[[memoryview | bytes], object]:
    """Give ``push`` with ``header``, if there is one, before the first datagram that it takes."""

    def push_behind(datagram: memoryview | bytes) -> None:
        nonlocal header
        push(header + datagram if header else datagram)
        header = b""

    return push_behind if header else push
