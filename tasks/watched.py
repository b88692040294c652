"""What the monitor measures a host by: its exporters, and a script for what no exporter knows."""

from base64 import b64encode
from typing import NamedTuple

from pydantic import SecretStr

from callready.release.declaration import ROOT
from callready.release.facts import host_script
from callready.release.node import Node
from callready.settings.fleet import FLEET_CA
from callready.settings.models import HostSettings
from callready.settings.ports import (
    CALLER_PORT,
    EDGE_METRICS_PORT,
    EXPORTERS,
    MEASURE,
    NODE_EXPORTER,
    NODE_EXPORTER_PORT,
    has_low_port,
    listeners,
)

SCRIPT, CONFIG = "/usr/local/lib/callready/measure", f"{ROOT}/measure.conf"
MODULES, METRICS = f"{ROOT}/exporters.yml", "/run/callready-measure"
USER = "callready-metrics"
COLLECTORS = (
    *("conntrack", "cpu", "filefd", "filesystem", "loadavg", "meminfo", "netdev", "netstat"),
    *("os", "sockstat", "softnet", "stat", "systemd", "textfile", "time", "timex", "udp_queues"),
)
UNITS = ("callready-.+", "livekit-server", "turnserver@.+", "haproxy", "certbot", "ssh")
# A container's overlay may be a host's only disk: node_exporter leaves that out by default.
NO_DISKS = (
    *("autofs", "binfmt_misc", "bpf", "cgroup2?", "configfs", "debugfs", "devpts", "devtmpfs"),
    *("fusectl", "hugetlbfs", "iso9660", "mqueue", "nsfs", "proc", "pstore", "ramfs"),
    *("rpc_pipefs", "securityfs", "selinuxfs", "squashfs", "sysfs", "tmpfs", "tracefs"),
)


class Module(NamedTuple):
    """An exporter on this host: where it is, and the header that it wants."""

    port: int
    address: str = "127.0.0.1"
    authorization: SecretStr | None = None


def watched(node: Node) -> None:
    """Everything on loopback but one port, which is for the monitor alone: by its addresses, in
    the packet filter and in the unit, and by its certificate."""
    if not (settings := node.settings.watched) or not (secret := node.settings.fleet_ca):
        return
    release = node.release
    # Debian starts both on every address.
    for name in ("prometheus-node-exporter", "prometheus-exporter-exporter"):
        release.mask(f"{name}.service")
        release.package(name)
    release.package("dbus | dbus-broker")  # by which systemd says how units are
    release.package("openssl")
    release.user(USER)
    unit_file = f"/etc/systemd/system/{NODE_EXPORTER}"
    release.file(
        unit_file,
        f"{NODE_EXPORTER}.j2",
        user=USER,
        listen=f"127.0.0.1:{NODE_EXPORTER_PORT}",
        collectors=COLLECTORS,
        no_disks=f"^({'|'.join(NO_DISKS)})$$",
        units=units(node.settings),
        metrics=METRICS,
    )
    _run(node, NODE_EXPORTER, unit_file)

    certificate = release.identity("host", secret, node.identity)
    release.file(MODULES, "exporters.yml.j2", mode=0o600, modules=modules(node.settings))
    scrapers = next(use.some for use in node.ports if use.unit == EXPORTERS)
    unit_file = f"/etc/systemd/system/{EXPORTERS}"
    release.file(
        unit_file,
        f"{EXPORTERS}.j2",
        port=settings.port,
        ca=FLEET_CA,
        monitor="monitor",
        credentials=(f"exporters.yml:{MODULES}", *certificate),
        allowed=[n for networks in node.fleet.networks(scrapers) for n in networks],
        low_ports=has_low_port(node.ports, EXPORTERS),
    )
    _run(node, EXPORTERS, unit_file, FLEET_CA, credentials=(MODULES,))

    release.file(SCRIPT, content=host_script("measure.sh"), mode=0o755)
    served = [(c.name, at) for c in release.certificates.values() for at, _ in c.endpoints]
    senders = list(node.fleet.watched) if node.settings.watches and settings.logs else []
    release.file(
        CONFIG,
        "measure.conf.j2",
        senders=senders,
        pools=node.settings.turn_pools,
        served=served,
        identities=release.identities,
        redis=node.settings.redis_here,
        address=node.fleet.redis_address(node.name, node.name),
        tls=bool(node.settings.redis_clients),
        shared=release.redis if node.fleet.cluster(node.name) else None,
    )
    unit_file = f"/etc/systemd/system/{MEASURE}"
    release.file(unit_file, f"{MEASURE}.j2", script=SCRIPT, senders=senders)
    _run(node, MEASURE, unit_file, SCRIPT, CONFIG)


def _run(node: Node, unit: str, *inputs: str, credentials: tuple[str, ...] = ()) -> None:
    node.release.enable(unit, inputs[0])
    node.release.service(
        unit, inputs=inputs, credentials=credentials, listens=listeners(node.ports, unit)
    )


def units(host: HostSettings) -> str:
    """Those whose state is measured, as a pattern: ours, the app's, and what operators need."""
    app = host.backend
    own = [*app.restart, *(item.unit for item in app.workers)] if app else []
    named = (unit.replace(".", "[.]") for unit in dict.fromkeys(own))
    return "|".join((f"({'|'.join(UNITS)})[.](service|timer)", *named))


def modules(host: HostSettings) -> dict[str, Module]:
    """The exporters of this host, by the name that the monitor asks for them."""
    found = {"node": Module(NODE_EXPORTER_PORT)}
    if host.has_edge:
        found["haproxy"] = Module(EDGE_METRICS_PORT)
    if host.sfu and (metrics := host.sfu.prometheus):
        login = f"{metrics.username}:{metrics.password.get_secret_value()}"
        word = SecretStr(f"Basic {b64encode(login.encode()).decode()}")  # RFC 7617
        bound = host.livekit_addresses
        address = "127.0.0.1" if not bound or "127.0.0.1" in bound else bound[0]
        found["livekit"] = Module(metrics.port, address, word)
    if egress := host.records:
        found["egress"] = Module(egress.prometheus_port)
    if host.watches:
        found["caller"] = Module(CALLER_PORT)
    return found
