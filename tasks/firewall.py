"""The packet filter: callready's own nftables table, made from the port plan."""

from importlib.resources import files

from callready.release.declaration import ROOT
from callready.release.node import Node
from callready.settings.pools import ways

UNIT = "callready-firewall.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
LOADER = "/usr/local/lib/callready/load-firewall"


def firewall(node: Node) -> None:
    """What the plan says is open, everything else dropped; loaded before the network at boot."""
    host = node.settings
    if not host.firewall.enabled or not host.serves:
        return
    public = [use for use in node.ports if use.audience == "anyone"]
    relays = [use for use in node.ports if use.role == "coturn"]
    turn = [way for name in host.turn_pools for way in ways(host, name)]
    node.release.file(
        f"{ROOT}/nftables.conf",
        "nftables.conf.j2",
        host=host,
        plan=public,
        redirected=[way for way in turn if way.listens_on != way.port],
        relays=relays,
        media=[use for use in public if use.relay or use.setting == "livekit.rtc.tcp_port"],
        untracked=[use for use in public if use.proto == "udp" and (use.relay or use in relays)],
    )
    loader = files("callready.release").joinpath("host/load-firewall.sh").read_bytes()
    node.release.file(LOADER, content=loader, mode=0o755)
    node.release.file(UNIT_FILE, UNIT + ".j2", loader=LOADER)
    node.release.enable(UNIT, UNIT_FILE, target="sysinit.target")
