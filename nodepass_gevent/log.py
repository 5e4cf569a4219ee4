"""Log lines: their form, their levels, and a writer that no slow reader of them can stall.

The form is the original's, ``2006-01-02 15:04:05.000  LEVEL  message``, on standard output, coloured on
a terminal unless NO_COLOR is set. Lines are handed to one native thread, which alone may block in
``write``; when it falls MAX_QUEUED lines behind, further ones are dropped, counted, and the count is said.
"""

import logging
import os
import sys
import time

import colorlog
from gevent import monkey

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}
MAX_QUEUED = 2000  # lines, about 200 KB
FLUSH_TIMEOUT_S = 1.0  # how long the end of the process waits for a slow reader

_COLORS = {"DEBUG": "blue", "INFO": "green", "WARN": "yellow", "ERROR": "red", "FATAL": "bold_red"}


class Writer(logging.Handler):
    """Format records where they are logged; write them to descriptor ``fd`` in a native thread."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._queue = monkey.get_original("queue", "SimpleQueue")()  # a native thread can wait on this one
        self._written = 0  # lines, by the thread
        self._queued = 0  # lines, by whoever logs
        self._dropped = 0
        monkey.get_original("_thread", "start_new_thread")(self._write_for_ever, ())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError, KeyError):  # a wrong log call must not end the greenlet that made it
            self.handleError(record)
            return
        if self._queued - self._written >= MAX_QUEUED:
            self._dropped += 1
            return
        if self._dropped:
            line += f"\n{self.formatTime()}  WARN  {self._dropped} log lines dropped: the reader of the log is too slow"
            self._dropped = 0
        self._queued += 1
        self._queue.put(line + "\n")

    def formatTime(self) -> str:
        now = time.time()
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now % 1 * 1000):03d}"

    def flush(self) -> None:
        """Wait until all lines are written, FLUSH_TIMEOUT_S at most."""
        end = time.monotonic() + FLUSH_TIMEOUT_S
        while self._written < self._queued and time.monotonic() < end:
            time.sleep(0.002)

    def _write_for_ever(self) -> None:
        while True:
            data = self._queue.get().encode("utf-8", "backslashreplace")
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:  # the reader is gone (EPIPE) or the disk is full: the tunnel goes on
                pass
            self._written += 1


def formatter(colored: bool) -> logging.Formatter:
    """Give the original's form; colour the level when ``colored``."""
    color, plain = ("%(log_color)s", "%(reset)s") if colored else ("", "")
    return colorlog.ColoredFormatter(
        f"%(asctime)s.%(msecs)03d  {color}%(levelname)s{plain}  %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        log_colors=_COLORS,
        reset=False,  # it stands in the form already, and where FORCE_COLOR is set a pipe would get it too
        no_color=not colored,
        force_color=colored,
    )


def setup(level: str) -> None:
    """Send this package's log lines of ``level`` (a key of LEVELS) and above to standard output."""
    for name, number in (("WARN", logging.WARNING), ("FATAL", logging.CRITICAL)):
        logging.addLevelName(number, name)
    logger = logging.getLogger(__package__)
    logger.propagate = False
    if not any(isinstance(handler, Writer) for handler in logger.handlers):
        writer = Writer(sys.stdout.fileno())
        writer.setFormatter(formatter(sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
        logger.addHandler(writer)
    set_level(level)


def set_level(level: str) -> None:
    """Change the level while running."""
    logging.getLogger(__package__).setLevel(LEVELS[level])


def flush() -> None:
    """Write out what is queued, before the process ends."""
    for handler in logging.getLogger(__package__).handlers:
        handler.flush()
