"""Each path that media can take, by itself."""

import errno
import os

import pytest

from callready.diagnosis.model import Fails, Tried
from callready.probes import ProbeError
from callready.probes.legs import LOSS
from tests.verify.check import Check, each, ms
from tests.verify.targets import Route, Site

EPERM = os.strerror(errno.EPERM)
"""What is said of a UDP packet that a filter of this machine's own does not let out."""

paths = pytest.mark.lane("paths")


def _try(route: Route, site: Site, check: Check) -> Tried:
    """What was found of a path."""
    if why := route.obstacle:
        check.figure(f"not tried: {why}")
        return Tried(route.path, None, why=why)
    try:
        leg = site.tried(route)
    except ProbeError as error:
        check.findings.append(error.finding)
        return Tried(route.path, None, why=error.finding.shown)
    check.figure(", ".join(f"{step.name} {ms(step.seconds)}" for step in leg.steps))
    if leg.rtt is not None:
        check.figure(f"RTT {ms(leg.rtt)}")
    if leg.error:
        check.findings.append(leg.error)
    if not leg.error:
        return Tried(route.path, True, leg.steps, leg.rtt)
    check.fails, check.step = _fails(leg.failed, leg.error.evidence), leg.failed
    return Tried(route.path, False, leg.steps, leg.rtt, leg.error.evidence, check.fails)


def _fails(step: str, why: str) -> Fails:
    if why.endswith(EPERM):
        return "here"
    if step == "offer":  # nothing was sent
        return ""
    if step == LOSS:
        return "some"
    return "large" if step.endswith(" B") else "all"


@paths
@each(Site.routes)
def test_path(route: Route, site: Site, check: Check) -> None:
    """Path: {route.words}"""
    check.tried.append(_try(route, site, check))


@paths
@each(Site.relays_of_ipv6)
def test_ipv6_relay(route: Route, site: Site, check: Check) -> None:
    """Path: {route.words}"""
    _try(route, site, check)  # clients take IPv4 relays: the same path passes without it
