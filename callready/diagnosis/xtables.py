"""Rules of iptables as nftables' JSON would have them (iptables-extensions(8))."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import Any

# Of either end: the host's is the one that is planned.
_PORTS = dict.fromkeys(("--dport", "--dports", "--destination-port", "--port", "--ports"), "dport")
_PORTS |= dict.fromkeys(("--sport", "--sports", "--source-port"), "sport")
# Options that say nothing of a packet; a word follows all but _ALONE.
_SILENT = re.compile(
    r"-m$|--(comment|reject-with|icmp-type|log-prefix|log-level|limit-burst|mode|packet|every"
    r"|connlimit-(saddr|mask)|to-ports|to-destination|queue-num|random|hashlimit-htable-\w+"
    r"|hashlimit-(name|burst|mode|srcmask))$"
)
_ALONE = ("--connlimit-saddr", "--random")
_VERDICTS = {"DROP": "drop", "REJECT": "reject", "ACCEPT": "accept", "RETURN": "return"}
_VERDICTS |= {"NFQUEUE": "queue", "QUEUE": "queue", "REDIRECT": "redirect", "DNAT": "dnat"}
_VERDICTS |= {"TPROXY": "tproxy"}
_PASSING = ("TTL", "HL", "TCPMSS", "LOG", "NFLOG", "MARK", "CONNMARK", "CT")


def expressions(family: int, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the words of a rule say behind `-A CHAIN`, as nftables' JSON has it."""
    ip, n = "ip" if family == 4 else "ip6", 0

    def number(text: str) -> Any:
        low, colon, high = text.partition(":")
        if colon:
            return {"range": [int(low or 0), int(high or 65535)]}
        return int(low)

    def match(left: Any, right: Any, negated: bool) -> dict[str, Any]:
        return {"match": {"op": "!=" if negated else "==", "left": left, "right": right}}

    negated, pending = False, False
    while n < len(words):
        word = words[n]
        value = words[n + 1] if n + 1 < len(words) else ""
        n += 2
        if word == "!":
            negated, n = True, n - 1
            continue
        if word in ("-p", "--protocol"):
            if value not in ("all", "0"):
                yield match({"meta": {"key": "l4proto"}}, value, negated)
        elif word in ("-s", "-d", "--source", "--destination"):
            address, _, length = value.partition("/")
            left = {"payload": {"protocol": ip, "field": "saddr" if "s" in word[:3] else "daddr"}}
            network = ip_network(f"{address}/{length}" if length else address, strict=False)
            right = {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
            yield match(left, right, negated)
        elif word in ("-i", "-o"):
            yield match({"meta": {"key": "iifname" if word == "-i" else "oifname"}}, value, negated)
        elif word in _PORTS:
            left = {"payload": {"protocol": "th", "field": _PORTS[word]}}
            yield match(left, {"set": [number(each) for each in value.split(",")]}, negated)
        elif word == "--length":
            yield match({"meta": {"key": "length"}}, number(value), negated)
        elif word in ("--ctstate", "--state"):
            states = [each.lower() for each in value.split(",")]
            yield match({"ct": {"key": "state"}}, {"set": states}, negated)
        elif word in ("--limit", "--hashlimit-upto", "--hashlimit-above"):
            amount, _, per = value.partition("/")
            unit = {"s": "second", "m": "minute", "h": "hour", "d": "day"}.get(per[:1], "second")
            count = int(re.sub(r"\D", "", amount) or 0)
            limit = {"rate": count, "per": unit, "inv": word.endswith("above")}
            if amount.endswith("b"):
                limit["rate_unit"] = {"k": "kbytes", "m": "mbytes"}.get(amount[-2:-1], "bytes")
            yield {"limit": limit}
        elif word in ("--connlimit-above", "--connlimit-upto"):
            yield {"ct count": {"val": int(value), "inv": word.endswith("above")}}
        elif word == "--probability":
            yield match({"numgen": {}}, 0, negated)
        elif word == "--dst-type":
            fib = {"fib": {"result": "type", "flags": ["daddr"]}}
            yield match(fib, value.lower(), negated)
        elif word == "--uid-owner":
            yield match({"meta": {"key": "skuid"}}, value, negated)
        elif word in ("--ttl-set", "--hl-set", "--hop-limit-set"):
            field_name = "ttl" if family == 4 else "hoplimit"
            key = {"payload": {"protocol": ip, "field": field_name}}
            yield {"mangle": {"key": key, "value": int(value)}}
        elif word == "--set-mss":
            yield {"mangle": {"key": {"tcp option": {}}, "value": int(value)}}
        elif word == "--tcp-flags":
            mask, flags = value.split(","), words[n].split(",") if n < len(words) else []
            n += 1
            if "SYN" in mask and flags == ["SYN"]:
                yield match({"ct": {"key": "state"}}, "new", negated)
            else:
                yield match({"unknown": None}, 0, negated)
        elif word == "--syn":
            n -= 1
            yield match({"ct": {"key": "state"}}, "new", negated)
        elif word in ("-j", "-g"):
            pending = True
            if value in _VERDICTS:
                yield {_VERDICTS[value]: None}
            elif value == "SNAT":
                yield {"snat": {"addr": words[-1].partition(":")[0]}}
            elif value not in _PASSING:
                yield {"goto" if word == "-g" else "jump": {"target": value}}
        elif _SILENT.match(word):
            n -= word in _ALONE
        elif word.startswith("-") and not pending:
            if value.startswith("-"):
                n -= 1
            yield match({"unknown": None}, 0, negated)
        else:
            n -= 1
        negated = False
