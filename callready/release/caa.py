"""Certification authority authorization: whether DNS lets an authority sign for a name (RFC 8659).

The authority decides; this says beforehand what it would say. Where DNS does not answer it is
silent: the deploy must not depend on a resolver that only this machine lacks.
"""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlsplit

import dns.exception
import dns.resolver
from dns.rdtypes.ANY.CAA import CAA

from callready.settings.edge import Acme

TIMEOUT = 2.0
"""Seconds for one name's records; an answer that takes longer is not worth a deploy's time."""

CRITICAL = 128  # RFC 8659, section 4.1
KNOWN_TAGS = {b"issue", b"issuewild", b"iodef"}

# What the authorities' own documents say to write into a CAA record, by the host of the directory.
IDENTITIES = {
    "acme-v02.api.letsencrypt.org": "letsencrypt.org",
    "acme-staging-v02.api.letsencrypt.org": "letsencrypt.org",
    "acme.zerossl.com": "sectigo.com",
    "dv.acme-v02.api.pki.goog": "pki.goog",
    "dv.acme-v02.test-api.pki.goog": "pki.goog",
    "api.buypass.com": "buypass.com",
}


def forbids(name: str, acme: Acme, resolver: dns.resolver.Resolver | None = None) -> str | None:
    """Why the authority of `acme` may not sign for `name`, with what to do; None where it may,
    where nobody knows what CAA records call it, and where DNS does not answer.

    Args:
        name: the DNS name of the certificate.
        acme: its directory and challenge.
        resolver: default the system's.
    """
    identity = acme.caa_identity or IDENTITIES.get(urlsplit(acme.server).hostname or "")
    if not identity:
        return None
    try:
        domain, records = _relevant(name, resolver or dns.resolver.Resolver())
    except dns.exception.DNSException:
        return None
    if _allows(records, identity, acme.challenge):
        return None
    shown = ", ".join(sorted(f"{domain} CAA {record.to_text()}" for record in records))
    return (
        f"{name}: a CAA record forbids {identity} to sign for it with {acme.challenge} ({shown}): "
        f'add to the zone: {domain} CAA 0 issue "{identity}"'
    )


def _relevant(name: str, resolver: dns.resolver.Resolver) -> tuple[str, list[CAA]]:
    """The records of the nearest domain that has any (RFC 8659, section 3), and that domain."""
    resolver.lifetime = TIMEOUT
    domain = name.rstrip(".")
    while domain:
        with suppress(dns.resolver.NXDOMAIN):
            answer = resolver.resolve(domain, "CAA", raise_on_no_answer=False, search=False)
            if answer.rrset:
                return domain, [record for record in answer.rrset if isinstance(record, CAA)]
        domain = domain.partition(".")[2]
    return name, []


def _allows(records: list[CAA], identity: str, challenge: str) -> bool:
    if any(r.flags & CRITICAL and r.tag.lower() not in KNOWN_TAGS for r in records):
        return False
    issue = [r.value.decode(errors="replace") for r in records if r.tag.lower() == b"issue"]
    return not issue or any(_is_for(value, identity, challenge) for value in issue)


def _is_for(value: str, identity: str, challenge: str) -> bool:
    """Whether an `issue` value is the authority's, and for this challenge (RFC 8657, section 4)."""
    issuer, *parameters = (part.strip() for part in value.split(";"))
    given = dict(part.split("=", 1) for part in parameters if "=" in part)
    methods = given.get("validationmethods", challenge).split(",")
    return issuer.lower() == identity and challenge in methods
