"""What must never be written: secrets in texts, JSON values and command lines."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd"}
_HUB_TOKEN = re.compile(r"\bhf_\w{8,}")


class Redactor:
    """Masks secrets in text: values of environment variables named like a token or key, and hub tokens."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        # shorter values ("1", "false" of TOKENIZERS_PARALLELISM) are settings, and masking them would garble the record
        self._values = sorted(
            {
                value
                for name, value in environ.items()
                if re.search("TOKEN|KEY|SECRET|PASSWORD", name.upper()) and len(value) >= 6
            },
            key=len,
            reverse=True,
        )

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        return _HUB_TOKEN.sub(MASK, text)

    def value(self, value: Any) -> Any:
        """All texts inside a JSON value; names stay."""
        if isinstance(value, dict):
            return {key: self.value(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        return self.text(value) if isinstance(value, str) else value

    def command(self, arguments: list[str]) -> list[str]:
        """A command line: also what follows --token, --hf-token, `-p hf_token`, and what begins with hf_."""
        masked: list[str] = []
        hide, before = False, ""
        for argument in map(str, arguments):
            name, equals, _ = argument.partition("=")
            named = (name.startswith("-") or before == "-p" or equals) and _names_secret(name)
            if hide:
                masked.append(MASK)
            elif named:
                masked.append(f"{name}={MASK}" if equals else argument)
            else:
                masked.append(MASK if argument.startswith("hf_") else self.text(argument))
            hide = not hide and bool(named) and not equals
            before = argument
        return masked


def _names_secret(name: str) -> bool:
    return re.split(r"[-_]", name.lower())[-1] in _SECRET_WORDS
