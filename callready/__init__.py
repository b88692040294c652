"""callready: LiveKit and coturn on Debian hosts, deployed and verified from outside."""

__version__ = "0.2.0"
