import datetime
import json
import os
import socket
from types import SimpleNamespace

import gevent
import pytest
from authority import ANY, CLIENT, make_authority, write_authorities
from authority import SERVER as SERVING
from gevent import monkey

from nodepass_gevent import check as checks
from nodepass_gevent import options
from nodepass_gevent.check import ERROR, OK, WARNING, Finding, check, report

NOT_OURS = ", which is no address of this machine; for all that it has, give only :{}"
SERVER = "server://127.0.0.1:{}/127.0.0.1:{}"


@pytest.fixture
def ports():
    """Give two ports that are free for TCP and UDP."""
    with socket.socket() as one, socket.socket() as two:
        for sock in (one, two):
            sock.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def levels(findings):
    return [finding.level for finding in findings]


def worst(findings):
    """Give what is no "ok"."""
    return [finding for finding in findings if finding.level != OK]


def test_a_sound_server_has_all_its_ports_looked_at(ports):
    found = check([SERVER.format(*ports)], {})
    assert [finding.text for finding in found] == [
        f"settings of {SERVER.format(*ports)}",
        f"tunnel port: 127.0.0.1:{ports[0]} is free",
        f"public port, TCP: 127.0.0.1:{ports[1]} is free",
        f"public port, UDP: 127.0.0.1:{ports[1]} is free",
        "open files: enough",
    ]
    assert set(levels(found)) == {OK}


def test_a_client_has_its_names_resolved():
    found = check(["client://localhost:1/nowhere.invalid:2"], {})
    assert levels(found) == [OK, OK, WARNING, OK]
    assert found[1].text.startswith("tunnel localhost:1 resolves to ") and "127.0.0.1:1" in found[1].text
    assert found[1].text.endswith("; it was not called")
    assert found[2].text.startswith("target nowhere.invalid:2: resolve nowhere.invalid: ")


def test_a_name_to_listen_at_that_is_not_there_is_a_warning():
    found = worst(check(["server://nowhere.invalid:1/127.0.0.1:0"], {}))
    assert levels(found) == [WARNING]
    assert found[0].text.startswith("tunnel port: resolve nowhere.invalid: ")


def test_a_wrong_setting_is_found():
    (finding,) = check([SERVER.format(1, 2), "--tls", "3"], {})
    assert finding == Finding(ERROR, "", "tls: '3' is not one of 0, 1, 2 [from command line]")


@pytest.mark.parametrize("path", ["no/such/directory/x.log", ""])
def test_a_log_file_that_cannot_be_opened_is_found_and_none_is_made(ports, tmp_path, path):
    server = SERVER.format(*ports)
    (finding,) = worst(check([server, "--log-to", str(tmp_path / path)], {}))
    assert finding.level == ERROR and finding.text.startswith("log-to: ") and "cannot be opened: " in finding.text
    assert not worst(check([server, "--log-to", str(tmp_path / "x.log")], {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "why"), [(os.ST_RDONLY, "read-only file system"), (0, "permission denied")])
def test_a_log_file_that_cannot_be_written_is_found_for_its_reason(ports, tmp_path, monkeypatch, flags, why):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    (finding,) = worst(check([SERVER.format(*ports), "--log-to", str(tmp_path / "x.log")], {}))
    assert finding.level == ERROR and f"cannot be opened: {why} [from " in finding.text


def test_a_token_of_the_status_that_cannot_be_used_is_found(ports, tmp_path):
    path = tmp_path / "token"
    argv = [SERVER.format(*ports), "--status", "127.0.0.1:0", "--status-token-file", str(path)]
    (finding,) = worst(check(argv, {}))
    assert finding.level == ERROR and "cannot be read: no such file" in finding.text
    path.touch(0o600)
    path.write_text("0123456789abcdef")
    assert not worst(check(argv, {}))


def test_the_reader_of_a_pipe_for_the_log_sees_no_end_of_it(ports, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    waiting = monkey.get_original("select", "poll")()  # gevent's own tells no hang-up
    waiting.register(reader)
    assert not worst(check([SERVER.format(*ports), "--log-to", str(tmp_path / "pipe")], {}))
    gevent.idle()  # what is closed is closed by now
    assert not waiting.poll(0)
    os.closerange(reader, reader + 1)  # at once: the next test counts descriptors, and gevent's own close comes later


def test_a_status_address_that_is_taken_or_not_of_this_machine_is_found(ports, tmp_path):
    server, token = SERVER.format(*ports), tmp_path / "token"
    token.touch(0o600)
    token.write_text("a-token-of-some-length")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (finding,) = worst(check([server, "--status", f"127.0.0.1:{taken.getsockname()[1]}"], {}))
    assert finding.level == WARNING and finding.text.startswith("status: address already in use: 127.0.0.1:")
    (finding,) = worst(check([server, "--status", "192.0.2.9:80", "--status-token-file", str(token)], {}))
    assert finding == Finding(ERROR, "", f"status: cannot assign requested address: 192.0.2.9:80{NOT_OURS.format(80)}")


def test_no_tunnel_is_an_error():
    assert levels(check([], {})) == [ERROR]


def test_a_taken_port_is_a_warning_as_the_service_itself_may_have_it(ports):
    with socket.create_server(("127.0.0.1", ports[0])):
        (finding,) = worst(check([SERVER.format(*ports), "--network", "tcp"], {}))
    assert finding.level == WARNING
    assert finding.text.startswith(f"tunnel port: address already in use: 127.0.0.1:{ports[0]}; fine if")


def test_a_port_that_two_tunnels_ask_for_is_found(ports, tmp_path):
    path = tmp_path / "t.conf"
    one, two = (SERVER.format(*each) for each in (ports, (ports[1], 0)))
    path.write_text(f"network = tcp\n[tunnel a]\nurl = {one}\n[tunnel b]\nurl = {two}\n[tunnel c]\nurl = {two}\n")
    text = f"tunnel port: 127.0.0.1:{ports[1]} is asked for twice; first as the public port, TCP of [a]"
    assert [(each.level, each.tunnel, each.text) for each in worst(check(["--config", str(path)], {}))] == [
        (ERROR, "b", f"{text} [from file {path}:5]"),
        (ERROR, "c", f"{text} [from file {path}:7]"),
    ]


def test_a_port_that_is_asked_for_twice_is_not_called_free(ports, tmp_path):
    path = tmp_path / "t.conf"
    path.write_text(f"status = 127.0.0.1:{ports[1]}\nnetwork = tcp\n[tunnel a]\nurl = {SERVER.format(*ports)}\n")
    twice = f"127.0.0.1:{ports[1]} is asked for twice; first"
    assert [(each.level, each.text) for each in check(["--config", str(path)], {})[1:4]] == [
        (OK, f"tunnel port: 127.0.0.1:{ports[0]} is free"),
        (OK, f"public port, TCP: 127.0.0.1:{ports[1]} is free"),
        (ERROR, f"status: {twice} as the public port, TCP of [a] [from file {path}:1]"),
    ]
    path.write_text(path.read_text() + f"[tunnel b]\nurl = {SERVER.format(*ports)}\n")
    free = [each for each in check(["--config", str(path)], {}) if each.tunnel == "b" and "is free" in each.text]
    assert free == []


def test_an_address_of_another_machine_cannot_be_bound(ports):
    (finding,) = worst(check([f"server://192.0.2.1:{ports[0]}/127.0.0.1:{ports[1]}"], {}))
    assert finding == Finding(
        ERROR, "", f"tunnel port: cannot assign requested address: 192.0.2.1:{ports[0]}{NOT_OURS.format(ports[0])}"
    )


@pytest.mark.parametrize(
    ("days", "level", "text"),
    [
        (-1, ERROR, "crt: the certificate expired on "),
        (13, WARNING, "crt: the certificate expires on "),
        (15, OK, "certificate, valid until "),
    ],
)
def test_the_expiry_of_a_certificate_is_looked_at(tmp_path, ports, days, level, text):
    files = make_authority().issue("localhost", days=(-3, days)).write(tmp_path)
    found = check([SERVER.format(*ports), "--tls", "2", "--crt", files["crt"], "--key", files["key"]], {})
    (finding,) = [finding for finding in found if "certificate" in finding.text]
    assert (finding.level, finding.text[: len(text)]) == (level, text)
    day = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    assert str(day.date()) in finding.text


@pytest.mark.parametrize("mode", ["1", "2"])
def test_a_certificate_that_is_not_valid_yet_is_an_error(tmp_path, ports, mode):
    files = make_authority().issue("localhost", days=(5, 30)).write(tmp_path)
    found = check([SERVER.format(*ports), "--tls", mode, "--crt", files["crt"], "--key", files["key"]], {})
    day = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=5)
    text = f"crt: the certificate is not valid before {day.date()} [from command line]"
    assert [finding for finding in found if "certificate" in finding.text] == [Finding(ERROR, "", text)]


@pytest.mark.parametrize(
    ("names", "usage", "problems"),
    [
        ((), (SERVING,), ["names no host (no subjectAltName)"]),
        (("localhost",), (CLIENT,), ["is made for clients only (extended key usage)"]),
        ((), (ANY,), ["names no host (no subjectAltName)", "is not made for servers (extended key usage)"]),
        (("192.0.2.1",), (), []),
    ],
)
def test_a_certificate_that_clients_will_refuse_is_a_warning_where_they_verify_it(
    tmp_path, ports, names, usage, problems
):
    files = make_authority().issue(*names, usage=usage).write(tmp_path)
    for mode, expected in (("1", []), ("2", problems)):
        found = check([SERVER.format(*ports), "--tls", mode, "--crt", files["crt"], "--key", files["key"]], {})
        texts = [f"crt: the certificate {problem}: with tls=2 clients refuse it" for problem in expected]
        assert worst(found) == [Finding(WARNING, "", text) for text in texts]
        assert any(finding.text.startswith("certificate, valid until") for finding in found) is not bool(expected)


@pytest.mark.parametrize(("mode", "shown"), [(0o644, "0644"), (0o604, "0604"), (0o640, ""), (0o600, "")])
@pytest.mark.parametrize("role", ["server", "client"])
def test_a_private_key_that_others_can_read_is_a_warning_and_one_of_a_group_is_none(tmp_path, ports, role, mode, shown):
    files = make_authority().issue("localhost").write(tmp_path)
    os.chmod(files["key"], mode)
    url = SERVER.format(*ports).replace("server", role)
    found = worst(check([url, "--tls", "1", "--crt", files["crt"], "--key", files["key"]], {}))
    text = f"key: {files['key']!r} has mode {shown}: others may read it; chmod 600 keeps them out"
    assert found == [Finding(WARNING, "", text)] * bool(shown)


def test_a_clients_certificate_that_is_made_for_servers_is_a_warning(tmp_path):
    files = make_authority().issue(usage=(SERVING,)).write(tmp_path)
    found = check(["client://127.0.0.1:1/127.0.0.1:2", "--crt", files["crt"], "--key", files["key"]], {})
    text = "crt: the certificate is made for servers only (extended key usage): a server with ca refuses it"
    assert worst(found) == [Finding(WARNING, "", text)]


@pytest.mark.parametrize(("ends", "level"), [((-1, -1), ERROR), ((-1, 5), WARNING), ((5, 5), OK)])
def test_authorities_that_have_expired_are_found(tmp_path, ends, level):
    ca = write_authorities(tmp_path / "ca.pem", *(make_authority(days=(-3, end)) for end in ends))
    found = check(["client://127.0.0.1:1/127.0.0.1:2?tls=2", "--ca", ca], {})
    (finding,) = [finding for finding in found if "authorities" in finding.text]
    assert finding.level == level
    assert ("expired [from command line]" in finding.text) == (level != OK)


def test_a_key_that_does_not_fit_is_found_with_its_source(tmp_path, ports):
    authority = make_authority()
    one, two = authority.issue().write(tmp_path, "one"), authority.issue().write(tmp_path, "two")
    (finding,) = worst(check([SERVER.format(*ports), "--tls", "1", "--crt", one["crt"], "--key", two["key"]], {}))
    assert finding.level == ERROR and "does not fit" in finding.text and "[from command line]" in finding.text


def test_too_few_open_files_are_found(monkeypatch, ports):
    monkeypatch.setattr(checks.descriptors, "allowed", lambda: 300)
    found = worst(check([SERVER.format(*ports)], {}))
    assert levels(found) == [WARNING, WARNING] and found[0].text.startswith("open files: 300 are allowed")
    monkeypatch.setattr(checks.descriptors, "allowed", lambda: 30)
    assert levels(worst(check([SERVER.format(*ports)], {}))) == [ERROR]


def test_open_files_are_counted_as_a_run_counts_them_with_those_of_status(monkeypatch, ports):
    argv = [SERVER.format(*ports)]
    enough = checks.descriptors.plan(options.parse(argv, {}).configs, 1 << 20, 100).most
    monkeypatch.setattr(checks.descriptors, "allowed", lambda: enough)
    monkeypatch.setattr(checks.descriptors, "taken", lambda: 100)
    assert not worst(check(argv, {}))
    found = worst(check([*argv, "--status=127.0.0.1:0"], {}))
    assert set(levels(found)) == {WARNING} and found[0].text.startswith(f"open files: {enough} are allowed")


def test_the_mistake_of_one_tunnel_hides_none_of_another(tmp_path, ports):
    path = tmp_path / "nodepass.conf"
    path.write_text(
        f"[tunnel a]\nurl = {SERVER.format(*ports)}\ntls = 7\n"
        "[tunnel b]\nurl = client://localhost:1/localhost:2\n"
        "[tunnel c]\nurl = client://localhost:1/localhost:2\nlogg = info\n"
    )
    found = check(["--config", str(path)], {})
    assert [(finding.level, finding.tunnel) for finding in worst(found)] == [(ERROR, "a"), (ERROR, "c")]
    assert Finding(OK, "b", "settings of client://localhost:1/localhost:2") in found


def test_an_address_that_nobody_was_called_at_says_so(ports):
    found = check([f"client://127.0.0.1:{ports[0]}/[::1]:{ports[1]}"], {})
    assert [each.text for each in found[1:3]] == [
        f"tunnel 127.0.0.1:{ports[0]} resolves; it was not called",
        f"target [::1]:{ports[1]} resolves; it was not called",
    ]


def test_a_mistake_that_all_tunnels_share_is_told_once(tmp_path):
    path = tmp_path / "nodepass.conf"
    tunnels = "".join(f"[tunnel {name}]\nurl = client://localhost:1/localhost:2\n" for name in "abc")
    path.write_text(f"logg = info\n{tunnels}")
    assert check(["--config", str(path)], {}) == [
        Finding(ERROR, "", f"unknown key 'logg' (did you mean 'log'?) [from file {path}:1]")
    ]
    path.write_text(f"cert = x\nkey = y\n{tunnels}tls = 7\n")
    found = worst(check(["--config", str(path)], {}))
    assert found[0] == Finding(WARNING, "", f"cert is read as crt, which is its name [from file {path}:1]")
    assert found[1] == Finding(ERROR, "c", f"tls: '7' is not one of 0, 1, 2 [from file {path}:9]")


def test_a_file_that_cannot_be_read_is_one_error():
    (finding,) = check(["--config", "/nonexistent"], {})
    assert finding.level == ERROR and finding.text.startswith("config: cannot read the file")


def test_a_report_is_lines_or_json_and_sound_without_errors():
    findings = [Finding(OK, "web", "fine"), Finding(WARNING, "", "hm")]
    assert report(findings, as_json=False) == ("ok       [web] fine\nwarning  hm", True)
    text, sound = report([*findings, Finding(ERROR, "b", "no")], as_json=True)
    assert not sound
    assert json.loads(text) == {
        "ok": False,
        "findings": [
            {"level": "ok", "tunnel": "web", "text": "fine"},
            {"level": "warning", "tunnel": "", "text": "hm"},
            {"level": "error", "tunnel": "b", "text": "no"},
        ],
    }
