"""How fast does this machine carry out the jobs of a sparsity sweep? A short pilot of each model and task, timed.

A pilot is a job of the plan with few steps and rows, twice as many each time until its share of a minute is used; what
a step and a document take is the difference of the last two. Only for planning: no number from here is a result.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbhelpers import grid, jobkinds, sparsity_price
from nbhelpers.grid import Expansion, Job, Plan
from nbhelpers.tracking import Interrupted

KINDS = jobkinds.KINDS  # of jobs that a plan may name
SAME = (
    "model",
    "task",
    "data",
    "train_data",
    "shots",
    "dtype",
    "batch_size",
    "micro_batch_size",
    "lora_rank",
    "tuning",
    "window",
    "gradient_checkpointing",
    "device",
)
STEPS, DOCUMENTS = 2, 4  # of the first pilot
PILOTS = 8  # at most: the last one has 128 times as many


@dataclass(frozen=True)
class Pace:
    """Seconds of one job: a step, a document answered once, and all that is neither (masking, merging, records)."""

    step: float
    document: float
    rest: float

    def seconds(self, config: Mapping[str, Any], evaluations: float) -> float | None:
        """evaluations: how often the job's documents are answered. None where nobody knows how many they are."""
        documents = sparsity_price.documents(config["task"], config["data"], config["limit"])
        steps = config["steps"] if config["tuning"] == "lora" else 0
        if documents is None:
            return None
        return self.rest + steps * self.step + documents * evaluations * self.document


def measure(
    plan: str | Path | Mapping[str, Any] | Plan,
    seconds_a_model: float = 60.0,
    progress: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, float | None]:
    """Seconds of each job of a plan, by its id, from pilots on this machine; each model's take about a minute in all.

    ValueError for a plan of another kind. What goes wrong in a pilot is raised: it would go wrong in its jobs too.
    """
    expansion = grid.expand(grid.read_plan(plan))
    if expansion.plan.kind != "sparsity" or expansion.plan.search is not None:
        raise ValueError(
            f"calibrate is for a grid of 'sparsity' jobs, got {expansion.plan.kind!r}: the estimate of the plan serves"
        )
    jobs = grid.in_order(expansion, list(expansion.jobs.values()))
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(repr(job.config[name]) for name in SAME), []).append(job)
    tasks_of: dict[str, int] = {}
    for alike in groups.values():
        tasks_of[alike[0].config["model"]] = tasks_of.get(alike[0].config["model"], 0) + 1
    found: dict[str, float | None] = {}
    try:
        for alike in groups.values():
            config = _typical(alike)
            if progress is not None:
                progress({"stage": "calibrating", "model": config["model"], "task": config["task"]})
            pace = pilot(expansion, config, seconds_a_model / tasks_of[config["model"]], should_stop)
            configs = [job.config for job in alike]
            evaluations = sparsity_price.price(configs)["evaluations"] / len(configs)
            found |= {job.id: pace.seconds(job.config, evaluations) for job in alike}
    finally:
        expansion.kind.close()
    return {job.id: found[job.id] for job in jobs}


def _typical(jobs: Sequence[Job]) -> dict[str, Any]:
    """The config whose sparsity is nearest to a half: it has a mask where any has one."""
    return min((job.config for job in jobs), key=lambda config: abs(config["sparsity"] - 0.5))


def pilot(
    expansion: Expansion, config: Mapping[str, Any], seconds: float, should_stop: Callable[[], bool] | None = None
) -> Pace:
    """The pace of jobs like this one, from pilots that take so many seconds in all, the last one as long as others."""
    begun, timed = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="nbhelpers-") as scratch:
        for number in range(PILOTS):
            if should_stop is not None and should_stop():
                raise Interrupted("stopped while the pace was measured")
            few = {"steps": STEPS << number, "limit": DOCUMENTS << number, "keep_model": False}
            values = {**config, **few, "calibration_rows": min(config["calibration_rows"], 8), "checkpoint_every": None}
            folder = Path(scratch) / f"{number}" / "run"  # masks and answers are kept beside it: none is taken over
            result = expansion.kind.run(expansion.kind.config(**values), run_dir=folder, should_stop=should_stop)
            timed.append((few["steps"], result["tuned"]["n"], result["seconds"]))
            used = time.perf_counter() - begun
            if number and used > seconds / 2:  # the next one would take as long as all so far
                break
    return _fitted(*timed[-2:], evaluations=1 + bool(config["sparsity"]) + (config["tuning"] == "lora"))


def _fitted(one: tuple, other: tuple, evaluations: int) -> Pace:
    """The straight line through two pilots, none of whose parts takes less than no time."""
    (steps, documents, short), (more_steps, more_documents, long) = one, other

    def part(name: str) -> tuple[float, float]:
        return short.get(name, 0.0), long.get(name, 0.0)

    trained, answered = part("training"), part("evaluating")
    step = max(0.0, trained[1] - trained[0]) / (more_steps - steps)
    read = evaluations * (more_documents - documents)
    document = max(0.0, answered[1] - answered[0]) / read if read else answered[1] / (evaluations * documents)
    others = long["total"] - long.get("loading", 0.0) - trained[1] - answered[1]
    rest = others + max(0.0, trained[1] - more_steps * step)
    return Pace(step, document, max(0.0, rest))
