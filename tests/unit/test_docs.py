"""The documentation says what is so: generated pages are up to date, links lead somewhere, and the
commands and settings it shows exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from itertools import chain, takewhile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

import callready
from callready import docs
from callready.secrets import store as secrets
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data
from callready.settings.models import ROLES, HostSettings
from callready.settings.ports import Use, port_plan

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
COMMANDS = ROOT / "docs/commands.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("examples/**/*.md"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


FENCE = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(make|pyinfra|pytest|python -m) .+")

# One Python for all of pyinfra's commands: to import it takes half a second.
PARSE = """
import json, sys
from click import UsageError
from pyinfra_cli.cli import cli

def wrong(arguments):
    try:
        cli.make_context("pyinfra", arguments)
    except UsageError as error:
        return error.format_message()

print(json.dumps([wrong(arguments) for arguments in json.load(sys.stdin)]))
"""


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name in languages]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text())


@cache
def commands(program: str) -> list[list[str]]:
    """The arguments of every command of ours in the pages, in fenced blocks or in the text;
    pytest's among those of python."""
    found: dict[tuple[str, ...], None] = {}
    for page in PAGES:
        lines = (line for body in blocks(page, "sh") for line in body.splitlines())
        for line in chain(lines, INLINE.findall(prose(page))):
            line = line.partition(" #")[0].strip()
            if COMMAND.fullmatch(line):
                words = shlex.split(line.replace("…", "x"))
                while "=" in words[0]:
                    del words[0]
                name = Path(words[0]).name
                if name == "pytest":
                    name, words[0:1] = "python", ["python", "-m", "pytest"]
                if name == program:
                    found[tuple(words[1:])] = None
    return [list(words) for words in found]


def run(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, input=given, capture_output=True, text=True, timeout=60
    )


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("-") and word != "--"]


def is_told(option: str, text: str) -> bool:
    return bool(re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text))


@pytest.mark.parametrize("page", docs.pages(), ids=name_of)
def test_the_generated_pages_are_what_the_generator_makes(page: Path) -> None:
    assert page.read_text() == docs.pages()[page], "run make docs"


def test_alerts_are_shown_without_what_prometheus_fills_in() -> None:
    page = docs.pages()[ROOT / "docs/watching.md"]
    assert page.count("#an-sfu-or-a-turn-host-is-missing) |") == 2 and "{{" not in page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def slug(heading: str) -> str:
    """A heading's anchor as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {ROOT / link.partition("#")[0] for link in LINK.findall(prose(README))}
    assert set(PAGES) - {README} <= linked


def test_the_changelog_begins_with_the_version_of_the_code() -> None:
    newest = re.search(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == callready.__version__


def test_there_are_commands_to_check() -> None:
    assert commands("make") and commands("pyinfra") and commands("python")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = "ENV|INVENTORY|WHAT|HOST|UNIT|SINCE|MATCH|KIND|ROOMS?|SPEAKERS|RELAYED|BY|STEPS|CONFIRM"
    for target, *variables in commands("make"):
        for item in variables:
            assert re.fullmatch(rf"({known})=\S+|RECIPIENTS=.+", item), item
        rule = re.compile(rf"^(\w+ )*{re.escape(target)}( \w+)*:(?!=).*\n?", re.MULTILINE)
        assert rule.search(makefile), f"the Makefile has no rule for {target}"
    for target in {target for target, *_ in commands("make")}:
        assert run("make", "-n", target, "ENV=lab", "HOST=h").returncode == 0, target


def test_pyinfra_commands_name_files_and_options_that_exist() -> None:
    for inventory, deploy, *_ in commands("pyinfra"):
        # An inventory may be one of the operator's own repository, beside this one.
        assert (ROOT / inventory.removeprefix("../ops/").replace("ENV", "prod")).is_file()
        assert (ROOT / deploy).is_file()
    done = run(sys.executable, "-c", PARSE, given=json.dumps(commands("pyinfra")))
    wrong = zip(commands("pyinfra"), json.loads(done.stdout), strict=True)
    assert not [pair for pair in wrong if pair[1]]


@pytest.mark.parametrize("words", commands("python"), ids=shlex.join)
def test_python_commands_name_modules_and_options_that_exist(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, module, *arguments = words
    assert importlib.util.find_spec(module), f"no module {module}"
    for argument in arguments:
        if argument.startswith(("inventories/", "tests/", "../ops/")):
            assert (ROOT / argument.removeprefix("../ops/")).exists()
    if not options(arguments) and module in WITHOUT_OPTIONS:
        return
    text = (
        help_of_pytest() if module in PYTESTS else help_of(module, arguments, monkeypatch, capsys)
    )
    assert not [option for option in options(arguments) if not is_told(option, text)]


WITHOUT_OPTIONS = (
    *("callready.docs", "callready.secrets", "callready.probes"),
    *("callready.alert_test", "callready.export"),
)
PYTESTS = ("pytest", "callready.verify")
VERIFY = ROOT / "tests/verify/conftest.py"


# What callready starts by itself and nobody types.
INTERNAL = {
    "callready.probes.participants",
    "callready.probes.talkers",
    "callready.release.host.log_receiver",
}
MODULES = {
    ".".join(path.with_suffix("").relative_to(ROOT).parts).removesuffix(".__main__")
    for path in ROOT.glob("callready/**/*.py")
    if '__name__ == "__main__"' in path.read_text()
} - INTERNAL


def test_every_deploy_file_is_on_the_page_of_commands() -> None:
    told = re.findall(r"^### (.+\.py)$", COMMANDS.read_text(), re.MULTILINE)
    assert {path.name for path in ROOT.glob("*.py")} - {"config.py"} <= set(told)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_and_option_is_on_the_page_of_commands(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = dict(re.findall(r"^##+ (\S+)\n(.*?)(?=^##|\Z)", COMMANDS.read_text(), re.M | re.S))
    assert f"python -m {module}" in sections[module]
    if module == "callready.verify":
        text = "\n".join(re.findall(r'addoption\("(.+?)"', VERIFY.read_text()))
    else:
        text = help_of(module, [], monkeypatch, capsys) if module not in WITHOUT_OPTIONS else ""
    own = sections[module] + sections["Probes"] * ("probes" in module)
    has = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--help", "--inventory"}
    assert not [option for option in sorted(has) if not is_told(option, own)]


def help_of(
    module: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a module says of its options, in this process: a Python each takes half a second. Up
    to --help the arguments are parsed, and a wrong one is an error."""
    own = takewhile(lambda word: word != "--", arguments)
    monkeypatch.setattr(sys, "argv", [module, *own, "--help"])
    with warnings.catch_warnings(action="ignore"), pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    return said.out


@cache
def help_of_pytest() -> str:
    """pytest's options and those that the project's own tests add to them."""
    done = run(sys.executable, "-m", "pytest", "--help")
    assert done.returncode == 0, done.stderr
    own = [path.read_text() for path in sorted(ROOT.glob("tests/*/conftest.py"))]
    return "\n".join([done.stdout, *own])


def test_the_shipped_inventory_is_refused_as_the_guide_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "example.com" not in (ROOT / "inventories/prod").read_text():
        pytest.skip("inventories/prod is somebody's own")
    assert docs.main(["inventories/prod"]) == 1
    assert "edit inventories/prod and inventories/group_data/prod.py" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_are_shown_are_settings(page: Path) -> None:
    """What is wrong with an example may only be what it leaves out."""
    for body in blocks(page, "python"):
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(body).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        assert values, f"{page.name}: {body}"
        lists = [name for name in {*ROLES, "android"} if isinstance(values.get(name), list)]
        hosts = [host for name in lists for host in values.pop(name)]
        wrong = problems(values) + [error for _, data in hosts for error in problems(data)]
        assert not wrong, f"{page.name}: {wrong}"


def problems(values: dict[str, Any]) -> list[str]:
    names = {name: "-" * 32 for _, name in secrets.references(values)}
    try:
        HostSettings.model_validate({"name": "example", **secrets.resolve(values, names)})
    except ValidationError as error:
        return [
            f"{item['loc']}: {item['msg']}"
            for item in error.errors(include_input=False)
            if item["type"] != "missing" and "set either secrets" not in item["msg"]
        ]
    return []


def test_every_setting_and_every_port_is_on_its_page() -> None:
    settings = (ROOT / "docs/settings.md").read_text()
    for key in ("`min_port`", "## livekit.rtc", "## turn.pools.NAME", "## app.health[]"):
        assert key in settings
    ports = (ROOT / "docs/ports.md").read_text()
    for port in ("| 50000-60000 | UDP |", "| 49152-65535 | UDP |", "| 5349 | TCP |"):
        assert port in ports


def test_the_edge_firewalls_rules_let_the_plan_through_and_nothing_else() -> None:
    """A packet is decided by the first rule that matches, as OVHcloud's guide says."""
    plan = [
        Use("sshd", "a", "", "tcp", 22, 22, "", ""),
        Use("livekit", "b", "", "udp", 50000, 60000, "", "", relay=True),
        Use("livekit", "c", "", "tcp", 6789, 6789, "", "", "this host"),
        # Not what comes over an internal network or IPv6, which it does not see.
        Use(
            "extra", "d", "", "tcp", 9100, 9100, "", "", ("scrapers", "10.0.0.0/8", "2001:db8::/32")
        ),
        Use("extra", "e", "", "tcp", 6379, 6379, "", "", ("10.0.0.0/8",)),
        Use("extra", "f", "", "gre", 0, 0, "", "", ("198.51.100.0/24",)),
        Use("extra", "g", "", "vrrp", 0, 0, "", ""),
    ]
    monitor = {"address": "203.0.113.9", "internal_address": "10.0.0.9", "groups": {"scrapers"}}
    fleet = Fleet("", {"m": HostSettings.model_validate({"name": "m", **monitor})})
    rules = docs.edge_rules(plan, fleet)
    opened = {(r.protocol, r.source, r.destination_port) for r in rules if r.destination_port}
    assert opened == {
        ("TCP", "", "22"),
        ("UDP", "", "50000-60000"),
        ("TCP", "203.0.113.9/32", "9100"),
    }
    assert [r.source for r in rules if r.protocol == "GRE"] == ["198.51.100.0/24"]
    first, last = rules[0], rules[-1]
    assert (first.action, first.protocol, first.state) == ("Accept", "TCP", "established")
    assert (last.action, last.protocol, last.destination_port) == ("Deny", "IPv4", "")
    assert {r.source_port for r in rules if r.protocol == "UDP" and r.source_port} == {"53", "123"}
    assert all(
        r.destination_port or r.source_port or r.state or r.protocol in ("ICMP", "GRE")
        for r in rules[:-1]
    ), "a rule without any condition lets everything in"


@pytest.mark.parametrize(
    ("env", "example"),
    [("prod", docs.example().hosts), ("single", {"one.example.com": docs.one_host()})],
)
def test_the_port_tables_are_of_the_shipped_inventories(
    env: str, example: Mapping[str, HostSettings]
) -> None:
    inventory = ROOT / "inventories" / env
    if "example.com" not in inventory.read_text():
        pytest.skip(f"{inventory} is somebody's own")
    shipped = {}
    for name, data in inventory_data(str(inventory)).items():
        own = {key: value for key, value in data.items() if not key.startswith("ssh_")}
        values = {reference: "-" * 32 for _, reference in secrets.references(own)}
        if "address" in own:
            own = {"name": name, **secrets.resolve(own, values)}
            shipped[name] = port_plan(HostSettings.model_validate(own))
    assert shipped == {name: port_plan(host) for name, host in example.items()}


def test_the_edge_firewall_takes_twenty_rules() -> None:
    fleet = docs.example()
    for host in (*fleet.hosts.values(), docs.one_host()):
        table = docs.edge_table(host, fleet)
        assert "it takes 20" not in table
        assert len([line for line in table.splitlines() if "Accept" in line]) < 20


def test_every_fault_that_is_made_is_in_the_table() -> None:
    made = (ROOT / "tests/faults/test_faults.py").read_text()
    table = (ROOT / "docs/faults.md").read_text()
    for name in re.findall(r'^@fault\("(.+?)"', made, re.MULTILINE):
        assert f"test_fault[{name}]" in table, "run `make faults`"


def test_the_picture_is_a_screen_that_needs_nothing_from_outside() -> None:
    drawn = ElementTree.parse(ROOT / "docs/demo.svg").getroot()
    words = [element.text or "" for element in drawn.iter() if (element.text or "").strip()]
    assert words[0] == "sfu1.lab.test" and "IPv4" in words and "UDP" in words
    assert any("passed, 0 failed" in word for word in words) and "CAUSE" not in " ".join(words)
    assert {element.tag.rpartition("}")[2] for element in drawn.iter()} == {"svg", "rect", "text"}
