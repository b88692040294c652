"""Sabotages of the Redis that SFUs share."""

from tests.sabotage.sabotage import REDIS, Broken, Service, edited, sabotage, scripted, signalled
from tests.support.breakage import Packets, filtered, inside

CHECKS = "test_hosts or test_redis or test_livekit"
AGAIN = "systemctl restart callready-redis"
FOLDER = "/etc/callready/redis"


@sabotage(REDIS, "redis", "unit-stopped", checks=CHECKS)
def redis_stopped(at: Service) -> Broken:
    return scripted(at.redis, "systemctl stop callready-redis", AGAIN)


@sabotage(REDIS, "redis", "unit-hung", checks=CHECKS)
def redis_hung(at: Service) -> Broken:
    return signalled(at.redis, "callready-redis")


@sabotage(REDIS, "redis", "file-edited", checks=CHECKS)
def another_password_at_redis(at: Service) -> Broken:
    return edited(at.redis, f"{FOLDER}/users.acl", "s/#[0-9a-f]*/#" + "0" * 64 + "/", AGAIN)


@sabotage(REDIS, "redis", "file-edited", checks=CHECKS)
def redis_saves_nothing(at: Service) -> Broken:
    return edited(at.redis, f"{FOLDER}/redis.conf", "s/^appendonly yes/appendonly no/", AGAIN)


@sabotage(REDIS, "any", "redis-lost", checks=CHECKS)
def redis_dropped_by_another_filter(at: Service) -> Broken:
    """That its packets are dropped there is said of each who is not answered."""
    assert at.redis
    return filtered(inside(at.redis), Packets("in", proto="tcp", ports="6379"))
