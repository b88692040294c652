"""Rules that need more than one section of one host's settings."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

from callready.settings import android, coturn_keys, endpoints, livekit_keys, pools
from callready.settings.models import HostSettings
from callready.settings.ports import port_plan
from callready.settings.problem import Problem
from callready.settings.redis import USERS
from callready.settings.uris import place

Problems = Iterator[Problem]

RECORDED_WITHIN = 45
"""Seconds until a host that records is confirmed: egress starts, and records a call of three."""


def sources_key(setting: str) -> str:
    """The key that says to whom a use of the port plan with this setting is open."""
    if setting in ("redis.port", "edge.peers_port"):  # always to those who use it
        return setting
    return f"{setting.removesuffix('.port')}.sources"


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
            yield Problem(sources_key(setting), why)
    elif host.firewall.open and not host.is_server:
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


def _redis(host: HostSettings) -> Problems:
    if "redis" in host.groups and host.redis is None:
        yield Problem(
            "redis",
            "is missing: callready sets up Redis on the host of group redis (docs/redis.md); write "
            '{"livekit_password": "secret:redis/livekit"}; a group of your own needs another name',
        )


def _own_redis(host: HostSettings) -> Problems:
    redis = host.livekit.redis if host.livekit and host.groups & {*USERS} else None
    for key, file in redis.files.items() if redis else ():
        if not Path(file).expanduser().is_file():
            yield Problem(f"livekit.redis.tls.{key}", f"{file}: no such file")


def _pools_of_host(host: HostSettings) -> Problems:
    if "turn" in host.groups and not host.pools:
        yield Problem("pools", "is missing: which TURN pools this host of group turn runs")
    if host.pools and "turn" not in host.groups:
        yield Problem("pools", "needs the host in group turn")
    if not host.hand_out and not host.pools:
        yield Problem("hand_out", "is False, and the host runs no TURN pool: leave it out")
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
    r"|/etc/egress/[^/]*|/var/lib/egress/.*|/etc/livekit/(livekit\.yaml|turn_secret)|/etc/haproxy/haproxy\.cfg|/opt/livekit/.*"
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


def _regions(host: HostSettings) -> Problems:
    """LiveKit does not start where it has to know how far it is from others and does not."""
    selector = host.sfu.config.get("node_selector") if host.sfu else None
    if not isinstance(selector, dict) or selector.get("kind") != "regionaware":
        return
    key, regions = "livekit.config.node_selector", selector.get("regions")
    places = [each.get("name") for each in regions or () if isinstance(each, dict)]
    if not host.region:
        why = f'is missing: {key}.kind is "regionaware"; write where this host is'
        yield Problem("region", why)
    elif host.region not in places:
        why = f"has no {host.region}, which is region of this host: add its name, lat and lon"
        yield Problem(f"{key}.regions", why)


def _stun_server(host: HostSettings) -> Problems:
    if (livekit := host.sfu) and livekit.turn_pool is None and not livekit.rtc.stun_servers:
        yield Problem(
            "livekit.rtc.stun_servers",
            "is empty and there is no turn_pool: LiveKit would send its clients to public "
            "STUN servers; name one",
        )


def _monitor(host: HostSettings) -> Problems:
    if "monitor" in host.groups and host.monitor is None:
        yield Problem(
            "monitor",
            "is missing: callready sets up Prometheus on the host of group monitor "
            "(docs/watching.md); a group of your own needs another name",
        )
    if not (monitor := host.watched):
        return
    if not host.fleet_ca:
        yield Problem(
            "fleet_ca",
            'is missing: the monitor and the hosts know each other by it; write "secret:fleet/ca"',
        )
    if (livekit := host.sfu) and not livekit.prometheus:
        yield Problem(
            "livekit.prometheus",
            "is missing: the monitor reads LiveKit's metrics; write "
            '{"password": "secret:livekit/prometheus"}',
        )
    if livekit and monitor.livekit_key in (None, next(iter(livekit.keys))):
        yield Problem(
            "monitor.livekit_key",
            "test calls of the monitor have the app's key, which cannot be taken away alone: give "
            "livekit.keys another one after it, and name that here",
            "warning",
        )
    if monitor.livekit_key and livekit and monitor.livekit_key not in livekit.keys:
        yield Problem(
            "monitor.livekit_key",
            f"is {monitor.livekit_key}, which is not one of livekit.keys: add it there, with a "
            'secret of its own such as "secret:monitor/livekit"',
        )
    if not host.watches:
        return
    for key, address in monitor.urls:
        try:
            endpoints.url("http", "https", query=True)(address.get_secret_value())
        except ValueError:  # whose words have the token
            yield Problem(f"monitor.{key}", "is not an http:// or https:// URL")
    if host.edge is None:
        yield Problem("edge", "is missing: it serves monitor.url; write edge = {}")
    if monitor.page.is_nobody:
        yield Problem(
            "monitor.page", "is missing: nobody would be told; name mail addresses or webhooks"
        )
    if monitor.mail is None and (monitor.page.mail or monitor.ticket.mail):
        yield Problem("monitor.mail", "is missing: the server that takes mails of alerts")
    if monitor.watchdog is None and host.groups & {"livekit", "turn"}:
        yield Problem(
            "monitor.watchdog",
            "is missing: the monitor is on a host that it watches, and nobody says that the host "
            "is down; name the URL of a dead man's switch elsewhere",
        )


def _egress(host: HostSettings) -> Problems:
    if "egress" in host.groups and host.egress is None:
        yield Problem("egress", "is missing: the host is in group egress (docs/recording.md)")
    if not (egress := host.records):
        return
    if not (livekit := host.livekit):
        yield Problem("livekit", "is missing: egress joins rooms by its URL, with one of its keys")
        return
    key = egress.livekit_key
    if key and key not in livekit.keys:
        yield Problem(
            "egress.livekit_key",
            f"is {key}, which is not one of livekit.keys: add it there, with a secret of its own "
            'such as "secret:egress/livekit"',
        )
    if key in (None, next(iter(livekit.keys))):
        yield Problem(
            "egress.livekit_key",
            "recordings have the app's key, which cannot be taken away alone: give livekit.keys "
            "another one after it, and name that here",
            "warning",
        )
    if not host.firewall.enabled:
        yield Problem(
            "egress",
            "needs the packet filter, which keeps what is recorded from this host's own services "
            "and from private networks, and firewall.enabled is False: enable it",
        )
    at = android.address(place(livekit.url)[0])
    if at and at.is_loopback:
        yield Problem(
            "livekit.url", f"{at} is loopback, where egress' clients do not look: name the host"
        )
    if (file := egress.registry_ca) and not Path(file).expanduser().is_file():
        yield Problem("egress.registry_ca", f"{file}: no such file")
    if (timeout := host.deploy.confirm_timeout) < RECORDED_WITHIN and not host.deploy.gate_from:
        yield Problem(
            "deploy.confirm_timeout",
            f"{timeout} s are too few for egress to start and the deploy to look at a recording: "
            f"{RECORDED_WITHIN} or more",
        )


_OF_ROLES = (
    _monitor,
    _egress,
    _addresses,
    _internal_address,
    _candidates,
    _filter,
    _groups,
    _redis,
    _own_redis,
    _pools_of_host,
    _quotas,
    _app,
    _android,
    _version_keys,
    _regions,
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
    urls += [("monitor.url", "https", host.watches.url)] if host.watches else []
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


def _monitor_behind_edge(host: HostSettings) -> Problems:
    if not host.edge or not (monitor := host.watches):
        return
    others = {
        "livekit.url": host.sfu and host.sfu.url,
        "app.url": host.backend and host.backend.url,
    }
    for key, url in others.items():
        if url and place(url)[0] == place(monitor.url)[0]:
            yield Problem("monitor.url", f"is the name of {key} too: give each a name of its own")


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


_OF_THE_EDGE = (
    _url_without_edge,
    _urls_of_edge,
    _app_behind_edge,
    _monitor_behind_edge,
    _turn_on_443,
)


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

RULES = (*_OF_ROLES, *_OF_THE_EDGE, *_OF_CERTIFICATES)
