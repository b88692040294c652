"""A small backend for an app that makes calls: it tells its users where LiveKit is, gives them
tokens to join a room and TURN credentials, and records rooms. Copy it, and put your own users in
place of APP_TOKEN.

Everything it knows comes from the .env file beside it, whose LIVEKIT_* and TURN_* keys callready
writes. gunicorn runs it (backend.service).
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import sys
import time
from base64 import b64encode
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import jwt
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

ENV_FILE = Path(__file__).with_name(".env")
NEEDED = ("APP_TOKEN", "LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")
TOKEN_TTL = 600  # seconds to join in; who has joined gets new ones from LiveKit itself
API_TIMEOUT = 40  # seconds; LiveKit looks for an egress that takes a recording for 8 to 25
PAGE = Path(__file__).with_name("recordings.html")
# What LiveKit said about recordings; it forgets them itself a day after they have ended.
EVENTS = Path(os.environ.get("STATE_DIRECTORY", ENV_FILE.parent)) / "recordings.db"
EVENTS_KEPT = 30  # days


def read_env(path: Path) -> dict[str, str]:
    """KEY=value lines; the value is the rest of the line as it is, without quoting."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}: callready's deploy writes it")
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    env = {key: value for key, _, value in pairs}
    if missing := [key for key in NEEDED if not env.get(key)]:
        sys.exit(f"{path}: {', '.join(missing)} missing: deploy this host with callready")
    return env


ENV = read_env(ENV_FILE)
app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


def authenticated(response: Response, authorization: str = Header("")) -> None:
    """Only callers with the app's token; strangers would make calls at your expense."""
    # While callready rotates the token there are two.
    wanted = [f"Bearer {token}".encode() for token in ENV["APP_TOKEN"].split(",")]
    if not any([hmac.compare_digest(authorization.encode(), each) for each in wanted]):
        raise HTTPException(401, "not authenticated", {"WWW-Authenticate": "Bearer"})
    response.headers["Cache-Control"] = "no-store"


class Join(BaseModel):
    """Who wants to join which room."""

    room: str = Field(min_length=1, max_length=128)
    identity: str = Field(min_length=1, max_length=128)


@app.get("/health")
async def health() -> dict[str, str]:
    """For load balancers and callready's verification."""
    return {"status": "ok", "livekit_url": ENV["LIVEKIT_URL"]}


@app.post("/token", dependencies=[Depends(authenticated)])
async def token(join: Join) -> dict[str, str]:
    """A LiveKit access token (https://docs.livekit.io/home/get-started/authentication/)."""
    grants = {"roomJoin": True, "room": join.room}
    return {"url": ENV["LIVEKIT_URL"], "token": signed(TOKEN_TTL, grants, sub=join.identity)}


def signed(ttl: int, grants: dict[str, Any], **claims: Any) -> str:
    """A token of LiveKit's key with these grants, for `ttl` seconds."""
    now = int(time.time())
    claims |= {"iss": ENV["LIVEKIT_API_KEY"], "nbf": now, "exp": now + ttl, "video": grants}
    return jwt.encode(claims, ENV["LIVEKIT_API_SECRET"], algorithm="HS256")


@app.get("/turn-credentials", dependencies=[Depends(authenticated)])
async def turn_credentials() -> dict[str, Any]:
    """STUN and TURN servers for a peer connection of the app's own. The credential is the TURN REST
    API's (draft-uberti-behave-turn-rest-00): a name with its expiry and the HMAC-SHA1 of it."""
    if "TURN_SECRET" not in ENV:
        raise HTTPException(404, "no TURN service with shared secrets")
    ttl = int(ENV["TURN_TTL"])
    # A name of its own for each: coturn counts allocations by name.
    username = f"{int(time.time()) + ttl}:{secrets.token_hex(8)}"
    digest = hmac.digest(ENV["TURN_SECRET"].encode(), username.encode(), "sha1")
    stun, turn = (ENV[name].split(",") for name in ("STUN_URIS", "TURN_URIS"))
    return {
        # Four at most, with five clients are slow; TURN over UDP is STUN too.
        "uris": [*stun[: 4 - len(turn)], *turn],
        "username": username,
        "credential": b64encode(digest).decode(),
        "ttl": ttl,
    }


class Start(BaseModel):
    """What to record of a room: everybody's sound ("audio"), that and a picture of all of them
    ("room", which takes a Chrome and four cores), one participant, or one track as it is sent."""

    room: str = Field(min_length=1, max_length=128)
    kind: Literal["audio", "room", "participant", "track"]
    identity: str = Field("", max_length=128)  # the participant's
    track: str = Field("", max_length=128)  # its id, from /participants


@app.post("/recordings", status_code=201, dependencies=[Depends(authenticated)])
def start_recording(start: Start) -> dict[str, Any]:
    """Start a recording. Who may, and whether all who are recorded know and agree, is yours to
    check before."""
    if not {"participant": start.identity, "track": start.track}.get(start.kind, True):
        raise HTTPException(422, f"which {start.kind}? See /participants")
    # No room may choose where files go, by ".." or by egress' own {placeholders}.
    folder = re.sub(r"[^A-Za-z0-9_-]", "-", start.room)[:64]
    at = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    file = {"filepath": f"{folder}/{at}-{start.kind}-{secrets.token_hex(3)}"}
    request, wanted = {
        "audio": ("StartRoomCompositeEgress", {"audio_only": True, "file_outputs": [file]}),
        "room": ("StartRoomCompositeEgress", {"layout": "grid", "file_outputs": [file]}),
        "participant": (
            "StartParticipantEgress",
            {"identity": start.identity, "file_outputs": [file]},
        ),
        "track": ("StartTrackEgress", {"track_id": start.track, "file": file}),
    }[start.kind]
    return recording(egress(request, room_name=start.room, **wanted))


@app.get("/recordings", dependencies=[Depends(authenticated)])
def recordings(room: str = Query(min_length=1)) -> list[dict[str, Any]]:
    """The recordings of a room, the latest first."""
    found: dict[str, dict[str, Any]] = {}
    events = heard("room", room)
    for _, _, info in events:
        found[info["egress_id"]] = info
    found |= {info["egress_id"]: info for info in egress("ListEgress", room_name=room)["items"]}
    latest_first = sorted(found.values(), key=lambda info: -int(info.get("started_at") or 0))
    return [recording(info, events) for info in latest_first]


@app.get("/recordings/{egress_id}", dependencies=[Depends(authenticated)])
def status(egress_id: str) -> dict[str, Any]:
    """One recording: whether it runs, and where its file is."""
    events = heard("egress_id", egress_id)
    try:
        return recording(egress("ListEgress", egress_id=egress_id)["items"][0], events)
    except HTTPException as error:
        if error.status_code != 404 or not events:
            raise
        return recording(events[-1][2], events)


@app.post("/recordings/{egress_id}/stop", dependencies=[Depends(authenticated)])
def stop_recording(egress_id: str) -> dict[str, Any]:
    """End a recording. Its file is there when its status is complete, some seconds later."""
    return recording(egress("StopEgress", egress_id=egress_id), heard("egress_id", egress_id))


@app.get("/participants", dependencies=[Depends(authenticated)])
def participants(room: str = Query(min_length=1)) -> list[dict[str, Any]]:
    """Who is in a room, with their tracks: what can be recorded."""
    answer = livekit("RoomService/ListParticipants", {"roomAdmin": True, "room": room}, room=room)
    return [
        {
            "identity": each["identity"],
            "tracks": [
                {
                    "id": track["sid"],
                    "type": track["type"].lower(),
                    "source": track["source"].lower(),
                }
                for track in each["tracks"]
            ],
        }
        for each in answer["participants"]
        if each["kind"] != "EGRESS"
    ]


@app.post("/webhook")
async def webhook(request: Request, authorization: str = Header("")) -> None:
    """LiveKit's events (`livekit.webhook` of the inventory), of which those of recordings are kept.
    LiveKit signs them with the app's key: a token that holds the hash of the body
    (https://docs.livekit.io/home/server/webhooks/)."""
    try:
        claims = jwt.decode(
            authorization,
            ENV["LIVEKIT_API_SECRET"],
            ["HS256"],
            {"require": ["exp", "iss"]},
            issuer=ENV["LIVEKIT_API_KEY"],
            leeway=60,  # seconds that clocks may differ
        )
    except jwt.InvalidTokenError:
        raise HTTPException(401, "not signed by LiveKit") from None
    body = await request.body()
    if claims.get("sha256") != b64encode(hashlib.sha256(body).digest()).decode():
        raise HTTPException(401, "not what LiveKit signed")
    event = json.loads(body, object_pairs_hook=with_livekits_names)
    if event.get("event", "").startswith("egress_"):
        await run_in_threadpool(keep, event)


@app.get("/")
def page() -> Response:
    """A page to try recordings on. It holds nothing: who opens it needs the app's token."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
    text = PAGE.read_text().replace("NONCE", nonce)
    return Response(text, media_type="text/html", headers=headers)


def recording(
    info: dict[str, Any], events: Iterable[tuple[int, str, dict[str, Any]]] = ()
) -> dict[str, Any]:
    """What the app's users see of a recording, from LiveKit's EgressInfo; times are UNIX time."""
    composite = info.get("room_composite")
    kinds = [kind for kind in ("participant", "track") if info.get(kind)]
    if composite:
        kinds = ["audio" if composite.get("audio_only") else "room"]
    return {
        "id": info["egress_id"],
        "room": info.get("room_name"),
        "kind": kinds[0] if kinds else "other",
        "status": named(info),
        "started": seconds(info.get("started_at")),
        "ended": seconds(info.get("ended_at")),
        "files": [
            {
                "location": file.get("location") or file.get("filename"),
                "bytes": int(file.get("size") or 0),
                "seconds": seconds(file.get("duration")),
            }
            for file in info.get("file_results") or ()
            if file.get("filename")  # it has none before anything has come
        ],
        # It went to the backup: where it should be, nothing is.
        "backup": bool(info.get("backup_storage_used")),
        "error": info.get("error") or None,
        "events": [
            {"at": at, "event": name, "status": named(said)}
            for at, name, said in events
            if said["egress_id"] == info["egress_id"]
        ],
    }


def named(info: dict[str, Any]) -> str:
    """starting, active, ending, complete, failed, aborted or limit_reached."""
    return str(info.get("status") or "EGRESS_STARTING").removeprefix("EGRESS_").lower()


def seconds(nanoseconds: Any) -> float | None:
    """None for what has not been yet."""
    return round(int(nanoseconds) / 1e9, 1) if int(nanoseconds or 0) else None


def egress(method: str, **body: Any) -> dict[str, Any]:
    """A request to LiveKit about recordings."""
    return livekit(f"Egress/{method}", {"roomRecord": True}, **body)


def livekit(method: str, grants: dict[str, Any], **body: Any) -> dict[str, Any]:
    """A request to LiveKit's server API (https://docs.livekit.io/reference/server/server-apis/)
    with a token of its own; its refusals in words for the app's users."""
    url = "http" + ENV["LIVEKIT_URL"].removeprefix("ws").rstrip("/") + f"/twirp/livekit.{method}"
    headers = {
        "Authorization": f"Bearer {signed(60, grants)}",
        "Content-Type": "application/json",
    }
    request = HttpRequest(url, json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=API_TIMEOUT) as answer:
            said: dict[str, Any] = json.load(answer)
            return said
    except HTTPError as error:
        try:
            refused = json.load(error)
            code, why = refused["code"], refused["msg"].removeprefix("twirp error unknown: ")
        except (ValueError, KeyError, TypeError):  # before Twirp, or a proxy's
            code, why = {401: "unauthenticated"}.get(error.code, ""), f"status {error.code}"
    except (OSError, ValueError) as error:
        raise HTTPException(502, f"LiveKit does not answer: {error}") from None
    status, words = REFUSALS.get(code, (502, "LiveKit cannot do it"))
    raise HTTPException(status, f"{words}: {why}")


# By Twirp's code (https://twitchtv.github.io/twirp/docs/errors.html).
FULL = 503, "nothing was started: every egress is full, ends its recordings or is down, try later"
REFUSALS = {
    "unavailable": FULL,
    "resource_exhausted": FULL,
    "deadline_exceeded": (503, "the egress that records it does not answer"),
    "not_found": (404, "there is nothing to record or to stop"),
    "failed_precondition": (409, "it has ended"),
    "invalid_argument": (400, "LiveKit does not take this"),
    "unauthenticated": (502, "LiveKit refuses the key in the app's .env"),
    "permission_denied": (502, "LiveKit refuses the key in the app's .env"),
}


def events_kept() -> sqlite3.Connection:
    """The database that the workers have in common; to be closed."""
    database = sqlite3.connect(EVENTS, isolation_level=None)
    database.execute(
        "create table if not exists events"
        " (id text primary key, at integer, event text, egress_id text, room text, info text)"
    )
    return database


def keep(event: dict[str, Any]) -> None:
    """Remember an event; LiveKit may send it twice."""
    info = event["egress_info"]
    row = (event["id"], int(event["created_at"]), event["event"], info["egress_id"])
    with closing(events_kept()) as database:
        database.execute(
            "insert or ignore into events values (?, ?, ?, ?, ?, ?)",
            (*row, info.get("room_name"), json.dumps(info)),
        )
        before = int(time.time()) - EVENTS_KEPT * 86400
        database.execute("delete from events where at < ?", (before,))


def heard(column: str, value: str) -> list[tuple[int, str, dict[str, Any]]]:
    """The events of a room or a recording, the first first: when (UNIX time), which, EgressInfo."""
    with closing(events_kept()) as database:
        rows = database.execute(
            f"select at, event, info from events where {column} = ? order by at, rowid", (value,)
        ).fetchall()
    return [(at, event, json.loads(info)) for at, event, info in rows]


def with_livekits_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The server API says egress_id, events say egressId."""
    return {re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", key): v for key, v in pairs}


@app.websocket("/ws")
async def ws(socket: WebSocket) -> None:
    """Answers `ping`; put the app's own messages here, behind a check of who is talking."""
    await socket.accept()
    async for text in socket.iter_text():
        if text != "ping":
            await socket.close(1008)  # policy violation (RFC 6455, section 7.4.1)
            return
        await socket.send_text("pong")
