"""A host as an earlier callready left it, made by what that one sent (tests/data/releases): a
deploy on top of it, the way back on it, and its releases that nobody confirms."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lab import Lab
from tests.support.fleet import Fleet, Host, Run, delivered, eventually, idle, probe
from tests.support.recorded import FORMATS, RELEASES, Bundle, Release

HOST = Host("h16")
UNITS = {"callready-firewall.service", "backend.service"}

# What a deploy that has nothing to change may not touch: processes, even by a reload (but for the
# edge's), credentials, certificates, the application's environment.
UNTOUCHED = """
for unit in %s; do
    systemctl show -p Id,MainPID,NRestarts,ExecMainStartTimestampMonotonic $unit
    [ $unit != haproxy.service ] || continue  # reloaded: its configuration is another since 0.2.0
    systemctl show -p StateChangeTimestampMonotonic $unit
    pid=$(systemctl show -p MainPID --value $unit)
    [ $pid = 0 ] || echo "children: $(cat /proc/$pid/task/$pid/children)"
done
for database in %s; do echo $database; sqlite3 $database .dump; done
find /etc/callready/tls /srv/app /run/callready/* ! -name haproxy.service \
    -printf '%%p %%i %%T@ %%l\\n' | sort
cat /srv/app/.env /run/app-log
"""
# The application's command on a changed environment: while the host has one release, callers are
# refused all but SSH.
BREAKS = """cat > /srv/app/changed <<'END'
#!/bin/sh
nft delete table inet broken 2>&-
[ "$(readlink /etc/callready/current)" != releases/%s ] || nft -f - <<'RULES'
table inet broken {
    chain input {
        type filter hook input priority -50
        iif lo accept
        tcp dport 22 accept
        meta l4proto tcp reject with tcp reset
        meta l4proto udp reject
    }
}
RULES
END
"""


class Site:
    """The host with releases A and B of one format, A deployed by the callready that made them."""

    def __init__(self, format: Path, folder: Path) -> None:
        self.a, self.b = Release(format / "a"), Release(format / "b")
        self.command = (format / "command").read_text()
        self.folder = folder
        self.paths = self.a.names("file", "link", "environment")
        self.paths |= self.b.names("file", "link", "environment")
        self.units = self.a.names("unit") | self.b.names("unit") | UNITS
        HOST.root((RELEASES / "host.sh").read_text())
        self.replay(self.a)
        self.good = {self.a: self.found()}

    def send(self, bundle: Bundle) -> subprocess.CompletedProcess[str]:
        """Run a bundle as the old controller did."""
        # systemd starts a unit five times in 10 s at most (StartLimitBurst); days lie between
        # deploys, here it is seconds.
        HOST.root(f"systemctl reset-failed {' '.join(UNITS)}", check=False)
        return Lab().ssh(HOST.name, self.command, input=base64.encodebytes(bundle.content).decode())

    def replay(self, release: Release) -> None:
        """Deploy a release as the old controller did."""
        for bundle in release.bundles:
            done = self.send(bundle)
            assert done.returncode == 0, done.stdout + done.stderr

    def fleet(self, release: Release) -> Fleet:
        """The operator of today with the inventory of a release."""
        # Nothing here waits for this timer, and a busy machine may need long.
        data = release.data | {"deploy": {"confirm_timeout": 60}}
        # The defaults of then, when callers were told of every address.
        data["turn"] = data["turn"] | {"user_quota": 12, "total_quota": 1200}
        data["livekit"]["rtc"]["ips"] = None
        fleet = Fleet(self.folder, release.groups, data, [])
        fleet.secrets, fleet.marker = release.secrets, "recorded-"
        return fleet

    def found(self) -> list[str]:
        """The release as it is on the host."""
        return HOST.release(self.paths, self.units)

    def reach(self, release: Release) -> None:
        """Have the host at a recorded release, confirmed."""
        while current() not in {self.a.id, release.id}:
            assert rollback(self.fleet(self.a)).status == 0
        if current() != release.id:
            self.replay(release)
            self.good[release] = self.found()

    def is_at(self, release: Release) -> None:
        """Assert that the host, when it has come to rest, is wholly at a recorded release."""
        eventually(partial(idle, HOST))
        assert self.found() == self.good[release]
        assert call(release)["ok"]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda path: path.name)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with delivered(HOST.name):
        yield Site(request.param, tmp_path_factory.mktemp("operator"))


def current() -> str:
    """The release that the host has; one that was staged twice has a number after its name."""
    return HOST.root("readlink /etc/callready/current").removeprefix("releases/").partition("-")[0]


def rollback(fleet: Fleet) -> Run:
    """Return to the release before the last, as an operator does."""
    return fleet.run(file="rollback.py")


def call(release: Release) -> dict[str, object]:
    """A call through the edge, relayed."""
    return probe(
        "webrtc",
        release.data["livekit"]["url"],
        "--relay-only",
        "--ca-file",
        release.data["tls"]["ca"],
        secret=release.secrets["livekit/api_secret"],
        LIVEKIT_API_KEY="APIrecorded",
    )


def test_old_release_that_was_cut_reverts(site: Site) -> None:
    """After every kind of step on the way from A to B, the last one of several alike."""
    site.reach(site.a)
    steps = site.b.switch.steps
    names = [step.split()[0] for step in steps]
    for name, number in {name: number for number, name in enumerate(names, 1)}.items():
        done = site.send(site.b.switch.killed_after(number))
        assert done.returncode != 0 and done.stdout.endswith("killed\n"), (name, done)
        pending = HOST.root("cat /var/lib/callready/pending", check=False)
        assert pending.startswith(site.b.id) == ("arm" in names[:number]), name
        if pending:  # what the timer starts, without waiting for it
            HOST.root("systemctl is-active callready-dead-man.timer")
            HOST.root("systemctl start callready-revert.service")
        eventually(partial(idle, HOST))
        assert site.found() == site.good[site.a], name


def test_old_release_that_nobody_confirms_reverts_by_itself(site: Site) -> None:
    site.reach(site.a)
    assert site.send(site.b.switch).returncode == 0
    assert current() == site.b.id
    run = site.fleet(site.a).run()
    assert run.status == 1
    assert "nothing was changed" in run.text and f"(release {site.b.id}" in run.text
    site.is_at(site.a)


def test_deploy_on_top_of_an_old_release_disturbs_nothing(site: Site) -> None:
    site.reach(site.a)
    # Of A alone: what only an unconfirmed B needed goes with the next confirmation.
    # The packet filter is another one since 0.2.0, which is loaded in one step.
    units = site.units - {"callready-firewall.service"}
    untouched = UNTOUCHED % (" ".join(units), " ".join(sorted(site.a.names("database"))))
    before, fleet = HOST.root(untouched).splitlines(), site.fleet(site.a)
    run = fleet.deploy()
    assert HOST.root(untouched).splitlines() == before
    switched = current() != site.a.id
    assert bool(run.plan(HOST.name)) == bool(run.changed) == switched
    assert fleet.deploy().changed == []


def test_rollback_to_an_old_release_that_serves_nobody_is_not_confirmed(site: Site) -> None:
    """Everything that release A promised callers is asked for, and is not there."""
    site.reach(site.b)
    command = HOST.root("cat /srv/app/changed")
    HOST.root(BREAKS % site.a.id)
    try:
        run = rollback(site.fleet(site.b))
    finally:
        HOST.root(f"cat > /srv/app/changed <<'END'\n{command}\nEND\n")
    assert run.status == 1, run.text
    # What has left the inventory since, too: without its credentials.
    for promise in site.a.names("promise"):
        what = re.sub(r" (tcp|udp)/\d+( \S+)?$", "", promise)
        where = [f" on {HOST.fqdn} (IPv{family}):" for family in (4, 6)]
        for of in where if what != promise else [":"]:
            assert f"[{HOST.fqdn}] {what}{of}" in run.text, run.text
    site.is_at(site.b)


def test_rollback_to_an_old_release(site: Site) -> None:
    site.reach(site.b)
    run = rollback(site.fleet(site.b))
    assert run.status == 0, run.text
    assert f"confirmed release {site.a.id}" in run.text
    site.is_at(site.a)
