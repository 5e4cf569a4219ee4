"""Figures as tables in reStructuredText and as plots in SVG."""

import datetime
import html
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
FONT = 'font-family="sans-serif" font-size="11"'


def number(value: float) -> str:
    """Give two or three significant digits, and all of them before the point."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Give a simple table; the first row is the head, the first column is never empty."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = "  ".join("=" * width for width in widths)
    first, *rest = widths
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))])
        for row in rows
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def conditions(arguments: Sequence[str], more: Iterable[str]) -> str:
    """Say when, on what and how: without that a figure means nothing."""
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        models = []
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [
        f"- {now:%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores of {model}, Linux {platform.release()}, load average "
        f"{os.getloadavg()[0]:.2f} at the end",
        f"- Python {platform.python_version()}, gevent {version('gevent')}, pyOpenSSL {version('pyOpenSSL')}",
        f"- command: ``{shlex.join(['scripts/bench', *arguments])}``",
        *(f"- {line}" for line in more),
    ]
    return "\n".join(lines)


@dataclass
class Measure:
    """One quantity of all tunnels, round by round."""

    title: str
    less_is_better: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def table(self, names: Sequence[str], bases: Sequence[str]) -> str:
        """Give a row per tunnel, with ratios of medians to ``bases``."""
        bases = [base for base in bases if self.values.get(base)]
        rows = [["tunnel", "median", "min..max", *(f"/ {base}" for base in bases)]]
        for name in (name for name in names if self.values.get(name)):
            low, high, middle = min(self.values[name]), max(self.values[name]), self.median(name)
            ratios = [f"{middle / self.median(base):.2f}" if self.median(base) else "-" for base in bases]
            rows.append([name, number(middle), f"{number(low)}..{number(high)}", *ratios])
        better = "less" if self.less_is_better else "more"
        return f"{self.title} ({better} is better)\n\n{table(rows)}"

    def change(self, old: str, new: str, least: float, rounds: int) -> str | None:
        """Say "better" or "worse" when ``new`` is outside the noise: no round of one within those of the other."""
        before, after = self.values.get(old, []), self.values.get(new, [])
        if min(len(before), len(after)) < rounds or not self.median(old):
            return None
        apart = max(before) < min(after) or max(after) < min(before)
        if not apart or abs(self.median(new) / self.median(old) - 1) < least:
            return None
        return "worse" if (self.median(new) > self.median(old)) == self.less_is_better else "better"


@dataclass
class Curve:
    """One cost over size, per tunnel and size the values of all rounds."""

    title: str
    floor: float  # below it the cost cannot be told from nothing
    above_first: bool  # what counts is what is more than at the smallest size
    values: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def cost(self, name: str, size: int) -> float:
        values = self.values[name]
        base = statistics.median(values[min(values)]) if self.above_first else 0.0
        return statistics.median(values[size]) - base

    def per_unit(self, name: str) -> Iterator[tuple[int, float]]:
        """Give each size with its cost per unit, where that can be told from nothing."""
        for size in sorted(self.values[name]):
            cost = self.cost(name, size)
            if cost > 0 and cost >= self.floor:
                yield size, cost / size

    def steps(self, name: str) -> Iterator[tuple[int, float | None]]:
        """Give each size with its step, None where there is nothing to compare."""
        before = None
        for size in sorted(self.values[name]):
            cost = self.cost(name, size)
            known = before and before[1] > 0 and min(cost, before[1]) >= self.floor
            yield size, cost / before[1] / (size / before[0]) if known else None
            before = size, cost


class Picture:
    """An SVG of panels in two columns."""

    WIDTH, PANEL = 470, 12

    def __init__(self, title: str) -> None:
        self._parts = [f'<text x="{self.PANEL}" y="20" font-size="14" font-weight="bold">{html.escape(title)}</text>']
        self._top, self._row = 34.0, 0.0
        self._right = False

    def _place(self, height: float) -> tuple[float, float]:
        """Find the next free place; give its left and top."""
        if not self._right:
            self._top, self._row = self._top + self._row, 0.0
        left = self.PANEL + (self.WIDTH if self._right else 0)
        self._row = max(self._row, height)
        self._right = not self._right
        return left, self._top

    def _text(self, x: float, y: float, text: str, more: str = "") -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>')

    def bars(self, measure: Measure, names: Sequence[str]) -> None:
        """Draw a bar to each median, and a line from the least to the most."""
        shown = [name for name in names if measure.values.get(name)]
        left, top = self._place(34 + 18 * len(shown))
        better = "less" if measure.less_is_better else "more"
        self._text(left, top + 14, f"{measure.title} ({better} is better)", 'font-weight="bold"')
        scale = 260 / (max(max(measure.values[name]) for name in shown) or 1)
        for row, name in enumerate(shown):
            y, values = top + 22 + 18 * row, measure.values[name]
            colour = COLOURS[list(names).index(name) % len(COLOURS)]
            width = max(measure.median(name) * scale, 1)
            self._text(left + 110, y + 11, name, 'text-anchor="end"')
            self._parts.append(
                f'<rect x="{left + 116}" y="{y + 1}" width="{width:.1f}" height="13" fill="{colour}"/>'
                f'<path d="M{left + 116 + min(values) * scale:.1f} {y + 7.5}H{left + 116 + max(values) * scale:.1f}" '
                'stroke="#333"/>'
            )
            self._text(left + 122 + max(values) * scale, y + 11, number(measure.median(name)))

    def lines(self, title: str, x_name: str, series: dict[str, list[tuple[float, float]]]) -> None:
        """Draw curves on logarithmic axes."""
        left, top = self._place(226)
        self._text(left, top + 14, title, 'font-weight="bold"')
        points = [point for curve in series.values() for point in curve]
        if not points:
            self._text(left + 60, top + 40, "too little to be measured")
            return
        x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
        y_low, y_high = min(y for _, y in points), max(y for _, y in points)
        x, y = _Axis(x_low, x_high, left + 60, left + 430), _Axis(y_low, y_high, top + 176, top + 40)
        for tick in x.ticks():
            self._parts.append(f'<path d="M{x(tick):.1f} {top + 30}V{top + 180}" stroke="#ddd"/>')
            self._text(x(tick), top + 194, number(tick), 'text-anchor="middle"')
        for tick in y.ticks():
            self._parts.append(f'<path d="M{left + 56} {y(tick):.1f}H{left + 434}" stroke="#ddd"/>')
            self._text(left + 52, y(tick) + 4, number(tick), 'text-anchor="end"')
        self._text(left + 245, top + 210, x_name, 'text-anchor="middle"')
        for row, (name, curve) in enumerate(series.items()):
            colour = COLOURS[row % len(COLOURS)]
            drawn = [(x(a), y(b)) for a, b in curve]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in drawn)
            self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            self._parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in drawn]
            self._text(left + 64 + 120 * row, top + 28, name, f'fill="{colour}"')

    def svg(self) -> str:
        width, height = self.PANEL + 2 * self.WIDTH, self._top + self._row + self.PANEL
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" {FONT}>',
            '<rect width="100%" height="100%" fill="#fff"/>',
            *self._parts,
            "</svg>\n",
        ])  # fmt: skip


class _Axis:
    """A logarithmic scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._high = low, max(high, low * 10)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = math.log10(value / self._low) / math.log10(self._high / self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        powers = [10.0**exponent for exponent in range(-6, 10)]
        return [power for power in powers if self._low * 0.999 <= power <= self._high * 1.001]


def write(directory: Path, name: str, text: str, picture: Picture | None) -> None:
    """Write NAME.rst, and NAME.svg, which it shows."""
    directory.mkdir(parents=True, exist_ok=True)
    if picture:
        (directory / f"{name}.svg").write_text(picture.svg())
        text = f"{text}\n\n.. image:: {name}.svg"
    (directory / f"{name}.rst").write_text(f"{text}\n")
    print(f"\n{directory / name}.rst{' and .svg' if picture else ''} written", file=sys.stderr)
