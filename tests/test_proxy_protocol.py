"""The header for a target, by byte vectors and read back by somebody else's parser."""

import ipaddress
import socket

import pytest
from proxyprotocol.result import ProxyResultLocal, ProxyResultUnknown
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from nodepass_gevent.proxy_protocol import V2, datagram_header, header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
IPV4_USER, IPV6_USER = ("192.0.2.1", 443), ("2001:db8::1", 65535)
IPV4_TARGET, IPV6_TARGET = ("198.51.100.7", 80), ("fe80::7%eth0", 8080, 0, 2)

# user, target, how the two are named
NAMED = [
    (IPV4_USER, IPV4_TARGET, "192.0.2.1", "198.51.100.7"),
    (IPV6_USER, IPV6_TARGET, "2001:db8::1", "fe80::7"),
    (IPV4_USER, IPV6_TARGET, "192.0.2.1", "0.0.0.0"),
    (IPV6_USER, IPV4_TARGET, "2001:db8::1", "::ffff:c633:6407"),
]
VECTORS = [
    (header(1, IPV4_USER, IPV4_TARGET), b"PROXY TCP4 192.0.2.1 198.51.100.7 443 80\r\n"),
    (header(1, IPV6_USER, IPV6_TARGET), b"PROXY TCP6 2001:db8::1 fe80::7 65535 8080\r\n"),
    (header(1, None, IPV4_TARGET), b"PROXY UNKNOWN\r\n"),
    (header(V2, IPV4_USER, IPV4_TARGET), SIGNATURE + bytes.fromhex("2111000c c0000201 c6336407 01bb 0050")),
    (
        header(V2, IPV6_USER, IPV6_TARGET),
        SIGNATURE + bytes.fromhex("21210024 20010db8" + "00" * 11 + "01 fe80" + "00" * 13 + "07 ffff 1f90"),
    ),
    (header(V2, None, IPV4_TARGET), SIGNATURE + bytes.fromhex("20000000")),
    (datagram_header(IPV4_USER, IPV4_TARGET), SIGNATURE + bytes.fromhex("2112000c c0000201 c6336407 01bb 0050")),
    (datagram_header(None, IPV6_TARGET), SIGNATURE + bytes.fromhex("20000000")),
]


@pytest.mark.parametrize(("written", "expected"), VECTORS)
def test_a_header_has_the_bytes_of_the_specification(written, expected):
    assert written == expected


def is_named(result, user, target, source, destination):
    """Whether a parsed header says what it should, port by port."""
    named = [(str(ipaddress.ip_address(address)), port) for address, port in (result.source, result.dest)]
    expected = [(source, user[1]), (str(ipaddress.ip_address(destination)), target[1])]
    return named == expected


@pytest.mark.parametrize(("user", "target", "source", "destination"), NAMED)
@pytest.mark.parametrize(("version", "parser"), [(1, ProxyProtocolV1()), (V2, ProxyProtocolV2())])
def test_another_parser_reads_the_user_and_the_target(version, parser, user, target, source, destination):
    result = parser.unpack(header(version, user, target))
    assert result.protocol in (socket.SOCK_STREAM, None)  # for version 1 this parser does not say
    assert is_named(result, user, target, source, destination)


@pytest.mark.parametrize(("user", "target", "source", "destination"), NAMED)
def test_another_parser_reads_the_header_of_a_datagram(user, target, source, destination):
    result = ProxyProtocolV2().unpack(datagram_header(user, target))
    assert result.protocol == socket.SOCK_DGRAM
    assert is_named(result, user, target, source, destination)


def test_another_parser_knows_a_user_who_is_not_known():
    assert isinstance(ProxyProtocolV1().unpack(header(1, None, IPV4_TARGET)), ProxyResultUnknown)
    assert isinstance(ProxyProtocolV2().unpack(header(V2, None, IPV4_TARGET)), ProxyResultLocal)
    assert isinstance(ProxyProtocolV2().unpack(datagram_header(None, IPV4_TARGET)), ProxyResultLocal)
