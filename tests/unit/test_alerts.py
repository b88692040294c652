"""The alerts, by the real promtool: each comes on its fault, in the words that operators get, and
stays away from the near miss; of a broken layer and those above it only the lowest pages."""

import contextlib
import json
import re
import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from callready import docs
from callready.release.render import render
from callready.settings.models import ROLES
from lab.run import wait_until
from tasks import declare
from tasks.monitor import FOLDER
from tests.support.inventories import MON1, watched

Series = dict[str, str]
INTERVAL, END, DAY = 15, 20 * 60, 86400  # seconds
TWENTY_MINUTES = END // INTERVAL  # scrapes
TO_APP = "to_app_example_com"


def always(value: float) -> str:
    """A value all the time."""
    return f"{value}x{TWENTY_MINUTES}"


def rising(step: float, start: float = 0) -> str:
    """More at each scrape."""
    return f"{start}+{step}x{TWENTY_MINUTES}"


def series(metric: str, values: str, /, **labels: str) -> Series:
    """One series; the values as promtool writes them."""
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {f"{metric}{{{inside}}}": values}


def succeeded(kind: str, values: str, host: str, **labels: str) -> Series:
    """The results of a probe of the synthetic caller."""
    labels = {"probe": kind, "host": host, "family": "4", **labels}
    return series("callready_probe_success", values, **labels)


def ran(kind: str, values: str, host: str, **labels: str) -> Series:
    """When it did."""
    labels = {"probe": kind, "host": host, "family": "4", **labels}
    return series("callready_probe_last_run_seconds", values, **labels)


def probed(kind: str, ok: int, host: str, **labels: str) -> Series:
    """A probe that goes on with this result."""
    return succeeded(kind, always(ok), host, **labels) | ran(kind, rising(INTERVAL), host, **labels)


def up(host: str, **jobs: int) -> Series:
    """Whether each exporter of a host answers."""
    return {f'up{{job="{job}",host="{host}"}}': always(ok) for job, ok in jobs.items()}


def answers(code: str, values: str, host: str = "app1", proxy: str = TO_APP) -> Series:
    """What a backend of HAProxy answers."""
    name = "haproxy_backend_http_responses_total"
    return series(name, values, host=host, proxy=proxy, code=code)


def share(part: str, whole: str, used: float, limit: float, **labels: str) -> Series:
    """So much of a limit."""
    return series(part, always(used), **labels) | series(whole, always(limit), **labels)


def refused(values: str, host: str = "sfu1") -> Series:
    """What LiveKit's backend refuses."""
    return answers("4xx", values, host, "to_livekit_example_com")


def joins(failed: float, tried: float, host: str = "sfu1") -> Series:
    """What LiveKit counts of those who join, a scrape."""
    name = "livekit_participant_join_total"
    return series(name, rising(failed), host=host, state="rtc_failure") | series(
        name, rising(tried), host=host, state="rtc_init"
    )


def loss(above: float) -> Series:
    """One stream a scrape, and that share of them loses more than 5 %."""
    name = 'livekit_packet_loss_percent_bucket{host="sfu1",direction="incoming",le='
    return {
        f'{name}"5"}}': rising(100 - 100 * above),
        f'{name}"15"}}': rising(100),
        f'{name}"+Inf"}}': rising(100),
    }


def came(**ago: float) -> Series:
    """When logs of hosts came last, in seconds before the end."""
    name = 'callready_logs_last_seconds{{host="mon1",sender="{}"}}'
    return {name.format(host): always(END - seconds) for host, seconds in ago.items()}


class Case(NamedTuple):
    """A fault, the labels and the summary of the alert that it brings, and what nearly is one."""

    fault: Series
    labels: dict[str, str]
    summary: str
    near: Series


TURN1 = {"host": "turn1", "pool": "calls", "way": "UDP"}
ALLOCATED = {**TURN1, "way": "TURN/TLS 443"}
RELAYED = {"turn": "turn1", "pool": "calls", "way": "TURN/UDP"}
APP = {"host": "app1", "url": "https://app.example.com/health"}
APP6 = APP | {"family": "6"}
FAILED = "alertmanager_notifications_failed_total"
STATE, NOT_AFTER = "node_systemd_unit_state", "callready_certificate_not_after_seconds"
SERVED = {"host": "sfu1", "name": "sfu.example", "endpoint": "443/tcp"}
CONNTRACK = ("node_nf_conntrack_entries", "node_nf_conntrack_entries_limit")
QUOTA = ("callready_turn_allocations", "callready_turn_quota")
SESSIONS = ("haproxy_frontend_current_sessions", "haproxy_frontend_limit_sessions")
DISK = ("node_filesystem_avail_bytes", "node_filesystem_size_bytes")
FREE, MIN_FREE = "callready_egress_free_bytes", "callready_egress_min_free_bytes"
SFU1 = up("sfu1", node=1, livekit=1, haproxy=1)


def recorder(**values: float | str) -> Series:
    """What is known of a host that records, and what differs from one that is well."""
    known: dict[str, float | str] = {
        "livekit_egress_is_terminating": 0,
        "livekit_egress_is_disabled": 0,
        **{f"callready_egress_{name}": 0 for name in ("held", "draining", "orphans", "backup")},
        "callready_egress_pulseaudio": 1,
        "callready_egress_recordings": 2,
        FREE: 50e9,
        MIN_FREE: 5e9,
        **{f"callready_egress_{name}": value for name, value in values.items()},
    }
    every = up("rec1", node=1, egress=1)
    for name, value in known.items():
        every |= series(name, value if isinstance(value, str) else always(value), host="rec1")
    return every


TERMINATING = series("livekit_egress_is_terminating", always(1), host="rec1")
REDIS_UNIT = {"name": "callready-redis.service", "state": "active"}


def redis(host: str, answers: float | str = 1, runs: float | str = 1) -> Series:
    """Whether Redis answers, and whether its unit runs."""
    values = [value if isinstance(value, str) else always(value) for value in (answers, runs)]
    return series("callready_redis_up", values[0], host=host) | series(
        STATE, values[1], host=host, **REDIS_UNIT
    )


# A cluster, by the names that `docs.rules` has.
NODES = NODE1, NODE2, NODE3 = docs.SFUS
POOL1, POOL2, POOL3 = docs.TURN_HOSTS
SERVICE = "livekit.example.com"


def meets(ok: float | str, host: str = NODE1, peer: str = NODE2) -> Series:
    """Whether those who come by two SFUs meet."""
    values = ok if isinstance(ok, str) else always(ok)
    return succeeded("meet", values, host, peer=peer, service=SERVICE)


def serves(host: str, down: float | str = 0, proxy: str = "to_livekit_example_com") -> Series:
    """Whether an edge hands callers to other SFUs."""
    values = down if isinstance(down, str) else always(down)
    labels = {"host": host, "proxy": proxy, "server": "upstream", "state": "DOWN"}
    return series("haproxy_server_status", values, **labels)


def relays(host: str, stun: int = 1, turn: int = 1) -> Series:
    """A TURN host of a pool of several."""
    at = {"host": host, "pool": "calls"}
    return (
        up(host, node=1)
        | probed("stun", stun, **at, way="UDP")
        | probed("turn", turn, **at, way="TURN/TLS")
    )


def clocks(*ahead: float) -> Series:
    """By how much those of the SFUs are."""
    found: Series = {}
    for host, seconds in zip(NODES, ahead, strict=True):
        found |= series("node_time_seconds", rising(INTERVAL, seconds), host=host)
    return found


def reached(host: str, ok: int) -> Series:
    """Whether an SFU gets to its Redis."""
    return series("callready_redis_reached", always(ok), host=host)


RTT = "callready_redis_rtt_seconds"
GONE = f"1x10 _x{TWENTY_MINUTES}"
RESTART, RESTARTED = f"1x70 0x3 1x{TWENTY_MINUTES}", f"0x70 1x3 0x{TWENTY_MINUTES}"
CASES: dict[str, Case] = {
    "HostDown": Case(
        up("turn1", node=0) | probed("stun", 0, **TURN1),
        {"host": "turn1"},
        "turn1 does not answer: no call goes through it, and calls that did have broken off",
        # It answers callers; the monitor itself shows no metrics.
        up("turn1", node=0)
        | probed("stun", 1, **TURN1)
        | up("app1", node=0, haproxy=0)
        | probed("app", 1, **APP)
        | up("mon1", node=0, prometheus=1)
        | up("sfu1", node=0, livekit=1),
    ),
    "LiveKitDown": Case(
        up("sfu1", node=1, livekit=0, haproxy=1) | probed("join", 0, "sfu1"),
        {"host": "sfu1", "job": "livekit"},
        "LiveKit on sfu1 does not answer: nobody can start or join a call there",
        up("sfu1", node=1, livekit=0) | probed("join", 1, "sfu1"),
    ),
    "EdgeDown": Case(
        up("app1", node=1, haproxy=0) | probed("app", 0, **APP),
        {"host": "app1", "job": "haproxy"},
        "HAProxy on app1 does not answer: callers reach nothing behind it",
        # The monitor's edge, and those that callers get through.
        up("mon1", node=1, haproxy=0, prometheus=1)
        | up("sfu1", node=1, livekit=1, haproxy=0)
        | probed("join", 1, "sfu1")
        | up("app1", node=1, haproxy=0)
        | probed("app", 1, **APP),
    ),
    "AppDown": Case(
        up("app1", node=1, haproxy=1)
        | probed("app", 0, **APP)
        | probed("app", 0, **APP6)
        | probed("app", 1, **APP | {"url": "https://app.example.com/database"}),
        {"host": "app1"},
        "The app on app1 does not answer as it should: callers get no token, so no call begins "
        "(https://app.example.com/health, https://app.example.com/health over IPv6)",
        # As long as a restart takes; and its edge, or its host, is told already.
        up("app1", node=1, haproxy=1)
        | succeeded("app", f"1x70 0x3 1x{TWENTY_MINUTES}", **APP)
        | up("app2", node=1, haproxy=0)
        | probed("app", 0, **APP | {"host": "app2"})
        | up("app3", node=0, haproxy=0)
        | probed("app", 0, **APP | {"host": "app3"}),
    ),
    "EdgeBackendDown": Case(
        # Most of what is answered is the synthetic caller's own.
        answers("5xx", rising(0.5)) | answers("2xx", rising(1.2)) | probed("app", 1, **APP),
        {"host": "app1", "proxy": TO_APP},
        f"What is behind the edge of app1 ({TO_APP}) fails: callers get errors (5xx) instead of "
        "answers",
        # More is answered; another backend; too few to tell; the app is down, which is told, or
        # will be in a moment.
        answers("5xx", rising(1))
        | answers("2xx", rising(2))
        | answers("5xx", rising(1), proxy="acme")
        | answers("5xx", rising(0.25), host="app2")
        | answers("5xx", rising(1), host="app3")
        | probed("app", 0, **APP | {"host": "app3"})
        | answers("5xx", f"0x73 9+9x{TWENTY_MINUTES}", host="app4")
        | succeeded("app", f"1x76 0x{TWENTY_MINUTES}", **APP | {"host": "app4"}),
    ),
    "EdgeBackendDown, of what no probe asks": Case(
        answers("5xx", rising(0.5)) | answers("2xx", rising(0.4)),
        {"host": "app1", "proxy": TO_APP},
        f"What is behind the edge of app1 ({TO_APP}) fails: callers get errors (5xx) instead of "
        "answers",
        answers("5xx", rising(0.5)) | answers("2xx", rising(0.6)),
    ),
    "RedisDown": Case(
        up("redis1", node=1) | redis("redis1", 0, 0),
        {"host": "redis1"},
        "Redis on redis1 does not answer: nobody can join a call, calls end within a minute, and "
        "no recording starts",
        # As long as a restart takes; and its host is told already.
        up("redis1", node=1)
        | redis("redis1", RESTART, RESTART)
        | up("redis2", node=0)
        | redis("redis2", 0, 0),
    ),
    "RedisDown, which runs": Case(
        up("redis1", node=1) | redis("redis1", 0),
        {"host": "redis1"},
        "Redis on redis1 does not answer: nobody can join a call, calls end within a minute, and "
        "no recording starts",
        up("redis1", node=1) | redis("redis1", RESTART),
    ),
    "RedisDown, not measured": Case(
        up("redis1", node=1) | redis("redis1", "_", 0),
        {"host": "redis1"},
        "Redis on redis1 does not answer: nobody can join a call, calls end within a minute, and "
        "no recording starts",
        up("redis1", node=1) | redis("redis1", "_"),
    ),
    "SignallingFails": Case(
        SFU1 | probed("join", 0, "sfu1", family="6") | probed("join", 1, "sfu1"),
        {"host": "sfu1"},
        "Nobody can join a call on sfu1 (IPv6)",
        # It failed for as long as a restart takes.
        SFU1 | succeeded("join", f"1x70 0x3 1x{TWENTY_MINUTES}", "sfu1"),
    ),
    "RoomsSplit": Case(
        meets(0) | meets(0, NODE2, NODE3) | meets(1, NODE3, NODE1),
        {"host": SERVICE},
        f"Callers of one room of {SERVICE} do not meet: those who come by {NODE1} and by {NODE2}; "
        f"those who come by {NODE2} and by {NODE3}",
        # Nobody can join by one of them, which is told; and as long as a node takes to be gone.
        meets(0)
        | probed("join", 0, NODE2)
        | probed("join", 1, NODE1)
        | meets(f"1x70 0x3 1x{TWENTY_MINUTES}", NODE3, NODE1),
    ),
    "PoolDegraded": Case(
        relays(POOL1, 0, 0) | relays(POOL2) | relays(POOL3),
        {"host": POOL1, "pool": "calls"},
        f"TURN on {POOL1} (pool calls) fails callers (STUN over IPv4, TURN/TLS over IPv4): they "
        "get by with another host of the pool, and do not connect when that fails too",
        # Two of three may be both that a caller is told of; and the host is off, which is told.
        relays(POOL1, 0, 0) | relays(POOL2, 1, 0) | relays(POOL3),
    ),
    "PoolDegraded, by a host that is up": Case(
        relays(POOL1)
        | series(STATE, always(0), host=POOL1, name="turnserver@calls.service", state="active"),
        {"host": POOL1, "pool": "calls"},
        f"TURN on {POOL1} (pool calls) fails callers (its unit does not run): they get by with "
        "another host of the pool, and do not connect when that fails too",
        relays(POOL1, 0, 0) | up(POOL1, node=0),
    ),
    "TurnDown, of two hosts of a pool": Case(
        relays(POOL1, 0, 0) | relays(POOL2, 1, 0),
        {"host": POOL1, "pool": "calls"},
        f"TURN on {POOL1} (pool calls) does not answer: callers who need a relay do not connect "
        "(UDP over IPv4)",
        relays(POOL1, 0, 0) | relays(POOL2),
    ),
    "TurnFails, of two hosts of a pool": Case(
        relays(POOL1, 1, 0) | relays(POOL2, 0, 0) | up(POOL2, node=0),
        {"host": POOL1, "pool": "calls"},
        f"TURN on {POOL1} (pool calls) answers and relays nothing: callers who need a relay do not "
        "connect (TURN/TLS over IPv4)",
        relays(POOL1, 1, 0) | relays(POOL2),
    ),
    "TurnDown": Case(
        up("turn1", node=1)
        | probed("stun", 0, **TURN1)
        | probed("stun", 0, **TURN1 | {"way": "TCP", "family": "6"}),
        {"host": "turn1", "pool": "calls"},
        "TURN on turn1 (pool calls) does not answer: callers who need a relay do not connect "
        "(TCP over IPv6, UDP over IPv4)",
        up("turn1", node=1) | succeeded("stun", f"1x70 0x3 1x{TWENTY_MINUTES}", **TURN1),
    ),
    "TurnDown, without a synthetic caller": Case(
        up("turn1", node=1)
        | series(STATE, always(0), host="turn1", name="turnserver@calls.service", state="active"),
        {"host": "turn1", "pool": "calls"},
        "TURN on turn1 (pool calls) does not answer: callers who need a relay do not connect "
        "(its unit does not run)",
        up("turn1", node=1)
        | series(
            STATE,
            f"1x70 0x3 1x{TWENTY_MINUTES}",
            host="turn1",
            name="turnserver@calls.service",
            state="active",
        ),
    ),
    "TurnFails": Case(
        up("turn1", node=1) | probed("stun", 1, **TURN1) | probed("turn", 0, **ALLOCATED),
        {"host": "turn1", "pool": "calls"},
        "TURN on turn1 (pool calls) answers and relays nothing: callers who need a relay do not "
        "connect (TURN/TLS 443 over IPv4)",
        # The pool beside it is well, and the one that is not says so itself.
        up("turn1", node=1)
        | probed("turn", 1, **ALLOCATED | {"pool": "avatar"})
        | probed("stun", 0, **TURN1)
        | probed("turn", 0, **ALLOCATED),
    ),
    "CallsFail": Case(
        SFU1
        | probed("join", 1, "sfu1")
        | probed("call", 0, "sfu1", way="UDP", family="6")
        | probed("call", 1, "sfu1", way="UDP")
        | probed("call", 0, "sfu1", **RELAYED),
        {"host": "sfu1"},
        "Calls through sfu1 do not connect on 2 of their paths: TURN/UDP over IPv4 to turn1 "
        "(pool calls), UDP over IPv6",
        # The relay that they go through is told already.
        SFU1
        | up("turn1", node=1)
        | probed("turn", 0, **ALLOCATED)
        | probed("call", 0, "sfu1", **RELAYED)
        | probed("call", 1, "sfu1", way="UDP"),
    ),
    "CallersCannotConnect": Case(
        up("sfu1", livekit=1) | joins(0.036, 0.6),
        {"host": "sfu1"},
        "6% of those who joined a call on sfu1 in the last 10 minutes got no connection for media",
        # Fewer of them; and fewer than 20 callers, without callready's own joins.
        up("sfu1", livekit=1)
        | joins(0.024, 0.6)
        | up("sfu2", livekit=1)
        | joins(0.3, 5.4, "sfu2")
        | probed("join", 1, "sfu2")
        | probed("call", 1, "sfu2", way="UDP")
        | probed("call", 1, "sfu2", way="TCP"),
    ),
    "TokensRefused": Case(
        # Two of three who are let in are callready's own.
        up("sfu1", livekit=1) | refused(rising(0.6)) | joins(0, 1.5) | probed("join", 1, "sfu1"),
        {"host": "sfu1"},
        "LiveKit on sfu1 refuses more callers (4xx) than it lets in: the application's tokens are "
        "not valid there",
        # More are let in; where nobody calls, a stranger tries names for two minutes, or now and
        # then.
        up("sfu1", livekit=1)
        | refused(rising(0.6))
        | joins(0, 1.5)
        | up("sfu2", livekit=1)
        | refused(f"0x60 0+20x8 160x{TWENTY_MINUTES}", "sfu2")
        | up("sfu3", livekit=1)
        | refused(rising(0.4), "sfu3"),
    ),
    "EgressDown": Case(
        recorder() | up("rec1", egress=0),
        {"host": "rec1", "job": "egress"},
        "Egress on rec1 does not answer: no recording starts there, and those that ran are cut off",
        # A deploy drains it.
        recorder(draining=1) | up("rec1", egress=0),
    ),
    "EgressDown, with its host": Case(
        recorder() | up("rec1", egress=0),
        {"host": "rec1", "job": "egress"},
        "Egress on rec1 does not answer: no recording starts there, and those that ran are cut off",
        recorder() | up("rec1", egress=0, node=0),
    ),
    "RecordingsHeld": Case(
        recorder(held=1) | up("rec1", egress=0),
        {"host": "rec1"},
        "rec1 has too little room: no new recording starts there, and those that run are ended "
        "before the disk is full",
        recorder(),
    ),
    "RecordingDiskFilling": Case(
        # Of 50 GB in 20 minutes 8 are written, 48 more in two hours.
        recorder(free_bytes=f"50e9-0.1e9x{TWENTY_MINUTES}"),
        {"host": "rec1"},
        "Recordings on rec1 fill its disk: at the present rate no new one starts within two hours",
        recorder(free_bytes=f"50e9-0.07e9x{TWENTY_MINUTES}"),
    ),
    "RecordingDiskFilling, soon after its start": Case(
        recorder(free_bytes=f"_x55 50e9-1e9x{TWENTY_MINUTES}"),
        {"host": "rec1"},
        "Recordings on rec1 fill its disk: at the present rate no new one starts within two hours",
        recorder(free_bytes=f"_x65 50e9-1e9x{TWENTY_MINUTES}"),
    ),
    "RecordingsCannotStart": Case(
        recorder() | TERMINATING,
        {"host": "rec1"},
        "Egress on rec1 takes no new recordings: it waits for those that run, and starts again "
        "after the last one",
        recorder(draining=1) | TERMINATING,
    ),
    "RecordingsCannotStart, without room": Case(
        recorder() | TERMINATING,
        {"host": "rec1"},
        "Egress on rec1 takes no new recordings: it waits for those that run, and starts again "
        "after the last one",
        recorder(held=1) | TERMINATING,
    ),
    "PulseAudioDown": Case(
        recorder(pulseaudio=0),
        {"host": "rec1"},
        "Egress on rec1 has lost its sound server: it refuses to record rooms and pages in Chrome",
        # Then EgressDown says it.
        recorder(pulseaudio=0) | up("rec1", egress=0),
    ),
    "RecordingsCutOff": Case(
        recorder(orphans=2),
        {"host": "rec1"},
        "2 files of recordings that were cut off are kept on rec1: whoever asked for them has not "
        "got them",
        recorder(),
    ),
    "RecordingsNotUploaded": Case(
        recorder(backup=3),
        {"host": "rec1"},
        "3 files of recordings could not be uploaded and are kept on rec1: their storage refuses "
        "them or does not answer",
        recorder(),
    ),
    "SfuNotServing": Case(
        up(NODE1, node=1, livekit=0, haproxy=1) | serves(NODE1, 1) | probed("join", 1, NODE1),
        {"host": NODE1},
        f"LiveKit on {NODE1} takes no callers (it does not answer): the other SFUs do, calls that "
        "it had have broken off, and the next one that fails is felt",
        # Nobody can join there, which is told; as long as a restart takes; another backend.
        up(NODE1, node=1, livekit=0, haproxy=1)
        | serves(NODE1, 1)
        | probed("join", 0, NODE1)
        | serves(NODE2, RESTARTED)
        | serves(NODE3, 1, TO_APP),
    ),
    "SfuNotServing, without Redis": Case(
        up(NODE1, node=1, livekit=1) | serves(NODE1, 1) | reached(NODE1, 0),
        {"host": NODE1},
        f"LiveKit on {NODE1} takes no callers (it does not reach its Redis): the other SFUs do, "
        "calls that it had have broken off, and the next one that fails is felt",
        # It is Redis that is down.
        up(NODE1, node=1, livekit=1) | serves(NODE1, 1) | up("redis1", node=1) | redis("redis1", 0),
    ),
    "SfuNotServing, which says so": Case(
        up(NODE1, node=1, livekit=1) | serves(NODE1, 1) | reached(NODE1, 1),
        {"host": NODE1},
        f"LiveKit on {NODE1} takes no callers (it says 406): the other SFUs do, calls that it had "
        "have broken off, and the next one that fails is felt",
        up(NODE1, node=1, livekit=1) | serves(NODE1) | reached(NODE1, 0),
    ),
    "RedisFar": Case(
        series(RTT, always(0.02), host=NODE1),
        {"host": NODE1},
        f"Redis is 20ms away from {NODE1}: every message of a call goes there and back, so joins "
        "are slow, and fail when it gets worse",
        # Once in a while it takes longer.
        series(RTT, always(0.004), host=NODE1)
        | series(RTT, f"0.02x70 0.001 0.02x{TWENTY_MINUTES}", host=NODE2),
    ),
    "ClocksApart": Case(
        # What it takes to ask is no skew.
        clocks(5.01, 5.31, 5.02),
        {"host": SERVICE},
        f"Clocks of the SFUs of {SERVICE} are 0.3 s apart ({NODE1} +5.0 s, {NODE2} +5.3 s, {NODE3} "
        "+5.0 s): from 0.5 s on joins are slow or fail, at 5 s they take each other for dead",
        # All are off alike; another host.
        clocks(5.0, 5.19, 5.1) | series("node_time_seconds", rising(INTERVAL, 9), host="turn1"),
    ),
    "MetricsMissing, in a cluster": Case(
        up(NODE1, node=1, livekit=0) | probed("join", 1, NODE1),
        {"host": NODE1},
        f"{NODE1} shows no metrics (livekit): callers notice nothing, and alerts about it may not "
        "come",
        up(NODE1, node=1, livekit=0) | probed("join", 1, NODE1) | serves(NODE1, 1),
    ),
    "MetricsMissing": Case(
        up("turn1", node=0, haproxy=0) | probed("stun", 1, **TURN1),
        {"host": "turn1"},
        "turn1 shows no metrics (haproxy, node): callers notice nothing, and alerts about it may "
        "not come",
        up("turn1", node=0)
        | up("sfu1", node=1, livekit=0)
        | up("mon1", caller=0)
        | up("rec1", node=1, egress=0),
    ),
    "MeasurementStale": Case(
        series("node_time_seconds", rising(INTERVAL), host="turn1")
        | series("callready_measured_seconds", always(END - 700), host="turn1"),
        {"host": "turn1"},
        "turn1 no longer measures itself: callers notice nothing, and alerts about quotas, "
        "certificates and releases do not come",
        # By the host's own clock, which is an hour off.
        up("turn1", node=1)
        | series("node_time_seconds", rising(INTERVAL, 3600), host="turn1")
        | series("callready_measured_seconds", rising(INTERVAL, 3400), host="turn1"),
    ),
    "MeasurementStale, from the beginning": Case(
        up("turn1", node=1),
        {"host": "turn1", "job": "node"},
        "turn1 no longer measures itself: callers notice nothing, and alerts about quotas, "
        "certificates and releases do not come",
        up("turn1", node=0),
    ),
    "ProbesStopped": Case(
        up("mon1", caller=1)
        | ran("call", always(END - 500), "sfu1")
        | ran("join", rising(INTERVAL), "sfu1"),
        {"probe": "call"},
        "The monitor makes no test calls (probe: call): callers notice nothing, and nobody would "
        "be told that calls fail",
        # One path of many waits for its turn; and joins were late.
        up("mon1", caller=1)
        | ran("call", always(0), "sfu1")
        | ran("call", rising(INTERVAL), "sfu2")
        | ran("join", always(END - 330), "sfu2"),
    ),
    "ProbesStopped, with the caller": Case(
        up("mon1", caller=0),
        {"host": "mon1", "job": "caller", "probe": "all"},
        "The monitor makes no test calls (probe: all): callers notice nothing, and nobody would "
        "be told that calls fail",
        up("mon1", caller=1) | ran("join", rising(INTERVAL), "sfu1"),
    ),
    "ProbesStopped, before the first": Case(
        up("mon1", caller=1),
        {"host": "mon1", "job": "caller", "probe": "all"},
        "The monitor makes no test calls (probe: all): callers notice nothing, and nobody would "
        "be told that calls fail",
        {},
    ),
    "MessagesFail": Case(
        series(FAILED, rising(1), host="mon1", integration="email"),
        {"host": "mon1", "integration": "email"},
        "Alerts do not arrive by email: nobody would be told that calls fail",
        series(FAILED, always(3), host="mon1", integration="email"),
    ),
    "LogsMissing": Case(
        up("turn1", node=1) | up("mon1", prometheus=1) | came(turn1=1100, mon1=60),
        {"host": "turn1"},
        "What turn1 logs has not come to the monitor for 15 minutes: callers notice nothing, and it "
        "is in that host's journal only",
        # It is off, which is told; and one that has come.
        up("turn1", node=0) | up("mon1", prometheus=1) | came(turn1=1100, mon1=60, sfu1=840),
    ),
    "LogsMissing, of all": Case(
        up("turn1", node=1) | up("mon1", prometheus=1) | came(turn1=1100, mon1=1100),
        {"host": "mon1"},
        "What mon1 logs has not come to the monitor for 15 minutes: callers notice nothing, and it "
        "is in that host's journal only",
        up("turn1", node=1) | up("mon1", prometheus=1) | came(turn1=840, mon1=840),
    ),
    "PacketLoss": Case(
        loss(0.2),
        {"host": "sfu1", "direction": "incoming"},
        "One stream in ten on sfu1 (incoming) loses more than 10 % of its packets: callers hear "
        "gaps and see frozen pictures",
        loss(0.09),
    ),
    "UdpReceiveBufferFull": Case(
        series("node_netstat_Udp6_RcvbufErrors", rising(11 * INTERVAL), host="turn1"),
        {"host": "turn1"},
        "turn1 drops 11 UDP packets a second before a program reads them: callers hear gaps and "
        "see frozen pictures",
        series("node_netstat_Udp_RcvbufErrors", rising(9 * INTERVAL), host="turn1"),
    ),
    "UdpReceiveBufferFull, over IPv4": Case(
        series("node_netstat_Udp_RcvbufErrors", rising(11 * INTERVAL), host="turn1"),
        {"host": "turn1"},
        "turn1 drops 11 UDP packets a second before a program reads them: callers hear gaps and "
        "see frozen pictures",
        series("node_netstat_Udp6_RcvbufErrors", rising(9 * INTERVAL), host="turn1"),
    ),
    "ConntrackFilling": Case(
        share(*CONNTRACK, 81, 100, host="turn1"),
        {"host": "turn1"},
        "The table of connections on turn1 is 81% full: when it is full, new callers do not "
        "connect",
        share(*CONNTRACK, 80, 100, host="turn1"),
    ),
    "TurnNearQuota": Case(
        share(*QUOTA, 90, 100, host="turn1", pool="calls"),
        {"host": "turn1", "pool": "calls"},
        "Pool calls on turn1 holds 90% of the allocations that it may: when it holds all, new "
        "callers who need a relay do not connect (486)",
        # 0 is any number.
        share(*QUOTA, 80, 100, host="turn1", pool="calls")
        | share(*QUOTA, 90, 0, host="turn1", pool="avatar"),
    ),
    "EdgeNearlyFull": Case(
        share(*SESSIONS, 900, 1000, host="sfu1", proxy="https"),
        {"host": "sfu1", "proxy": "https"},
        "The edge of sfu1 (https) holds 90% of the connections that it may: when it holds all, "
        "new callers wait",
        share(*SESSIONS, 800, 1000, host="sfu1", proxy="https"),
    ),
    "CpuHigh": Case(
        series("node_cpu_seconds_total", rising(0), host="sfu1", cpu="0", mode="idle")
        | series("node_cpu_seconds_total", rising(4.5), host="sfu1", cpu="1", mode="idle"),
        {"host": "sfu1"},
        "The processors of sfu1 are 85% busy: callers hear gaps next, and LiveKit sends new rooms "
        "to others",
        series("node_cpu_seconds_total", rising(0), host="sfu1", cpu="0", mode="idle")
        | series("node_cpu_seconds_total", rising(6.5), host="sfu1", cpu="1", mode="idle"),
    ),
    "DiskFilling": Case(
        share(*DISK, 9, 100, host="sfu1", mountpoint="/", fstype="ext4"),
        {"host": "sfu1", "mountpoint": "/"},
        "/ of sfu1 has 9% left: when it is full, deploys and renewals of certificates fail",
        share(*DISK, 11, 100, host="sfu1", mountpoint="/", fstype="ext4"),
    ),
    "UnitFailed": Case(
        series(STATE, always(1), host="sfu1", name="certbot.service", state="failed"),
        {"host": "sfu1", "name": "certbot.service", "state": "failed"},
        "certbot.service on sfu1 has failed and is not started again: what depends on it stops",
        series(STATE, always(0), host="sfu1", name="certbot.service", state="failed")
        | series(STATE, always(1), host="sfu1", name="certbot.service", state="active"),
    ),
    "CertificateExpires": Case(
        series(NOT_AFTER, always(14 * DAY + END - 3600), **SERVED),
        SERVED,
        "The certificate of sfu.example on sfu1 (443/tcp) ends in 13d 23h 0m 0s: then nothing "
        "connects to it",
        series(NOT_AFTER, always(14 * DAY + END + 60), **SERVED),
    ),
    "ClockOff": Case(
        series("node_time_seconds", rising(INTERVAL, -11), host="turn1"),
        {"host": "turn1"},
        "The clock of turn1 and the monitor's differ by 11 s: tokens and TURN credentials are "
        "refused when it is more",
        series("node_time_seconds", rising(INTERVAL, 9), host="turn1"),
    ),
    "ReleasePending": Case(
        series("callready_release_pending_since_seconds", always(END - 660), host="sfu1"),
        {"host": "sfu1"},
        "A release on sfu1 has waited 11m 0s for its confirmation: callers notice nothing, and it "
        "should have returned by itself",
        series("callready_release_pending_since_seconds", always(END - 540), host="sfu1"),
    ),
    "ReleaseReverted": Case(
        series("callready_reverts_total", f"0x40 1x{TWENTY_MINUTES}", host="sfu1"),
        {"host": "sfu1"},
        "sfu1 returned to the release before: callers notice nothing, and the last deploy is not "
        "in effect there",
        series("callready_reverts_total", always(3), host="sfu1"),
    ),
}


@cache
def alerts() -> dict[str, Any]:
    """Every alert of the template by its name."""
    return docs.alerts()


def annotations(name: str, case: Case) -> dict[str, str]:
    """What goes with an alert: the summary as it is told above, the rest as the rule has it."""
    fill = {f"{{{{ $labels.{key} }}}}": value for key, value in case.labels.items()}
    told = {**alerts()[name]["annotations"], "summary": case.summary}
    for place, value in fill.items():
        told = {key: text.replace(place, value) for key, text in told.items()}
    return told


def test_every_alert_has_its_fault_and_its_near_miss() -> None:
    assert {*alerts()} == {*(name.partition(",")[0] for name in CASES), "Watchdog"}


def test_a_page_is_sent_within_two_and_a_half_minutes() -> None:
    pages = {rule["for"] for rule in alerts().values() if rule["labels"]["severity"] == "page"}
    assert pages == {"1m"}
    assert sum(docs.TO_THE_MESSAGE.values()) <= 150


@pytest.mark.usefixtures("project")
def test_the_dead_mans_switch_is_called_every_minute() -> None:
    """Alertmanager looks at each group_interval whether the last message is as old as
    repeat_interval; it went out a moment after the look before."""
    content = declare(watched(), MON1).release.files[f"{FOLDER}/alertmanager.yml"].content
    (route, _) = yaml.safe_load(content)["route"]["routes"]
    assert route["receiver"] == "watchdog"
    assert (route["group_interval"], route["repeat_interval"]) == ("1m", "30s")


@pytest.mark.parametrize("name", docs.alerts())
def test_an_alert_names_a_section_that_exists(name: str) -> None:
    rule = alerts()[name]
    assert {*rule["annotations"]} == {"summary", "look_at", "when", "docs"}
    path, _, anchor = rule["annotations"]["docs"].partition("#")
    headings = re.findall("^## (.+)$", (docs.ROOT / path).read_text(), re.MULTILINE)
    assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def promtool(folder: Path, tests: list[dict[str, Any]]) -> str:
    """What is wrong with the rules, by these tests; nothing if all pass."""
    (folder / "alerts.yml").write_text(docs.rules())
    every = [{"interval": f"{INTERVAL}s", **test} for test in tests]
    text = yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": every})
    (folder / "tests.yml").write_text(text)
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def given(every: Series) -> list[dict[str, str]]:
    """Series as promtool takes them."""
    return [{"series": name, "values": values} for name, values in every.items()]


@pytest.mark.tools
def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(docs.rules())
    run = ["promtool", "check", "rules", "--lint-fatal", "alerts.yml"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tools
def test_each_alert_comes_on_its_fault_and_not_on_the_near_miss(tmp_path: Path) -> None:
    tests = []
    for title, case in CASES.items():
        name = title.partition(",")[0]
        severity = alerts()[name]["labels"]["severity"]
        told = {
            "exp_labels": {**case.labels, "severity": severity},
            "exp_annotations": annotations(name, case),
        }
        for every, expected in ((case.fault, [told]), (case.near, [])):
            test = {"eval_time": "20m", "alertname": name, "exp_alerts": expected}
            tests.append({"input_series": given(every), "alert_rule_test": [test]})
    assert promtool(tmp_path, tests) == ""


# Of a broken layer and those above it only the lowest pages; None: nothing does.
WELL = (
    SFU1
    | recorder()
    | redis("rec1")
    | up("turn1", node=1)
    | up("app1", node=1, haproxy=1)
    | up("mon1", node=1, haproxy=1, prometheus=1, alertmanager=1, caller=1)
    | probed("stun", 1, **TURN1)
    | probed("turn", 1, **ALLOCATED)
    | probed("join", 1, "sfu1")
    | probed("app", 1, **APP)
    | probed("call", 1, "sfu1", way="UDP")
    | probed("call", 1, "sfu1", **RELAYED)
    | {
        f'{name}{{host="{host}"}}': rising(INTERVAL)
        for host in ("sfu1", "turn1", "app1", "mon1", "rec1")
        for name in ("node_time_seconds", "callready_measured_seconds")
    }
)
CLUSTER = (
    relays(POOL1)
    | relays(POOL2)
    | meets(1)
    | meets(1, NODE2, NODE3)
    | meets(1, NODE3, NODE1)
    | clocks(0, 0.1, 0.05)
    | {
        name: values
        for host in NODES
        for name, values in (
            up(host, node=1, livekit=1, haproxy=1)
            | probed("join", 1, host)
            | serves(host)
            | reached(host, 1)
            | series(RTT, always(0.001), host=host)
        ).items()
    }
    | {
        f'callready_measured_seconds{{host="{host}"}}': rising(INTERVAL)
        for host in (*NODES, POOL1, POOL2)
    }
    | {f'node_time_seconds{{host="{host}"}}': rising(INTERVAL) for host in (POOL1, POOL2)}
)
NO_TURN = probed("stun", 0, **TURN1) | probed("turn", 0, **ALLOCATED)
NO_RELAY = NO_TURN | probed("call", 0, "sfu1", **RELAYED)
NO_SFU = NO_RELAY | probed("join", 0, "sfu1") | probed("call", 0, "sfu1", way="UDP")
NO_EDGE = answers("5xx", rising(1), "sfu1", "to_livekit_example_com")
NO_APP = probed("app", 0, **APP) | answers("5xx", rising(1))
NO_SFU |= probed("stun", 1, **TURN1) | probed("turn", 1, **ALLOCATED)
LAYERS: dict[str, tuple[Series, *tuple[dict[str, str] | None, ...]]] = {
    "all is well": ({}, None),
    "there is no synthetic caller": (
        dict.fromkeys((name for name in WELL if re.search("probe|caller", name)), "_"),
        None,
    ),
    "a TURN host is off": (
        up("turn1", node=0) | NO_RELAY,
        {"alertname": "HostDown", "host": "turn1"},
    ),
    "coturn is stopped": (NO_RELAY, {"alertname": "TurnDown", "host": "turn1", "pool": "calls"}),
    "UDP over IPv6 is dropped": (
        probed("stun", 0, **TURN1 | {"family": "6"})
        | probed("turn", 0, **ALLOCATED | {"family": "6"}),
        {"alertname": "TurnDown", "host": "turn1", "pool": "calls"},
    ),
    "coturn knows another secret": (
        NO_RELAY | probed("stun", 1, **TURN1),
        {"alertname": "TurnFails", "host": "turn1", "pool": "calls"},
    ),
    "an SFU is off": (
        up("sfu1", node=0, livekit=0, haproxy=0) | NO_SFU | NO_EDGE,
        {"alertname": "HostDown", "host": "sfu1"},
    ),
    "LiveKit is stopped": (
        up("sfu1", livekit=0)
        | NO_SFU
        | NO_EDGE
        | series(STATE, always(1), host="sfu1", name="livekit-server.service", state="failed"),
        {"alertname": "LiveKitDown", "host": "sfu1", "job": "livekit"},
    ),
    "the edge is stopped": (
        up("sfu1", haproxy=0) | NO_SFU | NO_EDGE,
        {"alertname": "EdgeDown", "host": "sfu1", "job": "haproxy"},
    ),
    "Redis is stopped": (
        NO_SFU | NO_EDGE | redis("rec1", 0, 0),
        {"alertname": "RedisDown", "host": "rec1"},
    ),
    "Redis hangs, and what was started since did not start": (
        NO_SFU | NO_EDGE | redis("rec1", 0) | up("sfu1", livekit=0) | up("rec1", egress=0),
        {"alertname": "RedisDown", "host": "rec1"},
    ),
    "what follows from a Redis that is away is seen first": (
        redis("rec1", f"1x76 0x{TWENTY_MINUTES}")
        | succeeded("call", f"1x74 0x{TWENTY_MINUTES}", "sfu1", way="UDP")
        | answers("5xx", f"0x60 0+9x{TWENTY_MINUTES}", "sfu1", "to_livekit_example_com"),
        {"alertname": "RedisDown", "host": "rec1", "alertstate": "pending"},
    ),
    "the host of Redis is off": (
        NO_SFU | NO_EDGE | up("rec1", node=0, egress=0) | redis("rec1", GONE, GONE),
        {"alertname": "HostDown", "host": "rec1"},
    ),
    "no exporter of the host of Redis answers, and LiveKit has other keys for some": (
        up("rec1", node=0, egress=0)
        | redis("rec1", GONE, GONE)
        | probed("join", 0, "sfu1")
        | probed("join", 1, "sfu1", family="6"),
        {"alertname": "HostDown", "host": "rec1"},
        {"alertname": "SignallingFails", "host": "sfu1"},
    ),
    "Redis is back, and not every path was tried again": (
        redis("rec1", f"0x73 1x{TWENTY_MINUTES}")
        | succeeded("join", f"0x74 1x{TWENTY_MINUTES}", "sfu1")
        | succeeded("call", f"0x78 1x{TWENTY_MINUTES}", "sfu1", way="UDP")
        | probed("call", 0, "sfu1", **RELAYED)
        | answers("5xx", f"0+9x73 657x{TWENTY_MINUTES}", "sfu1", "to_livekit_example_com")
        | answers("2xx", f"0x73 0+1x{TWENTY_MINUTES}", "sfu1", "to_livekit_example_com"),
        None,
    ),
    "a host that records is off": (
        up("rec1", node=0, egress=0),
        {"alertname": "HostDown", "host": "rec1"},
    ),
    "egress is stopped": (
        up("rec1", egress=0) | recorder(pulseaudio=0) | up("rec1", egress=0),
        {"alertname": "EgressDown", "host": "rec1", "job": "egress"},
    ),
    "a disk of recordings is full": (
        recorder(held=1) | TERMINATING | up("rec1", egress=0),
        {"alertname": "RecordingsHeld", "host": "rec1"},
    ),
    "a deploy drains recordings": (recorder(draining=1) | TERMINATING, None),
    "the host of the app is off": (
        up("app1", node=0, haproxy=0) | NO_APP,
        {"alertname": "HostDown", "host": "app1"},
    ),
    "the edge of the app is stopped": (
        up("app1", haproxy=0) | NO_APP,
        {"alertname": "EdgeDown", "host": "app1", "job": "haproxy"},
    ),
    "the app is stopped": (NO_APP, {"alertname": "AppDown", "host": "app1"}),
    "the app is well, and gives callers errors": (
        answers("5xx", rising(1)),
        {"alertname": "EdgeBackendDown", "host": "app1", "proxy": TO_APP},
    ),
    "the app is back, and its errors still count": (
        succeeded("app", f"0x73 1x{TWENTY_MINUTES}", **APP)
        | answers("5xx", f"0+9x73 657x{TWENTY_MINUTES}"),
        None,
    ),
    "exporters of the app's host are stopped": (
        up("app1", node=0, haproxy=0),
        {"alertname": "MetricsMissing", "host": "app1", "severity": "ticket"},
    ),
    "exporters of an app's host are stopped, and no probe asks it": (
        up("app1", node=0, haproxy=0) | dict.fromkeys(probed("app", 1, **APP), "_"),
        {"alertname": "HostDown", "host": "app1"},
    ),
    "LiveKit has other keys": (NO_SFU, {"alertname": "SignallingFails", "host": "sfu1"}),
    "media does not arrive": (
        NO_SFU | probed("join", 1, "sfu1") | joins(5, 30),
        {"alertname": "CallsFail", "host": "sfu1"},
    ),
    "LiveKit is back, and not every path was tried again": (
        {'up{job="livekit",host="sfu1"}': f"0x73 1x{TWENTY_MINUTES}"}
        | succeeded("join", f"0x73 1x{TWENTY_MINUTES}", "sfu1")
        | succeeded("call", f"0x78 1x{TWENTY_MINUTES}", "sfu1", way="UDP")
        | probed("call", 0, "sfu1", **RELAYED)
        | answers("5xx", f"0+9x73 657x{TWENTY_MINUTES}", "sfu1", "to_livekit_example_com")
        | answers("2xx", f"0x73 0+1x{TWENTY_MINUTES}", "sfu1", "to_livekit_example_com"),
        None,
    ),
    "coturn is back, and not every path was tried again": (
        succeeded("stun", f"0x73 1x{TWENTY_MINUTES}", **TURN1)
        | succeeded("turn", f"0x73 1x{TWENTY_MINUTES}", **ALLOCATED)
        | probed("call", 0, "sfu1", **RELAYED),
        None,
    ),
    "callers do not connect, and one test call was lost": (
        succeeded("call", f"1x50 0x2 1x{TWENTY_MINUTES}", "sfu1", way="UDP") | joins(5, 30),
        {"alertname": "CallersCannotConnect", "host": "sfu1"},
    ),
    "one SFU of a cluster is stopped": (
        CLUSTER
        | up(NODE1, livekit=0)
        | serves(NODE1, 1)
        | series(STATE, always(1), host=NODE1, name="livekit-server.service", state="failed"),
        {"alertname": "SfuNotServing", "host": NODE1, "severity": "ticket"},
    ),
    "one SFU of a cluster is off": (
        CLUSTER
        | up(NODE1, node=0, livekit=0, haproxy=0)
        | probed("join", 0, NODE1)
        | meets(0)
        | meets(0, NODE3, NODE1),
        {"alertname": "HostDown", "host": NODE1},
    ),
    "all SFUs of a cluster are stopped": (
        CLUSTER
        | meets(0)
        | meets(0, NODE2, NODE3)
        | meets(0, NODE3, NODE1)
        | {k: v for n in NODES for k, v in (up(n, livekit=0) | serves(n, 1)).items()}
        | {k: v for n in NODES for k, v in probed("join", 0, n).items()},
        *({"alertname": "LiveKitDown", "host": n, "job": "livekit"} for n in NODES),
    ),
    "Redis of a cluster is stopped": (
        CLUSTER
        | meets(0)
        | {k: v for n in NODES for k, v in (probed("join", 0, n) | serves(n, 1)).items()}
        | redis("rec1", 0, 0),
        {"alertname": "RedisDown", "host": "rec1"},
    ),
    "one SFU has another Redis": (
        CLUSTER | meets(0) | meets(0, NODE3, NODE1),
        {"alertname": "RoomsSplit", "host": SERVICE},
    ),
    "coturn on one host of a pool is stopped": (
        CLUSTER | relays(POOL1, 0, 0) | probed("call", 0, NODE1, **RELAYED | {"turn": POOL1}),
        {"alertname": "PoolDegraded", "host": POOL1, "pool": "calls", "severity": "ticket"},
    ),
    "one host of a pool is off, and coturn on the other stops": (
        # Nobody asks the first one.
        CLUSTER | dict.fromkeys(relays(POOL1), "_") | up(POOL1, node=0) | relays(POOL2, 0, 0),
        {"alertname": "HostDown", "host": POOL1},
        {"alertname": "TurnDown", "host": POOL2, "pool": "calls"},
    ),
    "media arrives again": (
        succeeded("call", f"0x60 1x{TWENTY_MINUTES}", "sfu1", way="UDP") | joins(5, 30),
        None,
    ),
}


@pytest.mark.tools
def test_only_the_lowest_broken_layer_pages(tmp_path: Path) -> None:
    tests = []
    for name, (broken, *pages) in LAYERS.items():
        samples = []
        for page in filter(None, pages):
            labels = json.dumps({"alertstate": "firing", "severity": "page", **page})
            labels = re.sub(r'"(\w+)": ', r"\1=", labels)
            samples.append({"labels": f"ALERTS{labels}", "value": 1})
        asked = {
            "expr": 'ALERTS{alertname!="Watchdog"}',
            "eval_time": "20m",
            "exp_samples": samples,
        }
        test = {"input_series": given(WELL | broken), "promql_expr_test": [asked]}
        tests.append({"name": name, **test})
    assert promtool(tmp_path, tests) == ""


# The page to look at, by the real Prometheus.


def shown(folder: Path, values: dict[str, float]) -> str:
    """The page of a Prometheus that was just told these series."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    now = time.time() - 1
    lines = (f"{name} {value} {now}\n" for name, value in values.items())
    (folder / "series").write_text("".join(lines) + "# EOF\n")
    blocks = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "series", "data"]
    subprocess.run(blocks, cwd=folder, check=True, capture_output=True)
    (folder / "prometheus.yml").touch()
    (folder / "consoles").mkdir()
    (folder / "consoles/index.html").write_bytes(
        render("console.html.j2", groups=ROLES, clusters=[SERVICE])
    )
    run = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    run += [f"--web.listen-address={address}", "--web.console.templates=consoles"]
    pages: list[str] = []

    def is_there() -> bool:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"http://{address}/consoles/index.html")
            if answer.status_code != 503:  # it is still reading what it has
                assert answer.status_code == 200, answer.text
                pages.append(answer.text)
        return bool(pages)

    with subprocess.Popen(run, cwd=folder, stderr=subprocess.DEVNULL) as running:
        try:
            wait_until(is_there, 60, "Prometheus shows no page")
        finally:
            running.terminate()
    return " ".join(re.sub("<style>.*</style>|<.*?>", " ", pages[0], flags=re.DOTALL).split())


def now(every: Series) -> dict[str, float]:
    """Constant series as they are now."""
    known = {name: values.split("x")[0] for name, values in every.items() if "+" not in values}
    ran = {name: time.time() - 30 for name in every if "last_run" in name}
    return {name: float(value) for name, value in known.items()} | ran


@pytest.mark.tools
def test_the_page_says_that_all_is_well(tmp_path: Path) -> None:
    up = {"proxy": "to_livekit_example_com", "server": "upstream", "state": "UP"}
    nodes = (
        series("livekit_room_total", always(3), host=NODE1)
        | series("livekit_room_total", always(0), host=NODE2)
        | series("haproxy_server_status", always(1), host=NODE1, **up)
        | series("haproxy_server_status", always(0), host=NODE2, **up)
        | series(RTT, always(0.0004), host=NODE1)
        | reached(NODE1, 1)
        | reached(NODE2, 0)
    )
    page = shown(tmp_path, now(WELL | nodes))
    assert "✓ All is well Hosts up 5 of 5 Test calls that connect ✓ 2 of 2 paths" in page
    assert "Alerts" not in page
    assert "sfu1 2 paths, last call 3" in page
    assert f"{NODE1} ✓ yes 0.4 ms 3" in page and f"{NODE2} ✗ others do ✗ 0" in page
    assert "rec1 ✓ up Redis Recorder" in page
    assert "direct ✓ UDP IPv4 3" in page and "turn1 calls ✓ UDP IPv4 3" in page


@pytest.mark.tools
def test_the_page_shows_what_is_broken(tmp_path: Path) -> None:
    broken = WELL | up("turn1", node=0) | NO_RELAY | redis("rec1", 0)
    alert = {"alertname": "TurnDown", "host": "turn1", "pool": "calls", "severity": "page"}
    values = now(broken | series("ALERTS", always(1), alertstate="firing", **alert))
    values |= {name: time.time() - 90 for name in series("ALERTS_FOR_STATE", "", **alert)}
    quota = share(*QUOTA, 450, 500, host="turn1", pool="calls")
    ends = {name: time.time() + 8.5 * DAY for name in series(NOT_AFTER, "", **SERVED)}
    changed = {
        name: time.time() - ago
        for how, ago in (("deploy", 7_230), ("reverted", 3_630))
        for name in series(
            "callready_release_change_seconds", "", host="sfu1", release="0a", how=how
        )
    }
    page = shown(tmp_path, values | now(quota) | ends | changed)
    assert "✗ Callers suffer: 1 alert Hosts up 4 of 5" in page
    assert "TurnDown turn1 · calls 1m 3" in page
    assert "✗ sfu1 1 of 2 paths fail" in page and "turn1 calls ✗ UDP IPv4 3" in page
    assert "turn1 ✗ down TURN calls" in page
    assert "rec1 ✓ up ✗ Redis Recorder" in page
    assert "rec1 ✓ records 2 41.91GiB 0 0" in page
    assert "calls turn1 450 of 500" in page
    assert "sfu.example sfu1 443/tcp 8" in page
    assert re.search("Last release 1h 0m 3.s ago", page)
    assert re.search(
        r"sfu1 reverted 0a \S+ \S+ UTC 1h 0m 3.s sfu1 deploy 0a \S+ \S+ UTC 2h 0m", page
    )


def test_the_page_needs_nothing_from_outside_and_no_script() -> None:
    page = render("console.html.j2", groups=ROLES, clusters=[SERVICE]).decode()
    assert not re.search(r"https?:|//\w|<script|@import|url\(", page)
