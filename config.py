"""What pyinfra loads first, before the inventory."""

from callready import controller

REQUIRE_PYINFRA_VERSION = ">=3.10,<4"

controller.install()
