"""Every patch of pyinfra: how this machine talks to hosts, and how a run begins and ends. Imported
by config.py, the first file of ours that pyinfra executes."""

from __future__ import annotations

import base64
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from traceback import extract_tb
from types import FrameType
from typing import Any, NoReturn

import click
import paramiko
from pyinfra.api.exceptions import ConnectError, PyinfraError
from pyinfra.api.state import State
from pyinfra.connectors import ssh, ssh_util
from pyinfra.connectors.sshuserclient import client as pyinfra_client
from pyinfra_cli import cli, inventory
from pyinfra_cli.exceptions import UnexpectedExternalError
from pyinfra_cli.util import exec_file

from callready.rollout.run import Refused, command
from callready.rollout.ssh import log_in, transport
from callready.secrets.loading import Report
from callready.settings.inventory import misread
from callready.trust import LOCKED, Client, shown


class Hop(pyinfra_client.SSHClient):
    """The connection to a jump host: as strict and as impatient as the one it carries."""

    def connect(self, *arguments: Any, **options: Any) -> None:
        super().connect(*arguments, transport_factory=transport, **options)  # type: ignore[no-untyped-call]

    def set_missing_host_key_policy(self, policy: Any) -> None:
        asks = isinstance(policy, pyinfra_client.AskPolicy)
        super().set_missing_host_key_policy(_Unknown() if asks else policy)


class _Unknown(paramiko.MissingHostKeyPolicy):
    def missing_host_key(self, client: Any, hostname: str, key: paramiko.PKey) -> NoReturn:
        raise paramiko.SSHException(
            f"the SSH key of the jump host {hostname} is not recorded: {shown(key)}. Compare it "
            "and record it where ssh does (UserKnownHostsFile): connect with ssh once"
        )


def private_key(state: State, key_filename: str, key_password: str) -> paramiko.PKey:
    """The key of `ssh_key`. One that is encrypted and has no `ssh_key_password` is taken from the
    SSH agent, as ssh does, or asked for on a terminal; raises ConnectError with what to do."""
    keys: dict[str, paramiko.PKey] = state.private_keys
    if key_filename not in keys:
        try:
            keys[key_filename] = _private_key(state, key_filename, key_password)
        except PyinfraError as error:
            raise ConnectError(f"ssh_key: {error}") from None
    return keys[key_filename]


def _private_key(state: State, file: str, passphrase: str) -> paramiko.PKey:
    try:
        return ssh_util.load_key_with_certificate(file, cwd=state.cwd, allow_prompt=False)
    except PyinfraError as error:
        if "is encrypted" not in str(error):
            raise
    if passphrase:
        try:
            return ssh_util.load_key_with_certificate(file, passphrase, cwd=state.cwd)
        except PyinfraError:
            raise PyinfraError(f"ssh_key_password does not open {file}") from None
    if key := _from_agent(file):
        return key
    if sys.stdin.isatty():
        return ssh_util.load_key_with_certificate(file, cwd=state.cwd)
    raise PyinfraError(f"{file} is encrypted{LOCKED.format(file)}")


def _from_agent(file: str) -> paramiko.PKey | None:
    """The agent's key that belongs to the public key beside a file."""
    with suppress(OSError, IndexError, ValueError, paramiko.SSHException):
        public = base64.b64decode(Path(f"{file}.pub").expanduser().read_text().split()[1])
        return next((key for key in paramiko.Agent().get_keys() if key.asbytes() == public), None)
    return None


def execute(file: str, **options: Any) -> dict[str, Any]:
    """The variables of a Python file of the operator's; raises Refused where it cannot be read."""
    try:
        return exec_file(file, **options)  # type: ignore[no-any-return]
    except SyntaxError as error:
        raise Refused(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except UnexpectedExternalError as error:
        cause = error.exception
        frame = extract_tb(cause._traceback)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        raise Refused(f"{where}: {type(cause).__name__}: {cause}") from None


def groups(file: str) -> dict[str, Any]:
    """The groups of an inventory file; raises Refused with everything that pyinfra would leave out
    of it or misread."""
    if not os.path.isfile(file):
        raise Refused(f"{file}: is no file: name an inventory, such as inventories/prod")
    variables, report = execute(file, return_locals=True), Report(file)
    report.extend(misread(variables))
    if report.errors:
        raise Refused("nothing was connected to\n" + "\n".join(report.lines("error")))
    is_group = inventory._is_inventory_group
    return {name: value for name, value in variables.items() if is_group(name, value)}


def install() -> None:
    """Every patch of pyinfra; tests/unit/test_pyinfra.py fails when pyinfra no longer needs one."""
    # Accepts unknown host keys, leaves Nagle on, and waits for a dead line for minutes.
    defaults = ssh.connector_data_meta
    defaults["ssh_paramiko_connect_kwargs"].default = {"transport_factory": transport}
    defaults["ssh_strict_host_key_checking"].default = "yes"
    # Says of a refused key neither what it is nor what to do.
    ssh.SSHClient = Client  # type: ignore[attr-defined]
    # Asks for a passphrase where nobody can answer, and leaves the agent out.
    ssh.get_private_key = private_key  # type: ignore[attr-defined]
    # Connects to jump hosts with a client of its own, which asks on the terminal.
    pyinfra_client.SSHClient = Hop  # type: ignore[misc]
    # Passes over a group of the wrong shape, and takes the last of a host's data.
    inventory._get_groups_from_filename = groups
    # Shows a traceback of its own where such a file cannot be read.
    inventory.exec_file = execute
    called = click.get_current_context().params
    if any(str(name).endswith(".py") for name in called["operations"]):
        _deploy_files()


def _deploy_files() -> None:
    """What runs of deploy files need beside that."""
    connect_all, disconnect_all, run_ops = cli.connect_all, cli.disconnect_all, cli.run_ops
    confirm, state = cli._do_confirm, cli.state

    def validate_and_connect(state: State) -> None:
        fleet = command(state.inventory).fleet
        Client.environment = Path(fleet.source).name
        for host in state.inventory:
            log_in(host, fleet)
        try:
            connect_all(state)
        except PyinfraError as error:
            raise Refused(str(error)) from None

    def disconnect_and_exit(state: State) -> None:
        disconnect_all(state)
        error = sys.exc_info()[1]
        if error and isinstance(error.__context__, EOFError):
            print("callready: no terminal to ask on: give -y or PYINFRA_YES=1", file=sys.stderr)
            _exit(state, 1)
        if isinstance(error, SystemExit):
            _exit(state, error.code)

    # Reads a deploy file only after it has connected to every host.
    cli.connect_all = validate_and_connect
    # Forgets with --no-wait which hosts failed; the roll-out has its own order anyway.
    cli.run_ops = lambda state, serial, no_wait: run_ops(state, serial)
    # Asks even where there is nothing to execute (history.py).
    cli._do_confirm = lambda message: bool(state.get_op_order()) and confirm(message)
    # Exits with 0 where no host was selected, and with a traceback where nobody can be asked. This
    # is the last that it calls; its exit status is known then.
    cli.disconnect_all = disconnect_and_exit
    # Exits with 0 on Ctrl-C.
    signal.signal(signal.SIGINT, _interrupted)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    print(
        "callready: interrupted; hosts that were being switched return by themselves, and what was "
        "drained takes new calls when those that run have ended",
        file=sys.stderr,
    )
    os._exit(130)


def _exit(state: State, status: object) -> NoReturn:
    """End at once, without 0.1 s of tearing the interpreter down.

    pyinfra exits 0 when a mistyped inventory or --limit selects no host at all; that is 1.
    """
    if not any(map(state.is_host_in_limit, state.inventory)):
        print(
            "callready: no host was selected: check the inventory's path and --limit",
            file=sys.stderr,
        )
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(bool(status)))
