"""The budget of descriptors: what is counted, what is lowered, what is told."""

import os
import resource
import subprocess
import sys
from bisect import bisect_left
from dataclasses import replace

import pytest
from support import LIMITS

from nodepass_gevent import descriptors
from nodepass_gevent.config import Address, Config
from nodepass_gevent.descriptors import plan
from nodepass_gevent.errors import ConfigError

PLENTY = 1 << 20


def config(role="server", name="", reserve=16, callers=64, **settings):
    limits = replace(LIMITS, descriptor_reserve=reserve, callers=callers)
    return Config(role=role, tunnel=Address("h", 1), target=Address("h", 2), name=name, limits=limits, **settings)


def needed(configs):
    """Find by trying how many descriptors suffice."""
    return bisect_left(range(10_000), True, key=lambda allowed: not warned(configs, allowed))


def warned(configs, allowed):
    try:
        return plan(configs, allowed, 0).warnings
    except ConfigError:
        return True


def test_where_everything_fits_nothing_changes():
    configs = [config(), config("client")]
    budget = plan(configs, PLENTY, 10)
    assert budget.configs == tuple(configs)
    assert budget.warnings == ()


def test_the_need_follows_the_settings():
    base = {"semaphore_limit": 10, "min_pool_capacity": 1, "max_pool_capacity": 5, "callers": 4}
    client = needed([config("client", **base)])
    assert client == 2 * 10 + 5 + 2 + 16
    assert (
        needed([config(**base)]) == client + 4 + 2 * 4
    )  # listeners; callers on the tunnel port, held on the data port
    assert needed([config("client", **base | {"semaphore_limit": 11})]) == client + 2
    assert needed([config("client", **base | {"max_pool_capacity": 6})]) == client + 1
    assert needed([config(**base | {"callers": 5})]) == client + 4 + 2 * 5
    assert needed([config(**base | {"tls": 1})]) == client + 4 + 2 * 4 + 5  # handshakes of a v1 client
    assert needed([config(**base | {"tls": 1, "protocol": "2"})]) == client + 4 + 2 * 4
    many = base | {"max_pool_capacity": 500}
    assert needed([config(**many | {"tls": 1})]) == needed([config(**many)]) + 128
    assert needed([config("client", reserve=17, **base)]) == client + 1


def test_tunnels_share_the_descriptors_and_one_reserve_the_largest():
    one, two = config("client", semaphore_limit=10), config("client", semaphore_limit=20)
    assert needed([one, two]) == needed([one]) + needed([two]) - 16
    more = config("client", semaphore_limit=20, reserve=50)
    assert needed([one, more]) == needed([more, one]) == needed([one, two]) + 50 - 16


def test_what_is_open_already_is_taken_off():
    configs = [config("client")]
    least = needed(configs)
    assert plan(configs, least + 7, 7).warnings == ()
    assert plan(configs, least + 6, 7).warnings != ()


@pytest.mark.parametrize("role", ["server", "client"])
def test_limits_are_lowered_in_proportion_until_they_fit(role):
    one = config(role)
    for allowed in (64, 100, 256, 1024, 3000):
        (lowered,) = plan([one], allowed, 8).configs
        assert needed([lowered]) + 8 <= allowed
        assert lowered.semaphore_limit == lowered.max_pool_capacity >= allowed // 10 - 2
        assert lowered.min_pool_capacity == min(16, lowered.max_pool_capacity)
        assert 4 <= lowered.limits.callers <= 64
        if allowed >= 256:  # rounding weighs less
            assert needed([lowered]) + 8 >= 0.97 * allowed


def test_what_was_lowered_is_told_with_the_way_to_raise_it():
    budget = plan([config("client", semaphore_limit=100, max_pool_capacity=100)], 200, 10)
    assert budget.warnings == (
        "open files: 200 are allowed, and 328 would be needed; raise the hard limit (ulimit -Hn, LimitNOFILE)",
        "lowered: semaphore-limit from 100 to 57, max-pool-capacity from 100 to 57",
    )


def test_of_several_tunnels_each_is_told_by_its_name():
    small = config("client", "small", semaphore_limit=4, max_pool_capacity=4, min_pool_capacity=1)
    budget = plan([small, config("server", "large")], 90, 8)
    assert budget.configs[0] == small  # the least is never lowered
    assert [warning.partition(":")[0] for warning in budget.warnings] == ["open files", "tunnel large"]
    assert "callers from 64 to 4, min-pool-capacity from 16 to" in budget.warnings[1]


def test_when_not_even_the_least_fits_the_start_is_refused():
    with pytest.raises(ConfigError) as caught:
        plan([config()], 40, 8)
    assert str(caught.value) == (
        "open files: 40 are allowed, and these tunnels need 50 at least; raise the hard limit (ulimit -Hn, LimitNOFILE)"
    )
    assert plan([config()], 50, 8).warnings
    tiny = config("client", semaphore_limit=1, min_pool_capacity=1, max_pool_capacity=1, reserve=0)
    assert plan([tiny], 5 + 8, 8).warnings == ()  # who asks for less than the least gets that


def test_the_most_descriptors_are_those_that_are_needed_and_what_is_kept_in_reserve():
    one = config("client", semaphore_limit=10)
    least = needed([one])
    assert [plan([one], least + more, taken).most for more, taken in ((0, 0), (9, 0), (9, 5))] == [
        least, least, least + 5,
    ]  # fmt: skip


def test_room_for_descriptors_is_made_once_and_stays():
    script = """
import os, re
from nodepass_gevent.descriptors import make_room
size = lambda: int(re.search(r"FDSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, open_before = size(), os.listdir("/proc/self/fd")
make_room(1000)
assert before < 1000 <= size(), (before, size())
make_room(1 << 40)  # more than the system allows
assert os.listdir("/proc/self/fd") == open_before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pipes_get_what_is_left():
    one = config("client", semaphore_limit=10, max_pool_capacity=16)
    least = needed([one])
    assert [plan([one], least + more, 0).pipes for more in (0, 1, 2, 101)] == [0, 0, 1, 50]


def test_open_descriptors_are_counted_up_to_the_limit():
    before = descriptors.taken()
    assert before >= len(os.listdir("/proc/self/fd")) - 1
    pipe = os.pipe()
    assert descriptors.taken() == before + 2
    for each in pipe:
        os.close(each)


def test_open_descriptors_are_counted_without_proc_too(monkeypatch):
    def no_proc(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    told = descriptors.taken()
    monkeypatch.setattr(os, "listdir", no_proc)
    assert descriptors.taken() == told - 1  # the one of the listing itself


def test_the_soft_limit_is_raised_to_the_hard_one():
    code = """
import resource
from nodepass_gevent import descriptors
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
assert descriptors.allowed() == hard
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def run(*argv, most=None):
    """Run the command with a hard limit of open files."""
    return subprocess.run(
        [sys.executable, "-m", "nodepass_gevent", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
    )


def test_a_process_with_too_few_descriptors_says_so_and_exits_with_2():
    done = run("server://127.0.0.1:0/127.0.0.1:0", most=30)
    assert done.returncode == 2
    assert done.stderr.startswith("nodepass: error: open files: 30 are allowed, and these tunnels need ")
    assert done.stderr.count("\n") == 1
