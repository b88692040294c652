def check(version, config, where="livekit.config"): return []
