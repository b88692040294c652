"""The Android files: every rule of the settings, the bytes rendered, and what Android makes of
them, by `aapt2` (Debian: aapt, android-framework-res) and by Android's own matching rule."""

import base64
import ipaddress
import json
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from callready.release import android as files
from callready.release import render
from callready.settings.android import Android, check

DATA = Path(__file__).parent / "data" / "android"
FRAMEWORK = "/usr/share/android-framework-res/framework-res.apk"
TODAY = date(2030, 6, 15)
WSS = "wss://livekit.example.com"
PINS = [base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2)]
PINNED = {"pins": PINS, "pin_expiration": "2031-01-01"}
RANGE = "Android matches <domain> as an exact string. "
NO_PORT = "remove scheme, port and path; NSC has no port scope"
NEVER = "never matches; use example.com with include_subdomains"
PLACEHOLDER = "is a placeholder that nothing fills in; write the host itself"
LIST_HOSTS = "List hosts, or set dev cleartext to all (debug only)."


def ws(host: str, **more: Any) -> dict[str, Any]:
    return {"host": host, "scheme": "ws", "scope": "debug", **more}


def problems(android: Android, livekit_url: str, today: date, level: str = "error") -> list[str]:
    found = check(android, livekit_url, today)
    return [f"{problem.key}: {problem.message}" for problem in found if problem.level == level]


def settings(*domains: dict[str, Any], **more: Any) -> Android:
    return Android.model_validate({"checkout": "/srv/app", "domains": domains, **more})


# name -> (settings, LiveKit URL); each build of each is kept as data/android/<name>.<build>.xml
CASES: dict[str, tuple[Android, str]] = {
    "production": (settings(), WSS),
    "lab": (
        settings(ws("sfu1.lab.test"), ws("198.51.100.11"), ws("2001:db8:ca11::11")),
        "ws://sfu1.lab.test:7880",
    ),
    "cleartext-all": (
        settings(
            ws("172.16.0.0/12"),
            ws("dev.example.com"),
            {"host": "172.16.9.9"},
            debug_cleartext="all",
            user_certificates=True,
        ),
        WSS,
    ),
    "pins-and-ca": (
        settings(
            {"host": "livekit.example.com", **PINNED},
            {"host": "example.com", "include_subdomains": True},
            {"host": "xn--bcher-kva.example", "scope": "debug"},
            ws("lan.example.com", include_subdomains=True),
            ws("192.168.1.8/30", expand=True),
            ws("fd00::/126", expand=True),
            {"host": "192.168.1.10", "include_subdomains": True},
            private_ca="@raw/lab_ca",
            release_private_ca=True,
            user_certificates=True,
        ),
        "wss://livekit.example.com:443/path",
    ),
    "pinned-parent": (
        settings(
            {"host": "example.com", "include_subdomains": True, **PINNED},
            {"host": "cdn.example.com"},
            ws("lan.example.com"),
        ),
        WSS,
    ),
    "private-ca-in-debug": (settings(private_ca="@raw/lab_ca", release_private_ca=False), WSS),
    "react-native": (settings(ws("192.168.1.10"), react_native=True), WSS),
    "ranges": (settings(ws("192.168.1.0/24", expand=True)), "ws://192.168.1.10:7880"),
}
BUILDS = {"release": "main", "debug": "debug", "profile": "profile"}
EVERY_FILE = [(case, build) for case in CASES for build in BUILDS]


def rendered(case: str, build: str) -> bytes:
    android, url = CASES[case]
    path = f"android/app/src/{BUILDS[build]}/res/xml/network_security_config.xml"
    return files.render(android, url)[path]


# --- settings: what is refused, and with which words


@pytest.mark.parametrize("case", CASES)
def test_the_rendered_cases_are_free_of_problems(case: str) -> None:
    assert problems(*CASES[case], today=TODAY) == []


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("172.16.0.0/12", f'"172.16.0.0/12" is a range; {RANGE}{LIST_HOSTS}'),
        ("fd00::/8", f'"fd00::/8" is a range; {RANGE}{LIST_HOSTS}'),
        ("10.0.0.1-10.0.0.9", f'"10.0.0.1-10.0.0.9" is a range; {RANGE}{LIST_HOSTS}'),
        ("10.0.0.1-9", f'"10.0.0.1-9" is a range; {RANGE}{LIST_HOSTS}'),
        ("fd00::1-fd00::9", f'"fd00::1-fd00::9" is a range; {RANGE}{LIST_HOSTS}'),
        ("http://h:7880", f'domain "http://h:7880": {NO_PORT}'),
        ("h:7880", f'domain "h:7880": {NO_PORT}'),
        ("h/rtc", f'domain "h/rtc": {NO_PORT}'),
        ("u@h", f'domain "u@h": {NO_PORT}'),
        ("10.0.0.1:80", f'domain "10.0.0.1:80": {NO_PORT}'),
        ("[fd00::1]:80", f'domain "[fd00::1]:80": {NO_PORT}'),
        ("Live.Example.com", "Live.Example.com is not canonical; use live.example.com"),
        ("example.com.", "example.com. is not canonical; use example.com"),
        (" h.test", " h.test is not canonical; use h.test"),
        ("bücher.example", "bücher.example is not canonical; use xn--bcher-kva.example"),
        ("Ｈ.test", "Ｈ.test is not canonical; use h.test"),  # noqa: RUF001
        ("FD00:0::10", "FD00:0::10 is not canonical; use fd00::10"),
        ("[fd00::10]", "[fd00::10] is not canonical; use fd00::10"),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1 is not canonical; use 10.0.0.1"),
        ("10.0.0.1/32", "10.0.0.1/32 is not canonical; use 10.0.0.1"),
        ("192.168.1.5/24", "192.168.1.5/24 is not canonical; use 192.168.1.0/24"),
        ("*.example.com", f'domain "*.example.com" {NEVER}'),
        (".example.com", f'domain ".example.com" {NEVER}'),
        ("*", f'domain "*" never matches; {LIST_HOSTS}'),
        ("192.168.1.*", f'domain "192.168.1.*" never matches; {LIST_HOSTS}'),
        ("a.test,b.test", 'domain "a.test,b.test": one host an entry'),
        ("a.test b.test", 'domain "a.test b.test": one host an entry'),
        ("${HOST}", 'domain "${HOST}" ' + PLACEHOLDER),
        ("{{ host }}", 'domain "{{ host }}" ' + PLACEHOLDER),
        ("", "a domain is empty"),
        ("192.168.1.300", '"192.168.1.300" is neither a host name nor an IP address'),
        ("192.168.001.010", '"192.168.001.010" is neither a host name nor an IP address'),
        ("my_host.test", '"my_host.test" is neither a host name nor an IP address'),
        ("-a.test", '"-a.test" is neither a host name nor an IP address'),
        ("a..test", '"a..test" is neither a host name nor an IP address'),
        ("fe80::1%wlan0", '"fe80::1%wlan0" is neither a host name nor an IP address'),
    ],
)
def test_a_host_that_would_never_match_is_refused(host: str, message: str) -> None:
    found = problems(settings(ws(host)), WSS, TODAY)
    assert found == [f"android.domains[0].host: {message}"]


@pytest.mark.parametrize(
    "host", ["localhost", "turn1", "a-1.example.com", "10.0.2.2", "fd00::10", "r3---sn.example.com"]
)
def test_canonical_hosts_are_taken(host: str) -> None:
    assert problems(settings({"host": host}), WSS, TODAY) == []


def test_idna_errors_are_sentences() -> None:
    (found,) = problems(settings({"host": "xn--\u00fc.test"}), WSS, TODAY)
    assert found.startswith('android.domains[0].host: "xn--ü.test" is not a host name: ')


@pytest.mark.parametrize(
    ("domain", "debug_cleartext", "found"),
    [
        (ws("192.168.1.0/24", expand=True), "listed", []),
        (ws("fd00::/120", expand=True), "listed", []),
        (ws("172.16.0.0/12"), "all", []),
        (
            {"host": "172.16.0.0/12"},
            "all",
            [f'host: "172.16.0.0/12" is a range; {RANGE}{LIST_HOSTS}'],
        ),
        (
            ws("172.16.0.0/12", expand=True),
            "listed",
            [f'host: "172.16.0.0/12" has 1048574 hosts; expand lists up to 256. {LIST_HOSTS}'],
        ),
        (
            ws("192.168.0.0/23", expand=True),
            "all",
            [f'host: "192.168.0.0/23" has 510 hosts; expand lists up to 256. {LIST_HOSTS}'],
        ),
        (
            ws("fd00::/119", expand=True),
            "listed",
            [f'host: "fd00::/119" has 511 hosts; expand lists up to 256. {LIST_HOSTS}'],
        ),
        (ws("10.0.0.1", expand=True), "listed", ['expand: "10.0.0.1" is not a range']),
        (
            {"host": "172.16.0.0/12", "scheme": "ws"},
            "all",
            [
                f'host: "172.16.0.0/12" is a range; {RANGE}{LIST_HOSTS}',
                'scheme: cleartext to "172.16.0.0/12" in release builds: use wss:// or scope it '
                'to debug (scope = "debug")',
            ],
        ),
    ],
)
def test_ranges(domain: dict[str, Any], debug_cleartext: str, found: list[str]) -> None:
    android = settings(domain, debug_cleartext=debug_cleartext)
    assert problems(android, WSS, TODAY) == [f"android.domains[0].{line}" for line in found]


NO_BACKUP = (
    "pins: no backup pin; when the one key must be replaced, every installed app is cut off. "
    "Add the pin of a second key that is kept off the host"
)
SHORT = base64.b64encode(b"x" * 31).decode()


@pytest.mark.parametrize(
    ("domain", "found"),
    [
        (PINNED, []),
        ({**PINNED, "pins": PINS[:1]}, [NO_BACKUP]),
        ({**PINNED, "pins": [PINS[0], PINS[0]]}, [NO_BACKUP]),
        (
            {"pins": PINS},
            [
                "pin_expiration: missing; without it an app that is not updated is cut off for "
                "good. Set a day, and update the app before it"
            ],
        ),
        (
            {"pins": PINS, "pin_expiration": "2030-06-15"},  # Android: from midnight of that day
            [
                "pin_expiration: 2030-06-15 is past; Android silently stops checking the pins. "
                "Set a later day"
            ],
        ),
        (
            {**PINNED, "pins": [PINS[0], PINS[1] + "\n"]},
            ["pins[1]: white space in the pin; Android does not trim it"],
        ),
        *(
            (
                {**PINNED, "pins": [pin, PINS[1]]},
                [f'pins[0]: "{pin}" is not the base64 of 32 bytes (SHA-256 of the public key)'],
            )
            for pin in (
                SHORT,
                PINS[0][:9] + "!" + PINS[0][9:],
                "sha256/" + PINS[0],
                "ü",
                PINS[0].rstrip("="),
                "",
            )
        ),
        (
            {**PINNED, "scheme": "ws", "scope": "debug"},
            ["pins: pins are checked in TLS, a ws:// connection has none; use wss://"],
        ),
    ],
)
def test_pins(domain: dict[str, Any], found: list[str]) -> None:
    android = settings({"host": "pinned.example.com", **domain})
    assert problems(android, WSS, TODAY) == [f"android.domains[0].{line}" for line in found]


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"host": "a.test"}, {"host": "a.test"}, "a.test"),
        (ws("fd00::10"), {"host": "fd00::10"}, "fd00::10"),
        (ws("10.0.0.0/24", expand=True), ws("10.0.0.128/25", expand=True), "10.0.0.128/25"),
    ],
)
def test_a_duplicate_is_refused(first: dict[str, Any], second: dict[str, Any], name: str) -> None:
    assert problems(settings(first, {"host": "b.test"}, second), WSS, TODAY) == [
        f"android.domains[2].host: domain {name} duplicated: the app crashes on its first "
        "connection (already in android.domains[0])"
    ]


def test_duplicates_are_found_whatever_the_case() -> None:
    found = problems(settings({"host": "a.test"}, {"host": "A.Test"}), WSS, TODAY)
    assert found == [
        "android.domains[1].host: A.Test is not canonical; use a.test",
        "android.domains[1].host: domain a.test duplicated: the app crashes on its first "
        "connection (already in android.domains[0])",
    ]


def test_metro_is_reached_in_debug_builds_whatever_else_is_said_about_it() -> None:
    android = settings(ws("localhost"), ws("10.0.2.0/24", expand=True), react_native=True)
    assert problems(android, WSS, TODAY) == []
    assert problems(settings(react_native=True), "ws://10.0.2.2:7880", TODAY) == []
    assert problems(settings({"host": "10.0.2.2"}, react_native=True), WSS, TODAY) == [
        "android.domains[0].scheme: Metro is reached at 10.0.2.2 in cleartext "
        "(android.react_native): remove the entry"
    ]


def test_ranges_that_are_not_listed_may_overlap() -> None:
    android = settings(ws("10.0.0.0/8"), ws("10.1.0.0/16"), debug_cleartext="all")
    assert problems(android, WSS, TODAY) == []


@pytest.mark.parametrize(
    ("url", "domains", "found"),
    [
        ("ws://sfu1.lab.test:7880", [ws("sfu1.lab.test")], []),
        ("ws://sfu1.lab.test:7880", [ws("lab.test", include_subdomains=True)], []),
        ("ws://[fd00::10]:7880", [ws("fd00::10")], []),
        ("ws://10.0.0.7:7880", [ws("10.0.0.0/28", expand=True)], []),
        *(
            (
                "ws://sfu1.lab.test:7880",
                domains,
                [
                    "livekit.url: cleartext (ws://) to sfu1.lab.test in release builds: use "
                    'wss:// or scope it to debug: add {"host": "sfu1.lab.test", "scheme": "ws", '
                    '"scope": "debug"} to android.domains'
                ],
            )
            for domains in (
                [],
                [{"host": "sfu1.lab.test"}],
                [ws("lab.test")],
                [ws("lab.test", include_subdomains=True), {"host": "sfu1.lab.test"}],
                [ws("1.lab.test", include_subdomains=True)],
                [
                    ws("test", include_subdomains=True),
                    {"host": "lab.test", "include_subdomains": True},
                ],
            )
        ),
        (
            WSS,
            [ws("livekit.example.com")],
            [
                "android.domains[0].scheme: livekit.url reaches livekit.example.com over wss://; "
                "NSC has no port scope, so this would permit cleartext to it. Remove the entry"
            ],
        ),
        ("https://h.test", [], ["livekit.url: must be wss://host or ws://host"]),
        ("wss://", [], ["livekit.url: must be wss://host or ws://host"]),
    ],
)
def test_the_livekit_url(url: str, domains: list[dict[str, Any]], found: list[str]) -> None:
    assert problems(settings(*domains), url, TODAY) == found


PRIVATE_CA = (
    'android.private_ca: a private CA ("@raw/lab_ca") is for debug builds; say what release '
    "builds do: release_private_ca = False if their hosts' certificates are publicly trusted, "
    "True to ship the private CA in release builds"
)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"private_ca": "@raw/lab_ca"}, [PRIVATE_CA]),
        ({"private_ca": "@raw/lab_ca", "release_private_ca": False}, []),
        (
            {"release_private_ca": True},
            ["android.release_private_ca: names no CA; set android.private_ca"],
        ),
        (
            {"private_ca": "lab_ca.pem", "release_private_ca": True},
            [
                'android.private_ca: "lab_ca.pem" is not a raw resource; put the certificate '
                '(PEM or DER) into res/raw/my_ca.pem and write "@raw/my_ca"'
            ],
        ),
        *(
            (
                {"file": name},
                [
                    f'android.file: "{name}" is no name for an Android resource; '
                    r"it must match [a-z][a-z0-9_]*\.xml"
                ],
            )
            for name in ("Network.xml", "net-sec.xml", "1.xml", "nsc", "a.xml\n", "../a.xml")
        ),
        ({"checkout": "app"}, ['android.checkout: "app" is not an absolute path']),
        *(
            (
                {"client_settings": path},
                [
                    f'android.client_settings: "{path}" is not a .json file of its own, which is '
                    "written anew at each change: write assets/callready.json"
                ],
            )
            for path in (
                *("android/app/src/main/AndroidManifest.xml", "pubspec.yaml", "assets/", "assets"),
                "android/app/src/./main/res/xml/network_security_config.xml",
                *("package.json", "android/app/google-services.json", "assets/callready.json/"),
            )
        ),
        *(
            (
                {"client_settings": path},
                [f'android.client_settings: "{path}" is a place of git\'s own'],
            )
            for path in (".git/config", ".git/callready.json", "modules/x/.GIT/callready.json")
        ),
        *(
            (
                {"client_settings": path},
                [f'android.client_settings: "{path}" is not a path inside the checkout'],
            )
            for path in ("", "-x.json", "a\n.json", "a/../b.json")
        ),
        ({"source_root": ".git/src"}, ['android.source_root: ".git/src" is a place of git\'s own']),
        ({"client_settings": "./assets/my.json", "source_root": "."}, []),
        (
            {"source_root": "/app/src", "client_settings": "../x.json"},
            [
                'android.source_root: "/app/src" is not a path inside the checkout',
                'android.client_settings: "../x.json" is not a path inside the checkout',
            ],
        ),
    ],
)
def test_paths_and_private_ca(more: dict[str, Any], found: list[str]) -> None:
    assert problems(settings(**more), WSS, TODAY) == found


def test_a_private_ca_where_no_release_host_uses_tls_needs_no_word_about_release() -> None:
    android = settings(ws("h.test"), private_ca="@raw/lab_ca")
    assert problems(android, "ws://h.test", TODAY) == []


def test_all_problems_come_at_once() -> None:
    android = settings(ws("http://h:7880"), ws("*.x"), ws("10.0.0.0/8"), file="N.xml")
    places = [line.partition(": ")[0] for line in problems(android, "ws://h.test", TODAY)]
    assert places == [
        "android.file",
        "android.domains[0].host",
        "android.domains[1].host",
        "android.domains[2].host",
        "livekit.url",
    ]


def test_an_unknown_key_and_a_wrong_word_are_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        settings({"host": "h.test", "port": 1}, ws("i.test", scheme="http"), cleartext="all")
    assert [error["loc"] for error in caught.value.errors()] == [
        ("domains", 0, "port"),
        ("domains", 1, "scheme"),
        ("cleartext",),
    ]


def test_warnings() -> None:
    android = settings(
        {"host": "p.test", "pins": PINS, "pin_expiration": "2030-06-25"},
        {"host": "q.test", "pins": PINS, "pin_expiration": "2030-06-26"},
        {"host": "10.0.0.1", "include_subdomains": True},
        debug_cleartext="all",
        user_certificates=True,
        private_ca="@raw/lab_ca",
        release_private_ca=True,
    )
    assert problems(android, WSS, TODAY, "warning") == [
        "android.debug_cleartext: debug builds may send cleartext to every unlisted host",
        "android.user_certificates: debug builds trust every CA that a user installed",
        "android.private_ca: Dart (Flutter's signalling) and TURN/TLS ignore @raw/lab_ca; only a "
        "publicly trusted certificate works there",
        "android.release_private_ca: release builds trust @raw/lab_ca",
        "android.domains[0].pin_expiration: the pins expire on 2030-06-25",
        "android.domains[2].include_subdomains: ignored; 10.0.0.1 is an address",
    ]
    assert problems(settings(), WSS, TODAY, "warning") == []


# --- the files


@pytest.mark.parametrize(("case", "build"), EVERY_FILE)
def test_the_file_byte_by_byte(case: str, build: str) -> None:
    kept = "release" if build == "release" else "debug"  # profile builds get the debug file
    assert rendered(case, build).decode() == (DATA / f"{case}.{kept}.xml").read_text()


def test_what_stands_in_the_xml_is_escaped() -> None:
    group = files.Group(False, (), None, None), [("a&b<c>", False)]
    text = render.render(
        "network_security_config.xml.j2", base_cleartext=False, groups=[group], debug_anchors=[]
    )
    domain = ElementTree.fromstring(text).find(".//domain")
    assert domain is not None and domain.text == "a&b<c>"


def test_paths_follow_the_settings() -> None:
    android = settings(source_root="app/src", file="nsc.xml")
    assert list(files.render(android, WSS)) == [
        "app/src/main/res/xml/nsc.xml",
        "app/src/debug/res/xml/nsc.xml",
        "app/src/profile/res/xml/nsc.xml",
    ]


@pytest.mark.parametrize(("case", "build"), EVERY_FILE)
def test_the_rules_of_the_format(case: str, build: str) -> None:
    content = rendered(case, build)
    root = ElementTree.fromstring(content)
    assert content.startswith(b"<?xml ")
    assert len(root.findall("base-config")) == 1
    for config in root.iter("domain-config"):
        assert config.findall("domain"), "an empty domain-config"
    for overrides in root.iter("debug-overrides"):
        assert build != "release"
        assert overrides.attrib == {}
        assert [child.tag for child in overrides] == ["trust-anchors"]
    # Lint wants the attribute; on an address it would match other hosts by suffix.
    for domain in root.iter("domain"):
        subdomains = domain.attrib["includeSubdomains"]
        assert subdomains == "false" or not is_address(domain.text or "")
    names = [(domain.text or "").lower() for domain in root.iter("domain")]
    assert len(names) == len(set(names)), "the app would crash at its first connection"


def is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        return False


def config_for(content: bytes, host: str) -> ElementTree.Element:
    """What Android decides by (AOSP ApplicationConfig.getConfigForHostname)."""
    root = ElementTree.fromstring(content)
    best, config = "", root.find("base-config")
    for candidate in root.iter("domain-config"):
        for domain in candidate.iter("domain"):
            name = (domain.text or "").strip().lower()
            below = domain.get("includeSubdomains") == "true" and host.endswith("." + name)
            if host == name or (below and best != host and len(name) > len(best)):
                best, config = name, candidate
    assert config is not None
    return config


def permits_cleartext(content: bytes, host: str) -> bool:
    # AOSP XmlConfigSource: anything but the literal word fails open.
    return config_for(content, host).get("cleartextTrafficPermitted") != "false"


@pytest.mark.parametrize(
    ("case", "host", "release", "debug"),
    [
        ("production", "livekit.example.com", False, False),
        ("production", "other.test", False, False),
        ("lab", "sfu1.lab.test", False, True),
        ("lab", "x.sfu1.lab.test", False, False),
        ("lab", "198.51.100.11", False, True),
        ("lab", "198.51.100.12", False, False),
        ("lab", "2001:db8:ca11::11", False, True),
        ("lab", "[2001:db8:ca11::11]", False, True),
        ("cleartext-all", "172.20.1.2", False, True),
        ("cleartext-all", "dev.example.com", False, True),
        ("cleartext-all", "livekit.example.com", False, False),
        ("cleartext-all", "172.16.9.9", False, False),
        ("pins-and-ca", "livekit.example.com", False, False),
        ("pins-and-ca", "lan.example.com", False, True),
        ("pins-and-ca", "a.lan.example.com", False, True),
        ("pins-and-ca", "www.example.com", False, False),
        ("pins-and-ca", "192.168.1.9", False, True),
        ("pins-and-ca", "192.168.1.10", False, False),  # an entry of its own, in the range
        ("pins-and-ca", "a.192.168.1.9", False, False),
        ("pins-and-ca", "[fd00::3]", False, True),
        ("pins-and-ca", "fd00::4", False, False),
        ("pinned-parent", "livekit.example.com", False, False),
        ("pinned-parent", "lan.example.com", False, True),
        ("ranges", "192.168.1.1", False, True),
        ("ranges", "192.168.1.254", False, True),
        ("ranges", "192.168.1.255", False, False),
        ("ranges", "192.168.2.1", False, False),
    ],
)
def test_which_build_may_send_cleartext_where(
    case: str, host: str, release: bool, debug: bool
) -> None:
    found = {build: permits_cleartext(rendered(case, build), host) for build in BUILDS}
    assert found == {"release": release, "debug": debug, "profile": debug}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("case", "host", "pins", "anchors"),
    [
        ("pins-and-ca", "livekit.example.com", PINS, ["system", "@raw/lab_ca"]),
        ("pins-and-ca", "www.example.com", [], ["system", "@raw/lab_ca"]),
        ("pins-and-ca", "other.test", [], ["system"]),
        ("pinned-parent", "livekit.example.com", PINS, []),
        ("pinned-parent", "cdn.example.com", [], []),  # [] inherits base-config's
        ("pinned-parent", "other.test", [], ["system"]),
        ("private-ca-in-debug", "other.test", [], ["system"]),
    ],
)
def test_which_keys_and_authorities_are_trusted_where(
    case: str, host: str, pins: list[str], anchors: list[str], build: str
) -> None:
    config = config_for(rendered(case, build), host)
    assert [pin.text for pin in config.iter("pin")] == pins
    assert [certificates.get("src") for certificates in config.iter("certificates")] == anchors


@pytest.mark.parametrize(
    ("case", "debug"),
    [
        ("production", []),
        ("private-ca-in-debug", ["@raw/lab_ca"]),
        ("cleartext-all", ["user"]),
        ("pins-and-ca", ["@raw/lab_ca", "user"]),
    ],
)
def test_debug_overrides_reach_no_release_build(case: str, debug: list[str]) -> None:
    for build, expected in {"release": [], "debug": debug, "profile": debug}.items():
        root = ElementTree.fromstring(rendered(case, build))
        found = root.findall("debug-overrides//certificates")
        assert [certificates.get("src") for certificates in found] == expected


def test_a_range_lists_every_host() -> None:
    assert rendered("ranges", "debug").count(b"<domain ") == 254


def aapt2_dump(content: bytes, folder: Path) -> str:
    """The compiled file as aapt2 prints it, from an APK linked with the real framework."""
    for path, data in {
        "res/xml/network_security_config.xml": content,
        "res/raw/lab_ca.pem": b"",
        "AndroidManifest.xml": MANIFEST.encode(),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    for command in (
        "aapt2 compile --dir res -o c.zip",
        f"aapt2 link -I {FRAMEWORK} --manifest AndroidManifest.xml -o out.apk c.zip",
        "aapt2 dump xmltree --file res/xml/network_security_config.xml out.apk",
    ):
        ran = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    return ran.stdout


def booleans(dump: str) -> list[str]:
    return re.findall(r"A: (?:cleartextTrafficPermitted|includeSubdomains)=(.*)", dump)


@pytest.mark.tools
@pytest.mark.parametrize(("case", "build"), EVERY_FILE)
def test_aapt2_reads_every_boolean_as_one(case: str, build: str, tmp_path: Path) -> None:
    content = rendered(case, build)
    found = booleans(aapt2_dump(content, tmp_path))
    assert set(found) <= {"true", "false"}
    assert len(found) == sum(
        ("cleartextTrafficPermitted" in element.attrib) + ("includeSubdomains" in element.attrib)
        for element in ElementTree.fromstring(content).iter()
    )


@pytest.mark.tools
def test_a_boolean_that_fails_open_shows_in_the_dump(tmp_path: Path) -> None:
    content = rendered("lab", "debug").replace(b'Permitted="false"', b'Permitted="no"', 1)
    assert '"no" (Raw: "no")' in booleans(aapt2_dump(content, tmp_path))


# --- what the app and its manifest get

MANIFEST = """<?xml version="1.0" encoding="utf-8"?>
<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="com.example.app">
    <uses-permission android:name="android.permission.INTERNET" />
    <application android:networkSecurityConfig="@xml/network_security_config" />
</manifest>
"""
FLUTTER_TEMPLATE = """<manifest xmlns:android="http://schemas.android.com/apk/res/android">
    <application android:label="app" android:usesCleartextTraffic="true" />
</manifest>
"""
AT = "android/app/src/main/AndroidManifest.xml: "
INTERNET = (
    AT + 'add <uses-permission android:name="android.permission.INTERNET" />; '
    "Flutter's template has it for debug and profile builds only"
)
LOCAL = (
    AT + 'add <uses-permission android:name="android.permission.ACCESS_LOCAL_NETWORK" /> and ask '
    "for it at run time: with target SDK 37 Android 17 blocks addresses of the local network "
    "without it, WebRTC media included ({})"
)


def test_a_complete_manifest_needs_nothing() -> None:
    assert files.manifest_advice(settings(), WSS, MANIFEST) == []
    assert files.manifest_advice(settings(), WSS, MANIFEST.encode(), ["51.68.1.2"]) == []


def test_a_new_flutter_project_is_told_everything() -> None:
    assert files.manifest_advice(settings(), WSS, FLUTTER_TEMPLATE) == [
        AT + 'add android:networkSecurityConfig="@xml/network_security_config" to <application>',
        AT + "remove android:usesCleartextTraffic from <application>; it is ignored once a "
        "network security configuration is set",
        INTERNET,
    ]


def test_a_manifest_that_names_another_file() -> None:
    assert files.manifest_advice(settings(file="nsc.xml"), WSS, MANIFEST) == [
        AT + 'android:networkSecurityConfig is "@xml/network_security_config"; change it to '
        '"@xml/nsc", or the file written here is not used'
    ]


@pytest.mark.parametrize(
    ("domains", "url", "media", "local"),
    [
        ([], "wss://192.168.1.10", [], "192.168.1.10"),
        ([ws("172.16.0.0/12")], WSS, [], "172.16.0.0/12"),
        ([ws("100.64.0.1"), ws("11.0.0.1")], WSS, [], "100.64.0.1"),
        ([ws("sfu.local")], WSS, [], "sfu.local"),
        ([], WSS, ["10.0.0.5", "51.68.1.2", "fd00::5", "fe80::5"], "10.0.0.5, fd00::5, fe80::5"),
    ],
)
def test_local_addresses_need_a_permission(
    domains: list[dict[str, Any]], url: str, media: list[str], local: str
) -> None:
    advice = files.manifest_advice(settings(*domains), url, MANIFEST, media)
    assert advice == [LOCAL.format(local)]
    granted = MANIFEST.replace("INTERNET", "ACCESS_LOCAL_NETWORK")
    assert files.manifest_advice(settings(*domains), url, granted, media) == [INTERNET]


def test_a_manifest_that_cannot_be_read() -> None:
    assert files.manifest_advice(settings(), WSS, None) == [
        AT + "not found; check android.checkout and android.source_root"
    ]
    (broken,) = files.manifest_advice(settings(), WSS, "<manifest>")
    assert broken.startswith(AT + "not well-formed XML (")


def test_client_settings() -> None:
    content = files.client_settings(
        "ws://sfu1.lab.test:7880",
        ["stun:turn1.lab.test:3478"],
        ["turn:turn1.lab.test:3478?transport=udp", "turns:turn1.lab.test:5349?transport=tcp"],
        3600,
    )
    assert content.decode() == (DATA / "client_settings.json").read_text()
    assert json.loads(content)["turn_ttl"] == 3600


# --- React Native

METRO = (
    "/srv/app is a React Native project: its debug builds load their code from Metro (localhost, "
    "10.0.2.2) in cleartext, which the files written here forbid: set android.react_native to True"
)


@pytest.mark.parametrize(
    ("android", "advice"),
    [
        (settings(), METRO),
        (settings(ws("localhost")), METRO),
        (settings(react_native=True), None),
        (settings(debug_cleartext="all"), None),
        (settings(ws("localhost"), ws("10.0.2.0/24", expand=True)), None),
        (settings(ws("localhost"), {"host": "10.0.2.2"}, debug_cleartext="all"), METRO),
    ],
)
def test_a_react_native_project_is_told_of_metro(android: Android, advice: str | None) -> None:
    assert files.metro_advice(android) == advice


@pytest.mark.parametrize(
    ("file", "content", "is_one"),
    [
        ("package.json", '{"dependencies": {"react-native": "0.81.4"}}', True),
        ("package.json", '{"dependencies": {"react-native-web": "0.21.0"}}', False),
        ("android/app/build.gradle", 'apply plugin: "com.facebook.react"', True),
        (
            "android/app/build.gradle",
            'apply from: "../../node_modules/react-native/react.gradle"',
            True,
        ),
        ("android/app/build.gradle.kts", 'plugins { id("com.facebook.react") }', True),
        ("android/app/build.gradle", 'id "dev.flutter.flutter-gradle-plugin"', False),
        ("README.md", "com.facebook.react", False),
    ],
)
def test_a_react_native_project_is_recognized(
    file: str, content: str, is_one: bool, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    found = subprocess.run(
        ["grep", "-qsE", files.REACT_NATIVE, "--", *files.build_files(settings())], cwd=tmp_path
    )
    assert (found.returncode == 0) == is_one
