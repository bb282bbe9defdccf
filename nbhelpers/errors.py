"""How does an error read? As one line that names the value and the rule, and says whose it is to put right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


def is_bad_input(error: Exception) -> bool:
    """What the user can put right: a wrong value, an unknown name, a file that cannot be read or written."""
    if isinstance(error, KeyError | IndexError):
        return False
    return isinstance(error, ValueError | LookupError | OSError)


def one_line(error: BaseException) -> str:
    """The error as one line that names the value and the rule."""
    if isinstance(error, ValidationError):
        return "; ".join(refusal(found) for found in error.errors())
    if isinstance(error, OSError) and error.strerror:
        place = f" {str(error.filename)!r}" if error.filename else ""
        return f"cannot use{place}: {error.strerror.lower()}; check the path, its permissions and the free space"
    return flat(error)


def flat(error: BaseException) -> str:
    """What the error itself says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def refusal(found: Mapping[str, Any], *, named: bool = True) -> str:
    """One of pydantic's findings as one line: the field (unless `named` is False), the rule and the value."""
    message = found["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not found["loc"] or found["type"] == "value_error":
        return message
    field = f"{'.'.join(map(str, found['loc']))} " if named else ""
    return f"{field}{message}, got {found['input']!r}"
