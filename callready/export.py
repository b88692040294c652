"""For a Prometheus and a Grafana of your own: python -m callready.export inventories/ENV [FOLDER]

Writes what they need to see the fleet as its monitor does: whom to scrape and with which
certificate, the alerts, and a dashboard.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from callready.release.authority import Authority, Identity
from callready.release.render import render
from callready.secrets.loading import load_fleet
from callready.secrets.store import replace_file
from callready.settings.fleet import Fleet
from callready.settings.problem import SettingsError
from callready.settings.uris import app_names, clusters, signalling_names, spared_pools

CA, CERTIFICATE = "fleet-ca.pem", "fleet"


def exported(fleet: Fleet) -> dict[str, bytes]:
    """Every file by its name; raises SettingsError where nothing is measured."""
    monitor = next((host for host in fleet.group("monitor").values() if host.watches), None)
    if not monitor or not monitor.fleet_ca:
        why = (
            "no host in group monitor, so nothing is measured: docs/watching.md says how to add it"
        )
        raise SettingsError(f"{fleet.source}: {why}")
    authorities = [Authority(secret) for secret in monitor.fleet_ca]
    certificate, key = authorities[0].issue(Identity("monitor", (), ("client",)))
    context = {"monitor": monitor.monitor, "hosts": fleet.watched, "this": "", "internal": None}
    jobs = yaml.safe_load(render("scrape.yml.j2", **context, ca=CA, fleet=CERTIFICATE))
    files = {
        CA: b"".join(each.certificate for each in authorities),
        f"{CERTIFICATE}.cert": certificate,
        f"{CERTIFICATE}.key": key,
        "alerts.yml": render(
            "alerts.yml.j2",
            livekit_names=signalling_names(fleet),
            app_names=app_names(fleet),
            clusters=clusters(fleet),
            pools=spared_pools(fleet),
            groups=fleet.groups,
        ),
        "dashboard.json": dashboard(fleet.groups, clusters(fleet)),
    }
    for job in jobs["scrape_configs"]:
        targets = f"targets/{job['job_name']}.json"
        files[targets] = _json(job.pop("static_configs") or [])
        job["file_sd_configs"] = [{"files": [targets]}]
    files["scrape.yml"] = yaml.safe_dump(jobs, sort_keys=False).encode()
    return files


def dashboard(groups: Iterable[str], clusters: Iterable[str] = ()) -> bytes:
    """Grafana's dashboard of a fleet that has these groups and clusters."""
    return _json(json.loads(render("dashboard.json.j2", groups=groups, clusters=[*clusters])))


def expressions(shown: bytes) -> Iterator[tuple[str, str]]:
    """Title and expression of everything that a dashboard asks Prometheus, over all hosts."""
    board = json.loads(shown)
    asked = [
        (panel["title"], each) for panel in board["panels"] for each in panel.get("targets", ())
    ]
    asked += [(each["name"], each) for each in board["annotations"]["list"]]
    for title, each in asked:
        expression = each["expr"].replace("$__rate_interval", "5m").replace("$host", ".*")
        # A mark is there for a minute; without that condition always.
        yield title, expression.partition(" unless ")[0]


def without_data(shown: bytes, ask: Callable[[str], Any]) -> list[str]:
    """Those of a dashboard's titles and expressions of which Prometheus has no data.

    Args:
        shown: the dashboard.
        ask: what finds the result of an expression; an empty one is no data.
    """
    return [f"{title}: {each}" for title, each in expressions(shown) if not ask(each)]


def _json(value: Any) -> bytes:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()


def main(arguments: list[str]) -> int:
    """The `make export` command."""
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print("usage: python -m callready.export inventories/ENV [FOLDER]", file=sys.stderr)
        return 2
    inventory, *where = arguments
    folder = Path(*where or ("export", Path(inventory).name))
    try:
        files = exported(load_fleet(inventory))
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content, 0o600 if name.endswith(".key") else 0o644)
            print(f"wrote {path}")
    except (SettingsError, OSError) as error:
        print(f"callready: {error}", file=sys.stderr)
        return 1
    print("docs/watching.md says where each belongs; the certificate is good for a year")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
