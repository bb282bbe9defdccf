"""How is fine-tuning resumed bit for bit after a kill, and never from a torn checkpoint?

A checkpoint is a folder `checkpoint-00000042`: written beside under another name, its last file COMPLETE holds the
sha256 of all others, then renamed. One without COMPLETE, or with a file that does not match, is passed over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbhelpers import records

logger = logging.getLogger(__name__)

FORMAT = 1
COMPLETE = "COMPLETE"
KEEP = 2  # newest complete checkpoints kept: the last one and one to fall back on
FREE_TO_CHANGE = {"micro_batch_size", "checkpoint_every"}  # config fields that do not decide what is learned


@dataclass
class TrainingState:
    """What a checkpoint must hold beside weights, optimizer, schedule and random state. Plain JSON values only."""

    micro_batch_size: int
    step: int = 0
    train_losses: list[list] = field(default_factory=list)  # [step, nats per label token]
    validation_nlls: list[list] = field(default_factory=list)  # [step, nats per scored token]
    best_step: int | None = None
    best_validation_nll: float | None = None
    validated_step: int | None = None
    validations_since_best: int = 0
    stopped_early: bool = False
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    restored: bool = False
    label_tokens: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0


def identity(model: nn.Module, config: Any, train: Sequence[dict], validation: Sequence[dict]) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: config, rows, parameter shapes and head gates."""
    return {
        "format": FORMAT,
        "config": config.model_dump(mode="json", exclude=FREE_TO_CHANGE),
        "train_rows": _sha256_rows(train),
        "validation_rows": _sha256_rows(validation),
        "parameters": records.sha256_json({name: list(p.shape) for name, p in model.named_parameters()}),
        "head_gates": records.sha256_json(
            {n: b.tolist() for n, b in model.named_buffers() if n.rpartition(".")[2] == "head_gate"}
        ),
    }


def _sha256_rows(rows: Sequence[dict]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for key in ("input_ids", "labels"):
            digest.update(len(row[key]).to_bytes(8, "little") + row[key].numpy().tobytes())
    return digest.hexdigest()


class Folder:
    """The checkpoints of one fine-tuning run in `path`, all of one `identity`."""

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.identity = identity

    def start(self, resume: bool, *, writes: bool) -> Path | None:
        """The checkpoint to go on from, or None; ValueError where old ones would get mixed up or do not fit."""
        present = _by_step(self.path)
        if present and writes and not resume:
            raise ValueError(
                f"{self.path} already holds checkpoints; resume=True continues them, or name another folder"
            )
        if resume and writes:
            for torn in self.path.glob("partial-*"):  # of a process that was killed while it wrote
                shutil.rmtree(torn, ignore_errors=True)
        found = newest_complete(self.path) if resume else None
        if found is not None:
            theirs = records.read_json(found / COMPLETE)["identity"]
            differing = [key for key in self.identity if theirs.get(key) != self.identity[key]]
            if "config" in differing:
                theirs, ours = theirs["config"], self.identity["config"]
                differing.remove("config")
                differing += [f"config.{key}" for key in ours if theirs.get(key) != ours[key]]
            if differing:
                raise ValueError(
                    f"{found.name} was made with other {', '.join(differing)}; resume with the same, or start anew"
                )
        return found

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write(folder)` fill a new checkpoint; it counts only when every file is on disk and summed."""
        final = self.path / f"checkpoint-{step:08d}"
        partial = self.path / f"partial-{step:08d}-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            files = {file.name: _flushed_sha256(file) for file in sorted(partial.iterdir())}
            records.write_json(partial / COMPLETE, {"step": step, "files": files, "identity": self.identity})
            if final.exists():  # the same step, reached again after resuming from an older one
                shutil.rmtree(final)
            partial.rename(final)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"cannot write checkpoint {final}: {error}; free some space or set checkpoint_every=None"
            ) from error
        self._drop_old()
        return final

    def _drop_old(self) -> None:
        for old in [path for path in _by_step(self.path) if (path / COMPLETE).is_file()][KEEP:]:
            shutil.rmtree(old, ignore_errors=True)


def newest_complete(path: Path) -> Path | None:
    """The checkpoint with the highest step whose files are all there and unchanged; others are logged and skipped."""
    for candidate in _by_step(path):
        fault = _fault(candidate)
        if fault is None:
            return candidate
        logger.warning("checkpoint %s is passed over: %s", candidate.name, fault)
    return None


def _by_step(path: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in path.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        listed = records.read_json(checkpoint / COMPLETE)["files"]
        wrong = [name for name, digest in listed.items() if records.sha256_file(checkpoint / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"changed files {wrong}" if wrong else None


def _flushed_sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return records.sha256_file(path)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))
