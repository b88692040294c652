"""Settings and probes run where pyinfra, paramiko and pytest are not installed: as a monitor has
them."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = Path(sysconfig.get_path("purelib"))
ABSENT = ("pyinfra", "paramiko", "pytest", "_pytest", "gevent", "testinfra")


@pytest.fixture
def without(tmp_path: Path) -> list[str]:
    """A Python whose installed packages are this one's without those."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for each in PACKAGES.iterdir():
        if not each.name.startswith(ABSENT):
            (packages / each.name).symlink_to(each)
    start = "import sys, runpy; sys.path[1:1] = sys.argv.pop(1).split(':'); "
    start += "runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=True)"
    return [sys.executable, "-I", "-S", "-c", start, f"{REPOSITORY}:{packages}"]


def test_they_are_absent(without: list[str]) -> None:
    for name in ABSENT:
        done = subprocess.run([*without, name], capture_output=True, text=True, check=False)
        assert f"No module named {name}" in done.stderr


def test_a_probe_is_asked(without: list[str]) -> None:
    probe = {"kind": "stun", "node": "x", "pool": "x", "address": "127.0.0.1", "port": 1}
    request = {"version": 1, "id": 1, "within": 0, "kinds": ["stun"], "probes": [probe]}
    done = subprocess.run(
        [*without, "callready.probes"],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["evidence"] == "Connection refused", done.stderr


@pytest.mark.parametrize("room", ["settings", "probes"])
def test_every_module_can_be_loaded(without: list[str], room: str) -> None:
    folder = REPOSITORY / "callready" / room
    names = [f"callready.{room}.{path.stem}" for path in folder.glob("*.py")]
    assert len(names) > 8
    everything = f"import importlib; [importlib.import_module(name) for name in {names!r}]"
    load = [*without[:-2], without[-2].partition("runpy.run")[0] + everything, without[-1]]
    done = subprocess.run(load, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
