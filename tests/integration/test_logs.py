"""The log of a running process: files that are rotated, changed settings, several tunnels, floods."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys

import pytest

from .harness import START_S, Process, Target, free_port, wait_until
from .load import visit
from .users import comes_back


class Site:
    """A process that runs a server and a client, ``web`` and ``in``, by a config file, and logs into a file."""

    def __init__(self, directory, target):
        self.log = directory / "logs" / "log"
        self.log.parent.mkdir()
        self._path = directory / "nodepass.conf"
        self.tunnel, self.public = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
        self._server = f"server://127.0.0.1:{self.tunnel[1]}/127.0.0.1:{self.public[1]}"
        self._client = f"client://127.0.0.1:{self.tunnel[1]}/{target}"
        self.write()
        self.process = Process([sys.executable, "-m", "nodepass_gevent", "--config", str(self._path)], name="site")

    def write(self, common="", web="", into="", to=None):
        text = f"log-to = {to or self.log}\n{common}\nservice-cooldown = 300ms\nnetwork = tcp\n"
        text += f"[tunnel web]\nurl = {self._server}\n{web}\n[tunnel in]\nurl = {self._client}\n{into}\n"
        self._path.write_text(text)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def lines(self, path=None):
        return (path or self.log).read_text().splitlines()

    def wait_for(self, pattern, path=None):
        """Wait until a file has a line in which a pattern is found."""
        wait_until(
            lambda: any(re.search(pattern, line) for line in self.lines(path)), START_S, f"the log has {pattern}"
        )

    def ready(self):
        wait_until(lambda: comes_back(self.public), START_S, "traffic passes")


@pytest.fixture
def site(tmp_path):
    with Target() as target:
        made = Site(tmp_path, target.address)
        with made.process:
            made.ready()
            yield made


def test_no_line_is_lost_or_cut_when_the_file_is_rotated_under_load(site):
    site.write("log-format = json\naccess-log = info")
    site.signal(signal.SIGHUP)
    wait_until(lambda: any(line.startswith("{") for line in site.lines()), START_S, "lines are JSON")
    for number in range(1, 6):
        for _ in range(20):
            visit(site.public)
        site.log.rename(site.log.with_suffix(f".{number}"))
        visit(site.public)
        site.signal(signal.SIGUSR1)
        visit(site.public)
        wait_until(site.log.exists, START_S, "there is a new file")
    assert site.process.stop() == 0
    lines = [line for path in sorted(site.log.parent.iterdir()) for line in site.lines(path)]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert all(re.match(r"\d{4}-\d\d-\d\d .*  [A-Z]+  ", line) for line in lines if not line.startswith("{"))
    exchanges = {name: [e for e in events if e.get("event") and e["tunnel"] == name] for name in ("web", "in")}
    assert len(exchanges["web"]) == 5 * 22
    assert sorted(e["id"] for e in exchanges["web"]) == sorted(e["id"] for e in exchanges["in"])
    for web, into in zip(*(sorted(each, key=lambda e: e["id"]) for each in exchanges.values()), strict=True):
        assert (web["end"], into["end"]) == ("ended", "ended")
        assert (web["bytes_up"], web["bytes_down"]) == (into["bytes_up"], into["bytes_down"])
    assert len(list(site.log.parent.iterdir())) == 6


def test_a_file_that_cannot_be_opened_ends_the_start_with_its_name_and_code_2(tmp_path):
    argv = [sys.executable, "-m", "nodepass_gevent", "server://127.0.0.1:0/127.0.0.1:0", "--log-to", str(tmp_path)]
    with Process(argv) as process:
        wait_until(lambda: process.returncode is not None, START_S, "it ends")
        assert process.stop() == 2  # and its lines are read to the end
        (line,) = process.lines
        assert line == f"nodepass: error: log-to: '{tmp_path}' cannot be opened: is a directory [from command line]"


def test_on_a_hang_up_a_file_that_cannot_be_opened_is_refused_and_one_that_can_takes_over(site, tmp_path):
    site.write("log = debug", to=tmp_path)
    site.signal(signal.SIGHUP)
    site.wait_for(r"ERROR  configuration refused, the old one goes on: log-to: '.*' cannot be opened: is a directory")
    visit(site.public)
    assert not any("DEBUG" in line for line in site.lines())
    other = tmp_path / "other"
    site.write("log = debug", to=other)
    site.signal(signal.SIGHUP)
    wait_until(other.exists, START_S, "there is another file")
    before = site.lines()
    visit(site.public)
    site.wait_for(r"DEBUG  \[web\] exchange", other)
    assert site.lines() == before


def test_a_file_that_cannot_be_opened_again_is_an_error_in_the_old_one(site, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(site.log.parent, moved)
    site.signal(signal.SIGUSR1)
    site.wait_for(
        r"ERROR  cannot open '.*/logs/log' again, the old file stays in use: no such file or directory", moved / "log"
    )
    visit(site.public)


def test_each_tunnel_has_its_level_which_a_hang_up_changes(site):
    assert not any("DEBUG" in line for line in site.lines())
    site.write(web="log = debug", into="log = error")
    site.signal(signal.SIGHUP)
    site.wait_for(r"INFO  \[web\] settings changed: log")
    visit(site.public)
    site.wait_for(r"DEBUG  \[web\] exchange")
    assert not any("settings changed" in line or "DEBUG" in line for line in site.lines() if "[in]" in line)
    site.write(web="log = debug", into="log = debug")
    site.signal(signal.SIGHUP)
    site.wait_for(r"INFO  \[in\] settings changed: log")
    visit(site.public)
    site.wait_for(r"DEBUG  \[in\] exchange")


def test_a_flood_of_strangers_is_a_few_lines_and_all_are_counted(site):
    strangers = 100
    for _ in range(strangers):
        with socket.create_connection(site.tunnel, timeout=20) as stranger:
            assert stranger.recv(100)
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(100):
                    pass
    assert site.process.stop() == 0
    refused = [line for line in site.lines() if "refused caller" in line]
    held_back = [int(match[1]) for line in refused if (match := re.search(r"(\d+) more like it", line))]
    assert len(refused) - len(held_back) + sum(held_back) == strangers
    assert len(refused) < strangers / 2
