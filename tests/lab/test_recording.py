"""Hosts that record, on Debian 13 beside the SFU and Redis and on Debian 12 alone, from bare.

The image is the stand-in's (lab/egress). It proves how the image is pulled, what its container may
do and reach, and how it is started, stopped and removed. It does not prove what upstream's program
does with Chrome.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from pydantic import SecretStr

from callready.probes import ProbeError, media
from callready.probes import recording as probe
from callready.settings.egress import FOLDER, USER
from callready.settings.ports import EGRESS as UNIT
from lab import Lab, plan, recorder, tools
from lab.run import locked
from tests.support.fleet import Fleet, Host, delivered, eventually, inventory, verify

BOX, ALONE = Host("h24"), Host("h25")
BOTH = (BOX, ALONE)
CHECKS = ("test_listening", "test_firewall", "test_exposure", "test_state")
CONTAINER = "callready-egress"
# Of other programs on each host: what a page in Chrome might ask.
LOOPBACK, EPHEMERAL, METADATA, PRIVATE = 9999, 40999, "169.254.169.254", "10.1.2.3"


def recorded_inventory() -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Groups, group data and names of the secrets of a fleet that records."""
    _, data, _ = inventory()
    at = {host: {"address": host.ipv4, "address6": host.ipv6} for host in BOTH}
    groups = {
        "livekit": [(BOX.fqdn, {**at[BOX], "pools": ["calls"]})],
        "turn": [BOX.fqdn],
        "redis": [BOX.fqdn],
        "egress": [BOX.fqdn, (ALONE.fqdn, at[ALONE])],
    }
    del data["app"]
    data["turn"] = {"min_port": 60001, "pools": {"calls": data["turn"]["pools"]["calls"]}}
    data["livekit"]["url"] = f"ws://{BOX.fqdn}:7880"
    data["livekit"]["keys"]["APIrecord"] = "secret:egress/livekit"
    data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"]}
    data["fleet_ca"] = "secret:fleet/ca"
    # A deploy waits for a recording.
    data["deploy"] = {"confirm_timeout": 60}
    data["redis"] = {
        "livekit_password": "secret:redis/livekit",
        "egress_password": "secret:redis/egress",
    }
    data["egress"] = {
        "image": recorder.NAME,
        "registry_ca": str(plan.STATE / "ca.pem"),
        "livekit_key": "APIrecord",
    }
    more = ["egress/livekit", "fleet/ca", "redis/livekit", "redis/egress"]
    return groups, data, ["livekit/api_secret", "turn/calls", *more]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Both hosts after their first deploy."""
    with delivered(*(host.name for host in BOTH)):
        groups, data, secrets = recorded_inventory()
        with locked():
            data["egress"]["digest"] = recorder.publish()
        fleet = Fleet(tmp_path_factory.mktemp("recorded"), groups, data, secrets)
        fleet.deploy()
        yield fleet


def is_up(host: Host) -> bool:
    """Whether egress has joined Redis and takes recordings."""
    ask = "curl -s 127.0.0.1:7982/metrics | grep '^livekit_egress_available'"
    return host.root(ask, check=False).endswith(" 1")


def reaches(host: Host, address: str, port: int, user: int = USER) -> bool:
    """Whether a user of a host is let through to a TCP port."""
    connect = f"IO::Socket::IP->new(PeerHost => q({address}), PeerPort => {port}, Timeout => 3)"
    run = f"setpriv --reuid {user} --regid {user} --clear-groups perl -MIO::Socket::IP"
    return host.root(f"{run} -e '{connect} or exit 1' && echo yes", check=False) == "yes"


def reached_inside(host: Host, port: int) -> bool:
    """Whether a program in egress' container reaches one beside it, on loopback."""
    inside = f"podman exec --user 1001:0 --env HOME=/home/egress {CONTAINER} perl -MIO::Socket::IP"
    own = f"LocalHost => q(127.0.0.1), LocalPort => {port}, Listen => 1, ReuseAddr => 1"
    other = f"PeerHost => q(127.0.0.1), PeerPort => {port}, Timeout => 3"
    script = f"my $s = IO::Socket::IP->new({own}) or die; IO::Socket::IP->new({other}) or exit 1"
    return host.root(f"{inside} -e '{script}' && echo yes", check=False) == "yes"


@pytest.mark.parametrize("host", BOTH, ids=lambda host: host.name)
def test_the_image_runs_as_nobody_of_this_host(recorded: Fleet, host: Host) -> None:
    eventually(partial(is_up, host))
    pid = host.root(f"podman inspect --format '{{{{.State.Pid}}}}' {CONTAINER}")
    status = host.root(f"cat /proc/{pid}/status")
    assert re.search(rf"Uid:\t{USER}\t{USER}\t{USER}\t{USER}\nGid:\t200000\t", status)
    assert re.search(r"CapEff:\t0+\n", status) and "NoNewPrivs:\t1\nSeccomp:\t2\n" in status
    assert f"/system.slice/{UNIT}/" in host.root(f"cat /proc/{pid}/cgroup")
    exposure = host.root(f"systemd-analyze security {UNIT} --no-pager | tail -n 1")
    assert "4.5" in exposure
    # Nothing of podman's own runs or starts, and it has made no table and no network.
    assert host.root("systemctl list-units --plain --no-legend 'podman*' 'netavark*'") == ""
    tables = host.root("nft list tables").splitlines()
    assert sorted(tables) == ["table inet callready", "table inet callready_egress"]
    files = host.root("find /run/egress /var/lib/egress -maxdepth 1 -printf '%m %u %p\\n' | sort")
    assert files.splitlines() == [
        "400 201001 /run/egress/egress.yaml",
        "700 root /var/lib/egress",
        "711 root /run/egress",
        *(f"750 201001 /var/lib/egress/{name}" for name in ("backup", "recordings", "tmp")),
    ]


@pytest.mark.parametrize("host", BOTH, ids=lambda host: host.name)
def test_what_is_recorded_reaches_no_service_of_the_host_and_no_private_one(
    recorded: Fleet, host: Host
) -> None:
    """As Chrome would from a page: as egress' user, on the host's network."""
    other = ALONE if host == BOX else BOX
    (device,) = host.root("ip -4 -o route get 198.51.100.1 | cut -d ' ' -f 3").splitlines()
    with ExitStack() as stack:
        for port in (LOOPBACK, EPHEMERAL):
            stack.enter_context(host.listening("tcp", port))
        for where, what in (
            (host, f"address add {METADATA}/32 dev lo"),
            (host, f"route add {PRIVATE} dev {device}"),
            (other, f"address add {PRIVATE}/32 dev {device}"),
        ):
            where.root(f"ip {what}")
            stack.callback(where.root, f"ip {what.replace(' add ', ' del ', 1)}")
        closed = [
            *(("127.0.0.1", LOOPBACK), ("::1", LOOPBACK), ("127.0.0.1", EPHEMERAL)),
            *((METADATA, 22), (PRIVATE, 22), (host.ipv4, LOOPBACK), (host.ipv4, 22)),
            *(("127.0.0.1", 7981), (plan.MACHINE.ipv4, plan.WWW_PORT)),
        ]
        assert [each for each in closed if not reaches(host, *each, user=0)] == []
        assert [each for each in closed if reaches(host, *each)] == []
    needed = [(BOX.ipv4, 6379), (BOX.ipv4, 7880), (BOX.ipv6, 7880), (BOX.ipv4, 7881)]
    needed += [("127.0.0.53", 53), ("127.0.0.1", 7980)]
    assert [each for each in needed if not reaches(host, *each)] == []
    # Chrome's control port: any ephemeral one, where egress' own container listens.
    assert reached_inside(host, EPHEMERAL)
    assert not reached_inside(host, LOOPBACK)
    assert not reaches(other, host.ipv4, 7982, user=0), "its metrics are open to other hosts"


def test_a_second_deploy_changes_nothing_and_the_hosts_are_as_they_should_be(
    recorded: Fleet, tmp_path: Any
) -> None:
    again = recorded.deploy()
    assert again.changed == [] and again.results["hosts"] == 2
    found = verify(tmp_path, *CHECKS, inventory=recorded.inventory)
    assert not {name: text for name, text in found.items() if text}


def figures(folder: Path, recorded: Fleet, *checks: str) -> dict[str, str]:
    """What these checks have measured, all of which must pass."""
    found = verify(folder, *checks, inventory=recorded.inventory)
    assert not {name: text for name, text in found.items() if text}
    return {
        case.attrib["name"]: each.attrib["value"]
        for case in ElementTree.parse(folder / "verify.xml").iter("testcase")
        for each in case.iter("property")
    }


def test_calls_are_recorded(recorded: Fleet, tmp_path: Path) -> None:
    """And each host knows which recordings are its own: no other answers for it."""
    recorded.deploy()
    measured = figures(tmp_path, recorded, "test_recording")
    heard = {name for name, figure in measured.items() if "440 Hz" in figure}
    for kind in ("audio_room_composite", "track", "participant"):
        assert any(kind in name for name in heard), measured
    assert "440 Hz 100%, 1000 Hz 100%" in " ".join(measured.values())
    (refused,) = (figure for name, figure in measured.items() if "test_refused" in name)
    assert "503" in refused
    for host in BOTH:
        left = host.root("cd /var/lib/egress && find recordings backup -name 'callready-*'")
        assert left == ""


@pytest.fixture
def call(recorded: Fleet) -> Iterator[tuple[probe.Api, probe.Room]]:
    """A call to record, and LiveKit's API."""
    for host in BOTH:
        eventually(partial(is_up, host))
    url, secret = recorded.data["livekit"]["url"], SecretStr(recorded.secrets["livekit/api_secret"])
    with probe.talking(url, "APIfleet", secret) as room:
        yield probe.Api(url, "APIfleet", secret), room
    for host in BOTH:
        probe.Host(host.name, host.root).remove("", room.name)


def test_a_restart_of_redis_is_not_heard_in_a_recording(
    call: tuple[probe.Api, probe.Room],
) -> None:
    api, room = call

    def restart(_: str) -> None:
        BOX.root("systemctl kill -s KILL callready-redis; systemctl restart callready-redis")

    done = probe.record(api, room, "audio_room_composite", 6, restart)
    there = f"ls {FOLDER}/recordings/{done.file}"
    (host,) = (each for each in BOTH if each.root(there, check=False))
    content = probe.Host(host.name, host.root).read(done.file)
    print(media.judge(content, 5, probe.TONES))


def test_what_its_target_does_not_take_is_kept_and_told(
    call: tuple[probe.Api, probe.Room],
) -> None:
    """As a deploy and the verification say it, and where a monitor hears of it."""
    for host in BOTH:
        host.root(f"chmod a-w {FOLDER}/recordings")
    try:
        with pytest.raises(ProbeError, match="recordings do not get to where they go, but to the"):
            probe.record(*call, "audio_room_composite", 2)
        know = "grep -h '^callready_egress_backup ' /run/callready/egress.prom"
        eventually(lambda: sorted(each.root(know)[-1] for each in BOTH) == ["0", "1"])
    finally:
        for host in BOTH:
            host.root(f"chmod u+w {FOLDER}/recordings")


@pytest.fixture
def bucket(recorded: Fleet) -> Iterator[dict[str, Any]]:
    """An empty bucket of S3, as settings; gofakes3 looks at no credentials."""
    program = tools.install("gofakes3") / "gofakes3"
    with socket.create_server((plan.MACHINE.ipv4, 0)) as unused:
        at = f"{plan.MACHINE.ipv4}:{unused.getsockname()[1]}"
    serve = [str(program), "-backend=memory", "-initialbucket=recordings", f"-host={at}"]
    process = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    recorded.secrets["egress/s3"] = f"{recorded.marker}-s3"
    try:
        yield {
            "bucket": "recordings",
            "access_key": "AKLAB",
            "secret": "secret:egress/s3",
            "endpoint": f"http://{at}",
            "force_path_style": True,
        }
    finally:
        process.terminate()
        process.wait()
        recorded.restore()
        recorded.deploy()


def test_recordings_go_to_a_bucket(recorded: Fleet, bucket: dict[str, Any], tmp_path: Path) -> None:
    recorded.data["egress"]["storage"] = {"prefix": "calls", "s3": bucket}
    recorded.deploy()
    measured = figures(tmp_path, recorded, "test_recorded and track")
    assert any("440 Hz" in figure for figure in measured.values()), measured
    # All that was tried has been taken away again.
    listed = httpx.get(f"{bucket['endpoint']}/recordings")
    assert listed.status_code == 200 and "callready-" not in listed.text

    recorded.data["egress"]["storage"]["s3"] = {**bucket, "bucket": "of-nobody"}
    was = {host: host.root("readlink /etc/callready/confirmed") for host in BOTH}
    run = recorded.run()
    assert run.status == 1
    assert "recordings do not get to where they go, but to the host's own disk" in run.text
    for host in BOTH:
        now = host.root("readlink /etc/callready/confirmed /etc/callready/current").splitlines()
        assert now == [was[host]] * 2
        eventually(partial(is_up, host))


def test_without_the_registry_a_deploy_is_refused_and_changes_nothing(recorded: Fleet) -> None:
    was = {host: host.snapshot() for host in BOTH}
    away = {"image": f"{plan.MACHINE.fqdn}:5999/livekit/egress", "digest": f"sha256:{'0' * 64}"}
    recorded.data["egress"] |= away
    run = recorded.run()
    recorded.restore()
    assert run.status == 1
    assert f"cannot pull {away['image']}@{away['digest']}:" in run.text
    assert "egress.image says where it comes from" in run.text
    for host in BOTH:
        same = [line for line in was[host] if "var/lib/callready" not in line]
        now = [line for line in host.snapshot() if "var/lib/callready" not in line]
        assert now == same and is_up(host)


def test_after_a_reboot_recordings_start_again(recorded: Fleet) -> None:
    """podman looks for idmapped layers once a boot, and remembers what it found."""
    for host in BOTH:
        Lab().reboot(host.name)
    for host in BOTH:
        eventually(partial(is_up, host))
        assert host.root(f"systemctl show -p NRestarts --value {UNIT}") == "0"
    assert recorded.deploy().changed == []


def is_gone(host: Host, name: str) -> bool:
    """Whether a recording is there no more."""
    return not host.root(f"ls {FOLDER}/recordings/{name} 2>&-", check=False)


def test_only_old_recordings_are_removed_and_only_if_that_is_set(recorded: Fleet) -> None:
    """Of what lies in the folder, what egress wrote there; through no link."""
    others = "foreign.ogg link.ogg linked ../backup/old.ogg"
    make = f"""
        cd {FOLDER}/recordings && install -d -o {USER} call
        touch call/old.ogg call/young.ogg foreign.ogg ../backup/old.ogg
        ln -s ../backup/old.ogg link.ogg && ln -s ../backup linked
        chown -h {USER} call/* link.ogg linked ../backup/old.ogg
        touch -h -d '31 days ago' call/old.ogg {others}"""
    look = f"cd {FOLDER}/recordings && find . ../backup ! -type d | sort"
    known, unit = "/run/callready/egress.prom", "callready-egress-space"
    again = f"systemctl stop {unit}; rm {known}; systemctl start {unit}"
    there = {}
    for host in BOTH:
        host.root(f"{make}; {again}; timeout 60 sh -c 'until [ -e {known} ]; do sleep 0.1; done'")
        there[host] = host.root(look).splitlines()
        assert "./call/old.ogg" in there[host]
    recorded.data["egress"]["retention_days"] = 30
    recorded.deploy()
    for host in BOTH:
        eventually(partial(is_gone, host, "call/old.ogg"))
        assert host.root(look).splitlines() == [e for e in there[host] if e != "./call/old.ogg"]
        said = host.root(f"journalctl -u {unit} -o cat --no-pager")
        assert f"1 files in {FOLDER}/recordings were older than 30 days" in said
        host.root(f"cd {FOLDER}/recordings && rm -r call {others}")


def test_removal_leaves_recordings_and_nothing_else(recorded: Fleet) -> None:
    for host in BOTH:
        host.root(f"install -o {USER} /dev/null /var/lib/egress/recordings/call.mp4")
    run = recorded.run(file="remove.py")
    assert run.status == 0, run.text
    for host in BOTH:
        ours = "/etc/egress /etc/callready /etc/containers"
        left = host.root(f"find /var/lib/egress -name call.mp4; ls -d {ours}", check=False)
        assert left == "/var/lib/egress/recordings/call.mp4"
        assert host.root("cat /etc/subuid /etc/subgid | grep egress", check=False) == ""
        assert host.root("ls /var/lib/containers", check=False) == ""
        assert host.root("command -v podman", check=False) == ""
