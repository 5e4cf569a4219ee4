"""Command line of the benchmark. Everything on loopback, on ports found free, bounded in count and time."""

import argparse
import contextlib
import signal
import sys
import tempfile
from pathlib import Path

import comparison
import growth
import syscalls
import tunnels
from processes import raise_descriptor_limit


def main() -> int:
    options = _parse()
    raise_descriptor_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    mode = growth if options.growth else syscalls if options.syscalls else comparison
    return mode.run(options, sys.argv[1:])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure this tunnel beside others that are installed here, in rounds whose order rotates.",
        epilog="Nothing else should run on the machine; differences under 10 % mean nothing. "
        "--against HEAD shows the noise: the same code twice.",
    )
    names = [tunnel.name for tunnel in tunnels.ALL]
    add = parser.add_argument
    add("--rounds", type=_within(1, 20), default=3, help="1 to 20 (default: 3)")
    add("--seconds", type=_within(0.1, 30), default=2.0, help="length of one load, 0.1 to 30 (default: 2)")
    add("--only", type=_some(names), metavar="NAMES", help=f"tunnels, separated by commas, of {', '.join(names)}")
    add("--measure", type=_some([*comparison.MEASURES, *growth.FAMILIES]), metavar="NAMES",
        help=f"of {', '.join(comparison.MEASURES)}; with --growth of {', '.join(growth.FAMILIES)}")  # fmt: skip
    add("--against", metavar="REV", help="measure another commit, too; exit code 1 when this one is worse")
    add("--growth", action="store_true", help="how cost grows with exchanges, pool, datagrams and chunks")
    add("--most", type=_within(10, tunnels.MOST), default=4000, help="exchanges of --growth (default: 4000)")
    add("--syscalls", action="store_true", help="system calls per request and per new connection; needs strace")
    add("--out", type=Path, default=Path(tempfile.gettempdir()) / "nodepass-bench", metavar="DIR",
        help="where the tables and plots go (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    families = growth.FAMILIES if options.growth else comparison.MEASURES
    if options.measure and not set(options.measure) <= set(families):
        parser.error(f"--measure: one of {', '.join(families)}")
    if (options.growth or options.syscalls) and not set(options.only or ()) <= set(tunnels.OURS):
        parser.error(f"--only: one of {', '.join(tunnels.OURS)}")
    options.out = options.out.resolve()
    return options


def _within(low: float, high: float):
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = type(low)(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: not a number from {low} to {high}")

    return parse


def _some(names: list[str]):
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(names)}")
        return chosen

    return parse


if __name__ == "__main__":
    sys.exit(main())
