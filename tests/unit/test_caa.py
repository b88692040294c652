"""CAA records of a real DNS server on loopback, as an authority reads them (RFC 8659, 8657), and what
names lead to."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.rrset
import pytest

from callready.probes import ProbeError, catalogue, names
from callready.release import caa, refusals
from callready.settings.edge import Acme
from tasks import declare
from tests.support.inventories import TURN1, Edit, bare, load

NAME = "turn.calls.callready.test"
ZONE = "callready.test"


class Zone(threading.Thread):
    """A name server: `records` by domain, or domain and kind; "servfail" and "silence" for what
    goes wrong."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.records: dict[str, list[str] | str] = {}
        self.asked: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.resolver = dns.resolver.Resolver(configure=False)
        self.resolver.nameservers = ["127.0.0.1"]
        self.resolver.port = self.socket.getsockname()[1]

    def run(self) -> None:
        while True:
            data, caller = self.socket.recvfrom(4096)
            if not data:
                return
            if answer := self.answer(dns.message.from_wire(data)):
                self.socket.sendto(answer.to_wire(), caller)

    def answer(self, query: dns.message.Message) -> dns.message.Message | None:
        question = query.question[0]
        domain = question.name.to_text(omit_final_dot=True)
        self.asked.append(domain)
        kind = dns.rdatatype.to_text(question.rdtype)
        answer = dns.message.make_response(query)
        found = self.records.get(f"{domain} {kind}", self.records.get(domain))
        answer.flags |= dns.flags.RA
        if found == "silence":
            return None
        if found == "servfail":
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif found is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif found:
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, *found))
        return answer


@pytest.fixture
def zone() -> Iterator[Zone]:
    zone = Zone()
    zone.start()
    yield zone
    zone.socket.sendto(b"", zone.socket.getsockname())  # ends it
    zone.join()
    zone.socket.close()


def acme(**more: str) -> Acme:
    return Acme.model_validate({"email": "operator@callready.test", **more})


LETSENCRYPT = '0 issue "letsencrypt.org"'


@pytest.mark.parametrize(
    ("records", "forbidden"),
    [
        ([], False),
        ([LETSENCRYPT], False),
        (['0 issue "LetsEncrypt.org; validationmethods=http-01,dns-01"'], False),
        (['0 issue "another.test"', LETSENCRYPT], False),
        (['0 iodef "mailto:security@callready.test"'], False),
        (['0 issuewild ";"'], False),
        (['0 issue "another.test"'], True),
        (['0 issue ";"'], True),
        (['0 issue "letsencrypt.org; validationmethods=dns-01"'], True),
        ([LETSENCRYPT, '128 unheard "x"'], True),
        (['0 issue "notletsencrypt.org"'], True),
    ],
)
def test_the_records_of_a_name_decide(zone: Zone, records: list[str], forbidden: bool) -> None:
    zone.records = {NAME: records}
    assert bool(caa.forbids(NAME, acme(), zone.resolver)) == forbidden


def test_the_nearest_domain_with_records_decides(zone: Zone) -> None:
    zone.records = {ZONE: ['0 issue "another.test"'], "test": [LETSENCRYPT]}
    assert caa.forbids(NAME, acme(), zone.resolver) == (
        f"{NAME}: a CAA record forbids letsencrypt.org to sign for it with http-01 "
        f'({ZONE} CAA 0 issue "another.test"): add to the zone: '
        f'{ZONE} CAA 0 issue "letsencrypt.org"'
    )
    assert zone.asked == [NAME, f"calls.{ZONE}", ZONE]
    zone.records[f"calls.{ZONE}"] = [LETSENCRYPT]
    assert caa.forbids(NAME, acme(), zone.resolver) is None


@pytest.mark.parametrize("fault", ["silence", "servfail"])
def test_without_an_answer_it_is_silent(
    zone: Zone, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caa, "TIMEOUT", 0.2)
    zone.records = {NAME: fault, ZONE: ['0 issue ";"']}
    assert caa.forbids(NAME, acme(), zone.resolver) is None


def test_authorities_have_names(zone: Zone) -> None:
    zone.records = {NAME: ['0 issue "pki.goog"']}
    google = acme(server="https://dv.acme-v02.api.pki.goog/directory")
    assert caa.forbids(NAME, google, zone.resolver) is None
    private = {"server": "https://acme.callready.test/dir"}
    assert caa.forbids(NAME, acme(**private), zone.resolver) is None
    own = acme(**private, caa_identity="ca.callready.test")
    assert "forbids ca.callready.test" in (caa.forbids(NAME, own, zone.resolver) or "")


def test_no_resolver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.resolver, "Resolver", none)
    assert caa.forbids(NAME, acme()) is None


@pytest.mark.usefixtures("project")
def test_a_deploy_is_refused_before_the_authority_is_asked(
    zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns.resolver, "Resolver", lambda: zone.resolver)
    zone.records = {TURN1: ['0 issue ";"']}
    here = declare(load(("*", "tls", {"acme": acme().model_dump(exclude_none=True)})), TURN1)
    facts = bare()
    facts.tables = {"inet callready"}  # its port 80 is not tried then
    said = [why for why in refusals.of(here, facts) if "CAA" in why]
    assert said and said[0].startswith(f"tls.acme: {TURN1}: a CAA record forbids letsencrypt.org")


# What names lead to


def test_the_name_server_of_the_setting_is_asked_and_not_this_machine(
    zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "TIMEOUT", 0.3)
    server = f"127.0.0.1:{zone.resolver.port}"
    zone.records["localhost A"] = ["192.0.2.21", "192.0.2.22"]
    zone.records["localhost AAAA"] = ["2001:db8::21"]
    assert names.addresses("localhost", None) <= {"127.0.0.1", "::1"}
    assert names.addresses("localhost", server) == {"192.0.2.21", "192.0.2.22", "2001:db8::21"}
    zone.records = {"turn.test A": ["192.0.2.21"], "turn.test AAAA": []}
    assert names.addresses("turn.test", server) == {"192.0.2.21"}
    assert names.addresses("nowhere.test", server) == set()
    for word in ("servfail", "silence"):
        zone.records["turn.test"] = zone.records["turn.test A"] = word
        with pytest.raises(ProbeError, match=f"leads to for callers: {server} does not answer"):
            names.addresses("turn.test", server)


@pytest.mark.usefixtures("project")
def test_a_probe_of_a_name_goes_where_callers_are_led(zone: Zone) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    port = server.server_address[1]
    zone.records = {"app.test A": ["127.0.0.1"], "app.test AAAA": ["2001:db8::1"]}
    (probe,) = (
        each
        for each in catalogue.probes(
            "app", load(*app_at(f"http://app.test:{port}/", zone))[TURN1], ["192.0.2.21"]
        )
        if each.kind == "app"
    )
    probe.ask()
    server.server_close()


def app_at(url: str, zone: Zone) -> list[Edit]:
    app = {"env_file": "/srv/.env", "health": [{"url": url}]}
    return [
        (TURN1, "groups", ["turn", "app"]),
        (TURN1, "app", app),
        ("*", "deploy", {"resolver": f"127.0.0.1:{zone.resolver.port}"}),
    ]


@pytest.mark.parametrize(
    ("server", "nameserver", "port"),
    [
        ("9.9.9.9", "9.9.9.9", 53),
        ("192.0.2.1:5353", "192.0.2.1", 5353),
        ("2620:fe::fe", "2620:fe::fe", 53),
        ("[2620:fe::fe]:5353", "2620:fe::fe", 5353),
    ],
)
def test_a_name_server_by_address_and_port(server: str, nameserver: str, port: int) -> None:
    found = names.resolver(server)
    assert (found.nameservers, found.port) == ([nameserver], port)


def test_a_host_is_refused_by_what_the_authority_is_told(
    project: Path, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The private address here and the public one there is well; the other way round is not."""
    del project
    zone.records = {f"{TURN1} A": ["192.0.2.21"], f"{TURN1} AAAA": ["2001:db8::21"], TURN1: []}
    told = [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("10.0.0.21", 0))]
    monkeypatch.setattr("callready.probes.names.socket.getaddrinfo", lambda *a, **k: told)
    facts = bare()
    facts.tables = {"inet callready"}  # no connection to port 80
    acme = ("*", "tls", {"acme": {"email": "ops@callready.test"}})
    there = ("*", "deploy", {"resolver": f"127.0.0.1:{zone.resolver.port}"})
    (why,) = refusals.of(declare(load(acme), TURN1), facts)
    assert why.startswith(f"tls.acme: {TURN1} resolves to 10.0.0.21, this host is 192.0.2.21 and")
    assert "deploy.resolver" in why
    node = declare(load(acme, there), TURN1)
    assert list(refusals.of(node, facts)) == []
    zone.records[f"{TURN1} A"] = ["10.0.0.21"]
    (why,) = refusals.of(node, facts)
    assert f"{TURN1} resolves to 10.0.0.21, 2001:db8::21, this host" in why
