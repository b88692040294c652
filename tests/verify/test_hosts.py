"""What each host is, against what the inventory says: one survey and one inspection a host, and
testinfra for the app's .env."""

import re
from datetime import timedelta
from hashlib import sha256
from typing import Literal

from callready.diagnosis.model import Cause, Flow, Place
from callready.release.declaration import ROOT, Environment
from callready.release.facts import Listener
from callready.release.refusals import in_the_way, is_version, of_addresses
from callready.settings.app import Workers
from callready.settings.ports import CALLER, EGRESS, parse_port
from tests.verify.check import Check, each, having, unseen
from tests.verify.servers import Server
from tests.verify.targets import Site

NFTABLES = f"{ROOT}/nftables.conf"
DEPLOY = "whether the last deploy of this host ended well; `pyinfra INVENTORY deploy.py --dry` "
DEPLOY += "says what it would change"

# What servers print at the start while systemd shows them active; what a caller suffers.
STARTUP_ERRORS = {
    "turnserver@": {
        r"Bad configuration format|Unknown argument|unrecognized option": (
            "coturn ignores a key of its configuration"
        ),
        r"Wrong address format": "coturn runs without one of its peer rules",
        r"cannot (find|load) (certificate|private key)|bad certificate": (
            "there is no TURN over TLS: callers behind strict firewalls get no relay"
        ),
        r"[Cc]annot (bind|open|create|start)|already in use": "a listener or relay is missing",
        r"\bERROR\b|FATAL": "coturn reports an error",
    },
    "livekit-server": {
        r'"level":"(error|fatal|panic|dpanic)"': "LiveKit reports an error",
        r"secret is too short": "a LiveKit secret can be guessed",
        r"UDP receive buffer is too small": "LiveKit drops packets under load",
        r"could not|unable to|panic:": "LiveKit reports an error",
    },
    "haproxy": {
        r"\[(ALERT|EMERG)\]": "the edge reports an error",
        r"Missing|deprecated|unknown": "the edge ignores a line of its configuration",
    },
}
READY = re.compile(r"^Started turnserver@|starting LiveKit server|^Started haproxy")
EXPOSURE = 2.0
# HAProxy's master stays root, in a cage; podman has to be root to make a container.
MORE_EXPOSURE = {"haproxy.service": 2.6, EGRESS: 4.5}
# Many providers' images have a DHCP client, and the packet filter lets its servers' answers in.
DHCP_CLIENT = [("udp", 68, 68), ("udp", 546, 546)]


def test_inventory(site: Site, check: Check) -> None:
    """Every host can be looked at"""
    for server in site.hosts():
        with check.probing(unseen):
            assert server.facts.os
    check.figure(f"{len(site.servers)} hosts")


@each(Site.hosts)
def test_state(server: Server, check: Check) -> None:
    """Nothing about the host itself breaks calls"""
    seen = server.inspection
    check.figure(f"{len(seen.processes)} processes, {len(seen.routes)} routes")
    check.figure(f"{len(server.facts.tables)} tables, {sum(seen.sockets.values())} relays")
    for cause in server.causes:
        if not cause.latent:
            check.found(cause.what, cause)


@each(Site.hosts)
def test_later(server: Server, check: Check) -> None:
    """Nothing fails at the next start, boot or renewal"""
    least = min((disk.free for disk in server.inspection.disks), default=0)
    check.figure(f"{len(server.inspection.reads)} files readable, {least / 2**30:.1f} GiB free")
    for cause in server.causes:
        if cause.latent:
            check.found(cause.what, cause)


@each(Site.hosts)
def test_system(server: Server, check: Check) -> None:
    """System and clock"""
    facts, limit = server.facts, server.settings.host.max_clock_skew
    check.figure(f"{facts.os} {facts.os_version} {facts.arch}, clock {facts.skew:+.2f} s")
    check.expect(
        abs(facts.skew) <= limit,
        f"callers get 401 from TURN: the host's clock is {facts.skew:+.0f} s off this machine's, "
        "and TURN credentials and tokens carry an expiry time",
        "timedatectl on the host and here",
    )


@each(having(lambda server: server.settings.is_server))
def test_addresses(server: Server, check: Check) -> None:
    """Addresses are the host's"""
    check.figure(f"{len(server.facts.addresses)} addresses")
    for why in of_addresses(server.settings, server.facts):
        check.expect(
            False,
            f"callers are told of an address that leads nowhere, or services do not start: {why}",
            "ip address on the host, and its address, private_address and internal_address",
        )


@each(having(lambda server: server.planned.packages))
def test_packages(server: Server, check: Check) -> None:
    """Packages at their versions"""
    missing = server.changes("package", "user")
    check.expect(not missing, f"not installed: {', '.join(missing)}", DEPLOY)
    for name, wanted in server.release.packages.items():
        found = server.facts.packages.get(name, "")
        if wanted and found:
            check.figure(f"{name} {found}")
            check.expect(
                is_version(found, wanted),
                f"{name} is {found}, the inventory says {wanted}: its configuration was made for "
                "another version",
                "apt history on the host (/var/log/apt/history.log) and turn.version",
            )
    check.figure(f"{len(server.release.packages)} packages")


@each(having(lambda server: server.planned.archive))
def test_binary(server: Server, check: Check) -> None:
    """livekit-server is the pinned release"""
    archive, unit = server.release.archive, server.facts.units.get("livekit-server.service")
    assert archive
    said = server.inspection.versions.get(archive.binary, "")
    check.figure(said.removeprefix("livekit-server version "))
    check.expect(
        said.endswith(archive.version),
        f"{archive.binary} says {said or 'nothing'} instead of {archive.version}",
        DEPLOY,
    )
    check.expect(
        unit and unit.binary == archive.binary,
        f"callers talk to another build: the running process is {unit.binary if unit else 'none'}",
        "livekit-server.service and a drop-in that changes it",
    )


@each(having(lambda server: server.planned.files))
def test_release(server: Server, check: Check) -> None:
    """Release is confirmed"""
    facts = server.facts
    check.figure(facts.folder)
    check.expect(
        not facts.pending and facts.folder == facts.confirmed,
        f"it runs release {facts.folder or 'none'} and would boot with "
        f"{facts.confirmed or 'none'}: callers get another configuration after the next reboot",
        "journalctl -u callready-revert -u callready-boot on the host; deploy again",
    )


@each(having(lambda server: server.planned.files))
def test_files(server: Server, check: Check) -> None:
    """Managed files as rendered"""
    wrong = server.changes("file", "link")
    check.figure(f"{len(server.release.files)} files, {len(server.release.links)} links")
    check.expect(
        not wrong,
        f"callers get something else than the inventory says: {', '.join(wrong)} "
        "is not as rendered",
        "who edited it (journalctl, /var/lib/callready/history); deploy again",
    )


@each(having(lambda server: server.planned.services))
def test_units(server: Server, check: Check) -> None:
    """Units run with their configuration"""
    for unit, wanted in server.release.services.items():
        found = server.facts.units.get(unit)
        look_at = f"systemctl status {unit} and journalctl -u {unit}"
        check.expect(
            found and found.is_running,
            f"{unit} is {found.active if found else 'not there'}: nothing it serves works",
            look_at,
        )
        if not found or not found.is_running:
            continue
        check.expect(
            found.enabled == "enabled",
            f"{unit} is {found.enabled}: after a reboot nothing it serves works",
            look_at,
        )
        check.expect(
            found.fingerprint == wanted.fingerprint,
            f"the process of {unit} is older than its configuration: callers get the old one",
            f"deploy again, which restarts it; {look_at}",
        )
        check.expect(
            not found.needs_reload and not found.binary.endswith("(deleted)"),
            f"{unit} runs with another unit file or binary than the host has",
            f"systemctl daemon-reload and a restart; {look_at}",
        )
        _check_credentials(server, unit, check)
        state = server.inspection.unit(unit)
        restarts, entered = (
            int(state.get(key) or 0) for key in ("NRestarts", "ActiveEnterTimestampMonotonic")
        )
        age = timedelta(seconds=round(server.inspection.uptime - entered / 1e6))
        check.figure(f"up for {age}" + f", {restarts} restarts by itself" * bool(restarts))


def _check_credentials(server: Server, unit: str, check: Check) -> None:
    """A file edited by hand, a restart, and the file put right again: the process has the edit."""
    rendered = {file.sha256 for file in server.release.files.values()}
    check.expect(
        unit not in server.facts.outdated,
        f"{unit} has a certificate of the fleet from before",
        f"systemctl restart {unit}",
    )
    for name, digest in ((n, d) for of, n, d in server.inspection.given if of == unit):
        check.expect(
            digest in rendered or name.startswith("fleet."),
            f"{unit} was started with another {name} than the rendered one",
            f"systemctl restart {unit}, which gives it what its file says now",
        )


@each(having(lambda server: server.planned.services))
def test_listening(server: Server, check: Check) -> None:
    """Planned ports have their listeners"""
    open_ports = {f"{item.proto}/{item.port}" for item in server.facts.listeners}
    count = 0
    for unit, service in server.release.services.items():
        count += len(service.listens)
        missing = [port for port in service.listens if port not in open_ports]
        check.expect(
            not missing,
            f"{unit} does not listen on {', '.join(missing)}: callers who are told that port "
            "get nothing",
            f"journalctl -u {unit}; another program on that port (ss -lntup)",
        )
    check.figure(f"{count} listeners")


@each(having(lambda server: server.planned.packages))
def test_listeners(server: Server, check: Check) -> None:
    """No unplanned listener"""
    others = [parse_port(value) for value in server.settings.host.other_listeners]
    allowed = [(use.proto, use.first, use.last) for use in server.node.ports] + others + DHCP_CLIENT
    unplanned = {
        f"{item.port}/{item.proto} ({_who(item)})"
        for item in server.facts.listeners
        if not item.is_loopback
        and item.unit != CALLER  # as a caller it has sockets that come and go
        and not any(item.proto == p and a <= item.port <= b for p, a, b in allowed)
    }
    check.figure(f"{len(server.facts.listeners)} sockets")
    # What our own open at other ports is said of their configuration.
    ours = all(any(unit in each for unit in server.release.services) for each in unplanned)
    check.expect(
        not unplanned,
        f"strangers may talk to {', '.join(sorted(unplanned))}, which no role opened",
        "what that program is for (ss -lntup); stop it, or list the port in host.other_listeners",
        Cause(
            "listener-unplanned",
            server.name,
            Place.NETWORK,
            f"a program that no role opened listens: {', '.join(sorted(unplanned))}",
            "stop it, or list its port in host.other_listeners",
            latent=True,
        )
        if not ours
        else None,
    )


def _who(item: Listener) -> str:
    return item.process if item.unit == "-" else f"{item.process} of {item.unit}"


@each(having(lambda server: NFTABLES in server.planned.files))
def test_firewall(server: Server, check: Check) -> None:
    """Firewall as rendered"""
    check.expect(
        not server.changes("firewall"),
        "the packet filter is not the rendered one: callers may be shut out, strangers let in",
        f"nft list table inet callready against {NFTABLES}, and who changed it; deploy again",
    )
    check.figure(f"next to {len(server.facts.tables) - 1} other tables")


@each(having(lambda server: NFTABLES in server.planned.files))
def test_connections(server: Server, check: Check) -> None:
    """Room for more connections"""
    used, most = (
        int(server.inspection.kernel.get(f"net.netfilter.nf_conntrack_{name}", 1))
        for name in ("count", "max")
    )
    check.figure(f"{used} of {most} tracked")
    check.expect(
        used < 0.8 * most,
        f"the kernel's table of connections is nearly full ({used} of {most}): new callers are "
        "dropped without a word",
        "net.netfilter.nf_conntrack_max, to raise it; conntrack -L for whose they are; "
        "firewall.notrack",
    )


@each(having(lambda server: server.planned.sysctls))
def test_kernel(server: Server, check: Check) -> None:
    """Kernel settings for media"""
    wrong = server.changes("sysctl")
    keys = server.release.sysctls
    fixed = [key for key in keys if server.facts.sysctls.get(key) == "-"]
    check.figure(f"{len(keys) - len(fixed)} set")
    if fixed:
        check.figure(f"{len(fixed)} not settable here")
    check.expect(
        not wrong,
        f"calls stutter under load, or lose their port to another program: {', '.join(wrong)} "
        "is not in force",
        "/etc/sysctl.d: a file that sorts after 60-callready.conf",
    )


@each(having(lambda server: server.planned.services))
def test_exposure(server: Server, check: Check) -> None:
    """Services are confined"""
    for unit in server.release.services:
        score = server.inspection.exposure.get(unit)
        check.figure(f"exposure {score}" if score is not None else "no score")
        limit = MORE_EXPOSURE.get(unit, EXPOSURE)
        check.expect(
            score is not None and score <= limit,
            f"a break-in through {unit} reaches the rest of the host: its exposure is "
            f"{'unknown' if score is None else score}, not {limit} or less",
            f"drop-ins of {unit} (systemctl cat), which loosen it",
        )


@each(having(lambda server: server.planned.services))
def test_journal(server: Server, check: Check) -> None:
    """No start-up error in the journal"""
    for unit in server.release.services:
        lines = server.inspection.said.get(unit, ())
        ready = next((i for i, line in enumerate(lines) if READY.search(line)), len(lines))
        check.figure(f"{ready} lines")
        named = (found for name, found in STARTUP_ERRORS.items() if unit.startswith(name))
        patterns: dict[str, str] = next(named, {})
        for line in lines[: ready + 1]:
            known = (text for pattern, text in patterns.items() if re.search(pattern, line))
            if suffers := next(known, None):
                check.expect(
                    False,
                    f"{suffers}: {unit} said at its start: {line[:160]}",
                    f"journalctl -u {unit}, and the setting it names",
                )


@each(having(lambda server: server.planned.databases))
def test_secrets(server: Server, check: Check) -> None:
    """TURN secrets as in the inventory"""
    wrong = server.changes("row")
    count = sum(len(rows) for rows in server.release.databases.values())
    check.figure(f"{count} rows")
    check.expect(
        not wrong,
        f"callers get 401 from TURN and no relay: {', '.join(wrong)} is not as the inventory says",
        "sqlite3 on the pool's userdb, and a rotation that was not deployed everywhere",
    )


@each(having(lambda server: server.planned.certificates))
def test_certificate_file(server: Server, check: Check) -> None:
    """Certificates on the host are served"""
    check.expect(
        not server.changes("certificate"),
        "the certificate on the host is not the one that the inventory names",
        "/etc/callready/tls/*/current, and who renewed it; deploy again",
    )
    for name, pair in server.release.certificates.items():
        serial = pair.serial or server.facts.serials.get(name, "")
        check.figure(f"{name} …{serial[-8:]}")
        for endpoint, unit in pair.endpoints:
            served = server.facts.served.get((endpoint, name), "")
            check.expect(
                served and served == serial,
                f"callers of {name} on {endpoint} get certificate {served or 'none'}, not the "
                "renewed one",
                f"systemctl reload {unit}, which reads it again without touching a call",
            )
            if not served:
                address, _, port = endpoint.rpartition(":")
                family: Literal[4, 6] = 6 if ":" in address else 4
                check.closed.append(Flow(server.name, "tcp", int(port), int(port), family))


@each(having(lambda server: server.planned.timers))
def test_renewal(server: Server, check: Check) -> None:
    """Certificates renew themselves"""
    for timer, service in server.release.timers.items():
        found, last = (server.facts.units.get(unit) for unit in (timer, service))
        check.expect(
            found and found.is_running and found.enabled == "enabled",
            f"in some weeks callers are refused by an expired certificate: {timer} does not run",
            f"systemctl status {timer}; deploy again",
        )
        check.expect(
            last and last.active != "failed",
            f"callers keep the old certificate until it expires: {service} failed",
            f"journalctl -u {service} on {server.name}",
        )
    for name in server.release.certificates:
        _fits, end = server.inspection.pairs.get(name, (False, 0))
        check.figure(f"{name} {(end - server.inspection.clock) // 86400} days")


@each(having(lambda server: server.planned.manifest))
def test_places(server: Server, check: Check) -> None:
    """Room for the next deploy's files"""
    check.figure(f"{len(server.release.files)} files")
    for why in in_the_way(server.release, server.facts):
        check.expect(False, f"the next deploy is refused: {why}", "what made it, and when")


@each(having(lambda server: server.planned.environments))
def test_environment(server: Server, check: Check) -> None:
    """The app's .env has LiveKit's keys"""
    for path, wanted in server.release.environments.items():
        found = server.facts.environments.get(path)
        look_at = f"{path} on {server.name}, and who edited it; deploy again"
        check.expect(found, f"the app has no {path}: it mints no tokens", look_at)
        if not found:
            continue
        check.figure(f"{len(wanted.values)} keys, mode {found.mode:04o}")
        differing = _differing_keys(server, path, wanted)
        check.expect(
            not differing,
            f"callers get 401: {', '.join(differing)} in {path} is not LiveKit's and coturn's",
            look_at,
        )
        check.expect(
            differing or found.sha256 == wanted.sha256,
            f"callers get 401: a later line of {path} sets one of {', '.join(wanted.values)} in "
            "another way (export, blanks, small letters), which the app may take instead",
            look_at,
        )
        check.expect(
            (found.mode, found.owner) == (0o600, wanted.owner),
            f"others may read the API secret: {path} is {found.mode:04o} of {found.owner}",
            look_at,
        )


def _differing_keys(server: Server, path: str, wanted: Environment) -> list[str]:
    """The keys whose lines in the file have another fingerprint than livekit.yaml's values."""
    command = "while IFS= read -r line; do printf '%%s ' \"${line%%%%=*}\"; "
    command += 'printf %%s "$line" | sha256sum; done < %s'
    found = dict(
        line.split()[:2]
        for line in server.host.check_output(command, path).splitlines()
        if len(line.split()) == 3
    )
    lines = zip(wanted.values, wanted.text.get_secret_value().splitlines(), strict=True)
    return [key for key, line in lines if found.get(key) != sha256(line.encode()).hexdigest()]


def _workers(server: Server) -> list[Workers]:
    return server.settings.app.workers if server.settings.app else []


@each(having(lambda server: server.planned.environments and _workers(server)))
def test_workers(server: Server, check: Check) -> None:
    """The app's worker processes"""
    for item in _workers(server):
        count = server.inspection.children.get(item.unit, 0)
        check.figure(f"{item.unit} {count}")
        check.expect(
            count == item.count,
            f"the app is slow or down: {item.unit} has {count} workers instead of {item.count}",
            f"systemctl status {item.unit} and its log",
        )
