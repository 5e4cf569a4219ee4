"""Target servers of the integration tests: threads, one behaviour at a time, and a record of what they saw."""

import contextlib
import errno
import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

CONNECTION_S = 30.0  # no thread of a target outlives a broken test for longer
TICK_S = 0.1


@dataclass
class Seen:
    """What one connection brought: bytes, their hash, and how its stream ended (open, end, reset)."""

    peer: tuple
    received: int = 0
    how: str = "open"
    hash: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)

    def note(self, data: bytes) -> None:
        self.received += len(data)
        self.hash.update(data)

    @property
    def digest(self) -> str:
        return self.hash.hexdigest()


Behaviour = Callable[[socket.socket, Seen], None]


def echo(conn: socket.socket, seen: Seen) -> None:
    """Send back what comes; end after the user's end."""
    while data := conn.recv(65536):
        seen.note(data)
        conn.sendall(data)
    seen.how = "end"


def silent(conn: socket.socket, seen: Seen) -> None:
    """Read to the end and answer nothing."""
    while data := conn.recv(65536):
        seen.note(data)
    seen.how = "end"


def answer_after_end(answer: bytes) -> Behaviour:
    """Send `answer` only after the user's end of stream."""

    def serve(conn: socket.socket, seen: Seen) -> None:
        silent(conn, seen)
        conn.sendall(answer)

    return serve


def half_close_first(greeting: bytes) -> Behaviour:
    """Send `greeting` and half-close at once, then read to the end."""

    def serve(conn: socket.socket, seen: Seen) -> None:
        conn.sendall(greeting)
        conn.shutdown(socket.SHUT_WR)
        silent(conn, seen)

    return serve


def send_on_connect(greeting: bytes) -> Behaviour:
    """Send `greeting` before anything was read, then echo."""

    def serve(conn: socket.socket, seen: Seen) -> None:
        conn.sendall(greeting)
        echo(conn, seen)

    return serve


def reset_after(count: int, answer: bytes = b"") -> Behaviour:
    """Read `count` bytes, send `answer`, and reset the connection."""

    def serve(conn: socket.socket, seen: Seen) -> None:
        while seen.received < count and (data := conn.recv(65536)):
            seen.note(data)
        if answer:
            conn.sendall(answer)
        reset(conn)

    return serve


def reset(sock: socket.socket) -> None:
    """Close by reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class EchoTCP:
    """A TCP target. `behaviour` may be exchanged while it runs: a connection is served by the one at its accept.

    With `refuse` the port is held but not listened on: connections are refused.
    """

    def __init__(self, behaviour: Behaviour = echo, *, port: int = 0, refuse: bool = False) -> None:
        self.behaviour = behaviour
        self.seen: list[Seen] = []
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        if refuse:
            self._listener = socket.socket()
            self._listener.bind(("127.0.0.1", port))
        else:
            self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._listener.settimeout(TICK_S)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept_all, daemon=True)
        if not refuse:
            self._acceptor.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        return len(self._open)

    def forget(self) -> None:
        """Start a new record; connections still open keep writing to their old one."""
        self.seen = []

    def _accept_all(self) -> None:
        while not self._stopped.is_set():
            try:
                conn, peer = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as exc:
                if exc.errno != errno.EMFILE:
                    raise
                self._stopped.wait(0.01)  # a test has taken all descriptors of this process for a moment
                continue
            conn.settimeout(CONNECTION_S)
            seen = Seen(peer)
            self.seen.append(seen)
            self._open.add(conn)
            threading.Thread(target=self._serve, args=(conn, seen, self.behaviour), daemon=True).start()

    def _serve(self, conn: socket.socket, seen: Seen, behaviour: Behaviour) -> None:
        try:
            behaviour(conn, seen)
        except ConnectionError:
            seen.how = "reset"
        except OSError:
            pass  # stopped, or silent for longer than CONNECTION_S
        finally:
            self._open.discard(conn)
            conn.close()

    def stop(self) -> None:
        self._stopped.set()
        if self._acceptor.ident:
            self._acceptor.join()
        self._listener.close()
        for conn in tuple(self._open):
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def same(datagram: bytes) -> list[bytes]:
    """The echo of a datagram."""
    return [datagram]


class EchoUDP:
    """A UDP target: `behaviour` maps each datagram to the replies it gets, none for a silent target."""

    def __init__(self, behaviour: Callable[[bytes], list[bytes]] = same, *, port: int = 0) -> None:
        self.behaviour = behaviour
        self.seen: list[tuple[bytes, tuple]] = []
        self._stopped = threading.Event()
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", port))
        self._sock.settimeout(TICK_S)
        self.port: int = self._sock.getsockname()[1]
        self._receiver = threading.Thread(target=self._receive_all, daemon=True)
        self._receiver.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def forget(self) -> None:
        self.seen = []

    def _receive_all(self) -> None:
        while not self._stopped.is_set():
            try:
                datagram, user = self._sock.recvfrom(65536)
                self.seen.append((datagram, user))
                for reply in self.behaviour(datagram):
                    self._sock.sendto(reply, user)
            except OSError:
                continue  # the tick, or a port of a user that is gone

    def stop(self) -> None:
        self._stopped.set()
        self._receiver.join()
        self._sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
