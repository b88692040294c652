"""The Redis that SFUs share: who reaches it where and as whom, what is refused, and what its host
and theirs get."""

import base64
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from pydantic import SecretStr

from callready.release.facts import Facts, UnitFact
from callready.release.plan import plan
from callready.rollout.rollout import NODE_ID
from callready.rotate import chosen
from callready.settings import livekit_keys
from callready.settings.fleet import FLEET_CA
from callready.settings.ports import EGRESS as EGRESS_UNIT
from callready.settings.ports import LIVEKIT, REDIS, port_plan
from callready.settings.problem import SettingsError
from callready.settings.redis import FILES, RedisAccess
from tasks import declare
from tests.support.inventories import (
    MON1,
    REC1,
    RECORDED,
    SECRETS,
    SFU1,
    TURN1,
    TURN2,
    WATCHED,
    Edit,
    load,
    merged,
    write_store,
)
from tests.verify.cluster import LIST_NODES, split
from tests.verify.redis import asking, servers

pytestmark = pytest.mark.usefixtures("project")

SETTINGS = {"livekit_password": "secret:redis/livekit", "egress_password": "secret:redis/egress"}
HAVE: list[Edit] = [("*", "redis", SETTINGS), ("*", "fleet_ca", "secret:fleet/ca")]
# Redis beside the only SFU; and two SFUs with the Redis of a third host.
ONE: list[Edit] = [*HAVE, (SFU1, "groups", ["livekit", "redis"])]
TWO: list[Edit] = [
    *HAVE,
    (TURN1, "groups", ["livekit"]),
    (TURN1, "pools", ...),
    (TURN2, "groups", ["turn", "redis"]),
    (TURN2, "pools", ["calls"]),
    ("*", "turn.pools.avatar", ...),
]
# Two SFUs, and a host that has Redis and nothing else.
APART: list[Edit] = [
    *HAVE,
    (TURN1, "groups", ["livekit", "turn"]),
    (TURN1, "turn.pools.calls.min_port", 60001),
    (TURN2, "groups", ["redis"]),
    (TURN2, "pools", ...),
    ("*", "turn.pools.avatar", ...),
]
# The host of Redis is an SFU too, and has another address itself.
BEHIND_NAT: list[Edit] = [
    (TURN2, "groups", ["turn", "redis", "livekit"]),
    (TURN2, "turn.pools.calls.min_port", 60001),
    (TURN2, "private_address", "10.9.9.9"),
]
INSIDE: list[Edit] = [
    (name, "internal_address", f"10.0.0.{n}") for n, name in enumerate((SFU1, TURN1, TURN2), 1)
]
UNIT_FILE, CONFIG = f"/etc/systemd/system/{REDIS}", "/etc/callready/redis/redis.conf"
ACL = "/etc/callready/redis/users.acl"


def access(*edits: Edit, of: str = SFU1) -> RedisAccess:
    found = load(*edits).redis_for(of, "livekit")
    assert found
    return found


def redis_of_livekit(*edits: Edit) -> dict[str, Any]:
    """As livekit.yaml has it."""
    file = declare(load(*edits), SFU1).release.files["/etc/livekit/livekit.yaml"]
    found: dict[str, Any] = yaml.safe_load(file.content)["redis"]
    return found


def files(*edits: Edit, of: str) -> dict[str, str]:
    found = declare(load(*edits), of).release.files.items()
    return {path: file.content.decode() for path, file in found}


def said(*edits: Edit) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load(*edits)
    return [line.removeprefix("inventories/test: ") for line in str(refused.value).splitlines()]


def test_beside_its_sfu_it_is_on_loopback() -> None:
    password = SECRETS["redis/livekit"]
    assert redis_of_livekit(*ONE) == {
        "address": "127.0.0.1:6379",
        "db": 0,
        "username": "livekit",
        "password": password,
    }
    found = files(*ONE, of=SFU1)
    assert {"bind 127.0.0.1", "port 6379"} <= {*found[CONFIG].splitlines()}
    assert "tls" not in found[CONFIG] and "fleet" not in found[UNIT_FILE]
    assert f"After=network-online.target {REDIS}\n" in found[f"/etc/systemd/system/{LIVEKIT}"]
    assert "6379" not in found["/etc/callready/nftables.conf"]
    assert load(*ONE, ("*", "fleet_ca", ...))


def test_from_another_host_it_is_reached_over_tls() -> None:
    assert redis_of_livekit(*TWO) == {
        "address": "192.0.2.22:6379",
        "db": 0,
        "username": "livekit",
        "password": SECRETS["redis/livekit"],
        "tls": {"enabled": True, "ca_cert_file": FLEET_CA},
    }
    found, sfu = files(*TWO, of=TURN2), files(*TWO, of=SFU1)
    assert {"bind 192.0.2.22", "port 0", "tls-port 6379"} <= {*found[CONFIG].splitlines()}
    assert "fleet.key:/etc/callready/fleet/host/key.pem\nUser=redis" in found[UNIT_FILE]
    rules = re.findall("(.*) dport 6379", found["/etc/callready/nftables.conf"])
    assert [each.strip() for each in rules] == [
        "ip saddr { 192.0.2.11/32, 192.0.2.21/32 } tcp",
        "ip6 saddr { 2001:db8::11/128, 2001:db8::21/128 } tcp",
    ]
    sfus = "192.0.2.11/32 192.0.2.21/32 2001:db8::11/128 2001:db8::21/128"
    allowed = f"localhost 192.0.2.22 {sfus}"  # an operator asks from the host itself
    assert f"IPAddressDeny=any\nIPAddressAllow={allowed}\n" in found[UNIT_FILE]
    # It knows Redis by this file, which it reads when it starts.
    assert FLEET_CA in sfu and "callready-redis" not in sfu[f"/etc/systemd/system/{LIVEKIT}"]
    fingerprints = {
        declare(load(*TWO, *edits), SFU1).release.services[LIVEKIT].fingerprint
        for edits in ([], [("*", "fleet_ca", ["secret:fleet/ca", "secret:monitor/password"])])
    }
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("edits", "of", "address", "listens"),
    [
        ([*TWO, *INSIDE], SFU1, "10.0.0.3:6379", "10.0.0.3"),
        ([*TWO, *INSIDE[1:]], SFU1, "192.0.2.22:6379", "192.0.2.22"),
        ([*TWO, (TURN2, "private_address", "10.9.9.9")], SFU1, "192.0.2.22:6379", "10.9.9.9"),
        ([*TWO, *BEHIND_NAT[:2]], TURN2, "192.0.2.22:6379", "192.0.2.22"),
        ([*TWO, *BEHIND_NAT], TURN2, "10.9.9.9:6379", "10.9.9.9"),
        ([*TWO, ("*", "redis.port", 7000)], TURN1, "192.0.2.22:7000", "192.0.2.22"),
        (
            [*APART, *INSIDE, (TURN2, "address", ...), (TURN2, "internal_address", "fd00::3")],
            SFU1,
            "[fd00::3]:6379",
            "fd00::3",
        ),
    ],
    ids=[
        "inside",
        "one has no inside",
        "behind NAT",
        "its own SFU",
        "own, NAT",
        "port",
        "inside alone",
    ],
)
def test_where_it_is(edits: list[Edit], of: str, address: str, listens: str) -> None:
    assert access(*edits, of=of).address == address
    assert f"bind {listens}\n" in files(*edits, of=TURN2)[CONFIG]


def test_a_redis_of_ones_own_comes_first() -> None:
    own = {"address": "10.0.0.5:6379", "use_tls": True, "password": "secret:redis/password"}
    found = access(*TWO, (SFU1, "livekit.url", "wss://a.test"), (SFU1, "livekit.redis", own))
    assert found[:-1] == ("10.0.0.5:6379", None, SecretStr(SECRETS["redis/password"]), 0, True, "")
    fleet = load(*TWO, (SFU1, "livekit.redis", own), (TURN1, "livekit.redis", own))
    assert fleet.redis_for(TURN2, "egress") == fleet.redis_for(SFU1, "livekit")
    assert redis_of_livekit(*TWO, ("*", "livekit.redis", own))["use_tls"]
    assert load().redis_for(SFU1, "livekit") is None


def test_users_may_do_what_they_need() -> None:
    acl = files(*TWO, of=TURN2)[ACL].splitlines()
    hashes = [hashlib.sha256(SECRETS[f"redis/{user}"].encode()) for user in ("livekit", "egress")]
    assert acl[0] == "user default off"
    assert [line.split()[:4] for line in acl[1:]] == [
        ["user", name, "on", f"#{digest.hexdigest()}"]
        for name, digest in zip(("livekit", "egress"), hashes, strict=True)
    ]
    assert all(" ~* &* -@all +ping " in line and "+@" not in line for line in acl[1:])
    release = declare(load(*TWO), TURN2).release
    assert release.files[ACL].mode == 0o600
    assert "egress" not in files(*TWO, ("*", "redis.egress_password", ...), of=TURN2)[ACL]


def test_debians_own_does_not_start_and_an_operators_stays() -> None:
    release = declare(load(*ONE), SFU1).release
    assert list(release.new_masks) == ["redis-server.service"]
    lines = [step.line for step in plan(release, Facts(packages={"redis-server": "7"})).install]
    assert not any("redis" in line for line in lines)


def test_rotation_changes_redis_and_then_who_uses_it() -> None:
    """LiveKit restarts in phase 2 alone, and Redis then not."""
    names = ["redis/egress", "redis/livekit"]
    assert chosen(load(*TWO), merged(*TWO), "redis") == ("redis", names)
    assert chosen(load(*TWO), merged(*TWO), names[0]) == ("redis", names[:1])
    store = {**SECRETS}
    was = None
    for phase, beside in enumerate(({}, {"next": 1}, {"previous": 2}, {"retired": 3})):
        for name in names:
            new, old = f"{SECRETS[name]}-new", SECRETS[name]
            store[name] = new if phase > 1 else old
            for end in ("next", "previous", "retired"):
                store.pop(f"{name}.{end}", None)
            for end in beside:
                store[f"{name}.{end}"] = new if end == "next" else old
        write_store(store)
        now = [
            declare(load(*TWO), host).release.services[unit].given
            for host, unit in ((TURN2, REDIS), (SFU1, LIVEKIT))
        ]
        if was:
            changed = [a != b for a, b in zip(was, now, strict=True)]
            assert changed == [phase != 2, phase == 2]
        was = now


def test_the_plan_says_what_a_restart_does() -> None:
    release = declare(load(*ONE), SFU1).release
    release.drain = 60
    old = UnitFact("loaded", "active", "enabled", 1, False, "old", "/usr/bin/redis-server")
    found = plan(release, Facts(units={REDIS: old}))
    assert f"restarting {REDIS}: calls go on; a join waits until it is back, " in found.notes[-1]
    assert not any(f"drain {REDIS}" in step.line for step in found.steps)


@pytest.mark.parametrize(
    ("edits", "drain"),
    [
        ([], ""),
        (ONE, ""),
        (TWO, "TERM"),
        ([*TWO, *BEHIND_NAT], "TERM"),
        ([*APART, (TURN1, "groups", ["turn"])], ""),
        ([(SFU1, "livekit.redis", {"address": "10.0.0.5:6379"})], ""),
        (
            [
                *TWO,
                (TURN1, "livekit.url", "wss://other.callready.test"),
                ("*", "livekit.redis", {"address": "127.0.0.1:6379"}),
            ],
            "",
        ),
    ],
    ids=[
        "none",
        "one SFU",
        "two SFUs",
        "three, one with NAT",
        "one SFU, Redis elsewhere",
        "of one's own",
        "one each",
    ],
)
def test_a_node_is_told_to_drain_where_another_one_takes_its_calls(
    edits: list[Edit], drain: str
) -> None:
    """Alone it would take no calls for as long as it waits (`deploy.drain`)."""
    assert declare(load(*edits), SFU1).release.services[LIVEKIT].drain == drain


REGIONS = {"kind": "regionaware", "regions": [{"name": n, "lat": 1.5, "lon": 2.5} for n in "ab"]}


@pytest.mark.parametrize("regions", ["", "aa", "ab"])
def test_the_plan_says_what_draining_a_node_means(regions: str) -> None:
    edits: list[Edit] = [(SFU1, "deploy", {"drain": 600})]
    for host, region in zip((SFU1, TURN1), regions, strict=False):
        edits.append((host, "region", region))
        edits.append((host, "livekit.config", {"node_selector": REGIONS}))
    release = declare(load(*TWO, *edits), SFU1).release
    old = UnitFact("loaded", "active", "enabled", 1, False, "old", "/usr/bin/livekit-server")
    found = plan(release, Facts(units={LIVEKIT: old}))
    means, waits = found.notes[-2:]
    assert ("the only SFU of region a: its new calls go to others" in means) == (regions == "ab")
    assert "waiting up to 600 s for them first, and for the WebSockets that it relays" in waits
    assert "no new rooms until it restarts: if the deploy is stopped (Ctrl-C)" in waits
    steps = [step.line for step in found.steps]
    wait = "drain_node 600 tcp/7880 tcp/7881 tcp/7880 tcp/7881"
    assert steps.index(wait) < [line.split()[0] for line in steps].index("arm")


def test_who_takes_it_is_in_the_port_plan() -> None:
    uses = {
        name: [
            (use.first, use.open_to) for use in port_plan(load(*edits)[name]) if use.unit == REDIS
        ]
        for name, edits in ((SFU1, ONE), (TURN2, TWO))
    }
    assert uses == {SFU1: [(6379, "this host")], TURN2: [(6379, "livekit")]}


@pytest.mark.parametrize(
    ("edits", "lines"),
    [
        (
            [(SFU1, "groups", ["livekit", "redis"])],
            [
                f"{SFU1}: redis: is missing: callready sets up Redis on the host of group redis "
                '(docs/redis.md); write {"livekit_password": "secret:redis/livekit"}; a group of '
                "your own needs another name"
            ],
        ),
        (
            HAVE,
            [
                f"{SFU1}, {TURN1}, {TURN2}: redis: is set, and no host is in group redis: put one "
                "into it, or take redis out"
            ],
        ),
        (
            [*TWO, (SFU1, "groups", ["livekit", "redis"])],
            [f"{SFU1}, {TURN2}: are in group redis, and all SFUs share one: take the others out"],
        ),
        (
            [*TWO, ("*", "fleet_ca", ...)],
            [
                f"{TURN2}, {SFU1}, {TURN1}: fleet_ca: is missing: SFUs know the Redis of {TURN2} by "
                'it, over TLS; write "secret:fleet/ca" once for all hosts'
            ],
        ),
        (
            [*TWO, (SFU1, "fleet_ca", "secret:monitor/password")],
            [
                f"{TURN2}, {SFU1}, {TURN1}: fleet_ca: differs: the Redis of {TURN2} and those who "
                "use it have one in common; set it once"
            ],
        ),
        (
            [*TWO, (TURN2, "firewall.enabled", False)],
            [
                f"{TURN2}: redis.port: needs the packet filter, which firewall.enabled = False "
                "leaves out: enable it"
            ],
        ),
        (
            [*APART, (TURN2, "address", ...)],
            [
                f"{TURN2}: address: is missing: the Redis of {TURN2} and those who use it know each "
                "other by it"
            ],
        ),
        (
            [*ONE, ("rec1", "groups", ["egress"]), (SFU1, "redis.egress_password", ...)],
            [
                f"{SFU1}: redis.egress_password: is missing: hosts of group egress use it; write "
                '"secret:redis/egress"'
            ],
        ),
    ],
)
def test_what_does_not_fit_is_refused(edits: list[Edit], lines: list[str]) -> None:
    found = said(*edits)
    assert [line for line in lines if line not in found] == [], found


def test_a_host_with_an_inside_alone_is_watched_from_inside() -> None:
    edits: list[Edit] = [*APART, *INSIDE, *WATCHED, (TURN2, "address", ...)]
    edits.append((TURN1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}))
    file = declare(load(*edits), MON1).release.files["/etc/callready/monitor/prometheus.yml"]
    assert b'"10.0.0.3:9998"' in file.content
    assert said(*edits, (MON1, "internal_address", ...)) == [
        f"{TURN2}: address: is missing: by it the monitor asks for metrics; or give both an "
        "internal_address"
    ]


def test_one_that_nobody_uses_is_a_warning() -> None:
    own = ("*", "livekit.redis", {"address": "10.0.0.5:6379"})
    (warning,) = load(*ONE, own).warnings
    assert "redis: nobody uses it: no host is in group livekit, or livekit.redis is anot" in warning


# One of the operator's own

SENTINEL = {
    "sentinel_addresses": ["10.0.0.7:26379", "10.0.0.6:26379"],
    "sentinel_master_name": "calls",
    "sentinel_username": "watch",
    "sentinel_password": "secret:sudo/prod",
    "username": "sfu",
    "password": "secret:redis/password",
}
CLUSTER = {"cluster_addresses": ["10.0.0.5:6379", "redis.test:6380"]}
TLS = {
    "server_name": "redis.test",
    "ca_cert_file": "redis/ca.pem",
    "client_cert_file": "redis/client.pem",
    "client_key_file": "redis/client.key",
}
PEM = {"ca.pem": "the authority", "client.pem": "a certificate", "client.key": "its key"}


@pytest.fixture
def redis_files(project: Path) -> None:
    Path("redis").mkdir()
    for name, text in PEM.items():
        Path("redis", name).write_text(text)


def of_own(redis: dict[str, Any]) -> list[Edit]:
    return [
        *RECORDED,
        ("*", "redis", ...),
        (SFU1, "groups", ["livekit"]),
        ("*", "livekit.redis", redis),
    ]


def test_sentinel_names_redis_and_time_outs_do_not_take_live_nodes_for_dead() -> None:
    found = redis_of_livekit(("*", "livekit.redis", {**SENTINEL, "db": 2, "write_timeout": 900}))
    assert found == {
        "sentinel_addresses": ["10.0.0.7:26379", "10.0.0.6:26379"],
        "sentinel_master_name": "calls",
        "sentinel_username": "watch",
        "sentinel_password": SECRETS["sudo/prod"],
        "username": "sfu",
        "password": SECRETS["redis/password"],
        "db": 2,
        "dial_timeout": 2000,
        "read_timeout": 2000,
        "write_timeout": 900,
    }


def test_a_cluster_and_the_pool_of_connections() -> None:
    more = {"max_redirects": 0, "pool_size": 20, "pool_timeout": 4}
    assert redis_of_livekit(("*", "livekit.redis", {**CLUSTER, **more})) == {
        **CLUSTER,
        "db": 0,
        "max_redirects": 0,
        "pool_size": 20,
        "pool_timeout": "4s",
    }


@pytest.mark.parametrize("own", [SENTINEL, CLUSTER, {"address": "redis.test:6379"}])
@pytest.mark.usefixtures("redis_files")
def test_livekit_and_egress_have_every_key_and_file(own: dict[str, Any]) -> None:
    networks: Edit = ("*", "egress.allowed_networks", ["10.0.0.0/24"])
    fleet = load(*of_own({**own, "tls": TLS}), networks)
    sfu, recorder = declare(fleet, SFU1).release, declare(fleet, REC1).release
    both = [
        yaml.safe_load(release.files[file].content)["redis"]
        for release, file in (
            (sfu, "/etc/livekit/livekit.yaml"),
            (recorder, "/etc/egress/egress.yaml"),
        )
    ]
    tls = [each.pop("tls") for each in both]
    assert both[0] == both[1]
    assert tls == [
        {
            "enabled": True,
            "insecure": False,
            "server_name": "redis.test",
            "ca_cert_file": ca,
            "client_cert_file": certificate,
            "client_key_file": key,
        }
        for ca, certificate, key in (
            (
                "/etc/callready/redis-ca.pem",
                "/etc/callready/redis-client.pem",
                "/run/credentials/livekit-server.service/redis_key",
            ),
            ("/etc/redis-ca.pem", "/etc/redis-client.pem", "/etc/redis-client.key"),
        )
    ]
    known = livekit_keys.TREE["redis"]
    assert isinstance(known, dict) and both[0].keys() | {"tls"} <= known.keys()
    assert isinstance(known["tls"], dict) and tls[0].keys() == known["tls"].keys()
    for release, unit in ((sfu, LIVEKIT), (recorder, EGRESS_UNIT)):
        files = {path: release.files[path] for path in FILES.values()}
        assert [file.content.decode() for file in files.values()] == list(PEM.values())
        assert [file.mode for file in files.values()] == [0o644, 0o644, 0o600]
        text = release.files[f"/etc/systemd/system/{unit}"].content.decode()
        assert "LoadCredential=redis_key:/etc/callready/redis-client.key\n" in text
        assert files[FILES["client_key_file"]].sha256 in release.services[unit].given
    for volume in (
        "/etc/callready/redis-ca.pem:/etc/redis-ca.pem:ro",
        "/etc/callready/redis-client.pem:/etc/redis-client.pem:ro",
        "/run/egress/redis-client.key:/etc/redis-client.key:ro",
    ):
        assert f"--volume={volume}," in text
    assert "%d/redis_key /run/egress/redis-client.key\n" in text


@pytest.mark.usefixtures("redis_files")
def test_a_new_authority_restarts_who_reads_it() -> None:
    def fingerprint() -> str:
        fleet = load(("*", "livekit.redis", {**CLUSTER, "tls": {"ca_cert_file": "redis/ca.pem"}}))
        return declare(fleet, SFU1).release.services[LIVEKIT].fingerprint

    was = fingerprint()
    Path("redis/ca.pem").write_text("another one")
    assert fingerprint() != was


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({}, "set exactly one of address, sentinel_addresses, cluster_addresses"),
        ({**CLUSTER, **SENTINEL}, ", not sentinel_addresses and cluster_addresses"),
        ({"sentinel_addresses": ["10.0.0.6:26379"]}, "sentinel_master_name is missing"),
        (
            {"address": "10.0.0.5:6379", "read_timeout": 500, "sentinel_master_name": "calls"},
            "sentinel_master_name, read_timeout count with sentinel_addresses only, and LiveKit",
        ),
        ({**SENTINEL, "max_redirects": 3}, "max_redirects count with cluster_addresses only"),
        ({**CLUSTER, "db": 1}, "a Redis Cluster has db 0 only: leave db out"),
        ({**CLUSTER, "use_tls": True, "tls": {}}, "use_tls says less than tls: leave use_tls out"),
        (
            {**CLUSTER, "tls": {"client_key_file": "x"}},
            "livekit.redis.tls: set client_cert_file and client_key_file, or none of them",
        ),
        ({**CLUSTER, "tls": {"ca_cert_file": "no.pem"}}, ".tls.ca_cert_file: no.pem: no such file"),
        (
            {"sentinel_addresses": ["10.0.0.6"], "sentinel_master_name": "x"},
            "10.0.0.6:26379",
        ),
        ({**SENTINEL, "sentinel_password": "plain"}, "is written in the inventory"),
    ],
)
def test_what_livekit_would_pass_over_is_refused(own: dict[str, Any], why: str) -> None:
    assert why in "\n".join(said((SFU1, "livekit.redis", own)))


def test_egress_cannot_know_where_a_sentinel_sends_it() -> None:
    assert "egress.allowed_networks: is missing: where Redis is, egress learns from Sentinel" in (
        "\n".join(said(*of_own(SENTINEL)))
    )
    rules = files(*of_own(CLUSTER), of=REC1)["/etc/callready/nftables.conf"]
    assert "ip daddr 10.0.0.5 tcp dport 6379 counter accept" in rules
    assert "ip daddr != @private4 tcp dport 6380 counter accept" in rules


def test_nodes_of_one_service_may_name_sentinels_in_another_order() -> None:
    two: list[Edit] = [(TURN1, "groups", ["turn", "livekit"]), ("*", "turn.min_port", 60001)]
    other = {**SENTINEL, "sentinel_addresses": SENTINEL["sentinel_addresses"][::-1]}
    fleet = load(*two, ("*", "livekit.redis", SENTINEL), (TURN1, "livekit.redis", other))
    assert fleet.cluster(SFU1) == [TURN1]
    wrong = {**other, "sentinel_master_name": "other"}
    lines = said(*two, ("*", "livekit.redis", SENTINEL), (TURN1, "livekit.redis", wrong))
    assert "livekit.redis: differs in address or db: " in lines[0]


class Answering:
    """A host whose scripts say what Sentinels and Redis would."""

    def __init__(self, *said: str) -> None:
        self.said, self.asked, self.host = [*said], list[str](), self

    def run(self, script: str) -> SimpleNamespace:
        sent = base64.b64decode(script.split()[1]).decode()
        self.asked.append(f"{sent}{script.partition('timeout 5 ')[2]}")
        return SimpleNamespace(stdout=self.said.pop(0))


def test_the_verification_asks_the_redis_that_a_sentinel_names() -> None:
    found = access(("*", "livekit.redis", SENTINEL))
    host = Answering("", "+OK\r\n*2\r\n$8\r\n10.0.0.9\r\n$4\r\n6380\r\n")
    at = servers(cast(Any, host), found)
    assert [(each.address, each.username) for each in at] == [("10.0.0.9:6380", "sfu")]
    assert "/dev/tcp/10.0.0.7/26379" in host.asked[0] and "/10.0.0.6/26379" in host.asked[1]
    assert f"AUTH\r\n$5\r\nwatch\r\n$9\r\n{SECRETS['sudo/prod']}\r\n" in host.asked[1]
    assert "get-master-addr-by-name\r\n$5\r\ncalls\r\n" in host.asked[1]
    assert servers(cast(Any, Answering("", "-NOAUTH\r\n")), found) == []


@pytest.mark.usefixtures("redis_files")
def test_the_verification_asks_each_node_as_livekit_does() -> None:
    of = access(("*", "livekit.redis", {**CLUSTER, "tls": TLS}))
    nodes = servers(cast(Any, Answering()), of)
    assert [each.address for each in nodes] == CLUSTER["cluster_addresses"]
    script = asking(nodes[0], [("PING",)])
    for option in (
        "-connect 10.0.0.5:6379 -servername redis.test -CAfile /etc/callready/redis-ca.pem ",
        "-cert /etc/callready/redis-client.pem -key /etc/callready/redis-client.key ",
        "-verify_return_error -verify_hostname redis.test ",
    ):
        assert option in script
    insecure = access(("*", "livekit.redis", {**CLUSTER, "tls": {"insecure": True}}))
    assert "verify" not in asking(servers(cast(Any, Answering()), insecure)[0], [("PING",)])


def test_a_redis_that_is_far_away_is_said_and_changes_nothing() -> None:
    release = declare(load(*TWO), SFU1).release
    assert release.redis == ("192.0.2.22", 6379)
    notes = [
        line
        for seconds in (0.0, 0.005, 0.0124)
        for line in plan(release, Facts(redis_rtt=seconds)).notes
        if line.startswith("Redis")
    ]
    assert notes == [
        "Redis is 12.4 ms away (at most 5 are good): each message of a join goes there and back; "
        "put it nearer to this host"
    ]
    for near in (ONE, [("*", "livekit.redis", SENTINEL)]):  # who is asked where it is, is not it
        assert declare(load(*near), SFU1).release.redis is None


class Node:
    """An SFU that says which node it is, and which it knows."""

    def __init__(self, name: str, node_id: str, *known: str) -> None:
        self.name, self.node_id, self.known, self.host = name, node_id, known, self

    def run(self, script: str) -> SimpleNamespace:
        if script == NODE_ID:
            return SimpleNamespace(stdout=f"{self.node_id}\n")
        assert script == LIST_NODES
        return SimpleNamespace(stdout="".join(f"| {each} | SERVING |\n" for each in self.known))


@pytest.mark.parametrize(
    ("known", "host"),
    [
        ({"one": "ac", "two": "b", "three": "ac"}, "two"),
        ({"one": "a", "two": "b"}, ""),
        ({"one": "abc", "two": "abc", "three": "abc"}, None),
        # It is not alive, or does not reach its Redis: another matter.
        ({"one": "ac", "two": "ac", "three": "ac"}, None),
        ({"one": "ac", "two": "", "three": "ac"}, None),
    ],
)
def test_the_sfu_that_does_not_know_the_others_is_named(
    known: dict[str, str], host: str | None
) -> None:
    nodes = [Node(name, id_, *ids) for (name, ids), id_ in zip(known.items(), "abc", strict=False)]
    found = split(cast(Any, nodes))
    assert (found and found.host) == host
    if found:
        assert found.key == "rooms-split" and "two sees 1 of" in " ".join(found.evidence)
