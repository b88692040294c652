"""The survey, run for real under dash as on a host, and read back; with it the part of apply.sh
that needs no systemd: what one writes the other finds as declared.

Both run in a mount and a network namespace of their own, on overlays: nothing of this machine is
changed and no packet leaves.
"""

import base64
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.x509 import DNSName
from pydantic import SecretStr

from callready.release import facts
from callready.release.authority import Authority as FleetAuthority
from callready.release.authority import Identity
from callready.release.bundle import bundle
from callready.release.declaration import ROOT, Release
from callready.release.facts import Facts, FileFact, Listener, SurveyError, UnitFact
from callready.release.manifest import FORMAT, FileLine, Manifest
from callready.release.plan import plan
from tasks import declare
from tests.support.inventories import SCHEMA, SECRETS, SFU1, TURN1, Authority, Edit, bare, box

# What is left in the background dies with the shell, which is process 1.
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]

# What the packages and `users` give a host.
ACCOUNTS = {"turnserver": 64999, "livekit": 64998, "app": 64997}
# The steps that need no packages, and of systemd no answer.
FILE_STEPS = {
    "lock_host",
    "stage",
    "arm",
    "activate",
    "withdraw",
    "write_rows",
    "install_pair",
    "install_identity",
    "drop_identity",
    "write_environment",
    "confirm",
}


class Sandbox:
    """A host made of this machine's files with overlays over what a deploy writes."""

    WRITTEN = ("/etc", "/var/lib", "/usr/local", "/usr/share", "/opt", "/srv", "/root")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mounts = ["mount -t tmpfs tmpfs /run", "ip link set lo up"]
        mounts += [f"mount --bind /bin/true /bin/{name}" for name in ("systemctl", "systemd-run")]
        for path in self.WRITTEN:
            upper, work = (folder / kind / path.strip("/") for kind in ("upper", "work"))
            upper.mkdir(parents=True)
            work.mkdir(parents=True)
            options = f"lowerdir={path},upperdir={upper},workdir={work}"
            mounts.append(f"mount -t overlay overlay -o {options} {path}")
        self.mounts = "\n".join(mounts)
        accounts = [
            f"grep -q ^{name}: /etc/passwd || {{ echo {name}:x:{uid}:{uid}::/:/bin/false "
            f">> /etc/passwd; echo {name}:x:{uid}: >> /etc/group; }}"
            for name, uid in ACCOUNTS.items()
        ]
        (folder / "schema.sql").write_text(SCHEMA)
        self.run(
            "\n".join(accounts),
            f"mkdir -p /srv/app /usr/share/coturn && cp {folder}/schema.sql /usr/share/coturn",
        )

    def run(self, *commands: str) -> str:
        """Standard output of shell commands, under dash; raises if one fails."""
        script = "\n".join(["set -eu", self.mounts, *commands])
        run = subprocess.run([*UNSHARE, "dash", "-s"], input=script, text=True, capture_output=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def survey(self, variables: Mapping[str, Iterable[str]], *before: str) -> Facts:
        """The facts after the commands `before`, with the survey sent over stdin as to a host."""
        (self.folder / "survey").write_text(facts.script(variables))
        sent_at = time.time()
        script = "\n".join([*before, f"SSH_PORT=2222 dash -s < {self.folder}/survey"])
        return facts.parse(self.run(script).splitlines(), sent_at)

    def apply(self, release: Release, found: Facts, only: Set[str] = FILE_STEPS) -> str:
        """Run the steps of the plan that need no systemd, and say what apply.sh printed."""
        made, printed = plan(release, found), ""
        for phase in (made.installing + made.switching, made.confirming, made.pruning):
            folder = self.folder / "bundle"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            steps = [step for step in phase if step.function in only]
            archive = base64.b64decode(bundle(release, steps))
            subprocess.run(["tar", "-xz", "-C", folder], input=archive, check=True)
            printed += self.run(f"dash {folder}/apply.sh {folder}")
        return printed


@pytest.fixture
def host() -> Iterator[Sandbox]:
    # In memory: apply.sh syncs what it writes, and a busy disk would be waited for.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Sandbox(Path(folder))


NOTHING: dict[str, list[str]] = {
    name: []
    for name in (
        "FILES",
        "PACKAGES",
        "CANDIDATES",
        "USERS",
        "UNITS",
        "SYSCTLS",
        "DATABASES",
        "TLS_ENDPOINTS",
        "ENVIRONMENTS",
        "PLACES",
        "REDIS",
        "IMAGES",
        "BINARIES",
    )
}


def test_every_variable_of_the_script_is_set_by_a_release() -> None:
    used = {name for name in NOTHING if f"${name}" in facts.script({})}
    assert used == set(Release().survey_variables()) == set(NOTHING)


@pytest.mark.tools
def test_the_machine_is_described(host: Sandbox) -> None:
    found = host.survey(NOTHING)
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    assert (found.os, found.os_version) == (
        release["ID"],
        release["VERSION_ID"].strip('"'),
    )
    assert (
        found.arch == subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    )
    assert abs(found.skew) < 30  # this machine's clock against itself
    assert found.ssh_ports == {2222}
    assert (found.current, found.manifest, found.files, found.packages) == ("", Manifest(), {}, {})


@pytest.mark.tools
def test_packages_users_files_and_binaries_are_found_or_not(host: Sandbox) -> None:
    found = host.survey(
        {
            **NOTHING,
            "FILES": ["/srv/plain", "/srv/link", "/srv/dangling", "/srv/absent", "/srv/folder"],
            "PACKAGES": ["dash", "no-such-package"],
            "CANDIDATES": ["dash", "no-such-package"],
            "USERS": ["root", "livekit", "no-such-user"],
            "BINARIES": ["/bin/sh", "/srv/plain", "/srv/absent"],
        },
        "umask 0; printf hello > /srv/plain; chmod 0640 /srv/plain; mkdir /srv/folder",
        "chown livekit:turnserver /srv/plain; ln -s plain /srv/link; ln -s nowhere /srv/dangling",
    )
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert found.files == {
        "/srv/plain": FileFact("", 0o640, "livekit", "turnserver", digest),
        "/srv/link": FileFact("plain", 0o640, "livekit", "turnserver", digest),
        "/srv/dangling": FileFact("nowhere"),
        "/srv/folder": FileFact(),
    }
    assert found.packages.keys() == {"dash"}
    assert found.candidates.keys() == {"no-such-package"}
    assert found.users == {"root", "livekit"}
    assert found.binaries == {"/bin/sh"}


@pytest.mark.tools
def test_listeners_are_found_with_family_address_and_process(host: Sandbox) -> None:
    listen = f"""
import socket, sys, time
held = []
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 4001)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 4002)),
    (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 4003)),
    (socket.AF_INET6, socket.SOCK_DGRAM, ("::", 4004)),
):
    s = socket.socket(family, kind); s.bind(address); held.append(s)
    if kind == socket.SOCK_STREAM: s.listen()
open("{host.folder}/ready", "w").close()
time.sleep(60)
"""
    (host.folder / "listen.py").write_text(listen)
    found = host.survey(
        NOTHING,
        f"{shlex.quote(sys.executable)} {host.folder}/listen.py &",
        f"until [ -e {host.folder}/ready ]; do sleep 0.02; done",
    )
    assert {(i.proto, i.address, i.port, i.is_loopback) for i in found.listeners} == {
        ("tcp", "127.0.0.1", 4001, True),
        ("udp", "0.0.0.0", 4002, False),
        ("tcp", "::1", 4003, True),
        ("udp", "*", 4004, False),
    }
    assert all(i.process.startswith("python") for i in found.listeners)


@pytest.mark.tools
def test_every_address_of_every_interface_is_found(host: Sandbox) -> None:
    found = host.survey(
        NOTHING,
        "ip link set lo up; ip link add br0 type bridge; ip link set br0 up",
        "ip address add 192.0.2.1/24 dev br0; ip address add 192.0.2.2 peer 192.0.2.9 dev br0",
        "ip address add 2001:db8::0:1/64 dev br0",
    )
    link_local = {address for address in found.addresses if address.startswith("fe80:")}
    assert found.addresses - link_local == {
        *("127.0.0.1", "::1", "192.0.2.1", "192.0.2.2", "2001:db8::1")
    }


@pytest.mark.tools
def test_tables_nat_and_a_changed_ruleset_are_noticed(host: Sandbox) -> None:
    rules = host.folder / "upper/srv/rules"
    rules.write_text("""table inet callready
delete table inet callready
table inet callready {
    chain input {
        type filter hook input priority filter; policy accept;
        iif lo counter accept
    }
}
""")
    digest = subprocess.check_output(["sha256sum", rules], text=True).split()[0]
    copy = "mkdir -p /etc/callready; cp /srv/rules /etc/callready/nftables.conf"
    loader = f"{copy}; dash {facts.HOST}/load-firewall.sh"
    # A counter that counted is no change.
    send = "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"
    found = host.survey(
        NOTHING,
        loader,
        f'{sys.executable} -c "import socket; {send}"',
        "nft list table inet callready | grep -q 'packets [1-9]'",
        "nft add table ip docker; nft add table ip6 other",
        "nft 'add chain ip docker post { type nat hook postrouting priority srcnat; }'",
        "nft add rule ip docker post masquerade",
    )
    assert found.tables == {"inet callready", "ip docker", "ip6 other"}
    assert found.nat_tables == {"ip docker"}
    assert found.ruleset == digest
    for change in (
        "nft add rule inet callready input counter drop",
        "nft delete table inet callready",
        "nft flush ruleset",
    ):
        assert host.survey(NOTHING, loader, change).ruleset == "changed"
    assert host.survey(NOTHING).ruleset == ""


@pytest.mark.tools
def test_a_kernel_setting_is_read_or_known_not_to_be_settable(host: Sandbox) -> None:
    key = "net.ipv4.ip_local_reserved_ports"
    found = host.survey(
        {**NOTHING, "SYSCTLS": [key, "net.no_such.key"]},
        f"echo 50000-60000 > /proc/sys/{key.replace('.', '/')}",
    )
    assert found.sysctls == {key: "50000-60000", "net.no_such.key": "-"}
    assert found.elsewhere == {key: ("50000-60000", "-")}


@pytest.mark.tools
def test_a_kernel_setting_is_what_others_say_last(host: Sandbox) -> None:
    """systemd-sysctl's own reckoning (sysctl.d(5)), without callready's file."""
    buffer, ports = "net.core.rmem_max", "net.ipv4.ip_local_reserved_ports"
    files = {
        "10-first.conf": f"{buffer} = 1000000",
        "20-slashes.conf": f"net/core/rmem_max=16000000\n# {buffer} = 1",
        "60-callready.conf": f"{buffer} = 5000000\n{ports} = 50000-60000",
    }
    before = ["rm -f /etc/sysctl.d/* /etc/sysctl.conf; mkdir -p /etc/callready/before"]
    before += [f"printf '{text}\n' > /etc/sysctl.d/{name}" for name, text in files.items()]
    # What was noted before callready changed it.
    before += [f"echo '{ports} = 8080' > /etc/callready/before/sysctl"]
    found = host.survey({**NOTHING, "SYSCTLS": [buffer, ports]}, *before)
    assert found.elsewhere == {
        buffer: ("16000000", "/etc/sysctl.d/20-slashes.conf"),
        ports: ("8080", "-"),
    }


OBSTACLES = {
    "folder": ("folder", "mkdir /srv/folder", "is a folder"),
    "pipe": ("special", "mkfifo /srv/pipe", "is a device, a socket or a named pipe"),
    "mount": (
        "mounted",
        "touch /srv/mount; mount --bind /etc/hostname /srv/mount",
        "is a mount point",
    ),
    "in-file/x": ("folder", "touch /srv/in-file", "cannot be there: /srv/in-file is not a folder"),
    "ro/sub/x": (
        "fixed",
        "mkdir /srv/ro; mount -t tmpfs -o ro tmpfs /srv/ro",
        "cannot be written: /srv/ro is immutable (chattr +i) or on a read-only file system",
    ),
    "ro-file": (
        "mounted",
        "touch /srv/ro-file; mount --bind -o ro /etc/hostname /srv/ro-file",
        "is a mount point",
    ),
}
NONE = ("file", "link", "broken", "gone", "no/folder/yet")


@pytest.mark.tools
def test_what_stands_where_a_file_has_to_be_put_is_found(host: Sandbox) -> None:
    found = host.survey(
        {**NOTHING, "PLACES": [f"/srv/{name}" for name in (*OBSTACLES, *NONE)]},
        *(made for _, made, _ in OBSTACLES.values()),
        "touch /srv/file; ln -s /srv/folder /srv/link; ln -s /nowhere /srv/broken",
    )
    assert found.obstacles == {
        f"/srv/{name}": (kind, words) for name, (kind, _, words) in OBSTACLES.items()
    }
    found = host.survey(
        {**NOTHING, "ENVIRONMENTS": ["/srv/no/.env:A", "/srv/env:A", "/srv/open:A"]},
        "ln -s /srv/open /srv/env; printf 'X=1\nY=\"open\nA=1\n' > /srv/open",
    )
    assert found.obstacles == {
        "/srv/no/.env": ("missing", "cannot be there: /srv/no does not exist"),
        "/srv/env": ("unclosed", "opens a quote in line 2 that nothing closes"),
        "/srv/open": ("unclosed", "opens a quote in line 2 that nothing closes"),
    }


@pytest.mark.tools
def test_the_certificate_that_is_served_is_read(host: Sandbox, authority: Authority) -> None:
    chain, key = authority.issue(DNSName(TURN1))
    serial = (
        subprocess.check_output(["openssl", "x509", "-in", chain, "-noout", "-serial"], text=True)
        .strip()
        .removeprefix("serial=")
        .lstrip("0")
        .lower()
    )
    found = host.survey(
        {**NOTHING, "TLS_ENDPOINTS": [f"127.0.0.1:5349,{TURN1}", f"127.0.0.1:5350,{TURN1}"]},
        f"openssl s_server -quiet -accept 127.0.0.1:5349 -cert {chain} -key {key} < /dev/zero &",
        "until ss -Hlnt | grep -q :5349; do sleep 0.02; done",
    )
    assert found.served == {("127.0.0.1:5349", TURN1): serial, ("127.0.0.1:5350", TURN1): ""}


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_what_apply_writes_the_survey_reads_back_as_declared(host: Sandbox) -> None:
    release = declare(box(), SFU1).release
    variables = release.survey_variables()
    host.run("mkdir -p /srv/app; printf 'DEBUG=1\\nTURN_TTL=5\\nlast=line\\n' > /srv/app/.env")
    printed = host.apply(release, bare())
    assert f"confirmed release {release.id}" in printed
    assert not [value for value in SECRETS.values() if value in printed]

    found = host.survey(variables)
    left = plan(release, found)
    needs_systemd = ("package", "user", "binary", "mask", "firewall", "unit", "sysctl")
    assert [c for c in left.changes if c.kind not in needs_systemd] == []
    assert "stage" not in [step.function for step in left.steps]
    assert found.current == release.id
    assert found.manifest.text == release.manifest.text
    assert found.templates == release.templates
    # The app's other keys are kept, in their places.
    lines = (host.folder / "upper/srv/app/.env").read_text().splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "DEBUG",
        "TURN_TTL",
        "last",
        "LIVEKIT_URL",
        "LIVEKIT_API_KEY",
        "LIVEKIT_API_SECRET",
        "STUN_URIS",
        "TURN_URIS",
        "TURN_SECRET",
    ]
    assert (host.folder / "upper/srv/app/.env").stat().st_mode & 0o777 == 0o600


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_what_waits_for_its_confirmation_is_noted_with_its_boot_and_the_format(
    host: Sandbox,
) -> None:
    release = declare(box(), SFU1).release
    assert host.survey(NOTHING).format == 0
    host.apply(release, bare(), only={"lock_host", "stage", "arm"})
    found = host.survey(NOTHING)
    waiting, process, who = found.pending.split(" ", 2)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (waiting, process.partition("@")[2]) == (release.id, boot)
    assert process.partition("@")[0].isdecimal() and who.startswith("root since ")
    assert (found.format, found.folder, found.has_state) == (FORMAT, "", True)


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_what_a_reloaded_unit_has_loaded_is_noted_as_it_is_declared(host: Sandbox) -> None:
    release = declare(box((SFU1, "edge", {})), SFU1).release
    edge = release.services["haproxy.service"]
    for path, file in release.files.items():
        there = host.folder / f"upper{path}"
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(file.content)
        there.chmod(file.mode)
    drop_in = f"/etc/systemd/system/{edge.unit}.d/callready.conf"
    for setting in ("ExecStartPost", "ExecReload"):
        noted = host.run(
            f'eval "$(sed -n s/^{setting}=+//p {drop_in})"', f"cat /run/callready/{edge.unit}"
        )
        assert noted == f"{edge.fingerprint}\n"


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_a_change_and_a_removal_leave_nothing_behind(host: Sandbox) -> None:
    first = declare(box(), SFU1).release
    host.run("mkdir -p /etc/coturn; echo 'an old configuration' > /etc/coturn/avatar.conf")
    host.apply(first, bare())
    assert host.run("cat /etc/coturn/avatar.conf").startswith("# coturn, pool avatar")

    edits: list[Edit] = [
        (SFU1, "pools", ["calls"]),
        ("*", "turn.pools.avatar", ...),
        (TURN1, "pools", ["calls"]),
        ("turn2.callready.test", "pools", ["calls"]),
        ("*", "turn.pools.calls.secrets", ["secret:livekit/second"]),
    ]
    second = declare(box(*edits), SFU1).release
    host.apply(second, host.survey(second.survey_variables()))
    found = host.survey(second.survey_variables())
    kinds = {change.kind for change in plan(second, found).changes}
    assert not kinds & {"file", "link", "row", "certificate", "environment"}
    # What stood there before callready is there again, and the rest is gone.
    assert host.run("cat /etc/coturn/avatar.conf") == "an old configuration\n"
    gone = "/etc/systemd/system/multi-user.target.wants/turnserver@avatar.service"
    assert host.run(f"[ -L {gone} ] || echo gone") == "gone\n"
    assert len(found.rows["/var/lib/turn/calls.db"]) == 1


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_an_edit_on_the_host_is_noticed_and_put_right(host: Sandbox) -> None:
    release = declare(box(), SFU1).release
    variables = release.survey_variables()
    host.apply(release, bare())
    host.run(
        "echo edited >> /etc/coturn/calls.conf; chmod 0644 /etc/livekit/livekit.yaml",
        "rm /etc/coturn/avatar.conf; echo TURN_TTL=1 >> /srv/app/.env",
        "sqlite3 /var/lib/turn/calls.db \"insert into turn_secret values ('callready.test', 'x')\"",
        f"echo x >> {ROOT}/tls/{SFU1}/current/fullchain.pem",
    )
    found = host.survey(variables)
    changed = {f"{c.kind} {c.what}" for c in plan(release, found).changes}
    assert {
        "file /etc/coturn/calls.conf (edited on the host since the last deploy)",
        "file /etc/livekit/livekit.yaml",
        "file /etc/coturn/avatar.conf",
    } <= changed
    kinds = {line.partition(" ")[0] for line in changed}
    assert {"file", "row", "certificate", "environment"} <= kinds
    host.apply(release, found)
    kinds = {change.kind for change in plan(release, host.survey(variables)).changes}
    assert not kinds & {"file", "link", "row", "certificate", "environment"}


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_nobody_but_its_reader_can_read_a_secret_on_the_host(host: Sandbox) -> None:
    release = declare(box(), SFU1).release
    host.apply(release, bare())
    (certificate,) = release.certificates.values()
    wanted = [SECRETS["livekit/api_secret"].encode(), SECRETS["turn/calls"].encode()]
    wanted.append(certificate.key)
    holders = [
        path
        for path in (host.folder / "upper").rglob("*")
        if path.is_file() and not path.is_symlink()
        if any(value in path.read_bytes() for value in wanted)
    ]
    assert sorted(path.name for path in holders) == [
        ".env",
        ".env",
        "both.pem",
        "calls.db",
        "livekit.yaml",
        "privkey.pem",
        "turn_secret",
    ]
    assert [path for path in holders if path.stat().st_mode & 0o007] == []
    # What was transferred is gone.
    assert not (host.folder / "bundle").exists()


@pytest.mark.tools
@pytest.mark.usefixtures("project")
def test_a_cut_leaves_no_readable_secret_behind(host: Sandbox) -> None:
    release = declare(box(), SFU1).release
    host.run("sed -i /^turnserver:/d /etc/passwd")
    with pytest.raises(AssertionError, match="invalid user"):
        host.apply(release, bare(), only={"write_rows"})
    (database,) = (host.folder / "upper/var/lib/turn").iterdir()
    assert SECRETS["turn/calls"].encode() in database.read_bytes()
    assert database.stat().st_mode & 0o077 == 0
    assert not (host.folder / "bundle").exists()


# Reading


def test_a_survey_that_was_cut_short_is_an_error() -> None:
    lines = ["os\tdebian\t13", "arch\tamd64"]
    with pytest.raises(SurveyError, match="cut short"):
        facts.parse(lines)
    assert facts.parse([*lines, "end"]).arch == "amd64"


def test_every_kind_of_line_is_read() -> None:
    text = """os|debian|13
arch|arm64
clock|1000.5
package|coturn|4.6.1-2|ii
candidate|coturn|4.6.1-2
user|livekit
current|0123-1
confirmed|0122
left
format|2
pending|0124 77 me since now|inactive
ruleset|abc
pair|turn.test|def|beef|request
manifest|file|/a|0644|root|root|ff
template|/a|dd
link|/a|/b
stat|/a|640|root|turnserver
sha|/a|ff
unit|x.service|loaded|active|enabled|12|yes|f00|/usr/bin/x (deleted)|aa,bb,
listen|tcp|*|22|sshd|ssh.service
listen|tcp|0.0.0.0|2022|systemd|ssh.socket
listen|udp|192.0.2.1|3478|turnserver|turnserver@calls.service
ssh|2222
address|192.0.2.1
address|fe80::1
table|inet|callready
nat|ip|nat
firewall|ufw
unit|firewalld.service|loaded|active|enabled|9|no|-|-|-
sysctl|net.core.rmem_max|5000000
database|/x.db
row|/x.db|feed
elsewhere|net.core.rmem_max|212992|/etc/sysctl.d/x.conf
elsewhere|net.core.wmem_max||-
obstacle|/srv/.env|folder|is a folder
served|192.0.2.1:5349|turn.test|beef
environment|/srv/.env|600|app|aa|bb
binary|/opt/livekit/1.13.5/livekit-server
a line of somebody's login banner
end"""
    found = facts.parse([line.replace("|", "\t") for line in text.splitlines()], 1000.0)
    assert (found.os, found.os_version, found.arch) == ("debian", "13", "arm64")
    assert found.packages == found.candidates == {"coturn": "4.6.1-2"}
    assert (found.folder, found.confirmed) == ("0123-1", "0122")
    assert (found.pending, found.is_stuck) == ("0124 77 me since now", True)
    assert (found.has_state, found.format) == (True, 2)
    assert (found.current, found.ruleset, found.pairs) == ("0123", "abc", {"turn.test": "def"})
    assert found.files == {"/a": FileFact("/b", 0o640, "root", "turnserver", "ff")}
    assert found.manifest.files == {"/a": FileLine("/a", "0644", "root", "root", "ff")}
    assert found.templates == {"/a": "dd"}
    assert found.units["x.service"] == UnitFact(
        "loaded", "active", "enabled", 12, True, "f00", "/usr/bin/x (deleted)", ("aa", "bb")
    )
    assert found.firewalls == {"ufw", "firewalld"}
    assert found.listeners[2] == Listener(
        "udp", "192.0.2.1", 3478, "turnserver", "turnserver@calls.service"
    )
    assert found.ssh_ports == {22, 2022, 2222}
    assert found.addresses == {"192.0.2.1", "fe80::1"}
    assert (found.tables, found.nat_tables) == ({"inet callready"}, {"ip nat"})
    assert found.sysctls == {"net.core.rmem_max": "5000000"}
    assert found.elsewhere == {"net.core.rmem_max": ("212992", "/etc/sysctl.d/x.conf")}
    assert found.obstacles == {"/srv/.env": ("folder", "is a folder")}
    assert (found.databases, found.rows) == ({"/x.db"}, {"/x.db": {"feed"}})
    assert found.served == {("192.0.2.1:5349", "turn.test"): "beef"}
    assert (found.serials, found.asked) == ({"turn.test": "beef"}, {"turn.test": "request"})
    assert found.environments["/srv/.env"] == facts.EnvironmentFact(0o600, "app", "aa", "bb")
    assert found.binaries == {"/opt/livekit/1.13.5/livekit-server"}


def test_neither_the_way_nor_the_survey_is_taken_for_skew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sent at 1000, answered at 1010, one second each way."""
    monkeypatch.setattr("callready.release.facts.time.time", lambda: 1010.0)
    for skew in (0.0, 60.0, -60.0):
        clocks = [f"clock\t{1001 + skew}", f"clock\t{1009 + skew}"]
        found = facts.parse([*clocks, "end"], 1000.0)
        # Both seconds may have been of one way.
        assert (found.skew, found.skew_error) == (skew, 1.0)


@pytest.mark.tools
def test_how_far_redis_is_and_nothing_where_it_does_not_answer(host: Sandbox) -> None:
    serve = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 4001)); "
        f"open('{host.folder}/ready', 'w').close(); time.sleep(60)"
    )
    at: dict[str, list[str]] = {**NOTHING, "REDIS": ["127.0.0.1", "4001"]}
    found = host.survey(
        at,
        f'{shlex.quote(sys.executable)} -c "{serve}" &',
        f"until [ -e {host.folder}/ready ]; do sleep 0.02; done",
    )
    assert found.redis_rtt > 0
    assert host.survey(at).redis_rtt == host.survey(NOTHING).redis_rtt == 0


def test_what_the_shell_is_given_is_quoted() -> None:
    script = facts.script({"FILES": ["/a b", "$(reboot)"]})
    assert script.startswith("FILES='/a b $(reboot)'\n")


@pytest.mark.tools
def test_certificates_of_the_fleet_are_installed_found_kept_and_dropped(host: Sandbox) -> None:
    secret = SecretStr("a" * 32)
    release, identity = Release(), Identity("turn1", ("192.0.2.21",), ("server",))
    given = release.identity("host", [secret], identity)
    assert given[0] == f"fleet.cert:{ROOT}/fleet/host/cert.pem"
    host.apply(release, host.survey(NOTHING))
    found = host.survey(NOTHING)
    assert found.identities["host"].has_key
    assert not FleetAuthority(secret).refuses(identity, found.identities["host"].certificate)
    assert host.run(f"stat -L -c %a {ROOT}/fleet/host/key.pem").strip() == "600"
    # HAProxy has both in one file.
    assert host.run(f"stat -L -c %a {ROOT}/fleet/host/both.pem").strip() == "600"
    host.run(f"cd {ROOT}/fleet/host && cat cert.pem key.pem | cmp - both.pem")
    # A unit that was given the one before is seen.
    unit = "/run/credentials/a.service"
    copies = [f"mkdir -p {unit}", f"cp {ROOT}/fleet/host/cert.pem {unit}/fleet.cert"]
    assert host.survey(NOTHING, *copies).outdated == set()
    assert host.survey(NOTHING, *copies, f"echo >> {unit}/fleet.cert").outdated == {"a.service"}
    moved = Release()
    moved.identity("host", [secret], replace(identity, addresses=("192.0.2.99",)))
    host.apply(moved, found)
    renewed = host.survey(NOTHING).identities["host"].certificate
    assert renewed != found.identities["host"].certificate
    assert len(host.run(f"ls -A {ROOT}/fleet").split()) == 2
    host.apply(Release(), host.survey(NOTHING))
    assert host.survey(NOTHING).identities == {}
