"""The example of a config file: every setting with its help, its default and what is allowed, all commented out."""

import textwrap

from .settings import SETTINGS, Setting

WIDTH = 118
EXAMPLES = {  # for settings without a default
    "url": "server://0.0.0.0:10101/0.0.0.0:8080",
    "data-port": "10102",
    "crt": "/etc/nodepass/cert.pem",
    "key": "/etc/nodepass/key.pem",
    "ca": "/etc/nodepass/ca.pem",
    "sni": "server.example.com",
    "pin": "sha256:4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce",
    "tunnel-key-file": "/etc/nodepass/tunnel.key",
    "tunnel-key": "a passphrase of 16 characters or more",
    "tunnel-name": "web",
    "status": "127.0.0.1:9100",
    "status-token-file": "/etc/nodepass/status.token",
    "allow-users": "203.0.113.0/24,2001:db8:7::/48",
    "deny-users": "203.0.113.66",
    "allow-clients": "198.51.100.4",
    "deny-clients": "198.51.100.66",
}
_HEAD = """\
An example with every setting: each is commented out, with its default or, where there is none, an example. Take
away the # before what you change, and before the section of a tunnel at the end, then try the file:
  nodepass check --config FILE

What stands in [nodepass] holds for all tunnels, unless the section of one says otherwise. A setting's environment
variable comes before the file, the query of a tunnel's URL and options of the command line before both. Times are
written 5s, 1h30m or 100ms. "server:" or "client:" names the side that has a setting. SIGHUP makes a running process
read its file again.
"""
_TUNNELS = """
# --- tunnels: a section for each, in which any setting may stand that is not only for [nodepass]

#[tunnel web]
#url = server://0.0.0.0:10101/0.0.0.0:8080
#tls = 1

#[tunnel ssh]
#url = client://server.example.com:10201/127.0.0.1:22?log=warn
#semaphore-limit = 16
"""


def example_file() -> str:
    """Give the file's text."""
    parts = [_comment(*_HEAD.splitlines()), "\n[nodepass]\n"]
    group = ""
    for setting in SETTINGS:
        if setting.group != group:
            group = setting.group
            parts.append(f"\n# --- {group}\n")
        parts.append(f"\n{_setting(setting)}")
    return "".join((*parts, _TUNNELS))


def _setting(setting: Setting) -> str:
    scope = " Only in [nodepass]." if setting.of_process else ""
    about = f"Allowed: {setting.allowed}. Environment: {setting.env}.{scope}"
    example = EXAMPLES.get(setting.name)
    value = setting.default if example is None else f"{example}  # default: {setting.unset}"
    return f"{_comment(f'{setting.name}: {setting.help}', about)}#{setting.name} = {value}\n"


def _comment(*paragraphs: str) -> str:
    """Make lines of a comment; a setting that is commented out has no blank behind its #."""
    lines = [line for text in paragraphs for line in textwrap.wrap(text, WIDTH - 2) or [""]]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
