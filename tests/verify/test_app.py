"""The app's own endpoints, as the settings name them."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import pytest
from pydantic import SecretStr

from callready.diagnosis.model import Cause, Place
from callready.probes import ProbeError, app, livekit, webrtc
from callready.settings.app import App, HttpCheck, WebSocketCheck
from callready.settings.pools import handed_out
from callready.settings.uris import stun_uri, turn_uris
from tests.verify.check import Check, each, ms
from tests.verify.servers import Server
from tests.verify.targets import Site


class Endpoint(NamedTuple):
    """An endpoint of the app on one host."""

    server: Server
    wanted: HttpCheck | WebSocketCheck

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self.server.name

    def __str__(self) -> str:
        return f"{self.name}-{self.wanted.url}"


def _apps(site: Site) -> Iterator[tuple[Server, App]]:
    for server in site.hosts():
        if server.planned.environments and server.settings.app:
            yield server, server.settings.app


@each(lambda site: [Endpoint(at, item) for at, app in _apps(site) for item in app.health])
def test_health(endpoint: Endpoint, check: Check) -> None:
    """App is well: {endpoint.wanted.url}"""
    wanted = endpoint.wanted
    assert isinstance(wanted, HttpCheck)
    with check.probing(partial(_down, endpoint.server)):
        got = app.health(wanted.url, wanted.status, wanted.fields, endpoint.server.ca)
        check.figure(f"{got.status} in {ms(got.rtt)}")


def _down(server: Server, error: ProbeError) -> Cause:
    return Cause(
        "app-down",
        server.name,
        Place.APP,
        f"the app on {server.name} does not answer as it should",
        "the app's unit and its log there",
        (error.finding.shown,),
        checks=("test_websocket", "test_api_is_guarded", "test_call_from_the_app"),
    )


@each(lambda site: [Endpoint(at, item) for at, app in _apps(site) for item in app.websockets])
def test_websocket(endpoint: Endpoint, check: Check) -> None:
    """App answers: {endpoint.wanted.url}"""
    wanted = endpoint.wanted
    assert isinstance(wanted, WebSocketCheck)
    with check.probing(partial(_down, endpoint.server)):
        got = app.websocket(wanted.url, wanted.send, wanted.expect, endpoint.server.ca)
        check.figure(f"connected in {ms(got.time_to_connect)}, answered in {ms(got.rtt)}")


@each(lambda site: [at for at, app in _apps(site) if app.url and app.api_token])
def test_api_is_guarded(server: Server, check: Check) -> None:
    """App hands out nothing to strangers"""
    url, ca = _url(server), server.ca
    for bearer in (None, SecretStr("x" * 40)):
        for ask in (
            lambda who: app.token(url, who, "probe", "probe", ca),
            lambda who: app.turn_credentials(url, who, ca),
        ):
            with check.probing(), suppress(app.Refused):
                ask(bearer)
                check.found(
                    f"strangers call at your expense: {url} gives them tokens or credentials",
                    Cause(
                        "app-open",
                        server.name,
                        Place.APP,
                        f"{url} gives strangers tokens or TURN credentials",
                        "the app's authentication: its API token in .env, and a restart",
                    ),
                )
    check.figure("401")


@pytest.mark.lane("calls")
@each(lambda site: [at for at, app in _apps(site) if app.url and app.api_token])
def test_call_from_the_app(server: Server, site: Site, check: Check) -> None:
    """Call with the app's own tokens and TURN credentials"""
    settings, url, ca = server.settings, _url(server), server.ca
    assert settings.app and settings.livekit
    bearer, room = settings.app.api_token[0], livekit.new_room()
    (at, first), (_, second) = (app.token(url, bearer, room, who, ca) for who in ("ann", "bob"))
    check.expect(
        at == settings.livekit.url,
        f"the app sends its users to {at} instead of {settings.livekit.url}",
        "LIVEKIT_URL in its .env, and whether it was restarted since",
        _stale(server),
    )
    status = livekit.validate(settings.livekit.url, first, ca)
    check.expect(
        status == 200,
        f"no call starts: LiveKit refuses the app's token with {status}",
        f"LIVEKIT_API_KEY and LIVEKIT_API_SECRET in {settings.app.env_file}, whether app and "
        "LiveKit were restarted since they changed",
        _stale(server),
    )
    given = app.turn_credentials(url, bearer, ca)
    pool = settings.livekit.turn_pool
    wanted = {*turn_uris(site.fleet, server.name, "app")}
    told = handed_out(site.fleet, server.name, "app")
    check.expect(
        wanted <= {*given.urls} <= wanted | {stun_uri(host, way) for host, way in told},
        f"the app sends its users to {', '.join(sorted(given.urls))}, which is not the pool {pool}",
        f"STUN_URIS and TURN_URIS in {settings.app.env_file}",
        _stale(server),
    )
    got = webrtc.call(settings.livekit.url, (first, second), [given], True, ca, 0.5)
    seconds = max(side.connect_seconds for side in got.participants)
    check.connected(seconds)
    check.figure(f"{ms(seconds)} to connect")
    check.figure(f"{len(given.urls)} ICE URIs")
    check.expect(
        {side.local for side in got.participants} == {"relay"},
        "the call did not go through the relay that the app names",
        "the probe (callready.probes.webrtc)",
    )


def _stale(server: Server) -> Cause:
    assert server.settings.app
    units = " ".join(server.settings.app.restart) or "it"
    return Cause(
        "app-stale",
        server.name,
        Place.APP,
        f"the app on {server.name} gives its users something else than the inventory says",
        f"{server.settings.app.env_file} there, and systemctl restart {units}: the app reads it "
        "when it starts",
        checks=("test_call_from_the_app",),
    )


def _url(server: Server) -> str:
    assert server.settings.app and server.settings.app.url
    return server.settings.app.url.rstrip("/")
