"""Who may come in: networks that are allowed and denied, users per address, datagrams per address.

Decides by addresses alone, and before a byte is read. What no setting asks for costs nothing: the handler of
connections is then handed back as it is.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial

from . import log as logs
from .config import Config
from .metrics import Counters
from .net import origin_of
from .transport import Stream
from .values import Networks, unmapped

REMEMBERED = 4096  # addresses whose answer is kept; looking one up in ten networks takes about 10 µs
_BY_LISTS = "users from %s are kept out by allow-users or deny-users"
BUCKETS = 16384  # addresses whose datagrams are counted; about 4 MiB when full


class Lists:
    """Networks that are allowed and denied: deny wins, and where anything is allowed, nothing else is."""

    def __init__(self, allow: Networks | None, deny: Networks | None) -> None:
        self._allow, self._deny = allow, deny
        self.admits_all = allow is None and deny is None
        self.admits: Callable[[str], bool] = lru_cache(REMEMBERED)(self._look_up)  # by numeric host

    def _look_up(self, host: str) -> bool:
        address = unmapped(host)
        if self._deny is not None and address in self._deny:
            return False
        return self._allow is None or address in self._allow


class Rate:
    """Datagrams per second from each address, and as many at once; each address has a bucket, refilled by time.

    When there are too many addresses, the one that was silent for longest is forgotten. A bucket is full again after a
    second, so that nothing is lost unless all of them came within one.
    """

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # left, and when that was; in the order of the last datagram

    def __len__(self) -> int:
        return len(self._buckets)

    def takes(self, origin: str) -> bool:
        """Count a datagram of an address; False when it is one too many."""
        now = self._clock()
        left, at = self._buckets.pop(origin, (self._per_second, now))
        left = min(left + (now - at) * self._per_second, self._per_second)
        taken = left >= 1
        self._buckets[origin] = (left - taken, now)
        if len(self._buckets) > BUCKETS:
            del self._buckets[next(iter(self._buckets))]
        return taken


class Admission:
    """Guards of a server's ports. Each wraps what starts to serve somebody, or is that itself when all may come."""

    def __init__(self, config: Config, counters: Counters, clock: Callable[[], float] = time.monotonic) -> None:
        limits = config.limits
        log = logs.of(config.name)
        self._log, self._kept_out = log, logs.Seldom(log)
        self._clients = Lists(config.allow_clients, config.deny_clients)
        self._users = Lists(config.allow_users, config.deny_users)
        self._most = limits.users_per_address
        self._present: Counter[str] = Counter()  # users by address, of TCP and of UDP
        self._rate = Rate(limits.udp_rate_per_address, clock) if limits.udp_rate_per_address else None
        self._counters = counters

    def follow(self, before: "Admission") -> None:
        """Count the users of the one before with those of this one, in whose place it comes: they are here still."""
        self._present = before._present

    def guard_callers(
        self, start: Callable[[Stream], object], keeps_out: Callable[[str], bool] | None = None
    ) -> Callable[[Stream], object]:
        """Close callers from elsewhere at once, and those from addresses that ``keeps_out`` names."""
        if self._clients.admits_all and not keeps_out:
            return start

        def admit(caller: Stream) -> None:
            host = caller.peer[0]
            if not self._clients.admits(host):
                self._kept_out.warning("caller %s is kept out by allow-clients or deny-clients", caller)
            elif keeps_out and keeps_out(origin_of(host)):  # of which there was a warning
                self._log.debug("caller %s is kept out for its wrong proofs", caller)
            else:
                start(caller)
                return
            self._counters.callers_kept_out += 1
            caller.reset()

        return admit

    def guard_users(self, start: Callable[..., object]) -> Callable[[Stream], object]:
        """Reset TCP users from elsewhere at once, and those that are too many from their address.

        ``start(user, ended)`` must call ``ended()`` when the user has left.
        """
        if self._users.admits_all and not self._most:
            return start

        def admit(user: Stream) -> None:
            host = user.peer[0]
            if not self._users.admits(host):
                self._kept_out.warning(_BY_LISTS, host)
            elif self.enter(host):
                start(user, partial(self.leave, host))
                return
            self._counters.users_kept_out += 1
            user.reset()

        return admit

    def enter(self, host: str) -> bool:
        """Count a user in, who must ``leave``; False when there are too many from its address."""
        origin = origin_of(host)
        if self._most and self._present[origin] >= self._most:
            self._kept_out.warning("users from %s are kept out by users-per-address", host)
            return False
        self._present[origin] += 1
        return True

    def leave(self, host: str) -> None:
        """Count a user out."""
        origin = origin_of(host)
        self._present[origin] -= 1
        if not self._present[origin]:
            del self._present[origin]

    def admits_datagram(self, host: str) -> bool:
        """Whether a datagram from an address is taken; those that are not are counted."""
        if not self._users.admits(host):
            self._kept_out.warning(_BY_LISTS, host)
            self._counters.datagrams_kept_out += 1
        elif self._rate is not None and not self._rate.takes(origin_of(host)):
            self._counters.datagrams_dropped_rate += 1
        else:
            return True
        return False
