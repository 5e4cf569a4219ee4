"""The log of the process: its levels, a logger for each tunnel, and where the lines go.

A tunnel's lines come from a logger of its own, which has its own level and puts its name into each of them; what
concerns the whole process comes from the loggers of the modules.
"""

import logging
import os
import time

from .errors import reason
from .log_forms import TUNNEL, make_formatter
from .log_writer import Dropped, Event, Writer
from .values import shown_path

log = logging.getLogger(__name__)

SELDOM_S = 60.0
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}


class Seldom:
    """Warnings of what goes on and on: each ``message`` once a minute at most, and at level debug in between."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._warned_at: dict[str, float] = {}

    def warning(self, message: str, *args: object) -> None:
        now = time.monotonic()
        level = logging.DEBUG
        if now - self._warned_at.get(message, -SELDOM_S) >= SELDOM_S:
            self._warned_at[message], level = now, logging.WARNING
        self._logger.log(level, message, *args)


def of(tunnel: str) -> logging.Logger:
    """Give the logger of a tunnel, by its name."""
    return logging.getLogger(f"{TUNNEL}.{tunnel}" if tunnel else TUNNEL)


def setup(level: str, to: str = "stdout", form: str = "text", rate: int = 0) -> None:
    """Send log lines of ``level`` (a key of LEVELS) and above to a stream or a file; OSError, and all is as it was.

    Of one kind ``rate`` lines per second are logged, 0: all of them. May be called again, to change any of this.
    """
    for name, number in (("WARN", logging.WARNING), ("FATAL", logging.CRITICAL)):
        logging.addLevelName(number, name)
    logger = logging.getLogger(__package__)
    logger.propagate = False
    writer = _writer()
    if writer is None:
        writer = Writer(to)
        logger.addHandler(writer)
    elif writer.to != to:
        writer.direct(to)
    writer.setFormatter(make_formatter(form, colored=writer.on_terminal() and not os.environ.get("NO_COLOR")))
    writer.limit.per_second = rate
    set_level(level)


def set_level(level: str, tunnel: str = "") -> None:
    """Change the level while running: that of a tunnel with a name, or that of all the rest."""
    logger = of(tunnel) if tunnel else logging.getLogger(__package__)
    logger.setLevel(LEVELS[level])


def reopen() -> None:
    """Open the log's file anew: it was renamed, and its name is to be that of a new one."""
    if writer := _writer():
        try:
            writer.reopen()
        except OSError as exc:
            log.error("cannot open %s again, the old file stays in use: %s", shown_path(writer.to), reason(exc))


def flush() -> None:
    """Write out what is queued, before the process ends."""
    if writer := _writer():
        writer.flush()


def recent() -> list[Event]:
    """Give the last lines of level info and above that are no access lines, the oldest first."""
    writer = _writer()
    return list(writer.recent) if writer else []


def dropped() -> Dropped:
    """Count the lines that were not written, since the start."""
    writer = _writer()
    return writer.dropped() if writer else Dropped()


def _writer() -> Writer | None:
    handlers = logging.getLogger(__package__).handlers
    return next((handler for handler in handlers if isinstance(handler, Writer)), None)
