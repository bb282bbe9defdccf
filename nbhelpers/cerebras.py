"""How are masks taken to a Cerebras CS-3, and how is training with them tried here?

What is tried here: `SparseModelWrapper` and `SparseMaskCallback` hold a mask during any training loop, and the files
that `export` writes can be read back. What is NOT tried, for want of the hardware: the run configuration on a CS-3. Its
names follow the documented `cstorch.sparse` interface (groups of parameters, an algorithm "static" that takes its mask
from the zeros of the weights); read the configuration beside the release that is installed there before a long run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch import nn

from nbhelpers import mask_files, masks, records

Mask = Mapping[str, torch.Tensor]
Mode = Literal["sparse_to_dense", "sparse_to_sparse"]
TRIED = "not tried on a CS-3: compare with the documentation of the installed release before a long run"


class SparseModelWrapper(nn.Module):
    """A model whose masked weights are zero, and can be set to zero again: `wrapper(...)` is `model(...)`, `config` and
    `generate` are the model's.

    mode sparse_to_dense: they are zero at the start and free to grow; sparse_to_sparse: `apply_masks` keeps them zero.
    """

    def __init__(self, model: nn.Module, mask: Mask, mode: Mode) -> None:
        super().__init__()
        _check_mode(mode)
        _check_mask(mask)
        self.model, self.mask, self.mode = model, mask, mode
        masks.apply(model, mask)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    @property
    def config(self) -> Any:
        return self.model.config

    def generate(self, *arguments: Any, **named: Any) -> Any:
        return self.model.generate(*arguments, **named)

    def apply_masks(self) -> int:
        """Set every masked weight to zero; returns how many were not. Nothing in mode sparse_to_dense."""
        if self.mode == "sparse_to_dense":
            return 0
        alive = self.violations()
        if alive:
            masks.apply(self.model, self.mask)
        return alive

    def violations(self) -> int:
        """Masked weights that are not zero now."""
        return masks.verify(self.model, self.mask)["violations"]


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be {' or '.join(get_args(Mode))}, got {mode!r}")


def _check_mask(mask: Mask) -> None:
    if isinstance(mask, Mapping):
        return
    more = ""
    if isinstance(mask, masks.Levels):
        more = f": give levels.mask(sparsity), with one of {', '.join(map(str, mask.sparsities))}"
    raise TypeError(f"mask must be {{name: bool tensor}} of one sparsity, got {type(mask).__name__}{more}")


def prepare_sparse_model(model: nn.Module, mask: Mask, mode: Mode = "sparse_to_sparse") -> SparseModelWrapper:
    """The model masked and wrapped. ValueError where the mask does not fit, TypeError where it is none, and nothing is
    touched then."""
    return SparseModelWrapper(model, mask, mode)


class SparseMaskCallback:
    """For any loop: call `on_step_end()` after each optimizer step. Masked weights become zero again, and counted.

    revived: masked weights that a step had changed, by step; it is what weight decay and momentum do without a mask.
    """

    def __init__(self, wrapper: SparseModelWrapper) -> None:
        if not isinstance(wrapper, SparseModelWrapper):
            raise TypeError(
                f"wrapper must be a SparseModelWrapper, got {type(wrapper).__name__}: give what prepare_sparse_model "
                "returned"
            )
        self.wrapper, self.steps = wrapper, 0
        self.revived: dict[int, int] = {}

    def on_step_end(self) -> int:
        """Returns how many masked weights this step had changed."""
        self.steps += 1
        changed = self.wrapper.apply_masks()
        if changed:
            self.revived[self.steps] = changed
        return changed

    def report(self) -> dict[str, Any]:
        """{"steps", "steps_with_changes", "changed" (in all), "violations" (now)}."""
        changed = sum(self.revived.values())
        now = self.wrapper.violations()
        return {"steps": self.steps, "steps_with_changes": len(self.revived), "changed": changed, "violations": now}


def create_sparse_config(mask: Mask, mode: Mode = "sparse_to_sparse", **training: Any) -> dict[str, Any]:
    """A run configuration with these masks: the sparsity of each parameter, and the training settings given.

    training: what goes under "training" as it is (steps, learning_rate, batch_size, ...).
    """
    _check_mode(mode)
    _check_mask(mask)
    counted = {name: 1 - kept.float().mean().item() for name, kept in mask.items()}
    groups = [
        {"params": name, "algorithm": "static", "init_method": "from_zeros", "sparsity": share}
        for name, share in counted.items()
    ]
    fixed = mode == "sparse_to_sparse"
    return {
        "note": TRIED,
        "sparsity": {"mode": mode, "mask_is_fixed": fixed, "groups": groups if fixed else []},
        "initial_zeros": {"file": "masks.pt", "sha256": mask_files.sha256(masks.pack(mask))},
        "training": dict(training),
    }


def export(folder: str | Path, model: nn.Module, mask: Mask, mode: Mode = "sparse_to_sparse", **training: Any) -> Path:
    """Write masks.pt, masks.safetensors (the same masks) and run.yaml into a new folder; the model's own weights go
    there by models.save_model. ValueError where the mask does not fit the model."""
    _check_mode(mode)
    _check_mask(mask)
    masks.check_fits(model, {name: tuple(kept.shape) for name, kept in mask.items()})
    folder = records.check_output_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    levels = masks.pack(mask, {"pattern": "given"})
    for suffix in ("pt", "safetensors"):
        mask_files.save(folder / f"masks.{suffix}", levels, importance=None, mode=mode)
    text = yaml.safe_dump(records.plain(create_sparse_config(mask, mode, **training)), sort_keys=False)
    records.write_atomic(folder / "run.yaml", text)
    return folder
