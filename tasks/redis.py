"""The Redis that SFUs and recorders share."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr

from callready.release.declaration import ROOT
from callready.release.node import Node
from callready.settings.ports import REDIS, has_low_port, listeners
from callready.settings.redis import FILES, RedisAccess

FOLDER = f"{ROOT}/redis"
CONFIG, ACL = f"{FOLDER}/redis.conf", f"{FOLDER}/users.acl"
CREDENTIALS = f"/run/credentials/{REDIS}"
KEY = "client_key_file"

# What livekit-server and egress call. The names of their queues' locks are random, and since Redis
# 7.0 a new user may use no channel.
COMMANDS = {
    "livekit": "ping select get set del hset hget hdel hmget hvals hgetall hkeys sadd srem "
    "smembers watch unwatch multi exec eval evalsha publish subscribe unsubscribe",
    "egress": "ping set publish subscribe unsubscribe",
}


def redis(node: Node) -> None:
    """Debian's Redis with a user for each of those who use it, who may do what they need; saved on
    disk, so that a restart loses no room. It restarts in a moment, and calls go on."""
    if not (settings := node.settings.redis_here):
        return
    release, fleet = node.release, node.fleet
    # Debian starts it with no password.
    release.mask_new("redis-server.service")
    release.package("redis-server")
    users = {
        user: (hashes, f"~* &* -@all {' '.join(f'+{each}' for each in commands.split())}")
        for user, commands in COMMANDS.items()
        if (hashes := _hashes(settings.passwords(user)))
    }
    release.file(ACL, "redis.acl.j2", mode=0o600, users=users)
    credentials = [f"users.acl:{ACL}"]
    if is_remote := bool(node.settings.redis_clients):
        credentials += release.identity("host", node.settings.fleet_ca, node.identity)
    address = fleet.redis_address(node.name, node.name)
    release.file(
        CONFIG,
        "redis.conf.j2",
        redis=settings,
        address=address,
        acl=f"{CREDENTIALS}/users.acl",
        credentials=CREDENTIALS if is_remote else "",
    )
    unit_file = f"/etc/systemd/system/{REDIS}"
    release.file(
        unit_file,
        f"{REDIS}.j2",
        config=CONFIG,
        credentials=credentials,
        state=REDIS.removesuffix(".service"),
        low_ports=has_low_port(node.ports, REDIS),
        # Its own address too: an operator asks from here.
        allowed=[
            *([address] * is_remote),
            *(n for networks in fleet.networks(node.settings.redis_clients) for n in networks),
        ],
    )
    release.enable(REDIS, unit_file)
    release.service(
        REDIS,
        inputs=[unit_file, CONFIG],
        credentials=[ACL],
        listens=listeners(node.ports, REDIS),
        restart_means="calls go on; a join waits until it is back, which takes a moment",
        drain=None,
    )


def client_files(node: Node, access: RedisAccess) -> tuple[list[str], list[str]]:
    """What a program on this host reaches its Redis with, over TLS: files that it reads itself, and
    those that its unit loads as credentials."""
    if not access.own:
        if access.ca_file:
            node.release.trust(node.settings.fleet_ca)
        return ([access.ca_file] if access.ca_file else []), []
    for key, file in access.own.files.items():
        content = Path(file).expanduser().read_bytes()
        node.release.file(FILES[key], content=content, mode=0o600 if key == KEY else 0o644)
    paths = [FILES[key] for key in access.own.files if key != KEY]
    return paths, [FILES[KEY]] * (KEY in access.own.files)


def _hashes(passwords: Iterable[SecretStr]) -> list[str]:
    """As an ACL file has them, in an order that does not tell which is the first: which of two is
    used changes nothing here."""
    plain = (password.get_secret_value().encode() for password in passwords)
    return sorted(f"#{hashlib.sha256(each).hexdigest()}" for each in plain)
