"""Addresses that gave wrong proofs of the tunnel key, and how long each is kept out. Touches no socket.

The first few wrong proofs cost nothing: keys are mistyped and rotated. From ``penalty-after`` on each keeps the address
out, for ``penalty-first`` and then twice as long each time, up to ``penalty-longest``; it is forgotten when it has been
good for that long. Both tables are bounded, and a crowd of addresses with one wrong proof each, which are cheap to
have, cannot push those out that are kept out.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from .config import Limits

TABLE = 8192  # addresses in each table; about 2 MiB when full
MAX_DOUBLINGS = 40  # more is longer than any penalty can be


@dataclass(slots=True)
class _Offender:
    wrong: int  # proofs, in a row
    until: float  # it is kept out; past: it has been good since then


class Penalties:
    """Who is kept out, by address as ``net.origin_of`` gives it. ``exempt`` are addresses with a live session."""

    def __init__(
        self,
        limits: Limits,
        exempt: Callable[[str], object],
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._exempt = exempt
        self._log = log
        self._clock = clock
        self._suspects: dict[str, _Offender] = {}  # not kept out so far; both in the order of the last wrong proof
        self._punished: dict[str, _Offender] = {}

    def follow(self, before: "Penalties") -> None:
        """Go on where another one was."""
        self._suspects, self._punished = before._suspects, before._punished

    def report(self, origin: str) -> None:
        """Note a wrong proof from an address, and keep it out when that is one too many."""
        limits, now = self._limits, self._clock()
        if not limits.penalty_after or self._exempt(origin):
            return
        offender = self._suspects.pop(origin, None) or self._punished.pop(origin, None)
        if offender is None or now - offender.until > limits.penalty_longest_s:
            offender = _Offender(0, now)
        offender.wrong += 1
        doublings = offender.wrong - limits.penalty_after
        if doublings < 0:
            offender.until = now
            _keep(self._suspects, origin, offender)
            return
        penalty_s = min(limits.penalty_first_s * 2 ** min(doublings, MAX_DOUBLINGS), limits.penalty_longest_s)
        offender.until = now + penalty_s
        _keep(self._punished, origin, offender)
        self._log.warning(
            "address %s is kept out for %g s: wrong proofs of the tunnel key: %d", origin, penalty_s, offender.wrong
        )

    def keeps_out(self, origin: str) -> bool:
        """Whether a caller from this address is to be closed at once."""
        offender = self._punished.get(origin)
        return offender is not None and self._clock() < offender.until and not self._exempt(origin)

    def forgive(self, origin: str) -> None:
        """Forget an address that has proven the key."""
        self._suspects.pop(origin, None)
        self._punished.pop(origin, None)


def _keep(table: dict[str, _Offender], origin: str, offender: _Offender) -> None:
    """Note an address as the last one; the first one goes when there are too many."""
    table[origin] = offender
    if len(table) > TABLE:
        del table[next(iter(table))]
