"""livekit-server, the SFU."""

from ipaddress import ip_network
from typing import Any

from pydantic import SecretStr

from callready.release.node import Node
from callready.settings.endpoints import split_endpoint
from callready.settings.fleet import FLEET_CA
from callready.settings.pools import handed_out
from callready.settings.ports import LIVEKIT as UNIT
from callready.settings.ports import REDIS, has_low_port
from callready.settings.redis import FILES
from callready.settings.uris import stun_uris
from tasks.redis import KEY, client_files

UNIT_FILE = f"/etc/systemd/system/{UNIT}"
CONFIG = "/etc/livekit/livekit.yaml"
TURN_SECRET = "/etc/livekit/turn_secret"
KEY_FILE = f"/run/credentials/{UNIT}/redis_key"


def livekit(node: Node) -> None:
    """The SFU with a pinned release, its configuration as a credential only it can read."""
    if not (settings := node.settings.sfu):
        return
    servers, secret = turn_servers(node)
    redis = node.fleet.redis_for(node.name, "livekit")
    if redis and not redis.is_local and redis.addresses == [redis.address]:
        node.release.redis = split_endpoint(redis.address)  # Sentinels say who that is by then
    node.release.user("livekit")
    region = only_of_region(node)
    binary = node.release.install(settings.base_url, settings.version, settings.archive_sha256)
    node.release.links["/usr/local/bin/livekit-server"] = binary
    read, keys = client_files(node, redis) if redis else ([], [])
    credentials = [CONFIG, *keys]
    node.release.file(
        CONFIG,
        "livekit.yaml.j2",
        mode=0o600,
        host=node.settings,
        lk=settings,
        redis=redis,
        redis_files={**FILES, KEY: KEY_FILE} if redis and redis.own else {"ca_cert_file": FLEET_CA},
        turn_servers=servers,
        stun_servers=stun_servers(node),
        ips=candidate_networks(node),
        secret_file=f"/run/credentials/{UNIT}/turn_secret" if secret else None,
        shares=bool(node.fleet.cluster(node.name)) and "node_selector" not in settings.config,
    )
    if secret:
        node.release.file(TURN_SECRET, content=secret.get_secret_value().encode(), mode=0o600)
        credentials.append(TURN_SECRET)
    node.release.file(
        UNIT_FILE,
        "livekit-server.service.j2",
        binary=binary,
        turn_secret=secret,
        redis_key=keys[0] if keys else "",
        low_ports=has_low_port(node.ports, UNIT),
        after=REDIS if node.settings.redis_here else "",
    )
    node.release.enable(UNIT, UNIT_FILE)
    node.release.service(
        UNIT,
        inputs=[UNIT_FILE, *read],
        credentials=credentials,
        binary=binary,
        listens=[f"tcp/{settings.port}", f"tcp/{settings.rtc.tcp_port}"],
        restart_means="every running call reconnects once, a gap of seconds"
        + "; what is recorded then has the gap, or ends" * bool(node.fleet.group("egress"))
        + f"; it is the only SFU of region {region}: its new calls go to others" * bool(region),
        # With Redis a node takes no new rooms after SIGTERM: others have to.
        drain="TERM" if node.fleet.cluster(node.name) else "",
        media=f"tcp/{settings.rtc.tcp_port}",
    )


def only_of_region(node: Node) -> str:
    """The region of an SFU whose region no other SFU of its cluster is in, where LiveKit looks at
    regions; else empty."""
    settings, others = node.settings, node.fleet.cluster(node.name)
    selector = settings.sfu.config.get("node_selector") if settings.sfu else None
    if not others or not isinstance(selector, dict) or selector.get("kind") != "regionaware":
        return ""
    is_shared = any(node.fleet[other].region == settings.region for other in others)
    return "" if is_shared else settings.region or ""


def candidate_networks(node: Node) -> list[str]:
    """livekit.yaml's `rtc.ips.includes`: the addresses on the host's interfaces that it tells
    callers of; none stands for all."""
    host = node.settings
    if not host.livekit or not (ips := host.livekit.rtc.ips):
        return []
    own = (f"{ip_network(a)}" for a in (host.local_address, host.address6) if a)
    return list(dict.fromkeys([*own, *ips.includes]))


def turn_servers(node: Node) -> tuple[list[dict[str, Any]], SecretStr | None]:
    """livekit.yaml's `rtc.turn_servers`, every one of which each caller is told of, and the shared
    secret LiveKit mints credentials with (none where the pool has fixed users)."""
    name = node.settings.livekit.turn_pool if node.settings.livekit else None
    servers: list[dict[str, Any]] = []
    secret = None
    for host, way in handed_out(node.fleet, node.name):
        pool = host.turn_pools[name or ""]
        server: dict[str, Any] = {"host": host.name, "port": way.port, "protocol": way.transport}
        if pool.secrets:
            secret = pool.secrets[0]
        else:
            server["username"], server["credential"] = next(iter(pool.users.items()))
        servers.append(server)
    return servers, secret


def stun_servers(node: Node) -> list[str]:
    """livekit.yaml's `rtc.stun_servers`. Without these and without TURN servers LiveKit tells
    clients of public ones."""
    settings = node.settings.livekit
    if settings is None:
        return []
    own = [uri.removeprefix("stun:") for uri in stun_uris(node.fleet, node.name)]
    return own + settings.rtc.stun_servers
