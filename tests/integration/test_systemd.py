"""The unit of `nodepass generate systemd` lets through what the program does; here no systemd runs, so by its lists."""

import re
import subprocess
import sys
from functools import cache

from nodepass_gevent import generate

from .harness import START_S, Process, Target, free_port, wait_until
from .load import ask, datagram_user
from .programs import require
from .users import comes_back, payload, talk


@cache
def calls_of(name):
    """Give the system calls of one of systemd's sets."""
    done = subprocess.run(
        [require("systemd-analyze"), "syscall-filter", "--no-pager", name], capture_output=True, text=True, check=True
    )
    words = re.findall(r"^ +([@a-z0-9_-]+)$", done.stdout, re.MULTILINE)
    return frozenset().union(*(calls_of(word) if word.startswith("@") else {word} for word in words))


def allowed_by(unit):
    allowed = set(calls_of("@default"))
    for line in re.findall("^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        calls = frozenset().union(*map(calls_of, line.removeprefix("~").split()))
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


def test_the_filter_of_the_unit_allows_every_system_call_of_a_tunnel_at_work(tmp_path):
    allowed = allowed_by(generate.systemd_template(generate.OwnCommand(("/opt/nodepass/bin/nodepass",))))
    assert {"execve", "sendmsg"} <= allowed and not {"mount", "setrlimit", "chroot"} & allowed
    tunnel, public, trace = free_port(), ("127.0.0.1", free_port("both")), tmp_path / "trace"
    with Target() as target:
        path = tmp_path / "t.conf"
        path.write_text(
            f"tls = 1\n[tunnel a]\nurl = server://127.0.0.1:{tunnel}/127.0.0.1:{public[1]}\n"
            f"[tunnel b]\nurl = client://localhost:{tunnel}/{target.address}\nservice-cooldown = 300ms\n"
        )
        argv = [require("strace"), "-D", "-f", "-o", str(trace), sys.executable, "-m", "nodepass_gevent"]
        with Process([*argv, "--config", str(path)], name="traced") as process:
            wait_until(lambda: comes_back(public), START_S, "traffic passes")
            data = payload(1 << 20)
            assert talk(public, data) == data
            with datagram_user(public) as user:
                ask(user)
            assert process.stop() == 0
        wait_until(
            lambda: "+++ exited with 0 +++" in trace.read_text(errors="replace")[-2000:], START_S, "the trace ends"
        )
    made = set(re.findall(r"^[0-9]+ +([a-z0-9_]+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    assert {"sendto", "epoll_create1", "accept4"} & made

    assert not made - allowed, made - allowed
