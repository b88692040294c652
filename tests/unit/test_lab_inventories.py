"""The lab's inventories are right as they are, and the Makefile and the lab's plan go with them."""

import re
import shutil
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from cryptography.x509 import DNSName

from callready.secrets.loading import validate
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data
from lab import plan
from tests.support.inventories import Authority

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
NAMES = ("lab", "lab-watching", "lab-recording", "cluster")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a lab has that is up: certificates for all names."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    chain, key = authority.issue(DNSName(f"*.{plan.DOMAIN}"))
    folder = tmp_path_factory.mktemp("state")
    (folder / "certs").mkdir()
    shutil.copy(authority.file, folder / "ca.pem")
    for host in plan.HOSTS.values():
        for name in (host.fqdn, plan.SERVICE):
            shutil.copy(chain, folder / f"certs/{name}.pem")
            shutil.copy(key, folder / f"certs/{name}.key")
    return folder


@pytest.fixture(params=NAMES)
def inventory(
    request: pytest.FixtureRequest, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Fleet]:
    """Its name, and its settings with that state."""
    name = request.param
    shutil.copytree(ROOT / "inventories", tmp_path / "inventories")
    monkeypatch.chdir(tmp_path)
    texts = [tmp_path / f"inventories/group_data/{each}.py" for each in {"lab", name}]
    for path in texts:
        path.write_text(path.read_text().replace(str(plan.STATE), str(state)))
    secrets = re.findall(r'"secret:([^"]+)"', "".join(path.read_text() for path in texts))
    store = tmp_path / f"inventories/{name}.secrets.yaml"
    store.write_text(yaml.safe_dump({each: f"unit-{each}-{'0' * 32}" for each in secrets}))
    store.chmod(0o600)
    source = f"inventories/{name}"
    return name, validate(source, inventory_data(source))


def test_it_is_valid_and_the_lab_has_its_hosts(inventory: tuple[str, Fleet]) -> None:
    name, fleet = inventory
    hosts = {each for each in fleet.hosts if each != "@local"}
    for each in hosts:
        planned, found = plan.find_host(each), fleet[each]
        assert (found.address, found.address6) == (planned.ipv4, planned.ipv6)
    target = "demo" if name == "lab" else f"demo-{name.removeprefix('lab-')}"
    up = re.search(rf"^{target}: lab-install\n.*lab up (.*)", MAKEFILE, re.MULTILINE)
    names = up[1].split() if up else plan.DEFAULT_HOSTS
    assert {plan.find_host(each).fqdn for each in names} == hosts
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    assert re.search(rf"^CALLER = .*filter[a-z -]* {name}[ ,]", MAKEFILE, re.MULTILINE)


def test_its_service_leads_to_every_sfu(inventory: tuple[str, Fleet]) -> None:
    addresses = defaultdict(set)
    for address, *names in map(str.split, plan.hosts_lines().splitlines()):
        for each in names:
            addresses[each].add(address)
    sfus = inventory[1].group("livekit").values()
    urls = {host.sfu.url for host in sfus if host.sfu}
    assert len(urls) == 1
    assert addresses[str(urlsplit(urls.pop()).hostname)] == {
        each for host in sfus for each in (host.address, host.address6)
    }
