"""How do jobs after one another use one loaded model? It is lent, and put back bit for bit after each of them.

At most one model is held by a process. A job may mask, train adapters on and merge into the projections of the model
it was lent; what stood there is kept on the CPU and put back. After an error the model is given up, and the next job
loads it anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nbhelpers import adapters, memory, models, projections

log = logging.getLogger(__name__)
_held: dict[str, Any] = {}  # "key", "loaded", "kept": the one model that is held


def _key(name: str, device: str | None, dtype: str) -> tuple:
    """Which weights these are: a folder's files, or a hub model's commit, which is known once it was loaded."""
    return name, str(models.revision(name)), device, dtype


@contextmanager
def lent(name: str, *, device: str | None, dtype: str) -> Iterator[models.LoadedModel]:
    """The model in evaluation mode with its own weights, loaded only where another one (or none) is held."""
    if _held.get("key") != _key(name, device, dtype):
        release()
        loaded = models.load_model(name, device=device, dtype=dtype)
        log.info("loaded %s", name)
        _held.update(key=_key(name, device, dtype), loaded=loaded, kept=_projection_weights(loaded.model))
    loaded = _held["loaded"]
    try:
        yield loaded
    except BaseException:
        release()
        raise
    _put_back(loaded.model, _held["kept"])


def release() -> None:
    """Give the held model's memory back; nothing where none is held."""
    if _held:
        memory.release(_held["loaded"].model)
        _held.clear()


def _projection_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    covered = projections.projections(model, accept_low_coverage=True).covered
    return {one.name: model.get_parameter(one.name).detach().to("cpu", copy=True) for one in covered}


@torch.no_grad()
def _put_back(model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    adapters.unload(model)
    for name, weight in kept.items():
        model.get_parameter(name).copy_(weight)
    model.__dict__.pop("nbhelpers_mask", None)
    model.eval()
