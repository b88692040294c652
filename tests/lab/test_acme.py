"""Certificates from a real ACME server (Pebble) on both layouts: a TURN host of its own, and one
box where TURN and HTTPS share port 443."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from threading import Event

import pytest

from callready.probes import tls
from lab import acme, ca, plan
from tests.support.continuity import calls_of
from tests.support.fleet import Fleet, Host, delivered, eventually
from tests.support.fleet import inventory as common
from tests.support.ovh import NAME, Ovh, running

TURN, BOX = Host("h17"), Host("h18")
# Every name on every port that serves it.
ENDPOINTS = (
    (TURN, TURN.fqdn, 443),
    (TURN, TURN.fqdn, 5349),
    (BOX, BOX.fqdn, 443),
    (BOX, f"turn.{BOX.fqdn}", 443),
    (BOX, f"turn.{BOX.fqdn}", 5349),
    (BOX, f"turn.{BOX.fqdn}", 5350),
)
OVH_KEYS = ("application_key", "application_secret", "consumer_key")
UNIT = "callready-certificates.service"
LIVE = f"/etc/letsencrypt/live/{TURN.fqdn}-callready"
# A certificate of the operator's own, with more names.
OWN = f"certonly -n --agree-tos --email me@lab.test --standalone -d {TURN.fqdn} -d turn.{TURN.fqdn}"
NAMES = f"openssl x509 -noout -ext subjectAltName -in /etc/letsencrypt/live/{TURN.fqdn}/cert.pem"


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Both layouts as delivered, and an authority that refuses good nonces."""
    with delivered(TURN.name, BOX.name):
        acme.start()
        yield Fleet(tmp_path_factory.mktemp("operator"), *inventory())
        acme.stop()


@pytest.fixture(scope="module")
def site(bare_site: Fleet) -> Fleet:
    """Both layouts after one deploy; on one of them the operator has used certbot before."""
    TURN.root(
        "apt-get -qq -y install certbot > /dev/null 2>&1; "
        f"cat > /root/ca.pem <<'END'\n{(plan.STATE / 'ca.pem').read_text()}END\n"
        f"for i in 1 2 3 4 5; do REQUESTS_CA_BUNDLE=/root/ca.pem certbot {OWN} "
        f"--server {acme.DIRECTORY} > /dev/null 2>&1 && break; done; {NAMES}"
    )
    bare_site.first = bare_site.run("--json")
    return bare_site


def inventory() -> tuple[dict[str, object], dict[str, object], list[str]]:
    """One box with an SFU, two pools and an edge, and a TURN host of its own with a third pool."""
    _, data, _ = common()

    def address(host: Host, **more: object) -> tuple[str, dict[str, object]]:
        return host.fqdn, {"address": host.ipv4, "address6": host.ipv6, **more}

    data["livekit"]["url"] = f"wss://{BOX.fqdn}"
    data["edge"] = {}
    data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"]}
    data["turn"] = {
        "pools": {
            "calls": {
                "realm": "calls.lab.test",
                "secrets": ["secret:turn/calls"],
                "tls_on_443": True,
                "min_port": 60001,
                "max_port": 62000,
            },
            "avatar": {
                "realm": "avatar.lab.test",
                "secrets": ["secret:turn/avatar"],
                "listening_port": 3479,
                "tls_listening_port": 5350,
                "min_port": 62001,
            },
            "far": {"realm": "far.lab.test", "secrets": ["secret:turn/far"], "tls_on_443": True},
        }
    }
    data["tls"] = {
        "acme": {
            "email": "operator@lab.test",
            "server": acme.DIRECTORY,
            "caa_identity": "pebble.lab.test",  # no name of the lab is in DNS: nothing forbids it
            "ca": f"{plan.STATE}/ca.pem",
        },
        "ca": str(acme.ROOT),
    }
    groups = {
        "livekit": [address(BOX, name=f"turn.{BOX.fqdn}")],
        "turn": [(BOX.fqdn, {"pools": ["calls", "avatar"]}), address(TURN, pools=["far"])],
        "app": [BOX.fqdn],
    }
    return groups, data, ["livekit/api_secret", "turn/calls", "turn/avatar", "turn/far"]


def served() -> dict[tuple[str, str, int], str]:
    """The serial that callers get, by address, name and port; all valid to who trusts the
    authority."""
    return {
        (address, name, port): tls.served(address, port, name, str(acme.ROOT)).serial
        for host, name, port in ENDPOINTS
        for address in (host.ipv4, host.ipv6)
    }


def renew(host: Host) -> bool:
    """certbot.timer's unit with every certificate due; whether ours, which it starts, succeeded."""
    conf = "/etc/letsencrypt/renewal/*.conf"
    host.root(f"sed -i '1i renew_before_expiry = 3650 days\n/renew_before_expiry/d' {conf}")
    return taken_up(host, "certbot.service")


def taken_up(host: Host, start: str = UNIT) -> bool:
    """Start a unit and wait until ours has run; whether it succeeded."""

    def state() -> list[str]:
        show = f"systemctl show -p InvocationID,ActiveState --value {UNIT}"
        return sorted(host.root(show).split(), key=len)

    *_, before = state()
    host.root(f"systemctl start {start}", check=False)
    eventually(lambda: state()[-1] != before and state()[0] in ("inactive", "failed"))
    return state()[0] == "inactive"


def words(host: Host) -> str:
    return host.root(f"journalctl --sync; journalctl -u {UNIT} -n 12 -o cat --no-pager")


def test_what_the_authority_would_refuse_is_refused_before(bare_site: Fleet) -> None:
    TURN.root(
        "apt-get -qq -y install nftables > /dev/null 2>&1 || apt-get -qq update && "
        "apt-get -qq -y install nftables > /dev/null"
    )
    bare_site.groups["turn"][1][1]["name"] = "h01.lab.test"
    with TURN.listening("tcp", 80), dropped("input", "tcp dport 80 drop"):
        said = "\n".join(bare_site.run().message)
    bare_site.restore()
    assert "port 80/tcp is taken by perl (foreign-tcp-80.service), ACME needs it" in said
    assert (
        "tls.acme: h01.lab.test resolves to 198.51.100.101, 2001:db8:ca11::101, this host is "
        "198.51.100.117 and 2001:db8:ca11::117: the authority would ask another host" in said
    )
    assert "name a server that says what it is told in deploy.resolver" in said
    for address in (TURN.ipv4, TURN.ipv6):
        assert f"tls.acme: port 80 of {address} is dropped on the way there" in said
    # What this machine is told is not what the authority is told.
    acme.resolve("h01.lab.test", plan.find_host(TURN.name))
    bare_site.groups["turn"][1][1]["name"] = "h01.lab.test"
    bare_site.data["deploy"] = {"resolver": acme.RESOLVER}
    with TURN.listening("tcp", 80):
        said = "\n".join(bare_site.run().message)
    bare_site.restore()
    acme.resolve("h01.lab.test", plan.find_host("h01"))
    assert "port 80/tcp is taken by perl" in said and "resolves to" not in said
    assert TURN.root("ls /etc/callready", check=False) == ""


def test_one_deploy_of_bare_hosts_is_enough(site: Fleet) -> None:
    assert site.first
    assert site.first.status == 0, site.first.text
    assert "+ certificate h17.lab.test from ACME" in site.first.plan("h17")
    assert len({serial for serial in served().values()}) == 3
    again = site.deploy()
    assert again.changed == [], again.text


def test_renewal_costs_no_call(site: Fleet) -> None:
    """The calls go on through wss and TURN over TLS; who comes new gets the new certificate."""
    before, renewing = served(), Event()
    relays = {
        f"turns:turn.{BOX.fqdn}:443?transport=tcp": site.secrets["turn/calls"],
        f"turns:{TURN.fqdn}:443?transport=tcp": site.secrets["turn/far"],
    }

    def renewed(host: Host) -> bool:
        # The authority refuses good nonces: like the timer, come again.
        return any(renew(host) for _ in range(4))

    key = "APIfleet", site.secrets["livekit/api_secret"]
    with (
        calls_of(f"wss://{BOX.fqdn}", *key, relays, str(acme.ROOT)) as calls,
        ThreadPoolExecutor() as pool,
    ):
        comers = pool.submit(newcomers, renewing)
        try:
            assert all(pool.map(renewed, (TURN, BOX))), words(TURN) + words(BOX)
        finally:
            renewing.set()
    after = served()
    assert not [where for where in before if after[where] == before[where]]
    for name, both in calls.items():
        for each in both:
            print(f"{name}: {each}")
            assert not (each.reconnects or each.gone or each.moved), calls
            assert name == "direct" or each.way == f"relay {name}"
    print(f"{comers.result()} new TLS connections, 0 refused")
    assert site.deploy().changed == []


def newcomers(until: Event) -> int:
    """Connect to every endpoint again and again; how many times, none refused."""
    rounds = 0
    while not until.wait(0.1):
        rounds += 1
        served()
    return rounds * len(ENDPOINTS) * 2


@contextmanager
def dropped(chain: str, rule: str) -> Iterator[None]:
    """A packet filter of somebody else on the TURN host."""
    hook = f"{{ type filter hook {chain} priority 0; }}"
    TURN.root(
        f"nft 'add table inet other; add chain inet other c {hook}; add rule inet other c {rule}'"
    )
    try:
        yield
    finally:
        TURN.root("nft delete table inet other")


@contextmanager
def hanging_look() -> Iterator[None]:
    """Ours has looked at what certbot has and does not end; the next one is as always."""
    folder = f"/run/systemd/system/{UNIT}.d"
    hang = "[ -e /run/hung ] || { touch /run/hung; sleep infinity; }"
    TURN.root(
        f"mkdir -p {folder}; printf '[Service]\\nExecStopPost=/bin/sh -c \"{hang}\"\\n' > "
        f"{folder}/hang.conf; systemctl daemon-reload; systemctl start --no-block {UNIT}"
    )
    eventually(lambda: TURN.root("ls /run/hung", check=False) != "")
    try:
        yield
    finally:
        TURN.root(f"rm -r {folder} /run/hung; systemctl daemon-reload")


def authority_down() -> AbstractContextManager[None]:
    return dropped("output", "tcp dport 14000 reject")


@contextmanager
def wrong_dns() -> Iterator[None]:
    acme.resolve(TURN.fqdn, plan.find_host("h01"))
    try:
        yield
    finally:
        acme.resolve(TURN.fqdn, plan.find_host(TURN.name))


@contextmanager
def stopped_between_key_and_chain() -> Iterator[None]:
    """certbot's link to the key is the other one already, that to the chain is not."""
    key = f"{LIVE}/privkey.pem"
    TURN.root(f"readlink {key} > /run/was; ln -sfn ../../archive/{TURN.fqdn}/privkey1.pem {key}")
    try:
        yield
    finally:
        TURN.root(f"ln -sfn $(cat /run/was) {key}")


@contextmanager
def full_disk() -> Iterator[None]:
    folder = f"/etc/callready/tls/{TURN.fqdn}"
    TURN.root(
        f"cp -a {folder} /run/was-tls; mount -t tmpfs -o size=64k,mode=755 tmpfs {folder}; "
        f"cp -a /run/was-tls/. {folder}; cat /dev/zero > {folder}/x",
        check=False,
    )
    try:
        yield
    finally:
        TURN.root(f"umount {folder}; rm -r /run/was-tls")


@contextmanager
def deaf_to_reload() -> Iterator[None]:
    folder = "/run/systemd/system/turnserver@far.service.d"
    TURN.root(
        f"mkdir -p {folder}; printf '[Service]\\nExecReload=\\nExecReload=/bin/true\\n' > "
        f"{folder}/deaf.conf; systemctl daemon-reload"
    )
    try:
        yield
    finally:
        TURN.root(f"rm -r {folder}; systemctl daemon-reload")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (authority_down, "certbot's last run failed"),
        (wrong_dns, "certbot's last run failed"),
        (stopped_between_key_and_chain, "h17.lab.test: the key does not belong to the certificate"),
        (full_disk, "h17.lab.test: cannot be copied to"),
        (deaf_to_reload, "turnserver@far.service on 198.51.100.117:5349: "),
    ],
)
def test_failed_renewal_leaves_the_old_one_and_is_seen(
    site: Fleet, fault: Callable[[], AbstractContextManager[None]], says: str
) -> None:
    before = served()
    with fault():
        assert not (taken_up if fault is stopped_between_key_and_chain else renew)(TURN)
        assert says in words(TURN)
        assert served() == before
    if fault is authority_down:  # a deploy mends it too, also while an earlier look hangs
        with hanging_look():
            assert site.deploy().changed == [TURN.name]
        assert not served().items() & {item for item in before.items() if item[0][1] == TURN.fqdn}
        assert TURN.root(f"systemctl is-failed {UNIT}", check=False) == "inactive"
    else:
        assert any(renew(TURN) for _ in range(4)), words(TURN)


def test_what_haproxy_refuses_is_found_before_anything_restarts(site: Fleet) -> None:
    before = BOX.pids(), BOX.root("readlink /etc/callready/current")
    site.deploy_file = "tests/support/held_deploy.py"
    site.environment = {
        "FAULTS_FOLDER": str(site.folder),
        "FAULTS_PATCH": json.dumps({"haproxy.cfg.j2": ("mode http", "mode nonsense")}),
    }
    site.data["livekit"]["logging"] = {"level": "debug"}
    try:
        run = site.run()
    finally:
        site.deploy_file, site.environment = "deploy.py", {}
        site.restore()
    assert run.status == 1
    assert "haproxy refuses its configuration: " in run.text and "nonsense" in run.text
    assert (BOX.pids(), BOX.root("readlink /etc/callready/current")) == before


@pytest.fixture
def zone(site: Fleet) -> Iterator[Ovh]:
    """The names' zone at a double of OVH, whose API the hosts take for the real one."""
    keys = {name: f"{site.marker}{name.replace('_', '')}" for name in OVH_KEYS}
    site.secrets |= {f"ovh/{name}": value for name, value in keys.items()}
    site.data["tls"]["acme"] |= {
        "challenge": "dns-01",
        "dns": {"propagation": 0, **{name: f"secret:ovh/{name}" for name in keys}},
    }
    # The operator's own certificate there goes on proving its names on port 80.
    site.groups["turn"][1][1]["firewall"] = {"extra_ports": ["80/tcp"]}

    def publish(command: str, name: str, value: str) -> None:
        acme.tell(command, host=name, **({"value": value} if command == "set-txt" else {}))

    trust = "/etc/ssl/certs/ca-certificates.crt"
    for host in (TURN, BOX):
        host.root(
            f"cp /etc/hosts {trust} /run; echo {plan.MACHINE.ipv4} {NAME} >> /etc/hosts; "
            f"cat >> {trust} <<'END'\n{ca.CA_CERTIFICATE.read_text()}END"
        )
    at, certificate = (plan.MACHINE.ipv4, 443), ca.issue(NAME, folder=acme.STATE)
    ovh = Ovh(plan.DOMAIN, keys, publish)
    with running(ovh, at, certificate, certificate.with_suffix(".key")):
        yield ovh
    for host in (TURN, BOX):
        host.root(f"cp /run/hosts /etc; cp /run/ca-certificates.crt {trust}")
    site.restore()


def test_zone_at_ovh_proves_the_names_on_both_debians(site: Fleet, zone: Ovh) -> None:
    before = served()
    zone.rights = []
    run = site.run()
    assert run.status == 1
    said = "was asked for: OVH has no zone that this consumer key may GET for"
    assert said in run.text, run.text
    assert served() == before
    zone.rights = [(method, "/domain/zone/*") for method in ("GET", "POST", "DELETE")]
    assert site.deploy().changed == [TURN.name, BOX.name]
    after = served()
    assert not [where for where in before if after[where] == before[where]]
    assert (zone.served, zone.records) == (set(), {})
    assert site.deploy().changed == []
    assert any(renew(TURN) for _ in range(4)), words(TURN)
    assert served() != after
    for host in (TURN, BOX):
        secret = zone.keys["application_secret"]
        found = host.root(f"grep -rlF {secret} /etc /var /run /tmp --exclude-dir=journal")
        assert {host.root(f"stat -Lc '%a %U' {file}") for file in found.split()} == {"600 root"}
        assert host.root(f"journalctl -a -o cat | grep -c {secret}", check=False) == "0"


def test_name_that_is_not_served_any_more_is_not_renewed(site: Fleet) -> None:
    ours, theirs = f"{TURN.fqdn}-callready.conf", f"{TURN.fqdn}.conf"

    def renewals() -> set[str]:
        return set(TURN.root("ls /etc/letsencrypt/renewal").split())

    assert renewals() == {ours, theirs}
    site.groups["turn"][1][1]["name"] = f"turn.{TURN.fqdn}"
    run = site.deploy("--limit", TURN.fqdn)
    assert f"- certificate {TURN.fqdn} is not renewed any more" in run.plan("h17")
    assert renewals() == {f"turn.{TURN.fqdn}.conf", theirs}
    assert site.deploy("--limit", TURN.fqdn).changed == []
    site.restore()
    site.deploy("--limit", TURN.fqdn)
    assert renewals() == {ours, theirs}
    assert f"DNS:turn.{TURN.fqdn}" in TURN.root(NAMES)


def test_certificate_of_the_operator_outlives_callready(site: Fleet) -> None:
    run = site.run("--limit", TURN.fqdn, file="remove.py")
    assert run.status == 0, run.text
    assert TURN.root("ls /etc/letsencrypt/renewal") == f"{TURN.fqdn}.conf"
    assert f"DNS:turn.{TURN.fqdn}" in TURN.root(NAMES)
    assert TURN.root("command -v certbot")
