"""What the monitor measures a host by: the role, and the script in a folder that it takes for the
whole host."""

import os
import re
import socket
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import yaml

from callready.release.facts import host_script
from callready.settings.ports import EXPORTERS, MEASURE, NODE_EXPORTER
from tasks import declare
from tasks.monitor import FOLDER
from tests.support.inventories import (
    MON1,
    SECRETS,
    SFU1,
    SHARED,
    TURN1,
    TURN2,
    Authority,
    Edit,
    load,
    watched,
)
from tests.unit.test_render import nft

pytestmark = pytest.mark.usefixtures("project")


def content(path: str, host: str, *edits: Any) -> str:
    return declare(watched(*edits), host).release.files[path].content.decode()


def test_a_fleet_without_a_monitor_has_none_of_it() -> None:
    release = declare(load(), SFU1).release
    assert not {EXPORTERS, NODE_EXPORTER, MEASURE} & release.services.keys()
    assert not any(
        "export" in name or "metrics" in name for name in (*release.files, *release.users)
    )


def test_debians_units_are_masked_before_their_packages_come() -> None:
    for host in (SFU1, TURN1, MON1):
        release = declare(watched(), host).release
        for package in ("prometheus-node-exporter", "prometheus-exporter-exporter"):
            assert package in release.packages and f"{package}.service" in release.masks


@pytest.mark.parametrize(
    ("host", "edits", "modules"),
    [
        (TURN1, [], {"node": ("127.0.0.1", 9100)}),
        (
            MON1,
            [],
            {
                "node": ("127.0.0.1", 9100),
                "haproxy": ("127.0.0.1", 8404),
                "caller": ("127.0.0.1", 9436),
            },
        ),
        (SFU1, [], {"node": ("127.0.0.1", 9100), "livekit": ("127.0.0.1", 6789)}),
        (
            SFU1,
            [("*", "edge", {}), (SFU1, "livekit.prometheus.port", 6790)],
            {
                "node": ("127.0.0.1", 9100),
                "haproxy": ("127.0.0.1", 8404),
                "livekit": ("127.0.0.1", 6790),
            },
        ),
        (
            SFU1,
            [(SFU1, "livekit.bind_addresses", ["192.0.2.11"])],
            {"node": ("127.0.0.1", 9100), "livekit": ("192.0.2.11", 6789)},
        ),
    ],
)
def test_each_exporter_of_the_host_is_found_where_it_listens(
    host: str, edits: list[Any], modules: dict[str, tuple[str, int]]
) -> None:
    found = yaml.safe_load(content("/etc/callready/exporters.yml", host, *edits))["modules"]
    assert {n: (m["http"]["address"], m["http"]["port"]) for n, m in found.items()} == modules


def test_livekits_password_is_in_a_file_that_only_its_unit_gets() -> None:
    release = declare(watched(), SFU1).release
    file = release.files["/etc/callready/exporters.yml"]
    header = yaml.safe_load(file.content)["modules"]["livekit"]["http"]["headers"]["Authorization"]
    scheme, _, login = header.partition(" ")
    assert scheme == "Basic"
    assert b64decode(login).decode() == f"prometheus:{SECRETS['livekit/prometheus']}"
    assert (file.mode, file.owner, file.sha256) == (
        0o600,
        "root",
        *release.services[EXPORTERS].given,
    )


def test_every_certificate_that_is_served_is_asked_for() -> None:
    assert content("/etc/callready/measure.conf", TURN1).splitlines() == [
        "pool calls 16384 49152 65535",
        f"certificate {TURN1} 192.0.2.21:5349",
        f"certificate {TURN1} [2001:db8::21]:5349",
        "fleet host",
    ]
    assert content("/etc/callready/measure.conf", MON1).splitlines() == [
        "certificate monitor.callready.test 192.0.2.41:443",
        "certificate monitor.callready.test [2001:db8::41]:443",
        "fleet monitor",
        "fleet host",
        *(f"sender {name}" for name in (SFU1, TURN1, TURN2, MON1)),
    ]


def test_only_the_monitor_gets_in_by_address_filter_and_certificate() -> None:
    unit = content(f"/etc/systemd/system/{EXPORTERS}", TURN2)
    assert (
        "IPAddressDeny=any\nIPAddressAllow=localhost 10.0.0.41/32 192.0.2.41/32 2001:db8::41/128"
        in unit
    )
    assert "-web.tls.verify \\\n    -web.tls.certmatch=^monitor$$\n" in unit
    assert "-web.listen-address= \\\n    -web.tls.listen-address=:9998 \\\n" in unit
    rules = content("/etc/callready/nftables.conf", TURN2)
    (line,) = (
        each
        for each in rules.splitlines()
        if "saddr" in each and "9998" in each and "ip6" not in each
    )
    assert (
        line.split(" counter")[0].strip()
        == "ip saddr { 10.0.0.41/32, 192.0.2.41/32 } tcp dport 9998"
    )
    identity = declare(watched(), TURN2).release.identities["host"]
    assert (identity.addresses, identity.usages) == (("192.0.2.22",), ("server", "client"))


def test_a_prometheus_outside_gets_in_where_the_settings_say_so() -> None:
    edits = [
        ("*", "monitor.sources", ["203.0.113.9", "watchers"]),
        ("w1", "groups", ["watchers"]),
        ("w1", "address", "203.0.113.10"),
    ]
    allowed = "203.0.113.9/32 203.0.113.10/32"
    unit = content(f"/etc/systemd/system/{EXPORTERS}", TURN2, *edits)
    assert f"IPAddressAllow=localhost 10.0.0.41/32 192.0.2.41/32 {allowed} 2001:db8::41/128" in unit
    rules = content("/etc/callready/nftables.conf", TURN2, *edits)
    listed = f"10.0.0.41/32, 192.0.2.41/32, {allowed.replace(' ', ', ')}"
    assert f"ip saddr {{ {listed} }} tcp dport 9998 counter" in rules


def test_the_state_of_the_apps_units_is_measured_too() -> None:
    unit = content(
        f"/etc/systemd/system/{NODE_EXPORTER}",
        TURN2,
        (TURN2, "groups", ["turn", "app"]),
        (TURN2, "app", {"env_file": "/srv/app/.env", "restart": ["web.service"]}),
    )
    (pattern,) = (line for line in unit.splitlines() if "unit-include" in line)
    assert pattern.endswith("[.](service|timer)|web[.]service \\")


def test_calls_come_first() -> None:
    release = declare(watched(), MON1).release
    units = [unit for unit in release.services if unit.startswith("callready-")]
    assert len(units) == 8
    for unit in units:
        text = release.files[f"/etc/systemd/system/{unit}"].content.decode()
        assert "\nCPUWeight=20\nOOMScoreAdjust=500\n" in text and "\nMemoryMax=" in text, unit


# The script


class Measured:
    """What the script says of a folder that it takes for the whole host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.script = folder, folder / "measure"
        for needed in ("etc/callready", "var/lib/callready", "run/callready-measure", "proc/net"):
            (folder / needed).mkdir(parents=True)
        self.script.write_bytes(host_script("measure.sh"))
        self.write("etc/callready/measure.conf", "")
        self.write("proc/net/udp", HEAD)

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def configure(self, host: str) -> None:
        """As the host is, but that nobody is asked for certificates."""
        lines = content("/etc/callready/measure.conf", host).splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("certificate ")]
        self.write("etc/callready/measure.conf", "".join(kept))

    @property
    def command(self) -> str:
        return f"CALLREADY_ROOT={self.folder} sh {self.script} once"

    def run(self) -> dict[str, str]:
        subprocess.run(["sh", "-c", self.command], check=True)
        return self.found()

    def found(self) -> dict[str, str]:
        metrics = self.folder / "run/callready-measure/callready.prom"
        assert metrics.stat().st_mode & 0o777 == 0o644
        lines = [line for line in metrics.read_text().splitlines() if not line.startswith("#")]
        return dict(line.rsplit(" ", 1) for line in lines)


HEAD = (
    "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout\n"
)


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    return Measured(tmp_path / "host")


def sockets(*ports: int, width: int = 8) -> str:
    """/proc/net/udp as the kernel writes it (proc_net_udp(5))."""
    line = "{:5}: {:0{}X}:{:04X} 00000000:0000 07 00000000:00000000 00:00000000 00000000 64999\n"
    return HEAD + "".join(line.format(n, 1, width, port) for n, port in enumerate(ports))


@pytest.mark.parametrize(("total", "quota"), [(100, 100), (0, 16384), (None, 16384)])
def test_a_pool_without_a_quota_has_as_many_allocations_as_ports(
    total: int | None, quota: int
) -> None:
    config = content("/etc/callready/measure.conf", TURN1, (TURN1, "turn.total_quota", total))
    assert config.startswith(f"pool calls {quota} ")


@pytest.mark.parametrize("has_ipv6", [True, False])
def test_allocations_are_the_sockets_of_each_relay_range(
    measured: Measured, has_ipv6: bool
) -> None:
    measured.configure(TURN1)
    measured.write("proc/net/udp", sockets(3478, 49151, 49152, 65535, 53))
    if has_ipv6:
        measured.write("proc/net/udp6", sockets(50000, 3478, width=32))
    found = measured.run()
    assert found['callready_turn_allocations{pool="calls"}'] == ("3" if has_ipv6 else "2")
    assert found['callready_turn_quota{pool="calls"}'] == "16384"


def test_a_host_without_pools_has_no_allocations(measured: Measured) -> None:
    measured.configure(SFU1)
    measured.write("proc/net/udp", sockets(50000))
    assert not [name for name in measured.run() if "turn" in name]


def test_a_release_that_waits_and_reverts_are_told(measured: Measured) -> None:
    found = measured.run()
    assert found['callready_release_info{release="none"}'] == "1"
    assert (found["callready_release_pending"], found["callready_reverts_total"]) == ("0", "0")
    assert "callready_release_pending_since_seconds" not in found
    (measured.folder / "etc/callready/current").symlink_to("releases/0123456789abcdef")
    measured.write("var/lib/callready/pending", "0123456789abcdef 1@x root since now\n")
    os.utime(measured.folder / "var/lib/callready/pending", (1_800_000_000, 1_800_000_000))
    history = [
        ("2026-11-30T02:18:46Z", "a", "deploy"),
        ("2026-11-30T02:18:47Z", "a", "reverted from b"),
        ("2027-01-15T08:00:00Z", "c", "deploy"),
        ("2027-01-15T08:00:01Z", "a", "reverted from c"),
    ]
    lines = (f"{at}\t{release}\troot\t{how}\trun\n" for at, release, how in history)
    measured.write("var/lib/callready/history", "".join(lines))
    found = measured.run()
    assert found['callready_release_info{release="0123456789abcdef"}'] == "1"
    assert (found["callready_release_pending"], found["callready_reverts_total"]) == ("1", "2")
    assert found["callready_release_pending_since_seconds"] == "1800000000"
    changes = {name: at for name, at in found.items() if "_change_" in name}
    assert changes == {
        f'callready_release_change_seconds{{release="{release}",how="{how}"}}': at
        for release, how, at in (
            ("a", "deploy", "1796005126"),
            ("c", "deploy", "1800000000"),
            ("a", "reverted", "1800000001"),
        )
    }


def test_when_the_logs_of_each_host_came_is_told_on_the_monitor(measured: Measured) -> None:
    measured.configure(MON1)
    for host, hour, ended in (
        (TURN1, "2026-01-31T12", 1_800_000_000),
        (TURN1, "2026-01-31T13", 1_800_000_900),
        (MON1, "2026-01-31T13", 1_800_000_800),
        ("others", "2026-01-31T13", 1_800_000_700),
    ):
        path = f"var/log/callready/{host}/{hour}.jsonl"
        measured.write(path, "")
        os.utime(measured.folder / path, (ended, ended))
    found = {name: value for name, value in measured.run().items() if "_logs_" in name}
    assert found == {
        f'callready_logs_last_seconds{{sender="{host}"}}': last
        for host, last in ((SFU1, "0"), (TURN1, "1800000900"), (TURN2, "0"), (MON1, "1800000800"))
    }
    unit = f"/etc/systemd/system/{MEASURE}"
    assert "\nSupplementaryGroups=adm\n" in content(unit, MON1)
    assert "adm" not in content(unit, TURN1)
    assert "sender" not in content("/etc/callready/measure.conf", MON1, ("*", "monitor.logs", None))


REDIS = (
    ("*", "redis.livekit_password", "secret:redis/livekit"),
    (SFU1, "groups", ["livekit", "redis"]),
)
REMOTE = (
    ("*", "redis.livekit_password", "secret:redis/livekit"),
    (TURN2, "groups", ["turn", "redis"]),
)


@pytest.mark.parametrize(
    ("host", "edits", "line"),
    [
        (SFU1, REDIS, "redis 127.0.0.1 6379"),
        (TURN2, REMOTE, "redis 192.0.2.22 6379 --tls --insecure"),
        (SFU1, REMOTE, ""),
    ],
)
def test_redis_is_asked_where_it_listens(host: str, edits: Any, line: str) -> None:
    lines = content("/etc/callready/measure.conf", host, *edits).splitlines()
    assert [each for each in lines if "redis" in each] == [line] * bool(line)


def test_each_sfu_measures_the_way_to_the_redis_that_it_shares() -> None:
    for host in (SFU1, TURN1, TURN2):
        lines = content("/etc/callready/measure.conf", host, *SHARED).splitlines()
        shared = [each for each in lines if each.startswith("shared")]
        assert shared == ["shared 192.0.2.22 6379"] * (host != TURN2)


def test_how_far_a_shared_redis_is_and_whether_it_answers(measured: Measured) -> None:
    assert not any("callready_redis" in name for name in measured.run())
    with socket.create_server(("127.0.0.1", 0)) as redis:
        at = f"127.0.0.1 {redis.getsockname()[1]}"
        measured.write("etc/callready/measure.conf", f"shared {at}\n")
        found = measured.run()
        assert found["callready_redis_reached"] == "1"
        assert 0 < float(found["callready_redis_rtt_seconds"]) < 3
    found = measured.run()
    assert found["callready_redis_reached"] == "0" and "callready_redis_rtt_seconds" not in found


@pytest.mark.parametrize(
    ("answer", "up"),
    [
        ("echo NOAUTH Authentication required.", "1"),
        ("echo PONG", "1"),
        ("echo ERR max number of clients reached", "0"),
        ("echo Could not connect >&2; exit 1", "0"),
        ("exec sleep 60", "0"),
    ],
)
def test_a_redis_that_answers_strangers_is_up(measured: Measured, answer: str, up: str) -> None:
    asked = measured.folder / "redis-cli"
    script = host_script("measure.sh").replace(b" redis-cli ", f" sh {asked} ".encode())
    measured.script.write_bytes(script)
    measured.write("redis-cli", f'echo "$*" > {measured.folder}/words; {answer}')
    assert "callready_redis_up" not in measured.run()
    measured.write("etc/callready/measure.conf", "redis 192.0.2.22 6379 --tls --insecure\n")
    assert measured.run()["callready_redis_up"] == up
    words = (measured.folder / "words").read_text()
    assert words == "-h 192.0.2.22 -p 6379 --tls --insecure ping\n"


@pytest.mark.tools
def test_what_the_filter_let_in_and_dropped_is_told_by_use(
    measured: Measured, tmp_path: Path
) -> None:
    rules = content("/etc/callready/nftables.conf", TURN1)
    rules = rules.replace(
        "counter ssh_port/tcp/22 {}", "counter ssh_port/tcp/22 { packets 5 bytes 9 }"
    )
    rules = rules.replace("udp/3478/limited {}", "udp/3478/limited { packets 4000000000 bytes 9 }")
    rules = rules.replace("counter drop", "counter packets 1000000000 bytes 9 drop")
    (tmp_path / "rules").write_text(rules)
    run = nft(f"nft -f rules; {measured.command}", tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    found = measured.found()
    names = {name for name in found if "filter_packets" in name}
    ports = declare(watched(), TURN1).ports
    opened = {use.key for use in ports if use.audience != "this host"}
    assert {name.split('"')[1].removesuffix("/limited") for name in names} == opened
    assert found['callready_filter_packets_total{use="ssh_port/tcp/22"}'] == "5"
    # Unasked for, invalid, a relay to this host, and too much of one client.
    assert found["callready_filter_dropped_packets_total"] == "7000000000"


@pytest.mark.tools
def test_a_certificate_of_the_fleet_ends_when_it_says(
    measured: Measured, authority: Authority
) -> None:
    chain, _ = authority.issue(days=3)
    (measured.folder / "etc/callready/fleet/host").mkdir(parents=True)
    (measured.folder / "etc/callready/fleet/host/cert.pem").symlink_to(chain)
    measured.write("etc/callready/measure.conf", "fleet host\nfleet monitor\n")
    found = measured.run()
    end = int(found['callready_certificate_not_after_seconds{name="fleet",endpoint="host"}'])
    assert end - int(found["callready_measured_seconds"]) in range(3 * 86400 - 600, 3 * 86400 + 1)
    assert not [name for name in found if "monitor" in name]


@pytest.mark.parametrize("name", ["app", "my-app"])
def test_the_rules_name_the_apps_backend_as_the_edge_does(name: str) -> None:
    app = {
        "url": f"https://{name}.callready.test",
        "upstream": "127.0.0.1:8000",
        "env_file": "/srv/app/.env",
    }
    edits: list[Edit] = [
        (SFU1, "edge", {}),
        (SFU1, "groups", ["livekit", "app"]),
        (SFU1, "app", app),
    ]
    config = content("/etc/haproxy/haproxy.cfg", SFU1, *edits)
    (backend,) = re.findall(r"^backend (to_\S*app\S*)$", config, re.MULTILINE)
    rules = content(f"{FOLDER}/alerts.yml", MON1, *edits)
    assert f'"{backend.replace("to_", "to_(")})"' in rules


def test_egress_is_asked_where_it_listens_and_only_where_it_is() -> None:
    recording = (
        ("*", "redis.livekit_password", "secret:redis/livekit"),
        ("*", "redis.egress_password", "secret:redis/egress"),
        ("*", "egress", {"digest": f"sha256:{'ab' * 32}", "prometheus_port": 7999}),
        (SFU1, "groups", ["livekit", "redis", "egress"]),
    )
    modules = yaml.safe_load(content("/etc/callready/exporters.yml", SFU1, *recording))["modules"]
    assert modules["egress"]["http"] == {"address": "127.0.0.1", "port": 7999}
    asked = yaml.safe_load(content(f"{FOLDER}/prometheus.yml", MON1, *recording))
    (job,) = (each for each in asked["scrape_configs"] if each["job_name"] == "egress")
    assert [target["labels"] for target in job["static_configs"]] == [{"host": SFU1}]
    rules = content(f"{FOLDER}/alerts.yml", MON1, *recording)
    assert "alert: EgressDown" in rules and "alert: RedisDown" in rules
    assert "Recordings" in content(f"{FOLDER}/consoles/index.html", MON1, *recording)


def test_a_fleet_that_records_nothing_is_asked_for_nothing_of_it() -> None:
    for path in ("prometheus.yml", "alerts.yml", "consoles/index.html"):
        text = content(f"{FOLDER}/{path}", MON1).lower()
        assert not any(word in text for word in ("egress", "redis", "recording")), path
