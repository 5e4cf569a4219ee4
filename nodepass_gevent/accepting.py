"""The accept loops of listeners: for who comes while they are open, and for who has called when they are closed."""

import array
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress

import gevent
from gevent.socket import wait_read

from .arrivals import Arrivals, Crowd
from .config import Limits
from .net import NONBLOCKING, scatter_keepalives
from .transport import READ, RawSocket, Stream

ACCEPT_BATCH = 64  # connections per wake-up, then everybody else has a turn
DEFAULT_LIMITS = Limits()

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # <asm-generic/socket.h>; not in Python's socket module
_NO_SYN = array.array(  # struct sock_filter: passes every segment but a SYN, the first one of a connection
    "Q",
    struct.pack(
        "=" + 5 * "HBBI",
        *(0x30, 0, 0, 13),  # load the byte of the TCP header that has the flags
        *(0x54, 0, 0, 0x12),  # SYN and ACK of them
        *(0x15, 0, 1, 0x02),  # SYN alone:
        *(0x06, 0, 0, 0),  # drop it
        *(0x06, 0, 0, 0xFFFFFFFF),
    ),
)


def serve(
    listener: RawSocket,
    handle: Callable[[Stream], object],
    on_pause: Callable[[Exception], None],
    room: Callable[[], int] = lambda: ACCEPT_BATCH,
    rest: Callable[[], object] = lambda: None,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Accept for ever and do nothing else. ``handle`` and ``room``, which says for how many, must not block.

    ``rest`` may: it is called behind ACCEPT_BATCH connections, and where there is no room. When accepting fails, or
    ``handle`` for want of memory, the loop pauses, longer each time, and tells ``on_pause`` why. Kill the greenlet
    before the listener is closed.
    """
    pause_s = limits.accept_pause_s
    accepted = ACCEPT_BATCH  # in a batch, whose keepalives fall together; full: the settings may be new
    crowd = Crowd()

    def accept_one() -> None:
        nonlocal accepted, pause_s
        handle(_accept(listener))
        accepted += 1
        pause_s = limits.accept_pause_s

    def accept_some() -> bool:
        places = min(room(), ACCEPT_BATCH - accepted)
        if places > 0:
            crowd.take(accept_one, places)
        return places > 0

    with closing(gevent.get_hub().loop.io(listener.fileno(), READ)) as arrival:
        arrivals = Arrivals(arrival.start, arrival.stop, accept_some, lambda: arrival.active)
        while True:
            if accepted >= ACCEPT_BATCH:
                scatter_keepalives(listener, limits)
                accepted = 0
            try:
                arrivals.run()
                rest()
            except ConnectionAbortedError:  # the caller is gone again
                pass
            except (OSError, MemoryError) as exc:
                on_pause(exc)
                gevent.sleep(pause_s)
                pause_s = min(pause_s * 2, limits.accept_pause_longest_s)


def migrates() -> bool:
    """Whether the kernel gives who waits for a shared listener that is closed to another one (``tcp_migrate_req``)."""
    try:
        with open("/proc/sys/net/ipv4/tcp_migrate_req") as setting:
            return setting.read().strip() == "1"
    except OSError:  # before Linux 5.14
        return False


def serve_last(
    listener: RawSocket, handle: Callable[[Stream], object], rest: Callable[[], object], diverted_s: float = 0
) -> None:
    """Accept who has called, before the listener is closed: who is in its queue then is reset.

    With ``diverted_s`` also those who are in the middle of calling and are through within that time. Who begins to call
    meanwhile gets no answer, and a second later, when the SYN comes again, another process that shares the port. Ends
    early when accepting fails.
    """
    if diverted_s:
        program = struct.pack("HP", len(_NO_SYN), _NO_SYN.buffer_info()[0])
        try:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        except OSError:  # not every kernel, or sandbox, has filters
            diverted_s = 0
    end = time.monotonic() + diverted_s
    while True:
        rest()
        try:
            caller = _accept(listener)
        except BlockingIOError:
            left_s = end - time.monotonic()
            if left_s <= 0:
                return
            with gevent.Timeout(left_s, False):
                wait_read(listener.fileno())
        except ConnectionAbortedError:
            pass
        except (OSError, MemoryError):
            return
        else:
            if diverted_s:
                with suppress(OSError):  # inherited, unless it was through before
                    caller.socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            with suppress(MemoryError):
                handle(caller)


def _accept(listener: RawSocket) -> Stream:
    descriptor, peer = listener._accept()  # type: ignore[attr-defined]  # what socket.accept() itself calls, without its wrapper
    try:
        sock = RawSocket(listener.family, NONBLOCKING, 0, descriptor)
    except MemoryError:
        socket.close(descriptor)
        raise
    sock.setblocking(False)
    return Stream(sock, peer)
