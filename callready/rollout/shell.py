"""Root shells on hosts for the prober, which has no SSH of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from paramiko import SSHException
from pyinfra.connectors.util import CommandOutput

Run = Callable[[str, str], tuple[bool, CommandOutput]]


@contextmanager
def shell(run: Run) -> Iterator[str]:
    """The path of a Unix socket, of this user alone: a host's name and below it a script, which are
    written to it, are answered with a line, `0` if that ended well, and what it printed there.

    Args:
        run: runs a script as root on a host, as `as_root` does.
    """
    with TemporaryDirectory(prefix="callready-") as folder, socket.socket(socket.AF_UNIX) as asked:
        path = str(Path(folder) / "shell")
        asked.bind(path)
        asked.listen()
        Thread(target=_serve, args=(asked, run), daemon=True).start()
        yield path
        with suppress(OSError):
            asked.shutdown(socket.SHUT_RDWR)  # the thread that waits for it ends


def _serve(asked: socket.socket, run: Run) -> None:
    with suppress(OSError):
        while True:
            connection = asked.accept()[0]
            with connection, connection.makefile() as lines:
                name = lines.readline().strip()
                try:
                    ok, output = run(name, lines.read())
                    text = output.stdout if ok else output.stderr
                except (OSError, EOFError, SSHException) as error:
                    ok, text = False, str(error)
                connection.sendall(f"{int(not ok)}\n{text}".encode())
