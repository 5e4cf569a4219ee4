"""Everything that reads foreign bytes, and inputs for it: what the fuzzer and the tests with hypothesis share.

A target takes bytes, may raise the errors it declares and no other, and is bounded in time and memory.
"""

import gc
import random
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from nodepass_gevent import (
    authentication,
    configfile,
    frames,
    hearing,
    keyring,
    metrics,
    opening,
    options,
    tls,
    url,
    wire,
)
from nodepass_gevent import log as logs
from nodepass_gevent.callers import Caller, Callers
from nodepass_gevent.config import Config
from nodepass_gevent.errors import ConfigError, KeyMismatch, NodePassError, PeerLeft, ProtocolError
from nodepass_gevent.opening import ClientProof, Hello, ServerProof, Welcome
from nodepass_gevent.transport import Transport
from nodepass_gevent.tunnel_key import Handshake, derive, parse_key
from nodepass_gevent.values import Address, parse_duration

LONGEST = 4096  # bytes of an input
SECONDS = 0.5  # for one input, on a machine that does other things, too; 1 ms is usual
KIB, KIB_PER_BYTE = 512, 1  # that an input may cost at its peak


@dataclass(frozen=True)
class Fuzzed:
    """Something that reads foreign bytes: examples of what it takes, and the errors it may raise."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    error: type[NodePassError] | tuple[type[Exception], ...]
    share: int = 10  # of the inputs


LINES = (
    b"",
    b"//8000#1",
    b"//off?v=2&n=AAAAAAAAAAAAAAAAAAAAAA&a=psk1&d=9000#2",
    b"//1024?v=2,3&n=AAECAwQFBgcICQoLDA0ODw#0",
    b"//name%20of?v=2&c=need,udp,fail#hello",
    b"//0123456789abcdef?v=2#data",
    b"//0123456789abcdef?c=need,udp&i=5&p=1024#welcome",
    b"//auth?n=AAAAAAAAAAAAAAAAAAAAAA&m=AAECAwQFBgcICQoLDA0ODw&c=need#c",
    b"//auth?s=AAAAAAAAAAA&m=AAECAwQFBgcICQoLDA0ODw&c=need&i=5&p=9#s",
    b"//0a1b2c3d?from=192.0.2.1%3A443#1",
    b"//0a1b2c3d?from=%5B2001%3Adb8%3A%3A1%5D%3A443#3",
    b"//0a1b2c3d#2",
    b"//17#need",
    b"//0a1b2c3d?why=refused#fail",
    b"//?#bye",
    b"//?why=busy#bye",
)
URLS = (
    b"server://0.0.0.0:10101/0.0.0.0:8080?log=info&tls=1",
    b"client://[2001:db8::1%25eth0]:10101/localhost:80?min-pool-capacity=4&max_pool_capacity=8",
    b"server://:10101/[::]:53?network=udp&report-interval=1h30m&tls=2&crt=/a%20b&key=c",
    b"client://key@host.example:1/x:2",
)
DURATIONS = (b"5s", b"1h30m0.5s", b"-1.5h", b"0", b"100ms", b"2562047h47m16.854775807s", "3\u00b5s".encode(), b"+.5m")
FILES = (
    b"[nodepass]\nlog = warn\n\n[tunnel web]\nurl = server://:1/:2 # why\ntls=1\n",
    b'url = "client://a:1/b:2"\nkey = "a ""quoted"" one" # comment\n; comment\n',
    b"\xef\xbb\xbf[tunnel a]\n[tunnel b]\r\nurl=\n",
)
KEYS = (
    b"np1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
    b"  correct horse battery staple\r\n",
    "gr\u00fc\u00dfe an alle, die zuh\u00f6ren".encode(),
    b"# the new one, the old one\n\nnp1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\ncorrect horse battery staple\n",
)

FRAMES = (
    b"".join(map(frames.format_frame, (b"", b"a", b"datagram" * 20, b"", b"cut")))[:-1],
    frames.format_frame(bytes(300)) * 10,
    (frames.MAX_DATAGRAM).to_bytes(2, "big") + bytes(1000),
    frames.format_frame(b"good") + (frames.MAX_DATAGRAM + 1).to_bytes(2, "big") + bytes(10),
)

ANSWERS = b"\n\n//0a1b2c3d?why=refused#fail\n//0a1b2c3d?why=%1b%ff#fail\n//ffffffff?why=gone#fail\n//x?y=z#later\n"
RECORDS = b"".join(b"\x17\x03\x03" + len(text).to_bytes(2, "big") + text for text in (b"", b"a", bytes(300), b"last"))

# One connection with a tunnel key, as both sides see it: of all bytes there are, only these prove anything.
ROOTS = tuple(derive(parse_key(f"np1:{letter * 42}A")) for letter in "AB")
FIRST, HELLO = b"//off?v=2&n=AAAAAAAAAAAAAAAAAAAAAA&a=psk1#1", b"//?v=2#hello"
EXPORTER, NONCE, SESSION, ID = bytes(range(32)), b"n" * 16, b"sessions", b"0a1b2c3d"
HANDSHAKES = tuple(Handshake(root, FIRST, HELLO, EXPORTER, NONCE) for root in ROOTS)
HANDSHAKE = HANDSHAKES[0]
SESSION_KEYS = HANDSHAKE.session_keys(SESSION)
CAPABILITIES = frozenset((b"need", b"udp"))
PROOFS = tuple(opening.format_client_proof(ClientProof(NONCE, each.client_tag, CAPABILITIES)) for each in HANDSHAKES)
ANSWER, OTHER_ANSWER = (
    opening.format_server_proof(ServerProof(each.server_tag(SESSION), Welcome(SESSION, CAPABILITIES, 5, 1024)))[:-1]
    for each in HANDSHAKES
)
DATA_TAG = SESSION + SESSION_KEYS.client_tag(EXPORTER)
DATA_ANSWER = ID + SESSION_KEYS.server_tag(ID, EXPORTER, DATA_TAG[len(SESSION) :])
UNPROVEN = (ProtocolError, KeyMismatch, ConnectionAbortedError)


class Said:
    """A TLS connection of which the peer says what is given, in pieces, and then ends it."""

    recv_exactly = Transport.recv_exactly

    def __init__(self, data: bytes) -> None:
        self._rest, self._piece = data, 1 + len(data) % 7 * 50

    def recv(self, size: int) -> bytes:
        piece, self._rest = self._rest[: min(size, self._piece)], self._rest[min(size, self._piece) :]
        return piece

    def sendall(self, data: bytes) -> None:
        pass

    def exporter(self, _label: bytes, _size: int) -> bytes:
        return EXPORTER


def keyed_server(data: bytes) -> object:
    """Be a server with a key to one caller: its hello in clear, its proof inside TLS; only the right two are taken."""
    line, _, inside = data.partition(b"\n")
    hello = opening.parse_opening(line)
    if not isinstance(hello, Hello) or hello.capabilities:
        raise ProtocolError("no hello of a client with a key")
    handshake, proof = authentication.verify(Said(inside), ROOTS, FIRST, line)
    assert line == HELLO and proof.nonce == NONCE
    assert proof.tag in [each.client_tag for each in HANDSHAKES]
    return handshake.session_keys(SESSION)


def keyed_client(line: bytes) -> object:
    """Be a client with a key that has proven it, and read the answer: a welcome has the right tag, or there is none."""
    welcome, keys = authentication.check_answer(HANDSHAKE, line)
    assert (keys is None) == isinstance(welcome, wire.Bye)
    if keys:
        assert keys.session == SESSION and keys.client_key == SESSION_KEYS.client_key
        assert opening.parse_server_proof(line).tag == HANDSHAKE.server_tag(SESSION)
    return welcome


def data_at_server(data: bytes) -> object:
    """Verify a data connection's tag: one of all is right."""
    tag_of = authentication.verify_data(Said(data), SESSION_KEYS)
    assert data.startswith(DATA_TAG)
    return tag_of(ID)


def data_at_client(data: bytes) -> object:
    """Verify the server's answer to it: the tag is of that id."""
    id = authentication.prove_data(Said(data), SESSION_KEYS)
    assert id == ID and data.startswith(DATA_ANSWER)
    return id


def unframed(data: bytes) -> object:
    """Cut a stream into datagrams, whole and in pieces: the same ones, or the same error, and all is accounted for."""
    whole, pieces = (outcome_of_frames(data, size) for size in (len(data) + 1, 1 + len(data) % 7))
    assert whole == pieces == walked(data)
    if whole is ProtocolError:
        raise ProtocolError("a frame too long")
    return whole


def walked(data: bytes) -> object:
    """Cut frames by the words of the protocol."""
    at, found = 0, []
    while len(size := data[at : at + 2]) == 2:
        end = at + 2 + int.from_bytes(size, "big")
        if end - at - 2 > 65507:
            return ProtocolError
        found += [data[at + 2 : end]] * (end <= len(data))
        at = end
    return found


def outcome_of_frames(data: bytes, size: int) -> object:
    cutter, found = frames.Frames(), []
    try:
        for at in range(0, len(data), size):
            found += map(bytes, cutter.feed(memoryview(data)[at : at + size]))
            assert len(cutter._rest) < frames.LENGTH + frames.MAX_DATAGRAM
    except ProtocolError:
        return ProtocolError
    return found


def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Read what an operator's terminal or file gives: any characters, bytes that are no UTF-8 as surrogates."""
    return lambda data: read(data.decode("utf-8", "surrogateescape"))


def first_line(data: bytes) -> object:
    first = opening.parse_first_line(data)
    return first, opening.offers_v2(first)


def in_pieces(data: bytes) -> object:
    """Cut a stream into lines, whole and in pieces: the same lines, or the same error, and little is held back."""
    whole, pieces = (outcome_of_lines(data, size) for size in (len(data) + 1, 1 + len(data) % 7))
    assert whole == pieces or ProtocolError in (whole, pieces)
    return whole


def outcome_of_lines(data: bytes, size: int) -> object:
    lines, found = wire.Lines(64), []
    try:
        for at in range(0, len(data), size):
            found += lines.feed(data[at : at + size])
            assert len(lines._rest) <= 64
    except ProtocolError:
        return ProtocolError
    return found


def signals(data: bytes) -> object:
    """Let a client obey: whatever comes, only whole launches reach its egress."""
    launched: list[bytes] = []
    egress = SimpleNamespace(launch=lambda launch: launched.append(launch.id))
    obeying = hearing.Signals(egress, metrics.Counters(), logs.of(""), wire.Lines(), lambda: None)
    for at in range(0, len(data), 97):
        obeying.receive(data[at : at + 97])
    assert all(re.fullmatch(b"[0-9a-f]{8}", id) for id in launched)
    return launched


def answers(data: bytes) -> object:
    """Let a server hear what its client says: only launches that run are ended, and in words for the log."""
    ended: list[str] = []
    running = SimpleNamespace(
        abort=lambda error: ended.append(str(error)) or len(ended) % 2, lose=lambda error: ended.append(str(error))
    )
    hearing_client = hearing.Answers({b"0a1b2c3d": running}, metrics.Counters(), logs.of(""))
    for at in range(0, len(data), 97):
        hearing_client.receive(data[at : at + 97])
    assert all(why.isprintable() and len(why) < 4 * wire.MAX_LINE for why in ended)
    return ended


def records(data: bytes) -> object:
    """Find where TLS records end in a stream, whole and in pieces: the same places as by the words of RFC 8446."""
    whole, pieces = (ends_of_records(data, size) for size in (len(data) + 1, 1 + len(data) % 7))
    at, ends = 0, []
    while len(header := data[at : at + 5]) == 5:
        at += 5 + int.from_bytes(header[3:], "big")
        ends += [at] * (at <= len(data))
    assert whole == pieces == ends
    return ends


def ends_of_records(data: bytes, size: int) -> list[int]:
    stream, ends = tls.TLSStream(None, None), []
    for at in range(0, len(data), size):
        piece = data[at : at + size]
        tls._raw[: len(piece)] = piece
        ends += [at + end for end in stream._ends_of_records(len(piece))]
    return ends


def callers(data: bytes) -> object:
    """Let callers come and go in any order: the table keeps its limit and nobody is evicted twice."""
    table, present = Callers(8), []
    for byte in data:
        if byte % 3 == 0 and present:
            table.remove(present.pop(byte % len(present)))
            continue
        caller = Caller(str(byte % 5), None)
        evicted = table.add(caller)
        present.append(caller)
        if evicted:
            present.remove(evicted)
        assert len(table) == len(present) <= 8
    return len(present)


def command_line(data: bytes) -> object:
    """Read a command: arguments, an environment and no file."""
    words = data.decode("utf-8", "surrogateescape").split("\0")
    environ = dict(zip(("SEMAPHORE_LIMIT", "REPORT_INTERVAL"), words[2:], strict=False))
    return options.parse(words[:2], environ)


def config(data: bytes) -> object:
    """Make a Config of what parses: the checks of values together."""
    number = int.from_bytes(data[:2], "big") - 5
    tunnel = url.parse_url(data[2:].decode("utf-8", "surrogateescape"))
    made = Config(role=tunnel.role, tunnel=tunnel.tunnel, target=tunnel.target, tls=number % 4, semaphore_limit=number)
    return made.url


TARGETS = {
    "line": Fuzzed(wire.parse_line, LINES, ProtocolError),
    "first line": Fuzzed(first_line, LINES, ProtocolError),
    "opening": Fuzzed(opening.parse_opening, LINES, ProtocolError),
    "data line": Fuzzed(opening.parse_data, LINES, ProtocolError),
    "welcome": Fuzzed(opening.parse_welcome, LINES, ProtocolError),
    "signal": Fuzzed(wire.parse_signal, LINES, ProtocolError),
    "id": Fuzzed(wire.parse_id, (b"0a1b2c3d",), ProtocolError, 2),
    "lines": Fuzzed(in_pieces, tuple(b"\n".join(LINES[at:]) + b"\n" for at in range(4)), ProtocolError, 4),
    "signals obeyed": Fuzzed(signals, tuple(b"\n".join(LINES[at:]) + b"\n" for at in range(4)), ProtocolError, 4),
    "answers heard": Fuzzed(answers, (ANSWERS, *LINES[-5:]), (ProtocolError, PeerLeft), 4),
    "records": Fuzzed(records, (RECORDS, RECORDS[:-1], RECORDS[1:]), ProtocolError, 4),
    "callers": Fuzzed(callers, (bytes(range(60)),), ProtocolError, 2),
    "unknown protocol": Fuzzed(opening.recognise, (*LINES, b"GET / HTTP/1.1", b"SSH-2.0"), ProtocolError, 2),
    "log": Fuzzed(wire.printable, LINES, ProtocolError, 2),
    "url": Fuzzed(text(url.parse_url), URLS, ConfigError),
    "address": Fuzzed(text(Address.parse), (b"host:1", b"[::1%eth0]:80", b":0", b"1.2.3.4:65535"), ConfigError),
    "duration": Fuzzed(text(parse_duration), DURATIONS, ConfigError),
    "config file": Fuzzed(text(lambda words: configfile.parse(words, "file")), FILES, ConfigError),
    "tunnel key": Fuzzed(text(parse_key), KEYS[:3], ConfigError, 4),
    "key file": Fuzzed(text(keyring._parse), KEYS, ConfigError, 4),
    "client's proof": Fuzzed(opening.parse_client_proof, (*(each[:-1] for each in PROOFS), *LINES), ProtocolError),
    "server's proof": Fuzzed(opening.parse_server_proof, (ANSWER, *LINES), ProtocolError),
    "keyed server": Fuzzed(keyed_server, tuple(HELLO + b"\n" + each for each in PROOFS), UNPROVEN),
    "keyed client": Fuzzed(keyed_client, (ANSWER, OTHER_ANSWER, b"//?why=busy#bye"), UNPROVEN),
    "data at server": Fuzzed(data_at_server, (DATA_TAG,), UNPROVEN, 4),
    "data at client": Fuzzed(data_at_client, (DATA_ANSWER, DATA_ANSWER + b"user"), UNPROVEN, 4),
    "frames": Fuzzed(unframed, FRAMES, ProtocolError),
    "config": Fuzzed(config, tuple(b"\0\x06" + each for each in URLS), ConfigError, 4),
    "command line": Fuzzed(command_line, tuple(each + b"\0--log=warn\x008\x005s" for each in URLS), ConfigError, 1),
}


class Broken(AssertionError):
    """A target did what it must not; the text has the input."""


def check(name: str, data: bytes, measure_memory: bool = False) -> bool:
    """Feed one input to one target; say whether it was taken, and raise Broken for what must not happen."""
    if measure_memory:
        # Twice, as the interpreter's table of interned strings (2 MiB and more) may double under any input, once.
        peak = min(_peak(name, data) for _ in range(2))
        if peak > 1024 * (KIB + KIB_PER_BYTE * len(data)):
            raise Broken(f"{name}: took {peak >> 10} KiB for {data!r}")
    return _feed(name, data)


def _peak(name: str, data: bytes) -> int:
    """Feed one input; return the bytes that it took at its peak."""
    gc.collect()
    tracemalloc.start()
    try:
        _feed(name, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _feed(name: str, data: bytes) -> bool:
    target, taken, problem = TARGETS[name], True, ""
    began = time.process_time()
    try:
        target.read(data)
    except target.error as exc:
        taken = False
        if not str(exc).isprintable() or len(str(exc)) >= 1024:
            problem = f"its error is no line: {exc!s:.2000}"
    except Exception as exc:
        raise Broken(f"{name}: {exc!r} for {data!r}") from exc
    taken_s = time.process_time() - began
    if taken_s > SECONDS:
        problem = f"took {taken_s:.2f} s"
    if problem:
        raise Broken(f"{name}: {problem} for {data!r}")
    return taken


PIECES = [bytes([byte]) for byte in b'\n\r\0#?&=%@[]:" \xff'] + [b"%2", b"//", b"\xc3\x28"]


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """Change an example a little: bits, pieces, cuts, repeats."""
    data = bytearray(seed)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.choice(PIECES)
            case 2:
                del data[at : at + rng.randrange(8)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(20)] * rng.randrange(1, 30)
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(6))
            case 5:
                data[at:] = data[at:][::-1]
            case 6:
                data[at:at] = b"%d" % rng.choice((0, 1, 65535, 65536, 2**31, 2**63, 10**30))
    return bytes(data[:LONGEST])


def random_input(name: str, rng: random.Random) -> bytes:
    """Make an input: mostly something that is nearly right."""
    seeds = TARGETS[name].seeds
    match rng.randrange(10):
        case 0:
            return rng.randbytes(rng.randrange(64))
        case 1:
            return bytes(rng.choices(b'/?&=#%0123456789abcdef:.-@[]~A \n"', k=rng.randrange(200)))
        case 2:
            return mutated(rng.choice(seeds) + rng.choice(seeds), rng)
        case 3 if rng.randrange(20) == 0:
            return (rng.choice(PIECES) * LONGEST)[:LONGEST]
        case _:
            return mutated(rng.choice(seeds), rng)


def schedule(count: int, rng: random.Random) -> Iterator[str]:
    """Give ``count`` names of targets, each by its share."""
    names = list(TARGETS)
    return iter(rng.choices(names, [TARGETS[name].share for name in names], k=count))


def main(count: int, seed: int) -> None:
    """Feed ``count`` inputs; say the seed first and how it went last."""
    print(f"fuzz: {count} inputs, seed {seed}", flush=True)
    rng, began = random.Random(seed), time.monotonic()
    fed = dict.fromkeys(TARGETS, 0)
    taken = dict.fromkeys(TARGETS, 0)
    for number, name in enumerate(schedule(count, rng), start=1):
        fed[name] += 1
        taken[name] += check(name, random_input(name, rng), measure_memory=number % 1000 == 0)
        if number % 100_000 == 0:
            print(f"{number} inputs, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{'target':<18}{'inputs':>9}{'taken':>9}")
    for name in TARGETS:
        print(f"{name:<18}{fed[name]:>9}{taken[name]:>9}")
    print(f"fuzz: {count} inputs, none broke anything; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(1_000_000, random.getrandbits(32))[len(given) :])
