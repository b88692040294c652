"""The table of coturn's keys against the option tables of Debian's own binaries."""

import ipaddress
from pathlib import Path

import pytest
from pydantic import SecretStr

from callready.settings import coturn_keys
from callready.settings.coturn_keys import KEYS, check, knows, range_of

DATA = Path(__file__).parent / "data"
WHERE = "turn.pools.calls.extra"


def options(version: str) -> dict[str, str]:
    """Name to `required`, `optional` or `none`, as data/coturn_options.py read them."""
    lines = (DATA / f"coturn-{version}.txt").read_text().splitlines()
    return dict(line.split() for line in lines)


def said(version: str, **extra: object) -> list[str]:
    """Findings as an operator reads them."""
    options = {key.replace("_", "-"): value for key, value in extra.items()}
    return [f"{p.level}: {p.key}: {p.message}" for p in check(version, options, WHERE)]


@pytest.mark.parametrize("version", ["4.6.1", "4.18.0"])
def test_table_is_what_the_binary_takes(version: str) -> None:
    number = coturn_keys._number(version)
    ours = {k for k, e in KEYS.items() if coturn_keys._state(e, number) in ("", "deprecated")}
    assert ours == set(options(version))


@pytest.mark.parametrize("version", ["4.6.1", "4.18.0"])
def test_keys_with_a_required_value_are_the_ones_that_need_one(version: str) -> None:
    bare = {"flag", "switch", "int?"}
    for name, argument in options(version).items():
        assert (KEYS[name].kind not in bare) == (argument == "required"), name


def test_every_key_that_callready_names_itself_exists() -> None:
    assert set(coturn_keys.MANAGED) | coturn_keys.REPEATABLE | set(coturn_keys._ADVICE) <= set(KEYS)


@pytest.mark.parametrize(
    ("version", "key", "result"),
    [
        ("4.6.1", "no-cli", True),
        ("4.10.0", "no-cli", False),
        ("4.16.0", "no-dtls", True),
        ("4.17.0", "no-dtls", False),
        ("4.6.1", "no-stun-backward-compatibility", True),
        ("4.18.0", "no-stun-backward-compatibility", False),
        ("4.6.1", "no-rfc5780", True),
        ("4.18.0", "no-rfc5780", False),
        ("4.6.1", "response-origin-only-with-rfc5780", True),
        ("4.18.0", "response-origin-only-with-rfc5780", False),
        ("4.6.1", "no-software-attribute", True),
        ("4.18.0", "no-software-attribute", False),
        ("4.6.1", "no-tlsv1", False),
        ("4.6.1", "dtls", False),
        ("4.18.0", "dtls", True),
        ("4.18.0", "fingerprint", True),
        ("4.18.0", "no-such-key", False),
    ],
)
def test_the_template_writes_only_what_the_version_takes(
    version: str, key: str, result: bool
) -> None:
    assert knows(version, key) is result


def test_the_old_configuration_is_told_what_it_did() -> None:
    found = said(
        "4.6.1",
        max_allocate_lifetime=7200,
        channel_lifetime=7200,
        permission_lifetime=7200,
        relay_threads=16,
        no_stun_backward_compatibility=True,
        allocation_default_address_family="ipv4",
        no_tcp_relay_bandwidth_limit=True,
        no_udp_relay_bandwidth_limit=True,
    )
    assert [line.split(": ")[:2] for line in found] == [
        ["warning", f"{WHERE}.max-allocate-lifetime"],
        ["warning", f"{WHERE}.channel-lifetime"],
        ["warning", f"{WHERE}.permission-lifetime"],
        ["warning", f"{WHERE}.relay-threads"],
        ["error", f"{WHERE}.no-tcp-relay-bandwidth-limit"],
        ["error", f"{WHERE}.no-udp-relay-bandwidth-limit"],
    ]
    for line, words in zip(
        found,
        ["RFC 8656, section 7.2", "RFC 8656, section 12", "RFC 8656, section 9", "one thread per"],
        strict=False,
    ):
        assert words in line
    assert "7200 is taken" in found[0]
    assert found[4] == (
        f"error: {WHERE}.no-tcp-relay-bandwidth-limit: not a coturn key in any version: bandwidth "
        "is unlimited by default; to limit it use max-bps (bytes/s per session) or bps-capacity "
        "(bytes/s for the server)"
    )


def test_the_defaults_of_the_rfc_are_no_warning() -> None:
    assert not said(
        "4.18.0", max_allocate_lifetime=3600, channel_lifetime=600, permission_lifetime=300
    )


@pytest.mark.parametrize(
    ("version", "key", "value", "expected"),
    [
        ("4.6.1", "cli", True, "error: not a key of coturn 4.6.1, which ignores it; it came with"),
        ("4.18.0", "no-dtls", True, "error: removed in coturn 4.17.0: DTLS is off unless"),
        ("4.18.0", "prod", True, "error: removed in coturn 4.7.0"),
        ("4.18.0", "no-cli", True, "warning: deprecated: the CLI is off by default"),
        ("4.18.0", "no-such-key", True, "error: not a coturn key in any version"),
        ("4.18.0", "max_bps", 1, "error: not a coturn key in any version; did you mean max-bps?"),
        ("4.6.1", "min-port", 5000, "error: callready writes it: set turn.min_port instead"),
        ("4.6.1", "realm", "x", "error: callready writes it: set turn.pools.<pool>.realm instead"),
        ("4.6.1", "prometheus", True, "error: Debian builds coturn without Prometheus"),
        ("4.6.1", "no-auth", True, "error: it would relay for anyone"),
        *(
            ("4.18.0", key, True, "error: clients are told URIs that need what it switches off")
            for key in ("no-udp", "no-tcp", "no-udp-relay", "no-stun", "stun-only")
        ),
        ("4.6.1", "secure-stun", True, "error: clients ask STUN servers without credentials"),
        ("4.6.1", "CA-file", "/etc/ca.pem", "error: callers would need certificates of their own"),
        ("4.6.1", "no-tlsv1_2", True, "error: 4.6.1 speaks no other TLS"),
        ("4.6.1", "rest-api-separator", "|", "error: credentials are minted with a colon"),
        *(
            ("4.18.0", key, True, "error: it is off because of known vulnerabilities")
            for key in ("dtls", "mobility", "oauth", "web-admin", "web-admin-port")
        ),
        ("4.6.1", "mobility", "on", "error: it is off because of known vulnerabilities"),
        ("4.6.1", "server-relay", True, "error: anyone could send to a relay"),
        ("4.6.1", "allow-loopback-peers", True, "error: relays could reach what listens on"),
        ("4.6.1", "tcp-proxy-port", 3480, "error: callready writes it: set turn.proxy_port"),
        ("4.6.1", "aux-server", "[fe80::1%eth0]:3478", "error: [fe80::1%eth0]:3478 is not ADDR"),
        ("4.6.1", "cli-port", 99999, "error: 99999 is not a port (1-65535)"),
        ("4.6.1", "cli-port", 0, "error: 0 is not a port (1-65535)"),
        ("4.6.1", "cli-port", "abc", "error: abc is not a port"),
        ("4.6.1", "max-bps", "10k", "error: 10k is not a whole number"),
        ("4.6.1", "max-bps", -1, "error: -1 is not a whole number"),
        ("4.6.1", "max-bps", True, "error: needs a value (a whole number)"),
        ("4.6.1", "max-bps", None, "error: needs a value"),
        ("4.6.1", "max-bps", [1, 2], "error: may be given once"),
        ("4.6.1", "verbose", "maybe", "error: is a key without a value, coturn wants no value"),
        ("4.6.1", "no-auth-pings", "off", "error: is a key without a value, its presence alone"),
        ("4.18.0", "stateless-nonce", False, "error: it is on by default, and false leaves it out"),
        ("4.6.1", "cipher-list", "HIGH # strong", "error: has a comment after the value"),
        ("4.6.1", "cipher-list", "HIGH\nno-auth", "error: has a line break"),
        ("4.6.1", "cipher-list", "HIGH;", "error: ends with a semicolon"),
        ("4.6.1", "cipher-list", "", "error: is empty"),
        ("4.6.1", "cipher-list", "A" * 2000, "error: is too long"),
        ("4.6.1", "allocation-default-address-family", "ipv5", "error: ipv5 is not one of ipv4, "),
        ("4.6.1", "cli-ip", "localhost", "error: localhost is not an IP address"),
        ("4.6.1", "aux-server", "192.0.2.1", "error: 192.0.2.1 is not ADDRESS:PORT"),
        ("4.6.1", "aux-server", "192.0.2.1:99999", "error: 99999 is not a port"),
        (
            "4.6.1",
            "denied-peer-ip",
            "10.0.0.0/8",
            "error: 10.0.0.0/8: coturn reads no CIDR, 4.6.1 would run without the rule: "
            "write 10.0.0.0-10.255.255.255",
        ),
        (
            "4.6.1",
            "allowed-peer-ip",
            "fd00::/8",
            "error: fd00::/8: coturn reads no CIDR, 4.6.1 would run without the rule: "
            "write fd00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        ),
        ("4.6.1", "denied-peer-ip", "10.0.0.9-10.0.0.1", "error: 10.0.0.9-10.0.0.1 ends before"),
        ("4.6.1", "denied-peer-ip", "10.0.0.1-::1", "error: 10.0.0.1-::1 mixes IPv4 and IPv6"),
        ("4.6.1", "denied-peer-ip", "::-::ffff", "error: ::-::ffff starts at ::, with which"),
        ("4.6.1", "denied-peer-ip", "host.example", "error: host.example is not an IP address"),
        ("4.6.1", "denied-peer-ip", "fd00::1-fd00::ffff", "error: fd00::1-fd00::ffff: coturn befo"),
    ],
)
def test_what_coturn_would_not_say_is_said_before_the_deploy(
    version: str, key: str, value: object, expected: str
) -> None:
    (found,) = check(version, {key: value}, WHERE)
    assert found.key == f"{WHERE}.{key}"
    assert f"{found.level}: {found.message}".startswith(expected)


def test_sound_options_are_silent() -> None:
    assert not said(
        "4.18.0",
        simple_log=True,
        mobility=False,
        no_udp=False,
        verbose=False,
        max_bps="125000",
        stateless_nonce="off",
        log_min_level="warning",
        denied_peer_ip=["192.0.2.7", "198.18.0.0-198.19.255.255", "fd00::1-fd00::ffff"],
        aux_server=["192.0.2.1:5555", "[2001:db8::1]:5555"],
    )


def test_a_value_that_may_be_secret_is_not_quoted() -> None:
    assert not said("4.6.1", cli_password=SecretStr("hunter2"))
    found = said("4.6.1", cli_password="hunter2 # mine", pkey_pwd=["hunter2"])
    found += said("4.6.1", cli_password=SecretStr("hunter2 # mine"), cli_port=SecretStr("hunter2"))
    assert len(found) == 4
    assert "hunter2" not in "".join(found)


@pytest.mark.parametrize(("version", "count"), [("4.5.2", 1), ("4.6.1", 0), ("4.19.0", 1)])
def test_an_unknown_version_is_one_warning(version: str, count: int) -> None:
    found = check(version, {"fingerprint-x": True, "simple-log": True}, WHERE)
    assert [p.level for p in found] == ["warning"] * count + ["error"]


@pytest.mark.parametrize(
    "network", ["10.0.0.0/8", "192.0.2.7/32", "fd00::/8", "::/0", "64:ff9b::/96"]
)
def test_range_of_a_network(network: str) -> None:
    net = ipaddress.ip_network(network)
    first, _, last = (range_of(network) or "").partition("-")
    assert first != "::"  # coturn takes :: as `any` and matches every IPv4 peer with it
    assert ipaddress.ip_address(last or first) == net[-1]
    assert int(ipaddress.ip_address(first)) - int(net[0]) == (1 if network == "::/0" else 0)
