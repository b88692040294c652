"""What `make alert-test` reads: who is told, and Alertmanager's metrics and journal, as those of
Debian 12 (0.25) and 13 (0.28) are."""

import json
from typing import Any

import pytest
from pydantic import SecretStr

from callready.alert_test import Target, attempt, counted, main, refusals, targets
from callready.settings.monitor import Monitor

NO_TLS = "establish connection to server: dial tcp 192.0.2.9:587: connect: connection refused"
OLD = [
    f'ts=2026-11-29T23:46:42.195Z caller=notify.go:732 level=warn component=dispatcher receiver=ticket integration=email[0] msg="Notify attempt failed, will retry later" attempts=1 err="{NO_TLS}"',
    'ts=2026-11-29T23:47:17.116Z caller=dispatch.go:352 level=error component=dispatcher msg="Notify for alerts failed" num_alerts=1 err="page/webhook[0]: notify retry canceled due to unrecoverable error after 1 attempts: unexpected status code 404: http://192.0.2.9/page: no /page"',
    'ts=2026-11-29T23:47:18.116Z caller=notify.go:732 level=warn component=dispatcher receiver=page integration=email[0] msg="Notify attempt failed, will retry later" attempts=1 err="EOF"',
    'ts=2026-11-29T23:47:19.116Z caller=notify.go:743 level=info component=dispatcher receiver=page integration=email[0] msg="Notify success" attempts=2',
]
NEW = [
    'time=2026-11-30T00:01:21.512Z level=WARN source=notify.go:865 msg="Notify attempt failed, will retry later" component=dispatcher receiver=ticket integration=webhook[0] aggrGroup="{}:{alertname=\\"T\\"}" attempts=1 err="unexpected status code 501: <!DOCTYPE HTML>\\n<html lang=\\"en\\">\\n"',
    f'time=2026-11-30T00:01:41.513Z level=ERROR source=dispatch.go:360 msg="Notify for alerts failed" component=dispatcher num_alerts=1 err="page/webhook[1]: notify retry canceled after 9 attempts: Post \\"<redacted>\\": context deadline exceeded; page/email[0]: notify retry canceled after 9 attempts: {NO_TLS}"',
]


def test_everyone_is_named_without_the_path_of_a_webhook() -> None:
    hook = SecretStr("https://hooks.example.net:8443/services/TOKEN?key=TOKEN")
    monitor = Monitor.model_validate(
        {
            "url": "https://monitor.example.net",
            "password": SecretStr("-" * 32),
            "page": {"mail": ["oncall@example.net"], "webhooks": [hook]},
        }
    )
    shown = [(each.key, each.shown) for each in targets(monitor)]
    page = [
        ("page/email[0]", "mail oncall@example.net"),
        ("page/webhook[0]", "webhook https://hooks.example.net:8443/…"),
    ]
    # Who gets pages gets tickets too where nobody else does.
    assert shown == [*page, *((key.replace("page", "ticket"), at) for key, at in page)]


def test_what_is_begun_and_not_over_is_counted() -> None:
    begun, trying = counted(
        """\
alertmanager_notifications_total{integration="email"} 9
alertmanager_notifications_failed_total{integration="email",reason="other"} 1
alertmanager_notifications_failed_total{integration="email",reason="serverError"} 2
alertmanager_notification_requests_total{integration="email"} 25
alertmanager_notification_requests_failed_total{integration="email"} 21
alertmanager_notifications_suppressed_total{reason="silence"} 7
alertmanager_notification_latency_seconds_count{integration="email"} 25
"""
    )
    # Four were taken, three given up.
    assert (begun, trying) == ({"email": 9}, {"email": 2})


@pytest.mark.parametrize(
    ("journal", "found"),
    [
        (
            OLD,
            {
                "ticket/email[0]": NO_TLS,
                "page/webhook[0]": "unexpected status code 404: http://192.0.2.9/page: no /page",
            },
        ),
        (
            NEW,
            {
                "ticket/webhook[0]": 'unexpected status code 501: <!DOCTYPE HTML> <html lang="en"> ',
                "page/webhook[1]": 'Post "<redacted>": context deadline exceeded',
                "page/email[0]": NO_TLS,
            },
        ),
    ],
)
def test_the_journal_says_who_took_nothing_and_why(
    journal: list[str], found: dict[str, str]
) -> None:
    at = 1795996709
    lines = [f"{at + 70}.589123 mon1 prometheus-alertmanager[812]: {line}" for line in journal]
    assert refusals(lines, at) == found


def test_messages_of_before_that_are_given_up_meanwhile_are_no_refusal() -> None:
    at = 1795996709
    assert refusals([f"{at + 50}.589123 mon1 prometheus-alertmanager[812]: {NEW[1]}"], at) == {}


def test_it_takes_an_inventory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["active", "suppressed"])
def test_a_test_that_is_held_back_is_not_taken(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dead man's switch is called meanwhile, the numbers alone do not tell."""
    monkeypatch.setattr("callready.alert_test.FIRST", 0)
    posted: list[dict[str, Any]] = []

    def shell(script: str) -> list[str]:
        head, _, body = script.partition("\r\n\r\n")
        lines: list[str] = []
        if "date" in script:
            return ["1795996709"]
        if "POST" in head:
            posted.extend(json.loads(body.partition("' >&3")[0]))
        elif "/metrics" in head:
            lines = [
                f'alertmanager_notification{name}_total{{integration="webhook"}} {5 + len(posted)}'
                for name in ("s", "_requests")
            ]
        elif "active=false" in head and state == "suppressed":
            lines = [json.dumps([{**each, "status": {"state": state}} for each in posted])]
        elif "alerts" in head:
            lines = ["[]"]
        return ["HTTP/1.0 200 OK", "Date: now", "", *lines] if "/dev/tcp" in script else []

    who = [Target("page", "webhook", 0, "webhook https://hooks.example.net/…")]
    found = attempt(shell, "mon1.example.net", who)
    assert [*found] == (["page/webhook[0]"] if state == "suppressed" else [])
    (sent,) = posted
    assert sent["labels"]["severity"] == "page" and "only a test" in sent["annotations"]["summary"]
