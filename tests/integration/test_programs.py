"""Real applications through a server process and a client process, in every TLS mode."""

import contextlib
import hashlib
import json
import os
import pwd
import subprocess

import pytest

from . import programs
from .load import tunnel
from .users import ends_cleanly

MIB = 1024 * 1024
RUN_S = 60  # no program here needs ten seconds; a hung one must not hang the suite


@pytest.fixture(scope="module", params=[0, 1, 2], ids="tls={}".format)
def through(request):
    """Open a tunnel to a port, `with through(target_port) as public_port`."""

    @contextlib.contextmanager
    def open_tunnel(port):
        with tunnel(f"127.0.0.1:{port}", request.param, ends_cleanly) as both:
            yield both.public_port

    return open_tunnel


def run(name, *arguments):
    """Run a program to its end and return what it printed; anything on stderr is a failure."""
    command = [programs.require(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert (done.returncode, done.stderr) == (0, ""), f"{name}: {done.stderr or done.stdout}"
    return done.stdout


def random_file(path, size):
    """Write `size` random bytes to `path`; returns their digest."""
    content = os.urandom(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_nginx_serves_a_large_file_whole(through, tmp_path):
    expected = random_file(tmp_path / "file", 64 * MIB)
    with programs.nginx(tmp_path) as port, through(port) as public:
        quietly = ["--noproxy", "*", "--silent", "--show-error", "--fail"]
        run("curl", *quietly, "--output", str(tmp_path / "fetched"), f"http://127.0.0.1:{public}/file")
    assert digest(tmp_path / "fetched") == expected


def test_redis_answers_fifty_clients_at_once(through):
    with programs.redis() as port, through(port) as public:
        printed = run("redis-benchmark", "-p", str(public), "-c", "50", "-n", "20000", "-t", "set,get", "--csv")
    assert [line.split(",")[0] for line in printed.splitlines()] == ['"test"', '"SET"', '"GET"']


def test_dnsmasq_answers_two_hundred_questions(through, tmp_path):
    hosts = {f"host{number}.test": f"192.0.2.{number + 1}" for number in range(200)}
    questions = tmp_path / "questions"
    questions.write_text("".join(f"{name} A\n" for name in hosts))
    with programs.dnsmasq(tmp_path, hosts) as port, through(port) as public:
        once = ["+tries=1", "+timeout=5", "+noall", "+answer"]
        printed = run("dig", "@127.0.0.1", "-p", str(public), *once, "-f", str(questions))
    answers = [line.split() for line in printed.splitlines()]
    assert {name.rstrip("."): address for name, _, _, _, address in answers} == hosts


@pytest.mark.parametrize("direction", [[], ["--reverse"]], ids=["upload", "download"])
def test_iperf3_measures_without_an_error(through, direction):
    with programs.iperf3_server() as port, through(port) as public:
        report = run("iperf3", "--client", "127.0.0.1", "--port", str(public), "--time", "2", "--json", *direction)
    report = json.loads(report)
    assert "error" not in report
    assert report["end"]["sum_received"]["bytes"] > 10 * MIB


def test_ssh_runs_a_command_and_copies_a_file_both_ways(through, tmp_path):
    expected = random_file(tmp_path / "file", 5 * MIB)
    user = pwd.getpwuid(os.geteuid()).pw_name
    with programs.sshd(tmp_path) as ssh, through(ssh.port) as public:
        assert run("ssh", *ssh.options, "-p", str(public), f"{user}@127.0.0.1", "echo $((6 * 7))") == "42\n"
        copy = ["scp", "-O", "-q", *ssh.options, "-P", str(public)]
        run(*copy, str(tmp_path / "file"), f"{user}@127.0.0.1:{tmp_path}/there")
        run(*copy, f"{user}@127.0.0.1:{tmp_path}/there", str(tmp_path / "back"))
    assert digest(tmp_path / "there") == expected
    assert digest(tmp_path / "back") == expected
