"""The budget of descriptors: what the tunnels of this process can need at most, and what they get.

Every user, data connection and caller is a descriptor, and a listener that finds none left can only let people wait. So
the limits are made to fit what the system allows before anything runs, all in the same proportion, and what was lowered
is told. Pipes, which only make bulky exchanges cheaper, get what is left.
"""

import fcntl
import os
import resource
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from .callers import most_candidates
from .config import Config, setting_name
from .errors import ConfigError

EVENT_LOOP = 4  # epoll, and how it is woken
LOOKED_AT = 1024  # where nothing tells which are open: at a start they are the lowest ones
PER_USER = 2  # the user or the target, and the data connection
LISTENERS, CONTROL = 4, 2  # tunnel, data, public twice; a control channel, and one that takes its place
LEAST = {"semaphore_limit": 4, "max_pool_capacity": 4, "callers": 4}  # below that it would be no service
WHOLE = 1000  # shares are per mille
_HINT = "raise the hard limit (ulimit -Hn, LimitNOFILE)"


@dataclass(frozen=True)
class Budget:
    """What fits: the tunnels with their limits, and what to tell about it."""

    configs: tuple[Config, ...]
    warnings: tuple[str, ...]
    most: int  # descriptors, without those of pipes
    pipes: int


def allowed() -> int:
    """Raise the soft limit of open files to the hard one, and give it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def taken() -> int:
    """Count the descriptors that are open already, and those that the event loop takes."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        numbers: Iterable[int] = map(int, os.listdir("/proc/self/fd"))
    except OSError:  # no /proc is there
        numbers = filter(_is_open, range(LOOKED_AT))
    return sum(number < most for number in numbers) + EVENT_LOOP  # higher ones do not count


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def make_room(count: int) -> None:
    """Let the kernel's table have room for ``count`` descriptors from now on.

    It grows by doubling, and of a process with threads each growth takes 7 to 20 ms in which nobody is served
    (``synchronize_rcu`` in Linux's fs/file.c): better before there is anybody.
    """
    with suppress(OSError), open(os.devnull) as any_file:  # where it cannot be had at once, it grows
        highest = fcntl.fcntl(any_file, fcntl.F_DUPFD_CLOEXEC, count - 1)
        os.closerange(highest, highest + 1)  # gevent's own close comes a turn of the event loop later


def plan(configs: Sequence[Config], allowed: int, taken: int) -> Budget:
    """Lower limits until all tunnels fit; ConfigError when not even the least does."""
    reserve = max(config.limits.descriptor_reserve for config in configs)
    room = allowed - taken - reserve

    def need(share: int) -> int:
        return sum(_need(_lowered(config, share)) for config in configs)

    if need(0) > room:
        least = need(0) + taken + reserve
        raise ConfigError(f"open files: {allowed} are allowed, and these tunnels need {least} at least; {_HINT}")
    share = bisect_right(range(WHOLE + 1), room, key=need) - 1
    lowered = tuple(_lowered(config, share) for config in configs)
    warnings = [_tell(before, after) for before, after in zip(configs, lowered, strict=True) if after != before]
    if warnings:
        wanted = need(WHOLE) + taken + reserve
        warnings.insert(0, f"open files: {allowed} are allowed, and {wanted} would be needed; {_HINT}")
    left = room - need(share)
    return Budget(lowered, tuple(warnings), allowed - left, left // 2)


def _need(config: Config) -> int:
    need = PER_USER * config.semaphore_limit + config.max_pool_capacity + CONTROL
    if config.role == "server":
        need += LISTENERS + 2 * config.limits.callers  # on the tunnel port, and held on the data port
        need += most_candidates(config.max_pool_capacity) if config.tls and config.serves_v1 else 0
    return need


def _lowered(config: Config, share: int) -> Config:
    """Give a tunnel its share of each limit, but no less than LEAST, or than was asked for where that is lower."""

    def part(name: str) -> int:
        value = config.value(name)
        return max(value * share // WHOLE, min(value, LEAST[name]))

    most = part("max_pool_capacity")
    return replace(
        config,
        semaphore_limit=part("semaphore_limit"),
        max_pool_capacity=most,
        min_pool_capacity=min(config.min_pool_capacity, most),
        limits=replace(config.limits, callers=part("callers")) if config.role == "server" else config.limits,
    )


def _tell(before: Config, after: Config) -> str:
    names = [name for name in (*LEAST, "min_pool_capacity") if after.value(name) != before.value(name)]
    changes = [f"{setting_name(name)} from {before.value(name)} to {after.value(name)}" for name in names]
    return f"{f'tunnel {before.name}: ' if before.name else ''}lowered: {', '.join(changes)}"
