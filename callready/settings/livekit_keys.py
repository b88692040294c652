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
from itertools import chain
from typing import TypeAlias

from pydantic import SecretStr

from callready.settings.problem import Problem

OLDEST, NEWEST = "1.9.12", "1.13.5"

# A leaf is Go's type; [x] is a list; "*" stands for free keys, "#" for
# free whole numbers as keys. "duration" is Go's notation (5s),
# "text" any scalar, "any" a mapping that is not looked into.
Tree: TypeAlias = "str | list[Tree] | dict[str, Tree]"


def _keys(text: str, **sections: Tree) -> dict[str, Tree]:
    """Keys written as `type name name; [type] name`, and sections of more keys."""
    keys: dict[str, Tree] = {}
    for kind, *names in map(str.split, text.split(";")):
        keys |= dict.fromkeys(names, [kind.strip("[]")] if kind.startswith("[") else kind)
    return keys | sections


_ESTIMATE = _keys(
    """int required_samples required_samples_min; float64 downward_trend_threshold;
    duration downward_trend_max_wait collapse_threshold validity_window"""
)
_CHANNEL_OBSERVER: Tree = {
    "estimate": _ESTIMATE,
    "nack": _keys("duration window_min_duration window_max_duration; float64 ratio_threshold"),
}
_PROBE_REGULATOR = _keys(
    """duration base_interval max_interval min_duration max_duration;
    float64 backoff_factor duration_increase_factor"""
)
_SETTLE = "uint32 settle_wait_num_rtt; duration settle_wait_min settle_wait_max"
_PACKET_GROUP = _keys("int min_packets; duration max_window_duration")
_WEIGHTED_LOSS = _keys(
    """duration min_duration_for_loss_validity base_duration; int base_pps;
    float64 loss_penalty_factor"""
)
_CONGESTION_DETECTOR = _keys(
    """duration packet_group_max_age jqr_min_delay dqr_max_delay estimaton_window_duration;
    float64 jqr_min_trend_coefficient jqr_min_weighted_loss dqr_max_weighted_loss
    congested_ctr_epsilon""",
    packet_group=_PACKET_GROUP,
    congested_packet_group=_PACKET_GROUP,
    probe_packet_group=_keys(_SETTLE, packet_group=_PACKET_GROUP),
    probe_regulator=_PROBE_REGULATOR,
    probe_signal=_keys(
        """float64 min_bytes_ratio min_duration_ratio jqr_min_weighted_loss dqr_max_weighted_loss;
        duration jqr_min_delay dqr_max_delay""",
        weighted_loss=_WEIGHTED_LOSS,
    ),
    weighted_loss=_WEIGHTED_LOSS,
    congested_ctr_trend=_ESTIMATE,
    **{
        f"{sign}_{level}_{region}": _keys("int min_number_of_groups; duration min_duration")
        for sign in ("queuing_delay", "loss")
        for level in ("early_warning", "congested")
        for region in ("jqr", "dqr")
    },
)
_CONGESTION_CONTROL = _keys(
    """bool enabled allow_pause use_send_side_bwe_interceptor use_send_side_bwe;
    string send_side_bwe_pacer""",
    stream_allocator=_keys(
        """int64 min_channel_capacity probe_overage_pct probe_min_bps;
        bool disable_etimation_unmanaged_tracks; string probe_mode; duration paused_min_wait"""
    ),
    remote_bwe=_keys(
        "float64 nack_ratio_attenuator expected_usage_threshold",
        channel_observer_probe=_CHANNEL_OBSERVER,
        channel_observer_non_probe=_CHANNEL_OBSERVER,
        probe_controller=_keys(_SETTLE, probe_regulator=_PROBE_REGULATOR),
    ),
    send_side_bwe={"congestion_detector": _CONGESTION_DETECTOR},
)
_INCLUDES = _keys("[string] includes excludes")
_RTX_LIMIT = _keys("float64 max_ratio; int burst_bytes")
_RTC = _keys(
    """uint32 tcp_port port_range_start port_range_end; text udp_port node_ip;
    bool use_stun_port_as_ice use_external_ip skip_external_ip_validation advertise_internal_ip
    use_ice_lite enable_loopback_candidate use_mdns external_ip_only force_tcp strict_acks
    allow_tcp_fallback allow_udp_unstable_fallback reconnect_on_publication_error
    reconnect_on_subscription_error reconnect_on_data_channel_error
    enable_rtp_stream_restart_detection enable_warp;
    [string] stun_servers;
    int sctp_min_cwnd sctp_fast_rtx_wnd sctp_cwnd_ca_step packet_buffer_size
    packet_buffer_size_video packet_buffer_size_audio tcp_fallback_rtt_threshold
    datachannel_slow_threshold;
    duration host_acceptance_min_wait srflx_acceptance_min_wait prflx_acceptance_min_wait
    relay_acceptance_min_wait datachannel_lossy_target_latency
    datachannel_data_track_target_latency;
    uint64 data_channel_max_buffered_amount""",
    interfaces=_INCLUDES,
    ips=_INCLUDES,
    batch_io=_keys("int batch_size; duration max_flush_interval"),
    turn_servers=[
        _keys(
            """string host protocol username credential secret secret_file credentials_file;
            int port ttl"""
        )
    ],
    pli_throttle=_keys("duration low_quality mid_quality high_quality"),
    congestion_control=_CONGESTION_CONTROL,
    forward_stats=_keys("duration summary_interval report_interval report_window"),
    rtx_budget={"audio": _RTX_LIMIT, "video": _RTX_LIMIT},
    flexfec=_keys("bool upstream_enabled"),
)
_STREAM_TRACKER = _keys(
    "string stream_tracker_type",
    bitrate_report_interval={"#": "duration"},
    packet_tracker={"#": _keys("uint32 samples_required cycles_required; duration cycle_duration")},
    frame_tracker={"#": _keys("float64 min_fps")},
)

TREE = _keys(
    """uint32 port prometheus_port; [string] bind_addresses; string key_file region log_level;
    bool development enable_data_tracks enable_participant_data_blob""",
    prometheus=_keys("uint32 port; string username password"),
    debug_handler=_keys("uint32 port"),
    rtc=_RTC,
    redis=_keys(
        """string address username password sentinel_master_name sentinel_username
        sentinel_password;
        int db dial_timeout read_timeout write_timeout max_redirects pool_size;
        bool use_tls; [string] sentinel_addresses cluster_addresses; duration pool_timeout""",
        tls=_keys(
            """bool enabled insecure;
            string server_name ca_cert_file client_cert_file client_key_file"""
        ),
    ),
    audio=_keys(
        """uint8 active_level min_percentile; uint32 update_interval smooth_intervals;
        bool active_red_encoding enable_loss_proxying"""
    ),
    video=_keys(
        "duration dynacast_pause_delay; int codec_regression_threshold",
        stream_tracker_manager={"video": _STREAM_TRACKER, "screenshare": _STREAM_TRACKER},
    ),
    room=_keys(
        """bool auto_create enable_remote_unmute sync_streams create_room_enabled
        enable_full_room_in_webhooks;
        uint32 max_participants empty_timeout departure_timeout max_metadata_size;
        duration create_room_timeout;
        int create_room_attempts update_batch_target_size max_room_name_length
        max_participant_identity_length""",
        enabled_codecs=[_keys("string mime fmtp_line")],
        playout_delay=_keys("bool enabled; int min max"),
        room_configurations={"*": "any"},
    ),
    turn=_keys(
        """bool enabled external_tls proxy_protocol; string domain cert_file key_file;
        int tls_port udp_port ttl_seconds per_user_relay_allocation_limit;
        uint16 relay_range_start relay_range_end;
        [string] bind_addresses allow_restricted_peer_cidrs deny_peer_cidrs
        proxy_protocol_trusted_cidrs"""
    ),
    ingress=_keys("string rtmp_base_url whip_base_url; bool enable_udp_url_pull"),
    webhook=_keys(
        "[string] urls; string api_key",
        url_notifier=_keys("int num_workers queue_size"),
        resource_url_notifier=_keys("duration max_age; int max_depth"),
        filter_params=_keys("[string] include_events exclude_events"),
    ),
    node_selector=_keys(
        "string kind sort_by algorithm; float32 cpu_load_limit sysload_limit",
        regions=[_keys("string name; float64 lat lon")],
    ),
    keys={"*": "string"},
    signal_relay=_keys(
        """duration retry_timeout min_retry_interval max_retry_interval;
        int stream_buffer_size connect_attempts"""
    ),
    psrpc=_keys("int max_attempts buffer_size; duration timeout backoff"),
    logging=_keys(
        """bool json sample; string level pion_level; int sample_initial sample_interval
        item_sample_seconds item_sample_initial item_sample_interval""",
        component_levels={"*": "string"},
    ),
    limit=_keys(
        """int32 num_tracks subscription_limit_video subscription_limit_audio;
        float32 bytes_per_sec; uint32 max_metadata_size max_attributes_size max_data_blobs_size;
        int max_room_name_length max_participant_identity_length max_participant_name_length
        max_data_blob_key_length max_data_track_custom_encoding_length;
        int64 signal_message_size_limit agent_signal_message_size_limit max_api_request_body_size;
        [float64] subscribe_pace_shadow_rates"""
    ),
    agents=_keys(
        """bool enable_user_data_recording enable_user_data_redaction; float32 target_load""",
        endpoints=_keys(
            "bool disabled; uint32 max_streams max_tunnels; duration tunnel_drain_timeout"
        ),
    ),
    metric={
        "timestamper_config": _keys(
            """duration one_way_delay_estimator_min_interval;
            int one_way_delay_estimator_max_batch"""
        ),
        "collector": _keys("uint32 sampling_interval_ms batch_interval_ms"),
        "reporter": _keys("uint32 reporting_interval_ms"),
    },
    trace=_keys("string jaeger_url"),
    node_stats=_keys(
        """duration stats_update_interval stats_max_delay;
        [duration] stats_rate_measurement_intervals"""
    ),
    api=_keys(
        """duration execution_timeout check_interval max_check_interval;
        bool enable_psrpc_for_get_list_participants"""
    ),
    webtransport=_keys("uint32 port; string tls_cert_file tls_key_file"),
)

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
    "region": "region",
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
    "rtc.ips": "livekit.rtc.ips",
    "rtc.use_external_ip": "address",
    "rtc.stun_servers": "livekit.rtc.stun_servers",
    "rtc.turn_servers": "livekit.turn_pool and turn.pools",
}

_INTEGERS = {
    **{f"uint{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)},
    **{f"int{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (32, 64)},
    "int": (-(2**63), 2**63 - 1),
}
_SCALARS = (str, bool, int, float, SecretStr)
_DURATION = r"[-+]?(0|((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+)"  # time.ParseDuration


def check(
    version: str, config: Mapping[str, object], where: str = "livekit.config"
) -> list[Problem]:
    """What livekit-server of this version would not start with, or callready would overwrite.

    `config` is the nested mapping that goes into livekit.yaml; `where` is its dotted path in the
    settings, for the findings. Values may be secret and are never quoted.
    """
    found = []
    if not number(OLDEST) <= number(version) <= number(NEWEST):
        nearest = NEWEST if number(version) > number(NEWEST) else OLDEST
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
    since, removed = number(SINCE.get(place, OLDEST)), number(REMOVED.get(place, "999"))
    return since <= max(number(version), number(OLDEST)) < removed


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
    scalar = isinstance(value, _SCALARS)
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
        return (
            None if isinstance(value, Mapping) and _is_yaml(value) else "a mapping of plain values"
        )
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind.startswith("float"):
        return None if number else "a number"
    return None if scalar else "text"


def _is_yaml(value: object) -> bool:
    """Whether livekit.yaml can hold it."""
    if isinstance(value, Mapping):
        return all(map(_is_yaml, chain(value, value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_yaml, value))
    return value is None or isinstance(value, _SCALARS)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str | SecretStr):
        return "text"
    return f"the number {value}" if isinstance(value, int | float) else f"a {type(value).__name__}"


def number(version: str) -> tuple[int, ...]:
    """A version as what can be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def far_apart(one: str, other: str) -> bool:
    """Whether two versions are more than one minor version apart, which nodes of a cluster may not
    be: what they say to each other changes (1.8.4 was the first to mend signalling with 1.7)."""
    (major, minor), (other_major, other_minor) = number(one)[:2], number(other)[:2]
    return major != other_major or abs(minor - other_minor) > 1
