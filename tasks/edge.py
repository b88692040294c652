"""The edge: HAProxy terminates TLS on 443 for LiveKit, the application and, where they share the
host, TURN."""

from functools import partial

from callready.probes import endpoint
from callready.release.authority import common_name
from callready.release.declaration import ROOT
from callready.release.node import Node
from callready.settings.edge import VIA_PEER
from callready.settings.fleet import FLEET_CA
from callready.settings.pools import EDGE, behind_edge, ways
from callready.settings.ports import EDGE_METRICS_PORT, listeners
from callready.settings.uris import place

CONFIG = "/etc/haproxy/haproxy.cfg"
UNIT_FILE = f"/etc/systemd/system/{EDGE}"


def edge(node: Node) -> None:
    """One HAProxy: names in front, loopback behind. A reload drops no connection, so a changed
    configuration costs no call."""
    host = node.settings
    if host.edge is None or not host.has_edge:
        return
    scraped = any(use.unit == EDGE and use.role == "livekit" for use in node.ports)
    inputs = [CONFIG]
    if peers := node.fleet.peers(node.name):
        # Read when it reloads: a credential would take a restart, which cuts every WebSocket.
        node.release.identity("host", host.fleet_ca, node.identity)
        inputs.append(FLEET_CA)
    node.release.package("haproxy")
    node.release.file(
        CONFIG,
        "haproxy.cfg.j2",
        mode=0o640,
        group="haproxy",
        edge=host.edge,
        shared={name: pool for name, pool in host.turn_pools.items() if behind_edge(host, name)},
        ways=partial(ways, host),
        addresses=[a for a in (host.local_address, host.address6) if a],
        backends=host.edge_backends,
        livekit=place(host.sfu.url)[0] if host.sfu else "",
        watched=EDGE_METRICS_PORT if host.watched else None,
        monitor=place(host.watches.url)[0] if host.watches else "",
        # For scrapers on other hosts, whom the packet filter lets in.
        metrics=host.sfu and host.sfu.prometheus if scraped else None,
        internal=[host.internal_address] if host.internal_address else [],
        turn_name=host.name,
        names=host.tls_names,
        certificates=[c.path("both.pem") for c in node.release.certificates.values()],
        peers={
            name: endpoint(node.fleet.peer_address(name, node.name), peer.edge.peers_port)
            for name, peer in peers.items()
            if peer.edge
        },
        names_of_peers=[common_name(name) for name in peers],
        own=node.fleet.peer_address(node.name, node.name),
        identity=f"{ROOT}/fleet/host/both.pem",
        fleet_ca=FLEET_CA,
        via=VIA_PEER,
    )
    node.release.file(UNIT_FILE, f"{EDGE}.j2")
    node.release.service(EDGE, inputs=inputs, reloads=True, listens=listeners(node.ports, EDGE))
