"""Real Debian hosts that boot on this machine (systemd-nspawn), for the demo and the tests.

``python -m lab up`` boots them, ``python -m lab down`` removes every trace; tests use :class:`Lab`.
"""

from lab.lab import Lab
from lab.plan import Host, find_host
from lab.run import LabError

__all__ = ["Host", "Lab", "LabError", "find_host"]
