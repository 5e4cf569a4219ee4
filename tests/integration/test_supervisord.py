"""The real supervisord with the program sections that `nodepass generate supervisor` prints.

One supervisord runs all: a server and a client by URLs, two servers by one section, and one whose file is wrong.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import xmlrpc.client

import pytest
from supervisor.xmlrpc import SupervisorTransport

from nodepass_gevent import generate, options

from .harness import START_S, Process, Target, certificates, free_port, wait_until
from .users import comes_back, read_exactly

CONFIGURATION = """\
[unix_http_server]
file={0}/control
[supervisord]
logfile={0}/supervisord.log
pidfile={0}/supervisord.pid
user=root
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{0}/control
[include]
files={0}/conf.d/*.conf
"""
ODD = "with a ;semicolon, #hash and 100%"  # the name of a directory
ODD_IN_URL = "with%20a%20;semicolon,%20%23hash%20and%20100%25"


def free_decade():
    """Give a port without its last digit, such that the ports with 0 and 1 there are free."""
    while True:
        stem, digit = divmod(free_port(), 10)
        if digit == 0:  # that one is given to nobody else, nor is its ten twice
            with contextlib.suppress(OSError):
                socket.create_server(("127.0.0.1", stem * 10 + 1)).close()
                return stem


class Site:
    def __init__(self, directory, target):
        self.directory = directory
        self.public = ("127.0.0.1", free_port("both"))
        tunnel = f"127.0.0.1:{free_port()}"
        (directory / "conf.d").mkdir()
        (directory / ODD).mkdir()
        files = certificates()
        shutil.copy(files.crt, directory / ODD / "crt")
        shutil.copy(files.key, directory / ODD / "key")
        odd = f"{directory}/{ODD_IN_URL}"
        url = f"server://{tunnel}/127.0.0.1:{self.public[1]}?tls=1&crt={odd}/crt&key={odd}/key"
        self.add("web", url, "--shutdown-timeout=20s")
        self.add("in", f"client://{tunnel}/{target}?service-cooldown=300ms")
        self.stems = free_decade(), free_decade()
        addresses = "/".join(f"127.0.0.1:{stem}%(process_num)d" for stem in self.stems)
        self.add("pair", f"server://{addresses}", "--numprocs", "2")
        wrong = directory / "wrong.conf"
        wrong.write_text(f"url = server://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}\n")
        self.add("wrong", "--config", str(wrong), start_s=60)  # however busy the machine is
        wrong.write_text(wrong.read_text() + "semaphore-limt = 5\n")
        self.configuration = directory / "supervisord.conf"
        self.configuration.write_text(CONFIGURATION.format(directory).replace("user=root\n" * (os.getuid() != 0), ""))

    def add(self, name, *words, start_s=1):
        argv = ["generate", "supervisor", name, *words, "--log-dir", str(self.directory)]
        command = generate.own_command("__main__.py", sys.executable)
        section = generate.supervisor(options.parse(argv, {}), argv, command)
        assert "\nstartsecs=5\n" in section
        quick = section.replace("\nstartsecs=5\n", f"\nstartsecs={start_s}\n")
        (self.directory / "conf.d" / f"{name}.conf").write_text(quick)

    def control(self, *words):
        argv = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self.configuration), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout

    def status(self, name):
        """Give a program's state, and its pid where it runs."""
        transport = SupervisorTransport(serverurl=f"unix://{self.directory}/control")
        with contextlib.closing(transport), xmlrpc.client.ServerProxy("http://localhost", transport) as server:
            about = server.supervisor.getProcessInfo(name)
        return about["statename"], about["pid"]

    def wait_for(self, name, state):
        wait_until(lambda: self.status(name)[0] == state, 2 * START_S, f"{name} {state}")

    def wait_for_line(self, name, text, start=0):
        wait_until(lambda: text in self.log(name)[start:], START_S, f"{text!r} in the log of {name}")

    def log(self, name):
        path = self.directory / f"nodepass-{name}.log"
        return path.read_text() if path.exists() else ""

    def passes(self):
        return comes_back(self.public)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with Target() as target:
        made = Site(tmp_path_factory.mktemp("supervisord"), target.address)
        argv = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(made.configuration)]
        supervisord = Process(argv, name="supervisord")
        try:
            wait_until(lambda: (made.directory / "control").exists(), START_S, "supervisord is there")
            wait_until(made.passes, START_S, "traffic passes")
            yield made
        finally:
            assert supervisord.stop(timeout=60) == 0


@pytest.mark.parametrize("name", ["web", "in", "pair:pair_00", "pair:pair_01"])
def test_the_program_runs(site, name):
    site.wait_for(name, "RUNNING")


def test_the_state_of_all_is_shown(site):
    site.wait_for("web", "RUNNING")
    assert re.search(r"^web +RUNNING +pid [0-9]+, uptime ", site.control("status", "all"), re.MULTILINE)


def test_the_log_is_kept_by_supervisord(site):
    site.wait_for_line("in", "connected to")
    site.wait_for_line("web", "  INFO  listening: tunnel ")
    assert re.search("  INFO  listening: tunnel .* tls 1\n", site.log("web"))


def test_each_of_several_processes_has_its_own_ports_and_log(site):
    for number in (0, 1):
        name = f"pair_{number:02}"
        site.wait_for_line(name, f"listening: tunnel 127.0.0.1:{site.stems[0]}{number}, ")
        assert f"public 127.0.0.1:{site.stems[1]}{number} " in site.log(name)


def test_a_hang_up_is_passed_on(site):
    site.wait_for("web", "RUNNING")
    pid = site.status("web")[1]
    site.control("signal", "HUP", "web")
    site.wait_for_line("web", "SIGHUP: reading configuration, certificates and keys again")
    assert site.status("web") == ("RUNNING", pid) and site.passes()


def test_a_stop_lets_an_exchange_end(site):
    start = len(site.log("web"))
    with socket.create_connection(site.public, 10) as user:
        user.sendall(b"before")
        assert read_exactly(user, 6) == b"before"
        stopping = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(site.configuration), "stop", "web"],
            stdout=subprocess.DEVNULL,
        )
        site.wait_for_line("web", "stopping: exchanges 1", start)
        assert site.status("web")[0] == "STOPPING"
        user.sendall(b"meanwhile")
        assert read_exactly(user, 9) == b"meanwhile"
    assert stopping.wait(START_S) == 0
    assert site.status("web")[0] == "STOPPED"
    assert "stopped, exchanges cut: 0" in site.log("web")[start:]
    site.control("start", "web")
    wait_until(site.passes, START_S, "traffic passes again")


def test_a_crash_is_followed_by_a_start(site):
    site.wait_for("web", "RUNNING")
    pid = site.status("web")[1]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: site.status("web")[1] not in (0, pid), START_S, "another process")
    wait_until(site.passes, START_S, "traffic passes again")


def test_an_end_by_a_signal_from_elsewhere_is_followed_by_a_start(site):
    site.wait_for("in", "RUNNING")
    pid = site.status("in")[1]
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: site.status("in")[1] not in (0, pid), START_S, "another process")


def test_a_wrong_file_is_fatal_and_the_log_says_why(site):
    site.wait_for("wrong", "FATAL")
    said = site.log("wrong").splitlines()
    assert len(said) == 4  # supervisord's startretries, and the first
    assert set(said) == {
        "nodepass: error: unknown key 'semaphore-limt' (did you mean 'semaphore-limit'?) "
        f"[from file {site.directory}/wrong.conf:2]"
    }
    log = (site.directory / "supervisord.log").read_text()
    assert "exited: wrong (exit status 2; not expected)" in log
