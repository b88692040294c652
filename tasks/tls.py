"""Certificates and keys: from an ACME server, or from the files the inventory names."""

import re
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from callready.release.declaration import ROOT, Certificate
from callready.release.facts import host_script
from callready.release.node import Node
from callready.settings.certificates import read_pair
from callready.settings.dns_providers import plugin_package
from callready.settings.edge import Acme, Dns
from callready.settings.pools import EDGE, ways

SCRIPT = "/usr/local/lib/callready/certificates"
UNIT, TIMER = "callready-certificates.service", "callready-certificates.timer"
CREDENTIALS = f"{ROOT}/dns-credentials"
OVH_HOOK = "/usr/local/lib/callready/ovh-dns"
CA = f"{ROOT}/acme-ca.pem"


def tls(node: Node) -> None:
    """Plain files that their readers take again on reload (a systemd credential would be a copy
    taken at start). They are state, not release: a renewal is no new release."""
    settings = node.settings
    if settings.tls is None or not settings.tls_names:
        return
    group = "turnserver" if settings.turn_pools else "root"
    for name in settings.tls_names:
        served = tuple(endpoints(node, name))
        if settings.tls.acme:
            asked = certbot_arguments(node, settings.tls.acme, name)
            certificate = Certificate(name, "", b"", b"", "", group, served, asked)
        else:
            pair = read_pair(*settings.tls.files(node.name, name), name)
            certificate = Certificate(
                name, pair.digest, pair.chain, pair.key_bytes, f"{pair.serial:x}", group, served
            )
        node.release.certificates[name] = certificate
    if settings.tls.acme:
        renewal(node, settings.tls.acme)


def renewal(node: Node, acme: Acme) -> None:
    """certbot's own timer renews; a unit of our own, after it, at boot and hourly, installs what
    it renewed, reloads those who serve it, and fails if callers do not get it."""
    release = node.release
    release.package("certbot")
    if acme.dns:
        _dns(node, acme.dns)
    if acme.ca:
        release.file(CA, content=Path(acme.ca).expanduser().read_bytes())
    release.file(SCRIPT, content=host_script("certificates.sh"), mode=0o755)
    release.file(
        f"{ROOT}/certificates.conf",
        "certificates.conf.j2",
        certificates=release.certificates.values(),
    )
    release.file(
        "/etc/systemd/system/certbot.service.d/callready.conf",
        "certbot.conf.j2",
        ca=CA if acme.ca else "",
        aws=CREDENTIALS if acme.dns and acme.dns.provider == "route53" else "",
    )
    release.file(f"/etc/systemd/system/{UNIT}", f"{UNIT}.j2", script=SCRIPT)
    release.file(f"/etc/systemd/system/{TIMER}", f"{TIMER}.j2")
    release.enable(TIMER, f"/etc/systemd/system/{TIMER}", target="timers.target")
    release.timers |= {TIMER: UNIT, "certbot.timer": "certbot.service"}


def _dns(node: Node, dns: Dns) -> None:
    """The plugin or the hook that makes DNS records, and the credentials for it."""
    if dns.provider == "ovh":
        node.release.file(OVH_HOOK, content=host_script("ovh-dns.sh"), mode=0o755)
    else:
        node.release.package(plugin_package(dns.provider))
    values = {key: _plain(value) for key, value in dns.credentials.items()}
    if dns.provider == "google":
        node.release.file(CREDENTIALS, content=values["service_account"].encode(), mode=0o600)
        return
    quoted = {key: SecretStr(_quoted(value)) for key, value in values.items()}
    node.release.file(
        CREDENTIALS, "dns-credentials.j2", mode=0o600, provider=dns.provider, credentials=quoted
    )


def _plain(value: Any) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _quoted(value: str) -> str:
    """A value for configobj, which certbot reads with: a comma would begin a list, # a comment."""
    if re.fullmatch(r"[\w.:/+=@%-]+", value):
        return value
    return f"'{value}'" if '"' in value else f'"{value}"'


def certbot_arguments(node: Node, acme: Acme, name: str) -> tuple[str, ...]:
    """What `certbot certonly` is asked with; it keeps that for renewals (certbot(1))."""
    if acme.dns and acme.dns.provider == "ovh":
        proof = ["--manual", "--preferred-challenges", "dns-01"]
        proof += ["--manual-auth-hook", f"{OVH_HOOK} add {acme.dns.propagation}"]
        proof += ["--manual-cleanup-hook", f"{OVH_HOOK} remove"]
    elif acme.dns:
        plugin = f"dns-{acme.dns.provider}"
        proof = ["--authenticator", plugin]
        if acme.dns.provider != "route53":
            proof += [f"--{plugin}-credentials", CREDENTIALS]
            proof += [f"--{plugin}-propagation-seconds", str(acme.dns.propagation)]
    else:
        proof = ["--standalone", "--http-01-port", str(node.settings.challenge_port)]
        if node.settings.has_edge:
            proof += ["--http-01-address", "127.0.0.1"]
    return ("--server", acme.server, "--email", acme.email, *proof, "--cert-name", name, "-d", name)


def endpoints(node: Node, name: str) -> list[tuple[str, str]]:
    """Where a name's certificate is served, and by which unit."""
    host = node.settings
    served: list[tuple[int, str]] = []
    if host.edge and name in host.edge_backends:
        served.append((host.edge.port, EDGE))
    if name == host.name:
        turn = [way for pool in host.turn_pools for way in ways(host, pool)]
        served += [(way.listens_on, way.unit) for way in turn if way.transport == "tls"]
    addresses = (host.local_address, f"[{host.address6}]" if host.address6 else "")
    return [
        (f"{address}:{port}", unit)
        for address in filter(None, addresses)
        for port, unit in dict.fromkeys(served)
    ]
