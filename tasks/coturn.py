"""coturn: one instance a pool, each with its own configuration, ports and credentials."""

from hashlib import md5
from ipaddress import IPv6Address, ip_network

from pydantic import SecretStr

from callready.release.declaration import Row
from callready.release.node import Node
from callready.settings import coturn_keys, pools
from callready.settings.host_checks import unreachable
from callready.settings.models import HostSettings
from callready.settings.monitor import Monitor
from callready.settings.ports import has_low_port, listeners
from callready.settings.turn import Pool

UNIT_FILE = "/etc/systemd/system/turnserver@.service"


def coturn(node: Node) -> None:
    """The TURN pools of this host."""
    host, version = node.settings, node.settings.turn.version
    if not host.turn_pools:
        return
    # Debian's package starts coturn when it is installed, as an open relay.
    node.release.mask("coturn.service")
    node.release.package("coturn", version)
    node.release.package("sqlite3")
    low_ports = any(has_low_port(node.ports, pools.unit(name)) for name in host.turn_pools)
    node.release.file(UNIT_FILE, "turnserver@.service.j2", low_ports=low_ports)
    for name, pool in host.turn_pools.items():
        config, unit = f"/etc/coturn/{name}.conf", pools.unit(name)
        userdb = f"/var/lib/turn/{name}.db"
        node.release.file(
            config,
            "turnserver.conf.j2",
            mode=0o640,
            group="turnserver",
            host=host,
            name=name,
            pool=pool,
            behind_edge=pools.behind_edge(host, name),
            userdb=userdb,
            certificate=node.release.certificates.get(host.name),
            allowed=allowed_peers(node, pool),
            denied=denied_peers(node, pool),
            knows=lambda key: coturn_keys.knows(version, key),
        )
        node.release.secret_rows(userdb, rows(pool, node.settings.watched))
        node.release.enable(unit, UNIT_FILE)
        node.release.service(
            unit,
            inputs=[UNIT_FILE],
            credentials=[config],
            listens=listeners(node.ports, unit),
            restart_means="every call relayed here breaks off until its client connects anew",
            drain="USR1" if coturn_keys.drains(version) else "",
        )


def allowed_peers(node: Node, pool: Pool) -> list[str]:
    """Whom a relay may reach in spite of the deny-list."""
    sfus = node.fleet.group("livekit").values() if pool.peers == "sfu" else ()
    addresses = [
        address
        for sfu in sfus
        for address in (sfu.address, sfu.private_address, sfu.address6, *more_addresses(sfu))
        if address
    ]
    return [*addresses, *pool.allowed_peers]


def more_addresses(sfu: HostSettings) -> list[str]:
    """What an SFU tells callers of beside its own addresses; not whole networks, in which there
    may be anything."""
    ips = sfu.livekit.rtc.ips if sfu.livekit else None
    networks = map(ip_network, ips.includes if ips else ())
    return [str(each.network_address) for each in networks if each.num_addresses == 1]


def denied_peers(node: Node, pool: Pool) -> list[str]:
    """Whom a relay may not reach; the fleet's internal networks among it, also where their
    addresses are such as the Internet has."""
    internal = (host.internal_address for host in node.fleet.hosts.values())
    more = [a for a in internal if a and not unreachable(a)] if pool.peers == "internet" else []
    return [*DENIED[pool.peers], *more]


def rows(pool: Pool, monitor: Monitor | None = None) -> list[Row]:
    """The pool's credentials as rows of coturn's user database (its schema.sql), and what the
    monitor's test calls mint with."""
    secrets = [("turn_secret", pool.realm, secret) for secret in pool.secrets]
    if monitor and monitor.turn_secret and secrets:
        secrets.append(("turn_secret", pool.realm, monitor.turn_secret))
    users = [
        ("turnusers_lt", pool.realm, _long_term_key(name, pool.realm, password))
        for name, password in pool.users.items()
    ]
    return secrets + users


def _long_term_key(name: str, realm: str, password: SecretStr) -> SecretStr:
    """`name:key`, with the key of RFC 8489, section 9.2.2: MD5 of name, realm and password."""
    text = f"{name}:{realm}:{password.get_secret_value()}"
    return SecretStr(f"{name}:{md5(text.encode(), usedforsecurity=False).hexdigest()}")


# coturn before 4.16 compares IPv6 ranges byte by byte (CVE-2026-73213), so `::1-ffff:…` lets
# `fd00::100` through: every byte that may differ needs a range of its own. `::` itself is left out
# because coturn then denies every IPv4 peer too.
_ALL_BUT_ZERO = tuple(
    f"{IPv6Address(1 << 8 * byte)}-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" for byte in range(16)
)

# Addresses that no public peer has: IANA's special-purpose registries (RFC 6890 and successors).
DENIED = {
    "sfu": ("0.0.0.0-255.255.255.255", *_ALL_BUT_ZERO),
    "internet": (
        "0.0.0.0-0.255.255.255",
        "10.0.0.0-10.255.255.255",
        "100.64.0.0-100.127.255.255",
        "127.0.0.0-127.255.255.255",
        "169.254.0.0-169.254.255.255",
        "172.16.0.0-172.31.255.255",
        "192.0.0.0-192.0.0.255",
        "192.0.2.0-192.0.2.255",
        "192.88.99.0-192.88.99.255",
        "192.168.0.0-192.168.255.255",
        "198.18.0.0-198.19.255.255",
        "198.51.100.0-198.51.100.255",
        "203.0.113.0-203.0.113.255",
        "240.0.0.0-255.255.255.255",
        *(f"{IPv6Address(1 << 8 * byte)}-::ffff:ffff" for byte in range(4)),
        "::ffff:0.0.0.0-::ffff:255.255.255.255",
        "64:ff9b::-64:ff9b::ffff:ffff",
        "64:ff9b:1::-64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
        "100::-100::ffff:ffff:ffff:ffff",
        "2001::-2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff",
        "2001:db8::-2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
        "2002::-2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "fc00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "fe80::-feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ),
}
