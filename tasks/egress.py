"""LiveKit's egress, which records: its image, run by Debian's podman, and what it may reach."""

from collections.abc import Iterable, Iterator
from ipaddress import collapse_addresses, ip_address, summarize_address_range
from pathlib import Path, PurePath
from typing import Any

from callready.release.node import Node
from callready.settings.android import address as ip
from callready.settings.egress import (
    BACKUP,
    CONTAINER_USER,
    FEW_CORES,
    RECORDINGS,
    SUBORDINATES,
    USER,
    Egress,
)
from callready.settings.endpoints import split_endpoint
from callready.settings.ports import EGRESS as UNIT
from callready.settings.ports import LIVEKIT, REDIS, listeners, port_plan
from callready.settings.redis import FILES
from callready.settings.uris import place
from tasks.coturn import DENIED
from tasks.recordings import SCRIPT
from tasks.redis import KEY, client_files

FOLDER = "/etc/egress"
CONFIG, SECCOMP, LOOPBACK = (
    f"{FOLDER}/{name}" for name in ("egress.yaml", "seccomp.json", "loopback.nft")
)
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
CA_FILE = "/etc/fleet-ca.pem"  # of the fleet, as the container sees it
# Files of a Redis of the operator's own, as the container sees them.
REDIS_FILES = {key: f"/etc/{PurePath(path).name}" for key, path in FILES.items()}
KEY_FILE = "/run/egress/redis-client.key"
CONTAINER = UNIT.removesuffix(".service")
SUBORDINATE_USER = "egress-ctr"
# Of packets on loopback that are for Chrome's control port; a word of our own.
MARK = "0xca11"
# What Debian's podman, and what it comes with, start: none of it is needed here.
PODMAN_UNITS = (
    *("podman.socket", "podman.service", "podman-auto-update.timer", "podman-restart.service"),
    *("netavark-dhcp-proxy.socket", "netavark-dhcp-proxy.service"),
    "netavark-firewalld-reload.service",
)


def egress(node: Node) -> None:
    """The recorder in its container, with the host's network and as little else as it takes."""
    settings, livekit = node.settings.records, node.settings.livekit
    redis = node.fleet.redis_for(node.name, "egress")
    if not settings or not livekit or not redis:
        return
    release = node.release
    for unit in PODMAN_UNITS:
        release.mask_new(unit, "podman")
    release.package("podman")
    release.reserve_ids(SUBORDINATE_USER, *SUBORDINATES)
    authority = settings.registry_ca
    release.install_image(
        settings.reference,
        settings.version,
        CONTAINER_USER,
        Path(authority).expanduser().read_bytes() if authority else b"",
    )
    key = settings.livekit_key or next(iter(livekit.keys))
    limits = settings.session_limits.model_dump(exclude_none=True)
    release.file(
        CONFIG,
        "egress.yaml.j2",
        mode=0o600,
        egress=settings,
        redis=redis,
        redis_files=REDIS_FILES if redis.own else {"ca_cert_file": CA_FILE},
        key=key,
        secret=livekit.keys[key],
        url=livekit.url,
        storage=storage(settings),
        backup=BACKUP,
        cpu_cost=cpu_cost(settings, node.cores or FEW_CORES),
        limits=limits,
    )
    release.file(SECCOMP, "seccomp.json.j2")
    release.file(LOOPBACK, "egress.nft.j2", unit=UNIT, mark=MARK)
    read, keys = client_files(node, redis)
    if redis.own:
        inside = {path: REDIS_FILES[key] for key, path in FILES.items() if path in read}
        inside |= {KEY_FILE: REDIS_FILES[KEY]} if keys else {}
    else:
        inside = dict.fromkeys(read, CA_FILE)
    own = ((REDIS, node.settings.redis_here), (LIVEKIT, node.settings.sfu))
    release.file(
        UNIT_FILE,
        f"{UNIT}.j2",
        container=CONTAINER,
        image=settings.reference,
        config=CONFIG,
        seccomp=SECCOMP,
        filter=LOOPBACK,
        script=SCRIPT,
        subordinates=SUBORDINATE_USER,
        user=USER,
        gid=SUBORDINATES[0],
        recordings=RECORDINGS,
        backup=BACKUP,
        redis_key=keys[0] if keys else "",
        key_file=KEY_FILE,
        volumes=inside,
        after=[unit for unit, is_here in own if is_here],
    )
    release.enable(UNIT, UNIT_FILE)
    release.service(
        UNIT,
        inputs=[UNIT_FILE, SECCOMP, LOOPBACK, *read],
        credentials=[CONFIG, *keys],
        listens=listeners(node.ports, UNIT),
        in_container=True,
    )


def storage(settings: Egress) -> dict[str, Any]:
    """egress.yaml's `storage`. A request names a path below it."""
    prefix = settings.storage.prefix
    for kind in settings.storage.remotes:
        found = getattr(settings.storage, kind).model_dump(exclude_none=True)
        # An empty mapping is none.
        remote = {key: value for key, value in found.items() if value != {}}
        return ({"prefix": prefix} if prefix else {}) | {kind: remote}
    return {"prefix": "/".join(filter(None, (RECORDINGS, prefix)))}


def cpu_cost(settings: Egress, cores: int) -> dict[str, float]:
    """egress.yaml's `cpu_cost` on a host with so many cores."""
    costs = {f"{kind}_cpu_cost": cost for kind, cost in settings.costs(cores).items()}
    return {**settings.cpu_cost.model_dump(exclude_none=True), **costs}


def not_public(node: Node) -> tuple[list[str], list[str]]:
    """The IPv4 and IPv6 networks that no public host is in, and the fleet's internal addresses."""
    special = ("::-::", "224.0.0.0-239.255.255.255", "ff00::-ffff:" + ":".join(["ffff"] * 7))
    internal = [host.internal_address for host in node.fleet.hosts.values()]
    own = (f"{at}-{at}" for at in internal if at)
    found: dict[int, list[Any]] = {4: [], 6: []}
    for text in (*DENIED["internet"], *special, *own):
        first, last = map(ip_address, text.split("-"))
        found[first.version] += summarize_address_range(first, last)
    ip4, ip6 = ([str(net) for net in collapse_addresses(found[v])] for v in (4, 6))
    return ip4, ip6


def reached(node: Node) -> Iterator[tuple[str, list[str]]]:
    """What recordings reach by its port, and what of nftables matches that."""
    settings, livekit = node.settings.records, node.settings.livekit
    redis = node.fleet.redis_for(node.name, "egress")
    if not settings or not livekit or not redis:
        return
    yield "DNS", ["udp dport 53", "tcp dport 53"]
    yield "Redis", [match for at in redis.addresses for match in _to(*split_endpoint(at))]
    sfus = node.fleet.group("livekit").values()
    uses = {
        (use.proto, use.ports)
        for sfu in sfus
        for use in port_plan(sfu)
        if use.audience == "anyone" and (use.role == "livekit" or use.setting == "edge.port")
    }
    ports = [f"{proto} dport {ports}" for proto, ports in sorted(uses)]
    yield "SFUs", [f"{who} {what}" for who in addresses(node, ["livekit"]) for what in ports]
    name, port = place(livekit.url)
    is_direct = livekit.url.startswith("ws://") and port == livekit.port
    if not is_direct and not any(name in sfu.edge_backends for sfu in sfus):
        yield "signalling, which a proxy takes", _to(name, port)
    template = f"tcp dport {settings.template_port}"
    yield "layouts of rooms", [f"ip daddr 127.0.0.1 {template}", f"ip6 daddr ::1 {template}"]
    if where := _storage(settings):
        yield "storage", _to(*where)


def addresses(node: Node, sources: Iterable[str]) -> list[str]:
    """What matches packets to networks and groups, by family."""
    ip4, ip6 = node.fleet.networks(sources)
    found = [f"ip daddr {{ {', '.join(map(str, ip4))} }}"] if ip4 else []
    return found + ([f"ip6 daddr {{ {', '.join(map(str, ip6))} }}"] if ip6 else [])


def _storage(settings: Egress) -> tuple[str, int] | None:
    """Where uploads go, at last or through a proxy."""
    s3 = settings.storage.s3
    if s3 and s3.proxy_config:
        return place(s3.proxy_config.url)
    if s3 and s3.endpoint:
        return place(s3.endpoint)
    return ("", 443) if settings.storage.remotes else None


def _to(name: str, port: int) -> list[str]:
    """A port of a host: at its address, or, by a name that only DNS leads somewhere, any public
    one."""
    if at := ip(name):
        return [f"{'ip' if at.version == 4 else 'ip6'} daddr {at} tcp dport {port}"]
    return [f"ip daddr != @private4 tcp dport {port}", f"ip6 daddr != @private6 tcp dport {port}"]
