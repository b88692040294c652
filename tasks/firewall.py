"""The packet filter: callready's own nftables table, made from the port plan."""

from importlib.resources import files
from typing import Any

from callready.release.declaration import ROOT
from callready.release.node import Node
from callready.settings.egress import SUBORDINATES
from callready.settings.fleet import Fleet
from callready.settings.pools import ways
from callready.settings.ports import Use
from tasks.egress import MARK, addresses, not_public, reached

UNIT = "callready-firewall.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
LOADER = "/usr/local/lib/callready/load-firewall"


def firewall(node: Node) -> None:
    """What the plan says is open, everything else dropped; loaded before the network at boot."""
    host = node.settings
    if not host.firewall.enabled or not host.is_server:
        return
    public = [use for use in node.ports if use.audience == "anyone"]
    relays = [use for use in node.ports if use.role == "coturn"]
    listening = [use for use in public if use in relays and not use.relay]
    turn = [way for name in host.turn_pools for way in ways(host, name)]
    elsewhere = {way.port: way.listens_on for way in turn if way.listens_on != way.port}
    redirected = {use: elsewhere[use.first] for use in relays if not use.unit and not use.relay}
    opened = [use for use in node.ports if use.audience != "this host" and use not in redirected]
    node.release.file(
        f"{ROOT}/nftables.conf",
        "nftables.conf.j2",
        host=host,
        opened=[(use, matches(node.fleet, use)) for use in dict.fromkeys(opened)],
        redirected=redirected,
        listening=[use for use in listening if use not in redirected],
        relays=relays,
        media=[use for use in public if use.relay or use.setting == "livekit.rtc.tcp_port"],
        recording=recording(node),
        untracked=[use for use in public if use.proto == "udp" and (use.relay or use in relays)],
    )
    loader = files("callready.release").joinpath("host/load-firewall.sh").read_bytes()
    node.release.file(LOADER, content=loader, mode=0o755)
    node.release.file(UNIT_FILE, UNIT + ".j2", loader=LOADER)
    node.release.enable(UNIT, UNIT_FILE, target="sysinit.target")


def recording(node: Node) -> dict[str, Any] | None:
    """What the template has to know of a host that records."""
    if not (egress := node.settings.records):
        return None
    first, count = SUBORDINATES
    return {
        "users": f"{first}-{first + count - 1}",
        "reached": list(reached(node)),
        "networks": addresses(node, egress.allowed_networks),
        "not_public": not_public(node),
        "web": egress.web,
        "mark": MARK,
    }


def matches(fleet: Fleet, use: Use) -> list[str]:
    """What of nftables matches the packets of a use, from those who may: one for each address
    family, where that matters."""
    if use.first:
        what4 = what6 = f"{use.proto} dport {use.ports}"
    else:
        what4 = f"ip protocol {use.protocol_number}"
        # AH is a header of IPv6 itself, which `meta l4proto` looks behind.
        what6 = f"ip6 nexthdr {use.protocol_number}"
    if not use.some:
        return list(dict.fromkeys((what4, what6)))
    ip4, ip6 = fleet.networks(use.some)
    found = [f"ip saddr {{ {', '.join(map(str, ip4))} }} {what4}"] if ip4 else []
    return found + ([f"ip6 saddr {{ {', '.join(map(str, ip6))} }} {what6}"] if ip6 else [])
