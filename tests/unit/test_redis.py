"""The Redis that SFUs share: who reaches it where and as whom, what is refused, and what its host
and theirs get."""

import hashlib
import re
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from callready.release.facts import Facts, UnitFact
from callready.release.plan import plan
from callready.rotate import chosen
from callready.settings.fleet import FLEET_CA
from callready.settings.ports import LIVEKIT, REDIS, port_plan
from callready.settings.problem import SettingsError
from callready.settings.redis import RedisAccess
from tasks import declare
from tests.support.inventories import (
    MON1,
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
    assert access(*TWO, (SFU1, "livekit.url", "wss://a.test"), (SFU1, "livekit.redis", own)) == (
        *("10.0.0.5:6379", None, SecretStr(SECRETS["redis/password"])),
        *(0, True, ""),
    )
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
