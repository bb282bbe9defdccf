"""What happens in one cell of a sparsity sweep? Mask, LoRA, merge, evaluation, with the numbers of a job that was done.

The job is one of the sweep, carried out in the sweep's own folder, so that the sweep need not do it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nbhelpers import grid, mask_files, mask_sets, masks, models, plots, sweep, workers
from nbhelpers.ledger import Ledger
from nbhelpers.projections import projections
from nbhelpers.runs import read_run
from nbhelpers.stats import digits
from nbhelpers.sweep_form import SweepConfig

SIDE = 14  # weights a side of the piece of a matrix that is shown
KEPT_BYTES = 10**9  # weights of a model above this are not kept for a picture
STAGES = {"dense": "as it is", "masked": "masked", "tuned": "tuned"}
SHOWN = {"dense": "as it is", "masked": "masked", "learned": "what LoRA adds", "tuned": "merged"}
SHADES, REVIVED = {"dense": "#555555", "masked": "#D55E00", "tuned": "#0072B2"}, "#009E73"


@dataclass(frozen=True)
class Cell:
    """One job of a sweep, done. row: its number in the plan of `rows` rows, from 1."""

    row: int
    rows: int
    run_dir: Path
    result: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n".join(lines(self))

    @cached_property
    def piece(self) -> dict[str, torch.Tensor] | None:
        """A corner of the first projection, (outputs, inputs): dense, kept (the mask), masked, learned, tuned."""
        return _piece(self)

    def figure(self) -> plots.Figure:
        return draw(self)


def explained_row(config: SweepConfig) -> int:
    """The row, from 1, that shows most: masked, next to a half, of the first model, task and method, its zeros kept
    where the plan has that mode."""
    rows = grid.expand(grid.read_plan(config.plan())).rows

    def order(number: int) -> tuple:
        values = rows[number].values
        return (values["sparsity"] == 0, abs(values["sparsity"] - 0.5), values["mode"] != "sparse_to_sparse", number)

    return 1 + min(range(len(rows)), key=order)


def carry_out(config: SweepConfig, folder: Path, **how: Any) -> Cell:
    """Do the job of `explained_row`, or read it where it is done. how: progress and should_stop of `sweep.run`.

    Its merged model is kept for the picture where it is small; the whole plan stands in the folder at the end, as
    before. RuntimeError where the job failed.
    """
    row = explained_row(config)
    expansion = grid.expand(grid.read_plan(config.plan()))
    place, job = expansion.rows[row - 1].values, expansion.jobs[expansion.rows[row - 1].job]
    begun = (folder / "plan.json").exists()
    if not begun or Ledger(folder).jobs.get(job.id) is None:
        alone = _alone(config, place, keep_model=_is_small(job.config["model"]))
        workers.lay_down(alone.plan(), folder)  # the one that is laid down first says whether the model is kept
    workers.lay_down(config.plan(), folder)
    sweep.run(config.plan(), folder, only=row, **how)
    state = Ledger(folder).state(job.id)
    if state.status != "finished":
        raise RuntimeError(f"the job of row {row} ({job.name}) is {state.status}: {state.error or 'run it again'}")
    return Cell(row, len(expansion.rows), state.run_dir, read_run(state.run_dir).result)


def _alone(config: SweepConfig, place: Mapping[str, Any], **changes: Any) -> SweepConfig:
    """The sweep of one row. Its axes stay axes, so that the job has the same name."""
    one = {"methods": (place["method"],), "sparsities": (place["sparsity"],), "modes": (place["mode"],)}
    one |= {name: (place[field],) for name, field in (("models", "model"), ("tasks", "task")) if field in place}
    one |= {"seeds": (place["seed"],)} if "seed" in place else {}
    return config.model_copy(update=one | changes)


def _is_small(model: str) -> bool:
    source, location = models.locate(model)
    return source != "hub" and 0 < models.stored_bytes(location) <= KEPT_BYTES


def lines(cell: Cell) -> list[str]:
    """The four steps in words. Trained numbers are judged, not written: they differ in the last digits by machine."""
    result, metric = cell.result, cell.result["metric"]
    mode = result["mode"].replace("_", " ")
    told = [
        f"row {cell.row} of {cell.rows}: {result['model']} on {result['task']}, {result['sparsity']:.0%}, {mode}",
        "",
    ]
    if mask := result["mask"]:
        told.append(
            f"mask      {mask['masked']:,} of {mask['numbers']:,} weights of the projections are set to zero: "
            f"{mask['sparsity']:.2%}, by {result['importance']} ({mask['pattern']}, compared within a {mask['scope']})"
        )
    told.append(
        f"LoRA      {result['trainable_parameters']:,} numbers are learned beside them in {result['steps']} steps"
        + ("; the mask takes from their product what would fill a zero" if mode.endswith("sparse") and mask else "")
    )
    merge = result["merge"]
    told.append(f"merge     gives the logits of the trained model: {_held(result, 'merged_model_computes_the_same')}")
    if mask:
        free = "" if result["mode"] == "sparse_to_sparse" else " (they were free to fill)"
        told.append(f"          masked weights that are not zero after it: {merge['violations']:,}{free}")
    stages = ("dense", "masked") if mask else ("dense",)
    said = ", ".join(f"{_interval(result, stage)} {STAGES[stage]}" for stage in stages)
    above = result["tuned"][metric] > result["masked"][metric]
    told.append(f"measure   {metric} on {result['tuned']['n']} documents: {said}; tuning raised it: {above}")
    return told


def _held(result: Mapping[str, Any], name: str) -> bool | None:
    """Whether a fact holds; None where it was not checked."""
    return next((fact["ok"] for fact in result["facts"] if fact["name"] == name), None)


def _interval(result: Mapping[str, Any], stage: str) -> str:
    value, between = result[stage][result["metric"]], result[stage][f"{result['metric']}_interval"]
    return digits(value) + ("" if between["low"] is None else f" [{digits(between['low'])}, {digits(between['high'])}]")


# --- the picture ----------------------------------------------------------------------------------------------------


def _piece(cell: Cell) -> dict[str, torch.Tensor] | None:
    """None where the merged model was not kept or there is no mask."""
    if cell.result["mask"] is None or not (cell.run_dir / "model").is_dir():
        return None
    before = models.load_model(cell.result["model"], device="cpu", dtype="float32").model
    after = models.load_model(str(cell.run_dir), device="cpu", dtype="float32").model
    first = projections(before, accept_low_coverage=True).covered[0]
    kept = _mask(cell)[first.name]
    parts = {"dense": before.get_parameter(first.name), "kept": kept, "tuned": after.get_parameter(first.name)}
    corner = {}
    for name, tensor in parts.items():
        matrix = first.as_matrix(tensor.detach())
        corner[name] = (matrix if matrix.ndim == 2 else matrix[0])[:SIDE, :SIDE]
    masked = corner["dense"] * corner["kept"]
    return {"name": first.name, **corner, "masked": masked, "learned": corner["tuned"] - masked}


def _mask(cell: Cell) -> Mapping[str, torch.Tensor]:
    """The mask of this job: the kept one whose sha256 is that of the record."""
    wanted, sparsity = cell.result["mask"]["sha256"], cell.result["sparsity"]
    for path in sorted((cell.run_dir.parent / mask_sets.FOLDER).glob("*.safetensors")):
        levels = mask_files.load(path).levels
        if any(masks.exact(sparsity) == masks.exact(known) for known in levels.sparsities):
            mask = dict(levels.lazily(sparsity))
            if mask_files.sha256(masks.pack(mask)) == wanted:
                return mask
    raise LookupError(f"no kept mask has the sha256 of the record ({wanted[:12]}): the masks of the sweep are gone")


def draw(cell: Cell) -> plots.Figure:
    """A corner of a weight matrix as it is, masked, what was learned, merged; and the measure at the three stages."""
    generated, piece = bool(cell.result["protocol"].get("generated")), cell.piece
    if piece is None:
        figure = plots._figure(5.2, 2.6, generated)
        _draw_measure(figure.add_subplot(), cell.result)
        return figure
    figure = plots._figure(11.5, 2.9, generated)
    axes = figure.subplots(1, len(SHOWN) + 1, width_ratios=[*[1] * len(SHOWN), 1.25])
    reach = float(max(piece[name].abs().max() for name in ("dense", "tuned")))
    for place, (name, title) in zip(axes, SHOWN.items(), strict=False):
        scale = float(piece[name].abs().max()) if name == "learned" else reach
        _draw_weights(place, piece, name, scale or 1.0)
        place.set_title(title, fontsize=10.5)
    axes[0].set_ylabel(f"a corner of\n{piece['name'].removesuffix('.weight')}", fontsize=8)
    _draw_measure(axes[-1], cell.result)
    return figure


def _draw_weights(axes, piece: Mapping[str, Any], name: str, reach: float) -> None:
    values = piece[name].clone()
    holes = values == 0
    values[holes] = float("nan")  # an exact zero is drawn as a hole
    axes.set_facecolor("#dfe3e8")
    axes.imshow(values.numpy(), cmap="PuOr", vmin=-reach, vmax=reach, aspect="equal")
    told = f"{int(holes.sum())} of {values.numel()} are 0\nlargest {digits(float(piece[name].abs().max()))}"
    axes.set_xlabel(told, fontsize=9)
    if name in ("learned", "tuned"):
        for y, x in (~piece["kept"] & ~holes).nonzero().tolist():
            axes.plot(x, y, marker="s", markersize=4, markerfacecolor="none", markeredgecolor=REVIVED)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_measure(axes, result: Mapping[str, Any]) -> None:
    stages = [stage for stage in STAGES if stage != "masked" or result["mask"]]
    for number, stage in enumerate(stages):
        value, between = result[stage][result["metric"]], result[stage][f"{result['metric']}_interval"]
        axes.barh(number, value, color=SHADES[stage], height=0.55)
        if between["low"] is not None:
            axes.plot([between["low"], between["high"]], [number, number], color="#1f2328", linewidth=1.2)
        end = max(value, between["high"] or 0)
        axes.text(end + 0.02, number, f"{value:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(stages)), [STAGES[stage] for stage in stages])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"{result['metric']}, 95 % over {result['tuned']['n']} documents", fontsize=9)
    axes.set_title(f"{result['task']} after {result['steps']} steps", fontsize=10)
    plots._plain(axes)
