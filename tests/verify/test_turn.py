"""TURN and STUN as callers use them, from where this runs."""

from collections.abc import Callable
from functools import partial
from ipaddress import ip_address, ip_network

from callready.diagnosis.causes import name_wrong, of_refusal, policy_open, refused
from callready.diagnosis.model import Cause, Place
from callready.probes import ProbeError, local_address, names, stun, turn
from tests.verify.certificates import check_certificate
from tests.verify.check import Check, each, ms
from tests.verify.targets import Site, Turn, credentials

# Behind these a caller is behind NAT, and sees another address of itself (RFC 1918, 6598, 4193).
PRIVATE = [
    ip_network(net)
    for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
# No relay may reach these, whatever its policy: the host itself, its provider's metadata, other
# machines in its network, IPv4 in IPv6's clothes (RFC 6890; CVE-2020-26262, CVE-2026-27624), and
# addresses between whose bytes coturn before 4.16 finds gaps (CVE-2026-73213).
FORBIDDEN = (
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "127.0.0.1",
    "0.0.0.1",
    "240.0.0.1",
    "::1",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "fd00::1",
    "fe80::1",
    "64:ff9b::a00:1",
    "2002:a00:1::1",
    "::100",
    "fd00::100",
    "fe80::1:0:0:1",
)
ANYWHERE = ("9.9.9.9", "2620:fe::fe", "2620:fe::100")


@each(Site.turns)
def test_name(pool: Turn, check: Check) -> None:
    """Name leads to the host ({pool.pool_name})"""
    host = pool.server.settings
    found = names.addresses(host.name, host.deploy.resolver)
    own = {address for address in (host.address, host.address6) if address}
    check.figure(", ".join(sorted(found)))
    check.expect(
        found and found <= own and host.address in found,
        f"callers who look {host.name} up get {', '.join(sorted(found)) or 'nothing'} instead of "
        f"{' and '.join(sorted(own))}",
        "the A and AAAA records of that name, and address and address6 in the inventory; where "
        "callers are told something else than this machine, deploy.resolver",
        name_wrong(host.name, pool.name, sorted(found), sorted(own)),
    )


@each(Site.turns)
def test_stun(pool: Turn, site: Site, check: Check) -> None:
    """STUN gives callers their address ({pool.pool_name})"""
    for family, server in pool.by_family.items():
        with check.probing():
            found = stun.binding(server.address, server.port)
            site.mapped.add(found.mapped_address)
            check.figure(f"IPv{family} {found.mapped_address} {ms(found.rtt)}")
            own, mapped = local_address(server.address), ip_address(found.mapped_address)
            is_natted = any(ip_address(own or "0.0.0.0") in net for net in PRIVATE)
            check.expect(
                str(mapped) == own or (is_natted and not any(mapped in net for net in PRIVATE)),
                f"callers offer each other a wrong address: STUN says {mapped} to {own}",
                "whether something between here and the host rewrites addresses",
            )
    _note_missing(pool, check)


@each(lambda site: site.turns("udp", "tcp", "tls"))
def test_allocation(pool: Turn, check: Check) -> None:
    """TURN over {pool.way.over}: relay in range ({pool.pool_name})"""
    host, first, last = pool.server.settings, pool.pool.min_port, pool.pool.max_port
    for family, server in pool.by_family.items():
        with check.probing(_refused(pool)):
            got = turn.allocate(server, pool.credentials(), family)
            check.figure(f"IPv{family} {ms(got.time_to_allocate)}")
            own = host.address6 if family == 6 else host.address
            check.expect(
                got.relayed_address == own and first <= got.relayed_port <= last,
                f"callers get a relay that nobody reaches: {got.relayed_address} port "
                f"{got.relayed_port} instead of {own} port {first}-{last}, which is what the "
                "firewalls let in",
                f"min-port, max-port, relay-ip and external-ip of pool {pool.pool_name} on "
                f"{pool.name}",
            )
    _note_missing(pool, check)


def _refused(pool: Turn) -> Callable[[ProbeError], Cause | None]:
    return partial(of_refusal, host=pool.name, settings=pool.server.settings, pool=pool.pool_name)


def _note_missing(pool: Turn, check: Check) -> None:
    if pool.server.settings.address6 and 6 not in pool.by_family:
        check.figure("IPv6 not tried: no route from here")


@each(Site.turns)
def test_anonymous(pool: Turn, check: Check) -> None:
    """TURN refuses anonymous callers ({pool.pool_name})"""
    _expect_refusal(pool, None, "an anonymous caller", check)


@each(lambda site: [each for each in site.turns() if site.rivals(each)])
def test_other_pools_credentials(pool: Turn, site: Site, check: Check) -> None:
    """TURN refuses other pools' credentials ({pool.pool_name})"""
    for name, rival in site.rivals(pool).items():
        _expect_refusal(pool, credentials(rival), f"credentials of pool {name}", check)


def _expect_refusal(pool: Turn, who: turn.Credentials | None, called: str, check: Check) -> None:
    with check.probing():
        try:
            turn.allocate(pool.by_name, who)
        except turn.TurnRefused as refused:
            check.figure(f"{refused.code}")
            if refused.code == 401:
                return
            raise
        check.found(
            f"strangers relay through {pool.by_name.uri} at your expense: {called} is let in",
            Cause(
                "open-relay",
                pool.name,
                Place.CREDENTIAL,
                f"pool {pool.pool_name} on {pool.name} relays for {called}",
                f"use-auth-secret in /etc/coturn/{pool.pool_name}.conf and the rows of the pool's "
                f"database: deploy {pool.name} again",
                ("it gives a relay where 401 is right",),
            ),
        )


@each(Site.turns)
def test_forbidden_peers(pool: Turn, site: Site, check: Check) -> None:
    """TURN refuses forbidden peers ({pool.pool_name})"""
    internet = pool.pool.peers == "internet"
    exempt = [value.partition("-") for value in pool.pool.allowed_peers]
    ranges = [(ip_address(a), ip_address(b or a)) for a, _, b in exempt]
    asked = [
        peer
        for peer in (*FORBIDDEN, *(() if internet else ANYWHERE))
        if not any(
            a.version == ip_address(peer).version and int(a) <= int(ip_address(peer)) <= int(b)
            for a, b in ranges
        )
    ]
    codes = turn.permissions(pool.by_name, pool.credentials(), asked)
    granted = [peer for peer, code in codes.items() if code is None]
    check.figure(f"{len(asked) - len(granted)} of {len(asked)} refused")
    check.expect(
        not granted,
        f"whoever may call can reach {', '.join(granted)} through {pool.name}: machines behind "
        "it, its provider's metadata, or the host itself",
        f"denied-peer-ip and allowed-peer-ip of pool {pool.pool_name} "
        f"(/etc/coturn/{pool.pool_name}.conf): coturn runs on without a rule it cannot read",
        policy_open(pool.name, pool.pool_name, granted),
    )
    wanted = ANYWHERE if internet else tuple(sorted(site.sfu_addresses))
    if not pool.server.settings.address6:
        wanted = tuple(peer for peer in wanted if ":" not in peer)
    codes = turn.permissions(pool.by_name, pool.credentials(), wanted)
    closed = [f"{peer} ({code})" for peer, code in codes.items() if code is not None]
    check.figure(f"{len(wanted) - len(closed)} of {len(wanted)} peers granted")
    check.expect(
        not closed,
        f"relayed calls have no sound: {pool.name} does not relay to {', '.join(closed)}",
        f"allowed-peer-ip of pool {pool.pool_name}, and whether the SFU's addresses changed",
        refused(
            next(filter(None, codes.values()), 0), pool.name, pool.server.settings, pool.pool_name
        ),
    )


@each(lambda site: site.turns("tcp"))
def test_tcp_relaying(pool: Turn, check: Check) -> None:
    """TURN relays to TCP peers only if set ({pool.pool_name})"""
    code = turn.tcp_allocation_code(pool.by_name, pool.credentials())
    check.figure("granted" if code is None else f"{code}")
    if pool.pool.tcp_relay:
        check.expect(
            code is None,
            f"callers who need a TCP relay get none from {pool.name} ({code})",
            "tcp_relay in the inventory, no-tcp-relay in the pool's configuration",
        )
    else:
        check.expect(
            code == 442,
            "whoever may call can fetch pages through the relay (TCP allocation "
            f"{'granted' if code is None else code} instead of 442)",
            f"no-tcp-relay in /etc/coturn/{pool.pool_name}.conf on {pool.name}",
            refused(code or 0, pool.name, pool.server.settings, pool.pool_name)
            or Cause(
                "open-relay",
                pool.name,
                Place.CONFIGURATION,
                f"pool {pool.pool_name} on {pool.name} relays over TCP, which the inventory does "
                "not want",
                f"deploy {pool.name} again, which restores no-tcp-relay",
            ),
        )


@each(Site.internet_turns)
def test_media(pool: Turn, check: Check) -> None:
    """Two relayed callers hear each other ({pool.pool_name})"""
    for family, server in pool.by_family.items():
        with check.probing():
            a, b = (server, pool.credentials()), (server, pool.credentials())
            got = turn.relay_between(a, b, family=family)
            check.figure(f"IPv{family} {got.received}/{got.sent}, RTT {ms(got.rtt)}")
            check.expect(
                got.received >= 0.9 * got.sent,
                f"relayed calls stutter: {got.sent - got.received} of {got.sent} packets are lost "
                f"in {pool.name}",
                "the host's load, net.core.rmem_max, and drops in nft list table inet callready",
            )


@each(lambda site: site.turns("tls"))
def test_certificate(pool: Turn, check: Check) -> None:
    """Certificate over {pool.way.over}: chain, name, days left ({pool.pool_name})"""
    check_certificate(pool.server, pool.server.settings.name, pool.way.port, pool.way.unit, check)
