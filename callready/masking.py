"""Secrets out of text that is shown to people."""

import re

HIDDEN = "••••••"

# Values of keys that hold secrets, in YAML, turnserver.conf and environment files, and everything
# in a `keys:` mapping or a file that is one long word.
_KEY = re.compile(
    r"(?im)^(?P<key>[\s#-]*['\"]?[\w.-]*(?:secret|password|credential|passwd|token|pkey_pwd|"
    r"api_key|user)['\"]?\s*[:=]\s*)(?P<value>\S.*)$"
)
_LONG = re.compile(r"(?<![\w/.@-])[A-Za-z0-9_+=-]{32,}(?![\w/.@-])")


def mask(text: str) -> str:
    """`text` with the values of secret-bearing keys and every long random word hidden.

    The host's old secrets are unknown to the controller, so this goes by shape, not by value;
    paths such as `secret_file: /run/…` stay readable.
    """

    def hide(match: re.Match[str]) -> str:
        value = match["value"]
        return match[0] if value.startswith("/") else match["key"] + HIDDEN

    return _LONG.sub(HIDDEN, _KEY.sub(hide, text))
