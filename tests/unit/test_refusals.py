"""What a host may be like for a deploy to begin: each refusal as it is printed."""

from collections.abc import Callable

import pytest

from callready.release import refusals
from callready.release.facts import Facts, Listener, UnitFact
from callready.release.manifest import UnitLine
from tasks import declare
from tests.support.inventories import SFU1, TURN1, Edit, bare, box, deployed, load, watched

pytestmark = pytest.mark.usefixtures("project")


def refused(edit: Callable[[Facts], object], *edits: Edit) -> list[str]:
    facts = bare()
    edit(facts)
    here = declare(box(*edits), SFU1)
    here.learn(facts)
    return list(refusals.of(here, facts))


def running(unit: str, state: str = "active") -> Callable[[Facts], None]:
    def edit(facts: Facts) -> None:
        facts.units[unit] = UnitFact("loaded", state, "enabled", 1, False, "-", "-")

    return edit


def listening(*listeners: Listener) -> Callable[[Facts], None]:
    return lambda facts: facts.listeners.extend(listeners)


def set_(**values: object) -> Callable[[Facts], None]:
    def edit(facts: Facts) -> None:
        for name, value in values.items():
            setattr(facts, name, value)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        set_(),
        set_(os_version="12", arch="arm64"),
        set_(skew=30.0),
        set_(skew=-30.0),
        set_(packages={"coturn": "4.6.1-1+b2"}),
        set_(candidates={}),
        set_(candidates={"coturn": "(none)"}),
        set_(nat_tables={"ip nat"}),
        running("firewalld.service", "failed"),
        # Ours, sshd's, on loopback, or of no interest to the plan.
        listening(
            Listener("udp", "192.0.2.11", 3478, "turnserver", "turnserver@calls.service"),
            Listener("tcp", "*", 7880, "livekit-server", "livekit-server.service"),
            Listener("tcp", "0.0.0.0", 22, "sshd", "ssh.service"),
            Listener("tcp", "::", 22, "systemd", "init.scope"),  # ssh.socket with Accept=yes
            Listener("tcp", "127.0.0.1", 7880, "docker-proxy", "docker.service"),
            Listener("tcp", "::1", 7880, "docker-proxy", "docker.service"),
            Listener("tcp", "0.0.0.0", 50000, "nginx", "nginx.service"),
            Listener("udp", "0.0.0.0", 123, "chronyd", "chrony.service"),
        ),
    ],
)
def test_a_host_that_can_be_deployed_is_not_refused(edit: Callable[[Facts], None]) -> None:
    assert refused(edit) == []


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"os": "ubuntu", "os_version": "24.04"}, "ubuntu 24.04 on amd64"),
        ({"os_version": "11"}, "debian 11 on amd64"),
        ({"os_version": ""}, "debian  on amd64"),
        ({"arch": "riscv64"}, "debian 13 on riscv64"),
    ],
)
def test_an_unsupported_host_is_refused_for_that_alone(facts: dict[str, str], name: str) -> None:
    assert refused(set_(**facts, skew=99.0)) == [
        f"runs {name}; supported are Debian 12 and 13 on amd64 and arm64"
    ]


@pytest.mark.parametrize(("skew", "words"), [(31.4, "31 s ahead of"), (-95.0, "95 s behind")])
def test_a_clock_that_is_off_is_refused(skew: float, words: str) -> None:
    assert refused(set_(skew=skew)) == [
        f"its clock is {words} this machine's (limit 30 s, host.max_clock_skew): TURN credentials "
        "carry an expiry time; check timedatectl on both"
    ]
    assert refused(set_(skew=skew), (SFU1, "host.max_clock_skew", 100)) == []


@pytest.mark.parametrize(
    ("name", "how"),
    [("ufw", "ufw disable"), ("firewalld", "systemctl disable --now firewalld")],
)
def test_another_firewall_is_refused_where_ours_would_be_loaded(name: str, how: str) -> None:
    assert refused(set_(firewalls={name})) == [
        f"{name} is active and would drop what callready opens: disable it ({how}) or set "
        "firewall.enabled to False"
    ]
    assert refused(set_(firewalls={name}), (SFU1, "firewall.enabled", False)) == []


def test_notrack_is_refused_where_another_table_does_nat() -> None:
    nat = set_(nat_tables={"ip nat", "ip6 nat", "inet callready"})
    assert refused(nat, (SFU1, "firewall.notrack", True)) == [
        "firewall.notrack would break the NAT of ip nat, ip6 nat: replies to "
        "untracked source ports are lost; leave it off"
    ]
    assert refused(set_(nat_tables={"inet callready"}), (SFU1, "firewall.notrack", True)) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"packages": {"coturn": "4.18.0-1"}}, "has coturn 4.18.0-1"),
        ({"packages": {"coturn": "4.6.10-1"}}, "has coturn 4.6.10-1"),
        ({"candidates": {"coturn": "1:4.6.2-1"}}, "would install coturn 1:4.6.2-1"),
    ],
)
def test_another_version_of_coturn_is_refused(facts: dict[str, object], words: str) -> None:
    assert refused(set_(**facts)) == [
        f"{words}, the inventory says 4.6.1: set turn.version to what the host has (the keys are "
        "then checked for that version)"
    ]


def test_the_version_that_the_inventory_says_is_the_one_wanted() -> None:
    assert refused(set_(packages={"coturn": "4.18.0-1"}), (SFU1, "turn.version", "4.18.0")) == []


@pytest.mark.parametrize(
    ("version", "upstream", "same"),
    [
        ("4.6.1-1", "4.6.1", True),
        ("4.6.1", "4.6.1", True),
        ("1:4.6.1-1+b2", "4.6.1", True),
        ("4.6.1+dfsg-1", "4.6.1", True),
        ("4.6.1~rc1-1", "4.6.1", True),
        ("4.6.10-1", "4.6.1", False),
        ("4.6.1.1-1", "4.6.1", False),
        ("4.6-1", "4.6.1", False),
    ],
)
def test_a_debian_version_is_of_an_upstream_version(
    version: str, upstream: str, same: bool
) -> None:
    assert refusals.is_version(version, upstream) is same


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        (
            Listener("tcp", "0.0.0.0", 7880, "docker-proxy", "docker.service"),
            "port 7880/tcp is taken by docker-proxy (docker.service), LiveKit needs it for "
            "signalling: stop that program (a container?) or change livekit.port",
        ),
        (
            Listener("udp", "*", 3479, "turnserver", "coturn.service"),
            "port 3479/udp is taken by turnserver (coturn.service), coturn avatar needs it for STUN "
            "and TURN: stop that program (a container?) or change turn.pools.avatar.listening_port",
        ),
        (
            Listener("udp", "192.0.2.11", 50123, "livekit-server", "-"),
            "port 50123/udp is taken by livekit-server, LiveKit needs it for media: stop that program "
            "(a container?) or change livekit.rtc.port_range_start",
        ),
        (
            Listener("tcp", "*", 7880, "livekit-server", "session-3.scope"),
            "port 7880/tcp is taken by livekit-server (session-3.scope), LiveKit needs it for "
            "signalling: stop that program (a container?) or change livekit.port",
        ),
        (
            Listener("udp", "0.0.0.0", 3999, "turnserver", "coturn.service"),
            "coturn.service is in use for port 3999/udp, and callready masks it, because Debian's "
            "package starts an open relay: make a pool of what it serves (turn.pools), then stop it "
            "(systemctl disable --now coturn.service)",
        ),
        (
            Listener("udp", "0.0.0.0", 51820, "-", "-"),
            "port 51820/udp is taken by the kernel, LiveKit needs it for media: stop that interface "
            "(WireGuard?) or change livekit.rtc.port_range_start",
        ),
    ],
)
def test_a_planned_port_that_another_program_has_is_refused(
    listener: Listener, message: str
) -> None:
    assert refused(listening(listener)) == [message]


def test_a_program_on_both_families_is_named_once_and_each_port_once() -> None:
    found = refused(
        listening(
            *(
                Listener(p, a, 3478, "turnserver", "coturn.service")
                for p in ("udp", "tcp")
                for a in ("0.0.0.0", "::")
            )
        )
    )
    assert [line.partition(" is taken")[0] for line in found] == [
        "port 3478/udp",
        "port 3478/tcp",
    ]


def test_a_listener_that_is_meant_to_be_there_is_let_be() -> None:
    other = listening(Listener("udp", "0.0.0.0", 50123, "game", "game.service"))
    assert refused(other, (SFU1, "host.other_listeners", ["50100-50200/udp"])) == []
    assert len(refused(other, (SFU1, "host.other_listeners", ["50100-50200/tcp"]))) == 1


@pytest.mark.parametrize(
    ("port", "why"),
    [
        (443, "port 443/tcp is taken by haproxy (haproxy.service), "),
        (8080, "haproxy.service is in use for port 8080/tcp, and its configuration would be "),
    ],
)
def test_an_haproxy_that_serves_something_else_is_not_taken_over(port: int, why: str) -> None:
    foreign = listening(Listener("tcp", "0.0.0.0", port, "haproxy", "haproxy.service"))
    (said,) = refused(foreign, (SFU1, "edge", {}), (SFU1, "name", "turn.callready.test"))
    assert said.startswith(why)

    def after_a_deploy(facts: Facts) -> None:
        foreign(facts)
        facts.manifest.units["haproxy.service"] = UnitLine(
            "haproxy.service", "", "-", "reload", "-"
        )

    assert refused(after_a_deploy, (SFU1, "edge", {}), (SFU1, "name", "turn.callready.test")) == []


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        (
            Listener("tcp", "*", 9101, "prometheus-node", "prometheus-node-exporter.service"),
            "prometheus-node-exporter.service is in use for port 9101/tcp, and callready masks it, "
            "because it runs its own: have what asks it ask the monitor (docs/watching.md), then "
            "stop it (systemctl disable --now prometheus-node-exporter.service)",
        ),
        (
            Listener("tcp", "127.0.0.1", 9100, "node_exporter", "node_exporter.service"),
            "port 9100/tcp is taken by node_exporter (node_exporter.service), monitor needs it for "
            "the host's metrics: stop that program (a container?) or change monitor",
        ),
        (Listener("tcp", "127.0.0.2", 9100, "other", "other.service"), ""),
    ],
)
def test_what_a_host_was_measured_by_before_is_not_taken_away(
    listener: Listener, message: str
) -> None:
    facts = bare()
    facts.listeners.append(listener)
    here = declare(watched(), TURN1)
    here.learn(facts)
    assert list(refusals.of(here, facts)) == ([message] if message else [])


ENV, CALLS = "/srv/app/.env", "/etc/coturn/calls.conf"


@pytest.mark.parametrize(
    ("path", "kind", "ends"),
    [
        (ENV, "folder", "and does not find), or name another file (app.env_file)"),
        (ENV, "mounted", "unmount it (findmnt), or name another file (app.env_file)"),
        (ENV, "fixed", "chattr -i; findmnt -T), or name another file (app.env_file)"),
        (ENV, "missing", "create it first, or name another file (app.env_file)"),
        (ENV, "link", "make it a plain file, or name another file (app.env_file)"),
        (CALLS, "folder", "to mount and does not find)"),
        ("/var/lib/turn/calls.db", "special", "move it away"),
        ("/etc/callready/current", "fixed", "chattr -i; findmnt -T)"),
    ],
)
def test_what_stands_where_a_file_has_to_be_put_is_refused(path: str, kind: str, ends: str) -> None:
    (said,) = refused(set_(obstacles={path: (kind, "is WORDS")}))
    assert said.startswith(f"{path} is WORDS: ") and said.endswith(ends)


@pytest.mark.parametrize("path", [ENV, CALLS, "/var/lib/turn/calls.db", "/etc/callready/current"])
@pytest.mark.parametrize(("kind", "always"), [("fixed", False), ("mounted", False), ("link", True)])
def test_what_need_not_be_put_may_be_fixed(path: str, kind: str, always: bool) -> None:
    """An operator may protect a file that is as it should be (chattr +i)."""
    release = declare(box(), SFU1).release
    facts = deployed(release)
    facts.obstacles = {path: (kind, "is WORDS")}
    is_file = path in (ENV, "/var/lib/turn/calls.db")
    assert len(list(refusals.in_the_way(release, facts))) == (always and is_file)
    facts.environments.clear()  # one of them has to be put again
    assert len(list(refusals.in_the_way(release, facts))) == (
        (always and is_file) or path in (ENV, "/etc/callready/current")
    )


def test_an_extra_port_is_some_other_programs_by_intention() -> None:
    nginx = listening(Listener("tcp", "0.0.0.0", 443, "nginx", "nginx.service"))
    assert refused(nginx, (SFU1, "firewall.extra_ports", ["443/tcp"])) == []


def unit(name: str, load: str) -> Callable[[Facts], None]:
    def edit(facts: Facts) -> None:
        facts.units[name] = UnitFact(load, "inactive", "-", 0, False, "-", "-")

    return edit


UNTIL = "first, or take the host out of group app until then"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            set_(users={"root"}),
            [f"user app (app.owner) does not exist on this host: create it {UNTIL}"],
        ),
        *(
            (
                unit("app.service", load),
                [
                    f"unit app.service (app.restart) cannot be restarted on this host, systemctl says "
                    f"{load}: install it {UNTIL}"
                ],
            )
            for load in ("not-found", "masked")
        ),
        (unit("app.service", "loaded"), []),
        (unit("livekit-server.service", "not-found"), []),  # ours is not there yet
    ],
)
def test_an_app_that_is_not_there_yet_is_refused(
    edit: Callable[[Facts], None], said: list[str]
) -> None:
    restart = (SFU1, "app.restart", ["app.service", "livekit-server.service"])
    assert refused(edit, restart) == said
    livekit: Edit = (SFU1, "app.owner", "livekit")  # a user that the release creates
    assert refused(edit, restart, livekit) == [line for line in said if "user" not in line]


def test_the_survey_looks_for_what_the_app_needs() -> None:
    asked = declare(box(), SFU1).release.survey_variables()
    assert "app" in asked["USERS"] and "app.service" in asked["UNITS"]


def test_sshd_on_a_port_of_the_plan_is_refused_with_its_way_out() -> None:
    facts = bare()
    facts.ssh_ports = {22, 7880}
    here = declare(load(), SFU1)
    here.learn(facts)
    assert list(refusals.of(here, facts)) == [
        "livekit.port: port 7880/tcp is taken twice on this host: sshd (administration, ssh_port) "
        "and LiveKit (signalling); give one of them another port"
    ]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    def all_of_it(facts: Facts) -> None:
        facts.skew = 60.0
        facts.firewalls = {"ufw"}
        facts.packages = {"coturn": "4.18.0-1"}
        listening(Listener("tcp", "*", 7881, "x", "x.service"))(facts)

    assert len(refused(all_of_it)) == 4


# Addresses

OWN = {"127.0.0.1", "::1", "fe80::1", "192.0.2.11", "2001:db8::11"}
NAT: Edit = (SFU1, "private_address", "10.0.0.11")
INTERNAL: Edit = (SFU1, "internal_address", "10.9.0.11")


@pytest.mark.parametrize(
    ("addresses", "edits", "said"),
    [
        (OWN, [], []),
        (OWN | {"172.17.0.1", "10.0.0.11"}, [], []),
        (OWN - {"2001:db8::11"}, [], []),  # it may come later
        (OWN - {"192.0.2.11"} | {"10.0.0.11"}, [NAT], []),
        (OWN | {"10.9.0.11"}, [INTERNAL], []),
        (
            OWN - {"192.0.2.11"} | {"10.0.0.11"},
            [],
            [
                "address: 192.0.2.11 is on none of its interfaces, which have 10.0.0.11, 2001:db8::11: "
                "if the provider's network leads it to one of these (1:1 NAT), set private_address to "
                "that"
            ],
        ),
        (
            OWN | {"10.0.0.11"},
            [NAT],
            [
                "private_address: 192.0.2.11 (address) is on an interface of the host, so there is no "
                "1:1 NAT: leave private_address out; an address on an internal network is "
                "internal_address"
            ],
        ),
        (
            OWN - {"192.0.2.11"},
            [NAT, INTERNAL],
            [
                "private_address: 10.0.0.11 is on none of its interfaces, which have 2001:db8::11",
                "internal_address: 10.9.0.11 is on none of its interfaces, which have 2001:db8::11",
            ],
        ),
    ],
)
def test_addresses_that_the_host_has_not(
    addresses: set[str], edits: list[Edit], said: list[str]
) -> None:
    assert refused(set_(addresses=addresses), *edits) == said


CLUSTER: list[Edit] = [
    (TURN1, "groups", ["livekit", "turn"]),
    (TURN1, "turn.pools.calls.min_port", 60001),
    ("*", "livekit.redis", {"address": "10.0.0.5:6379"}),
]
UNIT = "livekit-server.service"


def cluster(one: Facts, other: Facts, *edits: Edit) -> list[tuple[str, str]]:
    fleet = load(*CLUSTER, *edits)
    found = {SFU1: (declare(fleet, SFU1), one), TURN1: (declare(fleet, TURN1), other)}
    return list(refusals.of_cluster(found))


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        # Off this machine's clock alike.
        (Facts(skew=9.0), Facts(skew=9.2), []),
        (Facts(skew=0.3, skew_error=0.05), Facts(skew_error=0.06), []),
        (Facts(skew=-0.3, skew_error=0.04), Facts(skew_error=0.05), [(TURN1, SFU1, "0.2")]),
        (Facts(skew=5.0), Facts(skew=-1.0, skew_error=0.5), [(SFU1, TURN1, "5.5")]),
    ],
)
def test_clocks_of_a_cluster_are_refused_where_they_are_certainly_apart(
    one: Facts, other: Facts, said: list[tuple[str, str, str]]
) -> None:
    assert cluster(one, other) == [
        (
            ahead,
            f"its clock is {seconds} s or more ahead of that of {behind} (limit 0.2 s): SFUs that "
            "share a Redis tell by their clocks what is too late and who is gone, so joins fail; "
            "have both ask time servers (timedatectl)",
        )
        for ahead, behind, seconds in said
    ]
    alone: Edit = (TURN1, "livekit.redis.db", 1)
    own: Edit = (TURN1, "livekit.url", "wss://other.callready.test")
    assert cluster(one, other, alone, own) == []


def runs(version: str) -> Facts:
    binary = f"/opt/livekit/{version}/livekit-server"
    return Facts(units={UNIT: UnitFact("loaded", "active", "enabled", 1, False, "-", binary)})


@pytest.mark.parametrize(
    ("one", "other", "hosts"),
    [
        (runs("1.12.9"), runs("1.12.9"), []),
        (runs("1.11.0"), runs("1.11.0"), [SFU1, TURN1]),
        (runs("1.11.0"), runs("1.13.5"), []),  # this deploy mends it
        (runs("1.11.0"), Facts(), [SFU1]),
        (Facts(), Facts(), []),
    ],
)
def test_a_cluster_goes_from_one_minor_version_to_the_next(
    one: Facts, other: Facts, hosts: list[str]
) -> None:
    assert cluster(one, other) == [
        (
            host,
            f"it runs LiveKit 1.11.0, and {TURN1 if host == SFU1 else SFU1} would get 1.13.5: while "
            "SFUs that share a Redis change they understand each other one minor version apart at "
            "most; deploy the versions in between first (livekit.version)",
        )
        for host in hosts
    ]
