"""The monitor as its operators see it: behind a password, with every host measured and every alert
loaded."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from callready.diagnosis.model import Cause, Place
from callready.probes import ProbeError
from callready.probes.app import get
from callready.settings.ports import (
    ALERTMANAGER,
    CALLER,
    EXPORTERS,
    LOG_RECEIVER,
    LOGS,
    PROMETHEUS,
)
from tasks.caller import CONFIG
from tasks.monitor import FOLDER
from tests.verify.check import Check, each, having
from tests.verify.servers import Server
from tests.verify.targets import Site

monitors = each(having(lambda server: server.settings.watches))
_SCRAPE = 40  # seconds in which each target is asked once more (templates/prometheus.yml.j2)


def monitor_of(site: Site) -> Server:
    """The host that measures the others, where some are."""
    return next(server for server in site.hosts() if server.settings.watches)


def _ask(server: Server, path: str, password: str | None = None) -> tuple[int, Any]:
    """Status and JSON data of a page of Prometheus, with the right password unless told."""
    monitor = server.settings.watches
    assert monitor
    words = monitor.password.get_secret_value() if password is None else password
    login = base64.b64encode(f"{monitor.user}:{words}".encode()).decode()
    headers = {"Authorization": f"Basic {login}"} if words else {}
    answer, _ = get(f"{monitor.url}{path}", server.ca, headers)
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status_code, answer.json().get("data") if is_json else None


def _data(server: Server, path: str) -> Any:
    """What a page of Prometheus says. Raises ProbeError where it says nothing."""
    status, data = _ask(server, path)
    if status != 200 or data is None:
        look_at = f"journalctl -u {PROMETHEUS} and the edge on {server.name}"
        raise ProbeError(f"nobody sees how any host is: {server.name} answers {status}", look_at)
    return data


@monitors
def test_password(server: Server, check: Check) -> None:
    """The monitor asks for its password"""
    monitor = server.settings.watches
    assert monitor
    name = urlsplit(monitor.url).hostname
    for password, wanted in (("", 401), ("not the password", 401), (None, 200)):
        with check.probing():
            status, _ = _ask(server, "/api/v1/status/buildinfo", password)
            who = {"": "nobody", None: monitor.user}.get(password, "a wrong password")
            check.expect(
                status == wanted,
                f"{name} answers {who} with {status}, not with {wanted}",
                f"web.config.file of {PROMETHEUS}; after 20 wrong ones in a minute 429 is said",
                _open(server) if status == 200 else None,
            )
    check.figure(f"at {monitor.url}")


def _open(server: Server) -> Cause:
    return Cause(
        "monitor-open",
        server.name,
        Place.CONFIGURATION,
        f"whoever finds {server.name} reads everything that is measured: no password is asked for",
        f"deploy {server.name} again; systemctl restart {PROMETHEUS}",
    )


@monitors
def test_targets(server: Server, check: Check) -> None:
    """The monitor knows what to measure"""
    wanted = _wanted(server)
    with check.probing():
        found = _targets(server)
        up = [key for key in wanted if key in found and found[key]["health"] == "up"]
        for job, host in sorted(wanted - found.keys()):
            look_at = f"{FOLDER}/prometheus.yml and journalctl -u {PROMETHEUS} on {server.name}"
            check.expect(False, f"nobody sees how {host} is: its {job} is no target", look_at)
        check.figure(f"{len(up)} of {len(wanted)} targets up")


def _wanted(server: Server) -> set[tuple[str, str]]:
    """What Prometheus shall ask, by job and host."""
    config = yaml.safe_load(server.planned.files[f"{FOLDER}/prometheus.yml"].content)
    return {
        (job["job_name"], group["labels"]["host"])
        for job in config["scrape_configs"]
        for group in job["static_configs"]
    }


def _targets(server: Server) -> dict[tuple[str, str], Any]:
    """What Prometheus asks, by job and host."""
    return {
        (each["labels"]["job"], each["labels"].get("host", "")): each
        for each in _data(server, "/api/v1/targets?state=active")["activeTargets"]
    }


@each(having(lambda server: server.settings.watched))
def test_measured(server: Server, site: Site, check: Check) -> None:
    """It is measured"""
    monitor = monitor_of(site)
    assert server.facts.os  # what the monitor saw of one that is cut off is of before
    with check.probing():
        down = _down(monitor, server)
        # Else it may have been mended since it was asked.
        is_said = any("test_measured" in cause.checks for cause in server.causes)
        last, end = {each.get("lastScrape") for each in down.values()}, time.monotonic() + _SCRAPE
        while down and not is_said and time.monotonic() < end:
            time.sleep(1)
            down = _down(monitor, server)
            if last.isdisjoint(each.get("lastScrape") for each in down.values()):
                break
        whys = {job: down[job].get("lastError") or "it was never asked" for job in sorted(down)}
        look_at = f"{EXPORTERS} on {server.name}, and monitor.port there for {monitor.name}"
        cause = Cause(
            "metrics-lost",
            server.name,
            Place.NETWORK,
            f"{monitor.name} does not get the metrics of {server.name} ({', '.join(whys)})",
            f"let {monitor.name} reach monitor.port of {server.name} over TCP; {look_at}",
            tuple(whys.values()),
        )
        for job, why in whys.items():
            suffers = f"nobody sees how {server.name} is: its metrics ({job}) do not come ({why})"
            check.expect(False, suffers, look_at, cause)
        of_host = [job for job, host in _wanted(monitor) if host == server.name]
        check.figure(f"{len(of_host) - len(down)} of {len(of_host)} targets up")


def _down(monitor: Server, server: Server) -> dict[str, Any]:
    """A host's targets that were not reached when they were asked last, by job."""
    found, wanted = _targets(monitor), _wanted(monitor)
    mine = {job: found[job, host] for job, host in wanted & found.keys() if host == server.name}
    return {job: each for job, each in mine.items() if each["health"] != "up"}


@monitors
def test_test_calls(server: Server, check: Check) -> None:
    """Test calls are made all the time"""
    asked = {probe["kind"] for probe in json.loads(server.planned.files[CONFIG].content)["probes"]}
    with check.probing():
        end, runs = time.monotonic() + _SCRAPE, _runs(server)
        while time.monotonic() < end and {each["probe"] for each in runs} != asked:
            time.sleep(1)
            runs = _runs(server)
        for kind in sorted(asked):
            mine = [each for each in runs if each["probe"] == kind]
            check.expect(
                mine,
                f"nobody sees whether callers are served: the monitor has made no probe ({kind})",
                f"journalctl -u {CALLER}",
            )
            passed = sum(each["success"] == "1" for each in mine)
            check.figure(f"{passed} of {len(mine)} {kind}s so far")


def _runs(server: Server) -> list[dict[str, str]]:
    """The labels of every probe that was made in the last five minutes, and its success."""
    query = "callready_probe_success and callready_probe_last_run_seconds > time() - 300"
    found = _data(server, f"/api/v1/query?query={quote(query)}")["result"]
    return [{**each["metric"], "success": each["value"][1]} for each in found]


@each(having(lambda server: server.settings.watches and server.settings.watches.logs))
def test_logs(server: Server, check: Check) -> None:
    """Logs of every host arrive"""
    # Each has just noted that the verification has logged in.
    new = "find /var/log/callready -name '*.jsonl' -mmin -15 -printf '%h\\n' || :"
    fleet = server.node.fleet.hosts.items()
    watched = {name for name, host in fleet if host.watched}
    with check.probing():
        end = time.monotonic() + _SCRAPE
        while missing := watched - {
            Path(folder).name for folder in server.host.check_output(new).split()
        }:
            if time.monotonic() > end:
                break
            time.sleep(1)
        for name in sorted(missing):
            check.expect(
                False,
                f"what {name} logs is on {name} only: nothing of it has come to the monitor",
                f"journalctl -u {LOGS} there, and monitor.logs.port here; a wrong certificate is "
                f"in the journal of {LOG_RECEIVER}",
            )
        check.figure(f"of {len(watched - missing)} of {len(watched)} hosts")


@monitors
def test_alerts(server: Server, check: Check) -> None:
    """Every alert is loaded, and somebody is told"""
    rules = yaml.safe_load(server.planned.files[f"{FOLDER}/alerts.yml"].content)
    every = (rule for group in rules["groups"] for rule in group["rules"])
    wanted = {rule["alert"] for rule in every if "alert" in rule}
    with check.probing():
        groups = _data(server, "/api/v1/rules?type=alert")["groups"]
        loaded = {rule["name"]: rule for group in groups for rule in group["rules"]}
        check.expect(
            wanted == loaded.keys(),
            f"alerts are missing: {', '.join(sorted(wanted ^ loaded.keys()))}",
            f"journalctl -u {PROMETHEUS}",
            _unloaded(server, "Prometheus has other alerts than the rendered ones"),
        )
        for name, rule in loaded.items():
            check.expect(
                rule["health"] != "err",
                f"alert {name} is not evaluated: {rule.get('lastError')}",
                f"journalctl -u {PROMETHEUS}",
            )
        managers = _data(server, "/api/v1/alertmanagers")
        check.expect(
            managers["activeAlertmanagers"],
            "alerts reach nobody: Prometheus has no Alertmanager",
            f"systemctl status {ALERTMANAGER}",
            _unloaded(server, "Prometheus has no Alertmanager to tell"),
        )
        firing = sorted(_firing(loaded.values()))
        quiet = len(wanted) - len({name for name, _ in firing} - {"Watchdog"})
        check.figure(f"{quiet} of {len(wanted)} alerts quiet")
        for name, host in firing:
            if name != "Watchdog":
                check.figure(f"{name} {host}".rstrip())


def _unloaded(server: Server, what: str) -> Cause:
    mend = f"deploy {server.name} again; systemctl restart {PROMETHEUS}"
    return Cause("alerts-not-loaded", server.name, Place.CONFIGURATION, what, mend)


def _firing(rules: Any) -> Iterator[tuple[str, str]]:
    for rule in rules:
        for alert in rule.get("alerts", []):
            if alert["state"] == "firing":
                yield rule["name"], alert["labels"].get("host", "")
