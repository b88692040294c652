"""The SSH keys of hosts: a deploy refuses what is not recorded, `make trust ENV=…` records.

python -m callready.trust inventories/ENV shows the key of every host as a deploy would meet it,
through the same ssh_config and jump hosts, and writes the ones that the operator accepts into the
inventory's ssh_known_hosts_file. It logs in nowhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from paramiko import (
    BadHostKeyException,
    HostKeys,
    PasswordRequiredException,
    PKey,
    SSHException,
)
from paramiko.auth_strategy import AuthResult, AuthStrategy
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey
from pyinfra.connectors.sshuserclient import client as pyinfra_client

from callready.secrets.store import replace_file
from callready.settings.inventory import inventory_data
from callready.settings.problem import SettingsError

# What to do about an encrypted key that cannot be opened.
LOCKED = (
    " and no SSH agent has it: start one and run ssh-add {}, or set ssh_key and its passphrase by "
    'reference, ssh_key_password = "secret:ssh/key_password"'
)
TIMEOUT = 10  # seconds, as pyinfra's default for a deploy


class HostKeyRefused(SSHException):
    """A host key that is not the recorded one; says what to do."""


class Client(pyinfra_client.SSHClient):
    """pyinfra's SSH client, which says of a refused host key what it is and what to do."""

    environment = "…"
    """The name of the inventory, for `make trust`."""
    entry = ""
    """What the host is called in known_hosts."""

    def parse_config(
        self, hostname: str, initial_cfg: Any = None, *options: Any, **more: Any
    ) -> Any:
        try:
            config = super().parse_config(hostname, initial_cfg, *options, **more)  # type: ignore[no-untyped-call]
        except BadHostKeyException as error:  # pyinfra trips over it
            raise SSHException(
                f"THE SSH KEY OF THE JUMP HOST {error.hostname} HAS CHANGED: ssh_config's "
                f"UserKnownHostsFile has {shown(error.expected_key)}, it shows {shown(error.key)}"
            ) from None
        port = (initial_cfg or {}).get("port") or config[1]["port"]
        self.entry = config[0] if port == 22 else f"[{config[0]}]:{port}"
        return config

    def set_missing_host_key_policy(self, policy: Any) -> None:
        strict = isinstance(policy, pyinfra_client.StrictPolicy)
        super().set_missing_host_key_policy(_Refuse() if strict else policy)

    def connect(self, *arguments: Any, **options: Any) -> None:
        try:
            super().connect(*arguments, **options)  # type: ignore[no-untyped-call]
        except BadHostKeyException as error:
            known = " and ".join(map(shown, self.known))
            raise HostKeyRefused(
                f"THE SSH KEY OF {self.entry} HAS CHANGED: recorded is {known}, it shows "
                f"{shown(error.key)}. It was installed anew, or somebody is in between: find out "
                f"which before you run make trust ENV={self.environment}"
            ) from None
        except PasswordRequiredException:
            raise SSHException(f"the key for it is encrypted{LOCKED.format('FILE')}") from None

    @property
    def known(self) -> list[PKey]:
        """The recorded keys of the host."""
        return list((self.get_host_keys().lookup(self.entry) or {}).values())


class _Refuse(paramiko.MissingHostKeyPolicy):
    def missing_host_key(self, client: Any, hostname: str, key: PKey) -> None:
        raise HostKeyRefused(
            f"the SSH key of {hostname} is not recorded: {shown(key)}. Compare and record it with "
            f"make trust ENV={client.environment}"
        )


class _Nobody(AuthStrategy):
    """Logs in nowhere: the key has been seen by then."""

    def get_sources(self) -> Iterator[Any]:
        return iter(())

    def authenticate(self, transport: paramiko.Transport) -> AuthResult:
        return AuthResult(self)


def shown(key: PKey) -> str:
    """A key's type and fingerprint, as `ssh-keygen -lf` prints them."""
    return f"{key.algorithm_name} {key.fingerprint}"


@dataclass(frozen=True)
class Seen:
    """The key that a host shows now and what is recorded for it."""

    host: str
    entry: str
    address: str
    key: PKey
    known: tuple[PKey, ...]

    @property
    def changed(self) -> bool:
        """Whether another key is recorded."""
        return bool(self.known) and self.key not in self.known


def look(host: str, data: dict[str, Any], file: Path) -> Seen | str:
    """The key of a host as a deploy would meet it, or why it cannot be seen."""
    client = Client()
    options = {
        "_pyinfra_ssh_config_file": data.get("ssh_config_file"),
        "_pyinfra_ssh_known_hosts_file": str(file if file.exists() else os.devnull),
        "_pyinfra_ssh_strict_host_key_checking": "yes",
        "timeout": TIMEOUT,
        "auth_strategy": _Nobody(paramiko.SSHConfig()),
    }
    if port := data.get("ssh_port"):
        options["port"] = int(port)
    try:
        client.connect(data.get("ssh_hostname") or host, **options)
    except HostKeyRefused:
        pass
    except (OSError, EOFError, SSHException) as error:
        client.close()
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    transport = client.get_transport()
    assert transport
    direct = not isinstance(transport.sock, paramiko.Channel | paramiko.ProxyCommand)
    address = transport.getpeername()[0] if direct else "through its jump host"
    seen = Seen(host, client.entry, address, transport.get_remote_server_key(), tuple(client.known))
    client.close()
    return seen


def lines(file: Path) -> list[str]:
    """The lines of a known_hosts file; raises SettingsError for one that hides those after it."""
    known = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(known, 1):
        try:
            HostKeyEntry.from_line(line)
        except (InvalidHostKey, SSHException):
            raise SettingsError(f"{file}, line {number}: no host key: remove the line") from None
    return known


def record(file: Path, accepted: Sequence[Seen]) -> None:
    """Write keys into a known_hosts file, in place of the recorded ones of the same hosts."""
    names = {seen.entry for seen in accepted}
    kept = [rest for line in lines(file) if (rest := _without(line, names)) is not None]
    new = {HostKeyEntry([seen.entry], seen.key).to_line() for seen in accepted}
    text = "".join(f"{line.rstrip()}\n" for line in [*kept, *sorted(filter(None, new))])
    replace_file(file, text.encode(), 0o644)


def _without(line: str, names: set[str]) -> str | None:
    """A line of known_hosts as far as it is about others; a name may be hashed."""
    entry = HostKeyEntry.from_line(line)
    if entry is None:  # a comment, an authority
        return line

    def is_named(given: str) -> bool:
        if given.startswith("|1|"):
            return any(HostKeys.hash_host(name, given) == given for name in names)
        return given in names

    others = [each for each in entry.hostnames or [] if not is_named(each)]
    if others == entry.hostnames:
        return line
    entry.hostnames = others
    return entry.to_line() if others else None


def accepted(unrecorded: Sequence[Seen], fingerprints: Sequence[str]) -> list[Seen]:
    """What may be recorded: keys that were named, and what an operator says yes to."""
    yes = [seen for seen in unrecorded if seen.key.fingerprint in fingerprints]
    asked = [seen for seen in unrecorded if seen not in yes]
    if asked and not sys.stdin.isatty():
        print("no terminal to ask on: give --fingerprint for every key to record", file=sys.stderr)
        return yes
    new = [seen for seen in asked if not seen.changed]
    if new and input(
        "Compare each with what the host's console shows (ssh-keygen -lf "
        f"/etc/ssh/ssh_host_ed25519_key.pub).\nRecord {len(new)} new? [yes/no] "
    ).strip() in ("y", "yes"):
        yes += new
    for seen in asked:
        if (
            seen.changed
            and input(
                f"The key of {seen.host} has changed. If it was installed anew and this is its "
                "key, type the host's name: "
            ).strip()
            == seen.host
        ):
            yes.append(seen)
    return yes


def trust(inventory: str, fingerprints: Sequence[str]) -> int:
    """Show the keys of an inventory's hosts and record what is accepted; returns the exit status.

    Raises SettingsError if the inventory or its known_hosts file cannot be read.
    """
    hosts = {
        name: data
        for name, data in inventory_data(inventory).items()
        if not name.startswith("@") or name.startswith("@ssh/")
    }
    files: dict[str, Path] = {}
    for name, data in hosts.items():
        if not data.get("ssh_known_hosts_file"):
            raise SettingsError(
                f"{inventory}: {name}: ssh_known_hosts_file is missing: write "
                f'ssh_known_hosts_file = "{inventory}.known_hosts" into its group data'
            )
        files[name] = Path(data["ssh_known_hosts_file"]).expanduser()
        lines(files[name])
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(look, hosts, hosts.values(), files.values()))
    for host, seen in zip(hosts, results, strict=True):
        print(_line(host, seen))
    reached = [seen for seen in results if isinstance(seen, Seen)]
    strange = set(fingerprints) - {seen.key.fingerprint for seen in reached}
    for fingerprint in sorted(strange):
        print(f"no host shows {fingerprint}", file=sys.stderr)
    unrecorded = [seen for seen in reached if seen.key not in seen.known]
    yes = accepted(unrecorded, fingerprints) if unrecorded else []
    for file in dict.fromkeys(files.values()):
        if mine := [seen for seen in yes if files[seen.host] == file]:
            record(file, mine)
            print(f"recorded {len(mine)} in {file}")
    if not unrecorded and len(reached) == len(hosts):
        print("every key is recorded: nothing to do")
    return int(bool(strange) or len(yes) < len(unrecorded) or len(reached) < len(hosts))


def _line(host: str, seen: Seen | str) -> str:
    if isinstance(seen, str):
        return f"! {host}  cannot be reached: {seen}"
    line = f"{host}  {seen.address}  {shown(seen.key)}"
    if not seen.changed:
        return f"  {line}  recorded" if seen.known else f"+ {line}  NEW"
    return f"! {line}  CHANGED\n! {host}  recorded is {' and '.join(map(shown, seen.known))}"


def main(arguments: Sequence[str]) -> int:
    """The `make trust` command."""
    parser = argparse.ArgumentParser(
        "python -m callready.trust", description="Show and record the SSH keys of hosts."
    )
    parser.add_argument("inventory", help="such as inventories/prod")
    parser.add_argument(
        "--fingerprint",
        action="append",
        default=[],
        metavar="SHA256:…",
        help="record the key with this fingerprint without asking; may be repeated",
    )
    options = parser.parse_args(arguments)
    try:
        return trust(options.inventory, options.fingerprint)
    except SettingsError as error:
        print(f"callready: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        print("\ncallready: interrupted; nothing was recorded", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
