"""Certificates from an ACME server: what may be set, what a host is asked to do, what certbot gets,
and the script that takes certificates up, run against real OpenSSL."""

import os
import re
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography.x509 import DNSName, IPAddress

from callready.release import refusals
from callready.release.declaration import Release
from callready.release.facts import Facts, UnitFact, host_script
from callready.release.node import Node
from callready.release.plan import plan
from callready.secrets.__main__ import complete
from callready.settings.dns_providers import PROVIDERS
from callready.settings.fleet import Fleet
from callready.settings.ports import port_plan
from callready.settings.problem import SettingsError
from tasks import declare
from tasks.tls import TIMER, UNIT
from tests.support.inventories import (
    SECRETS,
    SFU1,
    TURN1,
    TURN2,
    Authority,
    Edit,
    bare,
    box,
    deployed,
    load,
    write_store,
)

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("project")

ACME = {"email": "operator@callready.test"}
OVH = {
    name: f"secret:ovh/{name}" for name in ("application_key", "application_secret", "consumer_key")
}
BY_DNS = {**ACME, "challenge": "dns-01", "dns": OVH}


def tls(acme: object, **more: object) -> Edit:
    return "*", "tls", {"acme": acme, **more}


def edge_box(*edits: Edit) -> Fleet:
    """One box with an edge, TURN and HTTPS on 443."""
    return box((SFU1, "edge", {}), (SFU1, "turn.pools.calls.tls_on_443", True), tls(ACME), *edits)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"acme": ACME, "certificate": "a.pem", "key": "a.key"},
            "tls: set either acme, or both certificate and key",
        ),
        ({"certificate": "a.pem"}, "tls: set either acme, or both certificate and key"),
        (
            {"acme": {**ACME, "challenge": "dns-01"}},
            "tls.acme: challenge dns-01 needs dns, the provider of the zone and its credentials; "
            "http-01 takes none",
        ),
        ({"acme": {**ACME, "ca": "no/such.pem"}}, "tls.acme.ca: no/such.pem: no such file"),
    ],
)
def test_there_is_exactly_one_way_to_a_certificate(section: object, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        load((TURN1, "tls", section))
    assert str(error.value).splitlines() == [f"inventories/test: {TURN1}: {message}"]


def test_http_01_needs_port_80_of_the_edge() -> None:
    with pytest.raises(SettingsError, match=r"edge\.http_port: must be 80: that is where"):
        edge_box((SFU1, "edge", {"http_port": 8080}))


def challenges(fleet: Fleet, host: str) -> list[tuple[int, str]]:
    return [(use.first, use.open_to) for use in port_plan(fleet[host]) if use.role == "acme"]


def test_a_turn_host_opens_port_80_and_an_edge_answers_for_certbot() -> None:
    assert challenges(load(tls(ACME)), TURN1) == [(80, "anyone")]
    assert challenges(edge_box(), SFU1) == [(8888, "this host")]
    write_store_with_ovh()
    assert challenges(load(tls(BY_DNS)), TURN1) == []


def test_the_edge_answers_challenges_for_the_name_of_turn_too() -> None:
    fleet = edge_box((SFU1, "name", "turn.callready.test"))
    config = declare(fleet, SFU1).release.files["/etc/haproxy/haproxy.cfg"].content.decode()
    named = re.search(r"acl named .* -m str (.*)", config)
    assert named
    assert set(named[1].split()) == {"turn.callready.test", "livekit.callready.test"}


def write_store_with_ovh() -> None:
    write_store({**SECRETS, **{f"ovh/{name}": f"unit{name.replace('_', '')}" for name in OVH}})


@pytest.mark.parametrize(
    "dns",
    [
        OVH,
        {"provider": "ovh", "credentials": OVH},
        {"provider": "ovh", **OVH, "endpoint": "ovh-ca"},
    ],
)
def test_ovh_is_asked_by_a_hook_and_its_credentials_are_a_file_of_root_alone(
    dns: dict[str, object],
) -> None:
    write_store_with_ovh()
    release = declare(load(tls({**BY_DNS, "dns": dns})), TURN1).release
    file = release.files["/etc/callready/dns-credentials"]
    assert (file.mode, file.owner, file.group) == (0o600, "root", "root")
    lines = [
        "dns_ovh_application_key = unitapplicationkey",
        "dns_ovh_application_secret = unitapplicationsecret",
        "dns_ovh_consumer_key = unitconsumerkey",
    ]
    endpoint = ["dns_ovh_endpoint = ovh-ca"] if "endpoint" in dns else []
    assert file.content.decode().splitlines()[1:] == lines + endpoint
    asked = release.certificates[TURN1].asked
    assert "/usr/local/lib/callready/ovh-dns add 120" in asked
    assert "--standalone" not in asked
    assert not [word for word in asked if "unit" in word]
    assert release.files["/usr/local/lib/callready/ovh-dns"].mode == 0o755
    assert not [name for name in release.packages if "dns" in name]
    node: Node = declare(load(tls(BY_DNS)), TURN1)
    for debian in ("12", "13"):
        facts = bare()
        facts.os_version = debian
        assert not list(refusals.of(node, facts))


def with_dns(provider: str, **credentials: object) -> Fleet:
    write_store({**SECRETS, "dns": "unit-token", "odd": "un#it,to'ken", "json": '{"type": "x"}'})
    dns = {"provider": provider, "credentials": credentials, "propagation": 30}
    return load(tls({**ACME, "challenge": "dns-01", "dns": dns}))


@pytest.mark.parametrize(
    ("provider", "credentials", "lines"),
    [
        ("cloudflare", {"api_token": "secret:dns"}, ["dns_cloudflare_api_token = unit-token"]),
        (
            "cloudflare",
            {"email": "a@b.test", "api_key": "secret:odd"},
            ["dns_cloudflare_email = a@b.test", 'dns_cloudflare_api_key = "un#it,to\'ken"'],
        ),
        (
            "rfc2136",
            {"server": "192.0.2.53", "name": "key.", "secret": "secret:dns", "port": 5353},
            [
                "dns_rfc2136_server = 192.0.2.53",
                "dns_rfc2136_name = key.",
                "dns_rfc2136_secret = unit-token",
                "dns_rfc2136_port = 5353",
            ],
        ),
        ("google", {"service_account": "secret:json"}, []),
    ],
)
def test_a_plugin_gets_its_credentials_by_file(
    provider: str, credentials: dict[str, object], lines: list[str]
) -> None:
    release = declare(with_dns(provider, **credentials), TURN1).release
    file = release.files["/etc/callready/dns-credentials"]
    assert (file.mode, file.owner) == (0o600, "root")
    text = file.content.decode()
    assert text.splitlines()[1:] == lines or text == '{"type": "x"}'
    assert f"python3-certbot-dns-{provider}" in release.packages
    asked = " ".join(release.certificates[TURN1].asked)
    at = f"--authenticator dns-{provider} --dns-{provider}-credentials {file_of(release)}"
    assert f"{at} --dns-{provider}-propagation-seconds 30" in asked


def file_of(release: Release) -> str:
    return next(path for path in release.files if path.endswith("dns-credentials"))


def test_the_page_has_every_provider_and_the_debian_releases_that_have_its_plugin() -> None:
    page = (REPOSITORY / "docs/certificates.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\| ([\d, ]+) \|$", page, re.MULTILINE)
    assert {name: (debian, *_keys(text)) for name, text, debian in rows} == {
        name: (", ".join(known.debian), *sorted({*sum(known.ways, ()), *known.more}))
        for name, known in PROVIDERS.items()
    }


def _keys(text: str) -> list[str]:
    return sorted({key for key in re.findall(r"`(\w+)`", text)})


def test_route53_reads_its_credentials_as_amazons_tools_do() -> None:
    keys = {"aws_access_key_id": "AKIAUNIT", "aws_secret_access_key": "secret:dns"}
    release = declare(with_dns("route53", **keys), TURN1).release
    assert release.files["/etc/callready/dns-credentials"].content.decode().splitlines()[1:] == [
        "[default]",
        "aws_access_key_id = AKIAUNIT",
        "aws_secret_access_key = unit-token",
    ]
    unit = release.files["/etc/systemd/system/certbot.service.d/callready.conf"].content.decode()
    assert "Environment=AWS_SHARED_CREDENTIALS_FILE=/etc/callready/dns-credentials\n" in unit
    asked = " ".join(release.certificates[TURN1].asked)
    assert "--authenticator dns-route53 --cert-name" in asked


@pytest.mark.parametrize(
    ("dns", "message"),
    [
        (
            {"provider": "cloudfare", "credentials": {"api_token": "secret:short"}},
            "provider 'cloudfare' is none of those that certbot in Debian has a plugin for: "
            "cloudflare, desec, digitalocean, dnsimple, gandi, gehirn, google, infomaniak, linode, "
            "ovh, rfc2136, route53, sakuracloud",
        ),
        (
            {"provider": "cloudflare", "credentials": {"token": "secret:short"}},
            "credentials.token is none of cloudflare's: api_key, api_token, email",
        ),
        (
            {"provider": "cloudflare", "credentials": {"email": "a@b.test"}},
            "credentials for cloudflare are api_token, or email and api_key",
        ),
        (
            {"provider": "desec", "credentials": {"token": "written-here"}},
            "credentials.token is written in the inventory; write a reference such as "
            '"secret:turn/calls" and keep the value in the store (make secrets ENV=…)',
        ),
        (
            {**OVH, "endpoint": "ovh-fr"},
            "credentials.endpoint is one of ovh-eu, ovh-ca, ovh-us",
        ),
        (
            {"application_key": "secret:short"},
            "credentials for ovh are application_key and application_secret and consumer_key",
        ),
    ],
)
def test_credentials_that_a_provider_would_not_take_are_refused(
    dns: dict[str, object], message: str
) -> None:
    write_store_with_ovh()
    with pytest.raises(SettingsError) as error:
        load((TURN1, "tls", {"acme": {**ACME, "challenge": "dns-01", "dns": dns}}))
    assert str(error.value) == f"inventories/test: {TURN1}: tls.acme.dns: {message}"


@pytest.mark.parametrize(
    ("provider", "key", "debian", "instead"),
    [
        ("gandi", "api_key", "13", "desec, google, infomaniak, ovh, rfc2136, route53"),
        ("desec", "token", "12", "digitalocean, dnsimple, gandi, gehirn"),
    ],
)
def test_dns_01_is_refused_where_debian_has_no_plugin(
    provider: str, key: str, debian: str, instead: str
) -> None:
    node: Node = declare(with_dns(provider, **{key: "secret:dns"}), TURN1)
    facts = bare()
    facts.os_version = debian
    (why,) = refusals.of(node, facts)
    assert why.startswith(f"tls.acme.dns: Debian {debian} has no python3-certbot-dns-{provider}; ")
    assert instead in why
    facts.os_version = "12" if debian == "13" else "13"
    assert not list(refusals.of(node, facts))


def test_the_authoritys_staging_needs_its_roots(tmp_path: Path) -> None:
    staging = {**ACME, "server": "https://acme-staging-v02.api.letsencrypt.org/directory"}
    with pytest.raises(SettingsError, match=r"tls.ca: is missing: nothing trusts"):
        load(tls(staging))
    roots = tmp_path / "roots.pem"
    where, key, settings = tls(staging)
    with_roots = (where, key, {**settings, "ca": str(roots)})
    with pytest.raises(SettingsError, match=r"tls.ca: .*roots.pem: no such file"):
        load(with_roots)
    roots.touch()
    load(with_roots)


def test_a_name_that_nobody_serves_any_more_is_not_renewed() -> None:
    release = acme_release()
    facts = issued(release)
    facts.pairs["old.callready.test"], facts.asked["old.callready.test"] = "0123", "4567"
    made = plan(release, facts)
    assert [tuple(c) for c in made.changes] == [
        ("-", "certificate", "old.callready.test is not renewed any more")
    ]
    assert [step.line for step in made.steps] == ["lock_host", "unask old.callready.test"]
    by_files = declare(load(), TURN1).release
    assert "unask " + TURN1 in [step.line for step in plan(by_files, issued(release)).after]


def acme_release(fleet: Fleet | None = None, host: str = TURN1) -> Release:
    return declare(fleet or load(tls(ACME)), host).release


def issued(release: Release) -> Facts:
    facts = deployed(release)
    for name, certificate in release.certificates.items():
        facts.pairs[name], facts.serials[name] = "0123456789abcdef", "2a"
        facts.asked[name] = certificate.request
        facts.served |= {(endpoint, name): "2a" for endpoint, _ in certificate.endpoints}
    for timer, service in release.timers.items():
        facts.units[timer] = UnitFact("loaded", "active", "enabled", 0, False, "-", "-")
        facts.units[service] = UnitFact("loaded", "inactive", "static", 0, False, "-", "-")
    return facts


def steps(release: Release, facts: Facts) -> list[str]:
    return [step.function for step in plan(release, facts).steps]


def test_a_bare_host_gets_a_placeholder_before_its_services_and_a_certificate_after() -> None:
    release = acme_release()
    made = plan(release, bare())
    assert ("+", "certificate", f"{TURN1} from ACME") in made.changes
    names = [step.function for step in made.steps]
    order = [
        "install_placeholder",
        "load_firewall",
        "restart",
        "wait_for_ports",
        "request_certificate",
        "take_up",
        "start_timer",
    ]
    assert [name for name in dict.fromkeys(names) if name in order] == order
    asked = next(step.line for step in made.steps if step.function == "request_certificate")
    assert "--standalone --http-01-port 80" in asked
    assert f"--cert-name {TURN1} -d {TURN1}" in asked


def test_a_host_with_its_certificate_needs_nothing() -> None:
    release = acme_release()
    assert plan(release, issued(release)).steps == []


def test_another_authority_is_asked_and_a_failed_renewal_is_asked_for_again() -> None:
    release, staging = (
        acme_release(),
        acme_release(load(tls({**ACME, "server": "https://acme.callready.test/directory"}))),
    )
    assert steps(staging, issued(release)) == ["lock_host", "request_certificate", "take_up"]
    facts = issued(release)
    facts.units[UNIT] = UnitFact("loaded", "failed", "static", 0, False, "-", "-")
    made = plan(release, facts)
    assert [tuple(change) for change in made.changes] == [
        ("~", "certificate", f"{TURN1} from ACME again: its renewal failed")
    ]


def test_a_certificate_that_is_not_served_is_reloaded_and_a_stopped_timer_started() -> None:
    release = acme_release()
    facts = issued(release)
    facts.served = dict.fromkeys(facts.served, "29")
    assert steps(release, facts) == ["lock_host", "reload", "lock_host", "take_up"]
    facts = issued(release)
    facts.units[TIMER] = UnitFact("loaded", "inactive", "enabled", 0, False, "-", "-")
    assert steps(release, facts) == ["lock_host", "start_timer"]


def test_names_that_lead_elsewhere_are_refused_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node: Node = declare(load(tls(ACME), (TURN2, "name", "localhost.localdomain")), TURN2)
    monkeypatch.setattr("socket.create_connection", lambda *a, **k: pytest.fail("asked"))
    facts = bare()
    facts.tables = {"inet callready"}
    assert [why for why in refusals.of(node, facts) if why.startswith("tls.acme")]
    assert not list(refusals.of(node, issued(node.release)))


def test_ovh_keys_cannot_be_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {TURN1: {"tls": {"acme": {"dns": OVH}}}}
    monkeypatch.setattr("callready.secrets.__main__.inventory_data", lambda _: data)
    assert sorted(complete("inventories/test")[0]) == sorted(f"ovh/{name}" for name in OVH)


# The script, with real OpenSSL, in a folder that it takes for the whole host.


class Script:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "etc/callready/tls"
        self.path = folder / "script"
        self.path.write_bytes(host_script("certificates.sh"))
        self.environment = {**os.environ, "CALLREADY_ROOT": str(folder)}
        for needed in ("run", "etc/callready"):
            (folder / needed).mkdir(parents=True)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", self.path, *arguments], env=self.environment, text=True, capture_output=True
        )

    def install(self, name: str, chain: str, key: str) -> subprocess.CompletedProcess[str]:
        return self.run("install", name, chain, key, "root")

    def current(self, name: str) -> bytes:
        return (self.root / name / "current/both.pem").read_bytes()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_a_pair_is_installed_whole(script: Script, authority: Authority) -> None:
    first, second = (authority.issue(DNSName(TURN1)) for _ in range(2))
    for chain, key in (first, second, second):
        done = script.install(TURN1, chain, key)
        assert done.returncode == 0, done.stderr
        assert script.current(TURN1) == Path(chain).read_bytes() + Path(key).read_bytes()
    folder = script.root / TURN1
    assert len([path for path in folder.iterdir() if path.name != "current"]) == 1
    assert (folder / "current/privkey.pem").stat().st_mode & 0o777 == 0o640
    assert (folder / "current/both.pem").stat().st_mode & 0o777 == 0o600


def test_an_address_is_compared_with_the_addresses_of_the_certificate(
    script: Script, authority: Authority
) -> None:
    chain, key = authority.issue(IPAddress(ip_address("192.0.2.21")), DNSName(TURN1))
    assert script.install("192.0.2.21", chain, key).returncode == 0
    done = script.install("192.0.2.22", chain, key)
    assert done.stderr == "callready: 192.0.2.22: IP address mismatch\n"


@pytest.mark.parametrize("fault", ["key", "name", "expired", "future", "chain", "empty"])
def test_a_broken_pair_leaves_the_old_one(
    script: Script, authority: Authority, fault: str, tmp_path: Path
) -> None:
    good, key = authority.issue(DNSName(TURN1))
    assert script.install(TURN1, good, key).returncode == 0
    before = script.current(TURN1)
    other, other_key = authority.issue(DNSName(TURN1))
    if fault == "key":
        other_key = key
    elif fault == "name":
        other, other_key = authority.issue(DNSName(TURN2))
    elif fault == "expired":
        other, other_key = authority.issue(DNSName(TURN1), days=-0.5)
    elif fault == "future":
        other, other_key = authority.issue(DNSName(TURN1), since=1)
    elif fault == "chain":  # an intermediate that did not sign it
        (tmp_path / "wrong.pem").write_bytes(Path(other).read_bytes() + Path(good).read_bytes())
        other = str(tmp_path / "wrong.pem")
    else:
        (tmp_path / "empty.pem").touch()
        other = str(tmp_path / "empty.pem")
    done = script.install(TURN1, other, other_key)
    assert done.returncode == 1
    assert done.stderr.startswith(f"callready: {TURN1}: ")
    assert script.current(TURN1) == before
    assert len(list((script.root / TURN1).iterdir())) == 2


def test_a_placeholder_is_replaced_by_the_first_certificate(
    script: Script, authority: Authority
) -> None:
    done = script.run("placeholder", TURN1, "root")
    assert done.returncode == 0, done.stderr
    assert b"BEGIN CERTIFICATE" in script.current(TURN1)
    chain, key = authority.issue(DNSName(TURN1))
    assert script.install(TURN1, chain, key).returncode == 0
    assert script.current(TURN1).startswith(Path(chain).read_bytes())
