"""Each fault once, on one host each, several hosts at a time; what must hold is in faults.py."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import Lab, ca, plan
from tests.support.faults import FAULTS, Fault, fault
from tests.support.fleet import OBSTACLES, eventually, held, obstacle, starting
from tests.support.place import LONG_TIMER, Place

RETURNED = "this host has returned to release"
NEW = "        ct state invalid counter drop\n"

CALLS = "turnserver@calls.service"


@pytest.mark.parametrize("job", FAULTS, ids=str)
def test_fault(
    running: dict[str, list[Future[None]]], request: pytest.FixtureRequest, job: Fault
) -> None:
    for future in running[request.node.nodeid]:
        future.result()


def rule(text: str) -> dict[str, tuple[str, str]]:
    """A ruleset with another rule before the ones that accept."""
    return {"nftables.conf.j2": (NEW, f"{NEW}        {text}\n")}


# Rulesets


@fault("ruleset that locks out", timer=LONG_TIMER)
def _(place: Place) -> str:
    """the rendered ruleset drops new connections to port 22"""
    return place.fails(
        "no new SSH connection over IPv4", RETURNED, patch=rule("tcp dport 22 ct state new drop")
    )


@fault("lockout on IPv6 only", timer=LONG_TIMER)
def _(place: Place) -> str:
    """the rendered ruleset drops new connections to port 22 over IPv6"""
    return place.fails(
        "no new SSH connection over IPv6",
        RETURNED,
        patch=rule("meta nfproto ipv6 tcp dport 22 ct state new drop"),
    )


@fault("ruleset that shuts callers out", timer=LONG_TIMER)
def _(place: Place) -> str:
    """the rendered ruleset drops UDP to port 3478"""
    return place.fails("STUN of pool calls", RETURNED, patch=rule("udp dport 3478 drop"))


@fault("lockout while nobody is there")
def _(place: Place) -> str:
    """a ruleset that drops port 22, and the controller killed before it can notice"""
    with place.deploying(hold="connect", patch=rule("tcp dport 22 ct state new drop")) as process:
        os.killpg(process.pid, 9)
    return "nothing: the host returned by its own timer"


@fault("sshd on another port")
def _(place: Place) -> str:
    """sshd listens on 2222 too and the inventory says so; then a ruleset that drops 2222"""
    ports, restart = "/etc/ssh/sshd_config.d/ports.conf", "systemctl restart ssh"
    place.host.root(f"echo 'Port 22\nPort 2222' > {ports}; {restart}")
    try:
        place.reach_state(place.source)  # opens what sshd listens on
        place.use(place.target, timer=60)
        place.data["ssh_port"] = 2222
        known = Path(place.folder / "known_hosts")
        keys = [
            line.split(maxsplit=1)
            for line in Path(place.data["ssh_known_hosts_file"]).read_text().splitlines()
        ]
        known.write_text(
            "".join(
                ",".join(f"[{n}]:2222" for n in names.split(",")) + f" {key}\n"
                for names, key in keys
            )
        )
        place.data["ssh_known_hosts_file"] = str(known)
        run = place.run()
        assert run.status == 0, run.text
        said = place.fails(
            "no new SSH connection over IPv4",
            RETURNED,
            patch=rule("tcp dport 2222 ct state new drop"),
        )
        assert "tcp dport 2222" in place.host.root("nft list chain inet callready input")
    finally:
        place.host.root(f"rm {ports}; {restart}")
    place.reach_state(place.source)
    return said


@fault("another table that drops", timer=LONG_TIMER)
def _(place: Place) -> str:
    """a table of another program drops UDP to the new release's port"""
    chain = "type filter hook input priority 0; udp dport 3478 drop;"
    with place.deploying(hold="lock_host#0") as process:
        place.host.root(f"nft 'table inet other {{ chain in {{ {chain} }}; }}'")
        place.release()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "STUN of pool calls" in out + err, out + err
    assert "udp dport 3478 drop" in place.host.root("nft list table inet other")
    place.host.root("nft delete table inet other")
    return "STUN of pool calls … nobody's table was touched"


@fault("`flush ruleset` by someone else", timer=LONG_TIMER)
def _(place: Place) -> str:
    """`nft flush ruleset` on the host while a release waits for its confirmation"""
    with place.deploying(hold="gate") as process:
        place.host.root("nft flush ruleset")
        place.release()
        out, err = process.communicate(timeout=60)
    said = "another program has flushed nftables"
    assert process.returncode == 1 and said in out + err, out + err
    return f"{said} …"


# Hosts and lines


@fault("blackhole in the middle", "sfu")
def _(place: Place) -> str:
    """the line is cut after the switch and stays cut"""
    with place.deploying(hold="gate") as process:
        Lab().cut(place.host.name)
        place.release()
        out, err = process.communicate(timeout=90)
    Lab().mend(place.host.name)
    assert process.returncode == 1, out + err
    return "exit 1; the host returned by itself"


@fault("PMTU blackhole")
def _(place: Place) -> str:
    """after the switch, packets of more than 1200 bytes are lost and nobody is told"""
    with (
        place.deploying(hold="connect") as process,
        Lab().blackhole(place.host.name, "meta length > 1200"),
    ):
        place.release()
        out, err = process.communicate(timeout=90)
    assert process.returncode == 1 and "no new SSH connection over IPv4" in out + err, out + err
    return "no new SSH connection over IPv4 …"


@fault("conntrack full", timer=LONG_TIMER)
def _(place: Place) -> str:
    """after the switch, the host's table of tracked connections has no room left"""
    with place.deploying(hold="connect") as process, Lab().fill_conntrack(place.host.name):
        place.release()
        out, err = process.communicate(timeout=90)
    assert process.returncode == 1 and "no new SSH connection over IPv4" in out + err, out + err
    return "no new SSH connection over IPv4 …"


@fault("reboot inside the window", "sfu")
def _(place: Place) -> str:
    """the host reboots in order between the switch and the confirmation"""
    with place.deploying(hold="gate") as process:
        Lab().reboot(place.host.name)
        place.release()
        out, err = process.communicate(timeout=90)
    assert process.returncode == 1, out + err
    return "exit 1; at boot it has what was confirmed"


@fault("power cut while it reverts")
def _(place: Place) -> str:
    """the controller is killed, the timer reverts, the power is cut while that restarts coturn"""
    with place.deploying(hold="gate") as process:
        os.killpg(process.pid, 9)
        with_hold = held(place.host, CALLS)
        with_hold.__enter__()
        eventually(lambda: starting(place.host, CALLS))
        Lab().power_cut(place.host.name)
        Lab().boot(place.host.name)  # what held it was in /run
    return "nothing; at boot it has what was confirmed"


@fault("Ctrl-C", "sfu")
def _(place: Place) -> str:
    """SIGINT after the switch"""
    with place.deploying(hold="gate") as process:
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "callready: interrupted" in said
    return "exit 130; callready: interrupted …"


@fault("changed host key", "sfu")
def _(place: Place) -> str:
    """known_hosts has another key for the host"""
    place.use(place.target)
    known = place.folder / "other_hosts"
    key = (plan.STATE / "id_ed25519.pub").read_text().rsplit(" ", 1)[0]
    known.write_text(f"{place.host.fqdn},{place.host.ipv4} {key}\n")
    place.data["ssh_known_hosts_file"] = str(known)
    return place.fails("HAS CHANGED")


@fault("two operators at once", "sfu")
def _(place: Place) -> str:
    """two deploys looked at the host at the same moment and go on at the same moment"""
    for _ in range(20 if place.long else 3):
        place.ready(timer=60)
        one, two = place, place.twin()
        with one.deploying(hold="look") as first, two.deploying(hold="look") as second:
            for operator in (one, two):
                operator.release()
            both = [first.communicate(timeout=120), second.communicate(timeout=120)]
        assert sorted((first.returncode, second.returncode)) == [0, 1], both
        loser = "".join(both[0 if first.returncode else 1])
        assert "another deploy" in loser, loser
        assert place.sound() == place.target
        place.reach_state(place.target)
    return "another deploy …; exactly one of the two each time"


@fault("stale lock", "sfu")
def _(place: Place) -> str:
    """a deploy's traces of before: its lock file, a release that waits and no timer for it"""
    with place.deploying(hold="gate") as process:
        place.host.root("systemctl stop callready-dead-man.timer")
        os.killpg(process.pid, 9)
    place.reach_state(place.target)
    return "the next run has the host return first"


@fault("part of the fleet fails", start="A", hosts=2, timer=LONG_TIMER)
def _(place: Place, other: Place) -> str:
    """two hosts in one inventory: the first one's line is cut; then its new ruleset locks out"""
    for certificate in "AB":
        there = (other.host.ipv4, other.host.ipv6)
        ca.issue(other.host.fqdn, there, 90, place.folder / certificate)
    place.groups["turn"] += other.groups["turn"]
    Lab().cut(place.host.name)
    place.fails("Could not connect")
    Lab().mend(place.host.name)
    assert (place.sound(), other.sound()) == ("A", "B"), "a host that is there was not deployed"
    for each in (place, other):
        each.use("A", timer=60)
    place.groups["turn"] += other.groups["turn"]
    said = place.run("--json")
    assert said.status == 0 and said.changed == [other.host.name], said.text
    place.use("B", LONG_TIMER)
    place.groups["turn"] += [
        (
            other.host.fqdn,
            {**place.groups["turn"][0][1], "address": other.host.ipv4, "address6": other.host.ipv6},
        )
    ]
    said_so = f"not switched, because {place.host.fqdn} failed"
    place.fails(RETURNED, said_so, patch=rule("tcp dport 22 ct state new drop"))
    assert other.sound() == "A"
    return "cut off: named, the other is deployed. Locked out: … not switched, because … failed"


# Disks


@contextmanager
def small_disk(place: Place, options: str) -> Iterator[None]:
    """callready's own folders on a file system with little room."""
    folders = ("/etc/callready", "/var/lib/callready")
    for folder in folders:
        place.host.root(
            f"cp -a {folder} /run/kept && mount -t tmpfs -o {options} tmpfs {folder} "
            f"&& cp -aT /run/kept {folder} && rm -r /run/kept"
        )
    try:
        yield
        assert place.sound() == place.source
    finally:
        place.host.root(f"umount -l {' '.join(folders)}", check=False)


FILL = "for d in /etc/callready /var/lib/callready; do cat /dev/zero > $d/fill 2>&-; done; true"
FILES = """for d in /etc/callready /var/lib/callready; do mkdir $d/fill
n=0; while touch $d/fill/$n; do n=$((n + 1)); done; done 2>&-; true"""


@fault("full disk", "sfu")
def _(place: Place) -> str:
    """callready's folders have no room left when the deploy begins"""
    with small_disk(place, "size=128m,mode=755"):
        place.host.root(FILL)
        said = place.fails("No space left on device")
    return said


@fault("full disk after the switch was armed", "sfu")
def _(place: Place) -> str:
    """callready's folders have no room left from the switch on"""
    with small_disk(place, "size=128m,mode=755"):
        with place.deploying(hold="gate") as process:
            place.host.root(FILL)
            os.killpg(process.pid, 9)
        eventually(place.settled)
    return "nothing: the host returned by its own timer"


@fault("no inodes", "sfu")
def _(place: Place) -> str:
    """callready's folders can take no further file"""
    with small_disk(place, "nr_inodes=400,mode=755"):
        place.host.root(FILES)
        said = place.fails("No space left on device")
    return said


READ_ONLY = "for d in %s; do mount --bind $d $d; mount -o remount,bind,ro $d; done"


@fault("read-only file system", "sfu")
def _(place: Place) -> str:
    """/etc and /var are read-only when the deploy begins"""
    place.host.root(READ_ONLY % "/etc /var")
    said = place.fails("is immutable (chattr +i) or on a read-only file system")
    place.host.root("umount -l /etc /var")
    return said


@fault("the revert itself fails")
def _(place: Place) -> str:
    """/etc/callready is read-only when the timer fires; the controller is gone"""
    with place.deploying(hold="gate") as process:
        place.host.root(READ_ONLY % "/etc/callready")
        os.killpg(process.pid, 9)
    good = [line for line in place.good[place.source] if line.startswith("\t")]

    def firewall_is_back() -> bool:
        return [line for line in place.snapshot() if line.startswith("\t")] == good

    eventually(firewall_is_back, place.data["deploy"]["confirm_timeout"] + 20)
    assert place.host.root("ls /var/lib/callready/pending")
    place.host.root("umount -l /etc/callready")
    return "the firewall is back at once, the rest as soon as it can be written"


ENV = "/srv/app/.env"
KEY_IN_USE = "grep -o 'API[AB]' /run/credentials/livekit-server.service/livekit.yaml"


@fault("environment file that cannot be replaced", "sfu", timer=LONG_TIMER)
def _(place: Place) -> str:
    """after the switch was armed the app's environment file becomes a folder, a mount point,
    immutable"""
    for kind in OBSTACLES:
        with (
            place.deploying(hold="write_environment#0") as process,
            obstacle(place.host, kind, ENV) as words,
        ):
            place.release()
            out, err = process.communicate(timeout=120)
            assert f"{ENV} {words}" in out + err and RETURNED in out + err, out + err
            assert process.returncode == 1 and place.settled(), "it waits for that file"
            left = "find /srv/app /etc/callready -name '*callready-new' -o -path '*before*theirs'"
            assert not place.host.root(left)
    return f"{ENV} is a folder … {RETURNED}"


@fault("environment file that cannot be written back", "sfu")
def _(place: Place) -> str:
    """the controller is killed before the confirmation, and the environment file is immutable"""
    with place.deploying(hold="gate") as process:
        assert place.host.root(KEY_IN_USE) == f"API{place.target}"
        with obstacle(place.host, "immutable", ENV):
            os.killpg(process.pid, 9)
            eventually(lambda: place.host.root(KEY_IN_USE, check=False) == f"API{place.source}")
            assert not place.settled()
    eventually(place.settled)
    return "services are back at once, the file as soon as it can be written"


# What is deployed


@fault("wrong-architecture binary", "sfu")
def _(place: Place) -> str:
    """the archive's livekit-server is an ELF of another machine"""
    place.data["livekit"]["version"] = "1.13.7"
    return place.fails("livekit-server 1.13.7 does not run here")


@fault("bad checksum", "sfu")
def _(place: Place) -> str:
    """the archive is another one than the inventory has pinned"""
    place.data["livekit"] |= {"version": "1.13.7", "archive_sha256": {"amd64": "0" * 64}}
    return place.fails("is not the release: its SHA-256 differs")


@fault("broken template", "sfu")
def _(place: Place) -> str:
    """livekit.yaml is rendered with a key that livekit-server does not know"""
    return place.fails(
        "livekit-server refuses livekit.yaml",
        patch={"livekit.yaml.j2": ("\nrtc:", "\nnonsense: 1\nrtc:")},
    )


@fault("configuration that starts and does not serve", timer=LONG_TIMER)
def _(place: Place) -> str:
    """turnserver.conf is rendered with another realm than the secrets have"""
    return place.fails(
        "TURN allocation over udp", RETURNED, patch={"turnserver.conf.j2": ("realm=", "realm=not-")}
    )


@fault("secrets that differ")
def _(place: Place) -> str:
    """the rows of coturn's database are not the inventory's"""
    place.host.root("sqlite3 /var/lib/turn/calls.db \"update turn_secret set value='x'||value\"")
    run = place.reach_state(place.source)
    assert "row" in run.text
    return "the plan names the rows; put right"


@fault("port taken after the look", start="A", timer=LONG_TIMER)
def _(place: Place) -> str:
    """another program takes a port of the new release between the plan and the switch"""
    with place.deploying(hold="lock_host#0") as process, place.host.listening("tcp", 3479):
        place.release()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and RETURNED in out + err, out + err
    return RETURNED


@fault("expired certificate")
def _(place: Place) -> str:
    """the inventory's certificate has expired"""
    ca.issue(place.host.fqdn, (place.host.ipv4,), -1, place.folder / "old")
    place.data["tls"] |= {
        kind: f"{place.folder}/old/{{host}}.{end}"
        for kind, end in (("certificate", "pem"), ("key", "key"))
    }
    return place.fails("nothing was connected to", "expired")


@fault("daemon killed for memory")
def _(place: Place) -> str:
    """coturn gets the OOM killer's SIGKILL while a release waits for its confirmation"""
    with place.deploying(hold="gate") as process:
        place.host.root(f"systemctl kill -s KILL {CALLS}")
        place.release()
        process.wait(timeout=60)
    return f"exit {process.returncode}"


# Packages


@fault("package mirror down", start="none")
def _(place: Place) -> str:
    """the package sources of a bare host do not answer"""
    apt = "/etc/apt/apt.conf.d/90-lab"
    place.host.root(f"apt-get clean; rm -r /var/lib/apt/lists; sed -i.kept s/3143/3144/ {apt}")
    said = place.fails("coturn is in none of this host's package lists: W: Failed to fetch")
    place.host.root(f"mv {apt}.kept {apt}")
    return said


@fault("dpkg lock held", start="none")
def _(place: Place) -> str:
    """another program holds dpkg's lock for 10 s"""
    root = plan.STATE / "hosts" / place.host.name / "root"
    with open(root / "var/lib/dpkg/lock-frontend", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        threading.Timer(10, fcntl.lockf, (lock, fcntl.LOCK_UN)).start()
        place.reach_state(place.target)
    return "waits for it"


# What was there before

BARE = """
cd /; export LC_ALL=C
find etc opt srv usr/local var/lib/callready var/lib/turn home -path etc/ssl/certs -prune -o \
    -printf '%p %y %m %u %g %l\\n' 2>&-
find etc srv usr/local -type f ! -path 'etc/ssl/certs/*' ! -name '*-' -exec sha256sum {} + 2>&-
dpkg-query -W; nft list ruleset; systemctl list-unit-files --no-legend
sysctl -n net.ipv4.ip_local_reserved_ports
"""
BY_HAND = {"/etc/turnserver.conf": "realm=old\n", "/etc/livekit/livekit.yaml": "port: 1\n"}


@fault("remove", "sfu", start="none")
def _(place: Place) -> str:
    """a role deployed to a host with reserved ports and a masked unit of its own, and removed with
    remove.py"""
    ports = "net.ipv4.ip_local_reserved_ports"
    place.host.root(
        f"echo '{ports} = 8080,50000-50100' > /etc/sysctl.d/50-mine.conf; "
        "sysctl -q -p /etc/sysctl.d/50-mine.conf; "
        "systemctl mask coturn.service"
    )
    before = place.host.root(BARE, check=False).splitlines()
    place.reach_state("A")
    reserved = place.host.root(f"sysctl -n {ports}").split(",")
    assert "8080" in reserved and "50000-60000" in reserved, reserved
    place.reach_state("none")
    after = place.host.root(BARE, check=False).splitlines()
    assert before == after, sorted(set(before) ^ set(after))
    place.host.root(
        f"rm /etc/sysctl.d/50-mine.conf; sysctl -q -w {ports}=; systemctl unmask coturn.service"
    )
    return "every file, package, unit, rule and kernel setting as before"


@fault("takeover of a hand-made host", "sfu", start="none")
def _(place: Place) -> str:
    """a host with a livekit.yaml and turnserver.conf of its own, and a link to a livekit-server
    that is gone; its first deploy is cut short"""
    link = "/usr/local/bin/livekit-server"
    place.host.root(f"ln -s /opt/gone {link}")
    for path, text in BY_HAND.items():
        place.host.root(f"mkdir -p {os.path.dirname(path)}; printf %s '{text}' > {path}")

    def by_hand() -> dict[str, str]:
        assert place.host.root(f"readlink {link}") == "/opt/gone"
        return {p: place.host.root(f"cat {p}") + "\n" for p in BY_HAND}

    with place.deploying(hold="gate") as process:
        assert "rtc" in place.host.root("cat /etc/livekit/livekit.yaml")
        os.killpg(process.pid, 9)
    eventually(place.settled)
    assert by_hand() == BY_HAND
    place.reach_state("A")
    place.reach_state("none")
    assert by_hand() == BY_HAND
    place.host.root(f"rm {link} {' '.join(BY_HAND)}; rmdir /etc/livekit")
    return "after the revert and after a removal they are back"


@fault("drift", "sfu")
def _(place: Place) -> str:
    """a managed file was edited on the host"""
    path = "/etc/callready/nftables.conf"
    place.host.root(f"echo '# mine' >> {path}")
    place.use(place.source, timer=60)
    refused = place.run("--data", "keep_drift=1")
    assert refused.status == 1 and f"{path} was edited on the host" in refused.text, refused.text
    assert "# mine" in place.host.root(f"cat {path}")
    shown = place.reach_state(place.source)
    assert "-# mine" in shown.text
    return "keep_drift=1 refuses; otherwise shown before it is overwritten"
