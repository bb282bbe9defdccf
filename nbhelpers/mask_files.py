"""How are masks kept in a file, and what is refused when one is read? Packed bits, one checksum, three formats.

`.safetensors`, torch's `.pt` and NumPy's `.npz` hold the same: packed bits by name of the parameter, and a header in
JSON. The header holds `sha256`, over name, shape and packed bits of every parameter in the order of their names, which
is the same in all three, and a checksum of its own; both are checked when a file is read. Nothing in a file is ever
executed: pickles are read with weights_only=True or not at all, sizes are checked before anything of that size is made.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nbhelpers import masks, models, records
from nbhelpers.architecture import is_quantised
from nbhelpers.mask_selection import bits_for, exact, packed_bytes
from nbhelpers.masks import Levels
from nbhelpers.projections import projections
from nbhelpers.registry import unknown

FORMAT = 1
KEY = "nbhelpers_mask"  # of the header, in all three formats
LONGEST_HEADER = 16 * 2**20  # bytes
ROOM = 2**20  # bytes beside the packed bits and the header that a file of any format may take
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class MaskFile:
    """What a file holds. header: sparsities, how they were chosen (pattern, scope, ...), importance, seed,
    model_fingerprint, created_at, sha256, and what else was given to `save`."""

    levels: Levels
    header: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return self.header["sha256"]


def sha256(levels: Levels) -> str:
    """Over name, shape, bits a weight and packed bits of every parameter, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(levels.shapes):
        digest.update(records.canonical_json([name, list(levels.shapes[name]), levels.bits]).encode())
        digest.update(levels.packed[name].numpy().data)
    return digest.hexdigest()


# Writing --------------------------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    levels: Levels,
    *,
    importance: str | None,
    seed: int | None = None,
    model_fingerprint: str | None = None,
    created_at: str | None = None,
    **more: Any,
) -> str:
    """Write masks whole or not at all, in the format that the name ends in; returns their sha256.

    importance: what the scores were; None where nobody chose (masks.read_off). model_fingerprint: models.fingerprint of
    the model before it was masked. created_at: ISO 8601, now by default. more: what else the header shall say (JSON).
    """
    write = _by_suffix(path, _WRITERS)
    said = {
        "format": FORMAT,
        "sparsities": list(levels.sparsities),
        "shapes": {name: list(shape) for name, shape in levels.shapes.items()},
        "numbers": levels.numbers,
        "bits": levels.bits,
        "how": dict(levels.how),
        "importance": importance,
        "seed": seed,
        "model_fingerprint": model_fingerprint,
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": sha256(levels),
    }
    if both := said.keys() & more.keys():
        raise ValueError(f"the header of a mask already says {', '.join(sorted(both))}: take another name")
    header = records.plain(said | more)
    text = records.canonical_json(header | {"header_sha256": records.sha256_json(header)})
    records.write_atomic(path, write(text, levels.packed))
    return said["sha256"]


def _to_safetensors(header: str, packed: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save as to_bytes

    return to_bytes({name: tensor.contiguous() for name, tensor in packed.items()}, {KEY: header})


def _to_pt(header: str, packed: Mapping[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({KEY: header, "packed": {name: tensor.clone() for name, tensor in packed.items()}}, buffer)
    return buffer.getvalue()


def _to_npz(header: str, packed: Mapping[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    arrays = {name: tensor.numpy() for name, tensor in packed.items()}
    np.savez(buffer, **{KEY: np.frombuffer(header.encode(), np.uint8)}, **arrays)
    return buffer.getvalue()


# Reading --------------------------------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module | None = None, *, same_weights: bool = True) -> MaskFile:
    """Read masks. ValueError, in one line with the file's name, for whatever is not whole or does not fit.

    model: what they must fit, by exact names and shapes; same_weights: also by fingerprint, where the file has one:
    turn it off for a model that was pruned or trained since.
    """
    read, path = _by_suffix(path, _READERS), Path(path)
    with path.open("rb"):  # a file that is not there is no broken one
        pass
    try:
        found = _checked(*read(path))
    except Exception as error:  # foreign bytes can raise anything, and all of it means that they are no masks
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"mask file '{path}' is refused: {said}; copy it again, or make the masks anew") from error
    if model is not None:
        _check_model(path, found, model, same_weights)
    return found


def _check_model(path: Path, found: MaskFile, model: nn.Module, same_weights: bool) -> None:
    if any(is_quantised(module) for module in model.modules() if isinstance(module, nn.Linear)):
        raise ValueError(
            f"mask file '{path}' is for whole weights, and this model is quantised: mask the model first (nbhelpers "
            "masks apply), then quantise it"
        )
    projections(model, accept_low_coverage=True)  # what is wrong with the model itself is said of the model
    try:
        masks.check_fits(model, found.levels.shapes)
    except ValueError as error:
        raise ValueError(f"mask file '{path}' is for another model: {error}") from error
    wanted = found.header["model_fingerprint"]
    if same_weights and wanted is not None and wanted != (here := models.fingerprint(model)):
        raise ValueError(
            f"mask file '{path}' is for a model with other weights ({wanted[:12]}, here {here[:12]}): load that model, "
            "or pass same_weights=False for one that was pruned or trained since"
        )


def _checked(text: str, packed: Mapping[str, np.ndarray]) -> MaskFile:
    header = _header(text)
    shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
    if set(shapes) != set(packed):
        raise ValueError(f"its header and its bits name other parameters: {sorted(set(shapes) ^ set(packed))[:3]}")
    sparsities = tuple(header["sparsities"])
    bits = bits_for(len(sparsities))
    for name, shape in shapes.items():
        if len(packed[name]) != packed_bytes(prod(shape), bits):
            raise ValueError(
                f"{name} has {len(packed[name])} bytes of bits, and its shape {shape} needs another number"
            )
    tensors = {name: torch.from_numpy(packed[name]) for name in shapes}
    found = MaskFile(Levels(sparsities, shapes, tensors, header["how"]), header)
    if sha256(found.levels) != header["sha256"]:
        raise ValueError("its bits do not match its sha256")
    return found


def _header(text: str) -> dict[str, Any]:
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"its header has {len(text)} bytes, more than {LONGEST_HEADER}")
    header = json.loads(text)
    own = header.pop("header_sha256", None)
    if own != records.sha256_json(header):
        raise ValueError("its header does not match its own sha256")
    if header["format"] != FORMAT:
        raise ValueError(f"it has format {header['format']}, this version reads {FORMAT}")
    for shape in header["shapes"].values():
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"its header names the shape {shape}")
    if [exact(one) for one in header["sparsities"]] != sorted({exact(one) for one in header["sparsities"]}):
        raise ValueError(f"its sparsities are not ascending: {header['sparsities']}")
    return header


def _from_safetensors(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    header, start = safetensors_header(path)
    text = header.pop("__metadata__", {}).get(KEY)
    if text is None:
        raise ValueError("it holds tensors, but no masks")
    wrong = [name for name, one in header.items() if one["dtype"] != "U8" or len(one["shape"]) != 1]
    if wrong:
        raise ValueError(f"{wrong[0]} is no row of bytes, as packed bits are")
    packed = {name: _bytes_of(path, start, one) for name, one in header.items()}
    return text, packed


def _from_pt(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    _check_zip(path, "a pickle without torch's archive around it is not opened")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a foreign pickle raises is its own choice
        raise ValueError(
            f"it holds other things than tensors, or is broken ({type(error).__name__}); nothing of it was executed"
        ) from error
    if not isinstance(found, dict) or set(found) != {KEY, "packed"} or not isinstance(found["packed"], dict):
        raise ValueError("it holds no masks")
    for name, one in found["packed"].items():
        plain = type(one) is torch.Tensor and one.layout is torch.strided
        if not plain or one.dtype != torch.uint8 or one.ndim != 1 or not one.is_contiguous():
            raise ValueError(f"{name} is no row of bytes, as packed bits are")
    return str(found[KEY]), {name: one.numpy() for name, one in found["packed"].items()}


def _from_npz(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    _check_zip(path, "it is no NumPy archive")
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    header = found.pop(KEY, None)
    if header is None:
        raise ValueError("it holds arrays, but no masks")
    for name, one in (found | {KEY: header}).items():
        if one.dtype != np.uint8 or one.ndim != 1:
            raise ValueError(f"{name} is no row of bytes, as packed bits are")
    return header.tobytes().decode(), found


def _check_zip(path: Path, otherwise: str) -> None:
    """Nothing in an archive may be larger than the file, or differ from its checksum."""
    if not zipfile.is_zipfile(path):
        raise ValueError(otherwise)
    with zipfile.ZipFile(path) as file:
        if any(one.compress_type != zipfile.ZIP_STORED for one in file.infolist()):
            raise ValueError("it holds compressed parts, which masks never are")
        if sum(one.file_size for one in file.infolist()) > path.stat().st_size:
            raise ValueError("its parts are larger than the whole")
        if (broken := file.testzip()) is not None:
            raise ValueError(f"its part {broken!r} does not match its checksum")


_WRITERS = {".safetensors": _to_safetensors, ".pt": _to_pt, ".npz": _to_npz}
_READERS = {".safetensors": _from_safetensors, ".pt": _from_pt, ".npz": _from_npz}
SUFFIXES = tuple(_WRITERS)


def _by_suffix(path: str | Path, table: Mapping[str, Callable]) -> Callable:
    suffix = Path(path).suffix
    if suffix not in table:
        raise LookupError(unknown("format of a mask file", suffix, table))
    return table[suffix]


# Weights out of files, without a model --------------------------------------------------------------------------------


class Streamed(Mapping):
    """name -> tensor of safetensors files, read from disk each time it is asked for, one at a time in memory.

    Scores of magnitude (absolute=True) for a model that does not fit into memory.

    names: which, and in what order (LookupError for one that no file has); all by default, in the order of the files.
    """

    def __init__(self, paths: Sequence[str | Path], names: Sequence[str] | None = None) -> None:
        self._places: dict[str, tuple[Path, int, dict]] = {}
        for path in map(Path, paths):
            header, start = safetensors_header(path)
            header.pop("__metadata__", None)
            self._places |= {name: (path, start, one) for name, one in header.items()}
        for name in names or ():
            if name not in self._places:
                raise LookupError(unknown("tensor", name, self._places))
        self._names = list(self._places if names is None else names)

    def __getitem__(self, name: str) -> torch.Tensor:
        path, start, one = self._places[name]
        if one["dtype"] not in _STORED:
            raise ValueError(f"{name} in '{path}' is {one['dtype']}, scores must be {', '.join(_STORED)}")
        found = torch.from_numpy(_bytes_of(path, start, one)).view(_STORED[one["dtype"]])
        return found.reshape(one["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def safetensors_header(path: str | Path) -> tuple[dict[str, dict], int]:
    """(header, where the data begin). ValueError for one that is too long, no JSON, or does not fit the file."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, size - 8):
            raise ValueError(
                f"its header would have {length} bytes in a file of {size}: it is cut off or no safetensors"
            )
        header = json.loads(file.read(length))
    end = 0
    for name, one in header.items():
        if name != "__metadata__":
            begin, stop = one["data_offsets"]
            if begin != end or stop < begin:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            end = stop
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes where its header needs {8 + length + end}")
    return header, 8 + length


def _bytes_of(path: Path, start: int, one: Mapping[str, Any]) -> np.ndarray:
    begin, stop = one["data_offsets"]
    return np.fromfile(path, np.uint8, count=stop - begin, offset=start + begin)
