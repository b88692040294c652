"""Which hosts of a TURN pool callers are told of, by which URIs, and how a host joins a pool and
leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import yaml

from callready.probes import catalogue
from callready.release import android, refusals
from callready.settings.capacity import Calls, Machine, limits
from callready.settings.fleet import Fleet
from callready.settings.pools import MOST_URIS, handed_out
from callready.settings.problem import SettingsError
from callready.settings.uris import stun_uris, turn_uris
from tasks import declare
from tests.support.inventories import GROUP, SFU1, TURN1, TURN2, Edit, load
from tests.verify.servers import Server
from tests.verify.targets import Site

pytestmark = pytest.mark.usefixtures("project")

SFU2, SFU3, TURN3, APP1 = (f"{name}.callready.test" for name in ("sfu2", "sfu3", "turn3", "app1"))
NEW: dict[str, dict[str, Any]] = {
    SFU2: {"groups": ["livekit"], "address": "192.0.2.12"},
    SFU3: {"groups": ["livekit"], "address": "192.0.2.13"},
    TURN3: {"groups": ["turn"], "address": "192.0.2.23", "pools": ["calls"]},
    APP1: {"groups": ["app"], "address": "192.0.2.31", "app": {"env_file": "/srv/app/.env"}},
}
ONE_POOL: list[Edit] = [("*", "turn.pools.avatar", ...), (TURN2, "pools", ["calls"])]


def fleet(*edits: Edit, new: Sequence[str] = (SFU2, SFU3, TURN3)) -> Fleet:
    """Three SFUs with one Redis, and a pool of three TURN hosts."""
    added = [(name, key, value) for name in new for key, value in {**GROUP, **NEW[name]}.items()]
    redis: Edit = ("*", "livekit.redis", {"address": "10.0.0.5:6379"})
    return load(*added, redis, *ONE_POOL, *edits)


def told(of: Fleet, *names: str) -> list[list[str]]:
    """The TURN hosts that hosts name, in order."""
    return [list(dict.fromkeys(h.name for h, _ in handed_out(of, name))) for name in names]


def said(*edits: Edit) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        fleet(*edits)
    return [line.removeprefix("inventories/test: ") for line in str(refused.value).splitlines()]


def test_sfus_share_the_hosts_of_a_pool_and_a_caller_is_told_of_two() -> None:
    of = fleet()
    assert told(of, SFU1, SFU2, SFU3) == [[TURN1, TURN2], [TURN2, TURN3], [TURN3, TURN1]]
    assert turn_uris(of, SFU2) == [
        f"turn:{TURN2}:3478?transport=udp",
        f"turns:{TURN2}:5349?transport=tcp",
        f"turn:{TURN3}:3478?transport=udp",
        f"turns:{TURN3}:5349?transport=tcp",
    ]
    rtc = yaml.safe_load(declare(of, SFU2).release.files["/etc/livekit/livekit.yaml"].content)
    servers = rtc["rtc"]["turn_servers"]
    assert [(s["host"], s["protocol"]) for s in servers] == [
        *((TURN2, "udp"), (TURN2, "tls"), (TURN3, "udp"), (TURN3, "tls"))
    ]
    assert rtc["rtc"]["stun_servers"] == [] == of.warnings
    assert list(catalogue.ice_servers(of, SFU2)) == turn_uris(of, SFU2)


def test_each_sfu_is_verified_by_the_hosts_that_it_names_and_every_host_by_one() -> None:
    of = fleet()
    servers = {name: Server(declare(of, name), cast(Any, None)) for name in of.hosts}
    routes = Site("inventories/test", of, servers).routes()
    reached: dict[str, set[str]] = {}
    for route in routes:
        reached.setdefault(route.name, set()).add(route.turn.name if route.turn else "")
    assert reached == {
        SFU1: {"", TURN1, TURN2, TURN3},
        SFU2: {"", TURN2, TURN3},
        SFU3: {"", TURN3, TURN1},
    }
    assert len({str(route) for route in routes}) == len(routes)


def test_one_host_has_all_its_ways() -> None:
    of = load()
    assert stun_uris(of, SFU1) == [f"stun:{TURN1}:3478"]
    assert turn_uris(of, SFU1) == [
        f"turn:{TURN1}:3478?transport=udp",
        f"turn:{TURN1}:3478?transport=tcp",
        f"turns:{TURN1}:5349?transport=tcp",
    ]
    none = load(
        ("*", "livekit.turn_pool", None), ("*", "livekit.rtc.stun_servers", ["10.0.0.1:3478"])
    )
    assert turn_uris(none, SFU1) == stun_uris(none, SFU1) == []


def test_a_host_without_tls_keeps_tcp() -> None:
    of = fleet((TURN2, "turn.pools.calls.tls", False), new=[])
    assert turn_uris(of, SFU1) == [
        f"turn:{TURN1}:3478?transport=udp",
        f"turns:{TURN1}:5349?transport=tcp",
        f"turn:{TURN2}:3478?transport=udp",
        f"turn:{TURN2}:3478?transport=tcp",
    ]


def test_the_own_region_comes_first() -> None:
    here: list[Edit] = [(name, "region", "gra") for name in (SFU1, SFU3, TURN2, TURN3)]
    of = fleet(*here)
    assert told(of, SFU1, SFU3) == [[TURN2, TURN3], [TURN3, TURN2]]
    # Alone in its region: the first of the others beside the only host of its own.
    assert told(of, SFU2) == [[TURN1, TURN2]]
    assert told(fleet(*here, (TURN3, "region", "sbg")), SFU1, SFU3) == [
        [TURN2, TURN1],
        [TURN2, TURN3],
    ]


def test_the_app_and_android_are_told_no_more() -> None:
    of = fleet(
        *((APP1, key, value) for key, value in {**GROUP, **NEW[APP1]}.items()),
        (APP1, "livekit.redis", {"address": "10.0.0.5:6379"}),
        (APP1, "turn.pools.avatar", ...),
        (SFU1, "groups", ["livekit", "android"]),
        (SFU1, "android", {"checkout": "/srv/android"}),
    )
    env = declare(of, APP1).release.environments["/srv/app/.env"].text.get_secret_value()
    values = dict(line.split("=", 1) for line in env.splitlines())
    turn = values["TURN_URIS"].split(",")
    assert len(turn) == MOST_URIS and turn == turn_uris(of, SFU1)
    # Never nothing: backends split the text. examples/backend leaves it out where there are four.
    assert values["STUN_URIS"] == f"stun:{TURN1}:3478"
    settings = yaml.safe_load([*android.files(of, SFU1).values()][-1])
    assert (settings["stun_uris"], settings["turn_uris"]) == ([], turn)


def test_own_stun_servers_count_too() -> None:
    other = ["stun.test:3478"]
    rtc = ("*", "livekit.rtc.stun_servers", other)
    # In place of ours, of which callers have no need: TURN over UDP is STUN too.
    assert stun_uris(load(rtc), SFU1) == []
    no_tls: list[Edit] = [rtc, ("*", "turn.tls", False)]
    assert stun_uris(load(*no_tls), SFU1) == [f"stun:{TURN1}:3478"]
    assert said((SFU2, "livekit.rtc.stun_servers", other)) == [
        f"{SFU2}: livekit.rtc.stun_servers: 1 and the 4 URIs of TURN, which is STUN too, are more "
        "than the 4 that a caller may be told of: clients ask each, and five make them slow; leave "
        "none"
    ]


def test_a_host_that_leaves_goes_on_serving_and_nobody_is_told_of_it() -> None:
    before, leaving = fleet(), fleet((TURN2, "hand_out", False))
    assert told(leaving, SFU1, SFU2, SFU3) == [[TURN1, TURN3], [TURN3, TURN1], [TURN1, TURN3]]
    assert declare(leaving, TURN2).release.id == declare(before, TURN2).release.id
    assert declare(leaving, TURN2).promises == declare(before, TURN2).promises
    # Then it is taken out, and no SFU changes any more.
    gone = fleet((TURN2, "groups", []), (TURN2, "pools", ...))
    for name in (SFU1, SFU2, SFU3):
        assert turn_uris(gone, name) == turn_uris(leaving, name)


def test_a_host_that_joins_at_the_end_leaves_the_first_sfu_alone() -> None:
    without = fleet(new=[SFU2])
    assert told(without, SFU1, SFU2) == [[TURN1, TURN2], [TURN2, TURN1]]
    assert told(fleet(new=[SFU2, TURN3]), SFU1, SFU2) == [[TURN1, TURN2], [TURN2, TURN3]]


def test_callers_are_always_told_of_one() -> None:
    why = (
        "hand_out: is False on every host of pool calls, and callers would be told of none: leave "
        "one, or name another pool in livekit.turn_pool"
    )
    assert said(("*", "hand_out", False))[-1] == f"{TURN1}, {TURN2}, {TURN3}: {why}"
    assert said((SFU1, "hand_out", False)) == [
        f"{SFU1}: hand_out: is False, and the host runs no TURN pool: leave it out"
    ]


def test_a_host_that_no_sfu_names_is_said() -> None:
    (warning,) = fleet(new=[TURN3]).warnings
    assert f"{TURN3}: pools: no caller is told of it: an SFU names 2 hosts of pool cal" in warning
    assert not fleet((TURN3, "hand_out", False), new=[TURN3]).warnings


def test_a_host_that_callers_are_told_of_is_not_cleaned() -> None:
    of = fleet()
    (why,) = refusals.of_removal(declare(of, TURN2), [TURN2])
    assert why.startswith(f"{SFU1}, {SFU2} would go on sending callers here: set hand_out = False")
    free = [
        (of, SFU1, [SFU1]),
        (of, TURN2, [SFU1, SFU2, TURN2]),  # with all who name it
        (fleet((TURN2, "hand_out", False)), TURN2, [TURN2]),
        (load(), TURN1, [TURN1]),  # no other can be named in its place
    ]
    for each, name, removed in free:
        assert not [*refusals.of_removal(declare(each, name), removed)]


def test_capacity_counts_what_callers_are_told_of() -> None:
    def callers(of: Fleet, name: str, what: str = "relay ports of pool calls") -> int | None:
        seen = limits(of, of[name], Machine(4, 262_144, 1000, {}), Calls("video", 4, 4, 0.25))
        return next((each.participants for each in seen if each.what == what), None)

    # 2 URIs x 1 family x 2 peer connections: all callers of one SFU, two thirds of those of three.
    assert callers(fleet(new=[]), TURN2) == 16_384 // 4
    assert callers(fleet(), TURN2) == 16_384 // 3
    assert callers(fleet((TURN2, "hand_out", False)), TURN2) is None
    # Any of the two may relay a quarter of 300 + 720 packets/s of those who are told of it.
    assert callers(fleet(new=[]), TURN2, "processor") == int(0.8 * 200_000 / 255)
    assert callers(fleet(), TURN2, "processor") == int(0.8 * 200_000 / (255 * 2 / 3))
