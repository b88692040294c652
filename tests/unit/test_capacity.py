"""What `make capacity` says, by the figures of the hosts of tests/support/inventories.py."""

import pytest

from callready.capacity import main, read, table
from callready.settings.capacity import Calls, Machine, limits
from callready.settings.ports import LIVEKIT
from tests.support.inventories import SFU1, TURN1, TURN2, Edit, load

pytestmark = pytest.mark.usefixtures("project")
FILES = {LIVEKIT: 524_288, "turnserver@calls.service": 6000}
MACHINE = Machine(4, 262_144, 1000, FILES, 8192)
VIDEO = Calls("video", 4, 4, 0.25)


def found(
    host: str, *edits: Edit, calls: Calls = VIDEO, machine: Machine = MACHINE
) -> dict[str, int]:
    """Participants by what limits them, the first limit first."""
    fleet = load(*edits)
    return {each.what: each.participants for each in limits(fleet, fleet[host], machine, calls)}


def test_an_sfu_forwards_what_everybody_receives() -> None:
    seen = found(SFU1)
    # 3 others x 240 packets/s and 2.05 Mbit/s each, of 4 x 20,000 and 1000 with a fifth kept free.
    assert seen["processor"] == int(0.8 * 80_000 / 720)
    assert seen["bandwidth"] == int(800 / 6.15)
    # Two peer connections on two addresses; 6 files.
    assert seen["ports of media"] == 10_001 // 4
    assert seen["open files of LiveKit"] == 524_288 // 6
    assert next(iter(seen)) == "processor" and "quota of pool calls" not in seen


def test_a_turn_host_has_everybodys_allocations_and_the_media_of_some() -> None:
    seen = found(TURN1)
    # A quarter of 300 + 720 packets/s.
    assert seen["processor"] == int(0.8 * 200_000 / 255)
    # 3 URIs x 2 families x 2 peer connections, whoever needs them.
    assert seen["relay ports of pool calls"] == 16_384 // 12
    assert seen["open files of pool calls"] == 6000 // 24
    assert found(TURN1, ("*", "turn.pools.calls.total_quota", 120))["quota of pool calls"] == 10
    assert (
        next(iter(found(TURN1, ("*", "turn.pools.calls.total_quota", 120))))
        == "quota of pool calls"
    )
    # LiveKit hands out the other pool: its callers are not those of the service.
    assert not found(TURN2)
    assert "its pools are for others" in table(TURN2, [], MACHINE)


def test_one_host_with_both_has_one_processor_and_one_link() -> None:
    edits: list[Edit] = [
        (SFU1, "groups", ["livekit", "turn"]),
        (SFU1, "pools", ["calls"]),
        (SFU1, "livekit.rtc.port_range_end", 55_000),
        ("*", "turn.pools.calls.min_port", 55_001),
    ]
    seen = found(SFU1, *edits)
    assert seen["processor"] == int(0.8 * 4 / (720 / 20_000 + 255 / 50_000))
    assert seen["ports of media"] == 5_001 // 4 and seen["relay ports of pool calls"] == 10_535 // 8


@pytest.mark.parametrize(
    ("calls", "sends", "receives"),
    [
        (Calls("audio", 10, 10, 0), (50, 50), (450, 450)),
        # Two on a stage of a hundred: these hear one another, the others both.
        (Calls("gallery", 100, 2, 0), (6, 54), (198, 1089)),
        (Calls("video", 2, 1, 0), (150, 1350), (120, 1025)),
    ],
)
def test_a_participant_is_one_on_average(
    calls: Calls, sends: tuple[float, float], receives: tuple[float, float]
) -> None:
    assert calls.sent == pytest.approx(sends) and calls.received == pytest.approx(receives)


def test_what_tracks_connections_counts_flows() -> None:
    plain = found(SFU1)["tracked connections"]
    assert plain == int(0.8 * 262_144 / 2)
    assert found(SFU1, ("*", "firewall.notrack", True))["tracked connections"] == int(0.8 * 262_144)
    # Behind an edge a WebSocket is two connections.
    behind = found(SFU1, ("*", "edge", {}), ("*", "livekit.url", f"wss://{SFU1}"))
    assert behind["tracked connections"] == int(0.8 * 262_144 / 3)
    assert behind["connections of the edge"] == 20_000


def test_memory_is_for_streams_allocations_and_connections() -> None:
    free = 0.8 * 8192 - 256
    # Sound and video sent, and of three others each.
    assert found(SFU1)["memory"] == int(free / (1.2 + 5 + 3 * 0.5))
    assert found(TURN1)["memory"] == int(free / (12 / 16))
    behind = found(SFU1, ("*", "edge", {}), ("*", "livekit.url", f"wss://{SFU1}"))
    assert behind["memory"] == int(free / (7.7 + 1 / 16))
    # One of ten speaks, in sound: it sends, nine receive.
    quiet = found(SFU1, calls=Calls("audio", 10, 1, 0))
    assert quiet["memory"] == int(free / (1.2 + (0.75 + 9 * 0.16) / 10))
    # Debian alone takes it all.
    assert found(SFU1, machine=Machine(1, memory=300))["memory"] == 0


def test_what_is_not_known_is_no_limit_and_is_said() -> None:
    bare = Machine(2)
    assert not {"bandwidth", "memory", "tracked connections", "open files of LiveKit"} & {
        *found(SFU1, machine=bare)
    }
    fleet = load()
    shown = table(SFU1, limits(fleet, fleet[SFU1], bare, VIDEO), bare)
    assert shown.startswith(f"{SFU1}: 44 participants, then processor\n")
    assert shown.endswith("bandwidth: the interface has no speed; set host.bandwidth")


@pytest.mark.parametrize(
    ("speed", "said", "used"),
    [("-1", None, 0), ("", 500, 500), ("1000", 250, 250), ("1000", None, 1000)],
)
def test_a_virtual_interface_has_no_speed(speed: str, said: float | None, used: float) -> None:
    lines = ["cores 4", "memory 4096", "conntrack ", f"bandwidth {speed}", f"{LIVEKIT} 524288"]
    assert read(lines, said) == Machine(4, 0, used, {LIVEKIT: 524_288}, 4)


@pytest.mark.parametrize(
    "wrong", [["--room", "1"], ["--speakers", "5"], ["--relayed", "20"], ["tv"]]
)
def test_a_kind_of_call_that_cannot_be_is_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inventories/test", *wrong])
    assert "usage" in capsys.readouterr().err
