"""The HTTP server of ``status``: for eyes, Prometheus and health checks, and never at the cost of a tunnel.

Whoever asks may be slow, many or hostile: there are few connections at once, each for one small request and with a
deadline, and what it takes to answer them is a small share of the time.
"""

import base64
import hashlib
import hmac
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import gevent
from gevent import pywsgi
from gevent.lock import Semaphore
from gevent.pool import Group, Pool

from . import net
from .config import Limits
from .errors import ConnectError, reason
from .exposition import CONTENT_TYPE, expose
from .status import Status
from .values import Address, is_literal

log = logging.getLogger(__name__)

CONNECTIONS = 32  # at once; further ones wait until one whose request does not come in time gives way
REQUEST_BYTES = 16384  # of a request with all its headers; a browser's has about 1,000
REQUEST_S = 5.0  # for the request to come and the answer to be read
ASK_S = 0.1  # for the request to come, where another caller waits
SHARE = 20  # answers take a twentieth of the time at most
LEAST_PAUSE_S = 0.01  # between two answers
ACCEPT_PAUSE_S = 1.0  # without descriptors: tunnels need them more
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # while the port is taken
SAMPLE_S = 1.0
LIMITS = Limits()  # sockets have the options of any other
DESCRIPTORS = CONNECTIONS + 2  # the listener's, and that of who waits
PLAIN, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"


class Answer(NamedTuple):
    """A status line, a body and its type, and further headers."""

    status: str
    body: bytes
    type: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


class StatusServer:
    """Serves ``status`` on an address until it is stopped; a token, if there is one, opens it."""

    def __init__(self, address: Address, token: str | None, status: Status) -> None:
        self.address = address
        self.port = 0  # once it listens
        self._application = _Application(address, token, status)
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
            except (OSError, ConnectError) as exc:
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
            except gevent.GreenletExit:
                connection.close()
                raise
            self._unread[connection] = time.monotonic()
            self._connections.spawn(self._serve, server, connection, caller)

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
        return self._took(self._file.readline(min(size, self._left) if size >= 0 else self._left))

    def read(self, size: int = -1) -> bytes:
        return self._took(self._file.read(min(size, self._left) if size >= 0 else self._left))

    def _took(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


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


class _Application:
    """The WSGI application: who may ask, for what, and how often."""

    def __init__(self, address: Address, token: str | None, status: Status) -> None:
        self._names = {"localhost", address.host.lower()}
        self._token = token
        self._status = status
        self._page, self._policy = _load_page()
        self._turn = Semaphore()  # one answer at a time
        self._next_at = 0.0
        self._routes: dict[str, Callable[[str], Answer]] = {
            "/": self._show_page,
            "/metrics": self._metrics,
            "/status.json": self._document,
            "/healthz": _alive,
            "/livez": _alive,
            "/readyz": self._ready,
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        answer = self._answer(environ)
        headers = [
            ("Content-Type", answer.type),
            ("Content-Length", str(len(answer.body))),
            ("Connection", "close"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Content-Security-Policy", self._policy),
            *answer.headers,
        ]
        start_response(answer.status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _answer(self, environ: dict[str, Any]) -> Answer:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return Answer("405 Method Not Allowed", b"GET and HEAD only\n", headers=(("Allow", "GET, HEAD"),))
        if not self._is_ours(environ.get("HTTP_HOST")):
            return Answer("421 Misdirected Request", b"ask by address: this name is not mine\n")
        path = environ["PATH_INFO"]
        route = self._routes.get(path)
        if route is None:
            return Answer("404 Not Found", b"there are /, /status.json, /metrics, /healthz, /livez, /readyz\n")
        known = self._token is None or self._is_token(environ.get("HTTP_AUTHORIZATION", ""))
        if not known and path in ("/metrics", "/status.json"):
            return Answer("401 Unauthorized", b"a token is needed\n", headers=(("WWW-Authenticate", "Bearer"),))
        answer = self._in_turn(route, environ["QUERY_STRING"])
        return answer if known or path != "/readyz" else answer._replace(body=b"")  # names are for who knows the token

    def _in_turn(self, route: Callable[[str], Answer], query: str) -> Answer:
        """Make an answer when it is time: what that takes is a small share of all time."""
        with self._turn:
            gevent.sleep(max(self._next_at - time.monotonic(), 0))
            began = time.monotonic()
            try:
                return route(query)
            except Exception as exc:  # a fault of ours is told, and ends this request alone
                log.error("status: unexpected error: %r", exc)
                return Answer("500 Internal Server Error", b"the log says more\n")
            finally:
                now = time.monotonic()
                self._next_at = now + max(SHARE * (now - began), LEAST_PAUSE_S)

    def _is_ours(self, host: str | None) -> bool:
        """Whether a request is meant for us: a browser may have been told a foreign name for our address.

        No token is with such a request, and so any name will do where there is one.
        """
        if host is None or self._token is not None:
            return True
        name = re.sub(r":[0-9]*\Z", "", host).strip("[]").lower()
        return is_literal(name) or name in self._names

    def _is_token(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        assert self._token
        right = hmac.compare_digest(token.strip().encode("latin-1"), self._token.encode())
        return right and scheme.lower() == "bearer"

    def _show_page(self, _query: str) -> Answer:
        return Answer("200 OK", self._page, HTML)

    def _metrics(self, _query: str) -> Answer:
        return Answer("200 OK", expose(self._status.snapshot(), lambda: gevent.sleep(0)), CONTENT_TYPE)

    def _document(self, query: str) -> Answer:
        try:
            since = float(parse_qs(query).get("since", ["0"])[0])
        except ValueError:
            return Answer("400 Bad Request", b"since is a Unix time\n")
        return Answer("200 OK", json.dumps(self._status.document(since)).encode() + b"\n", JSON)

    def _ready(self, _query: str) -> Answer:
        missing = self._status.snapshot().missing
        if not missing:
            return Answer("200 OK", b"ready\n")
        lines = "".join(f"{tunnel.name}: {tunnel.words}\n" for tunnel in missing)
        return Answer("503 Service Unavailable", f"not ready\n{lines}".encode())


def _alive(_query: str) -> Answer:
    return Answer("200 OK", b"ok\n")


def _load_page() -> tuple[bytes, str]:
    """Read the page, and allow a browser its own script and style, and nothing else."""
    page = resources.files(__package__).joinpath("page.html").read_bytes()

    def digests(tag: str) -> Iterator[str]:
        for text in re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL):
            yield f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    rules = (
        "default-src 'none'",
        f"script-src {' '.join(digests('script'))}",
        f"style-src {' '.join(digests('style'))}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return page, "; ".join(rules)
