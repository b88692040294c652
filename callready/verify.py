"""Verify a deployed inventory: python -m callready.verify inventories/prod [pytest's options]"""

import sys

import pytest


def main(arguments: list[str]) -> int:
    """Run tests/verify; the exit status is pytest's (0: every check passed)."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m callready.verify INVENTORY [OPTION...]", file=sys.stderr)
        return 2
    inventory, *rest = arguments
    options = ["-q", "-rN", "--no-header", "--inventory", inventory]
    return int(pytest.main(["tests/verify", *options, *rest]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
