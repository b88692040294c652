"""python -m bench.watching: what Prometheus costs on the monitor of a large fleet.

Each host of it says what a host of the lab says that is watched (`make demo-watching`), with values
that change as they do there; over loopback and TLS, asked by the configuration and the alerts that
a monitor has. Every third one is an SFU.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import random
import re
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import yaml
from pydantic import SecretStr

from callready import docs
from callready.release.authority import Authority, Identity
from callready.release.render import render
from lab import hosts, plan
from tests.support.fleet import Host

EVERY = 15  # seconds (templates/prometheus.yml.j2)
DAY = 86400
OWN, FLEET, CALLER = 29090, 29998, 29436  # ports
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """What an exporter says, from two of its answers; another `body` after each `change`."""

    def __init__(self, first: str, second: str) -> None:
        kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", second, re.MULTILINE))
        before, self.now = self._read(first), self._read(second)
        self.steps = {name: value - before.get(name, value) for name, value in self.now.items()}
        gauges = {name for name, kind in kinds.items() if kind == "gauge"}
        self.gauges = {name for name in self.now if re.split("[{ ]", name)[0] in gauges}
        self.change()

    @staticmethod
    def _read(text: str) -> dict[str, float]:
        lines = re.findall(r"^([^#].*) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in lines if value != "NaN"}

    def change(self) -> None:
        """As after 15 seconds: counters grow, gauges go up and down."""
        for name, step in self.steps.items():
            if step:
                way = random.choice((-1, 1)) if name in self.gauges else 1
                more = way * step * random.uniform(0.5, 1.5)
                self.now[name] += round(more) if step == int(step) else more
        lines = (f"{name} {value!r}\n" for name, value in self.now.items())
        self.body = gzip.compress("".join(lines).encode(), 1)


def said(name: str) -> dict[str, str]:
    """What the exporters of a lab host say now, by module."""
    modules = yaml.safe_load(Host(name).root("cat /etc/callready/exporters.yml"))["modules"]
    network = f"--net=/proc/{hosts.leader(plan.find_host(name))}/ns/net"
    found = {}
    for module, at in ((module, each["http"]) for module, each in modules.items()):
        headers = [f"-H{key}: {value}" for key, value in at.get("headers", {}).items()]
        ask = ["curl", "-sf", *headers, f"http://{at['address']}:{at['port']}/metrics"]
        run = ["nsenter", network, *ask]
        found[module] = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return found


def recorded(names: Mapping[str, str], count: int) -> dict[str, Metrics]:
    """What the fleet says, by kind of host and module: `names` are the lab's hosts by kind."""
    first = {kind: said(name) for kind, name in names.items()}
    time.sleep(EVERY)
    second = {kind: said(name) for kind, name in names.items()}
    found = {}
    for kind, modules in first.items():
        for module, text in modules.items():
            both = text, second[kind][module]
            if module == "caller":  # one of all hosts
                own = f'host="{plan.find_host(names[kind]).fqdn}"'
                every = [[t.replace(own, f'host="host{n}"') for n in range(count)] for t in both]
                both = "".join(every[0]), "".join(every[1])
            found[module if module == "caller" else f"{kind} {module}"] = Metrics(*both)
    return found


def is_sfu(address: str) -> bool:
    """Whether the host of an address is one."""
    return int(address.rpartition(".")[2]) % 3 == 0


async def answer(
    metrics: Mapping[str, Metrics], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """What is asked for on one connection."""
    try:
        while True:
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
            kind = "sfu" if is_sfu(writer.get_extra_info("sockname")[0]) else "turn"
            _, _, module = path.partition("module=")
            body = metrics[f"{kind} {module}" if module else "caller"].body
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"
            head += f"Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def write_monitor(folder: Path, addresses: list[str]) -> ssl.SSLContext:
    """What the monitor of hosts at these addresses has; their own TLS."""
    authority = Authority(SecretStr("b" * 32))
    host, monitor = (
        Identity("host", tuple(addresses), ("server",)),
        Identity("monitor", (), ("client",)),
    )
    (folder / "ca.pem").write_bytes(authority.certificate)
    for name, identity in (("host", host), ("fleet", monitor)):
        for end, content in zip(("cert", "key"), authority.issue(identity), strict=True):
            (folder / f"{name}.{end}").write_bytes(content)
    fleet = {}
    for number, at in enumerate(addresses):
        more = {
            "address": at,
            **dict.fromkeys(("address6", "internal_address", "watches", "records")),
        }
        fleet[f"host{number}"] = SimpleNamespace(sfu=is_sfu(at), has_edge=is_sfu(at), **more)
    config = render(
        "prometheus.yml.j2",
        monitor=SimpleNamespace(port=FLEET, user="operator"),
        hosts=fleet,
        this="monitor",
        internal=None,
        ca="ca.pem",
        fleet="fleet",
        unit="none",
        alertmanager="127.0.0.1:9",
        own=f"127.0.0.1:{OWN}",
        caller=f"127.0.0.1:{CALLER}",
    )
    (folder / "prometheus.yml").write_bytes(config.replace(b"/run/credentials/none/", b""))
    (folder / "password").touch()
    (folder / "alerts.yml").write_text(docs.rules({"livekit"}))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=f"{folder}/ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "host.cert", folder / "host.key")
    return context


def asked(path: str, data: bytes | None = None) -> Any:
    """What Prometheus answers."""
    with urlopen(Request(f"http://127.0.0.1:{OWN}/api/v1/{path}", data)) as found:
        return json.load(found)["data"]


def value(query: str) -> float:
    """What an expression is now."""
    result = asked(f"query?query={query}")["result"]
    return float(result[0]["value"][1]) if result else 0.0


def spent(process: int) -> tuple[float, float]:
    """Seconds of a processor and octets of memory that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK, int(fields[21]) * PAGE


def size(folder: Path, pattern: str) -> int:
    """The octets of files."""
    return sum(file.stat().st_size for file in folder.glob(pattern) if file.is_file())


async def measure(count: int, minutes: float, metrics: Mapping[str, Metrics], folder: Path) -> None:
    """Let Prometheus ask as many hosts so long; print what it took."""
    addresses = [f"127.1.{number // 240}.{number % 240 + 1}" for number in range(count)]
    context = write_monitor(folder, addresses)
    serve = partial(answer, metrics)
    await asyncio.start_server(serve, "0.0.0.0", FLEET, ssl=context)
    await asyncio.start_server(serve, "127.0.0.1", CALLER)
    run = "prometheus --config.file=prometheus.yml --storage.tsdb.path=data "
    run += f"--web.listen-address=127.0.0.1:{OWN} --web.enable-admin-api"
    said = (folder / "said").open("w")
    process = await asyncio.create_subprocess_exec(
        *run.split(), cwd=folder, stderr=said, env={**os.environ, "GOGC": "50"}
    )
    try:
        used, most, start, begun = 0.0, 0.0, 0.0, time.monotonic()
        for number in range(int(minutes * 60 / EVERY)):
            if number == 4:  # once it knows all series
                start, (used, _) = time.monotonic(), spent(process.pid)
            await asyncio.sleep(EVERY)
            most = max(most, spent(process.pid)[1])
            for each in metrics.values():
                await asyncio.to_thread(each.change)
        share = (spent(process.pid)[0] - used) / (time.monotonic() - start)
        up = await asyncio.to_thread(value, "sum(up)")
        targets = await asyncio.to_thread(value, "count(up)")
        series = await asyncio.to_thread(value, "prometheus_tsdb_head_series")
        evaluated = "max(prometheus_rule_group_last_duration_seconds)"
        seconds = await asyncio.to_thread(value, evaluated)
        # A block of it all, as Prometheus makes one of every two hours.
        await asyncio.to_thread(asked, "admin/tsdb/snapshot", b"")
        blocks = folder / "data/snapshots"
        chunks, index = size(blocks, "*/*/chunks/*"), size(blocks, "*/*/index")
        print(f"{count} hosts, {up:.0f} of {targets:.0f} targets up, {series:.0f} series")
        print(f"memory {most / 1e6:.0f} MB at most, {100 * share:.1f} % of a core")
        print(f"rules {1000 * seconds:.0f} ms")
        day = chunks * DAY / (time.monotonic() - begun) + 12 * index
        print(f"disk {day / 1e6:.0f} MB a day, log {size(folder, 'data/wal/*') / 1e6:.0f} MB")
    finally:
        process.terminate()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.watching", description=__doc__)
    parser.add_argument("--hosts", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=30, help="default: %(default)s")
    for kind, name in (("sfu", "sfu1"), ("turn", "turn1"), ("monitor", "mon1")):
        parser.add_argument(f"--{kind}", default=name, help="a lab host, default: %(default)s")
    options = parser.parse_args()
    names = {"monitor": options.monitor, "turn": options.turn, "sfu": options.sfu}
    metrics = recorded(names, options.hosts)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(options.hosts, options.minutes, metrics, Path(folder)))


if __name__ == "__main__":
    main()
