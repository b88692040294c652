"""Every alert by its fault, on lab hosts: none in ten minutes of healthy calls; then each comes as
a mail and to a webhook and goes again after its fault, and of what is broken only the lowest layer
pages.

The hosts share the machine's kernel: its clock cannot be wrong on one of them, so nothing makes
ClockOff here; and when the processors are busy, whoever else works on them, all hosts say so.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from pydantic import SecretStr

from callready import docs
from callready.probes import ProbeError, webrtc
from callready.probes.turn import IceServer, TurnServer, client, mint
from callready.release.authority import Authority, Identity
from callready.settings.ports import CALLER, EXPORTERS, LOGS, MEASURE
from lab import Lab, plan
from tests.sabotage.sabotage import dropped_in, edited, restarted, rows, scripted
from tests.sabotage.services import certificate
from tests.sabotage.watching import FLEET
from tests.support.breakage import Packets, callers, filtered, inside
from tests.support.continuity import calls_of
from tests.support.crowd import crowd
from tests.support.fleet import (
    REPOSITORY,
    Fleet,
    Host,
    delivered,
    entry,
    eventually,
    found,
    stop,
    watched_inventory,
)
from tests.support.sink import Sink, sink

pytestmark = pytest.mark.long
SFU, TURN, APP, MONITOR = HOSTS = tuple(map(Host, ("h15", "h23", "h24", "h26")))
SMTP, HTTP, WATCHDOG = 2530, 8090, 8092
HEALTHY = 600  # seconds
QUOTA, EDGE = 100, 100  # allocations, connections
TOLD = ("/page", "/ticket")
MEDIA = Packets("in", family=6, proto="udp", ports="50000-60000")
RELAYED = Packets("in", family=6, proto="udp", ports="3478")


# Pages that may last beside those of other faults: they count what callers did, or are of the app,
# which test calls do without.
BESIDE = {"TokensRefused", "CallersCannotConnect", "EdgeBackendDown", "AppDown"}
Broken = AbstractContextManager[object]
Labels = Mapping[str, str]


@dataclass
class Told:
    """What became of a fault: from when to when it was there (time.monotonic, and since and until
    as alerts have it), its alert, and the seconds to its message and from its end to the last."""

    fault: str
    alert: Mapping[str, Any]
    since: str
    seconds: float
    until: str = ""
    ended: float = 0
    resolved: float = 0

    @property
    def name(self) -> str:
        return str(self.alert["labels"]["alertname"])

    @property
    def host(self) -> str:
        return str(self.alert["labels"]["host"])


def now() -> str:
    """As Alertmanager writes it, so far as it can be compared."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")


@dataclass
class Watch:
    """The fleet, who is told of it, and what came of each fault."""

    fleet: Fleet
    receiver: Receiver
    every: list[Told] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def sink(self) -> Sink:
        return self.receiver.heard

    def messages(self, status: str = "firing") -> list[tuple[float, dict[str, Any]]]:
        """Every alert of this status that the webhooks got, with its time; no test alerts."""
        every = [each for path in TOLD for each in self.sink.alerts(path, status)]
        return [each for each in every if "test" not in each[1]["labels"]]

    def mails(self, text: str) -> list[str]:
        """Mails that have it."""
        return [mail for _, _, mail in self.sink.mails if text in mail]

    def comes(
        self, fault: str, broken: Broken, *wanted: Labels, seconds: float = 240
    ) -> list[Told]:
        """Have a fault until each of its alerts, known by some labels, has come to the webhook and,
        in the same words, as a mail."""
        since, began, came = now(), time.monotonic(), []
        with broken:
            for labels in wanted:

                def told(labels: Labels = labels) -> tuple[float, dict[str, Any]] | None:
                    for at, alert in self.messages():
                        if labels.items() <= alert["labels"].items() and alert["startsAt"] > since:
                            return at, alert
                    return None

                if not (first := self.wait_for(told, seconds, f"{fault}: {labels}")):
                    continue
                at, alert = first
                summary = alert["annotations"]["summary"]
                self.wait_for(partial(self.mails, summary), 60, f"{fault}: a mail of {summary}")
                came.append(Told(fault, alert, since, at - began))
                print(f"{fault}: {summary} ({at - began:.0f} s)", flush=True)
            for each in came:
                each.ended = time.monotonic()
                each.until = now()
        self.every += came
        return came

    def goes(self, told: Told, seconds: float = 420) -> None:
        """Wait for the message that it is resolved."""

        def resolved() -> float | None:
            for at, alert in self.messages("resolved"):
                if all(alert[key] == told.alert[key] for key in ("labels", "startsAt")):
                    return at
            return None

        if at := self.wait_for(resolved, seconds, f"{told.fault}: its end"):
            told.resolved = at - told.ended
            print(f"after {told.fault}: {told.name} is over ({told.resolved:.0f} s)", flush=True)

    def calm(self) -> None:
        """Wait until nothing that wakes people is known of what is called."""
        query = f'ALERTS{{severity="page",alertname!~"{"|".join(BESIDE)}"}}'
        query += ' or callready_probe_success{probe!="app"} == 0'
        self.wait_for(lambda: not found(self.fleet, query), 300, "calm", pause=2)

    def wait_for(
        self, condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.2
    ) -> Any:
        """What it gives as soon as that is something; what never comes is noted, and the others go
        on."""
        end = time.monotonic() + seconds
        while not (result := condition()) and time.monotonic() < end:
            time.sleep(pause)
        if not result:
            print(f"did not come in {seconds:.0f} s: {what}", flush=True)
            self.missing.append(what)
        return result

    def others(self) -> list[tuple[str, str]]:
        """Alerts that came without a fault of their own."""
        return [
            (alert["startsAt"], alert["annotations"]["summary"])
            for _, alert in self.messages()
            if alert["labels"]["alertname"] != "CpuHigh"
            and not any(
                (alert["labels"]["alertname"], alert["labels"]["host"]) == (each.name, each.host)
                and each.since < alert["startsAt"] < each.until
                for each in self.every
            )
        ]


def alert(alertname: str, host: Host, **more: str) -> Labels:
    """The labels that an alert is known by."""
    return {"alertname": alertname, "host": host.fqdn, **more}


# Faults


def stopped(host: Host, unit: str) -> Broken:
    return scripted(host, f"systemctl stop {unit}", f"systemctl start {unit}")


@contextmanager
def off(host: Host) -> Iterator[None]:
    """Without power."""
    Lab().power_cut(host.name)
    try:
        yield
    finally:
        Lab().boot(host.name)


@contextmanager
def again(do: Callable[[], object], pause: float, threads: int = 1) -> Iterator[None]:
    """Do something again and again, whatever comes of it."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(pause):
            with suppress(AssertionError, OSError, ValueError, httpx.HTTPError, ProbeError):
                do()

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(go_on)
        try:
            yield
        finally:
            over.set()


@contextmanager
def all_of(*broken: Broken) -> Iterator[None]:
    with ExitStack() as stack:
        for each in broken:
            stack.enter_context(each)
        yield


def trusted() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=f"{plan.STATE}/ca.pem")


def app_with_another_secret(fleet: Fleet) -> Broken:
    """And its callers, who try to join with the tokens that it gives them, and have it ask LiveKit
    who is in the room, which it cannot (502)."""
    login = {"Authorization": f"Bearer {fleet.secrets['app/token']}"}

    def join() -> None:
        with httpx.Client(verify=trusted(), timeout=5) as web:
            asked = {"room": "any", "identity": "somebody"}
            given = web.post(f"https://{APP.fqdn}/token", json=asked, headers=login).json()
            for _ in range(3):
                web.get(f"https://{APP.fqdn}/participants?room=any", headers=login)
            web.get(f"https://{SFU.fqdn}/rtc/validate", params={"access_token": given["token"]})

    other = "s/^LIVEKIT_API_SECRET=.*/LIVEKIT_API_SECRET=of-another-fleet-0123456789abcdef/"
    return all_of(edited(APP, "/srv/app/.env", other, restarted("backend")), again(join, 2))


def app_that_does_not_start() -> Broken:
    """As one whose unit is not restarted; only the monitor asks for it."""
    empty = edited(
        APP, "/srv/app/.env", "s/^LIVEKIT_URL=.*/LIVEKIT_URL=/", "systemctl restart backend || true"
    )
    return all_of(dropped_in(APP, "backend", "Restart=no"), empty)


def callers_without_a_way(fleet: Fleet) -> Broken:
    """Whose network lets nothing through but HTTPS, and whose relay is away."""
    away = IceServer((f"turn:{plan.CALLER.ipv4}:9",), "nobody", "nothing")
    secret = SecretStr(fleet.secrets["livekit/api_secret"])

    def call() -> None:
        pair = webrtc.tokens("APIfleet", secret, f"lonely-{os.urandom(4).hex()}")
        ca = f"{plan.STATE}/ca.pem"
        webrtc.call(f"wss://{SFU.fqdn}", pair, [away], relay_only=True, ca_file=ca)

    return again(call, 0.1, threads=4)


def callers_who_lose(fleet: Fleet) -> Broken:
    """One in five, on their way to the SFU; they call again when they were cut off."""
    url, secret = f"wss://{SFU.fqdn}", fleet.secrets["livekit/api_secret"]
    over = threading.Event()

    def call() -> None:
        with calls_of(url, "APIfleet", secret, {}):
            over.wait(60)

    media = Packets("in", proto="udp", ports="50000-60000", loss=20)
    return all_of(filtered(callers(SFU), media), again(call, 0.1, threads=2), closing(over))


@contextmanager
def closing(over: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        over.set()


@contextmanager
def allocations(host: Host, secret: str, number: int) -> Iterator[None]:
    """So many more of a pool, held."""
    over, ready = threading.Event(), threading.Event()

    async def hold() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(number):
                credentials = mint(SecretStr(secret), 600)
                held = client(TurnServer(host.ipv4), credentials)
                await (await stack.enter_async_context(held)).allocate()
            ready.set()
            await asyncio.to_thread(over.wait)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, hold())
        try:
            eventually(lambda: ready.is_set() or done.done())
            yield
        finally:
            over.set()
            done.result()


@contextmanager
def busy_processors() -> Iterator[None]:
    """All of the machine's, with what lets everything else go first (SCHED_IDLE)."""
    burn = ["chrt", "--idle", "0", "sh", "-c", "while :; do :; done"]
    burning = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for each in burning:
            each.kill()
            each.wait()


FULL = """set -e; mkdir -p /run/small /srv/full; mount -t tmpfs -o size=8m small /run/small
mkdir /run/small/upper /run/small/work
mount -t overlay -o lowerdir=/usr/share/doc,upperdir=/run/small/upper,workdir=/run/small/work \
    overlay /srv/full
head -c 9M /dev/zero > /srv/full/filler || true"""
EMPTY = "umount /srv/full /run/small; rmdir /srv/full /run/small"
# A program that does not read what is sent to it, 200 times a second.
DEAF = """use Socket; socket(my $deaf, AF_INET, SOCK_DGRAM, 0) or die;
bind($deaf, pack_sockaddr_in(9, INADDR_LOOPBACK)) or die; socket(my $to, AF_INET, SOCK_DGRAM, 0);
while (1) { send($to, "x" x 1000, 0, getsockname $deaf); select(undef, undef, undef, 0.005) }"""


def deaf(host: Host) -> Broken:
    run = f"systemd-run -q --unit=others-deaf perl -e '{DEAF}'"
    return scripted(host, run, "systemctl stop others-deaf")


@contextmanager
def fleet_certificate(fleet: Fleet, days: int) -> Iterator[None]:
    """The monitor's own ends in so many days."""
    with patch("callready.release.authority.LIFETIME", timedelta(days=days)):
        own = Authority(SecretStr(fleet.secrets["fleet/ca"]))
        pair = own.issue(Identity("monitor", (), ("client",)))
    link, folder = f"{FLEET}/monitor", f"{FLEET}/.others"
    was = MONITOR.root(f"readlink {link}")
    files = zip(("cert.pem", "key.pem", "both.pem"), (*pair, b"".join(pair)), strict=True)
    for name, content in files:
        copy = f"umask 077; mkdir -p {folder}; cat > {folder}/{name}"
        subprocess.run(MONITOR.inside(copy), input=content, check=True)
    with scripted(MONITOR, f"ln -sfn .others {link}", f"ln -sfn {was} {link}; rm -r {folder}"):
        yield


@contextmanager
def waiting(fleet: Fleet, host: Host) -> Iterator[None]:
    """A release, after its deploy has died; the timer by which the host would return is stopped."""
    fleet.data["firewall"] = {"extra_ports": ["6379/tcp"]}
    process = fleet.start("--limit", host.fqdn)
    pending = "ls /var/lib/callready/pending 2> /dev/null"
    eventually(lambda: bool(host.root(pending, check=False) or process.poll() is not None))
    assert process.poll() is None, process.communicate()
    stop(process)
    fleet.restore()
    host.root("systemctl stop callready-dead-man.timer")
    yield


def keys_of_another_fleet() -> Broken:
    other = 's/"APIcaller": .*/"APIcaller": "of-another-fleet-0123456789abcdef"/'
    return edited(SFU, "/etc/livekit/livekit.yaml", other, restarted("livekit-server"))


def other_secret() -> Broken:
    table = "update turn_secret set value = "
    return rows(TURN, "calls", f"{table} 'x' || value", f"{table} substr(value, 2)")


# The fleet


class Receiver:
    """Who is told, at a port for mails and one for webhooks; may be away."""

    def __init__(self, smtp: int, http: int) -> None:
        self.ports, self.stack = (smtp, http), ExitStack()
        self.come()

    def come(self) -> None:
        self.heard = self.stack.enter_context(sink(plan.MACHINE.ipv4, *self.ports))

    @contextmanager
    def away(self) -> Iterator[None]:
        self.stack.close()
        try:
            yield
        finally:
            self.come()


@pytest.fixture(scope="module")
def dead_man() -> Iterator[Receiver]:
    """The switch elsewhere."""
    receiver = Receiver(SMTP + 1, WATCHDOG)
    yield receiver
    receiver.stack.close()


@pytest.fixture(scope="module")
def watch(dead_man: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """The fleet after its first deploy, when all that is called answers."""
    with delivered(*(host.name for host in HOSTS)):
        groups, data, names = watched_inventory(SFU, MONITOR, SMTP, HTTP)
        groups["turn"].append(entry(TURN, pools=["calls"]))
        groups["app"] = [entry(APP)]
        data["app"] = {
            "url": f"https://{APP.fqdn}",
            "upstream": "127.0.0.1:8000",
            "api_token": "secret:app/token",
            "env_file": "/srv/app/.env",
            "owner": "app",
            "restart": ["backend.service"],
        }
        data["turn"]["total_quota"], data["edge"] = QUOTA, {"max_connections": EDGE}
        data["monitor"]["ticket"]["mail"] = ["team@lab.test"]
        data["monitor"]["watchdog"] = f"http://{plan.MACHINE.ipv4}:{WATCHDOG}/watchdog"
        folder = tmp_path_factory.mktemp("watched")
        fleet = Fleet(folder, groups, data, [*names, "app/token"])
        Lab().install_backend(APP.name)
        receiver = Receiver(SMTP, HTTP)
        try:
            fleet.deploy()
            watch = Watch(fleet, receiver)
            watch.calm()
            assert not watch.missing
            yield watch
        finally:
            receiver.stack.close()


def try_who_is_told(fleet: Fleet) -> int:
    """What `make alert-test` ends with."""
    run = [sys.executable, "-m", "callready.alert_test", str(fleet.inventory)]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    assert fleet.marker not in done.stdout + done.stderr
    return done.returncode


def test_nobody_is_told_of_healthy_calls(watch: Watch, dead_man: Receiver) -> None:
    """Ten minutes; beside the test calls there are a direct one and one through each relay."""
    secret, turn = watch.fleet.secrets["livekit/api_secret"], watch.fleet.secrets["turn/calls"]
    relays = dict.fromkeys((f"turn:{host.fqdn}:3478?transport=udp" for host in (SFU, TURN)), turn)
    end = time.monotonic() + HEALTHY
    with calls_of(f"wss://{SFU.fqdn}", "APIfleet", secret, relays) as calls:
        assert try_who_is_told(watch.fleet) == 0
        while time.monotonic() < end:
            assert watch.others() == []
            time.sleep(1)
    assert len(calls) == 3 and not [each for pair in calls.values() for each in pair if each.gone]
    assert len(list(dead_man.heard.alerts("/watchdog"))) >= HEALTHY / 60 - 1


def test_everybody_is_told_of_every_fault_and_of_nothing_else(
    watch: Watch, dead_man: Receiver
) -> None:
    """Faults that have nothing in common at the same time."""
    fleet, comes = watch.fleet, watch.comes
    called = threading.Event()

    def of_the_sfu() -> None:
        lonely = alert("CallersCannotConnect", SFU)
        comes("callers whose relay is away", callers_without_a_way(fleet), lonely, seconds=600)
        for fault, broken, name in (
            # First: it is not said for five minutes after what is below it.
            ("UDP of media dropped over IPv6", filtered(inside(SFU), MEDIA), "CallsFail"),
            ("HAProxy stopped", stopped(SFU, "haproxy"), "EdgeDown"),
            ("LiveKit stopped", stopped(SFU, "livekit-server"), "LiveKitDown"),
            ("LiveKit has other keys", keys_of_another_fleet(), "SignallingFails"),
            ("power cut", off(SFU), "HostDown"),
        ):
            watch.calm()
            comes(fault, broken, alert(name, SFU))
        watch.calm()

    def of_the_turn_host() -> None:
        secret, of = fleet.secrets["turn/calls"], {"pool": "calls"}
        down = alert("TurnDown", TURN, **of)
        first = comes("coturn stopped", stopped(TURN, "turnserver@calls"), down)
        watch.calm()
        held = allocations(TURN, secret, QUOTA * 85 // 100)
        comes("85 % of the allocations held", held, alert("TurnNearQuota", TURN, **of))
        comes("coturn has another secret", other_secret(), alert("TurnFails", TURN, **of))
        watch.calm()
        comes("exporters stopped", stopped(TURN, EXPORTERS), alert("MetricsMissing", TURN))
        for each in first:
            watch.goes(each)
        comes("UDP of TURN dropped over IPv6", filtered(inside(TURN), RELAYED), down)
        watch.calm()

    def of_the_app() -> None:
        held = crowd(APP, APP.fqdn, EDGE * 9 // 10, 0)
        comes("90 % of the connections held", held, alert("EdgeNearlyFull", APP))
        full = Lab().fill_conntrack(APP.name, 0.9)
        comes("90 % of the table filled", full, alert("ConntrackFilling", APP))
        other = app_with_another_secret(fleet)
        behind = alert("EdgeBackendDown", APP, proxy=f"to_{APP.fqdn.replace('.', '_')}")
        refused = alert("TokensRefused", SFU)
        comes("the app has another secret", other, behind, refused, seconds=900)
        failed = alert("UnitFailed", APP, name="backend.service")
        comes("the app does not start", app_that_does_not_start(), alert("AppDown", APP), failed)

    def of_the_monitor() -> None:
        gone = alert("MessagesFail", MONITOR, integration="webhook")
        comes("a webhook is away", dead_man.away(), gone)
        assert called.wait(1800)
        comes("the caller stopped", stopped(MONITOR, CALLER), {"alertname": "ProbesStopped"})

    def who_are_called() -> None:
        with ThreadPoolExecutor() as pool:
            for each in [pool.submit(of_the_sfu), pool.submit(of_the_turn_host)]:
                each.result()
        called.set()

    def of_a_release() -> None:
        pending = alert("ReleasePending", MONITOR)
        comes(
            "a release waits, its timer is stopped", waiting(fleet, MONITOR), pending, seconds=900
        )
        back = scripted(MONITOR, "systemctl start callready-revert.service", "true")
        comes("the host returned by itself", back, alert("ReleaseReverted", MONITOR))

    # Whoever else works on this machine.
    before = found(fleet, 'ALERTS{alertname="CpuHigh"}')
    busy = "all processors busy" + ", some minutes before already" * bool(before)
    of_one: list[tuple[str, Broken, *tuple[Labels, ...]]] = [
        ("a program does not read", deaf(APP), alert("UdpReceiveBufferFull", APP)),
        ("a disk is full", scripted(APP, FULL, EMPTY), alert("DiskFilling", APP)),
        (
            "a certificate of 10 days is served",
            certificate(APP, "haproxy", APP.fqdn, 10),
            alert("CertificateExpires", APP, name=APP.fqdn),
        ),
        (
            "the monitor's certificate has 10 days",
            fleet_certificate(fleet, 10),
            alert("CertificateExpires", MONITOR, name="fleet"),
        ),
        ("logs are not sent", stopped(APP, LOGS), alert("LogsMissing", APP)),
        ("measuring stopped", stopped(SFU, MEASURE), alert("MeasurementStale", SFU)),
        ("20 % of callers' packets lost", callers_who_lose(fleet), alert("PacketLoss", SFU)),
        (busy, busy_processors(), *(alert("CpuHigh", host) for host in HOSTS)),
    ]
    with ThreadPoolExecutor(16) as pool:
        lanes = (who_are_called, of_the_app, of_the_monitor, of_a_release)
        running: list[Future[object]] = [pool.submit(each) for each in lanes]
        running += [pool.submit(partial(comes, *each, seconds=1500)) for each in of_one]
    for each in running:
        each.result()
    for told in watch.every:
        if not told.resolved and not (before and told.name == "CpuHigh"):
            watch.goes(told, 1000)
    assert watch.missing == [] == watch.others()
    named = {each.name for each in watch.every}
    assert named == {*docs.alerts(())} - {"ClockOff", "Watchdog"}
    assert fleet.marker not in str([watch.sink.posts, watch.sink.mails])
    write(watch.every)


def write(found: list[Told]) -> None:
    """The table of docs/watching.md."""
    path = REPOSITORY / "docs/watching.md"
    head, begin, rest = path.read_text().partition("<!-- measured -->\n")
    _, end, tail = rest.partition("<!-- end of measured -->\n")
    lines = ["| alert | fault | to the message | after it, to the last |", "|---|---|---|---|"]
    for name in docs.alerts(()):
        for fault in dict.fromkeys(each.fault for each in found if each.name == name):
            each = max(
                (each for each in found if (each.name, each.fault) == (name, fault)),
                key=lambda each: each.seconds,
            )
            times = f"{duration(each.seconds)} | {duration(each.resolved)}"
            lines.append(f"| {name} | {fault} | {times} |")
    assert begin and end
    path.write_text(head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail)


def duration(seconds: float) -> str:
    minutes = f"{seconds / 60:.1f} min" if seconds else "not waited for"
    return f"{seconds:.0f} s" if 0 < seconds < 180 else minutes


def test_who_takes_no_message_is_named(watch: Watch) -> None:
    with watch.receiver.away():
        assert try_who_is_told(watch.fleet) == 1
