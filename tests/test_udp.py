import errno
import itertools
import socket
from contextlib import closing

import gevent
import pytest
from support import BOUND_S, bounded, endpoint_of, wait_until

from nodepass_gevent import udp
from nodepass_gevent.config import Address
from nodepass_gevent.frames import MAX_DATAGRAM
from nodepass_gevent.net import bind, ports_drawn
from nodepass_gevent.udp import BATCH, MEMORY_PAUSE_S, REFUSALS, PublicSocket, TargetSocket

FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


def user(family=socket.AF_INET):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(BOUND_S)
    return sock


def echo(datagram, reply):
    reply(datagram)


def public_socket(host, port=0):
    return PublicSocket(bind(Address(host, port), socket.SOCK_DGRAM))


@pytest.fixture
def serve(spawn):
    """Serve a public socket; give it."""
    opened = []

    def start(host, handle=echo):
        public = public_socket(host)
        opened.append((public, spawn(public.serve, handle)))
        return public

    yield start
    for public, greenlet in opened:
        greenlet.kill()
        public.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_datagram_is_answered(serve, host):
    port = serve(host).port
    with user(FAMILIES[host]) as sock:
        sock.sendto(b"hello", (host, port))
        answer, (source, *_) = sock.recvfrom(100)
    assert (answer, source) == (b"hello", host)


@pytest.mark.parametrize(
    ("listener", "asked"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.2"),
        ("0.0.0.0", "127.0.0.3"),
        ("", "127.0.0.2"),
        ("::", "127.0.0.3"),
        ("::", "::1"),
    ],
)
def test_a_reply_leaves_from_the_address_that_was_asked(serve, listener, asked):
    port = serve(listener).port
    with user(socket.AF_INET6 if ":" in asked else socket.AF_INET) as sock:
        sock.connect((asked, port))  # takes answers from there alone
        sock.send(b"hello")
        assert sock.recv(100) == b"hello"


def test_replies_in_any_order_leave_from_the_address_each_was_asked_at(serve):
    asked = []
    port = serve("", lambda datagram, reply: asked.append((datagram, reply))).port
    with user() as one, user() as two, bounded():
        one.connect(("127.0.0.2", port))
        two.connect(("127.0.0.3", port))
        one.send(b"one")
        two.send(b"two")
        wait_until(lambda: len(asked) == 2)
        for datagram, reply in reversed(asked):
            reply(datagram.upper())
        assert (one.recv(100), two.recv(100)) == (b"ONE", b"TWO")


def test_the_user_can_be_named_in_a_log_line(serve):
    asked = []
    port = serve("127.0.0.1", lambda datagram, reply: asked.append(str(reply))).port
    with user() as sock:
        sock.sendto(b"x", ("127.0.0.1", port))
        wait_until(lambda: asked)
        assert asked == [f"127.0.0.1:{sock.getsockname()[1]}"]


@pytest.mark.parametrize("size", [0, 1, 8192, 8193, MAX_DATAGRAM])
def test_a_datagram_of_any_size_is_carried_whole(serve, size):
    port = serve("127.0.0.1").port
    data = bytes(range(256)) * 256
    with user() as sock:
        sock.sendto(data[:size], ("127.0.0.1", port))
        assert sock.recv(65536) == data[:size]


def test_each_datagram_is_handled_for_itself_and_in_order(serve):
    seen = []
    port = serve("127.0.0.1", lambda datagram, reply: seen.append(datagram)).port
    with user() as sock:
        for number in range(200):
            sock.sendto(b"%d" % number, ("127.0.0.1", port))
        wait_until(lambda: len(seen) == 200)
    assert seen == [b"%d" % number for number in range(200)]


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_serving_goes_on_after_a_reply_that_nobody_takes(serve, host):
    port = serve(host).port
    with user() as sock:
        sock.bind(("127.0.0.1", 0))  # before the others come, or it may have the port of one, and its reply
        for _ in range(20):
            with user() as gone:
                gone.sendto(b"x", ("127.0.0.1", port))
        sock.sendto(b"still here", ("127.0.0.1", port))
        assert sock.recv(100) == b"still here"


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_reply_that_the_network_refuses_is_an_error_for_its_sender_and_ends_nothing(serve, host):
    errors = []

    def too_long(datagram, reply):
        try:
            reply(datagram * 70_000)
        except OSError as exc:
            errors.append(exc.errno)
            reply(datagram)

    port = serve(host, too_long).port
    with user() as sock:
        sock.sendto(b"x", ("127.0.0.1", port))
        assert sock.recv(100) == b"x"
    assert errors == [errno.EMSGSIZE]


def test_serving_goes_on_when_the_handler_lets_a_network_error_through(serve):
    def handle(datagram, reply):
        if datagram == b"bad":
            raise OSError(errno.ENETUNREACH, "network is unreachable")
        reply(datagram)

    port = serve("127.0.0.1", handle).port
    with user() as sock:
        for datagram in (b"bad", b"good"):
            sock.sendto(datagram, ("127.0.0.1", port))
        assert sock.recv(100) == b"good"


class WithoutMemory:
    """A socket that cannot receive, however often it is tried, until there is ``memory``."""

    def __init__(self, sock, error):
        self.sock, self.error, self.tries, self.memory = sock, error, 0, False

    def recvfrom_into(self, buffer):
        self.tries += 1
        if self.memory:
            return self.sock.recvfrom_into(buffer)
        raise self.error

    def __getattr__(self, name):
        return getattr(self.sock, name)


def test_a_public_socket_that_the_event_loop_lacks_the_memory_to_watch_is_not_deaf_for_ever(spawn, deaf):
    public, watcher = public_socket("127.0.0.1"), deaf(udp)
    with user() as sock, closing(public):
        serving = spawn(public.serve, echo)
        wait_until(lambda: watcher.watches == 2)
        sock.sendto(b"x", ("127.0.0.1", public.port))
        assert sock.recv(100) == b"x"
        serving.kill()


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "out of memory"), MemoryError()])
def test_without_memory_it_receives_with_pauses_and_goes_on_when_there_is_some(spawn, error):
    public = public_socket("127.0.0.1")
    poor = public._socket = WithoutMemory(public._socket, error)
    with user() as sock, closing(public):
        sock.sendto(b"x", ("127.0.0.1", public.port))
        serving = spawn(public.serve, echo)
        gevent.sleep(3 * MEMORY_PAUSE_S)
        assert 1 <= poor.tries <= 4
        poor.memory = True
        assert sock.recv(100) == b"x"
        serving.kill()


def test_a_flood_of_datagrams_lets_others_have_their_turn(serve):
    """Each datagram is answered by another one to the same socket, so that it never runs empty."""
    handled = 0
    with user() as sock:

        def again(datagram, reply):
            nonlocal handled
            handled += 1
            if handled < 2000:
                sock.sendto(datagram, ("127.0.0.1", port))

        port = serve("127.0.0.1", again).port
        for _ in range(100):
            sock.sendto(b"x", ("127.0.0.1", port))
        seen = [0]
        while seen[-1] < 2000:
            gevent.sleep(0)
            seen.append(handled)
    assert max(after - before for before, after in itertools.pairwise(seen)) <= BATCH


def test_an_address_in_use_is_named_in_the_error(serve):
    port = serve("127.0.0.1").port
    with pytest.raises(OSError, match=f"127.0.0.1:{port}") as caught:
        public_socket("127.0.0.1", port)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_closed_public_socket_frees_its_port(no_leaks):
    first = public_socket("127.0.0.1")
    port = first.port
    first.close()
    public_socket("127.0.0.1", port).close()


@pytest.mark.parametrize(("asked", "answered"), [(1, 0), (2, 1)])
def test_a_port_from_which_was_asked_in_vain_is_no_later_sockets_where_a_late_answer_would_come_to_another_user(
    asked, answered
):
    drawn = len(ports_drawn())
    if drawn < 4000:
        pytest.skip("the kernel draws from few ports")
    with closing(user()) as target:
        target.bind(("127.0.0.1", 0))
        ports = []
        for _ in range(min(drawn // 8, 2000)):  # by chance alone dozens would come twice
            with TargetSocket(endpoint_of(target)) as sock, bounded():
                for _ in range(asked):
                    sock.push(b"question")
                    _, address = target.recvfrom(100)
                for _ in range(answered):
                    target.sendto(b"answer", address)
                    sock.recv()
            ports.append(address[1])
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_target_answers(no_leaks, host):
    with user(FAMILIES[host]) as target:
        target.bind((host, 0))
        with TargetSocket(endpoint_of(target)) as sock, bounded():
            sock.send(b"question")
            question, tunnel = target.recvfrom(100)
            target.sendto(b"answer", tunnel)
            assert (question, sock.recv()) == (b"question", b"answer")


@pytest.mark.parametrize("size", [0, 1, 65507])
def test_an_answer_of_any_size_is_read_whole(no_leaks, size):
    data = bytes(range(256)) * 256
    with user() as target:
        target.bind(("127.0.0.1", 0))
        with TargetSocket(endpoint_of(target)) as sock, bounded():
            sock.send(b"question")
            target.sendto(data[:size], target.recvfrom(100)[1])
            assert sock.recv() == data[:size]


def test_a_target_that_does_not_listen_is_an_error_at_once(no_leaks):
    with closing(user()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = endpoint_of(nobody)
    with TargetSocket(endpoint) as sock, bounded():
        sock.send(b"question")
        with pytest.raises(ConnectionRefusedError):
            sock.recv()


def test_an_answer_of_somebody_else_is_not_taken_for_the_targets(no_leaks):
    with user() as target, user() as stranger:
        target.bind(("127.0.0.1", 0))
        with TargetSocket(endpoint_of(target)) as sock, bounded():
            sock.send(b"question")
            _, tunnel = target.recvfrom(100)
            stranger.sendto(b"forged", tunnel)
            target.sendto(b"true", tunnel)
            assert sock.recv() == b"true"


def test_a_target_without_a_route_leaves_no_descriptor(no_leaks):
    with pytest.raises(OSError):
        TargetSocket(endpoint_of_broadcast())


def endpoint_of_broadcast():
    """An address that connect refuses: a UDP socket may not send to broadcast unless it says so."""
    with user() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        return endpoint_of(sock)._replace(sockaddr=("255.255.255.255", port))


def test_a_silent_target_is_given_up_at_the_callers_deadline(no_leaks):
    with user() as target:
        target.bind(("127.0.0.1", 0))
        with TargetSocket(endpoint_of(target)) as sock:
            sock.send(b"question")
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.02):
                sock.recv()


def test_a_user_is_the_same_for_all_datagrams_from_its_address_to_one_of_ours(serve):
    asked = []
    port = serve("", lambda datagram, reply: asked.append((datagram, reply))).port
    with user() as one, user() as two:
        for sock, host in ((one, "127.0.0.1"), (one, "127.0.0.1"), (one, "127.0.0.2"), (two, "127.0.0.1")):
            sock.sendto(b"x", (host, port))
        wait_until(lambda: len(asked) == 4)
    first, again, elsewhere, other = (reply for _, reply in asked)
    assert first == again and hash(first) == hash(again)
    assert len({first, elsewhere, other}) == 3


def test_a_target_socket_takes_what_is_there_and_does_not_wait(no_leaks):
    with user() as target:
        target.bind(("127.0.0.1", 0))
        with TargetSocket(endpoint_of(target)) as sock:
            with pytest.raises(BlockingIOError):
                sock.pull()
            sock.push(memoryview(b"question"))
            question, tunnel = target.recvfrom(100)
            for answer in (b"one", b"", b"three"):
                target.sendto(answer, tunnel)
            assert [question, *(sock.pull() for _ in range(3))] == [b"question", b"one", b"", b"three"]


@pytest.mark.parametrize("told", ["pull", "push"])
def test_a_target_that_restarts_is_reached_again_and_no_datagram_is_lost_to_its_refusals(no_leaks, told):
    refusals = []
    with closing(user()) as target:
        target.bind(("127.0.0.98", 0))  # where nobody else takes the port while it is closed
        endpoint = endpoint_of(target)
    with TargetSocket(endpoint) as sock:
        sock.on_refusal = lambda: refusals.append(1)
        sock.push(b"lost")
        if told == "pull":
            with pytest.raises(BlockingIOError):
                sock.pull()
        with user() as target:
            target.bind(endpoint.sockaddr)
            sock.push(b"question")
            assert target.recv(100) == b"question"
        assert refusals == [1]


@pytest.mark.parametrize("count", [2, REFUSALS, 10 * REFUSALS])
@pytest.mark.parametrize("told", ["pull", "push"])
def test_refusals_in_a_row_are_passed_over_and_more_than_that_are_no_error_of_the_target(no_leaks, told, count):
    """From another machine one may come while another one is told; here each makes the next one."""
    left = count - 1

    def on_refusal():
        nonlocal left
        if left:
            left -= 1
            sock._socket.send(b"lost")

    with closing(user()) as target:
        target.bind(("127.0.0.98", 0))
        endpoint = endpoint_of(target)
    with TargetSocket(endpoint) as sock:
        sock.on_refusal = on_refusal
        sock.push(b"lost")
        if told == "pull" or count > REFUSALS:
            with pytest.raises(BlockingIOError):
                sock.pull() if told == "pull" else sock.push(b"question")
        else:
            sock.push(b"question")
        assert left == max(count - 1 - REFUSALS, 0)
