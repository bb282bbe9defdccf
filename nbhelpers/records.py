"""How a value gets into a file whole or not at all, and back again: atomic files, append-only JSON lines, strict JSON.

Standard library only. All JSON is strict (no NaN, no Infinity) and plain ASCII, so that every reader can read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

NOT_FINITE = "not_finite"
_INDEXED = re.compile(r"(.*?)((?:\[\d+\])+)", re.DOTALL)


# --- values ---------------------------------------------------------------------------------------------------------


def plain(obj: Any) -> Any:
    """`obj` in strict JSON values: NumPy and torch scalars and arrays, paths, tuples, dataclasses, pydantic models.

    NaN and the infinities become null, and the nearest dict around them gets the flag
    `"not_finite": {"name": "nan" | "inf" | "-inf"}` (`"name[2]"` for a place in a list); without a dict around there is
    no flag. `restore` is the way back. Anything without a JSON form is a ValueError.

    >>> plain({"loss": float("nan"), "steps": (1, 2)})
    {'loss': None, 'steps': [1, 2], 'not_finite': {'loss': 'nan'}}
    """
    return _plain(obj, "", {})


def _plain(obj: Any, where: str, flags: dict[str, str]) -> Any:
    if obj is None or type(obj) in (bool, int, str):
        return obj
    if isinstance(obj, Enum):
        return _plain(obj.value, where, flags)
    if isinstance(obj, float):
        if math.isfinite(obj):
            return float(obj)
        flags[where] = str(float(obj))
        return None
    if isinstance(obj, Mapping):
        return _plain_mapping(obj)
    if isinstance(obj, list | tuple):
        return [_plain(value, f"{where}[{index}]", flags) for index, value in enumerate(obj)]
    if isinstance(obj, int | str):
        return int(obj) if isinstance(obj, int) else str(obj)
    return _plain_object(obj, where, flags)


def _plain_mapping(mapping: Mapping) -> dict[str, Any]:
    out: dict[str, Any] = {}
    flags: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(key, Enum):
            key = key.value
        if not isinstance(key, str | int | float) and key is not None:
            raise ValueError(f"a key in a record must be text or a number, got {key!r}: give it a name")
        name = str(key)
        if name in out:
            raise ValueError(f"two keys are both written as {name!r}: rename one of them")
        out[name] = _plain(value, name, flags)
    if flags:
        known = out.get(NOT_FINITE)
        out[NOT_FINITE] = {**known, **flags} if isinstance(known, dict) else flags
    return out


def _plain_object(obj: Any, where: str, flags: dict[str, str]) -> Any:
    if isinstance(obj, set | frozenset):
        return _plain(sorted(obj, key=repr), where, flags)
    if isinstance(obj, os.PathLike):
        return os.fsdecode(obj)
    if isinstance(obj, date):
        return obj.isoformat()
    if is_dataclass(obj) and not isinstance(obj, type):
        return _plain_mapping({field.name: getattr(obj, field.name) for field in fields(obj)})
    if hasattr(obj, "model_dump") and not isinstance(obj, type):  # a pydantic model, without importing pydantic
        return _plain_mapping(obj.model_dump())
    if hasattr(obj, "tolist") and not isinstance(obj, type):  # NumPy and torch, without importing them
        value = obj.tolist()
        # NumPy's long double has no Python type of its own: tolist gives it back unchanged
        return _plain(float(value) if hasattr(value, "tolist") else value, where, flags)
    raise ValueError(f"a value of type {type(obj).__name__} has no JSON form: record its text or its numbers instead")


def restore(obj: Any) -> Any:
    """The inverse of `plain` for numbers that are not finite: flags go, NaN and infinities come back."""
    if isinstance(obj, list):
        return [restore(value) for value in obj]
    if not isinstance(obj, dict):
        return obj
    flags = obj.get(NOT_FINITE)
    if not isinstance(flags, dict):
        return {key: restore(value) for key, value in obj.items()}
    out = {key: restore(value) for key, value in obj.items() if key != NOT_FINITE}
    for place, text in flags.items():
        _put(out, place, float(text))
    return out


def _put(target: Any, place: str, value: float) -> None:
    key: str | int = place
    found = _INDEXED.fullmatch(place)
    if place not in target and found:
        path = [found[1], *(int(index) for index in re.findall(r"\d+", found[2]))]
        for key in path[:-1]:
            target = target[key]
        key = path[-1]
    target[key] = value


def canonical_json(obj: Any) -> str:
    """One text for equal values: sorted keys, no spaces, ASCII; what the hashes are made of."""
    return _dumps(obj, sort_keys=True, separators=(",", ":"))


def _dumps(obj: Any, **options: Any) -> str:
    flags: dict[str, str] = {}
    value = _plain(obj, "", flags)
    if flags:
        raise ValueError(f"a number that is not finite needs a dict around it for its flag, got {flags}: name it")
    return json.dumps(value, allow_nan=False, **options)


def sha256_text(text: str) -> str:
    """Hex digest of the text as UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Hex digest of the bytes of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_known(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, read anew only where its size or time of change differ: for files asked often."""
    found = os.stat(path)
    return _sha256_as_it_was(os.fspath(path), found.st_size, found.st_mtime_ns)


@lru_cache
def _sha256_as_it_was(path: str, size: int, changed: int) -> str:
    return sha256_file(path)


def sha256_json(obj: Any) -> str:
    """Hex digest of `canonical_json(obj)`."""
    return sha256_text(canonical_json(obj))


def slug(name: object, limit: int = 80) -> str:
    """A file name for `name`: letters and digits of any script, `.`, `_` and `-`; at most `limit` bytes; never empty.

    Different names may share a slug ("a/b" and "a-b"): add something unique where that matters.
    """
    text = unicodedata.normalize("NFC", str(name))
    text = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text)
    text = re.sub(r"-{2,}", "-", text).strip("-._")
    return text.encode("utf-8")[:limit].decode("utf-8", "ignore").rstrip("-._") or "unnamed"


# --- whole files ----------------------------------------------------------------------------------------------------


TEMPORARY = ".*.tmp"  # names of files that `write_atomic` is about to finish, or did not live to finish


def write_atomic(path: str | os.PathLike, data: bytes | str, *, durable: bool = True) -> None:
    """Write `data` beside `path`, fsync, rename: a reader sees the old file or the new one, never a part.

    After an error (full disk, no permission: OSError) the old file is untouched and nothing is left beside it.
    `durable=False` skips the fsync: whole after a killed process, perhaps not after a power cut.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    beside = path.parent / f".{secrets.token_hex(6)}.tmp"
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(handle, view) :]
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # mounts that cannot sync a folder
            raise
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, obj: Any, *, durable: bool = True) -> None:
    """`obj` as one strict, indented JSON file, written atomically."""
    write_atomic(path, _dumps(obj, indent=2) + "\n", durable=durable)


def read_json(path: str | os.PathLike) -> Any:
    """The value of a strict JSON file; a ValueError in one line where it is not JSON."""
    try:
        return _parse(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}): restore it or write it again") from error


def _parse(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not strict JSON")


# --- lines ----------------------------------------------------------------------------------------------------------


def append_line(path: str | os.PathLike, obj: Mapping) -> None:
    """Append one JSON object as one line, in a single O_APPEND write; several processes may append to one file.

    A torn line that a killed process left at the end is closed first, so that it costs only itself. A write that the
    disk cut short is an OSError.
    """
    if not isinstance(obj, Mapping):
        raise ValueError(f"a line must hold a dict, got {type(obj).__name__}: give the value a name")
    line = _dumps(obj, separators=(",", ":")).encode("ascii") + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.lseek(handle, 0, os.SEEK_END)
        if end:
            os.lseek(handle, end - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                line = b"\n" + line
        written = os.write(handle, line)
    finally:
        os.close(handle)
    if written != len(line):
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes of a line were written", os.fspath(path))


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """All whole lines of a file and the number of torn ones, wherever they stand; a missing file has no lines."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    rows, torn = [], 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    return rows, torn


# --- where to write -------------------------------------------------------------------------------------------------


def check_output_folder(path: str | os.PathLike, resume: bool = False) -> Path:
    """Refuse a place where no result can go before any work is done; creates nothing.

    ValueError, one line: a folder that is not empty (unless `resume`), a file in the way, no write permission, a disk
    without space. The folder itself need not exist yet.
    """
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output folder '{folder}' is a file: choose another folder")
        if not resume and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output folder '{folder}' is not empty: choose another folder")
        standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=standing) as probe:
            probe.write(b"\0")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write to output folder '{folder}' ({reason}): choose another folder") from error
    return folder
