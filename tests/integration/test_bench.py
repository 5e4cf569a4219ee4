"""The benchmark runs from end to end and reports what it measured. No figure is judged here."""

import importlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from .harness import ROOT
from .programs import require

pytestmark = pytest.mark.timeout(300)

PROGRAM = ROOT / "scripts" / "benchmark"
ALL = {"direct", "nodepass", "nodepass-tls", "haproxy", "haproxy-tls", "stunnel", "ssh-R"}
OURS = {"nodepass", "nodepass-tls"}
TITLES = {  # of each measure: with which ways it is taken
    "bulk, 1 stream up, Gbit/s": ALL,
    "bulk, 8 streams down, CPU s per GB": ALL - {"direct"},
    "requests, 32 users kept alive, per s": ALL,
    "requests, 32 users kept alive, p99 ms": ALL,
    "new connections, 16 users, per s": ALL,
    "new connections, 16 users, CPU us each": ALL - {"direct"},
    "first byte of a fresh connection, p50 ms": ALL,
    "first byte over a line of 100 ms, 200 new users per s, p99 ms": ALL,
    "datagrams of 1,200 bytes there and back, 16 sockets, per s": {"direct", *OURS},
    "memory of an idle exchange, users' side, KiB": ALL - {"direct"},
}


def bench(directory, *options, codes=(0,)):
    """Run the benchmark, short; give what it printed."""
    command = [sys.executable, str(PROGRAM), "--rounds", "1", "--seconds", "0.1", "--out", str(directory), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


def tables(printed):
    """Give the first column of each table by its title."""
    table = re.compile(r"^(.+?)(?: \(.*)?\n\n=[= ]+\n.*\n=[= ]+\n((?:.*\n)+?)=[= ]+$", re.MULTILINE)
    return {title: {line.split()[0] for line in body.splitlines()} for title, body in table.findall(printed)}


def notes(printed):
    """Give what went wrong, by the benchmark's own account; it says these lines itself in every run."""
    usual = ("20", "Python", "command:", "load generator:")
    return [line for line in re.findall(r"^- (.*)", printed, re.MULTILINE) if not line.startswith(usual)]


def assert_reported(directory, name, printed):
    """The files hold what was printed, and a picture that can be drawn."""
    assert (directory / f"{name}.rst").read_text().startswith(printed.strip())
    picture = ElementTree.parse(directory / f"{name}.svg").getroot()
    assert picture.tag.endswith("svg") and len(picture) > 10


def test_every_measure_of_this_tunnel_has_a_row_in_its_table(tmp_path):
    printed = bench(tmp_path, "--only", "direct,nodepass,nodepass-tls")
    assert not notes(printed)
    found = tables(printed)
    assert {title: found.get(title) for title in TITLES} == {
        title: names & {"direct", *OURS} for title, names in TITLES.items()
    }
    assert_reported(tmp_path, "performance-tunnels", printed)


@pytest.mark.parametrize(
    ("names", "programs"),
    [("haproxy,haproxy-tls", "haproxy"), ("stunnel", "stunnel"), ("ssh-R", "sshd")],
    ids=["haproxy", "stunnel", "ssh"],
)
def test_other_tunnels_are_measured_where_they_are_installed(tmp_path, names, programs):
    require(programs)
    printed = bench(tmp_path, "--only", names, "--measure", "latency,line,memory")
    assert not notes(printed)
    assert tables(printed)["first byte over a line of 100 ms, 200 new users per s, p50 ms"] == set(names.split(","))
    assert tables(printed)["first byte of a fresh connection, p50 ms"] == set(names.split(","))
    assert tables(printed)["memory of an idle exchange, target's side, KiB"] == set(names.split(","))


def test_another_commit_is_measured_in_the_same_rounds(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    printed = bench(tmp_path, "--only", "nodepass", "--measure", "latency", "--against", "HEAD")
    assert tables(printed)["first byte of a fresh connection, p50 ms"] == {"nodepass", "nodepass@HEAD"}
    assert "Against HEAD, 1 rounds\n\nNothing is outside the noise." in printed
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "nodepass-bench-" not in listed


def test_growth_is_measured_step_by_step(tmp_path):
    options = ["--growth", "--only", "nodepass", "--measure", "exchanges,datagrams", "--most", "100"]
    printed = bench(tmp_path, *options, codes=(0, 1))  # so few and so short, a step may seem worse than linear
    assert not [note for note in notes(printed) if not note.startswith("worse than linear")]
    found = tables(printed)
    assert found["memory, KiB, over exchanges"] == {"nodepass"}
    assert found["CPU per datagram there and back, us, over bytes in a datagram"] == {"nodepass"}
    assert re.search(r"^nodepass +65,507 ", printed, re.MULTILINE)
    assert_reported(tmp_path, "performance-growth", printed)


def test_system_calls_are_counted(tmp_path):
    require("strace")
    printed = bench(tmp_path, "--syscalls", "--only", "nodepass")
    assert {"recv", "send"} <= tables(printed)["nodepass: system calls per request, kept alive"]
    assert {"accept", "connect"} <= tables(printed)["nodepass: system calls per new connection with one request"]


@pytest.fixture
def report(monkeypatch):
    """Import a module of the benchmark, which is a program and no package."""
    monkeypatch.syspath_prepend(str(PROGRAM))
    yield importlib.import_module("report")
    del sys.modules["report"]


@pytest.mark.parametrize(
    ("old", "new", "less", "more"),
    [
        ([10, 11, 12], [7, 8, 9], "better", "worse"),
        ([7, 8, 9], [10, 11, 12], "worse", "better"),
        ([10, 11, 12], [7, 8, 10], None, None),  # one round is as good
        ([100, 101, 102], [103, 104, 105], None, None),  # hardly apart
        ([10, 11], [7, 8], None, None),  # too few rounds
        ([], [7, 8, 9], None, None),
    ],
)
def test_a_change_is_told_from_noise(report, old, new, less, more):
    for less_is_better, expected in ((True, less), (False, more)):
        measure = report.Measure("title", less_is_better, {"old": old, "new": new})
        assert measure.change("old", "new", 0.05, 3) == expected


def test_a_step_compares_the_growth_of_cost_with_that_of_size(report):
    values = {"way": {10: [1], 100: [20, 20, 90], 200: [40], 400: [160], 800: [160]}}
    curve = report.Curve("cost", 2, False, values)
    assert list(curve.steps("way")) == [(10, None), (100, None), (200, 1.0), (400, 2.0), (800, 0.5)]


def test_every_report_that_the_page_includes_exists():
    page = ROOT / "docs" / "performance.rst"
    included = re.findall(r"^\.\. include:: (.+)$", page.read_text(), re.MULTILINE)
    assert len(included) == 3
    assert all((page.parent / name).is_file() for name in included)
