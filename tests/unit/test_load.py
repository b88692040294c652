"""What `make load` asks for, when it stops, and what it says: by figures of our own."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Generator as Steps
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from callready import load as command
from callready.diagnosis.usage import READ, Use, read, use
from callready.load import (
    Step,
    Wanted,
    addresses,
    asked,
    compared,
    cost,
    main,
    outside,
    participants,
    reached,
    services,
    table,
)
from callready.probes import generator as program
from callready.probes.generator import Generator, Heard, Service
from callready.probes.webrtc import Call, Participant
from callready.settings.capacity import Calls
from callready.settings.problem import SettingsError
from lab.archive import go
from tests.support.inventories import SFU1, TURN1, Edit, load

SECRET = SecretStr("unit-load-secret-of-the-api-0000001")
SERVICE = Service("wss://livekit.callready.test", "APIunit", SECRET, None)
WANTED = Wanted(Calls("video", 4, 4, 0.25), 8, 4, 20, 5, ("udp", "tcp", "tls"))
LINES = """\
at 100.50
cores 4
cpu 8000000
overflows 7
overflows6 1
tracked_count 65536
tracked_max 262144
packets 1000
bytes 1000000
allocations 24
"""
QUIET = Use(0.05, 0.1, 100, 100, 0, 0.1, 0)
BUSY = Use(0.5, 2.0, 14_500, 123_100, 0, 0.2, 48)
ONE = Participant(0.2, 0, 0.1, "host", "", 0, "host", "", 0, "udp", "", 0.001, {})
STEP = Step(
    number=2,
    rooms=5,
    participants=20,
    streams=120,
    relayed={"udp": 3, "tls": 2},
    heard=Heard([0.1] * 19 + [1.9], [], 20, 120, 288_000, 287_900, 250_000_000),
    hosts={SFU1: BUSY},
    here=0.4,
    call=Call((ONE, ONE), 0, 0),
)


def test_a_host_is_read_twice() -> None:
    before = read(LINES.splitlines())
    assert (before.cores, before.cpu, before.overflows, before.allocations) == (4, 8, 8, 24)
    after = replace(
        before, at=110.5, cpu=28, overflows=11, packets=6000, bytes=11_000_000, allocations=30
    )
    assert use(before, after) == Use(0.5, 2, 500, 8000, 3, 0.25, 30)


def test_what_a_host_does_not_count_is_nothing() -> None:
    lines = [line for line in LINES.splitlines() if not line.startswith(("overflows6", "packets"))]
    lines = ["tracked_max " if line.startswith("tracked_max") else line for line in lines]
    found = read(lines)
    assert (found.overflows, found.packets, found.tracked_max) == (7, 0, 0)
    assert use(found, replace(found, at=200)).tracked == 0


@pytest.mark.tools
def test_the_script_reads_this_machine() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
        relay.bind(("127.0.0.1", 0))
        port = relay.getsockname()[1]
        script = f"ADDRESS=127.0.0.1 RANGES='{port}-{port}'\n{READ}"
        done = subprocess.run(["sh"], input=script, text=True, capture_output=True, check=True)
    found = read(done.stdout.splitlines())
    assert found.allocations == 1 and found.cores and found.cpu and found.at
    assert not done.stderr


def test_the_relayed_share_is_spread_over_rooms_and_transports() -> None:
    rooms = [participants(WANTED, SERVICE, number) for number in range(8)]
    by = Counter(each.by for room in rooms for each in room)
    assert by == {"": 24, "udp": 3, "tcp": 3, "tls": 2}
    assert all(sum(bool(each.by) for each in room) == 1 for room in rooms)
    assert len({each.room for room in rooms for each in room}) == 8
    assert all(each.room.startswith("callready-load-") for room in rooms for each in room)
    assert len({each.identity for room in rooms for each in room}) == 32


def test_those_on_a_stage_speak() -> None:
    wanted = replace(WANTED, calls=Calls("gallery", 10, 2, 0))
    who = participants(wanted, SERVICE, 0)
    assert [each.speaks for each in who] == [True, True, *[False] * 8]
    # Two hear the other one, eight hear both, and see them.
    assert wanted.streams(1) == (2 * 1 + 8 * 2) * 2
    assert replace(wanted, calls=Calls("audio", 10, 2, 0)).streams(3) == 54


def test_rooms_come_in_steps() -> None:
    assert [WANTED.rooms_of(step) for step in (1, 2, 3, 4)] == [2, 4, 6, 8]
    assert [replace(WANTED, rooms=5).rooms_of(step) for step in (1, 2, 3, 4)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--room", "1"], "at least 2 participants"),
        (["--relayed", "20"], "--relayed is 0 to 1"),
        (["--steps", "9", "--rooms", "8"], "--steps is 1 to --rooms"),
        (["--hold", "1000"], "--hold 5 to 600"),
        (["--rate", "0"], "--rate up to 50"),
        (["--by", "udp,sctp"], "--by is udp, tcp and tls"),
        (["--rooms", "501"], "2004 participants: a run has 2000 at most"),
        (["--hold", "600", "--steps", "8"], "a run takes 3600 s at most"),
    ],
)
def test_a_load_without_bounds_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        asked(["inventories/prod", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--confirm", "lab"], ["--confirm", ""]])
def test_nothing_begins_before_the_name_is_typed(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Run", lambda *_: pytest.fail("it began"))
    assert main(["inventories/prod", *given]) == 1
    said = capsys.readouterr()
    assert "up to 32 participants (video) in 8 rooms and 4 steps" in said.out
    assert ("that is not prod" if given else "give --confirm prod") in said.err


def test_the_name_that_is_typed_begins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    began = list[str]()
    monkeypatch.setattr(command, "Run", lambda inventory, _: began.append(inventory))
    monkeypatch.setattr(command, "load", lambda _: True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: " prod\n")
    assert main(["inventories/prod"]) == 0 and began == ["inventories/prod"]
    monkeypatch.setattr("builtins.input", lambda _: "production")
    assert main(["inventories/prod"]) == 1 and len(began) == 1


@pytest.mark.usefixtures("project")
def test_only_addresses_of_the_inventory_are_loaded() -> None:
    fleet = load((TURN1, "internal_address", "10.0.0.21"))
    allowed = addresses(fleet)
    assert {"192.0.2.11", "2001:db8::11", "192.0.2.21", "10.0.0.21"} <= allowed
    assert outside("192.0.2.11", allowed) == outside("2001:db8:0::11", allowed) == set()
    assert outside("192.0.2.99", allowed) == {"192.0.2.99"}
    assert outside("localhost", allowed) <= {"127.0.0.1", "::1"} and outside("localhost", allowed)
    (service,) = services(fleet)
    with pytest.raises(SettingsError, match=r"is 127\.0\.0\.1, which is no address of the inv"):
        command.check(replace(service, url="ws://127.0.0.1:7880"), allowed)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("edits", "by", "said"),
    [
        ([("*", "turn.pools.calls.tls", False)], ("tls",), "hands out TURN over udp, tcp: say"),
        (
            [
                ("*", "livekit.turn_pool", None),
                ("*", "livekit.rtc.stun_servers", ["192.0.2.21:3478"]),
            ],
            (),
            "hands out TURN over nothing: say with --by and",
        ),
        ([(SFU1, "groups", []), ("*", "turn.pools.calls.peers", "internet")], (), "group livekit:"),
    ],
)
def test_what_livekit_does_not_hand_out_is_not_loaded(
    edits: list[Edit], by: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "inventory_data", lambda _: {})
    monkeypatch.setattr(command, "validate", lambda *_: load(*edits))
    monkeypatch.setattr(command, "hosts_of", lambda *_: pytest.fail("it connects"))
    with pytest.raises(SettingsError, match=said):
        command.Run("inventories/test", replace(WANTED, by=by))


LIMITS: list[tuple[Step, str]] = [
    (replace(STEP, heard=replace(STEP.heard, joins=[0.1] * 9 + [2.4])), "joins take 2.4 s (95 %)"),
    (
        replace(STEP, heard=replace(STEP.heard, failed=["LiveKit answers 503"])),
        "1 joins failed: LiveKit answers 503",
    ),
    (
        replace(STEP, heard=replace(STEP.heard, refused={"486": 4})),
        "4 allocations were refused with 486",
    ),
    (replace(STEP, heard=replace(STEP.heard, received=280_000)), "2.8% of packets are lost"),
    (replace(STEP, heard=replace(STEP.heard, streams=110)), "3.4% of packets are lost"),
    (replace(STEP, heard=replace(STEP.heard, broken=2)), "2 times a participant lost"),
    (replace(STEP, hosts={SFU1: BUSY._replace(processor=0.85)}), f"{SFU1}: processor 85%"),
    (replace(STEP, hosts={SFU1: BUSY._replace(overflows=3)}), f"{SFU1}: 3 packets found no room"),
    (replace(STEP, hosts={SFU1: BUSY._replace(tracked=0.71)}), "connections is 71% full"),
    (replace(STEP, call="calls do not connect"), "beside it: calls do not connect"),
    (
        replace(STEP, call=Call((ONE, replace(ONE, connect_seconds=2.2)), 0, 0)),
        "beside it join in 2.2 s",
    ),
    (replace(STEP, call=Call((ONE, replace(ONE, loss=0.03)), 0, 0)), "beside it lose 3.0%"),
    (replace(STEP, here=0.95), "it is the limit, not the hosts"),
]


@pytest.mark.parametrize(("step", "said"), LIMITS)
def test_the_first_limit_stops_it(step: Step, said: str) -> None:
    (found,) = reached(step)
    assert said in found


def test_a_step_below_all_limits_goes_on() -> None:
    assert not list(reached(STEP))


def test_a_step_is_a_table() -> None:
    assert table(STEP, 4).splitlines() == [
        "step 2 of 4: 5 rooms, 20 participants (5 by TURN: 2 tls, 3 udp)",
        "  joins       median 0.10 s, 95 % 0.10 s; 0 failed",
        "  media       14,395 packets/s and 100.0 Mbit/s arrive, in 120 of 120 streams; 0.03% lost",
        "  two callers joined in 0.20 s, heard each other after 0.10 s, lost 0.00%, longest silence 0.00 s",
        "                       processor  packets/s out  Mbit/s out  connections  allocations  overflows",
        "  sfu1.callready.test        50%         14,500       123.1        20.0%           48          0",
        "  this machine               40%",
    ]


def test_a_participant_costs_what_it_adds() -> None:
    found = cost(QUIET, BUSY, 20)
    assert found == pytest.approx((95, 720, 6150))
    shown = [line.split() for line in compared(SFU1, 4, found, found._replace(thousandths=36))]
    assert shown[1] == ["thousandths", "of", "a", "core", "95.0", "36.0"]
    # 80 % of four cores.
    assert shown[-1] == ["participants", "at", "80%", "of", "4", "cores", "34", "89"]
    assert compared(SFU1, 4, found._replace(thousandths=0), found)[-1].split()[-2] == "?"


class Known(command.Run):
    """A run of which everything is known before."""

    def __init__(self, steps: list[Step], left: list[str]) -> None:
        self.known, self.left, self.idle, self.wanted = steps, left, {SFU1: QUIET}, WANTED

    def steps(self) -> Steps[Step, None, None]:
        yield from self.known

    def recovered(self) -> Iterator[str]:
        yield from self.left

    def costs(self, last: Step) -> Iterator[str]:
        yield f"a participant costs, at {last.participants}:"


def test_what_a_run_ends_with(capsys: pytest.CaptureFixture[str]) -> None:
    hot = replace(STEP, number=3, participants=28, hosts={SFU1: BUSY._replace(processor=0.85)})
    assert command.load(Known([STEP, hot], []))
    said = capsys.readouterr().out
    assert "step 2 of 4: " in said and "step 3 of 4: " in said
    assert f"first limit, at 28 participants: {SFU1}: processor 85%, more than 80%\n" in said
    # That of the last step in which nothing was amiss.
    assert "a participant costs, at 20:" in said and "everything is as before" in said
    assert command.load(Known([STEP], []))
    assert "no limit up to 20 participants: try more --rooms" in capsys.readouterr().out


def test_what_is_not_as_before_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert not command.load(Known([STEP], [f"{SFU1}: 24 allocations are left"]))
    said = capsys.readouterr()
    assert said.err == f"not as before: {SFU1}: 24 allocations are left\n"
    assert "as before" not in said.out


# Says what it was given, as the program in load/ would.
FAKE = """\
import json, os, sys
def say(**what): print(json.dumps(what), flush=True)
log = open(os.environ["LOG"], "w")
for line in sys.stdin:
    print(line, end="", file=log, flush=True)
    asked = json.loads(line)
    if "join" in asked:
        first, *others = asked["join"]
        say(failed=first["identity"], why="LiveKit\\nanswers 503")
        for each in others:
            say(joined=each["identity"], seconds=0.5, path=os.environ["WAY"])
        say(done="join")
    elif "measure" in asked:
        say(done="measure", seconds=asked["measure"], streams=9, expected=100, received=99,
            bytes=5000, broken=1, refused={"508": 2})
    elif asked["kind"] == "broken":
        sys.exit(3)
print("left", file=log, flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that stands for the one in load/; where it writes down what it was asked."""
    path = tmp_path / "generator"
    path.write_text(f"#!{sys.executable}\n{FAKE}")
    path.chmod(0o700)
    monkeypatch.setattr(program, "PROGRAM", path)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("WAY", "relay")
    return tmp_path / "log"


def test_the_program_is_told_by_lines(fake: Path) -> None:
    heard = Heard()
    with Generator.started("audio", {"192.0.2.11"}, None, 60) as generator:
        command_line = Path(f"/proc/{generator._process.pid}/cmdline").read_bytes()
        generator.join(participants(WANTED, SERVICE, 0), 50, heard)
        generator.measure(5, 12, heard)
    assert heard.failed == ["LiveKit answers 503"]
    assert heard.joins == [0.5] * 3
    assert (heard.seconds, heard.streams, heard.broken, heard.refused) == (5, 9, 1, {"508": 2})
    # Three streams are missing: 3 x 50 packets/s in 5 s.
    assert heard.lost(12) == pytest.approx(1 - 99 / 850)
    first, joins, measure, last = fake.read_text().splitlines()
    assert json.loads(first) == {"addresses": ["192.0.2.11"], "kind": "audio", "seconds": 60}
    assert (json.loads(measure), last) == ({"measure": 5, "streams": 12}, "left")
    # Tokens, never the secret they are made with; and nothing of either in the arguments.
    assert SECRET.get_secret_value() not in joins
    token = json.loads(joins)["join"][0]["token"]
    assert token.count(".") == 2 and token.encode() not in command_line


def test_media_past_turn_is_no_relayed_call(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAY", "host")
    heard = Heard()
    with Generator.started("audio", [], None, 60) as generator:
        generator.join(participants(WANTED, SERVICE, 0), 50, heard)
    assert heard.failed[1:] == ["media that TURN should relay goes by host"]


def test_participants_leave_whatever_happens(fake: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Generator.started("audio", [], None, 60):
        raise KeyboardInterrupt
    assert fake.read_text().endswith("left\n")


def test_a_program_that_ends_is_said(fake: Path) -> None:
    with (
        pytest.raises(SettingsError, match="the program that makes calls ended with 3"),
        Generator.started("broken", [], None, 60) as generator,
    ):
        generator.measure(5, 12, Heard())


@pytest.mark.tools
def test_the_program_itself() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" vet . && "$0" test .', go()],
        cwd=program.PROGRAM.parent,
        env={**os.environ, "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_program_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PROGRAM", Path("/nonexistent/generator"))
    with (
        pytest.raises(SettingsError, match="make load builds it, with Go"),
        Generator.started("audio", [], None, 60),
    ):
        pass
