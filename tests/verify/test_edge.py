"""The edge as browsers and apps meet it: TLS on 443 by name, redirects on 80, and what stays
behind it."""

from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from callready.probes import ProbeError, ports, tls
from callready.probes.app import get
from callready.probes.tls import served
from callready.settings import pools
from callready.settings.android import Android
from callready.settings.edge import Edge
from callready.settings.pins import is_pinned, mismatch
from tests.verify.certificates import check_certificate
from tests.verify.check import Check, each, having
from tests.verify.servers import Server
from tests.verify.targets import Site, bracketed

STRANGER = "stranger.invalid"  # RFC 2606: nobody's
EDGE = "frontend http and https in /etc/haproxy/haproxy.cfg; journalctl -u haproxy"

edges = each(having(lambda server: server.settings.has_edge))


@edges
def test_redirects(server: Server, check: Check) -> None:
    """Port 80 redirects to HTTPS"""
    edge, names = server.settings.edge, server.settings.edge_backends
    assert edge
    port = f":{edge.port}" if edge.port != 443 else ""
    for family, address in server.addresses.items():
        for name in names:
            with check.probing():
                url = f"http://{bracketed(address)}:{edge.http_port}/x?y=1"
                answer, _ = get(url, headers={"Host": name})
                check.expect(
                    (answer.status_code, answer.headers.get("location"))
                    == (301, f"https://{name}{port}/x?y=1"),
                    f"who types {name} without https:// does not arrive: {answer.status_code} "
                    f"{answer.headers.get('location', '')}",
                    EDGE,
                )
                stranger, _ = get(url, headers={"Host": STRANGER})
                check.expect(
                    stranger.status_code == 404,
                    f"{address} redirects to whatever name it is called by "
                    f"({stranger.status_code})",
                    EDGE,
                )
        check.figure(f"IPv{family} {len(names)} names")


@edges
def test_https(server: Server, check: Check) -> None:
    """HTTPS answers by its own names only, with HSTS"""
    edge, names = server.settings.edge, server.settings.edge_backends
    assert edge
    for family, address in server.addresses.items():
        with check.probing():  # a dead port would keep every question waiting
            served(address, edge.port, next(iter(names)), verify=False)
            _expect_https(server, edge, family, address, check)


def _expect_https(server: Server, edge: Edge, family: int, address: str, check: Check) -> None:
    names, at = server.settings.edge_backends, (address, edge.port)
    for name in names:
        with check.probing():
            answer, _ = get(f"https://{name}/", server.ca, at=at)
            age = answer.headers.get("strict-transport-security", "").partition("max-age=")[2]
            check.expect(
                age.isdigit() and int(age) >= 15_768_000,
                f"browsers may be talked into plain HTTP: no HSTS of half a year from {name}",
                EDGE,
            )
            stranger, _ = get(f"https://{name}/", server.ca, {"Host": STRANGER}, at=at)
            check.expect(
                stranger.status_code == 404,
                f"{name} answers to another name ({stranger.status_code})",
                EDGE,
            )
    for called, server_name in (("another name", STRANGER), ("no name", address)):
        check.expect(
            _refuses(address, edge.port, server_name),
            f"{address} port {edge.port} shows a certificate to who asks for {called}",
            f"strict-sni; {EDGE}",
        )
    try:
        plain, _ = get(f"http://{bracketed(address)}:{edge.port}/")
    except ProbeError:
        check.figure(f"IPv{family} {len(names)} names, others refused")
    else:
        check.expect(
            False, f"{address} port {edge.port} speaks plain HTTP ({plain.status_code})", EDGE
        )


def _refuses(address: str, port: int, server_name: str) -> bool:
    try:
        served(address, port, server_name, verify=False)
    except ProbeError:
        return True
    return False


@edges
def test_tls_versions(server: Server, check: Check) -> None:
    """TLS 1.2 and 1.3, nothing older"""
    assert server.settings.edge
    for name in server.settings.edge_backends:
        for address in server.addresses.values():
            found = tls.versions(address, server.settings.edge.port, name)
            check.expect(
                found == ["TLSv1.2", "TLSv1.3"],
                f"{name} on {address} speaks {', '.join(found) or 'no TLS'} instead of TLS 1.2 "
                "and 1.3",
                f"ssl-default-bind-options; {EDGE}",
            )
        check.figure(name)


@edges
def test_certificate(server: Server, check: Check) -> None:
    """Certificates of HTTPS: chain, name, days left"""
    assert server.settings.edge
    for name in server.settings.edge_backends:
        check_certificate(server, name, server.settings.edge.port, pools.EDGE, check)


class Pinned(NamedTuple):
    """A URL of a host, and the apps with pins for its name."""

    server: Server
    url: SplitResult
    apps: list[Android]

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self.server.name

    def __str__(self) -> str:
        return f"{self.url.hostname}"


def _pinned(site: Site) -> Iterator[Pinned]:
    apps = [host.android for host in site.fleet.group("android").values() if host.android]
    for server in site.hosts():
        host = server.settings
        urls = [host.sfu.url] if host.sfu else []
        urls += [host.backend.url] if host.backend and host.backend.url else []
        for url in map(urlsplit, urls):
            found = [app for app in apps if is_pinned(app, url.hostname or "")]
            if found and url.scheme in ("https", "wss"):
                yield Pinned(server, url, found)


@each(lambda site: list(_pinned(site)))
def test_pins(at: Pinned, check: Check) -> None:
    """Android's pins for {at.url.hostname}"""
    name = at.url.hostname or ""
    chain = tls.served(name, at.url.port or 443, name, at.server.ca).pins
    for app in at.apps:
        check.expect(
            not (why := mismatch(app, name, chain)),
            f"{why}",
            "android.domains and the certificate: a key that is not pinned needs a release of the "
            "app before it is served",
        )
    check.figure(f"a pinned key in a chain of {len(chain)}")


@edges
def test_behind(server: Server, check: Check) -> None:
    """What is behind the edge is reached through it only"""
    behind = {use.first: use.purpose for use in server.node.ports if use.audience == "this host"}
    for name, upstream in server.settings.edge_backends.items():
        host, _, port = upstream.rpartition(":")
        if host in ("127.0.0.1", "localhost"):
            behind[int(port)] = f"plain HTTP of {name}"
    for item in server.facts.listeners:
        check.expect(
            item.proto != "tcp" or item.port not in behind or item.is_loopback,
            f"{behind.get(item.port)} listens on {item.address} port {item.port}: only a firewall "
            "is before it, and it believes whatever addresses it is told",
            f"{item.unit}; the listening addresses in its configuration",
        )
    for address in server.addresses.values():
        with check.probing():
            reached = ports.sweep(address, behind).open
            check.expect(
                not reached,
                f"strangers reach {', '.join(behind[port] for port in sorted(reached))} on "
                f"{address} past the edge",
                "nft list table inet callready",
            )
    check.figure(", ".join(map(str, sorted(behind))))
