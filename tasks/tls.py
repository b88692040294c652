"""Certificates and keys, from the files the inventory names."""

from callready.here import Here
from callready.release import Certificate
from callready.settings.certificates import read_pair


def tls(here: Here) -> None:
    """Plain files that their readers take again on reload (a systemd credential would be a copy
    taken at start). They are state, not release: a renewal is no new release."""
    settings = here.settings
    if settings.tls is None:
        return
    for name in settings.tls_names:
        pair = read_pair(*settings.tls.files(here.name, name), name)
        here.release.certificates[name] = Certificate(
            name, pair.digest, pair.chain, pair.key_bytes, f"{pair.serial:x}",
            "turnserver" if settings.turn_pools else "root", tuple(endpoints(here, name)),
        )  # fmt: skip


def endpoints(here: Here, name: str) -> list[tuple[str, str]]:
    """Where a name's certificate is served, and by which unit."""
    settings = here.settings
    found: list[tuple[str, str]] = []
    for address in (settings.local_address, f"[{settings.address6}]" if settings.address6 else ""):
        if not address:
            continue
        if name in settings.edge_backends and settings.edge:
            found.append((f"{address}:{settings.edge.port}", "haproxy.service"))
        if name != settings.name:
            continue
        for pool_name, pool in settings.turn_pools.items():
            shared = pool.tls_on_443 and settings.has_edge
            unit = "haproxy.service" if shared else f"turnserver@{pool_name}.service"
            if pool.tls:
                found.append((f"{address}:{pool.tls_listening_port}", unit))
            if shared and settings.edge:
                found.append((f"{address}:{settings.edge.port}", unit))
    return found
