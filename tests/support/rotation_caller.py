"""Callers during a rotation: python rotation_caller.py APP_ENV TURN_ADDRESS [--no-calls]

About every second the app mints a TURN credential and a token from its .env as it is now, and both
are used at once; so are the credentials that LiveKit hands out, and ones made twenty seconds ago. A
real call runs most of the time, relayed and direct in turn (with --no-calls nobody joins a room).
When stdin closes, prints what happened as JSON.
"""

import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from callready.probes import ProbeError, livekit, turn, webrtc
from callready.probes.turn import TurnRefused, TurnServer

AGED, TOO_OLD = 20, 25  # seconds; credentials and tokens live 30

Minted = tuple[float, turn.Credentials, SecretStr]  # since when


class Callers:
    def __init__(self, env: Path, address: str, join_rooms: bool) -> None:
        self.join_rooms = join_rooms
        self.env, self.server = env, TurnServer(address, 3478, "udp")
        self.done = threading.Event()
        self.attempts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.gaps: list[float] = []
        self.broken: list[str] = []
        self._unreachable_since: float | None = None

    def app(self) -> dict[str, str]:
        lines = self.env.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def try_(self, what: str, action: Callable[[], Any]) -> Any:
        self.attempts[what] += 1
        try:
            answer = action()
        except TurnRefused as error:
            self.refused.append(f"{what}: {error}")
            return None
        if isinstance(answer, int) and answer != 200:
            self.refused.append(f"{what}: {answer}")
        return answer

    def join(self, what: str, url: str, token: SecretStr) -> Any:
        """LiveKit may be away for the moment of its restart; it may not refuse."""
        try:
            status = self.try_(what, lambda: livekit.validate(url, token))
            wanted = status == 200 and self.join_rooms
            joined = livekit.signalling(url, token) if wanted else None
        except ProbeError:
            self._unreachable_since = self._unreachable_since or time.monotonic()
            return None
        if self._unreachable_since:
            self.gaps.append(round(time.monotonic() - self._unreachable_since, 1))
            self._unreachable_since = None
        return joined

    def second(self, earlier: deque[Minted]) -> None:
        since, app = time.monotonic(), self.app()
        url, key = app["LIVEKIT_URL"], app["LIVEKIT_API_KEY"]
        token = livekit.token(key, SecretStr(app["LIVEKIT_API_SECRET"]), ttl=30)
        minted = turn.mint(SecretStr(app["TURN_SECRET"]), int(app["TURN_TTL"]))
        self.try_("turn, app's", lambda: turn.allocate(self.server, minted))
        joined = self.join("livekit", url, token)
        if joined:
            given = next(s for s in joined.ice_servers if s.username)
            own = turn.Credentials(given.username, given.credential)
            self.try_("turn, LiveKit's", lambda: turn.allocate(self.server, own))
        earlier.append((since, minted, token))
        now = time.monotonic()
        while earlier and now - earlier[0][0] > TOO_OLD:
            earlier.popleft()
        if earlier and now - earlier[0][0] > AGED:
            _, old, old_token = earlier.popleft()
            self.try_("turn, earlier", lambda: turn.allocate(self.server, old))
            self.join("livekit, earlier", url, old_token)

    def seconds(self) -> None:
        earlier: deque[Minted] = deque()
        while not self.done.is_set():
            start = time.monotonic()
            self.second(earlier)
            self.done.wait(max(0.05, start + 1 - time.monotonic()))

    def calls(self) -> None:
        relay_only = True
        while not self.done.is_set():
            app = self.app()
            started = time.time()
            self.attempts["calls"] += 1
            try:
                secret = SecretStr(app["LIVEKIT_API_SECRET"])
                tokens = webrtc.tokens(app["LIVEKIT_API_KEY"], secret)
                webrtc.call(app["LIVEKIT_URL"], tokens, relay_only=relay_only, duration=0.2)
            except ProbeError as error:
                self.broken.append(json.dumps([started, time.time(), str(error)]))
            relay_only = not relay_only
            self.done.wait(1)

    def run(self) -> None:
        loops = (self.seconds, self.calls) if self.join_rooms else (self.seconds,)
        threads = [threading.Thread(target=each) for each in loops]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self.done.set()
        for thread in threads:
            thread.join()
        found = {**vars(self), "env": None, "server": None, "done": None}
        print(json.dumps(found, default=str))


if __name__ == "__main__":
    Callers(Path(sys.argv[1]), sys.argv[2], "--no-calls" not in sys.argv).run()
