"""Rules that need more than one section or more than one host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from itertools import chain, combinations, compress, product
from pathlib import Path
from typing import NamedTuple

from callready.settings import android, coturn_keys, livekit_keys, pins, pools
from callready.settings.certificates import (
    CertificateError,
    apple_refuses,
    lifetime_refused,
    read_pair,
)
from callready.settings.endpoints import split_endpoint
from callready.settings.fields import secret_fields
from callready.settings.fleet import Fleet
from callready.settings.inventory import GROUPS, mistyped
from callready.settings.models import HostSettings, LiveKit
from callready.settings.ports import overlaps, port_plan
from callready.settings.problem import Findings, Level, Problem
from callready.settings.uris import place

Problems = Iterator[Problem]


def check(fleet: Fleet) -> Findings:
    """Everything that is wrong with a fleet whose hosts are valid one by one."""
    for name, host in fleet.hosts.items():
        for rule in (*_OF_ROLES, *_OF_THE_EDGE, *_OF_CERTIFICATES):
            yield from (([name], problem) for problem in rule(host))
        for key, message in overlaps(port_plan(host)):
            yield [name], Problem(key, message)
    for rule_of_fleet in (*_OF_HOSTS, *_OF_POOLS, *_OF_SECRETS):
        yield from rule_of_fleet(fleet)


def _sources_key(setting: str) -> str:
    """The key that says to whom a use of the port plan with this setting is open."""
    return f"{setting.removesuffix('.port')}.sources"


# ---- one host ----

# Private (RFC 1918, 6598, 4193), loopback, link-local, multicast, reserved: nobody outside reaches
# these. Documentation addresses are left out: the lab has them.
_UNREACHABLE = [
    ipaddress.ip_network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/3"),
        *("::/127", "::ffff:0:0/96", "fc00::/7", "fe80::/10", "ff00::/8"),
    )
]


# No interface that other hosts reach has one of these; no router passes link-local ones on
# (RFC 3927, section 2.7).
_NO_INTERFACE = [
    ipaddress.ip_network(net)
    for net in (
        *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"),
        *("::/127", "fe80::/10", "ff00::/8"),
    )
]
_IS_NONE = "is an unspecified, loopback, link-local, multicast or reserved address: write the one"


def _addresses(host: HostSettings) -> Problems:
    if host.private_address and _is_in(_NO_INTERFACE, host.private_address):
        why = f"{host.private_address} {_IS_NONE} that the host's interface has behind 1:1 NAT"
        yield Problem("private_address", why)
    if not host.serves:
        return
    if host.address is None:
        yield Problem(
            "address",
            "IPv6-only hosts are not supported, many callers have no IPv6: give the host an IPv4 "
            "address too"
            if host.address6
            else "is missing: the host's public IPv4 address",
        )
    # On a LAN without TLS a private address is what is meant; wss:// is for callers outside.
    elif host.livekit and host.livekit.url.startswith("ws://"):
        if _is_in(_NO_INTERFACE, host.address):
            yield Problem("address", f"{host.address} {_IS_NONE} that callers reach")
    elif unreachable(host.address):
        yield Problem(
            "address",
            f"{host.address} is not reachable from the Internet: set the public address, and "
            "private_address to the one on the interface",
        )
    if host.address6 and unreachable(host.address6):
        yield Problem("address6", f"{host.address6} is not reachable from the Internet")


def _is_in(networks: list[android.Network], address: str) -> bool:
    """Whether an address, or all of a network, lies in one of these."""
    network = ipaddress.ip_network(address)
    return any(
        network.version == net.version and network.subnet_of(net)  # type: ignore[arg-type]  # same
        for net in networks
    )


def unreachable(address: str) -> bool:
    """Whether nobody outside of its own network reaches an address, or any of a network."""
    return _is_in(_UNREACHABLE, address)


def _internal_address(host: HostSettings) -> Problems:
    if not (internal := host.internal_address):
        return
    address = ipaddress.ip_address(internal)
    if _is_in(_NO_INTERFACE, internal):
        why = f"{internal} {_IS_NONE} that the host's interface has on the internal network"
        yield Problem("internal_address", why)
    for key in ("address", "address6"):
        if getattr(host, key) == internal:
            why = f"{internal} is {key} too: callers are told of it; leave internal_address out"
            yield Problem("internal_address", why)
    if not (livekit := host.sfu):
        return
    ips = livekit.rtc.ips
    if ips is None or any(address in ipaddress.ip_network(net) for net in ips.includes):
        yield Problem(
            "livekit.rtc.ips",
            f"tells callers of internal_address {internal}, which they cannot reach: "
            + ("leave it out" if ips is None else "take that out of includes"),
        )


def _candidates(host: HostSettings) -> Problems:
    if (livekit := host.sfu) and host.private_address and livekit.rtc.more(4):
        yield Problem(
            "livekit.rtc.ips.includes",
            f"{', '.join(livekit.rtc.more(4))} would be told to callers as {host.address}: behind "
            "1:1 NAT (private_address) LiveKit has one IPv4 address only; leave it out",
        )


def _filter(host: HostSettings) -> Problems:
    limited = [use for use in port_plan(host) if use.some]
    if limited and not host.firewall.enabled:
        for setting in dict.fromkeys(use.setting for use in limited):
            why = "needs the packet filter, which firewall.enabled = False leaves out: enable it"
            yield Problem(_sources_key(setting), why)
    elif host.firewall.open and not host.serves:
        why = "opens nothing: there is a packet filter only where callers come, and this host has "
        yield Problem("firewall.open", why + "none of LiveKit, TURN and an edge", "warning")
    if not (livekit := host.sfu) or not livekit.prometheus or not livekit.prometheus.sources:
        return
    if host.livekit_on_loopback and not host.has_edge:
        yield Problem(
            "livekit.prometheus.sources",
            "nobody but the host reaches the metrics: they listen on livekit.bind_addresses, "
            "which is loopback; add an address of the host there",
        )


def _groups(host: HostSettings) -> Problems:
    if "livekit" in host.groups and host.livekit is None:
        yield Problem("livekit", "is missing: the host is in group livekit")


def _pools_of_host(host: HostSettings) -> Problems:
    if "turn" in host.groups and not host.pools:
        yield Problem("pools", "is missing: which TURN pools this host of group turn runs")
    if host.pools and "turn" not in host.groups:
        yield Problem("pools", "needs the host in group turn")
    for name in host.pools:
        if name not in host.turn.pools:
            known = ", ".join(host.turn.pools) or "none"
            yield Problem("pools", f"{name!r} is not one of turn.pools ({known})")


# Callers at once that a pool is for at least, whatever it is for.
_FEW = 10


def _quotas(host: HostSettings) -> Problems:
    """Whether a pool holds what the URIs that clients are told ask it for."""
    for name, pool in host.turn_pools.items():
        asked, arithmetic = pools.asked_by_caller(host, name)
        key, ports, of_user = f"turn.pools.{name}", pool.relay_ports, pool.allocations_per_user
        callers = _FEW if pool.users else 1  # who share a fixed user's name
        if 0 < of_user < asked * callers:
            yield Problem(
                f"{key}.user_quota",
                f"{of_user} allocations are too few for {callers} of its callers ({arithmetic} "
                "each): more are refused with 486, and a call may be without a relay; leave it "
                f"out, or set {asked * callers} or more",
                "warning",
            )
        span = f"the {ports} relay ports {pool.min_port}-{pool.max_port}"
        total = min(pool.allocations or ports, ports)
        if total < asked * _FEW:
            yield Problem(
                f"{key}.{'total_quota' if total < ports else 'max_port'}",
                f"{total} allocations, of {span}, may be held by {total // asked} callers "
                f"({arithmetic} each): allow {asked * _FEW} or more",
                "warning",
            )
        if pool.allocations > ports:
            yield Problem(
                f"{key}.total_quota",
                f"{pool.allocations} is more than {span}, and without a free one coturn tries all "
                "of them for every further allocation: leave it out, or widen the range",
                "warning",
            )


# What callready writes on a host, and where nothing is a plain file; tests/unit/test_settings.py
# compares it with what the roles declare.
_OURS = re.compile(
    r"/etc/(callready|systemd|letsencrypt)/.*|/etc/sysctl\.d/60-callready\.conf|/etc/coturn/[^/]*\.conf"
    r"|/etc/livekit/(livekit\.yaml|turn_secret)|/etc/haproxy/haproxy\.cfg|/opt/livekit/.*"
    r"|/usr/local/(lib/callready/.*|bin/livekit-server)|/var/lib/(callready|turn)/.*"
    r"|/(dev|proc|run|sys)/.*"
)


def _app(host: HostSettings) -> Problems:
    if "app" in host.groups and host.app is None:
        yield Problem("app", "is missing: the host is in group app")
    if "app" in host.groups and host.livekit is None:
        yield Problem("livekit", "is missing: the app's .env needs the key and the URL")
    if host.backend and _OURS.fullmatch(host.backend.env_file):
        yield Problem(
            "app.env_file",
            f"{host.backend.env_file} is not the app's: callready or the system has its own files "
            "there; name a file in the app's folder, such as /srv/app/.env",
        )


def _android(host: HostSettings) -> Problems:
    if "android" not in host.groups:
        return
    if host.android is None or host.livekit is None:
        missing = "livekit" if host.android else "android"
        yield Problem(missing, "is missing: the host is in group android")
        return
    yield from android.check(host.android, host.livekit.url)


def _version_keys(host: HostSettings) -> Problems:
    for name, pool in host.turn_pools.items():
        yield from coturn_keys.check(host.turn.version, pool.extra, f"turn.pools.{name}.extra")
    if livekit := host.sfu:
        yield from livekit_keys.check(livekit.version, livekit.config, "livekit.config")


def _stun_server(host: HostSettings) -> Problems:
    if (livekit := host.sfu) and livekit.turn_pool is None and not livekit.rtc.stun_servers:
        yield Problem(
            "livekit.rtc.stun_servers",
            "is empty and there is no turn_pool: LiveKit would send its clients to public "
            "STUN servers; name one",
        )


_OF_ROLES = (
    _addresses,
    _internal_address,
    _candidates,
    _filter,
    _groups,
    _pools_of_host,
    _quotas,
    _app,
    _android,
    _version_keys,
    _stun_server,
)


def _url_without_edge(host: HostSettings) -> Problems:
    livekit = host.sfu
    if host.edge or not livekit or not livekit.url.startswith("ws://"):
        return
    if (port := place(livekit.url)[1]) != livekit.port:
        yield Problem(
            "livekit.url",
            f"leads to port {port}, LiveKit listens on {livekit.port} (livekit.port): callers "
            "need a proxy of yours in between",
            "warning",
        )


_NO_NAME = (
    "is an address, which clients do not send in the TLS handshake (RFC 6066, section 3), and the "
    "edge chooses the certificate by what they send: use a host name"
)


def _urls_of_edge(host: HostSettings) -> Problems:
    """What clients are told leads to the edge, over TLS and by name."""
    if not (edge := host.edge):
        return
    livekit, app = host.sfu, host.backend
    urls = [("livekit.url", "wss", livekit.url)] if livekit else []
    urls += [("app.url", "https", app.url)] if app and app.url and app.upstream else []
    for key, scheme, url in urls:
        name, port = place(url)
        if not url.startswith(f"{scheme}://"):
            yield Problem(key, f"must be {scheme}:// with an edge, which takes TLS only")
        elif port != edge.port:
            right = f"{scheme}://{name}" + (f":{edge.port}" if edge.port != 443 else "")
            yield Problem(
                key,
                f"leads to port {port}, the edge listens on edge.port: write {right}, or set "
                f"edge.port to {port}",
            )
        if android.address(name):
            yield Problem(key, _NO_NAME)


def _app_behind_edge(host: HostSettings) -> Problems:
    if host.edge and host.app and bool(host.app.url) != bool(host.app.upstream):
        yield Problem("app", "the edge needs both url and upstream, or neither")
    livekit, app = host.sfu, host.backend
    if host.edge and livekit and app and app.url and place(app.url)[0] == place(livekit.url)[0]:
        yield Problem("app.url", "is LiveKit's name too (livekit.url): give each a name of its own")


def _turn_on_443(host: HostSettings) -> Problems:
    """TURN over TLS that shares 443 with the edge is told apart by its name; elsewhere the packet
    filter hands 443 over."""
    pools = [pool for pool in host.turn_pools.values() if pool.tls_on_443]
    if pools and not host.has_edge and not host.firewall.enabled:
        yield Problem(
            "turn.tls_on_443",
            "needs the packet filter, which hands 443 to coturn's TLS port, and firewall.enabled "
            "is False: write tls_listening_port = 443 instead, or leave the filter on",
        )
    if not pools or not host.edge:
        return
    if host.name in host.edge_backends:
        yield Problem(
            "name",
            f"{host.name} is both HTTPS and TURN over TLS on 443, told apart by name only: give "
            "the host another name for TURN (name) or LiveKit another one (livekit.url)",
        )
    if host.has_edge and host.edge.port != 443:
        yield Problem("edge.port", "must be 443 for turn.tls_on_443, which this host has")
    if host.has_edge and android.address(host.name):
        yield Problem("name", _NO_NAME)
    if len(pools) > 1:
        yield Problem(
            "turn.tls_on_443",
            "only one pool of a host can be reached on 443: set it in one of turn.pools",
        )


_OF_THE_EDGE = (_url_without_edge, _urls_of_edge, _app_behind_edge, _turn_on_443)


def _ca_file(host: HostSettings) -> Problems:
    if host.tls and host.tls.ca and not Path(host.tls.ca).expanduser().is_file():
        yield Problem("tls.ca", f"{host.tls.ca}: no such file")


def _certificates(host: HostSettings) -> Problems:
    if host.tls_names and host.tls is None:
        yield Problem(
            "tls",
            f"is missing: {', '.join(host.tls_names)} needs certificate and key (without TURN "
            "over TLS, turn.tls = False, callers behind strict firewalls are shut out)",
        )


def _acme(host: HostSettings) -> Problems:
    if not host.tls or not (acme := host.tls.acme):
        return
    for name in host.tls_names:
        if "." not in name or name.rpartition(".")[2].isdigit():
            yield Problem(
                "tls.acme",
                f"{name} is not a name that an authority certifies: use "
                "certificate and key, or a name in a public domain",
            )
    if host.challenge_port and host.edge and host.has_edge and host.edge.http_port != 80:
        yield Problem(
            "edge.http_port",
            "must be 80: that is where the authority looks for HTTP-01 challenges (RFC 8555, "
            "section 8.3); or use dns-01",
        )
    if acme.ca and not Path(acme.ca).expanduser().is_file():
        yield Problem("tls.acme.ca", f"{acme.ca}: no such file")
    if "acme-staging" in acme.server and not host.tls.ca:
        yield Problem(
            "tls.ca",
            "is missing: nothing trusts the authority's staging roots, so no probe would pass. "
            "Put them in one PEM file and name it (letsencrypt.org/docs/staging-environment)",
        )


_OF_CERTIFICATES = (_ca_file, _certificates, _acme)


# ---- the fleet ----


def _mistyped_groups(fleet: Fleet) -> Findings:
    of_the_file = Path(fleet.source).name.rpartition(".")[0] or Path(fleet.source).name
    for name, host in fleet.hosts.items():
        for group, meant in mistyped(host.groups - {of_the_file}):
            if meant not in host.groups:
                why = f"is in group {group}, which gets nothing; did you mean {meant}?"
                yield [name], Problem("", why, "warning")


def _without_role(fleet: Fleet) -> Findings:
    sources = {
        word for host in fleet.hosts.values() for use in port_plan(host) for word in use.some
    }
    for name, host in fleet.hosts.items():
        if not host.groups & (GROUPS | sources):
            groups = ", ".join(sorted(GROUPS))
            why = f"is in none of the groups {groups}: it gets nothing"
            yield [name], Problem("", why, "warning")


def _sources(fleet: Fleet) -> Findings:
    """Those that are groups have hosts, and these have addresses."""
    groups = sorted({group for host in fleet.hosts.values() for group in host.groups})
    for name, host in fleet.hosts.items():
        for use in port_plan(host):
            for source in use.some:
                if "/" in source:
                    continue
                key = _sources_key(use.setting)
                hosts = fleet.group(source)
                if source in fleet.hosts:
                    own = ", ".join(fleet[source].addresses) or "its address"
                    why = f"{source} is a host: write {own}, or a group that it is in"
                    yield [name], Problem(key, why)
                elif not hosts:
                    why = f"{source!r} is no group of the inventory ({', '.join(groups)})"
                    yield [name], Problem(key, why)
                for other, its in hosts.items():
                    if not its.addresses and its.has_release:
                        why = f"is missing: {key} of {name} lets in the hosts of group {source}"
                        yield [other], Problem("address", why)


def _certificate_files(fleet: Fleet) -> Findings:
    for host_name, host in fleet.hosts.items():
        if not (tls := host.tls) or tls.acme:
            continue
        for name in host.tls_names:
            file, key = tls.files(host_name, name)
            try:
                leaf = read_pair(file, key, name).leaf
            except CertificateError as error:
                yield [host_name], Problem("tls", str(error))
                continue
            if why := lifetime_refused(leaf, private=bool(tls.ca)):
                yield [host_name], Problem("tls", f"certificate {file} {why}")
            for why in apple_refuses(leaf):
                yield (
                    [host_name],
                    Problem(
                        "tls", f"certificate {file}: iPhones and Macs refuse it: {why}", "warning"
                    ),
                )


def _gate_from(fleet: Fleet) -> Findings:
    for name, host in fleet.hosts.items():
        prober = host.deploy.gate_from
        if prober == name:
            why = f"is {name} itself; it is probed from another host"
        elif prober is not None and prober not in fleet.hosts:
            why = f"{prober!r} is not one of the hosts: {', '.join(fleet.hosts)}"
        else:
            continue
        yield [name], Problem("deploy.gate_from", why)


def _same_addresses(fleet: Fleet) -> Findings:
    for key in ("address", "address6", "internal_address"):
        hosts: dict[str, list[str]] = {}
        for name, host in fleet.hosts.items():
            if host.groups & GROUPS and getattr(host, key):
                hosts.setdefault(getattr(host, key), []).append(name)
        for address, names in hosts.items():
            if len(names) > 1:
                yield names, Problem(key, f"{address} is the address of more than one host")


class _Claim(NamedTuple):
    """A setting that has callers come to a host by a name; `firm` where the host itself answers
    there, and not perhaps a proxy of the operator's."""

    key: str
    firm: bool = False
    port: int | None = None


def _claims(host: HostSettings) -> Iterator[tuple[str, _Claim]]:
    yield host.name, _Claim("name", firm=bool(host.turn_pools))
    yield from ((at, _Claim("address")) for at in (host.address, host.address6) if at)
    if livekit := host.sfu:
        at, port = place(livekit.url)
        is_direct = livekit.url.startswith("ws://") and port == livekit.port
        yield at, _Claim("livekit.url", at in host.edge_backends or is_direct, port)
    if (app := host.backend) and app.url:
        at, port = place(app.url)
        yield at, _Claim("app.url", at in host.edge_backends, port)


def _names(fleet: Fleet) -> Findings:
    """One name for different hosts: DNS leads callers to one of them."""
    claims: dict[str, dict[str, list[_Claim]]] = {}
    for name, host in fleet.hosts.items():
        for at, claim in _claims(host) if host.groups & {"livekit", "turn", "app"} else ():
            at = str(android.address(at) or at)
            claims.setdefault(at, {}).setdefault(name, []).append(claim)
    for at, hosts in claims.items():
        for one, other in combinations(hosts, 2):
            pairs = [p for p in product(hosts[one], hosts[other]) if _contradict(*p)]
            # Nodes of a cluster share their URL, and hosts of an app theirs; TURN shares no name.
            shared = {(a.key, a.port) for a in hosts[one]} & {(b.key, b.port) for b in hosts[other]}
            if any(port for _, port in shared):
                pairs = [(a, b) for a, b in pairs if _of_turn(a) or _of_turn(b)]
            if pairs:
                a, b = pairs[0]
                why = (
                    f"{at} is {a.key} of {one} and {b.key} of {other}, and a name leads to one "
                    "host: give each a name of its own"
                )
                key = min((not _of_turn(c), c.port is None, c.key) for c in (a, b))[-1]
                yield [one, other], Problem(key, why)


def _of_turn(claim: _Claim) -> bool:
    return claim.firm and claim.key == "name"


def _contradict(a: _Claim, b: _Claim) -> bool:
    is_one_port = a.port == b.port or None in (a.port, b.port)
    return (a.firm and b.firm) or _of_turn(a) or _of_turn(b) or ((a.firm or b.firm) and is_one_port)


def _clusters(fleet: Fleet) -> Findings:
    """SFUs behind one URL: a room is on one node, and Redis says on which."""
    nodes: dict[tuple[str, int], dict[str, LiveKit]] = {}
    for name, host in fleet.group("livekit").items():
        if host.livekit:
            nodes.setdefault(place(host.livekit.url), {})[name] = host.livekit
    for (at, _), cluster in nodes.items():
        redis = [livekit.redis for livekit in cluster.values()]
        known = [(each.address, each.db) for each in redis if each]
        if len(cluster) == 1:
            continue
        if len(known) < len(redis):
            wrong = "is missing"
        elif any(_is_loopback(address) for address, _ in known):
            wrong = "is one of each host's own (a loopback address or a socket)"
        elif not _all_same([*known]):
            wrong = "differs in address or db"
        else:
            continue
        why = (
            f"{wrong}: {at} leads the callers of one room to any of these SFUs, and they would not "
            "meet. Give all the same Redis, or each a livekit.url of its own"
        )
        yield list(cluster), Problem("livekit.redis", why)


def _is_loopback(address: str) -> bool:
    """Whether HOST:PORT or a socket's path leads to the host itself: loopback, or a name for it of
    RFC 6761 or of Debian's /etc/hosts."""
    if address.startswith("/"):
        return True
    name, _ = split_endpoint(address)
    if ip := android.address(name):
        return ip.is_loopback or ip.is_unspecified
    names = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
    return name in names or name.endswith(".localhost")


_OF_HOSTS = (
    *(_mistyped_groups, _without_role, _sources, _certificate_files, _gate_from, _same_addresses),
    *(_names, _clusters),
)


def _pools(fleet: Fleet) -> Findings:
    for name in sorted({name for host in fleet.hosts.values() for name in host.turn.pools}):
        hosts = fleet.pool(name)
        pools = [host.turn.pools[name] for host in hosts.values()]
        if not hosts:
            yield [], Problem(f"turn.pools.{name}", "no host of group turn has it in its pools")
        elif not _all_same([(pool.realm, pool.secrets, pool.users) for pool in pools]):
            why = (
                "realm, secrets or users differ between its hosts; callers are sent to any of "
                "them: set them once for the group"
            )
            yield list(hosts), Problem(f"turn.pools.{name}", why)
        if not fleet.group("livekit"):
            why = (
                'is "sfu", and no host is in group livekit, so it would relay to nobody: put the '
                'SFU there, name its address in allowed_peers, or write "internet"'
            )
            sfu_only = [pool.peers == "sfu" and not pool.allowed_peers for pool in pools]
            if alone := [*compress(hosts, sfu_only)]:
                yield alone, Problem(f"turn.pools.{name}.peers", why)


def _all_same(values: list[object]) -> bool:
    return all(value == values[0] for value in values)


# Where LiveKit reads the secret of its TURN pool (tasks/livekit.py).
_SECRET_FILE = "rtc.turn_servers[].secret_file"


def _pools_of_livekit(fleet: Fleet) -> Findings:
    declared = {name for host in fleet.hosts.values() for name in host.turn.pools}
    for name, host in fleet.hosts.items():
        if not (livekit := host.sfu) or livekit.turn_pool is None:
            continue
        pool = livekit.turn_pool
        if pool not in declared:
            why = f"{pool!r} is not one of turn.pools"
            yield [name], Problem("livekit.turn_pool", why)
        elif not livekit_keys.known(_SECRET_FILE, livekit.version) and any(
            turn.turn_pools[pool].secrets for turn in fleet.pool(pool).values()
        ):
            why = (
                f"{livekit.version} does not know {_SECRET_FILE}, which it would read the secret "
                f"of pool {pool} from: set {livekit_keys.SINCE[_SECRET_FILE]} or later"
            )
            yield [name], Problem("livekit.version", why)


def _livekit_keys(fleet: Fleet) -> Findings:
    hosts = [host for host in fleet.hosts.values() if host.groups & {"livekit", "app"}]
    if not _all_same([list(host.livekit.keys.items()) for host in hosts if host.livekit]):
        why = "differ between hosts; the app's tokens would be refused with 401: set them once"
        yield [], Problem("livekit.keys", why)


_OF_POOLS = (_pools, _pools_of_livekit, _livekit_keys)


def _generated(fleet: Fleet) -> dict[str, list[str]]:
    """The places of every secret that lets somebody in to what callready installs."""
    places: dict[str, set[str]] = {}
    for field in chain.from_iterable(map(secret_fields, fleet.hosts.values())):
        for path, secret in field.items():
            if not field.origin.by_hand:
                places.setdefault(secret.get_secret_value(), set()).add(path)
    return {value: sorted(paths) for value, paths in places.items()}


def _same_secrets(fleet: Fleet) -> Findings:
    """The same secret at two places opens both with one leak."""
    for first, *others in _generated(fleet).values():
        if others:
            why = f"is the same secret as {', '.join(others)}: use different ones"
            yield [], Problem(first, why)


# Base64, in both alphabets, and more that means nothing to dotenv, systemd and sh.
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+=@%-]+")
_NOT_PLAIN = (
    "holds other characters than letters, digits and _.:/+=@%-, which the readers of the app's "
    ".env take differently"
)


def _secrets_of_env(fleet: Fleet) -> Findings:
    """In the app's .env they stand without quotes, about which its readers differ
    (tasks/app_env.py)."""
    livekits = [host.livekit for host in fleet.group("app").values() if host.livekit]
    pools = (f"turn.pools.{livekit.turn_pool}.secrets." for livekit in livekits)
    in_env = ("livekit.keys.", "app.api_token.", *pools) if livekits else ()
    for value, paths in _generated(fleet).items():
        if not _PLAIN.fullmatch(value):
            why = f"{_NOT_PLAIN}: generate one with make secrets ENV=…"
            yield from (([], Problem(at, why)) for at in paths if at.startswith(in_env))
    for key in dict.fromkeys(key for livekit in livekits for key in livekit.keys):
        if not _PLAIN.fullmatch(key):
            yield [], Problem("livekit.keys", f"{key!r} {_NOT_PLAIN}: give the key another name")


def _pins(fleet: Fleet) -> Findings:
    """Pins of release builds against the certificate files that are about to be served."""
    files = {
        name: (host.tls.files(host_name, name)[0], host.tls.ca)
        for host_name, host in fleet.hosts.items()
        for name in host.edge_backends
        if host.tls and not host.tls.acme
    }
    for host_name, host in fleet.group("android").items():
        for name, (path, ca) in files.items():
            if not host.android or not pins.is_pinned(host.android, name):
                continue
            try:
                keys, complete = pins.chain_pins(Path(path).expanduser().read_bytes(), ca)
            except (OSError, ValueError):
                continue  # said already
            if why := pins.mismatch(host.android, name, keys):
                why += f": {path} needs a pinned key, or the app a release with a new pin"
                # Without the root a pin may be the root's.
                level: Level = "error" if complete else "warning"
                yield [host_name], Problem("android.domains", why, level)


_OF_SECRETS = (_same_secrets, _secrets_of_env, _pins)
