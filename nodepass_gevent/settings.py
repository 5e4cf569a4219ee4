"""Every setting in one table: what it is called in each source, how its text is read, and what it means.

Defaults and allowed values are those of Config, its Limits, and Process; a new setting is a field there and a row here.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .config import Config, Limits, Process, setting_name, setting_text
from .errors import ConfigError
from .tunnel_key import parse_key
from .values import Address, Networks, Pins, parse_duration, parse_seconds, shown, shown_path


def parse_integer(text: str) -> int:
    """Parse a number as operators write it; raise ConfigError."""
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise ConfigError(f"{shown(text)} is not a whole number")
    return int(text)


def parse_path(text: str) -> str:
    """Take a file's name; raise ConfigError for letters that names of files cannot have here."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError as exc:
        where = f"in this locale, whose encoding is {exc.encoding}; LC_ALL=C.UTF-8 has all letters"
        raise ConfigError(f"{shown_path(text)} is no name of a file {where}") from exc
    return text


def parse_choice(text: str) -> int | str:
    """Parse one of a few numbers; what is no number is left to be refused with the list of these."""
    return int(text) if re.fullmatch("[0-9]{1,3}", text) else text


_FIELDS = {each.name: each for each in (*fields(Config), *fields(Limits), *fields(Process))}
_OF_PROCESS = {each.name for each in fields(Process)}


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    field: str  # of Config, of its Limits, or of Process; "url" alone is none, and becomes several
    env: str
    read: Callable[[str], Any]  # text -> the field's value, or ConfigError
    value: str  # what the help calls the value, where Config has no list of choices
    group: str
    help: str
    unset: str = "none"  # what the default is called where it is no value
    secret: bool = False  # its value stands in no error

    @property
    def name(self) -> str:
        """What the option, the query key and the file key are called."""
        return setting_name(self.field)

    @property
    def of_process(self) -> bool:
        """Whether it is said once for all tunnels."""
        return self.field in _OF_PROCESS

    @property
    def metavar(self) -> str:
        return "|".join(map(str, self._rules.get("choices", ()))) or self.value

    @property
    def allowed(self) -> str:
        """The values it takes, in words."""
        if "range" not in self._rules:
            return self.metavar.replace("|", ", ")
        low, high = (setting_text(self.field, bound) for bound in self._rules["range"])
        return f"{low} to {high}{', whole seconds' if 'whole' in self._rules else ''}"

    @property
    def _rules(self) -> Mapping[str, Any]:
        return _FIELDS[self.field].metadata if self.field in _FIELDS else {}

    @property
    def default(self) -> str:
        default = _FIELDS[self.field].default if self.field in _FIELDS else None
        return self.unset if default is None else setting_text(self.field, default)


_ADDRESSES, _TLS, _POOL = "addresses and mode", "TLS", "pool and limits"
_TIMING, _LOGS, _STATUS = "timing", "logs", "status"
_ACCESS = "who may come in"
_DEADLINES, _SOCKETS = "deadlines (seldom changed)", "sockets (seldom changed)"

# fmt: off
SETTINGS = (
    Setting("url", "NODEPASS_URL", str, "URL", _ADDRESSES, "the tunnel, like the argument URL"),
    Setting("network", "NODEPASS_NETWORK", str, "", _ADDRESSES,
            "server: what the public port takes; client: what may reach the target"),
    Setting("protocol", "NODEPASS_PROTOCOL", str, "", _ADDRESSES, "profile of the wire protocol"),
    Setting("proxy_protocol", "NODEPASS_PROXY_PROTOCOL", parse_choice, "", _ADDRESSES,
            "client: version of the PROXY protocol by which the target is told the user's address, 0 for none"),
    Setting("data_port", "NODEPASS_DATA_PORT", parse_integer, "PORT", _ADDRESSES,
            "server: port of v1 data connections", unset="any free one"),
    Setting("reuse_port", "NODEPASS_REUSE_PORT", parse_choice, "", _ADDRESSES,
            "server: 1 lets several processes share the tunnel port and the public port"),
    Setting("tls", "NODEPASS_TLS", parse_choice, "", _TLS,
            "0 plain, 1 encrypted, 2 with a certificate that is verified; client: the least it accepts"),
    Setting("crt", "NODEPASS_CRT", parse_path, "FILE", _TLS, "own certificate and its chain, PEM"),
    Setting("key", "NODEPASS_KEY", parse_path, "FILE", _TLS, "the private key that fits it, PEM"),
    Setting("ca", "NODEPASS_CA", parse_path, "FILE", _TLS,
            "authorities, PEM; client: in place of the system's; server: clients need a certificate of theirs"),
    Setting("sni", "NODEPASS_SNI", str, "NAME", _TLS, "client: name in the certificate, unless that of the URL"),
    Setting("pin", "NODEPASS_PIN", Pins.parse, "SHA256,...", _TLS, "client: digests of public keys, one the server's"),
    Setting("tunnel_key_file", "NODEPASS_TUNNEL_KEY_FILE", parse_path, "FILE", _TLS,
            "file of the key that both sides must have; two lines while it is changed"),
    Setting("tunnel_key", "TUNNEL_KEY", parse_key, "KEY", _TLS,
            "the key itself; as an option or in the URL it is visible in ps", secret=True),
    Setting("tunnel_name", "NODEPASS_TUNNEL_NAME", str, "NAME", _TLS, "goes into the key: the same at both ends"),
    Setting("semaphore_limit", "SEMAPHORE_LIMIT", parse_integer, "N", _POOL, "users served at once"),
    Setting("min_pool_capacity", "MIN_POOL_CAPACITY", parse_integer, "N", _POOL, "data connections kept ready, least"),
    Setting("max_pool_capacity", "MAX_POOL_CAPACITY", parse_integer, "N", _POOL, "data connections kept ready, most"),
    Setting("udp_data_buf_size", "UDP_DATA_BUF_SIZE", parse_integer, "BYTES", _POOL, "largest datagram of v1"),
    Setting("callers", "NODEPASS_CALLERS", parse_integer, "N", _POOL,
            "server: callers on the tunnel port that are not known yet"),
    Setting("udp_read_timeout_s", "UDP_READ_TIMEOUT", parse_duration, "TIME", _TIMING, "wait for a reply, v1"),
    Setting("report_interval_s", "REPORT_INTERVAL", parse_duration, "TIME", _TIMING, "between two keep-alives"),
    Setting("reload_interval_s", "RELOAD_INTERVAL", parse_duration, "TIME", _TIMING,
            "between looks at crt, key, ca, tunnel-key-file"),
    Setting("service_cooldown_s", "SERVICE_COOLDOWN", parse_duration, "TIME", _TIMING, "longest pause before a retry"),
    Setting("shutdown_timeout_s", "SHUTDOWN_TIMEOUT", parse_duration, "TIME", _TIMING, "for users to end at shutdown"),
    Setting("log", "NODEPASS_LOG", str, "", _LOGS, "least level that is logged"),
    Setting("access_log", "NODEPASS_ACCESS_LOG", str, "", _LOGS, "level of the line about each exchange"),
    Setting("log_to", "NODEPASS_LOG_TO", parse_path, "stdout|stderr|FILE", _LOGS, "where log lines go"),
    Setting("log_format", "NODEPASS_LOG_FORMAT", str, "", _LOGS, "form of log lines"),
    Setting("log_rate", "NODEPASS_LOG_RATE", parse_integer, "N", _LOGS,
            "lines per second of one kind, over 10 s; 0: no limit"),
    Setting("status", "NODEPASS_STATUS", Address.parse, "HOST:PORT", _STATUS,
            "where /metrics, /healthz, /readyz, /status.json and a page are served; a loopback address needs no token",
            unset="nowhere"),
    Setting("status_token_file", "NODEPASS_STATUS_TOKEN_FILE", parse_path, "FILE", _STATUS,
            "file of the token that who asks has to give; nobody else may read it"),
    Setting("allow_users", "NODEPASS_ALLOW_USERS", Networks.parse, "NETWORKS", _ACCESS,
            "server: networks of users, comma-separated; all others are kept out", unset="all"),
    Setting("deny_users", "NODEPASS_DENY_USERS", Networks.parse, "NETWORKS", _ACCESS,
            "server: networks whose users are kept out, even if allowed"),
    Setting("users_per_address", "NODEPASS_USERS_PER_ADDRESS", parse_integer, "N", _ACCESS,
            "server: users at once, of TCP and UDP, from one address (IPv6: /64); 0: no limit"),
    Setting("udp_rate_per_address", "NODEPASS_UDP_RATE_PER_ADDRESS", parse_integer, "N", _ACCESS,
            "server: datagrams per second from one address (IPv6: /64); 0: no limit"),
    Setting("allow_clients", "NODEPASS_ALLOW_CLIENTS", Networks.parse, "NETWORKS", _ACCESS,
            "server: networks of clients; all others are kept out", unset="all"),
    Setting("deny_clients", "NODEPASS_DENY_CLIENTS", Networks.parse, "NETWORKS", _ACCESS,
            "server: networks whose clients are kept out, even if allowed"),
    Setting("penalty_after", "NODEPASS_PENALTY_AFTER", parse_integer, "N", _ACCESS,
            "server: wrong proofs of the tunnel key from which on an address is kept out; 0: never"),
    Setting("penalty_first_s", "NODEPASS_PENALTY_FIRST", parse_duration, "TIME", _ACCESS,
            "server: for that long, and twice as long each time"),
    Setting("penalty_longest_s", "NODEPASS_PENALTY_LONGEST", parse_duration, "TIME", _ACCESS,
            "server: and no longer than that"),
    Setting("connect_timeout_s", "NODEPASS_CONNECT_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "client: a dial of the server"),
    Setting("target_timeout_s", "NODEPASS_TARGET_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "client: a dial of the target"),
    Setting("first_line_timeout_s", "NODEPASS_FIRST_LINE_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "client: wait for the server's first line"),
    Setting("opening_timeout_s", "NODEPASS_OPENING_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "server: for a caller that has begun to say what it is; client: for the welcome"),
    Setting("caller_timeout_s", "NODEPASS_CALLER_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "server: for a caller that is silent and proves nothing"),
    Setting("tls_handshake_timeout_s", "NODEPASS_TLS_HANDSHAKE_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "a TLS handshake"),
    Setting("authentication_timeout_s", "NODEPASS_AUTHENTICATION_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "server: for a proof of the tunnel key"),
    Setting("takeover_timeout_s", "NODEPASS_TAKEOVER_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "server: a client that answers no ping gives way to another one with the tunnel key"),
    Setting("id_timeout_s", "NODEPASS_ID_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "client: wait for a data connection's id; server: for its acknowledgement by a v1 client"),
    Setting("pool_wait_s", "NODEPASS_POOL_WAIT", parse_duration, "TIME", _DEADLINES,
            "a user waits for a data connection, and a launch for the one it names"),
    Setting("half_closed_timeout_s", "NODEPASS_HALF_CLOSED_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "silence of an exchange that has ended in one direction"),
    Setting("idle_timeout_s", "NODEPASS_IDLE_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "silence of an exchange in both directions; 0: for ever"),
    Setting("udp_session_timeout_s", "NODEPASS_UDP_SESSION_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "silence of a UDP session in both directions"),
    Setting("drain_linger_s", "NODEPASS_DRAIN_LINGER", parse_duration, "TIME", _DEADLINES,
            "wait for the peer's end behind our last word"),
    Setting("dead_intervals", "NODEPASS_DEAD_INTERVALS", parse_integer, "N", _DEADLINES,
            "keep-alive intervals of silence after which a control channel is dead"),
    Setting("dead_timeout_s", "NODEPASS_DEAD_TIMEOUT", parse_duration, "TIME", _DEADLINES,
            "client: and at least that long, towards a v1 server"),
    Setting("accept_pause_s", "NODEPASS_ACCEPT_PAUSE", parse_duration, "TIME", _SOCKETS,
            "server: of a listener that is out of descriptors or memory; doubles"),
    Setting("accept_pause_longest_s", "NODEPASS_ACCEPT_PAUSE_LONGEST", parse_duration, "TIME", _SOCKETS,
            "server: and no longer than that"),
    Setting("descriptor_reserve", "NODEPASS_DESCRIPTOR_RESERVE", parse_integer, "N", _SOCKETS,
            "open files that neither users nor peers may take"),
    Setting("keepalive_idle_s", "NODEPASS_KEEPALIVE_IDLE", parse_seconds, "TIME", _SOCKETS,
            "silence before the first TCP keepalive"),
    Setting("keepalive_interval_s", "NODEPASS_KEEPALIVE_INTERVAL", parse_seconds, "TIME", _SOCKETS,
            "between two TCP keepalives without an answer"),
    Setting("keepalive_count", "NODEPASS_KEEPALIVE_COUNT", parse_integer, "N", _SOCKETS,
            "TCP keepalives without an answer that end a connection"),
    Setting("tcp_user_timeout_s", "NODEPASS_TCP_USER_TIMEOUT", parse_duration, "TIME", _SOCKETS,
            "no acknowledgement for that long ends a control channel, and an idle data connection"),
)
# fmt: on
BY_NAME = {setting.name: setting for setting in SETTINGS}
