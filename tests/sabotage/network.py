"""Sabotages of the way between callers and services: filters, networks, names."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lab import Lab, plan
from tests.sabotage.sabotage import (
    Broken,
    Service,
    edited,
    named,
    sabotage,
    scripted,
)
from tests.support.breakage import (
    INTERFACE,
    Packets,
    before,
    callers,
    filtered,
    ingress,
    inside,
    mtu,
    route,
    shaped,
    without_address,
)

MEDIA, RELAY = "50000-60000", "49152-65535"
FIREWALL = "systemctl restart callready-firewall"

# Filters of other programs on the host


@sabotage("filter of others", "sfu", "foreign-filter")
def ipv6_media_dropped(at: Service) -> Broken:
    return filtered(inside(at.sfu), Packets("in", 6, "udp", MEDIA))


@sabotage("filter of others", "sfu", "foreign-filter")
def answers_of_media_dropped(at: Service) -> Broken:
    return filtered(inside(at.sfu), Packets("out", 4, "udp", MEDIA))


@sabotage("filter of others", "sfu", "foreign-filter")
def large_packets_dropped(at: Service) -> Broken:
    return filtered(inside(at.sfu), Packets("in", proto="udp", larger=1000))


@sabotage("filter of others", "sfu", "foreign-filter")
def a_third_of_media_lost(at: Service) -> Broken:
    return filtered(inside(at.sfu), Packets("in", proto="udp", ports=MEDIA, loss=30))


@sabotage("filter of others", "sfu", "foreign-filter")
def ice_tcp_rejected(at: Service) -> Broken:
    return filtered(inside(at.sfu), Packets("in", proto="tcp", ports="7881"), verdict="reject")


@sabotage("filter of others", "sfu", "foreign-filter")
def signalling_dropped_over_ipv6(at: Service) -> Broken:
    return filtered(inside(at.sfu), Packets("in", 6, "tcp", "443"))


@sabotage("filter of others", "sfu", "foreign-filter")
def callers_banned(at: Service) -> Broken:
    """As fail2ban does it."""
    return scripted(
        at.sfu,
        "nft 'table inet f2b-table { set banned { type ipv4_addr; "
        f"elements = {{ {plan.CALLER.ipv4} }}; }}; chain input "
        "{ type filter hook input priority -1; ip saddr @banned drop; }; }'",
        "nft delete table inet f2b-table",
    )


@sabotage("filter of others", "sfu", "foreign-filter")
def https_redirected(at: Service) -> Broken:
    """Before callready's filter sees it."""
    return scripted(
        at.sfu,
        "nft 'table ip proxy { chain prerouting { type nat hook prerouting priority -110; "
        "tcp dport 443 redirect to :8444; }; }'",
        "nft delete table ip proxy",
    )


@sabotage("filter of others", "sfu", "foreign-filter")
def a_second_firewall_without_our_ports(at: Service) -> Broken:
    """As ufw leaves a host: what it does not know is dropped."""
    return scripted(
        at.sfu,
        "nft 'table ip filter { chain INPUT { type filter hook input priority 0; policy drop; "
        "iif lo accept; ct state established,related accept; tcp dport { 22, 80, 443 } accept; "
        "}; }'",
        "nft delete table ip filter",
    )


@sabotage("filter of others", "turn", "foreign-filter")
def turn_rate_limited(at: Service) -> Broken:
    return filtered(inside(at.turn), Packets("in", proto="udp", ports="3478", rate="5/second"))


@sabotage("filter of others", "turn", "foreign-filter")
def relay_range_dropped(at: Service) -> Broken:
    return filtered(inside(at.turn), Packets("in", proto="udp", ports=RELAY))


@sabotage("filter of others", "turn", "foreign-filter")
def relay_cut_off_from_the_sfu(at: Service) -> Broken:
    return filtered(inside(at.turn), Packets("out", proto="udp", peer=at.sfu.ipv4))


@sabotage("filter of others", "turn", "foreign-filter")
def large_packets_dropped_at_the_relay(at: Service) -> Broken:
    return filtered(inside(at.turn), Packets("in", proto="udp", ports=RELAY, larger=1000))


@sabotage("filter of others", "turn", "foreign-filter")
def relay_throttled(at: Service) -> Broken:
    return filtered(
        inside(at.turn), Packets("both", proto="udp", ports=RELAY, rate="5 kbytes/second")
    )


@sabotage("filter of others", "turn", "foreign-filter")
def turn_tls_dropped_at_the_interface(at: Service) -> Broken:
    return filtered(ingress(at.turn), Packets("in", proto="tcp", ports="{ 443, 5349 }"))


@sabotage("filter of others", "avatar", "foreign-filter", checks="test_hosts or test_stun")
def stun_dropped_over_ipv4(at: Service) -> Broken:
    return filtered(inside(at.avatar), Packets("in", 4, "udp", "3478"))


@sabotage("filter of others", "avatar", "foreign-filter")
def turn_over_tcp_dropped(at: Service) -> Broken:
    return filtered(inside(at.avatar), Packets("in", 0, "tcp", "3478"))


# callready's own filter


@sabotage("callready's filter", "turn", "filter-changed")
def a_port_closed_in_our_filter(at: Service) -> Broken:
    insert = "nft insert rule inet callready input iif != lo tcp dport 5349 drop"
    return scripted(at.turn, insert, FIREWALL)


@sabotage("callready's filter", "turn", "filter-changed")
def turn_on_443_gone(at: Service) -> Broken:
    return scripted(at.turn, "nft flush chain inet callready turn_on_443", FIREWALL)


@sabotage("callready's filter", "sfu", "filter-changed")
def the_rule_of_media_removed(at: Service) -> Broken:
    find = "nft -a list chain inet callready input | sed -n '/udp dport 50000/s/.*handle //p'"
    return scripted(at.sfu, f"nft delete rule inet callready input handle $({find})", FIREWALL)


@sabotage("callready's filter", "avatar", "filter-not-loaded")
def our_filter_gone(at: Service) -> Broken:
    return scripted(at.avatar, "nft delete table inet callready", FIREWALL)


# The network of the host


@sabotage("network of the host", "sfu", "small-mtu", also=["address-missing"])
def a_small_mtu(at: Service) -> Broken:
    return mtu(at.sfu, 1100)


@sabotage("network of the host", "turn", "shaped")
def little_bandwidth(at: Service) -> Broken:
    return shaped(at.turn, "150kbit")


@sabotage("network of the host", "turn", "route-missing")
def no_route_from_relay_to_sfu(at: Service) -> Broken:
    return route(at.turn, f"blackhole {at.sfu.ipv4}")


@sabotage("network of the host", "sfu", "route-missing")
def no_route_to_callers_over_ipv6(at: Service) -> Broken:
    return route(at.sfu, f"unreachable {plan.CALLER.ipv6}")


@sabotage("network of the host", "sfu", "address-missing")
def ipv6_address_missing(at: Service) -> Broken:
    return without_address(at.sfu, 6)


@sabotage("network of the host", "avatar", "address-missing", "host-unreachable")
def ipv4_address_missing(at: Service) -> Broken:
    return without_address(at.avatar, 4)


@sabotage("network of the host", "turn", "route-missing")
def a_rule_that_sends_callers_nowhere(at: Service) -> Broken:
    rule = f"to {plan.CALLER.ipv4} prohibit"
    return scripted(at.turn, f"ip rule add {rule}", f"ip rule del {rule}")


@sabotage("network of the host", "sfu", "neighbour-wrong", "lost-behind-host", "route-missing")
def answers_to_a_wrong_neighbour(at: Service) -> Broken:
    neighbour = f"{plan.CALLER.ipv6} dev {INTERFACE}"
    return scripted(
        at.sfu,
        f"ip neigh replace {neighbour} lladdr 02:00:00:00:00:99 nud permanent",
        f"ip neigh del {neighbour}",
    )


@sabotage("network of the host", "sfu", "kernel-setting", "address-missing")
def ipv6_switched_off(at: Service) -> Broken:
    key = f"net.ipv6.conf.{INTERFACE}.disable_ipv6"
    address = f"{at.sfu.ipv6}/{plan.IPV6_LENGTH}"
    return scripted(
        at.sfu,
        f"sysctl -qw {key}=1",
        f"sysctl -qw {key}=0; ip address replace {address} dev {INTERFACE} nodad",
    )


# Before the host: the provider's edge, which the host cannot see


@sabotage("before the host", "sfu", "lost-before-host")
def media_dropped_before_the_host(at: Service) -> Broken:
    return filtered(before(at.sfu), Packets("in", 4, "udp", MEDIA))


@sabotage("before the host", "sfu", "lost-behind-host", "lost-before-host")
def answers_dropped_behind_the_host(at: Service) -> Broken:
    return filtered(before(at.sfu), Packets("out", 6, "udp", MEDIA))


@sabotage("before the host", "sfu", "large-packets-lost")
def large_packets_dropped_before_the_host(at: Service) -> Broken:
    return filtered(before(at.sfu), Packets("in", proto="udp", larger=1000))


@sabotage("before the host", "turn", "relay-cut-off", "lost-before-host")
def relay_range_dropped_before_the_host(at: Service) -> Broken:
    return filtered(before(at.turn), Packets("in", proto="udp", ports=RELAY))


@sabotage("before the host", "turn", "packets-lost", "lost-before-host")
def a_third_of_turn_lost_before_the_host(at: Service) -> Broken:
    return filtered(before(at.turn), Packets("in", proto="udp", ports="3478", loss=35))


@sabotage("before the host", "turn", "lost-before-host")
def turn_over_tls_dropped_before_the_host(at: Service) -> Broken:
    return filtered(before(at.turn), Packets("in", proto="tcp", ports="{ 443, 5349 }"))


@sabotage("before the host", "sfu", "lost-before-host")
def ice_tcp_dropped_before_the_host(at: Service) -> Broken:
    return filtered(before(at.sfu), Packets("in", proto="tcp", ports="7881"))


@sabotage("before the host", "avatar", "host-unreachable")
def the_line_cut(at: Service) -> Broken:
    return cut(at)


@contextmanager
def cut(at: Service) -> Iterator[None]:
    Lab().cut(at.avatar.name)
    try:
        yield
    finally:
        Lab().mend(at.avatar.name)


# Where the callers are


@contextmanager
def for_all(at: Service, packets: Packets) -> Iterator[None]:
    with ExitStack() as stack:
        for host in at.hosts:
            stack.enter_context(filtered(callers(host), packets))
        yield


@sabotage("this machine's network", "here", "this-network")
def no_udp_out_of_this_network(at: Service) -> Broken:
    return for_all(at, Packets("in", proto="udp"))


@sabotage("this machine's network", "here", "this-network")
def no_large_packets_out_of_this_network(at: Service) -> Broken:
    return for_all(at, Packets("in", proto="udp", larger=1000))


@sabotage("this machine's network", "here", "this-network")
def a_small_mtu_here(at: Service) -> Broken:
    return mtu(None, 1100)


@sabotage("this machine's network", "here", "this-network")
def no_ipv6_out_of_this_network(at: Service) -> Broken:
    return for_all(at, Packets("both", 6))


@sabotage("this machine's network", "here", "this-network", "shaped")
def little_bandwidth_here(at: Service) -> Broken:
    return shaped(None, "300kbit")


# Names


@sabotage("names", "any", "name-wrong")
def an_old_address_beside_the_new(at: Service) -> Broken:
    return named(at.turn.fqdn, "198.51.100.99", at.turn.ipv4, at.turn.ipv6)


@sabotage("names", "any", "name-wrong")
def the_turn_name_leads_elsewhere(at: Service) -> Broken:
    return named(at.turn.fqdn, "198.51.100.99")


@sabotage("names", "any", "name-wrong")
def the_sfu_name_leads_to_another_host(at: Service) -> Broken:
    return named(at.sfu.fqdn, at.avatar.ipv4, at.avatar.ipv6)


@sabotage("names", "any", "name-wrong")
def the_turn_name_leads_nowhere(at: Service) -> Broken:
    return named(at.avatar.fqdn)


@sabotage("names", "sfu", "name-overridden")
def the_turn_name_overridden_on_the_sfu(at: Service) -> Broken:
    return edited(at.sfu, "/etc/hosts", f"1i 203.0.113.9 {at.turn.fqdn}")
