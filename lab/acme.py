"""An ACME server on the bridge: Pebble, with the name server that it asks.

Pebble keeps everything in memory: one that is started again knows no account and has a new root.
"""

import json
import ssl
import urllib.error
import urllib.request

from lab import ca, plan, tools
from lab.run import Group, wait_until

STATE = plan.STATE / "acme"
ROOT = STATE / "root.pem"  # what issued certificates lead to
DIRECTORY = f"https://{plan.MACHINE.fqdn}:14000/dir"
_MANAGEMENT = f"https://{plan.MACHINE.fqdn}:15000"
RESOLVER = f"{plan.MACHINE.ipv4}:8053"  # the name server that the authority asks
_NAMES = f"http://{plan.MACHINE.ipv4}:8055"


def start(nonce_reject: int = 10, validation_seconds: int = 2) -> None:
    """Start a new authority; `ROOT` is its root certificate.

    Args:
        nonce_reject: per cent of good nonces that it refuses, as RFC 8555, 6.5 allows.
        validation_seconds: it waits up to this long before it looks at a challenge.
    """
    programs = tools.install("pebble", "pebble-challtestsrv")
    stop()
    STATE.mkdir(parents=True, exist_ok=True)
    machine = plan.MACHINE
    certificate = ca.issue(machine.fqdn, (machine.ipv4, machine.ipv6), folder=STATE)
    config = {
        "listenAddress": f"{machine.ipv4}:14000",
        "managementListenAddress": f"{machine.ipv4}:15000",
        "certificate": str(certificate),
        "privateKey": str(certificate.with_suffix(".key")),
        "httpPort": 80,
        "tlsPort": 443,
        "retryAfter": {"authz": 1, "order": 1},
        "profiles": {"default": {"description": "90 days", "validityPeriod": 7776000}},
    }
    (STATE / "pebble.json").write_text(json.dumps({"pebble": config}))
    Group("service-acme-names").start(
        programs / "pebble-challtestsrv",
        "-dnsserver",
        RESOLVER,
        "-management",
        f"{machine.ipv4}:8055",
        "-http01",
        "",
        "-https01",
        "",
        "-tlsalpn01",
        "",
        "-doh",
        "",
        "-defaultIPv4",
        "",
        "-defaultIPv6",
        "",
    )
    wait_until(lambda: _answers(_NAMES), 10, f"challtestsrv does not answer; see {plan.LOGS}")
    for host in plan.HOSTS.values():
        for name in (host.fqdn, host.turn_name):
            resolve(name, host)
    Group("service-acme").start(
        "env",
        f"PEBBLE_WFE_NONCEREJECT={nonce_reject}",
        f"PEBBLE_VA_SLEEPTIME={validation_seconds}",
        "PEBBLE_AUTHZREUSE=0",  # every renewal proves the name again
        programs / "pebble",
        "-config",
        STATE / "pebble.json",
        "-dnsserver",
        RESOLVER,
    )
    wait_until(lambda: _answers(DIRECTORY), 10, f"pebble does not answer; see {plan.LOGS}")
    ROOT.write_bytes(_get(f"{_MANAGEMENT}/roots/0"))


def stop() -> None:
    """End authority and name server, if they run."""
    for name in ("service-acme", "service-acme-names"):
        Group(name).kill()


def resolve(name: str, host: plan.Host) -> None:
    """Let the authority find `name` at this host's addresses, and nowhere else."""
    for record, address in (("a", host.ipv4), ("aaaa", host.ipv6)):
        tell(f"clear-{record}", host=name)
        tell(f"add-{record}", host=name, addresses=[address])


def tell(command: str, **what: object) -> None:
    """Have the name server that the authority asks know something (challtestsrv's management)."""
    body = json.dumps(what).encode()
    urllib.request.urlopen(f"{_NAMES}/{command}", body, timeout=5).close()


def _get(url: str) -> bytes:
    context = ssl.create_default_context(cafile=str(ca.CA_CERTIFICATE))
    with urllib.request.urlopen(
        url, timeout=2, context=context if url.startswith("https") else None
    ) as answer:
        return bytes(answer.read())


def _answers(url: str) -> bool:
    try:
        _get(url)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
