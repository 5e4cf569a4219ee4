import contextlib
import logging
import os
import re
import socket
import time

import gevent
import pytest
from gevent import monkey
from support import bounded, wait_until

from nodepass_gevent.notify import Notifier

freeze = monkey.get_original("time", "sleep")


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(5)

    def receive(self):
        return self.socket.recv(4096).decode()

    def waiting(self):
        """Take what has come already."""
        messages = []
        self.socket.setblocking(False)
        try:
            while True:
                messages.append(self.receive())
        except BlockingIOError:
            self.socket.settimeout(5)
            return messages


@pytest.fixture
def notify(no_leaks):
    """Make notifiers, and close them."""
    with contextlib.ExitStack() as stack:
        yield lambda environ: stack.enter_context(contextlib.closing(Notifier(environ)))


@pytest.fixture(params=["path", "abstract"])
def told(request, tmp_path):
    """Give a service manager, and the variables that name it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@nodepass-test-{os.getpid()}"
    manager = Manager(name.replace("@", "\0"))
    with manager.socket:
        yield manager, {"NOTIFY_SOCKET": name}


def test_the_manager_is_told_what_happens(notify, told):
    manager, environ = told
    notifier = notify(environ)
    assert notifier
    notifier.ready()
    assert manager.receive() == "READY=1"
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    said = re.fullmatch("RELOADING=1\nMONOTONIC_USEC=([0-9]+)", manager.receive())
    assert before_us <= int(said[1]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloaded()
    assert manager.receive() == "READY=1"
    notifier.stopping(7.5)
    assert manager.receive() == "STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=7500000"
    notifier.close()
    assert not notifier


def test_a_reload_before_the_tunnels_have_begun_does_not_make_it_ready(notify, told):
    manager, environ = told
    notifier = notify(environ)
    notifier.reloaded()
    notifier.ready()
    assert manager.waiting() == ["READY=1"]


@pytest.mark.parametrize("name", [None, "", "relative", "vsock:2:1"])
def test_without_a_socket_nothing_is_sent(notify, name, spawn):
    notifier = notify({"NOTIFY_SOCKET": name} if name is not None else {})
    assert not notifier
    notifier.ready()
    notifier.stopping(1)
    spawn(notifier.report_for_ever, lambda: 1 / 0).get(timeout=1)


def test_a_manager_that_is_gone_is_no_error(notify, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    notify({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready()
    assert "not told 'READY=1'" in caplog.text


def test_a_manager_that_does_not_read_is_not_waited_for(notify, told):
    _, environ = told
    notifier = notify(environ)
    with bounded(1):
        began = time.monotonic()
        for _ in range(10_000):
            notifier.ready()
        assert time.monotonic() - began < 5


def test_what_the_manager_does_not_take_comes_later(notify, told, spawn):
    manager, environ = told
    notifier = notify(environ | {"WATCHDOG_USEC": "40000"})
    wait_until(lambda: notifier.ready() or not notifier._send("full"))
    notifier.reloading()
    spawn(notifier.report_for_ever, lambda: "x")
    gevent.sleep(0.05)
    said = manager.waiting()
    assert set(said) <= {"READY=1", "full"}
    wait_until(lambda: said.extend(manager.waiting()) or said[-1] == "WATCHDOG=1")
    kept = [text for text in said if text not in ("READY=1", "full", "WATCHDOG=1")]
    assert kept[0].startswith("RELOADING=1\n") and kept[1:] == ["WATCHDOG=1\nSTATUS=x"]


def test_the_watchdog_is_fed_and_a_changed_status_is_told(notify, told, spawn):
    manager, environ = told
    texts = ["1 tunnel", "1 tunnel", "2 tunnels"]
    notifier = notify(environ | {"WATCHDOG_USEC": "40000", "WATCHDOG_PID": str(os.getpid())})
    spawn(notifier.report_for_ever, lambda: texts.pop(0) if texts[1:] else texts[0])
    assert [manager.receive() for _ in range(4)] == [
        "WATCHDOG=1\nSTATUS=1 tunnel",
        "WATCHDOG=1",
        "WATCHDOG=1\nSTATUS=2 tunnels",
        "WATCHDOG=1",
    ]


def test_the_watchdog_is_fed_well_within_its_time(notify, told, spawn):
    manager, environ = told
    spawn(notify(environ | {"WATCHDOG_USEC": "3000000"}).report_for_ever, lambda: "x")
    manager.receive()
    began = time.monotonic()
    assert manager.receive() == "WATCHDOG=1"
    assert time.monotonic() - began < 2.9


def test_a_watchdog_that_has_time_keeps_no_status_back(notify, told, spawn, monkeypatch):
    monkeypatch.setattr("nodepass_gevent.notify.STATUS_S", 0.01)
    manager, environ = told
    notifier, texts = notify(environ | {"WATCHDOG_USEC": "30000000"}), ["1 tunnel", "2 tunnels"]
    spawn(notifier.report_for_ever, lambda: texts.pop(0) if texts[1:] else texts[0])
    assert [manager.receive() for _ in range(2)] == ["WATCHDOG=1\nSTATUS=1 tunnel", "WATCHDOG=1\nSTATUS=2 tunnels"]


def test_a_stuck_event_loop_feeds_no_watchdog(notify, told, spawn):
    manager, environ = told
    spawn(notify(environ | {"WATCHDOG_USEC": "100000"}).report_for_ever, lambda: "x")
    assert manager.receive().startswith("WATCHDOG=1") and manager.receive() == "WATCHDOG=1"
    manager.waiting()  # one more, where the machine has paused
    freeze(0.5)
    assert manager.waiting() == []
    assert manager.receive() == "WATCHDOG=1"


@pytest.mark.parametrize("variables", [{}, {"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}])
def test_without_a_watchdog_of_ours_only_the_status_is_told(notify, told, spawn, variables, monkeypatch):
    monkeypatch.setattr("nodepass_gevent.notify.STATUS_S", 0.01)
    manager, environ = told
    if "WATCHDOG_PID" in variables:
        environ = environ | {"WATCHDOG_USEC": "40000"}
    spawn(notify(environ | variables).report_for_ever, lambda: "x")
    assert manager.receive() == "STATUS=x"
    gevent.sleep(0.05)
    assert manager.waiting() == []
