"""What a caller would see: probes of STUN, TURN, TLS, LiveKit, WebRTC calls, ports and the app.

Every module works in three ways: as functions (the verification and the deploy's health gate),
as a command (``python -m callready.probes.turn --help``), and inside a network namespace of its
own (``ip netns exec … python -m …``). A probe returns a frozen dataclass, times in seconds, or
raises `ProbeError`. Secrets are `SecretStr`, because a failing test prints its calls' arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import os
import re
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from pydantic import SecretStr

_P = ParamSpec("_P")
_T = TypeVar("_T")

TIMEOUT = 5.0
"""Seconds a probe waits for one answer. libwebrtc gives a TURN or STUN server about 10 s before
it gives up; a caller who waits half of that already hangs up."""

SILENCE = 2.0
"""Seconds without anything from the other side after which a call counts as broken off: long
enough for a busy machine, shorter than people wait before they hang up."""


@dataclass(frozen=True)
class Finding:
    """What a probe found wrong.

    Args:
        suffers: what does not work for callers, and where.
        look_at: the checks that find the cause, most likely first.
        evidence: how it showed, if that is not said already.
        warning: callers are served all the same, if less well.
    """

    suffers: str
    look_at: str
    evidence: str = ""
    warning: bool = False

    @property
    def shown(self) -> str:
        """What does not work, and how it showed."""
        return ": ".join(filter(None, (self.suffers, self.evidence)))

    def __str__(self) -> str:
        return f"{self.shown}. Look at: {self.look_at}"


class ProbeError(Exception):
    """A probe that did not pass: carries its `finding`; arguments as `Finding`."""

    def __init__(self, suffers: str, look_at: str, evidence: str = "") -> None:
        self.finding = Finding(suffers, look_at, evidence)
        super().__init__(self.finding)


def reason(error: BaseException) -> str:
    """The cause of a failed connection in a few words, whatever library raised it."""
    while not isinstance(error, OSError) and (deeper := error.__cause__ or error.__context__):
        error = deeper
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    if isinstance(error, OSError):  # asyncio hides the cause behind "Connect call failed"
        numbers = {error.errno} if error.errno else set(re.findall(r"\[Errno (\d+)\]", str(error)))
        if numbers:
            return ", ".join(sorted(os.strerror(int(number)) for number in numbers))
    return str(error).rstrip(".") or type(error).__name__


def endpoint(address: str, port: int) -> str:
    """``address:port``, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def waited_for(probe: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, _T]:
    """An asynchronous probe, for who does nothing else meanwhile."""

    @functools.wraps(probe)
    def ask(*arguments: _P.args, **options: _P.kwargs) -> _T:
        return asyncio.run(probe(*arguments, **options))

    return ask


def local_address(peer: str) -> str | None:
    """The address this machine would reach `peer` from; None without a route."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def as_data(result: object) -> Any:
    """A result as JSON data, without the fields that its repr hides (secrets)."""

    def plain(value: Any) -> object:
        if dataclasses.is_dataclass(value):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
        return value.isoformat() if isinstance(value, datetime) else sorted(value)

    return json.loads(json.dumps(result, default=plain))


def as_line(result: object) -> str:
    """A result as one line that a person reads: its own text, or ``name=value`` pairs."""
    if type(result).__str__ is not object.__str__:
        return str(result)
    return " ".join(f"{name}={_as_text(value)}" for name, value in as_data(result).items())


def _as_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value * 1000:.1f}ms" if value < 100 else f"{value:.1f}s"
    if isinstance(value, list):
        return ",".join(map(_as_text, value)) or "none"
    if isinstance(value, dict):
        return "{" + " ".join(f"{k}:{_as_text(v)}" for k, v in value.items()) + "}"
    return str(value)


def secret_from(variable: str, file: str | None) -> SecretStr:
    """A secret from a file (``-``: standard input) or an environment variable, never an argument.

    Raises:
        ProbeError: neither gives one.
    """
    try:
        if file:
            value = sys.stdin.read() if file == "-" else Path(file).read_text()
        else:
            value = os.environ.get(variable, "")
    except OSError as error:
        raise ProbeError("no secret can be read", f"the file {file}", reason(error)) from None
    if not value.strip():
        raise ProbeError(
            "there is no secret to probe with",
            f"set {variable} in the environment, or name a file (- is standard input)",
        )
    return SecretStr(value.strip())


_OPTIONS: dict[str, dict[str, Any]] = {
    "--ca-file": {"help": "PEM file of the authorities to trust"},
    "--secret-file": {"help": "file with the secret, - for stdin"},
    "--duration": {"type": float, "default": 1.0, "help": "seconds (%(default)g)"},
    "--json": {"action": "store_true", "help": "print the result as JSON"},
}


def command(module: str, description: str | None, *options: str) -> argparse.ArgumentParser:
    """The parser of a probe's command, with --json and the named of `_OPTIONS`."""
    parser = argparse.ArgumentParser(
        f"python -m callready.probes.{module}", description=description
    )
    for option in (*options, "--json"):
        parser.add_argument(option, **_OPTIONS[option])
    return parser


def run(parser: argparse.ArgumentParser, probe: Callable[[argparse.Namespace], object]) -> NoReturn:
    """Run a probe as a command: one line or JSON, exit status 0 when it passed and 1 when not. JSON
    is on standard output either way."""
    options = parser.parse_args()
    try:
        result = probe(options)
    except ProbeError as error:
        if options.json:
            print(json.dumps({"ok": False, **as_data(error.finding)}))
        sys.exit(1 if options.json else f"FAILED {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(as_data(result)) if options.json else f"ok {as_line(result)}")
    sys.exit()
