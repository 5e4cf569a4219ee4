"""The kernel's pipes, through which a bulky flow goes by ``splice``: its bytes never visit this process.

One user's bytes must never reach another: a pipe that holds some is closed, and only an empty one is kept.
"""

import errno
import fcntl
import os
import socket
import sys
from contextlib import suppress

SIZE = 262144  # bytes; what one splice moves
LEAST = 65536  # bytes; through a smaller one a flow goes slower than by copying
MAX_KEPT = 64  # of those in use ``Pipes.most`` is the bound

_FLAGS = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)


class Pipe:
    """A pipe between two sockets, which are named by descriptor. Its verbs do not wait: BlockingIOError."""

    __slots__ = ("_reader", "_writer", "held")

    def __init__(self) -> None:
        """Make one; OSError when there are no descriptors, or no memory for LEAST bytes."""
        self.held = 0  # bytes
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._enlarge() < LEAST:  # a user has his share of pipe memory, and beyond that gets two pages
            self.close()
            raise OSError(errno.ENOMEM, "there is no memory for a pipe")

    def _enlarge(self) -> int:
        """Ask for the size that is wanted; give the one that it has."""
        with suppress(OSError):
            return fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, SIZE)
        return fcntl.fcntl(self._writer, fcntl.F_GETPIPE_SZ)

    def fill(self, source: int) -> int:
        """Take what has come to ``source``; give its length, 0 at the end of stream. EINVAL: it cannot be spliced."""
        count = os.splice(source, self._writer, SIZE, flags=_FLAGS)
        self.held += count
        return count

    def drain(self, sink: int) -> int:
        """Give ``sink`` what is held, or a part of it; give its length.

        A part is no sign that it takes no more: a reset ends a splice early, and the kernel tells only who tries again.
        """
        sent = os.splice(self._reader, sink, self.held, flags=_FLAGS)
        self.held -= sent
        return sent

    def close(self) -> None:
        for descriptor in (self._reader, self._writer):
            socket.close(descriptor)  # at once: no watcher knows it, as gevent's own close has to suppose


class Pipes:
    """Empty pipes, kept for the next bulky flow."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[Pipe] = []
        self._made = 0
        self.most = sys.maxsize  # that there may be: users need descriptors more than bulky flows do

    def take(self) -> Pipe:
        """Give an empty pipe, or raise OSError."""
        if self._free:
            return self._free.pop()
        if not hasattr(os, "splice"):
            raise OSError(errno.ENOSYS, "there is no splice")
        if self._made >= self.most:
            raise OSError(errno.EMFILE, "there are as many pipes as there may be")
        pipe = Pipe()
        self._made += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Keep a pipe for another flow, or close it."""
        if pipe.held or len(self._free) >= self._limit:
            self._made -= 1
            pipe.close()
        else:
            self._free.append(pipe)


pipes = Pipes(MAX_KEPT)  # of this process
