"""A monitor on Debian 13 and the host that it watches on Debian 12, from bare: what it sees, who
sees it, and who is told when coturn and the app stop."""

from __future__ import annotations

import re
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from pydantic import SecretStr

from callready import docs
from callready.export import dashboard, without_data
from callready.release.authority import Authority, Identity
from lab import Lab, plan
from tests.support.fleet import (
    Fleet,
    Host,
    delivered,
    eventually,
    found,
    shown,
    verify,
    watched_inventory,
)
from tests.support.sink import Sink, sink

BOX, MONITOR = Host("h15"), Host("h26")
APP = plan.find_host(BOX.name).app_name
SMTP, HTTP = 2526, 8082
CHECKS = (
    "test_password",
    "test_targets",
    "test_measured",
    "test_alerts",
    "test_test_calls",
    "test_logs",
    "test_sweep",
)
MORE = ("test_listening", "test_units", "test_exposure", "test_later", "test_state")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Sink]:
    """Who gets the alerts, on the lab's bridge."""
    with sink(plan.MACHINE.ipv4, SMTP, HTTP) as found:
        yield found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Both hosts after their first deploy."""
    with delivered(BOX.name, MONITOR.name):
        groups, data, names = watched_inventory(BOX, MONITOR, SMTP, HTTP)
        groups["app"] = [BOX.fqdn]
        data["app"] = {
            "url": f"https://{APP}",
            "upstream": "127.0.0.1:8000",
            "api_token": "secret:app/token",
            "env_file": "/srv/app/.env",
            "owner": "app",
            "restart": ["backend.service"],
        }
        fleet = Fleet(tmp_path_factory.mktemp("watched"), groups, data, [*names, "app/token"])
        Lab().install_backend(BOX.name)
        fleet.deploy()
        yield fleet


def test_every_host_is_seen_and_a_second_deploy_changes_nothing(
    watched: Fleet, receiver: Sink, tmp_path: Path
) -> None:
    found = verify(tmp_path, *CHECKS, *MORE, inventory=watched.inventory)
    assert not {name: text for name, text in found.items() if text}
    assert len([name for name in found if name.startswith("test_targets")]) == 1
    assert len([name for name in found if name.startswith("test_measured")]) == 2
    again = watched.deploy()
    assert again.changed == [] and again.results["hosts"] == 2


def test_wrong_passwords_are_tried_in_vain_and_wrong_queries_are_answered(watched: Fleet) -> None:
    """From an address that asks for nothing else: it is kept out for a while."""
    right = watched.secrets["monitor/password"]

    def status(password: str, query: str = "up") -> str:
        ask = f"curl -s -K - -o /dev/null -w %{{http_code}} --cacert {plan.STATE}/ca.pem"
        url = f"{watched.data['monitor']['url']}/api/v1/query?query={query}"
        login = f'user = "operator:{password}"' if password else ""
        run = [*Lab().client_prefix(), *ask.split(), url]
        done = subprocess.run(run, input=login, text=True, check=True, stdout=subprocess.PIPE)
        return done.stdout

    assert {status(right, "up%7B") for _ in range(30)} == {"400"}
    assert {status("") for _ in range(30)} == {"401"}
    assert status("wrong") == "401"
    eventually(lambda: status("wrong") == "429")
    assert status(right) == "429"


def test_nobody_else_can_scrape(watched: Fleet, tmp_path: Path) -> None:
    """From the monitor's own address, past the filter: by certificate."""
    own = Authority(SecretStr(watched.secrets["fleet/ca"]))
    foreign = Authority(SecretStr("f" * 32))
    asked = [
        (own, Identity("monitor", (), ("client",)), True),
        (foreign, Identity("monitor", (), ("client",)), False),
        (own, Identity("xmonitor", (), ("client",)), False),
        (own, Identity(BOX.fqdn, (BOX.ipv4,), ("server",)), False),
    ]
    folder = "/root/scrape"
    (tmp_path / "ca.pem").write_bytes(own.certificate)
    scrape = f"curl -s -m 9 --cacert {folder}/ca.pem 'https://{BOX.ipv4}:9998/proxy?module=node'"
    MONITOR.root(f"rm -rf {folder}; mkdir -m 0700 {folder}")

    def put(name: str, content: bytes) -> None:
        copy = MONITOR.inside(f"umask 077; cat > {folder}/{name}")
        subprocess.run(copy, input=content, check=True)

    put("ca.pem", own.certificate)
    for authority, identity, allowed in asked:
        for name, content in zip(("cert", "key"), authority.issue(identity), strict=True):
            put(name, content)
        got = MONITOR.root(f"{scrape} --cert {folder}/cert --key {folder}/key", check=False)
        assert ("node_cpu_seconds_total" in got) == allowed, identity
    assert not MONITOR.root(scrape, check=False)
    # From elsewhere nothing answers at all.
    closed = subprocess.run(
        [*Lab().client_prefix(), "timeout", "3", "bash", "-c", f"< /dev/tcp/{BOX.ipv4}/9998"],
        capture_output=True,
        check=False,
    )
    assert closed.returncode
    served = MONITOR.root(
        f"echo | openssl s_client -connect {BOX.ipv4}:9998 2> /dev/null | openssl x509"
    )
    assert x509.load_pem_x509_certificate(served.encode()).issuer == (
        x509.load_pem_x509_certificate(own.certificate).subject
    )


def test_the_measurements_are_of_this_host(watched: Fleet) -> None:
    read = "cat /run/callready-measure/callready.prom"
    eventually(lambda: "callready_measured_seconds" in BOX.root(read, check=False))
    shown = BOX.root(read)
    release = BOX.root("readlink /etc/callready/current").rpartition("/")[2]
    assert f'callready_release_info{{release="{release}"}} 1' in shown
    assert 'callready_turn_allocations{pool="calls"} ' in shown  # those of test calls
    assert f'callready_certificate_not_after_seconds{{name="turn.{BOX.fqdn}"' in shown
    assert 'use="livekit.rtc.port_range_start/udp/50000-60000"' in shown
    assert watched.marker not in shown


def test_what_is_asked_finds_something(watched: Fleet) -> None:
    """Everything in the dashboard, and every series that the alerts look at but those that come
    with what is wrong."""
    ask = partial(found, watched)
    eventually(lambda: bool(ask('callready_probe_success{probe="call",turn!=""}')))
    eventually(lambda: not without_data(dashboard(()), ask), 120)
    rules = docs.rules(())
    for name, own in ("livekit_example_com", BOX.fqdn), ("app_example_com", APP):
        rules = rules.replace(name, own.replace(".", "_"))
    (group,) = yaml.safe_load(rules)["groups"]
    asked = {
        series
        for rule in group["rules"]
        for text in [re.sub(r"\b(by|on|group_left|group_right) \(.*?\)", "", rule["expr"])]
        for series in re.findall(r"\b(?:up|[a-z]+[_:][\w:]+)\b(?:\{.*?\}|(?!\())", text)
    }
    assert len(asked) > 40
    assert {series for series in asked if not ask(series)} <= {
        "callready_release_pending_since_seconds",
        'livekit_participant_join_total{state="rtc_failure"}',
    }


def test_the_secrets_are_in_nothing_that_the_monitor_keeps_or_shows(watched: Fleet) -> None:
    pages = {path: shown(watched, path) for path in ("/api/v1/targets", "/consoles/index.html")}
    pages |= {path: shown(watched, f"/api/v1/status/{path}") for path in ("config", "flags")}
    every = {"match[]": '{__name__=~".+"}'}
    pages["series"] = shown(watched, "/api/v1/series", **every)
    for name, text in (("series", "callready_probe_success"), ("config", "password_file: ")):
        assert text in pages[name]
    assert not [
        (page, name)
        for page, text in pages.items()
        for name, secret in watched.secrets.items()
        if secret in text or b64encode(f"prometheus:{secret}".encode()).decode() in text
    ]
    kept = "grep -rlsF -e '{}' /var/log/callready"
    assert BOX.fqdn in MONITOR.root(kept.format("livekit-server"))
    assert not MONITOR.root(kept.format(watched.marker), check=False)


def test_who_has_to_know_is_told_that_coturn_and_the_app_stopped(
    watched: Fleet, receiver: Sink
) -> None:
    def told(name: str, status: str) -> list[dict[str, Any]]:
        every = (alert for _, alert in receiver.alerts("/page", status))
        return [alert for alert in every if alert["labels"]["alertname"] == name]

    wanted = {"TurnDown": "(pool calls)", "AppDown": f"(https://{APP}, https://{APP} over IPv6)"}
    units = "turnserver@calls.service backend.socket backend.service"
    receiver.wait_for(lambda: list(receiver.alerts("/watchdog")), 120)
    BOX.root(f"systemctl stop {units}")
    stopped = time.monotonic()
    try:
        for name, words in wanted.items():
            (alert, *_) = receiver.wait_for(partial(told, name, "firing"), 300)
            print(f"{name} is told after {time.monotonic() - stopped:.0f} s")
            assert alert["labels"]["host"] == BOX.fqdn
            summary = alert["annotations"]["summary"]
            assert "callers" in summary and words in summary
            receiver.wait_for(partial(mails, receiver, summary), 60)
        assert {to for _, to, _ in receiver.mails} == {("oncall@lab.test",)}
    finally:
        BOX.root(f"systemctl start {units}")
    for name in wanted:
        receiver.wait_for(partial(told, name, "resolved"), 300)
    assert watched.marker not in str([receiver.posts, receiver.mails])


def mails(receiver: Sink, text: str) -> list[str]:
    return [mail for _, _, mail in receiver.mails if text in mail]


def test_a_monitor_that_is_down_touches_nobody_and_goes_without_a_trace(watched: Fleet) -> None:
    watched.unsettled = True
    Lab().power_cut(MONITOR.name)
    watched.data["turn"]["total_quota"] = 1300
    changed = watched.run("--json", "--limit", BOX.fqdn)
    assert changed.status == 0 and changed.changed == [BOX.name], changed.text
    # Without the group nothing of it stays where callers come.
    del watched.groups["monitor"], watched.data["monitor"], watched.data["fleet_ca"]
    watched.deploy()
    left = BOX.root("ls /etc/systemd/system /etc/callready/current/files/etc/systemd/system")
    assert not [
        word for word in ("exporters", "node-exporter", "measure") if f"callready-{word}" in left
    ]
    assert not BOX.root("ls -A /etc/callready/fleet 2> /dev/null", check=False)
    assert not BOX.root("ss -Hltn 'sport = :9998 or sport = :9100 or sport = :8404'")
