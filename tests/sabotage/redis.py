"""Sabotages of the Redis that SFUs share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from tests.sabotage.sabotage import REDIS, Broken, Service, edited, sabotage, scripted, signalled
from tests.support.breakage import Packets, filtered, inside

CHECKS = "test_hosts or test_redis or test_livekit"
AGAIN = "systemctl restart callready-redis"
FOLDER = "/etc/callready/redis"
# For two seconds after Redis comes back, SFUs take no new calls.
SERVED = """timeout 60 bash -c '
    until exec 3<> /dev/tcp/localhost/7880 && printf "GET / HTTP/1.0\r\n\r\n" >&3 &&
        head -n 1 <&3 | grep -q 200; do sleep 0.1; done' 2>&-"""


def served_again(do: Callable[[Service], Broken]) -> Callable[[Service], Broken]:
    """It is undone once the SFU takes new calls."""

    @wraps(do)
    @contextmanager
    def broken(at: Service) -> Iterator[None]:
        with do(at):
            yield
        at.sfu.root(SERVED)

    return broken


@sabotage(REDIS, "redis", "unit-stopped", checks=CHECKS)
@served_again
def redis_stopped(at: Service) -> Broken:
    return scripted(at.redis, "systemctl stop callready-redis", AGAIN)


@sabotage(REDIS, "redis", "unit-hung", checks=CHECKS)
@served_again
def redis_hung(at: Service) -> Broken:
    return signalled(at.redis, "callready-redis")


@sabotage(REDIS, "redis", "file-edited", checks=CHECKS)
@served_again
def another_password_at_redis(at: Service) -> Broken:
    return edited(at.redis, f"{FOLDER}/users.acl", "s/#[0-9a-f]*/#" + "0" * 64 + "/", AGAIN)


@sabotage(REDIS, "redis", "file-edited", checks=CHECKS)
@served_again
def redis_saves_nothing(at: Service) -> Broken:
    return edited(at.redis, f"{FOLDER}/redis.conf", "s/^appendonly yes/appendonly no/", AGAIN)


@sabotage(REDIS, "any", "redis-lost", checks=CHECKS)
@served_again
def redis_dropped_by_another_filter(at: Service) -> Broken:
    """That its packets are dropped there is said of each who is not answered."""
    assert at.redis
    return filtered(inside(at.redis), Packets("in", proto="tcp", ports="6379"))
