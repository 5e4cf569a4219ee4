"""A long line: what goes in at one port comes out at another a while later, and a new connection takes its round trip.

Run as a program it takes both ports, and the milliseconds of one way.
"""

import asyncio
import contextlib
import sys
from collections.abc import Callable

from processes import HOST, raise_descriptor_limit

PIECE = 1 << 16  # bytes


class Line:
    """Carries connections to ``port``, all that they say ``delay_s`` late."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._port = port
        self._delay_s = delay_s

    async def carry(self, near: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        first = b""
        try:
            opening = asyncio.sleep(3 * self._delay_s)  # SYN, its answer, and the ACK with which the other side accepts
            with contextlib.suppress(asyncio.TimeoutError):
                first, _ = await asyncio.gather(asyncio.wait_for(near.read(PIECE), 3 * self._delay_s), opening)
            far, far_writer = await asyncio.open_connection(HOST, self._port)
        except OSError:
            near_writer.transport.abort()
            return
        far_writer.write(first)  # it has come with that ACK
        await asyncio.gather(self._carry(near, far_writer), self._carry(far, near_writer))
        await asyncio.sleep(2 * self._delay_s)
        for writer in (near_writer, far_writer):
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes one way; after a reset nothing comes."""
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                self._later(writer, lambda data=data: writer.write(data))
            self._later(writer, writer.write_eof)
            return
        self._later(writer, writer.transport.abort)

    def _later(self, writer: asyncio.StreamWriter, act: Callable[[], None]) -> None:
        def unless_gone() -> None:
            if not writer.is_closing():
                act()

        asyncio.get_running_loop().call_later(self._delay_s, unless_gone)


async def main() -> None:
    near, far, delay_ms = sys.argv[1:]
    raise_descriptor_limit()
    server = await asyncio.start_server(Line(int(far), float(delay_ms) / 1000).carry, HOST, int(near), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
