"""The Dockerfile without an engine: its instructions, and their steps in a Debian root: ``scripts/container-steps``.

The base image is replaced by Debian of the same release, whose Python is /usr/bin/python3, not /usr/local/bin/python3.
What runs in it has the user, environment, health check and stop signal of the Dockerfile, the command lines, the file
system and the privileges of compose.yaml, and a network of its own.
"""

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .harness import ROOT, START_S, Process, wait_until

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nodepass-gevent"
RELEASE = "bookworm"  # of the base image, which its tag ends in
PACKAGES = "ca-certificates,python3,python3-venv"  # what the base image has
FOR_PIP = ("PIP_CERT", "PIP_INDEX_URL", "PIP_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
KEY = "/run/secrets/tunnel-key"
ENTER = """\
set -eu
root=$1 kind=$2
shift 2
if [ "$kind" = build ]; then
    mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
    mount --bind /etc/ssl/certs "$root/etc/ssl/certs"
else
    mount --bind "$root" "$root"
    mount -o remount,ro,bind "$root"
fi
mount -t proc proc "$root/proc"
exec chroot "$root" "$@"
"""


@dataclass
class Stage:
    """One FROM, and the instructions that follow it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        """Give what follows each instruction of one kind."""
        return [rest for instruction, rest in self.steps if instruction == word]

    def last(self, word: str) -> str:
        return self.all(word)[-1]

    @property
    def environ(self) -> dict[str, str]:
        """Give what ENV sets."""
        return dict(pair.split("=", 1) for rest in self.all("ENV") for pair in shlex.split(rest))

    @property
    def health(self) -> tuple[dict[str, str], list[str]]:
        """Give the options of HEALTHCHECK, and its command."""
        options, command = self.last("HEALTHCHECK").split("CMD ")
        return dict(option.removeprefix("--").split("=") for option in options.split()), json.loads(command)


def read_dockerfile(text: str) -> list[Stage]:
    """Split a Dockerfile into its stages."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments, stages = {}, []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "ARG" and not stages:
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word == "FROM":
            base, *more = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest).split()
            stages.append(Stage(base, more[1] if more else ""))
        elif word:
            stages[-1].steps.append((word, " ".join(rest.split())))
    return stages


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Say whether .dockerignore keeps a file of the context away: the last pattern that fits it or a parent decides."""
    ways = [path, *map(str, Path(path).parents)][: path.count("/") + 1]
    ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if wanted.startswith("**/"):
            fits = any(fnmatch.fnmatchcase(way.rpartition("/")[2], wanted[3:]) for way in ways)
        else:
            fits = any(way.count("/") == wanted.count("/") and fnmatch.fnmatchcase(way, wanted) for way in ways)
        if fits:
            ignored = not pattern.startswith("!")
    return ignored


def context(root: Path = ROOT) -> list[str]:
    """Give the files that an engine would be sent."""
    lines = (root / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    files = []
    for directory, names, files_here in os.walk(root):
        names[:] = [name for name in names if name not in (".git", ".venv")]
        files += [os.path.relpath(os.path.join(directory, name), root) for name in files_here]
    return sorted(path for path in files if not is_ignored(path, patterns))


def copy_context(to: Path) -> None:
    for path in context():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, to / path)


# The steps


def enter(root: Path, kind: str, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Give the command that runs another in a root: "build" with the network of this machine, "run" as it is used."""
    pairs = [f"{name}={value}" for name, value in environ.items()]
    return ["unshare", "--mount", "sh", "-c", ENTER, "sh", str(root), kind, "env", "-i", *pairs, *words]


def debian() -> Path:
    """Give an archive of a minimal Debian, made once."""
    archive = CACHE / f"{RELEASE}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory, "root")
            argv = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(root)]
            subprocess.run([*argv, *filter(None, [os.environ.get("MIRROR")])], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["tar", "-C", root, "-cf", f"{archive}.new", "."], check=True)
        os.replace(f"{archive}.new", archive)
    return archive


def build(stages: Sequence[Stage], directory: Path) -> Path:
    """Follow the instructions, each stage in a root of its own; give the last one."""
    roots: dict[str, Path] = {}
    for number, stage in enumerate(stages):
        root = roots[stage.name] = directory / f"stage{number}"
        root.mkdir()
        subprocess.run(["tar", "-C", root, "-xf", debian()], check=True)
        where = "/"
        for word, rest in stage.steps:
            if word == "WORKDIR":
                where = rest
                (root / where.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                _copy(rest, root, where, roots)
            elif word == "RUN":
                environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **stage.environ}
                environ |= {name: os.environ[name] for name in FOR_PIP if name in os.environ}
                script = f"cd {shlex.quote(where)} && {rest}"
                _done(enter(root, "build", ["/bin/sh", "-c", script], environ))
    return root


def _copy(rest: str, root: Path, where: str, roots: Mapping[str, Path]) -> None:
    *options, source, to = rest.split()
    if not options:
        assert (source, to) == (".", "."), rest
        copy_context(root / where.lstrip("/"))
    else:
        came = roots[options[0].removeprefix("--from=")] / source.lstrip("/")
        shutil.copytree(came, root / to.lstrip("/"), symlinks=True)


def _done(argv: Sequence[str], code: int = 0, timeout: float = 600) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, (argv[-1], done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


# What is made of them, at work


class Image:
    """The root that was built, and how the Dockerfile wants it run."""

    def __init__(self, root: Path, stage: Stage) -> None:
        self.root, self.stage = root, stage
        uid, _, gid = stage.last("USER").partition(":")
        limits = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        self.user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", *limits]
        self.entrypoint = json.loads(stage.last("ENTRYPOINT"))

    def argv(self, *words: str, **environ: str) -> list[str]:
        return enter(self.root, "run", [*self.user, *words], self.stage.environ | environ)

    def run(self, *words: str, code: int = 0) -> str:
        return _done(self.argv(*words), code, 60)

    def start(self, *words: str, name: str, **environ: str) -> Process:
        return Process(self.argv(*words, **environ), name=name)


def compose() -> dict:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def here(words: Sequence[str]) -> list[str]:
    """Give a command line of compose.yaml with this machine in place of its services' names."""
    return [re.sub("/(server|service):", "/127.0.0.1:", word) for word in words]


@contextlib.contextmanager
def running(image: Image) -> Iterator[tuple[Process, Process]]:
    """Start the services of compose.yaml, on one machine."""
    services = compose()["services"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(image.start(*services["service"]["entrypoint"], name="service"))
        both = []
        for name, status in (("server", image.stage.environ["NODEPASS_STATUS"]), ("client", "127.0.0.1:9101")):
            words = [*image.entrypoint, *here(services[name]["command"])]
            both.append(stack.enter_context(image.start(*words, name=name, NODEPASS_STATUS=status)))
        yield both[0], both[1]


def fetch(name: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:8080/{name}", timeout=5) as answer:
        return answer.read()


def passes() -> bool:
    with contextlib.suppress(OSError):
        return bool(fetch("GPL-3"))
    return False


def try_out(root: Path) -> None:
    """Use what was built, as its user; to be called in a network of its own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    (stage,) = read_dockerfile((ROOT / "Dockerfile").read_text())[-1:]
    image = Image(root, stage)
    (options, health), (uid, _, gid) = stage.health, stage.last("USER").partition(":")
    say(image.run(*image.entrypoint, "--version").strip())
    key = root / KEY.lstrip("/")
    key.parent.mkdir(parents=True)
    key.write_text(image.run(*image.entrypoint, "genkey"))
    key.chmod(0o400)
    os.chown(key, int(uid), int(gid))
    assert "unhealthy" in image.run(*health, code=1)
    say("unhealthy while nothing runs")

    with running(image) as (server, client):
        wait_until(passes, START_S, "traffic passes")
        assert fetch("GPL-3") == (root / "usr/share/common-licenses/GPL-3").read_bytes()
        say("a file came through the tunnel, whole")
        status = Path(f"/proc/{server.pid}/status").read_text()
        for line in (f"Uid:\t{uid}\t{uid}", f"Gid:\t{gid}\t{gid}", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
            assert line in status, (line, status)
        assert "Read-only file system" in image.run("touch", "/opt/nodepass/x", code=1)
        say("by user", uid, "without a capability, on a root that is read-only")
        assert "healthy" in image.run(*health)
        os.kill(server.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert "unhealthy" in image.run(*health, code=1)
        assert time.monotonic() - began < float(options["timeout"].rstrip("s"))
        os.kill(server.pid, signal.SIGCONT)
        image.run(*health)
        say("healthy, unhealthy while its process is stuck, and healthy again")
        with socket.create_connection(("127.0.0.1", 8080), 10) as user:
            user.sendall(b"GET /GPL-3 HTTP/1.0\r\n")
            wait_until(lambda: b'"exchanges": 1' in _status(), START_S, "the exchange has begun")
            os.kill(server.pid, signal.Signals[stage.last("STOPSIGNAL")])
            server.wait_for_line("stopping: exchanges 1")
            user.sendall(b"\r\n")
            answer = b"".join(iter(lambda: user.recv(65536), b""))
        assert answer.endswith((root / "usr/share/common-licenses/GPL-3").read_bytes())
        wait_until(lambda: server.returncode is not None, 20, "the server ends")
        assert (server.stop(), client.stop(timeout=20)) == (0, 0), server.tail() + client.tail()
        assert "exchanges cut: 0" in server.lines[-1]
        say("its stop signal lets an exchange end, and the end is 0")


def _status() -> bytes:
    with urllib.request.urlopen("http://127.0.0.1:9100/status.json", timeout=5) as answer:
        return answer.read()


def say(*words: object) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s ", *words, flush=True)


BEGAN = time.monotonic()


def main() -> None:
    if sys.argv[1:2] == ["try-out"]:
        try_out(Path(sys.argv[2]))
        return
    debian()
    say("there is a Debian root")
    with tempfile.TemporaryDirectory() as directory:
        root = build(read_dockerfile((ROOT / "Dockerfile").read_text()), Path(directory))
        say("the steps of the Dockerfile are done")
        argv = ["unshare", "--net", sys.executable, "-m", "integration.container", "try-out", str(root)]
        sys.exit(subprocess.run(argv).returncode)


if __name__ == "__main__":
    main()
