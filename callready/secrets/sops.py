"""Encrypted stores, opened and closed by the `sops` program. Plain text passes through pipes only:
it is never an argument, a temporary file or part of a message (sops's own words quote values)."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from callready.settings.problem import SettingsError

CONFIG = ".sops.yaml"
# sops's exit statuses (its cmd/sops/codes).
TAMPERED = (25, 51, 52)  # a value or the MAC does not fit
NO_KEY = 128


class SecretsError(SettingsError):
    """The store itself cannot be used; the message says what to do."""


def is_encrypted(document: Any) -> bool:
    """Whether a parsed YAML document is a sops file."""
    return isinstance(document, Mapping) and isinstance(document.get("sops"), Mapping)


def recipients(document: Mapping[str, Any]) -> list[str]:
    """The age and SSH public keys that an encrypted document opens for."""
    return [item["recipient"] for item in document["sops"].get("age") or []]


def config_for(path: Path) -> Path | None:
    """The nearest `.sops.yaml` in the folders above a file."""
    folders = path.resolve().parents
    return next((folder / CONFIG for folder in folders if (folder / CONFIG).is_file()), None)


def decrypt(path: Path, document: Mapping[str, Any]) -> Any:
    """The plain content of an encrypted file; raises SecretsError with what to do."""
    done = _run(path, ["decrypt", "--input-type", "yaml", "--output-type", "json", str(path)])
    if done.returncode == NO_KEY:
        keys = ", ".join(_short(key) for key in recipients(document)) or "keys of another kind"
        raise SecretsError(
            f"{path}: no key on this machine opens it (it is encrypted for {keys}): put yours at "
            "~/.config/sops/age/keys.txt or ~/.ssh/id_ed25519, or name it in SOPS_AGE_KEY_FILE or "
            "SOPS_AGE_SSH_PRIVATE_KEY_FILE"
        )
    if done.returncode in TAMPERED:
        raise SecretsError(
            f"{path}: was changed by something other than sops after it was encrypted: restore it "
            f"from version control, and change it with: sops {path}"
        )
    if done.returncode:
        raise SecretsError(f"{path}: sops exits with {done.returncode}; see: sops decrypt {path}")
    return json.loads(done.stdout)


def encrypt(path: Path, text: str, old: Any) -> bytes | None:
    """`text` (YAML) encrypted as the creation rule for `path` says, or, without one, for those
    who could open the document `old`; None where neither applies.

    Raises SecretsError if sops is missing, refuses, or leaves a value readable.
    """
    config = config_for(path)
    done = None
    if config:
        done = _encrypt(path, text, ["--config", str(config)], [])
        if done.returncode and b"no matching creation rules" in done.stderr:
            done = None
    if done is None and is_encrypted(old):
        if not recipients(old):
            raise SecretsError(
                f"{path}: is encrypted for keys of another kind: add a creation "
                f"rule for it to {CONFIG}"
            )
        done = _encrypt(path, text, [], ["--age", ",".join(recipients(old))])
    if done is None:
        return None
    if done.returncode:
        raise SecretsError(
            f"{path}: sops cannot encrypt it (exit status {done.returncode}): check the creation "
            f"rule and its recipients in {config or CONFIG}"
        )
    document = yaml.safe_load(done.stdout)
    for name, value in document.items():
        if name != "sops" and value and not str(value).startswith("ENC["):
            raise SecretsError(
                f"{path}: the creation rule in {config} leaves {name} readable: remove its "
                "encrypted_regex and the like"
            )
    return done.stdout


def create_config(path: Path, text: str) -> Path:
    """Write a `.sops.yaml` with a rule for `path` and the recipients in `text` (age or SSH public
    keys, separated by blanks or commas); returns where: the work tree's root, or beside the file.

    Raises SecretsError if there is one already or `text` holds something else.
    """
    if existing := config_for(path):
        raise SecretsError(f"{existing} exists: add the recipients for {path.name} to it instead")
    keys = _parse(text)
    _run(path, ["--disable-version-check", "--version"])  # before anything is written
    folders = list(path.resolve().parents)
    root = next((folder for folder in folders if (folder / ".git").exists()), folders[0])
    rule = {"path_regex": rf"(^|/){re.escape(path.name)}$", "age": ",".join(keys)}
    header = "# Who can read which secrets; after a change run make secrets ENV=… again.\n"
    body = yaml.safe_dump({"creation_rules": [rule]}, sort_keys=False, width=10_000)
    (root / CONFIG).write_text(header + body)
    return root / CONFIG


def _parse(text: str) -> list[str]:
    words = text.replace(",", " ").split()
    keys: list[str] = []
    while words:
        word = words.pop(0)
        if re.fullmatch(r"age1[0-9a-z]{20,}", word):
            keys.append(word)
        elif word in ("ssh-ed25519", "ssh-rsa") and words and words[0].startswith("AAAA"):
            keys.append(f"{word} {words.pop(0)}")
        elif not (keys and keys[-1].startswith("ssh-") and "@" in word):  # a key's comment
            raise SecretsError(
                "RECIPIENTS: give age (age1…) or SSH (ssh-ed25519 AAAA…) public keys; one of them "
                "is neither"  # not quoted: it may be a private key
            )
    if not keys:
        raise SecretsError("RECIPIENTS: holds no age (age1…) or SSH (ssh-ed25519 AAAA…) public key")
    return keys


def _short(key: str) -> str:
    return f"{key[:12]}…{key[-6:]}"


def _encrypt(
    path: Path, text: str, before: Sequence[str], after: Sequence[str]
) -> subprocess.CompletedProcess[bytes]:
    types = ["--input-type", "yaml", "--output-type", "yaml"]
    name = ["--filename-override", str(path.resolve())]
    return _run(path, [*before, "encrypt", *types, *name, *after], text.encode())


def _run(
    path: Path, arguments: list[str], given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["sops", *arguments], input=given, capture_output=True, check=False)
    except FileNotFoundError:
        raise SecretsError(
            f"{path}: is kept encrypted and this machine has no sops program: install sops 3.10 or "
            "later (docs/secrets.md)"
        ) from None
