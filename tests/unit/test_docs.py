"""The documentation says what is so: generated pages are up to date, links lead somewhere, and the
commands and settings it shows exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from callready import docs
from callready.secrets import store as secrets
from callready.settings.inventory import inventory_data
from callready.settings.models import HostSettings
from callready.settings.ports import Use, port_plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(make|pyinfra|python -m) .+")


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name in languages]


def commands() -> list[str]:
    """Every command of ours in the pages, in fenced blocks or in the text."""
    found: dict[str, None] = {}
    for page in PAGES:
        prose = FENCE.sub("", page.read_text())
        for line in chain(
            (line for body in blocks(page, "sh") for line in body.splitlines()),
            INLINE.findall(prose),
        ):
            line = line.partition(" #")[0].strip()
            if COMMAND.fullmatch(line):
                found[line] = None
    return list(found)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@cache
def help_of(*command: str) -> str:
    done = run(*command, "--help")
    assert done.returncode == 0, f"{shlex.join(command)} --help: {done.stderr}"
    return done.stdout


def without_variables(command: str) -> list[str]:
    words = shlex.split(command.replace("…", "x"))
    while "=" in words[0]:
        del words[0]
    return words


def check_options(command: str, words: list[str], text: str) -> None:
    for word in words:
        if word.startswith("-") and word != "--":
            option = word.partition("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), (
                f"{command}: there is no option {option}"
            )


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_the_generated_pages_are_what_the_generator_makes(page: Path) -> None:
    assert page.read_text() == docs.pages()[page], "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def slug(heading: str) -> str:
    """A heading's anchor as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_there_are_commands_to_check() -> None:
    kinds = {without_variables(command)[0] for command in commands()}
    assert {"make", "pyinfra", "python"} <= kinds


@pytest.mark.parametrize("command", [c for c in commands() if without_variables(c)[0] == "make"])
def test_make_targets_exist(command: str) -> None:
    _, target, *variables = without_variables(command)
    assert all(re.fullmatch(r"(ENV|WHAT|HOST)=\S+|RECIPIENTS=.+", item) for item in variables)
    rule = re.compile(rf"^(\w+ )*{re.escape(target)}( \w+)*:(?!=).*\n?", re.MULTILINE)
    assert rule.search((ROOT / "Makefile").read_text()), f"the Makefile has no rule for {target}"
    assert run("make", "-n", target, "ENV=lab", "HOST=h").returncode == 0


@pytest.mark.parametrize(
    "command", [c for c in commands() if without_variables(c)[0].endswith("pyinfra")]
)
def test_pyinfra_commands_name_files_and_options_that_exist(command: str) -> None:
    _, inventory, deploy, *options = without_variables(command)
    assert (ROOT / inventory.replace("ENV", "prod")).is_file()
    assert (ROOT / deploy).is_file()
    check_options(command, options, help_of(sys.executable, "-m", "pyinfra"))


@pytest.mark.parametrize(
    "command", [c for c in commands() if without_variables(c)[0].endswith("python")]
)
def test_python_commands_name_modules_and_options_that_exist(command: str) -> None:
    _, _, module, *arguments = without_variables(command)
    assert importlib.util.find_spec(module), f"{command}: no module {module}"
    for argument in arguments:
        if argument.startswith("inventories/"):
            assert (ROOT / argument).is_file(), command
    if module in ("lab", "bench", "pytest", "callready.trust") or module.startswith(
        "callready.probes."
    ):
        # Up to --help the arguments are parsed, and a wrong one is an error.
        check_options(command, arguments, help_of(sys.executable, "-m", module, *arguments))
    else:
        assert not [word for word in arguments if word.startswith("-")], command


def test_the_shipped_inventory_is_refused_as_the_guide_says() -> None:
    done = run(sys.executable, "-m", "callready.docs", "inventories/prod")
    if "example.com" not in (ROOT / "inventories/prod").read_text():
        pytest.skip("inventories/prod is somebody's own")
    assert done.returncode == 1
    assert "edit inventories/prod and inventories/group_data/prod.py" in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_shown_are_settings(page: Path) -> None:
    """What is wrong with an example may only be what it leaves out."""
    for body in blocks(page, "python"):
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(body).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        assert values, f"{page.name}: {body}"
        groups = {"livekit", "turn", "app", "android"}
        if any(isinstance(values.get(name), list) for name in groups):
            hosts = [host for name in groups & values.keys() for host in values[name]]
            wrong = [error for _, data in hosts for error in problems(data)]
        else:
            wrong = problems(values)
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
    ]
    rules = docs.edge_rules(plan)
    opened = {(r.protocol, r.destination_port) for r in rules if r.destination_port}
    assert opened == {("TCP", "22"), ("UDP", "50000-60000")}
    first, last = rules[0], rules[-1]
    assert (first.action, first.protocol, first.state) == ("Accept", "TCP", "established")
    assert (last.action, last.protocol, last.destination_port) == ("Deny", "IPv4", "")
    assert {r.source_port for r in rules if r.protocol == "UDP" and r.source_port} == {"53", "123"}
    assert all(
        r.destination_port or r.source_port or r.state or r.protocol == "ICMP" for r in rules[:-1]
    ), "a rule without any condition lets everything in"


@pytest.mark.parametrize(
    ("env", "example"), [("prod", docs.example()), ("single", {"one.example.com": docs.one_host()})]
)
def test_the_port_tables_are_of_the_shipped_inventories(
    env: str, example: dict[str, HostSettings]
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
    for host in (*docs.example().values(), docs.one_host()):
        assert "it takes 20" not in docs.edge_table(host)
        rows = [line for line in docs.edge_table(host).splitlines() if "Accept" in line]
        assert len(rows) < 20


def test_every_fault_that_is_made_is_in_the_table() -> None:
    made = (ROOT / "tests/faults/test_faults.py").read_text()
    table = (ROOT / "docs/faults.md").read_text()
    for name in re.findall(r'^@fault\("(.+?)"', made, re.MULTILINE):
        assert f"test_fault[{name}]" in table, "run `make faults`"


def test_the_picture_is_a_table_that_needs_nothing_from_outside() -> None:
    drawn = ElementTree.parse(ROOT / "docs/demo.svg").getroot()
    words = [element.text for element in drawn.iter() if (element.text or "").strip()]
    assert words[:4] == ["HOST", "CHECK", "RESULT", "FIGURE"]
    assert "FAILED" not in words
    assert {element.tag.rpartition("}")[2] for element in drawn.iter()} == {"svg", "rect", "text"}
