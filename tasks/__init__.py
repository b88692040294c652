"""The roles, in the order in which they are read: each declares what must be true on a host."""

from callready.release.node import Node
from callready.settings.fleet import Fleet
from tasks.app_env import app_env
from tasks.caller import caller
from tasks.coturn import coturn
from tasks.edge import edge
from tasks.egress import egress
from tasks.firewall import firewall
from tasks.host import base
from tasks.livekit import livekit
from tasks.logs import logs
from tasks.monitor import monitor
from tasks.recordings import recordings
from tasks.redis import redis
from tasks.tls import tls
from tasks.watched import watched


def declare(fleet: Fleet, name: str) -> Node:
    """Everything that must be true on the host `name` of the fleet."""
    node = Node(name, fleet, survey_roles=(base, egress, firewall))
    node.release.confirm_timeout = node.settings.deploy.confirm_timeout
    node.release.drain = node.settings.deploy.drain
    node.release.egress_drain = node.settings.egress.drain if node.settings.egress else 0
    base(node)
    tls(node)
    redis(node)
    coturn(node)
    livekit(node)
    recordings(node)
    egress(node)
    edge(node)
    app_env(node)
    monitor(node)
    caller(node)
    watched(node)
    logs(node)
    firewall(node)
    node.release.promises = node.promises
    return node
