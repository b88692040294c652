"""What names lead to for callers, who may be told something else than this machine is (split
horizon)."""

from __future__ import annotations

import socket
from contextlib import suppress

import dns.exception
import dns.resolver

from callready.probes import TIMEOUT, ProbeError
from callready.settings.endpoints import split_endpoint


def resolver(server: str) -> dns.resolver.Resolver:
    """The name server `ADDRESS` or `ADDRESS:PORT`."""
    found = dns.resolver.Resolver(configure=False)
    try:
        address, found.port = split_endpoint(server)
    except ValueError:
        address = server
    found.nameservers = [address]
    return found


def addresses(name: str, server: str | None) -> set[str]:
    """The IPv4 and IPv6 addresses of a name; none where it has none.

    Args:
        name: a host name.
        server: `deploy.resolver`; None asks as every program of this machine does.

    Raises:
        ProbeError: the name server does not answer.
    """
    if server is None:
        with suppress(socket.gaierror):
            return {str(item[4][0]) for item in socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)}
        return set()
    asked, found = resolver(server), set()
    asked.lifetime = TIMEOUT
    for kind in ("A", "AAAA"):
        with suppress(dns.resolver.NXDOMAIN):
            try:
                answer = asked.resolve(name, kind, raise_on_no_answer=False, search=False)
            except (dns.exception.Timeout, dns.resolver.NoNameservers) as error:
                raise ProbeError(
                    f"nobody says what {name} leads to for callers: {server} does not answer",
                    "deploy.resolver, and whether this network lets DNS through to it",
                    type(error).__name__,
                ) from None
            found |= {str(record) for record in answer.rrset or ()}
    return found
