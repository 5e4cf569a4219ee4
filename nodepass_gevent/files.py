"""Files that may change, or become something else, while this process runs."""

import os


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
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
