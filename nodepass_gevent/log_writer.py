"""The writer of the log, which no slow reader and no full disk can stall: lines go to a native thread.

That thread alone may block in ``write``. When it falls MAX_QUEUED lines behind, further ones are dropped; they are
counted, as are those that could not be written, and both numbers are said once lines go out again. Until then an event
that is kept tells of it.
"""

import errno
import logging
import os
import queue
import time
from collections import deque
from typing import NamedTuple

from gevent import monkey

from .errors import reason
from .log_forms import place
from .log_limit import Limit
from .state import wall_clock

STREAMS = {"stdout": 1, "stderr": 2}
MAX_QUEUED = 2000  # lines, about 200 KB
FLUSH_TIMEOUT_S = 1.0  # how long the end of the process waits for a slow reader
RETRY_S = 0.01  # a pipe that somebody else has made non-blocking is full
RECENT = 100  # lines that are kept
MODE = 0o640
TELL_S = 60.0  # while lines are lost, an event tells so that often
TOO_SLOW = "the reader of the log is too slow"
BATCH = 200  # lines that are written at once: a busy event loop leaves the thread few moments


class Event(NamedTuple):
    """A line that was logged, for who shows what happened of late."""

    time: float  # seconds since the epoch
    level: str  # debug, info, warn, error or fatal
    tunnel: str  # empty for the process, and where the tunnel has no name
    message: str


class Dropped(NamedTuple):
    """Lines that are not in the log, since the start."""

    slow: int = 0  # the reader was too slow
    failed: int = 0  # writing failed: a full disk, a reader that is gone
    held_back: int = 0  # over log-rate
    why: str = ""  # of the last ones that were lost
    still: bool = False  # nothing has gone out since

    @property
    def lost(self) -> int:
        """Those that were to be written."""
        return self.slow + self.failed


class Writer(logging.Handler):
    """Format records where they are logged; write them to a stream or a file, in a native thread."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.limit = Limit()
        self.recent: deque[Event] = deque(maxlen=RECENT)
        self.to = to
        self._fd = _open(to)
        self._queue = monkey.get_original("queue", "SimpleQueue")()  # a native thread can wait on this one
        self._queued = 0  # by whoever logs
        self._done = 0  # by the thread
        self._slow = self._slow_said = 0
        self._failed = self._failed_said = 0
        self._failing, self._why = False, ""  # to write
        self._why_lost = ""  # empty: none were
        self._told_at: dict[str, float] = {}  # by why lines were lost
        self._torn = False  # the last line that was written has no end
        monkey.get_original("_thread", "start_new_thread")(self._write_for_ever, ())

    def dropped(self) -> Dropped:
        """Count the lines that were not written."""
        still = self._why_lost != "" and (self._failing or self._is_full())
        return Dropped(self._slow, self._failed, self.limit.held, self._why_lost, still)

    def on_terminal(self) -> bool:
        """Whether a person reads along."""
        return os.isatty(self._fd)

    def direct(self, to: str) -> None:
        """Write to another stream or file from now on, or to a new file of the same name; OSError changes nothing."""
        new = _open(to)
        os.dup2(new, self._fd, inheritable=False)  # at once, under the thread that writes: no line is cut in two
        os.close(new)
        self.to = to

    def reopen(self) -> None:
        """Open the file anew by its name; OSError, and then the old one goes on."""
        if self.to not in STREAMS:
            self.direct(self.to)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self.limit.admits(record):
                return
            line = self._format(record)
        except (TypeError, ValueError, KeyError):  # a wrong log call must not end the greenlet that made it
            self.handleError(record)
            return
        if self._is_full():
            self._slow += 1
            self._lose(TOO_SLOW)
            return
        self._put(line)

    def flush(self) -> None:
        """Wait until all lines are written, with what was held back, FLUSH_TIMEOUT_S at most."""
        self._put(None)
        end = time.monotonic() + FLUSH_TIMEOUT_S
        while self._done < self._queued and time.monotonic() < end:
            time.sleep(0.002)  # a thread writes, and could not wake who waits in the event loop

    def _is_full(self) -> bool:
        return self._queued - self._done >= MAX_QUEUED

    def _lose(self, why: str) -> None:
        """Note why lines are lost; the log cannot tell, and so an event does."""
        self._why_lost, now = why, time.monotonic()
        if now - self._told_at.get(why, -TELL_S) >= TELL_S:
            self._told_at[why] = now
            self.recent.append(Event(wall_clock(), "warn", "", f"log lines are lost: {why}"))

    def _put(self, line: str | None) -> None:
        self._queued += 1
        self._queue.put(line)

    def _format(self, record: logging.LogRecord) -> str:
        """Give the line of a record; what is no detail, nor of an exchange, is kept as an event, too."""
        tunnel = place(record)
        if record.levelno >= logging.INFO and not hasattr(record, "event"):
            self.recent.append(Event(record.created, record.levelname.lower(), tunnel, record.getMessage()))
        return self.format(record) + "\n"

    # In the thread

    def _write_for_ever(self) -> None:
        while True:
            taken = self._take()
            self._failed += self._write([line for line in taken if line is not None])
            self._write_notices(everything=None in taken)
            self._done += len(taken)

    def _take(self) -> list[str | None]:
        """Wait for a line, and take what is there with it; nothing when a window has ended."""
        try:
            taken = [self._queue.get(timeout=self.limit.due_s())]
        except queue.Empty:
            return []
        while len(taken) < BATCH and not self._queue.empty():
            taken.append(self._queue.get())
        return taken

    def _write_notices(self, *, everything: bool) -> None:
        """Write what was held back, and what is missing when lines go out again."""
        for record in self.limit.close(everything=everything):
            self._failed += self._write([self._format(record)])
        slow, failed = self._slow - self._slow_said, self._failed - self._failed_said
        if slow and not self._failing and self._queue.empty() and self._say(slow, f"dropped: {TOO_SLOW}"):
            self._slow_said += slow
        if failed and not self._failing and self._say(failed, f"could not be written: {self._why}"):
            self._failed_said += failed

    def _say(self, lines: int, what: str) -> bool:
        text, arguments = "%d log lines %s", (lines, what)
        record = logging.LogRecord(str(__package__), logging.WARNING, "", 0, text, arguments, None)
        record.dropped = lines
        return not self._write([self._format(record)])

    def _write(self, lines: list[str]) -> int:
        """Write lines at once, and give the number of those that could not be written."""
        if not lines:
            return 0
        encoded = [line.encode("utf-8", "backslashreplace") for line in lines]
        if self._torn:
            encoded[0] = b"\n" + encoded[0]
        whole = left = memoryview(b"".join(encoded))
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                monkey.get_original("time", "sleep")(RETRY_S)
            except OSError as exc:  # the tunnel goes on
                self._failing, self._why = True, reason(exc)
                self._lose(self._why)
                return self._count_missing(encoded, len(whole) - len(left))
        self._failing = self._torn = False
        return 0

    def _count_missing(self, lines: list[bytes], written: int) -> int:
        """Count the lines that are not among the bytes written, or not whole."""
        missing = len(lines)
        for line in lines:
            if written < len(line):
                break
            written -= len(line)
            missing -= 1
            self._torn = False
        self._torn = self._torn or written > 0
        return missing


def check(to: str) -> None:
    """Raise OSError where lines cannot be written to; opens nothing, as the reader of a pipe would see an end."""
    if to in STREAMS:
        return
    if os.path.isdir(to):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    place = to if os.path.exists(to) else os.path.join(os.path.dirname(to), ".")
    os.stat(place)
    if not os.access(place, os.W_OK):
        why = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(why, os.strerror(why))


def _open(to: str) -> int:
    """Open a stream or a file for appending; a named pipe without a reader is an OSError, not a wait."""
    if to in STREAMS:
        return os.dup(STREAMS[to])  # not inheritable
    return os.open(to, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, MODE)
