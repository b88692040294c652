"""What pyinfra loads first, before the inventory."""

import sys

# pyinfra switches this off; compiling all of callready anew costs 0.2 s a run.
sys.dont_write_bytecode = False

from callready import pyinfra_cli  # noqa: E402

REQUIRE_PYINFRA_VERSION = ">=3.10,<4"

pyinfra_cli.install()
