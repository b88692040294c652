"""What callers need of one host, probed from here or from another host: the deploy's health gate.

The probes run in one process of their own (``python -m callready.gate``; JSON on standard input and
output): they are asyncio programs, and pyinfra has this process patched by gevent.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from callready.probes import ProbeError, endpoint, local_address, reason
from callready.secrets.masking import HIDDEN
from callready.settings.uris import place

if TYPE_CHECKING:
    from callready.release.node import Node
    from callready.settings.models import HostSettings, Pool

Spec = dict[str, Any]
"""One probe: `name` for people, `probe` (a key of `_PROBES`), `transport` (udp or tcp), `address`
and `port` to send to, and what that probe needs. JSON but for secrets, which are SecretStr."""

WITHIN = 10.0
"""Seconds in which each probe must have passed once; a service that just started may need some."""

_ROOT = Path(__file__).parents[2]
_HEALTH = "health of the app at {}"


def probes(node: Node, certificates: bool = True) -> list[Spec]:
    """What callers need of this host.

    Args:
        node: the host; with `deploy.gate_from` that host's addresses decide about IPv6.
        certificates: False takes any certificate: a host that waits for its authority shows one
            of its own making.
    """
    ca = node.settings.tls.ca if node.settings.tls else None
    trust = {"ca": str(Path(ca).expanduser().absolute()) if ca else None, "verify": certificates}
    found: list[Spec] = []
    for family, address in _addresses(node).items():
        on = f"on {node.name} (IPv{family})"
        for kind in (_turn, _livekit, _edge, *([_certificates] if certificates else [])):
            for what, spec in kind(node.settings, address):
                found.append(
                    {
                        "transport": "tcp",
                        "address": address,
                        **trust,
                        **spec,
                        "name": f"{what} {on}",
                        "promise": _promise(what, spec),
                    }
                )
    if "app" in node.settings.groups and node.settings.app:
        for check in node.settings.app.health:
            host, port = place(check.url)
            name = _HEALTH.format(check.url)
            found.append(
                {
                    "name": name,
                    "promise": name,
                    "probe": "app",
                    "transport": "tcp",
                    "address": host,
                    "port": port,
                    "url": check.url,
                    "status": check.status,
                    "fields": check.fields,
                    **trust,
                }
            )
    return found


def promises(node: Node) -> list[str]:
    """What this host's release has for callers, wherever they are: by that an earlier release is
    judged when the host returns to it, whatever the inventory says by then."""
    settings = node.settings
    address = settings.address or settings.address6 or ""
    found = [
        _promise(what, spec)
        for kind in (_turn, _livekit, _edge, _certificates)
        for what, spec in kind(settings, address)
    ]
    if "app" in settings.groups and settings.app:
        found += [_HEALTH.format(check.url) for check in settings.app.health]
    return sorted(found)


def _promise(what: str, spec: Spec) -> str:
    port = f"{spec.get('transport', 'tcp')}/{spec['port']}"
    return " ".join(filter(None, (what, port, spec.get("server_name"))))


def _addresses(node: Node) -> dict[int, str]:
    """The public addresses of the host, IPv6 only if the prober has it too."""
    settings, prober = node.settings, node.settings.deploy.gate_from
    found = {4: settings.address} if settings.address else {}
    if settings.address6 and (
        node.fleet[prober].address6 if prober else local_address(settings.address6)
    ):
        found[6] = settings.address6
    return found


def _turn(settings: HostSettings, address: str) -> Iterator[tuple[str, Spec]]:
    for name, pool in settings.turn_pools.items():
        port = pool.listening_port
        yield f"STUN of pool {name}", {"probe": "stun", "transport": "udp", "port": port}
        ways: list[tuple[str, int]] = [("udp", port), ("tcp", port)]
        ways += [("tls", tls_port) for tls_port in _tls_ports(pool)]
        for over, port in ways:
            spec: Spec = {
                "probe": "turn",
                "transport": "udp" if over == "udp" else "tcp",
                "over": over,
                "port": port,
                "server_name": settings.name,
                "family": 6 if ":" in address else 4,
            }
            if pool.secrets:
                spec["secret"] = pool.secrets[0]
            else:
                spec["user"], spec["password"] = next(iter(pool.users.items()))
            on_443 = " on 443" if over == "tls" and port == 443 else ""
            yield f"TURN allocation over {over}{on_443} of pool {name}", spec


def _tls_ports(pool: Pool) -> list[int]:
    own = [pool.tls_listening_port] if pool.tls else []
    return own + ([443] if pool.tls and pool.tls_on_443 else [])


def _livekit(settings: HostSettings, address: str) -> Iterator[tuple[str, Spec]]:
    if not (livekit := settings.sfu):
        return
    wanted = set(livekit.bind_addresses)
    every = {"::", "0.0.0.0"} if address == settings.address else {"::"}
    own = {address, settings.local_address} if address == settings.address else {address}
    spec: Spec = {"probe": "livekit", "url": livekit.url, "keys": dict(livekit.keys)}
    if settings.edge:
        name = place(livekit.url)[0]
        yield "LiveKit", {**spec, "port": settings.edge.port, "server_name": name}
    elif not wanted or wanted & (every | own):
        yield (
            "LiveKit",
            {**spec, "url": f"ws://{endpoint(address, livekit.port)}", "port": livekit.port},
        )
    elif address == settings.address:  # someone else's proxy is before it: as the name leads
        host, port = place(livekit.url)
        yield f"LiveKit by {livekit.url}", {**spec, "address": host, "port": port}


def _edge(settings: HostSettings, _address: str) -> Iterator[tuple[str, Spec]]:
    if edge := settings.edge:
        for name in settings.edge_backends:
            url = f"https://{name}/"
            yield f"HTTPS of {name}", {"probe": "edge", "url": url, "port": edge.port}


def _certificates(settings: HostSettings, _address: str) -> Iterator[tuple[str, Spec]]:
    pools = settings.turn_pools.values()
    served = [(settings.name, port) for pool in pools for port in _tls_ports(pool)]
    if settings.edge:
        served += [(name, settings.edge.port) for name in settings.edge_backends]
    for name, port in dict.fromkeys(served):
        spec = {"probe": "certificate", "server_name": name, "port": port}
        yield f"certificate of {name} on port {port}", spec


def run(specs: list[Spec], within: float = WITHIN) -> list[str]:
    """Run probes at the same time; one sentence for each that did not pass within so many seconds:
    what callers suffer, what to look at. Empty: all is well."""
    if not specs:
        return []
    known: list[str] = []

    def reveal(secret: SecretStr) -> str:
        known.append(secret.get_secret_value())
        return known[-1]

    request = json.dumps({"within": within, "specs": specs}, default=reveal)
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "callready.rollout.gate"],
            input=request,
            text=True,
            check=False,
            capture_output=True,
            timeout=within + 60,
            env={**os.environ, "PYTHONPATH": path},
        )
        said: list[str | None] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return [f"the probes did not end within {within + 60:g} s: is this machine overloaded?"]
    except ValueError:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said = [f"the probes did not run: {words[-1]}"]
        specs = specs[:1]
    sentences = [_named(spec, text) for spec, text in zip(specs, said, strict=True) if text]
    for secret in known:
        sentences = [sentence.replace(secret, HIDDEN) for sentence in sentences]
    return sentences


def _named(spec: Spec, text: str) -> str:
    """A sentence with the probe's name, and with the host's address and port if the probe was sent
    to a port of ours that leads there (callready.via)."""
    if "instead_of" in spec:
        text = text.replace(endpoint(spec["address"], spec["port"]), endpoint(*spec["instead_of"]))
        text = re.sub(rf"\b{spec['port']}\b", str(spec["instead_of"][1]), text)
    return f"{spec['name']}: {text}"


def blocked(specs: list[Spec]) -> list[str]:
    """One sentence for each UDP port that a running service of the host should answer on and that
    nothing comes back from: seen from here the gate would fail whatever is deployed.

    Args:
        specs: of services that run now.
    """
    ports: dict[tuple[str, int], Spec] = {}
    for spec in specs:
        if spec["transport"] == "udp":
            ports.setdefault((spec["address"], spec["port"]), spec)
    return [
        f"{spec['name']}: no answer over UDP from "
        f"{endpoint(*spec.get('instead_of', place))}: this network or a filter on the way lets no "
        "UDP through; deploy.gate_from names a host to probe from"
        for place, spec in ports.items()
        if not udp_path(*place)
    ]


def udp_path(address: str, port: int) -> bool | None:
    """Whether UDP gets to a host and something comes back: an answer (it is sent a STUN Binding
    request, RFC 8489 section 5), or that nothing listens there. None: silence, nobody knows."""
    request = struct.pack("!HHI", 0x0001, 0, 0x2112A442) + secrets.token_bytes(12)
    with socket.socket(
        socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
    ) as s:
        s.settimeout(0.3)
        for _ in range(3):
            try:
                s.connect((address, port))
                s.send(request)
                s.recv(1500)
                return True
            except ConnectionRefusedError:
                return True
            except TimeoutError:
                continue
            except OSError:  # no route, or a filter of this machine
                return None
    return None


def _stun(spec: Spec) -> None:
    from callready.probes import stun

    stun.binding(spec["address"], spec["port"])


def _allocate(spec: Spec) -> None:
    from callready.probes import turn

    server = turn.TurnServer(
        spec["address"], spec["port"], spec["over"], spec["server_name"], spec["ca"], spec["verify"]
    )
    if "secret" in spec:
        credentials = turn.mint(SecretStr(spec["secret"]), 60)
    else:
        credentials = turn.Credentials(spec["user"], spec["password"])
    try:
        turn.allocate(server, credentials, spec["family"])
    except turn.TurnRefused as refused:
        if refused.code != 486:  # asked after the password: callers have used the quota up
            raise


def _certificate(spec: Spec) -> None:
    from callready.probes import tls

    tls.served(spec["address"], spec["port"], spec["server_name"], spec["ca"])


def _join(spec: Spec) -> None:
    from callready.probes import livekit

    way: dict[str, Any] = _way(spec)
    livekit.health(spec["url"], **way)
    refused = {}
    for key, secret in spec["keys"].items():
        token = livekit.token(key, SecretStr(secret), ttl=60)
        status = livekit.validate(spec["url"], token, **way)
        if status != 200:
            refused[key] = status
    # An earlier release does not know the keys that were added since.
    if refused and not (spec.get("any_key") and len(refused) < len(spec["keys"])):
        key, status = next(iter(refused.items()))
        raise ProbeError(
            f"no call starts: {spec['url']} refuses a token of key {key} with {status}",
            livekit.REFUSED_TOKEN,
        )


def _answer(spec: Spec) -> None:
    from callready.probes import app

    # As nobody: the edge answers that itself, while its own names wait for what is behind it (which
    # the first deploy may not have yet).
    app.get(spec["url"], headers={"Host": "nobody.invalid"}, **_way(spec))


def _health(spec: Spec) -> None:
    from callready.probes import app

    app.health(spec["url"], spec["status"], spec["fields"], **_way(spec))


def _way(spec: Spec) -> dict[str, Any]:
    at = spec["address"], spec["port"]
    return {"ca_file": spec["ca"], "at": at, "verify": spec["verify"]}


# By the module of callready.probes that it needs.
_PROBES: dict[str, tuple[str, Callable[[Spec], None]]] = {
    "stun": ("stun", _stun),
    "turn": ("turn", _allocate),
    "certificate": ("tls", _certificate),
    "livekit": ("livekit", _join),
    "edge": ("app", _answer),
    "app": ("app", _health),
}


def _attempts(spec: Spec, end: float) -> str | None:
    """Try until it passes (None) or `end` has come (what was wrong the last time)."""
    pause = 0.2
    while True:
        try:
            return _PROBES[spec["probe"]][1](spec)
        except ProbeError as error:
            said = str(error)
        except Exception as error:
            said = f"the probe itself broke: {type(error).__name__}: {reason(error)}"
        if time.monotonic() + pause > end:
            return said
        time.sleep(pause)
        pause = min(2 * pause, 1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it belongs to the deploy: ends without a word
    request = json.load(sys.stdin)
    specs: list[Spec] = request["specs"]
    for module in sorted({_PROBES[spec["probe"]][0] for spec in specs}):
        importlib.import_module(f"callready.probes.{module}")  # not by several threads at once
    end = time.monotonic() + request["within"]
    with ThreadPoolExecutor(len(specs)) as pool:
        print(json.dumps(list(pool.map(lambda spec: _attempts(spec, end), specs))))


if __name__ == "__main__":
    main()
