"""The service behind every tunnel: one port, TCP and UDP, and what a connection does is told by its first byte.

G  an HTTP request: a short answer, and the end when the request says ``Connection: close``
E  echo              S  sink: at the end, 8 bytes that say how many came              F  flood, until the user leaves
Run as a program it takes its port. Datagrams come back.
"""

import contextlib
import select
import socket
import sys

from processes import HOST, raise_descriptor_limit

CLOSE = b"Connection: close\r\n"
ANSWER, LAST_ANSWER = (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n%s\r\nhello" % header for header in (b"", CLOSE))
PIECE = 1 << 18  # bytes
READ, WRITE = select.EPOLLIN, select.EPOLLOUT
_buffer = memoryview(bytearray(PIECE))


class Connection:
    """One user, as the target sees it."""

    def __init__(self, sock: socket.socket, poll: select.epoll) -> None:
        self.sock, self._poll = sock, poll
        self._does = b""
        self._count = 0
        self._rest = b""

    def on_event(self, event: int) -> bool:
        """Do what can be done now; False when the connection is over."""
        with contextlib.suppress(BlockingIOError):
            return self._write() if event & WRITE else self._read()
        return True

    def _read(self) -> bool:
        count = self.sock.recv_into(_buffer)
        if not self._does:
            self._does = bytes(_buffer[:1])
        if not count:
            if self._does == b"S":
                self.sock.send(self._count.to_bytes(8, "big"))
            return False
        if self._does == b"S":
            self._count += count
        elif self._does == b"F":
            self._poll.modify(self.sock.fileno(), WRITE)
        elif self._does == b"E":
            self._send(bytes(_buffer[:count]))
        else:
            last = CLOSE in bytes(_buffer[:count])
            self._send(LAST_ANSWER if last else ANSWER)
            return not last
        return True

    def _send(self, data: bytes) -> None:
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        self._rest = data[sent:]
        if self._rest:  # nothing is read while the user does not read
            self._poll.modify(self.sock.fileno(), WRITE)

    def _write(self) -> bool:
        if self._does == b"F":
            self.sock.send(_buffer)
            return True
        self._send(self._rest)
        if not self._rest:
            self._poll.modify(self.sock.fileno(), READ)
        return True


def serve(port: int) -> None:
    """Serve TCP and UDP users until the process is ended."""
    raise_descriptor_limit()
    listener = socket.create_server((HOST, port), backlog=4096)
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    datagrams.bind((HOST, port))
    poll, connections = select.epoll(), {}
    for sock in (listener, datagrams):
        sock.setblocking(False)
        poll.register(sock.fileno(), READ)
    while True:
        for fd, event in poll.poll():
            if fd == listener.fileno():
                with contextlib.suppress(OSError):
                    while True:
                        sock = listener.accept()[0]
                        sock.setblocking(False)
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        connections[sock.fileno()] = Connection(sock, poll)
                        poll.register(sock.fileno(), READ)
            elif fd == datagrams.fileno():
                with contextlib.suppress(OSError):
                    while True:
                        datagrams.sendto(*datagrams.recvfrom(65536))
            else:
                try:
                    goes_on = connections[fd].on_event(event)
                except OSError:
                    goes_on = False
                if not goes_on:
                    poll.unregister(fd)
                    connections.pop(fd).sock.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
