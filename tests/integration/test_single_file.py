"""The single file: made once by its script, then run as a user who has nothing else, and as root where no Python is."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest

from nodepass_gevent import __version__, generate
from nodepass_gevent.tunnel_key import parse_key

from .harness import ROOT, START_S, Process, Target, certificates, free_port, wait_until
from .programs import require
from .test_systemd import allowed_by
from .users import comes_back, payload, read_exactly, talk

pytestmark = pytest.mark.timeout(300)  # of the first test, which builds
BUILD_S = 240
IS_ROOT = os.geteuid() == 0
NOBODY = 65534
QUICK = ("SERVICE_COOLDOWN=300ms", "REPORT_INTERVAL=1s")


@pytest.fixture(scope="module")
def built():
    """Run the script; give what it made."""
    require("objcopy")
    argv = [str(ROOT / "scripts" / "single-file")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_S, preexec_fn=lambda: os.nice(10))
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "dist" / "nodepass"


def write_version(file, copy, digest):
    """Make a file that is as good as another version: to its first lines the digest of the rest is only a name."""
    copy.write_bytes(re.sub(rb"\nid=\w+", f"\nid={digest}".encode(), file.read_bytes(), count=1))
    copy.chmod(0o755)
    return copy


class User:
    """A user of the file with a home of its own; where the tests run as root, it is nobody."""

    def __init__(self, built):
        self.home = Path(tempfile.mkdtemp(prefix="nodepass-test-"))
        self.file = self.home / "a place" / "nodepass"
        self.file.parent.mkdir()
        write_version(built, self.file, secrets.token_hex(8))  # root may have unpacked the one that was built
        self.cache = self.home / ".cache" / "nodepass"
        self.own(self.home)

    def own(self, path):
        if IS_ROOT:
            os.chown(path, NOBODY, NOBODY)

    def command(self, *arguments, env=(), file=None):
        """Give a command line that has no environment but HOME and what is given."""
        switch = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if IS_ROOT else []
        env = [f"HOME={self.home}", f"TMPDIR={self.home}", *env]
        return [*switch, "env", "-i", "-C", "/", *env, str(file or self.file), *arguments]

    def call(self, *arguments, **how):
        return subprocess.run(self.command(*arguments, **how), capture_output=True, text=True, timeout=START_S)

    def start(self, *arguments, env=()):
        return Process(self.command(*arguments, env=(*QUICK, *env)), name=arguments[0].partition(":")[0])

    def copy_of(self, path):
        copy = self.home / Path(path).name
        shutil.copy(path, copy)
        self.own(copy)
        return copy

    def processes(self):
        """Give the ids of all processes that run from the cache."""
        found = []
        for path in Path("/proc").glob("[0-9]*/exe"):
            with contextlib.suppress(OSError):
                found += [int(path.parent.name)] * os.readlink(path).startswith(str(self.home))
        return found

    def on_disk(self):
        return sorted(str(path) for path in self.home.rglob("*"))


@pytest.fixture
def user(built):
    made = User(built)
    yield made
    shutil.rmtree(made.home)


@contextlib.contextmanager
def tunnel(user, query, client="", host="127.0.0.1"):
    """Give a server and a client of the file, and the public address, when traffic passes."""
    port, public = free_port(), ("127.0.0.1", free_port("both"))
    with (
        Target() as target,
        user.start(f"server://127.0.0.1:{port}/127.0.0.1:{public[1]}?{query}") as server,
        user.start(f"client://{host}:{port}/{target.address}{client}") as client,
    ):
        wait_until(lambda: comes_back(public), START_S, "traffic passes")
        yield server, client, public


def test_it_needs_no_environment_and_says_its_version(user):
    done = user.call("--version")
    assert (done.stdout, done.stderr, done.returncode) == (f"nodepass-gevent {__version__}\n", "", 0)


def test_its_first_lines_say_for_which_machines_it_is(user):
    line = user.file.read_bytes().splitlines()[1].decode()
    needed, here = (tuple(map(int, re.search(r"([0-9]+)\.([0-9]+)$", text).groups())) for text in
                    (line.partition(" or later")[0], os.confstr("CS_GNU_LIBC_VERSION")))  # fmt: skip
    assert f"nodepass-gevent {__version__} for {os.uname().machine} with glibc " in line
    assert (2, 17) <= needed <= here


def test_a_python_environment_around_it_means_nothing_to_it(user):
    for name in ("sitecustomize", "socket", "nodepass_gevent"):
        (user.home / f"{name}.py").write_text("raise SystemExit('taken from outside')")
    done = user.call("--version", env=(f"PYTHONPATH={user.home}", f"PYTHONHOME={user.home}"))
    assert done.stdout == f"nodepass-gevent {__version__}\n" and not done.stderr


def test_it_makes_keys_and_the_texts_for_others_which_name_the_file(user):
    assert parse_key(user.call("genkey").stdout.strip())
    assert user.call("generate", "config").stdout == (ROOT / "docs" / "nodepass.conf").read_text()
    url = "server://:10101/:8080"
    assert f'\nExecStart="{user.file}" {url}\n' in user.call("generate", "systemd", "web", url).stdout
    assert f"\ncommand='{user.file}' {url}\n" in user.call("generate", "supervisor", "web", url).stdout


@pytest.mark.parametrize("tls", [0, 1, 2])
def test_bytes_go_through_a_tunnel_of_it(user, tls):
    files = certificates()
    crt, key, ca = (user.copy_of(path) for path in (files.crt, files.key, files.ca))
    query = f"tls={tls}" + (f"&crt={crt}&key={key}" if tls == 2 else "")
    with tunnel(user, query, f"?tls=2&ca={ca}" if tls == 2 else "", "localhost") as (server, client, public):
        data = payload(1 << 20)
        assert talk(public, data) == data
        assert client.stop() == server.stop() == 0


def test_the_page_of_status_is_in_it(user):
    status = free_port()
    with tunnel(user, f"status=127.0.0.1:{status}") as (server, _, _public):
        with urllib.request.urlopen(f"http://127.0.0.1:{status}/", timeout=START_S) as answer:
            assert answer.read() == (ROOT / "nodepass_gevent" / "page.html").read_bytes()
        assert user.call("health", "--status", f"127.0.0.1:{status}").returncode == 0
        assert server.stop() == 0


def test_names_are_looked_up_by_c_ares_where_the_environment_says_so(user):
    with Target() as target, user.start(f"client://localhost:{free_port()}/{target.address}",
                                        env=("GEVENT_RESOLVER=ares",)) as client:  # fmt: skip
        client.wait_for_line("connection refused")
        assert client.stop() == 0


def test_its_one_process_has_the_signals_and_drains(user):
    with tunnel(user, "shutdown-timeout=20s") as (server, client, public):
        assert sorted(user.processes()) == sorted([server.pid, client.pid])
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_line("SIGHUP: reading")
        os.kill(server.pid, signal.SIGUSR2)
        server.wait_for_line("since the start")
        with socket.create_connection(public, START_S) as someone:
            someone.sendall(b"before")
            assert read_exactly(someone, 6) == b"before"
            os.kill(server.pid, signal.SIGTERM)
            server.wait_for_line("stopping: exchanges 1")
            someone.sendall(b"after!")
            assert read_exactly(someone, 6) == b"after!"
        assert server.stop(0) == 0


def test_kill_leaves_no_process_no_port_and_nothing_more_on_disk(user):
    user.call("--version")
    before = user.on_disk()
    for _ in range(3):
        with tunnel(user, "tls=1") as (server, client, public):
            os.kill(server.pid, signal.SIGKILL)
            assert server.stop(0) == -signal.SIGKILL
            assert user.processes() == [client.pid]
            socket.create_server(public).close()
            client.kill()
        assert not user.processes()
    assert user.on_disk() == before


def test_starts_at_the_same_time_unpack_once(user):
    starts = [
        subprocess.Popen(user.command("--version"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(6)
    ]
    assert {start.communicate(timeout=START_S)[0] for start in starts} == {f"nodepass-gevent {__version__}\n"}
    assert len([path for path in user.cache.iterdir() if path.is_dir()]) == 1
    inodes = {path.stat().st_ino for path in user.cache.iterdir()}
    user.call("--version")
    assert inodes == {path.stat().st_ino for path in user.cache.iterdir()}


def test_what_was_cut_off_or_cleaned_away_is_unpacked_again(user):
    user.call("--version")
    (directory,) = (path for path in user.cache.iterdir() if path.is_dir())
    before = user.on_disk()
    (directory / "_internal" / "base_library.zip").unlink()
    for part in (
        user.cache / "0123.part",
        user.cache / f"{directory.name}.part",
        user.cache / f"{directory.name}.part" / "a",
    ):
        part.mkdir()
        (part / "cut off").touch()
        user.own(part)
    assert user.call("--version").returncode == 0
    assert user.on_disk() == before


def test_another_version_takes_the_place_of_one_that_does_not_run_any_more(user):
    def version(number):
        return write_version(user.file, user.home / f"nodepass-{number}", number)

    def versions():
        return sorted(path.name for path in user.cache.iterdir() if path.is_dir())

    with Process(user.command(f"client://127.0.0.1:{free_port()}/127.0.0.1:9", file=version(1))) as old:
        old.wait_for_line("connection refused")
        assert user.call("--version", file=version(2)).returncode == 0
        assert versions() == ["1", "2"]
        os.kill(old.pid, signal.SIGKILL)
        old.stop(0)
    assert user.call("--version", file=version(3)).returncode == 0
    assert versions() == ["3"]


@pytest.mark.skipif(not IS_ROOT, reason="another owner needs root")
def test_a_directory_that_others_can_write_is_never_used(user):
    cache = user.home / "nodepass-65534"
    cache.mkdir()
    os.chown(cache, 1, 1)
    env = ("HOME=/nonexistent",)
    refused = user.call("--version", env=env)
    assert (refused.returncode, refused.stdout) == (1, "") and "cannot unpack" in refused.stderr
    os.chown(cache, NOBODY, NOBODY)
    cache.chmod(0o770)
    assert user.call("--version", env=env).returncode == 1
    assert not list(cache.iterdir())
    cache.chmod(0o700)
    assert user.call("--version", env=env).returncode == 0
    os.chown(cache, 1, 1)
    cache.chmod(0o755)
    assert user.call("--version", env=env).returncode == 1


def test_half_a_file_runs_nothing_and_leaves_nothing(user):
    data = user.file.read_bytes()
    user.file.write_bytes(data[: len(data) // 2])
    done = user.call("--version")
    assert (done.returncode, done.stdout) == (1, "")
    assert [path.name for path in user.cache.iterdir()] == ["lock"]


def test_the_filter_of_a_systemd_unit_allows_every_system_call_by_which_it_unpacks(user):
    trace = user.home / "trace"
    command = user.command("--version")
    done = subprocess.run([*command[:-2], require("strace"), "-f", "-o", str(trace), *command[-2:]], timeout=START_S)
    assert done.returncode == 0
    made = set(re.findall(r"^[0-9]+ +([a-z0-9_]+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    allowed = allowed_by(generate.systemd_template(generate.OwnCommand((str(user.file),))))
    assert {"execve", "flock"} <= made and not made - allowed, made - allowed


PROGRAMS = "sh id find wc tail gzip tar flock rm mv mkdir chmod".split()


@pytest.fixture
def bare_root(built, tmp_path):
    """Give a command in a root that holds a shell, what the file calls, libraries, and no more; and that root."""
    argv = [require("unshare"), "--mount", "true"]
    if subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    root = tmp_path / "root"
    for place in ("proc", "tmp", "usr/bin", "usr/local/bin", "dev", "var/cache"):
        (root / place).mkdir(parents=True)
    files = {f"/usr/bin/{name}": require(name) for name in PROGRAMS}
    for path in list(files.values()):
        told = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
        files |= {name: name for name in re.findall(r"(/\S+) \(", told)}
    libc = next(Path(name) for name in files if name.endswith("/libc.so.6"))
    parts = (
        libc.with_name(name) for name in ("libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1", "libutil.so.1")
    )
    files |= {str(path): str(path) for path in parts if path.exists()}
    for name, source in files.items():
        (root / name[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / name[1:])
    (root / "bin").symlink_to("usr/bin")
    (root / "dev/null").touch()
    shutil.copy(built, root / "usr/local/bin/nodepass")
    mounts = f"mount --bind /proc {root}/proc && mount --bind /dev/null {root}/dev/null"
    return [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'{mounts} && exec env -i {require("chroot")} {root} /usr/local/bin/nodepass "$@"',
        "sh",
    ], root


def test_it_runs_as_root_where_there_is_no_python(bare_root):
    command, root = bare_root
    port, public = free_port(), ("127.0.0.1", free_port("both"))
    with (
        Target() as target,
        Process([*command, f"server://127.0.0.1:{port}/127.0.0.1:{public[1]}?tls=1"]) as server,
        Process([*command, f"client://127.0.0.1:{port}/{target.address}?service-cooldown=300ms"]) as client,
    ):
        client.wait_for_line("connected to ")
        wait_until(lambda: comes_back(public), START_S, "traffic passes")
        assert os.readlink(f"/proc/{server.pid}/root") == str(root)
        assert client.stop() == server.stop() == 0
    (directory,) = (path for path in (root / "var/cache/nodepass").iterdir() if path.is_dir())
    assert (directory.stat().st_mode & 0o777, directory.parent.stat().st_mode & 0o777) == (0o755, 0o755)
