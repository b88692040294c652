"""LiveKit's signalling as clients use it, and the ICE servers that it hands out."""

from typing import Literal, get_args
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from callready.diagnosis import exchanges
from callready.diagnosis.causes import name_wrong
from callready.diagnosis.model import Cause, Place
from callready.probes import ProbeError, livekit, names, stun
from callready.settings.uris import stun_uris, turn_uris
from tests.verify.check import Check, each, ms
from tests.verify.targets import Sfu, Site

Proto = Literal["udp", "tcp"]
KEYS = "keys in livekit.yaml, and whether LiveKit was restarted since they changed"


@pytest.mark.lane("waiting")
@each(Site.sfus)
def test_health(sfu: Sfu, check: Check) -> None:
    """LiveKit is well, and still after 5 s"""
    with check.probing(lambda _: _elsewhere(sfu)):
        got = livekit.health(sfu.url, again_after=5, ca_file=sfu.ca)
        check.figure(f"{got.status} in {ms(got.rtt)}")


def _elsewhere(sfu: Sfu) -> Cause | None:
    """Where nothing answers by name: that the name leads to none of its hosts."""
    name = urlsplit(sfu.url).hostname or ""
    found = names.addresses(name, sfu.server.settings.deploy.resolver)
    if not found & sfu.addresses and name not in sfu.addresses:
        return name_wrong(name, sfu.name, sorted(found), sorted(sfu.addresses))
    return None


@each(Site.sfus)
def test_tokens(sfu: Sfu, check: Check) -> None:
    """The app's tokens are taken, no others"""
    for key, secret in sfu.livekit.keys.items():
        status = livekit.validate(sfu.url, livekit.token(key, secret), sfu.ca)
        check.figure(f"{status}")
        check.expect(
            status == 200,
            f"no call starts: {sfu.url} refuses a token of key {key} with {status}",
            KEYS,
            Cause(
                "key-differs",
                sfu.name,
                Place.CREDENTIAL,
                f"LiveKit refuses tokens of key {key}: its own secret differs, or the clocks do",
                f"deploy {sfu.name} again, which writes keys and restarts LiveKit",
                (f"/rtc/validate answers {status}",),
                (exchanges.signalling(sfu.name, sfu.server.settings).flow,),
                ("*:test_call_from_the_app",),
                (f"network and filters: {sfu.url} answers",),
            )
            if status == 401
            else None,
        )
        wrong = SecretStr("not-" + secret.get_secret_value()[::-1])
        tokens = {
            "signed with another secret": livekit.token(key, wrong),
            "of an unknown key": livekit.token("API-of-nobody", secret),
            "that has expired": livekit.token(key, secret, ttl=-3600),
        }
        for called, token in tokens.items():
            status = livekit.validate(sfu.url, token, sfu.ca)
            check.expect(
                status == 401,
                f"strangers join your calls: {sfu.url} takes a token {called} ({status})",
                KEYS,
                Cause(
                    "key-foreign",
                    sfu.name,
                    Place.CREDENTIAL,
                    f"LiveKit takes a token {called}",
                    f"keys in livekit.yaml of {sfu.name}: deploy it again, and restart "
                    "livekit-server",
                )
                if status == 200
                else None,
            )
        check.figure(f"{len(tokens)} wrong ones 401")


@each(Site.sfus)
def test_signalling(sfu: Sfu, site: Site, check: Check) -> None:
    """Signalling hands out our ICE servers"""
    got = livekit.signalling(sfu.url, livekit.token(*sfu.key), sfu.ca)
    check.figure(f"joined {got.server_version} in {ms(got.time_to_join)}")
    check.expect(
        got.server_version == sfu.livekit.version,
        f"callers talk to LiveKit {got.server_version}, the inventory says {sfu.livekit.version}",
        "whether the URL leads to this host",
    )
    given = {uri for server in got.ice_servers for uri in server.urls}
    # Each node of a cluster has its own.
    own = {f"stun:{server}" for server in sfu.livekit.rtc.stun_servers}
    nodes = [
        {*stun_uris(site.fleet, name), *turn_uris(site.fleet, name), *own}
        for name, node in site.fleet.group("livekit").items()
        if node.livekit and node.livekit.url == sfu.url
    ]
    wanted = given if given in nodes else nodes[0]
    check.figure(f"{len(given)} ICE URIs")
    check.expect(
        wanted <= given,
        f"callers behind firewalls are not told of {', '.join(sorted(wanted - given))}",
        "rtc.turn_servers and rtc.stun_servers in livekit.yaml",
        _ice_servers(sfu, f"does not tell callers of {', '.join(sorted(wanted - given))}"),
    )
    check.expect(
        given <= wanted,
        f"callers are sent to {', '.join(sorted(given - wanted))}, which is not in the inventory",
        "rtc.stun_servers in livekit.yaml (empty: LiveKit sends public ones)",
        _ice_servers(sfu, f"sends callers to {', '.join(sorted(given - wanted))}"),
    )


def _node_ip(sfu: Sfu, offered: list[str]) -> Cause:
    settings = sfu.server.settings
    media = (exchanges.media(sfu.name, settings, proto, 0).flow for proto in get_args(Proto))
    return Cause(
        "node-ip-wrong",
        sfu.name,
        Place.CONFIGURATION,
        f"LiveKit offers media at {', '.join(offered)}, and is at "
        f"{' and '.join(sorted(sfu.addresses))}",
        f"rtc.node_ip and use_external_ip in livekit.yaml of {sfu.name}: deploy it again",
        breaks=tuple(media),
    )


def _ice_servers(sfu: Sfu, does: str) -> Cause:
    return Cause(
        "ice-servers-differ",
        sfu.name,
        Place.CONFIGURATION,
        f"LiveKit {does}, other than the inventory",
        f"deploy {sfu.name} again, which writes rtc.turn_servers and rtc.stun_servers",
        checks=("test_candidates",),
    )


@each(Site.sfus)
def test_candidates(sfu: Sfu, check: Check) -> None:
    """The ICE servers give candidates, and LiveKit answers at its own"""
    reached = livekit.reach(sfu.url, *sfu.key, sfu.ca)
    found = {"srflx": 0, "relay": 0, "host": 0}
    for answer in reached.candidates.values():
        with check.probing():
            if isinstance(answer, ProbeError):
                raise answer
            found["host"] += 1
    for uri, result in reached.servers.items():
        with check.probing():
            if isinstance(result, ProbeError):
                why = result.finding
                suffers = f"with LiveKit's credentials {why.suffers}"
                raise ProbeError(suffers, why.look_at, why.evidence)
            # TURN over UDP is STUN too.
            found["srflx"] += isinstance(result, stun.Binding) or uri.endswith("=udp")
            found["relay"] += not isinstance(result, stun.Binding)
    check.figure(", ".join(f"{kind} {count}" for kind, count in found.items()))
    offered = {each.address for each in reached.candidates}
    if offered and offered.isdisjoint(sfu.addresses):
        check.found(
            f"callers send media to {', '.join(sorted(offered))}, where no SFU is",
            _node_ip(sfu, sorted(offered)),
        )
    host = urlsplit(sfu.url).hostname
    check.expect(
        found["srflx"],
        f"callers of {host} learn no public address (no srflx candidate)",
        "rtc.stun_servers in livekit.yaml and the pool's hosts",
    )
    check.expect(
        found["relay"] or not sfu.livekit.turn_pool,
        f"callers of {host} behind firewalls get no relay candidate",
        "rtc.turn_servers in livekit.yaml and the pool's hosts",
    )
