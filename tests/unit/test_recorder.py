"""The lab's stand-in for egress, and what callready knows of egress, against what upstream's
program knows (data/egress-1.14.1.yaml)."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from livekit import api

from callready.settings import egress

TABLE: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "data/egress-1.14.1.yaml").read_text()
)
SOURCE = "".join(
    file.read_text() for file in sorted(Path(__file__).parents[2].glob("lab/egress/*.go"))
)


def words(name: str) -> set[str]:
    return set(TABLE[name].split())


def keys(place: str) -> set[str]:
    return set(TABLE["keys"][place].split())


def tags(struct: str) -> set[str]:
    """The keys that a Go struct of the stand-in is read from."""
    found = re.search(rf"^type {struct} struct {{\n(.*?)^}}", SOURCE, re.DOTALL | re.MULTILINE)
    assert found, struct
    return set(re.findall(r'`yaml:"(\w+)"`', found[1]))


@pytest.mark.parametrize(
    ("place", "struct"),
    [
        ("", "config"),
        ("cpu_cost", "costs"),
        ("session_limits", "limits"),
        ("storage", "storage"),
        ("storage.s3", "s3"),
    ],
)
def test_the_stand_in_is_configured_as_upstream(place: str, struct: str) -> None:
    assert tags(struct) == keys(place)


def test_the_stand_in_is_measured_as_upstream() -> None:
    plain = re.findall(r'gauge\("(\w+)"', SOURCE)
    others = re.findall(r'options\(\s*"(\w*)",\s*"(\w+)"', SOURCE)
    named = re.findall(r'Subsystem: "(\w+)", Name: "(\w+)"', SOURCE)
    found = {f"livekit_egress_{name}" for name in plain}
    for subsystem, name in [*others, *named]:
        found.add("_".join(part for part in ("livekit", subsystem, name) if part))
    assert found == words("metrics")
    assert set(re.findall(r'result :?= "(\w+)"', SOURCE)) < words("results")


def test_states_are_those_of_the_protocol() -> None:
    assert set(api.EgressStatus.keys()) == words("states")
    reported = {
        "SetAborted": "EGRESS_ABORTED",
        "SetComplete": "EGRESS_COMPLETE",
        "SetFailed": "EGRESS_FAILED",
        "SetLimitReached": "EGRESS_LIMIT_REACHED",
    }
    found = {state for method, state in reported.items() if f"info.{method}(" in SOURCE}
    found |= set(re.findall(r"livekit\.EgressStatus_(EGRESS_\w+)", SOURCE))
    assert found == words("states")


@pytest.mark.parametrize(
    ("place", "model"),
    [
        ("cpu_cost", egress.CpuCost),
        ("session_limits", egress.SessionLimits),
        ("storage", egress.Storage),
        ("storage.s3", egress.S3),
        ("storage.azure", egress.Azure),
        ("storage.gcp", egress.Gcp),
    ],
)
def test_settings_have_no_key_that_upstream_ignores(place: str, model: type[Any]) -> None:
    assert set(model.model_fields) <= keys(place)


def test_the_template_has_no_key_that_upstream_ignores() -> None:
    template = (Path(__file__).parents[2] / "templates/egress.yaml.j2").read_text()
    found = set(re.findall(r'^(?:\{\{ \{")?(\w+)"?:', template, re.MULTILINE))
    assert {"redis", "ws_url", "storage", "cpu_cost"} < found <= keys("")


def test_costs_are_upstreams() -> None:
    assert TABLE["costs"] == egress.COSTS
    standard = dict(re.findall(r"otherwise\(&cost\.(\w+), ([\d.]+)\)", SOURCE))
    found = {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): float(standard[name])
        for name in standard
    }
    del found["max_pulse_clients"]
    assert found == egress.COSTS
