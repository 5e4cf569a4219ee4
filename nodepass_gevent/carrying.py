"""An exchange of TCP as both sides of a tunnel run it: counted all the while, and how it ends is passed on."""

import time
from collections.abc import Callable

import gevent

from .config import Config
from .log import Seldom
from .metrics import Counters
from .relay import Exchange
from .transport import Transport


def tell_full(full: Seldom, config: Config) -> None:
    """Warn that further users wait for a place among the exchanges."""
    full.warning("all places are taken, %d of semaphore-limit: further users wait", config.semaphore_limit)


def run(
    exchange: Exchange, idle_timeout_s: float, counters: Counters, on_kill: Callable[[BaseException], object]
) -> Exception | None:
    """Run an exchange to its end, its bytes being counted all the while."""
    traffic = exchange.traffic
    counters.running.add(traffic)
    try:
        return exchange.run(idle_timeout_s)
    except gevent.GreenletExit as exc:
        on_kill(exc)
        raise
    finally:
        counters.ended(traffic)


def observe_answer(counters: Counters, since: float) -> None:
    """Note how long the first answer of an exchange took; ``since``: monotonic."""
    counters.first_bytes.observe(time.monotonic() - since)


def conclude(
    user_side: Transport, target_side: Transport, error: BaseException, complete: tuple[bool, bool], counters: Counters
) -> None:
    """Count a failure, and pass that of one side on to the other as a reset.

    After a silence nothing is wrong with what was sent before. Who was sent all of it and its end gets no reset: that
    would throw away what is still on the way to a slow reader.
    """
    counters.exchanges_failed += 1
    silence = isinstance(error, TimeoutError) and error.errno is None
    for side, is_complete in zip((user_side, target_side), complete, strict=True):
        if not (silence and is_complete):
            side.reset()
