"""Sabotages of watching: of what measures a host, of the monitor, and of the way between them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from callready.settings.ports import (
    ALERTMANAGER,
    CALLER,
    CALLER_PORT,
    EXPORTERS,
    LOG_RECEIVER,
    LOGS,
    MEASURE,
    NODE_EXPORTER,
    PROMETHEUS,
)
from tests.sabotage.sabotage import (
    WATCHING,
    Broken,
    Service,
    dropped_in,
    edited,
    sabotage,
    scripted,
    signalled,
)
from tests.support.breakage import Packets, before, filtered, inside
from tests.support.fleet import Host, eventually

CHECKS = "test_hosts or test_monitor"
FOLDER, FLEET = "/etc/callready/monitor", "/etc/callready/fleet"
METRICS = Packets("in", proto="tcp", ports="9998")
PORTS = {
    EXPORTERS: 9998,
    NODE_EXPORTER: 9100,
    PROMETHEUS: 9090,
    ALERTMANAGER: 9093,
    CALLER: CALLER_PORT,
    LOG_RECEIVER: 9999,
}


def again(unit: str) -> str:
    """A script that restarts a unit and waits until it listens, if it does."""
    listens = f"ss -Hltn sport = :{PORTS[unit]} | grep -q ." if unit in PORTS else "true"
    return f"systemctl restart {unit}; timeout 60 sh -c 'until {listens}; do sleep 0.1; done'"


def is_lost(at: Service, host: Host) -> bool:
    """Whether Prometheus did not get a host's metrics when it asked last."""
    assert at.monitor
    query = f"/api/v1/query?query=up%7Bjob%3D%22node%22%2Chost%3D%22{host.fqdn}%22%7D"
    ask = (
        f'login=$(printf %s "operator:$(cat {FOLDER}/password)" | base64 -w 0); '
        "exec 3<>/dev/tcp/127.0.0.1/9090; "
        f"printf 'GET %s HTTP/1.0\\r\\nAuthorization: Basic %s\\r\\n\\r\\n' '{query}' $login >&3; "
        "cat <&3"
    )
    return '"0"]' in at.monitor.root(f"timeout 10 bash <<'ASK'\n{ask}\nASK")


@contextmanager
def until_lost(at: Service, host: Host, broken: AbstractContextManager[object]) -> Iterator[None]:
    """Break it, and wait until the monitor has seen that."""
    with broken:
        eventually(lambda: is_lost(at, host))
        yield


# What measures a host


@sabotage(WATCHING, "turn", "unit-stopped", checks=CHECKS)
def exporters_stopped(at: Service) -> Broken:
    return scripted(at.turn, f"systemctl stop {EXPORTERS}", again(EXPORTERS))


@sabotage(WATCHING, "sfu", "unit-hung", checks=CHECKS)
def node_exporter_hung(at: Service) -> Broken:
    return until_lost(at, at.sfu, signalled(at.sfu, NODE_EXPORTER))


@sabotage(WATCHING, "turn", "unit-stopped", checks=CHECKS)
def measuring_stopped(at: Service) -> Broken:
    return scripted(at.turn, f"systemctl stop {MEASURE}", f"systemctl start {MEASURE}")


@sabotage(WATCHING, "sfu", "foreign-drop-in", checks=CHECKS)
def node_exporter_on_every_address(at: Service) -> Broken:
    start = "ExecStart=\\nExecStart=/usr/bin/prometheus-node-exporter --web.listen-address=:9100"
    unit = NODE_EXPORTER.removesuffix(".service")
    return dropped_in(at.sfu, unit, start, again(NODE_EXPORTER))


@sabotage(WATCHING, "turn", "fleet-certificate", checks=CHECKS)
def a_certificate_of_another_fleet(at: Service) -> Broken:
    return until_lost(at, at.turn, foreign(at.turn, "host", EXPORTERS))


def foreign(host: Host, kind: str, unit: str) -> Broken:
    """As an authority of somebody else signs them: by itself."""
    link = f"{FLEET}/{kind}"
    make = (
        f"set -e; readlink {link} > /run/was; mkdir {FLEET}/.others; cd {FLEET}/.others; "
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 "
        f"-subj /CN=monitor -addext subjectAltName=IP:{host.ipv4} -keyout key.pem -out cert.pem "
        f"2> /dev/null; ln -sfn .others {link}; {again(unit)}"
    )
    undo = f"ln -sfn $(cat /run/was) {link}; rm -r {FLEET}/.others /run/was; {again(unit)}"
    return scripted(host, make, undo)


# The way from the monitor to a host


@sabotage(WATCHING, "turn", "foreign-filter", checks=CHECKS)
def metrics_dropped_by_another_filter(at: Service) -> Broken:
    return until_lost(at, at.turn, filtered(inside(at.turn), METRICS))


@sabotage(WATCHING, "sfu", "metrics-lost", checks=CHECKS)
def metrics_dropped_before_the_host(at: Service) -> Broken:
    return until_lost(at, at.sfu, filtered(before(at.sfu), METRICS))


# The monitor


@sabotage(WATCHING, "monitor", "unit-stopped", checks=CHECKS)
def prometheus_stopped(at: Service) -> Broken:
    return scripted(at.monitor, f"systemctl stop {PROMETHEUS}", again(PROMETHEUS))


@sabotage(WATCHING, "monitor", "unit-stopped", checks=CHECKS)
def alertmanager_stopped(at: Service) -> Broken:
    return scripted(at.monitor, f"systemctl stop {ALERTMANAGER}", again(ALERTMANAGER))


@sabotage(WATCHING, "monitor", "file-edited", checks=CHECKS)
def the_alerts_emptied(at: Service) -> Broken:
    return edited(at.monitor, f"{FOLDER}/alerts.yml", "2,$d", again(PROMETHEUS))


@sabotage(WATCHING, "monitor", "file-edited", "alerts-not-loaded", checks=CHECKS)
def the_alerts_emptied_and_read_again(at: Service) -> Broken:
    """Prometheus reads its files on SIGHUP."""
    hangup = f"systemctl kill --kill-whom=main -s HUP {PROMETHEUS}"
    return edited(at.monitor, f"{FOLDER}/alerts.yml", "2,$d", hangup)


@sabotage(WATCHING, "monitor", "file-edited", checks=CHECKS)
def the_monitor_without_a_password(at: Service) -> Broken:
    return edited(at.monitor, f"{FOLDER}/web.yml", "2,$d", again(PROMETHEUS))


@sabotage(WATCHING, "monitor", "fleet-certificate", checks=CHECKS)
def the_monitor_with_a_certificate_of_another_fleet(at: Service) -> Broken:
    assert at.monitor
    return until_lost(at, at.turn, foreign(at.monitor, "monitor", PROMETHEUS))


@sabotage(WATCHING, "monitor", "fleet-certificate", checks=CHECKS)
def the_key_of_the_monitor_gone(at: Service) -> Broken:
    key = f"{FLEET}/monitor/key.pem"
    return scripted(
        at.monitor,
        f"systemctl stop {PROMETHEUS}; mv {key} {key}.kept",
        f"mv {key}.kept {key}; {again(PROMETHEUS)}",
    )


@sabotage(WATCHING, "monitor", "disk-full", checks=CHECKS)
def the_disk_of_metrics_full(at: Service) -> Broken:
    folder = "/var/lib/callready-prometheus"
    return scripted(
        at.monitor,
        f"mount -t tmpfs -o size=1m others {folder}; head -c 2M /dev/zero > {folder}/filler; true",
        f"umount {folder}",
    )


@sabotage(WATCHING, "monitor", "unit-stopped", checks=CHECKS)
def the_synthetic_caller_stopped(at: Service) -> Broken:
    return scripted(at.monitor, f"systemctl stop {CALLER}", again(CALLER))


# The logs


@sabotage(WATCHING, "turn", "unit-stopped", checks=CHECKS)
def the_sender_of_logs_stopped(at: Service) -> Broken:
    return scripted(at.turn, f"systemctl stop {LOGS}", again(LOGS))


@sabotage(WATCHING, "turn", "fleet-certificate", checks=CHECKS)
def a_sender_of_logs_with_a_certificate_of_another_fleet(at: Service) -> Broken:
    return foreign(at.turn, "host", LOGS)


@sabotage(WATCHING, "monitor", "unit-stopped", checks=CHECKS)
def the_receiver_of_logs_stopped(at: Service) -> Broken:
    return scripted(at.monitor, f"systemctl stop {LOG_RECEIVER}", again(LOG_RECEIVER))


@sabotage(WATCHING, "monitor", "fleet-certificate", checks=CHECKS)
@contextmanager
def the_receiver_of_logs_with_a_certificate_of_another_fleet(at: Service) -> Iterator[None]:
    assert at.monitor
    with foreign(at.monitor, "host", LOG_RECEIVER):
        yield
    # Who has met it does not try again before its hour is over.
    for host in at.hosts:
        host.root(again(LOGS))


@sabotage(WATCHING, "turn", "unit-hung", checks=CHECKS)
def the_sender_of_logs_hung(at: Service) -> Broken:
    return signalled(at.turn, LOGS)
