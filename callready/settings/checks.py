"""Rules that need more than one host, and all that is wrong with a fleet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, combinations, compress, product
from pathlib import Path
from typing import NamedTuple, get_args

from callready.settings import android, host_checks, livekit_keys, pins
from callready.settings.certificates import (
    CertificateError,
    apple_refuses,
    lifetime_refused,
    read_pair,
)
from callready.settings.fields import secret_fields
from callready.settings.fleet import Fleet
from callready.settings.inventory import GROUPS, mistyped
from callready.settings.models import ROLES, HostSettings
from callready.settings.pools import MOST_HOSTS, MOST_URIS, Teller, handed_out
from callready.settings.ports import overlaps, port_plan
from callready.settings.problem import Findings, Level, Problem
from callready.settings.redis import USERS
from callready.settings.uris import place


def check(fleet: Fleet) -> Findings:
    """Everything that is wrong with a fleet whose hosts are valid one by one."""
    for name, host in fleet.hosts.items():
        for rule in host_checks.RULES:
            yield from (([name], problem) for problem in rule(host))
        for key, message in overlaps(port_plan(host)):
            yield [name], Problem(key, message)
    for rule_of_fleet in (*_OF_HOSTS, *_OF_POOLS, *_OF_SECRETS):
        yield from rule_of_fleet(fleet)


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
                if "/" in source or use.setting == "edge.peers_port":
                    continue
                if use.role in ("monitor", "redis") and source in ROLES:
                    continue
                key = host_checks.sources_key(use.setting)
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
    if monitor := host.watches:
        at, port = place(monitor.url)
        yield at, _Claim("monitor.url", True, port)


def _names(fleet: Fleet) -> Findings:
    """One name for different hosts: DNS leads callers to one of them."""
    claims: dict[str, dict[str, list[_Claim]]] = {}
    for name, host in fleet.hosts.items():
        for at, claim in _claims(host) if host.groups & ROLES else ():
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


def _monitor(fleet: Fleet) -> Findings:
    """One host watches all of them."""
    watched = [name for name, host in fleet.hosts.items() if host.watched]
    watching = list(fleet.group("monitor"))
    if watched and not watching:
        why = "is set, and no host is in group monitor: put one into it, or take monitor out"
        yield watched, Problem("monitor", why)
    if len(watching) > 1:
        why = "are in group monitor, and one host watches all: take the others out"
        yield watching, Problem("", why)
    if watching and "monitor" in fleet.hosts.keys() - set(watching):
        why = "its certificate would open every host's metrics as the monitor's does: rename it"
        yield ["monitor"], Problem("", why)
    dark = [name for name, host in fleet.hosts.items() if host.groups & ROLES and not host.monitor]
    if watching and dark:
        why = f"is missing: {', '.join(watching)} watches every host; set it once for all"
        yield dark, Problem("monitor", why)
    inside = any(host.internal_address for host in fleet.group("monitor").values())
    for name, host in fleet.hosts.items():
        asked = host.address or host.address6 or (inside and host.internal_address)
        if host.watched and watching and not asked:
            why = "is missing: by it the monitor asks for metrics; or give both an internal_address"
            yield [name], Problem("address", why)
    settings = [host.monitor for host in fleet.hosts.values() if host.watched]
    authorities = [host.fleet_ca for host in fleet.hosts.values() if host.watched]
    if not _all_same([*settings]) or not _all_same([*authorities]):
        why = "differs between hosts: set monitor and fleet_ca once for all"
        yield watched, Problem("monitor", why)


def _redis(fleet: Fleet) -> Findings:
    """One host has what SFUs and recorders share, and those who use it reach it."""
    servers = fleet.group("redis")
    having = [name for name, host in fleet.hosts.items() if host.redis]
    if having and not servers:
        why = "is set, and no host is in group redis: put one into it, or take redis out"
        yield having, Problem("redis", why)
    if len(servers) > 1:
        why = "are in group redis, and all SFUs share one: take the others out"
        yield list(servers), Problem("", why)
    for name, server in servers.items():
        if server.redis and fleet.group("egress") and not server.redis.egress_password:
            why = 'is missing: hosts of group egress use it; write "secret:redis/egress"'
            yield [name], Problem("redis.egress_password", why)
    other = [name for name, host in fleet.hosts.items() if host.sfu and host.sfu.redis]
    users = {name: fleet[name] for group in USERS for name in fleet.group(group)}
    users = {name: host for name, host in users.items() if name not in other}
    if len(servers) != 1 or not next(iter(servers.values())).redis:
        return
    ((where, server),) = servers.items()
    if not users:
        why = "nobody uses it: no host is in group livekit, or livekit.redis is another one"
        yield [where], Problem("redis", why, "warning")
    if not server.redis_clients:
        return
    both = {where: server, **users}
    for name, host in both.items():
        if not host.addresses:
            why = f"is missing: the Redis of {where} and those who use it know each other by it"
            yield [name], Problem("address", why)
        if not host.fleet_ca:
            why = (
                f"is missing: SFUs know the Redis of {where} by it, over TLS; write "
                '"secret:fleet/ca" once for all hosts'
            )
            yield [name], Problem("fleet_ca", why)
    if not _all_same([host.fleet_ca for host in both.values() if host.fleet_ca]):
        why = f"differs: the Redis of {where} and those who use it have one in common; set it once"
        yield list(both), Problem("fleet_ca", why)


def _egress(fleet: Fleet) -> Findings:
    """Recorders and SFUs meet in one Redis."""
    recording = fleet.group("egress")
    having = [name for name, host in fleet.hosts.items() if host.egress]
    if having and not recording:
        why = "is set, and no host is in group egress: put one into it, or take egress out"
        yield having, Problem("egress", why)
    without = [
        *(name for name in recording if not fleet.redis_for(name, "egress")),
        *(name for name in fleet.group("livekit") if not fleet.redis_for(name, "livekit")),
    ]
    for name in recording:
        redis = fleet.redis_for(name, "egress")
        if redis and redis.address.startswith("/"):
            why = f"{redis.address} is a socket, which egress' container has not: use HOST:PORT"
            yield [name], Problem("livekit.redis.address", why)
        is_sentinels = redis and redis.own and redis.own.sentinel_addresses
        if is_sentinels and (egress := fleet[name].egress) and not egress.allowed_networks:
            why = (
                "is missing: where Redis is, egress learns from Sentinel (livekit.redis), and its "
                "packet filter lets it reach what is named only; name the hosts of Redis"
            )
            yield [name], Problem("egress.allowed_networks", why)
    if recording and without:
        why = (
            "is missing: by it LiveKit and egress find each other; put a host into group redis "
            "(docs/recording.md), or name a Redis of your own in livekit.redis"
        )
        yield without, Problem("redis", why)


def _clusters(fleet: Fleet) -> Findings:
    """SFUs behind one URL: a room is on one node, and Redis says on which."""
    nodes: dict[tuple[str, int], list[str]] = {}
    for name, host in fleet.group("livekit").items():
        if host.livekit:
            nodes.setdefault(place(host.livekit.url), []).append(name)
    for (at, _), cluster in nodes.items():
        known = [each for name in cluster if (each := fleet.redis_for(name, "livekit"))]
        if len(cluster) == 1:
            continue
        if len(known) < len(cluster):
            wrong = "is missing"
        elif any(each.is_local for each in known):
            wrong = "is one of each host's own (a loopback address or a socket)"
        elif not _all_same([each.place for each in known]):
            wrong = "differs in address or db"
        else:
            continue
        why = (
            f"{wrong}: {at} leads the callers of one room to any of these SFUs, and they would not "
            "meet. Give all the same Redis, or each a livekit.url of its own"
        )
        yield cluster, Problem("livekit.redis", why)


def _versions(fleet: Fleet) -> Findings:
    """Nodes of a cluster understand each other from one minor version to the next."""
    for cluster in _nodes(fleet):
        versions = {name: host.livekit.version for name in cluster if (host := fleet[name]).livekit}
        old, new = (each(versions.values(), key=livekit_keys.number) for each in (min, max))
        if livekit_keys.far_apart(old, new):
            why = (
                f"is {old} on one of these SFUs and {new} on another, and they share a Redis: they "
                "understand each other one minor version apart at most"
            )
            yield cluster, Problem("livekit.version", why)


def _nodes(fleet: Fleet) -> list[list[str]]:
    """The SFUs of each Redis that more than one of them has."""
    clusters = [sorted((name, *fleet.cluster(name))) for name in fleet.group("livekit")]
    return [list(each) for each in dict.fromkeys(map(tuple, clusters)) if len(each) > 1]


def _peers(fleet: Fleet) -> Findings:
    """Edges of one name know each other, and can all have its certificate."""
    for name, host in fleet.hosts.items():
        if host.peers and not host.fleet_ca:
            why = (
                f"is missing: edges of {place(host.livekit.url)[0] if host.livekit else ''} hand "
                'callers to each other by it; write "secret:fleet/ca" once for all hosts'
            )
            yield [name], Problem("fleet_ca", why)
        cluster = sorted((name, *host.peers))
        if not _all_same([ca for each in cluster if (ca := fleet[each].fleet_ca)]):
            why = "differs, and by it the edges of these hosts know each other: set it once"
            yield cluster, Problem("fleet_ca", why)
    serving: dict[str, list[str]] = {}
    for name, host in fleet.hosts.items():
        for each in host.tls_names if host.challenge_port else ():
            serving.setdefault(each, []).append(name)
    for at, hosts in serving.items():
        if len(hosts) > 1:
            why = (
                f"http-01 cannot prove {at} to the authority, which asks any one of these hosts, "
                "also for the certificate of another: use dns-01 (docs/certificates.md#dns-01), or "
                "certificate and key"
            )
            yield hosts, Problem("tls.acme.challenge", why)


_OF_HOSTS = (
    *(_mistyped_groups, _without_role, _sources, _certificate_files, _gate_from, _same_addresses),
    *(_names, _monitor, _redis, _egress, _clusters, _versions, _peers),
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


def _handed_out(fleet: Fleet) -> Findings:
    """What callers are told of: not too much, and of every pool somebody, and all who are there for
    it."""
    told: dict[str | None, list[HostSettings]] = {}
    for group in get_args(Teller):
        for name, host in fleet.group(group).items():
            if not (livekit := host.livekit):
                continue
            found = handed_out(fleet, name, group)
            told.setdefault(livekit.turn_pool, []).extend(each for each, _ in found)
            room, own = MOST_URIS - len(found), len(livekit.rtc.stun_servers)
            if group == "livekit" and own > room:
                why = (
                    f"{own} and the {len(found)} URIs of TURN, which is STUN too, are more than "
                    f"the {MOST_URIS} that a caller may be told of: clients ask each, and five "
                    f"make them slow; leave {room or 'none'}"
                )
                yield [name], Problem("livekit.rtc.stun_servers", why)
    for pool, hosts_told in told.items():
        hosts = fleet.pool(pool)
        ready = [name for name, host in hosts.items() if host.hand_out]
        if hosts and not ready:
            why = (
                f"is False on every host of pool {pool}, and callers would be told of none: leave "
                "one, or name another pool in livekit.turn_pool"
            )
            yield list(hosts), Problem("hand_out", why)
        if idle := [name for name in ready if not any(each is hosts[name] for each in hosts_told)]:
            why = (
                f"no caller is told of it: an SFU names {MOST_HOSTS} hosts of pool {pool}, of its "
                "region first, and there are too few SFUs for all: leave it out, or add an SFU"
            )
            yield idle, Problem("pools", why, "warning")


def _livekit_keys(fleet: Fleet) -> Findings:
    hosts = [host for host in fleet.hosts.values() if host.groups & {"livekit", "app"}]
    if not _all_same([list(host.livekit.keys.items()) for host in hosts if host.livekit]):
        why = "differ between hosts; the app's tokens would be refused with 401: set them once"
        yield [], Problem("livekit.keys", why)


_OF_POOLS = (_pools, _pools_of_livekit, _handed_out, _livekit_keys)


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
