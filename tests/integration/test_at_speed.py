"""At full speed, whatever users and target do at once, no byte is wrong and nobody is starved."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

from .harness import Process
from .load import tunnel
from .users import talk

PROGRAM = str(Path(__file__).with_name("at_speed.py"))
DURATION_S = float(os.environ.get("AT_SPEED_S", "5"))  # per mode; a minute, AT_SPEED_S=60, before a release
FINISH_S = 70.0  # what the last exchanges may need, by their own deadline
STARVED_S = 2.0  # no wait of a chatty user comes near it, even on a slow machine

pytestmark = pytest.mark.timeout(DURATION_S + FINISH_S + 60)


def is_open(public):
    """Be a user who leaves without a word, and say whether the target did the same."""
    try:
        return talk(public, b"", timeout=2.0) == b""
    except OSError:
        return False


@contextlib.contextmanager
def through(tls, **env):
    """Start the target and a tunnel to it; yields both."""
    with Process([sys.executable, PROGRAM, "target"], name="target") as target:
        port = target.wait_for_line(r"port (\d+)")[1]
        with tunnel(f"127.0.0.1:{port}", tls, is_open, **env) as both:
            yield target, both


def run(role, both, *arguments):
    return Process([sys.executable, PROGRAM, role, str(both.public_port), *map(str, arguments)], name=role)


def wrong(*processes):
    return [line for process in processes for line in process.lines if "WRONG" in line or "Traceback" in line]


@pytest.mark.parametrize(
    ("tls", "protocol"), [(0, "auto"), (1, "auto"), (2, "auto"), (0, "1")], ids=["tls=0", "tls=1", "tls=2", "v1"]
)
def test_two_hundred_exchanges_at_once_have_no_wrong_byte(tls, protocol):
    """Launches are taken from a pool that is much too small, so that new connections are always on the way."""
    settings = {"MIN_POOL_CAPACITY": "4", "NODEPASS_PROTOCOL": protocol}
    with through(tls, **settings) as (target, both), run("users", both, DURATION_S, 7) as users:
        done = users.wait_for_line(r"done: (\d+) exchanges", DURATION_S + FINISH_S)
        assert not wrong(users, target), "\n".join([*wrong(users, target)[:10], both.logs()])
        assert int(done[1]) >= 200


@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_a_user_who_never_stops_sending_starves_nobody(tls):
    with through(tls) as (target, both), run("fairness", both, 2) as users:
        said = users.wait_for_line(r"beside bulk: least (\d+) answers, longest wait ([\d.]+) s, (\d+) MiB", 30)
        least, longest, moved = int(said[1]), float(said[2]), int(said[3])
        assert not wrong(users, target)
        assert least >= 5 and longest < STARVED_S and moved > 10, users.tail()
