"""The judge of sabotages, and the page of what it found."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.sabotage.catalogue import CATALOGUE, PAIRS
from tests.sabotage.judging import Result, Results, judged, page
from tests.sabotage.sabotage import Service
from tests.support.breakage import Packets
from tests.support.fleet import Host
from tests.verify.history import Found, Row, Run

AT = Service("inventories/lab", Host("sfu1"), Host("turn1"), Host("turn2"), Host("app1"))


def run(*causes: tuple[str, str], ok: bool = False) -> Run:
    """A verification with one check and these causes, by key and host."""
    found = tuple(Found(key, host, "a filter on the host", "", "") for key, host in causes)
    rows = (Row("sfu1.lab.test", "test_call", "Call", ok),)
    return Run("inventories/lab", datetime.now(UTC), 9.94, 1, rows, causes=found)


MEDIA = ("foreign-filter", "sfu1.lab.test")
OTHER = ("foreign-filter", "turn1.lab.test")


@pytest.mark.parametrize(
    ("causes", "ranks", "false", "right"),
    [
        ([MEDIA], (1,), (), True),
        ([OTHER, MEDIA], (2,), ("foreign-filter of turn1",), False),
        ([OTHER], (0,), ("foreign-filter of turn1",), False),
        ([], (0,), (), False),
        (
            [("clock-off", ""), OTHER, MEDIA],
            (3,),
            ("clock-off of this network", "foreign-filter of turn1"),
            False,
        ),
    ],
)
def test_a_cause_is_right_by_its_key_and_host(
    causes: list[tuple[str, str]], ranks: tuple[int, ...], false: tuple[str, ...], right: bool
) -> None:
    result = judged([CATALOGUE["ipv6 media dropped"]], AT, run(*causes))
    assert result.caught
    assert result.ranks == ranks
    assert result.false == false
    assert result.is_right == right


def test_what_needs_a_monitor_is_left_out_where_there_is_none() -> None:
    assert AT.has("coturn hung") and not AT.has("exporters stopped")
    assert replace(AT, monitor=Host("mon1")).has("exporters stopped")
    assert not AT.has("redis hung") and replace(AT, redis=Host("sfu1")).has("redis hung")


def test_what_needs_a_host_that_records_is_left_out_where_there_is_none() -> None:
    assert not AT.has("egress stopped")
    at = replace(AT, recorder=Host("h17"))
    assert at.has("egress stopped") and at.host("recorder") in at.hosts


def test_what_needs_several_sfus_is_left_out_where_there_is_one() -> None:
    name = "one of the sfus stopped"
    assert not AT.has(name) and not replace(AT, other=Host("h16")).has(name)
    at = replace(AT, other=Host("h16"), redis=Host("h17"))
    assert at.has(name) and at.host("other") in at.hosts


def test_two_faults_are_two_causes() -> None:
    pair = [CATALOGUE["ipv6 media dropped"], CATALOGUE["coturn hung"]]
    assert judged(pair, AT, run(MEDIA, ("unit-hung", "turn1.lab.test"))).is_right
    assert judged(pair, AT, run(MEDIA)).ranks == (1, 0)


def test_nothing_failed_is_not_caught() -> None:
    assert not judged([CATALOGUE["ipv6 media dropped"]], AT, run(ok=True)).caught


def test_this_machine_is_no_host() -> None:
    here = [CATALOGUE["no udp out of this network"]]
    assert judged(here, AT, run(("this-network", ""))).is_right
    assert not judged(here, AT, run(("this-network", "sfu1.lab.test"))).is_right


def test_the_catalogue_is_as_large_as_it_is_said_to_be() -> None:
    assert len(CATALOGUE) >= 60 and len(PAIRS) >= 15
    assert all(each.causes for each in CATALOGUE.values())
    assert all(name in CATALOGUE for pair in PAIRS for name in pair)


def test_the_page_counts() -> None:
    caught = Result(("ipv6 media dropped",), True, (1,), (), ("foreign-filter of sfu1",), 9, 0, 14)
    missed = Result(("coturn hung",), False, (0,), (), (), 0, 0, 9)
    pair = Result(("coturn hung", "ipv6 media dropped"), True, (2, 1), ("clock-off of sfu1",))
    shown = page(Results([caught, missed, pair], [(), ("test_call of sfu1",)]))
    for line in (
        "| Tried | 2 | 1 |",
        "| Caught | 1 of 2 (50 %) | 1 of 1 (100 %) |",
        "| False causes | 0 | 1 |",
        "False alarms over 2 verifications of the whole service: 1.",
        "| coturn hung | **no** | **none** |  | 9 s |",
        "| coturn hung and ipv6 media dropped | yes | 2, 1 | clock-off of sfu1 | 0 s |",
    ):
        assert line in shown.splitlines()


def test_some_that_are_tried_again_take_the_place_of_what_they_were() -> None:
    good = Result(("coturn hung",), True, (1,))
    other = Result(("ipv6 media dropped",), True, (1,))
    earlier = Results([Result(("coturn hung",)), other], [()], [9.0], (), ("2026-11-29",))
    both = Results([good], [("noise",)], [8.0], days=("2026-11-30",)).after(earlier)
    assert both.tried == [other, good]
    assert (both.clean, both.clean_seconds, both.clean_disagree) == ([(), ("noise",)], [9, 8], ())
    shown = page(both)
    assert "Tried on 2026-11-29 and 2026-11-30; of what was tried again, the last" in shown
    assert "| Caught | 2 of 2 (100 %) | none |" in shown


def test_packets_are_matched_each_way() -> None:
    packets = Packets("both", 4, "udp", "3478", larger=1000)
    assert list(packets.matches(True)) == [
        "meta protocol ip udp dport 3478 meta length > 1000 ",
    ]
    assert list(packets.matches(False)) == [
        "meta protocol ip udp sport 3478 meta length > 1000 ",
    ]
    assert not list(Packets("in").matches(False))
    peer = Packets("out", peer="2001:db8::1", rate="5/second")
    assert list(peer.matches(False)) == [
        "meta protocol ip6 ip6 daddr 2001:db8::1 meta l4proto { tcp, udp } limit rate over 5/second "
    ]
