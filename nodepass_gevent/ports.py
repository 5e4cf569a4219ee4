"""The ports that a process listens on, and those that are asked for twice: the second listener would wait for ever."""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from .config import Config, Process
from .errors import ConfigError
from .values import Address, unmapped

_ANY, _ANY_V4 = "", IPv4Address("0.0.0.0")


@dataclass(frozen=True)
class Port:
    """One address that is listened on."""

    what: str
    address: Address
    kind: int  # socket.SOCK_STREAM or SOCK_DGRAM
    source: str
    tunnel: str = ""  # its name

    def __str__(self) -> str:
        return f"{self.what} of [{self.tunnel}]" if self.tunnel else self.what


def of_tunnel(config: Config) -> Iterator[Port]:
    """Name the ports of a tunnel; a client has none."""
    if config.role == "client":
        return
    url, name = config.source("url"), config.name
    yield Port("tunnel port", config.tunnel, socket.SOCK_STREAM, url, name)
    if config.data_port:
        data = replace(config.tunnel, port=config.data_port)
        yield Port("data port", data, socket.SOCK_STREAM, config.source("data-port"), name)
    if config.network != "udp":
        yield Port("public port, TCP", config.target, socket.SOCK_STREAM, url, name)
    if config.network != "tcp":
        yield Port("public port, UDP", config.target, socket.SOCK_DGRAM, url, name)


def of_process(process: Process, configs: Iterable[Config]) -> Iterator[Port]:
    """Name all ports: those of the tunnels, and where status is asked."""
    for config in configs:
        yield from of_tunnel(config)
    if process.status:
        yield Port("status", process.status, socket.SOCK_STREAM, process.source("status"))


def clashes(ports: Iterable[Port]) -> dict[Port, str]:
    """Give the ports that an earlier one has taken, each with what is wrong. Port 0 is another one each time.

    ``reuse-port`` is for several processes: within one, users would come to either tunnel at random.
    """
    found: dict[Port, str] = {}
    seen: dict[tuple[int, int], list[tuple[Port, object]]] = {}
    for port in ports:
        host, others = _host(port.address.host), seen.setdefault((port.address.port, port.kind), [])
        first = next((other for other, its in others if _overlap(host, its)), None)
        if first and port.address.port:
            there = "" if first.address == port.address else f", {first.address}"
            found[port] = f"{port.address} is asked for twice; first as the {first}{there} [from {port.source}]"
        others.append((port, host))
    return found


def refuse_clashes(process: Process, configs: Iterable[Config]) -> None:
    """Raise ConfigError for the first port that is asked for twice."""
    for port, text in clashes(of_process(process, configs)).items():
        raise ConfigError(f"{port}: {text}")


def _host(host: str) -> str | IPv4Address | IPv6Address:
    """Give what a host is bound at; a name is left as one."""
    if host in ("", "::"):
        return _ANY
    host = host.lower().rstrip(".")
    try:
        return host if "%" in host else unmapped("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return host


def _overlap(one: object, other: object) -> bool:
    wild = _ANY_V4 in (one, other) and isinstance(one, IPv4Address) and isinstance(other, IPv4Address)
    return one == other or _ANY in (one, other) or wild
