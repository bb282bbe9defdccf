"""How long will a run take? A sum of its parts to start from, corrected by what earlier runs here really took.

Only for planning: no number from here stands in a result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nbhelpers import data, estimates, heads, importance, models, runtime, tasks
from nbhelpers.architecture import geometry
from nbhelpers.experiments import PruningConfig
from nbhelpers.fine_tuning import FineTuningConfig
from nbhelpers.runs import Run, read_run
from nbhelpers.sparsity import SparsityConfig
from nbhelpers.stages import VALIDATION_WINDOWS, check_window
from nbhelpers.weight_pruning import WeightPruningConfig

BACKWARD = 2  # a backward pass takes about as many operations as two forward passes
OPERATIONS_A_LAYER = 30  # kernels that a decoder layer starts in a forward pass: what bounds a tiny model
REACHED = 0.45  # share of a linear layer's speed that a whole model reaches; the bundled ones reach 0.4 to 0.5
MASKED_BACKWARD = 2  # of LoRA under a mask: back to the inputs, and the gradient of the masked product
ROW_TOKENS = 512  # read by one pass of small models
TOGETHER = 32  # texts written at a time
FEW = 50  # rows whose length stands for all
LOADING_BYTES_PER_SECOND = 5e8  # from a warm disk
# config class -> kind of its runs
KINDS = {PruningConfig: "pruning", FineTuningConfig: "fine_tuning", WeightPruningConfig: "weight_pruning"}


@dataclass(frozen=True)
class Speed:
    """What this device does at a model's width, measured: floating-point operations a second; seconds a module call."""

    flops_per_second: float
    kernel_seconds: float


@lru_cache
def measure_speed(device: str, dtype: torch.dtype, width: int) -> Speed:
    """A linear layer of the model's width over 1,024 positions, and a tiny one, on this device: about 0.2 s."""
    large = torch.nn.Linear(width, 4 * width, device=device, dtype=dtype)
    tiny = torch.nn.Linear(8, 8, device=device, dtype=dtype)
    with torch.inference_mode():
        row, rows = torch.ones(1, 8, device=device, dtype=dtype), torch.ones(1024, width, device=device, dtype=dtype)
        return Speed(
            2 * 1024 * width * 4 * width / _seconds(lambda: torch.nn.functional.gelu(large(rows)), device),
            _seconds(lambda: tiny(row), device),
        )


def _seconds(call, device: str, repeats: int = 20, tries: int = 4) -> float:
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / repeats)
    return best


class _Pace:
    """Seconds of the parts that every run on one model is made of, at the speed measured on this device.

    LookupError where the amount of work is not known yet: a text on the hub with evaluation_windows left open.
    """

    def __init__(self, config: PruningConfig | FineTuningConfig, model: str, text: str) -> None:
        device = config.device or runtime.device()
        dtype = models.DTYPES[config.dtype] or runtime.dtype_for(device)
        self.config, self.model = config, models.load_config(model)
        self.speed = measure_speed(device, dtype, self.model.hidden_size)
        self.parameters = estimates.shape_of(self.model).parameters
        self.window = check_window(config.window, self.model)
        self.test = _windows(config, text, self.window)
        self.loading = 0.3 + self.parameters * dtype.itemsize / LOADING_BYTES_PER_SECOND
        self.kernels = OPERATIONS_A_LAYER * self.model.num_hidden_layers * self.speed.kernel_seconds
        self.writing = self.kernels * config.sample_tokens
        self.measured = self.passes(self.test) + self.writing
        self.saving = 2 * (self.loading + self.passes(self.test))

    def passes(self, windows: float, backward: float = 0) -> float:
        """Forward passes over windows. backward: the work of a backward pass as a multiple of a forward one."""
        operations = 2 * self.parameters * self.window * windows
        started = self.kernels * max(1.0, windows / 8)
        return (operations / self.speed.flops_per_second / REACHED + started) * (1 + backward)


def phases(config: PruningConfig | FineTuningConfig) -> dict[str, float]:
    """Seconds of each phase of a run, in order, by the names that the run reports."""
    return fine_tuning_phases(config) if isinstance(config, FineTuningConfig) else pruning_phases(config)


def pruning_phases(config: PruningConfig | WeightPruningConfig) -> dict[str, float]:
    """Seconds of each phase of a pruning run, in order: a start to plan from. LookupError as of `_Pace`."""
    pace = _Pace(config, config.model, config.text)
    name = "scoring heads"
    if isinstance(config, WeightPruningConfig):
        name = "masking" if config.what == "weights" else "scoring channels"
        looks = config.masks is None and importance.needs_data(config.importance)
        scoring = pace.passes(config.calibration_rows, BACKWARD) if looks else 0.0
    else:
        scoring = _scoring(config, pace.passes, geometry(pace.model).total)
    steps = config.steps * pace.passes(config.batch_size, BACKWARD)
    training = steps + pace.passes(5 * VALIDATION_WINDOWS) if config.steps else 0.0
    phases = {"loading": pace.loading, "baseline": pace.measured, name: scoring, "pruned": pace.measured}
    if config.steps:
        phases |= {"training fine_tuned": training, "fine_tuned": pace.measured}
    phases["saving"] = pace.saving
    if config.steps and config.control:
        phases |= {"training control": pace.loading + training, "control": pace.measured}
    return phases


def fine_tuning_phases(config: FineTuningConfig, done: int = 0) -> dict[str, float]:
    """Seconds of each phase of a fine-tuning run, in order: a start to plan from. LookupError as of `_Pace`.

    done: steps that a run to go on with has behind it. Adapters alone need no gradient of the other weights, so their
    backward pass takes half of a whole one; gradient checkpointing adds a forward pass.
    """
    pace = _Pace(config, config.model, config.data)
    phases = {"loading": pace.loading, "baseline": pace.measured}
    phases |= {"masked": pace.measured} if config.is_masked else {}
    phases |= {"training fine_tuned": _training(config, pace, config.steps - done), "fine_tuned": pace.measured}
    phases["saving"] = pace.saving
    if config.control is not None:
        other = _Pace(config, config.control, config.data)
        phases |= {
            "training control": other.loading + _training(config, other, config.steps),
            "control": other.measured,
        }
    return phases


def sparsity_seconds(config: SparsityConfig) -> float:
    """Seconds of one cell of a sparsity sweep whose model is loaded already and whose dense answers are there: a start
    to plan from. LookupError where rows or model are on the hub."""
    if config.data is None or models.locate(config.model)[0] == "hub":
        raise LookupError("known once the rows and the model are here")
    device = config.device or runtime.device()
    dtype = models.DTYPES[config.dtype] or runtime.dtype_for(device)
    model = models.load_config(config.model)
    speed = measure_speed(device, dtype, model.hidden_size)
    parameters = estimates.shape_of(model).parameters
    kernels = OPERATIONS_A_LAYER * model.num_hidden_layers * speed.kernel_seconds
    documents, tokens, written = _asked(config.model, config.task, config.data, config.limit)

    def passes(rows: float, times: float = 1) -> float:
        work = 2 * parameters * tokens * rows / speed.flops_per_second / REACHED
        return (work + kernels * max(1.0, rows * tokens / ROW_TOKENS)) * times

    answers = passes(documents) + written * kernels * max(1.0, documents / TOGETHER)
    if config.tuning == "none":
        return 2 * answers
    backward = MASKED_BACKWARD + config.gradient_checkpointing
    return config.steps * passes(config.batch_size, 1 + backward) + 3 * passes(VALIDATION_WINDOWS) + 1.5 * answers


@lru_cache
def _asked(model: str, task: str, source: str, limit: int | None) -> tuple[int, float, int]:
    """(documents, mean tokens of one with its choices or answer, tokens that are written for it)."""
    rows = tasks.read(task, source, limit=limit)
    asked = tasks.documents(rows, shots=0)
    tokenizer = models.load_tokenizer(model)
    texts = ["".join((one.context, *one.choices)) or one.context for one in asked[:FEW]]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    return len(asked), sum(lengths) / len(lengths), rows.task.new_tokens


def _training(config: FineTuningConfig, pace: _Pace, steps: int) -> float:
    backward = (BACKWARD if config.method == "full" else BACKWARD / 2) + config.gradient_checkpointing
    every = config.training().eval_every
    validation = pace.passes(VALIDATION_WINDOWS) + pace.writing * getattr(config, "samples", False)
    return steps * pace.passes(config.batch_size, backward) + (steps // every + 1) * validation


def _scoring(config: PruningConfig, passes, total: int) -> float:
    rounds = 1
    if config.iterative:
        rounds = -(-heads.count(config.level, total) // (config.heads_per_round or -(-total // heads.ROUNDS)))
    windows = config.scoring_windows
    once = {
        "random": 0.0,
        "magnitude": 0.0,
        "entropy": 2 * passes(windows),
        "ablation": total / 2 * passes(windows),
    }.get(config.strategy, passes(windows, BACKWARD))
    return rounds * once


def _windows(config: PruningConfig | FineTuningConfig, text: str, window: int) -> int:
    hub = not tasks.is_local(text)
    if hub and config.evaluation_windows is None:
        raise LookupError("known once the text is here; set evaluation windows to know it before")
    if hub:
        return config.evaluation_windows
    return min(_test_windows(config.model, text, window), config.evaluation_windows or 10**9)


@lru_cache
def _test_windows(model: str, text: str, window: int) -> int:
    return len(data.rows(models.load_tokenizer(model), tasks.load_corpus(text).test, window))


def correction(config: PruningConfig | FineTuningConfig, root: str | Path, host: str) -> float | None:
    """What the last finished run of this kind, model and method on this host took / what was estimated for it.

    None without one.
    """
    kind = KINDS[type(config)]
    folders = sorted(Path(root).glob("*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in folders[:20]:
        try:
            run = read_run(path.parent)
        except (ValueError, OSError):
            continue
        known = run.manifest.get("environment", {}).get("host")
        same = all(run.config.get(name) == getattr(config, name) for name in ("model", "method"))
        if run.kind == kind and same and known == host:
            taken = taken_seconds(run)
            return taken / sum(phases(type(config)(**_fields(type(config), run.config))).values()) if taken else None
    return None


def _fields(config_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name in config_class.model_fields}


def taken_seconds(run: Run) -> float | None:
    """Seconds on the clock of a run when its last event was written."""
    return max((event.get("wallclock_time") or 0.0 for event in run.events), default=0.0) or None


def in_words(seconds: float) -> str:
    """A duration as people say it.

    >>> in_words(0.4), in_words(42), in_words(200), in_words(9000)
    ('1 s', '40 s', '3 min', '2.5 h')
    """
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    if seconds < 100:
        return f"{round(seconds, -1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Timetable:
    """Where a run stands in its phases: the share that is done and the seconds left, corrected by its own pace."""

    def __init__(self, phases: Mapping[str, float]) -> None:
        self.phases, self.started = dict(phases), time.monotonic()
        self.done, self.current, self.share = 0.0, "", 0.0

    def hear(self, phase: str, done: int | None = None, total: int | None = None) -> None:
        """The run is in `phase`, `done` of `total` parts of it made."""
        if phase not in self.phases:
            return
        if phase != self.current:
            names = list(self.phases)
            self.done = max(self.done, sum(self.phases[name] for name in names[: names.index(phase)]))
            self.current = phase
        self.share = min(1.0, done / total) if done is not None and total else 0.0

    @property
    def fraction(self) -> float:
        total = sum(self.phases.values())
        here = self.phases.get(self.current, 0.0) * self.share
        return min(0.99, (self.done + here) / total) if total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None until a twentieth is done."""
        taken, fraction = time.monotonic() - self.started, self.fraction
        return taken / fraction - taken if fraction >= 0.05 else None
