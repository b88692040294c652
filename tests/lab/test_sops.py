"""The encrypted store with the real sops: who can open it, what `make secrets` writes, and what an
operator is told when it does not work."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from lab import tools
from tests.support.fleet import TRACE

REPOSITORY = Path(__file__).parents[2]
ENV = "inventories/prod"
FILE = Path(f"{ENV}.secrets.yaml")
DATA = {
    "turn": {"pools": {"calls": {"realm": "a.test", "secrets": ["secret:turn/calls"]}}},
    "livekit": {
        "keys": {"APIprod": "secret:livekit/api_secret"},
        "redis": {"password": "secret:redis/password"},
    },
}
POISON = "PlantedPoison-0123456789-0123456789"


@pytest.fixture(scope="module")
def binaries() -> Path:
    """sops and age-keygen, built once for this machine."""
    return tools.install("sops", "age-keygen")


@pytest.fixture
def keys(tmp_path: Path, binaries: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An operator's home with an age key, and an inventory in a work tree where they stand."""
    for name in [name for name in os.environ if name.startswith("SOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = tmp_path / "home/.config/sops/age"
    folder.mkdir(parents=True)
    subprocess.run(["age-keygen", "-o", folder / "keys.txt"], check=True, capture_output=True)
    work = tmp_path / "work"
    (work / "inventories/group_data").mkdir(parents=True)
    (work / ".git").mkdir()
    (work / ENV).write_text("livekit = ['sfu1.prod.test']\n")
    (work / "inventories/group_data/all.py").write_text(
        "".join(f"{key} = {value!r}\n" for key, value in DATA.items())
    )
    monkeypatch.chdir(work)
    return folder / "keys.txt"


def age_key(path: Path) -> str:
    return subprocess.run(
        ["age-keygen", "-y", path], check=True, text=True, capture_output=True
    ).stdout.strip()


def ssh_key(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me@here", "-f", f"{path}"]
    subprocess.run(command, check=True)
    return path.with_suffix(".pub").read_text().strip()


def make_secrets(
    recipients: str = "", before: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*before, sys.executable, "-m", "callready.secrets", ENV],
        text=True,
        capture_output=True,
        env={**os.environ, "RECIPIENTS": recipients, **environment},
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr and POISON not in done.stdout + done.stderr
    return done


def refused(**environment: str) -> str:
    """The one sentence that an operator is told; nothing was written."""
    before = FILE.read_bytes()
    done = make_secrets("", (), **environment)
    assert (done.returncode, FILE.read_bytes()) == (1, before)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{FILE}: ")
    return line.removeprefix(f"{FILE}: ")


def opened(*environment: tuple[str, str]) -> dict[str, str]:
    """The entries as sops itself shows them."""
    shown = subprocess.run(
        ["sops", "decrypt", FILE],
        text=True,
        capture_output=True,
        env={**os.environ, **dict(environment)},
    )
    assert shown.returncode == 0, shown.stderr
    found: dict[str, str] = yaml.safe_load(shown.stdout)
    return found


def add(name: str, value: str) -> None:
    """As an operator adds an entry with an editor."""
    command = ["sops", "set", "--value-stdin", f"{FILE}", f'["{name}"]']
    subprocess.run(command, input=f'"{value}"', text=True, check=True, capture_output=True)


def complete(recipients: str) -> None:
    """A store with everything the inventory wants, encrypted."""
    assert make_secrets(recipients).returncode == 1
    add("redis/password", POISON)
    assert make_secrets().returncode == 0


def test_make_secrets_makes_a_store_that_each_recipient_can_open(keys: Path) -> None:
    ssh = ssh_key(Path.home() / "ssh/key")
    first = make_secrets(f"{age_key(keys)} {ssh}")
    assert (first.returncode, first.stderr) == (1, "")
    assert f"add redis/password with: sops {FILE}" in first.stdout
    rule = yaml.safe_load(Path(".sops.yaml").read_text())["creation_rules"]
    assert [r["path_regex"] for r in rule] == [r"(^|/)prod\.secrets\.yaml$"]
    add("redis/password", POISON)
    second = make_secrets()
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == [f"{FILE} is complete, encrypted for 2 keys"]
    entries = opened()
    assert entries.keys() == {"turn/calls", "livekit/api_secret", "redis/password"}
    assert len(set(entries.values())) == 3 and entries["redis/password"] == POISON
    keys.unlink()
    assert opened(("SOPS_AGE_SSH_PRIVATE_KEY_FILE", str(Path.home() / "ssh/key"))) == entries


def test_no_plain_text_reaches_the_disk_or_a_command_line(keys: Path) -> None:
    complete(age_key(keys))
    values = [value.encode() for value in opened().values()]
    entries_seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:  # every file of the folder, the short-lived ones too
        while not done.is_set():
            for path in Path("inventories").iterdir():
                try:
                    if path.is_file():
                        entries_seen.add(path.read_bytes())
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    text = Path("inventories/group_data/all.py").read_text()
    Path("inventories/group_data/all.py").write_text(text.replace("turn/calls", "turn/other"))
    # Every program that is started, with its arguments and environment.
    assert make_secrets(before=(*TRACE, "trace")).returncode == 0
    done.set()
    watcher.join()
    started = Path("trace").read_bytes()
    values.append(opened()["turn/other"].encode())
    for content in [*entries_seen, started]:
        assert not any(value in content for value in values)
    assert b"sops" in started and b"encrypt" in started
    assert stat.S_IMODE(FILE.stat().st_mode) == 0o600


def test_a_store_that_is_complete_is_left_alone_until_its_recipients_change(keys: Path) -> None:
    complete(age_key(keys))
    before = FILE.read_bytes()
    assert make_secrets().returncode == 0
    assert FILE.read_bytes() == before
    config = Path(".sops.yaml")
    config.write_text(config.read_text().replace("age1", f"{ssh_key(Path('key'))[:80]},age1", 1))
    assert make_secrets().stdout.splitlines() == [f"{FILE} is complete, encrypted for 2 keys"]
    config.unlink()  # without a rule, those who can open it still can
    assert make_secrets().stdout.splitlines() == [f"{FILE} is complete, encrypted for 2 keys"]


def test_a_plain_store_is_encrypted_as_soon_as_there_is_a_rule_for_it(keys: Path) -> None:
    FILE.touch(0o600)
    FILE.write_text(yaml.safe_dump({"turn/calls": POISON, "redis/password": "x" * 40}))
    assert make_secrets().stdout.splitlines()[-1] == f"{FILE} is complete"
    done = make_secrets(age_key(keys))
    assert done.stdout.splitlines()[-1] == f"{FILE} is complete, encrypted for 1 key"
    assert POISON not in FILE.read_text() and opened()["turn/calls"] == POISON


def test_a_missing_program_and_a_missing_key_are_one_sentence(
    keys: Path, binaries: Path, tmp_path: Path
) -> None:
    complete(age_key(keys))
    path = ":".join(p for p in os.environ["PATH"].split(":") if not shutil.which("sops", path=p))
    assert refused(PATH=path) == (
        "is kept encrypted and this machine has no sops program: install sops 3.10 or later "
        "(docs/secrets.md)"
    )
    (tmp_path / "nobody").mkdir()
    assert "no key on this machine opens it (it is encrypted for age1" in refused(
        HOME=str(tmp_path / "nobody")
    )
    ssh_key(tmp_path / "stranger")
    assert "no key on this machine opens it" in refused(
        HOME=str(tmp_path / "nobody"), SOPS_AGE_SSH_PRIVATE_KEY_FILE=str(tmp_path / "stranger")
    )


@pytest.mark.parametrize("change", ["removed", "swapped", "written by hand", "added by hand"])
def test_a_store_that_was_tampered_with_is_refused_and_not_quoted(keys: Path, change: str) -> None:
    complete(age_key(keys))
    lines = FILE.read_text().splitlines()
    where = {line.partition(":")[0]: at for at, line in enumerate(lines)}
    calls, api = where["turn/calls"], where["livekit/api_secret"]
    if change == "removed":
        del lines[calls]
    elif change == "swapped":
        a, b = lines[calls].partition(": ")[2], lines[api].partition(": ")[2]
        lines[calls], lines[api] = f"turn/calls: {b}", f"livekit/api_secret: {a}"
    elif change == "written by hand":
        lines[calls] = f"turn/calls: {POISON}"
    else:
        lines.append(f"turn/more: {POISON}")
    FILE.write_text("\n".join(lines))
    assert refused() == (
        "was changed by something other than sops after it was encrypted: restore it from version "
        f"control, and change it with: sops {FILE}"
    )


def test_a_rule_that_would_leave_values_readable_is_refused(keys: Path) -> None:
    complete(age_key(keys))
    with Path(".sops.yaml").open("a") as file:
        file.write("  encrypted_regex: ^data$\n")
    assert "leaves livekit/api_secret readable: remove its encrypted_regex" in refused()


def test_recipients_that_are_no_public_keys_are_not_written_anywhere(keys: Path) -> None:
    private = keys.read_text().splitlines()[-1]
    assert private.startswith("AGE-SECRET-KEY")
    done = make_secrets(private)
    assert done.returncode == 1 and "one of them is neither" in done.stderr
    assert private not in done.stdout + done.stderr
    assert not Path(".sops.yaml").exists() and not FILE.exists()
    complete(age_key(keys))
    assert "exists: add the recipients" in make_secrets(age_key(keys)).stderr


def test_a_deploy_reads_the_encrypted_store_and_names_what_it_lacks(keys: Path) -> None:
    complete(age_key(keys))
    subprocess.run(["sops", "unset", FILE, '["turn/calls"]'], check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from callready.secrets.loading import load_fleet; load_fleet({ENV!r})",
        ],
        text=True,
        capture_output=True,
    )
    assert f"{FILE} has no entry turn/calls: run make secrets ENV=prod" in done.stderr
    assert "livekit/api_secret" not in done.stderr and POISON not in done.stderr
