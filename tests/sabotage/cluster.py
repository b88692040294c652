"""Sabotages of SFUs that are one service, and of pools of several TURN hosts."""

from collections.abc import Iterator
from contextlib import contextmanager

from callready.release.plan import REDIS_NEAR
from callready.settings.ports import LIVEKIT
from tasks.livekit import CONFIG
from tests.sabotage.redis import SERVED, served_again
from tests.sabotage.sabotage import (
    CLUSTER,
    Broken,
    Service,
    edited,
    restarted,
    sabotage,
    scripted,
    signalled,
)
from tests.support.breakage import Packets, before, delayed, filtered
from tests.support.fleet import eventually

CHECKS = "test_hosts or test_redis or test_cluster"
SFU = LIVEKIT.removesuffix(".service")
HEALTH = """bash -c '
    exec 3<> /dev/tcp/localhost/7880 && printf "GET / HTTP/1.0\r\n\r\n" >&3; head -n 1 <&3'"""
# The backend that has other SFUs, in HAProxy's own language over its socket.
TO_EDGE = """set -e
proxy=$(awk '/^backend/ {{ name = $2 }} /allbackups/ {{ print name }}' /etc/haproxy/haproxy.cfg)
perl -MIO::Socket::UNIX -e '
    $socket = IO::Socket::UNIX->new("/run/haproxy/admin.sock") or die;
    print $socket "{} server $ARGV[0]/upstream\n";
    print <$socket>' "$proxy"
"""


@sabotage(CLUSTER, "sfu", "rooms-split", also=["file-edited"], checks=CHECKS)
@served_again
def an_sfu_with_another_redis(at: Service) -> Broken:
    """Each of both is well by itself, and takes callers."""
    return edited(at.sfu, CONFIG, "s/^  db: 0$/  db: 1/", f"{restarted(SFU)}; {SERVED}")


@sabotage(CLUSTER, "sfu", "redis-far", checks=CHECKS)
def redis_far_from_an_sfu(at: Service) -> Broken:
    assert at.redis
    answers = Packets("in", proto="tcp", peer=at.redis.ipv4)
    return delayed(at.sfu, at.redis, answers, 4 * REDIS_NEAR)


@sabotage(CLUSTER, "sfu", "redis-lost", checks=CHECKS)
@served_again
def an_sfu_cut_off_from_redis(at: Service) -> Broken:
    """It alone says 406, after some seconds."""
    return until_not_serving(at, cut_off(at))


def cut_off(at: Service) -> Broken:
    """Nothing that the SFU sends to Redis arrives there."""
    assert at.redis
    return filtered(before(at.redis), Packets("in", proto="tcp", ports="6379", peer=at.sfu.ipv4))


@contextmanager
def until_not_serving(at: Service, broken: Broken) -> Iterator[None]:
    """Break it, and wait until the SFU says that it is not well."""
    with broken:
        eventually(lambda: " 406 " in at.sfu.root(HEALTH))
        yield


@sabotage(CLUSTER, "sfu", "unit-stopped", checks=CHECKS)
@served_again
def one_of_the_sfus_stopped(at: Service) -> Broken:
    return scripted(at.sfu, f"systemctl stop {SFU}", restarted(SFU))


@sabotage(CLUSTER, "sfu", "unit-hung", checks=CHECKS)
@served_again
def one_of_the_sfus_hung(at: Service) -> Broken:
    return signalled(at.sfu, SFU)


@sabotage(CLUSTER, "sfu", "sfu-not-serving", checks=CHECKS)
def an_sfu_taken_out_at_its_edge_and_forgotten(at: Service) -> Broken:
    return scripted(at.sfu, TO_EDGE.format("disable"), TO_EDGE.format("enable"))


@sabotage(CLUSTER, "sfu", "clocks-apart", checks=CHECKS)
def a_clock_a_second_ahead(at: Service) -> Broken:
    """As `date` has it, which the survey asks: hosts of the lab have one kernel, and its clock."""
    own, real, date = "/root/own-date", "/root/real-date", "/usr/bin/date"
    lines = f'#!/bin/sh\n[ "$*" != +%s.%N ] || set -- -d "now 1 sec" "$@"\nexec {real} "$@"'
    return scripted(
        at.sfu,
        f"set -e; cp {date} {real}; cat > {own} <<'END'\n{lines}\nEND\n"
        f"chmod +x {own}; mount --bind {own} {date}",
        f"umount {date}; rm {own} {real}",
    )


@sabotage(CLUSTER, "turn", "unit-stopped", also=["pool-of-one"], checks=CHECKS)
def all_but_one_host_of_a_pool_stopped(at: Service) -> Broken:
    return scripted(at.turn, "systemctl stop turnserver@calls", restarted("turnserver@calls"))
