"""From the checks of a run to its diagnosis: what each of them needs of the network, and the
second look, in which what failed happens again while the hosts count packets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from traceback import extract_tb
from typing import Literal

import pytest

from callready.diagnosis import counting, exchanges
from callready.diagnosis.counting import Counted, Size, Watched
from callready.diagnosis.diagnose import diagnose
from callready.diagnosis.model import Diagnosis, Exchange, Flow, Symptom
from callready.diagnosis.narrowing import Counts, watch
from callready.probes import ProbeError, local_address, ports
from callready.probes.legs import LOSS
from callready.probes.webrtc import NO_VIDEO
from callready.settings.host_checks import unreachable
from tests.verify.check import CHECK, Check, params_of
from tests.verify.report import describe
from tests.verify.servers import Server
from tests.verify.targets import Pair, Route, Sfu, Site, Turn
from tests.verify.test_app import Endpoint
from tests.verify.test_monitor import monitor_of
from tests.verify.test_paths import EPERM

SECONDS = 6
"""How long the second look goes on at most."""


def diagnosis(items: Sequence[pytest.Function], site: Site) -> Diagnosis:
    """Why what failed of a run did; what the checks found is told whatever becomes of it."""
    try:
        return _diagnosis(items, site)
    except Exception as error:
        *_, at = extract_tb(error.__traceback__)  # the error's text may quote anything
        what = f"{type(error).__name__} at {at.filename}:{at.lineno}"
        return Diagnosis(notes=(f"no diagnosis: {what}; tell callready's authors",))


def _diagnosis(items: Sequence[pytest.Function], site: Site) -> Diagnosis:
    symptoms = {item: _symptom(item, site) for item in items}
    failed = [each for each in symptoms.values() if each.findings]
    again = {symptom: item for item, symptom in symptoms.items()}

    def look_again(lost: Sequence[Symptom]) -> tuple[Counts, list[Symptom]]:
        site.forget()
        return _counted(lost, site, again)

    # One that broke off says nothing of anything.
    passed = [each for item, each in symptoms.items() if item.stash[CHECK].passed]
    tried = [each for item in items for each in item.stash[CHECK].tried]
    return diagnose(failed, passed, tried, look_again)


def _symptom(item: pytest.Function, site: Site) -> Symptom:
    check = item.stash[CHECK]
    host, title = describe(item, site)
    silent = any("no answer in " in each.shown for each in check.findings)
    several = ("test_candidates", "test_call_from_the_app", "test_measured")
    is_one = item.path.stem != "test_calls" and item.originalname not in several
    fails = check.fails
    if not fails and is_one and any(each.evidence.endswith(EPERM) for each in check.findings):
        fails = "here"
    if not fails and silent and is_one:
        fails = "all"
    if any(each.suffers == NO_VIDEO for each in check.findings):
        fails = "large"
    return Symptom(
        item.originalname,
        host,
        title,
        tuple(_exchanges(item, site)),
        fails,
        tuple(check.findings),
        tuple(check.causes),
        bool(check.closed),
    )


def _exchanges(item: pytest.Function, site: Site) -> Iterator[Exchange]:
    """What a check needs of the network, by what it was made for."""
    for value in params_of(item).values():
        match value:
            case Route():
                found = exchanges.of_path(site.fleet, value.path, value.relay)
                check = item.stash[CHECK]
                if check.findings and not check.step:  # nobody can join
                    found = found[:1]
                elif check.step and value.sfu:  # the join passed
                    found = found[1:]
                if check.step and not check.step.startswith(("ICE", LOSS)):  # no relay yet
                    found = tuple(each for each in found if not each.relay)
                yield from found
            case Sfu(server):
                yield exchanges.signalling(server.name, server.settings)
                if item.path.stem == "test_calls" or item.originalname == "test_candidates":
                    yield exchanges.media(server.name, server.settings, "tcp", 0)
                    yield exchanges.media(server.name, server.settings, "udp", 0)
                if item.originalname == "test_candidates":
                    pairs = (pair for pair in site.pairs("udp", "tcp", "tls") if pair.sfu == value)
                    yield from (exchanges.turn(pair.turn.name, pair.turn.way) for pair in pairs)
            case Turn() if item.originalname != "test_name":  # that looks a name up, no more
                yield exchanges.turn(value.name, value.way)
            case Pair(sfu):
                yield exchanges.signalling(sfu.name, sfu.server.settings)
                for turn in dict.fromkeys((value.turn, *_used(item, sfu, site))):
                    yield from _relayed(sfu, turn)
            case Server(settings=settings) | Endpoint(server=Server(settings=settings)):
                for flow in item.stash[CHECK].closed:
                    yield exchanges.tcp(value.name, settings, flow.first, flow.family)
                if item.originalname == "test_measured":
                    yield _measured(value.name, site)
                elif settings.edge and item.path.stem in ("test_edge", "test_app", "test_monitor"):
                    yield exchanges.tcp(value.name, settings, settings.edge.port)
                if item.originalname == "test_call_from_the_app":
                    for pair in site.pairs("udp", "tcp", "tls"):
                        yield from _relayed(pair.sfu, pair.turn)


def _measured(host: str, site: Site) -> Exchange:
    """From the monitor to a host; this machine asks the monitor of it at its edge."""
    settings, monitor = site.fleet[host], monitor_of(site)
    edge = monitor.settings.edge
    family: Literal[4, 6] = 4 if settings.address else 6
    assert settings.watched and edge
    asked = exchanges.tcp(monitor.name, monitor.settings, edge.port).flow
    return Exchange(Flow(host, "tcp", *(settings.watched.port,) * 2, family), asked)


def _relayed(sfu: Sfu, turn: Turn) -> Iterator[Exchange]:
    relay = exchanges.relay_range(turn.name, turn.server.settings, turn.pool_name, 0)
    yield exchanges.turn(turn.name, turn.way)
    yield exchanges.media(sfu.name, sfu.server.settings, "udp", 0, relay)


def _used(item: pytest.Function, sfu: Sfu, site: Site) -> list[Turn]:
    """What a check uses beside what it was made for."""
    if item.originalname != "test_side_by_side":
        return []
    return [pair.turn for pair in site.pairs() if pair.sfu == sfu]


def _to_run(lost: Sequence[Symptom]) -> list[Symptom]:
    """All but what would send packets that are not counted here among those of the paths."""
    paths = [each for each in lost if each.check in ("test_path", "test_ipv6_relay")]
    udp = [flow for each in paths for flow in each.flows if flow.proto == "udp"]
    return [
        each
        for each in lost
        if each in paths or not any(own.meets(flow) for own in each.flows for flow in udp)
    ]


def _sent(site: Site) -> dict[tuple[Watched, Size], Counted]:
    """The packets that left this machine, by their flow, where that is known."""
    found: dict[tuple[Watched, Size], Counted] = {}
    for route, sent in site.sent():
        near = [each for each in exchanges.of_path(site.fleet, route.path) if not each.relay]
        one: tuple[Watched, Size] = Watched(near[-1].flow), "small"
        if sent:
            found[one] = Counted(left=sent + found.get(one, Counted()).left)
    return found


def _counted(
    lost: Sequence[Symptom], site: Site, items: Mapping[Symptom, pytest.Function]
) -> tuple[Counts, list[Symptom]]:
    """What the hosts counted while checks ran again, and which of them failed."""
    wanted = [exchange for each in lost for exchange in each.exchanges]
    addresses = {name: host.addresses for name, host in site.fleet.hosts.items()}
    found = watch(wanted, _here(site), addresses)
    watched = {site.servers[name]: flows for name, flows in found.items() if name in site.servers}
    chosen = _to_run(lost)
    threads = ThreadPoolExecutor(max(1, len(watched) + len(chosen)))
    is_on = dict(zip(watched, threads.map(_begin, watched.items()), strict=True))
    runs = {each: threads.submit(_fails, items[each], site) for each in chosen}
    wait(runs.values(), SECONDS)
    again = [each for each, run in runs.items() if not run.done() or run.result()]
    asked = [(server, flows) for server, flows in watched.items() if is_on[server]]
    ended = zip(asked, threads.map(_end, asked), strict=True)
    counted = {server.name: found for (server, _), found in ended if found}
    threads.shutdown(wait=False)  # what goes on has failed
    return counted | {"": _sent(site) | _connected(wanted, site)}, again


def _connected(wanted: Sequence[Exchange], site: Site) -> dict[tuple[Watched, Size], Counted]:
    """The ports that take TCP connections from here."""
    flows = {each.flow for each in wanted if each.flow.proto == "tcp" and not each.relay}
    found: dict[tuple[Watched, Size], Counted] = {}
    for flow in flows:
        for family, address in site.servers[flow.host].addresses.items():
            one: tuple[Watched, Size] = Watched(flow._replace(family=family)), "small"
            with suppress(ProbeError):
                if flow.family in (0, family) and ports.sweep(address, [flow.first]).open:
                    found[one] = Counted(answered=1)
    return found


def _begin(each: tuple[Server, list[Watched]]) -> bool:
    server, flows = each
    try:
        return bool(server.host.run(counting.script(flows)).rc == 0)
    except ProbeError:
        return False  # who cannot log in there cannot count


def _end(each: tuple[Server, list[Watched]]) -> dict[tuple[Watched, Size], Counted]:
    server, flows = each
    try:
        return counting.read(server.host.run(counting.END).stdout, flows)
    except (ProbeError, ValueError):
        return {}


def _here(site: Site) -> list[str]:
    """This machine's addresses as the hosts see them; none where there is NAT between."""
    found = list[str]()
    for server in site.hosts():
        for address in server.addresses.values():
            own = local_address(address)
            if own is None or (unreachable(own) and not unreachable(address)):
                return []
            found.append(own)
    return list(dict.fromkeys(found))


def _fails(item: pytest.Function, site: Site) -> bool:
    """Whether a check fails once more."""
    check = Check()
    known = {"check": check, "site": site, **params_of(item)}
    names = inspect.signature(item.function).parameters
    try:
        item.obj(**{name: known[name] for name in names})
    except Exception:  # whatever it is
        return True
    return bool(check.findings)
