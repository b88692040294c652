"""Root shells on hosts, over pyinfra's own connections."""

from __future__ import annotations

import shlex
import time

from paramiko import SSHException
from pyinfra.api.command import StringCommand
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.connectors.util import CommandOutput

from callready.release import facts
from callready.release.node import Node
from callready.settings.problem import SettingsError

PASSWORD_END = "--end-of-password--"


def as_root(
    host: Host, node: Node, stdin: str, command: str = "sh -s", print_output: bool = False
) -> tuple[bool, CommandOutput]:
    """Run a root shell on a host; whether it ended well, and its output.

    Script, data and sudo's password all travel over stdin: an argument would be in the process
    list. A user who is root needs no sudo, which such a host may lack.
    """
    password = node.settings.sudo_password
    sudo = "sudo -n"
    if password is not None:
        # sudo takes its line only if it asks; whatever is left of it must not reach the shell.
        stdin = f"{password.get_secret_value()}\n{PASSWORD_END}\n{stdin}"
        skip = f'while IFS= read -r line; do [ "$line" = {PASSWORD_END} ] && break; done'
        sudo, command = "sudo -k -S -p ''", f"sh -c {shlex.quote(f'{skip}; exec {command}')}"
    # sudo clears the environment; the port this connection came in by is worth knowing.
    run = f'env SSH_PORT="${{SSH_CONNECTION##* }}" {command}'
    wrapped = f'[ "$(id -u)" != 0 ] || exec {run}; exec {sudo} {run}'
    result: tuple[bool, CommandOutput] = host.run_shell_command(
        StringCommand(wrapped), print_output=print_output, _stdin=stdin
    )
    return result


def output_of(host: Host, node: Node, script: str) -> list[str]:
    """What a script prints as root on a host, which is connected to if it is not; raises
    SettingsError."""
    try:
        host.connect(show_errors=False, raise_exceptions=True)
        ok, output = as_root(host, node, script)
    except (PyinfraError, SSHException, OSError) as error:
        raise SettingsError(f"{node.name}: {error}") from None
    if not ok:
        raise SettingsError(f"{node.name}: {' '.join(output.stderr_lines[-1:])}")
    return output.stdout_lines


def survey(host: Host, node: Node) -> facts.Facts:
    """Read everything a deploy of a host needs to know, in one round trip.

    Raises:
        SettingsError: no root shell there.
        facts.SurveyError: it was cut short.
    """
    sent_at = time.time()
    ok, output = as_root(host, node, facts.script(node.release.survey_variables()))
    if not ok:
        *_, words = ["no words", *output.stderr.strip().splitlines()]
        if "sudo" in words and "not found" in words:
            words = "it has no sudo: install it there, or connect as root (ssh_user)"
        elif "password is required" in words:
            words += ': write its reference, sudo_password = "secret:sudo"'
        raise SettingsError(f"cannot look at the host as root: {words}")
    return facts.parse(output.stdout_lines, sent_at)
