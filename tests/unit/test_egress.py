"""Hosts that record: what an inventory may say of them, what is refused, what a host gets, and what
recordings may reach."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from callready.release.declaration import ROOT
from callready.release.facts import Facts
from callready.release.plan import Plan, plan
from callready.release.refusals import of as refusals_of
from callready.settings.egress import COSTS, USER, Egress
from callready.settings.fleet import FLEET_CA
from callready.settings.ports import EGRESS as UNIT
from callready.settings.ports import port_plan
from callready.settings.problem import SettingsError
from tasks import declare
from tests.support.inventories import EGRESS, REC1, SECRETS, SFU1, Edit, load, recorded

pytestmark = pytest.mark.usefixtures("project")

UNIT_FILE, CONFIG = f"/etc/systemd/system/{UNIT}", "/etc/egress/egress.yaml"
IMAGE = f"docker.io/livekit/egress@{EGRESS['digest']}"
S3 = {"bucket": "calls", "access_key": "AK", "secret": "secret:egress/s3"}
ON_S3: Edit = ("*", "egress.storage", {"s3": S3, "prefix": "2026"})
# The recorder is on the host of the only SFU and of Redis.
BOX: list[Edit] = [(SFU1, "groups", ["livekit", "redis", "egress"]), (REC1, "groups", ["other"])]


def files(*edits: Edit, of: str = REC1) -> dict[str, str]:
    found = declare(recorded(*edits), of).release.files.items()
    return {path: file.content.decode() for path, file in found}


def config(*edits: Edit, of: str = REC1) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(files(*edits, of=of)[CONFIG])
    return found


def rules(*edits: Edit, of: str = REC1) -> list[str]:
    """What the packet filter says of recordings, in order."""
    text = files(*edits, of=of)[f"{ROOT}/nftables.conf"]
    (chain,) = re.findall(r"chain recordings {\n(.*?)\n    }", text, re.DOTALL)
    lines = (line.strip() for line in chain.splitlines() if "#" not in line)
    return [line.replace("counter ", "") for line in lines]


def facts(cores: int = 4, **more: Any) -> Facts:
    return Facts(os="debian", os_version="13", arch="amd64", cores=cores, ssh_ports={22}, **more)


def made(facts: Facts, *edits: Edit) -> Plan:
    node = declare(recorded(*edits), REC1)
    node.learn(facts)
    return plan(node.release, facts)


def test_egress_yaml_has_what_egress_knows() -> None:
    assert config() == {
        "redis": {
            "address": "192.0.2.11:6379",
            "db": 0,
            "username": "egress",
            "password": SECRETS["redis/egress"],
            "tls": {"enabled": True, "ca_cert_file": "/etc/fleet-ca.pem"},
        },
        "api_key": "APIrecord",
        "api_secret": SECRETS["egress/livekit"],
        "ws_url": "wss://livekit.callready.test",
        "enable_chrome_sandbox": True,
        "template_port": 7980,
        "health_port": 7981,
        "prometheus_port": 7982,
        "logging": {"level": "info", "json": True},
        "storage": {"prefix": "/out"},
        "backup": {"prefix": "/backup"},
        "cpu_cost": {f"{kind}_cpu_cost": cost for kind, cost in COSTS.items()},
    }


def test_storage_and_limits() -> None:
    limits: Edit = ("*", "egress.session_limits", {"file_output_max_duration": 7200})
    proxy = {"url": "http://proxy.callready.test:3128"}
    full = S3 | {"region": "gra", "force_path_style": True, "proxy_config": proxy}
    found = config(("*", "egress.storage", {"s3": full, "prefix": "2026"}), limits)
    s3 = full | {"secret": SECRETS["egress/s3"]}
    assert found["storage"] == {"prefix": "2026", "s3": s3}
    assert found["session_limits"] == {"file_output_max_duration": "7200s"}
    assert config(("*", "egress.storage", {"prefix": "a/b"}))["storage"] == {"prefix": "/out/a/b"}
    azure = {"account_name": "calls", "account_key": "secret:egress/s3", "container_name": "rec"}
    gcp = {"credentials_json": "secret:egress/s3", "bucket": "calls"}
    for kind, given in (("azure", azure), ("gcp", gcp)):
        (key,) = (key for key, value in given.items() if value.startswith("secret:"))
        storage = config(("*", "egress.storage", {kind: given}))["storage"]
        assert storage == {kind: given | {key: SECRETS["egress/s3"]}}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([("*", "egress.digest", ...)], "egress.digest: is missing"),
        ([("*", "egress.digest", "sha256:12")], "'sha256:12' is not a digest"),
        ([("*", "egress.image", "livekit/egress:v1.14")], "is not an image with its registry"),
        # Keys that upstream once had, or has and callready does not set.
        ([("*", "egress.s3", S3)], "egress.s3: is not a setting"),
        ([("*", "egress.backup_storage", "/x")], "egress.backup_storage: is not a setting"),
        ([("*", "egress.storage", {"s3": S3 | {"bukket": "x"}})], "did you mean bucket?"),
        ([("*", "egress.storage", {"s3": S3 | {"secret": "abc"}})], "write a reference"),
        (
            [("*", "egress.storage", {"s3": S3, "gcp": {"bucket": "x" * 3, "credentials_json": "secret:egress/s3"}})],
            "has s3 and gcp: recordings go to one of them",
        ),
        ([("*", "egress.storage", {"prefix": "a/../../b"})], "prefix leads out of the storage"),
        ([("*", "egress.storage", {"prefix": "/a"})], "egress.storage.prefix"),
        ([(REC1, "egress", ...)], f"{REC1}: egress: is missing: the host is in group egress"),
        ([(REC1, "livekit", ...)], "livekit: is missing: egress joins rooms by its URL"),
        ([("*", "egress.livekit_key", "APIx")], "is APIx, which is not one of livekit.keys"),
        ([(REC1, "firewall.enabled", False)], "egress: needs the packet filter"),
        ([("*", "livekit.url", "ws://127.0.0.1:7880")], "127.0.0.1 is loopback, where egress'"),
        ([("*", "egress.registry_ca", "no.pem")], "egress.registry_ca: no.pem: no such file"),
        ([("*", "deploy", {"confirm_timeout": 44})], "44 s are too few for egress to start"),
        ([(REC1, "groups", ["other"])], "egress: is set, and no host is in group egress"),
        ([(SFU1, "groups", ["livekit"]), ("*", "redis", ...)], "redis: is missing: by it LiveKit"),
        (
            [("*", "livekit.redis", {"address": "/run/redis/redis.sock"})],
            "/run/redis/redis.sock is a socket, which egress' container has not",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(edits: list[Edit], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        recorded(*edits)
    assert message in str(refused.value)


def test_without_hosts_that_record_nothing_of_it_is_there() -> None:
    release = declare(load(), SFU1).release
    assert not release.image and not release.subordinates
    assert not [path for path in release.files if "egress" in path]
    assert "recording" not in release.files[f"{ROOT}/nftables.conf"].content.decode()


def test_the_unit_runs_the_pinned_image_with_what_it_needs() -> None:
    unit = files()[UNIT_FILE]
    assert f"    {IMAGE}\n" in unit and "--pull=never" in unit
    assert f"--volume={FLEET_CA}:/etc/fleet-ca.pem:ro" in unit
    assert f"-o {USER} -g 200000 /var/lib/egress/tmp" in unit
    assert "After=network-online.target callready-firewall.service\n" in unit
    on_one = files(*BOX, of=SFU1)[UNIT_FILE]
    assert "callready-firewall.service callready-redis.service livekit-server.service\n" in on_one
    assert "fleet-ca" not in on_one
    assert SECRETS["egress/livekit"] not in "".join(
        text for path, text in files().items() if path != CONFIG
    )
    release = declare(recorded(), REC1).release
    assert release.files[CONFIG].mode == 0o600
    note = f"note-inputs {UNIT} {UNIT_FILE} /etc/egress/seccomp.json /etc/egress/loopback.nft"
    assert note in files()[f"{UNIT_FILE}.d/callready.conf"]


def test_what_listens_is_for_this_host_alone() -> None:
    uses = [use for use in port_plan(recorded()[REC1]) if use.role == "egress"]
    assert {(use.first, use.audience) for use in uses} == {
        (port, "this host") for port in (7980, 7981, 7982)
    }
    text = files()[f"{ROOT}/nftables.conf"]
    (taken,) = re.findall(r"chain input {(.*?)\n    }", text, re.DOTALL)
    assert re.findall(r"dport (\d+) counter name", taken) == ["22"]


TO_SFU = [
    "ip daddr { 192.0.2.11/32 } tcp dport 7880 accept",
    "ip daddr { 192.0.2.11/32 } tcp dport 7881 accept",
    "ip daddr { 192.0.2.11/32 } udp dport 50000-60000 accept",
    "ip6 daddr { 2001:db8::11/128 } tcp dport 7880 accept",
    "ip6 daddr { 2001:db8::11/128 } tcp dport 7881 accept",
    "ip6 daddr { 2001:db8::11/128 } udp dport 50000-60000 accept",
]
PUBLIC = ["ip daddr != @private4 accept", "ip6 daddr != @private6 accept"]


def port(number: int) -> list[str]:
    return [line.replace("accept", f"tcp dport {number} accept") for line in PUBLIC]


BEFORE = ["ct state established,related accept", "udp dport 53 accept", "tcp dport 53 accept"]
LAYOUTS = ["ip daddr 127.0.0.1 tcp dport 7980 accept", "ip6 daddr ::1 tcp dport 7980 accept"]
AFTER = [
    "ip daddr 127.0.0.1 tcp dport 32768-60999 meta mark set 0xca11 accept",
    "fib daddr type local reject",
]
REDIS = "ip daddr 192.0.2.11 tcp dport 6379 accept"
LAN: Edit = ("*", "livekit.url", "ws://sfu1.callready.test:7880")
AT_HOME = {"s3": S3 | {"endpoint": "http://10.0.0.9:9000"}}
IN_THE_CLOUD = {"s3": S3 | {"endpoint": "https://s3.gra.io.cloud.ovh.net"}}


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        # The shipped URL leads to a proxy of the operator's: where, only DNS says.
        ([], [*BEFORE, REDIS, *TO_SFU, *port(443), *LAYOUTS, *AFTER, "reject"]),
        ([LAN], [*BEFORE, REDIS, *TO_SFU, *LAYOUTS, *AFTER, "reject"]),
        (
            [LAN, ("*", "egress.web", True)],
            [*BEFORE, REDIS, *TO_SFU, *LAYOUTS, *AFTER, *PUBLIC, "reject"],
        ),
        (
            [LAN, ("*", "egress.storage", AT_HOME)],
            [
                *[*BEFORE, REDIS, *TO_SFU, *LAYOUTS],
                "ip daddr 10.0.0.9 tcp dport 9000 accept",
                *[*AFTER, "reject"],
            ],
        ),
        (
            [LAN, ("*", "egress.storage", IN_THE_CLOUD)],
            [*BEFORE, REDIS, *TO_SFU, *LAYOUTS, *port(443), *AFTER, "reject"],
        ),
        (
            [LAN, ("*", "egress.allowed_networks", ["10.0.0.0/24", "turn"])],
            [
                *[*BEFORE, REDIS, *TO_SFU, *LAYOUTS, *AFTER],
                "ip daddr { 10.0.0.0/24, 192.0.2.21/32, 192.0.2.22/32 } accept",
                "ip6 daddr { 2001:db8::21/128 } accept",
                "reject",
            ],
        ),
    ],
)
def test_what_recordings_reach(edits: list[Edit], expected: list[str]) -> None:
    assert rules(*edits) == expected


def test_behind_the_edge_signalling_is_on_its_port() -> None:
    found = rules(("*", "edge", {}))
    assert [line for line in found if "443" in line] == [
        "ip daddr { 192.0.2.11/32 } tcp dport 443 accept",
        "ip6 daddr { 2001:db8::11/128 } tcp dport 443 accept",
    ]
    assert not [line for line in found if "7880" in line]


def test_what_is_no_public_address() -> None:
    text = files(("*", "egress.web", True), (SFU1, "internal_address", "141.1.1.1"))
    sets = re.findall(r"elements = { (.*) }", text[f"{ROOT}/nftables.conf"])
    networks = {network for each in sets for network in each.split(", ")}
    assert {"127.0.0.0/8", "10.0.0.0/8", "169.254.0.0/16", "fc00::/7", "141.1.1.1/32"} <= networks
    assert {"224.0.0.0/3", "::/96", "::ffff:0:0/96", "64:ff9b::/96", "ff00::/8"} <= networks
    assert "fe80::/9" in networks or "fe80::/10" in networks


def test_system_calls_leave_chromes_sandbox_what_it_needs() -> None:
    """Chrome makes user, PID and network namespaces and a new root, and nothing else does more."""
    profile = json.loads(files()["/etc/egress/seccomp.json"])
    said: dict[str, list[dict[str, Any]]] = {}
    for rule in profile["syscalls"]:
        for name in rule["names"]:
            said.setdefault(name, []).append(rule)
    for name in ("clone", "unshare"):
        (rule,) = said[name]
        (argument,) = rule["args"]
        flags = {"NEWNS": 0x20000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000, "NEWCGROUP": 0x2000000}
        assert argument["op"] == "SCMP_CMP_MASKED_EQ" and argument["valueTwo"] == 0
        assert argument["value"] == sum(flags.values())
    assert [rule["action"] for rule in said["chroot"]] == ["SCMP_ACT_ALLOW"]
    for name in ("mount", "umount2", "setns", "pivot_root", "ptrace", "keyctl", "bpf"):
        assert [rule["action"] for rule in said[name]] == ["SCMP_ACT_ERRNO"]
    # With ENOSYS the C library takes clone instead, whose flags can be looked at.
    assert "clone3" not in said and profile["defaultErrnoRet"] == 38


@pytest.mark.parametrize(
    ("cores", "edits", "fits"),
    [
        (1, [], {"audio_room_composite", "audio_web", "track_composite", "track"}),
        (2, [], {"participant", "audio_room_composite", "audio_web", "track_composite", "track"}),
        (4, [], set(COSTS)),
        (2, [("*", "egress.cpu_cost", {"room_composite_cpu_cost": 2})], {*COSTS} - {"web"}),
    ],
)
def test_what_fits_a_host(cores: int, edits: list[Edit], fits: set[str]) -> None:
    settings = recorded(*edits)[REC1].egress
    assert settings and set(settings.fitting(cores)) == fits
    node = declare(recorded(*edits), REC1)
    node.learn(facts(cores))
    told = yaml.safe_load(node.release.files[CONFIG].content)["cpu_cost"]
    assert told == {f"{kind}_cpu_cost": cost for kind, cost in settings.costs(cores).items()}
    assert not [why for why in refusals_of(node, facts(cores)) if "cores" in why]


def test_a_host_on_which_no_recording_fits_is_refused() -> None:
    dear = {f"{kind}_cpu_cost": 3 + cost for kind, cost in COSTS.items()}
    node = declare(recorded(("*", "egress.cpu_cost", dear)), REC1)
    found = facts(2)
    node.learn(found)
    (why,) = [why for why in refusals_of(node, found) if "cores" in why]
    assert why.startswith("it has 2 cores, and the cheapest recording, track, takes 3.5 (egress.")


def test_the_image_is_pulled_before_anything_is_armed() -> None:
    found = made(facts())
    steps = [each.function for each in found.steps]
    order = ["mask", "install_packages", "reserve_ids", "install_image", "arm"]
    assert [each for each in steps if each in order and each != "mask"] == order[1:]
    assert steps.index("mask") < steps.index("install_packages")
    (pull,) = (each for each in found.install if each.function == "install_image")
    assert pull.arguments == (IMAGE, "1001")
    assert f"+ image {IMAGE} (1.14.1)" in [" ".join(change) for change in found.changes]
    lines = {"egress-ctr:200000:65536", "debian:100000:65536"}
    have: dict[str, Any] = {"images": {IMAGE}, "subordinates": {"subuid": lines, "subgid": lines}}
    again = [each.function for each in made(facts(**have)).install]
    assert "install_image" not in again and "reserve_ids" not in again


def test_numbers_that_somebody_else_may_use_are_named() -> None:
    lines = {"debian:100000:65536", "second:165536:65536", "odd"}
    notes = made(facts(subordinates={"subuid": lines, "subgid": lines})).notes
    (note,) = (note for note in notes if "overlaps" in note)
    assert note.startswith("second:165536:65536 overlaps egress-ctr:200000:65536: ")


def test_a_private_registrys_authority_goes_with_the_pull(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("PEM")
    found = made(facts(), ("*", "egress.registry_ca", str(tmp_path / "ca.pem")))
    (pull,) = (each for each in found.install if each.function == "install_image")
    assert pull.contents == [b"PEM"]


def test_podmans_own_units_are_masked_where_it_is_new() -> None:
    masked = [each.arguments[0] for each in made(facts()).install if each.function == "mask"]
    assert {"podman.socket", "podman-auto-update.timer", "netavark-dhcp-proxy.service"} <= {*masked}
    with_podman = facts(packages={"podman": "5.4.2"})
    masked = [each.arguments[0] for each in made(with_podman).install if each.function == "mask"]
    assert "podman.socket" not in masked


def test_recordings_of_one_fleet_name_their_key() -> None:
    warnings = recorded(("*", "egress.livekit_key", ...)).warnings
    assert [line for line in warnings if "recordings have the app's key" in line]
    assert config(("*", "egress.livekit_key", ...))["api_key"] == "APIunit"
    assert not [line for line in recorded().warnings if "egress" in line]


def test_a_settings_model_of_egress_has_no_default_that_costs_more_than_upstreams() -> None:
    settings = Egress.model_validate({"digest": EGRESS["digest"]})
    assert all(settings.costs(cores)[k] <= COSTS[k] for cores in (1, 2, 3, 4, 64) for k in COSTS)
