"""The tree of livekit.yaml against the structs of the Go source, listed by data/livekit_keys.go."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from callready.settings import livekit_keys
from callready.settings.livekit_keys import MANAGED, TREE, Tree, check, known

DATA = Path(__file__).parent / "data"
VERSIONS = ["1.9.12", "1.11.0", "1.13.1", "1.13.5"]
OBJECTS = {"rtcconfig.PortRange": "text", "livekit.RoomConfiguration": "any"}


def listed(version: str) -> dict[str, str]:
    """Path to type, as the server of this version decodes them."""
    found = {}
    for line in (DATA / f"livekit-{version}.txt").read_text().splitlines():
        path, kind = line.split(" ", 1)
        found[path] = OBJECTS.get(kind.removeprefix("object "), kind)
        if path == "rtc.node_ip":  # a string until 1.9.12, then an object read from a scalar
            found[path] = "text"
    return found


def leaves(tree: Tree, version: str, place: str = "") -> Iterator[tuple[str, str]]:
    """Path and type of every leaf of our tree that this version knows."""
    if isinstance(tree, str):
        yield place, tree
    elif isinstance(tree, list):
        yield from leaves(tree[0], version, f"{place}[]")
    else:
        for key, below in tree.items():
            at = f"{place}.{key}".removeprefix(".")
            if known(at, version):
                yield from leaves(below, version, at)


def said(config: dict[str, object], version: str = "1.13.5") -> list[str]:
    """Findings as an operator reads them."""
    return [f"{p.level}: {p.key}: {p.message}" for p in check(version, config)]


@pytest.mark.parametrize("version", VERSIONS)
def test_tree_is_what_the_server_decodes(version: str) -> None:
    assert dict(leaves(TREE, version)) == listed(version)


def test_every_key_that_the_other_tables_name_is_in_the_tree() -> None:
    places = set(livekit_keys._places(TREE))
    named = {*livekit_keys.SINCE, *livekit_keys.REMOVED, *livekit_keys.DEPRECATED, *MANAGED}
    assert named <= places


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"room": {"auto_creat": True}},
            "error: livekit.config.room.auto_creat: not a key of livekit.yaml in any version; "
            "livekit-server 1.13.5 would not start; did you mean auto_create?",
        ),
        ({"max_participants": 5}, "error: livekit.config.max_participants: not a key of"),
        ({"debug_handler_port": 6789}, "error: livekit.config.debug_handler_port: not a key of"),
        (
            {"rtc": {"enable_warp": True}},
            "error: livekit.config.rtc.enable_warp: not a key of livekit-server 1.13.5, which would "
            "not start; it came with 1.13.6",
        ),
        ({"webtransport": {"port": 443}}, "error: livekit.config.webtransport: not a key of live"),
        (
            {"room": {"create_room_enabled": True}},
            "error: livekit.config.room.create_room_enabled: not a key of livekit-server 1.13.5, "
            "which would not start; it went with 1.13.2",
        ),
        (
            {"prometheus_port": 6789},
            "warning: livekit.config.prometheus_port: deprecated: set livekit.prometheus instead",
        ),
        (
            {"log_level": "debug"},
            "warning: livekit.config.log_level: deprecated: set livekit.logging.level instead",
        ),
        ({"port": 7880}, "error: livekit.config.port: callready writes it: set livekit.port"),
        (
            {"rtc": {"port_range_start": 1}},
            "error: livekit.config.rtc.port_range_start: callready writes it: set "
            "livekit.rtc.port_range_start instead",
        ),
        ({"rtc": {"turn_servers": []}}, "error: livekit.config.rtc.turn_servers: callready writ"),
        (
            {"room": {"max_participants": "5"}},
            "error: livekit.config.room.max_participants: must be a whole number of at least 0, "
            "not text",
        ),
        ({"room": {"max_participants": -5}}, "error: livekit.config.room.max_participants: must "),
        ({"room": {"max_participants": True}}, "error: livekit.config.room.max_participants: mus"),
        ({"room": {"auto_create": "yes"}}, "error: livekit.config.room.auto_create: must be true"),
        (
            {"room": {"create_room_timeout": 10}},
            "error: livekit.config.room.create_room_timeout: must be a duration such as 500ms or 10s",
        ),
        ({"region": "eu"}, "error: livekit.config.region: callready writes it: set region instead"),
        (
            {"trace": {"jaeger_url": {"name": "eu"}}},
            "error: livekit.config.trace.jaeger_url: must be text, not a mapping",
        ),
        (
            {"trace": {"jaeger_url": {"eu"}}},
            "error: livekit.config.trace.jaeger_url: must be text, not a set",
        ),
        (
            {"room": {"room_configurations": {"big": {"agents": [{b"x"}]}}}},
            "error: livekit.config.room.room_configurations.big: must be a mapping of plain values",
        ),
        ({"room": 5}, "error: livekit.config.room: must be a mapping, not the number 5"),
        (
            {"room": {"enabled_codecs": "opus"}},
            "error: livekit.config.room.enabled_codecs: must be a list, not text",
        ),
        (
            {"room": {"enabled_codecs": [{"mime": "audio/opus"}, {"mim": "x"}]}},
            "error: livekit.config.room.enabled_codecs[1].mim: not a key of livekit.yaml in any ",
        ),
    ],
)
def test_what_the_server_would_not_start_with(config: dict[str, object], expected: str) -> None:
    (found,) = said(config)
    assert found.startswith(expected)


def test_a_layer_is_a_number() -> None:
    (found,) = said({"video": {"stream_tracker_manager": {"video": {"frame_tracker": {"0": {}}}}}})
    assert "must have a whole number" in found


def test_a_key_of_another_section_is_found_there() -> None:
    (found,) = said({"departure_timeout": 20})
    assert found.endswith("did you mean room.departure_timeout?")


def test_sound_config_with_free_keys_is_silent() -> None:
    assert not said(
        {
            "room": {
                "auto_create": False,
                "create_room_timeout": "1m30s",
                "playout_delay": None,
                "enabled_codecs": [{"mime": "audio/opus"}],
                "room_configurations": {"big": {"max_participants": 100}},
            },
            "logging": {"component_levels": {"pion.ice": "debug"}, "sample": True},
            "rtc": {"congestion_control": {"send_side_bwe": {"congestion_detector": {}}}},
            "node_selector": {"sysload_limit": 1, "regions": [{"name": "eu", "lat": 48.8}]},
            "video": {"stream_tracker_manager": {"video": {"bitrate_report_interval": {0: "1s"}}}},
        }
    )


def test_a_newer_version_is_one_warning_and_takes_what_is_known_of_it() -> None:
    assert [p.level for p in check("1.13.11", {"rtc": {"enable_warp": True}})] == ["warning"]
    assert [p.level for p in check("1.9.0", {"room": {"x": 1}})] == ["warning", "error"]


def test_where_names_the_setting() -> None:
    assert check("1.13.5", {"x": 1}, "elsewhere")[0].key == "elsewhere.x"


def test_a_secret_may_stand_where_text_does() -> None:
    hidden = SecretStr("hunter2")
    assert not said({"trace": {"jaeger_url": hidden}})
    (found,) = said({"room": {"max_participants": hidden}})
    assert found.endswith("must be a whole number of at least 0, not text")


def test_a_value_is_not_quoted() -> None:
    found = said({"region": ["hunter2"], "api": "hunter2", "room": {"sync_streams": "hunter2"}})
    assert len(found) == 3
    assert "hunter2" not in "".join(found)
