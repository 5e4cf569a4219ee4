"""Every command of the documentation does what its page says: each page is gone through in order, with real programs.

A page has a directory of its own, in which /etc, /opt, /var and /run are folders. Names of machines become localhost,
and ports become free ones; behind each target there is a service of the test. What runs for ever is started, seen
ready, used by a user, and stopped by SIGTERM when another one needs its port, or at the end of the page.
"""

import contextlib
import http.server
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request

import pages
import pytest

from nodepass_gevent import options
from nodepass_gevent.tunnel_key import format_key

from .harness import Process, certificates, free_port, wait_until
from .programs import require
from .targets import EchoUDP
from .test_supervisord import CONFIGURATION as SUPERVISORD

COMMAND_S = 60.0
READY_S = 30.0

EXCEPTIONS = {  # beginnings of commands that are not run, and why
    "scripts/": "takes minutes, and has tests of its own",
    "python3 -m venv": "installs from a package index",
    "umask 022 && /usr/bin/python3 -m venv": "installs from a package index",
    "umask 022 && python3 -m venv": "installs from a package index",
    ". ~/nodepass/bin/activate": "belongs to that environment",
    "pip install": "installs from a package index",
    "/opt/nodepass/bin/pip": "installs from a package index; tests/integration/test_packages.py has wheel and sdist",
    "chown -R --reference=. build": "is for what such an installation leaves",
    "pipx": "installs from a package index",
    "install -m 755 dist/nodepass": "needs the file made; tests/integration/test_single_file.py makes and copies it",
    "ln -s": "changes directories of this machine; tests/integration/test_share.py has the links into share/",
    "mkdir -p /usr/local": "changes directories of this machine; tests/integration/test_share.py has it",
    "cd /opt/nodepass/share": "is the beginning of those links",
    "ufw": "changes the firewall of this machine",
    "sysctl": "changes the kernel of this machine",
    "supervisorctl": "needs a supervisord; tests/integration/test_supervisord.py has a real one",
    "supervisord": "goes into the background; tests/integration/test_manage.py runs it with the page's file",
    "docker": "needs an engine; scripts/container-steps does what can be done without",
    "(umask 077; docker": "needs an engine",
    "sudo": "needs another user's rights",
    "systemctl": "needs systemd as the first process; tests/integration/test_systemd.py has what can be run",
    "journalctl": "needs the journal of systemd",
    "scp": "needs an account on another machine",
    "ssh": "needs an account on another machine; tests/integration/test_programs.py has SSH through a tunnel",
}
PROGRAMS = ("curl ", "haproxy ", "jq ", "openssl ")  # others are on every machine
MACHINES = ("server.example.com", "hub.example.com", "db.example.com", "site-a.internal", "192.0.2.10", "192.0.2.11")
HERE = re.compile("|".join(map(re.escape, MACHINES)))
FOLDERS = re.compile(r"(?<![\w./%-])/(?=(?:etc|opt|var|run)/)")
PORT = re.compile(r"(?<=[\w\])]):(\d{2,5})(?![\w%:.])")
TUNNEL = re.compile(r"(server|client)://([^/\s\"?]*):(\d+)/([^/\s\"?]*):(\d+)")
MADE_ON_THE_PAGE = ("README.rst", "docs/tutorial.rst", "docs/howto/certificates.rst")  # files that others take as given


class Service(http.server.BaseHTTPRequestHandler):
    """Behind every target: answers each GET."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"here\n")

    def log_message(self, *_: object) -> None:
        pass


class Page:
    """One page on its way: its directory, its ports, what runs."""

    def __init__(self, page, directory):
        self.name, self.directory = pages.name(page), directory
        self.text, self.blocks, self.stack = page.read_text(), pages.blocks(page), contextlib.ExitStack()
        self.ports: dict[str, int] = {}  # as the page has them: as they are here
        self.targets: dict[str, int] = {}
        self.running: list[Running] = []
        path = f"{directory}/opt/nodepass/bin:{os.environ['PATH']}:/usr/sbin"
        self.env = {"HOME": str(directory / "home"), "PATH": path, "NO_PROXY": "*", "PYTHONPATH": str(pages.ROOT)}
        self.env["SSL_CERT_FILE"] = certificates("localhost").ca  # in the place of the public authorities
        self.served = re.findall(r"http\.server (\d+)", self.text)  # by a command of the page itself

    def prepare(self):
        """Make the folders, and the files that were made on another page."""
        for folder in ("etc/nodepass", "etc/supervisor/conf.d", "etc/systemd/system", "opt/nodepass/bin", "home"):
            (self.directory / folder).mkdir(parents=True)
        command = self.directory / "opt" / "nodepass" / "bin" / "nodepass"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nodepass_gevent "$@"\n')
        command.chmod(0o755)
        files = certificates("localhost")
        live = self.directory / "etc" / "letsencrypt" / "live" / "localhost"
        live.mkdir(parents=True)
        shutil.copy(files.crt, live / "fullchain.pem")
        shutil.copy(files.key, live / "privkey.pem")
        if self.name in MADE_ON_THE_PAGE:
            return
        for folder in (self.directory, self.directory / "etc" / "nodepass"):
            for own in ("cert", "site", "b"):
                shutil.copy(files.crt, folder / f"{own}.pem")
                shutil.copy(files.key, folder / f"{own}.key")
            shutil.copy(files.key, folder / "key.pem")
            shutil.copy(files.ca, folder / "ca.pem")
            with (folder / "cert.pem").open("a") as cert:  # the authority is in it: a client takes this file as its ca
                cert.write((folder / "ca.pem").read_text())
            (folder / "tunnel.key").write_text(format_key(os.urandom(32)) + "\n")
            (folder / "tunnel.key").chmod(0o600)
        log = self.directory / "var" / "log" / "nodepass"
        log.mkdir(parents=True)
        (log / "nodepass.log").write_text('{"event": "exchange", "user": "h:1", "bytes_up": 1, "bytes_down": 2}\n{}\n')

    @property
    def all_env(self):
        return {**{name: value for name, value in os.environ.items() if not name.startswith("NODEPASS")}, **self.env}

    def here(self, text):
        """Write what the page says as it is on this machine."""
        text = TUNNEL.sub(self._tunnel, HERE.sub("localhost", text))
        text = PORT.sub(lambda match: f":{self._port(match[1])}", text)
        text = re.sub(r"http\.server (\d+)", lambda match: f"http.server {self._target(match[1])}", text)
        return FOLDERS.sub(f"{self.directory}/", text).replace("0.0.0.0", "127.0.0.1")

    def _tunnel(self, match):
        role, host, port, _, second = match.groups()
        host = "localhost" if host == "localhost" else "127.0.0.1"
        other = self._port(second) if role == "server" else self._target(second)
        return f"{role}://{host}:{self._port(port)}/127.0.0.1:{other}"

    def _port(self, text):
        if text in map(str, {*self.ports.values(), *self.targets.values()}):
            return text  # it is one of ours already
        if text not in self.ports:
            self.ports[text] = self._free_port()
        return self.ports[text]

    def _free_port(self):
        """Find a port that is neither taken, nor ours already, nor one of the page's own numbers."""
        while True:
            port = free_port("both")
            if str(port) not in self.text and port not in {*self.ports.values(), *self.targets.values()}:
                return port

    def _target(self, text):
        if text not in self.targets:
            self.targets[text] = port = self._free_port()
            self.stack.callback(EchoUDP(port=port).stop)
            if text not in self.served:
                server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Service)
                threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
                self.stack.callback(server.server_close)
                self.stack.callback(server.shutdown)
        return self.targets[text]

    def write(self, block):
        """Write a file whose first line says where it is."""
        if match := re.match(r"# (/etc/\S+)\n", block.text):
            path = self.directory / match[1][1:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.here(block.text) + "\n")

    def run(self, command):
        """Do what a command does: for ever, until it ends, or to the variables of the shell."""
        for program in filter(command.__contains__, PROGRAMS):
            require(program.strip())
        text = self.here(command)
        if match := re.match(r"([a-z]+)=", text):
            self.env[match[1]] = self._output(f'{text}\nprintf %s "${match[1]}"')
        elif runs_for_ever(text):
            self._start(text)
        else:
            self._output(text)

    def _output(self, text):
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text],
            cwd=self.directory, env=self.all_env, capture_output=True, text=True, timeout=COMMAND_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.name}: {text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _start(self, text):
        configs = self._configs(text)
        for other in [other for other in self.running if other.is_in_the_way_of(configs)]:
            self._stop(other)
        shown = text.replace("nodepass ", "nodepass --log info ", 1) if configs else text  # pages may ask for less
        process = Process(["bash", "-c", f"cd {self.directory} && exec env {shown}"], env=self.env, name=text)
        self.running.append(Running(process, configs))
        if "--watch" in text:
            process.wait_for_line(".", READY_S)
        for config in configs:
            process.wait_for_line(said(config), READY_S)
            if config.role == "client":
                self._use(config)

    def _configs(self, text):
        """Read a command as the program will."""
        words = shlex.split(self._expanded(text), comments=True)
        if words[0] != "nodepass" or words[1] == "status":
            return ()
        return options.parse(words[1:], {}).configs

    def _expanded(self, text):
        for name, value in self.env.items():
            text = text.replace(f"${name}", value)
        return text

    def _use(self, client):
        """Be a user of a tunnel, by TCP or UDP as it carries."""
        servers = [config for running in self.running for config in running.configs if config.role == "server"]
        server = next((config for config in servers if config.tunnel.port == client.tunnel.port), None)
        assert server, f"{self.name} has no server for {client.url}"
        ask = answers_a_datagram if server.network == "udp" else answers
        wait_until(lambda: ask(server.target.port), READY_S, f"an answer through {server.url}, {self.name}")

    def _stop(self, running):
        self.running.remove(running)
        code = running.process.stop()
        if running.configs:
            assert code == 0, running.process.tail()
            assert not re.search("ERROR|Traceback", "\n".join(running.process.lines)), running.process.tail()

    def close(self):
        while self.running:
            self._stop(self.running[-1])

    def kill(self):
        for running in self.running:
            running.process.kill()
        self.stack.close()


class Running:
    """A process that runs until it is stopped, and its tunnels."""

    def __init__(self, process, configs):
        self.process, self.configs = process, configs

    def is_in_the_way_of(self, configs):
        """A server needs its ports, and comes before its clients; a client needs its place."""
        servers = [config for config in configs if config.role == "server"]
        wanted = {port for config in servers for port in (config.tunnel.port, config.target.port)}
        places = {config.tunnel.port for config in configs}
        needed = [{each.tunnel.port, each.target.port} & wanted for each in self.configs if each.role == "server"]
        return any(needed) or any(each.tunnel.port in places for each in self.configs if each.role == "client")


def said(config):
    """What a tunnel logs once it works."""
    name = re.escape(f"[{config.name}] ") if config.name else ""
    return f"{name}{'listening: ' if config.role == 'server' else 'connected to '}"


def runs_for_ever(text):
    words = [word for word in shlex.split(text, comments=True) if not re.match("[A-Z_]+=", word)]
    if words[:3] == ["python3", "-m", "http.server"] or "--watch" in words:
        return True
    its_own = ("check", "generate", "genkey", "status", "health", "--version", "--help")
    return words[0].endswith("nodepass") and words[1] not in its_own and "--show-config" not in words


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def answers_a_datagram(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.settimeout(2)
        try:
            user.sendto(b"word", ("127.0.0.1", port))
            return user.recv(100) == b"word"
        except OSError:
            return False


def excepted(command):
    return next((start for start in EXCEPTIONS if command.startswith(start)), None)


WITH_COMMANDS = [page for page in pages.PAGES if any(not excepted(command) for command in pages.commands(page))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=pages.name)
def test_every_command_of_a_page_does_what_the_page_says(page, tmp_path):
    here = Page(page, tmp_path)
    try:
        here.prepare()
        for block in here.blocks:
            here.write(block)
            for command in block.commands:
                if not excepted(command):
                    here.run(command)
        here.close()
    finally:
        here.kill()


def test_the_lines_of_the_readme_run_under_supervisord(tmp_path):
    here = Page(pages.README, tmp_path)
    commands = [command for command in pages.commands(pages.README) if not excepted(command)]
    (generate,) = [command for command in commands if " generate supervisor web " in command]
    made = ("openssl", "(umask", "install", "own=", "python3 -m http.server")
    try:
        here.prepare()
        for command in [command for command in commands if command.startswith(made)]:
            here.run(command)
        for name in ("web", "client"):
            here.run(
                next(command for command in commands if command.startswith(f'url="{name.replace("web", "server")}:'))
            )
            here.run(generate.replace(" web ", f" {name} --log-dir {tmp_path} ").replace("web.conf", f"{name}.conf"))
        configuration = tmp_path / "supervisord.conf"
        include = f"files={tmp_path}/etc/supervisor/conf.d/*.conf"
        own = SUPERVISORD if os.getuid() == 0 else SUPERVISORD.replace("user=root\n", "")
        configuration.write_text(own.format(tmp_path).replace(f"files={tmp_path}/conf.d/*.conf", include))
        argv = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(configuration)]
        with Process(argv, env=here.env, name="supervisord") as supervisord:
            wait_until(lambda: answers(here.ports["8080"]), READY_S, "an answer through both programs")
            assert supervisord.stop() == 0
    finally:
        here.kill()


@pytest.mark.parametrize("start", EXCEPTIONS)
def test_each_exception_occurs(start):
    assert any(command.startswith(start) for page in pages.PAGES for command in pages.commands(page))
