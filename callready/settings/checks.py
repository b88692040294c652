"""Rules that need more than one section or more than one host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from callready.settings import android, coturn_keys, livekit_keys, pins
from callready.settings.certificates import CertificateError, read_pair
from callready.settings.fleet import Fleet
from callready.settings.models import HostSettings
from callready.settings.ports import overlaps, port_plan
from callready.settings.problem import Problem
from callready.settings.uris import place

Finding = tuple[list[str], Problem]

# The groups that get something; others are the operator's own.
GROUPS = frozenset({"livekit", "turn", "app", "android"})

# Where LiveKit reads the secret of its TURN pool (tasks/livekit.py).
_SECRET_FILE = "rtc.turn_servers[].secret_file"

_NO_NAME = (
    "is an address, which clients do not send in the TLS handshake (RFC 6066, section 3), and the "
    "edge chooses the certificate by what they send: use a host name"
)

# Base64, in both alphabets, and more that means nothing to dotenv, systemd and sh.
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+=@%-]+")
_NOT_PLAIN = (
    "holds other characters than letters, digits and _.:/+=@%-, which the readers of the app's "
    ".env take differently: generate one with make secrets ENV=…"
)

# Private (RFC 1918, 6598, 4193), loopback, link-local, multicast, reserved: nobody outside reaches
# these. Documentation addresses are left out: the lab has them.
_UNREACHABLE = [
    ipaddress.ip_network(net)
    for net in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "::ffff:0:0/96",
        "fc00::/7",
        "fe80::/10",
        "ff00::/8",
    )
]


def check(fleet: Fleet) -> Iterator[Finding]:
    """Everything that is wrong with a fleet whose hosts are valid one by one."""
    for name, here in fleet.hosts.items():
        for problem in (
            *_addresses(here),
            *_roles(here),
            *_keys(here),
            *_edge(here),
            *_certificates(here, name),
        ):
            yield [name], problem
        for key, message in overlaps(port_plan(here)):
            yield [name], Problem("error", key, message)
    yield from _gates(fleet)
    yield from _same_addresses(fleet)
    yield from _pools(fleet)
    yield from _secrets(fleet)
    yield from _pins(fleet)
    if not fleet.group("livekit") and not fleet.group("turn"):
        yield [], Problem("error", "", "no host in group livekit or turn: nothing to deploy")


def _error(key: str, message: str) -> Problem:
    return Problem("error", key, message)


def _gates(fleet: Fleet) -> Iterator[Finding]:
    key = "deploy.gate_from"
    for name, here in fleet.hosts.items():
        host = here.deploy.gate_from
        if host == name:
            yield [name], _error(key, f"is {host} itself; it is probed from another host")
        elif host is not None and host not in fleet.hosts:
            yield [name], _error(key, f"{host!r} is not one of the hosts: {', '.join(fleet.hosts)}")


def _same_addresses(fleet: Fleet) -> Iterator[Finding]:
    for key in ("address", "address6"):
        hosts: dict[str, list[str]] = {}
        for name, here in fleet.hosts.items():
            if here.groups & GROUPS and getattr(here, key):
                hosts.setdefault(getattr(here, key), []).append(name)
        for address, names in hosts.items():
            if len(names) > 1:
                yield names, _error(key, f"{address} is the address of more than one host")


def _addresses(here: HostSettings) -> Iterator[Problem]:
    if not here.serves:
        return
    if here.address is None:
        yield _error(
            "address",
            "IPv6-only hosts are not supported, many callers have no IPv6: give the host an IPv4 "
            "address too"
            if here.address6
            else "is missing: the host's public IPv4 address",
        )
    # On a LAN without TLS a private address is what is meant; wss:// is for callers outside.
    elif _unreachable(here.address) and not (here.livekit and here.livekit.url.startswith("ws://")):
        yield _error(
            "address",
            f"{here.address} is not reachable from the Internet: set the public address, and "
            "private_address to the one on the interface",
        )
    if here.address6 and _unreachable(here.address6):
        yield _error("address6", f"{here.address6} is not reachable from the Internet")


def _unreachable(address: str) -> bool:
    return any(ipaddress.ip_address(address) in net for net in _UNREACHABLE)


def _roles(here: HostSettings) -> Iterator[Problem]:
    if not here.groups & GROUPS:
        groups = ", ".join(sorted(GROUPS))
        yield Problem("warning", "", f"is in none of the groups {groups}: it gets nothing")
    if here.is_sfu and here.livekit is None:
        yield _error("livekit", "is missing: the host is in group livekit")
    if "turn" in here.groups and not here.pools:
        yield _error("pools", "is missing: which TURN pools this host of group turn runs")
    if here.pools and "turn" not in here.groups:
        yield _error("pools", "needs the host in group turn")
    for name in here.pools:
        if name not in here.turn.pools:
            known = ", ".join(here.turn.pools) or "none"
            yield _error("pools", f"{name!r} is not one of turn.pools ({known})")
    if "app" in here.groups:
        if here.app is None:
            yield _error("app", "is missing: the host is in group app")
        if here.livekit is None:
            yield _error("livekit", "is missing: the app's .env needs the key and the URL")
    if "android" in here.groups:
        if here.android is None or here.livekit is None:
            missing = "livekit" if here.android else "android"
            yield _error(missing, "is missing: the host is in group android")
            return
        for text in android.problems(here.android, here.livekit.url):
            key, _, message = text.partition(": ")
            yield _error(key, message)
        for text in android.warnings(here.android):
            key, _, message = text.partition(": ")
            yield Problem("warning", key, message)


def _keys(here: HostSettings) -> Iterator[Problem]:
    for name, pool in here.turn_pools.items():
        yield from coturn_keys.check(here.turn.version, pool.extra, f"turn.pools.{name}.extra")
    if here.is_sfu and here.livekit:
        lk = here.livekit
        yield from livekit_keys.check(lk.version, lk.config, "livekit.config")
        if lk.turn_pool is None and not lk.rtc.stun_servers:
            yield _error(
                "livekit.rtc.stun_servers",
                "is empty and there is no turn_pool: LiveKit would send its clients to public "
                "STUN servers; name one",
            )


def _certificates(here: HostSettings, inventory_name: str) -> Iterator[Problem]:
    if here.tls and here.tls.ca and not Path(here.tls.ca).expanduser().is_file():
        yield _error("tls.ca", f"{here.tls.ca}: no such file")
    if here.tls_names and here.tls is None:
        yield _error(
            "tls",
            f"is missing: {', '.join(here.tls_names)} needs certificate and key (without TURN "
            "over TLS, turn.tls = False, callers behind strict firewalls are shut out)",
        )
    elif here.tls and here.tls.acme:
        for name in here.tls_names:
            if "." not in name or name.rpartition(".")[2].isdigit():
                yield _error(
                    "tls.acme",
                    f"{name} is not a name that an authority certifies: use "
                    "certificate and key, or a name in a public domain",
                )
        if here.challenge_port and here.edge and here.has_edge and here.edge.http_port != 80:
            yield _error(
                "edge.http_port",
                "must be 80: that is where the authority looks for HTTP-01 challenges (RFC 8555, "
                "section 8.3); or use dns-01",
            )
        if here.tls.acme.ca and not Path(here.tls.acme.ca).expanduser().is_file():
            yield _error("tls.acme.ca", f"{here.tls.acme.ca}: no such file")
        if "acme-staging" in here.tls.acme.server and not here.tls.ca:
            yield _error(
                "tls.ca",
                "is missing: nothing trusts the authority's staging roots, so no probe would pass. "
                "Put them in one PEM file and name it (letsencrypt.org/docs/staging-environment)",
            )
    elif here.tls:
        for name in here.tls_names:
            try:
                read_pair(*here.tls.files(inventory_name, name), name)
            except CertificateError as error:
                yield _error("tls", str(error))


def _pins(fleet: Fleet) -> Iterator[Finding]:
    """Pins of release builds against the certificate files that are about to be served."""
    files = {
        name: (here.tls.files(host, name)[0], here.tls.ca)
        for host, here in fleet.hosts.items()
        for name in here.edge_backends
        if here.tls and not here.tls.acme
    }
    for host, app in fleet.group("android").items():
        for name, (path, ca) in files.items() if app.android else ():
            if not app.android or not pins.is_pinned(app.android, name):
                continue
            try:
                keys, complete = pins.chain_pins(Path(path).expanduser().read_bytes(), ca)
            except (OSError, ValueError):
                continue  # said already
            if why := pins.mismatch(app.android, name, keys):
                why += f": {path} needs a pinned key, or the app a release with a new pin"
                # Without the root a pin may be the root's.
                level: Literal["error", "warning"] = "error" if complete else "warning"
                yield [host], Problem(level, "android.domains", why)


def _edge(here: HostSettings) -> Iterator[Problem]:
    livekit = here.livekit if here.is_sfu else None
    app = here.app if "app" in here.groups else None
    if not here.edge:
        port = place(livekit.url)[1] if livekit else 0
        if livekit and livekit.url.startswith("ws://") and port != livekit.port:
            yield Problem(
                "warning",
                "livekit.url",
                f"leads to port {port}, LiveKit listens on {livekit.port} (livekit.port): callers "
                "need a proxy of yours in between",
            )
        return
    for key, scheme, url in (
        ("livekit.url", "wss", livekit.url if livekit else None),
        ("app.url", "https", app.url if app and app.upstream else None),
    ):
        name, port = place(url or "")
        if url and not url.startswith(f"{scheme}://"):
            yield _error(key, f"must be {scheme}:// with an edge, which takes TLS only")
        elif url and port != here.edge.port:
            right = f"{scheme}://{name}" + (f":{here.edge.port}" if here.edge.port != 443 else "")
            yield _error(
                key,
                f"leads to port {port}, the edge listens on edge.port: write {right}, or set "
                f"edge.port to {port}",
            )
        if url and android.address(name):
            yield _error(key, _NO_NAME)
    if here.app and bool(here.app.url) != bool(here.app.upstream):
        yield _error("app", "the edge needs both url and upstream, or neither")
    if livekit and app and app.url and place(app.url)[0] == place(livekit.url)[0]:
        yield _error("app.url", "is LiveKit's name too (livekit.url): give each a name of its own")
    names = [here.name for pool in here.turn_pools.values() if pool.tls_on_443]
    for name in names:
        if name in here.edge_backends:
            yield _error(
                "name",
                f"{name} is both HTTPS and TURN over TLS on 443, told apart by name only: give "
                "the host another name for TURN (name) or LiveKit another one (livekit.url)",
            )
    if names and here.has_edge and here.edge.port != 443:
        yield _error("edge.port", "must be 443 for turn.tls_on_443, which this host has")
    if names and here.has_edge and android.address(here.name):
        yield _error("name", _NO_NAME)
    if len(names) > 1:
        yield _error(
            "turn.tls_on_443",
            "only one pool of a host can be reached on 443: set it in one of turn.pools",
        )


def _pools(fleet: Fleet) -> Iterator[Finding]:
    declared = {name for here in fleet.hosts.values() for name in here.turn.pools}
    for name in sorted(declared):
        hosts = fleet.pool(name)
        if not hosts:
            yield [], _error(f"turn.pools.{name}", "no host of group turn has it in its pools")
        elif len({repr(_identity(here, name)) for here in hosts.values()}) > 1:
            yield (
                list(hosts),
                _error(
                    f"turn.pools.{name}",
                    "realm, secrets or users differ between its hosts; callers are sent to any of "
                    "them: set them once for the group",
                ),
            )
    for key, here in fleet.group("livekit").items():
        lk = here.livekit
        if lk is None or lk.turn_pool is None:
            continue
        turns = fleet.pool(lk.turn_pool).values()
        if lk.turn_pool not in declared:
            yield [key], _error("livekit.turn_pool", f"{lk.turn_pool!r} is not one of turn.pools")
        elif any(turn.turn_pools[lk.turn_pool].secrets for turn in turns) and not (
            livekit_keys.known(_SECRET_FILE, lk.version)
        ):
            yield (
                [key],
                _error(
                    "livekit.version",
                    f"{lk.version} does not know {_SECRET_FILE}, which it would read the secret of "
                    f"pool {lk.turn_pool} from: set {livekit_keys.SINCE[_SECRET_FILE]} or later",
                ),
            )
    keys = {
        repr({k: v.get_secret_value() for k, v in here.livekit.keys.items()})
        for here in fleet.hosts.values()
        if here.livekit and here.groups & {"livekit", "app"}
    }
    if len(keys) > 1:
        yield (
            [],
            _error(
                "livekit.keys",
                "differ between hosts; the app's tokens would be refused with 401: set them once",
            ),
        )


def _identity(here: HostSettings, name: str) -> object:
    pool = here.turn.pools[name]
    values = [secret.get_secret_value() for secret in pool.secrets]
    users = {user: secret.get_secret_value() for user, secret in pool.users.items()}
    return pool.realm, values, users


def _secrets(fleet: Fleet) -> Iterator[Finding]:
    """The same secret at two places opens both with one leak; what the app's .env gets stands there
    without quotes, about which its readers differ (tasks/app_env.py)."""
    apps = [here.livekit for here in fleet.group("app").values() if here.livekit]
    pools = (f"turn.pools.{livekit.turn_pool}.secrets." for livekit in apps)
    in_env = ("livekit.keys.", "app.api_token", *pools) if apps else ()
    places: dict[str, set[str]] = {}
    for here in fleet.hosts.values():
        for key, secret in _credentials(here):
            places.setdefault(secret.get_secret_value(), set()).add(key)
    for value, keys in places.items():
        if not _PLAIN.fullmatch(value):
            for key in sorted(key for key in keys if key.startswith(in_env)):
                yield [], _error(key, _NOT_PLAIN)
        if len(keys) > 1:
            first, *others = sorted(keys)
            yield (
                [],
                _error(first, f"is the same secret as {', '.join(others)}: use different ones"),
            )


def _credentials(here: HostSettings) -> Iterator[tuple[str, SecretStr]]:
    """What somebody is let in with, by dotted path."""
    for name, pool in here.turn.pools.items():
        for index, secret in enumerate(pool.secrets):
            yield f"turn.pools.{name}.secrets.{index}", secret
        for user, secret in pool.users.items():
            yield f"turn.pools.{name}.users.{user}", secret
    if here.livekit:
        for api_key, secret in here.livekit.keys.items():
            yield f"livekit.keys.{api_key}", secret
        if here.livekit.prometheus:
            yield "livekit.prometheus.password", here.livekit.prometheus.password
    for token in here.app.api_token if here.app else ():
        yield "app.api_token", token
