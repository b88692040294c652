"""What is wrong with a host itself: the causes that its survey and its inspection show."""

from __future__ import annotations

from callready.diagnosis import capacity, credentials, files, firewall, network, recording, units
from callready.diagnosis.model import Cause
from callready.diagnosis.seen import Seen


def causes(seen: Seen) -> list[Cause]:
    """Everything that is wrong with a host, each said once."""
    subjects = (units, firewall, files, network, capacity, credentials, recording)
    return list(dict.fromkeys(cause for subject in subjects for cause in subject.causes(seen)))
