import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys

import gevent
import pytest
from support import is_reset

SCRIPT = """
import logging, resource, sys
{patch}
import gevent
from gevent.event import Event
from gevent.socket import wait_read
from nodepass_gevent import process
from nodepass_gevent.crew import Crew
from nodepass_gevent.config import Address, Config, Process
from nodepass_gevent.errors import ConfigError, PolicyError
from nodepass_gevent.metrics import Counters
from nodepass_gevent.state import Description

log = logging.getLogger("nodepass_gevent.script")

class Role:
    exchanges = Crew()
    counters = Counters()
    peers = 0
    runs = 0

    def __init__(self, name="", cooldown_s=5.0, shutdown_timeout_s=30.0):
        self.config = Config(role="client", tunnel=Address("h", 1), target=Address("h", 2), name=name,
                             service_cooldown_s=cooldown_s, shutdown_timeout_s=shutdown_timeout_s)
        self.begun = Event()

    def __str__(self):
        return "role"

    def dismiss(self):
        pass

    def retire(self):
        pass

    def describe(self):
        return Description((), None)

    def run(self):
        self.runs += 1
        log.info("run %d", self.runs)
        self.work()
        try:
            gevent.sleep(3600)
        finally:
            log.info("role ended")

    def work(self):
        pass

    def reload(self):
        log.info("reloaded")

def exchange_until_told():
    wait_read(sys.stdin.fileno())
    log.info("exchange done")

def run(*roles):
    by_name = {role.config.name: role for role in roles}
    plan = process.Plan(Process(), tuple(role.config for role in roles))
    return process.run(plan, lambda: plan, lambda config, before: by_name[config.name])
"""
RUN = 'if __name__ == "__main__":\n    code = run(role)\n    log.info("code %d", code)\n    sys.exit(code)\n'
PATCH = "from gevent import monkey; monkey.patch_all()"


class Script:
    """A process that keeps a role running."""

    def __init__(self, code, patch=PATCH):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT.replace("{patch}", patch) + code + "\n" + RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.said = ""

    def wait_for(self, text):
        while text not in self.said:
            line = self.process.stdout.readline().decode()
            assert line, f"{text!r} was not said, but {self.said}"
            self.said += line

    def kill(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        self.said += self.process.stdout.read().decode()
        return self.process.wait()


@contextlib.contextmanager
def script(code, **options):
    running = Script(code, **options)
    with running.process, gevent.Timeout(20):
        try:
            yield running
        finally:
            running.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_role_lets_exchanges_end_and_exits_0(number):
    with script("role = Role()\nrole.exchanges.spawn(exchange_until_told)") as running:
        running.wait_for("run 1")
        running.kill(number)
        running.wait_for("role ended")
        assert "exchange done" not in running.said
        running.process.stdin.write(b"\n")
        running.process.stdin.close()
        assert running.wait() == 0
        assert re.search("exchange done.*\n.*\n.*stopped, exchanges cut: 0.*\n.*code 0", running.said)


def test_exchanges_that_do_not_end_in_time_are_cut():
    with script("role = Role(shutdown_timeout_s=0.05)\nrole.exchanges.spawn(gevent.sleep, 3600)") as running:
        running.wait_for("run 1")
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert "stopping: exchanges 1" in running.said
        assert "stopped, exchanges cut: 1" in running.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_says_which(number):
    with script("role = Role()\nrole.exchanges.spawn(gevent.sleep, 3600)") as running:
        running.wait_for("run 1")
        running.kill(signal.SIGTERM)
        running.wait_for("stopping")
        running.kill(number)
        assert running.wait() == 128 + number


def test_all_that_is_logged_is_written_before_a_second_signal_ends_the_process():
    code = """
role = Role()
def exchange():
    wait_read(sys.stdin.fileno())
    for number in range(1500):
        log.info("%s line %d", 300 * "a", number)  # in all more than a pipe holds
    process.signal.raise_signal(process.signal.SIGTERM)
    gevent.sleep(3600)
role.exchanges.spawn(exchange)
def run(role):
    plan = process.Plan(Process(log_rate=0), (role.config,))
    return process.run(plan, lambda: plan, lambda config, before: role)
"""
    with script(code) as running:
        running.wait_for("run 1")
        running.kill(signal.SIGTERM)
        running.wait_for("stopping")
        running.process.stdin.write(b"\n")
        running.process.stdin.flush()
        assert running.wait() == 128 + signal.SIGTERM
        assert "line 1499\n" in running.said
        assert running.said.endswith("  WARN  second signal: ending at once, exchanges cut: 1\n")


@pytest.mark.parametrize("most", [100, "user.fileno() + 1"], ids=["", "no descriptor is left"])
def test_exchanges_that_a_second_signal_cuts_end_by_a_reset(most):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"import socket\nrole = Role()\nuser = socket.create_connection({listener.getsockname()})\n"
        code += f"role.work = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, 100))\n"
        with script(f"{code}role.exchanges.spawn(gevent.sleep, 3600)") as running:
            user = listener.accept()[0]
            running.wait_for("run 1")
            running.kill(signal.SIGTERM)
            running.wait_for("stopping")
            running.kill(signal.SIGTERM)
            with user:
                assert is_reset(user)
            assert running.wait() == 128 + signal.SIGTERM


def test_sighup_reloads_and_cuts_a_pause_short():
    code = """
class Refused(Role):
    def work(self):
        if self.runs == 1:
            raise PolicyError("refused")
role = Refused(cooldown_s=3600)
"""
    with script(code) as running:
        running.wait_for("trying again every 3600 s")
        running.kill(signal.SIGHUP)
        running.wait_for("run 2")
        assert "reloaded" in running.said


SLOW_LOAD = """
role = Role()
def run(role):
    plan = process.Plan(Process(), (role.config,))
    def load():
        wait_read(sys.stdin.fileno())
        sys.stdin.buffer.raw.read(1)
        return plan
    return process.run(plan, load, lambda config, before: role)
"""


def hang_up_five_times_in_the_middle_of_a_hang_up(running):
    running.wait_for("run 1")
    running.kill(signal.SIGHUP)
    running.wait_for("SIGHUP: reading")
    for _ in range(5):
        running.kill(signal.SIGHUP)
        gevent.sleep(0.05)


def test_hang_ups_in_the_middle_of_one_are_one_more():
    with script(SLOW_LOAD) as running:
        hang_up_five_times_in_the_middle_of_a_hang_up(running)
        running.process.stdin.write(b"\n" * 9)
        running.process.stdin.flush()
        for _ in range(2):
            running.said = ""
            running.wait_for("configuration taken up")
        running.said = ""
        gevent.sleep(0.2)
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert "SIGHUP" not in running.said


def test_the_end_waits_for_no_hang_up_that_has_not_begun():
    with script(SLOW_LOAD) as running:
        hang_up_five_times_in_the_middle_of_a_hang_up(running)
        running.kill(signal.SIGTERM)
        gevent.sleep(0.05)
        running.process.stdin.write(b"\n" * 9)
        running.process.stdin.close()
        assert running.wait() == 0
        assert running.said.count("SIGHUP: reading") == 1


def test_a_file_that_goes_bad_behind_its_check_is_a_configuration_refused_and_the_old_tunnel_goes_on():
    code = """
role, changed = Role(), Role(cooldown_s=6.0)
plans = [changed, role, changed, Role(cooldown_s=7.0)]
def make(config, before):
    if config is changed.config:
        raise ConfigError("crt: it went bad")
    return Role(cooldown_s=config.service_cooldown_s)
Config.adopt = lambda self, other: False
def run(role):
    load = lambda: process.Plan(Process(), (plans.pop(0).config,))
    return process.run(process.Plan(Process(), (role.config,)), load, make)
"""
    with script(code) as running:
        running.wait_for("run 1")
        for _ in range(2):
            running.kill(signal.SIGHUP)
            running.wait_for("configuration refused, the old one goes on: crt: it went bad\n")
            running.wait_for("reloaded\n")
            assert "role ended" not in running.said
            running.said = ""
            running.kill(signal.SIGHUP)
            running.wait_for("configuration taken up; tunnels added, changed or removed: ")
        assert "changed or removed: 1" in running.said
        assert "role ended" in running.said


def test_a_tunnel_that_goes_bad_is_named_and_the_others_are_taken_up_as_is_the_place_of_the_status():
    code = """
before, after = [Role("a"), Role("b")], [Role("a", cooldown_s=6.0), Role("b", cooldown_s=6.0)]
def make(config, old):
    if config is after[0].config:
        raise ConfigError("crt: it went bad")
    return next(role for role in before + after if role.config is config)
Config.adopt = lambda self, other: False
status = Process(status=Address("127.0.0.1", 0))
def run(role):
    load = lambda: process.Plan(status, tuple(role.config for role in after))
    return process.run(process.Plan(Process(), tuple(role.config for role in before)), load, make)
role = None
"""
    with script(code) as running:
        running.wait_for("run 1")
        running.kill(signal.SIGHUP)
        running.wait_for("the old one goes on: a: crt: it went bad; of the other tunnels, taken up: 1\n")
        running.wait_for("status: http://127.0.0.1:")


def test_a_hang_up_changes_the_token_of_the_status():
    code = """
status = Process(status=Address("127.0.0.1", 0))
def run(role):
    plan = lambda token: process.Plan(status, (role.config,), status_token=token)
    return process.run(plan("old"), lambda: plan("new"), lambda config, before: role)
role = Role()
"""

    def ask(token):
        port = int(re.search(r"status: http://127\.0\.0\.1:(\d+)/", running.said)[1])
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/status.json", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status

    with script(code) as running:
        running.wait_for("status: http://127.0.0.1:")
        assert [ask("old"), ask("new")] == [200, 401]
        running.kill(signal.SIGHUP)
        running.said = ""
        running.wait_for("status: http://127.0.0.1:")
        assert [ask("old"), ask("new")] == [401, 200]


def test_a_configuration_that_is_refused_stands_in_the_status_until_one_is_taken_up():
    code = """
role = Role()
refusals = ["tls: it is wrong", ""]
def run(role):
    plan = process.Plan(Process(status=Address("127.0.0.1", 0)), (role.config,))
    def load():
        if why := refusals.pop(0):
            raise ConfigError(why)
        return plan
    return process.run(plan, load, lambda config, before: role)
"""

    def refused():
        port = int(re.search(r"status: http://127\.0\.0\.1:(\d+)/", running.said)[1])
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/status.json")
            return json.loads(connection.getresponse().read())["configuration_refused"]

    with script(code) as running:
        running.wait_for("status: http://127.0.0.1:")
        assert refused() is None
        running.kill(signal.SIGHUP)
        running.wait_for("reloaded")
        assert refused()["why"] == "tls: it is wrong"
        running.kill(signal.SIGHUP)
        running.wait_for("configuration taken up")
        assert refused() is None


def test_sigusr2_logs_what_each_tunnel_does_and_has_done():
    code = """
roles = [Role("a"), Role("b")]
roles[1].exchanges, roles[1].counters = Crew(), Counters(launches_lost=2)
role = None
def run(role):
    plan = process.Plan(Process(), tuple(role.config for role in roles))
    return process.run(plan, lambda: plan, lambda config, before: roles[config.name == "b"])
roles[1].exchanges.spawn(exchange_until_told)
"""
    with script(code) as running:
        running.wait_for("run 1")
        running.kill(signal.SIGUSR2)
        running.wait_for("  INFO  [a] role: exchanges 0; since the start: nothing yet\n")
        running.wait_for("  INFO  [b] role: exchanges 1; since the start: launches_lost 2\n")


def test_the_service_manager_is_told_ready_when_the_tunnels_have_begun_and_not_before(tmp_path, monkeypatch):
    code = """
class Slow(Role):
    def work(self):
        wait_read(sys.stdin.fileno())
        self.begun.set()
role = Slow()
"""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        with script(code) as running:
            assert manager.recv(1000).startswith(b"STATUS=")
            running.process.stdin.write(b"\n")
            running.process.stdin.flush()
            while manager.recv(1000) != b"READY=1":
                pass


def test_an_error_in_a_greenlet_is_logged_and_ends_no_other():
    with script("role = Role()\nrole.work = lambda: gevent.spawn(lambda: 1 / 0)") as running:
        running.wait_for("ZeroDivisionError")
        assert re.search("  ERROR  unexpected error in a greenlet\nTraceback", running.said)
        running.kill(signal.SIGTERM)
        assert running.wait() == 0


def test_starting_unpatched_is_refused_and_does_not_hang():
    with script("role = Role()", patch="") as running:
        assert running.wait() == 1
        assert "RuntimeError: gevent.monkey.patch_all() must run before a service starts" in running.said
        assert "run 1" not in running.said


def test_each_tunnel_fails_for_itself():
    code = """
class Sound(Role):
    def work(self):
        log.info("sound works")
broken = Role("broken")
broken.work = lambda: 1 / 0
role = Sound()
if __name__ == "__main__":
    sys.exit(run(broken, role))
"""
    with script(code) as running:
        running.wait_for("run 3")  # of the broken one
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert running.said.count("sound works") == 1
        assert running.said.count("role ended") == 1
