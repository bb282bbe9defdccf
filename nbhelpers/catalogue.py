"""Which hub models are offered by name, and which of them fit this machine for a job?"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nbhelpers import colab, estimates, memory
from nbhelpers.registry import unknown

ASSETS = Path(__file__).parent / "assets"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
COMMERCIAL = ("apache-2.0", "mit")  # licences that allow any use; others have conditions of their own
ROLES = {  # of a comparison, the ones that it asks by default first
    "llm": ("Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3", "Qwen2.5-7B-Instruct"),
    "slm": ("Llama-3.2-3B-Instruct", "Qwen2.5-3B-Instruct", "Qwen2.5-1.5B-Instruct", "Phi-3-mini", "TinyLlama"),
}


@dataclass(frozen=True)
class Entry:
    """One hub model. Sizes are counted from its config; licence and gate are what its hub page said when this was made.

    gated: True asks for consent on the hub page first, False does not, None: not certain, the hub has the last word.
    file_dtype: of the published weights. extra_file_bytes: buffers in the file that are no parameters.
    """

    name: str
    hub_id: str
    licence: str
    gated: bool | None
    file_dtype: str
    config: dict[str, Any]
    extra_file_bytes: int
    shape: estimates.Shape
    note: str = ""

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    @property
    def download_bytes(self) -> int:
        """Parameters x bytes of the published dtype + buffers in the file; tokenizer files are not counted."""
        return self.parameters * DTYPE_BYTES[self.file_dtype] + self.extra_file_bytes


@dataclass(frozen=True)
class Suggestion:
    """A model and what it would take: `sum` shows how required_bytes came about, an estimate to start from."""

    name: str
    source: str  # the hub id, or "bundled"
    parameters: int
    required_bytes: int
    sum: str
    fits: bool
    download_bytes: int
    licence: str
    gated: bool | None
    note: str


def names() -> list[str]:
    """Names of the hub models offered, family by family."""
    return list(_entries())


def entry(name: str) -> Entry:
    """The model of a name or hub id, upper or lower case. LookupError for one that is not in the catalogue."""
    wanted = name.lower()
    for one in _entries().values():
        if wanted in (one.name.lower(), one.hub_id.lower()):
            return one
    raise LookupError(unknown("hub model", name, names()))


def known(name: str) -> Entry | None:
    """The same; None for one that is not in the catalogue."""
    try:
        return entry(name)
    except LookupError:
        return None


def hub_id(name: str) -> str:
    """The hub's id of a model in the catalogue: `hub_id("opt-125m") == "facebook/opt-125m"`."""
    return entry(name).hub_id


def offered(role: str) -> list[Entry]:
    """The models offered for a side of a comparison: "llm", large ones, or "slm", small ones to fine-tune."""
    if role not in ROLES:
        raise LookupError(unknown("role", role, ROLES))
    return [entry(name) for name in ROLES[role]]


def open_set(role: str) -> list[Entry]:
    """Those of them that certainly have no gate and whose licence, Apache-2.0 or MIT, allows commercial use."""
    return [model for model in offered(role) if model.gated is False and model.licence in COMMERCIAL]


def token_state() -> Literal["present", "absent"]:
    """Whether downloads from the hub go with a token: of the environment, Colab's secrets or a login on this machine.

    The token itself is neither returned nor logged. That it opens a certain gate is known by the hub alone.
    """
    from huggingface_hub import get_token

    return "present" if colab.secret("HF_TOKEN") or get_token() else "absent"


def suggest(job: str, free_bytes: int | None = None, *, tokens: int = 512, weight_bytes: int = 2) -> list[Suggestion]:
    """Every model of the catalogue and every bundled one, with what `job` would take and whether that fits.

    free_bytes: default what is free now (`memory.available_bytes`). tokens, weight_bytes: as for
    `estimates.required_bytes` (4 where weights load in float32: CPU and MPS by default). Those that fit come first, the
    largest ahead; then the others, the smallest ahead. Bundled models always fit. Nothing is changed or loaded by this.
    LookupError for an unknown job.
    """
    if free_bytes is None:
        free_bytes = memory.available_bytes()
    if isinstance(free_bytes, bool) or free_bytes < 0:
        raise ValueError(f"free_bytes must be at least 0, got {free_bytes}")
    found = [_bundled(folder, job, tokens, weight_bytes) for folder in _bundled_folders()]
    for model in _entries().values():
        need = estimates.required_bytes(model.shape, job, tokens=tokens, weight_bytes=weight_bytes)
        found.append(
            Suggestion(
                name=model.name,
                source=model.hub_id,
                parameters=model.parameters,
                required_bytes=need.total,
                sum=need.text,
                fits=estimates.fits(need, free_bytes=free_bytes),
                download_bytes=model.download_bytes,
                licence=model.licence,
                gated=model.gated,
                note=model.note,
            )
        )
    return sorted(found, key=lambda s: (not s.fits, -s.required_bytes if s.fits else s.required_bytes, s.name))


@cache
def _entries() -> dict[str, Entry]:
    rows = json.loads((ASSETS / "catalogue.json").read_text(encoding="utf-8"))["models"]
    return {row["name"]: Entry(**{**row, "shape": estimates.Shape(**row["shape"])}) for row in rows}


def _bundled_folders() -> list[Path]:
    folder = ASSETS / "models"
    return sorted(path.parent for path in folder.glob("*/model.safetensors")) if folder.is_dir() else []


def _bundled(folder: Path, job: str, tokens: int, weight_bytes: int) -> Suggestion:
    """Counted from the weights that are shipped; tied weights are stored once."""
    count = _stored_parameters(folder / "model.safetensors")
    need = estimates.required_bytes(count, job, tokens=tokens, weight_bytes=weight_bytes)
    return Suggestion(
        name=folder.name,
        source="bundled",
        parameters=count,
        required_bytes=need.total,
        sum=need.text,
        fits=True,
        download_bytes=0,
        licence="mit",
        gated=False,
        note="shipped with this package",
    )


def _stored_parameters(path: Path) -> int:
    """Numbers stored in a safetensors file, from its header: 8 bytes little-endian length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
