"""What is wrong with a host's network: addresses, kernel, links, queues, routes, names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any, Literal

from callready.diagnosis.inspection import KERNEL
from callready.diagnosis.model import Cause, Flow, Place
from callready.diagnosis.seen import Seen
from callready.release.refusals import of_addresses

SLOW = 50 * 10**6  # bits a second: less is felt
_OF_PORTS = {"ipproto", "sport", "sport_start", "uid_start"}
_REFUSE = ("blackhole", "unreachable", "prohibit", "throw")


def causes(seen: Seen) -> Iterator[Cause]:
    """Everything between the host's network cards and its programs but the packet filters."""
    host, facts, inspection = seen.node.settings, seen.facts, seen.inspection
    own = {a for a in (host.local_address, host.address6) if a}
    devices = {
        link["ifname"]: link
        for link in inspection.links
        if any(info.get("local") in own for info in link.get("addr_info", []))
    }
    kernel = list(_kernel(seen, set(devices)))
    yield from kernel
    # Below 1280 bytes there is no IPv6 on a link (RFC 8200, section 5).
    no6 = any("disable_ipv6" in cause.what for cause in kernel)
    no6 = no6 or any(link.get("mtu", 1500) < 1280 for link in devices.values())
    missing = list(of_addresses(host, facts))
    if host.address6 and host.address6 not in facts.addresses and facts.addresses and not no6:
        missing.append(f"address6: {host.address6} is on none of its interfaces")
    for name, link in devices.items():
        missing += [
            f"{info['local']} is not usable yet: {flag}"
            for info in link.get("addr_info", [])
            for flag in ("tentative", "dadfailed")
            if info.get("local") in own and info.get(flag)
        ]
        if "UP" not in link.get("flags", ["UP"]):
            missing.append(f"{name} is down")
        if "NOARP" in link.get("flags", []) and link.get("link_type") == "ether":
            missing.append(f"{name} answers no ARP (ip link set {name} arp on)")
    for why in missing:
        yield seen.cause(
            "address-missing",
            Place.NETWORK,
            f"an address that callers are told is not the host's: {why}",
            "ip address add, or the network's configuration; the inventory's addresses",
            # Relays are of IPv4, whatever family callers come over.
            breaks=seen.flows(family=6 if _family(why) == 6 else 0),
            checks=("test_addresses", "test_units", "test_listening"),
        )
    yield from _others(seen)
    for name, link in devices.items():
        yield from _link(seen, name, link)
    # What has no address has no way either.
    gone = set(map(_family, missing))
    yield from _routes(seen, gone | {6} if missing or no6 else gone)
    yield from _names(seen)


def _others(seen: Seen) -> Iterator[Cause]:
    """Addresses of the fleet's other hosts, whose packets come here or there by chance."""
    for name, other in seen.node.fleet.hosts.items():
        for address in (other.address, other.address6) if name != seen.node.name else ():
            if address in seen.facts.addresses:
                family: Literal[4, 6] = 6 if ":" in address else 4
                yield seen.cause(
                    "address-missing",
                    Place.NETWORK,
                    f"{seen.node.name} has {name}'s address {address} too: packets to it get to "
                    "either of them by chance",
                    f"ip address del {address} on {seen.node.name}, and where it is configured",
                    breaks=(
                        Flow(name, "udp", 1, 65535, family),
                        Flow(name, "tcp", 1, 65535, family),
                    ),
                    checks=("test_addresses", f"{name}:test_*"),
                )


def _kernel(seen: Seen, devices: set[str]) -> Iterator[Cause]:
    values, wrong = seen.inspection.kernel, dict[str, str]()
    if seen.node.settings.address6:
        # New interfaces' default is no matter, and `all` is that of each at the moment it is set.
        for device in devices | {"all"}:
            key = f"net.ipv6.conf.{device}.disable_ipv6"
            if values.get(key) == "1":
                wrong[key] = "callers over IPv6 reach nothing"
    for key, limit in KERNEL.items():
        value = values.get(key, "")
        if value.isdigit() and not limit.least <= int(value) <= limit.most:
            wrong[key] = limit.means
    planned = dict(what.split(" = ", 1) for what in seen.changed("sysctl"))
    if not seen.is_undeployed:
        wrong |= {k: f"it shall be {value[:60]}" for k, value in planned.items() if k not in wrong}
    for key, means in wrong.items():
        is_udp, is_tcp = "udp" in key or key.startswith("net.core"), "tcp" in key
        flows = seen.flows(family=6 if "ipv6" in key else 0)
        if "ipv6" not in key and (is_udp or is_tcp):
            flows = tuple(flow for flow in flows if flow.proto == ("udp" if is_udp else "tcp"))
        is_later = key.endswith(("reserved_ports", "nonlocal_bind"))
        mend = f"sysctl -w {key}=0"
        if key in planned or key in KERNEL:
            mend = f"sysctl --system, and which file of /etc/sysctl.d sets {key}"
        yield seen.cause(
            "kernel-setting",
            Place.NETWORK,
            f"{key} is {values.get(key) or seen.facts.sysctls.get(key, 'otherwise')}: {means}",
            mend,
            breaks=() if is_later else flows,
            checks=("test_kernel", *(("test_addresses",) if "ipv6" in key else ())),
            latent=is_later,
        )
        if "disable_ipv6" in key:
            break


def _link(seen: Seen, name: str, link: dict[str, Any]) -> Iterator[Cause]:
    flows, mtu = seen.flows(), int(link.get("mtu", 1500))
    mtus = [(mtu, f"{name} has an MTU of {mtu}", f"ip link set {name} mtu 1500")]
    for route in seen.inspection.routes:
        sizes = [int(m["mtu"]) for m in route.get("metrics", []) if "mtu" in m]
        if route.get("dev") == name and sizes:
            words = f"the route to {route.get('dst')} has an MTU of {min(sizes)}"
            mend = f"ip route change {route.get('dst')} dev {name} without mtu"
            mtus.append((min(sizes), words, mend))
    mtu, words, mend = min(mtus)
    if mtu < 1400:
        what = f"{words}: packets of video's size are lost or cut"
        yield seen.cause("small-mtu", Place.NETWORK, what, mend, words, breaks=flows)
    if link.get("xdp"):
        what = f"a program in XDP sees {name}'s packets before any filter"
        mend, shown = f"ip link set dev {name} xdp off", str(link["xdp"])
        yield seen.cause("foreign-filter", Place.FILTER, what, mend, shown, breaks=flows)
    shaping = [
        words
        for qdisc in seen.inspection.qdiscs
        if qdisc.get("dev") == name
        for words in _shaping(qdisc)
    ]
    shaping += [
        text.strip()
        for device, text in seen.inspection.tc_filters
        if device == name and _is_shaping(text)
    ]
    if shaping:
        yield seen.cause(
            "shaped",
            Place.NETWORK,
            f"{name} is made to lose, delay or hold back packets: {shaping[0]}",
            f"tc qdisc del dev {name} root (or clsact); tc qdisc show dev {name}",
            *shaping[:4],
            breaks=flows,
        )


def _shaping(qdisc: dict[str, Any]) -> Iterator[str]:
    """What a queue does to packets, if callers feel it."""
    kind, options = qdisc.get("kind", ""), qdisc.get("options", {})
    if kind == "netem":
        shown = ", ".join(
            f"{key} {value}"
            for key, value in options.items()
            if key not in ("limit", "seed", "ecn", "gap") and value not in (0, None, False)
        )
        if shown:
            yield f"netem {shown}"
    elif kind in ("tbf", "cake"):
        rate = options.get("rate", options.get("bandwidth", 0))
        if isinstance(rate, int) and 0 < rate < SLOW / 8:
            yield f"{kind} at {8 * rate // 1000} kbit/s"
    elif kind in ("blackhole", "plug"):
        yield kind


def _is_shaping(text: str) -> bool:
    """Whether a line of tc(8) is a class or filter that callers feel."""
    if m := re.search(r"class htb .*?rate (\d+)([KMG]?)bit", text):
        return int(m[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[m[2]] < SLOW
    is_filter = re.search(r"\bpolice\b|action drop|gact action drop|rate \d+", text)
    return bool(is_filter) and "class" not in text


def _family(why: str) -> int:
    """Of the first address that a sentence names; 4 if it names none."""
    found = re.search(r"[0-9a-f]+:[0-9a-f:]+|\d+\.\d+\.\d+\.\d+", why)
    return 6 if found and ":" in found[0] else 4


def _routes(seen: Seen, explained: set[int]) -> Iterator[Cause]:
    host, inspection = seen.node.settings, seen.inspection
    own = [a for a in (host.local_address, host.address6) if a]
    fleet = {a for each in seen.node.fleet.hosts.values() for a in (each.address, each.address6)}
    here = {host.address, host.address6, *(fleet & seen.facts.addresses)}
    told = set[int]()

    def cause(family: int, what: str, mend: str, *evidence: str) -> Cause:
        told.update((family,) if family else (4, 6))
        flows, checks = seen.flows(family=family), ("test_forbidden_peers",)
        return seen.cause(
            "route-missing", Place.NETWORK, what, mend, *evidence, breaks=flows, checks=checks
        )

    for route in inspection.routes:
        text, kind = str(route.get("dst", "default")), route.get("type")
        # What Linux itself says where there is no default route of IPv6.
        if kind not in _REFUSE or route.get("metric") == 2**32 - 1:
            continue
        network = ip_network({"default": "0.0.0.0/0"}.get(text, text), strict=False)
        family = network.version
        if text == "default" and route.get("metric") == 1024:
            family = 6
        peers = [ip_address(a) for a in inspection.ways if ip_address(a).version == family]
        hits = [str(a) for a in peers if text == "default" or a in network]
        wide = network.prefixlen <= (12 if family == 4 else 24) and not network.is_private
        if (hits or (wide and text != "default")) and family not in told:
            table = f" table {route['table']}" if "table" in route else ""
            yield cause(
                family,
                f"a {kind} route to {text} takes packets away",
                f"ip {'-6 ' * (family == 6)}route del {kind} {text}{table}",
                *(f"to {a}: {inspection.ways.get(a)}" for a in hits[:3]),
            )
    for rule in inspection.ip_rules:
        shown = " ".join(f"{key} {value}" for key, value in rule.items())
        mend = f"ip rule del priority {rule.get('priority')}"
        is_six = ":" in f"{rule.get('src', '')}{rule.get('dst', '')}"
        if any(value in _REFUSE for value in rule.values()):
            if not _is_about_us(rule, own, inspection.ways):
                continue
            told |= {4, 6}
            what = f"a rule of routing takes packets away: {shown}"
            yield cause(6 if is_six else 0, what, mend, shown)
        elif met := _diverted(seen, rule):
            what = f"a rule of routing leads callers' packets elsewhere: {shown}"
            yield seen.cause("route-missing", Place.NETWORK, what, mend, shown, breaks=met)
    for address, words in inspection.neighbours.items():
        if address in inspection.ways:
            what = f"somebody has set which network card {address} is"
            mend = f"ip neigh del {words.partition(' lladdr')[0]}"
            yield cause(ip_address(address).version, what, mend, f"ip neigh: {words}")
    for whom in inspection.xfrm:
        yield cause(0, f"an IPsec policy blocks {whom}", "ip xfrm policy delete", whom)
    for peer, words in inspection.ways.items():
        family = ip_address(peer).version
        if family in told | explained or (family == 6 and not host.address6):
            continue
        is_refused = "RTNETLINK" in words or words.split(" ", 1)[0] in _REFUSE
        # The host's own, and those of others that it has, which is said there.
        if peer not in here and (is_refused or " dev lo " in f"{words} "):
            what, mend = f"the host has no way to {peer}", "the network's configuration"
            shown = f"ip route get {peer}: {words}"
            yield cause(family, what, f"ip route add, or {mend}", shown)


def _is_about_us(rule: dict[str, Any], own: Iterable[str], peers: Iterable[str]) -> bool:
    """Whether a rule may meet what callers get: marks are those of VPNs on what is their own."""

    def has(key: str, addresses: Iterable[str]) -> bool:
        if (text := rule.get(key, "all")) == "all":
            return True
        network = ip_network(f"{text}/{rule[f'{key}len']}" if f"{key}len" in rule else text)
        return any(ip_address(each) in network for each in addresses)

    return "fwmark" not in rule and has("src", own) and has("dst", peers)


def _diverted(seen: Seen, rule: dict[str, Any]) -> tuple[Flow, ...]:
    """What callers' answers meet a rule that is about ports or programs, if its table leads them
    elsewhere; rules about addresses are how hosts with several networks work."""
    table = str(rule.get("table", "main"))
    if table in ("local", "main", "default") or not _OF_PORTS & {*rule}:
        return ()
    first = int(rule.get("sport_start", rule.get("sport", 1)))
    last = int(rule.get("sport_end", rule.get("sport", 65535)))
    ways: dict[str, set[tuple[Any, ...]]] = {table: set(), "main": set()}
    for route in seen.inspection.routes:
        way = tuple(route.get(key) for key in ("type", "gateway", "dev"))
        ways.get(str(route.get("table", "main")), set()).add(way)
    if not ways[table] - ways["main"]:
        return ()
    return tuple(
        flow._replace(first=max(first, flow.first), last=min(last, flow.last))
        for flow in seen.flows()
        if rule.get("ipproto", flow.proto) == flow.proto
        and first <= flow.last
        and flow.first <= last
    )


def _names(seen: Seen) -> Iterator[Cause]:
    for name, addresses in seen.inspection.names.items():
        right = {
            a
            for each in seen.node.fleet.hosts.values()
            if each.name == name
            for a in (*each.addresses, each.private_address, each.internal_address, each.address6)
            if a
        }
        # Of a family that the inventory does not name nothing is known.
        known = {ip_address(a).version for a in right}
        found = [a for a in addresses if a not in right and not ip_address(a).is_loopback]
        wrong = [a for a in found if ip_address(a).version in known]
        if wrong:
            lines = [s for s in seen.inspection.hosts if any(a in s.split() for a in wrong)]
            shown = lines or [f"getent ahosts {name}: {' '.join(addresses)}"]
            resolver = "the host's resolver (resolvectl query)"
            yield seen.cause(
                "name-overridden",
                Place.NAME,
                f"the host takes {name} for {', '.join(wrong)}",
                "take the line out of /etc/hosts" if lines else resolver,
                *shown,
                checks=("test_call_from_the_app", "test_renewal"),
            )
