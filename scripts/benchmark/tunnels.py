"""The ways to the target: direct, this tunnel, and what else is installed here."""

import contextlib
import functools
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loads import answers
from processes import HOST, Process, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0
MOST = 4500  # exchanges at once that every tunnel here is set up for
OURS = ("nodepass", "nodepass-tls")
AMPLE = {"SEMAPHORE_LIMIT": "8192", "MAX_POOL_CAPACITY": "8192", "UDP_DATA_BUF_SIZE": "65507"}


@dataclass(frozen=True)
class Place:
    """Where a tunnel works: a directory of its own, the users' port, the target's; and the way to a port far away."""

    directory: Path
    public: int
    target: int
    far: Callable[[int], int]


@dataclass
class Open:
    """A tunnel that passes traffic: the users' port, the process at their side and the one at the target's."""

    public: int
    server: Process | None = None
    client: Process | None = None

    @property
    def ends(self) -> list[Process]:
        return [process for process in (self.server, self.client) if process]

    def cpu_s(self) -> float:
        return sum(process.cpu_s() for process in self.ends)

    def cpu_ns(self) -> int:
        return sum(process.cpu_ns() for process in self.ends)


@dataclass(frozen=True)
class Tunnel:
    """One way to the target. ``commands`` gives the argument lists of server and client, or nothing."""

    name: str
    commands: Callable[[Place], tuple[list[str], ...]]
    needs: tuple[str, ...] = ()  # programs
    udp: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = ROOT

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if not _path(name)]


@contextlib.contextmanager
def opened(
    tunnel: Tunnel, env: Mapping[str, str] | None = None, prefix: list[str] | None = None, line_ms: float = 0
) -> Iterator[Open]:
    """Start target and tunnel, wait until traffic passes, and end them after the block.

    ``prefix`` goes before each command of the tunnel, ``{role}`` in it is the side. It takes ``line_ms`` from the one
    side to the other.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nodepass-bench-")))
        log = stack.enter_context(open(directory / "log", "w+b"))
        target = free_port()

        def run(module: str, *arguments: float) -> None:
            program = [sys.executable, str(Path(__file__).with_name(module)), *map(str, arguments)]
            stack.enter_context(Process(program, {}, directory, log))

        def far(port: int) -> int:
            if not line_ms:
                return port
            run("line.py", near := free_port(), port, line_ms)
            return near

        run("target.py", target)
        if not wait_until(lambda: answers(target), START_S):
            raise RuntimeError(f"the target did not start:\n{_tail(directory)}")
        public = free_port()
        commands = tunnel.commands(Place(directory, public, target, far))
        processes = []
        for role, command in zip(("server", "client"), commands, strict=False):
            before = [part.replace("{role}", role) for part in prefix or []]
            argv = [*before, _path(command[0]) or command[0], *command[1:]]
            processes.append(stack.enter_context(Process(argv, {**tunnel.env, **(env or {})}, tunnel.cwd, log)))
            if role == "server" and len(commands) == 2:
                wait_until(lambda: processes[0].ended, 0.3)  # so that the client need not try twice
        way = Open(public if commands else far(target), *processes)
        if not wait_until(lambda: any(p.ended for p in processes) or answers(way.public), START_S):
            raise RuntimeError(f"no traffic passes within {START_S:g} s:\n{_tail(directory)}")
        if ended := [p for p in processes if p.ended]:
            raise RuntimeError(f"{len(ended)} of its processes ended:\n{_tail(directory)}")
        yield way


def _tail(directory: Path) -> str:
    return "\n".join((directory / "log").read_text(errors="replace").splitlines()[-5:])


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


# The ways.


def _nodepass(tls: int, place: Place) -> tuple[list[str], ...]:
    tunnel = free_port()
    run = [sys.executable, "-m", "nodepass_gevent"]
    return (
        [*run, f"server://{HOST}:{tunnel}/{HOST}:{place.public}?tls={tls}&log=error"],
        [*run, f"client://{HOST}:{place.far(tunnel)}/{HOST}:{place.target}?log=error"],
    )


def nodepass(tls: int, source: Path = ROOT, suffix: str = "") -> Tunnel:
    """Give this tunnel in a TLS mode, from the checkout ``source``."""
    name = OURS[tls] + suffix
    env = {**AMPLE, "PYTHONPATH": str(source)}
    return Tunnel(name, functools.partial(_nodepass, tls), udp=True, env=env, cwd=source)


HAPROXY = """global
 maxconn {most}
defaults
 mode tcp
 timeout connect 5s
 timeout client 120s
 timeout server 120s
listen hop
 maxconn {most}
 bind {host}:{bind} backlog 4096
 server next {host}:{to}
"""


def _haproxy(tls: bool, place: Place) -> tuple[list[str], ...]:
    between = free_port()
    bind, to = str(between), str(place.far(between))
    if tls:
        bind, to = f"{bind} ssl crt {_certificate(place)}", f"{to} ssl verify none"
    commands = []
    for name, a, b in (("first", str(place.public), to), ("second", bind, str(place.target))):
        config = place.directory / f"{name}.cfg"
        config.write_text(HAPROXY.format(host=HOST, most=MOST, bind=a, to=b))
        commands.append(["haproxy", "-db", "-q", "-f", str(config)])
    return tuple(commands)


STUNNEL = """foreground = yes
syslog = no
pid =
debug = 3
[hop]
{mode}
accept = {host}:{accept}
connect = {host}:{connect}
"""


def _stunnel(place: Place) -> tuple[list[str], ...]:
    between = free_port()
    hops = (
        ("first", "client = yes", place.public, place.far(between)),
        ("second", f"cert = {_certificate(place)}", between, place.target),
    )
    for name, mode, accept, connect in hops:
        text = STUNNEL.format(mode=mode, host=HOST, accept=accept, connect=connect)
        (place.directory / f"{name}.conf").write_text(text)
    return tuple(["stunnel", str(place.directory / f"{name}.conf")] for name, *_ in hops)


def _certificate(place: Place) -> Path:
    """Make a throw-away certificate and its key, in one file."""
    path = place.directory / "both.pem"
    subject = ["-subj", "/CN=bench", "-days", "2"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    output = ["-keyout", str(path), "-out", str(place.directory / "certificate.pem")]
    _run("openssl", "req", "-x509", *key, *subject, *output)
    with open(path, "a") as both:
        both.write((place.directory / "certificate.pem").read_text())
    return path


SSHD = """ListenAddress {host}:{port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""


def _ssh(place: Place) -> tuple[list[str], ...]:
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # root's sshd insists; the start of a system makes it, too
    for name in ("host", "user"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place.directory / name))
    port, config = free_port(), place.directory / "sshd_config"
    config.write_text(SSHD.format(host=HOST, port=port, directory=place.directory))
    settings = {
        "IdentityFile": f"{place.directory}/user",
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "ExitOnForwardFailure": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
    }
    options = [f"-o{key}={value}" for key, value in settings.items()]
    forward = f"{HOST}:{place.public}:{HOST}:{place.target}"
    user = pwd.getpwuid(os.geteuid()).pw_name
    return (
        ["sshd", "-D", "-e", "-f", str(config)],
        ["ssh", "-N", "-F", "none", *options, "-p", str(place.far(port)), "-R", forward, f"{user}@{HOST}"],
    )


def _run(name: str, *arguments: str) -> None:
    subprocess.run([_path(name) or name, *arguments], check=True, capture_output=True, timeout=START_S)


ALL = (
    Tunnel("direct", lambda place: (), udp=True),
    nodepass(0),
    nodepass(1),
    Tunnel("haproxy", functools.partial(_haproxy, False), ("haproxy",)),
    Tunnel("haproxy-tls", functools.partial(_haproxy, True), ("haproxy", "openssl")),
    Tunnel("stunnel", _stunnel, ("stunnel", "openssl")),
    Tunnel("ssh-R", _ssh, ("ssh", "sshd", "ssh-keygen")),
)
