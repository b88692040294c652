"""A host with Redis, an SFU and egress, and what LiveKit says of its recordings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from livekit import api

from lab import ca, recorder
from tests.support.fleet import Fleet, Host

STATES = api.EgressStatus.Name
Answer = TypeVar("Answer")


def egress(digest: str, **more: Any) -> dict[str, dict[str, Any]]:
    """The sections of an inventory whose egress has the lab's image."""
    passwords = {f"{user}_password": f"secret:redis/{user}" for user in ("livekit", "egress")}
    image = {"image": recorder.NAME, "digest": digest, "registry_ca": str(ca.CA_CERTIFICATE)}
    return {"redis": passwords, "egress": {**image, **more}}


class Recorder(Fleet):
    """The inventory of a host that records, and LiveKit's API there."""

    def __init__(
        self,
        host: Host,
        folder: Path,
        groups: dict[str, Any],
        data: dict[str, Any],
        names: list[str],
    ) -> None:
        super().__init__(folder, groups, data, names)
        self.host = host

    def ask(self, what: Callable[[api.LiveKitAPI], Awaitable[Answer]]) -> Answer:
        """What LiveKit's API answers."""

        async def inside() -> Answer:
            url, secret = f"http://{self.host.fqdn}:7880", self.secrets["livekit/api_secret"]
            async with api.LiveKitAPI(url, "APIfleet", secret) as service:
                return await what(service)

        return asyncio.run(inside())

    def room(self) -> str:
        """The room of the last call of the test's own; others are of a deploy's."""
        rooms = self.ask(lambda s: s.room.list_rooms(api.ListRoomsRequest())).rooms
        calls = [room for room in rooms if room.name.startswith("continuity-")]
        return max(calls, key=lambda room: room.creation_time).name

    def found(self, recording: str) -> api.EgressInfo:
        """What LiveKit knows of a recording."""
        asked = api.ListEgressRequest(egress_id=recording)
        (found,) = self.ask(lambda s: s.egress.list_egress(asked)).items
        return found

    def state(self, recording: str) -> str:
        """How it is."""
        return STATES(self.found(recording).status)

    def stop_recording(self, recording: str) -> None:
        """As the application does."""
        asked = api.StopEgressRequest(egress_id=recording)
        self.ask(lambda s: s.egress.stop_egress(asked))
