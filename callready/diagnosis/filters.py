"""Which packets of the port plan the packet filters of a host keep back, change or divert, and by
which rule: sample packets of each flow are led through the tables as nftables would lead them
(nft(8), libnftables-json(5)), those of iptables too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain as chain_of
from typing import Any, Literal, NamedTuple

from callready.diagnosis.model import Flow
from callready.diagnosis.packets import (
    ANYWHERE,
    RANK,
    SIZES,
    UNKNOWN,
    Answer,
    Direction,
    Likely,
    Packet,
    both,
    equals,
    limited,
    neighbours,
    numbers_in,
    samples,
)
from callready.diagnosis.xtables import expressions
from callready.settings.egress import SUBORDINATES

OURS = ("inet", "callready")
HOOKS: dict[Direction, tuple[str, ...]] = {
    "in": ("ingress", "prerouting", "input"),
    "out": ("output", "postrouting", "egress"),
}
LEGACY = " (legacy)"  # of tables that are iptables' own, beside nftables
VERDICTS = ("accept", "drop", "reject", "return", "queue", "dnat", "redirect", "tproxy", "fwd")
COUNTING = ("limit", "quota", "ct count", "set", "meter", "map")
PROGRAMS = {
    r"^ufw|filter ufw": "ufw",
    r"firewalld|^(IN|FWD[IO]?)_": "firewalld",
    r"docker": "Docker",
    r"f2b|fail2ban": "fail2ban",
    r"crowdsec": "CrowdSec",
    r"csf|LOCALIN|LOCALOUT": "csf",
    r"cali-|calico": "Calico",
    r"KUBE": "Kubernetes",
    r"nixos": "NixOS",
}


@dataclass(frozen=True)
class Obstacle:
    """A rule (or a chain's policy) that meets packets of flows.

    Args:
        table, chain, hook: where it is; table as `inet filter`.
        handle: nftables' handle of the rule; 0 is none.
        rule: its text.
        verdict: drop, reject, redirect, dnat, tproxy, queue, mangle or fwd.
        answer: whether the packets meet it.
        flows: the flows whose packets do, cut to the ports that do.
        directions: of the packets, as the host sees them.
        sizes: the smallest and the largest that do, of SIZES and those the rules name.
        all_sizes: whether packets of every size do.
        rate: what it lets through, as words; empty if that is nothing.
        remotes: addresses of the other end that do, of those that were tried.
        packets: its counter; None if it has none.
    """

    table: str
    chain: str
    hook: str
    handle: int
    rule: str
    verdict: str
    answer: Answer
    flows: tuple[Flow, ...]
    directions: tuple[Direction, ...]
    sizes: tuple[int, int]
    all_sizes: bool
    rate: str
    remotes: tuple[str, ...]
    packets: int | None

    @property
    def is_for_some(self) -> bool:
        """Whether it is about some addresses only."""
        return not {*ANYWHERE[4], *ANYWHERE[6]} & {*self.remotes}

    @property
    def program(self) -> str:
        """Which program's it is, by names; empty if that is not known."""
        where = f"{self.table} {self.chain}"
        names = (
            name
            for pattern, name in PROGRAMS.items()
            if any(re.search(pattern, text, re.I) for text in (where, self.chain))
        )
        return next(names, "")

    @property
    def is_xtables(self) -> bool:
        """Whether iptables shows it."""
        return self.rule.startswith("-")

    @property
    def mend(self) -> str:
        """The command that takes it away."""
        family, name = self.table.split(" ", 1)
        tool = {"ufw": "ufw status numbered, and ufw allow", "firewalld": "firewall-cmd --add-port"}
        if self.program in tool:
            return f"{tool[self.program]} for the ports of docs/ports.md; or let callready filter"
        if self.is_xtables:
            program = "ip6tables" if family == "ip6" else "iptables"
            program += "-legacy" * name.endswith(LEGACY)
            name = name.removesuffix(LEGACY)
            rule = self.rule.replace("-A ", "-D ", 1)
            rule = rule.replace(" DROP", " ACCEPT") if rule.startswith("-P") else rule
            return f"{program} -t {name} {rule}"
        if self.handle:
            return f"nft delete rule {self.table} {self.chain} handle {self.handle}"
        return f"nft chain {self.table} {self.chain} '{{ policy accept; }}'"


def matched(obstacles: Iterable[Obstacle], flow: Flow, direction: Direction) -> list[Obstacle]:
    """Those that packets of a flow meet in this direction."""
    return [
        each
        for each in obstacles
        if direction in each.directions and any(flow.meets(other) for other in each.flows)
    ]


@dataclass
class Chain:
    """A chain, its rules in order; base chains have a hook."""

    family: str
    table: str
    name: str
    kind: str = ""
    hook: str = ""
    priority: int = 0
    policy: str = "accept"
    rules: list[Rule] = field(default_factory=list)


class Rule(NamedTuple):
    """A rule of a chain: its expressions as nftables' JSON, and its text."""

    handle: int
    expr: list[dict[str, Any]]
    text: str

    @property
    def statements(self) -> list[tuple[str, Any]]:
        """Its expressions by kind."""
        return [next(iter(x.items())) if isinstance(x, dict) else (x, None) for x in self.expr]


class Hit(NamedTuple):
    """A packet that meets a rule (None: the policy)."""

    chain: Chain
    base: Chain
    rule: Rule | None
    verdict: str
    answer: Answer
    rate: str
    packet: Packet


@dataclass
class Filters:
    """The tables of a host."""

    chains: dict[tuple[str, str, str], Chain] = field(default_factory=dict)
    sets: dict[tuple[str, str, str], list[Any]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        ruleset: Iterable[dict[str, Any]],
        texts: dict[tuple[str, str, int], str] | None = None,
        xtables: Iterable[tuple[int, str, str]] = (),
    ) -> Filters:
        """From the objects of `nft -j list ruleset`, the text of rules by family, table and handle,
        and lines of iptables-save by family and program."""
        found, texts, xtables = cls(), texts or {}, list(xtables)
        theirs = {
            ({4: "ip", 6: "ip6"}[family], line[1:].strip())
            for family, program, line in xtables
            if line.startswith("*") and "legacy" not in program
        }
        for item in ruleset:
            ((kind, body),) = item.items()
            if kind not in ("chain", "rule", "set", "map"):
                continue
            if (body["family"], body["table"]) in theirs:
                continue
            key = (body["family"], body["table"], body.get("chain") or body["name"])
            if kind == "chain":
                place = (body.get("type", ""), body.get("hook", ""), int(body.get("prio", 0)))
                found.chains[key] = Chain(*key, *place, body.get("policy", "accept"))
            elif kind == "rule":
                handle = int(body.get("handle", 0))
                rule = Rule(handle, body["expr"], texts.get((*key[:2], handle), ""))
                found.chains.setdefault(key, Chain(*key)).rules.append(rule)
            else:
                found.sets[key] = body.get("elem", [])
        for family, program in dict.fromkeys((family, program) for family, program, _ in xtables):
            lines = [line for f, p, line in xtables if (f, p) == (family, program)]
            found._add_xtables(family, lines, LEGACY * ("legacy" in program))
        return found

    def _add_xtables(self, family: int, lines: list[str], mark: str) -> None:
        table, nft_family = "", {4: "ip", 6: "ip6"}[family]
        for line in lines:
            if line.startswith("*"):
                table = line[1:].strip() + mark
            elif line.startswith(":"):
                name, policy, *_ = line[1:].split()
                built_in = name in ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
                self.chains[nft_family, table, name] = Chain(
                    nft_family,
                    table,
                    name,
                    "nat" if table.startswith("nat") else "filter",
                    name.lower() * built_in,
                    {"raw": -300, "mangle": -150, "nat": -100}.get(table.split()[0], 0),
                    "drop" if policy == "DROP" else "accept",
                )
            elif counted := re.match(r"(?:\[(\d+):\d+\] )?(-A (\S+) ?.*)", line):
                packets, text, name = counted[1], counted[2], counted[3]
                expr = list(expressions(family, shlex.split(text)[2:]))
                if packets is not None:
                    expr.insert(len(expr) - 1, {"counter": {"packets": int(packets)}})
                if chain := self.chains.get((nft_family, table, name)):
                    chain.rules.append(Rule(0, expr, text))

    def obstacles(
        self,
        flows: Sequence[Flow],
        locals_: Mapping[int, str],
        peers: Mapping[Flow, Mapping[str, int]],
        only: tuple[str, str] | None = None,
        closed: Container[Flow] = (),
    ) -> list[Obstacle]:
        """What packets of flows meet.

        Args:
            flows: of the port plan.
            locals_: the host's address by family.
            peers: by flow, addresses that it is certainly with, and a port that they send from.
            only: family and name of the one table to look at; without it, all but callready's.
            closed: flows that are with those peers and with nobody else.
        """

        def is_wanted(key: tuple[str, str, str]) -> bool:
            return key[:2] == only if only else key[:2] != OURS

        chains = [chain for key, chain in self.chains.items() if is_wanted(key)]
        bases = sorted((each for each in chains if each.hook), key=lambda each: each.priority)
        if not bases:
            return []
        numbers = set(numbers_in([rule.expr for chain in chains for rule in chain.rules]))
        numbers |= set(numbers_in([each for key, each in self.sets.items() if is_wanted(key)]))
        near = {n + d for n in numbers if 60 < n < 1240 for d in (-1, 0, 1)}
        sizes = sorted({*SIZES, *near})[:40]
        hits: dict[tuple[Any, ...], list[tuple[Flow, Hit]]] = {}
        for flow in flows:
            strangers = {} if flow in closed else ANYWHERE
            tried = samples(flow, numbers, sizes, locals_, peers.get(flow, {}), strangers)
            # Who does not find the host sends it nothing.
            for packet in chain_of(tried, () if only else neighbours(flow, locals_, sizes[0])):
                for hit in (hit for base in bases for hit in self._lead(packet, base)):
                    rule = hit.rule.text + str(hit.rule.handle) if hit.rule else "policy"
                    of = (hit.chain.family, hit.chain.table, hit.chain.name, rule, hit.verdict)
                    hits.setdefault(of, []).append((flow, hit))
        return [_obstacle(found, sizes) for found in hits.values()]

    def _lead(self, packet: Packet, base: Chain) -> list[Hit]:
        """What a packet meets in a base chain."""
        if base.hook not in HOOKS[packet.direction] or base.family not in packet.families:
            return []
        if base.kind == "nat" and packet.state != "new":
            return []
        walk = _Walk(self, base, packet)
        walk.through(base)
        return walk.hits


class _Walk:
    """A packet on its way through a base chain, and the hits there."""

    def __init__(self, filters: Filters, base: Chain, packet: Packet) -> None:
        self.filters, self.base, self.packet, self.hits = filters, base, packet, list[Hit]()

    def through(self, chain: Chain, answer: Answer = "yes", rate: str = "", depth: int = 0) -> str:
        """Lead it through a chain: what becomes of it, `accept`, `drop`, or `continue` and `return`
        where that is not decided; `answer` and `rate` are those by which it got there."""
        for rule in chain.rules:
            fits: Answer = "yes"
            own = rate
            for kind, body in rule.statements:
                verdict, target, at = "", "", fits
                if kind == "match":
                    fits = both(fits, self._match(chain, body))
                elif kind in COUNTING:
                    passes, words = limited(kind, body)
                    fits, own = both(fits, passes), words or own
                elif kind == "xt":
                    # A match of iptables that nftables cannot say; its targets follow.
                    fits = both(fits, "yes" if body.get("name") == "comment" else "maybe")
                elif kind == "vmap":
                    said, verdict, target = self._mapped(chain, body)
                    at = both(fits, said)
                elif kind in ("jump", "goto"):
                    verdict, target = kind, body["target"]
                elif kind in VERDICTS:
                    verdict = kind
                elif kind == "snat":
                    verdict = kind if body and body.get("addr") != self.packet.local else ""
                elif kind == "mangle" and self.packet.is_spoiled(body):
                    verdict = "mangle"
                if fits == "no":
                    break
                if not verdict:
                    continue
                sure = both(answer, at)
                got = self._verdict(chain, rule, verdict, target, sure, own, depth)
                if got != "continue" and at == "yes":
                    is_end = got == "return" and chain is self.base
                    return self._policy(answer, rate) if is_end else got
                if got in ("accept", "return"):
                    # What is let through up to a rate leaves the rest to the rules that follow.
                    rate, answer = own, sure
        return self._policy(answer, rate) if chain is self.base else "continue"

    def _policy(self, answer: Answer, rate: str) -> str:
        if self.base.policy != "drop":
            return "accept"
        self.hits.append(Hit(self.base, self.base, None, "drop", answer, rate, self.packet))
        return "drop"

    def _verdict(
        self,
        chain: Chain,
        rule: Rule,
        verdict: str,
        target: str,
        answer: Answer,
        rate: str,
        depth: int,
    ) -> str:
        if verdict in ("jump", "goto"):
            called = self.filters.chains.get((chain.family, chain.table, target))
            if called is None or answer == "no" or depth > 16:
                return "continue"
            got = self.through(called, answer, rate, depth + 1)
            if got in ("continue", "return"):
                return "return" if verdict == "goto" else "continue"
            return got
        if verdict in ("accept", "return", "continue"):
            return verdict
        self.hits.append(Hit(chain, self.base, rule, verdict, answer, rate, self.packet))
        return "continue" if verdict == "mangle" else "drop"

    def _elements(self, chain: Chain, name: str) -> list[Any]:
        return self.filters.sets.get((chain.family, chain.table, name.removeprefix("@")), [])

    def _mapped(self, chain: Chain, body: dict[str, Any]) -> tuple[Answer, str, str]:
        """The verdict of a map for it, and whether that is certain."""
        data, value = body["data"], self.packet.value(body["key"])
        elements = self._elements(chain, data) if isinstance(data, str) else data.get("set", [])
        for key, verdict in elements:
            said = self._compare(chain, "==", value, key)
            if said != "no" and isinstance(verdict, dict):
                ((kind, to),) = verdict.items()
                return said, kind, (to or {}).get("target", "")
        return "no", "", ""

    def _match(self, chain: Chain, body: dict[str, Any]) -> Answer:
        left = body["left"]
        if isinstance(left, dict) and "numgen" in left:
            return "likely"
        if left == {"meta": {"key": "skuid"}} and _is_of_containers(body["right"]):
            return "no"
        if isinstance(left, dict) and left.get("payload", {}).get("base"):
            return "likely" if self.packet.proto == "udp" else "maybe"
        return self._compare(chain, body["op"], self.packet.value(left), body["right"])

    def _compare(self, chain: Chain, op: str, value: Any, right: Any) -> Answer:
        if value is UNKNOWN:
            return "maybe"
        if isinstance(value, Likely):
            return "likely"
        if op in ("<", ">", "<=", ">="):
            if not (isinstance(value, int) and isinstance(right, int)):
                return "maybe"
            less, more = value < right, value > right
            good = {"<": less, ">": more, "<=": not more, ">=": not less}[op]
            return "yes" if good else "no"
        said = self._contains(chain, value, right)
        if op == "!=":
            opposite: dict[Answer, Answer] = {"yes": "no", "no": "yes"}
            return opposite.get(said, said)
        return said

    def _contains(self, chain: Chain, value: Any, right: Any) -> Answer:
        """Whether a value is what stands on the right: one, a range, a prefix or a set of them."""
        match right:
            case _ if value is None:
                return "no"
            case str() if right.startswith("@"):
                return self._contains(chain, value, self._elements(chain, right))
            case {"set": inner}:
                return self._contains(chain, value, inner)
            case {"elem": {"val": inner}}:
                return self._contains(chain, value, inner)
            case list():
                answers = [self._contains(chain, value, each) for each in right]
                return max(answers, key=RANK.__getitem__, default="no")
            case {"concat": others}:
                if not isinstance(value, tuple):
                    return "maybe"
                said: Answer = "yes"
                for mine, theirs in zip(value, others, strict=False):
                    said = both(said, self._compare(chain, "==", mine, theirs))
                return said
        values = value if isinstance(value, frozenset) else (value,)
        return "yes" if any(equals(each, right) for each in values) else "no"


def _is_of_containers(users: Any) -> bool:
    """Whether these are users of containers, none of which serves callers."""
    first = users.get("range", [0])[0] if isinstance(users, dict) else users
    return isinstance(first, int) and first >= SUBORDINATES[0]


def _obstacle(found: list[tuple[Flow, Hit]], sizes: Sequence[int]) -> Obstacle:
    _, hit = max(found, key=lambda each: RANK[each[1].answer])
    chain, rule = hit.chain, hit.rule
    answer = hit.answer
    found = [(flow, other) for flow, other in found if RANK[other.answer] >= min(2, RANK[answer])]
    counters = [i["counter"] for i in (rule.expr if rule else []) if "counter" in i]
    packets = counters[0].get("packets") if counters and isinstance(counters[0], dict) else None
    flows: list[Flow] = []
    for flow in dict.fromkeys(flow for flow, _ in found):
        of = [other.packet for each, other in found if each == flow]
        families = {packet.family for packet in of}
        ports = sorted({packet.port for packet in of})
        family = families.pop() if len(families) == 1 else 0
        flows.append(_cut(flow, ports, family))
    remotes = {other.packet.remote for _, other in found}
    some = sorted({other.packet.size for _, other in found})
    return Obstacle(
        f"{chain.family} {chain.table}",
        chain.name,
        hit.base.hook,
        rule.handle if rule else 0,
        (rule.text or str(rule.expr)) if rule else f"policy {chain.policy}",
        hit.verdict,
        answer if packets == 0 or not packets else ("likely" if answer == "maybe" else answer),
        tuple(flows),
        tuple(dict.fromkeys(other.packet.direction for _, other in found)),
        (some[0], some[-1]),
        set(some) == set(sizes) or some[0] == sizes[0],
        next((other.rate for _, other in found if other.rate), ""),
        tuple(sorted(remotes)),
        packets,
    )


def _cut(flow: Flow, ports: Sequence[int], family: int) -> Flow:
    """A flow cut to ports and a family."""
    cut: Literal[0, 4, 6] = flow.family or (4 if family == 4 else 6 if family == 6 else 0)
    return flow._replace(first=ports[0], last=ports[-1], family=cut)
