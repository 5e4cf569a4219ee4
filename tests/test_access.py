"""The access line of each exchange: one, with who, how much and how it ended, at the level that is set."""

import errno
import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from exchanges import ID, LIMIT, SHORT_S, Full, address_of
from support import is_reset, read_all, read_exactly, reset, silent_endpoint, wait_until

from nodepass_gevent import access, opening, wire
from nodepass_gevent import log as logs
from nodepass_gevent.config import Address
from nodepass_gevent.errors import LaunchFailed
from nodepass_gevent.frames import format_frame
from nodepass_gevent.transport import Stream
from nodepass_gevent.udp import TargetSocket
from nodepass_gevent.wire import Kind

USER = "192.0.2.1:443"


@pytest.fixture
def lines(caplog):
    """Give a function that waits for the access lines of a side's exchanges, and checks what is in all of them."""
    caplog.set_level(logging.DEBUG, "nodepass_gevent")

    def give(side):
        wait_until(lambda: len(side.exchanges) == 0)
        return [told(record) for record in caplog.records if hasattr(record, "event")]

    return give


def told(record):
    """Give the fields of an access line without those that are the same in all, or differ in each run."""
    known = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
    fields = {name: value for name, value in vars(record).items() if name not in known}
    assert fields.pop("event") == "exchange"
    assert 0 <= fields.pop("duration_s") < 60
    assert ("public" in fields) != ("target" in fields)
    text = record.getMessage()
    assert f" {fields['end']} " in text and f"{fields['bytes_up']} bytes up, {fields['bytes_down']} down" in text
    assert all(str(fields[name]) in text for name in ("id", "user", "reason", "public", "target") if name in fields)
    return fields


def tcp(end, up=0, down=0, **rest):
    return {"protocol": "tcp", "id": ID.decode(), "bytes_up": up, "bytes_down": down, "end": end, **rest}


def udp(end, up=(0, 0), down=(0, 0), **rest):
    """Make fields of datagrams and bytes."""
    counts = {"bytes_up": up[1], "bytes_down": down[1], "datagrams_up": up[0], "datagrams_down": down[0]}
    return {"protocol": "udp", "id": ID.decode(), **counts, "end": end, **rest}


@pytest.fixture
def target(no_leaks):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


# TCP on the server


PUBLIC = {"public": "127.0.0.1:1"}


@pytest.fixture
def served(ingress):
    """Make an ingress with a user, and the client's end of its data connection."""

    def make(**settings):
        side = ingress(**settings)
        client, user = side.add_data(), side.user()
        wait_until(lambda: side.link.launched)
        return side, client, user

    return make


def test_an_exchange_that_both_sides_end(served, lines):
    side, client, user = served()
    user.sendall(b"question")
    user.shutdown(1)
    read_all(client)
    client.sendall(b"a late answer")
    client.close()
    read_all(user)
    (line,) = lines(side)
    assert line.pop("user")
    assert line == tcp("ended", 8, 13, **PUBLIC)


@pytest.mark.parametrize("by", ["user", "tunnel"])
def test_a_reset_says_by_whom(served, lines, by):
    side, client, user = served()
    user.sendall(b"question")
    assert read_exactly(client, 8) == b"question"
    reset(user if by == "user" else client)
    assert is_reset(client if by == "user" else user)
    (line,) = lines(side)
    assert line.pop("user")
    assert line == tcp(f"reset by {by}", 8, **PUBLIC)


def test_a_reset_by_one_side_behind_the_end_of_the_other_is_not_blamed_on_that(served, lines):
    side, client, user = served()
    user.shutdown(1)
    assert read_all(client) == b""
    reset(client)
    assert is_reset(user)
    assert lines(side)[0]["end"] == "reset by tunnel"


@pytest.mark.parametrize(
    ("limit", "reason"), [("idle_timeout_s", "idle"), ("half_closed_timeout_s", "half-closed and idle")]
)
def test_silence_is_a_timeout(served, lines, limit, reason):
    side, client, user = served(**{limit: SHORT_S})
    client.shutdown(1)
    read_all(user)
    (line,) = lines(side)
    assert (line["end"], line["reason"]) == ("timeout", f"{reason} for {SHORT_S:g} s")


def test_a_launch_that_the_peer_could_not_begin(served, lines):
    side, _, user = served()
    side.link.launched[ID].abort(LaunchFailed("refused"))
    assert is_reset(user)
    (line,) = lines(side)
    assert (line["end"], line["reason"]) == ("refused by peer", "refused")


def test_an_exchange_that_is_cut(served, lines):
    side, client, user = served()
    user.sendall(b"question")
    assert read_exactly(client, 8) == b"question"
    side.exchanges.kill()
    (line,) = lines(side)
    assert line.pop("user")
    assert line == tcp("cut", 8, **PUBLIC)


def test_a_user_for_whom_there_is_no_data_connection(ingress, lines):
    side = ingress(pool_wait_s=SHORT_S)
    assert is_reset(side.user())
    (line,) = lines(side)
    assert "id" not in line and line["end"] == "no data connection"
    assert line["reason"].startswith("no data connection within ")


# TCP on the client


def test_an_exchange_with_the_target(egress, target, lines):
    side = egress(target=address_of(target))
    server = side.launch(Kind.TCP)
    server.sendall(b"question")
    server.shutdown(1)
    with target.accept()[0] as accepted:
        read_all(accepted)
    read_all(server)
    assert lines(side) == [tcp("ended", 8, target=str(address_of(target)))]


def test_a_reset_of_the_target(egress, target, lines):
    side = egress(target=address_of(target))
    server = side.launch(Kind.TCP)
    reset(target.accept()[0])
    assert is_reset(server)
    assert [line["end"] for line in lines(side)] == ["reset by target"]


def test_a_target_that_refuses(egress, target, lines):
    side = egress(target=address_of(target))
    target.close()
    assert is_reset(side.launch(Kind.TCP))
    (line,) = lines(side)
    assert line["end"] == "no target" and "connection refused" in line["reason"]


def test_a_launch_whose_data_connection_never_came(egress, lines):
    side = egress()
    side.egress.launch(wire.Launch(ID, Kind.TCP))
    (line,) = lines(side)
    assert (line["id"], line["end"]) == (ID.decode(), "no data connection")


@pytest.mark.parametrize("waits_for", ["the target", "a datagram"])
def test_an_exchange_that_is_cut_before_it_begins(egress, lines, waits_for):
    with silent_endpoint() as endpoint:
        side = egress(target=Address(*endpoint.sockaddr))
        server = side.launch(Kind.UDP if waits_for == "a datagram" else Kind.TCP)
        wait_until(lambda: side.counters.tcp_exchanges or side.counters.udp_exchanges)
        side.exchanges.kill()
    (line,) = lines(side)
    assert (line["id"], line["end"], line["bytes_up"]) == (ID.decode(), "cut", 0)
    assert is_reset(server)


def test_a_user_who_is_cut_while_waiting_for_a_data_connection(ingress, lines):
    side = ingress()
    user = side.user()
    wait_until(lambda: side.ingress._launcher._waiting)
    side.exchanges.kill()
    assert is_reset(user)
    assert [(line["end"], line["user"]) for line in lines(side)] == [("cut", str(address_of(user)))]


def test_a_target_that_refuses_is_told_though_the_exchange_is_cut_behind_it(egress, lines):
    side = egress(target=Address("127.0.0.1", 1))
    told = []
    side.egress._fail = lambda id, why: told.append(why) or True
    side.launch(Kind.TCP)
    wait_until(lambda: told)
    side.exchanges.kill()
    (line,) = lines(side)
    assert (line["end"], line["reason"]) == ("no target", "refused")


# UDP


class Reply:
    sender = ("192.0.2.1", 443)

    def __call__(self, datagram):
        pass


def test_a_session_counts_datagrams_and_bytes_both_ways(ingress, lines):
    side = ingress(opening.UDP)
    client = side.add_data()
    side.ingress.udp.datagram(b"question", Reply())
    read_exactly(client, 10)
    client.sendall(format_frame(b"one") + format_frame(b"three"))
    client.close()
    expected = udp("ended", (1, 8), (2, 8), user=USER, datagrams_dropped=0, **PUBLIC)
    assert lines(side) == [expected]


@pytest.mark.parametrize("end", ["timeout", "cut", "failed", "refused by peer", "no data connection"])
def test_how_a_session_ends(ingress, lines, end):
    side = ingress(opening.UDP, udp_session_timeout_s=SHORT_S if end == "timeout" else 60, pool_wait_s=SHORT_S)
    if end == "no data connection":
        side.ingress.udp.datagram(b"question", Reply())
    else:
        client = side.add_data()
        side.ingress.udp.datagram(b"question", Reply())
        read_exactly(client, 10)
    if end == "cut":
        side.exchanges.kill()
    elif end == "failed":
        reset(client)
    elif end == "refused by peer":
        side.link.launched[ID].abort(LaunchFailed("refused"))
    (line,) = lines(side)
    assert line["end"] == end


def test_a_session_on_the_client(egress, udp_target, lines):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP_SESSION)
    server.sendall(format_frame(b"question"))
    _, sender = udp_target.recvfrom(100)
    udp_target.sendto(b"answer", sender)
    read_exactly(server, 8)
    server.close()
    expected = udp("ended", (1, 8), (1, 6), target=str(address_of(udp_target)), datagrams_dropped=0)
    assert lines(side) == [expected]


def test_a_datagram_of_v1_and_its_answer(ingress, lines):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    read_all(client)
    client.sendall(b"answer")
    client.close()
    assert lines(side) == [udp("ended", (1, 8), (1, 6), user=USER, **PUBLIC)]


def test_a_datagram_of_v1_without_an_answer(ingress, lines):
    side = ingress(udp_read_timeout_s=SHORT_S)
    side.add_data()
    side.datagram(b"question")
    (line,) = lines(side)
    assert line == udp("unanswered", (1, 8), user=USER, reason=f"datagram: timed out after {SHORT_S:g} s", **PUBLIC)


def test_a_datagram_of_v1_without_a_client(ingress, lines):
    side = ingress()
    side.link = None
    side.datagram(b"question")
    (line,) = lines(side)
    assert (line["end"], line["datagrams_up"]) == ("no data connection", 0)


@pytest.mark.parametrize("answer", [b"answer", b""])
def test_a_datagram_of_v1_on_the_client(egress, udp_target, lines, answer):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=5 if answer else SHORT_S)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(100)
    if answer:
        udp_target.sendto(answer, sender)
    read_all(server)
    server.close()
    (line,) = lines(side)
    assert line.pop("reason", "") == ("" if answer else f"answer: timed out after {SHORT_S:g} s")
    end, down = ("ended", (1, 6)) if answer else ("unanswered", (0, 0))
    assert line == udp(end, (1, 8), down, target=str(address_of(udp_target)))


def test_a_datagram_of_v1_whose_answer_the_server_does_not_take(egress, udp_target, lines, pair):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=SHORT_S)
    data, server = pair()
    side.pool.ready[ID] = Full(data.socket)
    side.egress.launch(wire.Launch(ID, Kind.UDP))
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(100)
    udp_target.sendto(b"answer", sender)
    assert is_reset(server)
    reason = f"answer to the tunnel: timed out after {SHORT_S:g} s"
    assert lines(side) == [udp("failed", (1, 8), reason=reason, target=str(address_of(udp_target)))]
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "exchanges_failed": 1}


@pytest.mark.parametrize("where", ["before the target", "at the target"])
def test_a_datagram_of_v1_that_is_not_taken_counts_nowhere(ingress, egress, udp_target, lines, monkeypatch, where):
    def refuse(*_):
        raise OSError(errno.ENETUNREACH, "network is unreachable")

    if where == "at the target":
        monkeypatch.setattr(TargetSocket, "send", refuse)
        side = egress(target=address_of(udp_target))
        side.launch(Kind.UDP).sendall(b"question")
    else:
        monkeypatch.setattr(Stream, "send_last", refuse)
        side = ingress()
        side.add_data()
        side.datagram(b"question")
    (line,) = lines(side)
    assert (line["end"], line["bytes_up"], line["datagrams_up"]) == ("unanswered", 0, 0)
    assert side.counted == {"udp_exchanges": 1, "datagrams_unanswered": 1}


def test_a_datagram_of_v1_that_is_cut_at_the_target(egress, udp_target, lines):
    side = egress(target=address_of(udp_target))
    side.launch(Kind.UDP).sendall(b"question")
    udp_target.recvfrom(100)
    side.exchanges.kill()
    assert lines(side) == [udp("cut", (1, 8), target=str(address_of(udp_target)))]


def test_a_datagram_of_v1_whose_answer_the_server_takes_and_resets_behind_it_has_one_line(egress, udp_target, lines):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(100)
    udp_target.sendto(b"answer", sender)
    read_exactly(server, 6)
    reset(server)
    assert lines(side) == [udp("ended", (1, 8), (1, 6), target=str(address_of(udp_target)))]
    assert "exchanges_failed" not in side.counted


def test_a_datagram_of_v1_whose_answer_the_network_does_not_take(ingress, lines):
    class Refusing(Reply):
        def __call__(self, datagram):
            raise OSError(errno.ENETUNREACH, "network is unreachable")

    side = ingress()
    client = side.add_data()
    side.ingress.udp.datagram(b"question", Refusing())
    read_all(client)
    client.sendall(b"answer")
    client.close()
    (line,) = lines(side)
    assert line == udp("unanswered", (1, 8), user=USER, reason="network is unreachable", **PUBLIC)
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_a_launched_datagram_that_is_too_long(egress, lines):
    side = egress()
    server = side.launch(Kind.UDP)
    server.sendall(bytes(LIMIT + 1))
    server.shutdown(1)
    read_all(server)
    (line,) = lines(side)
    assert line["end"] == "failed" and "udp-data-buf-size" in line["reason"]


# The level


@pytest.mark.parametrize(
    ("log", "access_log", "level"),
    [
        ("debug", "debug", "DEBUG"),
        ("debug", "info", "INFO"),
        ("info", "info", "INFO"),
        ("info", "debug", None),
        ("warn", "info", None),
        ("debug", "off", None),
    ],
)
def test_the_level_is_a_setting_of_its_own(ingress, lines, caplog, log, access_log, level):
    logs.set_level(log, "web")
    side = ingress(name="web", access_log=access_log)
    client, user = side.add_data(), side.user()
    user.close()
    read_all(client)
    client.close()
    assert len(lines(side)) == (level is not None)
    names = [(each.name, logging.getLevelName(each.levelno)) for each in caplog.records if hasattr(each, "event")]
    assert names == ([("nodepass_gevent.tunnel.web", level)] if level else [])


def test_the_level_can_change_while_running(ingress, lines):
    side = ingress(access_log="off")
    for access_log, count in (("off", 0), ("info", 1)):
        assert side.config.adopt(replace(side.config, access_log=access_log))
        client, user = side.add_data(), side.user()
        user.close()
        read_all(client)
        client.close()
        assert len(lines(side)) == count


def test_what_nobody_sees_is_not_made(served, lines, caplog, monkeypatch):
    monkeypatch.setattr(logging.Logger, "log", lambda *_, **__: pytest.fail("a line was made"))
    side, client, user = served(access_log="off")
    user.close()
    read_all(client)
    client.close()
    assert lines(side) == []


# The page about it


def test_the_page_has_every_field_and_every_end():
    page = (Path(__file__).resolve().parents[1] / "docs" / "logs.rst").read_text()
    ends = {value for name, value in vars(access).items() if name.isupper() and isinstance(value, str)}
    ends |= {f"reset by {side}" for side in ("user", "tunnel", "target")}
    fields = {"time", "level", "tunnel", "message", "exception", "held_back", "dropped", "event"} | set(udp("ended"))
    fields |= {"user", "public", "target", "datagrams_dropped", "duration_s", "reason"}
    assert [word for word in sorted(ends | fields) if f"\n``{word}`` " not in page] == []
