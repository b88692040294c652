"""What is wrong with a host, from a recorded inspection of a healthy one and what is changed in it."""

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate
from pydantic import SecretStr

from callready.diagnosis.hosts import causes
from callready.diagnosis.inspection import Inspection, parse
from callready.diagnosis.model import Cause, Flow
from callready.diagnosis.seen import Seen
from callready.release.authority import Authority
from callready.release.facts import Facts, FileFact, IdentityFact, SurveyError
from callready.release.node import Node
from callready.release.plan import plan
from callready.settings.ports import EXPORTERS, PROMETHEUS
from tasks import declare
from tests.support.inventories import MON1, SFU1, TURN1, deployed, load, watched

pytestmark = pytest.mark.usefixtures("project")

HEALTHY = (Path(__file__).parent / "data/inspection.txt").read_text()
CALLS = "turnserver@calls.service"
CONFIG = "/etc/coturn/calls.conf"


@pytest.fixture
def node(project: None) -> Node:
    return declare(load(), TURN1)


def facts_of(node: Node) -> Facts:
    facts = deployed(node.release)
    facts.confirmed = facts.folder
    facts.addresses = {"192.0.2.21", "2001:db8::21", "127.0.0.1"}
    facts.tables = {"inet callready"}
    for name, pair in node.release.certificates.items():
        facts.serials[name] = pair.serial
    return facts


def found(node: Node, text: str, facts: Facts | None = None) -> list[Cause]:
    facts = facts or facts_of(node)
    inspection = parse(text.splitlines())
    return causes(Seen(node, facts, plan(node.release, facts), inspection, ("203.0.113.2",)))


def unit(key: str, value: str, name: str = CALLS) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^(unit\t{name}\t{key}\t).*", rf"\g<1>{value}", text)


def line(pattern: str, new: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{pattern}", new, text)


def more(*lines: str) -> Callable[[str], str]:
    return lambda text: "".join(f"{each}\n" for each in lines) + text


def drop_in(*lines: str) -> Callable[[str], str]:
    path = f"/run/systemd/system/{CALLS}.d/x.conf"
    listed = unit("DropInPaths", path)
    return lambda text: listed(more(*(f"dropin\t{path}\t{each}" for each in lines))(text))


STARTS = [f"start\t{CALLS}\t{1795982427 - ago}" for ago in (46, 34, 22, 10)]
CRASHES = [f"start\t{CALLS}\t{1795982427 - ago}" for ago in (60, 34, 30, 10)]
NETEM = (
    '{"kind":"netem","dev":"host0","root":true,"options":{"limit":1000,"loss-random":{"loss":0.3}}}'
)

BROKEN: list[tuple[str, list[Callable[[str], str]], str]] = [
    ("stopped", [unit("ActiveState", "inactive")], "unit-stopped"),
    ("masked", [unit("ActiveState", "inactive"), unit("LoadState", "masked")], "unit-masked"),
    ("masked, running", [unit("LoadState", "masked")], "unit-masked"),
    ("disabled", [unit("UnitFileState", "disabled")], "unit-disabled"),
    ("suspended", [line(r"(process\t\d+\t\S+\t)S", r"\1T")], "unit-hung"),
    ("frozen", [more(f"frozen\t{CALLS}")], "unit-hung"),
    (
        "crashing",
        [
            more(*CRASHES),
            unit("NRestarts", "9"),
            unit("ActiveEnterTimestampMonotonic", "13552000000"),
        ],
        "unit-flapping",
    ),
    (
        "restarted by a timer",
        [more(*STARTS), unit("ActiveEnterTimestampMonotonic", "13552000000")],
        "unit-flapping",
    ),
    ("short of files", [line(r"(process.*\t47\t)20000", r"\g<1>50")], "unit-limits"),
    ("nice", [line(r"(process\t\d+\t\S+\tS\t)0", r"\g<1>19")], "unit-throttled"),
    (
        "quota",
        [unit("CPUQuotaPerSecUSec", "50ms"), drop_in("[Service]", "CPUQuota=5%")],
        "unit-throttled",
    ),
    (
        "a slice's limit",
        [more(f"limit\t{CALLS}\t/system.slice/cpu.max\t5000 100000")],
        "unit-throttled",
    ),
    ("no hardening", [drop_in("[Service]", "ProtectSystem=no")], "foreign-drop-in"),
    ("a variable", [drop_in("[Service]", "Environment=LD_PRELOAD=x.so")], "foreign-drop-in"),
    (
        "a variable's file",
        [
            more(f"unit\t{CALLS}\tEnvironmentFiles\t/etc/default/x (ignore_errors=yes)"),
            more("dropin\t/etc/default/x\tEXTRAOPTS=…"),
        ],
        "foreign-drop-in",
    ),
    ("another binary", [more(f"replaced\t{CALLS}")], "stale-process"),
    (
        "crashing seldom",
        [more(*STARTS[2:]), unit("NRestarts", "2")],
        "unit-flapping",
    ),
    (
        "caught between two starts",
        [more(*STARTS), unit("ActiveState", "deactivating")],
        "unit-flapping",
    ),
    (
        "a rule about ports",
        [
            line(r"rules\t\[", r'rules\t[{"priority":9,"ipproto":"udp","table":"7"},'),
            line(r"routes\t\[", r'routes\t[{"dst":"default","gateway":"x","table":"7"},'),
        ],
        "route-missing",
    ),
    ("a key unread", [line(r"(read.*privkey.pem\t)yes", r"\1no")], "file-unreadable"),
    ("a key gone", [line(r"(pair\t\S+\t)yes", r"\1no")], "certificate-differs"),
    (
        "ending",
        [line(r"(pair\t\S+\t)yes\t\d+", rf"\1yes\t{1795982427 + 3 * 86400}")],
        "certificate-near-end",
    ),
    (
        "filter off",
        [unit("UnitFileState", "disabled", "callready-firewall.service")],
        "filter-off-at-boot",
    ),
    ("filter changed", [more("rule\t+\tudp dport 3478 drop")], "filter-changed"),
    ("passwords", [line(r"(ssh\tdebian\tpasswordauthentication\t)no", r"\1yes")], "ssh-password"),
    (
        "disk",
        [line(r"(disk\t/var/lib/turn\t\S+\t4096\t)\d+\t\d+", r"\g<1>66053021\t900")],
        "disk-full",
    ),
    ("inodes", [line(r"(disk\t/run\t.*\t)\d+\trw", r"\g<1>3\trw")], "disk-full"),
    ("read-only", [line(r"(disk\t/var/lib/turn\t.*)rw", r"\1ro")], "disk-read-only"),
    ("buffers", [line(r"(kernel\tnet/core/rmem_max\t)\d+", r"\g<1>4096")], "kernel-setting"),
    (
        "no IPv6",
        [line(r"(kernel\tnet/ipv6/conf/host0/disable_ipv6\t)0", r"\g<1>1")],
        "kernel-setting",
    ),
    (
        "conntrack",
        [line(r"(kernel\tnet/netfilter/nf_conntrack_count\t)\d+", r"\g<1>262000")],
        "connections-full",
    ),
    ("relays", [line(r"(sockets\t\S+\t)\d+", r"\g<1>16000")], "relay-ports-full"),
    ("MTU", [line(r'(links.*"ifname":"host0".*?"mtu":)1500', r"\g<1>1200")], "small-mtu"),
    ("netem", [line(r"qdiscs.*", f"qdiscs\t[{NETEM}]")], "shaped"),
    (
        "blackhole",
        [line(r"routes\t\[", r'routes\t[{"type":"blackhole","dst":"203.0.113.2","flags":[]},')],
        "route-missing",
    ),
    ("name", [line(r"(name\tsfu1\S+\t).*", r"\g<1>198.51.100.66 ")], "name-overridden"),
    (
        "rate in the database",
        [more("foreign\t/var/lib/turn/calls.db\tturn_realm_option\tx max-bps=9")],
        "turn-database",
    ),
    (
        "another realm's secret",
        [more("foreign\t/var/lib/turn/calls.db\tturn_secret\trealm x")],
        "secret-foreign",
    ),
    ("rescue", [more("target\trescue.target")], "boot-target"),
    (
        "a neighbour",
        [more("neighbour\t203.0.113.2\t203.0.113.2 dev host0 lladdr 02:00:00:00:00:01")],
        "route-missing",
    ),
    ("an open relay", [unit("LoadState", "loaded", "coturn.service")], "unit-unmasked"),
]


def test_a_healthy_host_has_no_cause(node: Node) -> None:
    assert found(node, HEALTHY) == []


@pytest.mark.parametrize(("edits", "key"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_each_fault_has_its_cause_alone(
    node: Node, edits: list[Callable[[str], str]], key: str
) -> None:
    text = HEALTHY
    for edit in edits:
        before, text = text, edit(text)
        assert text != before
    (cause,) = found(node, text)
    assert cause.key == key
    assert cause.host == TURN1 and cause.mend and cause.what


def test_harmless_drop_ins_and_one_restart_are_none(node: Node) -> None:
    text = drop_in("[Service]", "Environment=TZ=UTC", "OOMScoreAdjust=-900", "MemoryMax=8G")(
        HEALTHY
    )
    assert found(node, unit("NRestarts", "1")(text)) == []


def test_deploys_do_not_count_as_restarts_again_and_again(node: Node) -> None:
    ends = (datetime.fromtimestamp(1795982427 - ago, UTC) for ago in (40, 28, 16, 4))
    deploys = (f"deploy\t{end:%Y-%m-%dT%H:%M:%SZ}" for end in ends)
    assert found(node, more(*STARTS, *deploys)(HEALTHY)) == []


def test_rules_of_vpns_and_of_other_addresses_are_none(node: Node) -> None:
    rules = '{"priority":9,"fwmark":"0x80000","action":"unreachable"},'
    rules += '{"priority":8,"src":"10.0.0.0","srclen":8,"action":"blackhole"},'
    rules += '{"priority":7,"src":"172.17.0.0","srclen":16,"table":"7"},'
    assert found(node, line(r"rules\t\[", rf"rules\t[{rules}")(HEALTHY)) == []


def test_an_edited_file_is_for_later_until_its_reader_has_it(node: Node) -> None:
    facts = facts_of(node)
    facts.files[CONFIG] = FileFact(
        f"/etc/callready/current/files{CONFIG}", 0o640, "root", "turnserver", "0" * 64
    )
    (later,) = found(node, HEALTHY, facts)
    assert (later.key, later.latent, later.breaks) == ("file-edited", True, ())
    facts.units[CALLS] = facts.units[CALLS].__class__(
        *("loaded", "active", "enabled", 4711, False),
        facts.units[CALLS].fingerprint,
        "/usr/bin/daemon",
        ("0" * 64,),
    )
    (now,) = found(node, HEALTHY, facts)
    assert now.key == "file-edited" and Flow(TURN1, "udp", 3478, 3478) in now.breaks


def test_an_address_of_another_host(node: Node) -> None:
    facts = facts_of(node)
    facts.addresses.add("192.0.2.11")
    (cause,) = found(node, HEALTHY, facts)
    assert cause.key == "address-missing" and {flow.host for flow in cause.breaks} == {SFU1}


def test_rows_that_are_missing_and_more(node: Node) -> None:
    facts = facts_of(node)
    rows = facts.rows["/var/lib/turn/calls.db"]
    rows.add("1" * 16)
    assert [c.key for c in found(node, HEALTHY, facts)] == ["secret-foreign"]
    facts.rows["/var/lib/turn/calls.db"] = {"1" * 16}
    assert [c.key for c in found(node, HEALTHY, facts)] == ["secret-differs"]


# What measures a host, and the monitor

METRICS = Flow(TURN1, "tcp", 9998, 9998)
RULES = "/etc/callready/monitor/alerts.yml"


def measured(host: str, authority: Authority | None = None) -> tuple[Node, Facts]:
    """A host of a fleet with a monitor, with certificates that an authority has signed: its own
    unless told."""
    node = declare(watched(), host)
    facts, signs = facts_of(node), authority or node.release.authority
    assert signs
    for kind, identity in node.release.identities.items():
        pem = signs.issue(identity)[0]
        der = load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        facts.identities[kind] = IdentityFact(der, True)
    facts.addresses |= set(node.settings.addresses)
    return node, facts


def also(name: str) -> Callable[[str], str]:
    """A unit more, which runs as coturn does."""
    lines = re.findall(rf"(?m)^unit\t{CALLS}\t.*", HEALTHY)
    return more(*(each.replace(CALLS, name) for each in lines))


def test_an_exporter_that_is_stopped_takes_the_metrics_with_it() -> None:
    node, facts = measured(TURN1)
    text = also(EXPORTERS)(HEALTHY)
    assert found(node, text, facts) == []
    (cause,) = found(node, unit("ActiveState", "inactive", EXPORTERS)(text), facts)
    assert cause.key == "unit-stopped" and cause.breaks == (METRICS,)
    assert "test_measured" in cause.checks and "test_workers" not in cause.checks


def dropped(*sources: str) -> Callable[[str], str]:
    """A filter of others that drops what asks for metrics; by what stands before it in each rule."""
    of = '"family":"inet","table":"x","chain":"in"'
    port = (
        '{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":9998}}'
    )
    chain = '{"chain":{"family":"inet","table":"x","name":"in","type":"filter","hook":"input"}}'
    rules = (
        f'{{"rule":{{{of},"handle":{n},"expr":[{each}{port},{{"drop":null}}]}}}}'
        for n, each in enumerate(sources, 1)
    )
    return line(
        r'ruleset\t{"nftables": \[', rf'ruleset\t{{"nftables": [{",".join([chain, *rules])},'
    )


def source(ip: str, address: str) -> str:
    left = f'"left":{{"payload":{{"protocol":"{ip}","field":"saddr"}}}}'
    return f'{{"match":{{"op":"==",{left},"right":"{address}"}}}},'


MON4, MON6 = source("ip", "192.0.2.41"), source("ip6", "2001:db8::41")


@pytest.mark.parametrize(
    ("sources", "families"),
    [([""], {0}), ([MON4], {4}), ([MON4, MON6], {4, 6}), ([source("ip", "203.0.113.77")], set())],
)
def test_a_filter_that_keeps_the_monitor_out(sources: list[str], families: set[int]) -> None:
    node, facts = measured(TURN1)
    causes_ = found(node, dropped(*sources)(HEALTHY), facts)
    assert [{flow.family for flow in each.breaks} for each in causes_] == [families] * bool(
        families
    )
    assert all(flow.meets(METRICS) for each in causes_ for flow in each.breaks)


def test_a_certificate_of_the_fleet_that_is_not_good() -> None:
    node, facts = measured(TURN1, Authority(SecretStr("others")))
    (cause,) = found(node, HEALTHY, facts)
    assert cause.key == "fleet-certificate" and "another authority" in cause.what
    assert cause.breaks == (METRICS,) and "test_measured" in cause.checks and not cause.latent


@pytest.mark.parametrize(("days", "latent"), [(190, True), (400, False)])
def test_one_that_is_past_half_its_life_does_no_harm_yet(
    monkeypatch: pytest.MonkeyPatch, days: int, latent: bool
) -> None:
    node, facts = measured(TURN1)
    later = datetime.now(UTC) + timedelta(days=days)
    monkeypatch.setattr("callready.release.authority.datetime", Mock(now=lambda _: later))
    (cause,) = found(node, HEALTHY, facts)
    assert (cause.key, cause.latent) == ("fleet-certificate", latent)
    assert bool(cause.breaks) != latent and ("test_measured" in cause.checks) != latent
    stopped = unit("ActiveState", "inactive", EXPORTERS)(also(EXPORTERS)(HEALTHY))
    assert ("unit-stopped" in {each.key for each in found(node, stopped, facts)}) == latent


def test_a_unit_without_its_key_is_said_of_the_certificate() -> None:
    node, facts = measured(MON1)
    facts.identities["monitor"] = replace(facts.identities["monitor"], has_key=False)
    text = unit("ActiveState", "activating", PROMETHEUS)(also(PROMETHEUS)(HEALTHY))
    text = more(*(each.replace(CALLS, PROMETHEUS) for each in CRASHES))(text)
    text = unit("NRestarts", "9", PROMETHEUS)(text)
    (cause,) = (c for c in found(node, text, facts) if PROMETHEUS in c.what or "fleet" in c.what)
    assert cause.key == "fleet-certificate" and "*:test_measured" in cause.checks


def test_a_unit_with_a_certificate_from_before() -> None:
    node, facts = measured(TURN1)
    facts.outdated = {EXPORTERS}
    (cause,) = found(node, also(EXPORTERS)(HEALTHY), facts)
    assert (cause.key, cause.breaks) == ("stale-process", (METRICS,))


def test_rules_that_were_edited_explain_alerts_that_are_missing() -> None:
    """Also before a restart: a signal makes Prometheus read them."""
    node, facts = measured(MON1)
    facts.files[RULES] = replace(facts.files[RULES], sha256="0" * 64)
    text = also(PROMETHEUS)(HEALTHY)
    (cause,) = (c for c in found(node, text, facts) if RULES in c.what)
    assert (cause.key, cause.latent) == ("file-edited", True) and "test_alerts" in cause.checks


def test_an_inspection_that_is_cut_short() -> None:
    with pytest.raises(SurveyError):
        parse(HEALTHY.splitlines()[:-1])
    assert isinstance(parse(HEALTHY.splitlines()), Inspection)
