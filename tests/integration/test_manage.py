"""`scripts/nodepass.sh` below a throw-away root: its whole life under the real supervisord, and systemd by a stub.

Only the whole life installs with pip; all else finds a program in place, which runs the code of this checkout.
"""

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest

from .harness import ROOT, START_S, Process, Target, free_port, wait_until
from .programs import require
from .test_supervisord import CONFIGURATION
from .users import comes_back

SCRIPT = ROOT / "scripts" / "nodepass.sh"
PROGRAM = f"""\
#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from nodepass_gevent.__main__ import main
sys.exit(main())
"""
SYSTEMCTL = """\
#!/bin/sh
# notes its calls, and what was started
echo "$*" >>"{0}/calls"
for last; do :; done
case " $* " in
    *" is-active "*) cat "{0}/$last" 2>/dev/null || echo inactive ;;
    *" restart "* | *" start "*) [ ! -e "{0}/broken" ] || exit 1; echo active >"{0}/$last" ;;
    *" stop "* | *" disable "*) rm -f "{0}/$last" ;;
esac
"""
# ports of the system's choice: a name that is new is refused where a port is taken
SERVER, CLIENT = "server://127.0.0.1:0/127.0.0.1:0?tls=1", "client://127.0.0.1:10101/127.0.0.1:80"
MADE = ["$(touch made)", "`touch made`", "a;touch made", "x[$(touch made)]"]
HOSTILE = ["../x", "a/b", "-x", ".x", "a b", "a\nb", *MADE]


def tree(root):
    """Give what is below a directory: kind, mode, time and content of each path, but not what supervisord keeps."""
    found = {}
    for path in sorted(Path(root).rglob("*")):
        about, name = path.lstat(), str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif stat.S_ISREG(about.st_mode):
            found[name] = (oct(about.st_mode), about.st_mtime_ns, path.read_bytes())
        elif path.is_dir():
            found[name] = oct(about.st_mode)
    return {name: what for name, what in found.items() if not name.startswith(("run/", "supervisord."))}


class Site:
    """A root, and the script that works below it."""

    def __init__(self, root, *, user=False):
        self.root, self.calls = root, root / "run" / "calls"
        (root / "run").mkdir()
        (root / "bin").mkdir()
        for name, text in (("systemctl", SYSTEMCTL.format(root / "run")), ("journalctl", "#!/bin/sh\n")):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        self.home = root / "home" / "me" if user else root
        self.options = ["--root", str(root), *(["--user"] if user else [])]
        self.environ = {
            "PATH": os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": "/home/me",
            "LANG": "C.UTF-8",
            "PYTHON": sys.executable,
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
        }
        self.prefix = self.home / ".local/share/nodepass" if user else root / "opt/nodepass"
        self.etc = self.home / ".config/nodepass" if user else root / "etc/nodepass"
        self.units = self.home / ".config/systemd/user" if user else root / "etc/systemd/system"

    def put_program(self):
        """Have an installation without pip."""
        self._put("here", PROGRAM)
        (self.prefix / "current").symlink_to("versions/here")
        return self

    def put_version(self, source, first=""):
        """Have what an update from a source would make, but with some lines that run first."""
        said = self.run("update", "--from", str(source), "--dry-run")
        digest = re.search("/versions/([0-9a-f]{12}),", said)[1]
        self._put(digest, PROGRAM.replace("import sys\n", f"import sys\n{first}"))
        return digest

    def _put(self, version, text):
        program = self.prefix / "versions" / version / "bin" / "nodepass"
        program.parent.mkdir(parents=True)
        program.write_text(text)
        program.chmod(0o755)
        (program.parents[1] / "complete").write_text("here\n")

    def argv(self, *words):
        return [require("bash"), str(SCRIPT), *self.options, *words]

    def run(self, *words, code=0, stdin="", **environ):
        """Run the script, and give what it says."""
        done = subprocess.run(
            self.argv(*words),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            env=self.environ | environ,
            cwd=self.root,
        )
        assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def refusal(self, *words, code=2, **environ):
        """Give the one line by which a call is refused, which changes nothing."""
        before = tree(self.root)
        said = self.run(*words, code=code, **environ).splitlines()
        assert tree(self.root) == before
        assert said and re.match(r"nodepass(\.sh)?: error: ", said[-1])
        return said[-1].partition(": error: ")[2]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path).put_program()


@pytest.fixture
def users(tmp_path):
    return Site(tmp_path, user=True).put_program()


SYSTEMD = ("--manager", "systemd")

# The whole life, under supervisord


def source(directory, version, change=lambda package: None, *, whole=False):
    """Copy what makes the program, as another version, which finds here what it needs unless it is `whole`."""
    directory.mkdir()
    for name in ("setup.py", "setup.cfg", "README.rst", "LICENSE", "docs", "share", "nodepass_gevent"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, directory / name)
    init, setup = directory / "nodepass_gevent" / "__init__.py", directory / "setup.cfg"
    init.write_text(re.sub('__version__ = ".*"', f'__version__ = "{version}"', init.read_text()))
    if not whole:
        init.write_text(f"{init.read_text()}import sys\nsys.path.append({sysconfig.get_path('purelib')!r})\n")
        setup.write_text(re.sub(r"install_requires =\n(    .*\n)+", "", setup.read_text()))
    change(directory / "nodepass_gevent")
    return str(directory)


def without_a_module(package):
    (package / "values.py").unlink()


@contextlib.contextmanager
def supervisord(conf, control):
    """Run supervisord, with the code that is installed and not with this."""
    argv = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(conf)]
    process = Process(argv, name="supervisord", env={"PYTHONPATH": ""})
    try:
        wait_until(control.exists, START_S, "supervisord is there")
        yield
    finally:
        assert process.stop(timeout=60) == 0


@pytest.fixture
def supervised(tmp_path):
    """A site with a supervisord that runs."""
    conf = tmp_path / "etc" / "supervisor" / "supervisord.conf"
    (conf.parent / "conf.d").mkdir(parents=True)
    text = CONFIGURATION.format(tmp_path / "run").replace("user=root\n" * (os.getuid() != 0), "")
    conf.write_text(text.replace(f"{tmp_path}/run/conf.d", "conf.d"))
    site = Site(tmp_path)
    with supervisord(conf, tmp_path / "run" / "control"):
        yield site


@pytest.mark.timeout(360)
def test_the_whole_life_under_supervisord(supervised, tmp_path_factory):
    site, elsewhere = supervised, tmp_path_factory.mktemp("sources")
    before, public = tree(site.root), ("127.0.0.1", free_port("both"))
    tunnel = f"127.0.0.1:{free_port()}"
    first = source(elsewhere / "first", "0.1.0", whole=True)
    there = set(os.listdir(first))

    assert site.run("install", "--from", first).endswith(f"0.1.0, as {site.root}/usr/local/bin/nodepass\n")
    assert set(os.listdir(first)) == there
    after = tree(site.root)
    assert "nothing to do" in site.run("install", "--from", first)
    assert tree(site.root) == after
    command = str(site.root / "usr/local/bin/nodepass")
    assert subprocess.check_output([command, "--version"], text=True) == "nodepass-gevent 0.1.0\n"

    with Target() as target:
        said = site.run("add", "web", f"server://{tunnel}/127.0.0.1:{public[1]}?tls=1", "--new-tunnel-key")
        assert "added: web, run by supervisord" in said
        key = site.etc / "web.tunnel-key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        own = site.root / "etc/in.conf"
        own.write_text(f"[tunnel in]\nurl = client://{tunnel}/{target.address}\nservice-cooldown = 300ms\n")
        site.run("add", "in", "--config", "etc/in.conf", "--tunnel-key-file", "-", stdin=key.read_text())
        wait_until(lambda: comes_back(public), START_S, "traffic passes")
        lines = site.run("list").splitlines()
        assert [line.split()[:3] for line in lines] == [[name, "running", "supervisord"] for name in ("in", "web")]
        words = (f"server://{tunnel}/127.0.0.1:{public[1]}?tls=1", "--new-tunnel-key")
        after = tree(site.etc)
        assert site.run("add", "web", *words) == (
            "web is there already, with these settings, and running: nothing to do\n"
        )
        assert tree(site.etc) == after
        assert "--replace puts these" in site.refusal("add", "web", *words, "--log=debug")
        assert "supervisord has another program" not in site.run("status", "web")

        own.write_text(own.read_text().replace("300ms", "200ms"))
        site.run("reload", "in")
        wait_until(lambda: "added, changed or removed: 1" in site.run("log", "in"), START_S, "the file is read again")

        site.run("stop", "in")
        assert "does not run" in site.refusal("reload", "in", code=1)
        assert "in stopped" in site.run("status", code=1)
        assert site.run("stop", "in") == "in is stopped already\n"
        assert "connected" in site.run("log", "in")

        broken = source(elsewhere / "broken", "0.2.0", without_a_module)
        said = site.refusal("update", "--from", broken, code=1)
        assert "is no nodepass-gevent that runs: ModuleNotFoundError: No module named" in said
        failing = source(elsewhere / "failing", "0.2.0")
        site.put_version(failing, "import os\nif 'SUPERVISOR_ENABLED' in os.environ:\n    sys.exit('boom')\n")
        said = site.run("update", "--from", failing, code=1)
        assert said.endswith("does not run every tunnel; the old version is back\n") and ": boom" in said
        assert site.run("status", code=1).startswith("nodepass-gevent 0.1.0,")
        assert len(os.listdir(site.prefix / "versions")) == 1

        second = source(elsewhere / "second", "0.3.0")
        assert site.run("update", "--from", second).endswith("updated: nodepass-gevent 0.3.0; restarted: web\n")
        assert len(os.listdir(site.prefix / "versions")) == 1
        assert "nothing to do" in site.run("update", "--from", second)
        assert "in stopped\nweb running" in site.run("status", code=1)
        site.run("restart", "in")
        assert site.run("start", "in") == "in runs already\n"
        wait_until(lambda: comes_back(public), START_S, "traffic passes after an update")

        assert site.run("delete", "in", "--purge") == "deleted: in\n"
        assert "nothing to delete" in site.run("delete", "in")
        assert own.exists() and site.run("list").split()[0] == "web"
        assert site.run("remove", "--yes").startswith("removed\nkept: ")
        assert key.exists() and not (site.root / "opt").exists()
        assert site.run("remove", "--yes", "--purge") == "removed\n"
    own.unlink()
    assert tree(site.root) == before


def test_a_user_has_a_supervisord_as_the_page_about_it_has_it(users):
    page = (ROOT / "docs/howto/supervisord.rst").read_text()
    text = page.partition("# ~/.config/supervisor/supervisord.conf\n")[2].partition("\n\n")[0]
    conf = users.home / ".config/supervisor/supervisord.conf"
    (conf.parent / "conf.d").mkdir(parents=True)
    conf.write_text(textwrap.dedent(text).replace("[supervisord]\n", "[supervisord]\nuser=root\n" * (os.getuid() == 0)))
    with supervisord(conf, conf.parent / "control"):
        url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port('both')}"
        assert "added: web, run by supervisord" in users.run("add", "web", url)
        assert "listening: " in users.run("log", "web")


def test_what_does_not_run_is_not_added(supervised):
    site = supervised
    site.put_program()
    failing = "import os, sys\n'SUPERVISOR_ENABLED' in os.environ and 1 / 0\n"
    (site.prefix / "versions/here/bin/nodepass").write_text(PROGRAM.replace("import sys\n", failing))
    before = tree(site.root / "etc/supervisor")
    assert "ZeroDivisionError" in site.run("add", "web", SERVER, code=1)
    assert tree(site.root / "etc/supervisor") == before
    assert site.run("list") == "no tunnels\n"


def test_another_key_alone_is_taken_up(supervised):
    site = supervised
    site.put_program()
    url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port('both')}?tls=1"
    site.run("add", "web", url, "--new-tunnel-key")
    before = re.search("pid ([0-9]+)", site.run("status", "web"))[1]
    assert "added" in site.run("add", "web", url, "--tunnel-key-file=-", "--replace", stdin=OTHER_KEY)
    assert re.search("pid ([0-9]+)", site.run("status", "web"))[1] != before


def test_a_program_of_that_name_is_left_alone(supervised):
    site = supervised
    site.put_program()
    theirs = site.root / "etc/supervisor/conf.d/web.conf"
    theirs.write_text("[program:web]\ncommand=sleep 300\nstartsecs=0\n")
    argv = ["supervisorctl", "-c", str(theirs.parents[1] / "supervisord.conf"), "update"]
    subprocess.run(argv, env=site.environ, check=True, capture_output=True, timeout=60)
    assert site.refusal("add", "web", SERVER) == "web: supervisord has another program of that name"


# systemd, by a stub


@pytest.mark.parametrize("user", [False, True])
def test_a_tunnel_of_systemd_lives_in_a_unit(tmp_path, user):
    site = Site(tmp_path, user=user)
    before = tree(site.root)
    site.put_program()
    site.etc.mkdir(parents=True)
    made = (*reversed(site.etc.parents), site.etc, *reversed(site.prefix.parents), site.prefix)
    (site.etc / "directories").write_text("".join(f"{path}\n" for path in made))
    manner = ["--user"] if user else []
    assert "added: web" in site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    path = site.units / "nodepass-web.service"
    verify = [require("systemd-analyze"), *manner, "verify", str(path)]
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    key = site.etc / "web.tunnel-key"
    unit = path.read_text()
    assert (f"--tunnel-key-file={key}" if user else f"LoadCredential=tunnel-key-file:{key}") in unit
    assert f"ExecStart={site.prefix}/current/bin/nodepass " in unit
    assert ("DynamicUser=yes" not in unit and "WantedBy=default.target" in unit) is user
    calls = [line.removeprefix("--user ") for line in site.calls.read_text().splitlines() if "is-active" not in line]
    assert calls == ["daemon-reload", "enable nodepass-web.service", "restart nodepass-web.service"]
    assert all(line.startswith("--user ") for line in site.calls.read_text().splitlines()) is user
    site.calls.unlink()
    assert "nothing to do" in site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    assert set(site.calls.read_text().removeprefix("--user ").splitlines()) == {"is-active nodepass-web.service"}
    assert site.run("list").split()[:3] == ["web", "running", "systemd"]
    for verb in ("stop", "start", "restart"):
        site.run(verb, "--all")
        assert f"{verb} nodepass-web.service" in site.calls.read_text()
    site.run("remove", "--yes", "--purge")
    assert "disable --now nodepass-web.service" in site.calls.read_text()
    assert tree(site.root) == before


def test_a_reload_is_told_to_tunnels_that_run_and_pass_the_check(site):
    own = site.root / "own.conf"
    own.write_text(f"[tunnel in]\nurl = {CLIENT}\n")
    site.run("add", "in", "--config", "own.conf", *SYSTEMD)
    site.run("add", "web", SERVER, *SYSTEMD)
    said = site.run("add", "in", "--config", "own.conf", *SYSTEMD)
    assert said.endswith("running: nothing to do; after a change of the file: nodepass.sh reload in\n")
    assert site.run("add", "web", SERVER, *SYSTEMD).endswith("running: nothing to do\n")
    site.calls.unlink()
    assert site.run("reload", "in").startswith("in reads its settings again")
    assert "reload nodepass-in.service" in site.calls.read_text().splitlines()
    assert "copies" not in site.run("reload", "--all")
    own.write_text(f"[tunnel in]\nurl = {CLIENT}\nnonsense = 1\n")
    site.calls.unlink()
    for words in ("in", "--all"):
        said = site.run("reload", words, code=1)
        assert re.match("error .*nonsense", said) and "in: is not reloaded, for what nodepass check says above" in said
    own.write_text(f"[tunnel in]\nurl = {CLIENT}\n")
    site.run("stop", "web")
    for words in ("web", "--all"):
        assert site.refusal("reload", words, code=1).startswith("web: does not run; ")
    assert not any("reload" in line for line in site.calls.read_text().splitlines())
    assert site.run("add", "web", SERVER, *SYSTEMD).endswith("stopped: nothing to do\n")


def test_a_reload_tells_of_the_copies_that_a_unit_has(site):
    site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    assert "web runs with copies of its keys, certificate and token" in site.run("reload", "web")


def test_other_settings_take_their_place_only_when_that_is_said(site):
    site.run("add", "web", SERVER, *SYSTEMD)
    assert "is there already, with other settings" in site.refusal("add", "web", CLIENT, *SYSTEMD)
    site.run("add", "web", CLIENT, "--replace", *SYSTEMD)
    assert CLIENT in site.run("list")


def test_settings_that_do_not_run_leave_the_former_ones(site):
    site.run("add", "web", SERVER, *SYSTEMD)
    before = tree(site.root / "etc").keys(), (site.units / "nodepass-web.service").read_bytes()
    (site.root / "run/broken").touch()
    assert "keeps its former settings" in site.run("add", "web", CLIENT, "--replace", *SYSTEMD, code=1)
    assert (tree(site.root / "etc").keys(), (site.units / "nodepass-web.service").read_bytes()) == before
    assert SERVER in site.run("list")


OTHER_KEY = "another passphrase that nobody knows\n"


def key_of(site, words):
    """Give a tunnel a key, replace its settings, and give what was said, the key of before, and the place of keys."""
    site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    place = site.etc / "web.tunnel-key"
    key = place.read_text()
    return site.run("add", "web", *words, "--replace", *SYSTEMD), key, place


def texts(directory):
    return {name: what[2] for name, what in tree(directory).items() if isinstance(what, tuple)}


def test_other_settings_keep_the_tunnel_key(site):
    said, key, place = key_of(site, [CLIENT])
    assert "web keeps its tunnel key\n" in said and "added: web" in said
    assert place.read_text() == key and site.run("list").endswith(f" {CLIENT} --tunnel-key-file={place}\n")
    unit = (site.units / "nodepass-web.service").read_text()
    assert f"LoadCredential=tunnel-key-file:{place}" in unit and CLIENT in unit
    assert "nothing to do" in site.run("add", "web", CLIENT, "--replace", *SYSTEMD)
    place.unlink()
    assert "web.tunnel-key cannot be read; give it one" in site.refusal("add", "web", SERVER, "--replace", *SYSTEMD)


@pytest.mark.parametrize("words", [[CLIENT], []])
def test_a_tunnel_key_is_given_up_when_that_is_said(site, words):
    said, _, place = key_of(site, [*words, "--no-tunnel-key"])
    assert "keeps" not in said and not place.exists()
    assert site.run("list").endswith(f" {(words or [SERVER])[0]}\n")
    assert "tunnel-key" not in (site.units / "nodepass-web.service").read_text()


def test_a_key_that_other_settings_name_takes_the_place_of_the_one_kept(site):
    other = site.root / "other.key"
    other.write_text(OTHER_KEY)
    other.chmod(0o600)
    said, _, place = key_of(site, [CLIENT, "--tunnel-key-file=other.key"])
    assert "keeps" not in said and place.read_text() == other.read_text()
    said = site.run("add", "web", f"{CLIENT}?tunnel-key-file={other}", "--replace", *SYSTEMD)
    assert "keeps" not in said and site.run("list").endswith(f"?tunnel-key-file={other}\n")


@pytest.mark.parametrize("words", [[], ["--no-tunnel-key"], ["--tunnel-key-file=-"]])
def test_settings_that_do_not_run_leave_the_former_key(site, words):
    site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    before = texts(site.root / "etc")
    (site.root / "run/broken").touch()
    site.run("add", "web", CLIENT, *words, "--replace", *SYSTEMD, code=1, stdin=OTHER_KEY)
    assert texts(site.root / "etc") == before


def test_settings_that_do_not_run_leave_no_key_where_there_was_none(site):
    site.run("add", "web", SERVER, *SYSTEMD)
    (site.root / "run/broken").touch()
    site.run("add", "web", CLIENT, "--new-tunnel-key", "--replace", *SYSTEMD, code=1)
    assert not (site.etc / "web.tunnel-key").exists()


def test_a_deleted_tunnel_is_added_again_by_its_name_alone(site):
    site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    unit, key = (site.units / "nodepass-web.service"), (site.etc / "web.tunnel-key").read_text()
    text = unit.read_text()
    site.run("delete", "web")
    assert site.run("list") == "no tunnels\n" and not unit.exists()
    site.run("add", "web", *SYSTEMD)
    assert unit.read_text() == text and (site.etc / "web.tunnel-key").read_text() == key


def current(site):
    return (site.prefix / "current").readlink().name


@pytest.fixture
def newer(tmp_path_factory):
    path = tmp_path_factory.mktemp("newer")
    (path / "setup.py").write_text("newer")
    return path


def test_an_update_restarts_what_runs_and_leaves_what_is_stopped(site, newer):
    for name in ("idle", "web"):
        site.run("add", name, SERVER, *SYSTEMD)
    site.run("stop", "idle")
    site.calls.unlink()
    digest = site.put_version(newer)
    assert "restarted: web" in site.run("update", "--from", str(newer))
    calls = site.calls.read_text().splitlines()
    assert [call for call in calls if "is-active" not in call] == ["restart nodepass-web.service"]
    assert current(site) == digest and os.listdir(site.prefix / "versions") == [digest]


@pytest.mark.parametrize(
    ("first", "text"),
    [
        ("if sys.argv[-1].endswith(':0'):\n    sys.exit('boom')\n", "does not start: boom"),
        ("if 'check' in sys.argv:\n    sys.exit('error boom')\n", "refuses web: error boom"),
    ],
)
def test_a_version_that_does_not_start_or_refuses_a_tunnel_is_not_taken(site, newer, first, text):
    site.run("add", "web", SERVER, *SYSTEMD)
    site.put_version(newer, first)
    site.calls.unlink()
    said = site.run("update", "--from", str(newer), code=1)
    assert said.endswith(f"{text}; the old version stays\n")
    assert current(site) == "here" and os.listdir(site.prefix / "versions") == ["here"]
    assert not site.calls.exists()


def test_a_version_that_does_not_run_a_tunnel_is_taken_back(site, newer):
    site.run("add", "web", SERVER, *SYSTEMD)
    site.put_version(newer)
    (site.root / "run/broken").touch()
    assert site.run("update", "--from", str(newer), code=1).endswith("the old version is back\n")
    assert current(site) == "here" and os.listdir(site.prefix / "versions") == ["here"]


def test_settings_of_the_callers_environment_reach_no_tunnel(site, newer):
    site.run("add", "web", SERVER, *SYSTEMD)
    site.put_version(newer)
    site.run("update", "--from", str(newer), NODEPASS_LOG="nonsense")
    assert "the service has another environment" in site.refusal("add", "in", CLIENT, *SYSTEMD, NODEPASS_TLS="1")


def test_a_unit_that_somebody_wrote_is_left_alone(site):
    site.units.mkdir(parents=True)
    (site.units / "nodepass-web.service").write_text("[Service]\nExecStart=/bin/true\n")
    assert site.refusal("add", "web", SERVER, *SYSTEMD).endswith("is there already, and not by this script")
    assert "nothing to delete" in site.run("delete", "web") and (site.units / "nodepass-web.service").exists()
    assert site.run("list") == "no tunnels\n"


def test_a_program_that_somebody_else_installed_is_left_alone(tmp_path):
    site = Site(tmp_path)
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    (tmp_path / "usr/local/bin/nodepass").write_text("theirs")
    assert site.refusal("install", code=1).endswith("bin/nodepass: is there already, and not by this script")


def test_the_manager_is_found_out(site):
    assert site.refusal("add", "web", SERVER).startswith("neither systemd nor a configuration of supervisord is here")
    (site.root / "etc/supervisor").mkdir(parents=True)
    conf = site.root / "etc/supervisor/supervisord.conf"
    conf.write_text("[supervisord]\n")
    assert "[include] must say files = DIR/*.conf" in site.refusal("add", "web", SERVER)
    conf.write_text("[supervisorctl]\nserverurl=unix:///none\n[include]\nfiles = conf.d/*.ini\n")
    assert site.refusal("add", "web", SERVER, code=1).startswith("supervisord does not answer")
    (site.root / "run/systemd/system").mkdir(parents=True)
    assert "run by systemd" in site.run("add", "web", SERVER)


# No change


def test_a_dry_run_says_each_change_and_makes_none(site):
    site.run("add", "web", SERVER, "--new-tunnel-key", *SYSTEMD)
    site.run("add", "idle", SERVER, *SYSTEMD)
    site.run("stop", "idle")
    site.calls.unlink()
    key = (site.etc / "web.tunnel-key").read_text().strip()
    before = tree(site.root)
    for words in (
        ("update",),
        ("add", "new", CLIENT, "--new-tunnel-key", *SYSTEMD),
        ("add", "web", CLIENT, "--replace", *SYSTEMD),
        ("start", "idle"),
        ("stop", "web"),
        ("restart", "--all"),
        ("reload", "web"),
        ("delete", "web", "--purge"),
        ("remove", "--purge"),
    ):
        said = site.run(*words, "--dry-run")
        assert re.search("^would (run|write): ", said, re.MULTILINE) and key not in said
        assert tree(site.root) == before
    assert {line.split()[0] for line in site.calls.read_text().splitlines()} == {"is-active"}


def test_a_dry_run_of_the_first_installation_makes_nothing(tmp_path):
    site = Site(tmp_path)
    before = tree(site.root)
    assert "-m venv" in site.run("install", "--dry-run")
    assert "would install nodepass first" in site.run("add", "web", SERVER, *SYSTEMD, "--dry-run")
    assert tree(site.root) == before


def test_two_at_once_do_not_mix(site):
    site.run("add", "web", SERVER, *SYSTEMD)
    directory = os.open(site.prefix, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        assert site.refusal("delete", "web", code=1).endswith("another nodepass.sh is at work")
    finally:
        os.close(directory)


# Hostile input, secrets, wrong use


@pytest.mark.parametrize("name", [*HOSTILE, "", "x" * 65])
def test_a_hostile_name_is_refused(site, name):
    for words in (("add", name, SERVER, *SYSTEMD), ("start", name), ("delete", name)):
        said = site.refusal(*words)
        assert "is no name; allowed: 1 to 64 ASCII letters" in said or "unknown option" in said
    assert not (site.root / "made").exists()


def test_hostile_words_are_never_run(site):
    for word in MADE:
        site.refusal(word)
        site.refusal("list", word)
        site.refusal("install", "--from", word)
        site.refusal("list", "--manager", word, "--root", word)
    site.refusal("add", "web", "$(touch made)`touch made`;touch made", *SYSTEMD)
    assert not (site.root / "made").exists()


def test_an_odd_path_reaches_the_program_as_it_is(site):
    own = site.root / "a $(touch made) ;`'\"%n.conf"
    own.write_text(f"[tunnel x]\nurl = {CLIENT}\n")
    site.run("add", "web", "--config", own.name, *SYSTEMD)
    assert site.run("list").rstrip().endswith(f"--config={own}")
    assert not (site.root / "made").exists()
    unit = (site.units / "nodepass-web.service").read_text()
    (start,) = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    assert shlex.split(start.replace("%%", "%").replace("$$", "$"))[1] == f"--config={own}"


def test_a_key_stands_in_its_file_alone(site):
    key = "a passphrase that nobody knows"
    site.run("add", "web", SERVER, "--tunnel-key-file=-", *SYSTEMD, stdin=f"{key}\n")
    holding = [name for name, what in tree(site.root).items() if isinstance(what, tuple) and key.encode() in what[2]]
    assert holding == ["etc/nodepass/web.tunnel-key"]
    assert stat.S_IMODE((site.etc / "web.tunnel-key").stat().st_mode) == 0o600


def test_a_key_on_the_line_is_refused_and_not_said(site):
    for words in (["client://0123456789abcdef@h:1/h:2"], [CLIENT, "--tunnel-key=0123456789abcdef"]):
        before = tree(site.root)
        said = site.run("add", "web", *words, *SYSTEMD, code=2)
        assert "use tunnel-key-file" in said and "0123456789abcdef" not in said
        assert tree(site.root) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "a command is needed where there is no terminal: install, update, add, list, status, log, start, "),
        (("instal",), "unknown command instal; allowed: install, update"),
        (("install", "x"), "install is followed by options only, not by x"),
        (("install", "--from"), "--from is followed by a value"),
        (("install", "--from", "/none"), "--from: /none is no wheel (.whl), source distribution"),
        (("install", "--purge"), "--purge does not belong to install"),
        (("list", "--root", "/none"), "--root: /none is no directory"),
        (("add",), "add is followed by NAME, and a URL or --config FILE"),
        (("add", "web", *SYSTEMD), "add web is followed by a URL or --config FILE"),
        (("add", "web", SERVER, "--manager", "upstart"), "--manager: upstart is neither supervisord nor systemd"),
        (("add", "web", SERVER, "--numprocs", "2", *SYSTEMD), "--numprocs: add each of several processes under a name"),
        (("add", "web", SERVER, "--tunnel-key-file=/none", *SYSTEMD), "--tunnel-key-file: /none cannot be read"),
        (("add", "web", SERVER, "--no-tunnel-key", *SYSTEMD), "--no-tunnel-key belongs to --replace"),
        (
            ("add", "web", SERVER, "--replace", "--no-tunnel-key", "--new-tunnel-key", *SYSTEMD),
            "--tunnel-key-file, --new-tunnel-key and --no-tunnel-key exclude each other",
        ),
        (("start",), "start is followed by one NAME, or by --all"),
        (("start", "web", "--all"), "start is followed by NAME or by --all"),
        (("reload", "web"), "web: is no tunnel of this script; there is none"),
        (("start", "web"), "web: is no tunnel of this script; there is none"),
        (("remove",), "remove asks, and there is no terminal: say --yes"),
        (("remove", "--everything"), "remove: unknown option --everything"),
    ],
)
def test_wrong_use_is_told_in_a_line(site, words, text):
    assert site.refusal(*words).startswith(text)


def test_settings_that_do_not_pass_the_check_are_refused(site):
    said = site.run("add", "web", f"{SERVER}&ca=/none", *SYSTEMD, code=2)
    assert "ca: cannot read '/none'" in said and "web: is not added" in said and site.run("list") == "no tunnels\n"


def test_a_new_tunnel_is_refused_where_something_else_has_its_port(site):
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        tunnel, public = (f"127.0.0.1:{each.getsockname()[1]}" for each in (free, taken))
        free.close()
        url = f"server://{tunnel}/{public}"
        said = f"web: is not added: public port, TCP: address already in use: {public}"
        assert site.refusal("add", "web", url, *SYSTEMD) == said
        own = site.root / "own.conf"
        own.write_text(f"[tunnel in]\nurl = {url}\n")
        assert site.refusal("add", "web", "--config=own.conf", *SYSTEMD).endswith(f"address already in use: {public}")
        site.run("add", "web", SERVER, *SYSTEMD)
        assert "address already in use" in site.run("add", "web", url, "--replace", *SYSTEMD)
        site.run("add", "second", f"{url}?reuse-port=1", *SYSTEMD)
        own.write_text(f"[tunnel in]\nurl = {url}\nreuse-port = 1\n")
        site.run("add", "third", "--config=own.conf", *SYSTEMD)


def test_without_a_program_there_is_nothing_to_do_but_install(tmp_path):
    site = Site(tmp_path)
    for words in (("add", "web", SERVER, *SYSTEMD), ("update",), ("status",)):
        assert "nodepass.sh install does" in site.refusal(*words)
    assert "nothing to remove" in site.run("remove", "--yes")
    assert site.run("list") == "no tunnels\n"


# The menu


def talk(site, *lines):
    """Type lines into the menu, one at each prompt, and give all that it prints."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(site.root)
        os.execve(require("bash"), site.argv(), site.environ | {"TERM": "dumb"})
    said, start, typed, deadline = "", 0, list(lines), time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                said += os.read(terminal, 65536).decode()
            except OSError:
                break
        if typed and said[start:].endswith(": "):
            start = len(said) + len(typed[0])
            os.write(terminal, f"{typed.pop(0)}\n".encode())
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.replace("\r", "")


def test_the_menu_adds_shows_and_deletes_a_tunnel(site):
    site.options += SYSTEMD
    code, said = talk(
        site,
        *("2", "web", "server", "127.0.0.1:0", "127.0.0.1:0", "", "new", "--log=debug", ""),
        *("10", "web", "5", "web", "nonsense", "4", "nothere", "2", "$(touch made)", "8", "web", "y", "0"),
    )
    assert code == 0, said
    assert "added: web, run by systemd" in said and "web              running  systemd     server://127.0.0.1" in said
    assert "web reads its settings again" in said and "web              stopped" in said and "allowed: 0 to 10" in said
    assert "nothere: is no tunnel of this script; there is web" in said
    assert "is no name" in said and not (site.root / "made").exists()
    assert said.count("deleted: web") == 1 and not (site.etc / "web.tunnel").exists()


def test_the_menu_ends_with_its_input(site):
    code, said = talk(site, "\x04")
    assert code == 0 and "nodepass-gevent" in said
