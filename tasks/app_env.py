"""The application's environment file: the same keys and URIs as LiveKit and coturn have."""

from pydantic import SecretStr

from callready.release.node import Node
from callready.settings.uris import stun_uris, turn_uris


def app_env(node: Node) -> None:
    """LIVEKIT_* and TURN_* in the app's .env; this is what ends the 401 of differing keys."""
    app, livekit = node.settings.backend, node.settings.livekit
    if app is None or livekit is None:
        return
    key, secret = next(iter(livekit.keys.items()))
    values: dict[str, str | SecretStr] = {
        "LIVEKIT_URL": livekit.url,
        "LIVEKIT_API_KEY": key,
        "LIVEKIT_API_SECRET": secret,
    }
    hosts = node.fleet.pool(livekit.turn_pool).values()
    pool = next((host.turn_pools[livekit.turn_pool or ""] for host in hosts), None)
    if pool and pool.secrets:
        values |= {
            "STUN_URIS": ",".join(stun_uris(node.fleet, livekit.turn_pool)),
            "TURN_URIS": ",".join(turn_uris(node.fleet, livekit.turn_pool)),
            "TURN_SECRET": pool.secrets[0],
            "TURN_TTL": str(livekit.rtc.turn_ttl),
        }
    if app.api_token:
        tokens = ",".join(token.get_secret_value() for token in app.api_token)
        values["APP_TOKEN"] = SecretStr(tokens)
    node.release.environment(app.env_file, app.owner, values, app.restart, app.commands)
