"""livekit-server, the SFU."""

from typing import Any

from pydantic import SecretStr

from callready.release.node import Here

UNIT = "livekit-server.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
CONFIG = "/etc/livekit/livekit.yaml"
TURN_SECRET = "/etc/livekit/turn_secret"


def livekit(here: Here) -> None:
    """The SFU with a pinned release, its configuration as a credential only it can read."""
    settings = here.settings.livekit
    if not here.settings.is_sfu or settings is None:
        return
    servers, secret = turn_servers(here)
    here.release.user("livekit")
    binary = here.release.install(settings.base_url, settings.version, settings.archive_sha256)
    here.release.links["/usr/local/bin/livekit-server"] = binary
    credentials = [CONFIG]
    here.release.file(
        CONFIG,
        "livekit.yaml.j2",
        mode=0o600,
        secret=True,
        here=here.settings,
        lk=settings,
        turn_servers=servers,
        stun_servers=stun_servers(here),
        secret_file=f"/run/credentials/{UNIT}/turn_secret" if secret else None,
    )
    if secret:
        here.release.file(
            TURN_SECRET, content=secret.get_secret_value().encode(), mode=0o600, secret=True
        )
        credentials.append(TURN_SECRET)
    here.release.file(UNIT_FILE, "livekit-server.service.j2", binary=binary, turn_secret=secret)
    here.release.enable(UNIT, UNIT_FILE)
    here.release.service(
        UNIT,
        inputs=[UNIT_FILE],
        credentials=credentials,
        binary=binary,
        listens=[f"tcp/{settings.port}", f"tcp/{settings.rtc.tcp_port}"],
        restart_means="every running call reconnects once, a gap of seconds",
        # A node on its own goes on taking new rooms after SIGTERM, one of a cluster does not.
        drain="TERM" if settings.redis else "",
    )


def turn_servers(here: Here) -> tuple[list[dict[str, Any]], SecretStr | None]:
    """livekit.yaml's `rtc.turn_servers`: every coturn of the pool over every transport, and the
    shared secret LiveKit mints credentials with (none where the pool has fixed users)."""
    settings = here.settings.livekit
    if settings is None or settings.turn_pool is None:
        return [], None
    servers: list[dict[str, Any]] = []
    secret = None
    for turn in here.fleet.pool(settings.turn_pool).values():
        pool = turn.turn_pools[settings.turn_pool]
        secret = pool.secrets[0] if pool.secrets else None
        fixed = next(iter(pool.users.items()), None)
        ports = [("udp", pool.listening_port), ("tcp", pool.listening_port)]
        if pool.tls:
            ports.append(("tls", pool.advertised_tls_port))
        for protocol, port in ports:
            server: dict[str, Any] = {"host": turn.name, "port": port, "protocol": protocol}
            if fixed:
                server |= {"username": fixed[0], "credential": fixed[1]}
            servers.append(server)
    return servers, secret


def stun_servers(here: Here) -> list[str]:
    """livekit.yaml's `rtc.stun_servers`: ours first, so that none of LiveKit's public defaults
    is ever told to a client."""
    settings = here.settings.livekit
    if settings is None:
        return []
    pool = settings.turn_pool
    own = [
        f"{turn.name}:{turn.turn_pools[pool].listening_port}"
        for turn in (here.fleet.pool(pool).values() if pool else ())
        if pool
    ]
    return own + settings.rtc.stun_servers
