"""Faults of our own: what happens when a greenlet fails or is killed, wherever it is."""

import os
import re
import signal

import pytest

from .harness import SLACK, Tunnel, Users, standing

INJECTED = re.compile(r"ConcurrentObjectUseError|ResourceWarning|Exception ignored")  # a fault of ours may say ERROR


@pytest.mark.fault(72)
@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("nodepass_gevent.relay:Exchange.run", (3, 5, 8)),
        ("nodepass_gevent.tls:accept", (3, 12, 20)),
        ("nodepass_gevent.session:Session._read", (1, 2)),
        ("nodepass_gevent.session:Session._take", (2, 6)),
        ("nodepass_gevent.session:Session._write", (1, 2)),
        ("nodepass_gevent.accepting:serve", (1, 2)),
    ],
)
def test_an_error_of_our_own_ends_what_it_happens_in_and_is_recovered_from(target, where, numbers):
    raising = {"FAULT_RAISE": ",".join(f"{where}@{number}" for number in numbers)}
    tunnel = Tunnel(target.address, tls=1, env=raising)
    try:
        tunnel.start()
        tunnel.served(30)
        assert tunnel.recovers(SLACK * 2) < SLACK * 2
        assert tunnel.served(30) == 30
        assert [line for line in tunnel.server.lines + tunnel.client.lines if "injected" in line]
    finally:
        tunnel.stop()


@pytest.mark.fault(73)
@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_exchanges_that_are_killed_wherever_they_are_leave_nothing_behind(target, side, tls):
    with Tunnel(target.address, tls, env={"FAULT_KILLS": "500"}, forbidden=INJECTED) as tunnel:
        with standing(tunnel, grown_kib=32 * 1024):
            process, served = getattr(tunnel, side), 0
            os.kill(process.pid, signal.SIGUSR2)
            while not any(line == "killed" for line in process.lines):
                served += tunnel.served(40, at_once=20)
            assert tunnel.served(10) == 10


IN_EXCHANGES = (
    "relay:_Flow._copy@150", "relay:_Flow._copy@400", "relay:_Flow._end@30", "relay:Exchange.run@50",
    "relay:Exchange.__init__@55", "ingress:Ingress._carry@60", "egress:Egress._tcp@70",
)  # fmt: skip


@pytest.mark.fault(66)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_memory_that_runs_out_in_an_exchange_ends_that_one_alone(target, tls):
    raising = {
        "FAULT_ERROR": "MemoryError",
        "FAULT_RAISE": ",".join(f"nodepass_gevent.{each}" for each in IN_EXCHANGES),
    }
    with Tunnel(target.address, tls, env=raising) as tunnel, standing(tunnel):
        with Users(tunnel, 20) as users:
            lost = 100 - tunnel.served(100) + 20 - users.alive()
        said = [line for process in tunnel.processes for line in process.lines]
        assert "MemoryError: injected" in said and not list(filter(INJECTED.search, said))
        assert 0 < lost <= 2 * len(IN_EXCHANGES), "one for each place and process"
        for process in tunnel.processes:
            process.lines.clear()  # of tracebacks
