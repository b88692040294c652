"""Whether SFUs that share a Redis know each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from callready.diagnosis.model import Cause, Place
from callready.probes import ProbeError
from tasks.livekit import CONFIG
from tests.verify.servers import Server

LIST_NODES = f"timeout 10 livekit-server --config {CONFIG} list-nodes 2> /dev/null"


def split(all_nodes: Sequence[Server]) -> Cause | None:
    """Why rooms are split, if that is because SFUs do not know each other: the one that knows
    fewest. One that is not alive by its own account is another matter."""
    ids, lists = dict[str, str](), dict[str, str]()
    for server in all_nodes:
        with suppress(ProbeError):
            listed = server.host.run(LIST_NODES).stdout
            if server.node_id and server.node_id in listed:
                ids[server.name], lists[server.name] = server.node_id, listed
    known = {name: sum(each in text for each in ids.values()) for name, text in lists.items()}
    if not known or min(known.values()) == len(known):
        return None
    lost = [name for name in known if known[name] == min(known.values())]
    name = lost[0] if len(lost) == 1 else ""
    return Cause(
        "rooms-split",
        name,
        Place.CONFIGURATION,
        f"{name or ' and '.join(lost)} does not know the other SFUs: who comes there meets nobody "
        "who comes to them",
        "livekit.redis: one server and one db for all; where Sentinels name it, do they agree?",
        tuple(f"{each} sees {count} of {len(known)} nodes" for each, count in known.items()),
        checks=("*:test_rooms", "*:test_first_joins"),
    )
