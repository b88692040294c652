#!/usr/bin/python3 -I
"""The logs of all hosts, on the monitor. Python's standard library only: it runs there as it is.

log-receiver keep FOLDER PORT DAYS BYTES  take them, over RELP and TLS
log-receiver show FOLDER MOST [key=value]...  print the last MOST lines with all of these:
    host, unit (both may end early), since (as they begin: 2026-01-31T12), match (a text)

No Debian program takes a sender's name from its certificate: rsyslog knows of a message only where
it came from and what it says of itself.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import re
import shutil
import ssl
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from pathlib import Path

# Octets of a frame: rsyslog's maxMessageSize, each of them as \u0000, and the rest of a line.
LONGEST = 6 * 16384 + 4096
# Lines that a sender may have in flight (omrelp's windowSize), which it sends again when it has had
# no answer to them.
AGAIN = 64
SPARE = 1 << 30  # octets of the disk that are left to others
# Seconds between two looks at what there is, and octets after which there is one.
EVERY, MUCH = 60, 1 << 26
KEYS = ("time", "unit", "priority", "pid", "message")
HELLO = b"200 OK\nrelp_version=0\nrelp_software=callready\ncommands=syslog"


class Store:
    """One folder a host, one file an hour of JSON lines."""

    def __init__(self, folder: Path, days: int, most: int) -> None:
        """Keeps `days` days and `most` octets."""
        self.folder, self.days, self.most = folder, days, most
        self.refused: set[str] = set()
        self.trim()

    def write(self, host: str, line: bytes) -> None:
        """Keep a line; raises OSError if it cannot be."""
        if self.written > MUCH:
            self.trim()
        if host in self.refused:
            raise OSError("it has filled the store within an hour, or the disk is full")
        (self.folder / host).mkdir(exist_ok=True)
        path = self.folder / host / f"{hour()}.jsonl"
        with path.open("ab") as file:
            self.written += file.write(line + b"\n")

    def last(self, host: str) -> set[bytes]:
        """The newest lines of a host, among them those that it may send again."""
        found: set[bytes] = set()
        for path in sorted((self.folder / host).glob("*.jsonl"))[-2:]:
            with path.open("rb") as file:
                file.seek(-min(path.stat().st_size, AGAIN * 4096), os.SEEK_END)
                found.update(file.read().splitlines())
        return found

    def trim(self) -> None:
        """Delete what is too old, then the oldest of whoever has most: a host that floods pushes
        nobody else's out. This hour's stays; who fills the store with it is refused."""
        self.refused, self.written = set(), 0
        now = datetime.now(UTC).timestamp()
        sizes: dict[str, dict[Path, int]] = {}
        for path in sorted(self.folder.glob("*/*.jsonl")):
            found = path.stat()
            if found.st_mtime < now - self.days * 86400:
                path.unlink()
            else:
                sizes.setdefault(path.parent.name, {})[path] = found.st_size
        totals = {host: sum(files.values()) for host, files in sizes.items()}
        while totals:
            is_full = shutil.disk_usage(self.folder).free < SPARE
            if not is_full and sum(totals.values()) <= self.most:
                break
            host = max(totals, key=totals.__getitem__)
            oldest = next(iter(sizes[host]), None)
            if oldest is None or oldest.stem == hour():
                self.refused = set(totals) if is_full else {host}
                break
            totals[host] -= sizes[host].pop(oldest)
            oldest.unlink()


def hour() -> str:
    """The name of the file that lines of now go to."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H}"


async def serve(store: Store, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, under the name in its certificate."""
    host = "-"
    try:
        host = sender(writer.get_extra_info("peercert"))
        await take(store, host, reader, writer)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # it comes back, and sends again what was not answered
    except (ValueError, OSError, asyncio.LimitOverrunError) as error:
        print(f"{host}: {error}", flush=True)
    finally:
        writer.close()


async def take(
    store: Store, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """The frames of a connection: what is answered has been written."""
    known, again = store.last(host), AGAIN
    while True:
        number, command, data = await frame(reader)
        if command == b"open":
            answer = HELLO
        elif command == b"syslog":
            line, answer = record(host, data), b"200 OK"
            if not again or line not in known:
                store.write(host, line)
            again = max(0, again - 1)
        else:
            writer.write(b"%s rsp 0\n0 serverclose 0\n" % number)
            await writer.drain()
            return
        writer.write(b"%s rsp %d %s\n" % (number, len(answer), answer))
        await writer.drain()


def sender(certificate: dict[str, tuple[tuple[str, str], ...]]) -> str:
    """The name in a certificate of the fleet; raises ValueError if no folder can be called so."""
    name = next((value for _, value in certificate["subjectAltName"]), "")
    if not re.fullmatch(r"[\w@-][\w@.-]*", name, re.ASCII):
        raise ValueError(f"a certificate says {name!r}, which is no name for a folder")
    return name


async def frame(reader: asyncio.StreamReader) -> tuple[bytes, bytes, bytes]:
    """The next `TXNR SP COMMAND SP DATALEN [SP DATA] LF` (RELP's specification); raises
    IncompleteReadError at the end, ValueError if it is none."""
    number, command, digits = await reader.readuntil(b" "), await reader.readuntil(b" "), b""
    while (end := await reader.readexactly(1)).isdigit():
        digits += end
    length = int(digits[:9])
    if length > LONGEST:
        raise ValueError(f"sends {length} octets at once")
    data = await reader.readexactly(length) if end == b" " else b""
    if end == b" ":
        await reader.readexactly(1)
    return number.strip(), command.strip(), data


def record(host: str, data: bytes) -> bytes:
    """A line as it is kept: what the sender says, but for who it is."""
    text = data.decode(errors="replace")
    try:
        sent = json.loads(text)
        said = {key: str(sent[key]) for key in KEYS if key in sent}
    except (ValueError, TypeError):
        said = {"message": text}
    return json.dumps({"host": host, **said}, ensure_ascii=False).encode(errors="replace")


async def keep(store: Store, port: int) -> None:
    """Take logs until it is stopped."""
    folder = Path(os.environ["CREDENTIALS_DIRECTORY"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=os.environ["FLEET_CA"])
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "fleet.cert", folder / "fleet.key")
    await asyncio.start_server(partial(serve, store), None, port, ssl=context)
    while True:
        await asyncio.sleep(EVERY)
        store.trim()


def show(folder: Path, most: int, **wanted: str) -> list[str]:
    """The last lines that have all of this."""

    def found() -> Iterator[tuple[str, ...]]:
        for path in folder.glob("*/*.jsonl"):
            if path.parent.name.startswith(wanted["host"]) and path.stem >= wanted["since"][:13]:
                for line in path.open(errors="replace"):
                    try:
                        said = json.loads(line)
                    except ValueError:
                        continue  # a power cut tore it
                    yield tuple(said.get(key, "-") for key in ("time", "host", "unit", "message"))

    lines = (
        line
        for line in found()
        if line[0] >= wanted["since"]
        and line[2].startswith(wanted["unit"])
        and wanted["match"] in line[3]
    )
    # Lines of one moment stay in the order in which they came.
    when = itemgetter(0)
    shown = map(" ".join, sorted(heapq.nlargest(most, lines, when), key=when))
    # What somebody has others log is nothing that a terminal shall obey.
    return ["".join(c if c.isprintable() else " " for c in line) for line in shown]


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    command, folder, number, *more = arguments
    if command == "keep":
        asyncio.run(keep(Store(Path(folder), *map(int, more)), int(number)))
    else:
        wanted = {"host": "", "unit": "", "since": "", "match": ""}
        wanted |= dict(each.split("=", 1) for each in more)
        for line in show(Path(folder), int(number), **wanted):
            print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
