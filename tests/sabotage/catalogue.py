"""All sabotages by name, and pairs of them that are two faults at once."""

from tests.sabotage import cluster, network, recording, redis, services, watching
from tests.sabotage.sabotage import CATALOGUE

__all__ = [
    "AGREED",
    "CATALOGUE",
    "PAIRS",
    "cluster",
    "network",
    "recording",
    "redis",
    "services",
    "watching",
]

# Of these other clients are asked too, path by path.
AGREED = (
    "ipv6 media dropped",
    "ice tcp rejected",
    "large packets dropped before the host",
    "media dropped before the host",
    "relay range dropped",
    "relay cut off from the sfu",
    "turn over tls dropped before the host",
    "coturn hung",
    "no turn secret",
    "certificate of turn expired",
)

PAIRS = [
    # Two of the same host, then of two hosts, then one that shows and one that does not yet.
    ("ipv6 media dropped", "ice tcp rejected"),
    ("media dropped before the host", "large packets dropped"),
    ("another turn secret", "stun dropped over ipv4"),
    ("turn tls dropped at the interface", "a second turn secret"),
    ("livekit hung", "certificate of the edge expired"),
    ("coturn stopped", "relay range dropped"),
    ("relay cut off from the sfu", "ipv6 media dropped"),
    ("livekit stopped", "coturn hung"),
    ("the app stopped", "turn over tls dropped before the host"),
    ("the api secret edited", "certificate of turn expired"),
    ("relay range dropped before the host", "ice tcp dropped before the host"),
    ("our filter gone", "another node ip"),
    ("large packets dropped before the host", "livekit disabled"),
    ("our filter masked", "the sfu no longer allowed"),
    ("ssh by password", "no turn secret"),
    ("a key that coturn cannot open", "a third of media lost"),
    ("coturn masked", "a worker less"),
    ("a drop in without hardening", "turn on 443 gone"),
]
