"""A line with a round-trip time: python -m bench.delay RTT_MS PORT=ADDRESS:PORT ...

Listens on 127.0.0.1 and forwards to the addresses, each direction half the round-trip time late
and as fast as it comes (asyncio sets TCP_NODELAY). It stands in for tc netem, which not every
kernel has. Ends with its standard input, and so with whoever started it.
"""

import asyncio
import contextlib
import os
import sys
from functools import partial

Chunks = asyncio.Queue[tuple[float, bytes]]


async def forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, rtt: float
) -> None:
    """Serve one connection; `rtt` in seconds."""
    # The kernel has accepted already. On a real line SYN, SYN-ACK and ACK come first.
    await asyncio.sleep(rtt * 1.5)
    host, _, port = address.rpartition(":")
    try:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(one_way(reader, far_writer, rtt / 2), one_way(far_reader, writer, rtt / 2))
    for side in (writer, far_writer):
        side.close()


async def one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Hand on what is read, `delay` seconds later; an empty chunk is the end."""
    chunks: Chunks = asyncio.Queue()
    clock = asyncio.get_running_loop().time

    async def send() -> None:
        while True:
            due, data = await chunks.get()
            await asyncio.sleep(due - clock())
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    sender = asyncio.create_task(send())
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            chunks.put_nowait((clock() + delay, data))
    chunks.put_nowait((clock() + delay, b""))
    with contextlib.suppress(OSError):
        await sender


async def main(rtt_ms: float, ways: list[str]) -> None:
    """Listen until standard input ends."""
    for way in ways:
        port, _, address = way.partition("=")
        serve = partial(forward, address=address, rtt=rtt_ms / 1000)
        await asyncio.start_server(serve, "127.0.0.1", int(port))
    print("listening", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # connections still open are of no use to anybody


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))
