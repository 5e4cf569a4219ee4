import pytest

from nodepass_gevent.config import Address, Process
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.options import parse
from nodepass_gevent.ports import clashes, of_process, refuse_clashes


def twice(*urls, **values):
    """Give the words of what is asked for twice."""
    configs = [config for url in urls for config in parse([url], {}).configs]
    found = clashes(of_process(Process(**values), configs)).items()
    return [f"{port}: {text}" for port, text in found]


def hosts(one, other):
    return twice(f"server://{one}:1/:0", f"server://{other}:1/:0")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("", "127.0.0.1"),
        ("[::]", "127.0.0.1"),
        ("[::]", ""),
        ("", "[2001:db8::1]"),
        ("", "a.example"),
        ("A.example", "a.example."),
        ("[::1]", "[0:0:0:0:0:0:0:1]"),
        ("[::ffff:127.0.0.1]", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("localhost", "0.0.0.0"),
    ],
)
def test_addresses_that_hold_each_other_are_asked_for_twice(one, other):
    assert len(hosts(one, other)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1", "127.0.0.2"),
        ("0.0.0.0", "[::1]"),
        ("[::1]", "[::2]"),
        ("[fe80::1%eth0]", "[fe80::1%eth1]"),
        ("a.example", "b.example"),
        ("a.example", "127.0.0.1"),
    ],
)
def test_other_addresses_are_not(one, other):
    assert hosts(one, other) == []


def test_what_is_asked_for_twice_is_told_with_both_and_its_place():
    assert twice("server://127.0.0.1:1/:2", "server://127.0.0.1:1/:3") == [
        "tunnel port: 127.0.0.1:1 is asked for twice; first as the tunnel port [from command line]"
    ]
    assert twice("server://:1/:2?data-port=2") == [
        "public port, TCP: :2 is asked for twice; first as the data port [from command line]"
    ]
    assert twice("server://0.0.0.0:1/:2", status=Address("127.0.0.1", 1), sources={"status": "file x:1"}) == [
        "status: 127.0.0.1:1 is asked for twice; first as the tunnel port, 0.0.0.0:1 [from file x:1]"
    ]


def test_port_0_tcp_beside_udp_and_clients_take_nothing_from_each_other():
    assert twice("server://:0/:0", "server://:0/:0", status=Address("127.0.0.1", 0)) == []
    assert twice("server://:1/:1?network=udp", "server://:2/:2?network=udp") == []
    assert twice("server://:1/:2?network=udp&data-port=2", "server://:4/:3?network=tcp&data-port=5") == []
    assert twice("server://:1/:2", "client://h:1/127.0.0.1:2", "client://h:1/127.0.0.1:2") == []


def test_within_one_process_reuse_port_shares_nothing():
    assert len(twice("server://:1/:2?reuse-port=1", "server://:1/:3?reuse-port=1")) == 1


def test_the_first_is_refused():
    configs = parse(["server://0.0.0.0:1/127.0.0.1:1"], {}).configs
    with pytest.raises(
        ConfigError, match=r"^public port, TCP: 127\.0\.0\.1:1 is asked for twice; first as the tunnel port"
    ):
        refuse_clashes(Process(), configs)
    refuse_clashes(Process(), parse(["server://:1/:2"], {}).configs)
