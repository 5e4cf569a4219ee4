"""The bound sockets of a server: opened, or inherited from the one in whose place it comes, and handed on like that."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from . import net
from .errors import reason
from .transport import RawSocket
from .values import Address

PUBLIC = "public"

Bound = tuple[str, Address, int]  # what for, an address as it is configured (port 0: any), and the type of socket


def bound(address: Address, sock: RawSocket) -> Address:
    """Give the address with the port that the system chose for port 0."""
    return replace(address, port=sock.getsockname()[1])


@contextmanager
def named(purpose: str, kind: int) -> Iterator[None]:
    """Say which port it is, as ``nodepass check`` does, where its address cannot be had."""
    protocol = ", UDP" if kind == socket.SOCK_DGRAM else ", TCP"
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, f"{purpose} port{protocol if purpose == PUBLIC else ''}: {reason(exc)}") from exc


class Sockets:
    """The bound sockets of a server, by what they are bound to; some come from the one in whose place it is."""

    def __init__(self, inherited: dict[Bound, RawSocket]) -> None:
        self._inherited = inherited
        self._open: dict[Bound, RawSocket] = {}
        self.handed_over = False  # to the one that comes in this one's place: who calls is its

    def open(self, purpose: str, address: Address, kind: int, make: Callable[[], RawSocket]) -> RawSocket:
        """Give the socket that was inherited, or one that ``make`` makes."""
        key = purpose, address, kind
        with named(purpose, kind):
            sock = self._inherited.pop(key, None) or make()
        self._open[key] = sock
        return sock

    def forget(self, sock: RawSocket) -> None:
        """Hand a socket to nobody: it is about to be closed."""
        self._open = {key: other for key, other in self._open.items() if other is not sock}

    def inherits(self, purpose: str, address: Address) -> bool:
        return any(key[:2] == (purpose, address) for key in self._inherited)

    def close_inherited(self) -> None:
        """Close what is not needed."""
        while self._inherited:
            self._inherited.popitem()[1].close()

    def duplicate(self) -> dict[Bound, RawSocket]:
        """Hand all over, as duplicates: who calls meanwhile waits for the one that gets them.

        Those that were inherited and are not open yet are among them: two changes may come in quick succession. Raises
        OSError where there are no descriptors, and then nothing has changed.
        """
        duplicates: dict[Bound, RawSocket] = {}
        try:
            for key, sock in (self._inherited | self._open).items():
                duplicates[key] = net.duplicate(sock)
        except OSError:
            for twin in duplicates.values():
                twin.close()
            raise
        self.handed_over = True
        return duplicates
