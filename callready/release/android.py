"""The files of an Android app that follow from the fleet: its network security configuration
(NSC) for each build, and the client settings. Also what its manifest lacks.

docs/android.md says what an NSC governs, and what it does not.
"""

import ipaddress
import json
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import PurePosixPath
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from callready.release import render as templates
from callready.settings.android import (
    METRO,
    Android,
    Domain,
    Network,
    address,
    governs,
    network,
    url_domain,
)
from callready.settings.fleet import Fleet
from callready.settings.uris import stun_uris, turn_uris

Build = Literal["release", "debug", "profile"]

# Gradle's source sets: `main` is in every build, the build type's own file replaces it.
SOURCE_SETS: dict[Build, str] = {"release": "main", "debug": "debug", "profile": "profile"}

# What needs ACCESS_LOCAL_NETWORK from target SDK 37 on:
# https://developer.android.com/privacy-and-security/local-network-definition
# (fc00::/7 stands for its "directly connected routes").
LOCAL_NETWORKS: list[Network] = [
    *map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")),
    *map(ipaddress.IPv4Network, ("100.64.0.0/10", "169.254.0.0/16")),
    *map(ipaddress.IPv6Network, ("fe80::/10", "fc00::/7")),
]

NAME = "{http://schemas.android.com/apk/res/android}"


class Group(NamedTuple):
    """What the hosts of one `<domain-config>` share."""

    cleartext: bool
    pins: tuple[str, ...]
    pin_expiration: date | None
    private_ca: str | None


Groups = dict[Group, list[tuple[str, bool]]]
"""With the name of each host, and its includeSubdomains."""


def render(android: Android, livekit_url: str) -> dict[str, bytes]:
    """The NSC of every build: path relative to the checkout -> content.

    `android` must be free of `settings.android.problems`. The same input gives the same bytes.
    """
    return {
        f"{android.source_root}/{source_set}/res/xml/{android.file}": _render(
            android, livekit_url, build
        )
        for build, source_set in SOURCE_SETS.items()
    }


def _render(android: Android, livekit_url: str, build: Build) -> bytes:
    debug = build != "release"
    groups = _groups(android, livekit_url, debug)
    # A release build's base-config refuses cleartext already, but without an entry of its own a
    # host would take the pins of a parent domain.
    pinned_parent = any(
        group.pins and any(include_subdomains for _, include_subdomains in names)
        for group, names in groups.items()
    )
    anchors = [android.private_ca] if android.private_ca else []
    anchors += ["user"] if android.user_certificates else []
    return templates.render(
        "network_security_config.xml.j2",
        base_cleartext=debug and android.debug_cleartext == "all",
        groups=[
            (group, names)
            for group, names in groups.items()
            if debug or group.pins or group.private_ca or pinned_parent
        ],
        debug_anchors=anchors if debug else [],
    )


def _groups(android: Android, livekit_url: str, debug: bool) -> Groups:
    domains = _domains(android, livekit_url)
    listed = {domain.host for domain in domains}
    groups: Groups = {}
    for domain in domains:
        if domain.scope == "debug" and not debug:
            continue
        for_release = domain.scheme == "wss" and domain.scope == "release"
        group = Group(
            domain.scheme == "ws",
            domain.pins,
            domain.pin_expiration if domain.pins else None,
            android.private_ca if for_release and android.release_private_ca else None,
        )
        groups.setdefault(group, []).extend(_names(domain, listed))
    return {group: names for group, names in groups.items() if names}


def _domains(android: Android, livekit_url: str) -> list[Domain]:
    """The LiveKit URL's host first, unless it is ws:// or an entry speaks for it; the entries."""
    own = url_domain(livekit_url)
    if own is None or not livekit_url.lower().startswith("wss:"):
        return list(android.listed)
    entry = governs(android.listed, own.host)
    if entry and (entry.host == own.host or (entry.scheme, entry.scope) == ("wss", "release")):
        return list(android.listed)
    return [own, *android.listed]


def _names(domain: Domain, listed: set[str]) -> Iterator[tuple[str, bool]]:
    """The `<domain>` texts of an entry, each with its includeSubdomains."""
    net = network(domain.host)
    if net is None:
        yield from _spellings(domain.host, domain.include_subdomains)
    elif domain.expand:
        for host in map(str, net.hosts()):
            if host not in listed:  # an entry of its own says something else about it
                yield from _spellings(host, False)


def _spellings(host: str, include_subdomains: bool) -> Iterator[tuple[str, bool]]:
    ip = address(host)
    # With includeSubdomains an address would match other hosts by their suffix.
    yield host, include_subdomains and ip is None
    if ip and ip.version == 6:
        yield f"[{host}]", False  # some callers pass the URL's spelling


def files(fleet: Fleet, name: str) -> dict[str, bytes]:
    """Every file that a host's checkout shall have: path relative to it -> content; none without
    an app and an SFU."""
    settings, livekit = fleet[name].android, fleet[name].livekit
    if settings is None or livekit is None:
        return {}
    uris = stun_uris(fleet, name, "android"), turn_uris(fleet, name, "android")
    told = client_settings(livekit.url, *uris, livekit.rtc.turn_ttl)
    return {**render(settings, livekit.url), settings.client_settings: told}


def client_settings(
    livekit_url: str, stun_uris: Iterable[str], turn_uris: Iterable[str], ttl: int
) -> bytes:
    """The app's JSON file: where to connect, and no secret.

    `stun_uris` and `turn_uris` are RFC 7064 and RFC 7065 URIs, `ttl` is the life of the TURN
    credentials that the app's backend hands out, in seconds.
    """
    uris = {"stun_uris": list(stun_uris), "turn_uris": list(turn_uris)}
    settings = {"livekit_url": livekit_url, **uris, "turn_ttl": ttl}
    return (json.dumps(settings, indent=2) + "\n").encode()


def manifest_advice(
    android: Android,
    livekit_url: str,
    manifest_xml: str | bytes | None,
    media_addresses: Iterable[str] = (),
) -> list[str]:
    """What to change in the main manifest, which is never edited; empty where all is in place.

    `manifest_xml` is the file `android.manifest`, None where it does not exist.
    `media_addresses` are the IP addresses of the fleet's SFU and TURN hosts.
    """
    path = android.manifest
    if manifest_xml is None:
        return [f"{path}: not found; check android.checkout and android.source_root"]
    try:
        manifest = ElementTree.fromstring(manifest_xml)
    except (ElementTree.ParseError, ValueError) as error:
        return [f"{path}: not well-formed XML ({error}); nothing in it was checked"]
    # Not Metro: what debug builds reach is no reason for a permission of release builds.
    hosts = [d.host for d in _domains(android, livekit_url) if d.host not in METRO]
    local = [host for host in (*hosts, *media_addresses) if _is_local(host)]
    advice = [*_application_advice(android, manifest), *_permission_advice(manifest, local)]
    return [f"{path}: {message}" for message in advice]


REACT_NATIVE = r'com\.facebook\.react|react-native/|"react-native" *:'
"""What `grep -E` finds in the `build_files` of a React Native project, Expo's too."""


def build_files(android: Android) -> list[str]:
    """The files that say what kind of project it is, relative to the checkout."""
    module = PurePosixPath(android.source_root).parent
    return ["package.json", f"{module}/build.gradle", f"{module}/build.gradle.kts"]


def metro_advice(android: Android) -> str | None:
    """What to set in a React Native project, whose debug builds would not start without it."""
    governing = [governs(android.listed, host) for host in METRO[:2]]
    others = android.debug_cleartext == "all"
    if all(domain.scheme == "ws" if domain else others for domain in governing):
        return None
    return (
        f"{android.checkout} is a React Native project: its debug builds load their code from "
        f"Metro ({METRO[0]}, {METRO[1]}) in cleartext, which the files written here forbid: set "
        "android.react_native to True"
    )


def _application_advice(android: Android, manifest: ElementTree.Element) -> Iterator[str]:
    application = manifest.find("application")
    attributes = {} if application is None else application.attrib
    wanted = f"@xml/{android.file.removesuffix('.xml')}"
    present = attributes.get(f"{NAME}networkSecurityConfig")
    if present is None:
        yield f'add android:networkSecurityConfig="{wanted}" to <application>'
    elif present != wanted:
        yield (
            f'android:networkSecurityConfig is "{present}"; change it to "{wanted}", '
            "or the file written here is not used"
        )
    if f"{NAME}usesCleartextTraffic" in attributes:
        yield (
            "remove android:usesCleartextTraffic from <application>; "
            "it is ignored once a network security configuration is set"
        )


def _permission_advice(manifest: ElementTree.Element, local: list[str]) -> Iterator[str]:
    present = {element.get(f"{NAME}name") for element in manifest.iter("uses-permission")}
    if "android.permission.INTERNET" not in present:
        yield (
            'add <uses-permission android:name="android.permission.INTERNET" />; '
            "Flutter's template has it for debug and profile builds only"
        )
    if local and "android.permission.ACCESS_LOCAL_NETWORK" not in present:
        yield (
            'add <uses-permission android:name="android.permission.ACCESS_LOCAL_NETWORK" /> and '
            "ask for it at run time: with target SDK 37 Android 17 blocks addresses of the local "
            f"network without it, WebRTC media included ({', '.join(local)})"
        )


def _is_local(host: str) -> bool:
    ip = address(host)
    if ip:
        return any(ip in net for net in LOCAL_NETWORKS)
    if net := network(host):
        return any(net.overlaps(local) for local in LOCAL_NETWORKS)
    return host.endswith(".local")
