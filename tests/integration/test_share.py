"""The man page and the completion of shells: they hold all that the command takes, and real shells complete by them."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nodepass_gevent.command_line import COMMANDS, LINE_ONLY
from nodepass_gevent.settings import BY_NAME, SETTINGS
from nodepass_gevent.usage import EXAMPLES, USAGE

from .harness import ROOT, START_S
from .programs import require

SHARE = ROOT / "share"
FILES = {
    "bash": SHARE / "bash-completion/completions/nodepass",
    "zsh": SHARE / "zsh/site-functions/_nodepass",
    "fish": SHARE / "fish/vendor_completions.d/nodepass.fish",
}
PAGE = SHARE / "man/man1/nodepass.1"
OWN = {name for command in COMMANDS.values() for name in (*command.flags, *command.options)}
OPTIONS = sorted({*BY_NAME, *LINE_ONLY, *OWN})
CHOICES = {
    setting.name: setting.metavar.split("|")
    for setting in SETTINGS
    if "|" in setting.metavar and "FILE" not in setting.metavar
}


def test_what_is_shipped_is_what_the_script_makes(tmp_path):
    argv = [sys.executable, str(ROOT / "scripts" / "sharing"), str(tmp_path)]
    subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=START_S)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {path.relative_to(SHARE): path.read_text() for path in SHARE.rglob("*") if path.is_file()}
    assert made.keys() == shipped.keys() and len(made) == 4
    assert made == shipped, "run scripts/share"


def test_the_links_that_the_page_about_installing_shows_lead_to_all_of_them(tmp_path):
    page = (ROOT / "docs" / "install.rst").read_text()
    (block,) = re.findall(r"\.\. code-block:: sh\n\n((?:    .*\n)+)", page)
    for there, here in (("/opt/nodepass/share", SHARE), ("/usr/local", tmp_path / "local"), ("/etc", tmp_path / "etc")):
        assert there in block
        block = block.replace(there, str(here))
    subprocess.run(["sh", "-euc", block], check=True, timeout=START_S)
    links = {path.resolve() for path in tmp_path.rglob("*") if path.is_symlink()}
    assert links == {PAGE, *FILES.values()}


# The man page


@pytest.fixture(scope="module")
def page():
    """Give the page as a reader sees it, on a line that is as long as it gets."""
    env = {**os.environ, "MANWIDTH": "1000", "LC_ALL": "C", "MAN_KEEP_FORMATTING": ""}
    done = subprocess.run([require("man"), "--warnings", "-l", str(PAGE)], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(".\b", "", done.stdout)


def test_the_page_has_every_option_with_its_value_its_variable_and_its_default(page):
    for setting in SETTINGS:
        said = f"(environment: {setting.env}, default: {setting.default})"
        assert re.search(rf"^ +--{setting.name} {re.escape(setting.metavar)}\n? +.*{re.escape(said)}$", page, re.M)
    for name in OPTIONS:
        assert re.search(rf"^ +(-\w[ A-Z]*, )?--{name}\b(?!-)", page, re.MULTILINE), name


def test_the_page_has_every_command_every_form_and_every_example(page):
    commands = page.partition("\nCOMMANDS\n")[2].partition("\nOPTIONS\n")[0]
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{' '.join((name, *command.words))}\n? +[a-z]", commands, re.MULTILINE), name
    for line in [*USAGE.splitlines(), *EXAMPLES.partition("examples:\n")[2].splitlines()]:
        assert re.search(rf"^ +{re.escape(line.partition('    #')[0].strip())}$", page, re.MULTILINE), line


def test_the_page_has_signals_exit_codes_and_files(page):
    def missing_below(title, *names):
        section = re.search(rf"^{title}\n((?: .*\n|\n)+)", page, re.MULTILINE)[1]
        return [name for name in names if not re.search(rf"^ {{5,7}}{name}\s+\S+ \S+", section, re.MULTILINE)]

    handled = re.findall(r"\(signal\.(\w+), self", (ROOT / "nodepass_gevent" / "process.py").read_text())
    assert set(handled) >= {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR2"}
    assert not {*handled} - {*re.findall(r"SIG\w+", page)}
    assert not missing_below("SIGNALS", "SIGTERM, SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    assert not missing_below("EXIT STATUS", "0", "1", "2", "130, 143")
    assert not missing_below("FILES", "FILE of --config", "share/doc/nodepass-gevent/examples/nodepass.conf")
    assert not missing_below("ENVIRONMENT", "of each option", "SSL_CERT_FILE, SSL_CERT_DIR", "NO_COLOR, FORCE_COLOR")


# Completion


@contextlib.contextmanager
def terminal(home, *argv, **env):
    """Give a function that types keys and waits for a pattern in what a shell on a terminal shows from then on."""
    ours, its = pty.openpty()
    variables = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(home), "LC_ALL": "C", **env}
    with subprocess.Popen(argv, stdin=its, stdout=its, stderr=its, env=variables, start_new_session=True) as shell:
        os.close(its)

        def press(keys, pattern):
            os.write(ours, keys.encode())
            shown, deadline = "", time.monotonic() + START_S
            while not re.search(pattern, shown):
                assert select.select([ours], [], [], max(0, deadline - time.monotonic()))[0], shown
                shown = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", shown + os.read(ours, 4096).decode())

        try:
            yield press
        finally:
            shell.kill()
            os.close(ours)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def bash(home):
    """Give bash as bash-completion sets it up: it finds our script by the command's name."""
    require("bash")
    rest = Path("/usr/share/bash-completion/bash_completion")
    if not rest.exists():
        require("bash-completion")
    with terminal(home, "bash", "--norc", "--noprofile", "-i", XDG_DATA_DIRS=str(SHARE)) as press:
        press(f". {rest}; bind 'set show-all-if-ambiguous on'; PS1=ready'> '\n", "ready> $")
        yield press


@pytest.fixture(scope="module")
def zsh(home):
    require("zsh")
    with terminal(home, "zsh", "-f", "-i", ZDOTDIR=str(home)) as press:
        functions = FILES["zsh"].parent
        press(
            f"fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -D; LISTMAX=1000; PS1=ready'> '\n",
            "ready> $",
        )
        yield press


CLEAR = "\x15"  # control-U
TYPED = [
    ("nodepass --tu\t\t", r"--tunnel-key\b(?s:.*)--tunnel-key-file(?s:.*)--tunnel-name"),
    ("nodepass ge\t\t", r"(?s:generate.*genkey|genkey.*generate)"),
    ("nodepass generate sup\t", r"supervisor $"),
    ("nodepass generate supervisor web --nump\t", r"--numprocs $"),
    ("nodepass status --wat\t", r"--watch $"),
    ("nodepass --tls 1 --log f\t", r"fatal $"),
    ("nodepass check --crt /etc/passw\t", r"/etc/passwd"),
]


@pytest.mark.parametrize(("keys", "pattern"), TYPED)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_on_a_terminal_completes(shell, keys, pattern, request):
    press = request.getfixturevalue(shell)
    press(keys, pattern)
    press(CLEAR + "echo done$((40 + 2))\n", r"done42\s(?s:.*)ready> $")


@pytest.fixture(scope="module")
def fish(home):
    """Give what fish would list for each of some lines."""

    def complete(*lines):
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"}  # it makes directories there
        calls = "; ".join(f"complete -C '{line}'; echo ===" for line in lines)
        argv = [require("fish"), "--no-config", "-c", f"source {FILES['fish']}; {calls}"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=START_S, check=True)
        lists = done.stdout.split("===\n")[: len(lines)]
        return [[row.partition("\t")[0] for row in each.splitlines()] for each in lists]

    return complete


def test_fish_completes_options_commands_their_options_choices_and_files(fish):
    assert fish("nodepass --tu", "nodepass ge", "nodepass generate sy", "nodepass status --wat") == [
        ["--tunnel-key", "--tunnel-key-file", "--tunnel-name"],
        ["generate", "genkey"],
        ["systemd", "systemd-template"],
        ["--watch"],
    ]


@pytest.mark.parametrize("shell", FILES)
def test_each_script_has_every_option_command_and_choice(shell):
    words = set(re.findall(r"[\w-]+", FILES[shell].read_text()))
    prefix = "" if shell == "fish" else "--"
    expected = {f"{prefix}{name}" for name in OPTIONS} | {word for name in COMMANDS for word in name.split()}
    assert not expected.union(*CHOICES.values()) - words


def test_fish_lists_just_what_the_parser_knows(fish):
    everywhere = {f"--{name}" for name in {*BY_NAME, *LINE_ONLY}}
    behind = [f"nodepass {' '.join((name, *command.words))} --" for name, command in COMMANDS.items()]
    listed, *of_commands = fish("nodepass --", *behind)
    assert set(listed) == everywhere
    for command, names in zip(COMMANDS.values(), of_commands, strict=True):
        settings = {name for name in BY_NAME if BY_NAME[name].of_process or not command.of_process}
        known = set() if command.alone else {*settings, "config", "only", *command.flags, *command.options}
        assert set(names) == {f"--{name}" for name in known}
    for name, listed in zip(CHOICES, fish(*(f"nodepass --{name} " for name in CHOICES)), strict=True):
        assert listed == CHOICES[name]
