"""The commands in a few words each, as no help of the command itself has them."""

from nodepass_gevent.command_line import COMMANDS

_TEXTS = {
    "genkey": "print a new tunnel key",
    "check": "tell what would go wrong with these tunnels, without running them",
    "generate config": "print an example of the config file, with every setting",
    "generate supervisor": "print a program section for supervisord",
    "generate systemd": "print a unit for systemd",
    "generate systemd-template": "print a template unit for systemd, nodepass@.service",
    "status": "tell how a running process is",
    "health": "tell by the exit code whether a running process is well",
}
HELP = {name: _TEXTS[name] for name in COMMANDS}
GROUPS = {"generate": "print what others are given to run this program"}
