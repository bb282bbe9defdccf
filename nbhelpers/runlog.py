"""What a run says while it works: log.txt, from library logging and Python's warnings."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbhelpers.redaction import Redactor


class LogFile(logging.FileHandler):
    """log.txt of one run: the library's logging from INFO on, and Python's warnings, in UTC and without secrets.

    event: called as `event("warning", logger=..., message=...)` for what is logged from WARNING on.
    """

    def __init__(self, run_dir: Path, redactor: Redactor, event: Callable[..., None]) -> None:
        super().__init__(run_dir / "log.txt", encoding="utf-8", errors="backslashreplace")
        self._redactor, self._event = redactor, event
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self.setLevel(logging.INFO)

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.text(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if record.levelno >= logging.WARNING:
            try:
                self._event("warning", logger=record.name, message=record.getMessage())
            except (OSError, RuntimeError):
                self.handleError(record)


_open_logs: list[LogFile] = []
_before_logging: dict[str, Any] = {}


def _warn_to_logs(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    text = f"{filename}:{lineno}: {category.__name__}: {message}"
    for handler in list(_open_logs):
        handler.handle(logging.LogRecord("py.warnings", logging.WARNING, filename, lineno, text, None, None))
    _before_logging["showwarning"](message, category, filename, lineno, *rest)


def open_log(handler: LogFile) -> None:
    """Begin to write: the first one open turns library logging up to INFO and listens to Python's warnings."""
    library = logging.getLogger("nbhelpers")
    if not _open_logs:
        _before_logging["level"] = library.level
        if warnings.showwarning is not _warn_to_logs:
            _before_logging["showwarning"] = warnings.showwarning
            warnings.showwarning = _warn_to_logs
        if library.getEffectiveLevel() > logging.INFO:
            library.setLevel(logging.INFO)
    _open_logs.append(handler)
    library.addHandler(handler)


def close_log(handler: LogFile) -> None:
    """End writing; the last one open puts back the level and the way of warnings that the first one found."""
    library = logging.getLogger("nbhelpers")
    library.removeHandler(handler)
    handler.close()
    _open_logs.remove(handler)
    if not _open_logs:
        library.setLevel(_before_logging["level"])
        if warnings.showwarning is _warn_to_logs:  # else somebody put theirs on top: ours passes on to the one below
            warnings.showwarning = _before_logging["showwarning"]
