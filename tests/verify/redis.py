"""What Redis says to a host that uses it, asked from there in Redis' own protocol (RESP)."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Sequence

from callready.settings.android import address
from callready.settings.endpoints import split_endpoint
from callready.settings.redis import FILES, RedisAccess
from tests.verify.servers import Server


def servers(server: Server, access: RedisAccess) -> list[RedisAccess]:
    """Each Redis that a host gets to: the nodes of a cluster, or the one that a Sentinel names."""
    own = access.own
    if not own or own.address:
        return [access]
    if own.cluster_addresses:
        return [access._replace(address=node) for node in own.cluster_addresses]
    sentinels = access._replace(username=own.sentinel_username, password=own.sentinel_password)
    command = ("SENTINEL", "get-master-addr-by-name", own.sentinel_master_name or "")
    for sentinel in own.sentinel_addresses:
        script = asking(sentinels._replace(address=sentinel), [command])
        # An array of two texts (RESP), each after its length.
        said = server.host.run(script).stdout
        if found := re.search(r"^\*2\s+\$\d+\s+(\S+)\s+\$\d+\s+(\d+)", said, re.MULTILINE):
            at = f"[{found[1]}]" if ":" in found[1] else found[1]
            return [access._replace(address=f"{at}:{found[2]}")]
    return []


def asking(access: RedisAccess, commands: Sequence[Sequence[str]], login: bool = True) -> str:
    """A script that sends commands and prints what Redis answers. The password is in the script,
    and in no argument of a program."""
    password = access.password.get_secret_value() if access.password and login else ""
    first = [("AUTH", *filter(None, (access.username, password)))] if password else []
    sent = "".join(
        f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
        for words in [*first, *commands, ("QUIT",)]
    )
    host, port = split_endpoint(access.address)
    if access.tls:
        tls = access.own.tls if access.own else None
        name = tls.server_name if tls and tls.server_name else host
        options = [f"-connect {shlex.quote(access.address)}"]
        if not address(name):
            options.append(f"-servername {name}")
        if access.ca_file:
            options.append(f"-CAfile {access.ca_file}")
        if tls and tls.client_cert_file:
            options.append(f"-cert {FILES['client_cert_file']} -key {FILES['client_key_file']}")
        if not tls or not tls.insecure:
            verify = "-verify_ip" if address(name) else "-verify_hostname"
            options.append(f"-verify_return_error {verify} {name}")
        client = f"openssl s_client -quiet {' '.join(options)}"
    else:
        client = f"bash -c 'exec 3<> /dev/tcp/{host}/{port} && cat >&3 && cat <&3'"
    return f"echo {base64.b64encode(sent.encode()).decode()} | base64 -d | timeout 5 {client} 2>&1"


def answers(server: Server, script: str) -> tuple[list[str], str]:
    """Redis' answers to commands that have short ones, and the last line of all that came."""
    lines = server.host.run(script).stdout.splitlines()
    return [line for line in lines if line[:1] in "+-:$*"], (lines or ["no answer in 5 s"])[-1]
