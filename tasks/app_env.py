"""The application's environment file: the same keys and URIs as LiveKit and coturn have."""

from pydantic import SecretStr

from callready.release.node import Node
from callready.settings.pools import handed_out
from callready.settings.uris import stun_uri, stun_uris, turn_uris


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
    told = handed_out(node.fleet, node.name, "app")
    pool = told[0][0].turn_pools[livekit.turn_pool or ""] if told else None
    if pool and pool.secrets:
        # Of nothing a backend that splits the text makes one URI that is empty, and browsers refuse
        # all of them.
        stun = stun_uris(node.fleet, node.name, "app") or [stun_uri(*told[0])]
        values |= {
            "STUN_URIS": ",".join(stun),
            "TURN_URIS": ",".join(turn_uris(node.fleet, node.name, "app")),
            "TURN_SECRET": pool.secrets[0],
            "TURN_TTL": str(livekit.rtc.turn_ttl),
        }
    if app.api_token:
        tokens = ",".join(token.get_secret_value() for token in app.api_token)
        values["APP_TOKEN"] = SecretStr(tokens)
    node.release.environment(app.env_file, app.owner, values, app.restart, app.commands)
