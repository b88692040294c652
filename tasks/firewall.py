"""The packet filter: callready's own nftables table, made from the port plan."""

from importlib.resources import files

from callready.release.declaration import ROOT
from callready.release.node import Node

UNIT = "callready-firewall.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
LOADER = "/usr/local/lib/callready/load-firewall"


def firewall(node: Node) -> None:
    """What the plan says is open, everything else dropped; loaded before the network at boot."""
    settings = node.settings
    if not settings.firewall.enabled or not settings.serves:
        return
    public = [use for use in node.ports if use.public]
    pools = settings.turn_pools.values()
    node.release.file(
        f"{ROOT}/nftables.conf",
        "nftables.conf.j2",
        here=settings,
        plan=public,
        dnat=[pool for pool in pools if pool.tls_on_443 and not settings.has_edge],
        relays=(relays := [use for use in node.ports if use.service.startswith("coturn")]),
        media=[use for use in public if use.proto == "udp" and (use.relay or use in relays)],
    )
    loader = files("callready.release").joinpath("host/load-firewall.sh").read_bytes()
    node.release.file(LOADER, content=loader, mode=0o755)
    node.release.file(UNIT_FILE, UNIT + ".j2", loader=LOADER)
    node.release.enable(UNIT, UNIT_FILE, target="sysinit.target")
