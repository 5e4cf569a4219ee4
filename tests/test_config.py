import dataclasses

import pytest

from nodepass_gevent.config import Address, Config, Limits, setting_name, setting_text
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.tunnel_key import parse_key
from nodepass_gevent.values import Networks, Pins

PIN = Pins((bytes(32),))
TUNNEL, TARGET = Address("", 10101), Address("127.0.0.1", 8080)


def server(**values):
    return Config(role="server", tunnel=TUNNEL, target=TARGET, **values)


def of_server(field, value, **values):
    """Set one field, which may be a limit."""
    return server(**({"limits": Limits(**{field: value})} if hasattr(Limits, field) else {field: value}), **values)


def client(**values):
    return Config(role="client", tunnel=TUNNEL, target=TARGET, **values)


def test_the_defaults_are_those_of_the_original():
    config = server()
    texts = {setting_name(each.name): getattr(config, each.name) for each in dataclasses.fields(config)}
    for name in ("role", "tunnel", "target", "limits", "sources"):
        del texts[name]
    assert texts == {
        "name": "",
        "log": "info",
        "access-log": "debug",
        "tls": 0,
        "crt": None,
        "key": None,
        "ca": None,
        "sni": None,
        "pin": None,
        "tunnel-key": None,
        "tunnel-key-file": None,
        "tunnel-name": None,
        "allow-users": None,
        "deny-users": None,
        "allow-clients": None,
        "deny-clients": None,
        "data-port": None,
        "reuse-port": 0,
        "network": "both",
        "protocol": "auto",
        "proxy-protocol": 0,
        "semaphore-limit": 1024,
        "min-pool-capacity": 16,
        "max-pool-capacity": 1024,
        "udp-data-buf-size": 8192,
        "udp-read-timeout": 5,
        "report-interval": 5,
        "reload-interval": 3600,
        "service-cooldown": 5,
        "shutdown-timeout": 5,
    }


def test_a_config_cannot_be_changed_but_replaced():
    config = server()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tls = 1
    short = dataclasses.replace(config, limits=dataclasses.replace(config.limits, pool_wait_s=0.1))
    assert short.limits == Limits(pool_wait_s=0.1)
    assert short.value("pool_wait_s") == 0.1
    assert short != config


def test_two_configs_from_different_sources_are_equal():
    assert server(sources={"tls": "default"}) == server(sources={"tls": "URL query"})


def test_a_config_names_its_tunnel_by_a_url():
    assert client().url == "client://:10101/127.0.0.1:8080"


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("semaphore_limit", 1, 1048576),
        ("data_port", 1, 65535),
        ("udp_data_buf_size", 1, 65507),
        ("udp_read_timeout_s", 0.001, 86400),
        ("report_interval_s", 0.01, 3600),
        ("reload_interval_s", 0.01, 31536000),
        ("service_cooldown_s", 0.001, 86400),
        ("shutdown_timeout_s", 0, 86400),
        ("connect_timeout_s", 0.001, 86400),
        ("target_timeout_s", 0.001, 86400),
        ("first_line_timeout_s", 0.001, 86400),
        ("opening_timeout_s", 0.001, 86400),
        ("caller_timeout_s", 0.001, 86400),
        ("tls_handshake_timeout_s", 0.001, 86400),
        ("id_timeout_s", 0.001, 86400),
        ("pool_wait_s", 0.001, 86400),
        ("half_closed_timeout_s", 0.001, 86400),
        ("idle_timeout_s", 0, 31536000),
        ("udp_session_timeout_s", 0.001, 86400),
        ("drain_linger_s", 0.001, 86400),
        ("dead_intervals", 1, 1000),
        ("dead_timeout_s", 0.001, 86400),
        ("callers", 1, 65536),
        ("users_per_address", 0, 1048576),
        ("udp_rate_per_address", 0, 1048576),
        ("penalty_after", 0, 1000),
        ("descriptor_reserve", 0, 65536),
        ("keepalive_idle_s", 1, 32767),
        ("keepalive_interval_s", 1, 32767),
        ("keepalive_count", 1, 127),
        ("tcp_user_timeout_s", 0.001, 86400),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_source_and_the_range(field, least, most):
    name = setting_name(field)
    for value in (least, most):
        assert of_server(field, value).value(field) == value
    for value in (least - 0.0005 if field.endswith("_s") else least - 1, most + 1):
        with pytest.raises(ConfigError) as caught:
            of_server(field, value, sources={name: "environment variable X"})
        allowed = f"{setting_text(field, least)} to {setting_text(field, most)}"
        value_text = setting_text(field, value)
        assert str(caught.value) == f"{name}: '{value_text}' is not within {allowed} [from environment variable X]"


@pytest.mark.parametrize(("first", "longest"), [("penalty", "10m0s"), ("accept-pause", "1s")])
def test_a_first_time_above_the_longest_names_both_sources(first, longest):
    field = {"penalty": "penalty_first_s", "accept-pause": "accept_pause_s"}[first]
    with pytest.raises(ConfigError) as caught:
        server(limits=Limits(**{field: 3600}), sources={setting_name(field): "URL query"})
    assert str(caught.value) == (
        f"{setting_name(field)}: '1h0m0s' is above {first}-longest, {longest} (from default) [from URL query]"
    )


@pytest.mark.parametrize("field", ["keepalive_idle_s", "keepalive_interval_s"])
def test_a_keepalive_is_in_whole_seconds(field):
    with pytest.raises(ConfigError) as caught:
        of_server(field, 1.5)
    assert str(caught.value) == f"{setting_name(field)}: '1.5s' is not a whole number of seconds [from default]"


def test_the_default_limits_are_those_of_the_protocol():
    assert dataclasses.asdict(Limits()) == {
        "connect_timeout_s": 5,
        "target_timeout_s": 5,
        "first_line_timeout_s": 30,
        "opening_timeout_s": 5,
        "caller_timeout_s": 10,
        "tls_handshake_timeout_s": 5,
        "authentication_timeout_s": 5,
        "takeover_timeout_s": 2,
        "id_timeout_s": 10,
        "pool_wait_s": 10,
        "half_closed_timeout_s": 60,
        "idle_timeout_s": 0,
        "udp_session_timeout_s": 60,
        "drain_linger_s": 2,
        "dead_intervals": 3,
        "dead_timeout_s": 15,
        "callers": 64,
        "users_per_address": 0,
        "udp_rate_per_address": 0,
        "penalty_after": 3,
        "penalty_first_s": 5,
        "penalty_longest_s": 600,
        "accept_pause_s": 0.05,
        "accept_pause_longest_s": 1,
        "descriptor_reserve": 16,
        "keepalive_idle_s": 20,
        "keepalive_interval_s": 8,
        "keepalive_count": 3,
        "tcp_user_timeout_s": 20,
    }


@pytest.mark.parametrize(("least", "most"), [(0, 1), (1, 65537), (65537, 65537), (17, 16)])
def test_pool_capacities_stay_within_65536_and_in_order(least, most):
    with pytest.raises(ConfigError, match="pool-capacity"):
        server(min_pool_capacity=least, max_pool_capacity=most)
    assert server(min_pool_capacity=65536, max_pool_capacity=65536)


def test_a_pool_minimum_above_the_maximum_names_both_sources():
    with pytest.raises(ConfigError) as caught:
        server(max_pool_capacity=8, sources={"max-pool-capacity": "URL query"})
    assert str(caught.value) == (
        "min-pool-capacity: '16' is above max-pool-capacity, 8 (from URL query) [from default]"
    )


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("log", "inf", "log: 'inf' is not one of debug, info, warn, error, fatal (did you mean 'info'?)"),
        ("log", "INFO", "log: 'INFO' is not one of debug, info, warn, error, fatal (did you mean 'info'?)"),
        ("log", "verbose", "log: 'verbose' is not one of debug, info, warn, error, fatal"),
        ("tls", 3, "tls: '3' is not one of 0, 1, 2"),
        ("tls", -1, "tls: '-1' is not one of 0, 1, 2"),
        ("network", "", "network: '' is not one of tcp, udp, both"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_choices(field, value, text):
    with pytest.raises(ConfigError) as caught:
        server(**{field: value})
    assert str(caught.value) == f"{text} [from default]"


def test_a_third_role_is_refused():
    with pytest.raises(ConfigError, match="role: 'master' is not one of server, client"):
        Config(role="master", tunnel=TUNNEL, target=TARGET)


@pytest.mark.parametrize("values", [{"crt": "a"}, {"key": "a"}, {"crt": "a", "tls": 2}, {"key": "a", "tls": 1}])
def test_certificate_and_key_come_together(values):
    with pytest.raises(ConfigError, match="give both crt and key"):
        server(**values)


def test_tls_2_needs_a_certificate_on_the_server_only():
    with pytest.raises(ConfigError, match="tls: '2' needs crt and key"):
        server(tls=2)
    assert server(tls=2, crt="a", key="b").tls == 2
    assert client(tls=2).tls == 2


def test_the_header_for_the_target_belongs_to_the_client():
    assert client(proxy_protocol=2).proxy_protocol == 2
    with pytest.raises(ConfigError, match="proxy-protocol: '2' belongs to the client"):
        server(proxy_protocol=2)
    with pytest.raises(ConfigError, match="is not one of 0, 1, 2"):
        client(proxy_protocol=3)


NETWORKS = Networks.parse("10.0.0.0/8")


@pytest.mark.parametrize(
    "values",
    [
        {"data_port": 1},
        {"reuse_port": 1},
        *({name: NETWORKS} for name in ("allow_users", "deny_users", "allow_clients", "deny_clients")),
    ],
)
def test_what_belongs_to_the_server_is_refused_for_a_client(values):
    assert server(**values)
    with pytest.raises(ConfigError, match="belongs to the server"):
        client(**values)


@pytest.mark.parametrize("values", [{"sni": "a.example"}, {"pin": PIN}])
def test_what_belongs_to_the_client_is_refused_for_a_server(values):
    assert client(**values)
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name}: '.*' belongs to the client; a server has none"):
        server(tls=1, **values)


def test_authorities_of_clients_need_tls_on_the_server():
    assert server(tls=1, ca="a").ca == client(ca="a").ca == "a"
    with pytest.raises(ConfigError, match=r"^ca: 'a' demands certificates of clients, and needs tls; allowed"):
        server(ca="a")


@pytest.mark.parametrize("name", ["a.example", "A_b.example.", "127.0.0.1", "::1", "2001:db8::1"])
def test_the_expected_name_is_a_host(name):
    assert client(sni=name).sni == name


@pytest.mark.parametrize("name", ["", "a b", "a..b", "-a", "[::1]", "1.2.3", "a:1", "\u00e9.example", "a" * 300])
def test_what_is_no_host_is_no_expected_name(name):
    with pytest.raises(ConfigError, match=r"^sni: '.*' is neither a name"):
        client(sni=name)


@pytest.mark.parametrize(
    ("values", "demanded"),
    [
        ({}, (0, "tls=0")),
        ({"tls": 1}, (1, "tls=1")),
        ({"pin": PIN}, (1, "pin")),
        ({"tls": 2, "pin": PIN, "ca": "a"}, (2, "tls=2")),
        ({"tls": 1, "ca": "a"}, (2, "ca")),
        ({"sni": "a.example", "pin": PIN}, (2, "sni")),
        ({"crt": "a", "key": "b"}, (1, "crt")),
        ({"tunnel_key_file": "f"}, (1, "tunnel-key-file")),
    ],
)
def test_a_check_demands_the_mode_in_which_it_is_made(values, demanded):
    assert client(**values).tls_demanded == demanded


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0"])
def test_a_client_cannot_call_every_address(host):
    with pytest.raises(ConfigError) as caught:
        Config(role="client", tunnel=Address(host, 1), target=TARGET)
    assert str(caught.value).endswith(f" calls {host}, which is no address to call: name the server [from default]")
    assert Config(role="client", tunnel=Address("", 1), target=Address(host, 80))
    assert Config(role="server", tunnel=Address(host, 1), target=TARGET)


KEY = parse_key("np1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ca": "a"}, "ca: 'a' needs tls=2,"),
        ({"sni": "a.example"}, "sni: 'a.example' needs tls=2,"),
        ({"pin": PIN}, f"pin: '{PIN}' needs tls=1 or tls=2,"),
        ({"crt": "a", "key": "b"}, "crt: 'a' needs tls=1 or tls=2,"),
        ({"tunnel_key_file": "f"}, "tunnel-key-file: 'f' needs tls=1 or tls=2,"),
        ({"tunnel_key": KEY}, "tunnel-key: '***' needs tls=1 or tls=2,"),
    ],
)
def test_a_client_that_demands_tls_and_is_told_to_take_none_is_refused(values, text):
    assert client(**values).tls == 0  # not told: the demand counts
    sources = {"tls": "file f:2", **{setting_name(name): "URL query" for name in values}}
    with pytest.raises(ConfigError) as caught:
        client(tls=0, **values, sources=sources)
    assert str(caught.value) == f"{text} and tls is 0 (from file f:2) [from URL query]"
    assert client(tls=1, **values, sources=sources)


@pytest.mark.parametrize(("tunnel", "target"), [(0, 80), (80, 0)])
def test_port_0_is_for_listeners_only(tunnel, target):
    addresses = {"tunnel": Address("h", tunnel), "target": Address("h", target)}
    assert Config(role="server", **addresses)
    with pytest.raises(ConfigError, match="a client needs ports from 1 to 65535"):
        Config(role="client", **addresses)


@pytest.mark.parametrize(("tunnel", "target"), [(0, 80), (80, 0)])
def test_shared_ports_are_named(tunnel, target):
    addresses = {"tunnel": Address("h", tunnel), "target": Address("h", target)}
    with pytest.raises(ConfigError, match=r"^reuse-port: '1' shares ports that are named"):
        Config(role="server", reuse_port=1, **addresses)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"tls": 1, "tunnel_key_file": "f"}, "with a tunnel key"), ({"protocol": "2"}, "with protocol=2")],
)
def test_a_data_port_is_for_v1_clients_and_for_a_process_that_shares_its_ports(settings, why):
    assert server(reuse_port=1, data_port=10102, **settings).data_port == 10102
    with pytest.raises(ConfigError, match=rf"^data-port: '10102' is for clients of profile v1, and {why} none is"):
        server(data_port=10102, **settings)


def test_a_port_cannot_be_listened_on_twice():
    with pytest.raises(ConfigError, match="data-port: '10101' is the tunnel port already"):
        server(data_port=10101)
    with pytest.raises(ConfigError, match="must differ"):
        Config(role="server", tunnel=TUNNEL, target=TUNNEL)
    assert Config(role="server", tunnel=TUNNEL, target=TUNNEL, network="udp")
    assert Config(role="server", tunnel=Address("", 0), target=Address("", 0))
