"""The hook that makes DNS records at OVH, with real curl and OpenSSL, against a double of OVH's API
on loopback."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.x509 import DNSName

from callready.release.facts import host_script
from tests.support.inventories import Authority
from tests.support.ovh import NAME, Ovh, running

pytestmark = pytest.mark.tools

KEYS = {
    "application_key": "UnitApplication1",
    "application_secret": "unit0application0secret000000001",
    "consumer_key": "unit0consumer0key000000000000001",
}
HOST = "turn.callready.test"
RECORD = "/domain/zone/callready.test/record"
REFRESH = "/domain/zone/callready.test/refresh"
Hook = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ovh() -> Ovh:
    return Ovh("callready.test", dict(KEYS), lambda command, name, value: None)


@pytest.fixture
def hook(ovh: Ovh, authority: Authority, tmp_path: Path) -> Iterator[Hook]:
    """Runs the script as certbot would."""
    script, etc = tmp_path / "ovh-dns", tmp_path / "etc/callready"
    script.write_bytes(host_script("ovh-dns.sh"))
    etc.mkdir(parents=True)
    lines = [f"dns_ovh_{key} = {value}\n" for key, value in KEYS.items()]
    (etc / "dns-credentials").write_text("".join(lines))
    certificate, key = map(Path, authority.issue(DNSName(NAME)))
    with running(ovh, ("127.0.0.1", 0), certificate, key) as port:
        (tmp_path / ".curlrc").write_text(
            f'connect-to = "{NAME}:443:127.0.0.1:{port}"\ncacert = "{certificate}"\n'
        )

        def run(*arguments: str, **certbot: str) -> subprocess.CompletedProcess[str]:
            told = {f"CERTBOT_{name.upper()}": value for name, value in certbot.items()}
            places = {"CALLREADY_ROOT": str(tmp_path), "CURL_HOME": str(tmp_path)}
            return subprocess.run(
                ["sh", script, *arguments],
                env={**os.environ, **places, **told},
                capture_output=True,
                text=True,
            )

        yield run


def test_a_record_is_published_and_withdrawn(ovh: Ovh, hook: Hook) -> None:
    ovh.skew = 7000  # the signature takes OVH's time, whatever the host's clock says
    added = hook("add", "0", domain=HOST, validation="a_B-c")
    assert (added.returncode, added.stderr) == (0, "")
    assert ovh.served == {("_acme-challenge.turn.callready.test.", "a_B-c")}
    another = hook("add", "0", domain="callready.test", validation="d")
    assert ("_acme-challenge.callready.test.", "d") in ovh.served
    for done in (added, another):
        removed = hook("remove", auth_output=done.stdout.strip())
        assert (removed.returncode, removed.stderr) == (0, "")
        again = hook("remove", auth_output=done.stdout.strip())  # somebody removed it by hand
        assert again.returncode == 0
    assert (ovh.served, ovh.records) == (set(), {})


def test_checking_changes_nothing(ovh: Ovh, hook: Hook) -> None:
    assert hook("check", HOST).returncode == 0
    assert {call.split()[0] for call in ovh.calls} == {"GET"}
    assert hook("remove").returncode == 0, "nothing was added"


def test_a_consumer_key_may_be_for_one_zone_alone(ovh: Ovh, hook: Hook) -> None:
    ovh.rights = [(method, "/domain/zone/callready.test/*") for method in ("GET", "POST", "DELETE")]
    added = hook("add", "0", domain=HOST, validation="x")
    assert (added.returncode, added.stderr) == (0, "")


KEYS_MUST_FIT = (
    "application_key, application_secret and consumer_key must be of one application at ovh-eu, and "
    "the consumer key confirmed by its owner"
)
ASKED = f"GET /domain/zone/{HOST}/record?fieldType=TXT&subDomain=_acme-challenge"
MOVE = "make the keys with the account that has the zone, or name another provider"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"application_secret": "other"},
            f"OVH answers {ASKED} with 400 INVALID_SIGNATURE: Invalid signature: {KEYS_MUST_FIT}",
        ),
        (
            {"application_key": "other"},
            f"OVH answers {ASKED} with 403 INVALID_KEY: This application key is invalid: "
            + KEYS_MUST_FIT,
        ),
        (
            {"consumer_key": "other"},
            f"OVH answers {ASKED} with 403 INVALID_CREDENTIAL: This credential is not valid: "
            + KEYS_MUST_FIT,
        ),
        ({"zone": "elsewhere.test"}, f"OVH has no zone for {HOST}: {MOVE}"),
        ({"rights": []}, f"OVH has no zone that this consumer key may GET for {HOST}: {MOVE}"),
        (
            {"rights": [("GET", "/domain/zone/*")]},
            f"OVH answers POST {RECORD} with 403 NOT_GRANTED_CALL: This call has not been granted: "
            "make a consumer key that may GET, POST and DELETE on /domain/zone/*",
        ),
        (
            {"failing": {("POST", REFRESH)}},
            f"OVH answers POST {REFRESH} with 500 INTERNAL_SERVER_ERROR: Internal server error: "
            "try again later",
        ),
    ],
)
def test_what_ovh_refuses_is_said_with_what_to_do(
    ovh: Ovh, hook: Hook, change: dict[str, object], said: str
) -> None:
    for key, value in change.items():
        if key in ovh.keys:
            ovh.keys[key] = str(value)
        else:
            setattr(ovh, key, value)
    done = hook("add", "0", domain=HOST, validation="x")
    assert (done.returncode, done.stderr) == (1, f"callready: {said} (tls.acme.dns)\n")
    assert not ovh.served
    for number in ovh.records:  # certbot has it removed whatever happened
        assert done.stdout == f"callready.test {number}\n"


def test_an_api_that_cannot_be_reached_is_named(hook: Hook, tmp_path: Path) -> None:
    (tmp_path / ".curlrc").write_text(f'connect-to = "{NAME}:443:127.0.0.1:1"\n')
    done = hook("check", HOST)
    assert done.returncode == 1
    assert done.stderr.startswith("callready: OVH's API does not answer this host: curl: (7)")


def test_no_secret_is_an_argument(hook: Hook, tmp_path: Path) -> None:
    """Of any program that the script starts."""
    for name in ("curl", "openssl"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/said\nexec /usr/bin/{name} "$@"\n'
        )
        stand_in.chmod(0o755)
    script = tmp_path / "ovh-dns"
    script.write_text(script.read_text().replace("PATH=", f"PATH={tmp_path}/bin:", 1))
    assert hook("add", "0", domain=HOST, validation="x").returncode == 0
    said = (tmp_path / "said").read_text()
    assert "curl" in said and "openssl" in said
    assert not [value for value in KEYS.values() if value in said]
