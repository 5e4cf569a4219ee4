"""Real programs as targets: each on a port found free, in a context manager that ends it by its pid.

What a test needs to use the program is yielded. The tunnel is unknown here.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess

import pytest

from .harness import Process, free_port, wait_until

START_S = 10  # the slowest here, sshd, needs well under one second
TCP_LISTEN, UDP_BOUND = "0A", "07"  # states in /proc/net/{tcp,udp}


def require(name):
    """Return the program's path; where it is missing, skip on a user's machine and fail in CI."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")
    return path


def is_bound(port, network="tcp"):
    """Tell from the kernel's table, since connecting to find out would be a client the program has to serve."""
    state = TCP_LISTEN if network == "tcp" else UDP_BOUND
    rows = [row.split() for row in pathlib.Path(f"/proc/net/{network}").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == state for row in rows)


@contextlib.contextmanager
def running(command, port, network="tcp"):
    """Run `command` until the block ends; the block starts when it has bound `port`."""
    with Process([require(command[0]), *command[1:]]) as program:

        def ready():
            assert program.returncode is None, f"{command[0]} ended with {program.returncode}\n{program.tail()}"
            return is_bound(port, network)

        wait_until(ready, START_S, f"{command[0]} on port {port}")
        yield


@contextlib.contextmanager
def nginx(directory):
    """Serve the files in `directory` over HTTP; yields the port."""
    port = free_port()
    state = directory / "nginx"
    state.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"{kind}_temp_path {state}/{kind};" for kind in kinds)
    config = state / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {state}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port}; root {directory}; }} }}\n"
    )
    with running(["nginx", "-p", str(state), "-c", str(config), "-e", "stderr"], port):
        yield port


@contextlib.contextmanager
def nginx_behind_proxy(directory):
    """Answer every request with the user's and the destination's address of the PROXY header; yields the port."""
    port = free_port()
    state = directory / "nginx"
    state.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"{kind}_temp_path {state}/{kind};" for kind in kinds)
    told = "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port"
    config = state / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {state}/pid; error_log stderr; events {{}}\n"
        f"http {{ log_format told '{told}'; access_log {state}/access.log told; {paths}\n"
        f"server {{ listen 127.0.0.1:{port} proxy_protocol; location / {{ return 200 '{told}'; }} }} }}\n"
    )
    with running(["nginx", "-p", str(state), "-c", str(config), "-e", "stderr"], port):
        yield port


@contextlib.contextmanager
def haproxy(directory):
    """Answer every request with the user's and the destination's address of the PROXY header; yields the port."""
    port = free_port()
    config = directory / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout client 10s\n"
        f"frontend told\n    bind 127.0.0.1:{port} accept-proxy\n"
        '    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst_port]"\n'
    )
    with running(["haproxy", "-db", "-f", str(config)], port):
        yield port


@contextlib.contextmanager
def redis():
    """Run a database that writes nothing to disk; yields the port."""
    port = free_port()
    in_memory = ["--save", "", "--appendonly", "no"]
    with running(["redis-server", "--bind", "127.0.0.1", "--port", str(port), *in_memory], port):
        yield port


@contextlib.contextmanager
def dnsmasq(directory, hosts, texts=None):
    """Answer for `hosts` (name to address) and `texts` (name to TXT records), ask nobody else; yields the UDP port."""
    port = free_port("both")
    lines = ["no-resolv", "no-hosts", "bind-interfaces", "listen-address=127.0.0.1", f"port={port}", "log-facility=-"]
    lines += [f"host-record={name},{address}" for name, address in hosts.items()]
    lines += ["edns-packet-max=4096"]
    lines += [f"txt-record={name},{text}" for name, many in (texts or {}).items() for text in many]
    config = directory / "dnsmasq.conf"
    config.write_text("\n".join(lines) + "\n")
    with running(["dnsmasq", "--no-daemon", "--user=", "--pid-file=", f"--conf-file={config}"], port, "udp"):
        yield port


@contextlib.contextmanager
def iperf3_server():
    """Wait for throughput tests; yields the port, which is for TCP and UDP."""
    port = free_port("both")
    with running(["iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port)], port):
        yield port


@dataclasses.dataclass(frozen=True)
class Ssh:
    """A running sshd that knows one key, and the options that make `ssh` and `scp` use that key and no other."""

    port: int
    options: list[str]


@contextlib.contextmanager
def sshd(directory):
    """Let the current user in with a throw-away key; yields an `Ssh`."""
    port = free_port()
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # root's sshd insists; Debian's boot makes it, too
    for name in ("host", "user"):
        key = str(directory / name)
        subprocess.run([require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=START_S)
    config = directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    settings = {
        "IdentityFile": f"{directory}/user",
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
    }
    options = ["-F", "none"] + [f"-o{key}={value}" for key, value in settings.items()]
    with running([require("sshd"), "-D", "-e", "-f", str(config)], port):
        yield Ssh(port, options)
