"""The types of settings: what a value may be, and the sentence that says why it may not."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from callready.settings import coturn_keys
from callready.settings.endpoints import endpoint, host_name, url


@dataclass(frozen=True)
class Origin:
    """How a secret comes about, said at its field: `make secrets` generates it, or it belongs to
    something that exists and is filled in `by_hand`; `make rotate` gives it a new value in one of
    these kinds of `rotation`, or not at all."""

    by_hand: bool = False
    rotation: Literal["turn", "livekit", "app", "fleet-ca", "redis"] | None = None


_PATH = r"(?!.*/\.\.(/|$))/[A-Za-z0-9._/@+-]+"


class Section(BaseModel):
    """A section of the settings: unknown keys are errors, values never appear in messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _alert_url(value: object) -> SecretStr:
    if isinstance(value, str):
        return SecretStr(value)
    if not isinstance(value, SecretStr):
        raise ValueError("must be text in quotes: a URL, or a secret reference to one")
    return value


INT_MAX = 2**31 - 1  # of a C int, which the kernel and coturn read numbers into


def _port(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError(f"{value!r} is not a port (1-65535)")
    return value


def matching(pattern: str, what: str) -> AfterValidator:
    """Text that is `what`."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


def _ip(*versions: Literal[4, 6]) -> AfterValidator:
    kinds = " or ".join(f"IPv{version}" for version in versions)

    def check(value: str) -> str:
        if scope := value.partition("%")[2]:
            raise ValueError(
                f"{value!r} has a scope, which is this host's own (RFC 4007): leave out %{scope}"
            )
        try:
            found = ipaddress.ip_address(value)
        except ValueError:
            found = None
        if not found or found.version not in versions:
            hint = ": write 127.0.0.1" if value == "localhost" else ""
            raise ValueError(f"{value!r} is not an {kinds} address{hint}")
        return str(found)

    return AfterValidator(check)


def _peer_range(value: str) -> str:
    if wrong := coturn_keys.wrong_value("peer", value):
        raise ValueError(wrong)
    return value


def _listener(value: str) -> str:
    if coturn_keys.wrong_value("endpoint", value):
        raise ValueError(f"{value!r} is not ADDRESS:PORT such as 127.0.0.1:8000 or [::1]:8000")
    return value


INLINE = (
    'is written in the inventory; write a reference such as "secret:turn/calls" and keep the value '
    "in the store (make secrets ENV=…)"
)


def _secret(value: object) -> SecretStr:
    if not isinstance(value, SecretStr):
        raise ValueError(INLINE)
    return value


def _strong(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < 32:
        raise ValueError("is shorter than 32 characters; generate one with make secrets ENV=…")
    return value


def _resolver(value: str) -> str:
    with suppress(ValueError):
        return str(ipaddress.ip_address(value))
    if coturn_keys.wrong_value("endpoint", value):
        raise ValueError(f"{value!r} is not ADDRESS or ADDRESS:PORT such as 9.9.9.9 or [::1]:53")
    return value


def listed(value: object) -> object:
    return value if isinstance(value, list) else [] if value is None else [value]


def _command(value: str) -> str:
    if re.search(r"[\n\t]", value) or not value.strip():
        raise ValueError(
            "must be one line without tabs, which separate commands in a release's manifest: write "
            "an item for each command, or a script on the host that it calls"
        )
    return value


def _controller_file(value: str) -> str:
    try:
        value.format(host="", name="")
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"{value!r}: only {{host}} and {{name}} may stand in braces") from None
    return value


def _redis_address(value: str) -> str:
    return value if re.fullmatch(_PATH, value) else endpoint(6379)(value)


def _network(value: str) -> str:
    """A network in CIDR notation; an address is a network of its own."""
    try:
        if "%" in value:  # an interface's name (RFC 4007), which Python takes
            raise ValueError("scope")
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        if "host bits" in str(error):
            own, whole = value.partition("/")[0], ipaddress.ip_network(value, strict=False)
            why = f"is an address in a network: write {own} for it alone, {whole} for all of them"
        else:
            why = "is not an address or a network such as 10.0.0.0/24"
    raise ValueError(f"{value!r} {why}")


def _source(value: str) -> str:
    # pyinfra names a group as a variable of Python, or as the inventory's file.
    return value if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", value) else _network(value)


# Protocol numbers as IANA assigns them, of what has no ports or is opened as a whole.
PROTOCOLS = {
    **{"igmp": 2, "ipip": 4, "6in4": 41, "gre": 47, "esp": 50, "ah": 51, "ospf": 89},
    **{"etherip": 97, "pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115, "sctp": 132},
}


def _protocol(value: object) -> str:
    """An IP protocol by its name in PROTOCOLS, where it has one there, else by its number."""
    word = str(value).lower()
    names = {str(number): name for name, number in PROTOCOLS.items()}
    if word in ("tcp", "udp", "6", "17"):
        raise ValueError(f"{value!r} has ports: name them in ports, as 9100/tcp")
    if word in ("icmp", "icmpv6", "ipv6-icmp", "1", "58"):
        raise ValueError(f"{value!r} is let in already, as far as hosts need it: leave it out")
    if word in PROTOCOLS or (re.fullmatch(r"[1-9]\d{0,2}", word) and int(word) < 255):
        return names.get(word, word)
    known = ", ".join(PROTOCOLS)
    raise ValueError(f"{value!r} is not an IP protocol: write its number (IANA), or {known}")


def _open_port(value: str) -> str:
    m = re.fullmatch(r"(\d+)(?:-(\d+))?/(tcp|udp)", value)
    if not m or not 1 <= int(m[1]) <= int(m[2] or m[1]) <= 65535:
        raise ValueError(f"{value!r} is not PORT/tcp, PORT/udp or FIRST-LAST/udp")
    return value


Port = Annotated[int, BeforeValidator(_port)]
IPv4 = Annotated[str, _ip(4)]
IPv6 = Annotated[str, _ip(6)]
IP = Annotated[str, _ip(4, 6)]
Listener = Annotated[str, AfterValidator(_listener)]
HttpUrl = Annotated[str, AfterValidator(url("http", "https"))]
HttpUrlWithQuery = Annotated[str, AfterValidator(url("http", "https", query=True))]
WsUrlWithQuery = Annotated[str, AfterValidator(url("ws", "wss", query=True))]
LiveKitUrl = Annotated[str, AfterValidator(url("ws", "wss", path=False))]
DirectoryUrl = Annotated[str, AfterValidator(url("https", query=True))]
StunServer = Annotated[str, AfterValidator(endpoint(3478))]
SmtpServer = Annotated[str, AfterValidator(endpoint(587))]
Mailbox = Annotated[str, matching(r"[^@\s<>]+@[^@\s<>]+", "a mail address such as ops@example.com")]
AlertUrl = Annotated[SecretStr, BeforeValidator(_alert_url), Origin(by_hand=True)]
RedisAddress = Annotated[str, AfterValidator(_redis_address)]
Resolver = Annotated[str, AfterValidator(_resolver)]
PeerRange = Annotated[str, AfterValidator(_peer_range)]
SecretByHand = Annotated[SecretStr, BeforeValidator(_secret), Origin(by_hand=True)]
GeneratedSecret = Annotated[SecretStr, BeforeValidator(_secret), AfterValidator(_strong), Origin()]
# What callready does not know may hold secrets anywhere.
FreeKeys = Annotated[dict[str, Any], Origin(by_hand=True)]
Username = Annotated[str, matching(r"[a-z_][a-z0-9_-]{0,31}", "a Unix user or group name")]
Region = Annotated[
    str, matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "the name of a region such as eu-west-1")
]
Unit = Annotated[
    str,
    matching(
        r"[A-Za-z0-9@_.:-]+\.(service|socket|timer|target)",
        "a systemd unit name such as backend.service",
    ),
]
Path = Annotated[str, matching(_PATH, "an absolute path without spaces")]
Version = Annotated[str, matching(r"\d+\.\d+\.\d+", "a version such as 1.13.5")]
ImageName = Annotated[
    str,
    matching(
        r"[a-z0-9-]+(\.[a-z0-9-]+)*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+",
        "an image with its registry and without a tag, such as docker.io/livekit/egress",
    ),
]
Digest = Annotated[str, matching(r"sha256:[0-9a-f]{64}", "a digest, sha256: and 64 hex digits")]
Command = Annotated[str, AfterValidator(_command)]
ControllerFile = Annotated[str, AfterValidator(_controller_file)]
Name = Annotated[str, AfterValidator(host_name)]
OpenPort = Annotated[str, AfterValidator(_open_port)]
Network = Annotated[str, AfterValidator(_network)]
Source = Annotated[str, AfterValidator(_source)]
Protocol = Annotated[str, BeforeValidator(_protocol)]
# HAProxy counts milliseconds (its manual, 2.5: time format).
Timeout = Annotated[int, Field(ge=1, le=INT_MAX // 1000)]
