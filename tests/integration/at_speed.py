"""Users and a target at full speed: random sizes, chunks and ends at once, and every byte checked at both ends.

A program of plain asyncio, run in processes of its own; each says at once, in a line that begins with WRONG, what
came otherwise than it was sent. The streams of an exchange are made from a seed that its user draws, so that bytes of
another user are told from its own wherever they turn up; comparing them all finds what a hash would, and says where.

    at_speed.py target                        prints its port, serves until it is ended
    at_speed.py users PORT SECONDS SEED       200 users at once, each comes again and again
    at_speed.py fairness PORT SECONDS         100 users who chat beside one that never stops sending
"""

import asyncio
import enum
import hashlib
import random
import socket
import struct
import sys
import time
from dataclasses import dataclass

HOST = "127.0.0.1"
AT_ONCE = 200  # users
CHATTY = 100
PERIOD = 65521  # bytes after which a stream repeats; a prime, so no buffer is as long
USUAL = 21  # log2 of bytes, at most
LARGE = 4 << 20, 12 << 20  # bytes; more than the kernel keeps on loopback when a reader is slow
EXCHANGE_S = 60.0  # none here needs more than a few
SMALL_BUFFER = 16384  # bytes that the kernel keeps for a reader, so that a slow one is felt by the tunnel
SLOW_PIECE, SLOW_PIECES, SLOW_S = 2048, 100, 0.01  # how a slow reader begins


class Course(enum.IntEnum):
    """What makes an exchange end, and which direction ends first."""

    BOTH_AT_ONCE = 0
    USER_ENDS_FIRST = 1  # the target answers after the user's end of stream
    TARGET_ENDS_FIRST = 2  # the user begins after the target's
    USER_RESETS = 3  # in the middle of its stream
    TARGET_RESETS = 4
    USER_LEAVES = 5  # after its own stream, and in the middle of the target's
    CHAT = 6  # the target sends back what comes, to the end


ENDLESS = 1 << 62  # bytes


@dataclass(frozen=True)
class Plan:
    """What user and target do in one exchange; it travels in front of the user's stream."""

    seed: bytes
    course: Course
    up: int  # bytes
    down: int  # at least one, or a lost exchange could pass for an empty one
    cut: int  # bytes after which who resets or leaves does so

    FORMAT = struct.Struct(">16sBQQQ")

    @classmethod
    def draw(cls, rng: random.Random) -> "Plan":
        course = rng.choice([*Course][: Course.CHAT])
        up, down = (rng.randint(*LARGE) if rng.random() < 0.05 else int(2 ** rng.uniform(0, USUAL)) for _ in range(2))
        return cls(rng.randbytes(16), course, up, down, rng.randrange(down if course >= Course.TARGET_RESETS else up))

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.seed, self.course, self.up, self.down, self.cut)

    @classmethod
    def unpack(cls, data: bytes) -> "Plan":
        seed, course, up, down, cut = cls.FORMAT.unpack(data)
        return cls(seed, Course(course), up, down, cut)

    def __str__(self) -> str:
        return f"{self.seed.hex()[:8]} {self.course.name} up {self.up} down {self.down} cut {self.cut}"


class Wrong(Exception):
    """Something arrived that was not sent, or did not arrive."""


class Stream:
    """The bytes of one direction of one exchange."""

    def __init__(self, seed: bytes, direction: bytes) -> None:
        self._twice = hashlib.shake_128(seed + direction).digest(PERIOD) * 2

    def piece(self, at: int, size: int) -> bytes:
        """Give at most ``size`` bytes of the stream."""
        at %= PERIOD
        return self._twice[at : at + min(size, PERIOD)]

    def check(self, at: int, data: bytes) -> None:
        for start in range(0, len(data), PERIOD):
            came = data[start : start + PERIOD]
            if came != self.piece(at + start, len(came)):
                expected = self.piece(at + start, len(came))
                first = next(i for i, pair in enumerate(zip(came, expected, strict=True)) if pair[0] != pair[1])
                raise Wrong(f"byte {at + start + first} and maybe more")


async def send(writer: asyncio.StreamWriter, stream: Stream, size: int, rng: random.Random) -> None:
    """Send in chunks of one kind, tiny to large, now and then with a pause."""
    largest = max(2 ** rng.randrange(18), size // 200)
    pausing = rng.random() < 0.3
    sent = 0
    while sent < size:
        piece = stream.piece(sent, min(size - sent, rng.randint(1, largest)))
        writer.write(piece)
        await writer.drain()
        sent += len(piece)
        if pausing and rng.random() < 0.05:
            await asyncio.sleep(0.002)


async def receive(reader: asyncio.StreamReader, stream: Stream, size: int, rng: random.Random) -> None:
    """Read just ``size`` bytes and check them; now and then, and more often of many, slowly at first."""
    slow = rng.random() < (0.8 if size >= LARGE[0] else 0.2)
    received = pieces = 0
    while received < size:
        data = await reader.read(min(size - received, SLOW_PIECE if slow else 1 << 18))
        if not data:
            raise Wrong(f"a clean end after {received} of {size} bytes")
        stream.check(received, data)
        received += len(data)
        pieces += 1
        if slow:
            await asyncio.sleep(SLOW_S)
            slow = pieces < SLOW_PIECES


async def at_end(reader: asyncio.StreamReader) -> None:
    if data := await reader.read(1):
        raise Wrong(f"a byte after the last, {data!r}")


def end(writer: asyncio.StreamWriter) -> None:
    try:
        writer.write_eof()
    except OSError as exc:  # what shutdown() says of a connection that was reset before
        raise ConnectionResetError(str(exc)) from exc


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def together(*jobs) -> None:
    """Run all; the first error ends the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def connect(port: int, buffer: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock = socket.socket()
    sock.setblocking(False)
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
    return await asyncio.open_connection(sock=sock, limit=buffer or 1 << 16)


async def use(port: int, rng: random.Random) -> int:
    """Be one user; give the number of bytes that were to go, both ways."""
    plan = Plan.draw(rng)
    reader, writer = await connect(port, rng.choice((0, SMALL_BUFFER)))
    up, down = Stream(plan.seed, b"up"), Stream(plan.seed, b"down")
    try:
        writer.write(plan.pack())
        await asyncio.wait_for(follow(plan, reader, writer, up, down, rng), EXCHANGE_S)
    except ConnectionError as exc:
        if plan.course is not Course.TARGET_RESETS:
            print(f"WRONG user {plan}: {exc!r}", flush=True)
    except (Wrong, asyncio.TimeoutError) as exc:
        print(f"WRONG user {plan}: {exc!r}", flush=True)
    else:
        if plan.course is Course.TARGET_RESETS:
            print(f"WRONG user {plan}: no reset", flush=True)
    finally:
        writer.close()
    return plan.up + plan.down


async def follow(plan: Plan, reader, writer, up: Stream, down: Stream, rng: random.Random) -> None:
    async def send_all() -> None:
        await send(writer, up, plan.up, rng)
        end(writer)

    async def receive_all() -> None:
        await receive(reader, down, plan.down, rng)
        await at_end(reader)

    if plan.course is Course.TARGET_ENDS_FIRST:
        await receive_all()
        await send_all()
    elif plan.course is Course.USER_RESETS:
        await send(writer, up, plan.cut, rng)
        reset(writer)
    elif plan.course is Course.USER_LEAVES:
        await together(send_all(), receive(reader, down, plan.cut, rng))
    else:
        await together(send_all(), receive_all())


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    plan = None
    try:
        head = await reader.read(1)
        if not head:  # somebody looked whether the way is open
            return
        head += await reader.readexactly(Plan.FORMAT.size - 1)
        plan = Plan.unpack(head)
        await answer(plan, reader, writer, random.Random(plan.seed))
    except ConnectionError as exc:
        if plan and plan.course not in (Course.USER_RESETS, Course.USER_LEAVES, Course.CHAT):
            print(f"WRONG target {plan}: {exc!r}", flush=True)
    except (Wrong, ValueError, EOFError) as exc:
        print(f"WRONG target {plan}: {exc!r}", flush=True)
    else:
        if plan.course is Course.USER_RESETS:
            print(f"WRONG target {plan}: no reset", flush=True)
    finally:
        writer.close()


async def answer(plan: Plan, reader, writer, rng: random.Random) -> None:
    up, down = Stream(plan.seed, b"up"), Stream(plan.seed, b"down")

    async def send_all() -> None:
        await send(writer, down, plan.down, rng)
        end(writer)

    async def receive_all() -> None:
        await receive(reader, up, plan.up, rng)
        await at_end(reader)

    if plan.course is Course.CHAT:
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
    elif plan.course is Course.USER_ENDS_FIRST:
        await receive_all()
        await send_all()
    elif plan.course is Course.TARGET_ENDS_FIRST:
        await send_all()
        await receive_all()
    elif plan.course is Course.TARGET_RESETS:
        await send(writer, down, plan.cut, rng)
        reset(writer)
    else:
        await together(send_all(), receive_all())


async def run_target() -> None:
    listener = socket.create_server((HOST, 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)  # those accepted inherit it
    server = await asyncio.start_server(serve, sock=listener, backlog=1024, limit=SMALL_BUFFER)
    print(f"port {listener.getsockname()[1]}", flush=True)
    await server.serve_forever()


async def run_users(port: int, seconds: float, seed: int) -> None:
    end = time.monotonic() + seconds
    done = moved = 0

    async def come_again(number: int) -> None:
        nonlocal done, moved
        rng = random.Random(seed * AT_ONCE + number)
        while time.monotonic() < end:
            moved += await use(port, rng)
            done += 1

    await asyncio.gather(*(come_again(number) for number in range(AT_ONCE)))
    print(f"done: {done} exchanges, {moved >> 20} MiB", flush=True)


async def open_chat(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect(port)
    writer.write(Plan(bytes(16), Course.CHAT, ENDLESS, ENDLESS, 0).pack())
    return reader, writer


async def run_fairness(port: int, seconds: float) -> None:
    """Chat, first alone and then beside a bulky user; say how often each was answered, and the longest wait."""
    chats = [await open_chat(port) for _ in range(CHATTY)]

    async def chat(reader, writer) -> tuple[int, float]:
        answered, longest, end = 0, 0.0, time.monotonic() + seconds
        while (asked := time.monotonic()) < end:
            writer.write(b"question")
            await reader.readexactly(8)
            longest = max(longest, time.monotonic() - asked)
            answered += 1
        return answered, longest

    async def all_chat() -> str:
        counts, waits = zip(*await asyncio.gather(*(chat(*each) for each in chats)), strict=True)
        return f"least {min(counts)} answers, longest wait {max(waits):.3f} s"

    print("alone:", await all_chat(), flush=True)
    reader, writer = await open_chat(port)
    moved = 0

    async def flood() -> None:
        while True:
            writer.write(bytes(1 << 18))
            await writer.drain()

    async def drain() -> None:
        nonlocal moved
        while data := await reader.read(1 << 18):
            moved += len(data)

    bulk = [asyncio.ensure_future(job) for job in (flood(), drain())]
    said = await all_chat()
    print(f"beside bulk: {said}, {moved >> 20} MiB", flush=True)
    for job in bulk:
        job.cancel()
    for _, each in [*chats, (reader, writer)]:
        reset(each)


def main(role: str, *arguments: str) -> None:
    if role == "target":
        asyncio.run(run_target())
    elif role == "users":
        port, seconds, seed = arguments
        asyncio.run(run_users(int(port), float(seconds), int(seed)))
    else:
        port, seconds = arguments
        asyncio.run(run_fairness(int(port), float(seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
