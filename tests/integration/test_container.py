"""The Dockerfile and compose.yaml, as far as it goes without an engine; `scripts/container-steps` runs their steps."""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest

from nodepass_gevent import options

from .container import RELEASE, compose, context, copy_context, is_ignored, read_dockerfile
from .harness import ROOT, START_S, Process, free_port, wait_until

STAGES = read_dockerfile((ROOT / "Dockerfile").read_text())
IMAGE = STAGES[-1]
COMPOSE = compose()
TUNNELS = {name: COMPOSE["services"][name] for name in ("server", "client")}


def parsed(name):
    """Parse a service's command line, with the environment of its image."""
    return options.parse(TUNNELS[name]["command"], IMAGE.environ)


def test_a_dockerfile_is_read_as_an_engine_reads_it():
    text = '# c\nARG A=1\nFROM x:${A} AS one\nRUN a \\\n    # within\n    && b\nFROM y\nENV P=1 \\\n  Q="2 3"\n'
    text += 'HEALTHCHECK --interval=3s --timeout=5s CMD ["a", "b"]\n'
    one, last = read_dockerfile(text)
    assert (one.base, one.name, one.steps) == ("x:1", "one", [("RUN", "a && b")])
    assert last.environ == {"P": "1", "Q": "2 3"}
    assert last.health == ({"interval": "3s", "timeout": "5s"}, ["a", "b"])


@pytest.mark.parametrize(
    ("path", "ignored"),
    [("a", True), ("b/c", False), ("b/d/e", False), ("b/d/x.key", True), ("x.key", True), ("c/b", True)],
)
def test_what_an_engine_is_sent_is_decided_by_the_last_pattern_that_fits(path, ignored):
    assert is_ignored(path, ["*", "!b", "**/*.key"]) is ignored


def test_the_base_image_is_slim_and_of_a_release():
    assert {stage.base for stage in STAGES} == {f"python:3.13-slim-{RELEASE}"}


def test_the_image_runs_as_a_user_that_is_a_number_and_no_root():
    assert re.fullmatch("[1-9][0-9]{3,}:[1-9][0-9]{3,}", IMAGE.last("USER"))
    uid, gid = IMAGE.last("USER").split(":")
    assert f"--uid {uid} --gid {gid}" in IMAGE.last("RUN")
    words = [word for word, _ in IMAGE.steps]
    assert {"RUN", "COPY"}.isdisjoint(words[words.index("USER") :])


def test_the_program_is_process_1_and_gets_the_signal_that_drains_it():
    assert json.loads(IMAGE.last("ENTRYPOINT")) == ["nodepass"]
    assert IMAGE.last("STOPSIGNAL") == "SIGTERM"


def test_only_the_tunnel_port_and_the_public_port_are_exposed():
    assert IMAGE.last("EXPOSE").split() == ["10101/tcp", "8080/tcp", "8080/udp"]
    assert COMPOSE["services"]["server"]["ports"] == ["10101:10101/tcp", "8080:8080/tcp", "8080:8080/udp"]
    (server,) = parsed("server").configs
    assert (server.tunnel.port, server.target.port) == (10101, 8080)
    assert not any("ports" in COMPOSE["services"][name] for name in ("client", "service"))


def test_no_layer_has_anything_to_hide():
    copies = [rest for stage in STAGES for rest in stage.all("COPY")]
    assert copies == [". .", "--from=build /opt/nodepass /opt/nodepass"]
    assert not [word for stage in STAGES for word, _ in stage.steps if word in ("ADD", "ARG")]
    files = context()
    assert not [path for path in files if re.search(r"\.(key|pem|token|env)$|^tests|^\.|cache", path)]
    assert "nodepass_gevent/cli.py" in files and "setup.cfg" in files


def test_the_log_goes_to_standard_output():
    assert {parsed(name).process.log_to for name in TUNNELS} == {"stdout"}


def test_a_wheel_is_built_from_what_an_engine_is_sent(tmp_path):
    copy_context(tmp_path / "context")
    argv = [sys.executable, "-m", "pip", "wheel", "--use-pep517", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*argv, str(tmp_path / "context")], check=True, capture_output=True, timeout=110)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"nodepass_gevent/{path.name}" for path in (ROOT / "nodepass_gevent").glob("*.py")}
    assert modules <= set(names) and any(name.endswith("/entry_points.txt") for name in names)


def test_the_health_check_says_how_the_process_is():
    limits, command = IMAGE.health
    assert command == ["nodepass", "health"] and limits["timeout"] == "15s"  # an answer may take 10
    assert IMAGE.environ["NODEPASS_STATUS"] == "127.0.0.1:9100"
    environ = {"NODEPASS_STATUS": f"127.0.0.1:{free_port()}"}
    argv = [sys.executable, "-m", "nodepass_gevent"]

    def health():
        return subprocess.run([*argv, *command[1:]], env={**os.environ, **environ}, timeout=60).returncode

    assert health() == 1
    with Process([*argv, f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port('both')}"], env=environ) as process:
        wait_until(lambda: health() == 0, START_S, "healthy")
        assert process.stop() == 0
    assert health() == 1


# compose.yaml


def test_what_compose_runs_is_known_to_it():
    assert set(COMPOSE) == {"name", "x-tunnel", "services", "networks", "secrets"}
    assert set(COMPOSE["services"]) == {"server", "client", "service"}
    known = {
        "image",
        "build",
        "command",
        "entrypoint",
        "init",
        "restart",
        "stop_grace_period",
        "healthcheck",
        "logging",
    }
    known |= {"read_only", "cap_drop", "security_opt", "secrets", "ports", "networks"}
    for service in COMPOSE["services"].values():
        assert service.keys() <= known
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


@pytest.mark.parametrize("name", ["server", "client", "service"])
def test_each_service_may_do_as_little_as_can_be(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["restart"] == "unless-stopped"
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"user", "privileged", "network_mode", "environment"} & service.keys()


def test_the_service_is_reached_through_the_tunnel_alone():
    networks = {name: service["networks"] for name, service in COMPOSE["services"].items()}
    assert networks == {"server": ["tunnel"], "client": ["tunnel", "private"], "service": ["private"]}
    assert COMPOSE["networks"]["private"] == {"internal": True}


@pytest.mark.parametrize("name", list(TUNNELS))
def test_a_stop_leaves_time_to_drain(name):
    (config,) = parsed(name).configs
    assert float(TUNNELS[name]["stop_grace_period"].rstrip("s")) > config.shutdown_timeout_s + config.leave_s


@pytest.mark.parametrize("name", list(TUNNELS))
def test_the_key_is_a_secret_file(name, tmp_path):
    (config,) = parsed(name).configs
    (secret,) = TUNNELS[name]["secrets"]
    assert config.tunnel_key_file == f"/run/secrets/{secret}" and not config.tunnel_key
    assert COMPOSE["secrets"] == {secret: {"file": "./tunnel.key"}}
    assert is_ignored("tunnel.key", (ROOT / ".dockerignore").read_text().splitlines()[1:])


def test_the_client_calls_the_server_and_the_service_by_their_names():
    (server,), (client,) = parsed("server").configs, parsed("client").configs
    assert (client.tunnel.host, client.tunnel.port) == ("server", server.tunnel.port)
    assert (client.target.host, str(client.target.port)) == ("service", COMPOSE["services"]["service"]["entrypoint"][3])
    assert client.tls == server.tls == 1
