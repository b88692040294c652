"""Sabotages of the hosts: units, files, credentials, certificates, limits, the app, and what shows
only at the next start. Files, units and ports are those of inventories/lab."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import Lab, ca, hosts, plan
from tests.sabotage.sabotage import (
    Broken,
    Service,
    dropped_in,
    edited,
    killed_again_and_again,
    restarted,
    rows,
    sabotage,
    scripted,
    signalled,
)
from tests.support.fleet import Host

LIVEKIT, EDGE = restarted("livekit-server"), restarted("haproxy")
CALLS, AVATAR = restarted("turnserver@calls"), restarted("turnserver@avatar")
CALLS_CONF, AVATAR_CONF = "/etc/coturn/calls.conf", "/etc/coturn/avatar.conf"
LIVEKIT_YAML, ENV = "/etc/livekit/livekit.yaml", "/srv/app/.env"


# Units


@sabotage("units", "sfu", "unit-stopped")
def livekit_stopped(at: Service) -> Broken:
    return scripted(at.sfu, "systemctl stop livekit-server", LIVEKIT)


@sabotage("units", "avatar", "unit-stopped")
def coturn_stopped(at: Service) -> Broken:
    return scripted(at.avatar, "systemctl stop turnserver@avatar", AVATAR)


@sabotage("units", "sfu", "unit-stopped")
def the_edge_stopped(at: Service) -> Broken:
    return scripted(at.sfu, "systemctl stop haproxy", EDGE)


@sabotage("units", "sfu", "unit-hung")
def livekit_hung(at: Service) -> Broken:
    return signalled(at.sfu, "livekit-server")


@sabotage("units", "turn", "unit-hung")
def coturn_hung(at: Service) -> Broken:
    return signalled(at.turn, "turnserver@calls")


@sabotage("units", "sfu", "unit-hung")
def the_edge_hung(at: Service) -> Broken:
    return signalled(at.sfu, "haproxy")


@sabotage("units", "sfu", "unit-flapping")
def livekit_killed_every_12_seconds(at: Service) -> Broken:
    return killed_again_and_again(at.sfu, "livekit-server", 12)


@sabotage("units", "turn", "unit-flapping")
def coturn_killed_every_8_seconds(at: Service) -> Broken:
    return killed_again_and_again(at.turn, "turnserver@calls", 8)


@sabotage("units", "sfu", "unit-throttled")
def livekit_with_little_processor_time(at: Service) -> Broken:
    """The lab's hosts have no controller for it: the limit is there and binds nobody."""
    return limited(at.sfu, "livekit-server", "CPUQuota=5%")


@sabotage("units", "turn", "unit-throttled", "unit-limits")
def coturn_with_little_memory(at: Service) -> Broken:
    return limited(at.turn, "turnserver@calls", "MemoryMax=20M")


def limited(host: Host, unit: str, limit: str) -> Broken:
    """As `systemctl set-property` does it, until the next boot."""
    return scripted(
        host,
        f"systemctl set-property --runtime {unit} {limit}",
        f"rm -r /run/systemd/system.control/{unit}.service.d; systemctl daemon-reload",
    )


@sabotage("units", "turn", "foreign-drop-in", "unit-limits")
def coturn_with_few_files(at: Service) -> Broken:
    return dropped_in(at.turn, "turnserver@calls", "LimitNOFILE=64", CALLS)


@sabotage("units", "sfu", "stale-process")
def livekit_older_than_its_configuration(at: Service) -> Broken:
    """Edited, started, and the file put right again."""
    script = (
        f"set -e; file=$(readlink -f {LIVEKIT_YAML}); cp -a $file /run/kept; "
        f"sed -i 's/tcp_port: 7881/tcp_port: 7882/' $file; {LIVEKIT}; cp -a /run/kept $file; "
        "rm /run/kept"
    )
    return scripted(at.sfu, script, LIVEKIT)


@sabotage("units", "sfu", "stale-process")
def binary_of_livekit_replaced(at: Service) -> Broken:
    replace = "cd /opt/livekit/*/; cp -a livekit-server others; mv others livekit-server"
    return scripted(at.sfu, replace, LIVEKIT)


# Configuration


@sabotage("configuration", "sfu", "node-ip-wrong", "file-edited")
def another_node_ip(at: Service) -> Broken:
    return edited(at.sfu, LIVEKIT_YAML, "s/node_ip: .*/node_ip: 198.51.100.99/", LIVEKIT)


@sabotage("configuration", "sfu", "file-edited")
def other_media_ports(at: Service) -> Broken:
    sed = "s/port_range_start: .*/port_range_start: 40000/; s/range_end: .*/range_end: 41000/"
    return edited(at.sfu, LIVEKIT_YAML, sed, LIVEKIT)


@sabotage("configuration", "sfu", "file-edited")
def livekit_past_the_edge(at: Service) -> Broken:
    return edited(at.sfu, LIVEKIT_YAML, "/bind_addresses/d", LIVEKIT)


@sabotage("configuration", "sfu", "file-edited")
def old_tls(at: Service) -> Broken:
    sed = "s/TLSv1.2 no-tls/TLSv1.0 no-tls/; s/bind-ciphers /&ALL:@SECLEVEL=0:/"
    return edited(at.sfu, "/etc/haproxy/haproxy.cfg", sed, EDGE)


@sabotage("configuration", "turn", "file-edited")
def another_relay_range(at: Service) -> Broken:
    sed = "s/^min-port=.*/min-port=40000/; s/^max-port=.*/max-port=41000/"
    return edited(at.turn, CALLS_CONF, sed, CALLS)


@sabotage("configuration", "turn", "file-edited")
def another_realm(at: Service) -> Broken:
    return edited(at.turn, CALLS_CONF, "s/^realm=.*/realm=others.lab.test/", CALLS)


@sabotage("configuration", "turn", "file-edited")
def no_turn_over_ipv6(at: Service) -> Broken:
    return edited(at.turn, CALLS_CONF, "/^listening-ip=2001/d", CALLS)


@sabotage("configuration", "avatar", "file-edited")
def a_file_edited_and_not_loaded(at: Service) -> Broken:
    return edited(at.avatar, AVATAR_CONF, "s/^stale-nonce=.*/stale-nonce=60/")


@sabotage("configuration", "avatar", "file-edited")
def tcp_peers_allowed(at: Service) -> Broken:
    return edited(at.avatar, AVATAR_CONF, "/no-tcp-relay/d", AVATAR)


@sabotage("configuration", "turn", "kernel-setting")
def relay_ports_no_longer_reserved(at: Service) -> Broken:
    return sysctl(at.turn, "net.ipv4.ip_local_reserved_ports", "")


@contextmanager
def sysctl(host: Host, key: str, value: str) -> Iterator[None]:
    was = host.root(f"sysctl -n {key}")
    with scripted(host, f"sysctl -qw {key}='{value}'", f"sysctl -qw {key}='{was}'"):
        yield


@sabotage("configuration", "turn", "version-differs", "known-hole")
def an_old_coturn(at: Service) -> Broken:
    """As dpkg tells it."""
    sed = "/^Package: coturn$/,/^$/s/^Version: .*/Version: 4.5.2-3/"
    return edited(at.turn, "/var/lib/dpkg/status", sed)


# A stranger on the host


@sabotage("ports", "avatar", "listener-unplanned")
def an_unplanned_listener(at: Service) -> Broken:
    return at.avatar.listening("tcp", 8081)


@sabotage("ports", "turn", "port-taken", "unit-stopped", "unit-flapping")
def another_program_on_the_turn_port(at: Service) -> Broken:
    return port_taken(at.turn)


@contextmanager
def port_taken(host: Host) -> Iterator[None]:
    with scripted(host, "systemctl stop turnserver@calls", CALLS), host.listening("tcp", 3478):
        host.root("systemctl start --no-block turnserver@calls")
        yield


# Credentials


@sabotage("credentials", "avatar", "secret-differs")
def another_turn_secret(at: Service) -> Broken:
    return rows(
        at.avatar,
        "avatar",
        "update turn_secret set value = 'a' || value",
        "update turn_secret set value = substr(value, 2)",
    )


@sabotage("credentials", "turn", "secret-differs")
def no_turn_secret(at: Service) -> Broken:
    return rows(
        at.turn,
        "calls",
        "create table kept as select * from turn_secret; delete from turn_secret",
        "insert into turn_secret select * from kept; drop table kept",
    )


@sabotage("credentials", "turn", "secret-foreign")
def a_second_turn_secret(at: Service) -> Broken:
    return rows(
        at.turn,
        "calls",
        "insert into turn_secret values ('calls.lab.test', 'of-others')",
        "delete from turn_secret where value = 'of-others'",
    )


@sabotage("credentials", "turn", "secret-foreign")
def a_user_of_others(at: Service) -> Broken:
    return rows(
        at.turn,
        "calls",
        "insert into turnusers_lt values ('calls.lab.test', 'others', '" + "0" * 32 + "')",
        "delete from turnusers_lt",
    )


@sabotage("credentials", "sfu", "file-edited", "secret-differs")
def another_api_secret_at_livekit(at: Service) -> Broken:
    return edited(at.sfu, LIVEKIT_YAML, 's/"APIlab": "/&x/', LIVEKIT)


@sabotage("credentials", "sfu", "file-edited", "secret-differs")
def livekit_with_another_turn_secret(at: Service) -> Broken:
    return edited(at.sfu, "/etc/livekit/turn_secret", "1s/^/x/", LIVEKIT)


# Peer policy


@sabotage(
    "peer policy",
    "avatar",
    "peer-policy-open",
    "file-edited",
    checks="test_hosts or test_forbidden_peers",
)
def the_deny_list_emptied(at: Service) -> Broken:
    return edited(at.avatar, AVATAR_CONF, "/denied-peer-ip/d", AVATAR)


@sabotage("peer policy", "turn", "peer-policy-closed", "file-edited")
def the_sfu_no_longer_allowed(at: Service) -> Broken:
    return edited(at.turn, CALLS_CONF, "/allowed-peer-ip=198/d", CALLS)


@sabotage("peer policy", "turn", "peer-policy-closed", "turn-database")
def the_sfu_denied_in_the_database(at: Service) -> Broken:
    """coturn reads these when it starts, and again every minute or so."""
    return peers(at.turn, "calls", "denied_peer_ip", at.sfu.ipv4, CALLS)


@sabotage("peer policy", "avatar", "peer-policy-open", "turn-database")
def private_peers_allowed_in_the_database(at: Service) -> Broken:
    return peers(at.avatar, "avatar", "allowed_peer_ip", "10.0.0.0-10.255.255.255", AVATAR)


@contextmanager
def peers(host: Host, pool: str, table: str, peer: str, then: str) -> Iterator[None]:
    insert = f"insert into {table} values ('{pool}.lab.test', '{peer}')"
    with rows(host, pool, insert, f"delete from {table}"):
        host.root(then)
        yield
    host.root(then)


# Limits


@sabotage("limits", "turn", "quota-used", "file-edited")
def the_quota_used_up(at: Service) -> Broken:
    return edited(at.turn, CALLS_CONF, "s/^total-quota=.*/total-quota=1/", CALLS)


@sabotage("limits", "avatar", "connections-full")
def the_table_of_connections_full(at: Service) -> Broken:
    return Lab().fill_conntrack(at.avatar.name, 0.95)


@sabotage("limits", "turn", "relay-ports-full")
def the_relay_ports_taken(at: Service) -> Broken:
    return relay_ports_taken(at.turn)


# In one line, as systemd of Debian 12 needs it.
TAKE = (
    "use Socket qw(:all); my ($address) = @ARGV; my $six = $address =~ /:/; "
    "for my $port (49152 .. 65535) { socket(my $s, $six ? AF_INET6 : AF_INET, SOCK_DGRAM, 0) "
    "or die; push @held, $s if bind($s, $six ? pack_sockaddr_in6($port, inet_pton(AF_INET6, "
    "$address)) : pack_sockaddr_in($port, inet_aton($address))); } "
    'system("systemd-notify", "--ready"); sleep'
)


def relay_ports_taken(host: Host) -> Broken:
    options = "--property=Type=notify --property=NotifyAccess=all --property=LimitNOFILE=20000"
    take = (
        f"systemd-run -q --unit=others-ports-{family} {options} perl -e '{TAKE}' {address}"
        for family, address in ((4, host.ipv4), (6, host.ipv6))
    )
    return scripted(host, " && ".join(take), "systemctl stop others-ports-4 others-ports-6")


@sabotage("limits", "turn", "unit-limits")
def coturn_out_of_files(at: Service) -> Broken:
    """As many as it has open, and no more."""
    limit = (
        "pid=$(systemctl show -P MainPID turnserver@calls); set_to() "
        "{ runuser -u turnserver -- prlimit --pid $pid --nofile=$1: ; }; set_to $("
    )
    return scripted(
        at.turn,
        f"{limit}ls /proc/$pid/fd | wc -l)",
        f"{limit}prlimit --pid $pid --nofile -o HARD --noheadings)",
    )


@sabotage("limits", "sfu", "disk-full")
def run_full(at: Service) -> Broken:
    return full(at.sfu, "size=$(du -sk /run | cut -f 1)k")


@sabotage("limits", "avatar", "disk-full")
def run_without_inodes(at: Service) -> Broken:
    return full(at.avatar, "nr_inodes=$(du -s --inodes /run | cut -f 1)")


def full(host: Host, limit: str) -> Broken:
    """/run is in memory: a limit on it is soon reached."""
    was = host.root("findmnt -no OPTIONS /run")
    size, inodes = (
        next(option for option in was.split(",") if option.startswith(f"{key}="))
        for key in ("size", "nr_inodes")
    )
    return scripted(
        host,
        f"mount -o remount,{limit} /run; head -c 64M /dev/zero > /run/filler; true",
        f"mount -o remount,{size},{inodes} /run; rm -f /run/filler",
    )


# Certificates: none of these is the one that the inventory names, which is a right cause too


def _put(host: Host, chain: Path) -> str:
    """A certificate and its key beside the host's current ones; the folder that they are in."""
    leader = hosts.leader(plan.find_host(host.name))
    folder = f"/etc/callready/tls/{host.fqdn}/others"
    inside = Path(f"/proc/{leader}/root{folder}")
    inside.mkdir(exist_ok=True)
    pem, key = chain.read_bytes(), chain.with_suffix(".key").read_bytes()
    for name, content in (("fullchain.pem", pem), ("privkey.pem", key), ("both.pem", pem + key)):
        (inside / name).write_bytes(content)
        (inside / name).chmod(0o640)
    return folder


@contextmanager
def certificate(host: Host, unit: str, name: str, days: int, loaded: bool = True) -> Iterator[None]:
    """Serve a certificate of the same authority for a name, that ends in so many days; with
    `loaded` false, have it on disk only."""
    reload = f"systemctl reload {unit}"
    with TemporaryDirectory() as scratch:
        found = plan.find_host(name)
        folder = _put(host, ca.issue(name, (found.ipv4, found.ipv6), days, Path(scratch)))
    link = f"/etc/callready/tls/{host.fqdn}/current"
    was = host.root(f"readlink {link}")
    put = f"chgrp --reference={link}/privkey.pem {folder}/*; ln -sfn others {link}"
    with scripted(
        host,
        put + f"; {reload}" * loaded,
        f"ln -sfn {was} {link}; rm -r {folder}; {reload}",
    ):
        yield


@sabotage(
    "certificates",
    "turn",
    "certificate-expired",
    "certificate-differs",
    checks="test_hosts or test_certificate",
)
def certificate_of_turn_expired(at: Service) -> Broken:
    return certificate(at.turn, "turnserver@calls", at.turn.fqdn, -1)


@sabotage("certificates", "turn", "certificate-name", "certificate-differs")
def certificate_of_turn_of_another_name(at: Service) -> Broken:
    return certificate(at.turn, "turnserver@calls", at.avatar.fqdn, 90)


@sabotage("certificates", "turn", "certificate-differs")
def a_renewed_certificate_not_served(at: Service) -> Broken:
    return certificate(at.turn, "turnserver@calls", at.turn.fqdn, 90, loaded=False)


@sabotage("certificates", "turn", "certificate-near-end", "certificate-differs")
def certificate_of_turn_near_its_end(at: Service) -> Broken:
    return certificate(at.turn, "turnserver@calls", at.turn.fqdn, 3)


@sabotage("certificates", "sfu", "certificate-expired", "certificate-differs")
def certificate_of_the_edge_expired(at: Service) -> Broken:
    return certificate(at.sfu, "haproxy", at.sfu.fqdn, -1)


@sabotage("certificates", "turn", "certificate-untrusted", "certificate-differs")
def certificate_of_turn_self_signed(at: Service) -> Broken:
    folder = f"/etc/callready/tls/{at.turn.fqdn}/others"
    link = f"/etc/callready/tls/{at.turn.fqdn}/current"
    make = (
        f"was=$(readlink {link}); mkdir {folder}; cd {folder}; echo $was > was; "
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 "
        f"-subj /CN={at.turn.fqdn} -addext subjectAltName=DNS:{at.turn.fqdn} "
        "-keyout privkey.pem -out fullchain.pem 2> /dev/null; chgrp turnserver *; chmod 640 *; "
        f"ln -sfn others {link}; systemctl reload turnserver@calls"
    )
    undo = f"ln -sfn $(cat {folder}/was) {link}; rm -r {folder}; systemctl reload turnserver@calls"
    return scripted(at.turn, make, undo)


# This machine's clock


@contextmanager
def clock(shift: str) -> Iterator[tuple[str, ...]]:
    """For what is run by the command that this gives."""
    yield "faketime", "-f", shift


@sabotage("clock", "any", "clock-off")
def this_machine_an_hour_behind(at: Service) -> Broken:
    return clock("-1h")


@sabotage("clock", "any", "clock-off")
def this_machine_two_hours_ahead(at: Service) -> Broken:
    return clock("+2h")


# What shows only at the next start


@sabotage("the next start", "sfu", "filter-off-at-boot", "unit-masked")
def our_filter_masked(at: Service) -> Broken:
    unit = "/etc/systemd/system/callready-firewall.service"
    return scripted(
        at.sfu,
        f"mv {unit} {unit}.kept; ln -s /dev/null {unit}; systemctl daemon-reload",
        f"mv {unit}.kept {unit}; systemctl daemon-reload",
    )


@sabotage("the next start", "turn", "filter-off-at-boot", "unit-disabled")
def our_filter_disabled(at: Service) -> Broken:
    return disabled(at.turn, "callready-firewall")


@sabotage("the next start", "sfu", "unit-disabled")
def livekit_disabled(at: Service) -> Broken:
    return disabled(at.sfu, "livekit-server")


def disabled(host: Host, unit: str) -> Broken:
    """systemctl takes the unit file away too, because it is a link."""
    links = f"$(find . -name {unit}.service -type l)"
    return scripted(
        host,
        f"cd /etc/systemd/system; tar cf /run/kept.tar {links}; systemctl disable -q {unit}",
        "cd /etc/systemd/system; tar xf /run/kept.tar; rm /run/kept.tar; systemctl daemon-reload",
    )


@sabotage("the next start", "turn", "unit-masked")
def coturn_masked(at: Service) -> Broken:
    return scripted(
        at.turn,
        "systemctl mask -q turnserver@calls",
        "systemctl unmask -q turnserver@calls",
    )


@sabotage("the next start", "turn", "file-unreadable")
def a_key_that_coturn_cannot_open(at: Service) -> Broken:
    key = f"/etc/callready/tls/{at.turn.fqdn}/current/privkey.pem"
    return scripted(at.turn, f"chmod 600 {key}", f"chmod 640 {key}")


@sabotage("the next start", "turn", "file-unreadable")
def a_folder_that_coturn_cannot_enter(at: Service) -> Broken:
    return scripted(at.turn, "chmod 700 /etc/callready/tls", "chmod 755 /etc/callready/tls")


@sabotage("the next start", "avatar", "file-unreadable")
def a_database_that_coturn_cannot_open(at: Service) -> Broken:
    file = "/var/lib/turn/avatar.db"
    return scripted(at.avatar, f"chown root: {file}", f"chown turnserver: {file}")


@sabotage("the next start", "sfu", "foreign-drop-in")
def a_drop_in_without_hardening(at: Service) -> Broken:
    return dropped_in(at.sfu, "livekit-server", "NoNewPrivileges=no\\nProtectSystem=no")


@sabotage("the next start", "sfu", "ssh-password")
def ssh_by_password(at: Service) -> Broken:
    file = "/etc/ssh/sshd_config.d/00-others.conf"
    return scripted(
        at.sfu,
        f"echo PasswordAuthentication yes > {file}; systemctl reload ssh",
        f"rm {file}; systemctl reload ssh",
    )


@sabotage("the next start", "turn", "release-unconfirmed")
def another_release_at_the_next_boot(at: Service) -> Broken:
    return scripted(
        at.turn,
        "cd /etc/callready; was=$(readlink confirmed); cp -a $was releases/others; "
        "echo >> releases/others/manifest; echo $was > /run/was; ln -sfn releases/others confirmed",
        "cd /etc/callready; ln -sfn $(cat /run/was) confirmed; rm -r releases/others /run/was",
    )


@sabotage("the next start", "avatar", "host-unreachable", "unit-stopped")
def ssh_stopped(at: Service) -> Broken:
    return scripted(at.avatar, "systemctl stop ssh", "systemctl start ssh")


# The app


@sabotage("the app", "app", "app-down", "unit-stopped")
def the_app_stopped(at: Service) -> Broken:
    # The port too, or the next caller starts it again.
    return scripted(at.app, "systemctl stop backend.socket backend", restarted("backend"))


@sabotage("the app", "app", "unit-hung", "app-down")
def the_app_hung(at: Service) -> Broken:
    return signalled(at.app, "backend")


@sabotage("the app", "app", "unit-stopped")
def the_edge_of_the_app_stopped(at: Service) -> Broken:
    return scripted(at.app, "systemctl stop haproxy", EDGE)


@sabotage("the app", "app", "workers-missing")
def a_worker_less(at: Service) -> Broken:
    """gunicorn takes a signal for that (SIGTTOU), and another for one more."""
    return worker_less(at)


@contextmanager
def worker_less(at: Service) -> Iterator[None]:
    assert at.app
    unit = "$(systemctl show -P MainPID backend)"
    until = f"timeout 20 sh -c 'until [ $(pgrep -P {unit} | wc -l) = {{}} ]; do sleep 0.1; done'"
    with scripted(
        at.app,
        f"kill -TTOU {unit}; {until.format(2)}",
        f"kill -TTIN {unit}; {until.format(3)}",
    ):
        yield


@sabotage("the app", "app", "env-differs")
def the_api_secret_edited(at: Service) -> Broken:
    return edited(at.app, ENV, "s/^LIVEKIT_API_SECRET=./&x/")


@sabotage("the app", "app", "env-differs", checks="test_hosts or test_call_from_the_app")
def the_turn_secret_one_rotation_behind(at: Service) -> Broken:
    return edited(at.app, ENV, "s/^TURN_SECRET=./&x/", restarted("backend"))


@sabotage("the app", "app", "env-differs", "app-answer")
def callers_sent_to_another_livekit(at: Service) -> Broken:
    return edited(
        at.app, ENV, "s|^LIVEKIT_URL=.*|LIVEKIT_URL=wss://h99.lab.test|", restarted("backend")
    )


@sabotage("the app", "app", "env-readable")
def the_env_readable_by_all(at: Service) -> Broken:
    return scripted(at.app, f"chmod 644 {ENV}", f"chmod 600 {ENV}")


@sabotage("the app", "app", "env-differs")
def no_env(at: Service) -> Broken:
    return scripted(at.app, f"mv {ENV} {ENV}.kept", f"mv {ENV}.kept {ENV}")


@sabotage("the app", "app", "env-readable", "file-unreadable")
def an_env_that_the_app_cannot_read(at: Service) -> Broken:
    return scripted(at.app, f"chown root: {ENV}", f"chown app: {ENV}")


@sabotage("the app", "android", "android-file")
def android_told_of_another_server(at: Service) -> Broken:
    return android(plan.STATE / "android/assets/callready.json")


@contextmanager
def android(file: Path) -> Iterator[None]:
    """A developer's edit: another server."""
    was = file.read_bytes()
    try:
        file.write_bytes(was.replace(b"lab.test", b"old.test"))
        yield
    finally:
        file.write_bytes(was)
