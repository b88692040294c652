"""Which keys livekit.yaml takes in which version of livekit-server.

livekit-server decodes strictly: one key that its version does not know and it does not start.

Sources: the structs that v1.9.12, v1.11.0, v1.13.1 and v1.13.5 decode into, listed by reflection
(the lists are in tests/unit/data, with the Go program that makes them). A key's first version is
the release whose changelog names it, else the first of these four that has it. What 1.13.6 to
1.13.11 added is from their pkg/config and pkg/agent; other modules' keys of those are not covered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from callready.settings.problem import Problem

OLDEST, NEWEST = "1.9.12", "1.13.5"

# A leaf is Go's type; [x] is a list; "*" stands for free keys, "#" for
# free whole numbers as keys. "duration" is Go's notation (5s),
# "text" any scalar, "any" a mapping that is not looked into.
Tree: TypeAlias = "str | list[Tree] | dict[str, Tree]"


def _each(kind: Tree, names: str) -> dict[str, Tree]:
    return dict.fromkeys(names.split(), kind)


_ESTIMATE = {
    **_each("int", "required_samples required_samples_min"),
    "downward_trend_threshold": "float64",
    **_each("duration", "downward_trend_max_wait collapse_threshold validity_window"),
}
_CHANNEL_OBSERVER: Tree = {
    "estimate": {**_ESTIMATE},
    "nack": {
        **_each("duration", "window_min_duration window_max_duration"),
        "ratio_threshold": "float64",
    },
}
_PROBE_REGULATOR = {
    **_each("duration", "base_interval max_interval min_duration max_duration"),
    **_each("float64", "backoff_factor duration_increase_factor"),
}
_SETTLE = {"settle_wait_num_rtt": "uint32", **_each("duration", "settle_wait_min settle_wait_max")}
_PACKET_GROUP: Tree = {"min_packets": "int", "max_window_duration": "duration"}
_WEIGHTED_LOSS: Tree = {
    **_each("duration", "min_duration_for_loss_validity base_duration"),
    "base_pps": "int",
    "loss_penalty_factor": "float64",
}
_CONGESTION_DETECTOR: Tree = {
    **_each(_PACKET_GROUP, "packet_group congested_packet_group"),
    **_each(
        "duration", "packet_group_max_age jqr_min_delay dqr_max_delay estimaton_window_duration"
    ),
    "probe_packet_group": {"packet_group": _PACKET_GROUP, **_SETTLE},
    "probe_regulator": {**_PROBE_REGULATOR},
    "probe_signal": {
        **_each(
            "float64",
            "min_bytes_ratio min_duration_ratio jqr_min_weighted_loss dqr_max_weighted_loss",
        ),
        **_each("duration", "jqr_min_delay dqr_max_delay"),
        "weighted_loss": _WEIGHTED_LOSS,
    },
    **_each(
        "float64",
        "jqr_min_trend_coefficient jqr_min_weighted_loss dqr_max_weighted_loss "
        "congested_ctr_epsilon",
    ),
    "weighted_loss": _WEIGHTED_LOSS,
    **_each(
        {"min_number_of_groups": "int", "min_duration": "duration"},
        "queuing_delay_early_warning_jqr queuing_delay_early_warning_dqr "
        "loss_early_warning_jqr loss_early_warning_dqr queuing_delay_congested_jqr "
        "queuing_delay_congested_dqr loss_congested_jqr loss_congested_dqr",
    ),
    "congested_ctr_trend": {**_ESTIMATE},
}
_CONGESTION_CONTROL: Tree = {
    **_each("bool", "enabled allow_pause use_send_side_bwe_interceptor use_send_side_bwe"),
    "send_side_bwe_pacer": "string",
    "stream_allocator": {
        **_each("int64", "min_channel_capacity probe_overage_pct probe_min_bps"),
        "disable_etimation_unmanaged_tracks": "bool",
        "probe_mode": "string",
        "paused_min_wait": "duration",
    },
    "remote_bwe": {
        **_each("float64", "nack_ratio_attenuator expected_usage_threshold"),
        **_each(_CHANNEL_OBSERVER, "channel_observer_probe channel_observer_non_probe"),
        "probe_controller": {"probe_regulator": {**_PROBE_REGULATOR}, **_SETTLE},
    },
    "send_side_bwe": {"congestion_detector": _CONGESTION_DETECTOR},
}
_INCLUDES: Tree = {**_each(["string"], "includes excludes")}
_RTX_LIMIT: Tree = {"max_ratio": "float64", "burst_bytes": "int"}
_RTC: Tree = {
    **_each("uint32", "tcp_port port_range_start port_range_end"),
    **_each("text", "udp_port node_ip"),
    **_each(
        "bool",
        "use_stun_port_as_ice use_external_ip skip_external_ip_validation "
        "advertise_internal_ip use_ice_lite enable_loopback_candidate use_mdns "
        "external_ip_only force_tcp strict_acks allow_tcp_fallback "
        "allow_udp_unstable_fallback reconnect_on_publication_error "
        "reconnect_on_subscription_error reconnect_on_data_channel_error "
        "enable_rtp_stream_restart_detection enable_warp",
    ),
    "stun_servers": ["string"],
    **_each(_INCLUDES, "interfaces ips"),
    "batch_io": {"batch_size": "int", "max_flush_interval": "duration"},
    **_each(
        "int",
        "sctp_min_cwnd sctp_fast_rtx_wnd sctp_cwnd_ca_step packet_buffer_size "
        "packet_buffer_size_video packet_buffer_size_audio tcp_fallback_rtt_threshold "
        "datachannel_slow_threshold",
    ),
    **_each(
        "duration",
        "host_acceptance_min_wait srflx_acceptance_min_wait "
        "prflx_acceptance_min_wait relay_acceptance_min_wait datachannel_lossy_target_latency "
        "datachannel_data_track_target_latency",
    ),
    "turn_servers": [
        {
            **_each(
                "string", "host protocol username credential secret secret_file credentials_file"
            ),
            **_each("int", "port ttl"),
        }
    ],
    "pli_throttle": {**_each("duration", "low_quality mid_quality high_quality")},
    "congestion_control": _CONGESTION_CONTROL,
    "data_channel_max_buffered_amount": "uint64",
    "forward_stats": {**_each("duration", "summary_interval report_interval report_window")},
    "rtx_budget": {**_each(_RTX_LIMIT, "audio video")},
    "flexfec": {"upstream_enabled": "bool"},
}
_STREAM_TRACKER: Tree = {
    "stream_tracker_type": "string",
    "bitrate_report_interval": {"#": "duration"},
    "packet_tracker": {
        "#": {**_each("uint32", "samples_required cycles_required"), "cycle_duration": "duration"}
    },
    "frame_tracker": {"#": {"min_fps": "float64"}},
}

TREE: dict[str, Tree] = {
    "port": "uint32",
    "bind_addresses": ["string"],
    "prometheus_port": "uint32",
    "prometheus": {"port": "uint32", **_each("string", "username password")},
    "debug_handler": {"port": "uint32"},
    "rtc": _RTC,
    "redis": {
        **_each(
            "string",
            "address username password sentinel_master_name sentinel_username sentinel_password",
        ),
        **_each("int", "db dial_timeout read_timeout write_timeout max_redirects pool_size"),
        "use_tls": "bool",
        "tls": {
            **_each("bool", "enabled insecure"),
            **_each("string", "server_name ca_cert_file client_cert_file client_key_file"),
        },
        **_each(["string"], "sentinel_addresses cluster_addresses"),
        "pool_timeout": "duration",
    },
    "audio": {
        **_each("uint8", "active_level min_percentile"),
        **_each("uint32", "update_interval smooth_intervals"),
        **_each("bool", "active_red_encoding enable_loss_proxying"),
    },
    "video": {
        "dynacast_pause_delay": "duration",
        "stream_tracker_manager": {**_each(_STREAM_TRACKER, "video screenshare")},
        "codec_regression_threshold": "int",
    },
    "room": {
        **_each(
            "bool",
            "auto_create enable_remote_unmute sync_streams create_room_enabled "
            "enable_full_room_in_webhooks",
        ),
        "enabled_codecs": [{**_each("string", "mime fmtp_line")}],
        **_each("uint32", "max_participants empty_timeout departure_timeout max_metadata_size"),
        "playout_delay": {"enabled": "bool", **_each("int", "min max")},
        "create_room_timeout": "duration",
        **_each(
            "int",
            "create_room_attempts update_batch_target_size max_room_name_length "
            "max_participant_identity_length",
        ),
        "room_configurations": {"*": "any"},
    },
    "turn": {
        **_each("bool", "enabled external_tls proxy_protocol"),
        **_each("string", "domain cert_file key_file"),
        **_each("int", "tls_port udp_port ttl_seconds per_user_relay_allocation_limit"),
        **_each("uint16", "relay_range_start relay_range_end"),
        **_each(
            ["string"],
            "bind_addresses allow_restricted_peer_cidrs deny_peer_cidrs "
            "proxy_protocol_trusted_cidrs",
        ),
    },
    "ingress": {**_each("string", "rtmp_base_url whip_base_url"), "enable_udp_url_pull": "bool"},
    "webhook": {
        "urls": ["string"],
        "api_key": "string",
        "url_notifier": {**_each("int", "num_workers queue_size")},
        "resource_url_notifier": {"max_age": "duration", "max_depth": "int"},
        "filter_params": {**_each(["string"], "include_events exclude_events")},
    },
    "node_selector": {
        **_each("string", "kind sort_by algorithm"),
        **_each("float32", "cpu_load_limit sysload_limit"),
        "regions": [{"name": "string", **_each("float64", "lat lon")}],
    },
    **_each("string", "key_file region log_level"),
    "keys": {"*": "string"},
    "signal_relay": {
        **_each("duration", "retry_timeout min_retry_interval max_retry_interval"),
        **_each("int", "stream_buffer_size connect_attempts"),
    },
    "psrpc": {**_each("int", "max_attempts buffer_size"), **_each("duration", "timeout backoff")},
    "logging": {
        **_each("bool", "json sample"),
        **_each("string", "level pion_level"),
        "component_levels": {"*": "string"},
        **_each(
            "int",
            "sample_initial sample_interval item_sample_seconds item_sample_initial "
            "item_sample_interval",
        ),
    },
    "limit": {
        **_each("int32", "num_tracks subscription_limit_video subscription_limit_audio"),
        "bytes_per_sec": "float32",
        **_each("uint32", "max_metadata_size max_attributes_size max_data_blobs_size"),
        **_each(
            "int",
            "max_room_name_length max_participant_identity_length "
            "max_participant_name_length max_data_blob_key_length "
            "max_data_track_custom_encoding_length",
        ),
        **_each(
            "int64",
            "signal_message_size_limit agent_signal_message_size_limit max_api_request_body_size",
        ),
        "subscribe_pace_shadow_rates": ["float64"],
    },
    "agents": {
        **_each("bool", "enable_user_data_recording enable_user_data_redaction"),
        "target_load": "float32",
        "endpoints": {
            "disabled": "bool",
            **_each("uint32", "max_streams max_tunnels"),
            "tunnel_drain_timeout": "duration",
        },
    },
    **_each("bool", "development enable_data_tracks enable_participant_data_blob"),
    "metric": {
        "timestamper_config": {
            "one_way_delay_estimator_min_interval": "duration",
            "one_way_delay_estimator_max_batch": "int",
        },
        "collector": {**_each("uint32", "sampling_interval_ms batch_interval_ms")},
        "reporter": {"reporting_interval_ms": "uint32"},
    },
    "trace": {"jaeger_url": "string"},
    "node_stats": {
        **_each("duration", "stats_update_interval stats_max_delay"),
        "stats_rate_measurement_intervals": ["duration"],
    },
    "api": {
        **_each("duration", "execution_timeout check_interval max_check_interval"),
        "enable_psrpc_for_get_list_participants": "bool",
    },
    "webtransport": {"port": "uint32", **_each("string", "tls_cert_file tls_key_file")},
}

# The first version of a key (and of what is below it), where that is later than OLDEST.
SINCE = {
    path: version
    for version, paths in {
        "1.11.0": "agents.target_load api turn.bind_addresses",
        "1.12.0": "turn.allow_restricted_peer_cidrs turn.deny_peer_cidrs turn.ttl_seconds",
        "1.13.0": """rtc.advertise_internal_ip rtc.allow_udp_unstable_fallback
            rtc.host_acceptance_min_wait rtc.prflx_acceptance_min_wait rtc.relay_acceptance_min_wait
            rtc.skip_external_ip_validation rtc.srflx_acceptance_min_wait
            rtc.tcp_fallback_rtt_threshold rtc.turn_servers[].secret_file""",
        "1.13.2": """debug_handler enable_participant_data_blob limit.max_data_blob_key_length
            limit.max_data_blobs_size""",
        "1.13.3": "limit.max_data_track_custom_encoding_length",
        "1.13.4": "agents.enable_user_data_redaction rtc.datachannel_data_track_target_latency",
        "1.13.6": """limit.agent_signal_message_size_limit limit.max_api_request_body_size
            limit.signal_message_size_limit room.enable_full_room_in_webhooks rtc.enable_warp
            turn.per_user_relay_allocation_limit""",
        "1.13.7": """ingress.enable_udp_url_pull turn.proxy_protocol
            turn.proxy_protocol_trusted_cidrs""",
        "1.13.8": "agents.endpoints webtransport",
        "1.13.11": """limit.subscribe_pace_shadow_rates rtc.flexfec rtc.rtx_budget
            rtc.turn_servers[].credentials_file""",
    }.items()
    for path in paths.split()
}
# 1.13.1 has it, 1.13.5 not; no changelog says when it went.
REMOVED = {"room.create_room_enabled": "1.13.2"}

# Deprecated key: what replaces it.
DEPRECATED = {
    "prometheus_port": "set livekit.prometheus instead",
    "log_level": "set livekit.logging.level instead",
    "rtc.strict_acks": "leave it out",
    "rtc.packet_buffer_size": "use packet_buffer_size_video and packet_buffer_size_audio",
    "rtc.data_channel_max_buffered_amount": "use datachannel_slow_threshold",
    "room.max_metadata_size": "use limit.max_metadata_size",
    "room.max_room_name_length": "use limit.max_room_name_length",
    "room.max_participant_identity_length": "use limit.max_participant_identity_length",
}

# Keys that callready writes itself, and the setting that decides them.
MANAGED = {
    "port": "livekit.port",
    "bind_addresses": "livekit.bind_addresses",
    "keys": "livekit.keys",
    "key_file": "livekit.keys",
    "redis": "livekit.redis",
    "prometheus": "livekit.prometheus",
    "webhook": "livekit.webhook",
    "logging.level": "livekit.logging.level",
    "logging.pion_level": "livekit.logging.pion_level",
    "logging.json": "livekit.logging.json",
    "turn": "turn.pools (coturn relays, not the embedded TURN server)",
    "rtc.port_range_start": "livekit.rtc.port_range_start",
    "rtc.port_range_end": "livekit.rtc.port_range_end",
    "rtc.udp_port": "livekit.rtc.port_range_start and port_range_end",
    "rtc.tcp_port": "livekit.rtc.tcp_port",
    "rtc.node_ip": "address",
    "rtc.use_external_ip": "address",
    "rtc.stun_servers": "livekit.rtc.stun_servers",
    "rtc.turn_servers": "livekit.turn_pool and turn.pools",
}

_INTEGERS = {
    **{f"uint{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)},
    **{f"int{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (32, 64)},
    "int": (-(2**63), 2**63 - 1),
}
_DURATION = r"[-+]?(0|((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+)"  # time.ParseDuration


def check(
    version: str, config: Mapping[str, object], where: str = "livekit.config"
) -> list[Problem]:
    """What livekit-server of this version would not start with, or callready would overwrite.

    `config` is the nested mapping that goes into livekit.yaml; `where` is its dotted path in the
    settings, for the findings. Values may be secret and are never quoted.
    """
    found = []
    if not _number(OLDEST) <= _number(version) <= _number(NEWEST):
        nearest = NEWEST if _number(version) > _number(NEWEST) else OLDEST
        text = f"the keys of livekit-server {version} are not all known here: checked against those"
        found.append(Problem(where, f"{text} of {nearest}", "warning"))
    for path, message, level in _walk(TREE, config, "", "", version):
        found.append(Problem(f"{where}.{path}", message, level))
    return found


def _walk(tree: Tree, value: object, path: str, schema: str, version: str) -> Iterator[Problem]:
    """Findings of a value; `path` names it (rooms[0].x), `schema` its place in TREE (rooms[].x)."""
    if value is None:  # YAML's null leaves the default
        return
    if isinstance(tree, str):
        if wanted := _wanted(tree, value):
            yield Problem(path, f"must be {wanted}, not {_kind(value)}")
    elif isinstance(tree, list):
        if not isinstance(value, list | tuple):
            yield Problem(path, f"must be a list, not {_kind(value)}")
            return
        for index, item in enumerate(value):
            yield from _walk(tree[0], item, f"{path}[{index}]", f"{schema}[]", version)
    elif not isinstance(value, Mapping):
        yield Problem(path, f"must be a mapping, not {_kind(value)}")
    else:
        for key, item in value.items():
            at, place = (f"{part}.{key}".removeprefix(".") for part in (path, schema))
            if "*" in tree:
                yield from _walk(tree["*"], item, at, f"{schema}.*", version)
            elif "#" in tree and _wanted("int32", key):
                yield Problem(at, "must have a whole number (a spatial layer) as its key")
            elif "#" in tree:
                yield from _walk(tree["#"], item, at, f"{schema}.#", version)
            elif place in MANAGED:
                yield Problem(at, f"callready writes it: set {MANAGED[place]} instead")
            elif unknown := _unknown(tree, str(key), place, version):
                yield Problem(at, unknown)
            else:
                if place in DEPRECATED:
                    yield Problem(at, f"deprecated: {DEPRECATED[place]}", "warning")
                yield from _walk(tree[key], item, at, place, version)


def known(place: str, version: str) -> bool:
    """Whether a key of TREE (`rtc.turn_servers[].secret_file`) is one in this version."""
    since, removed = _number(SINCE.get(place, OLDEST)), _number(REMOVED.get(place, "999"))
    return since <= max(_number(version), _number(OLDEST)) < removed


def _unknown(tree: dict[str, Tree], key: str, place: str, version: str) -> str | None:
    if key in tree:
        if known(place, version):
            return None
        other = (
            f"it came with {SINCE[place]}" if place in SINCE else f"it went with {REMOVED[place]}"
        )
        return f"not a key of livekit-server {version}, which would not start; {other}"
    message = f"not a key of livekit.yaml in any version; livekit-server {version} would not start"
    elsewhere = [place for place in _places(TREE) if place.rpartition(".")[2] == key]
    names = difflib.get_close_matches(key, tree, n=1) or elsewhere
    return message + (f"; did you mean {names[0]}?" if names else "")


def _places(tree: Tree, place: str = "") -> Iterator[str]:
    """Every key below a tree, as a dotted path."""
    if isinstance(tree, list):
        yield from _places(tree[0], f"{place}[]")
    elif isinstance(tree, dict):
        for key, below in tree.items():
            at = f"{place}.{key}".removeprefix(".")
            yield at
            yield from _places(below, at)


def _wanted(kind: str, value: object) -> str | None:
    """What a value of this type should be, or None if the server decodes the one given."""
    scalar = not isinstance(value, Mapping | list | tuple)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in _INTEGERS:
        low, high = _INTEGERS[kind]
        if isinstance(value, int) and number and low <= value <= high:
            return None
        return f"a whole number of at least {low}" if low == 0 else "a whole number"
    if kind == "duration":
        if isinstance(value, str) and re.fullmatch(_DURATION, value):
            return None
        return "a duration such as 500ms or 10s, with its unit"
    if kind == "any":
        return None if isinstance(value, Mapping) else "a mapping"
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind.startswith("float"):
        return None if number else "a number"
    return None if scalar else "text"


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true or false"
    return f"the number {value}" if isinstance(value, int | float) else "text"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
