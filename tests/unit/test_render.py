"""Every file as it lands on a host: byte for byte as kept in data/render, and as the programs that
read it understand it.

After a change that is meant: `pytest tests/unit/test_render.py --regenerate`, then read the diff.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from itertools import repeat
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from callready.release import render
from callready.release.declaration import Release
from callready.release.facts import Facts
from callready.secrets.masking import mask
from callready.settings import coturn_keys, livekit_keys
from callready.settings.fleet import Fleet
from callready.settings.ports import EXPORTERS, MEASURE, NODE_EXPORTER
from callready.settings.uris import turn_uris
from tasks import declare
from tests.support.inventories import (
    REC1,
    SECRETS,
    SFU1,
    TURN1,
    TURN2,
    Edit,
    box,
    load,
    recorded,
    watched,
    write_store,
)

pytestmark = pytest.mark.usefixtures("project")

DATA = Path(__file__).parent / "data"
RULES = "/etc/callready/nftables.conf"
LIVEKIT = "/etc/livekit/livekit.yaml"
USERS = {"bob": "secret:turn/user"}


def full_box() -> Fleet:
    """One host behind NAT with everything on it."""
    return box(
        (SFU1, "private_address", "10.0.0.11"),
        (SFU1, "ssh_port", 2222),
        (SFU1, "host.udp_buffer", 8_000_000),
        (SFU1, "firewall", {"extra_ports": ["443/tcp", "40000-40010/udp"], "notrack": True}),
        (SFU1, "livekit.port", 8880),
        (SFU1, "livekit.bind_addresses", ["127.0.0.1", "::1"]),
        (SFU1, "livekit.keys.APIsecond", "secret:livekit/second"),
        (SFU1, "livekit.rtc.turn_ttl", 600),
        (SFU1, "livekit.logging", {"level": "warn", "pion_level": "info", "json": False}),
        (
            SFU1,
            "livekit.redis",
            {
                "address": "10.0.0.5:6379",
                "username": "sfu",
                "db": 2,
                "password": "secret:redis/password",
                "use_tls": True,
            },
        ),
        (SFU1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
        (SFU1, "livekit.webhook", {"urls": ["https://app.callready.test/h"], "api_key": "APIunit"}),
        (
            SFU1,
            "livekit.config",
            {
                "room": {"empty_timeout": 300, "max_participants": 20},
                "rtc": {
                    "congestion_control": {"enabled": True},
                    "pli_throttle": {"low_quality": "1s"},
                },
                "logging": {"component_levels": {"room": "debug"}},
                "limit": {"num_tracks": -1},
            },
        ),
        (
            SFU1,
            "turn.pools.calls.extra",
            {
                "max-bps": 1_000_000,
                "verbose": True,
                "mobility": False,
                "aux-server": ["192.0.2.11:3480", "192.0.2.11:3481"],
            },
        ),
        ("*", "turn.pools.avatar.secrets", ...),
        ("*", "turn.pools.avatar.users", USERS),
        (SFU1, "turn.pools.avatar.tcp_relay", True),
        (SFU1, "turn.pools.avatar.tls", False),
        (SFU1, "turn.pools.avatar.user_quota", 0),
        (SFU1, "turn.pools.avatar.allowed_peers", ["10.0.0.9", "10.1.0.0-10.1.255.255"]),
    )


def production() -> Fleet:
    return load()


def new_coturn() -> Fleet:
    return load(("*", "turn.version", "4.18.0"))


def fixed_users() -> Fleet:
    return load(("*", "turn.pools.calls.secrets", ...), ("*", "turn.pools.calls.users", USERS))


def lan() -> Fleet:
    return load(
        (SFU1, "address", "10.0.0.11"),
        (SFU1, "address6", ...),
        ("*", "livekit.url", "ws://sfu1.callready.test:7880"),
        ("*", "livekit.turn_pool", None),
        ("*", "livekit.rtc.stun_servers", ["10.0.0.1:3478"]),
    )


def edges() -> Fleet:
    """TURN and wss on 443 of one host, TURN on 443 of another, and the app on a third."""
    return load(
        ("*", "edge", {}),
        ("*", "turn.pools.avatar", ...),
        ("*", "turn.pools.calls.tls_on_443", True),
        (SFU1, "groups", ["livekit", "turn"]),
        (SFU1, "name", "turn.callready.test"),
        (SFU1, "pools", ["calls"]),
        (SFU1, "turn.pools.calls.min_port", 60001),
        (TURN2, "groups", ["app"]),
        (TURN2, "pools", ...),
        (
            TURN2,
            "app",
            {
                "env_file": "/srv/app/.env",
                "url": "https://app.callready.test",
                "upstream": "127.0.0.1:8000",
            },
        ),
    )


def some() -> Fleet:
    """What is open to some: groups, networks that overlap, both address families; and protocols."""
    metrics = {"password": "secret:livekit/prometheus", "sources": ["scrapers"]}
    return load(
        ("monitor1", "groups", ["scrapers"]),
        ("monitor1", "address", "203.0.113.9"),
        (TURN1, "internal_address", "10.0.0.21"),
        (TURN2, "internal_address", "fd00::22"),
        (SFU1, "livekit.prometheus", metrics),
        (
            SFU1,
            "firewall.open",
            {
                "redis": {"ports": ["6379/tcp", "6379/tcp"], "sources": ["turn", "10.0.0.0/24"]},
                "keepalived": {"protocols": ["vrrp"], "sources": ["fe80::/10"]},
                "vpn": {"ports": ["500/udp"], "protocols": ["esp", "ah", 99]},
            },
        ),
    )


def shared() -> Fleet:
    """Two SFUs, and a host that has their Redis and nothing else."""
    return load(
        ("*", "fleet_ca", "secret:fleet/ca"),
        ("*", "turn.pools.avatar", ...),
        (TURN1, "groups", ["livekit", "turn"]),
        (TURN1, "turn.pools.calls.min_port", 60001),
        (TURN2, "groups", ["redis"]),
        (TURN2, "pools", ...),
        (TURN2, "redis.livekit_password", "secret:redis/livekit"),
        (TURN2, "redis.egress_password", "secret:redis/egress"),
    )


def cluster() -> Fleet:
    """Two SFUs with edges that are one service, with the Redis of a third host."""
    return load(
        ("*", "edge", {}),
        ("*", "fleet_ca", "secret:fleet/ca"),
        ("*", "turn.pools.avatar", ...),
        ("*", "redis", {"livekit_password": "secret:redis/livekit"}),
        (SFU1, "region", "eu-west"),
        (TURN1, "groups", ["livekit"]),
        (TURN1, "pools", ...),
        (TURN2, "groups", ["turn", "redis"]),
        (TURN2, "pools", ["calls"]),
    )


CASES: dict[str, tuple[Callable[[], Fleet], list[str]]] = {
    "production": (production, [SFU1, TURN1, TURN2]),
    "one-box": (full_box, [SFU1]),
    "coturn-4.18": (new_coturn, [TURN1]),
    "fixed-users": (fixed_users, [SFU1, TURN1]),
    "lan": (lan, [SFU1]),
    "edges": (edges, [SFU1, TURN1, TURN2]),
    "some": (some, [SFU1]),
    "redis": (shared, [TURN2]),
    "cluster": (cluster, [SFU1]),
}


def as_text(release: Release, host: str, units: bool) -> Iterator[str]:
    for path, file in sorted(release.files.items()):
        if units or not path.startswith(("/etc/systemd/", "/usr/local/")):
            yield f"==== {host}: {path} {file.mode:04o} {file.owner}:{file.group}\n"
            yield file.content.decode()
            if not file.content.endswith(b"\n"):
                yield " (no line end)\n"


@pytest.mark.parametrize("case", CASES)
def test_files_are_the_expected_bytes(case: str, request: pytest.FixtureRequest) -> None:
    make, hosts = CASES[case]
    fleet = make()
    text = "".join(
        line
        for host in hosts
        for line in as_text(
            declare(fleet, host).release, host, units=case in ("production", "redis")
        )
    )
    kept = DATA / "render" / f"{case}.txt"
    if request.config.getoption("--regenerate"):
        kept.write_text(text)
    assert text == kept.read_text()


def test_every_ssh_port_in_use_is_open() -> None:
    node = declare(load(), TURN1)
    node.learn(Facts(ssh_ports={22, 2222}))
    rules = node.release.files[RULES].content.decode()
    assert re.findall(r"tcp dport (\d+) counter name ssh_port/", rules) == ["22", "2222"]


def test_an_undefined_variable_is_an_error_and_not_an_empty_word() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'loader' is undefined"):
        render.render("callready-firewall.service.j2")


def test_secrets_in_free_keys_are_written_as_they_are_and_masked() -> None:
    planted = {"cli": "it's planted", "jaeger": "#it's planted " + "and long " * 9 + "é"}
    write_store({**SECRETS, **planted})
    fleet = box(
        ("*", "turn.pools.calls.extra", {"cli-password": "secret:cli"}),
        (
            "*",
            "livekit.config",
            {
                "trace": {"jaeger_url": "secret:jaeger"},
                "room": {"room_configurations": {"x": {"y": ["secret:jaeger"]}}},
            },
        ),
    )
    files = declare(fleet, SFU1).release.files
    assert livekit_yaml(fleet)["trace"]["jaeger_url"] == planted["jaeger"]
    assert livekit_yaml(fleet)["room"]["room_configurations"]["x"]["y"] == [planted["jaeger"]]
    assert b"\ncli-password=it's planted\n" in files["/etc/coturn/calls.conf"].content
    for path in (LIVEKIT, "/etc/coturn/calls.conf"):
        assert files[path].mode & 0o007 == 0
        assert "planted" not in mask(files[path].content.decode(), fleet.secrets)


# livekit.yaml


def livekit_yaml(fleet: Fleet) -> dict[str, Any]:
    loaded = yaml.safe_load(declare(fleet, SFU1).release.files[LIVEKIT].content)
    assert isinstance(loaded, dict)
    return loaded


def places(value: object, place: str = "") -> Iterator[str]:
    """Keys as callready.settings.livekit_keys names them."""
    if isinstance(value, list):
        for item in value:
            yield from places(item, f"{place}[]")
    elif isinstance(value, dict) and place not in ("keys", "logging.component_levels"):
        for key, item in value.items():
            at = f"{place}.{key}".removeprefix(".")
            yield at
            yield from places(item, at)


@pytest.mark.parametrize("make", [production, full_box, fixed_users, lan, cluster])
def test_livekit_knows_every_key_of_its_configuration(make: Callable[[], Fleet]) -> None:
    known = set(livekit_keys._places(livekit_keys.TREE))
    for place in places(livekit_yaml(make())):
        assert place in known and livekit_keys.known(place, "1.13.5"), place


def test_livekit_is_told_of_every_turn_server_over_every_transport() -> None:
    rtc = livekit_yaml(production())["rtc"]
    assert rtc == {
        "port_range_start": 50000,
        "port_range_end": 60000,
        "tcp_port": 7881,
        "use_external_ip": False,
        "node_ip": "192.0.2.11",
        "ips": {"includes": ["192.0.2.11/32", "2001:db8::11/128"]},
        "stun_servers": [f"{TURN1}:3478"],
        "turn_servers": [
            {
                "host": TURN1,
                "port": port,
                "protocol": protocol,
                "ttl": 3600,
                "secret_file": "/run/credentials/livekit-server.service/turn_secret",
            }
            for protocol, port in (("udp", 3478), ("tcp", 3478), ("tls", 5349))
        ],
    }


def test_livekit_has_the_values_and_types_that_were_set() -> None:
    found = livekit_yaml(full_box())
    assert found["keys"] == {
        "APIunit": SECRETS["livekit/api_secret"],
        "APIsecond": SECRETS["livekit/second"],
    }
    assert found["bind_addresses"] == ["127.0.0.1", "::1"]
    assert found["rtc"]["node_ip"] == "192.0.2.11"  # the public one, behind NAT too
    assert found["rtc"]["stun_servers"] == []  # TURN is that too
    assert {server["ttl"] for server in found["rtc"]["turn_servers"]} == {600}
    assert found["rtc"]["congestion_control"] == {"enabled": True}
    assert found["rtc"]["pli_throttle"] == {"low_quality": "1s"}
    assert found["logging"] == {
        "level": "warn",
        "pion_level": "info",
        "json": False,
        "component_levels": {"room": "debug"},
    }
    assert found["redis"] == {
        "address": "10.0.0.5:6379",
        "username": "sfu",
        "db": 2,
        "use_tls": True,
        "password": SECRETS["redis/password"],
    }
    assert found["prometheus"] == {
        "port": 6789,
        "username": "prometheus",
        "password": SECRETS["livekit/prometheus"],
    }
    assert found["webhook"] == {"urls": ["https://app.callready.test/h"], "api_key": "APIunit"}
    assert found["room"] == {"empty_timeout": 300, "max_participants": 20}
    assert found["limit"] == {"num_tracks": -1}


def test_none_leaves_livekits_defaults() -> None:
    config = {"rtc": None, "logging": None, "room": {"empty_timeout": None}}
    none = livekit_yaml(load((SFU1, "livekit.config", config)))
    assert none.pop("room") == {"empty_timeout": None}
    assert none == livekit_yaml(load())


@pytest.mark.parametrize(
    ("edits", "ips", "node_ip"),
    [
        ([], ["192.0.2.11/32", "2001:db8::11/128"], "192.0.2.11"),
        # What is on the interface; callers are told of the public one.
        ([("private_address", "10.0.0.11")], ["10.0.0.11/32", "2001:db8::11/128"], "192.0.2.11"),
        # Never the internal one.
        ([("address6", ...), ("internal_address", "10.0.0.9")], ["192.0.2.11/32"], "192.0.2.11"),
        (
            [("livekit.rtc.ips.includes", ["2001:db8:9::/48"])],
            ["192.0.2.11/32", "2001:db8::11/128", "2001:db8:9::/48"],
            "192.0.2.11",
        ),
        # With node_ip it would write that over every IPv4 address.
        (
            [("livekit.rtc.ips.includes", ["192.0.2.12", "192.0.2.11"])],
            ["192.0.2.11/32", "2001:db8::11/128", "192.0.2.12/32"],
            None,
        ),
        ([("livekit.rtc.ips", None)], None, "192.0.2.11"),
    ],
)
def test_callers_are_told_of_the_hosts_own_addresses(
    edits: list[tuple[str, Any]], ips: list[str] | None, node_ip: str | None
) -> None:
    rtc = livekit_yaml(load(*((SFU1, key, value) for key, value in edits)))["rtc"]
    assert rtc.get("ips") == (ips and {"includes": ips})
    assert rtc.get("node_ip") == node_ip


def test_nodes_of_a_cluster_choose_alike_unless_told_otherwise() -> None:
    assert livekit_yaml(cluster())["node_selector"] == {"kind": "cpuload", "sort_by": "tracks"}
    assert livekit_yaml(cluster())["region"] == "eu-west"
    assert {"node_selector", "region"}.isdisjoint(livekit_yaml(production()))
    own = {"kind": "any", "sort_by": "rooms"}
    edits = [(SFU1, "livekit.config", {"node_selector": own}), (SFU1, "region", "eu-west")]
    assert livekit_yaml(load(*edits))["node_selector"] == own
    assert livekit_yaml(load(*edits))["region"] == "eu-west"


def test_a_pool_of_fixed_users_is_handed_out_with_name_and_password() -> None:
    release = declare(fixed_users(), SFU1).release
    servers = livekit_yaml(fixed_users())["rtc"]["turn_servers"]
    assert {(s["username"], s["credential"]) for s in servers} == {("bob", SECRETS["turn/user"])}
    assert not any("secret_file" in server or "ttl" in server for server in servers)
    assert "/etc/livekit/turn_secret" not in release.files
    unit = release.files["/etc/systemd/system/livekit-server.service"].content.decode()
    assert "turn_secret" not in unit


def test_a_secret_of_any_characters_arrives_whole() -> None:
    nasty = 'it\'s "quoted": #1 {{ x }} \\ 100% ü & more, long enough'
    write_store({**SECRETS, "livekit/api_secret": nasty, "turn/calls": nasty[::-1]})
    assert livekit_yaml(load())["keys"] == {"APIunit": nasty}
    release = declare(load(), SFU1).release
    assert release.files["/etc/livekit/turn_secret"].content.decode() == nasty[::-1]


# turnserver.conf


def options(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


@pytest.mark.parametrize(
    ("version", "edits"),
    [("4.6.1", []), ("4.18.0", [("*", "turn.version", "4.18.0")]), ("4.10.0", [])],
)
def test_coturn_knows_every_key_and_has_none_deprecated(version: str, edits: list[Any]) -> None:
    fleet = load(("*", "turn.version", version), *edits)
    listed = DATA / f"coturn-{version}.txt"
    for host, pool in ((TURN1, "calls"), (TURN2, "avatar")):
        file = declare(fleet, host).release.files[f"/etc/coturn/{pool}.conf"]
        for key, value in options(file.content.decode()):
            assert coturn_keys.knows(version, key), key
            if listed.exists():
                argument = dict(line.split() for line in listed.read_text().splitlines())[key]
                assert (argument == "none") <= (value == ""), key
                assert (argument == "required") <= (value != ""), key


def test_both_families_are_listened_on_and_relayed_from() -> None:
    calls = options(
        declare(production(), TURN1).release.files["/etc/coturn/calls.conf"].content.decode()
    )
    for key in ("listening-ip", "relay-ip"):
        assert [v for k, v in calls if k == key] == ["192.0.2.21", "2001:db8::21"]
    assert not [v for k, v in calls if k == "external-ip"]


def test_behind_nat_the_private_address_is_used_and_the_public_one_told() -> None:
    conf = declare(full_box(), SFU1).release.files["/etc/coturn/calls.conf"].content.decode()
    found = options(conf)
    assert [v for k, v in found if k in ("listening-ip", "relay-ip")] == [
        "10.0.0.11",
        "2001:db8::11",
        "10.0.0.11",
        "2001:db8::11",
    ]
    assert ("external-ip", "192.0.2.11/10.0.0.11") in found
    # Both ways to the SFU: its public address and the one on the interface.
    assert [v for k, v in found if k == "allowed-peer-ip"] == [
        "192.0.2.11",
        "10.0.0.11",
        "2001:db8::11",
    ]


def test_relays_reach_what_the_sfu_tells_callers_of_and_no_internal_network() -> None:
    more = ["192.0.2.12", "2001:db8::12", "198.51.100.0/24"]  # the last may have others
    fleet = load(
        (SFU1, "internal_address", "10.0.0.9"),
        (TURN1, "internal_address", "2a01::21"),
        (SFU1, "livekit.rtc.ips.includes", more),
    )

    def peers(host: str, pool: str, key: str) -> list[str]:
        text = declare(fleet, host).release.files[f"/etc/coturn/{pool}.conf"].content.decode()
        assert "10.0.0.9" not in re.sub("denied-peer-ip=.*", "", text)
        assert "2a01::21" not in re.sub("denied-peer-ip=.*", "", text)
        return [value for name, value in options(text) if name == key]

    allowed = ["192.0.2.11", "2001:db8::11", "192.0.2.12", "2001:db8::12"]
    assert peers(TURN1, "calls", "allowed-peer-ip") == allowed
    assert peers(TURN2, "avatar", "denied-peer-ip")[-1] == "2a01::21"


def test_extra_keys_are_written_as_coturn_reads_them() -> None:
    found = options(
        declare(full_box(), SFU1).release.files["/etc/coturn/calls.conf"].content.decode()
    )
    assert found[-4:] == [
        ("max-bps", "1000000"),
        ("verbose", ""),
        ("aux-server", "192.0.2.11:3480"),
        ("aux-server", "192.0.2.11:3481"),
    ]


def between(low: bytes, peer: bytes, high: bytes) -> bool:
    """coturn 4.6.1: IPv4 addresses are compared as numbers, IPv6 addresses byte by byte."""
    if len(peer) == 4:
        return low <= peer <= high
    return all(a <= b <= c for a, b, c in zip(low, peer, high, strict=True))


@pytest.mark.parametrize(
    ("path", "denied", "allowed"),
    [
        (
            "/etc/coturn/calls.conf",
            [
                "10.0.0.1",
                "8.8.8.8",
                "192.0.2.12",
                "::1",
                "::ffff:192.0.2.11",
                "2001:db8::12",
                "fd00::1",
                "ff02::1",
                "127.0.0.1",
                "169.254.169.254",
            ],
            ["192.0.2.11", "2001:db8::11"],
        ),
        (
            "/etc/coturn/avatar.conf",
            [
                "0.0.0.0",
                "10.0.0.1",
                "10.255.255.255",
                "100.64.0.1",
                "127.0.0.1",
                "169.254.169.254",
                "172.16.0.1",
                "172.31.255.255",
                "192.168.0.1",
                "198.18.0.1",
                "240.0.0.1",
                "255.255.255.255",
                "::1",
                "::ffff:10.0.0.1",
                "64:ff9b::a00:1",
                "fe80::1",
                "fd00::1",
                "2002:a00:1::",
                "2001::1",
                "100::1",
            ],
            [
                "8.8.8.8",
                "172.15.255.255",
                "172.32.0.0",
                "100.128.0.0",
                "11.0.0.0",
                "2a00::1",
                "2606:4700::1111",
            ],
        ),
    ],
)
def test_the_peer_policy_as_coturn_4_6_1_reads_it(
    path: str, denied: list[str], allowed: list[str]
) -> None:
    host = TURN1 if "calls" in path else TURN2
    rules = options(declare(production(), host).release.files[path].content.decode())

    def matches(key: str, peer: str) -> bool:
        address = ip_address(peer)
        for first, _, last in (value.partition("-") for name, value in rules if name == key):
            low, high = ip_address(first), ip_address(last or first)
            if low.version == address.version and between(low.packed, address.packed, high.packed):
                return True
        return False

    def granted(peer: str) -> bool:
        return matches("allowed-peer-ip", peer) or not matches("denied-peer-ip", peer)

    assert [peer for peer in denied if granted(peer)] == []
    assert [peer for peer in allowed if not granted(peer)] == []


# The packet filter, by the real nft in a network namespace of its own


def nft(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script with an empty ruleset and a /etc/passwd that has the user turnserver,
    which only hosts with coturn have (this machine may be one, with another number)."""
    users = re.sub("(?m)^turnserver:.*\n", "", Path("/etc/passwd").read_text())
    users += "turnserver:x:64999:64999::/nonexistent:/usr/sbin/nologin\n"
    (folder / "passwd").write_text(users)
    script = f"set -eu; PATH=$PATH:/usr/sbin:/sbin; mount --bind passwd /etc/passwd\n{commands}"
    return subprocess.run(
        ["unshare", "-rnm", "sh", "-c", script], cwd=folder, capture_output=True, text=True
    )


def recording() -> Fleet:
    """A host that records, also web pages, and may reach a network."""
    return recorded(("*", "egress.web", True), ("*", "egress.allowed_networks", ["10.0.0.0/24"]))


@pytest.mark.tools
@pytest.mark.parametrize("case", [*CASES, "recording"])
def test_nft_takes_the_rules(case: str, tmp_path: Path) -> None:
    make, hosts = CASES.get(case, (recording, [REC1]))
    for host in hosts:
        (tmp_path / "rules").write_bytes(declare(make(), host).release.files[RULES].content)
        run = nft("nft -c -f rules && nft -f rules && nft -f rules && nft list ruleset", tmp_path)
        assert (run.returncode, run.stderr) == (0, "")
        # Loaded twice, there once.
        assert run.stdout.count("chain input {") == 1


@pytest.mark.tools
def test_what_is_open_is_what_the_plan_says_and_no_other_table_is_touched(tmp_path: Path) -> None:
    (tmp_path / "rules").write_bytes(declare(full_box(), SFU1).release.files[RULES].content)
    run = nft(
        "nft add table ip docker; nft add chain ip docker nat; nft -f rules; nft -f rules\n"
        "nft list table ip docker; nft list table inet callready",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    docker, table = re.split(r"(?m)^(?=table )", run.stdout)[1:]
    assert "chain nat" in docker
    chain_ = table.partition("chain input")[2].partition("}\n\t")[0]
    opened = re.findall(r"(?m)^\t\t(\w+ dport \S+) counter name (\S+) accept$", chain_)
    assert [match for match, _ in opened] == [
        *("tcp dport 2222", "tcp dport 7881", "udp dport 50000-60000", "udp dport 3478"),
        *("tcp dport 3478", "tcp dport 5349", "udp dport 60001-62767", "udp dport 3479"),
        *("tcp dport 3479", "udp dport 62768-65535", "tcp dport 62768-65535", "tcp dport 443"),
        "udp dport 40000-40010",
    ]
    counters = set(re.findall(r"(?m)^\tcounter (\S+) \{", table))
    assert {name.strip('"') for _, name in opened} <= counters
    assert "policy drop" in table
    verdict = re.compile(r"\b(accept|drop|notrack|jump)\b")
    counted = [line for line in table.splitlines() if verdict.search(line) and "hook" not in line]
    assert counted and all("counter" in line for line in counted)
    assert "skuid 64999" in table or 'skuid "turnserver"' in table


@pytest.mark.tools
def test_a_port_that_is_not_one_is_seen(tmp_path: Path) -> None:
    rules = (
        declare(load(), SFU1).release.files[RULES].content.replace(b"dport 7881", b"dport 78810")
    )
    (tmp_path / "rules").write_bytes(rules)
    assert nft("nft -c -f rules", tmp_path).returncode != 0


def test_what_is_open_to_some_is_so_for_each_address_family() -> None:
    rules = declare(some(), SFU1).release.files[RULES].content.decode()
    found = re.findall(r"(?m)^ +(.*) counter name (?:firewall|livekit.prom)\S+ accept$", rules)
    assert found == [
        "ip saddr { 203.0.113.9/32 } tcp dport 6789",
        "ip saddr { 10.0.0.0/24, 192.0.2.21/32, 192.0.2.22/32 } tcp dport 6379",
        "ip6 saddr { 2001:db8::21/128, fd00::22/128 } tcp dport 6379",
        "ip6 saddr { fe80::/10 } ip6 nexthdr 112",
        "udp dport 500",
        *("ip protocol 50", "ip6 nexthdr 50"),
        *("ip protocol 51", "ip6 nexthdr 51"),
        *("ip protocol 99", "ip6 nexthdr 99"),
    ]


def test_a_group_of_others_is_a_source_and_gets_nothing_of_callready() -> None:
    fleet = some()
    assert fleet.warnings == []
    assert not declare(fleet, "monitor1").release.files
    (warning,) = load(("monitor1", "groups", ["scrapers"])).warnings
    assert "monitor1: is in none of the groups" in warning


def test_the_rate_of_one_client_is_the_inventorys() -> None:
    def rates(*edits: Any) -> set[str]:
        rules = declare(load(*edits), TURN1).release.files[RULES].content.decode()
        return set(re.findall(r"rate over .*? (?=packets)|turn_clients6?", rules))

    assert "rate over 1000/second burst 10000 " in rates()
    assert "rate over 7/second burst 70 " in rates((TURN1, "firewall.turn_requests_per_client", 7))
    assert rates((TURN1, "firewall.turn_requests_per_client", 0)) == set()


# Units, by the real systemd-analyze


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, pair: tuple[str, str]) -> Path:
    """A root folder with the units of a host that has all of them, and programs for them."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        write_store(SECRETS)
        Path("certificates").mkdir()
        for path, name in zip(pair, ("chain.pem", "key.pem"), strict=True):
            Path("certificates", name).symlink_to(path)
        release = declare(box(), SFU1).release
        release.files |= declare(watched(), SFU1).release.files
    for path, file in release.files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
    assert release.archive
    programs = ["/usr/bin/turnserver", release.archive.binary, "/bin/kill", "/usr/sbin/nft"]
    programs += [f"/usr/bin/prometheus-{name}-exporter" for name in ("node", "exporter")]
    for program in [*programs, *(p for p, f in release.files.items() if f.mode == 0o755)]:
        target = root / program.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("/bin/true", target)
    shutil.copytree("/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    return root


UNITS = [
    *("livekit-server.service", "turnserver@calls.service", EXPORTERS, NODE_EXPORTER, MEASURE),
    "callready-firewall.service",
]


@pytest.mark.tools
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_has_nothing_to_say_about_a_unit(root: Path, unit: str) -> None:
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", unit],
        capture_output=True,
        text=True,
    )
    ours = [line for line in run.stderr.splitlines() if re.search("callready|livekit|turnse", line)]
    assert (run.returncode, ours) == (0, [])


@pytest.mark.tools
@pytest.mark.parametrize(
    ("unit", "most"), [*zip(UNITS[:3], repeat(12)), (NODE_EXPORTER, 16), (MEASURE, 18)]
)
def test_a_units_exposure_is_low(root: Path, unit: str, most: int) -> None:
    """The same tool rates Debian's own coturn unit 9.0; 1.1 is what was reached and kept, but where
    a unit looks at the whole host."""
    run = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=yes",
            "--no-pager",
            f"--threshold={most}",
            f"--root={root}",
            unit,
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-300:] + run.stderr


# What clients are told


def test_the_app_gets_the_same_keys_and_uris_as_livekit() -> None:
    fleet = full_box()
    environment = declare(fleet, SFU1).release.environments["/srv/app/.env"]
    values = dict(line.split("=", 1) for line in environment.text.get_secret_value().splitlines())
    assert values == {
        "LIVEKIT_URL": "wss://livekit.callready.test",
        "LIVEKIT_API_KEY": "APIunit",
        "LIVEKIT_API_SECRET": livekit_yaml(fleet)["keys"]["APIunit"],
        "STUN_URIS": f"stun:{SFU1}:3478",
        "TURN_URIS": ",".join(turn_uris(fleet, SFU1, "app")),
        "TURN_SECRET": SECRETS["turn/calls"],
        "TURN_TTL": "600",
    }
    assert (environment.owner, environment.units) == ("app", ("app.service",))


# The edge and privileged ports


def haproxy(*edits: Edit) -> str:
    files = declare(load(("*", "edge", {}), *edits), SFU1).release.files
    return files["/etc/haproxy/haproxy.cfg"].content.decode()


@pytest.mark.parametrize(
    ("edits", "port"),
    [([], ""), ([("*", "edge.port", 8443), ("*", "livekit.url", f"wss://{SFU1}:8443")], ":8443")],
)
def test_a_redirect_leads_to_the_edges_own_port(edits: list[Edit], port: str) -> None:
    """Whatever port the client called: only the name of its Host is taken over."""
    (rule,) = re.findall(r"http-request redirect .*", haproxy(*edits))
    assert f"location https://%[hdr(host),field(1,:),lower]{port}%[pathq] " in rule


def test_each_backend_has_a_time_out_of_its_own() -> None:
    config = haproxy(
        (SFU1, "groups", ["livekit", "app"]),
        (SFU1, "app", {"env_file": "/srv/app/.env", "url": "https://app.callready.test"}),
        (SFU1, "app.upstream", "127.0.0.1:8000"),
        ("*", "edge", {"livekit_timeout": 61, "app_timeout": 62, "client_timeout": 63}),
    )
    assert re.findall(r"backend to_(\w+)\n.*\n *timeout server (\d+)s", config) == [
        ("livekit_callready_test", "61"),
        ("app_callready_test", "62"),
    ]
    https = config.partition("frontend https\n")[2].partition("\nbackend")[0]
    assert "timeout client 63s" in https


def test_every_bind_of_the_edge_waits_for_no_address() -> None:
    fleet = edges()
    for host in (SFU1, TURN2):
        config = declare(fleet, host).release.files["/etc/haproxy/haproxy.cfg"].content.decode()
        binds = [line for line in config.splitlines() if line.startswith("    bind ")]
        assert binds and all("transparent" in line or "abns@" in line for line in binds)


@pytest.mark.parametrize(
    ("host", "unit", "edit"),
    [
        (TURN1, "turnserver@.service", (TURN1, "turn.pools.calls.listening_port", 80)),
        (TURN1, "turnserver@.service", (TURN1, "turn.pools.calls.tls_listening_port", 443)),
        (SFU1, "livekit-server.service", (SFU1, "livekit.port", 443)),
        (SFU1, "livekit-server.service", (SFU1, "livekit.rtc", {"tcp_port": 443})),
    ],
)
def test_a_unit_has_the_right_to_privileged_ports_where_it_has_one(
    host: str, unit: str, edit: Edit
) -> None:
    def lines(*edits: Edit) -> set[str]:
        file = declare(load(*edits), host).release.files[f"/etc/systemd/system/{unit}"]
        return set(file.content.decode().splitlines())

    granted = {
        "CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
    }
    before, after = lines(), lines(edit)
    assert granted <= after - before
    assert before - after == {
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "PrivateUsers=yes",
    }


@pytest.mark.parametrize(
    ("host", "edits", "set_"),
    [
        (TURN1, [], True),
        (TURN1, [(TURN1, "address6", ...)], False),
        (SFU1, [], False),
        (SFU1, [(SFU1, "livekit.bind_addresses", ["192.0.2.11", "2001:db8::11"])], True),
    ],
)
def test_who_binds_an_ipv6_address_need_not_wait_for_it(
    host: str, edits: list[Edit], set_: bool
) -> None:
    sysctls = declare(load(*edits), host).release.sysctls
    assert ("net.ipv6.ip_nonlocal_bind" in sysctls) == set_
