"""What do models, strategies, levels and seeds do to each other? A grid of pruning runs, on the ledger of sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers import sweep
from nbhelpers.grid import Plan, expand, read_plan
from nbhelpers.ledger import Ledger
from nbhelpers.records import canonical_json
from nbhelpers.registry import unknown

# Fields that decide which heads are closed, and nothing of how an unpruned model is fine-tuned.
PRUNING_ONLY = ("strategy", "level", "iterative", "heads_per_round", "kv_groups", "min_heads_per_layer", "remove")
PRUNING_ONLY += ("scoring_windows", "control", "name")


class PruningFineTuningExperiment:
    """`PruningFineTuningExperiment(folder, models=[...], strategies=[...], levels=[...], seeds=[...]).run("30m")`.

    base: PruningConfig fields that all runs share; axes: further fields, each with its values (learning_rate=[...]).
    shared_control: one control a group instead of one a run. Level 0 closes no head, so what fine-tuning makes of it is
    the control of every run with the same model, text, steps, method and seed; a results row says which job it was.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        models: Sequence[str],
        strategies: Sequence[str],
        levels: Sequence[float],
        seeds: Sequence[int] = (0,),
        base: Mapping[str, Any] | None = None,
        shared_control: bool = False,
        name: str = "pruning grid",
        **axes: Sequence[Any],
    ) -> None:
        self.folder, self.shared_control = Path(folder), shared_control
        levels, base, aliases = list(levels), dict(base or {}), []
        if shared_control:
            if base.get("control"):
                raise ValueError(
                    "shared_control takes the place of a control in each run, got control True: choose one"
                )
            base["control"] = False
            levels = levels if 0 in levels else [0.0, *levels]
            aliases = [{"when": {"level": 0.0}, "ignore": ["strategy"]}]
        grid = {"model": list(models), "strategy": list(strategies), "level": levels}
        for field in axes:
            if field in grid:
                raise ValueError(unknown("axis", field, ["models", "strategies", "levels"]))
        values = {"kind": "pruning", "name": name, "base": base, "axes": grid | {f: list(v) for f, v in axes.items()}}
        self.plan: Plan = read_plan(values | {"seeds": list(seeds), "aliases": aliases})
        expand(self.plan)  # what is wrong with it is said now

    def run(
        self,
        budget: str | float | None = None,
        progress: Callable[[dict], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Do what is missing; returns the coverage. See `sweep.run`."""
        return sweep.run(self.plan, self.folder, budget, progress, should_stop)

    def status(self) -> dict[str, Any]:
        """Coverage, and where each job stands; ValueError before the first `run`."""
        return sweep.status(self.folder)

    def results(self) -> list[dict[str, Any]]:
        """A row a cell: axes, job, status, perplexities of the stages, recovery. `control_from`: the job that ran the
        control, None where there is none."""
        return with_shared_controls(self.folder)


def with_shared_controls(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a pruning grid; a row without a control of its own gets that of the level-0 run of its group."""
    rows, jobs = sweep.results(folder), Ledger(folder).jobs
    controls = {
        _group(jobs[row["job"]].config): row
        for row in reversed(rows)
        if jobs[row["job"]].config["level"] == 0 and row.get("fine_tuned_perplexity") is not None
    }
    for row in rows:
        found = controls.get(_group(jobs[row["job"]].config))
        row["control_from"] = row["job"] if row.get("control_perplexity") is not None else None
        if row["status"] == "finished" and row["control_from"] is None and found is not None:
            row["control_perplexity"], row["control_from"] = found["fine_tuned_perplexity"], found["job"]
    return rows


def _group(config: Mapping[str, Any]) -> str:
    return canonical_json({name: value for name, value in config.items() if name not in PRUNING_ONLY})
