"""LiveKit's signalling as clients use it, and the ICE servers that it hands out."""

from urllib.parse import urlsplit

from pydantic import SecretStr

from callready.probes import ProbeError, livekit, stun
from callready.settings.uris import stun_uris, turn_uris
from tests.verify.check import Check, each, ms
from tests.verify.targets import Sfu, Site

KEYS = "keys in livekit.yaml, and whether LiveKit was restarted since they changed"


@each(Site.sfus)
def test_health(sfu: Sfu, check: Check) -> None:
    """LiveKit is well, and still after 5 s"""
    got = livekit.health(sfu.url, again_after=5, ca_file=sfu.ca)
    check.figure(f"{got.status} in {ms(got.rtt)}")


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
    pool = sfu.livekit.turn_pool
    wanted = {*stun_uris(site.fleet, pool), *turn_uris(site.fleet, pool)}
    wanted |= {f"stun:{server}" for server in sfu.livekit.rtc.stun_servers}
    given = {uri for server in got.ice_servers for uri in server.urls}
    check.figure(f"{len(given)} ICE URIs")
    check.expect(
        wanted <= given,
        f"callers behind firewalls are not told of {', '.join(sorted(wanted - given))}",
        "rtc.turn_servers and rtc.stun_servers in livekit.yaml",
    )
    check.expect(
        given <= wanted,
        f"callers are sent to {', '.join(sorted(given - wanted))}, which is not in the inventory",
        "rtc.stun_servers in livekit.yaml (empty: LiveKit sends public ones)",
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
    for result in reached.servers.values():
        with check.probing():
            if isinstance(result, ProbeError):
                why = result.finding
                suffers = f"with LiveKit's credentials {why.suffers}"
                raise ProbeError(suffers, why.look_at, why.evidence)
            found["srflx" if isinstance(result, stun.Binding) else "relay"] += 1
    check.figure(", ".join(f"{kind} {count}" for kind, count in found.items()))
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
