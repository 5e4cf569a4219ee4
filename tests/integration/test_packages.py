"""Wheel and sdist: built once by the standard tool, installed for every Python there is, used, and taken away again."""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nodepass_gevent import __version__

from .harness import ROOT, START_S, Process, Target, free_port, wait_until
from .programs import require
from .users import comes_back, payload, talk

pytestmark = pytest.mark.timeout(300)  # of the first test, which builds and may download
PIP_S = 240
MINORS = (10, 11, 12, 13, 14)
NOT_IN_SDIST = {".ci/run", ".gitignore", "ruff.toml"}
ADDED_TO_SDIST = r"PKG-INFO|setup\.cfg|nodepass_gevent\.egg-info/.*"
PARTS = sorted(path.name for path in (ROOT / "nodepass_gevent").iterdir() if path.suffix in (".py", ".html"))
SHARED = {
    "share/bash-completion/completions/nodepass",
    "share/doc/nodepass-gevent/examples/nodepass.conf",
    "share/fish/vendor_completions.d/nodepass.fish",
    "share/man/man1/nodepass.1",
    "share/zsh/site-functions/_nodepass",
}


def run(*argv, cwd="/", **env):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=PIP_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pythons():
    """Find a Python of each version; the one that runs this test stands for its own."""
    found = {sys.version_info[1]: sys.executable}
    for minor in MINORS:
        here = glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
        for path in (shutil.which(f"python3.{minor}"), *here):
            if path and not subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode:
                found.setdefault(minor, path)
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Give the directory with the sdist and the wheel that is made of it."""
    source, directory = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    left = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    ignored = shutil.ignore_patterns(*left)  # by builds, and by tests that run beside this one
    shutil.copytree(ROOT, source, ignore=ignored)  # what an *.egg-info lists would be packed, whatever else says
    run(sys.executable, "-m", "build", "--outdir", directory, source)
    return directory


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    (path,) = built.glob("*.tar.gz")
    directory = tmp_path_factory.mktemp("sdist")
    run("tar", "-xzf", path, "-C", directory)
    return directory / f"nodepass_gevent-{__version__}"


def files_below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def ours(names):
    return {name for name in names if re.search("nodepass", name)}


@pytest.mark.parametrize("minor", pythons())
def test_the_wheel_installs_works_and_goes_without_a_trace(minor, wheel, tmp_path):
    place = tmp_path / "place"
    run(pythons()[minor], "-m", "venv", place)
    python = place / "bin" / "python"
    assert run(python, "-c", "import sys; print(sys.version_info[1])") == f"{minor}\n"
    before = files_below(place)
    run(python, "-m", "pip", "install", "-q", "--prefer-binary", wheel)
    parts = {f"lib/python3.{minor}/site-packages/nodepass_gevent/{name}" for name in PARTS}
    assert (parts | SHARED | {"bin/nodepass"}) <= files_below(place) - before
    run(python, "-m", "pip", "check")
    assert run(place / "bin" / "nodepass", "--version") == f"nodepass-gevent {__version__}\n"

    bytes_go_through(place / "bin" / "nodepass")

    run(python, "-m", "pip", "uninstall", "-q", "-y", "nodepass-gevent")
    assert not ours(files_below(place) - before)
    assert not [path for path in place.rglob("*nodepass*") if path.is_dir() and any(path.iterdir())]


def bytes_go_through(command):
    """Run a server and a client with TLS, and be a user."""
    port, public = free_port(), ("127.0.0.1", free_port("both"))
    env = {"PYTHONPATH": "", "SERVICE_COOLDOWN": "300ms"}
    with (
        Target() as target,
        Process([str(command), f"server://127.0.0.1:{port}/127.0.0.1:{public[1]}?tls=1"], env=env) as server,
        Process([str(command), f"client://127.0.0.1:{port}/{target.address}"], env=env) as client,
    ):
        wait_until(lambda: comes_back(public), START_S, "traffic passes")
        data = payload(1 << 20)
        assert talk(public, data) == data
        assert client.stop() == server.stop() == 0


def test_the_sdist_holds_what_the_repository_holds(unpacked):
    if not (ROOT / ".git").exists():
        pytest.skip("there is no repository here")
    listed = run(require("git"), "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    kept, held = set(listed.splitlines()), files_below(unpacked)
    assert kept - held == NOT_IN_SDIST
    assert not [name for name in held - kept if not re.fullmatch(ADDED_TO_SDIST, name)]


def test_scripts_of_the_sdist_can_be_executed_as_in_the_repository(unpacked):
    for path in filter(Path.is_file, (ROOT / "scripts").iterdir()):
        assert os.access(unpacked / "scripts" / path.name, os.X_OK) == os.access(path, os.X_OK), path.name


def test_tests_of_the_sdist_pass_there(unpacked):
    """A few that need files of every kind: vectors, pages, the example."""
    tests = [f"tests/test_{name}.py" for name in ("example", "tunnel_key", "url", "wire")]
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    said = run(*argv, cwd=unpacked, PYTHONPATH=str(unpacked))
    assert re.search(r"^\d{3,} passed", said, re.MULTILINE), said
