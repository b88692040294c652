"""What is found on a host and makes a deploy refuse before anything is changed."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from ipaddress import ip_address
from typing import get_args

from callready.probes import ProbeError, names
from callready.release import caa
from callready.release.declaration import ROOT, Release
from callready.release.facts import Facts, FileFact, Listener
from callready.release.manifest import FORMAT, Manifest
from callready.release.node import Node
from callready.release.plan import RULES, plan
from callready.settings import livekit_keys
from callready.settings.dns_providers import PROVIDERS, of_release, plugin_package
from callready.settings.models import HostSettings
from callready.settings.pools import Teller, handed_out
from callready.settings.ports import LIVEKIT, overlaps, parse_port

CLUSTER_SKEW = 0.2
"""Seconds that clocks of SFUs may be apart: of 0.5 s on each message between them is late
(livekit's psrpc has it expire by the clock)."""

SUPPORTED = {("debian", "12"), ("debian", "13")}
ARCHITECTURES = {"amd64", "arm64"}
MENDS = {
    "folder": "callready puts a file there; move it away (Docker makes a folder of what it is told "
    "to mount and does not find)",
    "special": "callready puts a file there; move it away",
    "mounted": "a file cannot be put in its place; unmount it (findmnt)",
    "fixed": "make it writable (lsattr -d, chattr -i; findmnt -T)",
    "missing": "create it first",
    "link": "make it a plain file",
    "unclosed": "close it, or its readers take the keys for a part of that value",
}
DISABLE = {"ufw": "ufw disable", "firewalld": "systemctl disable --now firewalld"}


def of(node: Node, facts: Facts) -> Iterator[str]:
    """Every reason not to deploy this host, each with what to do."""
    if (facts.os, facts.os_version) not in SUPPORTED or facts.arch not in ARCHITECTURES:
        yield (
            f"runs {facts.os} {facts.os_version} on {facts.arch}; supported are Debian 12 and 13 "
            "on amd64 and arm64"
        )
        return
    limit = node.settings.host.max_clock_skew
    if abs(facts.skew) > limit:
        side = "ahead of" if facts.skew > 0 else "behind"
        yield (
            f"its clock is {abs(facts.skew):.0f} s {side} this machine's (limit {limit:.0f} s, "
            "host.max_clock_skew): TURN credentials carry an expiry time; check timedatectl on both"
        )
    for name in sorted(facts.firewalls) if RULES in node.release.files else ():
        yield (
            f"{name} is active and would drop what callready opens: disable it "
            f"({DISABLE[name]}) or set firewall.enabled to False"
        )
    nat = sorted(facts.nat_tables - {"inet callready"})
    if node.settings.firewall.notrack and nat:
        yield (
            f"firewall.notrack would break the NAT of {', '.join(nat)}: "
            "replies to untracked source ports are lost; leave it off"
        )
    yield from of_addresses(node.settings, facts)
    yield from in_the_way(node.release, facts)
    yield from _versions(node, facts)
    yield from _taken_ports(node, facts)
    yield from _recording(node.settings, facts)
    yield from _app(node, facts)
    yield from _challenges(node, facts)
    for key, message in overlaps(node.ports):
        yield f"{key}: {message}"


def of_cluster(found: Mapping[str, tuple[Node, Facts]]) -> Iterator[tuple[str, str]]:
    """Why SFUs that share a Redis would not understand each other, each with its host: what is
    running while they change one after the other, and clocks, as far as that is certain."""
    for name, (node, facts) in found.items():
        peers = {each: found[each] for each in node.fleet.cluster(name) if each in found}
        running = _livekit_version(facts)
        for peer, (other, its) in peers.items():
            wanted = other.settings.sfu.version if other.settings.sfu else running
            if running and running != wanted and livekit_keys.far_apart(running, wanted):
                if _livekit_version(its) == wanted:
                    continue  # this deploy mends it
                yield (
                    name,
                    f"it runs LiveKit {running}, and {peer} would get {wanted}: while SFUs that "
                    "share a Redis change they understand each other one minor version apart at "
                    "most; deploy the versions in between first (livekit.version)",
                )
                break
        ahead = {peer: _certainly_ahead(facts, its) for peer, (_, its) in peers.items()}
        peer = max(ahead, key=lambda each: ahead[each], default="")
        if peer and ahead[peer] > CLUSTER_SKEW:
            yield (
                name,
                f"its clock is {ahead[peer]:.1f} s or more ahead of that of {peer} (limit "
                f"{CLUSTER_SKEW} s): SFUs that share a Redis tell by their clocks what is too late "
                "and who is gone, so joins fail; have both ask time servers (timedatectl)",
            )


def _certainly_ahead(one: Facts, other: Facts) -> float:
    """By how many seconds one clock is ahead of another at least."""
    return one.skew - other.skew - one.skew_error - other.skew_error


def _livekit_version(facts: Facts) -> str:
    """That of the livekit-server which runs; empty if none does, or it is not callready's."""
    unit = facts.units.get(LIVEKIT)
    match = re.match(r"/opt/livekit/(\d+\.\d+\.[^/]+)/", unit.binary) if unit else None
    return match[1] if match else ""


def of_addresses(host: HostSettings, facts: Facts) -> Iterator[str]:
    """Addresses that the host has not, or has otherwise: what listens there would not start, and
    callers be told of what leads nowhere. IPv6 may come late, and is taken up when it does."""
    has = facts.addresses
    if not host.is_server or not has:
        return
    others = sorted(
        a for a in has if not ip_address(a).is_loopback and not ip_address(a).is_link_local
    )
    shown = f"on none of its interfaces, which have {', '.join(others) or 'none'}"
    if host.private_address and host.address in has:
        yield (
            f"private_address: {host.address} (address) is on an interface of the host, so there "
            "is no 1:1 NAT: leave private_address out; an address on an internal network is "
            "internal_address"
        )
    elif host.private_address and host.private_address not in has:
        yield f"private_address: {host.private_address} is {shown}"
    elif host.local_address and host.local_address not in has:
        yield (
            f"address: {host.address} is {shown}: if the provider's network leads it to one of "
            "these (1:1 NAT), set private_address to that"
        )
    if host.internal_address and host.internal_address not in has:
        yield f"internal_address: {host.internal_address} is {shown}"


def in_the_way(release: Release, facts: Facts) -> Iterator[str]:
    """What keeps a file of callready from being put where it has to be."""
    wanted = dict(release.links)
    wanted |= {path: f"{ROOT}/current/files{path}" for path in release.files}
    steps = plan(release, facts).steps
    written = {
        each.arguments[0] for each in steps if each.function in ("write_environment", "write_rows")
    }
    for path, (kind, words) in sorted(facts.obstacles.items()):
        if path in wanted:
            matters = facts.files.get(path, FileFact()).link != wanted[path]
        elif path in release.environments or path in release.databases:
            matters = path in written or kind in ("link", "unclosed")
        else:
            matters = bool(steps)
        if matters:
            more = ", or name another file (app.env_file)" if path in release.environments else ""
            yield f"{path} {words}: {MENDS[kind]}{more}"


def of_format(format: int) -> Iterator[str]:
    """Why this callready must not touch a host: what is on it was written by a newer one."""
    if format > FORMAT:
        yield (
            f"a newer callready has deployed this host (format {format}, this one knows {FORMAT}): "
            "upgrade callready here first"
        )


def of_rollback(node: Node, manifest: Manifest) -> Iterator[str]:
    """Why an earlier release would not work any more: its secret may have been rotated away since,
    and secrets do not roll back."""
    pool = node.settings.livekit.turn_pool if node.settings.livekit else None
    accepted = {
        sha256(secret.get_secret_value().encode()).hexdigest()
        for turn in (node.fleet.pool(pool).values() if pool else ())
        for secret in turn.turn_pools[pool or ""].secrets
    }
    minted = manifest.files.get("/etc/livekit/turn_secret")
    if minted and minted.sha256 not in accepted:
        yield (
            "the release before this one mints TURN credentials with a secret that no coturn "
            "accepts any more: change the inventory and deploy instead"
        )


def of_removal(node: Node, removed: Collection[str]) -> Iterator[str]:
    """Why callers still need a host that is about to be cleaned, beside others that are: they are
    told of it, and might be told of another one."""
    fleet, own = node.fleet, node.settings
    hosts = [host for name in own.turn_pools for host in fleet.pool(name).values()]
    others = any(host.hand_out for host in hosts if host is not own)
    tellers = [
        name
        for group in get_args(Teller)
        for name in fleet.group(group)
        if name not in removed and any(host is own for host, _ in handed_out(fleet, name, group))
    ]
    if tellers and others:
        yield (
            f"{', '.join(dict.fromkeys(tellers))} would go on sending callers here: set hand_out = "
            "False for this host, deploy, and remove it when its calls have ended"
        )


def _versions(node: Node, facts: Facts) -> Iterator[str]:
    for name, wanted in node.release.packages.items():
        installed = facts.packages.get(name, "")
        version = installed or facts.candidates.get(name, "")
        # An empty candidate means package lists were never fetched; apply.sh looks again.
        if wanted and version not in ("", "(none)") and not is_version(version, wanted):
            what = "has" if installed else "would install"
            yield (
                f"{what} {name} {version}, the inventory says {wanted}: set turn.version to what "
                "the host has (the keys are then checked for that version)"
            )


def is_version(package_version: str, upstream: str) -> bool:
    """Whether a Debian version is of the upstream version: `4.6.1-1+b2` is of `4.6.1`."""
    version = package_version.rpartition(":")[2]
    return version == upstream or (version.startswith(upstream) and version[len(upstream)] in "-+~")


def _taken_ports(node: Node, facts: Facts) -> Iterator[str]:
    ours = set(facts.manifest.units)
    ours |= set(node.release.timers.values())  # certbot, while it renews
    # A unit of the same name by hand is taken over; a package's own is in use for something else.
    packaged = {f"{name}.service" for name in node.release.packages}
    ours |= {u for u in node.release.services if _unit_file(u) in node.release.files} - packaged
    others = [parse_port(value) for value in node.settings.host.other_listeners]
    taken: dict[tuple[str, int], str] = {}
    for item in facts.listeners:
        is_ssh = item.proto == "tcp" and item.port in facts.ssh_ports  # systemd may hold it
        is_known = any(p == item.proto and a <= item.port <= b for p, a, b in others)
        if item.unit in ours or is_ssh or is_known:
            continue
        if why := _conflict(node, item):
            taken.setdefault((item.proto, item.port), why)
    yield from taken.values()


def _conflict(node: Node, item: Listener) -> str | None:
    """Why what listens cannot stay, or None."""
    for use in node.ports:
        # What is for this host alone listens on this one address.
        meets = use.audience == "this host" and item.address == "127.0.0.1"
        if item.is_loopback and not meets:
            continue
        if use.proto == item.proto and item.port in use and use.role != "extra":
            who = item.process if item.unit == "-" else f"{item.process} ({item.unit})"
            what = "program (a container?)"
            if who == "-":
                who, what = "the kernel", "interface (WireGuard?)"
            return (
                f"port {item.port}/{item.proto} is taken by {who}, {use.service} needs it for "
                f"{use.purpose}: stop that {what} or change {use.setting}"
            )
    if item.unit in node.release.services and not item.is_loopback:
        return (
            f"{item.unit} is in use for port {item.port}/{item.proto}, and its configuration would "
            "be replaced: move that elsewhere, or leave edge out"
        )
    if item.unit in node.release.masks:
        why = "it runs its own: have what asks it ask the monitor (docs/watching.md)"
        if item.unit == "coturn.service":
            why = (
                "Debian's package starts an open relay: make a pool of what it serves (turn.pools)"
            )
        return (
            f"{item.unit} is in use for port {item.port}/{item.proto}, and callready masks it, "
            f"because {why}, then stop it (systemctl disable --now {item.unit})"
        )
    return None


def _unit_file(unit: str) -> str:
    return "/etc/systemd/system/" + re.sub("@.*[.]", "@.", unit)


def _recording(host: HostSettings, facts: Facts) -> Iterator[str]:
    """What would start and take no recording, or not start."""
    if not (egress := host.records) or not facts.cores or egress.fitting(facts.cores):
        return
    kind, cost = min(egress.costs(facts.cores).items(), key=lambda item: item[1])
    yield (
        f"it has {facts.cores} cores, and the cheapest recording, {kind}, takes {cost:g} "
        "(egress.cpu_cost): lower that, or record on a larger host"
    )


def _app(node: Node, facts: Facts) -> Iterator[str]:
    """What the application's developer has to have installed before."""
    until = "first, or take the host out of group app until then"
    for env in node.release.environments.values():
        if env.owner not in facts.users | set(node.release.users):
            yield f"user {env.owner} (app.owner) does not exist on this host: create it {until}"
        for unit in env.units:
            fact = facts.units.get(unit)
            if fact and fact.load != "loaded" and unit not in node.release.services:
                yield (
                    f"unit {unit} (app.restart) cannot be restarted on this host, systemctl says "
                    f"{fact.load}: install it {until}"
                )


def _challenges(node: Node, facts: Facts) -> Iterator[str]:
    """What would make the authority refuse, before it is asked: it counts failures."""
    settings, unissued = node.settings, node.release.unissued(facts)
    dns = settings.tls.acme.dns if settings.tls and settings.tls.acme else None
    if dns and settings.tls_names and facts.os_version not in PROVIDERS[dns.provider].debian:
        yield (
            f"tls.acme.dns: Debian {facts.os_version} has no {plugin_package(dns.provider)}; its "
            f"plugins are for {of_release(facts.os_version)}: move the zone, or use challenge "
            "http-01 for this host, or certificate and key"
        )
    if settings.tls and settings.tls.acme:
        for certificate in unissued:
            server = settings.deploy.resolver
            resolver = names.resolver(server) if server else None
            if why := caa.forbids(certificate.name, settings.tls.acme, resolver):
                yield f"tls.acme: {why}"
    if not settings.challenge_port or not unissued:
        return
    own = [a for a in (settings.address, settings.address6) if a]
    for certificate in unissued:
        try:
            addresses = names.addresses(certificate.name, settings.deploy.resolver)
        except ProbeError as error:
            yield f"tls.acme: {error}"
            continue
        if not addresses or not addresses <= set(own):
            shown = ", ".join(sorted(addresses)) or "nothing"
            yield (
                f"tls.acme: {certificate.name} resolves to {shown}, this host is "
                f"{' and '.join(own)}: the authority would ask another host; mend its A and AAAA "
                "records, or, if the authority is told something else than this machine (split "
                "horizon), name a server that says what it is told in deploy.resolver"
            )
    if "inet callready" in facts.tables:
        return  # our own filter may be one of before, which had no port 80 to open
    for address in own:
        try:
            socket.create_connection((address, 80), timeout=3).close()
        except TimeoutError:
            yield (
                f"tls.acme: port 80 of {address} is dropped on the way there: open it in the "
                "provider's firewall (the authority asks there), or use challenge dns-01"
            )
        except OSError:
            continue  # nothing listens yet, or this machine has no such address family
