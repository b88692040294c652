"""The edge: HAProxy terminates TLS on 443 for LiveKit, the application and, where they share the
host, TURN."""

from callready.release.node import Node

UNIT = "haproxy.service"
CONFIG = "/etc/haproxy/haproxy.cfg"
HARDENING = f"/etc/systemd/system/{UNIT}.d/callready-hardening.conf"


def edge(node: Node) -> None:
    """One HAProxy: names in front, loopback behind. A reload drops no connection, so a changed
    configuration costs no call."""
    settings = node.settings
    if settings.edge is None or not settings.has_edge:
        return
    shared = {
        name: pool for name, pool in settings.turn_pools.items() if pool.tls_on_443
    }  # TURN over TLS that meets HTTPS on 443
    node.release.package("haproxy")
    node.release.file(
        CONFIG,
        "haproxy.cfg.j2",
        mode=0o640,
        group="haproxy",
        edge=settings.edge,
        shared=shared,
        addresses=[a for a in (settings.local_address, settings.address6) if a],
        backends=settings.edge_backends,
        turn_name=settings.name,
        names=settings.tls_names,
        certificates=[c.path("both.pem") for c in node.release.certificates.values()],
    )
    node.release.file(HARDENING, "haproxy-hardening.conf.j2")
    node.release.service(
        UNIT,
        inputs=[CONFIG],
        reloads=True,
        listens=[
            f"tcp/{use.first}"
            for use in node.ports
            if use.service == "edge"
            or (
                shared
                and use.service.removeprefix("coturn ") in shared
                and use.public
                and use.proto == "tcp"
                and not use.relay
            )
        ],
    )
