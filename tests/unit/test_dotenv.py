"""The app's environment file, as its readers' own parsers take it; systemd's is asked in
tests/lab/test_in_the_way.py."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import dotenv
import pytest
from pydantic import SecretStr

from callready.release.declaration import Environment
from callready.release.facts import HOST
from tests.support.env_files import FILES, OURS

COMMON, RELEASE = HOST / "common.sh", HOST / "release.sh"
# These are commands, or what sh has no word for.
NOT_SH = {"blanks", "quoted key", "colon", "key alone", "byte order mark", "continued at the end"}


def shell(script: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["sh", "-c", f". {COMMON}; . {RELEASE}; {script}"],
        input=stdin.encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.write_text("".join(f"{key}={value}\n" for key, value in OURS.items()))
    return path


def merged(text: str, lines: Path) -> str:
    return shell(f"merge_lines {lines} /dev/null", text)


@pytest.mark.parametrize("name", FILES)
def test_every_reader_has_our_keys(name: str, lines: Path, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(merged(FILES[name], lines))
    python = dotenv.dotenv_values(path)
    assert {key: python.get(key) for key in OURS} == OURS
    # As pydantic-settings takes them: the last one of a name, whatever its letters.
    assert {k.upper(): v for k, v in python.items() if k.upper() in OURS} == OURS
    if name not in NOT_SH:
        said = shell(f"set +u -a; . {path}; env -0")
        env = dict(item.split("=", 1) for item in said.split("\0") if item)
        assert {key: env.get(key) for key in OURS} == OURS


@pytest.mark.parametrize("name", FILES)
def test_writing_them_again_changes_nothing_and_the_survey_sees_that(
    name: str, lines: Path
) -> None:
    text = merged(FILES[name], lines)
    assert merged(text, lines) == text
    env = Environment("app", {k: SecretStr(v) for k, v in OURS.items()}, (), ())
    keys = ",".join(OURS)
    seen = shell(f"mark_lines {keys} | effective_lines | sort", text)
    assert hashlib.sha256(seen.encode()).hexdigest() == env.sha256
    # What the app itself had there stays: only lines that were callready's to write are gone.
    kept = [
        line
        for line in FILES[name].splitlines()
        if not line.startswith(tuple(f"{k}=" for k in OURS))
    ]
    if "quotes" not in name and name != "old value of several lines":
        assert [line for line in text.splitlines() if line in kept] == kept


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if "other" in text])
def test_the_survey_sees_another_spelling_that_comes_later(name: str, lines: Path) -> None:
    """Written by somebody since the last deploy, behind our lines."""
    text = "".join(f"{key}={value}\n" for key, value in OURS.items())
    theirs = FILES[name].replace("LIVEKIT_API_KEY=old\n", "")
    seen = shell(f"mark_lines {','.join(OURS)} | effective_lines", text + theirs)
    assert set(seen.splitlines()) != set(text.splitlines())


def test_a_reference_to_our_key_stays_behind_it(lines: Path, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(merged(FILES["referred to"], lines))
    assert dotenv.dotenv_values(path)["B"] == "wss://livekit.test/x"


def test_the_app_s_value_of_several_lines_stays_whole(lines: Path, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(merged(FILES["within quotes"], lines))
    assert dotenv.dotenv_values(path)["B"] == "two\nLIVEKIT_API_KEY=quoted\nlines"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nB='open\nC=3\n", "2"),
        ('B="open \\"\nC=3\n', "1"),
        ("B=it's\nC=3\n", ""),  # no reader but sh opens a quote there
        ("# don't\nB='a' 'b\n", ""),
        ('B="a\nb"\n', ""),
    ],
)
def test_a_quote_that_nothing_closes_is_found(text: str, line: str) -> None:
    found = [row for row in shell("mark_lines A,LIVEKIT_URL", text).splitlines() if row[0] == "!"]
    assert found == ([f"!{line}\t"] if line else [])
