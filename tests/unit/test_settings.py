"""What an operator is told about an inventory: every error as it is printed, all of them at once,
and no value of a secret in any."""

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import cast

import pytest
from pydantic import SecretStr, ValidationError

from callready.secrets.loading import load_fleet, validate
from callready.settings.inventory import inventory_data
from callready.settings.models import HostSettings
from callready.settings.problem import SettingsError
from tests.support.inventories import (
    SECRETS,
    SFU1,
    SOURCE,
    TURN1,
    TURN2,
    Edit,
    load,
    merged,
    said,
    write_store,
)

pytestmark = pytest.mark.usefixtures("project")

ALL = f"{SFU1}, {TURN1}, {TURN2}"
INLINE = (
    'is written in the inventory; write a reference such as "secret:turn/calls" and keep the value '
    "in the store (make secrets ENV=…)"
)
CIDR = "coturn reads no CIDR, 4.6.1 would run without the rule"


def test_the_hosts_that_every_test_starts_from_are_accepted() -> None:
    fleet = load()
    assert fleet.warnings == []
    assert fleet.group("turn").keys() == {TURN1, TURN2}
    assert fleet.pool("calls").keys() == {TURN1}
    assert fleet[TURN1].name == TURN1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("turn.min_port", 70000, "turn.min_port: 70000 is not a port (1-65535)"),
        ("turn.min_port", 0, "turn.min_port: 0 is not a port (1-65535)"),
        ("turn.min_port", "49152", "turn.min_port: '49152' is not a port (1-65535)"),
        ("turn.min_port", True, "turn.min_port: True is not a port (1-65535)"),
        (
            "turn.pools.calls.listening_port",
            65536,
            "turn.pools.calls.listening_port: 65536 is not a port (1-65535)",
        ),
        ("ssh_port", 0, "ssh_port: 0 is not a port (1-65535)"),
        ("address", "192.0.2", "address: '192.0.2' is not an IPv4 address"),
        ("address", "2001:db8::1", "address: '2001:db8::1' is not an IPv4 address"),
        ("address", 5, "address: must be text in quotes"),
        ("address6", "192.0.2.1", "address6: '192.0.2.1' is not an IPv6 address"),
        ("private_address", "eth0", "private_address: 'eth0' is not an IPv4 address"),
        (
            "address6",
            "2001:db8::21%eth0",
            "address6: '2001:db8::21%eth0' has a scope, which is this host's own (RFC 4007): leave out "
            "%eth0",
        ),
        ("name", "a b", "name: 'a b' is not a host name"),
        *(
            (path, given, f"{path}: must be a mapping in {{ }}")
            for path in ("host", "deploy", "turn.pools.calls", "livekit.rtc", "tls", "android")
            for given in cast(list[object], [5, "text", []])
        ),
        ("edge", {5: 1}, "edge.5: must be text in quotes"),
        ("host", None, "host: must be a mapping in { }"),
        ("turn.pools", None, "turn.pools: must be a mapping in { }"),
        ("turn.pools.calls", None, "turn.pools.calls: must be a mapping in { }"),
        ("livekit.config", None, "livekit.config: must be a mapping in { }"),
        ("livekit.rtc.stun_servers", None, "livekit.rtc.stun_servers: must be a list in [ ]"),
        ("turn.tls", None, "turn.tls: must be True or False"),
        ("turn.user_quota", "many", "turn.user_quota: must be a whole number"),
        ("host.max_clock_skew", None, "host.max_clock_skew: must be a number"),
        *(
            (path, limit + 1, f"{path}: Input should be less than or equal to {limit}")
            for path, limit in (
                ("host.udp_buffer", 2_147_483_647),
                ("host.max_clock_skew", 86_400),
                ("edge.tunnel_timeout", 2_147_483),
                ("edge.max_connections", 262_144),
                ("turn.total_quota", 2_147_483_647),
                ("turn.stale_nonce", 2_147_483_647),
                ("livekit.token_ttl", 2_147_483_647),
            )
        ),
        ("pools", "calls", "pools: must be a list in [ ]"),
        ("pools", ["a b"], "pools.0: 'a b' is not a Unix user or group name"),
        ("livekit", 5, "livekit: must be a mapping in { }"),
        (
            "livekit.url",
            "https://x.test",
            "livekit.url: 'https://x.test' is not ws://NAME[:PORT] or wss://NAME[:PORT]",
        ),
        (
            "livekit.url",
            "wss://x.test/rtc",
            "livekit.url: 'wss://x.test/rtc' has a path, which is not used: write wss://x.test",
        ),
        *(
            (
                "livekit.url",
                url,
                f"livekit.url: {url!r} is not ws://NAME[:PORT] or wss://NAME[:PORT]",
            )
            for url in ("wss://x.test:https", "wss://[::1", "wss://", "x.test")
        ),
        ("livekit.version", "latest", "livekit.version: 'latest' is not a version such as 1.13.5"),
        ("livekit.keys", ..., "livekit.keys: is missing"),
        ("livekit.keys", {}, "livekit.keys: is empty"),
        ("livekit.webhook", {"urls": [], "api_key": "APIunit"}, "livekit.webhook.urls: is empty"),
        (
            "livekit.webhook",
            {"urls": ["https://x.test"], "api_key": "other"},
            "livekit: webhook.api_key 'other' is not one of keys: APIunit",
        ),
        (
            "livekit.rtc.port_range_end",
            50010,
            "livekit.rtc: 50000-50010 is less than 100 ports, too few for media: set port_range_start "
            "and port_range_end",
        ),
        (
            "livekit.rtc.turn_ttl",
            29,
            "livekit.rtc.turn_ttl: Input should be greater than or equal to 30",
        ),
        (
            "livekit.rtc.turn_ttl",
            86401,
            "livekit.rtc.turn_ttl: Input should be less than or equal to 86400",
        ),
        (
            "livekit.logging.level",
            "loud",
            "livekit.logging.level: Input should be 'debug', 'info', 'warn' or 'error'",
        ),
        ("turn.version", "4.6", "turn.version: '4.6' is not a version such as 1.13.5"),
        ("turn.peers", "everyone", "turn.peers: Input should be 'sfu' or 'internet'"),
        ("turn.tls", "perhaps", "turn.tls: must be True or False"),
        ("turn.pools.calls.realm", ..., "turn.pools.calls.realm: is missing"),
        (
            "turn.pools.calls.realm",
            "a realm # comment",
            "turn.pools.calls.realm: 'a realm # comment' is not a host name",
        ),
        (
            "turn.pools.calls.max_port",
            1000,
            "turn.pools.calls: min_port 49152 is above max_port 1000; coturn would start and crash at "
            "the first allocation",
        ),
        (
            "turn.pools.calls.max_port",
            49200,
            "turn.pools.calls: 49152-49200 is less than 100 relay ports: set min_port and max_port",
        ),
        (
            "turn.pools.calls.secrets",
            [],
            "turn.pools.calls: set either secrets (TURN REST credentials) or users (fixed ones)",
        ),
        (
            "turn.pools.calls.users",
            {"bob": "secret:turn/user"},
            "turn.pools.calls: set either secrets (TURN REST credentials) or users (fixed ones)",
        ),
        (
            "turn",
            {
                "tls": False,
                "pools": {
                    "calls": {
                        "realm": "x.test",
                        "secrets": ["secret:turn/calls"],
                        "tls_on_443": True,
                    }
                },
            },
            "turn.pools.calls: tls_on_443 needs TLS: leave it out, or set tls to True",
        ),
        (
            "firewall.extra_ports",
            ["443"],
            "firewall.extra_ports.0: '443' is not PORT/tcp, PORT/udp or FIRST-LAST/udp",
        ),
        (
            "firewall.extra_ports",
            ["443/tcp", "60010-60000/udp"],
            "firewall.extra_ports.1: '60010-60000/udp' is not PORT/tcp, PORT/udp or FIRST-LAST/udp",
        ),
        *(
            ("firewall.open", {"redis": opening}, f"firewall.open.redis{problem}")
            for opening, problem in (
                ({}, ": opens nothing: set ports or protocols"),
                ({"sources": ["livekit"]}, ": opens nothing: set ports or protocols"),
                ({"ports": ["6379/tcp"], "sources": []}, ".sources: is empty"),
                (
                    {"ports": ["vrrp"]},
                    ".ports.0: 'vrrp' is not PORT/tcp, PORT/udp or FIRST-LAST/udp",
                ),
                *(
                    (
                        {"protocols": [protocol]},
                        f".protocols.0: {protocol!r} is not an IP protocol: write its number (IANA), "
                        "or igmp, ipip, 6in4, gre, esp, ah, ospf, etherip, pim, ipcomp, vrrp, l2tp, "
                        "sctp",
                    )
                    for protocol in ("wireguard", "", 0, 255, -1, 300, True, 1.5, "50\n", None)
                ),
                *(
                    (
                        {"protocols": [protocol]},
                        f".protocols.0: {protocol!r} has ports: name them in ports, as 9100/tcp",
                    )
                    for protocol in ("TCP", "udp", 17)
                ),
                (
                    {"protocols": ["icmp"]},
                    ".protocols.0: 'icmp' is let in already, as far as hosts need it: leave it out",
                ),
                *(
                    (
                        {"ports": ["6379/tcp"], "sources": ["10.0.0.1", source]},
                        f".sources.1: {source!r} is not an address or a network such as 10.0.0.0/24",
                    )
                    for source in (
                        *(
                            "10.0.0.256",
                            "10.0.0.1-10.0.0.9",
                            "10.0.0.0/33",
                            "",
                            "sfu 1",
                            "::1%eth0",
                        ),
                        *("10.0.0.1:6379", "[2001:db8::1]", "livekit\n", "10.0.0.1, 10.0.0.2", "*"),
                    )
                ),
                (
                    {"ports": ["6379/tcp"], "sources": ["10.0.0.5/24"]},
                    ".sources.0: '10.0.0.5/24' is an address in a network: write 10.0.0.5 for it "
                    "alone, 10.0.0.0/24 for all of them",
                ),
                (
                    {"ports": ["6379/tcp"], "source": ["livekit"]},
                    ".source: is not a setting; did you mean sources?",
                ),
            )
        ),
        (
            "firewall.open",
            {"my redis": {"ports": ["6379/tcp"]}},
            "firewall.open.my redis: 'my redis' is not a Unix user or group name",
        ),
        (
            "firewall.turn_requests_per_client",
            -1,
            "firewall.turn_requests_per_client: Input should be greater than or equal to 0",
        ),
        ("internal_address", "eth1", "internal_address: 'eth1' is not an IPv4 or IPv6 address"),
        (
            "livekit.rtc.ips",
            {"includes": ["eth0"]},
            "livekit.rtc.ips.includes.0: 'eth0' is not an address or a network such as 10.0.0.0/24",
        ),
        (
            "host.other_listeners",
            ["0/tcp"],
            "host.other_listeners.0: '0/tcp' is not PORT/tcp, PORT/udp or FIRST-LAST/udp",
        ),
        (
            "tls.certificate",
            "/certs/{names}.pem",
            "tls.certificate: '/certs/{names}.pem': only {host} and {name} may stand in braces",
        ),
        (
            "app.env_file",
            "srv/.env",
            "app.env_file: 'srv/.env' is not an absolute path without spaces",
        ),
        (
            "app",
            {"env_file": "/srv/../etc/passwd"},
            "app.env_file: '/srv/../etc/passwd' is not an absolute path without spaces",
        ),
        (
            "app",
            {"env_file": "/srv/.env", "owner": "Root"},
            "app.owner: 'Root' is not a Unix user or group name",
        ),
        (
            "app",
            {"env_file": "/srv/.env", "restart": ["backend"]},
            "app.restart.0: 'backend' is not a systemd unit name such as backend.service",
        ),
        (
            "app",
            {"env_file": "/srv/.env", "url": "app.test"},
            "app.url: 'app.test' is not http://NAME[:PORT] or https://NAME[:PORT]",
        ),
        (
            "app",
            {"env_file": "/srv/.env", "health": [{"url": "https://app.test:99999/health"}]},
            "app.health.0.url: '99999' is not a port (1-65535)",
        ),
        *(
            (
                "app",
                {"env_file": "/srv/.env", "commands": ["true", command]},
                "app.commands.1: must be one line without tabs, which separate commands in a release's "
                "manifest: write an item for each command, or a script on the host that it calls",
            )
            for command in ("if true\nthen true\nfi", "a\tb", " ")
        ),
        *(
            (
                "app",
                {"env_file": "/srv/.env", "upstream": upstream},
                f"app.upstream: {upstream!r} is not ADDRESS:PORT such as 127.0.0.1:8000 or [::1]:8000",
            )
            for upstream in (
                "http://127.0.0.1:8000",
                "127.0.0.1",
                "8000",
                "127.0.0.1:99999",
                "127.0.0.1:8000 check",
                "127.0.0.1:8000\n",
                "app.internal:8000",
            )
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_host_and_key(
    path: str, value: object, message: str
) -> None:
    assert said((TURN1, path, value)) == [f"{TURN1}: {message}"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fierwall", "is not a setting; did you mean firewall?"),
        ("turn.pols", "is not a setting; did you mean pools?"),
        ("turn.pools.calls.relm", "is not a setting; did you mean realm?"),
        ("livekit.rtc.turn_tll", "is not a setting; did you mean turn_ttl?"),
        ("livekit.logging.pion_levle", "is not a setting; did you mean pion_level?"),
        ("host.udp_bufer", "is not a setting; did you mean udp_buffer?"),
        ("tls.certificat", "is not a setting; did you mean certificate?"),
        ("deploy.batc", "is not a setting; did you mean batch?"),
        ("turn.statu", "is not a setting"),
        ("xyzzy", "is not a setting"),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(path: str, message: str) -> None:
    assert said((TURN1, path, 1)) == [f"{TURN1}: {path}: {message}"]


def test_a_suggestion_is_a_key_of_that_section() -> None:
    app = {"env_file": "/srv/.env", "health": [{"url": "https://app.test", "statu": 200}]}
    android = {"checkout": "/app", "domains": [{"host": "app.test", "sceme": "ws"}]}
    assert said((TURN1, "app", app), (TURN1, "android", android)) == [
        f"{TURN1}: app.health.0.statu: is not a setting; did you mean status?",
        f"{TURN1}: android.domains.0.sceme: is not a setting; did you mean scheme?",
    ]


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        ("10.0.0.0/8", f"10.0.0.0/8: {CIDR}: write 10.0.0.0-10.255.255.255"),
        ("10.0.0.0/99", f"10.0.0.0/99: {CIDR}"),
        ("everyone", "everyone is not an IP address or a range first-last"),
        (
            "10.0.0.9-10.0.0.1",
            "10.0.0.9-10.0.0.1 ends before it starts, which coturn takes without a word",
        ),
        ("10.0.0.9-::1", "10.0.0.9-::1 mixes IPv4 and IPv6, which coturn takes without a word"),
        (
            "::-2001:db8::ffff",
            "::-2001:db8::ffff starts at ::, with which coturn matches every "
            "IPv4 peer too: start at ::1",
        ),
        *(
            (
                peers,
                f"{peers}: coturn before 4.16 compares IPv6 addresses byte by byte "
                "(CVE-2026-73213) and leaves some inside this range out: use ranges that are whole "
                "prefixes, one item each",
            )
            for peers in (
                "2001:db8::1-2001:db9::2",
                "2001:db8::5-2001:db8:1::5",
                "2001:db8::-2001:db8:1::",
                "2001:db8:0:101::-2001:db8:0:2ff:ffff:ffff:ffff:ffff",
            )
        ),
    ],
)
def test_a_peer_range_that_coturn_would_misread_is_refused(peers: str, message: str) -> None:
    assert said((TURN2, "turn.pools.avatar.allowed_peers", [peers])) == [
        f"{TURN2}: turn.pools.avatar.allowed_peers.0: {message}"
    ]


def test_peer_ranges_that_coturn_reads_are_taken() -> None:
    peers = ["192.0.2.1", "10.0.0.0-10.0.255.255", "2001:db8::1", "2001:db8::-2001:db8::ffff"]
    load(("*", "turn.pools.avatar.allowed_peers", peers))


def test_all_errors_of_all_hosts_come_at_once_and_shared_ones_are_said_once() -> None:
    assert said(
        (SFU1, "address", "nowhere"),
        (TURN1, "turn.min_port", 70000),
        (TURN1, "pools", "calls"),
        ("*", "livekit.rtc.turn_ttl", 5),
        ("*", "turn.user_quota", -1),
        (TURN2, "fierwall", {}),
    ) == [
        f"{SFU1}: address: 'nowhere' is not an IPv4 address",
        f"{ALL}: livekit.rtc.turn_ttl: Input should be greater than or equal to 30",
        f"{ALL}: turn.user_quota: Input should be greater than or equal to 0",
        f"{TURN1}: pools: must be a list in [ ]",
        f"{TURN1}: turn.min_port: 70000 is not a port (1-65535)",
        f"{TURN2}: fierwall: is not a setting; did you mean firewall?",
    ]


def test_two_errors_at_one_key_are_both_said() -> None:
    assert said((TURN1, "turn.pools.Calls!", {"realm": "callready.test"})) == [
        f"{TURN1}: turn.pools.Calls!: 'Calls!' is not a Unix user or group name",
        f"{TURN1}: turn.pools.Calls!: set either secrets (TURN REST credentials) or users "
        "(fixed ones)",
    ]


# Placeholders of the shipped examples


def test_the_names_of_the_examples_are_refused_with_where_to_edit() -> None:
    lines = said(
        ("turn9.example.com", "groups", ["turn"]),
        ("*", "livekit.url", "wss://livekit.example.com"),
        ("*", "android", {"checkout": "/CHANGE-ME/app"}),
    )
    assert lines[0] == (
        "still has the example's /CHANGE-ME/app, turn9.example.com, wss://livekit.example.com: "
        f"edit {SOURCE} and inventories/group_data/test.py to name your own hosts"
    )


@pytest.mark.parametrize(
    "word",
    [
        *(
            "example.com",
            "Example.COM",
            "turn.example.com",
            "example.com.",
            "wss://x.example.com:1/y",
        ),
        *("me@example.com", "https://example.com/", "/srv/CHANGE-ME/app", "CHANGE-ME"),
    ],
)
def test_a_placeholder_is_found_in_a_name_a_url_or_a_path(word: str) -> None:
    assert f"still has the example's {word}: edit" in said((TURN1, "xyzzy", [{"a": word}]))[0]


def test_a_name_that_only_contains_a_placeholder_is_taken() -> None:
    names = ("livekit.anexample.com", "my-example.com", "example.com.au", "example.com-x.test")
    for name in (*names, "example.community", "change-me.test"):
        load((TURN1, "name", name), ("*", "turn.tls", False))
    path = "/srv/EXCHANGE-ME/example.com.json"
    (line,) = said((TURN1, "xyzzy", path))
    assert line == f"{TURN1}: xyzzy: is not a setting"


# Secrets


@pytest.mark.parametrize(
    ("first", "second"),
    [("turn/calls", "turn-calls"), ("turn/calls", "turn_calls"), ("turn/Calls", "turn/calls")],
)
def test_two_secrets_with_one_environment_variable_are_refused(first: str, second: str) -> None:
    write_store({**SECRETS, first: "1" * 32, second: "2" * 32})
    edits: list[Edit] = [
        ("*", "turn.pools.calls.secrets", [f"secret:{first}"]),
        ("*", "turn.pools.avatar.secrets", [f"secret:{second}"]),
    ]
    names = " and ".join(f"secret:{name}" for name in sorted((first, second)))
    assert said(*edits) == [
        f"{names} share the environment variable CALLREADY_SECRET_TURN_CALLS: rename one"
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("livekit.keys.APIunit", "written-here-and-long-enough-to-be-one", INLINE),
        ("turn.pools.calls.secrets", ["written-here-and-long-enough-to-be-one"], INLINE),
        ("livekit.redis", {"address": "10.0.0.5:6379", "password": "written-here"}, INLINE),
        ("sudo_password", "written-here", INLINE),
        (
            "livekit.keys.APIunit",
            "secret:short",
            "is shorter than 32 characters; generate one with make secrets ENV=…",
        ),
        (
            "livekit.keys.APIunit",
            "secret:no/such",
            f"{SOURCE}.secrets.yaml has no entry no/such: run make secrets ENV=test",
        ),
        (
            "livekit.keys.APIunit",
            "secret:empty",
            f"{SOURCE}.secrets.yaml has no entry empty: run make secrets ENV=test",
        ),
        (
            "livekit.keys.APIunit",
            "secret:broken",
            "has a line break or a blank at its end; programs differ in reading that",
        ),
        (
            "livekit.config",
            {"trace": {"jaeger_url": "secret:broken"}},
            "has a line break or a blank at its end; programs differ in reading that",
        ),
    ],
)
def test_a_secret_that_cannot_be_used_is_named_and_not_shown(
    path: str, value: object, message: str
) -> None:
    write_store({**SECRETS, "empty": "", "broken": "long-enough-but-ends-in-a-line-break-\n"})
    (line,) = said((TURN1, path, value))
    host, key, text = line.split(": ", 2)
    assert (host, text) == (TURN1, message)
    assert key.startswith(path)
    assert "written-here" not in line


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        (
            [("*", "turn.pools.calls.secrets", ["secret:turn/avatar"])],
            "turn.pools.avatar.secrets.0: is the same secret as turn.pools.calls.secrets.0: "
            "use different ones",
        ),
        (
            [("*", "livekit.keys.APIunit", "secret:turn/calls")],
            "livekit.keys.APIunit: is the same secret as turn.pools.calls.secrets.0: use different "
            "ones",
        ),
        (
            [("*", "turn.pools.calls.secrets", ["secret:turn/calls", "secret:turn/calls"])],
            "turn.pools.calls.secrets.0: is the same secret as turn.pools.calls.secrets.1: use "
            "different ones",
        ),
        (
            [
                ("*", "turn.pools.avatar.secrets", ...),
                ("*", "turn.pools.avatar.users", {"bob": "secret:turn/calls"}),
            ],
            "turn.pools.avatar.users.bob: is the same secret as turn.pools.calls.secrets.0: use "
            "different ones",
        ),
        (
            [("*", "livekit.prometheus", {"password": "secret:livekit/api_secret"})],
            "livekit.keys.APIunit: is the same secret as livekit.prometheus.password: use different "
            "ones",
        ),
    ],
)
def test_one_secret_for_two_things_is_refused(edits: list[Edit], line: str) -> None:
    assert said(*edits) == [line]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("livekit/api_secret", "livekit.keys.APIunit"),
        ("turn/calls", "turn.pools.calls.secrets.0"),
        ("app/token", "app.api_token.0"),
    ],
)
@pytest.mark.parametrize("character", [*"#'\"\\$`, !&;()*~{", "é"])
def test_a_secret_that_readers_of_the_env_differ_about_is_refused(
    name: str, path: str, character: str
) -> None:
    app = {"env_file": "/srv/.env", "api_token": "secret:app/token"}
    edits: list[Edit] = [(TURN1, "groups", ["turn", "app"]), (TURN1, "app", app)]
    write_store({**SECRETS, "app/token": "x" * 32, name: f"planted{character}" + "x" * 32})
    (line,) = said(*edits)
    assert line == (
        f"{path}: holds other characters than letters, digits and _.:/+=@%-, which the readers of "
        "the app's .env take differently: generate one with make secrets ENV=…"
    )
    load()  # without an app there is no .env
    fine, other = "a-Z0_9" + "./+=" * 8, "of a pool that the app does not get"
    write_store({**SECRETS, "app/token": fine, "turn/avatar": other})
    load(*edits)


@pytest.mark.parametrize("key", ["API key", "API$HOME", "API#1", "'API'", "API\\", "ÄPI", ""])
def test_a_name_of_a_key_that_readers_of_the_env_differ_about_is_refused(key: str) -> None:
    keys: Edit = ("*", "livekit.keys", {key: "secret:livekit/api_secret"})
    load(keys)  # without an app there is no .env
    app: list[Edit] = [
        (TURN1, "groups", ["turn", "app"]),
        (TURN1, "app", {"env_file": "/srv/.env"}),
    ]
    assert said(keys, *app) == [
        f"livekit.keys: {key!r} holds other characters than letters, digits and _.:/+=@%-, which the "
        "readers of the app's .env take differently: give the key another name"
    ]


@pytest.mark.parametrize(
    "path",
    ["/etc/callready/app.env", "/etc/systemd/system/app.service", "/dev/null", "/proc/1/environ"],
)
def test_an_environment_file_that_cannot_be_the_app_s_is_refused(path: str) -> None:
    app: list[Edit] = [(TURN1, "groups", ["turn", "app"]), (TURN1, "app", {"env_file": path})]
    assert said(*app) == [
        f"{TURN1}: app.env_file: {path} is not the app's: callready or the system has its own files there; "
        "name a file in the app's folder, such as /srv/app/.env"
    ]


@pytest.mark.parametrize("path", ["/etc/livekit/app.env", "/etc/app/.env", "/opt/app/.env"])
def test_an_environment_file_beside_ours_is_the_app_s(path: str) -> None:
    load((TURN1, "groups", ["turn", "app"]), (TURN1, "app", {"env_file": path}))


@pytest.mark.parametrize(
    "path",
    [
        "turn.min_port",
        "turn.pools.calls.realm",
        "turn.pools.calls.allowed_peers",
        "address6",
        "livekit.url",
        "livekit.bind_addresses",
        "livekit.version",
        "firewall.extra_ports",
        "name",
        "app.owner",
        "livekit.config",
        "turn.pools.calls.extra",
        "pools",
        "groups",
        "xyzzy",
        "livekit.webhook.api_key",
        "tls.certificate",
        "turn.tls",
        "host.max_clock_skew",
    ],
)
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text], lambda text: {"x": text}])
def test_a_secret_at_the_wrong_place_is_in_no_message(path: str, wrap: object) -> None:
    assert callable(wrap)
    lines = said(("*", path, wrap("secret:turn/user")), (TURN2, "ssh_port", 0))
    assert not [line for line in lines if SECRETS["turn/user"] in line]


def test_pydantics_own_message_has_no_value_either() -> None:
    planted = "planted-poison-that-a-traceback-would-show"
    with pytest.raises(ValidationError) as error:
        HostSettings.model_validate({"name": "x", "sudo_password": planted, "turn": {"x": planted}})
    assert "sudo_password" in str(error.value)
    assert planted not in str(error.value)


def test_no_secret_is_in_a_repr_of_the_fleet() -> None:
    fleet = load(
        ("*", "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
        ("*", "livekit.redis", {"address": "10.0.0.5:6379", "password": "secret:redis/password"}),
        ("*", "sudo_password", "secret:sudo/prod"),
        ("*", "turn.pools.calls.secrets", ...),
        ("*", "turn.pools.calls.users", {"bob": "secret:turn/user"}),
    )
    shown = repr(fleet) + str([host.model_dump_json() for host in fleet.hosts.values()])
    assert "bob" in shown
    assert not [value for value in SECRETS.values() if value in shown]


def test_pyinfras_own_host_data_is_no_setting() -> None:
    """A name that begins with `_` is a variable of an inventory file, if it is no argument."""
    load(("*", "ssh_key", "~/.ssh/id_ed25519"), ("*", "_sudo", True), ("*", "_state", "/srv/x"))


def test_pyinfras_secrets_are_references_whose_values_the_connector_alone_gets() -> None:
    write_store({**SECRETS, "ssh/key": "unit-ssh-key", "ssh/password": "unit-ssh-password"})
    fleet = load(
        ("*", "ssh_key", "~/.ssh/id_ed25519"),
        ("*", "ssh_key_password", "secret:ssh/key"),
        (TURN1, "ssh_password", "secret:ssh/password"),
        (TURN2, "ssh_paramiko_connect_kwargs", {"passphrase": "secret:ssh/key", "compress": True}),
    )
    key = SecretStr("unit-ssh-key")
    assert fleet.logins == {
        SFU1: {"ssh_key_password": key},
        TURN1: {"ssh_key_password": key, "ssh_password": SecretStr("unit-ssh-password")},
        TURN2: {
            "ssh_key_password": key,
            "ssh_paramiko_connect_kwargs": {"passphrase": key, "compress": True},
        },
    }
    assert {"unit-ssh-key", "unit-ssh-password"} <= fleet.secrets
    assert "unit-ssh" not in repr(fleet)


SHOWN = "is no secret, pyinfra shows it: write the value itself"
IN_ARGUMENTS = (
    "is a secret that pyinfra would put into the arguments of a program on the host, for every "
    "user there to read; callready becomes root by sudo, whose password goes over standard input: "
    'write sudo_password = "secret:…"'
)


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        ({"ssh_usr": "debian"}, "ssh_usr: is not a setting; did you mean ssh_user?"),
        ({"ssh_keyfile": "k"}, "ssh_keyfile: is not a setting; did you mean ssh_key?"),
        ({"ssh_x11": True}, "ssh_x11: is not a setting"),
        ({"ssh_passwd": "x"}, "ssh_passwd: is not a setting; did you mean ssh_password?"),
        ({"_sudoo": True}, "_sudoo: is no argument of pyinfra; did you mean _sudo?"),
        ({"_su_do_user": "x"}, "_su_do_user: is no argument of pyinfra; did you mean _sudo_user?"),
        ({"ssh_password": "written-here"}, f"ssh_password: {INLINE}"),
        ({"ssh_key": "k", "ssh_key_password": "written-here"}, f"ssh_key_password: {INLINE}"),
        (
            {"ssh_paramiko_connect_kwargs": {"passphrase": "written-here"}},
            f"ssh_paramiko_connect_kwargs.passphrase: {INLINE}",
        ),
        (
            {"ssh_key_password": "secret:short"},
            "ssh_key_password: needs ssh_key: the file that it is the passphrase of",
        ),
        ({"ssh_user": "secret:short"}, f"ssh_user: {SHOWN}"),
        (
            {"ssh_paramiko_connect_kwargs": {"gss_host": "secret:short"}},
            f"ssh_paramiko_connect_kwargs.gss_host: {SHOWN}",
        ),
        ({"_sudo_password": "secret:short"}, f"_sudo_password: {IN_ARGUMENTS}"),
        ({"_su_password": "written-here"}, f"_su_password: {IN_ARGUMENTS}"),
        ({"_env": {"TOKEN": "secret:short"}}, f"_env: {IN_ARGUMENTS}"),
        (
            {"ssh_password": "secret:no/such"},
            f"ssh_password: {SOURCE}.secrets.yaml has no entry no/such: run make secrets ENV=test",
        ),
    ],
)
def test_pyinfras_own_host_data_is_checked(edits: dict[str, object], line: str) -> None:
    assert said(*((TURN1, key, value) for key, value in edits.items())) == [f"{TURN1}: {line}"]


def test_an_empty_inventory_is_refused() -> None:
    with pytest.raises(SettingsError, match=f"^{SOURCE}: no hosts: is it the right file"):
        validate(SOURCE, {})


# Through pyinfra


def test_pyinfra_merges_the_data_that_is_validated(project: Path) -> None:
    data = merged()
    folder = project / "inventories" / "group_data"
    folder.mkdir()
    (project / SOURCE).write_text(
        dedent(f"""
        livekit = [({SFU1!r}, {{"address": "192.0.2.11"}})]
        turn = [({TURN1!r}, {{"address": "192.0.2.21", "pools": ["calls"], "ssh_port": 2222}}),
                ({TURN2!r}, {{"address": "192.0.2.22", "pools": ["avatar"],
                              "host": {{"udp_buffer": 9000000}}}})]
    """)
    )
    common = "".join(
        f"{key} = {value!r}\n" for key, value in data[SFU1].items() if key in ("turn", "tls")
    )
    (folder / "all.py").write_text(f'{common}host = {{"udp_buffer": 6000000}}\nssh_port = 22\n')
    (folder / "test.py").write_text(f"livekit = {data[SFU1]['livekit']!r}\n")
    (folder / "turn.py").write_text('host = {"udp_buffer": 7000000}\n')
    fleet = load_fleet(SOURCE)
    assert {name: host.host.udp_buffer for name, host in fleet.hosts.items()} == {
        SFU1: 6000000,
        TURN1: 7000000,
        TURN2: 9000000,
    }
    assert fleet[TURN1].ssh_port == 2222
    assert fleet[SFU1].groups == {"livekit", "test"}
    livekit = fleet[SFU1].livekit
    assert livekit
    assert livekit.keys["APIunit"].get_secret_value() == SECRETS["livekit/api_secret"]
    # What pyinfra prints, and verification reads, has the references and no values.
    printed = subprocess.run(
        [sys.executable, "-m", "pyinfra", SOURCE, "debug-inventory", "--json"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {host["name"] for host in json.loads(printed)} == {SFU1, TURN1, TURN2}
    assert "secret:livekit/api_secret" in printed
    assert not [value for value in SECRETS.values() if value in printed]


def test_what_pyinfra_says_of_its_own_data_is_passed_on(project: Path) -> None:
    (project / SOURCE).write_text(f"livekit = [({SFU1!r}, {{'ssh_port': '22'}})]\n")
    with pytest.raises(SettingsError, match=f"^{SOURCE}: Connector data type error: .*ssh_port"):
        inventory_data(SOURCE)


def test_an_inventory_that_is_not_there_or_not_python_is_named(project: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{SOURCE}: no such inventory file$"):
        inventory_data(SOURCE)
    (project / SOURCE).write_text("livekit = [\n")
    with pytest.raises(
        SettingsError,
        match=rf"^{SOURCE}: {SOURCE}, line 1: SyntaxError: '\[' was never closed$",
    ):
        inventory_data(SOURCE)
