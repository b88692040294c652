"""The app's own endpoints, as the settings name them."""

from collections.abc import Iterator
from typing import NamedTuple

from callready.probes import app
from callready.settings.models import App, HttpCheck, WebSocketCheck
from verify.check import Check, each, ms
from verify.targets import Server, Site


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


def _ca(server: Server) -> str | None:
    return server.settings.tls.ca if server.settings.tls else None


@each(lambda site: [Endpoint(at, item) for at, app in _apps(site) for item in app.health])
def test_health(endpoint: Endpoint, check: Check) -> None:
    """App is well: {endpoint.wanted.url}"""
    wanted = endpoint.wanted
    assert isinstance(wanted, HttpCheck)
    got = app.health(wanted.url, wanted.status, wanted.fields, _ca(endpoint.server))
    check.figure(f"{got.status} in {ms(got.rtt)}")


@each(lambda site: [Endpoint(at, item) for at, app in _apps(site) for item in app.websockets])
def test_websocket(endpoint: Endpoint, check: Check) -> None:
    """App answers: {endpoint.wanted.url}"""
    wanted = endpoint.wanted
    assert isinstance(wanted, WebSocketCheck)
    got = app.websocket(wanted.url, wanted.send, wanted.expect, _ca(endpoint.server))
    check.figure(f"connected in {ms(got.time_to_connect)}, answered in {ms(got.rtt)}")
