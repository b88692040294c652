"""Recordings through deploys, stops, full disks and what kills them, on Debian 12 and 13 each:
Redis, an SFU and the stand-in for egress (lab/egress) on one host, in the container, unit and
folders of production. The stand-in proves nothing of Chrome, GStreamer, or how long uploads take.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from livekit import api
from pydantic import SecretStr

from callready.probes import media
from callready.probes import recording as probe
from callready.settings.egress import FOLDER
from lab import Lab, recorder
from tests.sabotage.catalogue import CATALOGUE
from tests.sabotage.judging import tried
from tests.sabotage.sabotage import RECORDING, Service
from tests.support import fleet as support
from tests.support.continuity import calls_of
from tests.support.fleet import Host, delivered, entry, idle, pair_inventory
from tests.support.recordings import Recorder, egress

pytestmark = pytest.mark.long

# In the container, which has ffmpeg: how long a recording is, and whether all of it can be decoded.
PLAY = (
    "podman exec --user 1001:0 --env HOME=/home/egress callready-egress sh -c '"
    "ffmpeg -v error -xerror -i /out/{0} -f null - && "
    "ffprobe -v error -show_entries format=duration -of csv=p=0 /out/{0}'"
)
# A unit that serves again: its rounds of ten seconds, a drain, a container's start.
eventually = partial(support.eventually, seconds=180)


class Recording(Recorder):
    """With what is on the host."""

    def record(self, name: str) -> str:
        """Record what is said in the last call, and wait until it is; the recording's id."""
        output = api.EncodedFileOutput(file_type=api.EncodedFileType.OGG, filepath=name)
        wanted = api.RoomCompositeEgressRequest(
            room_name=self.room(), audio_only=True, file_outputs=[output]
        )
        started = self.ask(lambda s: s.egress.start_room_composite_egress(wanted)).egress_id
        eventually(lambda: self.state(started) == "EGRESS_ACTIVE")
        time.sleep(3)  # of what is recorded
        return started

    def seconds(self, name: str) -> float:
        """How long a recording is; all of it must be decodable."""
        return float(self.host.root(PLAY.format(name)))

    def metrics(self) -> dict[str, float]:
        """Of egress on this host, by its own metrics and by ours."""
        lines = self.host.root(
            "curl -s 127.0.0.1:7982 | grep ^livekit_egress_; cat /run/callready/egress.prom",
            check=False,
        ).splitlines()
        plain = (line.rpartition(" ") for line in lines if line and line[0] != "#")
        return {name.partition("{")[0]: float(value) for name, _, value in plain}

    @property
    def serves(self) -> bool:
        """Whether it takes new recordings."""
        found = self.metrics()
        return found.get("livekit_egress_is_terminating") == 0

    def kill(self, kind: str) -> None:
        """SIGKILL processes of its container, by their kind in common.sh."""
        self.host.root(
            "sed '/^# What callready does/,$d' /usr/local/lib/callready/egress > /run/common; "
            f". /run/common; kill -9 $(pids_of {kind})"
        )


@pytest.fixture(scope="module", params=["h06", "h13"], ids=["Debian 13", "Debian 12"])
def deployed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recording]:
    """All on one host, deployed from bare."""
    host, digest = Host(request.param), recorder.publish()
    with delivered(host.name):
        _, data, _ = pair_inventory()
        data["livekit"]["url"] = f"ws://{host.fqdn}:7880"
        data["turn"]["pools"]["calls"] |= {"min_port": 61001, "max_port": 62000}
        data["deploy"] = {"confirm_timeout": 90}
        data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"]}
        data |= egress(digest, drain=600, min_free=0.1)
        entry = (host.fqdn, {"address": host.ipv4, "address6": host.ipv6, "pools": ["calls"]})
        fleet = Recording(
            host,
            tmp_path_factory.mktemp("recorder"),
            {group: [entry] for group in ("livekit", "turn", "redis", "egress")},
            data,
            ["livekit/api_secret", "turn/calls", "redis/livekit", "redis/egress"],
        )
        fleet.deploy()
        assert fleet.deploy().changed == []
        yield fleet
        fleet.restore()


@pytest.fixture
def recording(deployed: Recording) -> Iterator[Recording]:
    """It records what is said in a call, which is on."""
    eventually(lambda: idle(deployed.host))
    eventually(lambda: deployed.serves)
    url, secret = deployed.data["livekit"]["url"], deployed.secrets["livekit/api_secret"]
    with calls_of(url, "APIfleet", secret, {}):
        yield deployed
        # Whoever is recorded leaves only then: with them a recording ends.
    deployed.restore()


def drains(process: subprocess.Popen[str]) -> None:
    """Read what a deploy prints until it waits for a recording."""
    assert any("recordings that run: 1," in line for line in process.stderr or ()), "did not wait"


def change(fleet: Recording, drain: int = 600) -> subprocess.Popen[str]:
    """Start a deploy that changes egress."""
    levels = {"info": "warn", "warn": "info"}
    now = fleet.host.root("sed -n 's/^  level: //p' /etc/egress/egress.yaml")
    fleet.data["egress"] |= {"drain": drain, "logging": {"level": levels[now]}}
    fleet.unsettled = True
    return fleet.start()


def finished(process: subprocess.Popen[str]) -> str:
    """What a deploy that must succeed still says."""
    said = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, said
    return said


def test_a_deploy_waits_for_a_recording_and_takes_no_new_one(recording: Recording) -> None:
    plan = recording.record("waited.ogg")
    process = change(recording)
    drains(process)
    eventually(lambda: not recording.serves)
    recording.stop_recording(plan)
    finished(process)
    eventually(lambda: recording.state(plan) == "EGRESS_COMPLETE")
    eventually(lambda: recording.serves)
    assert recording.seconds("waited.ogg") > 3


def test_what_still_runs_after_that_is_ended_and_whole(recording: Recording) -> None:
    plan = recording.record("ended.ogg")
    said = finished(change(recording, drain=3))
    assert "1 recording runs now: egress takes no new ones, up to 3 s are waited" in said
    eventually(lambda: recording.state(plan) == "EGRESS_COMPLETE")
    assert recording.seconds("ended.ogg") > 3
    assert recording.host.root(f"ls {FOLDER}/orphans 2>&-", check=False) == ""


@pytest.mark.parametrize("times", [1, 2], ids=["one operator", "another one too"])
def test_ctrl_c_while_it_drains_leaves_an_egress_that_serves(
    recording: Recording, times: int
) -> None:
    plan = recording.record(f"interrupted{times}.ogg")
    for _ in range(times):
        process = change(recording)
        drains(process)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        recording.restore()
        eventually(lambda: idle(recording.host))
    # The recording is not cut off; when it ends, egress starts again.
    eventually(lambda: recording.metrics().get("callready_egress_draining") == 0)
    assert recording.state(plan) == "EGRESS_ACTIVE"
    recording.stop_recording(plan)
    eventually(lambda: recording.serves)
    assert recording.state(plan) == "EGRESS_COMPLETE"
    assert recording.seconds(f"interrupted{times}.ogg") > 3
    again = recording.record("again.ogg")
    recording.stop_recording(again)
    eventually(lambda: recording.state(again) == "EGRESS_COMPLETE")


@pytest.mark.parametrize("how", ["systemctl stop callready-egress", "reboot"])
def test_a_stop_ends_recordings_within_ten_seconds_with_whole_files(
    recording: Recording, how: str
) -> None:
    host, name = recording.host, f"{how.split()[0]}.ogg"
    recording.record(name)
    if how == "reboot":
        Lab().reboot(host.name)
    else:
        host.root(f"timeout 10 {how}; systemctl start callready-egress")
    eventually(lambda: recording.serves)
    assert recording.seconds(name) > 3
    assert host.root(f"find {FOLDER}/orphans -type f 2>&-", check=False) == ""


@contextmanager
def filled(host: Host, folder: str) -> Iterator[None]:
    """A small disk of its own for one of egress' folders, of which 60 MB are left."""
    path = f"{FOLDER}/{folder}"
    mode = host.root(f"stat -c 'mode=%a,uid=%u,gid=%g' {path}")
    host.root(
        f"systemctl stop callready-egress; cp -a {path} {path}.was; "
        f"mount -t tmpfs -o size=400m,{mode} tmpfs {path}; systemctl start callready-egress"
    )
    try:
        yield
    finally:
        host.root(
            f"systemctl stop callready-egress; rm -f {path}/filler; cp -a {path}/. {path}.was; "
            f"umount {path}; cp -a {path}.was/. {path}; rm -r {path}.was; "
            "systemctl reset-failed callready-egress; systemctl restart callready-egress-space; "
            "systemctl start callready-egress"
        )


FILL = "head -c 330M /dev/zero > {}/{}/filler"


def test_without_room_no_recording_starts_until_there_is_some(recording: Recording) -> None:
    host = recording.host
    with filled(host, "recordings"):
        eventually(lambda: recording.serves)
        plan = recording.record("room.ogg")
        host.root(FILL.format(FOLDER, "recordings"))
        eventually(lambda: recording.metrics().get("callready_egress_held") == 1)
        assert recording.state(plan) == "EGRESS_ACTIVE"  # it goes on
        recording.stop_recording(plan)
        eventually(lambda: recording.state(plan) == "EGRESS_COMPLETE")
        state = "systemctl is-active callready-egress"
        eventually(lambda: host.root(state, check=False) == "inactive")
        run = recording.deploy()
        assert "callready-egress.service takes no recordings until there is room" in run.text
        assert host.root(state, check=False) == "inactive"
        host.root(f"rm {FOLDER}/recordings/filler")
        eventually(lambda: recording.serves)
        assert recording.seconds("room.ogg") > 3
        again = recording.record("room-again.ogg")
        recording.stop_recording(again)
        eventually(lambda: recording.state(again) == "EGRESS_COMPLETE")


def test_a_recording_is_ended_while_its_file_still_fits(recording: Recording) -> None:
    with filled(recording.host, "tmp"):
        eventually(lambda: recording.serves)
        plan = recording.record("fits.ogg")
        recording.host.root(FILL.format(FOLDER, "tmp"))
        eventually(lambda: recording.state(plan) == "EGRESS_COMPLETE")
        assert "recordings are ended now, while there is room for their files" in (
            recording.host.root("journalctl -u callready-egress-space -o cat --no-pager")
        )
    eventually(lambda: recording.serves)
    assert recording.seconds("fits.ogg") > 3


def test_what_a_killed_recording_leaves_is_kept_and_told_of(recording: Recording) -> None:
    host = recording.host
    recording.record("killed.ogg")
    recording.kill("init")
    eventually(lambda: recording.serves)
    kept = host.root(f"find {FOLDER}/orphans -type f").splitlines()
    assert kept and host.root(f"stat -c %a {FOLDER}/orphans") == "700"
    said = host.root("journalctl -u callready-egress -o cat --no-pager")
    assert f"recordings were cut off: {len(kept)} files are kept in" in said
    eventually(lambda: recording.metrics().get("callready_egress_orphans") == len(kept))
    host.root(f"rm -r {FOLDER}/orphans")
    eventually(lambda: recording.metrics().get("callready_egress_orphans") == 0)


@pytest.mark.parametrize(
    "name", [name for name, each in CATALOGUE.items() if each.layer == RECORDING]
)
def test_what_keeps_it_from_recording_is_named(deployed: Recording, name: str) -> None:
    if deployed.unsettled:
        deployed.deploy()
    # What tests before this one have stopped and killed is no fault.
    forget = "journalctl -q --rotate; journalctl -q --vacuum-time=1s; systemctl reset-failed"
    deployed.host.root(f"{forget}; rm -rf {FOLDER}/orphans")
    eventually(lambda: deployed.serves)
    deployed.write()
    result = tried([name], Service.of(str(deployed.inventory)), "-k", CATALOGUE[name].checks)
    assert result.is_right, result


SFUS = (Host("h06"), Host("h13"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Recording]:
    """Two SFUs that share the Redis of the first, which also records."""
    box, other = SFUS
    digest = recorder.publish()
    with delivered(box.name, other.name):
        _, data, _ = pair_inventory()
        data["livekit"]["url"] = f"ws://{other.fqdn}:7880"
        data["turn"]["pools"]["calls"] |= {"min_port": 61001, "max_port": 62000}
        data["deploy"] = {"confirm_timeout": 90}
        data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"], "max_clock_skew": 1.0}
        data |= {"fleet_ca": "secret:fleet/ca", **egress(digest, min_free=0.1)}
        groups = {
            "livekit": [entry(box, pools=["calls"]), entry(other)],
            **{group: [box.fqdn] for group in ("turn", "redis", "egress")},
        }
        names = ["livekit/api_secret", "turn/calls", "redis/livekit", "redis/egress", "fleet/ca"]
        fleet = Recording(box, tmp_path, groups, data, names)
        fleet.deploy()
        eventually(lambda: fleet.serves)
        yield fleet
        fleet.restore()


def test_a_recording_has_a_gap_where_the_sfu_of_its_room_restarts(cluster: Recording) -> None:
    """It goes on with what its callers say once they are back, whichever SFU they are on then."""
    url, secret = cluster.data["livekit"]["url"], SecretStr(cluster.secrets["livekit/api_secret"])
    service = probe.Api(url, "APIfleet", secret)
    with probe.talking(url, "APIfleet", secret) as room:

        def are_back() -> bool:
            asked = api.ListParticipantsRequest(room=room.name)
            found = cluster.ask(lambda s: s.room.list_participants(asked)).participants
            voices = [t.sid for each in found for t in each.tracks if t.type == api.TrackType.AUDIO]
            return len(voices) == 2 and room.track not in voices

        node = max(SFUS, key=Host.media)
        plan = service.start("audio_room_composite", room)
        eventually(lambda: cluster.state(plan) == "EGRESS_ACTIVE")
        time.sleep(3)  # of what is recorded
        before = node.pids()
        cluster.data["livekit"]["logging"] = {"level": "debug"}
        run = cluster.deploy("--limit", node.fqdn)
        assert "what is recorded then has the gap, or ends" in run.text
        assert node.pids() != before
        eventually(are_back)
        time.sleep(10)  # the same
        cluster.stop_recording(plan)
        eventually(lambda: cluster.state(plan) == "EGRESS_COMPLETE")
    name = f"{room.name}/audio_room_composite.ogg"
    found = media.read(probe.Host(cluster.host.name, cluster.host.root).read(name), probe.TONES)
    print(node.name, found)
    assert all(share * found.seconds > 3 + 5 for share in found.tones.values()), found


def test_a_removal_leaves_every_recording(deployed: Recording) -> None:
    host = deployed.host
    host.root(f"install -o 201001 -m 640 /dev/null {FOLDER}/recordings/kept.ogg")
    had = host.root(f"cd {FOLDER}; find recordings -type f | sort")
    run = deployed.run(file="remove.py")
    assert run.status == 0, run.text
    assert host.root(f"cd {FOLDER}; find recordings -type f | sort") == had
