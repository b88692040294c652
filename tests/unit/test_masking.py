"""What is shown to people has no secret in it, known or not, and is still worth reading."""

import pytest

from callready.secrets.masking import HIDDEN, mask
from tasks import declare
from tests.support.inventories import SECRETS, SFU1, TURN1, load, write_store

PLANTED = "planted poison, not to be seen"


@pytest.mark.parametrize(
    "line",
    [
        "password: {}",
        "  password: '{}'",
        "- secret: {}",
        '"api_secret": "{}"',
        "credential: {}",
        "static-auth-secret={}",
        "cli-password={}",
        "pkey-pwd={}",
        "pkey_pwd = {}",
        "user=bob:{}",
        "TURN_SECRET={}",
        "LIVEKIT_API_SECRET={}",
        "DB_PASSWORD={}",
        "SESSION_TOKEN={}",
        "api_key: {}",
        "# old password = {}",
    ],
)
def test_a_value_is_hidden_by_its_key(line: str) -> None:
    masked = mask("before: 1\n" + line.format(PLANTED) + "\nafter: 2\n")
    assert "planted" not in masked and "poison" not in masked
    assert HIDDEN in masked
    assert masked.startswith("before: 1\n") and masked.endswith("\nafter: 2\n")


@pytest.mark.parametrize(
    "text",
    [
        "keys:\n  APIold: planted short\n  \"APInew\": 'planted'\nlogging:\n  level: info\n",
        "port: 7880\nkeys:\n    API: planted\n",
    ],
)
def test_every_value_of_livekits_keys_is_hidden_whatever_its_length(text: str) -> None:
    masked = mask(text)
    assert "planted" not in masked and "API" in masked
    assert ("level: info" in masked) == ("level: info" in text)


@pytest.mark.parametrize(
    "text",
    ["x: 0123456789abcdefghijklmnopqrstuv", "Zm9vYmFyZm9vYmFyZm9vYmFyZm9vYmFyZm9v", "one-word\n"],
)
def test_long_random_words_and_files_of_one_word_are_hidden(text: str) -> None:
    assert mask(text) in (HIDDEN, f"x: {HIDDEN}")


def test_known_secrets_are_hidden_wherever_they_are() -> None:
    masked = mask(
        "redis://:short@10.0.0.5/0\nExecStart=/x --with short-and-longer\n",
        ["short", "short-and-longer"],
    )
    assert masked == f"redis://:{HIDDEN}@10.0.0.5/0\nExecStart=/x --with {HIDDEN}\n"


def test_a_private_key_is_hidden_line_by_line() -> None:
    begin, end = "-----BEGIN EC PRIVATE KEY-----", "-----END EC PRIVATE KEY-----"
    assert mask(f"{begin}\nMHcCAQ/short/AoG\nxy/z==\n{end}\n") == f"{begin}\n{HIDDEN}\n{end}\n"


def test_a_known_secret_is_hidden_as_yaml_writes_it() -> None:
    assert mask("a: 'it''s # short'\nb: 1\n", ["it's # short"]) == f"a: '{HIDDEN}'\nb: 1\n"


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("url: https://ann:pl'nted@x.test/a", f"url: https://ann:{HIDDEN}@x.test/a"),
        ('statsdb="ip=10.0.0.5 password=x"', f'statsdb="ip=10.0.0.5 password={HIDDEN}"'),
        ("Authorization: Basic aGVsbG86/w==", f"Authorization: {HIDDEN}"),
        ("url: https://x.test/a?b=1&token=x&c=2", f"url: https://x.test/a?b=1&token={HIDDEN}&c=2"),
    ],
)
def test_a_password_inside_a_value_is_hidden(line: str, masked: str) -> None:
    assert mask(f"{line}\nmore: 1\n") == f"{masked}\nmore: 1\n"


@pytest.mark.parametrize(
    "line",
    [
        "secret_file: /run/credentials/livekit-server.service/turn_secret",
        "cert=/etc/callready/tls/current/fullchain.pem",
        "denied-peer-ip=2001:db8::-2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
        "use-auth-secret",
        "user-quota=12",
        "ExecStart=/usr/bin/turnserver -c ${CREDENTIALS_DIRECTORY}/turnserver.conf --pidfile=",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "SystemCallFilter=~@privileged @resources @obsolete",
    ],
)
def test_what_is_no_secret_stays_readable(line: str) -> None:
    assert mask(f"{line}\nmore: 1\n") == f"{line}\nmore: 1\n"


@pytest.mark.usefixtures("project")
def test_no_secret_survives_in_any_file_that_a_diff_would_show() -> None:
    write_store({**SECRETS, "cli": "planted", "jaeger": "https://ann:planted@10.0.0.6"})
    fleet = load(
        ("*", "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
        ("*", "livekit.redis", {"address": "10.0.0.5:6379", "password": "secret:redis/password"}),
        ("*", "turn.pools.avatar.secrets", ...),
        ("*", "turn.pools.avatar.users", {"bob": "secret:turn/user"}),
        ("*", "turn.pools.calls.extra", {"cli-password": "secret:cli"}),
        ("*", "livekit.config", {"trace": {"jaeger_url": "secret:jaeger"}}),
    )
    for host in (SFU1, TURN1):
        for path, file in declare(fleet, host).release.files.items():
            # As if it were an old file, whose secrets are not known here.
            masked = mask(file.content.decode())
            assert "planted" not in masked
            assert not [value for value in SECRETS.values() if value in masked], path
            if path.endswith(".service"):
                assert masked == file.content.decode()
