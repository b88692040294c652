"""Causes that show themselves to callers: what an answer of a server says of what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from callready.diagnosis.exchanges import relay_range, turn
from callready.diagnosis.model import Cause, Flow, Place
from callready.probes import ProbeError
from callready.probes.tls import Rejected
from callready.probes.turn import TurnRefused
from callready.settings.models import HostSettings
from callready.settings.pools import unit, ways

# Of a pool by the code that it refuses with (RFC 8656, section 19).
_REFUSALS = {
    401: (
        "secret-differs",
        Place.CREDENTIAL,
        "pool {pool} on {host} refuses credentials made with the inventory's secret: its own "
        "differs, or the clocks do",
        "deploy {host} again, which writes the secret into the pool's database",
    ),
    403: (
        "peer-policy-closed",
        Place.CONFIGURATION,
        "pool {pool} on {host} does not relay to the SFU: its peer policy forbids that address",
        "peers and allowed_peers of turn.pools.{pool}, and address and address6 of the SFU, in the "
        "inventory; then deploy",
    ),
    486: (
        "quota-used",
        Place.CAPACITY,
        "pool {pool} on {host} refuses new relays: a quota is used up",
        "turn.total_quota and turn.user_quota, and whether the app gives each call a name of its "
        "own",
    ),
    508: (
        "quota-used",
        Place.CAPACITY,
        "pool {pool} on {host} has no relay left: its range or its quota is used up, or its relay "
        "address is none of the host's",
        "min_port and max_port of turn.pools.{pool}, turn.total_quota, and the host's addresses",
    ),
}


def pool_flows(host: str, settings: HostSettings, pool: str) -> tuple[Flow, ...]:
    """Every way into a pool, and its relays."""
    found = [turn(host, way).flow for way in ways(settings, pool)]
    return (*dict.fromkeys(found), relay_range(host, settings, pool, 0))


def of_refusal(error: ProbeError, host: str, settings: HostSettings, pool: str) -> Cause | None:
    """The cause behind the code that a TURN server refuses with; None for other errors."""
    return refused(error.code, host, settings, pool) if isinstance(error, TurnRefused) else None


def refused(code: int, host: str, settings: HostSettings, pool: str) -> Cause | None:
    """The cause behind the code that a pool on a host refuses with; None for a code that says
    nothing of it."""
    if code not in _REFUSALS:
        return None
    key, place, what, mend = _REFUSALS[code]
    words = {"pool": pool, "host": host}
    return Cause(
        key,
        host,
        place,
        what.format(**words),
        mend.format(**words),
        (f"it answers {code}",),
        pool_flows(host, settings, pool),
        ruled_out=(f"network, filters and {unit(pool)}: it answers",),
    )


_REJECTED = {
    "name": (
        "certificate-name",
        "the certificate that {host} serves for {name} is another name's",
        "the files of {name} in tls.certificate and tls.key, or its ACME name; then deploy {host}",
    ),
    "validity": (
        "certificate-expired",
        "the certificate that {host} serves for {name} is not valid now",
        "its renewal: journalctl -u callready-certificates -u certbot on {host}; for files of your "
        "own, renew them and deploy",
    ),
    "chain": (
        "certificate-untrusted",
        "callers do not trust who signed the certificate that {host} serves for {name}",
        "the chain in the file of tls.certificate: leaf first, then every intermediate one; tls.ca "
        "for an authority of your own",
    ),
}


def of_certificate(error: ProbeError, host: str, name: str, ports: Iterable[int]) -> Cause | None:
    """The cause behind a certificate that callers reject; None for other errors.

    Args:
        error: of the probe.
        host: that serves it.
        name: that it is for.
        ports: on which it serves that name.
    """
    if not isinstance(error, Rejected):
        return None
    key, what, mend = _REJECTED[error.kind]
    words = {"host": host, "name": name}
    return Cause(
        key,
        host,
        Place.CERTIFICATE,
        what.format(**words),
        mend.format(**words),
        (error.finding.evidence,),
        tuple(Flow(host, "tcp", port, port) for port in sorted(set(ports))),
        ruled_out=("network and filters: the TLS handshake is answered",),
    )


def policy_open(host: str, pool: str, peers: Sequence[str]) -> Cause:
    """A pool that relays to addresses that nobody may reach through it."""
    return Cause(
        "peer-policy-open",
        host,
        Place.CONFIGURATION,
        f"pool {pool} on {host} relays to {', '.join(peers)}: whoever may call reaches machines "
        "behind it, its provider's metadata, or the host itself",
        f"deploy {host} again, which restores denied-peer-ip of /etc/coturn/{pool}.conf and "
        f"restarts {unit(pool)}",
        (f"it permits {len(peers)} peers that it must not",),
    )


def name_wrong(name: str, host: str, found: Sequence[str], own: Sequence[str]) -> Cause:
    """A name that leads callers elsewhere."""
    return Cause(
        "name-wrong",
        host,
        Place.NAME,
        f"callers who look {name} up get {', '.join(found) or 'nothing'}, and the host is "
        f"{' and '.join(own)}",
        f"the A and AAAA records of {name}; where callers are told something else than this "
        "machine, deploy.resolver",
        breaks=(Flow(host, "tcp", 1, 65535), Flow(host, "udp", 1, 65535)),
    )
