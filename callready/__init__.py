"""callready: LiveKit and coturn on Debian hosts, deployed safely and verified from where callers stand."""

__version__ = "0.1.0"
