"""The logs of all hosts, on the monitor."""

from typing import Any

from callready.release.declaration import ROOT
from callready.release.facts import HOST
from callready.release.node import Node
from callready.settings.fleet import FLEET_CA
from callready.settings.ports import LOG_RECEIVER, LOGS, listeners

CONFIG = f"{ROOT}/logs.conf"
USER = "callready-logs"
RECEIVER = "/usr/local/lib/callready/log-receiver"
FOLDER = "callready"  # in /var/log

# As POSIX extended regular expressions (regcomp(3)) in a string of rsyslog's: JSON web tokens,
# whole or cut; values of what is called a secret, as in URLs, in JSON and in plain words;
# credentials of HTTP.
_NAMES = "([Ss]ecret|SECRET|[Pp]assw(or)?d|PASSWORD|[Tt]oken|TOKEN|[Cc]redential|[Aa]uthorization)"
_VALUE = r"((Bearer|Basic) +)?[^]\"'\\\\&,; ]+"
SECRETS = "|".join(
    (
        "eyJ[A-Za-z0-9_.=-]{8,}",
        rf"[A-Za-z_-]*{_NAMES}[A-Za-z_-]*(=[\"'\\\\]*|[\"'\\\\]+ *: *[\"'\\\\]+){_VALUE}",
        rf"([Ss]ecret|[Pp]assw(or)?d): *{_VALUE}",
        "(Bearer|Basic) +[A-Za-z0-9._~+/=-]{8,}",
        # Of a webhook that failed, as Go says it: the path may be what opens it.
        r"(Get|Post) [\"'\\\\]+https?://[^\"'\\\\ ]+",
    )
)


def logs(node: Node) -> None:
    """Each host sends what it writes to its journal from now on, under the name in its certificate;
    the monitor keeps it."""
    settings, secret = node.settings.watched, node.settings.fleet_ca
    (monitor, *_) = [*node.fleet.group("monitor"), ""]
    if not settings or not settings.logs or not secret or not monitor:
        return
    release = node.release
    certificate = release.identity("host", secret, node.identity)
    release.user(USER)
    # Debian's package starts a second journal of text files.
    release.mask_new("rsyslog.service")
    release.package("rsyslog")
    release.package("rsyslog-relp")
    release.file(
        CONFIG,
        "logs.conf.j2",
        logs=settings.logs,
        state=f"/var/lib/{LOGS.removesuffix('.service')}",
        target=_address(node, monitor),
        monitor=monitor,
        ca=FLEET_CA,
        unit=LOGS,
        secrets=SECRETS,
    )
    context: dict[str, Any] = {"user": USER, "credentials": certificate, "logs": settings.logs}
    _service(node, LOGS, [CONFIG], **context, config=CONFIG)
    if node.settings.watches:
        release.package("python3")
        receiver = HOST.joinpath("log_receiver.py").read_bytes()
        release.file(RECEIVER, content=receiver, mode=0o755)
        _service(
            node, LOG_RECEIVER, [RECEIVER], **context, script=RECEIVER, folder=FOLDER, ca=FLEET_CA
        )


def _service(node: Node, unit: str, inputs: list[str], **context: Any) -> None:
    unit_file = f"/etc/systemd/system/{unit}"
    node.release.file(unit_file, f"{unit}.j2", unit=unit, **context)
    node.release.enable(unit, unit_file)
    node.release.service(
        unit,
        inputs=[unit_file, FLEET_CA, *inputs],
        listens=listeners(node.ports, unit),
    )


def _address(node: Node, monitor: str) -> str:
    """Where a host reaches the monitor: inside, where both have an address there."""
    if node.name == monitor:
        return "127.0.0.1"
    there = node.fleet[monitor]
    inside = there.internal_address if node.settings.internal_address else None
    return inside or there.address or there.address6 or ""
