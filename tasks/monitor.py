"""The host of group monitor: Prometheus and Alertmanager."""

import hashlib

import bcrypt
from pydantic import SecretStr

from callready.release.authority import Identity
from callready.release.declaration import ROOT
from callready.release.node import Node
from callready.settings.fleet import FLEET_CA
from callready.settings.models import PROMETHEUS_PORT
from callready.settings.ports import ALERTMANAGER, ALERTMANAGER_PORT, CALLER_PORT, PROMETHEUS
from callready.settings.uris import app_names, clusters, signalling_names, spared_pools

FOLDER = f"{ROOT}/monitor"


def monitor(node: Node) -> None:
    """What every host says of itself is collected here, and who has to know is told."""
    if not (settings := node.settings.watches):
        return
    release, fleet = node.release, node.fleet
    # Debian starts both on every address.
    for name in ("prometheus", "prometheus-alertmanager"):
        release.mask(f"{name}.service")
        release.package(name)
    certificate = release.identity(
        "monitor", node.settings.fleet_ca, Identity("monitor", (), ("client",))
    )
    files = {name: f"{FOLDER}/{name}" for name in ("prometheus.yml", "alerts.yml")}
    release.file(
        files["prometheus.yml"],
        "prometheus.yml.j2",
        monitor=settings,
        hosts=fleet.watched,
        this=node.name,
        internal=node.settings.internal_address,
        ca=FLEET_CA,
        fleet=f"/run/credentials/{PROMETHEUS}/fleet",
        unit=PROMETHEUS,
        alertmanager=f"127.0.0.1:{ALERTMANAGER_PORT}",
        own=f"127.0.0.1:{PROMETHEUS_PORT}",
        caller=f"127.0.0.1:{CALLER_PORT}",
    )
    groups = fleet.groups
    release.file(
        files["alerts.yml"],
        "alerts.yml.j2",
        livekit_names=signalling_names(fleet),
        app_names=app_names(fleet),
        clusters=clusters(fleet),
        pools=spared_pools(fleet),
        groups=groups,
    )
    # Read anew for whoever looks at it.
    page = f"{FOLDER}/consoles/index.html"
    release.file(page, "console.html.j2", groups=groups, clusters=clusters(fleet))
    web, password = f"{FOLDER}/web.yml", f"{FOLDER}/password"
    hidden = settings.password.get_secret_value().encode()
    release.file(web, "web.yml.j2", mode=0o600, user=settings.user, hash=_hash(settings.password))
    release.file(password, content=hidden, mode=0o600)
    unit_file = f"/etc/systemd/system/{PROMETHEUS}"
    release.file(
        unit_file,
        f"{PROMETHEUS}.j2",
        monitor=settings,
        hosts=len(fleet.watched),
        config=files["prometheus.yml"],
        consoles=f"{FOLDER}/consoles",
        credentials=(f"web.yml:{web}", f"password:{password}", *certificate),
        listen=f"127.0.0.1:{PROMETHEUS_PORT}",
    )
    release.enable(PROMETHEUS, unit_file)
    release.service(
        PROMETHEUS,
        inputs=[unit_file, *files.values()],
        credentials=[web, password],
        listens=[f"tcp/{PROMETHEUS_PORT}"],
    )
    _alertmanager(node)


def _alertmanager(node: Node) -> None:
    settings, release = node.settings.watches, node.release
    config, unit_file = f"{FOLDER}/alertmanager.yml", f"/etc/systemd/system/{ALERTMANAGER}"
    # Its URLs and the password of mail are secrets.
    release.file(config, "alertmanager.yml.j2", mode=0o600, monitor=settings)
    release.file(
        unit_file,
        f"{ALERTMANAGER}.j2",
        config=config,
        url=settings.url if settings else "",
        listen=f"127.0.0.1:{ALERTMANAGER_PORT}",
    )
    release.enable(ALERTMANAGER, unit_file)
    release.service(
        ALERTMANAGER,
        inputs=[unit_file],
        credentials=[config],
        listens=[f"tcp/{ALERTMANAGER_PORT}"],
    )


def _hash(password: SecretStr) -> str:
    """bcrypt, as Prometheus' web configuration takes it. The salt is made from the password, so
    that a re-deploy changes nothing; the password is random, and used nowhere else."""
    plain = password.get_secret_value().encode()
    salt = hashlib.sha256(b"callready monitor" + plain).digest()[:16]
    # The salt in bcrypt's own base64, of 22 characters.
    letters = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    number = int.from_bytes(salt) << 4
    text = "".join(letters[number >> 6 * (21 - i) & 63] for i in range(22))
    return bcrypt.hashpw(plain, f"$2b$10${text}".encode()).decode()
