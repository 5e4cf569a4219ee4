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
STREAMS = {"stdout": sys.stdout, "stderr": sys.stderr}
MAX_QUEUED = 2000  # lines, about 200 KB
FLUSH_TIMEOUT_S = 1.0  # how long the end of the process waits for a slow reader

_COLORS = {"DEBUG": "blue", "INFO": "green", "WARN": "yellow", "ERROR": "red", "FATAL": "bold_red"}


class Writer(logging.Handler):
    """Format records where they are logged; write them to descriptor ``fd`` in a native thread."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.to = to
        self.fd = STREAMS[to].fileno() if to in STREAMS else _open(to)
        self._queue = monkey.get_original("queue", "SimpleQueue")()  # a native thread can wait on this one
        self._written = 0  # lines, by the thread
        self._queued = 0  # lines, by whoever logs
        self._dropped = 0
        self.lost = 0  # lines, dropped since the start
        monkey.get_original("_thread", "start_new_thread")(self._write_for_ever, ())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError, KeyError):  # a wrong log call must not end the greenlet that made it
            self.handleError(record)
            return
        if self._queued - self._written >= MAX_QUEUED:
            self._dropped += 1
            self.lost += 1
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

    def reopen(self) -> None:
        """Open the file of that name anew, and write there; OSError."""
        if self.to not in STREAMS:
            new = _open(self.to)
            os.dup2(new, self.fd, inheritable=False)  # at once, under the thread that writes
            os.close(new)

    def _write_for_ever(self) -> None:
        while True:
            data = self._queue.get().encode("utf-8", "backslashreplace")
            try:
                while data:
                    data = data[os.write(self.fd, data) :]
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


def setup(level: str, to: str = "stdout") -> None:
    """Send this package's log lines of ``level`` (a key of LEVELS) and above to a stream or a file; OSError."""
    for name, number in (("WARN", logging.WARNING), ("FATAL", logging.CRITICAL)):
        logging.addLevelName(number, name)
    logger = logging.getLogger(__package__)
    logger.propagate = False
    writers = _writers()
    if not any(writer.to == to for writer in writers):
        new = Writer(to)
        new.setFormatter(formatter(os.isatty(new.fd) and not os.environ.get("NO_COLOR")))
        logger.addHandler(new)
        for writer in writers:
            logger.removeHandler(writer)
            writer.close()
    set_level(level)


def reopen() -> None:
    """Open the log's file anew: it was renamed, and its name is to be that of a new one."""
    for writer in _writers():
        writer.reopen()


def lines_dropped() -> int:
    """Count the lines that the reader of the log has missed, being too slow."""
    return sum(writer.lost for writer in _writers())


def _writers() -> list[Writer]:
    return [handler for handler in logging.getLogger(__package__).handlers if isinstance(handler, Writer)]


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def set_level(level: str) -> None:
    """Change the level while running."""
    logging.getLogger(__package__).setLevel(LEVELS[level])


def flush() -> None:
    """Write out what is queued, before the process ends."""
    for handler in logging.getLogger(__package__).handlers:
        handler.flush()
