"""The tunnels side by side: in each round every measure on every tunnel, freshly started, in an order that rotates."""

import contextlib
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import loads
import report
import tunnels
from report import Measure

BASES = ("direct", "haproxy", "haproxy-tls")  # what the others are divided by
NOISE = 0.05  # medians that differ by less are the same
ROUNDS = 3  # with fewer, two ranges that do not overlap mean nothing
IDLE = 1000  # exchanges, to see what one costs in memory
LINE_MS = 50  # one way, between the two sides
PER_S = 200  # new users

Figures = dict[str, float]


def bulk(way: tunnels.Open, seconds: float) -> Figures:
    figures = {}
    for name, load, streams in (("up", loads.upload, 1), ("down", loads.download, 8)):
        before = way.cpu_s()
        result = load(way.public, streams, seconds)
        gigabytes = result.count / 1e9
        title = f"bulk, {streams} stream{'s' * (streams > 1)} {name}"
        figures[f"{title}, Gbit/s"] = result.rate * 8 / 1e9
        if way.ends and gigabytes:
            figures[f"{title}, CPU s per GB"] = (way.cpu_s() - before) / gigabytes
    return figures


def keepalive(way: tunnels.Open, seconds: float) -> Figures:
    loads.requests(way.public, 32, min(1.0, seconds))  # the pool has served them all once
    return _requests(way, "requests, 32 users kept alive", 32, seconds, False)


def connections(way: tunnels.Open, seconds: float) -> Figures:
    return _requests(way, "new connections, 16 users", 16, seconds, True)


def _requests(way: tunnels.Open, title: str, users: int, seconds: float, fresh: bool) -> Figures:
    before = way.cpu_s()
    result = loads.requests(way.public, users, seconds, fresh)
    figures = {f"{title}, per s": result.rate, f"{title}, p99 ms": result.waits_ms.get(99, 0.0)}
    if way.ends and result.count:
        figures[f"{title}, CPU us each"] = (way.cpu_s() - before) / result.count * 1e6
    return figures | {f"{title}, errors": result.errors}


def latency(way: tunnels.Open, seconds: float) -> Figures:
    result = loads.first_bytes(way.public, 300, 2 * seconds)
    title = "first byte of a fresh connection"
    figures = {f"{title}, p{p} ms": value for p, value in result.waits_ms.items()}
    return figures | {f"{title}, errors": result.errors}


def line(way: tunnels.Open, seconds: float) -> Figures:
    result = loads.newcomers(way.public, PER_S, 2 * seconds, seconds)
    title = f"first byte over a line of {2 * LINE_MS} ms, {PER_S} new users per s"
    figures = {f"{title}, p{p} ms": value for p, value in result.waits_ms.items()}
    return figures | {f"{title}, errors": result.errors}


def datagrams(way: tunnels.Open, seconds: float) -> Figures:
    result = loads.datagrams(way.public, 16, 1200, seconds)
    title = "datagrams of 1,200 bytes there and back, 16 sockets"
    return {f"{title}, per s": result.rate, f"{title}, errors": result.errors}


def memory(way: tunnels.Open, seconds: float) -> Figures:
    if not way.ends:
        return {}
    before = [end.rss_kib() for end in way.ends]
    with loads.idle_users(way.public, IDLE) as served:
        after = [end.rss_kib() for end in way.ends]
    title = "memory of an idle exchange"
    figures = {
        f"{title}, {side}, KiB": (now - then) / max(served, 1)
        for side, now, then in zip(("users' side", "target's side"), after, before, strict=True)
    }
    return figures | {f"{title}, errors": IDLE - served}


MEASURES: dict[str, Callable[[tunnels.Open, float], Figures]] = {
    "bulk": bulk, "keepalive": keepalive, "connections": connections,
    "latency": latency, "line": line, "datagrams": datagrams, "memory": memory,
}  # fmt: skip
MORE_IS_BETTER = ("Gbit/s", "per s")


def run(options: Namespace, arguments: list[str]) -> int:
    """Measure, print and write; 1 when something is worse than in the other commit."""
    notes = [f"load generator: {'wrk and our own' if loads.WRK else 'our own (wrk is not installed)'}"]
    with contextlib.ExitStack() as stack:
        ways = [each for each in tunnels.ALL if not options.only or each.name in options.only]
        for way in [each for each in ways if each.missing]:
            notes.append(f"{way.name} left out: {', '.join(way.missing)} not installed")
            ways.remove(way)
        if not ways:
            sys.exit("\n".join(notes))
        pairs = stack.enter_context(_other_commit(options.against, ways)) if options.against else {}
        ways += pairs.values()
        measured = _measure(options, ways, notes)
    names = [way.name for way in ways]
    bases = [*BASES, *(old.name for old in pairs.values())]
    text = [report.conditions(arguments, notes)]
    text += [measure.table(names, bases) for measure in measured.values()]
    changes = [change for new, old in pairs.items() for change in _changes(measured, new, old.name)]
    if pairs:
        found = "\n".join(f"- {change}" for change in changes) or "Nothing is outside the noise."
        text.append(f"Against {options.against}, {options.rounds} rounds\n\n{found}")
    print("\n\n".join(text))
    picture = report.Picture("Tunnels side by side: medians, and least to most")
    for measure in measured.values():
        picture.bars(measure, names)
    report.write(options.out, "performance-tunnels", "\n\n".join(text), picture)
    return int(any("worse" in change for change in changes))


def _measure(options: Namespace, ways: list[tunnels.Tunnel], notes: list[str]) -> dict[str, Measure]:
    measured: dict[str, Measure] = {}
    for turn in range(options.rounds):
        for name in options.measure or MEASURES:
            first = turn * 2 % len(ways)
            for way in ways[first:] + ways[:first]:
                if name == "datagrams" and not way.udp:
                    continue
                try:
                    with tunnels.opened(way, line_ms=LINE_MS if name == "line" else 0) as opened:
                        figures = MEASURES[name](opened, options.seconds)
                except (OSError, RuntimeError, subprocess.SubprocessError) as exc:
                    notes.append(f"{way.name}, {name}: {str(exc).strip() or type(exc).__name__}".replace("\n", " "))
                    continue
                _keep(measured, way.name, figures, notes)
                said = ", ".join(f"{title} {report.number(value)}" for title, value in figures.items())
                print(f"round {turn + 1} of {options.rounds}, {way.name}: {said}", file=sys.stderr)
    return measured


def _keep(measured: dict[str, Measure], name: str, figures: Figures, notes: list[str]) -> None:
    for title, value in figures.items():
        if title.endswith("errors"):
            if value:
                notes.append(f"{name}: {title}: {value:.0f}")
            continue
        measure = measured.setdefault(title, Measure(title, not title.endswith(MORE_IS_BETTER)))
        measure.values.setdefault(name, []).append(value)


def _changes(measured: dict[str, Measure], new: str, old: str) -> Iterator[str]:
    for measure in measured.values():
        if change := measure.change(old, new, NOISE, ROUNDS):
            before, after = measure.median(old), measure.median(new)
            figures = f"{report.number(before)} -> {report.number(after)}"
            yield f"{change}: {new}, {measure.title}: {figures}, {after / before:.2f} x"


@contextlib.contextmanager
def _other_commit(revision: str, ways: list[tunnels.Tunnel]) -> Iterator[dict[str, tunnels.Tunnel]]:
    """Check a commit out; give its tunnels by the name of ours."""
    git = ["git", "-C", str(tunnels.ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="nodepass-bench-") as directory:
        tree = Path(directory) / "tree"
        if subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=False).returncode:
            sys.exit(f"--against {revision}: git could not check it out")
        try:
            names = {way.name for way in ways}
            ours = [tunnels.nodepass(tls) for tls in (0, 1)]
            yield {
                way.name: tunnels.nodepass(tls, tree, f"@{revision}")
                for tls, way in enumerate(ours)
                if way.name in names
            }
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
