"""The roles, in the order in which they are read: each declares what must be true on a host."""

from callready.release.node import Here
from callready.rollout.gate import promises
from callready.settings.fleet import Fleet
from tasks.app_env import app_env
from tasks.coturn import coturn
from tasks.edge import edge
from tasks.firewall import firewall
from tasks.host import base
from tasks.livekit import livekit
from tasks.tls import tls


def declare(fleet: Fleet, name: str, ssh_ports: tuple[int, ...] = ()) -> Here:
    """Everything that must be true on the host `name` of the fleet."""
    here = Here(name, fleet, ssh_ports)
    here.release.confirm_timeout = here.settings.deploy.confirm_timeout
    here.release.drain = here.settings.deploy.drain
    base(here)
    tls(here)
    coturn(here)
    livekit(here)
    edge(here)
    app_env(here)
    firewall(here)
    here.release.promises = promises(here)
    return here
