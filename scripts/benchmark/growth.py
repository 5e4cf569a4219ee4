"""How the cost of this tunnel grows: with exchanges, with the pool, with datagrams and with chunks.

A step from one size to the next is the factor by which the cost grows, divided by that by which the size does: 1 is
linear, less is better. Cost is that of both ends together.
"""

import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import loads
import report
import tunnels
from processes import wait_until

WORSE = 1.3  # a step that is larger than the noise
SETTLE_S = 10.0
REST_S = 2.5  # until what is done once for each connection that lasts is done

Costs = tuple[float, ...]


@dataclass(frozen=True)
class Family:
    """Sizes, what is measured at each, and the names of the costs that come of it."""

    unit: str
    sizes: tuple[int, ...]
    measure: Callable[[tunnels.Tunnel, int, float], Costs]
    curves: tuple[tuple[str, float, bool], ...]  # title, floor, above_first


def _idle_cpu_ms(way: tunnels.Open, seconds: float) -> float:
    """Give the milliseconds of processor time per second of doing nothing."""
    before = way.cpu_ns()
    time.sleep(seconds)
    return (way.cpu_ns() - before) / 1e6 / seconds


def exchanges(tunnel: tunnels.Tunnel, size: int, seconds: float) -> Costs:
    with tunnels.opened(tunnel) as way:
        memory, cpu = sum(end.rss_kib() for end in way.ends), way.cpu_ns()
        with loads.idle_users(way.public, size) as served:
            if served < size:
                raise RuntimeError(f"{served} of {size} exchanges were served")
            cpu = (way.cpu_ns() - cpu) / 1e6
            memory = sum(end.rss_kib() for end in way.ends) - memory
            time.sleep(REST_S)
            return memory, cpu, _idle_cpu_ms(way, seconds)


def pool(tunnel: tunnels.Tunnel, size: int, seconds: float) -> Costs:
    with tunnels.opened(tunnel, {"MIN_POOL_CAPACITY": str(size)}) as way:
        if not wait_until(lambda: way.client.descriptors() > size, SETTLE_S):
            raise RuntimeError(f"the pool has no {size} connections within {SETTLE_S:g} s")
        time.sleep(REST_S)
        memory, idle = sum(end.rss_kib() for end in way.ends), _idle_cpu_ms(way, seconds)
        before = way.cpu_ns()
        result = loads.requests(way.public, 16, seconds, fresh=True)
        return memory, idle, (way.cpu_ns() - before) / 1e3 / max(result.count, 1)


def datagrams(tunnel: tunnels.Tunnel, size: int, seconds: float) -> Costs:
    with tunnels.opened(tunnel) as way:
        return _cpu_us(way, loads.datagrams, way.public, 4, size, seconds)


def chunks(tunnel: tunnels.Tunnel, size: int, seconds: float) -> Costs:
    with tunnels.opened(tunnel) as way:
        return _cpu_us(way, loads.chunks, way.public, size, seconds)


def _cpu_us(way: tunnels.Open, load: Callable[..., loads.Result], *arguments: float) -> Costs:
    before = way.cpu_ns()
    result = load(*arguments)
    if not result.count or result.errors:
        raise RuntimeError(f"{result.count:.0f} answers, {result.errors} missing")
    return ((way.cpu_ns() - before) / 1e3 / result.count,)


FAMILIES = {
    "exchanges": Family("exchanges", (10, 100, 500, 1000, 2000, 4000), exchanges, (
        ("memory, KiB", 1024, False), ("CPU to open all, ms", 5, False),
        ("CPU while all are idle, ms per s", 1, False))),
    "pool": Family("connections in the pool", (1, 4, 16, 64, 256, 1024), pool, (
        ("memory beyond that of a pool of 1, KiB", 256, True), ("CPU while nothing happens, ms per s", 1, False),
        ("CPU per new user, us", 0, False))),
    "datagrams": Family("bytes in a datagram", (1, 16, 256, 1200, 4096, 16384, 65507), datagrams, (
        ("CPU per datagram there and back, us", 0, False),)),
    "chunks": Family("bytes in a chunk", (1, 64, 1024, 16384, 65536, 262144, 1048576), chunks, (
        ("CPU per chunk there and back, us", 0, False),)),
}  # fmt: skip


def run(options: Namespace, arguments: list[str]) -> int:
    """Measure, print and write; 1 when a step is worse than linear by more than the noise."""
    ways = [way for way in tunnels.ALL if way.name in (options.only or tunnels.OURS)]
    notes, text, worse = [], [], []
    picture = report.Picture("Growth: cost per unit; a line that does not rise is no worse than linear")
    for name in options.measure or FAMILIES:
        family = FAMILIES[name]
        curves = [report.Curve(*each) for each in family.curves]
        _fill(curves, family, ways, options, notes)
        for curve in curves:
            text.append(f"{curve.title}, over {family.unit}\n\n{_table(curve, family)}")
            worse += _worse(curve, family)
            series = {way: list(curve.per_unit(way)) for way in curve.values}
            picture.lines(f"{curve.title}, divided by {family.unit}", family.unit, series)
    verdict = "\n".join(f"- worse than linear: {line}" for line in worse) or "No step is worse than linear."
    whole = "\n\n".join([report.conditions(arguments, notes), *text, verdict])
    print(whole)
    report.write(options.out, "performance-growth", whole, picture)
    return int(bool(worse))


def _fill(
    curves: list[report.Curve], family: Family, ways: list[tunnels.Tunnel], options: Namespace, notes: list[str]
) -> None:
    sizes = family.sizes if family.unit != "exchanges" else [size for size in family.sizes if size <= options.most]
    for turn in range(options.rounds):
        for size in sizes:
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                try:
                    costs = family.measure(way, size, options.seconds)
                except (OSError, RuntimeError, subprocess.SubprocessError) as exc:
                    notes.append(f"{way.name}, {size} {family.unit}: {exc}".replace("\n", " "))
                    continue
                for curve, cost in zip(curves, costs, strict=True):
                    curve.values.setdefault(way.name, {}).setdefault(size, []).append(cost)
                said = ", ".join(
                    f"{curve.title} {report.number(cost)}" for curve, cost in zip(curves, costs, strict=True)
                )
                print(f"round {turn + 1}, {way.name}, {size} {family.unit}: {said}", file=sys.stderr)


def _table(curve: report.Curve, family: Family) -> str:
    rows = [["tunnel", family.unit, "cost", "min..max", "cost per unit", "step"]]
    for name, values in curve.values.items():
        for size, step in curve.steps(name):
            cost = curve.cost(name, size)
            base = statistics.median(values[size]) - cost
            spread = f"{report.number(min(values[size]) - base)}..{report.number(max(values[size]) - base)}"
            shown = f"{step:.2f}" if step is not None else "-"
            rows.append([name, f"{size:,}", report.number(cost), spread, report.number(cost / size), shown])
    return report.table(rows)


def _worse(curve: report.Curve, family: Family) -> Iterator[str]:
    for name in curve.values:
        for size, step in curve.steps(name):
            if step is not None and step > WORSE:
                yield f"{name}, {curve.title}, up to {size:,} {family.unit}: {step:.2f}"
