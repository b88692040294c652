"""callready's own programs on a monitor: what is sent, and how it is installed."""

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from callready.release.plan import plan
from callready.release.programs import PACKAGES, Programs
from callready.settings.ports import CALLER
from callready.settings.problem import SettingsError
from tasks import declare
from tasks.caller import CONFIG, UNIT_FILE
from tests.support.inventories import MON1, SECRETS, SFU1, TURN1, Authority, Edit, bare, watched
from tests.unit.test_host_scripts import Machine, machine

__all__ = ["machine"]
PIN = re.compile(r"^([a-z0-9.-]+)==([^ ]+)", re.MULTILINE)
PROBES = ("caller", "participants", "legs", "webrtc", "livekit", "turn", "stun")


def test_the_monitor_has_the_versions_that_are_tested_here() -> None:
    ours = PIN.findall(Path(__file__).parents[2].joinpath("requirements.txt").read_text())
    assert set(PIN.findall(PACKAGES.read_text())) <= set(ours)


def test_the_caller_runs_with_what_is_sent_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "caller.zip").write_bytes(Programs().archive)
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, _ in PIN.findall(PACKAGES.read_text()):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    code = f"import sys; sys.path[:0] = {[str(tmp_path / 'caller.zip'), str(packages)]!r}\n"
    code += "".join(f"import callready.probes.{name}\n" for name in PROBES)
    command = [sys.executable, "-I", "-S", "-c", f"{code}print(callready.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == f"{tmp_path}/caller.zip/callready/__init__.py\n", done.stderr


def test_what_is_sent_has_one_name_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Programs().python == Programs("https://pypi.example.com/simple").python
    assert Programs().archive == Programs().archive
    names = zipfile.ZipFile(io.BytesIO(Programs().archive)).namelist()
    rooms = {name.split("/")[1] for name in names}
    assert rooms == {"__init__.py", "probes", "secrets", "settings"}
    before = Programs().python
    changed = {**Programs().sources, "callready/probes/caller.py": b"another"}
    monkeypatch.setattr(Programs, "sources", changed)
    assert Programs().python != before


def test_a_folder_that_lacks_a_wheel_is_said_before_anything_is_touched(
    project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    pins = PIN.findall(PACKAGES.read_text())
    for name, version in pins:
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").touch()
    (folder / "other-1.0-py3-none-any.whl").touch()
    found = [file.name for file in Programs(str(folder)).files()]
    assert len(found) == len(pins)
    assert "other-1.0-py3-none-any.whl" not in found
    assert not list(Programs("https://pypi.example.com/simple").files())
    next(folder.glob("livekit_api-*")).rename(folder / "livekit_api-0.1-py3-none-any.whl")
    with pytest.raises(SettingsError, match=r"has no wheel of livekit_api-1\S+: run python"):
        declare(watched(("*", "monitor.wheels", str(folder))), MON1)


def test_the_monitor_gets_it_with_credentials_that_only_it_can_read(project: Path) -> None:
    edits: list[Edit] = [
        (SFU1, "livekit.keys.APIcaller", "secret:livekit/second"),
        ("*", "monitor.livekit_key", "APIcaller"),
        ("*", "monitor.turn_secret", "secret:turn/user"),
    ]
    fleet = watched(*edits)
    node = declare(fleet, MON1)
    release = node.release
    config = release.files[CONFIG]
    assert (config.mode, config.owner) == (0o600, "root")
    own = {"livekit/second", "turn/user"}
    assert {name for name, value in SECRETS.items() if value.encode() in config.content} == own
    assert json.loads(config.content)["calls_a_minute"] == 12
    assert release.programs
    unit = release.files[UNIT_FILE].content.decode()
    assert f"ExecStart={release.programs.python} -P -m callready.probes.caller" in unit
    for text in (CALLER, "python3-venv", "callready-caller"):
        assert text in {*release.services, *release.packages, *release.users}
    pools = {
        path: [str(secret.get_secret_value()) for *_, secret in rows]
        for path, rows in declare(fleet, TURN1).release.databases.items()
    }
    assert pools == {"/var/lib/turn/calls.db": [SECRETS["turn/calls"], SECRETS["turn/user"]]}
    with pytest.raises(SettingsError, match=r"is APInone, which is not one of livekit\.keys"):
        watched(("*", "monitor.livekit_key", "APInone"))


def test_a_private_authority_goes_with_it(project: Path, authority: Authority) -> None:
    ca = Path(authority.file)
    release = declare(watched(("*", "tls.ca", str(ca))), MON1).release
    paths = {each["ca"] for each in json.loads(release.files[CONFIG].content)["probes"]}
    (path,) = filter(None, paths)
    assert release.files[path].content == ca.read_bytes()
    assert release.files[path].mode == 0o644


def test_it_is_installed_where_it_is_missing(project: Path) -> None:
    release = declare(watched(), MON1).release
    facts = bare()
    made = plan(release, facts)
    (step,) = (each for each in made.install if each.function == "install_programs")
    assert release.programs
    name, index, *contents = step.arguments
    assert f"/opt/callready/{name}/bin/python3" == release.programs.python
    assert (index, len(contents)) == ("", 2)
    facts.binaries.add(release.programs.python)
    assert "install_programs" not in [each.function for each in plan(release, facts).install]


def wheel(folder: Path, version: str) -> Path:
    """Of a package `needed`."""
    path = folder / f"needed-{version}-py3-none-any.whl"
    info = f"needed-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("needed.py", f"VERSION = {version!r}\n")
        packed.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: needed\nVersion: {version}\n"
        )
        packed.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr(f"{info}/RECORD", "")
    return path


def install(machine: Machine, tmp_path: Path, pinned: bytes, name: str = "first") -> str:
    """Install a caller that needs that package; what is said."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("callready/__init__.py", "")
        packed.writestr("callready/probes/__init__.py", "")
        packed.writestr("callready/probes/caller.py", "import needed; print(needed.VERSION)")
    path = wheel(tmp_path, "1.0")
    contents = [
        f"needed==1.0 --hash=sha256:{hashlib.sha256(pinned).hexdigest()}\n".encode(),
        buffer.getvalue(),
        path.read_bytes(),
    ]
    names = [hashlib.sha256(each).hexdigest() for each in contents]
    files = machine.here / "files"
    files.mkdir(parents=True, exist_ok=True)
    for content, digest in zip(contents, names, strict=True):
        (files / digest).write_bytes(content)
    packages, sources, sent = names
    return machine.apply(f"install_programs {name} '' {packages} {sources} {path.name} {sent}")


@pytest.mark.tools
def test_it_is_installed_from_wheels_and_goes_again(machine: Machine, tmp_path: Path) -> None:
    said = install(machine, tmp_path, wheel(tmp_path, "1.0").read_bytes())
    python = machine.root / "opt/callready/first/bin/python3"
    assert said == "installing callready's own programs\n"
    command = [str(python), "-P", "-m", "callready.probes.caller"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1.0\n"
    assert python.readlink().is_absolute(), "gone when the system has another Python"
    install(machine, tmp_path, wheel(tmp_path, "1.0").read_bytes(), "second")
    unit = {
        f"{machine.root}/etc/systemd/system/{CALLER}": f"ExecStart={python} -P -m callready.probes.caller\n"
    }
    machine.release("r1", files=unit)
    machine.run("tidy")
    assert [path.name for path in (machine.root / "opt/callready").iterdir()] == ["first"]


@pytest.mark.tools
def test_a_wheel_that_is_not_the_pinned_one_is_not_installed(
    machine: Machine, tmp_path: Path
) -> None:
    said = install(machine, tmp_path, b"another")
    assert "packages of callready's own programs cannot be installed: ERROR: " in said
    assert not (machine.root / "opt/callready").exists()
