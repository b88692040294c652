"""Which rules of other programs keep calls' packets back: nftables' JSON as a host prints it, and
what iptables-save prints."""

from typing import Any

import pytest

from callready.diagnosis.filters import Filters, Obstacle, matched
from callready.diagnosis.model import Flow

MEDIA = Flow("sfu1", "udp", 50000, 60000)
STUN = Flow("sfu1", "udp", 3478, 3478)
HTTPS = Flow("sfu1", "tcp", 443, 443)
HERE = {4: "198.51.100.9", 6: "2001:db8::9"}
CALLER, OTHER = "198.51.100.2", "198.51.100.110"

UDP = {"payload": {"protocol": "udp", "field": "dport"}}
SOURCE = {"payload": {"protocol": "ip", "field": "saddr"}}
DROP = {"drop": None}


def is_(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def table(*rules: list[Any], policy: str = "accept", hook: str = "input") -> list[dict[str, Any]]:
    where = {"family": "inet", "table": "other"}
    base = {"type": "filter", "hook": hook, "prio": 0, "policy": policy}
    return [
        {"chain": {**where, "name": "c", **base}},
        *(
            {"rule": {**where, "chain": "c", "handle": 7 + n, "expr": expr}}
            for n, expr in enumerate(rules)
        ),
    ]


def met(ruleset: list[dict[str, Any]], *flows: Flow, xtables: str = "") -> list[Obstacle]:
    lines = [(4, "iptables-save", line) for line in xtables.strip().splitlines()]
    filters = Filters.read(ruleset, xtables=lines)
    peers = {flow: {CALLER: 40000} for flow in flows}
    found = filters.obstacles(flows or (MEDIA, STUN, HTTPS), HERE, peers)
    return [each for each in found if each.answer in ("yes", "likely")]


def test_a_drop_is_met_by_its_ports_alone() -> None:
    (found,) = met(table([is_(UDP, {"range": [50000, 50100]}), {"counter": {"packets": 5}}, DROP]))
    assert found.flows == (MEDIA._replace(last=50100),)
    assert (found.packets, found.verdict, found.directions) == (5, "drop", ("in",))
    assert found.mend == "nft delete rule inet other c handle 7"
    assert matched([found], MEDIA, "in") and not matched([found], STUN, "in")


def test_a_family_and_a_size() -> None:
    only6, big = {"meta": {"key": "nfproto"}}, {"meta": {"key": "length"}}
    (found,) = met(table([is_(only6, "ipv6"), is_(UDP, 3478), DROP]))
    assert found.flows == (STUN._replace(family=6),)
    (found,) = met(table([is_(big, 1000, ">"), DROP]), MEDIA)
    assert found.sizes == (1001, 1228) and not found.all_sizes


@pytest.mark.parametrize(
    ("rate", "count"), [(5, 1), (20000, 0)], ids=["what callers reach", "care"]
)
def test_limits(rate: int, count: int) -> None:
    limit = {"limit": {"rate": rate, "per": "second", "burst": 5}}
    over = {"limit": {**limit["limit"], "inv": True}}
    assert len(met(table([is_(UDP, 3478), over, DROP]))) == count
    found = met(table([is_(UDP, 3478), limit, {"accept": None}], [is_(UDP, 3478), DROP]))
    assert [each.handle for each in found] == [8] * count


def test_what_lets_calls_through_is_none() -> None:
    accept = {"accept": None}
    planned = [[is_(UDP, {"set": [3478, {"range": [50000, 60000]}]}), accept]]
    planned += [[is_({"payload": {"protocol": "tcp", "field": "dport"}}, 443), accept]]
    found_by = [is_({"meta": {"key": "l4proto"}}, "ipv6-icmp"), accept]
    assert met(table(found_by, *planned, policy="drop")) == []
    assert met(table([is_(UDP, 3478), {"counter": {"packets": 9, "bytes": 9}}])) == []
    (found,) = met(table(found_by, planned[0], policy="drop"))
    assert found.flows == (HTTPS,) and found.rule == "policy drop"


def test_a_ban_of_somebody_is_none_and_of_our_caller_is_one() -> None:
    assert met(table([is_(SOURCE, "192.0.2.66"), DROP])) == []
    (found,) = met(table([is_(SOURCE, {"set": ["192.0.2.66", CALLER]}), {"reject": None}]), STUN)
    assert found.remotes == (CALLER,) and found.is_for_some


def test_who_is_not_found_gets_nothing() -> None:
    solicit = is_({"payload": {"protocol": "icmpv6", "field": "type"}}, "nd-neighbor-solicit")
    (found,) = met(table([solicit, DROP]), STUN)
    assert found.flows == (STUN._replace(family=6),)
    arp = table([is_({"payload": {"protocol": "arp", "field": "operation"}}, "request"), DROP])
    for item in arp:
        for body in item.values():
            body["family"] = "arp"
    (found,) = met(arp, STUN)
    assert found.flows == (STUN._replace(family=4),)
    assert met(table([is_({"meta": {"key": "l4proto"}}, "icmp"), DROP])) == []


def test_source_nat_takes_relays_their_address() -> None:
    sport = {"payload": {"protocol": "udp", "field": "sport"}}
    for address, count in ((HERE[4], 0), ("198.51.100.77", 1)):
        nat = table([is_(sport, 3478), {"snat": {"addr": address}}], hook="postrouting")
        filters = Filters.read(nat)
        found = filters.obstacles([STUN], {4: HERE[4]}, {STUN: {OTHER: 49152}})
        assert len(found) == count


def test_jumps_maps_and_sets() -> None:
    where = {"family": "inet", "table": "other"}
    vmap = {"vmap": {"key": UDP, "data": {"set": [[3478, {"jump": {"target": "deep"}}]]}}}
    deep: list[dict[str, Any]] = [
        {"chain": {**where, "name": "deep"}},
        {"rule": {**where, "chain": "deep", "handle": 3, "expr": [is_(SOURCE, "@bad"), DROP]}},
        {"set": {**where, "name": "bad", "elem": [{"prefix": {"addr": "0.0.0.0", "len": 1}}]}},
    ]
    (found,) = met(table([vmap]) + deep)
    assert (found.chain, found.flows) == ("deep", (STUN._replace(family=4),))


def test_what_leaves_of_a_container_is_none_of_calls() -> None:
    user = {"meta": {"key": "skuid"}}
    of_container = is_(user, {"range": [200000, 265535]})
    assert met(table([of_container, DROP], [is_(user, 201001), DROP], hook="output")) == []
    assert met(table([is_(user, {"range": [0, 265535]}), DROP], hook="output"))


def test_what_leaves_is_met_too() -> None:
    source = {"payload": {"protocol": "udp", "field": "sport"}}
    (found,) = met(table([is_(source, 3478), DROP], hook="output"))
    assert found.directions == ("out",)


@pytest.mark.parametrize(
    "rule",
    [
        "-A INPUT -p udp -m udp --dport 3478 -j DROP",
        "-A INPUT -p udp -m multiport --dports 53,3478:3479 -j REJECT --reject-with icmp-port-unreachable",
        "-A INPUT -p udp -m length --length 500:65535 -m udp --dport 3478 -j DROP",
        "-A INPUT -p udp -m udp --dport 3478 -m limit --limit 5/sec -j ACCEPT",
        "-A INPUT ! -s 192.0.2.0/24 -p udp -j DROP",
        "-A INPUT -p udp -m udp --dport 3478 -m statistic --mode random --probability 0.2 -j DROP",
        "-A INPUT -p udp -m hashlimit --hashlimit-above 5/sec --hashlimit-mode srcip "
        "--hashlimit-name x -j DROP",
    ],
)
def test_iptables(rule: str) -> None:
    tail = "-A INPUT -p udp -m udp --dport 3478 -j DROP" if "ACCEPT" in rule else ""
    text = f"*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n{rule}\n{tail}\nCOMMIT"
    (found,) = met([], STUN, xtables=text)
    assert found.table == "ip filter" and found.flows == (STUN._replace(family=4),)
    assert found.mend.startswith("iptables -t filter -D INPUT ")


@pytest.mark.parametrize(
    "rule",
    [
        "-A INPUT -p udp -m udp --dport 53 -j DROP",
        "-A INPUT -s 192.0.2.66/32 -j DROP",
        "-A INPUT -m conntrack --ctstate INVALID -j DROP",
        '-A INPUT -p udp -m comment --comment "a drop" -m udp --dport 3478 -j ACCEPT',
        "-A INPUT -p udp -m string --string x --algo bm -j DROP",
        "-A INPUT -i docker0 -j DROP",
        "-A INPUT -j f2b-sshd",
    ],
)
def test_iptables_that_is_none(rule: str) -> None:
    text = f"*filter\n:INPUT ACCEPT [0:0]\n:f2b-sshd - [0:0]\n{rule}\n-A f2b-sshd -j RETURN\nCOMMIT"
    assert met([], STUN, MEDIA, xtables=text) == []


def test_programs_are_known_by_their_chains() -> None:
    text = "*filter\n:INPUT ACCEPT [0:0]\n:ufw-user-input - [0:0]\n-A INPUT -j ufw-user-input\n"
    (found,) = met([], STUN, xtables=text + "-A ufw-user-input -p udp --dport 3478 -j DROP\nCOMMIT")
    assert found.program == "ufw"
