"""The port plan against tables written by hand, and every conflict with a way out that works."""

import re
from itertools import product

import pytest

from callready.settings.pools import Way, ways
from callready.settings.ports import Use, listeners, overlaps, parse_port, port_plan
from callready.settings.problem import SettingsError
from tasks.host import reserved
from tests.support.inventories import MON1, SFU1, TURN1, TURN2, WATCHED, Edit, load

pytestmark = pytest.mark.usefixtures("project")

ONE_BOX: list[Edit] = [
    (SFU1, "groups", ["livekit", "turn"]),
    (SFU1, "pools", ["calls", "avatar"]),
    (SFU1, "turn.pools.calls.min_port", 60001),
    (SFU1, "turn.pools.calls.max_port", 62767),
    (SFU1, "turn.pools.avatar.min_port", 62768),
    (SFU1, "turn.pools.avatar.listening_port", 3479),
    (SFU1, "turn.pools.avatar.tls_listening_port", 5350),
]

CALLS, EDGE = "turnserver@calls.service", "haproxy.service"
ON_443: Edit = ("*", "turn.pools.calls.tls_on_443", True)
WAYS: dict[str, tuple[str, list[Edit], list[Way]]] = {
    "coturn alone": (
        TURN1,
        [],
        [
            Way("udp", 3478, CALLS, True, 3478, "listening_port"),
            Way("tcp", 3478, CALLS, True, 3478, "listening_port"),
            Way("tls", 5349, CALLS, True, 5349, "tls_listening_port"),
        ],
    ),
    "no TLS": (
        TURN1,
        [(TURN1, "turn.tls", False), (TURN1, "turn.listening_port", 3500)],
        [
            Way("udp", 3500, CALLS, True, 3500, "listening_port"),
            Way("tcp", 3500, CALLS, True, 3500, "listening_port"),
        ],
    ),
    "on 443 by the packet filter": (
        TURN1,
        [ON_443],
        [
            Way("udp", 3478, CALLS, True, 3478, "listening_port"),
            Way("tcp", 3478, CALLS, True, 3478, "listening_port"),
            Way("tls", 5349, CALLS, False, 5349, "tls_listening_port"),
            Way("tls", 443, CALLS, True, 5349, "tls_on_443"),
        ],
    ),
    "on 443 by the edge": (
        SFU1,
        [*ONE_BOX, ON_443, (SFU1, "edge", {}), (SFU1, "name", "turn.callready.test")],
        [
            Way("udp", 3478, CALLS, True, 3478, "listening_port"),
            Way("tcp", 3478, EDGE, True, 3478, "listening_port"),
            Way("tls", 5349, EDGE, False, 5349, "tls_listening_port"),
            Way("tls", 443, EDGE, True, 443, "tls_on_443"),
        ],
    ),
}

# What is open to the outside, as an operator would write it down; a trailing `local` is not, and
# what follows `to` says who may.
TABLES: dict[str, tuple[str, list[Edit], str]] = {
    "SFU alone": (
        SFU1,
        [],
        """
        sshd          tcp 22           administration
        LiveKit       tcp 7880         signalling
        LiveKit       tcp 7881         ICE over TCP
        LiveKit       udp 50000-60000  media
    """,
    ),
    "TURN alone": (
        TURN1,
        [],
        """
        sshd          tcp 22           administration
        coturn calls  udp 3478         STUN and TURN
        coturn calls  tcp 3478         TURN over TCP
        coturn calls  tcp 5349         TURN over TLS
        coturn calls  udp 49152-65535  relay range
    """,
    ),
    "one box, two pools": (
        SFU1,
        ONE_BOX,
        """
        sshd           tcp 22           administration
        LiveKit        tcp 7880         signalling
        LiveKit        tcp 7881         ICE over TCP
        LiveKit        udp 50000-60000  media
        coturn calls   udp 3478         STUN and TURN
        coturn calls   tcp 3478         TURN over TCP
        coturn calls   tcp 5349         TURN over TLS
        coturn calls   udp 60001-62767  relay range
        coturn avatar  udp 3479         STUN and TURN
        coturn avatar  tcp 3479         TURN over TCP
        coturn avatar  tcp 5350         TURN over TLS
        coturn avatar  udp 62768-65535  relay range
    """,
    ),
    "custom ports": (
        SFU1,
        [
            (SFU1, "ssh_port", 2222),
            (SFU1, "livekit.port", 8880),
            (
                SFU1,
                "livekit.rtc",
                {"port_range_start": 20000, "port_range_end": 21000, "tcp_port": 8881},
            ),
            (SFU1, "firewall.extra_ports", ["443/tcp", "40000-40010/udp"]),
        ],
        """
        sshd          tcp 2222         administration
        LiveKit       tcp 8880         signalling
        LiveKit       tcp 8881         ICE over TCP
        LiveKit       udp 20000-21000  media
        extra         tcp 443          firewall.extra_ports
        extra         udp 40000-40010  firewall.extra_ports
    """,
    ),
    "relaying to TCP peers, no TLS": (
        TURN1,
        [
            (TURN1, "turn.tcp_relay", True),
            (TURN1, "turn.pools.calls.tls", False),
        ],
        """
        sshd          tcp 22           administration
        coturn calls  udp 3478         STUN and TURN
        coturn calls  tcp 3478         TURN over TCP
        coturn calls  udp 49152-65535  relay range
        coturn calls  tcp 49152-65535  relay range
    """,
    ),
    "signalling and metrics on loopback": (
        SFU1,
        [
            (SFU1, "livekit.bind_addresses", ["127.0.0.1", "::1"]),
            (SFU1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
        ],
        """
        sshd          tcp 22           administration
        LiveKit       tcp 7880         signalling     local
        LiveKit       tcp 7881         ICE over TCP
        LiveKit       udp 50000-60000  media
        LiveKit       tcp 6789         metrics        local
    """,
    ),
    "signalling on a LAN address": (
        SFU1,
        [
            (SFU1, "livekit.bind_addresses", ["127.0.0.1", "10.0.0.11"]),
        ],
        """
        sshd          tcp 22           administration
        LiveKit       tcp 7880         signalling
        LiveKit       tcp 7881         ICE over TCP
        LiveKit       udp 50000-60000  media
    """,
    ),
    "the edge has TCP and TLS of a pool": (
        SFU1,
        WAYS["on 443 by the edge"][1],
        """
        sshd           tcp 22           administration
        LiveKit        tcp 7880         signalling          local
        LiveKit        tcp 7881         ICE over TCP
        LiveKit        udp 50000-60000  media
        coturn calls   udp 3478         STUN and TURN
        coturn calls   tcp 3478         TURN over TCP
        coturn calls   tcp 5349         TURN over TLS
        coturn calls   tcp 3480         TURN from the edge  local
        coturn calls   udp 60001-62767  relay range
        coturn avatar  udp 3479         STUN and TURN
        coturn avatar  tcp 3479         TURN over TCP
        coturn avatar  tcp 5350         TURN over TLS
        coturn avatar  udp 62768-65535  relay range
        edge           tcp 443          HTTPS and wss
        edge           tcp 80           redirects and ACME
        """,
    ),
    "to some only, and protocols without ports": (
        SFU1,
        [
            (SFU1, "internal_address", "10.0.0.11"),
            (
                SFU1,
                "livekit.prometheus",
                {"password": "secret:livekit/prometheus", "sources": ["turn", "203.0.113.9"]},
            ),
            (
                SFU1,
                "firewall.open",
                {
                    "redis": {"ports": ["6379/tcp"], "sources": ["livekit", "10.0.0.0/24"]},
                    "keepalived": {"protocols": ["VRRP", 51], "sources": ["FE80::/10"]},
                    "vpn": {"ports": ["500/udp"], "protocols": [50, "41", "99"]},
                },
            ),
        ],
        """
        sshd          tcp 22           administration
        LiveKit       tcp 7880         signalling
        LiveKit       tcp 7881         ICE over TCP
        LiveKit       udp 50000-60000  media
        LiveKit       tcp 6789         metrics          to turn, 203.0.113.9/32
        redis         tcp 6379         another program  to livekit, 10.0.0.0/24
        keepalived    vrrp             another program  to fe80::/10
        keepalived    ah               another program  to fe80::/10
        vpn           udp 500          another program
        vpn           esp              another program
        vpn           6in4             another program
        vpn           99               another program
        """,
    ),
    "measured": (
        SFU1,
        [*WATCHED, (SFU1, "edge", {}), ("*", "monitor.port", 9997)],
        """
        sshd          tcp 22           administration
        LiveKit       tcp 7880         signalling          local
        LiveKit       tcp 7881         ICE over TCP
        LiveKit       udp 50000-60000  media
        LiveKit       tcp 6789         metrics             local
        edge          tcp 443          HTTPS and wss
        edge          tcp 80           redirects and ACME
        monitor       tcp 9997         metrics             to monitor
        monitor       tcp 9100         the host's metrics  local
        monitor       tcp 8404         the edge's metrics  local
        """,
    ),
    "the monitor": (
        MON1,
        WATCHED,
        """
        sshd          tcp 22    administration
        edge          tcp 443   HTTPS and wss
        edge          tcp 80    redirects and ACME
        monitor       tcp 9998  metrics             to monitor
        monitor       tcp 9100  the host's metrics  local
        monitor       tcp 8404  the edge's metrics  local
        monitor       tcp 9090  Prometheus          local
        monitor       tcp 9093  Alertmanager        local
        monitor       tcp 9436  test calls          local
        logs          tcp 9999  logs                to app, egress, livekit, monitor, redis, turn
        """,
    ),
    "the packet filter has 443": (
        TURN1,
        [ON_443],
        """
        sshd          tcp 22           administration
        coturn calls  udp 3478         STUN and TURN
        coturn calls  tcp 3478         TURN over TCP
        coturn calls  tcp 5349         TURN over TLS
        coturn calls  tcp 443          TURN over TLS on 443
        coturn calls  udp 49152-65535  relay range
        """,
    ),
}


def as_line(use: Use) -> str:
    whom = {"anyone": "", "this host": "local"}.get(use.open_to, f"to {use.open_to}")
    parts = (use.service, use.proto, use.ports, use.purpose, whom)
    return " ".join(filter(None, parts))


@pytest.mark.parametrize("case", TABLES)
def test_the_plan_is_the_table(case: str) -> None:
    host, edits, table = TABLES[case]
    expected = [" ".join(line.split()) for line in table.strip().splitlines()]
    assert [as_line(use) for use in port_plan(load(*edits)[host])] == expected


@pytest.mark.parametrize("case", TABLES)
def test_a_use_is_known_by_its_key_alone(case: str) -> None:
    host, edits, _ = TABLES[case]
    plan = port_plan(load(*edits)[host], (22, 2222))
    assert len({use.key for use in plan}) == len(plan)


@pytest.mark.parametrize("case", WAYS)
def test_the_ways_into_a_pool_are_the_table(case: str) -> None:
    host, edits, expected = WAYS[case]
    assert ways(load(*edits)[host], "calls") == expected


def test_a_unit_listens_on_what_it_takes_itself() -> None:
    def found(case: str, unit: str) -> list[str]:
        host, edits, _ = WAYS[case]
        return listeners(port_plan(load(*edits)[host]), unit)

    assert found("on 443 by the packet filter", CALLS) == ["udp/3478", "tcp/3478", "tcp/5349"]
    assert found("on 443 by the edge", CALLS) == ["udp/3478", "tcp/3480"]
    assert found("on 443 by the edge", EDGE) == ["tcp/3478", "tcp/5349", "tcp/443", "tcp/80"]


def test_behind_an_edge_scrapers_come_through_it() -> None:
    metrics = {"password": "secret:livekit/prometheus"}
    edge: list[Edit] = [(SFU1, "edge", {}), (SFU1, "livekit.prometheus", metrics)]
    (use,) = (use for use in port_plan(load(*edge)[SFU1]) if use.purpose == "metrics")
    assert (use.unit, use.audience) == ("livekit-server.service", "this host")
    edge.append((SFU1, "livekit.prometheus.sources", ["turn"]))
    assert listeners(port_plan(load(*edge)[SFU1]), EDGE) == ["tcp/6789", "tcp/443", "tcp/80"]


def test_only_what_comes_and_goes_is_marked_as_relay() -> None:
    fleet = load(*ONE_BOX, (SFU1, "turn.tcp_relay", True))
    purposes = {use.purpose for use in port_plan(fleet[SFU1]) if use.relay}
    assert purposes == {"media", "relay range"}


def test_every_port_sshd_really_listens_on_takes_the_place_of_the_one_connected_to() -> None:
    plan = port_plan(load()[TURN1], (22, 2222))
    assert [use.ports for use in plan if use.role == "sshd"] == ["22", "2222"]


def test_a_host_without_a_role_opens_ssh_alone() -> None:
    host = load(("app1.callready.test", "groups", []))["app1.callready.test"]
    assert [as_line(use) for use in port_plan(host)] == ["sshd tcp 22 administration"]


@pytest.mark.parametrize(
    ("value", "port"),
    [("443/tcp", ("tcp", 443, 443)), ("60000-60010/udp", ("udp", 60000, 60010))],
)
def test_an_extra_port_is_read(value: str, port: tuple[str, int, int]) -> None:
    assert parse_port(value) == port


def test_the_kernel_is_told_to_keep_off_all_of_it() -> None:
    host, edits, _ = TABLES["to some only, and protocols without ports"]
    assert reserved(port_plan(load(*edits)[host])) == "22,500,6379,6789,7880-7881,50000-60000"
    assert reserved(port_plan(load(*ONE_BOX)[SFU1])) == (
        "22,3478-3479,5349-5350,7880-7881,50000-65535"
    )


# Overlaps

SAME_BOX: list[Edit] = [(SFU1, "groups", ["livekit", "turn"]), (SFU1, "pools", ["calls"])]
TWO_POOLS: list[Edit] = [
    (TURN1, "pools", ["calls", "avatar"]),
    (TURN1, "turn.pools.avatar.listening_port", 3479),
    (TURN1, "turn.pools.avatar.tls_listening_port", 5350),
]


def conflicts(host: str, *edits: Edit) -> list[str]:
    with pytest.raises(SettingsError) as error:
        load(*edits)
    start = f"inventories/test: {host}: "
    return [line.removeprefix(start) for line in str(error.value).splitlines()]


@pytest.mark.parametrize(
    ("host", "edits", "message", "way_out"),
    [
        (
            SFU1,
            SAME_BOX,
            "turn.pools.calls.min_port: LiveKit (media 50000-60000) and coturn calls (relay range "
            "49152-65535) overlap on the same host; keep 50000-60000 for LiveKit, give 60001-65535 to "
            "coturn calls",
            [("turn.pools.calls.min_port", 60001)],
        ),
        (
            SFU1,
            [
                *SAME_BOX,
                (SFU1, "livekit.rtc.port_range_start", 55000),
                (SFU1, "livekit.rtc.port_range_end", 65535),
            ],
            "turn.pools.calls.min_port: LiveKit (media 55000-65535) and coturn calls (relay range "
            "49152-65535) overlap on the same host; keep 55000-65535 for LiveKit, give 49152-54999 to "
            "coturn calls",
            [("turn.pools.calls.max_port", 54999)],
        ),
        (
            SFU1,
            [
                *SAME_BOX,
                (SFU1, "turn.pools.calls.min_port", 52000),
                (SFU1, "turn.pools.calls.max_port", 53000),
            ],
            "livekit.rtc.port_range_start: LiveKit (media 50000-60000) and coturn calls (relay range "
            "52000-53000) overlap on the same host; keep 52000-53000 for coturn calls, give "
            "53001-60000 to LiveKit",
            [("livekit.rtc.port_range_start", 53001)],
        ),
        (
            SFU1,
            [*SAME_BOX, (SFU1, "turn.pools.calls.min_port", 60000)],
            "livekit.rtc.port_range_start: LiveKit (media 50000-60000) and coturn calls (relay range "
            "60000-65535) overlap on the same host; keep 60000-65535 for coturn calls, give "
            "50000-59999 to LiveKit",
            [("livekit.rtc.port_range_end", 59999)],
        ),
        (
            TURN1,
            TWO_POOLS,
            "turn.pools.avatar.min_port: coturn calls (relay range 49152-65535) and coturn avatar "
            "(relay range 49152-65535) overlap on the same host; give 49152-57343 to coturn calls and "
            "57344-65535 to coturn avatar",
            [("turn.pools.calls.max_port", 57343), ("turn.pools.avatar.min_port", 57344)],
        ),
        (
            SFU1,
            [
                (SFU1, "groups", ["livekit", "turn"]),
                (SFU1, "pools", ["calls", "avatar"]),
                (SFU1, "turn.pools.avatar.listening_port", 3479),
                (SFU1, "turn.tcp_relay", True),
                (SFU1, "turn.pools.avatar.tls_listening_port", 5350),
            ],
            "turn.pools.avatar.min_port: LiveKit (media 50000-60000) and coturn calls (relay range "
            "49152-65535) and coturn avatar (relay range 49152-65535) overlap on the same host; keep "
            "50000-60000 for LiveKit, give 60001-62767 to coturn calls and 62768-65535 to coturn "
            "avatar",
            [
                ("turn.pools.calls.min_port", 60001),
                ("turn.pools.calls.max_port", 62767),
                ("turn.pools.avatar.min_port", 62768),
            ],
        ),
        (
            TURN1,
            [
                *TWO_POOLS,
                (TURN1, "turn.pools.avatar.listening_port", 3478),
                (TURN1, "turn.pools.avatar.tls_listening_port", 5351),
                (TURN1, "turn.pools.calls.max_port", 57343),
                (TURN1, "turn.pools.avatar.min_port", 57344),
            ],
            "turn.pools.avatar.listening_port: port 3478/udp is taken twice on this host: coturn "
            "calls (STUN and TURN, turn.pools.calls.listening_port) and coturn avatar (STUN and "
            "TURN); give one of them another port",
            [("turn.pools.avatar.listening_port", 3479)],
        ),
        (
            TURN1,
            [
                *TWO_POOLS,
                (TURN1, "turn.pools.avatar.tls_listening_port", 5349),
                (TURN1, "turn.pools.calls.max_port", 57343),
                (TURN1, "turn.pools.avatar.min_port", 57344),
            ],
            "turn.pools.avatar.tls_listening_port: port 5349/tcp is taken twice on this host: coturn "
            "calls (TURN over TLS, turn.pools.calls.tls_listening_port) and coturn avatar (TURN over "
            "TLS); give one of them another port",
            [("turn.pools.avatar.tls_listening_port", 5350)],
        ),
        (
            SFU1,
            [(SFU1, "livekit.port", 22)],
            "livekit.port: port 22/tcp is taken twice on this host: sshd (administration, ssh_port) "
            "and LiveKit (signalling); give one of them another port",
            [("livekit.port", 7880)],
        ),
        (
            SFU1,
            [(SFU1, "livekit.port", 7881)],
            "livekit.rtc.tcp_port: port 7881/tcp is taken twice on this host: LiveKit (signalling, "
            "livekit.port) and LiveKit (ICE over TCP); give one of them another port",
            [("livekit.rtc.tcp_port", 7882)],
        ),
        (
            TURN1,
            [(TURN1, "turn.pools.calls.listening_port", 50000)],
            "turn.pools.calls.min_port: port 50000/udp is taken twice on this host: coturn calls "
            "(STUN and TURN, turn.pools.calls.listening_port) and coturn calls (relay range); give "
            "one of them another port",
            [("turn.pools.calls.min_port", 50001)],
        ),
        (
            SFU1,
            [*WAYS["on 443 by the edge"][1], (SFU1, "turn.pools.calls.tls_listening_port", 443)],
            "edge.port: port 443/tcp is taken twice on this host: coturn calls (TURN over TLS, "
            "turn.pools.calls.tls_listening_port) and edge (HTTPS and wss); give one of them another "
            "port",
            [("turn.pools.calls.tls_listening_port", 5349)],
        ),
        (
            SFU1,
            [(SFU1, "firewall.extra_ports", ["59990-60010/udp"])],
            "firewall.extra_ports: port 59990-60000/udp is taken twice on this host: LiveKit (media, "
            "livekit.rtc.port_range_start) and extra (firewall.extra_ports); give one of them another "
            "port",
            [("firewall.extra_ports", ["60001-60010/udp"])],
        ),
        (
            SFU1,
            [
                (SFU1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
                (SFU1, "firewall.open", {"scraper": {"ports": ["6789/tcp"], "sources": ["turn"]}}),
            ],
            "firewall.open.scraper: port 6789/tcp is taken twice on this host: LiveKit (metrics, "
            "livekit.prometheus.port) and scraper (another program); give one of them another port, "
            "or say who may scrape in livekit.prometheus.sources",
            [("livekit.prometheus.sources", ["turn"]), ("firewall.open", {})],
        ),
        (
            SFU1,
            [
                (SFU1, "firewall.extra_ports", ["6300-6400/tcp"]),
                (SFU1, "firewall.open", {"redis": {"ports": ["6379/tcp"], "sources": ["livekit"]}}),
            ],
            "firewall.open.redis: opens 6379/tcp to livekit, firewall.extra_ports to anyone: leave it "
            "out of the one that is not meant",
            [("firewall.extra_ports", ["6300-6378/tcp"])],
        ),
        (
            SFU1,
            [
                (
                    SFU1,
                    "firewall.open",
                    {
                        "vpn": {"protocols": ["esp"]},
                        "office": {"protocols": [50], "sources": ["203.0.113.0/24"]},
                    },
                ),
            ],
            "firewall.open.office: opens esp to 203.0.113.0/24, firewall.open.vpn to anyone: leave it "
            "out of the one that is not meant",
            [("firewall.open.vpn.protocols", ["gre"])],
        ),
    ],
)
def test_a_conflict_is_named_with_a_way_out_that_works(
    host: str, edits: list[Edit], message: str, way_out: list[tuple[str, object]]
) -> None:
    assert conflicts(host, *edits)[0] == message
    load(*edits, *((host, path, value) for path, value in way_out))


def test_every_conflict_of_a_host_is_named() -> None:
    found = conflicts(
        SFU1, *SAME_BOX, (SFU1, "livekit.port", 22), (SFU1, "firewall.extra_ports", ["5349/tcp"])
    )
    assert [line.partition(": ")[0] for line in found] == [
        "turn.pools.calls.min_port",
        "livekit.port",
        "firewall.extra_ports",
    ]


# The proposal is read back, taken, and checked again, for every way in which ranges can lie.
RANGES = [
    (first, last)
    for first in (1024, 10000, 20000, 20500, 29000, 49152, 64000)
    for last in (10999, 20999, 30000, 49252, 65435, 65535)
    if last - first >= 100
]


def relay(service: str, first: int, last: int) -> Use:
    return Use("coturn", service, "", "udp", first, last, "", "", relay=True)


@pytest.mark.parametrize("media", RANGES, ids=lambda r: f"{r[0]}-{r[1]}")
def test_every_proposed_split_works(media: tuple[int, int]) -> None:
    for calls, avatar in product(RANGES, [(49152, 65535), (20600, 20800), (2000, 2200)]):
        ranges = {"LiveKit": media, "coturn calls": calls, "coturn avatar": avatar}
        plan = [relay(name, a, b) for name, (a, b) in ranges.items()]
        for _, message in overlaps(plan):
            proposal = message.partition("; ")[2]
            if "too little" in proposal:
                assert media == calls == (49152, 49252)
                ranges.clear()
                break
            for first, last, name in re.findall(
                r"(\d+)-(\d+) (?:for|to) (LiveKit|coturn calls|coturn avatar)", proposal
            ):
                ranges[name] = (int(first), int(last))
        plan = [relay(name, a, b) for name, (a, b) in ranges.items()]
        assert list(overlaps(plan)) == []
        assert all(use.last - use.first >= 100 for use in plan), plan


def test_edges_of_one_service_have_a_port_for_each_other() -> None:
    """For the other hosts of the service, and for no other SFU."""
    edits: list[Edit] = [
        ("*", "edge", {}),
        ("*", "fleet_ca", "secret:fleet/ca"),
        ("*", "livekit.redis", {"address": "10.0.0.5:6379"}),
        ("*", "livekit.turn_pool", None),
        ("*", "livekit.rtc.stun_servers", ["stun.callready.test:3478"]),
        ("*", "turn.pools", {}),
        *((name, "groups", ["livekit"]) for name in (TURN1, TURN2)),
        *((name, "pools", ...) for name in (TURN1, TURN2)),
        (TURN1, "internal_address", "10.0.0.21"),
    ]
    fleet = load(*edits, (TURN2, "livekit.url", "wss://other.callready.test"))
    uses = {
        name: [use for use in port_plan(host) if use.setting == "edge.peers_port"]
        for name, host in fleet.hosts.items()
    }
    assert [use.some for use in uses[SFU1] + uses[TURN1]] == [(TURN1,), (SFU1,)]
    assert not uses[TURN2]
    ip4, ip6 = fleet.networks([TURN1])
    assert [*map(str, ip4), *map(str, ip6)] == ["10.0.0.21/32", "192.0.2.21/32", "2001:db8::21/128"]
    assert load(*edits)[TURN1].peers == (TURN2, SFU1)  # the next one first
