"""Which keys turnserver.conf takes in which version of coturn, 4.6.1 to 4.18.0.

coturn only warns of a key that it does not know (`Bad configuration format`) and runs on without
it, and reads most values without looking at them; so both are checked before a deploy.

Sources: the option tables of Debian's own binaries 4.6.1-1, 4.6.1-2 and 4.18.0-1 (kept in
tests/unit/data, where the script that reads them is; Debian builds without Prometheus and MongoDB),
and both binaries run with each kind of value. Versions between the two are from the changelog of
4.18.0 and its pull requests and were not run.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from pydantic import SecretStr

from callready.settings.problem import Level, Problem

OLDEST, NEWEST = "4.6.1", "4.18.0"


class Key(NamedTuple):
    """A key of turnserver.conf.

    `kind` is what its value must be: flag (read as a boolean), switch (its presence alone switches
    it on, whatever the value), int, int? (a bare key is the default), port, ip, endpoint (ip:port),
    peer (an address or first-last), text, or choices as `a|b`. `since`, `removed` and `deprecated`
    are versions, empty for before 4.6.1 and never; `note` says what to do about the latter two.
    Deprecated in 4.6.1 are keys that did nothing or harm in it already.
    """

    kind: str
    since: str = ""
    removed: str = ""
    deprecated: str = ""
    note: str = ""


# As `kind name name; kind name`, by the version that they came with.
_KINDS = {
    "": """flag Verbose allow-loopback-peers check-origin-consistency daemon dh1066 dh566
        fingerprint log-binding lt-cred-mech mobility new-log-timestamp no-auth
        no-multicast-peers no-stdout-log no-stun no-tcp no-tcp-relay no-tls no-tlsv1_2
        no-udp no-udp-relay oauth secure-stun server-relay simple-log stun-only syslog
        udp-self-balance verbose web-admin web-admin-listen-on-workers;
        switch no-auth-pings no-dynamic-ip-list no-dynamic-realms use-auth-secret version;
        port alt-listening-port alt-tls-listening-port cli-port listening-port max-port
        min-port tcp-proxy-port tls-listening-port web-admin-port;
        int bps-capacity cli-max-output-sessions max-allocate-timeout max-bps relay-threads
        total-quota user-quota;
        int? channel-lifetime max-allocate-lifetime permission-lifetime stale-nonce;
        ip cli-ip listening-ip relay-ip web-admin-ip;
        endpoint alternate-server aux-server tls-alternate-server;
        peer allowed-peer-ip denied-peer-ip;
        ipv4|ipv6|keep allocation-default-address-family;
        text CA-file acme-redirect cert cipher-list cli-password db dh-file ec-curve-name
        external-ip listening-device log-file mysql-userdb new-log-timestamp-format pidfile
        pkey pkey-pwd proc-group proc-user psql-userdb realm redis-statsdb redis-userdb
        relay-device rest-api-separator secret-key-file server-name sql-userdb
        static-auth-secret syslog-facility user userdb""",
    "4.6.3": "flag raw-public-keys respond-http-unsupported",
    "4.7.0": "switch rfc5780; flag software-attribute stun-backward-compatibility tlsv1 tlsv1_1",
    "4.8.0": "int cpus sock-buf-size; flag drop-invalid-packets-log",
    "4.10.0": "flag cli include-reason-string udp-recvmmsg",
    "4.12.0": "switch multiplex-peer; port multiplex-peer-port; flag udp-gso udp-recvmmsg-log",
    "4.13.0": "flag udp-sendmmsg-log",
    "4.14.0": "flag unauthorized-ratelimit; int? unauthorized-ratelimit-rps",
    "4.15.0": """int drain-min-allocations; debug|info|warning|error log-min-level;
        endpoint tcp-alternate-server udp-alternate-server""",
    "4.16.0": """int multiplex-peer-max-peers; flag rfc5766-channel-numbers stateless-nonce;
        text stateless-nonce-secret""",
    "4.17.0": "flag dtls",
}

_OFF_NOW = "it is the default now: leave it out"
_OLD_TLS = "TLS 1.0 and 1.1 are off by default now: leave it out"
_TLS_1_2 = "OpenSSL refuses TLS 1.0 and 1.1 anyway; with it each such hello leaks a descriptor"

_CHANGED = {
    # Removed or on the way out.
    "keep-address-family": Key(
        "flag", deprecated="4.6.0", note="use allocation-default-address-family=keep"
    ),
    "ne": Key("int", removed="4.10.0", note="there is one network engine now: leave it out"),
    "no-cli": Key("switch", deprecated="4.10.0", note="the CLI is off by default: leave it out"),
    "no-dtls": Key("flag", removed="4.17.0", note="DTLS is off unless `dtls` is set: leave it out"),
    "no-rfc5780": Key("switch", deprecated="4.7.0", note=_OFF_NOW),
    "no-software-attribute": Key("flag", deprecated="4.7.0", note=_OFF_NOW),
    "no-sslv2": Key("switch", removed="4.7.0", note="there is no SSLv2 any more: leave it out"),
    "no-sslv3": Key("switch", removed="4.7.0", note="there is no SSLv3 any more: leave it out"),
    "no-stun-backward-compatibility": Key("flag", removed="4.7.0", note=_OFF_NOW),
    "no-tlsv1": Key("flag", removed="4.7.0", deprecated="4.6.1", note=f"{_OLD_TLS} ({_TLS_1_2})"),
    "no-tlsv1_1": Key("flag", removed="4.7.0", deprecated="4.6.1", note=f"{_OLD_TLS} ({_TLS_1_2})"),
    "prod": Key(
        "flag",
        removed="4.7.0",
        deprecated="4.6.1",
        note="callready hides the SOFTWARE attribute anyway: leave it out",
    ),
    "response-origin-only-with-rfc5780": Key("flag", deprecated="4.7.0", note=_OFF_NOW),
    "secret-ts-exp-time": Key(
        "switch",
        removed="4.7.0",
        deprecated="4.6.1",
        note="it has no effect: the expiry is part of the user name",
    ),
    # New since 4.6.1, and on the way out again.
    "drop-invalid-packets": Key("flag", "4.8.0", "4.18.0", note="it is always on: leave it out"),
    "rfc3489-compatibility": Key(
        "flag",
        "4.16.0",
        deprecated="4.16.0",
        note="the next major release has none; RFC 8489 dropped it",
    ),
}

KEYS = {
    **{
        name: Key(kind, since)
        for since, text in _KINDS.items()
        for kind, *names in map(str.split, text.split(";"))
        for name in names
    },
    **_CHANGED,
}

# Lists of addresses.
REPEATABLE = {name for name, key in KEYS.items() if key.kind in ("endpoint", "peer")}

# Leaving these out, as the template does for false, leaves them on.
_ON_BY_DEFAULT = {"udp-recvmmsg": "4.13.0", "stateless-nonce": "4.17.0"}

# Keys that callready writes itself, and the setting that decides them.
MANAGED = {
    "realm": "turn.pools.<pool>.realm",
    "listening-ip": "address and address6",
    "relay-ip": "address and address6",
    "external-ip": "address and private_address",
    "listening-port": "turn.listening_port",
    "tls-listening-port": "turn.tls_listening_port",
    "no-tls": "turn.tls",
    "cert": "tls.certificate",
    "pkey": "tls.key",
    "min-port": "turn.min_port",
    "max-port": "turn.max_port",
    "use-auth-secret": "turn.pools.<pool>.secrets",
    "static-auth-secret": "turn.pools.<pool>.secrets",
    "lt-cred-mech": "turn.pools.<pool>.users",
    "user": "turn.pools.<pool>.users",
    "user-quota": "turn.user_quota",
    "total-quota": "turn.total_quota",
    "stale-nonce": "turn.stale_nonce",
    "no-tcp-relay": "turn.tcp_relay",
    "tcp-proxy-port": "turn.proxy_port",
}

_ALREADY = "callready sets it for every pool: leave it out"
_CREDENTIALS = "callready keeps the pool's credentials in a database of its own: leave it out"
_BANDWIDTH = (
    "not a coturn key in any version: bandwidth is unlimited by default; to limit it use max-bps "
    "(bytes/s per session) or bps-capacity (bytes/s for the server)"
)
_TOLD = "clients are told URIs that need what it switches off: leave it out"
_VULNERABLE = "it is off because of known vulnerabilities (docs/security.md): leave it out"
_NOT_IN_DEBIAN = "Debian builds coturn without"

REFUSED = {
    "no-tcp-relay-bandwidth-limit": _BANDWIDTH,
    "no-udp-relay-bandwidth-limit": _BANDWIDTH,
    "no-loopback-peers": "removed in coturn 4.5.2: loopback peers are denied by default",
    "no-auth": "it would relay for anyone: leave it out",
    "version": "coturn would print its version and end: leave it out",
    "daemon": "systemd runs coturn in the foreground: leave it out",
    **dict.fromkeys(("no-udp", "no-tcp", "no-udp-relay", "no-stun", "stun-only"), _TOLD),
    "secure-stun": "clients ask STUN servers without credentials: leave it out",
    "CA-file": "callers would need certificates of their own: leave it out",
    "no-tlsv1_2": "4.6.1 speaks no other TLS, and many clients neither: leave it out",
    "rest-api-separator": "credentials are minted with a colon (expiry:name): leave it out",
    **dict.fromkeys(("dtls", "mobility", "oauth", "web-admin"), _VULNERABLE),
    **{f"web-admin-{key}": _VULNERABLE for key in ("ip", "port", "listen-on-workers")},
    "server-relay": "anyone could send to a relay, without a permission: leave it out",
    "allow-loopback-peers": "relays could reach what listens on loopback only: leave it out",
    "log-file": "callready logs to the journal (journalctl -u turnserver@<pool>): leave it out",
    "mongo-userdb": f"{_NOT_IN_DEBIAN} MongoDB; {_CREDENTIALS}",
    **dict.fromkeys(("fingerprint", "no-multicast-peers", "syslog"), _ALREADY),
    **dict.fromkeys(
        ("userdb", "db", "psql-userdb", "sql-userdb", "mysql-userdb", "redis-userdb"), _CREDENTIALS
    ),
    "prometheus": f"{_NOT_IN_DEBIAN} Prometheus",
    **{
        f"prometheus-{key}": f"{_NOT_IN_DEBIAN} Prometheus"
        for key in ("address", "path", "port", "username-labels")
    },
}

# What the old configuration set: accepted, but nobody should keep it without knowing this.
# The key, the highest value without a warning, and the warning.
_ADVICE = {
    "permission-lifetime": (
        300,
        "RFC 8656, section 9: a permission lasts 300 s (MUST), coturn's default; clients "
        "refresh it, so more only keeps peers allowed for longer",
    ),
    "channel-lifetime": (
        600,
        "RFC 8656, section 12: a channel binding lasts 600 s, coturn's default; clients "
        "count on it",
    ),
    "max-allocate-lifetime": (
        3600,
        "RFC 8656, section 7.2: no more than 3600 s is recommended, coturn's default; "
        "allocations of callers who vanished hold their ports for as long",
    ),
    "relay-threads": (-1, "the default, one thread per CPU, is best: leave it out"),
}
_EXACT = ("permission-lifetime", "channel-lifetime")

_BYTE_BY_BYTE = (
    "coturn before 4.16 compares IPv6 addresses byte by byte (CVE-2026-73213) and leaves some "
    "inside this range out: use ranges that are whole prefixes, one item each"
)

_LINE = 1023  # read_config_file() reads a line into char[1025] and takes the rest for another


def knows(version: str, key: str) -> bool:
    """Whether this version takes the key and does not call it deprecated."""
    entry = KEYS.get(key)
    return entry is not None and _state(entry, _number(version)) == ""


def drains(version: str) -> bool:
    """Whether SIGUSR1 makes that version refuse new allocations and end with the last one; earlier
    ones die of it (coturn's ChangeLog, 4.6.3; ran)."""
    return _number(version) >= (4, 6, 3)


def check(version: str, options: Mapping[str, object], where: str) -> list[Problem]:
    """What coturn of this version would ignore or misread in options for turnserver.conf.

    `options` maps keys to values: true for a bare key, a list for a key that may be repeated.
    `where` is the dotted path of the options, for the findings. Values that may be secret are
    never quoted.
    """
    found = []
    if not _number(OLDEST) <= _number(version) <= _number(NEWEST):
        text = f"the keys of coturn {version} are not known, only those of {OLDEST} to {NEWEST}"
        found.append(Problem(where, f"{text}: checked against the nearer", "warning"))
    number = min(max(_number(version), _number(OLDEST)), _number(NEWEST))
    for key, value in options.items():
        for level, message in _check_key(key, value, version, number):
            found.append(Problem(f"{where}.{key}", message, level))
    return found


def range_of(network: str) -> str | None:
    """`first-last` of a CIDR, None if it is none. coturn reads no CIDR."""
    try:
        net = ipaddress.ip_network(network, strict=False)
    except ValueError:
        return None
    # A range that starts at :: denies every IPv4 peer too.
    first = net[1] if net.version == 6 and int(net[0]) == 0 and net.num_addresses > 1 else net[0]
    return str(first) if first == net[-1] else f"{first}-{net[-1]}"


_Finding = tuple[Level, str]


def _check_key(
    key: str, value: object, version: str, number: tuple[int, ...]
) -> Iterator[_Finding]:
    if value is False and key in REFUSED and key in KEYS:  # which leaves it out
        return
    if unknown := _unknown(key, version, number):
        yield "error", unknown
        return
    entry = KEYS[key]
    if _state(entry, number) == "deprecated":
        yield "warning", f"deprecated: {entry.note}"
    if isinstance(value, list | tuple) and key not in REPEATABLE:
        yield "error", "may be given once, not as a list: coturn would take the last value"
        return
    for item in value if isinstance(value, list | tuple) else [value]:
        if wrong := _wrong(entry.kind, item, number):
            yield "error", wrong
        elif item is False and number >= _number(_ON_BY_DEFAULT.get(key, "999")):
            yield "error", 'it is on by default, and false leaves it out: write "off"'
        elif key in _ADVICE and item is not True:
            limit, advice = _ADVICE[key]
            given = int(str(item))
            if given > limit or (key in _EXACT and given != limit):
                yield "warning", f"{given} is taken, but {advice}"


def _unknown(key: str, version: str, number: tuple[int, ...]) -> str | None:
    """Why a key may not be given at all, or None."""
    if key in MANAGED:
        return f"callready writes it: set {MANAGED[key]} instead"
    if key in REFUSED:
        return REFUSED[key]
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS, n=1)
        return "not a coturn key in any version" + (f"; did you mean {close[0]}?" if close else "")
    entry = KEYS[key]
    state = _state(entry, number)
    if state == "new":
        return f"not a key of coturn {version}, which ignores it; it came with {entry.since}"
    return f"removed in coturn {entry.removed}: {entry.note}" if state == "removed" else None


def _state(entry: Key, number: tuple[int, ...]) -> Literal["", "new", "removed", "deprecated"]:
    if entry.since and number < _number(entry.since):
        return "new"
    if entry.removed and number >= _number(entry.removed):
        return "removed"
    return "deprecated" if entry.deprecated and number >= _number(entry.deprecated) else ""


def _number(version: str) -> tuple[int, ...]:
    """4.6.1 and Debian's 4.6.1-2 as something that compares."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("-")[0]))


def _wrong(kind: str, value: object, number: tuple[int, ...]) -> str | None:
    """What is wrong with a value, or None: coturn itself would not say so."""
    if kind in ("flag", "switch"):
        if isinstance(value, bool) or (kind == "flag" and value in ("on", "off")):
            return None
        note = "its presence alone switches it on" if kind == "switch" else "coturn wants no value"
        return f"is a key without a value, {note}: write true, or leave it out"
    if value is True and kind == "int?":
        return None
    if kind == "text" and isinstance(value, SecretStr):
        return _wrong_text(value.get_secret_value())
    if isinstance(value, bool) or not isinstance(value, str | int):
        return f"needs a value ({_WANTED.get(kind, kind)}), as text or a number"
    text = str(value)
    return _wrong_text(text) or wrong_value(kind, text, number)


_WANTED = {
    "int": "a whole number",
    "int?": "a whole number",
    "port": "a port",
    "ip": "an IP address",
    "endpoint": "ADDRESS:PORT",
    "peer": "an IP address or a range first-last",
}


def _wrong_text(text: str) -> str | None:
    if re.search(r"(^|\s)#", text):
        return "has a comment after the value, which coturn takes for part of it: leave it out"
    if not text.strip() or text != text.strip():
        return "is empty or has blanks around it, which coturn drops"
    if any(ord(char) < 32 for char in text):
        return "has a line break or another control character: coturn reads one line a key"
    if text.endswith(";"):
        return "ends with a semicolon, which coturn takes for part of the value: leave it out"
    if text.startswith("="):
        return "starts with =, which coturn drops"
    if len(text.encode()) > _LINE - 64:
        return f"is too long: coturn cuts a line after {_LINE} bytes"
    return None


def wrong_value(kind: str, text: str, number: tuple[int, ...] = (4, 6, 1)) -> str | None:
    """What is wrong with a value of a Key's `kind`, or None; `number` is coturn's version."""
    wanted = f"{text} is not {_WANTED.get(kind, kind)}"
    if kind in ("int", "int?", "port"):
        # atoi() makes 10 of `10k` and 0, which is unlimited, of `abc`.
        if not re.fullmatch(r"[0-9]+", text):
            return wanted
        if kind == "port" and not 1 <= int(text) <= 65535:
            return f"{wanted} (1-65535)"
    elif kind == "ip":
        return None if _address(text) else wanted
    elif kind == "endpoint":
        host, _, port = text.rpartition(":")
        if host.startswith("[") == host.endswith("]") and _address(host.strip("[]")):
            return wrong_value("port", port)
        return wanted
    elif kind == "peer":
        return _wrong_peers(text, number)
    elif "|" in kind and text not in kind.split("|"):
        return f"{text} is not one of {kind.replace('|', ', ')}"
    return None


def _wrong_peers(text: str, number: tuple[int, ...]) -> str | None:
    """4.6.1 drops a rule that it cannot read and runs without it; 4.18 does not start."""
    if "/" in text:
        equivalent = range_of(text)
        hint = f": write {equivalent}" if equivalent else ""
        return f"{text}: coturn reads no CIDR, 4.6.1 would run without the rule{hint}"
    ends = [_address(part) for part in text.split("-")]
    if not all(ends) or len(ends) > 2:
        return f"{text} is not an IP address or a range first-last"
    first, last = ends[0], ends[-1]
    assert first and last
    if first.version != last.version:
        return f"{text} mixes IPv4 and IPv6, which coturn takes without a word"
    if int(first) > int(last):
        return f"{text} ends before it starts, which coturn takes without a word"
    if str(first) == "::":
        return f"{text} starts at ::, with which coturn matches every IPv4 peer too: start at ::1"
    if number < (4, 16, 0) and first.version == 6:
        # addr_less_eq() compares each byte on its own.
        low, high = first.packed, last.packed
        after = next((i for i in range(16) if low[i] != high[i]), 16) + 1
        if any(low[after:]) or not all(byte == 255 for byte in high[after:]):
            return f"{text}: {_BYTE_BY_BYTE}"
    return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        # fe80::1%eth0 names an interface of one host
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None
