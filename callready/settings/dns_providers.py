"""The DNS providers whose zones can answer the dns-01 challenge, and the credentials they want.

Source: certbot's plugins in Debian 12 and 13 (`apt-cache search python3-certbot-dns`), whose code
names the keys. OVH's is in Debian 12 only: callready has a hook of its own instead, on both
(release/host/ovh-dns.sh).
"""

from collections.abc import Mapping
from typing import NamedTuple


class Provider(NamedTuple):
    """The credentials of a provider's API, in each way it takes them; what else may be said; and
    the Debian releases that have its plugin."""

    ways: tuple[tuple[str, ...], ...]
    more: tuple[str, ...] = ()
    debian: tuple[str, ...] = ("12", "13")

    @property
    def wanted(self) -> str:
        """Its credentials in words."""
        return ", or ".join(" and ".join(way) for way in self.ways)


PROVIDERS = {
    "cloudflare": Provider((("api_token",), ("email", "api_key"))),
    "desec": Provider((("token",),), debian=("13",)),
    "digitalocean": Provider((("token",),), debian=("12",)),
    "dnsimple": Provider((("token",),), debian=("12",)),
    "gandi": Provider((("api_key",),), ("sharing_id",), ("12",)),
    "gehirn": Provider((("api_token", "api_secret"),), debian=("12",)),
    "google": Provider((("service_account",),)),
    "infomaniak": Provider((("token",),), debian=("13",)),
    "linode": Provider((("key",),), ("version",), ("12",)),
    "ovh": Provider((("application_key", "application_secret", "consumer_key"),), ("endpoint",)),
    "rfc2136": Provider((("server", "name", "secret"),), ("port", "algorithm", "sign_query")),
    "route53": Provider((("aws_access_key_id", "aws_secret_access_key"),)),
    "sakuracloud": Provider((("api_token", "api_secret"),), debian=("12",)),
}
# What may stand in an inventory; the others are secrets.
PUBLIC = {"aws_access_key_id", "email", "endpoint", "name", "port", "server", "sharing_id"}
PUBLIC |= {"algorithm", "sign_query", "version"}
OVH_ENDPOINTS = ("ovh-eu", "ovh-ca", "ovh-us")


def plugin_package(provider: str) -> str:
    """The Debian package of a provider's plugin for certbot."""
    return f"python3-certbot-dns-{provider}"


def of_release(debian: str) -> str:
    """The providers that can be had on a Debian release."""
    return ", ".join(name for name, provider in PROVIDERS.items() if debian in provider.debian)


def misfit(provider: str, given: Mapping[str, object]) -> str | None:
    """Why these keys are not the credentials of a provider; None if they are."""
    known = PROVIDERS[provider]
    keys = {key for way in known.ways for key in way} | set(known.more)
    for key in sorted(set(given) - keys):
        return f"credentials.{key} is none of {provider}'s: {', '.join(sorted(keys))}"
    if not any(set(given) - set(known.more) == set(way) for way in known.ways):
        return f"credentials for {provider} are {known.wanted}"
    if given.get("endpoint", OVH_ENDPOINTS[0]) not in OVH_ENDPOINTS:
        return f"credentials.endpoint is one of {', '.join(OVH_ENDPOINTS)}"
    return None
