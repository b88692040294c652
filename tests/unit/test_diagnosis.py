"""From what was seen and counted to causes: who is blamed, for what, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from callready.diagnosis.counting import Counted, Size, Watched, read, script
from callready.diagnosis.diagnose import blind, diagnose
from callready.diagnosis.keys import KEYS
from callready.diagnosis.model import Cause, Exchange, Flow, Place, Symptom, in_words
from callready.diagnosis.narrowing import Counts, watch
from callready.probes import Finding

MEDIA4, MEDIA6 = (Flow("sfu", "udp", 50000, 60000, family) for family in (4, 6))
HTTPS = Flow("sfu", "tcp", 443, 443, 4)
RELAYS = Flow("turn", "udp", 49152, 65535, 4)
NOTHING = (Finding("no media", "the path"),)
FINE, NONE = Counted(10, 10, 10, 10), Counted()


def symptom(*exchanges: Exchange, check: str = "test_path", **more: Any) -> Symptom:
    made = Symptom(check, exchanges[-1].flow.host, check, exchanges, "all", NOTHING)
    return replace(made, **more)


DIRECT4 = symptom(Exchange(HTTPS), Exchange(MEDIA4))
DIRECT6 = symptom(Exchange(HTTPS), Exchange(MEDIA6))
RELAYED = symptom(Exchange(HTTPS), Exchange(MEDIA4, RELAYS), check="test_relayed")


def counted(
    symptoms: Sequence[Symptom],
    seen: dict[tuple[Flow, str], Counted],
    large: Counted = NONE,
    hosts: Sequence[str] = ("sfu", "turn", "turn2"),
) -> Counts:
    """What hosts counted; all is well with what is not in `seen`."""
    wanted = [each for symptom in symptoms for each in symptom.exchanges]
    addresses = {"sfu": ["198.51.100.11"], "turn": ["198.51.100.21"], "turn2": ["198.51.100.22"]}
    found: dict[str, dict[tuple[Watched, Size], Counted]] = {}
    for host, flows in watch(wanted, ["198.51.100.2"], addresses).items():
        if host in hosts:
            found[host] = {
                **{(each, "small"): seen.get((each.flow, each.client), FINE) for each in flows},
                **{(each, "large"): large for each in flows},
            }
    return found


def causes(
    *failed: Symptom, passed: Sequence[Symptom] = (), counts: Counts | None = None
) -> list[Cause]:
    found = diagnose(failed, passed, (), lambda lost: (counts or {}, lost))
    return [each.cause for each in found.causes]


def test_metrics_are_lost_for_a_reason_of_the_host_or_of_the_monitor_if_there_is_one() -> None:
    asked, metrics = Flow("mon", "tcp", 443, 443), Flow("turn", "tcp", 9998, 9998, 4)
    lost = Cause("metrics-lost", "turn", Place.NETWORK, "no metrics", "let it")
    exchange = Exchange(metrics, asked)
    measured = symptom(exchange, check="test_measured", fails="", causes=(lost,))
    assert causes(measured) == [lost]
    for cause in (
        Cause("foreign-filter", "turn", Place.FILTER, "a rule", "delete", breaks=(metrics,)),
        Cause("unit-stopped", "mon", Place.UNIT, "stopped", "start", checks=("*:test_measured",)),
        Cause("unit-stopped", "mon", Place.UNIT, "the edge is stopped", "start", breaks=(asked,)),
    ):
        state = symptom(exchange, check="test_state", host=cause.host, fails="", causes=(cause,))
        state = replace(state, exchanges=())
        assert causes(measured, state) == [cause]
    other = Cause("foreign-filter", "sfu", Place.FILTER, "a rule", "delete", breaks=(MEDIA4,))
    assert set(causes(measured, symptom(DIRECT4.exchanges[1], causes=(other,)))) == {lost, other}


@pytest.mark.parametrize(
    ("at", "key", "place", "says"),
    [
        (
            Counted(0, 0, 0, 0),
            "lost-before-host",
            Place.EDGE,
            "packets to sfu are sent from here and do not arrive",
        ),
        (
            Counted(9, 0, 0, 0),
            "filter-drops",
            Place.FILTER,
            "way in, between its network card and the program (50000-60000/udp over",
        ),
        (Counted(9, 9, 0, 0), "no-answer", Place.UNIT, "what listens there does not answer"),
        (Counted(9, 9, 9, 0), "filter-drops", Place.FILTER, "on the way out"),
        (Counted(9, 9, 9, 9), "lost-behind-host", Place.EDGE, "leave it and do not get here"),
        (
            Counted(20, 10, 10, 10),
            "filter-drops",
            Place.FILTER,
            "sfu drops packets of some ports on the way in",
        ),
    ],
)
def test_the_first_hop_that_packets_do_not_reach(
    at: Counted, key: str, place: Place, says: str
) -> None:
    counts = counted([DIRECT4], {(MEDIA4, ""): at})
    (cause,) = causes(DIRECT4, counts=counts)
    assert (cause.key, cause.host, cause.place) == (key, "sfu", place)
    assert says in cause.what
    assert "IPv6, which is not affected" in cause.ruled_out


@pytest.mark.parametrize(
    ("seen", "key", "host"),
    [
        ({(RELAYS, "sfu"): Counted(0, 0, 5, 0)}, "filter-drops", "turn"),
        ({(MEDIA4, "turn"): Counted(0, 0, 0, 0)}, "relay-cut-off", "sfu"),
        ({(MEDIA4, "turn"): Counted(10, 0, 0, 0)}, "filter-drops", "sfu"),
        ({(MEDIA4, "turn"): Counted(10, 10, 10, 0)}, "filter-drops", "sfu"),
        ({(RELAYS, "sfu"): Counted(0, 0, 10, 10)}, "relay-cut-off", "turn"),
        ({(RELAYS, "sfu"): Counted(10, 0, 10, 10)}, "filter-drops", "turn"),
    ],
)
def test_between_relay_and_sfu(seen: dict[tuple[Flow, str], Counted], key: str, host: str) -> None:
    (cause,) = causes(RELAYED, counts=counted([RELAYED], seen))
    assert (cause.key, cause.host) == (key, host)


def test_relay_that_sends_nothing_is_not_blamed_on_the_network() -> None:
    seen = {(RELAYS, "sfu"): Counted()}
    found = diagnose([RELAYED], (), (), lambda lost: (counted(lost, seen), lost))
    assert (found.causes, found.unexplained) == ((), (RELAYED,))


@pytest.mark.parametrize(
    ("sent", "at", "place", "says"),
    [
        (70, Counted(58, 58, 58, 58), Place.EDGE, "sent from here and do not arrive there"),
        (70, Counted(70, 70, 70, 70), Place.EDGE, "from sfu leave it and do not get here"),
        (70, Counted(70, 65, 65, 65), Place.FILTER, "on the way in"),
        # Somebody else sends too.
        (70, Counted(90, 90, 90, 90), Place.EDGE, "between here and sfu"),
        (0, Counted(70, 70, 70, 70), Place.EDGE, "between here and sfu"),
    ],
)
def test_where_some_packets_are_lost(sent: int, at: Counted, place: Place, says: str) -> None:
    failed = replace(DIRECT4, fails="some")
    # Large ones and whole calls are lost by chance too.
    others = replace(DIRECT4, fails="large"), replace(DIRECT4, check="test_direct")
    counts = {**counted([failed], {(MEDIA4, ""): at}, large=at)}
    counts[""] = {(Watched(MEDIA4), "small"): Counted(left=sent)}
    (cause,) = causes(failed, *others, counts=counts)
    assert (cause.key, cause.host, cause.place) == ("packets-lost", "sfu", place)
    assert says in cause.what and "some packets" in cause.what
    assert "rate" in cause.mend or place is Place.FILTER
    assert not any("none" in text for text in (*cause.evidence, *cause.ruled_out))


def test_what_passes_when_it_is_looked_at_again_is_tried_with_other_ports() -> None:
    looks = iter([([DIRECT4], [DIRECT4, DIRECT6]), ([], [DIRECT6]), ([DIRECT6], [DIRECT6])])

    def look_again(lost: Sequence[Symptom]) -> tuple[Counts, Sequence[Symptom]]:
        again, asked = next(looks)
        assert list(lost) == asked
        return counted(lost, {(flow, ""): NONE for each in again for flow in each.flows[1:]}), again

    (found,) = diagnose([DIRECT4, DIRECT6], (), (), look_again).causes
    assert found.cause.key == "lost-before-host" and len(found.symptoms) == 2


def test_some_packets_lost_between_relay_and_sfu() -> None:
    failed = replace(RELAYED, fails="some")
    lost = {(RELAYS, "sfu"): Counted(9, 9, 70, 70), (MEDIA4, "turn"): Counted(56, 56, 56, 56)}
    (cause,) = causes(failed, counts=counted([failed], lost))
    assert (cause.key, cause.host, cause.place) == ("packets-lost", "sfu", Place.EDGE)
    assert "70 left turn, 56 arrived at sfu" in cause.evidence[0]


def test_port_that_takes_connections_and_says_nothing() -> None:
    turn = Flow("turn", "tcp", 5349, 5349, 4)
    failed = symptom(Exchange(turn))
    here: Counts = {"": {(Watched(turn), "small"): Counted(answered=1)}}
    (cause,) = causes(failed, counts={**counted([failed], {}), **here})
    assert (cause.key, cause.place) == ("no-answer", Place.UNIT)
    assert cause.what.startswith("turn takes connections")
    lost = counted([failed], {}, large=Counted(4, 4, 4, 0))
    (cause,) = causes(failed, counts={**lost, **here})
    assert (cause.key, cause.place) == ("large-packets-lost", Place.FILTER)


def test_what_an_sfu_sends_is_lost_behind_it_for_callers_and_relays() -> None:
    failed = symptom(Exchange(MEDIA4)), RELAYED
    seen = {(MEDIA4, ""): FINE, (MEDIA4, "turn"): FINE, (RELAYS, "sfu"): Counted(0, 0, 10, 10)}
    (cause,) = causes(*failed, counts=counted(failed, seen))
    assert (cause.key, cause.host) == ("lost-behind-host", "sfu")


def test_large_packets() -> None:
    failed = replace(DIRECT4, fails="large")
    (cause,) = causes(failed, counts=counted([failed], {}, large=Counted(5, 0, 0, 0)))
    assert (cause.key, cause.place) == ("large-packets-lost", Place.FILTER)
    assert "ports and programs: small packets pass" in cause.ruled_out
    (cause,) = causes(failed, counts=counted([failed], {}, large=Counted(0, 0, 0, 0)))
    assert (cause.key, cause.place) == ("large-packets-lost", Place.EDGE)
    assert "MTU" in cause.mend


def test_large_packets_that_do_not_come_back_from_a_relay() -> None:
    turn = Exchange(Flow("turn", "udp", 3478, 3478))
    failed = symptom(Exchange(HTTPS), turn, Exchange(MEDIA4, RELAYS), fails="large")
    (cause,) = causes(failed, counts=counted([failed], {}, large=FINE))
    assert (cause.key, cause.host) == ("large-packets-lost", "turn")
    assert cause.breaks == (turn.flow,) and "from turn leave it" in cause.what


def test_both_families_are_one_cause_and_two_hosts_are_two() -> None:
    seen = {
        (MEDIA4, ""): Counted(9),
        (MEDIA6, ""): Counted(7),
        (RELAYS, "sfu"): Counted(9, 0, 9, 9),
    }
    failed = DIRECT4, DIRECT6, RELAYED
    one, other = causes(*failed, counts=counted(failed, seen))
    assert (one.key, one.host, one.breaks) == ("filter-drops", "sfu", (MEDIA4, MEDIA6))
    assert (other.key, other.host) == ("filter-drops", "turn")
    assert "50000-60000/udp over IPv4 and IPv6" in one.what


def test_what_is_lost_from_a_relay_too_is_one_with_what_is_lost_from_here() -> None:
    tls = symptom(Exchange(HTTPS), Exchange(Flow("turn", "tcp", 5349, 5349, 4)))
    failed = tls, DIRECT4, RELAYED
    seen = {
        (flow, client): NONE
        for flow, client in ((tls.exchanges[1].flow, ""), (MEDIA4, ""), (MEDIA4, "turn"))
    }
    one, other = causes(*failed, counts=counted(failed, seen))
    assert {one.host, other.host} == {"sfu", "turn"}
    (media,) = (cause for cause in (one, other) if cause.host == "sfu")
    assert RELAYS in media.breaks and len(media.evidence) == 2


def test_a_host_cut_off_over_one_family_is_one_cause() -> None:
    udp, tls = (Exchange(Flow("turn", *way, 4)) for way in (("udp", 3478, 3478), ("tcp", 443, 443)))
    named = Exchange(tls.flow._replace(family=0))
    failed = symptom(udp), symptom(tls), symptom(named), RELAYED
    seen = {(udp.flow, ""): NONE, (tls.flow, ""): NONE, (MEDIA4, "turn"): NONE}
    (cause,) = causes(*failed, passed=[DIRECT4], counts=counted(failed, seen))
    assert (cause.key, cause.host) == ("lost-before-host", "turn")
    # With something of it that works, the way between the hosts is another fault.
    works = symptom(Exchange(Flow("turn", "udp", 9, 9, 4)))
    found = causes(*failed, passed=[DIRECT4, works], counts=counted(failed, seen))
    assert [each.key for each in found] == ["lost-before-host", "relay-cut-off"]


def test_a_part_of_a_range_is_not_chance() -> None:
    failed = RELAYED, replace(RELAYED, check="test_path")
    seen = {(RELAYS, "sfu"): Counted(100, 100, 212, 212), (MEDIA4, "turn"): Counted(*[212] * 4)}
    (cause,) = causes(*failed, counts=counted(failed, seen))
    assert cause.key == "relay-cut-off" and "packets of some ports" in cause.what


def test_nothing_to_any_host_is_this_machine() -> None:
    turn = Flow("turn", "udp", 3478, 3478, 4)
    failed = DIRECT4, symptom(Exchange(turn), check="test_stun")
    lost = {(MEDIA4, ""): Counted(), (turn, ""): Counted()}
    (cause,) = causes(*failed, counts=counted(failed, lost))
    assert (cause.key, cause.place, cause.host) == ("this-network", Place.HERE, "")
    fine = symptom(Exchange(Flow("app", "udp", 9, 9, 4)))
    found = causes(*failed, passed=[fine], counts=counted(failed, lost))
    assert {cause.key for cause in found} == {"lost-before-host"}


def test_some_packets_of_every_host_lost_are_lost_here() -> None:
    turn = Flow("turn", "udp", 3478, 3478, 4)
    lossy = [replace(each, fails="some") for each in (DIRECT4, symptom(Exchange(turn)))]
    failed = [*lossy, symptom(Exchange(HTTPS), check="test_tls")]
    some = {(MEDIA4, ""): Counted(*[50] * 4), (turn, ""): Counted(*[50] * 4)}
    counts = {**counted(lossy, some)}
    counts[""] = {(Watched(each), "small"): Counted(left=70) for each, _ in some}
    unseen = Symptom("test_state", "turn", "", causes=(blind("turn", "no words"),))
    reached = symptom(Exchange(Flow("turn", "tcp", 22, 22)), check="test_ssh")
    (cause,) = causes(*failed, unseen, passed=[reached], counts=counts)
    assert (cause.key, cause.place, cause.host) == ("this-network", Place.HERE, "")
    fine = symptom(Exchange(Flow("turn2", "udp", 3478, 3478, 4)))
    found = causes(*lossy, passed=[fine], counts=counts)
    assert [cause.key for cause in found] == ["packets-lost", "packets-lost"]


def test_large_packets_that_come_back_from_no_relay() -> None:
    """Direct paths have small answers: that they pass says nothing of what hosts send."""
    relays = []
    for host in ("turn", "turn2"):
        turn = Exchange(Flow(host, "udp", 3478, 3478, 4))
        echo = Exchange(RELAYS._replace(host=host), RELAYS._replace(host=host))
        relays.append(symptom(turn, echo, fails="large"))
    counts = counted(relays, {}, large=FINE)
    (cause,) = causes(*relays, passed=[DIRECT4], counts=counts)
    assert cause.key == "this-network"
    echoed = replace(relays[0], exchanges=(Exchange(MEDIA4), *relays[0].exchanges[1:]))
    assert len(causes(*relays, passed=[echoed], counts=counts)) == 2


def test_nothing_leaves_this_machine() -> None:
    """Sockets are told of UDP, TCP connections are given up; a name's IPv4 address answers."""
    flows = [Flow(host, "tcp", 443, 443, 6) for host in ("sfu", "turn")]
    by_name = symptom(Exchange(HTTPS._replace(family=0)), check="test_signalling")
    http = Flow("sfu", "tcp", 80, 80, 6)
    closed = [
        symptom(Exchange(http), Exchange(flows[0]), apart=True),
        symptom(Exchange(flows[1]), apart=True),
    ]
    turn = Exchange(Flow("turn", "udp", 3478, 3478))
    refused = replace(symptom(turn), fails="here"), replace(DIRECT6, fails="here")
    failed = by_name, *closed, *refused
    lost = {(each, ""): NONE for each in (*flows, http)}
    relayed = symptom(Exchange(HTTPS), Exchange(MEDIA6, RELAYS._replace(family=6)))
    (cause,) = causes(*failed, passed=[DIRECT4, relayed], counts=counted(failed, lost))
    assert cause.key == "this-network"
    assert "UDP and TCP over IPv6 gets from here to no host" in cause.what


def test_an_app_is_not_blamed_for_what_does_not_get_there() -> None:
    flow = Flow("sfu", "tcp", 443, 443)
    down = Cause("app-down", "sfu", Place.APP, "it does not answer", "its unit")
    silent = symptom(Exchange(flow), check="test_websocket", causes=(down,))
    lost = symptom(Exchange(flow._replace(family=6)), check="test_https")
    for seen, keys in (
        ({(lost.exchanges[0].flow, ""): NONE}, ["lost-before-host"]),
        ({}, ["app-down"]),
    ):
        found = causes(silent, *([lost] if seen else []), counts=counted([silent, lost], seen))
        assert [each.key for each in found] == keys


def test_what_was_seen_explains_before_anything_is_counted() -> None:
    seen = Cause("unit-stopped", "sfu", Place.UNIT, "it is stopped", "start it", breaks=(MEDIA4,))
    unit = Symptom("test_units", "sfu", "units", findings=NOTHING, causes=(seen,))
    found = diagnose([DIRECT4, unit], (), (), lambda lost: pytest.fail(f"{lost}"))
    assert [(each.cause, each.symptoms) for each in found.causes] == [(seen, (DIRECT4, unit))]


def test_small_packets_are_not_lost_because_of_a_rule_about_large_ones() -> None:
    rule = Cause(
        "foreign-filter", "sfu", Place.FILTER, "a", "b", breaks=(MEDIA4, HTTPS), only="large"
    )
    seen = Symptom("test_filters", "sfu", "filters", findings=NOTHING, causes=(rule,))
    media = symptom(Exchange(MEDIA4))
    counts = counted([media], {(MEDIA4, ""): NONE})
    assert {each.key for each in causes(media, seen, counts=counts)} == {
        "foreign-filter",
        "lost-before-host",
    }
    assert causes(replace(media, fails="large"), seen) == [rule]
    # A large packet, of TLS perhaps, comes before what is small.
    assert causes(symptom(Exchange(HTTPS)), seen) == [rule]


def test_what_follows_from_another_cause_is_folded() -> None:
    root = Cause("file-edited", "sfu", Place.CONFIGURATION, "a", "b", checks=("test_tls",))
    leaf = Cause("certificate-name", "sfu", Place.CERTIFICATE, "c", "d")
    later = Cause("timer-off", "sfu", Place.UNIT, "e", "f", latent=True)
    failed = [
        Symptom("test_renewal", "sfu", "renewal", findings=NOTHING, causes=(later,)),
        Symptom("test_tls", "sfu", "tls", findings=NOTHING, causes=(leaf,)),
        Symptom("test_files", "sfu", "files", findings=NOTHING, causes=(root,)),
    ]
    assert causes(*failed) == [root, later]


def test_host_that_cannot_be_looked_at() -> None:
    cause = blind("sfu", "no answer in time")
    looked = Symptom("test_units", "sfu", "units", findings=NOTHING, causes=(cause,))
    found = diagnose([looked, DIRECT4])
    assert found.causes[0].symptoms == (looked, DIRECT4) and not found.unexplained
    (off,) = causes(looked, DIRECT4)
    assert off.key == "host-unreachable" and "it is off, or cut off" in off.what
    # Something of it answers, so it is SSH alone …
    assert causes(looked, passed=[DIRECT4]) == [cause]
    # … or what callers suffer from too.
    failed = looked, replace(DIRECT4, fails="large")
    (large,) = causes(
        *failed, passed=[symptom(Exchange(HTTPS))], counts=counted(failed[1:], {}, hosts=())
    )
    assert large.key == "large-packets-lost"


def test_paths_through_a_host_that_cannot_be_looked_at() -> None:
    turn = Exchange(Flow("turn", "udp", 3478, 3478, 4))
    path = symptom(Exchange(HTTPS), turn, Exchange(MEDIA4, RELAYS))
    looked = Symptom("test_units", "turn", "units", findings=NOTHING, causes=(blind("turn", "x"),))
    works = symptom(Exchange(Flow("turn", "tcp", 443, 443, 4)))
    (cause,) = causes(looked, path, passed=[works], counts=counted([path], {}, hosts=["sfu"]))
    assert (cause.key, cause.host, cause.breaks) == ("lost-before-host", "turn", (turn.flow,))


def test_every_kind_of_cause_is_found_by_something() -> None:
    root = Path(__file__).parents[2]
    files = (*root.glob("callready/diagnosis/*.py"), *root.glob("tests/verify/*.py"))
    texts = "".join(file.read_text() for file in files if file.name != "keys.py")
    assert [key for key in KEYS if f'"{key}"' not in texts] == []


def test_host_that_counted_nothing_is_blamed_for_nothing() -> None:
    """It has a release that waits for its confirmation, or its connection broke off."""
    found = diagnose([DIRECT4], (), (), lambda lost: ({}, lost))
    assert (found.causes, found.unexplained) == ((), (DIRECT4,))


def test_flows_in_words() -> None:
    assert (
        in_words([MEDIA4, MEDIA6, HTTPS]) == "50000-60000/udp over IPv4 and IPv6, 443/tcp over IPv4"
    )
    assert in_words([HTTPS._replace(family=0)]) == "443/tcp"


def test_counters_of_both_families_and_of_a_redirected_port() -> None:
    watched = [
        Watched(MEDIA4, "", ("198.51.100.2",)),
        Watched(Flow("turn", "tcp", 443, 443, 6), "", (), ("2001:db8::1",), 5349),
        Watched(MEDIA6, "", ("198.51.100.2",)),  # nobody comes that way
    ]
    text = script(watched)
    assert (
        "ip saddr { 198.51.100.2 } udp dport 50000-60000 meta length < 700 counter name w0_ar"
        in text
    )
    assert "ip6 saddr != { 2001:db8::1 } tcp dport 5349 ct original proto-dst 443 meta" in text
    assert "counter name w2" not in text
    shown = '{"nftables": [{"metainfo": {}}, {"counter": {"name": "w0_left_large", "packets": 3}}]}'
    assert read(shown, watched)[watched[0], "large"] == Counted(left=3)
