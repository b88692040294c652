"""New SSH connections to a host, beside the deploy's own: an open connection goes on working when
no new one is let in, so only a new one proves that the host can still be reached."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import gevent
from paramiko import BadHostKeyException, SSHException, Transport
from paramiko.ssh_exception import NoValidConnectionsError
from pydantic import SecretStr
from pyinfra.api.config import Config
from pyinfra.api.exceptions import ConnectError, PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.api.state import State
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.connectors.sshuserclient.client import SSHClient, get_ssh_config

from callready.probes import reason
from callready.release.node import Node
from callready.secrets.masking import HIDDEN
from callready.settings.fleet import Fleet

TIMEOUT = 5.0
"""Seconds for each step of a connection: TCP, SSH's banner, authentication, the command."""

# paramiko's own words, some of them tracebacks, go nowhere: what matters is raised.
_LOG = logging.getLogger("callready.ssh")
_LOG.addHandler(logging.NullHandler())
_LOG.propagate = False

THE_DEPLOYS_WAY = 0
"""In place of an address family, where a jump host or a local connector leaves no choice."""


def transport(sock: Any, **options: Any) -> Transport:
    """A paramiko transport without Nagle's delay (40 ms an exec) that gives a dead line up.

    The unacknowledged-data limit is 20 s (TCP_USER_TIMEOUT, RFC 5482) and a keepalive every 5 s
    makes sure that there is data to be acknowledged.
    """
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
    made = Transport(sock, **options)
    made.set_keepalive(5)
    return made


class Hidden(str):
    """A secret that paramiko takes for text; pyinfra logs how it connects."""

    def __repr__(self) -> str:
        return HIDDEN


def hosts_of(
    data: Mapping[str, Mapping[str, Any]], names: list[str], fleet: Fleet
) -> dict[str, Host]:
    """Hosts of an inventory's `data` as a deploy would connect to them, for commands that pyinfra
    does not run; unknown host keys are refused."""
    options = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), TIMEOUT)
    kwargs = {"ssh_paramiko_connect_kwargs": {"transport_factory": transport, **options}}
    strict = {"ssh_strict_host_key_checking": "yes", **kwargs}
    inventory = Inventory(([(name, {**strict, **data[name]}) for name in names], {}))
    State(inventory, Config())
    for host in inventory:
        log_in(host, fleet)
    return {host.name: host for host in inventory}


def log_in(host: Host, fleet: Fleet) -> None:
    """Give a host's connector the secrets that its `ssh_…` data refer to; in the data, which
    pyinfra prints, the references stay."""
    cast(dict[str, Any], host.connector.data).update(_revealed(fleet.logins.get(host.name, {})))


def _revealed(data: Any) -> Any:
    if isinstance(data, SecretStr):
        return Hidden(data.get_secret_value())
    if isinstance(data, Mapping):
        return {key: _revealed(value) for key, value in data.items()}
    return list(map(_revealed, data)) if isinstance(data, list) else data


def families(host: Host, node: Node) -> dict[int, str]:
    """The address families by which this machine can open a new, authenticated SSH connection to
    the host now, with the address of each.

    Args:
        host: as pyinfra connects to it; its own connection is not touched.
        node: its settings, for a public address of a family that its SSH name does not have.

    Returns:
        4 and 6 with an address; behind a jump host only `THE_DEPLOYS_WAY`. Empty: none works.
    """
    candidates = addresses(host, node)
    jobs = {key: gevent.spawn(refusal, host, at) for key, at in candidates.items()}
    gevent.joinall(list(jobs.values()))
    return {
        key: candidates[key] or host.name for key, job in sorted(jobs.items()) if job.value == ""
    }


def connect(host: Host, address: str | None) -> None:
    """Open a new connection with the deploy's user, port, key and known_hosts, run `true`, close.

    Args:
        host: as pyinfra connects to it.
        address: to connect to, whose host key must still be that of the inventory's name; None
            goes the way of the deploy itself, through its jump host.

    Raises:
        ConnectError: with a sentence that says which step failed.
    """
    if not isinstance(host.connector, SSHConnector):  # @local: there is nothing to be shut out of
        return
    with client(host, address) as opened:
        try:
            channel = opened.exec_command("true", timeout=TIMEOUT)[1].channel
            if not channel.status_event.wait(TIMEOUT):
                raise TimeoutError
            if status := channel.recv_exit_status():
                raise OSError(f"`true` ends with status {status}")
        except (OSError, SSHException, EOFError) as error:
            raise _refused(host, address, error) from None


@contextmanager
def client(host: Host, address: str | None) -> Iterator[SSHClient]:
    """A new, authenticated connection; arguments and errors as `connect`."""
    options: dict[str, Any] = cast(SSHConnector, host.connector).make_paramiko_kwargs()
    options |= dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), TIMEOUT)
    opened, sock = SSHClient(), None
    opened.set_log_channel(_LOG.name)
    try:
        if address is not None:
            port = options.get("port") or int(_ssh_config(host).get("port", 22))
            sock = options["sock"] = socket.create_connection((address, port), TIMEOUT)
        opened.connect(**options)
    except (OSError, SSHException, EOFError, PyinfraError) as error:
        _close(opened)
        if sock is not None:
            sock.close()
        raise _refused(host, address, error) from None
    try:
        yield opened
    finally:
        _close(opened)


def _close(opened: SSHClient) -> None:
    """Also the connections to jump hosts, which pyinfra leaves open: each carries the next."""
    transport: Any = opened.get_transport()
    while transport is not None:
        # The socket is a channel of the connection below; closed, it has no attributes any more.
        below = getattr(transport.sock, "transport", None)
        transport.close()
        transport = below
    opened.close()


def refusal(host: Host, address: str | None) -> str:
    """Why no new connection can be opened; empty if one can. Arguments as `connect`."""
    try:
        connect(host, address)
    except (ConnectError, OSError) as error:
        return str(error)
    return ""


def dial(host: Host, node: Node) -> socket.socket | None:
    """A TCP connection to the host's sshd over the first family that has one, for who has to look
    at it also when the other is dead; None where a jump host or a local connector leaves no choice,
    and where there is none."""
    port = host.connector.data.get("ssh_port") or _ssh_config(host).get("port", 22)
    for address in addresses(host, node).values():
        with suppress(OSError):
            if address:
                return socket.create_connection((address, int(port)), TIMEOUT / 2)
    return None


def addresses(host: Host, node: Node) -> dict[int, str | None]:
    """By address family what a new connection goes to; None is the deploy's own way."""
    config = _ssh_config(host)
    behind = config.keys() & {"proxyjump", "proxycommand"}
    if behind or not isinstance(host.connector, SSHConnector):
        return {THE_DEPLOYS_WAY: None}
    found: dict[int, str | None] = {}
    with suppress(OSError):  # the settings' addresses are left
        for *_, target in socket.getaddrinfo(config.get("hostname", _name(host)), None):
            address = str(target[0])
            found.setdefault(6 if ":" in address else 4, address)
    for family, public in ((4, node.settings.address), (6, node.settings.address6)):
        if public:
            found.setdefault(family, public)
    return found


def _name(host: Host) -> str:
    return str(host.connector.data.get("ssh_hostname") or host.name)


def _ssh_config(host: Host) -> dict[str, Any]:
    """What ~/.ssh/config, or the file that the inventory names, says about the host."""
    config = get_ssh_config(host.connector.data.get("ssh_config_file"))
    return dict(config.lookup(_name(host))) if config else {}


def _refused(host: Host, address: str | None, error: Exception) -> ConnectError:
    if isinstance(error, NoValidConnectionsError):  # of several addresses
        error = next(iter(error.errors.values()))
    is_stranger = isinstance(error, BadHostKeyException)
    why = "its host key is not the one in known_hosts" if is_stranger else reason(error)
    by = f" ({address})" if address else ""
    return ConnectError(f"a new SSH connection to {host.name}{by} fails: {why}")
