"""The HTTP server of ``status``: for eyes, Prometheus and health checks, and never at the cost of a tunnel.

Whoever asks may be slow, many or hostile: there are few connections at once, each for one small request and with a
deadline. What is answered, and how often, is for ``status_answers``.
"""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import gevent
from gevent import pywsgi
from gevent.pool import Group, Pool

from . import net
from .config import Limits
from .errors import ConnectError, reason
from .status import Status
from .status_answers import Application
from .values import Address

log = logging.getLogger(__name__)

CONNECTIONS = 32  # at once; further ones wait until one whose request does not come in time gives way
REQUEST_BYTES = 16384  # of a request with all its headers; a browser's has about 1,000
REQUEST_S = 5.0  # for the request to come and the answer to be read
ASK_S = 0.1  # for the request to come, where another caller waits
ACCEPT_PAUSE_S = 1.0  # without descriptors: tunnels need them more
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # while the port is taken
SAMPLE_S = 1.0
LIMITS = Limits()  # sockets have the options of any other
DESCRIPTORS = CONNECTIONS + 2  # the listener's, and that of who waits


class StatusServer:
    """Serves ``status`` on an address until it is stopped; a token, if there is one, opens it."""

    def __init__(self, address: Address, token: str | None, status: Status) -> None:
        self.address = address
        self.port = 0  # once it listens
        self._application = Application(address, token, status)
        self._status = status
        self._connections = Pool(CONNECTIONS)
        self._unread: dict[socket.socket, float] = {}  # connections without a request yet, and when they came, in order
        self._running = Group()

    def start(self) -> None:
        """Listen and serve, and look at the tunnels once a second, in greenlets."""
        self._running.spawn(self._run)
        self._running.spawn(self._sample)

    def stop(self) -> None:
        """Close everything."""
        self._running.kill()
        self._connections.kill()

    def _sample(self) -> None:
        while True:
            due = time.monotonic() + SAMPLE_S
            gevent.sleep(SAMPLE_S)
            try:
                self._status.sample(max(time.monotonic() - due, 0.0))
            except Exception as exc:  # a fault of ours is told, and the next second is another one
                log.error("status: unexpected error: %r", exc)

    def _run(self) -> None:
        """Serve as soon as the port can be had."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                with socket.socket(fileno=net.listen(self.address, LIMITS).detach()) as listener:
                    self.port = listener.getsockname()[1]
                    log.info("status: http://%s/", Address(self.address.host, self.port))
                    self._accept(listener)
            except (OSError, ConnectError, MemoryError) as exc:
                level = logging.WARNING if pause_s == FIRST_PAUSE_S else logging.DEBUG
                log.log(level, "status: %s; trying again, the tunnels go on", reason(exc))
            gevent.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _accept(self, listener: socket.socket) -> None:
        handler = partial(_Handler, lambda connection: self._unread.pop(connection, None))
        server = pywsgi.WSGIServer(listener, self._application, log=None, error_log=None, handler_class=handler)
        while True:
            try:
                connection, caller = listener.accept()
            except OSError as exc:  # no descriptor, no memory, or a caller that has left already
                log.debug("status: %s", reason(exc))
                gevent.sleep(ACCEPT_PAUSE_S)
                continue
            try:
                self._make_room()
                self._unread[connection] = time.monotonic()
                self._connections.spawn(self._serve, server, connection, caller)
            except (gevent.GreenletExit, MemoryError):
                self._unread.pop(connection, None)
                connection.close()
                raise

    def _make_room(self) -> None:
        """Wait for room; meanwhile cut those who have not asked in time, the oldest first."""
        while self._connections.full() and self._unread:
            oldest, came = next(iter(self._unread.items()))
            self._connections.wait_available(max(came + ASK_S - time.monotonic(), 0))
            gevent.sleep(0)  # what has arrived by now is read first
            if self._connections.full() and oldest in self._unread:
                self._cut(oldest)
                self._connections.wait_available()
        self._connections.wait_available()

    def _serve(self, server: pywsgi.WSGIServer, connection: socket.socket, caller: tuple) -> None:
        """Answer one request, in bounded time: whoever is too slow is cut."""
        cut = gevent.spawn_later(REQUEST_S, self._cut, connection)
        try:
            server.handle(connection, caller)
        except (OSError, ValueError) as exc:  # it has left, or its headers are no headers
            log.debug("status: a caller: %s", reason(exc))
        finally:
            cut.kill(block=False)
            self._unread.pop(connection, None)
            connection.close()

    def _cut(self, connection: socket.socket) -> None:
        self._unread.pop(connection, None)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class _Bounded:
    """What a caller sends; beyond REQUEST_BYTES it is at its end."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = REQUEST_BYTES

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def exhausted(self) -> bool:
        return self._left == 0

    def readline(self, size: int = -1) -> bytes:
        line = self._file.readline(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(line)
        return line


class _Handler(pywsgi.WSGIHandler):
    """A request that is not HTTP is answered 400, and nothing is printed. ``on_read`` is told when it is here."""

    def __init__(self, on_read: Callable[[Any], object], sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, address, server, _Bounded(sock.makefile("rb", -1)))
        self._on_read = on_read

    def read_request(self, raw_requestline: str) -> bool:
        read = super().read_request(raw_requestline)
        self._on_read(self.socket)
        if self.rfile.exhausted:
            raise ValueError("the request is too long")
        if self.headers and (self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers):
            raise ValueError("the request has a body")  # for which pywsgi would wait
        return read

    def _handle_client_error(self, _error: Exception) -> tuple[str, bytes]:
        return "400", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def handle_error(self, _kind: Any, value: Any, _trace: Any) -> None:
        log.debug("status: a caller: %s", reason(value))
        self.close_connection = True
