"""Try who is told: python -m callready.alert_test inventories/ENV

Sends a test alert of each severity by the monitor's own Alertmanager, and says of everyone who is
to be told whether their server took it.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from paramiko import SSHException
from pyinfra.api.exceptions import PyinfraError

from callready.release.node import Node
from callready.rollout.remote import as_root
from callready.rollout.ssh import hosts_of
from callready.secrets.loading import validate
from callready.secrets.masking import mask
from callready.settings.inventory import inventory_data
from callready.settings.monitor import Monitor
from callready.settings.ports import ALERTMANAGER, ALERTMANAGER_PORT
from callready.settings.problem import SettingsError

# Seconds: group_wait of templates/alertmanager.yml.j2, and some more; group_interval, after which
# Alertmanager gives a message up, and both with some more.
WAIT, FIRST, INTERVAL, LAST = 10, 12, 60, 85
# Runs a script as root on the monitor; the lines that it prints.
Shell = Callable[[str], list[str]]
# A word of Alertmanager's journal; and what it says when it tries no more, at once (due) or after
# INTERVAL.
_WORD = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|(\S+))')
_OVER = re.compile(
    r"(\w+/\w+\[\d+]): notify retry canceled( due)?.*? attempts: (.*?)(?=; \w+/\w+\[|$)"
)


class Target(NamedTuple):
    """Someone who is told: as Alertmanager counts them, and as people know them."""

    severity: str
    integration: str
    number: int
    shown: str

    @property
    def key(self) -> str:
        """As in Alertmanager's journal."""
        return f"{self.severity}/{self.integration}[{self.number}]"


def targets(monitor: Monitor) -> list[Target]:
    """Everyone who is told; of a webhook only where it is, the rest may be a secret."""
    found = []
    for severity in ("page", "ticket"):
        who = monitor.told(severity)
        found += [Target(severity, "email", n, f"mail {to}") for n, to in enumerate(who.mail)]
        for n, url in enumerate(who.webhooks):
            at = urlsplit(url.get_secret_value())
            where = f"webhook {at.scheme}://{at.netloc.rpartition('@')[2]}/…"
            found.append(Target(severity, "webhook", n, where))
    return found


def ask(shell: Shell, method: str, path: str, body: str = "") -> str:
    """What Alertmanager answers. By bash: a bare Debian has neither curl nor Python."""
    head = f"{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
    request = shlex.quote(f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}")
    connect = f"exec 3<> /dev/tcp/127.0.0.1/{ALERTMANAGER_PORT}"
    status, *rest = shell(f"{connect} && printf %s {request} >&3 && tr -d '\\r' <&3") or [""]
    if " 200 " not in status:
        raise SettingsError(f"Alertmanager answers {path} with {status!r}: {' '.join(rest[-1:])}")
    return "\n".join(rest).partition("\n\n")[2]


def counted(metrics: str) -> tuple[Counter[str], Counter[str]]:
    """By integration: how often Alertmanager has begun to send, and what of it is not over."""
    begun, trying = Counter[str](), Counter[str]()
    signs = {"s": 1, "s_failed": -1, "_requests": -1, "_requests_failed": 1}
    line = r'^alertmanager_notification(\w+)_total\{.*?integration="(\w+)".*\} (\S+)$'
    for name, integration, value in re.findall(line, metrics, re.MULTILINE):
        begun[integration] += int(float(value)) * (name == "s")
        trying[integration] += int(float(value)) * signs.get(name, 0)
    return begun, trying


def refusals(journal: Iterable[str], since: float) -> dict[str, str]:
    """Why somebody takes nothing that was sent after `since`, by `Target.key`; not of those who
    took it at last."""
    found = dict[str, str]()
    for line in journal:
        words = {key: quoted or plain for key, quoted, plain in _WORD.findall(line)}
        why = re.sub(r"\\(.)", r"\1", words.get("err", "").replace(r"\n", " "))
        if "integration" in words:
            found[f"{words['receiver']}/{words['integration']}"] = why
        for key, due, last in _OVER.findall(why):
            # Before that it is about older messages, and their server may be well again.
            if due or float(line.split()[0]) > since + INTERVAL:
                found[key] = last
    return {key: why for key, why in found.items() if why}


def attempt(shell: Shell, host: str, who: list[Target]) -> dict[str, str]:
    """Send the alerts and wait until it is known of everyone; as `refusals`."""
    since, (before, _) = int(shell("date +%s")[0]), counted(ask(shell, "GET", "/metrics"))
    # A name of its own each time: the same again would be kept back for hours.
    labels = {"alertname": f"Test {time.strftime('%H:%M:%S')}", "host": host, "test": "callready"}
    words = {
        "look_at": "nothing; that this message came is all",
        "docs": "docs/watching.md#try-who-is-told",
    }
    summary = "This is only a test of who is told ({}): nothing is broken, there is nothing to do"
    alerts = [
        {
            "labels": {**labels, "severity": severity},
            "annotations": {**words, "summary": summary.format(severity)},
        }
        for severity in dict.fromkeys(target.severity for target in who)
    ]
    ask(shell, "POST", "/api/v2/alerts", json.dumps(alerts))
    print(f"sent; it takes {FIRST} s to {LAST} s until it is known who took it", flush=True)
    wanted, end = Counter(target.integration for target in who), time.monotonic() + LAST
    time.sleep(FIRST)
    journal = f"journalctl --no-pager -o short-unix -u {ALERTMANAGER} --since=@{since + WAIT}"
    while True:
        begun, trying = counted(ask(shell, "GET", "/metrics"))
        found = refusals(shell(f"{journal} < /dev/null"), since)
        late = {kind for kind in wanted if begun[kind] - before[kind] < wanted[kind]}
        quiet = {target.integration for target in who if target.key not in found}
        if time.monotonic() > end or not any(kind in late or trying[kind] for kind in quiet):
            break
        time.sleep(2)
    known = json.loads(ask(shell, "GET", "/api/v2/alerts?active=false&filter=test%3Dcallready"))
    labelled = [each["labels"] for each in known]
    held = {each["labels"]["severity"] for each in alerts if each["labels"] in labelled}
    for target in who:
        if target.severity in held or (target.integration in late and not held):
            found.setdefault(target.key, "nothing was sent: is there a silence (amtool silence)?")
    return found


def alert_test(inventory: str) -> bool:
    """Whether everyone took it, which is printed of each; raises SettingsError."""
    data = inventory_data(inventory)
    fleet = validate(inventory, data)
    if not (watching := [host for host in fleet.group("monitor").items() if host[1].watches]):
        raise SettingsError(f"{inventory}: no host in group monitor: see docs/watching.md")
    ((name, settings),) = watching
    monitor, connection = settings.monitor, hosts_of(data, [name], fleet)[name]
    assert monitor

    def shell(script: str) -> list[str]:
        ok, output = as_root(connection, Node(name, fleet), script, "bash -s")
        if not ok:
            said = " ".join(output.stderr_lines[-1:])
            why = f"Alertmanager cannot be asked ({said}): systemctl status {ALERTMANAGER}"
            raise SettingsError(f"{name}: {why}")
        return output.stdout_lines

    try:
        connection.connect(show_errors=False, raise_exceptions=True)
        found = attempt(shell, name, who := targets(monitor))
    except (PyinfraError, SSHException, OSError) as error:
        raise SettingsError(f"{name}: {error}") from None
    urls = [url.get_secret_value() for _, url in monitor.urls]
    hidden = {*fleet.secrets, *urls, *(urlsplit(url).path for url in urls)} - {"", "/"}
    for target in who:
        why = found.get(target.key)
        said = mask(f"not taken: {why}", hidden)[:200] if why else "taken"
        print(f"{target.severity:6} {target.shown}: {said}")
    return not any(target.key in found for target in who)


def main(arguments: list[str]) -> int:
    """The `make alert-test` command."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m callready.alert_test inventories/ENV", file=sys.stderr)
        return 2
    try:
        return 0 if alert_test(arguments[0]) else 1
    except SettingsError as error:
        print(f"callready: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
