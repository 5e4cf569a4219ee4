"""System calls per request and per new connection, next to the fewest with which the protocol can do.

Each load runs twice under strace, with few and with many requests: the difference is theirs alone, without what a
start costs.
"""

import collections
import re
import tempfile
from argparse import Namespace
from pathlib import Path

import loads
import report
import tunnels
from processes import wait_until

Counts = collections.Counter

FEW, MANY = 200, 1200  # requests
BOUND_S = 60.0  # strace makes everything slow
USERS = 1, 32  # at once
SIDES = "server", "client"
# What each end cannot do without. A request: wait, read and write, in either direction.
LEAST_REQUEST = Counts({"epoll_wait": 2, "recv": 2, "send": 2})
# A connection, at the server: accept the user, write the launch, relay a request and its answer, read both ends of
# stream, pass one on, close both; accept a data connection for the next user, read who it is and answer.
LEAST_SERVER = Counts({
    "accept": 2, "epoll_ctl": 2, "epoll_wait": 4, "recv": 5, "send": 4, "shutdown": 1, "close": 2,
})  # fmt: skip
# At the client: read the launch, connect to the target, relay and end as above; dial a data connection, say who it is
# and read the answer.
LEAST_CLIENT = Counts({
    "socket": 2, "connect": 2, "epoll_ctl": 2, "epoll_wait": 5, "recv": 6, "send": 3, "shutdown": 1, "close": 2,
})  # fmt: skip
LEAST_HANDSHAKE = Counts({"recv": 1, "send": 1})  # TLS 1.3, more at either end
SAME = {
    "recvfrom": "recv", "recvmsg": "recv", "read": "recv", "sendto": "send", "sendmsg": "send", "write": "send",
    "writev": "send", "accept4": "accept", "epoll_pwait": "epoll_wait", "epoll_pwait2": "epoll_wait",
}  # fmt: skip


def run(options: Namespace, arguments: list[str]) -> int:
    """Count, print and write."""
    names = options.only or tunnels.OURS
    text = [report.conditions(arguments, [f"{MANY - FEW} requests each, counted by strace"])]
    for way in (tunnels.nodepass(tls) for tls in (0, 1)):
        if way.name not in names:
            continue
        handshake = LEAST_HANDSHAKE if way.name.endswith("tls") else Counts()
        for what, fresh, least in (
            ("request, kept alive", False, [LEAST_REQUEST] * 2),
            ("new connection with one request", True, [handshake + LEAST_SERVER, handshake + LEAST_CLIENT]),
        ):
            text.append(f"{way.name}: system calls per {what}\n\n{_table(_columns(way, fresh, least))}")
    whole = "\n\n".join(text)
    print(whole)
    report.write(options.out, "performance-syscalls", whole, None)
    return 0


def _columns(way: tunnels.Tunnel, fresh: bool, least: list[Counts]) -> dict[str, Counts]:
    columns = {}
    for users in USERS:
        for side, counts in zip(SIDES, _per_request(way, users, fresh), strict=True):
            columns[f"{side}, {users} user{'s' * (users > 1)}"] = counts
    return columns | {f"{side}, least": counts for side, counts in zip(SIDES, least, strict=True)}


def _per_request(way: tunnels.Tunnel, users: int, fresh: bool) -> list[Counts]:
    """Give the calls of server and client per request."""
    few, many = (_count(way, users, fresh, requests) for requests in (FEW, MANY))
    return [
        Counts({name: max(after[name] - before[name], 0) / (MANY - FEW) for name in after})
        for before, after in zip(few, many, strict=True)
    ]


def _count(way: tunnels.Tunnel, users: int, fresh: bool, requests: int) -> list[Counts]:
    with tempfile.TemporaryDirectory(prefix="nodepass-bench-") as directory:
        # -D: the tracer is the child, so that the pid we have is the tunnel's
        prefix = ["strace", "-D", "-f", "-qq", "-c", "-o", f"{directory}/{{role}}"]
        with tunnels.opened(way, prefix=prefix) as opened:
            result = loads.ask(opened.public, users, BOUND_S, fresh, requests)
            if result.count < requests:
                raise RuntimeError(f"{result.count:.0f} of {requests} requests were answered")
        files = [Path(directory, role) for role in SIDES]
        if not wait_until(lambda: all(file.exists() and "total" in file.read_text() for file in files), 10):
            raise RuntimeError("strace says nothing")
        return [_parse(file.read_text()) for file in files]


def _parse(summary: str) -> Counts:
    """Read what strace -c prints: share, seconds, microseconds a call, calls, perhaps errors, name."""
    counts = Counts()
    for calls, name in re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", summary, re.MULTILINE):
        if name != "total":
            counts[SAME.get(name, name)] += int(calls)
    return counts


def _table(columns: dict[str, Counts]) -> str:
    names = sorted({name for counts in columns.values() for name, count in counts.items() if count >= 0.05})
    rows = [["call", *columns], *([name, *(f"{counts[name]:.1f}" for counts in columns.values())] for name in names)]
    rows.append(["all", *(f"{sum(counts.values()):.1f}" for counts in columns.values())])
    return report.table(rows)
