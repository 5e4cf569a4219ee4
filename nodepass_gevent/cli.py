"""The command ``nodepass``: what is printed where, and the exit codes. What settings mean is decided in options.

0 after a stop by signal and for what is only printed, 1 where that cannot be done, 2 for a wrong setting or no tunnel
at all, 130 for Ctrl-C before anything runs; else what the process returns.
"""

import os
import secrets
import shlex
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress

from . import __version__, check, descriptors, example, generate, options, ports, process, status_client
from .client import Client
from .command_line import Line, build_parser
from .config import Config
from .errors import ConfigError, reason
from .keyring import OTHERS, read_token
from .server import Server
from .service import Role
from .tunnel_key import SIZE, format_key
from .usage import USAGE
from .values import printable

UNWRITTEN = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT
ROLES = {"server": Server, "client": Client}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (the process's own when None); return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        line = options.read_line(argv)
        if line.action != "run":
            process.take_signals()  # nothing here handles them
        if line.action == "check":
            return _check(line)
        parsed = options.parse(argv, os.environ)
        if parsed.action in ("status", "health"):
            ask = status_client.health if parsed.action == "health" else status_client.status
            return ask(parsed.process, parsed.line.flags, _write)
        if parsed.action != "run":
            return _print(parsed, argv)
        taken = descriptors.taken()
        plan = _plan(parsed, taken)
        return process.run(plan, lambda: _plan(options.parse(argv, os.environ, again=True), taken), _make_role)
    except ConfigError as exc:
        print(f"nodepass: error: {exc}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _check(line: Line) -> int:
    text, sound = check.report(check.check(line.rest, os.environ), as_json="json" in line.flags)
    return _write(f"{text}\n") or (0 if sound else USAGE_ERROR)


def _plan(parsed: options.Parsed, taken: int) -> process.Plan:
    """Check what no parser can: files, keys, and whether the system allows so many descriptors."""
    for config in parsed.configs:
        check.check_settings(config)
    ports.refuse_clashes(parsed.process, parsed.configs)
    token = read_token(parsed.process)
    budget = check.budget(parsed.process, parsed.configs, taken)
    warnings = (*parsed.warnings, *budget.warnings)
    return process.Plan(parsed.process, budget.configs, warnings, budget.most, budget.pipes, token)


def _make_role(config: Config, before: Role | None) -> Role:
    return ROLES[config.role](config, before)


def _print(parsed: options.Parsed, argv: Sequence[str]) -> int:
    if parsed.action == "usage":
        print(f"usage: {USAGE}\nnodepass --help shows all options", file=sys.stderr)
        return USAGE_ERROR
    code = _write(_text(parsed, argv))
    if parsed.action == "genkey" and not code:
        _warn_of_readers()
    return code


def _text(parsed: options.Parsed, argv: Sequence[str]) -> str:
    """Give what a command that only prints has to print."""
    if parsed.action == "help":
        return build_parser().format_help()
    if parsed.action == "version":
        return f"nodepass-gevent {__version__}\n"
    if parsed.action == "genkey":
        return format_key(secrets.token_bytes(SIZE)) + "\n"
    if parsed.action.startswith("generate "):
        return _generate(parsed, argv)
    return options.show(parsed.process, parsed.configs)


def _write(text: str) -> int:
    """Print what was asked for, and give the exit code; a reader that has closed has what it wanted."""
    try:
        print(text, end="", flush=True)
    except (OSError, UnicodeEncodeError) as exc:
        if not isinstance(exc, BrokenPipeError):
            print(f"nodepass: error: standard output: {reason(exc)}", file=sys.stderr)
        with open(os.devnull, "w") as nowhere:  # or the interpreter, at its end, tries again and tells
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return UNWRITTEN
    return 0


def _warn_of_readers() -> None:
    """Say that the file into which a key was printed is one that tunnel-key-file refuses."""
    with suppress(AttributeError, OSError):  # no standard output, or none of the system's
        descriptor = sys.stdout.fileno()
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) and mode & OTHERS:
            path = printable(shlex.quote(os.readlink(f"/proc/self/fd/{descriptor}")))
            words = f"the key's file has mode {stat.S_IMODE(mode):04o}: others may use it"
            print(f"nodepass: warning: {words}; chmod 600 {path} keeps them out", file=sys.stderr)


def _generate(parsed: options.Parsed, argv: Sequence[str]) -> str:
    command = generate.own_command(sys.argv[0], sys.executable)
    if parsed.action == "generate supervisor":
        return generate.supervisor(parsed, argv, command)
    if parsed.action == "generate systemd":
        return generate.systemd(parsed, command)
    if parsed.action == "generate systemd-template":
        return generate.systemd_template(command)
    return example.example_file()
