"""Host names, `host:port` and URLs as an inventory writes them, read strictly: what the programs
that they are for would read in different ways is refused, with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from callready.settings.android import address, canonical

# What may stand in a path and a query (RFC 3986, sections 3.3 and 3.4).
_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*")


def host_name(value: str) -> str:
    """A host name in lower case, or an IPv4 address; raises ValueError."""
    name = _host(value)
    if ":" in name:
        raise ValueError(f"{value!r} is an IPv6 address: use a host name")
    return name


def _host(value: str) -> str:
    """A host name in lower case or an IP address as RFC 5952 writes it, without brackets."""
    try:
        found = canonical(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a host name") from None
    if not value.isascii():
        raise ValueError(f"{value!r} must be written as DNS has it: {found}")
    if value.lower() != found and not address(value):
        raise ValueError(f"{value!r} is not a host name: write {found}")
    return found


def _shown(value: str) -> str:
    """What was written, without a password, or a query, which may hold a token."""
    return repr(re.sub(r"[^/\s]*@", "…@", value).partition("?")[0])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", value) or int(value) > 65535:
        raise ValueError(f"{value!r} is not a port (1-65535)")
    return int(value)


def split_endpoint(value: str) -> tuple[str, int]:
    """Host and port of `host:port`, IPv6 addresses in brackets; raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\s\[\]@/]+)):(\d+)", value)
    if not match or (match[1] and ":" not in match[1]):
        raise ValueError(f"{_shown(value)} is not HOST:PORT")
    return _host(match[1] or match[2]), _port(match[3])


def endpoint(default_port: int) -> Callable[[str], str]:
    """The check of `host:port`; `default_port` is proposed where there is none."""

    def check(value: str) -> str:
        try:
            host, port = split_endpoint(value)
        except ValueError as error:
            raise ValueError(f"{error}{_proposal(value, default_port)}") from None
        return f"{_bracketed(host)}:{port}"

    return check


def _proposal(value: str, default_port: int) -> str:
    """What was meant by text that is nearly an endpoint: with a scheme, a path, without a port."""
    bare = value.strip()
    if not address(bare):
        bare = re.split(r"[/?#]", re.sub(r"^([a-z]+:)+(//)?", "", bare))[0].rpartition("@")[2]
    try:
        return f": write {_bracketed(_host(bare.strip('[]')))}:{default_port}"
    except ValueError:
        pass
    try:
        host, port = split_endpoint(bare)
    except ValueError:
        return ""
    return f": write {_bracketed(host)}:{port}" if bare != value else ""


def url(*schemes: str, path: bool = True, query: bool = False) -> Callable[[str], str]:
    """The check of a URL of one of the schemes: a host, maybe a port, a path and a query where they
    are taken; never user and password, which would be shown with it, nor a fragment."""
    kinds = " or ".join(f"{scheme}://NAME[:PORT]" for scheme in schemes)

    def check(value: str) -> str:
        shown = _shown(value)
        if not value.isprintable() or " " in value:
            where = "at one of its ends" if value != value.strip() else "in it"
            raise ValueError(f"{shown} has a blank or a line break {where}: take it out")
        try:
            parts = urlsplit(value)
        except ValueError:
            raise ValueError(f"{shown} is not {kinds}") from None
        if parts.scheme not in schemes or not value.startswith(f"{parts.scheme}://"):
            raise ValueError(f"{shown} is not {kinds}")
        if "@" in parts.netloc:
            raise ValueError(f"{shown} has a user name or password: leave it out")
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::(\d+))?", parts.netloc)
        if not match:
            raise ValueError(f"{shown} is not {kinds}")
        host = _host(match[1] or match[2])
        port = f":{_port(match[3])}" if match[3] else ""
        start = f"{parts.scheme}://{_bracketed(host)}{port}"
        rest = parts.path if path else parts.path.rstrip("/")
        if "#" in value:
            raise ValueError(f"{shown} has a fragment (#…), which no server is sent: leave it out")
        if rest and not path:
            raise ValueError(f"{shown} has a path, which is not used: write {start}")
        if "?" in value and not query:
            raise ValueError(f"{shown} has a query (?…), which is not used: write {start}{rest}")
        if not _PATH.fullmatch(rest) or not _QUERY.fullmatch(parts.query):
            raise ValueError(f"{shown} has characters that a URL must have encoded as %XX")
        return start + rest + (f"?{parts.query}" if parts.query else "")

    return check
