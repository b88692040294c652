"""What pyinfra would leave out of an inventory file or misread is refused, by the deploy and by
every command beside it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from callready.settings.inventory import inventory_data, misread
from callready.settings.problem import SettingsError
from tests.support.inventories import SFU1, SOURCE, TURN1, TURN2, Edit, load
from tests.unit.test_exit import clone as clone
from tests.unit.test_exit import pyinfra


def said(text: str) -> list[str]:
    """What is found in an inventory file, each as `hosts: key: message`."""
    variables: dict[str, object] = {}
    exec(text, variables)
    return [
        ": ".join(filter(None, (", ".join(hosts), problem.key, problem.message)))
        for hosts, problem in misread(variables)
    ]


LIST = "must be a list of hosts in [ ], not"
HOST = 'must be a host, its name or ("NAME", {"address": "…"}), not'
DATA = 'must have the data of sfu1 in { }: ("sfu1", {"address": "…"}), not'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("livekit = ('sfu1', {'address': '192.0.2.11'})", [f"livekit: {LIST} one host alone"]),
        ("livekit = 'sfu1'", [f"livekit: {LIST} one host alone"]),
        ("livekit = ('sfu1',)", [f"livekit: {LIST} a tuple"]),
        ("livekit = ('sfu1', 'sfu2')", [f"livekit: {LIST} a tuple"]),
        ("livekit = ()", [f"livekit: {LIST} a tuple"]),
        ("livekit = (['sfu1'],)", [f"livekit: {LIST} a tuple"]),
        ("livekit = (['sfu1'], None)", [f"livekit: {LIST} a tuple"]),
        ("livekit = (('sfu1', {}), ('sfu2', {}))", [f"livekit: {LIST} a tuple"]),
        ("turn = {'turn1': {'pools': ['calls']}}", [f"turn: {LIST} a mapping"]),
        ("turn = {'turn1'}", [f"turn: {LIST} a set"]),
        ("turn = map(str, [])", [f"turn: {LIST} a map"]),
        ("app = None", [f"app: {LIST} None"]),
        ("android = 5", [f"android: {LIST} a number"]),
        ("all = True", [f"all: {LIST} True"]),
        ("livekit = ['sfu1', None]", [f"livekit[1]: {HOST} None"]),
        ("livekit = [5]", [f"livekit[0]: {HOST} a number"]),
        ("livekit = ['']", [f"livekit[0]: {HOST} ''"]),
        ("livekit = [['sfu1', {}]]", [f"livekit[0]: {HOST} a list"]),
        ("livekit = [{'sfu1': {}}]", [f"livekit[0]: {HOST} a mapping"]),
        ("livekit = [(5, {})]", [f"livekit[0]: {HOST} a tuple"]),
        ("livekit = [('sfu1', {}, {})]", [f"livekit[0]: {HOST} a tuple"]),
        ("livekit = [('sfu1',)]", [f"livekit[0]: {DATA} a name alone"]),
        ("livekit = [('sfu1', None)]", [f"livekit[0]: {DATA} None"]),
        ("livekit = [('sfu1', 'sfu2')]", [f"livekit[0]: {DATA} text"]),
        ("livekit = [('sfu1', {'address'})]", [f"livekit[0]: {DATA} a set"]),
        (
            "livekit = [('sfu1', {22: 'ssh_port'})]",
            ["livekit[0]: must have keys in quotes in the data of sfu1, not a number"],
        ),
        (
            "livekit = [('sfu1', {'groups': ['turn']})]",
            ["livekit[0]: sfu1 is in the groups whose lists have it: take groups out of its data"],
        ),
        ("livekit = (['sfu1', 5], {'ssh_port': 22})", [f"livekit[1]: {HOST} a number"]),
        ("eu = ['sfu1', 5]", [f"eu[1]: {HOST} a number"]),
        ("ports = [80, 443]", [f"ports: {LIST} one of something else; or begin its name with _"]),
        ("version = (1, 13)", [f"version: {LIST} a tuple; or begin its name with _"]),
        (
            "livekit = ['sfu1']\nturn = ['turn1']\nall = ['sfu1']",
            [
                "turn1: turn: is not in the group all, so pyinfra leaves it out: add it there, or take "
                "all out"
            ],
        ),
    ],
)
def test_a_group_that_pyinfra_would_leave_out_or_misread_is_named(
    text: str, found: list[str]
) -> None:
    assert said(text) == found


TWICE = "has it twice: write it once, with all its data"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("livekit = ['sfu1', 'sfu1']", [f"sfu1: livekit: {TWICE}"]),
        (
            "livekit = [('sfu1', {'address': '192.0.2.1'}), ('sfu1', {'address': '192.0.2.2'})]",
            [f"sfu1: livekit: {TWICE}"],
        ),
        (
            "livekit = [('one', {'address': '192.0.2.1'})]\nturn = [('one', {'address': '192.0.2.2'})]",
            ["one: address: differs between the groups livekit and turn: write it once"],
        ),
        (
            "livekit = ['sfu1']\nturn = ['SFU1']",
            ["sfu1, SFU1: turn: is one host: write sfu1 everywhere"],
        ),
        (
            "livekit = ['sfu1', '@ssh/sfu1']",
            ["sfu1, @ssh/sfu1: livekit: is one host: write sfu1 everywhere"],
        ),
        (
            "livekit = ['sfu1.test']\neu = (['sfu1.test.'], {})",
            ["sfu1.test, sfu1.test.: eu: is one host: write sfu1.test everywhere"],
        ),
    ],
)
def test_one_host_twice_is_named(text: str, found: list[str]) -> None:
    assert said(text) == found


def test_what_pyinfra_reads_as_it_is_meant_is_taken() -> None:
    assert not said("""
import os
from pathlib import Path
_ports, _pair, domain, count = [80, 443], ("a", "b"), "callready.test", 5
names = []
def host(number): return f"turn{number}.{domain}"
livekit = [("one.callready.test", {"address": "192.0.2.11", "pools": ["calls"]}), "two"]
turn = ([("one.callready.test", {"address": "192.0.2.11", "ssh_port": 2222}), host(1)], {"x": 1})
app = []
android = ["@local"]
eu = ["one.callready.test"]
""")


def test_deploy_and_every_command_refuse_the_same(clone: Path) -> None:
    (clone / "inventories/torn").write_text(
        "livekit = ('sfu1.callready.test', {'address': '192.0.2.11'})\nturn = ['turn1', 'turn1']\n"
    )
    lines = (
        f"inventories/torn: livekit: {LIST} one host alone\n"
        f"inventories/torn: turn1: turn: {TWICE}\n"
    )
    run = pyinfra(clone, "inventories/torn", "deploy.py")
    assert run.returncode == 1
    assert run.stdout.endswith(f"pyinfra error: nothing was connected to\n{lines}")
    for command, *more in (["secrets"], ["trust"], ["rotate", "turn"]):
        done = module(clone, command, "inventories/torn", *more)
        assert (done.returncode, done.stderr.removeprefix("callready: ")) == (1, lines)
    assert not (clone / "inventories/torn.secrets.yaml").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("turns = []", "no hosts: is it the right file?"),
        ("port = 5", "no hosts: is it the right file?"),
        (
            "Turn = ['turn1']\nlive_kit = ['sfu1']\nelse_ = ['x']",
            "no host in group livekit or turn: nothing to deploy; did you mean turn by Turn?; did you "
            "mean livekit by live_kit?",
        ),
        ("app = ['app1']", "no host in group livekit or turn: nothing to deploy"),
    ],
)
def test_an_inventory_without_a_usable_host_is_refused(text: str, why: str, project: Path) -> None:
    (project / SOURCE).write_text(text)
    with pytest.raises(SettingsError, match=f"^{SOURCE}: {re.escape(why)}$"):
        inventory_data(SOURCE)


def test_a_mistyped_group_beside_others_is_a_warning(project: Path) -> None:
    (warning,) = load((TURN1, "groups", ["turn", "test", "apps", "turn1"])).warnings
    assert warning == f"{SOURCE}: {TURN1}: is in group apps, which gets nothing; did you mean app?"


def test_two_names_that_lead_to_one_machine_are_refused(project: Path) -> None:
    here = "10.0.0.5"
    for name in (SFU1, TURN1):
        edits: list[Edit] = [(name, "ssh_hostname", here), (TURN2, "ssh_hostname", here)]
        with pytest.raises(SettingsError) as error:
            load(*edits)
        assert str(error.value) == (
            f"{SOURCE}: {name}, {TURN2}: ssh_hostname: is the same for all of them: one host has "
            "one name, in every group that it is in"
        )
        with pytest.raises(SettingsError, match="is the same"):
            load(*edits, (TURN2, "ssh_port", 22))
        load(*edits, (TURN2, "ssh_port", 2222))  # behind a router that passes ports on
        load(*edits, (TURN2, "ssh_config_file", "site2"))  # behind another jump host
    with pytest.raises(SettingsError, match="ssh_hostname: is the same"):
        load((TURN2, "ssh_hostname", SFU1.upper()))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("livekit = [", "line 1: '[' was never closed"),
        ("\nlivekit = [sfu1]", "line 2: NameError: name 'sfu1' is not defined"),
    ],
)
def test_a_mistake_in_python_is_said_without_a_traceback(clone: Path, text: str, why: str) -> None:
    inventory, data = clone / "inventories/wrong", clone / "inventories/group_data/wrong.py"
    inventory.write_text(text)
    run = pyinfra(clone, "inventories/wrong", "deploy.py")
    assert run.returncode == 1 and run.stdout.endswith(f" error: inventories/wrong, {why}\n")
    assert "Traceback" not in run.stdout
    inventory.write_text("livekit = ['sfu1']")
    data.write_text(text)
    done = module(clone, "secrets", "inventories/wrong")
    assert (done.returncode, done.stderr) == (1, f"inventories/wrong: {data}, {why}\n")


def module(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of callready's own."""
    command = [sys.executable, "-m", f"callready.{name}", *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True)
