"""Files that may change, or become something else, while this process runs."""

import errno
import os

_OF_THE_FILE = frozenset((errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENXIO))


def open_at_once(path: str, flags: int) -> int:
    """Be the ``opener`` of ``open``: to wait until somebody writes to a named pipe would stop all tunnels."""
    return os.open(path, flags | os.O_NONBLOCK)


def stamps(*paths: str | None) -> tuple:
    """Tell the content and permissions of files from those they had before, without reading them."""
    return tuple(map(_stamp, paths))


def _stamp(path: str | None) -> tuple:
    if path is None:
        return ()
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def may_pass(error: BaseException) -> bool:
    """Whether ``error`` comes from one of the system's that says nothing of a file: no descriptors, a disk that fails.

    Then it may be read the next time, though nothing of it has changed.
    """
    while error.__cause__:
        error = error.__cause__
    return isinstance(error, OSError) and error.errno not in _OF_THE_FILE
