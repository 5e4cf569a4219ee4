"""How many lines of one kind are logged: a bound on what a flood can write. Touches no file.

A kind is a tunnel, a level and a message before its arguments are put in. Its first line opens a window of WINDOW_S;
what goes beyond the limit in it is held back and counted, and the count is said when the window ends.
"""

import logging
import time
from collections.abc import Callable

from gevent import monkey

WINDOW_S = 10.0

Kind = tuple[str, int, str]


class _Window:
    __slots__ = ("first", "held", "lines", "opened")

    def __init__(self, opened: float) -> None:
        self.opened = opened
        self.lines = 0  # that were admitted
        self.held = 0
        self.first = ""  # that is held back


class Limit:
    """Windows by kind. Asked by whoever logs, and by the native thread that says what was held back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second = 0  # lines of a kind, over a window; 0: no limit
        self.held = 0  # lines, ever
        self._clock = clock
        self._windows: dict[Kind, _Window] = {}  # the oldest first
        # Native, and reentrant: what the garbage collector ends meanwhile may log.
        self._lock = monkey.get_original("_thread", "RLock")()

    def admits(self, record: logging.LogRecord) -> bool:
        """Count a line; False when it is one too many of its kind. Lines with an ``event`` are not limited."""
        if not self.per_second or hasattr(record, "event"):
            return True
        kind = record.name, record.levelno, record.msg
        with self._lock:
            window = self._windows.get(kind)
            if window is None:
                window = self._windows[kind] = _Window(self._clock())
            if window.lines < self.per_second * WINDOW_S:
                window.lines += 1
                return True
            if not window.held:
                window.first = record.getMessage()
            window.held += 1
            self.held += 1
            return False

    def due_s(self) -> float | None:
        """Say how long the oldest window lasts still; None where there is none."""
        with self._lock:
            for window in self._windows.values():
                return max(window.opened + WINDOW_S - self._clock(), 0)
        return None

    def close(self, *, everything: bool = False) -> list[logging.LogRecord]:
        """Close the windows that have ended, or all; give a line for each in which something was held back."""
        records = []
        now = self._clock()
        with self._lock:
            for kind, window in list(self._windows.items()):
                age_s = now - window.opened
                if age_s < WINDOW_S and not everything:
                    break
                del self._windows[kind]
                if window.held:
                    records.append(_summary(kind, window, age_s))
        return records


def _summary(kind: Kind, window: _Window, age_s: float) -> logging.LogRecord:
    name, level, _ = kind
    text, arguments = "%d more like it in the last %.0f s, the first: %s", (window.held, max(age_s, 1), window.first)
    record = logging.LogRecord(name, level, "", 0, text, arguments, None)
    record.held_back = window.held
    return record
