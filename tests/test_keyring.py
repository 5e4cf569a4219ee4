"""Where keys come from: the setting, and the file with its permissions, its two lines, its reload."""

import logging
import os
import time
from unittest.mock import Mock

import gevent
import pytest
from support import BOUND_S, LOOPBACK, bounded, out_of_descriptors, wait_until

from nodepass_gevent import keyring
from nodepass_gevent.config import Config
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.keyring import KeyRing, read_keys
from nodepass_gevent.tunnel_key import derive, format_key, parse_key

OLD, NEW = format_key(b"o" * 32), format_key(b"n" * 32)
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def file(tmp_path):
    """Write a key file; give the path."""

    def write(text, mode=0o600):
        path = tmp_path / "tunnel.key"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return str(path)

    return write


def config(**settings):
    return Config(**{"role": "server", "tunnel": LOOPBACK, "target": LOOPBACK, "network": "tcp", "tls": 1} | settings)


def roots(*texts, name=""):
    return tuple(derive(parse_key(text), name) for text in texts)


def test_without_a_key_the_ring_is_empty():
    assert KeyRing(config()).roots == ()


def test_a_key_comes_from_the_setting_or_from_the_file(file):
    assert KeyRing(config(tunnel_key=parse_key(NEW))).roots == roots(NEW)
    assert KeyRing(config(tunnel_key_file=file(NEW + "\n"))).roots == roots(NEW)
    assert KeyRing(config(tunnel_key_file=file(PASSPHRASE), tunnel_name="a")).roots == roots(PASSPHRASE, name="a")


def test_a_file_holds_two_keys_and_the_first_one_proves(file):
    path = file(f"\ufeff# since May\r\n\r\n  {NEW}  \r\n\t# before\n\t{OLD}")
    assert KeyRing(config(tunnel_key_file=path)).roots == roots(NEW, OLD)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no keys; it needs one, or two"),
        ("# only a comment\n\n", "holds no keys"),
        (f"{NEW}\n{OLD}\n{NEW}\n", "holds 3 keys"),
        (f"# new\n{NEW}\ns3cret\n", "line 3: a passphrase has 16"),
        ("np1:s3cret\n", "line 1: np1: is not followed by a key"),
        (b"\xff" * 40, "is not UTF-8 text"),
        (b"\x00" * 40, "line 1: the passphrase holds control characters"),
        ("#" * 9000 + "\n" + NEW, "is larger than 8192 bytes"),
    ],
)
def test_a_file_that_holds_no_key_is_refused_in_one_line(file, text, why):
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(config(tunnel_key_file=path, sources={"tunnel-key-file": "URL query"}))
    assert str(caught.value).startswith(f"tunnel-key-file: '{path}' {why}")
    assert str(caught.value).endswith("[from URL query]")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o444])
def test_a_file_that_others_may_use_is_refused(file, mode):
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}: others may use it; chmod 600"):
        read_keys(config(tunnel_key_file=file(NEW, mode)))


def test_a_file_may_be_as_large_as_is_read(file):
    text = f"{NEW}\n#"
    assert read_keys(config(tunnel_key_file=file(text.ljust(keyring.MAX_FILE, "#"))))


def test_a_file_may_be_for_reading_only(file):
    assert read_keys(config(tunnel_key_file=file(NEW, 0o400)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of others")
@pytest.mark.parametrize(("owner", "group", "allowed"), [(0, 0, True), (0, 12345, False), (12345, 0, False)])
def test_a_credential_of_systemd_shows_as_readable_by_group_root(file, owner, group, allowed):
    path = file(NEW, 0o440)
    os.chown(path, owner, group)
    if allowed:
        assert read_keys(config(tunnel_key_file=path))
    else:
        with pytest.raises(ConfigError, match=r"has mode 0440|belongs to user 12345"):
            read_keys(config(tunnel_key_file=path))


@pytest.mark.parametrize(("owner", "allowed"), [(0, True), (1000, False)])
def test_the_file_belongs_to_us_or_to_root(file, monkeypatch, owner, allowed):
    path = file(NEW)
    fstat = os.fstat

    def as_of(descriptor):
        fields = list(fstat(descriptor))
        fields[4] = owner
        return os.stat_result(fields)

    monkeypatch.setattr(keyring.os, "fstat", as_of)
    monkeypatch.setattr(keyring.os, "geteuid", lambda: 1001)
    if allowed:
        assert read_keys(config(tunnel_key_file=path))
        return
    with pytest.raises(ConfigError, match="belongs to user 1000; it must be ours, or root's"):
        read_keys(config(tunnel_key_file=path))


def test_what_is_no_file_is_refused_and_waited_for_by_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with bounded(5):
        for name, why in (("", "directory"), ("pipe", "is not a regular file"), ("none", "no such file or directory")):
            with pytest.raises(ConfigError, match=why):
                read_keys(config(tunnel_key_file=str(tmp_path / name)))


# Reload


def test_a_changed_file_is_read_again(file, caplog):
    ring = KeyRing(config(tunnel_key_file=file(OLD)))
    file(f"{NEW}\n{OLD}")
    with caplog.at_level(logging.INFO):
        ring.reload()
    assert ring.roots == roots(NEW, OLD)
    assert caplog.records[0].getMessage().startswith("tunnel key: 2 read from '")
    assert NEW not in caplog.text and OLD not in caplog.text


@pytest.mark.parametrize(("text", "mode"), [("", 0o600), ("np1:half", 0o600), (NEW, 0o644)])
def test_a_bad_file_leaves_the_old_key_in_use_and_is_said_once(file, caplog, text, mode):
    ring = KeyRing(config(tunnel_key_file=file(OLD)))
    file(text, mode)
    ring.reload()
    ring.reload()
    assert ring.roots == roots(OLD)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("tunnel key not reloaded, the old one stays in use: tunnel-key-file: ")
    file(NEW)
    ring.reload()
    assert ring.roots == roots(NEW)


def test_a_file_that_is_gone_leaves_the_old_key_in_use(file, caplog):
    path = file(OLD)
    ring = KeyRing(config(tunnel_key_file=path))
    os.unlink(path)
    ring.reload()
    assert ring.roots == roots(OLD) and "no such file" in caplog.text


def test_a_file_for_which_there_is_no_descriptor_is_read_the_next_time(file, caplog):
    ring = KeyRing(config(tunnel_key_file=file(OLD)))
    file(NEW)
    with out_of_descriptors():
        ring.reload()
    assert ring.roots == roots(OLD) and "too many open files" in caplog.text
    ring.reload()
    assert ring.roots == roots(NEW)


def test_a_passphrase_for_which_there_is_no_thread_is_stretched_the_next_time(file, monkeypatch):
    ring = KeyRing(config(tunnel_key_file=file(OLD)))
    file(NEW)
    with monkeypatch.context() as patch:
        patch.setattr(keyring, "_derive_aside", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            ring.reload()
    ring.reload()
    assert ring.roots == roots(NEW)


def test_corrected_permissions_are_noticed(file, caplog):
    path = file(OLD)
    ring = KeyRing(config(tunnel_key_file=path))
    file(NEW, 0o644)
    ring.reload()
    os.chmod(path, 0o600)
    ring.reload()
    assert ring.roots == roots(NEW)


def test_nobody_waits_while_a_passphrase_is_stretched_again(file, monkeypatch):
    ring = KeyRing(config(tunnel_key_file=file(OLD)))
    derive_now, enough = keyring._derive, gevent.monkey.get_original("_thread", "allocate_lock")()
    enough.acquire()
    monkeypatch.setattr(keyring, "_derive", lambda *args: enough.acquire(timeout=BOUND_S / 2) and derive_now(*args))
    file(PASSPHRASE)
    reloading = gevent.spawn(ring.reload)
    turns = 0
    with bounded():
        while not reloading.ready():
            gevent.sleep(0.005)
            turns += 1
            if turns == 10:
                enough.release()
    assert turns >= 10 and ring.roots == roots(PASSPHRASE)


def time_passes():
    """Hold the thread, whichever it is, for 0.2 s: what scrypt does on a slow machine."""
    gevent.monkey.get_original("time", "sleep")(0.2)


def test_of_two_reloads_at_once_the_later_one_counts(file, monkeypatch):
    ring = KeyRing(config(tunnel_key_file=file(OLD)))
    derive_now, first = keyring._derive, []

    def first_is_slow(*args):
        if not first:
            first.append(True)
            time_passes()
        return derive_now(*args)

    monkeypatch.setattr(keyring, "_derive", first_is_slow)
    file(PASSPHRASE)
    slow = gevent.spawn(ring.reload)
    wait_until(lambda: first)
    file(NEW)
    ring.reload()
    assert ring.roots == roots(NEW)
    slow.join(5)
    assert ring.roots == roots(NEW)


def test_scrypt_runs_once_per_start(file, monkeypatch):
    calls = []
    monkeypatch.setattr(keyring, "derive", lambda *args: calls.append(args) or derive(*args))
    ring = KeyRing(config(tunnel_key_file=file(f"{PASSPHRASE}\n{PASSPHRASE} 2")))
    started = time.monotonic()
    for _ in range(100):
        assert ring.roots
    ring.reload()
    assert len(calls) == 2 and time.monotonic() - started < 1
