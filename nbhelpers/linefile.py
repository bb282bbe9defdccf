"""How does a line get out fast and still outlive its process? A file of JSON lines, held open by its one writer.

Standard library only. One line is one write to a file opened for appending, handed to the system before `append`
returns: killing the process afterwards loses nothing. No fsync: a power cut may cost the last lines.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from math import isfinite
from pathlib import Path
from typing import Any

from nbhelpers.records import plain


class LineFile:
    """`append` writes what records.append_line writes, without opening the file anew and looking at its end each time:
    only for a file that has no other writer."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._handle: int | None = None
        self._torn = False

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append one object as one line; returns the row as it was written, in strict JSON values.

        After an OSError (full disk, a write cut short) the file may end in a torn line; the next append closes it.
        """
        text = _quick_line(row)
        if text is None:
            row = plain(row)
            text = json.dumps(row, allow_nan=False, separators=(",", ":"))
        if self._handle is None:
            self._open()
        line = f"\n{text}\n".encode("ascii") if self._torn else f"{text}\n".encode("ascii")
        try:
            written = os.write(self._handle, line)
        except BaseException:
            self.close()  # what is at the end now is not known: the next append looks
            raise
        if written != len(line):
            self.close()
            text = f"only {written} of {len(line)} bytes of a line were written"
            raise OSError(errno.ENOSPC, text, os.fspath(self.path))
        self._torn = False
        return dict(row)

    def _open(self) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end = os.lseek(handle, 0, os.SEEK_END)
            if end:
                os.lseek(handle, end - 1, os.SEEK_SET)
            self._torn = bool(end) and os.read(handle, 1) != b"\n"
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def close(self) -> None:
        """Let go of the file; a later append opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _quick_line(row: Mapping[str, Any]) -> str | None:
    """The JSON of a row of finite numbers and texts, as json.dumps writes it; None where anything else is inside."""
    parts = []
    for key, value in row.items():
        kind = type(value)
        if kind is float and isfinite(value):
            parts.append(f"{encode_basestring_ascii(key)}:{value!r}")
        elif kind is int:
            parts.append(f"{encode_basestring_ascii(key)}:{value}")
        elif kind is str:
            parts.append(f"{encode_basestring_ascii(key)}:{encode_basestring_ascii(value)}")
        else:
            return None
    return "{" + ",".join(parts) + "}"
