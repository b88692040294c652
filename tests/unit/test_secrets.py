"""The store of secrets: what it reads, what it refuses, and what `make secrets` writes."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from callready.docs import sections
from callready.rotate import RotationError, chosen
from callready.secrets import __main__ as command
from callready.secrets.store import SecretsError, Store, references, resolve, rotating
from callready.settings.fields import origin_of, secret_fields
from callready.settings.models import HostSettings
from callready.settings.problem import SettingsError
from tests.support.inventories import (
    GROUP,
    HOSTS,
    SECRETS,
    SFU1,
    SOURCE,
    Edit,
    load,
    merged,
    write_store,
)

FILE = Path(f"{SOURCE}.secrets.yaml")
WANTED = {"livekit/api_secret", "turn/calls", "turn/avatar", "redis/password", "sudo/prod"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inventories").mkdir()
    return tmp_path


def write_inventory() -> None:
    """The hosts of inventories.py as an inventory file, with two secrets of other people's programs."""
    group = {
        **GROUP,
        "sudo_password": "secret:sudo/prod",
        "livekit": {
            **GROUP["livekit"],  # type: ignore[dict-item]
            "redis": {"address": "10.0.0.5:6379", "password": "secret:redis/password"},
        },
    }
    Path("inventories/group_data").mkdir()
    Path("inventories/group_data/test.py").write_text(
        "".join(f"{key} = {value!r}\n" for key, value in group.items())
    )
    Path(SOURCE).write_text(f"livekit = {list(HOSTS)!r}\n")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Reading


def test_entries_are_read_and_none_without_a_file() -> None:
    assert Store(SOURCE).read() == {}
    write_store({"turn/calls": "value"})
    assert Store(SOURCE).read() == {"turn/calls": "value"}


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o610])
def test_a_store_that_others_may_read_is_refused(bits: int) -> None:
    write_store(SECRETS).chmod(bits)
    with pytest.raises(SecretsError, match=rf"^{FILE}: others may read it; run chmod 600 {FILE}$"):
        Store(SOURCE).read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"turn/calls: 'planted-poison", "not valid YAML"),
        (b"turn/calls: \xff planted-poison", "not valid YAML"),
        (b"- planted-poison\n", "must be a mapping of names to quoted strings"),
        (b"planted-poison", "must be a mapping of names to quoted strings"),
        (
            b"turn/calls: 12345678901234567890123456789012\n",
            "must be a mapping of names to quoted strings",
        ),
        (b"turn/calls: {planted: poison}\n", "must be a mapping of names to quoted strings"),
    ],
)
def test_a_broken_store_is_named_and_not_quoted(text: bytes, message: str) -> None:
    write_store({}).write_bytes(text)
    with pytest.raises(SecretsError) as error:
        Store(SOURCE).read()
    assert str(error.value) == f"{FILE}: {message}"
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    store, entries = Store(SOURCE), {"turn/calls": "from the file", "sudo/my-prod": "file too"}
    assert store.lookup(entries, "turn/calls") == "from the file"
    monkeypatch.setenv("CALLREADY_SECRET_TURN_CALLS", "from the environment")
    monkeypatch.setenv("CALLREADY_SECRET_SUDO_MY_PROD", "the environment too")
    assert store.lookup(entries, "turn/calls") == "from the environment"
    assert store.lookup(entries, "sudo/my-prod") == "the environment too"
    assert store.lookup(entries, "turn/avatar") is None


# References


def test_references_are_found_wherever_they_are() -> None:
    data = {
        "sudo_password": "secret:sudo/prod",
        "livekit": {"keys": {"APIunit": "secret:livekit/api_secret"}, "version": "1.13.5"},
        "turn": {"pools": {"calls": {"secrets": ["secret:turn/new", "secret:turn/old"]}}},
        "pools": ("calls",),
        "ssh_port": 22,
    }
    assert list(references(data)) == [
        ("sudo_password", "sudo/prod"),
        ("livekit.keys.APIunit", "livekit/api_secret"),
        ("turn.pools.calls.secrets.0", "turn/new"),
        ("turn.pools.calls.secrets.1", "turn/old"),
    ]


def test_references_become_values_and_the_rest_stays() -> None:
    found = resolve({"a": ["secret:x", 5], "b": {"c": "secret:y"}, "d": "secretly"}, {"x": "X"})
    assert found == {"a": [SecretStr("X"), 5], "b": {"c": SecretStr("")}, "d": "secretly"}
    assert "X" not in repr(found)


# How a secret comes about

EVERYTHING = {
    "sudo_password": "secret:a",
    "tls": {
        "acme": {
            "dns": {
                "credentials": {
                    "application_key": "secret:b",
                    "application_secret": "secret:c",
                    "consumer_key": "secret:d",
                }
            }
        }
    },
    "livekit": {
        "keys": {"APIunit": "secret:e", "APIsecond": "secret:f"},
        "redis": {"password": "secret:g"},
        "prometheus": {"password": "secret:h"},
        "config": {"trace": {"jaeger_url": "secret:i"}},
    },
    "turn": {
        "extra": {"cli-password": "secret:j"},
        "pools": {
            "calls": {"secrets": ["secret:k", "secret:l"], "extra": {"redis-userdb": "secret:m"}},
            "avatar": {"users": {"bob": "secret:n"}},
        },
    },
    "app": {"api_token": "secret:o", "health": [{"url": "https://app.test"}]},
}


def test_each_secret_says_who_makes_it_and_who_renews_it() -> None:
    said = {
        name: "by hand" if field.origin.by_hand else field.origin.rotation or "generated"
        for field in secret_fields(EVERYTHING)
        for _, name in references(field.value)
    }
    assert said.keys() == {name for _, name in references(EVERYTHING)}
    assert said == {
        **dict.fromkeys("abcdgijm", "by hand"),
        **dict.fromkeys("hn", "generated"),
        **dict.fromkeys("ef", "livekit"),
        **dict.fromkeys("kl", "turn"),
        "o": "app",
    }


def test_no_secret_of_the_models_says_nothing() -> None:
    models: list[type[BaseModel]] = [HostSettings, *(m for _, m in sections(HostSettings))]
    secret = [
        (model, name)
        for model in models
        for name, field in model.model_fields.items()
        if "SecretStr" in repr(field.annotation)
    ]
    assert len(secret) >= 7
    for model, name in secret:
        assert origin_of(model.model_fields[name]), f"{model.__name__}.{name}"


@pytest.mark.usefixtures("project")
def test_a_rotation_is_of_the_secrets_that_mint() -> None:
    edits: list[Edit] = [
        ("*", "livekit.keys.APIsecond", "secret:livekit/second"),
        ("*", "turn.pools.calls.secrets", ["secret:turn/calls", "secret:turn/user"]),
        (SFU1, "app", {"env_file": "/srv/.env", "api_token": "secret:app/token"}),
    ]
    write_store({**SECRETS, "app/token": "unit-app-token-0000000000000000-10"})
    data, fleet = merged(*edits), load(*edits)
    assert chosen(fleet, data, "turn") == ("turn", ["turn/calls"])
    assert chosen(fleet, data, "livekit") == ("livekit", ["livekit/api_secret"])
    assert chosen(fleet, data, "livekit/second") == ("key", ["livekit/second"])
    assert chosen(fleet, data, "turn/avatar") == ("pool", ["turn/avatar"])
    assert chosen(fleet, data, "app/token") == ("app", ["app/token"])
    for nothing in ("app", "pool", "turn/user", "sudo/prod"):
        with pytest.raises(RotationError, match=f"^{nothing}: nothing to rotate by this name"):
            chosen(fleet, data, nothing)


# Rotation: what stands beside a secret in the store is accepted too


def rotated(entries: dict[str, str]) -> dict[str, object]:
    data = {
        "livekit": {
            "keys": {"APIunit": "secret:livekit/key", "APIother": "secret:livekit/other"},
            "webhook": {"urls": ["https://a.test"], "api_key": "APIunit"},
        },
        "turn": {"pools": {"calls": {"secrets": ["secret:turn/calls"]}}},
        "monitor": {"livekit_key": "APIunit"},
        "egress": {"livekit_key": "APIunit"},
    }
    found = rotating(data, entries)
    assert data["turn"] == {"pools": {"calls": {"secrets": ["secret:turn/calls"]}}}
    return {
        "turn": found["turn"]["pools"]["calls"]["secrets"],
        "keys": found["livekit"]["keys"],
        "webhook": found["livekit"]["webhook"]["api_key"],
        "monitor": found["monitor"]["livekit_key"],
        "egress": found["egress"]["livekit_key"],
    }


def test_the_one_that_mints_comes_first_in_every_phase() -> None:
    assert rotated({"turn/calls": "a"})["turn"] == ["secret:turn/calls"]
    first = rotated({"turn/calls.next": "b"})["turn"]
    assert first == ["secret:turn/calls", "secret:turn/calls.next"]
    second = rotated({"turn/calls.previous": "a", "turn/calls.generation": "2"})["turn"]
    assert second == ["secret:turn/calls", "secret:turn/calls.previous"]
    assert rotated({"turn/calls.retired": "a"})["turn"] == ["secret:turn/calls"]


def test_a_livekit_key_keeps_its_name_while_its_secret_is_the_same() -> None:
    other = {"APIother": "secret:livekit/other"}
    first = rotated({"livekit/key.next": "b"})
    assert first["keys"] == {
        "APIunit": "secret:livekit/key",
        "APIunit-2": "secret:livekit/key.next",
        **other,
    }
    assert first["webhook"] == "APIunit"
    second = rotated({"livekit/key.previous": "a", "livekit/key.generation": "2"})
    assert second["keys"] == {
        "APIunit-2": "secret:livekit/key",
        "APIunit": "secret:livekit/key.previous",
        **other,
    }
    assert next(iter(second["keys"])) == second["webhook"] == second["monitor"] == "APIunit-2"
    assert second["egress"] == "APIunit-2"
    later = rotated({"livekit/key.next": "c", "livekit/key.generation": "2"})
    assert list(later["keys"])[:2] == ["APIunit-2", "APIunit-3"]  # type: ignore[call-overload]


def test_a_store_whose_generation_was_edited_is_refused() -> None:
    write_store({"livekit/key.generation": "second"})
    with pytest.raises(SecretsError, match=r"livekit/key\.generation must be a number in quotes"):
        Store(SOURCE).read()


# Writing


def test_the_store_is_written_for_its_owner_alone_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        Store(SOURCE).write({"turn/calls": "value"})
    finally:
        os.umask(before)
    assert mode(FILE) == 0o600
    assert Store(SOURCE).read() == {"turn/calls": "value"}


def test_a_write_that_fails_leaves_the_old_store_and_nothing_else() -> None:
    write_store({"turn/calls": "old"})
    with pytest.raises(yaml.YAMLError):
        Store(SOURCE).write({"turn/calls": "new", "turn/avatar": object()})  # type: ignore[dict-item]
    assert Store(SOURCE).read() == {"turn/calls": "old"}
    assert os.listdir("inventories") == [FILE.name]


def test_the_store_is_replaced_by_a_rename_and_never_open_half_written() -> None:
    path = write_store({"turn/calls": "old"})
    with path.open() as reader:
        Store(SOURCE).write({"turn/calls": "new"})
        assert yaml.safe_load(reader) == {"turn/calls": "old"}
    assert Store(SOURCE).read() == {"turn/calls": "new"}


# make secrets


def test_make_secrets_generates_what_is_missing_and_keeps_what_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_inventory()
    write_store({"turn/calls": "kept as it is", "of/no/use": "kept too"})
    assert command.complete(SOURCE) == (["redis/password", "sudo/prod"], "")
    entries = Store(SOURCE).read()
    assert entries.keys() == {"turn/calls", "of/no/use", "livekit/api_secret", "turn/avatar"}
    assert (entries["turn/calls"], entries["of/no/use"]) == ("kept as it is", "kept too")
    made = [entries["livekit/api_secret"], entries["turn/avatar"]]
    assert made[0] != made[1] and all(len(value) >= 32 for value in made)
    assert mode(FILE) == 0o600
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["generated livekit/api_secret", "generated turn/avatar"]


def test_secrets_of_free_keys_are_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        "livekit": {"config": {"trace": {"jaeger_url": "secret:jaeger"}}},
        "turn": {
            "extra": {"pkey-pwd": "secret:key"},
            "pools": {
                "extra": {
                    "secrets": ["secret:turn/extra"],
                    "extra": {"redis-statsdb": "secret:redis"},
                }
            },
        },
    }
    monkeypatch.setattr("callready.secrets.__main__.inventory_data", lambda _: {"host": data})
    assert command.complete(SOURCE) == (["jaeger", "key", "redis"], "")
    assert Store(SOURCE).read().keys() == {"turn/extra"}


def test_nothing_is_invented_that_a_setting_of_ours_does_not_say_is_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The passphrase of a key, a password that sshd knows, and what a mistyped name may mean."""
    data = {
        "ssh_key_password": "secret:ssh/key",
        "ssh_paramiko_connect_kwargs": {"passphrase": "secret:ssh/other"},
        "_sudo_password": "secret:sudo",
        "tls": {"acme": {"dsn": {"token": "secret:dns"}}},
        "app": {"api_token": "secret:token"},
        "livekit": {"keys": {"APIunit": "secret:shared"}, "config": {"x": "secret:shared"}},
    }
    monkeypatch.setattr("callready.secrets.__main__.inventory_data", lambda _: {"host": data})
    by_hand = ["dns", "shared", "ssh/key", "ssh/other", "sudo"]
    assert command.complete(SOURCE) == (by_hand, "")
    assert Store(SOURCE).read().keys() == {"token"}


def test_a_variable_of_the_inventory_does_not_make_a_secret_somebody_else_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"APIa": "secret:livekit/a"}
    data = {"h": {"_keys": keys, "livekit": {"keys": keys}}}
    monkeypatch.setattr(command, "inventory_data", lambda _: data)
    assert command.complete(SOURCE) == ([], "")
    assert Store(SOURCE).read().keys() == {"livekit/a"}


def test_nothing_is_generated_for_two_secrets_with_one_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = {name: {"x": f"secret:{name}"} for name in ("turn/calls", "turn-calls")}
    monkeypatch.setattr("callready.secrets.__main__.inventory_data", lambda _: data)
    why = "secret:turn-calls and secret:turn/calls share the environment variable "
    with pytest.raises(SettingsError, match=f"^{SOURCE}: {why}CALLREADY_SECRET_TURN_CALLS: rename"):
        command.complete(SOURCE)
    assert not FILE.exists()


def test_what_the_environment_has_is_not_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    write_inventory()
    for name in WANTED - {"turn/avatar"}:
        variable = "CALLREADY_SECRET_" + name.upper().replace("/", "_")
        monkeypatch.setenv(variable, "a value of the environment's own")
    assert command.complete(SOURCE) == ([], "")
    assert Store(SOURCE).read().keys() == {"turn/avatar"}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of the command."""
        monkeypatch.setattr("sys.argv", ["callready.secrets", *arguments])
        return (command.main(), *capsys.readouterr())

    return run


def test_the_command_says_what_is_left_to_do_and_exits_1_until_it_is_done(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    write_inventory()
    status, printed, errors = run(SOURCE)
    assert (status, errors) == (1, "")
    assert printed.splitlines()[-3:] == [
        f"{FILE}: add redis/password by hand, it belongs to something that exists",
        f"{FILE}: add sudo/prod by hand, it belongs to something that exists",
        "not complete yet",
    ]
    entries = Store(SOURCE).read()
    write_store({**entries, "redis/password": "theirs", "sudo/prod": "theirs"})
    assert run(SOURCE) == (0, f"{FILE} is complete\n", "")
    assert Store(SOURCE).read() == {**entries, "redis/password": "theirs", "sudo/prod": "theirs"}


def test_the_command_ends_with_a_sentence_where_it_cannot_work(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    absent = "inventories/absent: no such inventory file\n"
    assert run("inventories/absent") == (1, "", absent)
    write_inventory()
    write_store(SECRETS).chmod(0o644)
    assert run(SOURCE) == (1, "", f"{FILE}: others may read it; run chmod 600 {FILE}\n")
    assert run() == (2, "", "usage: python -m callready.secrets inventories/ENV\n")
