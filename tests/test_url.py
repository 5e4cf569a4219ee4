import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent.config import Address
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.url import MAX_URL, TunnelURL, parse_url

fuzz = settings(max_examples=300, deadline=None, database=None)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (
            "server://:10101/127.0.0.1:5432?tls=1",
            TunnelURL("server", Address("", 10101), Address("127.0.0.1", 5432), (("tls", "1"),)),
        ),
        (
            "server://0.0.0.0:10101/[::]:8080",
            TunnelURL("server", Address("0.0.0.0", 10101), Address("::", 8080), ()),
        ),
        (
            "client://localhost:10101/127.0.0.1:80",
            TunnelURL("client", Address("localhost", 10101), Address("127.0.0.1", 80), ()),
        ),
        (
            "client://[fe80::1%25eth0]:1/[fe80::2%eth1]:2",
            TunnelURL("client", Address("fe80::1%eth0", 1), Address("fe80::2%eth1", 2), ()),
        ),
        (
            "CLIENT://h:1/:2?a=&b&&c=x=y&a=1&",
            TunnelURL("client", Address("h", 1), Address("", 2), (("a", ""), ("b", ""), ("c", "x=y"), ("a", "1"))),
        ),
        (
            "server://:1/:2?crt=/a%20b%2Fc%c3%BC+d&key=?/@:",
            TunnelURL("server", Address("", 1), Address("", 2), (("crt", "/a b/c\u00fc+d"), ("key", "?/@:"))),
        ),
    ],
)
def test_a_url_is_split_into_its_parts(text, url):
    assert parse_url(text) == url


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no ://"),
        ("server:/:1/:2", "has no ://"),
        ("://:1/:2", "unknown scheme ''"),
        ("sever://:1/:2", "unknown scheme 'sever' (did you mean 'server'?)"),
        ("clint://:1/:2", "(did you mean 'client'?)"),
        ("http://:1/:2", "unknown scheme 'http'; allowed: server://<tunnel_addr>/<target_addr> or client://"),
        ("server://", "the target address is missing"),
        ("server://:1", "the target address is missing"),
        ("server://:1/", "the target address is missing"),
        ("server://:1?tls=1", "the target address is missing"),
        ("server:///:2", "the tunnel address '' has no port"),
        ("server://host/:2", "the tunnel address 'host' has no port"),
        ("server://:1/host", "the target address 'host' has no port"),
        ("server://:1/::1:80", "the target address '::1:80' has too many colons"),
        ("server://:1/:99999", "the port is not a number from 0 to 65535"),
        ("server://:1/:2/", "must not be followed by a path"),
        ("server://:1/:2/x", "must not be followed by a path"),
        ("client://h:1/http://127.0.0.1:80", "an address is host:port alone, without http://"),
        ("client://https://127.0.0.1:1/127.0.0.1:80", "an address is host:port alone, without https://"),
        ("server://:1/:2&tls=1", "settings begin with ?, not with &"),
        ("server://:1&tls=1/:2?log=debug", "settings begin with ?, not with &"),
        ("client://[fe80::1]:1/:2", "such as [fe80::1%eth0]"),
        ("server://:1/:2#x", "a fragment"),
        ("server://:1/:2?crt=a#x", "write # as %23"),
        ("server://:1/:2 ", "character 15 is ' '"),
        (" server://:1/:2", "character 1 is ' '"),
        ("server://:1/\t:2", r"character 13 is '\t'"),
        ("server://:1/:2\n", r"character 15 is '\n'"),
        ("server://:1/:2?log=\x00", r"character 20 is '\x00'"),
        ("server://:1/:2?log=\u2028", r"'\u2028'"),
        ("server://:1/:2?crt=\udcff", r"'\udcff'"),
        ("server://:1/:2?crt=%", "the value of 'crt' has a % without two hexadecimal digits"),
        ("server://:1/:2?crt=%zz", "write % as %25"),
        ("server://:1/:2?crt=%ff", "the value of 'crt' is not UTF-8 text"),
        ("server://:1/:2?" + "x" * MAX_URL, "longer than 8192 characters"),
    ],
)
def test_a_wrong_url_is_refused_with_the_reason(text, why):
    with pytest.raises(ConfigError) as caught:
        parse_url(text)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "server://s3%cret@:1/:2",
        "server://s3%ffcret@:1/:2",
        "server://s3@cret@host:1/:2",
        "server://s3cret@host/:2",
        "server://cret/s3?cret@host:1/:2",
        "server://cret?s3@host:1/:2",
        "server://:1/s3cret@host:2",
        "server://s3/cret@host:1/:2",
        "server://http://s3cret@host:1/:2",
        "server://s3://cret?@host:1/:2",
        "server://s3&cret@host/:2",
        "sever://s3cret@:1/:2",
        "s3cret@:1/:2",
        "server://s3cret@:1",
        "server://s3cret@:1/:2#x",
        "server://s3cret@:1/ :2",
    ],
)
def test_a_key_in_a_wrong_url_is_never_repeated(text):
    with pytest.raises(ConfigError) as caught:
        parse_url(text)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("client://np1:AA-_@h:1/:2", "np1:AA-_"),
        ("client://user:s3cret@h:1/:2", "user:s3cret"),
        ("client://a%2Fb%40c%3fd%20%c3%bc+@h:1/:2?log=a@b", "a/b@c?d \u00fc+"),
        ("client://h:1/:2?log=a@b", None),
    ],
)
def test_the_user_part_is_the_tunnel_key(text, key):
    url = parse_url(text)
    assert (url.tunnel, url.target, url.key) == (Address("h", 1), Address("", 2), key)
    assert key is None or key not in repr(url)


@pytest.mark.parametrize(
    "text", ["client://a/b@h:1/:2", "client://a@b@h:1/:2", "client://h:1/x@:2", "client://a?b@h:1/:2"]
)
def test_how_a_key_is_written_is_said(text):
    with pytest.raises(ConfigError, match="before the tunnel address; in it write / as %2F"):
        parse_url(text)


def test_an_empty_key_as_of_an_unset_shell_variable_is_refused():
    with pytest.raises(ConfigError, match="the tunnel key before @ is empty"):
        parse_url("client://@h:1/:2")


@fuzz
@given(st.text() | st.text("servclint:/?&=%#@[]0129. ").map("server://{}".format))
def test_any_text_is_a_url_or_a_config_error_of_one_line(text):
    try:
        parse_url(text)
    except ConfigError as exc:
        assert str(exc).isprintable()
