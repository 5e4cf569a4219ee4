"""What is told of tunnels over HTTP: numbers, words, who may ask, and that nobody who asks does harm."""

import contextlib
import datetime
import errno
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import fields
from pathlib import Path

import gevent
import pytest
from exchanges import configure
from gevent.event import Event as Flag
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support import BOUND_S, LOOPBACK, bounded, out_of_descriptors, read_all, wait_until

from nodepass_gevent import cli, exposition, options, status_answers, status_client, status_server
from nodepass_gevent.config import Address, Process
from nodepass_gevent.crew import Crew
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.keyring import read_token
from nodepass_gevent.log import Dropped, Event
from nodepass_gevent.metrics import BOUNDS_S, NUMBERS, Counters, Histogram
from nodepass_gevent.service import Service
from nodepass_gevent.state import Description, Ended, Peer, Presented
from nodepass_gevent.status import HISTORY_S, Status, quantile
from nodepass_gevent.status_answers import Application
from nodepass_gevent.status_server import CONNECTIONS, REQUEST_BYTES, StatusServer

TOKEN = "a-token-of-16-characters"
PEER = Peer("192.0.2.7:4711", 2, 1000.0, 5, 16)


class FakeRole:
    """A role that is what a test says."""

    def __init__(self, **settings):
        self.config = configure(**settings)
        self.counters = Counters()
        self.exchanges = Crew(4)
        self.description = Description((PEER,), None)
        self.begun = Flag()

    def describe(self):
        return self.description


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def service(**settings):
    return Service(FakeRole(**settings))


def state(*services, events=(), dropped=Dropped, clock=time.monotonic):
    return Status(services, lambda: events, dropped, clock)


def words(each):
    return state(each).snapshot().words


# Counters


def test_what_runs_counts_before_it_has_ended_and_once_when_it_has():
    counters, carried = Counters(bytes_up=1), [10, 20]

    def traffic():
        return *carried, 1, 2

    counters.running.add(traffic)
    assert counters.total() | {"bytes_up": 11, "bytes_down": 20, "datagrams_up": 1} == counters.total()
    carried[0] = 30
    assert counters.total()["bytes_up"] == 31
    counters.ended(traffic)
    assert (counters.bytes_up, counters.total()["bytes_up"], counters.running) == (31, 31, set())


def test_a_time_counts_in_the_first_bucket_that_holds_it():
    times = Histogram()
    for seconds in (0.0005, 0.001, 0.0011, 11):
        times.observe(seconds)
    assert times.counts == [2, 1, *[0] * (len(BOUNDS_S) - 2), 1]
    assert times.sum_s == pytest.approx(11.0026)
    assert quantile(times.counts, 0.5) == 0.001
    assert quantile([0] * len(times.counts), 0.5) is None


# Words


def test_a_server_with_its_client_serves():
    assert words(service()) == "Serving: 1 client connected, no exchanges; nothing wrong in the last minute."


def test_a_server_without_a_client_waits_and_says_when_the_last_one_left():
    each = service()
    each.role.description = Description((), None, Ended("client 192.0.2.7:1 left", time.time() - 5))
    assert words(each) == "Waiting: no client is connected, no exchanges; 5 s ago: client 192.0.2.7:1 left."
    assert [state(one).document()["ready"] for one in (each, service())] == [False, True]


def test_a_client_that_cannot_connect_says_why_and_when_it_tries_again():
    each = service(role="client", tunnel=Address("192.0.2.1", 10101))
    each.role.description = Description((), None)
    assert words(each) == "Connecting to 192.0.2.1:10101, no exchanges; nothing wrong in the last minute."
    each.ended, each.next_try_at = Ended("connection refused", time.time()), time.time() + 3
    assert words(each) == "Not connected: connection refused; trying again in 3 s, no exchanges."
    assert [tunnel.condition for tunnel in state(each).snapshot().missing] == ["failing"]


def test_a_service_says_how_its_last_try_ended_and_when_the_next_one_comes(spawn):
    each = service(role="client", tunnel=Address("192.0.2.1", 1), service_cooldown_s=30.0)
    each.role.description, tries = Description((), None), []

    def run():
        tries.append(time.time())
        raise OSError(errno.ECONNREFUSED, "Connection refused")

    each.role.run = run
    spawn(each.run)
    wait_until(lambda: len(tries) > 1 and each.next_try_at is not None)
    assert each.failures == len(tries)
    assert each.ended.why == "connection refused"
    assert tries[-1] <= each.ended.at <= each.next_try_at <= each.ended.at + 30
    assert words(each).startswith("Not connected: connection refused; trying again in ")
    each.role.run, each.role.reload = lambda: gevent.sleep(BOUND_S), lambda: None
    each.reload()
    wait_until(lambda: each.next_try_at is None)
    assert "Connecting to 192.0.2.1:1, no exchanges; 0 s ago: connection refused." in words(each)


def test_a_configuration_that_was_refused_is_told_until_one_is_taken_up():
    status = state(service(name="web"))
    assert status.document()["configuration_refused"] is None
    status.refused = Ended("tls: '7' is not one of 0, 1, 2", 5.0)
    snapshot = status.snapshot()
    told = " The configuration was refused, and the one before it goes on: tls: '7' is not one of 0, 1, 2."
    assert snapshot.words.endswith(told)
    assert status.document()["configuration_refused"] == {"why": "tls: '7' is not one of 0, 1, 2", "at": 5.0}
    assert b"\nnodepass_config_last_reload_successful 0.0\n" in exposition.expose(snapshot)
    status.refused = None
    assert told not in status.snapshot().words
    assert b"\nnodepass_config_last_reload_successful 1.0\n" in exposition.expose(status.snapshot())


def test_what_went_wrong_in_the_last_minute_is_told_with_its_number():
    each = service()
    status = state(each)
    status.sample(0)
    each.role.counters.exchanges_failed += 2
    each.role.counters.launches_lost += 1
    status.sample(0)
    assert status.snapshot().words.endswith("; 2 exchanges failed, 1 launch lost in the last minute.")
    for _ in range(60):
        status.sample(0)
    assert status.snapshot().words.endswith("; nothing wrong in the last minute.")


def test_what_went_wrong_in_the_first_second_is_told_before_and_after_it_has_passed():
    each = service()
    status = state(each)
    each.role.counters.exchanges_failed += 1
    for _ in range(60):
        assert status.snapshot().words.endswith("; 1 exchange failed in the last minute.")
        status.sample(0)
    assert status.snapshot().words.endswith("; nothing wrong in the last minute.")


def test_what_went_wrong_since_the_last_sample_is_told_and_counted_once():
    each = service()
    status = state(each)
    status.sample(0)
    each.role.counters.exchanges_failed += 1
    assert status.snapshot().words.endswith("; 1 exchange failed in the last minute.")
    status.sample(0)
    assert status.snapshot().words.endswith("; 1 exchange failed in the last minute.")


def test_what_went_wrong_under_former_settings_is_told_once():
    services = [service()]
    status = Status(services, list, Dropped)
    for _ in range(2):
        before = services[0].role.counters
        before.exchanges_failed += 1
        services[0] = service()
        services[0].role.counters = before
        assert status.snapshot().words.endswith("; 1 exchange failed in the last minute.")
        for _ in range(60):
            status.sample(0)
        assert status.snapshot().words.endswith("; nothing wrong in the last minute.")


def test_what_was_counted_while_nobody_looked_is_not_of_the_last_minute():
    each, clock = service(), Clock()
    status = state(each, clock=clock)  # and then its address is set by a reload, or is again
    for _ in range(2):
        each.role.counters.exchanges_failed += 1
        each.role.counters.tcp_exchanges = each.role.counters.bytes_up = 10**6
        each.role.counters.first_bytes.observe(1)
        clock.now += 61
        assert status.snapshot().words.endswith("; nothing wrong in the last minute.")
        clock.now += 61
        status.sample(0.7)
        document = status.document()
        row = dict(zip(document["history"]["fields"], document["history"]["rows"][-1], strict=True))
        assert (row["bytes_up"], row["begun"], row["errors"], row["first_byte_mean_s"]) == (0, 0, 0, None)
        assert document["worst_loop_lag_s"] == 0.7
        each.role.counters.exchanges_failed += 1
        assert status.document()["tunnels"][0]["wrong_in_last_minute"]["exchanges_failed"] == 1


def test_a_tunnel_whose_places_are_all_taken_says_so(spawn):
    full, other = service(semaphore_limit=4), service(name="other")
    gate = Flag()
    for _ in range(4):
        full.role.exchanges.spawn(gate.wait)
    said = "all places are taken (semaphore-limit), further users wait"
    assert words(full) == f"Serving: 1 client connected, 4 exchanges; {said}."
    assert state(full, other).snapshot().words.endswith(f"4 exchanges; server: {said}.")
    gate.set()
    wait_until(lambda: words(full) == "Serving: 1 client connected, no exchanges; nothing wrong in the last minute.")


def test_beside_what_went_wrong_stands_the_last_warning_of_that_tunnel():
    each, now = service(name="web"), time.time()
    status = state(
        each,
        events=[
            Event(now - 5, "warn", "web", "before"),
            Event(now - 4, "error", "web", "target 192.0.2.1:80: connection refused " + 300 * "x "),
            Event(now - 3, "info", "web", "no warning"),
            Event(now - 2, "warn", "other", "of another tunnel"),
        ],
    )
    assert status.snapshot().words.endswith("; nothing wrong in the last minute.")
    status.sample(0)
    each.role.counters.exchanges_failed += 1
    status.sample(0)
    told = status.snapshot().words
    assert "; 1 exchange failed in the last minute; last warning: target 192.0.2.1:80: connection refused x" in told
    assert told.endswith("x ….") and len(told) < 400


def test_a_server_that_waits_for_its_client_tells_whom_it_has_refused():
    why = "refused caller 192.0.2.1:4711: its proof of the tunnel key is wrong"
    each = service(name="web")
    each.role.description = Description((), None, refused=Ended(why, time.time() - 5))
    status = state(each, service(name="other"))
    told = f"no client is connected, 5 s ago: {why}."
    assert status.snapshot().words == f"Only 1 of 2 tunnels serving, no exchanges; web: {told}"
    assert status.snapshot().tunnels[0].words == f"Waiting: no client is connected, no exchanges; 5 s ago: {why}."
    each.role.description = Description((PEER,), None, refused=Ended(why))
    assert why not in status.snapshot().words
    each.role.description = Description((), None, refused=Ended(why, time.time() - 61))
    assert why not in status.snapshot().words


def test_a_warning_of_more_than_a_minute_ago_is_not_told():
    each = service(name="web")
    status = state(each, events=[Event(time.time() - 61, "warn", "web", "long ago")])
    status.sample(0)
    each.role.counters.exchanges_failed += 1
    status.sample(0)
    assert status.snapshot().words.endswith("; 1 exchange failed in the last minute.")


@pytest.mark.parametrize(("days", "told"), [(20, ""), (13, "expires in 12 days"), (1.5, "1 day."), (-1, "has expired")])
def test_a_certificate_that_expires_soon_is_told(days, told):
    each = service()
    each.role.description = Description((PEER,), Presented("AB", "sha256:ab", time.time() + days * 86400))
    assert ("certificate" in words(each)) == bool(told)
    assert told in words(each)


def test_of_several_tunnels_those_whose_certificate_expires_soon_are_named():
    a, b = service(name="a"), service(name="b")
    a.role.description = Description((PEER,), Presented("AB", "sha256:ab", time.time() + 1.5 * 86400))
    end = "; a: the certificate expires in 1 day."
    assert state(a, b).snapshot().words.endswith(f"no exchanges; nothing wrong in the last minute{end}")
    b.role.description = Description((), None)
    assert state(a, b).snapshot().words.endswith(f"; b: no client is connected{end}")


def test_a_process_that_was_held_up_says_so():
    status = state(service())
    status.sample(0.7)
    assert status.snapshot().words.endswith(" The process was held up for 0.7 s.")


def test_log_lines_that_were_lost_are_told_with_their_number_and_why():
    dropped = [Dropped(slow=1, failed=33, why="no space left on device", still=True)]
    status = state(service(), dropped=lambda: dropped[-1])
    told = "Serving: 1 client connected, no exchanges. 34 log lines lost in the last minute: no space left on device."
    assert status.snapshot().words == told
    for _ in range(59):
        status.sample(0)
    document = status.document()
    assert (document["words"], document["log_lines_lost_in_last_minute"]) == (told, 34)
    status.sample(0)
    assert status.snapshot().words.endswith(", no exchanges. The last log lines were lost: no space left on device.")
    dropped.append(dropped[-1]._replace(still=False))
    assert status.snapshot().words.endswith(", no exchanges; nothing wrong in the last minute.")
    dropped.append(dropped[-1]._replace(slow=2, why="the reader of the log is too slow"))
    assert status.snapshot().words.endswith(" 1 log line lost in the last minute: the reader of the log is too slow.")


def test_log_lines_that_were_lost_while_nobody_looked_are_not_of_the_last_minute():
    clock = Clock()
    status = state(service(), dropped=lambda: Dropped(failed=5, why="no space left on device"), clock=clock)
    clock.now += 61
    assert status.document()["log_lines_lost_in_last_minute"] == 0


def test_of_several_tunnels_those_that_do_not_serve_are_named():
    all_of_them = [service(name=name) for name in ("a", "b", "c")]
    assert state(*all_of_them).snapshot().words.startswith("Serving: 3 tunnels, each with its peer, no exchanges; ")
    all_of_them[1].role.description = Description((), None)
    status = state(*all_of_them)
    assert status.snapshot().words == "Only 2 of 3 tunnels serving, no exchanges; b: no client is connected."
    status.sample(0)
    all_of_them[0].role.counters.exchanges_failed += 1
    all_of_them[2].role.counters.exchanges_failed += 2
    status.sample(0)
    assert status.snapshot().words.endswith("; b: no client is connected; 3 exchanges failed in the last minute.")


def test_a_tunnel_that_drains_is_stopping_and_not_ready():
    each = service()
    each.role.exchanges.draining = True
    snapshot = state(each).snapshot()
    assert (snapshot.missing[0].condition, snapshot.words[:25]) == ("stopping", "Stopping: no exchanges le")


# History


def test_a_row_says_what_happened_in_its_second():
    each, clock = service(), Clock()
    status, counters = state(each, clock=clock), each.role.counters
    clock.now += 1
    status.sample(0)
    counters.tcp_exchanges, counters.bytes_up, counters.bytes_down, counters.exchanges_failed = 2, 1000, 3000, 1
    counters.first_bytes.observe(0.004)
    counters.first_bytes.observe(0.002)
    clock.now += 2
    wait_until(lambda: time.time() > status.document()["history"]["rows"][0][0] + 0.001)
    status.sample(0)
    document = status.document()
    history, (tunnel,) = document["history"], document["tunnels"]
    first, second = (dict(zip(history["fields"], row, strict=True)) for row in history["rows"])
    assert (first["begun"], first["first_byte_mean_s"], first["pool_ready"]) == (0, None, 5)
    assert (second["begun"], second["errors"], second["first_byte_mean_s"]) == (2, 1, 0.003)
    assert (second["bytes_up"], second["bytes_down"]) == (500, 1500)
    assert tunnel["per_second"] == {"bytes_up": 333, "bytes_down": 1000}
    assert status.document(since=first["time"])["history"]["rows"] == [tuple(second.values())]


def test_the_rate_of_a_tunnel_is_that_of_ten_seconds():
    each = service()
    status = state(each)
    for moved in (0, 5000, 0, 0):
        each.role.counters.bytes_down += moved
        status.sample(0)
    assert status.document()["tunnels"][0]["per_second"]["bytes_down"] > 0  # although it came in one of them
    for _ in range(10):
        status.sample(0)
    assert status.document()["tunnels"][0]["per_second"]["bytes_down"] == 0


def test_a_tunnel_that_is_new_or_in_the_place_of_another_counts_from_zero():
    services, clock = [service()], Clock()
    status = Status(services, list, Dropped, clock)
    services[0].role.counters.bytes_up = 10**9
    clock.now += 1
    status.sample(0)
    services[0] = service()
    services[0].role.counters.bytes_up = 5
    services.append(service(name="new"))
    services[1].role.counters.bytes_up = 10**6
    clock.now += 1
    status.sample(0)
    assert [row[1] for row in status.document()["history"]["rows"]] == [10**9, 10**6 + 5]
    carried = services[0].role.counters
    services[0] = service()
    services[0].role.counters = carried
    clock.now += 1
    status.sample(0)
    assert status.document()["history"]["rows"][2][1] == 0


def test_a_sample_that_fails_does_not_have_the_next_one_count_anew():
    services, clock = [service(name=name) for name in ("a", "b")], Clock()
    status, describe = state(*services, clock=clock), services[1].role.describe
    for each in services:
        each.role.counters.bytes_up = each.role.counters.exchanges_failed = 1000
    clock.now += 1
    status.sample(0)
    services[1].role.describe = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        status.sample(0)
    services[1].role.describe = describe
    services[1].role.counters.exchanges_failed += 1
    clock.now += 1
    status.sample(0)
    assert [(row[1], row[5]) for row in status.document()["history"]["rows"]] == [(2000, 2000), (0, 1)]


def test_the_history_is_bounded():
    status = state(service())
    for _ in range(HISTORY_S + 10):
        status.sample(0)
    assert len(status.document()["history"]["rows"]) == HISTORY_S


# Metrics


def metrics(*services):
    """Give all samples, by name and labels."""
    text = exposition.expose(state(*services, dropped=lambda: Dropped(slow=1, failed=2)).snapshot()).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}, text


def test_every_counter_of_a_tunnel_is_a_metric():
    each = service(name="web")
    for number, name in enumerate(NUMBERS, start=100):
        setattr(each.role.counters, name, number)
    samples, _ = metrics(each)
    assert set(range(100, 100 + len(NUMBERS))) <= set(samples.values())
    told = [name for _, _, _, values in exposition.COUNTERS for name in values]
    assert sorted(told) == sorted(NUMBERS)
    up = samples["nodepass_transferred_bytes_total", ("direction", "up"), ("tunnel", "web")]
    assert up == each.role.counters.bytes_up


def test_times_to_the_first_byte_are_a_cumulative_histogram():
    each = service(name="web")
    for seconds in (0.002, 0.2, 60):
        each.role.counters.first_bytes.observe(seconds)
    samples, _ = metrics(each)
    name, tunnel = "nodepass_time_to_first_byte_seconds", ("tunnel", "web")
    assert [samples[f"{name}_bucket", ("le", le), tunnel] for le in ("0.001", "0.0025", "0.25", "10.0", "+Inf")] == [
        0, 1, 2, 2, 3
    ]  # fmt: skip
    assert (samples[f"{name}_count", tunnel], samples[f"{name}_sum", tunnel]) == (3, 60.202)


def test_gauges_say_whether_tunnels_work():
    up, down = service(name="up"), service(name="down")
    expires = datetime.datetime(2030, 1, 1, tzinfo=datetime.timezone.utc).timestamp()
    up.role.description = Description((PEER,), Presented("AB", "sha256:ab", expires))
    down.role.description, down.next_try_at, down.failures = Description((), None), time.time() + 1, 2
    samples, _ = metrics(up, down)

    def of(name):
        return [samples.get((name, ("tunnel", tunnel))) for tunnel in ("up", "down")]

    assert of("nodepass_up") == of("nodepass_peer_connected") == [1, 0]
    assert of("nodepass_pool_connections") == [5, 0]
    assert of("nodepass_failures_total") == [0, 2]
    assert of("nodepass_certificate_expiry_timestamp_seconds") == [expires, None]
    assert samples["nodepass_log_lines_dropped_total",] == 3
    assert samples["process_open_fds",] > 3


def test_promtool_has_nothing_to_say_of_the_metrics():
    promtool = shutil.which("promtool")
    if promtool is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    _, text = metrics(service(name='we"b\n'), service(name="b"))
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_each_metric_and_each_field_stands_in_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "status.rst").read_text()
    _, text = metrics(service())
    missing = [name for name in re.findall("# TYPE (nodepass_[a-z_]+) ", text) if f"``{name}`` " not in page]
    each = service()
    each.role.description = Description((PEER,), Presented("AB", "sha256:ab", 1.0))
    document = state(each, events=[Event(1.0, "info", "", "x")]).document()
    (tunnel,) = document["tunnels"]
    names = [*document, *tunnel, *tunnel["peers"][0], *tunnel["certificate"], *tunnel["first_byte_s"]]
    names += [*document["history"]["fields"], *document["events"][0], *(each.name for each in fields(Ended))]
    missing += [name for name in names if f"``{name}``" not in page]
    missing += [kind for _, _, _, values in exposition.COUNTERS for kind in values.values() if kind not in page]
    assert not missing


# HTTP


@pytest.fixture
def ask(no_leaks):
    """Start status servers; give functions that ask them and give code, headers and body."""
    started = []

    def start(*services, token=None, address=LOOPBACK, events=()):
        status = state(*services, events=events)
        server = StatusServer(address, token, status)
        server.start()
        started.append(server)
        wait_until(lambda: server.port)

        def request(path, method="GET", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=BOUND_S)
            with contextlib.closing(connection):
                connection.request(method, path, headers=headers)
                answer = connection.getresponse()
                return answer.status, answer.headers, answer.read().decode()

        request.server, request.status = server, status
        return request

    yield start
    for server in started:
        server.stop()


def test_each_address_answers_what_it_is_for(ask):
    request = ask(service(name="web"))
    assert request("/healthz")[::2] == request("/livez")[::2] == (200, "ok\n")
    assert request("/readyz")[::2] == (200, "ready\n")
    code, headers, body = request("/metrics")
    assert (code, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'nodepass_up{tunnel="web"} 1.0\n' in body
    code, headers, body = request("/status.json")
    assert (code, headers["Content-Type"], json.loads(body)["ready"]) == (200, "application/json", True)
    code, headers, body = request("/")
    assert (code, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert body.startswith("<!doctype html>")
    assert request("/else")[0] == 404


def test_who_is_missing_is_told_by_readyz(ask):
    good, bad = service(name="good"), service(name="bad")
    bad.role.description = Description((), None)
    code, _, body = ask(good, bad)("/readyz")
    assert code == 503
    assert body.startswith("not ready\nbad: Waiting: no client is connected")
    assert "good" not in body


def test_a_page_may_load_nothing_from_elsewhere(ask):
    request = ask(service())
    for path in ("/", "/status.json", "/else"):
        _, headers, _ = request(path)
        policy = headers["Content-Security-Policy"]
        assert re.fullmatch(
            r"default-src 'none'; script-src 'sha256-\S{44}'; style-src 'sha256-\S{44}'; connect-src 'self';"
            r" img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            policy,
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
    assert not re.findall("https?://(?!www.w3.org/2000/svg)", request("/")[2])


def test_head_gets_the_headers_alone_and_no_other_method_anything(ask):
    request = ask(service())
    code, headers, body = request("/healthz", "HEAD")
    assert (code, headers["Content-Length"], body) == (200, "3", "")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "X"):
        code, headers, _ = request("/healthz", method)
        assert (code, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:1", "LOCALHOST", "[::1]:1", "192.0.2.1"])
def test_hosts_that_are_addresses_are_served(ask, host):
    assert ask(service())("/status.json", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["status.example:9100", "STATUS.example"])
def test_the_name_that_the_address_has_in_the_settings_is_ours(host):
    said = []
    application = Application(Address("Status.Example", 9100), None, state(service()))
    asked = {"REQUEST_METHOD": "GET", "HTTP_HOST": host, "PATH_INFO": "/healthz", "QUERY_STRING": ""}
    assert (application(asked, lambda code, _: said.append(code)), said) == ([b"ok\n"], ["200 OK"])


def test_what_is_no_time_to_begin_at_is_refused(ask):
    request = ask(service())
    assert request("/status.json?since=soon")[::2] == (400, "since is a Unix time\n")


def test_who_names_no_host_is_served(ask):
    """A health check in HTTP/1.0."""
    request = ask(service())
    with socket.create_connection(("127.0.0.1", request.server.port), BOUND_S) as caller:
        caller.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert read_all(caller).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9100", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_name_that_a_browser_was_told_for_our_address_is_refused(ask, host):
    assert ask(service())("/status.json", Host=host)[0] == 421


def test_a_token_opens_what_tells_more_than_that_the_process_is_alive(ask):
    bad = service()
    bad.role.description = Description((), None)
    request = ask(bad, token=TOKEN)
    for path in ("/metrics", "/status.json"):
        for said in ("", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer \xff"):
            code, answered, body = request(path, Authorization=said)
            assert (code, answered["WWW-Authenticate"], body) == (401, "Bearer", "a token is needed\n")
        assert request(path, Authorization=f"Bearer {TOKEN}", Host="a.name")[0] == 200
    assert request("/healthz")[::2] == (200, "ok\n") and request("/")[2].endswith("</html>\n")
    assert request("/readyz")[::2] == (503, "")
    assert "no client" in request("/readyz", Authorization=f"bearer  {TOKEN} ")[2]


def test_a_fault_of_ours_is_a_500_and_one_line_and_the_next_request_is_served(ask, said):
    each = service()
    request = ask(each)
    describe = each.role.describe
    each.role.describe = lambda: 1 / 0
    assert request("/status.json")[0] == request("/metrics")[0] == 500
    assert [line for line in said.lines if line.startswith("ERROR")] == [
        "ERROR status: unexpected error: ZeroDivisionError('division by zero')"
    ] * 2
    each.role.describe = describe
    assert request("/status.json")[0] == 200


def test_a_sample_that_fails_is_told_and_the_next_one_is_taken(ask, said, monkeypatch):
    monkeypatch.setattr(status_server, "SAMPLE_S", 0.01)
    each = service()
    describe = each.role.describe
    each.role.describe = lambda: 1 / 0
    request = ask(each)
    wait_until(lambda: said.find("ERROR status: unexpected error"))
    each.role.describe = describe
    wait_until(lambda: request.status.document()["history"]["rows"])


def test_a_port_that_is_taken_is_told_once_and_tried_again(said, ask, no_leaks):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = StatusServer(Address("127.0.0.1", port), None, state(service()))
        server.start()
        try:
            wait_until(lambda: said.find(f"WARNING status: address already in use: 127.0.0.1:{port}; trying again"))
            taken.close()
            wait_until(lambda: server.port == port)
        finally:
            server.stop()


def test_an_address_that_has_no_name_yet_is_told_and_tried_again(said, no_leaks):
    server = StatusServer(Address("no-such-name.invalid", 1), None, state(service()))
    server.start()
    try:
        wait_until(lambda: said.find("WARNING status: resolve no-such-name.invalid: .*; trying again"))
        wait_until(lambda: said.find("DEBUG status: resolve no-such-name.invalid: "))
        assert said.find("status: resolve").string.startswith("WARNING ")  # the first time
    finally:
        server.stop()


def test_a_caller_for_whom_there_is_no_memory_does_not_end_the_server(ask, said, monkeypatch):
    request = ask(service())
    make_room, missing = StatusServer._make_room, [MemoryError()]

    def make(self):
        if missing:
            raise missing.pop()
        make_room(self)

    monkeypatch.setattr(StatusServer, "_make_room", make)
    monkeypatch.setattr(request.server, "address", Address("127.0.0.1", request.server.port))
    with pytest.raises(OSError):
        request("/healthz")
    wait_until(lambda: said.find("WARNING status: MemoryError; trying again"))
    request.server.port = 0
    wait_until(lambda: request.server.port)
    assert request("/healthz")[0] == 200


def test_out_of_descriptors_it_pauses_and_holds_up_nobody(ask, said, monkeypatch):
    monkeypatch.setattr(status_server, "ACCEPT_PAUSE_S", 0.05)
    request = ask(service())
    with socket.socket() as caller:
        with out_of_descriptors():
            caller.connect(("127.0.0.1", request.server.port))
            wait_until(lambda: said.find("DEBUG status: too many open files"))
        caller.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(caller).startswith(b"HTTP/1.1 200 ")


def test_callers_that_leave_without_a_request_leave_nothing(ask):
    request = ask(service())
    for _ in range(3):
        socket.create_connection(("127.0.0.1", request.server.port)).close()
    assert request("/healthz")[0] == 200
    wait_until(lambda: not request.server._unread)


def test_what_is_no_request_is_answered_400_or_cut(ask, capfd):
    request = ask(service())

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.sampled_from((b"", b"GET / HTTP/1.1\r\n", b"GET / ")), st.binary(max_size=200))
    def answered(begin, data):
        data = begin + data
        with socket.create_connection(("127.0.0.1", request.server.port), BOUND_S) as caller:
            caller.sendall(data)
            caller.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                answer = read_all(caller)
                assert not answer or re.match(rb"HTTP/1\.1 (200|400|404|405|414|421) ", answer), (data, answer)

    answered()
    assert request("/healthz")[0] == 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("headers", "size"), [(1, REQUEST_BYTES), (5, 60000), (150, 10)])
def test_a_request_that_is_too_long_is_refused(ask, capfd, headers, size):
    request = ask(service())
    with socket.create_connection(("127.0.0.1", request.server.port), BOUND_S) as caller:
        answer = b""
        with contextlib.suppress(ConnectionError):
            caller.sendall(b"GET / HTTP/1.1\r\n" + b"X-Header: %s\r\n" % (b"x" * size) * headers + b"\r\n")
            answer = read_all(caller)
        assert answer.startswith(b"HTTP/1.1 400 ") or not answer
    assert request("/healthz", X=b"x" * (REQUEST_BYTES - 500))[0] == 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("body", ["Content-Length: 9", "content-length: 1e9", "Transfer-Encoding: chunked"])
def test_a_request_that_promises_a_body_is_refused_and_not_waited_for(ask, body):
    request = ask(service())
    with socket.create_connection(("127.0.0.1", request.server.port)) as caller, bounded(2):
        caller.sendall(f"GET /livez HTTP/1.1\r\nHost: localhost\r\n{body}\r\n\r\n".encode())
        assert read_all(caller).startswith(b"HTTP/1.1 400 ")


def test_callers_that_say_nothing_or_half_a_request_give_way_to_others_at_once(ask, monkeypatch):
    monkeypatch.setattr(status_server, "REQUEST_S", 3600.0)
    request = ask(service())
    with contextlib.ExitStack() as stack:
        address = "127.0.0.1", request.server.port
        for number in range(3 * CONNECTIONS):
            caller = stack.enter_context(socket.create_connection(address, BOUND_S))
            if number % 2:
                caller.sendall(b"GET /status.json HTTP/1.1\r\nHost: loc")
        assert request("/healthz")[0] == 200


def one_too_many(stack, server):
    """Call for all connections that there is room for, and one more, which waits for room."""
    address = "127.0.0.1", server.port
    callers = [stack.enter_context(socket.create_connection(address, BOUND_S)) for _ in range(CONNECTIONS + 1)]
    wait_until(lambda: len(server._unread) == CONNECTIONS)
    return callers


def test_who_asks_in_time_is_answered_also_where_another_one_waits(ask, monkeypatch):
    monkeypatch.setattr(status_server, "ASK_S", 3600.0)
    request = ask(service())
    with contextlib.ExitStack() as stack:
        callers = one_too_many(stack, request.server)
        gevent.idle()
        callers[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(callers[0]).startswith(b"HTTP/1.1 200 ")


def test_who_has_asked_is_answered_however_long_that_takes_and_the_next_gives_way(ask, monkeypatch):
    monkeypatch.setattr(status_server, "ASK_S", 0.3)
    each, answers = service(), Flag()
    request = ask(each)
    describe = each.role.describe
    each.role.describe = lambda: answers.wait() and describe()
    with contextlib.ExitStack() as stack:
        callers = one_too_many(stack, request.server)
        callers[0].sendall(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(callers[1]) == b""
        answers.set()
        assert read_all(callers[0]).startswith(b"HTTP/1.1 200 ")


def test_a_stop_leaves_nobody_open_who_waits_for_room(ask, monkeypatch):
    monkeypatch.setattr(status_server, "ASK_S", 3600.0)
    monkeypatch.setattr(status_server, "REQUEST_S", 3600.0)
    request = ask(service())
    with contextlib.ExitStack() as stack:
        callers = one_too_many(stack, request.server)
        gevent.idle()
        request.server.stop()
        assert [read_all(caller) for caller in callers] == [b""] * len(callers)


def test_of_those_who_have_asked_nobody_gives_way(ask, monkeypatch):
    monkeypatch.setattr(status_answers, "SHARE", 0)
    request = ask(service())
    asked = [gevent.spawn(request, "/healthz") for _ in range(3 * CONNECTIONS)]
    gevent.joinall(asked)
    assert [each.value[0] for each in asked] == [200] * len(asked)


def test_half_a_request_is_cut_in_time(ask, monkeypatch):
    monkeypatch.setattr(status_server, "REQUEST_S", 0.2)
    request = ask(service())
    with socket.create_connection(("127.0.0.1", request.server.port), BOUND_S) as caller:
        caller.sendall(b"GET /status.json HTTP/1.1\r\nHost: loc")
        assert read_all(caller) == b""


def test_answers_take_a_small_share_of_the_time(ask, monkeypatch):
    each = service()
    busy_s, describe = 0.0, each.role.describe

    def slow():
        nonlocal busy_s
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        busy_s += 0.01
        return describe()

    each.role.describe = slow
    request = ask(each)
    began, asked = time.monotonic(), [gevent.spawn(request, "/readyz") for _ in range(6)]
    gevent.joinall(asked)
    assert busy_s >= 0.06
    assert time.monotonic() - began > 5 * 0.01 * status_answers.SHARE


# Settings


@pytest.mark.parametrize("text", ["127.0.0.1:9100", "127.9.9.9:9100", "[::1]:9100", "localhost:9100"])
def test_a_loopback_address_needs_no_token(text):
    assert Process(status=Address.parse(text)).status == Address.parse(text)


@pytest.mark.parametrize("text", ["0.0.0.0:9100", ":9100", "[::]:9100", "192.0.2.1:9100", "a.example:9100"])
def test_another_address_needs_a_token(text):
    with pytest.raises(ConfigError, match=r"^status: .* can be asked by others; give a status-token-file"):
        Process(status=Address.parse(text))
    assert Process(status=Address.parse(text), status_token_file="f").status


def test_another_address_without_a_token_ends_with_2(capsys):
    assert cli.main(["server://127.0.0.1:1/127.0.0.1:2", "--status", "0.0.0.0:9100"]) == 2
    assert "status: '0.0.0.0:9100' can be asked by others" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (TOKEN + "\n", 0o640, "has mode 0640"),
        ("short", 0o600, "holds no token"),
        (f"{TOKEN} {TOKEN}", 0o600, "holds no token"),
        ("", 0o600, "holds no token"),
    ],
)
def test_a_token_file_that_is_none_is_refused(tmp_path, content, mode, why):
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"status-token-file: .*{why}") as caught:
        read_token(Process(status_token_file=str(path)))
    assert TOKEN not in str(caught.value)


def test_a_token_is_read_from_its_file(tmp_path):
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(f"{TOKEN}\n")
    assert read_token(Process(status_token_file=str(path))) == TOKEN
    assert read_token(Process()) is None


# Commands


@pytest.mark.parametrize("source", ["flag", "environment", "file", "file with tunnels"])
def test_the_commands_need_no_tunnel(source, tmp_path):
    path = tmp_path / "t.conf"
    tunnel = "[tunnel a]\nurl = server://:1/:2\n" if source == "file with tunnels" else ""
    path.write_text(f"[nodepass]\nstatus = 127.0.0.1:9100\n{tunnel}")
    flags = {"flag": ["--status", "127.0.0.1:9100"], "environment": []}.get(source, ["--config", str(path)])
    environ = {"NODEPASS_STATUS": "127.0.0.1:9100"} if source == "environment" else {}
    for command in ("status", "health"):
        parsed = options.parse([command, *flags], environ)
        assert (parsed.action, parsed.process.status, parsed.configs) == (command, Address("127.0.0.1", 9100), ())


def test_who_is_not_told_whom_to_ask_says_so(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert cli.main(["status"]) == 2
    assert capsys.readouterr().err.startswith("nodepass: error: status: whom to ask is not said; give --status, NODE")


def test_status_tells_it_in_words(ask, capsys):
    each = service(name="web")
    each.role.description = Description((PEER,), Presented("AB", "sha256:ab", 4e9))
    each.role.counters.first_bytes.observe(0.002)
    each.ended = Ended("it \x1b[31m ended", 5.0)
    request = ask(each, events=[Event(1.0, "warn", "", "something \x1b[31m happened")])
    assert cli.main(["status", "--status", f"127.0.0.1:{request.server.port}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Serving: 1 client connected, no exchanges; nothing wrong in the last minute")
    for part in (
        "web: serving",
        "peer 192.0.2.7:4711",
        "5 data connections ready",
        "certificate until 2096-10-02",
        "\n  bytes 0 B up, 0 B down\n  per second 0 B up, 0 B down\n",
        "\nprocess ",
    ):
        assert part in out
    assert r"warn  something \x1b[31m happened" in out
    assert "\x1b" not in out


def test_a_watched_status_keeps_to_the_room_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setenv("LINES", "3")
    assert status_client.fit("Serving\nweb\nevents") == "Servi\nweb"


def test_status_as_json_is_what_the_address_says(ask, capsys):
    request = ask(service(name="web"))
    assert cli.main(["status", "--json", "--status", f"127.0.0.1:{request.server.port}"]) == 0
    assert json.loads(capsys.readouterr().out)["tunnels"][0]["name"] == "web"


def test_health_is_one_line_and_an_exit_code(ask, capsys, tmp_path):
    each = service(name="web")
    each.role.description = Description((), None)
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN)
    request = ask(each, token=TOKEN)
    where = ["--status", f"127.0.0.1:{request.server.port}", "--status-token-file", str(path)]
    assert cli.main(["health", *where]) == 0
    assert capsys.readouterr().out == "healthy: ok\n"
    assert cli.main(["health", "--ready", *where]) == 1
    assert capsys.readouterr().out.startswith("unhealthy: not ready; web: Waiting: no client is connected, ")
    request.server.stop()
    assert cli.main(["health", *where]) == 1
    assert capsys.readouterr().out.startswith(f"unhealthy: 127.0.0.1:{request.server.port}: connection refused")


def test_what_is_not_ready_is_one_sentence_each(ask, capsys):
    tunnels = [service(name=name) for name in ("web", "ssh")]
    for each in tunnels:
        each.role.description = Description((), None)
    request = ask(*tunnels)
    assert cli.main(["health", "--ready", "--status", f"127.0.0.1:{request.server.port}"]) == 1
    said = "Waiting: no client is connected, no exchanges; nothing wrong in the last minute"
    assert capsys.readouterr().out == f"unhealthy: not ready; web: {said}; ssh: {said}\n"


@pytest.mark.parametrize("command", ["status", "health"])
def test_an_address_that_speaks_no_http_is_said_to(command, capsys, spawn):
    def serve():
        caller, _ = listener.accept()
        with caller:
            caller.recv(1000)  # what is unread would be answered by a reset
            caller.sendall(b"//10102?v=2&n=fU5r#1\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        spawn(serve)
        address = "{}:{}".format(*listener.getsockname())
        assert cli.main([command, "--status", address]) == 1
    assert f"{address}: answers, but not in HTTP: is it the status address?\n" in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", ["status", "health"])
def test_where_nobody_listens_it_is_asked_whether_a_process_runs(command, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = "{}:{}".format(*taken.getsockname())
        assert cli.main([command, "--status", address]) == 1
    said = f": {address}: connection refused; does a process with status={address} run?\n"
    assert re.fullmatch(f"(nodepass: error|unhealthy){re.escape(said)}", "".join(capsys.readouterr()))


def test_an_address_that_hangs_up_is_said_to(capsys, spawn):
    def serve():
        caller, _ = listener.accept()
        with caller:
            caller.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        spawn(serve)
        assert cli.main(["status", "--status", "{}:{}".format(*listener.getsockname())]) == 1
    assert "Remote end closed connection without response" in capsys.readouterr().err


def test_who_asks_without_the_token_or_with_a_wrong_one_is_told_so(ask, capsys, tmp_path):
    request, path = ask(service(name="web"), token=TOKEN), tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN[::-1])
    address = f"127.0.0.1:{request.server.port}"
    assert cli.main(["status", "--status", address]) == 1
    assert capsys.readouterr().err == f"nodepass: error: {address}: a token is needed: give --status-token-file\n"
    assert cli.main(["status", "--status", address, "--status-token-file", str(path)]) == 1
    assert capsys.readouterr().err == f"nodepass: error: {address}: the token is wrong\n"


@pytest.mark.parametrize(
    ("peers", "said"), [(1, "healthy: ready"), (0, "unhealthy: not ready; who gives the token is told why")]
)
def test_who_asks_for_readiness_without_the_token_is_told_that_alone(ask, capsys, peers, said):
    each = service(name="web")
    if not peers:
        each.role.description = Description((), None)
    request = ask(each, token=TOKEN)
    assert cli.main(["health", "--ready", "--status", f"127.0.0.1:{request.server.port}"]) == int(not peers)
    assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.parametrize("answer", ["200 OK\r\nContent-Type: text/html", "404 Not Found\r\nContent-Type: text/plain"])
@pytest.mark.parametrize("command", ["status", "health"])
def test_an_address_of_another_program_is_not_taken_for_a_status_address(answer, command, capsys, spawn):
    def serve():
        caller, _ = listener.accept()
        with caller:
            caller.recv(1000)
            caller.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 5\r\n\r\nhello".encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        spawn(serve)
        address = "{}:{}".format(*listener.getsockname())
        assert cli.main([command, "--status", address]) == 1
    said = f"{address}: answers, but not as the status address of this program: {answer[:3]}\n"
    assert said in "".join(capsys.readouterr())


@pytest.fixture
def liar(spawn):
    """Answer on a port as a status address does, with any body; give what a command then says."""
    listeners = []

    def answer(body, *command, code=200):
        def serve():
            caller, _ = listener.accept()
            with caller:
                caller.recv(1000)
                head = f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                caller.sendall(head.encode() + body)

        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        spawn(serve)
        return cli.main([*command, "--status", "{}:{}".format(*listener.getsockname())])

    yield answer
    for each in listeners:
        each.close()


@pytest.mark.parametrize("code", [200, 503])
@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["health"], ["health", "--ready"]])
def test_whoever_has_the_status_port_writes_no_escapes_to_the_terminal(liar, command, code, capsys):
    liar(b"ready \x1b[2J\x1b]0;title\x07\xc2\x9b31m\r", *command, code=code)
    said = "".join(capsys.readouterr())
    assert said.strip().replace("\n", "").isprintable(), said


def test_what_a_stranger_has_said_to_a_tunnel_breaks_no_json(liar, capsys):
    body = json.dumps({"words": "refused caller: not a line of the tunnel protocol: 'np1:x'"})
    assert liar(body.encode(), "status", "--json") == 0
    assert capsys.readouterr().out == f"{body}\n"


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[]", b"[1]", b"1e999", b"", b"no json", b'"\xff"', b"[" * 100_000,
        b'{"words": 1, "tunnels": 5, "events": 1}',
        b'{"words": "", "pid": 1, "started": 1e300, "now": 1, "tunnels": [], "events": []}',
    ],
)  # fmt: skip
def test_an_answer_that_is_not_ours_is_an_error_in_one_line(liar, body, capsys):
    assert liar(body, "status") == 1
    said = capsys.readouterr().err
    assert "answers, but not as the status address of this program: " in said and said.count("\n") == 1
