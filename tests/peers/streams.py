"""Byte streams of the test peers: clear or TLS, half-close both ways, one thread per exchange.

Standard library only, nothing of the product. TLS runs on memory BIOs: ``SSLSocket.unwrap`` waits for the peer's
close_notify and so cannot half-close, while ``SSLObject.unwrap`` writes ours and lets the other direction go on.
"""

import contextlib
import select
import socket
import ssl
import struct
import time

CHUNK = 65536
HANDSHAKE_S = 5.0


class Cut(ConnectionError):
    """The peer closed a TLS connection without close_notify: bytes may be missing."""


class Clear:
    """No encryption: the end of stream is the FIN."""

    ends_with_fin = True

    def pull(self, sock: socket.socket, limit: int) -> bytes | None:
        """Return up to `limit` bytes, b"" at the end, None when nothing is there yet."""
        try:
            return sock.recv(limit)
        except BlockingIOError:
            return None

    def seal(self, data: bytes) -> bytes:
        return data

    def seal_end(self) -> bytes:
        return b""


class Secure:
    """TLS: the end of stream is close_notify; the TCP connection stays up for the other direction."""

    ends_with_fin = False

    def __init__(self, context: ssl.SSLContext, server_side: bool, name: str | None, record_size: int) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=name)
        self._record_size = record_size  # Go starts a connection with records of about 1,200 bytes
        self._early = bytearray()  # decrypted before we sent close_notify, not yet asked for
        self._ended = False

    def shake(self, sock: socket.socket, deadline: float) -> None:
        """Do the whole handshake on a non-blocking socket."""
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                self._write_all(sock, deadline)
                wait(sock, select.POLLIN, deadline)
                self._feed(sock)
                continue
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._write_all(sock, deadline)  # the alert
                raise
            self._write_all(sock, deadline)
            return

    def pull(self, sock: socket.socket, limit: int) -> bytes | None:
        """As `Clear.pull`; never returns bytes of two records at once, as Go's Read."""
        if self._early:
            data = bytes(self._early[:limit])
            del self._early[:limit]
            return data
        while True:
            data = self._open(limit)
            if data is not None:
                return data
            try:
                self._feed(sock)
            except BlockingIOError:
                return None

    def seal(self, data: bytes) -> bytes:
        step = self._record_size or len(data)
        for start in range(0, len(data), step):
            self._ssl.write(data[start : start + step])
        return self._outgoing.read()

    def seal_end(self) -> bytes:
        """Return our close_notify.

        SSL_shutdown would throw away (or trip over) application data that waits in the incoming BIO, so
        everything that can be decrypted is kept aside first; then it finds nothing and asks for more.
        """
        while (data := self._open(CHUNK)) is not None:
            if not data:
                break
            self._early += data
        with contextlib.suppress(ssl.SSLWantReadError):
            self._ssl.unwrap()
        return self._outgoing.read()

    def _open(self, limit: int) -> bytes | None:
        if self._ended:
            return b""
        try:
            data = self._ssl.read(limit)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            data = b""
        self._ended = not data
        return data

    def _feed(self, sock: socket.socket) -> None:
        raw = sock.recv(CHUNK)
        if not raw:
            raise Cut("end of stream without close_notify")
        self._incoming.write(raw)

    def _write_all(self, sock: socket.socket, deadline: float) -> None:
        data = self._outgoing.read()
        while data:
            wait(sock, select.POLLOUT, deadline)
            data = data[sock.send(data) :]


class Stream:
    """One connection, used by one thread at a time. Only `read` and `drain` wait, each with a limit of time."""

    def __init__(self, sock: socket.socket, layer: Clear | Secure) -> None:
        self.sock = sock
        self._layer = layer
        self._unsent = bytearray()
        self._ending = False

    @property
    def pending(self) -> bool:
        return bool(self._unsent)

    def receive(self, limit: int = CHUNK) -> bytes | None:
        """Return what is there: bytes, b"" at the end of stream, None for nothing yet."""
        return self._layer.pull(self.sock, limit)

    def read(self, limit: int, timeout_s: float) -> bytes:
        """Return what one read gives, as Go's ``conn.Read(make([]byte, limit))``."""
        deadline = time.monotonic() + timeout_s
        while (data := self.receive(limit)) is None:
            wait(self.sock, select.POLLIN, deadline)
        return data

    def send(self, data: bytes) -> None:
        self._unsent += self._layer.seal(data)
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
        if self._ending and not self._unsent and self._layer.ends_with_fin:
            self.sock.shutdown(socket.SHUT_WR)
            self._ending = False

    def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._unsent:
            wait(self.sock, select.POLLOUT, deadline)
            self.flush()

    def end(self) -> None:
        """Half-close: the peer reads an end of stream after what was sent; we go on reading."""
        self._unsent += self._layer.seal_end()
        self._ending = True
        self.flush()

    def silent(self) -> bool:
        """Say whether nothing has arrived, no end of stream either: an idle data connection that is alive."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.end()
        self.sock.close()

    def abort(self) -> None:
        """Close by reset."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def clear(sock: socket.socket) -> Stream:
    """Make a stream of a connected socket."""
    _prepare(sock)
    return Stream(sock, Clear())


def secure(sock: socket.socket, context: ssl.SSLContext, *, name: str | None = None, record_size: int = 0) -> Stream:
    """Do the TLS handshake, as the server when `name` is None, and make a stream of it."""
    _prepare(sock)
    layer = Secure(context, name is None, name, record_size)
    layer.shake(sock, time.monotonic() + HANDSHAKE_S)
    return Stream(sock, layer)


def wait(sock: socket.socket, event: int, deadline: float) -> None:
    """Wait until the socket is ready; raise TimeoutError at the deadline."""
    poll = select.poll()
    poll.register(sock, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("nothing within the deadline")


def exchange(one: Stream, other: Stream) -> tuple[int, int]:
    """Copy both ways until both directions have ended, and close; return the bytes of each direction.

    A reset or a cut on one side becomes a reset on the other.
    """
    copied = {one: 0, other: 0}
    routes = [(one, other), (other, one)]
    try:
        while routes or one.pending or other.pending:
            if not _move(routes, copied):
                _wait_for_any(routes, (one, other))
    except OSError:
        one.abort()
        other.abort()
    finally:
        one.close()
        other.close()
    return copied[one], copied[other]


def _move(routes: list[tuple[Stream, Stream]], copied: dict[Stream, int]) -> bool:
    """Carry what is ready along each open route; a sink that still has unsent bytes takes no more."""
    moved = False
    for source, sink in tuple(routes):
        if sink.pending or (data := source.receive()) is None:
            continue
        moved = True
        copied[source] += len(data)
        if data:
            sink.send(data)
        else:
            sink.end()
            routes.remove((source, sink))
    return moved


def _wait_for_any(routes: list[tuple[Stream, Stream]], legs: tuple[Stream, Stream]) -> None:
    reading = {source for source, sink in routes if not sink.pending}
    poll = select.poll()
    for leg in legs:
        events = (select.POLLIN if leg in reading else 0) | (select.POLLOUT if leg.pending else 0)
        if events:
            poll.register(leg.sock, events)
    poll.poll()
    for leg in legs:
        leg.flush()


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
