"""The commands ``status`` and ``health``: ask a running process how it is."""

import http.client
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event

from .config import Process
from .deadlines import deadline
from .errors import ConfigError, reason
from .keyring import read_token
from .values import escaped, printable

ANSWER_S = 10.0  # a busy process lets others wait a little
MAX_ANSWER = 1 << 24  # bytes
OURS = "application/json", "text/plain"  # what the paths that are asked for answer
NOT_OURS = "answers, but not as the status address of this program"
WATCH_S = 1.0
MAX_LINE = 1000  # characters of what is printed
CLEAR = "\x1b[H\x1b[2J"
NO_HISTORY = "?since=1e12"  # no row is behind a time so far off


def status(process: Process, flags: frozenset[str], write: Callable[[str], int]) -> int:
    """Print how the process is, once, or again and again until SIGINT or SIGTERM; 1 when it cannot be asked.

    ``write`` gives what to end with where it cannot; 0 where it can.
    """
    watched, stop = "watch" in flags, Event()
    for number in (signal.SIGINT, signal.SIGTERM) if watched else ():
        gevent.signal_handler(number, stop.set)  # a KeyboardInterrupt may come where nobody passes it on
    on_screen = watched and bool(sys.stdout) and sys.stdout.isatty()  # None: it is closed
    while True:
        code, text = _look(process, as_json="json" in flags)
        known = code == http.client.OK
        clear = CLEAR if on_screen else ""
        if unwritten := write(f"{clear}{fit(text) if on_screen else text}\n" if known else clear):
            return unwritten
        if not known:
            print(f"nodepass: error: {text}", file=sys.stderr)
        if not watched or stop.wait(WATCH_S):
            return int(not known)


def health(process: Process, flags: frozenset[str], write: Callable[[str], int]) -> int:
    """Print in a line whether the process is alive, or, with --ready, whether it serves; 0 when it does, else 1."""
    code, body = _ask(process, "/readyz" if "ready" in flags else "/healthz")
    healthy = code == http.client.OK
    said = "; ".join(line.rstrip(".") for line in body.split("\n") if line)
    if not said:  # without its token
        said = "ready" if healthy else "not ready; who gives the token is told why"
    return write(f"{'healthy' if healthy else 'unhealthy'}: {said}\n") or int(not healthy)


def _look(process: Process, *, as_json: bool) -> tuple[int, str]:
    """Give the code of the answer, and how the process is; or why that is not known."""
    code, body = _ask(process, "/status.json" if as_json else f"/status.json{NO_HISTORY}")
    if as_json or code != http.client.OK:
        return code, body.rstrip()
    try:
        return code, _format(json.loads(body))
    except (ArithmeticError, LookupError, OSError, RecursionError, TypeError, ValueError):  # no JSON of ours
        return 0, f"{process.status}: {NOT_OURS}: {code}"


def _ask(process: Process, path: str) -> tuple[int, str]:
    """Give the code and the text of an answer, or 0 and why there is none; ConfigError when nobody is named."""
    if process.status is None:
        raise ConfigError(
            "status: whom to ask is not said; give --status, NODEPASS_STATUS, or --config with the file of the process"
        )
    token = read_token(process)
    address = process.status
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection(host, address.port)
    try:
        with deadline(ANSWER_S, "status"):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            if answer.status == http.client.NOT_FOUND or answer.headers.get_content_type() not in OURS:
                return 0, f"{address}: {NOT_OURS}: {answer.status}"
            text = answer.read(MAX_ANSWER).decode("utf-8", "replace")  # of whoever has that port now
            body = "\n".join(map(escaped, text.split("\n")))
            if answer.status == http.client.UNAUTHORIZED:
                why = "the token is wrong" if token else "a token is needed: give --status-token-file"
                body = f"{address}: {why}"
            return answer.status, body
    except ConnectionRefusedError as exc:
        return 0, f"{address}: {reason(exc)}; does a process with status={address} run?"
    except OSError as exc:
        return 0, f"{address}: {reason(exc)}"
    except http.client.HTTPException:
        return 0, f"{address}: answers, but not in HTTP: is it the status address?"
    finally:
        connection.close()


def _format(document: dict[str, Any]) -> str:
    """Format what /status.json says for a terminal."""
    lines = [
        document["words"],
        f"process {document['pid']} since {_clock(document['started'])}, {_clock(document['now'])} now",
        "",
    ]
    for tunnel in document["tunnels"]:
        lines += _format_tunnel(tunnel)
    events = list(map(_format_event, document["events"][-8:]))
    lines += ["recent events:", *events] if events else []
    return "\n".join(printable(line, MAX_LINE) for line in lines)


def fit(text: str) -> str:
    """Leave out what the terminal has no room for, so that the first line stays in sight."""
    columns, rows = shutil.get_terminal_size()
    return "\n".join(line[:columns] for line in text.split("\n")[: rows - 1])


def _format_event(event: dict[str, Any]) -> str:
    tunnel = f"[{event['tunnel']}] " if event["tunnel"] else ""
    return f"  {_clock(event['time'])} {event['level']:5} {tunnel}{event['message']}"


def _format_tunnel(tunnel: dict[str, Any]) -> list[str]:
    counters, first_byte = tunnel["counters"], tunnel["first_byte_s"]
    outside = f"public {tunnel['public']}" if tunnel["public"] else f"target {tunnel['target']}"
    lines = [f"{tunnel['name']}: {tunnel['condition']}", f"  {tunnel['role']} {tunnel['tunnel']}, {outside}"]
    for peer in tunnel["peers"]:
        pool = f"{peer['ready']} data connections ready"
        lines.append(f"  peer {peer['address']} since {_clock(peer['since'])}, profile v{peer['profile']}, {pool}")
    lines.append(f"  exchanges {tunnel['exchanges']} of {tunnel['exchanges_limit']}")
    for what, numbers in (("bytes", counters), ("per second", tunnel["per_second"])):
        lines.append(f"  {what} {_size(numbers['bytes_up'])} up, {_size(numbers['bytes_down'])} down")
    if first_byte["count"]:
        lines.append(
            f"  first byte after {first_byte['p50'] * 1000:.1f} ms (half), {first_byte['p95'] * 1000:.1f} ms (95 %)"
        )
    if tunnel["certificate"]:
        lines.append(f"  certificate until {time.strftime('%Y-%m-%d', time.gmtime(tunnel['certificate']['expires']))}")
    if tunnel["ended"]:
        lines.append(f"  last failure or end {_clock(tunnel['ended']['at'])}: {tunnel['ended']['why']}")
    return [*lines, ""]


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"
