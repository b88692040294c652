"""Host names, `host:port` and URLs: what is taken, and the sentence for what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from callready.settings.endpoints import endpoint, host_name, url

Check = Callable[[str], str]
stun, redis = endpoint(3478), endpoint(6379)
signalling, http = url("ws", "wss", path=False), url("http", "https")
webhook = url("http", "https", query=True)


@pytest.mark.parametrize(
    ("check", "text", "taken"),
    [
        (stun, "stun.example.net:3478", "stun.example.net:3478"),
        (stun, "STUN.example.net:65535", "stun.example.net:65535"),
        (stun, "192.0.2.7:1", "192.0.2.7:1"),
        (stun, "[2001:DB8:0::7]:3478", "[2001:db8::7]:3478"),
        (redis, "redis:6379", "redis:6379"),
        (signalling, "wss://Calls.example.net/", "wss://calls.example.net"),
        (signalling, "ws://[2001:db8::7]:7880", "ws://[2001:db8::7]:7880"),
        (http, "https://example.net/v1/releases", "https://example.net/v1/releases"),
        (http, "http://10.0.0.5:8080", "http://10.0.0.5:8080"),
        (webhook, "https://example.net/hook?room=%20&x=1", "https://example.net/hook?room=%20&x=1"),
        (host_name, "xn--bcher-kva.example", "xn--bcher-kva.example"),
        (host_name, "192.0.2.7", "192.0.2.7"),
    ],
)
def test_what_programs_read_alike_is_taken(check: Check, text: str, taken: str) -> None:
    assert check(text) == taken


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("stun:stun.example.net:3478", "is not HOST:PORT: write stun.example.net:3478"),
        ("stun:stun.example.net", "is not HOST:PORT: write stun.example.net:3478"),
        ("stuns://stun.example.net:5349/", "is not HOST:PORT: write stun.example.net:5349"),
        ("stun.example.net", "is not HOST:PORT: write stun.example.net:3478"),
        ("stun.example.net:", "is not HOST:PORT"),
        ("2001:db8::7", "is not HOST:PORT: write [2001:db8::7]:3478"),
        ("[2001:db8::7]", "is not HOST:PORT: write [2001:db8::7]:3478"),
        ("[192.0.2.7]:3478", "is not HOST:PORT"),
        ("stun.example.net:0", "'0' is not a port (1-65535)"),
        ("stun.example.net:70000", "'70000' is not a port (1-65535)"),
        ("stun.example.net:03478", "'03478' is not a port (1-65535)"),
        ("192.0.2.700:3478", "'192.0.2.700' is not a host name"),
        ("stun_1.example.net:3478", "'stun_1.example.net' is not a host name"),
        ("stün.example.net:3478", "must be written as DNS has it: xn--stn-ioa.example.net"),
        ("stun.example.net.:3478", "is not a host name: write stun.example.net"),
        (" stun.example.net:3478", "is not HOST:PORT: write stun.example.net:3478"),
        ("stun.example.net:3478\n", "is not HOST:PORT: write stun.example.net:3478"),
        ("a b:3478", "is not HOST:PORT"),
        ("", "is not HOST:PORT"),
    ],
)
def test_what_is_no_endpoint_is_refused_with_what_to_write(text: str, why: str) -> None:
    with pytest.raises(ValueError) as error:
        stun(text)
    assert why in str(error.value)
    if ": write " in why:
        stun(why.partition(": write ")[2] + ":3478" * ("host name" in why))


@pytest.mark.parametrize(
    ("check", "text", "why"),
    [
        (signalling, "https://x.test", "is not ws://NAME[:PORT] or wss://NAME[:PORT]"),
        (signalling, "WSS://x.test", "is not ws://NAME[:PORT] or wss://NAME[:PORT]"),
        (signalling, "wss:x.test", "is not ws://NAME[:PORT] or wss://NAME[:PORT]"),
        (signalling, "wss://x.test/rtc", "has a path, which is not used: write wss://x.test"),
        (signalling, "wss://x.test?a=1", "has a query (?…), which is not used: write wss://x.test"),
        (signalling, "wss://x.test#a", "has a fragment"),
        (signalling, "wss://x.test:", "is not ws://NAME[:PORT] or wss://NAME[:PORT]"),
        (signalling, "wss://x.test:65536", "'65536' is not a port (1-65535)"),
        (signalling, "wss://x.test\n", "has a blank or a line break at one of its ends"),
        (signalling, "wss://x.\ntest", "has a blank or a line break in it"),
        (signalling, "wss://x y.test", "has a blank or a line break in it"),
        (signalling, "wss://bücher.example", "as DNS has it: xn--bcher-kva.example"),
        (signalling, "wss://2001:db8::7", "is not ws://NAME[:PORT] or wss://NAME[:PORT]"),
        (signalling, "wss://1.2.3", "'1.2.3' is not a host name"),
        (
            http,
            "https://app.test/a?b",
            "has a query (?…), which is not used: write https://app.test/a",
        ),
        (http, 'https://app.test/"quoted"', "must have encoded as %XX"),
        (webhook, "https://user@app.test/", "has a user name or password: leave it out"),
        (webhook, "", "is not http://NAME[:PORT] or https://NAME[:PORT]"),
        (host_name, "2001:db8::7", "is an IPv6 address: use a host name"),
        (host_name, "-a.test", "is not a host name"),
        (host_name, "bücher.example", "as DNS has it: xn--bcher-kva.example"),
    ],
)
def test_what_is_no_such_url_or_name_is_refused(check: Check, text: str, why: str) -> None:
    with pytest.raises(ValueError) as error:
        check(text)
    assert why in str(error.value)


def test_no_password_and_no_query_is_shown() -> None:
    for text in ("https://me:hunter2@x.test/#a", "ftp://me:hunter2@x.test?t=hunter2"):
        with pytest.raises(ValueError) as error:
            webhook(text)
        assert "hunter2" not in str(error.value)
    for text in ("redis://:hunter2@x.test:6379/0", "me:hunter2@x.test"):
        with pytest.raises(ValueError, match=r"write x\.test:6379") as error:
            redis(text)
        assert "hunter2" not in str(error.value)
