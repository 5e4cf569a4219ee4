"""What is answered on the address of ``status``: who may ask, for what, and how often. Opens no connection."""

import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import gevent
from gevent.lock import Semaphore

from .exposition import CONTENT_TYPE, expose
from .status import Status
from .values import Address, is_literal

log = logging.getLogger(__name__)

SHARE = 20  # answers take a twentieth of the time at most
LEAST_PAUSE_S = 0.01  # between two answers
PLAIN, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"


class Answer(NamedTuple):
    """A status line, a body and its type, and further headers."""

    status: str
    body: bytes
    type: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


class Application:
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
