"""What the stand-in for egress (lab/egress) records and where it goes, deployed on one host with
Redis and an SFU: a bucket of an S3 that checks signatures, the backup while that is away, and what
its container decodes of the files. It stands for upstream's program in other tests, so here it is
judged itself; it says nothing of GStreamer's or Chrome's files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from livekit import api

from lab import bucket, recorder
from lab.bucket import Bucket
from tests.support.continuity import calls_of
from tests.support.fleet import Host, delivered, eventually, pair_inventory
from tests.support.recordings import STATES, Recorder, egress

HOST = Host("h14")
# Whether all of a file can be decoded, its seconds and its streams.
PLAY = (
    "podman run --rm --network=none --pids-limit=0 --user 0 --entrypoint sh"
    " --volume=/var/lib/egress/backup:/backup:ro {0} -c '"
    "ffmpeg -v error -xerror -i {1} -f null - && "
    "ffprobe -v error -show_entries format=duration:stream=codec_name -of json {1}'"
)


class Recording(Recorder):
    """A host that records into a bucket."""

    bucket: Bucket
    image: str

    def wait(self, recording: str, state: str) -> None:
        """Until it is in this state."""
        eventually(lambda: self.state(recording) == state)

    def all_kinds(self, folder: str) -> list[api.EgressInfo]:
        """Record a call in every way at once, each until it has some of it; how they ended."""
        room = self.room()
        asked = api.ListParticipantsRequest(room=room)
        person = self.ask(lambda s: s.room.list_participants(asked)).participants[0]
        (track,) = (each for each in person.tracks if each.type == api.TrackType.AUDIO)
        ogg = api.EncodedFileOutput(
            file_type=api.EncodedFileType.OGG, filepath=f"{folder}/{{room_name}}"
        )
        whole = api.RoomCompositeEgressRequest(room_name=room, audio_only=True, file_outputs=[ogg])
        mp4 = api.EncodedFileOutput(filepath=f"{folder}/{{publisher_identity}}")
        one = api.ParticipantEgressRequest(
            room_name=room, identity=person.identity, file_outputs=[mp4]
        )
        direct = api.DirectFileOutput(filepath=f"{folder}/{{track_id}}-{{track_type}}")
        alone = api.TrackEgressRequest(room_name=room, track_id=track.sid, file=direct)
        started = [
            self.ask(lambda s: s.egress.start_room_composite_egress(whole)).egress_id,
            self.ask(lambda s: s.egress.start_participant_egress(one)).egress_id,
            self.ask(lambda s: s.egress.start_track_egress(alone)).egress_id,
        ]
        for each in started:
            self.wait(each, "EGRESS_ACTIVE")
            time.sleep(2)  # of what is recorded
        for each in started:
            self.stop_recording(each)
            self.wait(each, "EGRESS_COMPLETE")
        return [self.found(each) for each in started]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    """The host after its first deploy."""
    digest, target = recorder.publish(), bucket.start()
    with delivered(HOST.name):
        _, data, _ = pair_inventory()
        del data["turn"], data["tls"]
        data["deploy"] = {"confirm_timeout": 60}  # the gate records
        data["livekit"] |= {"url": f"ws://{HOST.fqdn}:7880", "turn_pool": None}
        data["livekit"]["rtc"] = {"stun_servers": ["198.51.100.2:3478"]}
        cost = {
            f"{kind}_cpu_cost": 0.1 for kind in ("audio_room_composite", "participant", "track")
        }
        s3 = {
            "bucket": bucket.NAME,
            "access_key": target.access_key,
            "secret": "secret:egress/s3",
            "region": "us-east-1",
            "endpoint": bucket.ENDPOINT,
            "force_path_style": True,
            "max_retries": 1,
        }
        data |= egress(digest, cpu_cost=cost, storage={"prefix": "calls", "s3": s3})
        entry = (HOST.fqdn, {"address": HOST.ipv4, "address6": HOST.ipv6})
        groups = {group: [entry] for group in ("livekit", "redis", "egress")}
        names = ["livekit/api_secret", "redis/livekit", "redis/egress", "egress/s3"]
        fleet = Recording(HOST, tmp_path_factory.mktemp("recorder"), groups, data, names)
        fleet.bucket, fleet.image = target, f"{recorder.NAME}@{digest}"
        fleet.secrets["egress/s3"] = target.secret
        fleet.deploy()
        yield fleet
    bucket.stop()


@pytest.fixture
def called(deployed: Recording) -> Iterator[Recording]:
    """With a call that goes on."""
    url, secret = deployed.data["livekit"]["url"], deployed.secrets["livekit/api_secret"]
    with calls_of(url, "APIfleet", secret, {}):
        yield deployed


def test_recordings_go_to_the_bucket(called: Recording) -> None:
    ended = called.all_kinds("kept")
    objects = called.bucket.objects()
    for each in ended:
        assert (STATES(each.status), each.error) == ("EGRESS_COMPLETE", "")
        (file,) = each.file_results
        name = f"calls/{file.filename}"
        assert file.location == f"{bucket.ENDPOINT}/{bucket.NAME}/{name}"
        assert objects[name] == file.size > 1000
        assert objects[f"calls/kept/{each.egress_id}.json"] > 0
        assert not each.backup_storage_used
    # Nothing stays on the host, and each of them ended as it should.
    left = "find /var/lib/egress -type f; find /var/lib/egress/tmp -name 'EG_*'"
    assert HOST.root(left) == ""
    results = HOST.root(
        "curl -s 127.0.0.1:7982/metrics | grep ^livekit_egress_handler_results_total"
    )
    assert len(results.splitlines()) == 3  # kinds; the gate of the deploy recorded one of them, too
    assert all('result="completed"' in line for line in results.splitlines())


def test_without_the_bucket_they_stay_and_can_be_played(called: Recording) -> None:
    bucket.stop()
    ended = called.all_kinds("lost")
    streams = []
    for each in ended:
        assert STATES(each.status) == "EGRESS_COMPLETE" and each.backup_storage_used
        (file,) = each.file_results
        assert file.location == f"/backup/{file.filename}"
        seen = HOST.root(f"stat -c '%a %u' /var/lib/egress/{file.location}")
        assert seen == "640 201001"
        played = json.loads(HOST.root(PLAY.format(called.image, file.location)))
        assert abs(float(played["format"]["duration"]) - file.duration / 1e9) < 1
        streams.append([stream["codec_name"] for stream in played["streams"]])
    assert streams == [["opus"], ["aac"], ["opus"]]


def test_a_killed_handler_is_a_failure_that_is_told(called: Recording) -> None:
    room = called.room()
    output = api.EncodedFileOutput(file_type=api.EncodedFileType.OGG, filepath="killed")
    asked = api.RoomCompositeEgressRequest(room_name=room, audio_only=True, file_outputs=[output])
    started = called.ask(lambda s: s.egress.start_room_composite_egress(asked)).egress_id
    called.wait(started, "EGRESS_ACTIVE")
    HOST.root("pkill -KILL --uid 201001 -f run-handler")
    called.wait(started, "EGRESS_FAILED")
    assert called.found(started).error_code == 500
