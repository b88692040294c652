"""Secrets out of text that is shown to people."""

import re
from collections.abc import Iterable

HIDDEN = "••••••"

# Values of keys that hold secrets, in YAML, turnserver.conf and environment files; everything in
# livekit.yaml's `keys:`; passwords in URLs and connection strings; private keys; long random words.
_KEY = re.compile(
    r"(?im)^(?P<key>[^:=\n]*(?:secret|password|(?<!Load)credential|authorization|passwd|pwd|token|api_key|"
    r"(?-i:user))['\"]?\s*[:=]\s*)(?P<value>\S.*)$"
)
_KEYS = re.compile(r"(?m)^keys:\n(?:[ \t]+\S.*\n?)+")
_INSIDE = re.compile(
    r"(?i)(://[^\s/@:]*:)[^\s/@]+(?=@)|((?:secret|password|passwd|pwd|token)=)[^\s\"'&]+"
)
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)[^-]*")
_LONG = re.compile(r"(?<![\w/.@-])[A-Za-z0-9_+=-]{32,}(?![\w/.@-])")


def mask(text: str, known: Iterable[str] = ()) -> str:
    """`text` without the `known` secrets, the values of secret-bearing keys and every long random
    word; a file of one word is taken for a secret.

    The host's old secrets are unknown to the controller, so these go by shape, not by value;
    paths such as `secret_file: /run/…` stay readable.
    """

    def hide(match: re.Match[str]) -> str:
        value = match["value"]
        return match[0] if value.startswith("/") else match["key"] + HIDDEN

    def hide_values(match: re.Match[str]) -> str:
        return re.sub(r"(?m)(?<=:)[ \t]+\S.*$", f" {HIDDEN}", match[0])

    if len(text.split()) == 1:
        return HIDDEN
    for secret in sorted(known, key=len, reverse=True):
        # YAML doubles a quote between quotes.
        text = text.replace(secret, HIDDEN).replace(secret.replace("'", "''"), HIDDEN)
    text = _PEM.sub(rf"\1\n{HIDDEN}\n", text)
    text = _INSIDE.sub(rf"\1\2{HIDDEN}", _KEYS.sub(hide_values, text))
    return _LONG.sub(HIDDEN, _KEY.sub(hide, text))
