"""A small backend for an app that makes calls: it tells its users where LiveKit is, gives them
tokens to join a room, and TURN credentials. Copy it, and put your own users in place of APP_TOKEN.

Everything it knows comes from the .env file beside it, whose LIVEKIT_* and TURN_* keys callready
writes. gunicorn runs it (backend.service).
"""

import hmac
import secrets
import sys
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import jwt
from fastapi import Depends, FastAPI, Header, HTTPException, Response, WebSocket
from pydantic import BaseModel, Field

ENV_FILE = Path(__file__).with_name(".env")
NEEDED = ("APP_TOKEN", "LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")
TOKEN_TTL = 600  # seconds to join in; who has joined gets new ones from LiveKit itself


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
    now = int(time.time())
    claims = {
        "iss": ENV["LIVEKIT_API_KEY"],
        "sub": join.identity,
        "nbf": now,
        "exp": now + TOKEN_TTL,
        "video": {"roomJoin": True, "room": join.room},
    }
    signed = jwt.encode(claims, ENV["LIVEKIT_API_SECRET"], algorithm="HS256")
    return {"url": ENV["LIVEKIT_URL"], "token": signed}


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
    return {
        "uris": [*ENV["STUN_URIS"].split(","), *ENV["TURN_URIS"].split(",")],
        "username": username,
        "credential": b64encode(digest).decode(),
        "ttl": ttl,
    }


@app.websocket("/ws")
async def ws(socket: WebSocket) -> None:
    """Answers `ping`; put the app's own messages here, behind a check of who is talking."""
    await socket.accept()
    async for text in socket.iter_text():
        if text != "ping":
            await socket.close(1008)  # policy violation (RFC 6455, section 7.4.1)
            return
        await socket.send_text("pong")
