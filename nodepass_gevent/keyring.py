"""Where secrets come from: a tunnel's keys, from a setting or a file, and the token of status, from a file.

Such a file is one that nobody else can read. That of a tunnel's keys may change while we run: of its two keys the first
proves who this side is and both are accepted, so that a key is changed without a pause.
"""

import os
import re
import stat
from functools import lru_cache

from gevent.threadpool import ThreadPool

from . import log as logs
from .config import Config, Process
from .errors import ConfigError, reason
from .files import may_pass, open_at_once, stamps
from .tunnel_key import Root, TunnelKey, derive, parse_key
from .values import shown_path

MAX_KEYS = 2  # the old one and the new one
MAX_FILE = 8192  # bytes; two passphrases of 1024 characters, and comments
_TOKEN = re.compile("[!-~]{16,1024}")
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class KeyRing:
    """The keys of one tunnel, derived and ready for use; ``roots`` is empty where there is none."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._log = logs.of(config.name)
        self._seen = stamps(config.tunnel_key_file)
        self.roots = _derive_aside(config, read_keys(config))

    def reload(self) -> None:
        """Read the file again if it changed; keep the old keys, and say so, if it is bad."""
        seen = stamps(self._config.tunnel_key_file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            keys = read_keys(self._config)
        except ConfigError as exc:
            if may_pass(exc):
                self._seen = ()
            self._log.error("tunnel key not reloaded, the old one stays in use: %s", exc)
            return
        try:
            roots = _derive_aside(self._config, keys)
        except (RuntimeError, MemoryError):  # RuntimeError: the system gives no thread for it
            self._seen = ()
            raise
        if self._seen == seen:  # it may have changed once more meanwhile
            self.roots = roots
            self._log.info("tunnel key: %d read from %s", len(keys), shown_path(self._config.tunnel_key_file))


def read_keys(config: Config) -> tuple[TunnelKey, ...]:
    """Give the keys that the settings name; ConfigError when they come from a file that cannot be used."""
    if config.tunnel_key:
        return (config.tunnel_key,)
    path = config.tunnel_key_file
    if path is None:
        return ()
    try:
        return _parse(_read_private(path))
    except ConfigError as exc:
        raise ConfigError(
            f"tunnel-key-file: {shown_path(path)} {exc} [from {config.source('tunnel-key-file')}]"
        ) from exc


def _read_private(path: str) -> str:
    """Read a file of secrets; ConfigError, which begins with a verb, when it is not one that nobody else can read."""
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError("is not a regular file")
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"belongs to user {status.st_uid}; it must be ours, or root's")
            if status.st_mode & OTHERS and not _is_credential(status):
                mode = stat.S_IMODE(status.st_mode)
                raise ConfigError(f"has mode {mode:04o}: others may use it; chmod 600 keeps them out")
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ConfigError(f"is larger than {MAX_FILE} bytes")
        return data.decode("utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"cannot be read: {reason(exc)}") from exc
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text") from None  # whose message would quote a byte of it


def _is_credential(status: os.stat_result) -> bool:
    """Whether a file is root's alone but for an access list, whose mask shows as rights of group root.

    So systemd passes credentials on, where their file system has access lists.
    """
    return (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o440)


def read_token(process: Process) -> str | None:
    """Give the token that the settings name; ConfigError when its file cannot be used."""
    path = process.status_token_file
    if path is None:
        return None
    try:
        token = _read_private(path).strip()
        if not _TOKEN.fullmatch(token):
            raise ConfigError("holds no token; it needs one of 16 to 1024 ASCII characters without a blank")
        return token
    except ConfigError as exc:
        source = process.source("status-token-file")
        raise ConfigError(f"status-token-file: {shown_path(path)} {exc} [from {source}]") from exc


def _parse(text: str) -> tuple[TunnelKey, ...]:
    """Read one key per line; blank lines and those that begin with ``#`` hold none."""
    keys = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            keys.append(parse_key(line))
        except ConfigError as exc:
            raise ConfigError(f"line {number}: {exc}") from exc
    if not 1 <= len(keys) <= MAX_KEYS:
        raise ConfigError(f"holds {len(keys) or 'no'} keys; it needs one, or two while a key is changed")
    return tuple(keys)


def _derive_aside(config: Config, keys: tuple[TunnelKey, ...]) -> tuple[Root, ...]:
    """Derive, from a passphrase in a thread: that takes a tenth of a second, in which others go on."""
    if any(key.is_passphrase for key in keys):
        return _thread().apply(_derive, (config, keys))
    return _derive(config, keys)


@lru_cache(1)
def _thread() -> ThreadPool:
    return ThreadPool(1)  # the hub's threads may all wait for a name server


def _derive(config: Config, keys: tuple[TunnelKey, ...]) -> tuple[Root, ...]:
    return tuple(derive(key, config.tunnel_name or "") for key in keys)
