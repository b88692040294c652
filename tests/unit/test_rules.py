"""Rules between sections of a host, and between hosts: what does not fit together is refused."""

from ipaddress import ip_address

import pytest
from cryptography.x509 import DNSName, IPAddress

from callready.settings.uris import turn_uris
from tests.support.inventories import (
    MON1,
    SFU1,
    SOURCE,
    TURN1,
    TURN2,
    WATCHED,
    Authority,
    Edit,
    load,
    said,
)

pytestmark = pytest.mark.usefixtures("project")

ALL = f"{SFU1}, {TURN1}, {TURN2}"
NO_LIVEKIT = "not a key of livekit.yaml in any version; livekit-server 1.13.5 would not start"
METRICS = {"password": "secret:livekit/prometheus", "sources": ["turn"]}


@pytest.mark.parametrize(
    ("edits", "lines"),
    [
        (
            [(TURN1, "address", ...)],
            [
                f"{TURN1}: address: IPv6-only hosts are not supported, many callers have no IPv6: give "
                "the host an IPv4 address too"
            ],
        ),
        (
            [(TURN2, "address", ...)],
            [f"{TURN2}: address: is missing: the host's public IPv4 address"],
        ),
        *(
            (
                [(TURN1, "address", address)],
                [
                    f"{TURN1}: address: {address} is not reachable from the Internet: set the public "
                    "address, and private_address to the one on the interface"
                ],
            )
            for address in (
                "10.0.0.1",
                "172.31.255.255",
                "192.168.1.1",
                "100.64.0.1",
                "127.0.0.1",
                "169.254.1.1",
                "0.0.0.0",
                "224.0.0.1",
            )
        ),
        *(
            (
                edits,
                [
                    f"{TURN1}: {key}: {address} is an unspecified, loopback, link-local, multicast or "
                    f"reserved address: write the one that {which}"
                ],
            )
            for address in ("0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255")
            for key, edits, which in (
                (
                    "private_address",
                    [(TURN1, "private_address", address)],
                    "the host's interface has behind 1:1 NAT",
                ),
                (
                    "address",
                    [(TURN1, "address", address), ("*", "livekit.url", f"ws://{SFU1}:7880")],
                    "callers reach",
                ),
            )
        ),
        *(
            (
                [(TURN1, "address6", address)],
                [f"{TURN1}: address6: {address} is not reachable from the Internet"],
            )
            for address in ("fd00::1", "fe80::1", "::1", "ff02::1", "::ffff:c000:201")
        ),
        *(
            (
                [(SFU1, "internal_address", address)],
                [
                    f"{SFU1}: internal_address: {address} is an unspecified, loopback, link-local, "
                    "multicast or reserved address: write the one that the host's interface has on "
                    "the internal network"
                ],
            )
            for address in (
                *("127.0.0.2", "0.0.0.0", "224.0.0.18", "169.254.0.1", "255.255.255.255"),
                *("::1", "::", "fe80::1", "ff02::12"),
            )
        ),
        (
            [(TURN1, "internal_address", "2001:0db8::21")],
            [
                f"{TURN1}: internal_address: 2001:db8::21 is address6 too: callers are told of it; "
                "leave internal_address out"
            ],
        ),
        (
            [("*", "internal_address", "10.0.0.9")],
            [
                f"{SFU1}, {TURN1}, {TURN2}: internal_address: 10.0.0.9 is the address of more than "
                "one host"
            ],
        ),
        *(
            (
                [(SFU1, "internal_address", "10.0.0.9"), (SFU1, "livekit.rtc.ips", ips)],
                [
                    f"{SFU1}: livekit.rtc.ips: tells callers of internal_address 10.0.0.9, which they "
                    f"cannot reach: {mend}"
                ],
            )
            for ips, mend in (
                (None, "leave it out"),
                ({"includes": ["10.0.0.9"]}, "take that out of includes"),
                ({"includes": ["2001:db8:9::/48", "0.0.0.0/0"]}, "take that out of includes"),
            )
        ),
        (
            [
                (SFU1, "private_address", "10.0.0.11"),
                (SFU1, "livekit.rtc.ips.includes", ["192.0.2.12", "2001:db8::12"]),
            ],
            [
                f"{SFU1}: livekit.rtc.ips.includes: 192.0.2.12/32 would be told to callers as "
                "192.0.2.11: behind 1:1 NAT (private_address) LiveKit has one IPv4 address only; "
                "leave it out"
            ],
        ),
        (
            [
                ("*", "firewall.enabled", False),
                (SFU1, "livekit.prometheus", METRICS),
                (TURN1, "firewall.open", {"x": {"ports": ["1/tcp"], "sources": ["livekit"]}}),
            ],
            [
                f"{SFU1}: livekit.prometheus.sources: needs the packet filter, which firewall.enabled "
                "= False leaves out: enable it",
                f"{TURN1}: firewall.open.x.sources: needs the packet filter, which firewall.enabled = "
                "False leaves out: enable it",
            ],
        ),
        (
            [
                (SFU1, "livekit.prometheus", METRICS),
                (SFU1, "livekit.bind_addresses", ["127.0.0.1", "::1"]),
            ],
            [
                f"{SFU1}: livekit.prometheus.sources: nobody but the host reaches the metrics: they "
                "listen on livekit.bind_addresses, which is loopback; add an address of the host "
                "there"
            ],
        ),
        (
            [
                (
                    TURN1,
                    "firewall.open",
                    {"x": {"ports": ["1/tcp"], "sources": ["monitors", SFU1, "spare", "turn"]}},
                ),
                ("spare1", "groups", ["spare"]),
            ],
            [
                f"{TURN1}: firewall.open.x.sources: 'monitors' is no group of the inventory (livekit, "
                "spare, turn)",
                f"{TURN1}: firewall.open.x.sources: {SFU1} is a host: write 192.0.2.11, 2001:db8::11, "
                "or a group that it is in",
                f"spare1: address: is missing: firewall.open.x.sources of {TURN1} lets in the hosts of "
                "group spare",
            ],
        ),
        (
            [*WATCHED, ("*", "monitor.sources", ["monitors"])],
            [
                f"{SFU1}, {TURN1}, {TURN2}, {MON1}: monitor.sources: 'monitors' is no group of the "
                "inventory (livekit, monitor, turn)"
            ],
        ),
        ([(SFU1, "livekit", ...)], [f"{SFU1}: livekit: is missing: the host is in group livekit"]),
        (
            [(TURN1, "pools", ...)],
            [
                f"{TURN1}: pools: is missing: which TURN pools this host of group turn runs",
                "turn.pools.calls: no host of group turn has it in its pools",
            ],
        ),
        (
            [
                (TURN1, "groups", ["app"]),
                (TURN1, "app", {"env_file": "/srv/.env"}),
                (TURN2, "pools", ["avatar", "calls"]),
                (
                    TURN2,
                    "turn.pools.calls",
                    {
                        "listening_port": 3479,
                        "tls_listening_port": 5350,
                        "realm": "callready.test",
                        "secrets": ["secret:turn/calls"],
                        "max_port": 57343,
                    },
                ),
                (TURN2, "turn.pools.avatar.min_port", 57344),
            ],
            [f"{TURN1}: pools: needs the host in group turn"],
        ),
        (
            [(TURN1, "pools", ["calls", "other"])],
            [f"{TURN1}: pools: 'other' is not one of turn.pools (calls, avatar)"],
        ),
        (
            [("*", "livekit.turn_pool", "other")],
            [f"{SFU1}: livekit.turn_pool: 'other' is not one of turn.pools"],
        ),
        (
            [("*", "livekit.version", "1.12.9")],
            [
                f"{SFU1}: livekit.version: 1.12.9 does not know rtc.turn_servers[].secret_file, which it "
                "would read the secret of pool calls from: set 1.13.0 or later"
            ],
        ),
        (
            [("*", "livekit.turn_pool", None)],
            [
                f"{SFU1}: livekit.rtc.stun_servers: is empty and there is no turn_pool: LiveKit would "
                "send its clients to public STUN servers; name one"
            ],
        ),
        (
            [("*", "turn.pools.spare", {"realm": "x.test", "secrets": ["secret:livekit/second"]})],
            ["turn.pools.spare: no host of group turn has it in its pools"],
        ),
        (
            [
                (TURN2, "pools", ["calls"]),
                (TURN2, "turn.pools.calls.realm", "other.test"),
                ("*", "turn.pools.avatar", ...),
            ],
            [
                f"{TURN1}, {TURN2}: turn.pools.calls: realm, secrets or users differ between its hosts; "
                "callers are sent to any of them: set them once for the group"
            ],
        ),
        (
            [
                (TURN1, "groups", ["turn", "app"]),
                (TURN1, "app.env_file", "/srv/.env"),
                (TURN1, "livekit.keys.APIunit", "secret:livekit/second"),
            ],
            [
                "livekit.keys: differ between hosts; the app's tokens would be refused with 401: set "
                "them once"
            ],
        ),
        (
            [(TURN1, "groups", ["turn", "app"])],
            [f"{TURN1}: app: is missing: the host is in group app"],
        ),
        (
            [
                (TURN1, "groups", ["turn", "app"]),
                (TURN1, "app.env_file", "/srv/.env"),
                (TURN1, "livekit", ...),
            ],
            [f"{TURN1}: livekit: is missing: the app's .env needs the key and the URL"],
        ),
        (
            [("*", "tls", ...)],
            [
                f"{name}: tls: is missing: {name} needs certificate and key (without TURN over TLS, "
                "turn.tls = False, callers behind strict firewalls are shut out)"
                for name in (TURN1, TURN2)
            ],
        ),
        (
            [("*", "tls.key", "certificates/{host}.key")],
            [
                f"{name}: tls: key certificates/{name}.key: No such file or directory"
                for name in (TURN1, TURN2)
            ],
        ),
        (
            [("*", "livekit.config", {"rooms": {}})],
            [f"{SFU1}: livekit.config.rooms: {NO_LIVEKIT}; did you mean room?"],
        ),
        (
            [("*", "livekit.config", {"rtc": {"port_range_start": 5}})],
            [
                f"{SFU1}: livekit.config.rtc.port_range_start: callready writes it: set "
                "livekit.rtc.port_range_start instead"
            ],
        ),
        (
            [("*", "turn.pools.calls.extra", {"no-udp-relay-bandwidth-limit": True})],
            [
                f"{TURN1}: turn.pools.calls.extra.no-udp-relay-bandwidth-limit: not a coturn key in any "
                "version: bandwidth is unlimited by default; to limit it use max-bps (bytes/s per "
                "session) or bps-capacity (bytes/s for the server)"
            ],
        ),
        (
            [("*", "deploy", {"gate_from": TURN1})],
            [f"{TURN1}: deploy.gate_from: is {TURN1} itself; it is probed from another host"],
        ),
        (
            [(SFU1, "deploy", {"gate_from": "nobody"})],
            [f"{SFU1}: deploy.gate_from: 'nobody' is not one of the hosts: {ALL}"],
        ),
        (
            [(name, "groups", []) for name in (SFU1, TURN1, TURN2)]
            + [(name, "pools", ...) for name in (TURN1, TURN2)]
            + [("*", "turn", ...)],
            ["no host in group livekit or turn: nothing to deploy"],
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(edits: list[Edit], lines: list[str]) -> None:
    assert said(*edits) == lines


REDIS: Edit = ("*", "livekit.redis", {"address": "10.0.0.5:6379"})
SECOND_SFU: list[Edit] = [
    (TURN1, "groups", ["livekit", "turn"]),
    (TURN1, "turn.pools.calls.min_port", 60001),
]


@pytest.mark.parametrize(
    ("edits", "wrong"),
    [
        ([], "is missing"),
        ([REDIS, (TURN1, "livekit.redis", ...)], "is missing"),
        ([(TURN1, "livekit.url", "wss://LIVEKIT.callready.test:443/")], "is missing"),
        *(
            (
                [("*", "livekit.redis", {"address": address})],
                "is one of each host's own (a loopback address or a socket)",
            )
            for address in (
                *("127.0.0.1:6379", "127.5.5.5:6379", "[::1]:6379", "0.0.0.0:6379", "[::]:6379"),
                *("localhost:6379", "LocalHost:6379", "redis.localhost:6379", "ip6-localhost:1"),
                "/run/redis/redis.sock",
            )
        ),
        ([REDIS, (TURN1, "livekit.redis.db", 3)], "differs in address or db"),
        ([REDIS, (TURN1, "livekit.redis.address", "10.0.0.6:6379")], "differs in address or db"),
        ([REDIS, (TURN1, "livekit.redis.address", "10.0.0.5:6380")], "differs in address or db"),
    ],
)
def test_sfus_behind_one_url_need_one_redis(edits: list[Edit], wrong: str) -> None:
    assert said(*SECOND_SFU, *edits) == [
        f"{SFU1}, {TURN1}: livekit.redis: {wrong}: livekit.callready.test leads the callers of one "
        "room to any of these SFUs, and they would not meet. Give all the same Redis, or each a "
        "livekit.url of its own"
    ]


def test_sfus_with_one_redis_or_urls_of_their_own_are_taken() -> None:
    load(*SECOND_SFU, REDIS, (TURN1, "livekit.redis.address", "10.0.0.5:6379"))
    load(*SECOND_SFU, (TURN1, "livekit.url", "wss://other.callready.test"))
    load(*SECOND_SFU, (TURN1, "livekit.url", "wss://livekit.callready.test:7443"))
    load(("*", "livekit.redis", {"address": "127.0.0.1:6379"}))


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [("1.12.0", True), ("1.14.9", True), ("1.15.0", False), ("2.13.5", False)],
)
def test_nodes_of_a_cluster_are_at_most_one_minor_version_apart(
    version: str, is_taken: bool
) -> None:
    """Whatever their URLs: they meet in Redis."""
    other: Edit = (TURN1, "livekit.url", "wss://other.callready.test")
    no_pool: list[Edit] = [
        ("*", "livekit.turn_pool", None),
        ("*", "livekit.rtc.stun_servers", ["a:1"]),
    ]
    edits: list[Edit] = [*SECOND_SFU, REDIS, *no_pool, (TURN1, "livekit.version", version)]
    if is_taken:
        load(*edits)
    else:
        for more in ([], [other]):
            assert said(*edits, *more) == [
                f"{SFU1}, {TURN1}: livekit.version: is 1.13.5 on one of these SFUs and {version} on "
                "another, and they share a Redis: they understand each other one minor version "
                "apart at most"
            ]
    load(*edits, other, (TURN1, "livekit.redis.db", 3))


def test_edges_of_one_name_know_each_other_by_one_authority() -> None:
    edges: list[Edit] = [*SECOND_SFU, REDIS, ("*", "edge", {})]
    why = (
        "is missing: edges of livekit.callready.test hand callers to each other by it; write "
        '"secret:fleet/ca" once for all hosts'
    )
    assert said(*edges) == [f"{SFU1}, {TURN1}: fleet_ca: {why}"]
    one: Edit = (SFU1, "fleet_ca", "secret:fleet/ca")
    assert said(*edges, one) == [f"{TURN1}: fleet_ca: {why}"]
    assert said(*edges, one, (TURN1, "fleet_ca", "secret:monitor/password")) == [
        f"{SFU1}, {TURN1}: fleet_ca: differs, and by it the edges of these hosts know each other: "
        "set it once"
    ]
    own: Edit = (TURN1, "livekit.url", "wss://other.callready.test")
    load(*edges, own)  # no service in common
    load(*edges, (TURN1, "edge", None))
    ca: Edit = ("*", "fleet_ca", "secret:fleet/ca")
    assert said(*edges, ca, ("*", "firewall.enabled", False)) == [
        f"{SFU1}, {TURN1}: edge.peers_port: needs the packet filter, which firewall.enabled = False "
        "leaves out: enable it"
    ]


def test_http_01_proves_no_name_of_two_hosts() -> None:
    acme = {"acme": {"email": "ops@callready.test"}}
    edits: list[Edit] = [
        *SECOND_SFU,
        REDIS,
        ("*", "edge", {}),
        ("*", "fleet_ca", "secret:fleet/ca"),
    ]
    assert said(*edits, ("*", "tls", acme)) == [
        f"{SFU1}, {TURN1}: tls.acme.challenge: http-01 cannot prove livekit.callready.test to the "
        "authority, which asks any one of these hosts, also for the certificate of another: use "
        "dns-01 (docs/certificates.md#dns-01), or certificate and key"
    ]
    ovh = {
        "credentials": {
            key: "secret:short" for key in ("application_key", "application_secret", "consumer_key")
        }
    }
    load(*edits, ("*", "tls", {"acme": {**acme["acme"], "challenge": "dns-01", "dns": ovh}}))
    load(("*", "edge", {}), ("*", "tls", acme))


@pytest.mark.parametrize(
    ("region", "regions", "lines"),
    [
        (
            None,
            [{"name": "eu", "lat": 48.8, "lon": 2.3}],
            [
                'region: is missing: livekit.config.node_selector.kind is "regionaware"; write where '
                "this host is"
            ],
        ),
        (
            "us",
            [{"name": "eu", "lat": 48.8, "lon": 2.3}],
            [
                "livekit.config.node_selector.regions: has no us, which is region of this host: add "
                "its name, lat and lon"
            ],
        ),
        (
            "us",
            None,
            [
                "livekit.config.node_selector.regions: has no us, which is region of this host: add "
                "its name, lat and lon"
            ],
        ),
        ("eu", [{"name": "eu", "lat": 48.8, "lon": 2.3}], []),
    ],
)
def test_who_chooses_by_distance_knows_the_regions(
    region: str | None, regions: object, lines: list[str]
) -> None:
    selector = {"kind": "regionaware", "regions": regions}
    edits: list[Edit] = [
        (SFU1, "region", region),
        (SFU1, "livekit.config", {"node_selector": selector}),
    ]
    if lines:
        assert said(*edits) == [f"{SFU1}: {line}" for line in lines]
    else:
        load(*edits)


APP = {"env_file": "/srv/.env", "upstream": "127.0.0.1:8000"}
APP_ON_TURN2: list[Edit] = [
    (TURN2, "groups", ["app"]),
    (TURN2, "pools", ...),
    ("*", "turn.pools.avatar", ...),
]
LIVEKIT = "livekit.callready.test"


@pytest.mark.parametrize(
    ("edits", "hosts", "key", "why"),
    [
        (
            [(TURN1, "name", SFU1)],
            (SFU1, TURN1),
            "name",
            f"{SFU1} is name of {SFU1} and name of {TURN1}",
        ),
        (
            [(TURN1, "name", SFU1.upper())],
            (SFU1, TURN1),
            "name",
            f"{SFU1} is name of {SFU1} and name of {TURN1}",
        ),
        (
            [(TURN1, "name", LIVEKIT)],
            (SFU1, TURN1),
            "name",
            f"{LIVEKIT} is livekit.url of {SFU1} and name of {TURN1}",
        ),
        (
            [(name, "name", "turn.callready.test") for name in (TURN1, TURN2)],
            (TURN1, TURN2),
            "name",
            f"turn.callready.test is name of {TURN1} and name of {TURN2}",
        ),
        (
            [(TURN1, "name", "192.0.2.22"), ("*", "turn.tls", False)],
            (TURN1, TURN2),
            "name",
            f"192.0.2.22 is name of {TURN1} and address of {TURN2}",
        ),
        *(
            (
                [
                    *APP_ON_TURN2,
                    (host, "edge", {}),
                    (TURN2, "app", {**APP, "url": f"https://{LIVEKIT}"}),
                ],
                (SFU1, TURN2),
                "app.url",
                f"{LIVEKIT} is livekit.url of {SFU1} and app.url of {TURN2}",
            )
            for host in ("*", SFU1, TURN2)
        ),
        (
            [*APP_ON_TURN2, (TURN2, "edge", {}), (TURN2, "app", {**APP, "url": f"https://{SFU1}"})],
            (SFU1, TURN2),
            "app.url",
            f"{SFU1} is name of {SFU1} and app.url of {TURN2}",
        ),
        (
            [*APP_ON_TURN2, (TURN2, "app", {**APP, "url": f"https://{TURN1}/api"})],
            (TURN1, TURN2),
            "name",
            f"{TURN1} is name of {TURN1} and app.url of {TURN2}",
        ),
        (
            [
                *SECOND_SFU,
                ("*", "edge", {}),
                (TURN1, "edge", {"port": 7443}),
                (TURN1, "livekit.url", f"wss://{LIVEKIT}:7443"),
            ],
            (SFU1, TURN1),
            "livekit.url",
            f"{LIVEKIT} is livekit.url of {SFU1} and livekit.url of {TURN1}",
        ),
        (
            [("*", "livekit.url", "ws://[2001:DB8:0::21]:7880")],
            (SFU1, TURN1),
            "livekit.url",
            f"2001:db8::21 is livekit.url of {SFU1} and address of {TURN1}",
        ),
    ],
)
def test_one_name_for_different_hosts_is_refused(
    edits: list[Edit], hosts: tuple[str, str], key: str, why: str
) -> None:
    assert said(*edits) == [
        f"{', '.join(hosts)}: {key}: {why}, and a name leads to one host: give each a name of its own"
    ]


def test_names_that_a_cluster_or_a_proxy_of_the_operators_shares_are_taken() -> None:
    load(*SECOND_SFU, REDIS, ("*", "edge", {}), ("*", "fleet_ca", "secret:fleet/ca"))
    load(*SECOND_SFU, REDIS, ("*", "livekit.url", f"ws://{SFU1}:7880"))
    behind_a_proxy: Edit = (TURN2, "app", {**APP, "url": f"https://{LIVEKIT}/api"})
    load(*APP_ON_TURN2, behind_a_proxy)
    on_the_apps_host: Edit = ("*", "livekit.url", f"wss://{LIVEKIT}:7443")
    load(*APP_ON_TURN2, (TURN2, "edge", {}), behind_a_proxy, on_the_apps_host)


def test_a_pool_for_the_sfu_needs_one() -> None:
    edits: list[Edit] = [(SFU1, "groups", ["app"]), (SFU1, "app", {"env_file": "/srv/.env"})]
    assert said(*edits) == [
        f'{TURN1}: turn.pools.calls.peers: is "sfu", and no host is in group livekit, so it would '
        'relay to nobody: put the SFU there, name its address in allowed_peers, or write "internet"'
    ]
    load(*edits, ("*", "turn.pools.calls.allowed_peers", ["192.0.2.11"]))
    load(*edits, ("*", "turn.pools.calls.peers", "internet"))


def test_the_ports_of_one_host_are_checked_with_the_rest() -> None:
    (line,) = said((SFU1, "groups", ["livekit", "turn"]), (SFU1, "pools", ["calls"]))
    assert line == (
        f"{SFU1}: turn.pools.calls.min_port: LiveKit (media 50000-60000) and coturn calls (relay "
        "range 49152-65535) overlap on the same host; keep 50000-60000 for LiveKit, give "
        "60001-65535 to coturn calls"
    )


def test_the_app_needs_a_name_of_its_own_beside_livekit() -> None:
    app = {"env_file": "/srv/.env", "upstream": "127.0.0.1:8000"}
    edits = [(SFU1, "groups", ["livekit", "app"]), (SFU1, "edge", {})]
    (line,) = said(*edits, (SFU1, "app", {**app, "url": "https://livekit.callready.test/"}))
    assert line == (
        f"{SFU1}: app.url: is LiveKit's name too (livekit.url): give each a name of its own"
    )
    load(*edits, (SFU1, "app", {**app, "url": "https://app.callready.test"}))


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        (
            [(SFU1, "edge", {"port": 8443}), (SFU1, "app.url", "https://app.callready.test:8443")],
            "livekit.url: leads to port 443, the edge listens on edge.port: write "
            "wss://livekit.callready.test:8443, or set edge.port to 443",
        ),
        (
            [(SFU1, "edge", {}), ("*", "livekit.url", "wss://livekit.callready.test:7443")],
            "livekit.url: leads to port 7443, the edge listens on edge.port: write "
            "wss://livekit.callready.test, or set edge.port to 7443",
        ),
        (
            [(SFU1, "edge", {}), ("*", "livekit.url", "ws://livekit.callready.test:443")],
            "livekit.url: must be wss:// with an edge, which takes TLS only",
        ),
        (
            [(SFU1, "edge", {}), (SFU1, "app.url", "https://app.callready.test:8443/v1")],
            "app.url: leads to port 8443, the edge listens on edge.port: write "
            "https://app.callready.test, or set edge.port to 8443",
        ),
        (
            [(SFU1, "edge", {}), (SFU1, "app.url", "http://app.callready.test:443")],
            "app.url: must be https:// with an edge, which takes TLS only",
        ),
    ],
)
def test_a_url_that_does_not_lead_to_the_edge_is_refused(edits: list[Edit], line: str) -> None:
    app = {"env_file": "/srv/.env", "url": "https://app.callready.test", "upstream": "[::1]:8000"}
    host: list[Edit] = [(SFU1, "groups", ["livekit", "app"]), (SFU1, "app", app)]
    assert said(*host, *edits) == [f"{SFU1}: {line}"]


def test_turn_on_443_needs_the_edge_of_its_host_there() -> None:
    edits: list[Edit] = [
        (SFU1, "groups", ["livekit", "turn"]),
        (SFU1, "name", "turn.callready.test"),
        (SFU1, "pools", ["calls"]),
        (SFU1, "turn.pools.calls.tls_on_443", True),
        (SFU1, "turn.pools.calls.min_port", 60001),
        (SFU1, "edge", {"port": 8443}),
        ("*", "livekit.url", "wss://livekit.callready.test:8443"),
    ]
    assert said(*edits) == [
        f"{SFU1}: edge.port: must be 443 for turn.tls_on_443, which this host has"
    ]


def test_the_edge_serves_no_address_even_with_a_certificate_for_it(authority: Authority) -> None:
    chain, key = authority.issue(IPAddress(ip_address("192.0.2.11")), DNSName(SFU1))
    tls: Edit = ("*", "tls", {"certificate": chain, "key": key})
    turn: list[Edit] = [
        ("*", "turn.pools.avatar", ...),
        (TURN1, "groups", []),
        (TURN1, "pools", ...),
        (TURN2, "groups", []),
        (TURN2, "pools", ...),
        (SFU1, "groups", ["livekit", "turn"]),
        (SFU1, "pools", ["calls"]),
        (SFU1, "turn.pools.calls.min_port", 60001),
    ]
    why = (
        "is an address, which clients do not send in the TLS handshake (RFC 6066, section 3), and "
        "the edge chooses the certificate by what they send: use a host name"
    )
    edge: list[Edit] = [(SFU1, "edge", {}), (SFU1, "livekit.url", f"wss://{SFU1}")]
    at_443 = (SFU1, "turn.pools.calls.tls_on_443", True)
    named = (SFU1, "name", "192.0.2.11")
    assert said(tls, *turn, *edge, named, at_443) == [f"{SFU1}: name: {why}"]
    load(tls, *turn, *edge, named)  # coturn itself asks for no name
    url = (SFU1, "livekit.url", "wss://192.0.2.11")
    assert said(tls, *turn, *edge, url) == [f"{SFU1}: livekit.url: {why}"]


def test_a_url_may_have_the_edges_port_or_lead_to_a_proxy_of_the_operators() -> None:
    load((SFU1, "edge", {"port": 8443}), ("*", "livekit.url", "wss://livekit.callready.test:8443"))
    load(("*", "livekit.url", "wss://livekit.callready.test:7443"))
    load(("*", "livekit.url", "ws://sfu1.callready.test:80"), (SFU1, "livekit.port", 80))
    (warning,) = load(("*", "livekit.url", "ws://sfu1.callready.test")).warnings
    assert warning == (
        f"{SOURCE}: {SFU1}: livekit.url: leads to port 80, LiveKit listens on 7880 "
        "(livekit.port): callers need a proxy of yours in between"
    )


def test_an_older_livekit_is_taken_where_its_pool_has_fixed_users_or_there_is_none() -> None:
    old = ("*", "livekit.version", "1.12.9")
    users: Edit = ("*", "turn.pools.calls.users", {"bob": "secret:turn/user"})
    load(old, ("*", "turn.pools.calls.secrets", ...), users)
    load(old, ("*", "livekit.turn_pool", None), ("*", "livekit.rtc.stun_servers", ["x.test:3478"]))


def test_the_app_listens_on_an_address_of_either_family() -> None:
    for upstream in ("127.0.0.1:8000", "[::1]:8000"):
        load((SFU1, "app", {"env_file": "/srv/.env", "upstream": upstream}))


def test_a_private_address_is_fine_on_a_lan_without_tls() -> None:
    load(("*", "livekit.url", "ws://sfu1.callready.test:7880"), (SFU1, "address", "10.0.0.11"))


def test_a_certificate_for_another_name_is_refused_host_by_host(authority: Authority) -> None:
    chain, key = authority.issue(DNSName(TURN1))
    (line,) = said(("*", "tls", {"certificate": chain, "key": key}))
    assert line == f"{TURN2}: tls: certificate {chain} is for {TURN1}, not for {TURN2}"


def test_what_is_only_unwise_is_a_warning() -> None:
    (warning,) = load(("*", "turn.pools.calls.extra", {"max-allocate-lifetime": 7200})).warnings
    assert warning == (
        f"{SOURCE}: {TURN1}: turn.pools.calls.extra.max-allocate-lifetime: 7200 is taken, but RFC "
        "8656, section 7.2: no more than 3600 s is recommended, coturn's default; allocations of "
        "callers who vanished hold their ports for as long"
    )


CALLS = f"{SOURCE}: {TURN1}: turn.pools.calls"
AVATAR = f"{SOURCE}: {TURN2}: turn.pools.avatar"
ALL_24 = "3 URIs x 2 address families x 2 peer connections x 2 networks = 24 each"


@pytest.mark.parametrize(
    ("edits", "warning"),
    [
        ([("*", "turn.pools.calls.user_quota", 24)], ""),
        ([("*", "turn.pools.calls.user_quota", 0)], ""),
        (
            [("*", "turn.pools.calls.user_quota", 23)],
            f"{CALLS}.user_quota: 23 allocations are too few for 1 of its callers ({ALL_24}): more "
            "are refused with 486, and a call may be without a relay; leave it out, or set 24 or "
            "more",
        ),
        ([("*", "turn.pools.calls.user_quota", 23), (TURN1, "turn.pools.calls.tls", False)], ""),
        ([("*", "turn.pools.calls.user_quota", 23), (TURN1, "address6", ...)], ""),
        (
            [
                ("*", "turn.pools.avatar.secrets", ...),
                ("*", "turn.pools.avatar.users", {"bob": "secret:turn/user"}),
                ("*", "turn.pools.avatar.user_quota", 48),
            ],
            f"{AVATAR}.user_quota: 48 allocations are too few for 10 of its callers",
        ),
        (
            [("*", "turn.pools.calls.min_port", 65000), ("*", "turn.pools.calls.max_port", 65199)],
            f"{CALLS}.max_port: 200 allocations, of the 200 relay ports 65000-65199, may be held "
            f"by 8 callers ({ALL_24}): allow 240 or more",
        ),
        (
            [("*", "turn.pools.calls.total_quota", 100)],
            f"{CALLS}.total_quota: 100 allocations, of the 16384 relay ports 49152-65535, may be "
            f"held by 4 callers ({ALL_24}): allow 240 or more",
        ),
        (
            [("*", "turn.pools.calls.total_quota", 16385)],
            f"{CALLS}.total_quota: 16385 is more than the 16384 relay ports 49152-65535, and ",
        ),
    ],
)
def test_a_pool_that_does_not_hold_what_its_uris_ask_for_is_a_warning(
    edits: list[Edit], warning: str
) -> None:
    warnings = load(*edits).warnings
    assert len(warnings) == bool(warning)
    assert all(each.startswith(warning) for each in warnings)


def test_unset_quotas_are_what_callers_and_the_ports_ask_for() -> None:
    users = ("*", "turn.pools.avatar.users", {"bob": "secret:turn/user"})
    fleet = load(("*", "turn.pools.avatar.secrets", ...), users, ("*", "turn.max_port", 60000))
    calls, avatar = fleet[TURN1].turn_pools["calls"], fleet[TURN2].turn_pools["avatar"]
    assert (calls.allocations_per_user, avatar.allocations_per_user) == (48, 0)
    assert calls.allocations == 60000 - 49152 + 1


def test_443_of_a_turn_host_without_packet_filter_is_coturns_own() -> None:
    off, on_443 = (TURN1, "firewall", {"enabled": False}), "turn.pools.calls"
    (line,) = said(off, ("*", f"{on_443}.tls_on_443", True))
    assert line.startswith(f"{TURN1}: turn.tls_on_443: needs the packet filter, ")
    assert "write tls_listening_port = 443 instead" in line
    fleet = load(off, (TURN1, f"{on_443}.tls_listening_port", 443))
    assert f"turns:{TURN1}:443?transport=tcp" in turn_uris(fleet, SFU1)


def test_keys_of_all_pools_are_defaults_of_each() -> None:
    fleet = load(("*", "turn.user_quota", 3), ("*", "turn.pools.avatar.user_quota", 4))
    assert fleet[TURN1].turn_pools["calls"].user_quota == 3
    assert fleet[TURN2].turn_pools["avatar"].user_quota == 4


MONITOR = next(value for host, key, value in WATCHED if (host, key) == ("*", "monitor"))
SAID_OF_MONITORS: list[tuple[list[Edit], str]] = [
    (
        [(MON1, "groups", ["app"]), (MON1, "app", None)],
        "monitor: is set, and no host is in group monitor: put one into it, or take monitor out",
    ),
    ([(SFU1, "monitor", ...)], f"{SFU1}: monitor: is missing: {MON1} watches every host"),
    (
        [(MON1, "monitor", ...)],
        f"{MON1}: monitor: is missing: callready sets up Prometheus on the host of group monitor",
    ),
    ([("*", "fleet_ca", ...)], "fleet_ca: is missing: the monitor and the hosts know each other"),
    ([(MON1, "edge", ...)], f"{MON1}: edge: is missing: it serves monitor.url; write edge = {{}}"),
    (
        [(SFU1, "livekit.prometheus", ...)],
        f"{SFU1}: livekit.prometheus: is missing: the monitor reads LiveKit's metrics",
    ),
    ([("*", "monitor", {**MONITOR, "page": {}})], f"{MON1}: monitor.page: is missing: nobody"),
    (
        [("*", "monitor", {**MONITOR, "ticket": {"mail": ["a@b.test"]}})],
        f"{MON1}: monitor.mail: is missing: the server that takes mails of alerts",
    ),
    (
        [("*", "monitor", {**MONITOR, "ticket": {"webhooks": ["hooks.b.test/token"]}})],
        f"{MON1}: monitor.ticket.webhooks.0: is not an http:// or https:// URL",
    ),
    (
        [("*", "monitor", {**MONITOR, "url": "http://monitor.callready.test"})],
        f"{MON1}: monitor.url: must be https:// with an edge, which takes TLS only",
    ),
    (
        [(TURN1, "groups", ["turn", "monitor"]), (TURN1, "edge", {})],
        f"{TURN1}: monitor.watchdog: is missing: the monitor is on a host that it watches",
    ),
    ([(TURN1, "groups", ["turn", "monitor"])], "are in group monitor, and one host watches all"),
    (
        [("monitor", "groups", ["turn"]), ("monitor", "pools", ["calls"])],
        "monitor: its certificate would open every host's metrics as the monitor's does",
    ),
    (
        [("*", "monitor", {**MONITOR, "mail": {"smarthost": "mail.b.test", "sender": "a@b.test"}})],
        "monitor.mail.smarthost: 'mail.b.test' is not HOST:PORT",
    ),
    (
        [(SFU1, "monitor", {**MONITOR, "port": 9999})],
        "monitor: differs between hosts: set monitor and fleet_ca once for all",
    ),
]


@pytest.mark.parametrize(("edits", "line"), SAID_OF_MONITORS)
def test_a_monitor_that_would_not_work_is_refused(edits: list[Edit], line: str) -> None:
    told = said(*WATCHED, *edits)
    assert any(line in each for each in told), told
    assert "hooks.b.test" not in "".join(told)


def test_test_calls_with_the_app_s_key_are_warned_of() -> None:
    second: Edit = (SFU1, "livekit.keys.APIcaller", "secret:livekit/second")
    (warning,) = load(*WATCHED, second).warnings
    assert warning.startswith(f"{SOURCE}: {SFU1}: monitor.livekit_key: test calls of the monitor")
    assert not load(*WATCHED, second, ("*", "monitor.livekit_key", "APIcaller")).warnings
