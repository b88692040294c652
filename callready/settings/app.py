"""The application that mints tokens, and how to see that it works."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from callready.settings.types import (
    Command,
    GeneratedSecret,
    HttpUrl,
    HttpUrlWithQuery,
    Listener,
    Origin,
    Path,
    Section,
    Unit,
    Username,
    WsUrlWithQuery,
    listed,
)


class HttpCheck(Section):
    """An HTTP endpoint of the app that the verification and the monitor ask."""

    url: HttpUrlWithQuery = Field(description="http:// or https:// URL.")
    status: int = Field(200, ge=100, le=599, description="The status it must answer with.")
    fields: dict[str, Any] = Field({}, description="JSON fields it must contain, by value.")


class WebSocketCheck(Section):
    """A WebSocket endpoint of the app that verification talks to."""

    url: WsUrlWithQuery = Field(description="ws:// or wss:// URL.")
    send: str = Field(description="Text to send.")
    expect: str = Field(description="Text the answer must contain.")


class Workers(Section):
    """How many worker processes a unit of the app must run."""

    unit: Unit = Field(description="The systemd unit.")
    count: int = Field(ge=1, description="Worker processes, its main process not counted.")


class App(Section):
    """The application that mints tokens: its environment file and how to see that it works."""

    env_file: Path = Field(description="The .env file; other keys in it are kept.")
    url: HttpUrl | None = Field(None, description="URL that callers reach it at.")
    upstream: Listener | None = Field(None, description="Where it listens, for the edge.")
    owner: Username = Field("root", description="User that owns it (mode 0600).")
    api_token: Annotated[list[GeneratedSecret], BeforeValidator(listed), Origin(rotation="app")] = (
        Field(
            [],
            description="Written into it as `APP_TOKEN`: what callers of `/token` and "
            "`/turn-credentials` present (examples/backend); two with a comma while it is rotated. "
            "With `url`, verification makes a call with what they hand out.",
        )
    )
    restart: list[Unit] = Field([], description="Units to restart when it changed.")
    commands: list[Command] = Field([], description="Shell commands to run when it changed.")
    health: list[HttpCheck] = Field([], description="HTTP checks.")
    websockets: list[WebSocketCheck] = Field([], description="WebSocket checks.")
    workers: list[Workers] = Field([], description="Worker processes.")
