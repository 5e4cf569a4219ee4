"""The demo, in a checkout of its own and with the packages of this Python: scripts/test makes the environment, too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import ROOT

DEMO_S = 60


@pytest.fixture
def checkout(tmp_path):
    """Make a directory that has what the demo needs; ``tmp`` is where it may leave nothing."""
    directory = tmp_path / "checkout"
    (directory / "scripts").mkdir(parents=True)
    (directory / "tmp").mkdir()
    shutil.copy(ROOT / "scripts" / "demo", directory / "scripts")
    venv = directory / "scripts" / "venv"
    venv.write_text("#!/bin/sh\n")
    venv.chmod(0o755)
    (directory / ".venv").symlink_to(sys.prefix)
    (directory / "nodepass_gevent").symlink_to(ROOT / "nodepass_gevent")
    return directory


def demo(checkout, *arguments):
    env = os.environ | {"TMPDIR": str(checkout / "tmp"), "PYTHONPATH": ""}
    command = [checkout / "scripts" / "demo", *arguments]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=DEMO_S)
    assert not list((checkout / "tmp").iterdir())
    assert not [link for link in Path("/proc").glob("[0-9]*/cwd") if leads_to(link, checkout)], "something runs on"
    return done


def leads_to(link, directory):
    try:
        return link.resolve() == directory.resolve()
    except OSError:  # it has ended meanwhile
        return False


@pytest.mark.parametrize("mode", [(), ("0",)], ids=["tls=1", "tls=0"])
def test_a_file_is_fetched_and_nothing_is_left(checkout, mode):
    done = demo(checkout, *mode)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (line.split()[-1] for line in done.stdout.splitlines() if "SHA-256" in line)
    assert first == second and len(first) == 64
    assert f'?tls={mode[0] if mode else 1}"' in done.stdout
    assert done.stdout.endswith("Server, client and web server are stopped again, and the file is gone.\n")


def test_a_tunnel_that_does_not_start_ends_it_with_the_log(checkout):
    package = checkout / "nodepass_gevent"
    package.unlink()
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('broken')\n")
    done = demo(checkout)
    assert done.returncode == 1
    assert "one of the programs ended early" in done.stderr and "broken" in done.stderr


def test_an_unknown_mode_is_wrong_use(checkout):
    done = demo(checkout, "2")
    assert done.returncode == 2 and "Usage: scripts/demo [TLS]" in done.stderr
