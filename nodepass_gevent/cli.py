"""The command ``nodepass``: what is printed where, and the exit codes. What settings mean is decided in options.

0 after a stop by signal and for what is only printed, 2 for a wrong setting or no tunnel at all, 130 for Ctrl-C
before anything runs; else what the service returns.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from . import __version__, descriptors, options, relay, service
from . import log as logs
from .client import Client
from .config import LOG_LEVELS, Config
from .errors import ConfigError
from .keyring import read_keys
from .server import Server
from .tls_context import check_files
from .tunnel_key import SIZE, format_key

log = logging.getLogger(__name__)

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT
ROLES: Mapping[str, Callable[[Config], service.Role]] = {"server": Server, "client": Client}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (the process's own when None); return the exit code."""
    try:
        parsed = options.parse(sys.argv[1:] if argv is None else argv, os.environ)
        if parsed.action != "run":
            return _print(parsed)
        for config in parsed.configs:
            _check_files(config)
            read_keys(config)
        budget = descriptors.plan(parsed.configs, descriptors.allowed(), descriptors.taken())
    except ConfigError as exc:
        print(f"nodepass: error: {exc}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    logs.setup(_most_detailed(parsed.configs))
    for warning in (*parsed.warnings, *budget.warnings):
        log.warning("%s", warning)
    relay.pipes.most = budget.pipes
    return service.run([ROLES[config.role](config) for config in budget.configs])


def _print(parsed: options.Parsed) -> int:
    if parsed.action == "usage":
        print(f"usage: {options.USAGE}\nnodepass --help shows all options", file=sys.stderr)
        return USAGE_ERROR
    if parsed.action == "help":
        print(options.build_parser().format_help(), end="")
    elif parsed.action == "genkey":
        print(format_key(secrets.token_bytes(SIZE)))
    elif parsed.action == "version":
        print(f"nodepass-gevent {__version__}")
    else:
        print(options.show(parsed.configs), end="")
    return 0


def _check_files(config: Config) -> None:
    """Refuse certificate files that cannot be used before anything runs."""
    try:
        check_files(config)
    except ConfigError as exc:
        names = ("ca",) if str(exc).startswith("ca:") else ("crt", "key")
        sources = [config.source(name) for name in names]
        raise ConfigError(f"{exc} [from {', '.join(dict.fromkeys(sources))}]") from exc


def _most_detailed(configs: Iterable[Config]) -> str:
    """Return the level that serves every tunnel of the process."""
    return min((config.log for config in configs), key=LOG_LEVELS.index)
