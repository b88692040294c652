"""What an inventory may say of the hosts that record: only what egress knows, because it ignores
other keys in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from callready.settings.types import (
    INT_MAX,
    Digest,
    HttpUrl,
    ImageName,
    Port,
    SecretByHand,
    Section,
    Source,
    Version,
)

# Processor cores of each kind of recording as egress counts them (its pkg/stats/monitor.go), which
# takes one only where so many are free.
COSTS = {
    "room_composite": 4.0,
    "web": 4.0,
    "participant": 2.0,
    "audio_room_composite": 1.0,
    "audio_web": 1.0,
    "track_composite": 1.0,
    "track": 0.5,
}
# What those without Chrome have been seen to take at 720p, and half of that again: for hosts on
# which the above would leave no room for a second one.
SMALL_COSTS = {
    "participant": 1.5,
    "audio_room_composite": 0.5,
    "track_composite": 0.5,
    "track": 0.25,
}
FEW_CORES = 4
# Where a host has recordings: `tmp` while they run, `recordings`, `backup`, `orphans`.
FOLDER = "/var/lib/egress"
# From a path in the container to a folder of the host (templates/callready-egress.service.j2).
RECORDINGS, BACKUP = "/out", "/backup"
# The user `egress` of upstream's image, as the host sees it, and the range that it lies in.
CONTAINER_USER, SUBORDINATES = 1001, (200_000, 65_536)
USER = SUBORDINATES[0] + CONTAINER_USER


class Proxy(Section):
    """A proxy on the way to the storage."""

    url: HttpUrl = Field(description="Its URL.")
    username: str | None = Field(None, description="Where it wants one.")
    password: SecretByHand | None = Field(None, description="Its password.")


class S3(Section):
    """A bucket of S3, or of what speaks as it does."""

    bucket: str = Field(min_length=3, description="The bucket; it must exist.")
    access_key: str = Field(min_length=1, description="The key's public part.")
    secret: SecretByHand = Field(description="The key's secret part.")
    region: str | None = Field(None, min_length=1, description="The region; MinIO has none.")
    endpoint: HttpUrl | None = Field(
        None, description="URL of another one than AWS. At a private address it is reached too."
    )
    force_path_style: bool = Field(
        False, description="The bucket is part of the path, not of the name; for MinIO."
    )
    assume_role_arn: str | None = Field(None, min_length=1, description="Role to assume (AWS).")
    assume_role_external_id: str | None = Field(None, min_length=1, description="And as whom.")
    max_retries: int | None = Field(None, ge=0, le=100, description="Uploads tried again.")
    content_disposition: str | None = Field(
        None, min_length=1, description="`Content-Disposition` of what is uploaded."
    )
    tagging: str | None = Field(None, min_length=1, description="Tags, as a URL's query.")
    metadata: dict[str, str] = Field({}, description="Metadata of what is uploaded.")
    proxy_config: Proxy | None = Field(None, description="A proxy on the way.")


class Azure(Section):
    """A container of Azure's blob storage. Rendered, and tried by nobody."""

    account_name: str = Field(min_length=3, description="The account.")
    account_key: SecretByHand = Field(description="Its key.")
    container_name: str = Field(min_length=3, description="The container.")


class Gcp(Section):
    """A bucket of Google's storage. Rendered, and tried by nobody."""

    credentials_json: SecretByHand = Field(description="A service account's key, as JSON.")
    bucket: str = Field(min_length=3, description="The bucket.")


class Storage(Section):
    """egress.yaml's `storage`: where recordings go. Without one of `s3`, `azure` and `gcp` they
    stay on the host, in /var/lib/egress/recordings."""

    prefix: str = Field(
        "",
        pattern=r"^([A-Za-z0-9._@+=-]+(/[A-Za-z0-9._@+=-]+)*)?$",
        description="A folder in it, before the path that a request names.",
    )
    s3: S3 | None = Field(None, description="S3.")
    azure: Azure | None = Field(None, description="Azure.")
    gcp: Gcp | None = Field(None, description="Google.")

    @model_validator(mode="after")
    def _one(self) -> Storage:
        if len(self.remotes) > 1:
            raise ValueError(f"has {' and '.join(self.remotes)}: recordings go to one of them")
        if ".." in self.prefix.split("/"):
            raise ValueError("prefix leads out of the storage: leave .. out")
        return self

    @property
    def remotes(self) -> list[str]:
        """The kinds that are set."""
        return [name for name in ("s3", "azure", "gcp") if getattr(self, name)]


class CpuCost(Section):
    """egress.yaml's `cpu_cost`: what a recording takes, by which egress says whether it takes one
    more. A request that does not fit is never answered: its caller is told 503 after a while."""

    room_composite_cpu_cost: float | None = Field(
        None, gt=0, le=1024, description="Cores of a whole room, in Chrome; 4."
    )
    web_cpu_cost: float | None = Field(None, gt=0, le=1024, description="Of a web page; 4.")
    participant_cpu_cost: float | None = Field(
        None, gt=0, le=1024, description="Of a participant; 2, on less than 4 cores 1.5."
    )
    audio_room_composite_cpu_cost: float | None = Field(
        None, gt=0, le=1024, description="Of a room's sound; 1, on less than 4 cores 0.5."
    )
    audio_web_cpu_cost: float | None = Field(
        None, gt=0, le=1024, description="Of a web page's sound, in Chrome; 1."
    )
    track_composite_cpu_cost: float | None = Field(
        None, gt=0, le=1024, description="Of two tracks; 1, on less than 4 cores 0.5."
    )
    track_cpu_cost: float | None = Field(
        None, gt=0, le=1024, description="Of a track as it comes; 0.5, on less than 4 cores 0.25."
    )
    max_cpu_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of the cores that all together may take; 0.8."
    )
    max_memory: float | None = Field(
        None, gt=0, le=65_536, description="Gigabytes that all together may take."
    )
    memory_cost: float | None = Field(
        None, gt=0, le=1024, description="Gigabytes that must be free for one more."
    )
    max_pulse_clients: int | None = Field(
        None, ge=1, le=10_000, description="Programs that play sound at once; 60."
    )


class SessionLimits(Section):
    """egress.yaml's `session_limits`: a recording that is longer is ended, its file complete."""

    file_output_max_duration: int | None = Field(
        None, ge=1, le=INT_MAX, description="Seconds of a file."
    )
    stream_output_max_duration: int | None = Field(
        None, ge=1, le=INT_MAX, description="Seconds of a stream."
    )
    segment_output_max_duration: int | None = Field(
        None, ge=1, le=INT_MAX, description="Seconds of a recording in segments."
    )
    image_output_max_duration: int | None = Field(
        None, ge=1, le=INT_MAX, description="Seconds that images are taken."
    )


class EgressLogging(Section):
    """egress.yaml's `logging`."""

    level: Literal["debug", "info", "warn", "error"] = Field(
        "info", description="At `debug` it writes the tokens of rooms."
    )
    json_: bool = Field(True, alias="json", description="One JSON object a line.")


class Egress(Section):
    """The hosts of group `egress`, which record rooms, participants and tracks: LiveKit's egress,
    from its image, run by Debian's podman."""

    image: ImageName = Field(
        "docker.io/livekit/egress",
        description="Where the image is; a mirror for hosts without Internet.",
    )
    version: Version = Field("1.14.1", description="Its release, which `digest` must be of.")
    digest: Digest = Field(
        description="The image, pinned: `sha256:…`, as the registry shows it for the release."
    )
    registry_ca: str | None = Field(
        None, description="PEM file of the authority that a private registry's HTTPS is signed by."
    )
    livekit_key: str | None = Field(
        None,
        description="Which of `livekit.keys` it joins rooms with. Unset, the first one, which is "
        "the app's.",
    )
    storage: Storage = Field(Storage(), description="Where recordings go.")
    web: bool = Field(
        False,
        description="Record web pages: what a recording may reach is then every public address, "
        "never private ones or the host itself.",
    )
    allowed_networks: list[Source] = Field(
        [],
        description="What recordings may reach besides, also private: addresses, networks and "
        "groups of the inventory.",
    )
    cpu_cost: CpuCost = Field(CpuCost(), description="What recordings take.")
    session_limits: SessionLimits = Field(SessionLimits(), description="How long they may be.")
    logging: EgressLogging = Field(EgressLogging(), description="What goes to the journal.")
    health_port: Port = Field(7981, description="Health, for this host alone.")
    prometheus_port: Port = Field(7982, description="Metrics, for this host alone.")
    template_port: Port = Field(7980, description="Pages of room layouts, on loopback.")
    drain: int = Field(
        3600,
        ge=0,
        le=86_400,
        description="Seconds that a deploy waits for recordings to end before egress restarts; "
        "what runs then is ended, its file complete.",
    )
    min_free: float = Field(
        5.0,
        ge=0.1,
        le=100_000,
        description="Gigabytes: with less free in /var/lib/egress, no new recording starts until "
        "there is room. Twice what is recorded at once, because it is copied when it ends: an "
        "hour at 720p is 2 GB.",
    )
    retention_days: int | None = Field(
        None,
        ge=1,
        le=36_500,
        description="Remove files that egress wrote to /var/lib/egress/recordings when they are "
        "older. Unset, nothing is ever removed; a bucket has rules of its own.",
    )

    @property
    def reference(self) -> str:
        """The image as podman knows it."""
        return f"{self.image}@{self.digest}"

    def costs(self, cores: int) -> dict[str, float]:
        """What each kind of recording takes on a host with so many cores, dearest first."""
        usual: Mapping[str, float] = SMALL_COSTS if cores < FEW_CORES else {}
        found = {
            kind: getattr(self.cpu_cost, f"{kind}_cpu_cost") or usual.get(kind, cost)
            for kind, cost in COSTS.items()
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def fitting(self, cores: int) -> list[str]:
        """The kinds of recordings that a host with so many cores takes."""
        return [kind for kind, cost in self.costs(cores).items() if cost <= cores]
