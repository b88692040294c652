"""Certificate and key of a TURN host, from the files the inventory names."""

from callready.here import Here
from callready.release import ROOT, CertificateState
from callready.settings.certificates import read_pair

CERTIFICATE = f"{ROOT}/tls/current/fullchain.pem"
KEY = f"{ROOT}/tls/current/privkey.pem"


def tls(here: Here) -> None:
    """Plain files that coturn can read again on SIGUSR2 (a systemd credential would be a copy
    taken at start). They are state, not release: a renewal is no new release."""
    pools = {name: pool for name, pool in here.settings.turn_pools.items() if pool.tls}
    files = here.settings.tls
    if not pools or files is None:
        return
    pair = read_pair(
        files.certificate.format(host=here.name), files.key.format(host=here.name),
        here.settings.name,
    )  # fmt: skip
    endpoints = tuple(
        (f"{here.settings.local_address}:{pool.tls_listening_port}", f"turnserver@{name}.service")
        for name, pool in pools.items()
    )
    here.release.certificate = CertificateState(
        pair.digest, pair.chain, pair.key_bytes, f"{pair.serial:x}", endpoints
    )
