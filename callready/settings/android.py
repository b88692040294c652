"""What an inventory may say about an Android app, and the rules its settings must keep.

Android reads a network security configuration (NSC) without complaining: a CIDR range, a
wildcard or a URL in `<domain>` parses and never matches, `no` is read as "yes", a duplicate
crashes the app. So nothing reaches the file that was not checked here.

Source of the rules: AOSP `android.security.net.config` (XmlConfigSource,
ApplicationConfig) and https://developer.android.com/privacy-and-security/security-config
"""

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import idna
from pydantic import BaseModel, ConfigDict, Field

from callready.settings.problem import Problem

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_EXPANDED = 256  # hosts; a wider range is a network plan, not a list of servers

# RFC 1123 section 2.1: letters, digits, hyphens (not at the ends), 63 characters a label.
LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
DASH_RANGE = re.compile(r"\d+\.[\d.]+-[\d.]+|[0-9a-f:]*:[0-9a-f:]*-[0-9a-f:]+", re.IGNORECASE)
LIST_HOSTS = "List hosts, or set dev cleartext to all (debug only)."
A_RANGE = '"{}" is a range; Android matches <domain> as an exact string. ' + LIST_HOSTS

# Where a debug build of React Native finds its bundler: itself (adb reverse), and the developer's
# machine from Android's emulator and from Genymotion (AndroidInfoHelpers.kt of React Native).
METRO = ("localhost", "10.0.2.2", "10.0.3.2")


class Domain(BaseModel):
    """A host, or a range of hosts, that the app connects to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(description="Host name (A-label), IP address or CIDR range.")
    scheme: Literal["wss", "ws"] = Field(
        "wss", description="`ws` permits cleartext; debug builds only."
    )
    scope: Literal["release", "debug"] = Field(
        "release", description="`release`: all builds; `debug`: debug and profile builds only."
    )
    include_subdomains: bool = Field(
        False, description="Match names below it too; never applied to an IP address."
    )
    pins: tuple[str, ...] = Field(
        (), description="SHA-256 of public keys (SPKI), base64; one in use and one backup."
    )
    pin_expiration: date | None = Field(
        None, description="From this day on Android ignores the pins."
    )
    expand: bool = Field(
        False, description=f"List every host of a range of up to {MAX_EXPANDED} hosts."
    )


class Android(BaseModel):
    """The Android part of an app's checkout that callready keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkout: str = Field(description="Absolute path of the app's project.")
    source_root: str = Field(
        "android/app/src", description="Folder of the source sets `main`, `debug` and `profile`."
    )
    file: str = Field("network_security_config.xml", description="Name of the file in `res/xml`.")
    domains: tuple[Domain, ...] = Field(
        (), description="Hosts beside the one of `livekit.url`, which is listed by itself."
    )
    debug_cleartext: Literal["listed", "all"] = Field(
        "listed", description="What debug builds may reach in cleartext: the `ws` hosts, or all."
    )
    react_native: bool = Field(
        False,
        description="Debug builds may load their code in cleartext from Metro, React Native's "
        f"bundler: {', '.join(METRO)}.",
    )
    private_ca: str | None = Field(
        None, description="Resource of a CA that debug builds trust: `@raw/name`."
    )
    release_private_ca: bool | None = Field(
        None, description="Whether release builds trust `private_ca` for the release hosts."
    )
    user_certificates: bool = Field(
        False, description="Debug builds trust the CAs a user installed (debugging proxies)."
    )
    client_settings: str = Field(
        "assets/callready.json",
        description="JSON file for the app alone, relative to the checkout.",
    )

    @property
    def manifest(self) -> str:
        """The app's main manifest, relative to the checkout."""
        return f"{self.source_root}/main/AndroidManifest.xml"

    @property
    def listed(self) -> tuple[Domain, ...]:
        """`domains`, and Metro where debug builds are to reach it and no entry is about it."""
        named = {domain.host for domain in self.domains}
        hosts = [host for host in METRO if self.react_native and host not in named]
        return (*self.domains, *(Domain(host=host, scheme="ws", scope="debug") for host in hosts))


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `host` spells (IPv6 with or without brackets), or None."""
    try:
        found = ipaddress.ip_address(host.strip().removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    if getattr(found, "scope_id", None):
        return None  # fe80::1%wlan0 names an interface of one device
    # OkHttp and InetAddress turn an IPv4-mapped address into the IPv4 address.
    return getattr(found, "ipv4_mapped", None) or found


def network(host: str) -> Network | None:
    """The range of more than one address that `host` spells, or None. Host bits may be set."""
    try:
        found = ipaddress.ip_network(host, strict=False)
    except ValueError:
        return None
    return found if found.num_addresses > 1 else None


def host_count(net: Network) -> int:
    """How many hosts `net.hosts()` yields, without listing them."""
    if net.max_prefixlen - net.prefixlen <= 1:
        return net.num_addresses
    return net.num_addresses - (2 if net.version == 4 else 1)


def canonical(host: str) -> str:
    """`host` as Android compares it: RFC 5952 or dotted IPv4, A-labels, lower case.

    Raises ValueError where it is neither a host name nor an IP address.
    """
    if found := address(host.removesuffix("/32").removesuffix("/128")):
        return str(found)
    name = host.strip().removesuffix(".").lower()
    if not name.isascii() or "xn--" in name:
        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(f'"{host}" is not a host name: {error}') from None
    labels = name.split(".")
    # A number as the last label makes it an IPv4 address to URL parsers, a wrong one here.
    if len(name) > 253 or labels[-1].isdigit() or not all(map(LABEL.fullmatch, labels)):
        raise ValueError(f'"{host}" is neither a host name nor an IP address')
    return name


def url_domain(livekit_url: str) -> Domain | None:
    """The host of the LiveKit URL as a domain of all builds, or None where it has none."""
    try:
        return Domain(host=canonical(urlsplit(livekit_url).hostname or ""))
    except ValueError:
        return None


def check(android: Android, livekit_url: str, today: date | None = None) -> Iterator[Problem]:
    """Everything that is wrong with `android`, and what is allowed and still worth a look.

    `today` (default: the local date) is what pin expirations are compared with.
    """
    today = today or date.today()
    yield from _paths(android)
    yield from _private_ca(android, livekit_url)
    for index, domain in enumerate(android.domains):
        for problem in (
            *_host(domain, android.debug_cleartext),
            *_cleartext(domain, android.react_native),
            *_pins(domain, today),
        ):
            yield problem._replace(key=f"android.domains[{index}].{problem.key}")
    yield from _duplicates(android.domains)
    yield from _url(android, livekit_url)
    yield from _warnings(android, today)


# JSON files that the tools of apps keep in a checkout (npm, TypeScript, React Native, Firebase).
_OTHERS = ("package.json", "package-lock.json", "tsconfig.json", "app.json", "google-services.json")


def _paths(android: Android) -> Iterator[Problem]:
    if not android.checkout.startswith("/"):
        yield Problem("android.checkout", f'"{android.checkout}" is not an absolute path')
    for name in ("source_root", "client_settings"):
        path: str = getattr(android, name)
        parts = PurePosixPath(path).parts
        if not path or path.startswith(("/", "-")) or ".." in parts or not path.isprintable():
            yield Problem(f"android.{name}", f'"{path}" is not a path inside the checkout')
        elif ".git" in map(str.lower, parts):
            yield Problem(f"android.{name}", f'"{path}" is a place of git\'s own')
        elif name == "client_settings" and (not path.endswith(".json") or parts[-1] in _OTHERS):
            why = "is not a .json file of its own, which is written anew at each change: write"
            yield Problem(f"android.{name}", f'"{path}" {why} assets/callready.json')
    if not re.fullmatch(r"[a-z][a-z0-9_]*\.xml", android.file):
        why = r"is no name for an Android resource; it must match [a-z][a-z0-9_]*\.xml"
        yield Problem("android.file", f'"{android.file}" {why}')


def _private_ca(android: Android, livekit_url: str) -> Iterator[Problem]:
    ca = android.private_ca
    if ca is None:
        if android.release_private_ca:
            yield Problem("android.release_private_ca", "names no CA; set android.private_ca")
        return
    if not re.fullmatch(r"@raw/[a-z][a-z0-9_]*", ca):
        yield Problem(
            "android.private_ca",
            f'"{ca}" is not a raw resource; put the certificate (PEM or DER) into '
            'res/raw/my_ca.pem and write "@raw/my_ca"',
        )
    # Left unsaid, debug builds would connect and release builds would not.
    release_hosts = livekit_url.lower().startswith("wss:") or any(
        domain.scheme == "wss" and domain.scope == "release" for domain in android.domains
    )
    if release_hosts and android.release_private_ca is None:
        yield Problem(
            "android.private_ca",
            f'a private CA ("{ca}") is for debug builds; say what release builds do: '
            "release_private_ca = False if their hosts' certificates are publicly trusted, True "
            "to ship the private CA in release builds",
        )


def _host(domain: Domain, debug_cleartext: str) -> Iterator[Problem]:
    if message := _wrong_host(domain.host):
        yield Problem("host", message)
    elif net := network(domain.host):
        covered_by_base = debug_cleartext == "all" and domain.scheme == "ws"
        if domain.expand and host_count(net) > MAX_EXPANDED:
            yield Problem(
                "host",
                f'"{domain.host}" has {host_count(net)} hosts; expand lists up to {MAX_EXPANDED}. '
                + LIST_HOSTS,
            )
        elif not domain.expand and not (covered_by_base and domain.scope == "debug"):
            yield Problem("host", A_RANGE.format(domain.host))
    elif domain.expand:
        yield Problem("expand", f'"{domain.host}" is not a range')


def _wrong_host(host: str) -> str | None:
    """Why Android would never match `host` (a name, an address or a CIDR range), or None."""
    if not host.strip():
        return "a domain is empty"
    if "$" in host or "{" in host:
        return f'domain "{host}" is a placeholder that nothing fills in; write the host itself'
    if "," in host or len(host.split()) > 1:
        return f'domain "{host}": one host an entry'
    if "*" in host or host.startswith("."):
        name = host.rpartition("*")[2].lstrip(".")
        instead = f"use {name} with include_subdomains" if name else LIST_HOSTS
        return f'domain "{host}" never matches; {instead}'
    if net := network(host):
        return None if str(net) == host else f"{host} is not canonical; use {net}"
    if DASH_RANGE.fullmatch(host):
        return A_RANGE.format(host)
    if _has_url_parts(host):
        return f'domain "{host}": remove scheme, port and path; NSC has no port scope'
    try:
        name = canonical(host)
    except ValueError as error:
        return str(error)
    return None if name == host else f"{host} is not canonical; use {name}"


def _has_url_parts(host: str) -> bool:
    if address(host.removesuffix("/32").removesuffix("/128")):
        return False
    return "/" in host or "?" in host or "@" in host or bool(re.search(r"(^[^:]*|\]):\d*$", host))


def _cleartext(domain: Domain, react_native: bool) -> Iterator[Problem]:
    if domain.scheme == "wss":
        if react_native and domain.host in METRO:
            yield Problem(
                "scheme",
                f"Metro is reached at {domain.host} in cleartext (android.react_native): remove "
                "the entry",
            )
        return
    if domain.scope == "release":
        yield Problem(
            "scheme",
            f'cleartext to "{domain.host}" in release builds: use wss:// or scope it to debug '
            '(scope = "debug")',
        )
    if domain.pins:
        yield Problem("pins", "pins are checked in TLS, a ws:// connection has none; use wss://")


def _pins(domain: Domain, today: date) -> Iterator[Problem]:
    if not domain.pins:
        return
    for index, pin in enumerate(domain.pins):
        if message := _wrong_pin(pin):
            yield Problem(f"pins[{index}]", message)
    if len(set(domain.pins)) < 2:
        yield Problem(
            "pins",
            "no backup pin; when the one key must be replaced, every installed app is cut off. "
            "Add the pin of a second key that is kept off the host",
        )
    if domain.pin_expiration is None:
        yield Problem(
            "pin_expiration",
            "missing; without it an app that is not updated is cut off for good. Set a day, and "
            "update the app before it",
        )
    elif domain.pin_expiration <= today:
        yield Problem(
            "pin_expiration",
            f"{domain.pin_expiration} is past; Android silently stops checking the pins. Set a "
            "later day",
        )


def _wrong_pin(pin: str) -> str | None:
    if re.search(r"\s", pin):
        return "white space in the pin; Android does not trim it"
    try:
        decoded = base64.b64decode(pin, validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if len(decoded) != 32:
        return f'"{pin}" is not the base64 of 32 bytes (SHA-256 of the public key)'
    return None


def _duplicates(domains: tuple[Domain, ...]) -> Iterator[Problem]:
    """Hosts that would be listed twice. An entry of its own takes a host out of a range."""
    single: dict[str, int] = {}
    ranges: list[tuple[int, Network]] = []
    for index, domain in enumerate(domains):
        net = network(domain.host)
        name = _comparable(domain.host)
        if net is None:
            clash = single.setdefault(name, index)
        elif domain.expand:
            clash = next((at for at, other in ranges if other.overlaps(net)), index)
            ranges.append((index, net))
        else:
            continue  # no host of it is listed
        if clash != index:
            yield Problem(
                f"android.domains[{index}].host",
                f"domain {name} duplicated: the app crashes on its first connection (already in "
                f"android.domains[{clash}])",
            )


def _comparable(host: str) -> str:
    try:
        return canonical(host)
    except ValueError:
        return host.strip().lower()


def _url(android: Android, livekit_url: str) -> Iterator[Problem]:
    scheme = livekit_url.partition(":")[0].lower()
    own = url_domain(livekit_url)
    if scheme not in ("ws", "wss") or own is None:
        # Its text may hold a password.
        yield Problem("livekit.url", "must be wss://host or ws://host")
        return
    governing = governs(android.listed, own.host)
    if scheme == "ws" and not (governing and governing.scheme == "ws"):
        yield Problem(
            "livekit.url",
            f"cleartext (ws://) to {own.host} in release builds: use wss:// or scope it to debug: "
            f'add {{"host": "{own.host}", "scheme": "ws", "scope": "debug"}} to android.domains',
        )
    for index, domain in enumerate(android.domains):
        if scheme == "wss" and domain.host == own.host and domain.scheme == "ws":
            yield Problem(
                f"android.domains[{index}].scheme",
                f"livekit.url reaches {own.host} over wss://; NSC has no port scope, so this would "
                "permit cleartext to it. Remove the entry",
            )


def _warnings(android: Android, today: date) -> Iterator[Problem]:
    ca = android.private_ca
    found: list[tuple[str, str]] = []
    if android.debug_cleartext == "all":
        text = "debug builds may send cleartext to every unlisted host"
        found.append(("debug_cleartext", text))
    if android.user_certificates:
        found.append(("user_certificates", "debug builds trust every CA that a user installed"))
    if ca:
        text = f"Dart (Flutter's signalling) and TURN/TLS ignore {ca}"
        found.append(("private_ca", f"{text}; only a publicly trusted certificate works there"))
    if ca and android.release_private_ca:
        found.append(("release_private_ca", f"release builds trust {ca}"))
    for index, domain in enumerate(android.domains):
        at, until = f"domains[{index}]", domain.pin_expiration
        # Android lint (PinSetExpiry) warns from 10 days before.
        if domain.pins and until and until <= today + timedelta(days=10):
            found.append((f"{at}.pin_expiration", f"the pins expire on {until}"))
        if domain.include_subdomains and (address(domain.host) or network(domain.host)):
            found.append((f"{at}.include_subdomains", f"ignored; {domain.host} is an address"))
    for key, text in found:
        yield Problem(f"android.{key}", text, "warning")


def governs(domains: tuple[Domain, ...], host: str) -> Domain | None:
    """The entry that decides about `host`: itself, its range, or the longest parent domain."""
    ip = address(host)
    parents = []
    for domain in domains:
        if domain.host == host:
            return domain
        net = network(domain.host)
        in_range = ip and net and ip in net
        below = domain.include_subdomains and not ip and host.endswith("." + domain.host)
        if in_range or below:
            parents.append(domain)
    return max(parents, key=lambda domain: len(domain.host), default=None)
