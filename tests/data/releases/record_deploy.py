"""deploy.py as it is, which writes down what it sends to the host: see README.md.

Each bundle goes to the folder RECORD as 1.tar.gz, 2.tar.gz, ..., in the order in which they are
sent; the command that they are sent to, the same for all, to `command` beside that folder.
"""

import base64
import os
from pathlib import Path
from typing import Any

from pyinfra.api.command import StringCommand
from pyinfra.api.host import Host

FOLDER = Path(os.environ["RECORD"])
send = Host.run_shell_command


def record(self: Host, command: StringCommand, **options: Any) -> Any:
    text = command.get_raw_value()
    if "base64 -d" in text:
        bundle = base64.b64decode(options["_stdin"])
        assert base64.encodebytes(bundle).decode() == options["_stdin"]
        number = len(list(FOLDER.glob("*.tar.gz"))) + 1
        (FOLDER / f"{number}.tar.gz").write_bytes(bundle)
        (FOLDER.parent / "command").write_text(f"{text}\n")
    return send(self, command, **options)


Host.run_shell_command = record  # type: ignore[method-assign]
exec(compile(Path("deploy.py").read_text(), "deploy.py", "exec"))
