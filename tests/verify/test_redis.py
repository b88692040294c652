"""The Redis that SFUs share, as each host that uses it reaches it, and what of it is on disk."""

from __future__ import annotations

from callready.diagnosis import exchanges
from callready.diagnosis.model import Cause, Place
from callready.diagnosis.seen import OF_CALLS, OF_CLUSTER, OF_SIGNALLING
from callready.settings.fleet import Fleet
from callready.settings.ports import REDIS
from callready.settings.redis import USERS, RedisAccess
from tests.verify.check import Check, each, having
from tests.verify.redis import answers, asking, servers
from tests.verify.servers import Server
from tests.verify.targets import Site

# What none of its users needs, and each would end the service, or the one of whoever is there too.
FORBIDDEN = (("FLUSHALL",), ("CONFIG", "GET", "dir"), ("ACL", "LIST"), ("SHUTDOWN", "NOSAVE"))
LOST = "no room can be joined on {host}"


def users_of(fleet: Fleet, server: Server) -> list[tuple[str, RedisAccess]]:
    """As whom a host uses Redis, and how it gets there, by a port."""
    users = (user for user in USERS if user in server.settings.groups)
    found = {user: fleet.redis_for(server.name, user) for user in users}
    return [(user, at) for user, at in found.items() if at and not at.address.startswith("/")]


@each(lambda site: [server for server in site.hosts() if users_of(site.fleet, server)])
def test_access(server: Server, site: Site, check: Check) -> None:
    """Redis takes the passwords, for what their users need"""
    for user, known in users_of(site.fleet, server):
        found = servers(server, known)
        check.expect(
            found,
            f"{LOST.format(host=server.name)}, and no recording starts: no Sentinel says where "
            f"Redis is ({known.address})",
            "the Sentinels, and livekit.redis",
            _refused(
                server, user, known, True, "", "no answer to SENTINEL get-master-addr-by-name"
            ),
        )
        for access in found:
            _asked(server, check, user, access)


def _asked(server: Server, check: Check, user: str, access: RedisAccess) -> None:
    is_ours = not access.own
    commands = [("PING",), *(FORBIDDEN if is_ours else ())]
    found, last = answers(server, asking(access, commands))
    login = found.pop(0) if access.password and found else "+"
    pong = found.pop(0) if found else ""
    check.expect(
        login[0] == "+" and pong == "+PONG",
        f"{LOST.format(host=server.name)}, and no recording starts: Redis at {access.address} "
        f"says to {user}: {(pong if login[0] == '+' else login) or last}",
        f"{'livekit.redis' if access.own else REDIS}, its users there, and port {access.address} "
        "in the packet filter",
        _refused(server, user, access, login[0] == "+" and not pong, login, pong or last),
    )
    if login[0] != "+" or pong != "+PONG":
        return
    check.figure(f"{user} at {access.address}{' over TLS' * access.tls}")
    for command, answer in zip(FORBIDDEN if is_ours else (), found, strict=False):
        check.expect(
            answer.startswith(("-NOPERM", "-ERR")),
            f"whoever has {user}'s password may do what it must not: {' '.join(command)}",
            "users.acl on the host of group redis",
        )
    stranger, _ = answers(server, asking(access, [("PING",)], login=False))
    check.expect(
        not is_ours or (stranger and stranger[0].startswith("-NOAUTH")),
        f"Redis at {access.address} answers who has no password",
        "users.acl on the host of group redis: user default off",
    )


def _refused(
    server: Server, user: str, access: RedisAccess, silent: bool, login: str, said: str
) -> Cause:
    settings = server.settings
    key, what = "redis-refuses", f"Redis at {access.address} refuses what {user} does"
    mend = "the disk and the journal of the host that it is on"
    if login.startswith("-"):
        what = f"Redis at {access.address} does not take the inventory's password of {user}"
        mend = "deploy its host again, which writes users.acl; one of your own: livekit.redis"
    elif silent or not login:
        key, what = "redis-lost", f"Redis at {access.address} does not answer {server.name}"
        mend = f"systemctl status {REDIS} there, and what filters its port"
    return Cause(
        key,
        server.name,
        Place.CREDENTIAL if login.startswith("-") else Place.UNIT,
        what,
        mend,
        (login if login.startswith("-") else said,),
        (exchanges.signalling(server.name, settings).flow,) if settings.sfu else (),
        (*OF_SIGNALLING, *OF_CALLS, *OF_CLUSTER),
    )


@each(having(lambda server: server.settings.redis_here))
def test_saved(server: Server, check: Check) -> None:
    """Redis saves which room is where, for itself alone"""
    folder = "/var/lib/callready-redis"
    files = server.host.run(
        f"cd {folder} && find . -type f -mmin -2 | wc -l; find . ! -user redis -o -perm /077"
    ).stdout.splitlines()
    newest, *wrong = files or ["0"]
    check.figure(f"{newest} files")
    check.expect(
        int(newest),
        "the next restart of Redis splits rooms: newcomers do not meet who is in them; nothing of "
        f"it was written to {folder} in the last two minutes",
        f"journalctl -u {REDIS}, and the disk of {folder}",
    )
    check.expect(
        not wrong,
        f"others on the host read who is in which room: {', '.join(wrong)} in {folder}",
        f"chown and chmod there, as systemctl cat {REDIS} says",
    )
