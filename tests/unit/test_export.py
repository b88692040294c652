"""What a Prometheus and a Grafana of one's own get: the same jobs and alerts as the monitor has,
and a dashboard of which each expression finds something among series as the exporters give them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import SecretStr

from callready.export import dashboard, exported, expressions, main, without_data
from callready.release.authority import Authority, Identity
from callready.settings.models import ROLES
from callready.settings.problem import SettingsError
from tasks import declare
from tasks.monitor import FOLDER
from tests.support.inventories import (
    MON1,
    SECRETS,
    SFU1,
    SHARED,
    TURN1,
    TURN2,
    Edit,
    load,
    watched,
)
from tests.unit.test_alerts import SERVICE, always, promtool

pytestmark = pytest.mark.usefixtures("project")

# As a real Prometheus had them of a real fleet, one series of each kind.
AT = 'host="h05.lab.test",instance="h05.lab.test"'
LIVEKIT = f'{AT},job="livekit",node_id="ND_YCGLD7ypFCSJ",node_type="SERVER"'
CALL = f'{AT},job="caller",family="4",turn="h05.lab.test",pool="calls",way="TURN/UDP"'
LOSS = f'livekit_packet_loss_percent_bucket{{direction="incoming",{LIVEKIT},source="MICROPHONE",type="RTP"'
NAMES = [SERVICE]
SERIES = {
    f'up{{{AT},job="node"}}': 1,
    f'ALERTS{{alertname="TurnDown",alertstate="firing",severity="page",{AT}}}': 1,
    f'callready_probe_success{{probe="call",{CALL}}}': 1,
    f'callready_probe_success{{probe="stun",{AT},job="caller",family="4",pool="calls",way="UDP"}}': 1,
    f'callready_probe_rtt_seconds{{probe="call",{CALL}}}': 0.002,
    f'callready_certificate_not_after_seconds{{endpoint="[2001:db8::105]:5349",{AT},job="node",name="h05.lab.test"}}': 1803770661,
    f'callready_release_info{{{AT},job="node",release="5434f0d7fa5a511d"}}': 1,
    f'callready_turn_allocations{{{AT},job="node",pool="calls"}}': 2,
    f'callready_turn_quota{{{AT},job="node",pool="calls"}}': 16384,
    f"livekit_room_total{{{LIVEKIT}}}": 12,
    f"livekit_participant_total{{{LIVEKIT}}}": 2,
    f'{LOSS},le="5"}}': 110,
    f'{LOSS},le="+Inf"}}': 114,
    **{
        f'callready_egress_{name}{{{AT},job="node"}}': value
        for name, value in {"recordings": 1, "free_bytes": 50e9, "min_free_bytes": 5e9}.items()
    },
    f'callready_egress_orphans{{{AT},job="node"}}': 0,
    f'callready_egress_backup{{{AT},job="node"}}': 0,
    f'callready_redis_up{{{AT},job="node"}}': 1,
    f'callready_redis_rtt_seconds{{{AT},job="node"}}': 0.0004,
    f'callready_probe_success{{probe="meet",{AT},job="caller",family="4",peer="h06.lab.test",way="TCP"}}': 1,
    f'haproxy_server_status{{{AT},job="haproxy",proxy="to_livekit_example_com",server="upstream",state="UP"}}': 1,
    f'node_cpu_seconds_total{{cpu="0",{AT},job="node",mode="idle"}}': 10822.65,
    f'node_memory_MemAvailable_bytes{{{AT},job="node"}}': 23314591744,
    f'node_memory_MemTotal_bytes{{{AT},job="node"}}': 25276059648,
    f'node_filesystem_avail_bytes{{device="/dev/vda1",fstype="ext4",{AT},job="node",mountpoint="/"}}': 76448174080,
    f'node_filesystem_size_bytes{{device="/dev/vda1",fstype="ext4",{AT},job="node",mountpoint="/"}}': 270553174016,
    f'node_network_receive_bytes_total{{device="host0",{AT},job="node"}}': 30444325,
    f'node_network_transmit_bytes_total{{device="host0",{AT},job="node"}}': 16093364,
}


def jobs(content: bytes) -> dict[str, Any]:
    return {each["job_name"]: each for each in yaml.safe_load(content)["scrape_configs"]}


def test_jobs_are_the_monitors_own_with_other_targets_and_another_certificate() -> None:
    files = exported(watched())
    theirs = jobs(files["scrape.yml"])
    monitors = jobs(declare(watched(), MON1).release.files[f"{FOLDER}/prometheus.yml"].content)
    assert [*theirs] == ["node", "livekit", "haproxy", "caller"]
    for name in ("node", "livekit", "haproxy"):
        own = monitors[name]
        own["tls_config"] = {"ca_file": "fleet-ca.pem"}
        own["tls_config"] |= {"cert_file": "fleet.cert", "key_file": "fleet.key"}
        del own["static_configs"]
        assert theirs[name] == own | {"file_sd_configs": [{"files": [f"targets/{name}.json"]}]}
    assert theirs["caller"]["honor_labels"] is True
    node, livekit, caller = (
        {
            each["labels"]["host"]: each["targets"]
            for each in json.loads(files[f"targets/{job}.json"])
        }
        for job in ("node", "livekit", "caller")
    )
    assert node.keys() == {SFU1, TURN1, TURN2, MON1}
    # By the addresses that others see, not those that the monitor uses.
    assert livekit == {SFU1: ["192.0.2.11:9998"]} and caller == {MON1: ["192.0.2.41:9998"]}
    rules = declare(watched(), MON1).release.files[f"{FOLDER}/alerts.yml"].content
    assert files["alerts.yml"] == rules


def test_the_certificate_is_one_that_hosts_let_in() -> None:
    files = exported(watched())
    authority = Authority(SecretStr(SECRETS["fleet/ca"]))
    leaf = x509.load_pem_x509_certificate(files["fleet.cert"])
    der = leaf.public_bytes(serialization.Encoding.DER)
    assert authority.refuses(Identity("monitor", (), ("client",)), der) == ""
    key = serialization.load_pem_private_key(files["fleet.key"], None)
    assert key.public_key() == leaf.public_key()
    assert files["fleet-ca.pem"] == authority.certificate


def test_no_secret_is_in_it() -> None:
    everything = b"".join(exported(watched()).values()).decode()
    assert not [name for name, value in SECRETS.items() if value in everything]


def test_without_a_monitor_there_is_nothing_to_export() -> None:
    with pytest.raises(SettingsError, match="no host in group monitor"):
        exported(load())


def test_the_command_writes_it_anew_and_only_its_user_reads_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callready.export.load_fleet", lambda _: watched())
    for _ in range(2):
        assert main(["inventories/prod", str(tmp_path / "there")]) == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "there").iterdir()}
    assert modes.pop("fleet.key") == 0o600 and modes.pop("targets") == 0o755
    assert {*modes.values()} == {0o644}
    assert json.loads((tmp_path / "there/targets/node.json").read_text())
    assert main([]) == 2


def test_alerts_of_a_cluster_are_where_there_is_one() -> None:
    def names(*edits: Edit) -> set[str]:
        (group,) = yaml.safe_load(exported(watched(*edits))["alerts.yml"])["groups"]
        return {each["alert"] for each in group["rules"] if "alert" in each}

    assert names(*SHARED) - names() == {
        *("RedisDown", "RoomsSplit", "PoolDegraded", "SfuNotServing", "RedisFar", "ClocksApart")
    }
    assert names(*SHARED) - names(*SHARED, (TURN2, "hand_out", False)) == {"PoolDegraded"}
    left: list[Edit] = [(host, "turn.pools.avatar", ...) for host in (SFU1, TURN1, TURN2)]
    assert names(*left, (TURN2, "pools", ["calls"])) - names() == {"PoolDegraded"}
    text = exported(watched(*SHARED))["alerts.yml"].decode()
    assert f'pool="calls",host=~"{TURN1}|{TURN2}"' in text
    assert f'node_time_seconds{{host=~"{SFU1}|{TURN1}"}}' in text
    board = exported(watched(*SHARED))["dashboard.json"].decode()
    assert "SFUs that take callers" in board
    assert "SFUs that take callers" not in exported(watched())["dashboard.json"].decode()


def test_panels_of_the_dashboard_lie_beside_each_other() -> None:
    board = json.loads(dashboard(ROLES, NAMES))
    cells = [
        (x, y)
        for panel in board["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len({*cells}) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_an_expression_without_data_is_named() -> None:
    found = without_data(dashboard(ROLES, NAMES), lambda expression: "job=" not in expression)
    assert found == ['Hosts up: avg(up{job="node",host=~".*"})']


@pytest.mark.tools
def test_every_expression_of_the_dashboard_finds_something(tmp_path: Path) -> None:
    every = [{"series": name, "values": always(value)} for name, value in SERIES.items()]
    asked = [
        # promtool says which of them it has nothing for.
        {
            "expr": f"count({expression}) > bool 0",
            "eval_time": "20m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for _, expression in expressions(dashboard(ROLES, NAMES))
    ]
    test = {"input_series": every, "promql_expr_test": asked}
    assert len(asked) > 20 and promtool(tmp_path, [test]) == ""


@pytest.mark.tools
def test_prometheus_takes_the_configuration_with_its_rules_and_certificate(tmp_path: Path) -> None:
    files = exported(watched())
    files["prometheus.yml"] = b"rule_files: [alerts.yml]\n" + files["scrape.yml"]
    (tmp_path / "targets").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run = ["promtool", "check", "config", "prometheus.yml"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
